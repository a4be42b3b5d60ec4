"""Before the first update the policy is its own reference, or the run does not start.

Compiled layers must have the gradients of plain ones; that really compiled ones do is asked in
tests/model/test_compile.py.
"""

import contextlib
import math
from contextlib import contextmanager

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from dpo.data.stream import build_stream
from dpo.losses import implicit_rewards
from dpo.model.load import Policy
from dpo.model.models import Models
from dpo.model.reference import Reference, Zero
from dpo.train import selfcheck
from dpo.train.selfcheck import check_compiled, shortest_pairs
from tests.train.runs import adapter_folder, config, forget_accelerate, model_folder, started


def assert_starts_at_ln_2(settings):
    """The start-up check passes, and the pairs of the first step have the loss and the rewards of
    a policy that is its reference."""
    one = started(settings)
    one.check_start()
    stream = shortest_pairs(one.data.train, one.order)
    logps, losses = one.train_step.score(stream)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=2e-4)
    for rewards in implicit_rewards(logps, beta=0.1):
        assert rewards.tolist() == pytest.approx([0, 0], abs=1e-5)
    return one


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
    assert_starts_at_ln_2(config(tmp_path, *flags))


def test_the_first_loss_is_ln_2_with_attention_dropout_in_the_model(tmp_path):
    folder = model_folder(tmp_path, attention_dropout=0.3)
    settings = config(tmp_path, "--model.name_or_path", folder, "--train.max_steps", 1)
    assert transformers.AutoConfig.from_pretrained(folder).attention_dropout == 0.3
    assert_starts_at_ln_2(settings)


def test_without_zeroing_that_dropout_the_self_check_does_not_pass(tmp_path, monkeypatch):
    """The negative control: in train mode both passes draw their own dropout."""
    monkeypatch.setattr("dpo.model.load.zero_dropouts", lambda model: [])
    folder = model_folder(tmp_path, attention_dropout=0.3)
    with pytest.raises(RuntimeError, match="policy must be the reference"):
        started(config(tmp_path, "--model.name_or_path", folder)).check_start()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_first_loss_is_ln_2_from_an_adapter_that_is_not_zero(tmp_path, quantization):
    folder = adapter_folder(tmp_path)
    settings = config(
        tmp_path,
        *("--model.name_or_path", folder, "--model.quantization", quantization),
        *("--train.max_steps", 2, "--lora.dropout", 0),
    )
    one = assert_starts_at_ln_2(settings)
    adapter = one.models.policy.model.peft_config["default"]
    assert adapter.r == 4  # the loaded adapter trains, no new one was made
    assert all(
        "default" in name
        for name, p in one.models.policy.model.named_parameters()
        if p.requires_grad
    )


def test_the_base_is_the_wrong_reference_for_such_an_adapter(tmp_path, monkeypatch):
    """The negative control: with the adapter off, the start-up check refuses to train."""

    @contextlib.contextmanager
    def switched_off(policy):
        with policy.model.disable_adapter():
            yield

    monkeypatch.setattr("dpo.model.reference.adapter_off", switched_off)
    settings = config(tmp_path, "--model.name_or_path", adapter_folder(tmp_path))
    with pytest.raises(RuntimeError, match="policy must be the reference"):
        started(settings).check_start()


def test_nf4_and_lora_dropout_start_from_an_adapter_and_evaluate_without_dropout(tmp_path):
    """Evaluation mode reaches LoRA's dropout although the 4-bit layers stay in train mode."""
    folder = adapter_folder(tmp_path)
    flags = ["--model.name_or_path", folder, "--model.quantization", "nf4", "--lora.dropout", 0.3]
    one = started(config(tmp_path, *flags))
    one.check_start()
    stream = shortest_pairs(one.data.train, one.order)
    in_training = [one.models.scorer(stream).detach() for _ in range(2)]
    one.models.scorer.eval()
    in_evaluation = [one.models.scorer(stream).detach() for _ in range(2)]
    assert not torch.equal(*in_training)
    assert torch.equal(*in_evaluation)


def test_layers_are_compiled_where_the_configuration_says_so(tmp_path, monkeypatch):
    """And checked; that compiled ones compute the same is tests/model/test_compile.py's."""
    compiled, checked = [], []
    monkeypatch.setattr(
        "dpo.model.models.compile_layers", lambda base, device: compiled.append(type(base))
    )
    check = selfcheck.check_compiled
    monkeypatch.setattr(
        selfcheck, "check_compiled", lambda *args: (checked.append(1), check(*args))
    )
    started(config(tmp_path)).check_start()
    assert compiled == checked == []
    flags = ["--model.compile", "true", "--train.resume", "never"]
    started(config(tmp_path, *flags)).check_start()
    assert [kind.__name__ for kind in compiled] == ["MistralForCausalLM"]
    assert len(checked) == 1


# ------------------------------------------------------------------------------- compiled layers


class Scorer(nn.Module):
    """What a compiler makes of it, when it may, has another gradient of the same value."""

    def __init__(self, wrong):
        super().__init__()
        self.weight, self.wrong, self.is_eager = nn.Parameter(torch.ones(4)), wrong, False

    def forward(self, stream):
        value = (self.weight * torch.linspace(0.1, 0.4, 4)).sin()
        return value if self.is_eager else value + self.wrong * (value - value.detach())


def checked(monkeypatch, wrong, dtype=torch.float32):
    scorer = Scorer(wrong).to(dtype)

    @contextmanager
    def stance(name):
        assert name == "force_eager"
        scorer.is_eager = True
        yield
        scorer.is_eager = False

    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    reference = Reference("zero", Zero())
    is_rounded = dtype != torch.float32
    models = Models(Policy(scorer), scorer, reference, "shared", "", is_rounded=is_rounded)
    forget_accelerate()
    check_compiled(models, build_stream([([1], [2], [3])]), Accelerator(cpu=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-1.0, 0.5], ids=["none", "half as much again"])
def test_a_wrong_gradient_of_a_right_value_is_noticed(monkeypatch, wrong, dtype):
    with pytest.raises(RuntimeError, match=r"differs by [\d.]+ of its norm.*Set model.compile to"):
        checked(monkeypatch, wrong, dtype)


def test_weights_without_a_gradient_are_passed_over(monkeypatch):
    """An image tower's adapters come first and are not used; without any gradient all is well."""
    made = Scorer(-1.0)
    made.unused = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(9)])
    made._parameters["weight"] = made._parameters.pop("weight")  # now after them
    monkeypatch.setattr("tests.train.test_selfcheck.Scorer", lambda wrong: made)
    with pytest.raises(RuntimeError, match="differs by 1 of its norm"):
        checked(monkeypatch, -1.0)
    made.weight.data.zero_()
    made.forward = lambda stream: made.weight * 0.0
    checked(monkeypatch, 0.0)


def test_rounding_is_none(monkeypatch):
    checked(monkeypatch, 1e-4)
    checked(monkeypatch, 1e-2, torch.bfloat16)
