"""Caches in files: one safetensors file with every tensor held, a fingerprint of the model, how
each layer stores, and a checksum.

A cache makes sense only to the model that filled it. So a file says which weights those were, and
is refused by name where they, or the way of storing, differ; a damaged one is refused, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, fields

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import check
from storage.cache import KVCache
from storage.layout import cdiv
from storage.state import refuse_difference

FORMAT = "5"
SAMPLE = 65536  # numbers of a tensor that the fingerprint looks at, evenly spread
# Buffers that are no part of the fingerprint, by how their names begin: RoPE's tables follow from
# the settings, and drop_weight is asked only when a prompt's tokens are chosen. A cache that was
# saved before a model had them is read.
NO_PART = ("rope_", "selector.drop_weight")


def numbers_hash(tensors: dict[str, Tensor], sample: int = 0) -> str:
    """Hash names, shapes, types and numbers (sample > 0: so many of each tensor, evenly spread)."""
    out = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().flatten()
        out.update(f"{name} {tuple(tensors[name].shape)} {t.dtype}\n".encode())
        if sample and t.numel() > sample:
            t = t[:: cdiv(t.numel(), sample)]
        out.update(t.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def fingerprint(model) -> str:
    """Identify a model's weights, bases, routers and adapters with their scale included.

    Of every tensor it has SAMPLE numbers, evenly spread, and the sum of all bits, which is the same
    in any order and on any device."""
    tensors = dict(model.named_parameters())
    for name, t in model.named_buffers():
        if not name.startswith(NO_PART):
            tensors[name] = t
    sums = {f"{name} bits": bit_sum(t) for name, t in tensors.items()}
    scales = {
        f"{name} scaling": torch.tensor(module.scaling, dtype=torch.float64)
        for name, module in model.named_modules()
        if hasattr(module, "scaling")
    }
    return numbers_hash({**tensors, **sums, **scales}, SAMPLE)


def bit_sum(t: Tensor) -> Tensor:
    """Add up the numbers of t as integers of the same bits, modulo 2^64: int64."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(integers[t.element_size()]).sum(dtype=torch.int64)


def layer_settings(layer) -> dict[str, str]:
    """Return how a layer's cache stores, and what of the model is needed to read it, by name."""
    settings = {name: str(value) for name, value in layer.settings().items()}
    return settings | {name: numbers_hash({name: t})[:12] for name, t in layer.constants().items()}


def model_settings(model) -> dict[str, str]:
    """Return what of a model's shape keys and values depend on, and its weights."""
    shape = {name: str(value) for name, value in asdict(model.cfg).items() if name != "block_size"}
    return shape | {"weights": fingerprint(model)}


def tensors_of(cache: KVCache) -> dict[str, Tensor]:
    """Return every tensor that a cache holds, "3.keys" for layer 3; layers may share some."""
    named = {}
    for i, layer in enumerate(cache.layers):
        named |= {f"{i}.{name}": t for name, t in layer.state_dict().items()}
    return named


def about(cache: KVCache, model) -> dict:
    """Return what has to be known of a cache besides its tensors, as JSON takes it. ValueError for
    one that cannot be used."""
    cache.check_usable()
    return {
        "layers": [layer_settings(layer) for layer in cache.layers],
        "model": model_settings(model),
        "fresh": cache.layers[0].fresh,
    }


def rebuilt(about: dict, tensors: dict[str, Tensor], model) -> KVCache:
    """Make the cache of `model` that `about` and tensors_of were taken of. KeyError, TypeError or
    ValueError where they are not those of such a cache."""
    held = [t for name, t in tensors.items() if name.endswith("n_window") and t.ndim]
    check(bool(held), "no sequences", "the tensors of a cache", "save it again")
    cache = model.new_cache(len(held[0]), 1)
    of_layer: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        number, _, own = name.partition(".")
        of_layer.setdefault(number, {})[own] = t
    n = len(about["layers"])
    check(n == len(cache.layers), f"{n} layers", f"{len(cache.layers)}", "use its own model")
    for i, (layer, saved) in enumerate(zip(cache.layers, about["layers"], strict=True)):
        if "keep_all" in saved and hasattr(layer, "keep_all"):  # known once a context is packed
            layer.keep_all = saved["keep_all"] == str(True)
        refuse_difference(layer_settings(layer), saved, f"layer {i}")
        layer.load_state_dict(of_layer.get(str(i), {}))
        layer.fresh = bool(about["fresh"])
    # a setting that had no name when it was saved has its usual value
    usual = {f.name: str(f.default) for f in fields(model.cfg) if f.name != "block_size"}
    refuse_difference(model_settings(model), usual | about["model"], "the model")
    lengths = torch.stack([layer.lengths for layer in cache.layers])
    alike = bool((lengths == lengths[0]).all())
    check(alike, "layers of unequal lengths", "the same tokens in all", "save it again")
    cache.length = int(lengths.max()) if lengths.numel() else 0
    return cache


def save_cache(cache: KVCache, path: str | os.PathLike, model) -> None:
    """Write a cache; what layers share is written once for each of them."""
    text = json.dumps(about(cache, model))
    # layers may share storage, which the format refuses
    whole = torch.contiguous_format
    tensors = {name: t.detach().clone(memory_format=whole) for name, t in tensors_of(cache).items()}
    digest = hashlib.sha256((numbers_hash(tensors) + text).encode()).hexdigest()
    save_file(tensors, path, {"format": FORMAT, "about": text, "sha256": digest})


def load_cache(path: str | os.PathLike, model) -> KVCache:
    """Read a cache that save_cache wrote for this model, to its device."""
    try:
        return rebuilt(*_read(path, str(model.norm.weight.device)), model)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as e:
        raise ValueError(
            f"{path} is not a cache of this model ({e}); give a file that KVCache.save wrote for it"
        ) from None


def _read(path: str | os.PathLike, device: str) -> tuple[dict, dict[str, Tensor]]:
    """Read a file and compare its checksum."""
    with safe_open(path, "pt", device=device) as f:
        meta = f.metadata() or {}
        # copied: tensors begin at any multiple of 8 bytes, and unaligned ones are summed otherwise
        names = list(f.keys())
        tensors = {name: f.get_tensor(name).clone() for name in names}
    check(
        meta.get("format") == FORMAT,
        f"format {meta.get('format')!r}",
        f"format {FORMAT}",
        "save it again",
    )
    digest = hashlib.sha256((numbers_hash(tensors) + meta["about"]).encode()).hexdigest()
    check(
        digest == meta["sha256"], "damaged numbers", "the numbers that were saved", "save it again"
    )
    return json.loads(meta["about"]), tensors
