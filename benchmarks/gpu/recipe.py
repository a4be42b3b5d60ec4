"""The article's recipe on random weights of Mistral-7B's shape; each side is a process of its own.

    cd benchmarks && python -m gpu.recipe build FOLDER [--small]
    cd benchmarks && python -m gpu.recipe SIDE FOLDER [--rows rows.jsonl] [--small]

The checkpoint is written in four bits, as bitsandbytes serialises them, from numbers drawn on the
device: no 14 GB are written, read and quantised again for every side. Steps have 16 pairs; the
first one is of tiny pairs, at learning rate 0, and the second one warms the device up.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from gpu.device import ARTICLE_PAIRS, GPU, SMALL, Row, Setup, shape_of, wait, write
from torch import nn

from dpo.train.trainer import Run

# Keys of our configuration that differ, by side; TRL's are in compare_trl.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, 4 bits kept": {"model__dequantize_base": False},
    "ours, compiled": {"model__compile": True},
    "ours, PyTorch's AdamW": {"optim__name": "adamw"},
    "ours, deterministic": {"train__deterministic": True},
}
TRL = ("TRL, tuned by hand", "TRL, defaults", "TRL, checkpointing off")
FOUND = "reference found"  # the same steps again, with the reference's log-probs cached


def task_of(folder: Path, setup: Setup) -> common.Task:
    """Rows as long as real ones, and the folder that they are in."""
    return common.Task(folder, common.draw_lengths(setup.pairs, setup.scale))


def build(folder: Path, setup: Setup) -> None:
    """Writes model/, in four bits, and rows.jsonl."""
    import bitsandbytes
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig, MistralForCausalLM

    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    task_of(folder, setup).write(layers=1)  # tokenizer and rows
    for file in ("config.json", "model.safetensors"):  # else this model would seem to be built
        (folder / "model" / file).unlink()
    shape = shape_of(setup, setup.layers)
    with torch.device("meta"):
        model = MistralForCausalLM(shape)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    torch.manual_seed(0)
    tensors = {}
    for name, empty in model.named_parameters():
        weight = torch.ones(empty.shape, device=setup.device, dtype=torch.bfloat16)
        if not name.endswith("norm.weight"):
            weight.normal_(std=0.02)
        if name in linear and name != "lm_head.weight":
            packed = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=False
            ).to(setup.device)
            for key, value in packed.quant_state.as_dict(packed=True).items():  # type: ignore[union-attr]
                tensors[f"{name}.{key}"] = value.cpu()
            weight = packed.data
        tensors[name] = weight.cpu()
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    config = shape.to_dict() | {
        "architectures": ["MistralForCausalLM"],
        "quantization_config": four_bits.to_dict(),
    }
    (folder / "model" / "config.json").write_text(json.dumps(config))
    size = (folder / "model" / "model.safetensors").stat().st_size / 2**30
    print(f"build: {size:.2f} GiB in {time.monotonic() - began:.0f} s", flush=True)


class Clock:
    """Times steps; `compare_trl.run_trl` reports to it as it does to a `common.Race`."""

    def __init__(self, setup: Setup):
        self._setup, self._last = setup, time.perf_counter()
        self.seconds: list[float] = []

    def num_steps(self, task: common.Task) -> int:
        """All steps of the task."""
        return task.num_steps

    def start(self, model: object) -> None:
        """Starts the time of the first step."""
        wait(self._setup)
        self._last = time.perf_counter()

    def finish_step(self, step: int) -> None:
        """Is called after each step and its logging."""
        wait(self._setup)
        now = time.perf_counter()
        self.seconds.append(round(now - self._last, 4))
        self._last = now
        print(f"step {step}: {self.seconds[-1]:.2f} s", file=sys.stderr, flush=True)

    def result(self, logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What `run_trl` returns."""
        return [line for line in logged if "loss" in line]

    def row(self, side: str) -> Row:
        """The row of the median step after the two of warm-up."""
        a_second = common.PAIRS_PER_STEP / statistics.median(self.seconds[2:])
        peak = torch.cuda.max_memory_allocated() / 2**30 if self._setup.is_gpu else 0.0
        minutes = ARTICLE_PAIRS / a_second / 60
        said = f"{a_second:.3g} ({minutes:.3g} min for {ARTICLE_PAIRS}; {peak:.3g} GiB)"
        return Row(f"recipe, {side}: pairs/s", said)


