"""Says what a run will take, before any weight is loaded: memory, FLOPs, time, disk.

python scripts/plan.py --gpu A100-80 [--mfu 0.4] [--lengths 250,200,200] [train.py's flags]
python scripts/plan.py --memory_gib 24 --tflops 71 --config scripts/configs/neuralhermes.yaml

Lengths are those of the data's first rows, or the mean tokens of prompt, chosen and rejected answer
in `--lengths`: then the model's config.json is all that is read.
"""

import argparse

from dpo.cli import parse, run_script
from dpo.errors import UserError
from dpo.plan.plan import choose_gpu, first_rows, given_lengths
from dpo.plan.tables import plan_tables


def main() -> None:
    """Prints one table after the other."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--gpu")
    own.add_argument("--memory_gib", type=float)
    own.add_argument("--tflops", type=float)
    own.add_argument("--mfu", type=float, default=0.4)
    own.add_argument("--lengths")
    options, train_flags = own.parse_known_args()
    config = parse(train_flags, prog="scripts/plan.py --gpu NAME [--mfu X] [--lengths P,C,R]")
    gpu = choose_gpu(options.gpu, options.memory_gib, options.tflops)
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu: got {options.mfu}, wanted a share of the peak, such as 0.4.")
    sample = given_lengths(options.lengths) if options.lengths else first_rows(config)
    for table in plan_tables(config, gpu, sample, mfu=options.mfu):
        print(table, flush=True)


if __name__ == "__main__":
    run_script(main)
