"""The device of a command, and the cores of its CPU.

A GPU that torch cannot use is an error, not a run that takes weeks; a launcher's one thread is not
what the user asked for.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import psutil
import torch

from dpo.errors import UserError

_DEV = Path("/dev")


def choose_device(wanted: Literal["auto", "cpu"] = "auto") -> torch.device:
    """The GPU if there is one, unless the CPU is wanted; no GPU if CUDA_VISIBLE_DEVICES hides all.

    On the way it gives PyTorch this process's share of the cores, see `use_cores`.

    Raises:
        UserError: there is an NVIDIA GPU, but torch cannot use it.
    """
    use_cores()
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and _has_nvidia_gpu():
        raise UserError(
            f"device: this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: "
            f"{_obstacle()} Or do without: --train.device cpu trains on the CPU, and "
            "CUDA_VISIBLE_DEVICES= before any command hides the GPU from it."
        )
    return torch.device("cpu")


def _has_nvidia_gpu() -> bool:
    """Whether the kernel's driver shows one here, or (on Windows' Linux) nvidia-smi lists one."""
    if any(_DEV.glob("nvidia[0-9]*")):
        return True
    lister = shutil.which("nvidia-smi")
    return bool(lister) and b"GPU 0" in subprocess.run([lister, "-L"], capture_output=True).stdout


def _obstacle() -> str:
    """Why torch cannot use CUDA, as far as it says."""
    if torch.version.cuda is None:
        return (
            "it is built without CUDA. Uninstall it, and install one that has CUDA: "
            "https://pytorch.org/get-started/locally says how."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    said = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible else ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = f": {str(error).strip().splitlines()[0]}{said}"
    return f"CUDA does not start{said}."


def use_cores() -> None:
    """Gives PyTorch the physical cores, shared by the ranks of this machine.

    What the user has set in OMP_NUM_THREADS stays.
    """
    if not is_number_of_threads_given():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        physical = psutil.cpu_count(logical=False) or num_cores()
        torch.set_num_threads(max(1, min(physical, num_cores()) // ranks))


def num_cores() -> int:
    """The number of cores that this process may use; two of them may be one physical core."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def is_number_of_threads_given() -> bool:
    """Whether the user has set OMP_NUM_THREADS.

    accelerate launch and torchrun set it to 1 if it is not set, so where one of them has started
    this process, the environment and the options that it was started with are asked.
    """
    if os.environ.keys().isdisjoint(("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")):
        return "OMP_NUM_THREADS" in os.environ
    try:
        launcher = psutil.Process(os.getppid())
        options = " ".join(launcher.cmdline()).replace("-", "_")
        return "OMP_NUM_THREADS" in launcher.environ() or "num_cpu_threads_per_process" in options
    except psutil.Error:  # it is gone, or another user's
        return True
