"""Rows to token ids, once: in worker processes, into a folder named by what decides the ids.

Token ids are kept in an Arrow file, in a cache folder named by the digest of everything they depend
on: contents of the source, tokenizer, template, lengths. A run with another learning rate finds
them there; one with another tokenizer does not. Every file has a checksum, which is compared before
the tokens are used.

The file is read a small block at a time and not mapped into memory: the kernel maps the neighbours
of each page that is touched, so a few thousand random pairs make the whole file resident.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from jaxtyping import Float, Int
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpo.config import DataConfig
from dpo.data.audit import Audit
from dpo.data.bounded import in_memory
from dpo.data.chat import TEMPLATE_DIFFERS, ChatTokenizer
from dpo.data.files import cache_folder, digest
from dpo.data.formats import (
    NUMBERS,
    Preference,
    RawRow,
    RowError,
    to_preference,
    unread_columns,
)
from dpo.data.limits import OVERLONG, Limits
from dpo.data.sources import Row, Source
from dpo.data.templates import choose_template, require_chatml
from dpo.data.workers import in_order
from dpo.device import num_cores
from dpo.errors import RefusedRowsError, UserError
from dpo.hidden import kinds_in
from dpo.sealed import damage, file_sums, seal

BATCH_ROWS = 1000  # a worker's task: about a second
BLOCK_PAIRS = 50  # read at once: 16 microseconds a pair for short ones, 80 for 600 tokens
MAX_WORKERS = 16  # the one process that reads and writes cannot feed more
MAX_DIFFERING = 0.02  # share of rows whose prompt may render differently; above it, all are refused
_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt_ids": pa.list_(pa.int32()),
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "chosen_scored": pa.list_(pa.bool_()),
        "rejected_scored": pa.list_(pa.bool_()),
    }
    | {name: pa.float64() for name in NUMBERS}
)


class TokenFile:
    """Tokenised pairs of one source, in the folder that `tokenized` made."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._blocks = pa.ipc.open_file(pa.OSFile(str(folder / "pairs.arrow")))
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.digest: str = about["digest"]
        """Digest of all token ids, however they were batched."""
        self.longest: int = about["longest"]
        """Tokens that the longest pair adds to a stream."""
        self.largest_id: int = about["largest_id"]
        """The largest token id."""
        self.report: dict[str, Any] = about["audit"]

    def __len__(self) -> int:
        return self.report["pairs_kept"]

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The columns of one pair."""
        block, row = divmod(place, BLOCK_PAIRS)
        return self._blocks.get_batch(block).slice(row, 1).to_pylist()[0]

    def numbers(self, name: str) -> Float[np.ndarray, " pairs"]:
        """A number of every pair, by its name in NUMBERS; NaN where a row has none."""
        only = pa.ipc.IpcReadOptions(included_fields=[_SCHEMA.get_field_index(name)])
        with pa.OSFile(str(self._folder / "pairs.arrow")) as file:
            return pa.ipc.open_file(file, options=only).read_all()[name].to_numpy()

    def prompt_digests(self) -> Int[np.ndarray, " pairs"]:
        """A number for each pair, equal for equal prompts."""
        return np.fromfile(self._folder / "prompts.int64", dtype=np.int64)


def tokenized(
    source: Source, format: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenFile, Audit]:
    """The source's pairs and audit, from the cache or made now.

    Raises:
        UserError: naming the first row that cannot be read, or that these settings refuse.
    """
    template = choose_template(tokenizer, data)
    limits = Limits.of(data)
    if format == "chatml_dpo_pairs":
        require_chatml(tokenizer, f"{source.name}: the rows are ready-made ChatML")
    key = digest(
        _code_digest(),
        transformers.__version__,
        tokenizers.__version__,
        source.fingerprint,
        format,
        limits,
        template_digest(tokenizer, data),
    )
    folder = cache_folder("dpo_pairs") / key[:32]
    if folder.exists() and (found := damage(folder)):
        print(f"{found}: the rows are tokenised again", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        work = partial(
            _tokenize,
            where=(source.name, source.unit),
            format=format,
            tokenizer=tokenizer,
            template=template,
            limits=limits,
        )
        try:
            _write(folder, source, work, data.max_dropped)
        except OSError as error:
            raise UserError(
                f"{folder.parent} cannot be written ({error.strerror or error}), where the tokens "
                "are kept. Free some space, or set HF_DATASETS_CACHE to a folder on another disk."
            ) from None
    file = TokenFile(folder)
    audit = Audit.from_report(file.report)
    audit.formats = {source.name: format}
    _refuse_drops(source.name, audit.rows_read, audit, data.max_dropped)
    return file, audit


def read_row(
    number: int, value: RawRow, format: str, where: str, audit: Audit
) -> Preference | None:
    """The row as a preference, or None if it is dropped; either way it is counted."""
    audit.rows_read += 1
    try:
        preference = to_preference(value, format, where=where)
    except RowError as error:
        audit.drop(error.reason, number)
        return None
    for name in unread_columns(value, format):
        audit.note(f"column {name!r} not read", number)
    for kind in sorted(kinds_in(vars(preference))):
        audit.note(f"with {kind}", number)
    return preference


class _Batch(NamedTuple):
    """Rows as they were read, and the error of the row after them if it could not be read."""

    rows: list[Row]
    broken: UserError | None = None


class _Tokenized(NamedTuple):
    """A tokenised batch; `keys`, (pairs, 3): row, digest, and digest of the reversed pair."""

    pairs: pa.RecordBatch
    prompts: np.ndarray
    keys: np.ndarray
    longest: int
    audit: Audit


_Work = Callable[[_Batch], _Tokenized]


def _tokenize(
    batch: _Batch,
    *,
    where: tuple[str, str],
    format: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    limits: Limits,
) -> _Tokenized:
    """A worker's task. If several rows are bad, the error names the first."""
    (name, unit), broken = where, batch.broken
    audit, preferences = Audit(), []
    with in_memory():
        chat = ChatTokenizer(tokenizer, template, limits, audit)
    for number, value in batch.rows:
        try:
            if preference := read_row(number, value, format, f"{name}, {unit} {number}", audit):
                preferences.append((number, preference))
        except UserError as error:
            broken = error
            break
    try:
        with in_memory():
            made = list(chat.tokenize_prompts(preferences))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if broken:
        raise broken
    audit.pairs_kept = len(made)
    rows = [{"row": row, **vars(pair), **pair.numbers} for row, _, pair in made]
    prompts = np.array([_prompt_digest(prompt) for _, prompt, _ in made], dtype=np.int64)
    keys = [(row, _short(pair.digest), _short(pair.reversed.digest)) for row, _, pair in made]
    longest = max((pair.num_stream_tokens for _, _, pair in made), default=0)
    pairs = pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)
    return _Tokenized(pairs, prompts, np.array(keys, dtype=np.int64).reshape(-1, 3), longest, audit)


