"""Scripts and recipes as a user runs them."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import transformers

from dpo.cli import parse
from dpo.data.stream import build_stream
from dpo.logps import pair_logps
from dpo.losses import sigmoid
from dpo.model.scorer import Scorer
from tests.commands import as_process, called
from tests.models import QUICKSTART_MODEL
from tests.train.runs import QUIET, metrics, rows_file, run

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))


def ultrafeedback_file(folder, count):
    """Packaged rows in UltraFeedback's columns."""
    rows = []
    for line in rows_file(folder, count, "orca.jsonl").read_text().splitlines():
        row = json.loads(line)
        user = {"role": "user", "content": row["question"]}
        sides = {
            name: [user, {"role": "assistant", "content": row[name]}]
            for name in ("chosen", "rejected")
        }
        rows.append({"prompt": row["question"], "prompt_id": "x", **sides, "score_chosen": 8.0})
    file = folder / "ultrafeedback.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names == {"neuralhermes", "zephyr", "simpo", "tulu3", "rpo"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_two_steps_with_nf4_and_paged_adamw(recipe, tmp_path):
    """The recipe's own keys but for model, data, place and length."""
    is_ultrafeedback = "ultrafeedback" in recipe.read_text()
    data = ultrafeedback_file(tmp_path, 40) if is_ultrafeedback else rows_file(tmp_path, 40)
    in_full = "adapter: none" in recipe.read_text()
    quantization = "none" if in_full else "nf4"
    flags = ["--model.name_or_path", "quickstart/model", "--model.quantization", quantization]
    flags += ["--data.name_or_path", data, "--data.split", "train", "--data.eval_split", "train"]
    flags += ["--train.output_dir", tmp_path / "run", "--train.max_steps", 2]
    settings = parse(["--config", str(recipe), *map(str, flags)])
    if settings.data.eval_path:
        settings.data.eval_path = str(data)
        settings.train.eval_prompts, settings.train.eval_max_new_tokens = 4, 8
    assert settings.optim.name == "paged_adamw_32bit"
    folder = run(settings)
    lines = [line for line in metrics(folder) if "train/loss" in line]
    if recipe.stem in ("neuralhermes", "zephyr", "tulu3"):
        assert lines[0]["train/loss"] == pytest.approx(0.6931, abs=2e-4)
    assert lines[-1]["step"] == 2
    named = "ultrafeedback" if is_ultrafeedback else "orca_dpo_pairs"
    report = json.loads((folder / "data_report.json").read_text())
    assert named in str(report["formats"])  # recognised: a recipe takes rows of any shape
    weights = "model.safetensors" if in_full else "adapter_model.safetensors"
    assert (folder / "final" / weights).exists()


def test_the_article_recipe_is_the_dataclass_defaults():
    """Every key of the article's recipe equals the default; so the defaults are the article's."""
    from dataclasses import asdict

    from dpo.config import Config

    recipe = asdict(parse(["--config", str(ROOT / "scripts" / "configs" / "neuralhermes.yaml")]))
    default = asdict(Config())
    recipe["train"]["output_dir"] = default["train"]["output_dir"]
    assert sorted(recipe["lora"].pop("target_modules")) == sorted(
        f"{name}_proj" for name in ("k", "gate", "v", "up", "q", "o", "down")
    )
    default["lora"].pop("target_modules")  # all-linear: the same layers of a Mistral
    assert recipe == default


@pytest.mark.slow
def test_train_and_generate_from_the_command_line(tmp_path):
    data = rows_file(tmp_path, 20)
    where = ["--data.name_or_path", data, "--train.output_dir", tmp_path / "run"]
    code, out, err = as_process("train.py", *where, *QUIET, "--train.max_steps", 2)
    assert code == 0, err
    assert "reference: adapter; layout: shared" in err
    assert "20 of 20 rows kept" in err
    assert "Warning" not in err
    assert f"The trained model is in {tmp_path / 'run' / 'final'}" in out

    arguments = [tmp_path / "run", "Which number is larger, 7 or 9?", "--max_new_tokens", 5]
    code, out, err = called("generate.py", *arguments)
    assert code == 0, err
    assert out.count("  base: ") == out.count("  policy: ") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora.rank", "8"], "unknown key lora.rank. Nearest: lora.r"),
        (["--data.name_or_path", "no/such.jsonl"], "no/such.jsonl does not exist"),
        (["--model.name_or_path", "no/such/model"], "model.name_or_path: got 'no/such/model'"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_2(flags, said, tmp_path):
    code, _, err = called("train.py", *flags, "--train.output_dir", tmp_path / "run")
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_process_that_met_a_user_error_exits_with_2_and_one_message(tmp_path):
    code, out, err = as_process("train.py", "--train.max_steps", 0)
    assert (code, out) == (2, "")
    assert err.startswith("error: train.max_steps: got 0, wanted a positive number")
    assert err.count("\n") == 1


def test_preview_marks_what_is_scored(tmp_path):
    data = rows_file(tmp_path, 5)
    code, out, err = called("preview.py", "--rows", 1, "--data.name_or_path", data)
    assert code == 0, err
    row = json.loads(data.read_text().splitlines()[0])
    assert f"[user] {row['question']}" in out
    lines = iter(out.splitlines())
    assert any(line.startswith("--- chosen:") for line in lines)
    chosen = next(lines)
    assert chosen.replace("|", "") == row["chosen"] + "<im_end>"  # the bars of <|im_end|> go too
    assert "(<|im_start|>)|(" in out
    assert "1 of 1 rows kept" in out


def test_preview_shows_a_long_prompt_as_it_is_trained_on(tmp_path):
    """The first 10 tokens of the question are gone; those before and after it are there."""
    data = rows_file(tmp_path, 1)

    def tokens_of(prompt_length):
        flags = ["--data.name_or_path", data, "--data.max_prompt_length", prompt_length]
        code, out, err = called("preview.py", "--rows", 1, *flags)
        assert code == 0, err
        lines = iter(out.splitlines())
        next(line for line in lines if line.startswith("--- prompt: "))
        return next(lines).split("|("), out

    whole, _ = tokens_of(1024)
    cut, out = tokens_of(len(whole) - 10)
    question = whole.index("user)") + 2
    assert cut == whole[:question] + whole[question + 10 :]
    assert out.endswith("1 of 1 rows kept; cut: 1 prompt in its frame\n")


def test_the_loss_by_hand_is_ours():
    """docs/dpo_by_hand.py against Scorer and losses, on a policy unlike its reference."""
    by_hand = runpy.run_path(str(ROOT / "docs" / "dpo_by_hand.py"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    pair = [tokenizer(by_hand[name])["input_ids"] for name in ("PROMPT", "CHOSEN", "REJECTED")]
    reference, policy = (
        transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, dtype=torch.float32)
        for _ in range(2)
    )
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
        expected = by_hand["dpo_loss"](policy, reference, *pair)
        stream = build_stream([tuple(pair)])
        logps = pair_logps(
            Scorer(policy)(stream), Scorer(reference)(stream), stream.sequence_ids, stream.num_pairs
        )
        (ours,) = sigmoid(logps, beta=0.1)
    assert abs(expected - 0.6931) > 1e-3
    assert abs(ours - expected) <= 1e-5
