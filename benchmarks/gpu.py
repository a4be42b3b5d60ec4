"""What can only be measured on a GPU, in one command and at most eight minutes.

    python benchmarks/gpu.py --output benchmarks/results/gpu.md

Kernels against slow truths; bytes kept; TFLOP/s beside the rate of a plain product measured in the
same minute; where the time of a step goes; and the article's recipe on a model of Mistral-7B's
shape with random weights, beside TRL where it is installed. Sections are independent: one that
fails, or that no time is left for, is named so in its row and the others stand. `--self_test` runs
all of it on a CPU, in small: its numbers mean nothing. Without a GPU nothing is measured.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bitsandbytes
import common
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig, MistralForCausalLM

from dpo.config import Config
from dpo.data.stream import Stream, build_stream
from dpo.model import attention
from dpo.model.costs import costs, work
from dpo.model.load import Policy, build_policy, compile_layers
from dpo.model.memory import PeakBytes
from dpo.model.reference import adapter_off
from dpo.model.scorer import Scorer
from dpo.train.optim import build_optimizer

Row = tuple[str, str]
MINUTES = 7.5
ARTICLE_PAIRS = 3200  # 200 steps of 16


@dataclass(frozen=True)
class Setup:
    """A device, and a model that suits it.

    Attributes:
        shape: of a layer and the vocabulary.
        few_layers: enough to see how fast layers are; all are alike.
        layers: of the whole model.
        budgets: tokens of a micro-batch.
        pairs: of the recipe, warm-up not included.
        scale: of all lengths.
        product: rows and columns of the plain product.
    """

    device: torch.device
    shape: dict[str, int]
    few_layers: int
    layers: int
    budgets: tuple[int, ...]
    pairs: int
    scale: float
    product: int

    @property
    def is_gpu(self) -> bool:
        """Else it is the self-test."""
        return self.device.type == "cuda"


GPU = Setup(
    device=torch.device("cuda"),
    shape={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    few_layers=8,
    layers=32,
    budgets=(2048, 4096, 8192, 16384),
    pairs=32,
    scale=1.0,
    product=8192,
)
SELF_TEST = Setup(
    device=torch.device("cpu"),
    shape={
        "vocab_size": common.VOCAB,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    few_layers=2,
    layers=2,
    budgets=(64, 128),
    pairs=16,
    scale=0.03,
    product=128,
)


# ------------------------------------------------------------------------------ what is measured


def seconds(setup: Setup, work: Callable[[], object], times: int = 3) -> float:
    """Median of several runs after one that does not count; the device has finished each."""

    def wait() -> None:
        if setup.is_gpu:
            torch.cuda.synchronize()

    taken = []
    for _ in range(times + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def product_tflops(setup: Setup) -> float:
    """Of a plain product of two bfloat16 matrices: what the device really reaches."""
    n = setup.product
    left, right = (torch.randn(n, n, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(setup, lambda: left @ right, times=20) / 1e12


def shape_of(setup: Setup, layers: int) -> MistralConfig:
    """The configuration of a model with so many layers."""
    return MistralConfig(
        **setup.shape,  # type: ignore[arg-type]
        num_hidden_layers=layers,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        dtype="bfloat16",
    )


def random_base(setup: Setup, layers: int) -> MistralForCausalLM:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    shape = shape_of(setup, layers)
    with torch.device(setup.device):
        base = MistralForCausalLM._from_config(shape, dtype=torch.bfloat16)
    return base.train()


def to_nf4(base: nn.Module) -> None:
    """Every linear layer but the head in 4 bits, as bitsandbytes does on loading."""
    for parent in [*base.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is nn.Linear and name != "lm_head":
                quantised = bitsandbytes.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                quantised.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4"
                )
                setattr(parent, name, quantised.to(layer.weight.device))


def make_policy(
    setup: Setup, layers: int, *, lean: bool = True, nf4: bool = False, compiled: bool = False
) -> Policy:
    """The article's adapter on a random base."""
    config = Config()
    config.model.name_or_path = "random"
    config.model.lean_layers = lean
    base = random_base(setup, layers)
    if nf4:
        to_nf4(base)
    policy = build_policy(base, config)
    policy.model.to(setup.device)
    if compiled:
        compile_layers(base, setup.device)
    return policy


