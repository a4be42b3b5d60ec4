"""The equations of the papers once more, in numpy and float64, without a look at dpo/losses.py.

a, b: log-probs of the chosen and the rejected answer; a0, b0: the reference's; n, m: lengths.
"""

import numpy as np


def sigma(x):
    return 1 / (1 + np.exp(-x))


def ell(x):
    return np.log1p(np.exp(-x))


def smoothed(z, e):
    return (1 - e) * ell(z) + e * ell(-z)


def s(x, divergence, alpha):
    """Slopes f'(u) of the divergences, at u = exp(x), up to a constant."""
    u = np.exp(x)
    return {
        "reverse_kl": lambda: np.log(u),
        "forward_kl": lambda: 1 - 1 / u,
        "js": lambda: np.log(2 * u / (1 + u)),
        "alpha": lambda: (1 - u ** (-alpha)) / alpha,
    }[divergence]()


class Known:
    """What a loss is given besides log-probs, or numbers that do no harm."""

    def __init__(self, given, zeros):
        self._given, self._zeros = given, zeros

    def __getattr__(self, name):
        other = {"dispersions": self._zeros + 0.5, "delta": 0.0, "gap_mean": 0.0}
        return self._given(name, {"gap_deviation": 1.0, **other}.get(name, self._zeros))


def by_rank(mine, theirs, beta, e):
    """The k-th smallest against the k-th smallest, one at a time."""
    losses = np.zeros_like(mine)
    for place, other in zip(np.argsort(mine), sorted(theirs), strict=True):
        losses[place] = smoothed(beta * (mine[place] - other), e)
    return losses


@np.errstate(all="ignore")  # some are asked for options that are another one's
def every_loss(a, b, a0, b0, n, m, beta, **options):
    """{name: losses} of all losses that take these options, or defaults."""
    given = options.get
    e = given("label_smoothing")
    kind, al = given("divergence", "reverse_kl"), given("divergence_alpha", 0.5)
    c, r = a - a0, b - b0
    h = s(c, kind, al) - s(r, kind, al)
    z, plain = beta * h, c - r
    half = 1 / (2 * beta)
    e_rob, e_exo = (0.1 if e is None else e), (1e-3 if e is None else e)
    e = e or 0.0
    p = sigma(z)
    t = given("temperature", 0.05)
    phi_c, phi_r = np.exp(c) + c, np.exp(r) + r
    bound = given("reward_bound", 1.0)
    clipped = np.clip(beta * (phi_c - phi_r), -2 * bound, 2 * bound)
    ma, mb = a / n, b / m
    alpha = given("alpha", 0.25)
    bent_a, bent_b = (x if alpha == 0 else (1 - np.exp(-alpha * x)) / alpha for x in (ma, mb))
    odds_a, odds_b = (np.log(np.exp(x) / (1 - np.exp(x))) for x in (ma, mb))
    per_token = s(c, kind, al) / n - s(r, kind, al) / m
    known = Known(given, np.zeros_like(a))
    target = given("eta", 1.0) * (known.chosen_scores - known.rejected_scores)
    t_p, z_p, plain_z = sigma(target), sigma(beta * plain), beta * plain
    apart = known.rejected_kls - known.chosen_kls
    kept = 1 - given("ld_alpha", 0.5)
    short_c = c - kept * (known.policy_chosen_tail_logps - known.ref_chosen_tail_logps)
    short_r = r - kept * (known.policy_rejected_tail_logps - known.ref_rejected_tail_logps)
    z_c, z_r = max(0.0, np.mean(c)), max(0.0, np.mean(r))
    beta_step = max(1e-3, beta * (1 + given("alpha", 0.6) * (np.mean(plain) - known.gap_mean)))
    strong = given("robustness", 1.0)
    won = (c / n - r / m - known.gap_mean) / known.gap_deviation
    return {
        "odpo": ell(plain_z - given("alpha", 1.0) * known.margins),
        "rpo_sq": (plain_z - target) ** 2,
        "rpo_bwd_kl": t_p * np.log(t_p / z_p) + (1 - t_p) * np.log((1 - t_p) / (1 - z_p)),
        "rpo_fwd_kl": z_p * np.log(z_p / t_p) + (1 - z_p) * np.log((1 - z_p) / (1 - t_p)),
        "wpo": known.on_policy_weights * ell(plain_z),
        "mallows": ell(-given("phi", 0.29) * np.log(known.dispersions) * plain_z),
        "tdpo1": ell(beta * (plain - apart)),
        "tdpo2": ell(beta * (plain - given("alpha", 0.5) * apart)),
        "ld_dpo": smoothed(beta * (short_c - short_r), e),
        "aot": by_rank(a - b, a0 - b0, beta, e),
        "aot_unpaired": by_rank(c, r, beta, e),
        "kto_pair": given("desirable_weight", 1.0) * (1 - sigma(beta * (c - z_r)))
        + given("undesirable_weight", 1.0) * (1 - sigma(beta * (z_c - r))),
        "dr_dpo": 0 * a - strong * np.log(np.mean(np.exp(-ell(plain_z) / strong))),
        "beta_dpo": ell(beta_step * plain),
        "bco_pair": ell(beta * c - known.delta) + ell(known.delta - beta * r),
        "alpha_dpo": ell(
            beta * (ma - mb) - beta * given("gamma_over_beta", 0.5) - given("alpha", 0.5) * won
        ),
        "sigmoid": smoothed(z, e),
        "ipo": (per_token - half) ** 2,
        "hinge": np.maximum(0, 1 - z),
        "robust": ((1 - e_rob) * ell(z) - e_rob * ell(-z)) / (1 - 2 * e_rob),
        "exo_pair": p * np.log(p / (1 - e_exo)) + (1 - p) * np.log((1 - p) / e_exo),
        "discopop": (1 - sigma(z / t)) * ell(z) + sigma(z / t) * np.exp(-z),
        "focal": sigma(beta * plain) ** given("gamma", 0.05) * ell(beta * plain),
        "r_dpo": ell(beta * plain + given("alpha", 0.05) * (n - m)),
        "nca_pair": -np.log(sigma(beta * c))
        - 0.5 * np.log(sigma(-beta * c))
        - 0.5 * np.log(sigma(-beta * r)),
        "sppo_hard": (c - half) ** 2 + (r + half) ** 2,
        "apo_zero": 1 - sigma(beta * c) + sigma(beta * r),
        "apo_down": sigma(beta * c) + 1 - sigma(beta * plain),
        "cal_dpo": ell(plain) + given("weight", 1.0) * ((c - half) ** 2 + (r + half) ** 2),
        "dpop": ell(beta * (plain - given("penalty", 50.0) * np.maximum(0, -c))),
        "dpo_shift": ell(beta * (c - given("shift", 0.7) * r)),
        "chipo": ell(clipped),
        "sigmoid_norm": smoothed(beta * per_token, e),
        "simpo": ell(beta * (ma - mb) - beta * given("gamma_over_beta", 0.5)),
        "alphapo": ell(beta * (bent_a - bent_b) - beta * given("gamma_over_beta", 0.04)),
        "simper": np.exp(mb) - np.exp(ma),
        "orpo": -ma + beta * ell(odds_a - odds_b),
        "cpo": ell(beta * (a - b)) - given("sft_weight", 1.0) * ma,
        "slic": np.maximum(0, given("margin", 1.0) - a + b) - given("sft_weight", 0.1) * a,
        "sft": -a if given("per") == "answer" else -ma,
    }
