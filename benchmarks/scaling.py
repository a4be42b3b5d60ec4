"""The cost model from 1 GPU to 1,024: arithmetic on shapes and data sheets, nothing of it measured.

Activations and weights are those of the project's own code, run on fake tensors of a few layers and
extrapolated to all; FLOPs are `dpo.plan.flops`. The rest is assumed, and printed with the
tables: one share of the peak, one bandwidth, weights sharded over all GPUs (FSDP2), gathered a
layer at a time while the one before computes. The trainer itself runs DDP today.

python benchmarks/scaling.py [--output benchmarks/results/scaling.md]
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dpo.cli import parse
from dpo.data.stream import build_stream
from dpo.plan.fake import FakePolicy
from dpo.plan.fit import Saving
from dpo.plan.flops import Costs, costs, work
from dpo.plan.plan import given_lengths

PEAK_TFLOPS, MFU = 989, 0.4  # H100, bfloat16; the share is an assumption
GIB = 2**30
MEMORY_GIB = 80
BANDWIDTH = 50e9  # bytes a second and GPU between nodes: 400 Gbit/s
PAIRS_PER_RANK, BALANCE = 16, 0.995  # benchmarks/balance.py
TOKENS = 4096  # of a micro-batch
LENGTHS = (244, 195, 334)  # means of the committed table
NUM_PAIRS = 100_000_000
NUM_GPUS = (1, 8, 64, 512, 1024)
PROBED_LAYERS = (2, 4)
SHAPES = {
    "Mistral-7B": (4096, 14336, 32, 32, 8, 32000),
    "70B (Llama 3)": (8192, 28672, 80, 64, 8, 128256),
    "405B (Llama 3)": (16384, 53248, 126, 128, 8, 128256),
}


@dataclass(frozen=True)
class Model:
    """What the model of one shape takes and costs, LoRA r=16 over bfloat16 weights.

    Attributes:
        base, adapter, layer, head: bytes of weights.
        activations: bytes a token; without checkpointing, and with every layer checkpointed.
        flops: of a pair; with a live reference, and with a cached one.
    """

    base: int
    adapter: int
    layer: int
    head: int
    activations: tuple[float, float]
    flops: tuple[float, float]


def main() -> None:
    """Prints the tables, and writes them where --output says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    models = {name: measure(shape) for name, shape in SHAPES.items()}
    text = "\n".join([*assumptions(), *memory_table(models), *time_table(models), *data_table()])
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def measure(shape: tuple[int, ...]) -> Model:
    """Measures two shallow models of the shape; every further layer costs what the last one did."""
    shallow, deeper = (Probe(shape, layers) for layers in PROBED_LAYERS)
    more = (shape[2] - PROBED_LAYERS[0]) / (PROBED_LAYERS[1] - PROBED_LAYERS[0])

    def at_depth(name: str) -> float:
        low, high = getattr(shallow, name), getattr(deeper, name)
        return low + more * (high - low)

    whole = Costs(
        linear=at_depth("linear"),
        adapter=at_depth("adapter_flops"),
        attention=at_depth("attention"),
        head=deeper.costs.head,
        trains_base=False,
    )
    prompt, chosen, rejected = LENGTHS
    its_work = work(
        build_stream([([0] * prompt, [1] * chosen, [2] * rejected)]).segments, chosen + rejected
    )
    return Model(
        base=int(at_depth("base")),
        adapter=int(at_depth("adapter")),
        layer=(deeper.base - shallow.base) // (PROBED_LAYERS[1] - PROBED_LAYERS[0]),
        head=2 * shape[0] * shape[5],
        activations=(at_depth("activations"), at_depth("checkpointed")),
        flops=(
            whole.flops(its_work).total,
            whole.flops(its_work, live_reference=False).total,
        ),
    )


class Probe:
    """A model of the shape with few layers, on fake tensors."""

    def __init__(self, shape: tuple[int, ...], layers: int):
        hidden, intermediate, _, heads, kv_heads, vocabulary = shape
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
        }
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            flags = {"name_or_path": folder, "quantization": "none", "dtype": "bfloat16"}
            fake = FakePolicy(parse([f"--model.{key}={value}" for key, value in flags.items()]))
        self.costs = costs(fake.policy.model)
        self.base, self.adapter = fake.base_bytes(), fake.adapter_bytes()
        pairs = [*given_lengths(",".join(map(str, LENGTHS))).pairs] * 4
        tokens = sum(pair.num_stream_tokens for pair in pairs)
        self.activations = fake.step_bytes(pairs) / tokens
        Saving(1).apply(fake.scorer)
        self.checkpointed = fake.step_bytes(pairs) / tokens
        self.linear, self.adapter_flops = self.costs.linear, self.costs.adapter
        self.attention = self.costs.attention


