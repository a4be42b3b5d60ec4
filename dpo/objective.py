"""What a run minimises: a loss of `LOSSES`, a function of one's own, or a weighted sum of some."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from dpo.errors import UserError
from dpo.imported import imported
from dpo.losses import (
    LOSSES,
    MEMORIES,
    STEP_WIDE,
    WITHOUT_REFERENCE,
    Divergence,
    PairLogps,
    shortened,
)

Loss = Callable[..., Float[Tensor, " pairs"]]
Inputs = Mapping[str, Tensor]
"""What losses read besides log-probs, (pairs,) each, by the keyword that asks for it."""

FROM_ROWS = frozenset("margins weights chosen_scores rejected_scores".split())
"""Inputs that a row of the data gives."""
TAILS = frozenset(
    f"{model}_{answer}_tail_logps"
    for model in ("policy", "ref")
    for answer in ("chosen", "rejected")
)
"""Inputs that are sums of log-probs beyond the length of the shorter answer."""
KLS = frozenset(["chosen_kls", "rejected_kls"])
"""Inputs that compare the predictions of both models at every scored position."""
FROM_TOKENS = TAILS | KLS | {"dispersions", "on_policy_weights"}
"""Inputs that are sums over the tokens of an answer."""
FROM_PREDICTIONS_OF_REFERENCE = KLS | {"dispersions"}
"""Inputs that need more of the reference than log-probs, which is all that its cache keeps."""

# They need a reference to be held by: against one of 0, a log-prob is no log-ratio.
HELD_BY_REFERENCE = frozenset(
    "nca_pair sppo_hard apo_zero apo_down cal_dpo chipo kto_pair bco_pair alpha_dpo mallows tdpo1 "
    "tdpo2".split()
)
# They read means over tokens or sums that a shortened log-prob is not the sum of.
_NOT_SHORTENED = frozenset(
    "ipo sigmoid_norm simpo alphapo alpha_dpo simper orpo cpo sft tdpo1 tdpo2 ld_dpo".split()
)
# A pair has no loss of its own: it takes part in a rank, or in one number for all.
_NOT_WEIGHTED = frozenset("aot aot_unpaired dr_dpo".split())
_WHY_NOT = {
    "pair_weights": "a pair has no loss of its own there, but a place among the others",
    "ld_alpha": "it divides by lengths, or reads other sums, and neither would be shortened",
}
# What they compare is mean log-probs of tokens; the other losses compare sums.
_PER_TOKEN = frozenset("simpo alphapo simper orpo sft".split())
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
    "eta": _ABOVE_0,
    "phi": _ABOVE_0,
    "ld_alpha": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "desirable_weight": _NOT_NEGATIVE,
    "undesirable_weight": _NOT_NEGATIVE,
    "robustness": _ABOVE_0,
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


def asked_of(part: Part) -> set[str]:
    """The keywords that the run gives to a loss, as they have no default and are not configured."""
    takes = accepted(find_loss(part.name)).values()
    needed = {p.name for p in takes if p.default is p.empty and p.kind != p.VAR_KEYWORD}
    return needed - part.arguments.keys()


def _remembered(name: str) -> Mapping[str, float]:
    return MEMORIES[name].start if name in MEMORIES else {}


def check_part(part: Part, reference_mode: str) -> None:
    """Refuses what a loss cannot honour.

    Raises:
        UserError: an option that it does not have or a value out of its range, an input that a run
            does not have, or no reference where it needs one.
    """
    where, takes = f"loss.options of {part.name}", accepted(find_loss(part.name))
    if part.name in LOSSES:  # what has no default is given by the run
        takes = {n: p for n, p in takes.items() if n == "beta" or p.default is not p.empty}
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
    if unknown := asked_of(part) - FROM_ROWS - FROM_TOKENS - _remembered(part.name).keys():
        raise UserError(
            f"loss.type: {part.name} needs {', '.join(sorted(unknown))}, which a run does not have."
            " Give it in loss.options, or a default in the function. A run has "
            f"{', '.join(sorted(FROM_ROWS | FROM_TOKENS))}."
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


def needs_live_reference(parts: Sequence[Part]) -> bool:
    """Whether any of them reads more of the reference than log-probs, which a cache keeps."""
    return any(asked_of(part) & FROM_PREDICTIONS_OF_REFERENCE for part in parts)


@dataclass
class Objective:
    """What a run minimises: from the log-probs of pairs, one loss a pair.

    Args:
        parts: the losses that are added.
        pair_weights: every pair's loss is multiplied by its row's weight.
        ld_alpha: tokens beyond the shorter answer's length count so many times; 1: as others.

    Attributes:
        memory: for each part, what it remembers of the steps before; `remember` moves it.
    """

    parts: Sequence[Part]
    pair_weights: bool = False
    ld_alpha: float = 1.0
    memory: list[dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.memory = [dict(_remembered(part.name)) for part in self.parts]
        self._losses = [find_loss(part.name) for part in self.parts]
        self._asked = [asked_of(part) for part in self.parts]

    @property
    def inputs(self) -> frozenset[str]:
        """What it reads besides log-probs."""
        asked = {name for names in self._asked for name in names} & (FROM_ROWS | FROM_TOKENS)
        weights = {"weights"} if self.pair_weights else set[str]()
        return frozenset(asked | weights | (TAILS if self.ld_alpha != 1 else set[str]()))

    @property
    def is_step_wide(self) -> bool:
        """Whether it must be called with all pairs of a step."""
        return any(part.name in STEP_WIDE for part in self.parts)

    def __call__(self, logps: PairLogps, inputs: Inputs | None = None) -> Any:
        """One loss a pair, (pairs,): what one's own function gives is looked at by the start."""
        inputs = inputs or {}
        if self.ld_alpha != 1:
            logps = shortened(logps, self.ld_alpha, **{name: inputs[name] for name in TAILS})
        total: Any = None
        for part, loss, asked, memory in zip(
            self.parts, self._losses, self._asked, self.memory, strict=True
        ):
            given = {name: memory[name] if name in memory else inputs[name] for name in asked}
            losses = loss(logps, **part.arguments, **given)
            losses = losses if part.weight == 1 else part.weight * losses
            total = losses if total is None else total + losses
        return inputs["weights"] * total if self.pair_weights else total

    def remember(self, logps: PairLogps) -> None:
        """Moves what losses remember by one step; `logps` has all of its pairs, of all ranks."""
        for part, memory in zip(self.parts, self.memory, strict=True):
            if memory:
                memory |= MEMORIES[part.name].moved(memory, logps, part.arguments["beta"])

    def load(self, memory: Sequence[Mapping[str, float]]) -> None:
        """Goes on with what was remembered.

        Raises:
            ValueError: it is not what these losses remember.
        """
        for mine, saved in zip(self.memory, memory, strict=True):
            numbers = {name: float(value) for name, value in saved.items()}
            if numbers.keys() != mine.keys() or not all(map(math.isfinite, numbers.values())):
                raise ValueError(f"memory of a loss: got {dict(saved)}, wanted {', '.join(mine)}")
            mine |= numbers


