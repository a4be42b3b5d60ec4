"""Files to tokenised pairs: what is kept, reported, cached, held out, weighted, ordered, binned."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from dpo.config import Config, DataSource
from dpo.data import tokens, workers
from dpo.data.chat import TEMPLATE_DIFFERS, ChatTokenizer
from dpo.data.formats import to_preference
from dpo.data.loader import load_data
from dpo.errors import UserError
from tests.data.tokenizers import BASE, FAMILIES, GPT_2, Family, build


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test starts with an empty cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "dpo_pairs"


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = (json.dumps(row, ensure_ascii=False) if row else "" for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tokenised(monkeypatch):
    """The rows that went through the tokenizer, as they go; in one process, or they go unseen."""
    rows = []
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 1)
    tokenize = ChatTokenizer.tokenize_prompts

    def counted(self, batch):
        rows.extend(row for row, _ in batch)
        return tokenize(self, batch)

    monkeypatch.setattr(ChatTokenizer, "tokenize_prompts", counted)
    return rows


def config(path, seed=42, **data):
    settings = Config()
    settings.data.name_or_path = path
    settings.train.seed = seed
    for key, value in data.items():
        setattr(settings.data, key, value)
    return settings


def load(path, family=BASE, **options):
    return load_data(config(path, **options), build(family))


def row(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rows(number):
    return [row(f"question {i}") for i in range(1, number + 1)]


def chat_row(prompt, chosen, rejected):
    def turns(value, role):
        return value if isinstance(value, list) else [{"role": role, "content": value}]

    sides = {"chosen": turns(chosen, "assistant"), "rejected": turns(rejected, "assistant")}
    return {"prompt": turns(prompt, "user"), **sides}


def names(pairs):
    return [pairs.row_name(i) for i in range(len(pairs))]


# What becomes of the rows


def test_pairs_are_the_rows_in_order_with_their_names(write):
    data = load(write([row("One", " two", "!"), None, row("Three", " four", "?")]))
    tokenizer = build(BASE)
    texts = [
        [tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        for pair in data.train
    ]
    assert texts == [["<s>One", " two</s>", "!</s>"], ["<s>Three", " four</s>", "?</s>"]]
    assert names(data.train) == ["1", "3"]  # lines: the second is empty
    assert data.train[1].chosen_scored is None


def test_the_report_counts_every_reason_with_its_rows(write):
    """Under Gemma's template a prompt is 16 tokens and its question, an answer one and its text.

    So 40 tokens leave 24 for a question, and 60 leave 60 - 16 - 2 = 42 for an answer to `Q?`.
    """
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    thanks = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "Thanks"}]
    critic = [{"role": "critic", "content": "A"}]
    path = write(
        [
            chat_row("Q?", "A.", "B."),
            chat_row("Q?", "", "B."),
            None,
            chat_row("Q?", critic, "B."),
            chat_row(" ", "A.", "B."),
            chat_row(image, "A.", "B."),
            chat_row("Q?", "A.", thanks),
            chat_row([], [{"role": "user", "content": "x"}, *thanks[:1]], "B."),
            chat_row(system, "A.", "B."),
            chat_row("Q?", "same", "same"),
            chat_row("Q?", "x" * 42 + "A", "x" * 42 + "B"),
            chat_row("What is <end_of_turn>?", "A.", "B."),
            chat_row("q" * 25, "A.", "B."),
            chat_row("q" * 24, "A.", "B."),
            chat_row("Q?", "x" * 42, "B."),
            chat_row("Q?", "x" * 41, "x" * 50),
        ]
    )
    data = load(path, FAMILIES["gemma"], max_prompt_length=40, max_length=60)
    assert data.report == {
        "rows_read": 15,
        "pairs_kept": 6,
        "formats": {path: "conversational"},
        "dropped": {
            "empty answer": {"count": 1, "rows": [2]},
            "unknown role": {"count": 1, "rows": [4]},
            "empty prompt": {"count": 1, "rows": [5]},
            "not text": {"count": 1, "rows": [6]},
            "answer does not end with the assistant": {"count": 1, "rows": [7]},
            "diverging histories": {"count": 1, "rows": [8]},
            "the template refuses it: System role not supported": {"count": 1, "rows": [9]},
            "identical answers": {"count": 1, "rows": [10]},
            "identical once cut": {"count": 1, "rows": [11]},
        },
        "cut": {
            "prompt": {"count": 1, "rows": [13]},
            "chosen": {"count": 1, "rows": [15]},
            "rejected": {"count": 1, "rows": [16]},
        },
        "noted": {"control token in text, neutralised": {"count": 1, "rows": [12]}},
        "pairs_trained_on_per_epoch": 6,
        "pairs_held_out": 0,
    }
    assert names(data.train) == ["1", "12", "13", "14", "15", "16"]
    assert json.loads(json.dumps(data.report)) == data.report
    assert data.summary[0].startswith(
        "data: 6 of 15 rows kept; format conversational; dropped: 1 empty answer, 1 unkn"
    )


def test_rows_of_several_batches_are_all_there_once(write, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_ROWS", 3)
    data = load(write([*rows(4), row("x", "same", "same"), *rows(3), row("x", " ", "y")]))
    assert names(data.train) == ["1", "2", "3", "4", "6", "7", "8"]
    assert (data.report["rows_read"], data.report["pairs_kept"]) == (9, 7)


def test_a_set_without_a_usable_pair_is_refused_with_its_reasons(write):
    reasons = "0 of 2 rows kept; format text; dropped: 2 identical answers; 0 held out"
    with pytest.raises(UserError, match=f"no pair is left to train on: {reasons}"):
        load(write([row("a", "b", "b"), row("c", "d", "d")]))


def test_an_overlong_row_is_refused_with_file_and_line(write):
    path = write([row("a"), None, row("b" * 9)])
    with pytest.raises(UserError, match=r"rows\.jsonl: row 3: too long \(prompt\): got 10 prompt"):
        load(path, on_overlong="error", max_prompt_length=8, max_length=20)


def test_messages_without_a_template_are_refused_with_the_file(write):
    with pytest.raises(UserError, match=r"rows\.jsonl: the rows hold messages, and there is no te"):
        load(write([chat_row("Q?", "A.", "B.")]))


def test_ready_made_chatml_is_refused_without_its_control_tokens(write):
    path = write([row("<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n")])
    assert len(load(path, FAMILIES["chatml"]).train) == 1
    with pytest.raises(UserError, match=r"the rows are ready-made ChatML, but .* does not know"):
        load(path, BASE)


# A template that renders the prompt otherwise once an answer follows

FICKLE = Family(
    template="{% for m in messages %}{{ m.role + m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt and '!' in messages[0].content %}<think>{% endif %}",
    special=("</s>",),
    eos="</s>",
)


def fickle_rows(number, differing):
    return [chat_row("!" if i in differing else "?", "A.", "B.") for i in range(1, number + 1)]


def test_a_few_rows_that_render_otherwise_are_dropped_and_counted(write):
    data = load(write(fickle_rows(100, {7, 50})), FICKLE)
    assert data.report["dropped"] == {TEMPLATE_DIFFERS: {"count": 2, "rows": [7, 50]}}
    assert data.report["pairs_kept"] == 98


def test_more_than_two_percent_of_them_is_an_error_that_names_rows(write, cache):
    with pytest.raises(UserError, match=r"in 3 of the first 100 rows \(such as 7, 50, 99\) the ch"):
        load(write(fickle_rows(100, {7, 50, 99})), FICKLE)
    assert list(cache.iterdir()) == []


def test_a_set_that_cannot_be_used_is_refused_before_it_is_read_to_its_end(
    write, monkeypatch, tokenised
):
    monkeypatch.setattr(tokens, "BATCH_ROWS", 10)
    with pytest.raises(UserError, match="in 3 of the first 10 rows"):
        load(write(fickle_rows(100, {1, 2, 3})), FICKLE)
    assert tokenised == list(range(1, 11))


# Several sources


def test_several_sources_are_weighted_and_their_rows_named_by_source(write):
    """Of 6 pairs seen twice and 10 of which half are seen, an epoch has 12 + 5."""
    a, b = write([*rows(6), row("x", "same", "same")], "a.jsonl"), write(rows(10), "b.jsonl")
    data = load([DataSource(path=a, weight=2.0), DataSource(path=b, weight=0.5)])
    seen = names(data.train)
    assert sorted(seen[:12]) == sorted([f"{a}:{i}" for i in range(1, 7)] * 2)
    assert len(set(seen[12:])) == 5
    assert {name.rsplit(":", 1)[0] for name in seen[12:]} == {b}
    assert data.report["dropped"] == {"identical answers": {"count": 1, "rows": [f"{a}:7"]}}
    assert data.report["formats"] == {a: "text", b: "text"}
    assert (data.report["rows_read"], data.report["pairs_kept"]) == (17, 16)
    assert data.report["pairs_trained_on_per_epoch"] == 17


def test_the_half_that_is_seen_depends_on_the_seed_alone(write):
    source = [DataSource(path=write(rows(40)), weight=0.5)]
    first, again, other = (names(load(source, seed=seed).train) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("weight", "seen"), [(1.0, 4), (2.5, 10), (0.1, 0), (0.2, 1)])
def test_a_weight_is_how_often_a_row_is_seen(write, weight, seen):
    """The second source keeps the set from being empty."""
    few, one = write(rows(4), "few.jsonl"), write(rows(1), "one.jsonl")
    data = load([DataSource(path=few, weight=weight), DataSource(path=one)])
    counts = [names(data.train).count(f"{few}:{i}") for i in range(1, 5)]
    assert sum(counts) == seen
    assert max(counts) - min(counts) <= 1


def test_equal_rows_of_several_sources_are_all_kept(write):
    a, b = write(rows(3), "a.jsonl"), write(rows(3), "b.jsonl")
    data = load([DataSource(path=a), DataSource(path=b)])
    assert (data.report["rows_read"], data.report["pairs_kept"], len(data.train)) == (6, 6, 6)


@pytest.mark.parametrize("key", ["subset", "revision", "split", "format"])
def test_a_key_for_one_source_is_refused_beside_a_list(write, key):
    with pytest.raises(UserError, match=rf"data\.{key}: got 'text', but this key is for one sourc"):
        load([DataSource(path=write(rows(2)))], **{key: "text"})


def test_an_empty_list_of_sources_is_refused():
    with pytest.raises(UserError, match="wanted at least one source"):
        load([])


# Held-out pairs


def test_no_held_out_prompt_is_trained_on_even_across_sources(write):
    """Every prompt stands in both files, under two answers in each."""
    twice = [row(f"question {i}", answer) for i in range(30) for answer in ("a", "b")]
    a, b = write(twice, "a.jsonl"), write(twice[::-1], "b.jsonl")
    sources = [DataSource(path=a), DataSource(path=b, weight=2.0)]
    data = load(sources, eval_fraction=0.2)
    train, held_out = ({tuple(pair.prompt_ids) for pair in p} for p in (data.train, data.held_out))
    assert (len(train), len(held_out)) == (24, 6)
    assert not train & held_out
    assert (len(data.train), len(data.held_out)) == (24 * 2 * 3, 6 * 4)
    assert data.report["pairs_kept"] == 120


@pytest.mark.parametrize("seed", range(8))
def test_a_prompt_whose_last_token_merges_with_one_answer_is_not_split(write, seed):
    """`x:` and ` a` give the prompt `x`, `x:` and `?` give `x:`: by their ids they differ."""
    pairs = [row("x:", " a", "!"), row("x:", "?", "!"), row("y:", " a", "!"), row("y:", "?", "!")]
    data = load(write(pairs), GPT_2, eval_fraction=0.5, seed=seed)
    assert data.train[0].prompt_ids != data.train[1].prompt_ids
    assert {frozenset(names(data.train)), frozenset(names(data.held_out))} == {
        frozenset("12"),
        frozenset("34"),
    }


def test_the_same_question_as_messages_and_as_ready_made_chatml_is_one_prompt(write):
    ready = "<|im_start|>user\nquestion {}<|im_end|>\n<|im_start|>assistant\n"
    a = write([chat_row(f"question {i}", "a", "b") for i in range(20)], "a.jsonl")
    b = write([row(ready.format(i), "c", "d") for i in range(20)], "b.jsonl")
    sources = [DataSource(path=a), DataSource(path=b)]
    data = load(sources, FAMILIES["chatml"], eval_fraction=0.5)
    held_out = [tuple(pair.prompt_ids) for pair in data.held_out]
    assert (len(held_out), len(set(held_out))) == (20, 10)
    assert not {tuple(pair.prompt_ids) for pair in data.train} & set(held_out)


def test_which_prompts_are_held_out_depends_on_the_seed_alone(write):
    path = write(rows(50))
    first, again, other = (
        names(load(path, eval_fraction=0.2, seed=seed).held_out) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 10


def test_an_empty_hold_out_is_allowed(write):
    data = load(write(rows(4)), eval_fraction=0.1)
    assert (len(data.train), len(data.held_out), data.report["pairs_held_out"]) == (4, 0, 0)
    assert list(data.held_out) == []


def test_eval_path_brings_its_own_pairs_and_report(write):
    path, held_out = write(rows(4)), write([*rows(2), row("x", "y", "y")], "eval.jsonl")
    data = load(path, eval_path=held_out)
    assert (names(data.train), names(data.held_out)) == (["1", "2", "3", "4"], ["1", "2"])
    assert data.report["held_out_source"] == {
        "rows_read": 3,
        "pairs_kept": 2,
        "formats": {held_out: "text"},
        "dropped": {"identical answers": {"count": 1, "rows": [3]}},
        "cut": {},
        "noted": {},
    }
    assert (data.report["rows_read"], data.report["pairs_held_out"]) == (4, 2)
    assert data.summary[1].startswith("held out: 2 of 3 rows kept")


def test_an_eval_path_without_a_usable_pair_is_an_empty_hold_out(write):
    data = load(write(rows(2)), eval_path=write([row("x", "y", "y")], "eval.jsonl"))
    assert len(data.held_out) == 0


# The cache


def test_splits_and_subsets_of_one_folder_of_files_are_told_apart(tmp_path):
    """The same files, of which each part is tokenised for itself."""
    folder = tmp_path / "clone" / "data"
    folder.mkdir(parents=True)
    for split, number in (("train", 3), ("test", 2)):
        table = datasets.Dataset.from_list(rows(number))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    path = str(tmp_path / "clone")
    data = load(path, eval_path=path, eval_split="test")
    assert (len(data.train), len(data.held_out)) == (3, 2)


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
    ["content", "max_length", "max_prompt_length", "on_overlong", "template", "format"],
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
        "import datasets, pathlib, sys\n"
        "from tests.data.test_loader import BASE, ChatTokenizer, build, config, load_data\n"
        "datasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[2])\n"
        "ChatTokenizer.tokenize_prompts = None\n"
        "print(len(load_data(config(sys.argv[1]), build(BASE)).train))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(cache.parent)],
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


def test_the_quickstart_rows_are_tokenised_with_none_lost():
    from transformers import AutoTokenizer

    from dpo.config import PACKAGE

    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "quickstart" / "model")
    data = load_data(config("quickstart/train.jsonl"), tokenizer)
    assert data.report["rows_read"] == data.report["pairs_kept"] > 1000
    assert (data.report["cut"], data.report["noted"]) == ({}, {})
    ends = {ids[-1] for pair in data.train for ids in (pair.chosen_ids, pair.rejected_ids)}
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


# Worker processes


@pytest.fixture
def two_workers(monkeypatch):
    """For any number of rows, and batches of three."""
    monkeypatch.setattr(tokens, "BATCH_ROWS", 3)
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 2)


MIXED = [
    *rows(7),
    row("x", "same", "same"),
    *rows(4),
    row(" ", "y", "z"),
    row("y", "</s> in text", "z"),
    row("long" * 8, "y", "z"),
    *rows(5),
]


def written(path, cache, **options):
    """The bytes of every file that tokenising leaves behind, and the report."""
    report = load(path, **options).report
    (entry,) = cache.iterdir()
    files = {file.name: file.read_bytes() for file in entry.iterdir()}
    shutil.rmtree(entry)
    return files, report


def test_two_workers_write_what_one_writes_byte_for_byte(write, cache, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_ROWS", 3)
    path, options = write(MIXED), {"max_prompt_length": 20, "max_length": 40}
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 1)
    alone = written(path, cache, **options)
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 2)
    monkeypatch.setattr(tokens, "to_preference", None)  # here; a worker has its own
    start = workers._start

    def start_worker(work):
        tokens.to_preference = to_preference
        start(work)

    monkeypatch.setattr(workers, "_start", start_worker)
    assert written(path, cache, **options) == alone
    assert multiprocessing.active_children() == []
    assert alone[1]["dropped"]["identical answers"] == {"count": 1, "rows": [8]}
    assert {*alone[1]["cut"], *alone[1]["noted"]} == {
        "prompt",
        "control token in text, neutralised",
    }
    assert written(write(MIXED[::-1]), cache, **options)[0] != alone[0]


def test_rows_stay_in_order_though_the_first_batch_takes_longest(write, two_workers, monkeypatch):
    read = tokens.to_preference

    def slow(value, *args, **kwargs):
        time.sleep(0.2 if value["prompt"] in ("question 1", "question 2") else 0)
        return read(value, *args, **kwargs)

    monkeypatch.setattr(tokens, "to_preference", slow)
    assert names(load(write(rows(30))).train) == [str(i) for i in range(1, 31)]


@pytest.mark.parametrize("number", [1, 2])
def test_the_first_bad_row_is_told_whoever_meets_it(
    tmp_path, cache, two_workers, monkeypatch, number
):
    """Line 8 is no JSON and read before the rows of its batch, and of others, are looked at."""
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: number)
    good, long, answerless = json.dumps(row("x")), json.dumps(row("b" * 20)), '{"prompt": "x"}'
    options = {"on_overlong": "error", "max_prompt_length": 15, "max_length": 30}
    for bad, told in [
        ([long, answerless, good, "{"], r"rows\.jsonl: row 5: too long \(prompt\)"),
        ([good, answerless, long, "{"], r"rows\.jsonl, line 6: 'chosen' is missing"),
        ([good, good, long, "{"], r"rows\.jsonl: row 7: too long \(prompt\)"),
        ([good, good, good, "{"], r"rows\.jsonl, line 8: not JSON"),
    ]:
        path.write_text("\n".join([good] * 4 + bad + [good] * 4))
        with pytest.raises(UserError, match=told):
            load(str(path), format="text", **options)
    assert (list(cache.iterdir()), multiprocessing.active_children()) == ([], [])


def test_a_set_that_cannot_be_used_is_refused_by_workers_too(write, cache, two_workers):
    with pytest.raises(UserError, match=r"in 3 of the first 3 rows \(such as 1, 2, 3\)"):
        load(write(fickle_rows(60, {1, 2, 3})), FICKLE)
    assert (list(cache.iterdir()), multiprocessing.active_children()) == ([], [])


def test_only_a_few_batches_are_read_ahead():
    """Two for each of two workers and one: a set of any size is not read at once."""
    read = []

    def tasks():
        for number in range(100):
            read.append(number)
            yield number

    with closing(workers.in_order(str, tasks(), 2)) as results:
        assert next(results) == "0"
        assert len(read) == 5
    assert multiprocessing.active_children() == []
    assert [*workers.in_order(str, range(100), 2)] == [*map(str, range(100))]


INTERRUPTED = """
import datasets, os, pathlib, signal, sys, threading, time
from dpo.data import tokens, workers
from tests.data.test_loader import BASE, build, config, load_data

