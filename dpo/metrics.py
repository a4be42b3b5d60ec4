"""The metrics of pairs, as exact sums: never the last micro-batch's, never a mean of means.

Each micro-batch adds its pairs' values to one vector on the device. The vector is read, and reduced
over ranks, once per logging step; a rank without pairs adds zeros.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dpo.catalogue import PAIR_METRICS
from dpo.losses import PairLogps, implicit_rewards


def pair_metrics(
    logps: PairLogps, losses: Float[Tensor, " pairs"], *, beta: float, per_token: bool = False
) -> Float[Tensor, "metrics pairs"]:
    """One row per name of `PAIR_METRICS`: loss, rewards (beta x nats), log-probs (nats), lengths.

    The rewards are beta x log-ratio whatever the loss; or, `per_token`, beta x the mean log-prob of
    a token, which losses without a reference compare. A pair counts as accurate when its chosen
    reward is strictly larger: a tie, as between policy and reference at step 0, is not. It is
    ranked right when the policy alone gives its chosen answer the higher log-prob.
    """
    chosen, rejected = implicit_rewards(logps, beta=beta, per_token=per_token)
    rows = (
        losses,
        chosen,
        rejected,
        chosen - rejected,
        chosen > rejected,
        logps.policy_chosen_logps > logps.policy_rejected_logps,
        logps.policy_chosen_logps,
        logps.policy_rejected_logps,
        logps.chosen_lengths,
        logps.rejected_lengths,
    )
    return torch.stack([row.detach().to(torch.float64) for row in rows])


class RunningMeans:
    """Means over all pairs seen since the last `pop`, over micro-batches and ranks."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._sums = torch.zeros(len(PAIR_METRICS) + 1, dtype=torch.float64, device=device)

    def add(self, values: Float[Tensor, "metrics pairs"]) -> None:
        """Adds the pairs of one micro-batch; nothing is copied to the host."""
        self._sums[:-1] += values.sum(dim=1)
        self._sums[-1] += values.shape[1]

    def pop(self, all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means by name, {} when no pair was seen; starts again from zero.

        `all_reduce` sums a tensor over ranks; every rank must call.
        """
        *sums, count = self.state(all_reduce)
        self._sums.zero_()
        return {
            name: total / count for name, total in zip(PAIR_METRICS, sums, strict=True) if count
        }

    def state(self, all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[float]:
        """Sums over all ranks, to `load` on one of them after a resume; every rank must call."""
        return all_reduce(self._sums.clone()).tolist()

    def load(self, state: list[float]) -> None:
        """Goes on from saved sums."""
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))
