"""The two models of DPO: the policy, inside the scorer that Accelerate wraps, and its reference."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from dpo.config import Config
from dpo.data.stream import TokenizedPair
from dpo.model.fingerprint import reference_digest
from dpo.model.load import Policy, compile_layers
from dpo.model.reference import Reference, build_reference, choose_mode, open_cache
from dpo.model.scorer import Scorer
from dpo.ranks import on_main


@dataclass(frozen=True)
class Models:
    """The policy and its reference.

    Attributes:
        policy: the model that trains.
        scorer: Stream -> token log-probs of the policy, as Accelerate wrapped it.
        reference: Stream -> token log-probs of what the policy was at step 0.
        layout: how both lay out a stream.
        layout_reason: why it is padded, in words; "" if it is shared or configured.
        is_rounded: both compute in less than fp32, so log-probs depend on the batch.
    """

    policy: Policy
    scorer: nn.Module
    reference: Reference
    layout: Literal["shared", "padded"]
    layout_reason: str
    is_rounded: bool

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.policy.model.parameters() if p.requires_grad]


def build_models(
    policy: Policy,
    config: Config,
    accelerator: Accelerator,
    *,
    asked_for: Iterable[TokenizedPair] | None = None,
    will_train: bool = True,
) -> Models:
    """Both models, before the first update and before a checkpoint is loaded.

    Args:
        policy: as loaded.
        config: of the run.
        accelerator: wraps the scorer of a policy that will train.
        asked_for: all pairs that the reference will be asked for; None where that is not known.
        will_train: if not, a frozen reference is the policy itself and not a copy.

    Raises:
        UserError: the model cannot be scored as configured, or the cache cannot be written.
    """
    scorer = Scorer(policy.model, config.model.attention)
    if config.model.compile:  # after the scorer, whose probe must see the model's own errors
        compile_layers(scorer.causal_lm, accelerator.device)
    wrapped: nn.Module = scorer
    if will_train:
        wrapped = accelerator.prepare(scorer, device_placement=[False])
    mode, store = choose_mode(config.reference_mode, policy), None
    if config.has_cache:
        kind = {"layout": scorer.layout, "device_type": accelerator.device.type}
        digest = on_main(accelerator, lambda: reference_digest(config.model, **kind))
        store = open_cache(config.reference.cache, digest)
    reference = build_reference(
        mode,
        policy,
        wrapped,
        scorer.layout,
        store=store,
        asked_for=asked_for,
        will_train=will_train,
    )
    is_half = torch.finfo(next(scorer.parameters()).dtype).bits < 32
    is_rounded = is_half or config.model.quantization != "none"
    return Models(
        policy, wrapped, reference, scorer.layout, scorer.layout_reason, is_rounded=is_rounded
    )
