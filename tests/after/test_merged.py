import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from dpo.after.merge import merge_run
from dpo.after.merged import load_merge_base, merge_adapter, save_model
from dpo.cli import parse
from dpo.config import ModelConfig
from dpo.errors import UserError
from tests.models import QUICKSTART_MODEL, tiny
from tests.train.runs import config, run

IDS = torch.arange(1, 40)[None]


def adapter_of(folder, **settings):
    """A LoRA adapter with an effect, saved; (its folder, the base before, its own logits)."""
    base = tiny()
    before = copy.deepcopy(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    torch.manual_seed(2)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, before, model.eval()(IDS).logits


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_merged_adapter_computes_what_the_adapter_did(tmp_path, kind):
    folder, base, expected = adapter_of(tmp_path, **kind)
    with torch.no_grad():
        bare = base(IDS).logits
        logits = merge_adapter(base, folder, torch.float32)(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (bare - expected).abs().max() > 0.1


def test_base_and_update_are_added_in_fp32_and_rounded_once(tmp_path):
    """round(base + update), bit for bit; PEFT's safe merge gives round(base + round(update))."""
    folder, base, _ = adapter_of(tmp_path)
    base = base.bfloat16()
    weights = peft.load_peft_weights(str(folder))
    name = "model.layers.0.mlp.down_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    exact = base.get_submodule(name).weight.float() + 8 / 4 * (b @ a)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    theirs = theirs.merge_and_unload(safe_merge=True)
    ours = merge_adapter(base, folder, torch.bfloat16)
    assert torch.equal(ours.get_submodule(name).weight, exact.bfloat16())
    assert not torch.equal(theirs.get_submodule(name).weight, exact.bfloat16())


def test_what_a_model_keeps_in_another_type_stays_in_it(tmp_path):
    """Rotary frequencies are fp32 in every model; a router may be."""
    folder, base, _ = adapter_of(tmp_path)
    base.bfloat16().model.norm.float()
    base.model.rotary_emb.inv_freq = base.model.rotary_emb.inv_freq.float()
    merged = merge_adapter(base, folder, torch.float16)
    assert merged.model.norm.weight.dtype == torch.float32
    assert merged.model.rotary_emb.inv_freq.dtype == torch.float32
    others = {p.dtype for name, p in merged.named_parameters() if name != "model.norm.weight"}
    assert others == {torch.float16}


def test_a_weight_beyond_float16_is_told(tmp_path):
    folder, base, _ = adapter_of(tmp_path)
    base.lm_head.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"--dtype: got float16, but lm_head.weight .* 65504"):
        merge_adapter(base, folder, torch.float16)


def test_the_dequantised_base_is_what_was_trained_and_the_16_bit_one_is_not():
    """Against the 4-bit layers' own forward."""
    config = parse(["--model.quantization", "nf4", "--train.gradient_checkpointing", "false"])
    device = torch.device("cpu")
    plain, original = (
        load_merge_base(config, which, torch.float32, device) for which in ("dequantized", "16bit")
    )
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    four_bit = transformers.AutoModelForCausalLM.from_pretrained(
        QUICKSTART_MODEL,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    ).train()  # in eval mode it would repack its weights
    with torch.no_grad():
        expected = four_bit(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=0, atol=1e-4)
        assert (original(IDS).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"top_k": 40}], ids=str)
def test_a_saved_model_ends_its_answers_as_training_did(tmp_path, sampling):
    """Also where the base names a temperature and forgets do_sample."""
    model, tokenizer = (
        tiny(),
        transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL),
    )
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, **sampling)
    how = {"template": "{{ messages[0].content }}", "stops": [2, 5], "max_shard_size": "20KB"}
    source = ModelConfig(name_or_path=QUICKSTART_MODEL)
    save_model(model, tokenizer, tmp_path, source=source, **how)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert settings.eos_token_id == [2, 5]
    assert settings.pad_token_id == tokenizer.pad_token_id
    assert settings.temperature == sampling.get("temperature")
    assert bool(settings.do_sample) == bool(sampling)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == how["template"]
    assert saved("What is it?")["input_ids"] == tokenizer("What is it?")["input_ids"]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


READ_BY_TRANSFORMERS_4 = """
import json, sys, torch, transformers
assert transformers.__version__ == "4.57.1"
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
said = [AutoTokenizer.from_pretrained(folder).apply_chat_template(
    [{"role": "user", "content": "What is it?"}], add_generation_prompt=True)
    for folder in sys.argv[1:]]
print(json.dumps([said, model(torch.tensor(said[:1])).logits[0, -1].tolist()]))
"""


@pytest.mark.slow
def test_what_a_run_leaves_is_read_alike_by_transformers_4(tmp_path):
    """A base as it is published: with the keys of then, and frequencies that are no default."""
    base = Path(shutil.copytree(QUICKSTART_MODEL, tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text())
    settings |= {"rope_theta": 123.0, "torch_dtype": settings.pop("dtype")}
    del settings["rope_parameters"]
    (base / "config.json").write_text(json.dumps(settings))
    folder = run(config(tmp_path, "--model.name_or_path", base, "--optim.learning_rate", 1e-2))
    merge_run(folder, tmp_path / "merged", num_pairs=4)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    old = ["transformers==4.57.1", "tokenizers==0.22.1", "huggingface_hub==0.36.0", "requests"]
    old += ["urllib3", "idna", "certifi", "charset_normalizer"]
    subprocess.run([*pip, tmp_path / "old", *old], check=True)
    where = os.environ | {"PYTHONPATH": str(tmp_path / "old"), "PYTHONWARNINGS": "ignore"}

    def read(*folders):
        command = [sys.executable, "-c", READ_BY_TRANSFORMERS_4, *map(str, folders)]
        done = subprocess.run(command, env=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    (ids, of_final), logits = read(tmp_path / "merged", folder / "final")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = merged(torch.tensor([ids])).logits[0, -1].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    asked = [{"role": "user", "content": "What is it?"}]
    rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids == of_final == rendered
    assert logits == pytest.approx(expected, abs=1e-4)
    flags = ["--model.adapter", "none", "--train.output_dir", tmp_path / "full"]
    full = run(config(tmp_path, "--model.name_or_path", base, "--train.max_steps", 1, *flags))
    whole = transformers.AutoModelForCausalLM.from_pretrained(full / "final")
    expected_of_full = whole(torch.tensor([ids])).logits[0, -1].tolist()
    assert read(full / "final")[1] == pytest.approx(expected_of_full, abs=1e-4)
    merged.save_pretrained(tmp_path / "merged")  # the negative control: as transformers 5 writes it
    assert read(tmp_path / "merged")[1] != pytest.approx(expected, abs=1e-2)


def test_embeddings_that_an_adapter_parted_from_the_head_are_written_so(tmp_path):
    model = tiny(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    expected = model(IDS).logits
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    how = {"template": None, "stops": [2], "max_shard_size": "1MB"}
    save_model(model, tokenizer, tmp_path, source=ModelConfig(name_or_path=tied(tmp_path)), **how)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved(IDS).logits, expected)


def tied(tmp_path):
    """A folder of the model before training."""
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")
