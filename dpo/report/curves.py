"""The charts of a run's report: the article's curves, and what the held-out pairs look like."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from dpo.catalogue import by_chart, metric
from dpo.data.order import spread
from dpo.report.charts import Chart, Series, curve, shown_number
from dpo.report.logs import RunLogs
from dpo.run_folder import Line

MAX_SCATTERED = 400  # pairs in the chart of reward against length, evenly over all of them
_LN_2 = math.log(2)

# The metrics that have a chart. A metric of training is drawn as a thin line, the same metric on
# held-out pairs as a line with markers.
_CURVES = (
    "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies learning_rate "
    "grad_norm logps/chosen logps/rejected kl exact_match ranking_accuracy lengths/generated"
).split()
_SPEED = "tokens_per_second pairs_per_second memory_gib".split()


def training_curves(logs: RunLogs) -> list[Chart]:
    """The curves of the article, and those that tell whether to believe them."""
    return _curves(logs, _CURVES)


def speed_curves(logs: RunLogs) -> list[Chart]:
    """Throughput and memory."""
    return _curves(logs, _SPEED)


def _curves(logs: RunLogs, chosen: Sequence[str]) -> list[Chart]:
    charts = []
    for title, names in by_chart(chosen).items():
        percent = metric(names[0]).is_share
        series = list(_train_and_held_out(logs, names, percent))
        if series:
            note = " ".join(metric(name).meaning for name in names)
            level = (_LN_2, "ln 2") if names == ["loss"] and _starts_at_ln_2(series) else None
            charts.append(
                Chart(title=title, series=series, note=note, percent=percent, level=level)
            )
    return charts


def _train_and_held_out(logs: RunLogs, names: Sequence[str], percent: bool) -> Iterator[Series]:
    for prefix, where in (("train", "training"), ("eval", "held out")):
        for metric_name in names:
            steps, values = logs.values(f"{prefix}/{metric_name}")
            if not steps:
                continue
            side = metric_name.rpartition("/")[2]
            is_side = side in ("chosen", "rejected")
            colour = side if is_side else "train" if prefix == "train" else "held-out"
            yield curve(
                steps,
                values,
                name=f"{side}, {where}" if is_side else where,
                colour=colour,
                line="--" if side == "rejected" else "-",
                marker="" if prefix == "train" else "s" if side == "rejected" else "o",
                percent=percent,
            )


def _starts_at_ln_2(series: Sequence[Series]) -> bool:
    """Whether the loss starts at ln 2: not on another scale, and not without a reference."""
    return abs(float(series[-1].y[0]) - _LN_2) < 0.02


def held_out_charts(logs: RunLogs) -> list[Chart]:
    """Margins, log-prob gaps before and after, and reward against length, pair by pair."""
    if not logs.held_out or logs.beta is None or not logs.held_out[-1]["row"]:
        return []
    before, after = logs.held_out
    lines = [after] if before["step"] == after["step"] else [after, before]
    rewards = [pair_rewards(line, logs.beta) for line in lines]
    margins = [sides["chosen"] - sides["rejected"] for sides in rewards]
    gaps = [
        np.subtract(line["policy_chosen_logps"], line["policy_rejected_logps"]) for line in lines
    ]
    # With a reference all margins before training are 0: one line shows them better than one bar.
    started_at_0 = len(margins) == 2 and not margins[1].any()
    before_said = (
        "Before training the margin of every pair was 0, by definition: the policy was the "
        "reference. "
    )
    return [
        Chart(
            title="Reward margins, pair by pair",
            note=f"After step {after['step']}. {before_said if started_at_0 else ''}"
            "Left of 0 are the pairs ranked wrong.",
            series=_histograms(margins[:1] if started_at_0 else margins),
            x_label="reward margin",
            mark=(0.0, "before: 0" if started_at_0 else ""),
        ),
        Chart(
            title="Chosen against rejected",
            note="Log-prob of chosen minus log-prob of rejected under the policy alone, nats. "
            "Right of 0 the policy would rather write the chosen answer.",
            series=_histograms(gaps),
            x_label="nats",
            mark=(0.0, ""),
        ),
        _reward_against_length(after, rewards[0]),
    ]


def pair_rewards(line: Line, beta: float) -> dict[str, np.ndarray]:
    """Implicit rewards of chosen and rejected, (pairs,) each, from a line of held_out.jsonl."""
    return {
        side: beta * np.subtract(line[f"policy_{side}_logps"], line[f"ref_{side}_logps"])
        for side in ("chosen", "rejected")
    }


def _histograms(groups: Sequence[np.ndarray]) -> list[Series]:
    """Counts of the values after training, and before if given, in the same bins."""
    everything = np.concatenate(groups)
    everything = everything[np.isfinite(everything)]
    edges = np.histogram_bin_edges(everything, bins=min(30, 5 + len(everything) // 5))
    looks = (("after", "held-out", "-"), ("before", "ink", "--"))
    series = []
    for (name, colour, line), values in zip(looks, groups, strict=False):
        counts = np.histogram(values, edges)[0].tolist()
        series.append(
            Series(
                name=name,
                colour=colour,
                line=line,
                x=((edges[:-1] + edges[1:]) / 2).tolist(),
                y=counts,
                at=[f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)],
                text=[f"{count} pair{'s' * (count != 1)}" for count in counts],
                edges=edges.tolist(),
            )
        )
    return series


def _reward_against_length(line: Line, rewards: dict[str, np.ndarray]) -> Chart:
    total = len(line["row"])
    shown = spread(total, MAX_SCATTERED)
    series = []
    for side, marker in (("chosen", "o"), ("rejected", "s")):
        lengths = [line[f"{side}_lengths"][i] for i in shown]
        values = [float(rewards[side][i]) for i in shown]
        series.append(
            Series(
                name=side,
                colour=side,
                line="",
                marker=marker,
                x=lengths,
                y=values,
                at=[
                    f"row {line['row'][i]}, {n:g} tokens"
                    for i, n in zip(shown, lengths, strict=True)
                ],
                text=[shown_number(value) for value in values],
            )
        )
    thinned = "" if len(shown) == total else f" {len(shown)} of {total} pairs, evenly over them."
    return Chart(
        title="Reward against length",
        note="One point an answer. A slope means that length itself is rewarded." + thinned,
        series=series,
        x_label="tokens",
        pick="point",
        level=(0.0, ""),
    )
