"""Preferences to token ids, through the chat template.

What is scored of an answer, exactly:
  * The scored span begins after the longest common token prefix of the rendered prompt and both
    rendered full texts. Tokens of whole texts are compared, instead of tokenising prompt and answer
    separately, so that a token which merges across the border is the one that the model will see.
  * It ends with exactly one turn end: the last control token of the rendered text. What a template
    writes after it (ChatML: a newline) is dropped. Without one, EOS is appended. The one exception
    is the EOS with which Phi's templates close a whole conversation, after the turn's own end.
  * A cut answer ends where it is cut: no turn end is added, and it is scored as a prefix.
  * In an answer of several turns only the assistant's are scored, each with its turn end.

A literal control token in a message (`<|im_end|>` in a question about ChatML) is encoded as the
plain text that it is, so that it cannot end a turn. Ready-made ChatML is the exception.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dpo.data.audit import Audit, RowName
from dpo.data.bounded import CHARACTERS, SECONDS, in_time
from dpo.data.encoding import Encoder
from dpo.data.formats import IM_START, SYSTEM_ROLES, Message, Preference, RowError
from dpo.data.limits import Limits
from dpo.data.openings import common_prefix
from dpo.data.stream import TokenizedPair
from dpo.data.templates import IM_END
from dpo.errors import UserError

# Rows whose prompt renders differently once an answer follows are dropped for this reason. A
# template that rewrites the thinking differs in every row: `dpo.data.tokens` refuses the source.
TEMPLATE_DIFFERS = "prompt renders differently before an answer"


class ChatTokenizer:
    """Turns preferences into `TokenizedPair`s, a batch at a time, and counts what it does.

    Args:
        tokenizer: the model's.
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
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token to end answers with. "
                "Set eos_token in its tokenizer_config.json."
            )
        self._eos = eos
        self._written: set[str] = set()
        added = tokenizer.added_tokens_decoder.items()
        special = {i: token.content for i, token in added if token.special}
        # Some tokenizers do not mark turn markers as special, so what the template writes counts.
        written = "\0".join((template or "", *(tokenizer.chat_control_tokens or ())))
        spelt = {i: t.content for i, t in added if t.content.strip() and t.content in written}
        self._control_ids = special.keys() | spelt.keys() | set(tokenizer.all_special_ids)
        self._special = _any_of(special.values())
        self._control = _any_of((special | spelt).values())
        self._encoder = Encoder(tokenizer, [t for i, t in added if i in spelt])
        # What the tokenizer puts before plain text by itself: BOS, or nothing.
        (bare,) = self._encoder.encode(["a"])
        (whole,) = self._encoder.encode(["a"], add_special_tokens=True)
        self._bos = whole[: whole.index(bare[0])]
        self._bos_text = str(tokenizer.decode(self._bos))
        # The same few tokens follow every turn end, and decoding them takes longer than the search.
        self._is_blank = lru_cache(maxsize=8)(lambda ids: not str(tokenizer.decode(ids)).strip())
        self._closes_with_eos = template is not None and self._is_closed_with_eos()

    def tokenize(
        self, rows: Sequence[tuple[RowName, Preference]]
    ) -> Iterator[tuple[RowName, TokenizedPair]]:
        """Yields the rows that can be used, in order; the others are counted in the audit.

        Raises:
            UserError: messages without a template, or an overlong pair under on_overlong=error.
        """
        return ((row, pair) for row, _, pair in self.tokenize_prompts(rows))

    def tokenize_prompts(
        self, rows: Sequence[tuple[RowName, Preference]]
    ) -> Iterator[tuple[RowName, str, TokenizedPair]]:
        """`tokenize`, with the rendered prompt of each row: equal ones are the same question."""
        rendered = []
        for row, given in rows:
            try:
                preference = self._with_arguments(given)
                texts = self._texts(preference)
                _require_unicode(texts)
                self._require_written(preference, texts)
                rendered.append((row, preference, texts))
            except RowError as error:
                self._audit.drop(error.reason, row)
        ids = self._encoder.encode_rows([texts for _, _, texts in rendered])
        for (row, preference, texts), encoded in zip(rendered, ids, strict=True):
            notes = self._left_out(preference, texts)
            try:
                if self._holds_control_token(preference, texts):
                    notes.add("control token in text, neutralised")
                    encoded = self._neutralised(preference, texts)
                pair = self._split(preference, texts, encoded, notes)
                border = len(pair.prompt_ids)
                find_content = partial(self._content, preference, encoded[0], border)
                pair, cut = self._limits.fit(pair, row, find_content)
            except RowError as error:
                self._audit.drop(error.reason, row)
                continue
            for note in sorted(notes):
                self._audit.note(note, row)
            for part in cut:
                self._audit.shorten(part, row)
            yield row, texts[0], pair

    def _prompt_text(self, preference: Preference) -> str:
        if preference.kind == "messages":
            return self._render(preference, [], tokenize=False)
        # Some files write the BOS that the tokenizer adds too; `_texts` removes a written EOS.
        return str(preference.prompt).removeprefix(self._bos_text)

    def _texts(self, preference: Preference) -> list[str]:
        """The prompt's text, and the whole texts with the chosen and with the rejected answer."""
        prompt = self._prompt_text(preference)
        answers = (preference.chosen, preference.rejected)
        if preference.kind == "messages":
            return [prompt, *(self._render(preference, a, tokenize=False) for a in answers)]
        if preference.kind == "chatml":
            return [prompt, *(prompt + _chatml_turn(str(a)) for a in answers)]
        eos = str(self._tokenizer.eos_token)
        return [prompt, *(prompt + _without_end(str(a), eos) for a in answers)]

    def _render(
        self, preference: Preference, answer: Any, *, is_prompt: bool | None = None, **how: Any
    ) -> Any:
        """Messages through the template: text, or token ids if `how` says so.

        Without an answer it is a prompt, which ends by asking for the assistant's turn; or, if the
        assistant speaks last in it, with these words, which the answer continues.
        """
        if self._template is None:
            raise UserError(
                "the rows hold messages, and there is no template to write them with: "
                "data.chat_template is none, or it is auto and the tokenizer "
                f"{self._tokenizer.name_or_path!r} has neither a template nor ChatML's control "
                "tokens. Give a template as a file in data.chat_template."
            )
        turns: list[Any] = [*preference.prompt, *answer]
        asks = not answer if is_prompt is None else is_prompt
        continued = _is_continued(preference)
        if continued and answer:
            border = len(preference.prompt)
            begun, its_end = turns[border - 1 : border + 1]
            whole = begun | its_end | {"content": begun["content"] + its_end["content"]}
            turns[border - 1 : border + 1] = [whole]
        elif continued:
            how["continue_final_message"] = True
        try:
            with in_time():
                rendered = self._tokenizer.apply_chat_template(
                    turns,
                    tools=preference.tools,  # type: ignore[arg-type]
                    chat_template=self._template,
                    add_generation_prompt=asks and not how.get("continue_final_message"),
                    **(preference.template_arguments or {}),
                    **how,
                )
            if len(rendered) > CHARACTERS:
                raise MemoryError
            return rendered
        except jinja2.TemplateSyntaxError as error:
            problem = f"{error} (line {error.lineno} of the template)"
            raise UserError(f"data.chat_template: {problem}. Correct the template.") from None
        except (MemoryError, TimeoutError) as error:
            what = f"{SECONDS} s" if isinstance(error, TimeoutError) else "the memory it may"
            raise UserError(
                f"data.chat_template: the template takes more than {what} for one conversation. "
                "Correct it."
            ) from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
            raise RowError(
                f"the template fails on it: {type(error).__name__}: {error}", ""
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the template refuses it: {error}", "") from None

    def _with_arguments(self, preference: Preference) -> Preference:
        """Gives calls' arguments that are JSON text as objects, if the template would escape it."""
        if not any(_texts_of_calls(preference)) or self._writes_text_of_calls:
            return preference
        return _changed(preference, _with_objects, *_ALL_SIDES)

    @cached_property
    def _writes_text_of_calls(self) -> bool:
        """Whether the template writes arguments that are text as they are."""
        text = '{"a": 1}'
        call = {"type": "function", "function": {"name": "f", "arguments": text}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return text in self._render(_asked(turn), [turn], tokenize=False)
        except RowError:
            return False

    def _require_written(self, preference: Preference, texts: Sequence[str]) -> None:
        """Drops a row of which the template leaves out what its answers are about.

        It leaves a part out if the row's texts stay the same without it. Once a template has
        written a part of some kind, rows are not compared for that kind any more.
        """
        for what, change in _MUST_BE_WRITTEN.items():
            if what not in self._written and not self._is_written(preference, texts, change, what):
                raise RowError(f"the template does not write its {what}", "")

    def _left_out(self, preference: Preference, texts: Sequence[str]) -> set[str]:
        """What the template leaves out of the prompt on purpose, as notes."""
        notes = set()
        if _is_continued(preference):
            notes.add("answer continues the prompt's last turn")
        what = "thinking of earlier turns"
        if not self._is_written(preference, texts, _without_earlier_thinking, what):
            notes.add(f"the template leaves out the {what}")
        return notes

    def _is_written(
        self,
        preference: Preference,
        texts: Sequence[str],
        change: Callable[[Preference], Preference],
        what: str,
    ) -> bool:
        """Whether the texts of a row change with it, or it is not in the row."""
        changed = change(preference) if preference.kind == "messages" else preference
        if changed == preference:
            return True
        try:
            is_written = self._texts(changed) != texts
        except RowError:  # the template looks at it
            is_written = True
        if is_written:
            self._written.add(what)
        return is_written

    def _render_ids(self, preference: Preference, answer: Any, **how: Any) -> list[int]:
        """Token ids in which control tokens stand only where the template writes them."""
        sanitised = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
        return self._render(preference, answer, **sanitised, **how)

    def _holds_control_token(self, preference: Preference, texts: Sequence[str]) -> bool:
        if preference.kind == "chatml":
            return False
        if preference.kind == "text":
            return any(self._special.search(text) for text in texts)
        fields = (preference.prompt, preference.chosen, preference.rejected, preference.tools)
        return any(self._control.search(text) for text in _strings(fields))

    def _neutralised(self, preference: Preference, texts: Sequence[str]) -> list[list[int]]:
        """The three token lists again, with control tokens in the row encoded as plain text."""
        if preference.kind == "text":
            return self._encoder.encode(texts, split_special_tokens=True)
        answers = ([], preference.chosen, preference.rejected)
        return [self._render_ids(preference, answer) for answer in answers]

    def _split(
        self,
        preference: Preference,
        texts: Sequence[str],
        encoded: Sequence[list[int]],
        notes: set[str],
    ) -> TokenizedPair:
        """Splits both texts at their border with the prompt, and ends each with one turn end."""
        prompt_text, *full_texts = texts
        if not all(text.startswith(prompt_text) for text in full_texts):
            raise RowError(TEMPLATE_DIFFERS, "")
        is_text = preference.kind == "text"
        prompt, *full = [self._bos + ids for ids in encoded] if is_text else encoded
        border = min(common_prefix(prompt, ids) for ids in full)
        if not border:
            raise RowError("prompt merges into the answer", "no token comes before the border")
        if border < len(prompt):
            notes.add("border token merged")
        sides = []
        for answer, text, ids in zip(
            (preference.chosen, preference.rejected), full_texts, full, strict=True
        ):
            ended = [*ids, self._eos] if is_text else self.end_turn(ids, border)
            if len(ended) - border < 2:
                raise RowError("empty answer", "only the turn end is left")
            if preference.kind == "messages" and len(ended) > len(ids):
                notes.add("turn end appended")
            marks = self.scored_marks(preference, answer, text, ended, border)
            sides.append((ended[border:], marks))
        (chosen, chosen_scored), (rejected, rejected_scored) = sides
        marks = (chosen_scored, rejected_scored)
        return TokenizedPair(prompt[:border], chosen, rejected, *marks, preference.numbers)

    def _content(self, preference: Preference, prompt: list[int], border: int) -> range:
        """Which tokens before the border hold the first user message's content, and nothing else.

        Its frame is the text before and after the `A` in the prompt in which that message is `A`.
        Decoded ids are compared with it, so a token that holds a piece of the frame is seen. The
        range is empty without a user message, and where the template does not write it just once.
        """
        turns: list[Any] = [*preference.prompt] if preference.kind == "messages" else []
        asked = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
        if asked is None:
            return range(0)
        decode: Any = self._tokenizer.decode

        def said(content: str) -> str:
            asking = [*turns[:asked], turns[asked] | {"content": content}, *turns[asked + 1 :]]
            return decode(self._render_ids(replace(preference, prompt=asking), []))

        text = said("A")
        at = common_prefix(text, said("B"))
        before, after = text[:at], text[at + 1 :]
        lengths = range(len(prompt) + 1)
        start = bisect_left(lengths, True, key=lambda i: decode(prompt[:i]).startswith(before))
        end = bisect_left(lengths, True, key=lambda i: not decode(prompt[i:]).endswith(after)) - 1
        return range(start, min(end, border))

    def end_turn(self, ids: list[int], border: int) -> list[int]:
        """Drops what follows the last control token of the answer; appends EOS if there is none."""
        answer = ids[border:]
        end = self._closing_eos(answer) if self._closes_with_eos else 0
        end = end or self._turn_end(answer)
        return ids[: border + end] if end else [*ids, self._eos]

    def _turn_end(self, ids: list[int]) -> int:
        """Length up to the last control token; 0 without one, or if text follows it."""
        end = len(ids)
        while end and ids[end - 1] not in self._control_ids:
            end -= 1
        return end if self._is_blank(tuple(ids[end:])) else 0

    def _closing_eos(self, ids: list[int]) -> int:
        """Length up to a turn end that only an EOS follows; 0 without one."""
        end = self._turn_end(ids)
        return self._turn_end(ids[: end - 1]) if end and ids[end - 1] == self._eos else 0

    def _is_closed_with_eos(self) -> bool:
        r"""Whether the template writes one more EOS after the last turn's end, even after a user's.

        Phi's do: `<|end|>\n<|endoftext|>`. That EOS ends the text; the turn has ended before it.
        """
        try:
            return bool(self._closing_eos(self._render_ids(_asked(), [], is_prompt=False)))
        except RowError:  # the template wants an answer, or a system message
            return False

    def scored_marks(
        self, preference: Preference, answer: Any, text: str, ids: list[int], border: int
    ) -> list[bool] | None:
        """Marks the assistant's tokens in an answer of several turns; None for a single turn."""
        if preference.kind != "messages" or len(answer) == 1:
            return None
        scored = [False] * len(ids)
        for i, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            asked = self._render(preference, answer[:i], is_prompt=True, tokenize=False)
            before = self._render_ids(preference, answer[:i], is_prompt=True)
            after = self._render_ids(preference, answer[: i + 1], is_prompt=False)
            start = common_prefix(before, ids) if i else border
            after = self.end_turn(after, start)
            if not text.startswith(asked) or ids[: len(after)] != after:
                raise RowError("turns render differently in context", f"turn {i + 1}")
            scored[start : len(after)] = [True] * (len(after) - start)
        return scored[border:]


def _asked(*answer: Message) -> Preference:
    """A question to try a template on."""
    prompt = [{"role": "user", "content": "a"}]
    return Preference(kind="messages", prompt=prompt, chosen=list(answer), rejected=[])


def _require_unicode(texts: Sequence[str]) -> None:
    """Refuses half a surrogate pair, which JSON can hold and no tokenizer can read."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise RowError("half a surrogate pair in its text", "") from None


def _is_continued(preference: Preference) -> bool:
    """Whether the prompt ends with the assistant's words, which the answer goes on with."""
    turns: Any = preference.prompt if preference.kind == "messages" else []
    last = turns[-1] if turns else {"role": ""}
    return last["role"] == "assistant" and "tool_calls" not in last


def _changed(
    preference: Preference, change: Callable[[Message], Message], *sides: str
) -> Preference:
    """The preference with every message of these sides changed."""
    return replace(
        preference, **{side: [change(turn) for turn in getattr(preference, side)] for side in sides}
    )


def _without(*keys: str) -> Callable[[Message], Message]:
    return lambda turn: {key: turn[key] for key in turn if key not in keys}


def _reworded(*roles: str) -> Callable[[Message], Message]:
    return lambda turn: turn | {"content": turn["content"] + "."} if turn["role"] in roles else turn


_ALL_SIDES = ("prompt", "chosen", "rejected")
_THINKING = _without("reasoning_content", "thinking")


def _without_earlier_thinking(preference: Preference) -> Preference:
    return _changed(preference, _THINKING, "prompt")


# Parts of a row without which its answers mean something else, and a row that lacks or changes it.
_MUST_BE_WRITTEN: dict[str, Callable[[Preference], Preference]] = {
    "tools": lambda preference: replace(preference, tools=None),
    "tool calls": lambda preference: _changed(preference, _without("tool_calls"), *_ALL_SIDES),
    "tool results": lambda preference: _changed(preference, _reworded("tool"), *_ALL_SIDES),
    "system message": lambda preference: _changed(preference, _reworded(*SYSTEM_ROLES), "prompt"),
    "thinking": lambda preference: _changed(preference, _THINKING, "chosen", "rejected"),
}


def _texts_of_calls(preference: Preference) -> Iterator[str]:
    """The arguments of calls that are text."""
    if preference.kind == "messages":
        for turn in (*preference.prompt, *preference.chosen, *preference.rejected):
            for call in turn.get("tool_calls", ()):  # type: ignore[union-attr]
                arguments = (call.get("function") or call).get("arguments")
                if isinstance(arguments, str):
                    yield arguments


def _with_objects(turn: Message) -> Message:
    """The message with the arguments of its calls read from JSON; what is no JSON stays text."""
    calls = []
    for call in turn.get("tool_calls", ()):
        function = call.get("function") or call
        with suppress(KeyError, TypeError, ValueError):
            function = function | {"arguments": json.loads(function["arguments"])}
        calls.append(call | {"function": function} if "function" in call else function)
    return turn | {"tool_calls": calls} if calls else turn


def _chatml_turn(answer: str) -> str:
    r"""Ends an answer with one `<|im_end|>`; files write `<|im_end|>\n`, `<|im_end|>` or none."""
    turn = _without_end(answer, IM_END)
    if IM_START in turn or IM_END in turn:
        raise RowError("several turns in a ChatML answer", "")
    return turn + IM_END


def _without_end(answer: str, end: str) -> str:
    bare = answer.rstrip()
    return bare.removesuffix(end) if bare.endswith(end) else answer


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")  # (?!) never matches


def _strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[int]:
    """Tokens that end an answer: EOS, the model's own list, and the template's turn end."""
    own = model.generation_config.eos_token_id
    stops = {*(own if isinstance(own, list) else [own])}
    stops.add(tokenizer.eos_token_id)  # type: ignore[arg-type]
    if template:
        chat = ChatTokenizer(tokenizer, template, Limits(1, 2, "truncate"), Audit())
        asked = _asked({"role": "assistant", "content": "b"})
        stops.add(chat.end_turn(chat._render_ids(asked, asked.chosen), 0)[-1])
    return sorted(stop for stop in stops if stop is not None)
