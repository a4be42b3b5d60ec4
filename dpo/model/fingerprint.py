"""Digests that identify a reference by all that its log-probs depend on, apart from the tokens.

They answer two questions. May these cached log-probs be used? That depends on the weights, on how
they are stored and computed with, and on the libraries that do it. Is this the reference that the
run began with? There only the weights count: a library may be newer by then.

Weights are identified by the contents of their files, not by names: a model that was trained
further in its folder is another model.
"""

import hashlib
import json
from importlib.metadata import version
from typing import Any

from dpo.config import ModelConfig
from dpo.data.files import file_digests
from dpo.model.named import base_of, local_folder

# The files that decide the numbers of a forward: weights, configuration and a model's own code.
_SUFFIXES = (".safetensors", ".bin", ".py")
_CONFIGS = ("config.json", "adapter_config.json")
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def weights_digest(model: ModelConfig) -> str:
    """Digest of every file of the model before training, or of its adapter and the base of that.

    A model of the hub must have been loaded before: its files are looked up in the local cache.
    """
    base = base_of(model)
    files = [
        file
        for its in ([model] if base is model else [model, base])
        for file in sorted(local_folder(its).iterdir())
        if file.name in _CONFIGS or file.suffix in _SUFFIXES
    ]
    return _digest([[file.name for file in files], file_digests(files)])


def reference_digest(model: ModelConfig, *, layout: str, device_type: str) -> str:
    """Digest of everything that the reference's log-probs of given tokens depend on."""
    return _digest(
        {
            "weights": weights_digest(model),
            "dtype": model.dtype,
            "quantization": model.quantization,
            "layout": layout,
            "device": device_type,
            "libraries": {name: version(name) for name in _LIBRARIES},
        }
    )


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
