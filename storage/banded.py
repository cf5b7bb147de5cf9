"""windowed.py's attention on a CPU, where moving memory is what takes time.

The same sums as there. What differs is the band: a query's block reads only as many keys before it
as a window may hold, as views of one tensor that overlap, and its weights are kept for the backward
pass.

Letters: storage/layout.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from storage.windowed import (
    Window,
    band_bias,
    causal,
    causal_backward,
    in_blocks,
    of_queries,
    query_blocks,
)

LOG2E = math.log2(math.e)
LEAST_BLOCK = 16  # queries of a block: fewer read less that is masked, more make larger products


def is_banded(q: Tensor) -> bool:
    """Say whether banded_attention is for such queries: some, on a CPU, in float32 or float64 as
    they are. Log-sum-exps of 16 bits come in float32, with which products of 16 bits do not mix."""
    if q.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return q.dtype in (torch.float32, torch.float64) and q.numel() > 0


def strips(x: Tensor, C: int, R: int) -> Tensor:
    """Give every block of C tokens of x (B, Hkv, T, D) the R <= C tokens before it: (B*Hkv*blocks,
    R + C, D), views that overlap. Before a head's first block are those of the head before it:
    masked."""
    D = x.size(-1)
    blocks = in_blocks(x, C)
    n_blocks = blocks.shape[:3].numel()
    shifted = x.new_empty(R + n_blocks * C, D)
    shifted[:R] = 0
    shifted[R:].view(blocks.shape).copy_(blocks)
    return shifted.as_strided((n_blocks, R + C, D), (C * D, D, 1))


def of_tokens(dx: Tensor, like: Tensor, C: int, R: int) -> Tensor:
    """Return the gradient of x, like (B, Hkv, T, D), of the gradient dx of strips(x), in which it
    is summed up."""
    B, Hkv, T, D = like.shape
    own = dx[:, R:]
    own[:-1, C - R :] += dx[1:, :R]  # what the next block reads of this one
    by_head = own.reshape(B, Hkv, -1, D)
    return by_head[:, :, :T]


class BandedAttention(torch.autograd.Function):
    """banded_attention, with its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, routed, window: Window):
        R = window.reach
        C = max(R, LEAST_BLOCK)
        ctx.sizes = (C, R)
        B, _, T, D = q.shape
        Hkv = k.size(1)
        y, (lse,) = causal(q, k, routed)
        # blocks of all sequences and heads in one dimension, which bmm wants
        queries = query_blocks(q, Hkv, C).flatten(0, 2)
        sums = query_blocks(lse.unsqueeze(-1), Hkv, C).flatten(0, 2)
        keys = strips(k, C, R)
        values = strips(v - routed, C, R)
        # becomes the weights, in place: powers of two are several times as fast as those of e
        p = torch.baddbmm(sums, queries, keys.mT, beta=-LOG2E, alpha=LOG2E * D**-0.5)
        bias = band_bias(T, C, R, window, q.device)  # (blocks, 1, C, R + C)
        by_head = p.view(B * Hkv, len(bias), -1, *bias.shape[2:])
        by_head.add_(bias)
        p.exp2_()
        missing = torch.bmm(p, values)
        y += BandedAttention.of_queries(missing, q, Hkv)
        ctx.save_for_backward(q, k, routed, y, lse, queries, keys, values, p)
        return y

    @staticmethod
    def of_queries(x: Tensor, q: Tensor, Hkv: int) -> Tensor:
        """Lay x (B*Hkv*blocks, n*C, D) out like q (B, H, T, D)."""
        B, H, T, _ = q.shape
        blocks = x.view(B, Hkv, -1, *x.shape[1:])
        return of_queries(blocks, H // Hkv, T)

    @staticmethod
    def backward(ctx, dy):
        q, k, routed, y, lse, queries, keys, values, p = ctx.saved_tensors
        C, R = ctx.sizes
        Hkv = k.size(1)
        scale = q.size(-1) ** -0.5
        dq, dk, drouted = causal_backward(dy, q, k, routed, y, (lse,))
        dy = query_blocks(dy, Hkv, C).flatten(0, 2)
        dlogits = torch.bmm(dy, values.mT).mul_(p)
        dqueries = torch.bmm(dlogits, keys)
        dq.add_(BandedAttention.of_queries(dqueries, q, Hkv), alpha=scale)
        dkeys = torch.bmm(dlogits.mT, queries)
        dk.add_(of_tokens(dkeys, k, C, R), alpha=scale)
        dvalues = torch.bmm(p.mT, dy)
        dv = of_tokens(dvalues, k, C, R)
        return dq, dk, dv, drouted.sub_(dv), None


def banded_attention(q: Tensor, k: Tensor, v: Tensor, routed: Tensor, window: Window) -> Tensor:
    """Return causal attention (B, H, T, D) to v of the tokens in a query's window and to routed
    values before, where is_banded(q). routing.in_window.plain_windowed_attention is the reference.

    q (B, H, T, D); k, v, routed (B, Hkv, T, D)"""
    return BandedAttention.apply(q, k, v, routed, window)
