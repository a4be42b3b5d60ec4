"""Lean layers are PEFT's and transformers' own, in values and gradients, and keep less."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo.data.stream import build_stream
from dpo.model import attention, kernels
from dpo.model.lean import make_lean
from dpo.model.load import Policy, load_policy
from dpo.model.reference import adapter_off
from dpo.model.scorer import Scorer
from tests.flops import counted_flops
from tests.model.test_load import config as load_config
from tests.model.test_scorer import PAIRS, gradients
from tests.models import FAMILIES, pefts_dropout_is_ours, tiny, with_lora


def score_both(own, lean, *, layout="auto", seed=5):
    """Log-probs and gradients of a model as it was and with lean layers, with the same masks."""
    results = []
    for model in (own, lean):
        scorer = Scorer(model, layout)
        torch.manual_seed(seed)  # of dropout
        with pefts_dropout_is_ours():
            logps = scorer(build_stream(PAIRS))
            results.append((logps.detach(), gradients(model, logps)))
    return results


def assert_same(own, lean, *, values=1e-5, grads=1e-5):
    (logps, expected), (lean_logps, got) = own, lean
    assert (logps - lean_logps).abs().max() <= values
    assert got.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    assert largest > 0
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        assert (got[name] - expected[name]).abs().max() <= grads * largest, name


def made_lean(model):
    """A lean copy; and that something in it was made lean."""
    lean = copy.deepcopy(model)
    assert " none" not in make_lean(lean)
    return lean


# ------------------------------------------------------------------------ against what was there


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lean_layers_are_pefts_in_values_and_gradients(family, dropout, checkpointing):
    """With LoRA's dropout too, drawn by the same generator in the same order."""
    model = with_lora(tiny(family), dropout=dropout).train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    assert_same(*score_both(model, made_lean(model)))


