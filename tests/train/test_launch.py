"""What PyTorch is told before CUDA starts, and what the header says of it."""

import os

import bitsandbytes.optim.optimizer
import pytest
import torch
from torch import nn

from dpo.config import Config, OptimConfig
from dpo.train.header import _on_a_gpu
from dpo.train.launch import prepare_torch
from dpo.train.optim import build_optimizer
from tests.train.runs import config, run, training

NAMES = "PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF CUBLAS_WORKSPACE_CONFIG".split()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def deterministic(value):
    settings = Config()
    settings.train.deterministic = value
    return settings


def test_blocks_of_memory_may_grow():
    prepare_torch(deterministic(False))
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    prepare_torch(deterministic(False))
    said = {n: os.environ[n] for n in NAMES if n in os.environ}
    assert said == {name: "max_split_size_mb:128"}


@pytest.mark.gpu
def test_the_allocator_took_it():
    """A process of its own sets it before CUDA starts."""
    code = (
        "from dpo.config import Config; from dpo.train.launch import prepare_torch;"
        "prepare_torch(Config()); import torch; torch.zeros(1, device='cuda');"
        "print(torch.cuda.memory_snapshot()[0]['is_expandable'])"
    )
    import subprocess
    import sys

    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_deterministic_run_asks_for_it_and_computes_what_it_did(tmp_path):
    """On a CPU every sum has one order anyway; sampled answers are drawn from whole numbers, whose
    sums have one value (of floating-point ones a GPU refuses the cumulative sum)."""
    flags = ["--lora.dropout", 0.2, "--data.eval_fraction", 0.2, "--train.eval_prompts", 2]
    plain = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "plain"))
    assert not torch.are_deterministic_algorithms_enabled()
    settings = config(tmp_path, *flags, "--train.deterministic", "true")
    same = run(settings)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert training(same) == training(plain)


def test_the_header_on_a_gpu_says_what_repeats_and_what_waits():
    repeats, waits = _on_a_gpu(deterministic(False), num_trained_tensors=4)
    assert repeats == "a resumed run is the straight one up to rounding (train.deterministic)"
    assert waits.startswith("paged_adamw_32bit waits for the device at least 4 times a step")
    config = deterministic(True)
    config.optim.name = "adamw"
    expected = ["deterministic: the same micro-batches have the same bits"]
    assert _on_a_gpu(config, num_trained_tensors=4) == expected


@pytest.mark.parametrize(
    ("name", "waits"), [("adamw", 0), ("adamw_8bit", 6), ("paged_adamw_32bit", 6 + 1)]
)
def test_how_often_an_optimizer_waits_for_the_device(monkeypatch, name, waits):
    """bitsandbytes waits once a tensor, with paged states once more: 449 times a step for the
    article's LoRA on 224 layers. The header says "at least 448"."""
    calls = []
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", lambda tensor: calls.append(1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append(1))
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    optimizer = build_optimizer(model, OptimConfig(name=name))
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert len(calls) == waits
