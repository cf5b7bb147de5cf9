"""The optimizer, and its rate at every step."""

from __future__ import annotations

import math

import torch

from settings.train import TrainConfig


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear over the first warmup share, then
    a cosine to zero at the end."""
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(params: list[torch.nn.Parameter], cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices only; a parameter's attribute `rate`, where it has one,
    scales its learning rate."""
    groups: dict[tuple, list] = {}
    for p in params:
        groups.setdefault((p.ndim < 2, getattr(p, "rate", 1.0)), []).append(p)
    settings = [
        {"params": ps, "weight_decay": 0.0 if vector else cfg.weight_decay, "rate": rate}
        for (vector, rate), ps in sorted(groups.items())
    ]
    return torch.optim.AdamW(settings, lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)


def set_rate(opt: torch.optim.Optimizer, lr: float) -> None:
    """Let every parameter of make_optimizer's learn at lr, by its own scale."""
    for group in opt.param_groups:
        group["lr"] = lr * group["rate"]


def optimizer_settings(cfg: TrainConfig) -> dict:
    """The settings besides a stage's own that a resumed run must share with the unbroken one."""
    names = ("warmup", "weight_decay", "beta1", "beta2", "grad_clip", "dtype")
    return {name: getattr(cfg, name) for name in names}


def optimizer_state(opt: torch.optim.Optimizer) -> dict:
    """What a checkpoint keeps of an optimizer: its state, rates as numbers, which captured steps
    hold in tensors."""
    state = opt.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state
