"""What a run wrote into its folder, read back; whichever of the files are there."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo.config import UserError

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
        UserError: it holds neither metrics nor a configuration.
    """
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml")):
        raise UserError(
            f"{folder}: got no metrics.jsonl and no config.yaml there, wanted a run folder. "
            "Name the train.output_dir of a run."
        )
    metrics = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    evaluations = [line for line in metrics if "eval/loss" in line]
    if not evaluations and (summary := _json(folder / "summary.json", {})):
        evaluations = [line for line in (summary["before"], summary["after"]) if line]
    held_out = _lines(folder / "held_out.jsonl")
    header, config = folder / "header.txt", folder / "config.yaml"
    return RunLogs(
        name=folder.resolve().name,
        config=yaml.safe_load(config.read_text("utf-8")) if config.exists() else {},
        metrics=metrics,
        evaluations=evaluations,
        samples=[json.loads(line) for line in _lines(folder / "samples.jsonl")],
        held_out=[json.loads(held_out[i]) for i in (0, -1)] if held_out else [],
        token_rewards=_json(folder / "token_rewards.json", []),
        data_report=_json(folder / "data_report.json", {}),
        evaluation=_without_path(_json(folder / "evaluation.json", {})),
        header=header.read_text("utf-8") if header.exists() else "",
    )


def _lines(file: Path) -> list[str]:
    """Without a last one that was cut off in the writing. Split at newlines only: text has more."""
    return file.read_text("utf-8").split("\n")[:-1] if file.exists() else []


def _json(file: Path, missing: Any) -> Any:
    return json.loads(file.read_text("utf-8")) if file.exists() else missing


def _without_path(evaluation: Line) -> Line:
    """The report may be passed on; where the run lay is nobody's business."""
    return {key: value for key, value in evaluation.items() if key != "run"}
