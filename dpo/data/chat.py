"""Preferences to token ids, through the chat template.

What is scored of an answer, exactly:
  * The scored span begins after the longest common token prefix of the rendered prompt and both
    rendered full texts. Comparing tokens of whole texts, instead of tokenising prompt and answer
    apart, is what makes a token that merges across the border come out as the model will see it.
  * It ends with exactly one turn-end token: the last control token of the rendered text. What a
    template writes after it (ChatML: a newline) is dropped. Without any, EOS is appended.
  * A cut answer ends where it is cut: no turn-end is added, it is scored as the prefix it is.
  * In an answer of several turns the assistant's are scored, each with its turn-end.

A literal control token in a message (`<|im_end|>` in a question about ChatML) is encoded as the
plain text that it is, so that it cannot end a turn. Ready-made ChatML is the exception.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from dpo.config import UserError
from dpo.data.audit import Audit, RowName
from dpo.data.formats import Message, Preference, RowError
from dpo.data.stream import TokenizedPair

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_VERBATIM = "{{ messages[0]['content'] }}"  # a template that adds nothing
# Rows whose prompt reads otherwise once an answer follows are dropped for this reason. Templates
# that rewrite the thinking do it to every row; then `loader` refuses the whole set.
TEMPLATE_DIFFERS = "prompt renders differently before an answer"


def choose_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> str | None:
    """The Jinja template that `data.chat_template` means; None where messages are refused.

    Raises:
        UserError: ChatML for a tokenizer that does not know its control tokens, or no such file.
    """
    if choice == "none":
        return None
    if choice == "auto" and tokenizer.chat_template:
        return tokenizer.get_chat_template()
    if choice in ("auto", "chatml"):
        require_chatml(tokenizer, f"data.chat_template: got {choice}")
        return CHATML
    if not Path(choice).is_file():
        raise UserError(
            f"data.chat_template: got {choice!r}, wanted auto, chatml, none or an existing file. "
            "Give the path of a Jinja template."
        )
    return Path(choice).read_text(encoding="utf-8")


def require_chatml(tokenizer: PreTrainedTokenizerBase, problem: str) -> None:
    """Refuses ChatML for a tokenizer that would spell its control tokens out as text."""
    added = tokenizer.get_added_vocab()
    missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in added]
    if missing:
        raise UserError(
            f"{problem}, but the tokenizer {tokenizer.name_or_path!r} does not know "
            f"{' and '.join(missing)} as single tokens. Take a model that does, or give its own "
            "template as a file in data.chat_template."
        )


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens, and what happens to a pair beyond them."""

    max_prompt_length: int
    max_length: int
    on_overlong: Literal["truncate", "drop", "error"]


