"""Encoding a prompt once, for both answers, gives the ids of the whole texts."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from dpo.data.audit import Audit
from dpo.data.chat import ChatTokenizer
from dpo.data.encoding import Encoder
from dpo.data.templates import CHATML
from tests.data.rows import ROOM, messages
from tests.data.tokenizers import BASE, FAMILIES, Family, build


def encoder_of(tokenizer, template):
    return ChatTokenizer(tokenizer, template, ROOM, Audit())._encoder


def encoded(tokenizer, template, texts, dividers=None):
    """Token ids as they are made, and those of the whole texts."""
    encoder = encoder_of(tokenizer, template)
    if dividers is not None:
        encoder.dividers = dividers
    (ids,) = encoder.encode_rows([texts])
    return ids, encoder.encode(texts)


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
    assert encoder_of(marked_sentencepiece, CHATML).dividers == [*MARKERS]


def test_the_prompt_of_a_chat_goes_through_the_tokenizer_once(monkeypatch):
    seen, encode = [], Encoder._encode_batch

    def noted(self, texts):
        seen.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "_encode_batch", noted)
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
    encoder = encoder_of(tokenizer, CHATML)
    tokenizer.backend_tokenizer.enable_truncation(2)
    spelt_out = encoder.encode(["<|im_start|>"], split_special_tokens=True)
    assert len(spelt_out[0]) > 2
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert encoder._encode_batch(["<|im_start|>user"]) == [expected]
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
    encoder = encoder_of(tokenizer, None)
    assert encoder._encode_batch(["the"]) == [expected]


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
