import copy
import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants

from dpo.after.merged import (
    RECORD,
    base_licence,
    check_can_push,
    hub_id,
    load_merge_base,
    merge_adapter,
    push,
    save_model,
    verified_files,
    write_card,
    write_record,
)
from dpo.cli import parse
from dpo.config import resolve
from dpo.errors import UserError
from tests.after.hub import TOKEN, running_hub
from tests.models import tiny

# huggingface_hub 2.4 hands its own HTTP client a file in a way that that one wants otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

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
        resolve("quickstart/model"),
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
        transformers.AutoTokenizer.from_pretrained(resolve("quickstart/model")),
    )
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, **sampling)
    how = {"template": "{{ messages[0].content }}", "stops": [2, 5], "max_shard_size": "20KB"}
    save_model(model, tokenizer, tmp_path, **how)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert settings.eos_token_id == [2, 5]
    assert settings.pad_token_id == tokenizer.pad_token_id
    assert settings.temperature == sampling.get("temperature")
    assert bool(settings.do_sample) == bool(sampling)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == how["template"]
    assert saved("What is it?")["input_ids"] == tokenizer("What is it?")["input_ids"]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("teknium/OpenHermes-2.5-Mistral-7B", True),
        ("gpt2", True),
        ("quickstart/model", False),
        ("/home/me/model", False),
        ("../models/mine", False),
        ("./mine", False),
        ("a/b/c", False),
        ("C:\\models\\mine", False),
    ],
)
def test_only_a_hub_id_is_one(name, is_id):
    assert hub_id(name) == (name if is_id else None)


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("me/model") == "me/model"
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert hub_id("me/model") is None


def test_the_licence_is_the_one_of_the_bases_own_card(tmp_path):
    assert base_licence(str(tmp_path), None) == {}
    card = "---\nlicense: other\nlicense_name: theirs\ntags: [x]\n---\n# Base\n"
    (tmp_path / "README.md").write_text(card)
    assert base_licence(str(tmp_path), None) == {"license": "other", "license_name": "theirs"}
    (tmp_path / "README.md").write_text("# Base\n")
    assert base_licence(str(tmp_path), None) == {}
    assert base_licence("nobody/nothing", None) == {}  # the tests are offline


