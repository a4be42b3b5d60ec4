"""A signal stops a run where nothing is lost, in every phase; what goes on is the straight run."""

import os
import signal
import subprocess
import sys

import pytest

from dpo import signals
from dpo.cli import run_command
from dpo.data import tokens
from dpo.evaluate import evaluator
from dpo.evaluate.evaluator import Evaluator
from dpo.signals import Stopped, at_once, deferred
from dpo.train import checkpoint as checkpoints
from dpo.train import output
from dpo.train import trainer as trainers
from dpo.train.step import TrainStep
from tests.chaos.runs import FLAGS, outcome, settings, straight_run
from tests.train.runs import QUIET, rows_file, run

AT_THE_START = "with train.resume auto, the same command goes on from the last checkpoint"
# Where the signal comes: an attribute, which call of it, and what is then there to go on from.
PHASES = {
    "tokenising": (tokens, "_tokenize", 1, AT_THE_START),
    "loading": (trainers, "load_policy_to_fit", 1, AT_THE_START),
    "self-check": (trainers, "check_start", 1, AT_THE_START),
    "evaluation before the first step": (Evaluator, "_score_held_out", 1, "before the first step"),
    "first step": (TrainStep, "backward", 1, "checkpoint-1"),
    "step that is evaluated": (TrainStep, "backward", 2, "checkpoint-2"),
    "evaluation": (Evaluator, "_score_held_out", 2, "checkpoint-2"),
    "generation": (evaluator, "generate", 3, "checkpoint-2"),
    "best weights": (output, "save_weights", 1, "checkpoint-2"),
    "checkpoint": (checkpoints, "save_checkpoint", 1, "checkpoint-3"),
    "last step": (TrainStep, "backward", 5, "checkpoint-5"),
    "last evaluation": (Evaluator, "_score_held_out", 4, "checkpoint-5"),
    "report": (output, "write_report", 1, "the run is complete"),
}


@pytest.fixture(autouse=True)
def _as_on_a_terminal():
    """A shell turns Ctrl-C off for what it starts in the background, which is kept."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return outcome(straight_run(folder))


def interrupt(monkeypatch, where, attribute, call, number):
    """Sends this process a signal at the beginning of a call."""
    calls, do = [], getattr(where, attribute)

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return do(*given, **options)

    monkeypatch.setattr(where, attribute, interrupted)


def stopped(settings, capsys):
    """Exit code, and the last line that a user sees."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_command(lambda: run(settings), f"stopped; {AT_THE_START}")
    signals.listen()  # as a new process does
    return left.value.code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_every_phase_loses_nothing(phase, tmp_path, straight, monkeypatch, capsys):
    where, attribute, call, said = PHASES[phase]
    flags = ["--train.write_report", "true"] if phase == "report" else []
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        interrupt(patch, where, attribute, call, signal.SIGTERM)
        code, line = stopped(settings(tmp_path, *flags), capsys)
    assert code == 143
    assert said in line.lower()
    folder = tmp_path / "run"
    if phase in ("tokenising", "loading"):
        assert not folder.exists()
    if said.startswith("checkpoint-"):
        assert line.startswith("SIGTERM: stopped after step")
        assert (folder / said).is_dir()
        assert not (folder / "final").exists()
    if phase != "report":
        run(settings(tmp_path))
    assert outcome(folder) == straight


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGUSR1, 138, "SIGUSR1")],
)
def test_each_signal_has_its_exit_code_and_its_name(
    number, code, name, tmp_path, straight, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        interrupt(patch, TrainStep, "backward", 3, number)
        left, line = stopped(settings(tmp_path, "--train.resume", "never"), capsys)
    assert left == code
    assert line == (
        f"{name}: stopped after step 3, which is saved in checkpoint-3; the same command with "
        "--train.resume auto goes on from there"
    )
    assert outcome(run(settings(tmp_path))) == straight


def test_a_second_signal_stops_at_once_without_a_traceback(tmp_path):
    """Its process would sleep for a minute."""
    program = (
        "import os, signal, sys, time\n"
        "from dpo.commands import run\n"
        "from dpo.train.step import TrainStep\n"
        "def twice(self, stream, pairs):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "TrainStep.backward = twice\n"
        "run('train', sys.argv[1:])\n"
    )
    where = ["--data.name_or_path", rows_file(tmp_path, 24), "--train.output_dir", tmp_path / "run"]
    command = [sys.executable, "-c", program, *QUIET, *FLAGS.split(), *where]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=55)
    assert done.returncode == 143
    last = done.stderr.splitlines()[-1]
    assert last == "SIGTERM: the run is saved after this step; once more stops it at once"
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_launcher_that_passes_on_the_same_signal_is_no_second_one(monkeypatch):
    """torchrun does, to processes that the terminal or Slurm has signalled as well."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    signals.listen()
    with deferred("something is saved"):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked() == signal.SIGTERM


def test_a_launcher_that_has_died_counts_as_sigterm(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    signals.listen()
    assert signals.asked() == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert signals.asked() == signal.SIGTERM
    with deferred("x"), pytest.raises(Stopped), at_once():
        raise AssertionError


def test_without_a_launcher_a_shell_may_end(monkeypatch):
    """nohup python scripts/train.py &"""
    signals.listen()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert signals.asked() == 0


def test_a_signal_that_is_turned_off_stays_so(monkeypatch):
    """nohup turns off SIGHUP, a shell script's & Ctrl-C."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signals.asked() == 0
