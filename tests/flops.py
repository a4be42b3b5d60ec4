"""FLOPs that a piece of work really does, counted operation by operation."""

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def visible(queries, keys, masked):
    """Query-key pairs of a call: all, or those of a causal one (aligned at the bottom right)."""
    return queries * keys - queries**2 / 2 if masked else queries * keys


def sdpa(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, **_):
    """Two products: (queries, keys) by the width of the key, and back by that of the value."""
    batch, heads, queries, width = query
    masked = is_causal or attn_mask is not None
    return batch * heads * 2 * (width + value[3]) * visible(queries, key[2], masked)


def sdpa_backward(grad, query, key, value, out, logsumexp, dropout_p, is_causal, **kwargs):
    """Five products for the forward's two: the scores again, and four gradients."""
    return 2.5 * sdpa(query, key, value, dropout_p, is_causal, **kwargs)


def addmm_(total, left, right, **_):
    """In place; PyTorch's counter knows only the other one."""
    return 2 * left[0] * left[1] * right[1]


def grouped_mm(left, right, *_, **__):
    """Rows sorted by expert: each meets one of the stacked matrices. Or the gradient of these."""
    return 2 * left[0] * left[1] * right[-1]


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward,
    aten.addmm_: addmm_,
    aten._grouped_mm: grouped_mm,
}


def counted_flops(work):
    """FLOPs of matrix products and attention while `work()` runs."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()
