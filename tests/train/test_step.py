"""One step: one gradient however it is split, nothing counted twice, and a stop before bad news."""

import json
from dataclasses import replace

import pytest
import torch

from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.train.budget import STEPS_TO_RECOVER, token_budget
from dpo.train.selfcheck import shortest_pairs
from dpo.train.step import TrainStep
from dpo.train.trainer import Run
from tests.commands import as_two_processes
from tests.train.runs import (
    assert_same_gradients,
    config,
    rows_file,
    run,
    started,
    step_gradients,
    training,
)


def test_one_gradient_at_any_token_budget_and_batch_shape(tmp_path):
    """16 pairs as 16 x 1, about 4 x 4 and 1 x 16 micro-batches; and the short last step of 8.

    By the loss that sees lengths as well as sums.
    """
    results = [
        step_gradients(
            config(
                tmp_path,
                *("--train.tokens_per_microbatch", budget, "--loss.type", "ipo"),
                *("--train.per_device_train_batch_size", batch),
                *("--train.gradient_accumulation_steps", 16 // batch),
            )
        )
        for budget, batch in ((1, 16), (250, 4), (100_000, 1))
    ]
    for result in results[1:]:
        assert_same_gradients(result, results[0])


def rows_with_openings(folder):
    """Packaged rows behind two long system prompts, one of which begins as the other does."""
    file = rows_file(folder, 24)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    begun = "You add and sort numbers. " * 3
    for number, row in enumerate(rows):
        row["system"] = [begun, begun + "Answer with one word. " * 2, ""][number % 3]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "tdpo1", "kto_pair"])
def test_pairs_that_share_an_opening_have_the_gradient_of_pairs_alone(loss, tmp_path):
    """One pair a micro-batch shares nothing across pairs; the whole step at once shares all."""
    flags = ["--data.name_or_path", rows_with_openings(tmp_path), "--loss.type", loss]
    alone, some, together = (
        step_gradients(config(tmp_path, *flags, "--train.tokens_per_microbatch", budget))
        for budget in (1, 400, 100_000)
    )
    assert_same_gradients(some, alone)
    assert_same_gradients(together, alone)
    made = started(config(tmp_path, *flags))
    pairs = [made.data.train[i] for i in made.order.indices(1)]
    computed = len(build_stream(pairs).input_ids)
    assert computed < 0.8 * sum(pair.num_stream_tokens for pair in pairs)


@pytest.mark.distributed
@pytest.mark.parametrize("rows", [24, 17])
def test_two_processes_give_the_gradient_of_one_also_for_a_short_last_step(tmp_path, rows):
    """Steps of 16 pairs; the last one has 8, or a single one, which leaves a rank without pairs."""
    flags = ["--train.tokens_per_microbatch", 250, "--train.per_device_train_batch_size"]
    output = tmp_path / "gradients.pt"
    as_two_processes("-m", "tests.train.two_ranks", tmp_path, output, rows, *flags, 8)
    expected = step_gradients(config(tmp_path, *flags, 16, rows=rows))
    for results in torch.load(output):
        assert_same_gradients(results, expected)


def test_dropout_differs_between_steps_and_the_resumed_test_would_notice(tmp_path, monkeypatch):
    """The negative control: with one seed for every step, the run comes out otherwise."""
    flags = ["--lora.dropout", 0.2]
    straight = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "a"))
    monkeypatch.setattr(TrainStep, "seed_dropout", lambda *_: torch.manual_seed(0))
    other = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "b"))
    assert training(other) != training(straight)


def test_nf4_layers_stay_trainable_after_evaluation_and_generation(tmp_path, monkeypatch):
    """The input gradient of the policy is the same before and after both."""
    flags = ["--model.quantization", "nf4", "--data.eval_fraction", 0.3, "--train.eval_prompts", 4]
    one = started(config(tmp_path, *flags, "--train.eval_max_new_tokens", 4))
    stream = shortest_pairs(one.data.train, one.order)

    def gradient():
        one.optimizer.zero_grad()
        one.models.scorer(stream).sum().backward()
        grads = [p.grad for p in one.models.policy.model.parameters() if p.requires_grad]
        return torch.cat([g.flatten().clone() for g in grads])

    before, logps = gradient(), one.models.scorer(stream).detach()
    one.evaluator.evaluate()
    assert torch.equal(gradient(), before)
    assert torch.equal(one.models.scorer(stream).detach(), logps)
    assert before.abs().max() > 0


# ------------------------------------------------------------------------------------ out of memory


