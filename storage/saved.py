"""Caches in files: one safetensors file with every tensor held, a fingerprint of the model, how
each layer stores, and a checksum.

A cache makes sense only to the model that filled it. So a file says which weights those were, and
is refused by name where they, or the way of storing, differ; a damaged one is refused, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import check
from storage.cache import KVCache, refuse_difference

FORMAT = "4"
SAMPLE = 65536  # numbers of a tensor that the fingerprint looks at, evenly spread


def numbers_hash(tensors: dict[str, Tensor], sample: int = 0) -> str:
    """Hash names, shapes, types and numbers (sample > 0: so many of each tensor, evenly spread)."""
    out = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().flatten()
        out.update(f"{name} {tuple(tensors[name].shape)} {t.dtype}\n".encode())
        if sample and t.numel() > sample:
            t = t[:: -(-t.numel() // sample)]
        out.update(t.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def fingerprint(model) -> str:
    """Identify a model by its weights, bases and router included."""
    tensors = dict(model.named_parameters())
    for name, t in model.named_buffers():
        if not name.startswith("rope_"):
            tensors[name] = t
    return numbers_hash(tensors, SAMPLE)


def described(cache: KVCache, model) -> dict[str, Any]:
    """Return what a file says of a cache beside its tensors."""
    layers = [{k: str(v) for k, v in layer.settings().items()} for layer in cache.layers]
    return {"layers": layers, "model": fingerprint(model), "length": cache.length}


def save_cache(cache: KVCache, path: str | os.PathLike, model) -> None:
    """Write a cache; what layers share is written once for each of them."""
    cache.check_usable()
    tensors = {}
    for i, layer in enumerate(cache.layers):
        for name, t in layer.state_dict().items():
            # layers may share storage, which the format refuses
            tensors[f"{i}.{name}"] = t.detach().clone(memory_format=torch.contiguous_format)
    about = json.dumps(described(cache, model), sort_keys=True)
    digest = hashlib.sha256((numbers_hash(tensors) + about).encode()).hexdigest()
    save_file(tensors, path, {"format": FORMAT, "about": about, "sha256": digest})


def load_cache(path: str | os.PathLike, model) -> KVCache:
    """Read a cache that save_cache wrote for this model, to its device."""
    try:
        about, tensors = _read(path, str(model.norm.weight.device))
        batch = len(
            tensors[next(n for n in tensors if n.endswith(("n_window", "lengths", "seen")))]
        )
        cache = model.new_cache(batch, 1)
        own = described(cache, model)
        n = len(about["layers"])
        check(n == len(own["layers"]), f"{n} layers", f"{len(own['layers'])}", "use its own model")
        for i, (layer, saved) in enumerate(zip(cache.layers, about["layers"], strict=True)):
            free = ("keep_all",)  # known once a context is packed
            wanted = {k: v for k, v in own["layers"][i].items() if k not in free}
            found = {k: v for k, v in saved.items() if k not in free}
            refuse_difference(wanted, found, f"layer {i}")
            mine = {
                n.split(".", 1)[1]: t for n, t in tensors.items() if n.split(".", 1)[0] == str(i)
            }
            layer.load_state_dict(mine)
            if "keep_all" in saved:
                layer.keep_all = saved["keep_all"] == str(True)
        check(
            about["model"] == own["model"],
            "other weights",
            "the model that filled it",
            "load that one, or process the prompt again",
        )
        cache.length = int(about["length"])
    except (SafetensorError, KeyError, ValueError, OSError, StopIteration) as e:
        raise ValueError(
            f"{path} is not a cache of this model ({e}); give a file that KVCache.save wrote for it"
        ) from None
    return cache


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
