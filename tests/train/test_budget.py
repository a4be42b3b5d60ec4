"""As many tokens at once as fit, and when they do not fit after all, no step is lost."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dpo.data.stream import TokenizedPair
from dpo.errors import UserError
from dpo.model.load import checkpoint_layers
from dpo.plan.fake import FakePolicy
from dpo.plan.memory import MOST_TOKENS, SAVINGS, peak_bytes
from dpo.plan.plan import memory_parts
from dpo.train import budget as budget_module
from dpo.train.budget import (
    STEPS_TO_RECOVER,
    Budget,
    auto_budget,
    probe_pairs,
    token_budget,
)
from dpo.train.trainer import Run
from tests.models import tiny, with_lora
from tests.train.runs import config, forget_accelerate, run, step_gradients, training

AUTO = ["--train.tokens_per_microbatch", "auto"]
CPU = torch.device("cpu")


def with_free(monkeypatch, free):
    monkeypatch.setattr("dpo.train.budget.free_bytes", lambda device: free)


def started(settings):
    forget_accelerate()
    made = Run(settings)
    made.tracker.close_bar()
    return made


def equal_gradients(ours, theirs):
    for step in theirs:
        largest = theirs[step][0].abs().max()
        assert (ours[step][0] - theirs[step][0]).abs().max() <= 1e-5 * largest
        assert ours[step][1] == pytest.approx(theirs[step][1], abs=1e-5)


def test_what_is_free_decides_and_the_gradient_stays_the_same(tmp_path, monkeypatch):
    """A run that is given 30 MB cuts its steps; its gradients and metrics are those of one cut."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    with_free(monkeypatch, 30e6)
    one = started(config(tmp_path, *AUTO, "--train.output_dir", tmp_path / "one"))
    assert one.data.train.longest_in_files == max(pair.num_stream_tokens for pair in one.data.train)
    sizes = [one.data.train[i].num_stream_tokens for i in one.indices(1)]
    assert max(sizes) <= one.budget.tokens < sum(sizes)
    equal_gradients(step_gradients(config(tmp_path, *AUTO)), whole)
    assert (
        f"memory: {one.budget.tokens} tokens a micro-batch, no layer checkpointed: a token takes"
        in (tmp_path / "one" / "header.txt").read_text()
    )


def test_a_full_micro_batch_takes_about_nine_tenths_of_what_was_free(tmp_path, monkeypatch):
    """Measured on one micro-batch of the budget, to the byte: at most 0.9 of the 40 MB, at least
    0.7 (pairs do not fill it to the last token)."""
    with_free(monkeypatch, 40e6)
    one = started(config(tmp_path, *AUTO, rows=200))
    pairs = iter(one.data.train)
    chosen = [next(pairs)]
    while sum(pair.num_stream_tokens for pair in chosen) < one.budget.tokens:
        chosen.append(next(pairs))
    peak = peak_bytes(CPU, lambda: one._gradient(1, chosen[:-1], pairs_in_step=16))
    assert 0.7 * 40e6 < peak < 0.9 * 40e6


def test_with_memory_for_everything_it_stays_below_the_most(tmp_path, monkeypatch):
    with_free(monkeypatch, 1e15)
    assert started(config(tmp_path, *AUTO)).budget.tokens == MOST_TOKENS["cpu"]


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
        patch.setattr("dpo.train.budget.SAVINGS", [least])
        straight = run(config(tmp_path, *flags))
    expected = training(straight)
    (straight / "summary.json").unlink()
    shutil.rmtree(straight / "checkpoint-4")
    resumed = started(config(tmp_path, *flags))
    assert resumed.start_step == 2
    assert resumed.budget.saving == least
    assert num_checkpointed(resumed.policy.model) == 4
    assert resumed.scorer.tile_bytes == least.tile_bytes < SAVINGS[0].tile_bytes
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
    assert layer_kinds(one.policy) == {kind}
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


def work_of(model):
    """Twelve tokens of a tiny model, forward and backward."""
    ids = torch.arange(12)[None]
    return lambda: model(input_ids=ids).logits.sum().backward()


def found(model, monkeypatch, *, free, longest):
    with_free(monkeypatch, free)
    return auto_budget(
        model,
        work_of(model),
        num_tokens=12,
        longest=longest,
        optimizer="adamw",
        device=CPU,
        savings=SAVINGS,
        save=lambda saving: put(model, saving),
        smallest_over_ranks=lambda number: number,
    )


def put(model, saving):
    if saving.checkpoint_every:
        checkpoint_layers(model.get_base_model(), saving.checkpoint_every)


def num_checkpointed(model):
    layers = model.get_base_model().model.layers
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers)


