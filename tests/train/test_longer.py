"""A run that is given more steps goes on, as the run that had them planned from the start."""

import shutil

import pytest

from dpo.catalogue import PAIR_METRICS
from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.train.optim import learning_rate
from tests.train.runs import config, killed, metrics, run, training
from tests.train.test_board import scalar_steps

CONSTANT = ["--optim.lr_scheduler_type", "constant", "--optim.warmup_steps", 3]
EPOCHS = ["--train.max_steps", -1, "--train.num_train_epochs"]


def steps(count):
    return ["--train.max_steps", count]


def evaluated(folder):
    """The steps of the evaluations."""
    return [line["step"] for line in metrics(folder) if "eval/loss" in line]


def trained(folder):
    """What training computed, step by step."""
    return [line for line in training(folder) if "train/loss" in line]


FLAGS = [*CONSTANT, "--lora.dropout", 0.2, "--data.eval_fraction", 0.2, "--train.save_steps", 2]
FLAGS += ["--train.report_to", "tensorboard"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps, planned from the start."""
    return run(config(tmp_path_factory.mktemp("straight"), *FLAGS, *steps(6)))


@pytest.mark.parametrize(
    ("before", "after", "killed_at", "goes_on", "evaluations"),
    [
        pytest.param(steps(4), steps(6), None, "4 of 4", [0, 4, 6], id="finished"),
        pytest.param(steps(3), steps(6), None, "2 of 3", [0, 6], id="finished after a checkpoint"),
        pytest.param(steps(5), steps(6), 4, "2 of 5", [0, 6], id="interrupted"),
        pytest.param([*EPOCHS, 1], [*EPOCHS, 3], None, "2 of 2", [0, 2, 6], id="epochs"),
        pytest.param([*EPOCHS, 2], steps(6), 4, "2 of 4", [0, 6], id="interrupted, from epochs"),
    ],
)
def test_a_longer_run_is_the_straight_one_bit_for_bit(
    tmp_path, straight, before, after, killed_at, goes_on, evaluations
):
    """LoRA dropout, two steps an epoch of which the last is short, the warm-up still on.

    An evaluation at the old end stays where the run goes on from there: it is true. From an older
    checkpoint it goes, with the steps that are taken again.
    """
    if killed_at:
        killed(config(tmp_path, *FLAGS, *before), at=killed_at)
    else:
        run(config(tmp_path, *FLAGS, *before))
    longer = run(config(tmp_path, *FLAGS, *after, "--train.write_report", "true"))

    assert trained(longer) == trained(straight)
    assert [line["step"] for line in trained(longer)] == [1, 2, 3, 4, 5, 6]
    weights = "adapter_model.safetensors"
    for file in (
        f"final/{weights}",
        f"checkpoint-6/{weights}",
        "checkpoint-6/optimizer/tensors.safetensors",
    ):
        assert (longer / file).read_bytes() == (straight / file).read_bytes()
    assert evaluated(longer) == evaluations
    assert (longer / "summary.json").read_text() == (straight / "summary.json").read_text()
    note = f"note: resumed after step {goes_on} planned; now 6 steps: the learning rate is that of"
    assert note in (longer / "header.txt").read_text()
    assert note.removeprefix("note: ") in (longer / "report.html").read_text()
    assert scalar_steps(longer, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert scalar_steps(longer, "eval/loss") == evaluations


def test_the_means_after_an_old_end_begin_there(tmp_path):
    """24 pairs: steps of 16, 8, 16, 8, ... Logged after 3 and 6 are steps 2-3 and 4-6; with the old
    end, 4 and 5-6: 8 and 24 pairs, whose sum is the straight run's."""
    flags = [*CONSTANT, "--train.logging_steps", 3, "--train.save_steps", 2]
    straight = run(config(tmp_path, *flags, *steps(7), "--train.output_dir", tmp_path / "straight"))
    run(config(tmp_path, *flags, *steps(4)))
    longer = run(config(tmp_path, *flags, *steps(7)))
    whole = {line["step"]: line for line in trained(straight)}
    parts = {line["step"]: line for line in trained(longer)}
    assert list(whole) == [1, 3, 6, 7]
    assert list(parts) == [1, 3, 4, 6, 7]
    assert [parts[step] for step in (1, 3, 7)] == [whole[step] for step in (1, 3, 7)]
    for name in (f"train/{name}" for name in PAIR_METRICS):
        mean = (8 * parts[4][name] + 24 * parts[6][name]) / 32
        assert mean == pytest.approx(whole[6][name], rel=1e-9, abs=1e-12)
    assert parts[4]["train/loss"] != parts[6]["train/loss"]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_header_says_where_the_learning_rate_goes_on(tmp_path, schedule):
    """After step 2 of 2 it had fallen to 0; of 4 steps, half of it is left. 1e-3 / 2 for both."""
    flags = ["--optim.learning_rate", 1e-3, "--optim.lr_scheduler_type", schedule]
    flags += ["--train.save_steps", 2]
    run(config(tmp_path, *flags, *steps(2)))
    longer = run(config(tmp_path, *flags, *steps(4)))
    assert (
        "note: resumed after step 2 of 2 planned; now 4 steps: the learning rate goes on at "
        "0.0005, where 0 was planned; a run with 4 steps planned from the start would have had "
        "other rates until here" in (longer / "header.txt").read_text()
    )
    optim = OptimConfig(learning_rate=1e-3, lr_scheduler_type=schedule, warmup_steps=0)
    expected = [learning_rate(step, total, optim) for step, total in enumerate((2, 2, 4, 4))]
    assert [line["train/learning_rate"] for line in trained(longer)] == expected


def test_a_warm_up_by_ratio_is_another_in_a_longer_run_and_the_header_says_so(tmp_path):
    """Constant afterwards, but half of 2 steps is 1, and half of 4 is 2."""
    flags = ["--optim.lr_scheduler_type", "constant", "--optim.warmup_ratio", 0.5]
    flags += ["--train.save_steps", 2]
    run(config(tmp_path, *flags, *steps(2)))
    longer = run(config(tmp_path, *flags, *steps(4)))
    assert "would have had other rates until here" in (longer / "header.txt").read_text()


def test_a_finished_run_without_a_checkpoint_does_not_go_on(tmp_path):
    """And what the refusal says of a new run is true: its reference are the weights it starts from,
    so it begins at ln 2 where the old run had ended lower."""
    flags = ["--data.eval_fraction", 0.3, "--optim.learning_rate", 1e-2]
    folder = run(config(tmp_path, *flags, *steps(2)))
    log = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError) as refused:
        run(config(tmp_path, *flags, *steps(3)))
    message = str(refused.value)
    assert "holds a finished run without a checkpoint" in message
    assert f"model.name_or_path {folder / 'final'}" in message
    assert (folder / "metrics.jsonl").read_text() == log
    assert (folder / "summary.json").exists()

    other = ["--model.name_or_path", folder / "final", "--train.output_dir", tmp_path / "other"]
    (before, *_) = metrics(run(config(tmp_path, *flags, *other, *steps(1))))
    after = metrics(folder)[-1]
    assert before["eval/logps/chosen"] == pytest.approx(after["eval/logps/chosen"], abs=1e-5)
    assert before["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert after["eval/rewards/margins"] > 1e-3


@pytest.mark.parametrize(
    ("is_finished", "end", "done"), [(True, 4, 5), (True, -1, 5), (False, 2, 3), (False, 3, 3)]
)
def test_an_end_that_the_run_has_passed_is_refused(tmp_path, is_finished, end, done):
    """Of 5 steps with a checkpoint of step 3; finished or interrupted. An epoch has 2 steps."""
    flags = ["--train.save_steps", 3]
    settings = config(tmp_path, *flags, *steps(5))
    folder = run(settings) if is_finished else killed(settings, at=5)
    said = f"to end after step {2 if end == -1 else end}, but .*run has taken {done}. Raise it"
    with pytest.raises(UserError, match=f"train.max_steps: the run is {said}"):
        run(config(tmp_path, *flags, *steps(end)))
    assert (folder / "summary.json").exists() == is_finished


def test_an_interrupted_run_may_be_given_less_than_was_planned(tmp_path):
    """The negative control of the test above: step 2 is done, of 5."""
    flags = [*CONSTANT, "--train.save_steps", 2]
    killed(config(tmp_path, *flags, *steps(5)), at=4)
    assert metrics(run(config(tmp_path, *flags, *steps(3))))[-1]["step"] == 3


def test_a_run_that_was_killed_after_its_last_checkpoint_ends_without_a_step(tmp_path):
    """It has taken as many steps as it is to have, and that is no end that it has passed."""
    settings = config(tmp_path, "--train.save_steps", 2, *steps(2))
    folder = run(settings)
    before = (folder / "metrics.jsonl").read_text()
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "final")
    run(settings)
    assert (folder / "metrics.jsonl").read_text() == before
    assert (folder / "final" / "adapter_model.safetensors").exists()
    assert "note: resumed after step 2\n" in (folder / "header.txt").read_text()


def test_a_longer_run_is_finished_like_any_other(tmp_path):
    flags = ["--train.save_steps", 2]
    run(config(tmp_path, *flags, *steps(2)))
    run(config(tmp_path, *flags, *steps(3)))
    with pytest.raises(UserError, match=r"holds a finished run\. Raise train\.max_steps"):
        run(config(tmp_path, *flags, *steps(3)))


def test_what_is_later_than_the_chosen_checkpoint_makes_way(tmp_path):
    """A checkpoint of the old end would be taken for the newest when the longer run is resumed, and
    what was measured of the old end would stand in the new report."""
    folder = run(config(tmp_path, "--train.save_steps", 2, *steps(4)))
    (folder / "held_out.json").write_text("{}")
    chosen = ["--train.resume", folder / "checkpoint-2"]
    flags = ["--train.save_steps", 1, *steps(6)]
    killed(config(tmp_path, *flags, *chosen), at=4)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    assert not (folder / "held_out.json").exists()
    assert (folder / "held_out.json.old-1").exists()
    assert [line["step"] for line in metrics(run(config(tmp_path, *flags)))] == [*range(1, 7)]
