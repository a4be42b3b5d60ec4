"""What must hold on a GPU. Each of these also runs in small on a CPU, so that it cannot rot.

What only a GPU can be asked stands beside the code that it is about (`pytest -m gpu` finds it).
"""

import copy
import math
from pathlib import Path

import pytest
import torch

from dpo.data.stream import build_stream
from dpo.evaluate.samples import generate
from dpo.logps import token_logps
from dpo.model.lean import make_lean
from dpo.model.load import load_policy
from dpo.model.named import load_tokenizer
from dpo.model.scorer import Scorer
from dpo.train.step import TrainStep
from tests.after.made_runs import made_run
from tests.after.test_merge import merged
from tests.model.test_load import config as load_config
from tests.model.test_scorer import PAIRS
from tests.models import pefts_dropout_is_ours, tiny, with_lora
from tests.train.runs import config, metrics, run, step_gradients, training


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the test runs, and so the trainer, which takes a GPU if it sees one."""
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(False)


def scored(model, pairs=PAIRS, seed=5):
    """(log-probs, gradient of all that trains) from one seed of dropout."""
    model.zero_grad()
    scorer = Scorer(model)
    torch.manual_seed(seed)
    with pefts_dropout_is_ours():
        logps = scorer(build_stream(pairs).to(scorer.device))
        (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(grads)


def apart(ours, theirs):
    """Norm of the difference over the norm."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lean_layers_are_pefts_and_draw_its_masks(device, dtype, dropout):
    """Where PEFT draws in the same type: it casts x to the adapter's, and on a GPU the numbers that
    are drawn depend on it. Other masks would be 0.5 apart."""
    own = with_lora(tiny(hidden_size=64, intermediate_size=96), dropout=dropout)
    own = own.to(device, dtype).train()
    lean = copy.deepcopy(own)
    assert "14 LoRA products, 2 gated MLPs" in make_lean(lean)
    (logps, grads), (lean_logps, lean_grads) = scored(own), scored(lean)
    allowed = 1e-4 if dtype == torch.float32 else 0.05
    assert apart(lean_logps, logps) < allowed
    assert apart(lean_grads, grads) < allowed
    if dropout:  # so that the bound can fail
        assert apart(scored(lean, seed=6)[1], grads) > 0.2


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_lean_layers_on_4_bits_are_pefts(device, quantization):
    sides = []
    for lean in (False, True):
        settings = load_config(quantization=quantization, lean_layers=lean)
        model = load_policy(settings, device).model
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape).to(device) * 0.1
        sides.append(scored(model))
    (logps, grads), (lean_logps, lean_grads) = sides
    assert apart(lean_logps, logps) < 1e-4
    assert apart(lean_grads, grads) < 1e-4


def test_a_head_in_bfloat16_keeps_fp32_sums(device):
    """Against float64 on the same rounded numbers; bfloat16 logits would be off by 0.02."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(2000, 64)
    hidden, weight = (t.to(device, torch.bfloat16) for t in (hidden, weight))
    targets = torch.arange(300, device=device)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])
    logps = token_logps(hidden.requires_grad_(), weight, targets, tile_bytes=2**18)
    assert (logps.double() - exact[:, 0]).abs().max() < 1e-4
    logps.sum().backward()
    wide = hidden.detach().double().requires_grad_()
    truth = (wide @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])
    truth.sum().backward()
    assert apart(hidden.grad, wide.grad) < 2**-7


def test_an_answer_does_not_depend_on_the_batch(device):
    """Padding on the left, under the model's own attention, with the adapter on."""
    settings = load_config()
    model, tokenizer = load_policy(settings, device).model, load_tokenizer(settings.model)
    Scorer(model)  # whose attention is not generation's
    prompts = [tokenizer(words)["input_ids"] for words in ("Count.", "Name a month, please.", "Hi")]
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 8}
    for how in ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "top_p": 0.9}):
        together = generate(model, tokenizer, prompts, **options, **how)
        alone = [generate(model, tokenizer, [ids], **options, **how)[0] for ids in prompts]
        assert together == alone
        assert len(set(map(tuple, together))) > 1


# ----------------------------------------------------------------------------------------- runs

BF16 = ["--model.dtype", "bfloat16", "--train.tokens_per_microbatch", 200]


def test_at_step_0_the_loss_is_ln_2_and_every_pair_is_a_tie(device, tmp_path):
    """In bfloat16, to the bit: both models' log-probs are summed in one order."""
    settings = config(tmp_path, *BF16, "--train.max_steps", 1, "--lora.dropout", 0.0)
    line = metrics(run(settings))[0]
    assert line["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert line["train/rewards/margins"] == line["train/rewards/accuracies"] == 0.0


def test_two_budgets_have_one_gradient(device, tmp_path):
    whole = step_gradients(config(tmp_path, "--train.output_dir", tmp_path / "whole"))
    cut = step_gradients(config(tmp_path, "--train.tokens_per_microbatch", 100))
    for step, (gradient, means) in whole.items():
        assert apart(cut[step][0], gradient) < 1e-4
        assert cut[step][1] == pytest.approx(means, abs=1e-4)


def test_a_run_with_a_cache_is_the_run_without(device, tmp_path):
    """Before a pair comes again beside others: its log-probs are those of the first time."""
    flags = [*BF16, "--lora.dropout", 0.3, "--train.max_steps", 2, "--train.deterministic", "true"]
    cache = ["--reference.cache", tmp_path / "cache"]
    live, filling, reading = (
        run(config(tmp_path, *flags, *more, "--train.output_dir", tmp_path / name))
        for name, more in (("live", []), ("filling", cache), ("reading", cache))
    )
    assert training(live) == training(filling) == training(reading)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_killed_run_goes_on_bit_for_bit(device, tmp_path, monkeypatch, quantization):
    """With `train.deterministic`: on a GPU, attention's gradient is else summed in any order."""
    flags = [*BF16, "--model.quantization", quantization, "--train.deterministic", "true"]
    flags += ["--lora.dropout", 0.2, "--train.max_steps", 4, "--train.save_steps", 2]
    straight = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "straight"))
    settings = config(tmp_path, *flags, "--train.output_dir", tmp_path / "killed")
    take = TrainStep.__call__

    def killed(self, step):
        if step == 4:
            raise KeyboardInterrupt
        take(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    resumed = run(settings)
    assert training(resumed) == training(straight)
    file = Path("final") / "adapter_model.safetensors"
    assert (resumed / file).read_bytes() == (straight / file).read_bytes()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_merged_run_is_the_trained_policy(device, tmp_path, quantization):
    folder = made_run(tmp_path, "--model.quantization", quantization)
    record, _ = merged(folder)
    error = record["errors_nats"]["read back"]
    assert error["mean"] < 1e-4 < 0.1 < error["effect"]
