"""train.patience: a run stops when evaluations stop getting better."""

import json
import shutil

import pytest

from dpo.catalogue import PAIR_METRICS
from dpo.errors import UserError
from dpo.train.trainer import Run
from tests.commands import as_two_processes
from tests.train.runs import QUIET, config, killed, metrics, rows_file, run, started, training

# The held-out loss after each step: the best is that of step 4.
LOSSES = {1: 0.6, 2: 0.5, 3: 0.55, 4: 0.4, 5: 0.45, 6: 0.4, 7: 0.41, 8: 0.42, 9: 0.43, 10: 0.44}


@pytest.fixture(autouse=True)
def _losses(monkeypatch):
    keep_best = Run._keep_best

    def keep(self, step, metrics):
        measured = {"eval/loss": LOSSES[step], "eval/rewards/margins": float(step)}
        return keep_best(self, step, metrics | measured)

    monkeypatch.setattr(Run, "_keep_best", keep)


def patient(folder, patience, *flags):
    """Evaluated after every step, of 9."""
    held_out = ["--data.eval_fraction", 0.3, "--train.eval_steps", 1, "--train.max_steps", 9]
    held_out += ["--train.metric_for_best_model", "eval/loss", "--train.patience", patience]
    return config(folder, *held_out, "--train.save_steps", 2, *flags)


def last_step(folder):
    return metrics(folder)[-1]["step"]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_stops_after_so_many_evaluations_without_a_better_one(tmp_path, capsys):
    """Two in a row: 3 is followed by a better 4; 5 and 6 are not better, since a tie is none."""
    folder = run(patient(tmp_path, 2, "--train.write_report", "true"))
    said = (
        "stopped after step 6 of 9 (train.patience): no better eval/loss in 2 evaluations in a "
        "row; the best weights are in best/"
    )
    assert last_step(folder) == 6
    assert capsys.readouterr().err.count(said) == 1
    assert summary(folder)["stopped"] == said
    assert summary(folder)["after"]["step"] == 6
    assert (folder / "header.txt").read_text().endswith(f"note: {said}\n")
    assert said in (folder / "report.html").read_text()
    assert json.loads((folder / "best" / "metric.json").read_text())["step"] == 4
    final, best, last = (
        (folder / name / "adapter_model.safetensors").read_bytes()
        for name in ("final", "best", "checkpoint-6")
    )
    assert final == last != best


def test_the_evaluation_before_training_does_not_count(tmp_path, monkeypatch):
    """The first after a step is the best so far; with a patience of 1, the second may stop."""
    monkeypatch.setitem(LOSSES, 2, 0.7)
    assert last_step(run(patient(tmp_path, 1))) == 2


def test_a_run_that_gets_better_in_time_ends_as_planned(tmp_path, capsys):
    """Also if patience is out at the very last step: that is no early stop."""
    folder = run(patient(tmp_path, 2, "--train.max_steps", 6))
    assert "stopped" not in summary(folder)
    assert "stopped" not in capsys.readouterr().err


def test_a_stop_logs_the_means_since_the_last_log(tmp_path):
    """24 rows, of which 5 are held out: steps of 16 and 3 pairs. Steps 2-6 are logged at the stop,
    as a run of 6 steps logs them."""
    flags = ["--data.eval_fraction", 0.2, "--train.logging_steps", 7]
    flags += ["--optim.lr_scheduler_type", "constant"]
    stopped = run(patient(tmp_path, 2, *flags))
    six = ["--train.max_steps", 6, "--train.output_dir", tmp_path / "six"]
    planned = run(patient(tmp_path, "null", *flags, *six))
    ours, theirs = (
        [line for line in training(f) if "train/loss" in line] for f in (stopped, planned)
    )
    assert ours == theirs
    assert [line["step"] for line in ours] == [1, 6]
    assert {f"train/{name}" for name in PAIR_METRICS} < ours[1].keys()


def test_the_count_is_resumed(tmp_path):
    """Of the three that are not better, step 5 lies before the checkpoint and 6 after it."""
    straight = run(patient(tmp_path, 3, "--train.output_dir", tmp_path / "straight"))
    assert last_step(straight) == 7
    settings = patient(tmp_path, 3, "--train.save_steps", 5)
    killed(settings, at=7)
    resumed = run(settings)
    assert training(resumed) == training(straight)
    assert summary(resumed) == summary(straight)


def test_a_run_that_had_stopped_takes_no_further_step_when_resumed(tmp_path):
    """Killed between its last checkpoint and its final/; or that checkpoint is all there is."""
    folder = run(patient(tmp_path, 2))
    before, ended = training(folder), summary(folder)
    (folder / "summary.json").unlink()
    run(patient(tmp_path, 2))
    assert training(folder) == before
    assert summary(folder) == ended

    alone = shutil.copytree(folder / "checkpoint-6", tmp_path / "copy" / "checkpoint-6")
    other = ["--train.resume", alone, "--train.output_dir", tmp_path / "other"]
    stopped = summary(run(patient(tmp_path, 2, *other)))
    assert stopped == {"before": {}, "after": {}, "stopped": ended["stopped"]}


def test_a_run_that_stopped_goes_on_with_more_patience_and_is_finished_without(tmp_path):
    run(patient(tmp_path, 2))
    with pytest.raises(UserError, match="holds a finished run"):
        run(patient(tmp_path, 2))
    folder = run(patient(tmp_path, 4))
    assert last_step(folder) == 8
    assert "in 4 evaluations in a row" in summary(folder)["stopped"]
    folder = run(patient(tmp_path, "null"))
    assert last_step(folder) == 9
    assert summary(folder).keys() == {"before", "after"}


def test_what_was_best_by_another_metric_does_not_count(tmp_path):
    """Stopped by the loss after step 6; the margins only grow."""
    run(patient(tmp_path, 2))
    other = ["--train.metric_for_best_model", "eval/rewards/margins", "--train.max_steps", 10]
    folder = run(patient(tmp_path, 2, *other))
    assert last_step(folder) == 10
    assert json.loads((folder / "best" / "metric.json").read_text())["step"] == 10


def test_the_best_value_in_a_checkpoint_of_version_0_4_counts(tmp_path, monkeypatch):
    """It was kept without its name."""
    folder = run(patient(tmp_path, 2))
    (folder / "summary.json").unlink()
    file = folder / "checkpoint-6" / "state.json"
    state = json.loads(file.read_text())
    assert (state.pop("best"), state.pop("misses")) == ({"step": 4, "eval/loss": 0.4}, 2)
    file.write_text(json.dumps(state | {"best": 0.4}))
    monkeypatch.setattr("dpo.train.checkpoint.damage", lambda checkpoint: "")
    resumed = started(patient(tmp_path, 2))
    assert (resumed.best, resumed.misses) == ({"eval/loss": 0.4}, 0)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    """The learning rate changes no weight, so that only the first evaluation is a better one."""
    flags = ["--data.name_or_path", rows_file(tmp_path, 24), "--train.max_steps", 9, *QUIET]
    flags += ["--data.eval_path", rows_file(tmp_path, 5, "held_out.jsonl"), "--train.eval_steps", 1]
    flags += ["--train.metric_for_best_model", "eval/loss", "--train.patience", 2]
    flags += ["--optim.learning_rate", 1e-30, "--train.output_dir", tmp_path / "run"]
    as_two_processes("scripts/train.py", *flags)
    assert last_step(tmp_path / "run") == 3
    assert summary(tmp_path / "run")["stopped"].startswith("stopped after step 3 of 9")
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()
