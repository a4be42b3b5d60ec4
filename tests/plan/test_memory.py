"""What is counted is what exists, and what is free minds every limit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo.data.stream import build_stream
from dpo.model.scorer import Scorer
from dpo.plan import memory
from dpo.plan.memory import PeakBytes, free_bytes, peak_bytes
from tests.models import tiny, with_lora

CPU = torch.device("cpu")


def allocate_and_free():
    """1000 floats; then 2000 at once; then 500: the peak is 2000 floats."""
    a = torch.zeros(1000)
    b = a + 1
    del a
    view = b[10:20]
    view.add_(1)  # neither a view nor writing in place is new memory
    del b, view
    torch.zeros(500)


def test_the_peak_is_the_most_that_existed_at_once():
    assert peak_bytes(CPU, allocate_and_free) == 8000


def test_tensors_without_numbers_are_counted_alike():
    with FakeTensorMode(), PeakBytes() as count:
        allocate_and_free()
    assert (count.peak, count.live) == (8000, 0)


def test_what_was_there_before_is_not_counted_but_its_gradient_is():
    weight = torch.ones(100, requires_grad=True)
    with PeakBytes() as count:
        with torch.no_grad():
            weight.mul_(2)
        (3 * weight).sum().backward()
    assert count.live == 400  # weight.grad
    assert 400 < count.peak <= 1300


def test_activations_grow_with_the_tokens_and_the_count_repeats_exactly():
    scorer = Scorer(with_lora(tiny()))

    def peak(pairs):
        stream = build_stream(
            [([n, *[1, 2, 3] * 20], [5] * 20 + [6], [7] * 21) for n in range(pairs)]
        )
        return peak_bytes(CPU, lambda: scorer(stream).sum().backward())

    peak(1)  # makes the gradients
    assert peak(4) == peak(4)
    assert 1.9 < peak(16) / peak(8) < 2.1


def test_free_memory_is_below_that_of_the_machine_and_of_the_control_groups(monkeypatch, tmp_path):
    """A limit of 300 bytes of which 100 are used, 40 of them reclaimable cache, leaves 240."""
    assert 0 < free_bytes(CPU) <= memory.psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("300\n")
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 60\ninactive_file 40\n")
    monkeypatch.setattr(memory, "_control_groups", lambda: [tmp_path])
    assert free_bytes(CPU) == 240
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 10**6


def test_the_own_control_group_and_those_around_it_are_found(monkeypatch, tmp_path):
    group = tmp_path / "batch" / "job"
    group.mkdir(parents=True)
    for folder in (group, group.parent):
        (folder / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/old\n0::/batch/job\n")
    monkeypatch.setattr(memory, "_MEMBERSHIP", membership)
    assert memory._control_groups() == [group, group.parent]
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "absent")
    assert memory._control_groups() == []


@pytest.mark.gpu
def test_the_allocator_counts_on_a_gpu():
    device = torch.device("cuda")
    made = []
    assert peak_bytes(device, lambda: made.append(torch.zeros(2**20, device=device))) == 4 * 2**20
    assert free_bytes(device) > 2**30
