"""Digests of files by content, without reading again what has been read before.

The data sources ask for them at every start, and the reference's cache asks for those of a model's
weights: 14 GB are minutes of hashing. So a file in the hub's cache is known by its name there,
which is its digest, and any other by a note of what its digest was when it had this place, size and
time. A file that has just been written gets no note: it could change once more within the tick of
the clock and look the same (git calls such entries racy).

What must be verified and not only recognised is read in full: `read_digests`.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETTLED_NS = 2_000_000_000  # FAT keeps times in steps of two seconds, the coarsest there is
MAX_THREADS = 8  # hashing releases the GIL; more would wait for the disk
_SHA256 = re.compile("[0-9a-f]{64}")
_BLOB = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")  # sha256 of a large file, git's sha1 of a small one


def file_digests(paths: Sequence[Path]) -> list[str]:
    """A hex digest of each file: another content has another.

    The same content has two where one of its files lies in the hub's cache, which names small files
    by git's sha1.
    """
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(_digest, paths))


def read_digests(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file as it is on the disk now; names and notes are not trusted."""
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(_sha256, paths))


def _digest(path: Path) -> str:
    file = path.resolve()
    if path.is_symlink() and file.parent.name == "blobs" and _BLOB.fullmatch(file.name):
        return file.name
    identity = _identity(file)
    note = _notes() / hashlib.sha256(repr(identity).encode()).hexdigest()
    if digest := _noted(note):
        return digest
    digest = _sha256(file)
    changed_ns = max(identity[-2:])
    if _identity(file) == identity and time.time_ns() - changed_ns > SETTLED_NS:
        _write_note(note, digest)
    return digest


def _identity(file: Path) -> tuple[str, int, int, int, int]:
    """Differs once the file was written; no program sets ctime back, as `cp -p` does mtime."""
    stat = file.stat()
    return str(file), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _notes() -> Path:
    import datasets.config  # takes a second, which a tokeniser of JSON need not wait for

    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo_file_digests"


def _noted(note: Path) -> str | None:
    try:
        digest = note.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return digest if _SHA256.fullmatch(digest) else None


def _write_note(note: Path, digest: str) -> None:
    """Whole or not at all; where nothing can be written, the file will be read again."""
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=note.parent, prefix=".unfinished-", delete=False
        ) as file:
            file.write(digest)
        os.replace(file.name, note)


def file_sums(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of each file as it is now, by its name below the folder."""
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    return dict(zip(names, read_digests(files), strict=True))
