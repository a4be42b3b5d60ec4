"""Accelerate, for what it is best at: devices, processes and trackers."""

import os
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from huggingface_hub.constants import HF_HOME

from dpo.config import Config
from dpo.device import choose_device
from dpo.errors import UserError

_NOT_OFFERED = {  # by the variable in which `accelerate launch` passes it on
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def build_accelerator(config: Config, trackers: list[str]) -> Accelerator:
    """Accelerate for devices, processes and trackers alone; model.dtype decides the precision.

    Raises:
        UserError: torch cannot use this machine's GPU, each process would train alone, or
            accelerate's configuration asks for what is not offered.
    """
    prepare_torch(config)
    for name, what in _NOT_OFFERED.items():
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise UserError(
                f"accelerate: {what} is asked for ({name} is set), and this trainer does not have "
                "it: each process would hold the whole model. Choose another accelerate "
                "configuration (--config_file), or unset the variable."
            )
    is_cpu = choose_device(config.train.device).type == "cpu"
    if is_cpu and (asked := _processes_asked_for()) > 1:
        raise UserError(
            f"accelerate: {asked} processes are asked for, but without --multi_gpu it starts one "
            "on CPUs. Launch with `accelerate launch --multi_gpu --num_processes N`, `dpo train "
            "--num_processes N` or torchrun, or ask for 1."
        )
    accelerator = Accelerator(
        cpu=is_cpu,
        mixed_precision="no",
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=config.train.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.train.timeout_minutes)),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"accelerate: {launched} processes were launched, but each would train alone. On CPUs "
            "launch with `accelerate launch --multi_gpu --num_processes N` or torchrun."
        )
    return accelerator


def _processes_asked_for() -> int:
    """What `accelerate launch`, if it started this process alone, was asked for; else 1."""
    words = psutil.Process(os.getppid()).cmdline()
    if "WORLD_SIZE" in os.environ or not any(Path(w).name == "accelerate" for w in words[:2]):
        return 1
    flags: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, is_joined, value = word.partition("=")
        flags.setdefault(name, value if is_joined else after)  # the script's own come later
    file = Path(flags.get("--config_file") or Path(HF_HOME, "accelerate", "default_config.yaml"))
    saved = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return int(flags.get("--num_processes") or saved.get("num_processes") or 1)


def launcher_notes() -> list[str]:
    """What accelerate's configuration asks for and this trainer's own keys decide, in words."""
    unless = {
        "ACCELERATE_MIXED_PRECISION": ("no", "mixed_precision", "model.dtype decides"),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "dynamo_backend", "model.compile decides"),
    }
    given = {name: os.environ.get(name, "no").lower() for name in unless}
    return [
        f"accelerate's {key} {given[name]} is not used: {instead}"
        for name, (off, key, instead) in unless.items()
        if given[name] != off
    ]


def prepare_torch(config: Config) -> None:
    """Sets what PyTorch must know before CUDA starts; what the user has set stays."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        # Micro-batches differ in size, and blocks that cannot grow leave gaps.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.use_deterministic_algorithms(config.train.deterministic)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
