"""What a run writes into its folder, and whether there is room for it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dpo import run_folder
from dpo.config import Config
from dpo.data.order import Order
from dpo.errors import UserError
from dpo.plan.fit import copy_bytes, optimizer_bytes


def written_bytes(config: Config, trained: Sequence[Tensor]) -> dict[str, int]:
    """The bytes of one `checkpoint`, of `best` and of `final`."""
    weights = sum(p.numel() * p.element_size() for p in trained)
    state = optimizer_bytes(trained, config.optim.name) + copy_bytes(trained)
    moving = weights if config.reference.update != "never" else 0
    return {
        "checkpoint": weights + state + moving,
        run_folder.BEST: weights,
        run_folder.FINAL: weights,
    }


def run_parts(config: Config, sizes: dict[str, int], order: Order) -> dict[str, int]:
    """The most bytes that are in a run's folder at once, by what is written."""
    train = config.train
    written = order.num_steps // train.save_steps if train.save_steps else 0
    kept = min(written, train.save_total_limit + 1)  # the next is complete before the oldest goes
    has_best = bool(train.metric_for_best_model)
    return {
        f"{kept} checkpoints": kept * sizes["checkpoint"],
        "best/": has_best * sizes[run_folder.BEST],
        "final/": sizes[run_folder.FINAL],
    }


def check_disk(config: Config, sizes: dict[str, int], order: Order) -> None:
    """Refuses to begin what the disk has no room for.

    Raises:
        UserError: naming what would be written, and what is free.
    """
    folder = Path(config.train.output_dir)
    parts = run_parts(config, sizes, order)
    there = [*run_folder.list_checkpoints(folder), folder / run_folder.BEST]
    replaced = sum(f.stat().st_size for path in there for f in path.rglob("*") if f.is_file())
    if sum(parts.values()) - replaced > _free(folder):
        listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
        raise UserError(
            f"train.output_dir: the run writes {listed}, and {_gib(_free(folder))} are free at "
            f"{folder}. Free some space, name a folder on another disk, or set "
            "train.save_total_limit or train.save_steps otherwise."
        )


def cannot_write(path: Path, error: OSError, size: int) -> str:
    """Says what could not be written, where, why, and how much it needs."""
    return (
        f"{path} cannot be written ({error.strerror or error}): it needs {_gib(size)}, "
        f"{_gib(_free(path))} are free there."
    )


def _free(path: Path) -> int:
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"
