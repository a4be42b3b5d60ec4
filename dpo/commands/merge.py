"""Merges a run's adapter into a standalone model, verifies it, and pushes it to the hub if asked.

dpo merge runs/quickstart
dpo merge RUN --base 16bit --dtype float16       # what the NeuralHermes article does
dpo merge RUN --push_to_hub NAMESPACE/NAME       # private, unless --public
"""

from collections.abc import Sequence
from pathlib import Path

from dpo import run_folder
from dpo.cli import Parser, new_parser, read_flags


def parser(prog: str) -> Parser:
    """The run, what is merged into what, and where it goes."""
    new = new_parser(prog, __doc__)
    add = new.add_argument
    add("run", type=Path, help="run folder")
    add("--output", type=Path, help="folder to write; default: RUN/merged")
    bases = ("auto", "dequantized", "16bit")
    add("--base", choices=bases, default="auto", help="of a quantised run")
    add("--weights", default=run_folder.FINAL, help="final, best or checkpoint-N")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, default="auto", help="auto: the run's")
    add("--pairs", type=int, default=run_folder.NUM_PAIRS, help="how many pairs are scored")
    add("--max_shard_size", default="5GB", help="largest size of a file")
    add("--unverified", action="store_true", help="keep a merge that is not the trained policy")
    add("--push_to_hub", metavar="NAMESPACE/NAME", help="token: HF_TOKEN or login")
    add("--public", action="store_true", help="a new repository is public")
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Merges, unless a push asks for what was merged before; then pushes, if asked to."""
    options = read_flags(parser, argv)
    from dpo.after.merge import merge_run
    from dpo.after.push import check_can_push, push, verified_files

    output = options.output or options.run / run_folder.MERGED
    asked = {"weights": options.weights, "base": options.base, "dtype": options.dtype}
    if options.push_to_hub:
        check_can_push(options.push_to_hub)
    if not (options.push_to_hub and output.exists()):
        merge_run(
            options.run,
            output,
            **asked,
            num_pairs=options.pairs,
            max_shard_size=options.max_shard_size,
            unverified=options.unverified,
        )
    if options.push_to_hub:
        files = verified_files(output, options.run, **asked)
        url = push(output, files, options.push_to_hub, public=options.public)
        print(f"Pushed to {url}.")
