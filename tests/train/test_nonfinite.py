"""Numbers that are not finite: no step is taken with them, and what was found is kept."""

import json
import math

import pytest
import torch

from dpo.data.stream import TokenizedPair
from dpo.errors import UserError
from dpo.model import pair_scores
from dpo.train import nonfinite, step
from dpo.train.nonfinite import MAX_SKIPPED, NotFiniteError, first_bad_layer
from tests.chaos.runs import outcome
from tests.commands import called
from tests.train.runs import config, metrics, run, started, training

NAN = float("nan")


def poison(monkeypatch, *steps, value=NAN, rows=slice(None)):
    """Makes the policy's log-probs of some answers not finite, in these steps of each run."""
    pair_logps, take = pair_scores.pair_logps, step.TrainStep.__call__
    now = []

    def taken(self, number):
        now[:] = [number]
        return take(self, number)

    def poisoned(policy, reference, ids, num_pairs):
        if now and now[0] in steps:
            factor = torch.ones(2 * num_pairs)
            factor[rows] = value
            policy = policy * factor[ids]
        return pair_logps(policy, reference, ids, num_pairs)

    monkeypatch.setattr(step.TrainStep, "__call__", taken)
    monkeypatch.setattr(pair_scores, "pair_logps", poisoned)


def found_at(folder, number):
    return json.loads((folder / "run" / f"nonfinite-{number}" / "findings.json").read_text())


def test_a_step_that_is_not_finite_is_not_taken_and_its_rows_are_named(tmp_path, monkeypatch):
    settings = config(tmp_path, rows=3)
    settings.train.per_device_train_batch_size = 3
    one = started(settings)
    before = {n: p.detach().clone() for n, p in one.models.policy.model.named_parameters()}
    poison(monkeypatch, 1)
    with pytest.raises(NotFiniteError, match=r"step 1 is not taken: .*: [123], [123], [123];"):
        one.train_step(1)
    for name, parameter in one.models.policy.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    found = found_at(tmp_path, 1)
    assert {row["row"] for row in found["rows"]} == {"1", "2", "3"}
    assert all(row["chosen_ids"] for row in found["rows"])
    assert found["first_layer"] == ""  # the model itself is sound
    assert "lora_A" in found["bad_gradients"][0]


def test_one_row_alone_is_named(tmp_path, monkeypatch):
    poison(monkeypatch, 2, rows=slice(0, 1))
    with pytest.raises(UserError, match=r"Rows whose loss is not finite: \d+; .*Step 1 is saved"):
        run(config(tmp_path))


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_the_run_stops_with_what_it_had(value, tmp_path, monkeypatch):
    """The weights of the step before are saved, and the run can go on from there."""
    with monkeypatch.context() as patch:
        poison(patch, 3, value=value)
        with pytest.raises(UserError, match=r"step 3 is not taken.*Step 2 is saved"):
            run(config(tmp_path, "--train.max_steps", 4))
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    again = run(config(tmp_path, "--train.max_steps", 4, "--train.on_nonfinite", "skip"))
    assert training(again) == training(
        run(config(tmp_path, "--train.max_steps", 4, "--train.output_dir", tmp_path / "straight"))
    )


def test_a_skipped_step_is_said_counted_and_exact_on_resume(tmp_path, monkeypatch, capsys):
    flags = ["--train.on_nonfinite", "skip", "--train.max_steps", 6, "--train.save_steps", 1]
    flags += ["--data.eval_fraction", 0.3, "--train.save_total_limit", 9]
    flags += ["--train.eval_prompts", 1, "--train.metric_for_best_model", "eval/loss"]
    poison(monkeypatch, 2, 4)
    straight = run(config(tmp_path, *flags))
    said = capsys.readouterr().err
    assert "step 2 is not taken: its gradient is not finite." in said
    assert "Skipped: 1 of 10." in said
    assert "Skipped: 2 of 10." in said
    assert [line["step"] for line in metrics(straight) if "train/loss" in line] == [1, 3, 5, 6]
    resumed = ["--train.resume", straight / "checkpoint-3", "--train.output_dir", tmp_path / "on"]
    again = run(config(tmp_path, *flags, *resumed))
    assert outcome(again) == outcome(straight)
    assert "Skipped: 2 of 10." in capsys.readouterr().err


def test_too_many_skipped_steps_stop_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, *range(2, 99))
    flags = ["--train.on_nonfinite", "skip", "--train.max_steps", 20]
    with pytest.raises(UserError, match=rf"step {MAX_SKIPPED + 2} is not taken.*no longer sound"):
        run(config(tmp_path, *flags))


def test_a_gradient_alone_is_noticed(tmp_path, monkeypatch):
    """The losses are finite; a product in the backward is not."""
    backward = step.TrainStep.backward

    def overflows(self, stream, pairs):
        done = backward(self, stream, pairs)
        self.models.trained[0].grad.fill_(math.inf)
        return done

    monkeypatch.setattr(step.TrainStep, "backward", overflows)
    with pytest.raises(UserError, match=r"Rows of the step, whose losses are finite: \d+, \d+"):
        run(config(tmp_path, "--train.max_steps", 1))
    assert len(found_at(tmp_path, 1)["bad_gradients"]) == 1


def test_a_held_out_row_that_is_not_finite_stops_the_run(tmp_path):
    """Its NaN would be the mean of all, in a log that is no JSON any more."""
    one = started(config(tmp_path, "--data.eval_fraction", 0.3))
    with torch.no_grad():
        one.models.policy.model.get_input_embeddings().weight[1] = NAN  # every turn begins with it
    with pytest.raises(UserError, match=r"step 0: eval/loss, .* not be finite. Rows .*: \d+"):
        one.evaluate(0)
    assert metrics(tmp_path / "run") == []
    found = found_at(tmp_path, 0)
    assert "eval/loss" in found["metrics"]
    assert found["first_layer"].endswith("embed_tokens")


def test_the_first_layer_that_goes_wrong_is_named(tmp_path):
    one = started(config(tmp_path))
    pair = TokenizedPair([5, 6], [7, 8], [9])
    assert first_bad_layer(one.models.scorer, pair, torch.device("cpu")) == ""
    layer = one.models.policy.model.get_base_model().model.layers[2]
    with torch.no_grad():
        layer.mlp.down_proj.base_layer.weight[0] = NAN
    assert "layers.2.mlp" in first_bad_layer(one.models.scorer, pair, torch.device("cpu"))


def test_a_user_gets_one_message(tmp_path, monkeypatch):
    poison(monkeypatch, 1)
    flags = ["--train.max_steps", 2, "--train.report_to", "none"]
    code, _, said = called("train.py", *flags, "--train.output_dir", tmp_path / "run")
    assert code == 2
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: step 1 is not taken")


def test_only_so_many_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "MAX_ROWS", 2)
    poison(monkeypatch, 1)
    with pytest.raises(UserError):
        run(config(tmp_path))
    found = found_at(tmp_path, 1)
    assert (len(found["rows"]), found["num_rows"]) == (2, 16)
