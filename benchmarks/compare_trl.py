"""Our trainer against TRL's, as their users start them: the same weights, rows and steps.

Ours is the command that README prints, through `accelerate launch`, with no key beside model, rows,
steps and folder; TRL's is a script that plain Python runs. Each run is a fresh process that is
watched from outside: the time between the first logged step and the last, and the resident size.
Round after round, so that a machine that slows down slows all of them. `--model` and `--rows`
compare on a real model and real rows.

Before any time counts, all sides must log the same log-probs on their first step. FLOPs are counted
in runs of their own, in which one adapter and the gradient norm must be the same as well.

    pip install -e '.[peers]'
    python benchmarks/compare_trl.py --output benchmarks/results/compare_trl.md
    python benchmarks/compare_trl.py --model SmolLM2-135M-Instruct --rows orca_dpo_pairs.jsonl
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import datasets
import peft
import psutil
import torch
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
- Ours: `accelerate launch {launch} scripts/train.py {keys}`. It is run twice: the second run finds
  the reference's log-probs, as a sweep over beta or the learning rate does. TRL: `python SCRIPT`.
- Threads are those that each side takes if nobody sets them.
- TRL, defaults: activation checkpointing, and 4 pairs a batch, padded to the longest of its 8 rows.
  Not its defaults: fp32 (it would take bf16), accumulation to {pairs} pairs, max_length 1536.
- Tuned by hand: 1 pair a batch, {pairs} accumulations, no checkpointing.
- Answers end with the token that ends them: TRL alone would score a line break behind it too.
- On a CPU, TRL's head scores prompt and padding too; on a GPU it scores answers alone.
"""
ROOT = Path(__file__).parents[1]
# One process; the others name accelerate's defaults, about which it would print a page.
LAUNCH = (
    "--quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
).split()


def run_trl(
    race: Any, task: common.Task, *, on_gpu: bool = False, dropout: float = 0.0, **options: Any
) -> Any:
    """TRL's trainer over the task. `options` are those of its configuration.

    On a GPU: bfloat16, its default, on an NF4 base, with the article's optimizer and dropout.
    """
    from trl import DPOConfig, DPOTrainer

    ours = common.our_config(task)
    rows = datasets.Dataset.from_json(ours.data.name_or_path, keep_in_memory=True)
    args = DPOConfig(
        output_dir=str(task.folder / "trl"),
        gradient_accumulation_steps=(task.pairs_per_step // options["per_device_train_batch_size"]),
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
            lora_dropout=0.05 if on_gpu else dropout,
            target_modules=ours.lora.target_modules,
        ),
        callbacks=[_Reports(race)],
    )
    end = trainer.processing_class.eos_token_id
    trainer.train_dataset = trainer.train_dataset.map(partial(up_to_the_end, end=end))
    trainer.train()
    return race.result(trainer.state.log_history)


def up_to_the_end(row: dict[str, Any], end: int) -> dict[str, Any]:
    """A row of TRL's without what its template writes after the token that ends an answer.

    TRL scores the line break that ChatML has there; we stop where generation does.
    """
    found = {}
    for name in ("chosen_ids", "rejected_ids"):
        ids = row[name]
        found[name] = ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids
    return row | found


