"""What a model's name stands for, without its weights: tokenizer, config.json, an adapter's base.

Apart from `dpo.model.load`, since the classes of models take some five seconds to import.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from dpo.config import ModelConfig
from dpo.errors import UserError

# Weights, configuration, tokenizer; not the checkpoints that may lie beside them.
_TOKENIZER_FILES = (
    *("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "tekken"),
    *("sentencepiece", "chat_template"),
)
# Beyond any model, and little enough to be tried.
_LARGEST = {"num_hidden_layers": 1000, "hidden_size": 2**18, "vocab_size": 2**24}
_ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]


class Adapter(NamedTuple):
    """A PEFT adapter: the folder of its files, and what adapter_config.json says."""

    folder: Path
    settings: dict[str, Any]


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or its base's if an adapter has none.

    Raises:
        UserError: it cannot be read.
    """
    tokenizer = from_hub_or_disk(AutoTokenizer, _with_tokenizer(model))
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"model.name_or_path: in the tokenizer of {model.path}, model_max_length is "
            f"{tokenizer.model_max_length!r}, wanted a number. Correct tokenizer_config.json."
        )
    return tokenizer


def _with_tokenizer(model: ModelConfig) -> ModelConfig:
    adapter = adapter_of(model)
    if adapter and (adapter.folder / "tokenizer_config.json").exists():
        return replace(model, name_or_path=str(adapter.folder))
    return base_of(model)


def save_tokenizer(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path
) -> None:
    """Writes the tokenizer's own files, byte for byte, and the template of training.

    What this version of transformers would write, older ones, and programs that build on them,
    cannot always read. A template replaces the model's own only where training had another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in local_folder(_with_tokenizer(model)).iterdir():
        if file.name.startswith(_TOKENIZER_FILES) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    if template is not None and template != tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def local_folder(model: ModelConfig) -> Path:
    """Where the files of a model or an adapter are; one of the hub must have been loaded before."""
    if Path(model.path).is_dir():
        return Path(model.path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))


def load_shape(model: ModelConfig) -> PreTrainedConfig:
    """config.json of the model, or of the base that an adapter names.

    Raises:
        UserError: it cannot be read, or asks for what no model has: memory and hours.
    """
    shape = from_hub_or_disk(AutoConfig, base_of(model))
    text = shape.get_text_config()
    for name, most in _LARGEST.items():
        if not isinstance(given := getattr(text, name, 1), int) or not 0 < given <= most:
            raise UserError(
                f"model.name_or_path: {base_of(model).path}/config.json has {name} {given!r}, "
                f"wanted 1 to {most}. Check that the file is whole."
            )
    return shape


def stored_quantization(model: ModelConfig) -> str | None:
    """How the checkpoint itself stores the weights: nf4, fp4, int8, or another method's name."""
    stored = getattr(load_shape(model), "quantization_config", None)
    if not stored:
        return None
    said = stored if isinstance(stored, dict) else stored.to_dict()
    if said.get("load_in_4bit"):
        return said.get("bnb_4bit_quant_type", "fp4")
    return "int8" if said.get("load_in_8bit") else str(said.get("quant_method", "unknown"))


def check_stored_quantization(model: ModelConfig) -> str | None:
    """`stored_quantization`, which must be the configured one.

    Raises:
        UserError: the checkpoint is quantised otherwise.
    """
    stored = stored_quantization(model)
    if stored not in (None, model.quantization):
        is_known = stored in ("nf4", "fp4", "int8")
        raise UserError(
            f"model.quantization: got {model.quantization}, but the weights of "
            f"{base_of(model).path} are stored in {stored}. "
            + (
                f"Set it to {stored}, with model.adapter lora; or name"
                if is_known
                else "No reference and no merge are exact with these. Name"
            )
            + " the model that they were made from."
        )
    return stored


def check_vocabulary(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, largest: int) -> None:
    """Refuses rows with a token that the model has no embedding for.

    `largest` is their largest token id. A tokenizer may know tokens that no row has.
    """
    rows = load_shape(model).get_text_config().vocab_size
    if largest >= rows:
        raise UserError(
            f"model.name_or_path: the rows hold token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but {base_of(model).path} has "
            f"embeddings for {rows} tokens alone. Take the tokenizer that belongs to the model, a "
            "template that does not write this token, or resize the model's embeddings and save it."
        )


def base_of(model: ModelConfig) -> ModelConfig:
    """The model itself, or the base that an adapter names.

    Raises:
        UserError: it names none, or one that is an adapter too.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return model
    name, revision = (adapter.settings.get(k) for k in ("base_model_name_or_path", "revision"))
    is_name = isinstance(name, str) and name and isinstance(revision, str | None)
    base = replace(model, name_or_path=name, revision=revision) if is_name else model
    if base is model or adapter_of(base):
        raise UserError(
            f"model.name_or_path: got {model.path!r}, an adapter on {name!r}, wanted one on a "
            "whole model. Merge the lower one first, and name the result in adapter_config.json."
        )
    return base


def adapter_of(model: ModelConfig) -> Adapter | None:
    """The adapter that a folder or a repository of the hub holds, found as transformers does.

    A config.json beside it, as some trainers save one, makes no model of it.

    Raises:
        UserError: its adapter_config.json cannot be read.
    """
    local = Path(model.path).is_dir()
    folder = Path(model.path) if local else _hub_adapter(model.path, model.revision)
    if folder is None or not (folder / "adapter_config.json").is_file():
        return None
    file = folder / "adapter_config.json"
    with explained(f"model.name_or_path: {file} cannot be read", "Check that it is whole."):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError("no JSON object")
        return Adapter(folder, settings)


@cache  # one question to the hub, however often the name is looked up
def _hub_adapter(name: str, revision: str | None) -> Path | None:
    """The folder in the local cache of an adapter's files, which are fetched; None: it is none."""
    try:
        found = find_adapter_config_file(name, revision=revision)
    except OSError:  # there is no such repository or revision: whoever loads it says so
        return None
    if found is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=_ADAPTER_FILES))


def from_hub_or_disk(loader: Any, model: ModelConfig, **options: Any) -> Any:
    """What `loader` makes of the model's files.

    Raises:
        UserError: they are not found, or cannot be read.
    """
    remote = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    what, remedy = (
        "which is no model folder and could not be loaded from the hub",
        "Check the name, model.revision, the network, and your access to it.",
    )
    if (Path(model.path) / "config.json").exists():
        what = "whose files cannot be read"
        remedy = "Check that they are whole; one of a few lines may be a git LFS pointer."
    with explained(f"model.name_or_path: got {model.path!r}, {what}", remedy):
        try:
            return loader.from_pretrained(model.path, **remote, **options)
        except (OSError, ValueError) as error:
            said = str(error)
            if "trust_remote_code" in said and not model.trust_remote_code:
                raise UserError(
                    f"model.trust_remote_code: {model.path} brings Python code of its own, which "
                    "would run here. Read it, and set this key to true if you trust it."
                ) from None
            if "safetensors" in said and options.get("use_safetensors"):
                raise UserError(
                    f"model.allow_pickle: {model.path} has no model.safetensors. Save it as "
                    "safetensors (save_pretrained), or set this key to true: pickled weights are "
                    "then read by torch's restricted reader."
                ) from None
            raise


@contextmanager
def explained(problem: str, remedy: str) -> Iterator[None]:
    """Whatever a library says of a model's files becomes a UserError; running out of memory not."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # each reader of files fails in its own way
        if type(error).__name__ == "OutOfMemoryError":
            raise
        said = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{problem} ({type(error).__name__}: {said}). {remedy}") from error
