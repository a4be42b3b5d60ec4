"""The order of the pairs is a function of the step; micro-batches are few, full and balanced."""

import functools
import math
import operator
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.config import TrainConfig
from dpo.data import order as order_module
from dpo.data.order import Order, balance, is_due, micro_batches
from dpo.data.stream import TokenizedPair, build_stream

SETS = {"num_pairs": st.integers(1, 60), "pairs_per_step": st.integers(1, 20)}


@given(**SETS, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_sees_every_pair_once_and_only_its_last_step_may_be_short(
    num_pairs, pairs_per_step, seed, epoch
):
    order = Order(num_pairs, pairs_per_step, 1, seed)
    num_steps = math.ceil(num_pairs / pairs_per_step)
    first = epoch * num_steps + 1
    steps = [order.indices(step) for step in range(first, first + num_steps)]
    assert sorted(functools.reduce(operator.iadd, steps, [])) == list(range(num_pairs))
    assert [order.ends_epoch(step) for step in range(first, first + num_steps)] == [
        step == num_steps - 1 for step in range(num_steps)
    ]
    lengths = [len(step) for step in steps]
    assert lengths[:-1] == [pairs_per_step] * (num_steps - 1)
    assert 1 <= lengths[-1] <= pairs_per_step


@given(**SETS, seed=st.integers(0, 5), steps=st.lists(st.integers(1, 200), min_size=1))
def test_a_step_does_not_depend_on_what_was_asked_before(num_pairs, pairs_per_step, seed, steps):
    """A resumed run asks for its step first, a straight one for all before it."""
    order = Order(num_pairs, pairs_per_step, 1, seed)
    asked = [order.indices(step) for step in steps]
    order_module._epoch_order.cache_clear()
    np.random.seed(0)
    again = [order.indices(step) for step in steps[::-1]]
    assert asked == again[::-1]


def test_the_first_steps_are_literally_these():
    """A golden value: a change here changes every run."""
    assert [Order(10, 4, 4, 42).indices(step) for step in (1, 2, 3, 4)] == [
        [5, 6, 0, 7],
        [3, 2, 4, 9],
        [1, 8],
        [0, 8, 7, 4],
    ]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [Order(50, 50, 3, seed).indices(epoch) for seed in (0, 1) for epoch in (1, 2, 3)]
    assert len(set(map(tuple, orders))) == 6


def test_the_order_cannot_be_changed_by_its_reader():
    order = Order(10, 4, 1, 42)
    order.indices(1)[0] = 1
    assert order.indices(1) == [5, 6, 0, 7]
    with pytest.raises(ValueError, match="read-only"):
        order_module._epoch_order(10, 42, 0)[0] = 1


@given(**SETS, seed=st.integers(0, 5), num_steps=st.integers(1, 80))
def test_the_pairs_that_a_run_sees_are_those_of_its_steps(
    num_pairs, pairs_per_step, seed, num_steps
):
    order = Order(num_pairs, pairs_per_step, num_steps, seed)
    seen = {i for step in range(1, num_steps + 1) for i in order.indices(step)}
    assert order.seen().tolist() == sorted(seen)


@pytest.mark.parametrize(
    ("flags", "num_ranks", "expected"),
    [
        ({"max_steps": 7}, 1, (16, 7)),
        ({"max_steps": 7}, 3, (48, 7)),
        ({"max_steps": -1, "num_train_epochs": 2}, 1, (16, 14)),  # ceil(100 / 16) = 7 an epoch
        ({"max_steps": -1, "num_train_epochs": 2}, 2, (32, 8)),  # ceil(100 / 32) = 4
    ],
)
def test_a_configuration_says_how_many_pairs_and_steps(flags, num_ranks, expected):
    order = Order.of(TrainConfig(**flags), 100, num_ranks)
    assert (order.pairs_per_step, order.num_steps) == expected
    assert order.steps_per_epoch == math.ceil(100 / order.pairs_per_step)


@pytest.mark.parametrize(("step", "every", "due"), [(4, 2, True), (5, 2, False), (5, 0, False)])
def test_what_happens_every_0_steps_never_happens(step, every, due):
    assert is_due(step, every) == due


# Micro-batches

TOKENS = st.lists(st.integers(1, 100), max_size=40)


@given(num_tokens=TOKENS, budget=st.integers(1, 150))
def test_every_pair_is_in_one_bin_and_bins_keep_to_the_budget(num_tokens, budget):
    bins = micro_batches(num_tokens, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(num_tokens)))
    for b in bins:
        assert len(b) == 1 or sum(num_tokens[i] for i in b) <= budget
    assert all(bins) or bins == [[]]


