"""Which pairs each step sees, and how a step is cut into micro-batches.

The order is a pure function of (seed, epoch, step). It needs no sampler, iterator or global random
state, so a resumed run has nothing to replay.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from dpo.config import TrainConfig
from dpo.data.openings import LEAST_SHARED, common_prefix


@dataclass(frozen=True)
class Order:
    """The pairs of every optimizer step of a run, over any number of epochs.

    Every epoch is a new permutation; its last step is smaller when the pairs do not divide evenly.

    Attributes:
        num_pairs: pairs in an epoch.
        pairs_per_step: pairs in a step, on all ranks together.
        num_steps: optimizer steps in the run.
        seed: what the permutations are drawn from.
    """

    num_pairs: int
    pairs_per_step: int
    num_steps: int
    seed: int

    @classmethod
    def of(cls, train: TrainConfig, num_pairs: int, num_ranks: int) -> "Order":
        """The order that a configuration asks for."""
        pairs_per_step = (
            train.per_device_train_batch_size * train.gradient_accumulation_steps * num_ranks
        )
        num_steps = train.num_steps(math.ceil(num_pairs / pairs_per_step))
        return cls(num_pairs, pairs_per_step, num_steps, train.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.num_pairs / self.pairs_per_step)

    def indices(self, step: int) -> list[int]:
        """The pairs that step `step`, counted from 1, sees on all ranks together."""
        epoch, step_of_epoch = divmod(step - 1, self.steps_per_epoch)
        order = _epoch_order(self.num_pairs, self.seed, epoch)
        return order[step_of_epoch * self.pairs_per_step :][: self.pairs_per_step].tolist()

    def ends_epoch(self, step: int) -> bool:
        """Whether the step is the last of an epoch: in the next one, pairs go to other ranks."""
        return step % self.steps_per_epoch == 0

    def seen(self) -> Int[np.ndarray, " pairs"]:
        """All pairs that the run sees, ascending."""
        if self.num_steps >= self.steps_per_epoch:
            return np.arange(self.num_pairs)
        first_epoch = _epoch_order(self.num_pairs, self.seed, 0)
        return np.sort(first_epoch[: self.num_steps * self.pairs_per_step])


@lru_cache(maxsize=2)
def _epoch_order(num_pairs: int, seed: int, epoch: int) -> Int[np.ndarray, " pairs"]:
    order = np.random.default_rng((seed, epoch)).permutation(np.arange(num_pairs, dtype=np.int32))
    order.flags.writeable = False  # every step of the epoch reads this one array
    return order


def is_due(step: int, every: int) -> bool:
    """Whether something done once in `every` steps (0: never) is due at this step."""
    return every > 0 and step % every == 0


def micro_batches(
    num_tokens: Sequence[int], budget: int, prompts: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Splits pairs into few bins of at most `budget` tokens each; a longer pair is a bin by itself.

    With `prompts`, pairs whose prompts open alike meet in one bin, where the opening counts once.
    The bins are a function of the ids alone.

    Returns positions, in bins of nearly equal size; [[]] for no pairs, since a rank without pairs
    still takes part in the step.
    """
    runs, sizes = [[i] for i in range(len(num_tokens))], [*num_tokens]
    if prompts:
        runs, sizes = _runs(num_tokens, budget, prompts)
    at_least = math.ceil(sum(min(n, budget) for n in sizes) / budget)
    no_two_share = sum(2 * n > budget for n in sizes)
    num_bins = max(1, at_least, no_two_share)
    while True:
        bins = balance(sizes, num_bins)
        if all(len(b) <= 1 or sum(sizes[i] for i in b) <= budget for b in bins):
            return [[p for run in b for p in runs[run]] for b in bins if b] or [[]]
        num_bins += 1 + num_bins // 20  # one by one would take minutes for thousands of pairs


def _runs(
    num_tokens: Sequence[int], budget: int, prompts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[int]]:
    """Pairs that open alike, by their ids, cut where the budget ends; and tokens of each run.

    At most so many are computed: answers may have openings in common as well. Runs are in the order
    of their first pairs, and a pair that opens like no other is a run of its own.
    """
    alike: dict[Sequence[int], list[int]] = {}
    for position, prompt in enumerate(prompts):
        opening = tuple(prompt[:LEAST_SHARED])
        is_long = len(opening) == LEAST_SHARED
        alike.setdefault(opening if is_long else (-1, position), []).append(position)
    runs: list[list[int]] = []
    sizes: list[int] = []
    for positions in alike.values():
        before = None
        for position in sorted(positions, key=lambda p: list(prompts[p])):
            size = num_tokens[position]
            shared = 0 if before is None else common_prefix(prompts[before], prompts[position])
            if before is None or sizes[-1] + size - shared > budget:
                runs.append([])
                sizes.append(shared := 0)
            runs[-1].append(position)
            sizes[-1] += size - shared
            before = position
    return runs, sizes


def balance(num_tokens: Sequence[int], num_bins: int) -> list[list[int]]:
    """Positions in `num_bins` bins of nearly equal numbers of tokens.

    Longest first, each into the emptiest bin: the fullest comes out at most 4/3 of the best
    possible (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, b) for b in range(num_bins)]  # a heap of (tokens, bin)
    for i in sorted(range(len(num_tokens)), key=lambda i: -num_tokens[i]):
        tokens, b = emptiest[0]
        bins[b].append(i)
        heapq.heapreplace(emptiest, (tokens + num_tokens[i], b))
    return bins


def spread(total: int, wanted: int) -> np.ndarray:
    """`wanted` positions spread evenly over all, since files are often sorted by source."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(int))
