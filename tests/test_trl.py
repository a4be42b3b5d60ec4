"""Every loss that TRL has, against TRL's own code; and a test for each place where it differs.

They run where TRL is installed (`pip install -e .[peers]`): its loss is called on a stand-in for
its trainer, whose model returns given log-probs of tokens.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo.logps import pair_logps
from dpo.losses import LOSSES, PairLogps, shortened, wpo_weights
from dpo.objective import TAILS

pytest.importorskip("trl", reason="TRL is not installed: the extra `peers`")

from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS, LONGEST = 24, 9


class Answers:
    """Random log-probs of the tokens of random answers, (2 pairs, longest), as TRL holds them."""

    def __init__(self, scale=1.0):
        generator = torch.Generator().manual_seed(3)

        def draw():
            return -scale * torch.rand(2 * PAIRS, LONGEST, generator=generator)

        lengths = torch.randint(1, LONGEST + 1, (2 * PAIRS,), generator=generator)
        self.mask = torch.arange(LONGEST) < lengths[:, None]
        self.policy, self.reference = draw() * self.mask, draw() * self.mask
        self.log_sum_sq = (draw() - 0.5) * self.mask

    def ours(self):
        """The same as pairs; TRL's rows are all chosen answers, then all rejected ones."""
        order = torch.arange(2 * PAIRS).view(2, PAIRS).T.flatten()
        mask = self.mask[order]
        ids = torch.arange(2 * PAIRS)[:, None].expand(-1, LONGEST)[mask]
        return pair_logps(self.policy[order][mask], self.reference[order][mask], ids, PAIRS)

    def sums(self, values):
        return values.sum(1).chunk(2)


