"""Characters that a reader does not see, or that change how others are seen.

They are trained on as they are. An audit counts the rows that hold some; where a person reads a
text, on a terminal or in a report, they stand as escapes: a row or a model can then neither move a
terminal's cursor nor show one text and mean another (Boucher and Anderson 2021, arXiv:2111.00169).
"""

import re
from collections.abc import Iterator

KINDS = {
    "characters that turn the writing direction": "\u202a-\u202e\u2066-\u2069",
    "invisible characters": "\u200b\u2060-\u2064\ufeff\U000e0000-\U000e007f",
    "control characters": "\0-\x08\x0b-\x1f\x7f-\x9f",
    "private-use characters": "\ue000-\uf8ff\U000f0000-\U0010ffff",
    "half a surrogate pair": "\ud800-\udfff",
}
_OF_KIND = {kind: re.compile(f"[{characters}]") for kind, characters in KINDS.items()}
_ANY = re.compile(f"[{''.join(KINDS.values())}]")
_LAYOUT = str.maketrans("", "", "\n\t")


def kinds_in(value: object) -> set[str]:
    """The kinds of hidden characters in all texts of a nested value; a line may end in CR LF."""
    return {
        kind
        for text in _texts(value)
        if not text.translate(_LAYOUT).isprintable()  # ten times faster: no kind is printable
        for kind, pattern in _OF_KIND.items()
        if pattern.search(text.replace("\r\n", "\n"))
    }


def visible(text: str) -> str:
    r"""The text with every hidden character as its escape: \u202e, \x1b."""
    one_end = text.replace("\r\n", "\n")
    return _ANY.sub(lambda found: found[0].encode("unicode_escape").decode(), one_end)


def _texts(value: object) -> Iterator[str]:
    left = [value]  # no recursion: a stranger decides how deep it goes
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            left += value
