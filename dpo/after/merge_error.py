"""The error of a merged model against the trained policy, and how large it may be."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo.data.order import micro_batches
from dpo.data.stream import TokenizedPair, build_stream
from dpo.logps import sequence_logps
from dpo.model.scorer import Scorer


@dataclass(frozen=True)
class Scores:
    """Log-probs in nats: of the answer tokens, (scored,), and of whole answers, (sequences,)."""

    tokens: Tensor
    answers: Tensor

    def apart(self, other: "Scores") -> float:
        """Mean absolute difference of a token's log-prob, nats."""
        return (self.tokens - other.tokens).abs().mean().item()


@torch.no_grad()
def score(scorer: Scorer, pairs: Sequence[TokenizedPair], budget: int) -> Scores:
    """Scores all pairs, at most `budget` tokens at a time, always in the same order."""
    tokens, answers = [], []
    for positions in micro_batches([pair.num_stream_tokens for pair in pairs], budget):
        stream = build_stream([pairs[i] for i in positions]).to(scorer.device)
        logps = scorer(stream)
        tokens.append(logps.cpu())
        answers.append(sequence_logps(logps, stream.sequence_ids, 2 * stream.num_pairs).cpu())
    return Scores(torch.cat(tokens), torch.cat(answers))


@dataclass(frozen=True)
class MergeError:
    """What a merge changed.

    Attributes:
        mean, worst: absolute difference of a token's log-prob, nats.
        per_answer: mean absolute difference of an answer's log-prob, nats.
        effect: mean absolute difference that the adapter makes to a token, nats; 0 without one.
        kept: share of the adapter's effect that the merge added to its base, by least squares over
            the tokens: 1 for a right merge, 0 for the base alone. An adapter that is added twice
            gives 2, or less if it is large, since log-probs are at most 0. None without an effect.
    """

    mean: float
    worst: float
    per_answer: float
    effect: float
    kept: float | None

    def row(self, name: str) -> str:
        """One line of the printed table, under `HEADER`."""
        kept = "" if self.kept is None else f"{self.kept:.2%}"
        return f"  {name:12}{self.mean:14.2g}{self.worst:14.2g}{self.per_answer:14.2g}{kept:>15}"


HEADER = f"  {'':12}{'token, mean':>14}{'token, worst':>14}{'answer, mean':>14}{'effect kept':>15}"


def measure(
    policy: Scores, bare: Scores | None, merged: Scores, base: Scores | None = None
) -> MergeError:
    """Compares the merged model with the policy; `bare` is the policy without its adapter, if any.

    `base` is the model that the adapter was merged into, if it is another one than `bare`: the
    difference of the two is not an effect of the adapter.
    """
    worst = (merged.tokens - policy.tokens).abs().max().item()
    per_answer = (merged.answers - policy.answers).abs().mean().item()
    errors = merged.apart(policy), worst, per_answer
    if bare is None:
        return MergeError(*errors, effect=0.0, kept=None)
    effect, moved = policy.tokens - bare.tokens, merged.tokens - (base or bare).tokens
    kept = (moved @ effect / (effect @ effect)).item() if effect.any() else None
    return MergeError(*errors, effect=effect.abs().mean().item(), kept=kept)


def allowed(effect: float, epsilon: float, apart: float) -> float:
    """The largest mean error, nats per token, of a merge that is right.

    A tenth of the adapter's effect passes: the bare base is off by all of it, half an adapter or
    one and a half by 0.3 of it or more, a doubled one by 0.6 or more (quickstart, all types). If
    the effect is small, rounding counts as well, since merge and policy multiply in another
    order. If the base is not the one that was trained on, a quarter of the effect passes, since the
    adapter's effect on it may differ, or three times the difference between the bases.

    Args:
        effect: the adapter's, mean absolute nats per token.
        epsilon: that of the coarsest type of run and merge. The error measured on the quickstart is
            0.1 epsilon in bfloat16 and float16, and 1e-7 nats in float32; deeper models round more
            often, so 2.5 epsilon and 1e-4 pass.
        apart: how far the merge's base is from the trained one, both without the adapter, nats per
            token; 0 where it is the same one.
    """
    share = 0.25 if apart else 0.1
    return max(1e-4 + 2.5 * epsilon + 3 * apart, share * effect)


def refuse_wrong(error: MergeError, at_most: float, epsilon: float, what: str) -> None:
    """Refuses a model that is not the trained policy.

    Where error and effect are both small, the share of the effect shows a wrong merge. A right one
    is within 0.4 of 1, plus what rounding adds: 0.08 epsilon over the effect, the most measured on
    the quickstart. So in bfloat16 a lost adapter is detected from an effect of 0.0015 nats per
    token on, a doubled one from 0.0025, half of one from 0.01; below, rounding hides them.

    Args:
        error: what `measure` gave.
        at_most: the largest mean error that passes, nats per token.
        epsilon: that of the coarsest type of run and merge.
        what: the model, in words.

    Raises:
        RuntimeError: with what was measured and what is allowed.
    """
    measured = f"{what}: the model is {error.mean:.3g} nats per token off the trained policy"
    if not error.mean <= at_most:  # nan is wrong too
        raise RuntimeError(f"{measured}, wanted at most {at_most:.3g}. It was not written.")
    if error.kept is None:
        return
    blurred = 0.4 + 0.08 * epsilon / error.effect
    if not abs(error.kept - 1) <= blurred:
        raise RuntimeError(
            f"{measured} and has {error.kept:.0%} of the adapter's effect on it "
            f"({error.effect:.3g} nats), wanted 100% +- {blurred:.0%}. It was not written."
        )
