"""Compiled layers must have the gradients of plain ones before the first step.

That really compiled ones do is asked in tests/model/test_compile.py.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo.config import Config
from dpo.data.stream import build_stream
from dpo.train.selfcheck import _check_compiled


class Scorer(nn.Module):
    """What a compiler makes of it, when it may, has another gradient of the same value."""

    def __init__(self, wrong):
        super().__init__()
        self.weight, self.wrong, self.is_eager = nn.Parameter(torch.ones(4)), wrong, False

    def forward(self, stream):
        value = (self.weight * torch.linspace(0.1, 0.4, 4)).sin()
        return value if self.is_eager else value + self.wrong * (value - value.detach())


def checked(monkeypatch, wrong, dtype=torch.float32):
    scorer = Scorer(wrong).to(dtype)

    @contextmanager
    def stance(name):
        assert name == "force_eager"
        scorer.is_eager = True
        yield
        scorer.is_eager = False

    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    made = SimpleNamespace(
        scorer=scorer,
        policy=SimpleNamespace(model=scorer),
        accelerator=SimpleNamespace(no_sync=lambda module: nullcontext()),
        config=Config(),
    )
    made.config.model.quantization = "none"
    _check_compiled(made, build_stream([([1], [2], [3])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-1.0, 0.5], ids=["none", "half as much again"])
def test_a_wrong_gradient_of_a_right_value_is_noticed(monkeypatch, wrong, dtype):
    with pytest.raises(RuntimeError, match=r"differs by [\d.]+ of its norm.*Set model.compile to"):
        checked(monkeypatch, wrong, dtype)


def test_weights_without_a_gradient_are_passed_over(monkeypatch):
    """An image tower's adapters come first and are not used; without any gradient all is well."""
    made = Scorer(-1.0)
    made.unused = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(9)])
    made._parameters["weight"] = made._parameters.pop("weight")  # now after them
    monkeypatch.setattr("tests.train.test_selfcheck.Scorer", lambda wrong: made)
    with pytest.raises(RuntimeError, match="differs by 1 of its norm"):
        checked(monkeypatch, -1.0)
    made.weight.data.zero_()
    made.forward = lambda stream: made.weight * 0.0
    checked(monkeypatch, 0.0)


def test_rounding_is_none(monkeypatch):
    checked(monkeypatch, 1e-4)
    checked(monkeypatch, 1e-2, torch.bfloat16)
