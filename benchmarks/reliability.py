"""What checksums, flushing to the disk and signals cost, beside the step and the save.

python benchmarks/reliability.py --output benchmarks/results/reliability.md
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import common
import torch
from accelerate import Accelerator

from dpo import signals
from dpo.cli import parse
from dpo.data.files import cache_folder
from dpo.ranks import largest_over_ranks
from dpo.sealed import damage, written_aside
from dpo.train import checkpoint as checkpoints
from dpo.train.trainer import Run

ROUNDS = 7


@contextmanager
def unsealed(folder: Path) -> Iterator[Path]:
    """As `written_aside` was before: no sums of other files, and nothing is flushed to the disk."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    (unfinished / "manifest.json").write_text(str(checkpoints.written_aside))
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def seconds(do: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def interleaved(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each way, one after the other, round after round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, do in ways.items():
            times[name].append(seconds(do))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Measures and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", help="another model; the packaged one without")
    output = parser.parse_args().output
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--train.output_dir", f"{folder}/run", "--train.report_to", "none"]
        flags += ["--model.name_or_path", model] if model else []
        run = Run(parse([*flags, "--train.tokens_per_microbatch", "1024"]))
        run.tracker.close_bar()
        run.train_step(1)
        step = iter(range(2, 100))
        state = {"sums": []}

        def save() -> None:
            checkpoints.save_checkpoint(
                Path(folder, "run"),
                1,
                run.models.policy.model,
                run.optimizer.optimizer,
                run.config,
                run.identity,
                state,
            )

        def save_unsealed() -> None:
            checkpoints.written_aside = unsealed
            save()
            checkpoints.written_aside = written_aside

        accelerator: Accelerator = run.accelerator
        caches = list(cache_folder("dpo_pairs").glob("*"))
        newest = max(caches, key=lambda path: path.stat().st_mtime)
        taken = interleaved(
            {
                "a step": lambda: run.train_step(next(step)),
                "asking for a signal": lambda: largest_over_ranks(accelerator, signals.asked()),
                "a checkpoint, with sums and flushed": save,
                "a checkpoint, without": save_unsealed,
                "comparing the sums of the newest token cache": lambda: damage(newest),
            }
        )
        size = sum(f.stat().st_size for f in newest.glob("*")) / 2**20
        there = Path(folder, "run", "checkpoint-1")
        checkpoint = sum(f.stat().st_size for f in there.glob("*")) / 2**20
    rows = [[name, f"{1000 * each:.3g}"] for name, each in taken.items()]
    per_step = taken["asking for a signal"] / taken["a step"]
    page = "\n".join(
        [
            "# What reliability costs",
            "",
            common.provenance(torch.get_num_threads(), ("torch", "transformers", "peft")),
            "",
            common.table(["", "ms"], rows),
            "",
            f"Medians of {ROUNDS} interleaved rounds, {torch.get_num_threads()} threads; a "
            f"checkpoint of {checkpoint:.3g} MiB, a token cache of {size:.3g} MiB. Asking for a "
            f"signal is {per_step:.2e} of a step.",
        ]
    )
    common.publish(page, output)


if __name__ == "__main__":
    main()
