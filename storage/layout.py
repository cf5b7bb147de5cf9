"""How masks and rows are laid out: the plain functions that routing, selection and the packed cache
share.

Masks are bool with the groups last; in storage a token's mask is one integer whose bit g says that
group g is kept (uint8 up to S = 8, then int16, int32, int64). A row is one kept group: D/S numbers.
Rows lie token-major, group-minor, without gaps, so

    row of (t, g) = base + offset(t) + popcount(mask_t & ((1 << g) - 1))

where offset(t) = K t if every token keeps K groups, and otherwise the rows before t's tile, stored
once per tile (int32), and those before t in its tile, stored per token (uint8: tiles are as long as
that allows).

Letters: B batch, Hkv KV heads, T tokens, S groups, d = D/S numbers in a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its type is narrower, else as it is: the type for softmax, scores and
    losses."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """bool like scores (..., n): True at the k largest of the last dimension, exactly k; equal
    scores: the lower index wins."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def mask_dtype(n_groups: int) -> torch.dtype:
    """Integer type that holds one token's mask: uint8 for S <= 8, int16 for S = 16, int32 for 32,
    int64 for 64."""
    return (
        torch.uint8
        if n_groups <= 8
        else {16: torch.int16, 32: torch.int32, 64: torch.int64}[n_groups]
    )


def mask_to_bits(mask: Tensor) -> Tensor:
    """bool (..., S) -> one integer per token (...), bit g = group g kept; the highest bit of int16
    to int64 is their sign."""
    S = mask.size(-1)
    weight = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(
        S, device=mask.device
    )
    bits = (mask * weight).sum(-1)
    if S in (16, 32):
        bits = bits - (bits >> (S - 1) << S)  # what does not fit is negative
    return bits.to(mask_dtype(S))


def bits_to_mask(bits: Tensor, n_groups: int) -> Tensor:
    """Inverse of mask_to_bits: integers (...) -> bool (..., S)."""
    return (bits.long().unsqueeze(-1) >> torch.arange(n_groups, device=bits.device) & 1).bool()


def tile_size(n_groups: int) -> int:
    """Tokens per stored row offset: as many as keep the rows before a token of its tile below 256,
    at most 64."""
    return min(64, 256 // n_groups)


def long_cumsum(x: Tensor, block: int = 1024) -> Tensor:
    """x.cumsum(-1) of integers (..., N), block by block: a GPU sums few long rows slowly."""
    # (..., N / block, block)
    blocks = F.pad(x, (0, -x.size(-1) % block)).unflatten(-1, (-1, block)).cumsum(-1)
    before = blocks[..., -1].cumsum(-1) - blocks[..., -1]
    return (blocks + before.unsqueeze(-1)).flatten(-2)[..., : x.size(-1)]


def storage_bytes(tensors) -> int:
    """Bytes of the storages behind the tensors, each storage once. Empty tensors are left out: read
    from a file they have the address of another one, which they would hide."""
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if t.numel()
        }.values()
    )
