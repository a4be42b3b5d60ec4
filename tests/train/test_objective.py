"""Every loss trains through the trainer; one's own, and weighted sums, as well."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.cli import parse
from dpo.errors import UserError
from dpo.losses import LOSSES, WITHOUT_REFERENCE
from dpo.objective import Part, checked_objective
from tests.losses_in_numpy import every_loss as in_numpy
from tests.test_losses import random_pairs
from tests.train.runs import config, first_step, metrics, run, started, training

SMOOTHED = ("robust", "exo_pair")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_and_its_first_value_is_the_known_one(name, tmp_path):
    flags = ["--loss.type", name, *(["--loss.label_smoothing", 0.1] if name in SMOOTHED else [])]
    folder = run(config(tmp_path, *flags, "--train.max_steps", 2))
    first = first_step(folder)
    assert math.isfinite(first["train/loss"])
    assert first["train/grad_norm"] > 0
    has_reference = name not in WITHOUT_REFERENCE
    header = (folder / "header.txt").read_text()
    assert ("reference: zero" in header) != has_reference
    if has_reference:
        logps = [-9.0, -9.0, -9.0, -9.0, 7.0, 7.0]  # of policy and reference alike
        known = in_numpy(*map(np.float64, logps), 0.1, label_smoothing=0.1)[name]
        if name not in ("r_dpo", "sigmoid"):  # of lengths; sigmoid is not smoothed here
            assert first["train/loss"] == pytest.approx(float(known), rel=1e-3)


def test_a_sum_of_losses_has_the_sum_of_their_gradients(tmp_path):
    logps = random_pairs(16, dtype=torch.float64)
    logps.policy_chosen_logps.requires_grad_()
    parts = [
        Part("sigmoid", 0.8, {"beta": 0.1}),
        Part("nca_pair", 0.2, {"beta": 0.3}),
        Part("sft", 1.0, {"beta": 0.1}),
    ]
    total = checked_objective(parts, "adapter")(logps)
    wanted = 0.8 * LOSSES["sigmoid"](logps, beta=0.1) + 0.2 * LOSSES["nca_pair"](logps, beta=0.3)
    wanted = wanted + LOSSES["sft"](logps, beta=0.1)
    torch.testing.assert_close(total, wanted)
    both = (torch.autograd.grad(x.sum(), logps.policy_chosen_logps)[0] for x in (total, wanted))
    torch.testing.assert_close(*both)


def test_a_list_from_the_command_line_is_saved_and_resumed(tmp_path):
    listed = "[{type: sigmoid, weight: 0.8}, {type: sft, weight: 0.2, options: {per: answer}}]"
    flags = ["--loss.type", listed, "--train.save_steps", 2]
    straight = run(config(tmp_path, *flags))
    again = parse(["--config", str(straight / "config.yaml")])
    assert [tuple(part) for part in again.loss.parts] == [
        ("sigmoid", 0.8, {"beta": 0.1, "label_smoothing": 0.0}),
        ("sft", 0.2, {"beta": 0.1, "per": "answer"}),
    ]
    on = ["--train.resume", straight / "checkpoint-2", "--train.output_dir", tmp_path / "on"]
    resumed = run(config(tmp_path, *flags, *on))
    assert training(resumed)[-1] == training(straight)[-1]
    sigmoid = run(config(tmp_path, "--train.output_dir", tmp_path / "other"))
    assert training(sigmoid)[-1] != training(straight)[-1]  # that could fail


def test_a_loss_without_a_reference_computes_none(tmp_path, monkeypatch):
    """Neither a pass nor a cache; the FLOPs of a step are the policy's."""
    settings = config(tmp_path, "--loss.type", "simpo", "--reference.cache", "auto")
    made = started(settings)
    assert made.models.reference.store is None
    made.check_start()
    made.train_step(1)
    alone = made.interval.flops
    made = started(config(tmp_path, "--train.output_dir", tmp_path / "dpo"))
    made.train_step(1)
    assert alone < 0.8 * made.interval.flops


# ----------------------------------------------------------------------------------- one's own loss

