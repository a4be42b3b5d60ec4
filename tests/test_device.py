"""The device of a command: a GPU that torch cannot use is one message, never a slow run.

Neither this machine's GPU nor the lack of one matters: torch, the kernel's device files and
nvidia-smi are played.
"""

import warnings

import pytest
import torch

from dpo import device as devices
from dpo.after.finished import FinishedRun
from dpo.after.generate import Speakers
from dpo.commands import main
from dpo.commands.processes import launch
from dpo.config import Config
from dpo.device import choose_device
from dpo.errors import UserError
from tests.models import QUICKSTART_MODEL
from tests.train.runs import config

OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your driver"


@pytest.fixture
def unusable(monkeypatch):
    """A machine whose NVIDIA GPU a torch for CPUs does not see; no weights can be loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices, "_has_nvidia_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("dpo.model.load.load_base", None)
    return monkeypatch


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine with one GPU that torch can use, as far as it is only asked whether there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return monkeypatch


def test_the_gpu_is_taken_if_there_is_one_unless_the_cpu_is_wanted(with_gpu):
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_without_a_gpu_the_cpu_is_taken(unusable):
    unusable.setattr(devices, "_has_nvidia_gpu", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_a_gpu_that_a_torch_for_cpus_cannot_use_is_an_error_with_both_ways_out(unusable):
    with pytest.raises(UserError, match=r"has an NVIDIA GPU, but torch .* built without CUDA") as e:
        choose_device("auto")
    for way_out in ("pytorch.org/get-started", "--train.device cpu", "CUDA_VISIBLE_DEVICES= "):
        assert way_out in str(e.value)
    assert choose_device("cpu") == torch.device("cpu")


def test_what_torch_reports_of_the_driver_is_passed_on(unusable):
    def init():
        raise RuntimeError(OLD)

    unusable.setattr(torch.version, "cuda", "13.0")
    unusable.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError, match=r"CUDA does not start: The NVIDIA driver .* is too old"):
        choose_device()
    unusable.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=r"your driver \(CUDA_VISIBLE_DEVICES is '7'\)\."):
        choose_device()
    unusable.setattr(torch.cuda, "init", lambda: None)  # it gives no reason
    with pytest.raises(UserError, match=r"CUDA does not start \(CUDA_VISIBLE_DEVICES is '7'\)\."):
        choose_device()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_user_who_hides_the_gpu_asks_for_none(unusable, hidden):
    unusable.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("files", "smi", "found"),
    [
        (["nvidia0", "nvidiactl"], None, True),
        (["nvidiactl", "null"], None, False),  # a driver without a GPU
        ([], "echo 'GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-1)'", True),  # Windows' Linux
        ([], "echo 'NVIDIA-SMI has failed: no driver' && exit 9", False),  # a leftover
    ],
)
def test_the_signs_of_a_gpu(tmp_path, monkeypatch, files, smi, found):
    for name in files:
        (tmp_path / name).touch()
    if smi:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(devices, "_DEV", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices._has_nvidia_gpu() is found


@pytest.mark.parametrize("command", ["train", "cache-reference", "plan", "processes", "generate"])
def test_a_command_leaves_with_one_message_and_exit_code_2(command, unusable, tmp_path, capsys):
    """Torch warns of an old driver when it is asked; that is in the message already."""

    def warns():
        warnings.warn(f"CUDA initialization: {OLD}", stacklevel=2)
        return False

    unusable.setattr(torch.cuda, "is_available", warns)
    words = {
        "processes": ["train", "--num_processes", "2"],
        "generate": ["generate", str(QUICKSTART_MODEL), "Hello"],
    }.get(command, [command])
    folder = ["--train.output_dir", str(tmp_path / "run")] if command != "generate" else []
    with pytest.raises(SystemExit) as left:
        main([*words, *folder])
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    assert printed.err.startswith("error: device: this machine has an NVIDIA GPU")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_finished_run_and_a_model_alone_say_the_same(unusable, tmp_path):
    from dpo.cli import save

    settings = config(tmp_path, "--train.device", "cpu")  # of the training, not of what follows
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter_model.safetensors").touch()
    save(settings, tmp_path / "config.yaml")
    for load in (FinishedRun, Speakers):
        with pytest.raises(UserError, match="has an NVIDIA GPU"):
            load(tmp_path)


def test_several_processes_on_a_cpu_need_no_gpu_each(with_gpu):
    started = []
    with_gpu.setattr("accelerate.commands.launch.launch_command", started.append)
    settings = Config()
    with pytest.raises(UserError, match="got 2, wanted at most 1, a process for each GPU"):
        launch("train", [], 2, settings)
    settings.train.device = "cpu"
    launch("train", [], 2, settings)
    assert len(started) == 1
