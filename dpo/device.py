"""The device of a command. A GPU that torch cannot use is an error, not a run that takes weeks."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import torch

from dpo.errors import UserError

_DEV = Path("/dev")


def choose_device(wanted: Literal["auto", "cpu"] = "auto") -> torch.device:
    """The GPU if there is one, unless the CPU is wanted; no GPU if CUDA_VISIBLE_DEVICES hides all.

    Raises:
        UserError: there is an NVIDIA GPU, but torch cannot use it.
    """
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
