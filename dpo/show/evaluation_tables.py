"""The figures of an evaluation as text, for a terminal."""

from collections.abc import Sequence
from typing import Any

from dpo.show.held_out import QUANTILES


def held_out_table(held_out: dict[str, Any]) -> str:
    """All pairs, one figure a line; then the groups, one a line."""
    f = held_out["all"]
    against = "the reference" if held_out["has_reference"] else "the model before training"
    quantiles = "  ".join(f"{f['reward_margin_quantiles'][f'{q}%']:.3f}" for q in QUANTILES)
    lines: list[tuple[str, ...]] = [
        (f"{f['pairs']} pairs", "before", "after", "95 % interval, or error"),
        ("reward accuracy", "", _share(f["reward_accuracy"]), _interval(f["reward_accuracy_95"])),
        ("  at equal lengths", "", _share(f["reward_accuracy_length_controlled"]), ""),
        ("reward margin", "", f"{f['reward_margin']:.3f}", _error(f["reward_margin_se"], 3)),
        (
            "ranking accuracy, without reference",
            _share(f["ranking_accuracy_before"]),
            _share(f["ranking_accuracy"]),
            _interval(f["ranking_accuracy_95"]),
        ),
        (
            "  per token",
            _share(f["ranking_accuracy_per_token_before"]),
            _share(f["ranking_accuracy_per_token"]),
            "",
        ),
        *(
            (
                f"log-prob of {side}, nats, change",
                "",
                f"{f[f'logp_{side}_change']:+.2f}",
                _error(f[f"logp_{side}_change_se"], 2),
            )
            for side in ("chosen", "rejected")
        ),
        ("  chosen answers that lost log-prob", "", _share(f["chosen_fell"]), ""),
        (f"KL to {against}, nats per answer", "", _number(f["kl"], 2), _error(f["kl_se"], 2)),
    ]
    note = (
        ""
        if held_out["has_reference"]
        else "\nThe run had no reference: its rewards are beta x log-prob of the policy alone."
    )
    percents = ", ".join(map(str, QUANTILES))
    return (
        f"Pairs {held_out['rows']}.\n\n{_align(lines)}\n"
        f"reward margin, quantiles {percents} %: {quantiles}\n"
        f"KL over {f['kl_answers']} answers sampled from the policy at temperature 1.{note}\n\n"
        f"{_group_table(held_out)}\n"
    )


def _group_table(held_out: dict[str, Any]) -> str:
    head = "accuracy|equal length|margin|ranking: before|after|chosen|rejected|fell|KL".split("|")
    lines: list[tuple[str, ...]] = [("by group", "pairs", *head)]
    for kind in ("by_source", "by_length", "by_longer"):
        for name, f in held_out.get(kind, {}).items():
            shares = (
                _share(f[k]) for k in ("reward_accuracy", "reward_accuracy_length_controlled")
            )
            ranking = (_share(f[f"ranking_accuracy{k}"]) for k in ("_before", ""))
            changes = (f"{f[f'logp_{side}_change']:+.2f}" for side in ("chosen", "rejected"))
            end = (_share(f["chosen_fell"]), _number(f["kl"], 2))
            margin = f"{f['reward_margin']:.3f}"
            lines.append((name, str(f["pairs"]), *shares, margin, *ranking, *changes, *end))
    return _align(lines)


def win_rate_table(f: dict[str, Any]) -> str:
    """Win rate, lengths, and where the answers can be read."""
    counts = f"{f['wins']} won, {f['ties']} tied, {f['losses']} lost"
    lines: list[tuple[str, ...]] = [
        (f"{f['prompts']} prompts, judge {f['judge']}", "base", "policy", "95 % interval"),
        ("win rate, ties half", "", _share(f["win_rate"]), _interval(f["win_rate_95"])),
        ("  at equal lengths", "", _share(f["win_rate_length_controlled"]), ""),
    ]
    if "exact_match_base" in f:
        rights = (_share(f[f"exact_match_{side}"]) for side in ("base", "policy"))
        lines.append(("answers right", *rights, ""))
    lengths = (f"{f[f'length_{side}']:.1f}" for side in ("base", "policy"))
    lines.append(("answer length, tokens", *lengths, ""))
    lines.append(("answers cut at max_new_tokens", str(f["cut_base"]), str(f["cut_policy"]), ""))
    unclear = f["unreadable_verdicts"]
    note = f"; {unclear} verdicts could not be read and are left out" if unclear else ""
    return f"{_align(lines)}\n{counts}{note}. To read: {f['judged_answers']}\n"


def harness_table(harness: dict[str, Any]) -> str:
    """lm-eval's own tables, then base and policy side by side."""
    lines: list[tuple[str, ...]] = [
        ("task", "metric", "base", "policy", "difference", "its error", "documents")
    ]
    for row in harness["rows"]:
        error = _number(row["difference_se"], 4) + ("" if row["is_paired"] else " (unpaired)")
        scores = (f"{row[side]:.4f}" for side in ("base", "policy"))
        difference = f"{row['difference']:+.4f}"
        documents = str(row["documents"])
        lines.append((row["task"], row["metric"], *scores, difference, error, documents))
    tables = (f"lm-eval, {side}:\n{harness['tables'][side]}" for side in ("base", "policy"))
    return "\n".join([*tables, _align(lines), ""])


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _error(value: float | None, digits: int) -> str:
    return "-" if value is None else f"± {value:.{digits}f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1%} to {bounds[1]:.1%}"
