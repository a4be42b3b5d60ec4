"""A real SentencePiece tokenizer: the one of Mistral-7B-v0.1, over generated texts of every kind.

Its pieces hold their leading space (▁), the first of a text gets one for itself, and what it has no
piece for becomes bytes: each of these can move the border between prompt and answer. The one letter
that is not among the texts is ▁ itself, which no SentencePiece tokenizer tells from a space.
"""

import copy
import random

import pytest

from dpo.data.audit import Audit
from dpo.data.chat import ChatTokenizer
from dpo.data.formats import Preference
from dpo.data.limits import Limits
from tests.data.rows import cut_by_offsets, messages
from tests.data.tokenizers import FAMILIES

NUM_ROWS = 1000
ALPHABETS = (
    "etaoin shrdlu",
    "the The  THE\t",
    "\n\n \r\n",
    "0123456789.,-+",
    "äöüßéñçøæœ",
    "日本語中文漢字仮名한국어",
    "🌊🙂👩‍👩‍👧🇨🇭\u200d",
    "[]/INST<>|s_`'\"\\",
    "\u00a0\u2028\u3000\ufeff\u0301",
    "אבג ابت ไทย हिन्दी",
)
EDGES = ("", " ", "  ", "\n", "\n\n", "\t", ":", "\u00a0")


@pytest.fixture
def tokenizer(sentencepiece):
    return sentencepiece


def generated_texts():
    """Triples (prompt, chosen, rejected): words of one or more alphabets between odd edges."""
    rng = random.Random(0)

    def one():
        letters = "".join(rng.sample(ALPHABETS, rng.choice((1, 1, 2, 3))))
        body = "".join(rng.choices(letters, k=rng.randint(1, 30)))
        return rng.choice(EDGES) + body + rng.choice(EDGES)

    rows = []
    while len(rows) < NUM_ROWS:
        prompt, chosen, rejected = one(), one(), one()
        if rng.random() < 0.3:
            rejected = chosen + rejected  # one answer may begin with the other
        rows.append((prompt, chosen, rejected))
    return rows


ROWS = generated_texts()


def tokenized(tokenizer, template, preferences):
    audit = Audit()
    chat = ChatTokenizer(tokenizer, template, Limits(1000, 2000, "error"), audit)
    pairs = dict(chat.tokenize(list(enumerate(preferences))))
    assert (len(pairs), audit.dropped) == (NUM_ROWS, {})
    assert not audit.cut
    return pairs, audit.noted


