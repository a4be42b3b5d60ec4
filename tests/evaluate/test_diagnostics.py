"""Diagnostics: what is found in a run's metrics, when, and how often."""

import re
from pathlib import Path

import pytest

from dpo.evaluate.diagnostics import LOOK_BACK, Watch, diagnose

BETA = 0.1
DOCS = Path(__file__).parents[2] / "docs" / "diagnostics.md"


def training(step, **changed):
    """A healthy line of training."""
    values = {"loss": 0.4, "rewards/accuracies": 0.9, "rewards/chosen": 0.2, "lengths/chosen": 10.0}
    values |= changed
    return {"step": step} | {f"train/{name}": value for name, value in values.items()}


def evaluation(step, **changed):
    """A healthy line of evaluation."""
    values = {
        "loss": 0.4,
        "rewards/accuracies": 0.9,
        "ranking_accuracy": 0.8,
        "logps/chosen": -20.0 if step == 0 else -19.0,
        "lengths/chosen": 10.0,
        "displacement": 0.0 if step == 0 else -0.1,
        "displacement_error": 0.01,
        "kl": 1.0,
        "lengths/generated": 10.0,
    } | changed
    return {"step": step} | {f"eval/{name}": value for name, value in values.items()}


def keys(lines):
    return [finding.key for finding in diagnose(lines, BETA)]


def steps(count, **changed):
    return [training(step, **changed) for step in range(1, count + 1)]


def test_a_healthy_run_has_no_findings():
    """The negative control of everything below."""
    assert keys([evaluation(0), *steps(50), evaluation(50)]) == []


@pytest.mark.parametrize(
    ("key", "changed", "not_yet"),
    [
        ("displacement", {"displacement": 0.021}, {"displacement": 0.019}),
        (
            "displacement",
            {"displacement": 0.121, "displacement_error": 0.06},
            {"displacement": 0.119, "displacement_error": 0.06},
        ),
        ("kl", {"kl": 5.1}, {"kl": 4.9}),  # 0.5 nats x 10 tokens
        ("length_drift", {"lengths/generated": 12.1}, {"lengths/generated": 11.9}),
        ("length_drift", {"lengths/generated": 7.9}, {"lengths/generated": 8.1}),
    ],
)
def test_an_evaluation_past_the_bound_is_found_and_one_before_it_is_not(key, changed, not_yet):
    assert keys([evaluation(0), evaluation(9, **changed)]) == [key]
    assert keys([evaluation(0), evaluation(9, **not_yet)]) == []


def test_a_ranking_that_stays_behind_is_found_once_it_no_longer_rises():
    """Reward accuracy 0.9; every run passes through a gap, a healthy one quickly."""
    rankings = (0.3, 0.58, 0.6, 0.62)
    lines = [evaluation(i, ranking_accuracy=value) for i, value in enumerate(rankings)]
    assert [(finding.key, finding.step) for finding in diagnose(lines, BETA)] == [("ranking", 3)]
    assert keys(lines[:3]) == []
    assert keys([*lines[:3], evaluation(3, ranking_accuracy=0.66)]) == []


def test_saturation_is_perfect_accuracy_and_a_loss_near_zero_over_a_window():
    """As in the article: loss near 0 before step 50, accuracy 1.0."""
    saturated = {"loss": 0.01, "rewards/accuracies": 1.0}
    (finding,) = diagnose(steps(30, **saturated), BETA)
    assert (finding.key, finding.step) == ("saturation", LOOK_BACK)
    assert "0.010" in finding.saw
    assert "100.0%" in finding.saw
    assert keys(steps(LOOK_BACK - 1, **saturated)) == []
    assert keys(steps(30, loss=0.01, **{"rewards/accuracies": 0.9})) == []
    assert keys(steps(30, loss=0.3, **{"rewards/accuracies": 1.0})) == []


def test_one_lucky_step_is_not_saturation():
    lines = steps(30)
    lines[20] = training(21, loss=0.0, **{"rewards/accuracies": 1.0})
    assert keys(lines) == []


