"""Attention over integers of 2, 3, 4 and 8 bits and over levels, word by word: a Triton kernel.

Unpacking is what reading integers costs, so this kernel does little of it. The bits of a code,
alone in a bfloat16 whose other bits are zeros, are that multiple of the smallest subnormal, and
tensor cores multiply subnormals exactly: a code becomes a number by a mask. What a number is
besides its code, (code - 2^(b-1)) * step + middle, is done elsewhere:

* steps of keys go into the queries, steps of values into the weights;
* 2^(b-1) too much in every code is summed by a product of its own, exactly, and taken off;
* middles of keys are summed with the queries, middles of values with the weights, by a product with
  the masks where groups are dropped. The words of a dropped group are zeros.

A word is 4 bytes as they lie in memory, of values of 2 and 3 bits 2 bytes; codes come out of it in
an order of their own, and so do tokens, so that nothing moves between the lanes of a warp: what the
codes are multiplied with is brought into that order instead (key_order, value_order, paired,
by_fours).

Tokens and dimensions of values are the long side of the products, M rows of queries the short one.
storage/integers/format.py is the specification.
"""

from __future__ import annotations

from storage.integers.level_words import (
    by_fours,
    level_masks,
    level_values,
)
from storage.integers.unpack import (
    each_group,
    field_factor,
    key_codes,
    key_order,
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
from storage.pieces import find_piece, read_window_columns, segment_pieces

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
    """Bring the steps and middles of a block, (2, fields, 4 KP) float16, into key_order: step and
    middle (places,)."""
    F: tl.constexpr = 4 if KEY < 4 else 8 // KEY
    # (middle, field, word / (KP / 4), word % (KP / 4), byte / 2, byte % 2)
    steps = tl.reshape(steps, [2, F, 4, KP // 4, 2, 2])
    if F == 4:
        steps = tl.reshape(steps, [2, 2, 2, 4, KP // 4, 2, 2])
        steps = tl.permute(steps, [4, 6, 1, 3, 2, 5, 0])
    elif F == 2:
        steps = tl.permute(steps, [3, 5, 2, 1, 4, 0])
    else:
        steps = tl.permute(steps, [3, 1, 2, 5, 4, 0])
    return tl.split(tl.reshape(steps, [KP * 4 * F, 2]))


@jit
def _key_logits(
    words,
    thirds,
    x,
    step,
    middle,
    unit,
    down,
    like,
    KEY: tl.constexpr,
    ASM: tl.constexpr,
):
    """Compute logits (N, M) of N keys in words (N, KP), and thirds, for queries x (places, M).

    unit: what factors of codes are multiplied by; down: what undoes it"""
    N: tl.constexpr = words.shape[0]
    M: tl.constexpr = x.shape[1]
    # A word of codes 2^(KEY - 1); of 3 bits these are third bits alone.
    HALVES: tl.constexpr = 0 if KEY == 3 else 0xFFFFFFFF // ((1 << KEY) - 1) << (KEY - 1)
    half_codes = tl.full([16, words.shape[1]], HALVES, tl.uint32)
    half_thirds = tl.full([16, words.shape[1]], 0xFFFFFFFF, tl.uint32)
    y = (x * (step.to(tl.float32) * unit)[:, None]).to(like.dtype)
    base = tl.sum(x * middle.to(tl.float32)[:, None], 0)
    halves = key_codes(half_codes, half_thirds, like, KEY, ASM)
    too_much = product(halves, y, tl.zeros([16, M], tl.float32))
    base -= tl.max(too_much, 0) * down
    codes = key_codes(words, thirds, like, KEY, ASM)
    return product(codes, y, tl.zeros([N, M], tl.float32)) * down + base[None, :]


@jit
def _rows_of(
    t, bits, offset, group, S: tl.constexpr, K: tl.constexpr, TOKEN: tl.constexpr, ROW: tl.constexpr
):
    """Return the first word of group `group` (VP,) of tokens t (N,), and whether it is kept: (N,
    VP) each.

    bits, offset (N,): masks, and rows before each token; not asked where all are kept
    TOKEN, ROW: words of a token that keeps all groups, of a row"""
    if K == S:
        first = (t * TOKEN)[:, None] + (group * ROW)[None, :]
        return first, first >= 0
    else:
        word = as_word(bits, S)[:, None]
        one = tl.full([1, 1], 1, tl.uint32)
        group = group[None, :].to(tl.uint32)
        kept = (word >> group & one) != 0
        return (offset[:, None] + popcount(word & ((one << group) - one))) * ROW, kept


@jit
def _value_words(
    rows_ptr,
    first,
    kept,
    vw,
    VW: tl.constexpr,
    RW: tl.constexpr,
    ROW: tl.constexpr,
    ALL: tl.constexpr,
):
    """Load words of values (N, VP), uint32, zeros where a group is dropped.

    first, kept (N, VP): see _rows_of
    VW, RW, ROW: words of a value, of a row, of a row with all its planes; ALL: none is dropped"""
    in_row = (vw % RW)[None, :]
    there = (vw < VW)[None, :]
    if ALL:
        words = _load(rows_ptr + first + in_row, True, there, False, vw.shape[0] > VW)
    else:
        place = first + in_row
        ALIGN: tl.constexpr = 4 if ROW % 4 == 0 else ROW & -ROW
        if ALIGN > 1:
            place = tl.max_contiguous(tl.multiple_of(place, [1, ALIGN]), [1, ALIGN])
            kept = tl.max_constancy(kept, [1, ALIGN])
        words = _load(rows_ptr + place, kept, there, True, vw.shape[0] > VW)
    return words.to(tl.uint32)


@jit
def _value_planes(rows_ptr, first, kept, vw, VW: tl.constexpr, RW: tl.constexpr, ALL: tl.constexpr):
    """Load words of values of 3 bits, and those of their third bits: (N, VP) uint32 each, as
    _value_words. They are loaded together, so that both lie in the same lanes."""
    both = tl.join(vw % RW, RW + vw % (RW // 2))
    words = _load(
        rows_ptr + (first[:, :, None] + both[None, :, :]),
        kept[:, :, None],
        (vw < VW)[None, :, None],
        not ALL,
        vw.shape[0] > VW,
    )
    words, thirds = tl.split(words.to(tl.uint32))
    return words, thirds >> (vw % RW // (RW // 2)).to(tl.uint32)[None, :]


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
    """Let M rows of queries read one piece of one segment in integers of KEY and VALUE bits (VALUE
    0: levels), N tokens of a block of BLOCK at a time: kernels._attention_kernel.

    KP, VP: words of a key and of a value, rounded up; of 3 bits those of their lower bits. ASM:
    codes become numbers by PTX. Where every token keeps K groups (K > 0), segments are whole
    blocks, so that no load needs a mask for the last tokens; where it keeps all of them (K = S),
    masks are not read."""
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
    row = tl.program_id(2) * M + tl.arange(0, M)
    # Of 3 bits there are two planes: words of the lower two bits, and half as many of the third.
    KF: tl.constexpr = 4 if KEY < 4 else 8 // KEY  # fields of a byte
    KW: tl.constexpr = D // KF // 4  # words of a token's key, in the first plane
    KEY_WORDS: tl.constexpr = D * KEY // 32  # in all
    VF: tl.constexpr = 4 if VALUE < 4 else 8 // VALUE
    WORD: tl.constexpr = 2 if VALUE == 2 or VALUE == 3 else 4  # bytes of a word of values
    PLANE_BYTES: tl.constexpr = D // S // VF  # of a row, in the first plane
    VW: tl.constexpr = D // VF // WORD
    VALUE_WORDS: tl.constexpr = D * VALUE // 8 // WORD
    ROW_BYTES: tl.constexpr = D // S * (VALUE if VALUE > 0 else 2) // 8
    # Words of a row, in the first plane; those of a value that keeps all groups lie in one.
    RW: tl.constexpr = VW if K == S and VALUE != 3 else PLANE_BYTES // WORD
    ROW: tl.constexpr = VALUE_WORDS // (VW // RW) if VALUE > 0 else 0  # in all planes
    FMA: tl.constexpr = ASM and (D // S == 8 or D // S == 16)  # levels: planes of 2 or 4 bytes
    token_base = tl.load(token_base_ptr + seg)
    keys_ptr = (keys_ptr + token_base * (D * KEY // 8)).to(tl.pointer_type(tl.uint32), bitcast=True)
    rows_ptr += tl.load(row_base_ptr + seg) * ROW_BYTES
    if VALUE > 0:
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.uint16 if WORD == 2 else tl.uint32), bitcast=True)
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
    query = row // n
    head = row % n
    in_row = row < T * n
    any_ptr = q_ptr
    q_ptr += b * q_stride_b + (h * n + head)[None, :] * q_stride_h + query[None, :] * q_stride_t

    # Queries in the order in which codes of keys come.
    byte, field = key_order(tl.arange(0, KP * 4 * KF), KP, KEY)
    like = tl.load(
        q_ptr + (byte + field * (D // KF))[:, None],
        mask=(byte < KW * 4)[:, None] & in_row[None, :],
        other=0.0,
    )
    x = like.to(tl.float32) * scale
    if DEAL:
        x += _nothing(any_ptr, byte)[:, None]
    up, down = subnormal_scale(ASM)
    unit = up / field_factor(field, KEY)

    # Columns: weights times steps, and weights times middles where they do not go to all groups.
    C: tl.constexpr = M if K == S or VALUE == 0 else 2 * M
    DV: tl.constexpr = VP * WORD * VF if VALUE > 0 else D
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
        + tl.arange(0, KF)[None, :, None] * (D // KF)
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
        left = end - t0  # t itself, compared with end, would be widened to 64 bits
        live = at < left
        # All that is read of these tokens, and the masks of the next ones.
        token_ptr = keys_ptr + t[:, None] * KEY_WORDS
        in_key = (kw < KW)[None, :]
        if KEY == 3:
            both = tl.join(kw, KW + kw % (KW // 2))[None, :, :]
            words, thirds = tl.split(
                _load(
                    token_ptr[:, :, None] + both,
                    live[:, None, None],
                    in_key[:, :, None],
                    K == 0,
                    KP > KW,
                )
            )
            thirds = thirds >> (kw // (KW // 2)).to(tl.uint32)[None, :]
        else:
            words = _load(token_ptr + kw[None, :], live[:, None], in_key, K == 0, KP > KW)
            thirds = words
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
                ASM,
            )
            w = own_step.to(tl.float32) + nothing if DEAL else own_step.to(tl.float32)
            one_word, one_offset, two_word, two_offset = level_masks(
                bits_ptr, before_ptr, tile_rows_ptr, t0 + N, end, S, N, TILE, ASM
            )
            own_step = tl.load(value_scale_ptr + t + N, mask=at < left - N, other=0.0)
        else:
            if K > 0:
                offset = t * K
            if K == S:
                bits = t  # not asked
            first_word, kept = _rows_of(t, bits, offset, vw // RW, S, K, VALUE_WORDS, ROW)
            if VALUE == 3:
                codes, code_thirds = _value_planes(rows_ptr, first_word, kept, vw, VW, RW, K == S)
            else:
                codes = _value_words(rows_ptr, first_word, kept, vw, VW, RW, ROW, K == S)
                code_thirds = codes
            if K < S:
                bits, offset = load_masks(bits_ptr, before_ptr, tile_rows_ptr, t + N, end, K, TILE)
        if VALUE > 0:
            value_scale = _load(value_scale_ptr + t, live, True, K == 0, False)

        step, middle = _key_steps(steps, KP, KEY)
        logits = _key_logits(words, thirds, x, step, middle, unit, down, like, KEY, ASM)
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
            acc = product(
                value_codes(codes, code_thirds, like, VALUE, ASM), w, acc * alpha[None, :]
            )

    # From sums over codes to sums over numbers.
    den = tl.sum(den, 0)
    if VALUE == 0:
        dims = tl.arange(0, D) % S * (D // S) + tl.arange(0, D) // S
        in_dims = dims < D
        acc *= (tl.load(gain_ptr + h * D + dims) * (8192.0 if FMA else 1.0))[:, None]
    else:
        byte, field = value_order(tl.arange(0, DV), VP, VALUE)
        group = byte // PLANE_BYTES
        dims = group * (D // S) + field * PLANE_BYTES + byte % PLANE_BYTES
        in_dims = byte < VW * WORD
        HALF: tl.constexpr = 1 << (VALUE - 1)
        if K == S:
            add = (tl.sum(middles, 0) - tl.max(sums, 0) * (HALF * down))[None, :]
        else:
            acc, _ = tl.split(tl.reshape(acc, [DV, M, 2]))
            by_step, by_middle = tl.split(tl.reshape(sums, [16, M, 2]))
            add = each_group((by_middle - by_step * HALF) * down, group, S)
        acc = acc * (down / field_factor(field, VALUE))[:, None] + add

    m, den, acc = read_window_columns(
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
