"""The LM head at a large vocabulary: matrix products, memory, time and error, against full logits.

    python benchmarks/head.py --output benchmarks/results/head.md

Memory is measured at full size, in a fresh process, from outside: forward and backward, the saved
J and the gradient of the hidden states included. Full logits do not fit there: they are measured
with fewer tokens, and scaled. Time and error are measured at that smaller size too.
"""

import argparse
import os
import statistics
import time
from typing import Any

import common
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dpo.logps import token_logps

OURS, PLAIN = "tiles and J", "full logits"


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs as most code computes them: all logits, upcast, log-softmax."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


HEADS = {OURS: token_logps, PLAIN: plain_logps}


def make_inputs(
    dtype: torch.dtype, tokens: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and targets; logits have a standard deviation of 3."""
    torch.manual_seed(0)
    weight = torch.empty(args.vocab, args.hidden, dtype=dtype).normal_(std=3 * args.hidden**-0.5)
    hidden = torch.empty(tokens, args.hidden, dtype=dtype).normal_()
    return hidden.requires_grad_(), weight, torch.randint(args.vocab, (tokens,))


def run_head(
    race: common.Race, name: str, dtype: torch.dtype, tokens: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Runs forward and backward; where it runs both twice, the second time counts."""
    inputs = make_inputs(dtype, tokens, args)
    race.wait()
    seconds = 0.0
    for _ in range(2 if tokens == args.few_tokens else 1):
        inputs[0].grad = None
        start = time.perf_counter()
        HEADS[name](*inputs).sum().backward()
        seconds = time.perf_counter() - start
    return {"seconds": seconds}


def run_errors(race: common.Race, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Worst error against float64 on the same inputs: nats, and share of the largest gradient."""
    race.wait()
    hidden, weight, targets = make_inputs(dtype, args.few_tokens, args)
    found = {}
    for name, head in HEADS.items():
        logps = head(hidden, weight, targets)
        found[name] = (logps.detach(), *torch.autograd.grad(logps.sum(), hidden))
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = plain_logps(exact_hidden, weight.double(), targets)
    (gradient,) = torch.autograd.grad(exact.sum(), exact_hidden)
    return {
        name: (
            (logps - exact.detach()).abs().max().item(),
            ((its - gradient).abs().max() / gradient.abs().max()).item(),
        )
        for name, (logps, its) in found.items()
    }


def count_products(name: str, dtype: torch.dtype, *, trains: bool = False) -> str:
    """Products of (tokens, vocab, hidden) in forward and in backward."""
    tokens, vocab, width = 32, 256, 16
    hidden = torch.randn(tokens, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, dtype=dtype).requires_grad_(trains)
    with FlopCounterMode(display=False) as forward:
        logps = HEADS[name](hidden, weight, torch.zeros(tokens, dtype=torch.long))
    with FlopCounterMode(display=False) as backward:
        logps.sum().backward()
    one = 2 * tokens * vocab * width
    return " + ".join(f"{count.get_total_flops() / one:g}" for count in (forward, backward))


def measure_dtype(dtype: torch.dtype, args: argparse.Namespace) -> list[list[str]]:
    """The rows of one type in the table."""
    errors = common.measure(run_errors, dtype, args)
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], PLAIN: []}
    for _ in range(args.rounds):
        for name in runs:
            runs[name].append(common.measure(run_head, name, dtype, args.few_tokens, args))
    seconds = {name: statistics.median(run["seconds"] for run in runs[name]) for name in runs}
    scale = args.tokens / args.few_tokens
    growth = {
        OURS: common.measure(run_head, OURS, dtype, args.tokens, args)["growth"],
        PLAIN: statistics.median(run["growth"] for run in runs[PLAIN]) * scale,
    }
    return [
        [
            f"{name}, {str(dtype).removeprefix('torch.')}",
            count_products(name, dtype),
            count_products(name, dtype, trains=True),
            f"{growth[name] / 2**30:.2f}" + (" (scaled)" if name == PLAIN else ""),
            f"{seconds[name] / seconds[PLAIN]:.2f}",
            f"{errors[name][0]:.1e}",
            f"{errors[name][1]:.1e}",
        ]
        for name in runs
    ]


def main() -> None:
    """Measures, reports."""
    flags = common.parser(str(__doc__))
    flags.add_argument("--tokens", type=int, default=12 * 1024)
    flags.add_argument("--few-tokens", type=int, default=768, help="where full logits fit")
    flags.add_argument("--vocab", type=int, default=152_000)
    flags.add_argument("--hidden", type=int, default=512)
    args = flags.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure_dtype(dtype, args)]
    head = "|products, frozen head|training head|peak extra, GiB|time|worst, nats|worst gradient"
    report = f"""# The head

{common.provenance(args.threads, ["torch"])}

{common.table(head.split("|"), rows)}

{args.tokens} scored tokens, vocabulary {args.vocab}, hidden size {args.hidden}. Products: GEMMs of
(tokens, vocabulary, hidden size), forward + backward. Peak extra: of the resident size, over a
forward and a backward with a frozen head. Time: against full logits at {args.few_tokens} tokens,
median of {args.rounds} interleaved rounds. Worst: against float64 on the same inputs, of a
log-prob, and of the hidden states' gradient as a share of its largest entry. Full logits were
measured at {args.few_tokens} tokens and their memory scaled to {args.tokens}.
"""
    common.publish(report, args.output)


if __name__ == "__main__":
    main()
