"""Token log-probs of pairs on disk: what the reference has computed once is not computed again.

A folder belongs to one reference (`fingerprint.py` names it) and holds shards that never change:

    keys     (entries,)  the first 8 bytes of the pair's digest
    checks   (entries,)  a checksum over the whole digest and the log-probs
    ends     (entries,)  where the entry ends in `logps`
    logps    (scored,)   fp32, nats: chosen, then rejected, pair after pair

A shard is written aside and renamed when complete, under a name of its own. So nothing is ever
overwritten, several processes may write to one folder, and what a killed one left is not read. A
pair's log-probs are read from the file when it is asked for; the index (32 bytes per pair) is held
in memory. A flipped bit anywhere makes the checksum fail, and the pair counts as missing.
"""

import hashlib
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpo.data.stream import TokenizedPair

PAIRS_PER_SHARD = 4096  # a killed process loses no more than this

Logps = Float[np.ndarray, " scored"]


class LogpCache:
    """A folder of token log-probs, found by the pair's tokens.

    Attributes:
        num_damaged: entries and shards that were found and could not be trusted.
        problem: why what is new could not be written, in words; it is kept in memory meanwhile.
    """

    def __init__(self, folder: Path):
        self.folder, self.num_damaged, self.problem = folder, 0, ""
        folder.mkdir(parents=True, exist_ok=True)
        self._new: dict[bytes, Logps] = {}
        self._shards: list[_Shard] = []
        self._seen: set[str] = set()
        self._keys, self._places = np.empty(0, np.uint64), np.empty((0, 2), np.int32)
        self.refresh()

    def get(self, pair: TokenizedPair) -> Logps | None:
        """Log-probs of the scored tokens, chosen then rejected; None if they are missing."""
        digest = pair.digest
        if digest in self._new:
            return self._new[digest]
        key = _key(digest)
        at = int(np.searchsorted(self._keys, key))
        while at < len(self._keys) and self._keys[at] == key:
            shard, entry = self._places[at].tolist()
            logps = self._shards[shard].read(entry, digest)
            if logps is not None:
                return logps
            self.num_damaged += 1
            at += 1
        return None

    def __contains__(self, pair: TokenizedPair) -> bool:
        return self.get(pair) is not None

    def put(self, pair: TokenizedPair, logps: Logps) -> None:
        """Adds a pair; it is written to disk when a shard is full, or by `flush`."""
        self._new[pair.digest] = logps
        if len(self._new) % PAIRS_PER_SHARD == 0:
            self.flush()

    def flush(self) -> None:
        """Writes what is new as one shard; what prevents it is in `problem`."""
        if not self._new:
            return
        entries = self._new.items()
        name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.safetensors"  # later shards sort last
        unfinished = self.folder / f".{name}"
        columns = {
            "keys": np.array([_key(digest) for digest, _ in entries], np.uint64),
            "checks": np.array([_check(digest, logps) for digest, logps in entries], np.uint64),
            "ends": np.cumsum([len(logps) for _, logps in entries], dtype=np.int64),
            "logps": np.concatenate([logps for _, logps in entries]).astype(np.float32),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # someone may have deleted it
            unfinished.touch()
            mode = unfinished.stat().st_mode  # safetensors makes another one, for its owner alone
            save_file(columns, unfinished)
            unfinished.chmod(mode)
            unfinished.rename(self.folder / name)
        except (SafetensorError, OSError) as error:
            self.problem = f"{self.folder} cannot be written ({error})"
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return
        self._new, self.problem = {}, ""
        self.refresh()

    def refresh(self) -> None:
        """Looks for shards that this or another process has written since."""
        added = []
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._seen and not path.name.startswith("."):
                self._seen.add(path.name)
                try:
                    keys, shard = _open(path)
                except (SafetensorError, OSError, ValueError):
                    self.num_damaged += 1
                    continue
                entries = np.arange(len(keys), dtype=np.int32)
                places = np.stack([np.full_like(entries, len(self._shards)), entries], axis=1)
                added.append((keys, places))
                self._shards.append(shard)
        if added:
            keys = np.concatenate([self._keys, *(keys for keys, _ in added)])
            places = np.concatenate([self._places, *(places for _, places in added)])
            order = np.argsort(keys, kind="stable")
            self._keys, self._places = keys[order], places[order]


@dataclass(frozen=True)
class _Shard:
    """One file: where its entries end, and a handle that reads log-probs where they lie."""

    checks: np.ndarray
    ends: np.ndarray
    logps: Any

    def read(self, entry: int, digest: bytes) -> Logps | None:
        """The entry's log-probs; None if it is damaged, or another pair's."""
        start, end = int(self.ends[entry - 1]) if entry else 0, int(self.ends[entry])
        if not 0 <= start <= end <= self.logps.get_shape()[0]:
            return None
        logps = self.logps[start:end]
        return logps if _check(digest, logps) == self.checks[entry] else None


def _open(path: Path) -> tuple[np.ndarray, _Shard]:
    """The keys of a shard, and the rest of it.

    Raises:
        SafetensorError, OSError or ValueError: the file is not a whole shard.
    """
    with safe_open(path, framework="numpy") as file:
        columns = {name: file.get_tensor(name) for name in ("keys", "checks", "ends")}
        keys, checks, ends = columns.values()
        logps = file.get_slice("logps")
        kinds = [str(column.dtype) for column in columns.values()]
        shapes = {column.shape for column in columns.values()}
        if kinds != ["uint64", "uint64", "int64"] or shapes != {(len(keys),)}:
            raise ValueError(f"{path}: columns of other types or of unequal lengths")
        if len(logps.get_shape()) != 1 or logps.get_dtype() != "F32":
            raise ValueError(f"{path}: log-probs that are no vector")
        return keys, _Shard(checks, ends, logps)


def _key(digest: bytes) -> np.uint64:
    return np.frombuffer(digest, np.uint64, count=1)[0]


def _check(digest: bytes, logps: Logps) -> np.uint64:
    whole = hashlib.blake2b(digest, digest_size=8)
    whole.update(np.asarray(logps, np.float32).tobytes())
    return _key(whole.digest())
