"""Run by torchrun: how many collectives a step has, in one micro-batch and in many."""

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from dpo.cli import run_command
from dpo.train.trainer import Run
from tests.train.runs import config


def main():
    torch.set_num_threads(1)
    made = Run(
        config(sys.argv[1], "--train.per_device_train_batch_size", 8, "--train.max_steps", 9)
    )
    made.tracker.close_bar()
    for step in (1, 3):  # DDP lays out its buckets anew in the beginning
        made.train_step(step)
    for budget in (8192, 60):
        made.train_step.budget.tokens = budget
        backward, sizes = made.train_step.backward, []

        def noted(stream, pairs_in_step, backward=backward, sizes=sizes):
            sizes.append(stream.num_pairs)
            return backward(stream, pairs_in_step)

        made.train_step.backward = noted
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            made.train_step(2)
        made.train_step.backward = backward
        names = [event.name for event in profiled.events() if event.name.startswith("gloo:")]
        if torch.distributed.get_rank() == 0:
            print("counted", len(sizes), len(names), flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    run_command(main)
