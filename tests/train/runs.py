"""Runs of the trainer that tests share, on the packaged model and a few of its rows."""

import json
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from dpo.cli import parse
from dpo.config import PACKAGE
from dpo.train.trainer import Run, train

QUIET = ["--train.report_to", "none", "--train.eval_prompts", "0", "--data.max_length", "160"]
QUIET += ["--data.max_prompt_length", "128", "--train.write_report", "false"]
QUIET += ["--reference.cache", "off"]  # one test must not find what another has computed


def rows_file(folder, count, name="rows.jsonl"):
    """The first rows of the packaged training set."""
    lines = (PACKAGE / "quickstart" / "train.jsonl").read_text().splitlines()[:count]
    file = Path(folder) / name
    file.write_text("\n".join(lines) + "\n")
    return file


def config(folder, *flags, rows=24):
    """A small configuration that writes to `folder`/run; later flags win."""
    data = rows_file(folder, rows)
    where = ["--data.name_or_path", str(data), "--train.output_dir", str(Path(folder) / "run")]
    base = ["--train.max_steps", "3", "--optim.warmup_steps", "0", "--train.resume", "auto"]
    base += ["--lora.dropout", "0", "--loss.beta", "0.1", "--train.save_steps", "0"]
    return parse([*where, *QUIET, *base, *map(str, flags)])


def forget_accelerate():
    """Accelerate keeps its state in the class; every run of a test starts without."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(settings):
    """Trains; returns the run folder."""
    forget_accelerate()
    return train(settings)


def metrics(folder):
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def training(folder):
    """What a run computed, step by step: without what its clock and its memory say."""
    measured = ("tokens_per_second", "pairs_per_second", "model_tflops", "mfu", "memory", "time/")
    measured = tuple(f"train/{name}" for name in measured)
    return [
        {key: value for key, value in line.items() if not key.startswith(measured)}
        for line in metrics(folder)
    ]


class GradientRun(Run):
    """A run whose steps keep their gradient instead of updating."""

    def _update(self, step, losses_seen):
        self.losses = sorted(
            (index, float(loss))
            for indices, losses in losses_seen
            for index, loss in zip(indices, losses, strict=True)
        )
        self.gradient = torch.cat(
            [p.grad.flatten().clone() for p in self.policy.model.parameters() if p.requires_grad]
        )
        self.optimizer.zero_grad()


def step_gradients(settings, steps=(1, 2)):
    """{step: (gradient (parameters,), metrics)} of an adapter that is no longer zero."""
    forget_accelerate()
    run = GradientRun(settings)
    torch.manual_seed(5)
    for name, parameter in run.policy.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    results = {}
    for step in steps:
        run.train_step(step)
        results[step] = (run.gradient, run.means.pop(run._sum_over_ranks))
    run.tracker.close_bar()
    return results
