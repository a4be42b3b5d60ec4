"""Compiled layers compute what plain ones do, with one graph for all layers and lengths."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dpo.data.stream import build_stream
from dpo.errors import UserError
from dpo.evaluate.samples import _uncompiled
from dpo.model import load
from dpo.model.lean import make_lean
from dpo.model.load import Policy, compile_layers
from dpo.model.models import Models
from dpo.model.reference import Reference, Zero
from dpo.model.scorer import Scorer
from dpo.train.selfcheck import check_compiled
from tests.model.test_scorer import PAIRS, gradients
from tests.models import tiny, with_lora
from tests.train.runs import forget_accelerate

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_layers_are_the_plain_ones_in_values_and_gradients(device):
    """In a process of its own: the shapes that tests check would be compiled along."""
    code = f"from tests.model.test_compile import compare; compare({device!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def compare(device):
    """With dropout, over streams of other lengths: the last makes no graph any more."""
    from torch._dynamo.utils import counters

    model = with_lora(tiny(num_hidden_layers=3), dropout=0.3).to(device).train()
    make_lean(model)
    scorer = Scorer(model)

    def score(pairs):
        torch.manual_seed(5)
        logps = scorer(build_stream(pairs).to(device))
        return logps.detach(), gradients(model, logps)

    batches = [PAIRS[:2], PAIRS, PAIRS[1:], PAIRS[:3]]
    expected = [score(batch) for batch in batches]
    compile_layers(scorer.causal_lm, torch.device(device))
    graphs = []
    for batch, (logps, grads) in zip(batches, expected, strict=True):
        its_logps, its_grads = score(batch)
        graphs.append(counters["stats"]["unique_graphs"])
        assert (its_logps - logps).abs().max() <= 1e-5
        largest = max(g.abs().max() for g in grads.values())
        for name, gradient in grads.items():
            assert (its_grads[name] - gradient).abs().max() <= 1e-5 * largest
    assert graphs[-1] == graphs[-2] > 5, graphs  # compiled, and not again for other lengths
    with _uncompiled(scorer.causal_lm):
        scorer.causal_lm.generate(
            input_ids=torch.tensor([[1, 5, 9]], device=device), max_new_tokens=6
        )
    assert counters["stats"]["unique_graphs"] == graphs[-1]  # nor for an answer's
    models = Models(
        Policy(model), scorer.eval(), Reference("zero", Zero()), "shared", "", is_rounded=False
    )
    forget_accelerate()
    # What the trainer asks before step 1.
    check_compiled(models, build_stream(PAIRS).to(device), Accelerator(cpu=device == "cpu"))


def test_where_nothing_can_be_compiled_it_is_said(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler found\nand much more")

    monkeypatch.setattr(load.torch, "compile", broken)
    with pytest.raises(UserError, match=r"does not work here \(no compiler found\)"):
        compile_layers(tiny(), torch.device("cpu"))
