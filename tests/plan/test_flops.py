"""The formulas against a count of every product that a real step computes, and the FLOPs gate."""

import json
from pathlib import Path

import pytest
import torch

from dpo.config import Config
from dpo.data.stream import Segment, build_stream
from dpo.model.load import Policy
from dpo.model.reference import build_reference, choose_mode
from dpo.model.scorer import Scorer
from dpo.plan.fake import FakePolicy
from dpo.plan.flops import FLASH_BACKWARD, Costs, Work, costs, work
from dpo.plan.gpus import GPUS, find_gpu, nearest_gpus, peak_tflops
from tests.flops import counted_flops
from tests.models import tiny, with_lora

LENGTHS = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "orca_lengths.json").read_text(encoding="utf-8")
)["tokens"]
# Eight layers: what the formulas leave out, the first layer's gradient to its frozen embeddings,
# is then 0.5 % of a step. A pair with a long prompt and one with a long answer.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
}
PAIRS = [([3] * 150, [5] * 80, [6] * 100), ([3] * 60, [5] * 180, [6] * 40)]
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": None,
}


def policy(family="llama", *, lora=True, checkpointing=False, **overrides):
    base = tiny(family, **{**SIZES, **overrides})
    if lora:
        base.requires_grad_(False)
    if checkpointing:
        base.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    return Policy((with_lora(base) if lora else base).train())


def step(scorer, reference, stream):
    """What the trainer computes of a micro-batch."""
    logps = scorer(stream)
    reference(stream)
    logps.sum().backward()


def planned_and_counted(policy, layout="auto", pairs=PAIRS):
    scorer = Scorer(policy.model, layout)
    mode = choose_mode("auto", policy)
    reference = build_reference(mode, policy, scorer, scorer.layout)
    stream = build_stream(pairs)
    planned = costs(policy.model).flops(work(stream.segments, len(stream.targets), scorer.layout))
    return planned.total, counted_flops(lambda: step(scorer, reference, stream))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("phi3", {}),
    ],
    ids=["llama", "tied", "qwen2", "phi3"],
)
def test_the_formulas_give_what_a_step_computes(family, more, lora, checkpointing):
    made = policy(family, lora=lora, checkpointing=checkpointing, **more)
    planned, counted = planned_and_counted(made)
    assert planned == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    ],
)
def test_of_experts_those_count_that_a_token_is_sent_to(family, more):
    planned, counted = planned_and_counted(policy(family, lora=False, head_dim=16, **more))
    assert planned == pytest.approx(counted, rel=0.03)


def test_padded_rows_cost_what_they_compute():
    planned, counted = planned_and_counted(policy(), "padded")
    assert planned == pytest.approx(counted, rel=0.03)


def test_every_part_is_counted_apart():
    """Forward, reference and their heads, one by one, without what only cancels in the sum."""
    made = policy(lora=False)
    scorer, stream = Scorer(made.model), build_stream(PAIRS)
    flops = costs(made.model).flops(work(stream.segments, len(stream.targets)))
    reference = build_reference("frozen", made, scorer, "shared")
    assert flops.reference == pytest.approx(counted_flops(lambda: reference(stream)), rel=1e-3)
    logps = scorer(stream)
    backward = counted_flops(lambda: logps.sum().backward())
    assert flops.backward + flops.head * 3 / 4 == pytest.approx(backward, rel=1e-3)
    assert (flops.recomputed, flops.useful) == (0, flops.total)


def test_a_cached_reference_saves_its_forward():
    its_costs, its_work = costs(policy().model), Work(500, 90_000, 300)
    live, cached = (its_costs.flops(its_work, live_reference=x) for x in (True, False))
    assert live.total - cached.total == live.reference > 0
    assert cached.reference == 0


def test_an_adapter_as_the_reference_costs_its_products():
    """Of a policy that starts from an adapter: its frozen copy runs in the reference."""
    plain = Costs(linear=10.0, adapter=1.0, attention=1.0, head=1.0, trains_base=False)
    adapted = Costs(
        linear=10.0,
        adapter=1.0,
        attention=1.0,
        head=1.0,
        trains_base=False,
        adapter_in_reference=True,
    )
    assert adapted.flops(Work(7, 0, 0)).reference - plain.flops(Work(7, 0, 0)).reference == 7


# ------------------------------------------------------------------- the checks above can fail


def test_a_layout_that_repeats_the_prompt_is_caught():
    """The shared formula over what padded rows compute: more than twice too little."""
    made = policy()
    stream = build_stream(PAIRS)
    shared = costs(made.model).flops(work(stream.segments, len(stream.targets), "shared")).total
    _, counted = planned_and_counted(made, "padded")
    assert shared < 0.75 * counted


def test_a_forgotten_checkpoint_or_a_trained_base_is_caught():
    plain, plain_counted = planned_and_counted(policy())
    _, again = planned_and_counted(policy(checkpointing=True))
    _, full = planned_and_counted(policy(lora=False))
    assert plain == pytest.approx(plain_counted, rel=0.03)
    assert min(again, full) > 1.1 * plain


