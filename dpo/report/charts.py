"""What charts show: series of points, also in words. `dpo.report.drawing` draws them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Numbers = Sequence[int | float]

MAX_POINTS = 400  # of one series; longer ones are thinned out

# Seven hues that colour-blind readers can tell apart (after Okabe and Ito 2008) and five markers:
# 35 runs before a pair repeats. `RUN_LINES` cycles beside them.
RUN_COLOURS = tuple(f"run-{i}" for i in range(7))
MARKERS = {
    "o": "M5 1a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "s": "M1.5 1.5h7v7h-7z",
    "^": "M5 1l4.5 8h-9z",
    "D": "M5 .3l4.7 4.7-4.7 4.7L.3 5z",
    "v": "M5 9L.5 1h9z",
}  # by matplotlib's name: its outline in a box of 10 x 10, for the legend
RUN_LINES = ("-", "--", ":", "-.")
DASHES = {"-": "", "--": "6 3", ":": "1.5 2.5", "-.": "6 3 1.5 3", "": ""}


def shown_number(value: int | float, *, percent: bool = False) -> str:
    """Four significant digits, or per cent with one decimal."""
    return f"{value:.1%}" if percent else f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind.

    Attributes:
        name: for the legend; series of one name share an entry.
        colour: a CSS variable's name without its `--`.
        x, y: one number a point.
        at, text: x and y of each point in words, shown when a reader points at it.
        line: matplotlib's line style; "" for points alone.
        marker: one of `MARKERS`, or "" for a line alone.
        band: lowest and highest y around each point, if a point is the mean of several.
        edges: one more than the points; the series is then drawn as the bars between them.
    """

    name: str
    colour: str
    x: Numbers
    y: Numbers
    at: Sequence[str]
    text: Sequence[str]
    line: str = "-"
    marker: str = ""
    band: tuple[Numbers, Numbers] | None = None
    edges: Numbers = ()

    @property
    def dashes(self) -> str:
        """The line style as SVG's stroke-dasharray, for the legend."""
        return DASHES[self.line]

    @property
    def outline(self) -> str:
        """The marker as an SVG path, for the legend."""
        return MARKERS.get(self.marker, "")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn, and what is said about it.

    Attributes:
        title, note: what the chart shows, and how to read it.
        series: at least one, each with at least one point.
        x_label: below the axis.
        percent: y is a share.
        level: (y, text) of a horizontal line to compare with.
        mark: (x, text) of a vertical one.
        pick: what pointing at the chart selects: the nearest x, with the nearest point of every
            series; or a single point.
        symlog_x: the x axis is logarithmic, but linear around 0.
    """

    title: str
    series: Sequence[Series]
    note: str = ""
    x_label: str = "step"
    percent: bool = False
    level: tuple[int | float, str] | None = None
    mark: tuple[int | float, str] | None = None
    pick: Literal["x", "point"] = "x"
    symlog_x: bool = False

    @property
    def legend(self) -> list[Series]:
        """One series for each name."""
        return list({series.name: series for series in self.series}.values())

    @property
    def summary(self) -> str:
        """The ends of every line in words, for those who do not see the drawing."""
        return " ".join(
            f"{each.name}: {each.text[0]} at {each.at[0]}, {each.text[-1]} at {each.at[-1]}."
            for each in self.series[:12]
            if self.pick == "x" and not len(each.edges)
        )


def curve(
    steps: Numbers,
    values: Numbers,
    *,
    name: str,
    colour: str,
    line: str = "-",
    marker: str = "",
    percent: bool = False,
) -> Series:
    """A metric over steps; beyond `MAX_POINTS` the mean of each bucket, with its extremes.

    Buckets hold equally many logged values; their band runs from the smallest to the largest, so
    that no outlier disappears.
    """
    if len(steps) <= MAX_POINTS:
        return Series(
            name=name,
            colour=colour,
            line=line,
            marker=marker or ("o" if len(steps) == 1 else ""),
            x=steps,
            y=values,
            at=[f"step {step:.0f}" for step in steps],
            text=[shown_number(value, percent=percent) for value in values],
        )
    x_buckets = np.array_split(np.asarray(steps, dtype=float), MAX_POINTS // 2)
    y_buckets = np.array_split(np.asarray(values, dtype=float), MAX_POINTS // 2)
    means, low, high = ([float(f(b)) for b in y_buckets] for f in (np.mean, np.min, np.max))
    return Series(
        name=name,
        colour=colour,
        line=line,
        marker=marker,
        x=[float(bucket[[0, -1]].mean()) for bucket in x_buckets],
        y=means,
        at=[f"steps {bucket[0]:.0f} to {bucket[-1]:.0f}" for bucket in x_buckets],
        text=[
            f"{shown_number(mean, percent=percent)} "
            f"({shown_number(least, percent=percent)} to {shown_number(most, percent=percent)})"
            for mean, least, most in zip(means, low, high, strict=True)
        ],
        band=(low, high),
    )
