"""Norm and product have the gradients of their values; weights are cast once a step."""

import math
import weakref

import bitsandbytes.optim
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpo.config import OptimConfig
from dpo.model import kernels
from dpo.model.kernels import Call, Product, cast_once, dropout, rms_norm
from dpo.train.optim import build_optimizer


@pytest.mark.parametrize("shape", [(5, 8), (1, 3, 2, 8)])
def test_rms_norm_has_the_gradient_of_its_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


@pytest.mark.parametrize("with_adapter", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("is_gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_a_lean_product_has_the_gradient_of_its_values(with_adapter, is_gated, has_bias):
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    base = nn.Linear(6, 4, bias=has_bias).double()
    a, b = (random(3, 6), random(4, 3)) if with_adapter else (None, None)
    gate = random(1, 5, 6) if is_gated else None
    call = Call(base, (lambda gate, up: F.silu(gate) * up) if is_gated else None, 0.7)

    def product(x, gate, weight, bias, a, b):
        return Product.apply(x, gate, weight, bias, a, b, call)

    assert torch.autograd.gradcheck(product, (random(1, 5, 6), gate, base.weight, base.bias, a, b))


def three_products(change=lambda h: h):
    """Three products of one norm, its input and weight, and what the norm was formed by."""
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    layers = [nn.Linear(6, 4).double() for _ in range(3)]
    adapters = [(torch.randn(2, 6).double(), torch.randn(4, 2).double()) for _ in layers]

    def total(x, w, *, keeps_its_input=False):
        h = change(rms_norm(x, w, 1e-5))
        if keeps_its_input:
            h = h + 0
        outs = (
            Product.apply(h, None, layer.weight, layer.bias, *adapter, Call(layer, None, 0.7))
            for layer, adapter in zip(layers, adapters, strict=True)
        )
        return sum(out.sin().sum() for out in outs)

    return x, w, layers, total


def test_a_norm_is_formed_again_once_for_all_products_that_read_it(monkeypatch):
    formed, form = [], kernels._normed
    monkeypatch.setattr(kernels, "_normed", lambda *kept: formed.append(1) or form(*kept))
    x, w, layers, total = three_products()
    inputs = [x, w, *(p for layer in layers for p in layer.parameters())]
    expected = torch.autograd.grad(total(x, w, keeps_its_input=True), inputs)
    assert len(formed) == 1  # in the forward
    result = total(x, w)
    for _ in range(2):  # and in a second backward over one graph
        del formed[:]
        for got, wanted in zip(
            torch.autograd.grad(result, inputs, retain_graph=True), expected, strict=True
        ):
            assert torch.equal(got, wanted)
        assert len(formed) == 1
    assert torch.autograd.gradcheck(total, (x, w))


def test_a_norm_that_somebody_has_changed_is_kept_as_it_is():
    x, w, layers, total = three_products(change=lambda h: h.mul_(2))
    inputs = [x, w, *(layer.weight for layer in layers)]
    expected = torch.autograd.grad(total(x, w, keeps_its_input=True), inputs)
    assert all(map(torch.equal, torch.autograd.grad(total(x, w), inputs), expected))


def test_under_checkpointing_no_input_of_a_norm_outlives_the_forward():
    """Else each layer kept what checkpointing is there to let go."""
    x, w, _, total = three_products()
    alive = []

    def layer(x, w):
        inner = x * 1
        alive.append(weakref.ref(inner))
        return total(inner, w)

    result = checkpoint(layer, x, w, use_reentrant=False)
    assert alive[0]() is None
    expected = torch.autograd.grad(layer(x, w), (x, w))
    assert all(map(torch.equal, torch.autograd.grad(result, (x, w)), expected))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9, 1 - 2**-20])
def test_dropout_drops_its_share_at_random_and_keeps_the_mean(rate):
    """Shares within five standard errors; no number depends on its neighbours, with which it
    shares 64 drawn bits, nor on the number below it."""
    n = 999_999  # the last draw serves three numbers
    out, kept = dropout(torch.full((n // 3, 3), 2.0), rate)
    error = 5 * math.sqrt(max(rate * (1 - rate), 1e-6) / n)
    assert abs(kept.float().mean().item() - (1 - rate)) < error + 2**-16
    assert torch.equal(out, kept * torch.tensor(2.0).div(1 - rate))
    centred = kept.flatten().double() - (1 - rate)
    for step in (1, 2, 3, 4):
        both = (centred[step:] * centred[:-step]).mean().abs()
        assert both < 5 * max(rate * (1 - rate), 1e-6) / math.sqrt(n)
    torch.manual_seed(0)
    first = dropout(torch.ones(5, 3), rate)[1]
    torch.manual_seed(0)
    assert torch.equal(first, dropout(torch.ones(5, 3), rate)[1])


def test_dropouts_gradient_is_not_scaled_by_a_rounded_rate():
    """1 / 0.95 in bfloat16 is 1.0547, 0.2 % too much: a mask of that type would carry it."""
    layer = nn.Linear(4096, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(layer.weight)
    x = torch.zeros(64, 4096, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(1, 4096), torch.ones(1, 1)
    out = Product.apply(x, None, layer.weight, None, a, b, Call(layer, None, 1.0, 0.05))
    (grad,) = torch.autograd.grad(out.sum(), x)
    kept, exact = grad != 0, a.bfloat16().double().expand_as(grad) / 0.95
    assert 0.94 < kept.double().mean() < 0.96
    ratio = grad[kept].double().abs().sum() / exact[kept].abs().sum()
    assert abs(ratio - 1) < 3e-4
    rounded = (a.bfloat16() * torch.tensor(1 / 0.95).bfloat16()).double().expand_as(grad)
    assert rounded[kept].abs().sum() / exact[kept].abs().sum() > 1.0015  # so the bound can fail


# ------------------------------------------------------------------------- fp32 adapter masters


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"])
def test_the_cast_weights_follow_every_optimizer(name):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(layer, OptimConfig(name=name, learning_rate=0.1))
    for _ in range(3):
        half = cast_once(layer.weight, torch.bfloat16)
        assert cast_once(layer.weight, torch.bfloat16) is half  # once a step
        layer.weight.grad = torch.randn(64, 64)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        now = cast_once(layer.weight, torch.bfloat16)
        assert torch.equal(now, layer.weight.detach().bfloat16())
        assert not torch.equal(now, half)


def test_a_weight_that_is_replaced_or_loaded_is_cast_again():
    layer = nn.Linear(4, 4)
    cast_once(layer.weight, torch.bfloat16)
    layer.load_state_dict({"weight": torch.ones(4, 4), "bias": torch.zeros(4)})
    assert cast_once(layer.weight, torch.bfloat16).eq(1).all()
    layer.weight.data = torch.full((4, 4), 2.0)
    assert cast_once(layer.weight, torch.bfloat16).eq(2).all()
    assert cast_once(layer.weight, torch.float32).data_ptr() == layer.weight.data_ptr()


def test_a_kernel_that_writes_past_pytorch_would_leave_old_copies():
    """Why `build_optimizer` reports bitsandbytes' steps: nothing else tells."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer = bitsandbytes.optim.AdamW32bit(layer.parameters(), lr=0.1)
    half = cast_once(layer.weight, torch.bfloat16)
    layer.weight.grad = torch.randn(64, 64)
    optimizer.step()
    assert cast_once(layer.weight, torch.bfloat16) is half
    torch.autograd.graph.increment_version(layer.weight)
    assert cast_once(layer.weight, torch.bfloat16) is not half
