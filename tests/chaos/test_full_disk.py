"""A disk that is full for a while: training goes on, older files stay whole, one line says it.

A limit on the size of a file stands in for the disk; `test_on_a_small_disk` has a real one.
"""

import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from torch.utils.tensorboard import SummaryWriter

from dpo.data import tokens
from dpo.errors import UserError
from dpo.model.logp_cache import LogpCache
from dpo.plan import disk
from dpo.train import checkpoint as checkpoints
from dpo.train import output, tracking
from dpo.train import trainer as trainers
from dpo.train.output import Output
from dpo.train.tracking import Tracker
from tests.chaos.runs import outcome, settings, straight_run
from tests.commands import called
from tests.train.runs import run


@contextmanager
def full(most=512):
    """Inside, no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def during(monkeypatch, where, attribute, *calls):
    """The disk is full during these calls."""
    seen, do = [], getattr(where, attribute)

    def on_a_full_disk(*given, **options):
        seen.append(1)
        if len(seen) not in calls:
            return do(*given, **options)
        with full():
            return do(*given, **options)

    monkeypatch.setattr(where, attribute, on_a_full_disk)


def deleted_meanwhile(monkeypatch, folder):
    """Someone deletes the folder before the second step."""
    take = trainers.TrainStep.__call__

    def deleted(self, step):
        if step == 2:
            shutil.rmtree(folder)
        take(self, step)

    monkeypatch.setattr(trainers.TrainStep, "__call__", deleted)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return outcome(straight_run(tmp_path_factory.mktemp("straight")))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_checkpoint_that_does_not_fit_is_left_out(tmp_path, straight, monkeypatch, capsys):
    """The one before it stays, and the next save tries again."""
    often = ["--train.save_steps", 1, "--train.save_total_limit", 9]
    during(monkeypatch, checkpoints, "save_checkpoint", 2, 3)
    folder = run(settings(tmp_path, *often))
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert ["checkpoint-2" in lines[0], "checkpoint-3" in lines[1], len(lines)] == [True, True, 2]
    assert lines[0].endswith("free there. Older ones are as they were; training goes on.")
    assert "checkpoint-2 cannot be written (" in lines[0]
    assert "): it needs 1.5 MiB, " in lines[0]
    kept = sorted(path.name for path in folder.glob("*checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    assert not list(folder.glob(".checkpoint*"))
    assert outcome(folder) == straight


def test_a_log_that_cannot_grow_waits_in_memory(tmp_path, straight, monkeypatch, capsys):
    during(monkeypatch, Tracker, "_append", 4, 5, 6)
    folder = run(settings(tmp_path))
    said = capsys.readouterr().err
    assert said.count("cannot be written (File too large); training goes on") in (1, 2, 3)
    assert outcome(folder) == straight


def test_a_log_that_cannot_be_written_to_the_end_is_an_error(tmp_path, monkeypatch):
    def never(file, lines):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "append_lines", never)
    with pytest.raises(UserError, match=r"metrics.jsonl.* cannot be written: the last lines are"):
        run(settings(tmp_path))
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()


def test_best_stays_what_it_was(tmp_path, straight, monkeypatch, capsys):
    during(monkeypatch, output, "save_weights", 2)  # of step 4
    folder = run(settings(tmp_path))
    assert "run/best cannot be written (" in (said := capsys.readouterr().err)
    assert "It stays what it was; training goes on." in said
    assert outcome(folder)["final"] == straight["final"]
    assert json.loads((folder / "best" / "metric.json").read_text())["step"] != 4


def test_a_final_save_that_fails_can_be_repeated(tmp_path, straight, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, Output, "end", 1)
        with pytest.raises(UserError, match=r"final cannot be written .*on from checkpoint-3"):
            run(settings(tmp_path))
    assert outcome(run(settings(tmp_path))) == straight


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path, straight, monkeypatch, capsys):
    during(monkeypatch, output, "write_report", 1)
    folder = run(settings(tmp_path, "--train.write_report", "true"))
    assert "The run is complete; dpo report" in capsys.readouterr().err
    assert outcome(folder) == straight


def test_the_reference_cache_waits_in_memory(tmp_path, straight, monkeypatch, capsys):
    during(monkeypatch, LogpCache, "flush", 1, 2, 3, 4, 5, 6)
    folder = run(settings(tmp_path))
    assert "dpo_reference/" in (said := capsys.readouterr().err)
    assert said.count("; training goes on") == 1
    assert outcome(folder) == straight


def test_a_cache_that_is_deleted_meanwhile_is_made_again(tmp_path, straight, monkeypatch):
    deleted_meanwhile(monkeypatch, tmp_path / "cache")
    assert outcome(run(settings(tmp_path))) == straight
    assert list((tmp_path / "cache" / "dpo_reference").glob("*/*.safetensors"))


def test_tokens_that_cannot_be_kept_are_an_error_before_anything_else(
    tmp_path, monkeypatch, capsys
):
    during(monkeypatch, tokens, "_write", 1)
    with pytest.raises(UserError, match=r"dpo_pairs cannot be written .*set HF_DATASETS_CACHE"):
        run(settings(tmp_path))
    assert not (tmp_path / "run").exists()
    run(settings(tmp_path))


def test_trackers_that_cannot_write_cost_nothing(tmp_path, straight, monkeypatch, capsys):
    """TensorBoard's writer raises it in a thread of its own, later."""
    add = SummaryWriter.add_scalar

    def fails(self, *given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fails)
    folder = run(settings(tmp_path, "--train.report_to", "tensorboard"))
    assert add is not SummaryWriter.add_scalar
    said = "the trackers' logs cannot be written (No space left on device); training goes on"
    assert capsys.readouterr().err.count(said) == 1
    assert outcome(folder) == straight


def test_a_run_folder_that_vanishes_is_made_again(tmp_path, monkeypatch):
    """What was logged before is gone with it; what is needed to go on is there."""
    deleted_meanwhile(monkeypatch, tmp_path / "run")
    folder = run(settings(tmp_path))
    for name in ("config.yaml", "data_report.json", "checkpoint-3", "final", "summary.json"):
        assert (folder / name).exists()


def test_a_run_for_which_there_is_no_room_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_free", lambda path: 2**20)
    said = r"train.output_dir: the run writes 1 checkpoints .*, and 1 MiB are free at .*save_steps"
    with pytest.raises(UserError, match=said):
        run(settings(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MiB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder])
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_on_a_small_disk(small_disk, tmp_path, straight, monkeypatch):
    """It fills up behind the trainer's back, and is emptied for the second start."""
    flags = ["--train.report_to", "tensorboard", "--train.save_steps", 1]
    at_step = trainers.TrainStep.__call__

    def fill() -> None:
        with (small_disk / "someone-elses").open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass

    def fills_up(self, step):
        if step == 3:
            with pytest.raises(OSError, match="No space"):
                fill()
        at_step(self, step)

    where = settings(small_disk, *flags)
    where.data.name_or_path = str(shutil.copy(where.data.name_or_path, tmp_path))
    os.remove(small_disk / "rows.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(trainers.TrainStep, "__call__", fills_up)
        with pytest.raises(UserError, match=r"final cannot be written .*goes on from checkpoint-2"):
            run(where)
    (small_disk / "someone-elses").unlink()
    assert outcome(run(where)) == straight


def test_other_files_without_room_are_one_message_too(tmp_path, monkeypatch):
    during(monkeypatch, output, "save", 1)
    code, _, said = called("train.py", "--train.output_dir", tmp_path / "run")
    assert code == 2
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
