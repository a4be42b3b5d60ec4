"""Evaluation and generation: what is measured, on which answers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.order import spread
from dpo.errors import UserError
from dpo.evaluate.samples import generate
from dpo.model.reference import adapter_off
from dpo.train.trainer import Run
from tests.models import QUICKSTART_MODEL
from tests.oracle import answer_logps
from tests.train.runs import config, forget_accelerate, metrics, run


@pytest.fixture(scope="module")
def packaged():
    folder = QUICKSTART_MODEL
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


PROMPTS = [
    "<|im_start|>user\nWhich number is larger, 7 or 9?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
]


def test_batched_greedy_answers_equal_those_of_single_prompts(packaged):
    model, tokenizer = packaged
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    stops = [tokenizer.eos_token_id]
    both = generate(model, tokenizer, ids, stop_ids=stops, max_new_tokens=12)
    for prompt, answer in zip(ids, both, strict=True):
        (alone,) = generate(model, tokenizer, [prompt], stop_ids=stops, max_new_tokens=12)
        assert answer == alone
        assert tokenizer.eos_token_id not in answer[:-1]


def test_sampling_is_a_function_of_the_seed(packaged):
    model, tokenizer = packaged
    ids = [tokenizer(PROMPTS[1])["input_ids"]] * 4
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 12, "temperature": 1.5}
    first, again, other = (
        generate(model, tokenizer, ids, seed=range(start, start + 4), **options)
        for start in (1, 1, 5)
    )
    assert first == again
    assert first != other


def test_an_answer_that_does_not_stop_is_cut_at_max_new_tokens(packaged):
    model, tokenizer = packaged
    ids = [tokenizer(PROMPTS[0])["input_ids"]]
    (answer,) = generate(model, tokenizer, ids, stop_ids=[tokenizer.eos_token_id], max_new_tokens=2)
    assert len(answer) == 2


def test_kl_is_the_mean_log_ratio_of_sampled_answers(tmp_path):
    """The same sampled answers, scored one by one with full logits under both models."""
    flags = [
        "--data.eval_fraction",
        0.3,
        "--train.eval_prompts",
        3,
        "--train.eval_max_new_tokens",
        9,
    ]
    forget_accelerate()
    one = Run(config(tmp_path, *flags))
    torch.manual_seed(0)
    for name, parameter in one.models.policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    evaluation = one.evaluator.evaluate()
    assert evaluation
    measured, samples = evaluation.metrics, evaluation.samples

    pairs = [one.data.held_out[sample["index"]] for sample in samples]
    prompts = [list(pair.prompt_ids) for pair in pairs]
    sampled = generate(
        one.models.policy.model,
        one.tokenizer,
        prompts,
        stop_ids=[one.tokenizer.eos_token_id],
        max_new_tokens=9,
        temperature=1.0,
        seed=one.config.train.seed,
    )
    log_ratios = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, sampled, strict=True):
            policy = answer_logps(one.models.policy.model, prompt, answer).sum()
            with adapter_off(one.models.policy):
                reference = answer_logps(one.models.policy.model, prompt, answer).sum()
            log_ratios.append((policy - reference).item())
    assert measured["eval/kl"] == pytest.approx(sum(log_ratios) / 3, abs=1e-4)
    assert measured["eval/kl"] != 0
    one.tracker.close_bar()


def test_exact_match_compares_the_greedy_answer_with_the_chosen_one(tmp_path):
    flags = ["--data.eval_fraction", 0.4, "--train.eval_prompts", 9, "--train.max_steps", 1]
    flags += ["--train.eval_max_new_tokens", 24, "--train.eval_exact_match", "true"]
    folder = run(config(tmp_path, *flags))
    import json

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    at_start = [sample for sample in samples if sample["step"] == 0]
    right = [sample["answer"] == sample["chosen"] for sample in at_start]
    assert metrics(folder)[0]["eval/exact_match"] == pytest.approx(sum(right) / len(right))
    assert [sample["is_right"] for sample in at_start] == right


def test_prompts_are_spread_over_the_whole_file():
    assert spread(100, 5).tolist() == [0, 25, 50, 74, 99]
    assert spread(3, 5).tolist() == [0, 1, 2]


def test_a_run_without_a_reference_has_no_kl(tmp_path):
    """log pi alone is no distance; lengths of the answers are measured all the same."""
    flags = ["--data.eval_fraction", 0.3, "--train.eval_prompts", 3, "--reference.mode", "zero"]
    folder = run(config(tmp_path, *flags, "--train.max_steps", 1, "--train.eval_max_new_tokens", 4))
    evaluations = [line for line in metrics(folder) if "eval/loss" in line]
    assert len(evaluations) == 2
    for line in evaluations:
        assert "eval/kl" not in line
        assert line["eval/lengths/generated"] > 0


def test_kl_cannot_choose_the_best_weights_of_a_run_without_a_reference(tmp_path):
    flags = ["--data.eval_fraction", 0.3, "--train.eval_prompts", 3, "--reference.mode", "zero"]
    with pytest.raises(UserError, match=r"reference\.mode"):
        config(tmp_path, *flags, "--train.metric_for_best_model", "eval/kl")