def test_checkpoints_are_set_only_where_the_longest_pair_does_not_fit(monkeypatch):
    """Of eight layers none, some or all, and each time the pair fits that did not before."""
    sizes, checkpointed = [], []
    for share in (1.0, 0.7, 0.45):
        model = with_lora(tiny(num_hidden_layers=8))
        reserved = sum(p.numel() * 8 for p in model.parameters() if p.requires_grad)
        per_token = peak_bytes(CPU, work_of(model)) / 12
        free = reserved + 1000 * per_token / 0.9
        budget = found(model, monkeypatch, free=share * free * 1.01, longest=950)
        tokens, saving = budget.tokens, budget.saving
        sizes.append(tokens)
        checkpointed.append(num_checkpointed(model))
        assert (saving != SAVINGS[0]) == (num_checkpointed(model) > 0)
    assert checkpointed[0] == 0
    assert 0 < checkpointed[1] <= checkpointed[2] <= 8
    assert all(tokens >= 950 for tokens in sizes)


def test_a_pair_that_does_not_fit_at_all_is_refused_with_its_size(monkeypatch):
    with pytest.raises(UserError, match=r"got auto, but the longest pair has 5000 tokens and \d+"):
        found(with_lora(tiny()), monkeypatch, free=2e5, longest=5000)


def test_the_smallest_budget_of_all_ranks_is_taken(monkeypatch):
    with_free(monkeypatch, 1e9)
    model = with_lora(tiny())
    options = {"num_tokens": 12, "longest": 5, "device": CPU, "savings": SAVINGS}
    options["optimizer"] = "adamw"
    options["save"] = lambda saving: put(model, saving)
    found = auto_budget(model, work_of(model), **options, smallest_over_ranks=lambda _: 77)
    assert found.tokens == 77


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
        run = SimpleNamespace(data=SimpleNamespace(train=pairs), indices=lambda step: range(times))
        return len(probe_pairs(run))

    assert probe(700, 200, 200, times=5) == 1  # two have 2196 tokens
    assert probe(9000, 1, 1, times=1) == 1
    assert probe(100, 1, 1, times=50) == 20


# ------------------------------------------------------------------------------------ out of memory


