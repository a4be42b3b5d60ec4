"""What fits is tried in one order, by the trainer on a device and by the planner on paper."""

import math

import pytest
import torch

from dpo.data.stream import build_stream
from dpo.model.scorer import Scorer
from dpo.plan.fake import FakePolicy
from dpo.plan.fit import MOST_TOKENS, SAVINGS, bytes_per_token, fit_tokens, plan_fit
from dpo.plan.memory import peak_bytes
from dpo.plan.plan import given_lengths
from tests.models import tiny, with_lora
from tests.plan.test_plan import LENGTHS, SIZES, configuration

STREAM = build_stream([([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is nothing but its config.json."""
    folder = tmp_path_factory.mktemp("shape")
    tiny(**SIZES | {"num_hidden_layers": 2}).config.save_pretrained(folder)
    return folder


def num_checkpointed(model):
    layers = model.get_base_model().model.layers
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers)


def measured(scorer, free):
    """How a real model is measured, where so many bytes are free."""

    def measure(saving):
        saving.apply(scorer)
        work = lambda: scorer(STREAM).sum().backward()  # noqa: E731
        return peak_bytes(torch.device("cpu"), work) / len(STREAM.input_ids), free

    return measure


def test_layers_are_checkpointed_only_where_the_longest_pair_does_not_fit():
    """Of eight layers none, some or all, and each time the pair fits that did not before."""
    checkpointed = []
    for share in (1.0, 0.7, 0.45):
        model = with_lora(tiny(num_hidden_layers=8))
        scorer = Scorer(model)
        scorer(STREAM).sum().backward()  # gradients exist whatever the tokens
        per_token, _ = measured(scorer, 0)(SAVINGS[0])
        free = share * 1000 * per_token / 0.9 * 1.01
        fit = fit_tokens(measured(scorer, free), longest=950, has_checkpointing=False)
        assert fit.tokens >= 950
        assert (fit.saving != SAVINGS[0]) == (num_checkpointed(model) > 0)
        checkpointed.append(num_checkpointed(model))
    assert checkpointed[0] == 0
    assert 0 < checkpointed[1] <= checkpointed[2] <= 8


def test_what_never_fits_is_the_last_saving_with_its_fewer_tokens():
    tried = []

    def measure(saving):
        tried.append(saving)
        return 10.0, 500.0

    fit = fit_tokens(measure, longest=46, has_checkpointing=False)
    assert (fit.tokens, fit.saving) == (45, SAVINGS[-1])  # 0.9 x 500 / 10
    assert tried == [*SAVINGS]
    tried.clear()
    assert fit_tokens(measure, longest=45, has_checkpointing=True).tokens == 45
    assert [saving.checkpoint_every for saving in tried] == [1]


def test_a_measurement_that_runs_out_of_memory_fits_nothing():
    assert fit_tokens(lambda _: (math.inf, 0.0), longest=1, has_checkpointing=False).tokens == 0


def test_ranks_agree_before_the_next_saving_is_tried():
    """Another rank has room for 7 tokens: the first saving is not enough on either."""
    fit = fit_tokens(
        lambda saving: (1.0, 100.0), longest=8, has_checkpointing=False, agree=lambda tokens: 7
    )
    assert (fit.tokens, fit.saving) == (7, SAVINGS[-1])


def test_the_budget_is_nine_tenths_of_what_is_left(folder):
    config = configuration(folder, "--train.tokens_per_microbatch", "auto")
    fake, sample = FakePolicy(config), given_lengths(LENGTHS)
    per_token = bytes_per_token(fake, sample.pairs)
    assert plan_fit(fake, config, 2000.5 * per_token, sample.pairs).tokens == 1800
    assert plan_fit(fake, config, 1e15, sample.pairs).tokens == MOST_TOKENS["cuda"]
    configured = configuration(folder, "--train.tokens_per_microbatch", 777)
    assert plan_fit(fake, configured, 2000 * per_token, sample.pairs).tokens == 777


def test_layers_are_checkpointed_where_the_longest_pair_does_not_fit_else(folder):
    """Of two. Room for 1260 tokens, wanted 1298: the first is enough; for 540: it is not."""
    config = configuration(folder, "--train.tokens_per_microbatch", "auto")
    sample = given_lengths(LENGTHS)
    per_token = bytes_per_token(FakePolicy(config), sample.pairs)
    some = plan_fit(FakePolicy(config), config, 1400 * per_token, sample.pairs)
    every = plan_fit(FakePolicy(config), config, 600 * per_token, sample.pairs)
    assert [found.saving.checkpoint_every for found in (some, every)] == [4, 1]
    assert every.bytes_per_token < some.bytes_per_token < per_token
    config.train.gradient_checkpointing = True  # as configured: the only one that is tried
    assert plan_fit(FakePolicy(config), config, -1.0, sample.pairs).tokens == 0
