"""What a command imports: no more than it needs. Names of modules and no clock, which says little.

Packages import others, so some are there whatever this project does: transformers' models load
torch's compiler, and PEFT loads bitsandbytes.
"""

import os
import subprocess
import sys

import pytest

from dpo.cli import parse
from dpo.config import PACKAGE
from dpo.data.loader import load_data
from dpo.model.named import load_tokenizer
from tests.report.fake_run import fake_run

pytestmark = pytest.mark.slow  # each is a process of its own

HEAVY = (
    "torch transformers transformers.modeling_utils accelerate datasets pandas peft bitsandbytes "
    "matplotlib matplotlib.pyplot lm_eval sklearn torchvision accelerate.commands.launch"
).split()
PROGRAM = f"""
import sys
from dpo.commands import main
try:
    main(sys.argv[1:])
finally:
    print("imported", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""
SHORT = "--train.max_steps 1 --train.eval_prompts 0 --train.report_to none".split()
SHORT += "--train.eval_exact_match false --train.metric_for_best_model null".split()


def imported(*words):
    """The heavy modules that `dpo WORDS` has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()[1:])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A few rows, as a file of lines, whose tokens are cached, and as one of columns."""
    import datasets

    folder = tmp_path_factory.mktemp("rows")
    lines = (PACKAGE / "quickstart" / "train.jsonl").read_text().splitlines()[:24]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    config = parse(["--data.name_or_path", str(folder / "rows.jsonl")])
    load_data(config, load_tokenizer(config.model))
    table = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    table.to_parquet(folder / "rows.parquet")
    return folder


def training(rows, output, *flags):
    """What is imported by a run of one step."""
    data = ["--data.name_or_path", rows / "rows.jsonl", "--train.output_dir", output]
    return imported("train", *data, *SHORT, *flags)


def test_the_list_of_recipes_imports_nothing_heavy():
    assert imported("recipes") == set()


def test_a_report_imports_what_draws_and_only_to_draw(tmp_path):
    run = fake_run(tmp_path / "run")
    assert imported("report", run) == {"matplotlib"}
    assert imported("report", run) == set()  # it is up to date


def test_a_preview_imports_no_model(rows):
    assert imported("preview", "--data.name_or_path", rows / "rows.jsonl") == {
        "torch",
        "transformers",
    }


def test_rows_that_datasets_reads_import_it(rows):
    """The negative control of the test above."""
    found = imported("preview", "--data.name_or_path", rows / "rows.parquet")
    assert found >= {"datasets", "pandas"}


def test_full_fine_tuning_imports_no_adapters_and_no_report(rows, tmp_path):
    flags = ["--model.adapter", "none", "--optim.name", "adamw", "--train.write_report", "false"]
    assert training(rows, tmp_path / "run", *flags) == {
        "torch",
        "transformers",
        "transformers.modeling_utils",
        "accelerate",
    }


def test_an_adapter_and_a_report_import_theirs(rows, tmp_path):
    """The negative control of the test above."""
    found = training(rows, tmp_path / "run")
    assert found >= {"peft", "bitsandbytes", "matplotlib"}
    assert not found & {"datasets", "lm_eval", "sklearn", "torchvision", "matplotlib.pyplot"}
