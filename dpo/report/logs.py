"""What a run wrote into its folder, read back. Any of the files may be missing."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo import run_folder
from dpo.errors import UserError
from dpo.run_folder import Line, read_lines, read_text, read_whole


@dataclass(frozen=True)
class RunLogs:
    """The contents of a run folder; a missing file is empty here.

    Attributes:
        name: the folder's.
        config: config.yaml, by section.
        metrics: lines of metrics.jsonl.
        evaluations: the lines of metrics.jsonl that are evaluations, the one before training first.
        samples: lines of samples.jsonl.
        held_out: the first and the last line of held_out.jsonl.
        token_rewards, data_report: those JSON files.
        measured: what dpo evaluate measured, by part.
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
    measured: dict[str, Line]
    header: str

    @property
    def beta(self) -> float | None:
        """The scale of the rewards; None without a configuration."""
        return self.config.get("loss", {}).get("beta")

    @property
    def rewards(self) -> str:
        """What the run's rewards are, as its header says."""
        said = re.search("^note: rewards are (.*)$", self.header, re.MULTILINE)
        return said[1] if said else "beta times log-ratios"

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
    if not any((folder / name).exists() for name in (run_folder.METRICS, run_folder.CONFIG)):
        raise UserError(
            f"{folder}: got no metrics.jsonl and no config.yaml there, wanted a run folder. "
            "Name the train.output_dir of a run."
        )
    metrics = read_lines(folder / run_folder.METRICS)
    return RunLogs(
        name=folder.resolve().name,
        config=read_whole(folder / run_folder.CONFIG, {}, _sections),
        metrics=metrics,
        evaluations=[line for line in metrics if "eval/loss" in line],
        samples=read_lines(folder / run_folder.SAMPLES),
        held_out=read_lines(folder / run_folder.HELD_OUT, ends=True),
        token_rewards=read_whole(folder / run_folder.TOKEN_REWARDS, []),
        data_report=read_whole(folder / run_folder.DATA_REPORT, {}),
        measured={
            part: read_whole(folder / name, {})
            for part, name in run_folder.MEASURED.items()
            if (folder / name).exists()
        },
        header=read_text(folder / run_folder.HEADER),
    )


def _sections(text: str) -> dict[str, dict[str, Any]]:
    config = yaml.safe_load(text)
    if isinstance(config, dict) and all(isinstance(keys, dict) for keys in config.values()):
        return config
    raise ValueError("wanted sections, with keys indented below them")
