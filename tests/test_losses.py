import inspect
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch

from dpo.losses import (
    LOSSES,
    MEMORIES,
    WITHOUT_REFERENCE,
    PairLogps,
    hinge,
    implicit_rewards,
    ipo,
    sigmoid,
)
from dpo.objective import FROM_ROWS, FROM_TOKENS
from tests.loss_inputs import called

every_loss = pytest.mark.parametrize("loss", [partial(called, name) for name in LOSSES], ids=LOSSES)


def pairs(gaps, *, lengths=(4, 2), dtype=torch.float64, requires_grad=False):
    """One pair per gap: chosen log-ratio gap - 1, rejected -1; the references are -20 and -30."""
    gaps = torch.as_tensor(gaps, dtype=dtype)
    ones = torch.ones_like(gaps)
    return PairLogps(
        (-20 + gaps - 1).requires_grad_(requires_grad),
        (-30 * ones - 1).requires_grad_(requires_grad),
        -20 * ones,
        -30 * ones,
        torch.full(gaps.shape, lengths[0]),
        torch.full(gaps.shape, lengths[1]),
    )


def random_pairs(num_pairs, *, dtype=torch.float32, scale=5.0):
    """Pairs as they come: sums of some 10 to 60 nats, every length different."""
    generator = torch.Generator().manual_seed(3)

    def logps(mean):
        return (mean + scale * torch.randn(num_pairs, generator=generator)).to(dtype)

    lengths = torch.arange(1, num_pairs + 1)
    return PairLogps(logps(-40), logps(-35), logps(-41), logps(-33), lengths, lengths + 3)


def permuted(logps, order):
    return PairLogps(*(vector[order] for vector in vars(logps).values()))


def swapped(logps):
    """Chosen and rejected exchanged: every label flipped."""
    return PairLogps(
        logps.policy_rejected_logps,
        logps.policy_chosen_logps,
        logps.ref_rejected_logps,
        logps.ref_chosen_logps,
        logps.rejected_lengths,
        logps.chosen_lengths,
    )


def test_the_gap_is_the_chosen_minus_the_rejected_logratio():
    """Chosen -10 - -12 = 2, rejected -9 - -8 = -1; the gap is 2 - -1 = 3."""
    logps = PairLogps(*(torch.tensor([x]) for x in (-10.0, -9.0, -12.0, -8.0, 5.0, 5.0)))
    assert logps.chosen_logratios.tolist() == [2.0]
    assert logps.rejected_logratios.tolist() == [-1.0]
    assert logps.logratio_gap.tolist() == [3.0]


def test_pair_logps_takes_positions_and_keywords_alike_and_cannot_be_changed():
    vectors = [torch.tensor([float(i)]) for i in range(6)]
    by_position = PairLogps(*vectors)
    by_keyword = PairLogps(
        rejected_lengths=vectors[5],
        chosen_lengths=vectors[4],
        ref_rejected_logps=vectors[3],
        ref_chosen_logps=vectors[2],
        policy_rejected_logps=vectors[1],
        policy_chosen_logps=vectors[0],
    )
    assert list(vars(by_position).items()) == list(vars(by_keyword).items())
    with pytest.raises(FrozenInstanceError):
        by_position.policy_chosen_logps = vectors[1]


def test_pair_logps_refuses_vectors_of_different_lengths_in_the_tests():
    """The negative control of every shape in these files: jaxtyping does watch."""
    vectors = [torch.zeros(3)] * 5
    with pytest.raises(TypeError, match="rejected_lengths"):
        PairLogps(*vectors, torch.zeros(2))


# ------------------------------------------------------------------------------------- sigmoid


def test_sigmoid_is_ln_2_when_policy_and_reference_agree():
    """Gap 0: -log sigmoid(0) = -log(1/2) = ln 2 = 0.693147180559945."""
    assert sigmoid(pairs([0.0]), beta=0.1).item() == pytest.approx(0.693147180559945, abs=1e-15)


def test_sigmoid_at_known_gaps():
    """beta 0.5, z = beta gap; -log sigmoid(z) = log(1 + e^-z).

    gap  2, z  1: log(1 + 0.367879441171442) = 0.313261687518223
    gap -2, z -1: log(1 + 2.718281828459045) = 1.313261687518223
    gap  4, z  2: log(1 + 0.135335283236613) = 0.126928011042972
    """
    losses = sigmoid(pairs([2.0, -2.0, 4.0]), beta=0.5)
    wanted = [0.313261687518223, 1.313261687518223, 0.126928011042972]
    assert losses.tolist() == pytest.approx(wanted, abs=1e-14)


def test_label_smoothing_mixes_the_losses_of_both_labels():
    """beta 0.5, gap 2, z 1, smoothing 0.1: 0.9 x 0.313261687518223 + 0.1 x 1.313261687518223.

    0.281935518766401 + 0.131326168751822 = 0.413261687518223 (log sigmoid is linear in the flip:
    -log sigmoid(-z) = z - log sigmoid(z), so the loss rises by 0.1 z = 0.1).
    """
    loss = sigmoid(pairs([2.0]), beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.413261687518223, abs=1e-14)


