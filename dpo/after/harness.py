"""EleutherAI's lm-evaluation-harness on base and policy, from the one model that is loaded.

`open_llm_leaderboard` is the six tasks of the article's leaderboard with its numbers of shots, as
plain text without a chat template. Every other task uses the template that the run was trained
with, as `lm-eval run --apply_chat_template` would; under `data.chat_template: none`, plain text. A
document's own system message is the task's `description`, which may hold `{{column}}`;
docs/lm_eval/quickstart.yaml shows it.

Two things differ from the command-line tool. It adds the tokenizer's BOS before a template that
does not write one, which the policy never saw in training; and it ends an answer at EOS only,
though the policy may end its turns with another token.
"""

import copy
import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dpo.after.finished import FinishedRun
from dpo.data.chat import stop_ids
from dpo.data.templates import choose_template
from dpo.errors import UserError
from dpo.evaluate.statistics import standard_error


@dataclass(frozen=True)
class TaskSetting:
    """How a task runs: shots (None: the task's own), chat template, the metric (None: all)."""

    shots: int | None = None
    is_chat: bool = True
    metric: str | None = None


# The Open LLM Leaderboard of 2023, which the article reports.
LEADERBOARD = {
    "arc_challenge": TaskSetting(25, False, "acc_norm,none"),
    "hellaswag": TaskSetting(10, False, "acc_norm,none"),
    "mmlu": TaskSetting(5, False, "acc,none"),
    "truthfulqa_mc2": TaskSetting(0, False, "acc,none"),
    "winogrande": TaskSetting(5, False, "acc,none"),
    "gsm8k": TaskSetting(5, False, "exact_match,strict-match"),
}
SUITES = {"open_llm_leaderboard": LEADERBOARD}


