"""What every logged number means: `CATALOGUE`.

Tables, charts and TensorBoard choose names from it, and docs/metrics.md is tested against it. It
needs no torch, so that a report does not wait for it; `dpo.metrics` computes the numbers of pairs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "ranking_accuracy",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
)


@dataclass(frozen=True)
class Metric:
    """What a logged number means, and how it is shown.

    Attributes:
        label, unit: its name for people.
        meaning: one sentence.
        format: of a value in a table; one that ends in `%` is a share.
        better: chooses the better of two values; None if neither is better.
        group: title of the chart that it shares with other metrics.
        logged: the prefixes of its name in metrics.jsonl.
    """

    label: str
    meaning: str
    format: str = ".4g"
    unit: str = ""
    better: Callable[..., float] | None = None
    group: str = ""
    logged: tuple[str, ...] = ("train", "eval")

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def chart(self) -> str:
        """Title of the chart that shows it."""
        return self.group or self.title

    @property
    def is_share(self) -> bool:
        """Whether its values lie between 0 and 1."""
        return self.format.endswith("%")


_TRAIN, _EVAL = ("train",), ("eval",)
_REWARDS, _LOGPS = "Rewards", "Log-probs of the answers, nats"
_LENGTHS, _TIMES = "Lengths in the pairs, tokens", "Shares of the time"

CATALOGUE = {
    "loss": Metric(
        "Loss",
        "Mean over pairs; it starts where policy and reference agree.",
        ".4f",
        better=min,
    ),
    "rewards/chosen": Metric(
        "Reward of chosen",
        "Beta times the log-ratio of the chosen answer: its log-prob under the policy minus that "
        "under the reference.",
        ".3f",
        better=max,
        group=_REWARDS,
    ),
    "rewards/rejected": Metric(
        "Reward of rejected",
        "Beta times the log-ratio of the rejected answer; the two rewards should drift apart.",
        ".3f",
        group=_REWARDS,
    ),
    "rewards/margins": Metric(
        "Reward margin", "Reward of chosen minus reward of rejected.", ".3f", better=max
    ),
    "rewards/accuracies": Metric(
        "Reward accuracy",
        "Share of pairs whose chosen answer has the higher reward; 50% is chance, and where policy "
        "and reference agree all rewards tie, which counts as 0%.",
        ".1%",
        better=max,
    ),
    "ranking_accuracy": Metric(
        "Ranking accuracy",
        "Share of pairs whose chosen answer is the more probable one under the policy, without the "
        "reference.",
        ".1%",
        better=max,
    ),
    "logps/chosen": Metric(
        "Log-prob of chosen",
        "Log-prob of the chosen answer under the policy, summed over its tokens.",
        ".2f",
        "nats",
        better=max,
        group=_LOGPS,
    ),
    "logps/rejected": Metric(
        "Log-prob of rejected",
        "Log-prob of the rejected answer; both often fall, since DPO only asks that the gap grows.",
        ".2f",
        "nats",
        group=_LOGPS,
    ),
    "lengths/chosen": Metric(
        "Length of chosen", "Scored tokens of the chosen answer.", ".1f", "tokens", group=_LENGTHS
    ),
    "lengths/rejected": Metric(
        "Length of rejected",
        "Scored tokens of the rejected answer.",
        ".1f",
        "tokens",
        group=_LENGTHS,
    ),
    "grad_norm": Metric("Gradient norm", "Norm of the step's gradient, unclipped.", logged=_TRAIN),
    "learning_rate": Metric("Learning rate", "Learning rate of the step's update.", logged=_TRAIN),
    "tokens_per_second": Metric(
        "Tokens per second",
        "Tokens of the pairs, what both answers share once, over all devices.",
        better=max,
        logged=_TRAIN,
    ),
    "pairs_per_second": Metric(
        "Pairs per second", "Pairs trained on, over all devices.", better=max, logged=_TRAIN
    ),
    "model_tflops": Metric(
        "Model TFLOP/s of one device",
        "10^12 FLOPs a second that the method asks of one device: those of the policy, and those "
        "of the reference where it is computed.",
        better=max,
        logged=_TRAIN,
    ),
    "mfu": Metric(
        "MFU",
        "Model TFLOP/s as a share of the device's peak.",
        ".0%",
        better=max,
        logged=_TRAIN,
    ),
    "memory_gib": Metric(
        "Peak memory",
        "The peak so far: allocated on a GPU, or resident on a CPU.",
        unit="GiB",
        logged=_TRAIN,
    ),
    "time/reference": Metric(
        "Time of the reference",
        "Share of the time that the reference takes: its forward, or its cache.",
        ".1%",
        group=_TIMES,
        logged=_TRAIN,
    ),
    "time/data": Metric(
        "Time of the data",
        "Share of the time that goes to reading pairs and building streams.",
        ".1%",
        group=_TIMES,
        logged=_TRAIN,
    ),
    "time/step": Metric(
        "Time of the step",
        "Share of the time that is left: the policy's forward, backward and update.",
        ".1%",
        group=_TIMES,
        logged=_TRAIN,
    ),
    "kl": Metric(
        "KL to the reference",
        "Mean of log pi - log pi_ref over answers sampled from the policy: how far it has moved.",
        ".2f",
        "nats per answer",
        better=min,
        logged=_EVAL,
    ),
    "displacement": Metric(
        "Fall of chosen",
        "Log-prob that the chosen answers have lost since step 0, for each of their tokens; less "
        "than 0 is a gain.",
        ".3f",
        "nats per token",
        better=min,
        logged=_EVAL,
    ),
    "displacement_error": Metric(
        "Its standard error",
        "Standard error of the fall, from its spread over the held-out pairs.",
        ".3f",
        "nats per token",
        logged=_EVAL,
    ),
    "exact_match": Metric(
        "Right answers",
        "Share of greedy answers that equal the chosen one, where no other is right.",
        ".1%",
        better=max,
        logged=_EVAL,
    ),
    "lengths/generated": Metric(
        "Answer length", "Mean length of the greedy answers.", ".1f", "tokens", logged=_EVAL
    ),
}


def metric(name: str) -> Metric:
    """The entry of a metric, by its name with or without `train/` or `eval/`."""
    return CATALOGUE[name.removeprefix("train/").removeprefix("eval/")]


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a value of a metric is the better one of two; NaN never is."""
    better = metric(name).better
    return better is not None and better(value, than) == value != than


def by_chart(names: Iterable[str]) -> dict[str, list[str]]:
    """The names by the title of the chart that shows them."""
    charts: dict[str, list[str]] = {}
    for name in names:
        charts.setdefault(metric(name).chart, []).append(name)
    return charts
