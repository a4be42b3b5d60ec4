"""The loop: from a configuration to a trained adapter, log-probs to a step.

Everything is counted once and globally. A step is `per_device_train_batch_size x
gradient_accumulation_steps x ranks` pairs, drawn by a pure function of (seed, step). The losses of
its pairs are summed over micro-batches and ranks and divided by the number of pairs in the whole
step, so every split into micro-batches, every number of ranks and every short last step gives one
gradient.

Left out on purpose: callbacks, and Accelerate's accumulation, schedulers, samplers and
`save_state`: each scales, orders or restores something in a way that would have to be undone.
"""

import json
import math
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpo import run_folder
from dpo.config import Config, TrainConfig, save
from dpo.data.loader import balance, load_data, micro_batches, step_indices
from dpo.data.stream import Stream, TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.evaluate.diagnostics import Watch
from dpo.evaluate.evaluator import Evaluator
from dpo.evaluate.token_rewards import rewards_to_show
from dpo.logps import pair_logps
from dpo.losses import LOSSES, PairLogps
from dpo.metrics import RunningMeans, is_better, pair_metrics
from dpo.model.fingerprint import reference_digest, weights_digest
from dpo.model.load import compile_layers, load_tokenizer
from dpo.model.logp_cache import LogpCache
from dpo.model.reference import Cached, Reference, build_reference, choose_mode, open_cache
from dpo.model.scorer import Scorer
from dpo.plan.flops import costs, work
from dpo.plan.gpus import peak_tflops
from dpo.report.page import write_report
from dpo.train import checkpoint as checkpoints
from dpo.train.budget import load_policy_to_fit, smallest_over_ranks, token_budget
from dpo.train.header import header
from dpo.train.launch import build_accelerator, on_main
from dpo.train.optim import build_optimizer, learning_rate
from dpo.train.selfcheck import check_start, first_reference_logps
from dpo.train.throughput import LoggingInterval, Stopwatch
from dpo.train.tracking import (
    Tracker,
    check_trackers,
    closing_table,
    device_name,
    side_by_side,
)


class MicroBatch(NamedTuple):
    """What is kept of a micro-batch once its gradient is there: places in the step, and values."""

    positions: list[int]
    losses: Tensor
    metrics: Tensor


def train(config: Config) -> Path:
    """Runs the configuration to its end; returns the run folder.

    Raises:
        UserError: what the configuration asks for cannot be done; nothing was lost.
        RuntimeError: the start-up self-check or a gradient shows numbers that cannot be trusted.
    """
    run = Run(config)
    check_start(run)
    if not run.start_step:
        run.evaluate(step=0)
    for step in range(run.start_step + 1, run.total_steps + 1):
        run.train_step(step)
        run.log(step)
        if run.is_due(step, config.train.eval_steps) or step == run.total_steps:
            run.evaluate(step)
        if run.is_due(step, config.train.save_steps):
            run.save(step)
        elif run.ends_epoch(step):
            run.share_reference()
    return run.finish()


