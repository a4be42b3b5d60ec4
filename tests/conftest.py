import importlib.resources
import json
import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: threads only get in each other's way
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # a GPU's, before it is first asked

import pytest
import torch

from dpo import signals
from dpo.signals import SIGNALS

torch.set_num_threads(1)  # also where torch was imported before


sees_gpu, HAS_GPU = torch.cuda.is_available, torch.cuda.is_available()
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


QUICK = ("data", "test_losses.py", "test_logps.py", "test_metrics.py", "test_scorer.py")
QUICK += ("test_attention.py", "test_reference.py", "test_config.py")


def pytest_collection_modifyitems(items):
    """Marks what `-m quick` runs: the maths, the data, the stream and the scorer."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("distributed")
        if not is_long and (path.parts[0] in QUICK or path.name in QUICK):
            item.add_marker(pytest.mark.quick)


@pytest.hookimpl(tryfirst=True)  # before fixtures, some of which train
def pytest_runtest_setup(item):
    """Only tests marked gpu, and the processes that they start, see a GPU; without one they skip.

    The others say bit for bit what holds on a CPU, and hold it on every machine.
    """
    wants_gpu = item.get_closest_marker("gpu") is not None
    if wants_gpu and not HAS_GPU:
        pytest.skip("needs a GPU")
    torch.cuda.is_available = sees_gpu if wants_gpu else lambda: False
    os.environ["CUDA_VISIBLE_DEVICES"] = (VISIBLE or "") if wants_gpu else ""
    if wants_gpu and VISIBLE is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]


def pytest_terminal_summary(terminalreporter):
    """Last of all: how many attempts on its security were held, and what came of mutated files."""
    reports = [r for r in terminalreporter.getreports("passed") if r.when == "call"]
    failed = terminalreporter.getreports("failed")
    attempts = [r for r in (*reports, *failed) if r.nodeid.startswith("tests/security/")]
    if attempts:
        held = sum(r in reports for r in attempts)
        terminalreporter.write_line(f"security: {len(attempts)} attempts, {held} held")
    for report in (*reports, *failed):
        for _, figures in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.split('/')[1]}: {figures}")


@pytest.fixture
def as_if_cuda(monkeypatch):
    """Tensors of the CPU that say they are a GPU's: the branches for it, with numbers."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_signals():
    """A command that was run here leaves none of its handlers."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._State.asked, signals._State.launcher = 0, None


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Tokenised pairs of the tests do not land in the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory):
    """Mistral-7B-v0.1's tokenizer: its bare model file, and a configuration naming the class."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("mistral")
    packaged = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    with importlib.resources.as_file(packaged) as path:
        shutil.copy(path, folder / "tokenizer.model")
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    adds = {"add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks | adds))
    return LlamaTokenizer.from_pretrained(folder)
