"""Checks what `make article` wrote, each stage against the others."""

import json
from pathlib import Path

folder = Path("runs/article")
merge = json.loads((folder / "merged" / "merge.json").read_text())
errors = {name: error["mean"] for name, error in merge["errors_nats"].items()}
win_rate = json.loads((folder / "win_rate.json").read_text())
pairs = json.loads((folder / "held_out.json").read_text())["all"]
(task,) = json.loads((folder / "lm_eval.json").read_text())["rows"]
report = (folder / "report.html").read_text()

checks = {
    "the merge is the policy, within bfloat16's rounding": errors["dequantized"] <= 2e-3,
    "and the file is the merge": errors["read back"] <= 1.05 * errors["dequantized"] + 1e-5,
    "the 16-bit base is another model": errors["16bit"] > 3 * errors["dequantized"],
    "the policy answers at least 90 % right": win_rate["exact_match_policy"] >= 0.9,
    "the base answers at most 60 % right": win_rate["exact_match_base"] <= 0.6,
    "lm-eval counts the same, base": task["base"] == win_rate["exact_match_base"],
    "lm-eval counts the same, policy": task["policy"] == win_rate["exact_match_policy"],
    "held-out rewards rank at least 95 % right": pairs["reward_accuracy"] >= 0.95,
    "the model card says what was merged": "base" in (folder / "merged" / "README.md").read_text(),
    "the report shows the win rate": f"{win_rate['win_rate']:.1%}" in report,
}
for what, holds in checks.items():
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
raise SystemExit(0 if all(checks.values()) else 1)
