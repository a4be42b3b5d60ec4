"""Lists the recipes that come with the package, or copies one to change it.

dpo recipes                                     # what there is
dpo recipes neuralhermes                        # ./neuralhermes.yaml
dpo train --config neuralhermes                 # as it is
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from dpo.cli import RECIPES, Parser, new_parser, read_flags, recipe_file
from dpo.errors import UserError


def parser(prog: str) -> Parser:
    """A recipe, and where its copy goes."""
    new = new_parser(prog, __doc__)
    new.add_argument("name", nargs="?", help="the recipe to copy")
    new.add_argument("--output", type=Path, help="the copy's file; default: ./NAME.yaml")
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints names with their first line, or where the copy is."""
    options = read_flags(parser, argv)
    if options.name is None:
        for file in sorted(RECIPES.glob("*.yaml")):
            print(f"{file.stem:<14}{file.read_text().splitlines()[0].removeprefix('# ')}")
        return
    copy = options.output or Path(f"{options.name}.yaml")
    recipe = recipe_file(options.name)
    if copy.exists():
        raise UserError(f"--output: {copy} exists already. Name a new file.")
    shutil.copyfile(recipe, copy)
    print(f"{copy} is yours to change; dpo train --config {copy}")
