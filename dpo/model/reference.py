"""References: Stream -> token log-probs of what the policy was at step 0, or some steps ago.

A live reference (`AdapterOff`, `Frozen`, `Zero`) runs the same code path as the policy, on the same
micro-batches, without gradients. So before the first update it agrees with the policy to the last
bit, and the loss is exactly ln 2. `Reference` wraps one of them and, if it has a cache, calls it
only for pairs that the cache lacks.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from dpo.data.files import cache_folder
from dpo.data.stream import Stream, TokenizedPair, build_stream, to_device
from dpo.errors import UserError
from dpo.model.load import REFERENCE_ADAPTER, REFERENCE_IN_NAME, Policy
from dpo.model.logp_cache import LogpCache
from dpo.model.scorer import Also, Scorer

TokenLogps = Callable[..., Any]
"""(stream) -> token log-probs; (stream, also) -> them and what is asked for, see `Scorer`."""


class AdapterOff:
    """The policy's own base, its adapter switched off or set back to the one that it started from.

    Costs no memory. `scorer` may be wrapped (DDP): the pass goes through it as the policy's does.
    """

    def __init__(self, scorer: nn.Module, policy: Policy):
        self._scorer, self._policy = scorer, policy

    def __call__(self, stream: Stream, *also: Also) -> Any:
        """Token log-probs, (scored,) nats; with what is asked for, as `Scorer.forward` gives it."""
        with torch.no_grad(), adapter_off(self._policy):
            return self._scorer(stream, *also)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The adapter of its own, by name; {} where it has none."""
        named = self._policy.model.named_parameters()
        return {name: weight for name, weight in named if REFERENCE_IN_NAME.search(name)}


class Frozen:
    """A second model: a copy of a policy that trains every weight, or its weights loaded again."""

    def __init__(self, model: nn.Module, layout: Literal["shared", "padded"]):
        self.model = model.requires_grad_(False)
        self.scorer = Scorer(self.model, attention=layout)

    def __call__(self, stream: Stream, *also: Also) -> Any:
        """Token log-probs, (scored,) nats; with what is asked for, as `Scorer.forward` gives it."""
        with torch.no_grad():
            return self.scorer(stream, *also)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All of its weights, by name."""
        return dict(self.model.named_parameters())


class Zero:
    """No reference: log-prob 0 for every token, which leaves the policy's log-probs as rewards."""

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Zeros, (scored,)."""
        return torch.zeros(len(stream.targets), device=stream.targets.device)


class Absent:
    """Takes the place of a frozen copy when the cache holds all that will be asked for."""

    def __call__(self, stream: Stream) -> Float[Tensor, " scored"]:
        """Never returns.

        Raises:
            RuntimeError: the cache did not hold it after all.
        """
        raise RuntimeError(
            "the reference's cache held every pair when the run began, so no copy of the model was "
            "made; now a pair is not there: the cache was deleted or damaged meanwhile. Start "
            "again; train.resume auto goes on from the last checkpoint."
        )


class Reference:
    """What the policy is compared with; it keeps what it computes, if there is a cache.

    A call does not wait for the device: what is found is sent there, and what is computed is
    fetched by `settle`, which `train.step` calls once a step.

    Args:
        mode: `adapter`, `frozen` or `zero`.
        live: computes the log-probs that are not in the cache.
        store: the cache, if there is one.

    Attributes:
        num_found, num_computed: pairs so far, if there is a cache.
        share_known: the share of the last call's pairs for which nothing was computed.
    """

    def __init__(self, mode: str, live: TokenLogps, store: LogpCache | None = None):
        self.mode, self.live, self.store = mode, live, store
        self.num_found = self.num_computed = 0
        self.share_known = float(mode == "zero")
        self._unsettled: list[tuple[list[TokenizedPair], Tensor]] = []

    def __call__(self, stream: Stream, *also: Also) -> Any:
        """Token log-probs, (scored,) nats; one pass of the live reference computes missing ones.

        Only log-probs come from a cache: whoever asks for more has none.
        """
        if self.store is None:
            return self.live(stream, *also)
        device = stream.input_ids.device
        known = [self.store.get(pair) for pair in stream.pairs]
        found = [logps for logps in known if logps is not None]
        missing = [pair for pair, logps in zip(stream.pairs, known, strict=True) if logps is None]
        self.num_found += len(found)
        self.num_computed += len(missing)
        self.share_known = len(found) / max(1, len(known))
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

    @torch.no_grad()
    def follow(self, policy: Policy, share: float) -> None:
        """Moves its weights so large a share of the way to the policy's: TR-DPO.

        Source: Gorbatovski et al. 2024, arXiv:2404.09656, eqs. 2 (soft) and 3 (hard, share 1).
        """
        theirs = dict(policy.model.named_parameters())
        for name, weight in self._own_weights.items():
            weight.lerp_(theirs[REFERENCE_IN_NAME.sub(".default", name)].to(weight), share)

    @property
    def state(self) -> dict[str, Tensor]:
        """The weights of a reference that moves, for a checkpoint."""
        return {name: weight.detach() for name, weight in self._own_weights.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from saved weights.

        Raises:
            ValueError: they are another model's.
        """
        own = self._own_weights
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("the weights of the reference are those of another model")
        for name, weight in own.items():
            weight.copy_(state[name])

    @property
    def _own_weights(self) -> dict[str, nn.Parameter]:
        assert isinstance(self.live, AdapterOff | Frozen)
        return self.live.weights

    @property
    def is_absent(self) -> bool:
        """Whether there is no live reference, because the cache holds all that is asked for."""
        return isinstance(self.live, Absent)

    def peek(self, stream: Stream, *also: Also) -> Any:
        """As a call, without keeping what was computed for it.

        Only what training's own micro-batches compute is kept, so that step 1 is exactly ln 2.
        """
        self.settle()
        logps = self(stream, *also)
        self.num_computed -= sum(len(pairs) for pairs, _ in self._unsettled)
        self._unsettled = []
        return logps

    def settle(self) -> None:
        """Puts what was computed since into the cache; waits for the device, once."""
        pairs = [pair for some, _ in self._unsettled for pair in some]
        if self.store is None or not pairs:
            return
        logps = torch.cat([computed for _, computed in self._unsettled]).cpu().numpy()
        ends = np.cumsum([pair.num_scored_tokens for pair in pairs])
        for pair, own in zip(pairs, np.split(logps, ends[:-1]), strict=True):
            self.store.put(pair, own)
        self._unsettled = []

    def flush(self) -> None:
        """Writes everything computed so far to disk."""
        self.settle()
        if self.store:
            self.store.flush()

    def share(self, accelerator: Accelerator) -> None:
        """Lets every rank find what any rank has computed; every rank must call."""
        if self.store:
            self.flush()
            accelerator.wait_for_everyone()
            self.store.refresh()

    def summary(self) -> str:
        """How much the cache saved, in words; "" without one."""
        if self.store is None:
            return ""
        damaged = f", {self.store.num_damaged} damaged" if self.store.num_damaged else ""
        problem = f" {self.store.problem}." if self.store.problem else ""
        return (
            f"The reference: {self.num_computed} pairs computed, {self.num_found} found{damaged} "
            f"in {self.store.folder}.{problem}"
        )


