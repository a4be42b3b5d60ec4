"""Losses of a whole step: one value and one gradient for every split, on one rank and on two.

And what lasts from step to step: what a loss remembers, and a reference that moves.
"""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from dpo.after.finished import FinishedRun
from dpo.data.order import Order
from dpo.errors import UserError
from dpo.losses import MEMORIES, STEP_WIDE
from dpo.model.load import load_base
from dpo.model.scorer import Scorer
from dpo.report.logs import read_logs
from dpo.train.ahead import cache_reference
from dpo.train.checkpoint import load_reference
from dpo.train.selfcheck import shortest_pairs
from dpo.train.step import TrainStep
from tests.commands import as_two_processes
from tests.train.runs import (
    assert_same_gradients,
    config,
    metrics,
    run,
    started,
    step_gradients,
    training,
)

BUDGETS = (1, 250, 100_000)  # tokens: 16 micro-batches, about 4, and 1


def flags_of(name, budget):
    return ["--loss.type", name, "--train.tokens_per_microbatch", budget]


@pytest.mark.parametrize("name", sorted(STEP_WIDE))
def test_one_gradient_whatever_the_micro_batches(name, tmp_path):
    """And it is that of the definition: one backward through the loss of all pairs at once."""
    results = [step_gradients(config(tmp_path, *flags_of(name, budget))) for budget in BUDGETS]
    for result in results[:2]:
        assert_same_gradients(result, results[2])
    assert_same_gradients(results[0], at_once(config(tmp_path, *flags_of(name, 100_000))))


