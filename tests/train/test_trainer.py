"""The loop: what it logs, evaluates, keeps and writes."""

import json
import math

import pytest
import torch

from dpo.cli import parse
from dpo.data.stream import build_stream
from dpo.errors import UserError
from dpo.model.load import load_policy
from dpo.model.named import load_tokenizer
from dpo.model.reference import AdapterOff
from dpo.model.scorer import Scorer
from tests.commands import as_two_processes, called
from tests.train.runs import (
    QUIET,
    config,
    first_step,
    metrics,
    model_folder,
    rows_file,
    run,
    started,
    training,
)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_evaluate_and_report_as_one(tmp_path):
    """Five held-out pairs, three on one rank and two on the other: every figure, answer, token."""
    held_out = rows_file(tmp_path, 5, "held_out.jsonl")
    flags = ["--data.name_or_path", rows_file(tmp_path, 24), "--data.eval_path", held_out]
    flags += [*QUIET, "--train.eval_prompts", 5, "--train.eval_max_new_tokens", 9]
    flags += ["--train.eval_exact_match", "true", "--train.max_steps", 2, "--lora.dropout", 0]
    flags += ["--train.write_report", "true", "--train.save_steps", 1]
    size = "--train.per_device_train_batch_size"
    one = [*map(str, flags), "--train.output_dir", str(tmp_path / "one"), size, "16"]
    two = [*map(str, flags), "--train.output_dir", str(tmp_path / "two"), size, "8"]
    run(parse(one))
    as_two_processes("scripts/train.py", *two)

    folders = tmp_path / "one", tmp_path / "two"
    first, second = ([line for line in metrics(f) if "eval/loss" in line] for f in folders)
    assert [line["step"] for line in first] == [line["step"] for line in second] == [0, 2]
    for mine, theirs in zip(first, second, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert first[0] != pytest.approx(first[1], abs=1e-5)  # that could fail
    for name in ("held_out.jsonl", "samples.jsonl"):
        lines, others = (
            [json.loads(x) for x in (f / name).read_text().splitlines()] for f in folders
        )
        for mine, theirs in zip(lines, others, strict=True):
            for key, value in mine.items():
                numbers = key.endswith(("logps", "ratio"))
                assert (pytest.approx(value, abs=1e-4) if numbers else value) == theirs[key], key
    rewards, others = (json.loads((f / "token_rewards.json").read_text()) for f in folders)
    for mine, theirs in zip(rewards, others, strict=True):
        assert mine["row"] == theirs["row"]
        assert mine["chosen"]["rewards"] == pytest.approx(theirs["chosen"]["rewards"], abs=1e-5)
    assert all((folder / "report.html").exists() for folder in folders)


def test_metrics_of_five_held_out_pairs_do_not_depend_on_the_micro_batches(tmp_path):
    results = []
    for budget in (1, 300, 100_000):
        settings = config(
            tmp_path,
            *("--train.tokens_per_microbatch", budget, "--train.max_steps", 2),
            *(
                "--data.eval_path",
                tmp_path / "rows.jsonl",
                "--train.output_dir",
                tmp_path / str(budget),
            ),
            rows=5,
        )
        results.append([m for m in training(run(settings)) if "eval/loss" in m][-1])
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5, abs=1e-6)
    assert results[0]["eval/rewards/accuracies"] in {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}


def test_the_best_weights_are_kept_by_the_chosen_metric(tmp_path):
    flags = ["--data.eval_fraction", 0.3, "--train.eval_steps", 1, "--train.max_steps", 3]
    folder = run(config(tmp_path, *flags, "--train.metric_for_best_model", "eval/loss"))
    losses = {m["step"]: m["eval/loss"] for m in metrics(folder) if "eval/loss" in m and m["step"]}
    best = json.loads((folder / "best" / "metric.json").read_text())
    assert best == {"step": min(losses, key=losses.get), "eval/loss": min(losses.values())}
    assert (folder / "best" / "adapter_model.safetensors").exists()


