"""lm-eval, really run, on tasks that lie here."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from dpo.after import harness
from dpo.after.evaluate import EvaluateOptions, measure_win_rate
from dpo.after.finished import FinishedRun
from dpo.after.harness import LEADERBOARD, LoadedTask, TaskSetting, compare, load_tasks, run_harness
from dpo.after.judges import load_judge
from dpo.data.stream import build_stream
from dpo.errors import UserError
from tests.train.runs import config, run

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

EXAMPLE = Path(__file__).parents[2] / "docs" / "lm_eval" / "quickstart.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run that answers some questions otherwise than its base."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--data.eval_fraction", 0.34, "--train.max_steps", 10]
    flags += ["--optim.learning_rate", 3e-3, "--train.eval_max_new_tokens", 32]
    return run(config(folder, *flags, rows=48))


@pytest.fixture(scope="module")
def finished(trained):
    return FinishedRun(trained)


def write_task(folder, rows, name="mine", **changes):
    """The packaged example on other rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load(EXAMPLE.read_text()) | {"task": name} | changes
    task["dataset_kwargs"] = {"data_files": {"test": str(folder / "rows.jsonl")}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def rows_of(finished, pairs):
    """The file's rows that these pairs were made of."""
    file = Path(finished.config.data.name_or_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [rows[int(pairs.row_name(i)) - 1] for i in range(len(pairs))]


@pytest.fixture
def held_out_task(finished, tmp_path):
    write_task(tmp_path, rows_of(finished, finished.data.held_out))
    return load_tasks(["mine"], tmp_path)


def test_lm_eval_and_exact_match_agree_on_base_and_policy(finished, held_out_task, tmp_path):
    pairs = finished.data.held_out
    ours = measure_win_rate(
        finished,
        pairs,
        load_judge("exact_match"),
        EvaluateOptions(judge="exact_match"),
        tmp_path / "judged.jsonl",
    )
    theirs = run_harness(finished, held_out_task, batch_size=16)
    (row,) = theirs["rows"]
    assert row["documents"] == len(pairs) == ours["prompts"] > 10
    for side in ("base", "policy"):
        assert row[side] == pytest.approx(ours[f"exact_match_{side}"], abs=1e-12)
        assert f"|{round(row[side], 4):g}|" in theirs["tables"][side].replace(" ", "")
    assert 0 < row["base"] != row["policy"]  # it is not that nothing is ever right
    # Win, loss, tie per document is the difference of two right or wrong answers.
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    differences = np.array([2 * line["verdict"] - 1 for line in judged])
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["difference_se"] == pytest.approx(differences.std(ddof=1) / len(pairs) ** 0.5)
    assert row["is_paired"]


def generated_from(finished, tasks, monkeypatch):
    """The token ids of every prompt that lm-eval gives to the policy, without padding."""
    seen = []
    model = finished.policy.model
    generate = model.generate

    def spy(input_ids, attention_mask, **options):
        for ids, mask in zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True):
            seen.append([i for i, is_real in zip(ids, mask, strict=True) if is_real])
        assert options["eos_token_id"] == [finished.tokenizer.eos_token_id]
        return generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "generate", spy)
    harness._evaluate(finished, model, tasks[0], 4, None)
    return sorted(seen)


def test_the_model_reads_the_very_tokens_it_was_trained_on(finished, held_out_task, monkeypatch):
    prompts = sorted(list(pair.prompt_ids) for pair in finished.data.held_out)
    assert generated_from(finished, held_out_task, monkeypatch) == prompts


def test_no_bos_is_added_before_a_template_that_writes_none(finished, held_out_task, monkeypatch):
    """A tokenizer that adds BOS to plain text, as Mistral's; training did not add one either."""
    prompts = sorted(list(pair.prompt_ids) for pair in finished.data.held_out)
    bos, bos_id = finished.tokenizer.bos_token, finished.tokenizer.bos_token_id
    backend = finished.tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
    )
    try:
        assert finished.tokenizer("a")["input_ids"][0] == bos_id
        assert generated_from(finished, held_out_task, monkeypatch) == prompts
        # The negative control: as plain text the task's prompts do get it.
        plain = [replace(held_out_task[0], setting=TaskSetting(is_chat=False))]
        monkeypatch.undo()
        model, seen = finished.policy.model, []
        generate = model.generate
        monkeypatch.setattr(
            model, "generate", lambda **how: (seen.append(how["input_ids"]), generate(**how))[1]
        )
        harness._evaluate(finished, model, plain[0], 4, 4)
        assert all(bos_id in ids.tolist()[0] for ids in seen)
    finally:
        backend.post_processor = before


