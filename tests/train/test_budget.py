"""As many tokens at once as fit, and when they do not fit after all, no step is lost."""

import json
import shutil

import pytest
import torch

from dpo.data.order import Order
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.plan.fake import FakePolicy
from dpo.plan.fit import MOST_TOKENS, SAVINGS, memory_parts
from dpo.plan.memory import peak_bytes
from dpo.train import budget as budget_module
from dpo.train.budget import STEPS_TO_RECOVER, Budget, fastest, probe_pairs, token_budget
from tests.train.runs import assert_same_gradients, config, run, started, step_gradients, training

AUTO = ["--train.tokens_per_microbatch", "auto"]
CPU = torch.device("cpu")


def with_free(monkeypatch, free):
    monkeypatch.setattr("dpo.train.budget.free_bytes", lambda device: free)


def test_what_is_free_decides_and_the_gradient_stays_the_same(tmp_path, monkeypatch):
    """A run that is given 25 MB cuts its steps; its gradients and metrics are those of one cut."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    with_free(monkeypatch, 25e6)
    one = started(config(tmp_path, *AUTO, "--train.output_dir", tmp_path / "one"))
    assert one.data.train.longest_in_files == max(pair.num_stream_tokens for pair in one.data.train)
    sizes = [one.data.train[i].num_stream_tokens for i in one.order.indices(1)]
    assert max(sizes) <= one.train_step.budget.tokens < sum(sizes)
    assert_same_gradients(step_gradients(config(tmp_path, *AUTO)), whole)
    said = f"memory: {one.train_step.budget.tokens} tokens a micro-batch, no layer checkpointed: a "
    assert said + "token takes" in (tmp_path / "one" / "header.txt").read_text()


def test_a_full_micro_batch_takes_about_nine_tenths_of_what_was_free(tmp_path, monkeypatch):
    """Measured on one micro-batch of the budget, to the byte: at most 0.9 of the 40 MB, at least
    0.7 (pairs do not fill it to the last token)."""
    with_free(monkeypatch, 40e6)
    one = started(config(tmp_path, *AUTO, rows=200))
    pairs = iter(one.data.train)
    chosen = [next(pairs)]
    while len(build_stream(chosen).input_ids) < one.train_step.budget.tokens:
        chosen.append(next(pairs))
    peak = peak_bytes(CPU, lambda: one.train_step.gradient(1, chosen[:-1], pairs_in_step=16))
    assert 0.7 * 40e6 < peak < 0.9 * 40e6


def test_with_memory_for_everything_it_stays_below_the_most(tmp_path, monkeypatch):
    """And where no clock may decide, it is just that."""
    with_free(monkeypatch, 1e15)
    flags = [*AUTO, "--train.deterministic", "true"]
    assert started(config(tmp_path, *flags)).train_step.budget.tokens == MOST_TOKENS["cpu"]


class Machine:
    """A clock, and work that takes it forward: seconds by the tokens of a micro-batch."""

    def __init__(self, seconds):
        self.now, self.seconds, self.cuts = 0.0, seconds, []

    def work(self, pairs):
        self.cuts.append(sum(pair.num_stream_tokens for pair in pairs))
        self.now += self.seconds(self.cuts[-1]) / 1000

    def choose(self, most, pairs):
        return fastest(most, pairs, self.work, lambda: self.now)


EIGHT = [TokenizedPair([1] * 101, [2] * 50, [3] * 101)] * 8  # of 250 tokens each


@pytest.mark.parametrize(
    ("seconds", "most", "chosen"),
    [
        (lambda n: n, 2048, 2048),  # all alike: the fewest micro-batches
        (lambda n: n + 40 * (n > 1024), 2048, 2048),  # not worth it
        (lambda n: n + n * (n > 1024), 2048, 1024),  # a cache of so many
        (lambda n: n**2 / 1000, 2048, 512),
        (lambda n: n + 9999, 2048, 2048),  # each micro-batch has a cost of its own
        (lambda n: n**2 / 1000, 800, 512),  # memory has room for no more
        (lambda n: n + 9999, 800, 800),
        (lambda n: n**2, 2048, 2048),  # 4,000 s: nothing else is tried
    ],
)
def test_on_a_cpu_the_fastest_of_what_fits_is_taken(seconds, most, chosen):
    machine = Machine(seconds)
    tokens, said = machine.choose(most, EIGHT)
    assert tokens == chosen
    assert max(machine.cuts) <= most
    assert f"{chosen} in " in said
    assert sum(machine.cuts) == 2000 * said.count(" in ")  # the same pairs each time


def test_ways_that_cut_alike_are_not_tried():
    machine = Machine(lambda n: n)
    assert machine.choose(2048, EIGHT[:1]) == (2048, "")
    assert machine.cuts == []


def test_a_run_on_a_cpu_takes_what_was_fastest_and_says_so(tmp_path, monkeypatch):
    """Whatever is fastest, the gradient is the same, and nothing is left of the trial."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    tried = []

    def at_300(most, pairs, work, **_):
        work(pairs)
        tried.append(most)
        return 300, "; the first pairs go through 300 in 1 s"

    monkeypatch.setattr(budget_module, "fastest", at_300)
    one = started(config(tmp_path, *AUTO, "--train.output_dir", tmp_path / "one"))
    assert one.train_step.budget.tokens == one.train_step.budget.full == 300
    assert len(tried) == 1
    said = "are free; the first pairs go through 300 in 1 s\n"
    assert said in (tmp_path / "one" / "header.txt").read_text()
    assert all(p.grad is None or not p.grad.any() for p in one.models.trained)
    assert_same_gradients(step_gradients(config(tmp_path, *AUTO)), whole)


