"""A run that evaluates, generates, keeps the best weights and saves; and what it must end as."""

import json

from tests.train.runs import config, run, training

FLAGS = "--model.quantization nf4 --lora.dropout 0.2 --train.max_steps 5 --data.eval_fraction 0.3"
FLAGS += " --train.eval_steps 2 --train.eval_prompts 2 --train.eval_max_new_tokens 4"
FLAGS += " --train.metric_for_best_model eval/loss --train.save_steps 3 --reference.cache auto"
FLAGS += " --train.per_device_train_batch_size 8 --train.logging_steps 2"


def settings(folder, *flags, name="run"):
    """The configuration; its rows and caches are in `folder`, its run in `folder`/`name`."""
    return config(folder, *FLAGS.split(), "--train.output_dir", folder / name, *flags)


def straight_run(folder):
    """A run that nothing happens to."""
    return run(settings(folder, name="straight"))


def outcome(folder):
    """What the run computed: weights, best weights, log and answers."""
    return {
        "final": (folder / "final" / "adapter_model.safetensors").read_bytes(),
        "best": (folder / "best" / "adapter_model.safetensors").read_bytes(),
        "best metric": json.loads((folder / "best" / "metric.json").read_text()),
        "log": training(folder),
        "samples": (folder / "samples.jsonl").read_text(),
        "held out": (folder / "held_out.jsonl").read_text(),
        "summary": json.loads((folder / "summary.json").read_text()),
    }
