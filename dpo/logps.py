"""Hidden states to token log-probs to pair log-probs, never a (scored, vocab) tensor at once.

A head over 12,000 scored tokens and a vocabulary of 152,000 would need 7 GiB for its fp32 logits
and as much again for each copy that a softmax and its backward keep. Here the rows are walked in
tiles. With a frozen head (LoRA), the forward turns each tile of logits into J = d logp / d hidden
at once and drops it: the backward is one multiplication, g x J. That is two matrix products and
not three, without recomputation, and any loss may follow. DPO needs this: a pair's gradient is
known only when all tokens of both answers are summed, so the loss cannot run inside the tile. If
the head itself trains, the tiles are computed again in the backward.

That logits need not exist is due to Liger (Hsu et al. 2024, arXiv:2410.10989), which computes the
loss inside the tile, and Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009), which computes
the logits again in the backward. What is different here: J is kept, so the loss stays outside.

Axes: `scored` (targets), `hidden`, `vocab`, `sequences`. Unit: nats.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo.losses import PairLogps

TILE_BYTES = 256 * 2**20  # of fp32 logits; one tile is alive at a time (three with a soft-cap)
MAX_TILE_ROWS = 2048  # more rows do not make the matrix product faster


def token_logps(
    hidden: Float[Tensor, "scored hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " scored"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tile_bytes: int | None = None,
) -> Float[Tensor, " scored"]:
    """Log-probability of each target: log softmax(logits)[target], (scored,) nats.

    logits = cap(logit_scale x (hidden @ weight.T + bias)), cap(z) = softcap x tanh(z / softcap).
    The result is fp32 (float64 for float64 input) whatever the input's dtype; logits are
    accumulated in that dtype. Differentiable in `hidden`, `weight` and `bias`. At most `tile_bytes`
    of logits are alive at once (default: TILE_BYTES); a small tile gives the same numbers, slower.
    """
    logps, _ = token_statistics(
        Predictions(hidden, weight, bias, logit_scale, softcap), targets, None, tile_bytes
    )
    return logps


Statistic = Literal["dispersion", "log_collision"]
"""How sure a prediction p is: its entropy / log V, from 0 to 1; or log sum_v p(v)^2, nats."""


class Predictions(NamedTuple):
    """What a model predicts at each scored position: its states, and the head that reads them."""

    hidden: Float[Tensor, "scored hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def token_statistics(
    predictions: Predictions,
    targets: Int[Tensor, " scored"],
    statistic: Statistic | None,
    tile_bytes: int | None = None,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " values"]]:
    """`token_logps`, and a statistic of each prediction, (scored,), without gradient.

    It costs one more reduction of a tile; where it is None, it costs nothing and is empty.
    """
    hidden, weight, bias, logit_scale, softcap = predictions
    trains = (weight.requires_grad or (bias is not None and bias.requires_grad)) and (
        torch.is_grad_enabled()
    )
    head = TrainedHead if trains else FrozenHead
    if not torch.is_grad_enabled():
        hidden = hidden.detach()  # so that no J is formed
    how = (logit_scale, softcap, tile_bytes or TILE_BYTES, statistic)
    return head.apply(hidden, weight, targets, bias, *how)  # type: ignore[no-any-return]


def token_kls(
    reference: Predictions, policy: Predictions, tile_bytes: int | None = None
) -> Float[Tensor, " scored"]:
    """KL(reference || policy) at each scored position, (scored,) nats; the gradient is policy's.

    Tiles are computed again in the backward: this takes five products with a head, where log-probs
    take two.
    """
    hidden, weight, bias, *how = policy
    tile_bytes = tile_bytes or TILE_BYTES
    return KlHead.apply(hidden, weight, bias, *how, reference, tile_bytes)  # type: ignore[no-any-return]


def sequence_logps(
    token_logps: Float[Tensor, " scored"],
    sequence_ids: Int[Tensor, " scored"],
    num_sequences: int,
) -> Float[Tensor, " sequences"]:
    """Sum of each sequence's token log-probs, (num_sequences,) nats; 0 where none is scored.

    The order of the sum is fixed. Otherwise policy and reference would not tie at step 0.
    """
    zeros = token_logps.new_zeros(num_sequences)
    if token_logps.is_cuda:  # on a GPU index_add sums in any order; this sorts first
        return zeros.index_put((sequence_ids,), token_logps, accumulate=True)
    return zeros.index_add(0, sequence_ids, token_logps)


def pair_logps(
    policy: Float[Tensor, " scored"],
    reference: Float[Tensor, " scored"],
    sequence_ids: Int[Tensor, " scored"],
    num_pairs: int,
) -> PairLogps:
    """Sums token log-probs under both models over each answer: the input of every loss.

    Sequences are chosen_0, rejected_0, chosen_1, ...; lengths count scored tokens. Losses that need
    sums of their own over tokens get them here.
    """
    chosen_and_rejected = (
        sequence_logps(values, sequence_ids, 2 * num_pairs).view(-1, 2).unbind(1)
        for values in (policy, reference, torch.ones_like(reference))
    )
    return PairLogps(*(answer for both in chosen_and_rejected for answer in both))


class FrozenHead(torch.autograd.Function):
    """The head's weight takes no gradient: keep only J (scored, hidden), in the input's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        tile_bytes: int,
        statistic: Statistic | None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs, (scored,), and the statistic; keeps J where the states need a gradient."""
        logps = hidden.new_empty(len(hidden), dtype=_accumulator(hidden))
        values = logps.new_empty(len(hidden) if statistic else 0)
        jacobian = torch.empty_like(hidden) if hidden.requires_grad else None
        for rows in _tiles(len(hidden), len(weight), tile_bytes):
            logits, slope = _logits(hidden[rows], weight, bias, scale, softcap, tile_bytes)
            logps[rows], total = _target_logps_(logits, targets[rows])
            if statistic:
                values[rows] = _statistic(logits, total, statistic)
            if jacobian is not None:
                grad = _grad_logits_(logits, total, targets[rows], slope, scale)
                jacobian[rows] = grad.to(weight.dtype) @ weight
                del grad
            del logits, slope  # otherwise two tiles are alive while the next is made
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(values)
        return logps, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Multiplies J by the gradient of each log-prob."""
        (jacobian,) = ctx.saved_tensors
        return grad_logps[:, None].to(jacobian.dtype) * jacobian, *[None] * 7


