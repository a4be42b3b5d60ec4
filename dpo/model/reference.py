"""References: Stream -> token log-probs of what the policy was at step 0.

All of them run the same code path as the policy, on the same micro-batches, without gradients. So
before the first update they agree with it to the last bit, and the loss is exactly ln 2.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo.data.stream import Stream
from dpo.model.load import REFERENCE_ADAPTER, Policy
from dpo.model.scorer import Scorer

Reference = Callable[[Stream], Float[Tensor, " scored"]]


class AdapterOff:
    """The policy's own base, its adapter switched off, or back to the one it started from.

    Costs no memory. `scorer` may be wrapped (DDP): the pass goes through it as the policy's does.
    """

    def __init__(self, scorer: nn.Module, policy: Policy):
        self._scorer, self._policy = scorer, policy

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Token log-probs, (scored,) nats."""
        with torch.no_grad(), adapter_off(self._policy):
            return self._scorer(stream)


class Frozen:
    """A model of its own: the copy, or another loading, of a policy that trains every weight."""

    def __init__(self, model: nn.Module, layout: Literal["shared", "padded"]):
        self.model = model.requires_grad_(False)
        self._scorer = Scorer(self.model, attention=layout)

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Token log-probs, (scored,) nats."""
        with torch.no_grad():
            return self._scorer(stream)


class Zero:
    """No reference: log-prob 0 for every token, which leaves the policy's log-probs as rewards."""

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Zeros, (scored,)."""
        return torch.zeros(len(stream.targets), device=stream.targets.device)


@contextmanager
def adapter_off(policy: Policy) -> Iterator[None]:
    """Inside, the model is what it was before training: for the reference, and for generation."""
    model = policy.model
    if policy.starts_from_adapter:
        model.set_adapter(REFERENCE_ADAPTER)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_adapter("default")  # type: ignore[operator]
    else:
        with model.disable_adapter():  # type: ignore[operator]
            yield


def choose_mode(mode: str, policy: Policy) -> str:
    """What `reference.mode: auto` means for this policy."""
    if mode != "auto":
        return mode
    return "adapter" if hasattr(policy.model, "peft_config") else "frozen"


def build_reference(
    mode: str, scorer: nn.Module, policy: Policy, layout: Literal["shared", "padded"]
) -> Reference:
    """The reference of that mode; before the first update. `scorer` as Accelerate wrapped it."""
    if mode == "zero":
        return Zero()
    if mode == "adapter":
        return AdapterOff(scorer, policy)
    return Frozen(copy.deepcopy(policy.model), layout)
