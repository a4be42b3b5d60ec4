"""References: Stream -> token log-probs of what the policy was at step 0.

All of them run the same code path as the policy, on the same micro-batches, without gradients. So
before the first update they agree with it to the last bit, and the loss is exactly ln 2. `Cached`
stands before one of them and asks it only for pairs that nobody asked it for before.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import datasets.config
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo.data.stream import Stream, TokenizedPair, build_stream, to_device
from dpo.errors import UserError
from dpo.model.load import REFERENCE_ADAPTER, Policy
from dpo.model.logp_cache import LogpCache
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
        self.scorer = Scorer(self.model, attention=layout)

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Token log-probs, (scored,) nats."""
        with torch.no_grad():
            return self.scorer(stream)


class Zero:
    """No reference: log-prob 0 for every token, which leaves the policy's log-probs as rewards."""

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Zeros, (scored,)."""
        return torch.zeros(len(stream.targets), device=stream.targets.device)


class Absent:
    """Stands where a frozen copy would, when the cache holds all that will be asked for."""

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Nothing.

        Raises:
            RuntimeError: the cache did not hold it after all.
        """
        raise RuntimeError(
            "the reference's cache held every pair when the run began, so no copy of the model was "
            "made; now a pair is not there: the cache was deleted or damaged meanwhile. Start "
            "again; train.resume auto goes on from the last checkpoint."
        )


class Cached:
    """A reference that keeps what it computes, and computes only what is not kept yet.

    Neither needs the device to be waited for: what is found is sent there, and what is computed is
    fetched by `settle`, which the trainer calls once a step.

    Attributes:
        live: the reference behind it.
        store: where log-probs are kept.
        num_found, num_computed: pairs so far.
        last_found_share: of the pairs of the last call.
    """

    def __init__(self, live: Reference, store: LogpCache):
        self.live, self.store = live, store
        self.num_found = self.num_computed = 0
        self.last_found_share = 0.0
        self._unsettled: list[tuple[list[TokenizedPair], Tensor]] = []

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Token log-probs, (scored,) nats; those not kept yet in one pass of the live reference."""
        device = stream.input_ids.device
        known = [self.store.get(pair) for pair in stream.pairs]
        found = [logps for logps in known if logps is not None]
        missing = [pair for pair, logps in zip(stream.pairs, known, strict=True) if logps is None]
        self.num_found += len(found)
        self.num_computed += len(missing)
        self.last_found_share = len(found) / max(1, len(known))
        if not found:
            computed = self.live(stream)
            self._unsettled.append((missing, computed))
            return computed
        kept = to_device(torch.from_numpy(np.concatenate(found)), device)
        if not missing:
            return kept
        computed = self.live(build_stream(missing).to(device))
        self._unsettled.append((missing, computed))
        parts_computed = iter(computed.split([pair.num_scored_tokens for pair in missing]))
        parts_kept = iter(kept.split([len(logps) for logps in found]))
        return torch.cat([next(parts_computed if p is None else parts_kept) for p in known])

    def settle(self) -> None:
        """Puts what was computed since into the cache; waits for the device, once."""
        pairs = [pair for some, _ in self._unsettled for pair in some]
        if not pairs:
            return
        logps = torch.cat([computed for _, computed in self._unsettled]).cpu().numpy()
        ends = np.cumsum([pair.num_scored_tokens for pair in pairs])
        for pair, own in zip(pairs, np.split(logps, ends[:-1]), strict=True):
            self.store.put(pair, own)
        self._unsettled = []

    def forget_unsettled(self) -> None:
        """As if the calls since the last `settle` had not been."""
        self.num_computed -= sum(len(pairs) for pairs, _ in self._unsettled)
        self._unsettled = []

    def flush(self) -> None:
        """Everything computed so far is on disk."""
        self.settle()
        self.store.flush()

    def summary(self) -> str:
        """What the cache was good for, in words."""
        damaged = f", {self.store.num_damaged} damaged" if self.store.num_damaged else ""
        return (
            f"The reference: {self.num_computed} pairs computed, {self.num_found} found{damaged} "
            f"in {self.store.folder}."
        )


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
    return "adapter" if policy.is_adapted else "frozen"


def open_cache(setting: str, digest: str) -> LogpCache:
    """The cache that `reference.cache` means, of the reference of that digest.

    `auto` is beside the tokenised pairs.

    Raises:
        UserError: it is no folder that can be written to.
    """
    auto = Path(datasets.config.HF_DATASETS_CACHE) / "dpo_reference"
    folder = (auto if setting == "auto" else Path(setting)) / digest[:32]
    try:
        return LogpCache(folder)
    except OSError as error:
        raise UserError(
            f"reference.cache: got {setting}, but {folder} cannot be written to ({error}). Name "
            "another folder, or set it to off."
        ) from None


def build_reference(
    mode: str,
    scorer: nn.Module,
    policy: Policy,
    layout: Literal["shared", "padded"],
    *,
    is_all_cached: bool = False,
) -> Reference:
    """The reference of that mode; before the first update. `scorer` as Accelerate wrapped it.

    Nothing is copied for what a cache holds already.
    """
    if mode == "zero":
        return Zero()
    if mode == "adapter":
        return AdapterOff(scorer, policy)
    return Absent() if is_all_cached else Frozen(copy.deepcopy(policy.model), layout)
