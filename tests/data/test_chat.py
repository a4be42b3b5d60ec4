"""What is scored of an answer, token by token, under the templates of well-known families."""

import copy
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from dpo.data.audit import MAX_ROWS_NAMED, Audit, Limits, Tally
from dpo.data.chat import (
    CHATML,
    TEMPLATE_DIFFERS,
    ChatTokenizer,
    choose_template,
    require_chatml,
    stop_ids,
)
from dpo.data.formats import Preference
from dpo.errors import UserError
from tests.data.tokenizers import BASE, DEEPSEEK_R1, FAMILIES, GPT_2, Family, build

ROOM = Limits(1000, 2000, "truncate")
NEUTRALISED = "control token in text, neutralised"
MERGED = "border token merged"
CONTEXT = "turns render differently in context"


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def as_turns(answer):
    return answer if isinstance(answer, list) else [assistant(answer)]


def messages(prompt="Name a river.", chosen="The Rhine.", rejected="Paris.", tools=None):
    prompt = prompt if isinstance(prompt, list) else [user(prompt)]
    return Preference(
        kind="messages",
        prompt=prompt,
        chosen=as_turns(chosen),
        rejected=as_turns(rejected),
        tools=tools,
    )


def text(prompt="Once", chosen=" upon", rejected=" more"):
    return Preference(kind="text", prompt=prompt, chosen=chosen, rejected=rejected)


def chatml(chosen, rejected="Paris.<|im_end|>\n"):
    prompt = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    return Preference(kind="chatml", prompt=prompt, chosen=chosen, rejected=rejected)


