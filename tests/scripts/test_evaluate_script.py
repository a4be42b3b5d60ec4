"""dpo evaluate, and the whole evaluation behind it, on runs of the trainer."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.after import evaluate as evaluation
from dpo.after.evaluate import (
    EvaluateOptions,
    before_training,
    evaluate_run,
    measure_pairs,
    measure_win_rate,
)
from dpo.after.finished import FinishedRun
from dpo.after.judges import load_judge
from dpo.cli import save
from dpo.config import DataSource
from dpo.errors import UserError
from dpo.evaluate.samples import generate
from dpo.run_folder import JUDGED, MEASURED
from dpo.sealed import file_sums, seal
from tests.after.test_judges import KEY, prefers_right, server
from tests.commands import as_process, called
from tests.oracle import answer_logps
from tests.scripts.test_scripts import ultrafeedback_file
from tests.train.runs import config, metrics, rows_file, run

ROOT = Path(__file__).parents[2]
TRAINED = ["--data.eval_fraction", 0.34, "--train.max_steps", 6, "--optim.learning_rate", 3e-3]
TRAINED += ["--train.eval_max_new_tokens", 24]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return run(config(tmp_path_factory.mktemp("lora"), *TRAINED))


def report_of(folder, **options):
    """What is printed, and the files by part."""
    printed = "\n".join(evaluate_run(folder, EvaluateOptions(**options)))
    return printed, read(options.get("output") or folder)


def read(folder):
    files = {part: folder / name for part, name in MEASURED.items()}
    return {part: json.loads(f.read_text()) for part, f in files.items() if f.exists()}


@pytest.mark.parametrize("kind", ["lora", "adapter", "full", "zero", "zero and full"])
def test_changes_against_step_0_are_those_that_training_logged(kind, lora, tmp_path):
    """Whatever the reference is: step 0 is the model before training, by its own evaluation."""
    flags = {
        "lora": [],
        "adapter": ["--model.name_or_path", lora / "final"],
        "full": ["--model.adapter", "none"],
        "zero": ["--reference.mode", "zero"],
        "zero and full": ["--model.adapter", "none", "--reference.mode", "zero"],
    }[kind]
    rate = ["--optim.learning_rate", 1e-3 if "full" in kind else 3e-3]
    folder = run(config(tmp_path, *TRAINED, *flags, *rate, "--train.max_steps", 3))
    one = FinishedRun(folder)
    f = measure_pairs(one, one.data.held_out, EvaluateOptions(prompts=2))["all"]
    before, after = (line for line in metrics(folder) if "eval/loss" in line)
    for side in ("chosen", "rejected"):
        logged = after[f"eval/logps/{side}"] - before[f"eval/logps/{side}"]
        assert f[f"logp_{side}_change"] == pytest.approx(logged, abs=1e-4)
        assert logged != 0
    assert f["reward_margin"] == pytest.approx(after["eval/rewards/margins"], abs=1e-5)
    assert f["reward_accuracy"] == pytest.approx(after["eval/rewards/accuracies"])
    assert f["ranking_accuracy_before"] == pytest.approx(before["eval/ranking_accuracy"])
    assert f["ranking_accuracy"] == pytest.approx(after["eval/ranking_accuracy"])
    assert f["pairs"] == len(one.data.held_out) > 2
    assert f["kl_answers"] == 2


def test_a_run_without_a_reference_says_so(tmp_path):
    folder = run(config(tmp_path, *TRAINED, "--reference.mode", "zero", "--train.max_steps", 1))
    printed, report = report_of(folder, prompts=2)
    assert "KL to the model before training" in printed
    assert "The run had no reference" in printed
    assert report["held_out"]["has_reference"] is False


def test_kl_is_the_mean_log_ratio_of_sampled_answers(lora):
    """The same answers, sampled again and scored one by one with full logits under both models."""
    one = FinishedRun(lora)
    pairs = one.data.held_out
    f = measure_pairs(one, pairs, EvaluateOptions(prompts=len(pairs), seed=3))["all"]
    prompts = [list(pairs[i].prompt_ids) for i in range(len(pairs))]
    how = {"stop_ids": [one.tokenizer.eos_token_id], "max_new_tokens": 24}
    model = one.policy.model
    sampled = generate(model, one.tokenizer, prompts, temperature=1.0, seed=3, **how)
    log_ratios = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, sampled, strict=True):
            policy = answer_logps(model, prompt, answer).sum()
            with one.before() as base:
                log_ratios.append((policy - answer_logps(base, prompt, answer).sum()).item())
    assert f["kl"] == pytest.approx(np.mean(log_ratios), abs=1e-4)
    assert f["kl_se"] == pytest.approx(np.std(log_ratios, ddof=1) / len(pairs) ** 0.5, abs=1e-4)
    assert f["kl"] != 0
    assert before_training(one) is one.reference


def test_several_sources_are_told_apart(tmp_path):
    settings = config(tmp_path, *TRAINED, "--train.max_steps", 1)
    files = [rows_file(tmp_path, 20, "a.jsonl"), rows_file(tmp_path, 30, "b.jsonl")]
    lines = files[1].read_text().splitlines()
    files[1].write_text("\n".join(lines[20:]) + "\n")  # no prompt in both
    settings.data.name_or_path = [DataSource(path=str(file)) for file in files]
    printed, report = report_of(run(settings), prompts=2)
    groups = report["held_out"]["by_source"]
    assert list(groups) == [str(file) for file in files]
    assert sum(f["pairs"] for f in groups.values()) == report["held_out"]["all"]["pairs"]
    assert all(str(file) in printed for file in files)


def test_exact_match_and_everything_that_is_written(lora, tmp_path):
    printed, report = report_of(lora, judge="exact_match", prompts=5, output=tmp_path)
    win_rate = report["win_rate"]
    lines = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert len(lines) == win_rate["prompts"] == 5
    for side in ("base", "policy"):
        right = sum(line[side] == line["chosen"] for line in lines) / 5
        assert win_rate[f"exact_match_{side}"] == right
        assert win_rate[f"length_{side}"] == np.mean([line[f"{side}_length"] for line in lines])
    assert win_rate["win_rate"] == np.mean([line["verdict"] for line in lines])
    assert all(line["prompt"].endswith("<|im_start|>assistant\n") for line in lines)
    assert win_rate["weights"] == "final"
    assert win_rate["sha256"] == file_sums(lora / "final", "*.safetensors")
    assert win_rate["options"]["prompts"] == 5
    for said in ("reward accuracy", "KL to the reference", "by group", "answers right"):
        assert said in printed


def test_what_an_earlier_call_measured_stays_with_its_own_weights_and_options(lora, tmp_path):
    """Measured again, a part is replaced; the file of another part says what it was measured on."""
    _, first = report_of(lora, judge="exact_match", prompts=4, output=tmp_path)
    _, both = report_of(lora, prompts=2, output=tmp_path)
    assert both["win_rate"] == first["win_rate"]
    assert both["held_out"]["sha256"] == both["win_rate"]["sha256"]
    assert [both[part]["options"]["prompts"] for part in ("win_rate", "held_out")] == [4, 2]

    other = tmp_path / "other"
    shutil.copytree(lora, other)
    weights = other / "final" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    seal(other / "final")
    (tmp_path / "held_out.json").write_text("[1]")
    _, mixed = report_of(other, prompts=2, output=tmp_path)
    assert mixed["win_rate"] == first["win_rate"]
    assert mixed["held_out"]["sha256"] != mixed["win_rate"]["sha256"]


def test_a_judge_that_fails_leaves_what_another_has_judged(lora, tmp_path, monkeypatch):
    judged = tmp_path / "judged.jsonl"
    _, before = report_of(lora, judge="exact_match", prompts=2, output=tmp_path)
    lines = judged.read_text()
    (tmp_path / "broken.py").write_text("def judge(prompt, policy, base, chosen):\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="got 7"):
        report_of(lora, judge="broken:judge", prompts=2, output=tmp_path)
    assert judged.read_text() == lines
    assert read(tmp_path)["win_rate"] == before["win_rate"]


def test_a_figure_that_is_not_finite_does_not_lose_the_others(lora, tmp_path, monkeypatch):
    printed, _ = report_of(lora, prompts=2, output=tmp_path)
    assert "Not finite" not in printed
    measured = measure_pairs

    def infinite(*arguments):
        figures = measured(*arguments)
        figures["all"]["kl"] = -np.inf
        return figures

    monkeypatch.setattr(evaluation, "measure_pairs", infinite)
    printed, report = report_of(lora, prompts=2, output=tmp_path)
    assert "Not finite: 1 of them." in printed
    assert report["held_out"]["all"]["kl"] == -np.inf
    assert report["held_out"]["all"]["reward_margin"] != 0


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        ("lora", ["adapter_model.safetensors"]),
        ("none", ["model.safetensors"]),
        ("none", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    ],
)
def test_only_folders_with_trained_weights_are_offered(adapter, trained, tmp_path):
    """Not the merge of an adapter, nor an adapter beside whole models; each folder once."""
    settings = config(tmp_path, "--model.adapter", adapter, "--optim.name", "adamw")
    other = "model.safetensors" if adapter == "lora" else "adapter_model.safetensors"
    for name in [*(f"best/{file}" for file in trained), f"merged/{other}"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "final").mkdir()
    save(settings, tmp_path / "config.yaml")
    with pytest.raises(
        UserError, match=rf"merged holds no weights: wanted one of best of {tmp_path}"
    ):
        FinishedRun(tmp_path, "merged")


def test_flags_become_options_and_those_left_out_keep_their_defaults(monkeypatch, tmp_path):
    def record(folder, options):
        assert folder == tmp_path
        assert options == EvaluateOptions(prompts=7, include_path=Path("x"), lm_eval="a,b")
        return iter(["measured"])

    monkeypatch.setattr(evaluation, "evaluate_run", record)
    flags = ["--prompts", "7", "--include_path", "x", "--lm_eval", "a,b"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), *flags])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")


def test_both_sides_answer_with_the_same_luck(tmp_path, monkeypatch):
    """At temperature 1.5, before any training, from one seed: answer for answer the same."""
    folder = run(config(tmp_path, *TRAINED, "--optim.learning_rate", 1e-12, "--train.max_steps", 1))
    (tmp_path / "mine.py").write_text(
        "def same(prompt, policy, base, chosen):\n    return 0.5 if policy == base else 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    one, file = FinishedRun(folder), tmp_path / "judged.jsonl"

    def judged(seed):
        options = EvaluateOptions(judge="mine:same", temperature=1.5, top_p=0.9, seed=seed)
        measure_win_rate(one, one.data.held_out, load_judge("mine:same"), options, file)
        return [json.loads(line) for line in file.read_text().splitlines()]

    first = judged(1)
    assert {line["verdict"] for line in first} == {0.5}
    assert judged(1) == first
    assert judged(2) != first


def test_other_rows_in_another_format_and_a_run_that_held_nothing_out(tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    with pytest.raises(UserError, match=r"held nothing out.*--data_path"):
        list(evaluate_run(folder, EvaluateOptions()))
    other = ultrafeedback_file(tmp_path, 7)
    printed, report = report_of(folder, data_path=str(other), prompts=3)
    assert f"Pairs {other}: 7 of 7 rows kept; format ultrafeedback." in printed
    assert report["held_out"]["all"]["pairs"] == 7


def test_lm_eval_alone_needs_no_held_out_pairs(tmp_path):
    """As after the article's recipe, which holds nothing out."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = run(config(tmp_path, "--train.max_steps", 1, rows=16))
    task = (ROOT / "docs" / "lm_eval" / "quickstart.yaml").read_text()
    rows = rows_file(tmp_path, 4, "questions.jsonl")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "t.yaml").write_text(task.replace("dpo/quickstart/eval.jsonl", str(rows)))
    printed, report = report_of(folder, lm_eval="quickstart", include_path=tasks, limit=3)
    assert "held_out" not in report
    assert report["lm_eval"]["rows"][0]["documents"] == 3
    assert "lm-eval, policy:" in printed
    assert report["lm_eval"]["versions"]["lm_eval"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "checkpoint-7"}, "holds no weights: wanted one of final"),
        ({"judge_model": "m"}, "--judge_model: got m, which does nothing without --judge"),
        ({"judge_model": "m", "judge": "exact_match"}, "got m, but exact_match asks no server"),
        ({"temperature": 0.5}, "--temperature: got 0.5, which does nothing without --judge"),
        ({"top_p": 0.9}, "--top_p: got 0.9, which does nothing without --judge"),
        ({"limit": 3}, "--limit: got 3, which does nothing without --lm_eval"),
        ({"include_path": Path(".")}, "--include_path: got ., which does nothing without --lm"),
        ({"include_path": Path("no/such"), "lm_eval": "t"}, "no/such is not a folder"),
        ({"data_format": "orca"}, "--data_format: got orca, which does nothing without --data_p"),
        ({"output": Path("/proc")}, "--output: /proc/held_out.json cannot be written"),
        ({"prompts": 0}, "--prompts: got 0"),
        ({"top_p": 0.0}, "--top_p: got 0"),
        ({"temperature": -1.0}, "--temperature: got -1"),
        ({"judge": "exact"}, "wanted exact_match"),
        ({"data_path": "no/such.jsonl"}, "no/such.jsonl does not exist"),
        ({"output": Path("no/such")}, "--output: no/such/held_out.json cannot be written"),
    ],
)
def test_what_cannot_be_honoured_is_a_user_error(lora, options, said, monkeypatch):
    monkeypatch.setattr(evaluation, "measure_pairs", None)  # refused before anything is measured
    with pytest.raises(UserError) as error:
        list(evaluate_run(lora, EvaluateOptions(**options)))
    assert said in str(error.value)


@pytest.mark.slow
def test_from_the_command_line_with_a_judge_behind_a_url(lora, tmp_path):
    with server(prefers_right) as (url, requests):
        judge = ["--judge", url, "--judge_model", "judge-1", "--prompts", 4, "--output", tmp_path]
        code, out, err = as_process("evaluate.py", lora, *judge, OPENAI_API_KEY=KEY)
        assert code == 0, err
        assert len(requests) == 8
    assert f"4 prompts, judge {url}" in out
    assert "Warning" not in err
    written = "".join((tmp_path / name).read_text() for name in ("win_rate.json", JUDGED))
    assert KEY not in out + err + written
    assert read(tmp_path)["win_rate"]["unreadable_verdicts"] == 0

    code, out, err = called("evaluate.py", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "holds no finished run" in err
    assert "Traceback" not in err