def test_a_run_that_holds_nothing_out_is_told_of_displacement_by_its_training_rewards():
    """The bound is 0.02 nats a token: at beta 0.1 and 10 tokens a reward of -0.02."""
    (finding,) = diagnose(steps(30, **{"rewards/chosen": -0.021}), BETA)
    assert (finding.key, finding.step) == ("displacement", LOOK_BACK)
    assert "0.021 nats of log-prob a token" in finding.saw
    assert keys(steps(30, **{"rewards/chosen": -0.019})) == []
    noise = [training(i, **{"rewards/chosen": (-1) ** i * 2 - 0.03}) for i in range(1, 30)]
    assert keys(noise) == []


def test_held_out_pairs_decide_where_there_are_any():
    """Training pairs are another sample: theirs is not said beside the held-out figure."""
    assert keys([evaluation(0), *steps(30, **{"rewards/chosen": -0.1}), evaluation(30)]) == []


def test_without_a_reference_rewards_say_nothing_of_displacement():
    """With reference.mode zero the reward is beta x log-prob: negative from the first step on."""
    assert diagnose(steps(30, **{"rewards/chosen": -2.0}), beta=None) == []


def test_without_a_reference_there_is_no_kl_and_the_length_is_still_watched():
    lines = [evaluation(0), evaluation(9, **{"lengths/generated": 20.0})]
    for line in lines:
        del line["eval/kl"]
    assert [finding.key for finding in diagnose(lines, beta=None)] == ["length_drift"]


def test_each_finding_comes_once_where_it_was_first_seen():
    watch = Watch(BETA)
    lines = [evaluation(0), evaluation(5, kl=9.0), evaluation(9, kl=10.0, displacement=1.0)]
    found = [[finding.key for finding in watch.see(line)] for line in lines]
    assert found == [[], ["kl"], ["displacement"]]


def test_a_finding_comes_again_when_it_has_grown_tenfold():
    falls = (0.0, 0.03, 0.06, 0.29, 0.31, 0.9, 3.2)
    lines = [evaluation(i, displacement=fall) for i, fall in enumerate(falls)]
    assert [finding.step for finding in diagnose(lines, BETA)] == [1, 4, 6]


def test_an_evaluation_of_an_older_version_is_read_by_its_mean():
    lines = [evaluation(0), evaluation(9, **{"logps/chosen": -20.3})]
    for line in lines:
        del line["eval/displacement"], line["eval/displacement_error"]
    assert keys(lines) == ["displacement"]


def test_a_loss_that_jumps_is_said_and_a_noisy_one_is_not():
    calm = [training(i, loss=0.4 + 0.01 * (i % 2)) for i in range(1, 20)]
    assert keys([*calm, training(20, loss=0.9)]) == ["spike"]
    assert keys([*calm, training(20, loss=0.79)]) == []
    noisy = [training(i, loss=0.2 + 0.4 * (i % 2)) for i in range(1, 20)]
    assert keys([*noisy, training(20, loss=1.2)]) == []


def test_an_accuracy_that_falls_far_is_said():
    fallen = [training(i, **{"rewards/accuracies": 0.6}) for i in range(31, 50)]
    found = diagnose([*steps(30), *fallen], BETA)
    assert [finding.key for finding in found] == ["collapse"]
    assert 31 < found[0].step <= 40
    slightly = [training(i, **{"rewards/accuracies": 0.7}) for i in range(31, 50)]
    assert keys([*steps(30), *slightly]) == []


def test_every_finding_says_what_was_seen_what_it_means_and_what_to_try():
    bad = {"kl": 50.0, "lengths/generated": 30.0, "displacement": 2.0, "ranking_accuracy": 0.1}
    saturated = steps(20, loss=0.0, **{"rewards/accuracies": 1.0})
    evaluations = [evaluation(0, ranking_accuracy=0.1), evaluation(9, ranking_accuracy=0.1)]
    found = diagnose([*evaluations, *saturated, evaluation(20, **bad)], BETA)
    assert {finding.key for finding in found} == {
        "saturation", "displacement", "ranking", "kl", "length_drift",
    }  # fmt: skip
    for finding in found:
        assert re.search(r"\d", finding.saw)
        for sentence in (finding.saw, finding.means, finding.try_this):
            assert sentence.endswith(".")
            assert sentence in str(finding)


def test_every_finding_is_explained_in_the_docs():
    headings = re.findall(r"^## .*`(\w+)`", DOCS.read_text(), flags=re.MULTILINE)
    assert set(headings) >= {"saturation", "displacement", "ranking", "kl", "length_drift"}
    assert "`spike` and `collapse`" in DOCS.read_text()
