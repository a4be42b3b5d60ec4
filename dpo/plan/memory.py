"""How much memory there is, and how much some work takes: for the token budget and the planner.

On a GPU the allocator knows. On a CPU nothing does: the resident size also counts what malloc keeps
back, and its peak is that of the whole process. `PeakBytes` counts the tensors themselves, to the
byte; it needs no numbers in them, so it also measures models that have no weights (fake tensors).
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that is made inside the context, until it is freed.

    Attributes:
        live: bytes of the tensors made inside that still exist.
        peak: the highest value of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in before and storage._cdata not in self._counted:  # no view
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The peak of allocated bytes during `work`, above those allocated before it."""
    if device.type != "cuda":
        with PeakBytes() as count:
            work()
        return count.peak
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - start


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on the GPU, or on a CPU within the process's limit.

    The limit is the machine's memory, or that of the control group (version 2), as containers and
    batch systems set it. `ulimit -v` is ignored.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = [psutil.virtual_memory().available]
    for group in _control_groups():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
            available.append(int(limit) - used)
    return max(0, min(available))


def _control_groups() -> list[Path]:
    """The process's own group and those around it that limit memory."""
    if not _MEMBERSHIP.exists():
        return []
    lines = _MEMBERSHIP.read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = _CGROUPS / own
    return [
        group
        for group in (folder, *folder.parents)
        if group.is_relative_to(_CGROUPS) and (group / "memory.max").exists()
    ]


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)
    ]