OWN = '''
import torch
import torch.nn.functional as F

def my_loss(logps, *, beta, margin=0.0):
    """DPO that must win by a margin."""
    return F.softplus(margin - beta * logps.logratio_gap)

def mean(logps, *, beta):
    return F.softplus(-beta * logps.logratio_gap).mean()

def detached(logps, *, beta):
    return F.softplus(-beta * logps.logratio_gap.detach())

def text(logps, *, beta):
    return "loss"

def infinite(logps, *, beta):
    return logps.logratio_gap / 0

def sharp(logps, *, beta):
    return (logps.logratio_gap.abs() + logps.logratio_gap).sqrt()

def open_to_all(logps, *, beta, **options):
    return options["scale"] * F.softplus(-beta * logps.logratio_gap)

def hungry(logps, *, beta, margins):
    return margins - logps.logratio_gap

constant = 5
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)


def test_a_loss_of_ones_own_is_named_by_module_and_function(own, tmp_path):
    """With margin 0 it is DPO to the last digits; with another it is not."""
    folders = {}
    for name, flags in {
        "own": ["--loss.type", "my_losses:my_loss"],
        "margin": ["--loss.type", "my_losses:my_loss", "--loss.options.margin", 2.0],
        "dpo": [],
    }.items():
        folders[name] = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / name))
    losses = {n: [line.get("train/loss") for line in metrics(f)] for n, f in folders.items()}
    assert losses["own"] == pytest.approx(losses["dpo"], rel=1e-5)
    assert first_step(folders["margin"])["train/loss"] == pytest.approx(math.log1p(math.exp(2)))
    settings = config(tmp_path, "--loss.type", "my_losses:open_to_all")
    settings.loss.options = {"scale": 3.0}
    assert first_step(run(settings))["train/loss"] == pytest.approx(3 * math.log(2), rel=1e-4)
    saved = (folders["margin"] / "config.yaml").read_text()
    assert "margin: 2.0" in saved
    assert json.loads((folders["own"] / "summary.json").read_text())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mean", {}, r"for 2 pairs the loss gave \(\), wanted a tensor \(2,\)"),
        ("detached", {}, r"the loss gave \(2,\), wanted a tensor \(2,\) that depends"),
        ("text", {}, "the loss gave str, wanted a tensor"),
        ("infinite", {}, r"the loss of a pair is .*nan.*, wanted finite numbers"),
        ("sharp", {}, r"the gradient of a pair is .*(nan|inf).*, wanted finite numbers"),
        ("hungry", {}, "loss.type: my_losses:hungry needs margins, which a run does not have"),
        ("my_loss", {"margn": 1}, "loss.options of my_losses:my_loss: got margn, wanted one of"),
        ("nothing", {}, "has no attribute 'nothing'. Give a module in the current folder"),
        ("constant", {}, "got a int, wanted a function"),
    ],
)
def test_one_that_is_none_is_refused_before_the_first_step(name, options, said, own, tmp_path):
    settings = config(tmp_path, "--loss.type", f"my_losses:{name}")
    settings.loss.options = options
    with pytest.raises(UserError, match=said):
        started(settings).check_start()


def test_the_example_of_the_documentation_trains(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"`dpo train (--loss.type my_losses[^`]*)`", page)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    folder = run(config(tmp_path, *command.split()))
    assert first_step(folder)["train/loss"] == pytest.approx(math.log1p(math.exp(2)), rel=1e-4)


def test_the_sum_of_the_documentation_is_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "sum.yaml").write_text(text)
    parts = parse(["--config", str(tmp_path / "sum.yaml")]).loss.parts
    assert [(p.name, p.weight, p.arguments["beta"]) for p in parts] == [
        ("sigmoid", 0.8, 0.1),
        ("nca_pair", 0.2, 0.01),
        ("sft", 1.0, 0.1),
    ]


def test_the_documentation_has_every_loss():
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    named = {
        n
        for cell in re.findall(r"^\| ([a-z_, ]+) \|", page, re.MULTILINE)
        for n in cell.split(", ")
    }
    assert named - {"loss"} == LOSSES.keys()
