"""The plan of a run as tables, for a person who is about to pay for the GPU, or to do without.

A GPU's time rests on one assumption, the share of its peak that is reached, and says so; a CPU's on
a rate that is measured.
"""

import math
from collections.abc import Iterator

import torch

from dpo.config import Config
from dpo.data.order import Order
from dpo.plan.fake import FakePolicy
from dpo.plan.fit import (
    MOST_TOKENS,
    SAVINGS,
    SHARE,
    Fit,
    bytes_per_token,
    choose_base,
    memory_parts,
    plan_fit,
)
from dpo.plan.flops import Costs, Work, costs
from dpo.plan.gpus import EMULATED, Gpu
from dpo.plan.plan import Sample, disk_parts, duration, mean_work, order_of
from dpo.table import Cells, Table

ALLOWANCE_GIB = 2.0  # CUDA's context, the driver's and ECC's share, the allocator's gaps


def plan_tables(config: Config, gpu: Gpu, sample: Sample, *, mfu: float) -> Iterator[Table]:
    """Lengths; memory; FLOPs and time, at the share `mfu` of the GPU's peak; disk."""
    order = order_of(config, sample)
    fake = FakePolicy(config)
    yield _lengths_table(sample)
    memory = (gpu.memory_gib - _allowance_gib(gpu)) * 2**30
    dequantized, reason = choose_base(config, memory, sample.pairs, fake)
    parts = memory_parts(fake, config, dequantized=dequantized)
    left = memory - sum(parts.values())
    fit = plan_fit(fake, config, left, sample.pairs, gpu.type)
    model_costs, pair = costs(fake.policy.model), mean_work(fake, sample, fit)
    at_once = min(fit.tokens, math.ceil(order.pairs_per_step * sample.mean(sample.tokens)))
    verdict = [*([reason] if reason else []), *_verdict(config, gpu, fake, sample, left, fit)]
    yield _memory_table(gpu, parts, at_once, at_once * fit.bytes_per_token, verdict)
    rate, notes = gpu.tflops * 1e12 * mfu, [*_time_notes(gpu, fake, mfu)]
    yield _costs_table(config, model_costs, pair, order, rate, notes)
    yield _disk_table(disk_parts(config, fake, sample, order))


def _lengths_table(sample: Sample) -> Table:
    def row(name: str, numbers: list[int]) -> Cells:
        return name, f"{sum(numbers) / len(numbers):.1f}", str(max(numbers))

    pairs = sample.pairs
    rows: list[Cells] = [
        (f"tokens of a pair, {sample.origin}", "mean", "longest"),
        row("prompt", [len(pair.prompt_ids) for pair in pairs]),
        row("chosen", [len(pair.chosen_ids) for pair in pairs]),
        row("rejected", [len(pair.rejected_ids) for pair in pairs]),
        row("computed, shared tokens once", sample.tokens),
        row("scored", [pair.num_scored_tokens for pair in pairs]),
    ]
    return Table(rows)


def _memory_table(
    gpu: Gpu, parts: dict[str, int], tokens: int, activations: float, verdict: list[str]
) -> Table:
    """`tokens`: those of a micro-batch, which are the budget, or all of a step if it has fewer."""
    allowance = _allowance_gib(gpu)
    everything = allowance * 2**30 + sum(parts.values()) + activations
    rows: list[Cells] = [("memory", "GiB"), *((part, _gib(size)) for part, size in parts.items())]
    rows.append((f"activations of {tokens} tokens, and the head's tile", _gib(activations)))
    if allowance:
        rows.append(("context and fragmentation (allowance, not measured)", f"{allowance:.2f}"))
    has = "free on this CPU" if gpu.type == "cpu" else "the GPU has"
    rows += [("sum", _gib(everything)), (has, f"{gpu.memory_gib:.2f}")]
    return Table(rows, notes=verdict)


