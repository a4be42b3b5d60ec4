"""What the report's first sentence says of runs that are unlike the usual."""

import json

import yaml

from dpo.report.digest import verdict
from dpo.report.logs import read_logs
from tests.report.fake_run import fake_run


def test_a_run_without_a_reference_is_judged_by_its_own_log_probs(tmp_path):
    """Its reward accuracy is a ranking accuracy, and was low before training: no opposite."""
    folder = fake_run(tmp_path / "run", exact_match=False)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["reference"] = {"mode": "zero"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval/loss" in line:
            line["eval/ranking_accuracy"] = 0.125 if line["step"] == 0 else 0.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = verdict(read_logs(folder))
    assert "without a reference" in said
    assert "25.0%" in said
    assert "12.5% before training" in said
