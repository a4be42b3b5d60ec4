"""One truth, three ways: shared stream = padded rows = one answer at a time with full logits."""

import pytest
import torch
from dpo.config import UserError
from dpo.data.stream import TokenizedPair, build_stream
from dpo.model.attention import NAME
from dpo.model.scorer import Scorer

from tests.models import FAMILIES, tiny, with_lora
from tests.oracle import stream_logps

PAIRS = [
    ([1, 5, 9, 12, 30], [7, 8, 9, 2], [7, 8, 30, 31, 32, 33, 2]),  # a common opening of two
    ([1, 5], [40, 2], [41, 42, 43, 2]),
    ([1, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60], [3, 4, 5, 6, 7, 8, 9, 2], [2]),
    ([6], [10, 11, 2], [10, 11, 12, 13, 2]),
]


def gradients(model, logps):
    """Gradients of a sum that weighs every token otherwise, by parameter."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps))
    (weights * logps).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, logps, expected_logps):
    assert (logps - expected_logps).abs().max() <= 1e-5
    expected, got = gradients(model, expected_logps), gradients(model, logps)
    assert got.keys() == expected.keys()
    assert got
    for name, gradient in expected.items():
        worst = (got[name] - gradient).abs().max()
        assert worst <= 1e-5 * max(g.abs().max() for g in expected.values()), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stream_equals_one_answer_at_a_time_in_values_and_gradients(family, layout, checkpointing):
    model = with_lora(tiny(family)).train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    scorer = Scorer(model, attention=layout)
    assert scorer.layout == layout
    logps = scorer(build_stream(PAIRS))
    assert logps.dtype == torch.float32
    assert_same(model, logps, stream_logps(model, PAIRS))
