"""What others have written is data: no code of theirs runs, no path of theirs is followed."""

import json
import os
import shutil
import stat
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file

from dpo import sealed
from dpo.after.card import write_run_card
from dpo.after.merge_error import MergeError
from dpo.cli import parse
from dpo.data.files import cache_folder, use_a_writable_cache
from dpo.data.stream import TokenizedPair
from dpo.errors import UserError
from dpo.model.load import load_policy
from dpo.model.logp_cache import LogpCache
from dpo.model.named import load_shape, load_tokenizer
from dpo.report.page import write_report
from dpo.train.tree import load_tree, save_tree
from tests.models import QUICKSTART_MODEL
from tests.train.runs import adapter_folder, config, run, training


class Exploit:
    """Runs a command where it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def pickled(tmp_path):
    """The packaged model with pickled weights, as older checkpoints have them."""
    folder = shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_by_the_key_that_allows_them(pickled, tmp_path):
    settings = config(tmp_path, "--model.name_or_path", pickled)
    with pytest.raises(UserError, match=r"model.allow_pickle: .*/model has no model.safetensors"):
        load_policy(settings, "cpu")
    settings.model.allow_pickle = True
    ours = load_policy(settings, "cpu").model.get_input_embeddings().weight
    theirs = load_file(Path(QUICKSTART_MODEL, "model.safetensors"))["model.embed_tokens.weight"]
    assert torch.equal(ours, theirs)


def test_a_pickle_runs_no_code_where_it_is_allowed(pickled, tmp_path):
    torch.save({"a": Exploit(tmp_path / "ran")}, pickled / "pytorch_model.bin")
    torch.load(pickled / "pytorch_model.bin", weights_only=False)  # the negative control
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    settings = config(tmp_path, "--model.name_or_path", pickled, "--model.allow_pickle", "true")
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(settings, "cpu")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_is_refused_by_the_same_key(tmp_path):
    folder = adapter_folder(tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    settings = config(tmp_path, "--model.name_or_path", folder)
    with pytest.raises(UserError, match=r"model.allow_pickle: the adapter in .*/sft has no"):
        load_policy(settings, "cpu")
    settings.model.allow_pickle = True
    model = load_policy(settings, "cpu").model
    name = next(name for name in weights if "q_proj.lora_B" in name)
    live = dict(model.named_parameters())[name.replace(".weight", ".default.weight")]
    assert torch.equal(live, weights[name])


def test_code_that_comes_with_a_model_is_refused_by_the_key_that_allows_it(tmp_path):
    folder = shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = config(tmp_path, "--model.name_or_path", folder)
    with pytest.raises(UserError, match=r"model.trust_remote_code: .* brings Python code"):
        load_policy(settings, "cpu")
    assert not (tmp_path / "ran").exists()
    load_tokenizer(replace(settings.model, name_or_path=str(QUICKSTART_MODEL)))


def test_that_such_code_may_run_is_said(tmp_path):
    folder = run(config(tmp_path, "--model.trust_remote_code", "true", "--train.max_steps", 1))
    header = (folder / "header.txt").read_text()
    said = "note: model.trust_remote_code: the model's own Python code runs here"
    assert said in header
    assert said.replace("'", "&#39;") in write_report(folder).read_text()


@pytest.mark.parametrize("is_trusted", [False, True])
def test_that_such_code_ran_is_in_the_models_card(is_trusted, tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    settings = config(tmp_path, "--model.trust_remote_code", is_trusted)
    error = MergeError(0.1, 0.2, 0.3, effect=1.0, kept=1.0)
    how = {"weights": "final", "base": "original", "dtype": "bfloat16", "has_chat": False}
    how |= {"rounding": 0.1, "refused": "", "pairs_are": "8 pairs", "errors": {"original": error}}
    write_run_card(tmp_path, folder, settings, **how)
    assert ("model.trust_remote_code" in (tmp_path / "README.md").read_text()) == is_trusted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 2**30),
        ("vocab_size", 10**30),
        ("num_hidden_layers", "4"),
        ("hidden_size", -1),
    ],
)
def test_a_shape_beyond_any_model_is_refused_before_anything_is_built(key, value, tmp_path):
    folder = shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {key: value}))
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"model.name_or_path: .*{key}"):
        load_shape(parse(["--model.name_or_path", str(folder)]).model)
    assert time.monotonic() - began < 2


def test_a_tokenizer_whose_longest_text_is_no_number_is_refused(tmp_path):
    folder = shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"model_max_length": [1]}))
    with pytest.raises(UserError, match=r"model_max_length is \[1\], wanted a number"):
        load_tokenizer(parse(["--model.name_or_path", str(folder)]).model)


# ------------------------------------------------------------------------------ folders of others


@pytest.mark.parametrize(
    ("me", "owner", "is_trusted"), [(7, 7, True), (7, 0, True), (0, 8, True), (7, 8, False)]
)
def test_a_cache_that_another_user_owns_is_not_read(me, owner, is_trusted, tmp_path, monkeypatch):
    """They could have put other tokens there, with sums that fit them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "shared"))
    monkeypatch.setattr(os, "getuid", lambda: me)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: SimpleNamespace(st_uid=owner))
    monkeypatch.setattr(os, "access", lambda *_: True)
    said = use_a_writable_cache(tmp_path / "run")
    if is_trusted:
        assert (said, cache_folder("x")) == ([], tmp_path / "shared" / "x")
    else:
        assert "shared belongs to another user and is not trusted: caches are in" in said[0]
        assert cache_folder("x") == tmp_path / "run.cache" / "x"


