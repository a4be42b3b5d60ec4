"""Model, quantisation, adapter: from a configuration to a policy that can train.

Two things are ensured here, because the reference must be what the policy is at step 0: every
dropout but LoRA's is set to 0 for both passes, and 4-bit layers never run in evaluation mode.

Left out on purpose: PEFT's `prepare_model_for_kbit_training`. It upcasts the head and the
embeddings to fp32, which costs memory; our head accumulates in fp32 whatever its weights are.
"""

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from dpo.config import Config, ModelConfig
from dpo.errors import UserError
from dpo.model.lean import make_lean
from dpo.model.named import (
    Adapter,
    adapter_of,
    base_of,
    check_stored_quantization,
    explained,
    from_hub_or_disk,
    load_shape,
    local_folder,
)

REFERENCE_ADAPTER = "reference"  # the frozen copy of an adapter that the policy starts from


REFERENCE_IN_NAME = re.compile(rf"\.{REFERENCE_ADAPTER}(?=\.|$)")


@dataclass
class Policy:
    """A model that is ready to train.

    Attributes:
        model: a PEFT model, or a plain one for full fine-tuning.
        has_reference_adapter: a frozen adapter lies beside the trained one, since that was loaded
            and is not new, or since the reference will move.
        notes: what was changed or left out, for the run header.
    """

    model: nn.Module
    has_reference_adapter: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter trains, and not every weight."""
        return is_adapted(self.model)


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT wraps the model."""
    return hasattr(model, "peft_config")


def without_peft(model: nn.Module) -> PreTrainedModel:
    """The model that PEFT wraps, or the model itself; its layers may hold adapters."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator,return-value]


def load_policy(config: Config, device: torch.device | str, *, dequantized: bool = False) -> Policy:
    """Loads the base in the configured type, quantises it, and adds or loads the adapter.

    Args:
        config: of the run.
        device: where the weights go.
        dequantized: dequantise a 4-bit base once; its weights stay as 4 bits left them.

    Raises:
        UserError: not found, weights missing, an adapter that PEFT cannot place, or one whose
            reference could not be restored.
    """
    if adapter_of(config.model) and config.model.adapter == "none":
        raise UserError(
            f"model.adapter: got none, but {config.model.path} is an adapter. Set model.adapter to "
            "lora, or merge it first and name the merged model."
        )
    base = load_base(base_of(config.model), device)
    return build_policy(dequantize(base) if dequantized else base, config)


def build_policy(base: PreTrainedModel, config: Config) -> Policy:
    """Chooses what trains and adds or loads the adapter; the base may have no numbers (meta)."""
    adapter = adapter_of(config.model)
    policy = Policy(base)
    policy.notes += [f"set to 0 in both passes: {name}" for name in zero_dropouts(base)]
    if getattr(base.config.get_text_config(), "router_aux_loss_coef", None):
        policy.notes.append("the router's auxiliary loss is left out: DPO alone is minimised")
    if config.model.adapter == "none":
        policy.notes.append("full fine-tuning: lora.* is not used")
    else:
        base.requires_grad_(False)
        will_move = config.reference.update != "never"
        policy.has_reference_adapter = adapter is not None or will_move
        policy.model = (
            _load_adapter(base, config, adapter, policy.notes)
            if adapter
            else _new_adapter(base, config)
        )
        if will_move and not adapter:
            _copy_adapter(policy.model)
    if config.model.lean_layers:
        policy.notes.append(make_lean(policy.model))
    if config.train.gradient_checkpointing:
        checkpoint_layers(base)
    policy.model.train()
    return policy


def checkpoint_layers(base: PreTrainedModel, every_n: int = 1) -> None:
    """Turns gradient checkpointing on in every n-th layer.

    Raises:
        UserError: the model's code cannot do that.
    """
    try:
        base.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=every_n
        )
    except ValueError as error:
        raise UserError(
            f"train.gradient_checkpointing: {error} Set it to false, and "
            "train.tokens_per_microbatch lower."
        ) from None


def compile_layers(base: PreTrainedModel, device: torch.device) -> None:
    """Compiles every decoder layer by itself, for any number of tokens; in place.

    Attention and lean products are left out (`torch.compiler.disable`): only the operations between
    them are fused. One graph serves all layers.

    Raises:
        UserError: nothing can be compiled here.
    """
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # each backend fails in its own way
        raise UserError(
            f"model.compile: got true, but torch.compile does not work here "
            f"({str(error).strip().splitlines()[0]}). Install a C++ compiler (on a GPU: triton), "
            "or set it to false."
        ) from None
    for module in base.modules():
        if type(module).__name__ in (base._no_split_modules or ()):
            module.compile(dynamic=True)


def load_base(model: ModelConfig, device: torch.device | str) -> PreTrainedModel:
    """A whole model, quantised as configured, in train mode; every weight must be in the files."""
    options: dict[str, Any] = {"dtype": "auto" if model.dtype == "auto" else model.dtype}
    is_stored_so = check_stored_quantization(model) is not None
    wanted = "none" if is_stored_so else model.quantization  # what is still to be done
    if wanted in ("nf4", "fp4"):
        own = load_shape(model).dtype if model.dtype == "auto" else getattr(torch, model.dtype)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=wanted,
            bnb_4bit_compute_dtype=own or torch.float32,
        )
    elif wanted == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    transformers_logging.disable_progress_bar()
    base, info = from_hub_or_disk(
        AutoModelForCausalLM,
        model,
        device_map={"": str(device)},
        output_loading_info=True,
        use_safetensors=None if model.allow_pickle else True,
        **options,
    )
    if info["missing_keys"]:
        raise UserError(
            f"model.name_or_path: {model.path} lacks {len(info['missing_keys'])} weights, among "
            f"them {', '.join(sorted(info['missing_keys'])[:5])}: they would be random. Take a "
            "whole checkpoint."
        )
    for module in base.modules() if is_stored_so else ():
        if hasattr(module, "compute_dtype"):  # as if it were quantised now
            module.compute_dtype = base.dtype
    keep_4bit_trainable(base)
    return base.train()


def dequantize(base: PreTrainedModel) -> PreTrainedModel:
    """Replaces quantised layers by plain ones with the weights that they compute with."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns about precision lost at quantisation
    base.dequantize()
    base.__dict__.pop("_weight_conversions", None)  # from 4 bits in the files: not the way back
    transformers_logging.set_verbosity(verbosity)
    return base