@given(num_tokens=TOKENS, num_bins=st.integers(1, 12))
def test_no_bin_is_fuller_than_another_by_more_than_its_last_pair(num_tokens, num_bins):
    """Longest first into the emptiest bin: before its last pair a bin was the emptiest of all."""
    bins = balance(num_tokens, num_bins)
    assert sorted(i for b in bins for i in b) == list(range(len(num_tokens)))
    filled = [sum(num_tokens[i] for i in b) for b in bins]
    for b, num in zip(bins, filled, strict=True):
        assert not b or num - num_tokens[b[-1]] <= min(filled)


@given(num_tokens=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(50, 150))
def test_few_bins_are_used(num_tokens, budget):
    """At most twice as many as if all were filled to the brim, and one and a twentieth more.

    A number of bins fails when a pair of at most half the budget finds every bin more than half
    full (longer pairs have a bin each); the next that is tried is 1.05 times as large, plus one.
    """
    bins = micro_batches(num_tokens, budget)
    assert len(bins) <= 1.05 * 2 * sum(num_tokens) / budget + 1


def test_bins_are_literally_these():
    """7 + 3 = 6 + 4 = 10: two full bins, where filling in order would need three."""
    assert micro_batches([3, 4, 6, 7], 10) == [[3, 0], [2, 1]]
    assert micro_batches([3, 4, 6, 7], 100) == [[3, 2, 1, 0]]
    assert micro_batches([30, 1, 1], 10) == [[0], [1, 2]]
    assert micro_batches([], 10) == [[]]
    assert balance([5, 3, 3], 2) == [[0], [1, 2]]
    assert balance([], 2) == [[], []]


def test_thousands_of_pairs_are_binned_in_a_moment():
    """Pairs of 0.4 of the budget are the hard ones: the first guess is 8000 bins, not 10,000."""
    start = time.perf_counter()
    assert len(micro_batches([60] * 20_000, 100)) == 20_000
    assert len(micro_batches([40] * 20_000, 100)) <= 1.05 * 10_000 + 1
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------- pairs that open alike


def opening_alike(drawn):
    """Pairs by (which of three long openings or none, question, answers)."""
    openings = ([], [1] * 20, [1] * 16 + [2] * 30, [3] * 40)
    return [
        ([*openings[which], *question, 9], [*chosen, 8], [*rejected, 8])
        for which, question, chosen, rejected in drawn
    ]


some = st.lists(st.integers(4, 7), max_size=12)
drawn_alike = st.lists(st.tuples(st.integers(0, 3), some, some, some), min_size=1, max_size=12)


def cut(pairs, budget):
    """The bins of pairs, and how many tokens a stream of each computes."""
    items = [TokenizedPair(*pair) for pair in pairs]
    bins = micro_batches([p.num_stream_tokens for p in items], budget, [p[0] for p in pairs])
    return bins, [len(build_stream([pairs[i] for i in b]).input_ids) for b in bins]


@given(drawn_alike, st.integers(1, 400))
@settings(deadline=None)
def test_the_budget_bounds_the_tokens_that_are_computed(drawn, budget):
    """Each pair once; a bin of more tokens than the budget has one pair alone."""
    pairs = opening_alike(drawn)
    bins, computed = cut(pairs, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(pairs)))
    assert all(tokens <= budget or len(b) == 1 for b, tokens in zip(bins, computed, strict=True))


def test_pairs_that_open_alike_meet():
    """Four and four, alternating, in bins of two that could not hold three."""
    opening = {"a": [1] * 100, "b": [2] * 100}
    pairs = [([*opening[name], n], [7] * 10, [8] * 10) for n, name in enumerate("abababab")]
    bins, computed = cut(pairs, 180)
    assert sorted(map(sorted, bins)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert computed == [100 + 4 * 19] * 2
    apart = micro_batches([119] * 8, 180)
    assert len(apart) == 8  # what it takes where the opening counts for each


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 200))
@settings(deadline=None)
def test_pairs_that_open_differently_are_cut_as_before(num_tokens, budget):
    prompts = [[number] * 20 for number in range(len(num_tokens))]
    assert micro_batches(num_tokens, budget, prompts) == micro_batches(num_tokens, budget)
