"""Texts to token ids. The (Rust) tokenizer takes most of the time, so it is given little to do.

The common opening of a row's prompt and two whole texts is encoded once. It ends where the
tokenizer itself cuts, before the prompt's last control token, so it is nearly all of the prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast


class Encoder:
    """Encodes texts one by one, or the three texts of a row together.

    Args:
        tokenizer: the model's.
        markers: the control tokens that a rendered text may hold.

    Attributes:
        dividers: the markers before which a text may be cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: Iterable[AddedToken]):
        self._tokenizer = tokenizer
        self.dividers = [token.content for token in markers if self._divides(token)]

    def encode(self, texts: Sequence[str], **how: Any) -> list[list[int]]:
        """Token ids of each text, without special tokens around them unless `how` says so."""
        if not texts:
            return []
        only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
        how = {"add_special_tokens": False, "verbose": False, **only_ids, **how}
        return self._tokenizer(list(texts), **how)["input_ids"]  # type: ignore[return-value]

    def encode_rows(self, rows: Sequence[list[str]]) -> Iterator[list[list[int]]]:
        """Token ids of each row's prompt and two whole texts."""
        pieces = []
        for texts in rows:
            cut = max((texts[0].rfind(token) for token in self.dividers), default=0)
            if cut < 0 or not all(text.startswith(texts[0]) for text in texts):
                cut = 0
            pieces += [texts[0][:cut], *(text[cut:] for text in texts)]
        ids = iter(self._encode_batch(pieces))
        for opening, *rest in zip(ids, ids, ids, ids, strict=True):
            yield [opening + its for its in rest]

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, in Rust and without the offsets that nobody needs."""
        tokenizer = self._tokenizer
        if type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            return self.encode(texts)
        self.encode([""])  # resets the truncation and splitting that the Rust side may be set to
        rust: Any = tokenizer.backend_tokenizer
        return [e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=False)]

    def _divides(self, token: AddedToken) -> bool:
        """Whether the tokenizer cuts every text before this token, before it does anything else.

        If so, a text's ids are those of the part before the token, then those of the part from it
        on. It is not so if another token may reach across, or the second part looks at the first.
        """
        text, known = token.content, self._tokenizer.added_tokens_decoder.values()
        reached = any(text[0] in other.content[1:] for other in known)
        begin = [other for other in known if other.content.startswith(text)]
        if token.normalized or reached or any(t.lstrip or t.single_word for t in begin):
            return False
        whole, before, after = self.encode([f"a{text} b", "a", f"{text} b"])
        return self._tokenizer.is_fast is True and whole == before + after
