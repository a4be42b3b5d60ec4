"""What a step costs, in FLOPs, from the shapes of a model alone: for throughput, plans and tests.

A product of (m, k) and (k, n) is 2 m k n FLOPs; nothing else is counted, being a few per cent of
the time at most. These are the FLOPs that the method needs, not those that a kernel happens to do:
a causal attention counts for the half that is visible. It works on a real model, on one without
numbers (meta or fake tensors) and on a quantised one, which multiplies in its compute type.

Left out on purpose: the scan of recurrent layers, DoRA's norms, the update that PEFT forms for all
stacked experts in every pass, what a sliding window narrower than a pair saves, and that a frozen
model needs no gradient to its embeddings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from dpo.data.stream import Segment
from dpo.model.load import REFERENCE_ADAPTER, is_adapted, without_peft

FLASH_BACKWARD = 2.5  # of the forward: 5 products for 2 (Dao 2023, arXiv:2307.08691, section 3.1)


class Work(NamedTuple):
    """The work of one or more forwards.

    Attributes:
        tokens: those that pass through the decoder.
        scores: query-key pairs that are visible to each head.
        scored: targets of the LM head.
    """

    tokens: int
    scores: float
    scored: int


def work(
    segments: Sequence[Segment],
    num_scored: int,
    layout: Literal["shared", "padded"] = "shared",
) -> Work:
    """The work of one micro-batch: `work(stream.segments, len(stream.targets))`.

    A causal run of n tokens has n^2 / 2 scores, and each of them sees its whole path. In padded
    rows every sequence brings its path, and all rows are as long as the longest.
    """
    if layout == "padded":
        longest = max((s.depth + s.length for s in segments), default=0)
        return Work(len(segments) * longest, len(segments) * longest**2 / 2, num_scored)
    scores = sum(s.length**2 / 2 + s.length * s.depth for s in segments)
    return Work(sum(s.length for s in segments), scores, num_scored)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by part, of one or more forwards and backwards.

    Attributes:
        forward, backward: the policy's decoder and adapter.
        recomputed: what gradient checkpointing runs again.
        head: the policy's, forward and backward.
        reference: its forward, with its head.
    """

    forward: float
    backward: float
    recomputed: float
    head: float
    reference: float

    @property
    def total(self) -> float:
        """All that the device has to do."""
        return self.useful + self.recomputed

    @property
    def useful(self) -> float:
        """All but what is recomputed: the FLOPs that utilisation (MFU) counts."""
        return self.forward + self.backward + self.head + self.reference


@dataclass(frozen=True, kw_only=True)
class Costs:
    """FLOPs of one forward, by what they grow with, and which weights train.

    Attributes:
        linear: the base's linear layers, per token; only those experts that a token is sent to.
        adapter: LoRA's two products, per token.
        attention: all layers, per score.
        head: the LM head, per scored token.
        trains_base: all weights train, and the head with them.
        checkpointed: share of the layers whose forward runs again in the backward, 0 to 1.
        not_recomputed: these layers' last products, per token, if recomputation leaves them out.
        adapter_in_reference: the reference is an adapter too, not the bare base.
    """

    linear: float
    adapter: float
    attention: float
    head: float
    trains_base: bool
    checkpointed: float = 0.0
    not_recomputed: float = 0.0
    adapter_in_reference: bool = False

    def flops(self, work: Work, *, live_reference: bool = True) -> Flops:
        """FLOPs of policy forward, backward and (unless it is cached or zero) reference forward."""
        tokens, scores, scored = work
        base = self.linear * tokens
        adapter = self.adapter * tokens
        attention = self.attention * scores
        forward = base + adapter + attention
        # A frozen matrix needs the gradient of its input, a trained one its own as well.
        backward = base * (2 if self.trains_base else 1) + 2 * adapter + FLASH_BACKWARD * attention
        recomputed = self.checkpointed * forward - self.not_recomputed * tokens
        # dpo.logps. Frozen: logits, J = d logp / d hidden. Trained: logits twice, two gradients.
        head = self.head * scored * (4 if self.trains_base else 2)
        reference = base + attention + self.head * scored + adapter * self.adapter_in_reference
        return Flops(
            forward=forward,
            backward=backward,
            recomputed=recomputed,
            head=head,
            reference=reference if live_reference else 0.0,
        )


def costs(model: nn.Module) -> Costs:
    """The costs of a causal LM, or of a PEFT model around one, as its weights are set to train."""
    has_adapter, causal_lm = is_adapted(model), without_peft(model)
    config = causal_lm.config.get_text_config()
    head = causal_lm.get_output_embeddings()
    layers = [m for m in causal_lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    checkpointed = [layer for layer in layers if layer.gradient_checkpointing]
    linear = adapter = 0.0
    for name, module in causal_lm.named_modules():
        if module is head:
            continue
        flops = 2 * _weights_per_token(name, module, config)
        if "lora_" not in name:
            linear += flops
        elif name.endswith(".default"):  # not the reference's copy of it
            adapter += flops
    return Costs(
        linear=linear,
        adapter=adapter,
        attention=2.0 * _attention_width(config) * _attention_layers(config),
        head=2.0 * head.weight.numel(),  # type: ignore[union-attr,operator]
        trains_base=not has_adapter,
        checkpointed=len(checkpointed) / max(1, len(layers)),
        # Recomputation stops once every saved input is back. The output of a layer's last product
        # is not one of them, unless LoRA follows.
        not_recomputed=0.0 if has_adapter else sum(map(_last_linear, checkpointed), 0.0),
        adapter_in_reference=has_adapter and REFERENCE_ADAPTER in model.peft_config,  # type: ignore[operator]
    )


def _weights_per_token(name: str, module: nn.Module, config: PreTrainedConfig) -> float:
    """How many weights of this module itself a token is multiplied with."""
    share = 1.0
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts and re.search(r"\bexperts\b", name):
        share = config.num_experts_per_tok / experts
    if isinstance(module, nn.Linear):  # by the layer's shape: a quantised weight has another
        return share * module.in_features * module.out_features
    if isinstance(module, Conv1D):
        return share * module.weight.numel()
    stacked = (p for p in module.parameters(recurse=False) if p.ndim == 3)  # (experts, out, in)
    return share * sum(p.numel() for p in stacked) if share < 1 else 0.0


def _last_linear(layer: nn.Module) -> float:
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    return 2.0 * linears[-1].weight.numel() if linears else 0.0


def _attention_width(config: PreTrainedConfig) -> int:
    """Columns of all heads: of the query (its product with the key) and of the value."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = getattr(config, "qk_head_dim", None) or width  # DeepSeek: keys wider than values
    value = getattr(config, "v_head_dim", None) or width
    return config.num_attention_heads * (query + value)


def _attention_layers(config: PreTrainedConfig) -> int:
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return sum(kind.endswith("attention") and kind != "linear_attention" for kind in types)
