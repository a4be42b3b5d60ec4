"""What a run will take, before any weight is loaded: memory by part, FLOPs, time and disk.

Memory comes from the model's own code, run on fake tensors (dpo.plan.fake), FLOPs from its shapes
(dpo.plan.flops). Lengths are those of the first rows, or given. dpo.plan.tables shows all of it.

Left out on purpose: answers sampled at an evaluation, loading and tokenising, more than one device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dpo.config import Config
from dpo.data.audit import Audit
from dpo.data.loader import first_pairs, list_sources, open_rows
from dpo.data.order import Order, micro_batches
from dpo.data.stream import TokenizedPair, build_stream
from dpo.device import choose_device
from dpo.errors import UserError
from dpo.model.load import without_peft
from dpo.model.named import load_tokenizer
from dpo.plan.disk import run_parts, written_bytes
from dpo.plan.fake import FakePolicy, without_numbers
from dpo.plan.fit import Fit, choose_dtype
from dpo.plan.flops import Work, costs, work
from dpo.plan.gpus import GPUS, Gpu, find_gpu, nearest_gpus, this_cpu

SAMPLE_ROWS = 256
LONG = 600  # seconds from which a run on a CPU is told its time
PAIR_BYTES = 32  # on disk per pair, beside its numbers: digests, offsets


@dataclass(frozen=True)
class Sample:
    """Pairs whose lengths represent all pairs.

    Attributes:
        pairs: tokenised rows; if only lengths were given, the ids mean nothing.
        num_pairs: how many an epoch has; None if only lengths are known.
        origin: where they are from, in words.
    """

    pairs: Sequence[TokenizedPair]
    num_pairs: int | None
    origin: str

    @property
    def tokens(self) -> list[int]:
        """Tokens that each pair adds to a stream."""
        return [pair.num_stream_tokens for pair in self.pairs]

    def mean(self, numbers: Sequence[int]) -> float:
        """The mean over the pairs."""
        return sum(numbers) / len(self.pairs)


def choose_gpu(
    name: str | None, memory_gib: float | None, tflops: float | None, config: Config
) -> Gpu:
    """The device of this name, of these numbers, or of this machine; numbers override others.

    Raises:
        UserError: an unknown name (with the nearest known ones), or torch cannot use this machine's
            GPU.
    """
    for flag, number in (("--memory_gib", memory_gib), ("--tflops", tflops)):
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{flag}: got {number}, wanted a number above 0.")
    if not name and memory_gib and tflops:
        return Gpu(memory_gib, tflops)
    if not name:
        device = choose_device(config.train.device)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    if name.lower() == "cpu":
        config.model.dtype, _ = choose_dtype(config.model, torch.device("cpu"))
        gpu = this_cpu(without_peft(without_numbers(config).model))
    else:
        gpu = find_gpu(name)
    if not gpu:
        near = nearest_gpus(name)
        raise UserError(
            f"--gpu: got {name!r}, wanted one of {', '.join(GPUS)}."
            + (f" Nearest: {', '.join(near)}." if near else "")
            + " Name one, or cpu, or give --memory_gib and --tflops (dense, 16 bits)."
        )
    return replace(gpu, memory_gib=memory_gib or gpu.memory_gib, tflops=tflops or gpu.tflops)


def given_lengths(text: str) -> Sample:
    """A sample of one pair, from "PROMPT,CHOSEN,REJECTED" tokens.

    Raises:
        UserError: not three whole numbers above 0.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(
            f"--lengths: got {text!r}, wanted three whole numbers above 0, the mean tokens of "
            "prompt, chosen and rejected answer. For example --lengths 250,200,200."
        )
    prompt, chosen, rejected = map(int, parts)
    pair = TokenizedPair([0] * prompt, [1] * chosen, [2] * rejected)
    return Sample([pair], None, "as given")