def test_a_resumed_run_cuts_its_steps_as_before_whatever_is_free_then(tmp_path, monkeypatch):
    """And so goes on bit for bit, LoRA's dropout masks included."""
    flags = [*AUTO, "--train.save_steps", 2, "--train.max_steps", 4, "--lora.dropout", 0.3]
    with_free(monkeypatch, 40e6)
    straight = run(config(tmp_path, *flags))
    expected = training(straight)
    with_free(monkeypatch, 400e6)
    (straight / "summary.json").unlink()
    shutil.rmtree(straight / "checkpoint-4")
    assert training(run(config(tmp_path, *flags))) == expected
    state = json.loads((straight / "checkpoint-2" / "state.json").read_text())
    assert (
        f"memory: {state['tokens_per_microbatch']} tokens a micro-batch, no layer checkpointed, as "
        "before" in (straight / "header.txt").read_text()
    )


def test_a_resumed_run_saves_memory_as_before(tmp_path, monkeypatch):
    """Every layer was checkpointed, and the head's tile small: a whole pair did not fit else."""
    flags = [*AUTO, "--train.save_steps", 2, "--train.max_steps", 4, "--lora.dropout", 0.3]
    least = SAVINGS[-1]
    with monkeypatch.context() as patch:
        patch.setattr("dpo.plan.fit.SAVINGS", [least])
        straight = run(config(tmp_path, *flags))
    expected = training(straight)
    (straight / "summary.json").unlink()
    shutil.rmtree(straight / "checkpoint-4")
    resumed = started(config(tmp_path, *flags))
    assert resumed.start_step == 2
    assert resumed.train_step.budget.saving == least
    assert num_checkpointed(resumed.models.policy.model) == 4
    assert resumed.models.scorer.tile_bytes == least.tile_bytes < SAVINGS[0].tile_bytes
    assert training(run(config(tmp_path, *flags))) == expected


# ------------------------------------------------------------------------------- the 4-bit base

QUANTISED = [*AUTO, "--model.quantization", "nf4", "--train.max_steps", 3]


def layer_kinds(policy):
    return {
        type(layer).__name__ for name, layer in policy.model.named_modules() if "base_layer" in name
    }


@pytest.mark.parametrize(
    ("free", "flags", "kind", "said"),
    [
        (1e12, [], "Linear", "base: dequantised once: dequantised it takes"),
        (30e6, [], "Linear4bit", "base: kept in 4 bits: dequantised it takes"),
        (1e12, ["--model.dequantize_base", "false"], "Linear4bit", "kept in 4 bits, as configured"),
        (30e6, ["--model.dequantize_base", "true"], "Linear", "dequantised once, as configured"),
    ],
    ids=["room", "no room", "false", "true"],
)
def test_a_4_bit_base_is_made_plain_where_there_is_room(
    free, flags, kind, said, tmp_path, monkeypatch
):
    with_free(monkeypatch, free)
    one = started(config(tmp_path, *QUANTISED, *flags))
    assert layer_kinds(one.models.policy) == {kind}
    assert said in (one.folder / "header.txt").read_text()


def test_a_run_on_plain_layers_has_the_numbers_of_a_4_bit_run(tmp_path):
    """In fp32, to 1e-5; and other numbers than an unquantised run's: the negative control."""
    flags = [*QUANTISED, "--train.tokens_per_microbatch", 512]
    losses = {
        name: [
            line["train/loss"]
            for line in training(
                run(config(tmp_path, *flags, *more, "--train.output_dir", tmp_path / name))
            )
        ]
        for name, more in (
            ("4-bit", ["--model.dequantize_base", "false"]),
            ("plain", ["--model.dequantize_base", "true"]),
            ("never", ["--model.quantization", "none"]),
        )
    }
    assert losses["plain"] == pytest.approx(losses["4-bit"], abs=1e-5)
    assert losses["never"] != pytest.approx(losses["4-bit"], abs=1e-5)


