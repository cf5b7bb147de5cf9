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
    y, *rest, _for_debugging = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    return y, tuple(rest)


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
    by_kv_head = in_blocks(q, C).unflatten(1, (Hkv, -1))  # (B, Hkv, n, N, C, D)
    return by_kv_head.transpose(2, 3).flatten(3, 4)


def of_queries(x: Tensor, n: int, T: int) -> Tensor:
    """Undo query_blocks: (B, Hkv, N, n*C, D) becomes (B, H, T, D)."""
    by_kv_head = x.unflatten(3, (n, -1)).transpose(2, 3)  # (B, Hkv, n, N, C, D)
    by_head = by_kv_head.flatten(3, 4).flatten(1, 2)
    return by_head[:, :, :T]


def with_block_before(x: Tensor, C: int) -> Tensor:
    """Give every block of x (B, Hkv, T, D) the one before it: (B, Hkv, N, 2 C, D)."""
    own = in_blocks(x, C)
    before = F.pad(own[:, :, :-1], (0, 0, 0, 0, 1, 0))  # zeros before the first block
    return torch.cat((before, own), 3)


def of_tokens(dx: Tensor, T: int) -> Tensor:
    """Return the gradient (B, Hkv, T, D) of what with_block_before got, of its result's dx."""
    before, own = dx.chunk(2, 3)
    of_next = F.pad(before[:, :, 1:], (0, 0, 0, 0, 0, 1))  # nothing follows the last block
    both = (own + of_next).flatten(2, 3)
    return both[:, :, :T]


def band_bias(T: int, C: int, R: int, window: Window, device) -> Tensor:
    """Return 0 where a query of a block reads a key of its block and of the R tokens before it
    whole, else -inf: (N, 1, C, R + C) float32, for all query heads."""
    size, block, n_sinks = window
    query = torch.arange(cdiv(T, C) * C, device=device).view(-1, 1, C, 1)
    first = query[:, :, :1]  # of each block
    key = first + torch.arange(-R, C, device=device)
    # keys before the first token are none of a window: a count is never negative
    n_left = packed_count(query + 1 - n_sinks, size, block)
    outside = (key > query) | (key < n_sinks + n_left)
    # filled, since numbers of the host cannot be copied while a graph is captured
    bias = torch.zeros(outside.shape, device=device)
    return bias.masked_fill_(outside, float("-inf"))


def band_weights(q: Tensor, k: Tensor, lse: Tensor, bias: Tensor) -> Tensor:
    """Return p (B, Hkv, N, n*C, 2 C) of queries and keys in blocks, 0 outside the windows; lse (B,
    H, T)."""
    C = bias.size(2)
    sums = query_blocks(lse.unsqueeze(-1), q.size(1), C)
    scaled = q * q.size(-1) ** -0.5
    logits = at_least_float32(scaled @ k.mT) - sums
    by_head = logits.unflatten(3, (-1, C)) + bias
    p = by_head.exp_().flatten(3, 4)
    return p.to(q.dtype)


class WindowedAttention(torch.autograd.Function):
    """windowed_attention, with its gradient. The band is computed anew in the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, routed, window: Window):
        n = q.size(1) // k.size(1)
        C = max(window.reach, LEAST_BLOCK)
        T = q.size(2)
        full_k = WindowedAttention.per_query_head(k, n)
        full_routed = WindowedAttention.per_query_head(routed, n)
        y, rest = causal(q, full_k, full_routed)
        bias = band_bias(T, C, C, window, q.device)
        _, _, p = WindowedAttention.band(C, q, k, rest[0], bias)
        lost = with_block_before(v - routed, C)
        y = y + of_queries(p @ lost, n, T)
        ctx.n = n
        ctx.C = C
        ctx.is_tensor = [isinstance(t, Tensor) for t in rest]
        ctx.others = [t for t in rest if not isinstance(t, Tensor)]
        tensors = [t for t in rest if isinstance(t, Tensor)]
        ctx.save_for_backward(q, k, v, routed, y, bias, *tensors)
        return y

    @staticmethod
    def per_query_head(x: Tensor, n: int) -> Tensor:
        """Repeat KV heads for calls that want one per query head: all but the CPU's."""
        return x if x.device.type == "cpu" else x.repeat_interleave(n, 1)

    @staticmethod
    def per_kv_head(dx: Tensor, like: Tensor) -> Tensor:
        """Return the gradient of x, like (B, Hkv, T, D), of that of per_query_head(x)."""
        return dx if dx.shape == like.shape else dx.unflatten(1, (like.size(1), -1)).sum(2)

    @staticmethod
    def band(C: int, q: Tensor, k: Tensor, lse: Tensor, bias: Tensor):
        """Return queries and keys in blocks of C, and the weights between them."""
        lse = lse[:, :, : q.size(2)]  # some calls pad their sums
        queries = query_blocks(q, k.size(1), C)
        keys = with_block_before(k, C)
        return queries, keys, band_weights(queries, keys, lse, bias)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, routed, y, bias, *tensors = ctx.saved_tensors
        left = {True: iter(tensors), False: iter(ctx.others)}
        rest = tuple(next(left[is_tensor]) for is_tensor in ctx.is_tensor)
        n = ctx.n
        C = ctx.C
        T = q.size(2)
        full_k = WindowedAttention.per_query_head(k, n)
        full_routed = WindowedAttention.per_query_head(routed, n)
        dq, dk, drouted = causal_backward(dy, q, full_k, full_routed, y, rest)
        dk = WindowedAttention.per_kv_head(dk, k)
        drouted = WindowedAttention.per_kv_head(drouted, routed)
        queries, keys, p = WindowedAttention.band(C, q, k, rest[0], bias)
        lost = with_block_before(v - routed, C)
        dy = query_blocks(dy, k.size(1), C)
        dlogits = p * (dy @ lost.mT) * q.size(-1) ** -0.5
        dq = dq + of_queries(dlogits @ keys, n, T)
        dk = dk + of_tokens(dlogits.mT @ queries, T)
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
