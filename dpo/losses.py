"""The losses: the log-probs of pairs in, one loss per pair out.

Axes: `pairs`. Units: nats for log-probs, tokens for lengths. A loss never reduces over pairs: the
caller sums them and divides once by the number of pairs in the whole step (`train.step`).
The entries of `LOSSES` are called as `LOSSES[type](logps, beta=beta, **its_own_options)`.

The papers' symbols, here and in the formulas below:

    c, r    log-ratios of the chosen and the rejected answer, log [pi(y|x) / pi_ref(y|x)]
    gap     c - r, the h of the papers; z = beta gap
    a, b    log-probs of the chosen and the rejected answer under the policy alone
    avg_    a sum over the answer's tokens, divided by their number

    sigma   the logistic function; logistic(x) = -log sigma(x)

Chapters: losses of the gap; losses that hold each answer in place; losses that bend the log-ratios;
losses of per-token means; losses without a reference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


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

    @property
    def avg_logps(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Log pi of the chosen and of the rejected answer, divided by its scored tokens."""
        return (
            self.policy_chosen_logps / self.chosen_lengths,
            self.policy_rejected_logps / self.rejected_lengths,
        )


# ------------------------------------------------------------------------------- losses of the gap


def sigmoid(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """DPO: the negative log-likelihood of the preference under Bradley-Terry.

    loss = -(1 - label_smoothing) log sigmoid(beta gap) - label_smoothing log sigmoid(-beta gap)

    with the paper's h = gap = log [pi(y_w|x) / pi_ref(y_w|x)] - log [pi(y_l|x) / pi_ref(y_l|x)].
    `label_smoothing` in [0, 0.5) is the probability that a label is flipped (conservative DPO).
    With another `divergence` from the reference, gap = score(c) - score(r), see `scores`.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; the smoothing: Mitchell 2023, "A note on
    DPO with noisy preferences & relationship to IPO".
    """
    return _logistic(beta * gap(logps, divergence, divergence_alpha), label_smoothing)


def hinge(
    logps: PairLogps,
    *,
    beta: float,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """SLiC's hinge on the implicit rewards: no gradient once the margin reaches 1.

    loss = max(0, 1 - beta gap)

    Source: Zhao et al. 2023, arXiv:2305.10425, with the log-probs taken relative to the reference
    and scaled by beta (the paper's gamma): "hinge-norm" of Liu et al. 2023, arXiv:2309.06657.
    """
    return F.relu(1 - beta * gap(logps, divergence, divergence_alpha))


def robust(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.1,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """Robust DPO: with labels flipped at the rate `label_smoothing`, unbiased for clean ones.

    loss = logistic(z) - label_smoothing z / (1 - 2 label_smoothing)

    The second term is linear: the loss is unbounded below, may be negative, and its gradient never
    vanishes. That of a good run falls below 0.

    Source: Chowdhury et al. 2024, arXiv:2403.00409; the paper's epsilon is `label_smoothing`.
    """
    z = beta * gap(logps, divergence, divergence_alpha)
    return -F.logsigmoid(z) - label_smoothing / (1 - 2 * label_smoothing) * z


def exo_pair(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """EXO: the reverse KL from the policy's preference to the smoothed label.

    loss = sigma(z) [log sigma(z) - log(1 - e)] + sigma(-z) [log sigma(-z) - log e]

    with e = `label_smoothing` above 0. It is 0 at z = log((1 - e) / e), and its gradient vanishes
    for a pair that is badly wrong.

    Source: Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    z, e = beta * gap(logps, divergence, divergence_alpha), label_smoothing
    right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e))
    return right + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(e))


def discopop(
    logps: PairLogps,
    *,
    beta: float,
    temperature: float = 0.05,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """DiscoPOP, found by a language model: logistic below 0, exponential above.

    loss = sigma(-z / t) logistic(z) + sigma(z / t) exp(-z)

    with t = `temperature`. It is not monotone near 0. The product is formed as one exponential:
    apart, the factors are infinite and 0 for a pair that is badly wrong.

    Source: Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    z = beta * gap(logps, divergence, divergence_alpha)
    exponential = _exp(F.logsigmoid(z / temperature) - z)
    return exponential - torch.sigmoid(-z / temperature) * F.logsigmoid(z)


def focal(logps: PairLogps, *, beta: float, gamma: float = 0.05) -> Float[Tensor, " pairs"]:
    """FocalPO: pairs that the policy ranks wrong weigh less.

    loss = sigma(z)^gamma logistic(z)

    Not the factor (1 - sigma)^gamma of the focal loss. Where logistic(z) > 1 / gamma, the gradient
    pushes a pair further wrong.

    Source: Liu et al. 2025, arXiv:2501.06645.
    """
    z = beta * logps.logratio_gap
    return -torch.exp(gamma * F.logsigmoid(z)) * F.logsigmoid(z)


def r_dpo(logps: PairLogps, *, beta: float, alpha: float = 0.05) -> Float[Tensor, " pairs"]:
    """R-DPO: a chosen answer that is longer must win by less.

    loss = logistic(z + alpha (n_w - n_l))

    with n the numbers of scored tokens: the sign follows from maximising r - alpha n - beta KL.

    Source: Park et al. 2024, arXiv:2403.19159.
    """
    longer_by = (logps.chosen_lengths - logps.rejected_lengths).to(logps.policy_chosen_logps)
    return -F.logsigmoid(beta * logps.logratio_gap + alpha * longer_by)


# ------------------------------------------------------------ losses that hold each answer in place


def nca_pair(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """NCA: raises the chosen answer, and holds both near the reference.

    loss = logistic(beta c) + logistic(-beta c) / 2 + logistic(-beta r) / 2

    Its optimum in c is finite, log 2 / beta.

    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    c, r = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return -F.logsigmoid(c) - F.logsigmoid(-c) / 2 - F.logsigmoid(-r) / 2


def sppo_hard(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """SPPO: regress the log-ratios onto +1 / (2 beta) and -1 / (2 beta).

    loss = (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2

    The authors' code has half of it.

    Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with P = 1 and 0; the paper's eta is 1 / beta.
    """
    margin = 1 / (2 * beta)
    return (logps.chosen_logratios - margin) ** 2 + (logps.rejected_logratios + margin) ** 2


def apo_zero(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """APO-zero: the chosen answer up, the rejected one down, for answers better than the model's.

    loss = 1 - sigma(beta c) + sigma(beta r)

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, plus 1, which keeps it above 0.
    """
    c, r = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return torch.sigmoid(-c) + torch.sigmoid(r)


def apo_down(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """APO-down: both answers down, the rejected one further, for answers worse than the model's.

    loss = sigma(beta c) + 1 - sigma(z)

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8, plus 1, which keeps it above 0.
    """
    return torch.sigmoid(beta * logps.chosen_logratios) + torch.sigmoid(-beta * logps.logratio_gap)


def cal_dpo(logps: PairLogps, *, beta: float, weight: float = 1.0) -> Float[Tensor, " pairs"]:
    """Cal-DPO: DPO without its beta, and rewards calibrated to +1/2 and -1/2.

    loss = logistic(gap) + weight [(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2]

    The weight is 1 in the paper and 1/2 in the authors' code.

    Source: Xiao et al. 2024, arXiv:2412.14516.
    """
    return weight * sppo_hard(logps, beta=beta) - F.logsigmoid(logps.logratio_gap)


# --------------------------------------------------------------- losses that bend the log-ratios


def dpop(logps: PairLogps, *, beta: float, penalty: float = 50.0) -> Float[Tensor, " pairs"]:
    """DPO-Positive (Smaug): the chosen answer must not become less likely than it was.

    loss = logistic(beta [gap - penalty max(0, -c)])

    Training starts on the kink c = 0, where the gradient of the penalty is 0 here.

    Source: Pal et al. 2024, arXiv:2402.13228; the paper's lambda is `penalty`.
    """
    fallen = F.relu(-logps.chosen_logratios)
    return -F.logsigmoid(beta * (logps.logratio_gap - penalty * fallen))


def dpo_shift(logps: PairLogps, *, beta: float, shift: float = 0.7) -> Float[Tensor, " pairs"]:
    """DPO-Shift: the rejected answer counts less, so the chosen one falls less.

    loss = logistic(beta [c - shift r])

    Source: Yang et al. 2025, arXiv:2502.07599, with a fixed f(lambda) = `shift`.
    """
    return -F.logsigmoid(beta * (logps.chosen_logratios - shift * logps.rejected_logratios))


def chipo(logps: PairLogps, *, beta: float, reward_bound: float = 1.0) -> Float[Tensor, " pairs"]:
    """Chi-PO: chi-squared regularisation, which forgives no answer that the reference lacks.

    loss = logistic(clip(beta [phi(c) - phi(r)], -2 reward_bound, 2 reward_bound))

    with phi(x) = exp(x) + x; without the clip, the gradient grows like exp(c). Beta is on another
    scale than DPO's.

    Source: Huang et al. 2024, arXiv:2407.13399; the paper's R_max is `reward_bound`.
    """
    c, r = logps.chosen_logratios, logps.rejected_logratios
    z = beta * (_exp(c) + c - _exp(r) - r)
    return -F.logsigmoid(z.clamp(-2 * reward_bound, 2 * reward_bound))


# ---------------------------------------------------------------------- losses of per-token means


def ipo(
    logps: PairLogps,
    *,
    beta: float,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """IPO: regress the gap onto a fixed margin instead of pushing it without bound.

    loss = (avg_gap - 1 / (2 beta))^2

    with the paper's tau = beta and h = avg_gap, here of *per-token mean* log-ratios, as in the
    authors' own runs: with sums, a long answer overshoots the margin before it has learnt anything.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    away = gap(logps, divergence, divergence_alpha, per_token=True) - 1 / (2 * beta)
    most = math.exp(_cap(away) / 2)  # of what can be squared
    return away.clamp(-most, most) ** 2


def sigmoid_norm(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """Length-normalised DPO: the log-ratios are means over the answers' tokens.

    loss = -(1 - label_smoothing) log sigma(beta avg_gap) - label_smoothing log sigma(-beta avg_gap)

    Source: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, eq. 6.
    """
    z = beta * gap(logps, divergence, divergence_alpha, per_token=True)
    return _logistic(z, label_smoothing)


# -------------------------------------------------------------------- losses without a reference


def simpo(
    logps: PairLogps, *, beta: float, gamma_over_beta: float = 0.5
) -> Float[Tensor, " pairs"]:
    """SimPO: the mean log-prob of a token is the reward, and a margin must be won.

    loss = logistic(beta (avg_a - avg_b - gamma_over_beta))

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6; the margin is the paper's gamma / beta.
    """
    a, b = logps.avg_logps
    return -F.logsigmoid(beta * (a - b - gamma_over_beta))


def alphapo(
    logps: PairLogps, *, beta: float, alpha: float = 0.25, gamma_over_beta: float = 0.04
) -> Float[Tensor, " pairs"]:
    """AlphaPO: SimPO with a bent reward.

    loss = logistic(beta (reward(avg_a) - reward(avg_b) - gamma_over_beta))

    with reward(x) = (1 - exp(-alpha x)) / alpha, which is x at alpha 0.

    Source: Gupta et al. 2025, arXiv:2501.03884.
    """
    a, b = ((1 - _exp(-alpha * x)) / alpha if alpha else x for x in logps.avg_logps)
    return -F.logsigmoid(beta * (a - b - gamma_over_beta))


def simper(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """SimPER: the difference of inverse perplexities, without any hyper-parameter.

    loss = exp(avg_b) - exp(avg_a)

    Beta only scales the rewards that are logged. The gradient dies where an answer is improbable.

    Source: Xiao et al. 2025, arXiv:2502.00883.
    """
    a, b = logps.avg_logps
    return _exp(b) - _exp(a)


def orpo(logps: PairLogps, *, beta: float) -> Float[Tensor, " pairs"]:
    """ORPO: supervised fine-tuning on the chosen answer, and its odds against the rejected one.

    loss = -avg_a + beta logistic(log_odds(avg_a) - log_odds(avg_b))

    with log_odds(x) = x - log(1 - exp(x)); the paper's lambda is `beta`. The first term is over the
    answer's tokens alone.

    Source: Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7.
    """
    a, b = logps.avg_logps
    return -a - beta * F.logsigmoid(_log_odds(a) - _log_odds(b))


def cpo(logps: PairLogps, *, beta: float, sft_weight: float = 1.0) -> Float[Tensor, " pairs"]:
    """CPO: DPO against a uniform reference, and supervised fine-tuning on the chosen answer.

    loss = logistic(beta (a - b)) - sft_weight avg_a

    Source: Xu et al. 2024, arXiv:2401.08417, eq. 3, with the second term as a mean over tokens.
    """
    z = beta * (logps.policy_chosen_logps - logps.policy_rejected_logps)
    return -F.logsigmoid(z) - sft_weight * logps.avg_logps[0]


def slic(
    logps: PairLogps, *, beta: float, margin: float = 1.0, sft_weight: float = 0.1
) -> Float[Tensor, " pairs"]:
    """SLiC-HF: a hinge on log-probs, and supervised fine-tuning on the chosen answer.

    loss = max(0, margin - a + b) - sft_weight a

    The margin is in nats. Beta only scales the rewards that are logged.

    Source: Zhao et al. 2023, arXiv:2305.10425; the paper's delta is `margin`.
    """
    a, b = logps.policy_chosen_logps, logps.policy_rejected_logps
    return F.relu(margin - a + b) - sft_weight * a


def sft(
    logps: PairLogps, *, beta: float, per: Literal["token", "answer"] = "token"
) -> Float[Tensor, " pairs"]:
    """Supervised fine-tuning on the chosen answer; a part of a sum of losses.

    loss = -avg_a, or -a with `per` = "answer"

    With sigmoid: RPO. Per token and weight 1, Pang et al. 2024, arXiv:2404.19733; per answer and
    weight eta beta, Liu et al. 2024, arXiv:2405.16436. Beta only scales the rewards.
    """
    return -(logps.avg_logps[0] if per == "token" else logps.policy_chosen_logps)


# ------------------------------------------------------------------------------------- in common


def scores(
    logratios: Float[Tensor, " pairs"], divergence: Divergence, alpha: float = 0.5
) -> Float[Tensor, " pairs"]:
    """What a log-ratio x is worth when the policy is held near its reference by a divergence.

    reverse_kl: x; forward_kl: -exp(-x); js: log 2 + log sigma(x); alpha: (1 - exp(-alpha x)) /
    alpha, alpha in (0, 1). A constant of the prompt cancels between two answers, so only losses of
    score(c) - score(r) take it.

    Source: Wang et al. 2023, arXiv:2309.16240; score is f'(u) at u = exp(x), less a constant.
    """
    if divergence == "reverse_kl":
        return logratios
    if divergence == "js":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "forward_kl":
        return -_exp(-logratios)
    return (1 - _exp(-alpha * logratios)) / alpha


def gap(
    logps: PairLogps, divergence: Divergence, alpha: float, *, per_token: bool = False
) -> Float[Tensor, " pairs"]:
    """Score of the chosen minus that of the rejected answer; `per_token`: each over its length."""
    c, r = (
        scores(x, divergence, alpha) for x in (logps.chosen_logratios, logps.rejected_logratios)
    )
    return c / logps.chosen_lengths - r / logps.rejected_lengths if per_token else c - r


def _logistic(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _exp(x: Tensor) -> Tensor:
    """exp(x), with x capped below what overflows; beyond the cap, there is no gradient."""
    return torch.exp(x.clamp(max=_cap(x)))


def _cap(x: Tensor) -> float:
    """The largest exponent whose exponential still has room in the type of x."""
    return {torch.float64: 700.0, torch.float16: 10.0}.get(x.dtype, 80.0)


def _log_odds(x: Tensor) -> Tensor:
    """The log-odds of probability exp(x), x - log(1 - exp(x)), for x up to -1e-6."""
    x = x.clamp(max=-1e-6)
    is_near = x > -math.log(2)
    # Where a branch is not taken it still has a gradient, which must not be NaN.
    near, far = torch.where(is_near, x, -1.0), torch.where(is_near, -1.0, x)
    return x - torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def implicit_rewards(
    logps: PairLogps, *, beta: float
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Rewards of the chosen and of the rejected answers, (pairs,) each, without gradient.

    reward = beta log [pi(y|x) / pi_ref(y|x)]; the term left out, beta log Z(x), is the same for
    both answers of a pair. Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5.
    """
    return beta * logps.chosen_logratios.detach(), beta * logps.rejected_logratios.detach()


LOSSES: dict[str, Callable[..., Float[Tensor, " pairs"]]] = {
    # of the gap
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "focal": focal,
    "r_dpo": r_dpo,
    # that hold each answer in place
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "cal_dpo": cal_dpo,
    # that bend the log-ratios
    "dpop": dpop,
    "dpo_shift": dpo_shift,
    "chipo": chipo,
    # of per-token means
    "sigmoid_norm": sigmoid_norm,
    # without a reference
    "simpo": simpo,
    "alphapo": alphapo,
    "simper": simper,
    "orpo": orpo,
    "cpo": cpo,
    "slic": slic,
    "sft": sft,
}

WITHOUT_REFERENCE = frozenset("simpo alphapo simper orpo cpo slic sft".split())
"""Losses that read the policy alone: a run with no others makes no pass of a reference."""
