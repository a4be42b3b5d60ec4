"""Finished runs made by hand: the packaged model, with an adapter that has an effect."""

import json
from dataclasses import asdict

import torch
import yaml

from dpo.cli import parse
from dpo.model.load import load_policy
from dpo.model.named import load_tokenizer
from dpo.train.checkpoint import save_weights
from tests.train.runs import QUIET, rows_file

BEFORE = {"step": 0, "eval/loss": 0.6931, "eval/rewards/margins": 0.0}
AFTER = {"step": 3, "eval/loss": 0.5, "eval/rewards/margins": 0.75}


def made_run(folder, *flags, std=0.3, rows=24, weights="final"):
    """`folder`/run, as a trainer leaves it. `std` of lora_B decides how much it has learned."""
    data = rows_file(folder, rows)
    where = ["--data.name_or_path", str(data), "--train.output_dir", str(folder / "run")]
    held_out = ["--data.eval_fraction", "0.5", "--train.gradient_checkpointing", "false"]
    settings = parse([*where, *QUIET, *held_out, *map(str, flags)])
    policy = load_policy(settings, "cpu")
    torch.manual_seed(3)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or settings.model.adapter == "none"):
            parameter.data += torch.randn_like(parameter) * std
    run = folder / "run"
    save_weights(policy.model, run / weights)
    load_tokenizer(settings.model).save_pretrained(run / weights)
    (run / "final").mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (BEFORE, AFTER)))
    (run / "summary.json").write_text(json.dumps({"before": BEFORE, "after": AFTER}))
    report = {"rows_read": rows, "pairs_kept": rows - 1, "pairs_held_out": rows // 2, "cut": {}}
    report["dropped"] = {"identical answers": {"count": 1, "rows": ["7"]}}
    (run / "data_report.json").write_text(json.dumps(report))
    samples = [
        {"step": step, "index": 0, "prompt": "<|im_start|>user\nWhich?", "answer": answer}
        for step, answer in ((0, "The worse: one"), (3, "The better\none"))
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return run
