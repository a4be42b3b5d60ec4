"""What a run reports: progress bar, `metrics.jsonl`, Accelerate's trackers, closing table."""

import difflib
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
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
from dpo.ranks import end_processes
from dpo.run_folder import append_lines, read_lines, salvage_lines, write_lines
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
        self._waiting: dict[Path, list[run_folder.Line]] = {}
        self._said: set[str] = set()
        self._bar: tqdm[Any] | None = None
        self._writer: SummaryWriter | None = None
        self._watch = watch

    def rewind(self, start_step: int) -> None:
        """Drops what was logged after `start_step`, since the resumed run logs it again."""
        for file in (self._file, self._samples, self._held_out):
            lines, num_broken = salvage_lines(file)
            if num_broken:
                are = "line is" if num_broken == 1 else "lines are"
                self.say(f"{file}: {num_broken} broken {are} left out")
            if file == self._file and start_step and not lines:
                self.say(f"{file}: what was logged up to step {start_step} is lost")
            rewritten = file.with_suffix(".tmp")
            write_lines(rewritten, (line for line in lines if line["step"] <= start_step))
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
        self._append(self._file, line)
        self._without("the trackers' logs", lambda: self._accelerator.log(metrics, step=step))
        for finding in self._watch.see(line):
            self.say(str(finding))

    def advance(self, metrics: dict[str, float] | None) -> None:
        """Moves the bar one step; shows the metrics, if there are new ones."""
        assert self._bar is not None
        with suppress(OSError):
            self._show(metrics)

    def _show(self, metrics: dict[str, float] | None) -> None:
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
            with suppress(OSError):  # it may go to a file, on a full disk
                tqdm.write(text, file=sys.stderr)

    def log_evaluation(
        self,
        step: int,
        evaluation: Evaluation,
        held_out: Pairs,
        *,
        beta: float,
        per_token: bool = False,
    ) -> None:
        """Logs an evaluation: metrics, samples, and the log-probs of every held-out pair."""
        self.log(step, evaluation.metrics)
        if not self._accelerator.is_main_process:
            return
        self._append(self._samples, *({"step": step, **sample} for sample in evaluation.samples))
        columns = held_out_columns(held_out, evaluation.logps)
        self._append(self._held_out, {"step": step, **columns})
        if self._writer:
            chosen, rejected = implicit_rewards(evaluation.logps, beta=beta, per_token=per_token)
            histograms = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
            }
            show = partial(show_evaluation, self._writer, step, histograms, evaluation.samples)
            self._without("the trackers' logs", show)

    def say_once(self, text: str) -> None:
        """As `say`, but nothing a second time."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def _append(self, file: Path, *lines: run_folder.Line) -> None:
        """Appends to a log; what cannot be written waits in memory for the next time."""
        waiting = self._waiting.setdefault(file, [])
        waiting += lines

        def write() -> None:
            append_lines(file, waiting)
            waiting.clear()

        self._without(str(file), write)

    def _without(self, what: str, write: Callable[[], object]) -> None:
        """Writes what training can do without; says once that it could not be written."""
        try:
            write()
        except OSError as error:
            self.say_once(f"{what} cannot be written ({error.strerror}); training goes on")

    def close(self) -> None:
        """Closes the bar and the trackers, and writes what could not be written before.

        Raises:
            UserError: it still cannot.
        """
        self.close_bar()
        for tracker in self._accelerator.trackers:
            self._without("the trackers' logs", tracker.finish)
        self._accelerator.trackers = []
        end_processes(self._accelerator)
        for file in self._waiting:
            self._append(file)
        if lost := [str(file) for file, lines in self._waiting.items() if lines]:
            raise UserError(
                f"{', '.join(lost)} cannot be written: the last lines are lost. Free some space on "
                "the disk, and begin again from the last checkpoint (train.resume auto)."
            )

    def _lines(self, file: Path) -> list[run_folder.Line]:
        return [*read_lines(file), *self._waiting.get(file, [])]

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation lines so far; the first is from before training."""
        return [line for line in self._lines(self._file) if "eval/loss" in line]

    def last_held_out(self) -> PairLogps | None:
        """The log-probs of every held-out pair at the last evaluation."""
        lines = self._lines(self._held_out)
        if not lines:
            return None
        return PairLogps(*(torch.tensor(lines[-1][field.name]) for field in fields(PairLogps)))

    def samples_at(self, step: int) -> list[dict[str, Any]]:
        """The samples of the evaluation at a step."""
        return [line for line in self._lines(self._samples) if line["step"] == step]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the bar is there; whatever ends the run is said below it."""
        try:
            yield
        finally:
            self.close_bar()

    def close_bar(self) -> None:
        """Closes the bar, so that what is printed next appears below it."""
        if self._bar is not None:
            with suppress(OSError):
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
    known = {sample["index"]: sample for sample in before}
    both = [(known[new["index"]], new) for new in after if new["index"] in known]
    for old, new in both[:count]:
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
