import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import dpo.logps
from dpo.logps import (
    Predictions,
    pair_logps,
    sequence_logps,
    token_kls,
    token_logps,
    token_statistics,
)

OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 2.0},
    "scaled and capped": {"logit_scale": 0.3, "softcap": 2.0},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_and_without_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
both_heads = pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])


def head(scored=9, hidden=5, vocab=13, *, dtype=torch.float32, with_bias=True, trained=True):
    """Random states, weight, targets and bias; logits of some +-4 nats."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    states = normal(scored, hidden).requires_grad_()
    weight = (2 * normal(vocab, hidden)).requires_grad_(trained)
    bias = normal(vocab).requires_grad_(trained) if with_bias else None
    targets = torch.randint(vocab, (scored,), generator=generator)
    return states, weight, targets, bias


def full_logps(hidden, weight, targets, bias=None, *, logit_scale=1.0, softcap=None):
    """The definition, by autograd, from the full logits in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def gradients(function, inputs, **options):
    """Values, and the gradients of a sum of them that weighs each one differently."""
    hidden, weight, targets, bias = inputs
    logps = function(hidden, weight, targets, bias, **options)
    upstream = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return logps, torch.autograd.grad(logps, wanted, upstream)


def assert_same(ours, truth, *, atol):
    """Values, and gradients within `atol` of the largest entry of each."""
    (values, grads), (true_values, true_grads) = ours, truth
    torch.testing.assert_close(values.double(), true_values, rtol=0, atol=atol)
    assert len(grads) == len(true_grads) > 0
    for grad, true_grad in zip(grads, true_grads, strict=True):
        bound = atol * true_grad.abs().max().item()
        torch.testing.assert_close(grad.double(), true_grad.double(), rtol=0, atol=bound)


# --------------------------------------------------------------------------- against the truth


def test_the_log_prob_of_one_token_by_hand():
    """Hidden (1, 2), weight rows (1, 0), (0, 1), (1, 1): logits 1, 2, 3.

    log softmax of the last: 3 - log(e + e^2 + e^3) = -log(1 + e^-1 + e^-2) = -log 1.503214724408055
    = -0.407605964444380.
    """
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    logp = token_logps(hidden, weight, torch.tensor([2]))
    assert logp.tolist() == pytest.approx([-0.407605964444380], abs=1e-14)


@every_option
@with_and_without_bias
@both_heads
def test_values_and_gradients_are_those_of_the_full_log_softmax(options, with_bias, trained):
    inputs = head(with_bias=with_bias, trained=trained)
    ours = gradients(token_logps, inputs, **options)
    assert ours[0].dtype == torch.float32
    assert len(ours[1]) == 1 + trained + (trained and with_bias)
    assert_same(ours, gradients(full_logps, inputs, **options), atol=3e-6)


@pytest.mark.parametrize("name", ["scaled", "capped", "scaled and capped"])
def test_scale_and_cap_change_the_log_probs(name):
    """The negative control of the comparison above: its options are not ignored by both sides."""
    inputs = head()
    plain, _ = gradients(full_logps, inputs)
    changed, _ = gradients(full_logps, inputs, **OPTIONS[name])
    assert (plain - changed).abs().max() > 0.1


@every_option
def test_frozen_and_trained_head_agree(options):
    frozen, trained = head(trained=False), head(trained=True)
    values, (grad,) = gradients(token_logps, frozen, **options)
    trained_values, trained_grads = gradients(token_logps, trained, **options)
    assert torch.equal(values, trained_values)
    torch.testing.assert_close(grad, trained_grads[0], rtol=1e-6, atol=1e-6)


@every_option
@with_and_without_bias
@both_heads
def test_gradcheck_passes_in_float64(options, with_bias, trained):
    hidden, weight, targets, bias = head(4, 3, 6, dtype=torch.float64, with_bias=with_bias)
    inputs = [hidden, *((weight, bias) if trained else ())]
    if not trained:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    inputs = [x for x in inputs if x is not None]

    def logps(hidden, *head):
        w, b = (*head, bias)[:2] if head else (weight, bias)
        return token_logps(hidden, w, targets, b, **options)

    assert torch.autograd.gradcheck(logps, inputs)


