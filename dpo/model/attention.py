"""The two-segment attention: how a pair shares its prompt, for any Hugging Face decoder.

A pair lies in the stream as `[shared | chosen | rejected]`. The chosen answer attends to the shared
part and itself: one plain causal segment. The rejected answer attends to the shared part and
itself too, and never to the chosen one: its keys are `[shared | rejected]`, causal from the bottom
right. Nothing attends across pairs.

It is registered through transformers' `AttentionInterface`; no model is patched. The stock
attentions cannot serve: they read the restarted positions of `rejected` as a new document and
would hide the prompt from it. One call of scaled_dot_product_attention per segment here.

Axes of query, key and value: (1, heads, tokens, head width).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from dpo.data.stream import Segment

NAME = "dpo_two_segment"
KEYWORD = "dpo_layout"  # how the layout travels: model(..., dpo_layout=...) -> layer -> attention
# What a call may carry that has no effect in training; anything else, unless None, is not honoured.
_KNOWN = {"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position"}


class Layout:
    """The segments of one stream, with the masks that its layers share, and a record of its calls.

    The record is for `Scorer`'s probe: which attention modules were reached, and which asked for
    something that this attention does not do.
    """

    def __init__(self, segments: tuple[Segment, ...]):
        self.segments = segments
        self.num_calls = 0
        self.not_honoured: set[str] = set()
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(
        self, queries: int, keys: int, window: int | None, device: torch.device
    ) -> Bool[Tensor, "queries keys"]:
        """True where a query may look: bottom-right causal, at most `window` tokens back."""
        at = (queries, keys, window)
        if at not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
            mask = ones.tril(keys - queries)
            self._masks[at] = mask if window is None else mask.triu(keys - queries - window + 1)
        return self._masks[at]


def two_segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dpo_layout: Layout,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of every pair in the stream: (1, tokens, heads, head width), and no weights."""
    dpo_layout.num_calls += 1
    dpo_layout.not_honoured |= {
        name for name, given in others.items() if given is not None and name not in _KNOWN
    }

    def attend(queries: slice, *keys: slice) -> Tensor:
        q, k, v = query[:, :, queries], _join(key, keys), _join(value, keys)
        num_queries, num_keys = q.shape[2], k.shape[2]
        window = sliding_window if sliding_window and sliding_window < num_keys else None
        plain = num_queries == num_keys and window is None
        mask = None if plain else dpo_layout.mask(num_queries, num_keys, window, q.device)
        groups = q.shape[1] // k.shape[1]
        if mask is not None and q.is_cuda:  # no fused CUDA kernel takes a mask and grouped heads
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

    outputs = []
    for segment in dpo_layout.segments:
        shared = slice(segment.start, segment.start + segment.shared)
        chosen = slice(segment.start, shared.stop + segment.chosen)
        rejected = slice(chosen.stop, segment.end)
        outputs.append(attend(chosen, chosen))
        if segment.rejected:
            outputs.append(attend(rejected, shared, rejected))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _join(states: Tensor, parts: Sequence[slice]) -> Tensor:
    """The given tokens in a row; one part stays a view."""
    views = [states[:, :, part] for part in parts]
    return views[0] if len(views) == 1 else torch.cat(views, dim=2)


AttentionInterface.register(NAME, two_segment_attention)


def use_two_segment_attention(backbone: PreTrainedModel) -> None:
    """Makes every module of the backbone use it for calls that carry a layout, and only for those.

    Hooks rather than one switch around the forward: under gradient checkpointing a layer runs again
    in the backward, long after the forward has returned, and must then attend as it did before.
    Generation carries no layout and keeps the model's own attention, which minds padding.
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
