"""Laws that every loss and every option keeps: values, gradients, limits, step 0, far out."""

import inspect
import math

import numpy as np
import pytest
import torch

from dpo.losses import LOSSES, WITHOUT_REFERENCE, PairLogps
from dpo.objective import Part, check_part, checked_objective
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
        assert tried == options.keys() - {"logps", "beta"}, name


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_can_be_configured(name):
    """With its default, but the smoothing of losses that are about wrong labels."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    part = Part(name, 1.0, given | {"beta": 0.1})
    check_part(part, "adapter")
    assert checked_objective([part], "adapter")(random_pairs(3)).shape == (3,)


def gradients(loss, logps, **options):
    """Losses, and d sum / d of the four log-probs; 0 where nothing is read."""
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps")
    names += ("ref_rejected_logps",)
    inputs = {name: getattr(logps, name).detach().clone().requires_grad_() for name in names}
    losses = loss(PairLogps(**{**vars(logps), **inputs}), **options)
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
    wanted = in_numpy(a, b, a0, b0, n, m, beta, **options)[name]
    got = LOSSES[name](logps, beta=beta, **options).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)
    other = in_numpy(a, b, a0, b0, n, m, beta * 1.01, **options)[name]  # that could fail
    if name not in ("simper", "slic", "sft"):
        assert not np.allclose(got, other, rtol=1e-11, atol=1e-12)


@every_case
def test_its_gradient_is_right_and_half_of_it_would_be_noticed(name, options):
    logps = random_pairs(12, dtype=torch.float64, scale=2.0)
    loss, rest = LOSSES[name], list(vars(logps).values())[4:]
    inputs = [(vector / 8).requires_grad_() for vector in list(vars(logps).values())[:4]]
    assert torch.autograd.gradcheck(
        lambda *vectors: loss(PairLogps(*vectors, *rest), beta=0.3, **options), inputs
    )
    assert not torch.autograd.gradcheck(
        lambda *vectors: Halved.apply(loss(PairLogps(*vectors, *rest), beta=0.3, **options)),
        inputs,
        raise_exception=False,
    )


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
            losses, grads = gradients(
                LOSSES[name], PairLogps(*vectors, *sizes), beta=beta, **options
            )
            assert losses.isfinite().all()
            assert all(grad.isfinite().all() for grad in grads)


@every_case
def test_permuting_pairs_permutes_losses_and_none_sees_another(name, options):
    logps, order = random_pairs(16), torch.randperm(16)
    losses = LOSSES[name](logps, beta=0.1, **options)
    shuffled = LOSSES[name](permuted(logps, order), beta=0.1, **options)
    assert torch.equal(shuffled, losses[order])
    alone = [LOSSES[name](permuted(logps, slice(i, i + 1)), beta=0.1, **options) for i in range(16)]
    torch.testing.assert_close(torch.cat(alone), losses)


@every_case
def test_it_reads_its_reference_or_it_says_that_it_does_not(name, options):
    """A shift of policy and reference alike changes nothing; one of the reference alone does."""
    logps = random_pairs(16, dtype=torch.float64, scale=2.0)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    moved = PairLogps(**{**vars(logps), **{n: getattr(logps, n) + 3 for n in names}})
    moved = PairLogps(**{**vars(moved), "ref_chosen_logps": moved.ref_chosen_logps + 1})
    losses = LOSSES[name](logps, beta=0.3, **options)
    others = LOSSES[name](moved, beta=0.3, **options)
    assert torch.equal(losses, others) == (name in WITHOUT_REFERENCE)
    if name not in WITHOUT_REFERENCE:
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
            LOSSES[name](alike, beta=0.3, **options), losses, rtol=1e-9, atol=1e-9
        )


LN2 = math.log(2)
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
}


@every_case
def test_its_value_at_step_0_is_the_known_one(name, options):
    """Policy = reference; answers of one length, since scores per token do not cancel otherwise."""
    if name not in AT_START:
        pytest.skip("it depends on lengths, or on the log-probs themselves")
    logps = pairs([0.0])
    same = PairLogps(
        logps.ref_chosen_logps, logps.ref_rejected_logps, *list(vars(logps).values())[2:4],
        torch.tensor([4]), torch.tensor([4]),
    )  # fmt: skip
    got = LOSSES[name](same, beta=0.3, **options).item()
    assert got == pytest.approx(AT_START[name](beta=0.3, **options), rel=1e-12)


def test_the_kinks_have_the_gradient_0_of_relu():
    """Dpop's first step: -beta / 2 on the chosen log-prob, and not (1 + penalty) times as much."""
    logps = pairs([0.0])
    same = PairLogps(*list(vars(logps).values())[2:4], *list(vars(logps).values())[2:])
    _, (chosen, rejected, *_) = gradients(LOSSES["dpop"], same, beta=0.3, penalty=50.0)
    assert chosen.item() == pytest.approx(-0.15)
    assert rejected.item() == pytest.approx(0.15)
    _, (chosen, *_) = gradients(LOSSES["hinge"], pairs([2.0]), beta=0.5)  # z is 1
    assert chosen.item() == 0.0
    even = PairLogps(*(torch.tensor([x]).double() for x in (-4.0, -5.0, 0.0, 0.0, 1.0, 1.0)))
    _, (chosen, *_) = gradients(LOSSES["slic"], even, beta=0.1, margin=1.0, sft_weight=0.1)
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
        LOSSES[n](logps, beta=0.3, **o) for n, o in ((name, options), (other, its_options))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    by_default = LOSSES[name](logps, beta=0.3)
    assert torch.allclose(by_default, wanted) == (name == other and not its_options)


