"""The loop: ln 2 at the start, one gradient however a step is split, and nothing lost."""

import json
import math
import re
import subprocess
import sys

import peft
import pytest
import torch
import transformers

from dpo.cli import parse
from dpo.data.stream import build_stream
from dpo.errors import UserError
from dpo.model.load import load_policy, load_tokenizer
from dpo.model.reference import AdapterOff
from dpo.model.scorer import Scorer
from dpo.train import selfcheck, trainer
from dpo.train.selfcheck import check_start, first_pairs
from dpo.train.trainer import Run
from tests.models import QUICKSTART_MODEL
from tests.train.runs import (
    QUIET,
    config,
    forget_accelerate,
    metrics,
    rows_file,
    run,
    step_gradients,
    training,
)

PACKAGED = "quickstart/model"


def first_step(folder):
    return next(line for line in metrics(folder) if line["step"] == 1 and "train/loss" in line)


def assert_starts_at_ln_2(folder):
    first = first_step(folder)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=2e-4)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert first[f"train/rewards/{name}"] == pytest.approx(0, abs=1e-5)


def model_folder(tmp_path, **settings):
    """The packaged model with other settings in its config."""
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, **settings)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folder)
    return folder


def adapter_folder(tmp_path):
    """An adapter whose update is not zero, as supervised fine-tuning leaves one."""
    base = transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "sft"
    model.save_pretrained(folder, save_embedding_layers=False)
    transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lora.dropout", "0.3"],
        ["--model.quantization", "nf4", "--optim.name", "paged_adamw_32bit"],
        ["--model.quantization", "fp4", "--model.dtype", "bfloat16"],
        ["--model.quantization", "int8"],
        ["--model.adapter", "none", "--optim.learning_rate", "1e-4"],
        ["--model.attention", "padded"],
        ["--loss.label_smoothing", "0.2"],
    ],
    ids=" ".join,
)
def test_the_first_loss_is_ln_2_and_the_rewards_are_0(tmp_path, flags):
    assert_starts_at_ln_2(run(config(tmp_path, *flags, "--train.max_steps", 1)))


def test_the_first_loss_is_ln_2_with_attention_dropout_in_the_model(tmp_path):
    folder = model_folder(tmp_path, attention_dropout=0.3)
    settings = config(tmp_path, "--model.name_or_path", folder, "--train.max_steps", 1)
    assert transformers.AutoConfig.from_pretrained(folder).attention_dropout == 0.3
    assert_starts_at_ln_2(run(settings))


def test_without_zeroing_that_dropout_the_self_check_does_not_pass(tmp_path, monkeypatch):
    """The negative control: in train mode both passes draw their own dropout."""
    monkeypatch.setattr("dpo.model.load.zero_dropouts", lambda model: [])
    folder = model_folder(tmp_path, attention_dropout=0.3)
    with pytest.raises(RuntimeError, match="policy must be the reference"):
        run(config(tmp_path, "--model.name_or_path", folder, "--train.max_steps", 1))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_first_loss_is_ln_2_from_an_adapter_that_is_not_zero(tmp_path, quantization):
    folder = adapter_folder(tmp_path)
    settings = config(
        tmp_path,
        *("--model.name_or_path", folder, "--model.quantization", quantization),
        *("--train.max_steps", 2, "--lora.dropout", 0),
    )
    result = run(settings)
    assert_starts_at_ln_2(result)
    written = json.loads((result / "final" / "adapter_config.json").read_text())
    assert written["r"] == 4  # the loaded adapter went on training, no new one was made


def test_the_base_is_the_wrong_reference_for_such_an_adapter(tmp_path, monkeypatch):
    """The negative control: with the adapter off, the start-up check refuses to train."""
    import contextlib

    @contextlib.contextmanager
    def switched_off(policy):
        with policy.model.disable_adapter():
            yield

    monkeypatch.setattr("dpo.model.reference.adapter_off", switched_off)
    settings = config(tmp_path, "--model.name_or_path", adapter_folder(tmp_path))
    with pytest.raises(RuntimeError, match="policy must be the reference"):
        run(settings)


