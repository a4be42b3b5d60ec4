"""Checks what `make train` wrote against what the README promises of the quickstart."""

import json
from pathlib import Path

from safetensors.torch import load_file

folder = Path("runs/quickstart")
summary = json.loads((folder / "summary.json").read_text())
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
report = json.loads((folder / "data_report.json").read_text())
first = next(line for line in lines if "train/loss" in line)
before, after = summary["before"], summary["after"]

checks = {
    "the first loss is ln 2": abs(first["train/loss"] - 0.6931) <= 2e-4,
    "the base answers at most 60 % right": before["eval/exact_match"] <= 0.6,
    "the policy answers at least 90 % right": after["eval/exact_match"] >= 0.9,
    "answers are not longer": after["eval/lengths/generated"]
    <= 1.05 * before["eval/lengths/generated"],
    "rewards are 0 before": before["eval/rewards/margins"] == 0,
    "every row is accounted for": report["rows_read"]
    == report["pairs_kept"] + sum(tally["count"] for tally in report["dropped"].values()),
    "the adapter was written": bool(load_file(folder / "final" / "adapter_model.safetensors")),
    "TensorBoard has events": bool(list(folder.rglob("events.out.tfevents*"))),
}
for what, holds in checks.items():
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
raise SystemExit(0 if all(checks.values()) else 1)
