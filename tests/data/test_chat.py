"""What is scored of an answer, token by token, under the templates of well-known families."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo.config import DataConfig
from dpo.data.audit import Audit
from dpo.data.chat import TEMPLATE_DIFFERS, ChatTokenizer, stop_ids
from dpo.data.limits import Limits
from dpo.data.templates import CHATML, choose_template, require_chatml
from dpo.errors import UserError
from tests.data.rows import ROOM, Run, assistant, chatml, messages, system, text, tool, user
from tests.data.tokenizers import BASE, DEEPSEEK_R1, FAMILIES, GPT_2, Family, build

NEUTRALISED = "control token in text, neutralised"
MERGED = "border token merged"
CONTEXT = "turns render differently in context"


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


# Messages, one answer each


def test_prompt_and_answer_are_split_where_the_template_starts_the_answer(family):
    run = Run(family, messages())
    rejected = family.answer.replace("The Rhine.", "Paris.")
    assert run.texts == [family.prompt, family.answer, rejected]
    assert (run.pair.chosen_scored, run.pair.rejected_scored) == (None, None)


def test_prompt_and_answer_together_are_the_rendered_text_up_to_its_turn_end(family):
    run = Run(family, messages())
    whole = run.tokenizer.apply_chat_template([user("Name a river."), assistant("The Rhine.")])
    rendered = run.tokenizer.decode(whole["input_ids"])
    appended = family.eos if "turn end appended" in run.noted else ""
    assert run.texts[0] + run.texts[1] + family.follows == rendered + appended


def test_an_eos_is_appended_only_where_the_template_ends_no_turn(family):
    run = Run(family, messages())
    is_without = family is FAMILIES["no turn end"]
    assert run.noted == ({MERGED: [1], "turn end appended": [1]} if is_without else {})


def test_the_turn_end_is_scored_once_and_last(family):
    run = Run(family, messages())
    stops = {family.eos, "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>", "</turn>"}
    stops &= {token.content for token in run.tokenizer.added_tokens_decoder.values()}
    for side in ("chosen_ids", "rejected_ids"):
        tokens = run.tokenizer.convert_ids_to_tokens(getattr(run.pair, side))
        assert [token in stops for token in tokens] == [False] * (len(tokens) - 1) + [True]


def test_a_padding_token_that_is_eos_changes_nothing(family):
    """Masks come from lengths: where pad = eos, a mask from ids would unscore the turn end."""
    plain, padded = Run(family, messages()), Run(family, messages(), pad=family.eos)
    assert padded.tokenizer.pad_token_id == padded.tokenizer.eos_token_id
    assert padded.pair == plain.pair


def test_stop_ids_hold_eos_and_the_turn_end_and_what_the_model_lists(family):
    tokenizer = build(family)
    end = family.answer[family.answer.rindex("<") :]
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}

    def stops(listed):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=listed))
        return stop_ids(model, tokenizer, tokenizer.chat_template)

    assert stops(None) == sorted(expected)
    assert stops(0) == sorted({0, *expected})
    assert stops([0, 1]) == sorted({0, 1, *expected})


def test_only_the_eos_that_closes_a_conversation_is_left_out_of_the_answer():
    """Negative control: by the last control token alone, Phi's answers would hold two ends."""
    assert Run(FAMILIES["phi 3"], messages()).count("<|endoftext|>") == 0
    template = FAMILIES["phi 3"].template.replace("<|end|>", "")
    without_end = Family(template=template, special=("<|endoftext|>",), eos="<|endoftext|>")
    assert Run(without_end, messages()).texts[1] == "The Rhine.\n<|endoftext|>"


def test_an_answer_that_the_template_leaves_empty_is_dropped():
    template = FAMILIES["chatml"].template.replace("m.content", "m.content.split('</think>')[-1]")
    family = Family(template=template, special=FAMILIES["chatml"].special, eos="<|im_end|>")
    run = Run(family, messages(chosen="<think>Rhine?</think>"), messages())
    assert (run.dropped, list(run.kept)) == ({"empty answer": [1]}, [2])


