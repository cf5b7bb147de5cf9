"""Attention over integers as they are stored: which kernel reads them, and the one that reads any.

* _byte_attention_kernel (here) reads any bits and levels, byte by byte: kernels._attention_kernel
  with other loads.
* _word_attention_kernel (words.py) reads what the hardware turns into numbers by a mask: codes and
  levels whose rows fill words.

storage/integers/format.py is the specification. `kernels.packed_attention` asks int_variant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import load_queries, query_rows, read_window, softmax_step
from storage.integers import words
from storage.integers.format import IntFormat
from storage.integers.level_words import (
    STEP_1,
    STEP_2,
    STEP_3,
    ZERO_1,
    ZERO_2,
    ZERO_3,
    group_levels,
    of_level,
)
from storage.integers.unpack import fields_of_byte
from storage.kernel_base import (
    TRITON,
    as_word,
    capped,
    jit,
    load_masks,
    popcount,
    product,
    tl,
    triton,
)
from storage.layout import PackedView
from storage.pieces import Variant, find_piece, multiprocessors, segment_pieces, store_rows

# Before 3.5 Triton's products have 16 columns at least: integers are read byte by byte there.
WORDS = TRITON >= (3, 5)
MANY_TOKENS = 64  # that a program reads at a time, word by word
FEW_TOKENS = 32  # where the context is so short that a program reads no more than that

# -------------------- byte by byte


@jit
def _load_codes(ptr, i, there, n: tl.constexpr, BITS: tl.constexpr):
    """Load codes i of the n that begin at ptr (broadcast), int32, 0 where not there: the inverse of
    format.pack_bits."""
    if BITS == 3:
        low = tl.load(ptr + i % (n // 4), mask=there, other=0).to(tl.int32)
        high = tl.load(ptr + n // 4 + i % (n // 8), mask=there, other=0).to(tl.int32)
        return low >> (i // (n // 4) * 2) & 3 | (high >> (i // (n // 8)) & 1) << 2
    else:
        width: tl.constexpr = n * BITS // 8
        byte = tl.load(ptr + i % width, mask=there, other=0).to(tl.int32)
        return byte >> (i // width * BITS) & ((1 << BITS) - 1)


@jit
def _load_keys(
    keys_ptr,
    key_scale_ptr,
    t,
    dim,
    there,
    like,
    D: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load keys (N, DP) of KEY bits: format.dequantise_keys. t (N,), dim (1, DP)."""
    code = _load_codes(keys_ptr + t[:, None] * (D * KEY // 8), dim, there, D, KEY)
    scale_ptr = key_scale_ptr + (t // BLOCK * (2 * D))[:, None] + dim
    step = tl.load(scale_ptr, mask=there, other=0.0).to(tl.float32)
    middle = tl.load(scale_ptr + D, mask=there, other=0.0).to(tl.float32)
    return ((code - (1 << (KEY - 1))).to(tl.float32) * step + middle).to(like.dtype)


@jit
def _load_values(
    rows_ptr,
    value_scale_ptr,
    t,
    word,
    offset,
    dim,
    live,
    like,
    D: tl.constexpr,
    S: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Load values (N, DP) of VALUE bits, 0 where dropped: format.dequantise_values. word, offset
    (N, 1): masks, and rows before each token."""
    d: tl.constexpr = D // S
    one = tl.full([1, 1], 1, word.dtype)
    group = (dim // d).to(word.dtype)
    kept = ((word >> group & one) != 0) & (dim < D)
    row = offset + popcount(word & ((one << group) - one))
    code = _load_codes(rows_ptr + row * (d * VALUE // 8), dim % d, kept, d, VALUE)
    step = tl.load(value_scale_ptr + t * 2, mask=live, other=0.0).to(tl.float32)[:, None]
    middle = tl.load(value_scale_ptr + t * 2 + 1, mask=live, other=0.0).to(tl.float32)[:, None]
    value = (code - (1 << (VALUE - 1))).to(tl.float32) * step + middle
    return tl.where(kept, value, 0.0).to(like.dtype)


@jit
def _load_levels(
    rows_ptr,
    value_scale_ptr,
    gain_ptr,
    t,
    word,
    offset,
    dim,
    live,
    like,
    D: tl.constexpr,
    S: tl.constexpr,
):
    """Load values (N, DP) with levels, 0 where dropped: format.dequantise_levels. word (N, 1) holds
    2 S bits, offset (N, 1) counts bit planes."""
    d: tl.constexpr = D // S
    level, before = group_levels(word, (dim // d).to(word.dtype), S)
    kept = (level > 0) & (dim < D)
    i = dim % d
    byte_ptr = rows_ptr + (offset + before) * (d // 4) + i % (d // 4)
    shift = i // (d // 4) * 2
    code = tl.zeros(kept.shape, tl.int32)
    for plane in tl.static_range(4):
        there = kept & (plane < level + (level == 3))
        byte = tl.load(byte_ptr + plane * (d // 4), mask=there, other=0).to(tl.int32)
        code |= (byte >> shift & 3) << (2 * plane)
    step = tl.load(value_scale_ptr + t, mask=live, other=0.0).to(tl.float32)[:, None]
    step = step * of_level(level, STEP_1, STEP_2, STEP_3)
    gain = tl.load(gain_ptr + dim, mask=dim < D, other=0.0)
    value = (code.to(tl.float32) - of_level(level, ZERO_1, ZERO_2, ZERO_3)) * step * gain
    return tl.where(kept, value, 0.0).to(like.dtype)


@jit
def _byte_attention_kernel(
    q_ptr,
    keys_ptr,
    rows_ptr,
    bits_ptr,
    before_ptr,
    tile_rows_ptr,
    key_scale_ptr,
    block_base_ptr,
    value_scale_ptr,
    gain_ptr,
    n_packed_ptr,
    token_base_ptr,
    row_base_ptr,
    mask_base_ptr,
    tile_base_ptr,
    window_k_ptr,
    window_v_ptr,
    first_ptr,
    count_ptr,
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
    q_stride_b,
    q_stride_h,
    q_stride_t,
    SEGS: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    STAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let M rows of queries read one piece of one segment in integers of KEY and VALUE bits (VALUE
    0: levels), N tokens at a time: kernels._attention_kernel."""
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
    mask_seg = b * Hm + (h if Hm > 1 else 0)
    token_base = tl.load(token_base_ptr + seg)
    keys_ptr += token_base * (D * KEY // 8)
    rows_ptr += tl.load(row_base_ptr + seg) * (D // S * (VALUE if VALUE > 0 else 2) // 8)
    key_scale_ptr += tl.load(block_base_ptr + seg) * 2 * D
    value_scale_ptr += token_base * (2 if VALUE > 0 else 1)
    mask_base = tl.load(mask_base_ptr + mask_seg)
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
    x = load_queries(q_ptr, b, h, row, n, T, q_stride_b, q_stride_h, q_stride_t, D, DP)
    m = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    none = tl.zeros([M, N], tl.float32)

    dim = tl.arange(0, DP)[None, :]
    start = piece * size
    end = tl.minimum((piece + 1) * size, n_packed)
    bits, offset = load_masks(
        bits_ptr, before_ptr, tile_rows_ptr, start + tl.arange(0, N), end, K, TILE
    )
    for t0 in tl.range(start, end, N, num_stages=STAGES):
        t = t0 + tl.arange(0, N)
        live = t < end
        if K > 0:
            offset = t * K
        there = live[:, None] & (dim < D)
        key = _load_keys(keys_ptr, key_scale_ptr, t, dim, there, x, D, KEY, BLOCK)
        logits = capped(product(x, tl.trans(key), none) * scale, CAP)
        logits = tl.where(live[None, :], logits, float("-inf"))
        word = as_word(bits, S if VALUE > 0 else 2 * S)[:, None]
        before = offset[:, None]
        if VALUE > 0:
            value = _load_values(
                rows_ptr, value_scale_ptr, t, word, before, dim, live, x, D, S, VALUE
            )
        else:
            value = _load_levels(
                rows_ptr,
                value_scale_ptr,
                gain_ptr + h * D,
                t,
                word,
                before,
                dim,
                live,
                x,
                D,
                S,
            )
        # Masks of the next block, while this one's values are on their way.
        bits, offset = load_masks(bits_ptr, before_ptr, tile_rows_ptr, t + N, end, K, TILE)
        m, den, acc = softmax_step(logits, value, m, den, acc)

    m, den, acc = read_window(
        x,
        m,
        den,
        acc,
        window_k_ptr + seg.to(tl.int64) * W * D,
        window_v_ptr + seg.to(tl.int64) * W * D,
        row,
        tl.maximum(piece * size - behind, 0),
        tl.minimum((piece + 1) * size - behind, n_slots),
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
    store_rows(
        out_ptr,
        lse_ptr,
        part_ptr,
        part_ml_ptr,
        m,
        den,
        acc,
        seg,
        tl.program_id(0) if SEGS > 0 else seg * parts + piece,
        row,
        n,
        T,
        D,
        DP,
        SPLIT,
        D,
    )


# -------------------- which kernel


def fill_words(fmt: IntFormat, head_dim: int, n_groups: int, k: int) -> bool:
    """Say whether integers can be read in words, where tokens keep k of n_groups groups (k = 0:
    they are counted): keys that fill words of 4 bytes, values whose rows fill words of 4 bytes, of
    2 and 3 bits words of 2 bytes, or levels whose bit planes have 1, 2, 4, ... bytes. Of 3 bits
    each plane fills them. Tokens that drop groups have 16 of them at most."""
    d = head_dim // n_groups
    if 16 in (fmt.key_bits, fmt.value_bits):
        return False
    if n_groups > 16 and k < n_groups:
        return False
    key_codes = {2: 16, 3: 32, 4: 8, 8: 4}[fmt.key_bits]  # that fill words
    if head_dim % key_codes:
        return False
    if fmt.levelled:
        return d & (d - 1) == 0 and head_dim >= 16
    value_codes = {2: 8, 3: 16, 4: 8, 8: 4}[fmt.value_bits]
    together = k == n_groups and fmt.value_bits != 3  # rows without planes lie side by side
    return (head_dim if together else d) % value_codes == 0


def tokens_at_a_time(packed: PackedView, device: torch.device) -> int:
    """Choose how many tokens a program reads at a time: FEW_TOKENS where all that are held are then
    read by a warp on each of a multiprocessor's four schedulers, for such a step takes as long as
    one program does."""
    short = packed.held <= FEW_TOKENS * 4 * multiprocessors(device)
    return min(FEW_TOKENS if short else MANY_TOKENS, packed.ints.fmt.block)


def _word_variant(q: Tensor, packed: PackedView, rows: int, known: dict) -> Variant:
    """Choose blocks that take as many registers as there are, without spilling, and stages that
    keep eight programs of a warp busy on a multiprocessor."""
    key_bits, value_bits, _, _ = packed.ints.fmt
    D = q.size(-1)
    narrow = q.dtype != torch.float32
    M = 4 if rows <= 4 else 8
    N = tokens_at_a_time(packed, q.device)
    if not value_bits:
        stages = 1
    else:
        stages = 3 if packed.k and key_bits + value_bits == 8 else 2
    value_words = 0
    if value_bits:
        value_words = D // fields_of_byte(value_bits) // (2 if value_bits < 4 else 4)
    constants = dict(
        **known,
        M=M,
        N=N,
        KP=max(4, triton.next_power_of_2(D // fields_of_byte(key_bits) // 4)),
        VP=max(8, triton.next_power_of_2(value_words)),
        ASM=q.is_cuda and narrow and torch.version.hip is None,
        STAGES=stages,
    )
    if constants["ASM"] and not value_bits and D <= 64 and N == MANY_TOKENS:
        constants["maxnreg"] = 168  # of 176, so that more programs fit
    kernel = words._word_attention_kernel
    return Variant(kernel, M, N, 1 if narrow else 4, constants, _pointers(packed))


def _byte_variant(q: Tensor, packed: PackedView, rows: int, known: dict) -> Variant:
    """Choose blocks for bytes, which are unpacked once for all rows of queries."""
    M = query_rows(q, rows)
    N = 16 if q.dtype == torch.float32 else 32
    constants = dict(**known, M=M, N=N, STAGES=1)
    return Variant(_byte_attention_kernel, M, N, 4, constants, _pointers(packed))


def _pointers(packed: PackedView) -> dict[str, Tensor | None]:
    """List what the kernels read beside what every attention kernel reads."""
    ints = packed.ints
    return dict(
        key_scale_ptr=ints.key_scale,
        block_base_ptr=ints.block_base,
        value_scale_ptr=ints.value_scale,
        gain_ptr=ints.fmt.gain,
    )


def int_variant(q: Tensor, packed: PackedView, rows: int) -> Variant:
    """Choose the kernel that reads the integers of `packed` for `rows` rows of queries per KV head.

    Float16 has too few bits for small weights and large middles; many rows are better off with what
    is unpacked once for 64 of them."""
    D = q.size(-1)
    fmt = packed.ints.fmt
    known = dict(
        D=D,
        S=packed.n_groups,
        K=packed.k,
        TILE=packed.tile,
        KEY=fmt.key_bits,
        VALUE=fmt.value_bits,
        BLOCK=fmt.block,
        DP=max(16, triton.next_power_of_2(D)),
    )
    few = q.dtype != torch.float16 and rows <= 32
    if WORDS and few and fill_words(fmt, D, packed.n_groups, packed.k):
        return _word_variant(q, packed, rows, known)
    return _byte_variant(q, packed, rows, known)
