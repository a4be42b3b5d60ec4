"""The report of a run, or of several, as one HTML file that needs no other file.

`write_report` reads only the files of the run folder, any of which may be missing, and loads no
model. `write_comparison` puts several runs beside each other. Both pages work on a phone, in dark
mode, by keyboard, with a screen reader and on paper. They fetch nothing, and their security
policy forbids it; all text is escaped, since rows and models can say anything.

A report ends with a digest of what it was made of, so that nobody makes it again from the same.

Left out on purpose: a charting library in the page. matplotlib draws; the script only shows values.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dpo import run_folder, sealed
from dpo.data import files
from dpo.errors import UserError
from dpo.hidden import visible
from dpo.report import comparison, curves, digest
from dpo.report.charts import Chart, shown_number
from dpo.report.drawing import Drawing, draw
from dpo.report.evaluation_tables import evaluation_tables
from dpo.report.length_bias import length_rows
from dpo.report.logs import RunLogs, read_logs

TEXT_SHOWN = 600  # characters of a prompt or an answer; the rest is folded
_BESIDE = Path(__file__).parent
_PACKAGE = _BESIDE.parent


def is_up_to_date(folder: Path, file: Path) -> bool:
    """Whether the page in `file` is what `write_report` would write now.

    Raises:
        UserError: the folder holds no run, or a file in it is broken.
    """
    mark = _mark(read_logs(folder)).encode()
    return file.is_file() and file.read_bytes().endswith(mark)


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes the report of a run, by default as `report.html` into its folder; returns its path.

    Raises:
        UserError: the folder holds no run, a file in it is broken, or the page cannot be written.
    """
    logs = read_logs(folder)
    charts = {
        "curves": curves.training_curves(logs),
        "pairs": curves.held_out_charts(logs),
        "speed": curves.speed_curves(logs),
    }
    token_pairs, scale_end = digest.token_pairs(logs)
    page = _render(
        "report.html.j2",
        charts,
        logs=logs,
        about=digest.about(logs),
        verdict=digest.verdict(logs),
        before_and_after=digest.before_and_after(logs),
        findings=digest.findings(logs),
        token_pairs=token_pairs,
        scale_end=scale_end,
        sample_kinds=digest.samples_by_kind(logs),
        length_rows=length_rows(logs),
        measured_weights=digest.measured_weights(logs),
        measured=list(evaluation_tables(logs.measured)),
        audits=digest.audits(logs.data_report),
        changed=digest.changed_keys(logs),
        config_text=yaml.safe_dump(logs.config, sort_keys=False, allow_unicode=True),
    )
    return _write(output or folder / run_folder.REPORT, page + _mark(logs))


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Writes one page that puts several runs beside each other; returns its path.

    Raises:
        UserError: as `write_report`, or there are fewer than two runs.
    """
    if len(folders) < 2:
        raise UserError(f"got {len(folders)} run to compare, wanted two or more. Name them.")
    runs = comparison.name_apart([read_logs(folder) for folder in folders], folders)
    charts = {
        "frontier": comparison.frontier(runs),
        "curves": comparison.overlaid_curves(runs),
    }
    page = _render(
        "comparison.html.j2",
        charts,
        runs=runs,
        differing=comparison.differing_keys(runs),
        results=comparison.results(runs),
        have_one_loss=comparison.have_one_loss(runs),
    )
    return _write(output, page)


def _mark(logs: RunLogs) -> str:
    """The last line of a report: a digest of the run's files and of this package.

    The last, so that a page that was cut off in writing has none.
    """
    code = [sealed.file_sums(_PACKAGE, "*.py"), sealed.file_sums(_BESIDE, "*.[!p]*")]
    return f"\n<!-- made of {files.digest(code, version('matplotlib'), logs)} -->\n"


def _render(template: str, charts: dict[str, list[Chart]], **context: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(_BESIDE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["shown_number"] = shown_number
    pages.globals["TEXT_SHOWN"] = TEXT_SHOWN
    drawn: dict[str, list[Drawing]] = {
        place: [draw(chart, f"{place}-{i}") for i, chart in enumerate(wanted)]
        for place, wanted in charts.items()
    }
    thinned = any(series.band for chart in charts["curves"] for series in chart.series)
    return pages.get_template(template).render(drawn=drawn, thinned=thinned, **context)


def _write(file: Path, page: str) -> Path:
    """Writes the page, with what rows and models hide in their texts made visible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(visible(page), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}). Name another file in --output of "
            "dpo report."
        ) from None
    return file