def test_both_answers_keep_a_newline_that_merges_with_the_prompts():
    r"""ChatML's prompt ends in a newline; an answer that opens with one makes `\n\n` one token."""
    run = Run(FAMILIES["chatml"], messages(chosen="\nThe Rhine."))
    assert run.texts == [
        "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant",
        "\n\nThe Rhine.<|im_end|>",
        "\nParis.<|im_end|>",
    ]
    assert run.tokenizer.convert_ids_to_tokens(run.pair.chosen_ids)[0] == "ĊĊ"
    assert run.noted == {MERGED: [1]}


# Templates


def test_auto_takes_the_tokenizers_template_then_chatml_then_none():
    llama = FAMILIES["llama 3"]
    assert choose_template(build(llama), DataConfig(chat_template="auto")) == llama.template
    bare = Family(template=None, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    assert choose_template(build(bare), DataConfig(chat_template="auto")) == CHATML
    assert choose_template(build(BASE), DataConfig(chat_template="auto")) is None


def test_chatml_can_be_asked_for_against_the_tokenizers_own_template():
    family = FAMILIES["qwen 3"]
    assert choose_template(build(family), DataConfig(chat_template="chatml")) == CHATML
    assert Run(family, messages(), choice="chatml").texts[1] == "The Rhine.<|im_end|>"


def test_our_chatml_writes_what_the_models_of_that_family_write():
    own, chosen = (
        Run(FAMILIES["chatml"], messages()),
        Run(FAMILIES["chatml"], messages(), choice="chatml"),
    )
    assert own.pair == chosen.pair


def test_chatml_is_refused_without_its_control_tokens():
    only_one = Family(template=None, special=("<|im_end|>",), eos="<|im_end|>")
    with pytest.raises(UserError, match=r"got chatml, but .* does not know <\|im_start\|> as sin"):
        choose_template(build(only_one), DataConfig(chat_template="chatml"))
    with pytest.raises(UserError, match=r"here, .* know <\|im_start\|> and <\|im_end\|> as single"):
        require_chatml(build(BASE), "here")
    require_chatml(build(FAMILIES["chatml"]), "here")


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_messages_without_a_template_are_refused(choice):
    with pytest.raises(UserError, match=r"the rows hold messages, and there is no template"):
        Run(BASE, messages(), choice=choice)


def test_none_refuses_messages_even_where_the_tokenizer_has_a_template():
    with pytest.raises(UserError, match=r"data\.chat_template is none"):
        Run(FAMILIES["chatml"], messages(), choice="none")


def test_a_template_can_be_a_file(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}", encoding="utf-8")
    assert Run(BASE, messages(), choice=str(path)).texts == [
        "Name a river.</s>",
        "The Rhine.</s>",
        "Paris.</s>",
    ]
    with pytest.raises(UserError, match=r"got '.*missing', wanted auto, chatml, none or an exist"):
        choose_template(build(BASE), DataConfig(chat_template=str(tmp_path / "missing")))


def test_a_template_that_is_no_jinja_is_refused_before_any_row(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }", encoding="utf-8")
    with pytest.raises(UserError, match=r"data.chat_template: .*line 2 of the template"):
        Run(BASE, choice=str(path))


def test_a_row_that_the_template_refuses_is_dropped_with_the_templates_words():
    run = Run(FAMILIES["gemma"], messages([system("Be brief."), user("Why?")]), messages())
    assert run.dropped == {"the template refuses it: System role not supported": [1]}
    assert list(run.kept) == [2]


def test_a_row_that_makes_the_template_fail_is_dropped_with_the_error():
    family = Family(template="{{ messages[0].content + 1 }}", special=("</s>",), eos="</s>")
    assert Run(family, messages()).dropped == {
        'the template refuses it: can only concatenate str (not "int") to str': [1]
    }


def test_a_prompt_that_reads_otherwise_before_an_answer_is_dropped():
    assert Run(DEEPSEEK_R1, messages(), messages()).dropped == {TEMPLATE_DIFFERS: [1, 2]}


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = build(BASE)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        ChatTokenizer(tokenizer, None, ROOM, Audit())


# Answers of several turns


def test_a_user_turn_inside_an_answer_is_not_scored():
    turns = [assistant("Which?"), user("Any."), assistant("The Rhine.")]
    run = Run(FAMILIES["chatml"], messages(chosen=turns))
    assert run.texts[1] == (
        "Which?<|im_end|>\n<|im_start|>user\nAny.<|im_end|>\n<|im_start|>assistant\n"
        "The Rhine.<|im_end|>"
    )
    assert run.scored == ["Which?<|im_end|>", "The Rhine.<|im_end|>"]
    assert run.pair.rejected_scored is None


def test_a_tool_turn_inside_an_answer_is_not_scored():
    turns = [assistant("look(12)"), tool("7 °C"), assistant("Cold."), assistant("Very.")]
    run = Run(FAMILIES["llama 3"], messages(chosen=turns))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert run.texts[1] == (
        f"look(12)<|eot_id|>{header.format('tool')}7 °C<|eot_id|>{header.format('assistant')}"
        f"Cold.<|eot_id|>{header.format('assistant')}Very.<|eot_id|>"
    )
    assert run.scored == ["look(12)<|eot_id|>", "Cold.<|eot_id|>", "Very.<|eot_id|>"]


def test_the_mask_is_literally_this():
    turns = [assistant("ab"), user("c"), assistant("d")]
    run = Run(FAMILIES["command r"], messages(chosen=turns))
    tokens = "<response> ab </response> </turn> <turn> <user> c </turn> <turn> <assistant>"
    tokens += " <response> d </response> </turn>"
    assert run.tokenizer.convert_ids_to_tokens(run.pair.chosen_ids) == tokens.split()
    assert run.pair.chosen_scored == [True] * 4 + [False] * 6 + [True] * 4


def test_each_turn_of_phi_ends_once():
    turns = [assistant("Which?"), user("Any."), assistant("The Rhine.")]
    run = Run(FAMILIES["phi 3"], messages(chosen=turns))
    assert run.scored == ["Which?<|end|>", "The Rhine.<|end|>"]


def test_a_newline_that_merges_at_an_inner_border_is_scored():
    turns = [assistant("\nWhich?"), user("Any."), assistant("\nThe Rhine.")]
    run = Run(FAMILIES["chatml"], messages(chosen=turns))
    assert run.scored == ["\n\nWhich?<|im_end|>", "\n\nThe Rhine.<|im_end|>"]


def test_what_only_the_other_answer_merges_is_scored_in_this_one_too():
    turns = [assistant("Which?"), user("Any."), assistant("The Rhine.")]
    run = Run(FAMILIES["chatml"], messages(chosen=turns, rejected="\nParis."))
    assert run.scored == ["\nWhich?<|im_end|>", "The Rhine.<|im_end|>"]


def test_control_tokens_in_an_answer_of_several_turns_are_plain_text():
    turns = [assistant("a<|im_end|>b"), user("<|im_start|>"), assistant("c")]
    run = Run(FAMILIES["chatml"], messages(chosen=turns))
    assert run.scored == ["a<|im_end|>b<|im_end|>", "c<|im_end|>"]
    assert (run.count("<|im_end|>"), run.count("<|im_start|>")) == (3, 2)


def test_a_turn_that_reads_otherwise_in_the_middle_is_dropped():
    """Qwen 3 writes its empty thought before the last answer only."""
    turns = [assistant("Which?"), user("Any."), assistant("The Rhine.")]
    run = Run(FAMILIES["qwen 3"], messages(chosen=turns), messages())
    assert (run.dropped, list(run.kept)) == ({CONTEXT: [1]}, [2])


def test_a_mask_is_cut_with_its_answer():
    turns = [assistant("ab"), user("c"), assistant("d")]
    prompt_length = len(Run(FAMILIES["command r"], messages(chosen=turns)).pair.prompt_ids)
    limits = Limits(prompt_length, prompt_length + 11, "truncate")
    run = Run(FAMILIES["command r"], messages(chosen=turns), limits=limits)
    assert run.pair.chosen_scored == [True] * 4 + [False] * 6 + [True]


# Control tokens in the data


@pytest.mark.parametrize(
    "preference",
    [
        messages("What is <|im_end|>?"),
        messages([system("<|im_start|>system"), user("Why?")]),
        messages(chosen="It is <|im_end|>.\n<|im_start|>user\nThanks"),
        messages(rejected="Paris.<|im_end|>"),
        messages("What is <|endoftext|>?"),
    ],
    ids=["user", "system", "chosen", "rejected", "a token that the template never writes"],
)
def test_a_control_token_in_a_message_is_plain_text_and_counted(preference):
    """The ids hold as many control tokens as those of the same row without any in its text."""
    family = FAMILIES["chatml"]
    run = Run(family, preference)
    control = {run.tokenizer.convert_tokens_to_ids(token) for token in family.special}

    def structure(pair):
        sides = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        return [[token for token in side if token in control] for side in sides]

    clean = messages([turn | {"content": "x"} for turn in preference.prompt])
    assert structure(run.pair) == structure(Run(family, clean).pair)
    assert run.noted == {NEUTRALISED: [1]}
    texts = [turn["content"] for turn in (*preference.prompt, *preference.chosen)]
    assert all(text in run.texts[0] + run.texts[1] for text in texts)  # nothing is lost


def test_without_neutralising_a_users_control_token_would_end_the_turn():
    """Negative control: what a plain call of the tokenizer makes of such a message."""
    tokenizer = build(FAMILIES["chatml"])
    ids = tokenizer.apply_chat_template([user("a<|im_end|>b")], return_dict=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_a_turn_marker_without_the_special_flag_is_neutralised_too():
    run = Run(FAMILIES["chatml, markers not special"], messages(chosen="a<|im_end|>\n\n\nb"))
    assert run.count("<|im_end|>") == 1
    assert run.texts[1] == "a<|im_end|>\n\n\nb<|im_end|>"
    assert run.noted == {NEUTRALISED: [1]}


def test_a_turn_marker_that_the_tokenizer_lists_is_neutralised_though_no_template_spells_it():
    """Phi-4-mini's template puts its markers together from pieces."""
    template = FAMILIES["phi 4"].template.replace("<|end|>", "{{ '<|' + 'end|>' }}")
    family = Family(
        template=template,
        special=("<|endoftext|>",),
        not_special=("<|end|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
    )
    tokenizer = build(family)
    tokenizer.chat_control_tokens = ["<|end|>"]
    audit = Audit()
    chat = ChatTokenizer(tokenizer, template, ROOM, audit)
    ((_, pair),) = chat.tokenize([(1, messages("a<|end|>", "b<|end|>c"))])
    assert tokenizer.decode(pair.chosen_ids) == "b<|end|>c<|end|>"
    assert pair.chosen_ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    assert audit.noted[NEUTRALISED].rows == [1]


def test_an_added_token_that_the_template_does_not_write_is_no_control_token():
    run = Run(FAMILIES["chatml, markers not special"], messages(chosen="a<unrelated>"))
    assert (run.count("<unrelated>"), run.noted) == (1, {})


def test_a_control_token_in_the_tools_is_plain_text_and_counted():
    template = "{{ tools[0].function.description }}" + FAMILIES["chatml"].template
    family = Family(template=template, special=FAMILIES["chatml"].special, eos="<|im_end|>")
    function = {"name": "f", "description": "a<|im_end|>b", "parameters": {}}
    run = Run(family, messages(tools=[{"type": "function", "function": function}]))
    assert run.count("<|im_end|>", "prompt_ids") == 1  # the user's turn end
    assert run.noted == {NEUTRALISED: [1]}


def test_a_dropped_row_is_not_noted_as_well():
    run = Run(FAMILIES["chatml"], messages("<|im_end|>", "same", "same"))
    assert (run.dropped, run.noted) == ({"identical answers": [1]}, {})


# Ready-made ChatML


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|>\n\n "])
@pytest.mark.parametrize("name", ["chatml", "chatml, markers not special"])
def test_ready_made_chatml_ends_once_however_the_file_ends_it(name, end):
    run = Run(FAMILIES[name], chatml(f"The Rhine.{end}"))
    prompt = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    assert run.texts == [prompt, "The Rhine.<|im_end|>", "Paris.<|im_end|>"]
    assert (run.count("<|im_end|>"), run.count("<|im_end|>", "prompt_ids")) == (1, 1)
    assert run.noted == {}


def test_ready_made_chatml_gives_the_tokens_of_the_same_messages():
    ready, rendered = (
        Run(FAMILIES["chatml"], chatml("The Rhine.")),
        Run(FAMILIES["chatml"], messages()),
    )
    assert ready.pair == rendered.pair


def test_ready_made_chatml_of_several_turns_or_none_is_dropped():
    several = "A<|im_end|>\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\nC<|im_end|>"
    run = Run(FAMILIES["chatml"], chatml(several), chatml("A<|im_end|> B"), chatml("<|im_end|>"))
    assert run.dropped == {"several turns in a ChatML answer": [1, 2], "empty answer": [3]}


# Plain text


@pytest.mark.parametrize(("family", "bos", "eos"), [(BASE, "<s>", "</s>"), (GPT_2, "", None)])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_plain_text_gets_bos_as_the_tokenizer_adds_it_and_eos(family, bos, eos, choice):
    eos = eos or "<|endoftext|>"
    run = Run(family, text(), choice=choice)
    assert run.texts == [f"{bos}Once", f" upon{eos}", f" more{eos}"]
    assert run.noted == {}


def test_plain_text_is_never_templated():
    run = Run(FAMILIES["mistral"], text())
    assert run.texts == ["<s>Once", " upon</s>", " more</s>"]


@pytest.mark.parametrize("chosen", [" upon</s>", " upon</s>\n"])
def test_bos_and_eos_that_the_file_writes_are_not_doubled(chosen):
    run = Run(BASE, text("<s>Once", chosen))
    assert run.texts == ["<s>Once", " upon</s>", " more</s>"]
    assert (run.count("<s>", "prompt_ids"), run.count("</s>")) == (1, 1)
    assert run.noted == {}


def test_a_control_token_inside_plain_text_is_plain_text_and_counted():
    run = Run(BASE, text("On</s>ce", " up<s>on"))
    assert run.texts == ["<s>On</s>ce", " up<s>on</s>", " more</s>"]
    assert (run.count("</s>", "prompt_ids"), run.count("</s>"), run.count("<s>")) == (0, 1, 0)
    assert run.noted == {NEUTRALISED: [1]}


def test_eos_alone_is_an_empty_answer():
    assert Run(BASE, text(chosen="</s>")).dropped == {"empty answer": [1]}


def test_a_token_that_merges_across_the_border_is_the_answers():
    """A colon and a space are one token, so that only `x` is certainly the prompt's."""
    run = Run(BASE, text("x:", " a", "!"))
    assert run.tokenizer.convert_ids_to_tokens(run.pair.prompt_ids) == ["<s>", "x"]
    assert run.tokenizer.convert_ids_to_tokens(run.pair.chosen_ids) == [":Ġ", "a", "</s>"]
    assert run.tokenizer.convert_ids_to_tokens(run.pair.rejected_ids) == [":", "!", "</s>"]
    assert run.noted == {MERGED: [1]}


def test_a_prompt_that_merges_away_is_dropped_unless_bos_is_before_it():
    assert Run(GPT_2, text("a", "bc", "x")).dropped == {"prompt merges into the answer": [1]}
    assert Run(BASE, text("a", "bc", "x")).texts == ["<s>", "abc</s>", "ax</s>"]


MERGING = st.text("the \n:abc", min_size=1, max_size=12)
_base = build(BASE)


@given(prompt=MERGING, chosen=MERGING, rejected=MERGING)
@example(prompt="x:", chosen=" a", rejected="!")
@example(prompt="a", chosen="b", rejected="bc")
def test_the_border_is_the_longest_common_prefix_and_nothing_is_lost(prompt, chosen, rejected):
    """Prompt and answer together are the ids of the whole text, for both; no border lies further.

    Splitting at the length of the prompt's own ids fails this, as would tokenising apart.
    """
    tokenizer, audit = _base, Audit()
    chat = ChatTokenizer(tokenizer, None, ROOM, audit)
    (row,) = [*chat.tokenize([(1, text(prompt, chosen, rejected))])] or [None]
    if row is None:
        assert chosen == rejected
        assert audit.dropped["identical answers"].rows == [1]
        return
    pair = row[1]
    alone, *whole = (
        tokenizer(t)["input_ids"] for t in (prompt, prompt + chosen, prompt + rejected)
    )
    eos = [tokenizer.eos_token_id]
    assert [pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids] == [
        ids + eos for ids in whole
    ]
    border = len(pair.prompt_ids)
    assert alone[:border] == pair.prompt_ids
    if border < len(alone):
        assert audit.noted[MERGED].rows == [1]
        assert any(ids[border : border + 1] != alone[border : border + 1] for ids in whole)


def test_tokenising_prompt_and_answer_apart_would_give_other_tokens():
    """Negative control for the property above."""
    apart = _base("x:")["input_ids"] + _base(" a", add_special_tokens=False)["input_ids"]
    assert apart != _base("x: a")["input_ids"]
    assert _base.decode(apart) == _base.decode(_base("x: a")["input_ids"])


# ------------------------------------------------------- tools, thinking, and what is left out


CALLS = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content }}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
WITH_CALLS = Family(template=CALLS, special=FAMILIES["chatml"].special, eos="<|im_end|>")
TOOLS = [{"name": "day", "parameters": {}}]


def call(arguments):
    made = {"type": "function", "function": {"name": "day", "arguments": arguments}}
    return assistant("") | {"tool_calls": [made]}


@pytest.mark.parametrize(
    ("preference", "what"),
    [
        (messages(tools=TOOLS), "tools"),
        (messages(prompt=[user("a"), call({"a": 1}), tool("b"), user("c")]), "tool calls"),
        (messages(chosen=[call({"a": 1})], rejected=[call({"a": 2})]), "tool calls"),
        (messages(chosen=[assistant("4") | {"reasoning_content": "2 + 2"}]), "thinking"),
    ],
)
def test_a_row_is_dropped_if_the_template_leaves_out_what_it_is_about(preference, what):
    """And not under a template that writes it."""
    run = Run(FAMILIES["chatml"], preference, messages())
    assert run.dropped == {f"the template does not write its {what}": [1]}
    assert list(run.kept) == [2]
    assert Run(WITH_CALLS, preference).dropped == {}


@pytest.mark.parametrize("what", ["system message", "tool results"])
def test_so_is_one_whose_system_message_or_tool_result_is_left_out(what):
    template = CALLS.replace(
        "m.content }}", "(m.content if m.role == 'user' or m.role == 'assistant' else '') }}"
    )
    family = Family(template=template, special=WITH_CALLS.special, eos="<|im_end|>")
    prompt = {
        "system message": [system("Be brief."), user("a")],
        "tool results": [user("a"), call({"a": 1}), tool("b"), user("c")],
    }[what]
    run = Run(family, messages(prompt=prompt))
    assert run.dropped == {f"the template does not write its {what}": [1]}
    assert Run(WITH_CALLS, messages(prompt=prompt)).dropped == {}


def test_thinking_of_earlier_turns_may_be_left_out_and_is_said():
    earlier = assistant("4") | {"reasoning_content": "2 + 2"}
    run = Run(WITH_CALLS, messages(prompt=[user("a"), earlier, user("b")]))
    assert run.noted == {"the template leaves out the thinking of earlier turns": [1]}


def test_arguments_that_are_json_text_are_not_escaped_twice():
    run = Run(WITH_CALLS, messages(chosen=[call('{"a": 1}')], rejected=[call('{"a": 2}')]))
    assert run.texts[1] == '{"a": 1}<|im_end|>'
    as_it_is = Family(
        template=CALLS.replace("c.function.arguments | tojson", "c.function.arguments"),
        special=WITH_CALLS.special,
        eos="<|im_end|>",
    )
    run = Run(as_it_is, messages(chosen=[call('{"a":1}')], rejected=[call('{"a":2}')]))
    assert run.texts[1] == '{"a":1}<|im_end|>'


def test_of_named_templates_the_one_for_tools_writes_rows_with_tools():
    """As transformers chooses; and it is one template, which can be saved with the model."""
    tokenizer = build(FAMILIES["chatml"])
    tokenizer.chat_template = {"default": FAMILIES["chatml"].template, "tool_use": CALLS}
    template = choose_template(tokenizer, DataConfig())
    for preference in (messages(), messages(tools=TOOLS)):
        said = [*preference.prompt, *preference.chosen]
        given = {"tools": preference.tools, "tokenize": False}
        expected = tokenizer.apply_chat_template(said, **given)
        assert tokenizer.apply_chat_template(said, chat_template=template, **given) == expected
        assert ("TOOLS" in expected) == bool(preference.tools)


def test_named_templates_without_a_default_are_refused():
    tokenizer = build(FAMILIES["chatml"])
    tokenizer.chat_template = {"rag": CALLS}
    with pytest.raises(UserError, match="templates are rag, and none is the default"):
        choose_template(tokenizer, DataConfig())


SWITCHED = "{% if thinks %}Think. {{ style }}{% endif %}" + CALLS


def test_a_template_gets_its_arguments_and_a_rows_own_win():
    family = Family(template=SWITCHED, special=WITH_CALLS.special, eos="<|im_end|>")
    values = {"thinks": True, "style": 'it\'s "so"\n'}
    of_run = Run(family, messages(), template_arguments=values)
    assert of_run.texts[0].startswith('Think. it\'s "so"\n<|im_start|>user')
    own = replace(messages(), template_arguments={"thinks": False})
    plain = Run(WITH_CALLS, messages()).texts
    assert Run(family, own, template_arguments=values).texts == plain
    assert Run(family, messages()).texts == plain


# --------------------------------------------------------------------------------- prefill


def test_an_answer_continues_a_prompt_that_ends_with_the_assistants_words():
    prompt = [user("A line about roses."), assistant("Roses are")]
    run = Run(FAMILIES["chatml"], messages(prompt, " red.", " cheese."))
    assert run.texts == [
        "<|im_start|>user\nA line about roses.<|im_end|>\n<|im_start|>assistant\nRoses are",
        " red.<|im_end|>",
        " cheese.<|im_end|>",
    ]
    assert run.noted == {"answer continues the prompt's last turn": [1]}


def test_a_continued_answer_may_have_several_turns():
    prompt = [user("A line about roses."), assistant("Roses are")]
    run = Run(
        FAMILIES["chatml"], messages(prompt, [assistant(" red."), tool("ok"), assistant("End.")])
    )
    assert run.scored == [" red.<|im_end|>", "End.<|im_end|>"]


DATED = "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}.{% endif %}" + CALLS


def test_a_template_that_asks_for_today_is_told_the_day_of_the_run():
    family = Family(template=DATED, special=WITH_CALLS.special, eos="<|im_end|>")
    run = Run(family, messages(), template_date="2026-01-31")
    assert run.texts[0].startswith("Today: 31 Jan 2026.<|im_start|>user")
    assert choose_template(build(family), DataConfig()) == DATED
