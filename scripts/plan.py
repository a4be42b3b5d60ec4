"""Says what a run will take: `dpo plan`."""

from dpo.commands import run

if __name__ == "__main__":
    run("plan", prog="scripts/plan.py")
