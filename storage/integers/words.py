"""Attention over integers of 4 and 8 bits and over levels, word by word: a Triton kernel.

Unpacking is what reading integers costs, so this kernel does little of it. The bits of a code,
alone in a bfloat16 whose other bits are zeros, are that multiple of the smallest subnormal, and
tensor cores multiply subnormals exactly: a code becomes a number by a mask. What a number is
besides its code, (code - 2^(b-1)) * step + middle, is done elsewhere:

* steps of keys go into the queries, steps of values into the weights;
* 2^(b-1) too much in every code is summed by a product of its own, exactly, and taken off;
* middles of keys are summed with the queries, middles of values with the weights, by a product with
  the masks where groups are dropped. The words of a dropped group are zeros.

A word is 4 bytes as they lie in memory; codes come out of it in an order of their own, and so do
tokens, so that nothing moves between the lanes of a warp: what the codes are multiplied with is
brought into that order instead (key_order, value_order, paired, by_fours).

Tokens and dimensions of values are the long side of the products, M rows of queries the short one.
storage/integers/format.py is the specification.
"""

from __future__ import annotations

from storage.integers.unpack import (
    by_fours,
    each_group,
    key_codes,
    key_order,
    level_masks,
    level_values,
    paired,
    rows_of_pairs,
    subnormal_scale,
    value_codes,
    value_order,
)
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
from storage.pieces import find_piece, segment_pieces

# -------------------- pieces of the kernel


@jit
def _load(ptr, a, b, USE_A: tl.constexpr, USE_B: tl.constexpr):
    """Load with the masks a and b, each where it is needed: else its test would cost as much as the
    load."""
    if USE_A and USE_B:
        return tl.load(ptr, mask=a & b, other=0)
    elif USE_A:
        return tl.load(ptr, mask=a, other=0)
    elif USE_B:
        return tl.load(ptr, mask=b, other=0)
    else:
        return tl.load(ptr)


DEAL = tl.constexpr(TRITON >= (3, 7)) if triton else False


@jit
def _nothing(q_ptr, i):
    """Return zeros, float32 like i.

    That they come from 8 bits in memory makes Triton, from 3.7 on, deal the rows of the product
    that they go into by fours to a lane (kWidth = 4), the order that key_codes and level_values
    have; else all of them would change lanes. 3.6 needs it not, and with it takes 1.25 times as
    long where some of the groups are kept."""
    byte_ptr = q_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    return tl.load(byte_ptr + i * 0).to(tl.float32) * 0.0