def first_step(side: str, logged: list[dict[str, Any]]) -> Row:
    """The row of the first step of real pairs, at the first weights: all sides must agree."""
    names = ("loss", "grad_norm", "logps/chosen")
    said = " ".join(f"{logged[common.WARM_UP_STEPS][name]:.5g}" for name in names)
    return Row(f"recipe, {side}: first step's {', '.join(names)}", said)


def run_ours(side: str, task: common.Task, setup: Setup, say: Callable[..., None]) -> None:
    """Runs all steps with a live reference; side `ours` repeats them with a cached one."""
    began = time.monotonic()
    keys = {
        "model__dtype": "bfloat16",
        "model__quantization": "nf4",
        "model__dequantize_base": True,  # not auto, for which the planner takes ten seconds
        "optim__name": "paged_adamw_32bit",
        "lora__dropout": 0.05,
        "reference__cache": str(task.folder / "reference"),
        "train__logging_steps": 1,
        "train__output_dir": str(task.folder / "runs" / side),
    }
    shutil.rmtree(task.folder / "reference", ignore_errors=True)
    run = Run(common.our_config(task, **keys | OURS[side]))
    ready = round(time.monotonic() - began, 1)
    clock, again = Clock(setup), Clock(setup)
    clock.start(run.models.policy.model)
    for step in range(1, task.num_steps + 1):
        run.train_step(step)
        run.log(step)
        clock.finish_step(step)
    lines = [json.loads(text) for text in (run.folder / "metrics.jsonl").read_text().splitlines()]
    logged = [{key.removeprefix("train/"): value for key, value in line.items()} for line in lines]
    details = {"ready_s": ready, "notes": run.models.policy.notes}
    details["budget"] = run.train_step.budget.reason
    details["layout"] = f"{run.models.layout} {run.models.layout_reason}".strip()
    say(clock.row(side), seconds=clock.seconds, logged=logged[1:], **details)
    say(first_step(side, logged))
    if side != "ours":
        return
    if setup.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    again.start(run.models.policy.model)
    for step in range(1, task.num_steps + 1):
        run.train_step(step)
        again.finish_step(step)
    say(again.row(f"{side}, {FOUND}"), seconds=again.seconds)


def run_theirs(side: str, task: common.Task, setup: Setup, say: Callable[..., None]) -> None:
    """Runs TRL on the same rows and weights."""
    from compare_trl import TRL_SIDES, run_trl

    clock, began = Clock(setup), time.monotonic()
    logged: Any = run_trl(clock, task, on_gpu=setup.is_gpu, **TRL_SIDES[side])  # type: ignore[arg-type]
    ready = round(time.monotonic() - began - sum(clock.seconds), 1)
    say(clock.row(side), seconds=clock.seconds, logged=logged[1:], ready_s=ready)
    say(first_step(side, logged))


def main(argv: list[str] | None = None) -> None:
    """Builds the model, or runs one side on it."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("side", choices=["build", *OURS, *TRL])
    flags.add_argument("folder", type=Path)
    flags.add_argument("--rows", type=Path, help="append the rows to this file")
    flags.add_argument("--small", action="store_true", help="a try on a CPU")
    args = flags.parse_args(argv)
    setup, folder = SMALL if args.small else GPU, args.folder.resolve()
    if args.side == "build":
        build(folder, setup)
        return

    def say(row: Row, **details: Any) -> None:
        write(args.rows, row, device=setup.name, **details)

    run = run_ours if args.side in OURS else run_theirs
    run(args.side, task_of(folder, setup), setup, say)


if __name__ == "__main__":
    main()