def out_of_memory_above(monkeypatch, most, *, times=10**9):
    """Micro-batches of more tokens fail in their backward, so many times, half of their gradient
    written. Returns the sizes of those that went through."""
    backward, failures, sizes = Run._backward, [], []

    def fail(self, stream, pairs_in_step):
        done = backward(self, stream, pairs_in_step)
        if len(stream.input_ids) > most and len(failures) < times:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. (a test's)")
        sizes.append(len(stream.input_ids))
        return done

    monkeypatch.setattr(Run, "_backward", fail)
    return sizes


def test_out_of_memory_halves_the_budget_and_loses_neither_step_nor_pair(
    tmp_path, monkeypatch, capsys
):
    """The gradient and the metrics of both steps are those of a run that had the memory."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    out_of_memory_above(monkeypatch, 250)
    equal_gradients(step_gradients(config(tmp_path)), whole)
    said = capsys.readouterr().err
    assert said.count("out of memory: from here on") == 2  # about 900 tokens: 450, 225


def test_a_trained_run_that_ran_out_of_memory_is_the_run_that_did_not(tmp_path, monkeypatch):
    plain = run(config(tmp_path, "--train.output_dir", tmp_path / "plain"))
    out_of_memory_above(monkeypatch, 300)
    cut = run(config(tmp_path))
    for ours, theirs in zip(training(cut), training(plain), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def grows_after(monkeypatch, steps):
    monkeypatch.setattr(
        "dpo.train.trainer.token_budget",
        lambda run, state: replace(token_budget(run, state), wait=steps),
    )


def test_memory_that_was_only_in_pieces_costs_no_budget(tmp_path, monkeypatch, capsys):
    """The first failure of a step may be fragmentation: the cache is emptied, the same tried."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    sizes = out_of_memory_above(monkeypatch, 250, times=1)
    equal_gradients(step_gradients(config(tmp_path)), whole)
    assert len(sizes) == 2  # one micro-batch a step, as before
    said = capsys.readouterr().err
    assert said.count("out of memory: the step is begun again") == 1
    assert "from here on" not in said


def test_the_budget_grows_back_when_memory_has_been_enough_for_a_while(
    tmp_path, monkeypatch, capsys
):
    """Memory is short in the first step alone; of two cuts one is undone after two steps each."""
    grows_after(monkeypatch, 2)
    flags = ["--train.max_steps", 6, "--lora.dropout", 0.1, "--train.save_steps", 2]
    flags += ["--train.tokens_per_microbatch", 500, "--train.save_total_limit", 9]
    sizes = out_of_memory_above(monkeypatch, 150, times=3)  # a retry, and two halvings
    straight = run(config(tmp_path, *flags))
    assert sizes[-1] > 2 * sizes[0]
    said = capsys.readouterr().err
    assert said.count("from here on") == said.count("tokens a micro-batch again") == 2

    # What grows is a function of the step and the checkpoint: a resumed run grows alike.
    resume = ["--train.resume", straight / "checkpoint-2", "--train.output_dir", tmp_path / "again"]
    resumed = run(config(tmp_path, *flags, *resume))
    assert training(resumed) == training(straight)
    assert capsys.readouterr().err.count("tokens a micro-batch again") == 2
    ours, theirs = ((f / "final" / "adapter_model.safetensors") for f in (resumed, straight))
    assert ours.read_bytes() == theirs.read_bytes()


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


@pytest.mark.parametrize("given", ["auto", 500])
def test_a_lowered_budget_is_resumed_unless_another_was_asked_for(tmp_path, given):
    lowered = Budget(125, SAVINGS[0], "", full=500, changed_at=7, fitted=0, wait=100)
    made = started(config(tmp_path, "--train.tokens_per_microbatch", given))
    found = token_budget(made, lowered.state)
    assert found.state == lowered.state
    assert found.reason.startswith("125 tokens a micro-batch, ")
    made = started(
        config(tmp_path, "--train.tokens_per_microbatch", 300, "--train.resume", "never")
    )
    found = token_budget(made, lowered.state)
    assert (found.tokens, found.full, found.changed_at) == (300, 300, 0)


def test_a_checkpoint_from_before_budgets_grew_is_resumed(tmp_path):
    found = token_budget(started(config(tmp_path, *AUTO)), {"tokens_per_microbatch": 125})
    assert (found.tokens, found.full) == (125, 125)


def test_with_several_ranks_only_what_does_not_reduce_is_begun_again(tmp_path, monkeypatch):
    """The last micro-batch reduces the gradient over ranks; and a lowered budget stays low."""
    made = started(config(tmp_path, "--train.tokens_per_microbatch", 200))
    made.budget.full, made.budget.changed_at = 400, -STEPS_TO_RECOVER
    monkeypatch.setattr(type(made.accelerator), "num_processes", 2)
    pairs, backward, failing = [made.data.train[i] for i in made.indices(1)], made._backward, [0]
    seen = []

    def fails_once(stream, pairs_in_step):
        seen.append(len(stream.input_ids))
        if len(seen) - 1 in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. (a test's)")
        return backward(stream, pairs_in_step)

    made._backward = fails_once
    number = len(made._gradient(1, pairs, pairs_in_step=len(pairs)))
    assert max(seen) <= 200
    assert len(seen) == number + 1 >= 3
    failing[:] = [len(seen) + number - 1]
    with pytest.raises(UserError, match="while ranks were reducing a gradient"):
        made._gradient(2, pairs, pairs_in_step=len(pairs))


def test_without_starting_the_step_again_its_gradient_would_be_counted_twice(tmp_path, monkeypatch):
    """The negative control: it is zero_grad that makes the retried step right."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"), steps=(1,))
    out_of_memory_above(monkeypatch, 250)
    made = started(config(tmp_path))
    del made
    from accelerate.optimizer import AcceleratedOptimizer

    zero_grad = AcceleratedOptimizer.zero_grad
    calls = []

    def only_after_the_step(self):
        calls.append(1)
        if len(calls) > 3:  # the step again, and two halvings
            zero_grad(self)

    monkeypatch.setattr(AcceleratedOptimizer, "zero_grad", only_after_the_step)
    with pytest.raises(AssertionError):
        equal_gradients(step_gradients(config(tmp_path), steps=(1,)), whole)


def test_one_pair_that_does_not_fit_ends_the_run_with_what_to_do(tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, 10)
    with pytest.raises(UserError, match=r"ran out of memory with one pair.*gradient_checkpointing"):
        run(config(tmp_path))


def test_while_ranks_reduce_a_gradient_a_step_cannot_be_begun_again(tmp_path):
    made = started(config(tmp_path))
    with pytest.raises(UserError, match="while ranks were reducing a gradient; the largest has 90"):
        made._lower_budget(1, [[50, 40], [60, 20]], is_reducing=True)
    made._lower_budget(1, [[50, 40], [60, 20]], is_reducing=False)
    assert made.budget.tokens == 45


def test_the_largest_micro_batch_comes_first_and_the_smallest_last(tmp_path, monkeypatch):
    """So memory runs out, if it does, before ranks begin to reduce."""
    sizes = []
    backward = Run._backward

    def noted(self, stream, pairs_in_step):
        sizes.append(len(stream.input_ids))
        return backward(self, stream, pairs_in_step)

    monkeypatch.setattr(Run, "_backward", noted)
    step_gradients(config(tmp_path, "--train.tokens_per_microbatch", 200), steps=(1,))
    assert len(sizes) > 3
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.gpu
def test_a_gpu_that_really_runs_out_of_memory_goes_on_and_comes_back(tmp_path, monkeypatch, capsys):
    """A budget far too large for the share of the memory that the process may use in one step."""
    grows_after(monkeypatch, 1)
    total = torch.cuda.get_device_properties(0).total_memory
    settings = config(tmp_path, "--train.tokens_per_microbatch", 10**6, rows=2000)
    settings.train.per_device_train_batch_size, settings.train.max_steps = 1500, 2
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / total)
    log = Run.log

    def there_is_memory_again(self, step):
        torch.cuda.set_per_process_memory_fraction(1.0)
        log(self, step)

    monkeypatch.setattr(Run, "log", there_is_memory_again)
    try:
        run(settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    assert "out of memory: the step is begun again" in said
    assert "out of memory: from here on" in said
    assert "tokens a micro-batch again" in said
