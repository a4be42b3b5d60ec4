"""Digests of files, by content, and of values, by what Python prints of them.

A file in the hub's cache is known by its name there, which is its digest; any other is read, at 2
GiB/s on two cores. What must be verified, not just recognised, is always read (`read_digests`).
"""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub.constants import HF_HOME

MAX_THREADS = 8  # hashing releases the GIL; more would wait for the disk
_BLOB = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")  # sha256 of a large file, git's sha1 of a small one


def cache_folder(name: str) -> Path:
    """The folder of that name in the cache of `datasets`, which takes a second to import."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets", name)


def use_a_writable_cache(beside: Path) -> list[str]:
    """Keeps caches beside a run's folder if their own cannot be written to; says so in words."""
    wanted = cache_folder("dpo_pairs").parent
    existing = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    if os.access(existing, os.W_OK):
        return []
    os.environ["HF_DATASETS_CACHE"] = str(beside.absolute().with_name(f"{beside.name}.cache"))
    return [f"{wanted} cannot be written to: caches are in {os.environ['HF_DATASETS_CACHE']}"]


def digest(*parts: object) -> str:
    """sha256 of the repr of the parts, which must show values and no addresses of objects."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_digests(paths: Sequence[Path]) -> list[str]:
    """A hex digest of each file; different contents have different digests.

    The same content may have two digests: the hub's cache names small files by git's sha1.
    """
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(lambda path: _name_of_blob(path) or _sha256(path), paths))


def read_digests(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file as it is on the disk now; names are not trusted."""
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(_sha256, paths))


def file_sums(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of each file as it is now, by its name below the folder."""
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    return dict(zip(names, read_digests(files), strict=True))


def _name_of_blob(path: Path) -> str | None:
    file = path.resolve()
    is_blob = path.is_symlink() and file.parent.name == "blobs" and _BLOB.fullmatch(file.name)
    return file.name if is_blob else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
