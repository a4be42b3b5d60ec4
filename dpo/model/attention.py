"""Attention along paths: how sequences share their openings, for any Hugging Face decoder.

A sequence lies in the stream as the openings that earlier ones have computed, its path, and a
segment of its own. A segment attends to all of its path and, causally, to itself: its keys are
`[path | segment]`, causal from the bottom right. It sees nothing else.

For a pair `[shared | chosen | rejected]` that is what Wang and Hegde 2024 (arXiv:2410.20305) do
with a mask for FlexAttention in patched models. What is different here: causal segments instead of
a mask, any number of sequences in a trie, registered through transformers' `AttentionInterface`; no
model is patched. The stock attentions would not do: they read positions that restart as a new
document and would hide the path from it.

On a GPU all segments of a stream are one call of `varlen_attn`, which needs no mask. Where it
cannot be used (a CPU, fp32, older GPUs) there is one call of scaled_dot_product_attention per
segment, and only those with a path have a mask, built once per stream.

Axes of query, key and value: (1, heads, tokens, head width).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from dpo.data.stream import Segment, packed_to_device

NAME = "dpo_along_paths"
KEYWORD = "dpo_segments"  # segments travel so: model(..., dpo_segments=...) -> layer -> attention
# Arguments that have no effect in training; any other, unless None, is not honoured.
_KNOWN = {"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position"}
_MASKED_QUERIES = 256  # of 700 after 300 keys, a CPU takes 31 ms for 35; no difference below 256
_VARLEN_WIDTH = 256  # the widest head of the flash kernels
_VARLEN_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11


class Segments:
    """The segments of one stream, with what its layers share, and a record of its calls.

    The record is for `Scorer`'s probe: how many calls there were, and which arguments they brought
    that this attention does not honour.

    Args:
        each: the stream's segments, in order.
        device: where its tokens are.
    """

    def __init__(self, each: tuple[Segment, ...], device: torch.device):
        self.each, self.device = each, device
        self.num_calls = 0
        self.not_honoured: set[str] = set()
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None) -> Bool[Tensor, "queries keys"]:
        """True where a query may look: bottom-right causal, at most `window` tokens back."""
        at = (queries, keys, window)
        if at not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.device)
            mask = ones.tril(keys - queries)
            self._masks[at] = mask if window is None else mask.triu(keys - queries - window + 1)
        return self._masks[at]

    @cached_property
    def joined(self) -> "Joined":
        """How one call over all segments finds its queries and keys."""
        keys: list[int] = []
        firsts: list[int] = []
        again: list[list[int]] = []  # by how often a token has occurred before
        query_ends, key_ends = [0], [0]
        times = [0] * self.each[-1].end
        for segment in self.each:
            if not segment.length:  # without queries the kernel writes no gradient
                continue
            for number, length in segment.path:
                start = self.each[number].start
                for token in range(start, start + length):
                    again += [[]] * (times[token] == len(again))
                    again[times[token]].append(len(keys))
                    times[token] += 1
                    keys.append(token)
            firsts += range(len(keys), len(keys) + segment.length)
            keys += range(segment.start, segment.end)
            query_ends.append(segment.end)
            key_ends.append(len(keys))

        lists = keys, firsts, query_ends, key_ends, *again
        tensors = packed_to_device([torch.tensor(n, dtype=torch.long) for n in lists], self.device)
        return Joined(
            *tensors[:2],
            *(ends.int() for ends in tensors[2:4]),
            again=tensors[4:],
            most_queries=max(segment.length for segment in self.each),
            most_keys=max(segment.depth + segment.length for segment in self.each),
        )


@dataclass(frozen=True)
class Joined:
    """Indices for one attention over `path segment | path segment | ...`.

    Attributes:
        keys: which token each key is; those on a path occur again.
        firsts: where each token of the stream occurs in `keys` in its own segment.
        query_ends, key_ends: where the segments end, with a 0 before them.
        again: where tokens occur on a path, for the first time, the second, ...; each once in each.
        most_queries, most_keys: the most that a segment has.
    """

    keys: Int[Tensor, " keys"]
    firsts: Int[Tensor, " tokens"]
    query_ends: Int[Tensor, " segments"]
    key_ends: Int[Tensor, " segments"]
    again: tuple[Int[Tensor, " _"], ...]
    most_queries: int
    most_keys: int


@torch.compiler.disable  # segments change with every stream, so it would recompile each time
def attention_along_paths(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dpo_segments: Segments,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of every pair in the stream: (1, tokens, heads, head width), and no weights."""
    dpo_segments.num_calls += 1
    dpo_segments.not_honoured |= {
        name for name, given in others.items() if given is not None and name not in _KNOWN
    }
    window, width = sliding_window or None, value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and (query.shape[-1] % 8 or width % 8):
        # No fused CUDA kernel takes such a width, and padding with zeros changes no score.
        query, key, value = (F.pad(s, (0, -s.shape[-1] % 8)) for s in (query, key, value))
    if dropout == 0 and serves_varlen(query, value):
        out = _in_one_call(query, key, value, dpo_segments, scale, window)
    else:
        out = _by_segment(query, key, value, dpo_segments, scale, window, dropout)
    return out[..., :width], None


