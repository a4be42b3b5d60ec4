"""The loop: from a configuration to a trained adapter.

`Run` sets everything up, narrates and finishes; what a step does is in `dpo.train.step`.

Left out on purpose: callbacks, and Accelerate's accumulation, schedulers, samplers and
`save_state`: each scales, orders or restores something in a way that would have to be undone.
"""

import json
import sys
from collections.abc import Callable
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from torch import Tensor

from dpo import run_folder, signals
from dpo.catalogue import is_better
from dpo.config import Config
from dpo.data.files import use_a_writable_cache
from dpo.data.loader import PreferenceData, load_data
from dpo.data.order import Order, is_due
from dpo.errors import RefusedRowsError, UserError
from dpo.evaluate.diagnostics import Watch
from dpo.evaluate.evaluator import Evaluator
from dpo.metrics import RunningMeans
from dpo.model.models import build_models
from dpo.model.named import check_vocabulary, load_tokenizer
from dpo.objective import FROM_ROWS
from dpo.plan.disk import check_disk
from dpo.plan.flops import costs
from dpo.plan.gpus import peak_tflops
from dpo.plan.plan import time_on_this_cpu
from dpo.ranks import (
    largest_over_ranks,
    main_first,
    on_main,
    smallest_over_ranks,
    sum_over_ranks,
)
from dpo.run_folder import checkpoint_name
from dpo.train import checkpoint as checkpoints
from dpo.train.budget import load_policy_to_fit, probe_pairs, settle_day, settle_dtype, token_budget
from dpo.train.header import header
from dpo.train.launch import build_accelerator, launcher_notes
from dpo.train.nonfinite import NotFiniteError, check_evaluation
from dpo.train.optim import build_optimizer
from dpo.train.output import Output
from dpo.train.peers import watched
from dpo.train.selfcheck import check_start, shortest_pairs
from dpo.train.step import TrainStep
from dpo.train.throughput import LoggingInterval, Stopwatch
from dpo.train.tracking import (
    Tracker,
    check_trackers,
    device_name,
)


@watched()
def train(config: Config) -> Path:
    """Runs the configuration to its end; returns the run folder.

    Raises:
        UserError: what the configuration asks for cannot be done; nothing was lost.
        Stopped: a signal has asked for it; the run is saved.
        SelfCheckError: the start-up self-check shows numbers that cannot be trusted.
    """
    run = Run(config)
    run.check_start()
    with signals.deferred("the run is saved after this step"), run.tracker.shown():
        if run.lacks_evaluation:
            run.evaluate(run.start_step)
        run.stop_if_asked(run.start_step)
        for step in range(run.start_step + 1, run.order.num_steps + 1):
            if run.is_out_of_patience:
                break
            run.take(step)
            run.log(step)
            if run.is_evaluated_at(step):
                run.evaluate(step)
            if is_due(step, config.train.save_steps):
                run.save_or_go_on(step)
            elif run.order.ends_epoch(step):
                run.share_reference()
            run.stop_if_asked(step)
        return run.finish()


