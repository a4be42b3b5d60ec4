"""How many tokens go through the model at once: as many as fit, found by trying.

One micro-batch is scored and differentiated, which gives the bytes that a token takes; 0.9 of what
is free is divided by them. Activations grow with the tokens and hardly anything else does, so one
measurement is enough, and the 0.9 and `Budget.lower` allow for what it misses.

Gradient checkpointing costs a third more work and is only turned on when not even the longest pair
fits without: then on as few layers as will do, and last the head's tile is made smaller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.logps import pair_logps
from dpo.model.load import Policy, checkpoint_layers, load_policy
from dpo.model.reference import Absent, Frozen
from dpo.plan.memory import SAVINGS, Saving, fitting_tokens, free_bytes, peak_bytes
from dpo.plan.plan import choose_base, optimizer_bytes

PROBE_TOKENS = 2048  # enough for the bytes that do not depend on the tokens to count for little
STEPS_TO_RECOVER = 50  # a try that fails costs a micro-batch or two


@dataclass
class Budget:
    """How a step is cut, and at what price.

    Attributes:
        tokens: of a micro-batch at most; the same on every rank until memory runs out on one.
        saving: what was given up for memory.
        reason: what was found, in words.
        full: `tokens` as they were at first.
        changed_at: the step at which `tokens` last changed.
        fitted: what `tokens` were before they last grew; 0 if memory has run out since.
        wait: how many steps they stay before they grow.
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
        """What a checkpoint keeps; `token_budget` goes on from it."""
        growth = {name: getattr(self, name) for name in ("full", "changed_at", "fitted", "wait")}
        return {"tokens_per_microbatch": self.tokens, "saving": self.saving, "growth": growth}


def token_budget(run: Any, state: dict[str, Any]) -> Budget:
    """What `train.tokens_per_microbatch` means for a `trainer.Run`.

    Args:
        run: with its model loaded and nothing trained yet, or resumed.
        state: of the checkpoint that it goes on from: the same micro-batches again. Else {}.
    """
    given, device = run.config.train.tokens_per_microbatch, run.accelerator.device
    as_configured = Saving(int(run.config.train.gradient_checkpointing))
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
        save_memory(run, saving)
        reason = f"{tokens} tokens a micro-batch, {saving}, as before"
        return Budget(tokens, saving, reason, **growth)
    stream = build_stream(probe_pairs(run)).to(device)
    is_absent = isinstance(run.live_reference, Absent)
    reference = run.reference if is_absent else run.live_reference

    def score_and_differentiate() -> None:
        with run.accelerator.no_sync(run.scorer):
            logps = pair_logps(
                run.scorer(stream), reference(stream), stream.sequence_ids, stream.num_pairs
            )
            run.accelerator.backward(logps.logratio_gap.sum())

    return auto_budget(
        run.policy.model,
        score_and_differentiate,
        num_tokens=len(stream.input_ids),
        longest=run.data.train.longest_in_files,
        optimizer=run.config.optim.name,
        device=device,
        savings=[s for s in SAVINGS if s.checkpoint_every == 1] if as_configured[0] else SAVINGS,
        save=lambda saving: save_memory(run, saving),
        smallest_over_ranks=lambda number: smallest_over_ranks(run.accelerator, number),
    )


def load_policy_to_fit(run: Any) -> Policy:
    """Loads the policy of a `trainer.Run`, a 4-bit base in plain layers if every rank has room."""
    config, device = run.config, run.accelerator.device
    wanted, reason = choose_base(config, free_bytes(device), probe_pairs(run))
    dequantized = bool(smallest_over_ranks(run.accelerator, int(wanted)))
    if wanted and not dequantized:
        reason = "base: kept in 4 bits: another rank has no room for it dequantised"
    set_seed(config.train.seed)
    policy = load_policy(config, device, dequantized=dequantized)
    policy.notes += [reason] if reason else []
    return policy


def save_memory(run: Any, saving: Saving) -> None:
    """Puts into effect what is to be given up for memory; `run` is a `trainer.Run`."""
    scorer = run.accelerator.unwrap_model(run.scorer)
    if saving.checkpoint_every:
        checkpoint_layers(scorer.causal_lm, saving.checkpoint_every)
    scorer.tile_bytes = saving.tile_bytes
    if isinstance(run.live_reference, Frozen):
        run.live_reference.scorer.tile_bytes = saving.tile_bytes


def smallest_over_ranks(accelerator: Accelerator, number: int) -> int:
    """The smallest of the numbers that all ranks give."""
    numbers: Any = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.min())


def probe_pairs(run: Any) -> list[TokenizedPair]:
    """The first pairs of a `trainer.Run`, up to PROBE_TOKENS."""
    chosen: list[TokenizedPair] = []
    tokens = 0
    for index in run.indices(1):
        pair = run.data.train[index]
        if chosen and tokens + pair.num_stream_tokens > PROBE_TOKENS:
            break
        chosen.append(pair)
        tokens += pair.num_stream_tokens
    return chosen


def auto_budget(
    model: nn.Module,
    work: Callable[[], object],
    *,
    num_tokens: int,
    longest: int,
    optimizer: str,
    device: torch.device,
    savings: Sequence[Saving],
    save: Callable[[Saving], object],
    smallest_over_ranks: Callable[[int], int],
) -> Budget:
    """As many tokens as fit, giving up as little as the longest pair allows.

    Args:
        model: of `work`.
        work: scores and differentiates `num_tokens` tokens on `device`.
        num_tokens: of `work`.
        longest: tokens of the longest pair, which must fit.
        optimizer: its name in the configuration; its state is not there yet.
        device: of the model.
        savings: what may be given up, tried in turn.
        save: puts one of them into effect.
        smallest_over_ranks: the smallest of the numbers that all ranks give.

    Raises:
        UserError: the longest pair does not fit, even with every layer checkpointed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # gradients exist whatever the tokens: they are not to be counted
        parameter.grad = torch.zeros_like(parameter)
    moments = optimizer_bytes(trained, optimizer)
    tokens = 0
    for saving in savings:
        save(saving)
        try:
            per_token = peak_bytes(device, work) / num_tokens
            free = free_bytes(device) - moments
            fits = fitting_tokens(free, per_token, longest=longest, device_type=device.type)
        except torch.OutOfMemoryError:
            per_token, free, fits = float("nan"), 0, 0
        tokens = smallest_over_ranks(fits)
        if tokens >= longest:
            model.zero_grad()
            reason = (
                f"{tokens} tokens a micro-batch, {saving}: a token takes {per_token / 1024:.4g} "
                f"KiB, {free / 2**30:.3g} GiB are free"
            )
            return Budget(tokens, saving, reason, full=tokens)
    raise UserError(
        f"train.tokens_per_microbatch: got auto, but the longest pair has {longest} tokens and "
        f"{tokens} fit, with gradient checkpointing. Lower data.max_length, or take "
        "model.quantization nf4, a smaller model or a device with more memory."
    )