def _verdict(
    config: Config, gpu: Gpu, fake: FakePolicy, sample: Sample, left: float, fit: Fit
) -> Iterator[str]:
    """What fits, in sentences. Read it last: it may change what `fake` checkpoints."""
    if left <= 0:
        yield f"DOES NOT FIT: {_gib(-left)} GiB are missing before the first token."
        return
    per_token = f"{fit.bytes_per_token / 2**20:.3g} MiB"
    yield f"A token takes {per_token} with {fit.saving}; {_gib(left)} GiB are left."
    is_auto = config.train.tokens_per_microbatch == "auto"
    how = (
        f"auto: {SHARE} of what is left, at most {MOST_TOKENS[gpu.type]}"
        if is_auto
        else "as configured"
    )
    yield f"Token budget of a micro-batch: {fit.tokens} ({how})."
    most = int(left / fit.bytes_per_token)
    if fit.tokens > most:
        yield f"DOES NOT FIT: {most} tokens would. Set train.tokens_per_microbatch to auto."
    longest = {
        "The longest of these pairs": max(sample.tokens),
        "The longest that data.max_length allows": 2 * config.data.max_length - 3,
    }
    for name, tokens in longest.items():
        yield f"{name} has {tokens} tokens and {'fits' if tokens <= most else 'DOES NOT FIT'}."
    if max(longest.values()) > most and fit.saving != SAVINGS[-1]:
        SAVINGS[-1].apply(fake.scorer)
        most = int(left / bytes_per_token(fake, sample.pairs))
        yield f"With {SAVINGS[-1]} a pair of up to {most} tokens fits."


def _costs_table(
    config: Config,
    model_costs: Costs,
    pair: Work,
    order: Order,
    rate: float,
    notes: list[str],
) -> Table:
    """FLOPs of a pair by part, of a step and of the run, with the reference live and cached."""
    live, cached = (model_costs.flops(pair, live_reference=is_live) for is_live in (True, False))
    if config.reference_mode == "zero":
        live = cached
    pairs, steps = order.pairs_per_step, order.num_steps
    rows: list[Cells] = [("FLOPs", "reference each step", "reference cached")]
    for name, part in (
        ("policy forward, a pair", "forward"),
        ("policy backward", "backward"),
        ("computed again: checkpointing", "recomputed"),
        ("head of the policy", "head"),
        ("reference", "reference"),
        ("a pair", "total"),
    ):
        rows.append((name, *(_flops(getattr(flops, part)) for flops in (live, cached))))
    totals = (live.total, cached.total)
    for name, number in ((f"a step of {pairs} pairs", pairs), (f"{steps} steps", pairs * steps)):
        rows.append((name, *(_flops(total * number) for total in totals)))
    for name, number in (("time of a step", pairs), ("time of the run", pairs * steps)):
        rows.append((name, *(duration(total * number / rate) for total in totals)))
    return Table(rows, notes=notes)


def _time_notes(gpu: Gpu, fake: FakePolicy, mfu: float) -> Iterator[str]:
    """What the time rests on."""
    left_out = "Not in it: loading, tokenising, evaluation."
    if gpu.type == "cpu":
        yield (
            f"Time is that of the matrix products alone, at {mfu:.0%} (--mfu) of "
            f"{1000 * gpu.tflops:.3g} GFLOP/s, this CPU's rate as measured now. {left_out}"
        )
        return
    yield (
        f"Time assumes {mfu:.0%} of {gpu.tflops:g} TFLOP/s (--mfu): an assumption, not measured. "
        f"{left_out}"
    )
    if fake.base.dtype == torch.bfloat16 and not gpu.has_bfloat16:
        yield f"The time is float16's: {EMULATED}."


def _allowance_gib(gpu: Gpu) -> float:
    """On a CPU, what is free is what is left to a process that has loaded all its code."""
    return 0.0 if gpu.type == "cpu" else ALLOWANCE_GIB


def _disk_table(parts: dict[str, int]) -> Table:
    return Table([("disk", ""), *((name, _size(size)) for name, size in parts.items())])


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f}"


def _size(size: int | float) -> str:
    unit, name = next((u for u in _UNITS if size >= u[0]), _UNITS[-1])
    return f"{size / unit:.3g} {name}"


_UNITS = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")]


def _flops(number: float) -> str:
    """The number with a unit that leaves up to three digits before the point."""
    if not number:
        return "-"
    unit, name = next((u for u in _FLOP_UNITS if number >= u[0]), _FLOP_UNITS[-1])
    return f"{number / unit:.2f} {name}"


_FLOP_UNITS = [(1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")]
