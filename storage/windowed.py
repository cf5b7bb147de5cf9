"""Attention whose newest tokens have other values than earlier ones, with no attention matrix.

The problem: in decode mode query i reads the tokens of its window whole and those before as routed.
Which value a token has depends on who reads it, so one call of fused attention cannot do it. The
idea: let fused attention read routed values everywhere, and mend what is wrong near the diagonal.
With weights p = exp(s - lse), lse the log-sum-exp that the call returns,

    y_i = sum_j p_ij routed_j + sum_(j in window of i) p_ij (v_j - routed_j)

The second sum is a band: blocks of queries read their own block of keys and the one before it.

The gradient of a logit is p_ij (dy_i . value_ij - dy_i . y_i). Fused attention's own backward takes
the last product from the output that it is given. Given y in place of its own output it returns the
first part of every gradient, and the band adds p_ij dy_i . (v_j - routed_j).

Letters: storage/layout.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.layout import at_least_float32, cdiv
from storage.packed import packed_count

aten = torch.ops.aten
LEAST_BLOCK = 32  # queries: a product of fewer rows is not worth its launch


class Window(NamedTuple):
    """At least the newest `size` tokens are whole, and `block` leave at a time (packed_count); the
    first n_sinks never have (in routed values they are as in v), and do not count."""

    size: int
    block: int
    n_sinks: int = 0

    @property
    def reach(self) -> int:
        """Tokens that a window may hold."""
        return self.size + self.block - 1


def is_fused(q: Tensor) -> bool:
    """Say whether windowed_attention is for such queries: on a GPU, in types and sizes that have a
    fused call. A CPU's saves memory and takes up to 1.8 times as long as the plain form."""
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return False
    return q.size(-1) % 8 == 0 and q.size(-1) <= 256


def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple]:
    """Return causal attention (B, H, T, D), and what its backward needs, the log-sum-exps (B, H,
    T) first. k, v (B, H or on a CPU Hkv, T, D)."""
    if q.device.type == "cpu":
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return y, (lse,)
    if q.dtype == torch.float32:
        y, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
        return y, tuple(rest)
    y, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    return y, tuple(rest[:-1])  # without the matrix that is for debugging


def causal_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, rest: tuple):
    """Return the gradients of q, k and v of `causal`, as if its output had been y."""
    if q.device.type == "cpu":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dy, q, k, v, y, *rest, 0.0, True)
    if q.dtype == torch.float32:
        backward = aten._scaled_dot_product_efficient_attention_backward
        wanted = [True, True, True, False]
        return backward(dy, q, k, v, None, y, *rest, 0.0, wanted, True)[:3]
    backward = aten._scaled_dot_product_flash_attention_backward
    lse, *lengths, seed, offset = rest
    return backward(dy, q, k, v, y, lse, *lengths, 0.0, True, seed, offset)


# -------------------- the band: blocks of C queries over 2 C keys


def in_blocks(x: Tensor, C: int) -> Tensor:
    """Cut x (..., T, D) into blocks (..., N, C, D), zeros at the end."""
    missing = -x.size(-2) % C
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (-1, C))


def query_blocks(q: Tensor, Hkv: int, C: int) -> Tensor:
    """Lay queries q (B, H, T, D) out as (B, Hkv, N, n*C, D), a KV head's n query heads in turn."""
    return in_blocks(q, C).unflatten(1, (Hkv, -1)).transpose(2, 3).flatten(3, 4)


