"""What can only be seen on a GPU, section by section; every row is written once it is measured.

    cd benchmarks && python -m gpu.sections NAME ... [--rows rows.jsonl] [--small]

Rounding of kernels against fp32; bytes kept; TFLOP/s beside the rate of a plain product measured
in the same process; what determinism costs; where the time of a step goes. A section that fails
says so in its row, leaves its traceback, and stops no other. `benchmarks/gpu/run.sh` runs them all.
"""

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gpu.device import (
    GPU,
    SMALL,
    Row,
    Setup,
    make_policy,
    make_streams,
    product_tflops,
    score_both,
    seconds,
    useful_flops,
    wait,
    write,
)
from torch.profiler import ProfilerActivity, profile

from dpo.config import Config
from dpo.data.stream import build_stream
from dpo.model import attention
from dpo.model.reference import adapter_off
from dpo.model.scorer import Scorer
from dpo.plan.memory import PeakBytes
from dpo.train.launch import prepare_torch
from dpo.train.optim import build_optimizer


def product(setup: Setup) -> Iterator[Row]:
    """The plain product's speed, of which the shares below are."""
    n = setup.product
    yield Row(f"product of {n} x {n}, bfloat16: TFLOP/s", f"{product_tflops(setup):.3g}")


def rounding(setup: Setup) -> Iterator[Row]:
    """One call of varlen attention against fp32 SDPA on the same rounded numbers, two widths."""
    (stream,) = make_streams(setup, setup.budgets[0])
    segments = attention.Segments(stream.segments, setup.device)
    heads = setup.shape["num_attention_heads"], *(setup.shape["num_key_value_heads"],) * 2
    for width in (64, 128):
        shapes = [(1, h, len(stream.input_ids), width) for h in heads]
        states = [torch.randn(s, device=setup.device, dtype=torch.bfloat16) for s in shapes]
        serves = attention.serves_varlen(states[0], states[2])
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [s.to(dtype).requires_grad_() for s in states]
            if serves and dtype == torch.bfloat16:
                out = attention._in_one_call(*inputs, segments, width**-0.5, None)
            else:
                out = attention._by_segment(*inputs, segments, width**-0.5, None, 0.0)
            grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
            results.append([out, *grads])
        worst = [
            f"{((half.float() - exact).abs().max() / exact.abs().max()).item():.1e}"
            for half, exact in zip(*results, strict=True)
        ]
        kernel = "varlen_attn" if serves else "a call a segment"
        what = f"attention in bfloat16, width {width}: worst error / largest of out, dq, dk, dv"
        yield Row(what, f"{' '.join(worst)} ({kernel})")


def layouts(setup: Setup) -> Iterator[Row]:
    """Both layouts in bfloat16; and the reference in other micro-batches, which differs as much."""
    policy, shared = make_policy(setup, setup.few_layers)
    policy.model.eval()
    padded = Scorer(policy.model, "padded")
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
        yield Row(f"{name}: nats a token, mean (worst)", f"{mean:.1e} ({worst:.1e})")


def repeats(setup: Setup) -> Iterator[Row]:
    """Whether a micro-batch has one gradient, to the bit, and what that costs."""
    policy, scorer = make_policy(setup, setup.few_layers)
    (stream,) = make_streams(setup, setup.budgets[-2])
    trained = [p for p in policy.model.parameters() if p.requires_grad]

    def numbers() -> list[torch.Tensor]:
        policy.model.zero_grad()
        torch.manual_seed(5)  # seeds dropout
        return [score_both(policy, scorer, stream), *(p.grad for p in trained)]  # type: ignore[list-item]

    config = Config()
    for deterministic in (False, True):
        config.train.deterministic = deterministic
        prepare_torch(config)
        try:
            first, *others = (numbers() for _ in range(3))
            taken = seconds(setup, numbers)
        finally:
            torch.use_deterministic_algorithms(False)
        same = [torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)]
        how = "deterministic" if deterministic else "as it is"
        yield Row(f"a micro-batch again, {how}: equal tensors", f"{sum(same) / len(same):.0%}")
        tflops = useful_flops(policy, stream) / taken / 1e12
        what = f"{setup.budgets[-2]} tokens, {how}: TFLOP/s"
        yield Row(what, share(tflops, product_tflops(setup)))


