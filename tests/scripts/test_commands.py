"""The command `dpo`: its sub-commands, their help, recipes, variables, processes."""

import json
import os
import subprocess
import sys
import time

import pytest

from dpo.cli import RECIPES, known_keys, parse
from dpo.commands import NAMES, main
from dpo.errors import UserError
from tests.train.runs import QUIET, metrics, rows_file


def left_with(capsys, *argv):
    """Exit code, stdout and stderr of `dpo ARGV`."""
    code = 0
    try:
        main(list(argv))
    except SystemExit as left:
        code = left.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def process(*argv, **environment):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_comes_in_under_a_second_and_without_torch(name):
    words = [*([name] if name else []), "--help"]
    code = f"import sys; from dpo.commands import main\ntry: main({words!r})\nfinally: "
    code += "print('heavy:', sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    started = time.perf_counter()
    done = process("-c", code)
    took = time.perf_counter() - started
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert f"usage: dpo {name}" in done.stdout if name else all(n in done.stdout for n in NAMES)
    assert took < 5  # 0.2 to 0.4 s; a busy machine is slower, an import of torch takes 4 s there


@pytest.mark.parametrize("name", NAMES[:4])
def test_help_shows_every_key_and_the_commands_own_flags(name, capsys):
    own = {"preview": ["rows"], "plan": ["gpu", "memory_gib", "tflops", "mfu", "lengths"]}
    code, out, _ = left_with(capsys, name, "--help")
    assert code == 0
    for flag in [*known_keys(), "config", *own.get(name, ["num_processes"])]:
        assert f"  --{flag} " in out, flag


def test_scripts_and_python_m_are_the_same_command():
    out = {process(*words, "--version").stdout for words in (["-m", "dpo"],)}
    assert out == {"dpo 0.4.0\n"}
    by_script, by_module = (
        process(*words, "--help").stdout for words in (["scripts/merge.py"], ["-m", "dpo", "merge"])
    )
    assert by_script.split("\n\n", 1)[1] == by_module.split("\n\n", 1)[1] != ""


def test_a_misspelt_command_and_flag_are_one_message_with_exit_code_2(capsys):
    code, out, err = left_with(capsys, "trian")
    assert (code, out) == (2, "")
    assert err.startswith("error: dpo: ")
    assert "'train'" in err
    code, _, err = left_with(capsys, "merge", "RUN", "--wieghts", "best")
    assert code == 2
    said = "unknown flag wieghts. Nearest: weights. All flags: dpo merge --help."
    assert err == f"error: dpo merge: {said}\n"


RECIPE_NAMES = ["neuralhermes", "rpo", "simpo", "tulu3", "zephyr"]


def test_recipes_are_listed_found_by_name_and_copied(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = left_with(capsys, "recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == RECIPE_NAMES
    assert parse(["--config", "zephyr"]) == parse(["--config", str(RECIPES / "zephyr.yaml")])
    assert left_with(capsys, "recipes", "zephyr")[0] == 0
    assert (tmp_path / "zephyr.yaml").read_text() == (RECIPES / "zephyr.yaml").read_text()
    (tmp_path / "zephyr.yaml").write_text("loss:\n  beta: 0.5\n")  # now one's own
    assert parse(["--config", "zephyr.yaml"]).loss.beta == 0.5
    code, _, err = left_with(capsys, "recipes", "zephyr")
    assert code == 2
    assert "zephyr.yaml exists already" in err
    code, _, err = left_with(capsys, "recipes", "zefyr")
    assert code == 2
    assert f"one of the recipes: {', '.join(RECIPE_NAMES)}" in err


def test_the_file_is_below_the_environment_and_the_environment_below_the_flags(
    tmp_path, monkeypatch
):
    file = tmp_path / "given.yaml"
    file.write_text("loss:\n  beta: 0.2\noptim:\n  learning_rate: 0.2\ntrain:\n  seed: 2\n")
    monkeypatch.setenv("DPO_OPTIM__LEARNING_RATE", "0.3")
    monkeypatch.setenv("DPO_TRAIN__SEED", "3")
    monkeypatch.setenv("DPO_LORA__TARGET_MODULES", "[q_proj, v_proj]")
    config = parse(["--train.seed", "4", "--config", str(file)])
    assert (config.loss.beta, config.optim.learning_rate, config.train.seed) == (0.2, 0.3, 4)
    assert config.lora.target_modules == ["q_proj", "v_proj"]


def test_a_variable_that_sets_no_key_is_refused(monkeypatch):
    monkeypatch.setenv("DPO_LOSS__BETTA", "0.3")
    with pytest.raises(UserError, match=r"DPO_LOSS__BETTA sets no key\. Nearest: DPO_LOSS__BETA,"):
        parse([])


def test_variables_of_other_things_do_not_matter(monkeypatch):
    monkeypatch.setenv("DPO_HOME", "x")
    assert parse([]).loss.beta == 0.3


@pytest.mark.parametrize(("count", "said"), [("0", "wanted 1 or more"), ("2", "a launcher has")])
def test_a_number_of_processes_that_cannot_be(count, said, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = left_with(capsys, "train", "--num_processes", count)
    assert code == 2
    assert said in err


def test_a_completion_for_the_shell_knows_the_keys(capsys):
    code, out, _ = left_with(capsys, "--print_completion", "shtab-bash")
    assert code == 0
    assert "--loss.beta" in out
    assert "cache-reference" in out


@pytest.mark.distributed
def test_num_processes_starts_ranks_and_a_mistake_is_said_once(tmp_path):
    data = rows_file(tmp_path, 20)
    flags = ["--data.name_or_path", data, "--train.output_dir", tmp_path / "run", *QUIET]
    words = ["-m", "dpo", "train", "--num_processes", "2", *map(str, flags)]
    done = process(*words, "--train.max_steps", "2")
    assert done.returncode == 0, done.stderr
    assert "device: 2 x CPU" in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "train/loss" in line] == [1, 2]

    (tmp_path / "empty.jsonl").write_text(json.dumps({"no": "pair"}) + "\n")
    wrong = ["--data.name_or_path", str(tmp_path / "empty.jsonl")]
    done = process(*words, "--train.max_steps", "2", *wrong)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