def make_streams(setup: Setup, budget: int, count: int = 1) -> list[Stream]:
    """Streams of random pairs with real lengths, each of at most about `budget` tokens."""
    draw, vocab = random.Random(0), setup.shape["vocab_size"]
    lengths = iter(common.draw_lengths(142, setup.scale) * 4)
    streams = []
    for _ in range(count):
        pairs: list[tuple[list[int], ...]] = []
        tokens = 0
        while not pairs or tokens < 0.95 * budget:
            sizes = next(lengths)
            if pairs and tokens + sum(sizes) - 2 > budget:
                continue
            pairs.append(tuple([draw.randrange(3, vocab) for _ in range(n)] for n in sizes))
            tokens += sum(sizes) - 2
        streams.append(build_stream(pairs).to(setup.device))  # type: ignore[arg-type]
    return streams


def score_both(policy: Policy, scorer: Scorer, stream: Stream) -> Tensor:
    """A micro-batch as in training: policy and reference, forward and backward."""
    logps = scorer(stream)
    with torch.no_grad(), adapter_off(policy):
        reference = scorer(stream)
    (logps - reference).sum().backward()
    return logps.detach()


def achieved_tflops(setup: Setup, policy: Policy, budget: int) -> float:
    """FLOPs of the method, over the time that they took."""
    scorer = Scorer(policy.model)
    (stream,) = make_streams(setup, budget)
    flops = costs(policy.model).flops(work(stream.segments, len(stream.targets))).useful
    return flops / seconds(setup, lambda: score_both(policy, scorer, stream)) / 1e12


# ----------------------------------------------------------------------------------- the sections


def attention_rows(setup: Setup) -> Iterator[Row]:
    """One call of varlen attention against fp32 SDPA on the same rounded numbers."""
    (stream,) = make_streams(setup, setup.budgets[0])
    heads = setup.shape["num_attention_heads"], *(setup.shape["num_key_value_heads"],) * 2
    states = [
        torch.randn(1, h, len(stream.input_ids), 64, device=setup.device, dtype=torch.bfloat16)
        for h in heads
    ]
    layout = attention.Layout(stream.segments, setup.device)
    serves = attention.serves_varlen(states[0], states[2])
    yield "varlen_attn serves this device", str(serves)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [s.to(dtype).requires_grad_() for s in states]
        if serves and dtype == torch.bfloat16:
            out = attention._in_one_call(*inputs, layout, 0.125, None)
        else:
            out = attention._by_segment(*inputs, layout, 0.125, None, 0.0)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        results.append([out, *grads])
    for name, half, exact in zip(("values", "dq", "dk", "dv"), *results, strict=True):
        worst = (half.float() - exact).abs().max() / exact.abs().max()
        yield f"attention in bfloat16, {name}: worst error / largest", f"{worst.item():.1e}"


def layout_rows(setup: Setup) -> Iterator[Row]:
    """Both layouts in bfloat16; and the reference in other company, which moves it as much."""
    policy = make_policy(setup, setup.few_layers)
    policy.model.eval()
    shared, padded = Scorer(policy.model, "shared"), Scorer(policy.model, "padded")
    (stream,) = make_streams(setup, setup.budgets[0])
    with torch.no_grad():
        expected = shared(stream)
        with adapter_off(policy):
            alone = [shared(build_stream([pair]).to(setup.device)) for pair in stream.pairs]
            others = {
                "shared against padded rows": padded(stream),
                "policy against its reference, one micro-batch": shared(stream),
                "policy against its reference, pair by pair": torch.cat(alone),
            }
    for name, logps in others.items():
        difference = (logps - expected).abs()
        mean, worst = difference.mean().item(), difference.max().item()
        yield f"{name}: nats a token, mean (worst)", f"{mean:.1e} ({worst:.1e})"


