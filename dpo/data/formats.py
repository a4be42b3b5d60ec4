"""A row of any known data set becomes a `Preference`: a prompt, the preferred answer and the other.

Eight shapes are known, and `FORMATS` is their table of contents. `recognise` compares the columns
and kinds of value of the first rows with it and never guesses: what fits no shape, or two, is
refused with the columns that were found. No two shapes fit the same rows, because
  * `openai` alone has `preferred_output`, `sharegpt` alone has from/value turns;
  * `ultrafeedback` and `conversational` alone answer with message lists; the prompt of the first is
    text, that of the second a message list or implied;
  * the others answer with text: `orca_dpo_pairs` has a `question` and no `prompt`, `hh_rlhf` has
    neither, every prompt of `chatml_dpo_pairs` holds `<|im_start|>`, and none of `text` does.

A row can fail in two ways. Where a column is missing or of the wrong type, or where one holds a
part of the row that this format does not read, the file or `data.format` is wrong: `UserError`, and
training does not start. A well-formed row that cannot serve as a preference raises `RowError`: it
is dropped, counted and reported with its number.

Left out on purpose: templates and tokens (chat.py), and any repair of odd rows. One long file, so
that the eight formats and the few readers they share are seen side by side.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, TypeGuard

from dpo.errors import UserError

RawRow = dict[str, Any]
Message = dict[str, Any]
"""`{"role": one of ROLES, "content": text}`, and whatever keys of MESSAGE_KEYS the row gives."""

IM_START = "<|im_start|>"
SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What templates read. Other keys are dropped: an id or a time would make equal turns differ."""

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Any one of them is the system message of rows that become messages."""

NUMBERS = {
    "margins": ("margin",),
    "weights": ("weight",),
    "chosen_scores": ("chosen_score", "score_chosen", "chosen_rating", "chosen-rating"),
    "rejected_scores": ("rejected_score", "score_rejected", "rejected_rating", "rejected-rating"),
}
"""Numbers of a row that some losses read, and the columns that hold them, in any format."""

_PARTS = {"images", "image", "videos", "video", "audios", "audio"} | {
    *("instruction", "query", "history", "context", "documents", "functions", "function_call")
}
"""Names of what may be a part of a row, apart from those that some format reads."""

_HARMLESS = re.compile(
    r"(^|_)(id|idx|index|uuid|hash|score|rating|source|dataset|model|lang|language|url|date|time)"
    r"s?(_|$)",
    re.IGNORECASE,
)

RECOGNISED_ROWS = 100
"""How many rows `recognise` looks at, at most."""


class RowError(ValueError):
    """A well-formed row that cannot be used: `reason` is a stable counter key, `detail` free text.

    Reasons here: empty prompt, empty answer, answer does not begin (or end) with the assistant,
    diverging histories, prompt contradicts the messages, not a transcript, not text,
    no ChatML markers, unknown role (which is named).
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Keep both; the message reads `reason: detail`."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One preference: what was asked, the answer that was preferred and the one that was not.

    `kind` says how it becomes tokens. "messages": three message lists for the chat template; an
    answer begins and ends with an assistant turn and may hold several. "text": three strings that
    are never templated. "chatml": three strings that hold their ChatML markers already.
    """

    kind: Literal["messages", "text", "chatml"]
    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str
    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] | None = None
    numbers: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Format:
    """What the columns of a row hold, and how it is converted.

    A shape reads "column: kind, column: kind", with the kinds of `_kind`; " | " separates shapes,
    any one of which will do. `also` names the columns that are read where a row has them.
    """

    shapes: str
    convert: Callable[[RawRow], Preference]
    also: tuple[str, ...] = (*SYSTEM_COLUMNS, "tools", "chat_template_kwargs")

    @cached_property
    def reads(self) -> set[str]:
        """The columns that the conversion looks at."""
        wishes = [part.split(": ") for part in re.split(r", | \| ", self.shapes)]
        return {name for name, kind in wishes if kind != "nothing"} | {*self.also}

    def matches(self, columns: Mapping[str, set[str]]) -> bool:
        """Whether the kinds of value found in each column are those of one of the shapes."""
        shapes = [
            [tuple(part.split(": ")) for part in s.split(", ")] for s in self.shapes.split(" | ")
        ]
        return any(
            all(columns.get(name, {"nothing"}) <= _kinds(wish) for name, wish in shape)
            for shape in shapes
        )


class _MisshapenError(ValueError):
    """A column is missing or of the wrong type; `to_preference` says where, and what to do."""


def recognise(rows: Sequence[RawRow], where: str) -> str:
    """Name the one format that all of the first rows have; `where` names the data set in errors."""
    columns: dict[str, set[str]] = {}
    for row in rows[:RECOGNISED_ROWS]:
        for name, value in row.items():
            columns.setdefault(name, set()).add(_kind(value))
    for kinds in columns.values():
        if len(kinds) > 1:
            kinds.discard("nothing")  # some rows leave the column out; the others show its kind
    matching = [name for name, known in FORMATS.items() if known.matches(columns)]
    if len(matching) == 1:
        return matching[0]
    found = "\n".join(f"  {name}: {' and '.join(sorted(kinds))}" for name, kinds in columns.items())
    known = "\n".join(f"  {name}: {f.shapes}" for name, f in FORMATS.items())
    problem = f"fit several formats ({', '.join(matching)})" if matching else "fit no known format"
    raise UserError(
        f"{where}: the first {min(len(rows), RECOGNISED_ROWS)} rows {problem}.\n"
        f"Columns found:\n{found or '  none'}\nFormats known:\n{known}\n"
        "Set data.format to the one that is meant, or rename the columns."
    )


def to_preference(row: RawRow, format: str, *, where: str = "this row") -> Preference:
    """Convert one row of the named format; `where` (file and line) opens the message of an error.

    Raises RowError for a row to drop, UserError for a row that does not have the format's shape.
    """
    if format not in FORMATS:
        raise UserError(
            f"data.format is {format!r}. Set it to auto or one of: {', '.join(FORMATS)}."
        )
    try:
        preference = FORMATS[format].convert(row)
    except _MisshapenError as error:
        raise UserError(
            f"{where}: {error}. Columns found: {', '.join(row) or 'none'}. "
            f"Wanted, as data.format is {format}: {FORMATS[format].shapes}. "
            "Correct the row, or set data.format to the shape that the data has."
        ) from None
    for name in _unread(row, format):
        if name.lower() in _parts():
            raise UserError(
                f"{where}: {name!r} may be a part of the row, and the format {format} does not "
                "read it: it would be lost. Join it to a column that is read "
                f"({', '.join(sorted(FORMATS[format].reads))}), or, if it is none, name it in "
                "data.ignored_columns."
            )
    return replace(preference, numbers=_numbers(row))


def _numbers(row: RawRow) -> dict[str, float]:
    """What a row has of NUMBERS; a margin that is not given is the log of the scores' difference.

    That is ODPO's (Amini et al. 2024, arXiv:2402.10571); equal scores, or the chosen answer's being
    the lower, have none.
    """
    found = {
        name: float(row[column])
        for name, columns in NUMBERS.items()
        for column in reversed(columns)
        if _is_number(row.get(column))
    }
    difference = found.get("chosen_scores", 0.0) - found.get("rejected_scores", math.inf)
    if "margins" not in found and difference > 0:
        found["margins"] = math.log(difference)
    return found


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # an integer may be larger than any float


def unread_columns(row: RawRow, format: str) -> list[str]:
    """The columns of a row that say something and are left out, ids, scores and sources apart."""
    numbers = {name for names in NUMBERS.values() for name in names if _is_number(row.get(name))}
    unread = [name for name in _unread(row, format) if name not in numbers]
    return [name for name in unread if not _HARMLESS.search(name)]


def _unread(row: RawRow, format: str) -> list[str]:
    reads = FORMATS[format].reads
    return [name for name in row if name not in reads and not _is_nothing(row[name])]


@cache
def _parts() -> set[str]:
    return _PARTS.union(*(known.reads for known in FORMATS.values()))


def _kinds(wish: str) -> set[str]:
    """The kinds of value that satisfy what a shape asks of a column."""
    some_text = {
        "text": {"text", "text with <|im_start|>", "transcript"},
        "text without <|im_start|>": {"text", "transcript"},
    }
    return {kind for part in wish.split(" or ") for kind in some_text.get(part, {part})}


def _kind(value: object) -> str:
    if _is_nothing(value):
        return "nothing"
    value = _from_json(value)
    if isinstance(value, str):
        if IM_START in value:
            return "text with <|im_start|>"
        return "transcript" if value.lstrip().startswith("Human:") else "text"
    first = value[0] if _is_list(value) else value
    if _is_object(first) and "role" in first and _is_list(value):
        return "message list"
    if _is_object(first) and {"from", "value"} <= first.keys():
        return "from/value turns"
    if _is_object(value) and "messages" in value:
        return "object with messages"
    return type(value).__name__


def _from_json(value: Any) -> Any:
    """Messages that a file holds as JSON text, or the value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") and _MESSAGES.search(value):
        with suppress(ValueError):
            return json.loads(value)
    return value


