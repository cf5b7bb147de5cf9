"""Ground floor: pure tensor functions that the routing and the packed cache are made of, in plain PyTorch.

Masks are bool with the groups last; in storage a token's mask is one integer whose bit g says that group g is kept (uint8 up
to S = 8, then int16, int32, int64). A row is one kept group: D/S numbers. Rows lie token-major, group-minor, without gaps, so

    row of (t, g) = base + offset(t) + popcount(mask_t & ((1 << g) - 1))

where offset(t) is stored once per tile of TILE tokens and counted up inside the tile.

Letters: B batch, Hkv KV heads, T tokens, S groups, d = D/S numbers in a row.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # tokens per stored row offset


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its type is narrower, else as it is: the type for softmax, scores and losses."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """bool like scores (..., n): True at the k largest of the last dimension, exactly k; equal scores: the lower index wins."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def select_top_m(scores: Tensor, m: Tensor) -> Tensor:
    """Mask of the m largest scores of each row: bool like scores, exactly min(m, entries above -inf) of the last dimension True.

    scores (..., N) float, without NaN (it would sort before everything); m (...) int64, 0 or more, broadcastable to scores.shape[:-1],
    so every row may have its own. Tie rule: of equal scores the lower index wins; in a plane (C, S) flattened token-major and
    group-minor that is the earlier token, then the lower group. +inf comes first, -inf is never picked."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    m = m.minimum((scores > float("-inf")).sum(-1))
    first = torch.arange(scores.size(-1), device=scores.device) < m.unsqueeze(-1)  # (..., N) in sorted order
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, first)


def mask_dtype(n_groups: int) -> torch.dtype:
    """Integer type that holds one token's mask: uint8 for S <= 8, int16 for S = 16, int32 for 32, int64 for 64."""
    return {16: torch.int16, 32: torch.int32, 64: torch.int64}.get(n_groups, torch.uint8)


def mask_to_bits(mask: Tensor) -> Tensor:
    """bool (..., S) -> one integer per token (...), bit g = group g kept; the highest bit of int16 to int64 is their sign."""
    S = mask.size(-1)
    weight = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(S, device=mask.device)
    bits = (mask * weight).sum(-1)
    if S in (16, 32):
        bits = bits - (bits >> (S - 1) << S)  # what does not fit is negative
    return bits.to(mask_dtype(S))


def bits_to_mask(bits: Tensor, n_groups: int) -> Tensor:
    """Inverse of mask_to_bits: integers (...) -> bool (..., S)."""
    return (bits.long().unsqueeze(-1) >> torch.arange(n_groups, device=bits.device) & 1).bool()


def row_numbers(mask: Tensor) -> Tensor:
    """Number of kept (token, group) pairs before each pair, token-major and group-minor: bool (..., T, S) -> int64 (..., T, S)."""
    kept = mask.flatten(-2).long()
    return (kept.cumsum(-1) - kept).view(mask.shape)


def long_cumsum(x: Tensor, block: int = 1024) -> Tensor:
    """x.cumsum(-1) of integers (..., N), block by block: a GPU sums few long rows slowly."""
    blocks = F.pad(x, (0, -x.size(-1) % block)).unflatten(-1, (-1, block)).cumsum(-1)  # (..., N / block, block)
    before = blocks[..., -1].cumsum(-1) - blocks[..., -1]
    return (blocks + before.unsqueeze(-1)).flatten(-2)[..., :x.size(-1)]


def select_joint(value: Tensor, m: Tensor) -> Tensor:
    """Tokens and their groups under one budget: bool mask (..., N, S) of the pairs kept; a token is kept if one of its groups is.

    value (..., N, S) float: what a pair is worth, >= 0, inf for one that must stay, -inf for a token that is none; m (...) int64: the
    budget in groups. A kept token pays S for its key, and 1 for each group. Greedy by worth per cost: a token comes with the groups that
    make (their worth) / (S + their number) largest, further ones alone; what does not fit ends it, so at most 2 S - 1 of the budget
    stay unused. No choice of that cost is worth more. Of equal ones the earlier token wins, then the lower group; of two ways to come
    that are equal, the one with fewer groups."""
    S = value.size(-1)
    best, group = value.sort(dim=-1, descending=True, stable=True)  # (..., N, S)
    rank = torch.arange(S, device=value.device)
    total = best.movedim(-1, 0).contiguous().cumsum(0).movedim(0, -1)  # along the outermost dimension a GPU sums many times faster
    density, last = (total / (S + 1 + rank)).max(-1, keepdim=True)  # (..., N, 1)
    with_key = rank <= last
    density = torch.where(with_key, density, best.minimum(density)).flatten(-2)  # (..., N S); rounding must not put a group before its key
    cost = torch.where(with_key, (rank == 0) * (S + 1 + last), 1).flatten(-2)
    density, order = density.sort(dim=-1, descending=True, stable=True)
    fits = (long_cumsum(cost.gather(-1, order)) <= m.unsqueeze(-1)) & (density > float("-inf"))
    by_rank = torch.zeros_like(fits).scatter(-1, order, fits).view(value.shape)
    return torch.zeros_like(by_rank).scatter(-1, group, by_rank)
