"""The losses: the log-probs of pairs in, one loss per pair out.

Axes: `pairs`. Units: nats for log-probs, tokens for lengths. A loss never reduces over pairs: the
caller sums them and divides once by the number of pairs in the whole step (`train.step`).
The entries of `LOSSES` are called as `LOSSES[type](logps, beta=beta, **its_own_options)`. A keyword
without a default is an input, (pairs,) or a number that a loss remembers: `dpo.objective` gives it.

The papers' symbols, here and in the formulas below:

    c, r    log-ratios of the chosen and the rejected answer, log [pi(y|x) / pi_ref(y|x)]
    gap     c - r, the h of the papers; z = beta gap
    a, b    log-probs of the chosen and the rejected answer under the policy alone
    avg_    a sum over the answer's tokens, divided by their number

    sigma   the logistic function; logistic(x) = -log sigma(x)

Chapters: losses of the gap; losses that hold each answer in place; losses that bend the log-ratios;
losses of per-token means; losses without a reference; losses of what else is known of a pair;
losses of the whole step; losses with a memory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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
    a, b = (-_expm1(-alpha * x) / alpha if alpha else x for x in logps.avg_logps)
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


# --------------------------------------------------- losses of what else is known of a pair


def odpo(
    logps: PairLogps, *, beta: float, alpha: float = 1.0, margins: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """ODPO: a pair whose answers differ more must be won by more.

    loss = logistic(z - alpha margins)

    `margins`: (pairs,); the paper's is the log of the difference of the answers' scores.

    Source: Amini et al. 2024, arXiv:2402.10571.
    """
    return -F.logsigmoid(beta * logps.logratio_gap - alpha * margins)


def rpo_sq(
    logps: PairLogps,
    *,
    beta: float,
    eta: float = 1.0,
    chosen_scores: Float[Tensor, " pairs"],
    rejected_scores: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Reward-aware, squared: regress the rewards' difference onto that of the scores (REBEL).

    loss = (z - eta [chosen_scores - rejected_scores])^2

    Source: Adler et al. 2024 (Nemotron-4), arXiv:2406.11704; Gao et al. 2024, arXiv:2404.16767.
    """
    return (beta * logps.logratio_gap - eta * (chosen_scores - rejected_scores)) ** 2


