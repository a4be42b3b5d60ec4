"""Numbers that are not finite: what was found is kept, so that it can be looked into."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError

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
