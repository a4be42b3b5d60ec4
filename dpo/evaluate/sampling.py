"""How an answer is drawn; a module of its own, so that `--help` does not wait for torch."""

from dataclasses import dataclass

from dpo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn; the defaults are the NeuralHermes article's.

    Raises:
        UserError: a value outside of its range.
    """

    temperature: float = 0.7
    """0 is greedy: always the likeliest token."""
    top_p: float = 0.9
    """Only the likeliest tokens that make up this much of the probability can be drawn."""
    max_new_tokens: int = 200
    """An answer that has not ended is cut there."""

    def __post_init__(self) -> None:
        for name, wanted, holds in (
            ("temperature", "0 (greedy) or a number above", 0 <= self.temperature < float("inf")),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("max_new_tokens", "1 or more", self.max_new_tokens >= 1),
        ):
            if not holds:
                raise UserError(f"--{name}: got {getattr(self, name)}, wanted {wanted}.")