class Run:
    """One run: everything it needs, made once, and the few things it does again and again."""

    def __init__(self, config: Config):
        config.check()
        self.config = config
        trackers = check_trackers(config.train.report_to)
        self.accelerator = accelerator = build_accelerator(config, trackers)
        resume_from = on_main(accelerator, lambda: checkpoints.find_checkpoint(config))
        self.folder = Path(config.train.output_dir)

        self.tokenizer = load_tokenizer(config.model)
        with accelerator.main_process_first():  # the others find the tokenised pairs in the cache
            self.data = load_data(config, self.tokenizer)
        self.pairs_per_step, self.total_steps = step_counts(
            config.train, len(self.data.train), accelerator.num_processes
        )

        self.policy = load_policy_to_fit(self)
        scorer = Scorer(self.policy.model, config.model.attention)
        self.layout: Literal["shared", "padded"] = scorer.layout
        self.layout_reason = scorer.layout_reason
        if config.model.compile:  # after the scorer, whose probe must see the model's own errors
            compile_layers(scorer.causal_lm, accelerator.device)
        optimizer = build_optimizer(self.policy.model, config.optim)
        self.scorer, self.optimizer = accelerator.prepare(
            scorer, optimizer, device_placement=[False, False]
        )
        # Before a checkpoint is loaded: the reference is what the policy was at step 0.
        self.reference_mode = choose_mode(config.reference.mode, self.policy)
        store = self._open_cache()
        self.live_reference = build_reference(
            self.reference_mode,
            self.scorer,
            self.policy,
            self.layout,
            is_all_cached=store is not None and self._is_all_in(store),
        )
        self.cached = Cached(self.live_reference, store) if store else None
        self.reference: Reference = self.cached or self.live_reference
        self.evaluator = Evaluator(
            config,
            accelerator,
            self.policy.model,
            self.scorer,
            self.reference,
            self.live_reference,
            self.tokenizer,
            self.data.held_out,
            accelerator.device,
        )
        self.means = RunningMeans(accelerator.device)
        self.costs = costs(self.policy.model)
        self.stopwatch = Stopwatch(accelerator.device)
        known_peak = peak_tflops(device_name(accelerator.device))
        self.window = LoggingInterval(self.stopwatch, config.train.peak_tflops or known_peak)
        state = checkpoints.resume(self, resume_from) if resume_from else {}
        self.start_step: int = state.get("step", 0)
        self.best: float | None = state.get("best")
        self.budget = token_budget(self, state)
        # Only now, when nothing can be wrong with the configuration any more, is anything written.
        has_reference = self.reference_mode != "zero"
        watch = Watch(config.loss.beta if has_reference else None)
        self.tracker = Tracker(accelerator, self.folder, watch)
        if accelerator.is_main_process:
            checkpoints.prepare_run_folder(self.folder, resume_from)
            self.tracker.rewind(self.start_step)
            save(config, self.folder / run_folder.CONFIG)
            report = json.dumps(self.data.report, indent=1)
            (self.folder / run_folder.DATA_REPORT).write_text(report)
            (self.folder / run_folder.HEADER).write_text(header(self) + "\n")
        self.tracker.say(header(self))
        self.tracker.start(config, self.start_step, self.total_steps)

    def train_step(self, step: int) -> None:
        """One optimizer step, counted from 1, on this rank's part of its pairs."""
        with self.stopwatch.part("data", on_host=True):
            indices = self.indices(step)
            pairs = [self.data.train[i] for i in indices]
            num_tokens = [pair.num_stream_tokens for pair in pairs]
            ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
            mine = balance(num_tokens, ranks)[rank]
        seen = self._gradient(step, [pairs[i] for i in mine], pairs_in_step=len(pairs))
        for micro_batch in seen:
            self.means.add(micro_batch.metrics)
        self._update(step, [([int(indices[mine[i]]) for i in m.positions], m.losses) for m in seen])
        if self.cached:
            self.cached.settle()  # the norm was read: the device has nothing left to do
        self.window.add(len(pairs), sum(num_tokens))

    def _gradient(
        self, step: int, pairs: list[TokenizedPair], *, pairs_in_step: int
    ) -> list[MicroBatch]:
        """Sums the gradient of this rank's pairs, over smaller micro-batches where memory runs out.

        Memory may only be fragmented, so the first failure of a step is tried again unchanged. The
        smallest micro-batch comes last: under DDP its backward reduces the gradient over ranks,
        which cannot be begun again. So with several ranks a lowered budget stays.
        """
        num_tokens = [pair.num_stream_tokens for pair in pairs]
        if self.accelerator.num_processes == 1 and self.budget.recover(step):
            self.tracker.say(f"memory: {self.budget.tokens} tokens a micro-batch again")
        was_tried = False
        while True:
            bins = micro_batches(num_tokens, self.budget.tokens)
            bins.sort(key=lambda positions: -sum(num_tokens[i] for i in positions))
            seen: list[MicroBatch] = []
            try:
                for number, positions in enumerate(bins):
                    with self.stopwatch.part("data", on_host=True):
                        stream = build_stream([pairs[i] for i in positions])
                        stream = stream.to(self.accelerator.device)
                    self._seed_dropout(step, number)
                    is_last = number == len(bins) - 1
                    with nullcontext() if is_last else self.accelerator.no_sync(self.scorer):
                        seen.append(MicroBatch(positions, *self._backward(stream, pairs_in_step)))
                return seen
            except torch.OutOfMemoryError:
                pass  # the retry stands outside: the traceback keeps the activations alive
            is_reducing = self.accelerator.num_processes > 1 and len(seen) == len(bins) - 1
            if was_tried or is_reducing:
                tokens = [[num_tokens[i] for i in b] for b in bins]
                self._lower_budget(step, tokens, is_reducing=is_reducing)
            else:
                self.tracker.say("out of memory: the step is begun again")
            was_tried = True
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def _lower_budget(self, step: int, bins: list[list[int]], *, is_reducing: bool) -> None:
        """After running out of memory, smaller micro-batches; `bins`: tokens of the pairs in each.

        Raises:
            UserError: every micro-batch has one pair already, or cannot be begun again.
        """
        if is_reducing or all(len(tokens) <= 1 for tokens in bins):
            what = "while ranks were reducing a gradient" if is_reducing else "with one pair"
            raise UserError(
                f"train.tokens_per_microbatch: a micro-batch ran out of memory {what}; the largest "
                f"has {sum(bins[0])} tokens. Set it lower, set train.gradient_checkpointing to "
                "true, lower data.max_length, or quantise the model."
            )
        self.budget.lower(step, largest=sum(bins[0]))
        self.tracker.say(f"out of memory: from here on {self.budget.tokens} tokens a micro-batch")

    def _backward(self, stream: Stream, pairs_in_step: int) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one micro-batch; returns its losses and metrics, by pair."""
        logps, losses = self._score(stream)
        # DDP averages gradients over ranks; times their number, it sums them.
        self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / pairs_in_step))
        return losses.detach(), pair_metrics(logps, losses, beta=self.config.loss.beta)

    def _score(self, stream: Stream) -> tuple[PairLogps, Tensor]:
        """Log-probs under both models, one loss per pair. The policy first: FSDP wants it so."""
        policy = self.scorer(stream)
        with self.stopwatch.part("reference"):
            reference = self.reference(stream)
        self.window.flops += self._flops(stream)
        logps = pair_logps(policy, reference, stream.sequence_ids, stream.num_pairs)
        return logps, LOSSES[self.config.loss.type](logps, **self.config.loss.options)

    def _update(self, step: int, losses_seen: list[tuple[list[int], Tensor]]) -> None:
        """Clips and steps; on a gradient that is not finite, every rank stops before the step."""
        optim = self.config.optim
        trained = [p for p in self.policy.model.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, optim.max_grad_norm or math.inf)
        self.window.grad_norm = float(norm)  # type: ignore[arg-type]
        if not math.isfinite(self.window.grad_norm):
            raise RuntimeError(self._not_finite(step, losses_seen))
        self.window.learning_rate = learning_rate(step - 1, self.total_steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = self.window.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def log(self, step: int) -> None:
        """Means over the pairs since the last log; the first step is always logged alone."""
        metrics = None
        if (
            step == 1
            or step == self.total_steps
            or self.is_due(step, self.config.train.logging_steps)
        ):
            pairs = self.means.pop(self._sum_over_ranks)
            metrics = {
                f"train/{name}": value for name, value in (pairs | self.window.pop()).items()
            }
            self.tracker.log(step, metrics)
        self.tracker.advance(metrics)

    def evaluate(self, step: int) -> None:
        """Held-out metrics and samples; keeps the weights in `best/` if none were better."""
        if not len(self.data.held_out):
            return
        evaluation = self.evaluator.evaluate()
        self.window.restart_clock()  # evaluation is not training time
        self.tracker.log_evaluation(
            step, evaluation, self.data.held_out, beta=self.config.loss.beta
        )
        if self.accelerator.is_main_process and step:
            self._keep_best(step, evaluation.metrics)

    def save(self, step: int) -> None:
        """Writes `checkpoint-{step}`."""
        self.share_reference()  # so that a resumed run finds what this one will find
        self.budget.tokens = smallest_over_ranks(self.accelerator, self.budget.tokens)
        state = {
            "pairs_per_step": self.pairs_per_step,
            **self.budget.state,
            "data": self.data.train.digest,
            "weights": self.weights_digest,
            "sums": self.means.state(self._sum_over_ranks),
            "best": self.best,
            "reference_logps": first_reference_logps(self),
        }
        if self.accelerator.is_main_process:
            checkpoints.save_checkpoint(
                self.folder,
                step,
                self.policy.model,
                self.optimizer.optimizer,
                self.config,
                state,
                self.config.train.save_total_limit,
            )
        self.accelerator.wait_for_everyone()
        self.window.restart_clock()

    def share_reference(self) -> None:
        """What any rank has computed of the reference is on disk, and found by all."""
        if self.cached:
            self.cached.flush()
            self.accelerator.wait_for_everyone()
            self.cached.store.refresh()

    def finish(self) -> Path:
        """Writes `final/` and `summary.json`, and prints the held-out figures before and after."""
        self.share_reference()
        if self.accelerator.is_main_process:
            final = self.folder / run_folder.FINAL
            checkpoints.save_weights(self.policy.model, final)
            self.tokenizer.save_pretrained(final)
            self.tracker.close_bar()
            evaluations = self.tracker.evaluations()
            before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
            summary = {"before": before, "after": after}
            tokens = self._token_rewards()
            (self.folder / run_folder.TOKEN_REWARDS).write_text(json.dumps(tokens, indent=1))
            (self.folder / run_folder.SUMMARY).write_text(json.dumps(summary, indent=1))
            if evaluations:
                old, new = (self.tracker.samples_at(line["step"]) for line in (before, after))
                print(f"\n{closing_table(before, after)}\n\n{side_by_side(old, new)}")
            if self.cached:
                print(self.cached.summary())
            print(f"The trained model is in {final}.")
            if self.config.train.write_report:
                print(f"The report is in {write_report(self.folder)}.")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # closes trackers and the process group: nothing after it
        return self.folder

    @staticmethod
    def is_due(step: int, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens now."""
        return every > 0 and step % every == 0

    def ends_epoch(self, step: int) -> bool:
        """Whether the step is the last of an epoch: in the next one, pairs go to other ranks."""
        return self.is_due(step, math.ceil(len(self.data.train) / self.pairs_per_step))

    def _open_cache(self) -> LogpCache | None:
        """The cache that `reference.cache` names, of this run's reference."""
        config = self.config
        if config.reference.cache == "off" or self.reference_mode == "zero":
            return None
        kind = {"layout": self.layout, "device_type": self.accelerator.device.type}
        digest = on_main(self.accelerator, lambda: reference_digest(config.model, **kind))
        return open_cache(config.reference.cache, digest)

    def _is_all_in(self, store: LogpCache) -> bool:
        """Whether no pair of the run needs the live reference, which would be a second model."""
        if self.reference_mode != "frozen" or self.config.train.eval_prompts:  # sampled answers
            return False
        seen = {i for step in range(1, self.total_steps + 1) for i in self.indices(step)}
        in_training = (self.data.train[i] in store for i in sorted(seen))
        return all(in_training) and all(pair in store for pair in self.data.held_out)

    @cached_property
    def weights_digest(self) -> str:
        """Of the model's files: what the policy was at step 0."""
        return on_main(self.accelerator, lambda: weights_digest(self.config.model))

    def _flops(self, stream: Stream) -> float:
        """Of policy and reference on one micro-batch, this rank's part of the step."""
        its_work = work(stream.segments, len(stream.targets), self.layout)
        flops = self.costs.flops(its_work)
        known = self.cached.last_found_share if self.cached else self.reference_mode == "zero"
        return flops.useful - flops.reference * known

    def indices(self, step: int) -> list[int]:
        """Which pairs the step sees, on all ranks together."""
        seed = self.config.train.seed
        return step_indices(len(self.data.train), self.pairs_per_step, seed, step - 1).tolist()

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """LoRA's dropout as a function of where we are: nothing to save, nothing to restore."""
        place = (self.config.train.seed, step, micro_batch, self.accelerator.process_index)
        torch.manual_seed(hash(place))

    def _keep_best(self, step: int, metrics: dict[str, float]) -> None:
        name = self.config.train.metric_for_best_model
        if not name:
            return
        value = metrics[name]
        if self.best is None or is_better(name, value, self.best):
            self.best = value
            best = self.folder / run_folder.BEST
            checkpoints.save_weights(self.policy.model, best)
            self.tokenizer.save_pretrained(best)
            (best / run_folder.BEST_METRIC).write_text(json.dumps({"step": step, name: value}))

    def _token_rewards(self) -> list[dict[str, Any]]:
        """Some held-out pairs, token by token, under the weights as they are now."""
        logps = self.tracker.last_held_out()
        if logps is None:
            return []
        self.scorer.eval()
        return rewards_to_show(
            self.data.held_out,
            logps,
            self.scorer,
            self.reference,
            self.tokenizer,
            beta=self.config.loss.beta,
            device=self.accelerator.device,
        )

    def _not_finite(self, step: int, losses_seen: list[tuple[list[int], Tensor]]) -> str:
        bad = [
            self.data.train.row_name(index)
            for indices, losses in losses_seen
            for index, loss in zip(indices, losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        every = [self.data.train.row_name(i) for indices, _ in losses_seen for i in indices]
        return (
            f"step {step}: the gradient norm is {self.window.grad_norm}; stopped before the "
            f"update, so the weights are those of step {step - 1}. Rows whose loss is not "
            f"finite on rank {self.accelerator.process_index}: {', '.join(bad) or 'none'}; rows "
            f"of this step there: {', '.join(every)}. Lower optim.learning_rate, or "
            "look at these rows."
        )

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")  # type: ignore[return-value]


def step_counts(config: TrainConfig, num_pairs: int, num_processes: int) -> tuple[int, int]:
    """Pairs in a step over all processes, and steps in the run."""
    pairs_per_step = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes
    )
    if config.max_steps > 0:
        return pairs_per_step, config.max_steps
    return pairs_per_step, config.num_train_epochs * math.ceil(num_pairs / pairs_per_step)
