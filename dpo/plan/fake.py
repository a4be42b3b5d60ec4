"""A policy without numbers: what a model needs, to the byte, before any weight is loaded.

Its tensors are fake: shapes and types that PyTorch propagates as it would compute. So config.json
is enough, a 70B model fits a laptop, and every family, adapter and layout is measured by its own
code instead of a formula. Quantised layers are run as plain ones of their compute type, which save
the same activations; what they store is counted here.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo.config import Config, ModelConfig
from dpo.data.stream import TokenizedPair, build_stream
from dpo.model.load import Policy, build_policy, without_peft
from dpo.model.named import check_stored_quantization, explained, load_shape
from dpo.model.reference import adapter_off
from dpo.model.scorer import Scorer
from dpo.plan.memory import PeakBytes

QUANTIZATION_BLOCK = 64  # 4-bit weights that share one fp32 maximum (bitsandbytes' default)


class FakePolicy:
    """The policy that a configuration asks for, from config.json alone.

    Attributes:
        policy: with fake tensors; run it inside `mode`.
        scorer: the policy's.
    """

    def __init__(self, config: Config):
        self._quantization = config.model.quantization
        self.policy = without_numbers(config)
        self.mode = FakeTensorMode()
        with self.mode:
            _to_fake(self.policy.model)
            self.scorer = Scorer(self.policy.model, config.model.attention, has_numbers=False)
            # Warm-up: one-off allocations must not count in step_bytes.
            with torch.no_grad():
                self._score_both(build_stream([([0], [0], [0])]))

    @property
    def base(self) -> PreTrainedModel:
        """The model without PEFT's wrapper; its layers may hold adapters."""
        return without_peft(self.policy.model)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.policy.model.parameters() if p.requires_grad]

    def base_bytes(self, *, dequantized: bool = False) -> int:
        """Bytes of the base's weights as they are stored, or once a 4-bit base is dequantised."""
        layers = () if dequantized else self._quantised_layers()
        quantised = {id(layer.weight): layer for layer in layers}
        return sum(
            _stored_bytes(quantised[id(p)], self._quantization) if id(p) in quantised else _bytes(p)
            for name, p in self.base.named_parameters()
            if "lora_" not in name
        )

    def adapter_bytes(self) -> int:
        """Bytes of LoRA's weights, in both adapters if a frozen one is the reference."""
        return sum(_bytes(p) for name, p in self.base.named_parameters() if "lora_" in name)

    def cast_bytes(self) -> int:
        """Bytes of the copies of LoRA's weights that lean layers keep in the model's type."""
        kept = (getattr(p, "_cast_once", None) for p in self.base.parameters())
        return sum(_bytes(state_and_copy[1]) for state_and_copy in kept if state_and_copy)

    def dequantised_bytes(self) -> int:
        """Bytes of the largest weight, dequantised for its product; one is alive at a time."""
        return max((_bytes(layer.weight) for layer in self._quantised_layers()), default=0)

    def num_base_weights(self) -> int:
        """How many numbers the base has."""
        return sum(p.numel() for name, p in self.base.named_parameters() if "lora_" not in name)

    def step_bytes(self, pairs: Sequence[TokenizedPair]) -> int:
        """Peak bytes of one micro-batch, beyond weights and gradients.

        It includes saved activations, what is allocated beside them, and the head's tile.
        """
        with self.mode:
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            stream = build_stream(pairs)
            with PeakBytes() as count:
                self._score_both(stream).sum().backward()
        return count.peak

    def _score_both(self, stream: Any) -> torch.Tensor:
        """Log-probs under the policy; the reference's are computed for the memory they take."""
        with _experts_of_any_type():
            logps = self.scorer(stream)
            with torch.no_grad():
                if self.policy.is_adapted:
                    with adapter_off(self.policy):
                        self.scorer(stream)
                else:  # a frozen copy does the same
                    self.scorer(stream)
        return logps

    def _quantised_layers(self) -> Iterator[nn.Linear]:
        """The linear layers that bitsandbytes takes: all but the head and the adapters."""
        head = self.base.get_output_embeddings()
        for name, module in self.base.named_modules():
            if module is head or "lora_" in name or self._quantization == "none":
                continue
            if isinstance(module, nn.Linear):
                yield module


def without_numbers(config: Config) -> Policy:
    """The policy's shapes alone, on the meta device; nothing can be run.

    Raises:
        UserError: there is no such model, or it is no causal language model.
    """
    base = meta_model(config.model)
    with warnings.catch_warnings():  # an adapter's numbers are read and then dropped
        warnings.filterwarnings("ignore", message=".*to a meta parameter")
        return build_policy(base.train(), config)


def meta_model(model: ModelConfig) -> PreTrainedModel:
    """The base's shapes alone, on the meta device.

    Raises:
        UserError: there is no such model, or it is no causal language model.
    """
    check_stored_quantization(model)
    shape = load_shape(model)
    dtype = shape.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    problem = "whose config.json describes no causal language model"
    with (
        explained(f"model.name_or_path: got {model.path!r}, {problem}", "Name one."),
        torch.device("meta"),
    ):
        return AutoModelForCausalLM.from_config(
            shape, dtype=dtype or torch.float32, trust_remote_code=model.trust_remote_code
        )


@contextmanager
def _experts_of_any_type() -> Iterator[None]:
    """Inside, experts are multiplied by transformers' own operator.

    Torch's takes the same memory, but only bfloat16 where tensors are fake.
    """
    from transformers.integrations import moe

    ask = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *tensors: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = ask


def _to_fake(model: nn.Module) -> None:
    """Replaces each meta tensor by a fake one of the same shape; tied weights stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_parameter = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                tensors[name] = made[id(old)]  # type: ignore[assignment]


def _stored_bytes(layer: nn.Linear, quantization: str) -> int:
    """Bytes of a quantised weight: 4 bits and a maximum per block, or 8 and a scale per row."""
    if quantization == "int8":
        return layer.weight.numel() + 4 * layer.out_features
    return layer.weight.numel() // 2 + 4 * math.ceil(layer.weight.numel() / QUANTIZATION_BLOCK)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