def checked_objective(
    parts: Sequence[Part],
    reference_mode: str,
    *,
    pair_weights: bool = False,
    ld_alpha: float = 1.0,
) -> Objective:
    """The weighted sum of the losses.

    Raises:
        UserError: see `check_part`; or losses that cannot be weighted, shortened, or together.
    """
    for part in parts:
        check_part(part, reference_mode)
        for key, is_on, refused in (
            ("pair_weights", pair_weights, _NOT_WEIGHTED),
            ("ld_alpha", ld_alpha != 1, _NOT_SHORTENED),
        ):
            if is_on and part.name in refused:
                raise UserError(
                    f"loss.{key}: got {pair_weights if key == 'pair_weights' else ld_alpha}, which "
                    f"has no meaning for {part.name}: {_WHY_NOT[key]}. Leave it out."
                )
    objective = Objective(parts, pair_weights, ld_alpha)
    of_predictions = [{"on_policy_weights"}, {"dispersions"}, KLS]
    asked = [", ".join(sorted(some)) for some in of_predictions if some & objective.inputs]
    if len(asked) > 1 and KLS & objective.inputs:
        raise UserError(
            f"loss.type: got losses that need {' and '.join(asked)} together, wanted one of these: "
            "each looks at all predictions in a way of its own. Take them into runs of their own."
        )
    return objective


def rewards_per_token(parts: Sequence[Part], reference_mode: str) -> bool:
    """Whether beta x the mean log-prob of a token is what the run's losses compare."""
    return reference_mode == "zero" and all(part.name in _PER_TOKEN for part in parts)


def _is_like(value: object, default: object) -> bool:
    """Whether a value has the type of a default; an integer is a number, too."""
    if isinstance(default, float) or default is inspect.Parameter.empty:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value)
    return isinstance(value, type(default))
