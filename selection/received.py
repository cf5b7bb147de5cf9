"""How much of the attention of few queries every token of a context gets, with no attention matrix:
one pass over the keys for the queries' sums, one for the tokens' shares.

Prompt.shares (relevance.py) is the reference: it forms all weights.

Letters: selection/relevance.py; n Q queries of a KV head, its n query heads in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from storage.kernel_base import capped, dense_rows, jit, product, tl, triton
from storage.layout import cdiv

TOKENS = 64  # and as many queries, at most, at a time


@jit
def _logits(
    q_ptr,
    k_ptr,
    last_ptr,
    row,
    t,
    pad,
    N,
    Q,
    T,
    k_stride_t,
    CAP: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Return logits, in units of log 2, -inf where a token is not read: (rows, tokens) of queries
    row (rows, 1) and tokens t (1, tokens), or (tokens, rows) of t (tokens, 1) and row (1, rows).
    What rows from N on have means nothing."""
    i = tl.arange(0, DIMS)
    FLIP: tl.constexpr = t.shape[1] == 1  # tokens come first
    q_dims = i[:, None] if FLIP else i[None, :]
    k_dims = i[None, :] if FLIP else i[:, None]
    q = tl.load(q_ptr + row * D + q_dims, mask=(row < N) & (q_dims < D), other=0)
    k = tl.load(k_ptr + t * k_stride_t + k_dims, mask=(t < T) & (k_dims < D), other=0)
    if FLIP:
        dots = product(k, q, tl.zeros([t.shape[0], row.shape[1]], tl.float32))
    else:
        dots = product(q, k, tl.zeros([row.shape[0], t.shape[1]], tl.float32))
    logits = capped(dots * 1.4426950408889634, CAP)
    # added: with the multiplication before it, one instruction a number
    logits += tl.where((t >= pad) & (t < T), 0.0, float("-inf"))
    if last_ptr is not None:
        last = tl.load(last_ptr + row % Q, mask=row < N, other=0)
        logits = tl.where(t <= last, logits, float("-inf"))
    return logits


@jit
def _sums_kernel(
    q_ptr,
    k_ptr,
    last_ptr,
    pad_ptr,
    lse_ptr,
    N,
    Q,
    T,
    B,
    Hkv,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    CAP: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the log-sum-exps, in units of log 2, of ROWS queries of a segment; any finite number
    where nothing is read."""
    segment = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k_ptr += segment // Hkv * k_stride_b + segment % Hkv * k_stride_h
    q_ptr += segment * N * D
    pad = 0 if pad_ptr is None else tl.load(pad_ptr + segment // Hkv % B).to(tl.int32)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for begin in tl.range(0, T, TOKENS):
        t = begin + tl.arange(0, TOKENS)[None, :]
        s = _logits(q_ptr, k_ptr, last_ptr, row[:, None], t, pad, N, Q, T, k_stride_t, CAP, D, DIMS)
        new = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        top = new
    lse = top + tl.log2(tl.maximum(total, 1e-30))
    tl.store(lse_ptr + segment * N + row, lse, mask=row < N)


@jit
def _shares_kernel(
    q_ptr,
    k_ptr,
    last_ptr,
    pad_ptr,
    lse_ptr,
    weight_ptr,
    mean_ptr,
    largest_ptr,
    N,
    Q,
    T,
    C,
    B,
    Hkv,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    CAP: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write what TOKENS tokens of a segment get of all its queries: the sum of weight (B, N) times
    the share, and the largest share where there is weight."""
    segment = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k_ptr += segment // Hkv * k_stride_b + segment % Hkv * k_stride_h
    q_ptr += segment * N * D
    b = segment // Hkv % B
    pad = 0 if pad_ptr is None else tl.load(pad_ptr + b).to(tl.int32)
    mean = tl.zeros([TOKENS], tl.float32)
    largest = tl.zeros([TOKENS], tl.float32)
    for begin in tl.range(0, N, ROWS):
        row = begin + tl.arange(0, ROWS)
        s = _logits(
            q_ptr,
            k_ptr,
            last_ptr,
            row[None, :],
            t[:, None],
            pad,
            N,
            Q,
            T,
            k_stride_t,
            CAP,
            D,
            DIMS,
        )
        lse = tl.load(lse_ptr + segment * N + row, mask=row < N, other=0)
        weight = tl.load(weight_ptr + b * N + row, mask=row < N, other=0)
        # a row without weight gives nothing
        p = tl.exp2(s - tl.where(weight > 0, lse, float("inf"))[None, :])
        mean += tl.sum(p * weight[None, :], 1)
        largest = tl.maximum(largest, tl.max(p, 1))
    tl.store(mean_ptr + segment * C + t, mean, mask=t < C)
    tl.store(largest_ptr + segment * C + t, largest, mask=t < C)


def received(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    last: Tensor | None,
    pad: Tensor | None,
    C: int,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the mean and the largest share of attention on each of the first C tokens, (L, B, Hkv,
    C) float32; 0 in padding.

    q       (L, B, Hkv, n Q, D), scaled
    k       (L, B, Hkv, T, D)
    weight  (B, 1, 1, n Q) float32, of each query in the mean; where it is 0 no largest share counts
    last    (Q,) the last column that a query reads; None: all
    pad     (B,) columns of padding, or None"""
    L, B, Hkv, N, D = q.shape
    T = k.size(-2)
    q = q.to(k.dtype).contiguous()
    k = dense_rows(k.flatten(0, 1))
    lse = q.new_empty(L, B, Hkv, N, dtype=torch.float32)
    mean = q.new_empty(L, B, Hkv, C, dtype=torch.float32)
    largest = torch.empty_like(mean)
    rows = min(TOKENS, max(16, triton.next_power_of_2(N)))
    n_queries = N if last is None else len(last)
    seen = (q, k, last, pad, lse)
    strides = k.stride()[:3]
    sizes = (cap, D, max(16, triton.next_power_of_2(D)), rows, TOKENS)
    segments = L * B * Hkv
    _sums_kernel[(segments, cdiv(N, rows))](*seen, N, n_queries, T, B, Hkv, *strides, *sizes)
    out = (weight.expand(B, 1, 1, N).contiguous(), mean, largest)
    counts = (N, n_queries, T, C, B, Hkv)
    _shares_kernel[(segments, cdiv(C, TOKENS))](*seen, *out, *counts, *strides, *sizes)
    return mean, largest
