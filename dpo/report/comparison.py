"""Several runs beside each other: what differs, what they achieved, and at what KL."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.catalogue import metric
from dpo.report.charts import MARKERS, RUN_COLOURS, RUN_LINES, Chart, Series, curve, shown_number
from dpo.report.digest import shown
from dpo.report.logs import RunLogs

# The columns of results, and the curves.
_RESULTS = (
    "eval/exact_match eval/rewards/accuracies eval/ranking_accuracy eval/rewards/margins eval/loss "
    "eval/kl eval/lengths/generated eval/logps/chosen"
).split()
_COSTS = ("eval/kl",)  # no lowest value is starred: a run that learned nothing has it
_OF_ONE_LOSS = ("eval/rewards/margins", "eval/loss")  # on another scale if beta differs
_OVERLAID = (
    "eval/exact_match eval/rewards/accuracies eval/loss eval/rewards/margins eval/kl train/loss "
    "train/rewards/margins"
).split()
_NOT_A_DIFFERENCE = ("train.output_dir",)


@dataclass(frozen=True)
class Column:
    """One result for each run, as text; "" where a run has none.

    Attributes:
        best: which runs have the best value; none, if no value is better than another.
    """

    name: str
    texts: list[str]
    best: list[bool]


def name_apart(runs: Sequence[RunLogs], folders: Sequence[Path]) -> list[RunLogs]:
    """The runs, with names that contain as much of their paths as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def differing_keys(runs: Sequence[RunLogs]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of every key whose value is not the same in all runs."""
    keys = {
        f"{section}.{key}": None
        for run in runs
        for section, values in run.config.items()
        for key in values
    }
    table = [(key, [shown(_value(run, key)) for run in runs]) for key in keys]
    return [
        (key, values)
        for key, values in table
        if len(set(values)) > 1 and key not in _NOT_A_DIFFERENCE
    ]


def _value(run: RunLogs, key: str) -> object:
    section, _, name = key.partition(".")
    return run.config.get(section, {}).get(name)


def results(runs: Sequence[RunLogs]) -> list[Column]:
    """The last evaluation of every run: one column for each metric that any of them has."""
    columns = []
    for key in _RESULTS:
        entry, better = metric(key), metric(key).better
        values = [run.evaluations[-1].get(key) if run.evaluations else None for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        comparable = key not in _COSTS and (key not in _OF_ONE_LOSS or have_one_loss(runs))
        best = better(known) if better and comparable and len(set(known)) > 1 else None
        columns.append(
            Column(
                entry.title,
                ["" if value is None else format(value, entry.format) for value in values],
                [value is not None and value == best for value in values],
            )
        )
    return columns


def have_one_loss(runs: Sequence[RunLogs]) -> bool:
    """Whether the runs' losses and margins can be compared."""
    losses: list[Any] = [run.config.get("loss") for run in runs]
    return all(loss == losses[0] for loss in losses)


def overlaid_curves(runs: Sequence[RunLogs]) -> list[Chart]:
    """One chart a metric, one line a run."""
    charts = []
    for key in _OVERLAID:
        title = f"{metric(key).title}, {'held out' if key.startswith('eval/') else 'training'}"
        percent = metric(key).is_share
        series = [
            curve(
                *run.values(key),
                name=run.name,
                colour=RUN_COLOURS[i % len(RUN_COLOURS)],
                line=RUN_LINES[i % len(RUN_LINES)],
                marker=_marker(i) if key.startswith("eval/") else "",
                percent=percent,
            )
            for i, run in enumerate(runs)
            if run.values(key)[0]
        ]
        if series:
            charts.append(Chart(title=title, series=series, percent=percent))
    return charts


def _marker(i: int) -> str:
    return list(MARKERS)[i % len(MARKERS)]


def frontier(runs: Sequence[RunLogs]) -> list[Chart]:
    """Reward against KL, every evaluation a point (Rafailov et al. 2023, arXiv:2305.18290, fig. 2).

    The reward is the ground truth where every run knows it. Without it, reward accuracy stands in,
    which measures the policy by its own rewards; the chart says so. [] without any KL.
    """
    is_truth = all("eval/exact_match" in line for run in runs for line in run.evaluations)
    key = "eval/exact_match" if is_truth else "eval/rewards/accuracies"
    y_name = "right" if is_truth else "reward accuracy"
    groups = sorted({_beta(run) for run in runs})
    series = []
    for run in sorted(runs, key=_beta):
        # Before training every reward ties, so reward accuracy says nothing there.
        lines = run.evaluations if is_truth else run.evaluations[1:]
        points = [line for line in lines if "eval/kl" in line]
        if not points:
            continue
        i = groups.index(_beta(run))
        series.append(
            Series(
                name=f"beta {shown(_beta(run))}",
                colour=RUN_COLOURS[i % len(RUN_COLOURS)],
                line=RUN_LINES[i % len(RUN_LINES)],
                marker=_marker(i),
                x=[line["eval/kl"] for line in points],
                y=[line[key] for line in points],
                at=[f"{run.name}, step {line['step']}" for line in points],
                text=[
                    f"{line[key]:.1%} {y_name}, KL {shown_number(line['eval/kl'])}"
                    for line in points
                ],
            )
        )
    if not series:
        return []
    truth = "Up is better: share of greedy answers to held-out prompts that are right."
    stand_in = (
        "No ground truth here: up is the share of held-out pairs that the policy's own rewards "
        "rank as labelled, which over-optimisation does not lower."
    )
    return [
        Chart(
            title="Right answers against KL" if is_truth else "Reward accuracy against KL",
            note=f"{truth if is_truth else stand_in} Right is further from the reference. Every "
            "evaluation of every run is a point; those of a run are joined in the order of steps.",
            series=series,
            x_label="KL to the reference, nats per answer",
            percent=True,
            pick="point",
            symlog_x=True,
        )
    ]


def _beta(run: RunLogs) -> float:
    return run.beta if run.beta is not None else 0.0
