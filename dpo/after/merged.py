"""From an adapter to a model that stands by itself: the weights, and how they are saved.

A merge is as good as the base it goes into. The adapter of a 4-bit run was trained on the weights
that 4 bits leave, and belongs into those: quantise again as the run did, dequantise, add. The
original checkpoint in 16 bits, which the NeuralHermes article merges into, is another model. Either
is loaded afresh: bitsandbytes' CPU kernel repacks 4-bit weights in their first forward, and what is
dequantised after that is wrong.

The update is added in fp32, layer by layer, and rounded to the wanted type once. PEFT's safe merge,
left alone, rounds the update first and then the sum.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import Config
from dpo.errors import UserError
from dpo.model.load import base_of, dequantize, load_base


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
    model = base_of(config.model)
    if which == "16bit":
        model = replace(model, quantization="none", dtype=str(dtype).removeprefix("torch."))
    base = load_base(model, device)
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