class TrainedHead(torch.autograd.Function):
    """The head trains too: its gradient needs the upstream one, so tiles are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        tile_bytes: int,
        statistic: Statistic | None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs, (scored,), and the statistic; keeps the states."""
        ctx.save_for_backward(hidden, weight, targets, bias)
        ctx.scale, ctx.softcap, ctx.tile_bytes = scale, softcap, tile_bytes
        logps = hidden.new_empty(len(hidden), dtype=_accumulator(hidden))
        values = logps.new_empty(len(hidden) if statistic else 0)
        for rows in _tiles(len(hidden), len(weight), tile_bytes):
            logits, _ = _logits(hidden[rows], weight, bias, scale, softcap, tile_bytes)
            logps[rows], total = _target_logps_(logits, targets[rows])
            if statistic:
                values[rows] = _statistic(logits, total, statistic)
            del logits
        ctx.mark_non_differentiable(values)
        return logps, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Computes each tile of logits again, and from it the gradients of states and head."""
        hidden, weight, targets, bias = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_accumulator(weight))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=_accumulator(bias))
        for rows in _tiles(len(hidden), len(weight), ctx.tile_bytes):
            logits, slope = _logits(
                hidden[rows], weight, bias, ctx.scale, ctx.softcap, ctx.tile_bytes
            )
            _, total = _target_logps_(logits, targets[rows])
            grad = _grad_logits_(logits, total, targets[rows], slope, ctx.scale)
            grad = grad.mul_(grad_logps[rows, None])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
            del logits, slope, grad
        grad_bias = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, grad_bias, *[None] * 4


class KlHead(torch.autograd.Function):
    """KL(reference || policy): d KL / d logits is p - p_reference, from tiles computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        reference: Predictions,
        tile_bytes: int,
    ) -> Tensor:
        """The divergences, (scored,); keeps the states of both models."""
        ctx.save_for_backward(hidden, weight, bias)
        ctx.how, ctx.reference, ctx.tile_bytes = (scale, softcap), reference, tile_bytes
        kls = hidden.new_empty(len(hidden), dtype=_accumulator(hidden))
        for rows in _tiles(len(hidden), len(weight), tile_bytes):
            ours, _ = _logits(hidden[rows], weight, bias, scale, softcap, tile_bytes)
            theirs = _log_softmax_(_reference_logits(reference, rows, tile_bytes))
            apart = theirs - _log_softmax_(ours)
            kls[rows] = (apart * theirs.exp_()).sum(1)
            del ours, theirs, apart
        return kls

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kls: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the policy's states and head; the reference has none."""
        hidden, weight, bias = ctx.saved_tensors
        scale, softcap = ctx.how
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad_kls.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_kls.dtype) if needs_bias else None
        for rows in _tiles(len(hidden), len(weight), ctx.tile_bytes):
            ours, slope = _logits(hidden[rows], weight, bias, scale, softcap, ctx.tile_bytes)
            theirs = _reference_logits(ctx.reference, rows, ctx.tile_bytes)
            grad = _log_softmax_(ours).exp_().sub_(_log_softmax_(theirs).exp_())
            grad.mul_(scale * grad_kls[rows, None])
            grad = grad if slope is None else grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
            del ours, theirs, slope, grad
        grads = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        return *(None if g is None else g.to(of.dtype) for g, of in grads), *[None] * 4


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _tiles(num_rows: int, vocab: int, tile_bytes: int) -> list[slice]:
    rows = max(1, min(MAX_TILE_ROWS, tile_bytes // (4 * vocab)))
    return [slice(start, start + rows) for start in range(0, num_rows, rows)]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    tile_bytes: int,
) -> tuple[Tensor, Tensor | None]:
    """One tile of logits, and the slope of the soft-cap at each of them (None without one)."""
    logits = _matmul_accumulated(hidden, weight, tile_bytes)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is None:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    slope = 1 - tanh * tanh
    return tanh.mul_(softcap), slope


def _matmul_accumulated(hidden: Tensor, weight: Tensor, tile_bytes: int) -> Tensor:
    """Hidden @ weight.T with fp32 results: bf16 ones would cost 1.7e-2 nats a token."""
    dtype = _accumulator(hidden)
    if hidden.dtype == dtype:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    # A CPU has no mixed-precision product: upcast the head piece by piece, a tile's worth at once.
    logits = hidden.new_empty(len(hidden), len(weight), dtype=dtype)
    upcast = hidden.to(dtype)
    for columns in _tiles(len(weight), weight.shape[1], tile_bytes):
        logits[:, columns] = upcast @ weight[columns].to(dtype).T
    return logits


def _target_logps_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets (rows,) and softmax denominators (rows, 1).

    In place: `logits` becomes exp(logits - row maximum).
    """
    logits -= logits.amax(dim=1, keepdim=True)
    target_logits = logits.gather(1, targets[:, None])
    total = logits.exp_().sum(dim=1, keepdim=True)
    return (target_logits - total.log()).squeeze(1), total


def _reference_logits(reference: Predictions, rows: slice, tile_bytes: int) -> Tensor:
    hidden, weight, bias, scale, softcap = reference
    return _logits(hidden[rows], weight, bias, scale, softcap, tile_bytes)[0]


def _log_softmax_(logits: Tensor) -> Tensor:
    """In place."""
    return logits.sub_(logits.logsumexp(1, keepdim=True))


def _statistic(exp: Tensor, total: Tensor, statistic: Statistic) -> Tensor:
    """The statistic of the predictions exp / total, (rows,)."""
    if statistic == "log_collision":
        return torch.einsum("rv,rv->r", exp, exp).log() - 2 * total[:, 0].log()
    entropy = total[:, 0].log() - torch.xlogy(exp, exp).sum(1) / total[:, 0]
    return entropy / math.log(exp.shape[1])


def _grad_logits_(
    exp: Tensor, total: Tensor, targets: Tensor, slope: Tensor | None, scale: float
) -> Tensor:
    """In place, from the exponentials: d logp / d (hidden @ weight.T) = scale slope (1_target - p).

    The target's column is subtracted in fp32, before any cast: near p = 1 it is a small difference.
    """
    exp.scatter_add_(1, targets[:, None], -total)
    grad = exp.mul_(-scale / total)
    return grad if slope is None else grad.mul_(slope)