@contextmanager
def adapter_off(policy: Policy) -> Iterator[None]:
    """Inside, the model is what it was before training, for the reference and for generation."""
    model = policy.model
    if policy.has_reference_adapter:
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
    """The cache that `reference.cache` means, for the reference with that digest.

    `auto` is a folder beside the tokenised pairs.

    Raises:
        UserError: the folder cannot be written to.
    """
    parent = cache_folder("dpo_reference") if setting == "auto" else Path(setting)
    folder = parent / digest[:32]
    try:
        return LogpCache(folder)
    except OSError as error:
        raise UserError(
            f"reference.cache: got {setting}, but {folder} cannot be written to ({error}). Name "
            "another folder, or set it to off."
        ) from None


def build_reference(
    mode: str,
    policy: Policy,
    scorer: nn.Module,
    layout: Literal["shared", "padded"],
    *,
    store: LogpCache | None = None,
    asked_for: Iterable[TokenizedPair] | None = None,
    will_train: bool = True,
) -> Reference:
    """The reference of that mode, before the first update.

    Args:
        mode: `adapter`, `frozen` or `zero`, as `choose_mode` gives it.
        policy: the reference is a copy of it, or is the policy itself with its adapter off.
        scorer: the policy's, as Accelerate wrapped it.
        layout: the scorer's.
        store: the cache, if there is one.
        asked_for: all pairs that the reference will be asked for; None where that is not known. A
            frozen copy is not made if the cache holds them all.
        will_train: if not, a frozen reference is the policy itself and not a copy.
    """
    if mode == "zero":
        return Reference(mode, Zero())
    if mode == "adapter":
        return Reference(mode, AdapterOff(scorer, policy), store)
    if store and asked_for is not None and all(pair in store for pair in asked_for):
        return Reference(mode, Absent(), store)
    model = copy.deepcopy(policy.model) if will_train else policy.model
    return Reference(mode, Frozen(model, layout), store)
