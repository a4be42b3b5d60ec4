"""Memory-lean layers: the same numbers, and less kept for the backward.

`make_lean` gives the modules of a model the forwards of `dpo.model.kernels`, one by one, where a
probe shows that they compute the same; the others stay as they are, and it says which. A module's
weights, names and files do not change, and whatever else it may have to do (a merge, several
adapters, an adapter switched off) its own code does.

Left out on purpose: adapters of adapters (DoRA), int8 and stacked experts.
"""

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dpo.model.kernels import Call, Product, rms_norm


def make_lean(model: nn.Module) -> str:
    """Makes the layers of a model keep less, if they are of a kind known here; in place.

    Call it once the adapter is in place. Weights changed by code that PyTorch does not see (a
    kernel of another library) must be reported: `torch.autograd.graph.increment_version`.

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
    """Applies a plain layer, or one of PEFT's with its one active adapter."""
    base, call, adapter = layer, Call(layer, gated), (None, None)
    if isinstance(layer, _LeanLora):
        name, base = active_adapter(layer), layer.get_base_layer()  # type: ignore[operator]
        dropout = layer.lora_dropout[name]  # type: ignore[index]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        call = Call(base, gated, layer.scaling[name], rate)  # type: ignore[index]
        adapter = (layer.lora_A[name].weight, layer.lora_B[name].weight)  # type: ignore[index]
    is_plain = getattr(base.weight, "quant_state", None) is None
    weights = (base.weight, base.bias) if is_plain else (None, None)
    return Product.apply(x, gate, *weights, *adapter, call)  # type: ignore[no-any-return]


def active_adapter(layer: Any) -> str | None:
    """Name of a PEFT layer's only active adapter; None if it is off, merged or one of several."""
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
    """The kind of module this looks like; `_FITS` says whether our forward computes the same."""
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
    """Tries a small one: whether it computes what `rms_norm` does, to the bit."""
    try:
        norm: Any = kind(8)
        x = torch.linspace(-3, 2, 24).view(3, 8)
        for dtype in (torch.float32, torch.bfloat16):
            norm.to(dtype).weight.data = torch.linspace(0.5, 2, 8, dtype=dtype)
            if not torch.equal(norm(x.to(dtype)), rms_norm(x.to(dtype), norm.weight, _eps(norm))):
                return False
        return len([*norm.parameters()]) == 1
    except Exception:  # a class may need any arguments
        return False


def _is_gated_mlp(kind: type[nn.Module], config: Any) -> bool:
    """Tries a small one: whether it computes down(act(gate) * up), to the bit."""
    try:
        small = copy.deepcopy(config)
        small.hidden_size, small.intermediate_size = 8, 12
        with torch.random.fork_rng(devices=[]):
            mlp: Any = kind(small)
        x = torch.linspace(-3, 2, 24).view(3, 8)
        return torch.equal(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))
    except Exception:  # a class may need any arguments
        return False


def _eps(norm: nn.Module) -> float:
    """The norm's epsilon, under the names that model families give it."""
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return getattr(norm, name)
    raise AttributeError(f"{type(norm).__name__} names no epsilon that is known here")
