"""The facts of a model card, from what the run wrote; the words are in card.md.j2."""

import json
from dataclasses import asdict
from pathlib import Path

from dpo import run_folder
from dpo.after.merge_error import MergeError
from dpo.after.merged import base_licence, base_path, hub_id, write_card
from dpo.config import Config, resolve
from dpo.data.loader import list_sources
from dpo.report.logs import RunLogs, read_logs
from dpo.run_folder import checkpoint_step

NUM_SAMPLES = 3
_LONGEST_SAMPLE = 800  # characters
# Keys of the configuration that say how the model was made; no key that holds a path.
_SHOWN = {
    "model": "revision dtype quantization adapter",
    "lora": "r alpha dropout target_modules use_rslora use_dora",
    "data": "subset split eval_fraction max_prompt_length max_length on_overlong",
    "loss": "type beta label_smoothing",
    "reference": "mode",
    "optim": "name learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm",
    "train": "per_device_train_batch_size gradient_accumulation_steps seed",
}


def write_run_card(
    merged: Path,
    folder: Path,
    config: Config,
    *,
    weights: str,
    base: str,
    dtype: str,
    errors: dict[str, MergeError],
    pairs_are: str,
    has_chat: bool,
) -> None:
    """Writes README.md into the merged folder, about the run in `folder`."""
    logs = read_logs(folder)
    trained_on, source = base_path(config.model), list_sources(config.data)
    licence = base_licence(trained_on, config.model.revision)
    model_id = hub_id(trained_on)
    header = {
        "base_model": model_id,
        "datasets": [s.path for s in source if hub_id(s.path)] or None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo"],
        **licence,
    }
    step = _step(logs, folder / weights)
    facts = {
        "name": logs.name,
        "weights": weights,
        "step": step,
        "model": public_name(trained_on),
        "config": config,
        "licence": licence.get("license"),
        "sources": [_dataset_name(s.path) for s in source],
        "held_out_source": config.data.eval_path and _dataset_name(config.data.eval_path),
        "report": logs.data_report,
        "settings": _settings(config),
        "results": _results(logs, step),
        "samples": _samples(logs, step),
        "base": base,
        "dtype": dtype,
        "errors": errors,
        "pairs_are": pairs_are,
        "has_chat": has_chat,
    }
    write_card(merged, {k: v for k, v in header.items() if v}, facts)


def public_name(name: str) -> str:
    """A hub id with its link; of a file or folder only the name: the rest is somebody's machine."""
    if hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    packaged = resolve(name) != name
    return f"`{name}` (packaged with dpo)" if packaged else f"`{Path(name).name}` (local)"


def _dataset_name(name: str) -> str:
    return public_name(name).replace("huggingface.co/", "huggingface.co/datasets/", 1)


def _settings(config: Config) -> list[tuple[str, str]]:
    """(key, value) of what was set, and is not a path."""
    nested = asdict(config)
    unused = {"none": ("lora",), "lora": ()}[config.model.adapter]
    return [
        (f"{section}.{key}", str(nested[section][key]).replace("|", "\\|"))  # it goes in a table
        for section, keys in _SHOWN.items()
        for key in keys.split()
        if section not in unused and nested[section][key] is not None
    ]


def _step(logs: RunLogs, weights: Path) -> int | None:
    """After which step these weights were kept; None where nothing says it."""
    if (step := checkpoint_step(weights)) is not None:
        return step
    if weights.name == run_folder.BEST:
        return json.loads((weights / run_folder.BEST_METRIC).read_text())["step"]
    return max((line["step"] for line in logs.metrics), default=None)


def _results(logs: RunLogs, step: int | None) -> list[tuple[str, str, str]]:
    """(metric, before, after) on held-out pairs; empty where these weights were not evaluated."""
    at = {line.get("step"): line for line in logs.evaluations}
    if step is None or not {0, step} <= at.keys():
        return []
    return [
        (key.removeprefix("eval/"), f"{value:.4g}", f"{at[step][key]:.4g}")
        for key, value in at[0].items()
        if key.startswith("eval/") and key in at[step]
    ]


def _samples(logs: RunLogs, step: int | None) -> list[dict[str, str]]:
    """The first prompts, with the greedy answers before training and of these weights."""
    before, after = ({s["index"]: s for s in logs.samples if s["step"] == at} for at in (0, step))
    return [
        {
            "prompt": _short(before[index]["prompt"]),
            "before": _short(before[index]["answer"]),
            "after": _short(after[index]["answer"]),
        }
        for index in sorted(before.keys() & after.keys())[:NUM_SAMPLES]
    ]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SAMPLE else text[:_LONGEST_SAMPLE] + " ..."
