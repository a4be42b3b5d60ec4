"""What happened to the rows: every cut, drop and oddity counted, with row numbers.

The counts are written to `data_report.json` and summarised in the run header. Rows read are rows
kept plus rows dropped, always.
"""

from dataclasses import dataclass, field
from typing import Any

RowName = int | str  # the row's number, or "source:number" when there are several sources
MAX_ROWS_NAMED = 1000  # per reason; the count has no limit
_TALLIES = ("dropped", "cut", "noted")


@dataclass
class Tally:
    """How often something happened, and to which rows (the first MAX_ROWS_NAMED of them)."""

    count: int = 0
    rows: list[RowName] = field(default_factory=list)

    def add(self, row: RowName) -> None:
        """Counts one row."""
        self.count += 1
        if len(self.rows) < MAX_ROWS_NAMED:
            self.rows.append(row)


@dataclass
class Audit:
    """Counts over one set of rows.

    `dropped`: by reason. `cut`: kept, but shortened to fit. `noted`: kept, but worth knowing.
    """

    rows_read: int = 0
    pairs_kept: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, Tally] = field(default_factory=dict)
    cut: dict[str, Tally] = field(default_factory=dict)
    noted: dict[str, Tally] = field(default_factory=dict)

    def drop(self, reason: str, row: RowName) -> None:
        """Counts a row that is not trained on."""
        self.dropped.setdefault(reason, Tally()).add(row)

    def shorten(self, what: str, row: RowName) -> None:
        """Counts a row that lost tokens."""
        self.cut.setdefault(what, Tally()).add(row)

    def note(self, what: str, row: RowName) -> None:
        """Counts a row about which something is unusual."""
        self.noted.setdefault(what, Tally()).add(row)

    def absorb(self, other: "Audit", source: str = "") -> None:
        """Adds the counts of another set; given a source, its rows are named "source:number"."""
        self.rows_read += other.rows_read
        self.pairs_kept += other.pairs_kept
        self.formats |= other.formats
        for name in _TALLIES:
            for what, tally in getattr(other, name).items():
                mine = getattr(self, name).setdefault(what, Tally())
                rows = [f"{source}:{row}" for row in tally.rows] if source else tally.rows
                mine.count += tally.count
                mine.rows += rows[: MAX_ROWS_NAMED - len(mine.rows)]

    @property
    def num_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(tally.count for tally in self.dropped.values())

    def report(self) -> dict[str, Any]:
        """As JSON: `{"rows_read": n, "pairs_kept": n, "dropped": {reason: {"count": n, ...}}}`."""
        assert self.rows_read == self.pairs_kept + self.num_dropped
        tallies = {
            name: {what: vars(tally) for what, tally in getattr(self, name).items()}
            for name in _TALLIES
        }
        counts = {"rows_read": self.rows_read, "pairs_kept": self.pairs_kept}
        return {**counts, "formats": self.formats, **tallies}

    @staticmethod
    def from_report(report: dict[str, Any]) -> "Audit":
        """The inverse of `report`."""
        tallies = {
            name: {what: Tally(**tally) for what, tally in report[name].items()}
            for name in _TALLIES
        }
        return Audit(report["rows_read"], report["pairs_kept"], report["formats"], **tallies)

    def summary(self) -> str:
        """One line for the run header."""
        parts = [f"{self.pairs_kept} of {self.rows_read} rows kept"]
        if self.formats:
            parts.append(f"format {', '.join(sorted(set(self.formats.values())))}")
        for name in _TALLIES:
            if tallies := getattr(self, name):
                what = ", ".join(f"{tally.count} {reason}" for reason, tally in tallies.items())
                parts.append(f"{name}: {what}")
        return "; ".join(parts)
