"""Laws that every loss and every option keeps: values, gradients, limits, step 0, far out."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch

from dpo.errors import UserError
from dpo.losses import LOSSES, MEMORIES, STEP_WIDE, WITHOUT_REFERENCE, PairLogps
from dpo.objective import TAILS, Part, check_part, checked_objective
from tests.loss_inputs import REMEMBERED, called, inputs_of
from tests.losses_in_numpy import every_loss as in_numpy
from tests.test_losses import pairs, permuted, random_pairs

# Each with options away from their defaults.
SETTINGS = {
    "sigmoid": [{}, {"label_smoothing": 0.2}],
    "ipo": [{}],
    "hinge": [{}],
    "robust": [{}, {"label_smoothing": 0.3}],
    "exo_pair": [{}, {"label_smoothing": 0.2}],
    "discopop": [{}, {"temperature": 1.0}, {"temperature": 3.0}],
    "focal": [{}, {"gamma": 2.0}],
    "r_dpo": [{}, {"alpha": 0.5}],
    "nca_pair": [{}],
    "sppo_hard": [{}],
    "apo_zero": [{}],
    "apo_down": [{}],
    "cal_dpo": [{}, {"weight": 0.5}],
    "dpop": [{}, {"penalty": 5.0}],
    "dpo_shift": [{}, {"shift": 0.9}],
    "chipo": [{}, {"reward_bound": 30.0}],
    "sigmoid_norm": [{}, {"label_smoothing": 0.2}],
    "simpo": [{}, {"gamma_over_beta": 0.0}],
    "alphapo": [{}, {"alpha": 1.0}, {"alpha": 0.0, "gamma_over_beta": 0.1}],
    "simper": [{}],
    "orpo": [{}],
    "cpo": [{}, {"sft_weight": 0.0}],
    "slic": [{}, {"margin": 3.0, "sft_weight": 1.0}],
    "sft": [{}, {"per": "answer"}],
    "odpo": [{}, {"alpha": 0.3}],
    "rpo_sq": [{}, {"eta": 0.3}],
    "rpo_bwd_kl": [{}, {"eta": 0.3}],
    "rpo_fwd_kl": [{}, {"eta": 0.3}],
    "wpo": [{}],
    "mallows": [{}, {"phi": 1.5}],
    "tdpo1": [{}],
    "tdpo2": [{}, {"alpha": 1.5}],
    "ld_dpo": [{}, {"ld_alpha": 0.0}, {"label_smoothing": 0.2, "ld_alpha": 1.0}],
    "aot": [{}, {"label_smoothing": 0.2}],
    "aot_unpaired": [{}, {"label_smoothing": 0.2}],
    "kto_pair": [{}, {"desirable_weight": 2.0, "undesirable_weight": 0.5}],
    "dr_dpo": [{}, {"robustness": 5.0}],
    "beta_dpo": [{}, {"alpha": 0.1}],
    "bco_pair": [{}],
    "alpha_dpo": [{}, {"alpha": 0.1, "gamma_over_beta": 0.0}],
}
DIVERGENT = "sigmoid ipo hinge robust exo_pair discopop sigmoid_norm".split()
DIVERGENCES = [{"divergence": d} for d in ("reverse_kl", "forward_kl", "js", "alpha")]
DIVERGENCES.append({"divergence": "alpha", "divergence_alpha": 0.1})
for divergent in DIVERGENT:
    SETTINGS[divergent] = SETTINGS[divergent] + DIVERGENCES
CASES = [(name, options) for name, settings in SETTINGS.items() for options in settings]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{','.join(map(str, o.values()))}" for n, o in CASES]
)


def test_every_loss_has_a_case_and_every_option_one_away_from_its_default():
    assert SETTINGS.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        options = {p.name: p.default for p in inspect.signature(loss).parameters.values()}
        tried = {key for given in SETTINGS[name] for key in given if given[key] != options[key]}
        assert tried == options.keys() - {"logps", "beta"} - inputs_of(name, 1).keys(), name


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_can_be_configured(name):
    """With its default, but the smoothing of losses that are about wrong labels."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    part = Part(name, 1.0, given | {"beta": 0.1})
    check_part(part, "adapter")
    objective = checked_objective([part], "adapter")
    given = {key: x for key, x in inputs_of(name, 3).items() if key not in REMEMBERED}
    assert objective(random_pairs(3), given).shape == (3,)
    for asked in inputs_of(name, 3):
        with pytest.raises(UserError, match=f"{name}: got {asked}, wanted .*. Leave it out"):
            check_part(Part(name, 1.0, {"beta": 0.1, asked: 1.0}), "adapter")


