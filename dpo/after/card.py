"""The card of a merged model: facts from the run folder, in the words of card.md.j2."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo import run_folder
from dpo.after.merge_error import MergeError
from dpo.config import Config, DataSource, ModelConfig
from dpo.data.loader import list_sources
from dpo.hidden import visible
from dpo.model.named import base_of
from dpo.report.logs import RunLogs, read_logs
from dpo.run_folder import checkpoint_step

CARD_TEMPLATE = Path(__file__).with_name("card.md.j2")
NUM_SAMPLES = 3
_LONGEST_SAMPLE = 800  # characters
# Keys of the configuration that say how the model was made; no key that holds a path.
_SHOWN = {
    "model": "revision dtype quantization adapter",
    "lora": "r alpha dropout target_modules use_rslora use_dora",
    "data": "subset split eval_fraction max_prompt_length max_length on_overlong truncation",
    "loss": "type beta label_smoothing options",
    "reference": "mode update",
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
    rounding: float,
    refused: str,
    pairs_are: str,
    has_chat: bool,
) -> None:
    """Writes README.md into the merged folder, about the run in `folder`.

    `refused` says why the merge is not the trained policy, "" if it is.
    """
    logs = read_logs(folder)
    trained_on, sources = base_of(config.model), list_sources(config.data)
    held_out = config.data.eval_source
    licence = base_licence(trained_on)
    header = {
        "base_model": hub_id(trained_on.name_or_path, trained_on.path),
        "datasets": [s.path for s in sources if hub_id(s.path, s.location)] or None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo"],
        **licence,
    }
    step = _step(logs, folder / weights)
    facts = {
        "name": _plain(logs.name),
        "weights": weights,
        "step": step,
        "model": public_name(trained_on.name_or_path, trained_on.path),
        "config": config,
        "licence": licence.get("license"),
        "sources": [_dataset_name(s) for s in sources],
        "held_out_source": held_out and _dataset_name(held_out),
        "report": _plain_reasons(logs.data_report),
        "settings": _settings(config),
        "rewards": config.rewards,
        "results": _results(logs, step),
        "samples": _samples(logs, step),
        "base": base,
        "dtype": dtype,
        "errors": errors,
        "rounding": rounding,
        "refused": refused,
        "pairs_are": pairs_are,
        "has_chat": has_chat,
    }
    write_card(merged, {k: v for k, v in header.items() if v}, facts)


def hub_id(name: str, location: str) -> str | None:
    """`name` if it is a hub id, None if it is a local file or folder.

    A name that could be both means the folder, as it does for the loaders.
    """
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    return name if is_id and not Path(location).exists() else None


def base_licence(base: ModelConfig) -> dict[str, str]:
    """The licence fields of the base's own card; empty if it has none or cannot be read."""
    from httpx2 import HTTPError
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        file = Path(base.path) / "README.md"
        if hub_id(base.name_or_path, base.path):
            file = Path(hf_hub_download(base.path, "README.md", revision=base.revision))
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, HTTPError, ValueError):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}


def write_card(folder: Path, header: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes README.md: a YAML header for the hub, and the facts in the words of the template."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(**header)
    card = ModelCard.from_template(data, template_path=str(CARD_TEMPLATE), **facts)
    card.save(folder / "README.md")


def public_name(name: str, location: str) -> str:
    """A hub id with its link; for a file or folder only its name, since its path is private."""
    if hub_id(name, location):
        return f"[{name}](https://huggingface.co/{name})"
    if location != name:
        return f"`{name}` (packaged with dpo)"
    return f"`{_one_line(Path(name).name).replace('`', chr(39))}` (local)"


def _dataset_name(source: DataSource) -> str:
    name = public_name(source.path, source.location)
    return name.replace("huggingface.co/", "huggingface.co/datasets/", 1)


def _settings(config: Config) -> list[tuple[str, str]]:
    """(key, value) of every key of `_SHOWN` that applies and has a value."""
    nested = asdict(config)
    unused = {"none": ("lora",), "lora": ()}[config.model.adapter]
    return [
        (f"{section}.{key}", _plain(str(nested[section][key])))
        for section, keys in _SHOWN.items()
        for key in keys.split()
        if section not in unused and nested[section][key] not in (None, {}, "never")
    ]


def _step(logs: RunLogs, weights: Path) -> int | None:
    """The step after which these weights were saved; None if no file says so."""
    if (step := checkpoint_step(weights)) is not None:
        return step
    if weights.name == run_folder.BEST:
        return json.loads((weights / run_folder.BEST_METRIC).read_text())["step"]
    return max((line["step"] for line in logs.metrics), default=None)


def _results(logs: RunLogs, step: int | None) -> list[tuple[str, str, str]]:
    """(metric, before, after) on held-out pairs; empty if these weights were not evaluated."""
    at = {line.get("step"): line for line in logs.evaluations}
    if step is None or not {0, step} <= at.keys():
        return []
    return [
        (key.removeprefix("eval/"), f"{value:.4g}", f"{at[step][key]:.4g}")
        for key, value in at[0].items()
        if key.startswith("eval/") and key in at[step]
    ]


def _samples(logs: RunLogs, step: int | None) -> list[dict[str, str]]:
    """The first prompts, with the greedy answers before training and by these weights."""
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
    text = visible(text)  # a bare \r would end a line, and with it the code block
    return text if len(text) <= _LONGEST_SAMPLE else text[:_LONGEST_SAMPLE] + " ..."


def _plain_reasons(report: dict[str, Any]) -> dict[str, Any]:
    """A data report whose reasons, which may quote a template or a column, are plain text."""
    tallies = {"dropped", "cut"} & report.keys()
    return report | {name: {_plain(k): v for k, v in report[name].items()} for name in tallies}


def _plain(text: str) -> str:
    """Text within a line of Markdown that is no markup: no link, no HTML, no end of a cell."""
    return re.sub(r"[\\`\[\]<>|&]", r"\\\g<0>", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(visible(text).split())