@pytest.mark.parametrize("name", ["keys", "checks", "ends", "logps"])
@pytest.mark.parametrize("how", ["a matrix", "another type", "missing", "longer"])
def test_a_shard_of_another_shape_is_not_read(name, how, tmp_path):
    """Its sums are inside it: who writes the file can write them."""
    pair = TokenizedPair([1, 2], [3], [4, 5])
    cache = LogpCache(tmp_path)
    cache.put(pair, np.float32([-1, -2, -3]))
    cache.flush()
    (file,) = tmp_path.glob("*.safetensors")
    assert LogpCache(tmp_path).get(pair).tolist() == [-1, -2, -3]  # that could fail
    columns = load_arrays(file)
    column = columns.pop(name)
    if how != "missing":
        changed = {
            "a matrix": np.stack([column, column]),
            "another type": column.astype(np.int8),
            "longer": np.concatenate([column, column]),
        }
        columns[name] = changed[how]
    save_arrays(columns, file)
    again = LogpCache(tmp_path)
    if (name, how) == ("logps", "longer"):  # what lies beyond the last is not read
        assert again.get(pair).tolist() == [-1, -2, -3]
    else:
        assert again.num_damaged == 1
        assert again.get(pair) is None


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_files_are_made_with_the_users_mask(mask, file, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    before = os.umask(mask)
    try:
        flags = ["--reference.cache", "auto", "--train.save_steps", 1, "--train.max_steps", 2]
        run(config(tmp_path, *flags, "--train.report_to", "tensorboard"))
    finally:
        os.umask(before)
    made = [*(tmp_path / "run").rglob("*"), *(tmp_path / "cache").rglob("*")]
    assert {"tokenizer.json", "pairs.arrow", "metrics.jsonl"} <= {path.name for path in made}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in made}
    wrong = {p: oct(mode) for p, mode in modes.items() if mode != (folder if p.is_dir() else file)}
    assert wrong == {}


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizers_state_survives_without_a_pickle(name, dtype, tmp_path):
    """Half-precision weights keep fp32 copies, each with an optimizer of its own."""
    flags = ["--optim.name", name, "--model.dtype", dtype, "--train.save_steps", 2]
    straight = run(config(tmp_path, *flags))
    kept = {path.name for path in (straight / "checkpoint-2").rglob("*") if path.is_file()}
    assert kept >= {"tree.json", "tensors.safetensors"}
    assert not any(name.endswith((".pt", ".bin", ".pkl")) for name in kept)
    on = ["--train.resume", straight / "checkpoint-2", "--train.output_dir", tmp_path / "on"]
    resumed = run(config(tmp_path, *flags, *on))
    assert training(resumed)[-1] == training(straight)[-1]
    ours, theirs = (f / "final" / "adapter_model.safetensors" for f in (resumed, straight))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_checkpoint_of_an_older_version_is_still_read(tmp_path):
    straight = run(config(tmp_path, "--train.save_steps", 2))
    checkpoint = straight / "checkpoint-2"
    torch.save(load_tree(checkpoint / "optimizer"), checkpoint / "optimizer.pt")
    shutil.rmtree(checkpoint / "optimizer")
    sealed.seal(checkpoint)
    on = ["--train.resume", checkpoint, "--train.output_dir", tmp_path / "on"]
    resumed = run(config(tmp_path, "--train.save_steps", 2, *on))
    assert training(resumed)[-1] == training(straight)[-1]


def test_an_older_checkpoint_runs_no_code(tmp_path):
    straight = run(config(tmp_path, "--train.save_steps", 2))
    checkpoint = straight / "checkpoint-2"
    torch.save(Exploit(tmp_path / "ran"), checkpoint / "optimizer.pt")
    sealed.seal(checkpoint)
    on = ["--train.resume", checkpoint, "--train.output_dir", tmp_path / "on"]
    with pytest.raises(Exception, match="Weights only load failed"):
        run(config(tmp_path, "--train.save_steps", 2, *on))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["short", "missing"])