class Run:
    """One run: everything it needs, built once, and the few things that it does repeatedly."""

    def __init__(self, config: Config):
        config.check()
        self.config = config
        self.objective = config.objective()
        trackers = check_trackers(config.train.report_to)
        self.accelerator = accelerator = build_accelerator(config, trackers)
        device = accelerator.device
        find = partial(checkpoints.find_checkpoint, config)
        resume_from, passed_over = on_main(accelerator, find)
        self.folder = Path(config.train.output_dir)

        about_start = passed_over + use_a_writable_cache(self.folder) + launcher_notes()
        self.tokenizer = load_tokenizer(config.model)
        settle_day(config, accelerator, self.tokenizer, resume_from)
        self.data = data = main_first(accelerator, self._load_data)
        for pairs in (data.train, data.held_out):
            names = self.objective.inputs & FROM_ROWS
            on_main(accelerator, partial(pairs.require, names, "loss: each pair needs"))
        largest = max(pairs.largest_id for pairs in (data.train, data.held_out))
        check_vocabulary(config.model, self.tokenizer, largest)
        self.order = order = Order.of(config.train, len(data.train), accelerator.num_processes)
        planned = order.num_steps
        if resume_from:
            check_end = partial(checkpoints.check_end, config, resume_from, order)
            planned = on_main(accelerator, check_end)

        about_dtype = settle_dtype(config, accelerator, resume_from)
        time = self._tell_time()
        probe = probe_pairs(data.train, order)
        policy = load_policy_to_fit(config, accelerator, probe)
        policy.notes += about_dtype + about_start
        all_pairs = chain(data.train.select(order.seen()), data.held_out)
        # Sampled answers are pairs that nobody knows yet.
        asked_for = None if config.train.eval_prompts else all_pairs
        self.models = models = build_models(policy, config, accelerator, asked_for=asked_for)
        self.optimizer = accelerator.prepare(
            build_optimizer(policy.model, config.optim), device_placement=[False]
        )
        watch = Watch(config.loss.beta if config.has_fixed_reference else None)
        self.tracker = Tracker(accelerator, self.folder, watch)
        self.output = Output(config, models, data, self.tokenizer, self.tracker, device)
        # The reference is what the policy was at step 0, so a checkpoint is loaded only now.
        state = {}
        with checkpoints.explained_state(resume_from):
            if resume_from:
                state = checkpoints.load_checkpoint(
                    resume_from, policy.model, self.optimizer.optimizer, self.identity
                )
                if config.reference.update != "never":
                    models.reference.load(checkpoints.load_reference(resume_from))
                self.objective.load(state.get("memory", self.objective.memory))
            self.start_step: int = state.get("step", 0)
            self._evaluated_at: int = state.get("evaluated_at", self.start_step or -1)
            name = config.train.metric_for_best_model or ""
            best = state.get("best") or {}  # versions up to 0.4.0 kept its value alone
            best = best if isinstance(best, dict) else {name: best}
            self.best = {key: float(value) for key, value in best.items()}
            self.misses: int = state.get("misses", 0) if name in self.best else 0
            self.means = RunningMeans(device)
            if state and accelerator.is_main_process:
                self.means.load(state["sums"])
            budget = token_budget(
                config, accelerator, models, probe, data.train.longest_in_files, state
            )

        on_main(accelerator, lambda: check_disk(config, self.output.sizes, order))
        # Nothing is written before this line: until here, the configuration may prove wrong.
        self.output.about = header(
            config,
            accelerator,
            models,
            data,
            order,
            budget,
            start_step=self.start_step,
            planned=planned,
            time=time,
        )
        if accelerator.is_main_process:
            checkpoints.prepare_run_folder(self.folder, resume_from)
            self.tracker.rewind(self.start_step)
            self.output.start()
        self.tracker.say(self.output.about)
        self.tracker.start(config, self.start_step, order.num_steps)

        peak = config.train.peak_tflops or peak_tflops(device_name(device))
        self.interval = LoggingInterval(Stopwatch(device), peak)
        self.train_step = TrainStep(
            config,
            self.objective,
            accelerator,
            models,
            self.optimizer,
            data.train,
            order,
            budget,
            costs(policy.model),
            self.means,
            self.interval,
            self.tracker.say,
            state.get("skipped", 0),
        )
        self.evaluator = Evaluator(
            config, self.objective, accelerator, models, self.tokenizer, data.held_out
        )

    def _load_data(self) -> PreferenceData:
        """The rows; if they are refused, a new folder gets the report that says which and why."""
        try:
            return load_data(self.config, self.tokenizer)
        except RefusedRowsError as refused:
            if run_folder.is_run(self.folder):
                raise
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / run_folder.DATA_REPORT
            file.write_text(json.dumps(refused.report, indent=1))
            raise UserError(f"{refused} {file} names the rows.") from None

    def _tell_time(self) -> str:
        """Says how long a long run on a CPU takes; now, since loading takes long as well."""
        if self.accelerator.device.type != "cpu":
            return ""
        config, pairs, ranks = self.config, self.data.train, self.accelerator.num_processes
        time = on_main(self.accelerator, lambda: time_on_this_cpu(config, pairs, self.order, ranks))
        if time and self.accelerator.is_main_process:
            print(time, file=sys.stderr)
        return time

    def check_start(self) -> None:
        """Refuses to train on numbers that cannot be trusted, see `dpo.train.selfcheck`."""
        assert self.identity  # computed while the reference is still what it was
        check_start(
            self.models,
            shortest_pairs(self.data.train, self.order).to(self.accelerator.device),
            self.objective,
            self.accelerator,
            is_first_start=not self.start_step,
            is_compiled=self.config.model.compile,
        )

    def take(self, step: int) -> None:
        """Takes a step; if its numbers are not finite, what was there before it is saved.

        Raises:
            NotFiniteError: the step is not taken.
        """
        try:
            self.train_step(step)
        except NotFiniteError as error:
            if step - 1 > self.start_step and self.save(step - 1) == "":
                raise UserError(f"{error} Step {step - 1} is saved.") from None
            raise

    def log(self, step: int) -> None:
        """Logs means over the pairs since the last log; the first step is always logged alone."""
        is_last = step == self.order.num_steps
        has_log = step == 1 or is_last or is_due(step, self.config.train.logging_steps)
        self.tracker.advance(self._log_means(step) if has_log else None)

    def is_evaluated_at(self, step: int) -> bool:
        """Whether the run evaluates after this step; before the first, after the last."""
        return step in (0, self.order.num_steps) or is_due(step, self.config.train.eval_steps)

    @property
    def lacks_evaluation(self) -> bool:
        """Whether the evaluation is due where the run goes on: a signal may have stopped it."""
        return self.is_evaluated_at(self.start_step) and self._evaluated_at != self.start_step

    def evaluate(self, step: int) -> None:
        """Logs held-out metrics and samples; keeps the weights in `best/` if they are the best.

        The evaluation before training is no candidate. A signal stops it, and nothing is logged.
        """
        if not len(self.data.held_out):
            return
        evaluation = self.evaluator.evaluate()
        if evaluation is None:
            return
        folder, held_out = self.folder / f"nonfinite-{step}", self.data.held_out
        check_evaluation(folder, step, evaluation, held_out, self.models, self.accelerator)
        self._evaluated_at = step
        self.interval.restart_clock()  # evaluation is not training time
        self.tracker.log_evaluation(
            step,
            evaluation,
            self.data.held_out,
            beta=self.config.loss.beta,
            per_token=self.config.rewards_per_token,
        )
        if step and self.config.train.metric_for_best_model:
            keep_best = partial(self._keep_best, step, evaluation.metrics)
            self.misses = on_main(self.accelerator, keep_best)
        if self.is_out_of_patience and self.interval.pairs:
            self._log_means(step)  # no step follows whose log they would be part of

    @property
    def is_out_of_patience(self) -> bool:
        """Whether `train.patience` evaluations in a row, or more, were not better than the best."""
        patience = self.config.train.patience
        return patience is not None and self.misses >= patience

    def save(self, step: int) -> str:
        """Writes `checkpoint-{step}`; says what prevented it, "" if nothing did."""
        self.share_reference()  # so that a resumed run finds what this one will find
        budget = self.train_step.budget
        budget.tokens = smallest_over_ranks(self.accelerator, budget.tokens)
        state = {**budget.state, "sums": self.means.state(self._sum)}
        state |= {"skipped": self.train_step.num_skipped}
        state |= {"memory": self.objective.memory}
        state |= {"best": self.best, "misses": self.misses, "evaluated_at": self._evaluated_at}
        write = partial(
            checkpoints.save_checkpoint,
            self.folder,
            step,
            self.models.policy.model,
            self.optimizer.optimizer,
            self.config,
            self.identity,
            state,
            self.models.reference.state if self.config.reference.update != "never" else None,
        )
        name = checkpoint_name(step)
        problem = on_main(self.accelerator, lambda: self.output.attempt(name, write))
        self.interval.restart_clock()
        return problem

    def save_or_go_on(self, step: int) -> None:
        """Writes `checkpoint-{step}`; without room for it, training goes on."""
        if problem := self.save(step):
            self.tracker.say(f"{problem} Older ones are as they were; training goes on.")

    def stop_if_asked(self, step: int) -> None:
        """Saves and stops if a signal has asked any rank to; every rank must call.

        Raises:
            Stopped: the run is saved.
        """
        number = largest_over_ranks(self.accelerator, signals.asked())
        if not number:
            return
        said = "stopped before the first step"
        if step:
            said = f"stopped after step {step}, which is saved in {checkpoint_name(step)}"
        is_new = step > self.start_step and not (self.folder / checkpoint_name(step)).exists()
        if on_main(self.accelerator, lambda: is_new) and (problem := self.save(step)):
            raise UserError(f"{signals.name(number)}: {problem} {self.output.way_on()}")
        self.tracker.close()
        run_folder.unlock(self.folder)
        auto = "" if self.config.train.resume == "auto" else " with --train.resume auto"
        raise signals.Stopped(
            number, f"{signals.name(number)}: {said}; the same command{auto} goes on from there"
        )

    def share_reference(self) -> None:
        """Lets every rank find what any rank has computed of the reference."""
        self.models.reference.share(self.accelerator)
        store = self.models.reference.store
        if store and store.problem:
            self.tracker.say_once(f"{store.problem}; training goes on")

    def finish(self) -> Path:
        """Writes `final/` and `summary.json`, and prints the held-out figures before and after.

        Raises:
            UserError: they cannot be written.
        """
        self.share_reference()
        on_main(self.accelerator, lambda: self.output.end(self._stopped_early()))
        self.tracker.close()
        if self.accelerator.is_main_process and self.config.train.write_report:
            self.output.report()
        run_folder.unlock(self.folder)
        return self.folder

    def _stopped_early(self) -> str:
        """Why the run ends before its last step, in words; "" if it does not."""
        steps = [line["step"] for line in self.tracker.evaluations()]
        last = max([self.start_step, *steps])
        if not self.is_out_of_patience or last == self.order.num_steps:
            return ""
        return (
            f"stopped after step {last} of {self.order.num_steps} (train.patience): no better "
            f"{self.config.train.metric_for_best_model} in {self.misses} evaluations in a row; "
            f"the best weights are in {run_folder.BEST}/"
        )

    @cached_property
    def identity(self) -> checkpoints.Identity:
        """What a continuation of this run must have in common with it; every rank must ask."""
        stream = shortest_pairs(self.data.train, self.order).to(self.accelerator.device)
        return checkpoints.Identity(
            pairs_per_step=self.order.pairs_per_step,
            data=self.data.train.digest,
            weights=on_main(self.accelerator, lambda: self.output.weights_before),
            reference_logps=self.models.reference.peek(stream).tolist(),
        )

    @property
    def _sum(self) -> Callable[[Tensor], Tensor]:
        return partial(sum_over_ranks, self.accelerator)

    def _log_means(self, step: int) -> dict[str, float]:
        if not (pair_means := self.means.pop(self._sum)):
            return {}  # no step was taken since
        means = pair_means | self.interval.pop()
        metrics = {f"train/{name}": value for name, value in means.items()}
        self.tracker.log(step, metrics)
        return metrics

    def _keep_best(self, step: int, metrics: dict[str, float]) -> int:
        """Keeps the weights if they are the best; how many evaluations in a row were not."""
        name = self.config.train.metric_for_best_model
        assert name
        if name in self.best and not is_better(name, metrics[name], self.best[name]):
            return self.misses + 1
        best = {"step": step, name: metrics[name]}
        if problem := self.output.weights(run_folder.BEST, {run_folder.BEST_METRIC: best}):
            self.tracker.say(f"{problem} It stays what it was; training goes on.")
        else:
            self.best = best
        return 0
