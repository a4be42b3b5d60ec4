"""How many tokens go through the model at once, throughout the run.

At the start one micro-batch is scored and differentiated, and `dpo.plan.fit` says from its bytes
how many tokens fit. `Budget` then follows what really happens: it shrinks if memory runs out
nevertheless, and grows again later.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from dpo import run_folder
from dpo.cli import load
from dpo.config import Config
from dpo.data.order import Order
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.logps import pair_logps
from dpo.model.load import Policy, load_policy
from dpo.model.models import Models
from dpo.model.reference import Frozen
from dpo.plan.fit import Saving, choose_base, choose_dtype, fit_tokens, optimizer_bytes
from dpo.plan.memory import free_bytes, peak_bytes
from dpo.ranks import on_main, smallest_over_ranks

PROBE_TOKENS = 2048  # so many that the bytes which do not depend on tokens count for little
STEPS_TO_RECOVER = 50  # a failed attempt costs a micro-batch or two


@dataclass
class Budget:
    """How a step is cut into micro-batches, and what is given up for memory.

    Attributes:
        tokens: the most in a micro-batch; the same on every rank until memory runs out on one.
        saving: what was given up for memory.
        reason: what was found, in words.
        full: the value of `tokens` at first, up to which it grows back.
        changed_at: the step at which `tokens` last changed.
        fitted: the value of `tokens` before it last grew; 0 if memory has run out since.
        wait: how many steps `tokens` stays as it is before it grows.
    """

    tokens: int
    saving: Saving
    reason: str
    full: int
    changed_at: int = 0
    fitted: int = 0
    wait: int = STEPS_TO_RECOVER

    def lower(self, step: int, largest: int) -> None:
        """Goes back to what fitted before it grew, or else to half of what did not fit."""
        self.wait *= 2 if self.fitted else 1
        self.tokens = self.fitted or largest // 2
        self.fitted, self.changed_at = 0, step

    def recover(self, step: int) -> bool:
        """Doubles the tokens again, up to `full`, when memory has been enough for a while."""
        is_due = self.tokens < self.full and step - self.changed_at >= self.wait
        if is_due:
            self.fitted, self.tokens = self.tokens, min(self.full, 2 * self.tokens)
            self.changed_at = step
        return is_due

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `token_budget` continues from it."""
        growth = {name: getattr(self, name) for name in ("full", "changed_at", "fitted", "wait")}
        return {"tokens_per_microbatch": self.tokens, "saving": self.saving, "growth": growth}


def token_budget(
    config: Config,
    accelerator: Accelerator,
    models: Models,
    pairs: Sequence[TokenizedPair],
    longest: int,
    state: Mapping[str, Any],
) -> Budget:
    """The budget that `train.tokens_per_microbatch` means for these models; every rank must call.

    Args:
        config: of the run.
        accelerator: of the run.
        models: loaded and not trained yet, or resumed.
        pairs: the first that the run sees, which are measured.
        longest: tokens of the longest pair of the run.
        state: the checkpoint's, for the same micro-batches as before; {} for a fresh start.

    Raises:
        UserError: the longest pair does not fit, even with every layer checkpointed.
    """
    given, has_checkpointing = (
        config.train.tokens_per_microbatch,
        config.train.gradient_checkpointing,
    )
    as_configured = Saving(int(has_checkpointing))
    tokens = state.get("tokens_per_microbatch", 0)
    growth = state.get("growth", {"full": tokens})
    if given == growth["full"]:
        reason = f"{tokens} tokens a micro-batch, of {given} as configured"
        return Budget(tokens, as_configured, reason, **growth)
    if given != "auto":
        reason = f"{given} tokens a micro-batch, as configured"
        return Budget(given, as_configured, reason, full=given)
    if state:
        saving = Saving(*state.get("saving", as_configured))
        save_memory(models, accelerator, saving)
        reason = f"{tokens} tokens a micro-batch, {saving}, as before"
        return Budget(tokens, saving, reason, **growth)
    return _auto_budget(config, accelerator, models, pairs, longest)


