"""A run folder written by hand, file by file: what the report is read from, without a training."""

import json
import math

import numpy as np
import yaml

from dpo.evaluate.statistics import group_statistics

NUMBERS = (
    "policy_chosen_logps policy_rejected_logps ref_chosen_logps ref_rejected_logps "
    "before_chosen_logps before_rejected_logps sampled_log_ratios"
).split()
STEPS = 20
BETA = 0.5
FILES = (
    "config.yaml metrics.jsonl summary.json samples.jsonl held_out.jsonl token_rewards.json "
    "data_report.json held_out.json header.txt"
).split()


def training_line(step):
    """Figures that are different at every step, and known."""
    gap = 0.05 * (step - 1)
    return {
        "step": step,
        "train/loss": math.log1p(math.exp(-gap)),
        "train/rewards/chosen": 0.4 * gap,
        "train/rewards/rejected": -0.6 * gap,
        "train/rewards/margins": gap,
        "train/rewards/accuracies": min(1.0, 0.05 * (step - 1)),
        "train/ranking_accuracy": 0.5,
        "train/logps/chosen": -20.0 + 0.01 * step,
        "train/logps/rejected": -21.0 - 0.1 * step,
        "train/lengths/chosen": 8.0,
        "train/lengths/rejected": 7.0,
        "train/grad_norm": 1.0 + 0.125 * step,
        "train/learning_rate": 5e-5 * (1 - step / 40),
        "train/tokens_per_second": 5000.0 + step,
        "train/pairs_per_second": 90.0,
        "train/memory_gib": 0.75,
    }


def evaluation_line(step, exact_match=True):
    gap = 0.05 * step
    line = {
        "step": step,
        "eval/loss": math.log1p(math.exp(-gap)),
        "eval/rewards/chosen": 0.4 * gap,
        "eval/rewards/rejected": -0.6 * gap,
        "eval/rewards/margins": gap,
        "eval/rewards/accuracies": 0.0 if step == 0 else 0.75,
        "eval/ranking_accuracy": 0.5 + 0.01 * step,
        "eval/logps/chosen": -20.0 + 0.01 * step,
        "eval/logps/rejected": -21.0 - 0.1 * step,
        "eval/lengths/chosen": 8.0,
        "eval/lengths/rejected": 7.0,
        "eval/kl": 0.0625 * step,
        "eval/lengths/generated": 7.5,
    }
    return line | ({"eval/exact_match": 0.25 + 0.025 * min(step, 20)} if exact_match else {})


def samples(step, count, text):
    return [
        {
            "step": step,
            "index": i,
            "prompt": f"prompt {i} {text}",
            "chosen": f"right {i} {text}",
            "answer": f"answer {i} at step {step} {text}",
            "length": 5,
            "is_right": (i % 2 == 0) if step else (i % 3 == 0),
            "log_ratio": 0.1 * step,
        }
        for i in range(count)
    ]


def held_out(step, margins, lengths):
    """`margins` are those of the end, and 0 at step 0; `lengths`: chosen minus rejected."""
    count, share = len(margins), 1.0 if step else 0.0
    ref = [-20.0 - 0.1 * i for i in range(count)]
    return {
        "step": step,
        "row": [str(i) for i in range(1, count + 1)],
        "source": [""] * count,
        "prompt_lengths": [12] * count,
        "chosen_lengths": [10 + length for length in lengths],
        "rejected_lengths": [10] * count,
        "policy_chosen_logps": [r + share * m / BETA for r, m in zip(ref, margins, strict=True)],
        "policy_rejected_logps": ref,
        "ref_chosen_logps": ref,
        "ref_rejected_logps": ref,
    }


def token_rewards(text):
    answer = {"tokens": ["The", " cap", "ital", "", text, "<|im_end|>"]}
    return [
        {
            "row": "3",
            "why": "lowest margin",
            "prompt": f"Which one? {text}",
            "chosen": answer | {"rewards": [0.0, 0.25, -0.5, 0.125, 0.125, None]},
            "rejected": answer | {"rewards": [0.0, -0.25, 0.5, -0.125, -0.125, None]},
        }
    ]


def report(text):
    tally = {"count": 3, "rows": [7, 8, 11]}
    counts = {"rows_read": 50, "pairs_kept": 47, "formats": {"/home/me/a/b.jsonl": "text"}}
    own = {"rows_read": 40, "pairs_kept": 40, "formats": {}, "dropped": {}, "cut": {}, "noted": {}}
    reasons = {"dropped": {f"empty answer {text}": tally}, "cut": {}, "noted": {}}
    return {**counts, **reasons, "held_out_source": own, "pairs_held_out": 40}


def evaluated(text):
    """What dpo evaluate writes of held-out pairs, out of 40 of which 35 are ranked right."""
    ones = np.ones(40)
    columns = dict.fromkeys(NUMBERS, -ones) | {"source": np.array([text] * 40)}
    columns |= {"policy_chosen_logps": np.where(np.arange(40) < 35, 0.0, -2.0)}
    columns |= {"chosen_lengths": 5 * ones, "rejected_lengths": 7 * ones}
    figures = group_statistics(columns, beta=BETA)
    return {"rows": text, "has_reference": True, "beta": BETA, **figures}


def fake_run(
    folder,
    *,
    text="",
    steps=STEPS,
    eval_steps=10,
    beta=BETA,
    exact_match=True,
    margins=None,
    lengths=None,
):
    """Writes every file of a run; `text` is put wherever rows or a model have a say."""
    folder.mkdir(parents=True, exist_ok=True)
    margins = margins or [0.05 * (i - 10) for i in range(40)]
    lengths = lengths or [(-1) ** i for i in range(40)]
    evaluations = [evaluation_line(s, exact_match) for s in range(0, steps + 1, eval_steps)]
    config = {
        "model": {"name_or_path": f"model {text}", "dtype": "float32"},
        "data": {"name_or_path": "pairs.jsonl"},
        "loss": {"type": "sigmoid", "beta": beta, "label_smoothing": 0.0},
        "train": {"output_dir": str(folder), "eval_exact_match": exact_match},
    }
    trained = [training_line(step) for step in range(1, steps + 1)]
    lines = sorted([*evaluations, *trained], key=lambda line: line["step"])
    weights = {"run": str(folder), "weights": "final", "sha256": {"model.safetensors": "0" * 64}}
    last = evaluations[-1]["step"]
    put(folder / "config.yaml", yaml.safe_dump(config, allow_unicode=True))
    put(folder / "metrics.jsonl", jsonl(lines))
    put(folder / "summary.json", json.dumps({"before": evaluations[0], "after": evaluations[-1]}))
    put(folder / "samples.jsonl", jsonl([*samples(0, 12, text), *samples(last, 12, text)]))
    put(folder / "held_out.jsonl", jsonl([held_out(s, margins, lengths) for s in (0, last)]))
    put(folder / "token_rewards.json", json.dumps(token_rewards(text)))
    put(folder / "data_report.json", json.dumps(report(text)))
    put(folder / "held_out.json", json.dumps(weights | evaluated(text)))
    put(folder / "header.txt", f"torch 2.13 {text}\n")
    return folder


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def put(file, text):
    file.write_text(text, encoding="utf-8", errors="replace")  # half a character only in the JSON