def test_the_tokenizer_of_the_run_is_left_as_it_was(finished, held_out_task):
    tokenizer = finished.tokenizer
    before = (tokenizer.chat_template, tokenizer.pad_token, tokenizer.padding_side)
    tokenizer.pad_token = None
    try:
        run_harness(finished, held_out_task, batch_size=8, limit=2)
        assert tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = before[1]
    assert (tokenizer.chat_template, tokenizer.pad_token, tokenizer.padding_side) == before


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_and_log_probs_are_the_same_after_lm_eval(quantization, tmp_path):
    """On a CPU that repacks 4-bit weights in evaluation, the input gradient would be cut."""
    flags = ["--data.eval_fraction", 0.5, "--model.quantization", quantization]
    one = FinishedRun(run(config(tmp_path, *flags, rows=8)))
    write_task(tmp_path, rows_of(one, one.data.held_out))
    stream = build_stream([one.data.held_out[0]])

    def measured():
        embedded = []
        hook = one.policy.model.get_input_embeddings().register_forward_hook(
            lambda *call: embedded.append(call[-1].requires_grad_()) or call[-1]
        )
        logps = one.scorer(stream)
        hook.remove()
        (gradient,) = torch.autograd.grad(logps.sum(), embedded[-1])
        return logps.detach(), gradient

    before = measured()
    run_harness(one, load_tasks(["mine"], tmp_path), batch_size=4)
    for old, new in zip(before, measured(), strict=True):
        assert torch.equal(old, new)
    assert before[1].abs().max() > 0


def results(scores, groups=None, metric="acc,none", **others):
    """What simple_evaluate returns, of tasks with these scores by document."""
    key, filter_name = metric.split(",")
    values = {
        name: {"alias": name, metric: sum(s) / len(s), f"{key}_stderr,{filter_name}": 0.3}
        for name, s in scores.items()
    }
    for name, members in (groups or {}).items():
        inside = [score for member in members for score in scores[member]]
        values[name] = {metric: sum(inside) / len(inside)}
    return {
        "results": values,
        **({"groups": {name: values[name] for name in groups}} if groups else {}),
        "group_subtasks": groups or {},
        "n-samples": {name: {"effective": len(s)} for name, s in scores.items()},
        "samples": {
            name: [{"doc_id": i, "filter": filter_name, key: x} for i, x in enumerate(s)]
            for name, s in scores.items()
        },
    } | others


def test_the_error_of_a_difference_is_paired_over_documents():
    """Differences 1, 0, 0, 1: mean 1/2, deviation with n - 1 sqrt(1/3), over sqrt(4)."""
    base, policy = results({"t": [0, 0, 1, 0]}), results({"t": [1, 0, 1, 1]})
    (row,) = compare(LoadedTask("t", TaskSetting(), []), base, policy)
    assert (row["base"], row["policy"], row["difference"]) == (0.25, 0.75, 0.5)
    assert row["difference_se"] == pytest.approx((1 / 3) ** 0.5 / 2)
    assert (row["is_paired"], row["documents"]) == (True, 4)


def test_a_metric_that_is_no_mean_over_documents_adds_both_errors():
    """A corpus metric, such as BLEU: 0.3 and 0.3 make 0.3 sqrt 2; the pairing is not pretended."""
    base, policy = results({"t": [0, 0, 1, 0]}), results({"t": [1, 0, 1, 1]})
    policy["results"]["t"]["acc,none"] = 0.7
    (row,) = compare(LoadedTask("t", TaskSetting(), []), base, policy)
    assert row["difference_se"] == pytest.approx(0.3 * 2**0.5)
    assert not row["is_paired"]
    policy["results"]["t"]["acc_stderr,none"] = "N/A"
    assert compare(LoadedTask("t", TaskSetting(), []), base, policy)[0]["difference_se"] is None


