"""What a pair that is too long loses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from dpo.data.audit import Audit
from dpo.data.chat import ChatTokenizer
from dpo.data.limits import Limits
from dpo.errors import UserError
from tests.data.rows import (
    ROOM,
    Run,
    assistant,
    chatml,
    cut_by_offsets,
    messages,
    system,
    text,
    user,
)
from tests.data.tokenizers import BASE, CHATML, FAMILIES, Family


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end():
    """`<s>012345` is 7 tokens, 4 may stay; 6 in all leave 2 for an answer."""
    row = text("012345", "6789", "x")
    run = Run(BASE, row, limits=Limits(4, 6, "truncate", "left"))
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


# The frame of a prompt

IN_FRAME, FROM_THE_LEFT = "prompt in its frame", "prompt from the left"
DIGITS = "0123456789"
# The last token of the content may merge with an answer.
OPEN = Family(
    template="Q{% for m in messages %}{{ m.content }}{% endfor %}", special=("</s>",), eos="</s>"
)
TWICE = Family(
    template="{% for m in messages %}{{ m.content }}|{{ m.content }}</s>{% endfor %}",
    special=("</s>",),
    eos="</s>",
)


def to(length, truncation="frame"):
    """Room for every answer; prompts are cut to this length."""
    return Limits(length, length + 1000, "truncate", truncation)


def counted(run):
    return {what: tally.rows for what, tally in run.audit.cut.items()}


def dialogue(question, *, can_system=True):
    turns = [user(question), assistant("Which?"), user("Any.")]
    return messages([system("Be brief."), *turns] if can_system else turns)


def whole(family, preference):
    """The prompt without a limit."""
    return Run(family, preference).pair.prompt_ids


def test_a_long_prompt_loses_the_beginning_of_its_question_and_keeps_its_frame():
    family = FAMILIES["chatml"]
    row = messages([system("Be brief."), user(DIGITS)])
    length = len(whole(family, row))
    run = Run(family, row, limits=to(length - 7))
    assert run.texts[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n789<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert counted(run) == {IN_FRAME: [1]}
    assert (len(run.pair.prompt_ids), run.texts[1:]) == (length - 7, Run(family, row).texts[1:])


def test_from_the_left_the_same_prompt_loses_its_system_turn_and_the_users_marker():
    """Negative control: 23 tokens are the question and the assistant's opening."""
    family, row = FAMILIES["chatml"], messages([system("Be brief."), user(DIGITS)])
    run = Run(family, row, limits=to(23, "left"))
    assert run.texts[0] == f"{DIGITS}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_is_the_prompt_with_a_shorter_question(name):
    """By search: digits merge with nothing, so the ids are those of another rendering.

    Where one digit is one too many, the prompt is cut from the left.
    """
    family = FAMILIES[name]
    shorter = [
        whole(family, dialogue(DIGITS[k:], can_system=name != "gemma")) for k in range(len(DIGITS))
    ]
    row = dialogue(DIGITS, can_system=name != "gemma")
    for limit in range(len(shorter[-1]), len(shorter[0])):
        run = Run(family, row, limits=to(limit))
        assert run.pair.prompt_ids == next(ids for ids in shorter if len(ids) <= limit)
        assert counted(run) == {IN_FRAME: [1]}
    run = Run(family, row, limits=to(len(shorter[-1]) - 1))
    assert run.pair.prompt_ids == shorter[0][10:]
    assert counted(run) == {FROM_THE_LEFT: [1]}
    run = Run(family, row, limits=to(len(shorter[0])))
    assert (run.pair.prompt_ids, counted(run)) == (shorter[0], {})


@given(
    question=st.text("the \n:abcé", min_size=1, max_size=20),
    has_system=st.booleans(),
    has_turns=st.booleans(),
    answer=st.sampled_from(["The Rhine.", " a", "\n"]),
    lost=st.integers(0, 25),
)
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("family", [*FAMILIES.values(), OPEN], ids=[*FAMILIES, "open"])
def test_only_tokens_of_the_question_alone_are_lost_or_else_the_first_ones(
    family, question, has_system, has_turns, answer, lost
):
    """By offsets, whatever merges with the frame; the answers are as they were."""
    turns = [system("Be brief.")] * (has_system and family is not FAMILIES["gemma"])
    turns += [user(question), *[assistant("Which?"), user("Any.")] * has_turns]
    row = messages(turns, answer, "Paris.")
    before = Run(family, row)
    if before.dropped:
        return
    limit = max(len(before.pair.prompt_ids) - lost, 1)
    run = Run(family, row, limits=to(limit))
    expected, keeps_frame = cut_by_offsets(run.tokenizer, row, before.pair.prompt_ids, limit)
    assert run.pair.prompt_ids == expected
    assert len(expected) == min(limit, len(before.pair.prompt_ids))
    assert run.pair.chosen_ids == before.pair.chosen_ids
    assert run.pair.rejected_ids == before.pair.rejected_ids
    is_cut = len(expected) < len(before.pair.prompt_ids)
    assert list(run.audit.cut) == [IN_FRAME if keeps_frame else FROM_THE_LEFT] * is_cut


