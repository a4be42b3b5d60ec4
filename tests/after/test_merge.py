import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

import dpo.after.merge as merging
from dpo.after import merged as merged_module
from dpo.after.card import write_run_card
from dpo.after.merge import build_merged, merge_run
from dpo.after.merge_error import (
    LayerProbe,
    MergeError,
    Scores,
    _inputs,
    allowed,
    jitter,
    measure,
    wrong_layers,
)
from dpo.after.push import RECORD, verified_files
from dpo.config import DataSource
from dpo.errors import UserError
from tests.after.made_runs import made_run
from tests.models import QUICKSTART_MODEL, tiny
from tests.train.runs import config
from tests.train.runs import run as trained

AUTO = {"weights": "final", "base": "auto", "dtype": "auto"}


def merged(run, **options):
    """The record and the printed lines of a merge into `run`/merged."""
    said = []
    merge_run(run, run / "merged", say=said.append, num_pairs=8, **options)
    return json.loads((run / "merged" / RECORD).read_text()), "\n".join(said)


def left_behind(run):
    """What a merge that failed has left in the run folder."""
    return [path.name for path in run.iterdir() if "merged" in path.name]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """(run, record, printed lines) of a LoRA run, merged as by default."""
    run = made_run(tmp_path_factory.mktemp("lora"))
    return run, *merged(run)


def test_a_merged_adapter_is_the_trained_policy(lora):
    """float32: the two forwards differ by rounding. The bare base would be off by `effect`."""
    run, record, said = lora
    error = record["errors_nats"]["original"]
    assert error["mean"] < 1e-5 < 0.1 < error["effect"]
    assert error["kept"] == pytest.approx(1, abs=1e-4)
    assert record["errors_nats"]["read back"] == error
    assert "8 held-out pairs" in said
    assert "(original base, float32), verified" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    assert model.dtype == torch.float32
    assert left_behind(run) == ["merged"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_run_is_merged_into_what_it_was_trained_on(tmp_path, quantization):
    """The original checkpoint is another model: its error is that of the quantisation."""
    run = made_run(tmp_path, "--model.quantization", quantization)
    record, said = merged(run)
    errors = record["errors_nats"]
    assert record["base"] == "dequantized"
    assert errors["read back"] == errors["dequantized"]
    if quantization == "nf4":  # int8 rounds activations as well, which no merge can
        assert errors["dequantized"]["mean"] < 1e-5
        assert errors["16bit"]["mean"] > 100 * errors["dequantized"]["mean"]
    assert re.search(r"\n  16bit .*\n  dequantized .*\n  read back ", said)
    config = json.loads((run / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_the_original_checkpoint_is_written_when_asked_for(tmp_path):
    run = made_run(tmp_path, "--model.quantization", "nf4")
    record, said = merged(run, base="16bit", dtype="bfloat16")
    assert (record["base"], record["dtype"]) == ("16bit", "bfloat16")
    assert record["errors_nats"]["read back"] == record["errors_nats"]["16bit"]
    assert said.index("dequantized ") < said.index("16bit ")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    assert model.dtype == torch.bfloat16


def test_a_run_that_trained_every_weight_is_written_in_the_type_asked_for(tmp_path):
    run = made_run(tmp_path, "--model.adapter", "none", std=0.01)
    record, said = merged(run, dtype="bfloat16")
    assert "there is no adapter to merge" in said
    assert record["errors_nats"]["trained"]["mean"] < 0.02
    weights = transformers.AutoModelForCausalLM.from_pretrained(run / "merged").state_dict()
    trained = transformers.AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert all(torch.equal(weights[name], trained[name].bfloat16()) for name in trained)


def test_a_run_that_started_from_an_adapter_is_merged_whole(tmp_path):
    """final/ holds all of the adapter; what it started from is not added a second time."""
    (tmp_path / "first").mkdir()
    first = made_run(tmp_path / "first")
    run = made_run(tmp_path, "--model.name_or_path", first / "final", std=0.1)
    record, _ = merged(run)
    assert record["errors_nats"]["original"]["mean"] < 1e-5


def test_other_weights_of_a_run_can_be_merged(tmp_path):
    run = made_run(tmp_path, weights="checkpoint-3")
    record, _ = merged(run, weights="checkpoint-3")
    assert record["weights"] == "checkpoint-3"
    assert "`checkpoint-3`, after step 3" in (run / "merged" / "README.md").read_text()


def wrongly_merged(monkeypatch, trained, factor, base, dtype):
    """The wrong layers of a merge that adds `factor` times the adapter."""
    scaled = trained.weights.with_name(f"times {factor}")
    if not scaled.exists():
        shutil.copytree(trained.weights, scaled)
        file = scaled / "adapter_model.safetensors"
        weights = load_file(file)
        save_file({k: v * factor if "lora_B" in k else v for k, v in weights.items()}, file)
    merge = merged_module.merge_adapter
    with monkeypatch.context() as patch:
        patch.setattr(merging, "merge_adapter", lambda base, _, dtype: merge(base, scaled, dtype))
        model, probes, _ = build_merged(trained, base, dtype)
    return len(wrong_layers(model, probes)), len(probes)


QUANTISED = "--model.quantization"
KINDS = [  # flags of the run, bases and types of the merge
    pytest.param([], ["original"], ["float32", "bfloat16"], id="float32"),
    pytest.param(["--model.dtype", "bfloat16"], ["original"], ["bfloat16"], id="bfloat16"),
    pytest.param([QUANTISED, "nf4"], ["dequantized", "16bit"], ["bfloat16"], id="nf4"),
    pytest.param([QUANTISED, "nf4"], ["16bit"], ["float32"], id="nf4, merged in float32"),
    pytest.param([QUANTISED, "int8"], ["dequantized", "16bit"], ["bfloat16"], id="int8"),
]


@pytest.mark.parametrize(("flags", "bases", "dtypes"), KINDS)
def test_a_wrong_merge_is_caught_however_little_the_run_has_learned(
    tmp_path, monkeypatch, flags, bases, dtypes
):
    """An adapter that is lost, subtracted, doubled or halved; once, the right one, passes.

    The effect is small beside bfloat16's rounding: its share in each layer tells.
    """
    run = made_run(tmp_path, *flags, std=0.012)  # 0.0016 nats a token
    trained = merging.score_trained(run, "final", 2)
    for base, dtype in product(bases, dtypes):
        kind = getattr(torch, dtype)
        assert wrongly_merged(monkeypatch, trained, 1.0, base, kind) == (0, 28)
        for factor in (0.0, -1.0, 2.0, 0.5):
            assert wrongly_merged(monkeypatch, trained, factor, base, kind) == (28, 28)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.0])
def test_the_share_of_an_update_is_seen_below_the_rounding_of_its_weights(share):
    """Weights of size 1 in bfloat16 round by up to 2^-9; the update has a tenth of that size.

    40 times more rounding drowns it, and the blur says so: nothing is held against the layer.
    """
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False)
    layer.weight.data.uniform_(0.5, 1.0)
    update = torch.randn(256, 256) * 2e-4
    inputs = _inputs(layer, 256)
    plain = inputs @ layer.weight.T
    probe = LayerProbe(256, plain.detach(), (plain + inputs @ update.T).detach())
    layer.weight.data = (layer.weight + share * update).bfloat16()
    found, blur = probe.share_in(layer)
    assert blur < 0.4
    assert found == pytest.approx(share, abs=blur)
    assert bool(wrong_layers(nn.ModuleDict({"a": layer}), {"a": probe})) == (share != 1)
    jitter(layer, 0.04)
    assert wrong_layers(nn.ModuleDict({"a": layer}), {"a": probe}) == []


