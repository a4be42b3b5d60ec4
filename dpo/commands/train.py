"""Trains a policy with DPO.

accelerate launch scripts/train.py                           # the packaged quickstart
dpo train --config neuralhermes                              # a recipe, or a YAML file
dpo train --train.max_steps 50 --loss.beta 0.3               # each key is a flag
DPO_LOSS__BETA=0.3 dpo train --num_processes 2               # or a variable; two processes
"""

from collections.abc import Sequence

from dpo.cli import Parser, config_parser, read_config
from dpo.commands.processes import add_num_processes, launch

STOPPED = "stopped; with train.resume auto, the same command goes on from the last checkpoint"


def parser(prog: str) -> Parser:
    """All keys of the configuration."""
    new = config_parser(prog, __doc__)
    add_num_processes(new)
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Trains, in this process or in several."""
    config, own = read_config(parser, argv)
    if own.num_processes not in (None, 1):
        launch("train", argv, own.num_processes, config)
        return
    from dpo.train.trainer import train

    train(config)
