"""What a run wrote into its folder, read back; whichever of the files are there."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo.errors import UserError

Line = dict[str, Any]


@dataclass(frozen=True)
class RunLogs:
    """The files of a run folder; a file that is not there is empty here.

    Attributes:
        name: the folder's.
        config: config.yaml, by section.
        metrics: lines of metrics.jsonl.
        evaluations: those of them that are evaluations; the first is the one before training.
        samples: lines of samples.jsonl.
        held_out: the first and the last line of held_out.jsonl.
        token_rewards, data_report, evaluation: those JSON files.
        header: header.txt.
    """

    name: str
    config: dict[str, dict[str, Any]]
    metrics: list[Line]
    evaluations: list[Line]
    samples: list[Line]
    held_out: list[Line]
    token_rewards: list[Line]
    data_report: Line
    evaluation: Line
    header: str

    @property
    def beta(self) -> float | None:
        """What scales the rewards, if the configuration is there."""
        return self.config.get("loss", {}).get("beta")

    @property
    def has_one_right_answer(self) -> bool:
        """Whether `is_right` of a sample means anything."""
        return bool(self.config.get("train", {}).get("eval_exact_match"))

    def values(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of one metric."""
        found = [(line["step"], line[key]) for line in self.metrics if key in line]
        finite = [(step, value) for step, value in found if math.isfinite(value)]
        return [step for step, _ in finite], [value for _, value in finite]


def read_logs(folder: Path) -> RunLogs:
    """Reads a run folder.

    Raises:
        UserError: it holds neither metrics nor a configuration, or a file in it is broken.
    """
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml")):
        raise UserError(
            f"{folder}: got no metrics.jsonl and no config.yaml there, wanted a run folder. "
            "Name the train.output_dir of a run."
        )
    metrics = read_lines(folder / "metrics.jsonl")
    return RunLogs(
        name=folder.resolve().name,
        config=_whole(folder / "config.yaml", {}, _sections),
        metrics=metrics,
        evaluations=[line for line in metrics if "eval/loss" in line],
        samples=read_lines(folder / "samples.jsonl"),
        held_out=read_lines(folder / "held_out.jsonl", ends=True),
        token_rewards=_whole(folder / "token_rewards.json", []),
        data_report=_whole(folder / "data_report.json", {}),
        evaluation=_whole(folder / "evaluation.json", {}),
        header=_text(folder / "header.txt"),
    )


def read_lines(file: Path, *, ends: bool = False) -> list[Line]:
    """All, or the first and the last, without one at the end that was cut off in the writing."""
    lines = list(enumerate(_text(file).split("\n")[:-1], start=1))  # text has other line ends too
    lines = [*lines[:1], *lines[-1:]] if ends else lines
    return [_parse(line, f"{file}, line {number}", {}) for number, line in lines]


def _whole(file: Path, missing: Any, read: Callable[[str], Any] = json.loads) -> Any:
    return _parse(_text(file), str(file), missing, read) if file.exists() else missing


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Restore it, or move it away.") from None


def _sections(text: str) -> dict[str, dict[str, Any]]:
    config = yaml.safe_load(text)
    if isinstance(config, dict) and all(isinstance(keys, dict) for keys in config.values()):
        return config
    raise ValueError("wanted sections, with keys indented below them")


def _parse(text: str, where: str, like: Any, read: Callable[[str], Any] = json.loads) -> Any:
    """What `text` holds; it must be of the type of `like`."""
    try:
        value = read(text)
        if isinstance(value, type(like)):
            return value
        problem = f"got a {type(value).__name__}, wanted a {type(like).__name__}"
    except (ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"{where} is broken: {problem}. Restore it, or move the file away.")
