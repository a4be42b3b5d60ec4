"""What PyTorch is told before CUDA starts, the device, and what the header says of both."""

import os

import bitsandbytes.optim.optimizer
import pytest
import torch
from torch import nn

from dpo.config import Config, OptimConfig
from dpo.errors import UserError
from dpo.train import launch
from dpo.train import trainer as trainers
from dpo.train.header import _on_a_gpu, header
from dpo.train.launch import launcher_notes, prepare_torch
from dpo.train.optim import build_optimizer
from tests.train.runs import config, first_step, run, started, training

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


# ------------------------------------------------------------------------------------- the device


def test_a_run_that_wants_the_cpu_leaves_a_usable_gpu_alone(tmp_path, monkeypatch):
    """Torch says that it has one: whatever then asks CUDA for more fails, here and on a GPU."""
    plain = run(config(tmp_path, "--train.output_dir", tmp_path / "plain"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = run(config(tmp_path, "--train.device", "cpu"))
    assert "device: 1 x CPU" in (folder / "header.txt").read_text()
    assert "note: train.device is cpu: the GPU is not used" in (folder / "header.txt").read_text()
    assert "train.device" not in (plain / "header.txt").read_text()
    assert training(folder) == training(plain)
    assert first_step(folder)["train/memory_gib"] > 0.1  # of the process, not of the GPU


def test_a_run_may_go_on_on_another_device(tmp_path):
    flags = ["--train.save_steps", 2]
    straight = run(config(tmp_path, *flags))
    resumed = ["--train.resume", straight / "checkpoint-2", "--train.output_dir", tmp_path / "on"]
    again = run(config(tmp_path, *flags, *resumed, "--train.device", "cpu"))
    assert training(again)[-1] == training(straight)[-1]


@pytest.mark.parametrize("has_mps", [True, False])
def test_the_header_says_that_apples_gpu_is_not_used(has_mps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert started(config(tmp_path)).accelerator.device.type == "cpu"
    assert ("note: the CPU trains, not Apple's GPU (MPS)" in capsys.readouterr().err) is has_mps


@pytest.mark.parametrize(
    ("capability", "dtype", "is_said"),
    [
        ((7, 5), "bfloat16", True),
        ((7, 5), "float16", False),
        ((8, 0), "bfloat16", False),
        ((7, 0), "float32", False),
    ],
)
def test_the_header_says_that_an_old_card_emulates_bfloat16(
    capability, dtype, is_said, tmp_path, monkeypatch
):
    """A run on the CPU, whose header is written as if it were on a card."""
    made = started(config(tmp_path, "--model.dtype", dtype))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card = made.accelerator
    monkeypatch.setattr(type(card), "device", torch.device("cuda"))
    budget = made.train_step.budget
    said = header(
        made.config,
        card,
        made.models,
        made.data,
        made.order,
        budget,
        start_step=0,
        planned=1,
        time="",
    )
    assert ("emulates bfloat16, slowly" in said) is is_said
    assert ("model.dtype float16 is the type of its tensor cores" in said) is is_said


def test_a_long_run_on_a_cpu_is_told_its_time_before_weights_load(tmp_path, monkeypatch, capsys):
    """At 1 kFLOP/s; a rate that is not known for sure says nothing about this machine."""
    monkeypatch.setattr("dpo.plan.gpus.product_tflops", lambda width, dtype: 1e-9)
    load = trainers.load_policy_to_fit

    def listening(*given):
        loaded_after.append(capsys.readouterr().err)
        return load(*given)

    loaded_after = []
    monkeypatch.setattr(trainers, "load_policy_to_fit", listening)
    folder = run(config(tmp_path, "--train.max_steps", 1))
    (said,) = loaded_after[0].splitlines()
    assert said.startswith("time: at least ")
    assert said.endswith(
        " days for 1 steps at the 1e-06 GFLOP/s of this CPU (matrix products alone)"
    )
    assert said in (folder / "header.txt").read_text()


def test_a_short_run_is_told_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dpo.plan.gpus.product_tflops", lambda width, dtype: 1.0)
    started(config(tmp_path))
    assert "time:" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_accelerate_is_asked_for_and_does_not_get_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=rf"accelerate: .* is asked for \(ACCELERATE_USE_{name} is"):
        started(config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_precision_and_compiler_of_accelerate_are_said_to_be_unused(monkeypatch):
    assert launcher_notes() == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert launcher_notes() == [
        "accelerate's mixed_precision bf16 is not used: model.dtype decides"
    ]


@pytest.mark.parametrize(
    ("words", "saved", "asked"),
    [
        (["python", "train.py", "--num_processes", "4"], None, 1),
        (["python", "/bin/accelerate", "launch", "train.py"], None, 1),
        (["python", "/bin/accelerate", "launch", "--num_processes", "2", "train.py"], None, 2),
        (["python", "/bin/accelerate", "launch", "--num_processes=2", "train.py"], None, 2),
        (["python", "/bin/accelerate", "launch", "train.py"], 3, 3),
        (["python", "/bin/accelerate", "launch", "--num_processes", "1", "train.py"], 3, 1),
    ],
)
def test_processes_that_accelerate_does_not_start_are_noticed(
    tmp_path, monkeypatch, words, saved, asked
):
    monkeypatch.setattr(launch, "HF_HOME", str(tmp_path))
    if saved:
        (tmp_path / "accelerate").mkdir()
        (tmp_path / "accelerate" / "default_config.yaml").write_text(f"num_processes: {saved}\n")
    monkeypatch.setattr(launch.psutil.Process, "cmdline", lambda self: words)
    assert launch._processes_asked_for() == asked
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch._processes_asked_for() == 1  # they were started
