"""How evenly a step falls on many ranks: a simulation with real lengths and the trainer's own rule.

A step ends when its slowest rank does, so the figure is the mean load of the ranks over the
largest. Pairs are drawn from the committed lengths; the trainer's `balance` deals them out, longest
first, into the emptiest rank. Beside it, what samplers do: the same number of pairs to each rank,
as they come. Load is FLOPs of Mistral-7B with LoRA r=16 and a live reference.

python benchmarks/balance.py [--output benchmarks/results/balance.md]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from dpo.data.order import balance
from dpo.data.stream import build_stream
from dpo.plan.flops import Costs, work

LENGTHS = Path(__file__).parent / "orca_lengths.json"
RANKS = (8, 64, 512, 1024)
PAIRS_PER_RANK = (2, 4, 16)
STEPS = 20
# Mistral-7B: FLOPs a token, a score and a target, from the shapes of its config.json.
MISTRAL = Costs(linear=13.96e9, adapter=0.168e9, attention=0.524e6, head=0.262e9, trains_base=False)


def main() -> None:
    """Prints the table, and writes it where --output says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = table()
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def table() -> str:
    """The mean over steps of mean load / largest load, by number of ranks and pairs a rank."""
    lengths = np.array(json.loads(LENGTHS.read_text())["tokens"])
    rng = np.random.default_rng(0)
    lines = [
        "# Load balance over ranks, simulated",
        "",
        f"Share of the time in which the mean rank works ({STEPS} steps each, lengths drawn from "
        f"{len(lengths)} real pairs, NumPy seed 0).",
        "",
        "| ranks | pairs a rank | as they come | balanced by tokens | `balance` takes, ms a step |",
        "|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        for per_rank in PAIRS_PER_RANK:
            plain, ours, seconds = [], [], []
            for _ in range(STEPS):
                drawn = lengths[rng.integers(len(lengths), size=ranks * per_rank)]
                loads, tokens = flops(drawn), drawn.sum(axis=1) - 2
                plain.append(evenness(loads.reshape(ranks, per_rank).sum(axis=1)))
                began = time.perf_counter()
                bins = balance(tokens.tolist(), ranks)
                seconds.append(time.perf_counter() - began)
                ours.append(evenness(np.array([loads[rank].sum() for rank in bins])))
            lines.append(
                f"| {ranks} | {per_rank} | {np.mean(plain):.1%} | {np.mean(ours):.1%} | "
                f"{1000 * np.median(seconds):.1f} |"
            )
    return "\n".join(lines)


def flops(lengths: np.ndarray) -> np.ndarray:
    """FLOPs of each (prompt, chosen, rejected): forward, backward and reference."""
    works = [
        work(
            build_stream([([0] * prompt, [1] * chosen, [2] * rejected)]).segments, chosen + rejected
        )
        for prompt, chosen, rejected in lengths.tolist()
    ]
    return np.array([MISTRAL.flops(pair).total for pair in works])


def evenness(loads: np.ndarray) -> float:
    """Mean over largest: 1 when all ranks end together."""
    return loads.mean() / loads.max()


if __name__ == "__main__":
    main()