def out_of_memory_above(monkeypatch, most, *, times=10**9):
    """Micro-batches of more tokens fail in their backward, so many times, half of their gradient
    written. Returns the sizes of those that went through."""
    backward, failures, sizes = TrainStep.backward, [], []

    def fail(self, stream, pairs_in_step):
        done = backward(self, stream, pairs_in_step)
        if len(stream.input_ids) > most and len(failures) < times:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. (a test's)")
        sizes.append(len(stream.input_ids))
        return done

    monkeypatch.setattr(TrainStep, "backward", fail)
    return sizes


def test_out_of_memory_halves_the_budget_and_loses_neither_step_nor_pair(
    tmp_path, monkeypatch, capsys
):
    """The gradient and the metrics of both steps are those of a run that had the memory."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    out_of_memory_above(monkeypatch, 150)
    assert_same_gradients(step_gradients(config(tmp_path)), whole)
    said = capsys.readouterr().err
    assert said.count("out of memory: from here on") == 2  # about 600 tokens: 300, 150


def test_a_trained_run_that_ran_out_of_memory_is_the_run_that_did_not(tmp_path, monkeypatch):
    plain = run(config(tmp_path, "--train.output_dir", tmp_path / "plain"))
    out_of_memory_above(monkeypatch, 300)
    cut = run(config(tmp_path))
    for ours, theirs in zip(training(cut), training(plain), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def grows_after(monkeypatch, steps):
    monkeypatch.setattr(
        "dpo.train.trainer.token_budget",
        lambda *args: replace(token_budget(*args), wait=steps),
    )


def test_memory_that_was_only_in_pieces_costs_no_budget(tmp_path, monkeypatch, capsys):
    """The first failure of a step may be fragmentation: the cache is emptied, the same tried."""
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    sizes = out_of_memory_above(monkeypatch, 250, times=1)
    assert_same_gradients(step_gradients(config(tmp_path)), whole)
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
    sizes = out_of_memory_above(monkeypatch, 100, times=3)  # a retry, and two halvings
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


def test_with_several_ranks_only_what_does_not_reduce_is_begun_again(tmp_path, monkeypatch):
    """The last micro-batch reduces the gradient over ranks; and a lowered budget stays low."""
    made = started(config(tmp_path, "--train.tokens_per_microbatch", 200))
    made.train_step.budget.full, made.train_step.budget.changed_at = 400, -STEPS_TO_RECOVER
    monkeypatch.setattr(type(made.accelerator), "num_processes", 2)
    pairs = [made.data.train[i] for i in made.order.indices(1)]
    backward, failing, seen = made.train_step.backward, [0], []

    def fails_once(stream, pairs_in_step):
        seen.append(len(stream.input_ids))
        if len(seen) - 1 in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. (a test's)")
        return backward(stream, pairs_in_step)

    made.train_step.backward = fails_once
    number = len(made.train_step.gradient(1, pairs, pairs_in_step=len(pairs)))
    assert max(seen) <= 200
    assert len(seen) == number + 1 >= 3
    failing[:] = [len(seen) + number - 1]
    with pytest.raises(UserError, match="while ranks were reducing a gradient"):
        made.train_step.gradient(2, pairs, pairs_in_step=len(pairs))


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
        assert_same_gradients(step_gradients(config(tmp_path), steps=(1,)), whole)


def test_one_pair_that_does_not_fit_ends_the_run_with_what_to_do(tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, 10)
    with pytest.raises(UserError, match=r"ran out of memory with one pair.*gradient_checkpointing"):
        run(config(tmp_path))


def test_while_ranks_reduce_a_gradient_a_step_cannot_be_begun_again(tmp_path):
    made = started(config(tmp_path))
    pairs = [TokenizedPair([n] * 40, [n] * 4, [n + 1] * 8) for n in range(4)]  # of 50 tokens
    with pytest.raises(
        UserError, match="while ranks were reducing a gradient; the largest has 150"
    ):
        made.train_step._lower_budget(1, [pairs[:3], pairs[3:]], is_reducing=True)
    made.train_step._lower_budget(1, [pairs[:3], pairs[3:]], is_reducing=False)
    assert made.train_step.budget.tokens == 75


def test_the_largest_micro_batch_comes_first_and_the_smallest_last(tmp_path, monkeypatch):
    """So memory runs out, if it does, before ranks begin to reduce."""
    sizes = []
    backward = TrainStep.backward

    def noted(self, stream, pairs_in_step):
        sizes.append(len(stream.input_ids))
        return backward(self, stream, pairs_in_step)

    monkeypatch.setattr(TrainStep, "backward", noted)
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