def first_rows(config: Config) -> Sample:
    """The first rows of every source, as training would see them.

    Raises:
        UserError: a source or the tokenizer cannot be read, or none of the rows is usable.
    """
    data, audit = config.data, Audit()
    pairs: list[TokenizedPair] = []
    num_rows = 0.0
    try:
        tokenizer = load_tokenizer(config.model)
        sources = list_sources(data)
        for source in sources:
            rows, format = open_rows(source, data, data.subset, data.revision)
            num_rows += len(rows) * source.weight
            count = SAMPLE_ROWS // len(sources) or 1
            first = first_pairs(rows, format, data, tokenizer, count, audit)
            pairs += [pair for _, _, pair in first]
    except UserError as error:
        raise UserError(f"{error} Or give mean lengths: --lengths 250,200,200.") from None
    if not pairs:
        raise UserError(
            f"data: none of the first {audit.rows_read} rows is usable: {audit.summary()}. Change "
            "data.format, or give mean lengths: --lengths 250,200,200."
        )
    kept = len(pairs) / audit.rows_read * (1 - data.eval_fraction)
    return Sample(pairs, math.ceil(num_rows * kept), f"the first {audit.rows_read} rows")


def mean_work(fake: FakePolicy, sample: Sample, fit: Fit) -> Work:
    """Mean work of a pair, in micro-batches that fit: padded rows cost what the longest does."""
    total = [0.0, 0.0, 0.0]
    is_shared = fake.scorer.layout == "shared"
    prompts = [pair.prompt_ids for pair in sample.pairs] if is_shared else None
    for positions in micro_batches(sample.tokens, fit.tokens or 1, prompts):
        stream = build_stream([sample.pairs[i] for i in positions])
        its_work = work(stream.segments, len(stream.targets), fake.scorer.layout)
        total = [a + b for a, b in zip(total, its_work, strict=True)]
    return Work(*(amount / len(sample.pairs) for amount in total))  # type: ignore[arg-type]


def order_of(config: Config, sample: Sample) -> Order:
    """The order of the run's pairs on one device.

    Raises:
        UserError: it goes by epochs, and the number of pairs is not known.
    """
    if sample.num_pairs is None and config.train.max_steps < 0:
        raise UserError(
            "train.max_steps: got -1, which goes by the number of pairs, but with --lengths it is "
            "not known. Give --train.max_steps, or leave --lengths out."
        )
    return Order.of(config.train, sample.num_pairs or 1, num_ranks=1)


def time_on_this_cpu(
    config: Config, pairs: Sequence[TokenizedPair], order: Order, num_ranks: int
) -> str:
    """How long the run's matrix products take, in words; "" for less than ten minutes.

    The rest of a run comes on top (docs/faq.md). The reference is counted in every step; one that
    is cached already saves a third.
    """
    some_steps = range(1, 1 + min(order.num_steps, -(-SAMPLE_ROWS // order.pairs_per_step)))
    streams = [build_stream([pairs[i] for i in order.indices(step)]) for step in some_steps]
    works = [work(stream.segments, len(stream.targets)) for stream in streams]
    model = without_numbers(config).model
    flops = costs(model).flops(
        Work(*map(sum, zip(*works, strict=True))),  # type: ignore[arg-type]
        live_reference=config.reference_mode != "zero",
    )
    num_pairs = order.num_steps * order.pairs_per_step / num_ranks
    rate = this_cpu(without_peft(model)).tflops
    seconds = flops.total / sum(s.num_pairs for s in streams) * num_pairs / rate / 1e12
    if seconds < LONG:
        return ""
    return (
        f"time: at least {duration(seconds)} for {order.num_steps} steps at the "
        f"{1000 * rate:.3g} GFLOP/s of this CPU (matrix products alone)"
    )


def disk_parts(config: Config, fake: FakePolicy, sample: Sample, order: Order) -> dict[str, int]:
    """The most bytes that are on the disk at once, by what is written."""
    pairs = sample.num_pairs or order.num_steps * order.pairs_per_step
    ids = [sum(map(len, (p.prompt_ids, p.chosen_ids, p.rejected_ids))) for p in sample.pairs]
    scored = [pair.num_scored_tokens for pair in sample.pairs]
    parts = {
        **run_parts(config, written_bytes(config, fake.trained), order),
        f"{pairs} tokenised pairs": round(pairs * (4 * sample.mean(ids) + PAIR_BYTES)),
        "reference cache": round(pairs * (4 * sample.mean(scored) + PAIR_BYTES)),
        "merged model, if you merge": fake.num_base_weights() * fake.base.dtype.itemsize,
    }
    if not config.has_cache:
        del parts["reference cache"]
    if config.model.adapter == "none":
        del parts["merged model, if you merge"]
    return {name: size for name, size in parts.items() if size}


def duration(seconds: float) -> str:
    """A time in the unit that suits it: "3.2 s", "14 min", "31.0 h", "12 days"."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"
