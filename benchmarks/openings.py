"""What a step saves whose pairs open alike: as a trie, and with every pair's prompt for itself.

    python benchmarks/openings.py --output benchmarks/results/openings.md
    python benchmarks/openings.py --model FOLDER --rows FILE

A step of 16 pairs, policy and reference, forward and backward; both ways in one process, in turn.
The rows of the first command have a tool list of 1,500 tokens, and lengths of real pairs behind it.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import common

from dpo.data.order import micro_batches
from dpo.data.stream import build_stream
from dpo.train.trainer import Run

TOOL_TOKENS = 1500
WAYS = {"a trie": 16, "pairs alone": 10**9}  # the fewest tokens that two pairs share


def write_tool_rows(task: common.Task) -> None:
    """Puts one long opening before every prompt of the task's rows."""
    draw = random.Random(1)
    tools = " ".join(f"t{draw.randrange(3, common.VOCAB)}" for _ in range(TOOL_TOKENS))
    file = task.folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["prompt"] = f"{tools} {row['prompt']}"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(run: Run, rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens, FLOPs and seconds of the first step, by way."""
    step = run.train_step
    pairs = [run.data.train[i] for i in run.order.indices(1)]
    sizes, prompts = [p.num_stream_tokens for p in pairs], [p.prompt_ids for p in pairs]
    found: dict[str, dict[str, Any]] = {way: {"seconds": []} for way in WAYS}
    for number in range(rounds + 1):  # the first warms up
        for way, least in WAYS.items():
            with (
                mock.patch("dpo.data.stream.LEAST_SHARED", least),
                mock.patch("dpo.data.order.LEAST_SHARED", least),
            ):
                bins = micro_batches(sizes, step.budget.tokens, prompts)
                streams = [build_stream([pairs[i] for i in b]) for b in bins]
                found[way]["tokens"] = sum(len(stream.input_ids) for stream in streams)
                step.interval.flops, began = 0.0, time.perf_counter()
                step.gradient(1, pairs, pairs_in_step=len(pairs))
                seconds = time.perf_counter() - began
            run.optimizer.zero_grad()
            found[way]["flops"] = step.interval.flops
            if number:
                found[way]["seconds"].append(seconds)
    return found


def rows_of_table(name: str, budget: int, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row of each way, with its ratios to the first."""
    first = next(iter(found.values()))
    least = min(first["seconds"])
    return [
        [
            name,
            way,
            str(budget),
            f"{its['tokens']:,} ({its['tokens'] / first['tokens']:.2f}x)",
            f"{its['flops'] / 1e9:,.0f} ({its['flops'] / first['flops']:.2f}x)",
            f"{common.median_and_range(its['seconds'])} ({min(its['seconds']) / least:.2f}x)",
        ]
        for way, its in found.items()
    ]


def main() -> None:
    """Measures each budget, and writes the table."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--model", help="a model's folder; needs --rows")
    flags.add_argument("--rows", type=Path, help="rows to train on, in place of the tool rows")
    flags.add_argument("--layers", type=int, default=8)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--budgets", type=int, nargs="*", default=[2048, 8192])
    flags.add_argument("--output", type=Path)
    args = flags.parse_args()
    lines = []
    for budget in args.budgets:
        with tempfile.TemporaryDirectory() as folder:
            task = common.Task(Path(folder), common.draw_lengths(16, 0.4), has_tiny_rows=False)
            config = common.our_config(task, train__tokens_per_microbatch=budget)
            config.data.max_prompt_length, config.data.max_length = 2500, 3500
            config.reference.cache = "off"
            if args.model:
                config.model.name_or_path = args.model
                config.data.name_or_path = str(args.rows)
                config.data.max_prompt_length, config.data.max_length = 1024, 1536
            else:
                task.write(args.layers)
                write_tool_rows(task)
            run = Run(config)
            run.tracker.close_bar()
            name = args.rows.name if args.rows else f"{TOOL_TOKENS:,} tokens of tools"
            lines += rows_of_table(name, budget, measure(run, args.rounds))
    head = "rows|as|tokens a micro-batch|tokens computed|GFLOP|seconds a step"
    title = "# A step of 16 pairs that open alike\n\n"
    common.publish(title + common.table(head.split("|"), lines), args.output)


if __name__ == "__main__":
    main()
