"""What happened to the rows: every cut, drop and oddity counted, with row numbers.

Written to `data_report.json` and summarised in the run header. Rows read are rows kept plus rows
dropped, always.
"""

from dataclasses import dataclass, field
from typing import Any

RowName = int | str  # the row's number, or "source:number" when there are several sources
MAX_ROWS_NAMED = 1000  # per reason; the count is always whole


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

    `dropped`: by reason. `cut`: shortened to fit. `noted`: kept as they are, but worth knowing.
    """

    rows_read: int = 0
    pairs_kept: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, Tally] = field(default_factory=dict)
    cut: dict[str, Tally] = field(default_factory=dict)
    noted: dict[str, Tally] = field(default_factory=dict)

    def drop(self, reason: str, row: RowName) -> None:
        """This row is not trained on."""
        self.dropped.setdefault(reason, Tally()).add(row)

    def shorten(self, what: str, row: RowName) -> None:
        """This row lost tokens."""
        self.cut.setdefault(what, Tally()).add(row)

    def note(self, what: str, row: RowName) -> None:
        """This row is kept whole, but something about it was unusual."""
        self.noted.setdefault(what, Tally()).add(row)

    @property
    def num_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(tally.count for tally in self.dropped.values())

    def report(self) -> dict[str, Any]:
        """As JSON: `{"rows_read": n, "pairs_kept": n, "dropped": {reason: {"count", "rows"}}, ...}`."""
        assert self.rows_read == self.pairs_kept + self.num_dropped
        tallies = {
            name: {what: vars(tally) for what, tally in getattr(self, name).items()}
            for name in ("dropped", "cut", "noted")
        }
        counts = {"rows_read": self.rows_read, "pairs_kept": self.pairs_kept}
        return {**counts, "formats": self.formats, **tallies}

    @staticmethod
    def from_report(report: dict[str, Any]) -> "Audit":
        """The inverse of `report`."""
        tallies = {
            name: {what: Tally(**tally) for what, tally in report[name].items()}
            for name in ("dropped", "cut", "noted")
        }
        return Audit(report["rows_read"], report["pairs_kept"], report["formats"], **tallies)

    def summary(self) -> str:
        """One line for the run header."""
        parts = [f"{self.pairs_kept} of {self.rows_read} rows kept"]
        for verb, tallies in (("dropped", self.dropped), ("cut", self.cut), ("noted", self.noted)):
            if tallies:
                what = ", ".join(f"{tally.count} {name}" for name, tally in tallies.items())
                parts.append(f"{verb}: {what}")
        return "; ".join(parts)
