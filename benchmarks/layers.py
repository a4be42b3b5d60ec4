"""What a decoder layer keeps for its backward, and how fast a step is, lean layers on and off.

    python benchmarks/layers.py --output benchmarks/results/layers.md

Bytes are counted at the shape of Mistral-7B in bfloat16 with the article's LoRA, on fake tensors,
of which as much is kept. Speed and resident size are those of the trainer on the model of
`compare_trl.py`, in fresh processes, round after round.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from transformers import MistralConfig

from dpo.config import Config
from dpo.data.stream import build_stream
from dpo.plan.fake import FakePolicy

MISTRAL_7B = MistralConfig(num_hidden_layers=2, vocab_size=32000, sliding_window=None)
LENGTHS = (247, 204, 204)  # of prompt, chosen and rejected answer: means of the whole data set
PEFT, LEAN = "PEFT's and transformers' layers", "lean layers"


def fake_policy(folder: Path, *, lean: bool, dropout: float) -> FakePolicy:
    """Two layers of Mistral-7B with the article's adapter."""
    MISTRAL_7B.save_pretrained(folder)
    config = Config()
    config.model.name_or_path, config.model.quantization = str(folder), "none"
    config.model.lean_layers, config.lora.dropout = lean, dropout
    return FakePolicy(config)


def saved_per_token(fake: FakePolicy, *, autocast: bool = False) -> float:
    """Bytes that the second layer keeps of each token; each tensor once, weights not at all.

    Copies of an adapter's weights in the model's type count as weights: they do not grow with the
    tokens, and serve all micro-batches of a step.
    """
    layer: Any = fake.base.model.layers[1]  # type: ignore[union-attr,index]
    sizes: dict[int, int] = {}
    own = {tuple(p.shape) for p in fake.base.parameters()}
    weights = own | {shape[::-1] for shape in own}  # copies in another type, transposed ones
    held = []  # keeps each storage alive, else the next one may get its address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights:
            held.append(tensor)
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    handles = [
        layer.register_forward_pre_hook(lambda *_: hooks.__enter__()),
        layer.register_forward_hook(lambda *_: hooks.__exit__(None, None, None)),
    ]
    prompt, chosen, rejected = LENGTHS
    with fake.mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stream = build_stream([([3] * prompt, [5] * chosen, [6] * rejected)])
        fake.scorer(stream)
    for handle in handles:
        handle.remove()
    return sum(sizes.values()) / len(stream.input_ids)


def count_bytes() -> dict[tuple[str, float], float]:
    """KiB a token and layer, by kind of layers and LoRA's dropout."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dropout in (0.0, 0.05):
            for name, lean, autocast in (
                (f"{PEFT}, bfloat16", False, False),
                (f"{PEFT}, autocast", False, True),
                (LEAN, True, False),
            ):
                fake = fake_policy(Path(folder), lean=lean, dropout=dropout)
                found[name, dropout] = saved_per_token(fake, autocast=autocast) / 1024
    return found


def race(args: argparse.Namespace) -> str:
    """The table of speed and resident size, and what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        task = common.prepare(args, Path(folder))
        keys = {
            "train__tokens_per_microbatch": args.tokens_per_microbatch,
            "reference__cache": "off",
        }
        sides: dict[str, common.Side] = {
            name + (f", dropout {dropout:g}" if dropout else ""): partial(
                common.measure,
                common.run_ours,
                task,
                model__lean_layers=name == LEAN,
                lora__dropout=dropout,
                **keys,
            )
            for dropout in (0.0, 0.05)
            for name in (PEFT, LEAN)
        }
        counted = {name: side(counts_flops=True) for name, side in sides.items()}
        rounds = common.interleave(sides, args.rounds)
        bases = {"x PEFT's": PEFT, "x PEFT's with dropout": f"{PEFT}, dropout 0.05"}
        rows = common.race_table(task, common.clock(args), counted, rounds, bases)
        return f"{rows}\n\n{common.describe(args, task)}"


def main() -> None:
    """Measures, reports."""
    flags = common.parser(str(__doc__))
    common.add_task_flags(flags)
    args = flags.parse_args()
    kept = count_bytes()
    names = dict.fromkeys(name for name, _ in kept)
    rows = [[name, *(f"{kept[name, dropout]:.1f}" for dropout in (0.0, 0.05))] for name in names]
    head = ["KiB a token and layer", "without dropout", "LoRA dropout 0.05"]
    report = f"""# Lean layers

{common.provenance(args.threads, ["torch", "transformers", "peft", "accelerate"])}

{common.table(head, rows)}

Mistral-7B's shape, LoRA r 16 on all linear layers, one pair of {LENGTHS} tokens in the shared
layout on a CPU. Every tensor that is kept counts once, weights and adapters not at all.

{race(args)}

saved activations per token per layer: {kept[LEAN, 0.0]:.1f} KiB (PEFT + autocast: \
{kept[f"{PEFT}, autocast", 0.0]:.1f} KiB)
"""
    common.publish(report, args.output)


if __name__ == "__main__":
    main()
