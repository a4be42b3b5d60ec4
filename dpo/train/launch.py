"""Accelerate, for what it is best at: devices, processes and trackers."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from dpo.config import Config
from dpo.device import choose_device
from dpo.errors import UserError


def build_accelerator(config: Config, trackers: list[str]) -> Accelerator:
    """Accelerate for devices, processes and trackers alone; model.dtype decides the precision.

    Raises:
        UserError: torch cannot use this machine's GPU, or each process would train alone.
    """
    prepare_torch(config)
    accelerator = Accelerator(
        cpu=choose_device(config.train.device).type == "cpu",
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
    """Sets what PyTorch must know before CUDA starts; what the user has set stays."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        # Micro-batches differ in size, and blocks that cannot grow leave gaps.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.use_deterministic_algorithms(config.train.deterministic)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
