"""The losses: the log-probs of pairs in, one loss per pair out.

Axes: `pairs`. Units: nats for log-probs, tokens for lengths. A loss never reduces over pairs: the
caller sums them and divides once by the number of pairs in the whole step (`train.step`).
The entries of `LOSSES` are called as `LOSSES[type](logps, beta=beta, **its_own_options)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """What every loss reads: log-probs of both answers under the policy and the reference.

    `*_logps`: (pairs,) nats, summed over the scored tokens of the answer, its turn-end included.
    `*_lengths`: (pairs,) how many tokens were scored.
    """

    policy_chosen_logps: Float[Tensor, " pairs"]
    policy_rejected_logps: Float[Tensor, " pairs"]
    ref_chosen_logps: Float[Tensor, " pairs"]
    ref_rejected_logps: Float[Tensor, " pairs"]
    chosen_lengths: Real[Tensor, " pairs"]
    rejected_lengths: Real[Tensor, " pairs"]

    @property
    def chosen_logratios(self) -> Float[Tensor, " pairs"]:
        """Log pi(y_w|x) - log pi_ref(y_w|x), nats."""
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Float[Tensor, " pairs"]:
        """Log pi(y_l|x) - log pi_ref(y_l|x), nats."""
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def logratio_gap(self) -> Float[Tensor, " pairs"]:
        """The h of the papers: chosen minus rejected log-ratio, nats."""
        return self.chosen_logratios - self.rejected_logratios


def sigmoid(
    logps: PairLogps, *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " pairs"]:
    """DPO: the negative log-likelihood of the preference under Bradley-Terry.

    loss = -(1 - label_smoothing) log sigmoid(beta gap) - label_smoothing log sigmoid(-beta gap)

    with the paper's h = gap = log [pi(y_w|x) / pi_ref(y_w|x)] - log [pi(y_l|x) / pi_ref(y_l|x)].
    `label_smoothing` in [0, 0.5) is the probability that a label is flipped (conservative DPO).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; the smoothing: Mitchell 2023, "A note on
    DPO with noisy preferences & relationship to IPO".
    """
    z = beta * logps.logratio_gap
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def ipo(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """IPO: regress the gap onto a fixed margin instead of pushing it without bound.

    loss = (avg_gap - 1 / (2 beta))^2

    with the paper's tau = beta and h = avg_gap, here of *per-token mean* log-ratios, as in the
    authors' own runs: with sums, a long answer overshoots the margin before it has learnt anything.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    avg_gap = (
        logps.chosen_logratios / logps.chosen_lengths
        - logps.rejected_logratios / logps.rejected_lengths
    )
    return (avg_gap - 1 / (2 * beta)) ** 2


def hinge(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """SLiC's hinge on the implicit rewards: no gradient once the margin reaches 1.

    loss = max(0, 1 - beta gap)

    Source: Zhao et al. 2023, arXiv:2305.10425, with the log-probs taken relative to the reference
    and scaled by beta (the paper's gamma): "hinge-norm" of Liu et al. 2023, arXiv:2309.06657.
    """
    return F.relu(1 - beta * logps.logratio_gap)


def implicit_rewards(
    logps: PairLogps, *, beta: float
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Rewards of the chosen and of the rejected answers, (pairs,) each, without gradient.

    reward = beta log [pi(y|x) / pi_ref(y|x)]; the term left out, beta log Z(x), is the same for
    both answers of a pair. Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5.
    """
    return beta * logps.chosen_logratios.detach(), beta * logps.rejected_logratios.detach()


LOSSES: dict[str, Callable[..., Float[Tensor, " pairs"]]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
}
