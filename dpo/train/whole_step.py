"""Losses of a whole step, exactly, for any split into micro-batches and any number of ranks.

A loss of `dpo.losses.STEP_WIDE` depends on the parameters only through a few numbers a pair. So the
step is scored once without gradient; the numbers of all ranks are gathered, and the loss is
differentiated with respect to them. Then each micro-batch is scored again, with gradient, and its
losses are replaced by lines with these values and slopes. That takes one more forward of the
policy, and none where a rank's pairs are one micro-batch, whose graph is kept.

Dropout is a function of the step and the micro-batch, so both passes see one network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from dpo.losses import PairLogps
from dpo.model.pair_scores import LOGPS
from dpo.objective import KLS, Inputs, Objective

Scored = tuple[PairLogps, Inputs]
_OF_POLICY = {name for name in LOGPS if name.startswith("policy_")} | KLS
_OF_POLICY |= {"policy_chosen_tail_logps", "policy_rejected_tail_logps"}


@dataclass(frozen=True)
class WholeStep:
    """What is known of this rank's pairs once all ranks have scored theirs.

    Attributes:
        columns: log-probs and inputs by name, (pairs,).
        losses: one a pair.
        slopes: d sum of all ranks' losses / d column, (pairs,), of those that the policy gives.
    """

    columns: dict[str, Tensor]
    losses: Float[Tensor, " pairs"]
    slopes: dict[str, Tensor]

    def logps(self, positions: Sequence[int]) -> PairLogps:
        """Log-probs of the pairs at these positions."""
        return PairLogps(**{name: self.columns[name][list(positions)] for name in LOGPS})

    def linear(self, positions: Sequence[int], again: Scored) -> Float[Tensor, " pairs"]:
        """The losses of these pairs, with their values and slopes, as they are scored `again`."""
        logps, inputs = again
        columns, losses = {**vars(logps), **inputs}, self.losses[list(positions)]
        for name, slopes in self.slopes.items():
            moved = columns[name] - columns[name].detach()  # 0, with a gradient
            losses = losses + slopes[list(positions)] * moved
        return losses


def joined(scored: Sequence[tuple[Sequence[int], PairLogps, Inputs]]) -> dict[str, Tensor]:
    """The columns of micro-batches, without gradient, in the order of their pairs' positions."""
    places = [place for positions, _, _ in scored for place in positions]
    order = torch.tensor(places, dtype=torch.long).argsort()
    parts = [{**vars(logps), **inputs} for _, logps, inputs in scored]
    return {
        name: torch.cat([part[name].detach() for part in parts])[order.to(parts[0][name].device)]
        for name in parts[0]
    }


def of_all_ranks(columns: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
    """Every column with the pairs of all ranks, on the CPU; and how many each rank has."""
    values = [column.to(columns[LOGPS[0]].dtype).cpu() for column in columns.values()]
    every = gather_object([torch.stack(values)])
    whole = torch.cat(every, dim=1)
    return dict(zip(columns, whole, strict=True)), [part.shape[1] for part in every]


def look_at_step(
    objective: Objective,
    scored: Sequence[tuple[Sequence[int], PairLogps, Inputs]],
    accelerator: Accelerator,
) -> WholeStep:
    """Losses and slopes of this rank's pairs, within those of all ranks; every rank must call.

    Args:
        objective: of the run.
        scored: this rank's micro-batches: positions of their pairs, log-probs, inputs.
        accelerator: of the run.
    """
    columns = joined(scored)
    whole, sizes = of_all_ranks(columns)
    leaves = {name: whole[name].requires_grad_() for name in whole if name in _OF_POLICY}
    logps = PairLogps(**{name: whole[name] for name in LOGPS})
    losses = objective(logps, {n: column for n, column in whole.items() if n not in LOGPS})
    slopes = torch.autograd.grad(losses.sum(), [*leaves.values()], allow_unused=True)
    start = sum(sizes[: accelerator.process_index])
    mine, device = slice(start, start + sizes[accelerator.process_index]), accelerator.device
    return WholeStep(
        columns,
        losses.detach()[mine].to(device),
        {
            name: slope[mine].to(device)
            for name, slope in zip(leaves, slopes, strict=True)
            if slope is not None
        },
    )
