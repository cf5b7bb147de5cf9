"""A model's layers on several devices, each layer's cache beside it: generation with a model larger
than one GPU.

    model = split(run.model, ["cuda:0", "cuda:1"])     # loaded on the CPU
    rows, cache = generate(model, prompts, 100)

The first layers, the embeddings and the head lie on the first device, the others in order on the
rest. Hidden states go from device to device with the layers; the devices work one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from config import check
from loaders.device import pick_device
from model import Block, Transformer

# How a layer may store: in others, layers read what others keep, or are chosen for together.
SPLIT = ("dense", "value_groups", "mixsga", "gqa")


def devices_of(names: str | Sequence[str]) -> list[torch.device]:
    """Return the devices of a list of names, or of "cuda:0,cuda:1". ValueError for one that does
    not exist."""
    parts = names.split(",") if isinstance(names, str) else names
    return [pick_device(str(name).strip()) for name in parts]


def split(model: Transformer, devices: str | Sequence[str], kv: str = "dense") -> Transformer:
    """Move the layers to the devices, as many to each as can be, in place, and return the model.

    kv: how it stores, with everything that --kv attaches in its place already. ValueError where
    its layers store together. Steps are not captured in CUDA graphs, and the weights keep their
    dtype."""
    check(
        kv in SPLIT,
        f"kv={kv} split over devices",
        f"{', '.join(SPLIT)}, whose layers store each for itself",
        "choose one of them, or one device",
    )
    places = devices_of(devices)
    for name, module in model.named_children():
        if name != "layers":
            module.to(places[0])
    for name, table in model.rope_tables().items():
        setattr(model, name, table.to(places[0]))
    model.norm.register_forward_pre_hook(lambda _, args: moved(places[0], args))
    n = len(model.layers)
    for i, block in enumerate(model.layers):
        put(block, places[i * len(places) // n])
    model.decode_step = partial(
        model.decode_step,
        before=lambda block, *args: there(block.device, Block.before)(block, *args),
        after=lambda block, *args: there(block.device, Block.after)(block, *args),
    )
    return model


def put(block: Block, device: torch.device) -> None:
    """Move a layer to a device, where it and its cache do their work from now on."""
    block.to(device)
    block.device = device
    block.forward = there(device, block.forward)
    attn = block.self_attn
    attn.read = there(device, attn.read)
    attn.kv_path.new_cache = there(device, attn.kv_path.new_cache)
    attn.kv_path.graph_safe = lambda: False


def there(device: torch.device, call: Callable) -> Callable:
    """Return `call`, done on a device: its tensors are moved there first, and kernels start
    there."""

    def on_device(*args):
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with current:
            return call(*moved(device, args))

    return on_device


def moved(device: torch.device, args: tuple) -> tuple:
    """Return arguments, those that are tensors on a device; modules and caches stay."""
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def layers_by_device(model: nn.Module) -> dict[str, int]:
    """Count the layers on each device of a split model."""
    counts: dict[str, int] = {}
    for block in model.layers:
        counts[str(block.device)] = counts.get(str(block.device), 0) + 1
    return counts
