"""What a model's name stands for, without its weights: tokenizer, config.json, an adapter's base.

Apart from `dpo.model.load`, since the classes of models take some five seconds to import.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from dpo.config import ModelConfig
from dpo.errors import UserError


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or its base's if an adapter's folder has none."""
    has_own = (Path(model.path) / "tokenizer_config.json").exists()
    return from_hub_or_disk(AutoTokenizer, model if has_own else base_of(model))


def load_shape(model: ModelConfig) -> PreTrainedConfig:
    """config.json of the model, or of the base that an adapter's folder names."""
    return from_hub_or_disk(AutoConfig, base_of(model))


def base_of(model: ModelConfig) -> ModelConfig:
    """The model itself, or the base that an adapter's folder names."""
    adapter = adapter_settings(model.path)
    return replace(model, name_or_path=adapter["base_model_name_or_path"]) if adapter else model


def adapter_settings(path: str) -> dict[str, Any] | None:
    """adapter_config.json, if `path` is a PEFT folder."""
    file = Path(path) / "adapter_config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def from_hub_or_disk(loader: Any, model: ModelConfig, **options: Any) -> Any:
    """What `loader` makes of the model's files.

    Raises:
        UserError: they are not found, or cannot be read.
    """
    remote = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return loader.from_pretrained(model.path, **remote, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.name_or_path: got {model.path!r}, which is no model folder and could not be "
            f"loaded from the hub ({type(error).__name__}: {first_line}). Check the name, "
            "model.revision, the network, and your access to it."
        ) from error
