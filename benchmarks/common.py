"""What the benchmarks share: the rows, the model, fresh processes watched from outside, tables.

The model is random and small, with the shape of Mistral: the benchmarks measure how the work is
organised, not what is learnt. The rows are as long as real preference pairs (`orca_lengths.json`)
and made of random words of one token each.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from dpo.config import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from dpo.data.order import Order
from dpo.train.trainer import Run, train

VOCAB = 4096
MAX_PROMPT_LENGTH, MAX_LENGTH = 1024, 1536  # of the NeuralHermes article; longer rows are cut
PAIRS_PER_STEP = 16
WARM_UP_STEPS = 1  # of tiny pairs, at learning rate 0: the next step still sees the first weights
SAMPLE_SECONDS = 0.01  # between two readings of the resident size


Side = Callable[..., dict[str, Any]]  # what `measure` measures, or a call of it


@dataclass(frozen=True)
class Task:
    """A folder with a model and rows: tiny ones for the warm-up, then rows of these lengths.

    Without the tiny ones, the first step of the rows warms up.
    """

    folder: Path
    lengths: list[list[int]]
    pairs_per_step: int = PAIRS_PER_STEP
    has_tiny_rows: bool = True

    @property
    def num_rows(self) -> int:
        """Rows of the file, the warm-up's included."""
        tiny = WARM_UP_STEPS * self.pairs_per_step if self.has_tiny_rows else 0
        return len(self.lengths) + tiny

    @property
    def num_steps(self) -> int:
        """Steps of the run, the warm-up's included."""
        return -(-self.num_rows // self.pairs_per_step)

    @property
    def order(self) -> list[int]:
        """Row numbers in the order in which `Run` sees them, since it shuffles."""
        order = Order(self.num_rows, self.pairs_per_step, self.num_steps, TrainConfig().seed)
        return [i for step in range(1, self.num_steps + 1) for i in order.indices(step)]

    def write(self, layers: int) -> None:
        """Writes `model/` and `rows.jsonl`."""
        _write_model(self.folder / "model", layers)
        draw = random.Random(0)
        tiny = [[2, 3, 3]] * (self.num_rows - len(self.lengths))
        rows = {i: _row(draw, *n) for i, n in zip(self.order, tiny + self.lengths, strict=True)}
        lines = "".join(json.dumps(rows[i]) + "\n" for i in range(self.num_rows))
        (self.folder / "rows.jsonl").write_text(lines)


def draw_lengths(num_pairs: int, scale: float = 1.0) -> list[list[int]]:
    """Tokens of [prompt, chosen, rejected]: quantiles of the table by total, in a fixed order.

    So a few pairs have the means of the whole table (284 rows).
    """
    table = json.loads(Path(__file__).with_name("orca_lengths.json").read_text())["tokens"]
    cut = sorted(([min(p, MAX_PROMPT_LENGTH), c, r] for p, c, r in table), key=sum)
    drawn = [cut[(2 * i + 1) * len(cut) // (2 * num_pairs)] for i in range(num_pairs)]
    random.Random(0).shuffle(drawn)
    fitting = [[p, min(c, MAX_LENGTH - p), min(r, MAX_LENGTH - p)] for p, c, r in drawn]
    return [[max(2, round(n * scale)) for n in lengths] for lengths in fitting]


def _write_model(folder: Path, layers: int) -> None:
    tokens = ["</s>", "<pad>", "<unk>", *(f"t{i}" for i in range(3, VOCAB))]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1344,  # 3.5 x hidden, as in Mistral-7B
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    MistralForCausalLM(config).save_pretrained(folder)


def _row(draw: random.Random, prompt: int, chosen: int, rejected: int) -> dict[str, str]:
    """Both trainers append the token that ends an answer; a space separates it from the prompt."""

    def words(count: int) -> str:
        return " ".join(f"t{draw.randrange(3, VOCAB)}" for _ in range(count))

    answers = {"chosen": " " + words(chosen - 1), "rejected": " " + words(rejected - 1)}
    return {"prompt": words(prompt), **answers}


def our_config(task: Task, **keys: Any) -> Config:
    """One epoch over the task; `keys` are `section__key=value`."""
    config = Config(
        model=ModelConfig(
            name_or_path=str(task.folder / "model"), dtype="float32", quantization="none"
        ),
        lora=LoraConfig(dropout=0.0),
        data=DataConfig(
            name_or_path=str(task.folder / "rows.jsonl"),
            max_prompt_length=MAX_PROMPT_LENGTH,
            max_length=MAX_LENGTH,
        ),
        optim=OptimConfig(
            name="adamw", learning_rate=1e-5, lr_scheduler_type="constant", warmup_steps=1
        ),
        train=TrainConfig(
            output_dir=str(task.folder / "runs" / str(os.getpid())),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=task.pairs_per_step,
            max_steps=task.num_steps,
            gradient_checkpointing=False,
            report_to="none",
            write_report=False,
        ),
    )
    for name, value in keys.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return config


def run_ours(race: "Race", task: Task, **keys: Any) -> dict[str, Any]:
    """Our trainer over the task: what `train` does between its start and its end."""
    run = Run(our_config(task, **keys))
    race.start(run.models.policy.model)
    for step in range(1, race.num_steps(task) + 1):
        run.train_step(step)
        run.log(step)
        race.finish_step(step)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    return race.result([{k.removeprefix("train/"): v for k, v in line.items()} for line in logged])


def run_cached(race: "Race", task: Task, **keys: Any) -> dict[str, Any]:
    """The same, with the reference's log-probs on disk after one run that is not measured."""
    keys["reference__cache"] = str(task.folder / "reference")
    if not (task.folder / "reference").exists():
        train(our_config(task, **keys))
        keys["train__output_dir"] = str(task.folder / "runs" / "second")
    return run_ours(race, task, **keys)


class Race:
    """What a side reports to: it takes the times, and tells the parent when to read the memory.

    FLOPs are counted in a run of its own, since counting takes time, over the first step of real
    pairs.
    """

    def __init__(self, connection: Any, counts_flops: bool):
        self._connection, self._counts_flops = connection, counts_flops
        self._counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._clocks: list[tuple[float, float]] = []
        self._adapter, self._tokens = "", 0

    def num_steps(self, task: Task) -> int:
        """How many steps the side has to take, warm-up included."""
        return WARM_UP_STEPS + 1 if self._counts_flops else task.num_steps

    def start(self, model: Any) -> None:
        """Is called just before the first step."""
        model.get_input_embeddings().register_forward_hook(self._count_tokens)
        weights = (
            w.detach().float().cpu().numpy()  # NumPy lacks bfloat16, which TRL gives some adapters
            for name, w in model.named_parameters()
            if "lora_" in name
        )
        self._adapter = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
        self.wait()

    def wait(self) -> None:
        """Waits until the parent has read the resident size, above which growth is counted."""
        self._connection.send("ready")
        self._connection.recv()

    def _count_tokens(self, embeddings: Any, inputs: tuple[torch.Tensor], output: Any) -> None:
        self._tokens += inputs[0].numel() if torch.is_grad_enabled() else 0  # not the reference's

    def finish_step(self, step: int) -> None:
        """Is called after each step and its logging; steps count from 1."""
        if step >= WARM_UP_STEPS:
            self._clocks.append((time.perf_counter(), time.process_time()))
        if step == WARM_UP_STEPS and self._counts_flops:
            self._counter.__enter__()
        if step == WARM_UP_STEPS:
            self._tokens = 0

    def result(self, logged: list[dict[str, Any]]) -> dict[str, Any]:
        """Seconds from the end of the warm-up to that of the last step; what each step logged."""
        if self._counts_flops:
            self._counter.__exit__(None, None, None)
        first, last = self._clocks[0], self._clocks[-1]
        return {
            "wall": last[0] - first[0],
            "processor": last[1] - first[1],
            "flops": self._counter.get_total_flops(),
            "tokens": self._tokens,
            "adapter": self._adapter,
            "logged": [line for line in logged if "logps/chosen" in line],
        }


def measure(side: Side, *args: Any, counts_flops: bool = False, **keys: Any) -> dict[str, Any]:
    """What `side(race, *args, **keys)` returns from a fresh process, and `growth`, in bytes.

    That is the peak of the resident size above that before the first step, read from outside.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, counts_flops, side, args, keys))
    process.start()
    there.close()  # so that the death of the child ends the pipe
    try:
        here.recv()
        size = psutil.Process(process.pid).memory_info
        before = peak = size().rss
        here.send("go")
        while not here.poll(SAMPLE_SECONDS):
            peak = max(peak, size().rss)
        result = here.recv()
    except EOFError:
        sys.exit(f"{side.__name__} failed with {keys}; its message stands above.")
    process.join()
    return {**result, "growth": peak - before}


def interleave(sides: dict[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Results by side: every side once, then every side again, so that all see the same machine."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            results[name].append(result := side())
            seconds, growth = result["wall"], result["growth"] / 2**20
            print(
                f"round {number + 1} of {rounds}: {name}: {seconds:.1f} s, {growth:.0f} MiB",
                file=sys.stderr,
            )
    return results


def _child(
    connection: Any, counts_flops: bool, side: Callable[..., Any], args: Any, keys: Any
) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what the trainers print
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    connection.send(side(Race(connection, counts_flops), *args, **keys))


def _attention_flops(query: Any, key: Any, is_causal: bool, products: int) -> int:
    batch, heads, queries, width = query
    visible = queries * key[2] / (2 if is_causal else 1)
    return int(products * 2 * batch * heads * visible * width)


# What FlopCounterMode does not know. The CPU's attention skips the half that is_causal hides, but
# computes what a mask hides. Forward: 2 products, backward: 5.
_ATEN: Any = torch.ops.aten
FORMULAS = {
    _ATEN.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, dropout=0.0, is_causal=False, *_, **__: _attention_flops(q, k, is_causal, 2)
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, out, lse, dropout, is_causal, *_, **__: _attention_flops(
            q, k, is_causal, 5
        )
    ),
}


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    flags = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=3, help="rounds of all sides, interleaved")
    flags.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="1 measures processor time"
    )
    flags.add_argument("--output", type=Path, help="write the report there too")
    return flags


def add_task_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of the benchmarks that train."""
    flags.add_argument("--pairs", type=int, default=32)
    flags.add_argument("--tokens-per-microbatch", type=int, default=1024, help="ours")
    flags.add_argument("--scale", type=float, default=1.0, help="of all lengths, for a trial")
    flags.add_argument("--layers", type=int, default=6)


def prepare(args: argparse.Namespace, folder: Path) -> Task:
    """Writes the task, and sets what the child processes inherit."""
    set_environment(args.threads, folder)
    task = Task(folder, draw_lengths(args.pairs, args.scale))
    task.write(args.layers)
    return task


def set_environment(threads: int, folder: Path) -> None:
    """What child processes inherit: threads, caches of their own, no hub."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["HF_HOME"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def clock(args: argparse.Namespace) -> str:
    """The clock that counts: on one thread processor time, which other processes disturb less."""
    return "processor" if args.threads == 1 else "wall"


def describe(args: argparse.Namespace, task: Task) -> str:
    """The words below a table: what was measured."""
    prompt, chosen, rejected = (statistics.mean(n) for n in zip(*task.lengths, strict=True))
    return (
        f"Median (lowest to highest) of {args.rounds} interleaved rounds, {clock(args)} time, each "
        f"run in a fresh process. {len(task.lengths)} pairs in steps of {PAIRS_PER_STEP}; on "
        f"average {prompt:.0f} prompt, {chosen:.0f} chosen and {rejected:.0f} rejected tokens "
        f"(quantiles of `orca_lengths.json`, cut to {MAX_PROMPT_LENGTH} of prompt and "
        f"{MAX_LENGTH} in all). Mistral's architecture, {args.layers} layers of 384 (MLP 1344, 6 "
        f"heads of 64, 2 for keys), vocabulary {VOCAB}, fp32; LoRA r 16 on all linear layers, "
        "AdamW. RSS growth: peak of the resident size above that before the first step, read from "
        "outside. FLOPs (of matrix products and attention) and the policy's tokens: counted in a "
        "run of their own, in the first step."
    )


def race_table(
    task: Task,
    clock: str,
    counted: dict[str, dict[str, Any]],
    rounds: dict[str, list[dict[str, Any]]],
    bases: dict[str, str],
) -> str:
    """One row a side. `bases`: column titles, and the sides that speed is compared with there."""
    num_pairs, num_counted = len(task.lengths), min(len(task.lengths), PAIRS_PER_STEP)
    speeds = {name: [num_pairs / run[clock] for run in runs] for name, runs in rounds.items()}
    growth = {name: [run["growth"] / 2**20 for run in runs] for name, runs in rounds.items()}
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    size = {name: statistics.median(values) for name, values in growth.items()}
    first = next(iter(bases))
    head = ["", "pairs/s", *bases, "RSS growth, MiB", first, "GFLOP a pair", "tokens a pair"]
    rows = [
        [
            name,
            median_and_range(speeds[name]),
            *(f"{speed[name] / speed[base]:.2f}" for base in bases.values()),
            median_and_range(growth[name]),
            f"{size[name] / size[bases[first]]:.2f}",
            f"{counted[name]['flops'] / num_counted / 1e9:.1f}",
            f"{counted[name]['tokens'] / num_counted:.0f}",
        ]
        for name in rounds
    ]
    return table(head, rows)


def provenance(threads: int, packages: Iterable[str]) -> str:
    """The date, the machine and the versions of a measurement."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cpu = found[1] if found else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{date.today()}; {cpu}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {threads} threads; "
        f"Python {platform.python_version()}, {versions}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_and_range(values: Sequence[float], digits: int = 3) -> str:
    """Median, lowest and highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def publish(report: str, output: Path | None) -> None:
    """Prints the report, and writes it to the file that was asked for."""
    report = report.rstrip("\n") + "\n"
    print(report, end="")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(report)
