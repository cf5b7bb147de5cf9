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
    count_planes,
    dequantise_keys,
    quantise_keys,
    quantise_levels,
    quantise_values,
    row_bytes,
    split_levels,
    to_codes,
)
from storage.integers.rounding import QueryMoments, error_feedback, gptq_round
from storage.kernel_base import TRITON, dense_rows, jit, tl, triton, use_triton
from storage.layout import (
    cdiv,
    mask_dtype,
    mask_to_bits,
    starts,
    tile_index,
    tile_size,
    tiles_of,
)
from storage.packing import Context, long_cumsum

NUMBERS = 4096  # of values that a program takes, of whole tokens
# Whether Triton spreads the last dimension over lanes where several are as good to load along.
LAST = tl.constexpr(TRITON >= (3, 7)) if triton else True


class PackedInts(NamedTuple):
    """Contexts as RaggedCache holds them."""

    keys: Tensor  # (n, D key_bits / 8) uint8
    rows: Tensor  # (rows, d value_bits / 8), or bit planes (rows, d / 4), uint8
    key_scale: Tensor  # (blocks, 2, D) float16
    value_scale: Tensor  # (n, 2), with levels (n, 1), float16
    bits: Tensor  # (n_masks,) of mask_dtype
    before: Tensor  # (n_masks,) uint8
    tile_rows: Tensor  # (tiles,) int32
    n_packed: Tensor  # (B, Hm) int64 tokens of each segment, on the host
    n_rows: Tensor  # (B, Hm) int64 rows, on the host


