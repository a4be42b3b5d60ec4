"""What a run says of its speed is what it did, by counts that can be checked."""

import time

import pytest
import torch

from dpo.plan.flops import costs, work
from dpo.train.throughput import LoggingInterval, Stopwatch
from dpo.train.trainer import Run
from tests.train.runs import config, forget_accelerate, metrics, run

CPU = torch.device("cpu")
SHARES = ("train/time/reference", "train/time/data", "train/time/step")


def test_parts_are_timed_by_name_and_start_again():
    stopwatch = Stopwatch(CPU)
    for name, seconds in (("a", 0.02), ("b", 0.05), ("a", 0.02)):
        with stopwatch.part(name):
            time.sleep(seconds)
    seconds = stopwatch.pop()
    assert 0.04 <= seconds["a"] < 0.2
    assert 0.05 <= seconds["b"] < 0.2
    assert stopwatch.pop() == {}


def test_figures_of_a_window_are_its_counts_over_its_seconds(monkeypatch):
    """Two steps of 16 pairs, 1000 tokens and 3 TFLOP in 4 s, 1 s of it in the reference, 0.4 s in
    the data: 8 pairs, 500 tokens and 1.5 TFLOP a second, half of a peak of 3."""
    clock = iter([100.0, 101.0, 104.0])
    monkeypatch.setattr("dpo.train.throughput.time.perf_counter", lambda: next(clock))
    window = LoggingInterval(Stopwatch(CPU), peak_tflops=3.0, _last=100.0)
    next(clock)
    for _ in range(2):
        window.flops += 3e12
        window.add(16, 1000)
    window.stopwatch._spans = [("reference", 0.0, 1.0), ("data", 0.0, 0.4)]
    found = window.pop()
    assert found["pairs_per_second"] == 8
    assert found["tokens_per_second"] == 500
    assert found["model_tflops"] == 1.5
    assert found["mfu"] == 0.5
    assert [found[f"time/{name}"] for name in ("reference", "data", "step")] == pytest.approx(
        [0.25, 0.1, 0.65]
    )
    assert window.flops == window.pairs == window.tokens == 0


def test_without_a_known_peak_there_is_no_mfu():
    window = LoggingInterval(Stopwatch(CPU))
    window.add(1, 1)
    assert "mfu" not in window.pop()


def test_every_training_line_has_shares_of_time_that_make_a_whole(tmp_path):
    folder = run(config(tmp_path, "--train.peak_tflops", 0.05))
    for line in metrics(folder):
        assert sum(line[name] for name in SHARES) == pytest.approx(1)
        assert all(0 < line[name] < 1 for name in SHARES)
        assert line["train/mfu"] == pytest.approx(line["train/model_tflops"] / 0.05)


def test_the_flops_of_a_step_are_those_of_its_pairs_and_the_cached_reference_costs_none(tmp_path):
    """First the reference is computed, then found: counted by the planner's own formula."""
    flags = ["--reference.cache", tmp_path / "cache", "--train.tokens_per_microbatch", 300]
    totals = []
    for _ in range(2):
        forget_accelerate()
        made = Run(config(tmp_path, *flags, "--train.resume", "never"))
        made.tracker.close_bar()
        seen = []
        score = made.train_step.score

        def noted(stream, score=score, seen=seen):
            seen.append(stream)
            return score(stream)

        made.train_step.score = noted
        made.train_step(1)
        made.share_reference()
        by_part = [
            costs(made.models.policy.model).flops(work(s.segments, len(s.targets), "shared"))
            for s in seen
        ]
        totals.append((made.interval.flops, by_part))
    (computed, parts), (found, _) = totals
    assert computed == pytest.approx(sum(part.total for part in parts))
    assert found == pytest.approx(sum(part.total - part.reference for part in parts))
    assert 0.6 < found / computed < 0.75
