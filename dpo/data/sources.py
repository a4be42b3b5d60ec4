"""Where rows come from: a local file, a saved data set, or the Hugging Face hub.

JSON is read here and not by `datasets`, which turns missing keys into nulls and a NaN into a
number, and reports a broken line only as "an error occurred": every error below names the file
and the line. JSON lines are streamed, so a file may be larger than memory; a .json list is parsed
whole. The rest goes through `datasets`, imported where it is needed because that takes a second.

Left out on purpose: CSV (it has no lists) and data set scripts (they run code of strangers).
"""

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dpo.data.files import digest, file_digests
from dpo.errors import UserError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


class Row(NamedTuple):
    """One row and its number: the line of a JSON-lines file, else the row; both count from 1."""

    number: int
    value: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that can be read again and again: `for number, row in source`."""

    name: str
    """As the user wrote it."""
    unit: str
    """What a row number counts: "line" or "row"."""
    read: Callable[[], Iterator[Row]]
    count: Callable[[], int]
    digest: Callable[[], str]

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return self.count()

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: sha256 of the files, or the fingerprint that `datasets` keeps."""
        return self.digest()

    def without(self, columns: Sequence[str]) -> "Source":
        """The same rows without these columns."""
        if not columns:
            return self
        return replace(
            self,
            read=lambda: (
                Row(n, {name: row[name] for name in row if name not in columns}) for n, row in self
            ),
            digest=lambda: digest(self.fingerprint, sorted(columns)),
        )

    def where(self, number: int) -> str:
        """`rows.jsonl, line 7`: how a message names a row."""
        return f"{self.name}, {self.unit} {number}"


def open_source(
    path: str, *, subset: str | None = None, revision: str | None = None, split: str = "train"
) -> Source:
    """Open a file, a folder or a hub id; an existing local path wins over a hub id.

    Files: .jsonl, .json (one list of objects, or one object a line), either with .gz, and .parquet.
    Folders: what `save_to_disk` wrote, or parquet files as a hub repository lays them out.
    The first row is read at once, so that an empty or broken source is refused before work starts.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        source = _folder(path, local, subset=subset, revision=revision, split=split)
    elif local.exists():
        _refuse_options(path, subset=subset, revision=revision, split=split)
        source = _parquet(path, local) if path.lower().endswith(".parquet") else _json(path, local)
    elif path.startswith((".", "/", "~")) or path.lower().endswith(SUFFIXES):
        _refuse_missing(path, local)
    else:
        source = _hub(path, subset=subset, revision=revision, split=split)
    if next(iter(source), None) is None:
        raise UserError(f"{path} holds no rows. Name a file, folder or hub id that has some.")
    return source


def _refuse_options(
    path: str, *, subset: str | None = None, revision: str | None = None, split: str = "train"
) -> None:
    """Refuses options that a local table does not have; ignored, they would mean other rows."""
    options = {"subset": subset, "revision": revision, "split": None if split == "train" else split}
    for key, value in options.items():
        if value is not None:
            raise UserError(
                f"{path} is local data without a {key}, but data.{key} is {value!r}. "
                f"Leave data.{key} out, or name the file that holds those rows."
            )


def _refuse_missing(path: str, local: Path) -> NoReturn:
    folder = local.parent
    if not folder.is_dir():
        raise UserError(
            f"{path} does not exist, and there is no folder {folder}. Correct the path."
        )
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(local.name, names, n=1, cutoff=0)
    hint = f"the nearest name in {folder} is {near[0]}" if near else f"{folder} is empty"
    raise UserError(f"{path} does not exist; {hint}. Correct the path.")


def _digest(path: Path) -> str:
    (digest,) = file_digests([path])
    return digest


def _json(name: str, path: Path) -> Source:
    if not name.lower().endswith(JSON_SUFFIXES):
        raise UserError(
            f"{name} is a file of a type that is not read. Types read: {', '.join(SUFFIXES)}. "
            "Convert it, or name another."
        )
    first = next((line for _, line in _lines(name, path) if line.strip()), "")
    if first.lstrip().startswith("[") and name.lower().endswith((".json", ".json.gz")):
        read = partial(_list_rows, name, path)
        unit, count = "row", lambda: sum(1 for _ in read())
    else:
        read = partial(_line_rows, name, path)
        unit, count = "line", lambda: sum(1 for _, line in _lines(name, path) if line.strip())
    digest = partial(_digest, path)
    return Source(name=name, unit=unit, read=read, count=count, digest=digest)


def _lines(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its newline); a byte-order mark is dropped."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at position {error.start + 1}"
        _refuse(name, number, f"not UTF-8, {byte}", "Save the file as UTF-8.")
    except (OSError, EOFError, zlib.error) as error:
        problem = f"the file cannot be read from here on ({error})"
        _refuse(name, number + 1, problem, "Check its permissions, or fetch it again.")


def _line_rows(name: str, path: Path) -> Iterator[Row]:
    for number, line in _lines(name, path):
        if line := line.rstrip():
            value, end = _decode(name, line, _skip_space(line, 0), lines_before=number - 1)
            if end < len(line):
                _refuse(name, number, f"more follows after the object, at column {end + 1}")
            yield Row(number, value)


def _list_rows(name: str, path: Path) -> Iterator[Row]:
    """The items of a JSON list, decoded one by one so that an error has its line."""
    text = "".join(line for _, line in _lines(name, path))
    number, at = 0, _skip_space(text, text.index("[") + 1)
    while number or not text.startswith("]", at):  # "]" may follow "[" but not a comma
        value, at = _decode(name, text, at)
        yield Row(number := number + 1, value)
        at = _skip_space(text, at)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            _refuse(name, _line_of(text, at), "the list is cut off or lacks a comma here")
        at = _skip_space(text, at + 1)
    if (end := _skip_space(text, at + 1)) < len(text):
        _refuse(name, _line_of(text, end), "more follows after the list")


def _decode(name: str, text: str, at: int, *, lines_before: int = 0) -> tuple[dict[str, Any], int]:
    """Decode the object at `at`; return it and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        if _ESCAPED_SURROGATE.search(text, at, end):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair would fail far from here
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg}, at column {error.colno}"
        _refuse(name, lines_before + error.lineno, problem)
    except UnicodeEncodeError:
        _refuse(name, lines_before + _line_of(text, at), r"half of a \u surrogate pair")
    except (ValueError, RecursionError) as error:
        _refuse(name, lines_before + _line_of(text, at), f"not a row: {error}")
    if not isinstance(value, dict):
        problem = f"not an object but {type(value).__name__}"
        _refuse(name, lines_before + _line_of(text, at), problem)
    return value, end