def trl_loss(answers, loss_type, *, pairs=slice(None), **settings):
    """The mean loss that TRL's trainer computes for these pairs as one micro-batch."""
    rows = torch.cat([torch.arange(PAIRS)[pairs], PAIRS + torch.arange(PAIRS)[pairs]])
    mask = answers.mask[rows].long()
    completion_mask = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), mask], dim=1)
    ref_chosen, ref_rejected = (answers.reference[rows]).sum(1).chunk(2)
    zeros = torch.zeros_like(answers.policy[rows])
    outputs = SimpleNamespace(
        log_probs=answers.policy[rows],
        log_sum_sq_probs=answers.log_sum_sq[rows],
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    defaults = {
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "args": SimpleNamespace(discopop_tau=0.05),
    }
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    trainer = SimpleNamespace(**(defaults | settings))
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


AGREE = {
    "sigmoid": ({}, {}),
    "ipo": ({}, {}),
    "hinge": ({}, {}),
    "robust": ({"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "exo_pair": ({"label_smoothing": 1e-3}, {"label_smoothing": 1e-3}),
    "nca_pair": ({}, {}),
    "bco_pair": ({"delta": 0.0}, {}),
    "sppo_hard": ({}, {}),
    "aot": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "aot_unpaired": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "apo_zero": ({}, {}),
    "apo_down": ({}, {}),
    "discopop": ({}, {}),
    "sigmoid_norm": ({}, {}),
}


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", AGREE)
def test_where_trl_follows_the_paper_both_agree(name, beta):
    ours, theirs = AGREE[name]
    answers = Answers()
    mine = LOSSES[name](answers.ours(), beta=beta, **ours).mean()
    torch.testing.assert_close(mine, trl_loss(answers, name, beta=beta, **theirs))
    other = LOSSES[name](answers.ours(), beta=beta * 1.1, **ours).mean()
    assert not torch.allclose(other, mine, rtol=1e-5)  # that could fail


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("reverse_kl", "reverse_kl"), ("forward_kl", "forward_kl"), ("js", "js_divergence")],
)
def test_divergences_agree(ours, theirs):
    answers = Answers()
    for name in ("sigmoid", "hinge", "ipo", "exo_pair", "sigmoid_norm"):
        smoothing = {"label_smoothing": 1e-3} if name == "exo_pair" else {}
        mine = LOSSES[name](answers.ours(), beta=0.1, divergence=ours, **smoothing).mean()
        given = {"f_divergence_type": theirs, **smoothing}
        torch.testing.assert_close(mine, trl_loss(answers, name, **given), rtol=1e-5, atol=1e-5)


def test_length_desensitising_agrees():
    """Of the policy; TRL takes the reference's shortened sums from `_compute_ref_log_probs`."""
    answers = Answers()
    mine = LOSSES["ld_dpo"](answers.ours(), beta=0.1, ld_alpha=0.3, **tails(answers)).mean()
    reference = answers.reference.clone()
    lengths = answers.mask.sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    is_tail = torch.arange(LONGEST) >= shared[:, None]
    answers.reference = torch.where(is_tail, 0.3 * reference, reference)
    torch.testing.assert_close(mine, trl_loss(answers, "sigmoid", ld_alpha=0.3))


def tails(answers):
    """The four tail sums by name."""
    lengths = answers.mask.sum(1)
    is_tail = torch.arange(LONGEST) >= torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    named = {}
    for model, values in (("policy", answers.policy), ("ref", answers.reference)):
        for answer, sums in zip(
            ("chosen", "rejected"), answers.sums(values * is_tail), strict=True
        ):
            named[f"{model}_{answer}_tail_logps"] = sums
    assert named.keys() == TAILS
    return named


def test_simpo_alphapo_cpo_and_orpo_agree_but_for_their_sft_terms():
    answers = Answers()
    logps = answers.ours()
    a, b = logps.avg_logps
    accelerator = SimpleNamespace(device="cpu")

    def cpo(chosen, rejected, loss_type, **settings):
        defaults = {"alpha": 0.0, "label_smoothing": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
        trainer = SimpleNamespace(
            **(defaults | settings), loss_type=loss_type, accelerator=accelerator
        )
        return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]

    equal = torch.testing.assert_close
    equal(LOSSES["simpo"](logps, beta=2.0, gamma_over_beta=0.5), cpo(a, b, "simpo"))
    mine = LOSSES["alphapo"](logps, beta=2.0, gamma_over_beta=0.5, alpha=0.25)
    equal(mine, cpo(a, b, "simpo", alpha=0.25))
    sums = logps.policy_chosen_logps, logps.policy_rejected_logps
    equal(LOSSES["cpo"](logps, beta=0.1, sft_weight=0.0), cpo(*sums, "sigmoid", beta=0.1))
    orpo = ORPOTrainer.odds_ratio_loss(
        SimpleNamespace(beta=0.1, accelerator=accelerator), a.double(), b.double()
    )[0]  # log-sigmoid of the odds ratio, times beta: subtracted from the NLL
    far = (a < -1e-3) & (b < -1e-3)
    equal((LOSSES["orpo"](logps, beta=0.1) + a)[far], -orpo[far], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------- where they differ, and which is right


def test_trl_ignores_label_smoothing_for_sigmoid_without_a_word():
    """Conservative DPO (Mitchell 2023, eq. 3) has a second term; TRL computes DPO."""
    answers = Answers()
    plain = trl_loss(answers, "sigmoid")
    assert trl_loss(answers, "sigmoid", label_smoothing=0.3) == plain
    mine = LOSSES["sigmoid"](answers.ours(), beta=0.1, label_smoothing=0.3).mean()
    z = 0.1 * answers.ours().logratio_gap
    ell = torch.nn.functional.softplus
    torch.testing.assert_close(mine, (0.7 * ell(-z) + 0.3 * ell(z)).mean())
    assert not torch.allclose(mine, plain)


def test_trls_coefficient_of_the_alpha_divergence_is_1_minus_the_papers():
    """Its f'(u) = (u^(a-1) - 1) / (a - 1): 0.75 there is the paper's alpha 0.25."""
    answers = Answers()
    theirs = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.75}
    mine = {"divergence": "alpha", "divergence_alpha": 0.25}
    torch.testing.assert_close(
        LOSSES["sigmoid"](answers.ours(), beta=0.1, **mine).mean(),
        trl_loss(answers, "sigmoid", **theirs),
    )


def test_trls_forward_kl_is_nan_where_both_answers_fell_by_89_nats():
    """exp(89) is infinite in float32, and infinity less infinity is NaN; ours is capped."""
    answers = Answers()
    answers.policy = answers.policy - 100 * answers.mask
    assert trl_loss(answers, "sigmoid", f_divergence_type="forward_kl").isnan()
    assert LOSSES["sigmoid"](answers.ours(), beta=0.1, divergence="forward_kl").isfinite().all()


def test_trls_discopop_is_nan_for_a_badly_wrong_pair():
    """0 x infinity; the product as one exponential is 0."""
    answers = Answers()
    answers.policy = answers.policy.clone()
    answers.policy[:PAIRS] -= 1000 * answers.mask[:PAIRS]
    assert trl_loss(answers, "discopop").isnan()
    assert LOSSES["discopop"](answers.ours(), beta=0.1).isfinite().all()


def test_trls_bco_has_no_threshold():
    """The paper's delta is the mean reward so far; without it, a loss of apart answers."""
    answers = Answers()
    theirs = trl_loss(answers, "bco_pair")
    mine = LOSSES["bco_pair"](answers.ours(), beta=0.1, delta=0.4).mean()
    assert not torch.allclose(mine, theirs, rtol=1e-3)


def test_trls_aot_is_sorted_within_a_micro_batch():
    """One by one it is plain DPO; over the step, as in the paper, it is not."""
    answers = Answers(scale=4.0)
    step = LOSSES["aot"](answers.ours(), beta=0.5).mean()
    torch.testing.assert_close(step, trl_loss(answers, "aot", beta=0.5))
    each = [trl_loss(answers, "aot", beta=0.5, pairs=slice(i, i + 1)) for i in range(PAIRS)]
    alone = torch.stack(each).mean()
    torch.testing.assert_close(alone, LOSSES["sigmoid"](answers.ours(), beta=0.5).mean())
    assert not torch.allclose(alone, step, rtol=1e-2)


def test_trls_wpo_weights_may_exceed_1():
    """Eq. 2 of the paper takes the smaller of 1 and the product of both answers' weights."""
    answers = Answers()
    logps = answers.ours()
    chosen, rejected = answers.sums(answers.log_sum_sq)
    theirs = trl_loss(answers, "sigmoid", use_weighting=True)
    weights = wpo_weights(logps, chosen, rejected)
    assert weights.max() == 1.0
    plain = LOSSES["sigmoid"](logps, beta=0.1)
    q_w = (logps.policy_chosen_logps - chosen) / logps.chosen_lengths
    q_l = (logps.policy_rejected_logps - rejected) / logps.rejected_lengths
    uncapped = torch.exp(q_w + q_l)
    torch.testing.assert_close((uncapped * plain).mean(), theirs)
    mine = LOSSES["wpo"](logps, beta=0.1, on_policy_weights=weights).mean()
    torch.testing.assert_close(mine, (uncapped.clamp(max=1) * plain).mean())
    assert not torch.allclose(mine, theirs, rtol=1e-3)


def test_trls_sft_term_depends_on_the_split():
    """A token mean over the micro-batch: other micro-batches give another number."""
    answers = Answers()
    whole = trl_loss(answers, "sft")
    halves = [trl_loss(answers, "sft", pairs=half) for half in (slice(0, 4), slice(4, None))]
    assert not torch.allclose((4 * halves[0] + 20 * halves[1]) / 24, whole, rtol=1e-4)
    parts = [LOSSES["sft"](part(answers.ours(), half), beta=0.1).sum()
             for half in (slice(0, 4), slice(4, None))]  # fmt: skip
    torch.testing.assert_close(sum(parts), LOSSES["sft"](answers.ours(), beta=0.1).sum())


def part(logps, some):
    return PairLogps(*(vector[some] for vector in vars(logps).values()))


def test_trls_alphapo_is_not_finite_for_improbable_answers():
    """It raises exp(log-prob), which is 0 in float32 below -104 nats, to a negative power."""
    trainer = SimpleNamespace(
        alpha=0.25, label_smoothing=0.0, beta=2.0, simpo_gamma=1.0, loss_type="sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    low = torch.tensor([-300.0])
    theirs = CPOTrainer.cpo_loss(trainer, low, low)[0]
    assert not theirs.isfinite().all()
    one = torch.ones(1)
    mine = LOSSES["alphapo"](PairLogps(low, low, low, low, one, one), beta=2.0)
    assert mine.isfinite().all()


def test_trls_orpo_has_no_gradient_for_certain_answers():
    """At a log-prob of 0 its log(1 - exp(x)) is -infinity, and the gradient NaN; ours is capped."""
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    sure = torch.zeros(1, requires_grad=True)
    theirs = ORPOTrainer.odds_ratio_loss(trainer, sure, torch.tensor([-1.0]))[0]
    (grad,) = torch.autograd.grad(theirs.sum(), sure)
    assert grad.isnan().all()
    one, low = torch.ones(1), torch.tensor([-1.0])
    mine = LOSSES["orpo"](PairLogps(sure, low, low, low, one, one), beta=0.1)
    (grad,) = torch.autograd.grad(mine.sum(), sure)
    assert grad.isfinite().all()


def test_shortened_sums_are_those_that_trl_forms():
    answers = Answers()
    short = shortened(answers.ours(), 0.0, **tails(answers))
    lengths = answers.mask.sum(1)
    kept = torch.arange(LONGEST) < torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    chosen, _ = answers.sums(answers.policy * kept)
    torch.testing.assert_close(short.policy_chosen_logps, chosen)