def test_label_smoothing_has_its_minimum_where_the_policy_says_the_flip_rate():
    """d loss / dz = sigmoid(z) - (1 - e) = 0 at z = log((1 - e) / e): for e 0.1, ln 9.

    With beta 0.5 that is a gap of 2 ln 9 = 4.394449154672439.
    """
    logps = pairs([4.394449154672439], requires_grad=True)
    sigmoid(logps, beta=0.5, label_smoothing=0.1).sum().backward()
    assert logps.policy_chosen_logps.grad.item() == pytest.approx(0.0, abs=1e-15)
    without = pairs([4.394449154672439], requires_grad=True)
    sigmoid(without, beta=0.5).sum().backward()
    assert without.policy_chosen_logps.grad.item() == pytest.approx(-0.05, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_swapping_the_answers_is_flipping_the_label(smoothing):
    """sigmoid's loss of a swapped pair is the one with the flip's probability, 1 - smoothing."""
    logps = random_pairs(16, dtype=torch.float64)
    flipped = sigmoid(swapped(logps), beta=0.3, label_smoothing=smoothing)
    same = sigmoid(logps, beta=0.3, label_smoothing=1 - smoothing)
    torch.testing.assert_close(flipped, same, rtol=0, atol=1e-13)
    assert not torch.allclose(flipped, sigmoid(logps, beta=0.3, label_smoothing=smoothing))


@pytest.mark.parametrize("gap", [-30.0, -2.0, 0.0, 1.0, 30.0])
def test_gradient_of_sigmoid_is_minus_beta_times_the_probability_of_being_wrong(gap):
    """d/d logp_chosen -log sigmoid(beta gap) = -beta sigmoid(-beta gap); rejected: the opposite."""
    beta = 0.2
    logps = pairs([gap], requires_grad=True)
    sigmoid(logps, beta=beta).sum().backward()
    wanted = -beta / (1 + math.exp(beta * gap))
    assert logps.policy_chosen_logps.grad.item() == pytest.approx(wanted, rel=1e-13)
    assert logps.policy_rejected_logps.grad.item() == pytest.approx(-wanted, rel=1e-13)


# ----------------------------------------------------------------------------------------- ipo


def test_ipo_is_zero_when_the_average_gap_is_half_over_beta():
    """beta 0.1: the target is 1 / 0.2 = 5 nats a token.

    Chosen: log-ratio 24 over 4 tokens is 6; rejected: log-ratio 2 over 2 tokens is 1; 6 - 1 = 5.
    """
    logps = PairLogps(*(torch.tensor([x]) for x in (-6.0, -8.0, -30.0, -10.0, 4.0, 2.0)))
    assert ipo(logps, beta=0.1).item() == pytest.approx(0.0, abs=1e-10)


def test_ipo_reads_per_token_means_and_not_sums():
    """beta 0.5, target 1. Chosen log-ratio 8 over 4 tokens: 2; rejected 3 over 6 tokens: 0.5.

    Means: (2 - 0.5 - 1)^2 = 0.25. Sums would give (8 - 3 - 1)^2 = 16.
    """
    logps = PairLogps(*(torch.tensor([x]) for x in (-12.0, -7.0, -20.0, -10.0, 4.0, 6.0)))
    assert ipo(logps, beta=0.5).item() == 0.25


def test_gradient_of_ipo_is_shared_by_the_tokens_of_an_answer():
    """The pair of the test above: d loss / d logp_chosen = 2 x 0.5 / 4 tokens = 0.25.

    Rejected: -2 x 0.5 / 6 tokens = -0.166666666666667.
    """
    values = (-12.0, -7.0, -20.0, -10.0, 4.0, 6.0)
    vectors = [torch.tensor([x], dtype=torch.float64) for x in values]
    vectors[0].requires_grad_()
    vectors[1].requires_grad_()
    ipo(PairLogps(*vectors), beta=0.5).sum().backward()
    assert vectors[0].grad.item() == pytest.approx(0.25, abs=1e-15)
    assert vectors[1].grad.item() == pytest.approx(-0.166666666666667, abs=1e-14)


# --------------------------------------------------------------------------------------- hinge


def test_hinge_falls_with_slope_beta_and_is_flat_beyond_the_margin():
    """max(0, 1 - 0.5 gap): 2, 1, 0.5 with slope -0.5 at gaps -2, 0, 1; 0 and flat at 3 and 40."""
    logps = pairs([-2.0, 0.0, 1.0, 3.0, 40.0], requires_grad=True)
    losses = hinge(logps, beta=0.5)
    losses.sum().backward()
    assert losses.tolist() == [2.0, 1.0, 0.5, 0.0, 0.0]
    assert logps.policy_chosen_logps.grad.tolist() == [-0.5, -0.5, -0.5, 0.0, 0.0]
    assert logps.policy_rejected_logps.grad.tolist() == [0.5, 0.5, 0.5, 0.0, 0.0]


# ------------------------------------------------------------------------------------- rewards


def test_implicit_rewards_are_beta_times_the_logratios_and_carry_no_gradient():
    """beta 0.5: chosen 0.5 x (-10 - -12) = 1, rejected 0.5 x (-9 - -8) = -0.5."""
    vectors = [torch.tensor([x]) for x in (-10.0, -9.0, -12.0, -8.0, 5.0, 5.0)]
    vectors[0].requires_grad_()
    vectors[1].requires_grad_()
    chosen, rejected = implicit_rewards(PairLogps(*vectors), beta=0.5)
    assert (chosen.tolist(), rejected.tolist()) == ([1.0], [-0.5])
    assert not chosen.requires_grad
    assert not rejected.requires_grad


def test_the_reward_margin_is_what_the_sigmoid_loss_reads():
    """loss = log(1 + e^-margin) for every pair."""
    logps = random_pairs(16, dtype=torch.float64)
    chosen, rejected = implicit_rewards(logps, beta=0.3)
    wanted = torch.log1p(torch.exp(-(chosen - rejected)))
    torch.testing.assert_close(sigmoid(logps, beta=0.3), wanted, rtol=1e-12, atol=1e-14)


# ------------------------------------- laws for every loss; more are in tests/test_every_loss.py


def test_a_naive_sigmoid_is_not_finite_at_a_huge_gap():
    """The negative control of that law: log(sigmoid(z)) as it is often written."""
    logps = pairs([-1e4], dtype=torch.float32)
    assert not torch.log(torch.sigmoid(0.5 * logps.logratio_gap)).isfinite().all()


# discopop and apo_down turn near 0; rpo_* have a target; alpha_dpo's margin falls with the gap.
MONOTONE = LOSSES.keys() - WITHOUT_REFERENCE - {"discopop", "apo_down", "alpha_dpo"}
MONOTONE -= {"rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}


@pytest.mark.parametrize("name", sorted(MONOTONE))
def test_raising_the_reference_of_the_chosen_answer_raises_the_loss(name):
    loss, logps = partial(called, name), pairs([0.0, 1.0])
    harder = PairLogps(*vars(logps).values())
    object.__setattr__(harder, "ref_chosen_logps", logps.ref_chosen_logps + 1)
    assert (loss(harder, beta=0.1) > loss(logps, beta=0.1)).all()


@every_loss
@pytest.mark.parametrize("num_pairs", [0, 1, 16])
def test_there_is_one_loss_per_pair_and_one_gradient_per_answer(loss, num_pairs):
    logps = random_pairs(num_pairs)
    logps.policy_chosen_logps.requires_grad_()
    losses = loss(logps, beta=0.1)
    losses.sum().backward()
    assert losses.shape == (num_pairs,)
    assert logps.policy_chosen_logps.grad.shape == (num_pairs,)
    chosen, rejected = implicit_rewards(logps, beta=0.1)
    assert chosen.shape == rejected.shape == (num_pairs,)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_log_probs_is_the_dtype_of_the_losses(loss, dtype):
    """Half precision is accepted too; the loss of the same rounded inputs is exact to 2 %."""
    logps = random_pairs(16, dtype=dtype, scale=1.0)
    losses = loss(logps, beta=0.1)
    assert losses.dtype == dtype
    exact = PairLogps(*(v.double() if v.is_floating_point() else v for v in vars(logps).values()))
    wanted = loss(exact, beta=0.1)
    tolerance = {torch.float64: 0.0, torch.float32: 1e-5}.get(dtype, 2e-2)
    fits = wanted.abs() < 1000  # exponentials of alphapo leave half precision
    assert fits.sum() >= 12
    torch.testing.assert_close(losses[fits].double(), wanted[fits], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_keywords_and_what_has_no_default_is_an_input(name):
    """What the trainer relies on: it gives beta, and the inputs that a loss asks for by name."""
    logps, *keywords = inspect.signature(LOSSES[name]).parameters.values()
    assert logps.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(keyword.kind == inspect.Parameter.KEYWORD_ONLY for keyword in keywords)
    remembered = MEMORIES[name].start.keys() if name in MEMORIES else set()
    given = {k.name for k in keywords if k.default is inspect.Parameter.empty}
    assert "beta" in given
    assert given - {"beta"} <= FROM_ROWS | FROM_TOKENS | remembered


# ------------------------------------------------------------------------------------- imports


def _loaded_by(code: str) -> str:
    """Which heavy libraries a fresh interpreter has loaded after `code`."""
    heavy = "{'transformers', 'accelerate', 'peft', 'datasets'}"
    code = f"{code}; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_maths_loads_without_transformers_accelerate_peft_or_datasets():
    """One process for losses, logps and metrics: what all of them load, each one loads at most."""
    assert _loaded_by("import dpo.losses, dpo.logps, dpo.metrics") == "[]"


def test_the_import_check_sees_a_heavy_library():
    """The negative control of the test above."""
    code = "import sys, types; sys.modules['accelerate'] = types.ModuleType('accelerate')"
    assert _loaded_by(code) == "['accelerate']"
