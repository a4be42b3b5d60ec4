"""A table of text: for the terminal, where its columns are aligned, and for the report."""

from collections.abc import Sequence
from dataclasses import dataclass

Cells = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What the terminal shows with its columns aligned, and the report as a table.

    Attributes:
        rows: cells; the first row is the head, the first column names the others.
        lead, notes: what stands above and below.
        text: instead of rows, a table as another program printed it.
    """

    rows: Sequence[Cells] = ()
    lead: str = ""
    notes: Sequence[str] = ()
    text: str = ""

    def __str__(self) -> str:
        lead = f"{self.lead}\n" if self.text else f"{self.lead}\n\n" if self.lead else ""
        return lead + "\n".join([self.text or _align(self.rows), *self.notes]) + "\n"


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