@both_heads
def test_a_bias_alone_may_train(trained):
    """Its gradient is summed over rows, 1_target - p each; the weight then takes none."""
    hidden, weight, targets, bias = head(trained=False)
    bias.requires_grad_()
    weight.requires_grad_(trained)
    token_logps(hidden, weight, targets, bias).sum().backward()
    p = (hidden.double() @ weight.double().T + bias.double()).softmax(-1)
    wanted = (torch.nn.functional.one_hot(targets, 13) - p).sum(0)
    torch.testing.assert_close(bias.grad.double(), wanted.detach(), rtol=0, atol=1e-5)
    assert (weight.grad is not None) == trained


def test_the_result_is_fp32_and_float64_stays_float64():
    for dtype, wanted in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for trained in (False, True):
            inputs = head(dtype=dtype, trained=trained)
            logps, grads = gradients(token_logps, inputs)
            assert logps.dtype == wanted
            assert {grad.dtype for grad in grads} == {dtype}


# ---------------------------------------------------------------------------------------- tiles


@every_option
@both_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 9, 100])
def test_any_tile_size_gives_the_same(monkeypatch, rows, dtype, trained, options):
    """9 rows in tiles of 1, 2 (a short last one), 4, 9 and more than there are.

    MAX_TILE_ROWS also bounds the piece of the vocabulary that is upcast at once on a CPU. In
    bfloat16 the gradients of the weight are rounded once a tile: to 2^-8 of the largest.
    """
    inputs = head(dtype=dtype, trained=trained)
    whole, whole_grads = gradients(token_logps, inputs, **options)
    monkeypatch.setattr(dpo.logps, "MAX_TILE_ROWS", rows)
    tiled, grads = gradients(token_logps, inputs, **options)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    for grad, whole_grad in zip(grads, whole_grads, strict=True):
        bound = tolerance * whole_grad.abs().max().item()
        torch.testing.assert_close(grad, whole_grad, rtol=0, atol=bound)


def test_tiles_are_cut_by_bytes_and_by_rows(monkeypatch):
    """4 bytes x 13 tokens a row: 110 bytes hold 2 rows; 10 bytes hold none, and one is taken."""
    for tile_bytes, max_rows, wanted in ((110, 2048, 2), (10, 2048, 1), (10**9, 4, 4)):
        monkeypatch.setattr(dpo.logps, "MAX_TILE_ROWS", max_rows)
        tiles = dpo.logps._tiles(9, 13, tile_bytes)
        assert tiles[0] == slice(0, wanted)
        assert [row for tile in tiles for row in range(9)[tile]] == list(range(9))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator's result had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        numels = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *numels, 0)
        return result


@every_option
@both_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_tile(monkeypatch, dtype, trained, options):
    """40 rows of 1000 tokens, tiles of 4 rows: 4000 elements at most, forward and backward.

    The weight has 1000 x 3, so a tensor of (scored, vocab), 40,000, is the only thing that exceeds.
    """
    monkeypatch.setattr(dpo.logps, "TILE_BYTES", 4 * 4000)
    inputs = head(40, 3, 1000, dtype=dtype, trained=trained)
    with LargestTensor() as largest:
        gradients(token_logps, inputs, **options)
    assert 3000 <= largest.numel <= 4000


def test_the_memory_check_sees_full_logits():
    """The negative control of the test above."""
    with LargestTensor() as largest:
        gradients(full_logps, head(40, 3, 1000))
    assert largest.numel == 40_000


# ------------------------------------------------------------------------------- matrix products