def gradients(loss, logps, **options):
    """Losses, and d sum / d of the four log-probs; 0 where nothing is read."""
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps")
    names += ("ref_rejected_logps",)
    inputs = {name: getattr(logps, name).detach().clone().requires_grad_() for name in names}
    losses = called(loss, PairLogps(**{**vars(logps), **inputs}), **options)
    grads = torch.autograd.grad(losses.sum(), [*inputs.values()], allow_unused=True)
    zeros = torch.zeros_like(losses)
    return losses.detach(), [zeros if grad is None else grad for grad in grads]


@every_case
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_it_is_the_papers_equation(name, options, beta):
    """At log-ratios of some two nats, where the equation as it stands loses no digits."""
    logps = random_pairs(64, dtype=torch.float64, scale=0.5)
    longer = [logps.chosen_lengths + 20, logps.rejected_lengths + 20]
    a, b, *references = list(vars(logps).values())[:4]
    logps = PairLogps(a - 1, b + 2, *references, *longer)
    vectors = [vector.numpy().astype(float) for vector in vars(logps).values()]
    a, b, a0, b0, n, m = vectors
    given = inputs_of(name, 64)
    given = {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    wanted = in_numpy(a, b, a0, b0, n, m, beta, **options, **given)[name]
    got = called(name, logps, beta=beta, **options).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)
    other = in_numpy(a, b, a0, b0, n, m, beta * 1.01, **options, **given)[name]  # that could fail
    if name not in ("simper", "slic", "sft"):
        assert not np.allclose(got, other, rtol=1e-11, atol=1e-12)


@every_case
def test_its_gradient_is_right_and_half_of_it_would_be_noticed(name, options):
    logps = random_pairs(12, dtype=torch.float64, scale=2.0)
    rest = list(vars(logps).values())[4:]
    loss = partial(called, name) if name not in NOT_DIFFERENTIATED else partial(held, name, logps)
    inputs = [(vector / 8).requires_grad_() for vector in list(vars(logps).values())[:4]]
    assert torch.autograd.gradcheck(
        lambda *vectors: loss(PairLogps(*vectors, *rest), beta=0.3, **options), inputs
    )
    assert not torch.autograd.gradcheck(
        lambda *vectors: Halved.apply(loss(PairLogps(*vectors, *rest), beta=0.3, **options)),
        inputs,
        raise_exception=False,
    )


# Their means, weights and margins are constants: numerical differences would move them.
NOT_DIFFERENTIATED = {"kto_pair", "beta_dpo", "alpha_dpo"}


