"""Rows are tokenised once, into a folder named by all that the token ids depend on."""

import gc
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from dpo.config import DataSource
from dpo.data import tokens
from dpo.data.loader import load_data
from dpo.errors import UserError
from tests.data.rows import chat_row, config, load, names, row, rows
from tests.data.tokenizers import BASE, FAMILIES, GPT_2, build

pytestmark = pytest.mark.usefixtures("cache")  # empty, for every test


def test_the_digest_tells_tokens_and_order_apart_and_not_how_they_were_batched(write, monkeypatch):
    path = write(rows(20))
    first = load(path).train
    assert first.select(np.arange(20)[::-1]).digest != first.digest
    assert first.select(np.arange(19)).digest != first.digest
    assert load(write([*rows(19), row("question 20", "no", "yes")], "b.jsonl")).train.digest != (
        first.digest
    )
    moved = load(write([None, *rows(20)], "c.jsonl")).train  # the same pairs, on other lines
    monkeypatch.setattr(tokens, "BATCH_ROWS", 3)
    monkeypatch.setattr(tokens, "_code_digest", lambda: "another")
    again = load(path).train
    assert first.digest == again.digest == moved.digest
    assert names(moved) != names(again)


def test_a_pair_is_found_in_whichever_block_it_lies(write, monkeypatch):
    """Blocks of 3 pairs across batches of 4 rows, of which some are dropped."""
    monkeypatch.setattr(tokens, "BATCH_ROWS", 4)
    monkeypatch.setattr(tokens, "BLOCK_PAIRS", 3)
    kept = [i for i in range(1, 24) if i % 5]
    given = [row(f"question {i}", "yes", "no" if i % 5 else "yes") for i in range(1, 24)]
    data = load(write(given))
    assert names(data.train) == [*map(str, kept)]
    tokenizer = build(BASE)
    asked = [tokenizer.decode(pair.prompt_ids) for pair in data.train]
    assert asked == [f"<s>question {i}" for i in kept]
    with pytest.raises(IndexError):
        data.train[len(kept)]


def test_opening_and_reading_pairs_takes_no_memory_that_grows_with_the_file(write):
    """One block, and the index of blocks: 40 times the rows take no more."""
    (small, _), (large, size) = (held_while_reading(write(rows(n))) for n in (100, 3900))
    assert large < 1.5 * small
    assert large < size / 10


