"""The two ways to compute the attention along paths are one: a call for all, a call a segment."""

import pytest
import torch

from dpo.data.stream import build_stream
from dpo.model import attention
from dpo.model.attention import Segments, _Repeat, serves_varlen
from dpo.model.scorer import Scorer
from tests.model.test_scorer import PAIRS, assert_same
from tests.models import tiny, with_lora
from tests.oracle import stream_logps


def plain_varlen(q, k, v, query_ends, key_ends, most_q, most_k, *, scale, window_size, enable_gqa):
    """What `varlen_attn` promises, written out: every segment by itself, softmax of all scores.

    A query of a segment with more keys than queries is aligned at the bottom right.
    """
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    left, right = window_size
    assert right == 0
    lengths = {"q": query_ends.diff().tolist(), "k": key_ends.diff().tolist()}
    assert (max(lengths["q"]), max(lengths["k"])) <= (most_q, most_k)
    assert all(lengths["q"])  # of a segment without queries the kernel writes no gradient
    outputs = []
    for queries, keys, values in zip(
        q.split(lengths["q"]), k.split(lengths["k"]), v.split(lengths["k"]), strict=True
    ):
        at = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        back = at - torch.arange(len(keys))
        hidden = (back < 0) | ((back > left) if left >= 0 else False)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "mistral sliding", "qwen3", "gemma"])
def test_one_call_for_all_segments_equals_one_answer_at_a_time(family, checkpointing, monkeypatch):
    """With a stand-in for the CUDA kernel: what it is given, and what is done with its result."""
    monkeypatch.setattr(attention, "serves_varlen", lambda query, value: True)
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "_VARLEN_GROUPS", True)
    model = with_lora(tiny(family)).train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    scorer = Scorer(model)
    assert scorer.layout == "shared"
    assert_same(model, scorer(build_stream(PAIRS)), stream_logps(model, PAIRS))


def test_where_the_kernel_takes_no_grouped_heads_keys_are_repeated(monkeypatch):
    """As in torch 2.11."""

    def without_groups(*args, **kwargs):
        assert "enable_gqa" not in kwargs
        return plain_varlen(*args, **kwargs, enable_gqa=False)

    monkeypatch.setattr(attention, "serves_varlen", lambda query, value: True)
    monkeypatch.setattr(attention, "varlen_attn", without_groups)
    monkeypatch.setattr(attention, "_VARLEN_GROUPS", False)
    monkeypatch.setattr(attention, "takes_grouped_heads", lambda device: False)
    model = with_lora(tiny()).train()
    assert_same(model, Scorer(model)(build_stream(PAIRS)), stream_logps(model, PAIRS))


def grouped_without_saying(q, k, v, *where, window_size):
    """The kernel of torch 2.11: grouped heads are taken, and no argument names them."""
    is_grouped = q.shape[1] != k.shape[1]
    return plain_varlen(
        q, k, v, *where, scale=q.shape[-1] ** -0.5, window_size=window_size, enable_gqa=is_grouped
    )


def refuses_groups(q, k, v, *where, window_size):
    if q.shape[1] != k.shape[1]:
        raise RuntimeError("Expect query and key/value to have the same number of heads")
    return grouped_without_saying(q, k, v, *where, window_size=window_size)


def mixes_groups_up(q, k, v, *where, window_size):
    """As if query head i belonged to key head i modulo their number."""
    repeated = (torch.cat([t] * (q.shape[1] // t.shape[1]), dim=1) for t in (k, v))
    return grouped_without_saying(q, *repeated, *where, window_size=window_size)


def loses_a_gradient(q, k, v, *where, window_size):
    """Of the second half of the groups: what a backward that knows no groups would do."""
    if q.shape[1] != k.shape[1]:
        v = torch.cat([v[:, :1], v[:, 1:].detach()], dim=1)
    return grouped_without_saying(q, k, v, *where, window_size=window_size)


@pytest.mark.parametrize(
    ("kernel", "taken"),
    [
        (grouped_without_saying, True),
        (refuses_groups, False),
        (mixes_groups_up, False),
        (loses_a_gradient, False),
    ],
)
def test_grouped_heads_are_tried_where_the_signature_does_not_name_them(monkeypatch, kernel, taken):
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_VARLEN_GROUPS", False)
    with torch.no_grad():  # as it may be asked
        assert attention.takes_grouped_heads.__wrapped__(torch.device("cpu")) == taken


@pytest.mark.gpu
def test_the_kernel_of_this_gpu_takes_grouped_heads():
    assert attention.takes_grouped_heads(torch.device("cuda"))


@pytest.mark.parametrize(
    ("dtype", "capability", "grouped"),
    [
        (torch.bfloat16, (8, 0), True),
        (torch.bfloat16, (7, 5), False),
        (torch.float32, (9, 0), False),
    ],
)
def test_a_call_a_segment_never_needs_all_scores(
    monkeypatch, as_if_cuda, dtype, capability, grouped
):
    """Flash attention takes grouped heads in half precision from sm80 on, mem-efficient attention
    none; what neither takes would fall to the math kernel, which keeps (heads, n, n) scores."""
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, *, attn_mask, enable_gqa, **how):
        calls.append((attn_mask is None, k.shape[1] == 2, enable_gqa))
        return sdpa(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **how)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    stream = build_stream(PAIRS[:1])
    states = [torch.randn(1, h, len(stream.input_ids), 64, dtype=dtype) for h in (4, 2, 2)]
    segments = Segments(stream.segments, torch.device("cpu"))
    attention._by_segment(*states, segments, 0.1, None, 0.0)
    assert calls == [(True, grouped, grouped), (False, False, False)]


@pytest.mark.parametrize("family", ["llama", "mistral sliding", "gemma"])
def test_in_fp32_a_gpus_branches_compute_one_answer_at_a_time(as_if_cuda, family):
    model = with_lora(tiny(family)).train()
    assert_same(model, Scorer(model)(build_stream(PAIRS)), stream_logps(model, PAIRS))


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kernel", ["one call", "a call a segment"])
def test_a_width_that_no_fused_kernel_has_is_padded_with_zeros(
    monkeypatch, as_if_cuda, kernel, scaling
):
    """OpenLLaMA-3B's heads are 100 wide; the kernels want a multiple of 8, or keep all scores."""
    widths, calls = [], {"one call": "_in_one_call", "a call a segment": "_by_segment"}
    own = getattr(attention, calls[kernel])

    def noted(query, *others):
        widths.append(query.shape[-1])
        return own(query, *others)

    monkeypatch.setattr(attention, calls[kernel], noted)
    monkeypatch.setattr(attention, "serves_varlen", lambda query, value: kernel == "one call")
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "_VARLEN_GROUPS", True)
    stream, module = build_stream(PAIRS), torch.nn.Module()
    segments = Segments(stream.segments, torch.device("cpu"))
    states = [torch.randn(1, h, len(stream.input_ids), 100, requires_grad=True) for h in (4, 2, 2)]
    results = []
    for is_cuda in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        out, _ = attention.attention_along_paths(
            module, *states, None, scaling=scaling, dpo_segments=segments
        )
        assert out.shape == (1, len(stream.input_ids), 4, 100)
        results.append([out, *torch.autograd.grad(out.sin().sum(), states)])
    assert widths == [104, 100]
    for padded, plain in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-5)


