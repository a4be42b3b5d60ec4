"""Writes report.html of a finished run; of several runs, one page that compares them.

dpo report runs/quickstart                      # runs/quickstart/report.html
dpo report runs/a runs/b [--output FILE]        # runs/comparison.html
"""

from collections.abc import Sequence
from pathlib import Path

from dpo import run_folder
from dpo.cli import Parser, new_parser, read_flags


def parser(prog: str) -> Parser:
    """The runs, and the page's file."""
    new = new_parser(prog, __doc__)
    new.add_argument("runs", nargs="+", type=Path, help="run folders")
    beside = "the page's file; default: as above, beside the first run"
    new.add_argument("--output", type=Path, help=beside)
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints where the page is; a report of the same files is not written again."""
    options = read_flags(parser, argv)
    from dpo.report.page import is_up_to_date, write_comparison, write_report

    if len(options.runs) == 1:
        run = options.runs[0]
        file = options.output or run / run_folder.REPORT
        if is_up_to_date(run, file):
            print(f"The report in {file} is up to date: nothing changed since it was written")
            return
        write_report(run, file)
    else:
        beside = options.runs[0].resolve().parent / "comparison.html"
        file = write_comparison(options.runs, options.output or beside)
    print(f"The report is in {file}")