_MESSAGES = re.compile(r'"(role|from|messages)"\s*:')


def _from_orca(row: RawRow) -> Preference:
    """Intel/orca_dpo_pairs; its raw files name the answers after the models that wrote them."""
    if not (question := _text(row, "question")).strip():
        raise RowError("empty prompt", "'question' is empty")
    chosen = _answer_text(row, "chosen", "chatgpt")
    rejected = _answer_text(row, "rejected", "llama2-13b-chat")
    answers = ([_message("assistant", text)] for text in (chosen, rejected))
    return _preference(row, [_message("user", question)], *answers)


def _from_text(row: RawRow) -> Preference:
    """Plain strings, for continuation rather than chat; white space included."""
    if not (prompt := _text(row, "prompt")).strip():
        raise RowError("empty prompt", "'prompt' is empty")
    chosen, rejected = _answer_text(row, "chosen"), _answer_text(row, "rejected")
    return Preference(kind="text", prompt=prompt, chosen=chosen, rejected=rejected)


def _from_chatml(row: RawRow) -> Preference:
    """Strings that hold their ChatML markers already, as in mlabonne/chatml_dpo_pairs."""
    ready = _from_text(row)
    if IM_START not in ready.prompt:
        raise RowError("no ChatML markers", f"'prompt' does not hold {IM_START}")
    return replace(ready, kind="chatml")