def test_in_padded_rows_too():
    model = with_lora(tiny(), dropout=0.3).train()
    assert_same(*score_both(model, made_lean(model), layout="padded"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_lean_layers_serve_full_fine_tuning(family):
    model = tiny(family).train()
    assert_same(*score_both(model, made_lean(model)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_lean_layers_on_a_4_bit_base(quantization, dtype):
    """In bfloat16 PEFT computes the update in fp32 and ours in bfloat16: within its rounding."""
    own, lean = (
        load_policy_of(quantization, dtype, lean_layers=is_lean) for is_lean in (False, True)
    )
    for model in (own, lean):
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    bounds = (
        {"values": 1e-5, "grads": 1e-5} if dtype == "float32" else {"values": 0.2, "grads": 0.1}
    )
    assert_same(*score_both(own, lean), **bounds)


def load_policy_of(quantization, dtype, **keys):
    settings = load_config(quantization=quantization, dtype=dtype)
    for key, value in keys.items():
        setattr(settings.model, key, value)
    return load_policy(settings, "cpu").model


def test_a_bfloat16_adapter_is_as_near_to_the_truth_as_pefts():
    """Against the same weights in float64; nearer than twice PEFT's distance."""
    model = with_lora(tiny(hidden_size=64, intermediate_size=160), r=8)
    truth = Scorer(copy.deepcopy(model).double())
    half = model.to(torch.bfloat16)
    for parameter in half.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as PEFT keeps adapters over half precision
    own, lean = score_both(half, made_lean(half))
    exact = gradients(truth.model, truth(build_stream(PAIRS)))

    def distance(grads):
        both = [(grads[n].double() - exact[n]).pow(2).sum() for n in exact]
        return (sum(both) / sum(g.pow(2).sum() for g in exact.values())).sqrt()

    assert distance(lean[1]) < 2 * distance(own[1]) < 0.2


# ------------------------------------------------------------------------------------- dropout


def test_the_gradient_check_fails_where_dropout_is_drawn_anew(monkeypatch):
    """The negative control of the equality with PEFT under dropout."""
    model = with_lora(tiny(), dropout=0.3).train()
    lean = made_lean(model)
    monkeypatch.setattr(kernels, "_dropout_again", lambda h, rate, state: kernels.dropout(h, rate))
    with pytest.raises(AssertionError):
        assert_same(*score_both(model, lean))


def test_the_generator_is_left_as_dropout_in_the_forward_left_it():
    """A backward that draws again must not change what the next forward draws."""
    model = make_and_return(with_lora(tiny(), dropout=0.3).train())
    logps = Scorer(model)(build_stream(PAIRS))
    state = torch.get_rng_state()
    logps.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def make_and_return(model):
    make_lean(model)
    return model


# ----------------------------------------------------------------------------- what stays itself


def test_an_adapter_that_is_off_or_zero_leaves_the_base_to_the_bit():
    base, model = tiny(), make_and_return(with_lora(tiny(), zero=True))
    stream = build_stream(PAIRS)
    with torch.no_grad():
        expected = Scorer(base)(stream)
        assert torch.equal(Scorer(model)(stream), expected)
        nn.init.ones_(model.base_model.model.model.layers[0].mlp.down_proj.lora_B.default.weight)
        assert not torch.equal(Scorer(model)(stream), expected)
        with adapter_off(Policy(model)):
            assert torch.equal(Scorer(model)(stream), expected)


def test_names_files_and_merges_are_unchanged(tmp_path):
    own = with_lora(tiny())
    lean = made_lean(own)
    assert own.state_dict().keys() == lean.state_dict().keys()
    lean.save_pretrained(tmp_path / "lean")
    own.save_pretrained(tmp_path / "own")
    files = [
        (tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("lean", "own")
    ]
    assert files[0] == files[1]
    ids = torch.tensor([PAIRS[0][0]])
    merged, expected = lean.merge_and_unload(), own.merge_and_unload()
    assert torch.equal(merged(ids).logits, expected(ids).logits)


def test_a_lean_model_generates_what_it_did():
    own = with_lora(tiny()).eval()
    lean = made_lean(own)
    ids = torch.tensor([PAIRS[0][0]])
    answers = [m.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for m in (own, lean)]
    assert answers[0].tolist() == answers[1].tolist()


def test_two_active_adapters_are_left_to_peft():
    own = with_lora(tiny())
    own.add_adapter("second", own.peft_config["default"])
    own.base_model.set_adapter(["default", "second"])
    lean = copy.deepcopy(own)
    make_lean(lean)
    with torch.no_grad():
        assert torch.equal(Scorer(own)(build_stream(PAIRS)), Scorer(lean)(build_stream(PAIRS)))


def test_a_deep_copy_of_a_lean_model_uses_its_own_weights():
    model = make_and_return(tiny())
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    ids = torch.tensor([PAIRS[0][0]])
    assert torch.equal(copied(ids).logits, tiny()(ids).logits)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: with_lora(tiny("phi3")), "8 LoRA products, 5 norms; as they are: 2 Phi3MLP"),
        (lambda: with_lora(tiny("gemma")), "as they are: 5 GemmaRMSNorm"),
        (lambda: with_lora(tiny("cohere")), "as they are: 3 CohereLayerNorm"),
        (lambda: dora(), "lean layers: 5 norms; as they are: 14 Linear, 2 LlamaMLP"),
    ],
    ids=["phi3", "gemma", "cohere", "dora"],
)
def test_layers_of_another_kind_stay_as_they_are_and_are_named(model, said):
    assert said in make_lean(model())


def dora():
    import peft

    settings = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    return peft.get_peft_model(tiny(), settings)


def test_a_layer_that_only_looks_alike_is_not_taken():
    """The negative control of the probe: the same parts, another formula."""

    class OddRMSNorm(type(tiny().model.norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    class OddMLP(type(tiny().model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x) + x

    model = tiny()
    model.model.norm.__class__ = OddRMSNorm
    model.model.layers[1].mlp.__class__ = OddMLP
    said = make_lean(model)
    assert "1 OddRMSNorm" in said
    assert "1 OddMLP" in said


# ------------------------------------------------------------------------------------- the gates


@pytest.fixture
def kept_by(tmp_path, monkeypatch):
    """KiB that a layer of Mistral-7B keeps of a token."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import layers

    def count(*, lean, dropout=0.0, autocast=False):
        fake = layers.fake_policy(tmp_path, lean=lean, dropout=dropout)
        return layers.saved_per_token(fake, autocast=autocast) / 1024

    return count


def test_the_gate_a_layer_of_mistral_7b_keeps_at_most_105_kib_a_token(kept_by):
    """x, q, k, v, o, x, gate, up: 8 + 8 + 2 + 2 + 8 + 8 + 28 + 28 KiB.

    That is 92. o is there twice (8), the keys that `rejected` shares again (2 or 3), then r
    numbers a product and the positions. PEFT's layers under autocast keep 216.
    """
    assert 92 < kept_by(lean=True) <= 105
    assert kept_by(lean=False, autocast=True) > 200  # so the gate can fail


@pytest.mark.parametrize(("are_grouped", "kib"), [(True, 94.4), (False, 110.9)])
def test_the_gate_a_layer_keeps_less_on_a_gpu(kept_by, monkeypatch, are_grouped, kib):
    """One call for all segments: o is kept once, the shared keys again. Were keys and values
    repeated to all heads, it were 16.5 KiB more."""
    monkeypatch.setattr(attention, "serves_varlen", lambda query, value: True)
    monkeypatch.setattr(attention, "takes_grouped_heads", lambda device: are_grouped)
    assert kept_by(lean=True, dropout=0.05) == pytest.approx(kib, abs=0.1)


def test_dropout_keeps_nothing_more(kept_by):
    assert kept_by(lean=True, dropout=0.05) == kept_by(lean=True)
    assert kept_by(lean=False, dropout=0.05) > 1.4 * kept_by(lean=False)


def test_the_gate_lean_layers_compute_no_product_more():
    model = with_lora(tiny(), dropout=0.3).train()

    def step(model):
        Scorer(model)(build_stream(PAIRS)).sum().backward()

    own, lean = (counted_flops(lambda m=m: step(m)) for m in (model, made_lean(model)))
    assert lean == own > 0
