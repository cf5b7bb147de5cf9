"""Small models whose KV heads are shared: mixSGA and its rivals."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers import TINY, tiny_model

import mixsga
from baselines import shared_heads
from config import KVConfig
from settings.experts import MixConfig

EIGHT = replace(TINY, n_head=8, n_kv_head=8)


def with_random_routers(model: torch.nn.Module) -> torch.nn.Module:
    """Draw the routers and offsets of a model's experts, in place."""
    torch.manual_seed(7)
    for path in mixsga.experts(model):
        if path.router is not None:
            torch.nn.init.normal_(path.router.weight, std=1.0)
            torch.nn.init.normal_(path.router.bias, std=1.0)
            torch.nn.init.normal_(path.offset, std=0.3)
    return model


def made(kv: str = "mixsga", cfg=EIGHT, dtype=torch.float64, tail: int = 0, **mix):
    """A random model with such paths and random routers, evaluation mode."""
    model = shared_heads.attach(
        tiny_model(dtype=dtype, cfg=cfg), KVConfig(kv=kv, kv_tail=tail), MixConfig(**mix)
    )
    return with_random_routers(model)


SETTINGS = {
    "3:1:6": dict(kv="mixsga"),
    "1:1:0": dict(kv="mixsga", expert_ratios="1:1:0"),
    "two": dict(kv="mixsga", group_sizes="2,8", expert_ratios="1:3"),
    "random": dict(kv="mixsga", expert_router="random"),
    "groups": dict(kv="mixsga", expert_groups=2),
    "gqa": dict(kv="gqa", kv_share=0.35),
    "cla": dict(kv="cla"),
    "tail": dict(kv="mixsga", tail=5),
    "gqa tail": dict(kv="gqa", tail=1),
    "cla tail": dict(kv="cla", tail=4),
    "groups tail": dict(kv="mixsga", expert_groups=1, tail=30),
}
