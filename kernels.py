"""Triton kernels, each beside its plain PyTorch reference, which is its specification.

* `packed_attention`: queries over what a packed cache stores and a dense tail. A program reads a piece of one head's tokens, each kept
  byte once, and leaves a softmax of its own; `_merge_kernel` joins the pieces by their log-sum-exp. Group g of token t lies in row
  offset(t) + popcount(mask_t & ((1 << g) - 1)) (layout.py), so the address of a value is computed per group, and loads stay 16 bytes wide.
  Keys and rows of 4 or 8 bits, every group kept, are read as they are (quant.py has the formats): `_int_attention_kernel`.

`impl`: "auto" runs the kernel on CUDA tensors and the reference elsewhere, "triton" and "torch" force one; the kernels run on CPU tensors
in Triton's interpreter (TRITON_INTERPRET=1). None has a gradient.

Letters: B sequences, H heads, Hkv KV heads, Hm mask heads (1 or Hkv), n = H/Hkv, D head dimension, S groups, d = D/S, T queries, W tail
slots, P sums, R = P T n rows of queries that share a KV head.
"""
from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from stored import Packed, Sums, Tail, packed_attention_ref

try:
    import triton
    import triton.language as tl
except ImportError:  # the references need none
    triton = tl = None
jit = triton.jit if triton else lambda f: f


def use_triton(impl: str, x: Tensor) -> bool:
    """Whether a function runs its kernel: impl "triton" always (CPU tensors need TRITON_INTERPRET=1), "torch" never, "auto" on a GPU."""
    assert impl in ("auto", "triton", "torch") and (triton or impl != "triton"), f"impl={impl} with triton {'there' if triton else 'missing'}"
    return triton is not None and x.dtype != torch.float64 and (impl == "triton" or (impl == "auto" and x.is_cuda))


# ----------------------------------------------------------------------------- attention over packed values

@jit
def _popcount(x):
    """Bits set in each uint32 or uint64, int32; the compiler knows the idiom."""
    if x.dtype == tl.uint64:
        x = x - ((x >> 1) & 0x5555555555555555)
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
        return ((x * 0x0101010101010101) >> 56).to(tl.int32)
    else:
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.int32)