def assumptions() -> list[str]:
    """The words above the tables."""
    return [
        "# From 1 GPU to 1,024: the cost model",
        "",
        "Arithmetic, not a measurement. LoRA r=16 on all linears over bfloat16 weights; H100, "
        f"{MEMORY_GIB} GB, {PEAK_TFLOPS} TFLOP/s of which {MFU:.0%} are reached; "
        f"{BANDWIDTH / 1e9:.0f} GB/s a GPU between nodes; weights sharded over all GPUs and "
        f"gathered a layer ahead; micro-batches of {TOKENS} tokens; {PAIRS_PER_RANK} pairs a GPU "
        f"and step, balanced to {BALANCE:.1%}; pairs of {LENGTHS} tokens (prompt, chosen, "
        "rejected).",
        "",
    ]


def per_gpu_gib(model: Model, gpus: int, activations: float) -> float:
    """GiB of shards, two gathered layers, the head, and the activations of a micro-batch.

    The adapter has gradients and two moments, all fp32 and sharded like it.
    """
    shards = (model.base + 4 * model.adapter) / gpus
    gathered = 0 if gpus == 1 else 2 * model.layer + model.head
    return (shards + gathered + activations * TOKENS) / GIB


def memory_table(models: dict[str, Model]) -> list[str]:
    """The GiB that a GPU needs, by number of GPUs."""
    lines = [
        "## Memory a GPU, GiB",
        "",
        "| model | weights, GiB | KiB a token | " + " | ".join(map(str, NUM_GPUS)) + " |",
        "|---" * (3 + len(NUM_GPUS)) + "|",
    ]
    for name, model in models.items():
        for activations, what in zip(model.activations, ("", ", checkpointed"), strict=True):
            needs = [per_gpu_gib(model, gpus, activations) for gpus in NUM_GPUS]
            fits = 0.9 * MEMORY_GIB
            cells = [f"{need:.0f}" if need < fits else f"({need:.0f})" for need in needs]
            lines.append(
                f"| {name}{what} | {model.base / GIB:.0f} | {activations / 1024:.0f} | "
                f"{' | '.join(cells)} |"
            )
    return [
        *lines,
        "",
        "In brackets: does not fit. A smaller micro-batch, checkpointing, NF4 or more GPUs help.",
        "",
    ]


def time_table(models: dict[str, Model]) -> list[str]:
    """Days for all pairs, and the time of the gathers over that of the compute that hides them."""
    lines = [
        f"## {NUM_PAIRS:,} pairs once, days, the reference cached",
        "",
        "| model | TFLOP a pair, live / cached | "
        + " | ".join(map(str, NUM_GPUS))
        + " | gathers / compute |",
        "|---" * (3 + len(NUM_GPUS)) + "|",
    ]
    for name, model in models.items():
        live, cached = model.flops
        rate = PEAK_TFLOPS * 1e12 * MFU * BALANCE
        days = [NUM_PAIRS * cached / rate / gpus / 86400 for gpus in NUM_GPUS]
        # Forward and backward of a micro-batch each gather all layers once.
        pairs = TOKENS / (sum(LENGTHS) - 2)
        gathers = 2 * model.base / BANDWIDTH / (pairs * cached / rate)
        cells = [f"{d:.3g}" for d in days]
        lines.append(
            f"| {name} | {live / 1e12:.0f} / {cached / 1e12:.0f} | "
            + " | ".join(cells)
            + f" | {gathers:.2f} |"
        )
    return [
        *lines,
        "",
        "Gathers / compute: above 1 the network is what is waited for; it falls in proportion to "
        "the tokens of a micro-batch. Filling the cache takes one forward of every pair, half of "
        "the days above.",
        "",
    ]


def data_table() -> list[str]:
    """The bytes that grow with the number of pairs."""
    prompt, chosen, rejected = LENGTHS
    parts = [
        ("tokens on disk, int32", 4 * (prompt + chosen + rejected) + 32),
        ("reference cache on disk, fp32", 4 * (chosen + rejected) + 24),
        ("index of the cache in memory, a process", 32),
        ("order of an epoch in memory, a process", 4),
    ]
    lines = [
        f"## What grows with the pairs, at {NUM_PAIRS:,}",
        "",
        "| what | bytes a pair | GB |",
        "|---|---|---|",
        *(f"| {name} | {size:,} | {size * NUM_PAIRS / 1e9:,.1f} |" for name, size in parts),
    ]
    return lines


if __name__ == "__main__":
    main()
