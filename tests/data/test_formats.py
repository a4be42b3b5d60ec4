"""Every format with rows as its data sets have them, the odd ones included."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.formats import FORMATS, RowError, recognise, to_preference, unread_columns
from dpo.data.sources import _own_keys
from dpo.errors import UserError
from tests.data.rows import assistant, system, tool, user

SYSTEM = "You are an AI assistant. Think step-by-step and justify your steps."
SHORE = "Fact: cutting down trees harms an ecosystem.\nQuestion: What does it harm?"

ORCA = {
    "system": SYSTEM,
    "question": SHORE,
    "chosen": "Organisms.",
    "rejected": "Certainly! Step 1:",
}
ORCA_RAW = {
    "system": "",
    "question": SHORE,
    "chatgpt": "Organisms.",
    "llama2-13b-chat": "Certainly! Step 1:",
}
CHATML = {
    "prompt": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n",
    "chosen": "Hello.<|im_end|>\n",
    "rejected": "Go away.<|im_end|>\n",
}
HH = {
    "chosen": "\n\nHuman: What are some words?\n\nAssistant: Here is a list.\n\nFirst, one.\n\n"
    "Human: Your favourite?\n\nAssistant: I haven't even thought about it.",
    "rejected": "\n\nHuman: What are some words?\n\nAssistant: Here is a list.\n\nFirst, one.\n\n"
    "Human: Your favourite?\n\nAssistant: I like the third.",
}
ULTRAFEEDBACK = {
    "prompt": "Name a river.",
    "prompt_id": "5e9d0a",
    "chosen": [user("Name a river."), assistant("The Rhine.")],
    "rejected": [user("Name a river."), assistant("Paris.")],
    "messages": [user("Name a river."), assistant("The Rhine.")],
    "score_chosen": 8.5,
    "score_rejected": 4.0,
}
CONVERSATIONAL = {
    "prompt": [user("Name a river.")],
    "chosen": [assistant("The Rhine.")],
    "rejected": [assistant("Paris.")],
}
IMPLIED = {
    "chosen": [user("Name a river."), assistant("The Rhine.")],
    "rejected": [user("Name a river."), assistant("Paris.")],
    "score_chosen": 8.5,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OPENAI = {
    "input": {"messages": [user("How cold is it?")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant("12 °C.")],
    "non_preferred_output": [assistant("Not very.")],
}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": SYSTEM},
        {"from": "human", "value": "Name a river."},
    ],
    "chosen": {"from": "gpt", "value": "The Rhine."},
    "rejected": {"from": "gpt", "value": "Paris."},
}
TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}

EXAMPLES = {
    "orca_dpo_pairs": [ORCA, ORCA_RAW, {**ORCA, "system": None, "source": "flan"}],
    "chatml_dpo_pairs": [CHATML],
    "hh_rlhf": [HH],
    "ultrafeedback": [ULTRAFEEDBACK, {**ULTRAFEEDBACK, "chosen": [assistant("The Rhine.")]}],
    "conversational": [CONVERSATIONAL, IMPLIED, {**IMPLIED, "prompt": None}],
    "openai": [OPENAI],
    "sharegpt": [SHAREGPT, {**SHAREGPT, "chosen": [SHAREGPT["chosen"]], "system": SYSTEM}],
    "text": [TEXT, {**TEXT, "system": None}],
}


def parts(row, format):
    preference = to_preference(row, format)
    return preference.prompt, preference.chosen, preference.rejected


def reason(row, format):
    with pytest.raises(RowError) as caught:
        to_preference(row, format)
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


# recognise


@pytest.mark.parametrize(
    ("row", "name"), [(row, name) for name, rows in EXAMPLES.items() for row in rows]
)
def test_every_example_is_recognised_as_its_format_and_no_other(row, name):
    assert recognise([row], "rows.jsonl") == name
    assert to_preference(row, name).chosen


def test_every_format_has_an_example():
    assert list(EXAMPLES) == list(FORMATS)


def test_columns_may_be_null_in_some_rows():
    rows = [{**ORCA, "system": None}, {**ORCA, "chosen": None}, ORCA]
    assert recognise(rows, "rows.jsonl") == "orca_dpo_pairs"


def test_a_null_prompt_is_told_by_the_rows_that_have_one():
    null = {**ULTRAFEEDBACK, "prompt": None}
    assert recognise([null, ULTRAFEEDBACK], "rows.jsonl") == "ultrafeedback"
    assert recognise([null, CONVERSATIONAL], "rows.jsonl") == "conversational"


def test_only_the_first_hundred_rows_are_looked_at():
    assert recognise([TEXT] * 100 + [CHATML], "rows.jsonl") == "text"
    with pytest.raises(UserError, match="the first 100 rows fit no known format"):
        recognise([TEXT] * 99 + [CHATML], "rows.jsonl")


def test_prompts_of_which_only_some_hold_chatml_markers_are_refused_with_columns_and_remedy():
    with pytest.raises(UserError) as caught:
        recognise([TEXT, CHATML], "rows.jsonl")
    message = str(caught.value)
    assert message.startswith("rows.jsonl: the first 2 rows fit no known format.")
    assert "\n  prompt: text and text with <|im_start|>\n" in message
    assert "\n  conversational: prompt: message list or nothing, chosen: message list" in message
    assert message.endswith("Set data.format to the one that is meant, or rename the columns.")


def test_a_chatml_marker_in_an_answer_alone_does_not_make_a_row_chatml():
    row = {**TEXT, "chosen": " the literal <|im_start|>."}
    assert recognise([TEXT, row], "rows.jsonl") == "text"


def test_a_row_that_fits_two_formats_is_refused_with_both_names():
    with pytest.raises(
        UserError, match=r"rows\.jsonl.* several formats \(conversational, openai\)"
    ):
        recognise([IMPLIED | OPENAI], "rows.jsonl")


def test_a_text_prompt_beside_a_question_or_a_system_column_is_not_plain_text():
    for extra in ({"question": "What?"}, {"system": SYSTEM}):
        with pytest.raises(UserError, match=r"Set data\.format"):
            recognise([TEXT | extra], "rows.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "chosen": 3, "rejected": "no"},
        {"prompt": [user("Hi")], "chosen": "Hello", "rejected": "No"},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"messages": [user("Hi"), assistant("Hello")], "label": True},
    ],
)
def test_an_unknown_shape_is_refused_with_every_known_one(row):
    with pytest.raises(UserError) as caught:
        recognise([row], "hub/set")
    for name in FORMATS:
        assert f"\n  {name}: " in str(caught.value)


def test_no_rows_at_all_are_refused():
    with pytest.raises(UserError, match=r"hub/set: the first 0 rows fit no known format"):
        recognise([], "hub/set")


# orca_dpo_pairs


def test_orca_rows_become_system_user_and_assistant_turns():
    assert parts(ORCA, "orca_dpo_pairs") == (
        [system(SYSTEM), user(SHORE)],
        [assistant("Organisms.")],
        [assistant("Certainly! Step 1:")],
    )
    assert to_preference(ORCA, "orca_dpo_pairs").kind == "messages"


@pytest.mark.parametrize("empty", [{"system": ""}, {"system": None}, {"system": "\n"}, {}])
def test_an_orca_row_without_a_system_text_has_no_system_turn(empty):
    row = {"question": "Why?", "chosen": "So.", "rejected": "No."} | empty
    assert to_preference(row, "orca_dpo_pairs").prompt == [user("Why?")]


def test_the_raw_orca_columns_name_the_models_that_answered():
    assert parts(ORCA_RAW, "orca_dpo_pairs") == (
        [user(SHORE)],
        [assistant("Organisms.")],
        [assistant("Certainly! Step 1:")],
    )


def test_white_space_of_orca_texts_is_kept():
    row = {"question": " Why?\n", "chosen": " So.\n", "rejected": "No. "}
    assert parts(row, "orca_dpo_pairs") == (
        [user(" Why?\n")],
        [assistant(" So.\n")],
        [assistant("No. ")],
    )


@pytest.mark.parametrize("nothing", ["", " \n", None])
def test_an_orca_row_with_an_empty_text_is_dropped(nothing):
    assert reason({**ORCA, "question": nothing}, "orca_dpo_pairs") == "empty prompt"
    assert reason({**ORCA, "chosen": nothing}, "orca_dpo_pairs") == "empty answer"
    assert reason({**ORCA_RAW, "llama2-13b-chat": nothing}, "orca_dpo_pairs") == "empty answer"


# chatml_dpo_pairs and text


def test_chatml_strings_stay_as_they_are():
    preference = to_preference(CHATML, "chatml_dpo_pairs")
    assert preference.kind == "chatml"
    assert (preference.prompt, preference.chosen) == (CHATML["prompt"], "Hello.<|im_end|>\n")


def test_a_chatml_row_without_markers_is_dropped():
    assert reason({**CHATML, "prompt": "Hi"}, "chatml_dpo_pairs") == "no ChatML markers"


def test_plain_text_stays_as_it_is():
    preference = to_preference(TEXT, "text")
    assert preference.kind == "text"
    assert parts(TEXT, "text") == ("The sky is", " blue.", " green.")


@pytest.mark.parametrize(("name", "row"), [("text", TEXT), ("chatml_dpo_pairs", CHATML)])
def test_strings_with_nothing_in_them_are_dropped(name, row):
    assert reason({**row, "prompt": None}, name) == "empty prompt"
    assert reason({**row, "chosen": ""}, name) == "empty answer"
    assert reason({**row, "rejected": None}, name) == "empty answer"


# hh_rlhf


def test_transcripts_share_their_leading_turns_as_prompt():
    assert parts(HH, "hh_rlhf") == (
        [
            user("What are some words?"),
            assistant("Here is a list.\n\nFirst, one."),
            user("Your favourite?"),
        ],
        [assistant("I haven't even thought about it.")],
        [assistant("I like the third.")],
    )


def test_answers_that_open_alike_are_not_cut_at_a_character():
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: I am well.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: I am not.",
    }
    assert parts(row, "hh_rlhf") == (
        [user("Hi")],
        [assistant("I am well.")],
        [assistant("I am not.")],
    )


def test_transcripts_may_part_before_their_last_turn():
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: Then?\n\nAssistant: B",
        "rejected": "\n\nHuman: Hi\n\nAssistant: C",
    }
    assert parts(row, "hh_rlhf") == (
        [user("Hi")],
        [assistant("A"), user("Then?"), assistant("B")],
        [assistant("C")],
    )


@pytest.mark.parametrize(
    ("rejected", "why"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", "empty answer"),
        ("", "empty answer"),
        ("\n\nHuman: Hi", "answer does not end with the assistant"),
        ("\n\nHuman: Hello\n\nAssistant: B", "diverging histories"),
        ("Once\n\nHuman: Hi\n\nAssistant: B", "not a transcript"),
        ("Once upon a time", "not a transcript"),
        ("\n\nAssistant: B", "diverging histories"),
    ],
)
def test_transcripts_that_cannot_be_compared_are_dropped(rejected, why):
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": rejected}
    assert reason(row, "hh_rlhf") == why


def test_transcripts_without_a_question_are_dropped():
    row = {"chosen": "\n\nAssistant: A", "rejected": "\n\nAssistant: B"}
    assert reason(row, "hh_rlhf") == "empty prompt"


SAID = (
    st.text(min_size=1)
    .map(str.strip)
    .filter(
        lambda said: (
            said and not any(f"\n\n{who}:" in f"\n\n{said}" for who in ("Human", "Assistant"))
        )
    )
)


@given(
    turns=st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), SAID), max_size=5),
    question=SAID,
    answers=st.tuples(SAID, SAID),
)
def test_any_transcript_gives_back_its_turns(turns, question, answers):
    """Written as a transcript and read again, the turns are those that were written."""
    turns = [*turns, ("Human", question)]
    history = "".join(f"\n\n{who}: {said}" for who, said in turns)
    chosen, rejected = (f"{history}\n\nAssistant: {answer}" for answer in answers)
    roles = {"Human": "user", "Assistant": "assistant"}
    assert parts({"chosen": chosen, "rejected": rejected}, "hh_rlhf") == (
        [{"role": roles[who], "content": said} for who, said in turns],
        [assistant(answers[0])],
        [assistant(answers[1])],
    )


# ultrafeedback


def test_ultrafeedback_lists_begin_with_the_prompt():
    expected = ([user("Name a river.")], [assistant("The Rhine.")], [assistant("Paris.")])
    assert parts(ULTRAFEEDBACK, "ultrafeedback") == expected


def test_ultrafeedback_keeps_the_system_turn_of_the_lists():
    row = {
        **ULTRAFEEDBACK,
        "chosen": [system("Be brief."), *ULTRAFEEDBACK["chosen"]],
        "rejected": [system("Be brief."), *ULTRAFEEDBACK["rejected"]],
    }
    prompt = to_preference(row, "ultrafeedback").prompt
    assert prompt == [system("Be brief."), user("Name a river.")]


def test_the_prompt_string_is_the_question_where_the_lists_hold_answers_alone():
    row = {
        "prompt": "Name a river.",
        "chosen": [assistant("The Rhine.")],
        "rejected": [system("Be brief."), assistant("Paris.")],
    }
    assert reason(row, "ultrafeedback") == "diverging histories"
    row["chosen"] = [system("Be brief."), assistant("The Rhine.")]
    assert parts(row, "ultrafeedback") == (
        [system("Be brief."), user("Name a river.")],
        [assistant("The Rhine.")],
        [assistant("Paris.")],
    )
    row |= {"chosen": [assistant("The Rhine.")], "rejected": [assistant("Paris.")]}
    assert to_preference(row, "ultrafeedback").prompt == [user("Name a river.")]


def test_the_prompt_string_may_be_any_user_turn_of_a_longer_history():
    history = [user("Hi"), assistant("Hello."), user("Name a river.")]
    row = {
        "chosen": [*history, assistant("The Rhine.")],
        "rejected": [*history, assistant("Paris.")],
    }
    for prompt in ("Hi", "Name a river.", " Name a river.\n", None):
        assert to_preference({**row, "prompt": prompt}, "ultrafeedback").prompt == history


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt": "Name a lake."}, "prompt contradicts the messages"),
        ({"chosen": [user("Name a river."), assistant("")]}, "empty answer"),
        ({"chosen": []}, "empty answer"),
        ({"rejected": None}, "empty answer"),
        ({"rejected": [user("Name a river.")]}, "answer does not end with the assistant"),
        ({"rejected": [user("A river?"), assistant("Paris.")]}, "diverging histories"),
    ],
)
def test_ultrafeedback_rows_that_cannot_be_used_are_dropped(change, why):
    assert reason({**ULTRAFEEDBACK, **change}, "ultrafeedback") == why


# conversational


def test_an_explicit_prompt_is_kept():
    expected = ([user("Name a river.")], [assistant("The Rhine.")], [assistant("Paris.")])
    assert parts(CONVERSATIONAL, "conversational") == expected
    assert parts({**CONVERSATIONAL, **IMPLIED}, "conversational") == expected  # given twice


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": []}])
def test_an_implied_prompt_is_the_common_leading_messages(prompt):
    expected = ([user("Name a river.")], [assistant("The Rhine.")], [assistant("Paris.")])
    assert parts(IMPLIED | prompt, "conversational") == expected


def test_an_answer_that_the_other_continues_keeps_its_last_turn():
    """Common: Hi, A. Nothing would be left of rejected, so both answers begin at A."""
    row = {
        "chosen": [user("Hi"), assistant("A"), user("More?"), assistant("B")],
        "rejected": [user("Hi"), assistant("A")],
    }
    assert parts(row, "conversational") == (
        [user("Hi")],
        [assistant("A"), user("More?"), assistant("B")],
        [assistant("A")],
    )


def test_answers_of_several_turns_keep_their_tool_turns_and_calls():
    """Keys that templates read stay and metadata go; so do the nulls that Arrow puts anywhere."""
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"at": "Bonn"}'}}
    asking = {"role": "assistant", "content": None, "tool_calls": [{**call, "id": None}], "hash": 7}
    row = {
        "prompt": [{**user("Cold?"), "tool_calls": None}],
        "chosen": [asking, {**tool("12"), "tool_call_id": "c1"}, assistant("12 °C.")],
        "rejected": [assistant("No idea.")],
        "tools": [WEATHER | {"strict": None}],
    }
    preference = to_preference(_own_keys(row), "conversational")
    assert preference.prompt == [user("Cold?")]
    assert preference.chosen == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12", "tool_call_id": "c1"},
        assistant("12 °C."),
    ]
    assert preference.tools == [WEATHER]


def test_an_answer_may_be_a_tool_call_alone():
    calls = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    row = {**CONVERSATIONAL, "chosen": [{"role": "assistant", "tool_calls": calls}]}
    expected = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert to_preference(row, "conversational").chosen == expected


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([WEATHER], [WEATHER]),
        (json.dumps([WEATHER]), [WEATHER]),
        ([], None),
        ("", None),
        (None, None),
    ],
)
def test_tools_may_be_a_list_or_its_json(tools, expected):
    assert to_preference({**CONVERSATIONAL, "tools": tools}, "conversational").tools == expected


@pytest.mark.parametrize(
    ("tools", "problem"),
    [("[{", "'tools' is not JSON"), ("{}", None), ('{"a": 1}', "not a list"), ([1], "not a list")],
)
def test_tools_of_another_shape_are_refused(tools, problem):
    row = {**CONVERSATIONAL, "tools": tools}
    if problem is None:
        assert to_preference(row, "conversational").tools is None
        return
    with pytest.raises(UserError, match=problem):
        to_preference(row, "conversational")


def test_text_parts_are_joined_and_other_parts_drop_the_row():
    text = {"type": "text", "text": "Name a "}
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    row = {**CONVERSATIONAL, "prompt": [user([text, {"type": "text", "text": "river."}])]}
    assert to_preference(row, "conversational").prompt == [user("Name a river.")]
    row["prompt"] = [user([text, image])]
    assert reason(row, "conversational") == "not text"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt": [assistant("Hi")]}, "empty prompt"),
        ({"prompt": [user(" ")]}, "empty prompt"),
        ({"prompt": None}, "empty prompt"),
        ({"chosen": [assistant("A"), user("B")]}, "answer does not end with the assistant"),
        ({"chosen": [tool("A"), assistant("B")]}, "answer does not begin with the assistant"),
        ({"chosen": [user("A"), assistant("B")]}, "answer does not begin with the assistant"),
        ({"chosen": [assistant(None)]}, "empty answer"),
        ({"prompt": [{"role": "narrator", "content": "Once"}]}, "unknown role 'narrator'"),
    ],
)
def test_conversations_that_cannot_be_used_are_dropped(change, why):
    assert reason({**CONVERSATIONAL, **change}, "conversational") == why


@pytest.mark.parametrize(
    "rejected",
    [
        [user("Hi"), assistant("A"), user("Why?"), assistant("B")],
        [user("Hello"), assistant("A"), user("How?"), assistant("B")],
        [user("Hi"), assistant("A"), assistant("B")],
        [system("Be brief."), user("Hi"), assistant("A"), user("How?"), assistant("B")],
    ],
)
def test_histories_that_part_before_the_assistant_speaks_are_dropped(rejected):
    row = {
        "chosen": [user("Hi"), assistant("A"), user("How?"), assistant("B")],
        "rejected": rejected,
    }
    assert reason(row, "conversational") == "diverging histories"


@pytest.mark.parametrize(
    ("name", "row"), [("conversational", IMPLIED), ("ultrafeedback", ULTRAFEEDBACK)]
)
def test_a_system_column_opens_the_prompt_unless_a_system_turn_does(name, row):
    assert to_preference({**row, "system": "Be brief."}, name).prompt == [
        system("Be brief."),
        user("Name a river."),
    ]
    sides = {side: [system(SYSTEM), *row[side]] for side in ("chosen", "rejected")}
    row = {**row, **sides, "system": "Be brief.", "tools": [WEATHER]}
    assert to_preference(row, name).prompt == [system(SYSTEM), user("Name a river.")]
    assert to_preference(row, name).tools == [WEATHER]


# openai


def test_openai_rows_become_messages_with_their_tools():
    expected = ([user("How cold is it?")], [assistant("12 °C.")], [assistant("Not very.")])
    assert parts(OPENAI, "openai") == expected
    assert to_preference(OPENAI, "openai").tools is None
    row = {**OPENAI, "input": {**OPENAI["input"], "tools": [WEATHER]}}
    assert to_preference(row, "openai").tools == [WEATHER]


def test_openai_inputs_may_open_with_a_developer_turn_and_hold_a_history():
    history = [
        {"role": "developer", "content": "Be brief."},
        user("Hi"),
        assistant("Hello."),
        user("How cold is it?"),
    ]
    row = {**OPENAI, "input": {"messages": history}}
    assert to_preference(row, "openai").prompt == history


def test_openai_rows_without_a_message_in_them_are_dropped():
    assert reason({**OPENAI, "input": {"messages": []}}, "openai") == "empty prompt"
    assert reason({**OPENAI, "preferred_output": []}, "openai") == "empty answer"


# sharegpt


def test_sharegpt_turns_get_the_usual_roles():
    row = {
        **SHAREGPT,
        "conversations": [
            *SHAREGPT["conversations"],
            {"from": "gpt", "value": "Let me look."},
            {"from": "observation", "value": "Rhine"},
            {"from": "tool", "value": "Main"},
            {"from": "user", "value": "And?"},
        ],
        "tools": json.dumps([WEATHER]),
    }
    preference = to_preference(row, "sharegpt")
    assert preference.prompt == [
        system(SYSTEM),
        user("Name a river."),
        assistant("Let me look."),
        tool("Rhine"),
        tool("Main"),
        user("And?"),
    ]
    assert (preference.chosen, preference.tools) == ([assistant("The Rhine.")], [WEATHER])


def test_a_sharegpt_system_column_opens_the_prompt_unless_a_system_turn_does():
    row = {**SHAREGPT, "system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}]}
    assert to_preference(row, "sharegpt").prompt == [system("Be brief."), user("Hi")]
    row = {**SHAREGPT, "system": "Be brief."}
    assert to_preference(row, "sharegpt").prompt == [system(SYSTEM), user("Name a river.")]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"chosen": {"from": "gpt", "value": " "}}, "empty answer"),
        ({"rejected": None}, "empty answer"),
        ({"rejected": {"from": "human", "value": "B"}}, "answer does not end with the assistant"),
        ({"rejected": {"from": "function_call", "value": "{}"}}, "unknown role 'function_call'"),
        ({"conversations": []}, "empty prompt"),
    ],
)
def test_sharegpt_rows_that_cannot_be_used_are_dropped(change, why):
    assert reason({**SHAREGPT, **change}, "sharegpt") == why


# broken rows


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("orca_dpo_pairs", {"question": "Why?", "rejected": "No."}, "'chosen' is missing"),
        ("orca_dpo_pairs", {**ORCA, "system": 3}, "'system' holds int, wanted text"),
        ("text", {"prompt": "Hi", "chosen": "A"}, "'rejected' is missing"),
        ("text", {**TEXT, "prompt": [user("Hi")]}, "'prompt' holds list, wanted text"),
        ("chatml_dpo_pairs", {**CHATML, "chosen": 1.5}, "'chosen' holds float, wanted text"),
        ("hh_rlhf", {**HH, "chosen": [user("Hi")]}, "'chosen' holds list, wanted text"),
        ("ultrafeedback", IMPLIED, "'prompt' is missing"),
        ("ultrafeedback", {**ULTRAFEEDBACK, "chosen": "The Rhine."}, "wanted a list of messages"),
        ("conversational", {**IMPLIED, "rejected": ["Hi"]}, "'rejected' holds a message without"),
        ("conversational", {"chosen": [assistant("A")]}, "'rejected' is missing"),
        ("conversational", {**IMPLIED, "chosen": [user(7)]}, "message of 'chosen' holds int"),
        ("openai", {**OPENAI, "input": "How cold?"}, "'input' holds str, wanted an object"),
        ("openai", {**OPENAI, "input": {}}, "'messages' is missing"),
        (
            "sharegpt",
            {**SHAREGPT, "chosen": assistant("A")},
            "'chosen' holds a message without 'from'",
        ),
    ],
)
def test_a_broken_row_is_refused_with_place_key_and_remedy(name, row, problem):
    with pytest.raises(UserError) as caught:
        to_preference(row, name, where="rows.jsonl, line 7")
    message = str(caught.value)
    assert message.startswith("rows.jsonl, line 7: ")
    assert problem in message
    assert f"Columns found: {', '.join(row)}. Wanted, as data.format is {name}: " in message
    assert message.endswith("Correct the row, or set data.format to the shape that the data has.")


def test_an_unknown_format_is_refused_with_the_names_of_all():
    with pytest.raises(
        UserError, match=r"'alpaca'. Set it to auto or one of: orca_dpo_pairs, .*text"
    ):
        to_preference(TEXT, "alpaca")


def test_rows_are_not_changed_by_their_conversion():
    for name, rows in EXAMPLES.items():
        for row in rows:
            before = json.dumps(row)
            with contextlib.suppress(RowError):
                to_preference(row, name)
            assert json.dumps(row) == before


# ------------------------------------------------------------------------- what is not read


@pytest.mark.parametrize(
    ("name", "row", "lost"),
    [
        ("text", TEXT | {"input": "2 + 2"}, "input"),
        ("text", TEXT | {"history": [["Hi", "Hello"]]}, "history"),
        ("text", TEXT | {"system": "Be brief."}, "system"),
        ("text", TEXT | {"System_Prompt": "Be brief."}, "System_Prompt"),
        ("text", TEXT | {"tools": [{"name": "f"}]}, "tools"),
        ("orca_dpo_pairs", ORCA | {"prompt": "Answer in French."}, "prompt"),
        ("orca_dpo_pairs", ORCA | {"images": ["a.png"]}, "images"),
        ("conversational", CONVERSATIONAL | {"context": "The Rhine is a river."}, "context"),
        ("sharegpt", SHAREGPT | {"images": ["a.png"]}, "images"),
    ],
)
def test_a_column_that_may_be_part_of_a_row_is_read_or_refused(name, row, lost):
    """Whatever the first hundred rows hold; where it is empty it takes nothing away."""
    with pytest.raises(UserError, match=rf"line 101: '{lost}' may be a part of the row"):
        to_preference(row, name, where="rows.jsonl, line 101")
    for nothing in (None, "", []):
        assert to_preference(row | {lost: nothing}, name) == to_preference(
            {key: row[key] for key in row if key != lost}, name
        )


def test_other_columns_that_are_not_read_are_named_but_ids_scores_and_sources():
    harmless = {"id": 1, "prompt_id": "a", "score_chosen": 9.0, "source": "x", "chosen_model": "m"}
    row = TEXT | harmless | {"quality": "good", "empty": None}
    assert unread_columns(row, "text") == ["quality"]


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_message_may_have_any_of_its_names(column):
    row = {name: ORCA[name] for name in ORCA if name != "system"} | {column: "Be brief."}
    assert to_preference(row, "orca_dpo_pairs").prompt[0] == system("Be brief.")
    with pytest.raises(UserError, match="hold different texts"):
        to_preference(
            ORCA | {"system_prompt": "Be brief.", "system_message": "No."}, "orca_dpo_pairs"
        )


def test_message_lists_may_be_json_text():
    row = {name: json.dumps(value) for name, value in CONVERSATIONAL.items()}
    assert recognise([row], "rows") == "conversational"
    assert to_preference(row, "conversational") == to_preference(CONVERSATIONAL, "conversational")
    said = TEXT | {"chosen": '{"colour": "red", "from": 1}'}  # an answer that is JSON stays text
    assert to_preference(said, "text").chosen == said["chosen"]


def test_the_prompt_of_answers_alone_may_be_in_messages():
    prompt, chosen, rejected = (
        [user("Name a river.")],
        [assistant("The Rhine.")],
        [assistant("No.")],
    )
    row = {"messages": prompt, "chosen": chosen, "rejected": rejected}
    assert recognise([row], "rows") == "conversational"
    preference = to_preference(row, "conversational")
    assert (preference.prompt, preference.chosen) == (prompt, chosen)
    whole = row | {"messages": [*prompt, *chosen], "chosen": [*prompt, *chosen]}
    whole |= {"rejected": [*prompt, *rejected]}
    assert to_preference(whole, "conversational") == preference


def test_reasoning_is_read_under_both_of_its_names():
    answer = assistant("4") | {"reasoning": "2 + 2 is 4"}
    row = {"prompt": [user("2 + 2?")], "chosen": [answer], "rejected": [assistant("5")]}
    assert to_preference(row, "conversational").chosen[0]["reasoning_content"] == "2 + 2 is 4"


def test_a_message_with_a_part_that_is_not_read_is_refused():
    turn = assistant("") | {"function_call": {"name": "f", "arguments": "{}"}}
    row = {"prompt": [user("Call f.")], "chosen": [turn], "rejected": [assistant("No.")]}
    with pytest.raises(UserError, match="message of 'chosen' holds 'function_call', which is not"):
        to_preference(row, "conversational")


def test_a_null_of_the_users_is_kept():
    """In a file of JSON; what Arrow puts where others have a key is taken out by the source."""
    tools = [{"name": "f", "parameters": {"note": {"type": "string", "default": None}}}]
    row = {"prompt": [user("Call f.")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert to_preference(row | {"tools": tools}, "conversational").tools == tools


def test_an_unknown_role_is_named():
    row = CONVERSATIONAL | {"chosen": [{"role": "Robot", "content": "beep"}]}
    with pytest.raises(RowError, match="unknown role 'Robot'"):
        to_preference(row, "conversational")