def rpo_bwd_kl(
    logps: PairLogps,
    *,
    beta: float,
    eta: float = 1.0,
    chosen_scores: Float[Tensor, " pairs"],
    rejected_scores: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Reward-aware: DPO with the label that the scores' difference makes likely.

    loss = KL(sigma(d) || sigma(z)), d = eta [chosen_scores - rejected_scores]

    Source: Adler et al. 2024 (Nemotron-4), arXiv:2406.11704; Sun et al. 2025, arXiv:2502.00203.
    """
    return _kl(eta * (chosen_scores - rejected_scores), beta * logps.logratio_gap)


def rpo_fwd_kl(
    logps: PairLogps,
    *,
    beta: float,
    eta: float = 1.0,
    chosen_scores: Float[Tensor, " pairs"],
    rejected_scores: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Reward-aware: EXO with the label that the scores' difference makes likely.

    loss = KL(sigma(z) || sigma(d)), d = eta [chosen_scores - rejected_scores]

    Source: Sun et al. 2025, arXiv:2502.00203.
    """
    return _kl(beta * logps.logratio_gap, eta * (chosen_scores - rejected_scores))


def wpo(
    logps: PairLogps, *, beta: float, on_policy_weights: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """WPO: a pair counts as much as its answers are those that the policy would give.

    loss = w logistic(z), without a gradient through w

    `on_policy_weights`: (pairs,), see `wpo_weights`.

    Source: Zhou et al. 2024, arXiv:2406.11827, eq. 2.
    """
    return -on_policy_weights.detach() * F.logsigmoid(beta * logps.logratio_gap)


def wpo_weights(
    logps: PairLogps,
    chosen_collisions: Float[Tensor, " pairs"],
    rejected_collisions: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """WPO's w = min(1, exp(mean q of chosen + mean q of rejected)), (pairs,), without gradient.

    q = log p(y) - log sum_v p(v)^2 of each scored token y, v over the vocabulary.
    `*_collisions`: (pairs,) nats, log sum_v p(v)^2 summed over the scored tokens of the answer.
    Source: Zhou et al. 2024, arXiv:2406.11827.
    """
    chosen = (logps.policy_chosen_logps - chosen_collisions) / logps.chosen_lengths
    rejected = (logps.policy_rejected_logps - rejected_collisions) / logps.rejected_lengths
    return torch.exp((chosen + rejected).clamp(max=0)).detach()


def mallows(
    logps: PairLogps, *, beta: float, phi: float = 0.29, dispersions: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """MallowsPO: a prompt with few good answers counts more than one with many.

    loss = logistic(w z), w = -phi log dispersions

    `dispersions`: (pairs,), the entropy of the reference's predictions over both answers' tokens,
    as a share of the largest, log V; taken to be 1e-6 at least.

    Source: Chen et al. 2024, arXiv:2405.14953.
    """
    w = -phi * dispersions.clamp(min=1e-6).log()
    return -F.logsigmoid(w * beta * logps.logratio_gap)


def tdpo1(
    logps: PairLogps,
    *,
    beta: float,
    chosen_kls: Float[Tensor, " pairs"],
    rejected_kls: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """TDPO1: the policy is also held near the reference at every token of the rejected answer.

    loss = logistic(beta [gap - (rejected_kls - chosen_kls)])

    `*_kls`: (pairs,) nats, KL(reference || policy) summed over the scored positions of the answer.

    Source: Zeng et al. 2024, arXiv:2404.11999.
    """
    return -F.logsigmoid(beta * (logps.logratio_gap - (rejected_kls - chosen_kls)))


def tdpo2(
    logps: PairLogps,
    *,
    beta: float,
    alpha: float = 0.5,
    chosen_kls: Float[Tensor, " pairs"],
    rejected_kls: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """TDPO2: TDPO1 with a weight, and without a gradient through the chosen answer's KL.

    loss = logistic(beta [gap - alpha (rejected_kls - chosen_kls)])

    Source: Zeng et al. 2024, arXiv:2404.11999.
    """
    apart = rejected_kls - chosen_kls.detach()
    return -F.logsigmoid(beta * (logps.logratio_gap - alpha * apart))


def ld_dpo(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    ld_alpha: float = 0.5,
    policy_chosen_tail_logps: Float[Tensor, " pairs"],
    policy_rejected_tail_logps: Float[Tensor, " pairs"],
    ref_chosen_tail_logps: Float[Tensor, " pairs"],
    ref_rejected_tail_logps: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """LD-DPO: what the longer answer has beyond the shorter one counts `ld_alpha` times.

    loss = sigmoid of `shortened` log-probs

    Source: Liu et al. 2024, arXiv:2409.06411, here for policy and reference alike.
    """
    short = shortened(
        logps,
        ld_alpha,
        policy_chosen_tail_logps=policy_chosen_tail_logps,
        policy_rejected_tail_logps=policy_rejected_tail_logps,
        ref_chosen_tail_logps=ref_chosen_tail_logps,
        ref_rejected_tail_logps=ref_rejected_tail_logps,
    )
    return sigmoid(short, beta=beta, label_smoothing=label_smoothing)


def shortened(
    logps: PairLogps, ld_alpha: float, **tail_logps: Float[Tensor, " pairs"]
) -> PairLogps:
    """Log-probs in which tokens beyond the shorter answer's length count `ld_alpha` times.

    `tail_logps`: the four `*_tail_logps`, (pairs,) nats, sums over those tokens. Policy and
    reference are shortened alike, so that they still agree at step 0.
    """
    sums = {name.replace("_tail_", "_"): tail for name, tail in tail_logps.items()}
    return replace(
        logps, **{name: getattr(logps, name) - (1 - ld_alpha) * tail for name, tail in sums.items()}
    )


# ---------------------------------------------------------------------- losses of the whole step
# They are called with all pairs of a step, and a pair's loss depends on the others.


def aot(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Float[Tensor, " pairs"]:
    """AOT: the policy's margins must exceed the reference's as a distribution, rank by rank.

    loss at rank k = logistic(beta [m_(k) - q_(k)])

    with m = a - b and q the same of the reference, (k) the k-th smallest of the step. A pair has
    the loss at the rank of its m. Of one pair it is sigmoid.

    Source: Melnyk et al. 2024, arXiv:2406.05882, for paired answers.
    """
    policy = logps.policy_chosen_logps - logps.policy_rejected_logps
    reference = logps.ref_chosen_logps - logps.ref_rejected_logps
    return _by_rank(policy, reference, beta, label_smoothing)


def aot_unpaired(
    logps: PairLogps, *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " pairs"]:
    """AOT, unpaired: chosen log-ratios must exceed rejected ones as a distribution, rank by rank.

    loss at rank k = logistic(beta [c_(k) - r_(k)])

    A pair has the loss at the rank of its c.

    Source: Melnyk et al. 2024, arXiv:2406.05882, for unpaired answers.
    """
    return _by_rank(logps.chosen_logratios, logps.rejected_logratios, beta, label_smoothing)


def kto_pair(
    logps: PairLogps,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " pairs"]:
    """KTO's value function on pairs: each answer against the mean of the other kind.

    loss = desirable_weight sigma(-beta [c - z_r]) + undesirable_weight sigma(-beta [z_c - r])

    with z_c = max(0, mean c) and z_r likewise, over the step, without a gradient.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7; KTO itself has no pairs.
    """
    c, r = logps.chosen_logratios, logps.rejected_logratios
    z_c, z_r = (F.relu(x.detach().mean()) for x in (c, r))
    desirable = desirable_weight * torch.sigmoid(-beta * (c - z_r))
    return desirable + undesirable_weight * torch.sigmoid(-beta * (z_c - r))


def dr_dpo(logps: PairLogps, *, beta: float, robustness: float = 1.0) -> Float[Tensor, " pairs"]:
    """Dr. DPO: pairs with a high loss, whose labels may be wrong, weigh less.

    loss of every pair = -robustness log mean exp(-logistic(z) / robustness), mean over the step

    The larger `robustness` (the paper's beta'), the nearer to DPO.

    Source: Wu et al. 2024, arXiv:2407.07880.
    """
    exponents = F.logsigmoid(beta * logps.logratio_gap) / robustness
    count = math.log(max(1, len(exponents)))
    return (-robustness * (exponents.logsumexp(0) - count)).expand(len(exponents))


def beta_dpo(
    logps: PairLogps, *, beta: float, alpha: float = 0.6, gap_mean: float
) -> Float[Tensor, " pairs"]:
    """Beta-DPO: a step whose pairs differ more than others gets a larger beta.

    loss = logistic(beta_step gap), beta_step = max(1e-3, beta [1 + alpha (mean gap - gap_mean)])

    `gap_mean`: that of the steps before, see `moved_gap_mean`. No gradient through beta_step.

    Source: Wu et al. 2024, arXiv:2407.08639, without its drawing of pairs.
    """
    gaps = logps.logratio_gap
    beta_step = (beta * (1 + alpha * (gaps.detach().mean() - gap_mean))).clamp(min=1e-3)
    return -F.logsigmoid(beta_step * gaps)


# ------------------------------------------------------------------------- losses with a memory
# What they remember is a number of the steps *before*: at the first one it is known, and it is the
# same for every split and number of ranks. `MEMORIES` says how it starts and moves.


def bco_pair(logps: PairLogps, *, beta: float, delta: float) -> Float[Tensor, " pairs"]:
    """BCO: a classifier of each answer, whose threshold is the mean reward so far.

    loss = logistic(beta c - delta) + logistic(delta - beta r)

    `delta`: mean reward of both answers over the steps before, see `moved_delta`.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    c, r = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return -F.logsigmoid(c - delta) - F.logsigmoid(delta - r)


def alpha_dpo(
    logps: PairLogps,
    *,
    beta: float,
    alpha: float = 0.5,
    gamma_over_beta: float = 0.5,
    gap_mean: float,
    gap_deviation: float,
) -> Float[Tensor, " pairs"]:
    """Alpha-DPO: SimPO whose margin grows with how far a pair is won already.

    loss = logistic(beta [avg_a - avg_b - gamma_over_beta] - alpha (avg_gap - gap_mean) / deviation)

    without a gradient through the last term; mean and deviation are those of the steps before, see
    `moved_moments`. The authors' code has alpha inside beta: its 0.2 at beta 2.5 is 0.5 here.

    Source: Wu et al. 2024, arXiv:2410.10148.
    """
    a, b = logps.avg_logps
    away = (_avg_gap(logps) - gap_mean) / max(gap_deviation, 1e-6)
    return -F.logsigmoid(beta * (a - b - gamma_over_beta) - alpha * away.detach())


def moved_delta(state: Mapping[str, float], logps: PairLogps, beta: float) -> dict[str, float]:
    """The mean of all rewards so far: of both answers of every pair of every step."""
    rewards = torch.cat(implicit_rewards(logps, beta=beta)).double()
    count = state["count"] + len(rewards)
    total = state["delta"] * state["count"] + float(rewards.sum())
    return {"delta": total / max(1.0, count), "count": float(count)}


def moved_gap_mean(state: Mapping[str, float], logps: PairLogps, beta: float) -> dict[str, float]:
    """The running mean of the steps' mean gaps, nats, with momentum 0.9."""
    return {"gap_mean": _moved(state["gap_mean"], logps.logratio_gap.detach().double().mean())}


def moved_moments(state: Mapping[str, float], logps: PairLogps, beta: float) -> dict[str, float]:
    """Running mean and deviation of the steps' gaps a token, with momentum 0.9."""
    gaps = _avg_gap(logps).detach().double()
    return {
        "gap_mean": _moved(state["gap_mean"], gaps.mean()),
        "gap_deviation": _moved(state["gap_deviation"], gaps.std(correction=0)),
    }


# ------------------------------------------------------------------------------------- in common


def scores(
    logratios: Float[Tensor, " pairs"], divergence: Divergence, alpha: float = 0.5
) -> Float[Tensor, " pairs"]:
    """What a log-ratio x is worth when the policy is held near its reference by a divergence.

    reverse_kl: x; forward_kl: 1 - exp(-x); js: log 2 + log sigma(x); alpha: (1 - exp(-alpha x)) /
    alpha, alpha in (0, 1). A constant of the prompt cancels between two answers, so only losses of
    score(c) - score(r) take it.

    Source: Wang et al. 2023, arXiv:2309.16240; score is f'(u) - f'(1) at u = exp(x), so that it is
    0 where policy and reference agree, also after a division by lengths.
    """
    if divergence == "reverse_kl":
        return logratios
    if divergence == "js":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "forward_kl":
        return -_expm1(-logratios)
    return -_expm1(-alpha * logratios) / alpha


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


def _kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(sigma(x) || sigma(y)) between two labels, by their log-odds."""
    right = torch.sigmoid(x) * (F.logsigmoid(x) - F.logsigmoid(y))
    return right + torch.sigmoid(-x) * (F.logsigmoid(-x) - F.logsigmoid(-y))


def _by_rank(mine: Tensor, theirs: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The smoothed loss of beta (mine_(k) - theirs_(k)), at the places of mine."""
    ranked, places = mine.sort()
    losses = _logistic(beta * (ranked - theirs.sort().values), label_smoothing)
    return torch.zeros_like(losses).scatter(0, places, losses)


def _avg_gap(logps: PairLogps) -> Tensor:
    return gap(logps, "reverse_kl", 0.0, per_token=True)


def _moved(old: float, new: Tensor) -> float:
    return 0.9 * old + 0.1 * float(new)


def _exp(x: Tensor) -> Tensor:
    """exp(x), with x capped below what overflows; beyond the cap, there is no gradient."""
    return torch.exp(x.clamp(max=_cap(x)))


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, capped alike."""
    return torch.expm1(x.clamp(max=_cap(x)))


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
    logps: PairLogps, *, beta: float, per_token: bool = False
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Rewards of the chosen and of the rejected answers, (pairs,) each, without gradient.

    reward = beta log [pi(y|x) / pi_ref(y|x)]; the term left out, beta log Z(x), is the same for
    both answers of a pair. Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5. `per_token`: beta
    log pi(y|x) / |y|, what SimPO and its like compare instead.
    """
    c, r = logps.avg_logps if per_token else (logps.chosen_logratios, logps.rejected_logratios)
    return beta * c.detach(), beta * r.detach()


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
    # of what else is known of a pair
    "odpo": odpo,
    "rpo_sq": rpo_sq,
    "rpo_bwd_kl": rpo_bwd_kl,
    "rpo_fwd_kl": rpo_fwd_kl,
    "wpo": wpo,
    "mallows": mallows,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
    "ld_dpo": ld_dpo,
    # of the whole step
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "kto_pair": kto_pair,
    "dr_dpo": dr_dpo,
    "beta_dpo": beta_dpo,
    # with a memory
    "bco_pair": bco_pair,
    "alpha_dpo": alpha_dpo,
}

WITHOUT_REFERENCE = frozenset("simpo alphapo simper orpo cpo slic sft".split())
"""Losses that read the policy alone: a run with no others makes no pass of a reference."""

STEP_WIDE = frozenset("aot aot_unpaired kto_pair dr_dpo beta_dpo".split())
"""Losses that are called with all pairs of a step."""


class Memory(NamedTuple):
    """What a loss remembers of the steps before.

    Attributes:
        start: before the first step, by keyword of the loss (and what else `moved` needs).
        moved: what it is after a step of these pairs: (state, logps, beta) -> state.
    """

    start: Mapping[str, float]
    moved: Callable[[Mapping[str, float], PairLogps, float], dict[str, float]]


MEMORIES = {
    "bco_pair": Memory({"delta": 0.0, "count": 0.0}, moved_delta),
    "beta_dpo": Memory({"gap_mean": 0.0}, moved_gap_mean),
    "alpha_dpo": Memory({"gap_mean": 0.0, "gap_deviation": 1.0}, moved_moments),
}
"""The losses that remember something."""
