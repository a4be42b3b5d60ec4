"""The command `dpo`, and the scripts: one module a sub-command.

Each has a docstring, which is its help; `parser(prog)`; and `main(parser, argv)`, which reads the
flags before the slow imports, so that help and mistakes in them do not wait for torch.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

import jsonargparse

from dpo.cli import Parser, new_parser, read_flags, run_command

NAMES = (
    "train preview plan cache-reference evaluate generate merge report recipes"  # as they are used
).split()


def main(argv: Sequence[str] | None = None) -> None:
    """`dpo NAME ...`, the console command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in NAMES:
        run(argv[0], argv[1:])
    else:  # --help, --version, --print_completion, nothing, or a mistake
        run_command(lambda: read_flags(whole_parser(), argv or ["--help"]))


def run(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs one sub-command; `prog` is what its help calls it."""
    argv = sys.argv[1:] if argv is None else argv
    command = _module(name)
    parser = command.parser(prog or f"dpo {name}")
    run_command(lambda: command.main(parser, argv), getattr(command, "STOPPED", "stopped"))


def whole_parser() -> Parser:
    """The parser of all sub-commands: for the list of them, and for a shell's completion."""
    jsonargparse.set_parsing_settings(add_print_completion_argument=True)
    whole = new_parser("dpo", "Direct Preference Optimization, from the data to the hub.")
    whole.add_argument("--version", action="version", version=f"dpo {version('dpo')}")
    commands = whole.add_subcommands(title="commands")
    for name in NAMES:
        module = _module(name)
        summary = (module.__doc__ or "").splitlines()[0]
        commands.add_subcommand(name, module.parser(f"dpo {name}"), help=summary)
    return whole


def _module(name: str) -> ModuleType:
    return import_module(f"dpo.commands.{name.replace('-', '_')}")
