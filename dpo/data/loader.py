"""Read, tokenise once, own the order, split a step into micro-batches.

Token ids are kept in an Arrow file, which `datasets` maps into memory, in a cache folder named by
the digest of everything they depend on: contents of the source, tokenizer, template, lengths. Another
learning rate finds them there; another tokenizer does not.

The order is a pure function of (seed, epoch, step). No sampler, no iterator and no global random
state stand behind it, so a resumed run has nothing to replay.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence as List, Value, config as datasets_config
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpo.config import Config, DataConfig, DataSource, UserError, resolve
from dpo.data.audit import Audit, RowName
from dpo.data.chat import TEMPLATE_DIFFERS, ChatTokenizer, Limits, choose_template, require_chatml
from dpo.data.formats import RECOGNISED_ROWS, Preference, RowError, recognise, to_preference
from dpo.data.sources import Source, open_source
from dpo.data.stream import TokenizedPair

BATCH_ROWS = 1000  # tokenised at once
MAX_DIFFERING = 0.02  # share of rows that the template may render differently; above, it is refused
_FEATURES = Features(
    row=Value("string"),
    prompt_ids=List(Value("int32")),
    chosen_ids=List(Value("int32")),
    rejected_ids=List(Value("int32")),
    chosen_scored=List(Value("bool")),
    rejected_scored=List(Value("bool")),
)


class Pairs(Sequence[TokenizedPair]):
    """Tokenised pairs, read from the Arrow file as they are asked for; `row_names` are their rows."""

    def __init__(self, table: Dataset, indices: np.ndarray | None = None):
        self._table = table
        self._indices = np.arange(len(table)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> TokenizedPair:  # type: ignore[override]
        row = self._table[int(self._indices[index])]
        return TokenizedPair(**{field.name: row[field.name] for field in fields(TokenizedPair)})

    def row_name(self, index: int) -> str:
        """How the audit and error messages call the pair's row."""
        return self._table[int(self._indices[index])]["row"]

    def select(self, indices: np.ndarray) -> "Pairs":
        """These of the pairs, in this order; may repeat."""
        return Pairs(self._table, self._indices[indices])

    def prompts(self) -> Iterator[bytes]:
        """One digestible value per pair, equal where prompts are."""
        for index in self._indices:
            yield np.asarray(self._table[int(index)]["prompt_ids"], dtype=np.int32).tobytes()


@dataclass(frozen=True)
class PreferenceData:
    """What a run trains on and what it is evaluated on, with the report of how they came about."""

    train: Pairs
    held_out: Pairs
    report: dict[str, Any]
    summary: list[str]


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreferenceData:
    """Reads every source, tokenises what is not cached, holds out what `data` says.

    Raises:
        UserError: a source that cannot be read or holds no usable pair.
    """
    data, seed = config.data, config.train.seed
    sources = _sources(data)
    train_parts, held_out_parts, audits = [], [], []
    for source in sources:
        prefix = "" if len(sources) == 1 else f"{source.path}:"
        pairs, audit = _tokenized(_open(source, data), source.format, prefix, data, tokenizer)
        kept, held_out = _hold_out(pairs, data.eval_fraction, seed)
        train_parts.append(kept.select(_weighted(len(kept), source.weight, seed)))
        held_out_parts.append(held_out)
        audits.append(audit)
    train, held_out = _joined(train_parts), _joined(held_out_parts)
    audit = _merged(audits)
    report = audit.report()
    summary = [f"data: {audit.summary()}"]
    if data.eval_path:
        source = DataSource(path=data.eval_path, format=data.format)
        opened = open_source(resolve(source.path))
        held_out, eval_audit = _tokenized(opened, source.format, "", data, tokenizer)
        report["held_out_source"] = eval_audit.report()
        summary.append(f"held out: {eval_audit.summary()}")
    report |= {"pairs_trained_on_per_epoch": len(train), "pairs_held_out": len(held_out)}
    if not len(train):
        raise UserError(
            f"data: no pair is left to train on. {audit.summary()}. Change data.format, "
            "data.max_length, data.eval_fraction or the rows."
        )
    return PreferenceData(train, held_out, report, summary)