def count_products(scored, hidden, vocab, counter):
    """How many products of (scored, hidden) x (hidden, vocab): 2 scored hidden vocab FLOPs each."""
    return counter.get_total_flops() / (2 * scored * hidden * vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_costs_two_products_and_none_in_the_backward(dtype):
    hidden, weight, targets, bias = head(10, 6, 30, dtype=dtype, trained=False)
    with FlopCounterMode(display=False) as forward:
        logps = token_logps(hidden, weight, targets, bias)
    with FlopCounterMode(display=False) as backward:
        logps.sum().backward()
    assert count_products(10, 6, 30, forward) == 2
    assert backward.get_total_flops() == 0


def test_a_trained_head_computes_its_logits_again():
    """Forward: logits. Backward: logits, the states' gradient, the weight's gradient."""
    hidden, weight, targets, bias = head(10, 6, 30, trained=True)
    with FlopCounterMode(display=False) as forward:
        logps = token_logps(hidden, weight, targets, bias)
    with FlopCounterMode(display=False) as backward:
        logps.sum().backward()
    assert count_products(10, 6, 30, forward) == 1
    assert count_products(10, 6, 30, backward) == 3


def test_the_count_of_the_full_log_softmax_is_three():
    """The negative control of the counts: forward 1; backward 2, of which a frozen head needs 1."""
    with FlopCounterMode(display=False) as counter:
        gradients(full_logps, head(10, 6, 30, trained=True))
    assert count_products(10, 6, 30, counter) == 3


def test_without_gradient_there_is_one_product():
    """The reference's pass: nothing requires grad. And a head that would train, under no_grad."""
    hidden, weight, targets, bias = head(10, 6, 30, trained=False)
    with FlopCounterMode(display=False) as counter:
        logps = token_logps(hidden.detach(), weight, targets, bias)
    assert count_products(10, 6, 30, counter) == 1
    assert not logps.requires_grad
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        token_logps(hidden.detach(), weight.requires_grad_(), targets, bias)
    assert count_products(10, 6, 30, counter) == 1


# --------------------------------------------------------------------------------- half precision


def peaked(dtype, *, device="cpu"):
    """64 rows over a vocabulary of 5000; the target leads by some nats, as in a trained model."""
    hidden, weight, targets, _ = head(64, 64, 5000, dtype=torch.float32, trained=False)
    hidden = 0.3 * hidden.detach() + 0.15 * weight[targets]
    weight = 0.5 * weight
    hidden, weight, targets = hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)
    return hidden.requires_grad_(), weight, targets, None


half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@half_types
def test_half_precision_inputs_lose_nothing_in_the_softmax(dtype):
    """Against float64 of the same rounded inputs: 1e-4 nats; gradients to the rounding of J."""
    inputs = peaked(dtype)
    ours, truth = gradients(token_logps, inputs), gradients(full_logps, inputs)
    assert (ours[0].double() - truth[0]).abs().max() < 1e-4
    assert truth[0].mean() > -3  # against ln 5000 = 8.5 nats for a uniform guess
    bound = 2**-7 * truth[1][0].abs().max().item()
    assert (ours[1][0].double() - truth[1][0].double()).abs().max() < bound


@half_types
def test_a_log_softmax_in_half_precision_is_far_off(dtype):
    """The negative control of the test above: 100 times its bound in bfloat16, 10 in float16."""
    hidden, weight, targets, _ = inputs = peaked(dtype)
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    truth, _ = gradients(full_logps, inputs)
    assert (logps.double() - truth).abs().max() > {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


def test_the_gradient_of_a_sure_token_survives_bfloat16():
    """Logits 9 and 0: 1 - p = 1 / (1 + e^9) = 1.233945759862e-4, far under bfloat16's step at 1.

    d logp / d hidden = (1 - p) (w_0 - w_1) = 1.233945759862e-4 x (9, -9), but for bfloat16's 2^-8.
    """
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[9.0, 0.0], [0.0, 9.0]], dtype=torch.bfloat16)
    token_logps(hidden, weight, torch.tensor([0])).sum().backward()
    wanted = [1.233945759862e-4 * 9, -1.233945759862e-4 * 9]
    assert hidden.grad[0].tolist() == pytest.approx(wanted, rel=2**-7)
    p = (hidden @ weight.T).softmax(-1)  # in bfloat16: 1 exactly, and no gradient would be left
    assert p[0, 0].item() == 1.0


@pytest.mark.gpu
@half_types
def test_half_precision_inputs_lose_nothing_on_a_gpu(dtype):
    inputs = peaked(dtype, device="cuda")
    hidden, weight, targets, _ = inputs
    ours, truth = token_logps(hidden, weight, targets), full_logps(hidden, weight, targets)
    assert (ours.double() - truth).abs().max() < 1e-4


