"""What sequences begin with in common; it needs no torch."""

from collections.abc import Sequence
from typing import Any

LEAST_SHARED = 16
"""Tokens that pairs must have in common to share them; two answers share whatever prompt."""


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items both begin with."""
    if b[: len(a)] == a:  # nearly always true, and the comparison runs in C
        return len(a)
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