@dataclass(frozen=True)
class LoadedTask:
    """A task, group or tag as built by lm-eval's TaskManager, with its documents."""

    name: str
    setting: TaskSetting
    built: list[Any]
    manager: Any = None


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> list[LoadedTask]:
    """Finds tasks and suites by name, in `include_path` first, and reads their documents.

    Raises:
        UserError: lm-eval is not installed, a name is unknown, or documents cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(
            f"--lm_eval: {error}. It is an optional extra: pip install -e '.[eval]' "
            "-c constraints.txt in the folder of this project, or pip install lm-eval."
        ) from None
    if include_path and not include_path.is_dir():
        raise UserError(f"--include_path: {include_path} is not a folder. Name that of the YAML.")
    settings: dict[str, TaskSetting] = {}
    for name in names:
        settings |= SUITES.get(name, {name: TaskSetting()})
    # Listing lm-eval's own 14,000 tasks takes long, so it is done only if one of them is named.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not settings.keys() <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    for name in settings.keys() - set(manager.all_tasks):
        near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], n=5, cutoff=0.5)
        raise UserError(
            f"--lm_eval: lm-eval has no task {name!r}. Nearest: {', '.join(near) or 'none'}. For "
            "a task of your own, name the folder of its YAML in --include_path."
        )
    return [
        LoadedTask(name, setting, _build(manager, name), manager)
        for name, setting in settings.items()
    ]


def _build(manager: Any, name: str) -> list[Any]:
    from datasets.exceptions import DatasetsError

    try:
        loaded = manager.load([name])
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise UserError(
            f"--lm_eval {name}: its documents or its YAML cannot be loaded "
            f"({type(error).__name__}: {error}). Check the network, or the paths in the YAML, "
            "which start at the current folder."
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def run_harness(
    finished: FinishedRun, tasks: Sequence[LoadedTask], *, batch_size: int, limit: int | None = None
) -> dict[str, Any]:
    """Runs every task on policy and base; only the first `limit` documents of each, if given.

    Returns:
        `rows`: one per task and metric, see `compare`; `tables`: lm-eval's own, by model.
    """
    from lm_eval.utils import make_table

    rows: list[dict[str, Any]] = []
    tables: dict[str, list[str]] = {"base": [], "policy": []}
    for task in tasks:
        policy = _evaluate(finished, finished.policy.model, task, batch_size, limit)
        with finished.before() as model:
            base = _evaluate(finished, model, task, batch_size, limit)
        for name, results in (("base", base), ("policy", policy)):
            column = "groups" if results.get("groups") else "results"
            tables[name].append(make_table(results, column))
        rows += compare(task, base, policy)
    return {"rows": rows, "tables": {name: "\n".join(parts) for name, parts in tables.items()}}


def _evaluate(
    finished: FinishedRun, model: nn.Module, task: LoadedTask, batch_size: int, limit: int | None
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(finished.tokenizer)  # HFLM may set its padding token
    template = choose_template(tokenizer, finished.config.data)
    of_model: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size}
    of_task: dict[str, Any] = {
        "task_manager": task.manager,  # else lm-eval lists its own tasks again
        "num_fewshot": task.setting.shots,
        "limit": limit,
        "log_samples": True,
    }
    if task.setting.is_chat and template:
        tokenizer.chat_template = template
        of_model["add_bos_token"] = False
        stops = stop_ids(model, tokenizer, template)
        of_task |= {"apply_chat_template": True, "gen_kwargs": {"eos_token_id": stops}}
    with _without_known_warnings():
        wrapped = HFLM(model, **of_model)  # type: ignore[arg-type]
        results = lm_eval.simple_evaluate(wrapped, tasks=task.built, **of_task)  # type: ignore[call-arg]
    assert results is not None
    return results  # type: ignore[return-value]


def compare(task: LoadedTask, base: dict[str, Any], policy: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of both models, their difference, and the standard error of that difference.

    If the metric is a mean over documents, the error is that of the differences document by
    document (`is_paired`), so what is hard for both models cancels. Else the two models' own errors
    are added in quadrature, as if they had answered different documents; None if there are none.
    """
    names = base["groups"] if base.get("groups") else base["results"]
    rows = []
    for name in [task.name] if task.name in names else names:
        before, after = (results["results"][name] for results in (base, policy))
        for metric in _metrics(before, task.setting.metric):
            scores = [_by_document(results, name, metric) for results in (base, policy)]
            is_paired = all(
                len(own) and math.isclose(own.mean(), values[metric], abs_tol=1e-9)
                for own, values in zip(scores, (before, after), strict=True)
            )
            error_name = metric.replace(",", "_stderr,")
            errors = [values.get(error_name) for values in (before, after)]
            if is_paired:
                error = standard_error(scores[1] - scores[0])
            else:
                error = math.hypot(*errors) if all(map(_is_number, errors)) else None
            rows.append(
                {
                    "task": name,
                    "metric": metric,
                    "base": float(before[metric]),
                    "policy": float(after[metric]),
                    "difference": float(after[metric] - before[metric]),
                    "difference_se": error,
                    "is_paired": is_paired,
                    "documents": sum(
                        base["n-samples"][t]["effective"] for t in _leaves(base, name)
                    ),
                }
            )
    return rows


def _metrics(values: dict[str, Any], wanted: str | None) -> list[str]:
    """lm-eval's names of metrics, `metric,filter`, without their errors."""
    own = [m for m, v in values.items() if "," in m and "_stderr," not in m and _is_number(v)]
    return [metric for metric in own if wanted in (None, metric)]


def _by_document(results: dict[str, Any], name: str, metric: str) -> np.ndarray:
    """A score per document; empty unless every document has one that is a number."""
    key, chosen_filter = metric.split(",")
    values = [
        sample.get(key)
        for leaf in _leaves(results, name)
        for sample in results["samples"][leaf]
        if sample["filter"] == chosen_filter
    ]
    return np.array(values, dtype=float) if all(map(_is_number, values)) else np.array([])


def _leaves(results: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group and of the groups inside it; a task is its own only leaf."""
    inside = results["group_subtasks"].get(name)
    return [leaf for child in inside for leaf in _leaves(results, child)] if inside else [name]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


# Warnings about how we call it, which a user can do nothing about.
_KNOWN = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model",
    "specified through cli",  # the tokens that end an answer
    "Overwriting default num_fewshot",  # a suite's shots
)


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    def is_new(record: logging.LogRecord) -> bool:
        return not any(known in record.getMessage() for known in _KNOWN)

    loggers = [logging.getLogger(f"lm_eval.{n}") for n in ("models.huggingface", "evaluator")]
    for logger in loggers:
        logger.addFilter(is_new)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_new)