def test_a_group_is_the_mean_over_the_documents_of_its_tasks():
    groups = {"g": ["a", "b"]}
    base = results({"a": [0, 0, 0], "b": [1]}, groups)
    policy = results({"a": [1, 0, 0], "b": [1]}, groups)
    (row,) = compare(LoadedTask("g", TaskSetting(), []), base, policy)
    assert (row["base"], row["policy"], row["documents"]) == (0.25, 0.5, 4)
    assert row["difference_se"] == pytest.approx(0.25)


def test_of_a_suite_only_the_named_metric_is_shown():
    base = results({"t": [0, 1]})
    base["results"]["t"]["acc_norm,none"] = 0.5
    task = LoadedTask("t", TaskSetting(metric="acc_norm,none"), [])
    assert [row["metric"] for row in compare(task, base, base)] == ["acc_norm,none"]


def test_an_unknown_task_names_near_ones(tmp_path, monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager

    def without_defaults(**options):
        return manager(**options | {"include_defaults": False})  # 14,000 tasks take long to list

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_defaults)
    write_task(tmp_path, [{"question": "?"}], name="held_out_questions")
    with pytest.raises(UserError, match="Nearest: held_out_questions"):
        load_tasks(["held_out_question"], tmp_path)
    with pytest.raises(UserError, match="Nearest: open_llm_leaderboard"):
        load_tasks(["openllm_leaderboard"])
    with pytest.raises(UserError, match="is not a folder"):
        load_tasks(["mine"], tmp_path / "nowhere")


def test_documents_that_cannot_be_had_are_a_user_error(tmp_path):
    write_task(tmp_path, [{"question": "?"}])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"mine: its documents .* cannot be loaded .*rows\.jsonl"):
        load_tasks(["mine"], tmp_path)


def test_without_the_extra_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[eval]'")):
        load_tasks(["mine"])


def stand_in(path, name=None, **_):
    """Documents in the columns of each of the leaderboard's data sets."""
    four = ["red", "blue", "green", "white"]
    targets = {"choices": four, "labels": [1, 0, 1, 0]}
    document = {
        "allenai/ai2_arc": {
            "question": "Which?",
            "choices": {"text": four, "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        "Rowan/hellaswag": {
            "activity_label": "Painting",
            "ctx_a": "He paints it",
            "ctx_b": "and",
            "endings": four,
            "label": "1",
        },
        "cais/mmlu": {"question": "Which?", "choices": four, "answer": 2},
        "truthfulqa/truthful_qa": {
            "question": "Which?",
            "mc1_targets": targets,
            "mc2_targets": targets,
        },
        "allenai/winogrande": {
            "sentence": "She saw the _ run.",
            "option1": "cat",
            "option2": "car",
            "answer": "1",
        },
        "openai/gsm8k": {"question": "How many?", "answer": "2 and 2.\n#### 4"},
    }[path]
    rows = [{**document, "number": i} for i in range(30)]
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(rows)
            for split in ("train", "validation", "test", "dev")
        }
    )


@pytest.mark.slow
def test_the_leaderboard_runs_its_six_tasks_with_the_shots_of_the_article(finished, monkeypatch):
    """lm-eval's own task files, on stand-in documents: shots, metrics, and no chat template."""
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    tasks = load_tasks(["open_llm_leaderboard"])
    contexts, shots = [], {}
    evaluate = harness._evaluate

    def spy(*arguments):
        found = evaluate(*arguments)
        shots.update(found["n-shot"])
        contexts.extend(
            argument[0]
            for samples in found["samples"].values()
            for sample in samples
            for argument in sample["arguments"]
        )
        return found

    monkeypatch.setattr(harness, "_evaluate", spy)
    found = run_harness(finished, tasks, batch_size=8, limit=1)
    assert {row["task"]: row["metric"] for row in found["rows"]} == {
        name: setting.metric for name, setting in LEADERBOARD.items()
    }
    assert [row["documents"] for row in found["rows"]] == [1, 1, 57, 1, 1, 1]
    assert all(row["is_paired"] for row in found["rows"])
    wanted = {
        "arc_challenge": 25,
        "hellaswag": 10,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
    of_mmlu = {shots.pop(name) for name in list(shots) if name.startswith("mmlu")}
    assert (shots, of_mmlu) == (wanted, {5})
    assert contexts
    assert not any("<|im_start|>" in context for context in contexts)
