"""What fits: the memory rule that the trainer follows and the planner predicts.

A micro-batch's activations grow with its tokens and hardly anything else does. So one measurement
gives the bytes that a token takes, and a share of what is free is divided by them. Memory is saved
only if the longest pair does not fit otherwise: by checkpointing as few layers as will do (all of
them cost a third more work), and last by a smaller tile of the head.

The trainer measures a micro-batch on the device, the planner on fake tensors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import NamedTuple

import torch

from dpo.config import Config, Dtype, ModelConfig
from dpo.data.stream import TokenizedPair, build_stream
from dpo.logps import TILE_BYTES
from dpo.model.load import checkpoint_layers
from dpo.model.named import load_shape
from dpo.model.scorer import Scorer
from dpo.plan.fake import FakePolicy, meta_model
from dpo.plan.gpus import product_tflops
from dpo.plan.memory import free_bytes

MOST_TOKENS = {  # in a micro-batch, unless a pair is longer
    "cuda": 16384,  # more make no product faster, and a step has few more
    "cpu": 2048,  # more do not fit its caches (benchmarks/results/ablation.md)
}
SHARE = 0.9  # of the free memory
FP32_SHARE = 0.5  # of it may go to weights in float32 where 16 bits would do
MUCH_FASTER = 1.5  # times: where it matters, it is 3 to 20 times, so that noise decides nothing
PROBE_PAIRS = 4
# In a micro-batch of this size, dequantising 4-bit weights is a small part of the work.
ENOUGH_TOKENS = 8192


class Saving(NamedTuple):
    """What is given up for memory. Numbers do not change.

    Attributes:
        checkpoint_every: every n-th layer is computed again in the backward; 0: none.
        tile_bytes: how many bytes of the head's logits are alive at once.
    """

    checkpoint_every: int = 0
    tile_bytes: int = TILE_BYTES

    def __str__(self) -> str:
        layers = {0: "no layer", 1: "every layer", 2: "every second layer"}
        which = layers.get(self.checkpoint_every, f"every {self.checkpoint_every}th layer")
        tile = f", the head's tile {self.tile_bytes // 2**20} MiB"
        return f"{which} checkpointed" + (tile if self.tile_bytes != TILE_BYTES else "")

    def apply(self, policy: Scorer, reference: Scorer | None = None) -> None:
        """Puts the saving into effect; `reference`: its scorer, if it has one of its own."""
        if self.checkpoint_every:
            checkpoint_layers(policy.causal_lm, self.checkpoint_every)
        for scorer in (policy, reference or policy):
            scorer.tile_bytes = self.tile_bytes


SAVINGS = (*(Saving(every) for every in (0, 4, 2, 1)), Saving(1, TILE_BYTES // 8))


class Fit(NamedTuple):
    """The tokens of a micro-batch, what each of them takes, what is free, and what is given up."""

    tokens: int
    bytes_per_token: float
    free_bytes: float
    saving: Saving


def fit_tokens(
    measure: Callable[[Saving], tuple[float, float]],
    *,
    longest: int,
    has_checkpointing: bool,
    device_type: str = "cuda",
    agree: Callable[[int], int] = lambda tokens: tokens,
) -> Fit:
    """As many tokens as fit, giving up as little as the longest pair allows.

    Args:
        measure: puts a saving into effect; returns the bytes that a token then takes, and those
            that are free for activations.
        longest: tokens of the longest pair, which stays whole.
        has_checkpointing: every layer is checkpointed in any case.
        device_type: cuda or cpu.
        agree: returns the smallest of the numbers that all ranks give.

    Returns:
        The first fit that holds the longest pair, or else the last one, which does not.
    """
    fit = Fit(0, math.inf, 0.0, SAVINGS[0])
    for saving in allowed_savings(has_checkpointing=has_checkpointing):
        per_token, free = measure(saving)
        tokens = fitting_tokens(free, per_token, longest=longest, device_type=device_type)
        fit = Fit(agree(tokens), per_token, free, saving)
        if fit.tokens >= longest:
            break
    return fit


def allowed_savings(*, has_checkpointing: bool) -> list[Saving]:
    """The savings to try in turn: if configured, only those that checkpoint every layer."""
    return [saving for saving in SAVINGS if saving.checkpoint_every == 1 or not has_checkpointing]


def fitting_tokens(
    free: float | int, bytes_per_token: float, *, longest: int = 0, device_type: str = "cuda"
) -> int:
    """Tokens of a micro-batch that fit into the free bytes, at most MOST_TOKENS.

    `longest`: tokens of the longest pair, which stays whole: the cap is no lower.
    """
    most = max(MOST_TOKENS[device_type], longest)
    return max(0, min(most, int(SHARE * free / bytes_per_token)))


def plan_fit(
    fake: FakePolicy,
    config: Config,
    left: float,
    pairs: Sequence[TokenizedPair],
    device_type: str = "cuda",
) -> Fit:
    """What the trainer will find if `left` bytes are free for activations.

    A configured number is kept; then only `train.gradient_checkpointing` saves memory.
    """

    def measure(saving: Saving) -> tuple[float, float]:
        saving.apply(fake.scorer)
        return bytes_per_token(fake, pairs), left

    configured, is_on = config.train.tokens_per_microbatch, config.train.gradient_checkpointing
    if configured != "auto":
        saving = allowed_savings(has_checkpointing=is_on)[0]
        return Fit(configured, *measure(saving), saving)
    longest = max(pair.num_stream_tokens for pair in pairs)
    return fit_tokens(measure, longest=longest, has_checkpointing=is_on, device_type=device_type)


def choose_dtype(model: ModelConfig, device: torch.device) -> tuple[Dtype, str]:
    """The type that `model.dtype` means here, and why, in words ("" if nothing was to choose).

    For auto that is the checkpoint's. But many CPUs have no instructions for products in half
    precision: there it is float32, if the weights leave enough memory.
    """
    if model.dtype != "auto":
        return model.dtype, ""
    shape = load_shape(model)
    own: Dtype = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(shape.dtype, "float32")  # type: ignore[assignment]
    if device.type != "cpu" or own == "float32":
        return own, ""
    width = shape.get_text_config().hidden_size
    times = product_tflops(width, torch.float32) / product_tflops(width, getattr(torch, own))
    if times < MUCH_FASTER:
        return own, ""
    rate = f"this CPU multiplies float32 {times:.2g} times as fast as {own}"
    # Of a quantised model, most weights do not get longer.
    weights = meta_model(model).parameters() if model.quantization == "none" else ()
    size, free = 4 * sum(map(torch.numel, weights)), free_bytes(device)
    if size > FP32_SHARE * free:
        lack = f"but its weights would take {size / 2**30:.3g} of {free / 2**30:.3g} GiB"
        return own, f"model.dtype auto: {own}: {rate}, {lack}"
    return "float32", f"model.dtype auto: float32: {rate}"


def choose_base(
    config: Config,
    memory: int | float,
    pairs: Sequence[TokenizedPair],
    fake: FakePolicy | None = None,
) -> tuple[bool, str]:
    """Whether to dequantise a 4-bit base once, and why, in words ("" for any other base).

    Args:
        config: of the run.
        memory: bytes that the device has for the run.
        pairs: a sample that represents all pairs.
        fake: the policy, if there is one already.
    """
    if config.model.quantization not in ("nf4", "fp4"):
        return False, ""
    if config.model.dequantize_base != "auto":
        how = "dequantised once" if config.model.dequantize_base else "kept in 4 bits"
        return config.model.dequantize_base, f"base: {how}, as configured"
    fake = fake or FakePolicy(config)
    parts = memory_parts(fake, config, dequantized=True)
    left = memory - sum(parts.values())
    fit = fitting_tokens(left, bytes_per_token(fake, pairs))
    is_enough = fit >= ENOUGH_TOKENS
    return is_enough, (
        f"base: {'dequantised once' if is_enough else 'kept in 4 bits'}: dequantised it takes "
        f"{fake.base_bytes(dequantized=True) / 2**30:.3g} GiB, and micro-batches of {fit} tokens "
        f"fit beside it, wanted {ENOUGH_TOKENS}"
    )


def memory_parts(fake: FakePolicy, config: Config, *, dequantized: bool = False) -> dict[str, int]:
    """Bytes by part of what exists in every step: all but the activations."""
    trained = fake.trained
    base = fake.base_bytes(dequantized=dequantized)
    dtype = str(next(fake.base.parameters()).dtype).removeprefix("torch.")
    is_plain = config.model.quantization == "none" or dequantized
    stored = dtype if is_plain else config.model.quantization
    parts = {
        f"base weights, {stored}": base,
        "adapter": fake.adapter_bytes(),
        f"adapter in {dtype}": fake.cast_bytes(),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        f"optimizer state, {config.optim.name}": optimizer_bytes(trained, config.optim.name),
        "fp32 copies of the weights": copy_bytes(trained),
        "frozen reference": base if has_frozen_copy(config) else 0,
        "largest weight, dequantised": 0 if dequantized else fake.dequantised_bytes(),
    }
    return {part: size for part, size in parts.items() if size}


def optimizer_bytes(trained: Sequence[torch.Tensor], name: str) -> int:
    """Bytes of AdamW's two moments, in fp32 or in 8 bits.

    Eight bits need an fp32 maximum per block of 256, and apply only to tensors of 4096 or more.
    """
    if not name.endswith("8bit"):
        return sum(8 * p.numel() for p in trained)
    return sum(
        2 * p.numel() + 8 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 8 * p.numel()
        for p in trained
    )


def copy_bytes(trained: Sequence[torch.Tensor]) -> int:
    """Bytes of the fp32 copies that the optimizer steps if half-precision weights train."""
    return sum(4 * p.numel() for p in trained if p.dtype.itemsize < 4)


def bytes_per_token(fake: FakePolicy, pairs: Sequence[TokenizedPair]) -> float:
    """Measured on a micro-batch of the first pairs; more would take longer and show the same.

    They may repeat, so each gets a first token of its own: they would share all others.
    """
    apart = [
        replace(pair, prompt_ids=[number, *pair.prompt_ids[1:]])
        for number, pair in enumerate(islice(cycle(pairs), PROBE_PAIRS))
    ]
    return fake.step_bytes(apart) / len(build_stream(apart).input_ids)


def has_frozen_copy(config: Config) -> bool:
    """Whether the reference is a second model."""
    return config.model.adapter == "none" and config.reference_mode != "zero"