def test_a_cards_header_is_read_back_whatever_its_values_are(tmp_path):
    header = {
        "base_model": "teknium/OpenHermes-2.5-Mistral-7B",
        "datasets": ["Intel/orca_dpo_pairs"],
        "license": "apache-2.0",
        "tags": ["dpo", "a: b"],
    }
    error = SimpleNamespace(mean=0.1, worst=0.2, per_answer=0.3)
    prompt = {"prompt": "{{ secret }} # ---\n---\nkey: value", "before": "```", "after": "b"}
    facts = {
        "name": "run",
        "model": "m",
        "config": parse([]),
        "sources": ["s"],
        "errors": {"original": error},
        "licence": "apache-2.0",
        "samples": [prompt],
        "step": 3,
    }
    write_card(tmp_path, header, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == header
    assert "    {{ secret }} # ---\n    ---\n    key: value\n" in card.content


ASKED = {"weights": "final", "base": "auto", "dtype": "auto"}


def merged_folder(folder):
    """(run, merged folder) with a record, and little else."""
    run, merged = folder / "run", folder / "merged"
    (run / "final").mkdir(parents=True)
    merged.mkdir()
    (run / "final" / "adapter_model.safetensors").write_bytes(b"adapter")
    (merged / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (merged / "config.json").write_text("{}")
    (merged / "README.md").write_text("---\ntags: [dpo]\n---\n# Card\n")
    write_record(merged, run / "final", "original", "float32", {})
    return run, merged


def test_only_what_was_verified_is_pushed_again(tmp_path):
    run, merged = merged_folder(tmp_path)
    (merged / "README.md").write_text("---\nlicense: mit\n---\n# Edited\n")
    (merged / "notes.txt").write_text("came later")
    files = ["README.md", "config.json", "model.safetensors", RECORD]
    assert sorted(verified_files(merged, run, **ASKED)) == sorted(files)
    assert verified_files(merged, run, weights="final", base="auto", dtype="float32")

    with pytest.raises(UserError, match=r"another merge than asked for \(dtype float32\)"):
        verified_files(merged, run, weights="final", base="auto", dtype="bfloat16")
    (merged / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"config.json is no longer what was verified"):
        verified_files(merged, run, **ASKED)


@pytest.mark.parametrize("record", ["", "{", "{}", "[]", "null", '{"weights": "final"}', "\xff"])
def test_a_broken_record_is_told_and_nothing_of_it_is_pushed(tmp_path, record):
    run, merged = merged_folder(tmp_path)
    (merged / RECORD).write_bytes(record.encode("latin-1"))
    with pytest.raises(UserError, match=r"merge\.json is broken.* Move .* away and merge again"):
        verified_files(merged, run, **ASKED)


def test_a_record_whose_files_are_no_sums_is_broken(tmp_path):
    run, merged = merged_folder(tmp_path)
    record = json.loads((merged / RECORD).read_text())
    (merged / RECORD).write_text(json.dumps(record | {"files": ["config.json"]}))
    with pytest.raises(UserError, match=r"merge\.json is broken"):
        verified_files(merged, run, **ASKED)


def test_a_merge_of_weights_that_were_trained_on_since_is_not_pushed(tmp_path):
    run, merged = merged_folder(tmp_path)
    (run / "final" / "adapter_model.safetensors").write_bytes(b"trained further")
    with pytest.raises(UserError, match="other weights"):
        verified_files(merged, run, **ASKED)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this machine, and a client that talks to it with a token from the environment."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def pushed(folder, repo="me/model", *, public=False):
    run, merged = merged_folder(folder)
    return push(merged, verified_files(merged, run, **ASKED), repo, public=public), merged


def test_a_push_arrives_byte_for_byte_in_a_private_repository(hub, tmp_path):
    url, merged = pushed(tmp_path)
    assert url == f"{hub.url}/me/model"
    assert hub.visibility == {"me/model": "private"}
    assert hub.files["me/model"] == {file.name: file.read_bytes() for file in merged.iterdir()}


def test_the_token_goes_nowhere_but_into_the_authorization_header(hub, tmp_path, capsys):
    pushed(tmp_path)
    assert any(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in hub.requests)
    for request in hub.requests:
        request.headers.pop("authorization", None)
        assert TOKEN not in f"{request.path} {request.headers} {request.body!r}"
    assert TOKEN not in "".join(capsys.readouterr())


def test_public_is_sent_when_asked_for(hub, tmp_path):
    pushed(tmp_path, public=True)
    assert hub.visibility == {"me/model": "public"}


def test_a_repository_that_is_public_already_is_not_pushed_to_by_accident(hub, tmp_path):
    hub.visibility["me/model"], hub.files["me/model"] = "public", {}
    with pytest.raises(UserError, match=r"me/model is public already\. Give --public"):
        pushed(tmp_path)
    assert hub.files == {"me/model": {}}
    assert hub.objects == {}
    run, merged = tmp_path / "run", tmp_path / "merged"
    push(merged, verified_files(merged, run, **ASKED), "me/model", public=True)
    assert len(hub.files["me/model"]) == 4


@pytest.mark.parametrize(
    "where", ["/api/repos/create", "/api/models/me/model/preupload", "/me/model.git", "/lfs/"]
)
def test_a_refused_push_leaves_the_folder_and_can_be_repeated(hub, tmp_path, where):
    hub.refuse[where] = 403
    with pytest.raises(UserError, match=r"me/model was not pushed .*repeats the push alone"):
        pushed(tmp_path)
    hub.refuse.clear()
    run, merged = tmp_path / "run", tmp_path / "merged"
    push(merged, verified_files(merged, run, **ASKED), "me/model", public=False)
    assert len(hub.files["me/model"]) == 4


def test_a_hub_that_cannot_be_reached_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"not pushed \(ConnectError: .*the network"):
        pushed(tmp_path)


@pytest.mark.parametrize("repo", ["model", "me/my/model", "me/", "/model", "me model/x", ""])
def test_a_repository_needs_a_namespace_and_a_name(hub, repo):
    with pytest.raises(UserError, match="wanted NAMESPACE/NAME"):
        check_can_push(repo)
    check_can_push("me/model-2.5")


def test_a_push_without_a_token_is_refused_before_any_request(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no token for the hub\. Log in with `hf auth login`"):
        check_can_push("me/model")
    assert hub.requests == []
    assert json.dumps(hub.files) == "{}"
