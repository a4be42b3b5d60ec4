"""What a reader cannot see: trained on as it is, counted, and shown as an escape."""

import io
from contextlib import redirect_stdout

import pytest

from dpo.after.card import _plain, _samples
from dpo.after.generate import _Streamer, print_answers
from dpo.data.audit import Audit
from dpo.data.chat import ChatTokenizer
from dpo.data.formats import to_preference
from dpo.data.preview import preview
from dpo.data.tokens import read_row
from dpo.hidden import KINDS, kinds_in, visible
from dpo.report.logs import RunLogs
from dpo.report.page import _write
from dpo.train.board import _cell
from tests.data.rows import ROOM
from tests.data.tokenizers import BASE, build

HIDDEN = {
    "characters that turn the writing direction": ("\u202e", "\u2066"),
    "invisible characters": ("\u200b", "\ufeff", "\U000e0041"),
    "control characters": ("\0", "\x1b", "\r", "\x7f", "\x9b"),
    "private-use characters": ("\ue000", "\U0010fffd"),
    "half a surrogate pair": ("\ud800", "\udfff"),
}
ALL = "".join(one for characters in HIDDEN.values() for one in characters)
SEEN = ("", "a b\tc\nd\r\ne", "\xa0\u2028\xad", "\U0001f469\u200d\U0001f4bb", "\u05e9\u05dc\u200f")


def test_each_kind_is_named_and_shown_and_nothing_else_is():
    assert KINDS.keys() == HIDDEN.keys()
    for kind, characters in HIDDEN.items():
        for one in characters:
            assert kinds_in({"a": [f"x{one}y"]}) == kinds_in({one: 1}) == {kind}
            assert visible(f"x{one}y") == f"x{one.encode('unicode_escape').decode()}y"
    for text in SEEN:  # white space, emoji that are joined, marks of right-to-left scripts
        assert kinds_in([text]) == set()
        assert visible(text) == text.replace("\r\n", "\n")


def test_deep_nesting_is_no_recursion():
    deep = "\0"
    for _ in range(100_000):
        deep = [deep]
    assert kinds_in(deep) == {"control characters"}


def row(text):
    return {"prompt": f"Q{text}", "chosen": "A.", "rejected": "B."}


def test_a_row_keeps_them_and_the_audit_counts_it():
    audit = Audit()
    kept = [
        read_row(number, row(text), "text", "x", audit)
        for number, text in enumerate([*HIDDEN["invisible characters"], "\u202e\0", "plain"], 1)
    ]
    assert [preference.prompt for preference in kept] == [
        *(f"Q{one}" for one in HIDDEN["invisible characters"]),
        "Q\u202e\0",
        "Qplain",
    ]
    assert {what: tally.rows for what, tally in audit.noted.items()} == {
        "with invisible characters": [1, 2, 3],
        "with characters that turn the writing direction": [4],
        "with control characters": [4],
    }


def test_half_a_surrogate_pair_has_no_tokens_and_its_row_is_dropped_with_the_reason():
    audit = Audit()
    chat = ChatTokenizer(build(BASE), "{{ messages }}", ROOM, audit)
    preference = to_preference(row("\ud800"), "text", where="x")
    assert list(chat.tokenize([(1, preference)])) == []
    (reason,) = audit.dropped
    assert "surrogate" in reason


def test_an_emoji_that_is_cut_in_two_is_trained_on_and_shown():
    """Its four bytes are four tokens here, of which two are left."""
    audit, tokenizer = Audit(), build(BASE)
    emoji = tokenizer("\U0001f600", add_special_tokens=False)["input_ids"]
    assert len(emoji) > 1
    for left in range(1, len(emoji)):
        text = tokenizer.decode(emoji[left:])
        assert visible(text) == text
    assert kinds_in("\U0001f600") == set()
    kept = read_row(1, row("\U0001f600"), "text", "x", audit)
    assert (kept.prompt, audit.noted) == ("Q\U0001f600", {})


def printed(work):
    with redirect_stdout(io.StringIO()) as out:
        work()
    return out.getvalue()


def test_a_terminal_shows_escapes():
    """Of rows and of answers: none can clear the screen or turn a line round."""
    preference = to_preference(row(ALL[:-2]), "text", where="x")
    tokenizer, audit = build(BASE), Audit()
    chat = ChatTokenizer(tokenizer, None, ROOM, audit)
    ((_, pair),) = chat.tokenize([(1, preference)])
    record = {"prompt": ALL, "policy": ALL, "seed": 0}
    streamer = _Streamer(tokenizer)
    shown = [
        preview(1, preference, pair, tokenizer, colour=False),
        printed(lambda: print_answers(iter([record]), ["policy"], [0])),
        printed(lambda: streamer.on_finalized_text(ALL, stream_end=True)),
    ]
    for text in shown:
        assert kinds_in(text) == set()
        assert "\\u202e" in text
        assert "\\x1b" in text


def test_a_report_a_board_and_a_card_show_escapes(tmp_path):
    page = _write(tmp_path / "report.html", f"<p>{ALL}</p>").read_text()
    samples = [{"step": at, "index": 0, "prompt": ALL, "answer": ALL} for at in (0, 1)]
    logs = RunLogs.__new__(RunLogs)
    object.__setattr__(logs, "samples", samples)
    (sample,) = _samples(logs, 1)
    for text in (page, _cell(ALL), _plain(ALL), *sample.values()):
        assert kinds_in(text) == set()
        assert "\\u202e" in text


@pytest.mark.parametrize("text", ["[x](http://evil)", "<script>", "a | b", "`x`", "a\n# b", "&lt;"])
def test_a_name_or_a_reason_is_no_markup_in_a_card(text):
    plain = _plain(text)
    assert "\n" not in plain
    for mark in "[]<>|`&":
        assert plain.count(mark) == plain.count("\\" + mark) == text.count(mark)
