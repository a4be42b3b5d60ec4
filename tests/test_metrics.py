import math

import pytest
import torch

from dpo.catalogue import CATALOGUE, PAIR_METRICS, by_chart, is_better, metric
from dpo.config import BEST_METRICS
from dpo.losses import PairLogps, sigmoid
from dpo.metrics import RunningMeans, pair_metrics
from dpo.report import comparison, curves, digest
from dpo.train import board, tracking

SPLITS = [(5,), (1, 4), (2, 3), (3, 2), (1, 1, 1, 1, 1), (0, 5, 0)]


def five_pairs():
    """Five pairs; gaps 3, -1, 0, 5, -7 with references -20 and -30."""
    gaps = torch.tensor([3.0, -1.0, 0.0, 5.0, -7.0])
    return PairLogps(
        policy_chosen_logps=-20 + gaps - 1,
        policy_rejected_logps=torch.full((5,), -31.0),
        ref_chosen_logps=torch.full((5,), -20.0),
        ref_rejected_logps=torch.full((5,), -30.0),
        chosen_lengths=torch.tensor([4, 5, 6, 7, 8]),
        rejected_lengths=torch.tensor([1, 2, 3, 4, 5]),
    )


def rows(logps, *, beta=0.5):
    return pair_metrics(logps, sigmoid(logps, beta=beta), beta=beta)


def part(logps, start, stop):
    return PairLogps(*(vector[start:stop] for vector in vars(logps).values()))


def micro_batches(split):
    """The five pairs, cut into micro-batches of these sizes."""
    logps, start = five_pairs(), 0
    for size in split:
        yield part(logps, start, start + size)
        start += size
    assert start == 5


def test_pair_metrics_has_one_row_per_name_in_the_order_of_metrics():
    """beta 0.5. Chosen: log-ratio -18 - -20 = 2, reward 1. Rejected: -31 - -30 = -1, reward -0.5.

    Margin 1.5, accurate. Loss: log(1 + e^-1.5) = log 1.223130160148430 = 0.201413277982752.
    """
    values = (-18.0, -31.0, -20.0, -30.0)
    logps = PairLogps(
        *(torch.tensor([x], dtype=torch.float64) for x in values),
        torch.tensor([7]),
        torch.tensor([3]),
    )
    wanted = {
        "loss": 0.201413277982752,
        "rewards/chosen": 1.0,
        "rewards/rejected": -0.5,
        "rewards/margins": 1.5,
        "rewards/accuracies": 1.0,
        "ranking_accuracy": 1.0,
        "logps/chosen": -18.0,
        "logps/rejected": -31.0,
        "lengths/chosen": 7.0,
        "lengths/rejected": 3.0,
    }
    assert tuple(wanted) == PAIR_METRICS
    assert rows(logps)[:, 0].tolist() == pytest.approx(list(wanted.values()), abs=1e-14)


def test_pair_metrics_carries_no_gradient_and_counts_in_float64():
    logps = five_pairs()
    logps.policy_chosen_logps.requires_grad_()
    values = rows(logps)
    assert not values.requires_grad
    assert values.dtype == torch.float64
    assert values.shape == (10, 5)


def test_ranking_accuracy_asks_the_policy_alone():
    """Chosen reward 0.5 x (-18 - -30) = 6 over rejected 0.5 x (-12 - -11) = -0.5: accurate, and yet
    the policy gives the rejected answer -12 nats, more than the chosen one's -18; a tie is no rank.
    """
    sides = ([-18.0, -12.0, -9.0], [-12.0, -18.0, -9.0], [-30.0, -12.0, -9.0], [-11.0, -18.0, -9.0])
    lengths = torch.tensor([4, 4, 4])
    values = rows(PairLogps(*map(torch.tensor, sides), lengths, lengths))
    assert values[PAIR_METRICS.index("rewards/accuracies")].tolist() == [1.0, 0.0, 0.0]
    assert values[PAIR_METRICS.index("ranking_accuracy")].tolist() == [0.0, 1.0, 0.0]


