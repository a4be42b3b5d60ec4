"""Several processes on this machine, through accelerate's own launcher."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from dpo import signals
from dpo.cli import Parser, config_parser, read_config
from dpo.config import Config
from dpo.errors import UserError

# --multi_gpu serves CPUs too; a free port lets two runs share a machine.
_LAUNCHER = (
    "--num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no --module dpo"
).split()


def parser_with_processes(prog: str, description: str | None) -> Parser:
    """All keys of the configuration, and `--num_processes`."""
    new = config_parser(prog, description)
    _add_num_processes(new)
    return new


def config_of_this_process(parser: Parser, command: str, argv: Sequence[str]) -> Config | None:
    """The configuration to work with here; None if several processes have done the work."""
    config, own = read_config(parser, argv)
    if own.num_processes in (None, 1):
        return config
    launch(command, argv, own.num_processes, config)
    return None


def _add_num_processes(parser: Parser) -> None:
    parser.add_argument(
        "--num_processes", type=int, help="processes on this machine, started by accelerate"
    )


def launch(command: str, argv: Sequence[str], num_processes: int, config: Config) -> None:
    """Starts `dpo COMMAND ...` in several processes, and leaves with their exit code.

    Raises:
        UserError: no such number, the processes were started already, or torch cannot use the GPUs.
    """
    if num_processes < 1:
        raise UserError(f"--num_processes: got {num_processes}, wanted 1 or more.")
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--num_processes: got {num_processes}, but a launcher has started this process as one "
            f"of {os.environ['WORLD_SIZE']}. Leave it out, or start dpo without a launcher."
        )
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_num_processes(own)
    _, flags = own.parse_known_args(argv)
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from dpo.device import choose_device

    has_gpus = choose_device(config.train.device).type == "cuda"
    if has_gpus and torch.cuda.device_count() < num_processes:
        raise UserError(
            f"--num_processes: got {num_processes}, wanted at most {torch.cuda.device_count()}, a "
            "process for each GPU of this machine."
        )
    # The processes say what went wrong; the launcher would add a page about its own part.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # After a signal the processes finish a step and save it, for which 30 s can be too short.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    words = ["--multi_gpu", "--num_processes", str(num_processes), *_LAUNCHER, command, *flags]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SignalException as stop:  # the processes have got the signal too, and said it
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            killed = f"rank {rank} (process {failure.pid}) was killed by "
            print(f"error: {killed}{signals.name(-failure.exitcode)}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
