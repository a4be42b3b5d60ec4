"""One function over many tasks in worker processes: results in order, and few tasks read ahead.

`Executor.map` and `Pool.imap` read all their tasks at once, so memory would grow with a data set;
and a `Pool` whose worker is killed for memory waits for ever, where an executor raises an error.
From Python 3.14, `Executor.map(buffersize=...)` could replace this.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from dpo.signals import SIGNALS

Task = TypeVar("Task")
Result = TypeVar("Result")
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_work: Callable[[Any], Any]  # set in a worker process only


def in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Generator[Result, None, None]:
    """`map(work, tasks)` in worker processes, or in this one for one worker; close it to end them.

    An exception of `work` is raised where its result would have come.
    """
    if num_workers == 1:
        yield from map(work, tasks)
        return
    with _workers(work, num_workers) as pool:
        pending = deque()
        for task in tasks:
            pending.append(pool.submit(_do, task))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def _workers(work: Callable[[Any], Any], number: int) -> Iterator[ProcessPoolExecutor]:
    """Forks workers where that is safe: they start at once and share the tokenizer's memory."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(number, context, initializer=_start, initargs=(work,))
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"  # one core each; if unset, tokenizers warns about the fork
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        del os.environ[_PARALLELISM]
        if before is not None:
            os.environ[_PARALLELISM] = before


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    for number in SIGNALS:  # only the parent prints; workers exit silently
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker with its parent: one that was killed cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Any) -> Any:
    return _work(task)
