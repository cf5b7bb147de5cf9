"""What a path of value groups learns from calibration text before any training: its basis, its map
from keys, its router."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from model import Attention, evaluating
from reconstruct import Moments, as_held, fit_router
from routing.bases import value_basis
from routing.in_window import attention_received


@torch.no_grad()
def calibrate(
    model: nn.Module, chosen: list, paths: list, batches: list[Tensor], basis: str, seed: int
) -> None:
    """Set bases, maps from keys and routers of the paths that are to stand in `chosen` attentions,
    in place. basis: a kind of value_basis; batches: token ids (B, T)."""
    moments = observe(model, chosen, paths, batches, to_tell=True)
    for i, (attn, seen) in enumerate(zip(chosen, moments, strict=True)):
        cov = seen.cov
        key_map = None
        if paths[i].key_map is not None:  # the basis is that of what keys do not tell
            key_map, cov = seen.from_keys()
        maps = value_basis(basis, cov, attn.o_proj.weight, seed * 1000 + i)
        paths[i].set_basis(*maps)
        if key_map is not None:
            paths[i].key_map.copy_(as_held(paths[i], key_map @ torch.block_diag(*maps[0])))
    if any(path.router is not None for path in paths):
        moments = observe(model, chosen, paths, batches)  # again, in the new basis
        for path, seen in zip(paths, moments, strict=True):
            fit_router(path.router, seen.xx, seen.xe)


def observe(
    model: nn.Module, chosen: list, paths: list, batches: list[Tensor], to_tell: bool = False
) -> list[Moments]:
    """Run batches through the model as it is, and add up what the new paths would see. to_tell:
    for maps from keys, too."""
    moments = [Moments(path) for path in paths]

    def see(i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        received = None
        if to_tell and paths[i].key_map is not None:
            received = attention_received(q, k, paths[i].cap)
        moments[i].add(x, k, v, received)

    with evaluating(model), record_layers(chosen, see):
        for idx in batches:
            model(idx, last_only=True)
    return moments


@contextmanager
def record_layers(layers: list[Attention], see: Callable[..., None]):
    """Call see(i, x, q, k, v) inside the `with` whenever the path of layers[i] runs its forward
    verb: how calibration and diagnosis look into a model without changing it."""

    def hook_of(i: int):
        return lambda module, args: see(i, *args[:4])

    hooks = [a.kv_path.register_forward_pre_hook(hook_of(i)) for i, a in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
