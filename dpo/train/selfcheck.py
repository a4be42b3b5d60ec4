"""Before the first update the policy is its own reference: the run starts on that, or not at all.

Rewards are then 0 and the sigmoid loss is ln 2, exactly; both layouts give the same log-probs, and
compiled layers the gradients of plain ones. A run for which this does not hold would train, and
nobody would see that it trains something else.
"""

from typing import Any

import torch
from torch import Tensor

from dpo.data.stream import Stream, build_stream
from dpo.model.scorer import Scorer

NUM_PAIRS = 2


def check_start(run: Any) -> None:
    """Refuses to train on numbers that cannot be trusted; `run` is a `trainer.Run`.

    Both layouts must agree on the first pairs, and on a first start the policy must *be* the
    reference, whether that is computed or comes from a cache.

    Raises:
        RuntimeError: saying what differs, and by how much.
    """
    stream = first_pairs(run)
    for name, module in run.scorer.named_modules():
        if "lora_dropout" in name:  # what the policy has and the reference has not
            module.eval()
    with torch.no_grad():
        policy = run.scorer(stream)
        if not run.start_step and run.reference_mode != "zero":
            reference = _peek(run, stream)
            if run.cached and is_rounded(run):  # it was computed beside other pairs
                _check_reference((policy - reference).abs().mean(), allowed=0.02, is_cached=True)
            else:
                worst = (policy - reference).abs().max()
                _check_reference(worst, allowed=1e-4, is_cached=run.cached is not None)
        if run.layout == "shared":
            padded = Scorer(run.policy.model, attention="padded")(stream)
            _check_layouts(policy, padded, allowed=0.05 if is_rounded(run) else 1e-4)
    if run.config.model.compile:
        _check_compiled(run, stream)
    run.scorer.train()


def first_pairs(run: Any) -> Stream:
    """The shortest of the first step's pairs: the self-check costs little and fits anywhere."""
    pairs = [run.data.train[i] for i in run.indices(1)]
    pairs.sort(key=lambda pair: pair.num_stream_tokens)
    return build_stream(pairs[:NUM_PAIRS]).to(run.accelerator.device)


def first_reference_logps(run: Any) -> list[float]:
    """The reference's token log-probs on the first pairs: they tell references apart."""
    return _peek(run, first_pairs(run)).tolist()


def is_rounded(run: Any) -> bool:
    """Whether the model computes in less than fp32, so that log-probs depend on the batch."""
    is_half = torch.finfo(next(run.policy.model.parameters()).dtype).bits < 32
    return is_half or run.config.model.quantization != "none"


def _peek(run: Any, stream: Stream) -> Tensor:
    """The reference on these pairs, without keeping what was computed for it.

    What is kept is computed in the micro-batches of training, so that step 1 is exactly ln 2.
    """
    logps = run.reference(stream)
    if run.cached:
        run.cached.forget_unsettled()
    return logps


def _check_reference(difference: Tensor, *, allowed: float, is_cached: bool) -> None:
    if not difference <= allowed:
        raise RuntimeError(
            f"self-check: before the first update the policy must be the reference, but the "
            f"log-prob of a token differs by {difference:.3g} nats, wanted at most {allowed}. "
            "Training would pull towards another model."
            + (" The reference comes from a cache: try reference.cache off." if is_cached else "")
        )


def _check_compiled(run: Any, stream: Stream) -> None:
    """Some compilers return wrong gradients of right values: torch 2.11 did, in fp32.

    The first weights that have a gradient are enough: it comes through all layers.
    """

    def gradient(weights: list[Tensor]) -> tuple[Tensor | None, ...]:
        with run.accelerator.no_sync(run.scorer):
            return torch.autograd.grad(run.scorer(stream).sum(), weights, allow_unused=True)

    trained = [p for p in run.policy.model.parameters() if p.requires_grad]
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
    difference, allowed = (wrong / whole) ** 0.5, 0.2 if is_rounded(run) else 1e-3
    if not difference <= allowed:
        raise RuntimeError(
            f"self-check: the gradient of compiled layers differs by {difference:.3g} of its norm "
            f"from that of plain ones, wanted at most {allowed}. Set model.compile to false, or "
            "install a newer torch."
        )


def _check_layouts(shared: Tensor, padded: Tensor, *, allowed: float) -> None:
    mean = (shared - padded).abs().mean().item()
    if not mean <= allowed:
        raise RuntimeError(
            f"self-check: shared and padded layouts differ by {mean:.3g} nats per token, "
            f"wanted at most {allowed}. Set model.attention to padded and report the model."
        )
