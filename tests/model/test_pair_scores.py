"""What losses read of a pair, against a pass of each answer alone with full logits."""

import pytest
import torch

from dpo.data.stream import TokenizedPair, build_stream
from dpo.model.pair_scores import score
from dpo.model.scorer import Scorer
from dpo.objective import FROM_ROWS, FROM_TOKENS, KLS, TAILS
from tests.models import tiny

PAIRS = [
    TokenizedPair([1, 5, 9], [7, 8, 9, 2], [7, 8, 30, 31, 32, 2], numbers={"margins": 0.5}),
    TokenizedPair([1, 5], [40, 41, 42, 43, 2], [41, 2], numbers={"margins": 2.0}),
    TokenizedPair(
        [6, 7], [10, 11, 2], [12, 13, 2], [True, False, True], None, numbers={"margins": 0.0}
    ),
]
ALL = FROM_ROWS - {"weights", "chosen_scores", "rejected_scores"} | FROM_TOKENS


def other_model():
    """The same sizes, other weights."""
    model = tiny()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def log_probs(model, prompt, answer):
    """Full log-softmax before each token of one answer, in float64: (answer, vocab)."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def by_hand(policy, reference):
    """Every input of every pair, one answer at a time."""
    rows = []
    for pair in PAIRS:
        answers = {
            "chosen": (pair.chosen_ids, pair.chosen_scored),
            "rejected": (pair.rejected_ids, pair.rejected_scored),
        }
        lengths = {k: sum(m) if m else len(ids) for k, (ids, m) in answers.items()}
        row, entropies, surplus = {"margins": pair.numbers["margins"]}, [], 0.0
        for name, (ids, marks) in answers.items():
            is_scored = torch.tensor(marks or [True] * len(ids))
            p, q = (log_probs(m, pair.prompt_ids, ids)[is_scored] for m in (policy, reference))
            targets = torch.tensor(list(ids))[is_scored][:, None]
            of_policy, of_reference = (x.gather(1, targets)[:, 0] for x in (p, q))
            row[f"{name}_kls"] = (q.exp() * (q - p)).sum()
            entropies.append(-(q.exp() * q).sum(1).mean() / torch.log(torch.tensor(61.0)))
            surplus += (of_policy - (2 * p).exp().sum(1).log()).mean()
            shortest = min(lengths.values())
            row[f"policy_{name}_tail_logps"] = of_policy[shortest:].sum()
            row[f"ref_{name}_tail_logps"] = of_reference[shortest:].sum()
        row["dispersions"] = sum(entropies) / 2
        row["on_policy_weights"] = min(1.0, float(surplus.exp()))
        rows.append(row)
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_every_input_is_what_one_answer_at_a_time_gives(layout):
    policy, reference = tiny(), other_model()
    wanted = by_hand(policy, reference)
    assert wanted.keys() == ALL
    scorers = Scorer(policy, layout), Scorer(reference, layout)
    stream = build_stream(PAIRS)
    for needed in (TAILS, KLS, ALL - KLS):
        with torch.no_grad():
            _, inputs = score(stream, *scorers, needed)
        assert inputs.keys() == needed
        for name, values in inputs.items():
            torch.testing.assert_close(values, wanted[name], rtol=1e-4, atol=1e-4, msg=name)
            assert values.unique().numel() > 1  # that could fail


def test_log_probs_are_the_same_whatever_else_is_asked_for():
    policy, reference = Scorer(tiny()), Scorer(other_model())
    stream = build_stream(PAIRS)
    plain, nothing = score(stream, policy, reference)
    assert nothing == {}
    for needed in (TAILS, KLS, ALL - KLS):
        logps, _ = score(stream, policy, reference, needed)
        for name, values in vars(plain).items():
            assert torch.equal(getattr(logps, name), values)


def test_only_what_is_needed_is_computed():
    """Log-probs alone are one call each without more; predictions are asked for by KLs alone."""
    calls = []

    def noted(scorer):
        def called(stream, *also):
            calls.append(also)
            return scorer(stream, *also)

        return called

    policy, reference = noted(Scorer(tiny())), noted(Scorer(other_model()))
    stream = build_stream(PAIRS)
    for needed in ((), TAILS | {"margins"}):
        calls.clear()
        score(stream, policy, reference, needed)
        assert calls == [(), ()]
    calls.clear()
    score(stream, policy, reference, KLS)
    assert calls[0] == ("predictions",)
    assert len(calls) == 2


def test_the_kls_have_a_gradient_to_the_policy_and_the_weights_of_wpo_none():
    policy, reference = tiny(), other_model()
    stream = build_stream(PAIRS)
    _, inputs = score(stream, Scorer(policy), Scorer(reference), KLS)
    inputs["rejected_kls"].sum().backward()
    assert policy.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in reference.parameters())
    _, inputs = score(stream, Scorer(policy), Scorer(reference), {"on_policy_weights"})
    assert not inputs["on_policy_weights"].requires_grad


def test_an_empty_stream_has_no_inputs_and_still_a_graph():
    policy = tiny()
    logps, inputs = score(build_stream([]), Scorer(policy), Scorer(other_model()), ALL - KLS)
    assert all(len(values) == 0 for values in inputs.values())
    logps.policy_chosen_logps.sum().backward()
    _, inputs = score(build_stream([]), Scorer(policy), Scorer(other_model()), KLS)
    inputs["rejected_kls"].sum().backward()
    assert policy.get_input_embeddings().weight.grad is not None
