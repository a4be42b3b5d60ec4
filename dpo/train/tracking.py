"""What a run says: one bar, `metrics.jsonl`, Accelerate's trackers, the closing table."""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from dpo.config import Config, UserError

# Rows of the closing table: held-out metric, its name there, and how it is printed.
_TABLE = (
    ("eval/exact_match", "answers right (greedy)", "{:.1%}"),
    ("eval/rewards/accuracies", "reward accuracy", "{:.1%}"),
    ("eval/rewards/margins", "reward margin", "{:.3f}"),
    ("eval/loss", "loss", "{:.4f}"),
    ("eval/kl", "KL to the reference, nats per answer", "{:.2f}"),
    ("eval/lengths/generated", "answer length, tokens", "{:.1f}"),
    ("eval/logps/chosen", "log-prob of chosen, nats", "{:.2f}"),
    ("eval/logps/rejected", "log-prob of rejected, nats", "{:.2f}"),
)


class Tracker:
    """Writes metrics; only the main process does, the others call in vain."""

    def __init__(self, accelerator: Accelerator, config: Config, folder: Path, start_step: int):
        self._accelerator = accelerator
        self._file = folder / "metrics.jsonl"
        self._bar: tqdm[Any] | None = None
        if not accelerator.is_main_process:
            return
        # What was logged after the checkpoint that the run goes on from happens again.
        kept = [line for line in self.lines() if line["step"] <= start_step] if start_step else []
        self._file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def start(self, config: Config, start_step: int, total_steps: int) -> None:
        """Opens trackers and the bar."""
        flat = {
            f"{section}.{key}": value if isinstance(value, int | float | str | bool) else str(value)
            for section, keys in vars(config).items()
            for key, value in vars(keys).items()
        }
        resumed = {"tensorboard": {"purge_step": start_step + 1}} if start_step else {}
        self._accelerator.init_trackers("tensorboard", config=flat, init_kwargs=resumed)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not self._accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to every tracker."""
        if not self._accelerator.is_main_process:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._accelerator.log(metrics, step=step)

    def advance(self, metrics: dict[str, float] | None) -> None:
        """Moves the bar one step; shows loss, accuracy and margin where they are new."""
        assert self._bar is not None
        self._bar.update()
        if metrics:
            self._bar.set_postfix(
                loss=f"{metrics['train/loss']:.4f}",
                acc=f"{metrics['train/rewards/accuracies']:.2f}",
                margin=f"{metrics['train/rewards/margins']:.3f}",
            )

    def say(self, text: str) -> None:
        """Prints above the bar, once."""
        if self._accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def lines(self) -> list[dict[str, Any]]:
        """What was logged so far."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text().splitlines()]

    def close_bar(self) -> None:
        """So that what is printed next stands below it."""
        if self._bar is not None:
            self._bar.close()


def check_trackers(report_to: str | list[str]) -> list[str]:
    """The trackers to report to, each known to Accelerate and installed.

    Raises:
        UserError: naming one that is not.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    wanted = [report_to] if isinstance(report_to, str) else report_to
    wanted = [name for name in wanted if name != "none"]
    installed = {str(LoggerType(name)) for name in get_available_trackers()}
    for name in wanted:
        if name not in installed:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise UserError(
                f"train.report_to: got {name!r}, wanted none or an installed one of {known}. "
                f"Install it (pip install {name}), or take another."
            )
    return wanted


def versions() -> str:
    """Of everything that decides the numbers."""
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    found = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {found}"


def closing_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Held-out figures before and after training, side by side."""
    rows = [
        f"{name:<38}{shape.format(before[key]):>12}{shape.format(after[key]):>12}"
        for key, name, shape in _TABLE
        if key in before and key in after
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
