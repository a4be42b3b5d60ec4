"""Memory-lean layers: the same numbers, and less kept for the backward.

What a layer of a decoder keeps for its backward decides how many tokens go through the model at
once. PEFT over plain PyTorch keeps several copies of every activation: fp32 casts, dropout's
outputs and masks, the outputs of what is element-wise. Here a layer keeps what its products need
and forms the rest again:

    norm      x                     and one number a token
    LoRA      x                     and the r numbers of x A^T; dropout's mask is drawn again
    MLP       gate(x) and up(x)     their product act(gate) * up is formed again

`make_lean` gives the modules of a model these forwards, one by one, where a probe shows that they
compute the same; the others stay as they are, and it says which. A module's weights, names and
files do not change, and whatever else it is asked (a merge, several adapters, an adapter switched
off) is answered by its own code.

Of LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3), h = W0 x + (alpha / r) B A x, the update is
added into W0 x in place. The adapter's fp32 weights are cast to the model's type once a step, and
their gradients are summed in fp32. W0 may be 4-bit: its numbers are formed for each product.

Left out on purpose: Triton and CUDA code, adapters of adapters (DoRA), int8 and stacked experts.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def make_lean(model: nn.Module) -> str:
    """Makes the layers of a model keep less, where they are of a kind known here; in place.

    Call it when the adapter is there. Weights changed by code that PyTorch does not see (a kernel
    of another library) must be reported: `torch.autograd.graph.increment_version`.

    Returns:
        What was made lean and what was left, in words, for the run header.
    """
    lean: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for module in [*model.modules()]:
        kind = _kind(module)
        if kind is None:
            continue
        if _FITS[kind](module):
            module.__class__ = _lean_class(type(module), kind)
            lean[_NAMES[kind]] += 1
        else:
            left[type(module).__name__] += 1
    said = ", ".join(f"{number} {name}" for name, number in lean.items()) or "none"
    kept = ", ".join(f"{number} {name}" for name, number in left.items())
    return f"lean layers: {said}" + (f"; as they are: {kept}" if kept else "")


def rms_norm(
    x: Float[Tensor, "*tokens hidden"], weight: Float[Tensor, " hidden"], eps: float
) -> Float[Tensor, "*tokens hidden"]:
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), in fp32 inside.

    Keeps x and one number a token. As in Llama, the result is rounded to x's type before it is
    multiplied with the weight.
    """
    if x.is_cuda:  # one kernel, which keeps as little
        return weight * F.rms_norm(x, x.shape[-1:], eps=eps)
    return weight * _RmsNorm.apply(x, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse)
        normed = wide * inverse
        # Compiled by torch 2.11, `.to` of the same type would let no gradient through.
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """With n = x / rms: dx = (g - n mean(g n)) / rms."""
        x, inverse = ctx.saved_tensors
        normed = x.to(inverse.dtype).mul(inverse)
        grad_x = grad.to(inverse.dtype) - normed.mul_((grad * normed).mean(-1, keepdim=True))
        return grad_x.mul_(inverse).to(x.dtype), None


class _Call(NamedTuple):
    """What a lean product needs and no gradient goes to."""

    base: nn.Linear  # W0 and its bias; or bitsandbytes' layer of 4 bits
    gated: Callable[[Tensor, Tensor], Tensor] | None
    scale: float = 0.0
    dropout: float = 0.0


class _Linear(torch.autograd.Function):
    """base(h) + scale * dropout(h) A^T B^T, with h = x, or h = act(gate) * x formed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        call: _Call,
    ) -> Tensor:
        h = x if gate is None or call.gated is None else call.gated(gate, x)
        out = call.base(h)
        a: Tensor | None = None
        b: Tensor | None = None
        low: Tensor | None = None
        if lora_a is not None and lora_b is not None:
            a, b = (cast_once(adapter, h.dtype) for adapter in (lora_a, lora_b))
            rows = _rows(h)
            if call.dropout:
                ctx.random = _random_state(h.device)  # before it is drawn from
                rows, _ = torch.native_dropout(rows, call.dropout, True)
            low = torch.mm(rows, a.T)
            out.view(-1, out.shape[-1]).addmm_(low, b.T, alpha=call.scale)
        ctx.call = call
        ctx.save_for_backward(x, gate, weight, a, b, low)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate, weight, a, b, low = ctx.saved_tensors
        call: _Call = ctx.call
        wants = ctx.needs_input_grad
        with torch.enable_grad():  # of what is element-wise alone
            inputs = (x,) if gate is None else (gate.detach(), x.detach())
            if gate is not None and call.gated is not None:
                formed = call.gated(*(t.requires_grad_() for t in inputs))
        h = _rows(x if gate is None else formed.detach())
        grad_out = _rows(grad)
        grad_low: Any = None
        kept: Any = None
        grads: list[Tensor | None] = [None] * 7
        if a is not None:
            grad_low = (grad_out @ b).mul_(call.scale)
            seen = h
            if call.dropout:
                seen, kept = _dropout_again(h, call.dropout, ctx.random)
            grads[4] = _sum32(grad_low.T, seen)
            grads[5] = _sum32(grad_out.T, low).mul_(call.scale)
            del seen
        if wants[2]:
            grads[2] = grad_out.T @ h
        if wants[3]:
            grads[3] = grad_out.sum(0)
        if wants[0] or wants[1]:
            w = weight if weight is not None else _dequantised(call.base).to(grad.dtype)
            grad_h = grad_out @ w
            del w
            if kept is not None:
                grad_h.addcmul_(grad_low @ a, kept, value=1 / (1 - call.dropout))
            elif a is not None:
                grad_h.addmm_(grad_low, a)
            grad_h = grad_h.view_as(x)
            if gate is None:
                grads[0] = grad_h
            else:
                grads[1], grads[0] = torch.autograd.grad(formed, inputs, grad_h)
        return tuple(grads)


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
    """Product over all tokens, its sums in fp32: of an adapter's gradient nothing is rounded off.

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
    """What dropout made of h when the generator was in this state, and which numbers it kept."""
    with _generator_at(state, h.device):
        return torch.native_dropout(h, rate, True)


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