def of_queries(x: Tensor, n: int, T: int) -> Tensor:
    """Undo query_blocks: (B, Hkv, N, n*C, D) becomes (B, H, T, D)."""
    return x.unflatten(3, (n, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :T]


def with_block_before(x: Tensor, C: int) -> Tensor:
    """Give every block of x (B, Hkv, T, D) the one before it: (B, Hkv, N, 2 C, D)."""
    x = in_blocks(x, C)
    return torch.cat((F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x), 3)


def of_tokens(dx: Tensor, T: int) -> Tensor:
    """Return the gradient (B, Hkv, T, D) of what with_block_before got, of its result's dx."""
    before, own = dx.chunk(2, 3)
    return (own + F.pad(before[:, :, 1:], (0, 0, 0, 0, 0, 1))).flatten(2, 3)[:, :, :T]


def band_bias(T: int, C: int, R: int, window: Window, device) -> Tensor:
    """Return 0 where a query of a block reads a key of its block and of the R tokens before it
    whole, else -inf: (N, 1, C, R + C) float32, for all query heads."""
    i = torch.arange(cdiv(T, C) * C, device=device).view(-1, 1, C, 1)
    j = i[:, :, :1] + torch.arange(-R, C, device=device)
    # keys before the first token are none of a window: a count is never negative
    size, block, n_sinks = window
    left = n_sinks + packed_count(i + 1 - n_sinks, size, block)
    routed = (j > i) | (j < left)
    # filled, since numbers of the host cannot be copied while a graph is captured
    return torch.zeros(routed.shape, device=device).masked_fill_(routed, float("-inf"))


def band_weights(q: Tensor, k: Tensor, lse: Tensor, bias: Tensor) -> Tensor:
    """Return p (B, Hkv, N, n*C, 2 C) of queries and keys in blocks, 0 outside the windows; lse (B,
    H, T)."""
    C = bias.size(2)
    lse = query_blocks(lse.unsqueeze(-1), q.size(1), C)
    logits = at_least_float32((q * q.size(-1) ** -0.5) @ k.mT) - lse
    return (logits.unflatten(3, (-1, C)) + bias).exp_().flatten(3, 4).to(q.dtype)


class WindowedAttention(torch.autograd.Function):
    """windowed_attention, with its gradient. The band is computed anew in the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, routed, window: Window):
        ctx.n = q.size(1) // k.size(1)
        ctx.C = max(window.reach, LEAST_BLOCK)
        heads = WindowedAttention.per_query_head
        y, rest = causal(q, heads(k, ctx.n), heads(routed, ctx.n))
        lost = with_block_before(v - routed, ctx.C)
        bias = band_bias(q.size(2), ctx.C, ctx.C, window, q.device)
        _, _, p = WindowedAttention.band(ctx.C, q, k, rest[0], bias)
        y = y + of_queries(p @ lost, ctx.n, q.size(2))
        ctx.others = [t for t in rest if not isinstance(t, Tensor)]
        ctx.is_tensor = [isinstance(t, Tensor) for t in rest]
        ctx.save_for_backward(q, k, v, routed, y, bias, *(t for t in rest if isinstance(t, Tensor)))
        return y

    @staticmethod
    def per_query_head(x: Tensor, n: int) -> Tensor:
        """Repeat KV heads for calls that want one per query head: all but the CPU's."""
        return x if x.device.type == "cpu" else x.repeat_interleave(n, 1)

    @staticmethod
    def band(C: int, q: Tensor, k: Tensor, lse: Tensor, bias: Tensor):
        """Return queries and keys in blocks of C, and the weights between them."""
        lse = lse[:, :, : q.size(2)]  # some calls pad their sums
        q = query_blocks(q, k.size(1), C)
        k = with_block_before(k, C)
        return q, k, band_weights(q, k, lse, bias)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, routed, y, bias, *tensors = ctx.saved_tensors
        left = (iter(ctx.others), iter(tensors))
        rest = tuple(next(left[is_tensor]) for is_tensor in ctx.is_tensor)
        T = q.size(2)
        heads = WindowedAttention.per_query_head
        full = (heads(k, ctx.n), heads(routed, ctx.n))
        dq, dk, drouted = causal_backward(dy, q, *full, y, rest)
        if full[0] is not k:
            dk = dk.unflatten(1, (-1, ctx.n)).sum(2)
            drouted = drouted.unflatten(1, (-1, ctx.n)).sum(2)
        lost = with_block_before(v - routed, ctx.C)
        dy = query_blocks(dy, k.size(1), ctx.C)
        queries, keys, p = WindowedAttention.band(ctx.C, q, k, rest[0], bias)
        ds = p * (dy @ lost.mT) * q.size(-1) ** -0.5
        dq = dq + of_queries(ds @ keys, ctx.n, T)
        dk = dk + of_tokens(ds.mT @ queries, T)
        dv = of_tokens(p.mT @ dy, T)
        return dq, dk, dv, drouted - dv, None


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, routed: Tensor, window: Window) -> Tensor:
    """Return causal attention (B, H, T, D) to v of the tokens in a query's window and to routed
    values before, where is_fused(q). routing.in_window.plain_windowed_attention is the reference.

    q (B, H, T, D); k, v, routed (B, Hkv, T, D)"""
    if torch.is_autocast_enabled(q.device.type):  # as of every fused call
        dtype = torch.get_autocast_dtype(q.device.type)
    else:
        dtype = v.dtype
    q, k, v, routed = (t.to(dtype) for t in (q, k, v, routed))
    with torch.autocast(q.device.type, enabled=False):
        return WindowedAttention.apply(q, k, v, routed, window)
