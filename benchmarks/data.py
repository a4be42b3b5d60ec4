"""Preparing preference rows: its speed, its memory, and how both grow with the number of rows.

Rows are made from a generator, in the format of Intel/orca_dpo_pairs, for the packaged tokenizer:
their lengths in tokens are those of `orca_lengths.json`, divided by --divide in the sets of up to
a million. For a small and a big set, fresh processes tokenise it (cold) and start again with
the tokens in the cache (warm); their memory is read from outside. Then TRL prepares the same rows,
of full length, and token ids are compared with the template's rendering of the whole text before
any time counts.

    pip install -e '.[peers]'
    python benchmarks/data.py --output benchmarks/results/data.md
"""

import argparse
import json
import os
import random
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import psutil
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo.config import PACKAGE, Config, DataConfig
from dpo.data.formats import Message
from dpo.data.loader import PreferenceData, load_data
from dpo.data.order import Order

LENGTHS = Path(__file__).parent / "orca_lengths.json"
TOKENIZER = PACKAGE / "quickstart" / "model"
PAIRS_READ, PAIRS_PER_STEP = 3200, 16  # the article's run
CORES = len(os.sched_getaffinity(0))
SAMPLE_SECONDS = 0.2
QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
MIB = 2**20


def main() -> None:
    """Runs everything and prints Markdown."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rows", type=int, default=10_000, help="rows of the small set")
    flags.add_argument("--big", type=int, default=1_000_000, help="rows of the big set")
    flags.add_argument("--divide", type=int, default=8, help="divide all their lengths by this")
    flags.add_argument("--sample", type=int, default=4000, help="rows of full length, for TRL")
    flags.add_argument("--rounds", type=int, default=3, help="of ours and TRL, interleaved")
    flags.add_argument("--only-tokenising", action="store_true", help="no start-up and memory")
    flags.add_argument("--skip-trl", action="store_true", help="only measure ours")
    flags.add_argument("--output", type=Path, help="also write the report there")
    args = flags.parse_args()
    import common  # here, since the processes that are measured do without the trainer

    packages = ("transformers", "tokenizers", "datasets", "pyarrow")
    parts = ["# Data at scale", f"{common.provenance(CORES, packages)}."]
    with tempfile.TemporaryDirectory() as folder:
        for measure in (scale, against_trl)[args.only_tokenising :]:
            parts.append(measure(args, Path(folder)))
            print(parts[-1], file=sys.stderr)
    common.publish("\n\n".join(parts), args.output)


# The same work for a hundred times the rows


def scale(args: argparse.Namespace, folder: Path) -> str:
    """Measures both sets, cold and warm."""
    import common

    rows = []
    for number in (args.rows, args.big):
        path = folder / f"{number}.jsonl"
        print(f"{number:,} rows: generating", file=sys.stderr)
        write_rows(path, number, args.divide)
        size = path.stat().st_size
        print(f"{number:,} rows: {size / MIB:,.0f} MiB, tokenising", file=sys.stderr)
        cold = watch("prepare", path, folder)
        entries = {*(folder / "dpo_pairs").iterdir()}
        warm = watch("start", path, folder)
        assert entries == {*(folder / "dpo_pairs").iterdir()}, "not warm: has the code changed?"
        path.unlink()
        rows.append(
            [
                *(f"{number:,}", f"{size / MIB:,.0f}"),
                *(f"{cold.seconds[0]:.1f}", f"{number / cold.seconds[0]:,.0f}"),
                *(f"{cold.peak / MIB:.0f}", f"{cold.peak_of_workers / MIB:.0f}"),
                *(f"{warm.seconds[0]:.3f}", f"{warm.seconds[1] / PAIRS_READ * 1e6:.0f}"),
                *(f"{rss / MIB:.0f}" for rss in (*warm.rss, warm.peak)),
            ]
        )
    head = "rows, file MiB, cold s, rows/s, peak MiB, workers MiB, warm s, µs a pair, "
    head += f"before MiB, started MiB, {PAIRS_READ} read MiB, peak MiB"
    return (
        f"## Start-up and memory\n\nLengths of `{LENGTHS.name}` divided by {args.divide}. Cold: "
        "until the rows are tokenised; its peak is the resident size of the process, and beside it "
        "the sum of what only the worker processes have. Warm: `load_data` in another process "
        "that finds the tokens, and its resident size before, after, and once it has read "
        f"{PAIRS_READ:,} pairs in training's order.\n\n{common.table(head.split(', '), rows)}"
    )


def write_rows(path: Path, number: int, divide: int) -> None:
    """Writes rows of words that are one token each, the same ones on every call."""
    lengths = json.loads(LENGTHS.read_text())["tokens"]
    vocabulary = load_tokenizer().get_vocab()
    words = sorted(word[1:] for word in vocabulary if word[0] == "Ġ" and word[1:].isalpha())
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            texts = (
                " ".join(draw.choices(words, k=max(3, length // divide)))
                for length in draw.choice(lengths)
            )
            row = dict(zip(("question", "chosen", "rejected"), texts, strict=True))
            file.write(json.dumps({"system": "", **row}) + "\n")


@dataclass
class Watched:
    """What one process did: seconds of each part, and bytes, read from outside.

    `processor`: seconds that all cores worked for it, which a busy machine changes less.
    """

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    peak: int = 0
    peak_of_workers: int = 0


def watch(task: str, path: Path, cache: Path) -> Watched:
    """Runs one of TASKS in a fresh process, which waits after each part to be measured."""
    seen, told = Watched(), []
    with subprocess.Popen(
        [sys.executable, __file__, task, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(cache), **QUIET},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            seen.peak = max(seen.peak, psutil.Process(process.pid).memory_info().rss)
            seen.peak_of_workers = max(seen.peak_of_workers, own_memory_of_children(process.pid))
            if not select.select([process.stdout], [], [], SAMPLE_SECONDS)[0]:
                continue
            line = process.stdout.readline()
            if not line:
                break
            told.append(json.loads(line))
            seen.rss.append(psutil.Process(process.pid).memory_info().rss)
            process.stdin.write("\n")
            process.stdin.flush()
    if process.returncode:
        sys.exit(f"{task} failed; its message stands above.")
    for before, after in pairwise(told):
        seen.seconds.append(after["clock"] - before["clock"])
        seen.processor.append(after["processor"] - before["processor"])
    return seen


def own_memory_of_children(pid: int) -> int:
    """Bytes that only the children have: forked, they share the rest with their parent."""
    total = 0
    for child in psutil.Process(pid).children():
        try:
            total += child.memory_full_info().uss
        except psutil.Error:  # it has just ended
            continue
    return total


# The tasks of these processes. Each yields when a part is done; the first part is its imports.


def prepare(path: Path) -> Iterator[None]:
    """Tokenises the rows."""
    tokenizer = load_tokenizer()
    yield
    load(path, tokenizer)
    yield


def prepare_in_one_process(path: Path) -> Iterator[None]:
    """The same on one core, where there are no worker processes."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    yield from prepare(path)


