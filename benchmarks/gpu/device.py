"""What all sides of the GPU benchmark share: the device, models of one shape, streams, rows."""

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import common
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from dpo.config import Config
from dpo.data.stream import Stream, build_stream
from dpo.model.load import Policy, build_policy, compile_layers
from dpo.model.reference import adapter_off
from dpo.model.scorer import Scorer
from dpo.plan.flops import costs, work

ARTICLE_PAIRS = 3200  # 200 steps of 16


@dataclass(frozen=True, eq=False)
class Setup:
    """A device, and a model that suits it.

    Attributes:
        device: where it is measured.
        shape: sizes of a layer and of the vocabulary.
        few_layers: enough to see how fast layers are, since all are alike.
        layers: layers of the whole model.
        budgets: tokens of a micro-batch.
        pairs: pairs of the recipe, without the warm-up.
        scale: factor on all lengths.
        product: rows and columns of the plain product.
    """

    device: torch.device
    shape: dict[str, int]
    few_layers: int
    layers: int
    budgets: tuple[int, ...]
    pairs: int
    scale: float
    product: int

    @property
    def is_gpu(self) -> bool:
        """Whether its numbers mean anything; a CPU only tries the scripts."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The device in words."""
        return torch.cuda.get_device_name() if self.is_gpu else "a CPU, in small: no measurement"


GPU = Setup(
    device=torch.device("cuda"),
    shape={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    few_layers=8,
    layers=32,
    budgets=(2048, 4096, 8192, 16384),
    pairs=64,
    scale=1.0,
    product=8192,
)
SMALL = Setup(
    device=torch.device("cpu"),
    shape={
        "vocab_size": common.VOCAB,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    few_layers=2,
    layers=2,
    budgets=(64, 128),
    pairs=32,
    scale=0.03,
    product=128,
)


class Row(NamedTuple):
    """A line of the table: what was measured, with its unit, and the value."""

    what: str
    value: str


def write(file: Path | None, row: Row, **details: Any) -> None:
    """Prints a row, and appends it to the file at once: the process may be killed."""
    print(f"{row.what}: {row.value}", flush=True)
    if file:
        with file.open("a") as lines:
            lines.write(json.dumps({**row._asdict(), **details}) + "\n")
            lines.flush()
            os.fsync(lines.fileno())


def wait(setup: Setup) -> None:
    """Waits until the device has done its work."""
    if setup.is_gpu:
        torch.cuda.synchronize()


def seconds(setup: Setup, work: Callable[[], object], times: int = 3) -> float:
    """Median of several runs after one that does not count; the device has finished each."""
    taken = []
    for _ in range(times + 1):
        wait(setup)
        start = time.perf_counter()
        work()
        wait(setup)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


@cache
def product_tflops(setup: Setup) -> float:
    """TFLOP/s of a plain product of bfloat16 matrices: what the device really reaches."""
    n = setup.product
    left, right = (torch.randn(n, n, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(setup, lambda: left @ right, times=20) / 1e12


def shape_of(setup: Setup, layers: int) -> MistralConfig:
    """The configuration of a model with this many layers."""
    return MistralConfig(
        **setup.shape,  # type: ignore[arg-type]
        num_hidden_layers=layers,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        dtype="bfloat16",
    )


def make_policy(
    setup: Setup, layers: int, *, lean: bool = True, nf4: bool = False, compiled: bool = False
) -> tuple[Policy, Scorer]:
    """The article's adapter on a base of random weights, made on the device; and its scorer."""
    torch.manual_seed(0)
    with torch.device(setup.device):
        base = MistralForCausalLM._from_config(shape_of(setup, layers), dtype=torch.bfloat16)
    base.train()
    if nf4:
        to_nf4(base)
    config = Config()
    config.model.name_or_path, config.model.lean_layers = "random", lean
    policy = build_policy(base, config)
    policy.model.to(setup.device)
    scorer = Scorer(policy.model)
    if compiled:  # after the scorer, whose probe must see the model's own errors
        compile_layers(base, setup.device)
    return policy, scorer


def to_nf4(base: nn.Module) -> None:
    """Quantises every linear layer but the head, as bitsandbytes does on loading."""
    for parent in [*base.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is nn.Linear and name != "lm_head":
                with torch.device("meta"):  # weights of its own would be drawn on the CPU
                    quantised = bitsandbytes.nn.Linear4bit(
                        layer.in_features,
                        layer.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                quantised.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4"
                )
                setattr(parent, name, quantised.to(layer.weight.device))


def make_streams(setup: Setup, budget: int, count: int = 1) -> list[Stream]:
    """Streams of random pairs with real lengths, each of at most `budget` tokens and nearly so."""
    draw, vocab = random.Random(0), setup.shape["vocab_size"]
    left = common.draw_lengths(142, setup.scale)
    streams = []
    for _ in range(count):
        pairs: list[tuple[list[int], ...]] = []
        tokens = 0
        for sizes in [*left]:
            if tokens + sum(sizes) - 2 <= budget:
                pairs.append(tuple([draw.randrange(3, vocab) for _ in range(n)] for n in sizes))
                tokens += sum(sizes) - 2
                left.remove(sizes)
        assert tokens > 0.9 * budget, (tokens, budget)
        streams.append(build_stream(pairs).to(setup.device))  # type: ignore[arg-type]
    return streams


def score_both(policy: Policy, scorer: Scorer, stream: Stream) -> Tensor:
    """Runs a micro-batch as training does: policy and reference, forward and backward."""
    logps = scorer(stream)
    with torch.no_grad(), adapter_off(policy):
        reference = scorer(stream)
    (logps - reference).sum().backward()
    return logps.detach()


def useful_flops(policy: Policy, stream: Stream) -> float:
    """FLOPs that the method asks for in a micro-batch, reference included."""
    return costs(policy.model).flops(work(stream.segments, len(stream.targets))).useful