def _from_hh_rlhf(row: RawRow) -> Preference:
    """Anthropic/hh-rlhf: two transcripts of whole conversations, see `_transcript`."""
    chosen, rejected = (
        _answer(_transcript(_answer_text(row, name), name), name) for name in ("chosen", "rejected")
    )
    return _preference(row, *_split(chosen, rejected))


def _from_ultrafeedback(row: RawRow) -> Preference:
    """`prompt` is text; the answers are whole conversations or the assistant's turns alone."""
    question = _text(row, "prompt")
    sides = [_answer(_messages(row, name), name) for name in ("chosen", "rejected")]
    for side in sides:
        first = next(i for i, turn in enumerate(side) if turn["role"] not in SYSTEM_ROLES)
        if side[first]["role"] == "assistant" and question.strip():
            side.insert(first, _message("user", question))
    prompt, chosen, rejected = _split(*sides)
    asked = [turn["content"].strip() for turn in prompt if turn["role"] == "user"]
    if question.strip() and question.strip() not in asked:
        raise RowError("prompt contradicts the messages", "'prompt' is no user turn of the lists")
    return _preference(row, prompt, chosen, rejected)


def _from_conversational(row: RawRow) -> Preference:
    """Message lists; the prompt is explicit, or the turns that both answers open with.

    Answers alone may have it in `messages`; beside whole conversations that column repeats one.
    """
    prompt = _messages(row, "prompt") if row.get("prompt") else []
    chosen, rejected = (_answer(_messages(row, name), name) for name in ("chosen", "rejected"))
    if not prompt and {chosen[0]["role"], rejected[0]["role"]} == {"assistant"}:
        prompt = _messages(row, "messages") if row.get("messages") else []
    first = len(prompt)
    if not prompt:
        prompt, chosen, rejected = _split(chosen, rejected)
    elif chosen[:first] == prompt == rejected[:first] and chosen[first:] and rejected[first:]:
        chosen, rejected = chosen[first:], rejected[first:]  # some files give the prompt twice
    return _preference(row, prompt, chosen, rejected)