def assert_split_and_ended(tokenizer, pair, prompt, texts, bos=()):
    """The ids are those of the whole text; the border is the longest that all three texts share."""
    alone = [*bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    border = len(pair.prompt_ids)
    assert alone[:border] == pair.prompt_ids
    nexts = [alone[border : border + 1]]
    for text, answer in zip(texts, (pair.chosen_ids, pair.rejected_ids), strict=True):
        whole = [*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids = [*pair.prompt_ids, *answer]
        assert ids == ([*whole, tokenizer.eos_token_id] if bos else whole)
        # A text gets a space of its own in front, unless it begins with one.
        space = "" if text.startswith(" ") else " "
        assert tokenizer.decode(ids) == (f"<s>{space}{text}</s>" if bos else text)
        assert (answer.count(tokenizer.eos_token_id), answer[-1]) == (1, tokenizer.eos_token_id)
        nexts.append(answer[:1])
    assert border == len(alone) or any(token != nexts[0] for token in nexts[1:])


def test_the_model_file_loads_as_the_tokenizer_that_mistral_ships(tokenizer):
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (32000, 1, 2)
    assert tokenizer("Hello world")["input_ids"] == [1, 22557, 1526]
    assert tokenizer.chat_template is None


def test_plain_texts_are_split_at_the_border_and_ended_once(tokenizer):
    preferences = [
        Preference(kind="text", prompt=prompt, chosen=chosen, rejected=rejected)
        for prompt, chosen, rejected in ROWS
    ]
    pairs, noted = tokenized(tokenizer, None, preferences)
    for row, pair in pairs.items():
        prompt, *answers = ROWS[row]
        texts = [prompt + answer for answer in answers]
        assert_split_and_ended(tokenizer, pair, prompt, texts, bos=[1])
        assert pair.prompt_ids[0] == 1
        assert 1 not in pair.prompt_ids[1:] + pair.chosen_ids + pair.rejected_ids
    assert list(noted) == ["border token merged"]
    assert noted["border token merged"].count > 100  # else these texts would not try the rule


def test_texts_under_an_inst_template_are_split_at_the_border_and_ended_once(tokenizer):
    template = FAMILIES["mistral"].template

    def turn(role, content):
        return {"role": role, "content": content}

    preferences = [
        Preference(
            kind="messages",
            prompt=[turn("user", prompt)],
            chosen=[turn("assistant", chosen)],
            rejected=[turn("assistant", rejected)],
        )
        for prompt, chosen, rejected in ROWS
    ]
    pairs, _ = tokenized(tokenizer, template, preferences)
    for row, pair in pairs.items():
        prompt, *answers = ROWS[row]
        rendered = f"<s>[INST] {prompt} [/INST]"
        texts = [f"{rendered} {answer}</s>" for answer in answers]
        assert_split_and_ended(tokenizer, pair, rendered, texts)


def test_prompts_under_an_inst_template_are_cut_inside_their_frame(tokenizer):
    """`[INST] ` ends in a space, which the question's first piece holds: that piece stays."""
    tokenizer, template = copy.deepcopy(tokenizer), FAMILIES["mistral"].template
    tokenizer.chat_template = template
    rows = [(i, messages(prompt)) for i, (prompt, _, _) in enumerate(ROWS)]

    def prompts(max_prompt_length):
        audit = Audit()
        limits = Limits(max_prompt_length, 2000, "truncate")
        pairs = ChatTokenizer(tokenizer, template, limits, audit).tokenize(rows)
        return [pair.prompt_ids for _, pair in pairs], audit.cut

    (whole, _), (cut, counts) = prompts(1000), prompts(16)
    expected = [
        cut_by_offsets(tokenizer, row, ids, 16) for (_, row), ids in zip(rows, whole, strict=True)
    ]
    assert cut == [ids for ids, _ in expected]
    assert counts["prompt in its frame"].count > 100
    for row in counts["prompt in its frame"].rows:
        text = tokenizer.decode(cut[row])
        assert (text[:10], text[-8:]) == ("<s>[INST] ", " [/INST]")


def test_control_tokens_in_texts_are_spelt_out_and_nothing_else_changes(tokenizer):
    """`</s>` inside a text is three ordinary pieces; the text reads the same afterwards."""
    audit = Audit()
    chat = ChatTokenizer(tokenizer, FAMILIES["mistral"].template, Limits(99, 200, "error"), audit)
    plain = Preference(kind="text", prompt="a </s> b", chosen=" c<s>", rejected="<unk>")
    turn = {"role": "user", "content": "a </s> b"}
    asked = Preference(
        kind="messages",
        prompt=[turn],
        chosen=[turn | {"role": "assistant"}],
        rejected=[{"role": "assistant", "content": "<unk>"}],
    )
    (_, first), (_, second) = chat.tokenize([(1, plain), (2, asked)])
    assert tokenizer.decode(first.prompt_ids + first.chosen_ids) == "<s> a </s> b c<s></s>"
    assert [first.prompt_ids.count(2), first.chosen_ids.count(2), first.chosen_ids.count(1)] == [
        0,
        1,
        0,
    ]
    whole = tokenizer.decode(second.prompt_ids + second.chosen_ids)
    assert whole == "<s>[INST] a </s> b [/INST] a </s> b</s>"
    assert (second.prompt_ids.count(2), second.chosen_ids.count(2)) == (0, 1)
    assert 0 not in first.rejected_ids + second.rejected_ids
    assert audit.noted["control token in text, neutralised"].rows == [1, 2]


def test_tokenising_prompt_and_answer_apart_would_give_other_tokens(tokenizer):
    """Negative control: how many of the rows a concatenation of ids would get wrong."""
    apart = [
        tokenizer(prompt)["input_ids"] + tokenizer(chosen, add_special_tokens=False)["input_ids"]
        for prompt, chosen, _ in ROWS
    ]
    whole = [tokenizer(prompt + chosen)["input_ids"] for prompt, chosen, _ in ROWS]
    assert sum(a != w for a, w in zip(apart, whole, strict=True)) > NUM_ROWS // 2
