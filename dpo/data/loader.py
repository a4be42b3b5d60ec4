"""Read, tokenise once, own the order, split a step into micro-batches.

Token ids are kept in an Arrow file, which `datasets` maps into memory, in a cache folder named by
the digest of everything they depend on: contents of the source, tokenizer, template, lengths.
Another learning rate finds them there; another tokenizer does not.

The order is a pure function of (seed, epoch, step). No sampler, no iterator and no global random
state stand behind it, so a resumed run has nothing to replay.
"""

import hashlib
import heapq
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
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
_SCORED = ("chosen_scored", "rejected_scored")
_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt_digest": pa.int64(),
        "prompt_ids": pa.list_(pa.int32()),
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "chosen_scored": pa.list_(pa.bool_()),
        "rejected_scored": pa.list_(pa.bool_()),
    }
)


class Pairs(Sequence[TokenizedPair]):
    """Tokenised pairs of one or more sources, read from the Arrow files as they are asked for.

    Args:
        tables: by source; the name is what row names begin with, "" where there is one source.
        places: (pairs, 2): which source and which of its rows; all of them, if not given.
    """

    def __init__(
        self, tables: Sequence[tuple[str, datasets.Dataset]], places: np.ndarray | None = None
    ):
        if places is None:
            sizes = [len(table) for _, table in tables]
            rows = np.concatenate([np.arange(size) for size in sizes])
            places = np.stack([np.repeat(np.arange(len(sizes)), sizes), rows], axis=1)
        self._tables, self._places = tables, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> TokenizedPair:  # type: ignore[override]
        _, row = self._row(index)
        return TokenizedPair(**{field.name: row[field.name] for field in fields(TokenizedPair)})

    def _row(self, index: int) -> tuple[str, dict[str, Any]]:
        source, place = self._places[index].tolist()
        name, table = self._tables[source]
        return name, table[place]

    @property
    def sources(self) -> np.ndarray:
        """Which source each pair is of."""
        return self._places[:, 0]

    def row_name(self, index: int) -> str:
        """How the audit and error messages call the pair's row."""
        name, row = self._row(index)
        return f"{name}:{row['row']}" if name else str(row["row"])

    def source_name(self, index: int) -> str:
        """The name of the pair's source, "" where there is one source."""
        return self._tables[self.sources[index]][0]

    @cached_property
    def digest(self) -> str:
        """Of all token ids and of the order of the pairs: tells data apart."""
        digest = hashlib.sha256(self._places.tobytes())
        for _, table in self._tables:
            for name in ("prompt_ids", "chosen_ids", "rejected_ids", *_SCORED):
                for chunk in table.data[name].chunks:
                    digest.update(chunk.flatten().to_numpy(zero_copy_only=False))
                    digest.update(chunk.value_lengths().fill_null(-1).to_numpy())
        return digest.hexdigest()

    def select(self, indices: np.ndarray) -> "Pairs":
        """These of the pairs, in this order; may repeat."""
        return Pairs(self._tables, self._places[indices])

    def prompt_digests(self) -> np.ndarray:
        """A number for each pair, equal where prompts are."""
        columns = [table.data["prompt_digest"].to_numpy() for _, table in self._tables]
        starts = np.cumsum([0, *map(len, columns)])
        return np.concatenate(columns)[starts[self.sources] + self._places[:, 1]]


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
    sources = list_sources(data)
    tables, audit = [], Audit()
    for source in sources:
        name = source.path if len(sources) > 1 else ""
        opened = open_source(
            resolve(source.path), subset=data.subset, revision=data.revision, split=source.split
        )
        table, its_audit = _tokenized(opened, source.format, data, tokenizer)
        tables.append((name, table))
        audit.absorb(its_audit, name)
    pairs = Pairs(tables)
    is_held_out = _is_held_out(pairs.prompt_digests(), data.eval_fraction, seed)
    seen = [
        _weighted(np.flatnonzero(~is_held_out & (pairs.sources == i)), source.weight, (seed, i))
        for i, source in enumerate(sources)
    ]
    train, held_out = pairs.select(np.concatenate(seen)), pairs.select(np.flatnonzero(is_held_out))
    report, summary = audit.report(), [f"data: {audit.summary()}"]
    if data.eval_path:
        same = data.eval_path == data.name_or_path  # other splits of one data set
        opened = open_source(
            resolve(data.eval_path),
            subset=data.subset if same else None,
            revision=data.revision if same else None,
            split=data.eval_split,
        )
        table, eval_audit = _tokenized(opened, data.format, data, tokenizer)
        held_out = Pairs([("", table)])
        report["held_out_source"] = eval_audit.report()
        summary.append(f"held out: {eval_audit.summary()}")
    report |= {"pairs_trained_on_per_epoch": len(train), "pairs_held_out": len(held_out)}
    if not len(train):
        raise UserError(
            f"data: no pair is left to train on: {audit.summary()}; {len(held_out)} held out. "
            "Change data.format, data.max_length, data.eval_fraction or the rows."
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
    order = np.random.default_rng((seed, epoch)).permutation(num_pairs)
    order.flags.writeable = False  # every step of the epoch reads this one array
    return order


def micro_batches(num_tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Splits pairs into few bins of at most `budget` tokens each; a longer pair is a bin by itself.

    Returns positions, in bins that are nearly equal; [[]] for no pair, since a rank without pairs
    still takes part in the step.
    """
    at_least = math.ceil(sum(min(n, budget) for n in num_tokens) / budget)
    no_two_share = sum(2 * n > budget for n in num_tokens)
    num_bins = max(1, at_least, no_two_share)
    while True:
        bins = balance(num_tokens, num_bins)
        if all(len(b) <= 1 or sum(num_tokens[i] for i in b) <= budget for b in bins):
            return [b for b in bins if b] or [[]]
        num_bins += 1 + num_bins // 20  # one by one would take minutes for thousands of pairs


def balance(num_tokens: Sequence[int], num_bins: int) -> list[list[int]]:
    """Positions in `num_bins` bins of nearly equal numbers of tokens.

    Longest first, each into the emptiest bin: the fullest comes out at most 4/3 of the best
    possible (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, b) for b in range(num_bins)]  # a heap of (tokens, bin)
    for i in sorted(range(len(num_tokens)), key=lambda i: -num_tokens[i]):
        tokens, b = emptiest[0]
        bins[b].append(i)
        heapq.heapreplace(emptiest, (tokens + num_tokens[i], b))
    return bins


def list_sources(data: DataConfig) -> list[DataSource]:
    """The sources that `data.name_or_path` names, one or several."""
    if isinstance(data.name_or_path, str):
        return [DataSource(path=data.name_or_path, format=data.format, split=data.split)]
    if not data.name_or_path:
        raise UserError("data.name_or_path: got an empty list, wanted at least one source.")
    of_one = ["subset", "revision", "split"] + ["format"] * (not data.eval_path)
    for key in of_one:
        if getattr(data, key) != getattr(DataConfig, key):
            raise UserError(
                f"data.{key}: got {getattr(data, key)!r}, but this key is for one source and "
                "data.name_or_path is a list. Leave it out; items of the list may set split and "
                "format."
            )
    return data.name_or_path


def choose_format(source: Source, format: str) -> str:
    """The format of its rows, which `auto` recognises from the first of them."""
    if format != "auto":
        return format
    return recognise([row.value for row in islice(source, RECOGNISED_ROWS)], source.name)


def _tokenized(
    source: Source, format: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, Audit]:
    """The source's pairs and audit, from the cache or made now."""
    template = choose_template(tokenizer, data.chat_template)
    limits = Limits(data.max_prompt_length, data.max_length, data.on_overlong)
    format = choose_format(source, format)
    if format == "chatml_dpo_pairs":
        require_chatml(tokenizer, f"{source.name}: the rows are ready-made ChatML")
    depends_on = (
        _code_digest(),
        transformers.__version__,
        tokenizers.__version__,
        source.fingerprint,
        format,
        limits,
        template,
        _tokenizer_digest(tokenizer),
    )
    key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dpo_pairs" / key
    if not folder.exists():
        audit = Audit()
        _write(folder, source, format, ChatTokenizer(tokenizer, template, limits, audit), audit)
    audit = Audit.from_report(json.loads((folder / "audit.json").read_text(encoding="utf-8")))
    audit.formats = {source.name: format}
    return datasets.Dataset.from_file(str(folder / "pairs.arrow")), audit


def _write(folder: Path, source: Source, format: str, chat: ChatTokenizer, audit: Audit) -> None:
    """Tokenises the source into a folder, which appears only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        files = Path(unfinished, "complete")
        files.mkdir()
        with pa.OSFile(str(files / "pairs.arrow"), "wb") as file:
            _write_pairs(file, source, format, chat, audit)
        (files / "audit.json").write_text(json.dumps(audit.report()), encoding="utf-8")
        try:
            files.rename(folder)
        except OSError:
            if not folder.exists():  # else another process made the same one: equal contents
                raise


def _write_pairs(
    file: pa.NativeFile, source: Source, format: str, chat: ChatTokenizer, audit: Audit
) -> None:
    preferences = _preferences(source, format, audit)
    progress = tqdm(
        total=len(source), desc=f"tokenising {source.name}", unit="row", leave=False, disable=None
    )
    with pa.ipc.new_stream(file, _SCHEMA) as writer, progress:
        while batch := list(islice(preferences, BATCH_ROWS)):
            asked = dict[RowName, Preference](batch)
            try:
                rows = [
                    {"row": row, "prompt_digest": _digest(chat.prompt_text(asked[row]))}
                    | vars(pair)
                    for row, pair in chat.tokenize(batch)
                ]
            except UserError as error:
                raise UserError(f"{source.name}: {error}") from None
            audit.pairs_kept += len(rows)
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
            progress.update(audit.rows_read - progress.n)
            _refuse_differing(source, audit)


def _preferences(source: Source, format: str, audit: Audit) -> Iterator[tuple[RowName, Preference]]:
    for number, value in source:
        audit.rows_read += 1
        try:
            yield number, to_preference(value, format, where=source.where(number))
        except RowError as error:
            audit.drop(error.reason, number)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _refuse_differing(source: Source, audit: Audit) -> None:
    """Stops as soon as the share of the whole source is certain to be too large."""
    differing = audit.dropped.get(TEMPLATE_DIFFERS)
    if differing and differing.count > MAX_DIFFERING * len(source):
        raise UserError(
            f"{source.name}: in {differing.count} of the first {audit.rows_read} rows (such as "
            f"{', '.join(map(str, differing.rows[:5]))}) the chat template renders the prompt "
            "differently once an answer follows it, so prompt and answer cannot be told apart. "
            "Give a template that only appends, as a file in data.chat_template."
        )


def _is_held_out(prompts: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Splits by prompt, so that no held-out prompt is trained on under another answer."""
    distinct = np.random.default_rng(seed).permutation(np.unique(prompts))
    return np.isin(prompts, distinct[: round(fraction * len(distinct))])


def _weighted(indices: np.ndarray, weight: float, seed: tuple[int, int]) -> np.ndarray:
    """Every index floor(weight) times, and a random share of them once more."""
    whole, part = divmod(weight, 1)
    extra = np.random.default_rng(seed).permutation(indices)[: round(part * len(indices))]
    return np.concatenate([np.tile(indices, int(whole)), np.sort(extra)])


def _code_digest() -> str:
    """Of the code that decides the token ids: a changed rule must not find old tokens."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