def _from_openai(row: RawRow) -> Preference:
    """OpenAI's preference files: `input` holds the messages and tools, two columns the answers."""
    asked = _from_json(_column(row, "input"))
    if not _is_object(asked):
        raise _MisshapenError(f"'input' holds {type(asked).__name__}, wanted an object")
    sides = ("preferred_output", "non_preferred_output")
    chosen, rejected = (_answer(_messages(row, name), name) for name in sides)
    return _preference(asked, _messages(asked, "messages"), chosen, rejected)


def _from_sharegpt(row: RawRow) -> Preference:
    """`conversations` are from/value turns, and each answer is one such turn."""
    prompt, *answers = (
        _messages(row, name, keys=("from", "value"))
        for name in ("conversations", "chosen", "rejected")
    )
    return _preference(row, prompt, *map(_answer, answers, ("chosen", "rejected")))


def _answer(messages: list[Message], name: str) -> list[Message]:
    if not messages:
        raise RowError("empty answer", f"{name!r} holds no message")
    last = messages[-1]
    if last["role"] != "assistant":
        why = f"{name!r} ends with {last['role']}"
        raise RowError("answer does not end with the assistant", why)
    if not last["content"].strip() and "tool_calls" not in last:
        raise RowError("empty answer", f"the last message of {name!r} is empty")
    return messages


def _split(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Take the longest run of equal leading messages as the prompt; an answer keeps at least one.

    Whole messages only: cut at a character, two answers that both begin with "I" would lose it.
    """
    shortest = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if {chosen[cut]["role"], rejected[cut]["role"]} != {"assistant"}:
        raise RowError("diverging histories", f"message {cut + 1} differs before the answer begins")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _preference(
    row: RawRow, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> Preference:
    """Check the parts, and add the row's system column and `tools`, if it has them."""
    systems = [_text(row, name) for name in SYSTEM_COLUMNS if row.get(name)]
    if len({*systems}) > 1:
        raise _MisshapenError(f"two of {', '.join(SYSTEM_COLUMNS)} hold different texts")
    system = systems[0] if systems else ""
    if system.strip() and not (prompt and prompt[0]["role"] in SYSTEM_ROLES):
        prompt = [_message("system", system), *prompt]
    asking = (*SYSTEM_ROLES, "user")
    if not any(turn["role"] in asking and turn["content"].strip() for turn in prompt):
        raise RowError("empty prompt", "no system or user message comes before the answers")
    for answer in (chosen, rejected):
        if (role := answer[0]["role"]) != "assistant":
            raise RowError("answer does not begin with the assistant", f"it begins with {role}")
    arguments = row.get("chat_template_kwargs") or None
    if arguments is not None and not _is_object(arguments):
        raise _MisshapenError("'chat_template_kwargs' is not an object")
    return Preference(
        kind="messages",
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=_tools(row),
        template_arguments=arguments,
    )


def _column(row: RawRow, name: str) -> Any:
    if name not in row:
        raise _MisshapenError(f"{name!r} is missing")
    return row[name]


def _text(row: RawRow, name: str) -> str:
    """Null reads as empty text: `datasets` fills gaps with it."""
    value = _column(row, name)
    if value is not None and not isinstance(value, str):
        raise _MisshapenError(f"{name!r} holds {type(value).__name__}, wanted text")
    return value or ""


def _answer_text(row: RawRow, *names: str) -> str:
    """The text of the first of these columns that exists; later names are those of raw files."""
    name = next((name for name in names if name in row), names[0])
    if not (answer := _text(row, name)).strip():
        raise RowError("empty answer", f"{name!r} is empty")
    return answer


def _transcript(text: str, name: str) -> list[Message]:
    """Turns open with Human: or Assistant:, at the start or after an empty line."""
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text.strip())
    if before or not parts:
        raise RowError("not a transcript", f"{name!r} does not begin with Human: or Assistant:")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [_message({"Human": "user"}.get(who, "assistant"), said.strip()) for who, said in turns]