@jit
def _product(a, b, c):
    """a @ b + c in float32; float32 factors are not rounded."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@jit
def _softmax_step(s, v, m, den, acc, take, P: tl.constexpr):
    """Online softmax: maximum m, sum den (M,) and weighted values acc (M, DP) after a block of logits s (M, N), in units of log 2, and
    values v (N, DP). take, broadcastable to s: what goes into acc, where there are P > 1 sums."""
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet
    p, alpha = tl.exp2(s - base[:, None]), tl.exp2(m - base)
    den = den * alpha + tl.sum(p, 1)
    if P > 1:
        p = tl.where(take, p, 0.0)
    return top, den, _product(p.to(v.dtype), v, acc * alpha[:, None])


@jit
def _where_rows(bits, before, tile_rows, t, hi, K: tl.constexpr, TILE: tl.constexpr):
    """Masks of tokens t, 0 from hi on, and the number of rows before each, int32."""
    mask = tl.load(bits + t, mask=t < hi, other=0)
    if K > 0:
        return mask, t * K
    else:
        return mask, tl.load(tile_rows + t // TILE, mask=t < hi, other=0) + tl.load(before + t, mask=t < hi, other=0).to(tl.int32)


@jit
def _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N: tl.constexpr):
    """Of a segment, or of several: packed tokens, tail slots, the tail's first and count; the size of its pieces, equal and at most chunk
    (rounded up to N), and their number, 0 for what is no segment."""
    b, h, there = seg // Hkv, seg % Hkv, seg < segments
    count = tl.load(n_packed + b * n_b + h * n_h, mask=there, other=0).to(tl.int32)
    first = tl.load(tail_first + b, mask=there, other=0).to(tl.int32) % W
    tail_n = tl.load(tail_n + b, mask=there, other=0).to(tl.int32)
    slots = tl.where(tail_n > 0, tl.minimum(first + tail_n, W), 0)
    total = tl.maximum(count + slots, 1)
    size = tl.cdiv(tl.cdiv(total, tl.cdiv(total, chunk)), N) * N
    return count, slots, first, tail_n, size, tl.where(there, tl.cdiv(total, size), 0)


@jit
def _attention_kernel(q, keys, rows, bits, before, tile_rows, n_packed, token_base, row_base, mask_base, tile_base, tail_k, tail_v, tail_first,
                      tail_n, select, want, out, lse, part, part_ml, scale, segments, Hkv, n_b, n_h, W, chunk, parts, Hm, n, T, q_b,
                      q_h, q_t, SEGS: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
                      P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
                      STAGES: tl.constexpr):
    """One piece of one segment: M of its R query rows over packed tokens and tail slots, N at a time. Row (sum, query, head of the group)."""
    seg, c, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M + tl.arange(0, M)  # pieces past a segment's end come last
    if SEGS > 0:  # pieces of all segments in a row
        s = tl.arange(0, SEGS)
        _, _, _, _, _, number = _pieces(n_packed, tail_first, tail_n, s, segments, Hkv, n_b, n_h, W, chunk, N)
        pid = seg
        seg = tl.sum((tl.cumsum(number, 0) <= pid).to(tl.int32), 0)
        c = pid - tl.sum(tl.where(s < seg, number, 0), 0)
        if seg >= segments:
            return
    b, h, R = seg // Hkv, seg % Hkv, P * T * n
    mseg = b * Hm + (h if Hm > 1 else 0)
    keys += tl.load(token_base + seg) * D
    rows += tl.load(row_base + seg) * (D // S)
    mask_at = tl.load(mask_base + mseg)
    bits += mask_at
    if K == 0:
        before += mask_at
        tile_rows += tl.load(tile_base + mseg)
    count, slots, first, tail_n, size, active = _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N)
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if c >= active:
            return
    own, j, which = row // n % T, row % n, row // (T * n)  # query, head of the group, sum
    dims, at, d = tl.arange(0, DP), tl.arange(0, N), D // S
    in_d, in_r = dims < D, row < R
    there = in_r[:, None] & in_d[None, :]
    x = tl.load(q + b * q_b + (h * n + j)[:, None] * q_h + own[:, None] * q_t + dims[None, :], mask=there, other=0.0)
    m, den = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc, none = tl.zeros([M, DP], tl.float32), tl.zeros([M, N], tl.float32)
    if P > 1:
        select = tl.load(select + which, mask=in_r, other=0).to(tl.uint32)
        want = tl.load(want + which, mask=in_r, other=0).to(tl.uint32)
    group = dims // d

    lo, hi = c * size, tl.minimum((c + 1) * size, count)
    mask, offset = _where_rows(bits, before, tile_rows, lo + at, hi, K, TILE)
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        live = t < hi
        if K > 0:
            offset = t * K
        if S == 64:
            word = mask.to(tl.uint64, bitcast=True)
        elif S == 16:
            word = mask.to(tl.uint16, bitcast=True).to(tl.uint32)
        else:
            word = mask.to(tl.uint32)
        key = tl.load(keys + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0, eviction_policy="evict_first")
        logits = tl.where(live[None, :], _product(x, tl.trans(key), none) * scale, float("-inf"))
        one, g = tl.full([1, 1], 1, word.dtype), group[None, :].to(word.dtype)
        has = ((word[:, None] >> g) & one) != 0
        place = (offset[:, None] + _popcount(word[:, None] & ((one << g) - one))) * d + (dims % d)[None, :]
        if ALIGN > 1:  # neighbouring dimensions of a group lie side by side: loads as wide as that allows
            place = tl.max_contiguous(tl.multiple_of(place, [1, ALIGN]), [1, ALIGN])
            has = tl.max_constancy(has, [1, ALIGN])
        value = tl.load(rows + place, mask=has if DP == D else has & in_d[None, :], other=0.0, eviction_policy="evict_first")
        mask, offset = _where_rows(bits, before, tile_rows, t + N, hi, K, TILE)  # of the next block, while this one's values come
        take = live[None, :]
        if P > 1:
            take = (word[None, :] & select[:, None]) == want[:, None]
        m, den, acc = _softmax_step(logits, value, m, den, acc, take, P)

    lo, hi = tl.maximum(c * size - count, 0), tl.minimum((c + 1) * size - count, slots)
    tail_k += seg.to(tl.int64) * W * D
    tail_v += seg.to(tl.int64) * W * D
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        order = (t - first + W) % W
        live = (t < hi) & (order < tail_n)
        key = tl.load(tail_k + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
        value = tl.load(tail_v + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
        seen = live[None, :] & (order[None, :] <= tail_n - T + own[:, None])
        logits = tl.where(seen, _product(x, tl.trans(key), none) * scale, float("-inf"))
        m, den, acc = _softmax_step(logits, value, m, den, acc, (which == 0)[:, None], P)

    if SPLIT:
        at_row = (tl.program_id(0) if SEGS > 0 else seg * parts + c).to(tl.int64) * R + row
        tl.store(part + at_row[:, None] * D + dims[None, :], acc, mask=there)
        tl.store(part_ml + at_row * 2, m, mask=in_r)
        tl.store(part_ml + at_row * 2 + 1, den, mask=in_r)
    else:
        at_row = (seg.to(tl.int64) * n + j) * T + own
        total = tl.where(den > 0, den, 1.0)
        tl.store(out + (at_row * P + which)[:, None] * D + dims[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=there)
        tl.store(lse + at_row, (m + tl.log2(total)) * 0.6931471805599453, mask=in_r & (which == 0))


def _unpack_asm(bits: int, pairs: bool) -> str:
    """PTX that turns words of codes into 16-bit floats, two to a register, by a mask and little else: as the bits of a float whose other bits are
    zeros, a code is that multiple of the smallest subnormal, exactly, and tensor cores take subnormals. Codes that begin at bit 4 come out 16
    times too large. One word: numbers lie as _keys says. Two words, of two tokens (`pairs`): the same number of both shares a register."""
    mask, n = {4: 0x000F000F, 8: 0x00FF00FF}[bits], 32 // bits
    text = "{\n.reg .b32 p, q, x, y;\n"
    if pairs:
        text += f"prmt.b32 p, ${2 * n}, ${2 * n + 1}, 0x5410;\nprmt.b32 q, ${2 * n}, ${2 * n + 1}, 0x7632;\n"
    out = 0
    for word in ("p", "q") if pairs else (f"${n}",):
        for move in (f"mov.b32 x, {word};\n", "shr.u32 x, x, 8;\n"):
            text += move
            for shift in range(0, 8, bits):
                to = f"{{${out}, ${out + n}}}" if pairs else f"{{${2 * out}, ${2 * out + 1}}}"
                text += f"and.b32 y, x, 0x{mask << shift:08X};\nmov.b32 {to}, y;\n"
                out += 1
    return text + "}"


PTX = {(bits, pairs): tl.constexpr(_unpack_asm(bits, pairs)) if triton else "" for bits in (4, 8) for pairs in (False, True)}
key_asm_4, key_asm_8, value_asm_4, value_asm_8 = PTX[4, False], PTX[8, False], PTX[4, True], PTX[8, True]
pair_asm = tl.constexpr("mov.b32 {$0, $1}, $2;") if triton else ""


@jit
def _units(like, ASM: tl.constexpr):
    """The power of 2 that factors of codes are multiplied by, so that their products with subnormals are none, and what undoes it all."""
    if not ASM:
        return 1.0, 1.0
    elif like.dtype == tl.bfloat16:
        return 1.2379400392853803e27, 8796093022208.0  # 2^90; a code of 1 is 2^-133
    else:
        return 4.0, 4194304.0  # a code of 1 is 2^-24; float16 steps of 4-bit values reach 8,734


@jit
def _keys(words, like, BITS: tl.constexpr, ASM: tl.constexpr):
    """Words (N, W) of keys -> codes (N, 32 W / BITS) in units of the smallest subnormal, those of high half bytes times 16. Order:
    _key_order; there the product finds what lies in the registers of words that are loaded 4 at a time."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if BITS == 4:
        if ASM:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(key_asm_4, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], dtype=(like.dtype,) * 8, is_pure=True,
                                                               pack=1)
            x = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))  # (N, W, odd, half, pair)
        else:
            o = tl.arange(0, 8)
            x = (words[:, :, None] >> (o // 4 * 8 + o // 2 % 2 * 4 + o % 2 * 16).to(tl.uint32) & 15).to(tl.float32)
            x = (x * tl.where(o // 2 % 2 == 0, 1.0, 16.0)).to(like.dtype)
        x = tl.permute(tl.reshape(x, [N, 4, W // 4, 2, 2, 2]), [0, 2, 3, 1, 4, 5])
    else:
        if ASM:
            a, b, c, d = tl.inline_asm_elementwise(key_asm_8, "=h,=h,=h,=h,r", [words], dtype=(like.dtype,) * 4, is_pure=True, pack=1)
            x = tl.join(tl.join(a, c), tl.join(b, d))
        else:
            o = tl.arange(0, 4)
            x = (words[:, :, None] >> (o // 2 * 8 + o % 2 * 16).to(tl.uint32) & 255).to(tl.float32).to(like.dtype)
        x = tl.permute(tl.reshape(x, [N, 4, W // 4, 2, 2]), [0, 2, 1, 3, 4])
    return tl.reshape(x, [N, W * (32 // BITS)])


@jit
def _key_order(o, KP: tl.constexpr, BITS: tl.constexpr):
    """(byte, half) of place o of a key of KP words, as _keys has it."""
    if BITS == 4:
        return 4 * (o // 4 % 4 * (KP // 4) + o // 32) + o // 16 % 2 + o % 2 * 2, o // 2 % 2
    else:
        return 4 * (o // 4 % 4 * (KP // 4) + o // 16) + o // 2 % 2 + o % 2 * 2, o * 0


@jit
def _values(words, like, BITS: tl.constexpr, ASM: tl.constexpr):
    """Words (N, W) of values -> (32 W / BITS, N), as _keys; order: _value_order, and of tokens _paired."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    E: tl.constexpr = 32 // BITS
    one, two = tl.split(tl.permute(tl.reshape(words, [N // 8, 2, 4, 8, W // 8]), [0, 2, 3, 4, 1]))  # tokens that are 4 apart
    if ASM:
        if BITS == 4:
            a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p = tl.inline_asm_elementwise(
                value_asm_4, "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r", [one, two], dtype=(like.dtype,) * 16, is_pure=True, pack=1)
            one = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
            two = tl.join(tl.join(tl.join(i, m), tl.join(k, o)), tl.join(tl.join(j, n), tl.join(l, p)))
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(value_asm_8, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [one, two], dtype=(like.dtype,) * 8,
                                                               is_pure=True, pack=1)
            one, two = tl.join(tl.join(a, c), tl.join(b, d)), tl.join(tl.join(e, g), tl.join(f, h))
        x = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, E, 2])
    else:
        o = tl.arange(0, E)
        x = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, 1, 2])
        o = tl.reshape(o, [1, 1, 1, 1, 1, E, 1])
        x = ((x >> (o * BITS).to(tl.uint32)) & ((1 << BITS) - 1)).to(tl.float32)
        if BITS == 4:
            x *= tl.where(o % 2 == 0, 1.0, 16.0)
        x = x.to(like.dtype)
    x = tl.permute(tl.reshape(x, [N // 16, 2, 4, 8, W // 8, E // 2, 2, 2]), [5, 4, 6, 3, 0, 2, 1, 7])
    return tl.reshape(x, [W * E, N])


@jit
def _value_order(o, VP: tl.constexpr, BITS: tl.constexpr):
    """(byte, half) of place o of a value of VP words, as _values has it."""
    number, word = o // 8 % 2 + o // (2 * VP) * 2, o % 8 * (VP // 8) + o // 16 % (VP // 8)
    return word * 4 + number * BITS // 8, number * BITS % 8 // 4


@jit
def _paired(w):
    """Weights (N, M) of tokens in the order that _values gives them."""
    N: tl.constexpr = w.shape[0]
    return tl.reshape(tl.permute(tl.reshape(w, [N // 16, 2, 2, 4, w.shape[1]]), [0, 3, 1, 2, 4]), w.shape)


@jit
def _rows_of_pairs(pairs, like, ASM: tl.constexpr):
    """Words (16, N / 8, 4), of whose halves each stands for one of two tokens 4 apart -> (16, N) in units of the smallest subnormal, tokens as _paired."""
    N: tl.constexpr = pairs.shape[1] * 8
    if ASM:
        a, b = tl.inline_asm_elementwise(pair_asm, "=h,=h,r", [pairs], dtype=(like.dtype,) * 2, is_pure=True, pack=1)
    else:
        a, b = (pairs & 0xFFFF).to(tl.float32).to(like.dtype), (pairs >> 16).to(tl.float32).to(like.dtype)
    return tl.reshape(tl.permute(tl.reshape(tl.join(a, b), [16, N // 16, 2, 4, 2]), [0, 1, 3, 2, 4]), [16, N])


@jit
def _each_group(x, g, S: tl.constexpr):
    """Rows g (n,) of x (16, M)."""
    out = tl.zeros([g.shape[0], x.shape[1]], tl.float32)
    for i in tl.static_range(S):
        mine = tl.sum(tl.where(tl.arange(0, 16)[:, None] == i, x, 0.0), 0)
        out += tl.where(g[:, None] == i, mine[None, :], 0.0)
    return out


@jit
def _load(p, a, b, USE_A: tl.constexpr, USE_B: tl.constexpr):
    """tl.load with the masks a and b, each where it is needed: else its test would cost as much as the load."""
    if USE_A and USE_B:
        return tl.load(p, mask=a & b, other=0)
    elif USE_A:
        return tl.load(p, mask=a, other=0)
    elif USE_B:
        return tl.load(p, mask=b, other=0)
    else:
        return tl.load(p)


@jit
def _int_attention_kernel(q, keys, rows, bits, before, tile_rows, key_scale, block_base, value_scale, n_packed, token_base, row_base, mask_base,
                          tile_base, tail_k, tail_v, tail_first, tail_n, out, lse, part, part_ml, scale, segments, Hkv, n_b, n_h, W, chunk,
                          parts, Hm, n, T, q_b, q_h, q_t, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
                          M: tl.constexpr, N: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
                          DP: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr):
    """_attention_kernel over integers of KEY and VALUE bits (4 or 8), N tokens at a time, in words.

    Tokens and value dimensions are the long side of the products, M query rows the short one. Steps go into the queries and into the weights,
    so codes are multiplied as they come out of a word. What is 2^(bits - 1) too much in each is summed by a product of its own, exactly, and
    taken off. Groups that are dropped are words of zeros; what to take off and the middles to add are summed by a product with the masks."""
    seg, c, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M + tl.arange(0, M)
    b, h, R = seg // Hkv, seg % Hkv, T * n
    KW: tl.constexpr = D * KEY // 32  # words of a token's key, of its value, of a row
    VW: tl.constexpr = D * VALUE // 32
    WB: tl.constexpr = D // S * VALUE // 8  # bytes of a row
    RW: tl.constexpr = WB // 4
    token_at = tl.load(token_base + seg)
    keys = (keys + token_at * (D * KEY // 8)).to(tl.pointer_type(tl.uint32), bitcast=True)
    rows = (rows + tl.load(row_base + seg) * WB).to(tl.pointer_type(tl.uint32), bitcast=True)
    value_scale = (value_scale + token_at * 2).to(tl.pointer_type(tl.uint32), bitcast=True)
    key_scale += tl.load(block_base + seg) * 2 * D
    if K < S:
        mseg = b * Hm + (h if Hm > 1 else 0)
        mask_at = tl.load(mask_base + mseg)
        bits += mask_at
        if K == 0:
            before += mask_at
            tile_rows += tl.load(tile_base + mseg)
    count, slots, first, tail_n, size, active = _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, BLOCK)
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if c >= active:
            return
    own, j = row // n, row % n  # query, head of the group
    in_r = row < R
    q += b * q_b + (h * n + j)[None, :] * q_h + own[None, :] * q_t

    H2: tl.constexpr = 8 // KEY  # numbers of a byte
    byte, half = _key_order(tl.arange(0, KP * 4 * H2), KP, KEY)
    in_k = byte < KW * 4
    like = tl.load(q + (byte + half * (D // 2))[:, None], mask=in_k[:, None] & in_r[None, :], other=0.0)
    x = like.to(tl.float32) * scale
    up, down = _units(like, ASM)
    unit = tl.where(half == 0, up, up / 16)
    half_codes = tl.full([16, KP], 0x88888888 if KEY == 4 else 0x80808080, tl.uint32)

    m, den = tl.full([M], -1e38, tl.float32), tl.zeros([8, M], tl.float32)
    C: tl.constexpr = M if K == S else 2 * M  # columns: weights times steps; and times middles, where they do not go to all groups alike
    DV: tl.constexpr = VP * 32 // VALUE
    acc, sums, middles = tl.zeros([DV, C], tl.float32), tl.zeros([16, C], tl.float32), tl.zeros([8, M], tl.float32)
    lo, hi = c * size, tl.minimum((c + 1) * size, count)
    at, kw, vw, channel = tl.arange(0, N), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, KP * 4)
    scales = tl.arange(0, 2)[:, None, None] * D + tl.arange(0, H2)[None, :, None] * (D // 2) + channel[None, None, :]
    if K < S:
        mask, offset = _where_rows(bits, before, tile_rows, lo + at, hi, K, TILE)
        pairs = lo + tl.arange(0, N // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
        one_mask, two_mask = tl.load(bits + pairs, mask=pairs < hi, other=0), tl.load(bits + pairs + 4, mask=pairs + 4 < hi, other=0)
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        live = t < hi
        words = _load(keys + t[:, None] * KW + kw[None, :], live[:, None], (kw < KW)[None, :], K == 0, KP > KW)
        steps = _load(key_scale + t0 // BLOCK * (2 * D) + scales, True, (channel < KW * 4)[None, None, :], False, KP > KW)
        if K == S:
            codes = _load(rows + t[:, None] * VW + vw[None, :], True, (vw < VW)[None, :], False, VP > VW)
        else:
            if K > 0:
                offset = t * K
            one, g = tl.full([1, 1], 1, tl.uint32), (vw // RW)[None, :].to(tl.uint32)
            word = (mask.to(tl.uint16, bitcast=True) if S == 16 else mask).to(tl.uint32)[:, None]
            has = (word >> g & one) != 0
            place = (offset[:, None] + _popcount(word & ((one << g) - one))) * RW + (vw % RW)[None, :]
            V: tl.constexpr = min(4, RW & -RW)
            if V > 1:
                place = tl.max_contiguous(tl.multiple_of(place, [1, V]), [1, V])
                has = tl.max_constancy(has, [1, V])
            codes = _load(rows + place, has, (vw < VW)[None, :], True, VP > VW)
            mask, offset = _where_rows(bits, before, tile_rows, t + N, hi, K, TILE)  # of the next step
        pair = _load(value_scale + t, live, True, K == 0, False)

        steps = tl.reshape(steps, [2, H2, 4, KP // 4, 2, 2])  # (middle, half, word / (KP / 4), word % (KP / 4), byte / 2, byte % 2)
        steps = tl.permute(steps, [3, 5, 2, 1, 4, 0]) if KEY == 4 else tl.permute(steps, [3, 1, 2, 5, 4, 0])
        step, middle = tl.split(tl.reshape(steps, [KP * 4 * H2, 2]))
        y = (x * (step.to(tl.float32) * unit)[:, None]).to(like.dtype)
        base = tl.sum(x * middle.to(tl.float32)[:, None], 0)
        base -= tl.max(_product(_keys(half_codes, like, KEY, ASM), y, tl.zeros([16, M], tl.float32)), 0) * down
        logits = _product(_keys(words, like, KEY, ASM), y, tl.zeros([N, M], tl.float32)) * down + base[None, :]
        if K == 0:
            logits = tl.where(live[:, None], logits, -2e38)
        top = tl.maximum(m, tl.max(logits, 0))
        p, alpha = tl.exp2(logits - top[None, :]), tl.exp2(m - top)
        den = den * alpha[None, :] + tl.sum(tl.reshape(p, [N // 8, 8, M]), 0)
        m = top

        step = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        middle = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        w = p * (step * up)[:, None]
        if K == S:
            tile = tl.full([16, N // 8, 4], 0x00010001, tl.uint32)
            middles = middles * alpha[None, :] + tl.sum(tl.reshape(p * middle[:, None], [N // 8, 8, M]), 0)
        else:
            tile = (one_mask.to(tl.uint32) & 0xFFFF | two_mask.to(tl.uint32) << 16)[None, :, :]
            tile = tile >> tl.arange(0, 16).to(tl.uint32)[:, None, None] & 0x00010001
            w = tl.reshape(tl.join(w, p * (middle * up)[:, None]), [N, C])
            alpha = tl.reshape(tl.join(alpha, alpha), [C])
            pairs += N
            one_mask, two_mask = tl.load(bits + pairs, mask=pairs < hi, other=0), tl.load(bits + pairs + 4, mask=pairs + 4 < hi, other=0)
        w = _paired(w.to(like.dtype))
        sums = _product(_rows_of_pairs(tile, like, ASM), w, sums * alpha[None, :])
        acc = _product(_values(codes, like, VALUE, ASM), w, acc * alpha[None, :])

    den = tl.sum(den, 0)
    byte, half = _value_order(tl.arange(0, DV), VP, VALUE)
    g, in_v = byte // WB, byte < VW * 4
    dims = g * (D // S) + half * WB + byte % WB
    HALF: tl.constexpr = 1 << (VALUE - 1)
    if K == S:
        add = (tl.sum(middles, 0) - tl.max(sums, 0) * (HALF * down))[None, :]
    else:
        acc, _ = tl.split(tl.reshape(acc, [DV, M, 2]))
        w, add = tl.split(tl.reshape(sums, [16, M, 2]))
        add = _each_group((add - w * HALF) * down, g, S)
    acc = acc * tl.where(half == 0, down, down / 16)[:, None] + add

    lo, hi = tl.maximum(c * size - count, 0), tl.minimum((c + 1) * size - count, slots)
    tail_k += seg.to(tl.int64) * W * D
    tail_v += seg.to(tl.int64) * W * D
    whole, at = tl.arange(0, DP), tl.arange(0, 16)
    like = tl.load(q + whole[:, None], mask=(whole < D)[:, None] & in_r[None, :], other=0.0)
    for t0 in tl.range(lo, hi, 16, num_stages=1):
        t = t0 + at
        order = (t - first + W) % W
        live = (t < hi) & (order < tail_n)
        key = tl.load(tail_k + t[:, None] * D + whole[None, :], mask=live[:, None] & (whole < D)[None, :], other=0.0)
        seen = live[:, None] & (order[:, None] <= tail_n - T + own[None, :])
        logits = tl.where(seen, _product(key, like, tl.zeros([16, M], tl.float32)) * scale, float("-inf"))
        top = tl.maximum(m, tl.max(logits, 0))
        p, alpha = tl.exp2(logits - top[None, :]), tl.exp2(m - top)
        m, den = top, den * alpha + tl.sum(p, 0)
        value = tl.load(tail_v + t[:, None] * D + dims[None, :], mask=live[:, None] & in_v[None, :], other=0.0)
        acc = _product(tl.trans(value), p.to(like.dtype), acc * alpha[None, :])

    m = tl.where(den > 0, m, float("-inf"))
    if SPLIT:
        at_row = (seg * parts + c).to(tl.int64) * R + row
        tl.store(part_ml + at_row * 2, m, mask=in_r)
        tl.store(part_ml + at_row * 2 + 1, den, mask=in_r)
        to = part + at_row[None, :] * D
    else:
        at_row = (seg.to(tl.int64) * n + j) * T + own
        total = tl.where(den > 0, den, 1.0)
        tl.store(lse + at_row, (m + tl.log2(total)) * 0.6931471805599453, mask=in_r)
        acc, to = acc / total[None, :], out + at_row[None, :] * D
    tl.store(to + dims[:, None], acc.to(to.dtype.element_ty), mask=in_v[:, None] & in_r[None, :])


@jit
def _merge_kernel(part, part_ml, n_packed, tail_first, tail_n, out, lse, segments, Hkv, n_b, n_h, W, chunk, parts, n, T, SEGS: tl.constexpr,
                  D: tl.constexpr, P: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """One query row of one segment: its pieces' softmaxes joined, C at a time."""
    r, seg = tl.program_id(0), tl.program_id(1)
    _, _, _, _, _, active = _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N)
    start = seg * parts
    if SEGS > 0:
        s = tl.arange(0, SEGS)
        _, _, _, _, _, number = _pieces(n_packed, tail_first, tail_n, s, segments, Hkv, n_b, n_h, W, chunk, N)
        start = tl.sum(tl.where(s < seg, number, 0), 0)
    dims = tl.arange(0, DP)
    top, total, mixed = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([DP], tl.float32)
    for c0 in range(0, active, C):
        c = c0 + tl.arange(0, C)
        at = (start + c).to(tl.int64) * (P * T * n) + r
        m = tl.load(part_ml + at * 2, mask=c < active, other=float("-inf"))
        den = tl.load(part_ml + at * 2 + 1, mask=c < active, other=0.0)
        o = tl.load(part + at[:, None] * D + dims[None, :], mask=(c < active)[:, None] & (dims < D)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        w, alpha = tl.exp2(m - base), tl.exp2(top - base)
        total = total * alpha + tl.sum(den * w, 0)
        mixed = mixed * alpha + tl.sum(o * w[:, None], 0)
        top = new
    total = tl.where(total > 0, total, 1.0)
    at = (seg.to(tl.int64) * n + r % n) * T + r // n % T
    tl.store(out + (at * P + r // (T * n)) * D + dims, (mixed / total).to(out.dtype.element_ty), mask=dims < D)
    if r < T * n:
        tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453)


INT_TOKENS, INT_STAGES, INT_REGISTERS, INT_WARPS = 64, 3, 0, 1
_per_sm: dict[tuple, int] = {}  # programs of a compiled variant that a multiprocessor holds at a time


def packed_attention(q: Tensor, packed: Packed | None, tail: Tail | None, sums: Sums | None = None, impl: str = "auto",
                     chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of the newest T tokens, q (B, H, T, D), over packed tokens, all older than they, and a tail that ends with those T:
    (out, lse). One of packed and tail may be None.

    out (B, H, T, D) like q; with `sums` (B, H, T, P, D), softmax weights times values summed over what each sum takes, dropped groups
    zero; lse (B, H, T) float32 (float64 of float64): log of the sum of exp(q . k / sqrt(D)), -inf (and out 0) where there is nothing to
    read. chunk: tokens to a program, 0: such that all programs run at a time. The kernels take D up to 256 and, with sums, S up to 32; of integers
    4 and 8 bits of every group and T H / Hkv up to INT_ROWS; float64 and the rest go to the reference."""
    B, H, T, D = q.shape
    ints = packed.ints if packed else None
    Hkv = (packed.token_base if packed else tail.k).size(1)
    fits = D <= 256 and not (sums and packed and packed.n_groups > 32)
    if ints:
        fits = fits and sums is None and reads_ints(ints.key_bits, ints.value_bits, D, packed.n_groups, packed.k == packed.n_groups)
    if not use_triton(impl, q) or not fits:
        return packed_attention_ref(q, packed, tail, sums)
    none = None if packed and tail else torch.zeros(B, Hkv, dtype=torch.int64, device=q.device)
    p, tail = packed or Packed(q, q, none, None, None, none, none, none, none, none, 1, 1, 0, 0), tail or Tail(q[:, :, :0], q, none, none)
    assert not tail.k.numel() or (tail.k.is_contiguous() and tail.v.is_contiguous()), "a tail is read by address: k, v must be contiguous"
    Hm, n, S, W = p.mask_base.size(1), H // Hkv, p.n_groups, tail.k.size(2)
    P = len(sums.select) if sums else 1
    R, narrow, segments, given = P * T * n, q.dtype != torch.float32, B * Hkv, chunk
    M = min(64 if narrow else 16, max(16, triton.next_power_of_2(R)))
    DP, blocks = max(16, triton.next_power_of_2(D)), -(-R // M)
    N, warps, stages = ((32, 1, 1) if M == 16 and DP <= 128 else (64, 4, 2)) if narrow else (16, 4, 1)  # what an H100 likes: docs/log.md
    shape = dict(D=D, S=S, K=p.k, TILE=p.tile, P=P, M=M, N=N, DP=DP, ALIGN=D // S & -(D // S), STAGES=stages)
    limit = {}
    if ints:
        N, M, blocks, warps = min(INT_TOKENS, ints.block), (4 if R <= 4 else 8 if R <= 8 else 16), -(-R // 16), INT_WARPS if narrow else 4
        KP, VP = (max(w, triton.next_power_of_2(D * b // 32)) for w, b in ((4, ints.key_bits), (8, ints.value_bits)))
        shape = dict(D=D, S=S, K=p.k, TILE=p.tile, M=M, N=N, KEY=ints.key_bits, VALUE=ints.value_bits, KP=KP, VP=VP, DP=DP, BLOCK=ints.block,
                     ASM=q.is_cuda and narrow and torch.version.hip is None, STAGES=INT_STAGES)
        N, limit = ints.block, dict(maxnreg=INT_REGISTERS) if q.is_cuda and narrow and INT_REGISTERS else {}
    variant = (q.dtype, p.bits.dtype, *shape.values())
    if not chunk:  # one piece per program, and all programs run at a time
        programs = _multiprocessors(q.device) * _per_sm.get(variant, 8) // blocks
        chunk = -(-(p.held + segments * W) // max(1, programs - segments))
    size = max(N, -(-chunk // N) * N)
    parts = max(1, -(-(p.longest + W) // size))
    bound = -(-p.held // size) + segments * (1 + -(-W // size))  # pieces of all segments, if `held` is exact
    ragged = parts > 1 and p.exact and not ints and 4 * bound < 3 * segments * parts and segments <= 1024  # then many would have nothing to do
    grid, SEGS = ((bound, 1), triton.next_power_of_2(segments)) if ragged else ((segments, parts), 0)
    out = q.new_empty(B, H, T, P, D) if sums else q.new_empty(B, H, T, D)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    part, part_ml = (torch.empty(grid[0] * grid[1] * R * w if parts > 1 else 1, dtype=torch.float32, device=q.device) for w in (D, 2))
    q = q if q.stride(-1) == 1 else q.contiguous()
    where = (segments, Hkv, p.n.stride(0), p.n.stride(1) if Hm > 1 else 0, max(W, 1), size, parts)
    tail_and_out = (tail.k, tail.v, tail.first, tail.count), (out, lse, part, part_ml, D ** -0.5 * math.log2(math.e), *where)
    if ints:
        compiled = _int_attention_kernel[(*grid, blocks)](
            q, p.keys, p.rows, p.bits, p.before, p.tile_rows, ints.key_scale, ints.block_base, ints.value_scale, p.n, p.token_base, p.row_base,
            p.mask_base, p.tile_base, *tail_and_out[0], *tail_and_out[1], Hm, n, T, *q.stride()[:3], **shape, SPLIT=parts > 1, num_warps=warps,
            **limit)
    else:
        select, want = sums or (tail.count, tail.count)
        compiled = _attention_kernel[(*grid, blocks)](
            q, p.keys, p.rows, p.bits, p.before, p.tile_rows, p.n, p.token_base, p.row_base, p.mask_base, p.tile_base, *tail_and_out[0], select, want,
            *tail_and_out[1], Hm, n, T, *q.stride()[:3], SEGS=SEGS, **shape, SPLIT=parts > 1, num_warps=warps)
    if q.is_cuda and not given and variant not in _per_sm:
        _per_sm[variant] = _resident(compiled, warps, q.device)
        return packed_attention(q, packed, tail, sums, impl)  # once more, in pieces of the right size
    if parts > 1:
        _merge_kernel[(R, segments)](part, part_ml, p.n, tail.first, tail.count, out, lse, *where, n, T, SEGS=SEGS, D=D, P=P, DP=DP,
                                     N=N, C=8192 // DP, num_warps=4)
    return out, lse


def reads_ints(key_bits: int, value_bits: int, head_dim: int, n_groups: int, whole: bool) -> bool:
    """Whether _int_attention_kernel reads integers of these bits, every group kept (whole) or not: 4 or 8 bits, rows that fill words."""
    S = 1 if whole else n_groups
    return {key_bits, value_bits} <= {4, 8} and S <= 16 and head_dim * key_bits % 32 == 0 and head_dim // S * value_bits % 32 == 0


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _resident(compiled, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that fit a multiprocessor at a time, by registers, shared memory and warps."""
    card = torch.cuda.get_device_properties(device)
    registers = -(-compiled.n_regs // 8) * 8 * 32 * warps
    return max(1, min(card.regs_per_multiprocessor // registers, card.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
                      card.max_threads_per_multi_processor // (32 * warps)))
