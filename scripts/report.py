"""Writes the page of a run, or of several: `dpo report`."""

from dpo.commands import run

if __name__ == "__main__":
    run("report", prog="scripts/report.py")
