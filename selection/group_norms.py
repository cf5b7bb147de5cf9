"""Norms of value groups in one pass over the values, as the selector scores them: a reduction over
so few numbers is slow as an operator of PyTorch's. Prompt.norms (relevance.py) has the plain form,
the reference.

Letters: storage/layout.py; L layers, C context tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from storage.kernel_base import dense_rows, jit, tl
from storage.layout import cdiv

TOKENS = 64  # whose groups a program takes


@jit
def _norms_kernel(
    z_ptr,
    norm_ptr,
    C,
    Hkv,
    z_stride_b,
    z_stride_h,
    z_stride_t,
    D: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the norms of TOKENS tokens of a segment: (TOKENS, S) float32."""
    segment = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    z_ptr += segment // Hkv * z_stride_b + segment % Hkv * z_stride_h
    i = tl.arange(0, D)
    here = (t < C)[:, None] & (i >= 0)[None, :]
    z = tl.load(z_ptr + t.to(tl.int64)[:, None] * z_stride_t + i[None, :], mask=here, other=0)
    z = tl.reshape(z.to(tl.float32), (TOKENS, S, D // S))
    norm = tl.sqrt_rn(tl.sum(z * z, 2))
    g = tl.arange(0, S)
    to = norm_ptr + (segment * C + t)[:, None] * S + g[None, :]
    tl.store(to, norm, mask=(t < C)[:, None] & (g >= 0)[None, :])


def group_norms(z: Tensor, S: int) -> Tensor:
    """Return the norms of the S groups of values z (L, B, Hkv, C, D), summed in float32:
    (L, B, Hkv, C, S) float32. D and S are powers of 2."""
    L, B, Hkv, C, D = z.shape
    norm = torch.empty(L, B, Hkv, C, S, device=z.device)
    if not norm.numel():
        return norm
    z = dense_rows(z.flatten(0, 1))
    grid = (L * B * Hkv, cdiv(C, TOKENS))
    _norms_kernel[grid](z, norm, C, Hkv, *z.stride()[:3], D, S, TOKENS)
    return norm
