"""Draws images/losses.png: every loss, and its slope, over the gap between two answers.

python docs/losses_picture.py

The chosen answer's log-ratio is half the gap, the rejected one's minus half; both answers have one
token, and beta is 1. A loss without a reference sees log-probs of -4 plus and minus half the gap.
What else a loss reads is in INPUTS. A loss of the whole step sees steps of one pair.
"""

from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

from dpo.losses import LOSSES, WITHOUT_REFERENCE, PairLogps
from dpo.objective import TAILS, Part, asked_of

OPTIONS = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.01}}
OPTIONS |= {"focal": {"gamma": 1.0}, "dpop": {"penalty": 2.0}, "chipo": {"reward_bound": 3.0}}
INPUTS = {"margins": 1.0, "chosen_scores": 2.0, "rejected_scores": 0.0, "on_policy_weights": 0.5}
INPUTS |= {"dispersions": 0.3, "chosen_kls": 0.5, "rejected_kls": 1.5}
INPUTS |= dict.fromkeys(TAILS, 0.0)
REMEMBERED = {"delta": 1.0, "gap_mean": 0.0, "gap_deviation": 2.0}
COLUMNS = 7


def curve(name: str) -> tuple[list[float], list[float], list[float]]:
    """Gaps, losses, and the losses' slope over the gap."""
    is_alone = name in WITHOUT_REFERENCE
    gaps = torch.linspace(-7.9, 7.9, 200) if is_alone else torch.linspace(-8, 8, 200)
    gaps.requires_grad_()
    base = torch.full_like(gaps, -4.0)
    one = torch.ones_like(gaps)
    logps = PairLogps(base + gaps / 2, base - gaps / 2, base, base, one, one)
    asked = asked_of(Part(name, 1.0, {"beta": 1.0}))
    given = {key: REMEMBERED.get(key, one[:1] * INPUTS.get(key, 0.0)) for key in asked}
    steps = zip(*(vector.split(1) for vector in vars(logps).values()), strict=True)
    options = {**OPTIONS.get(name, {}), **given}
    losses = torch.cat([LOSSES[name](PairLogps(*one), beta=1.0, **options) for one in steps])
    (slopes,) = torch.autograd.grad(losses.sum(), gaps)
    return gaps.tolist(), losses.tolist(), slopes.tolist()


def main() -> None:
    """Draws all panels into one picture."""
    rows = -(-len(LOSSES) // COLUMNS)
    figure, panels = plt.subplots(rows, COLUMNS, figsize=(14, 2.0 * rows), sharex=True)
    for panel, name in zip(panels.flat, LOSSES, strict=False):
        gaps, losses, slopes = curve(name)
        panel.axhline(0, color="#bbbbbb", linewidth=0.8)
        panel.plot(gaps, losses, color="#1f4e79", linewidth=1.6)
        panel.plot(gaps, slopes, color="#c55a11", linewidth=1.2, linestyle="--")
        panel.set_title(name + (" (no reference)" if name in WITHOUT_REFERENCE else ""), fontsize=9)
        panel.set_ylim(max(-4, min(losses + slopes) - 0.3), min(6, max(losses) + 0.3))
        panel.tick_params(labelsize=7)
    for panel in panels.flat[len(LOSSES) :]:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images" / "losses.png", dpi=90)


if __name__ == "__main__":
    main()
