"""What TensorBoard shows beside the scalars: grouped charts, settings, samples, histograms.

Accelerate's tracker would write hyper-parameters as a second run with a file of its own. Here they
are written into the run itself, whose scalars are the results.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from dpo.catalogue import PAIR_METRICS, by_chart, metric
from dpo.hidden import visible

# The charts under "Custom Scalars": metrics by group; the catalogue says which share a chart.
_GROUPS = {
    "training and held out": PAIR_METRICS,
    "how far it went": ("kl", "lengths/generated", "exact_match"),
    "throughput": (
        "pairs_per_second model_tflops time/reference time/data time/step memory_gib"
    ).split(),
}
# The results that the HParams tab shows beside the settings.
RESULTS = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/kl")


def open_board(writer: SummaryWriter, settings: Mapping[str, int | float | str | bool]) -> None:
    """Writes the layout of the charts, and the settings by `section.key`."""
    threading.excepthook = _leave_to_the_next_write
    writer.add_custom_scalars(
        {
            group: {
                title: ["Multiline", _scalars(chart)] for title, chart in by_chart(names).items()
            }
            for group, names in _GROUPS.items()
        }
    )
    for summary in hparams(dict(settings), dict.fromkeys(RESULTS, 0.0)):
        writer._get_file_writer().add_summary(summary)  # type: ignore[union-attr]


def _leave_to_the_next_write(failed: threading.ExceptHookArgs) -> None:
    """Prints what ends a thread, but not a full disk: the next write to the board raises that."""
    if not isinstance(failed.exc_value, OSError):
        _print_what_ended_it(failed)


_print_what_ended_it = threading.excepthook


def _scalars(names: Sequence[str]) -> list[str]:
    return [f"{prefix}/{name}" for name in names for prefix in metric(name).logged]


def show_evaluation(
    writer: SummaryWriter,
    step: int,
    histograms: Mapping[str, Tensor],
    samples: Sequence[Mapping[str, Any]],
    count: int = 10,
) -> None:
    """Writes histograms over the held-out pairs, and the first samples as a table."""
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
    """The text as one cell of a Markdown table, where nothing is HTML and nothing is hidden."""
    text = visible(text)
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(plain, escaped)
    return text
