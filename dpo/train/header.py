"""The run header: everything a reader of the log would ask."""

import torch
from accelerate import Accelerator

from dpo.config import Config, OptimConfig
from dpo.data.loader import PreferenceData
from dpo.data.order import Order
from dpo.model.load import without_peft
from dpo.model.models import Models
from dpo.plan.gpus import BFLOAT16_FROM, EMULATED
from dpo.train.budget import Budget
from dpo.train.optim import learning_rate
from dpo.train.tracking import device_name, versions


def header(
    config: Config,
    accelerator: Accelerator,
    models: Models,
    data: PreferenceData,
    order: Order,
    budget: Budget,
    *,
    start_step: int,
    planned: int,
    time: str,
) -> str:
    """What runs, on what, against what.

    `start_step`: the step that the run goes on from, or 0; `planned`: how many it was to have then;
    `time`: how long it takes, if known.
    """
    trained = sum(p.numel() for p in models.trained)
    total = sum(p.numel() for p in models.policy.model.parameters())
    reference = models.reference
    remarks = _remarks(config, accelerator, data, order)
    if accelerator.device.type == "cuda":
        remarks += _on_a_gpu(config, num_trained_tensors=len(models.trained))
        is_bfloat16 = without_peft(models.policy.model).dtype == torch.bfloat16
        if is_bfloat16 and torch.cuda.get_device_capability(accelerator.device) < BFLOAT16_FROM:
            remarks.append(EMULATED)
    if start_step:
        remarks.append(_resumed(start_step, planned, order.num_steps, config.optim))
    lines = [
        versions(),
        f"device: {accelerator.num_processes} x {device_name(accelerator.device)}",
        f"model: {config.model.name_or_path}, {config.model.dtype}, quantization "
        f"{config.model.quantization}, {trained:,} of {total:,} stored parameters train",
        f"reference: {reference.mode}"
        + (" (no copy: the cache holds all of it)" if reference.is_absent else "")
        + f"; layout: {models.layout}"
        + (f" ({models.layout_reason})" if models.layout_reason else ""),
        f"memory: {budget.reason}",
        f"reference cache: {reference.store.folder if reference.store else 'off'}",
        *data.summary,
        f"pairs: {len(data.train)} to train on, {len(data.held_out)} held out; "
        f"{order.pairs_per_step} a step, {order.steps_per_epoch} steps an epoch, "
        f"{order.num_steps} steps",
        *([time] if time else []),
        *models.policy.notes,
        *(f"note: {remark}" for remark in remarks),
    ]
    return "\n".join(lines)


def _resumed(start_step: int, planned: int, num_steps: int, optim: OptimConfig) -> str:
    """Where the run goes on from; and if it has another end now, what that does to the schedule."""
    said = f"resumed after step {start_step}"
    if num_steps == planned:
        return said
    said += f" of {planned} planned; now {num_steps} steps"
    before, now = (
        [learning_rate(step, total, optim) for step in range(start_step + 1)]
        for total in (planned, num_steps)
    )
    if before == now:
        return f"{said}: the learning rate is that of a run which had them planned from the start"
    return (
        f"{said}: the learning rate goes on at {now[-1]:.3g}, where {before[-1]:.3g} was planned; "
        f"a run with {num_steps} steps planned from the start would have had other rates until here"
    )


def _on_a_gpu(config: Config, num_trained_tensors: int) -> list[str]:
    """What costs time or reproducibility on a GPU, and which key avoids it."""
    remarks = []
    if config.train.deterministic:
        remarks.append("deterministic: the same micro-batches have the same bits")
    else:
        remarks.append("a resumed run is the straight one up to rounding (train.deterministic)")
    if config.optim.name != "adamw":
        remarks.append(
            f"{config.optim.name} waits for the device at least {num_trained_tensors} times a "
            "step, once a trained tensor; adamw does not, where its 8 bytes a trained weight fit"
        )
    return remarks


def _remarks(
    config: Config, accelerator: Accelerator, data: PreferenceData, order: Order
) -> list[str]:
    """What is allowed and probably not meant, and settings of the environment that are ignored."""
    remarks = [config.note] if config.note else []
    if not config.has_fixed_reference:
        remarks.append(f"rewards are {config.rewards}")
    if config.reference.update != "never":
        remarks.append(
            f"the reference moves to the policy every {config.reference.update_steps} steps "
            f"({config.reference.update})"
        )
    if config.has_fixed_reference and config.reference.cache == "auto" and not config.has_cache:
        remarks.append("no reference cache: the loss reads more of the reference than log-probs")
    warmup = config.optim.num_warmup_steps(order.num_steps)
    if config.optim.warmup_ratio is not None:
        remarks.append(f"optim.warmup_ratio: a warm-up of {warmup} steps, not of warmup_steps")
    if warmup >= order.num_steps:
        remarks.append(
            f"the warm-up ({warmup} steps) is not shorter than the run: "
            "optim.learning_rate is never reached"
        )
    if len(data.train) < order.pairs_per_step:
        remarks.append(f"one step holds all {len(data.train)} pairs: each step is an epoch")
    if not len(data.held_out):
        remarks.append("nothing is held out: no evaluation")
    if config.optim.name.startswith("paged") and accelerator.device.type == "cpu":
        remarks.append(f"{config.optim.name} runs unpaged on a CPU")
    if config.train.device == "cpu" and torch.cuda.is_available():
        remarks.append("train.device is cpu: the GPU is not used")
    if accelerator.device.type == "cpu" and torch.backends.mps.is_available():
        remarks.append(
            "the CPU trains, not Apple's GPU (MPS): nothing here is tested on it, and it lacks the "
            "float64 in which metrics are summed"
        )
    if config.model.trust_remote_code:
        remarks.append("model.trust_remote_code: the model's own Python code runs here")
    if config.model.allow_pickle:
        remarks.append("model.allow_pickle: weights may be read from pickles, without their code")
    if config.model.quantization == "int8":
        remarks.append("int8 layers compute in float16, whatever model.dtype is")
    return remarks
