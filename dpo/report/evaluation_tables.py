"""The results of dpo evaluate as tables of text, for the terminal and the report."""

from collections.abc import Iterator, Sequence
from typing import Any

from dpo.evaluate.statistics import QUANTILES
from dpo.table import Cells, Table


def evaluation_tables(measured: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """The tables of each part that dpo evaluate measured."""
    tables = {"held_out": held_out_tables, "win_rate": win_rate_tables, "lm_eval": harness_tables}
    for part, results in measured.items():
        yield from tables[part](results)


def held_out_tables(held_out: dict[str, Any]) -> Iterator[Table]:
    """A table of all pairs, with a statistic in each row; then one with a group in each row."""
    f = held_out["all"]
    against = "the reference" if held_out["has_reference"] else "the model before training"
    quantiles = "  ".join(f"{f['reward_margin_quantiles'][f'{q}%']:.3f}" for q in QUANTILES)
    rows: list[Cells] = [
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
    percents = ", ".join(map(str, QUANTILES))
    notes = [
        f"reward margin, quantiles {percents} %: {quantiles}",
        f"KL over {f['kl_answers']} answers sampled from the policy at temperature 1.",
    ]
    if not held_out["has_reference"]:
        notes += ["The run had no reference: its rewards are beta x log-prob of the policy alone."]
    yield Table(rows, f"Pairs {held_out['rows']}.", notes)
    yield Table(list(_group_rows(held_out)))


def _group_rows(held_out: dict[str, Any]) -> Iterator[Cells]:
    head = "accuracy|equal length|margin|ranking: before|after|chosen|rejected|fell|KL".split("|")
    yield ("by group", "pairs", *head)
    for kind in ("by_source", "by_length", "by_longer"):
        for name, f in held_out.get(kind, {}).items():
            shares = (
                _share(f[k]) for k in ("reward_accuracy", "reward_accuracy_length_controlled")
            )
            ranking = (_share(f[f"ranking_accuracy{k}"]) for k in ("_before", ""))
            changes = (f"{f[f'logp_{side}_change']:+.2f}" for side in ("chosen", "rejected"))
            end = (_share(f["chosen_fell"]), _number(f["kl"], 2))
            margin = f"{f['reward_margin']:.3f}"
            yield (name, str(f["pairs"]), *shares, margin, *ranking, *changes, *end)


def win_rate_tables(f: dict[str, Any]) -> Iterator[Table]:
    """The win rate, the lengths, and where the answers can be read."""
    counts = f"{f['wins']} won, {f['ties']} tied, {f['losses']} lost"
    rows: list[Cells] = [
        (f"{f['prompts']} prompts, judge {f['judge']}", "base", "policy", "95 % interval"),
        ("win rate, ties half", "", _share(f["win_rate"]), _interval(f["win_rate_95"])),
        ("  at equal lengths", "", _share(f["win_rate_length_controlled"]), ""),
    ]
    if "exact_match_base" in f:
        rights = (_share(f[f"exact_match_{side}"]) for side in ("base", "policy"))
        rows.append(("answers right", *rights, ""))
    lengths = (f"{f[f'length_{side}']:.1f}" for side in ("base", "policy"))
    rows.append(("answer length, tokens", *lengths, ""))
    rows.append(("answers cut at max_new_tokens", str(f["cut_base"]), str(f["cut_policy"]), ""))
    unclear = f["unreadable_verdicts"]
    note = f"; {unclear} verdicts could not be had or read, and are left out" if unclear else ""
    yield Table(rows, notes=[f"{counts}{note}. To read: {f['judged_answers']}"])


def harness_tables(harness: dict[str, Any]) -> Iterator[Table]:
    """lm-eval's own tables, then base and policy side by side."""
    for side in ("base", "policy"):
        yield Table(lead=f"lm-eval, {side}:", text=harness["tables"][side].rstrip())
    rows: list[Cells] = [
        ("task", "metric", "base", "policy", "difference", "its error", "documents")
    ]
    for row in harness["rows"]:
        error = _number(row["difference_se"], 4) + ("" if row["is_paired"] else " (unpaired)")
        scores = (f"{row[side]:.4f}" for side in ("base", "policy"))
        difference = f"{row['difference']:+.4f}"
        documents = str(row["documents"])
        rows.append((row["task"], row["metric"], *scores, difference, error, documents))
    yield Table(rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _error(value: float | None, digits: int) -> str:
    return "-" if value is None else f"± {value:.{digits}f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1%} to {bounds[1]:.1%}"
