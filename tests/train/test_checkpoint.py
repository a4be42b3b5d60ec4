"""A killed and resumed run is the straight run, and what is not the same run is not resumed."""

import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml

from dpo.data.stream import build_stream
from dpo.data.templates import CHATML
from dpo.errors import UserError
from dpo.model.load import load_policy
from dpo.model.scorer import Scorer
from dpo.train import checkpoint as checkpoints
from dpo.train.checkpoint import find_checkpoint
from tests.train.runs import config, killed, metrics, model_folder, run, started, training


def test_a_killed_and_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path):
    """NF4 and LoRA dropout, into the second epoch (24 pairs, steps of 16), between two logs."""
    flags = ["--model.quantization", "nf4", "--lora.dropout", 0.2, "--train.max_steps", 5]
    flags += [
        "--train.logging_steps",
        3,
        "--train.save_steps",
        2,
        "--data.eval_fraction",
        0.2,
        "--train.eval_steps",
        2,
    ]
    straight = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "straight"))

    settings = config(tmp_path, *flags, "--train.output_dir", tmp_path / "killed")
    killed(settings, at=5)
    assert not (tmp_path / "killed" / "final").exists()
    assert [p.name for p in sorted((tmp_path / "killed").glob("checkpoint-*"))] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = run(settings)

    assert training(resumed) == training(straight)
    for folder in ("final", "checkpoint-4"):
        ours, theirs = (
            (path / folder / "adapter_model.safetensors").read_bytes()
            for path in (resumed, straight)
        )
        assert ours == theirs
    assert json.loads((resumed / "summary.json").read_text()) == json.loads(
        (straight / "summary.json").read_text()
    )


def test_full_fine_tuning_resumes_bit_for_bit_with_the_reference_of_step_0(tmp_path):
    flags = ["--model.adapter", "none", "--optim.learning_rate", 1e-4, "--train.save_steps", 2]
    straight = run(config(tmp_path, *flags, "--train.max_steps", 3))
    again = config(
        tmp_path,
        *flags,
        *("--train.max_steps", 3, "--train.resume", straight / "checkpoint-2"),
        *("--train.output_dir", tmp_path / "again"),
    )
    resumed = run(again)
    ours, theirs = ((f / "final" / "model.safetensors").read_bytes() for f in (resumed, straight))
    assert ours == theirs
    assert training(resumed)[-1] == training(straight)[-1]