class ChatTokenizer:
    """Turns preferences into `TokenizedPair`s, a batch at a time, and counts what it does.

    Args:
        tokenizer: of the model.
        template: from `choose_template`.
        limits: longest prompt, and longest prompt plus answer.
        audit: where cuts, drops and oddities are counted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        limits: Limits,
        audit: Audit,
    ):
        self._tokenizer, self._template = tokenizer, template
        self._limits, self._audit = limits, audit
        added = tokenizer.added_tokens_decoder
        # Some tokenizers do not mark their turn markers as special: what the template writes counts.
        control = {
            i: token.content
            for i, token in added.items()
            if token.special or (token.content.strip() and token.content in (template or ""))
        }
        self._control_ids = control.keys() | set(tokenizer.all_special_ids)
        self._control_texts = list(control.values())
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token: answers could not end. "
                "Set eos_token in its tokenizer_config.json."
            )
        self._eos = eos
        # What the tokenizer puts before plain text by itself: BOS, or nothing.
        with_special, bare = (
            list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False)
        )
        self._bos = with_special[: with_special.index(bare[0])]

    def tokenize(
        self, rows: Sequence[tuple[RowName, Preference]]
    ) -> Iterator[tuple[RowName, TokenizedPair]]:
        """Yields the rows that can be used, in order; the others are counted in the audit.

        Raises:
            UserError: messages without a template, or an overlong pair under on_overlong=error.
        """
        rendered = []
        for row, preference in rows:
            try:
                rendered.append((row, preference, self._render_three(preference)))
            except RowError as error:
                self._audit.drop(error.reason, row)
        if not rendered:
            return
        # One call of the (Rust) tokenizer for the batch; it is what takes the time.
        texts = [text for _, _, three in rendered for text in three]
        ids = iter(self._tokenizer(texts, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        for (row, preference, three), *encoded in zip(rendered, ids, ids, ids, strict=True):
            try:
                if self._holds_control_token(preference):
                    self._audit.note("control token in text, neutralised", row)
                    encoded = [self._encode_neutralised(preference, a) for a in _answers(preference)]
                pair = self._fit(row, self._split(row, preference, three, encoded))
            except RowError as error:
                self._audit.drop(error.reason, row)
            else:
                yield row, pair

    def _render_three(self, preference: Preference) -> list[str]:
        """The prompt's text, and the whole texts with the chosen and with the rejected answer."""
        return [self._render(preference, answer) for answer in _answers(preference)]

    def _render(
        self, preference: Preference, answer: Any, *, prompt: bool | None = None, **how: Any
    ) -> Any:
        """Prompt and answer through the template; without an answer (or with prompt=True), as a prompt.

        Text, or with tokenize=True token ids.
        """
        template = self._template if preference.kind == "messages" else _VERBATIM
        if template is None:
            raise UserError(
                "data.chat_template: got none, but the rows hold messages. Set it to auto, chatml "
                "or the path of a template."
            )
        if preference.kind == "messages":
            conversation = [*preference.prompt, *answer]
        else:
            text = preference.prompt + answer  # type: ignore[operator]
            if preference.kind == "text":  # some files write the EOS that is appended here
                text = text.removesuffix(str(self._tokenizer.eos_token))
            conversation = [{"role": "user", "content": text}]
            if not how:
                return text
        try:
            return self._tokenizer.apply_chat_template(
                conversation,
                tools=preference.tools,
                chat_template=template,
                add_generation_prompt=not answer if prompt is None else prompt,
                **{"tokenize": False, **how},
            )
        except jinja2.TemplateError as error:
            raise RowError(f"the template refuses it: {error}", "") from None

    def _encode_neutralised(
        self, preference: Preference, answer: Any, *, prompt: bool | None = None
    ) -> list[int]:
        """Token ids in which control tokens stand only where the template writes them."""
        return self._render(
            preference,
            answer,
            prompt=prompt,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=preference.kind != "chatml",
        )

    def _holds_control_token(self, preference: Preference) -> bool:
        if preference.kind == "chatml":
            return False
        texts = (
            [part for part in (preference.prompt, preference.chosen, preference.rejected)]
            if preference.kind == "text"
            else [
                str(value)
                for messages in (preference.prompt, preference.chosen, preference.rejected)
                for message in messages
                for value in message.values()  # type: ignore[union-attr]
            ]
        )
        return any(control in str(text) for text in texts for control in self._control_texts)

    def _split(
        self, row: RowName, preference: Preference, texts: list[str], encoded: list[list[int]]
    ) -> TokenizedPair:
        """Splits both texts at their border with the prompt, and ends each with one turn-end."""
        prompt_text, *full_texts = texts
        if not all(text.startswith(prompt_text) for text in full_texts):
            raise RowError(TEMPLATE_DIFFERS, "")
        if preference.kind == "text":
            encoded = [self._bos + ids for ids in encoded]
        prompt, chosen, rejected = encoded
        border = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
        if not border:
            raise RowError("empty prompt", "no token comes before the answers")
        if border < len(prompt):
            self._audit.note("border token merged", row)
        sides = []
        for answer, ids in ((preference.chosen, chosen), (preference.rejected, rejected)):
            ended = self._end_turn(ids, border)
            if len(ended) > len(ids) and preference.kind != "text":
                self._audit.note("turn end appended", row)
            sides.append((ended[border:], self._scored(preference, answer, ended, border)))
        (chosen, chosen_scored), (rejected, rejected_scored) = sides
        return TokenizedPair(prompt[:border], chosen, rejected, chosen_scored, rejected_scored)

    def _end_turn(self, ids: list[int], border: int) -> list[int]:
        """Drops what follows the last control token of the answer; appends EOS if there is none."""
        last = len(ids) - 1
        while last >= border and ids[last] not in self._control_ids:
            last -= 1
        if last >= border and not self._tokenizer.decode(ids[last + 1 :]).strip():  # type: ignore[union-attr]
            return ids[: last + 1]
        return [*ids, self._eos]

    def _scored(
        self, preference: Preference, answer: Any, ids: list[int], border: int
    ) -> list[bool] | None:
        """Marks the assistant's turns in an answer of several; None where it is one turn."""
        if preference.kind != "messages" or len(answer) == 1:
            return None
        scored = [False] * len(ids)
        for i, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            before = self._encode_neutralised(preference, answer[:i], prompt=True)
            after = self._encode_neutralised(preference, answer[: i + 1], prompt=False)
            start = border if i == 0 else len(before)
            end = len(ids) if i == len(answer) - 1 else len(self._end_turn(after, start))
            if ids[:start] != before[:start] or ids[:end] != after[:end]:
                raise RowError("turns render differently in context", f"turn {i + 1}")
            scored[start:end] = [True] * (end - start)
        return scored[border:]

    def _fit(self, row: RowName, pair: TokenizedPair) -> TokenizedPair:
        """Cuts the prompt from the left and the answers from the right; refuses what is left over."""
        limits = self._limits
        prompt = pair.prompt_ids[-limits.max_prompt_length :]
        room = limits.max_length - len(prompt)
        cut = [
            name
            for name, is_cut in (
                ("prompt", len(prompt) < len(pair.prompt_ids)),
                ("chosen", len(pair.chosen_ids) > room),
                ("rejected", len(pair.rejected_ids) > room),
            )
            if is_cut
        ]
        if cut and limits.on_overlong == "drop":
            raise RowError("overlong", ", ".join(cut))
        if cut and limits.on_overlong == "error":
            raise UserError(
                f"row {row}: too long ({', '.join(cut)}): got {len(pair.prompt_ids)} prompt, "
                f"{len(pair.chosen_ids)} chosen and {len(pair.rejected_ids)} rejected tokens, wanted "
                f"at most {limits.max_prompt_length} of prompt and {limits.max_length} of prompt and "
                "answer. Raise data.max_length, or set data.on_overlong to truncate or drop."
            )
        chosen_scored = pair.chosen_scored and pair.chosen_scored[:room]
        rejected_scored = pair.rejected_scored and pair.rejected_scored[:room]
        fitted = TokenizedPair(
            prompt, pair.chosen_ids[:room], pair.rejected_ids[:room], chosen_scored, rejected_scored
        )
        if fitted.chosen_ids == fitted.rejected_ids:
            raise RowError("identical answers", "")
        if any(scored is not None and not any(scored) for scored in (chosen_scored, rejected_scored)):
            raise RowError("no assistant token left", "")
        for name in cut:
            self._audit.shorten(name, row)
        return fitted


def _answers(preference: Preference) -> tuple[Any, Any, Any]:
    """No answer, the chosen and the rejected one: what the three texts of a row end with."""
    return "" if isinstance(preference.chosen, str) else [], preference.chosen, preference.rejected


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def stop_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> list[int]:
    """Tokens that end an answer: EOS, the model's own list, and the template's turn end."""
    own = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if template:
        chat = ChatTokenizer(tokenizer, template, Limits(1, 2, "truncate"), Audit())
        answered = Preference(
            kind="messages",
            prompt=[{"role": "user", "content": "a"}],
            chosen=[{"role": "assistant", "content": "b"}],
            rejected=[],
        )
        stops.add(chat._end_turn(chat._encode_neutralised(answered, answered.chosen), 0)[-1])
    return sorted(stop for stop in stops if stop is not None)
