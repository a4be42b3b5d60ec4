"""From an adapter to a model that stands by itself: merge, save, model card, push.

A merge is as good as the base it goes into. The adapter of a 4-bit run was trained on the weights
that 4 bits leave, and belongs into those: quantise again as the run did, dequantise, add. The
original checkpoint in 16 bits, which the NeuralHermes article merges into, is another model. Either
is loaded afresh: bitsandbytes' CPU kernel repacks 4-bit weights in their first forward, and what is
dequantised after that is wrong.

The update is added in fp32, layer by layer, and rounded to the wanted type once. PEFT's safe merge,
left alone, rounds the update first and then the sum.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import Config, ModelConfig, resolve
from dpo.data.files import file_sums
from dpo.errors import UserError
from dpo.model.load import adapter_settings, dequantize, load_base

CARD_TEMPLATE = Path(__file__).with_name("card.md.j2")
RECORD = "merge.json"  # in a merged folder: what it is, and the sums of what was verified
_KINDS = {"weights": str, "base": str, "dtype": str, "merged_from": dict, "files": dict}


def base_path(model: ModelConfig) -> str:
    """Hub id or folder of the base: the model, or what the adapter of a PEFT folder is on."""
    adapter = adapter_settings(resolve(model.name_or_path))
    return adapter["base_model_name_or_path"] if adapter else model.name_or_path


def load_merge_base(
    config: Config, which: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A base in plain layers, to merge into; loaded afresh, one model's memory.

    Args:
        config: the run's.
        which: `dequantized`: quantised as in training, and back; `16bit`: the checkpoint, never
            quantised, in `dtype`; `original`: that of an unquantised run, in the run's own type.
        dtype: the type that the merged model will have.
        device: where to load it.
    """
    model = config.model
    if which == "16bit":
        model = replace(model, quantization="none", dtype=str(dtype).removeprefix("torch."))
    base = load_base(model, device, base_path(model))
    return dequantize(base) if which == "dequantized" else base


def merge_adapter(base: PreTrainedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Adds the adapter to the base, in place; the merged model has the given type.

    DoRA and rslora are PEFT's to merge: it is only given fp32 weights, one layer at a time.

    Raises:
        UserError: a weight is too large for the type.
        ValueError: the adapter holds weights that are not finite (PEFT's safe merge).
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained_dtype = base.dtype
    model = peft.PeftModel.from_pretrained(base, str(adapter))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.float()  # type: ignore[attr-defined]
            layer.merge(safe_merge=True)
            cast(layer.get_base_layer(), torch.float32, dtype)
    merged: PreTrainedModel = model.unload()  # type: ignore[operator,assignment]
    cast(merged, trained_dtype, dtype)
    return merged.eval()


def cast(module: nn.Module, source: torch.dtype, dtype: torch.dtype) -> None:
    """Rounds the parameters of type `source`; what a model keeps in another type stays in it.

    Buffers stay too: rotary frequencies in half precision turn long texts.

    Raises:
        UserError: a weight is too large for the type.
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype == source != dtype:
            parameter.data = parameter.data.to(dtype)
            if not parameter.data.isfinite().all():
                raise UserError(
                    f"--dtype: got {str(dtype).removeprefix('torch.')}, but {name} holds values "
                    f"beyond its largest, {torch.finfo(dtype).max:g}. Take bfloat16 or float32."
                )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    template: str | None,
    stops: Sequence[int],
    max_shard_size: str,
) -> None:
    """Writes safetensors, tokenizer with the chat template of training, and generation config.

    Args:
        model: merged, plain.
        tokenizer: the run's.
        folder: where to.
        template: the chat template that training rendered with, None where there was none.
        stops: token ids that end an answer, all of those that training knew.
        max_shard_size: of a file, as transformers writes it: 5GB.
    """
    settings = model.generation_config
    assert settings is not None
    settings.eos_token_id = list(stops)
    pad = tokenizer.pad_token_id
    settings.pad_token_id = stops[0] if pad is None else pad  # type: ignore[assignment]
    try:
        settings.validate(strict=True)
    except ValueError:  # bases that name a temperature and forget this could not be saved
        settings.do_sample = True
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def hub_id(name: str) -> str | None:
    """`name` where it is a hub id, None where it is a file or a folder of this machine.

    A name that would be both is the folder, as it is for the loaders.
    """
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    return name if is_id and not Path(resolve(name)).exists() else None


def base_licence(base: str, revision: str | None) -> dict[str, str]:
    """The licence fields of the base's own card; empty where it has none, or cannot be read."""
    from httpx2 import HTTPError
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        file = Path(resolve(base)) / "README.md"
        if hub_id(base):
            file = Path(hf_hub_download(base, "README.md", revision=revision))
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, HTTPError, ValueError):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}


