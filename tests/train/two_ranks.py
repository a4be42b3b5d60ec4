"""Run by torchrun: gradients and metrics of two steps on two CPU processes, saved by rank 0."""

import sys

import torch
from accelerate.utils import gather_object

from dpo.cli import run_command
from tests.train.runs import config, step_gradients


def main():
    torch.set_num_threads(1)
    folder, output, rows, *flags = sys.argv[1:]
    settings = config(folder, *flags, "--train.output_dir", f"{folder}/two", rows=int(rows))
    gathered = gather_object([step_gradients(settings)])
    if torch.distributed.get_rank() == 0:
        torch.save(gathered, output)
    torch.distributed.barrier()


if __name__ == "__main__":
    run_command(main)
