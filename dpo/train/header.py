"""The run header: everything a reader of the log would ask."""

import math
import os
from typing import Any

from dpo.model.reference import Absent
from dpo.train.tracking import device_name, versions


def header(run: Any) -> str:
    """What runs, on what, against what; `run` is a `trainer.Run`."""
    config, model, accelerator = run.config, run.policy.model, run.accelerator
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    steps = math.ceil(len(run.data.train) / run.pairs_per_step)
    lines = [
        versions(),
        f"device: {accelerator.num_processes} x {device_name(accelerator.device)}",
        f"model: {config.model.name_or_path}, {config.model.dtype}, quantization "
        f"{config.model.quantization}, {trained:,} of {total:,} stored parameters train",
        f"reference: {run.reference_mode}"
        + (
            " (no copy: the cache holds all of it)"
            if isinstance(run.live_reference, Absent)
            else ""
        )
        + f"; layout: {run.layout}"
        + (f" ({run.layout_reason})" if run.layout_reason else ""),
        f"memory: {run.budget.reason}",
        f"reference cache: {run.cached.store.folder if run.cached else 'off'}",
        *run.data.summary,
        f"pairs: {len(run.data.train)} to train on, {len(run.data.held_out)} held out; "
        f"{run.pairs_per_step} a step, {steps} steps an epoch, {run.total_steps} steps",
        *run.policy.notes,
        *_remarks(run),
    ]
    return "\n".join(lines)


def _on_a_gpu(run: Any) -> list[str]:
    """Says what costs time or bits there, and which key avoids it."""
    optim, remarks = run.config.optim, []
    if run.config.train.deterministic:
        remarks.append("deterministic: the same micro-batches have the same bits")
    else:
        remarks.append("a resumed run is the straight one up to rounding (train.deterministic)")
    if optim.name != "adamw":
        waits = sum(p.requires_grad for p in run.policy.model.parameters())
        remarks.append(
            f"{optim.name} waits for the device at least {waits} times a step, once a trained "
            "tensor; adamw does not, where its 8 bytes a trained weight fit"
        )
    return remarks


def _remarks(run: Any) -> list[str]:
    """What is allowed, and probably not meant; and what the environment asked for in vain."""
    config, remarks = run.config, []
    if config.optim.warmup_steps >= run.total_steps:
        remarks.append(
            f"the warm-up ({config.optim.warmup_steps} steps) is not shorter than the run: "
            "optim.learning_rate is never reached"
        )
    if len(run.data.train) < run.pairs_per_step:
        remarks.append(f"one step holds all {len(run.data.train)} pairs: each step is an epoch")
    if not len(run.data.held_out):
        remarks.append("nothing is held out: no evaluation")
    if config.optim.name.startswith("paged") and run.accelerator.device.type == "cpu":
        remarks.append(f"{config.optim.name} runs unpaged on a CPU")
    if run.accelerator.device.type == "cuda":
        remarks += _on_a_gpu(run)
    if config.model.quantization == "int8":
        remarks.append("int8 layers compute in float16, whatever model.dtype is")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        remarks.append(f"accelerate's mixed precision {asked!r} is not used: model.dtype decides")
    if run.start_step:
        remarks.append(f"resumed after step {run.start_step}")
    return [f"note: {remark}" for remark in remarks]
