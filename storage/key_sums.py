"""Triton kernel for attention over values predicted from keys, each head's from its own keys.

The problem: in equation (1) of storage/from_keys.py,

    sum_j p_j z_j = (sum_j p_j k_j) W + sum_j p_j m_j r_j

both sums have the weights of one softmax, and the keys of the first have been read for it. The
idea: a program that has a tile of keys for its logits turns it back by its positions, a key whose
halves are (low, high) at an angle t into what RoPE made it from

    (low cos t + high sin t, high cos t - low sin t)

and adds it up beside the rows. Pieces are joined as ever, their accumulators twice as wide; the
product with W is one small matrix product of a step. A key and a row are read once; the tables'
cos t and sin t, D numbers a token, are the same for all heads and sequences whose tokens are.

    sums, lse = attend_with_key_sums(q, packed, None, cos, sin, position)
    rows, keys = sums.chunk(2, -1)                       # out = rows + keys @ W

A window whose values have the coordinates of rows is read by the same programs. The plain form is
attend_predicted (storage/from_keys.py), and what else there is keeps it: keys in few bits, and maps
of all heads. There a query head needs every head's keys with its own weights, so that the keys of
a layer would be loaded Hkv times a step, or the weights of H query heads written and read again.
Letters: storage/layout.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import load_queries, query_rows, read_window, softmax_weights
from storage.kernel_base import (
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
from storage.pieces import Variant, attend_in_pieces, find_piece, segment_pieces, store_rows


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
    STAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let M rows of queries read one piece of one segment, N tokens at a time: sums of rows, unless
    keys are ALONE, and of keys before RoPE. Slots of the window, where there is a WINDOW, come
    first: no key has been summed then that would have to be weighed anew.

    low, high: the halves of a query, a key, a sum. HALF: D/2 rounded up to a power of 2; the rest
    as in kernels._attention_kernel."""
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
    position_ptr += b.to(tl.int64) * position_stride_b + h * position_stride_h
    if not ALONE:
        mask_seg = b * Hm + (h if Hm > 1 else 0)
        mask_base = tl.load(mask_base_ptr + mask_seg)
        rows_ptr += tl.load(row_base_ptr + seg) * (D // S)
        bits_ptr += mask_base
        if K == 0:
            before_ptr += mask_base
            tile_rows_ptr += tl.load(tile_base_ptr + mask_seg)
    n_packed, n_slots, first, count, size, active = segment_pieces(
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
    m = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.float32)
    stored = tl.zeros([M, DP], tl.float32)
    sum_low = tl.zeros([M, HALF], tl.float32)
    sum_high = tl.zeros([M, HALF], tl.float32)
    none = tl.zeros([M, N], tl.float32)

    if WINDOW:
        m, den, stored = read_window(
            load_queries(q_ptr, b, h, row, n, T, q_stride_b, q_stride_h, q_stride_t, D, DP),
            m,
            den,
            stored,
            window_k_ptr + seg.to(tl.int64) * W * D,
            window_v_ptr + seg.to(tl.int64) * W * D,
            row,
            tl.maximum(piece * size - n_packed, 0),
            tl.minimum((piece + 1) * size - n_packed, n_slots),
            first,
            count,
            W,
            n,
            T,
            scale,
            D,
            N,
            DP,
            STAGES,
            CAP,
        )
    dim = tl.arange(0, HALF)[None, :]
    start = piece * size
    end = tl.minimum((piece + 1) * size, n_packed)
    for t0 in tl.range(start, end, N, num_stages=STAGES):
        t = t0 + tl.arange(0, N)
        live = t < end
        there = live[:, None] & (dim < D // 2)
        at = t[:, None] * D + dim
        low = tl.load(keys_ptr + at, mask=there, other=0.0, eviction_policy="evict_first")
        high = tl.load(keys_ptr + at + D // 2, mask=there, other=0.0, eviction_policy="evict_first")
        position = tl.load(position_ptr + t, mask=live, other=0)
        angle = position[:, None] * (D // 2) + dim
        cos = tl.load(cos_ptr + angle, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=there, other=0.0).to(tl.float32)
        logits = product(q_high, tl.trans(high), product(q_low, tl.trans(low), none))
        logits = capped(logits * scale, CAP)
        logits = tl.where(live[None, :], logits, float("-inf"))
        m, den, p, alpha = softmax_weights(logits, m, den)
        raw_low = low * cos + high * sin
        raw_high = high * cos - low * sin
        p = p.to(low.dtype)
        sum_low = product(p, raw_low.to(low.dtype), sum_low * alpha[:, None])
        sum_high = product(p, raw_high.to(low.dtype), sum_high * alpha[:, None])
        if not ALONE:
            bits, offset = load_masks(bits_ptr, before_ptr, tile_rows_ptr, t, end, K, TILE)
            value = load_rows(rows_ptr, bits, offset, D, S, DP, ALIGN)
            stored = product(p, value, stored * alpha[:, None])
        elif WINDOW:
            stored *= alpha[:, None]

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
            stored,
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
        sum_low,
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
        sum_high,
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


def attend_with_key_sums(
    q: Tensor,
    packed: PackedView,
    window: WindowView | None,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    cap: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Let queries q (B, H, T, D) read all packed tokens and a window, and sum up rows, the window's
    values among them, and keys of packed tokens before RoPE.

    cos, sin: (positions, D/2) of RoPE's angles
    position: of the tokens of a segment, (B or 1, N) or (B or 1, 1 or Hkv, N) int64
    cap, chunk: see kernels.packed_attention
    Returns the sums of rows and of keys beside one another, (B, H, T, 2 D) float32, or those of
    keys alone where no token has rows and no window is given, (B, H, T, D), and lse (B, H, T) as
    packed_attention. Keys turned back and weights are rounded to the dtype of keys, as
    kernels.softmax_step rounds weights. Source: equation (1) of storage/from_keys.py."""
    B, H, T, D = q.shape
    Hkv = packed.token_base.size(1)
    if position.ndim == 2:
        position = position[:, None]
    position = dense_rows(position.expand(B, Hkv, -1))
    d = D // packed.n_groups
    wide = q.dtype == torch.float32
    M = query_rows(q, H // Hkv * T)
    N = 16 if wide else 32
    constants = dict(
        D=D,
        S=packed.n_groups,
        K=packed.k,
        TILE=packed.tile,
        M=M,
        N=N,
        DP=max(16, triton.next_power_of_2(D)),
        HALF=max(16, triton.next_power_of_2(D // 2)),
        ALONE=packed.keys_alone,
        WINDOW=window is not None,
        ALIGN=d & -d,
        STAGES=1 if wide else 2,
        CAP=cap,
    )
    reads = dict(
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        position_ptr=position,
        position_stride_b=position.stride(0),
        position_stride_h=position.stride(1),
    )
    sums = 1 if packed.keys_alone and window is None else 2
    variant = Variant(_key_sums_kernel, M, N, 4, constants, reads, sums, torch.float32)
    window = window or WindowView(q[:, :, :0], q[:, :, :0], None, packed.n.new_zeros(B))
    if window.k.numel():
        assert window.k.is_contiguous() and window.v.is_contiguous(), "a window is read by address"
    return attend_in_pieces(dense_rows(q), packed, window, variant, chunk)