@jit
def _float16_pair(pair):
    """Split uint32 into two float16, in float32."""
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@jit
def _key_steps(steps, KP: tl.constexpr, KEY: tl.constexpr):
    """Bring the steps and middles of a block, (2, 8 / KEY, 4 KP) float16, into key_order: step and
    middle (places,)."""
    H2: tl.constexpr = 8 // KEY  # numbers of a byte
    # (middle, half, word / (KP / 4), word % (KP / 4), byte / 2, byte % 2)
    steps = tl.reshape(steps, [2, H2, 4, KP // 4, 2, 2])
    if KEY == 4:
        steps = tl.permute(steps, [3, 5, 2, 1, 4, 0])
    else:
        steps = tl.permute(steps, [3, 1, 2, 5, 4, 0])
    return tl.split(tl.reshape(steps, [KP * 4 * H2, 2]))


@jit
def _key_logits(words, x, step, middle, unit, down, like, KEY: tl.constexpr, ASM: tl.constexpr):
    """Compute logits (N, M) of N keys in words (N, KP) for queries x (places, M).

    unit: what factors of codes are multiplied by; down: what undoes it"""
    N: tl.constexpr = words.shape[0]
    M: tl.constexpr = x.shape[1]
    HALVES: tl.constexpr = 0x88888888 if KEY == 4 else 0x80808080  # a word of codes 2^(KEY - 1)
    half_codes = tl.full([16, words.shape[1]], HALVES, tl.uint32)
    y = (x * (step.to(tl.float32) * unit)[:, None]).to(like.dtype)
    base = tl.sum(x * middle.to(tl.float32)[:, None], 0)
    too_much = product(key_codes(half_codes, like, KEY, ASM), y, tl.zeros([16, M], tl.float32))
    base -= tl.max(too_much, 0) * down
    codes = key_codes(words, like, KEY, ASM)
    return product(codes, y, tl.zeros([N, M], tl.float32)) * down + base[None, :]


@jit
def _row_words(
    rows_ptr,
    word,
    offset,
    vw,
    VW: tl.constexpr,
    VP: tl.constexpr,
    RW: tl.constexpr,
):
    """Load the words of values (N, VP) whose rows have RW words each, zeros where a group is
    dropped. word, offset (N, 1): masks, and rows before each token."""
    one = tl.full([1, 1], 1, tl.uint32)
    group = (vw // RW)[None, :].to(tl.uint32)
    kept = (word >> group & one) != 0
    place = (offset + popcount(word & ((one << group) - one))) * RW + (vw % RW)[None, :]
    ALIGN: tl.constexpr = 4 if RW % 4 == 0 else RW & -RW
    if ALIGN > 1:
        place = tl.max_contiguous(tl.multiple_of(place, [1, ALIGN]), [1, ALIGN])
        kept = tl.max_constancy(kept, [1, ALIGN])
    return _load(rows_ptr + place, kept, (vw < VW)[None, :], True, VP > VW)


@jit
def _read_window(
    q_ptr,
    m,
    den,
    acc,
    k_ptr,
    v_ptr,
    dims,
    in_dims,
    query,
    in_row,
    start,
    end,
    first,
    count,
    W,
    T,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    DP: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let queries read slots of one head's window, as kernels.read_window, with tokens and dims on
    the long side: q_ptr (1, M) addresses, acc (dims, M) in the order of `dims`, den (M,)."""
    whole = tl.arange(0, DP)
    x = tl.load(q_ptr + whole[:, None], mask=(whole < D)[:, None] & in_row[None, :], other=0.0)
    for t0 in tl.range(start, end, 16, num_stages=1):
        t = t0 + tl.arange(0, 16)
        number = (t - first + W) % W  # of the token in the slot, oldest 0
        live = (t < end) & (number < count)
        key = tl.load(
            k_ptr + t[:, None] * D + whole[None, :],
            mask=live[:, None] & (whole < D)[None, :],
            other=0.0,
        )
        seen = live[:, None] & (number[:, None] <= count - T + query[None, :])
        logits = capped(product(key, x, tl.zeros([16, M], tl.float32)) * scale, CAP)
        logits = tl.where(seen, logits, float("-inf"))
        top = tl.maximum(m, tl.max(logits, 0))
        p = tl.exp2(logits - top[None, :])
        alpha = tl.exp2(m - top)
        m = top
        den = den * alpha + tl.sum(p, 0)
        value = tl.load(
            v_ptr + t[:, None] * D + dims[None, :],
            mask=live[:, None] & in_dims[None, :],
            other=0.0,
        )
        acc = product(tl.trans(value), p.to(x.dtype), acc * alpha[None, :])
    return m, den, acc


# -------------------- the kernel


@jit
def _word_attention_kernel(
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
    KP: tl.constexpr,
    VP: tl.constexpr,
    DP: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let M rows of queries read one piece of one segment in integers of KEY and VALUE bits (4 or
    8; VALUE 0: levels), N tokens at a time: kernels._attention_kernel.

    KP, VP: words of a key and of a value, rounded up. ASM: codes become numbers by PTX. Where every
    token keeps K groups (K > 0), segments are whole blocks, so that no load needs a mask for the
    last tokens; where it keeps all of them (K = S), masks are not read."""
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
        BLOCK,
        SEGS,
    )
    if SEGS > 0:  # noqa: SIM102 (known when compiling)
        if seg >= segments:
            return
    b = seg // Hkv
    h = seg % Hkv
    row = tl.program_id(2) * M + tl.arange(0, M)
    KW: tl.constexpr = D * KEY // 32  # words of a token's key, of its value
    VW: tl.constexpr = D * VALUE // 32
    ROW_BYTES: tl.constexpr = D // S * (VALUE if VALUE > 0 else 2) // 8
    FMA: tl.constexpr = ASM and (D // S == 8 or D // S == 16)  # levels: planes of 2 or 4 bytes
    token_base = tl.load(token_base_ptr + seg)
    keys_ptr = (keys_ptr + token_base * (D * KEY // 8)).to(tl.pointer_type(tl.uint32), bitcast=True)
    rows_ptr += tl.load(row_base_ptr + seg) * ROW_BYTES
    if VALUE > 0:
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
        value_scale_ptr = value_scale_ptr + token_base * 2
        value_scale_ptr = value_scale_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    else:
        value_scale_ptr += token_base
    key_scale_ptr += tl.load(block_base_ptr + seg) * 2 * D
    if K < S:
        mask_seg = b * Hm + (h if Hm > 1 else 0)
        mask_base = tl.load(mask_base_ptr + mask_seg)
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
        BLOCK,
    )
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if piece >= active:
            return
    query = row // n
    head = row % n
    in_row = row < T * n
    any_ptr = q_ptr
    q_ptr += b * q_stride_b + (h * n + head)[None, :] * q_stride_h + query[None, :] * q_stride_t

    # Queries in the order in which codes of keys come.
    byte, half = key_order(tl.arange(0, KP * 4 * (8 // KEY)), KP, KEY)
    like = tl.load(
        q_ptr + (byte + half * (D // 2))[:, None],
        mask=(byte < KW * 4)[:, None] & in_row[None, :],
        other=0.0,
    )
    x = like.to(tl.float32) * scale
    if DEAL:
        x += _nothing(any_ptr, byte)[:, None]
    up, down = subnormal_scale(ASM)
    unit = tl.where(half == 0, up, up / 16)

    # Columns: weights times steps, and weights times middles where they do not go to all groups.
    C: tl.constexpr = M if K == S or VALUE == 0 else 2 * M
    DV: tl.constexpr = VP * 32 // VALUE if VALUE > 0 else D
    m = tl.full([M], -1e38, tl.float32)
    den = tl.zeros([8, M], tl.float32)
    acc = tl.zeros([DV, C], tl.float32)
    sums = tl.zeros([16, C], tl.float32)
    middles = tl.zeros([8, M], tl.float32)
    start = piece * size
    end = tl.minimum((piece + 1) * size, n_packed)
    at = tl.arange(0, N)
    kw = tl.arange(0, KP)
    vw = tl.arange(0, VP)
    channel = tl.arange(0, KP * 4)
    scales = (
        tl.arange(0, 2)[:, None, None] * D
        + tl.arange(0, 8 // KEY)[None, :, None] * (D // 2)
        + channel[None, None, :]
    )
    if VALUE == 0:
        one_word, one_offset, two_word, two_offset = level_masks(
            bits_ptr, before_ptr, tile_rows_ptr, start, end, S, N, TILE, ASM
        )
        own_step = tl.load(value_scale_ptr + start + at, mask=start + at < end, other=0.0)
        nothing = _nothing(any_ptr, at) if DEAL else 0.0
    elif K < S:
        bits, offset = load_masks(bits_ptr, before_ptr, tile_rows_ptr, start + at, end, K, TILE)
        pairs = start + tl.arange(0, N // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
        one_bits = tl.load(bits_ptr + pairs, mask=pairs < end, other=0)
        two_bits = tl.load(bits_ptr + pairs + 4, mask=pairs + 4 < end, other=0)
    for t0 in tl.range(start, end, N, num_stages=STAGES):
        t = t0 + at
        live = t < end
        # All that is read of these tokens, and the masks of the next ones.
        words = _load(
            keys_ptr + t[:, None] * KW + kw[None, :],
            live[:, None],
            (kw < KW)[None, :],
            K == 0,
            KP > KW,
        )
        steps = _load(
            key_scale_ptr + t0 // BLOCK * (2 * D) + scales,
            True,
            (channel < KW * 4)[None, None, :],
            False,
            KP > KW,
        )
        if VALUE == 0:
            value = level_values(
                rows_ptr,
                one_word,
                one_offset,
                two_word,
                two_offset,
                like,
                D,
                S,
                FMA,
            )
            w = own_step.to(tl.float32) + nothing if DEAL else own_step.to(tl.float32)
            one_word, one_offset, two_word, two_offset = level_masks(
                bits_ptr, before_ptr, tile_rows_ptr, t0 + N, end, S, N, TILE, ASM
            )
            own_step = tl.load(value_scale_ptr + t + N, mask=t + N < end, other=0.0)
        elif K == S:
            codes = _load(
                rows_ptr + t[:, None] * VW + vw[None, :], True, (vw < VW)[None, :], False, VP > VW
            )
        else:
            if K > 0:
                offset = t * K
            codes = _row_words(
                rows_ptr, as_word(bits, S)[:, None], offset[:, None], vw, VW, VP, ROW_BYTES // 4
            )
            bits, offset = load_masks(bits_ptr, before_ptr, tile_rows_ptr, t + N, end, K, TILE)
        if VALUE > 0:
            value_scale = _load(value_scale_ptr + t, live, True, K == 0, False)

        step, middle = _key_steps(steps, KP, KEY)
        logits = _key_logits(words, x, step, middle, unit, down, like, KEY, ASM)
        logits = capped(logits, CAP)
        if K == 0:
            logits = tl.where(live[:, None], logits, -2e38)
        top = tl.maximum(m, tl.max(logits, 0))
        p = tl.exp2(logits - top[None, :])
        alpha = tl.exp2(m - top)
        den = den * alpha[None, :] + tl.sum(tl.reshape(p, [N // 8, 8, M]), 0)
        m = top

        if VALUE == 0:
            acc = product(value, by_fours((p * w[:, None]).to(like.dtype)), acc * alpha[None, :])
        else:
            step, middle = _float16_pair(value_scale)
            w = p * (step * up)[:, None]
            if K == S:
                ones = tl.full([16, N // 8, 4], 0x00010001, tl.uint32)
                by_middle = tl.reshape(p * middle[:, None], [N // 8, 8, M])
                middles = middles * alpha[None, :] + tl.sum(by_middle, 0)
            else:
                # Row g: which tokens keep group g.
                ones = one_bits.to(tl.uint32) & 0xFFFF | two_bits.to(tl.uint32) << 16
                group = tl.arange(0, 16).to(tl.uint32)[:, None, None]
                ones = ones[None, :, :] >> group & 0x00010001
                w = tl.reshape(tl.join(w, p * (middle * up)[:, None]), [N, C])
                alpha = tl.reshape(tl.join(alpha, alpha), [C])
                pairs += N
                one_bits = tl.load(bits_ptr + pairs, mask=pairs < end, other=0)
                two_bits = tl.load(bits_ptr + pairs + 4, mask=pairs + 4 < end, other=0)
            w = paired(w.to(like.dtype))
            sums = product(rows_of_pairs(ones, like, ASM), w, sums * alpha[None, :])
            acc = product(value_codes(codes, like, VALUE, ASM), w, acc * alpha[None, :])

    # From sums over codes to sums over numbers.
    den = tl.sum(den, 0)
    if VALUE == 0:
        dims = tl.arange(0, D) % S * (D // S) + tl.arange(0, D) // S
        in_dims = dims < D
        acc *= (tl.load(gain_ptr + h * D + dims) * (8192.0 if FMA else 1.0))[:, None]
    else:
        byte, half = value_order(tl.arange(0, DV), VP, VALUE)
        group = byte // ROW_BYTES
        dims = group * (D // S) + half * ROW_BYTES + byte % ROW_BYTES
        in_dims = byte < VW * 4
        HALF: tl.constexpr = 1 << (VALUE - 1)
        if K == S:
            add = (tl.sum(middles, 0) - tl.max(sums, 0) * (HALF * down))[None, :]
        else:
            acc, _ = tl.split(tl.reshape(acc, [DV, M, 2]))
            by_step, by_middle = tl.split(tl.reshape(sums, [16, M, 2]))
            add = each_group((by_middle - by_step * HALF) * down, group, S)
        acc = acc * tl.where(half == 0, down, down / 16)[:, None] + add

    m, den, acc = _read_window(
        q_ptr,
        m,
        den,
        acc,
        window_k_ptr + seg.to(tl.int64) * W * D,
        window_v_ptr + seg.to(tl.int64) * W * D,
        dims,
        in_dims,
        query,
        in_row,
        tl.maximum(piece * size - n_packed, 0),
        tl.minimum((piece + 1) * size - n_packed, n_slots),
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

    # kernels.store_rows, with dims in an order of their own.
    m = tl.where(den > 0, m, float("-inf"))
    if SPLIT:
        place = tl.program_id(0) if SEGS > 0 else seg * parts + piece
        to_row = place.to(tl.int64) * (T * n) + row
        tl.store(part_ml_ptr + to_row * 2, m, mask=in_row)
        tl.store(part_ml_ptr + to_row * 2 + 1, den, mask=in_row)
        to_ptr = part_ptr + to_row[None, :] * D
    else:
        to_row = (seg.to(tl.int64) * n + head) * T + query
        total = tl.where(den > 0, den, 1.0)
        tl.store(lse_ptr + to_row, (m + tl.log2(total)) * 0.6931471805599453, mask=in_row)
        acc = acc / total[None, :]
        to_ptr = out_ptr + to_row[None, :] * D
    result = acc.to(to_ptr.dtype.element_ty)
    tl.store(to_ptr + dims[:, None], result, mask=in_dims[:, None] & in_row[None, :])
