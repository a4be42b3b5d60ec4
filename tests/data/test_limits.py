"""What a pair that is too long loses."""

import pytest

from dpo.data.limits import Limits
from dpo.errors import UserError
from tests.data.rows import Run, text
from tests.data.tokenizers import BASE


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end():
    """`<s>012345` is 7 tokens, 4 may stay; 6 in all leave 2 for an answer."""
    row = text("012345", "6789", "x")
    run = Run(BASE, row, limits=Limits(4, 6, "truncate"))
    assert run.texts == ["2345", "67", "x</s>"]
    assert {what: tally.rows for what, tally in run.audit.cut.items()} == {
        "prompt": [1],
        "chosen": [1],
    }


def test_a_short_prompt_leaves_its_room_to_the_answer():
    run = Run(BASE, text("0", "123456789", "x"), limits=Limits(4, 6, "truncate"))
    assert run.texts == ["<s>0", "1234", "x</s>"]


def test_an_answer_that_just_fits_keeps_its_turn_end():
    run = Run(BASE, text("012", "3", "xy"), limits=Limits(4, 6, "truncate"))
    assert run.texts == ["<s>012", "3</s>", "xy"]
    assert list(run.audit.cut) == ["rejected"]


def test_overlong_pairs_can_be_dropped():
    rows = (text("012", "3", "x"), text("0123", "4", "x"), text("012", "34", "x"))
    run = Run(BASE, *rows, limits=Limits(4, 6, "drop"))
    assert (run.dropped, list(run.kept), run.audit.cut) == ({"overlong": [2, 3]}, [1], {})


def test_overlong_pairs_can_be_refused():
    with pytest.raises(UserError) as caught:
        Run(BASE, text("012", "3", "x"), text("0123", "4", "xyz"), limits=Limits(4, 6, "error"))
    assert str(caught.value) == (
        "row 2: too long (prompt, rejected): got 5 prompt, 2 chosen and 4 rejected tokens, wanted "
        "at most 4 of prompt and 6 in all. Raise data.max_length, or set data.on_overlong to "
        "truncate or drop."
    )


def test_answers_that_are_equal_or_become_so_are_dropped_and_told_apart():
    rows = (text("0", "same", "same"), text("0", "123456", "123478"), text("0", "123456", "12x"))
    run = Run(BASE, *rows, limits=Limits(2, 6, "truncate"))
    assert run.dropped == {"identical answers": [1], "identical once cut": [2]}
    assert {what: tally.rows for what, tally in run.audit.cut.items()} == {"chosen": [3]}
