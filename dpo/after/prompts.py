"""Prompts for dpo generate: from the command line, a file, or standard input.

A line of text is a user's message. A row holds `prompt` or `messages`; or it is a preference row of
any format that training reads, whose prompt is taken.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.data.formats import SYSTEM_ROLES, Message, RowError, recognise, to_preference
from dpo.data.sources import SUFFIXES, open_source
from dpo.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """What is asked, and where it was read, for error messages."""

    said: list[Message] | str
    """Messages for the chat template; text is continued as it stands (ready-made ChatML too)."""
    where: str
    tools: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The last message, for a person to read."""
        return self.said if isinstance(self.said, str) else self.said[-1]["content"]

    @property
    def columns(self) -> dict[str, Any]:
        """The prompt as a row: `prompt` for text or a single user message, else `messages`."""
        if isinstance(self.said, str) or self.said == [{"role": "user", "content": self.text}]:
            said: dict[str, Any] = {"prompt": self.text}
        else:
            said = {"messages": self.said}
        return said | ({"tools": self.tools} if self.tools else {})


def read_prompts(said: Sequence[str], file: str | None, system: str = "") -> list[Prompt]:
    """Reads prompts from the command line, a file, or standard input (`-`, or a pipe).

    `system` goes before every prompt that has no system message of its own.

    Raises:
        UserError: no prompt, two sources, or a row that is no prompt (named by file and line).
    """
    if said and file:
        raise UserError(
            f"prompts: got {said[0]!r} and --prompts {file}, wanted one source. Leave one out."
        )
    if not said and not file and sys.stdin.isatty():
        raise UserError(
            "prompts: got none. Give them after the run folder, in quotes; or --prompts FILE "
            "(.txt: one a line; .jsonl: prompt or messages); or --prompts - and pipe them in; or "
            "--chat for a conversation."
        )
    if said:
        prompts = [_ask(text, f"prompt {n}") for n, text in enumerate(said, start=1)]
    elif file and file.lower().endswith(SUFFIXES):
        rows = open_source(file)
        prompts = [_from_row(row, rows.where(number)) for number, row in rows]
    else:
        prompts = list(_from_lines(file or "-"))
    if not prompts:
        raise UserError(f"prompts: {file or 'standard input'} holds none. Put one on each line.")
    return [_with_system(prompt, system) for prompt in prompts]


def _ask(text: str, where: str) -> Prompt:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not UTF-8. Check the terminal's encoding.") from None
    if not text.strip():
        raise UserError(f"{where}: empty. Leave it out, or ask something.")
    return Prompt([{"role": "user", "content": text}], where)


def _from_lines(file: str) -> Iterator[Prompt]:
    """One prompt for each line; empty lines are skipped."""
    name = "standard input" if file == "-" else file
    if file != "-" and not file.lower().endswith(".txt"):
        kinds = ", ".join((".txt", *SUFFIXES))
        raise UserError(f"--prompts: got {file}, wanted one of {kinds}, or - for standard input.")
    try:
        lines = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).splitlines()
    except OSError as error:
        raise UserError(f"--prompts: {file} cannot be read ({error.strerror}).") from None
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8. Save it as UTF-8.") from None
        if text:
            yield _ask(text, where)


def _from_row(row: dict[str, Any], where: str) -> Prompt:
    """A preference row of a known format; or `prompt` or `messages` alone, read as one."""
    try:
        if "chosen" not in row and ("messages" in row or "prompt" in row):
            asked = row.get("messages", row.get("prompt"))
            asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            stand_in = {"role": "assistant", "content": "-"}
            row = {**row, "prompt": asked, "chosen": stand_in, "rejected": stand_in}
            preference = to_preference(row, "conversational")
        else:
            preference = to_preference(row, recognise([row], where))
    except RowError as error:
        raise UserError(f"{where}: {error}. Correct the row, or leave it out.") from None
    except UserError:
        raise UserError(
            f"{where}: got the columns {', '.join(row)}; wanted prompt (text) or messages (a list "
            "of role and content), or a preference row as for training. Correct the row."
        ) from None
    said = preference.prompt
    if not isinstance(said, str) and said[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message is the assistant's. End with what is asked.")
    return Prompt(said, where, preference.tools)


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if not system:
        return prompt
    if isinstance(prompt.said, str):
        raise UserError(
            f"--system: {prompt.where} is text that is continued as it stands, without messages. "
            "Leave --system out."
        )
    if prompt.said[0]["role"] in SYSTEM_ROLES:
        return prompt
    return Prompt([*system_messages(system), *prompt.said], prompt.where, prompt.tools)


def system_messages(system: str) -> list[Message]:
    """The start of a conversation: the system message, if there is one."""
    return [{"role": "system", "content": system}] if system else []
