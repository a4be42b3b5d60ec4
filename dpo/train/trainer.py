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
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from dpo.config import BEST_METRICS, Config, UserError, save
from dpo.data.loader import balance, load_data, micro_batches, step_indices
from dpo.data.stream import Stream, TokenizedPair, build_stream
from dpo.losses import LOSSES, PairLogps
from dpo.metrics import RunningMeans, pair_metrics
from dpo.model.load import load_policy, load_tokenizer
from dpo.model.reference import build_reference, choose_mode
from dpo.model.scorer import Scorer
from dpo.show.diagnostics import Watch
from dpo.show.evaluate import Evaluator, pair_logps
from dpo.show.report.page import write_report
from dpo.show.token_rewards import pairs_to_show, token_rewards
from dpo.train import checkpoint as checkpoints
from dpo.train.header import header
from dpo.train.launch import build_accelerator, on_main
from dpo.train.optim import build_optimizer, learning_rate
from dpo.train.tracking import Tracker, Window, check_trackers, closing_table, side_by_side

SELF_CHECK_PAIRS = 2


def train(config: Config) -> Path:
    """Runs the configuration to its end; returns the run folder.

    Raises:
        UserError: what the configuration asks for cannot be done; nothing was lost.
        RuntimeError: the start-up self-check or a gradient shows numbers that cannot be trusted.
    """
    run = Run(config)
    run.check_start()
    if not run.start_step:
        run.evaluate(step=0)
    for step in range(run.start_step + 1, run.total_steps + 1):
        run.train_step(step)
        run.log(step)
        if run.is_due(step, config.train.eval_steps) or step == run.total_steps:
            run.evaluate(step)
        if run.is_due(step, config.train.save_steps):
            run.save(step)
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
        self.pairs_per_step = (
            config.train.per_device_train_batch_size
            * config.train.gradient_accumulation_steps
            * accelerator.num_processes
        )
        self.total_steps = _total_steps(config, len(self.data.train), self.pairs_per_step)

        set_seed(config.train.seed)
        self.policy = load_policy(config, accelerator.device)
        scorer = Scorer(self.policy.model, config.model.attention)
        self.layout, self.layout_reason = scorer.layout, scorer.layout_reason
        optimizer = build_optimizer(self.policy.model, config.optim)
        self.scorer, self.optimizer = accelerator.prepare(
            scorer, optimizer, device_placement=[False, False]
        )
        # Before a checkpoint is loaded: the reference is what the policy was at step 0.
        self.reference_mode = choose_mode(config.reference.mode, self.policy)
        self.reference = build_reference(self.reference_mode, self.scorer, self.policy, self.layout)
        self.evaluator = Evaluator(
            config,
            accelerator,
            self.policy.model,
            self.scorer,
            self.reference,
            self.tokenizer,
            self.data.held_out,
            accelerator.device,
        )
        self.means = RunningMeans(accelerator.device)
        self.window = Window()
        self.best: float | None = None
        self.start_step = self._resume(resume_from) if resume_from else 0
        # Only now, when nothing can be wrong with the configuration any more, is anything written.
        has_reference = self.reference_mode != "zero"
        watch = Watch(config.loss.beta if has_reference else None)
        self.tracker = Tracker(accelerator, self.folder, watch)
        if accelerator.is_main_process:
            checkpoints.prepare_run_folder(self.folder, resume_from)
            self.tracker.rewind(self.start_step)
            save(config, self.folder / "config.yaml")
            (self.folder / "data_report.json").write_text(json.dumps(self.data.report, indent=1))
            (self.folder / "header.txt").write_text(header(self) + "\n")
        self.tracker.say(header(self))
        self.tracker.start(config, self.start_step, self.total_steps)

    def train_step(self, step: int) -> None:
        """One optimizer step, counted from 1, on this rank's part of its pairs."""
        indices = self._indices(step)
        pairs = [self.data.train[i] for i in indices]
        num_tokens = [pair.num_stream_tokens for pair in pairs]
        mine = balance(num_tokens, self.accelerator.num_processes)[self.accelerator.process_index]
        bins = micro_batches([num_tokens[i] for i in mine], self.config.train.tokens_per_microbatch)
        losses_seen: list[tuple[list[int], Tensor]] = []
        for number, positions in enumerate(bins):
            is_last = number == len(bins) - 1
            self._seed_dropout(step, number)
            stream = build_stream([pairs[mine[i]] for i in positions]).to(self.accelerator.device)
            with nullcontext() if is_last else self.accelerator.no_sync(self.scorer):
                logps, losses = self._score(stream)
                # DDP averages gradients over ranks; times their number, it sums them.
                scale = self.accelerator.num_processes / len(pairs)
                self.accelerator.backward(losses.sum() * scale)
            self.means.add(pair_metrics(logps, losses, beta=self.config.loss.beta))
            losses_seen.append(([int(indices[mine[i]]) for i in positions], losses.detach()))
        self._update(step, losses_seen)
        self.window.add(len(pairs), sum(num_tokens))

    def _score(self, stream: Stream) -> tuple[PairLogps, Tensor]:
        """Log-probs under both models, one loss per pair. The policy first: FSDP wants it so."""
        policy = self.scorer(stream)
        logps = pair_logps(stream, policy, self.reference(stream))
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
        state = {
            "pairs_per_step": self.pairs_per_step,
            "data": self.data.train.digest,
            "sums": self.means.state(self._sum_over_ranks),
            "best": self.best,
            "reference_logps": self._reference_logps(),
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

    def finish(self) -> Path:
        """Writes `final/` and `summary.json`, and prints the held-out figures before and after."""
        if self.accelerator.is_main_process:
            final = self.folder / "final"
            checkpoints.save_weights(self.policy.model, final)
            self.tokenizer.save_pretrained(final)
            self.tracker.close_bar()
            evaluations = self.tracker.evaluations()
            before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
            summary = {"before": before, "after": after}
            tokens = self._token_rewards()
            (self.folder / "token_rewards.json").write_text(json.dumps(tokens, indent=1))
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
            if evaluations:
                old, new = (self.tracker.samples_at(line["step"]) for line in (before, after))
                print(f"\n{closing_table(before, after)}\n\n{side_by_side(old, new)}")
            print(f"The trained model is in {final}.")
            if self.config.train.write_report:
                print(f"The report is in {write_report(self.folder)}.")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # closes trackers and the process group: nothing after it
        return self.folder

    def check_start(self) -> None:
        """Refuses to train on numbers that cannot be trusted.

        Both layouts must agree on the first pairs, and on a first start the policy must *be* the
        reference: rewards 0, and so a sigmoid loss of ln 2.
        """
        stream = self._first_pairs()
        for name, module in self.scorer.named_modules():
            if "lora_dropout" in name:  # what the policy has and the reference has not
                module.eval()
        with torch.no_grad():
            policy, reference = self.scorer(stream), self.reference(stream)
            if not self.start_step and self.reference_mode != "zero":
                self._check_reference(policy, reference)
            if self.layout == "shared":
                self._check_layouts(policy, Scorer(self.policy.model, attention="padded")(stream))
        self.scorer.train()

    def _check_reference(self, policy: Tensor, reference: Tensor) -> None:
        worst = (policy - reference).abs().max().item()
        if not worst <= 1e-4:
            raise RuntimeError(
                f"self-check: before the first update the policy must be the reference, but the "
                f"log-prob of a token differs by {worst:.3g} nats, wanted at most 0.0001. Training "
                "would pull towards another model."
            )

    def _check_layouts(self, shared: Tensor, padded: Tensor) -> None:
        is_half = torch.finfo(next(self.policy.model.parameters()).dtype).bits < 32
        allowed = 0.05 if is_half or self.config.model.quantization != "none" else 1e-4
        mean = (shared - padded).abs().mean().item()
        if not mean <= allowed:
            raise RuntimeError(
                f"self-check: shared and padded layouts differ by {mean:.3g} nats per token, "
                f"wanted at most {allowed}. Set model.attention to padded and report the model."
            )

    @staticmethod
    def is_due(step: int, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens now."""
        return every > 0 and step % every == 0

    def _indices(self, step: int) -> list[int]:
        seed = self.config.train.seed
        return step_indices(len(self.data.train), self.pairs_per_step, seed, step - 1).tolist()

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """LoRA's dropout as a function of where we are: nothing to save, nothing to restore."""
        place = (self.config.train.seed, step, micro_batch, self.accelerator.process_index)
        torch.manual_seed(hash(place))

    def _first_pairs(self) -> Stream:
        """The shortest of the first step's pairs: the self-check costs little and fits anywhere."""
        pairs: list[TokenizedPair] = [self.data.train[i] for i in self._indices(1)]
        pairs.sort(key=lambda pair: pair.num_stream_tokens)
        return build_stream(pairs[:SELF_CHECK_PAIRS]).to(self.accelerator.device)

    def _reference_logps(self) -> list[float]:
        """The reference's token log-probs on the first pairs: they tell references apart."""
        return self.reference(self._first_pairs()).tolist()

    def _resume(self, checkpoint: Path) -> int:
        state = checkpoints.load_checkpoint(checkpoint, self.policy.model, self.optimizer.optimizer)
        if state["pairs_per_step"] != self.pairs_per_step:
            raise UserError(
                f"train.resume: {checkpoint} took {state['pairs_per_step']} pairs a step, now it "
                f"would be {self.pairs_per_step}. Set train.per_device_train_batch_size and "
                "train.gradient_accumulation_steps so that the product over devices is the same."
            )
        if state["data"] != self.data.train.digest:
            raise UserError(
                f"train.resume: the pairs have changed since {checkpoint}: their tokens or their "
                "order differ. Restore the rows, or set train.resume to never."
            )
        both = zip(self._reference_logps(), state["reference_logps"], strict=True)
        moved = max(abs(now - then) for now, then in both)
        if not moved <= 0.02:
            raise UserError(
                f"train.resume: the reference has changed since {checkpoint}: a token's log-prob "
                f"differs by {moved:.3g} nats. Restore the model at model.name_or_path, or set "
                "train.resume to never."
            )
        if self.accelerator.is_main_process:
            self.means.load(state["sums"])
        self.best = state["best"]
        return state["step"]

    def _keep_best(self, step: int, metrics: dict[str, float]) -> None:
        name = self.config.train.metric_for_best_model
        if not name:
            return
        value = metrics[name]
        if self.best is None or BEST_METRICS[name](value, self.best) != self.best:
            self.best = value
            best = self.folder / "best"
            checkpoints.save_weights(self.policy.model, best)
            self.tokenizer.save_pretrained(best)
            (best / "metric.json").write_text(json.dumps({"step": step, name: value}))

    def _token_rewards(self) -> list[dict[str, Any]]:
        """Some held-out pairs, token by token, under the weights as they are now."""
        logps, held_out, beta = (
            self.tracker.last_held_out(),
            self.data.held_out,
            self.config.loss.beta,
        )
        if logps is None:
            return []
        self.scorer.eval()
        context = (self.scorer, self.reference, self.tokenizer)
        device = self.accelerator.device
        return [
            {"row": held_out.row_name(i), "why": why}
            | token_rewards(held_out[i], *context, beta=beta, device=device)
            for i, why in pairs_to_show(logps, beta=beta)
        ]

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


def _total_steps(config: Config, num_pairs: int, pairs_per_step: int) -> int:
    if config.train.max_steps > 0:
        return config.train.max_steps
    return config.train.num_train_epochs * math.ceil(num_pairs / pairs_per_step)
