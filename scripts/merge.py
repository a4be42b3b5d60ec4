"""Merges, verifies and pushes: `dpo merge`."""

from dpo.commands import run

if __name__ == "__main__":
    run("merge", prog="scripts/merge.py")