def serves_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attn` has a kernel for these: in torch 2.11 to 2.13, flash attention's."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= _VARLEN_WIDTH
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _in_one_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
) -> Float[Tensor, "1 tokens heads width"]:
    joined = segments.joined
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    # The result is laid out like q: what is kept of it for the backward then serves the next layer.
    q = q.contiguous()
    k, v = (_Repeat.apply(states, joined.keys, joined.firsts, *joined.again) for states in (k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not takes_grouped_heads(q.device):
        k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        joined.query_ends,
        joined.key_ends,
        joined.most_queries,
        joined.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # causal, from the bottom right
        **({"enable_gqa": groups > 1} if _VARLEN_GROUPS else {}),  # type: ignore[arg-type]
    )
    return out[None]  # type: ignore[index]


@cache
def takes_grouped_heads(device: torch.device) -> bool:
    """Whether `varlen_attn` takes fewer heads of keys and values than of queries.

    Since torch 2.12 its signature says so. Before, its kernel may take them without saying so: a
    trial compares values and gradients with those of repeated heads.
    """
    if _VARLEN_GROUPS:
        return True
    ends = torch.tensor([0, 24, 40], dtype=torch.int32, device=device)
    weights = torch.linspace(-1, 1, 40 * 4 * 64, device=device).view(40, 4, 64)
    inputs = [weights[:, :heads].cos().bfloat16().requires_grad_() for heads in (4, 2, 2)]
    results = []
    with torch.enable_grad():
        for groups in (1, 2):
            q, *others = inputs
            k, v = (states.repeat_interleave(groups, dim=1) for states in others)
            try:
                out = varlen_attn(q, k, v, ends, ends, 24, 24, window_size=(-1, 0))
                grads = torch.autograd.grad((out * weights).sum(), inputs)  # type: ignore[operator]
            except RuntimeError:
                return False
            results.append([out, *grads])
    return all(
        (grouped - repeated).abs().max() <= 0.02 * repeated.abs().max()
        for grouped, repeated in zip(*results, strict=True)
    )


class _Repeat(torch.autograd.Function):
    """Rows by index, some again. The gradient of index_select would be summed in any order."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, keys: Tensor, firsts: Tensor, *again: Tensor) -> Tensor:
        ctx.save_for_backward(keys, firsts, *again)
        return states.index_select(0, keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        keys, firsts, *again = ctx.saved_tensors
        grad_states = grad.index_select(0, firsts)
        for places in again:  # each row once: whatever the order, these sums are the same
            grad_states.index_add_(0, keys[places], grad.index_select(0, places))
        return grad_states, None, None, *[None] * len(again)


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
    dropout: float,
) -> Float[Tensor, "1 tokens heads width"]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_queries, num_keys = q.shape[2], k.shape[2]
        narrow = window if window and window < num_keys else None
        plain = num_queries == num_keys and narrow is None
        mask = None if plain else segments.mask(num_queries, num_keys, narrow)
        groups = q.shape[1] // k.shape[1]
        # Of the fused CUDA kernels only flash attention takes grouped heads: in half precision, on
        # a recent GPU, and without a mask. Any other call would keep (heads, n, n) scores.
        if q.is_cuda and not (mask is None and serves_varlen(q, v)):
            k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
            groups = 1
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=plain,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=groups > 1,
        )

    # Split once: the gradient of a slice would be as large as the tensor that it was cut from.
    lengths = [segment.length for segment in segments.each]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs = []
    for number, segment in enumerate(segments.each):
        if not segment.length:
            continue
        k, v = (
            torch.cat([*(_first(parts[i], n) for i, n in segment.path), parts[number]], dim=2)
            if segment.path
            else parts[number]
            for parts in (keys, values)
        )
        # A mask costs what it hides as well, so a long segment has it a piece at a time.
        seen = segment.depth
        for piece in queries[number].split(_MASKED_QUERIES if segment.path else segment.length, 2):
            seen += piece.shape[2]
            outputs.append(attend(piece, _first(k, seen), _first(v, seen)))
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


def _first(states: Tensor, length: int) -> Tensor:
    """The first of them; all of them without a slice, whose gradient would be another copy."""
    return states if length == states.shape[2] else states[:, :, :length]


AttentionInterface.register(NAME, attention_along_paths)


def use_attention_along_paths(backbone: PreTrainedModel) -> None:
    """Makes every module of the backbone use it for calls that carry segments, and for no others.

    Hooks rather than one switch around the forward: under gradient checkpointing a layer runs again
    in the backward, long after the forward has returned, and must then attend as it did before.
    Generation carries none and keeps the model's own attention, which handles padding.
    """
    for module in backbone.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            enter, leave = _switch(config, config._attn_implementation)
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, with_kwargs=True, always_call=True)


def _switch(
    config: PreTrainedConfig, own: str | None
) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get(KEYWORD) is not None:
            config._attn_implementation = NAME

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get(KEYWORD) is not None:
            config._attn_implementation = own

    return enter, leave