def step_indices(num_pairs: int, pairs_per_step: int, seed: int, step: int) -> np.ndarray:
    """Which pairs optimizer step `step` (from 0) sees: a pure function, over any number of epochs.

    Every epoch is a new permutation; its last step is smaller when the pairs do not divide evenly.
    """
    epoch, step_of_epoch = divmod(step, math.ceil(num_pairs / pairs_per_step))
    order = _epoch_order(num_pairs, seed, epoch)
    return order[step_of_epoch * pairs_per_step :][:pairs_per_step]


@lru_cache(maxsize=2)
def _epoch_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def micro_batches(num_tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Splits pairs into as few bins as keep within `budget` tokens; a longer pair is a bin by itself.

    Longest first, each into the emptiest bin, so that the bins come out nearly equal. Returns
    positions; [[]] for no pair, since a rank without pairs still takes part in the step.
    """
    num_bins = max(1, math.ceil(sum(num_tokens) / budget))
    while True:
        bins = balance(num_tokens, num_bins)
        if all(len(b) <= 1 or sum(num_tokens[i] for i in b) <= budget for b in bins):
            return [b for b in bins if b] or [[]]
        num_bins += 1


def balance(num_tokens: Sequence[int], num_bins: int) -> list[list[int]]:
    """Positions in `num_bins` bins of nearly equal numbers of tokens (longest processing time first)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    filled = [0] * num_bins
    for i in sorted(range(len(num_tokens)), key=lambda i: -num_tokens[i]):
        emptiest = filled.index(min(filled))
        bins[emptiest].append(i)
        filled[emptiest] += num_tokens[i]
    return bins


def _sources(data: DataConfig) -> list[DataSource]:
    if isinstance(data.name_or_path, str):
        return [DataSource(path=data.name_or_path, format=data.format, split=data.split)]
    for key in ("subset", "revision"):
        if getattr(data, key):
            raise UserError(f"data.{key}: it names one source, but data.name_or_path is a list.")
    return data.name_or_path


def _open(source: DataSource, data: DataConfig) -> Source:
    return open_source(
        resolve(source.path), subset=data.subset, revision=data.revision, split=source.split
    )


def _tokenized(
    source: Source,
    format: str,
    row_prefix: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Pairs, Audit]:
    """The source's pairs and audit, from the cache or made now."""
    template = choose_template(tokenizer, data.chat_template)
    limits = Limits(data.max_prompt_length, data.max_length, data.on_overlong)
    if format == "auto":
        rows = [row.value for row in islice(source, RECOGNISED_ROWS)]
        format = recognise(rows, source.name)
    if format == "chatml_dpo_pairs":
        require_chatml(tokenizer, f"{source.name}: the rows are ready-made ChatML")
    depends_on = (
        _code_digest(),
        source.fingerprint,
        format,
        row_prefix,
        vars(limits),
        template,
        _tokenizer_digest(tokenizer),
    )
    key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "dpo_pairs" / key
    if not folder.exists():
        audit = Audit(formats={source.name: format})
        chat = ChatTokenizer(tokenizer, template, limits, audit)
        with _atomic_folder(folder) as unfinished:
            _write_pairs(unfinished / "pairs.arrow", source, format, row_prefix, chat, audit)
            (unfinished / "audit.json").write_text(json.dumps(audit.report()))
    audit = Audit.from_report(json.loads((folder / "audit.json").read_text()))
    return Pairs(Dataset.from_file(str(folder / "pairs.arrow"))), audit


def _write_pairs(
    path: Path, source: Source, format: str, prefix: str, chat: ChatTokenizer, audit: Audit
) -> None:
    preferences = _preferences(source, format, prefix, audit)
    progress = tqdm(
        total=len(source), desc=f"tokenising {source.name}", unit="row", leave=False, disable=None
    )
    with ArrowWriter(path=str(path), features=_FEATURES) as writer, progress:
        while batch := list(islice(preferences, BATCH_ROWS)):
            for row, pair in chat.tokenize(batch):
                audit.pairs_kept += 1
                writer.write({"row": str(row), **vars(pair)})
            progress.update(audit.rows_read - progress.n)
        writer.finalize()
    differing = audit.dropped.get(TEMPLATE_DIFFERS)
    if differing and differing.count > MAX_DIFFERING * audit.rows_read:
        raise UserError(
            f"{source.name}: in {differing.count} of {audit.rows_read} rows (the first: "
            f"{differing.rows[:5]}) the chat template renders the prompt differently once an answer "
            "follows it, so prompt and answer cannot be told apart. Give a template that only "
            "appends, as a file in data.chat_template."
        )


def _preferences(
    source: Source, format: str, prefix: str, audit: Audit
) -> Iterator[tuple[RowName, Preference]]:
    for number, value in source:
        audit.rows_read += 1
        row = f"{prefix}{number}" if prefix else number
        try:
            yield row, to_preference(value, format, where=source.where(number))
        except RowError as error:
            audit.drop(error.reason, row)


def _hold_out(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Splits by prompt, so that no held-out prompt is trained on under another answer."""
    if not fraction:
        return pairs, pairs.select(np.arange(0))
    salt = str(seed).encode()
    drawn = [hashlib.blake2b(p, key=salt, digest_size=8).digest() for p in pairs.prompts()]
    distinct = sorted(set(drawn))
    chosen = set(distinct[: round(fraction * len(distinct))])
    is_held_out = np.array([d in chosen for d in drawn], dtype=bool)
    return pairs.select(np.flatnonzero(~is_held_out)), pairs.select(np.flatnonzero(is_held_out))


def _weighted(num_pairs: int, weight: float, seed: int) -> np.ndarray:
    """Every pair floor(weight) times, and a random share of them once more."""
    whole, part = divmod(weight, 1)
    extra = np.random.default_rng((seed, num_pairs)).permutation(num_pairs)
    extra = np.sort(extra[: round(part * num_pairs)])
    return np.concatenate([np.tile(np.arange(num_pairs), int(whole)), extra]).astype(np.int64)


def _joined(parts: list[Pairs]) -> Pairs:
    from datasets import concatenate_datasets

    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0] + [len(part._table) for part in parts])
    indices = [part._indices + offset for part, offset in zip(parts, offsets, strict=False)]
    return Pairs(concatenate_datasets([p._table for p in parts]), np.concatenate(indices))


def _merged(audits: list[Audit]) -> Audit:
    whole = Audit()
    for audit in audits:
        whole.rows_read += audit.rows_read
        whole.pairs_kept += audit.pairs_kept
        whole.formats |= audit.formats
        for name in ("dropped", "cut", "noted"):
            for what, tally in getattr(audit, name).items():
                mine = getattr(whole, name)
                if what in mine:
                    mine[what].count += tally.count
                    mine[what].rows += tally.rows
                else:
                    mine[what] = tally
    return whole


class _atomic_folder:  # noqa: N801 - a context manager
    """A folder that appears under its name only when its contents are complete."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> Path:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished = Path(tempfile.mkdtemp(dir=self._folder.parent, prefix=".unfinished-"))
        return self._unfinished

    def __exit__(self, error_type: object, *_: object) -> None:
        try:
            if error_type is None:
                os.rename(self._unfinished, self._folder)
        except OSError:
            if not self._folder.exists():  # else another process made the same one: equal contents
                raise
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)


def _code_digest() -> str:
    """Of the code that decides the token ids: a changed rule must not find old tokens."""
    here = Path(__file__).parent
    names = ("formats.py", "chat.py", "audit.py", "loader.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        digest = hashlib.sha256()
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