def save_config(model: ModelConfig, trained: PreTrainedModel, folder: Path) -> None:
    """Writes the base's own config.json, with what training or a merge has changed.

    Older versions of transformers do not find in a newer one's what their own called otherwise, and
    compute with other rotary frequencies without a word.
    """
    own = json.loads((local_folder(base_of(model)) / "config.json").read_text())
    own.pop("quantization_config", None)
    own["torch_dtype" if "torch_dtype" in own else "dtype"] = str(trained.dtype).split(".")[1]
    own |= {"tie_word_embeddings": trained.config.tie_word_embeddings, "use_cache": True}
    (folder / "config.json").write_text(json.dumps(own, indent=2))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Puts the trained weights of a checkpoint, of `best/` or of `final/` into the policy."""
    if is_adapted(model):
        import peft

        weights = load_file(folder / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(model, weights, adapter_name="default")
        return
    files = sorted(folder.glob("model*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    # A head that is tied to the embeddings is stored once.
    assert all("lm_head" in name for name in missing), missing


def keep_4bit_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit layers in train mode, whatever mode the model is in.

    In eval mode without gradients their CPU kernel repacks the weights in place, for good:
    afterwards no gradient passes through them and their outputs have moved (bitsandbytes 0.50).
    """
    for module in model.modules():
        is_4bit = type(module).__name__ == "Linear4bit"
        # PEFT's layer around it has the same name, and LoRA's dropout inside: leave that as it is.
        is_own = type(module).__module__.startswith("bitsandbytes")
        if is_4bit and is_own and not hasattr(module, "kept_trainable"):
            module.register_forward_pre_hook(_to_train_mode)
            module.kept_trainable = True  # type: ignore[assignment]


def _to_train_mode(layer: nn.Module, _: Any) -> None:
    layer.training = True


def zero_dropouts(model: nn.Module) -> list[str]:
    """Sets every dropout rate outside LoRA to 0; returns the names of those that were above."""
    changed = set()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        for key, value in vars(module).items():
            is_rate = key == "p" if isinstance(module, nn.Dropout) else "drop" in key
            if is_rate and isinstance(value, float) and value > 0:
                setattr(module, key, 0.0)
                changed.add(f"{type(module).__name__}.{key} {value:g}")
    return sorted(changed)


