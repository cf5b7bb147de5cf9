"""Ground floor: pure tensor functions that the routing and the packed cache are made of, in plain PyTorch.

Masks are bool with the groups last; in storage a token's mask is one integer whose bit g says that group g is kept (uint8 up
to S = 8, int16 for S = 16). A row is one kept group: D/S numbers. Rows lie token-major, group-minor, without gaps, so

    row of (t, g) = base + offset(t) + popcount(mask_t & ((1 << g) - 1))

where offset(t) is stored once per tile of TILE tokens and counted up inside the tile.

Letters: B batch, Hkv KV heads, T tokens, S groups, d = D/S numbers in a row.
"""
from __future__ import annotations

import torch
from torch import Tensor

TILE = 64  # tokens per stored row offset


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its type is narrower, else as it is: the type for softmax, scores and losses."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """bool like scores (..., n): True at the k largest of the last dimension, exactly k; equal scores: the lower index wins."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def mask_dtype(n_groups: int) -> torch.dtype:
    """Integer type that holds one token's mask: uint8 for S <= 8, int16 for S = 16."""
    return torch.uint8 if n_groups <= 8 else torch.int16


def mask_to_bits(mask: Tensor) -> Tensor:
    """bool (..., S) -> one integer per token (...), bit g = group g kept."""
    weight = 1 << torch.arange(mask.size(-1), device=mask.device, dtype=torch.int32)
    bits = (mask.int() * weight).sum(-1, dtype=torch.int32)
    return bits.to(torch.uint8) if mask.size(-1) <= 8 else torch.where(bits > 32767, bits - 65536, bits).to(torch.int16)


def bits_to_mask(bits: Tensor, n_groups: int) -> Tensor:
    """Inverse of mask_to_bits: integers (...) -> bool (..., S)."""
    return (bits.int().unsqueeze(-1) >> torch.arange(n_groups, device=bits.device, dtype=torch.int32) & 1).bool()


def row_numbers(mask: Tensor) -> Tensor:
    """Number of kept (token, group) pairs before each pair, token-major and group-minor: bool (..., T, S) -> int64 (..., T, S)."""
    kept = mask.flatten(-2).long()
    return (kept.cumsum(-1) - kept).view(mask.shape)
