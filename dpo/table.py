"""A table of text: for the terminal, where its columns are aligned, and for the report."""

from collections.abc import Sequence
from dataclasses import dataclass

Cells = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table that the terminal prints with aligned columns, and the report as HTML.

    Attributes:
        rows: cells; the first row is the head, the first column names the others.
        lead, notes: the text above and below the table.
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
    """Pads columns to their widest cell; the first is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