def _new_adapter(base: PreTrainedModel, config: Config) -> nn.Module:
    import peft

    lora = config.lora
    torch.manual_seed(config.train.seed)  # lora_A is random
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        init_lora_weights=lora.init,  # type: ignore[arg-type]
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    try:
        adapted = peft.get_peft_model(base, settings)
    except ValueError as error:
        is_about_dropout = "dropout" in str(error)
        remedy = (
            "Set lora.dropout to 0: PEFT has none for such weights"
            if is_about_dropout
            else "Name linear layers of this model, or all-linear"
        )
        raise UserError(
            f"lora.{'dropout' if is_about_dropout else 'target_modules'}: got "
            f"{lora.dropout if is_about_dropout else lora.target_modules!r}, which PEFT cannot "
            f"place: {error} {remedy}."
        ) from None
    _check_no_tied_adapter(base)
    return adapted


def _check_no_tied_adapter(base: PreTrainedModel) -> None:
    """Refuses an adapter on weights that two layers share: merged, it would change both."""
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        if tied and hasattr(layer, "lora_A"):
            raise UserError(
                "lora.target_modules: an adapter is on the embeddings, which the head shares "
                "(tie_word_embeddings): it could not be merged. Name other layers, or all-linear."
            )


def _load_adapter(
    base: PreTrainedModel, config: Config, adapter: Adapter, notes: list[str]
) -> nn.Module:
    """The adapter to train on, and beside it the same adapter again, frozen: the reference."""
    import peft

    folder, settings = str(adapter.folder), adapter.settings
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise UserError(
            f"model.name_or_path: the adapter in {config.model.path} is "
            f"{settings.get('peft_type')} with bias {settings.get('bias')!r}, wanted LORA with "
            "bias 'none': PEFT cannot switch others off exactly, so there would be no reference. "
            "Merge it and start from the merged model."
        )
    is_pickle = not (adapter.folder / "adapter_model.safetensors").exists()
    if is_pickle and not config.model.allow_pickle:
        raise UserError(
            f"model.allow_pickle: the adapter in {config.model.path} has no "
            "adapter_model.safetensors. Save it as safetensors, or set this key to true: a pickle "
            "is then read by torch's restricted reader."
        )
    with explained(
        f"model.name_or_path: the adapter in {config.model.path} does not load onto "
        f"{settings['base_model_name_or_path']}",
        "Check that its files are whole and that this is its base. An adapter over a vocabulary "
        "that was resized needs the resized model as its base.",
    ):
        loaded = peft.PeftConfig.from_pretrained(folder)
        loaded.lora_dropout = config.lora.dropout  # type: ignore[attr-defined]
        notes.append(
            f"adapter from {config.model.path}: r {settings['r']}, alpha {settings['lora_alpha']}, "
            f"on {settings['base_model_name_or_path']}; of lora.*, only dropout is used"
        )
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, config=loaded)
        _check_no_tied_adapter(base)
        frozen = peft.PeftConfig.from_pretrained(folder)
        frozen.lora_dropout = 0.0  # type: ignore[attr-defined]
        model.add_adapter(REFERENCE_ADAPTER, frozen)
        model.load_adapter(folder, REFERENCE_ADAPTER, is_trainable=False)
        model.set_adapter("default")
    return model


def _copy_adapter(model: nn.Module) -> None:
    """Puts a frozen copy of the new adapter beside it."""
    frozen: Any = copy.deepcopy(model.peft_config["default"])  # type: ignore[index,union-attr]
    frozen.lora_dropout = 0.0
    model.add_adapter(REFERENCE_ADAPTER, frozen, low_cpu_mem_usage=True)  # type: ignore[operator]
    weights = dict(model.named_parameters())
    for name in filter(REFERENCE_IN_NAME.search, weights):
        theirs = weights[REFERENCE_IN_NAME.sub(".default", name)]
        place, _, own_name = name.rpartition(".")
        copied = nn.Parameter(theirs.detach().clone(), requires_grad=False)
        setattr(model.get_submodule(place), own_name, copied)
    model.set_adapter("default")  # type: ignore[operator]
