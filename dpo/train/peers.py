"""What the processes of a run do when one of them ends or hangs: the others name it, and stop.

A process that waits in vain gets an error from the backend that names nobody. It then asks through
the launcher's store, on which a thread of every process listens. Who does not answer has ended, or
is stopped; who answers and waits for nobody is the one that all wait for, and shows where it is.

With NCCL a lost process is told by NCCL's own watchdog, which ends the others itself.
"""

import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]

from dpo.errors import UserError

GRACE = 4.0  # seconds in which others find out that they wait, too
_LOST = ("Connection closed", "Connection reset", "Timed out waiting", "Broken pipe")
_ALARM = "dpo/alarm"


@contextmanager
def watched() -> Iterator[None]:
    """Inside, an error of the backend becomes a message that names the process behind it.

    Raises:
        UserError: naming the process that has ended or hangs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    listener = _Listener()
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _LOST):
            raise
        listener.is_waiting = True
        raise UserError(_who(str(error))) from None


class _Listener(threading.Thread):
    """Answers for this process.

    Attributes:
        is_waiting: it has waited for another process in vain.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.is_waiting = False
        self.start()

    def run(self) -> None:
        rank = os.environ["RANK"]
        me = f"rank {rank} (process {os.getpid()} on {platform.node()})"
        store = _connect()
        store.set(f"dpo/name/{rank}", me)
        while not store.check([_ALARM]):
            time.sleep(1)
        time.sleep(GRACE)
        store.set(f"dpo/answer/{rank}", "waits" if self.is_waiting else "is awaited")
        if not self.is_waiting:
            print(f"error: the others wait for {me}, which is here:", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(2)


def _who(error: str) -> str:
    """Asks all processes, and names those that do not wait as this one does."""
    try:
        store = _connect()
        store.set(_ALARM, "")
        time.sleep(2 * GRACE)
        ranks = [r for r in range(int(os.environ["WORLD_SIZE"])) if r != int(os.environ["RANK"])]
        answers = {r: _get(store, f"dpo/answer/{r}") for r in ranks}
        named = {r: _get(store, f"dpo/name/{r}") or f"rank {r}" for r in ranks}
    except RuntimeError:  # the store has ended with its process
        answers, named = {0: ""}, {0: "the launcher, or rank 0,"}
    words = {"": "has ended or does not answer", "is awaited": "keeps the others waiting"}
    gone = [f"{named[r]} {words[said]}" for r, said in answers.items() if said in words]
    return (
        f"{'; '.join(gone) or 'all processes wait for one another'} ({' '.join(error.split())}). "
        "The same command goes on from the last checkpoint (train.resume auto)."
    )


def _get(store: TCPStore, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _connect() -> TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(minutes=1))