def _refuse(name: str, line: int, problem: str, remedy: str = "") -> NoReturn:
    wanted = "Wanted one object a line, or in a .json file one list of objects. Correct the file."
    raise UserError(f"{name}, line {line}: {problem}. {remedy or wanted}")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return row


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _folder(
    name: str, path: Path, *, subset: str | None, revision: str | None, split: str
) -> Source:
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        _refuse_options(name, subset=subset, revision=revision)
        remedy = "Save it again with save_to_disk."
        saved = _loaded(
            lambda: datasets.load_from_disk(str(path)), f"{name} cannot be read", remedy
        )
        if not isinstance(saved, datasets.DatasetDict):
            _refuse_options(name, split=split)
            return _table(name, saved)
        if split not in saved:
            splits = ", ".join(map(str, saved))
            raise UserError(f"{name} has no split {split!r}. Set data.split to one of: {splits}.")
        return _table(name, saved[split])
    files = sorted(path.rglob("*.parquet"))
    if not files:
        inside = sorted(p.name for p in path.iterdir() if p.name.lower().endswith(JSON_SUFFIXES))
        raise UserError(
            f"{name} is a folder with neither a saved data set nor parquet files. "
            f"Name one file; JSON files inside: {', '.join(inside) or 'none'}."
        )
    _refuse_options(name, revision=revision)
    rows = _loaded(
        lambda: datasets.load_dataset(str(path), name=subset, split=split),
        f"the parquet files in {name} cannot be read",
        "Check data.subset and data.split, or name one file.",
    )
    return _table(name, rows, digest=lambda: _digest_of_part(files, subset, split))


def _digest_of_part(files: list[Path], subset: str | None, split: str) -> str:
    """Includes subset and split, since the files hold all those of the data set."""
    return digest(subset, split, file_digests(files))


def _parquet(name: str, path: Path) -> Source:
    import datasets

    rows = _loaded(
        lambda: datasets.load_dataset("parquet", data_files=str(path), split="train"),
        f"{name} cannot be read as parquet",
        "Write or fetch it again.",
    )
    return _table(name, rows, digest=partial(_digest, path))


def _hub(name: str, *, subset: str | None, revision: str | None, split: str) -> Source:
    import datasets

    rows = _loaded(
        lambda: datasets.load_dataset(name, name=subset, revision=revision, split=split),
        f"{name} is no local file or folder, and could not be loaded from the Hugging Face hub",
        "Check the spelling, data.subset, data.revision and data.split; log in (hf auth login) if "
        "it is private or gated; without a network, set data.name_or_path to a local file.",
    )
    return _table(name, rows)


def _loaded(load: Callable[[], Any], problem: str, remedy: str) -> Any:
    """Call `load`; a failure of `datasets` becomes `problem`, its own words and `remedy`."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return load()
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise UserError(f"{problem} ({cause or error}). {remedy}") from error


def _table(name: str, rows: Any, digest: Callable[[], str] | None = None) -> Source:
    plain = rows.with_format(None)  # a saved data set may hand out tensors
    return Source(
        name=name,
        unit="row",
        read=lambda: _table_rows(name, plain),
        count=lambda: len(plain),
        digest=digest or (lambda: rows._fingerprint),
    )


def _table_rows(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    number = 0
    try:
        for number, value in enumerate(rows, start=1):
            yield Row(number, _own_keys(value))
    except UnicodeDecodeError as error:  # Arrow keeps bytes, and compares no text with UTF-8
        raise UserError(
            f"{name}, row {number + 1} cannot be read: its text is not UTF-8 ({error.reason}). "
            "Write it again."
        ) from None


def _own_keys(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls inside its columns.

    Arrow gives every object of a column the keys of all of them; in JSON a null is the user's.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