def deep_model(folder, layers, family="llama", **shape):
    """A random model of so many layers, with the packaged tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    shape |= {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
    shape |= {"num_hidden_layers": layers, "vocab_size": len(tokenizer)}
    tiny(family, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT about its own
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_and_their_router_are_trained_and_merged(tmp_path, family, experts, quantization):
    """All-linear adapts both. What fits is planned with float32 weights as well."""
    model = deep_model(tmp_path / "model", 2, family, **experts)
    flags = ["--model.name_or_path", model, "--model.quantization", quantization]
    run = trained(config(tmp_path, *flags, "--optim.learning_rate", 1e-2))
    adapted = set(load_file(run / "final" / "adapter_model.safetensors"))
    assert any("experts" in name for name in adapted)
    assert any(".gate." in name for name in adapted)
    record, said = merged(run)
    assert record["refused"] == ""
    assert said.endswith(", verified.")


@pytest.mark.parametrize(
    "layers", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 30))]
)
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], "bfloat16"),
        (["--lora.use_dora", "true"], "float16"),
        (["--model.quantization", "nf4"], "bfloat16"),
    ],
    ids=["lora", "dora", "nf4"],
)
def test_a_deep_model_is_merged_and_one_lost_layer_is_noticed(
    tmp_path, monkeypatch, layers, flags, dtype
):
    """The adapter's effect is less than what rounding in bfloat16 does; both grow with depth."""
    model = deep_model(tmp_path / "model", layers)
    run = made_run(tmp_path, "--model.name_or_path", model, *flags, std=0.002)
    record, said = merged(run, dtype=dtype)
    error = record["errors_nats"]["read back"]
    assert error["mean"] < record["rounding_nats"]
    assert record["refused"] == ""
    assert said.endswith(", verified.")
    shutil.rmtree(run / "merged")

    lost, merge = f"model.layers.{layers // 2}.self_attn.q_proj", merging.merge_adapter

    def all_but_one(base, adapter, kind):
        kept = base.get_submodule(lost).weight.detach().to(kind, copy=True)
        model = merge(base, adapter, kind)
        model.get_submodule(lost).weight.data = kept
        return model

    monkeypatch.setattr(merging, "merge_adapter", all_but_one)
    expected = rf"1 of {7 * layers} layers are wrong: {lost} has -?\d% of.*--dtype.*--unverified"
    with pytest.raises(UserError, match=expected):
        merged(run, dtype=dtype)
    assert left_behind(run) == []


