"""Speed, and where the time goes, measured without making the host wait for the device."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


class Stopwatch:
    """Measures seconds by part; on a GPU between two events on the device, read at `pop`.

    Call `pop` after a step's gradient norm was read, when the device has passed all events.
    """

    def __init__(self, device: torch.device):
        self.device, self._has_events = device, device.type == "cuda"
        self._spans: list[tuple[str, float, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Times the block as part `name`; `on_host` is for work without the device."""
        if self._has_events and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._spans.append((name, began, time.perf_counter()))

    def pop(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            seconds[name] = seconds.get(name, 0.0) + end - start
        for name, before, after in self._events:
            seconds[name] = seconds.get(name, 0.0) + before.elapsed_time(after) / 1000
        self._spans, self._events = [], []
        return seconds


@dataclass
class LoggingInterval:
    """What is measured between two logs, besides the metrics of pairs.

    Args:
        stopwatch: times the parts `reference` and `data`; the rest is the `step` itself.
        peak_tflops: dense TFLOP/s of one device, if known.

    Attributes:
        flops: FLOPs of this rank's micro-batches, added as they are computed.
    """

    stopwatch: Stopwatch
    peak_tflops: float | None = None
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    pairs: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    _last: float = field(default_factory=time.perf_counter)

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the measurement."""
        self._last = time.perf_counter()

    def add(self, pairs: int, tokens: int) -> None:
        """Counts one step that has just ended: pairs and tokens of all ranks."""
        now = time.perf_counter()
        self.pairs, self.tokens = self.pairs + pairs, self.tokens + tokens
        self.seconds, self._last = self.seconds + now - self._last, now

    def pop(self) -> dict[str, float]:
        """The metrics of the interval; starts a new one."""
        parts = self.stopwatch.pop()
        shares = {name: parts.get(name, 0.0) / self.seconds for name in ("reference", "data")}
        tflops = self.flops / self.seconds / 1e12
        metrics = {
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens_per_second": self.tokens / self.seconds,
            "pairs_per_second": self.pairs / self.seconds,
            "model_tflops": tflops,
            **({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {}),
            "memory_gib": peak_memory_gib(self.stopwatch.device),
            **{f"time/{name}": share for name, share in shares.items()},
            "time/step": 1 - sum(shares.values()),
        }
        self.pairs, self.tokens, self.flops, self.seconds = 0, 0, 0.0, 0.0
        return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