def start(path: Path) -> Iterator[None]:
    """Finds the tokens, and reads some pairs as training does."""
    tokenizer = load_tokenizer()
    yield
    pairs = load(path, tokenizer).train
    yield
    order = Order(len(pairs), PAIRS_PER_STEP, PAIRS_READ // PAIRS_PER_STEP, seed=42)
    for step in range(1, order.num_steps + 1):
        for index in order.indices(step):
            pairs[index]
    yield


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The packaged tokenizer: byte-level BPE, ChatML."""
    return AutoTokenizer.from_pretrained(TOKENIZER)


def load(path: Path, tokenizer: PreTrainedTokenizerBase) -> PreferenceData:
    """Prepares the rows as our trainer does; nothing is cut."""
    data = DataConfig(name_or_path=str(path), max_prompt_length=10**6, max_length=10**7)
    return load_data(Config(data=data), tokenizer)


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a whole conversation, as the template writes it."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)  # type: ignore[return-value]


def verify(path: Path, with_trl: bool = False) -> Iterator[None]:
    """Compares token ids with those of the whole text.

    Ours end with the turn's end, TRL's with the newline that the template writes after it.
    """
    tokenizer = load_tokenizer()
    pairs, rows = load(path, tokenizer).train, conversations(path)
    theirs = prepared_by_trl(rows, tokenizer, None) if with_trl else [None] * len(rows)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for pair, row, other in zip(pairs, rows, theirs, strict=True):
        for side in ("chosen", "rejected"):
            whole = render(row["prompt"] + row[side], tokenizer)
            assert [*pair.prompt_ids, *getattr(pair, f"{side}_ids"), *newline] == whole
            assert other is None or other["prompt_ids"] + other[f"{side}_ids"] == whole
        assert other is None or other["prompt_ids"] == pair.prompt_ids
    yield


def verify_both(path: Path) -> Iterator[None]:
    """Compares TRL's ids as well."""
    yield from verify(path, with_trl=True)


def prepare_trl(path: Path, num_proc: int | None = None) -> Iterator[None]:
    """TRL's preparation; making messages of its rows is not charged to it."""
    tokenizer, rows = load_tokenizer(), conversations(path)
    import trl.trainer.dpo_trainer  # noqa: F401

    yield
    prepared_by_trl(rows, tokenizer, num_proc)
    yield


def prepare_trl_on_every_core(path: Path) -> Iterator[None]:
    """The same, with `dataset_num_proc`."""
    yield from prepare_trl(path, CORES)


def conversations(path: Path) -> datasets.Dataset:
    """The rows as TRL wants them: messages."""

    def turn(role: str, content: str) -> list[Message]:
        return [{"role": role, "content": content}]

    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return datasets.Dataset.from_list(
        [
            {
                "prompt": turn("user", row["question"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }
            for row in rows
        ]
    )


def prepared_by_trl(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None
) -> datasets.Dataset:
    """What `DPOTrainer.__init__` does with its rows; dropping none saves it a pass."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(use_cpu=True, bf16=False, max_length=None, dataset_num_proc=num_proc)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train")  # type: ignore[return-value]


TASKS = {
    task.__name__: task
    for task in (
        *(prepare, prepare_in_one_process, start),
        *(verify, verify_both, prepare_trl, prepare_trl_on_every_core),
    )
}


def run_task(task: str, path: Path) -> None:
    """Runs a task in the watched process; after each part, prints the time and waits."""
    for _ in TASKS[task](path):
        usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        processor = sum(u.ru_utime + u.ru_stime for u in usage)
        print(json.dumps({"clock": time.perf_counter(), "processor": processor}), flush=True)
        sys.stdin.readline()


# Against TRL


def against_trl(args: argparse.Namespace, folder: Path) -> str:
    """Rows a second of both on the same rows, once their token ids have been found equal."""
    import common

    path = folder / "sample.jsonl"
    write_rows(path, args.sample, 1)
    many = f"{CORES} processes"
    ours = {"one process": "prepare_in_one_process", many: "prepare"}
    theirs, check = {}, "verify"
    if find_spec("trl") and not args.skip_trl:
        check = "verify_both"
        theirs = {"one process": "prepare_trl", many: "prepare_trl_on_every_core"}
    sides = {f"ours, {number}": (task, number) for number, task in ours.items()}
    sides |= {f"TRL, {number}": (task, number) for number, task in theirs.items()}
    print(f"comparing the token ids of {args.sample:,} rows", file=sys.stderr)
    watch(check, path, folder / check)
    seen: dict[str, list[Watched]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, (task, _) in sides.items():
            print(f"round {number + 1}: {name}", file=sys.stderr)
            seen[name].append(watch(task, path, folder / f"{task}-{number}"))
    rows = []
    for name, its in seen.items():
        row = [name, common.median_and_range([args.sample / run.seconds[0] for run in its], 4)]
        row.append(common.median_and_range([run.processor[0] / args.sample * 1e3 for run in its]))
        for part in ("seconds", "processor"):
            its_own, equal = (
                statistics.median(getattr(run, part)[0] for run in runs)
                for runs in (its, seen[f"ours, {sides[name][1]}"])
            )
            row.append(f"{its_own / equal:.2f}")
        rows.append(row)
    compared = "" if theirs else "TRL is not installed: not compared. "
    if args.skip_trl:
        compared = "TRL was left out. "
    return (
        f"## Tokenising\n\n{args.sample:,} rows of full length. {compared}All token ids were equal "
        "to those of the whole texts as the template renders them. Median (lowest to highest) of "
        f"{args.rounds} interleaved rounds, each in a fresh process. Ratios are to ours with as "
        "many processes; our one process has one core, TRL's may use all.\n\n"
        + common.table(
            ["", "rows/s", "processor ms a row", "time, ours = 1", "processor, ours = 1"], rows
        )
    )


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in TASKS:
        run_task(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
