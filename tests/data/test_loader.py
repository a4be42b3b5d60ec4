"""What a run trains on: what is kept, reported, held out, weighted."""

import json

import datasets
import pytest

from dpo.config import DataSource
from dpo.data import tokens
from dpo.data.chat import TEMPLATE_DIFFERS
from dpo.errors import UserError
from tests.data.rows import FICKLE, chat_row, fickle_rows, load, names, row, rows
from tests.data.tokenizers import BASE, FAMILIES, GPT_2, build

pytestmark = pytest.mark.usefixtures("cache")  # empty, for every test


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
    long = [{"role": "assistant", "content": "x" * 30}, {"role": "user", "content": "Why?"}]
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
            chat_row([{"role": "user", "content": "Q?"}, *long], "A.", "B."),
        ]
    )
    data = load(path, FAMILIES["gemma"], max_prompt_length=40, max_length=60)
    assert data.report == {
        "rows_read": 16,
        "pairs_kept": 7,
        "formats": {path: "conversational"},
        "dropped": {
            "empty answer": {"count": 1, "rows": [2]},
            "unknown role 'critic'": {"count": 1, "rows": [4]},
            "empty prompt": {"count": 1, "rows": [5]},
            "not text": {"count": 1, "rows": [6]},
            "answer does not end with the assistant": {"count": 1, "rows": [7]},
            "diverging histories": {"count": 1, "rows": [8]},
            "the template refuses it: System role not supported": {"count": 1, "rows": [9]},
            "identical answers": {"count": 1, "rows": [10]},
            "identical once cut": {"count": 1, "rows": [11]},
        },
        "cut": {
            "prompt in its frame": {"count": 1, "rows": [13]},
            "chosen": {"count": 1, "rows": [15]},
            "rejected": {"count": 1, "rows": [16]},
            "prompt from the left": {"count": 1, "rows": [17]},
        },
        "noted": {
            "the same as an earlier row": {"count": 1, "rows": [14]},  # once 13 is cut
            "control token in text, neutralised": {"count": 1, "rows": [12]},
        },
        "pairs_trained_on_per_epoch": 7,
        "pairs_held_out": 0,
    }
    assert names(data.train) == ["1", "12", "13", "14", "15", "16", "17"]
    assert json.loads(json.dumps(data.report)) == data.report
    assert data.summary[0].startswith(
        "data: 7 of 16 rows kept; format conversational; dropped: 1 empty answer, 1 unkn"
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


@pytest.mark.parametrize("limit", [0.1, 0.0])
def test_more_drops_for_one_reason_than_allowed_stop_the_run_with_their_rows(write, limit):
    """Overlong rows that are dropped by choice do not count; a cached file is refused too."""
    rows = [row(f"Q{i}?", "same" if i < 2 else "A", "same") for i in range(15)]
    path = write(rows)
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of .* \(such as 1, 2\) would be dropped: id"):
            load(path, max_dropped=limit)
        assert load(path, max_dropped=0.2).report["dropped"]["identical answers"]["count"] == 2
    long = write([row("Q?", "x" * 90), *rows[2:6]])
    limits = {"max_length": 60, "max_prompt_length": 40, "on_overlong": "drop"}
    assert load(long, max_dropped=limit, **limits).report["pairs_kept"] == 4


def test_columns_that_are_not_read_are_counted_and_can_be_ignored(write):
    path = write([row("Q?") | {"quality": 3, "context": ""}, row("P?") | {"context": ""}])
    noted = load(path).report["noted"]
    assert noted == {"column 'quality' not read": {"count": 1, "rows": [1]}}
    path = write([row("Q?") | {"context": "The Rhine."}])
    with pytest.raises(UserError, match="line 1: 'context' may be a part of the row"):
        load(path)
    assert load(path, ignored_columns=["context"]).report["pairs_kept"] == 1
