"""Attention on a CPU whose newest tokens have other values than earlier ones.

The problem: query i reads the tokens of its window whole and those before as routed. Which value a
token has depends on who reads it, so one call of fused attention cannot do it; with the matrix of
weights in memory a CPU is busy with moving it. The idea: fused attention reads routed values
everywhere, and what they lack of whole ones, `lost`, is added in a narrow band near the diagonal.
With weights p = exp(s - lse), lse the log-sum-exp that the call returns,

    y_i = sum_j p_ij routed_j + sum_(j in window of i) p_ij lost_j

The gradient of a logit is p_ij (dy_i . value_ij - dy_i . y_i). Fused attention's own backward takes
the last product from the output that it is given: given y in place of its own it returns the first
part of every gradient, and the band adds p_ij dy_i . lost_j.

The band is cut into blocks of C queries, each with the keys of its block and the R before it.

Letters: storage/layout.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.packed import packed_count

LEAST_BLOCK = 16  # queries of a block: fewer read less that is masked, more make larger products


class Window(NamedTuple):
    """At least the newest `size` tokens are whole; `block` leave at a time (packed_count). The
    first `sinks` tokens do not count."""

    size: int
    block: int
    sinks: int = 0

    @property
    def reach(self) -> int:
        """Tokens that a window may hold."""
        return self.size + self.block - 1


def is_banded(q: Tensor) -> bool:
    """Say whether banded_attention is for such queries: on a CPU, in the type that is given."""
    return q.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


# -------------------- blocks of C queries, R keys before them


def blocks(x: Tensor, C: int) -> Tensor:
    """Cut x (..., T, D) into (..., T/C, C, D), zeros at the end."""
    missing = -x.size(-2) % C
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (-1, C))


def query_blocks(q: Tensor, Hkv: int, C: int) -> Tensor:
    """Lay q (B, H, T, D) out as (B*Hkv*blocks, n*C, D), a KV head's n query heads in turn."""
    return blocks(q, C).unflatten(1, (Hkv, -1)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def of_queries(x: Tensor, like: Tensor, Hkv: int, C: int) -> Tensor:
    """Undo query_blocks for q like (B, H, T, D)."""
    B, H, T, D = like.shape
    return x.view(B, Hkv, -1, H // Hkv, C, D).transpose(2, 3).reshape(B, H, -1, D)[:, :, :T]


def strips(x: Tensor, C: int, R: int) -> Tensor:
    """Give every block of x (B, Hkv, T, D) the R <= C tokens before it: (B*Hkv*blocks, R + C, D),
    views that overlap. Before a head's first block are those of the head before it: masked."""
    D = x.size(-1)
    flat = blocks(x, C).reshape(-1, D)
    n = len(flat) // C
    return torch.cat((flat.new_zeros(R, D), flat)).as_strided((n, R + C, D), (C * D, D, 1))


def of_tokens(dx: Tensor, like: Tensor, C: int, R: int) -> Tensor:
    """Return the gradient of x, like (B, Hkv, T, D), of the gradient dx of strips(x)."""
    B, Hkv, T, D = like.shape
    own = dx[:, R:].contiguous()
    own[:-1, C - R :] += dx[1:, :R]
    return own.view(B, Hkv, -1, D)[:, :, :T]


def band_bias(T: int, C: int, window: Window) -> Tensor:
    """Return 0 where a query of a block reads a key of its strip whole, else -inf: (blocks, 1, C,
    R + C) float32, for all query heads."""
    i = torch.arange(T + -T % C).view(-1, 1, C, 1)
    j = i[:, :, :1] + torch.arange(-window.reach, C)
    packed = packed_count(i + 1 - window.sinks, window.size, window.block)
    # keys before the first token are none of a window: a count is never negative
    routed = (j > i) | (j + 1 - window.sinks <= packed)
    return torch.zeros(routed.shape).masked_fill_(routed, float("-inf"))


class BandedAttention(torch.autograd.Function):
    """banded_attention, with its gradient."""

    @staticmethod
    def forward(ctx, q, k, routed, lost, window: Window):
        ctx.sizes = (max(window.reach, LEAST_BLOCK), window.reach)
        C, _ = ctx.sizes
        Hkv = k.size(1)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, lse = fused(q, k, routed, 0.0, True)
        queries = query_blocks(q * q.size(-1) ** -0.5, Hkv, C)
        keys, values = (strips(t, *ctx.sizes) for t in (k, lost))
        p = torch.bmm(queries, keys.mT) - query_blocks(lse.unsqueeze(-1), Hkv, C)
        bias = band_bias(q.size(2), C, window)
        p.view(len(q) * Hkv, len(bias), -1, *bias.shape[2:]).add_(bias)
        p.exp_()
        y = y + of_queries(torch.bmm(p, values), q, Hkv, C)
        ctx.save_for_backward(q, k, routed, y, lse, queries, keys, values, p)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, routed, y, lse, queries, keys, values, p = ctx.saved_tensors
        C, _ = ctx.sizes
        Hkv = k.size(1)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, drouted = fused(dy, q, k, routed, y, lse, 0.0, True)
        dy = query_blocks(dy, Hkv, C)
        ds = torch.bmm(dy, values.mT).mul_(p)
        dq += of_queries(torch.bmm(ds, keys), q, Hkv, C) * q.size(-1) ** -0.5
        dk += of_tokens(torch.bmm(ds.mT, queries), k, *ctx.sizes)
        dlost = of_tokens(torch.bmm(p.mT, dy), k, *ctx.sizes)
        return dq, dk, drouted, dlost, None


def banded_attention(q: Tensor, k: Tensor, v: Tensor, routed: Tensor, window: Window) -> Tensor:
    """Return causal attention (B, H, T, D) to v of the tokens in a query's window and to routed
    values before, where is_banded(q). ValueGroupPath._attend_window is the reference.

    q (B, H, T, D); k, v, routed (B, Hkv, T, D)"""
    return BandedAttention.apply(q, k, routed, v - routed, window)
