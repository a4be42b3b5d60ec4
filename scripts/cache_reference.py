"""Computes the reference's log-probs of a run's pairs before the run, into `reference.cache`.

python scripts/cache_reference.py [train.py's flags]
accelerate launch --num_processes 8 scripts/cache_reference.py --config FILE
"""

import os

from dpo.cli import parse, run_script


def main() -> None:
    """Prints how many pairs were computed, how many were cached already, and where."""
    config = parse(prog="scripts/cache_reference.py")
    from dpo.train.ahead import cache_reference

    done = cache_reference(config)
    if os.environ.get("RANK", "0") == "0":
        print(done)


if __name__ == "__main__":
    run_script(main, "stopped; what was computed is kept, and the same command goes on from there")