class _LeanNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, _eps(self))  # type: ignore[arg-type]


class _LeanLora(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or active_adapter(self) is None:
            return super().forward(x, *args, **kwargs)
        return _linear(self, x)  # type: ignore[call-arg]


class _LeanMlp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj  # type: ignore[operator]

        def gated(gate: Tensor, up: Tensor) -> Tensor:
            return self.act_fn.forward(gate) * up  # type: ignore[union-attr,operator]

        if type(down) is nn.Linear or (isinstance(down, _LeanLora) and active_adapter(down)):
            return _linear(down, up, gate, gated)  # type: ignore[call-arg]
        return down(gated(gate, up))  # type: ignore[operator]


@torch.compiler.disable  # nothing to fuse with its products
def _linear(layer: Any, x: Tensor, gate: Tensor | None = None, gated: Any = None) -> Tensor:
    """A plain layer, or one of PEFT's with its one active adapter."""
    base, call, adapter = layer, _Call(layer, gated), (None, None)
    if isinstance(layer, _LeanLora):
        name, base = active_adapter(layer), layer.get_base_layer()  # type: ignore[operator]
        dropout = layer.lora_dropout[name]  # type: ignore[index]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        call = _Call(base, gated, layer.scaling[name], rate)  # type: ignore[index]
        adapter = (layer.lora_A[name].weight, layer.lora_B[name].weight)  # type: ignore[index]
    is_plain = getattr(base.weight, "quant_state", None) is None
    weights = (base.weight, base.bias) if is_plain else (None, None)
    return _Linear.apply(x, gate, *weights, *adapter, call)  # type: ignore[no-any-return]


def active_adapter(layer: Any) -> str | None:
    """Of a LoRA layer of PEFT's, if it has exactly one that is neither switched off nor merged."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 else None


_MIXINS: dict[str, type[nn.Module]] = {"norm": _LeanNorm, "mlp": _LeanMlp, "lora": _LeanLora}
_NAMES = {"norm": "norms", "mlp": "gated MLPs", "lora": "LoRA products"}


@cache
def _lean_class(own: type[nn.Module], kind: str) -> type[nn.Module]:
    """A subclass with our forward, which can still call the module's own."""
    return type(f"Lean{own.__name__}", (_MIXINS[kind], own), {})


def _kind(module: nn.Module) -> str | None:
    """What a module is by its looks; whether ours computes the same is for `_FITS` to say."""
    if isinstance(module, (_LeanNorm, _LeanMlp, _LeanLora)):
        return None
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return "lora"
    if type(module).__name__.endswith("Norm"):
        return "norm"
    return "mlp" if type(module).__name__.endswith("MLP") else None


def _fits_lora(layer: Any) -> bool:
    import peft.tuners.lora as peft_lora

    base = layer.get_base_layer()
    is_4bit = type(base).__name__ == "Linear4bit" and hasattr(peft_lora, "Linear4bit")
    own = peft_lora.Linear4bit if is_4bit else peft_lora.Linear  # type: ignore[attr-defined]
    return (
        type(layer) is own
        and (is_4bit or type(base) is nn.Linear)
        and not (layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values()))
    )


def _fits_norm(norm: nn.Module) -> bool:
    return _is_rms_norm(type(norm))


def _fits_mlp(mlp: Any) -> bool:
    down = getattr(mlp, "down_proj", None)
    has_lora = hasattr(down, "lora_A")
    fits_down = (
        _fits_lora(down) or isinstance(down, _LeanLora) if has_lora else type(down) is nn.Linear
    )
    return fits_down and _is_gated_mlp(type(mlp), getattr(mlp, "config", None))


_FITS: dict[str, Callable[[Any], bool]] = {
    "norm": _fits_norm,
    "mlp": _fits_mlp,
    "lora": _fits_lora,
}


@cache
def _is_rms_norm(kind: type[nn.Module]) -> bool:
    """Tries a small one: whether it computes, to the bit, what `rms_norm` does."""
    try:
        norm: Any = kind(8)
        x = torch.linspace(-3, 2, 24).view(3, 8)
        for dtype in (torch.float32, torch.bfloat16):
            norm.to(dtype).weight.data = torch.linspace(0.5, 2, 8, dtype=dtype)
            if not torch.equal(norm(x.to(dtype)), rms_norm(x.to(dtype), norm.weight, _eps(norm))):
                return False
        return len([*norm.parameters()]) == 1
    except Exception:  # any class may be made in any way
        return False


def _is_gated_mlp(kind: type[nn.Module], config: Any) -> bool:
    """Tries a small one: whether it computes, to the bit, down(act(gate) * up)."""
    try:
        small = copy.deepcopy(config)
        small.hidden_size, small.intermediate_size = 8, 12
        with torch.random.fork_rng(devices=[]):
            mlp: Any = kind(small)
        x = torch.linspace(-3, 2, 24).view(3, 8)
        return torch.equal(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))
    except Exception:  # any class may be made in any way
        return False


def _eps(norm: nn.Module) -> float:
    """Under the names that model families give it."""
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return getattr(norm, name)
    raise AttributeError(f"{type(norm).__name__} names no epsilon that is known here")
