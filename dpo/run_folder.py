"""The run folder: what its files are called, and how they are read and appended.

Training writes it, and everything afterwards reads it. No other module spells these names.
"""

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dpo.errors import UserError

# Written at the start.
CONFIG = "config.yaml"  # every key; a checkpoint has its own
DATA_REPORT = "data_report.json"  # rows read, kept, dropped and cut
HEADER = "header.txt"
PAIRS = "pairs.jsonl"  # token ids of a few pairs, so that a merge can be verified without the data
NUM_PAIRS = 64
DIGESTS = "digests.json"  # of what the run was made from: weights, tokenizer and template, data
LOCK = ".lock"  # is locked as long as a run writes into the folder
# Appended during training, one JSON object a line, each with its step.
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # greedy answers to held-out prompts
HELD_OUT = "held_out.jsonl"  # log-probs of every held-out pair
LOGS = (METRICS, SAMPLES, HELD_OUT)
# Weights, with their tokenizer; checkpoints as well, see `checkpoint_name`.
BEST = "best"
BEST_METRIC = "metric.json"  # in it: the step, and the metric that was best there
FINAL = "final"
MERGED = "merged"
# Written at the end.
TOKEN_REWARDS = "token_rewards.json"
SUMMARY = "summary.json"  # held-out metrics before and after: the run is finished
REPORT = "report.html"
# Written by dpo evaluate: a file for each part that it measures.
MEASURED = {"held_out": "held_out.json", "win_rate": "win_rate.json", "lm_eval": "lm_eval.json"}
JUDGED = "judged.jsonl"  # the answers behind the win rate

Line = dict[str, Any]

_CHECKPOINT = "checkpoint-"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"{_CHECKPOINT}{step}"


def checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint's folder; None for another folder."""
    number = folder.name.removeprefix(_CHECKPOINT)
    return int(number) if number.isdigit() and number != folder.name else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    steps = ((checkpoint_step(path), path) for path in folder.glob(f"{_CHECKPOINT}*"))
    return [path for _, path in sorted((step, path) for step, path in steps if step is not None)]


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's."""
    return (folder / CONFIG).exists() and (folder / DATA_REPORT).exists()


def lock(folder: Path) -> None:
    """Keeps other processes from writing into a run's folder, until `unlock` or this one's end.

    Raises:
        UserError: another run writes into it.
    """
    path, held = folder.resolve() / LOCK, _LOCKED.get(folder.resolve())
    if held and path.exists() and os.path.samestat(os.fstat(held), path.stat()):
        return  # opened and closed again, the file would be unlocked
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(file, 1000).decode() or "just begun"
        os.close(file)
        raise UserError(
            f"train.output_dir: another run ({who}) writes into {folder} now. Wait until it has "
            "ended, or name another folder."
        ) from None
    except OSError:  # a file system without locks
        os.close(file)
        return
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
    unlock(folder, remove=False)
    _LOCKED[folder.resolve()] = file


def unlock(folder: Path, *, remove: bool = True) -> None:
    """Lets other processes write into the folder again."""
    file = _LOCKED.pop(folder.resolve(), None)
    if file is not None:
        if remove:
            (folder / LOCK).unlink(missing_ok=True)
        os.close(file)


_LOCKED: dict[Path, int] = {}


def append_lines(file: Path, lines: Iterable[Line]) -> None:
    """Appends every line as JSON, or none of them where the disk is full.

    Raises:
        OSError: the file cannot be written.
    """
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    with file.open("ab", buffering=0) as log:
        size = log.tell()
        try:
            while text:
                text = text[log.write(text) :]
        except OSError:
            log.truncate(size)
            raise


def write_lines(file: Path, lines: Iterable[Line]) -> None:
    """Writes every line as JSON, in place of what was there."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path, *, ends: bool = False) -> list[Line]:
    """All lines, or the first and the last; a last line that was cut off in writing is left out."""
    # splitlines() would also split at U+2028, which a text may contain.
    lines = list(enumerate(read_text(file).split("\n")[:-1], start=1))
    lines = [*lines[:1], *lines[-1:]] if ends else lines
    return [_parse(line, f"{file}, line {number}", {}) for number, line in lines]


def salvage_lines(file: Path) -> tuple[list[Line], int]:
    """The lines of a log that can be read, and how many cannot: a crash cuts them, or leaves zeros.

    A line has a step.
    """
    texts = file.read_text("utf-8", errors="replace").split("\n") if file.exists() else []
    lines: list[Line] = []
    for text in filter(None, texts):
        with suppress(ValueError):
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) and "step" in line else []
    return lines, len([*filter(None, texts)]) - len(lines)


def read_whole(file: Path, missing: Any, read: Callable[[str], Any] = json.loads) -> Any:
    """What a file holds, which must be of the type of `missing`; `missing` if there is no file."""
    return _parse(read_text(file), str(file), missing, read) if file.exists() else missing


def read_text(file: Path) -> str:
    """The text of a file, "" if there is none.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return file.read_text("utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Restore it, or move it away.") from None


def _parse(text: str, where: str, like: Any, read: Callable[[str], Any] = json.loads) -> Any:
    """What `text` holds, which must be of the type of `like`."""
    try:
        value = read(text)
        if isinstance(value, type(like)):
            return value
        problem = f"got a {type(value).__name__}, wanted a {type(like).__name__}"
    except (ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"{where} is broken: {problem}. Restore it, or move the file away.")
