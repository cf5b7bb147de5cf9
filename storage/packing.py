"""From scores to packed rows: select under a budget, exactly and without a sort, and pack in one
pass. Triton kernels, each beside its plain reference; `impl` as in storage/kernel_base.py.

    keep = select_top_m(token_scores, m)        # (B, Hm, C) bool: the m best tokens of each row
    keys, rows, *index = pack_values(k, z, keep, mask)

C is the number of tokens of a context here; other letters as in storage/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.kernel_base import dense_rows, jit, tl, triton, use_triton
from storage.layout import cdiv, mask_dtype, mask_to_bits, tile_index, tile_size, tiles_of

SPAN = 8192  # entries of a row that a program of take_within sees
CHUNK = 512  # and how many of them at a time
BOUNDS = 16  # codes that a round of its search asks about
BLOCK = 64  # tokens that a program of pack_values sees

# -------------------- selection under a budget


def long_cumsum(x: Tensor, block: int = 1024) -> Tensor:
    """Sum integers x (..., N) up along N, block by block: a GPU sums few long rows slowly."""
    blocks = F.pad(x, (0, -x.size(-1) % block)).unflatten(-1, (-1, block)).cumsum(-1)
    before = blocks[..., -1].cumsum(-1) - blocks[..., -1]
    return (blocks + before.unsqueeze(-1)).flatten(-2)[..., : x.size(-1)]


def take_within_ref(score: Tensor, m: Tensor, cost: Tensor | None = None) -> Tensor:
    """Compute take_within by a stable sort."""
    if not score.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    best, order = score.sort(dim=-1, descending=True, stable=True)
    if cost is None:
        spent = torch.arange(1, score.size(-1) + 1, device=score.device)
    else:
        spent = long_cumsum(cost.expand_as(order).gather(-1, order))
    taken = (spent <= m.unsqueeze(-1)) & (best > float("-inf"))
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, taken)


@jit
def _entries(score_ptr, cost_ptr, base, i, N):
    """Load entries i of a row: int32 codes in the order of their scores, and int32 costs.

    -0.0 has the code of 0.0; -inf and i >= N the lowest code, which nothing else has."""
    x = tl.load(score_ptr + base + i, mask=i < N, other=float("-inf")).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    code = tl.where(bits >= 0, bits, tl.where(bits == -2147483648, 0, bits ^ 0x7FFFFFFF))
    code = tl.where(x > float("-inf"), code, -2147483648)
    if cost_ptr is None:
        return code, tl.full(i.shape, 1, tl.int32)
    else:
        return code, tl.load(cost_ptr + base + i, mask=i < N, other=0).to(tl.int32)


@jit
def narrow(found_ptr, m, step, BOUNDS: tl.constexpr):
    """Say where a round leaves the search for the largest t with cost(code >= t) > m.

    t lies in lo .. lo + step - 1 (0: the lowest code; int64), and what lies above that range costs
    `above` <= m. Returns lo, above.
    found (BOUNDS + 2,) int64: cost(code >= lo + j step) for j = 1 .. BOUNDS, then the lo and above
    that the round began with."""
    spent = tl.load(found_ptr + tl.arange(0, BOUNDS))
    above = tl.load(found_ptr + BOUNDS + 1)
    lo = tl.load(found_ptr + BOUNDS) + tl.sum((spent > m).to(tl.int64)) * step
    return lo, tl.max(tl.where(spent <= m, spent, above))


@jit
def begin_round(found_ptr, m, r, ROUNDS: tl.constexpr, BOUNDS: tl.constexpr):
    """Begin round r of ROUNDS where the one before, found (BOUNDS + 2,), left the search.

    Returns lo, above (see narrow) and the codes (BOUNDS,) int32 whose costs are asked for: they cut
    what is left of the range into BOUNDS + 1 parts, of one code each in the last round."""
    step = tl.full([], 1, tl.int64)
    for _ in tl.range(r + 1, ROUNDS):
        step *= BOUNDS + 1
    lo, above = narrow(found_ptr, m, step * (BOUNDS + 1), BOUNDS)
    bound = lo + (tl.arange(0, BOUNDS) + 1) * step - 2147483648
    return lo, above, tl.minimum(bound, 2147483647).to(tl.int32)


@jit
def end_round(found_ptr, lo, above, spent, first, BOUNDS: tl.constexpr):
    """Add to found (BOUNDS + 2,) what this program saw, spent (BOUNDS,) int32; the first program of
    a row notes where the round began."""
    tl.atomic_add(found_ptr + tl.arange(0, BOUNDS), spent.to(tl.int64), sem="relaxed")
    if first:
        tl.store(found_ptr + BOUNDS, lo)
        tl.store(found_ptr + BOUNDS + 1, above)


@jit
def _search_kernel(
    score_ptr,
    cost_ptr,
    m_ptr,
    found_ptr,
    N,
    n_blocks,
    r,
    ROUNDS: tl.constexpr,
    BOUNDS: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Narrow each row's threshold in round r: read found[row, r], add to found[row, r + 1].

    found (rows, ROUNDS + 1, BOUNDS + 2) int64, zeros at the start: see narrow"""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    found_ptr += (row * (ROUNDS + 1) + r) * (BOUNDS + 2)
    lo, above, bound = begin_round(found_ptr, tl.load(m_ptr + row), r, ROUNDS, BOUNDS)
    spent = tl.zeros((BOUNDS, CHUNK), tl.int32)
    end = tl.minimum(block * SPAN + SPAN, N)
    for at in tl.range(block * SPAN, end, CHUNK, num_stages=4):
        i = at + tl.arange(0, CHUNK)[None, :]
        code, cost = _entries(score_ptr, cost_ptr, row * N, i, N)
        spent += tl.where(code >= bound[:, None], cost, 0)
    end_round(found_ptr + BOUNDS + 2, lo, above, tl.sum(spent, 1), block == 0, BOUNDS)


