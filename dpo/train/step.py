"""One optimizer step: the gradient of its pairs, then the update, or a stop before it.

Everything is counted once and globally. The losses of a step's pairs are summed over micro-batches
and ranks and divided by the number of pairs in the whole step, so every split into micro-batches,
every number of ranks and every short last step gives one gradient.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor

from dpo.config import Config
from dpo.data.loader import Pairs
from dpo.data.order import Order, balance, is_due, micro_batches
from dpo.data.stream import Stream, TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.losses import PairLogps
from dpo.metrics import RunningMeans, pair_metrics
from dpo.model.models import Models
from dpo.model.pair_scores import score
from dpo.model.reference import Zero
from dpo.objective import Objective
from dpo.plan.flops import Costs, work
from dpo.train.budget import Budget
from dpo.train.nonfinite import MAX_SKIPPED, NotFiniteError, bad_gradients, keep_findings
from dpo.train.optim import learning_rate
from dpo.train.throughput import LoggingInterval
from dpo.train.whole_step import Scored, WholeStep, joined, look_at_step, of_all_ranks


class MicroBatch(NamedTuple):
    """What is kept of a micro-batch after its backward: positions in the rank's pairs, values."""

    positions: list[int]
    losses: Tensor
    metrics: Tensor
    logps: PairLogps


