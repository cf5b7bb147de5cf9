"""Triton kernel for attention over values predicted from keys, each head's from its own keys.

The problem: in equation (1) of storage/from_keys.py,

    sum_j p_j z_j = (sum_j p_j k_j) W + sum_j p_j m_j r_j

both sums have the weights of one softmax, and the keys of the first have been read for it. The
idea: a program that has a tile of keys for its logits turns it back by its positions, a key whose
halves are (low, high) at an angle t into what RoPE made it from

    R(-t) (low, high) = (low cos t + high sin t, high cos t - low sin t)                         (2)

and adds it up beside the rows. Pieces are joined as ever, their accumulators twice as wide; the
product with W is one small matrix product of a step. A key and a row are read once.

Where the tokens of a segment follow each other, R(-t0 - i) = R(-t0) R(-i) for token i of a tile
that begins at t0: keys of all tiles are turned by the same N angles, which a program reads once,
and the sum of a tile by one more. Elsewhere (chosen tokens) every token reads its cos and sin, D
numbers, as many bytes as its key.

    sums, lse = attend_with_key_sums(q, packed, None, cos, sin, position)
    rows, keys = sums.chunk(2, -1)                       # out = rows + keys @ W

Few queries read many tokens, and a product has 16 rows at least, or 64, but 8 columns: so logits
are (N, M) here, and sums (D, M), tokens and numbers in the rows, queries in the columns.

A window whose values have the coordinates of rows is read by the same programs. The plain form is
attend_predicted (storage/from_keys.py), and what else there is keeps it: keys in few bits, and maps
of all heads. There a query head needs every head's keys with its own weights, so that the keys of
a layer would be loaded Hkv times a step, or the weights of H query heads written and read again.
Letters: storage/layout.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import load_queries, query_rows
from storage.kernel_base import (
    TRITON,
    capped,
    dense_rows,
    jit,
    load_masks,
    load_rows,
    product,
    tl,
    triton,
)
from storage.layout import PackedView, WindowView
from storage.pieces import (
    Variant,
    attend_in_pieces,
    find_piece,
    read_window_columns,
    segment_pieces,
    store_rows,
    weigh_columns,
)


@jit
def before_rope(low, high, cos, sin):
    """Undo RoPE for halves of keys, or of sums of keys: equation (2)."""
    return low * cos + high * sin, high * cos - low * sin


@jit
def _key_sums_kernel(
    q_ptr,
    keys_ptr,
    rows_ptr,
    bits_ptr,
    before_ptr,
    tile_rows_ptr,
    n_packed_ptr,
    token_base_ptr,
    row_base_ptr,
    mask_base_ptr,
    tile_base_ptr,
    window_k_ptr,
    window_v_ptr,
    first_ptr,
    count_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_ml_ptr,
    scale,
    segments,
    Hkv,
    Hm,
    n,
    T,
    W,
    chunk,
    parts,
    n_stride_b,
    n_stride_h,
    position_stride_b,
    position_stride_h,
    first_position,
    positions,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    SEGS: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    HALF: tl.constexpr,
    ALONE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGN: tl.constexpr,
    IN_ORDER: tl.constexpr,
    STAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let M rows of queries read one piece of one segment, N tokens at a time: sums of rows, unless
    keys are ALONE, and of keys before RoPE. Slots of the window, where there is a WINDOW, come
    first: no key has been summed then that would have to be weighed anew.

    low, high: the halves of a query, a key, a sum. HALF: D/2 rounded up to a power of 2
    IN_ORDER: token t of every segment has the position first_position + t, else position_ptr tells
    The rest as in kernels._attention_kernel."""
    seg, piece = find_piece(
        n_packed_ptr,
        first_ptr,
        count_ptr,
        segments,
        Hkv,
        n_stride_b,
        n_stride_h,
        W,
        chunk,
        N,
        SEGS,
    )
    if SEGS > 0:  # noqa: SIM102 (known when compiling)
        if seg >= segments:
            return
    b = seg // Hkv
    h = seg % Hkv
    keys_ptr += tl.load(token_base_ptr + seg) * D
    if not IN_ORDER:
        position_ptr += b.to(tl.int64) * position_stride_b + h * position_stride_h
    if not ALONE:
        mask_seg = b * Hm + (h if Hm > 1 else 0)
        mask_base = tl.load(mask_base_ptr + mask_seg)
        rows_ptr += tl.load(row_base_ptr + seg) * (D // S)
        bits_ptr += mask_base
        if K == 0:
            before_ptr += mask_base
            tile_rows_ptr += tl.load(tile_base_ptr + mask_seg)
    n_packed, n_slots, first, count, behind, size, active = segment_pieces(
        n_packed_ptr,
        first_ptr,
        count_ptr,
        seg,
        segments,
        Hkv,
        n_stride_b,
        n_stride_h,
        W,
        chunk,
        N,
    )
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if piece >= active:
            return
    row = tl.program_id(2) * M + tl.arange(0, M)
    high_ptr = q_ptr + D // 2
    q_low = load_queries(q_ptr, b, h, row, n, T, q_stride_b, q_stride_h, q_stride_t, D // 2, HALF)
    q_high = load_queries(
        high_ptr, b, h, row, n, T, q_stride_b, q_stride_h, q_stride_t, D // 2, HALF
    )
    q_low = tl.trans(q_low)
    q_high = tl.trans(q_high)
    m = tl.full([M], -1e38, tl.float32)
    den = tl.zeros([M], tl.float32)
    stored = tl.zeros([DP, M], tl.float32)
    sum_low = tl.zeros([HALF, M], tl.float32)
    sum_high = tl.zeros([HALF, M], tl.float32)
    none = tl.zeros([N, M], tl.float32)
    nothing = tl.zeros([HALF, M], tl.float32)

    if WINDOW:
        dims = tl.arange(0, DP)
        query = row // n
        heads = (h * n + row % n)[None, :]
        m, den, stored = read_window_columns(
            q_ptr + b * q_stride_b + heads * q_stride_h + query[None, :] * q_stride_t,
            m,
            den,
            stored,
            window_k_ptr + seg.to(tl.int64) * W * D,
            window_v_ptr + seg.to(tl.int64) * W * D,
            dims,
            dims < D,
            query,
            row < T * n,
            tl.maximum(piece * size - behind, 0),
            tl.minimum((piece + 1) * size - behind, n_slots),
            first,
            count,
            W,
            T,
            scale,
            D,
            M,
            DP,
            CAP,
        )
    half = tl.arange(0, HALF)
    dim = half[None, :]
    start = piece * size
    end = tl.minimum((piece + 1) * size, n_packed)
    if IN_ORDER:
        number = tl.arange(0, N)[:, None]  # of a token in its tile
        tile_angle = number * (D // 2) + dim
        in_table = (number < positions) & (dim < D // 2)
        cos = tl.load(cos_ptr + tile_angle, mask=in_table, other=0.0).to(q_low.dtype)
        sin = tl.load(sin_ptr + tile_angle, mask=in_table, other=0.0).to(q_low.dtype)
    if not ALONE:
        bits, offset = load_masks(
            bits_ptr, before_ptr, tile_rows_ptr, start + tl.arange(0, N), end, K, TILE
        )
    for t0 in tl.range(start, end, N, num_stages=STAGES):
        t = t0 + tl.arange(0, N)
        live = t < end
        near = tl.minimum(t, end - 1)  # past the last token it is read again, with no weight
        at = near[:, None] * D + dim
        there = dim < D // 2
        low = tl.load(keys_ptr + at, mask=there, other=0.0, eviction_policy="evict_first")
        high = tl.load(keys_ptr + at + D // 2, mask=there, other=0.0, eviction_policy="evict_first")
        if IN_ORDER:
            first_angle = (first_position + t0) * (D // 2) + half
            first_cos = tl.load(cos_ptr + first_angle, mask=half < D // 2, other=0.0)[:, None]
            first_sin = tl.load(sin_ptr + first_angle, mask=half < D // 2, other=0.0)[:, None]
        else:
            position = tl.load(position_ptr + near)
            angle = position[:, None] * (D // 2) + dim
            cos = tl.load(cos_ptr + angle, mask=there, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=there, other=0.0)
        raw_low, raw_high = before_rope(low, high, cos, sin)
        raw_low = tl.trans(raw_low)
        raw_high = tl.trans(raw_high)
        logits = product(high, q_high, product(low, q_low, none))
        logits = capped(logits * scale, CAP)
        logits = tl.where(live[:, None], logits, float("-inf"))
        if not ALONE:
            if K > 0:
                offset = t * K
            value = load_rows(rows_ptr, bits, offset, D, S, DP, ALIGN)
            # Masks of the next tile, while this one's rows are on their way.
            bits, offset = load_masks(bits_ptr, before_ptr, tile_rows_ptr, t + N, end, K, TILE)
        m, den, p, alpha = weigh_columns(logits, m, den)
        p = p.to(low.dtype)
        if IN_ORDER:
            tile_low = product(raw_low, p, nothing)
            tile_high = product(raw_high, p, nothing)
            tile_low, tile_high = before_rope(tile_low, tile_high, first_cos, first_sin)
            sum_low = sum_low * alpha[None, :] + tile_low
            sum_high = sum_high * alpha[None, :] + tile_high
        else:
            sum_low = product(raw_low, p, sum_low * alpha[None, :])
            sum_high = product(raw_high, p, sum_high * alpha[None, :])
        if not ALONE:
            stored = product(tl.trans(value), p, stored * alpha[None, :])
        elif WINDOW:
            stored *= alpha[None, :]

    m = tl.where(den > 0, m, float("-inf"))
    place = tl.program_id(0) if SEGS > 0 else seg * parts + piece
    ROWS: tl.constexpr = WINDOW or not ALONE
    WIDE: tl.constexpr = 2 * D if ROWS else D
    if ROWS:
        store_rows(
            out_ptr,
            lse_ptr,
            part_ptr,
            part_ml_ptr,
            m,
            den,
            tl.trans(stored),
            seg,
            place,
            row,
            n,
            T,
            D,
            DP,
            SPLIT,
            WIDE,
        )
        out_ptr += D
        part_ptr += D
    store_rows(
        out_ptr,
        lse_ptr,
        part_ptr,
        part_ml_ptr,
        m,
        den,
        tl.trans(sum_low),
        seg,
        place,
        row,
        n,
        T,
        D // 2,
        HALF,
        SPLIT,
        WIDE,
    )
    store_rows(
        out_ptr + D // 2,
        lse_ptr,
        part_ptr + D // 2,
        part_ml_ptr,
        m,
        den,
        tl.trans(sum_high),
        seg,
        place,
        row,
        n,
        T,
        D // 2,
        HALF,
        SPLIT,
        WIDE,
    )


def can_sum_keys(q: Tensor, packed: PackedView) -> bool:
    """Say whether the kernel takes such queries (B, H, T, D) and packed tokens: whole keys, heads
    of 256 numbers at most."""
    return packed.ints is None and q.size(-1) <= 256


def query_columns(q: Tensor, rows: int) -> int:
    """Choose how many of the rows of queries a program takes: 8 columns of a product suffice, but
    Triton 3.2 wants 16."""
    if rows <= 8 and TRITON >= (3, 5):
        return 8
    return query_rows(q, rows)


def launch_settings(dtype: torch.dtype, M: int, DP: int) -> tuple[int, int, int]:
    """Choose tokens of a tile, warps and stages for M query rows and heads of DP numbers.

    By the instructions of a token, as compiled for an H100; no time has been measured
    (docs/log.md)."""
    if dtype == torch.float32:
        return 16, 4, 1
    if M == 8 and DP <= 128:
        return 32, 1, 1
    if M <= 16 and DP <= 128:
        return 64, 4, 2
    return 32, 4, 2


def attend_with_key_sums(
    q: Tensor,
    packed: PackedView,
    window: WindowView | None,
    cos: Tensor,
    sin: Tensor,
    position: int | Tensor,
    cap: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Let queries q (B, H, T, D) read all packed tokens and a window, and sum up rows, the window's
    values among them, and keys of packed tokens before RoPE.

    cos, sin: (positions, D/2) of RoPE's angles
    position: of the first token of every segment where the others follow it (the angles of position
        t are then t times those of 1, as RoPE's are); else of the tokens of a segment, (B or 1, N)
        or (B or 1, 1 or Hkv, N) int64
    cap, chunk: see kernels.packed_attention
    Returns the sums of rows and of keys beside one another, (B, H, T, 2 D) float32, or those of
    keys alone where no token has rows and no window is given, (B, H, T, D), and lse (B, H, T) as
    packed_attention. Angles of a tile or a token, keys turned back and weights are rounded to the
    dtype of keys, as kernels.softmax_step rounds weights. Source: equation (1) of
    storage/from_keys.py."""
    B, H, T, D = q.shape
    Hkv = packed.token_base.size(1)
    in_order = isinstance(position, int)
    if in_order:
        where = dict(position_ptr=None, position_stride_b=0, position_stride_h=0)
    else:
        if position.ndim == 2:
            position = position[:, None]
        position = dense_rows(position.expand(B, Hkv, -1))
        strides = dict(position_stride_b=position.stride(0), position_stride_h=position.stride(1))
        where = dict(position_ptr=position, **strides)
        cos = cos.to(q.dtype)  # of every token: half the bytes
        sin = sin.to(q.dtype)
    d = D // packed.n_groups
    M = query_columns(q, H // Hkv * T)
    DP = max(16, triton.next_power_of_2(D))
    N, warps, stages = launch_settings(q.dtype, M, DP)
    constants = dict(
        D=D,
        S=packed.n_groups,
        K=packed.k,
        TILE=packed.tile,
        M=M,
        N=N,
        DP=DP,
        HALF=max(16, triton.next_power_of_2(D // 2)),
        ALONE=packed.keys_alone,
        WINDOW=window is not None,
        ALIGN=d & -d,
        IN_ORDER=in_order,
        STAGES=stages,
        CAP=cap,
    )
    reads = dict(
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        **where,
        first_position=position if in_order else 0,
        positions=len(cos),
    )
    sums = 1 if packed.keys_alone and window is None else 2
    variant = Variant(_key_sums_kernel, M, N, warps, constants, reads, sums, torch.float32)
    window = window or WindowView(q[:, :, :0], q[:, :, :0], None, packed.n.new_zeros(B))
    if window.k.numel():
        assert window.k.is_contiguous() and window.v.is_contiguous(), "a window is read by address"
    return attend_in_pieces(dense_rows(q), packed, window, variant, chunk)
