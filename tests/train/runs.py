"""Runs of the trainer that tests share, on the packaged model and a few of its rows."""

import json
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState

from dpo.cli import parse
from dpo.config import PACKAGE
from dpo.ranks import sum_over_ranks
from dpo.train.step import TrainStep
from dpo.train.trainer import Run, train
from tests.models import QUICKSTART_MODEL

QUIET = ["--train.report_to", "none", "--train.eval_prompts", "0", "--data.max_length", "160"]
QUIET += ["--data.max_prompt_length", "128", "--train.write_report", "false"]
QUIET += ["--reference.cache", "off"]  # one test must not find what another has computed
QUIET += ["--train.tokens_per_microbatch", "8192"]  # all in one, and without a probe


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


def first_step(folder):
    """The line of metrics.jsonl of the first training step."""
    return next(line for line in metrics(folder) if line["step"] == 1 and "train/loss" in line)


def model_folder(tmp_path, **settings):
    """The packaged model with other settings in its config."""
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, **settings)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folder)
    return folder


def adapter_folder(tmp_path):
    """An adapter whose update is not zero, as supervised fine-tuning leaves one."""
    base = transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "sft"
    model.save_pretrained(folder, save_embedding_layers=False)
    transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folder)
    return folder


def forget_accelerate():
    """Accelerate keeps its state in the class; every run of a test starts without."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(settings):
    """Trains; returns the run folder."""
    forget_accelerate()
    return train(settings)


def killed(settings, *, at):
    """Trains until step `at`, which it does not take; returns the run folder."""
    take = TrainStep.__call__

    def take_or_die(self, step):
        if step == at:
            raise KeyboardInterrupt
        take(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", take_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    return Path(settings.train.output_dir)


def started(settings):
    """A run that has not begun."""
    forget_accelerate()
    made = Run(settings)
    made.tracker.close_bar()
    return made


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


def step_gradients(settings, steps=(1, 2)):
    """{step: (gradient (parameters,), metrics)} of an adapter that is no longer zero."""
    run = started(settings)
    torch.manual_seed(5)
    for name, parameter in run.models.policy.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    gradients = []

    def keep_gradient():
        gradients.append(torch.cat([p.grad.flatten().clone() for p in run.models.trained]))
        run.optimizer.zero_grad()
        return 1.0

    run.train_step.clip, run.train_step.update = keep_gradient, lambda step: None
    results = {}
    for step in steps:
        run.train_step(step)
        results[step] = (gradients[-1], run.means.pop(partial(sum_over_ranks, run.accelerator)))
    return results


def assert_same_gradients(results, expected):
    """Of `step_gradients`: to 1e-5 of the largest entry, and the metrics."""
    for step, (gradient, values) in expected.items():
        assert gradient.abs().max() > 1e-3
        assert (results[step][0] - gradient).abs().max() <= 1e-5 * gradient.abs().max()
        assert results[step][1] == pytest.approx(values, rel=1e-5, abs=1e-6)