def assert_same_gradients(results, expected):
    for step, (gradient, values) in expected.items():
        assert gradient.abs().max() > 1e-3
        assert (results[step][0] - gradient).abs().max() <= 1e-5 * gradient.abs().max()
        assert results[step][1] == pytest.approx(values, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_one_gradient_at_any_token_budget_and_batch_shape(tmp_path, loss):
    """16 pairs as 16 x 1, about 4 x 4 and 1 x 16 micro-batches; and the short last step of 8."""
    results = [
        step_gradients(
            config(
                tmp_path,
                *("--train.tokens_per_microbatch", budget, "--loss.type", loss),
                *("--train.per_device_train_batch_size", batch),
                *("--train.gradient_accumulation_steps", 16 // batch),
            )
        )
        for budget, batch in ((1, 16), (250, 4), (100_000, 1))
    ]
    for result in results[1:]:
        assert_same_gradients(result, results[0])


def test_nf4_and_lora_dropout_start_from_an_adapter_and_evaluate_without_dropout(tmp_path):
    """Evaluation mode reaches LoRA's dropout although the 4-bit layers stay in train mode."""
    folder = adapter_folder(tmp_path)
    flags = ["--model.name_or_path", folder, "--model.quantization", "nf4", "--lora.dropout", 0.3]
    forget_accelerate()
    one = Run(config(tmp_path, *flags))
    check_start(one)
    stream = first_pairs(one)
    in_training = [one.scorer(stream).detach() for _ in range(2)]
    one.scorer.eval()
    in_evaluation = [one.scorer(stream).detach() for _ in range(2)]
    assert not torch.equal(*in_training)
    assert torch.equal(*in_evaluation)
    one.tracker.close_bar()


@pytest.mark.distributed
@pytest.mark.parametrize("rows", [24, 17])
def test_two_processes_give_the_gradient_of_one_also_for_a_short_last_step(tmp_path, rows):
    """Steps of 16 pairs; the last one has 8, or a single one, which leaves a rank without pairs."""
    flags = ["--train.tokens_per_microbatch", 250, "--train.per_device_train_batch_size"]
    output = tmp_path / "gradients.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    arguments = [tmp_path, output, rows, *flags, 8]
    subprocess.run(
        [*launch, "-m", "tests.train.two_ranks", *map(str, arguments)], check=True, timeout=120
    )
    expected = step_gradients(config(tmp_path, *flags, 16, rows=rows))
    for results in torch.load(output):
        assert_same_gradients(results, expected)


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
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    subprocess.run([*launch, "scripts/train.py", *two], check=True, timeout=120)

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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_killed_and_resumed_run_equals_the_straight_one_bit_for_bit(
    tmp_path, monkeypatch, quantization
):
    """With LoRA dropout, into the second epoch (24 pairs, steps of 16), inside a logging window."""
    flags = [
        "--model.quantization",
        quantization,
        "--lora.dropout",
        0.2,
        "--train.max_steps",
        5,
        "--train.logging_steps",
        3,
    ]
    flags += ["--train.save_steps", 2, "--data.eval_fraction", 0.2, "--train.eval_steps", 2]
    straight = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "straight"))

    settings = config(tmp_path, *flags, "--train.output_dir", tmp_path / "killed")
    with monkeypatch.context() as patch:
        train_step = Run.train_step

        def killed(self, step):
            if step == 5:
                raise KeyboardInterrupt
            train_step(self, step)

        patch.setattr(Run, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert not (tmp_path / "killed" / "final").exists()
    assert [p.name for p in sorted((tmp_path / "killed").glob("checkpoint-*"))] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = run(settings)

    assert training(resumed) == training(straight)
    for folder in ("final", "checkpoint-4"):
        ours, theirs = (
            (path / folder / "adapter_model.safetensors").read_bytes()
            for path in (resumed, straight)
        )
        assert ours == theirs
    assert json.loads((resumed / "summary.json").read_text()) == json.loads(
        (straight / "summary.json").read_text()
    )


def test_full_fine_tuning_resumes_bit_for_bit_with_the_reference_of_step_0(tmp_path):
    flags = ["--model.adapter", "none", "--optim.learning_rate", 1e-4, "--train.save_steps", 2]
    straight = run(config(tmp_path, *flags, "--train.max_steps", 3))
    again = config(
        tmp_path,
        *flags,
        *("--train.max_steps", 3, "--train.resume", straight / "checkpoint-2"),
        *("--train.output_dir", tmp_path / "again"),
    )
    resumed = run(again)
    ours, theirs = ((f / "final" / "model.safetensors").read_bytes() for f in (resumed, straight))
    assert ours == theirs
    assert training(resumed)[-1] == training(straight)[-1]


def test_dropout_differs_between_steps_and_the_resumed_test_would_notice(tmp_path, monkeypatch):
    """The negative control: with one seed for every step, the run comes out otherwise."""
    flags = ["--lora.dropout", 0.2]
    straight = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "a"))
    monkeypatch.setattr(Run, "_seed_dropout", lambda *_: torch.manual_seed(0))
    other = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "b"))
    assert training(other) != training(straight)