def held_while_reading(path):
    """The largest number of bytes that Arrow held while pairs were read, and those of the file."""
    load(path)
    gc.collect()  # or what other tests held goes meanwhile
    before = pa.total_allocated_bytes()
    data = load(path)
    ((_, file),) = data.train._files
    held = []
    for i in range(len(data.train)):
        block = file._blocks.get_batch(i // tokens.BLOCK_PAIRS)
        held.append(pa.total_allocated_bytes() - before)
        del block
    return max(held), (file._folder / "pairs.arrow").stat().st_size


def test_the_same_content_is_tokenised_once_whatever_else_changes(write, tokenised, cache):
    """Another name, learning rate, seed or weight and a fresh tokenizer find what is there."""
    path = write([*rows(3), row("x", "same", "same")])
    first = load(path)
    assert tokenised == [1, 2, 3, 4]
    (entry,) = cache.iterdir()
    renamed = write([*rows(3), row("x", "same", "same")], "renamed.jsonl")
    settings = config(renamed, seed=7, eval_fraction=0.4)
    settings.optim.learning_rate = 1.0
    second = load_data(settings, build(BASE))
    several = load([DataSource(path=path, weight=3.0), DataSource(path=renamed)])
    assert (len(tokenised), list(cache.iterdir())) == (4, [entry])
    assert list(load(path).train) == list(first.train)
    assert second.report["formats"] == {renamed: "text"}
    assert second.report["dropped"]["identical answers"]["rows"] == [4]
    assert several.report["dropped"]["identical answers"]["rows"] == [f"{path}:4", f"{renamed}:4"]


@pytest.mark.parametrize(
    "change",
    "content max_length max_prompt_length on_overlong truncation template format".split(),
)
def test_what_token_ids_depend_on_tokenises_again(write, tokenised, tmp_path, change):
    path = write([chat_row("Q?", "A.", "B.")])
    load(path, FAMILIES["chatml"])
    tokenised.clear()
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    options = {
        "content": {},
        "max_length": {"max_length": 1535},
        "max_prompt_length": {"max_prompt_length": 1023},
        "on_overlong": {"on_overlong": "drop"},
        "truncation": {"truncation": "left"},
        "template": {"chat_template": str(template)},
        "format": {"format": "openai"},
    }[change]
    if change == "content":
        path = write([chat_row("Q?", "A.", "B!")])
    if change == "format":  # another reading of the same file, which here is a refused one
        with pytest.raises(UserError, match=r"as data\.format is openai"):
            load(path, FAMILIES["chatml"], **options)
    else:
        load(path, FAMILIES["chatml"], **options)
        assert tokenised == [1]


def test_another_tokenizer_tokenises_again(write, tokenised):
    path = write(rows(2))
    load(path, BASE)
    load(path, GPT_2)
    assert tokenised == [1, 2, 1, 2]


def test_changed_code_tokenises_again(write, tokenised, monkeypatch):
    path = write(rows(2))
    load(path)
    monkeypatch.setattr(tokens, "_code_digest", lambda: "another")
    load(path)
    assert tokenised == [1, 2, 1, 2]


def test_another_process_finds_the_tokens(write, tokenised, cache):
    """No key depends on Python's hashes, which differ from process to process."""
    path = write(rows(3))
    load(path)
    program = (
        "import sys\n"
        "from tests.data.rows import BASE, ChatTokenizer, build, config, load_data\n"
        "ChatTokenizer.tokenize_prompts = None\n"
        "print(len(load_data(config(sys.argv[1]), build(BASE)).train))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr


def test_an_interrupted_write_leaves_nothing(write, cache, monkeypatch, tokenised):
    path = write(rows(5))
    monkeypatch.setattr(tokens, "BATCH_ROWS", 2)
    read = tokens.to_preference

    def interrupted(value, *args, **kwargs):
        if value["prompt"] == "question 4":
            raise KeyboardInterrupt
        return read(value, *args, **kwargs)

    monkeypatch.setattr(tokens, "to_preference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(path)
    assert list(cache.iterdir()) == []
    assert tokenised == [1, 2]
    monkeypatch.setattr(tokens, "to_preference", read)
    assert len(load(path).train) == 5


def test_what_a_killed_process_left_behind_is_not_used(write, cache, monkeypatch):
    """A kill leaves the unfinished folder; only its rename would have made it an entry."""
    path = write(rows(3))
    (cache / ".unfinished-x" / "complete").mkdir(parents=True)
    (cache / ".unfinished-x" / "complete" / "pairs.arrow").write_bytes(b"half")
    assert len(load(path).train) == 3


def test_two_processes_that_tokenise_at_once_agree(write, cache, monkeypatch):
    """The second finds the folder there when it is done, and takes it."""
    path = write(rows(3))
    write_files = tokens._write_files

    def overtaken(*args):
        monkeypatch.setattr(tokens, "_write_files", write_files)
        load(path)
        write_files(*args)

    monkeypatch.setattr(tokens, "_write_files", overtaken)
    assert len(load(path).train) == 3
    assert len(list(cache.iterdir())) == 1


def test_the_progress_bar_leaves_nothing_where_there_is_no_terminal(write, capfd):
    load(write(rows(3)))
    assert capfd.readouterr() == ("", "")


def test_rows_that_repeat_or_contradict_others_are_noted(write, monkeypatch):
    """Across batches; they are trained on all the same. Other answers to one prompt are neither."""
    monkeypatch.setattr(tokens, "BATCH_ROWS", 2)
    asked = [row("a"), row("b"), row("a"), row("b", "no", "yes"), row("b", "yes", "maybe")]
    report = load(write(asked)).report
    assert report["pairs_kept"] == 5
    assert {what: tally["rows"] for what, tally in report["noted"].items()} == {
        "the same as an earlier row": [3],
        "the contrary of another row (answers swapped)": [2, 4],
    }


def test_the_quickstart_rows_are_tokenised_with_none_lost():
    from transformers import AutoTokenizer

    from dpo.config import PACKAGE

    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "quickstart" / "model")
    data = load_data(config("quickstart/train.jsonl"), tokenizer)
    assert data.report["rows_read"] == data.report["pairs_kept"] > 1000
    assert (data.report["cut"], data.report["noted"]) == ({}, {})
    ends = {ids[-1] for pair in data.train for ids in (pair.chosen_ids, pair.rejected_ids)}
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
