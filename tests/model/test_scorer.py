"""One truth, three ways: shared stream = padded rows = one answer at a time with full logits."""

import pytest
import torch

from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.model.attention import NAME
from dpo.model.scorer import Scorer
from tests.models import FAMILIES, tiny, with_lora
from tests.oracle import stream_logps

PAIRS = [
    ([1, 5, 9, 12, 30], [7, 8, 9, 2], [7, 8, 30, 31, 32, 33, 2]),  # a common opening of two
    ([1, 5], [40, 2], [41, 42, 43, 2]),
    ([1, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60], [3, 4, 5, 6, 7, 8, 9, 2], [2]),
    ([6], [10, 11, 2], [10, 11, 12, 13, 2]),
]


def gradients(model, logps):
    """Gradients of a sum that weighs every token otherwise, by parameter."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps), device=logps.device)
    (weights * logps).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, logps, expected_logps):
    assert (logps - expected_logps).abs().max() <= 1e-5
    expected, got = gradients(model, expected_logps), gradients(model, logps)
    assert got.keys() == expected.keys()
    assert got
    for name, gradient in expected.items():
        worst = (got[name] - gradient).abs().max()
        assert worst <= 1e-5 * max(g.abs().max() for g in expected.values()), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stream_equals_one_answer_at_a_time_in_values_and_gradients(family, layout, checkpointing):
    model = with_lora(tiny(family)).train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    scorer = Scorer(model, attention=layout)
    assert scorer.layout == layout
    logps = scorer(build_stream(PAIRS))
    assert logps.dtype == torch.float32
    assert_same(model, logps, stream_logps(model, PAIRS))


def test_a_rejected_answer_that_sees_the_chosen_one_is_noticed(monkeypatch):
    """The negative control: one causal segment for the whole pair, as naive packing gives."""
    import torch.nn.functional as F
    from transformers import AttentionInterface

    def leaky(module, query, key, value, attention_mask, *, dpo_segments, scaling=None, **_):
        dpo_segments.num_calls += 1
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    model = tiny()
    expected = stream_logps(model, PAIRS[:1])
    stream = build_stream(PAIRS[:1])
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, leaky)
    logps = Scorer(model)(stream)
    is_rejected = stream.sequence_ids == 1
    assert (logps - expected)[~is_rejected].abs().max() <= 1e-5
    assert (logps - expected)[is_rejected].abs().max() > 1e-2


def test_a_wrong_first_predictor_is_noticed():
    """The negative control: the first rejected token predicted by the end of the chosen answer."""
    from dataclasses import replace

    model = tiny()
    stream = build_stream([PAIRS[1]])
    first_rejected = stream.sequence_ids.tolist().index(1)
    predictors = stream.predictors.clone()
    predictors[first_rejected] = predictors[first_rejected - 1]
    wrong = Scorer(model)(replace(stream, predictors=predictors))
    expected = stream_logps(model, [PAIRS[1]])
    assert (wrong - expected)[first_rejected].abs() > 1e-2


def test_scored_masks_leave_the_other_tokens_out():
    prompt, chosen, rejected = PAIRS[0]
    marks = [False, True, True, False]
    model = tiny()
    logps = Scorer(model)(build_stream([TokenizedPair(prompt, chosen, rejected, marks)]))
    expected = stream_logps(model, [PAIRS[0]])
    keep = torch.tensor([*marks, *[True] * len(rejected)])
    assert (logps - expected[keep]).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_an_empty_stream_gives_no_log_probs_and_a_zero_gradient_to_every_parameter(layout):
    """Under DDP a rank without pairs still reduces every gradient."""
    model = with_lora(tiny())
    logps = Scorer(model, attention=layout)(build_stream([]))
    assert logps.shape == (0,)
    logps.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_keeps_its_own_attention_for_every_other_call(checkpointing):
    """Left-padded generation relies on it: under ours, padding would be attended to."""
    model = tiny("mistral").train()
    if checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    own = model.config._attn_implementation
    assert own != NAME
    Scorer(model)(build_stream(PAIRS)).sum().backward()
    assert model.config._attn_implementation == own
    model.eval()
    padded = torch.tensor([[0, 0, 0, 5, 9, 12], [1, 2, 3, 5, 9, 12]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    batch = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=4)
    alone = model.generate(input_ids=torch.tensor([[5, 9, 12]]), max_new_tokens=4)
    assert batch[0, 6:].tolist() == alone[0, 3:].tolist()


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gemma2", {"head_dim": 8, "sliding_window": 4}, "softcap"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "0 attention calls"),
        ("mamba", {"state_size": 8}, "linear_attention layers"),
    ],
)
def test_models_that_cannot_share_fall_back_to_padded_rows_and_say_why(family, settings, reason):
    model = tiny(family, **settings).eval()
    scorer = Scorer(model)
    assert scorer.layout == "padded"
    assert reason in scorer.layout_reason
    expected = stream_logps(model, PAIRS)
    assert (scorer(build_stream(PAIRS)) - expected).abs().max() <= 1e-5
    with pytest.raises(UserError, match="got shared, but this model cannot"):
        Scorer(model, attention="shared")


def test_a_mixture_of_experts_shares_prompts_too():
    model = tiny("mixtral", num_local_experts=4).eval()
    scorer = Scorer(model)
    assert scorer.layout == "shared"
    assert (scorer(build_stream(PAIRS)) - stream_logps(model, PAIRS)).abs().max() <= 1e-5


def test_a_head_that_we_would_compute_otherwise_is_refused():
    """A family that scales its logits without saying so in its config."""
    model = tiny("granite")
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits / 3
        return output

    model.forward = scaled.__get__(model)
    with pytest.raises(UserError, match="computes other logits"):
        Scorer(model)


def test_an_adapter_on_the_head_is_refused_with_the_reason():
    import peft

    settings = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="lm_head"):
        Scorer(peft.get_peft_model(tiny(), settings))


def test_full_fine_tuning_gives_the_head_its_gradient():
    """Also where the head is tied to the embeddings."""
    for tied in (False, True):
        model = tiny("llama", tie_word_embeddings=tied).train()
        assert_same(model, Scorer(model)(build_stream(PAIRS)), stream_logps(model, PAIRS))


def test_nf4_shared_equals_padded_in_values_and_gradients(tmp_path):
    import transformers

    tiny("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = with_lora(
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
        )
    ).train()
    stream = build_stream(PAIRS)
    shared, padded = (Scorer(model, attention=a)(stream) for a in ("shared", "padded"))
    assert_same(model, shared, padded)


def test_bfloat16_layouts_differ_by_rounding_only():
    """Eight bits of mantissa: a few hundredths of a nat a token here."""
    model = tiny().bfloat16().eval()
    stream = build_stream(PAIRS)
    shared, padded = (Scorer(model, attention=a)(stream) for a in ("shared", "padded"))
    assert shared.dtype == torch.float32
    assert (shared - padded).abs().mean() <= 0.05
