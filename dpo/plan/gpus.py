"""GPUs by their data sheets, found by the names that drivers give them; and this CPU, measured."""

import difflib
import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from transformers import PreTrainedModel

from dpo.plan.memory import free_bytes

# Compute capability from which tensor cores take bfloat16.
BFLOAT16_FROM = (8, 0)
EMULATED = (
    "this card emulates bfloat16, slowly, since its compute capability is below 8.0; "
    "model.dtype float16 is the type of its tensor cores"
)


@dataclass(frozen=True)
class Gpu:
    """A device. A GPU by its data sheet: dense 16-bit tensor TFLOP/s with fp32 sums.

    Attributes:
        memory_gib: all memory of a GPU, or what is free for a process on a CPU.
        tflops: the peak of a GPU, or what a product reaches on a CPU.
        has_bfloat16: products in bfloat16 are no slower than in float16.
        type: cuda or cpu.
    """

    memory_gib: float
    tflops: float
    has_bfloat16: bool = True
    type: Literal["cuda", "cpu"] = "cuda"


# Without sparsity, which doubles what some data sheets print. bfloat16; float16 on V100 and T4.
GPUS: dict[str, Gpu] = {
    "T4": Gpu(16.0, 65.0, has_bfloat16=False),
    "V100-16": Gpu(16.0, 125.0, has_bfloat16=False),
    "V100-32": Gpu(32.0, 125.0, has_bfloat16=False),
    "A10": Gpu(24.0, 125.0),
    "A10G": Gpu(24.0, 70.0),
    "L4": Gpu(24.0, 121.0),
    "RTX 3090": Gpu(24.0, 71.0),
    "RTX 4090": Gpu(24.0, 165.0),
    "RTX 5090": Gpu(32.0, 209.5),
    "RTX A6000": Gpu(48.0, 155.0),
    "RTX 6000 Ada": Gpu(48.0, 364.0),
    "L40S": Gpu(48.0, 362.0),
    "A100-40": Gpu(40.0, 312.0),
    "A100-80": Gpu(80.0, 312.0),
    "H100": Gpu(80.0, 989.0),
    "H100 PCIe": Gpu(80.0, 756.0),
    "H100 NVL": Gpu(94.0, 835.0),
    "H200": Gpu(141.0, 989.0),
    "B200": Gpu(180.0, 2250.0),
    "MI250X": Gpu(128.0, 383.0),
    "MI300X": Gpu(192.0, 1307.0),
    "MI325X": Gpu(256.0, 1307.0),
}


def find_gpu(name: str) -> Gpu | None:
    """Finds a GPU by a key of GPUS or a driver's name ("NVIDIA A100-SXM4-80GB"): most words win."""
    given = _words(name)
    fitting = [known for known in GPUS if _words(known) <= given and "mig" not in given]
    return GPUS[max(fitting, key=lambda known: len(_words(known)))] if fitting else None


def this_cpu(base: PreTrainedModel) -> Gpu:
    """This machine's CPU: the memory that is free, and its rate for the model's width and type."""
    rate = product_tflops(base.config.get_text_config().hidden_size, base.dtype)
    return Gpu(free_bytes(torch.device("cpu")) / 2**30, rate, type="cpu")


@cache
def product_tflops(width: int, dtype: torch.dtype) -> float:
    """TFLOP/s of this CPU in the product of a micro-batch and a square layer, over 0.2 s."""
    tokens, weight = (torch.ones(n, width, dtype=dtype) for n in (2048, width))
    torch.nn.functional.linear(tokens[:8], weight)  # the first one starts threads
    num_products, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < 0.2:
        torch.nn.functional.linear(tokens, weight)
        num_products += 1
    return num_products * 2 * tokens.numel() * width / seconds / 1e12


def nearest_gpus(name: str) -> list[str]:
    """The keys of GPUS that contain an unknown name, or else resemble it."""
    lower = {known.lower(): known for known in GPUS}
    near = [known for known in lower if name.lower() in known]
    near = near or difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.3)
    return [lower[known] for known in near] if name else []


def peak_tflops(device_name: str) -> float | None:
    """Peak of the device that `torch.cuda.get_device_name()` names; None if it is unknown."""
    gpu = find_gpu(device_name)
    return gpu.tflops if gpu else None


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower().replace("gb", "")))
