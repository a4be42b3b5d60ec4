"""Where a step on a CPU spends its time: products, attention, element-wise work and copies.

    python benchmarks/profile_step.py --output benchmarks/results/profile_step.md

PyTorch's profiler counts each operation's own time over steps of the model of `compare_trl.py`,
after one step that warms up. It slows small operations down a little, so shares are what to read.
"""

import contextlib
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import torch
from torch.profiler import ProfilerActivity, profile

from dpo.train.trainer import Run

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
MOST_LISTED = 16


def kind(name: str) -> str:
    """The row of the table that an operation belongs to."""
    if "attention" in name:
        return "attention"
    short = name.removeprefix("aten::")
    return "matrix products" if short in PRODUCTS else "element-wise and copies"


def operations(task: common.Task, **keys: Any) -> dict[str, float]:
    """Each operation's own time in the steps after the warm-up, in seconds."""
    run = Run(common.our_config(task, **keys))
    for step in range(1, common.WARM_UP_STEPS + 2):  # the last of them meets real pairs
        run.train_step(step)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for step in range(common.WARM_UP_STEPS + 2, task.num_steps + 1):
            run.train_step(step)
    return {
        event.key: event.self_cpu_time_total / 1e6
        for event in seen.key_averages()
        if event.key.startswith("aten::") and event.self_cpu_time_total
    }


def main() -> None:
    """Measures, reports."""
    flags = common.parser(str(__doc__))
    common.add_task_flags(flags)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = common.prepare(args, Path(folder))
        torch.set_num_threads(args.threads)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            seconds = operations(
                task,
                train__tokens_per_microbatch=args.tokens_per_microbatch,
                reference__cache="off",
            )
    whole = sum(seconds.values())
    kinds: dict[str, float] = defaultdict(float)
    for name, taken in seconds.items():
        kinds[kind(name)] += taken
    listed = sorted(seconds, key=seconds.__getitem__, reverse=True)[:MOST_LISTED]

    def rows(some: dict[str, float]) -> list[list[str]]:
        return [[n, f"{t:.2f}", f"{t / whole:.1%}"] for n, t in some.items()]

    ranked = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    report = f"""# A step on a CPU

{common.provenance(args.threads, ["torch", "transformers", "peft"])}

{common.table(["", "seconds", "share"], rows(ranked))}

{common.table(["operation", "seconds", "share"], rows({n: seconds[n] for n in listed}))}
"""
    common.publish(report, args.output)


if __name__ == "__main__":
    main()