def test_what_is_not_4_bit_cannot_be_dequantised(tmp_path):
    with pytest.raises(UserError, match=r"model.dequantize_base: got True, wanted auto or false"):
        config(tmp_path, *AUTO, "--model.dequantize_base", "true")


# ---------------------------------------------------------------------------- gradient checkpoints


def num_checkpointed(model):
    layers = model.get_base_model().model.layers
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers)


def test_a_pair_that_does_not_fit_at_all_is_refused_with_its_size(tmp_path, monkeypatch):
    with_free(monkeypatch, 1.3e6)
    with pytest.raises(
        UserError, match=r"got auto, but the longest pair has \d+ tokens and \d+ fit"
    ):
        started(config(tmp_path, *AUTO))


def test_the_smallest_budget_of_all_ranks_is_taken(tmp_path, monkeypatch):
    def smallest(accelerator, number):
        return min(number, 777)

    monkeypatch.setattr("dpo.train.budget.smallest_over_ranks", smallest)
    assert started(config(tmp_path, *AUTO)).train_step.budget.tokens == 777


@pytest.mark.parametrize(
    ("name", "planned"),
    [("adamw", 5547008), ("paged_adamw_32bit", 5547008), ("adamw_8bit", 1415296)],
)
def test_the_trainer_reserves_for_the_optimizer_what_the_planner_says(
    tmp_path, monkeypatch, name, planned
):
    """At 7B, 8 bytes a weight for 8-bit moments would be 56 GB reserved instead of 14."""
    flags = ["--model.adapter", "none", "--model.dtype", "bfloat16", "--optim.name", name]
    settings = config(tmp_path, *AUTO, *flags)
    reserved = []
    reserve = budget_module.optimizer_bytes
    monkeypatch.setattr(
        budget_module, "optimizer_bytes", lambda *of: reserved.append(reserve(*of)) or reserved[-1]
    )
    started(settings)
    assert reserved == [planned]
    parts = memory_parts(FakePolicy(settings), settings)
    assert parts[f"optimizer state, {name}"] == planned


def test_the_probe_takes_pairs_up_to_its_size_and_never_none():
    def probe(*lengths, times):
        pairs = [TokenizedPair(*([i] * n for i, n in enumerate(lengths)))] * times
        return len(probe_pairs(pairs, Order(times, times, num_steps=1, seed=0)))

    assert probe(700, 200, 200, times=5) == 1  # two have 2196 tokens
    assert probe(9000, 1, 1, times=1) == 1
    assert probe(100, 1, 1, times=50) == 20


# ---------------------------------------------------------------------- lowered, and grown again


def test_a_try_to_grow_that_fails_goes_back_to_what_fitted_and_waits_twice_as_long():
    """9,000 tokens fit of 16,384: half of the first failure, and never far from it again."""
    budget = Budget(16384, SAVINGS[0], "", full=16384)
    seen = []
    for step in range(1, 500):
        budget.recover(step)
        while budget.tokens > 9000:
            budget.lower(step, largest=budget.tokens)
        seen.append(budget.tokens)
    assert set(seen) == {8192}
    assert budget.wait == 8 * STEPS_TO_RECOVER  # tried after 50, 100 and 200 steps


def budget_again(made, state):
    return token_budget(made.config, made.accelerator, made.models, [], 0, state)


@pytest.mark.parametrize("given", ["auto", 500])
def test_a_lowered_budget_is_resumed_unless_another_was_asked_for(tmp_path, given):
    lowered = Budget(125, SAVINGS[0], "", full=500, changed_at=7, fitted=0, wait=100)
    made = started(config(tmp_path, "--train.tokens_per_microbatch", given))
    found = budget_again(made, lowered.state)
    assert found.state == lowered.state
    assert found.reason.startswith("125 tokens a micro-batch, ")
    made = started(
        config(tmp_path, "--train.tokens_per_microbatch", 300, "--train.resume", "never")
    )
    found = budget_again(made, lowered.state)
    assert (found.tokens, found.full, found.changed_at) == (300, 300, 0)


def test_a_checkpoint_from_before_budgets_grew_is_resumed(tmp_path):
    found = budget_again(started(config(tmp_path, *AUTO)), {"tokens_per_microbatch": 125})
    assert (found.tokens, found.full) == (125, 125)
