"""The optimizer, and its learning rate as a pure function of the step.

No scheduler object: there is no state of one to save, and Accelerate would step a prepared one once
per process. Left out on purpose: fused variants and parameter groups beyond weight decay.
"""

import math

import torch
from torch import nn

from dpo.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Rises linearly from 0 over `warmup_steps`, then falls to 0 at `total_steps` (cosine, linear) or
    stays (constant): the schedules of transformers' `get_scheduler`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    remaining = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / remaining)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.lr_scheduler_type]
    return config.learning_rate * factor


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that train; weight decay spares vectors (norms and biases)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    import bitsandbytes.optim as bnb

    optimizer = {
        "paged_adamw_32bit": bnb.PagedAdamW32bit,  # type: ignore[attr-defined]
        "paged_adamw_8bit": bnb.PagedAdamW8bit,  # type: ignore[attr-defined]
        "adamw_8bit": bnb.AdamW8bit,  # type: ignore[attr-defined]
    }[config.name]
    built = optimizer(groups, lr=config.learning_rate)
    # Its kernels write past PyTorch, which would not know that copies of the weights are old.
    built.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(trained))
    return built
