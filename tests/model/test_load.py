"""What `load_policy` accepts, changes and refuses."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

from dpo.config import Config
from dpo.data.stream import build_stream
from dpo.errors import UserError
from dpo.model import named
from dpo.model.load import Policy, load_policy, zero_dropouts
from dpo.model.named import load_tokenizer
from dpo.model.reference import AdapterOff, Frozen, Zero, adapter_off, build_reference, choose_mode
from dpo.model.scorer import Scorer
from tests.models import QUICKSTART_MODEL, tiny, with_lora

STREAM = build_stream([([5, 6, 7], [8, 9], [10, 11, 12])])


def config(path="quickstart/model", **model):
    settings = Config()
    settings.model.name_or_path = str(path)
    settings.model.quantization, settings.model.dtype = "none", "float32"
    settings.train.gradient_checkpointing = False
    for key, value in model.items():
        setattr(settings.model, key, value)
    return settings


def test_lora_covers_all_linears_but_the_head_and_nothing_else_trains():
    policy = load_policy(config(), "cpu")
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    layers = {name.split(".lora_")[0].split(".")[-1] for name in trained}
    assert layers == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}


def test_the_adapter_is_a_function_of_the_seed():
    first, second = (load_policy(config(), "cpu").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_has_the_configured_type_and_the_adapter_is_float32(dtype):
    model = load_policy(config(dtype=dtype), "cpu").model
    types = {
        name: p.dtype
        for name, p in model.named_parameters()
        if "layernorm" in name or "lora_" in name
    }
    assert {t for n, t in types.items() if "lora_" in n} == {torch.float32}
    assert {t for n, t in types.items() if "lora_" not in n} == {getattr(torch, dtype)}


def test_auto_keeps_the_type_of_the_checkpoint(tmp_path):
    tiny().half().save_pretrained(tmp_path)
    model = load_policy(config(tmp_path, dtype="auto"), "cpu").model
    assert model.get_base_model().dtype == torch.float16


def test_every_dropout_but_loras_is_set_to_0_and_named():
    settings = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)
    model = peft.get_peft_model(
        transformers.GPT2LMHeadModel(settings),
        peft.LoraConfig(
            lora_dropout=0.3,
            target_modules=["c_attn"],
            task_type="CAUSAL_LM",
            fan_in_fan_out=True,
        ),
    )
    changed = zero_dropouts(model)
    assert "Dropout.p 0.1" in changed
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if "lora_dropout" in name} == {0.3}
    assert {rate for name, rate in rates.items() if "lora_dropout" not in name} == {0.0}
    assert zero_dropouts(model) == []


def test_weights_that_are_missing_in_the_files_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights.*layers.1.mlp.up_proj.weight"):
        load_policy(config(tmp_path), "cpu")


def test_target_modules_that_do_not_exist_are_refused():
    settings = config()
    settings.lora.target_modules = ["no_such_layer"]
    with pytest.raises(UserError, match=r"lora.target_modules: got \['no_such_layer'\]"):
        load_policy(settings, "cpu")


def sft_adapter(tmp_path, **settings):
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL),
        peft.LoraConfig(
            r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def test_an_adapter_folder_is_trained_on_with_its_frozen_copy_as_reference(tmp_path):
    folder = sft_adapter(tmp_path, lora_dropout=0.4)
    settings = config(folder)
    settings.lora.dropout = 0.0
    policy = load_policy(settings, "cpu")
    assert policy.has_reference_adapter
    assert any("of lora.*, only dropout is used" in note for note in policy.notes)
    trained = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)

    scorer = Scorer(policy.model)
    reference = build_reference("adapter", policy, scorer, scorer.layout)
    at_start = scorer(STREAM).detach()
    assert policy.model.training
    assert torch.equal(reference(STREAM), at_start)  # and without the dropout it was trained with
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    assert torch.equal(reference(STREAM), at_start)
    assert not torch.equal(scorer(STREAM).detach(), at_start)
    assert [n for n, p in policy.model.named_parameters() if p.requires_grad] == trained
    assert load_tokenizer(settings.model).chat_template  # the adapter's folder has none: the base's


def test_an_adapter_that_peft_cannot_switch_off_exactly_is_refused(tmp_path):
    with pytest.raises(UserError, match="bias 'all', wanted LORA"):
        load_policy(config(sft_adapter(tmp_path, bias="all")), "cpu")


def test_an_adapter_folder_cannot_be_fully_fine_tuned(tmp_path):
    folder = sft_adapter(tmp_path)
    with pytest.raises(UserError, match=r"model\.adapter: got none, but"):
        load_policy(config(folder, adapter="none"), "cpu")


def test_a_frozen_reference_does_not_follow_the_policy():
    model = tiny()
    scorer = Scorer(model)
    reference = build_reference("frozen", Policy(model), scorer, scorer.layout)
    before = reference(STREAM)
    assert torch.equal(before, scorer(STREAM).detach())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert torch.equal(reference(STREAM), before)
    assert not torch.equal(scorer(STREAM).detach(), before)


def test_a_zero_reference_has_log_prob_0():
    assert Zero()(STREAM).tolist() == [0.0] * 5


def test_references_carry_no_gradient():
    policy = load_policy(config(), "cpu")
    scorer = Scorer(policy.model)
    for reference in (AdapterOff(scorer, policy), Frozen(tiny(), "shared"), Zero()):
        assert not reference(STREAM).requires_grad


def test_adapter_off_survives_an_error_inside():
    policy = load_policy(config(), "cpu")
    with pytest.raises(KeyError), adapter_off(policy):
        raise KeyError
    assert any(p.requires_grad for p in policy.model.parameters())
    assert not policy.model.get_base_model().model.layers[0].mlp.up_proj.disable_adapters


def test_auto_takes_the_reference_that_costs_nothing():
    policy = load_policy(config(), "cpu")
    assert choose_mode("auto", policy) == "adapter"
    assert choose_mode("zero", policy) == "zero"
    assert choose_mode("auto", load_policy(config(adapter="none"), "cpu")) == "frozen"


def test_a_router_without_its_auxiliary_loss_is_said(tmp_path):
    tiny("mixtral", num_local_experts=4).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(tmp_path)
    settings = config(tmp_path)
    settings.lora.target_modules = ["q_proj", "v_proj"]
    assert any(
        "router's auxiliary loss is left out" in n for n in load_policy(settings, "cpu").notes
    )


def test_without_the_hook_an_evaluation_would_cut_nf4_training(tmp_path):
    """The negative control for `keep_4bit_trainable`, where the CPU has the repacking kernel."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU does not repack 4-bit weights: the trap is not here")
    tiny(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantized = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def input_gradient(guarded):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantized, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        model = with_lora(model).bfloat16()
        if guarded:
            Scorer(model)
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3]]))
        model.train()
        embedded = model.get_input_embeddings()(torch.tensor([[1, 2, 3]])).detach()
        embedded.requires_grad_()
        with warnings.catch_warnings():  # the unguarded backward warns of what it leaves out
            warnings.simplefilter("ignore")
            try:
                model(inputs_embeds=embedded).logits.float().sum().backward()
            except RuntimeError:
                return None
        return embedded.grad

    guarded, unguarded = input_gradient(True), input_gradient(False)
    assert guarded is not None
    assert guarded.abs().max() > 0
    assert unguarded is None or not torch.allclose(unguarded, guarded, rtol=1e-3)


