"""Files of rows with flipped, lost or doubled bytes: each is read, its rows dropped, or refused.

`FUZZ` is ten times their number; `make fuzz N=100000` prints what came of them.
"""

import gzip
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo.cli import parse
from dpo.data.loader import load_data
from dpo.errors import UserError
from dpo.model.named import load_tokenizer
from tests.fuzz.test_rows import MUTATIONS
from tests.train.runs import rows_file


def damaged(content, chance):
    """A copy with some bytes other, gone, or there twice."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(content))
        how = chance.randrange(4)
        if how == 0:
            content[at] = chance.randrange(256)
        elif how == 1:
            del content[at : at + chance.randint(1, 200)]
        elif how == 2:
            content[at:at] = content[at : at + chance.randint(1, 200)]
        else:
            content[at] ^= 1 << chance.randrange(8)
    return bytes(content) or b"x"


def written(rows, suffix, file):
    """The rows in a file of that kind."""
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_a_damaged_file_is_read_or_refused_by_its_name(
    suffix, tmp_path, monkeypatch, record_property
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    chance, tokenizer = random.Random(suffix), load_tokenizer(parse([]).model)
    rows = [json.loads(line) for line in rows_file(tmp_path, 6).read_text().splitlines()]
    whole = written(rows, suffix, tmp_path / f"whole{suffix}")
    number = MUTATIONS // (10 if suffix == ".jsonl" else 100)
    kept, refused, tracebacks, nameless = 0, 0, [], []
    for trial in range(number + 1):
        file = tmp_path / f"rows-{trial}{suffix}"
        file.write_bytes(damaged(whole, chance) if trial else whole)
        flags = ["--data.name_or_path", str(file), "--data.max_dropped", "1"]
        try:
            report = load_data(parse(flags), tokenizer).report
            dropped = sum(tally["count"] for tally in report["dropped"].values())
            assert report["rows_read"] == report["pairs_kept"] + dropped
            kept += bool(trial)
        except UserError as error:
            if not trial:
                raise
            refused += 1
            if not any(place in str(error) for place in (file.name, "data.")):
                nameless.append(str(error)[:200])
        except Exception as error:
            tracebacks.append((file.read_bytes()[:100], repr(error)[:300]))
        file.unlink()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    outcome = f"{kept} read, {refused} refused, {len(tracebacks)} tracebacks"
    figures = f"{number} {suffix} files: {outcome}, {len(nameless)} without a place"
    record_property("figures", figures)
    assert not nameless, "\n".join(nameless[:20])
    assert not tracebacks, "\n".join(map(str, tracebacks[:20]))
