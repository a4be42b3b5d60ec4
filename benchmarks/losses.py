"""Every loss on the quickstart, from the command line: what it learns in 100 steps, at what cost.

    python benchmarks/losses.py --output benchmarks/results/losses.md

One run each, with a setting that suits it; the seconds of a step are of one machine and one run,
and say little. Right answers are greedy answers to held-out prompts that equal the chosen one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from dpo.config import PACKAGE

# Beta, options, and other flags; the quickstart's learning rate is 1e-3.
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.3},
    "ipo": {"beta": 0.3},
    "hinge": {"beta": 0.3},
    "robust": {"beta": 0.3, "label_smoothing": 0.1},
    "exo_pair": {"beta": 0.3, "label_smoothing": 0.01},
    "discopop": {"beta": 0.3},
    "focal": {"beta": 0.3},
    "r_dpo": {"beta": 0.3},
    "nca_pair": {"beta": 0.3},
    "sppo_hard": {"beta": 0.1},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "cal_dpo": {"beta": 0.1, "options": {"weight": 0.1}},
    "dpop": {"beta": 0.3, "options": {"penalty": 5.0}},
    "dpo_shift": {"beta": 0.3},
    "chipo": {"beta": 0.1, "options": {"reward_bound": 5.0}},
    "sigmoid_norm": {"beta": 2.0},
    "simpo": {"beta": 2.0},
    "alphapo": {"beta": 2.0},
    "simper": {"beta": 1.0},
    "orpo": {"beta": 0.3},
    "cpo": {"beta": 0.3},
    "slic": {"beta": 0.3},
    "sft": {"beta": 0.3},
    "odpo": {"beta": 0.3, "options": {"alpha": 0.5}},
    "rpo_sq": {"beta": 0.3},
    "rpo_bwd_kl": {"beta": 0.3},
    "rpo_fwd_kl": {"beta": 0.3},
    "wpo": {"beta": 0.3},
    "mallows": {"beta": 0.3, "options": {"phi": 0.5}},
    "tdpo1": {"beta": 0.3},
    "tdpo2": {"beta": 0.3},
    "ld_dpo": {"beta": 0.3},
    "aot": {"beta": 0.3},
    "aot_unpaired": {"beta": 0.3},
    "kto_pair": {"beta": 0.3},
    "dr_dpo": {"beta": 0.3},
    "beta_dpo": {"beta": 0.3, "options": {"alpha": 0.1}},
    "bco_pair": {"beta": 0.3},
    "alpha_dpo": {"beta": 2.0},
}
SCORES = {"chosen_score": 4.0, "rejected_score": 0.0}  # the right answer's, and the wrong one's
HEAD = "loss|settings|right answers|reward accuracy|loss at the end|KL|tokens an answer|s a step"


def scored(part: str, folder: Path) -> Path:
    """The quickstart's rows with scores."""
    lines = (PACKAGE / "quickstart" / f"{part}.jsonl").read_text().splitlines()
    file = folder / f"{part}.jsonl"
    file.write_text("".join(json.dumps(json.loads(line) | SCORES) + "\n" for line in lines))
    return file


def trained(name: str, settings: dict[str, Any], steps: int, folder: Path) -> list[str]:
    """The row of one loss; an error is its last cell."""
    flags = {f"--loss.{key}": value for key, value in settings.items()}
    flags |= {"--config": PACKAGE / "quickstart" / "config.yaml"}
    flags |= {"--loss.type": name, "--train.max_steps": steps, "--train.eval_steps": steps}
    flags |= {"--train.output_dir": folder / name, "--train.write_report": "false"}
    if name in ("odpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"):
        flags |= {"--data.name_or_path": scored("train", folder)}
        flags |= {"--data.eval_path": scored("eval", folder)}
    words = [word for flag, value in flags.items() for word in (flag, str(value))]
    command = [sys.executable, "-m", "dpo", "train", *words, "--train.report_to", "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    shown = {key: value for key, value in settings.items() if key != "options"}
    shown |= settings.get("options", {})
    said = ", ".join(f"{key} {value}" for key, value in shown.items())
    if done.returncode:
        return [name, said, *[""] * 5, done.stderr.strip().splitlines()[-1][:200]]
    lines = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if "eval/loss" in line)
    seconds = sorted(16 / x["train/pairs_per_second"] for x in lines if "train/loss" in x)
    return [
        name,
        said,
        f"{first['eval/exact_match']:.1%} to {last['eval/exact_match']:.1%}",
        f"{last['eval/rewards/accuracies']:.1%}",
        f"{last['eval/loss']:.3f}",
        f"{last['eval/kl']:.2f}" if "eval/kl" in last else "-",
        f"{first['eval/lengths/generated']:.1f} to {last['eval/lengths/generated']:.1f}",
        f"{seconds[len(seconds) // 2]:.2f}",
    ]


def main() -> None:
    """Trains them one after another, and writes the table."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--only", nargs="*", default=list(SETTINGS))
    flags.add_argument("--output", type=Path)
    args = flags.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            rows.append(trained(name, SETTINGS[name], args.steps, Path(folder)))
            print(" | ".join(rows[-1]), flush=True)
    title = f"# Every loss on the quickstart, {args.steps} steps of 16 pairs\n\n"
    report = title + common.table(HEAD.split("|"), rows)
    common.publish(report, args.output)


if __name__ == "__main__":
    main()
