"""Computes the reference's log-probs of a run's pairs before the run, into `reference.cache`.

dpo cache-reference [flags of dpo train]
dpo cache-reference --num_processes 8 --config FILE
accelerate launch --num_processes 8 scripts/cache_reference.py --config FILE
"""

import os
from collections.abc import Sequence

from dpo.cli import Parser, config_parser, read_config
from dpo.commands.processes import add_num_processes, launch

STOPPED = "stopped; what was computed is kept, and the same command goes on from there"


def parser(prog: str) -> Parser:
    """All keys of the configuration."""
    new = config_parser(prog, __doc__)
    add_num_processes(new)
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints how many pairs were computed, how many were cached already, and where."""
    config, own = read_config(parser, argv)
    if own.num_processes not in (None, 1):
        launch("cache-reference", argv, own.num_processes, config)
        return
    from dpo.train.ahead import cache_reference

    done = cache_reference(config)
    if os.environ.get("RANK", "0") == "0":
        print(done)
