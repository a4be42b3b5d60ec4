"""From an adapter to a standalone model: the weights, and how they are saved.

A merge is only as good as its base. The adapter of a 4-bit run was trained on quantised weights and
belongs on those: quantise again as the run did, dequantise, add. The original 16-bit checkpoint,
into which the NeuralHermes article merges, is another model. Either base is loaded afresh:
bitsandbytes' CPU kernel repacks 4-bit weights in their first forward, and weights that are
dequantised after that are wrong.

The update is added in fp32, layer by layer, and rounded to the wanted type once. PEFT's safe merge
alone would round twice: the update, and then the sum.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import Config, ModelConfig
from dpo.errors import UserError
from dpo.model.load import dequantize, load_base, save_config
from dpo.model.named import base_of, save_tokenizer


def load_merge_base(
    config: Config, which: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Loads a base in plain layers, to merge into; it takes the memory of one model.

    Args:
        config: the run's.
        which: `dequantized`: quantised as in training, then dequantised; `16bit`: the checkpoint,
            never quantised, in `dtype`; `original`: an unquantised run's base, in its own type.
        dtype: the type that the merged model will have.
        device: where to load it.
    """
    model = base_of(config.model)
    if which == "16bit":
        model = replace(model, quantization="none", dtype=str(dtype).removeprefix("torch."))
    base = load_base(model, device)
    return dequantize(base) if which == "dequantized" else base


def load_adapter(base: PreTrainedModel, adapter: Path) -> nn.Module:
    """Puts PEFT's layers into the base, which `unload` takes out again."""
    import peft

    base.__dict__.pop("peft_config", None)  # PEFT leaves it behind, and warns of it
    return peft.PeftModel.from_pretrained(base, str(adapter)).eval()


def merge_adapter(base: PreTrainedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Adds the adapter to the base, in place; the merged model has the given type.

    PEFT does the merge, DoRA and rslora included; it is given fp32 weights, a layer at a time.

    Raises:
        UserError: a weight is too large for the type.
        ValueError: the adapter holds weights that are not finite (PEFT's safe merge).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained_dtype = base.dtype
    model = load_adapter(base, adapter)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.float()  # type: ignore[attr-defined]
            layer.merge(safe_merge=True)
            cast(layer.get_base_layer(), torch.float32, dtype)
    merged: PreTrainedModel = model.unload()  # type: ignore[operator,assignment]
    cast(merged, trained_dtype, dtype)
    return merged.eval()


def cast(module: nn.Module, source: torch.dtype, dtype: torch.dtype) -> None:
    """Casts the parameters of type `source` to `dtype`; those of another type keep it.

    Buffers keep theirs too: half-precision rotary frequencies would misplace tokens of long texts.

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
    source: ModelConfig,
    template: str | None,
    stops: Sequence[int],
    max_shard_size: str,
) -> None:
    """Writes safetensors, tokenizer with the chat template of training, and generation config.

    Args:
        model: the merged model, in plain layers.
        tokenizer: the run's.
        folder: where to write.
        source: the model before training, whose tokenizer files are kept.
        template: the chat template that training rendered with, None if there was none.
        stops: token ids that end an answer, all of those that training knew.
        max_shard_size: the largest size of a file, as transformers writes it: 5GB.
    """
    settings = model.generation_config
    assert settings is not None
    settings.eos_token_id = list(stops)
    pad = tokenizer.pad_token_id
    settings.pad_token_id = stops[0] if pad is None else pad  # type: ignore[assignment]
    try:
        settings.validate(strict=True)
    except ValueError:  # some bases name a temperature without this, and could not be saved
        settings.do_sample = True
    model.config.use_cache = True
    _untie(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_config(source, model, folder)
    save_tokenizer(source, tokenizer, template, folder)


def _untie(model: PreTrainedModel) -> None:
    """Writes embeddings and head as two matrices if they are no longer one.

    An adapter may have trained one of them; a config that calls them tied would lose the other.
    """
    text = model.config.get_text_config()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if text.tie_word_embeddings and not torch.equal(embeddings.weight, head.weight):  # type: ignore[union-attr,arg-type]
        text.tie_word_embeddings = model.config.tie_word_embeddings = False
