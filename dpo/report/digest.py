"""What a run's report says in words and tables."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpo.catalogue import Metric, metric
from dpo.config import Config
from dpo.evaluate.diagnostics import Finding, diagnose
from dpo.report.charts import shown_number
from dpo.report.length_bias import length_bias
from dpo.report.logs import RunLogs
from dpo.run_folder import Line

SAMPLES_SHOWN = 3  # of each kind

# The rows of the table of before and after.
_BEFORE_AND_AFTER = (
    "eval/exact_match eval/rewards/accuracies eval/ranking_accuracy eval/rewards/margins eval/loss "
    "eval/kl eval/lengths/generated eval/logps/chosen eval/logps/rejected"
).split()


@dataclass(frozen=True)
class BeforeAndAfter:
    """One held-out metric before and after training, as text."""

    metric: Metric
    before: str
    after: str
    change: str


def before_and_after(logs: RunLogs) -> list[BeforeAndAfter]:
    """The held-out metrics that the run has, before and after training."""
    if len(logs.evaluations) < 2:
        return []
    before, after = logs.evaluations[0], logs.evaluations[-1]
    return [
        BeforeAndAfter(
            entry,
            format(before[name], entry.format),
            format(after[name], entry.format),
            _change(after[name] - before[name], entry),
        )
        for name, entry in ((name, metric(name)) for name in _BEFORE_AND_AFTER)
        if name in before and name in after
    ]


def _change(difference: int | float, entry: Metric) -> str:
    if entry.is_share:
        return f"{100 * difference:+.1f} points"
    return format(difference, f"+{entry.format}")


def about(logs: RunLogs) -> list[str]:
    """Model, rows, loss and length of the run, as far as they are known."""
    model, data, loss = (logs.config.get(section, {}) for section in ("model", "data", "loss"))
    parts = [model.get("name_or_path", ""), shown(data.get("name_or_path", ""))]
    if logs.beta is not None:
        parts.append(f"{_loss_name(loss['type'])} loss, beta {logs.beta:g}")
    if logs.metrics:
        last = max(line["step"] for line in logs.metrics)
        parts.append(f"{last} step{'s' * (last != 1)}")
    return [part for part in parts if part]


def _loss_name(loss: Any) -> str:
    if isinstance(loss, list):
        return " + ".join(f"{part.get('weight', 1.0):g} {part['type']}" for part in loss)
    return str(loss)


def shown(value: Any) -> str:
    """A configured value in one line."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return " ".join(f"{key} {shown(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def verdict(logs: RunLogs) -> str:
    """The result in a sentence: judged by right answers if known, else by held-out pairs."""
    if len(logs.evaluations) >= 2:
        return _held_out_verdict(logs, logs.evaluations[0], logs.evaluations[-1])
    _, losses = logs.values("train/loss")
    if not losses:
        return "Nothing has been logged yet."
    first, last = shown_number(losses[0]), shown_number(losses[-1])
    return (
        "No held-out pair was scored before and after, so this can only say how the training "
        f"pairs were fitted: the loss went from {first} to {last}."
    )


def _held_out_verdict(logs: RunLogs, before: Line, after: Line) -> str:
    """The verdict of a run with evaluations; two standard errors make a difference count."""
    accuracy, pairs = after["eval/rewards/accuracies"], logs.data_report.get("pairs_held_out", 0)
    ranks = f"the rewards rank {accuracy:.1%} of {pairs or 'the'} held-out pairs as labelled"
    away = ""
    if "eval/kl" in after:
        away = f"; the policy is {after['eval/kl']:.2f} nats of KL per answer from its reference"
    if "eval/exact_match" in before and "eval/exact_match" in after:
        asked = sum(line["step"] == after["step"] for line in logs.samples) or 1
        return _verdict_by_truth(logs.evaluations, asked) + f" {ranks.capitalize()}{away}."
    if not _has_reference(logs):
        ranked, was = after["eval/ranking_accuracy"], before["eval/ranking_accuracy"]
        return (
            f"Trained without a reference: the policy ranks {ranked:.1%} of {pairs or 'the'} "
            f"held-out pairs as labelled, {was:.1%} before training."
        )
    if abs(accuracy - 0.5) <= 2 * math.sqrt(0.25 / (pairs or 1)):
        return f"No clear sign that the preference was learned: {ranks}, and chance is 50%{away}."
    learned = "The policy learned the preference" if accuracy > 0.5 else "It learned the opposite"
    return f"{learned}: {ranks}, where chance is 50%{away}."


def _verdict_by_truth(evaluations: list[Line], asked: int) -> str:
    """Judges by the share of right answers to `asked` prompts; names an earlier, better step."""
    key = "eval/exact_match"
    old, new = evaluations[0][key], evaluations[-1][key]
    best = max(evaluations, key=lambda line: line[key])
    clear = "better" if new > old else "worse"
    became = clear if _differ(old, new, asked) else "neither clearly better nor worse"
    was_better = f" At step {best['step']} it had been {best[key]:.1%}."
    return (
        f"The policy became {became}: {new:.1%} of its answers to held-out prompts are right, "
        f"{old:.1%} before training.{was_better if _differ(best[key], new, asked) else ''}"
    )


def _differ(one: float, other: float, count: int) -> bool:
    """Whether two shares of `count` differ by more than two standard errors."""
    return abs(one - other) > 2 * math.sqrt((one * (1 - one) + other * (1 - other)) / count)


def findings(logs: RunLogs) -> list[Finding]:
    """The warnings that follow from the metrics, and from the lengths of the answers."""
    is_plain = _has_reference(logs) and "moves" not in logs.rewards
    beta = logs.beta if is_plain else None
    return [*diagnose(logs.metrics, beta), *length_bias(logs)]


def _has_reference(logs: RunLogs) -> bool:
    is_zero = logs.config.get("reference", {}).get("mode") == "zero"
    return not is_zero and "without a reference" not in logs.rewards


def token_pairs(logs: RunLogs) -> tuple[list[Line], float]:
    """Pairs with their answers as (text, reward, strength from -1 to 1), and the scale's end.

    The scale ends at the 98th percentile of the absolute rewards, since one outlier would make all
    others look like 0. A piece without text, such as half a character, is added to the next one, so
    the rewards still add up.
    """
    rewards = [
        abs(reward)
        for pair in logs.token_rewards
        for side in ("chosen", "rejected")
        for reward in pair[side]["rewards"]
        if reward is not None
    ]
    end = float(np.quantile(rewards, 0.98)) if rewards else 0.0
    pairs = []
    for pair in logs.token_rewards:
        answers = {side: _answer(pair[side], end) for side in ("chosen", "rejected")}
        pairs.append({**pair, **answers})
    return pairs, end


def _answer(answer: Line, end: float) -> dict[str, Any]:
    pieces: list[tuple[str, float | None, float]] = []
    held: list[float] = []
    for text, reward in zip(answer["tokens"], answer["rewards"], strict=True):
        held += [] if reward is None else [reward]
        if text:
            total = sum(held) if held else None
            strength = max(-1.0, min(1.0, (total or 0.0) / end)) if end else 0.0
            pieces.append((text, total, strength))
            held = []
    if held:
        pieces.append(("\N{REPLACEMENT CHARACTER}", sum(held), 0.0))
    return {"pieces": pieces, "sum": sum(r for r in answer["rewards"] if r is not None)}


def samples_by_kind(logs: RunLogs) -> list[dict[str, Any]]:
    """Prompts with the answers of the first and the last evaluation, some of each kind.

    Where one answer is right, the kinds are broken, still wrong, fixed and right both times; else
    there is one kind. Each: `{"name", "count", "rows": [(before, after), ...]}`.
    """
    if not logs.samples:
        return []
    first, last = logs.samples[0]["step"], logs.samples[-1]["step"]
    before = {line["index"]: line for line in logs.samples if line["step"] == first}
    after = [line for line in logs.samples if line["step"] == last and line["index"] in before]
    rows = [(before[line["index"]], line) for line in after]
    if not logs.has_one_right_answer:
        return [{"name": "", "count": len(rows), "rows": rows[: 3 * SAMPLES_SHOWN]}]
    kinds = (
        ("Right before, wrong now", True, False),
        ("Wrong before and now", False, False),
        ("Wrong before, right now", False, True),
        ("Right before and now", True, True),
    )
    return [
        {"name": name, "count": len(of_kind), "rows": of_kind[:SAMPLES_SHOWN]}
        for name, was, is_now in kinds
        if (
            of_kind := [
                row for row in rows if (row[0]["is_right"], row[1]["is_right"]) == (was, is_now)
            ]
        )
    ]


def changed_keys(logs: RunLogs) -> list[tuple[str, str, str]]:
    """(key, value, default) of every key that does not have its default."""
    defaults = asdict(Config())
    return [
        (f"{section}.{key}", shown(value), shown(defaults.get(section, {}).get(key)))
        for section, keys in logs.config.items()
        for key, value in keys.items()
        if value != defaults.get(section, {}).get(key)
    ]


def measured_weights(logs: RunLogs) -> str:
    """Which weights dpo evaluate measured, and whether they are the same for every part."""
    folders = {part: f"{results['weights']}/" for part, results in logs.measured.items()}
    sums = [results["sha256"] for results in logs.measured.values()]
    if any(other != sums[0] for other in sums):
        each = ", ".join(f"{part} with those in {folder}" for part, folder in folders.items())
        return f"dpo evaluate measured the parts with different weights: {each}."
    same = " and ".join(dict.fromkeys(folders.values()))
    return f"What dpo evaluate measured, with the weights in {same}."


def audits(report: Line) -> list[tuple[str, Line, list[tuple[str, str, int, Sequence[Any]]]]]:
    """(whose rows, counts, [(what happened, why, count, row numbers)]) for each audited source."""
    sources = [("Training rows", report)] if report else []
    if "held_out_source" in report:
        sources.append(("Held-out rows", report["held_out_source"]))
    return [
        (
            name,
            source,
            [
                (tally, why, entry["count"], entry["rows"])
                for tally in ("dropped", "cut", "noted")
                for why, entry in source.get(tally, {}).items()
            ],
        )
        for name, source in sources
    ]
