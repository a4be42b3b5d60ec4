"""Says what a run will take, before any weight is loaded: memory, FLOPs, time, disk.

dpo plan --gpu A100-80 [--mfu 0.4] [--lengths 250,200,200] [flags of dpo train]
dpo plan --memory_gib 24 --tflops 71 --config neuralhermes
dpo plan --config neuralhermes          # this machine: its GPU, or its CPU, which is measured

Lengths are those of the data's first rows, or the mean tokens of prompt, chosen and rejected answer
in `--lengths`: then the model's config.json is all that is read.
"""

from collections.abc import Sequence

from dpo.cli import Parser, config_parser, read_config
from dpo.errors import UserError


def parser(prog: str) -> Parser:
    """All keys of the configuration, the device and the lengths."""
    new = config_parser(prog, __doc__)
    new.add_argument("--gpu", help="such as A100-80, or cpu; none: this machine's")
    new.add_argument("--memory_gib", type=float, help="memory of a device that has no name here")
    new.add_argument("--tflops", type=float, help="its peak dense TFLOP/s")
    new.add_argument("--mfu", type=float, help="share of the rate: 0.4 of a peak, all of a CPU's")
    new.add_argument("--lengths", metavar="P,C,R", help="mean tokens, in place of reading rows")
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints one table after the other."""
    config, own = read_config(parser, argv)
    from dpo.plan.plan import choose_gpu, first_rows, given_lengths
    from dpo.plan.tables import plan_tables

    gpu = choose_gpu(own.gpu, own.memory_gib, own.tflops, config)
    mfu = own.mfu if own.mfu is not None else 1.0 if gpu.type == "cpu" else 0.4
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: got {mfu}, wanted a share of the peak, such as 0.4.")
    sample = given_lengths(own.lengths) if own.lengths else first_rows(config)
    for table in plan_tables(config, gpu, sample, mfu=mfu):
        print(table, flush=True)
