"""A run whose reference comes from the cache is the run that computes it; the second one does not.

Faults 3 to 6 of public trainers: stale numbers used, a cache thrown away when only the learning
rate changed, or built from the trained policy, or from another model of the same name.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.config import PACKAGE
from dpo.errors import UserError
from dpo.model.logp_cache import LogpCache
from dpo.model.reference import AdapterOff, Frozen
from dpo.train import budget
from dpo.train.ahead import cache_reference
from tests.commands import as_two_processes, called
from tests.train.runs import config, forget_accelerate, metrics, rows_file, run, training

ROOT = Path(__file__).parents[2]
EVALUATED = ["--data.eval_fraction", "0.25"]


@pytest.fixture
def asked(monkeypatch):
    """The pairs that live references are asked for, in order."""
    pairs = []
    for kind in (AdapterOff, Frozen):
        call = kind.__call__

        def counted(self, stream, call=call):
            pairs.extend(stream.pairs)
            return call(self, stream)

        monkeypatch.setattr(kind, "__call__", counted)
    return pairs


def model_copy(folder):
    """The packaged model, to be edited."""
    return Path(shutil.copytree(PACKAGE / "quickstart" / "model", folder / "model"))


def cached(folder, *flags, name="run", rows=24):
    where = ["--reference.cache", folder / "cache", "--train.output_dir", folder / name]
    return config(folder, *where, *flags, rows=rows)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lora.dropout", 0.3, "--data.eval_fraction", 0.25],
        ["--model.quantization", "nf4"],
        ["--model.adapter", "none"],
        ["--train.tokens_per_microbatch", 250],
    ],
    ids=str,
)
def test_the_run_with_a_cache_is_the_run_without_bit_for_bit(tmp_path, asked, flags):
    """Filling it and reading it, over two epochs, and with nobody asked the second time."""
    steps = ["--train.max_steps", 4]
    live = run(config(tmp_path, *flags, *steps, "--train.output_dir", tmp_path / "live"))
    of_live = len(asked)
    filling = run(cached(tmp_path, *flags, *steps, name="filling"))
    of_filling = len(asked) - of_live
    reading = run(cached(tmp_path, *flags, *steps, name="reading"))
    assert training(live) == training(filling) == training(reading)
    assert of_filling < of_live
    assert len(asked) == of_live + of_filling


def test_a_sweep_computes_nothing_and_what_changes_the_reference_everything(tmp_path, asked):
    """Another beta, learning rate, loss, seed, rank of the adapter or folder: nothing (fault 4).
    Another type of the weights: all 24 pairs."""
    whole = ["--train.max_steps", 2]
    run(cached(tmp_path, *whole))
    assert len({pair.digest for pair in asked}) == 24
    asked.clear()
    for flags in (
        ["--loss.beta", 0.5, "--optim.learning_rate", 1e-4],
        ["--train.seed", 7],
        ["--loss.type", "ipo", "--lora.r", 4, "--train.per_device_train_batch_size", 24],
    ):
        run(cached(tmp_path, *whole, *flags, "--train.resume", "never"))
    assert asked == []
    run(cached(tmp_path, *whole, "--model.dtype", "bfloat16", "--train.resume", "never"))
    assert len({pair.digest for pair in asked}) == 24


def test_shorter_rows_are_other_pairs_and_only_those_are_computed(tmp_path, asked):
    """Fault 3: with another max_length, old numbers must not be used."""
    run(cached(tmp_path, "--train.max_steps", 2))
    before = {pair.digest for pair in asked}
    asked.clear()
    shorter = ["--data.max_prompt_length", 40, "--data.max_length", 50, "--train.resume", "never"]
    folder = run(cached(tmp_path, "--train.max_steps", 2, *shorter))
    computed = {pair.digest for pair in asked}
    assert computed.isdisjoint(before)
    assert 0 < len(computed) < 24
    assert metrics(folder)[0]["train/loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_an_edited_model_of_the_same_name_is_another_reference(tmp_path, asked):
    """Fault 6: it starts at ln 2 from its own log-probs, not from those of its namesake."""
    model = model_copy(tmp_path)
    flags = ["--model.name_or_path", model, "--train.resume", "never"]
    run(cached(tmp_path, *flags))
    asked.clear()
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    folder = run(cached(tmp_path, *flags))
    assert len({pair.digest for pair in asked}) == 24
    assert metrics(folder)[0]["train/loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_model_that_is_not_what_its_files_say_does_not_start(tmp_path, monkeypatch):
    """The files name the cache; weights changed after loading are noticed by the self-check."""
    run(cached(tmp_path, "--train.max_steps", 2))
    load = budget.load_policy

    def edited(*arguments, **options):
        policy = load(*arguments, **options)
        with torch.no_grad():
            policy.model.get_base_model().model.norm.weight.mul_(1.5)
        return policy

    monkeypatch.setattr(budget, "load_policy", edited)
    with pytest.raises(RuntimeError, match=r"must be the reference.*reference\.cache off"):
        run(cached(tmp_path, "--train.max_steps", 2, "--train.resume", "never"))


def test_full_fine_tuning_makes_no_copy_of_the_model_where_the_cache_holds_all(tmp_path):
    """And has the same numbers; a run that sees pairs more makes one."""
    flags = ["--model.adapter", "none", "--optim.learning_rate", 1e-4, "--train.max_steps"]
    first = run(cached(tmp_path, *flags, 1, name="first"))
    second = run(cached(tmp_path, *flags, 1, name="second"))
    assert "reference: frozen; layout" in (first / "header.txt").read_text()
    assert "(no copy: the cache holds all of it)" in (second / "header.txt").read_text()
    assert training(first) == training(second)
    longer = run(cached(tmp_path, *flags, 2, name="longer"))
    assert "reference: frozen; layout" in (longer / "header.txt").read_text()


def test_a_cache_that_vanishes_ends_a_run_that_made_no_copy(tmp_path, monkeypatch):
    flags = ["--model.adapter", "none", "--train.max_steps", 2]
    run(cached(tmp_path, *flags, name="first"))
    get, asked = LogpCache.get, []

    def vanishing(self, pair):
        asked.append(pair)
        return get(self, pair) if len(asked) <= 24 else None  # the 24 that are looked for at first

    monkeypatch.setattr(LogpCache, "get", vanishing)
    with pytest.raises(RuntimeError, match="the cache was deleted or damaged meanwhile"):
        run(cached(tmp_path, *flags, name="second"))


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_what_a_resumed_run_computes_is_the_reference_of_step_0(tmp_path, adapter):
    """Fault 5: the cache is deleted between; the resumed run is the straight one all the same."""
    flags = ["--model.adapter", adapter, "--train.save_steps", 2, "--optim.learning_rate", 1e-3]
    straight = run(cached(tmp_path, *flags, "--train.max_steps", 4, name="straight"))
    resumed = tmp_path / "resumed"
    where = ["--train.resume", straight / "checkpoint-2", "--reference.cache", tmp_path / "other"]
    run(cached(tmp_path, *flags, *where, "--train.max_steps", 4, name="resumed"))
    for ours, theirs in zip(training(resumed), training(straight), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_run_whose_model_changed_is_not_resumed(tmp_path):
    """By the digest in the checkpoint: a change too small for the log-probs to tell."""
    model = model_copy(tmp_path)
    flags = ["--model.name_or_path", model, "--train.save_steps", 2, "--train.max_steps", 4]
    folder = run(cached(tmp_path, *flags))
    (folder / "summary.json").unlink()
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the reference has changed since"):
        run(cached(tmp_path, *flags))


def test_a_checkpoint_without_that_digest_is_refused(tmp_path, monkeypatch):
    folder = run(config(tmp_path, "--train.save_steps", 2))
    (folder / "summary.json").unlink()
    file = folder / "checkpoint-2" / "state.json"
    state = json.loads(file.read_text())
    del state["weights"]
    file.write_text(json.dumps(state))
    monkeypatch.setattr("dpo.train.checkpoint.damage", lambda checkpoint: "")
    with pytest.raises(UserError, match=r"version before 0\.3\.0"):
        run(config(tmp_path, "--train.save_steps", 2))


def test_training_and_evaluation_share_it(tmp_path, asked):
    """Rows that the first run trained on are held out by the second."""
    run(cached(tmp_path, "--train.max_steps", 2))
    asked.clear()
    folder = run(cached(tmp_path, "--train.max_steps", 2, *EVALUATED, name="evaluated"))
    assert asked == []
    assert any("eval/loss" in line for line in metrics(folder))


def test_sampled_answers_are_not_kept(tmp_path, asked):
    """They are asked of the live reference each time, and come by once."""
    flags = ["--train.eval_prompts", 3, "--train.eval_max_new_tokens", 4]
    run(cached(tmp_path, "--train.max_steps", 2, *EVALUATED))
    asked.clear()
    folder = run(cached(tmp_path, "--train.max_steps", 2, *EVALUATED, *flags, name="answers"))
    assert len(asked) == 2 * 3  # before and after
    kept = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert sum(len(load_file(shard)["keys"].view(-1)) for shard in kept) == 24
    assert "eval/kl" in metrics(folder)[-1]


def test_without_a_reference_nothing_is_cached_and_a_folder_for_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"reference\.cache: got .* wanted auto or off"):
        cached(tmp_path, "--reference.mode", "zero")
    folder = run(config(tmp_path, "--reference.mode", "zero", "--reference.cache", "auto"))
    assert "reference cache: off" in (folder / "header.txt").read_text()


# ----------------------------------------------------------------------------- ahead of training


def ahead(settings):
    forget_accelerate()
    return cache_reference(settings)


def test_ahead_of_training_exactly_what_the_run_uses_is_computed(tmp_path, asked):
    """One step of 16 of the 18 pairs, and the 6 held-out ones; then the run asks nobody."""
    settings = cached(tmp_path, "--train.max_steps", 1, *EVALUATED)
    assert "22 pairs computed, 0 were there" in ahead(settings)
    assert len(asked) == 22
    assert "0 pairs computed, 22 were there" in ahead(settings)
    folder = run(settings)
    assert len(asked) == 22
    assert metrics(folder)[1]["train/loss"] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_it_computes_what_training_would(tmp_path, adapter):
    flags = ["--train.max_steps", 3, "--model.adapter", adapter]
    live = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "live"))
    settings = cached(tmp_path, *flags)
    ahead(settings)
    for ours, theirs in zip(training(run(settings)), training(live), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


def test_stopped_half_way_it_keeps_what_it_has(tmp_path, monkeypatch, asked):
    monkeypatch.setattr("dpo.train.ahead.PAIRS_AT_ONCE", 10)
    settings = cached(tmp_path, "--train.max_steps", 2)
    call = AdapterOff.__call__

    def stopped(self, stream):
        if len(asked) >= 10:
            raise KeyboardInterrupt
        return call(self, stream)

    with monkeypatch.context() as patched:
        patched.setattr(AdapterOff, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            ahead(settings)
    assert "14 pairs computed, 10 were there" in ahead(settings)


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [(["--reference.cache", "off"], "cache: got off"), (["--reference.mode", "zero"], "mode: got")],
)
def test_a_configuration_without_a_cache_is_refused(tmp_path, flags, wrong):
    with pytest.raises(UserError, match=rf"reference\.{wrong}.*nothing to cache"):
        ahead(config(tmp_path, "--reference.cache", "auto", *flags))


@pytest.mark.distributed
def test_two_processes_share_the_work_and_one_finds_it_all(tmp_path, asked):
    """Each of two ranks computes half of the 24 pairs, without a pair done twice."""
    rows = rows_file(tmp_path, 24)
    flags = ["--data.name_or_path", rows, "--data.eval_path", "null", "--train.max_steps", "2"]
    flags += ["--data.max_length", "160", "--data.max_prompt_length", "128"]
    flags += ["--train.per_device_train_batch_size", "12", "--reference.cache", tmp_path / "cache"]
    printed = as_two_processes("scripts/cache_reference.py", *flags)
    assert "24 pairs computed, 0 were there" in printed
    run(cached(tmp_path, "--train.max_steps", 2))
    assert asked == []


def test_the_script_says_what_it_did_and_a_mistake_is_one_message(tmp_path):
    rows = rows_file(tmp_path, 8)
    flags = ["--data.name_or_path", rows, "--reference.cache", tmp_path / "cache"]
    code, out, _ = called("cache_reference.py", *flags)
    assert code == 0
    assert out.startswith("8 pairs computed, 0 were there")
    code, out, err = called("cache_reference.py", *flags, "--reference.cache", "off")
    assert (code, out) == (2, "")
    assert err.startswith("error: reference.cache: got off")


def test_the_header_and_the_checkpoint_name_it(tmp_path):
    folder = run(cached(tmp_path, "--train.save_steps", 2))
    assert f"reference cache: {tmp_path / 'cache'}" in (folder / "header.txt").read_text()
    state = json.loads((folder / "checkpoint-2" / "state.json").read_text())
    assert len(state["weights"]) == 64
