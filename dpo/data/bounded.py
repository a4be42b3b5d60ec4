"""Bounds on what a stranger's template may take: seconds, memory, and the length of its text.

A template is a program. It cannot leave its sandbox, but it can loop for ever in it.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 10  # of one rendering; a long one takes a millisecond
CHARACTERS = 50_000_000  # of one rendering; a million tokens are four million
BYTES = 4 * 2**30  # that a batch of rows may take beside what the process holds


@contextmanager
def in_time() -> Iterator[None]:
    """Inside, what takes too long is ended.

    Raises:
        TimeoutError: it has taken more than SECONDS.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach no other
        yield
        return
    before = signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def in_memory() -> Iterator[None]:
    """Inside, an allocation that would take too much raises MemoryError (on Linux)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(statm.read_text().split()[0]) * resource.getpagesize() + BYTES
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _end(number: int, frame: FrameType | None) -> None:
    raise TimeoutError
