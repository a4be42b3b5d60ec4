"""What TensorBoard shows beside the scalars: charts that belong together, samples, histograms.

Accelerate's tracker logs scalars and, for hyper-parameters, makes a second run with a file of its
own; so they are written here, into the run itself, where its scalars are the results.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

_BOTH = ("train", "eval")
# Title of a chart: the scalars in it. TensorBoard shows them under "Custom Scalars".
LAYOUT = {
    "held out against training": {
        "loss": [f"{split}/loss" for split in _BOTH],
        "reward accuracy": [f"{split}/rewards/accuracies" for split in _BOTH],
        "reward margin": [f"{split}/rewards/margins" for split in _BOTH],
    },
    **{
        f"chosen and rejected, {name}": {
            "rewards": [f"{split}/rewards/chosen", f"{split}/rewards/rejected"],
            "log-probs, nats": [f"{split}/logps/chosen", f"{split}/logps/rejected"],
            "reward and ranking accuracy": [
                f"{split}/rewards/accuracies",
                f"{split}/ranking_accuracy",
            ],
        }
        for split, name in (("train", "training"), ("eval", "held out"))
    },
    "how far it went": {
        "KL to the reference, nats per answer": ["eval/kl"],
        "length of the answers, tokens": ["eval/lengths/generated"],
        "answers right": ["eval/exact_match"],
    },
    "throughput": {
        "pairs per second": ["train/pairs_per_second"],
        "model TFLOP/s of one device": ["train/model_tflops"],
        "share of the time": ["train/time/reference", "train/time/data", "train/time/step"],
        "peak memory, GiB": ["train/memory_gib"],
    },
}
# The results that the HParams tab shows beside the settings.
RESULTS = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/kl")


def open_board(writer: SummaryWriter, settings: Mapping[str, int | float | str | bool]) -> None:
    """The layout of the charts, and the settings by `section.key`."""
    writer.add_custom_scalars(
        {
            group: {title: ["Multiline", tags] for title, tags in charts.items()}
            for group, charts in LAYOUT.items()
        }
    )
    for summary in hparams(dict(settings), dict.fromkeys(RESULTS, 0.0)):
        writer._get_file_writer().add_summary(summary)  # type: ignore[union-attr]


def show_evaluation(
    writer: SummaryWriter,
    step: int,
    histograms: Mapping[str, Tensor],
    samples: Sequence[Mapping[str, Any]],
    count: int = 10,
) -> None:
    """Histograms over the held-out pairs, and the first samples as a table."""
    for name, values in histograms.items():
        writer.add_histogram(f"held_out/{name}", values, step)
    if samples:
        head = "| prompt | answer | chosen |\n|---|---|---|\n"
        rows = (
            [_cell(str(sample[name])) for name in ("prompt", "answer", "chosen")]
            for sample in samples[:count]
        )
        writer.add_text("samples", head + "\n".join(f"| {' | '.join(row)} |" for row in rows), step)


def _cell(text: str) -> str:
    """As one cell of a Markdown table; control tokens are no HTML."""
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(plain, escaped)
    return text
