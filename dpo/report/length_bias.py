"""Whether the rewards follow the length of an answer, judged by the held-out pairs."""

import numpy as np

from dpo.evaluate.diagnostics import Finding
from dpo.report.curves import pair_rewards
from dpo.report.logs import RunLogs

_ENOUGH = 20  # pairs; with fewer, nothing is said about length
_CORRELATION = 0.3  # of margin and length difference; more is a finding
_ACCURACY_GAP = 0.2  # between pairs whose chosen answer is longer and shorter; more is one


def length_rows(logs: RunLogs) -> list[tuple[str, str, int, float]]:
    """(group, key, pairs, reward accuracy) by which answer of the pair has more tokens."""
    if not logs.held_out or logs.beta is None or not logs.held_out[-1]["row"]:
        return []
    margins, longer = _margins_and_longer(logs, logs.beta)
    groups = (("longer", longer > 0), ("shorter", longer < 0), ("as long", longer == 0))
    return [
        (f"chosen is {name}", name, int(chosen.sum()), float((margins[chosen] > 0).mean()))
        for name, chosen in groups
        if chosen.any()
    ]


def length_bias(logs: RunLogs) -> list[Finding]:
    """A finding if the rewards follow length, by correlation or by a gap in accuracy."""
    groups = {key: (pairs, accuracy) for _, key, pairs, accuracy in length_rows(logs)}
    differing = sum(pairs for key, (pairs, _) in groups.items() if key != "as long")
    if differing < _ENOUGH or logs.beta is None:
        return []
    margins, longer = _margins_and_longer(logs, logs.beta)
    seen = []
    if longer.std() > 0 and margins.std() > 0:
        correlation = float(np.corrcoef(margins, longer)[0, 1])
        if abs(correlation) > _CORRELATION:
            seen.append(
                f"The reward margin goes with how much longer the chosen answer is: correlation "
                f"{correlation:.2f}."
            )
    (many, on_longer), (few, on_shorter) = (
        groups.get(key, (0, 0.0)) for key in ("longer", "shorter")
    )
    if min(many, few) >= _ENOUGH and abs(on_longer - on_shorter) > _ACCURACY_GAP:
        seen.append(
            f"Reward accuracy is {on_longer:.1%} on pairs whose chosen answer is longer, "
            f"{on_shorter:.1%} where it is shorter."
        )
    if not seen:
        return []
    return [
        Finding(
            "length_bias",
            int(logs.held_out[-1]["step"]),
            " ".join(seen),
            "Part of what was learned is the length of the answer, not what it says.",
            "Balance the lengths in the data, or take a loss that divides by length (ipo uses "
            "means per token); judge with length-controlled figures.",
        )
    ]


def _margins_and_longer(logs: RunLogs, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Reward margins, and by how many tokens the chosen answer is longer, (pairs,) each."""
    line = logs.held_out[-1]
    rewards = pair_rewards(line, beta)
    longer = np.subtract(line["chosen_lengths"], line["rejected_lengths"])
    return rewards["chosen"] - rewards["rejected"], longer