# ------------------------------------------------------------------------------------ sequences


class Operators(TorchDispatchMode):
    """The names of all operators that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_sums_do_not_go_through_index_add(as_if_cuda):
    """Which adds there in any order: two equal rows of log-probs would have two sums."""
    logps, ids = -torch.rand(600), torch.arange(6).repeat_interleave(100)
    with Operators() as ran:
        sums = sequence_logps(logps, ids, 7)
    assert ran.names & {"index_add", "index_put", "index_put_"} == {"index_put"}
    torch.testing.assert_close(sums[:6], logps.view(6, 100).sum(1), rtol=1e-6, atol=0)
    assert sums[6] == 0


def test_pair_log_probs_by_hand():
    """Two pairs, the second's rejected answer of three tokens; lengths count scored tokens."""
    policy = torch.tensor([-1.0, -2.0, -4.0, -0.5, -0.25, -8.0, -16.0])
    sequence_ids = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    logps = pair_logps(policy, policy - 1, sequence_ids, 2)
    assert logps.policy_chosen_logps.tolist() == [-3.0, -0.5]
    assert logps.policy_rejected_logps.tolist() == [-4.0, -24.25]
    assert logps.ref_chosen_logps.tolist() == [-5.0, -1.5]
    assert logps.ref_rejected_logps.tolist() == [-5.0, -27.25]
    assert logps.chosen_lengths.tolist() == [2.0, 1.0]
    assert logps.rejected_lengths.tolist() == [1.0, 3.0]


@pytest.mark.gpu
def test_the_same_log_probs_have_the_same_sum_every_time():
    """Else the loss at step 0 is not ln 2, and a tie between policy and reference is none."""
    logps = -3 * torch.rand(12000, device="cuda")
    ids = torch.arange(60, device="cuda").repeat_interleave(200)
    first = sequence_logps(logps, ids, 60)
    assert all(torch.equal(sequence_logps(logps, ids, 60), first) for _ in range(20))
    torch.testing.assert_close(first, logps.view(60, 200).sum(1), rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------- edges


@both_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_scored_gives_an_empty_vector_with_a_graph(trained, dtype):
    hidden, weight, targets, bias = head(0, dtype=dtype, trained=trained)
    logps = token_logps(hidden, weight, targets, bias)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 5)
    if trained:
        assert weight.grad.abs().sum() == 0
        assert bias.grad.abs().sum() == 0


