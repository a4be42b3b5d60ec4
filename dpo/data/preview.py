"""The first rows as messages and as tokens, marked by what is scored: look before you train."""

import json
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from dpo.config import Config
from dpo.data.audit import Audit
from dpo.data.formats import Message, Preference
from dpo.data.loader import first_pairs, list_sources, open_rows
from dpo.data.stream import TokenizedPair
from dpo.hidden import visible

_DIM, _GREEN, _RED, _END = "\033[2m", "\033[32m", "\033[31m", "\033[0m"


def preview_rows(
    config: Config, tokenizer: PreTrainedTokenizerBase, count: int, *, colour: bool
) -> Iterator[str]:
    """The first `count` rows of the first source as training would see them, then the audit."""
    data, audit = config.data, Audit()
    rows, format = open_rows(list_sources(data)[0], data, data.subset, data.revision)
    yield f"{rows.name}: format {format}"
    for row, preference, pair in first_pairs(rows, format, data, tokenizer, count, audit):
        yield preview(row, preference, pair, tokenizer, colour=colour)
    yield audit.summary()


def preview(
    row: object,
    preference: Preference,
    pair: TokenizedPair,
    tokenizer: PreTrainedTokenizerBase,
    *,
    colour: bool,
) -> str:
    """One row for a person: messages, tokens of prompt and answers, and counts.

    With `colour`, scored tokens are green (chosen) or red (rejected) and the others dim; without,
    tokens are divided by `|` and those that are not scored stand in round brackets.
    """
    lines = [f"=== row {row} ({preference.kind})"]
    for name in ("prompt", "chosen", "rejected"):
        lines += [f"--- {name}", *_messages(getattr(preference, name))]
    answers = (
        ("chosen", pair.chosen_ids, pair.chosen_scored, _GREEN),
        ("rejected", pair.rejected_ids, pair.rejected_scored, _RED),
    )
    prompt = [False] * len(pair.prompt_ids)
    lines += [
        f"--- prompt: {len(prompt)} tokens, none scored",
        _tokens(tokenizer, pair.prompt_ids, prompt, _GREEN if colour else ""),
    ]
    for name, ids, scored, paint in answers:
        marks = [True] * len(ids) if scored is None else list(scored)
        lines += [
            f"--- {name}: {len(ids)} tokens, {sum(marks)} scored",
            _tokens(tokenizer, ids, marks, paint if colour else ""),
        ]
    lines.append(
        f"--- {pair.num_stream_tokens} tokens computed; the answers share their first "
        f"{pair.num_shared_answer_tokens}"
    )
    return "\n".join(lines)


def _messages(said: list[Message] | str) -> list[str]:
    if isinstance(said, str):
        return [visible(said)]
    lines = []
    for message in said:
        lines.append(f"[{message['role']}] {visible(str(message['content']))}")
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        lines += [f"  {key}: {json.dumps(value)}" for key, value in others.items()]
    return lines


def _tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], scored: list[bool], paint: str
) -> str:
    texts = [visible(str(tokenizer.decode([token]))) for token in ids]
    if not paint:
        marked = [t if is_scored else f"({t})" for t, is_scored in zip(texts, scored, strict=True)]
        return "|".join(t.replace("\n", "\\n") for t in marked)
    painted = [
        f"{paint if is_scored else _DIM}{text.replace(chr(10), '⏎' + chr(10))}{_END}"
        for text, is_scored in zip(texts, scored, strict=True)
    ]
    return "".join(painted)
