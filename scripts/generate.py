"""Answers prompts before and after training: `dpo generate`."""

from dpo.commands import run

if __name__ == "__main__":
    run("generate", prog="scripts/generate.py")
