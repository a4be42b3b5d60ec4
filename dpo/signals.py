"""Signals that ask a command to stop: a scheduler's SIGTERM and SIGUSR1, Ctrl-C, a lost terminal.

A signal stops a command at once, wherever it is, by raising `Stopped`. Inside `deferred` it is
noted, and the loop asks for it where nothing is lost; inside `at_once`, within that, it stops at
once again. A second signal ends the process there and then.

A launcher that dies without a word counts as SIGTERM: nobody would see what its process does then.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# torchrun passes on what it gets, to processes that a terminal or Slurm has signalled as well.
REPEATED = 2.0  # seconds in which that is one and the same request


class Stopped(KeyboardInterrupt):
    """A signal has asked the process to stop; `said`: what a user should know, "" for the usual."""

    def __init__(self, number: int, said: str = ""):
        super().__init__(said)
        self.number, self.said = number, said

    @property
    def exit_code(self) -> int:
        """As shells give it: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1 (on Linux)."""
        return 128 + self.number


class _State:
    """What the handlers have seen; it is global to the process, as they are."""

    asked = 0
    asked_at = 0.0
    until = ""  # inside `deferred`: what comes first, in words
    launcher: int | None = None


def listen() -> None:
    """Takes over the signals, but those that nohup or a shell has turned off."""
    _State.asked, _State.until, _State.launcher = 0, "", _find_launcher()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def leave() -> None:
    """From here on, any signal ends the process there and then: it is on its way out."""
    _State.asked, _State.asked_at = _State.asked or signal.SIGTERM, -REPEATED


def asked() -> int:
    """The number of the signal that has asked this process to stop; 0 if none has."""
    if _State.launcher not in (None, os.getppid()):
        return _State.asked or signal.SIGTERM
    return _State.asked


@contextmanager
def deferred(until: str) -> Iterator[None]:
    """Inside, a signal is noted, and `until` is said of it: "the run is saved after this step"."""
    with _deferring(until):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, a signal stops at once, also one that was noted before.

    Raises:
        Stopped: one has come.
    """
    with _deferring(""):
        if number := asked():
            raise Stopped(number)
        yield


@contextmanager
def _deferring(until: str) -> Iterator[None]:
    before, _State.until = _State.until, until
    try:
        yield
    finally:
        _State.until = before


def name(number: int) -> str:
    """What a user calls it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.asked:
        if "TORCHELASTIC_RUN_ID" not in os.environ or now - _State.asked_at > REPEATED:
            os._exit(128 + number)
        return
    _State.asked, _State.asked_at = number, now
    if not _State.until:
        raise Stopped(number)
    if os.environ.get("RANK", "0") == "0":  # by no print(), which this may have interrupted
        os.write(2, f"\n{name(number)}: {_State.until}; once more stops it at once\n".encode())


def _find_launcher() -> int | None:
    """The process of torchrun or `accelerate launch` that started this one; None without."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.getppid()
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()[:3]
    except psutil.Error:  # it has ended, or is not ours to look at
        return None
    is_launcher = any(Path(word).name.split(".")[0] == "accelerate" for word in words)
    return os.getppid() if is_launcher else None
