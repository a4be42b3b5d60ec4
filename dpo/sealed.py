"""Folders that are whole or not there: written aside, with the sum of every file, then renamed.

The sums are needed: safetensors, Arrow and torch.load all read a flipped byte without a word.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"  # in a sealed folder: sha256 of every other file, by its name
MAX_THREADS = 8  # hashing releases the GIL; more would wait for the disk


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which is sealed and takes the place of `folder` afterwards.

    It is on the disk before it has its name, so a power loss leaves the old one or the new one.
    What was written is deleted again if that fails: a full disk may be the reason.
    """
    unfinished, old = (folder.with_name(f".{folder.name}{end}") for end in ("", ".old"))
    for stale in (unfinished, old):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        seal(unfinished)
        _sync(unfinished)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_entry(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def seal(folder: Path) -> None:
    """Writes the sums of all files in the folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(json.dumps(file_sums(folder, "*")))
    share(folder, folder / MANIFEST)


def share(folder: Path, new: Path) -> None:
    """Gives all files below the folder the mode of `new`, which has it from the user's mask.

    safetensors makes files that only their owner can read.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            shutil.copymode(new, file)


def is_sealed(folder: Path) -> bool:
    """Whether the folder was written by this module."""
    return (folder / MANIFEST).exists()


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; "" if it is whole."""
    manifest = folder / MANIFEST
    try:
        sums = json.loads(manifest.read_bytes())
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError):
        return f"{manifest} is damaged"
    if not isinstance(sums, dict) or not sums:
        return f"{manifest} is damaged"
    files = [folder / name for name in sums]
    if outside := [file for file in files if not file.resolve().is_relative_to(folder.resolve())]:
        return f"{outside[0]} is not inside {folder}"
    there = [file for file in files if file.is_file()]
    try:
        now = dict(zip(there, read_digests(there), strict=True))
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for file, expected in zip(files, sums.values(), strict=True):
        if now.get(file) != expected:
            return f"{file} is {'damaged' if file in now else 'missing'}"
    return ""


def read_digests(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file as it is on the disk now; names are not trusted."""
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(sha256, paths))


def file_sums(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of each file as it is now, by its name below the folder."""
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    return dict(zip(names, read_digests(files), strict=True))


def sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Waits until every file and folder below is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
