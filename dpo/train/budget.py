"""How many tokens go through the model at once, throughout the run.

At the start one micro-batch is scored and differentiated, and `dpo.plan.fit` says from its bytes
how many tokens fit; on a CPU, where smaller micro-batches may be faster, some are timed. `Budget`
then follows what really happens: it shrinks if memory runs out nevertheless, and grows again later.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from dpo import run_folder
from dpo.cli import load
from dpo.config import Config
from dpo.data.order import Order, micro_batches
from dpo.data.stream import TokenizedPair, build_stream
from dpo.data.templates import choose_template
from dpo.errors import UserError
from dpo.model.load import Policy, load_policy
from dpo.model.models import Models
from dpo.model.pair_scores import score
from dpo.model.reference import Frozen
from dpo.objective import FROM_TOKENS, KLS
from dpo.plan.fit import Saving, choose_base, choose_dtype, fit_tokens, optimizer_bytes
from dpo.plan.memory import free_bytes, peak_bytes
from dpo.ranks import on_main, smallest_over_ranks

PROBE_TOKENS = 2048  # so many that the bytes which do not depend on tokens count for little
FEWER_TOKENS = (1024, 512)  # are tried on a CPU: fewer stay in its caches
FASTER = 0.95  # fewer tokens are taken if they need less than this share of the time
TRIAL_SECONDS = 20.0  # where the pairs take longer, products are all that counts
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

    def __post_init__(self) -> None:
        """Refuses what is no budget: a checkpoint may say anything."""
        numbers = {n: getattr(self, n) for n in ("tokens", "full", "changed_at", "fitted", "wait")}
        for name, number in numbers.items():
            if not isinstance(number, int) or number < (name == "tokens"):
                raise TypeError(f"{name} of the token budget is {number!r}")

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
    reference = models.reference if models.reference.is_absent else models.reference.live
    for parameter in models.trained:  # allocate gradients first, so that they are not counted
        parameter.grad = torch.zeros_like(parameter)
    moments = optimizer_bytes(models.trained, config.optim.name)
    needed = config.objective().inputs & FROM_TOKENS
    num_tokens = sum(pair.num_stream_tokens for pair in pairs)
    prompts = None
    if models.layout == "shared":  # padded rows share nothing
        num_tokens = len(build_stream(pairs).input_ids)
        prompts = [pair.prompt_ids for pair in pairs]

    def score_and_differentiate(pairs: Sequence[TokenizedPair]) -> None:
        stream = build_stream(pairs).to(device)
        with accelerator.no_sync(models.scorer):
            logps, inputs = score(stream, models.scorer, reference, needed)
            kls = sum(inputs[name].sum() for name in KLS & needed)
            accelerator.backward(logps.logratio_gap.sum() + kls)

    def measure(saving: Saving) -> tuple[float, float]:
        save_memory(models, accelerator, saving)
        try:
            peak = peak_bytes(device, lambda: score_and_differentiate(pairs))
            return peak / num_tokens, float(free_bytes(device) - moments)
        except torch.OutOfMemoryError:
            return math.inf, 0.0

    fit = fit_tokens(
        measure,
        longest=longest,
        has_checkpointing=config.train.gradient_checkpointing,
        device_type=device.type,
        agree=lambda tokens: smallest_over_ranks(accelerator, tokens),
    )
    tokens, tried = fit.tokens, ""
    if device.type == "cpu" and fit.tokens >= longest and not config.train.deterministic:
        tokens, tried = fastest(fit.tokens, pairs, score_and_differentiate, prompts=prompts)
        tokens = smallest_over_ranks(accelerator, tokens)
    models.policy.model.zero_grad()
    if fit.tokens < longest:
        raise UserError(
            f"train.tokens_per_microbatch: got auto, but the longest pair has {longest} tokens and "
            f"{fit.tokens} fit, with gradient checkpointing. Lower data.max_length, or take "
            "model.quantization nf4, a smaller model or a device with more memory."
        )
    reason = (
        f"{tokens} tokens a micro-batch, {fit.saving}: a token takes "
        f"{fit.bytes_per_token / 1024:.4g} KiB, {fit.free_bytes / 2**30:.3g} GiB are free{tried}"
    )
    return Budget(tokens, fit.saving, reason, full=tokens)


def fastest(
    most: int,
    pairs: Sequence[TokenizedPair],
    work: Callable[[Sequence[TokenizedPair]], object],
    clock: Callable[[], float] = time.perf_counter,
    prompts: Sequence[Sequence[int]] | None = None,
) -> tuple[int, str]:
    """The tokens of a micro-batch, up to `most`, that take the pairs through soonest; and in words.

    The same pairs are cut in each way, see `micro_batches`, and each way is timed once.
    """
    sizes = [pair.num_stream_tokens for pair in pairs]
    ways = {}  # numbers that cut the pairs alike: the largest is tried
    for tokens in (most, *(fewer for fewer in FEWER_TOKENS if fewer < most)):
        cut = micro_batches(sizes, tokens, prompts)
        ways.setdefault(str(cut), (tokens, cut))
    seconds: dict[int, float] = {}
    for tokens, cut in ways.values() if len(ways) > 1 else ():
        began = clock()
        for chosen in cut:
            work([pairs[i] for i in chosen])
        seconds[tokens] = clock() - began
        if seconds[tokens] > TRIAL_SECONDS:
            break
    best = most
    for tokens, taken in seconds.items():
        best = tokens if taken < FASTER * seconds[best] else best
    each = ", ".join(f"{tokens} in {taken:.2g} s" for tokens, taken in seconds.items())
    return best, f"; the first pairs go through {each}" if seconds else ""


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


def settle_day(
    config: Config,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    resume_from: Path | None = None,
) -> None:
    """Sets `data.template_date` to today if the template asks for it; every rank must call.

    A resumed run keeps its day, and so its prompts.
    """
    if config.data.template_date is None and resume_from:
        config.data.template_date = load(resume_from / run_folder.CONFIG).data.template_date
    asks = "strftime_now" in (choose_template(tokenizer, config.data) or "")
    if asks:  # a day that was given is written out: the template asks no more
        config.data.template_date = on_main(accelerator, lambda: date.today().isoformat())


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