def kept_rows(setup: Setup) -> Iterator[Row]:
    """Bytes that are there after a forward: of two models, whose layers alone differ in number."""
    (stream,) = make_streams(setup, setup.budgets[0])
    few = max(1, setup.few_layers // 2)
    for name, lean in (("lean", True), ("PEFT's", False)):
        sizes = []
        for layers in (few, 2 * few):
            scorer = Scorer(make_policy(setup, layers, lean=lean).model)
            scorer(stream)  # what is made once
            if setup.is_gpu:
                before = torch.cuda.memory_allocated()
                logps = scorer(stream)
                sizes.append(torch.cuda.memory_allocated() - before)
            else:
                with PeakBytes() as count:
                    logps = scorer(stream)
                    sizes.append(count.live)
            del logps, scorer
        kept = (sizes[1] - sizes[0]) / few / len(stream.input_ids) / 1024
        yield f"kept by {name} layers, KiB per token and layer", f"{kept:.1f}"


def budget_rows(setup: Setup, rate: float) -> Iterator[Row]:
    """How the size of a micro-batch decides the speed."""
    policy = make_policy(setup, setup.few_layers)
    for budget in setup.budgets:
        tflops = achieved_tflops(setup, policy, budget)
        yield f"micro-batches of {budget} tokens: TFLOP/s (of the product's)", share(tflops, rate)


def variant_rows(setup: Setup, rate: float) -> Iterator[Row]:
    """One thing other than in the rows before, at half the largest budget."""
    budget = setup.budgets[-2]
    variants: dict[str, dict[str, bool]] = {
        "PEFT's layers": {"lean": False},
        "NF4, dequantised in every pass": {"nf4": True},
        "compiled regions": {"compiled": True},
    }
    for name, keys in variants.items():
        policy = make_policy(setup, setup.few_layers, **keys)
        tflops = achieved_tflops(setup, policy, budget)
        yield f"{budget} tokens, {name}: TFLOP/s", share(tflops, rate)
        del policy


KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "aten::addmm", "mkldnn"),
}


def timeline_rows(setup: Setup) -> Iterator[Row]:
    """Where the time of one optimizer step goes, by the names of kernels."""
    policy = make_policy(setup, setup.few_layers)
    scorer, budget = Scorer(policy.model), setup.budgets[-2]
    streams = make_streams(setup, budget, count=2)
    optimizer = build_optimizer(policy.model, Config().optim)

    def step() -> None:
        for stream in streams:
            score_both(policy, scorer, stream)
        optimizer.step()
        optimizer.zero_grad()

    whole = seconds(setup, step)
    activity = ProfilerActivity.CUDA if setup.is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        step()
        if setup.is_gpu:
            torch.cuda.synchronize()
    times = {"GEMM": 0.0, "attention": 0.0, "element-wise and the rest": 0.0}
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), None)
        own = event.self_device_time_total if setup.is_gpu else event.self_cpu_time_total
        times[kind or "element-wise and the rest"] += own / 1e6
    for kind, spent in times.items():
        yield f"a step of {2 * budget} tokens: {kind}", f"{spent / whole:.0%}"
    yield f"a step of {2 * budget} tokens: idle", f"{max(0.0, 1 - sum(times.values()) / whole):.0%}"


