"""Digests of files, by content, and of values, by what Python prints of them.

A file in the hub's cache is known by its name there, which is its digest; any other is read, at 2
GiB/s on two cores. What must be verified, not just recognised, is always read (`dpo.sealed`).
"""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from dpo.sealed import MAX_THREADS, sha256

_BLOB = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")  # sha256 of a large file, git's sha1 of a small one


def cache_folder(name: str) -> Path:
    """The folder of that name in the cache of `datasets`, which takes a second to import."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets", name)


def use_a_writable_cache(beside: Path) -> list[str]:
    """Keeps caches beside a run's folder if their own cannot be used; says so in words.

    They cannot be written to, or belong to another user, who may have put other tokens there.
    """
    wanted = cache_folder("dpo_pairs").parent
    existing = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    owned = [wanted, *map(cache_folder, ("dpo_pairs", "dpo_reference"))]
    if not os.access(existing, os.W_OK):
        problem = f"{wanted} cannot be written to"
    elif others := [path for path in owned if path.exists() and _is_of_another_user(path)]:
        problem = f"{others[0]} belongs to another user and is not trusted"
    else:
        return []
    os.environ["HF_DATASETS_CACHE"] = str(beside.absolute().with_name(f"{beside.name}.cache"))
    return [f"{problem}: caches are in {os.environ['HF_DATASETS_CACHE']}"]


def _is_of_another_user(path: Path) -> bool:
    """Root trusts all, as in a container with a user's folders; and all trust root."""
    return os.getuid() != 0 and path.stat().st_uid not in (0, os.getuid())


def digest(*parts: object) -> str:
    """sha256 of the repr of the parts, which must show values and no addresses of objects."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_digests(paths: Sequence[Path]) -> list[str]:
    """A hex digest of each file; different contents have different digests.

    The same content may have two digests: the hub's cache names small files by git's sha1.
    """
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(lambda path: _name_of_blob(path) or sha256(path), paths))


def _name_of_blob(path: Path) -> str | None:
    file = path.resolve()
    is_blob = path.is_symlink() and file.parent.name == "blobs" and _BLOB.fullmatch(file.name)
    return file.name if is_blob else None
