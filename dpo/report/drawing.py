"""Charts as SVG for a page: drawn by matplotlib, coloured by the page, read out by its script.

matplotlib draws in sentinel colours, and each is replaced by a CSS variable: one file then serves
light and dark mode. Text stays text. Where every point lies is written beside the drawing, so that
the page's script needs no arithmetic but "which is nearest" to show values.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from dpo.report.charts import RUN_COLOURS, Chart, Series

WIDTH, HEIGHT = 420, 250  # px; the page scales it
LINEAR_BELOW = 0.1  # nats, on a symlog axis: a KL over 200 answers is hardly more precise
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 38  # px around the axes, the same for every chart

_COLOURS = ("ink", "muted", "rule", "train", "held-out", "chosen", "rejected", *RUN_COLOURS)
_SENTINELS = {name: f"#abc{i:03x}" for i, name in enumerate(_COLOURS)}


@dataclass(frozen=True)
class Drawing:
    """A chart, its SVG, and for the page's script its points in per cent of width and height."""

    key: str
    chart: Chart
    svg: Markup
    points: dict[str, Any]


def draw(chart: Chart, key: str) -> Drawing:
    """Draws a chart; `key` is its name on the page, which keeps ids unique and reproducible."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(key)):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        canvas = FigureCanvasSVG(figure)
        figure.subplots_adjust(
            _LEFT / WIDTH, _BOTTOM / HEIGHT, 1 - _RIGHT / WIDTH, 1 - _TOP / HEIGHT
        )
        axes = figure.add_subplot()
        for series in chart.series:
            _draw_series(axes, series)
        _draw_scales(axes, chart)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(buffer, metadata=nothing)
        return Drawing(key, chart, _for_a_page(buffer.getvalue()), _points(axes, chart))


def _style(key: str) -> dict[Any, Any]:
    muted, rule = _SENTINELS["muted"], _SENTINELS["rule"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 12,
        "text.color": muted,
        "axes.labelcolor": muted,
        "axes.edgecolor": rule,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": rule,
        "grid.linewidth": 1,
        "xtick.color": rule,
        "xtick.labelcolor": muted,
        "ytick.color": rule,
        "ytick.labelcolor": muted,
        "ytick.major.size": 0,
        "path.simplify": False,
    }


def _draw_series(axes: Any, series: Series) -> None:
    colour = _SENTINELS[series.colour]
    if len(series.edges):
        style = {"fill": True, "alpha": 0.45} if series.line == "-" else {"linestyle": series.line}
        axes.stairs(series.y, series.edges, color=colour, linewidth=1.8, **style)
        return
    if series.band:
        axes.fill_between(series.x, *series.band, color=colour, alpha=0.2, linewidth=0)
    axes.plot(
        series.x,
        series.y,
        color=colour,
        linestyle=series.line or "none",
        linewidth=1.8 if series.marker else 1.3,
        marker=series.marker or None,
        markersize=5,
        alpha=1 if series.line else 0.6,
    )


def _draw_scales(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    whole_x = chart.x_label in ("step", "tokens")
    if chart.symlog_x:
        axes.set_xscale("symlog", linthresh=LINEAR_BELOW, linscale=0.8)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_x))
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(plain)
    if chart.percent:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    elif chart.series[0].edges:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)  # room for the mark's text
    axes.set_xlabel(chart.x_label, loc="right", labelpad=2)
    dotted = {"color": _SENTINELS["muted"], "linestyle": (0, (1, 2)), "linewidth": 1.2}
    if chart.level:
        y, text = chart.level
        axes.axhline(y, **dotted)
        axes.text(1, y, text, transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    if chart.mark:
        x, text = chart.mark
        axes.axvline(x, **dotted)
        axes.annotate(
            text, (x, 1), (4, 0), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", va="top",
        )  # fmt: skip


def _for_a_page(svg: str) -> Markup:
    """The `<svg>` element alone, with CSS variables for colours, and the page's fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    for name, sentinel in _SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{name})")
    hidden = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true" focusable="false"'
    return Markup(re.sub(r"<svg [^>]*", hidden, svg, count=1))


def _points(axes: Any, chart: Chart) -> dict[str, Any]:
    """The series' points on the drawing, and the stops that a reader moves between.

    A stop is a place on the drawing, its name, and the points (series, index) that it shows.
    """
    places = []
    for series in chart.series:
        pixels = axes.transData.transform(np.column_stack([series.x, series.y]))
        places.append(np.round(pixels / (WIDTH, HEIGHT) * (100, -100) + (0, 100), 2))
    if chart.pick == "point":
        shown = [(i, j) for i, series in enumerate(chart.series) for j in range(len(series.x))]
        shown.sort(key=lambda point: tuple(places[point[0]][point[1]]))
        stops = [(i, j, [(i, j)]) for i, j in shown]
    else:
        stops = _stops_by_x(chart.series)
    return {
        "pick": chart.pick,
        "series": [
            {
                "name": series.name,
                "colour": series.colour,
                "x": place[:, 0].tolist(),
                "y": place[:, 1].tolist(),
                "at": list(series.at),
                "text": list(series.text),
            }
            for series, place in zip(chart.series, places, strict=True)
        ],
        "stops": stops,
    }


def _stops_by_x(series: Sequence[Series]) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """For every x of any series, the point that names it and the nearest point of each series."""
    named = {
        x: (i, j) for i, each in reversed(list(enumerate(series))) for j, x in enumerate(each.x)
    }
    columns = [np.asarray(each.x, dtype=float) for each in series]
    return [
        (*named[x], [(i, int(np.abs(column - x).argmin())) for i, column in enumerate(columns)])
        for x in sorted(named)
    ]
