"""Shows the first rows as messages, then as tokens, marked by what is scored.

python scripts/preview.py [--rows 3] [train.py's flags]
python scripts/preview.py --data.name_or_path rows.jsonl --model.name_or_path MODEL
"""

import argparse
import os
import sys

from dpo.cli import parse, run_script
from dpo.data.preview import preview_rows
from dpo.model.load import load_tokenizer


def main() -> None:
    """Prints; in colour on a terminal, unless NO_COLOR is set."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--rows", type=int, default=3)
    options, train_flags = own.parse_known_args()
    config = parse(train_flags, prog="scripts/preview.py [--rows N]")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    tokenizer = load_tokenizer(config.model)
    for text in preview_rows(config, tokenizer, options.rows, colour=colour):
        print(text)


if __name__ == "__main__":
    run_script(main)