def test_a_refused_merge_can_be_kept_marked_and_is_not_pushed(tmp_path, monkeypatch):
    run = made_run(tmp_path)
    monkeypatch.setattr(merging, "merge_adapter", lambda base, *_: base)
    record, said = merged(run, unverified=True)
    assert record["refused"].startswith("28 of 28 layers are wrong")
    assert "NOT verified: 28 of 28" in said
    assert "**Not verified:** 28 of 28" in (run / "merged" / "README.md").read_text()
    with pytest.raises(UserError, match="is not verified: 28 of 28 layers are wrong"):
        verified_files(run / "merged", run, **AUTO)


def test_a_wrong_merge_leaves_nothing(tmp_path, monkeypatch):
    run = made_run(tmp_path)
    monkeypatch.setattr(merging, "merge_adapter", lambda base, *_: base)
    with pytest.raises(UserError, match="28 of 28 layers are wrong"):
        merged(run)
    assert left_behind(run) == []


def test_files_that_do_not_read_back_as_the_merge_are_caught(tmp_path, monkeypatch):
    run, save = made_run(tmp_path), merging.save_model

    def save_less(model, *arguments, **options):
        model.model.layers[2].self_attn.v_proj.weight.data[0] = 0
        save(model, *arguments, **options)

    monkeypatch.setattr(merging, "save_model", save_less)
    with pytest.raises(UserError, match="do not read back as the merge"):
        merged(run)
    assert left_behind(run) == []