def test_moments_of_another_shape_are_refused(how, name, dtype, tmp_path):
    """A kernel would read beyond their end. The sums are right: a stranger wrote them."""
    flags = ["--optim.name", name, "--model.dtype", dtype, "--train.save_steps", 2]
    checkpoint = run(config(tmp_path, *flags)) / "checkpoint-2"
    tree = load_tree(checkpoint / "optimizer")
    moments = tree if "state" in tree else tree["optimizers"][0]
    moments = moments["state"][0].get("__bnb_optimizer_quant_state__", moments["state"][0])
    second = "state2" if "state2" in moments else "exp_avg_sq"
    moments[second] = moments[second].flatten()[:3].clone()
    if how == "missing":
        del moments[second]
    shutil.rmtree(checkpoint / "optimizer")
    save_tree(tree, checkpoint / "optimizer")
    sealed.seal(checkpoint)
    on = ["--train.resume", checkpoint, "--train.output_dir", tmp_path / "on"]
    with pytest.raises(UserError, match=f"train.resume: {checkpoint} cannot be read .*{second}"):
        run(config(tmp_path, *flags, *on))


def test_the_options_of_an_optimizer_are_the_configurations(tmp_path):
    """A stranger's learning rate or betas would be taken without a word."""
    straight = run(config(tmp_path, "--train.save_steps", 2))
    checkpoint = straight / "checkpoint-2"
    tree = load_tree(checkpoint / "optimizer")
    for group in tree["param_groups"]:
        group |= {"betas": [0.0, 0.0], "weight_decay": 0.5}
    shutil.rmtree(checkpoint / "optimizer")
    save_tree(tree, checkpoint / "optimizer")
    sealed.seal(checkpoint)
    on = ["--train.resume", checkpoint, "--train.output_dir", tmp_path / "on"]
    resumed = run(config(tmp_path, "--train.save_steps", 2, *on))
    assert training(resumed)[-1] == training(straight)[-1]
    ours, theirs = (f / "final" / "adapter_model.safetensors" for f in (resumed, straight))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_tree_comes_back_as_it_was(tmp_path):
    shared = torch.arange(3.0)
    tree = {0: {"a": shared, "b": [shared, None, 1.5, "x"]}, "lists": [[], {}, (1, 2)], "n": True}
    save_tree(tree, tmp_path / "tree")
    back = load_tree(tmp_path / "tree")
    assert torch.equal(back[0]["a"], shared)
    assert torch.equal(back[0]["b"][0], shared)
    assert (back[0]["b"][1:], back["lists"], back["n"]) == (
        [None, 1.5, "x"],
        [[], {}, [1, 2]],
        True,
    )
    with pytest.raises(TypeError):
        save_tree({"a": object()}, tmp_path / "other")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_names_nothing_outside_its_folder(name, tmp_path):
    (tmp_path / "outside").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").write_text("x")
    sealed.seal(folder)
    sums = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(sums | {name: sealed.sha256(tmp_path / "outside")})
    )
    assert "is not inside" in sealed.damage(folder)


def test_a_link_that_leads_out_of_a_checkpoint_is_damage(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").write_text("x")
    sealed.seal(folder)
    assert sealed.damage(folder) == ""
    shutil.move(folder / "inside", tmp_path / "moved")
    (folder / "inside").symlink_to(tmp_path / "moved")
    assert "is not inside" in sealed.damage(folder)


# ---------------------------------------------------------------------------------- configurations


def yaml_file(tmp_path, text):
    file = tmp_path / "given.yaml"
    file.write_text(text)
    return ["--config", str(file)]


def test_a_key_that_is_given_twice_is_refused_with_its_lines(tmp_path):
    given = yaml_file(tmp_path, "loss:\n  beta: 0.1\noptim:\n  name: adamw\nloss:\n  beta: 0.3\n")
    with pytest.raises(UserError, match=r"given.yaml: key loss is given twice, on lines 1 and 5"):
        parse(given)
    inside = yaml_file(tmp_path, "loss:\n  beta: 0.1\n  beta: 0.3\n")
    with pytest.raises(UserError, match=r"key beta is given twice, on lines 2 and 3"):
        parse(inside)


def test_aliases_that_multiply_are_refused_at_once(tmp_path):
    """Ten times ten, nine times over: a thousand million values in 500 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match=r"more than 10000 values. Write it without anchors"):
        parse(yaml_file(tmp_path, "\n".join(lines)))
    with pytest.raises(UserError, match="more than 10000 values"):
        parse(yaml_file(tmp_path, "loss: &x\n  beta: *x\n"))


def test_a_few_aliases_are_fine(tmp_path):
    text = "train:\n  eval_steps: &n 7\n  save_steps: *n\n"
    assert parse(yaml_file(tmp_path, text)).train.save_steps == 7


def test_a_path_with_a_nul_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"got a path with a NUL in it"):
        parse(["--train.output_dir", "runs/\0x"])


def test_a_password_in_an_address_is_not_printed():
    with pytest.raises(UserError) as refused:
        parse(["--data.name_or_path", "https://me:secret@host/rows.jsonl"])
    assert "secret" not in str(refused.value)
    assert "https://***@host/rows.jsonl" in str(refused.value)


def test_transformers_still_has_the_switch():
    """Where it goes, so would the refusal of pickles."""
    assert "use_safetensors" in transformers.PreTrainedModel.from_pretrained.__doc__