# Where tests run in the background, a shell has told them to ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
datasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[2])
tokens.BATCH_ROWS, tokens._num_workers = 3, lambda num_rows: 2
tokens.to_preference = lambda *args, **kwargs: time.sleep(60)
start = workers._start
workers._start = lambda work: (print(os.getpid(), flush=True), start(work))
load_data(config(sys.argv[1]), build(BASE))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_process_leaves_no_worker(write, cache, number):
    """Ctrl-C reaches the whole group of processes; a kill only the first of them."""
    path = write(rows(30))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, path, str(cache.parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert all(map(runs, pids))
    time.sleep(0.2)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, said = process.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, pids))
    if number == signal.SIGINT:
        assert said.count("Traceback") == 1
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert list(cache.iterdir()) == []


def runs(pid):
    """Whether there is such a process, and it is not one that has ended and waits to be noted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("before", [None, "true"])
def test_the_environment_is_left_as_it_was(write, two_workers, monkeypatch, capfd, before):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    build(BASE)(["a", "b"])  # threads of the tokenizer, which it would warn of after a fork
    assert len(load(write(rows(30))).train) == 30
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    assert capfd.readouterr() == ("", "")


def test_a_small_set_needs_no_worker_and_a_large_one_takes_every_core():
    cores = len(os.sched_getaffinity(0))
    assert tokens._num_workers(0) == tokens._num_workers(3999) == 1
    assert tokens._num_workers(10**9) == min(cores, tokens.MAX_WORKERS)
