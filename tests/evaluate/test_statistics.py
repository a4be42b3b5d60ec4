"""Statistics of held-out pairs, on numbers made up so that the results are known."""

import math

import numpy as np
import pytest

from dpo.evaluate.statistics import (
    group_statistics,
    length_controlled,
    pair_statistics,
    standard_error,
    wilson,
)


def columns(policy_chosen, policy_rejected, chosen_lengths=None, rejected_lengths=None, **others):
    """Columns of pairs whose model before training gave -10 nats to every answer."""
    n = len(policy_chosen)
    tens = np.full(n, -10.0)
    given = {
        "source": [""] * n,
        "chosen_lengths": chosen_lengths or [5] * n,
        "rejected_lengths": rejected_lengths or [5] * n,
        "policy_chosen_logps": policy_chosen,
        "policy_rejected_logps": policy_rejected,
        **{f"{m}_{s}_logps": tens for m in ("ref", "before") for s in ("chosen", "rejected")},
        "sampled_log_ratios": [math.nan] * n,
        **others,
    }
    return {name: np.array(values) for name, values in given.items()}


def test_a_wilson_interval_solves_its_equation():
    """Its ends are the shares p whose own error bar, 1.96 sqrt(p (1 - p) / n), reaches 61/200."""
    for end in wilson(61, 200):
        assert abs(61 / 200 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 200))


def test_a_wilson_interval_of_all_wins_is_not_empty():
    """n wins of n: the lower end is 1 / (1 + z^2 / n)."""
    low, high = wilson(10, 10)
    assert low == pytest.approx(1 / (1 + 1.959964**2 / 10))
    assert high == pytest.approx(1)


