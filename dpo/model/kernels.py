"""A norm and a product that keep little for their backward, and compute the rest again.

What a layer of a decoder keeps for its backward decides how many tokens go through the model at
once. PEFT over plain PyTorch keeps several copies of every activation: fp32 casts, dropout's
outputs and masks, the outputs of element-wise operations. Here a layer keeps what its products
need and computes the rest again:

    norm      x                     and one number per token
    LoRA      x, or, where x is a norm, nothing but the r numbers of x A^T: the norm is computed
              again, once for all products that read it; dropout's mask is drawn again
    MLP       gate(x) and up(x)     their product act(gate) * up is computed again

Of LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3), h = W0 x + (alpha / r) B A x, the update is
added into W0 x in place. The adapter's fp32 weights are cast to the model's type once a step, and
their gradients are summed in fp32. W0 may be 4-bit: it is dequantised for each product.

`dpo.model.lean` gives a model's modules these forwards. Left out on purpose: Triton and CUDA code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rms_norm(
    x: Float[Tensor, "*tokens hidden"], weight: Float[Tensor, " hidden"], eps: float
) -> Float[Tensor, "*tokens hidden"]:
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), computed in fp32.

    Keeps x and one number per token. As in Llama, the result is rounded to x's type before it is
    multiplied with the weight. `Product` keeps x in its place, and forms the result again.
    """
    if x.is_cuda:  # one kernel, which keeps no more
        form, kept = partial(_normed_on_gpu, eps), (x, weight)
        normed = form(*kept)
    else:
        normed, inverse = _RmsNorm.apply(x, weight, eps)
        form, kept = _normed, (x, weight, inverse)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        source = FormedFrom(kept, FormedAgain(form), normed._version)
        normed.formed_from = source  # type: ignore[attr-defined]
    return normed


def _normed_on_gpu(eps: float, x: Tensor, weight: Tensor) -> Tensor:
    return weight * F.rms_norm(x, x.shape[-1:], eps=eps)


def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    normed = x.to(inverse.dtype) * inverse
    # When torch 2.11 compiles it, `.to` of the same type lets no gradient through.
    return weight * (normed if normed.dtype == x.dtype else normed.to(x.dtype))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = x.float() if x.dtype.itemsize < 4 else x
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _normed(x, weight, inverse), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """With r = 1 / rms and g = grad w: dx = r g - r^3 mean(g x) x, and dw = sum(grad r x)."""
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.to(inverse.dtype), grad.to(inverse.dtype)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_weight:
            grad_weight = _rows(grad * wide * inverse).sum(0).to(weight.dtype)
        if needs_x:
            grad_x = grad * weight
            share = (grad_x * wide).mean(-1, keepdim=True) * inverse.pow(3)
            grad_x = grad_x.mul_(inverse).addcmul_(wide, share, value=-1).to(x.dtype)
        return grad_x, grad_weight, None


class FormedAgain:
    """Forms a tensor again in the backward, once for all of its readers, which do not keep it."""

    def __init__(self, form: Callable[..., Tensor]):
        self.form = form
        self.readers = self._left = 0
        self._formed: Tensor | None = None

    def __call__(self, *kept: Tensor) -> Tensor:
        """The tensor, for one reader; the last one lets go of it."""
        if self._formed is None:
            self._formed, self._left = self.form(*kept), self.readers
        formed, self._left = self._formed, self._left - 1
        if not self._left:
            self._formed = None
        return formed


class FormedFrom(NamedTuple):
    """An attribute of a tensor: what its readers keep instead, as long as nobody has changed it."""

    kept: tuple[Tensor, ...]
    again: FormedAgain
    version: int


class Call(NamedTuple):
    """The inputs of `Product` that take no gradient."""

    base: nn.Linear  # W0 and its bias; or bitsandbytes' 4-bit layer
    gated: Callable[[Tensor, Tensor], Tensor] | None
    scale: float = 0.0
    dropout: float = 0.0


class _PerInput(NamedTuple):
    """One value per input of `Product`: whether its gradient is wanted, or the gradient."""

    x: Any = None
    gate: Any = None
    weight: Any = None
    bias: Any = None
    lora_a: Any = None
    lora_b: Any = None
    call: Any = None


