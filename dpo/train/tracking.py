"""What a run reports: progress bar, `metrics.jsonl`, Accelerate's trackers, closing table."""

import difflib
import json
import platform
import sys
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from dpo import run_folder
from dpo.catalogue import metric
from dpo.config import Config
from dpo.data.loader import Pairs
from dpo.device import is_number_of_threads_given
from dpo.errors import UserError
from dpo.evaluate.diagnostics import Watch
from dpo.evaluate.evaluator import Evaluation, held_out_columns
from dpo.losses import PairLogps, implicit_rewards
from dpo.run_folder import append_lines, read_lines
from dpo.train.board import open_board, show_evaluation

# The rows of the closing table.
_CLOSING = (
    "eval/exact_match eval/rewards/accuracies eval/rewards/margins eval/loss eval/kl "
    "eval/lengths/generated eval/logps/chosen eval/logps/rejected"
).split()


class Tracker:
    """Writes metrics on the main process; on the others every call does nothing."""

    def __init__(self, accelerator: Accelerator, folder: Path, watch: Watch):
        self._accelerator = accelerator
        self._file, self._samples, self._held_out = (folder / name for name in run_folder.LOGS)
        self._bar: tqdm[Any] | None = None
        self._writer: SummaryWriter | None = None
        self._watch = watch

    def rewind(self, start_step: int) -> None:
        """Drops what was logged after `start_step`, since the resumed run logs it again."""
        for file in (self._file, self._samples, self._held_out):
            kept = [line for line in read_lines(file) if line["step"] <= start_step]
            rewritten = file.with_suffix(".tmp")
            rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
            rewritten.replace(file)
        for line in read_lines(self._file):
            self._watch.see(line)  # these findings were printed before

    def start(self, config: Config, start_step: int, total_steps: int) -> None:
        """Opens the trackers and the progress bar."""
        flat = {
            f"{section}.{key}": value if isinstance(value, int | float | str | bool) else str(value)
            for section, keys in asdict(config).items()
            for key, value in keys.items()
        }
        resumed = {"tensorboard": {"purge_step": start_step + 1}} if start_step else {}
        self._accelerator.init_trackers("tensorboard", init_kwargs=resumed)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                self._writer = tracker.tracker
                open_board(tracker.tracker, flat)
            else:
                tracker.store_init_configuration(flat)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not self._accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics to metrics.jsonl and every tracker; prints the warnings that follow."""
        if not self._accelerator.is_main_process:
            return
        line = {"step": step, **metrics}
        append_lines(self._file, [line])
        self._accelerator.log(metrics, step=step)
        for finding in self._watch.see(line):
            self.say(str(finding))

    def advance(self, metrics: dict[str, float] | None) -> None:
        """Moves the bar one step; shows the metrics, if there are new ones."""
        assert self._bar is not None
        self._bar.update()
        if metrics:
            speed = f"{metrics['train/pairs_per_second']:.3g} pairs/s"
            mfu = metrics.get("train/mfu")
            self._bar.set_postfix(
                loss=f"{metrics['train/loss']:.4f}",
                acc=f"{metrics['train/rewards/accuracies']:.2f}",
                margin=f"{metrics['train/rewards/margins']:.3f}",
                speed=speed if mfu is None else f"{speed}, MFU {mfu:.0%}",
                mem=f"{metrics['train/memory_gib']:.3g}G",
            )

    def say(self, text: str) -> None:
        """Prints above the bar, once."""
        if self._accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def log_evaluation(
        self, step: int, evaluation: Evaluation, held_out: Pairs, *, beta: float
    ) -> None:
        """Logs an evaluation: metrics, samples, and the log-probs of every held-out pair."""
        self.log(step, evaluation.metrics)
        if not self._accelerator.is_main_process:
            return
        append_lines(self._samples, [{"step": step, **sample} for sample in evaluation.samples])
        columns = held_out_columns(held_out, evaluation.logps)
        append_lines(self._held_out, [{"step": step, **columns}])
        if self._writer:
            chosen, rejected = implicit_rewards(evaluation.logps, beta=beta)
            histograms = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
            }
            show_evaluation(self._writer, step, histograms, evaluation.samples)

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation lines so far; the first is from before training."""
        return [line for line in read_lines(self._file) if "eval/loss" in line]

    def last_held_out(self) -> PairLogps | None:
        """The log-probs of every held-out pair at the last evaluation."""
        lines = read_lines(self._held_out)
        if not lines:
            return None
        return PairLogps(*(torch.tensor(lines[-1][field.name]) for field in fields(PairLogps)))

    def samples_at(self, step: int) -> list[dict[str, Any]]:
        """The samples of the evaluation at a step."""
        return [line for line in read_lines(self._samples) if line["step"] == step]

    def close_bar(self) -> None:
        """Closes the bar, so that what is printed next appears below it."""
        if self._bar is not None:
            self._bar.close()


def check_trackers(report_to: str | list[str]) -> list[str]:
    """The trackers to report to, each known to Accelerate and installed.

    Raises:
        UserError: one is unknown or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    wanted = [report_to] if isinstance(report_to, str) else report_to
    wanted = [name for name in wanted if name != "none"]
    installed = {str(LoggerType(name)) for name in get_available_trackers()}
    for name in wanted:
        if name not in installed:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"The nearest is {near[0]}." if near else "Take another."
            if name in known:
                remedy = f"Install it (pip install {name}), or take another."
            raise UserError(
                f"train.report_to: got {name!r}, wanted none or an installed one of "
                f"{', '.join(known)}. {remedy}"
            )
    return wanted


def versions() -> str:
    """The versions of every package that can change the results."""
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    found = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {found}"


def closing_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Held-out metrics before and after training, side by side."""
    rows = [
        f"{entry.title:<38}{before[name]:>12{entry.format}}{after[name]:>12{entry.format}}"
        for name, entry in ((name, metric(name)) for name in _CLOSING)
        if name in before and name in after
    ]
    return "\n".join([f"{'held out':<38}{'before':>12}{'after':>12}", *rows])


def side_by_side(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int = 5) -> str:
    """The first prompts with the answers before and after training."""
    parts = []
    for old, new in list(zip(before, after, strict=True))[:count]:
        parts += [
            old["prompt"].strip(),
            f"  before: {old['answer']}",
            f"  after:  {new['answer']}",
            f"  chosen: {old['chosen']}",
            "",
        ]
    return "\n".join(parts)


def device_name(device: torch.device) -> str:
    """The device in words, for the run header."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    number = torch.get_num_threads()
    given = ", as given" if is_number_of_threads_given() else ""
    return f"CPU, {number} {'thread' if number == 1 else 'threads'}{given}"
