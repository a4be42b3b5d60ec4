"""Statistics of held-out pairs: what the policy prefers, how surely, and how far it has moved.

Everything is a function of columns, one value a pair: those of held_out.jsonl (see
`dpo.evaluate.evaluator.held_out_columns`), and beside them
    before_chosen_logps, before_rejected_logps  under the model before training, nats; that is the
                                                reference, unless the run had none
    sampled_log_ratios                          log pi - log pi_before of an answer sampled for the
                                                pair's prompt, nats; NaN if none was sampled
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Columns = Mapping[str, np.ndarray]
QUANTILES = (5, 25, 50, 75, 95)  # per cent
RIDGE = 1e-3


def wilson(successes: float | int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, which stays inside [0, 1] and is never empty.

    A tie may count as half a success: the interval is then wider than it need be. Source: Wilson
    1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = 1.959964  # 95 % of a normal distribution lies within +- z
    share = successes / trials
    middle = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = ((middle + side * half) / (1 + z**2 / trials) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def standard_error(values: np.ndarray) -> float | None:
    """The standard error of the mean of `values`; None for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def length_controlled(
    outcomes: Sequence[float | int] | np.ndarray,
    length_differences: Sequence[float | int] | np.ndarray,
) -> float | None:
    """What the mean outcome would be if both answers were equally long.

    A logistic regression of the outcome (1 win, 0.5 tie, 0 loss) on the difference in length,

        P(win) = sigmoid(a + b tanh(difference / standard deviation of the differences)),

    read at difference 0: sigmoid(a). tanh, because ten times longer is not ten times better liked.
    A weak ridge on a and b keeps them finite where length alone decides. The result is None where
    one side is always the longer one: length cannot be told from merit, and the value at 0 would be
    an extrapolation.

    Source: Dubois et al. 2024, arXiv:2404.04475 (AlpacaEval 2), without its difficulty per prompt.
    """
    import torch  # here, so that a report does not wait for it
    import torch.nn.functional as F

    wins = torch.as_tensor(np.asarray(outcomes, dtype=float))
    differences = torch.as_tensor(np.asarray(length_differences, dtype=float))
    if not differences.any():
        return float(wins.mean())
    if differences.min() > 0 or differences.max() < 0:
        return None
    deviation = differences.std(correction=0)
    x = torch.tanh(differences / deviation)
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    fit = torch.optim.LBFGS(
        [a, b], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        fit.zero_grad()
        misfit = F.binary_cross_entropy_with_logits(a + b * x, wins, reduction="sum")
        penalised = misfit + RIDGE * (a**2 + b**2)
        penalised.backward()
        return penalised

    fit.step(loss)  # type: ignore[arg-type]
    return torch.sigmoid(a).item()


def pair_statistics(columns: Columns, *, beta: float) -> dict[str, Any]:
    """Statistics of a group of pairs: shares in [0, 1], log-probs in nats, `_se` standard error."""
    chosen, rejected = (
        beta * (columns[f"policy_{side}_logps"] - columns[f"ref_{side}_logps"])
        for side in ("chosen", "rejected")
    )
    margins, is_right = chosen - rejected, chosen > rejected
    longer_by = columns["chosen_lengths"] - columns["rejected_lengths"]
    quantiles = np.quantile(margins, np.array(QUANTILES) / 100)
    chosen_change, rejected_change = (
        columns[f"policy_{side}_logps"] - columns[f"before_{side}_logps"]
        for side in ("chosen", "rejected")
    )
    log_ratios = columns["sampled_log_ratios"]
    log_ratios = log_ratios[~np.isnan(log_ratios)]
    return {
        "pairs": len(margins),
        "reward_accuracy": float(is_right.mean()),
        "reward_accuracy_95": wilson(float(is_right.sum()), len(is_right)),
        "reward_accuracy_length_controlled": length_controlled(is_right, longer_by),
        "reward_margin": float(margins.mean()),
        "reward_margin_se": standard_error(margins),
        "reward_margin_quantiles": dict(
            zip((f"{q}%" for q in QUANTILES), quantiles.tolist(), strict=True)
        ),
        **_ranking(columns, "before", "_before"),
        **_ranking(columns, "policy", ""),
        "logp_chosen_change": float(chosen_change.mean()),
        "logp_chosen_change_se": standard_error(chosen_change),
        "logp_rejected_change": float(rejected_change.mean()),
        "logp_rejected_change_se": standard_error(rejected_change),
        "chosen_fell": float((chosen_change < 0).mean()),
        "kl": float(log_ratios.mean()) if len(log_ratios) else None,
        "kl_se": standard_error(log_ratios),
        "kl_answers": len(log_ratios),
    }


def _ranking(columns: Columns, model: str, suffix: str) -> dict[str, Any]:
    """How often a model alone, without a reference, gives the chosen answer the higher log-prob.

    `per_token` compares means over tokens: sums favour the shorter answer.
    """
    chosen, rejected = (columns[f"{model}_{side}_logps"] for side in ("chosen", "rejected"))
    is_right = chosen > rejected
    per_token = chosen / columns["chosen_lengths"] > rejected / columns["rejected_lengths"]
    return {
        f"ranking_accuracy{suffix}": float(is_right.mean()),
        f"ranking_accuracy{suffix}_95": wilson(float(is_right.sum()), len(is_right)),
        f"ranking_accuracy_per_token{suffix}": float(per_token.mean()),
    }


def group_statistics(columns: Columns, *, beta: float) -> dict[str, dict[str, Any]]:
    """`pair_statistics` of all pairs, by source (if several), by length, by the longer answer.

    Lengths are tokens of both answers together, in thirds of about equally many pairs.
    """
    lengths = columns["chosen_lengths"] + columns["rejected_lengths"]
    longer_by = columns["chosen_lengths"] - columns["rejected_lengths"]
    sources = columns["source"]
    edges = np.quantile(lengths, [1 / 3, 2 / 3], method="inverted_cdf")
    third = np.searchsorted(edges, lengths)
    thirds = (lengths[third == i] for i in range(3))
    spans = [_span(t) if len(t) else "" for t in thirds]
    groups = {
        "by_source": {name: sources == name for name in sorted(set(sources)) if name},
        "by_length": {span: third == i for i, span in enumerate(spans) if span},
        "by_longer": {
            "chosen longer": longer_by > 0,
            "equally long": longer_by == 0,
            "rejected longer": longer_by < 0,
        },
    }
    return {
        "all": pair_statistics(columns, beta=beta),
        **{
            kind: {
                name: pair_statistics({key: c[mask] for key, c in columns.items()}, beta=beta)
                for name, mask in masks.items()
                if mask.any()
            }
            for kind, masks in groups.items()
            if masks
        },
    }


def _span(lengths: np.ndarray) -> str:
    low, high = lengths.min(), lengths.max()
    return f"{low} tokens" if low == high else f"{low} to {high} tokens"