class Product(torch.autograd.Function):
    """base(h) + scale * dropout(h) A^T B^T, with h = x, or h = act(gate) * x computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Keeps x, or what it is formed from, gate and the r numbers of x A^T.

        Of dropout it keeps only the generator's state.
        """
        h = x if gate is None or call.gated is None else call.gated(gate, x)
        out = call.base(h)
        a: Tensor | None = None
        b: Tensor | None = None
        low: Tensor | None = None
        if lora_a is not None and lora_b is not None:
            a, b = (cast_once(adapter, h.dtype) for adapter in (lora_a, lora_b))
            rows = _rows(h)
            if call.dropout:
                ctx.random = _random_state(h.device)  # read before the mask is drawn
                rows, _ = dropout(rows, call.dropout)
            low = torch.mm(rows, a.T)
            out.view(-1, out.shape[-1]).addmm_(low, b.T, alpha=call.scale)
        ctx.call = call
        kept, ctx.again = _instead_of(x)
        ctx.save_for_backward(gate, weight, a, b, low, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Computes again what was not kept, and from it the gradients that are wanted."""
        gate, weight, a, b, low, *kept_of_x = ctx.saved_tensors
        x = ctx.again(*kept_of_x) if ctx.again else kept_of_x[0]
        call: Call = ctx.call
        wants = _PerInput(*ctx.needs_input_grad)
        with torch.enable_grad():  # autograd for the element-wise part only
            inputs = (x,) if gate is None else (gate.detach(), x.detach())
            if gate is not None and call.gated is not None:
                formed = call.gated(*(t.requires_grad_() for t in inputs))
        h = _rows(x if gate is None else formed.detach())
        grad_out = _rows(grad)
        grad_low: Any = None
        kept: Any = None
        grads: dict[str, Tensor] = {}
        if a is not None:
            grad_low = (grad_out @ b).mul_(call.scale)
            seen = h
            if call.dropout:
                seen, kept = _dropout_again(h, call.dropout, ctx.random)
            grads["lora_a"] = _sum32(grad_low.T, seen)
            grads["lora_b"] = _sum32(grad_out.T, low).mul_(call.scale)
            del seen
        if wants.weight:
            grads["weight"] = grad_out.T @ h
        if wants.bias:
            grads["bias"] = grad_out.sum(0)
        if wants.x or wants.gate:
            w = weight if weight is not None else _dequantised(call.base).to(grad.dtype)
            grad_h = grad_out @ w
            del w
            if kept is not None:
                grad_h.addcmul_(grad_low @ a, kept, value=1 / (1 - call.dropout))
            elif a is not None:
                grad_h.addmm_(grad_low, a)
            grad_h = grad_h.view_as(x)
            if gate is None:
                grads["x"] = grad_h
            else:
                grads["gate"], grads["x"] = torch.autograd.grad(formed, inputs, grad_h)
        return _PerInput(**grads)


def _instead_of(x: Tensor) -> tuple[tuple[Tensor, ...], FormedAgain | None]:
    """What a reader of x keeps: x, or what it is formed from and who forms it."""
    source: FormedFrom | None = getattr(x, "formed_from", None)
    if source is None or source.version != x._version:
        return (x,), None
    source.again.readers += 1
    return source.kept, source.again


def dropout(h: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """H with a share of its numbers set to 0 and the others scaled up; and which ones it kept.

    On a CPU PyTorch's own draws a double for each number, in one thread. Here four numbers share
    the generator's 64 bits, so that the rate is a multiple of 2^-16.
    """
    if h.device.type != "cpu":
        return torch.native_dropout(h, rate, True)
    drawn = torch.empty(-(-h.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    uniform = drawn.view(torch.int16)[: h.numel()].view(h.shape)  # from -2^15 up
    kept = uniform >= min(round(rate * 2**16), 2**16 - 1) - 2**15
    return torch.where(kept, h, 0).div_(1 - rate), kept


def cast_once(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in another type, made again only when the parameter has changed since."""
    if parameter.dtype == dtype:
        return parameter.detach()
    state = (parameter._version, parameter.untyped_storage()._cdata, dtype)
    kept = getattr(parameter, "_cast_once", None)
    if kept is None or kept[0] != state:
        kept = (state, parameter.detach().to(dtype))
        parameter._cast_once = kept  # type: ignore[attr-defined]
    return kept[1]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _sum32(left: Tensor, right: Tensor) -> Tensor:
    """Product over all tokens, summed in fp32: nothing of an adapter's gradient is rounded off.

    On a CPU, which has no such product, it is rounded once, at the end.
    """
    if left.is_cuda and left.dtype.itemsize < 4:
        return torch.mm(left, right, out_dtype=torch.float32)
    product = left @ right
    return product.float() if product.dtype.itemsize < 4 else product


def _dequantised(base: nn.Module) -> Tensor:
    """The weight of a 4-bit layer, (out, in), in the type that it was quantised from."""
    import bitsandbytes.functional

    weight: Any = base.weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _dropout_again(h: Tensor, rate: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Dropout's output for h with the generator in this state, and the mask of what it kept."""
    with _generator_at(state, h.device):
        return dropout(h, rate)


@contextmanager
def _generator_at(state: Tensor, device: torch.device) -> Iterator[None]:
    is_cuda = device.type == "cuda"
    now = _random_state(device)
    put = torch.cuda.set_rng_state if is_cuda else torch.set_rng_state
    where = (device,) if is_cuda else ()
    put(state, *where)
    try:
        yield
    finally:
        put(now, *where)