def _auto_budget(
    config: Config,
    accelerator: Accelerator,
    models: Models,
    pairs: Sequence[TokenizedPair],
    longest: int,
) -> Budget:
    """A budget of as many tokens as fit, measured on some pairs."""
    device = accelerator.device
    stream = build_stream(pairs).to(device)
    reference = models.reference if models.reference.is_absent else models.reference.live
    for parameter in models.trained:  # allocate gradients first, so that they are not counted
        parameter.grad = torch.zeros_like(parameter)
    moments = optimizer_bytes(models.trained, config.optim.name)

    def score_and_differentiate() -> None:
        with accelerator.no_sync(models.scorer):
            logps = pair_logps(
                models.scorer(stream), reference(stream), stream.sequence_ids, stream.num_pairs
            )
            accelerator.backward(logps.logratio_gap.sum())

    def measure(saving: Saving) -> tuple[float, float]:
        save_memory(models, accelerator, saving)
        try:
            per_token = peak_bytes(device, score_and_differentiate) / len(stream.input_ids)
            return per_token, float(free_bytes(device) - moments)
        except torch.OutOfMemoryError:
            return math.inf, 0.0

    fit = fit_tokens(
        measure,
        longest=longest,
        has_checkpointing=config.train.gradient_checkpointing,
        device_type=device.type,
        agree=lambda tokens: smallest_over_ranks(accelerator, tokens),
    )
    models.policy.model.zero_grad()
    if fit.tokens < longest:
        raise UserError(
            f"train.tokens_per_microbatch: got auto, but the longest pair has {longest} tokens and "
            f"{fit.tokens} fit, with gradient checkpointing. Lower data.max_length, or take "
            "model.quantization nf4, a smaller model or a device with more memory."
        )
    reason = (
        f"{fit.tokens} tokens a micro-batch, {fit.saving}: a token takes "
        f"{fit.bytes_per_token / 1024:.4g} KiB, {fit.free_bytes / 2**30:.3g} GiB are free"
    )
    return Budget(fit.tokens, fit.saving, reason, full=fit.tokens)


def settle_dtype(
    config: Config, accelerator: Accelerator, resume_from: Path | None = None
) -> list[str]:
    """Replaces `model.dtype` auto by the type that it means here; every rank must call.

    A resumed run keeps the type that it had. Returns why it is that type, in words.
    """
    if config.model.dtype == "auto" and resume_from:
        config.model.dtype = load(resume_from / run_folder.CONFIG).model.dtype
    choose = partial(choose_dtype, config.model, accelerator.device)
    config.model.dtype, reason = on_main(accelerator, choose)
    config.check()
    return [reason] if reason else []


def load_policy_to_fit(
    config: Config, accelerator: Accelerator, pairs: Sequence[TokenizedPair]
) -> Policy:
    """Loads the policy, a 4-bit base dequantised if every rank has room; every rank must call.

    `pairs`: a sample that represents all pairs.
    """
    wanted, reason = choose_base(config, free_bytes(accelerator.device), pairs)
    dequantized = bool(smallest_over_ranks(accelerator, int(wanted)))
    if wanted and not dequantized:
        reason = "base: kept in 4 bits: another rank has no room for it dequantised"
    set_seed(config.train.seed)
    policy = load_policy(config, accelerator.device, dequantized=dequantized)
    policy.notes += [reason] if reason else []
    return policy


def save_memory(models: Models, accelerator: Accelerator, saving: Saving) -> None:
    """Puts a saving into effect for the policy and its reference."""
    live = models.reference.live
    reference = live.scorer if isinstance(live, Frozen) else None
    saving.apply(accelerator.unwrap_model(models.scorer), reference)


def probe_pairs(pairs: Sequence[TokenizedPair], order: Order) -> list[TokenizedPair]:
    """The first pairs that a run sees, up to PROBE_TOKENS."""
    chosen: list[TokenizedPair] = []
    tokens = 0
    for index in order.indices(1):
        pair = pairs[index]
        if chosen and tokens + pair.num_stream_tokens > PROBE_TOKENS:
            break
        chosen.append(pair)
        tokens += pair.num_stream_tokens
    return chosen