def at_once(settings):
    """As `step_gradients`, with the loss called directly on one micro-batch of the whole step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo.objective.STEP_WIDE", frozenset())
        return step_gradients(settings)


@pytest.mark.parametrize("name", sorted(STEP_WIDE - {"dr_dpo"}))
def test_a_micro_batch_is_not_a_step(name, tmp_path):
    """The negative control: what trainers do that call them with each micro-batch."""
    wanted = step_gradients(config(tmp_path, *flags_of(name, 1)))
    with pytest.raises(AssertionError):
        assert_same_gradients(at_once(config(tmp_path, *flags_of(name, 1))), wanted)


@pytest.mark.parametrize("flags", [[], ["--lora.dropout", 0.2]], ids=["", "dropout"])
def test_a_pairwise_loss_has_one_gradient_on_both_paths(flags, tmp_path, monkeypatch):
    """With dropout, both passes see one network, so that this holds as well."""
    settings = partial(config, tmp_path, *flags_of("sigmoid", 250), *flags)
    wanted = step_gradients(settings())
    monkeypatch.setattr("dpo.objective.STEP_WIDE", frozenset(["sigmoid"]))
    calls = []
    look_ahead = TrainStep.look_ahead
    monkeypatch.setattr(TrainStep, "look_ahead", lambda *args: calls.append(1) or look_ahead(*args))
    assert_same_gradients(step_gradients(settings()), wanted)
    assert len(calls) == 2


def test_inputs_with_a_gradient_go_through_both_passes(tmp_path):
    """A list of a step-wide loss and one of KLs, and one with tails."""
    listed = "[{type: aot, weight: 0.5}, {type: %s}]"
    for name in ("tdpo2", "tdpo1", "ld_dpo"):
        many, one = (
            step_gradients(config(tmp_path, *flags_of(listed % name, budget)))
            for budget in (250, 100_000)
        )
        assert_same_gradients(many, one)
        alone = step_gradients(config(tmp_path, *flags_of("[{type: aot, weight: 0.5}]", 250)))
        with pytest.raises(AssertionError):
            assert_same_gradients(many, alone)


@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(STEP_WIDE | MEMORIES.keys()))
def test_two_ranks_have_the_gradient_of_one(name, tmp_path):
    """Steps of 16 pairs and one: the second, which leaves a rank without, remembers the first."""
    output = tmp_path / "gradients.pt"
    flags = [*flags_of(name, 250), "--loss.beta", 1.0, "--train.per_device_train_batch_size"]
    as_two_processes("-m", "tests.train.two_ranks", tmp_path, output, 17, *flags, 8)
    expected = step_gradients(config(tmp_path, *flags, 16, rows=17))
    for results in torch.load(output):
        assert_same_gradients(results, expected)


@pytest.mark.parametrize(("budget", "forwards"), [(250, 2), (100_000, 1)])
def test_a_single_micro_batch_is_scored_once_and_the_reference_never_twice(
    budget, forwards, tmp_path, monkeypatch
):
    made = started(config(tmp_path, *flags_of("kto_pair", budget)))
    scorer, reference = made.models.scorer, made.models.reference.live
    seen = {"policy": 0, "reference": 0}

    def counted(name, call):
        def counting(stream, *also):
            seen[name] += stream.num_pairs
            return call(stream, *also)

        return counting

    monkeypatch.setattr(type(scorer), "forward", partial_forward(type(scorer).forward, seen))
    monkeypatch.setattr(made.models.reference, "live", counted("reference", reference))
    made.train_step(1)
    assert seen["reference"] == 16
    assert seen["policy"] - seen["reference"] == 16 * forwards  # the reference is the policy's base


def partial_forward(forward, seen):
    def counting(self, stream, *also):
        seen["policy"] += stream.num_pairs
        return forward(self, stream, *also)

    return counting


def test_out_of_memory_in_either_pass_loses_nothing(tmp_path, monkeypatch):
    settings = partial(config, tmp_path, *flags_of("aot", 250))
    wanted = step_gradients(settings())
    for fails_at in (2, 7):  # in the first pass, and in the second
        backward, read, seen = TrainStep.backward, TrainStep.read, []

        def count(seen=seen, fails_at=fails_at):
            seen.append(1)
            if len(seen) == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory. (a test's)")

        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "read", lambda *a, r=read, c=count: (c(), r(*a))[1])
            patch.setattr(
                TrainStep,
                "backward",
                lambda *a, b=backward, c=count, **k: (c(), b(*a, **k))[1],
            )
            assert_same_gradients(step_gradients(settings()), wanted)
        assert len(seen) > fails_at


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", ["bco_pair", "beta_dpo", "alpha_dpo"])
def test_what_a_loss_remembers_is_saved_and_a_resumed_run_is_the_straight_one(name, tmp_path):
    flags = ["--loss.type", name, "--train.save_steps", 2, "--train.max_steps", 4]
    flags += ["--train.eval_steps", 1, "--data.eval_fraction", 0.3]
    straight = run(config(tmp_path, *flags))
    state = json.loads((straight / "checkpoint-2" / "state.json").read_text())
    (memory,) = state["memory"]
    assert memory
    assert any(value not in (0.0, 1.0) for value in memory.values())
    on = ["--train.resume", straight / "checkpoint-2", "--train.output_dir", tmp_path / "on"]
    resumed = run(config(tmp_path, *flags, *on))
    assert training(resumed)[-1] == training(straight)[-1]


def test_a_run_that_forgets_comes_out_otherwise(tmp_path, monkeypatch):
    """The negative control; and what it remembers depends neither on splits nor on evaluations."""
    flags = ["--loss.type", "bco_pair", "--train.max_steps", 4, "--loss.beta", 1.0]
    flags += ["--data.eval_fraction", 0.3]
    ends = {}
    for name, more in {
        "one": ["--train.tokens_per_microbatch", 100_000],
        "many": ["--train.tokens_per_microbatch", 1],
        "evaluated": ["--train.eval_steps", 1],
    }.items():
        made = started(config(tmp_path, *flags, *more, "--train.output_dir", tmp_path / name))
        for step in (1, 2, 3):
            made.train_step(step)
            made.evaluate(step) if name == "evaluated" else None
        ends[name] = made.objective.memory[0]
    assert ends["one"]["count"] == ends["many"]["count"] == ends["evaluated"]["count"] > 0
    assert ends["many"]["delta"] == pytest.approx(ends["one"]["delta"], rel=2e-3)
    assert ends["evaluated"] == pytest.approx(ends["one"], rel=2e-3)
    straight = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "straight"))
    monkeypatch.setattr("dpo.objective.Objective.remember", lambda *_: None)
    forgetful = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "forgetful"))
    lines = [[line["train/loss"] for line in metrics(f) if "train/loss" in line]
             for f in (straight, forgetful)]  # fmt: skip
    assert lines[0][0] == lines[1][0]
    assert lines[0][-1] != lines[1][-1]


def test_a_memory_of_another_loss_is_refused(tmp_path):
    made = started(config(tmp_path, "--loss.type", "bco_pair"))
    for bad in ([{}], [{"delta": math.nan, "count": 1.0}], [{"gap_mean": 1.0}], []):
        with pytest.raises(ValueError, match=r"memory of a loss|shorter"):
            made.objective.load(bad)


# -------------------------------------------------------------------------------------- TR-DPO

HARD = ["--reference.update", "hard", "--reference.update_steps", 2]
SOFT = ["--reference.update", "soft", "--reference.update_steps", 2]
FULL = ["--model.adapter", "none", "--optim.name", "adamw", "--optim.learning_rate", 1e-4]


def reference_logps(made):
    """Of the first pairs, under the reference and under the policy; without dropout."""
    stream = shortest_pairs(made.data.train, made.order)
    made.models.scorer.eval()
    with torch.no_grad():
        both = made.models.reference(stream), made.models.scorer(stream)
    made.models.scorer.train()
    return both


@pytest.mark.parametrize(
    ("flags", "share"),
    [(HARD, 1.0), ([*HARD, "--lora.use_dora", "true"], 1.0), ([*HARD, *FULL], 1.0),
     ([*SOFT, *FULL, "--reference.update_alpha", 0.25], 0.25)],
    ids=["adapter", "dora", "full", "full, soft"],
)  # fmt: skip
def test_the_reference_follows_the_policy_every_so_many_steps(flags, share, tmp_path):
    """The first step starts at ln 2; so does the step after a hard move."""
    made = started(config(tmp_path, *flags, "--train.max_steps", 6))
    made.check_start()
    before, _ = reference_logps(made)
    weights = {name: weight.clone() for name, weight in made.models.reference.state.items()}
    made.train_step(1)
    after_one, policy = reference_logps(made)
    assert torch.equal(after_one, before)
    assert not torch.allclose(policy, before, atol=1e-4)
    made.train_step(2)
    moved, policy = reference_logps(made)
    assert torch.allclose(moved, policy, atol=1e-5) == (share == 1.0)
    assert not torch.equal(moved, before)
    theirs = dict(made.models.policy.model.named_parameters())
    for name, weight in made.models.reference.state.items():
        wanted = weights[name].lerp(theirs[name.replace(".reference", ".default")], share)
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-7)
    made.means.pop()
    made.train_step(3)
    loss = made.means.pop()["loss"]
    assert (loss == pytest.approx(math.log(2), abs=1e-5)) == (share == 1.0)


@pytest.mark.parametrize("flags", [HARD, [*SOFT, *FULL]], ids=["adapter", "full, soft"])
def test_a_resumed_run_has_the_reference_that_it_had(flags, tmp_path):
    flags = [*flags, "--train.save_steps", 3, "--train.max_steps", 5]
    flags += ["--data.eval_fraction", 0.3, "--train.eval_steps", 1]
    straight = run(config(tmp_path, *flags))
    assert load_reference(straight / "checkpoint-3")
    on = ["--train.resume", straight / "checkpoint-3", "--train.output_dir", tmp_path / "on"]
    resumed = run(config(tmp_path, *flags, *on))
    assert training(resumed)[-2:] == training(straight)[-2:]
    evaluations = [line for line in metrics(straight) if "eval/loss" in line]
    assert "eval/displacement" not in evaluations[-1]  # since step 0: the reference has moved
    still = run(config(tmp_path, *flags, "--reference.update", "never",
                       "--train.output_dir", tmp_path / "still"))  # fmt: skip
    assert training(still)[-2:] != training(straight)[-2:]  # that could fail
    assert any("eval/displacement" in line for line in metrics(still))


def test_what_cannot_be_cached_is_refused_and_said(tmp_path):
    for flags in (HARD, ["--loss.type", "tdpo2"]):
        folder = tmp_path / flags[1]
        settings = config(tmp_path, *flags, "--train.output_dir", folder)
        settings.reference.cache = "auto"
        with pytest.raises(UserError, match="got auto, but nothing would be kept"):
            cache_reference(settings)
        header = (run(settings) / "header.txt").read_text()
        assert "reference cache: off" in header
    assert "note: no reference cache: the loss reads more of the reference" in header


@pytest.mark.parametrize(
    ("flags", "rewards"),
    [
        ([], "beta times log-ratios"),
        (["--loss.type", "simpo"], "beta times mean log-probs of a token, without a reference"),
        (["--loss.type", "cpo"], "beta times log-probs, without a reference"),
        (HARD, "beta times log-ratios to a reference that moves"),
    ],
    ids=["", "simpo", "cpo", "moving"],
)
def test_the_header_and_the_report_say_what_rewards_are(flags, rewards, tmp_path):
    more = ["--data.eval_fraction", 0.3, "--train.write_report", "true"]
    folder = run(config(tmp_path, *flags, *more))
    assert f"Rewards are {rewards}, in nats" in (folder / "report.html").read_text()
    assert read_logs(folder).rewards == rewards
    last = [line for line in metrics(folder) if "eval/loss" in line][-1]
    held_out = read_logs(folder).held_out[-1]
    columns = {name: np.array(values) for name, values in held_out.items() if name != "step"}
    scale = columns["chosen_lengths"] if "token" in rewards else 1
    wanted = 0.1 * (columns["policy_chosen_logps"] - columns["ref_chosen_logps"]) / scale
    assert last["eval/rewards/chosen"] == pytest.approx(wanted.mean(), rel=1e-4, abs=1e-6)


def test_a_finished_run_is_measured_against_what_it_started_from(tmp_path):
    """Evaluation afterwards compares with the model before training, as for any run."""
    folder = run(config(tmp_path, *HARD, "--optim.learning_rate", 1e-3))
    finished = FinishedRun(folder)
    stream = shortest_pairs(finished.data.train, Order.of(finished.config.train, 24, 1))
    base = Scorer(load_base(finished.config.model, "cpu"))
    with torch.no_grad():
        started_from, trained = base(stream), finished.scorer(stream)
    torch.testing.assert_close(finished.reference(stream), started_from)
    assert not torch.allclose(trained, started_from, atol=1e-3)
