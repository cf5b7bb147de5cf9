"""Turn the chosen tokens of contexts into integers, all sequences, heads and layers at once, with
one pass over keys and one over values. format.py says what the integers are, and pack_context_ref
how they are ordered: it takes some hundred passes.

A *source* is where a token comes from: its number among all tokens of all segments, chosen or not.

Letters: storage/layout.py; L layers, whose sequences follow each other in one batch of B; C columns
of a context; n chosen tokens of all segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from storage.integers.append import _codes, _scale, _store_codes
from storage.integers.format import (
    LEVEL_STEPS,
    SMALLEST,
    TRIED,
    IntFormat,
    bit_planes,
    dequantise_keys,
    quantise_keys,
    quantise_levels,
    quantise_values,
    row_bytes,
    split_levels,
    to_codes,
)
from storage.integers.rounding import QueryMoments, error_feedback, gptq_round
from storage.kernel_base import dense_rows, jit, tl, use_triton
from storage.layout import cdiv, mask_dtype, mask_to_bits, starts, tile_index, tile_size
from storage.packing import Context, long_cumsum

TOKENS = 16  # whose values a program takes


class PackedInts(NamedTuple):
    """Contexts as RaggedCache holds them."""

    keys: Tensor  # (n, D key_bits / 8) uint8
    rows: Tensor  # (rows, d value_bits / 8), or bit planes (rows, d / 4), uint8
    key_scale: Tensor  # (blocks, 2, D) float16
    value_scale: Tensor  # (n, 2), with levels (n, 1), float16
    bits: Tensor  # (n_masks,) of mask_dtype
    before: Tensor  # (n_masks,) uint8
    tile_rows: Tensor  # (tiles,) int32
    n_packed: Tensor  # (B, Hm) int64 tokens of each segment
    n_rows: Tensor  # (B, Hm) int64 rows


def gains(fmts: Sequence[IntFormat], B: int) -> Tensor:
    """Return the gain of every segment, of layers that have B / L sequences each: (B Hkv, D)."""
    gain = torch.stack([fmt.gain for fmt in fmts])  # (L, Hkv, D)
    return gain.repeat_interleave(B // len(fmts), 0).flatten(0, 1)


def pack_context_ref(fmts: Sequence[IntFormat], context: Context) -> PackedInts:
    """Compute pack_context in passes over all numbers."""
    k, z, keep, mask, query_moment, predict = context
    fmt = fmts[0]
    B, Hkv, _, _ = k.shape
    here = context.here
    keys, key_scale, block = _keys(fmt, k[here], here.sum(-1), query_moment)
    mine = mask.expand(-1, Hkv, -1, -1)[here]  # (n, S)
    values = z[here]  # (n, D)
    if predict is not None:  # by the keys that will be read
        read = dequantise_keys(keys, key_scale, block, fmt.key_bits, z.dtype)
        values = values - predict(read)
    if fmt.levelled:
        planes = bit_planes(mine).sum(-1)
        first = planes.cumsum(0) - planes
        gain = gains(fmts, B).view(B, Hkv, 1, -1).expand_as(z)[here]
        rows, scale = quantise_levels(values, mine, first, int(planes.sum()), gain)
        count = bit_planes(mask).sum(-1)
        word = split_levels(mask)
    else:
        all_rows, scale = quantise_values(values, mine, fmt.value_bits)
        rows = all_rows[mine]
        count = mask.sum(-1)
        word = mask
    n_packed = keep.sum(-1)
    before = (count.cumsum(-1) - count)[keep]
    index = tile_index(before, n_packed, tile_size(mask.size(-1), fmt.levelled))
    bits = mask_to_bits(word[keep])
    return PackedInts(keys, rows, key_scale, scale, bits, *index, n_packed, count.sum(-1))


def _keys(
    fmt: IntFormat, k: Tensor, n: Tensor, query_moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise keys k (tokens, D) of segments with n (B, Hkv) each, in blocks of their own. Returns
    bytes and scales, and the block (tokens,) of each."""
    blocks = cdiv(n, fmt.block)
    segment_start = starts(n).flatten().repeat_interleave(n.flatten())
    number = torch.arange(int(n.sum()), device=n.device) - segment_start
    block = starts(blocks).flatten().repeat_interleave(n.flatten()) + number // fmt.block
    rounding = to_codes  # to the nearest
    if query_moment is not None:
        rounding = partial(gptq_round, QueryMoments(query_moment.flatten(0, 1), n.flatten()))
    held = quantise_keys(k, block, int(blocks.sum()), fmt.key_bits, rounding)
    return *held, block


