"""What the allocator holds for one layer's caches, and how many sequences fit into a memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import WINDOW, parse_cases
from benchmarks.common import dtype_name
from config import ModelConfig
from loaders.device import device_name, in_bfloat16, pick_device
from measure_config import BenchConfig
from storage.cache import NewTokens
from storage.dense import DenseCache
from storage.packed import PackedCache
from storage.ragged import RaggedCache


def bench_memory(cfg: BenchConfig, c: ModelConfig) -> list[dict]:
    """Return the rows of `memory`: what the allocator holds for one layer's cache of batch_size
    sequences, and how many sequences fit into --memory_gb, allocated one by one until it is
    full."""
    device = pick_device(cfg.device)
    dtype = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    shape = (cfg.batch_size, c.n_kv_head, c.block_size + WINDOW, c.head_dim)
    k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    limit = cfg.memory_gb * 2**30
    dense_bytes, _ = held_bytes(dense_cache, k, v)
    n_dense = n_fitting(dense_cache, k, v, limit)
    about = {
        "name": "memory",
        "shape": f"B{cfg.batch_size} T{c.block_size} Hkv{c.n_kv_head} D{c.head_dim}",
        "dtype": dtype_name(dtype),
        "device": device_name(device),
    }
    rows = []
    for case in parse_cases(cfg.cases, c.head_dim):
        for fixed in case.forms():

            def fill(k: Tensor, v: Tensor, case=case, fixed=fixed):
                return case.fill(k, v, fixed)[0]

            held, said = held_bytes(fill, k, v)
            n_packed = n_fitting(fill, k, v, limit)
            rows.append(
                {
                    **about,
                    "impl": f"packed {case.name(fixed)}",
                    "peer": "dense",
                    "bytes": held,
                    "bytes_said": said,
                    "over_keys_and_values": round(held / ideal_bytes(fill(k, v)) - 1, 4),
                    "ratio": round(held / dense_bytes, 4),
                    "sequences": n_packed,
                    "sequences_dense": n_dense,
                    "times_more": round(n_packed / max(1, n_dense), 3),
                    "memory_gb": cfg.memory_gb,
                }
            )
    return rows


def dense_cache(k: Tensor, v: Tensor) -> DenseCache:
    """Store k, v (B, Hkv, N, D) whole."""
    B, Hkv, N, D = k.shape
    cache = DenseCache(B, N, Hkv, D, k)
    cache.append(NewTokens(k, v, None))
    return cache


def ideal_bytes(cache: PackedCache | RaggedCache) -> int:
    """Return the bytes of the keys and kept values alone, the window included."""
    tensors = (cache.keys, cache.rows, cache.window_k, cache.window_v)
    return sum(t.numel() * t.element_size() for t in tensors)


def held_bytes(make: Callable, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Return (the bytes the allocator gave for make(k, v), the bytes the cache says); on a CPU,
    whose allocator does not tell, the second are the first, too."""
    make(k[:1], v[:1])  # what a first call leaves behind is not the cache's
    before = allocated(k.device)
    cache = make(k, v)
    said = cache.nbytes()
    if k.device.type != "cuda":
        return said, said
    return allocated(k.device) - before, said


def n_fitting(make: Callable, k: Tensor, v: Tensor, limit: float) -> int:
    """Return how many caches of one sequence fit into `limit` bytes."""
    before = allocated(k.device)
    taken = 0
    caches = []
    while taken <= limit:
        caches.append(make(k[:1], v[:1]))
        if k.device.type == "cuda":
            taken = allocated(k.device) - before
        else:
            taken += caches[-1].nbytes()
    return len(caches) - 1


def allocated(device: torch.device) -> int:
    """Return the bytes the allocator has given out, garbage collected; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)
