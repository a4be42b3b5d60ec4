"""What each idea of the trainer is worth: all of them on, and each of them off.

    python benchmarks/ablation.py --output benchmarks/results/ablation.md

The same model and rows as in `compare_trl.py`; every variant in a fresh process, round after round.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
from head import plain_logps

ALL_ON = "all on"
WHOLE_STEP = 10**6  # tokens a micro-batch
VARIANTS: dict[str, dict[str, Any]] = {
    ALL_ON: {},
    "prompt not shared: padded rows": {"model__attention": "padded"},
    "PEFT's and transformers' layers": {"model__lean_layers": False},
    "checkpointing": {"train__gradient_checkpointing": True},
    "micro-batches of 1 pair": {"train__tokens_per_microbatch": 1},
    "micro-batches of 16 pairs": {"train__tokens_per_microbatch": WHOLE_STEP},
    "micro-batches of 16 pairs, padded rows": {
        "train__tokens_per_microbatch": WHOLE_STEP,
        "model__attention": "padded",
    },
}


def run_full_logits(race: common.Race, task: common.Task, **keys: Any) -> dict[str, Any]:
    """Ours with the logits of all scored tokens at once, and autograd through log-softmax."""

    def head(hidden: Any, weight: Any, targets: Any, bias: None, **transform: Any) -> Any:
        return plain_logps(hidden, weight, targets)

    with patch("dpo.model.scorer.token_logps", head):
        return common.run_ours(race, task, **keys)


def list_variants(task: common.Task, budget: int) -> dict[str, common.Side]:
    """The variants by name; each call runs one in a process of its own."""
    base = {"train__tokens_per_microbatch": budget, "reference__cache": "off"}
    measure = common.measure
    return {
        **{
            name: partial(measure, common.run_ours, task, **(base | keys))
            for name, keys in VARIANTS.items()
        },
        "full logits instead of tiles and J": partial(measure, run_full_logits, task, **base),
        "reference cached": partial(measure, common.run_cached, task, **base),
    }


def main() -> None:
    """Measures, reports."""
    flags = common.parser(str(__doc__))
    common.add_task_flags(flags)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = common.prepare(args, Path(folder))
        variants = list_variants(task, args.tokens_per_microbatch)
        counted = {name: variant(counts_flops=True) for name, variant in variants.items()}
        rounds = common.interleave(variants, args.rounds)
        bases = {"x all on": ALL_ON}
        report = f"""# Each idea off

{common.provenance(args.threads, ["torch", "transformers", "peft", "accelerate"])}

{common.race_table(task, common.clock(args), counted, rounds, bases)}

All on: prompt shared, head in tiles with J, no checkpointing, micro-batches of at most
{args.tokens_per_microbatch} tokens, reference recomputed in every step.
{common.describe(args, task)}
"""
    common.publish(report, args.output)


if __name__ == "__main__":
    main()