def _messages(
    row: RawRow, name: str, *, keys: tuple[str, str] = ("role", "content")
) -> list[Message]:
    """A list of message objects, or a single one; null reads as an empty list."""
    value = _from_json(_column(row, name))
    turns = [value] if _is_object(value) else value or []
    if not _is_list(turns):
        raise _MisshapenError(f"{name!r} holds {type(value).__name__}, wanted a list of messages")
    role_key, content_key = keys
    messages: list[Message] = []
    for turn in turns:
        if not _is_object(turn) or not isinstance(turn.get(role_key), str):
            raise _MisshapenError(f"{name!r} holds a message without {role_key!r}")
        if lost := next((key for key in turn if key in _PARTS and turn[key]), None):
            raise _MisshapenError(f"a message of {name!r} holds {lost!r}, which is not read")
        extra = {key: turn[key] for key in MESSAGE_KEYS if turn.get(key)}
        if not _are_calls(extra.get("tool_calls", [])):
            wanted = "wanted a list of objects, a function in each"
            raise _MisshapenError(f"a message of {name!r} holds misshapen 'tool_calls', {wanted}")
        if turn.get("reasoning"):
            extra.setdefault("reasoning_content", _content(turn["reasoning"], name))
        content = _content(turn.get(content_key), name)
        messages.append(_message(turn[role_key], content) | extra)
    return messages


def _are_calls(calls: object) -> bool:
    """Whether it is a list of calls: `{"function": {...}}`, or the function itself."""
    return _is_list(calls) and all(
        _is_object(call) and _is_object(call.get("function") or {}) for call in calls
    )


def _message(role: str, content: str) -> Message:
    role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        raise RowError(f"unknown role {role[:30]!r}", f"none of {', '.join(ROLES)}")
    return {"role": role, "content": content}


def _content(value: object, name: str) -> str:
    """Text, null (a turn that only calls tools), or OpenAI's list of parts, joined."""
    if value is None or isinstance(value, str):
        return value or ""
    if not _is_list(value):
        raise _MisshapenError(f"a message of {name!r} holds {type(value).__name__}, wanted text")
    texts = [part.get("text") for part in value if _is_object(part) and part.get("type") == "text"]
    if len(texts) < len(value) or not all(isinstance(text, str | None) for text in texts):
        raise RowError("not text", f"a message of {name!r} holds a part that is not text")
    return "".join(text or "" for text in texts)


def _tools(row: RawRow) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of objects, or that list as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise _MisshapenError(f"'tools' is not JSON ({error})") from None
    if not tools:
        return None
    if not _is_list(tools) or not all(_is_object(tool) for tool in tools):
        raise _MisshapenError("'tools' is not a list of objects")
    return tools


def _is_nothing(value: object) -> bool:
    return value is None or value in ("", [], {})


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


FORMATS: dict[str, Format] = {
    "orca_dpo_pairs": Format(
        "question: text, chosen: text, rejected: text, prompt: nothing | "
        "question: text, chatgpt: text, llama2-13b-chat: text, prompt: nothing",
        _from_orca,
    ),
    "chatml_dpo_pairs": Format(
        "prompt: text with <|im_start|>, chosen: text, rejected: text", _from_chatml, also=()
    ),
    "hh_rlhf": Format(
        "chosen: transcript, rejected: transcript, prompt: nothing, question: nothing",
        _from_hh_rlhf,
    ),
    "ultrafeedback": Format(
        "prompt: text, chosen: message list, rejected: message list",
        _from_ultrafeedback,
        also=(*Format.also, "messages"),  # which repeats the chosen conversation
    ),
    "conversational": Format(
        "prompt: message list or nothing, chosen: message list, rejected: message list",
        _from_conversational,
        also=(*Format.also, "messages"),
    ),
    "openai": Format(
        "input: object with messages, preferred_output: message list, "
        "non_preferred_output: message list",
        _from_openai,
    ),
    "sharegpt": Format(
        "conversations: from/value turns, chosen: from/value turns, rejected: from/value turns",
        _from_sharegpt,
    ),
    "text": Format(
        "prompt: text without <|im_start|>, chosen: text, rejected: text, "
        "question: nothing, system: nothing",
        _from_text,
        also=(),
    ),
}
