"""Figures in JSON as tables for a page, whatever their names.

evaluation.json has what its script was asked for, and this need not know what that can be.

Conventions that it reads: `x_95` is the interval of `x`, `x_se` its standard error, `x_quantiles`
are figures of one cell; accuracies, rates and the like are shares; a dictionary of dictionaries is
one table, a column each.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo.show.report.charts import number

_SHARES = re.compile(r"accuracy|rate\b|exact_match|fell|share")
_APART = ("_95", "_se")  # written into the figure that they belong to


@dataclass(frozen=True)
class Table:
    """A table of text, or a text of several lines.

    Attributes:
        title: where in the JSON it stands, in words.
        columns: the names after that of the first column; none where `text` stands instead.
        rows: name and cells of each row.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    text: str = ""


def json_tables(value: Any, title: str = "") -> Iterator[Table]:
    """Every figure of a JSON value, top down."""
    if isinstance(value, str):
        yield Table(title, [], [], value)
    elif isinstance(value, list):
        names = list(dict.fromkeys(name for row in value for name in row))
        rows = [
            (str(i), [_cell(row, name) if name in row else "" for name in names])
            for i, row in enumerate(value, 1)
        ]
        yield Table(title, [words(name) for name in names], rows)
    elif _is_table(value):
        names = list(dict.fromkeys(name for part in value.values() for name in part))
        rows = [
            (words(name), [_cell(part, name) if name in part else "" for part in value.values()])
            for name in names
            if not name.endswith(_APART)
        ]
        yield Table(title, list(value), rows)
    else:
        nested = _nested(value)
        flat = [name for name in value if name not in nested and not name.endswith(_APART)]
        if flat:
            yield Table(title, ["Value"], [(words(name), [_cell(value, name)]) for name in flat])
        for name in nested:
            yield from json_tables(value[name], _join(title, name))


def _is_table(value: dict[str, Any]) -> bool:
    """Whether it holds dictionaries of figures only: its columns."""
    parts = list(value.values())
    are_columns = all(isinstance(part, dict) for part in parts)
    return bool(parts) and are_columns and not any(_nested(part) for part in parts)


def _nested(value: dict[str, Any]) -> list[str]:
    """Keys whose values need a table, or lines, of their own."""
    return [
        name
        for name, part in value.items()
        if (isinstance(part, dict) and not name.endswith("_quantiles"))
        or (isinstance(part, list) and part and all(isinstance(row, dict) for row in part))
        or (isinstance(part, str) and "\n" in part)
    ]


def _cell(row: dict[str, Any], name: str) -> str:
    value, percent = row[name], bool(_SHARES.search(name))
    text = _leaf(value, percent)
    if name + "_95" in row and value is not None:
        low, high = (_leaf(end, percent) for end in row[name + "_95"])
        return f"{text} ({low} to {high})"
    if row.get(name + "_se") is not None and value is not None:
        return f"{text} \N{PLUS-MINUS SIGN} {_leaf(row[name + '_se'], percent)}"
    return text


def _leaf(value: Any, percent: bool) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_leaf(part, percent)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_leaf(part, percent) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, percent=percent and 0 <= value <= 1)
    return "none" if value is None else str(value)


def words(name: str) -> str:
    """A key as a heading: chosen_fell is Chosen fell."""
    spoken = name.replace("_", " ").replace("logp ", "log-prob of ")
    return re.sub(r"\bkl\b", "KL", spoken[:1].upper() + spoken[1:], flags=re.IGNORECASE)


def _join(title: str, name: str) -> str:
    return f"{title}: {words(name)}" if title else words(name)
