"""Every file that a run reads back, damaged in every way: the run goes on exactly, and says so."""

import os
import shutil

import pytest

from dpo.errors import UserError
from tests.chaos.runs import outcome, settings, straight_run
from tests.commands import called
from tests.train.runs import killed, run

pytestmark = pytest.mark.slow

CHECKPOINT = (
    "adapter_config.json adapter_model.safetensors config.yaml manifest.json state.json "
    "optimizer/tensors.safetensors optimizer/tree.json"
).split()
LOGS = "metrics.jsonl samples.jsonl held_out.jsonl".split()
CACHE = "pairs.arrow about.json prompts.int64 manifest.json".split()


def flip(at):
    """Flips one bit, that far into the file."""

    def damage(file):
        content = bytearray(file.read_bytes())
        content[int(at * (len(content) - 1))] ^= 4
        file.write_bytes(content)

    return damage


def keep(share):
    """Cuts the file."""
    return lambda file: os.truncate(file, int(share * file.stat().st_size))


END = b"\x02\0\0\0"  # the token that ends a turn


def other_tokens(file):
    """Makes the tokens that end turns others."""
    content = file.read_bytes()
    first, last = len(content) // 4, 3 * len(content) // 4  # within the rows
    rows = content[first:last]
    assert rows.count(END) > 10
    file.write_bytes(content[:first] + rows.replace(END, b"\x05\0\0\0") + content[last:])


def zeros(file):
    """Adds a block of zeros."""
    file.write_bytes(file.read_bytes() + b"\0" * 4096)


DAMAGE = {
    "first byte": flip(0),
    "a byte in the middle": flip(0.5),
    "last byte": flip(1),
    "truncated": keep(0.6),
    "empty": keep(0),
    "missing": lambda file: file.unlink(),
}

KINDS = list(DAMAGE) if "CHAOS_KILLS" in os.environ else ["a byte in the middle", "missing"]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run that was killed at step 5, with checkpoints of steps 2 and 4, and its caches."""
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        killed(settings(folder, "--train.save_steps", 2), at=5)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return outcome(straight_run(tmp_path_factory.mktemp("straight")))


@pytest.fixture
def resumed(before, tmp_path, monkeypatch, capsys):
    """Damages a copy of the run; resumes it; gives the folder and what was said."""

    def resume(pattern, damage):
        for path in before.iterdir():
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, tmp_path / path.name)
        files = list(tmp_path.glob(pattern))
        assert files
        for file in files:
            damage(file)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        rows = ["--data.name_or_path", before / "rows.jsonl"]
        folder = run(settings(tmp_path, "--train.save_steps", 2, *rows))
        return folder, capsys.readouterr().err

    return resume


def training_of(kept):
    """What must be exact whatever became of the logs."""
    return {name: kept[name] for name in ("final", "best", "best metric")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_damaged_checkpoint_is_passed_over(name, kind, resumed, straight):
    folder, said = resumed(f"run/checkpoint-4/{name}", DAMAGE[kind])
    assert "checkpoint-4 was passed over: " in said
    if name != "manifest.json":  # a sum that is wrong is another file's
        assert f"checkpoint-4/{name} is {'missing' if kind == 'missing' else 'damaged'}" in said
    assert "resumed after step 2" in said
    assert outcome(folder) == straight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOGS)
def test_a_damaged_log_costs_no_training(name, kind, resumed, straight):
    """A flipped bit may leave a line that can be read; whatever cannot be is said."""
    folder, said = resumed(f"run/{name}", DAMAGE[kind])
    assert training_of(outcome(folder)) == training_of(straight)
    if kind == "truncated":
        assert f"{name}: 1 broken line" in said
    if name == "metrics.jsonl" and kind in ("empty", "missing"):
        assert "metrics.jsonl: what was logged up to step 4 is lost" in said


@pytest.mark.parametrize("name", LOGS)
def test_zeros_after_a_power_loss_cost_no_training(name, resumed, straight):
    folder, said = resumed(f"run/{name}", zeros)
    assert f"{name}: 1 broken line is left out" in said
    assert outcome(folder) == straight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CACHE)
def test_a_damaged_token_cache_is_made_again(name, kind, resumed, straight):
    folder, said = resumed(f"cache/dpo_pairs/*/{name}", DAMAGE[kind])
    assert "the rows are tokenised again" in said
    assert outcome(folder) == straight


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_reference_cache_is_computed_again(kind, resumed, straight):
    folder, _ = resumed("cache/dpo_reference/*/*.safetensors", DAMAGE[kind])
    assert outcome(folder) == straight


def test_caches_that_are_gone_are_made_again(resumed, straight):
    folder, _ = resumed("cache", shutil.rmtree)
    assert outcome(folder) == straight


def test_a_run_without_a_whole_checkpoint_is_refused_and_nothing_is_lost(resumed, before):
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*-4 was.*-2 was passed"):
        resumed("run/checkpoint-*/optimizer/tensors.safetensors", DAMAGE["empty"])


def test_the_negative_control_a_damaged_token_would_be_trained_on(resumed, straight, monkeypatch):
    """Without the comparison of sums, other tokens give other weights or an error."""
    from dpo.data import tokens

    monkeypatch.setattr(tokens, "damage", lambda folder: "")
    try:
        folder, _ = resumed("cache/dpo_pairs/*/pairs.arrow", other_tokens)
    except UserError as refused:  # one of them is among the pairs that a resume scores again
        assert "the log-prob of a token does" in str(refused)  # noqa: PT017
    else:
        assert outcome(folder)["final"] != straight["final"]


@pytest.mark.parametrize("weights", ["final", "best"])
@pytest.mark.parametrize("kind", ["a byte in the middle", "missing"])
@pytest.mark.parametrize(
    "command", ["merge.py {run} --weights {weights}", "evaluate.py {run} --weights {weights}"]
)
def test_damaged_weights_are_named_by_what_reads_them(command, kind, weights, tmp_path):
    folder = run(settings(tmp_path))
    DAMAGE[kind](folder / weights / "tokenizer.json")
    script, *flags = command.format(run=folder, weights=weights).split()
    code, _, said = called(script, *flags)
    assert code == 2
    assert f"{weights}/tokenizer.json is " in said
