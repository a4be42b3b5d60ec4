"""What losses are given besides log-probs, drawn at random, and calls with it."""

import torch

from dpo.losses import LOSSES
from dpo.objective import TAILS, Part, asked_of

# What a run gives besides log-probs: (a, b) is drawn from between a and b.
INPUTS = {
    "margins": (0.0, 2.0),
    "chosen_scores": (0.0, 4.0),
    "rejected_scores": (0.0, 4.0),
    "on_policy_weights": (0.0, 1.0),
    "dispersions": (0.05, 0.95),
    "chosen_kls": (0.0, 3.0),
    "rejected_kls": (0.0, 3.0),
    **dict.fromkeys(sorted(TAILS), (-5.0, 0.0)),
}
REMEMBERED = {"delta": 0.3, "gap_mean": 0.2, "gap_deviation": 1.7}


def inputs_of(name, count, dtype=torch.float64):
    """The inputs of a loss, by keyword; always the same."""
    generator = torch.Generator().manual_seed(7)
    asked = asked_of(Part(name, 1.0, {"beta": 0.1}))
    given = {key: REMEMBERED[key] for key in asked & REMEMBERED.keys()}
    for key in sorted(asked - given.keys()):
        low, high = INPUTS[key]
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        given[key] = (low + (high - low) * drawn).to(dtype)
    return given


def called(name, logps, *, picked=slice(None), whole=None, **options):
    """The loss with what it asks for; `picked`: of `whole` pairs."""
    given = inputs_of(name, whole or len(logps.chosen_lengths), logps.policy_chosen_logps.dtype)
    given = {k: x[picked] if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    return LOSSES[name](logps, **{**given, **options})
