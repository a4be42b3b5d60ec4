"""Writes report.html of a finished run; of several runs, one page that compares them.

python scripts/report.py runs/quickstart                      # runs/quickstart/report.html
python scripts/report.py runs/a runs/b [--output FILE]        # runs/comparison.html
"""

import argparse
from pathlib import Path

from dpo.cli import run_script
from dpo.report.page import write_comparison, write_report


def main() -> None:
    """Prints where the page is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--output", type=Path, help="the page's file; default: as above, beside the first run"
    )
    options = parser.parse_args()
    if len(options.runs) == 1:
        file = write_report(options.runs[0], options.output)
    else:
        beside = options.runs[0].resolve().parent / "comparison.html"
        file = write_comparison(options.runs, options.output or beside)
    print(f"The report is in {file}")


if __name__ == "__main__":
    run_script(main)