def test_the_first_step_is_logged_alone_and_then_every_logging_steps(tmp_path):
    flags = ["--train.logging_steps", 3, "--train.max_steps", 7]
    logged = [m["step"] for m in metrics(run(config(tmp_path, *flags))) if "train/loss" in m]
    assert logged == [1, 3, 6, 7]


def test_epochs_end_with_a_short_step(tmp_path):
    """24 pairs in steps of 16: two steps an epoch, two epochs."""
    flags = ["--train.max_steps", -1, "--train.num_train_epochs", 2]
    assert metrics(run(config(tmp_path, *flags)))[-1]["step"] == 4


def test_the_run_folder_holds_what_the_contract_names(tmp_path):
    flags = ["--data.eval_fraction", 0.3, "--train.report_to", "tensorboard"]
    folder = run(config(tmp_path, *flags, "--train.eval_prompts", 2, "--train.save_steps", 3))
    for name in ("config.yaml", "data_report.json", "metrics.jsonl", "summary.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "final" / "adapter_config.json").exists()
    assert (folder / "final" / "tokenizer.json").exists()
    assert (folder / "checkpoint-3").is_dir()
    assert list(folder.rglob("events.out.tfevents*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["eval/loss"] == pytest.approx(math.log(2), abs=2e-4)
    assert summary["before"]["eval/kl"] == 0
    assert summary["after"]["eval/loss"] < summary["before"]["eval/loss"]
    report = json.loads((folder / "data_report.json").read_text())
    assert report["rows_read"] == report["pairs_kept"] == 24
    train, evaluation = metrics(folder)[1], metrics(folder)[0]
    for name in (
        "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen "
        "logps/rejected lengths/chosen lengths/rejected"
    ).split():
        assert math.isfinite(train[f"train/{name}"])
        assert math.isfinite(evaluation[f"eval/{name}"])
    for name in "grad_norm learning_rate tokens_per_second pairs_per_second memory_gib".split():
        assert math.isfinite(train[f"train/{name}"])


def test_rows_that_are_refused_are_named_in_a_file_and_the_folder_can_be_used(tmp_path):
    """A file of an old run stays what it is."""
    same = ["--data.name_or_path", tmp_path / "same.jsonl"]
    rows = [
        {"system": "", "question": "a", "chosen": "b", "rejected": "b" if i > 2 else "c"}
        for i in range(9)
    ]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = r"6 of the first 9 rows .*: identical answers.*run/data_report.json names"
    with pytest.raises(UserError, match=said):
        run(config(tmp_path, *same))
    refused = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert refused["dropped"]["identical answers"]["rows"] == [4, 5, 6, 7, 8, 9]

    folder = run(config(tmp_path, "--train.max_steps", 1))
    kept = (folder / "data_report.json").read_text()
    with pytest.raises(UserError, match="identical answers"):
        run(config(tmp_path, *same, "--train.resume", "never"))
    assert (folder / "data_report.json").read_text() == kept


def test_a_reference_of_zero_leaves_the_policy_log_probs_as_rewards(tmp_path):
    folder = run(config(tmp_path, "--reference.mode", "zero", "--train.max_steps", 1))
    first = first_step(folder)
    assert first["train/rewards/chosen"] == pytest.approx(0.1 * first["train/logps/chosen"])


def test_training_without_held_out_rows_is_allowed_and_said(tmp_path, capsys):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    assert "nothing is held out" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text()) == {"before": {}, "after": {}}


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"train.report_to: got 'wandbb'.*tensorboard"):
        run(config(tmp_path, "--train.report_to", "wandbb"))


def test_the_reference_pass_leaves_the_adapter_on_and_trainable(tmp_path):
    settings = config(tmp_path)
    policy = load_policy(settings, "cpu")
    scorer = Scorer(policy.model)
    stream = build_stream([([5, 6], [7, 8], [9, 10])])
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with_adapter = scorer(stream).detach()
    without = AdapterOff(scorer, policy)(stream)
    assert not torch.equal(with_adapter, without)
    assert torch.equal(scorer(stream).detach(), with_adapter)
    assert any(p.requires_grad for p in policy.model.parameters())
    assert load_tokenizer(settings.model).chat_template


def test_falling_chosen_log_probs_are_warned_of_once(tmp_path, capsys):
    flags = ["--data.eval_fraction", 0.3, "--train.eval_steps", 1, "--train.max_steps", 4]
    folder = run(config(tmp_path, *flags, "--optim.learning_rate", 0.05))
    chosen = [line["eval/logps/chosen"] for line in metrics(folder) if "eval/loss" in line]
    assert min(chosen[1:]) < chosen[0]
    assert capsys.readouterr().err.count("chosen answers have lost") == 1


def test_the_header_says_what_the_command_line_chose_by_itself(tmp_path, capsys):
    settings = config(tmp_path, "--model.name_or_path", model_folder(tmp_path))
    assert "note: loss.* and optim.* start from the article's values" in about(settings, capsys)
    assert "the article's" not in about(config(tmp_path, "--train.resume", "never"), capsys)


def test_the_header_says_how_long_a_warm_up_by_ratio_is(tmp_path, capsys):
    """A third of 3 steps, rounded up."""
    said = about(config(tmp_path, "--optim.warmup_ratio", 0.33), capsys)
    assert "note: optim.warmup_ratio: a warm-up of 1 steps, not of warmup_steps" in said


def about(settings, capsys):
    capsys.readouterr()
    started(settings)
    return capsys.readouterr().err


def test_the_header_says_which_format_was_recognised(tmp_path, capsys):
    run(config(tmp_path, "--train.max_steps", 1))
    assert "24 of 24 rows kept; format orca_dpo_pairs" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_fails_no_run_and_is_told_in_one_line(
    tmp_path, monkeypatch, capsys
):
    def broken(chart, id):
        raise RuntimeError("no font\nof that name")

    with monkeypatch.context() as patched:
        patched.setattr("dpo.report.page.draw", broken)
        folder = run(config(tmp_path, "--train.write_report", "true"))
    assert (folder / "final" / "adapter_model.safetensors").exists()
    assert (folder / "summary.json").exists()
    assert capsys.readouterr().err.endswith(
        "The report could not be written (RuntimeError: no font of that name). The run is "
        f"complete; dpo report {folder} writes it later.\n"
    )
    code, out, err = called("report.py", folder)
    assert (code, err) == (0, "")
    assert out == f"The report is in {folder / 'report.html'}\n"


def test_a_run_ends_with_a_report_and_the_files_it_is_drawn_from(tmp_path):
    """held_out.jsonl has a line an evaluation; its log-probs give the figures of metrics.jsonl."""
    flags = ["--data.eval_fraction", 0.4, "--train.write_report", "true"]
    folder = run(config(tmp_path, *flags))
    before, after = (line for line in metrics(folder) if "eval/loss" in line)
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3]
    assert lines[0]["policy_chosen_logps"] == lines[0]["ref_chosen_logps"]
    for line, evaluation in zip(lines, (before, after), strict=True):
        mean = sum(line["policy_chosen_logps"]) / len(line["row"])
        assert mean == pytest.approx(evaluation["eval/logps/chosen"], rel=1e-6)
    tokens = json.loads((folder / "token_rewards.json").read_text())
    row = tokens[-1]
    at = lines[-1]["row"].index(row["row"])
    log_ratio = lines[-1]["policy_chosen_logps"][at] - lines[-1]["ref_chosen_logps"][at]
    assert sum(row["chosen"]["rewards"]) == pytest.approx(0.1 * log_ratio, abs=1e-5)
    report = (folder / "report.html").read_text()
    assert f"{after['eval/loss']:.4f}" in report
    assert (folder / "header.txt").read_text().splitlines()[0] in report