def test_policy_and_reference_share_the_layout_of_a_stream(monkeypatch):
    """Its indices are built and copied once a micro-batch; another stream has its own."""
    made, init = [], Segments.__init__
    monkeypatch.setattr(
        Segments, "__init__", lambda self, *args: made.append(1) or init(self, *args)
    )
    scorer, (one, other) = Scorer(tiny()), (build_stream([pair]) for pair in PAIRS[:2])
    made.clear()
    expected = scorer(one)
    assert torch.equal(scorer(one), expected)
    assert len(made) == 1
    scorer(other)
    assert torch.equal(scorer(one), expected)
    assert len(made) == 3


def test_the_joined_segments_of_two_pairs():
    """`a b | X | Y Z` and a pair whose rejected answer adds no token: it has no second segment."""
    stream = build_stream([([1, 2], [3, 9], [4, 5, 9]), ([6, 7], [3, 8, 9], [4])])
    segments = Segments(stream.segments, torch.device("cpu"))
    assert [segment.length for segment in segments.each] == [3, 2, 4, 0]
    joined = segments.joined
    assert joined.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert joined.query_ends.tolist() == [0, 3, 5, 9]
    assert joined.key_ends.tolist() == [0, 3, 7, 11]
    assert joined.query_ends.dtype == torch.int32
    assert joined.keys[joined.firsts].tolist() == [*range(9)]
    assert [joined.keys[places].tolist() for places in joined.again] == [[0, 1]]
    assert (joined.most_queries, joined.most_keys) == (4, 4)


def test_repeated_rows_sum_their_gradients():
    stream = build_stream(PAIRS)
    joined = Segments(stream.segments, torch.device("cpu")).joined
    states = torch.randn(len(stream.input_ids), 2, 3, dtype=torch.float64, requires_grad=True)
    repeated = _Repeat.apply(states, joined.keys, joined.firsts, *joined.again)
    assert torch.equal(repeated, states[joined.keys])
    weights = torch.randn_like(repeated)
    ours, autograd = (
        torch.autograd.grad((taken * weights).sum(), states)[0]
        for taken in (repeated, states[joined.keys])
    )
    torch.testing.assert_close(ours, autograd, rtol=0, atol=1e-15)


def test_the_kernel_is_not_asked_on_a_cpu():
    half = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)
    assert not serves_varlen(half, half)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7], ids=["", "window"])
def test_the_kernel_of_the_gpu_equals_sdpa_in_values_and_gradients(window):
    """Queries fewer than keys, grouped heads; against fp32 on the same rounded numbers."""
    stream = build_stream(PAIRS)
    tokens, generator = len(stream.input_ids), torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, tokens, 64, generator=generator).cuda().bfloat16()
        for heads in (8, 2, 2)
    ]
    grad = torch.randn(1, tokens, 8, 64, generator=generator).cuda().bfloat16()
    segments = Segments(stream.segments, torch.device("cuda"))
    results = []
    for compute, dtype in (
        (attention._in_one_call, torch.bfloat16),
        (attention._by_segment, torch.float32),
    ):
        inputs = [s.to(dtype).requires_grad_() for s in states]
        rate = () if compute is attention._in_one_call else (0.0,)
        out = compute(*inputs, segments, 0.125, window, *rate)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(dtype))])
    for half, exact in zip(*results, strict=True):
        assert (half.float() - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.gpu
def test_repeated_rows_have_the_same_gradient_every_time():
    """That of index_select is summed in any order."""
    stream = build_stream([([3] * 500, [5] * 300, [6] * 300)] * 4)
    joined = Segments(stream.segments, torch.device("cuda")).joined
    states = torch.randn(len(stream.input_ids), 8, 128, device="cuda", requires_grad=True)

    def gradient():
        repeated = _Repeat.apply(states, joined.keys, joined.firsts, *joined.again)
        return torch.autograd.grad(repeated.sin().sum(), states)[0]

    expected = gradient()
    assert all(torch.equal(gradient(), expected) for _ in range(10))
