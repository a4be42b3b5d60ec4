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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import datasets
import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from dpo.train.trainer import train

DEFAULTS, TUNED = "TRL, defaults", "TRL, tuned by hand"
OURS, CACHED = "ours", "ours, cached reference"
TRL_SIDES: dict[str, dict[str, Any]] = {
    DEFAULTS: {"per_device_train_batch_size": 4},
    "TRL, checkpointing off": {"per_device_train_batch_size": 4, "gradient_checkpointing": False},
    TUNED: {"per_device_train_batch_size": 1, "gradient_checkpointing": False},
}
NOTES = """\
- TRL, defaults: activation checkpointing, and 4 pairs a batch, padded to the longest of its 8 rows.
  Not its defaults: fp32 (it would take bf16), accumulation to steps of 16 pairs, max_length 1536.
- Tuned by hand: 1 pair a batch, 16 accumulations, no checkpointing. Ours: {budget} tokens a batch.
- All sides recompute the reference in every step, but for the last: its log-probs lie on disk.
- On a CPU, TRL's head scores prompt and padding too; on a GPU it scores answers alone.
"""


def run_trl(race: common.Race, task: common.Task, **options: Any) -> dict[str, Any]:
    """TRL's trainer over the task. `options` are those of its configuration."""
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
        seed=ours.train.seed,  # of lora_A
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(ours.model.name_or_path, dtype="float32"),
        args=args,
        train_dataset=rows.select(task.order),  # type: ignore[union-attr,arg-type]
        processing_class=AutoTokenizer.from_pretrained(ours.model.name_or_path),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=ours.lora.r,
            lora_alpha=int(ours.lora.alpha),
            lora_dropout=ours.lora.dropout,
            target_modules=ours.lora.target_modules,
        ),
        callbacks=[_Reports(race)],
    )
    trainer.train()
    return race.result(trainer.state.log_history)


class _Reports(TrainerCallback):
    """Logging is the last thing that a step does."""

    def __init__(self, race: common.Race):
        self._race = race

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._race.start(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:  # else the summary at the end
            self._race.finish_step(state.global_step)


def run_cached(race: common.Race, task: common.Task, **keys: Any) -> dict[str, Any]:
    """Our trainer, the reference's log-probs on disk after one run that is not measured."""
    keys["reference__cache"] = str(task.folder / "reference")
    if not (task.folder / "reference").exists():
        train(common.our_config(task, **keys))
        keys["train__output_dir"] = str(task.folder / "runs" / "second")
    return common.run_ours(race, task, **keys)


def run_side(name: str, task: common.Task, budget: int, **how: Any) -> dict[str, Any]:
    """One side, in a process of its own."""
    if name in TRL_SIDES:
        return common.measure(run_trl, task, **how, **TRL_SIDES[name])
    keys: dict[str, Any] = {"train__tokens_per_microbatch": budget}
    if name == CACHED:
        return common.measure(run_cached, task, **how, **keys)
    return common.measure(common.run_ours, task, reference__cache="off", **how, **keys)


def check_agreement(sides: dict[str, dict[str, Any]], task: common.Task) -> str:
    """Ends the script unless all sides have one adapter and compute one first step."""
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


def table(
    task: common.Task,
    clock: str,
    counted: dict[str, dict[str, Any]],
    rounds: dict[str, list[dict[str, Any]]],
) -> str:
    """One row a side."""
    pairs = len(task.lengths)
    speeds = {name: [pairs / run[clock] for run in runs] for name, runs in rounds.items()}
    growth = {name: [run["growth"] / 2**20 for run in runs] for name, runs in rounds.items()}
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    size = {name: statistics.median(values) for name, values in growth.items()}
    head = "|pairs/s|x defaults|x tuned|RSS growth, MiB|x defaults|GFLOP a pair".split("|")
    return common.table(
        head,
        [
            [
                name,
                common.spread(speeds[name]),
                f"{speed[name] / speed[DEFAULTS]:.2f}",
                f"{speed[name] / speed[TUNED]:.2f}",
                common.spread(growth[name]),
                f"{size[name] / size[DEFAULTS]:.2f}",
                f"{counted[name]['flops'] / min(pairs, common.PAIRS_PER_STEP) / 1e9:.1f}",
            ]
            for name in rounds
        ],
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
        sides = [*TRL_SIDES, OURS, CACHED]
        budget = args.tokens_per_microbatch
        counted = {side: run_side(side, task, budget, counts_flops=True) for side in sides}
        agreement = check_agreement(counted, task)
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                rounds[side].append(run_side(side, task, budget))
        report = f"""# Against TRL

{common.provenance(args.threads, "torch", "transformers", "peft", "accelerate", "trl")}

{table(task, common.clock(args), counted, rounds)}

{common.describe(args, task)} {agreement}

{NOTES.format(budget=budget)}"""
    common.publish(report, args.output)


if __name__ == "__main__":
    main()
