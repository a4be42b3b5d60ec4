"""What is counted on tensors without numbers is what a real model takes."""

import json

import pytest
import torch

from dpo.config import Config
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.logps import TILE_BYTES
from dpo.model.load import checkpoint_layers, load_policy
from dpo.model.reference import build_reference, choose_mode
from dpo.model.scorer import Scorer
from dpo.plan.fake import FakePolicy
from dpo.plan.fit import SAVINGS
from dpo.plan.memory import PeakBytes
from tests.models import tiny, with_lora

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 500}
PAIRS = [
    TokenizedPair([3] * 90, [5] * 40, [6] * 50),
    TokenizedPair([3] * 30, [5] * 70, [6] * 20),
]


def folder_of(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def configuration(
    path, *, quantization="none", dtype="float32", adapter="lora", checkpoint=False, lean=True
):
    config = Config()
    config.model.lean_layers = lean
    config.model.name_or_path = path
    config.model.quantization, config.model.dtype = quantization, dtype
    config.model.adapter = adapter
    config.train.gradient_checkpointing = checkpoint
    return config


def real_step_bytes(config, pairs, *, load=load_policy, tile_bytes=TILE_BYTES):
    """The same step as FakePolicy's, on a loaded model, whose gradients exist."""
    policy = load(config, "cpu")
    scorer = Scorer(policy.model, config.model.attention)
    scorer.tile_bytes = tile_bytes
    mode = choose_mode("auto", policy)
    reference = build_reference(mode, policy, scorer, scorer.layout)
    stream = build_stream(pairs)

    def step():
        logps = scorer(stream)
        reference(stream)
        logps.sum().backward()

    step()
    with PeakBytes() as count:
        step()
    return count.peak


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"checkpoint": True},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "quantization": "nf4"},
        {"adapter": "none"},
        {"adapter": "none", "checkpoint": True},
        {"lean": False},
        {"lean": False, "dtype": "bfloat16"},
    ],
    ids=[
        "lora",
        "lora checkpointed",
        "bfloat16",
        "nf4",
        "full",
        "full checkpointed",
        "peft's layers",
        "peft's layers bfloat16",
    ],
)
def test_a_step_takes_what_a_real_one_takes(more, tmp_path):
    config = configuration(folder_of(tiny(**SIZES), tmp_path / "model"), **more)
    planned = FakePolicy(config).step_bytes(PAIRS)
    assert planned == pytest.approx(real_step_bytes(config, PAIRS), rel=0.03)