def gains(fmts: Sequence[IntFormat], B: int) -> Tensor:
    """Return the gain of every segment, of layers that have B / L sequences each: (B Hkv, D)."""
    gain = torch.stack([fmt.gain for fmt in fmts])  # (L, Hkv, D)
    of_sequences = gain.repeat_interleave(B // len(fmts), 0)
    return of_sequences.flatten(0, 1)


def pack_context_ref(fmts: Sequence[IntFormat], context: Context) -> PackedInts:
    """Compute pack_context in passes over all numbers."""
    k, z, keep, mask, query_moment, predict = context
    fmt = fmts[0]
    B, Hkv, _, _ = k.shape
    here = context.here
    n_here = here.sum(-1)  # (B, Hkv)
    keys, key_scale, block = _keys(fmt, k[here], n_here, query_moment)
    of_heads = mask.expand(-1, Hkv, -1, -1)
    mine = of_heads[here]  # (n, S)
    values = z[here]  # (n, D)
    if predict is not None:  # by the keys that will be read
        read = dequantise_keys(keys, key_scale, block, fmt.key_bits, z.dtype)
        values = values - predict(read)
    if fmt.levelled:
        planes = bit_planes(mine).sum(-1)
        first = planes.cumsum(0) - planes
        gain = gains(fmts, B).view(B, Hkv, 1, -1)
        gain = gain.expand_as(z)[here]
        total = int(planes.sum())
        rows, scale = quantise_levels(values, mine, first, total, gain)
        count = bit_planes(mask).sum(-1)
        word = split_levels(mask)
    else:
        all_rows, scale = quantise_values(values, mine, fmt.value_bits)
        rows = all_rows[mine]
        count = mask.sum(-1)
        word = mask
    n_packed = keep.sum(-1).cpu()
    n_rows = count.sum(-1).cpu()
    before = count.cumsum(-1) - count
    tiles = tiles_of(n_packed, tile_size(mask.size(-1), fmt.levelled), k.device)
    index = tile_index(before[keep], tiles)
    bits = mask_to_bits(word[keep])
    return PackedInts(keys, rows, key_scale, scale, bits, *index, n_packed, n_rows)


def _keys(
    fmt: IntFormat, k: Tensor, n: Tensor, query_moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise keys k (tokens, D) of segments with n (B, Hkv) each, in blocks of their own. Returns
    bytes and scales, and the block (tokens,) of each."""
    blocks = cdiv(n, fmt.block)
    of_segments = n.flatten()
    first_token = starts(n).flatten().repeat_interleave(of_segments)
    first_block = starts(blocks).flatten().repeat_interleave(of_segments)
    token = torch.arange(int(n.sum()), device=n.device)
    number = token - first_token
    block = first_block + number // fmt.block
    rounding = to_codes  # to the nearest
    if query_moment is not None:
        moments = QueryMoments(query_moment.flatten(0, 1), of_segments)
        rounding = partial(gptq_round, moments)
    n_blocks = int(blocks.sum())
    held, scale = quantise_keys(k, block, n_blocks, fmt.key_bits, rounding)
    return held, scale, block


# -------------------- keys


@jit
def _load(ptr, BACKWARDS: tl.constexpr):
    """Load such that the last dimension is spread over lanes, unless numbers lie side by side in
    another. BACKWARDS: the dimensions, the last one first."""
    if LAST:
        return tl.load(ptr)
    else:
        return tl.permute(tl.load(tl.permute(ptr, BACKWARDS)), BACKWARDS)


@jit
def _nearest(place, largest):
    """Round to the nearest code of 0 to largest, of two the even one, where largest < 2^22."""
    code = tl.minimum(tl.maximum(place, 0.0), largest)
    return (code + 12582912.0) - 12582912.0


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
    width,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Turn the keys of one block of a segment into integers: to the nearest, or where order (B Hkv,
    D) and share (B Hkv, D, D) of error_feedback are given as gptq_round does.

    Then a thread has all dimensions of a token, in that order, and asks no other thread. A rounded
    one is replaced by its code. They are rounded in D / WIDTH parts, so that no more is done to a
    part that has been rounded. width: WIDTH, not known when compiling, or each dimension of a part
    would be written out."""
    segment = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = tl.load(n_ptr + segment)
    if first >= n:
        return
    number = first + tl.arange(0, BLOCK)
    token = tl.load(token_base_ptr + segment)
    source = tl.load(source_ptr + token + tl.minimum(number, n - 1))  # past the last, it again
    t = source - segment * C
    i = tl.arange(0, D)
    if order_ptr is not None:
        order_ptr += segment * D
        i = tl.load(order_ptr + i).to(tl.int32)
    k_ptr += segment // Hkv * k_stride_b
    k_ptr += segment % Hkv * k_stride_h
    k_ptr += t * k_stride_t
    x = _load(k_ptr[:, None] + i[None, :], (1, 0)).to(tl.float32)
    step, middle = _scale(tl.min(x, 0), tl.max(x, 0), BITS)
    block = tl.load(block_base_ptr + segment) + tl.program_id(1)
    scale_ptr += block * 2 * D
    tl.store(scale_ptr + i, step)
    tl.store(scale_ptr + D + i, middle)
    if order_ptr is None:
        codes = _codes(x, step[None, :], middle[None, :], BITS)
    else:
        tl.debug_barrier()  # a step is read by threads that did not write it
        off = x - middle.to(tl.float32)[None, :]
        off = tl.reshape(tl.trans(off), (D // 4, 4, BLOCK))
        # Four numbers of share lie side by side in a thread: one load.
        rank = tl.arange(0, D // 4)[:, None, None] * 4 + tl.arange(0, 4)[None, :, None]
        share_ptr += segment * D * D + rank + tl.zeros((1, 1, BLOCK), tl.int32)
        half = 1 << (BITS - 1)
        for part in tl.static_range(D // WIDTH - 1, -1, -1):
            end = (part + 1) * WIDTH
            for back in tl.range(0, width):
                j = end - 1 - back
                one = tl.load(scale_ptr + tl.load(order_ptr + j)).to(tl.float32)
                in_part = (rank >= end - WIDTH) & (rank < end)  # known when compiling
                mine = in_part & (rank == j)
                own = tl.sum(tl.sum(tl.where(mine, off, 0.0), 0), 0)
                code = _nearest(own * (1.0 / one) + half, 2.0 * half - 1)
                error = own - (code - half) * one  # the product is exact
                share = _load(share_ptr + j * D, (2, 1, 0))
                rest = off - error[None, None, :] * share
                moved = tl.where(mine, code[None, None, :], rest)
                off = tl.where(rank < end, moved, off)
        # Back to the dimensions' own order: a product with zeros and ones, which is exact.
        codes = tl.reshape(off, (D, BLOCK)).to(tl.float16)
        own_order = (tl.arange(0, D)[:, None] == i[None, :]).to(tl.float16)
        codes = tl.trans(tl.dot(own_order, codes)).to(tl.int32)
    keys_ptr += (token + number) * (D * BITS // 8)
    _store_codes(keys_ptr, codes, number < n, BITS, BLOCK, D)


# -------------------- values with levels


@jit
def _pack_levels_kernel(
    z_ptr,
    level_ptr,
    gain_ptr,
    inverse_ptr,
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
    UNIT_3: steps of levels 2 and 3; inverse (B Hkv, D): of gain, (B Hkv, D)."""
    begin = tl.program_id(0).to(tl.int64) * TOKENS
    at = begin + tl.arange(0, TOKENS)
    valid = at < n
    is_token = valid[:, None]
    source = tl.load(source_ptr + at, mask=valid, other=0).to(tl.int32)  # divides faster
    first = tl.load(first_ptr + at, mask=valid, other=0)
    segment = source // C
    t = source % C
    level_ptr += (segment // G * C + t).to(tl.int64) * S

    # levels (TOKENS, S), and where each group's planes begin
    g = tl.arange(0, S)
    level = tl.load(level_ptr[:, None] + g[None, :], mask=is_token, other=0)
    level = level.to(tl.int32)
    planes = level + (level == 3).to(tl.int32)
    row = tl.cumsum(planes, 1) - planes  # of the token's own
    unit = tl.where(level == 3, UNIT_3, 1.0)
    unit = tl.where(level == 2, UNIT_2, unit)
    zero = tl.where(level == 3, 128.0, 0.0)
    zero = tl.where(level == 2, 8.0, zero)
    zero = tl.where(level == 1, 1.5, zero)[:, :, None]
    largest = tl.where(level == 3, 255.0, 0.0)
    largest = tl.where(level == 2, 15.0, largest)
    largest = tl.where(level == 1, 3.0, largest)[:, :, None]
    kept = level > 0
    # What a dropped group has counts for nothing: it becomes 0.
    inverse_unit = tl.where(kept, 1.0 / unit, 0.0)[:, :, None]
    unit = tl.where(kept, unit, 0.0)[:, :, None]

    # numbers (TOKENS, S, d), in units of a group's step where the token's own is 1
    d: tl.constexpr = D // S
    dim = g[:, None] * d + tl.arange(0, d)[None, :]
    z_ptr += (segment // Hkv).to(tl.int64) * z_stride_b
    z_ptr += (segment % Hkv).to(tl.int64) * z_stride_h
    z_ptr += t.to(tl.int64) * z_stride_t
    there = valid[:, None, None] & (dim >= 0)[None]
    of_head = segment[:, None, None] * D + dim[None]
    gain = tl.load(gain_ptr + of_head, mask=there, other=1.0)
    inverse = tl.load(inverse_ptr + of_head, mask=there, other=1.0)
    z = tl.load(z_ptr[:, None, None] + dim[None], mask=there, other=0).to(tl.float32)
    own = gain * unit
    x = z * inverse * inverse_unit

    # the step that leaves a token the least error
    scaled = x * unit
    square = tl.sum(tl.sum(scaled * scaled, 2), 1)
    count = tl.sum(kept.to(tl.int32), 1) * d
    mean = tl.div_rn(square, tl.maximum(count, 1).to(tl.float32))
    rms = tl.sqrt_rn(mean)
    best = tl.minimum(tl.maximum(rms, LEAST), 65504.0)
    best = best.to(tl.float16)
    least_error = tl.full([TOKENS], float("inf"), tl.float32)
    for i in tl.range(0, N_TRIED):
        factor = tl.load(tried_ptr + i)
        step = tl.maximum(rms * factor, LEAST)
        step = tl.minimum(step, 65504.0).to(tl.float16)
        wide = step.to(tl.float32)
        place = zero + x * (1.0 / wide)[:, None, None]
        off = (_nearest(place, largest) - place) * own
        error = tl.sum(tl.sum(off * off, 2), 1) * (wide * wide)
        best = tl.where(error < least_error, step, best)
        least_error = tl.minimum(error, least_error)
    tl.store(scale_ptr + at, best, mask=valid)

    # byte c of a plane has the codes c, c + ROW, c + 2 ROW, c + 3 ROW of its group
    ROW: tl.constexpr = d // 4
    place = zero + x * (1.0 / best.to(tl.float32))[:, None, None]
    code = _nearest(place, largest).to(tl.int32)
    code = tl.reshape(code, (TOKENS, S, 4, ROW))
    shift = (2 * tl.arange(0, 4))[None, None, :, None]
    rows_ptr += first * ROW
    to = row[:, :, None] * ROW + tl.arange(0, ROW)[None, None, :]
    to = rows_ptr[:, None, None] + to
    for i in tl.static_range(4):
        plane = (code >> (2 * i)) & 3
        byte = tl.sum(plane << shift, 2)
        has = is_token & (planes > i)
        tl.store(to + i * ROW, byte.to(tl.uint8), mask=has[:, :, None])

    writes = valid & (segment % G == 0)
    base = tl.load(token_base_ptr + segment, mask=valid, other=0)
    slot = at - base + base.to(tl.int32) // G
    low_bit = (level & 1).to(tl.int64)
    high_bit = (level >> 1).to(tl.int64)
    low = tl.sum(low_bit << g[None, :], 1)
    high = tl.sum(high_bit << (S + g)[None, :], 1)
    word = low | high
    tl.store(bits_ptr + slot, word.to(bits_ptr.dtype.element_ty), mask=writes)
    first_row = tl.load(row_base_ptr + segment, mask=valid, other=0)
    rows_before = first - first_row
    tl.store(before_ptr + slot, rows_before.to(tl.int32), mask=writes)


# -------------------- both


def kernels_pack(fmt: IntFormat, k: Tensor, S: int, impl: str) -> bool:
    """Say whether kernels pack such contexts, keys k (..., C, D): values with levels, powers of 2,
    and fewer than 2^31 tokens."""
    D = k.size(-1)
    powers_of_2 = D & (D - 1) == 0 and S & (S - 1) == 0
    fits = fmt.levelled and powers_of_2 and D >= 16 and k[..., 0].numel() < 2**31
    return fits and use_triton(impl, k.device, k.dtype)


def pack_context(fmts: Sequence[IntFormat], context: Context, impl: str = "auto") -> PackedInts:
    """Pack a context of any strides.

    fmts: one per layer; they differ in their gain
    Where keys tell values the reference packs. The host waits twice, for counts and for sources,
    and not for a kernel. Kernel and reference round sums differently: where two steps of a token
    are as good, or a number lies between two codes, they may differ."""
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
    order = None
    share = None
    if query_moment is not None:
        order, share = error_feedback(query_moment.flatten(0, 1))
        share = share.contiguous()
    count = count_planes(mask)  # (B, Hm, C)
    n_packed, n_rows = torch.stack((keep.sum(-1), count.sum(-1))).cpu()  # (B, Hm)
    of_heads = keep.expand(-1, Hkv, -1).reshape(-1)
    source = of_heads.nonzero().squeeze(1)
    planes = count.expand(-1, Hkv, -1).reshape(-1)[source]
    first = long_cumsum(planes) - planes
    n = n_packed.expand(-1, Hkv)
    blocks = cdiv(n, fmt.block)
    segments = (n, starts(n), starts(blocks), starts(n_rows.expand(-1, Hkv)))
    on_device = torch.stack(segments).to(k.device, non_blocking=True)
    n_here, token_base, block_base, row_base = on_device
    size = tile_size(S, levelled=True)
    # before the kernels, behind which a copy from pageable memory may wait
    tiles = tiles_of(n_packed, size, k.device)

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=k.device)

    n_tokens = len(source)
    keys = new(torch.uint8, n_tokens, row_bytes(D, fmt.key_bits))
    key_scale = new(torch.float16, int(blocks.sum()), 2, D)
    rows = new(torch.uint8, int(n_rows.sum()) * G, row_bytes(D // S, 2))
    scale = new(torch.float16, n_tokens, 1)
    bits = new(mask_dtype(2 * S), n_tokens // G)
    rows_before = new(torch.int32, n_tokens // G)
    if n_tokens:
        width = max(4, D // 16)
        _pack_keys_kernel[(B * Hkv, int(blocks.max()))](
            k,
            source,
            token_base,
            n_here,
            block_base,
            order,
            share,
            keys,
            key_scale,
            C,
            Hkv,
            *k.stride()[:3],
            width,
            D,
            fmt.key_bits,
            fmt.block,
            width,
            num_warps=max(1, fmt.block // 32),
        )
        gain = gains(fmts, B).contiguous()
        tokens = max(1, NUMBERS // D)
        _pack_levels_kernel[(cdiv(n_tokens, tokens),)](
            z,
            mask,
            gain,
            gain.reciprocal(),
            source,
            first,
            token_base,
            row_base,
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
            tokens,
        )
    index = tile_index(rows_before, tiles)
    return PackedInts(keys, rows, key_scale, scale, bits, *index, n_packed, n_rows)


@cache
def tried(device: torch.device) -> Tensor:
    """Return TRIED there; copied once, since the host waits for it."""
    return torch.tensor(TRIED, device=device)
