"""Processes that end, hang or get a signal alone: the others stop soon, with one message."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.runs import FLAGS
from tests.train.runs import QUIET, metrics, rows_file

pytestmark = pytest.mark.distributed

LAUNCHER = Path(sys.executable).parent / "accelerate"
LONG = ["--train.max_steps", 3000, "--train.save_steps", 0, "--train.eval_steps", 0]
PROGRAM = """
import os, sys, time
from dpo.commands import run
from dpo.train.step import TrainStep
take = TrainStep.__call__
def hangs(self, step):
    if step == 3 and os.environ["RANK"] == "1":
        time.sleep(600)
    take(self, step)
TrainStep.__call__ = hangs
run("train", sys.argv[1:])
"""


def flags(folder, *more):
    where = ["--data.name_or_path", rows_file(folder, 24), "--train.output_dir", folder / "run"]
    base = ["--loss.beta", 0.1, "--optim.warmup_steps", 0, "--train.resume", "auto"]
    return [*map(str, (*QUIET, *base, *FLAGS.split(), *where, *more))]


def started(command, folder):
    """The process, once the run has logged its first step."""
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    log = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"train/loss"' in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def ranks(process):
    """The processes of its ranks, in order."""
    children = psutil.Process(process.pid).children(recursive=True)
    found = {p.environ()["RANK"]: p for p in children if "RANK" in p.environ()}
    return [found[rank] for rank in sorted(found)]


def ended(process, seconds=60):
    """Exit code, what was said, and how long it took."""
    began = time.monotonic()
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said, time.monotonic() - began


def two(folder, *more):
    return [sys.executable, "-m", "dpo", "train", "--num_processes", "2", *flags(folder, *more)]


def saved_step(folder):
    (checkpoint,) = (folder / "run").glob("checkpoint-*")
    return json.loads((checkpoint / "state.json").read_text())["step"]


def test_a_signal_to_one_rank_stops_both_at_one_step(tmp_path):
    process = started(two(tmp_path, *LONG), tmp_path)
    ranks(process)[1].send_signal(signal.SIGTERM)
    code, said, _ = ended(process)
    assert code == 143
    assert f"SIGTERM: stopped after step {saved_step(tmp_path)}" in said
    assert "Traceback" not in said
    step = str(saved_step(tmp_path))
    done = subprocess.run(
        two(tmp_path, *LONG, "--train.max_steps", str(int(step) + 1)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {step}" in done.stderr
    assert metrics(tmp_path / "run")[-1]["step"] == int(step) + 1


def test_a_signal_to_the_launcher_of_two_stops_all(tmp_path):
    process = started(two(tmp_path, *LONG), tmp_path)
    process.send_signal(signal.SIGTERM)
    code, said, _ = ended(process)
    assert code == 143
    assert f"SIGTERM: stopped after step {saved_step(tmp_path)}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_trainer_whose_launcher_dies_saves_and_stops(number, tmp_path):
    """accelerate launch of one process passes nothing on."""
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    process = started([LAUNCHER, "launch", script, *flags(tmp_path, *LONG)], tmp_path)
    (trainer,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(30) == -number
    trainer.wait(timeout=30)
    assert saved_step(tmp_path) > 0
    assert "SIGTERM: stopped after step" in process.communicate(timeout=30)[1]


def test_a_killed_rank_is_named_and_ends_the_others(tmp_path):
    process = started(two(tmp_path, *LONG, "--train.save_steps", 1), tmp_path)
    victim = ranks(process)[1]
    victim.kill()
    code, said, seconds = ended(process)
    assert code == 137
    assert seconds < 40
    assert f"rank 1 (process {victim.pid}) was killed by SIGKILL" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_hangs_is_named(how, tmp_path):
    """One that still runs shows where; one that is stopped cannot."""
    short = [*LONG, "--train.timeout_minutes", 0.2]
    if how == "stopped":
        process = started(two(tmp_path, *short), tmp_path)
        ranks(process)[1].suspend()
    else:
        program = tmp_path / "hangs.py"
        program.write_text(PROGRAM)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", 2]
        process = started([*torchrun, program, *flags(tmp_path, *short)], tmp_path)
    pid = ranks(process)[1].pid
    code, said, _ = ended(process, seconds=120)
    assert code != 0
    if how == "stopped":
        assert f"rank 1 (process {pid} on " in said
        assert "has ended or does not answer" in said
    else:
        assert f"the others wait for rank 1 (process {pid} on " in said
        assert "in hangs" in said