def test_without_a_formula_attention_on_a_cpu_counts_nothing():
    """Why tests/flops.py exists: PyTorch's own counter reports 0 for it."""
    from torch.utils.flop_counter import FlopCounterMode

    q, k = torch.rand(1, 4, 10, 8), torch.rand(1, 4, 16, 8)

    def attend():
        torch.nn.functional.scaled_dot_product_attention(q, k, k)

    with FlopCounterMode(display=False) as plain:
        attend()
    assert plain.get_total_flops() == 0
    assert counted_flops(attend) == 2 * 2 * 4 * 10 * 16 * 8


# ------------------------------------------------------------------------- worked by hand


def test_work_of_one_pair():
    """Prompt 3, chosen 4, rejected 3: inputs 3 | 3 | 2.

    Shared: 6^2 / 2 of prompt and chosen, 2 x 3 to the prompt, 2^2 / 2 of its own: 26.
    Padded: two rows of 6: 12 tokens, 2 x 6^2 / 2 = 36.
    """
    segments = [Segment(0, 6), Segment(6, 2, ((0, 3),))]
    assert work(segments, 7) == Work(8, 26, 7)
    assert work(segments, 7, "padded") == Work(12, 36, 7)
    assert work([], 0) == work([], 0, "padded") == Work(0, 0, 0)


def floor(costs, prompt, chosen, rejected, *, live_reference=True):
    """The least that a pair costs whose answers do not open alike, without an adapter's own.

    Every token once, no checkpointing; only gradients of activations, as LoRA needs them.
    """
    scores = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
    return (
        costs.linear * (prompt + chosen + rejected - 2) * (2 + live_reference)
        + costs.attention * scores * (1 + FLASH_BACKWARD + live_reference)
        + costs.head * (chosen + rejected) * (2 + live_reference)
    )


def mistral(folder, layers=32):
    """Mistral-7B's shape under LoRA r 16 on all linears, without numbers."""
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B | {"num_hidden_layers": layers}))
    config = Config()
    config.model.name_or_path = str(folder)
    return FakePolicy(config)


def test_the_costs_and_the_floor_of_mistral_7b(tmp_path):
    """Linear: 2 x 32 x (2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336) = 13.96 GF a token.

    LoRA, r 16: 2 x 16 x 32 x 81,920 = 83.9 MF, 81,920 being the sum of in + out over a layer.
    A score: 4 x 32 heads x 128 x 32 layers = 0.524 MF. Head: 2 x 4096 x 32,000 = 0.262 GF.

    The floor at 247/204/204: 653 tokens x 13.96G x 3 = 27.35T;
    Q = 451^2 / 2 + 204 x 247 + 204^2 / 2 = 172,896.5, x 0.524M x 4.5 = 0.408T;
    408 x 0.262G x 3 = 0.321T. Sum: 28.08T.
    """
    its = costs(mistral(tmp_path).policy.model)
    assert its.linear == 13_958_643_712
    assert its.adapter == 83_886_080
    assert its.attention == 524_288
    assert its.head == 262_144_000
    assert floor(its, 247, 204, 204) == pytest.approx(28.08e12, rel=1e-3)
    assert floor(its, 247, 204, 204, live_reference=False) == pytest.approx(18.76e12, rel=1e-3)


@pytest.mark.parametrize("layers", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_the_gate_a_step_of_mistral_7b_stays_within_5_percent_of_the_floor(layers, tmp_path):
    """Every product that eight real pairs cost, over the floor plus three passes of LoRA's own.

    Layers are all alike: with fewer of them only the head, 1 % of the floor, weighs more.
    """
    lengths = LENGTHS[:8]
    pairs = [([n] * lengths[n][0], [10] * lengths[n][1], [11] * lengths[n][2]) for n in range(8)]
    fake = mistral(tmp_path, layers)
    its = costs(fake.policy.model)
    with fake.mode:
        reference = build_reference("adapter", fake.policy, fake.scorer, "shared")
        stream = build_stream(pairs)
        counted = counted_flops(lambda: step(fake.scorer, reference, stream))
    least = sum(floor(its, *pair) for pair in lengths)
    own = 3 * its.adapter * len(stream.input_ids)
    assert 0.95 < counted / (least + own) <= 1.05  # far below: something was not counted
    planned = its.flops(work(stream.segments, len(stream.targets)))
    assert planned.total == pytest.approx(counted, rel=0.03)
    # The gate can fail: padded rows, all as long as the longest, cost more than twice the floor.
    scored = sum(chosen + rejected for _, chosen, rejected in lengths)
    assert its.flops(work(stream.segments, scored, "padded")).total > 2 * least


# ------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_gpus_are_known_as_their_drivers_call_them(reported, name):
    assert find_gpu(reported) is GPUS[name]
    assert peak_tflops(reported) == GPUS[name].tflops


@pytest.mark.parametrize("name", ["", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "A100", "Radeon 9"])
def test_an_unknown_device_and_a_slice_of_one_have_no_peak(name):
    assert find_gpu(name) is None
    assert peak_tflops(name) is None


def test_every_gpu_of_the_table_is_found_by_its_name():
    assert [find_gpu(name) for name in GPUS] == list(GPUS.values())
    assert "A100-80" in nearest_gpus("a100")
