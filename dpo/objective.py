"""What a run minimises: a loss of `LOSSES`, a function of one's own, or a weighted sum of some."""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from dpo.errors import UserError
from dpo.imported import imported
from dpo.losses import LOSSES, WITHOUT_REFERENCE, Divergence, PairLogps

Loss = Callable[..., Float[Tensor, " pairs"]]
Objective = Callable[[PairLogps], Float[Tensor, " pairs"]]

# They need a reference to be held by: against one of 0, a log-prob is no log-ratio.
HELD_BY_REFERENCE = frozenset("nca_pair sppo_hard apo_zero apo_down cal_dpo chipo".split())
_DIVERGENCES = get_args(Divergence)
_ABOVE_0 = ("a number above 0", lambda x: x > 0)
_NOT_NEGATIVE = ("0 or more", lambda x: x >= 0)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "beta": _ABOVE_0,
    "label_smoothing": ("at least 0 and below 0.5", lambda x: 0 <= x < 0.5),
    "divergence": (
        f"{', '.join(_DIVERGENCES[:-1])} or {_DIVERGENCES[-1]}",
        lambda x: x in _DIVERGENCES,
    ),
    "divergence_alpha": ("above 0 and below 1", lambda x: 0 < x < 1),
    "temperature": _ABOVE_0,
    "gamma": _NOT_NEGATIVE,
    "gamma_over_beta": _NOT_NEGATIVE,
    "alpha": _NOT_NEGATIVE,
    "penalty": _NOT_NEGATIVE,
    "shift": ("above 0, up to 1", lambda x: 0 < x <= 1),
    "reward_bound": _ABOVE_0,
    "weight": _NOT_NEGATIVE,
    "sft_weight": _NOT_NEGATIVE,
    "margin": _NOT_NEGATIVE,
    "per": ("token or answer", lambda x: x in ("token", "answer")),
}


class Part(NamedTuple):
    """One loss of a sum: its name, its weight, and its keyword arguments."""

    name: str
    weight: float
    arguments: dict[str, Any]


def is_own(name: str) -> bool:
    """Whether a loss is MODULE:FUNCTION, whose arguments are known when it is imported."""
    return bool(re.fullmatch(r"[\w.]+:\w+", name))


def find_loss(name: str) -> Loss:
    """The function of that name.

    Raises:
        UserError: there is none.
    """
    if is_own(name):
        return imported(name, "loss.type")
    if name not in LOSSES:
        raise UserError(
            f"loss.type: got {name!r}, wanted one of {', '.join(LOSSES)}; or MODULE:FUNCTION. "
            "Change it in the config or by --loss.type."
        )
    return LOSSES[name]


def takes_smoothing(name: str, label_smoothing: float) -> bool:
    """Whether to pass it on; one's own function gets it if it is set."""
    return "label_smoothing" in accepted(LOSSES[name]) if name in LOSSES else label_smoothing > 0


def accepted(loss: Loss) -> dict[str, inspect.Parameter]:
    """The keywords that a loss takes, by name."""
    _, *keywords = inspect.signature(loss).parameters.values()
    return {keyword.name: keyword for keyword in keywords}


def check_part(part: Part, reference_mode: str) -> None:
    """Refuses what a loss cannot honour.

    Raises:
        UserError: an option that it does not have or a value out of its range, an input that a run
            does not have, or no reference where it needs one.
    """
    where, takes = f"loss.options of {part.name}", accepted(find_loss(part.name))
    options = sorted(takes.keys() - {"beta"})
    takes_all = any(keyword.kind == keyword.VAR_KEYWORD for keyword in takes.values())
    for name, value in part.arguments.items():
        if name not in takes and not takes_all:
            wanted = f"one of {', '.join(options)}" if options else "none"
            raise UserError(f"{where}: got {name}, wanted {wanted}. Leave it out.")
        if part.name in LOSSES:
            wanted, holds = _RANGES[name]
            if not (_is_like(value, takes[name].default) and holds(value)):
                raise UserError(f"{where}: got {name} {value!r}, wanted {wanted}. Change it.")
    needed = [p.name for p in takes.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    if missing := [name for name in needed if name not in part.arguments]:
        raise UserError(
            f"loss.type: {part.name} needs {', '.join(missing)}, which a run does not have. Give "
            "it in loss.options, or a default in the function."
        )
    is_bent = part.arguments.get("divergence", "reverse_kl") != "reverse_kl"
    if (is_bent or part.name in HELD_BY_REFERENCE) and reference_mode == "zero":
        raise UserError(
            f"reference.mode: got zero, wanted another, since {part.name} is held by its reference"
            ". Change it in the config or by --reference.mode."
        )
    if part.name in ("robust", "exo_pair") and part.arguments.get("label_smoothing", 1) == 0:
        raise UserError(
            f"loss.label_smoothing: got 0.0, wanted above 0 and below 0.5: {part.name} is about "
            "labels that are wrong (published: robust 0.1, exo_pair 0.001). Change it in the "
            "config or by --loss.label_smoothing."
        )


def needs_reference(parts: Sequence[Part]) -> bool:
    """Whether any of them reads the reference's log-probs."""
    return any(part.name not in WITHOUT_REFERENCE for part in parts)


def checked_objective(parts: Sequence[Part], reference_mode: str) -> Objective:
    """The weighted sum of the losses, as a function of pairs alone.

    Raises:
        UserError: see `check_part`.
    """
    for part in parts:
        check_part(part, reference_mode)
    losses = [(part.weight, find_loss(part.name), part.arguments) for part in parts]

    def total(logps: PairLogps) -> Any:  # what one's own function gives is looked at by the start
        first, *rest = (
            loss(logps, **arguments) if weight == 1 else weight * loss(logps, **arguments)
            for weight, loss, arguments in losses
        )
        for one in rest:
            first = first + one
        return first

    return total


def _is_like(value: object, default: object) -> bool:
    """Whether a value has the type of a default; an integer is a number, too."""
    if isinstance(default, float) or default is inspect.Parameter.empty:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value)
    return isinstance(value, type(default))
