"""How many tokens go through the model at once: as many as fit, found by trying.

One micro-batch is scored and differentiated, which gives the bytes that a token takes; 0.9 of what
is free is divided by them. Activations grow with the tokens and hardly anything else does, so one
measurement is enough, and what it misses the 0.9 and `Run`'s halving on out-of-memory are for.

Gradient checkpointing costs a third more work and is only turned on when not even the longest pair
fits without: then on as few layers as will do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpo.config import UserError
from dpo.data.stream import TokenizedPair, build_stream
from dpo.model.load import checkpoint_layers
from dpo.model.memory import CHECKPOINT_EVERY, fitting_tokens, free_bytes, peak_bytes
from dpo.show.evaluate import pair_logps

PROBE_TOKENS = 2048  # enough for the bytes that do not depend on the tokens to count for little


def token_budget(run: Any, state: dict[str, Any]) -> tuple[int, str]:
    """What `train.tokens_per_microbatch` means for a `trainer.Run`, and why, in words.

    Args:
        run: with its model loaded and nothing trained yet, or resumed.
        state: of the checkpoint that it goes on from: the same micro-batches again. Else {}.
    """
    given = run.config.train.tokens_per_microbatch
    if given != "auto":
        return given, f"{given} tokens a micro-batch, as configured"
    if state:
        tokens = state["tokens_per_microbatch"]
        return tokens, f"{tokens} tokens a micro-batch, as before"
    accelerator = run.accelerator
    pairs = probe_pairs([run.data.train[i] for i in run.indices(1)])
    stream = build_stream(pairs).to(accelerator.device)

    def score_and_differentiate() -> None:
        with accelerator.no_sync(run.scorer):
            logps = pair_logps(stream, run.scorer(stream), run.live_reference(stream))
            accelerator.backward(logps.logratio_gap.sum())

    def smallest_over_ranks(number: int) -> int:
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())

    return auto_budget(
        run.policy.model,
        score_and_differentiate,
        num_tokens=len(stream.input_ids),
        longest=run.data.train.longest,
        device=accelerator.device,
        smallest_over_ranks=smallest_over_ranks,
    )


def probe_pairs(pairs: list[TokenizedPair]) -> list[TokenizedPair]:
    """The first of them, up to PROBE_TOKENS."""
    chosen, tokens = [], 0
    for pair in pairs:
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
    device: torch.device,
    smallest_over_ranks: Callable[[int], int],
) -> tuple[int, str]:
    """Tokens per micro-batch, the same on every rank, and what was found, in words.

    Args:
        model: of `work`; gradient checkpointing may be turned on in it.
        work: scores and differentiates `num_tokens` tokens on `device`.
        num_tokens: of `work`.
        longest: tokens of the longest pair, which must fit.
        device: of the model.
        smallest_over_ranks: the smallest of the numbers that all ranks give.

    Raises:
        UserError: the longest pair does not fit, even with every layer checkpointed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # there in every micro-batch, and not of its tokens
        parameter.grad = torch.zeros_like(parameter)
    moments = sum(8 * p.numel() for p in trained)  # AdamW's two, which are not there yet
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    is_on = base.is_activation_checkpointing
    for every_n in (1,) if is_on else CHECKPOINT_EVERY:
        if every_n and not is_on:
            checkpoint_layers(base, every_n)
        try:
            per_token = peak_bytes(device, work) / num_tokens
            free = free_bytes(device) - moments
            fits = fitting_tokens(free, per_token)
        except torch.OutOfMemoryError:
            per_token, free, fits = float("nan"), 0, 0
        budget = smallest_over_ranks(fits)
        if budget >= longest:
            model.zero_grad()
            how = f"; every {every_n}. layer is checkpointed" if every_n > 1 else ""
            how = "; every layer is checkpointed" if every_n == 1 else how
            return budget, (
                f"{budget} tokens a micro-batch: a token takes {per_token / 1024:.4g} KiB, "
                f"{free / 2**30:.3g} GiB are free{how}"
            )
    raise UserError(
        f"train.tokens_per_microbatch: got auto, but the longest pair has {longest} tokens and "
        f"{budget} fit, with gradient checkpointing. Lower data.max_length, or take "
        "model.quantization nf4, a smaller model or a device with more memory."
    )