def test_the_written_adapter_names_its_base(tmp_path):
    sft_adapter(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == QUICKSTART_MODEL


# -------------------------------------------------------------------------- adapters on the hub


def put_on_the_hub(monkeypatch, tmp_path, name, folder):
    """The hub's cache as a download leaves it; no network is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    named._hub_adapter.cache_clear()
    return repo / "snapshots" / ("a" * 40)


@pytest.mark.parametrize("has_config", [False, True], ids=["", "with a config.json beside it"])
def test_an_adapter_of_the_hub_is_an_adapter(tmp_path, monkeypatch, has_config):
    """As some trainers save it, beside the config.json of its base."""
    local = sft_adapter(tmp_path / "sft")
    if has_config:
        shutil.copy(Path(QUICKSTART_MODEL) / "config.json", local)
    put_on_the_hub(monkeypatch, tmp_path, "someone/sft", local)
    policy = load_policy(config("someone/sft"), "cpu")
    assert policy.has_reference_adapter
    assert any("adapter from someone/sft: r 2" in note for note in policy.notes)
    expected = Scorer(load_policy(config(local), "cpu").model.eval())(STREAM)
    assert torch.equal(Scorer(policy.model.eval())(STREAM), expected)
    bare = Scorer(load_policy(config(), "cpu").model.eval())(STREAM)
    assert not torch.equal(expected, bare)  # so dropping it would be seen
    assert load_tokenizer(config("someone/sft").model).chat_template


def test_a_model_of_the_hub_is_no_adapter_and_an_adapters_base_may_be_there(tmp_path, monkeypatch):
    put_on_the_hub(monkeypatch, tmp_path, "someone/base", QUICKSTART_MODEL)
    assert named.adapter_of(config("someone/base").model) is None
    local = sft_adapter(tmp_path / "sft")
    settings = json.loads((local / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "someone/base", "revision": "a" * 40}
    (local / "adapter_config.json").write_text(json.dumps(settings))
    base = named.base_of(config(local, revision="of-the-adapter").model)
    assert (base.name_or_path, base.revision) == ("someone/base", "a" * 40)
    assert load_policy(config(local), "cpu").has_reference_adapter


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    below, above = sft_adapter(tmp_path / "below"), sft_adapter(tmp_path / "above")
    settings = json.loads((above / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(below)
    (above / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"an adapter on .*below', wanted one on a whole model"):
        load_policy(config(above), "cpu")


# --------------------------------------------------------------- what checkpoints may be like


def stored_in_4_bits(tmp_path):
    policy = load_policy(config(quantization="nf4", adapter="lora"), "cpu")
    folder = tmp_path / "nf4"
    policy.model.unload().save_pretrained(folder)
    return folder


def test_a_checkpoint_that_is_stored_in_4_bits_is_what_quantising_it_is(tmp_path):
    folder = stored_in_4_bits(tmp_path)
    expected = Scorer(load_policy(config(quantization="nf4"), "cpu").model)(STREAM)
    assert torch.equal(
        Scorer(load_policy(config(folder, quantization="nf4"), "cpu").model)(STREAM), expected
    )
    for wrong in ("none", "fp4", "int8"):
        with pytest.raises(UserError, match=rf"got {wrong}, but .* stored in nf4. Set it to nf4"):
            load_policy(config(folder, quantization=wrong), "cpu")
    plain = load_policy(config(folder, quantization="nf4"), "cpu", dequantized=True)
    assert torch.allclose(Scorer(plain.model)(STREAM), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_checkpoint_of_another_quantisation_is_refused_with_the_way_out(tmp_path, method):
    shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    said = json.loads(file.read_text()) | {
        "quantization_config": {"quant_method": method, "bits": 4}
    }
    file.write_text(json.dumps(said))
    for quantization in ("none", "nf4"):
        with pytest.raises(UserError, match=rf"stored in {method}.*Name the model that they were"):
            load_policy(config(tmp_path / "model", quantization=quantization), "cpu")


@pytest.mark.parametrize("fault", ["a pointer", "cut", "empty", "no tokenizer.json"])
def test_files_that_did_not_arrive_are_refused_with_a_remedy(tmp_path, fault):
    shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = file.read_bytes()
    if fault == "no tokenizer.json":
        (tmp_path / "model" / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match=r"cannot be read \(.*Check that they are whole"):
            load_tokenizer(config(tmp_path / "model").model)
        return
    file.write_bytes(
        {"a pointer": b"version https://git-lfs...", "cut": weights[:5000], "empty": b""}[fault]
    )
    with pytest.raises(UserError, match=r"cannot be read \(.*may be a git LFS pointer"):
        load_policy(config(tmp_path / "model"), "cpu")


@pytest.mark.parametrize("fault", ["cut", "other base"])
def test_an_adapter_that_does_not_load_is_refused(tmp_path, fault):
    folder = sft_adapter(tmp_path / "sft")
    if fault == "cut":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:500])
    else:
        other = tiny(hidden_size=64)
        other.save_pretrained(tmp_path / "other")
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / "other")
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"the adapter in .* does not load onto"):
        load_policy(config(folder), "cpu")


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
def test_an_adapter_on_tied_embeddings_is_refused_before_training():
    settings = config()
    settings.lora.target_modules = ["q_proj", "embed_tokens"]
    with pytest.raises(UserError, match="the embeddings, which the head shares"):
        load_policy(settings, "cpu")


def test_a_token_without_an_embedding_is_named():
    model = config().model
    tokenizer = load_tokenizer(model)
    rows = named.load_shape(model).vocab_size
    named.check_vocabulary(model, tokenizer, rows - 1)
    tokenizer.add_tokens(["<new>"])
    new = tokenizer.convert_tokens_to_ids("<new>")
    with pytest.raises(UserError, match=rf"token {new} \('<new>'\), but .* for {rows} tokens"):
        named.check_vocabulary(model, tokenizer, max(new, rows))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_experts_that_take_no_dropout_are_refused_by_that_key(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path)
    settings = config(tmp_path)
    with pytest.raises(
        UserError, match=r"lora\.dropout: got 0\.05, which .* Set lora\.dropout to 0"
    ):
        load_policy(settings, "cpu")
    settings.lora.dropout = 0.0
    assert load_policy(settings, "cpu").is_adapted
