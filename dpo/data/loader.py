"""What a run trains on and what it is evaluated on: the pairs of all its sources."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from dpo.config import Config, DataConfig, DataSource
from dpo.data.audit import Audit, RowName
from dpo.data.chat import ChatTokenizer
from dpo.data.files import digest
from dpo.data.formats import NUMBERS, RECOGNISED_ROWS, Preference, recognise
from dpo.data.limits import Limits
from dpo.data.order import spread
from dpo.data.sources import Source, open_source
from dpo.data.stream import TokenizedPair
from dpo.data.templates import choose_template
from dpo.data.tokens import TokenFile, read_row, tokenized
from dpo.errors import RefusedRowsError, UserError


class Pairs(Sequence[TokenizedPair]):
    """Tokenised pairs of one or more sources, read from their files as they are asked for.

    Args:
        files: name and token file of each source; the name is "" if there is only one source.
        places: index of each pair in the sources laid end to end; None means all of them in order,
            without an index per pair in memory.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, TokenFile]],
        places: Int[np.ndarray, " pairs"] | None = None,
    ):
        self._files, self._places = files, places
        self._starts = [0, *accumulate(len(file) for _, file in files)]

    def __len__(self) -> int:
        return self._starts[-1] if self._places is None else len(self._places)

    def __getitem__(self, index: int) -> TokenizedPair:  # type: ignore[override]
        _, row = self._row(index)
        row["numbers"] = {name: row[name] for name in NUMBERS if row[name] is not None}
        return TokenizedPair(**{field.name: row[field.name] for field in fields(TokenizedPair)})

    def _row(self, index: int) -> tuple[str, dict[str, Any]]:
        name, file, place = self._find(index)
        return name, file[place]

    def _find(self, index: int) -> tuple[str, TokenFile, int]:
        place = range(len(self))[index]
        if self._places is not None:
            place = int(self._places[place])
        source = bisect_right(self._starts, place) - 1
        return *self._files[source], place - self._starts[source]

    def _all_places(self) -> Int[np.ndarray, " pairs"]:
        return np.arange(len(self)) if self._places is None else self._places

    @property
    def source_of_each(self) -> Int[np.ndarray, " pairs"]:
        """The index of each pair's source."""
        return np.searchsorted(self._starts, self._all_places(), side="right") - 1

    def row_name(self, index: int) -> str:
        """The name of the pair's row in the audit and in error messages."""
        name, row = self._row(index)
        return f"{name}:{row['row']}" if name else str(row["row"])

    def source_name(self, index: int) -> str:
        """The name of the pair's source, "" if there is only one source."""
        name, _, _ = self._find(index)
        return name

    @cached_property
    def digest(self) -> str:
        """Digest of all token ids and of the order of the pairs."""
        parts = [str(len(self)), *(file.digest for _, file in self._files)]
        digest = hashlib.sha256(" ".join(parts).encode())
        if self._places is not None:
            digest.update(self._places.tobytes())
        return digest.hexdigest()

    @property
    def longest_in_files(self) -> int:
        """Tokens that the longest pair of the files adds to a stream, selected here or not."""
        return max(file.longest for _, file in self._files)

    @property
    def largest_id(self) -> int:
        """The largest token id in the files."""
        return max(file.largest_id for _, file in self._files)

    def require(self, names: Iterable[str], why: str) -> None:
        """Refuses pairs that lack one of these numbers of `NUMBERS`; `why` opens the message.

        Raises:
            UserError: naming rows.
        """
        for name in sorted(names):
            values = np.concatenate([file.numbers(name) for _, file in self._files])
            values = values[self._all_places()]
            is_bad = ~(values >= 0) if name == "weights" else np.isnan(values)
            if is_bad.any():
                bad = [self.row_name(int(i)) for i in np.flatnonzero(is_bad)[:6]]
                rows = ", ".join(bad[:5]) + (", ..." if bad[5:] else "")
                raise UserError(
                    f"{why} {_what_is_needed(name)}, which {is_bad.sum()} of {len(self)} pairs "
                    f"lack: rows {rows}. Correct the rows or leave them out."
                )

    def select(self, indices: Int[np.ndarray, " selected"]) -> "Pairs":
        """The pairs at these indices, in this order; an index may repeat."""
        return Pairs(self._files, self._all_places()[indices])

    def prompt_digests(self) -> Int[np.ndarray, " pairs"]:
        """A number for each pair, equal for equal prompts."""
        digests = np.concatenate([file.prompt_digests() for _, file in self._files])
        return digests[self._all_places()]


def _what_is_needed(name: str) -> str:
    columns = f"a number in the column {' or '.join(NUMBERS[name])}"
    if name == "margins":
        return f"{columns}, or scores of which the chosen answer's is the higher"
    return columns.replace("a number", "a number of 0 or more") if name == "weights" else columns