def test_nothing_is_overwritten(tmp_path):
    run = made_run(tmp_path)
    (run / "merged").mkdir()
    (run / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists, and nothing is overwritten"):
        merged(run)
    assert [path.name for path in (run / "merged").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is no merge of this script"):
        verified_files(run / "merged", run, **AUTO)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base": "dequantized"}, "--base: got dequantized, but model.quantization .* none"),
        ({"weights": "best"}, "best holds no weights: wanted one of final"),
        ({"num_pairs": 0}, "--pairs: got 0"),
        ({"max_shard_size": "5 gigs"}, "--max_shard_size: got '5 gigs'"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(lora, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        merge_run(lora[0], tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()


def test_an_output_below_a_file_is_refused(lora):
    with pytest.raises(UserError, match="cannot be written to"):
        merge_run(lora[0], lora[0] / "config.yaml" / "merged")


def test_the_card_says_what_the_run_wrote_and_names_no_path(lora):
    """The header is read by the hub's own reader. A folder is no hub id."""
    run, _, _ = lora
    text = (run / "merged" / "README.md").read_text()
    card = ModelCard.load(run / "merged" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo"],
    }
    assert "| read | 24 |" in text
    assert "| kept as pairs | 23 |" in text
    assert "| dropped: identical answers | 1 |" in text
    assert "| rewards/margins | 0 | 0.75 |" in text
    assert "    The better\n    one\n" in text
    assert "`rows.jsonl` (local)" in text
    assert "No licence is given" in text
    assert "None" not in text
    for file in (run / "merged").iterdir():
        content = file.read_bytes()
        for place in (run.parent, Path(merging.__file__).parents[2], Path.home()):
            assert str(place).encode() not in content, file


def test_hub_ids_go_into_the_cards_header_and_local_files_do_not(lora, tmp_path):
    """Two sources, of which one is a file; and the article's model."""
    run, _, _ = lora
    config = merging.read_run(run)
    own = DataSource(path=str(tmp_path / "own.jsonl"))
    config.data.name_or_path = [DataSource(path="Intel/orca_dpo_pairs"), own]
    config.model.name_or_path = "teknium/OpenHermes-2.5-Mistral-7B"
    error = MergeError(0.1, 0.2, 0.3, effect=1.0, kept=1.0)
    how = {"weights": "final", "base": "original", "dtype": "bfloat16", "has_chat": False}
    how |= {"rounding": 0.1, "refused": ""}
    write_run_card(tmp_path, run, config, errors={"original": error}, pairs_are="8 pairs", **how)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "teknium/OpenHermes-2.5-Mistral-7B"
    assert card.data.datasets == ["Intel/orca_dpo_pairs"]
    assert "huggingface.co/datasets/Intel/orca_dpo_pairs), `own.jsonl` (local)" in card.content
    assert str(tmp_path) not in card.content
    assert "apply_chat_template" not in card.content


def test_a_card_without_evaluation_says_so(tmp_path):
    run = made_run(tmp_path, "--data.eval_fraction", "0")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run / name).unlink()
    (run / "summary.json").write_text(json.dumps({"before": {}, "after": {}}))
    _, said = merged(run)
    text = (run / "merged" / "README.md").read_text()
    assert "These weights were not evaluated on held-out pairs" in text
    assert "8 training (this run held nothing out) pairs" in said
    assert "training (this run held nothing out) pairs" in text


def scores(*tokens):
    values = torch.tensor(tokens)
    return Scores(values, values.view(-1, 2).sum(1))


def test_the_merge_error_by_hand():
    """Off by 0, 0.1, 0 and -0.3: mean 0.1, worst 0.3; the answers are off by 0.1 and 0.3.

    The adapter's effect is 1, -1, 2, 0: mean 1. The merge has 1, -0.9, 2, -0.3 of it, so the share
    is (1 + 0.9 + 4) / (1 + 1 + 4).
    """
    policy, bare = scores(-1.0, -3.0, -1.0, -2.0), scores(-2.0, -2.0, -3.0, -2.0)
    error = measure(policy, bare, scores(-1.0, -2.9, -1.0, -2.3))
    assert error.mean == pytest.approx(0.1)
    assert error.worst == pytest.approx(0.3)
    assert error.per_answer == pytest.approx(0.2)
    assert error.effect == pytest.approx(1.0)
    assert error.kept == pytest.approx(5.9 / 6)
    assert measure(policy, bare, bare).kept == 0
    base = scores(-2.5, -2.0, -3.0, -1.0)  # another one: the merge adds 1.5, -0.9, 2, -1.3 to it
    elsewhere = measure(policy, bare, scores(-1.0, -2.9, -1.0, -2.3), base)
    assert elsewhere.kept == pytest.approx(6.4 / 6)
    assert measure(policy, bare, base, base).kept == 0
    assert measure(policy, policy, policy).kept is None
    assert measure(policy, None, policy).effect == 0


def test_nan_is_a_wrong_merge(lora):
    trained = merging.score_trained(lora[0], "final", 2)
    error = MergeError(float("nan"), 1.0, 1.0, 1.0, float("nan"))
    assert "is nan nats per token off" in trained.refusal(error, 1e-6, None)
    assert trained.refusal(replace(error, mean=1e-6), 1e-6, None) == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rounding": 0.05, "effect": 0.1, "apart": 0.0}, 0.1),  # twice the rounding
        ({"rounding": 0.001, "effect": 0.5, "apart": 0.0}, 0.05),  # a tenth of the effect
        ({"rounding": 0.001, "effect": 0.5, "apart": 0.01}, 0.125),  # a quarter on another base
        ({"rounding": 0.01, "effect": 0.1, "apart": 0.1}, 0.32),  # which is itself far off
    ],
)
def test_how_far_off_a_right_merge_may_be(given, expected):
    assert allowed(**given) == pytest.approx(expected, abs=2e-5)


PEAK = """
import sys, threading, time
from pathlib import Path
import bitsandbytes, peft, torch
torch.set_num_threads(1)
from dpo.after import merge as merging

def anonymous():  # bytes that are this process's own: pages of mapped files can be dropped
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

if sys.argv[2] == "keep":  # the negative control: merges are not let go
    kept, merge = [], merging.merge_adapter
    merging.merge_adapter = lambda *arguments: kept.append(merge(*arguments)) or kept[-1]
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
run = Path(sys.argv[1])
merging.merge_run(run, run / sys.argv[2], num_pairs=2, max_shard_size="20MB")
done = True
thread.join()
print("PEAK", peak - before)
"""


def peak_bytes(run, how):
    """The most memory that a merge took. Large blocks go back to the system as soon as freed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, run, how], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK ")[1])


@pytest.mark.slow
def test_a_merge_takes_the_memory_of_one_model(tmp_path):
    """A 4-bit run of a model of 212 MB, both bases measured: 1 model and its 4 bits, not 2."""
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    model = tiny("llama", **size, num_attention_heads=8, num_key_value_heads=8, vocab_size=800)
    model.save_pretrained(tmp_path / "model")
    num_bytes = 4 * model.num_parameters()
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    tokenizer.save_pretrained(tmp_path / "model")
    del model
    flags = ["--model.name_or_path", tmp_path / "model", "--model.quantization", "nf4"]
    run = made_run(tmp_path, *flags, std=0.02)
    free, keep = (peak_bytes(run, how) / num_bytes for how in ("free", "keep"))
    assert 1 < free < 1.6
    assert keep > 2