@pytest.mark.slow
def test_the_final_adapter_scores_in_a_fresh_process_as_it_did_in_this_one(tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 4, "--optim.learning_rate", 1e-2))
    code = (
        "import sys, torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n"
        "from dpo.data.stream import build_stream\n"
        "from dpo.model.scorer import Scorer\n"
        "torch.set_num_threads(1)\n"  # as here: they decide the last bit
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "stream = build_stream([([5, 6, 7], [8, 9], [10, 11])])\n"
        "with torch.no_grad(), model.disable_adapter(): base = Scorer(model)(stream)\n"
        "with torch.no_grad(): print((Scorer(model)(stream)).tolist(), '|', base.tolist())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder / "final")]
    fresh = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    trained, base = (torch.tensor(json.loads(part)) for part in fresh.split("|"))

    settings = config(tmp_path, "--model.name_or_path", folder / "final")
    for lean in (False, True):
        settings.model.lean_layers = lean
        scorer = Scorer(load_policy(settings, "cpu").model)
        expected = scorer(build_stream([([5, 6, 7], [8, 9], [10, 11])])).detach()
        # The same bits by PEFT's own code; lean layers add the update in another order.
        assert (trained - expected).abs().max() <= (5e-6 if lean else 0)
    assert (trained - base).abs().max() > 1e-3


def test_layers_are_compiled_where_the_configuration_says_so(tmp_path, monkeypatch):
    """And checked; that compiled ones compute the same is tests/model/test_compile.py's."""
    compiled, checked = [], []
    monkeypatch.setattr(
        "dpo.train.trainer.compile_layers", lambda base, device: compiled.append(type(base))
    )
    check = selfcheck._check_compiled
    monkeypatch.setattr(
        selfcheck, "_check_compiled", lambda *args: (checked.append(1), check(*args))
    )
    run(config(tmp_path, "--train.max_steps", 1))
    assert compiled == checked == []
    run(
        config(
            tmp_path, "--train.max_steps", 1, "--model.compile", "true", "--train.resume", "never"
        )
    )
    assert [kind.__name__ for kind in compiled] == ["MistralForCausalLM"]
    assert len(checked) == 1


def test_an_adapter_that_was_not_written_is_noticed(tmp_path, monkeypatch):
    """The negative control of the check after every save."""
    from safetensors.torch import load_file, save_file

    save_pretrained = peft.PeftModel.save_pretrained

    def empty(self, folder, **options):
        save_pretrained(self, folder, **options)
        file = folder / "adapter_model.safetensors"
        save_file(dict(list(load_file(file).items())[:1]), file)

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", empty)
    with pytest.raises(RuntimeError, match="read back 1 tensors"):
        run(config(tmp_path))


def test_nf4_layers_stay_trainable_after_evaluation_and_generation(tmp_path, monkeypatch):
    """The input gradient of the policy is the same before and after both."""
    flags = ["--model.quantization", "nf4", "--data.eval_fraction", 0.3, "--train.eval_prompts", 4]
    forget_accelerate()
    one = Run(config(tmp_path, *flags, "--train.eval_max_new_tokens", 4))
    stream = first_pairs(one)

    def gradient():
        one.optimizer.zero_grad()
        one.scorer(stream).sum().backward()
        grads = [p.grad for p in one.policy.model.parameters() if p.requires_grad]
        return torch.cat([g.flatten().clone() for g in grads])

    before, logps = gradient(), one.scorer(stream).detach()
    one.evaluator.evaluate()
    assert torch.equal(gradient(), before)
    assert torch.equal(one.scorer(stream).detach(), logps)
    assert before.abs().max() > 0
    one.tracker.close_bar()


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(
    tmp_path, monkeypatch
):
    pair_logps = trainer.pair_logps

    def poisoned(policy, reference, *which):
        return pair_logps(policy * float("nan"), reference, *which)

    settings = config(tmp_path, rows=3)
    settings.train.per_device_train_batch_size = 3
    forget_accelerate()
    one = Run(settings)
    before = {n: p.detach().clone() for n, p in one.policy.model.named_parameters()}
    monkeypatch.setattr(trainer, "pair_logps", poisoned)
    with pytest.raises(RuntimeError, match="gradient norm is nan") as failure:
        one.train_step(1)
    assert sorted(re.findall(r"\d+", str(failure.value).split("rank 0:")[1].split(";")[0])) == [
        "1",
        "2",
        "3",
    ]
    for name, parameter in one.policy.model.named_parameters():
        assert torch.equal(parameter, before[name])
    one.tracker.close_bar()


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


def test_a_finished_run_is_not_touched_and_never_puts_it_aside(tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds a finished run"):
        run(config(tmp_path, "--train.max_steps", 1))
    run(config(tmp_path, "--train.max_steps", 1, "--train.resume", "never"))
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == before
    assert (folder / "summary.json").exists()


def stopped_run(tmp_path, *flags):
    """A run of three steps as if killed after its checkpoint of step 2."""
    folder = run(config(tmp_path, "--train.save_steps", 2, *flags))
    (folder / "summary.json").unlink()
    return folder


def test_resume_refuses_another_configuration_and_names_the_key(tmp_path):
    stopped_run(tmp_path)
    with pytest.raises(UserError, match=r"optim.learning_rate \(was 0.00\d+, is 0.5\)"):
        run(config(tmp_path, "--train.save_steps", 2, "--optim.learning_rate", 0.5))
    with pytest.raises(UserError, match="took 16 pairs a step, now it would be 8"):
        run(config(tmp_path, "--train.per_device_train_batch_size", 8))


def test_resume_refuses_a_damaged_checkpoint_and_names_the_file(tmp_path):
    folder = stopped_run(tmp_path)
    file = folder / "checkpoint-2" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged"):
        run(config(tmp_path))


def test_resume_refuses_rows_that_have_changed(tmp_path):
    stopped_run(tmp_path)
    settings = config(tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text().replace('"chosen": "The', '"chosen": "A', 1))
    with pytest.raises(UserError, match="the pairs have changed"):
        run(settings)


def test_resume_refuses_a_reference_that_has_changed(tmp_path):
    model = model_folder(tmp_path)
    stopped_run(tmp_path, "--model.name_or_path", model)
    weights = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        weights.lm_head.weight.mul_(1.5)
    weights.save_pretrained(model)
    with pytest.raises(UserError, match="the reference has changed"):
        run(config(tmp_path, "--model.name_or_path", model))


def test_a_resumed_run_names_its_step_and_old_checkpoints_go_only_after_the_new_one(tmp_path):
    flags = ["--train.save_steps", 1, "--train.save_total_limit", 2, "--train.max_steps", 4]
    folder = run(config(tmp_path, *flags))
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


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


def test_a_mistake_in_the_data_leaves_the_old_run_where_it_is(tmp_path):
    """Also with resume=never: nothing is renamed until nothing can be wrong any more."""
    folder = run(config(tmp_path, "--train.max_steps", 1))
    settings = config(tmp_path, "--train.resume", "never", "--data.format", "openai")
    with pytest.raises(UserError, match="'input' is missing"):
        run(settings)
    assert (folder / "summary.json").exists()
    assert not (tmp_path / "run.old-1").exists()


def test_a_run_that_never_reached_a_checkpoint_is_put_aside_and_started_again(tmp_path):
    folder = run(config(tmp_path, "--train.max_steps", 1))
    (folder / "summary.json").unlink()
    again = run(config(tmp_path, "--train.max_steps", 1))
    assert (tmp_path / "run.old-1" / "metrics.jsonl").exists()
    assert training(again) == training(tmp_path / "run.old-1")


def test_going_on_in_another_folder_brings_the_log_along(tmp_path):
    flags = ["--data.eval_fraction", 0.3, "--train.save_steps", 2]
    first = run(config(tmp_path, *flags))
    other = ["--train.resume", first / "checkpoint-2", "--train.output_dir", tmp_path / "other"]
    second = run(config(tmp_path, *flags, *other))
    assert training(second) == training(first)
    assert json.loads((second / "summary.json").read_text())["before"]["step"] == 0


def test_a_line_that_was_cut_off_in_the_writing_does_not_block_a_resume(tmp_path):
    folder = stopped_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    assert [line["step"] for line in metrics(run(config(tmp_path)))] == [1, 2, 3]


def test_going_on_in_another_folder_brings_the_best_weights_along(tmp_path):
    flags = ["--data.eval_fraction", 0.3, "--train.save_steps", 2, "--train.eval_steps", 1]
    flags += ["--train.metric_for_best_model", "eval/loss"]
    first = run(config(tmp_path, *flags))
    other = ["--train.resume", first / "checkpoint-2", "--train.output_dir", tmp_path / "other"]
    second = run(config(tmp_path, *flags, *other))
    both = ((folder / "best" / "metric.json").read_text() for folder in (first, second))
    assert len(set(both)) == 1


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_loads(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train\.output_dir: got .*file/run"):
        run(config(tmp_path, "--train.output_dir", tmp_path / "file" / "run"))


def test_falling_chosen_log_probs_are_warned_of_once(tmp_path, capsys):
    flags = ["--data.eval_fraction", 0.3, "--train.eval_steps", 1, "--train.max_steps", 4]
    folder = run(config(tmp_path, *flags, "--optim.learning_rate", 0.05))
    chosen = [line["eval/logps/chosen"] for line in metrics(folder) if "eval/loss" in line]
    assert min(chosen[1:]) < chosen[0]
    assert capsys.readouterr().err.count("chosen answers have lost") == 1


def test_the_header_says_which_format_was_recognised(tmp_path, capsys):
    run(config(tmp_path, "--train.max_steps", 1))
    assert "24 of 24 rows kept; format orca_dpo_pairs" in capsys.readouterr().err


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
