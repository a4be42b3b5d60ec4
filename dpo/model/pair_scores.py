"""A micro-batch to what losses read: log-probs under both models, and inputs that a loss names."""

from collections.abc import Collection
from dataclasses import fields

import torch
from jaxtyping import Bool
from torch import Tensor

from dpo.data.stream import Stream, to_device
from dpo.logps import pair_logps, sequence_logps
from dpo.losses import PairLogps, wpo_weights
from dpo.model.reference import TokenLogps
from dpo.objective import FROM_ROWS, KLS, TAILS, Inputs

LOGPS = [field.name for field in fields(PairLogps)]
"""The names of the six vectors that every loss reads."""


def score(
    stream: Stream, policy: TokenLogps, reference: TokenLogps, needed: Collection[str] = ()
) -> tuple[PairLogps, Inputs]:
    """Log-probs of every pair under both models, and the inputs that are needed, (pairs,) each.

    Args:
        stream: the pairs.
        policy: scores them, with gradient where that is on.
        reference: scores them, without.
        needed: names of `dpo.objective.FROM_ROWS` and `FROM_TOKENS`. What is not in here is not
            computed.
    """
    inputs: dict[str, Tensor] = {}

    def sums(values: Tensor) -> tuple[Tensor, Tensor]:
        by_sequence = sequence_logps(values, stream.sequence_ids, 2 * stream.num_pairs)
        chosen, rejected = by_sequence.view(-1, 2).unbind(1)
        return chosen, rejected

    of_policy = of_reference = torch.empty(0)
    if KLS & {*needed}:
        reference_logps, predictions = reference(stream, "predictions")
        policy_logps, of_policy = policy(stream, predictions)
    else:
        if "on_policy_weights" in needed:
            policy_logps, of_policy = policy(stream, "log_collision")
        else:
            policy_logps = policy(stream)
        if "dispersions" in needed:
            reference_logps, of_reference = reference(stream, "dispersion")
        else:
            reference_logps = reference(stream)
    logps = pair_logps(policy_logps, reference_logps, stream.sequence_ids, stream.num_pairs)

    if KLS & {*needed}:
        inputs["chosen_kls"], inputs["rejected_kls"] = sums(of_policy)
    if "on_policy_weights" in needed:
        inputs["on_policy_weights"] = wpo_weights(logps, *sums(of_policy))
    if "dispersions" in needed:
        chosen, rejected = sums(of_reference)
        per_token = chosen / logps.chosen_lengths + rejected / logps.rejected_lengths
        inputs["dispersions"] = per_token / 2
    if TAILS & {*needed}:
        is_tail = _is_tail(stream, logps)
        for model, values in (("policy", policy_logps), ("ref", reference_logps)):
            chosen, rejected = sums(values * is_tail)
            inputs[f"{model}_chosen_tail_logps"] = chosen
            inputs[f"{model}_rejected_tail_logps"] = rejected
    for name in FROM_ROWS & {*needed}:
        numbers = torch.tensor([pair.numbers[name] for pair in stream.pairs])
        inputs[name] = to_device(numbers, policy_logps.device)
    return logps, inputs


def _is_tail(stream: Stream, logps: PairLogps) -> Bool[Tensor, " scored"]:
    """Whether a scored token stands beyond the length of its pair's shorter answer."""
    lengths = torch.stack([logps.chosen_lengths, logps.rejected_lengths], 1)
    ends = lengths.flatten().cumsum(0)
    places = torch.arange(len(stream.targets), device=stream.targets.device)
    places = places - (ends - lengths.flatten())[stream.sequence_ids]
    return places >= lengths.amin(1)[stream.sequence_ids // 2]
