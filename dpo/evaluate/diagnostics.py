"""Warnings that follow from a run's metrics while there is still time to act.

Each comes once, and once more when what it saw has grown tenfold.

Loss, margin and reward accuracy are about the given answers only, and are best when a run has gone
too far. These warnings look at other metrics. docs/diagnostics.md shows each on a real run.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean, stdev

from dpo.run_folder import Line

LOOK_BACK = 10  # logged training steps that a finding averages, since one step has few pairs
DISPLACEMENT = 0.02  # nats a token that the chosen answers lost, on average
ERRORS = 2.0  # standard errors that such a mean must be away from 0
AGAIN = 10.0  # times the value at which a finding was said; then it is said again
SPIKE = 2.0  # times the recent mean loss, and SPIKE_ERRORS standard deviations above it
SPIKE_ERRORS = 10.0
COLLAPSE = 0.25  # fall of the reward accuracy from its best
KL_PER_TOKEN = 0.5  # nats of KL per generated token; the quickstart's good runs stay below 0.1
LENGTH_DRIFT = 0.2  # share by which the answers became longer or shorter
RANKING_GAP = 0.25  # reward accuracy minus ranking accuracy
RANKING_RISE = 0.05  # rise of ranking accuracy over two evaluations; with less it has stopped


@dataclass(frozen=True)
class Finding:
    """Something worth a warning.

    Attributes:
        key: its name in docs/diagnostics.md.
        step: where it was first seen.
        saw: what was seen, with its values.
        means, try_this: one sentence each.
        size: of what was seen, where it can grow.
    """

    key: str
    step: int
    saw: str
    means: str
    try_this: str
    size: float = 1.0

    def __str__(self) -> str:
        return (
            f"note: step {self.step}: {self.saw} {self.means} {self.try_this} "
            f"(docs/diagnostics.md, {self.key})"
        )


def diagnose(lines: Iterable[Line], beta: float | None) -> list[Finding]:
    """The findings of a whole run, from the lines of its metrics.jsonl; `beta` as for `Watch`."""
    watch = Watch(beta)
    return [finding for line in lines for finding in watch.see(line)]


class Watch:
    """Reads one line of metrics after the other; returns each finding when it is new.

    Args:
        beta: the run's, to convert rewards to nats; None for a run without a reference, where a
            reward is not a change of a log-prob.
    """

    def __init__(self, beta: float | None) -> None:
        self._beta = beta
        self._recent: deque[Line] = deque(maxlen=LOOK_BACK)
        self._before: Line = {}
        self._rankings: deque[float] = deque(maxlen=3)
        self._best_accuracy = 0.0  # of the training pairs, over LOOK_BACK logged steps
        self._found: dict[str, float] = {}

    def see(self, line: Line) -> list[Finding]:
        """The new findings in a line of training or of an evaluation."""
        found: list[Finding] = []
        if "eval/loss" in line:
            self._rankings.append(line["eval/ranking_accuracy"])
            if line["step"] == 0:
                self._before = line
            elif self._before:
                found += self._evaluation(line)
        elif "train/loss" in line:
            found += self._spike(line)
            self._recent.append(line)
            if len(self._recent) == LOOK_BACK:
                found += self._training(int(line["step"]))
        new = [f for f in found if f.size >= AGAIN * self._found.get(f.key, 0.0)]
        self._found |= {finding.key: finding.size for finding in new}
        return new

    def _spike(self, line: Line) -> Iterator[Finding]:
        losses = [recent["train/loss"] for recent in self._recent]
        loss = line["train/loss"]
        if len(losses) < LOOK_BACK:
            return
        usual = mean(losses)
        if loss > max(SPIKE * usual, usual + SPIKE_ERRORS * stdev(losses)):
            yield Finding(
                "spike",
                int(line["step"]),
                f"The training loss is {loss:.3g}; over the {LOOK_BACK} logged steps before it was "
                f"{usual:.3g}.",
                "A few pairs, or too large a step, have moved the policy far.",
                "Look at the rows of this step (train.seed and the step name them), or lower the "
                "learning rate.",
                size=loss,
            )

    def _training(self, step: int) -> Iterator[Finding]:
        loss, accuracy, length = (
            mean(line[f"train/{name}"] for line in self._recent)
            for name in ("loss", "rewards/accuracies", "lengths/chosen")
        )
        if accuracy >= 0.99 and loss < 0.05:
            yield Finding(
                "saturation",
                step,
                f"Over {LOOK_BACK} logged steps the training loss is {loss:.3f} and the reward "
                f"accuracy {accuracy:.1%}.",
                "The pairs hardly teach any more; what still moves the weights is a few of them.",
                "Stop here, lower the learning rate, or look for pairs that are harder to tell "
                "apart.",
            )
        if self._best_accuracy - accuracy > COLLAPSE:
            yield Finding(
                "collapse",
                step,
                f"Over {LOOK_BACK} logged steps the reward accuracy is {accuracy:.1%}; it was "
                f"{self._best_accuracy:.1%}.",
                "The policy has lost what it had learnt of the pairs.",
                "Take the weights of an earlier step (best/, a checkpoint), and lower the learning "
                "rate.",
            )
        self._best_accuracy = max(self._best_accuracy, accuracy)
        if not self._before and self._beta:
            falls = [-line["train/rewards/chosen"] / self._beta / length for line in self._recent]
            said = f"Over {LOOK_BACK} logged steps the chosen answers of the training pairs"
            yield from _displaced(step, said, mean(falls), stdev(falls) / LOOK_BACK**0.5)

    def _evaluation(self, line: Line) -> Iterator[Finding]:
        before, step = self._before, int(line["step"])
        fall = before["eval/logps/chosen"] - line["eval/logps/chosen"]
        fall = line.get("eval/displacement", fall / line["eval/lengths/chosen"])
        error = line.get("eval/displacement_error", 0.0)
        yield from _displaced(step, "The held-out chosen answers", fall, error)
        ranking, accuracy = line["eval/ranking_accuracy"], line["eval/rewards/accuracies"]
        has_stopped = (
            len(self._rankings) == 3 and self._rankings[-1] - self._rankings[0] < RANKING_RISE
        )
        if accuracy - ranking > RANKING_GAP and has_stopped:
            yield Finding(
                "ranking",
                step,
                f"Reward accuracy is {accuracy:.1%}, but the policy itself gives the chosen answer "
                f"the higher log-prob in only {ranking:.1%} of the pairs.",
                "It moved the right way from a reference that preferred the rejected answers, and "
                "would still rather write those.",
                "Train longer, lower beta, or first fine-tune on the chosen answers.",
            )
        if "eval/lengths/generated" not in line:
            return
        length, old_length = line["eval/lengths/generated"], before["eval/lengths/generated"]
        if line.get("eval/kl", 0) > KL_PER_TOKEN * length:
            yield Finding(
                "kl",
                step,
                f"The policy is {line['eval/kl']:.1f} nats of KL per answer away from the "
                f"reference, {line['eval/kl'] / length:.2f} a token.",
                "What it writes is no longer what the reference would write, and nothing in the "
                "loss looks at that.",
                "Read the samples; lower the learning rate, raise beta, or take the weights of an "
                "earlier step.",
            )
        if abs(length / old_length - 1) > LENGTH_DRIFT:
            yield Finding(
                "length_drift",
                step,
                f"Answers have {length:.1f} tokens on average; before training {old_length:.1f}.",
                "DPO learns the length of the chosen answers as readily as their content, and a "
                "collapsed policy rambles or stops at once.",
                "Compare the lengths of chosen and rejected answers in the data, and judge with "
                "length-controlled figures (dpo evaluate).",
            )


def _displaced(step: int, what: str, fall: float, error: float) -> Iterator[Finding]:
    """The finding that the chosen answers lost `fall` nats a token, give or take `error`."""
    if fall > max(DISPLACEMENT, ERRORS * error):
        yield Finding(
            "displacement",
            step,
            f"{what} have lost {fall:.3f} nats of log-prob a token since the start (standard error "
            f"{error:.3f}).",
            "DPO only widens the gap to the rejected ones, so this is common, and harmless while "
            "small; the probability went to answers that are in no pair.",
            "Compare with eval/kl and the samples; if they are bad, lower the learning rate or "
            "raise beta.",
            size=fall,
        )
