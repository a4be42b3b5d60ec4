"""The policy on held-out pairs and prompts: before, during and after training.

Over all held-out pairs: the metrics of training. Over `eval_prompts` of their prompts, the policy
answers twice. A sampled answer measures how far it has moved: `eval/kl` is the mean of
log pi - log pi_ref over answers sampled from the policy at temperature 1, nats per answer, an
unbiased estimate of KL(pi || pi_ref). A greedy answer is what a user would see: its length, a
sample to read, and where the chosen answer is the only right one, whether it is right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo.config import Config
from dpo.data.chat import choose_template, stop_ids
from dpo.data.loader import Pairs, micro_batches
from dpo.data.stream import Stream, TokenizedPair, build_stream
from dpo.logps import sequence_logps
from dpo.losses import LOSSES, PairLogps
from dpo.metrics import RunningMeans, pair_metrics
from dpo.model.reference import Reference
from dpo.show.finished import spread
from dpo.show.samples import generate


def pair_logps(stream: Stream, policy: Tensor, reference: Tensor) -> PairLogps:
    """Token log-probs under policy and reference, (scored,) each, to those of whole answers."""
    ones = torch.ones_like(reference)
    chosen_and_rejected = (
        sequence_logps(values, stream.sequence_ids, 2 * stream.num_pairs).view(-1, 2).unbind(1)
        for values in (policy, reference, ones)
    )
    return PairLogps(*(answer for both in chosen_and_rejected for answer in both))


@dataclass
class Evaluator:
    """Everything that an evaluation needs; `evaluate()` returns metrics and samples."""

    config: Config
    accelerator: Accelerator
    model: nn.Module
    scorer: nn.Module
    reference: Reference
    tokenizer: PreTrainedTokenizerBase
    held_out: Pairs
    device: torch.device

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics by name (`eval/...`), and one sample per prompt, the same prompts every time."""
        self.scorer.eval()
        metrics = self._pair_metrics()
        samples = self._answers() if self.config.train.eval_prompts else []
        self.scorer.train()
        if samples:
            metrics["kl"] = _mean(samples, "log_ratio")
            metrics["lengths/generated"] = _mean(samples, "length")
        if samples and self.config.train.eval_exact_match:
            metrics["exact_match"] = _mean(samples, "is_right")
        return {f"eval/{name}": value for name, value in metrics.items()}, samples

    def _pair_metrics(self) -> dict[str, float]:
        means, loss = RunningMeans(self.device), self.config.loss
        mine = range(
            self.accelerator.process_index, len(self.held_out), self.accelerator.num_processes
        )
        with torch.no_grad():
            for pairs in self._micro_batches([self.held_out[i] for i in mine]):
                stream = build_stream(pairs).to(self.device)
                logps = pair_logps(stream, self.scorer(stream), self.reference(stream))
                losses = LOSSES[loss.type](logps, **loss.options)
                means.add(pair_metrics(logps, losses, beta=loss.beta))
        return means.pop(self.accelerator.reduce)  # type: ignore[arg-type]

    def _micro_batches(self, pairs: Sequence[TokenizedPair]) -> Iterator[list[TokenizedPair]]:
        budget = self.config.train.tokens_per_microbatch
        for positions in micro_batches([pair.num_stream_tokens for pair in pairs], budget):
            yield [pairs[i] for i in positions]

    def _answers(self) -> list[dict[str, Any]]:
        train = self.config.train
        indices = spread(len(self.held_out), train.eval_prompts)
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        pairs = [self.held_out[int(i)] for i in mine]
        template = choose_template(self.tokenizer, self.config.data.chat_template)
        options: dict[str, Any] = {
            "stop_ids": stop_ids(self.model, self.tokenizer, template),
            "max_new_tokens": train.eval_max_new_tokens,
            "seed": train.seed,
        }
        prompts = [pair.prompt_ids for pair in pairs]
        greedy, sampled = (
            generate(self.model, self.tokenizer, prompts, temperature=t, **options)
            for t in (0.0, 1.0)
        )
        log_ratios = self._log_ratios(list(zip(prompts, sampled, greedy, strict=True)))
        samples = [
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
        return sorted(gather_object(samples), key=lambda sample: sample["index"])

    def _log_ratios(
        self, answered: list[tuple[Sequence[int], list[int], list[int]]]
    ) -> list[float]:
        """Log pi - log pi_ref of the first answer to each prompt, nats."""
        log_ratios = [0.0] * len(answered)
        num_tokens = [TokenizedPair(*item).num_stream_tokens for item in answered]
        for positions in micro_batches(num_tokens, self.config.train.tokens_per_microbatch):
            stream = build_stream([answered[i] for i in positions]).to(self.device)
            with torch.no_grad():
                logps = pair_logps(stream, self.scorer(stream), self.reference(stream))
            for i, value in zip(positions, logps.chosen_logratios.tolist(), strict=True):
                log_ratios[i] = value
        return log_ratios

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _mean(samples: list[dict[str, Any]], key: str) -> float:
    return sum(float(sample[key]) for sample in samples) / len(samples)
