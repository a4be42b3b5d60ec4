"""Merges a run's adapter into a standalone model, verifies it, and pushes it to the hub if asked.

python scripts/merge.py runs/quickstart
python scripts/merge.py RUN --base 16bit --dtype float16       # what the NeuralHermes article does
python scripts/merge.py RUN --push_to_hub NAMESPACE/NAME       # private, unless --public
"""

import argparse
from pathlib import Path

from dpo import run_folder
from dpo.after.merge import BASES, DTYPES, merge_run
from dpo.after.push import check_can_push, push, verified_files
from dpo.cli import run_script


def main() -> None:
    """Merges, unless a push asks for what was merged before; then pushes, if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="folder to write; default: RUN/merged")
    parser.add_argument("--base", choices=BASES, default="auto", help="of a quantised run")
    parser.add_argument("--weights", default="final", help="final, best or checkpoint-N")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the run's")
    parser.add_argument("--pairs", type=int, default=64, help="how many pairs are scored")
    parser.add_argument("--max_shard_size", default="5GB", help="largest size of a file")
    parser.add_argument(
        "--unverified", action="store_true", help="keep a merge that is not the trained policy"
    )
    parser.add_argument("--push_to_hub", metavar="NAMESPACE/NAME", help="token: HF_TOKEN or login")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    options = parser.parse_args()
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


if __name__ == "__main__":
    run_script(main)
