"""What no implementation can pass: the bytes that a step has to move and the products that it has
to compute, counted from a model's shape, and how fast this machine does both.

Only what cannot be left out is counted: weights are read once where they are used, a cache is read
once, products alone are work (two FLOPs for a multiplication and an addition). So a step's rate is
at most tokens / (bytes / bandwidth) and tokens / (FLOPs / rate of a large product).

    work = decode_work(shape, batch_size=8, cache_bytes=cache.nbytes(), itemsize=2)
    limits(work, 8, machine_of(device, torch.bfloat16))

Letters: d width, V vocabulary, H heads, Hkv KV heads, D head dimension, B sequences, T tokens of
each."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.common import in_turns
from benchmarks.decode import COPY_ROUNDS, copy_gb_per_s
from config import ModelConfig

PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the product that is timed


class Work(NamedTuple):
    """What a step has to do."""

    bytes: int  # moved between the memory and the processor
    flops: int


class Machine(NamedTuple):
    """What a machine does."""

    bytes_per_s: float  # of a large copy, read and written
    flops_per_s: float  # of a large product


# -------------------- work


def block_weights(c: ModelConfig) -> int:
    """Count the weights of a block's matrices: attention's four, and two or three of the MLP."""
    attention = 2 * c.n_embd * (c.n_head + c.n_kv_head) * c.head_dim
    return attention + (3 if c.gated_mlp else 2) * c.n_embd * c.n_inner


def matrix_weights(c: ModelConfig) -> int:
    """Count the weights that every token is multiplied by: those of all blocks and the head."""
    return c.n_layer * block_weights(c) + c.vocab_size * c.n_embd


def decode_work(c: ModelConfig, batch_size: int, cache_bytes: int, itemsize: int) -> Work:
    """Count one step of decoding, a token of each of batch_size sequences.

    cache_bytes: of all keys and values held, all layers; itemsize: bytes of a weight

    Attention multiplies a number of the cache by one of every query head of its KV head. Numbers in
    fewer bits are counted as if they were as many fewer, which is less than is computed."""
    attention = 2 * (c.n_head // c.n_kv_head) * (cache_bytes // itemsize)
    return Work(
        bytes=itemsize * matrix_weights(c) + cache_bytes,
        flops=2 * batch_size * matrix_weights(c) + attention,
    )


def attention_work(c: ModelConfig, cache_bytes: int, itemsize: int) -> Work:
    """Count attention of one token of each sequence over one layer's cache."""
    return Work(cache_bytes, 2 * (c.n_head // c.n_kv_head) * (cache_bytes // itemsize))


def lora_work(c: ModelConfig, batch_size: int, n_tokens: int, itemsize: int) -> Work:
    """Count a step that trains low-rank factors beside frozen weights, on batch_size sequences of
    n_tokens tokens.

    Forward every token is multiplied by every weight, backward its gradient is, too, but where
    nothing trained lies below: the first block's q, k and v. Attention is causal, two products
    forward and four backward over half of the pairs. The factors' own products are not counted.
    Weights are read forward and backward, and so is the residual stream after every block, which is
    written as often."""
    tokens = batch_size * n_tokens
    first_projections = c.n_embd * (c.n_head + 2 * c.n_kv_head) * c.head_dim
    weights = 2 * matrix_weights(c) - first_projections
    pairs = batch_size * n_tokens * (n_tokens + 1) // 2
    attention = 6 * 2 * pairs * c.n_head * c.head_dim * c.n_layer
    stream = 4 * tokens * c.n_embd * c.n_layer
    return Work(
        bytes=itemsize * (weights + stream),
        flops=2 * tokens * weights + attention,
    )


# -------------------- machines


def machine_of(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a device: a large copy, and the product of two square matrices of a dtype."""
    n = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls = {"product": [lambda: torch.mm(a, b, out=out)]}
    ms = in_turns(calls, COPY_ROUNDS, device)["product"]
    return Machine(1e9 * copy_gb_per_s(device), 2e3 * n**3 / ms)


def limits(work: Work, n_tokens: int, machine: Machine) -> dict[str, float]:
    """Return the most tokens per second, by bytes and by FLOPs, where such work makes n_tokens."""
    return {
        "limit_by_bytes": round(n_tokens * machine.bytes_per_s / work.bytes, 1),
        "limit_by_flops": round(n_tokens * machine.flops_per_s / work.flops, 1),
    }
