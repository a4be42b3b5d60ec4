"""Measures a finished run: `dpo evaluate`."""

from dpo.commands import run

if __name__ == "__main__":
    run("evaluate", prog="scripts/evaluate.py")