@pytest.mark.parametrize("saving", [SAVINGS[1], SAVINGS[2], SAVINGS[-1]], ids=str)
def test_what_is_given_up_for_memory_saves_what_was_planned(saving, tmp_path):
    """Some layers checkpointed, or all and a smaller tile, which here holds 8 rows of the head."""
    saving = saving._replace(tile_bytes=saving.tile_bytes // 2**11)
    config = configuration(folder_of(tiny(**SIZES), tmp_path / "model"), dtype="bfloat16")
    fake = FakePolicy(config)
    before = fake.step_bytes(PAIRS)
    saving.apply(fake.scorer)
    planned = fake.step_bytes(PAIRS)
    assert planned < before

    def load(*arguments):
        policy = load_policy(*arguments)
        checkpoint_layers(policy.model.get_base_model(), saving.checkpoint_every)
        return policy

    real = real_step_bytes(config, PAIRS, load=load, tile_bytes=saving.tile_bytes)
    assert planned == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_every_family_is_measured_by_its_own_code(family, tmp_path):
    config = configuration(folder_of(tiny(family, **SIZES), tmp_path / "model"))
    planned = FakePolicy(config).step_bytes(PAIRS)
    assert planned == pytest.approx(real_step_bytes(config, PAIRS), rel=0.03)


@pytest.mark.parametrize(("lean", "most"), [(False, 1.1), (True, 1.15)])
def test_padded_rows_take_what_real_ones_take(lean, most, tmp_path):
    """A little less than planned: a tensor without numbers always gets a mask, and with it copies
    of grouped keys and values. Where layers keep less, the copies are a larger share."""
    config = configuration(folder_of(tiny(**SIZES), tmp_path / "model"), lean=lean)
    shared = FakePolicy(config).step_bytes(PAIRS)
    config.model.attention = "padded"
    planned = FakePolicy(config).step_bytes(PAIRS)
    assert 1 <= planned / real_step_bytes(config, PAIRS) < most
    assert planned > 1.3 * shared  # the check above can fail


def test_what_a_plan_could_forget_is_told_apart(tmp_path):
    """Negative control: lean layers, and dropout in PEFT's own, make more than the 3 % above."""
    path = folder_of(tiny(**SIZES), tmp_path / "model")
    lean, own = (configuration(path, lean=is_lean) for is_lean in (True, False))
    planned = FakePolicy(own).step_bytes(PAIRS)
    assert FakePolicy(lean).step_bytes(PAIRS) < 0.8 * planned
    own.lora.dropout = 0.0
    assert FakePolicy(own).step_bytes(PAIRS) < 0.95 * planned


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
def test_weights_take_what_the_loaded_ones_take(quantization, dtype, tied, tmp_path):
    """Stored numbers and their scales; of 4 bits also 64 bytes a layer, a table of 16 values."""
    model = tiny(tie_word_embeddings=tied, **SIZES).to(torch.bfloat16)
    config = configuration(
        folder_of(model, tmp_path / "model"), quantization=quantization, dtype=dtype
    )
    fake, real = FakePolicy(config), load_policy(config, "cpu").model
    parameters = dict(real.named_parameters())  # type: ignore[attr-defined]
    stored = sum(
        p.numel() * p.element_size() + scale_bytes(p)
        for name, p in parameters.items()
        if "lora_" not in name
    )
    assert fake.base_bytes() == pytest.approx(stored, rel=2e-3)
    adapter = [p for name, p in parameters.items() if "lora_" in name]
    assert {p.dtype for p in adapter} == {torch.float32}  # PEFT's, over half precision too
    assert fake.adapter_bytes() == 4 * sum(p.numel() for p in adapter)
    assert len(fake.trained) == len(adapter)


def scale_bytes(parameter):
    state = getattr(parameter, "quant_state", None)
    scale = getattr(parameter, "SCB", None)
    tensors = [state.absmax] if state else [] if scale is None else [scale]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_largest_weight_is_dequantised_one_at_a_time(tmp_path):
    """352 x 128 numbers of 2 bytes; without quantisation there is none."""
    path = folder_of(tiny(**SIZES), tmp_path / "model")
    quantised = configuration(path, quantization="nf4", dtype="bfloat16")
    assert FakePolicy(quantised).dequantised_bytes() == 2 * 352 * 128
    assert FakePolicy(configuration(path)).dequantised_bytes() == 0


def test_config_json_is_enough_for_a_model_that_would_not_fit_here(tmp_path):
    """34 billion weights, 69 GB: made from one small file."""
    shape = {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    fake = FakePolicy(configuration(str(tmp_path), dtype="bfloat16"))
    assert fake.num_base_weights() == pytest.approx(34.7e9, rel=0.01)
    assert fake.base_bytes() == 2 * fake.num_base_weights()


def test_an_adapter_folder_is_planned_with_its_frozen_copy(tmp_path):
    base = folder_of(tiny(**SIZES), tmp_path / "base")
    adapted = with_lora(tiny(**SIZES), r=8)
    adapted.peft_config["default"].base_model_name_or_path = base
    config = configuration(folder_of(adapted, tmp_path / "adapter"))
    fake = FakePolicy(config)
    trained = sum(p.numel() * p.element_size() for p in fake.trained)
    assert fake.adapter_bytes() == 2 * trained > 0
    assert fake.step_bytes(PAIRS) == pytest.approx(real_step_bytes(config, PAIRS), rel=0.03)


@pytest.mark.parametrize(
    ("shape", "said"),
    [({"model_type": "vit"}, "no causal language model"), (None, "no model folder and could not")],
)
def test_what_is_no_language_model_is_refused(shape, said, tmp_path):
    if shape:
        (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match=said):
        FakePolicy(configuration(str(tmp_path)))
