"""Our trainer against TRL's: the same weights, adapter, rows and steps, and how fast each goes.

Before any time counts, all sides must log the same log-probs and gradient norm on the first step of
real pairs. (The step before it is a warm-up of tiny pairs, at learning rate 0.) Each side runs in a
fresh process, round after round, so that a machine that slows down slows all of them.

    pip install -e '.[peers]'
    python benchmarks/compare_trl.py --output benchmarks/results/compare_trl.md
"""

import statistics
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import datasets
import peft
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

DEFAULTS, TUNED = "TRL, defaults", "TRL, tuned by hand"
OURS, CACHED = "ours", "ours, cached reference"
TRL_SIDES: dict[str, dict[str, Any]] = {
    DEFAULTS: {"per_device_train_batch_size": 4},
    "TRL, checkpointing off": {"per_device_train_batch_size": 4, "gradient_checkpointing": False},
    TUNED: {"per_device_train_batch_size": 1, "gradient_checkpointing": False},
}
BASES = {"x defaults": DEFAULTS, "x tuned": TUNED}
NOTES = """\
- TRL, defaults: activation checkpointing, and 4 pairs a batch, padded to the longest of its 8 rows.
  Not its defaults: fp32 (it would take bf16), accumulation to steps of 16 pairs, max_length 1536.
- Tuned by hand: 1 pair a batch, 16 accumulations, no checkpointing. Ours: {budget} tokens a batch.
- All sides recompute the reference in every step, but for the last: its log-probs lie on disk.
- On a CPU, TRL's head scores prompt and padding too; on a GPU it scores answers alone.
"""


def run_trl(
    race: common.Race, task: common.Task, *, on_gpu: bool = False, **options: Any
) -> dict[str, Any]:
    """TRL's trainer over the task. `options` are those of its configuration.

    On a GPU: bfloat16, its default, on an NF4 base, with the article's optimizer and dropout.
    """
    from trl import DPOConfig, DPOTrainer

    ours = common.our_config(task)
    rows = datasets.Dataset.from_json(ours.data.name_or_path, keep_in_memory=True)
    args = DPOConfig(
        output_dir=str(task.folder / "trl"),
        gradient_accumulation_steps=(
            common.PAIRS_PER_STEP // options["per_device_train_batch_size"]
        ),
        max_steps=race.num_steps(task),
        max_length=ours.data.max_length,
        train_sampling_strategy="sequential",  # the rows come in the order in which we see them
        learning_rate=ours.optim.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=ours.optim.warmup_steps,
        beta=ours.loss.beta,
        seed=ours.train.seed,  # draws lora_A
        bf16=on_gpu,
        use_cpu=not on_gpu,
        optim="paged_adamw_32bit" if on_gpu else "adamw_torch_fused",  # the latter: its default
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )
    how = {"dtype": "bfloat16", "quantization_config": nf4} if on_gpu else {"dtype": "float32"}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(ours.model.path, **how),
        args=args,
        train_dataset=rows.select(task.order),  # type: ignore[union-attr,arg-type]
        processing_class=AutoTokenizer.from_pretrained(ours.model.path),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=ours.lora.r,
            lora_alpha=int(ours.lora.alpha),
            lora_dropout=0.05 if on_gpu else ours.lora.dropout,
            target_modules=ours.lora.target_modules,
        ),
        callbacks=[_Reports(race)],
    )
    trainer.train()
    return race.result(trainer.state.log_history)


class _Reports(TrainerCallback):
    """Reports each step once it is logged, which is the last thing that a step does."""

    def __init__(self, race: common.Race):
        self._race = race

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._race.start(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:  # else the summary at the end
            self._race.finish_step(state.global_step)


def list_sides(task: common.Task, budget: int) -> dict[str, common.Side]:
    """The sides by name; each call runs one in a process of its own."""
    measure, ours = common.measure, {"train__tokens_per_microbatch": budget}
    return {
        **{name: partial(measure, run_trl, task, **keys) for name, keys in TRL_SIDES.items()},
        OURS: partial(measure, common.run_ours, task, reference__cache="off", **ours),
        CACHED: partial(measure, common.run_cached, task, **ours),
    }


def check_agreement(sides: dict[str, dict[str, Any]], task: common.Task) -> str:
    """Ends the script unless all sides start from one adapter and compute the same first step."""
    first = task.lengths[: common.PAIRS_PER_STEP]
    lengths = {"logps/chosen": [n[1] for n in first], "logps/rejected": [n[2] for n in first]}
    ours = sides[OURS]["logged"][common.WARM_UP_STEPS]
    nats = norm = 0.0
    for name, side in sides.items():
        if side["adapter"] != sides[OURS]["adapter"]:
            sys.exit(f"{name}: its adapter starts from other weights than ours")
        its = side["logged"][common.WARM_UP_STEPS]
        nats = max(nats, *(abs(its[k] - ours[k]) / statistics.mean(lengths[k]) for k in lengths))
        norm = max(norm, abs(its["grad_norm"] / ours["grad_norm"] - 1))
    if not (nats <= 1e-4 and norm <= 1e-3):
        sys.exit(
            f"the first step differs by {nats:.2g} nats per token and {norm:.2g} of the gradient "
            "norm, wanted at most 1e-4 and 1e-3: times would mean nothing"
        )
    return (
        f"Checked before any time counted: one adapter to the last bit, the first step's log-probs "
        f"within {nats:.1e} nats per token, its gradient norm within {norm:.1e} of itself."
    )


def main() -> None:
    """Checks, measures, reports."""
    flags = common.parser(str(__doc__))
    common.add_task_flags(flags)
    args = flags.parse_args()
    if not find_spec("trl"):
        print("TRL is not installed: pip install -e '.[peers]'", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        task = common.prepare(args, Path(folder))
        sides = list_sides(task, args.tokens_per_microbatch)
        counted = {name: side(counts_flops=True) for name, side in sides.items()}
        agreement = check_agreement(counted, task)
        rounds = common.interleave(sides, args.rounds)
        packages = ["torch", "transformers", "peft", "accelerate", "trl"]
        report = f"""# Against TRL

{common.provenance(args.threads, packages)}

{common.race_table(task, common.clock(args), counted, rounds, BASES)}

{common.describe(args, task)} {agreement}

{NOTES.format(budget=args.tokens_per_microbatch)}"""
    common.publish(report, args.output)


if __name__ == "__main__":
    main()