@every_option
@both_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_huge_logits_give_finite_values_and_gradients(logit, dtype, trained, options):
    """Logits (+-1e4, 0): log softmax of the first is 0 or -1e4, without a scale or a cap."""
    hidden = torch.tensor([[100.0, 0.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[logit / 100, 0.0], [0.0, 1.0]], dtype=dtype).requires_grad_(trained)
    logps = token_logps(hidden, weight, torch.tensor([0]), **options)
    logps.sum().backward()
    assert logps.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert not trained or weight.grad.isfinite().all()
    if not options:
        assert logps.item() == min(logit, 0.0)


# ------------------------------------------------------------------------------------- sequences


def test_sequence_logps_sums_by_id_and_an_absent_sequence_gives_zero():
    """Sequence 0: -1 - 4 = -5; 1: nothing; 2: -2 - 8 - 16 = -26; 3: nothing."""
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    sums = sequence_logps(logps, torch.tensor([0, 2, 0, 2, 2]), 4)
    assert sums.tolist() == [-5.0, 0.0, -26.0, 0.0]


def test_the_gradient_of_a_sequence_reaches_each_of_its_tokens():
    logps = torch.zeros(5, requires_grad=True)
    sums = sequence_logps(logps, torch.tensor([0, 2, 0, 2, 2]), 4)
    (sums * torch.tensor([3.0, 5.0, 7.0, 11.0])).sum().backward()
    assert logps.grad.tolist() == [3.0, 7.0, 3.0, 7.0, 7.0]


@pytest.mark.parametrize("num_sequences", [0, 2])
def test_no_tokens_sum_to_zeros_with_a_graph(num_sequences):
    logps = torch.zeros(0, requires_grad=True)
    sums = sequence_logps(logps, torch.zeros(0, dtype=torch.long), num_sequences)
    assert sums.tolist() == [0.0] * num_sequences
    assert sums.requires_grad


# --------------------------------------------------------------- what else a prediction has


@every_option
@both_heads
@pytest.mark.parametrize("tile_bytes", [None, 4 * 13 * 2])
def test_statistics_of_predictions_are_their_definitions(options, trained, tile_bytes):
    hidden, weight, targets, bias = head(trained=trained)
    predictions = Predictions(hidden, weight, bias, **options)
    log_probs = torch.stack(
        [
            full_logps(hidden, weight, torch.full((9,), token), bias, **options)
            for token in range(13)
        ],
        dim=1,
    )
    p = log_probs.exp()
    definitions = {
        "dispersion": -(p * log_probs).sum(1) / torch.log(torch.tensor(13.0)),
        "log_collision": (p * p).sum(1).log(),
    }
    for name, wanted in definitions.items():
        logps, values = token_statistics(predictions, targets, name, tile_bytes)
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
        assert not values.requires_grad
        plain = gradients(token_logps, (hidden, weight, targets, bias), **options)
        upstream = torch.linspace(-1, 2, 9)
        wanted_for = [x for x in (hidden, weight, bias) if x.requires_grad]
        for got, theirs in zip(
            torch.autograd.grad(logps, wanted_for, upstream), plain[1], strict=True
        ):
            torch.testing.assert_close(got, theirs)


def test_a_certain_and_an_even_prediction_have_the_ends_of_the_scale():
    """Also where probabilities underflow: 0 x log 0 is 0."""
    weight = torch.eye(4)
    hidden = torch.tensor([[1e4, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    predictions, targets = Predictions(hidden, weight), torch.tensor([0, 1])
    _, dispersion = token_statistics(predictions, targets, "dispersion")
    _, collision = token_statistics(predictions, targets, "log_collision")
    torch.testing.assert_close(dispersion, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(collision, torch.tensor([0.0, -torch.log(torch.tensor(4.0))]))
    kls = token_kls(predictions, Predictions(hidden.flip(0), weight))
    # From a certain one to an even one: log 4; the contrary: 3/4 of 1e4, less log 4.
    torch.testing.assert_close(kls, torch.tensor([1.3862944, 7498.6137]))


@every_option
@with_and_without_bias
@both_heads
@pytest.mark.parametrize("tile_bytes", [None, 4 * 13 * 2])
def test_the_kl_and_its_gradient_are_those_of_full_log_probs(
    options, with_bias, trained, tile_bytes
):
    hidden, weight, _, bias = head(with_bias=with_bias, trained=trained, dtype=torch.float64)
    reference = Predictions(
        hidden.detach().flip(0), 0.7 * weight.detach(), None if bias is None else bias.detach(),
        **options,
    )  # fmt: skip

    def naive(hidden, weight, targets, bias, **options):
        del targets

        def log_probs(hidden, weight, bias):
            each = [
                full_logps(hidden, weight, torch.full((9,), token), bias, **options)
                for token in range(13)
            ]
            return torch.stack(each, dim=1)

        theirs = log_probs(*reference[:3])
        return (theirs.exp() * (theirs - log_probs(hidden, weight, bias))).sum(1)

    def ours(hidden, weight, targets, bias, **options):
        del targets
        return token_kls(reference, Predictions(hidden, weight, bias, **options), tile_bytes)

    inputs = (hidden, weight, None, bias)
    assert_same(gradients(ours, inputs, **options), gradients(naive, inputs, **options), atol=1e-9)


def test_a_model_has_no_kl_from_itself():
    hidden, weight, _, bias = head()
    predictions = Predictions(hidden, weight, bias)
    kls = token_kls(predictions, predictions)
    assert kls.abs().max() < 1e-6
    (grad,) = torch.autograd.grad(kls.sum(), hidden)
    assert grad.abs().max() < 1e-6
