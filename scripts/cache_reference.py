"""Computes the reference's log-probs ahead: `dpo cache-reference`, for `accelerate launch`."""

from dpo.commands import run

if __name__ == "__main__":
    run("cache-reference", prog="scripts/cache_reference.py")
