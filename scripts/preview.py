"""Shows the first rows as the trainer sees them: `dpo preview`."""

from dpo.commands import run

if __name__ == "__main__":
    run("preview", prog="scripts/preview.py")
