"""Numbers that are not finite: what was found is kept, so that it can be looked into."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpo.data.loader import Pairs
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.evaluate.evaluator import Evaluation
from dpo.losses import PairLogps
from dpo.model.models import Models

MAX_SKIPPED = 10  # steps of a run; more are no accident of a few rows
MAX_ROWS = 16  # are kept with their tokens


class NotFiniteError(UserError):
    """A loss, a gradient or a log-prob is infinite or no number; nothing was computed from it."""


def keep_findings(
    folder: Path,
    rows: Sequence[tuple[str, TokenizedPair]],
    scorer: nn.Module,
    device: torch.device,
    **about: Any,
) -> None:
    """Writes `findings.json`: the rows with their tokens, and where the numbers first went wrong.

    Args:
        folder: `nonfinite-STEP` of the run.
        rows: name and pair of each row whose numbers are not finite.
        scorer: the policy's; the first row goes through it again.
        device: of the scorer.
        about: what else is known.
    """
    kept = [{"row": name, **asdict(pair)} for name, pair in rows[:MAX_ROWS]]
    where = first_bad_layer(scorer, rows[0][1], device) if rows else ""
    findings = {**about, "first_layer": where, "num_rows": len(rows), "rows": kept}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "findings.json").write_text(json.dumps(findings, indent=1))


def check_evaluation(
    folder: Path,
    step: int,
    evaluation: Evaluation,
    held_out: Pairs,
    models: Models,
    accelerator: Accelerator,
) -> None:
    """Refuses means over rows without a finite log-prob, and keeps what was found.

    Raises:
        NotFiniteError: naming the rows.
    """
    finite = torch.stack([getattr(evaluation.logps, f.name) for f in fields(PairLogps)])
    bad = (~finite.isfinite().all(dim=0)).nonzero().flatten().tolist()
    odd = [name for name, value in evaluation.metrics.items() if not math.isfinite(value)]
    if not odd and not bad:
        return
    named = [(held_out.row_name(i), held_out[i]) for i in bad]
    if accelerator.is_main_process:
        keep_findings(folder, named, models.scorer, accelerator.device, step=step, metrics=odd)
    rows = ", ".join(name for name, _ in named) or "none"
    raise NotFiniteError(
        f"step {step}: {', '.join(odd)} of the held-out pairs would not be finite. Rows whose "
        f"log-probs are not: {rows}; {folder} holds what was found. Look at the rows, or go on "
        "from the last checkpoint with a lower optim.learning_rate in another folder."
    )


@torch.no_grad()
def first_bad_layer(scorer: nn.Module, pair: TokenizedPair, device: torch.device) -> str:
    """The name of the first module whose output is not finite for this pair; "" if all are."""
    bad: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda module, given, output, name=name: bad.append(name) if _is_bad(output) else None
        )
        for name, module in scorer.named_modules()
        if name
    ]
    try:
        scorer(build_stream([pair]).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else ""


def bad_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    return [n for n, p in model.named_parameters() if p.grad is not None and _is_bad(p.grad)]


def _is_bad(output: Any) -> bool:
    tensors = output if isinstance(output, tuple | list) else [output]
    return any(
        isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all())
        for t in tensors
    )
