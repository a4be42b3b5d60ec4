"""Before the first update the policy is its own reference; a run for which it is not is refused.

Rewards are then 0 and the sigmoid loss is ln 2, exactly; both layouts give the same log-probs, and
compiled layers give the gradients of plain ones. A run for which this does not hold would train,
and nobody would see that it trains something else.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo.data.order import Order
from dpo.data.stream import Stream, TokenizedPair, build_stream
from dpo.errors import SelfCheckError
from dpo.losses import PairLogps
from dpo.model.models import Models
from dpo.model.pair_scores import score
from dpo.model.scorer import Also, Scorer
from dpo.objective import Inputs, Objective

NUM_PAIRS = 2


def check_start(
    models: Models,
    stream: Stream,
    objective: Objective,
    accelerator: Accelerator,
    *,
    is_first_start: bool,
    is_compiled: bool,
) -> None:
    """Refuses to train on numbers that cannot be trusted.

    Both layouts must agree on a few pairs, and on a first start the policy must *be* the
    reference, whether its log-probs are computed or come from a cache: then every loss has a known
    value, that of a policy compared with itself. One's own loss must be one finite number a pair.

    Args:
        models: the policy and its reference.
        stream: the few pairs.
        objective: the losses of pairs.
        accelerator: of the run.
        is_first_start: no step has been taken, here or before a resume.
        is_compiled: the layers are compiled.

    Raises:
        SelfCheckError: saying what differs, and by how much.
    """
    for name, module in models.scorer.named_modules():
        if "lora_dropout" in name:  # the policy has it, the reference does not
            module.eval()
    with torch.no_grad():
        policy = models.scorer(stream)

        def again(stream: Stream, *also: Also) -> Any:
            return models.scorer(stream, *also) if also else policy

        itself = score(stream, again, again, objective.inputs)
        _check_loss(objective, *itself)
        if is_first_start and models.reference.mode != "zero":
            reference = models.reference.peek(stream)
            difference = (policy - reference).abs()
            is_cached = models.reference.store is not None
            if is_cached and models.is_rounded:  # it was computed in other micro-batches
                _check_reference(difference.mean(), allowed=0.02, is_cached=True)
            else:
                _check_reference(difference.max(), allowed=1e-4, is_cached=is_cached)
                scored = score(stream, again, models.reference.peek, objective.inputs)
                _check_first_loss(objective(*scored), objective(*itself))
        if models.layout == "shared":
            padded = Scorer(models.policy.model, attention="padded")(stream)
            _check_layouts(policy, padded, allowed=0.05 if models.is_rounded else 1e-4)
    if is_compiled:
        check_compiled(models, stream, accelerator)
    models.scorer.train()


def shortest_pairs(pairs: Sequence[TokenizedPair], order: Order) -> Stream:
    """The shortest of the first step's pairs: checking these costs little and fits anywhere."""
    chosen = [pairs[i] for i in order.indices(1)]
    chosen.sort(key=lambda pair: pair.num_stream_tokens)
    return build_stream(chosen[:NUM_PAIRS])


def _check_reference(difference: Tensor, *, allowed: float, is_cached: bool) -> None:
    if not difference <= allowed:
        raise SelfCheckError(
            f"self-check: before the first update the policy must be the reference, but the "
            f"log-prob of a token differs by {difference:.3g} nats, wanted at most {allowed}. "
            "Training would pull towards another model."
            + (" The reference comes from a cache: try reference.cache off." if is_cached else "")
        )


def _check_loss(objective: Objective, logps: PairLogps, others: Inputs) -> None:
    with torch.enable_grad():
        names = ("policy_chosen_logps", "policy_rejected_logps")
        inputs = {name: getattr(logps, name).detach().requires_grad_() for name in names}
        losses = objective(replace(logps, **inputs), others)
        shape = (len(logps.chosen_lengths),)
        if not (isinstance(losses, Tensor) and losses.shape == shape and losses.requires_grad):
            got = f"{tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise SelfCheckError(
                f"self-check: for {shape[0]} pairs the loss gave {got}, wanted a tensor {shape} "
                "that depends on the policy's log-probs. Correct the function in loss.type."
            )
        grads = torch.autograd.grad(losses.sum(), [*inputs.values()], allow_unused=True)
    for what, values in (("loss", losses), *(("gradient", g) for g in grads if g is not None)):
        if not values.isfinite().all():
            raise SelfCheckError(
                f"self-check: before the first update the {what} of a pair is "
                f"{values.tolist()}, wanted finite numbers. Change loss.type or its options."
            )


def _check_first_loss(losses: Tensor, known: Tensor) -> None:
    difference = ((losses - known).abs() / (1 + known.abs())).max().item()
    if not difference <= 0.05:
        raise SelfCheckError(
            f"self-check: the first loss must be {known.tolist()}, that of a policy which is its "
            f"reference, but it is {losses.tolist()}. Report it with the configuration."
        )


def check_compiled(models: Models, stream: Stream, accelerator: Accelerator) -> None:
    """Compares the gradients of compiled and plain layers.

    Some compilers return wrong gradients of right values: torch 2.11 did, in fp32. The first
    weights that have a gradient are enough, since it comes through all layers.

    Raises:
        SelfCheckError: they differ.
    """

    def gradient(weights: list[torch.nn.Parameter]) -> tuple[Tensor | None, ...]:
        with accelerator.no_sync(models.scorer):
            return torch.autograd.grad(models.scorer(stream).sum(), weights, allow_unused=True)

    trained = models.trained
    with torch.compiler.set_stance("force_eager"):
        grads = zip(trained, gradient(trained), strict=True)
        plain = [(p, g.float()) for p, g in grads if g is not None and g.any()][:8]
    if not plain:
        return
    compiled = gradient([weight for weight, _ in plain])
    wrong = whole = 0.0
    for (_, theirs), ours in zip(plain, compiled, strict=True):
        wrong += float((theirs - (0.0 if ours is None else ours)).square().sum())
        whole += float(theirs.square().sum())
    difference, allowed = (wrong / whole) ** 0.5, 0.2 if models.is_rounded else 1e-3
    if not difference <= allowed:
        raise SelfCheckError(
            f"self-check: the gradient of compiled layers differs by {difference:.3g} of its norm "
            f"from that of plain ones, wanted at most {allowed}. Set model.compile to false, or "
            "install a newer torch."
        )


def _check_layouts(shared: Tensor, padded: Tensor, *, allowed: float) -> None:
    mean = (shared - padded).abs().mean().item()
    if not mean <= allowed:
        raise SelfCheckError(
            f"self-check: shared and padded layouts differ by {mean:.3g} nats per token, "
            f"wanted at most {allowed}. Set model.attention to padded and report the model."
        )
