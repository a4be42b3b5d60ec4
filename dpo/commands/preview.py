"""Shows the first rows as messages, then as tokens, marked by what is scored.

dpo preview [--rows 3] [flags of dpo train]
dpo preview --data.name_or_path rows.jsonl --model.name_or_path MODEL
"""

import os
import sys
from collections.abc import Sequence

from dpo.cli import Parser, config_parser, read_config


def parser(prog: str) -> Parser:
    """All keys of the configuration, and how many rows."""
    new = config_parser(prog, __doc__)
    new.add_argument("--rows", type=int, default=3, help="how many rows are shown")
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints; in colour on a terminal, unless NO_COLOR is set."""
    config, own = read_config(parser, argv)
    from dpo.data.preview import preview_rows
    from dpo.model.named import load_tokenizer

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for text in preview_rows(config, load_tokenizer(config.model), own.rows, colour=colour):
        print(text)
