"""What the processes of a run tell each other; with one process, it costs nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dpo.errors import UserError

T = TypeVar("T")


def on_main(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """Runs `do` on the main process; every process gets its result, or its UserError."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = do()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def main_first(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """Runs `do` on the main process, then on the others, which find what it has cached.

    Every process gets its own result, or the main one's UserError.
    """
    done: list[T] = []
    on_main(accelerator, lambda: done.append(do()))
    return done[0] if done else do()


def end_processes(accelerator: Accelerator) -> None:
    """Waits for all ranks, and ends NCCL's process group; every rank must call.

    Gloo's ends with the process (`cli.run_command`). To free it would hold Python's lock and wait
    for its threads, which may want that lock to drop the tensors of the last exchange.
    """
    accelerator.wait_for_everyone()
    if accelerator.device.type != "cpu":
        accelerator.end_training()


def smallest_over_ranks(accelerator: Accelerator, number: int) -> int:
    """The smallest of the numbers that all ranks give."""
    if accelerator.num_processes == 1:
        return number
    numbers: Any = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.min())


def largest_over_ranks(accelerator: Accelerator, number: int) -> int:
    """The largest of the numbers that all ranks give."""
    return -smallest_over_ranks(accelerator, -number)


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of the tensors that all ranks give."""
    return accelerator.reduce(values, reduction="sum")  # type: ignore[return-value]