@dataclass
class TrainStep:
    """Takes optimizer steps; every rank calls it with the same step.

    Attributes:
        objective: the losses of pairs, from their log-probs.
        pairs: those that the order's indices refer to.
        budget: how many tokens a micro-batch has, lowered if memory runs out.
        means: the pairs' metrics go here.
        interval: FLOPs, time, gradient norm and learning rate go here.
        say: prints one line for the user.
        num_skipped: steps that were left out so far, because their numbers were not finite.
    """

    config: Config
    objective: Objective
    accelerator: Accelerator
    models: Models
    optimizer: AcceleratedOptimizer
    pairs: Pairs
    order: Order
    budget: Budget
    costs: Costs
    means: RunningMeans
    interval: LoggingInterval
    say: Callable[[str], None]
    num_skipped: int = 0

    def __call__(self, step: int) -> None:
        """Takes step `step`, counted from 1, on this rank's part of its pairs."""
        with self.interval.stopwatch.part("data", on_host=True):
            indices = self.order.indices(step)
            pairs = [self.pairs[i] for i in indices]
            num_tokens = [pair.num_stream_tokens for pair in pairs]
            ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
            mine = balance(num_tokens, ranks)[rank]
        seen = self.gradient(step, [pairs[i] for i in mine], pairs_in_step=len(pairs))
        self.interval.grad_norm = self.clip()
        if math.isfinite(self.interval.grad_norm):
            self.update(step)
            for micro_batch in seen:
                self.means.add(micro_batch.metrics)
            if any(self.objective.memory):
                columns, _ = of_all_ranks(joined([(m.positions, m.logps, {}) for m in seen]))
                self.objective.remember(PairLogps(**columns))
        else:
            losses = [([indices[mine[i]] for i in m.positions], m.losses) for m in seen]
            self.refuse(step, losses)
        self.models.reference.settle()  # the norm has just been read, so the device is idle
        self.interval.add(len(pairs), sum(num_tokens))

    def gradient(
        self, step: int, pairs: list[TokenizedPair], *, pairs_in_step: int
    ) -> list[MicroBatch]:
        """Sums the gradient of this rank's pairs, in smaller micro-batches if memory runs out.

        Memory may only be fragmented, so the first failure of a step is retried unchanged. The
        smallest micro-batch comes last: under DDP its backward reduces the gradient over ranks,
        which cannot be retried. So with several ranks a lowered budget stays.
        """
        num_tokens = [pair.num_stream_tokens for pair in pairs]
        is_shared = self.models.layout == "shared"
        prompts = [pair.prompt_ids for pair in pairs] if is_shared else None
        if self.accelerator.num_processes == 1 and self.budget.recover(step):
            self.say(f"memory: {self.budget.tokens} tokens a micro-batch again")
        was_tried, whole, kept = False, None, None
        while True:
            bins = micro_batches(num_tokens, self.budget.tokens, prompts)
            bins.sort(key=lambda positions: -sum(num_tokens[i] for i in positions))
            seen: list[MicroBatch] = []
            try:
                if self.objective.is_step_wide and whole is None:
                    whole, kept = self.look_ahead(step, pairs, bins)
                for number, positions in enumerate(bins):
                    stream = self.stream(step, number, [pairs[i] for i in positions])
                    how = {}
                    if whole:
                        how = {"score": partial(self.score_within, whole, positions, kept)}
                        kept = None  # the graph of a single micro-batch serves once
                    is_last = number == len(bins) - 1
                    no_sync = self.accelerator.no_sync(self.models.scorer)
                    with nullcontext() if is_last else no_sync:
                        seen.append(
                            MicroBatch(positions, *self.backward(stream, pairs_in_step, **how))
                        )
                return seen
            except torch.OutOfMemoryError:
                pass  # retry outside the except block: the traceback keeps the activations alive
            is_reducing = self.accelerator.num_processes > 1 and len(seen) == len(bins) - 1
            if was_tried or is_reducing:
                self._lower_budget(
                    step, [[pairs[i] for i in b] for b in bins], is_reducing=is_reducing
                )
            else:
                self.say("out of memory: the step is begun again")
            was_tried = True
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def look_ahead(
        self, step: int, pairs: list[TokenizedPair], bins: list[list[int]]
    ) -> tuple[WholeStep, Scored | None]:
        """Scores the step without gradient, for losses that need all of it; see `whole_step`.

        A single micro-batch is scored with gradient, and is not scored again: it is returned.
        """
        has_graph = len(bins) == 1
        scored = []
        for number, positions in enumerate(bins):
            stream = self.stream(step, number, [pairs[i] for i in positions])
            with torch.set_grad_enabled(has_graph):
                scored.append((positions, *self.read(stream)))
        whole = look_at_step(self.objective, scored, self.accelerator)
        return whole, scored[0][1:] if has_graph else None

    def stream(self, step: int, micro_batch: int, pairs: list[TokenizedPair]) -> Stream:
        """The micro-batch on the device, dropout set to its place."""
        with self.interval.stopwatch.part("data", on_host=True):
            stream = build_stream(pairs).to(self.accelerator.device)
        self.seed_dropout(step, micro_batch)
        return stream

    def backward(
        self,
        stream: Stream,
        pairs_in_step: int,
        *,
        score: Callable[[Stream], tuple[PairLogps, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, PairLogps]:
        """Adds the gradient of one micro-batch; returns its losses, metrics and log-probs."""
        logps, losses = (score or self.score)(stream)
        beta, per_token = self.config.loss.beta, self.config.rewards_per_token
        metrics = pair_metrics(logps, losses, beta=beta, per_token=per_token)
        # 1, or NaN if a number here is not finite: then the gradient is on all ranks.
        is_sound = (1 + 0 * metrics.sum()).to(losses.dtype)
        # DDP averages gradients over ranks; times the number of ranks, that is their sum.
        scale = self.accelerator.num_processes / pairs_in_step
        self.accelerator.backward(losses.sum() * scale * is_sound)
        return losses.detach(), metrics, PairLogps(*(x.detach() for x in vars(logps).values()))

    def score(self, stream: Stream) -> tuple[PairLogps, Tensor]:
        """Log-probs of one micro-batch under both models, and one loss per pair."""
        logps, inputs = self.read(stream)
        return logps, self.objective(logps, inputs)

    def score_within(
        self, whole: WholeStep, positions: list[int], kept: Scored | None, stream: Stream
    ) -> tuple[PairLogps, Tensor]:
        """As `score`, of a micro-batch within its step; only the policy is asked again."""

        def reference(stream: Stream, *also: Any) -> Any:
            return self._reference(stream, *also) if also else Zero()(stream)

        again = kept or score(stream, self.models.scorer, reference, self.objective.inputs)
        return whole.logps(positions), whole.linear(positions, again)

    def read(self, stream: Stream) -> Scored:
        """What the losses of one micro-batch read, from both models and from the rows."""
        read = score(stream, self.models.scorer, self._reference, self.objective.inputs)
        flops = self.costs.flops(work(stream.segments, len(stream.targets), self.models.layout))
        self.interval.flops += flops.useful - flops.reference * self.models.reference.share_known
        return read

    def _reference(self, stream: Stream, *also: Any) -> Any:
        with self.interval.stopwatch.part("reference"):
            return self.models.reference(stream, *also)

    def seed_dropout(self, step: int, micro_batch: int) -> None:
        """Makes LoRA's dropout a function of the place in the run: no state to save or restore."""
        place = (self.config.train.seed, step, micro_batch, self.accelerator.process_index)
        torch.manual_seed(hash(place))

    def clip(self) -> float:
        """Clips the gradient; its norm before that."""
        most = self.config.optim.max_grad_norm or math.inf
        norm: Any = self.accelerator.clip_grad_norm_(self.models.trained, most)
        return float(norm)

    def update(self, step: int) -> None:
        """Takes the step, with its learning rate."""
        optim = self.config.optim
        self.interval.learning_rate = learning_rate(step - 1, self.order.num_steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = self.interval.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        reference = self.config.reference
        if reference.update != "never" and is_due(step, reference.update_steps):
            share = reference.update_alpha if reference.update == "soft" else 1.0
            self.models.reference.follow(self.models.policy, share)

    def refuse(self, step: int, losses_seen: list[tuple[list[int], Tensor]]) -> None:
        """Leaves out a step whose numbers are not finite; every rank must call.

        Args:
            step: counted from 1.
            losses_seen: for each micro-batch, the indices of its pairs, and their losses.

        Raises:
            NotFiniteError: naming the rows, if `train.on_nonfinite` says so or too many were left
                out.
        """
        losses = {
            index: loss
            for indices, losses in losses_seen
            for index, loss in zip(indices, losses.tolist(), strict=True)
        }
        every = sorted(gather_object(list(losses.items())))
        bad = [index for index, loss in every if not math.isfinite(loss)]
        named = [self.pairs.row_name(index) for index in bad or dict(every)]
        folder = Path(self.config.train.output_dir, f"nonfinite-{step}")
        if self.accelerator.is_main_process:
            keep_findings(
                folder,
                list(zip(named, (self.pairs[index] for index in bad or dict(every)), strict=True)),
                self.models.scorer,
                self.accelerator.device,
                step=step,
                bad_gradients=bad_gradients(self.models.policy.model),
            )
        self.optimizer.zero_grad()
        self.num_skipped += 1
        what = "whose loss is not finite" if bad else "of the step, whose losses are finite"
        said = (
            f"step {step} is not taken: its gradient is not finite. Rows {what}: "
            f"{', '.join(named)}; {folder} holds what was found."
        )
        if self.config.train.on_nonfinite == "stop":
            raise NotFiniteError(
                f"{said} Look at the rows, lower optim.learning_rate, or go on with "
                "--train.on_nonfinite skip."
            )
        if self.num_skipped > MAX_SKIPPED:
            raise NotFiniteError(
                f"{said} {MAX_SKIPPED} steps were skipped before it: the run is no longer sound. "
                "Lower optim.learning_rate, or look at the rows."
            )
        self.say(f"{said} Skipped: {self.num_skipped} of {MAX_SKIPPED}.")

    def _lower_budget(
        self, step: int, bins: list[list[TokenizedPair]], *, is_reducing: bool
    ) -> None:
        """Makes micro-batches smaller after memory ran out.

        Raises:
            UserError: every micro-batch has one pair already, or the failed one cannot be retried.
        """
        largest = max(len(build_stream(pairs).input_ids) for pairs in bins)
        if is_reducing or all(len(pairs) <= 1 for pairs in bins):
            what = "while ranks were reducing a gradient" if is_reducing else "with one pair"
            raise UserError(
                f"train.tokens_per_microbatch: a micro-batch ran out of memory {what}; the largest "
                f"has {largest} tokens. Set it lower, set train.gradient_checkpointing to "
                "true, lower data.max_length, or quantise the model."
            )
        self.budget.lower(step, largest=largest)
        self.say(f"out of memory: from here on {self.budget.tokens} tokens a micro-batch")
