"""A template is a program: one that never ends, or takes all memory, ends in one message."""

import threading
import time

import pytest

from dpo.data import bounded, chat
from dpo.data.audit import Audit
from dpo.data.bounded import in_memory, in_time
from dpo.data.chat import ChatTokenizer
from dpo.errors import UserError
from tests.data.rows import ROOM, messages
from tests.data.tokenizers import BASE, build

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
FOR_EVER = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.3)


def rendered(template):
    """What becomes of a row under the template."""
    audit = Audit()
    tokenizer = ChatTokenizer(build(BASE), template, ROOM, audit)
    kept = list(tokenizer.tokenize([(1, messages())]))
    return kept, list(audit.dropped)


def test_a_plain_one_is_fine():
    """The negative control of all below."""
    kept, dropped = rendered(PLAIN)
    assert (len(kept), dropped) == (1, [])


def test_one_that_never_ends_is_ended():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"data.chat_template: .* more than 10 s"):
        rendered(PLAIN + FOR_EVER)
    assert time.monotonic() - began < 5


def test_one_that_writes_too_much_is_ended(monkeypatch):
    monkeypatch.setattr(chat, "CHARACTERS", 1000)
    with pytest.raises(UserError, match="more than the memory it may for one conversation"):
        rendered(PLAIN + "{{ 'a' * 1001 }}")


def test_one_that_asks_for_more_than_all_memory_is_ended(monkeypatch):
    monkeypatch.setattr(bounded, "BYTES", 2**30)
    with in_memory(), pytest.raises(UserError, match="more than the memory it may"):
        rendered(PLAIN + "{{ 'a' * 8589934592 }}")
    assert len(bytearray(2**21)) == 2**21  # the bound ends with the block


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[99].content }}", "the template refuses it"),
        ("{{ raise_exception('no') }}", "the template refuses it: no"),
    ],
)
def test_one_that_fails_on_a_row_drops_it_with_the_reason(bad, said):
    kept, (reason,) = rendered(PLAIN + bad)
    assert kept == []
    assert said in reason


def test_in_another_thread_there_is_no_clock_and_no_error():
    done = []

    def work():
        with in_time():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
