"""The optimizer, and its learning rate as a pure function of the step.

No scheduler object: it would be state to save, and Accelerate would step a prepared one once per
process. Half-precision weights get fp32 copies that take the steps.
Left out on purpose: fused variants and parameter groups beyond weight decay.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpo.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Rises linearly from 0 over the warm-up, then falls to 0 at `total_steps` (cosine, linear) or
    stays (constant): the schedules of transformers' `get_scheduler`.
    """
    warmup = config.num_warmup_steps(total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.lr_scheduler_type]
    return config.learning_rate * factor


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that train; weight decay spares vectors (norms and biases)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if all(p.dtype.itemsize >= 4 for p in trained):
        return _adamw(groups, config)
    return MasterWeights(groups, lambda group: _adamw([group], config))


class MasterWeights(torch.optim.Optimizer):
    """Steps an fp32 copy of every half-precision weight, and rounds it into the weight.

    A step of AdamW changes a weight by about the learning rate; bfloat16 has 8 bits, so a weight of
    0.1 would lose every change below 2e-4. The copies are optimizer state: 4 bytes per weight. Each
    weight has an optimizer of its own, so that only one fp32 gradient exists at a time.

    Args:
        groups: as any optimizer takes them.
        build: makes the optimizer of a group of one copy.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        build: Callable[[dict[str, Any]], torch.optim.Optimizer],
    ):
        super().__init__(groups, {"lr": 0.0})
        self._copies: list[tuple[nn.Parameter, Tensor, torch.optim.Optimizer]] = []
        for group in self.param_groups:
            for weight in group["params"]:
                copy = nn.Parameter(weight.detach().float())
                self._copies.append((weight, copy, build({**group, "params": [copy]})))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all weights that have a gradient, at their group's learning rate."""
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        for rate, (weight, copy, optimizer) in zip(rates, self._copies, strict=True):
            if weight.grad is None:
                continue
            copy.grad = weight.grad.float()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            copy.grad = None
            weight.copy_(copy)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The copies, and the state of their optimizers."""
        return {
            "copies": [copy.detach() for _, copy, _ in self._copies],
            "optimizers": [optimizer.state_dict() for *_, optimizer in self._copies],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restores what `state_dict` gave."""
        saved = zip(state_dict["copies"], state_dict["optimizers"], strict=True)
        for (weight, copy, optimizer), (its_copy, its_state) in zip(
            self._copies, saved, strict=True
        ):
            copy.copy_(its_copy)
            weight.copy_(copy)
            load_moments(optimizer, its_state)


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores the moments of AdamW; its options are the configuration's, which is the same.

    Raises:
        ValueError: they do not belong to these weights; a kernel would read beyond their end.
    """
    if isinstance(optimizer, MasterWeights):
        optimizer.load_state_dict(saved)
        return
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
    for weight, state in optimizer.state.items():
        names = ("state1", "state2") if "state1" in state else ("exp_avg", "exp_avg_sq")
        blocks = math.ceil(weight.numel() / 256)  # of 8-bit moments, each with a scale
        wanted = dict.fromkeys(names, weight.shape) | {"qmap1": (256,), "absmax1": (blocks,)}
        wanted |= {"qmap2": (256,), "absmax2": (blocks,)}
        if not float(state["step"]) >= 0:
            raise ValueError(f"the optimizer's step is {state['step']}")
        for name, shape in wanted.items():
            if (name in names or name in state) and tuple(state[name].shape) != tuple(shape):
                raise ValueError(
                    f"the optimizer's {name} is {tuple(state[name].shape)}, wanted {tuple(shape)}"
                )


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    import bitsandbytes.optim as bnb

    optimizer = {
        "paged_adamw_32bit": bnb.PagedAdamW32bit,  # type: ignore[attr-defined]
        "paged_adamw_8bit": bnb.PagedAdamW8bit,  # type: ignore[attr-defined]
        "adamw_8bit": bnb.AdamW8bit,  # type: ignore[attr-defined]
    }[config.name]
    built = optimizer(groups, lr=config.learning_rate)
    # Its kernels bypass PyTorch, which would not know that casts of the weights are stale.
    weights = [weight for group in groups for weight in group["params"]]
    built.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(weights))
    return built
