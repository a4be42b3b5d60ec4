"""Accelerate, for what it is best at: devices, processes and trackers."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from dpo.config import Config
from dpo.errors import UserError

T = TypeVar("T")


def build_accelerator(config: Config, trackers: list[str]) -> Accelerator:
    """Accelerate for devices, processes and trackers alone; model.dtype decides the precision."""
    prepare_torch(config)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=config.train.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"accelerate: {launched} processes were launched, but each would train alone. On CPUs "
            "launch with `accelerate launch --multi_gpu --num_processes N` or torchrun."
        )
    return accelerator


def prepare_torch(config: Config) -> None:
    """What PyTorch must know before CUDA starts; what the user has set stays."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        # Micro-batches differ in size, and blocks that cannot grow leave gaps.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.use_deterministic_algorithms(config.train.deterministic)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def on_main(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """What `do` returns on the main process, on every process; a user's error reaches them all."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = do()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
