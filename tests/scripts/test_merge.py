"""dpo merge as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dpo.after.merge import merge_run
from dpo.errors import UserError
from dpo.model.load import load_policy
from tests.after.hub import TOKEN, running_hub
from tests.after.made_runs import made_run
from tests.commands import called
from tests.models import QUICKSTART_MODEL
from tests.train.runs import config, rows_file, run

SCRIPT = Path(__file__).parents[2] / "scripts" / "merge.py"
# The same, but that the adapter is lost on the way.
LOSING = f"""
import runpy
import dpo.after.merge
dpo.after.merge.merge_adapter = lambda base, *_: base
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def merge(*arguments, hub=None, how=(SCRIPT,), **environment):
    """Exit code, stdout and stderr. HF_ENDPOINT is read at import: hence a process of its own."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    if hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=clean | environment,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_merged_run_is_pushed_and_the_push_can_be_repeated_alone(tmp_path):
    run = made_run(tmp_path)
    push = [run, "--pairs", 8, "--push_to_hub", "me/model"]
    with running_hub() as hub:
        hub.refuse["/api/models/me/model/commit"] = 403
        code, out, err = merge(*push, hub=hub, HF_TOKEN=TOKEN)
        assert code == 2, err
        assert "me/model was not pushed" in err
        assert "Traceback" not in err
        written = {file.name: file.read_bytes() for file in (run / "merged").iterdir()}
        assert "verified" in out

        hub.refuse.clear()
        code, again, err = merge(*push, hub=hub, HF_TOKEN=TOKEN)
        assert code == 0, err
        assert "Distance from the trained policy" in out
        assert again == f"Pushed to {hub.url}/me/model.\n"
        assert hub.files["me/model"] == written
        assert hub.visibility["me/model"] == "private"
        assert TOKEN not in out + again + err


@pytest.mark.slow
def test_what_fails_its_verification_is_neither_written_nor_pushed(tmp_path):
    run = made_run(tmp_path)
    with running_hub() as hub:
        push = [run, "--pairs", 8, "--push_to_hub", "me/model"]
        code, _, err = merge(*push, hub=hub, how=("-c", LOSING), HF_TOKEN=TOKEN)
        assert code == 2
        assert "28 of 28 layers are wrong" in err
        assert "Traceback" not in err
        assert not [request for request in hub.requests if "models" in request.path]
        assert hub.files == {}
    assert not (run / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/run"], "no/such/run holds no finished run"),
        (["RUN", "--output", "RUN/final"], "final exists, and nothing is overwritten"),
        (["RUN", "--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
    ],
    ids=str,
)
def test_a_user_error_is_one_message_and_exit_code_2(tmp_path, arguments, said):
    run = made_run(tmp_path)
    arguments = [text.replace("RUN", str(run)) for text in arguments]
    code, out, err = called("merge.py", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert not (run / "merged").exists()


@pytest.mark.slow
def test_without_a_token_nothing_is_merged_to_be_pushed(tmp_path):
    run = made_run(tmp_path)
    code, _, err = merge(run, "--push_to_hub", "me/model", HF_HOME=str(tmp_path))
    assert code == 2
    assert "there is no token for the hub" in err
    assert "Traceback" not in err
    assert not (run / "merged").exists()


def test_a_refused_merge_exits_with_2_and_unverified_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.after.merge.merge_adapter", lambda base, *_: base)
    run = made_run(tmp_path)
    code, _, err = called("merge.py", run, "--pairs", 2)
    assert code == 2
    assert err.startswith("error: merge: 28 of 28 layers are wrong")
    assert not (run / "merged").exists()
    code, out, err = called("merge.py", run, "--pairs", 2, "--unverified")
    assert code == 0, err
    assert "NOT verified: 28 of 28 layers are wrong" in out


def test_a_dora_run_is_merged(tmp_path):
    run = made_run(tmp_path, "--lora.use_dora", "true", "--lora.use_rslora", "true", std=0.1)
    code, _, err = called("merge.py", run, "--pairs", 8, "--dtype", "bfloat16")
    assert code == 0, err
    error = json.loads((run / "merged" / "merge.json").read_text())["errors_nats"]["read back"]
    assert error["mean"] < 0.02
    assert error["kept"] == pytest.approx(1, abs=0.1)


def test_a_run_that_was_moved_away_from_its_data_is_merged_evaluated_and_answers(
    tmp_path, monkeypatch
):
    """As in another container: the folder was moved, the rows are gone, the variables differ."""
    made = run(config(tmp_path, "--data.eval_fraction", 0.5, "--optim.learning_rate", 1e-2))
    there = tmp_path / "elsewhere" / "run"
    shutil.copytree(made, there)
    code, out, err = called("merge.py", made, "--pairs", 5)
    assert code == 0, err
    with_data = json.loads((made / "merged" / "merge.json").read_text())

    shutil.rmtree(made)
    rows = rows_file(tmp_path, 24).rename(tmp_path / "hidden.jsonl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setenv("DPO_MODEL__QUANTIZATION", "nf4")
    monkeypatch.setenv("DPO_LORA__R", "3")
    monkeypatch.chdir(there.parent)
    code, out, err = called("merge.py", "run", "--pairs", 5)
    assert code == 0, err
    assert "5 held-out pairs" in out
    assert "verified" in out
    record = json.loads((there / "merged" / "merge.json").read_text())
    assert record["errors_nats"] == with_data["errors_nats"]  # the same pairs were scored
    code, out, err = called("generate.py", "run", "Which?", "--max_new_tokens", 2)
    assert code == 0, err
    code, out, err = called("evaluate.py", "run")
    assert code == 2
    assert "rows.jsonl does not exist" in err
    assert "--data_path" in err
    code, out, err = called("evaluate.py", "run", "--data_path", rows, "--prompts", 2)
    assert code == 0, err


def test_more_pairs_than_the_run_folder_keeps_come_from_the_data(tmp_path):
    made = run(config(tmp_path, rows=70))
    assert len((made / "pairs.jsonl").read_text().splitlines()) == 64
    code, out, err = called("merge.py", made, "--pairs", 66)
    assert code == 0, err
    assert "66 training (this run held nothing out) pairs" in out


def test_a_run_on_a_checkpoint_stored_in_4_bits_is_merged(tmp_path):
    """Into the weights that it was trained on; there are none in 16 bits."""
    flags = ["--model.quantization", "nf4", "--train.max_steps", 2, "--optim.learning_rate", 1e-3]
    stored = tmp_path / "stored"
    policy = load_policy(config(tmp_path, "--model.quantization", "nf4"), "cpu").model
    policy.unload().save_pretrained(stored)
    AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(stored)
    folder = run(config(tmp_path, "--model.name_or_path", stored, *flags))
    said = []
    merge_run(folder, tmp_path / "merged", num_pairs=4, say=said.append)
    assert said[-1].endswith("(dequantized base, float32), verified.")
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    with pytest.raises(
        UserError, match="got 16bit, but the checkpoint of this run is stored in nf4"
    ):
        merge_run(folder, tmp_path / "other", base="16bit", num_pairs=4)


def test_what_a_run_was_made_from_must_be_the_same_when_it_is_merged(tmp_path):
    """The base trained on in its folder, or its template changed; negative control: as it was."""
    model = shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")
    folder = run(config(tmp_path, "--model.name_or_path", model, "--train.max_steps", 1))
    weights, template = model / "model.safetensors", model / "chat_template.jinja"
    for file, what in ((weights, "the model .*model has"), (template, "the tokenizer or template")):
        before = file.read_bytes()
        if file == weights:
            changed = load_file(file)
            changed["model.norm.weight"] *= 1.01
            save_file(changed, file, metadata={"format": "pt"})
        else:
            file.write_bytes(before + b" ")
        with pytest.raises(UserError, match=rf"{what}.* changed since this run"):
            merge_run(folder, tmp_path / "merged", num_pairs=4)
        file.write_bytes(before)
    merge_run(folder, tmp_path / "merged", num_pairs=4)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (model / name).read_bytes()
        assert (folder / "final" / name).read_bytes() == (model / name).read_bytes()