def kept(setup: Setup) -> Iterator[Row]:
    """Bytes that are kept after a forward, from two models that differ only in their layers."""
    (stream,) = make_streams(setup, setup.budgets[0])
    few = max(1, setup.few_layers // 2)
    for name, lean in (("lean", True), ("PEFT's", False)):
        sizes = []
        for layers in (few, 2 * few):
            _, scorer = make_policy(setup, layers, lean=lean)
            scorer(stream)  # warm-up: one-off allocations must not count
            if setup.is_gpu:
                before = torch.cuda.memory_allocated()
                logps = scorer(stream)
                sizes.append(torch.cuda.memory_allocated() - before)
            else:
                with PeakBytes() as count:
                    logps = scorer(stream)
                    sizes.append(count.live)
            del logps, scorer
        a_token = (sizes[1] - sizes[0]) / few / len(stream.input_ids) / 1024
        yield Row(f"kept by {name} layers, KiB per token and layer", f"{a_token:.1f}")


def budgets(setup: Setup) -> Iterator[Row]:
    """How the size of a micro-batch decides the speed; and how long the host takes to launch it."""
    policy, scorer = make_policy(setup, setup.few_layers)
    for budget in setup.budgets:
        (stream,) = make_streams(setup, budget)
        times = []
        for _ in range(4):
            wait(setup)
            began = time.perf_counter()
            score_both(policy, scorer, stream)
            launched = time.perf_counter()
            wait(setup)
            times.append((launched - began, time.perf_counter() - began))
        host, whole = (statistics.median(column) for column in zip(*times[1:], strict=True))
        tflops = useful_flops(policy, stream) / whole / 1e12
        yield Row(
            f"micro-batches of {budget} tokens: TFLOP/s", share(tflops, product_tflops(setup))
        )
        yield Row(f"micro-batches of {budget} tokens: ms of the host", f"{host * 1000:.3g}")


def variants(setup: Setup) -> Iterator[Row]:
    """`budgets` with one thing changed, at half the largest budget."""
    budget = setup.budgets[-2]
    others: dict[str, dict[str, bool]] = {
        "PEFT's layers": {"lean": False},
        "NF4, dequantised in every pass": {"nf4": True},
        "compiled regions": {"compiled": True},
    }
    (stream,) = make_streams(setup, budget)
    for name, keys in others.items():
        policy, scorer = make_policy(setup, setup.few_layers, **keys)
        taken = seconds(setup, partial(score_both, policy, scorer, stream))
        tflops = useful_flops(policy, stream) / taken / 1e12
        yield Row(f"{budget} tokens, {name}: TFLOP/s", share(tflops, product_tflops(setup)))
        del policy, scorer


KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "aten::addmm", "mkldnn"),
}
REST = "element-wise and the rest"


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name under CUDA 12 and 13."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), REST)


def timeline(setup: Setup) -> Iterator[Row]:
    """Where the time of one optimizer step goes, by the names of kernels; the five costliest."""
    policy, scorer = make_policy(setup, setup.few_layers)
    streams = make_streams(setup, setup.budgets[-2], count=2)
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
        wait(setup)
    own = "self_device_time_total" if setup.is_gpu else "self_cpu_time_total"
    spent = {event.key: getattr(event, own) / 1e6 for event in profiler.key_averages()}
    times = dict.fromkeys([*KINDS, REST], 0.0)
    for kernel, taken in spent.items():
        times[kind_of(kernel)] += taken
    times["idle"] = max(0.0, whole - sum(times.values()))
    what = f"a step of {2 * setup.budgets[-2]} tokens"
    for kind, taken in times.items():
        yield Row(f"{what}: {kind}", f"{taken / whole:.0%}")
    costliest = sorted(spent, key=spent.__getitem__, reverse=True)[:5]
    for number, kernel in enumerate(costliest, start=1):
        said = f"{spent[kernel] / whole:.0%} {kernel[:120]} ({kind_of(kernel)})"
        yield Row(f"{what}: costliest kernel {number}", said)


def share(tflops: float, product: float) -> str:
    """A speed, and what part of the plain product's it is."""
    return f"{tflops:.3g} ({tflops / product:.0%} of the product)"


SECTIONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    section.__name__: section
    for section in (product, rounding, layouts, repeats, kept, budgets, timeline, variants)
}


def run_sections(names: list[str], setup: Setup, file: Path | None) -> int:
    """Runs sections; returns how many failed."""
    failures = 0
    for name in names:
        try:
            for row in SECTIONS[name](setup):
                write(file, row, device=setup.name)
        except Exception as error:  # the row says it, the log has the rest, other sections go on
            traceback.print_exc()
            first_line = (str(error).strip() or "no message").splitlines()[0]
            failure = f"FAILED: {type(error).__name__}: {first_line[:200]}"
            write(file, Row(name, failure), device=setup.name)
            failures += 1
        gc.collect()
        if setup.is_gpu:
            torch.cuda.empty_cache()
    return failures


def main(argv: list[str] | None = None) -> int:
    """Measures the sections that are named."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("names", nargs="+", choices=SECTIONS)
    flags.add_argument("--rows", type=Path, help="append the rows to this file")
    flags.add_argument("--small", action="store_true", help="a try on a CPU")
    args = flags.parse_args(argv)
    return run_sections(args.names, SMALL if args.small else GPU, args.rows)


if __name__ == "__main__":
    raise SystemExit(main())
