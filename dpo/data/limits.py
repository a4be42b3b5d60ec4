"""How long a pair may be, and what becomes of one that is longer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dpo.config import DataConfig
from dpo.data.audit import RowName
from dpo.data.formats import RowError
from dpo.data.stream import TokenizedPair
from dpo.errors import UserError

OVERLONG = "overlong"  # the reason of those drops that are asked for


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens, and what happens to a pair beyond them."""

    max_prompt_length: int
    max_length: int
    on_overlong: Literal["truncate", "drop", "error"]
    truncation: Literal["frame", "left"] = "frame"

    @staticmethod
    def of(data: DataConfig) -> "Limits":
        """The limits that a configuration sets."""
        return Limits(data.max_prompt_length, data.max_length, data.on_overlong, data.truncation)

    def fit(
        self, pair: TokenizedPair, row: RowName, find_content: Callable[[], range]
    ) -> tuple[TokenizedPair, list[str]]:
        """Cuts the prompt as `truncation` says and the answers from the right; says what it cut.

        A cut answer gets no turn end: it is scored as a prefix. `find_content` says which tokens of
        the prompt may go while its frame stays. Where they are too few, the prompt's first ones go.

        Raises:
            RowError: too long under on_overlong=drop, or the same answer twice.
            UserError: too long under on_overlong=error.
        """
        excess = max(len(pair.prompt_ids) - self.max_prompt_length, 0)
        room = self.max_length - len(pair.prompt_ids) + excess
        too_long = {
            "prompt": excess > 0,
            "chosen": len(pair.chosen_ids) > room,
            "rejected": len(pair.rejected_ids) > room,
        }
        cut = [part for part, is_cut in too_long.items() if is_cut]
        if cut and self.on_overlong == "drop":
            raise RowError(OVERLONG, ", ".join(cut))
        if cut and self.on_overlong == "error":
            raise UserError(
                f"row {row}: too long ({', '.join(cut)}): got {len(pair.prompt_ids)} prompt, "
                f"{len(pair.chosen_ids)} chosen and {len(pair.rejected_ids)} rejected tokens, "
                f"wanted at most {self.max_prompt_length} of prompt and {self.max_length} in all. "
                "Raise data.max_length, or set data.on_overlong to truncate or drop."
            )
        first = 0
        if excess and self.truncation == "frame":
            content = find_content()
            keeps_frame = excess < len(content)  # and one token of the content at least
            first = content.start if keeps_frame else 0
            cut[0] = "prompt in its frame" if keeps_frame else "prompt from the left"
        prompt = [*pair.prompt_ids[:first], *pair.prompt_ids[first + excess :]]
        chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
        if chosen == rejected:
            were_equal = pair.chosen_ids == pair.rejected_ids
            raise RowError("identical answers" if were_equal else "identical once cut", "")
        chosen_scored = pair.chosen_scored and pair.chosen_scored[:room]
        rejected_scored = pair.rejected_scored and pair.rejected_scored[:room]
        marks = (chosen_scored, rejected_scored)
        return TokenizedPair(prompt, chosen, rejected, *marks, pair.numbers), cut