def test_sigmoid_norm_of_single_tokens_is_sigmoid_and_simpo_has_a_reference_of_0():
    logps = random_pairs(32, dtype=torch.float64)
    ones = torch.ones(32)
    short = PairLogps(*list(vars(logps).values())[:4], ones, ones)
    torch.testing.assert_close(
        LOSSES["sigmoid_norm"](short, beta=0.2), LOSSES["sigmoid"](short, beta=0.2)
    )
    zeros = torch.zeros(32, dtype=torch.float64)
    bare = PairLogps(*list(vars(logps).values())[:2], zeros, zeros, *list(vars(logps).values())[4:])
    torch.testing.assert_close(
        LOSSES["simpo"](bare, beta=0.2, gamma_over_beta=0.0), LOSSES["sigmoid_norm"](bare, beta=0.2)
    )
    torch.testing.assert_close(
        LOSSES["cpo"](bare, beta=0.2, sft_weight=0.0), LOSSES["sigmoid"](bare, beta=0.2)
    )


def test_chipo_of_small_ratios_is_sigmoid_with_twice_the_beta():
    logps = pairs([1e-4, -2e-4])
    near = PairLogps(
        **{**vars(logps), "policy_chosen_logps": logps.policy_chosen_logps + 1,
           "policy_rejected_logps": logps.policy_rejected_logps + 1}
    )  # fmt: skip
    torch.testing.assert_close(
        LOSSES["chipo"](near, beta=0.1), LOSSES["sigmoid"](near, beta=0.2), rtol=1e-6, atol=0
    )


def test_robust_is_unbiased_for_the_clean_label_and_smoothing_is_not():
    """Labels flipped at the rate e: the expected loss of both orders is that of the clean one."""
    logps = random_pairs(32, dtype=torch.float64)
    a, b, a0, b0, n, m = vars(logps).values()
    flipped = PairLogps(b, a, b0, a0, m, n)
    for name, is_unbiased in (("robust", True), ("sigmoid", False)):
        options = {"beta": 0.3, "label_smoothing": 0.2}
        expected = 0.8 * LOSSES[name](logps, **options) + 0.2 * LOSSES[name](flipped, **options)
        clean = LOSSES["sigmoid"](logps, beta=0.3)
        assert torch.allclose(expected, clean, rtol=1e-10) == is_unbiased


def test_the_optima_are_where_the_papers_say():
    """Of nca in c: log 2 / beta. Of exo and of smoothed sigmoid in z: log((1 - e) / e)."""
    at = math.log(2) / 0.4
    nca = PairLogps(
        *(torch.tensor([x], dtype=torch.float64) for x in (at - 9, -5.0, -9.0, -5.0, 3.0, 3.0))
    )
    _, (chosen, *_) = gradients(LOSSES["nca_pair"], nca, beta=0.4)
    assert chosen.item() == pytest.approx(0.0, abs=1e-13)
    for name in ("exo_pair", "sigmoid"):
        z = pairs([math.log(0.8 / 0.2) / 0.4])
        losses, (chosen, *_) = gradients(LOSSES[name], z, beta=0.4, label_smoothing=0.2)
        assert chosen.item() == pytest.approx(0.0, abs=1e-13)
        if name == "exo_pair":
            assert losses.item() == pytest.approx(0.0, abs=1e-13)