def write_card(folder: Path, header: dict[str, Any], facts: dict[str, Any]) -> None:
    """README.md: a YAML header that the hub reads, and the facts, in the words of the template."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(**header)
    card = ModelCard.from_template(data, template_path=str(CARD_TEMPLATE), **facts)
    card.save(folder / "README.md")


def write_record(
    merged: Path, weights: Path, base: str, dtype: str, errors: dict[str, Any]
) -> None:
    """merge.json: what was merged, how well, and the sums of the files as they were verified."""
    record = {
        "weights": weights.name,
        "base": base,
        "dtype": dtype,
        "errors_nats": errors,
        "merged_from": file_sums(weights, "*.safetensors"),
        "files": {**file_sums(merged, "*"), "README.md": "free to be edited"},
    }
    (merged / RECORD).write_text(json.dumps(record, indent=1))


def verified_files(output: Path, folder: Path, *, weights: str, base: str, dtype: str) -> list[str]:
    """Names of the files of a merge, which are still those that were verified.

    The model card may be edited. Files that came later are not among them.

    Raises:
        UserError: the folder holds no merge, another one than asked for, or a changed file.
    """
    record = _read_record(output)
    asked = {"weights": weights, "base": base, "dtype": dtype}
    other = {key: record[key] for key in asked if asked[key] not in ("auto", record[key])}
    if other or record["merged_from"] != file_sums(folder / weights, "*.safetensors"):
        what = ", ".join(f"{key} {value}" for key, value in other.items()) or "other weights"
        raise UserError(
            f"--output: {output} holds another merge than asked for ({what}). Name another folder, "
            "or move it away."
        )
    now = file_sums(output, "*")
    changed = [n for n, was in record["files"].items() if n != "README.md" and now.get(n) != was]
    if changed or not (output / "README.md").exists():
        raise UserError(
            f"--output: in {output}, {', '.join(changed) or 'README.md'} is no longer what was "
            "verified. Move the folder away and merge again."
        )
    return [*record["files"], RECORD]


def _read_record(output: Path) -> dict[str, Any]:
    file = output / RECORD
    if not file.exists():
        raise UserError(f"--output: {output} exists and is no merge of this script. Name another.")
    try:
        record = json.loads(file.read_text())
        is_whole = all(isinstance(record[key], kind) for key, kind in _KINDS.items())
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(
            f"--output: {file} is broken, wanted what the merge wrote there. Move {output} away "
            "and merge again."
        )
    return record


def check_can_push(repo: str) -> None:
    """What can be known before the work: the name's form, and that there is a token.

    Raises:
        UserError: either is not as it must be.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(f"--push_to_hub: got {repo!r}, wanted NAMESPACE/NAME, as on the hub.")
    if not get_token():
        raise UserError(
            "--push_to_hub: there is no token for the hub. Log in with `hf auth login`, or set "
            "HF_TOKEN in the environment, to one that may write."
        )


def push(folder: Path, files: Sequence[str], repo: str, *, public: bool) -> str:
    """Uploads these files in one commit; returns the repository's address.

    A new repository is private unless `public`; the token is what `get_token` of the hub's own
    client finds.

    Raises:
        UserError: the repository is public and was not meant to be, the hub refuses, or cannot be
            reached.
    """
    from httpx2 import HTTPError  # of the hub's client
    from huggingface_hub import HfApi

    check_can_push(repo)
    hub = HfApi()
    try:
        url = hub.create_repo(repo, private=not public, exist_ok=True)
        if not public and not hub.repo_info(repo).private:
            raise UserError(
                f"--push_to_hub: {repo} is public already. Give --public if all may see this "
                f"model, or name another repository. Nothing was pushed; {folder} is complete."
            )
        hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="A model trained with DPO, merged",
        )
    except UserError:
        raise
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(
            f"--push_to_hub: {repo} was not pushed ({type(cause).__name__}: {first_line}). Check "
            f"the name, the network, and that your token may write there. {folder} is complete: "
            "the same command again repeats the push alone."
        ) from error
    return str(url)
