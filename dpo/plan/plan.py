"""What a run will take, before any weight is loaded: memory by part, FLOPs, time and disk.

Memory comes from the model's own code, run on fake tensors (dpo.plan.fake), FLOPs from its shapes
(dpo.plan.flops). Lengths are those of the first rows, or given. The tables that show it are made
in dpo.plan.tables.

Left out on purpose: answers sampled at an evaluation, loading and tokenising, more than one device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from dpo.config import Config
from dpo.data.audit import Audit
from dpo.data.loader import first_pairs, list_sources, micro_batches, open_rows
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.model.load import load_tokenizer
from dpo.plan.fake import FakePolicy
from dpo.plan.flops import Work, work
from dpo.plan.gpus import GPUS, Gpu, find_gpu, nearest_gpus
from dpo.plan.memory import SAVINGS, Saving, fitting_tokens

SAMPLE_ROWS = 256
PROBE_PAIRS = 4
# A micro-batch for which forming 4-bit weights anew is a small part of the work.
ENOUGH_TOKENS = 8192
PAIR_BYTES = 32  # of a pair on disk, beside its numbers: digests, offsets


@dataclass(frozen=True)
class Sample:
    """Pairs whose lengths stand for all.

    Attributes:
        pairs: tokenised rows; their ids are not looked at where lengths were given.
        num_pairs: how many an epoch has; None where only lengths are known.
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
        """Over the pairs."""
        return sum(numbers) / len(self.pairs)


@dataclass(frozen=True)
class Budget:
    """Tokens of a micro-batch, and what they take.

    Attributes:
        bytes_per_token: activations, measured on fake tensors.
        saving: what is given up for memory.
    """

    tokens: int
    bytes_per_token: float
    saving: Saving


def choose_gpu(name: str | None, memory_gib: float | None, tflops: float | None) -> Gpu:
    """By name, by numbers, or the one that is here; a number replaces the data sheet's.

    Raises:
        UserError: an unknown name (with the nearest known ones), or nothing to go by.
    """
    for flag, number in (("--memory_gib", memory_gib), ("--tflops", tflops)):
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{flag}: got {number}, wanted a number above 0.")
    if not name and memory_gib and tflops:
        return Gpu(memory_gib, tflops)
    if not name and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    gpu = find_gpu(name or "")
    if not gpu:
        near = nearest_gpus(name or "")
        raise UserError(
            f"--gpu: got {name!r}, wanted one of {', '.join(GPUS)}."
            + (f" Nearest: {', '.join(near)}." if near else "")
            + " Name one, or give --memory_gib and --tflops (dense, 16 bits)."
        )
    return Gpu(memory_gib or gpu.memory_gib, tflops or gpu.tflops)


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
            rows, format = open_rows(source, data.subset, data.revision)
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


def choose_base(
    config: Config,
    memory: int | float,
    pairs: Sequence[TokenizedPair],
    fake: FakePolicy | None = None,
) -> tuple[bool, str]:
    """Whether a 4-bit base is trained on in plain layers, and why, in words ("": it is not 4-bit).

    Args:
        config: of the run.
        memory: bytes that the device has for it.
        pairs: some, whose tokens stand for all.
        fake: the policy, if there is one already.
    """
    if config.model.quantization not in ("nf4", "fp4"):
        return False, ""
    if config.model.dequantize_base != "auto":
        how = "dequantised once" if config.model.dequantize_base else "kept in 4 bits"
        return config.model.dequantize_base, f"base: {how}, as configured"
    fake = fake or FakePolicy(config)
    parts = memory_parts(fake, config, dequantized=True)
    left = memory - sum(parts.values())
    fit = fitting_tokens(left, bytes_per_token(fake, pairs))
    is_enough = fit >= ENOUGH_TOKENS
    return is_enough, (
        f"base: {'dequantised once' if is_enough else 'kept in 4 bits'}: dequantised it takes "
        f"{fake.base_bytes(dequantized=True) / 2**30:.3g} GiB, and micro-batches of {fit} tokens "
        f"fit beside it, wanted {ENOUGH_TOKENS}"
    )


def memory_parts(fake: FakePolicy, config: Config, *, dequantized: bool = False) -> dict[str, int]:
    """Bytes by part, but for activations: what is there in every step."""
    trained = fake.trained
    base = fake.base_bytes(dequantized=dequantized)
    dtype = str(next(fake.base.parameters()).dtype).removeprefix("torch.")
    is_plain = config.model.quantization == "none" or dequantized
    stored = dtype if is_plain else config.model.quantization
    parts = {
        f"base weights, {stored}": base,
        "adapter": fake.adapter_bytes(),
        f"adapter in {dtype}": fake.cast_bytes(),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        f"optimizer state, {config.optim.name}": optimizer_bytes(trained, config.optim.name),
        "fp32 copies of the weights": copy_bytes(trained),
        "frozen reference": base if has_frozen_copy(config) else 0,
        "largest weight, dequantised": 0 if dequantized else fake.dequantised_bytes(),
    }
    return {part: size for part, size in parts.items() if size}


