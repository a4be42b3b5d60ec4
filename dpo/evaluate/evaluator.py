"""The policy on held-out pairs and prompts: before, during and after training.

All held-out pairs give the metrics that training logs too. The policy also answers `eval_prompts`
of their prompts, twice each. A sampled answer measures how far it has moved: `eval/kl` is the
mean of log pi - log pi_ref over answers sampled from the policy at temperature 1, nats per answer,
an unbiased estimate of KL(pi || pi_ref). A greedy answer is what a user would see: it gives a
length, a sample to read, and whether it is right, if the chosen answer is the only right one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo.catalogue import PAIR_METRICS
from dpo.config import Config
from dpo.data.chat import stop_ids
from dpo.data.loader import Pairs
from dpo.data.order import micro_batches, spread
from dpo.data.stream import TokenizedPair, build_stream
from dpo.data.templates import choose_template
from dpo.evaluate.samples import generate
from dpo.losses import PairLogps
from dpo.metrics import pair_metrics
from dpo.model.models import Models
from dpo.model.pair_scores import LOGPS, score
from dpo.model.reference import TokenLogps
from dpo.objective import Objective
from dpo.signals import Stopped, at_once


def score_pairs(
    pairs: Sequence[TokenizedPair],
    scorer: nn.Module,
    reference: TokenLogps,
    *,
    tokens_per_microbatch: int,
    device: torch.device,
) -> PairLogps:
    """Log-probs of both answers of every pair, (pairs,) each, in the order given, on the CPU."""
    how: dict[str, Any] = {"tokens_per_microbatch": tokens_per_microbatch, "device": device}
    return PairLogps(**score_columns(pairs, scorer, reference, (), **how))


@torch.no_grad()
def score_columns(
    pairs: Sequence[TokenizedPair],
    scorer: nn.Module,
    reference: TokenLogps,
    needed: Collection[str],
    *,
    tokens_per_microbatch: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """`score_pairs` by name, and what else is `needed` of each pair, see `pair_scores.score`."""
    num_tokens = [pair.num_stream_tokens for pair in pairs]
    columns = {name: torch.zeros(len(pairs)) for name in (*LOGPS, *sorted(needed))}
    for positions in micro_batches(num_tokens, tokens_per_microbatch):
        stream = build_stream([pairs[i] for i in positions]).to(device)
        logps, inputs = score(stream, scorer, reference, needed)
        values = torch.stack([{**vars(logps), **inputs}[name] for name in columns]).cpu()
        for column, its_values in zip(columns.values(), values, strict=True):
            column[positions] = its_values
    return columns


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: values by name, `eval/...`.
        samples: one per prompt, for the same prompts at every evaluation.
        logps: log-probs of every held-out pair, in their order, on the CPU.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    logps: PairLogps


@dataclass
class Evaluator:
    """Everything that an evaluation needs; every rank calls `evaluate`."""

    config: Config
    objective: Objective
    accelerator: Accelerator
    models: Models
    tokenizer: PreTrainedTokenizerBase
    held_out: Pairs

    def evaluate(self) -> Evaluation | None:
        """Scores all held-out pairs, answers some of their prompts; None if a signal stopped it."""
        self.models.scorer.eval()
        try:
            with at_once():
                answers = self._answers() if self.config.train.eval_prompts else []
                mine = [(self._score_held_out(), answers)]
        except Stopped:
            mine = [None]
        self.models.scorer.train()
        every = gather_object(mine)  # all wait for one another here, and nowhere before
        if None in every:
            return None
        rows = sorted(row for part, _ in every for row in part)
        names = [*LOGPS, *sorted(self.objective.inputs)]
        values = torch.tensor([values for _, *values in rows]).unbind(1)
        columns = dict(zip(names, values, strict=True))
        logps = PairLogps(**{name: columns.pop(name) for name in LOGPS})
        samples = [sample for _, part in every for sample in part]
        samples.sort(key=lambda sample: sample["index"])
        losses = self.objective(logps, columns)
        beta, per_token = self.config.loss.beta, self.config.rewards_per_token
        means = pair_metrics(logps, losses, beta=beta, per_token=per_token).mean(dim=1)
        metrics: dict[str, float] = dict(zip(PAIR_METRICS, means.tolist(), strict=True))
        if samples and self.models.reference.mode != "zero":  # nothing else says how far it went
            metrics["kl"] = _mean(samples, "log_ratio")
        if self.config.has_fixed_reference:
            falls = -logps.chosen_logratios / logps.chosen_lengths
            metrics["displacement"] = float(falls.mean())
            metrics["displacement_error"] = standard_error(falls)
        if samples:
            metrics["lengths/generated"] = _mean(samples, "length")
        if samples and self.config.train.eval_exact_match:
            metrics["exact_match"] = _mean(samples, "is_right")
        named = {f"eval/{name}": value for name, value in metrics.items()}
        return Evaluation(named, samples, logps)

    def _score_held_out(self) -> list[tuple[int | float, ...]]:
        """This rank's pairs, r, r + ranks, ...: the index and the log-probs of each."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(self.held_out), ranks)
        pairs, needed = [self.held_out[i] for i in mine], self.objective.inputs
        columns = score_columns(
            pairs, self.models.scorer, self.models.reference, needed, **self._how
        )
        return list(zip(mine, *(column.tolist() for column in columns.values()), strict=True))

    @property
    def _how(self) -> dict[str, Any]:
        tokens = self.config.train.scoring_tokens
        return {"tokens_per_microbatch": tokens, "device": self.accelerator.device}

    def _answers(self) -> list[dict[str, Any]]:
        """This rank's share of the prompts, and what the policy answers."""
        train, model = self.config.train, self.models.policy.model
        indices = spread(len(self.held_out), train.eval_prompts)
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        pairs = [self.held_out[int(i)] for i in mine]
        template = choose_template(self.tokenizer, self.config.data)
        options: dict[str, Any] = {
            "stop_ids": stop_ids(model, self.tokenizer, template),
            "max_new_tokens": train.eval_max_new_tokens,
            "seed": train.seed,
        }
        prompts = [pair.prompt_ids for pair in pairs]
        greedy, sampled = (
            generate(model, self.tokenizer, prompts, temperature=t, **options) for t in (0.0, 1.0)
        )
        # Scored as pairs of a sampled and a greedy answer; the sampled ones give the KL.
        answered = [TokenizedPair(*ids) for ids in zip(prompts, sampled, greedy, strict=True)]
        # The live reference, since a cache would keep answers that are never asked for again.
        live = self.models.reference.live
        of_sampled = score_pairs(answered, self.models.scorer, live, **self._how)
        log_ratios = of_sampled.chosen_logratios.tolist()
        return [
            {
                "index": int(index),
                "prompt": self.tokenizer.decode(list(pair.prompt_ids)),
                "chosen": self._text(pair.chosen_ids),
                "answer": self._text(answer),
                "length": len(answer),
                "is_right": list(answer) == list(pair.chosen_ids),
                "log_ratio": log_ratio,
            }
            for index, pair, answer, log_ratio in zip(mine, pairs, greedy, log_ratios, strict=True)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def held_out_columns(pairs: Pairs, logps: PairLogps) -> dict[str, list[Any]]:
    """A line of held_out.jsonl: names, lengths (tokens) and log-probs (nats) by pair."""
    rows = range(len(pairs))
    columns = {field.name: getattr(logps, field.name) for field in fields(logps)}
    return {
        "row": [pairs.row_name(i) for i in rows],
        "source": [pairs.source_name(i) for i in rows],
        "prompt_lengths": [len(pairs[i].prompt_ids) for i in rows],
        **{
            name: (values.int() if "lengths" in name else values).tolist()
            for name, values in columns.items()
        },
    }


def standard_error(values: Float[Tensor, " values"]) -> float:
    """Standard error of their mean; 0 for a single value."""
    return float(values.std(correction=0)) / max(1, len(values) - 1) ** 0.5


def _mean(samples: list[dict[str, Any]], key: str) -> float:
    return sum(float(sample[key]) for sample in samples) / len(samples)