@dataclass(frozen=True)
class PreferenceData:
    """What a run trains on and is evaluated on, with a report of what became of the rows."""

    train: Pairs
    held_out: Pairs
    report: dict[str, Any]
    summary: list[str]

    @property
    def digest(self) -> str:
        """Digest of all token ids and of the order of the pairs."""
        return digest(self.train.digest, self.held_out.digest)

    def some_pairs(self, wanted: int) -> tuple[list[TokenizedPair], str]:
        """Up to `wanted` held-out pairs, spread evenly over all; and what they are, in words.

        A run that holds nothing out, like the article's, gives pairs that it trains on.
        """
        pairs = self.held_out if len(self.held_out) else self.train
        kind = "held-out" if len(self.held_out) else "training (this run held nothing out)"
        return [*pairs.select(spread(len(pairs), wanted))], kind


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreferenceData:
    """Reads every source, tokenises what is not cached, holds out what `data` says.

    Raises:
        UserError: a source that cannot be read or holds no usable pair.
    """
    data, seed = config.data, config.train.seed
    sources = list_sources(data)
    files, audit = [], Audit()
    for source in sources:
        name = source.path if len(sources) > 1 else ""
        rows, format = open_rows(source, data, data.subset, data.revision)
        file, its_audit = tokenized(rows, format, data, tokenizer)
        files.append((name, file))
        audit.absorb(its_audit, name)
    weights = [source.weight for source in sources]
    train, held_out = _split(Pairs(files), weights, data.eval_fraction, seed)
    report, summary = audit.report(), [f"data: {audit.summary()}"]
    if data.eval_source:
        same = data.eval_path == data.name_or_path  # other splits of one data set
        part = (data.subset, data.revision) if same else (None, None)
        rows, format = open_rows(data.eval_source, data, *part)
        file, eval_audit = tokenized(rows, format, data, tokenizer)
        held_out = Pairs([("", file)])
        report["held_out_source"] = eval_audit.report()
        summary.append(f"held out: {eval_audit.summary()}")
    report |= {"pairs_trained_on_per_epoch": len(train), "pairs_held_out": len(held_out)}
    if not len(train):
        raise RefusedRowsError(
            f"data: no pair is left to train on: {audit.summary()}; {len(held_out)} held out. "
            "Change data.format, data.max_length, data.eval_fraction or the rows.",
            report,
        )
    return PreferenceData(train, held_out, report, summary)


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


def open_rows(
    source: DataSource, data: DataConfig, subset: str | None, revision: str | None
) -> tuple[Source, str]:
    """The source's rows and their format, which `auto` recognises from the first of them."""
    rows = open_source(source.location, subset=subset, revision=revision, split=source.split)
    rows = rows.without(data.ignored_columns)
    if source.format != "auto":
        return rows, source.format
    return rows, recognise([row.value for row in islice(rows, RECOGNISED_ROWS)], rows.name)


def first_pairs(
    rows: Source,
    format: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    audit: Audit,
) -> Iterator[tuple[RowName, Preference, TokenizedPair]]:
    """The first `count` rows as training would see them, each counted in the audit; no cache."""
    template = choose_template(tokenizer, data)
    chat = ChatTokenizer(tokenizer, template, Limits.of(data), audit)
    for number, value in islice(rows, count):
        preference = read_row(number, value, format, rows.where(number), audit)
        if preference is None:
            continue
        for row, pair in chat.tokenize([(number, preference)]):
            audit.pairs_kept += 1
            yield row, preference, pair


def _split(
    pairs: Pairs, weights: Sequence[float], fraction: float, seed: int
) -> tuple[Pairs, Pairs]:
    """The pairs that an epoch trains on, and those held out."""
    if not fraction and all(weight == 1 for weight in weights):
        return pairs, pairs.select(np.arange(0))  # every pair once: no list of a million places
    is_held_out = _is_held_out(pairs.prompt_digests(), fraction, seed)
    seen = [
        _weighted(np.flatnonzero(~is_held_out & (pairs.source_of_each == i)), weight, (seed, i))
        for i, weight in enumerate(weights)
    ]
    return pairs.select(np.concatenate(seen)), pairs.select(np.flatnonzero(is_held_out))


def _is_held_out(prompts: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Splits by prompt, so that no held-out prompt is trained on under another answer."""
    distinct = np.random.default_rng(seed).permutation(np.unique(prompts))
    return np.isin(prompts, distinct[: round(fraction * len(distinct))])


def _weighted(indices: np.ndarray, weight: float, seed: tuple[int, int]) -> np.ndarray:
    """Every index floor(weight) times, and a random share of them once more."""
    whole, part = divmod(weight, 1)
    extra = np.random.default_rng(seed).permutation(indices)[: round(part * len(indices))]
    return np.concatenate([np.tile(indices, int(whole)), np.sort(extra)])