class _Reports(TrainerCallback):
    """Reports each step once it is logged, which is the last thing that a step does."""

    def __init__(self, race: common.Race):
        self._race = race

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._race.start(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:  # else the summary at the end
            self._race.finish_step(state.global_step)


@dataclass(frozen=True)
class Command:
    """A side as its users start it: words, and the file that gets a line with each logged step."""

    words: list[str]
    metrics: Path


class StepLog:
    """What `run_trl` reports to in a process of its own: a line of a file for each step."""

    def __init__(self, file: Path):
        self._file = file

    def num_steps(self, task: common.Task) -> int:
        """All steps of the task."""
        return task.num_steps

    def start(self, model: Any) -> None:
        """Says how many threads there are."""
        self._write({"threads": torch.get_num_threads()})

    def finish_step(self, step: int) -> None:
        """Is called after each step and its logging."""
        self._write({"step": step})

    def result(self, logged: list[dict[str, Any]]) -> None:
        """Writes what the first step logged, under our names; it is no step of its own."""
        first = {f"train/{name}": value for name, value in logged[0].items()}
        self._write(first)

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def our_keys(task: common.Task) -> list[str]:
    """What a user gives beside `scripts/train.py`, but for the folder of the run."""
    keys = ["--model.name_or_path", str(task.folder / "model")]
    keys += ["--data.name_or_path", str(task.folder / "rows.jsonl")]
    keys += ["--train.max_steps", str(task.num_steps)]
    if task.pairs_per_step != common.PAIRS_PER_STEP:
        keys += ["--train.per_device_train_batch_size", str(task.pairs_per_step)]
    return keys


def our_command(task: common.Task, name: str) -> Command:
    """Ours; two commands of one round share a folder of caches, so the second one finds logps."""
    out = task.folder / "runs" / name
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", *LAUNCH]
    words = [*launch, "scripts/train.py", *our_keys(task), "--train.output_dir", str(out)]
    return Command(words, out / "metrics.jsonl")


def their_command(task: common.Task, name: str) -> Command:
    """TRL, by this file."""
    file = task.folder / "runs" / f"{name}.jsonl"
    words = [sys.executable, __file__, "--run-side", name, "--folder", str(task.folder)]
    return Command([*words, "--pairs-per-step", str(task.pairs_per_step)], file)


def watch(command: Command, caches: Path) -> dict[str, Any]:
    """Runs a command: seconds from its first logged step to its last, and in all; its peak RSS."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"HF_HOME": str(caches), "TOKENIZERS_PARALLELISM": "false"}
    began, seen, peak = time.perf_counter(), [], 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command.words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            seen += [time.perf_counter()] * (len(steps_in(command.metrics)) - len(seen))
            peak = max(peak, resident(process.pid))
            time.sleep(0.02)
        output.seek(0)
        said = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command.words)} failed:\n{said[-3000:]}")
    logged = [json.loads(line) for line in command.metrics.read_text().splitlines()]
    return {
        "wall": seen[-1] - seen[0],
        "all": time.perf_counter() - began,
        "peak": peak,
        "logged": logged,
        "said": said,
    }


def steps_in(file: Path) -> list[dict[str, Any]]:
    """The lines of training steps that a side has logged so far."""
    whole = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line for line in map(json.loads, whole) if "step" in line and "eval/loss" not in line]


def resident(pid: int) -> int:
    """Bytes of the largest of a process and those that it has started."""
    try:
        main = psutil.Process(pid)
        return max(p.memory_info().rss for p in (main, *main.children(recursive=True)))
    except psutil.Error:  # it has just ended
        return 0


def threads_of(run: dict[str, Any]) -> str:
    """The threads that a side has taken: of ours the header says it, of TRL's its log."""
    found = re.search(r"CPU, (\d+) thread", run["said"])
    return found[1] if found else str(run["logged"][0]["threads"])


def race_commands(task: common.Task, rounds: int) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Every side in turn, then every side again; each round has caches of its own.

    Returns:
        The runs by side, and by how many nats a token their first steps differ.
    """
    worst = 0.0
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        caches = task.folder / f"caches-{number}"
        shutil.rmtree(task.folder / "runs", ignore_errors=True)
        (task.folder / "runs").mkdir()
        ours = {OURS: our_command(task, "one"), CACHED: our_command(task, "two")}
        for name, command in (ours | {n: their_command(task, n) for n in TRL_SIDES}).items():
            results.setdefault(name, []).append(run := watch(command, caches))
            print(f"round {number + 1}: {name}: {run['wall']:.1f} s", file=sys.stderr)
        last = {name: runs[-1] for name, runs in results.items()}
        worst = max(worst, check_first_logps(task, last))
    return results, worst


def without_prefix(line: dict[str, Any]) -> dict[str, Any]:
    """A line of ours under TRL's names."""
    return {name.removeprefix("train/"): value for name, value in line.items()}


def worst_nats(task: common.Task, first: dict[str, dict[str, Any]]) -> float:
    """How far the first real steps of all sides are from ours, in nats a token of the answers."""
    lengths = task.lengths[: task.pairs_per_step]
    tokens = {"logps/chosen": [n[1] for n in lengths], "logps/rejected": [n[2] for n in lengths]}
    return max(
        abs(line[name] - first[OURS][name]) / statistics.mean(tokens[name])
        for line in first.values()
        for name in tokens
    )


def check_first_logps(task: common.Task, runs: dict[str, dict[str, Any]]) -> float:
    """Ends the script unless the first step's log-probs agree; the worst difference a token."""
    lines = {
        name: next(line for line in run["logged"] if "train/logps/chosen" in line)
        for name, run in runs.items()
    }
    worst = worst_nats(task, {name: without_prefix(line) for name, line in lines.items()})
    if not worst <= 1e-4:
        sys.exit(f"the first step differs by {worst:.2g} nats a token: times would mean nothing")
    return worst


def command_table(task: common.Task, results: dict[str, list[dict[str, Any]]]) -> str:
    """One row a side."""
    measured = len(task.lengths) - task.pairs_per_step
    speeds = {name: [measured / run["wall"] for run in runs] for name, runs in results.items()}
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    head = ["", "threads", "pairs/s", *BASES, "whole command, s", "peak RSS, MiB"]
    rows = [
        [
            name,
            threads_of(runs[0]),
            common.median_and_range(speeds[name]),
            *(f"{speed[name] / speed[base]:.2f}" for base in BASES.values()),
            common.median_and_range([run["all"] for run in runs]),
            common.median_and_range([run["peak"] / 2**20 for run in runs]),
        ]
        for name, runs in results.items()
    ]
    return common.table(head, rows)


def real_task(
    folder: Path, model: Path, rows: Path, pairs: int, pairs_per_step: int
) -> common.Task:
    """The first rows that fit, as messages, which both trainers read alike."""
    (folder / "model").symlink_to(model.resolve())
    tokenizer = AutoTokenizer.from_pretrained(model)
    kept, lengths = [], []
    for row in map(json.loads, rows.read_text().splitlines()):
        said = [{"role": "system", "content": row["system"]}] if row["system"] else []
        said.append({"role": "user", "content": row["question"]})
        answers = [[{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        both = [tokenizer.apply_chat_template(said + a, return_dict=False) for a in answers]
        fits = len(ids) <= common.MAX_PROMPT_LENGTH and max(map(len, both)) <= common.MAX_LENGTH
        if fits and answers[0] != answers[1] and len(kept) < pairs:
            kept.append({"prompt": said, "chosen": answers[0], "rejected": answers[1]})
            lengths.append([len(ids), *(len(one) - len(ids) for one in both)])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    task = common.Task(folder, lengths, pairs_per_step, has_tiny_rows=False)
    return replace(task, lengths=[lengths[i] for i in task.order])  # as training sees them


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
    ours = sides[OURS]["logged"][common.WARM_UP_STEPS]
    nats = worst_nats(task, {n: side["logged"][common.WARM_UP_STEPS] for n, side in sides.items()})
    norm = 0.0
    for name, side in sides.items():
        if side["adapter"] != sides[OURS]["adapter"]:
            sys.exit(f"{name}: its adapter starts from other weights than ours")
        its = side["logged"][common.WARM_UP_STEPS]
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
    """Checks, measures, reports; or runs one side of TRL's."""
    flags = common.parser(str(__doc__))
    common.add_task_flags(flags)
    flags.add_argument("--model", type=Path, help="a real model's folder, with --rows")
    flags.add_argument("--rows", type=Path, help="real rows, in the format of orca_dpo_pairs")
    flags.add_argument("--pairs-per-step", type=int, default=common.PAIRS_PER_STEP)
    flags.add_argument("--run-side", choices=TRL_SIDES, help=argparse.SUPPRESS)
    flags.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if not find_spec("trl"):
        print("TRL is not installed: pip install -e '.[peers]'", file=sys.stderr)
        sys.exit(2)
    if args.run_side:
        run_one(args)
        return
    packages = ["torch", "transformers", "peft", "accelerate", "trl"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model:
            task = real_task(folder, args.model, args.rows, args.pairs, args.pairs_per_step)
            what = f"{args.model.name}, fp32, on real rows of `{args.rows.name}`"
        else:
            task = common.Task(
                folder, common.draw_lengths(args.pairs, args.scale), has_tiny_rows=False
            )
            task.write(args.layers)
            what = (
                f"Mistral's architecture, {args.layers} layers of 384 (MLP 1344, 6 heads of 64, 2 "
                f"for keys), vocabulary {common.VOCAB}, fp32; lengths of `orca_lengths.json`"
            )
        results, worst = race_commands(task, args.rounds)
        means = [statistics.mean(n) for n in zip(*task.lengths, strict=True)]
        keys = " ".join(our_keys(task)).replace(f"{folder}/", "") + " --train.output_dir OUT"
        notes = NOTES.format(launch=" ".join(LAUNCH), keys=keys, pairs=task.pairs_per_step)
        report = f"""# Against TRL

{common.provenance(os.cpu_count() or 1, packages)}

{command_table(task, results)}

{what}. Median (lowest to highest) of {args.rounds} interleaved rounds, wall time from the end of \
the first step to that of the last of {task.num_steps}: {len(task.lengths) - task.pairs_per_step} \
pairs in steps of {task.pairs_per_step}; on average {means[0]:.0f} prompt, {means[1]:.0f} chosen \
and {means[2]:.0f} rejected tokens. LoRA r 16 on all linear layers, dropout 0.05. Peak RSS: of the \
largest process, read from outside. The first step's log-probs were within {worst:.1e} nats a token.

{notes}"""
        if not args.model:
            report += f"\n{counted_table(args, folder)}"
    common.publish(report, args.output)


def counted_table(args: argparse.Namespace, folder: Path) -> str:
    """FLOPs and tokens a pair, counted in one step; the sides agree to the gradient norm."""
    (folder / "counted").mkdir()
    task = common.prepare(args, folder / "counted")
    sides = list_sides(task, args.tokens_per_microbatch)
    counted = {name: side(counts_flops=True) for name, side in sides.items()}
    agreement = check_agreement(counted, task)
    pairs = common.PAIRS_PER_STEP
    rows = [
        [name, f"{run['flops'] / pairs / 1e9:.1f}", f"{run['tokens'] / pairs:.0f}"]
        for name, run in counted.items()
    ]
    table = common.table(["", "GFLOP a pair", "tokens a pair"], rows)
    return f"{table}\n\nCounted in one step of {pairs} pairs, without dropout. {agreement}\n"


def run_one(args: argparse.Namespace) -> None:
    """Runs one side of TRL's, for a parent that watches its file."""
    rows = (args.folder / "rows.jsonl").read_text().splitlines()
    task = common.Task(
        args.folder, [[0, 0, 0]] * len(rows), args.pairs_per_step, has_tiny_rows=False
    )
    log: Any = StepLog(args.folder / "runs" / f"{args.run_side}.jsonl")
    run_trl(log, task, dropout=0.05, **TRL_SIDES[args.run_side])


if __name__ == "__main__":
    main()