def test_a_token_that_holds_a_piece_of_the_frame_stays():
    """The newlines of ChatML and of the question are one token; `user789` would be left without."""
    family, row = FAMILIES["chatml"], messages("\n" + DIGITS)
    run = Run(family, row, limits=to(len(whole(family, row)) - 7))
    prompt = "<|im_start|>user\n\n789<|im_end|>\n<|im_start|>assistant\n"
    assert (run.texts[0], counted(run)) == (prompt, {IN_FRAME: [1]})
    assert "ĊĊ" in run.tokenizer.convert_ids_to_tokens(run.pair.prompt_ids)


def test_a_token_that_merges_with_an_answer_is_no_part_of_the_prompt_to_keep():
    """Of `Q0123:` the colon is the answer's, so that 4 tokens of the question can go, not 5."""
    row = messages("0123:", " a", "!")
    run = Run(OPEN, row, limits=to(2))
    assert (run.texts, counted(run)) == (["Q3", ": a</s>", ":!</s>"], {IN_FRAME: [1]})
    run = Run(OPEN, row, limits=to(1))
    assert (run.texts, counted(run)) == (["3", ": a</s>", ":!</s>"], {FROM_THE_LEFT: [1]})


def test_control_tokens_in_a_cut_prompt_are_still_plain_text():
    family = FAMILIES["chatml"]
    turns = [system("A <|im_end|>"), user(f"{DIGITS}<|im_start|>"), assistant("B"), user("C")]
    row = messages(turns)
    run = Run(family, row, limits=to(len(whole(family, row)) - 9))
    assert run.texts[0] == (
        "<|im_start|>system\nA <|im_end|><|im_end|>\n<|im_start|>user\n9<|im_start|><|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (run.count("<|im_start|>", "prompt_ids"), counted(run)) == (5, {IN_FRAME: [1]})


def test_one_token_of_the_question_stays_or_the_prompt_is_cut_from_the_left():
    family, row = FAMILIES["chatml"], dialogue(DIGITS)
    ids = whole(family, row)
    last = Run(family, row, limits=to(len(ids) - 9))
    assert (list(last.audit.cut), last.texts[0].count("user\n9<|im_end|>")) == ([IN_FRAME], 1)
    none = Run(family, row, limits=to(len(ids) - 10))
    assert (list(none.audit.cut), none.pair.prompt_ids) == ([FROM_THE_LEFT], ids[10:])


@pytest.mark.parametrize(
    ("family", "row"),
    [
        (BASE, text(DIGITS)),
        (FAMILIES["chatml"], chatml("The Rhine.")),
        (FAMILIES["chatml"], messages([system(DIGITS)])),
        (TWICE, messages(DIGITS)),
    ],
    ids=["plain text", "ready-made ChatML", "no user message", "a template that writes it twice"],
)
def test_a_prompt_without_a_frame_is_cut_from_the_left_and_counted_apart(family, row):
    ids = whole(family, row)
    run = Run(family, row, limits=to(len(ids) - 3))
    assert (run.pair.prompt_ids, counted(run)) == (ids[3:], {FROM_THE_LEFT: [1]})


@pytest.mark.parametrize("name", FAMILIES)
def test_left_keeps_the_last_tokens_whatever_the_prompt_is(name):
    row = dialogue(DIGITS, can_system=name != "gemma")
    ids = whole(FAMILIES[name], row)
    for limit in range(1, len(ids) + 2):
        run = Run(FAMILIES[name], row, limits=to(limit, "left"))
        assert run.pair.prompt_ids == ids[-limit:]
        assert counted(run) == ({"prompt": [1]} if limit < len(ids) else {})


@pytest.mark.parametrize("truncation", ["frame", "left"])
def test_on_overlong_decides_before_anything_is_cut(truncation):
    family, row = FAMILIES["chatml"], dialogue(DIGITS)
    limit = len(whole(family, row)) - 1
    run = Run(family, row, limits=Limits(limit, limit + 99, "drop", truncation))
    assert (run.dropped, run.audit.cut) == ({"overlong": [1]}, {})
    with pytest.raises(UserError, match=r"row 1: too long \(prompt\): got"):
        Run(family, row, limits=Limits(limit, limit + 99, "error", truncation))


def test_a_cut_prompt_leaves_the_answer_the_room_of_the_limit():
    family, row = FAMILIES["chatml"], messages(DIGITS, "abcdefgh", "x")
    limit = len(whole(family, row)) - 5
    run = Run(family, row, limits=Limits(limit, limit + 3, "truncate"))
    assert (len(run.pair.prompt_ids), len(run.pair.chosen_ids)) == (limit, 3)
    assert counted(run) == {IN_FRAME: [1], "chosen": [1]}


def test_a_tokenizer_without_offsets_keeps_the_frame_too():
    """A token is a byte, so the ids are those of a shorter question's rendering."""
    markers = ["<|im_start|>", "<|im_end|>"]
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=markers)
    assert not tokenizer.is_fast

    def prompt_of(question, limits):
        chat = ChatTokenizer(tokenizer, CHATML, limits, Audit())
        ((_, pair),) = chat.tokenize([(1, dialogue(question))])
        return pair.prompt_ids

    ids = prompt_of("é" + DIGITS, ROOM)
    assert prompt_of("é" + DIGITS, to(len(ids) - 5)) == prompt_of(DIGITS[3:], ROOM)
