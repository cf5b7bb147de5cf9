"""From scores to packed rows: selection under a budget, exact and without a sort, and packing in
one pass. Triton kernels, each beside its plain PyTorch reference, which is its specification;
`impl` as in kernels.py. None has a gradient.

Letters: B sequences, Hkv KV heads, Hm mask heads (1 or Hkv), D head dimension, S groups, d = D/S
numbers in a row, C context tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.kernel_base import jit, tl, triton, use_triton
from storage.layout import long_cumsum, mask_dtype, mask_to_bits, tile_size

SPAN = 8192
CHUNK = 512  # entries of a row that a program of take_within sees, and how many at a time
BLOCK = 64  # tokens that a program of pack_values sees


# -------------------- selection under a budget


def take_within_ref(score: Tensor, m: Tensor, cost: Tensor | None = None) -> Tensor:
    """take_within by a stable sort: the specification."""
    if not score.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    best, order = score.sort(dim=-1, descending=True, stable=True)
    spent = (
        torch.arange(1, score.size(-1) + 1, device=score.device)
        if cost is None
        else long_cumsum(cost.expand_as(order).gather(-1, order))
    )
    return torch.zeros_like(score, dtype=torch.bool).scatter_(
        -1, order, (spent <= m.unsqueeze(-1)) & (best > float("-inf"))
    )


@jit
def _entries(score, cost, base, i, N):
    """Entries i of a row: int32 keys in the order of their scores (-0.0 as 0.0; -inf and i >= N
    lowest, like no other), int32 costs."""
    x = tl.load(score + base + i, mask=i < N, other=float("-inf")).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits >= 0, bits, tl.where(bits == -2147483648, 0, bits ^ 0x7FFFFFFF))
    key = tl.where(x > float("-inf"), key, -2147483648)
    return key, tl.full(i.shape, 1, tl.int32) if cost is None else tl.load(
        cost + base + i, mask=i < N, other=0
    ).to(tl.int32)


@jit
def _narrow(found, m, step):
    """Where a round leaves the search for the largest t with cost(key >= t) > m: t is in lo .. lo +
    step - 1 (0 the lowest key, as int64), and what lies above that range costs `above` <= m. found
    (18,) int64: cost(key >= lo + j step) for j = 1..15 (0 at j = 0), lo, above."""
    spent = tl.load(found + tl.arange(0, 16))
    above = tl.load(found + 17)
    return tl.load(found + 16) + tl.sum((spent > m).to(tl.int64)) * step, tl.max(
        tl.where(spent <= m, spent, above)
    )


@jit
def _search_kernel(score, cost, m, found, N, n_blocks, r, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Round r of 8 fixes 4 bits of each row's threshold: reads found[row, r], adds to found[row, r
    + 1]; found (rows, 9, 18) int64, zeros."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    found += (row * 9 + r) * 18
    step = tl.full([], 1, tl.int64) << (28 - 4 * r)
    lo, above = _narrow(found, tl.load(m + row), step * 16)
    j = tl.arange(0, 16)
    bound = (lo + j * step - 2147483648).to(tl.int32)  # (16,)
    spent = tl.zeros((16, CHUNK), tl.int32)
    for at in tl.range(block * SPAN, tl.minimum(block * SPAN + SPAN, N), CHUNK, num_stages=4):
        key, c = _entries(score, cost, row * N, at + tl.arange(0, CHUNK), N)
        spent += tl.where(key[None, :] >= bound[:, None], c[None, :], 0)
    tl.atomic_add(found + 18 + j, tl.sum(spent, 1).to(tl.int64), mask=j > 0, sem="relaxed")
    if block == 0:
        tl.store(found + 34, lo)
        tl.store(found + 35, above)


@jit
def _take_kernel(
    score,
    cost,
    m,
    found,
    before,
    out,
    N,
    n_blocks,
    WRITE: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Without WRITE before (rows, n_blocks) int64 becomes each block's cost of entries at the
    threshold; with it, given what such entries before the block cost, out (rows, N) bool becomes
    the choice."""
    pid = tl.program_id(0)
    row = (pid // n_blocks).to(tl.int64)
    block = pid % n_blocks
    budget = tl.load(m + row)
    lo, above = _narrow(found + (row * 9 + 8) * 18, budget, 1)
    lo = (lo - 2147483648).to(tl.int32)
    spent = above + tl.load(before + pid) if WRITE else above
    for at in tl.range(block * SPAN, tl.minimum(block * SPAN + SPAN, N), CHUNK, num_stages=4):
        i = at + tl.arange(0, CHUNK)
        key, c = _entries(score, cost, row * N, i, N)
        tie = (key == lo) & (lo > -2147483648)  # at the lowest everything fits
        c = tl.where(tie, c, 0)
        if WRITE:
            tl.store(
                out + row * N + i,
                (key > lo) | tie & (spent + tl.cumsum(c, 0) <= budget),
                mask=i < N,
            )
        spent += tl.sum(c)
    if not WRITE:
        tl.store(before + pid, spent - above)


def take_within(score: Tensor, m: Tensor, cost: Tensor | None = None, impl: str = "auto") -> Tensor:
    """What is taken from each row of score (..., N), best first, while the running sum of costs
    stays <= m: bool (..., N).

    score float, without NaN; m (...) int64, 0 or more, broadcastable to score.shape[:-1]; cost
    (..., N) integers below 2^18, None: all 1. The first entry that does not fit ends it; -inf is
    never taken. Of equal scores the lower index comes first; 0.0 equals -0.0.

    The kernel sorts nothing: 8 passes find each row's threshold, 4 bits a pass; of the entries at
    it the first are taken, the better ones all. Integer sums: the same result every time. No host
    synchronisation; score is read 10 times."""
    if not use_triton(impl, score):
        return take_within_ref(score, m, cost)
    out = torch.empty_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
    if not score.numel():
        return out
    N = score.size(-1)
    n_blocks = -(-score.size(-1) // SPAN)
    rows = score.numel() // N
    args = (
        score.contiguous(),
        None if cost is None else cost.expand_as(score).contiguous(),
        m.expand(score.shape[:-1]).contiguous(),
    )
    found = torch.zeros(rows, 9, 18, dtype=torch.int64, device=score.device)
    before = torch.empty(rows, n_blocks, dtype=torch.int64, device=score.device)
    for r in range(8):
        _search_kernel[(rows * n_blocks,)](*args, found, N, n_blocks, r, SPAN, CHUNK)
    _take_kernel[(rows * n_blocks,)](*args, found, before, out, N, n_blocks, False, SPAN, CHUNK)
    before = before.cumsum(-1) - before
    _take_kernel[(rows * n_blocks,)](*args, found, before, out, N, n_blocks, True, SPAN, CHUNK)
    return out


def select_top_m(scores: Tensor, m: Tensor, impl: str = "auto") -> Tensor:
    """Mask of the m largest scores of each row: bool like scores, exactly min(m, entries above
    -inf) of the last dimension True.

    scores (..., N) float, without NaN (it would sort before everything); m (...) int64, 0 or more,
    broadcastable to scores.shape[:-1], so every row may have its own. Tie rule: of equal scores the
    lower index wins; in a plane (C, S) flattened token-major and group-minor that is the earlier
    token, then the lower group. +inf comes first, -inf is never picked."""
    return take_within(scores, m, impl=impl)


def select_joint(
    value: Tensor, m: Tensor, impl: str = "auto", key: int = 0, cost: Tensor | None = None
) -> Tensor:
    """Tokens and their parts under one budget: bool mask (..., N, S) of the parts kept; a token is
    kept if one of its parts is.

    value (..., N, S) float: what a part is worth, >= 0, inf for one that must stay, -inf for one of
    a token that is none; m (...) int64: the budget. A kept token pays `key` (0: S) for being there,
    and each part its cost (S,) (int64 1 or more, None: 1 each). Greedy by worth per cost: a token
    comes with the parts that make (their worth) / (key + their cost) largest, further ones alone;
    what does not fit ends it, so less than one token with all its parts stays unused. No choice of
    that cost is worth more, if parts of a token are taken by falling worth per cost. Of equal ones
    the earlier token wins, then the lower part; of two ways to come that are equal, the shorter
    one."""
    S = value.size(-1)
    each = (
        torch.ones(value.size(-1), dtype=torch.int64, device=value.device) if cost is None else cost
    )
    best, part = (value / each).sort(dim=-1, descending=True, stable=True)  # (..., N, S)
    rank = torch.arange(S, device=value.device)
    each = each[part]
    # along the outermost dimension a GPU sums many times faster
    spent = (key or S) + each.movedim(-1, 0).contiguous().cumsum(0).movedim(0, -1)
    total = (best * each).movedim(-1, 0).contiguous().cumsum(0).movedim(0, -1)
    density, last = (total / spent).max(-1, keepdim=True)  # (..., N, 1)
    with_key = rank <= last
    # (..., N S); rounding must not put a part before its key
    density = torch.where(with_key, density, best.minimum(density)).flatten(-2)
    price = torch.where(with_key, (rank == 0) * spent.gather(-1, last), each).flatten(-2)
    taken = take_within(
        density, m, price.to(torch.uint8 if cost is None else torch.int32), impl
    ).view(value.shape)
    return torch.zeros_like(with_key).scatter(-1, part, taken)


# ----------------------------------------------------------------------------- packing


def pack_values_ref(k: Tensor, z: Tensor, keep: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """pack_values by boolean indexing: the specification."""
    Hkv = k.size(1)
    d = k.size(-1) // mask.size(-1)
    count = mask.sum(-1)  # (B, Hm, C) rows of each token
    # flat: one index per row, not four
    rows = z.reshape(-1, d)[mask.expand(-1, Hkv, -1, -1).reshape(-1)]
    index = tile_index((count.cumsum(-1) - count)[keep], keep.sum(-1), tile_size(mask.size(-1)))
    return (
        k[keep.expand(-1, Hkv, -1)],
        rows,
        mask_to_bits(mask[keep]),
        *index,
        keep.sum(-1),
        count.sum(-1),
    )


def tile_index(rows_before: Tensor, n_packed: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """(before, tile_rows) of Packed from the segment's rows before each token, rows_before
    (n_masks,), and their number n_packed (B, Hm)."""
    n = n_packed.flatten()
    slot = torch.arange(len(rows_before), device=n.device) - (n.cumsum(0) - n).repeat_interleave(
        n, output_size=len(rows_before)
    )
    first = slot % tile == 0
    tile_rows = rows_before[first].int()
    return (rows_before - tile_rows[first.cumsum(0) - 1]).to(torch.uint8), tile_rows


@jit
def _pack_kernel(
    k,
    z,
    keep,
    mask,
    token_at,
    row_at,
    keys,
    rows,
    bits,
    rows_before,
    C,
    n_blocks,
    Hkv,
    G,
    kb,
    kh,
    kt,
    zb,
    zh,
    zt,
    D: tl.constexpr,
    S: tl.constexpr,
    D2: tl.constexpr,
    d2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program moves BLOCK tokens of one KV head. token_at, row_at (B, Hkv, n_blocks): where its
    first key and row go; G heads share a mask, the first of them writes bits and rows_before; D2,
    d2: D, d = D/S up to a power of two."""
    pid = tl.program_id(0)
    segment = (pid // n_blocks).to(tl.int64)
    k += segment // Hkv * kb + segment % Hkv * kh
    z += segment // Hkv * zb + segment % Hkv * zh
    t = pid % n_blocks * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    at = segment // G * C + t  # (BLOCK,) in keep
    here = tl.load(keep + at, mask=t < C, other=0).to(tl.int32)
    # (BLOCK, S)
    kept = tl.load(
        mask + at[:, None] * S + tl.arange(0, S)[None, :], mask=(t < C)[:, None], other=0
    ).to(tl.int32)
    count = tl.sum(kept, 1)
    rank = tl.cumsum(here, 0) - here
    before = tl.cumsum(count, 0) - count  # (BLOCK,) kept tokens, rows before each token
    token = tl.load(token_at + pid) + rank
    row = tl.load(row_at + pid) + before  # (BLOCK,)

    e = tl.arange(0, D2)
    there = (here > 0)[:, None] & (e < D)[None, :]
    tl.store(
        keys + token[:, None] * D + e[None, :],
        tl.load(k + t[:, None] * kt + e[None, :], mask=there),
        mask=there,
    )

    p = tl.arange(0, BLOCK * S)
    e = tl.arange(0, d2)  # pairs (token, group), numbers of a row
    source = (pid % n_blocks * BLOCK + p // S).to(tl.int64) * zt + p % S * (D // S)  # (BLOCK S,)
    to = tl.reshape(row[:, None] + tl.cumsum(kept, 1) - kept, (BLOCK * S,)) * (D // S)
    there = (tl.reshape(kept, (BLOCK * S,)) > 0)[:, None] & (e < D // S)[None, :]
    tl.store(
        rows + to[:, None] + e[None, :],
        tl.load(z + source[:, None] + e[None, :], mask=there),
        mask=there,
    )

    if segment % G == 0:
        first = tl.load(token_at + segment * n_blocks)  # of the segment
        number = token - first
        word = tl.sum(kept.to(tl.int64) << tl.arange(0, S)[None, :], 1).to(bits.dtype.element_ty)
        tl.store(bits + first // G + number, word, mask=here > 0)
        tl.store(
            rows_before + first // G + number,
            (row - tl.load(row_at + segment * n_blocks)).to(tl.int32),
            mask=here > 0,
        )


def pack_values(
    k: Tensor, z: Tensor, keep: Tensor, mask: Tensor, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """The flat layout of SelectedCache, (keys, rows, bits, before, tile_rows, n_packed, n_rows), of
    k, z (B, Hkv, C, D) with any strides.

    keep (B, Hm, C) bool: tokens that survive; mask (B, Hm, C, S) bool: groups of theirs, False
    where not kept; Hm = 1 or Hkv. Segments (sequence, head) follow each other without gaps. keys
    (n_tokens, D), rows (n_rows, D/S) token-major; bits, before (n_masks,) and tile_rows (tiles,) as
    in Packed, by mask head; n_packed, n_rows (B, Hm) int64: survivors, rows.

    The kernel reads each kept key and value once; one host synchronisation, for the sizes. It has
    no gradient."""
    if not use_triton(impl, k):
        return pack_values_ref(k, z, keep, mask)
    (B, Hkv, C, D) = k.shape
    Hm = mask.size(1)
    S = mask.size(-1)
    k, z = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, z))
    keep = keep.contiguous()
    mask = mask.contiguous()
    G = Hkv // Hm
    n_blocks = -(-C // BLOCK)
    count = torch.stack((keep.view(torch.uint8), mask.sum(-1, dtype=torch.uint8)))  # (2, B, Hm, C)
    # (2, B, Hm, n_blocks) int64
    count = F.pad(count, (0, -C % BLOCK)).unflatten(-1, (n_blocks, BLOCK)).sum(-1)
    n_packed, n_rows = count.sum(-1)  # (B, Hm)
    n_tokens, total = torch.stack((n_packed.sum(), n_rows.sum())).tolist()
    keys = k.new_empty(n_tokens * G, D)
    rows = z.new_empty(total * G, D // S)
    bits, rows_before = (
        torch.empty(n_tokens, dtype=t, device=k.device) for t in (mask_dtype(S), torch.int32)
    )
    if n_tokens:
        count = count.repeat_interleave(G, 2).flatten(1)  # (2, B Hkv n_blocks)
        token_at, row_at = long_cumsum(count) - count
        _pack_kernel[(B * Hkv * n_blocks,)](
            k,
            z,
            keep,
            mask,
            token_at,
            row_at,
            keys,
            rows,
            bits,
            rows_before,
            C,
            n_blocks,
            Hkv,
            G,
            *k.stride()[:3],
            *z.stride()[:3],
            D,
            S,
            triton.next_power_of_2(D),
            triton.next_power_of_2(D // S),
            BLOCK,
            num_warps=8 if D > 64 else 4,
        )
    return keys, rows, bits, *tile_index(rows_before, n_packed, tile_size(S)), n_packed, n_rows