class Run:
    """Tokenises preferences as rows 1, 2, ...; shows what came of them."""

    def __init__(self, family, *preferences, limits=ROOM, choice="auto", pad=None):
        self.tokenizer = build(family, pad=pad)
        self.audit = Audit()
        template = choose_template(self.tokenizer, choice)
        chat = ChatTokenizer(self.tokenizer, template, limits, self.audit)
        rows = list(enumerate(preferences, start=1))
        self.kept = dict(chat.tokenize(rows))

    @property
    def pair(self):
        assert not self.audit.dropped
        (pair,) = self.kept.values()
        return pair

    @property
    def texts(self):
        pair = self.pair
        return [*map(self.tokenizer.decode, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))]

    @property
    def scored(self):
        """The scored stretches of the chosen answer, as text."""
        stretches, previous = [], False
        for token, marked in zip(self.pair.chosen_ids, self.pair.chosen_scored, strict=True):
            if marked and not previous:
                stretches.append([])
            if marked:
                stretches[-1].append(token)
            previous = marked
        return [self.tokenizer.decode(stretch) for stretch in stretches]

    @property
    def dropped(self):
        return {reason: tally.rows for reason, tally in self.audit.dropped.items()}

    @property
    def noted(self):
        return {reason: tally.rows for reason, tally in self.audit.noted.items()}

    def count(self, token, side="chosen_ids"):
        return list(getattr(self.pair, side)).count(self.tokenizer.convert_tokens_to_ids(token))


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
    assert choose_template(build(llama), "auto") == llama.template
    bare = Family(template=None, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    assert choose_template(build(bare), "auto") == CHATML
    assert choose_template(build(BASE), "auto") is None


def test_chatml_can_be_asked_for_against_the_tokenizers_own_template():
    family = FAMILIES["qwen 3"]
    assert choose_template(build(family), "chatml") == CHATML
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
        choose_template(build(only_one), "chatml")
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
        choose_template(build(BASE), str(tmp_path / "missing"))


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


# What prompt and answers have in common is encoded once


def encoded(tokenizer, template, texts, dividers=None):
    """Token ids as they are made, and those of the whole texts."""
    chat = ChatTokenizer(tokenizer, template, ROOM, Audit())
    if dividers is not None:
        chat._dividers = dividers
    (ids,) = chat._encode_rows([texts])
    return ids, chat._encode(texts)


MARKERS = ("<|im_start|>", "<|im_end|>")
FRAGMENTS = (
    *MARKERS,
    *"<|im_ start|> < | > <turn> </turn> <|end|> <s> </s> <think> <end_of_turn>".split(),
    *"the a : ▁ é".split(),
    *(" ", "  ", "\n", "\n\n"),
)
PIECES = st.lists(st.sampled_from(FRAGMENTS)).map("".join)


@pytest.fixture(scope="module")
def marked_sentencepiece(sentencepiece):
    tokenizer = copy.deepcopy(sentencepiece)
    markers = [AddedToken(marker, special=True, normalized=False) for marker in MARKERS]
    tokenizer.add_tokens(markers, special_tokens=True)
    return tokenizer


@given(prompt=PIECES, chosen=PIECES, rejected=PIECES)
@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_ids_are_those_of_the_whole_texts_wherever_control_tokens_stand(
    family, prompt, chosen, rejected
):
    texts = [prompt, prompt + chosen, prompt + rejected]
    ids, whole = encoded(build(family), family.template, texts)
    assert ids == whole


@given(prompt=PIECES, chosen=PIECES, rejected=PIECES)
@settings(deadline=None)
def test_ids_are_those_of_the_whole_texts_under_sentencepiece(
    marked_sentencepiece, prompt, chosen, rejected
):
    """Its first word has a space before it that no other has."""
    texts = [prompt, prompt + chosen, prompt + rejected]
    ids, whole = encoded(marked_sentencepiece, CHATML, texts)
    assert ids == whole
    chat = ChatTokenizer(marked_sentencepiece, CHATML, ROOM, Audit())
    assert chat._dividers == [*MARKERS]


def test_the_prompt_of_a_chat_goes_through_the_tokenizer_once(monkeypatch):
    seen, encode = [], ChatTokenizer._encode_batch

    def noted(self, texts):
        seen.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(ChatTokenizer, "_encode_batch", noted)
    chat = ChatTokenizer(build(FAMILIES["chatml"]), CHATML, ROOM, Audit())
    assert len(list(chat.tokenize([(1, messages("the question"))]))) == 1
    assert seen == [
        "<|im_start|>user\nthe question<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\nThe Rhine.<|im_end|>\n",
        "<|im_start|>assistant\nParis.<|im_end|>\n",
    ]


def test_ids_do_not_depend_on_what_the_tokenizer_was_used_for_before():
    """It comes with a truncation, and has just spelt a control token out."""
    tokenizer = build(FAMILIES["chatml"])
    expected = tokenizer("<|im_start|>user")["input_ids"]
    chat = ChatTokenizer(tokenizer, CHATML, ROOM, Audit())
    tokenizer.backend_tokenizer.enable_truncation(2)
    spelt_out = chat._encode(["<|im_start|>"], split_special_tokens=True)
    assert len(spelt_out[0]) > 2
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert chat._encode_batch(["<|im_start|>user"]) == [expected]
    assert len(expected) == 5
    backend = tokenizer.backend_tokenizer  # without being set back it would give other ids
    backend.encode_special_tokens = True
    assert backend.encode_batch_fast(["<|im_start|>user"])[0].ids != expected


def test_a_tokenizer_with_an_encoding_of_its_own_is_asked_for_it():
    class Upper(type(build(BASE))):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([t.upper() for t in text], *args, **kwargs)

    tokenizer = build(BASE)
    expected = tokenizer("THE", add_special_tokens=False)["input_ids"]
    tokenizer.__class__ = Upper
    chat = ChatTokenizer(tokenizer, None, ROOM, Audit())
    assert chat._encode_batch(["the"]) == [expected]


@pytest.mark.parametrize(
    ("other", "prompt"),
    [
        (AddedToken("x<|e", normalized=False), "x<|end|>"),
        (AddedToken("<|end|>!", normalized=False, single_word=True), "x<|end|>!"),
        (AddedToken("<|end|>", normalized=False, lstrip=True), "x <|end|>"),
    ],
    ids=["reached across", "a longer one looks back", "takes the space before it"],
)
def test_a_control_token_that_does_not_part_the_text_is_no_divider(other, prompt):
    tokenizer = build(Family(template="<|end|>", special=("</s>",), eos="</s>"))
    tokenizer.add_tokens([AddedToken("<|end|>", normalized=False), other])
    texts = [prompt, prompt + "a", prompt + "!"]
    ids, whole = encoded(tokenizer, "<|end|>", texts)
    assert ids == whole
    ids, whole = encoded(tokenizer, "<|end|>", texts, ["<|end|>"])
    assert ids != whole


def test_tokenising_prompt_and_answer_apart_would_give_other_tokens():
    """Negative control for the property above."""
    apart = _base("x:")["input_ids"] + _base(" a", add_special_tokens=False)["input_ids"]
    assert apart != _base("x: a")["input_ids"]
    assert _base.decode(apart) == _base.decode(_base("x: a")["input_ids"])


# Lengths


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


# The counts


def test_an_audit_reads_its_own_report():
    audit = Audit(rows_read=3, pairs_kept=2, formats={"a.jsonl": "text"})
    audit.drop("empty answer", 2)
    audit.shorten("prompt", 1)
    audit.note(MERGED, 3)
    assert audit.report() == {
        "rows_read": 3,
        "pairs_kept": 2,
        "formats": {"a.jsonl": "text"},
        "dropped": {"empty answer": {"count": 1, "rows": [2]}},
        "cut": {"prompt": {"count": 1, "rows": [1]}},
        "noted": {MERGED: {"count": 1, "rows": [3]}},
    }
    assert Audit.from_report(audit.report()) == audit
    assert audit.summary() == (
        "2 of 3 rows kept; format text; dropped: 1 empty answer; cut: 1 prompt; "
        "noted: 1 border token merged"
    )


def test_an_audit_that_lost_a_row_does_not_report():
    with pytest.raises(AssertionError):
        Audit(rows_read=2, pairs_kept=1).report()


def test_an_audit_counts_all_rows_and_names_the_first_thousand():
    tally = Tally()
    for row in range(1, MAX_ROWS_NAMED + 6):
        tally.add(row)
    assert (tally.count, tally.rows[-1], len(tally.rows)) == (1005, 1000, 1000)
    whole = Audit()
    whole.absorb(Audit(rows_read=1005, dropped={"overlong": tally}), "a")
    whole.absorb(Audit(rows_read=1005, dropped={"overlong": tally}), "b")
    merged = whole.dropped["overlong"]
    assert (merged.count, merged.rows[0], len(merged.rows)) == (2010, "a:1", 1000)
    assert (tally.count, tally.rows[0]) == (1005, 1)  # what was absorbed is as it was
