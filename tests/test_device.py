"""The device of a command: a GPU that torch cannot use is one message, never a slow run.

Neither this machine's GPU nor the lack of one matters: torch, the kernel's device files and
nvidia-smi are played.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
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
from tests.train.runs import QUIET, config, rows_file

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


@pytest.fixture
def cores(monkeypatch):
    """A machine of eight physical cores, of which this process may use sixteen logical ones."""
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 16 if logical else 8)
    monkeypatch.setattr(devices, "num_cores", lambda: 16)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    torch.set_num_threads(1)


class Launcher:
    """What psutil tells of the process that has started this one."""

    def __init__(self, options="", **environment):
        self.cmdline = lambda: ["accelerate", "launch", *options.split(), "scripts/train.py"]
        self.environ = lambda: environment


def test_torch_takes_the_physical_cores(cores):
    choose_device("cpu")
    assert torch.get_num_threads() == 8


def test_the_ranks_of_a_machine_share_its_cores(cores):
    cores.setenv("LOCAL_WORLD_SIZE", "4")
    choose_device("cpu")
    assert torch.get_num_threads() == 2
    cores.setenv("LOCAL_WORLD_SIZE", "64")
    choose_device("cpu")
    assert torch.get_num_threads() == 1


def test_no_more_threads_than_cores_that_this_process_may_use(cores):
    cores.setattr(devices, "num_cores", lambda: 3)
    choose_device("cpu")
    assert torch.get_num_threads() == 3


def test_what_the_user_has_set_stays(cores):
    cores.setenv("OMP_NUM_THREADS", "5")
    torch.set_num_threads(5)
    choose_device("cpu")
    assert torch.get_num_threads() == 5


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [
        (Launcher(), 8),
        (Launcher(OMP_NUM_THREADS="1"), 1),
        (Launcher("--num_cpu_threads_per_process 1"), 1),
        (Launcher("--num-cpu-threads-per-process=1"), 1),
    ],
)
def test_one_thread_of_a_launcher_is_not_the_users_wish(cores, launcher, threads):
    """accelerate launch sets OMP_NUM_THREADS to 1 for the process that it starts."""
    cores.setenv("OMP_NUM_THREADS", "1")
    cores.setenv("ACCELERATE_MIXED_PRECISION", "no")
    cores.setattr(devices.psutil, "Process", lambda pid: launcher)
    torch.set_num_threads(1)
    choose_device("cpu")
    assert torch.get_num_threads() == threads


def test_a_launcher_that_cannot_be_asked_is_believed(cores):
    def gone(pid):
        raise devices.psutil.NoSuchProcess(pid)

    cores.setenv("OMP_NUM_THREADS", "1")
    cores.setenv("TORCHELASTIC_RUN_ID", "none")
    cores.setattr(devices.psutil, "Process", gone)
    torch.set_num_threads(1)
    choose_device("cpu")
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "1"])
def test_a_launched_run_says_how_many_threads_it_takes(tmp_path, given):
    """Through the command of the README; the launcher is real."""
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--quiet", "scripts/train.py"]
    flags = ["--train.max_steps", "1", "--train.output_dir", tmp_path / "run", *QUIET]
    flags += ["--data.name_or_path", rows_file(tmp_path, 20)]
    subprocess.run(
        [*launch, *map(str, flags)],
        cwd=Path(__file__).parents[1],
        env=clean | ({"OMP_NUM_THREADS": given} if given else {}),
        check=True,
        capture_output=True,
    )
    cores = min(psutil.cpu_count(logical=False), devices.num_cores())
    threads = f"{cores} thread{'s' * (cores > 1)}" if given is None else "1 thread, as given"
    header = (tmp_path / "run" / "header.txt").read_text()
    assert f"device: 1 x CPU, {threads}\n" in header
