"""Trains a policy with DPO.

accelerate launch scripts/train.py                           # the packaged quickstart
dpo train --config neuralhermes                              # a recipe, or a YAML file
dpo train --train.max_steps 50 --loss.beta 0.3               # each key is a flag
DPO_LOSS__BETA=0.3 dpo train --num_processes 2               # or a variable; two processes
"""

import gc
from collections.abc import Sequence

from dpo.cli import Parser
from dpo.commands.processes import config_of_this_process, parser_with_processes

STOPPED = "stopped; with train.resume auto, the same command goes on from the last checkpoint"


def parser(prog: str) -> Parser:
    """All keys of the configuration, and `--num_processes`."""
    return parser_with_processes(prog, __doc__)


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Trains, in this process or in several."""
    config = config_of_this_process(parser, "train", argv)
    if config is None:
        return
    gc.disable()  # what imports make stays: looking for garbage in it takes a second
    from dpo.train.trainer import train

    gc.enable()
    train(config)