@pytest.mark.slow
def test_the_final_adapter_scores_in_a_fresh_process_as_it_did_in_this_one(tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 4, "--optim.learning_rate", 1e-2))
    code = (
        "import sys, torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n"
        "from dpo.data.stream import build_stream\n"
        "from dpo.model.scorer import Scorer\n"
        "torch.set_num_threads(1)\n"  # as here: they decide the last bit
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "stream = build_stream([([5, 6, 7], [8, 9], [10, 11])])\n"
        "with torch.no_grad(), model.disable_adapter(): base = Scorer(model)(stream)\n"
        "with torch.no_grad(): print((Scorer(model)(stream)).tolist(), '|', base.tolist())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder / "final")]
    fresh = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    trained, base = (torch.tensor(json.loads(part)) for part in fresh.split("|"))

    settings = config(tmp_path, "--model.name_or_path", folder / "final")
    for lean in (False, True):
        settings.model.lean_layers = lean
        scorer = Scorer(load_policy(settings, "cpu").model)
        expected = scorer(build_stream([([5, 6, 7], [8, 9], [10, 11])])).detach()
        # The same bits by PEFT's own code; lean layers add the update in another order.
        assert (trained - expected).abs().max() <= (5e-6 if lean else 0)
    assert (trained - base).abs().max() > 1e-3


def test_an_adapter_that_was_not_written_is_noticed(tmp_path, monkeypatch):
    """The negative control of the check after every save."""
    from safetensors.torch import load_file, save_file

    save_pretrained = peft.PeftModel.save_pretrained

    def empty(self, folder, **options):
        save_pretrained(self, folder, **options)
        file = folder / "adapter_model.safetensors"
        save_file(dict(list(load_file(file).items())[:1]), file)

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", empty)
    with pytest.raises(RuntimeError, match="read back 1 tensors"):
        run(config(tmp_path))


def test_a_finished_run_is_not_touched_and_never_puts_it_aside(tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds a finished run"):
        run(config(tmp_path, "--train.max_steps", 1))
    run(config(tmp_path, "--train.max_steps", 1, "--train.resume", "never"))
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == before
    assert (folder / "summary.json").exists()


def stopped_run(tmp_path, *flags):
    """A run of three steps as if killed after its checkpoint of step 2."""
    folder = run(config(tmp_path, "--train.save_steps", 2, *flags))
    (folder / "summary.json").unlink()
    return folder


def test_resume_refuses_another_configuration_and_names_the_key(tmp_path):
    stopped_run(tmp_path)
    with pytest.raises(UserError, match=r"optim.learning_rate \(was 0.00\d+, is 0.5\)"):
        run(config(tmp_path, "--train.save_steps", 2, "--optim.learning_rate", 0.5))
    with pytest.raises(UserError, match="took 16 pairs a step, now it would be 8"):
        run(config(tmp_path, "--train.per_device_train_batch_size", 8))


def test_a_run_of_relative_paths_is_resumed_from_elsewhere(tmp_path, monkeypatch):
    """Also from a checkpoint of versions up to 0.4.0, which kept the paths as they were typed."""
    settings = config(tmp_path)
    stopped_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run" / "checkpoint-2" / "config.yaml"
    assert yaml.safe_load(file.read_text())["data"]["name_or_path"] == settings.data.name_or_path
    settings.data.name_or_path = Path(settings.data.name_or_path).name
    assert find_checkpoint(settings) == (file.parent, [])
    checkpoints._check_same_config(settings, file.parent)
    typed = file.read_text().replace(f"{tmp_path}/{settings.data.name_or_path}", "rows.jsonl")
    assert typed != file.read_text()
    file.write_text(typed)
    checkpoints._check_same_config(settings, file.parent)


def test_resume_refuses_a_damaged_checkpoint_and_names_the_file(tmp_path):
    folder = stopped_run(tmp_path)
    file = folder / "checkpoint-2" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged"):
        run(config(tmp_path))


def test_resume_refuses_rows_that_have_changed(tmp_path):
    stopped_run(tmp_path)
    settings = config(tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text().replace('"chosen": "The', '"chosen": "A', 1))
    with pytest.raises(UserError, match="the pairs have changed"):
        run(settings)


def test_resume_refuses_a_reference_that_has_changed(tmp_path):
    model = model_folder(tmp_path)
    stopped_run(tmp_path, "--model.name_or_path", model)
    weights = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        weights.lm_head.weight.mul_(1.5)
    weights.save_pretrained(model)
    with pytest.raises(UserError, match="the reference has changed"):
        run(config(tmp_path, "--model.name_or_path", model))


def test_a_resumed_run_names_its_step_and_old_checkpoints_go_only_after_the_new_one(tmp_path):
    flags = ["--train.save_steps", 1, "--train.save_total_limit", 2, "--train.max_steps", 4]
    folder = run(config(tmp_path, *flags))
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_what_a_stranger_calls_a_checkpoint_is_neither_read_nor_deleted(tmp_path, capsys):
    """An empty folder with the highest number, another trainer's, a link, and one in the way."""
    folder = stopped_run(tmp_path)
    other = tmp_path / "elsewhere"
    for path in (folder / "checkpoint-99", folder / "checkpoint-0", folder / "checkpoint-3", other):
        path.mkdir()
    (folder / "checkpoint-0" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-1").symlink_to(other)
    flags = ["--train.save_steps", 1, "--train.save_total_limit", 1]
    run(config(tmp_path, *flags))
    said = capsys.readouterr().err
    assert "checkpoint-99 was passed over: " in said
    assert "resumed after step 2" in said
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{n}" for n in ("0", "1", "3", "99", "3.old-1")}
    assert (folder / "checkpoint-0" / "trainer_state.json").exists()
    assert (folder / "checkpoint-1").is_symlink()
    assert not any((folder / "checkpoint-3.old-1").iterdir())


def test_a_mistake_in_the_data_leaves_the_old_run_where_it_is(tmp_path):
    """Also with resume=never: nothing is renamed until nothing can be wrong any more."""
    folder = run(config(tmp_path, "--train.max_steps", 1))
    settings = config(tmp_path, "--train.resume", "never", "--data.format", "openai")
    with pytest.raises(UserError, match="'input' is missing"):
        run(settings)
    assert (folder / "summary.json").exists()
    assert not (tmp_path / "run.old-1").exists()


def test_a_run_that_never_reached_a_checkpoint_is_put_aside_and_started_again(tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    (folder / "summary.json").unlink()
    again = run(config(tmp_path, "--train.max_steps", 1))
    assert (tmp_path / "run.old-1" / "metrics.jsonl").exists()
    assert training(again) == training(tmp_path / "run.old-1")


def test_going_on_in_another_folder_brings_the_log_along(tmp_path):
    flags = ["--data.eval_fraction", 0.3, "--train.save_steps", 2]
    first = run(config(tmp_path, *flags))
    other = ["--train.resume", first / "checkpoint-2", "--train.output_dir", tmp_path / "other"]
    second = run(config(tmp_path, *flags, *other))
    assert training(second) == training(first)
    assert json.loads((second / "summary.json").read_text())["before"]["step"] == 0


def test_a_line_that_was_cut_off_in_the_writing_does_not_block_a_resume(tmp_path):
    folder = stopped_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    assert [line["step"] for line in metrics(run(config(tmp_path)))] == [1, 2, 3]


def test_going_on_in_another_folder_brings_the_best_weights_along(tmp_path):
    flags = ["--data.eval_fraction", 0.3, "--train.save_steps", 2, "--train.eval_steps", 1]
    flags += ["--train.metric_for_best_model", "eval/loss"]
    first = run(config(tmp_path, *flags))
    other = ["--train.resume", first / "checkpoint-2", "--train.output_dir", tmp_path / "other"]
    second = run(config(tmp_path, *flags, *other))
    both = ((folder / "best" / "metric.json").read_text() for folder in (first, second))
    assert len(set(both)) == 1


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_loads(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train\.output_dir: got .*file/run"):
        run(config(tmp_path, "--train.output_dir", tmp_path / "file" / "run"))


# --------------------------------------------------------------------- what is not ours to move


def test_a_folder_of_the_users_is_neither_renamed_nor_written_to(tmp_path):
    """Although it has a config.yaml; negative control: an empty one is taken."""
    mine = tmp_path / "run"
    mine.mkdir()
    (mine / "config.yaml").write_text("model: mine\n")
    (mine / "data.jsonl").write_text("{}\n")
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=r"holds config.yaml, data.jsonl and is no run's"):
            started(config(tmp_path, "--train.resume", resume))
    assert sorted(path.name for path in mine.iterdir()) == ["config.yaml", "data.jsonl"]
    assert not (tmp_path / "run.old-1").exists()
    for file in mine.iterdir():
        file.unlink()
    run(config(tmp_path))


@pytest.mark.parametrize("what", ["rows", "model", "working directory"])
def test_an_old_run_is_not_put_aside_with_what_the_new_one_needs(tmp_path, monkeypatch, what):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    flags = ["--train.resume", "never"]
    if what == "rows":
        flags += ["--data.name_or_path", str(shutil.copy(tmp_path / "rows.jsonl", folder))]
    elif what == "model":
        flags += ["--model.name_or_path", str(folder / "final")]
    else:
        monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"would be put aside, and .* with it"):
        run(config(tmp_path, *flags))
    assert folder.exists()


def test_a_link_to_the_run_folder_stays_a_link(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").symlink_to(disk / "run")
    run(config(tmp_path, "--train.max_steps", 1))
    run(config(tmp_path, "--train.max_steps", 1, "--train.resume", "never"))
    assert (tmp_path / "run").is_symlink()
    assert (disk / "run" / "final").is_dir()
    assert (disk / "run.old-1" / "final").is_dir()


HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from dpo.run_folder import lock
lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_two_runs_do_not_write_into_one_folder(tmp_path, resume):
    """And the lock goes with the process, however that ends."""
    folder = run(config(tmp_path, "--train.max_steps", 1))
    before = (folder / "metrics.jsonl").read_text()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(UserError, match=rf"process {other.pid} on .* writes into .* now"):
                run(config(tmp_path, "--train.resume", resume, "--train.max_steps", 2))
        finally:
            other.kill()
    assert (folder / "metrics.jsonl").read_text() == before
    run(config(tmp_path, "--train.resume", "never", "--train.max_steps", 1))


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
    """A template that writes the date renders alike when the run goes on tomorrow."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }} " + CHATML)
    flags = ["--data.chat_template", template, "--train.save_steps", 2, "--train.max_steps", 3]

    def on(day):
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return cls(2026, 1, day)

        monkeypatch.setattr("dpo.train.budget.date", Day)

    on(30)
    straight = training(folder := run(config(tmp_path, *flags)))
    (folder / "summary.json").unlink()  # as if it had been stopped after its checkpoint
    on(31)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "another cache"))
    again = run(config(tmp_path, *flags))
    assert (folder / "header.txt").read_text().count("resumed") == 1
    assert training(again) == straight
    kept = yaml.safe_load((again / "config.yaml").read_text())["data"]
    assert kept["template_date"] == "2026-01-30"
    saved = (again / "final" / "chat_template.jinja").read_text()
    assert saved == template.read_text()  # its users ask for their own day