# -------------------- keys


@jit
def _pack_keys_kernel(
    k_ptr,
    source_ptr,
    token_base_ptr,
    n_ptr,
    block_base_ptr,
    order_ptr,
    share_ptr,
    keys_ptr,
    scale_ptr,
    C,
    Hkv,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn the keys of one block of a segment into integers: to the nearest, or where order (B Hkv,
    D) is given as gptq_round does, share (B Hkv, D, D) in the dimensions' own order."""
    segment = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = tl.load(n_ptr + segment)
    if first >= n:
        return
    number = first + tl.arange(0, BLOCK)
    valid = number < n
    token = tl.load(token_base_ptr + segment) + number
    t = tl.load(source_ptr + token, mask=valid, other=0) - segment * C
    i = tl.arange(0, D)
    k_ptr += segment // Hkv * k_stride_b + segment % Hkv * k_stride_h
    here = valid[:, None] & (i >= 0)[None, :]
    x = tl.load(k_ptr + t[:, None] * k_stride_t + i[None, :], mask=here, other=0).to(tl.float32)
    low = tl.min(tl.where(here, x, float("inf")), 0)
    high = tl.max(tl.where(here, x, float("-inf")), 0)
    step, middle = _scale(low, high, BITS)
    scale_ptr += (tl.load(block_base_ptr + segment) + tl.program_id(1)) * 2 * D
    tl.store(scale_ptr + i, step)
    tl.store(scale_ptr + D + i, middle)
    if order_ptr is None:
        codes = _codes(x, step[None, :], middle[None, :], BITS)
    else:
        steps = step.to(tl.float32)
        off = x - middle.to(tl.float32)[None, :]
        half = 1 << (BITS - 1)
        share_ptr += segment * D * D + i
        for back in tl.range(0, D):
            j = tl.load(order_ptr + segment * D + D - 1 - back)
            mine = i == j
            own = tl.sum(tl.where(mine[None, :], off, 0.0), 1)
            one = tl.sum(tl.where(mine, steps, 0.0), 0)
            code = tl.floor(tl.div_rn(own, tl.zeros_like(own) + one) + (half + 0.5))
            code = tl.minimum(tl.maximum(code, 0.0), 2.0 * half - 1)
            error = own - (code - half) * one  # the product is exact
            share = tl.load(share_ptr + j * D)  # 0 for what has been rounded
            off = tl.where(mine[None, :], code[:, None], off - error[:, None] * share[None, :])
        codes = off.to(tl.int32)
    _store_codes(keys_ptr + token * (D * BITS // 8), codes, valid, BITS, BLOCK, D)


# -------------------- values with levels


@jit
def _round(x):
    """Round to the nearest integer, of two the even one, where |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@jit
def _pack_levels_kernel(
    z_ptr,
    level_ptr,
    gain_ptr,
    source_ptr,
    first_ptr,
    token_base_ptr,
    row_base_ptr,
    rows_ptr,
    scale_ptr,
    bits_ptr,
    before_ptr,
    tried_ptr,
    n,
    C,
    Hkv,
    G,
    z_stride_b,
    z_stride_h,
    z_stride_t,
    D: tl.constexpr,
    S: tl.constexpr,
    N_TRIED: tl.constexpr,
    UNIT_2: tl.constexpr,
    UNIT_3: tl.constexpr,
    LEAST: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Turn values of TOKENS tokens into bit planes, the first of a token being row `first` (n,).
    G heads share their levels: the first of them writes masks and, to `before` (n_masks,) int32,
    the rows of its segment before each token. tried (N_TRIED,): factors of steps; UNIT_2,
    UNIT_3: steps of levels 2 and 3."""
    at = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    valid = at < n
    source = tl.load(source_ptr + at, mask=valid, other=0)
    first = tl.load(first_ptr + at, mask=valid, other=0)
    segment = source // C
    t = source % C
    level_ptr += (segment // G * C + t) * S

    # levels by group, and where each group's planes begin
    g = tl.arange(0, S)
    level = tl.load(level_ptr[:, None] + g[None, :], mask=valid[:, None], other=0).to(tl.int32)
    planes = level + (level == 3).to(tl.int32)
    BYTES: tl.constexpr = D // 4  # of one plane of all groups; byte c is of group c // ROW
    ROW: tl.constexpr = D // S // 4
    c = tl.arange(0, BYTES)
    earlier = g[None, :, None] < (c // ROW)[None, None, :]
    row = first[:, None] + tl.sum(tl.where(earlier, planes[:, :, None], 0), 1)

    # numbers: quarter p of a group has those whose codes lie at bits 2 p of its bytes
    p = tl.arange(0, 4)
    dim = (c // ROW * (4 * ROW) + c % ROW)[None, :] + p[:, None] * ROW  # (4, BYTES)
    z_at = segment // Hkv * z_stride_b + segment % Hkv * z_stride_h + t * z_stride_t
    there = valid[:, None, None] & (dim >= 0)[None]
    gain = tl.load(gain_ptr + segment[:, None, None] * D + dim[None], mask=there, other=1.0)
    z = tl.load(z_ptr + z_at[:, None, None] + dim[None], mask=there, other=0).to(tl.float32)
    e = tl.div_rn(z, gain)
    of = tl.load(level_ptr[:, None] + (c // ROW)[None, :], mask=valid[:, None], other=0)
    of = of.to(tl.int32)[:, None, :]  # (TOKENS, 1, BYTES)
    kept = of > 0
    unit = tl.where(of == 2, UNIT_2, tl.where(of == 3, UNIT_3, 1.0))
    zero = tl.where(of == 1, 1.5, tl.where(of == 2, 8.0, tl.where(of == 3, 128.0, 0.0)))
    largest = tl.where(of == 1, 3.0, tl.where(of == 2, 15.0, tl.where(of == 3, 255.0, 0.0)))

    # the step that leaves a token the least error
    square = tl.sum(tl.sum(tl.where(kept, e * e, 0.0), 2), 1)
    count = tl.sum((level > 0).to(tl.int32), 1) * (D // S)
    rms = tl.sqrt_rn(tl.div_rn(square, tl.maximum(count, 1).to(tl.float32)))
    weight = gain * gain * tl.where(kept, unit * unit, 0.0)
    x = tl.div_rn(e, unit + tl.zeros_like(e))
    best = tl.minimum(tl.maximum(rms, LEAST), 65504.0).to(tl.float16)
    least_error = tl.full([TOKENS], float("inf"), tl.float32)
    for i in tl.range(0, N_TRIED):
        step = tl.maximum(rms * tl.load(tried_ptr + i), LEAST)
        step = tl.minimum(step, 65504.0).to(tl.float16)
        wide = step.to(tl.float32)
        place = zero + tl.div_rn(x, wide[:, None, None] + tl.zeros_like(x))
        off = _round(tl.minimum(tl.maximum(place, 0.0), largest)) - place
        error = tl.sum(tl.sum(off * off * weight, 2), 1) * (wide * wide)
        best = tl.where(error < least_error, step, best)
        least_error = tl.minimum(error, least_error)
    tl.store(scale_ptr + at, best, mask=valid)

    own = best.to(tl.float32)[:, None, None] * unit
    place = tl.div_rn(e, own + tl.zeros_like(e)) + zero
    code = _round(tl.minimum(tl.maximum(place, 0.0), largest)).to(tl.int32)
    n_planes = of + (of == 3).to(tl.int32)
    for i in tl.static_range(4):
        byte = tl.sum(((code >> (2 * i)) & 3) << (2 * p)[None, :, None], 1)
        has = valid[:, None] & (tl.max(n_planes, 1) > i)
        to = rows_ptr + (row + i) * ROW + (c % ROW)[None, :]
        tl.store(to, byte.to(tl.uint8), mask=has)

    writes = valid & (segment % G == 0)
    base = tl.load(token_base_ptr + segment, mask=valid, other=0)
    slot = base // G + at - base
    low = tl.sum((level & 1).to(tl.int64) << g[None, :], 1)
    high = tl.sum((level >> 1).to(tl.int64) << (S + g)[None, :], 1)
    tl.store(bits_ptr + slot, (low | high).to(bits_ptr.dtype.element_ty), mask=writes)
    rows_before = first - tl.load(row_base_ptr + segment, mask=valid, other=0)
    tl.store(before_ptr + slot, rows_before.to(tl.int32), mask=writes)


# -------------------- both


def kernels_pack(fmt: IntFormat, k: Tensor, S: int, impl: str) -> bool:
    """Say whether kernels pack such contexts: values with levels, and powers of 2."""
    D = k.size(-1)
    fits = fmt.levelled and D & (D - 1) == 0 and S & (S - 1) == 0
    return fits and use_triton(impl, k.device, k.dtype)


def pack_context(fmts: Sequence[IntFormat], context: Context, impl: str = "auto") -> PackedInts:
    """Pack a context of any strides.

    fmts: one per layer; they differ in their gain
    Where keys tell values the reference packs. The host waits for sizes, three times. Kernel and
    reference round sums differently: where two steps of a token are as good, or a number lies
    between two codes, they may differ."""
    k, z, keep, mask, query_moment, predict = context
    fmt = fmts[0]
    if predict is not None or not kernels_pack(fmt, k, mask.size(-1), impl):
        return pack_context_ref(fmts, context)
    B, Hkv, C, D = k.shape
    S = mask.size(-1)
    G = Hkv // mask.size(1)
    k = dense_rows(k)
    z = dense_rows(z)
    mask = mask.contiguous()
    n = keep.sum(-1)  # (B, Hm)
    count = (mask + (mask == 3)).sum(-1, dtype=torch.int32)  # (B, Hm, C) planes
    n_rows = count.sum(-1)
    n_here = n.expand(-1, Hkv).contiguous()
    blocks = cdiv(n_here, fmt.block)
    source = keep.expand(-1, Hkv, -1).reshape(-1).nonzero().squeeze(1)
    sizes = torch.stack((n_rows.sum() * G, blocks.sum(), blocks.amax())).tolist()
    total, n_blocks, most = sizes
    planes = count.expand(-1, Hkv, -1).reshape(-1).long()
    first = (long_cumsum(planes) - planes)[source]

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=k.device)

    n_tokens = len(source)
    keys = new(torch.uint8, n_tokens, row_bytes(D, fmt.key_bits))
    key_scale = new(torch.float16, n_blocks, 2, D)
    rows = new(torch.uint8, total, row_bytes(D // S, 2))
    scale = new(torch.float16, n_tokens, 1)
    bits = new(mask_dtype(2 * S), n_tokens // G)
    rows_before = new(torch.int32, n_tokens // G)
    if n_tokens:
        token_base = starts(n_here)
        order = None
        share = None
        if query_moment is not None:
            order, share = error_feedback(query_moment.flatten(0, 1))
            share = as_dimensions(order, share)
        _pack_keys_kernel[(B * Hkv, most)](
            k,
            source,
            token_base,
            n_here,
            starts(blocks),
            order,
            share,
            keys,
            key_scale,
            C,
            Hkv,
            *k.stride()[:3],
            D,
            fmt.key_bits,
            fmt.block,
        )
        _pack_levels_kernel[(cdiv(n_tokens, TOKENS),)](
            z,
            mask,
            gains(fmts, B).contiguous(),
            source,
            first,
            token_base,
            starts(n_rows.expand(-1, Hkv)),
            rows,
            scale,
            bits,
            rows_before,
            tried(k.device),
            n_tokens,
            C,
            Hkv,
            G,
            *z.stride()[:3],
            D,
            S,
            len(TRIED),
            *LEVEL_STEPS[2:],
            SMALLEST,
            TOKENS,
        )
    index = tile_index(rows_before, n, tile_size(S, levelled=True))
    return PackedInts(keys, rows, key_scale, scale, bits, *index, n, n_rows)


@cache
def tried(device: torch.device) -> Tensor:
    """Return TRIED there; copied once, since the host waits for it."""
    return torch.tensor(TRIED, device=device)


def as_dimensions(order: Tensor, share: Tensor) -> Tensor:
    """Return the shares (G, D, D) of error_feedback with dimensions in their own order."""
    rank = order.argsort(-1)
    share = share.take_along_dim(rank.unsqueeze(-1), -2)
    return share.take_along_dim(rank.unsqueeze(-2), -1).contiguous()