def recipe_rows(setup: Setup, left: Callable[[], float]) -> Iterator[Row]:
    """A few steps of the article's recipe, each side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        common.set_environment(torch.get_num_threads(), Path(folder))
        task = common.Task(Path(folder), common.draw_lengths(setup.pairs, setup.scale))
        task.write(1)  # the tokenizer and the rows; then the model itself
        random_base(setup, setup.layers).save_pretrained(task.folder / "model")
        if setup.is_gpu:
            torch.cuda.empty_cache()
        keys = {
            "optim__name": "paged_adamw_32bit",
            "lora__dropout": 0.05,
            "model__dtype": "bfloat16",
        }
        nf4 = {**keys, "model__quantization": "nf4"}
        ours = partial(common.measure, with_peak, task, common.run_ours)
        sides: dict[str, Callable[[], dict[str, Any]]] = {
            "ours": partial(ours, **nf4, reference__cache="off"),
            "ours, 4 bits kept": partial(
                ours, **nf4, reference__cache="off", model__dequantize_base=False
            ),
            "ours, reference cached": partial(
                common.measure, with_peak, task, common.run_cached, **nf4
            ),
        }
        if find_spec("trl") and setup.is_gpu:
            from compare_trl import TRL_SIDES, run_trl

            for name, options in TRL_SIDES.items():
                sides[name] = partial(
                    common.measure, with_peak, task, run_trl, on_gpu=True, **options
                )
        speeds: dict[str, float] = {}
        for name, side in sides.items():
            if left() < 45:
                yield f"recipe, {name}", "not measured (no time left)"
                continue
            result = side()
            speed = speeds[name] = len(task.lengths) / result["wall"]
            yield (
                f"recipe, {name}: pairs/s; minutes for {ARTICLE_PAIRS} pairs (extrapolated); GiB",
                f"{speed:.3g}; {ARTICLE_PAIRS / speed / 60:.3g}; {result['peak_gib']:.3g}",
            )
        for name, speed in speeds.items():
            if name.startswith("TRL"):
                yield f"ours against {name}", f"{speeds['ours'] / speed:.2f} x"


def with_peak(
    race: common.Race, task: common.Task, run: common.Side, **keys: Any
) -> dict[str, Any]:
    """What `run` measures, and the memory of the GPU that it took."""
    result = run(race, task, **keys)
    return {**result, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


# ------------------------------------------------------------------------------------ the report


def share(tflops: float, rate: float) -> str:
    """A speed, and what part of a plain product's it is."""
    return f"{tflops:.3g} ({tflops / rate:.0%})"


@contextmanager
def collected(rows: list[Row], name: str) -> Iterator[None]:
    """A section that fails says so in a row; the others go on."""
    try:
        yield
    except (Exception, SystemExit) as error:  # the latter: of a process that failed
        words = str(error).strip().splitlines()
        rows.append((f"{name}: FAILED", f"{type(error).__name__}: {words[0] if words else ''}"))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(setup: Setup) -> list[Row]:
    """All sections, one after the other, as far as there is time."""
    began = time.monotonic()

    def left() -> float:
        return MINUTES * 60 - (time.monotonic() - began)

    rows: list[Row] = []
    rate = product_tflops(setup)
    rows.append((f"product of {setup.product} x {setup.product}, bfloat16: TFLOP/s", f"{rate:.3g}"))
    sections: dict[str, Callable[[], Iterator[Row]]] = {
        "attention": partial(attention_rows, setup),
        "layouts": partial(layout_rows, setup),
        "kept bytes": partial(kept_rows, setup),
        "budgets": partial(budget_rows, setup, rate),
        "timeline": partial(timeline_rows, setup),
        "recipe": partial(recipe_rows, setup, left),
        "variants": partial(variant_rows, setup, rate),
    }
    for name, section in sections.items():
        if left() < 30:
            rows.append((name, "not measured (no time left)"))
            continue
        with collected(rows, name):
            for row in section():
                rows.append(row)
                print(": ".join(row), flush=True)
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    """Measures, reports; without a GPU it says that nothing was measured."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--self_test", action="store_true", help="in small, on a CPU")
    flags.add_argument("--output", type=Path, help="write the report there too")
    args = flags.parse_args(argv)
    if not args.self_test and not torch.cuda.is_available():
        common.publish("not measured", args.output)
        return []
    setup = SELF_TEST if args.self_test else GPU
    rows = measure(setup)
    device = torch.cuda.get_device_name() if setup.is_gpu else "a CPU (self-test: no measurement)"
    packages = ["torch", "transformers", "peft", "bitsandbytes"]
    report = f"""# On a GPU

{device}; {common.provenance(torch.get_num_threads(), packages)}

{common.table(["what", "measured"], rows)}

Mistral-7B's shape, random weights, LoRA r 16 with dropout 0.05 on all linear layers, bfloat16,
pairs with the lengths of `orca_lengths.json`. {setup.few_layers} layers, but for the recipe:
{setup.layers}, in steps of {common.PAIRS_PER_STEP} pairs on a 4-bit base. TFLOP/s: of what the
method asks for (dpo.model.costs), reference included.
"""
    common.publish(report, args.output)
    return rows


if __name__ == "__main__":
    main()
