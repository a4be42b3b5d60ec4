"""Answers as token ids, drawn in batches: for evaluation, and for dpo generate.

A sampled answer depends on the weights, its prompt's tokens, the seed and the sampling options, and
on nothing else: not on the other prompts, their order or the batch size. So base and policy draw
with the same random numbers, and one process samples what two do. The logits of a batch differ from
those of a single row in their last bits, though, so very rarely (often enough to notice with
half-precision weights) a draw on the border between two tokens gives the other one.

Left out on purpose: every other change of the distribution. A model's own generation_config.json
may ask for a repetition penalty or a top-k; only its stop tokens are read, since `eval/kl` and a
comparison of two models want the distribution that the weights define.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from dpo.model.load import without_peft


class Draw(LogitsProcessor):
    """Leaves one token a row, drawn from the softmax of its scores.

    It is drawn by inverse transform: the first token, in the vocabulary's order, at which the
    cumulative probability exceeds a uniform number. That number is a function of (seed, prompt,
    position), and probabilities are integer multiples of 2^-53, whose sums do not depend on order.

    Args:
        prompts: token ids of each row, without padding.
        seeds: one a row.
        num_tokens: the most tokens that are drawn.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], num_tokens: int):
        rows = [_uniforms(ids, seed, num_tokens) for ids, seed in zip(prompts, seeds, strict=True)]
        self._uniforms = torch.stack(rows)
        self._start = max(map(len, prompts))

    def __call__(  # type: ignore[override]
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """Scores that are 0 for the token drawn and -inf for the others."""
        uniform = self._uniforms[:, input_ids.shape[1] - self._start].to(scores.device)
        cumulative = (scores.double().softmax(-1) * 2**53).long().cumsum(-1)
        threshold = (uniform[:, None] * cumulative[:, -1:]).long()
        drawn = torch.searchsorted(cumulative, threshold, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def _uniforms(ids: Sequence[int], seed: int, count: int) -> Float[Tensor, " count"]:
    key = hashlib.blake2b(f"{seed}: {[*map(int, ids)]}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
    streamer: TextStreamer | None = None,
) -> list[list[int]]:
    """Token ids of one answer a prompt, the stop token included where one was reached.

    Temperature 0 is greedy; `seed` is one for all or one a prompt; a `streamer` wants one prompt.
    Prompts of a batch are padded on the left, under the model's own attention and its padding mask.
    The model is in eval mode meanwhile (4-bit layers excepted, see
    `model.load.keep_4bit_trainable`).
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        use_cache=True,
        do_sample=False,  # Draw leaves only one token to choose
    )
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    answers: dict[int, list[int]] = {}
    # Longest first: a batch then pads little, and running out of memory happens at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with _ready(model) as base, _uncompiled(base):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [list(prompts[i]) for i in rows]
            processors = LogitsProcessorList()
            if temperature > 0:
                draw = Draw(batch, [seeds[i] for i in rows], max_new_tokens)
                bend = [TemperatureLogitsWarper(float(temperature))]
                bend += [TopPLogitsWarper(top_p)] if top_p < 1 else []
                processors += [*bend, draw]
            longest = max(map(len, batch))
            padded = [[pad] * (longest - len(ids)) + ids for ids in batch]
            mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch]
            output = base.generate(
                input_ids=torch.tensor(padded, device=base.device),
                attention_mask=torch.tensor(mask, device=base.device),
                generation_config=settings,
                logits_processor=processors,
                streamer=streamer,
            )
            for i, ids in zip(rows, output[:, longest:].tolist(), strict=True):
                answers[i] = _until_stop(ids, stop_ids)
    return [answers[i] for i in range(len(prompts))]


@contextmanager
def _ready(model: nn.Module) -> Iterator[Any]:
    """The model below the adapter, in eval mode and without generation settings of its own.

    Transformers fills what a request leaves open from the model's settings, penalties included.
    """
    base: Any = without_peft(model)
    was_training, own_settings = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        yield base
    finally:
        base.generation_config = own_settings
        model.train(was_training)


def _uncompiled(base: nn.Module) -> AbstractContextManager[Any]:
    """Turns compilation off: every length of the key cache would be compiled anew."""
    is_compiled = any(module._compiled_call_impl is not None for module in base.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]
