"""Second moments of queries that are turned on their way: one pass over queries as they lie, with
nothing written but the moments.

Prompt.moments (relevance.py) says of which queries; its plain form is the reference.

Letters: selection/relevance.py; n H / Hkv query heads of a KV head, Q queries of each."""

from __future__ import annotations

import torch
from torch import Tensor

from storage.kernel_base import dense_rows, jit, product, tl

ROWS = 64  # queries at a time


@jit
def _moments_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    real_ptr,
    out_ptr,
    B,
    Hkv,
    n,
    Q,
    turn_stride_b,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the sum of q q^T over the queries of a segment, turned: (D, D) float32."""
    segment = tl.program_id(0).to(tl.int64)
    row = segment // Hkv  # of all layers
    b = row % B
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, D)
    other = (i + HALF) % D
    sign = tl.where(i < HALF, -1.0, 1.0)
    q_ptr += row * q_stride_b + segment % Hkv * n * q_stride_h
    turn = b * turn_stride_b
    total = tl.zeros([D, D], tl.float32)
    for head in tl.range(0, n):
        for begin in tl.range(0, Q, ROWS):
            t = begin + tl.arange(0, ROWS)
            there = t < Q
            if real_ptr is not None:
                there = there & (tl.load(real_ptr + b * Q + t, mask=there, other=0) > 0)
            here = there[:, None] & (i >= 0)[None, :]
            at = head * q_stride_h + t[:, None] * q_stride_t
            angle = turn + t[:, None] * HALF + (i % HALF)[None, :]
            cos = tl.load(cos_ptr + angle, mask=here, other=0)
            sin = tl.load(sin_ptr + angle, mask=here, other=0) * sign[None, :]
            own = tl.load(q_ptr + at + i[None, :], mask=here, other=0).to(tl.float32)
            pair = tl.load(q_ptr + at + other[None, :], mask=here, other=0).to(tl.float32)
            turned = own * cos + pair * sin
            total = product(tl.trans(turned), turned, total)
    to = out_ptr + segment * D * D + i[:, None] * D + i[None, :]
    tl.store(to, total)


def turned_moments(
    q: Tensor, cos: Tensor, sin: Tensor, real: Tensor | None, n_kv_head: int
) -> Tensor:
    """Return the sums of q q^T over query heads of a KV head and over queries, each turned by its
    angle: (L, B, Hkv, D, D) float32.

    q         (L, B, H, Q, D), D a power of 2, 16 at least
    cos, sin  (B or 1, 1, Q, D/2) float32
    real      (B, Q) bool, queries that count; None: all"""
    L, B, H, Q, D = q.shape
    out = torch.empty(L, B, n_kv_head, D, D, device=q.device)
    flat = dense_rows(q.flatten(0, 1))
    turn_stride_b = Q * D // 2 if len(cos) > 1 else 0
    _moments_kernel[(L * B * n_kv_head,)](
        flat,
        cos.contiguous(),
        sin.contiguous(),
        None if real is None else real.contiguous(),
        out,
        B,
        n_kv_head,
        H // n_kv_head,
        Q,
        turn_stride_b,
        *flat.stride()[:3],
        D,
        ROWS,
    )
    return out