def test_a_tie_is_not_accurate():
    """Gaps 3, -1, 0, 5, -7: the third is a tie, as every pair is at step 0; 2 of 5 are accurate."""
    accurate = rows(five_pairs())[PAIR_METRICS.index("rewards/accuracies")]
    assert accurate.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_the_rewards_are_those_of_dpo_whatever_the_loss():
    """Only the row of the loss is another when another loss is given."""
    logps = five_pairs()
    ours = rows(logps)
    other = pair_metrics(logps, torch.arange(5.0), beta=0.5)
    assert other[0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert torch.equal(other[1:], ours[1:])


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_running_means_are_the_plain_means_at_any_split(split):
    """Five pairs, gaps 3, -1, 0, 5, -7 (mean 0), beta 0.5; chosen log-ratio gap - 1, rejected -1.

    Rewards: chosen 0.5 x -1 = -0.5, rejected -0.5, margin 0; accuracies 2 / 5; logps -21 and -31,
    each chosen one above its rejected one; lengths 30 / 5 = 6 and 15 / 5 = 3. Loss, of
    z = 1.5, -0.5, 0, 2.5, -3.5:
    (0.201413277982752 + 0.974076984180107 + 0.693147180559945 + 0.078889734292549
    + 3.529750418272620) / 5 = 5.477277595287973 / 5 = 1.095455519057595.
    """
    means = RunningMeans()
    for logps in micro_batches(split):
        means.add(rows(logps))
    wanted = {
        "loss": 1.095455519057595,
        "rewards/chosen": -0.5,
        "rewards/rejected": -0.5,
        "rewards/margins": 0.0,
        "rewards/accuracies": 0.4,
        "ranking_accuracy": 1.0,
        "logps/chosen": -21.0,
        "logps/rejected": -31.0,
        "lengths/chosen": 6.0,
        "lengths/rejected": 3.0,
    }
    assert means.pop() == pytest.approx(wanted, abs=1e-7)


def test_a_mean_of_the_micro_batches_means_is_another_number():
    """The negative control: accuracies at 1 + 4 are 1 / 1 and 1 / 4: a mean of 0.625, not 0.4."""
    row = PAIR_METRICS.index("rewards/accuracies")
    means = [rows(logps)[row].mean().item() for logps in micro_batches((1, 4))]
    assert sum(means) / 2 == 0.625


@pytest.mark.parametrize("split", [(1, 4), (2, 3), (0, 5), (5, 0)], ids=str)
def test_running_means_over_two_ranks_are_those_of_one(split):
    """Ranks with unlike numbers of pairs, one of them with none; a sum stands for all-reduce."""
    ranks = [RunningMeans(), RunningMeans()]
    for rank, logps in zip(ranks, micro_batches(split), strict=True):
        rank.add(rows(logps))
    total = torch.stack([torch.tensor(rank.state(), dtype=torch.float64) for rank in ranks]).sum(0)
    alone = RunningMeans()
    alone.add(rows(five_pairs()))
    wanted = alone.pop()
    for rank in ranks:
        assert rank.pop(lambda sums: total) == pytest.approx(wanted, abs=1e-12)


def test_no_pairs_give_no_means():
    means = RunningMeans()
    assert means.pop() == {}
    means.add(torch.zeros(len(PAIR_METRICS), 0, dtype=torch.float64))
    assert means.pop() == {}


def test_pop_starts_again_from_zero():
    means = RunningMeans()
    means.add(rows(five_pairs()))
    means.pop()
    assert means.pop() == {}
    means.add(rows(part(five_pairs(), 3, 4)))
    assert means.pop()["rewards/margins"] == 2.5  # 0.5 x the gap of 5


def test_sums_saved_and_loaded_go_on_as_if_never_stopped():
    """A resume in the middle of a logging interval; the state survives being written as text."""
    first, second = micro_batches((2, 3))
    straight, stopped, resumed = RunningMeans(), RunningMeans(), RunningMeans()
    straight.add(rows(first))
    stopped.add(rows(first))
    resumed.load([float(text) for text in map(repr, stopped.state())])
    for means in (straight, resumed):
        means.add(rows(second))
    assert resumed.pop() == straight.pop()


def test_reading_the_state_changes_nothing():
    means = RunningMeans()
    means.add(rows(five_pairs()))
    state = means.state(lambda sums: sums.mul_(2))  # an all-reduce works in place
    assert means.state() == [value / 2 for value in state]
    assert state[-1] == 10


def test_a_short_last_batch_weighs_by_its_pairs():
    """Five rows in batches of 4 and 1 (accuracies 2 / 4 and 0 / 1): 2 / 5 = 0.4, not 0.25."""
    means = RunningMeans()
    for logps in micro_batches((4, 1)):
        means.add(rows(logps))
    assert means.pop()["rewards/accuracies"] == 0.4


# --------------------------------------------------------------------------------- the catalogue


@pytest.mark.parametrize(
    "chosen",
    [
        BEST_METRICS,
        tracking._CLOSING,
        digest._BEFORE_AND_AFTER,
        comparison._RESULTS,
        comparison._OVERLAID,
        comparison._COSTS,
        comparison._OF_ONE_LOSS,
        board.RESULTS,
    ],
    ids=lambda names: names[0],
)
def test_a_table_chooses_metrics_that_are_logged(chosen):
    logged = {f"{prefix}/{name}" for name, each in CATALOGUE.items() for prefix in each.logged}
    assert set(chosen) <= logged
    assert len(set(chosen)) == len(chosen)


def test_charts_choose_from_the_catalogue_and_do_not_mix_shares_with_other_values():
    for names in (curves._CURVES, curves._SPEED, *board._GROUPS.values()):
        for together in by_chart(names).values():
            assert len({metric(name).is_share for name in together}) == 1


def test_the_metrics_of_pairs_are_those_of_training_and_evaluation():
    assert tuple(n for n, each in CATALOGUE.items() if len(each.logged) == 2) == PAIR_METRICS


def test_the_best_weights_are_chosen_by_metrics_of_which_one_value_is_better():
    assert all(metric(name).better for name in BEST_METRICS)
    assert is_better("eval/loss", 0.5, than=0.6)
    assert not is_better("eval/loss", 0.6, than=0.6)
    assert is_better("eval/exact_match", 0.6, than=0.5)
    assert not is_better("eval/lengths/generated", 6.0, than=5.0)


@pytest.mark.parametrize("name", ["eval/loss", "eval/rewards/margins"])
def test_nan_is_never_better_and_any_number_is_better_than_nan(name):
    assert not is_better(name, math.nan, than=0.5)
    assert is_better(name, 0.5, than=math.nan)
