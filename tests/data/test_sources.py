"""Files and folders of every kind, and the message for each way in which one can be broken."""

import gzip
import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled

from dpo.data.sources import Row, open_source
from dpo.errors import UserError

ROWS = [
    {"prompt": "Name a river.", "chosen": "The Rhine.", "rejected": "Paris."},
    {"prompt": "Grüß dich 🌊", "chosen": "a\u2028b", "rejected": None},
    {"prompt": "no answers"},
]
WANTED = "Wanted one object a line, or in a .json file one list of objects. Correct the file."


@pytest.fixture(autouse=True)
def _quiet_datasets(tmp_path, monkeypatch):
    """Keep the Arrow cache of `datasets` inside the test, and its progress bars away."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
        return str(path)

    return write


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refusal(path, **options):
    """The message with which a source is refused, at the latest when its rows are read."""
    with pytest.raises(UserError) as caught:
        list(open_source(path, **options))
    return str(caught.value)


# JSON


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.JSON.gz"])
def test_json_lines_are_rows_numbered_by_line(write, name):
    """Missing keys stay missing and nulls null; a line separator inside a string is no line."""
    source = open_source(write(name, lines()))
    assert list(source) == [Row(1, ROWS[0]), Row(2, ROWS[1]), Row(3, ROWS[2])]
    assert [number for number, _ in source] == [1, 2, 3]
    assert len(source) == 3
    assert source.where(2) == f"{source.name}, line 2"


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_rows_numbered_by_row(write, name, indent):
    source = open_source(write(name, " \n" + json.dumps(ROWS, indent=indent) + "\n"))
    assert list(source) == [Row(1, ROWS[0]), Row(2, ROWS[1]), Row(3, ROWS[2])]
    assert len(source) == 3
    assert source.where(2) == f"{source.name}, row 2"


def test_blank_lines_are_skipped_and_counted(write):
    source = open_source(write("rows.jsonl", '\n{"a": 1}\r\n   \n\n{"a": 2}'))
    assert list(source) == [Row(2, {"a": 1}), Row(5, {"a": 2})]
    assert len(source) == 2


@pytest.mark.parametrize("content", ['{"a": 1}\n', '[{"a": 1}]'])
def test_a_byte_order_mark_is_dropped(write, content):
    assert list(open_source(write("rows.json", "\ufeff" + content))) == [Row(1, {"a": 1})]


def test_json_lines_are_streamed(write):
    """Opening reads the first line alone; the broken one is met where it stands."""
    source = open_source(write("rows.jsonl", '{"a": 1}\n' * 3 + "{"))
    rows = iter(source)
    assert [next(rows).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="line 4"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('{"a": 1}\n{"a": }\n', 2, "not JSON: Expecting value, at column 7"),
        ('\n\n  {"a": 1, }', 3, "not JSON: "),
        ('{"a": "x', 1, "not JSON: Unterminated string starting at, at column 7"),
        ('{"a": 1} {"a": 2}', 1, "more follows after the object, at column 9"),
        ('{"a": 1}\n[1]\n', 2, "not an object but list"),
        ('{"a": 1}\n"a"\n', 2, "not an object but str"),
        ('{"a": 1}\n{"a": NaN}', 2, "not a row: NaN is not a JSON value"),
        ('{"a": [-Infinity]}', 1, "not a row: -Infinity is not a JSON value"),
        ('{"a": 1}\n{"a": 1, "b": 2, "a": 3}', 2, "not a row: the key 'a' appears twice"),
        ('{"m": [{"role": "x", "role": "y"}]}', 1, "not a row: the key 'role' appears twice"),
        ('{"a": 1}\n{"a": "\\ud83d"}', 2, r"half of a \u surrogate pair"),
        ('{"a": ' + "[" * 100_000, 1, "not a row: "),
    ],
)
def test_a_broken_line_is_refused_with_file_line_and_remedy(write, content, line, problem):
    path = write("rows.jsonl", content)
    message = refusal(path)
    assert message.startswith(f"{path}, line {line}: {problem}")
    assert message.endswith(WANTED)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', 3, "not JSON: Expecting value, at column 7"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "the list is cut off or lacks a comma here"),
        ('[\n{"a": 1},\n', 3, "not JSON: Expecting value"),
        ('[\n{"a": 1}', 2, "the list is cut off or lacks a comma here"),
        ('[{"a": 1},\n]', 2, "not JSON: Expecting value"),
        ('[{"a": 1}]\n[]', 2, "more follows after the list"),
        ('[{"a": 1},\n\n7]', 3, "not an object but int"),
        ('[{"a": 1},\n{"a": NaN}]', 2, "not a row: NaN is not a JSON value"),
        ('{\n  "data": []\n}', 1, "not JSON: "),
        ("[", 1, "not JSON: "),
    ],
)
def test_a_broken_list_is_refused_with_file_line_and_remedy(write, content, line, problem):
    path = write("rows.json", content)
    message = refusal(path)
    assert message.startswith(f"{path}, line {line}: {problem}")
    assert message.endswith(WANTED)


def test_a_whole_surrogate_pair_is_a_character(write):
    content = '{"a": "\\ud83c\\udf0a"}'
    assert list(open_source(write("rows.jsonl", content))) == [Row(1, {"a": "🌊"})]


@pytest.mark.parametrize("start", ["", "["])
def test_invalid_utf8_is_refused_with_line_byte_and_remedy(write, start):
    path = write("rows.json", f'{start}{{"a": 1}}\n'.encode() + b'{"a": "\xff"}\n')
    expected = f"{path}, line 2: not UTF-8, byte 0xff at position 8. Save the file as UTF-8."
    assert refusal(path) == expected


def test_a_truncated_gzip_file_is_refused_where_it_ends(tmp_path):
    whole = gzip.compress("".join(f'{{"a": {i}}}\n' for i in range(100_000)).encode())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    message = refusal(str(path))
    number = int(message.removeprefix(f"{path}, line ").split(":")[0])
    assert 1000 < number < 100_000
    assert "cannot be read from here on (Compressed file ended before" in message
    assert message.endswith("Check its permissions, or fetch it again.")


def test_a_file_that_only_claims_to_be_gzip_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_text('{"a": 1}\n')
    assert refusal(str(path)).startswith(f"{path}, line 1: the file cannot be read from here on")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", " [ ] "), ("a.json.gz", "")],
)
def test_a_file_without_rows_is_refused_when_it_is_opened(write, name, content):
    path = write(name, content)
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert str(caught.value) == (
        f"{path} holds no rows. Name a file, folder or hub id that has some."
    )


def test_the_fingerprint_follows_the_content_and_not_the_name(write):
    """The expected value is that of the command sha256sum."""
    first, copy = (open_source(write(name, '{"a": 1}\n')) for name in ("a.jsonl", "b.jsonl"))
    other = open_source(write("c.jsonl", '{"a": 2}\n'))
    assert first.fingerprint == copy.fingerprint != other.fingerprint
    expected = "e8c628edc9968ef0c668f54e0ba2636b35503357eb1aca0ddc828aeace432f67"
    assert first.fingerprint == expected


# paths


def test_a_missing_file_is_refused_with_the_nearest_name(write, tmp_path):
    write("pairs.jsonl", lines())
    write("notes.txt", "")
    path = str(tmp_path / "pair.json")
    assert refusal(path) == (
        f"{path} does not exist; the nearest name in {tmp_path} is pairs.jsonl. Correct the path."
    )


def test_a_missing_file_in_an_empty_or_missing_folder_says_so(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    assert refusal(path) == f"{path} does not exist; {tmp_path} is empty. Correct the path."
    path = str(tmp_path / "no" / "rows")
    expected = f"{path} does not exist, and there is no folder {tmp_path / 'no'}. Correct the path."
    assert refusal(path) == expected


@pytest.mark.parametrize(
    "path", ["./rows", "../rows", "~/no such/rows", "rows.jsonl", "a/b.parquet"]
)
def test_what_looks_like_a_path_is_never_sought_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert refusal(path).startswith(f"{path} does not exist")


def test_a_path_may_be_relative_or_below_home(write, tmp_path, monkeypatch):
    write("rows.jsonl", '{"a": 1}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("rows.jsonl").where(1) == "rows.jsonl, line 1"
    assert list(open_source("~/rows.jsonl")) == [Row(1, {"a": 1})]


def test_an_unknown_file_type_is_refused_with_those_known(write):
    path = write("rows.csv", "a,b\n")
    assert refusal(path) == (
        f"{path} is a file of a type that is not read. Types read: .jsonl, .jsonl.gz, .json, "
        ".json.gz, .parquet. Convert it, or name another."
    )


@pytest.mark.parametrize("option", [{"subset": "de"}, {"revision": "main"}, {"split": "test"}])
def test_an_option_that_a_file_cannot_honour_is_refused(write, option):
    path = write("rows.jsonl", lines())
    (key, value), *_ = option.items()
    assert refusal(path, **option) == (
        f"{path} is local data without a {key}, but data.{key} is {value!r}. "
        f"Leave data.{key} out, or name the file that holds those rows."
    )


# datasets


@pytest.fixture
def table():
    return datasets.Dataset.from_list(ROWS)


FILLED = [{**dict.fromkeys(("prompt", "chosen", "rejected")), **row} for row in ROWS]


def test_parquet_rows_are_numbered_from_one(table, tmp_path):
    path = str(tmp_path / "rows.parquet")
    table.to_parquet(path)
    source = open_source(path)
    assert list(source) == [Row(number, row) for number, row in enumerate(FILLED, start=1)]
    assert (len(source), source.where(3)) == (3, f"{path}, row 3")
    assert len(source.fingerprint) == 64


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_a_broken_parquet_file_is_refused_with_its_name(write, content):
    path = write("rows.parquet", content)
    message = refusal(path)
    assert message.startswith(f"{path} cannot be read as parquet (")
    assert message.endswith(". Write or fetch it again.")


def test_a_saved_dataset_is_read_in_plain_python_objects(table, tmp_path):
    path = str(tmp_path / "saved")
    table.with_format("numpy").save_to_disk(path)
    source = open_source(path)
    assert [row for _, row in source] == FILLED
    assert all(type(row["prompt"]) is str for _, row in source)
    assert source.fingerprint == open_source(path).fingerprint


def test_a_saved_dataset_dict_gives_the_split_that_was_asked_for(table, tmp_path):
    path = str(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(path)
    assert len(open_source(path)) == 3
    assert list(open_source(path, split="test")) == [Row(1, FILLED[2])]
    expected = f"{path} has no split 'val'. Set data.split to one of: train, test."
    assert refusal(path, split="val") == expected


def test_a_saved_dataset_without_the_split_is_refused(table, tmp_path):
    path = str(tmp_path / "saved")
    table.save_to_disk(path)
    assert refusal(path, split="test").startswith(f"{path} is local data without a split")
    assert "data.revision is 'v1'" in refusal(path, revision="v1")


def test_a_damaged_saved_dataset_is_refused_with_its_name(table, tmp_path):
    path = tmp_path / "saved"
    table.save_to_disk(path)
    (path / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    message = refusal(str(path))
    assert message.startswith(f"{path} cannot be read (")
    assert message.endswith(". Save it again with save_to_disk.")


def test_a_folder_of_parquet_files_is_read_as_on_the_hub(table, tmp_path):
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    table.to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    table.select([0]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert len(open_source(str(folder))) == 6
    assert len(open_source(str(folder), split="test")) == 1
    message = refusal(str(folder), split="val")
    assert message.startswith(f"the parquet files in {folder} cannot be read (Unknown split")
    assert message.endswith("Check data.subset and data.split, or name one file.")


def test_a_folder_of_other_files_is_refused_with_the_files_that_could_be_named(write, tmp_path):
    write("b.jsonl", lines())
    write("a.json", lines())
    write("notes.txt", "")
    assert refusal(str(tmp_path)) == (
        f"{tmp_path} is a folder with neither a saved data set nor parquet files. "
        "Name one file; JSON files inside: a.json, b.jsonl."
    )


# the hub


def test_a_hub_id_is_loaded_with_the_options_and_nothing_else(table, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("Intel/orca_dpo_pairs")
    assert [row for _, row in source] == FILLED
    assert source.where(1) == "Intel/orca_dpo_pairs, row 1"
    assert source.fingerprint == table._fingerprint
    open_source("some/set", subset="de", revision="v1", split="train_prefs")
    assert calls == [
        (("Intel/orca_dpo_pairs",), {"name": None, "revision": None, "split": "train"}),
        (("some/set",), {"name": "de", "revision": "v1", "split": "train_prefs"}),
    ]


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'no/set' doesn't exist on the Hub"),
        OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled."),
        ConnectionError("Couldn't reach 'no/set' on the Hub (OfflineModeIsEnabled)"),
        ValueError("Unknown split \"train\". Should be one of ['test']."),
    ],
)
def test_a_hub_failure_is_a_user_error_with_id_cause_and_remedy(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("no/set") == (
        "no/set is no local file or folder, and could not be loaded from the Hugging Face hub "
        f"({error}). Check the spelling, data.subset, data.revision and data.split; log in (hf "
        "auth login) if it is private or gated; without a network, set data.name_or_path to a "
        "local file."
    )


def test_the_cause_of_a_failed_generation_is_told(monkeypatch):
    def load_dataset(*_, **__):
        raise DatasetGenerationError("An error occurred") from OSError("disk full")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "(disk full)" in refusal("some/set")


def test_json_is_read_without_importing_datasets(write):
    path = write("rows.jsonl", lines())
    code = (
        "import sys; from dpo.data.sources import open_source; "
        f"print(len(open_source({path!r})), 'datasets' in sys.modules)"
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, check=True, capture_output=True, text=True)
    assert out.stdout == "3 False\n"


def test_text_in_a_table_that_is_not_utf_8_is_refused_by_its_row(tmp_path):
    """Arrow reads it without a word; Python cannot."""
    text = pa.array([b"a", b"\xff"], pa.binary()).cast(pa.string(), safe=False)
    rows = dict.fromkeys(("prompt", "chosen", "rejected"), text)
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet, row 2 cannot be read: its text is not UTF"):
        list(open_source(str(tmp_path / "rows.parquet")))