@jit
def _take_kernel(
    score_ptr,
    cost_ptr,
    m_ptr,
    found_ptr,
    ties_before_ptr,
    out_ptr,
    N,
    n_blocks,
    WRITE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BOUNDS: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Take what lies above the threshold, and the first of what lies at it.

    Without WRITE, ties_before (rows, n_blocks) int64 becomes what each block's entries at the
    threshold cost. With it, given what such entries before the block cost, out (rows, N) bool
    becomes the choice."""
    pid = tl.program_id(0)
    row = (pid // n_blocks).to(tl.int64)
    block = pid % n_blocks
    budget = tl.load(m_ptr + row)
    found_ptr += (row * (ROUNDS + 1) + ROUNDS) * (BOUNDS + 2)
    lo, above = narrow(found_ptr, budget, 1, BOUNDS)
    lo = (lo - 2147483648).to(tl.int32)
    spent = above + tl.load(ties_before_ptr + pid) if WRITE else above
    end = tl.minimum(block * SPAN + SPAN, N)
    for at in tl.range(block * SPAN, end, CHUNK, num_stages=4):
        i = at + tl.arange(0, CHUNK)
        code, cost = _entries(score_ptr, cost_ptr, row * N, i, N)
        tie = (code == lo) & (lo > -2147483648)  # where the threshold is the lowest, all fits
        cost = tl.where(tie, cost, 0)
        if WRITE:
            taken = (code > lo) | tie & (spent + tl.cumsum(cost, 0) <= budget)
            tl.store(out_ptr + row * N + i, taken, mask=i < N)
        spent += tl.sum(cost)
    if not WRITE:
        tl.store(ties_before_ptr + pid, spent - above)


def take_by_search(
    search,
    take,
    inputs: Sequence,
    m: Tensor,
    out: Tensor,
    N: int,
    span: int,
    bounds: int,
    sizes: Sequence[int],
) -> None:
    """Take from each of m.numel() rows, of N entries each, what costs no more than its budget.

    Kernel `search` finds a row's threshold, `bounds` codes a round; kernel `take` sums what lies at
    it in each block of `span` entries, then writes `out` given what the blocks before take of it.
    inputs, sizes: arguments of both kernels, the first and the last. See take_within."""
    rounds = 1
    while (bounds + 1) ** rounds < 2**32:
        rounds += 1
    n_blocks = cdiv(N, span)
    grid = (m.numel() * n_blocks,)
    found = torch.zeros(m.numel(), rounds + 1, bounds + 2, dtype=torch.int64, device=m.device)
    before = torch.empty(m.numel(), n_blocks, dtype=torch.int64, device=m.device)
    sizes = (rounds, bounds, span, *sizes)
    for r in range(rounds):
        search[grid](*inputs, m, found, N, n_blocks, r, *sizes)
    take[grid](*inputs, m, found, before, out, N, n_blocks, False, *sizes)
    before = before.cumsum(-1) - before
    take[grid](*inputs, m, found, before, out, N, n_blocks, True, *sizes)


def take_within(score: Tensor, m: Tensor, cost: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Take from each row what comes first, best first, while the sum of costs stays <= m.

    score  (..., N) float, without NaN
    m      (...) int64, 0 or more, broadcastable to score.shape[:-1]
    cost   (..., N) integers below 2^18; None: all 1
    Returns (..., N) bool. The first entry that does not fit ends it; -inf is never taken. Of equal
    scores the lower index comes first; 0.0 equals -0.0.

    The kernel sorts nothing: 8 passes find each row's threshold, 16 codes a pass; the better
    entries are taken, and of those at it the first. Integer sums: the same result every time. No
    host sync; score is read 10 times."""
    if not use_triton(impl, score.device, score.dtype):
        return take_within_ref(score, m, cost)
    out = torch.empty_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
    if not score.numel():
        return out
    inputs = (score.contiguous(), None if cost is None else cost.expand_as(score).contiguous())
    m = m.expand(score.shape[:-1]).contiguous()
    kernels = (_search_kernel, _take_kernel)
    take_by_search(*kernels, inputs, m, out, score.size(-1), SPAN, BOUNDS, (CHUNK,))
    return out


def select_top_m(scores: Tensor, m: Tensor, impl: str = "auto") -> Tensor:
    """Mark the m largest scores of each row: bool like scores, min(m, entries above -inf) of them.

    scores  (..., N) float, without NaN (it would sort before everything)
    m       (...) int64, 0 or more, broadcastable to scores.shape[:-1]: each row may have its own
    Of equal scores the lower index wins; in a plane (C, S) flattened token-major and group-minor
    that is the earlier token, then the lower group. +inf comes first, -inf is never picked."""
    return take_within(scores, m, impl=impl)


def select_joint(
    value: Tensor, m: Tensor, impl: str = "auto", key: int = 0, cost: Tensor | None = None
) -> Tensor:
    """Select tokens and their parts under one budget: bool (..., N, S), the parts kept. A token is
    kept if one of its parts is.

    value  (..., N, S) float >= 0, what a part is worth; inf: must stay; -inf: of no token
    m      (...) int64, the budget
    key:   what a kept token pays for being there; 0: S
    cost   (S,) int64 >= 1, what each part costs; None: 1 each

    Greedy by worth per cost: a token comes with the parts that make (their worth) / (key + their
    cost) largest, further ones alone. What does not fit ends it, so less than one token with all
    its parts stays unused. No choice of that cost is worth more, if parts of a token are taken by
    falling worth per cost. Of equal ones the earlier token wins, then the lower part; of two ways
    to come that are equal, the shorter one."""
    S = value.size(-1)
    each = cost
    if cost is None:
        each = torch.ones(S, dtype=torch.int64, device=value.device)
    best, part = (value / each).sort(dim=-1, descending=True, stable=True)  # (..., N, S)
    rank = torch.arange(S, device=value.device)
    each = each[part]
    spent = (key or S) + _sum_up(each)
    density, last = (_sum_up(best * each) / spent).max(-1, keepdim=True)  # (..., N, 1)
    with_key = rank <= last
    # Rounding must not put a part before the token that it is of.
    density = torch.where(with_key, density, best.minimum(density))
    first = torch.where(rank == 0, spent.gather(-1, last), 0)  # pays for all that come with it
    price = torch.where(with_key, first, each).to(torch.uint8 if cost is None else torch.int32)
    taken = take_within(density.flatten(-2), m, price.flatten(-2), impl).view(value.shape)
    return torch.zeros_like(with_key).scatter(-1, part, taken)


def _sum_up(x: Tensor) -> Tensor:
    """Sum up along the last dimension, as the outermost one: a GPU does that many times faster."""
    return x.movedim(-1, 0).contiguous().cumsum(0).movedim(0, -1)


# -------------------- packing


class Context(NamedTuple):
    """What a RaggedCache packs: contexts of C columns, those of the first layer's sequences, then
    those of the next's."""

    k: Tensor  # (B, Hkv, C, D) keys
    z: Tensor  # (B, Hkv, C, D) values in the coordinates that are cut into groups
    keep: Tensor  # (B, Hm, C) bool, tokens that survive; Hm = 1 or Hkv
    mask: Tensor  # (B, Hm, C, S) bool, groups of theirs; or uint8, their levels 0 to 3
    # (B, Hkv, D, D) float64, second moments of queries for which integer keys are rounded; None: to
    # the nearest
    query_moment: Tensor | None = None
    # what keys (n, D) of all segments in turn, as they will be read, tell of z, which is left out
    predict: Callable[[Tensor], Tensor] | None = None

    @property
    def here(self) -> Tensor:
        """The tokens that survive of every KV head: (B, Hkv, C) bool."""
        return self.keep.expand(-1, self.k.size(1), -1)


class PackedValues(NamedTuple):
    """A context in the flat layout of PackedView, segment after segment without gaps."""

    keys: Tensor  # (n_tokens, D)
    rows: Tensor  # (n_rows, d), token-major
    bits: Tensor  # (n_masks,) of mask_dtype, by mask head
    before: Tensor  # (n_masks,) uint8
    tile_rows: Tensor  # (tiles,) int32
    n_packed: Tensor  # (B, Hm) int64 tokens that survive, on the host
    n_rows: Tensor  # (B, Hm) int64 rows, on the host


def pack_values_ref(k: Tensor, z: Tensor, keep: Tensor, mask: Tensor) -> PackedValues:
    """Compute pack_values by boolean indexing."""
    Hkv = k.size(1)
    S = mask.size(-1)
    bits = mask_to_bits(mask[keep])
    count = mask.sum(-1)  # (B, Hm, C) rows of each token
    n_packed = keep.sum(-1).cpu()
    tiles = tiles_of(n_packed, tile_size(S), k.device)
    before, tile_rows = tile_index((count.cumsum(-1) - count)[keep], tiles)
    flat = mask.expand(-1, Hkv, -1, -1).reshape(-1)  # one index per row, not four
    return PackedValues(
        k[keep.expand(-1, Hkv, -1)],
        z.reshape(-1, k.size(-1) // S)[flat],
        bits,
        before,
        tile_rows,
        n_packed,
        count.sum(-1).cpu(),
    )


@jit
def _pack_kernel(
    k_ptr,
    z_ptr,
    keep_ptr,
    mask_ptr,
    token_at_ptr,
    row_at_ptr,
    keys_ptr,
    rows_ptr,
    bits_ptr,
    rows_before_ptr,
    C,
    n_blocks,
    Hkv,
    G,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    z_stride_b,
    z_stride_h,
    z_stride_t,
    D: tl.constexpr,
    S: tl.constexpr,
    DIMS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move BLOCK tokens of one KV head.

    token_at, row_at (B, Hkv, n_blocks): where its first key and row go. G heads share a mask, the
    first of them writes bits and rows_before. DIMS, ROW: D and d up to a power of 2."""
    pid = tl.program_id(0)
    segment = (pid // n_blocks).to(tl.int64)
    k_ptr += segment // Hkv * k_stride_b + segment % Hkv * k_stride_h
    z_ptr += segment // Hkv * z_stride_b + segment % Hkv * z_stride_h
    t = pid % n_blocks * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    in_mask = segment // G * C + t  # (BLOCK,)
    here = tl.load(keep_ptr + in_mask, mask=t < C, other=0).to(tl.int32)
    group = tl.arange(0, S)
    kept = tl.load(mask_ptr + in_mask[:, None] * S + group[None, :], mask=(t < C)[:, None], other=0)
    kept = kept.to(tl.int32)  # (BLOCK, S)
    count = tl.sum(kept, 1)
    tokens_before = tl.cumsum(here, 0) - here  # of this block
    rows_before = tl.cumsum(count, 0) - count
    token = tl.load(token_at_ptr + pid) + tokens_before
    row = tl.load(row_at_ptr + pid) + rows_before

    dim = tl.arange(0, DIMS)
    there = (here > 0)[:, None] & (dim < D)[None, :]
    key = tl.load(k_ptr + t[:, None] * k_stride_t + dim[None, :], mask=there)
    tl.store(keys_ptr + token[:, None] * D + dim[None, :], key, mask=there)

    pair = tl.arange(0, BLOCK * S)  # (token, group)
    dim = tl.arange(0, ROW)
    source = (pid % n_blocks * BLOCK + pair // S).to(tl.int64) * z_stride_t + pair % S * (D // S)
    to = tl.reshape(row[:, None] + tl.cumsum(kept, 1) - kept, (BLOCK * S,)) * (D // S)
    there = (tl.reshape(kept, (BLOCK * S,)) > 0)[:, None] & (dim < D // S)[None, :]
    value = tl.load(z_ptr + source[:, None] + dim[None, :], mask=there)
    tl.store(rows_ptr + to[:, None] + dim[None, :], value, mask=there)

    if segment % G == 0:
        first = tl.load(token_at_ptr + segment * n_blocks)  # token of the segment
        mask_slot = first // G + token - first
        word = tl.sum(kept.to(tl.int64) << group[None, :], 1).to(bits_ptr.dtype.element_ty)
        tl.store(bits_ptr + mask_slot, word, mask=here > 0)
        of_segment = (row - tl.load(row_at_ptr + segment * n_blocks)).to(tl.int32)
        tl.store(rows_before_ptr + mask_slot, of_segment, mask=here > 0)


def pack_values(
    k: Tensor, z: Tensor, keep: Tensor, mask: Tensor, impl: str = "auto"
) -> PackedValues:
    """Pack a context.

    k, z  (B, Hkv, C, D) of any strides
    keep  (B, Hm, C) bool, tokens that survive; Hm = 1 or Hkv
    mask  (B, Hm, C, S) bool, their groups; False where a token is not kept

    The kernel reads each kept key and value once; one host sync before it, for the counts."""
    if not use_triton(impl, k.device, k.dtype):
        return pack_values_ref(k, z, keep, mask)
    B, Hkv, C, D = k.shape
    S = mask.size(-1)
    G = Hkv // mask.size(1)
    k = dense_rows(k)
    z = dense_rows(z)
    keep = keep.contiguous()
    mask = mask.contiguous()
    n_blocks = cdiv(C, BLOCK)
    # Tokens and rows of every block.
    count = torch.stack((keep.view(torch.uint8), mask.sum(-1, dtype=torch.uint8)))  # (2, B, Hm, C)
    count = F.pad(count, (0, -C % BLOCK)).unflatten(-1, (n_blocks, BLOCK)).sum(-1)
    n_packed, n_rows = count.sum(-1).cpu()  # (B, Hm)
    # before the kernels, behind which a copy from pageable memory may wait
    tiles = tiles_of(n_packed, tile_size(S), k.device)
    n_tokens = int(n_packed.sum())
    total = int(n_rows.sum())
    keys = k.new_empty(n_tokens * G, D)
    rows = z.new_empty(total * G, D // S)
    bits = torch.empty(n_tokens, dtype=mask_dtype(S), device=k.device)
    rows_before = torch.empty(n_tokens, dtype=torch.int32, device=k.device)
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
    before, tile_rows = tile_index(rows_before, tiles)
    return PackedValues(keys, rows, bits, before, tile_rows, n_packed, n_rows)
