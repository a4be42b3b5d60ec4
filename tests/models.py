"""Tiny random decoders of the families that the shared layout must serve."""

from unittest import mock

import peft
import torch
import transformers

from dpo.config import PACKAGE
from dpo.model import kernels

QUICKSTART_MODEL = str(PACKAGE / "quickstart" / "model")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral sliding": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "gemma": {"head_dim": 8},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
}


def tiny(family: str = "llama", **overrides):
    """A float32 model with weights large enough for its predictions to differ by token."""
    torch.manual_seed(1)
    settings = {**SIZES, **FAMILIES.get(family, {}), **overrides}
    config = transformers.AutoConfig.for_model(family.split()[0], **settings)
    config.initializer_range = 0.2
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def with_lora(model, *, dropout: float = 0.0, zero: bool = False, r: int = 4):
    """LoRA on all linears; unless `zero`, its update is not zero."""
    settings = peft.LoraConfig(
        r=r,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(2)
    model = peft.get_peft_model(model, settings)
    if not zero:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def pefts_dropout_is_ours():
    """Within it, PEFT's layers draw on a CPU the masks that lean ones draw; on a GPU they do so."""
    plain = torch.nn.functional.dropout

    def drawn_alike(h, p=0.5, training=True, inplace=False):
        if h.is_cuda or not training:
            return plain(h, p, training, inplace)
        return kernels.dropout(h, p)[0]

    return mock.patch.object(torch.nn.functional, "dropout", drawn_alike)