def held(name, start, logps, beta, **options):
    """The loss with its constants where they are at the start: what its gradient is that of."""
    start = PairLogps(*(vector / 8 for vector in list(vars(start).values())[:4]),
                      start.chosen_lengths, start.rejected_lengths)  # fmt: skip
    c, r, h = (x.detach() for x in (start.chosen_logratios, start.rejected_logratios,
                                    start.logratio_gap))  # fmt: skip
    given = {**inputs_of(name, len(h)), **options}
    if name == "kto_pair":
        desirable, undesirable = (given.get(f"{k}desirable_weight", 1.0) for k in ("", "un"))
        right = torch.sigmoid(-beta * (logps.chosen_logratios - r.mean().clamp(min=0)))
        wrong = torch.sigmoid(-beta * (c.mean().clamp(min=0) - logps.rejected_logratios))
        return desirable * right + undesirable * wrong
    if name == "beta_dpo":
        step = beta * (1 + given.get("alpha", 0.6) * (h.mean() - given["gap_mean"]))
        return -torch.nn.functional.logsigmoid(step.clamp(min=1e-3) * logps.logratio_gap)
    away = c / start.chosen_lengths - r / start.rejected_lengths - given["gap_mean"]
    a, b = logps.avg_logps
    won = beta * (a - b - given.get("gamma_over_beta", 0.5))
    return -torch.nn.functional.logsigmoid(
        won - given.get("alpha", 0.5) * away / given["gap_deviation"]
    )


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] in NOT_DIFFERENTIATED])
def test_its_constants_are_not_differentiated_and_its_value_is_the_same(name, options):
    logps = random_pairs(12, dtype=torch.float64, scale=2.0)
    small = PairLogps(*(vector / 8 for vector in list(vars(logps).values())[:4]),
                      logps.chosen_lengths, logps.rejected_lengths)  # fmt: skip
    names = ("policy_chosen_logps", "policy_rejected_logps")
    sides = []
    for loss in (partial(called, name), partial(held, name, logps)):
        leaves = {n: getattr(small, n).clone().requires_grad_() for n in names}
        losses = loss(PairLogps(**{**vars(small), **leaves}), beta=0.3, **options)
        sides.append((losses, *torch.autograd.grad(losses.sum(), [*leaves.values()])))
    for got, wanted in zip(*sides, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


class Halved(torch.autograd.Function):
    """The identity, with a wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.01, 0.5, 10.0])
def test_it_is_finite_far_out_and_at_log_probs_of_0(name, options, beta, dtype):
    """Log-ratios of +-1e4, each answer alone and both; log-probs of exactly 0; references -2e4."""
    far = torch.tensor([0.0, -1e4, 1e4], dtype=dtype)
    c, r = torch.cartesian_prod(far, far).T
    policy = torch.stack([-1e4 - c.relu() + c, -1e4 - r.relu() + r])
    cases = [
        (*policy, policy[0] - c, policy[1] - r),
        (torch.zeros_like(c), torch.zeros_like(c), torch.full_like(c, -2e4), -2e4 - 0 * c),
        (torch.zeros_like(c), -2e4 - 0 * c, torch.zeros_like(c), torch.zeros_like(c)),
        (-2e4 - 0 * c, torch.zeros_like(c), -2e4 - 0 * c, torch.zeros_like(c)),
    ]
    for vectors in cases:
        for lengths in ((1, 1), (7, 300)):
            sizes = [torch.full(c.shape, size) for size in lengths]
            losses, grads = gradients(name, PairLogps(*vectors, *sizes), beta=beta, **options)
            assert losses.isfinite().all()
            assert all(grad.isfinite().all() for grad in grads)


@every_case
def test_permuting_pairs_permutes_losses_and_none_sees_another(name, options):
    """None sees another pair, but in losses of the whole step."""
    logps, order = random_pairs(16), torch.randperm(16)
    losses = called(name, logps, beta=0.1, **options)
    shuffled = called(name, permuted(logps, order), beta=0.1, picked=order, **options)
    alike = torch.allclose if name in STEP_WIDE else torch.equal  # sums in another order
    assert alike(shuffled, losses[order])
    alone = torch.cat([
        called(name, permuted(logps, slice(i, i + 1)), beta=0.1, picked=slice(i, i + 1), whole=16,
               **options)
        for i in range(16)
    ])  # fmt: skip
    assert torch.allclose(alone, losses, atol=1e-5) == (name not in STEP_WIDE)


@every_case
def test_it_reads_its_reference_or_it_says_that_it_does_not(name, options):
    """A shift of policy and reference alike changes nothing; one of the reference alone does.

    But aot ranks the policy's margins, and alpha_dpo reads its means, too.
    """
    logps = random_pairs(16, dtype=torch.float64, scale=2.0)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    moved = PairLogps(**{**vars(logps), **{n: getattr(logps, n) + 3 for n in names}})
    moved = PairLogps(**{**vars(moved), "ref_chosen_logps": moved.ref_chosen_logps + 1})
    losses = called(name, logps, beta=0.3, **options)
    others = called(name, moved, beta=0.3, **options)
    assert torch.equal(losses, others) == (name in WITHOUT_REFERENCE)
    if name not in WITHOUT_REFERENCE | {"aot", "alpha_dpo"}:
        shift = torch.linspace(-5, 5, 16, dtype=torch.float64)
        alike = PairLogps(
            logps.policy_chosen_logps + shift,
            logps.policy_rejected_logps - shift,
            logps.ref_chosen_logps + shift,
            logps.ref_rejected_logps - shift,
            logps.chosen_lengths,
            logps.rejected_lengths,
        )
        torch.testing.assert_close(
            called(name, alike, beta=0.3, **options), losses, rtol=1e-9, atol=1e-9
        )


LN2 = math.log(2)
# Of r_dpo it depends on lengths; of those without a reference and alpha_dpo, on log-probs.
AT_START = {
    "sigmoid": lambda **_: LN2,
    "ipo": lambda beta, **_: 1 / (4 * beta**2),
    "hinge": lambda **_: 1.0,
    "robust": lambda **_: LN2,
    "exo_pair": lambda label_smoothing=1e-3, **_: (
        -LN2 - 0.5 * math.log(label_smoothing * (1 - label_smoothing))
    ),
    "discopop": lambda **_: 0.5 * LN2 + 0.5,
    "focal": lambda gamma=0.05, **_: 2**-gamma * LN2,
    "nca_pair": lambda **_: 2 * LN2,
    "sppo_hard": lambda beta, **_: 1 / (2 * beta**2),
    "apo_zero": lambda **_: 1.0,
    "apo_down": lambda **_: 1.0,
    "cal_dpo": lambda beta, weight=1.0, **_: LN2 + weight / (2 * beta**2),
    "dpop": lambda **_: LN2,
    "dpo_shift": lambda **_: LN2,
    "chipo": lambda **_: LN2,
    "sigmoid_norm": lambda **_: LN2,
    "aot": lambda **_: LN2,
    "aot_unpaired": lambda **_: LN2,
    "kto_pair": lambda desirable_weight=1.0, undesirable_weight=1.0, **_: (
        (desirable_weight + undesirable_weight) / 2
    ),
    "dr_dpo": lambda **_: LN2,
    "beta_dpo": lambda **_: LN2,
    "bco_pair": lambda **_: 2 * LN2,
    "odpo": lambda alpha=1.0, margins=0.0, **_: math.log1p(math.exp(alpha * margins)),
    "rpo_sq": lambda eta=1.0, score=0.0, **_: (eta * score) ** 2,
    "rpo_bwd_kl": lambda eta=1.0, score=0.0, **_: LN2 - entropy(eta * score),
    "rpo_fwd_kl": lambda eta=1.0, score=0.0, **_: (
        -LN2 + (math.log1p(math.exp(-eta * score)) + math.log1p(math.exp(eta * score))) / 2
    ),
    "wpo": lambda on_policy=0.0, **_: on_policy * LN2,
    "mallows": lambda **_: LN2,
    "tdpo1": lambda **_: LN2,
    "tdpo2": lambda **_: LN2,
    "ld_dpo": lambda **_: LN2,
}
# What a policy that is its reference has; a remembered number starts as dpo.losses.MEMORIES says.
START = {"chosen_kls": 0.0, "rejected_kls": 0.0} | dict.fromkeys(TAILS, -1.5) | {
    "margins": 0.7, "chosen_scores": 3.0, "rejected_scores": 1.2, "on_policy_weights": 0.4,
    "dispersions": 0.3, "delta": 0.0, "gap_mean": 0.0,
}  # fmt: skip


def test_only_losses_of_lengths_or_of_bare_log_probs_have_no_known_start():
    assert LOSSES.keys() - AT_START.keys() == WITHOUT_REFERENCE | {"r_dpo", "alpha_dpo"}


def entropy(log_odds):
    p = 1 / (1 + math.exp(-log_odds))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in AT_START])
def test_its_value_at_step_0_is_the_known_one(name, options):
    """Policy = reference, whatever the lengths."""
    logps = pairs([0.0])
    same = PairLogps(
        logps.ref_chosen_logps, logps.ref_rejected_logps, *list(vars(logps).values())[2:4],
        torch.tensor([4]), torch.tensor([7]),
    )  # fmt: skip
    asked = inputs_of(name, 1).keys()
    given = {key: START[key] for key in asked}
    given = {
        k: x if k in REMEMBERED else torch.tensor([x], dtype=torch.float64)
        for k, x in given.items()
    }
    got = called(name, same, beta=0.3, **options, **given).item()
    known = {"margins": 0.7, "score": 1.8, "on_policy": 0.4}
    assert got == pytest.approx(AT_START[name](beta=0.3, **options, **known), rel=1e-12)


def test_the_kinks_have_the_gradient_0_of_relu():
    """Dpop's first step: -beta / 2 on the chosen log-prob, and not (1 + penalty) times as much."""
    logps = pairs([0.0])
    same = PairLogps(*list(vars(logps).values())[2:4], *list(vars(logps).values())[2:])
    _, (chosen, rejected, *_) = gradients("dpop", same, beta=0.3, penalty=50.0)
    assert chosen.item() == pytest.approx(-0.15)
    assert rejected.item() == pytest.approx(0.15)
    _, (chosen, *_) = gradients("hinge", pairs([2.0]), beta=0.5)  # z is 1
    assert chosen.item() == 0.0
    even = PairLogps(*(torch.tensor([x]).double() for x in (-4.0, -5.0, 0.0, 0.0, 1.0, 1.0)))
    _, (chosen, *_) = gradients("slic", even, beta=0.1, margin=1.0, sft_weight=0.1)
    assert chosen.item() == pytest.approx(-0.1)


# (loss, its options, the loss that it becomes, its options, what becomes of value and beta)
LIMITS = {
    "robust without noise is sigmoid": ("robust", {"label_smoothing": 0.0}, "sigmoid", {}),
    "dpop without penalty is sigmoid": ("dpop", {"penalty": 0.0}, "sigmoid", {}),
    "r_dpo without alpha is sigmoid": ("r_dpo", {"alpha": 0.0}, "sigmoid", {}),
    "dpo_shift at 1 is sigmoid": ("dpo_shift", {"shift": 1.0}, "sigmoid", {}),
    "focal without gamma is sigmoid": ("focal", {"gamma": 0.0}, "sigmoid", {}),
    "alpha to 0 is reverse KL": (
        "sigmoid",
        {"divergence": "alpha", "divergence_alpha": 1e-9},
        "sigmoid",
        {},
    ),
    "alpha 1 is forward KL": (
        "sigmoid",
        {"divergence": "alpha", "divergence_alpha": 1.0},
        "sigmoid",
        {"divergence": "forward_kl"},
    ),
    "odpo without alpha is sigmoid": ("odpo", {"alpha": 0.0}, "sigmoid", {}),
    "tdpo2 without alpha is sigmoid": ("tdpo2", {"alpha": 0.0}, "sigmoid", {}),
    "tdpo2 with alpha 1 has the values of tdpo1": ("tdpo2", {"alpha": 1.0}, "tdpo1", {}),
    "ld_dpo with whole tails is sigmoid": ("ld_dpo", {"ld_alpha": 1.0}, "sigmoid", {}),
    "beta_dpo without alpha is sigmoid": ("beta_dpo", {"alpha": 0.0}, "sigmoid", {}),
    "alpha_dpo without alpha is simpo": ("alpha_dpo", {"alpha": 0.0}, "simpo", {}),
    "alphapo to alpha 0 is simpo": (
        "alphapo",
        {"alpha": 1e-9, "gamma_over_beta": 0.3},
        "simpo",
        {"gamma_over_beta": 0.3},
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_it_becomes(limit):
    name, options, other, its_options = LIMITS[limit]
    logps = random_pairs(32, dtype=torch.float64, scale=1.0)
    got, wanted = (
        called(n, logps, beta=0.3, **o) for n, o in ((name, options), (other, its_options))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    by_default = called(name, logps, beta=0.3)
    assert torch.allclose(by_default, wanted) == (name == other and not its_options)


def test_sigmoid_norm_of_single_tokens_is_sigmoid_and_simpo_has_a_reference_of_0():
    logps = random_pairs(32, dtype=torch.float64)
    ones = torch.ones(32)
    short = PairLogps(*list(vars(logps).values())[:4], ones, ones)
    torch.testing.assert_close(
        called("sigmoid_norm", short, beta=0.2), called("sigmoid", short, beta=0.2)
    )
    zeros = torch.zeros(32, dtype=torch.float64)
    bare = PairLogps(*list(vars(logps).values())[:2], zeros, zeros, *list(vars(logps).values())[4:])
    torch.testing.assert_close(
        called("simpo", bare, beta=0.2, gamma_over_beta=0.0), called("sigmoid_norm", bare, beta=0.2)
    )
    torch.testing.assert_close(
        called("cpo", bare, beta=0.2, sft_weight=0.0), called("sigmoid", bare, beta=0.2)
    )


def test_chipo_of_small_ratios_is_sigmoid_with_twice_the_beta():
    logps = pairs([1e-4, -2e-4])
    near = PairLogps(
        **{**vars(logps), "policy_chosen_logps": logps.policy_chosen_logps + 1,
           "policy_rejected_logps": logps.policy_rejected_logps + 1}
    )  # fmt: skip
    torch.testing.assert_close(
        called("chipo", near, beta=0.1), called("sigmoid", near, beta=0.2), rtol=1e-6, atol=0
    )


def test_robust_is_unbiased_for_the_clean_label_and_smoothing_is_not():
    """Labels flipped at the rate e: the expected loss of both orders is that of the clean one."""
    logps = random_pairs(32, dtype=torch.float64)
    a, b, a0, b0, n, m = vars(logps).values()
    flipped = PairLogps(b, a, b0, a0, m, n)
    for name, is_unbiased in (("robust", True), ("sigmoid", False)):
        options = {"beta": 0.3, "label_smoothing": 0.2}
        expected = 0.8 * called(name, logps, **options) + 0.2 * called(name, flipped, **options)
        clean = called("sigmoid", logps, beta=0.3)
        assert torch.allclose(expected, clean, rtol=1e-10) == is_unbiased


def test_the_optima_are_where_the_papers_say():
    """Of nca in c: log 2 / beta. Of exo and of smoothed sigmoid in z: log((1 - e) / e)."""
    at = math.log(2) / 0.4
    nca = PairLogps(
        *(torch.tensor([x], dtype=torch.float64) for x in (at - 9, -5.0, -9.0, -5.0, 3.0, 3.0))
    )
    _, (chosen, *_) = gradients("nca_pair", nca, beta=0.4)
    assert chosen.item() == pytest.approx(0.0, abs=1e-13)
    for name in ("exo_pair", "sigmoid"):
        z = pairs([math.log(0.8 / 0.2) / 0.4])
        losses, (chosen, *_) = gradients(name, z, beta=0.4, label_smoothing=0.2)
        assert chosen.item() == pytest.approx(0.0, abs=1e-13)
        if name == "exo_pair":
            assert losses.item() == pytest.approx(0.0, abs=1e-13)


def test_what_losses_of_inputs_become():
    logps = random_pairs(32, dtype=torch.float64, scale=1.0)
    sigmoid, ones = called("sigmoid", logps, beta=0.3), torch.ones(32, dtype=torch.float64)
    equal = torch.testing.assert_close
    equal(called("wpo", logps, beta=0.3, on_policy_weights=ones), sigmoid)
    alike = {"phi": 2.0, "dispersions": math.exp(-1 / 2) * ones}
    equal(called("mallows", logps, beta=0.3, **alike), sigmoid)
    equal(called("tdpo1", logps, beta=0.3, chosen_kls=ones, rejected_kls=ones), sigmoid)
    target = math.log(0.8 / 0.2)
    scores = {"chosen_scores": target * ones, "rejected_scores": 0 * ones}
    smoothed = called("sigmoid", logps, beta=0.3, label_smoothing=0.2)
    equal(called("rpo_bwd_kl", logps, beta=0.3, **scores), smoothed - entropy(target))
    exo = called("exo_pair", logps, beta=0.3, label_smoothing=0.2)
    equal(called("rpo_fwd_kl", logps, beta=0.3, **scores), exo)
    certain = {"chosen_scores": 1e4 * ones, "rejected_scores": 0 * ones}
    equal(called("rpo_bwd_kl", logps, beta=0.3, **certain), sigmoid)


def test_what_losses_of_the_step_become():
    logps = random_pairs(32, dtype=torch.float64, scale=1.0)
    one = permuted(logps, slice(3, 4))
    for name in ("aot", "aot_unpaired", "dr_dpo"):
        torch.testing.assert_close(called(name, one, beta=0.3), called("sigmoid", one, beta=0.3))
    mean = called("sigmoid", logps, beta=0.3).mean()
    near = called("dr_dpo", logps, beta=0.3, robustness=1e6)
    torch.testing.assert_close(near, mean.expand(32), rtol=1e-6, atol=0)
    assert (called("dr_dpo", logps, beta=0.3) < mean).all()  # pairs with a high loss weigh less
    c, r = logps.chosen_logratios, logps.rejected_logratios
    fallen = PairLogps(**{
        **vars(logps),
        "policy_chosen_logps": logps.policy_chosen_logps - c.mean() - 1,
        "policy_rejected_logps": logps.policy_rejected_logps - r.mean() - 1,
    })  # fmt: skip
    torch.testing.assert_close(  # both reference points are 0
        called("kto_pair", fallen, beta=0.3), called("apo_zero", fallen, beta=0.3)
    )
    assert not torch.allclose(called("kto_pair", logps, beta=0.3),
                              called("apo_zero", logps, beta=0.3))  # fmt: skip


def test_dr_dpo_has_the_gradient_of_its_softmax_weights():
    logps = random_pairs(16, dtype=torch.float64)
    plain, of_plain = gradients("sigmoid", logps, beta=0.3)
    _, of_dr = gradients("dr_dpo", logps, beta=0.3, robustness=2.0)
    weights = (-plain / 2.0).softmax(0) * 16
    for got, theirs in zip(of_dr, of_plain, strict=True):
        torch.testing.assert_close(got, weights * theirs)


def test_bco_is_at_least_sigmoid_whatever_its_threshold():
    logps = random_pairs(64, dtype=torch.float64)
    for delta in (-3.0, 0.0, 0.4, 5.0):
        assert (called("bco_pair", logps, beta=0.3, delta=delta)
                >= called("sigmoid", logps, beta=0.3)).all()  # fmt: skip


@pytest.mark.parametrize("name", sorted(MEMORIES))
def test_a_memory_starts_neutral_and_moves_to_what_the_steps_show(name):
    """At the first step the policy is its reference: all gaps and rewards are 0, as remembered."""
    logps = random_pairs(8, dtype=torch.float64)
    same = PairLogps(*list(vars(logps).values())[2:4], *list(vars(logps).values())[2:])
    start, moved = MEMORIES[name]
    first = moved(start, same, 0.3)
    c, r = logps.chosen_logratios, logps.rejected_logratios
    second = moved(first, logps, 0.3)
    third = moved(second, permuted(logps, slice(0, 4)), 0.3)
    if name == "bco_pair":
        assert first == {"delta": 0.0, "count": 16.0}
        rewards = 0.3 * torch.cat([c, r])
        assert second["delta"] == pytest.approx(float(rewards.mean()) / 2, rel=1e-12)
        every = torch.cat([rewards, 0.3 * c[:4], 0.3 * r[:4]])
        assert third["delta"] == pytest.approx(float(every.sum()) / 40, rel=1e-12)
        assert third["count"] == 40
    gaps = c - r if name == "beta_dpo" else c / logps.chosen_lengths - r / logps.rejected_lengths
    if name != "bco_pair":
        assert first["gap_mean"] == 0.0
        assert second["gap_mean"] == pytest.approx(0.1 * float(gaps.mean()), rel=1e-12)
        wanted = 0.9 * second["gap_mean"] + 0.1 * float(gaps[:4].mean())
        assert third["gap_mean"] == pytest.approx(wanted, rel=1e-12)
    if name == "alpha_dpo":
        assert first["gap_deviation"] == pytest.approx(0.9)
        wanted = 0.81 + 0.1 * float(gaps.std(correction=0))
        assert second["gap_deviation"] == pytest.approx(wanted, rel=1e-12)