def optimizer_bytes(trained: Sequence[torch.Tensor], name: str) -> int:
    """AdamW's two moments in fp32, or in 8 bits.

    Eight bits come with an fp32 maximum per block of 256, and only to weights of 4096 or more.
    """
    if not name.endswith("8bit"):
        return sum(8 * p.numel() for p in trained)
    return sum(
        2 * p.numel() + 8 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 8 * p.numel()
        for p in trained
    )


def copy_bytes(trained: Sequence[torch.Tensor]) -> int:
    """Of the fp32 copies that the optimizer steps, where weights of half precision train."""
    return sum(4 * p.numel() for p in trained if p.dtype.itemsize < 4)


def choose_budget(fake: FakePolicy, config: Config, left: float, sample: Sample) -> Budget:
    """As the trainer will: what fits, with as few layers checkpointed as the longest pair allows.

    A number in the configuration is kept; then nothing but `train.gradient_checkpointing` counts.
    """
    configured, is_on = config.train.tokens_per_microbatch, config.train.gradient_checkpointing
    longest = max(sample.tokens)
    found = Budget(0, 0.0, SAVINGS[0])
    for saving in (s for s in SAVINGS if s.checkpoint_every == 1 or not is_on):
        fake.save_memory(saving)
        per_token = bytes_per_token(fake, sample.pairs)
        if configured != "auto":
            return Budget(configured, per_token, saving)
        fits = fitting_tokens(left, per_token, longest=longest)
        found = Budget(fits, per_token, saving)
        if fits >= longest:
            break
    return found


def bytes_per_token(fake: FakePolicy, pairs: Sequence[TokenizedPair]) -> float:
    """Of a micro-batch of the first pairs: more of them would take longer and say the same."""
    pairs = list(islice(cycle(pairs), PROBE_PAIRS))
    return fake.step_bytes(pairs) / sum(pair.num_stream_tokens for pair in pairs)


def mean_work(fake: FakePolicy, sample: Sample, budget: Budget) -> Work:
    """Of one pair, in micro-batches of the budget: padded rows cost what their longest does."""
    total = [0.0, 0.0, 0.0]
    for positions in micro_batches(sample.tokens, budget.tokens or 1):
        stream = build_stream([sample.pairs[i] for i in positions])
        its_work = work(stream.segments, len(stream.targets), fake.scorer.layout)
        total = [a + b for a, b in zip(total, its_work, strict=True)]
    return Work(*(amount / len(sample.pairs) for amount in total))  # type: ignore[arg-type]


def total_steps(config: Config, sample: Sample) -> int:
    """Optimizer steps of the run on one device.

    Raises:
        UserError: it goes by epochs, and how many pairs there are is not known.
    """
    if config.train.max_steps > 0:
        return config.train.max_steps
    if sample.num_pairs is None:
        raise UserError(
            "train.max_steps: got -1, which goes by the number of pairs, but with --lengths it is "
            "not known. Give --train.max_steps, or leave --lengths out."
        )
    return config.train.num_train_epochs * math.ceil(sample.num_pairs / pairs_per_step(config))


def disk_parts(config: Config, fake: FakePolicy, sample: Sample, steps: int) -> dict[str, int]:
    """Bytes by what is written, the most of it that lies there at once."""
    train = config.train
    weights = sum(p.numel() * p.element_size() for p in fake.trained)
    state = optimizer_bytes(fake.trained, config.optim.name) + copy_bytes(fake.trained)
    checkpoint = weights + state
    written = steps // train.save_steps if train.save_steps else 0
    kept = min(written, train.save_total_limit + 1)  # the next is complete before the oldest goes
    pairs = sample.num_pairs or steps * pairs_per_step(config)
    ids = [sum(map(len, (p.prompt_ids, p.chosen_ids, p.rejected_ids))) for p in sample.pairs]
    scored = [pair.num_scored_tokens for pair in sample.pairs]
    parts = {
        f"{kept} checkpoints": kept * checkpoint,
        "best/": weights if train.metric_for_best_model else 0,
        "final/": weights,
        f"{pairs} tokenised pairs": round(pairs * (4 * sample.mean(ids) + PAIR_BYTES)),
        "reference cache": round(pairs * (4 * sample.mean(scored) + PAIR_BYTES)),
        "merged model, if you merge": fake.num_base_weights() * fake.base.dtype.itemsize,
    }
    if config.reference.mode == "zero" or config.reference.cache == "off":
        del parts["reference cache"]
    if config.model.adapter == "none":
        del parts["merged model, if you merge"]
    return {name: size for name, size in parts.items() if size}


def pairs_per_step(config: Config) -> int:
    """Of one device."""
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps


def has_frozen_copy(config: Config) -> bool:
    """Whether the reference is a second model."""
    return config.model.adapter == "none" and config.reference.mode != "zero"
