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
from tests.train.runs import config, first_step, metrics, rows_file, run, started, training

SMOOTHED = ("robust", "exo_pair")
SCORED = ("odpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")


def scored_rows(folder, **columns):
    """The first packaged rows, with scores or other columns; a list gives one value a row."""
    columns = columns or {"chosen_score": 3, "rejected_score": 1.0}
    file = rows_file(folder, 24, "scored.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for name, value in columns.items():
        for number, row in enumerate(rows):
            row[name] = value[number] if isinstance(value, list) else value
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_and_its_first_value_is_the_known_one(name, tmp_path):
    flags = ["--loss.type", name, *(["--loss.label_smoothing", 0.1] if name in SMOOTHED else [])]
    flags += ["--data.name_or_path", scored_rows(tmp_path)] if name in SCORED else []
    folder = run(config(tmp_path, *flags, "--train.max_steps", 2))
    first = first_step(folder)
    assert math.isfinite(first["train/loss"])
    assert first["train/grad_norm"] > 0
    has_reference = name not in WITHOUT_REFERENCE
    header = (folder / "header.txt").read_text()
    assert ("reference: zero" in header) != has_reference
    if has_reference:
        logps = [-9.0, -9.0, -9.0, -9.0, 7.0, 7.0]  # of policy and reference alike
        given = {"chosen_scores": 3.0, "rejected_scores": 1.0, "margins": math.log(2)}
        given |= {"label_smoothing": 0.1} if name in SMOOTHED else {}
        known = in_numpy(*(np.array([x]) for x in logps), 0.1, **given)[name]
        # These depend on lengths, or on what the model predicts.
        if name not in ("r_dpo", "alpha_dpo", "wpo", "mallows"):
            assert first["train/loss"] == pytest.approx(float(known[0]), rel=1e-3)


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

def hungry(logps, *, beta, appetites):
    return appetites - logps.logratio_gap

def by_margin(logps, *, beta, margins, chosen_kls):
    return F.softplus(margins - beta * (logps.logratio_gap + chosen_kls))

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
        ("hungry", {}, "loss.type: my_losses:hungry needs appetites, which a run does not have"),
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


def test_one_that_names_inputs_gets_them(own, tmp_path):
    flags = ["--loss.type", "my_losses:by_margin"]
    flags += ["--data.name_or_path", scored_rows(tmp_path, margin=2.0)]
    folder = run(config(tmp_path, *flags))
    assert first_step(folder)["train/loss"] == pytest.approx(math.log1p(math.exp(2)), rel=1e-4)


# ------------------------------------------------------------------------------ what rows must have


@pytest.mark.parametrize(
    ("flags", "columns", "said"),
    [
        (
            ["--loss.type", "odpo"],
            {"chosen_score": [3, *[2] * 23], "rejected_score": [1, 2, 3, *[1] * 21]},
            r"loss: each pair needs a number in the column margin, or scores of which the chosen "
            r"answer's is the higher, which 2 of 24 pairs lack: rows 2, 3. Correct",
        ),
        (
            ["--loss.type", "rpo_sq"],
            {"chosen_score": [*[1.0] * 10, *[None] * 14], "rejected_score": 0},
            r"column chosen_score or score_chosen .* which 14 of 24 pairs lack: rows 11, 12, 13, "
            r"14, 15, \.\.\.",
        ),
        (
            ["--loss.pair_weights", "true"],
            {"weight": [-1, None, 10**400, True, *[1.0] * 20]},
            r"a number of 0 or more in the column weight, which 4 of 24 pairs lack: rows 1, 2, ",
        ),
    ],
)
def test_rows_that_lack_what_the_loss_reads_are_named_before_weights_load(
    flags, columns, said, tmp_path, monkeypatch
):
    monkeypatch.setattr("dpo.train.trainer.load_policy_to_fit", None)
    file = scored_rows(tmp_path, **columns)
    with pytest.raises(UserError, match=said):
        started(config(tmp_path, "--data.name_or_path", file, *flags))


def test_weights_of_pairs_weigh(tmp_path):
    """All 3: three times the loss. Half of them 0: those pairs count for nothing."""
    plain = run(config(tmp_path, "--train.max_steps", 1))
    on = ["--loss.pair_weights", "true", "--train.max_steps", 1, "--train.output_dir"]
    file = scored_rows(tmp_path, weight=3)
    threefold = run(config(tmp_path, *on, tmp_path / "b", "--data.name_or_path", file))
    assert first_step(threefold)["train/loss"] == pytest.approx(
        3 * first_step(plain)["train/loss"], rel=1e-6
    )
    file = scored_rows(tmp_path, weight=[0, 1] * 12)
    half = config(tmp_path, *on, tmp_path / "c", "--data.name_or_path", file)
    made = started(half)
    number = sum(made.data.train[i].numbers["weights"] for i in made.order.indices(1))
    loss = first_step(run(half))["train/loss"]
    assert 0 < number < 16
    assert loss == pytest.approx(math.log(2) * number / 16, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--loss.type", "aot", "--loss.pair_weights", "true"],
         "loss.pair_weights: got True, which has no meaning for aot"),
        (["--loss.type", "dr_dpo", "--loss.pair_weights", "true"], "no meaning for dr_dpo"),
        (["--loss.type", "ipo", "--loss.ld_alpha", 0.5],
         "loss.ld_alpha: got 0.5, which has no meaning for ipo: it divides by lengths"),
        (["--loss.ld_alpha", 1.5], "loss.ld_alpha: got 1.5, wanted from 0 to 1"),
        (["--loss.type", "tdpo1", "--reference.cache", "somewhere"],
         "reference.cache: got 'somewhere', wanted auto or off: of log-probs alone, tdpo1 cannot"),
        (["--loss.type", "mallows", "--reference.mode", "zero"],
         "reference.mode: got zero, wanted another, since mallows is held by its reference"),
        (["--loss.type", "bco_pair", "--reference.mode", "zero"], "since bco_pair is held"),
        (["--loss.type", "[{type: wpo}, {type: tdpo2}]"],
         "losses that need on_policy_weights and chosen_kls, rejected_kls together"),
        (["--loss.type", "odpo", "--loss.options.margins", 1], "got margins, wanted one of alpha"),
        (["--reference.update", "soft"],
         "reference.update: got 'soft', wanted hard or never, since model.adapter is lora"),
        (["--reference.update", "hard", "--reference.cache", "here"],
         "reference.cache: got 'here', wanted auto or off: what is kept of a reference that moves"),
        (["--reference.update", "hard", "--loss.type", "simpo"],
         "reference.update: got 'hard', wanted never, since reference.mode is zero"),
        (["--reference.update", "hard", "--data.eval_fraction", 0.3,
          "--train.metric_for_best_model", "eval/loss"],
         "train.metric_for_best_model: got 'eval/loss', wanted null, eval/logps/chosen or eval"),
        (["--reference.update_alpha", 0], "reference.update_alpha: got 0.0, wanted above 0"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        started(config(tmp_path, *flags))


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
        for cell in re.findall(r"^\| ([a-z_0-9, ]+) \|", page, re.MULTILINE)
        for n in cell.split(", ")
    }
    assert named - {"loss"} == LOSSES.keys()