def _prompt_digest(text: str) -> int:
    return _short(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:8], signed=True)


def _write(folder: Path, source: Source, work: _Work, max_dropped: float) -> None:
    """Tokenises the source into a folder, which appears only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        files = Path(unfinished, "complete")
        files.mkdir()
        _write_files(files, source, work, max_dropped)
        seal(files)
        try:
            files.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process has written the same content
                raise


def _write_files(folder: Path, source: Source, work: _Work, max_dropped: float) -> None:
    audit, ids, longest = Audit(), _TokenDigest(), 0
    keys: list[np.ndarray] = []
    left_over = pa.RecordBatch.from_pylist([], schema=_SCHEMA)
    progress = tqdm(
        total=len(source), desc=f"tokenising {source.name}", unit="row", leave=False, disable=None
    )
    with (
        pa.OSFile(str(folder / "pairs.arrow"), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
        (folder / "prompts.int64").open("wb") as prompts,
        closing(in_order(work, _batches(source), _num_workers(len(source)))) as results,
        progress,
    ):
        for made in results:
            audit.absorb(made.audit)
            longest = max(longest, made.longest)
            ids.update(made.pairs)
            prompts.write(made.prompts.tobytes())
            keys.append(made.keys)
            pairs = pa.concat_batches([left_over, made.pairs])
            whole = len(pairs) // BLOCK_PAIRS * BLOCK_PAIRS
            writer.write_table(pa.table(pairs.slice(0, whole)), max_chunksize=BLOCK_PAIRS)
            left_over = pairs.slice(whole)
            progress.update(made.audit.rows_read)
            _refuse_drops(source.name, len(source), audit, max_dropped)
        writer.write_batch(left_over)
    _note_repeats(np.concatenate(keys), audit)
    about = {
        "digest": ids.hexdigest(),
        "longest": longest,
        "largest_id": ids.largest,
        "audit": audit.report(),
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _note_repeats(keys: Int[np.ndarray, "pairs 3"], audit: Audit) -> None:
    """Notes the rows that say what another one says, or the contrary; `keys`: see `_Tokenized`."""
    rows, own, reverse = keys.T
    _, first = np.unique(own, return_index=True)
    for row in np.delete(rows, first).tolist():
        audit.note("the same as an earlier row", row)
    for row in rows[np.isin(own, reverse)].tolist():
        audit.note("the contrary of another row (answers swapped)", row)


class _TokenDigest:
    """sha256 of ids and numbers, a column at a time, so that it does not depend on the batches.

    Attributes:
        largest: the largest id.
    """

    def __init__(self) -> None:
        self.largest = 0
        columns = _SCHEMA.names[1:]  # row numbers are positions, not content
        self._columns = {
            name: (hashlib.sha256(), hashlib.sha256()) for name in columns if name not in NUMBERS
        }
        self._numbers = {name: hashlib.sha256() for name in NUMBERS}
        self._has: set[str] = set()

    def update(self, pairs: pa.RecordBatch) -> None:
        for name, (values, lengths) in self._columns.items():
            flat = pairs[name].flatten().to_numpy(zero_copy_only=False)
            values.update(flat)
            self.largest = max(self.largest, int(flat.max(initial=0)))
            lengths.update(pairs[name].value_lengths().fill_null(-1).to_numpy())
        for name in NUMBERS:
            self._numbers[name].update(pairs[name].to_numpy(zero_copy_only=False))
            if pairs[name].null_count < len(pairs):
                self._has.add(name)

    def hexdigest(self) -> str:
        parts = [part.digest() for both in self._columns.values() for part in both]
        parts += [self._numbers[name].digest() + name.encode() for name in sorted(self._has)]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _refuse_drops(name: str, num_rows: int, audit: Audit, most: float) -> None:
    """Refuses the source once too large a share of it is certain to be dropped for one reason."""
    for reason, dropped in audit.dropped.items():
        seen = f"{dropped.count} of the first {audit.rows_read} rows (such as "
        seen += f"{', '.join(map(str, dropped.rows[:5]))})"
        if reason == TEMPLATE_DIFFERS and dropped.count > MAX_DIFFERING * num_rows:
            raise RefusedRowsError(
                f"{name}: in {seen} the chat template renders the prompt differently once an "
                "answer follows it, so prompt and answer cannot be told apart. Give a template "
                "that only appends, as a file in data.chat_template.",
                audit.report(),
            )
        if reason != OVERLONG and dropped.count > most * num_rows:
            is_the_templates = reason.startswith("the template")
            remedy = (
                "Give one that does in data.chat_template" if is_the_templates else "Correct them"
            )
            raise RefusedRowsError(
                f"{name}: {seen} would be dropped: {reason}. That is more than {most:.0%} of all "
                f"{num_rows}. {remedy}, or raise data.max_dropped.",
                audit.report(),
            )


def _batches(source: Source) -> Iterator[_Batch]:
    """An unreadable row ends the source; its error is raised last, as an earlier row may be bad."""
    rows: list[Row] = []
    try:
        for row in source:
            rows.append(row)
            if len(rows) == BATCH_ROWS:
                yield _Batch(rows)
                rows = []
    except UserError as error:
        yield _Batch(rows, error)
    else:
        yield _Batch(rows)


def _num_workers(num_rows: int) -> int:
    """One per core; but a few thousand rows are done before another process has started."""
    return max(1, min(num_cores(), MAX_WORKERS, num_rows // (2 * BATCH_ROWS)))


def _code_digest() -> str:
    """Digest of the code that decides the token ids: a changed rule must not find old tokens."""
    return digest(file_sums(Path(__file__).parent, "*.py"))


def template_digest(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    """Digest of the tokenizer's files and of the template that `data` means for it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except UnicodeEncodeError as error:
            raise UserError(
                f"model.name_or_path: a text of the tokenizer is not Unicode ({error.reason}), so "
                "that it cannot be saved. Correct tokenizer_config.json."
            ) from None
        return digest(choose_template(tokenizer, data), file_sums(Path(folder), "*"))
