"""Computes the reference's log-probs of a run's pairs before the run, into `reference.cache`.

dpo cache-reference [flags of dpo train]
dpo cache-reference --num_processes 8 --config FILE
accelerate launch --num_processes 8 scripts/cache_reference.py --config FILE
"""

import os
from collections.abc import Sequence

from dpo.cli import Parser
from dpo.commands.processes import config_of_this_process, parser_with_processes

STOPPED = "stopped; what was computed is kept, and the same command goes on from there"


def parser(prog: str) -> Parser:
    """All keys of the configuration, and `--num_processes`."""
    return parser_with_processes(prog, __doc__)


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints how many pairs were computed, how many were cached already, and where."""
    config = config_of_this_process(parser, "cache-reference", argv)
    if config is None:
        return
    from dpo.train.ahead import cache_reference

    done = cache_reference(config)
    if os.environ.get("RANK", "0") == "0":
        print(done)