def test_the_standard_error_is_that_of_a_mean():
    """Deviations 1, 0, -1: variance 1 with n - 1, so sqrt(1 / 3); one value has none."""
    assert standard_error(np.array([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(1 / 3))
    assert standard_error(np.array([1.0])) is None


@pytest.fixture(params=[0, 8, -15])
def differences(request):
    """Whole tokens, symmetric about 0 or leaning to one side."""
    rng = np.random.default_rng(0)
    return np.round(rng.normal(request.param, 20, 400))


def test_a_judge_of_length_alone_wins_half_at_equal_lengths(differences):
    prefers_longer = (np.sign(differences) + 1) / 2
    for outcomes in (prefers_longer, 1 - prefers_longer):
        assert length_controlled(outcomes, differences) == pytest.approx(0.5, abs=0.06)


def test_without_control_a_judge_of_length_alone_does_not_win_half():
    """The negative control: the plain mean follows the lengths."""
    differences = np.round(np.random.default_rng(0).normal(-15, 20, 400))
    assert (differences > 0).mean() < 0.3


def test_outcomes_that_do_not_depend_on_length_keep_their_mean(differences):
    outcomes = np.random.default_rng(1).random(400) < 0.7
    assert length_controlled(outcomes, differences) == pytest.approx(outcomes.mean(), abs=0.03)


def test_all_wins_stay_near_one_and_all_losses_near_zero(differences):
    assert length_controlled(np.ones(400), differences) > 0.999
    assert length_controlled(np.zeros(400), differences) < 0.001


def test_the_model_that_made_the_outcomes_is_found(differences):
    """P(win) = sigmoid(0.8 + 1.5 tanh(d / s)) is worth sigmoid(0.8) = 0.69 at equal lengths."""
    x = np.tanh(differences / differences.std())
    outcomes = 1 / (1 + np.exp(-(0.8 + 1.5 * x)))  # the expected outcomes: no luck in it
    assert length_controlled(outcomes, differences) == pytest.approx(0.68997, abs=1e-3)
    assert abs(outcomes.mean() - 0.68997) > 0.01


def test_swapping_the_sides_gives_the_rest_to_one(differences):
    outcomes = np.random.default_rng(2).random(400) < 0.3
    swapped = length_controlled(1.0 - outcomes, -differences)
    assert swapped == pytest.approx(1 - length_controlled(outcomes, differences), abs=1e-6)


def test_equal_lengths_need_no_control_and_equal_differences_allow_none():
    assert length_controlled([1, 0.5, 0, 1], [0, 0, 0, 0]) == pytest.approx(0.625)
    assert length_controlled([1, 0], [3, 3]) is None


def test_the_figures_of_four_pairs():
    """Beta 0.5 and reference -10 everywhere: margin = 0.5 (policy chosen - policy rejected).

    pair     chosen  rejected  margin  change of chosen
      0        -8      -12        2         +2
      1       -11      -15        2         -1
      2       -10      -10        0          0      a tie: not right
      3       -12       -9     -1.5         -2
    """
    f = pair_statistics(columns([-8, -11, -10, -12], [-12, -15, -10, -9]), beta=0.5)
    assert f["pairs"] == 4
    assert f["reward_accuracy"] == 0.5
    assert f["reward_accuracy_95"] == wilson(2, 4)
    assert f["reward_margin"] == pytest.approx(2.5 / 4)
    assert f["reward_margin_se"] == pytest.approx(np.std([2, 2, 0, -1.5], ddof=1) / 2)
    assert f["reward_margin_quantiles"]["50%"] == 1.0
    assert f["ranking_accuracy"] == 0.5
    assert f["ranking_accuracy_before"] == 0.0
    assert f["logp_chosen_change"] == pytest.approx(-0.25)
    assert f["logp_rejected_change"] == pytest.approx(-1.5)
    assert f["chosen_fell"] == 0.5
    assert f["kl"] is None


def test_ranking_per_token_does_not_favour_the_shorter_answer():
    """-6 over 6 tokens against -4 over 2: the sum prefers the rejected one, the mean the chosen."""
    f = pair_statistics(columns([-6.0], [-4.0], [6], [2]), beta=1.0)
    assert (f["ranking_accuracy"], f["ranking_accuracy_per_token"]) == (0.0, 1.0)


def test_kl_is_over_the_prompts_that_were_answered():
    f = pair_statistics(
        columns([0] * 3, [0] * 3, sampled_log_ratios=[1.0, math.nan, 4.0]), beta=1.0
    )
    assert (f["kl"], f["kl_answers"]) == (2.5, 2)
    assert f["kl_se"] == pytest.approx(1.5)


def test_every_grouping_holds_each_pair_once():
    rng = np.random.default_rng(3)
    n = 90
    lengths = [rng.integers(1, 50, n).tolist() for _ in range(2)]
    source = ["orca" if i % 3 else "hh" for i in range(n)]
    given = columns(rng.normal(-10, 3, n), rng.normal(-12, 3, n), *lengths, source=source)
    groups = group_statistics(given, beta=0.1)
    for kind in ("by_source", "by_length", "by_longer"):
        assert sum(f["pairs"] for f in groups[kind].values()) == groups["all"]["pairs"] == n
        mean = sum(f["pairs"] * f["reward_accuracy"] for f in groups[kind].values()) / n
        assert mean == pytest.approx(groups["all"]["reward_accuracy"])
    assert {name: f["pairs"] for name, f in groups["by_source"].items()} == {"hh": 30, "orca": 60}
    assert [20 <= f["pairs"] <= 40 for f in groups["by_length"].values()] == [True] * 3


def test_one_source_is_no_group():
    groups = group_statistics(columns([-8.0], [-9.0]), beta=0.1)
    assert "by_source" not in groups
    assert list(groups["by_length"]) == ["10 tokens"]
    assert list(groups["by_longer"]) == ["equally long"]


@pytest.mark.parametrize("shift", [10, 50, 300, -10])
def test_where_one_side_is_always_longer_nothing_is_said(shift):
    """Read at equal lengths, the curve would be a guess: the ridge's, not the data's."""
    generator = np.random.default_rng(0)
    outcomes = (generator.random(200) < 0.9).astype(float)
    assert length_controlled(outcomes, np.full(200, shift) + generator.random(200)) is None
