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


UNPACK = """{ // the 8 numbers of a word: 128 + code by an or into the mantissa
.reg .b32 a, b, c, d;
shr.u32 b, $8, 4;
shr.u32 c, $8, 8;
shr.u32 d, $8, 12;
lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
mov.b32 {$0, $4}, a;
mov.b32 {$1, $5}, b;
mov.b32 {$2, $6}, c;
mov.b32 {$3, $7}, d;
}"""


def _unpack_two() -> str:
    """Assembly for the numbers of two words, each minus 8: $i of the first and $(8 + i) of the second share a register."""
    text = "{\n.reg .b32 w0, w1, x, e, f;\nmov.b32 e, 0x3F803F80;\nmov.b32 f, 0xC308C308;\n"
    text += "prmt.b32 w0, $16, $17, 0x5410;\nprmt.b32 w1, $16, $17, 0x7632;\n"
    for i in range(8):
        word = f"w{i // 4}"
        if i % 4:
            text += f"shr.u32 x, {word}, {4 * (i % 4)};\n"
            word = "x"
        text += f"lop3.b32 x, {word}, 0x000F000F, 0x43004300, 0xEA;\nfma.rn.bf16x2 x, x, e, f;\nmov.b32 {{${i}, ${8 + i}}}, x;\n"
    return text + "}"


UNPACK_TWO = _unpack_two()
unpack_asm, unpack_two_asm = (tl.constexpr(UNPACK), tl.constexpr(UNPACK_TWO)) if triton else (UNPACK, UNPACK_TWO)


@jit
def _numbers(x, like, U: tl.constexpr):
    """Words x (...) of U bytes -> (..., 2 U): the numbers of 4 bits, each minus 8. Place o holds number o // 2 + o % 2 * U."""
    o = tl.arange(0, 2 * U)
    return ((tl.expand_dims(x, -1).to(tl.uint32) >> ((o // 2 + o % 2 * U) * 4).to(tl.uint32)) & 15).to(tl.float32).to(like.dtype) - 8.0


@jit
def _eight(a, b, c, d, e, f, g, h):
    """Tensors (...) -> (..., 2, 2, 2) in the order of _numbers."""
    return tl.join(tl.join(tl.join(a, c), tl.join(b, d)), tl.join(tl.join(e, g), tl.join(f, h)))


@jit
def _int_queries(steps, x, x_zero, in_k, chan, like, D: tl.constexpr, FULL: tl.constexpr, OFF: tl.constexpr):
    """Queries x (numbers of a key, M) times the steps of a block, and what its middles, and codes that are OFF too large, add to logits."""
    if FULL:
        step, middle = tl.load(steps + chan), tl.load(steps + D + chan)
    else:
        step, middle = tl.load(steps + chan, mask=in_k, other=0.0), tl.load(steps + D + chan, mask=in_k, other=0.0)
    y = (x * step.to(tl.float32)[:, None]).to(like.dtype)
    base = x_zero * middle.to(tl.float32)[:, None]
    if OFF > 0:
        base -= y.to(tl.float32) * OFF
    return y, tl.sum(base, 0)


@jit
def _int_block(t0, y, base, keys, rows, value_scale, like, m, den, middles, acc, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
               KEY: tl.constexpr, VALUE: tl.constexpr, KU: tl.constexpr, VU: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, ASM: tl.constexpr):
    """N tokens from t0 into the state of _int_attention_kernel."""
    KW: tl.constexpr = D * KEY // 8 // KU  # words of a token's key, of its value
    VW: tl.constexpr = D * VALUE // 8 // VU
    KA: tl.constexpr = KU == 4 and ASM
    VA: tl.constexpr = VU == 4 and ASM
    G: tl.constexpr = min(8, VP)

    n8, i8, word = tl.arange(0, N // 8), tl.arange(0, 8), tl.arange(0, KP)
    at = n8[:, None] * 8 + (i8 % 2 * 4 + i8 // 2)[None, :]  # order of the tokens of the products
    t, tk = t0 + tl.reshape(at, [N]), t0 + at[:, :, None]
    if KP == KW:
        packed = tl.load(keys + tk * KW + word[None, None, :], eviction_policy="evict_first")
    else:
        packed = tl.load(keys + tk * KW + word[None, None, :], mask=(word < KW)[None, None, :], other=0, eviction_policy="evict_first")
    packed = tl.reshape(packed, [N, 4, KP // 4])
    if KA:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(unpack_asm, "=h,=h,=h,=h,=h,=h,=h,=h,r", [packed], dtype=(tl.bfloat16,) * 8, is_pure=True,
                                                           pack=1)
        key = _eight(a, b, c, d, e, f, g, h)
    else:
        key = _numbers(packed, like, KU)
    key = tl.reshape(tl.permute(tl.reshape(key, [N, 4, KP // 4, KU, 2]), [0, 2, 3, 1, 4]), [N, KP * KU * 2])

    # values: words of tokens that are 4 apart are unpacked together
    two, place, t4, w = tl.arange(0, 2), tl.arange(0, G), tl.arange(0, 4), tl.arange(0, VP // G)
    tv = t0 + n8[:, None, None, None, None] * 8 + two[None, :, None, None, None] * 4 + t4[None, None, None, :, None]
    word = place[None, None, :, None, None] * (VP // G) + w[None, None, None, None, :]
    if VW == VP:
        packed = tl.load(rows + tv * VW + word, eviction_policy="evict_first")
    else:
        packed = tl.load(rows + tv * VW + word, mask=word < VW, other=0, eviction_policy="evict_first")
    first, second = tl.split(tl.permute(packed, [0, 2, 3, 4, 1]))
    if VA:
        a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2 = tl.inline_asm_elementwise(
            unpack_two_asm, "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r", [first, second], dtype=(tl.bfloat16,) * 16, is_pure=True, pack=1)
        value = tl.join(_eight(a, b, c, d, e, f, g, h), _eight(a2, b2, c2, d2, e2, f2, g2, h2))
    else:
        value = tl.join(_numbers(first, like, VU), _numbers(second, like, VU))
    value = tl.reshape(value, [N // 8, G, 4, VP // G, 2 * VU, 2])
    value = tl.reshape(tl.permute(value, [3, 4, 1, 0, 2, 5]), [VP * VU * 2, N])

    logits = _product(key, y, tl.zeros([N, M], tl.float32) + base[None, :])
    step, middle = tl.load(value_scale + 2 * t).to(tl.float32), tl.load(value_scale + 2 * t + 1).to(tl.float32)
    top = tl.maximum(m, tl.max(logits, 0))
    p, alpha = tl.exp2(logits - top[None, :]), tl.exp2(m - top)
    den = den * alpha[None, :] + tl.sum(tl.reshape(p, [N // 8, 8, M]), 0)
    middles = middles * alpha[None, :] + tl.sum(tl.reshape(p * middle[:, None], [N // 8, 8, M]), 0)
    acc = _product(value, (p * step[:, None]).to(like.dtype), acc * alpha[None, :])
    return top, den, middles, acc


@jit
def _words(p, U: tl.constexpr):
    """A pointer to bytes as one to words of U bytes."""
    if U == 4:
        return p.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif U == 2:
        return p.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        return p


@jit
def _int_attention_kernel(q, keys, rows, key_scale, block_base, value_scale, n_packed, token_base, tail_k, tail_v, tail_first, tail_n, out, lse, part,
                          part_ml, scale, segments, Hkv, n_b, n_h, W, chunk, parts, n, T, q_b, q_h, q_t, D: tl.constexpr, S: tl.constexpr,
                          M: tl.constexpr, N: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KU: tl.constexpr, VU: tl.constexpr,
                          KP: tl.constexpr, VP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr):
    """_attention_kernel over whole blocks of integers of KEY and VALUE bits (4 or 8), every group kept. Every byte is two numbers of 4 bits, of
    which 8 bits are a sum (low + 16 high). Steps go into the queries and the weights, so what is unpacked is multiplied as it comes out.

    Tokens and value dimensions are the long side of the products, M query rows the short one. Words of KU or VU bytes are unpacked in the
    registers they are loaded into, and dimensions and tokens are taken in the order in which the products then find them there."""
    seg, c, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M + tl.arange(0, M)
    b, h, R = seg // Hkv, seg % Hkv, T * n
    token_at = tl.load(token_base + seg)
    keys = _words(keys + token_at * (D * KEY // 8), KU)
    value_scale += token_at * 2
    rows = _words(rows + token_at * (D * VALUE // 8), VU)  # every group is kept
    key_scale += tl.load(block_base + seg) * 2 * D
    count, slots, first, tail_n, size, active = _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, BLOCK)
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if c >= active:
            return
    own, j = row // n, row % n  # query, head of the group
    in_r = row < R
    q += b * q_b + (h * n + j)[None, :] * q_h + own[None, :] * q_t

    k = tl.arange(0, KP * KU * 2)  # place in a key as _int_block unpacks it: its byte, and which half
    number = k // 8 % KU + k % 2 * KU
    byte, half = (k // 2 % 4 * (KP // 4) + k // (8 * KU)) * KU + number // 2, number % 2
    in_k = byte < D * KEY // 8
    chan = byte + half * (D // 2) if KEY == 4 else byte
    like = tl.load(q + chan[:, None], mask=in_k[:, None] & in_r[None, :], other=0.0)
    x = like.to(tl.float32) * scale
    x_zero = x if KEY == 4 else tl.where(half[:, None] == 0, x, 0.0)
    if KEY == 8:
        x = tl.where(half[:, None] == 0, x, x * 16.0)

    G: tl.constexpr = min(8, VP)
    m, den, middles = tl.full([M], -1e38, tl.float32), tl.zeros([8, M], tl.float32), tl.zeros([8, M], tl.float32)
    acc = tl.zeros([VP * VU * 2, M], tl.float32)
    lo, hi = c * size, tl.minimum((c + 1) * size, count)
    FULL: tl.constexpr = KP * KU == D * KEY // 8
    OFF: tl.constexpr = 136.0 if KU == 4 and ASM else 0.0
    for t0 in tl.range(lo, hi, BLOCK, num_stages=1):
        y, base = _int_queries(key_scale + t0 // BLOCK * 2 * D, x, x_zero, in_k, chan, like, D, FULL, OFF)
        for t in tl.range(t0, t0 + BLOCK, N, num_stages=1, loop_unroll_factor=1):
            m, den, middles, acc = _int_block(t, y, base, keys, rows, value_scale, like, m, den, middles, acc, D, M, N, KEY, VALUE, KU, VU, KP, VP,
                                              ASM)

    byte, width = tl.arange(0, VP * VU), D // S * VALUE // 8  # of a value, of a row
    in_v, den = byte < D * VALUE // 8, tl.sum(den, 0)
    if VU == 1:
        acc = tl.permute(tl.reshape(acc, [VP // G, 2, G, M]), [2, 0, 3, 1])
    else:
        acc = tl.permute(tl.reshape(acc, [VP // G, VU // 2, 2, 2, G, M]), [4, 0, 3, 1, 5, 2])
    low, high = tl.split(tl.reshape(acc, [VP * VU, M, 2]))
    middle = tl.sum(middles, 0)[None, :]
    if VALUE == 4:
        low, high = low + middle, high + middle
        v_low = byte // width * (2 * width) + byte % width  # dimensions of a byte's low and its high number, in groups of `width` bytes
        v_high = v_low + width
    else:
        low += 16.0 * high + middle
        v_low = byte
        v_high = byte

    lo, hi = tl.maximum(c * size - count, 0), tl.minimum((c + 1) * size - count, slots)
    tail_k += seg.to(tl.int64) * W * D
    tail_v += seg.to(tl.int64) * W * D
    dims, at = tl.arange(0, DP), tl.arange(0, N)
    like = tl.load(q + dims[:, None], mask=(dims < D)[:, None] & in_r[None, :], other=0.0)
    for t0 in tl.range(lo, hi, N, num_stages=1):
        t = t0 + at
        order = (t - first + W) % W
        live = (t < hi) & (order < tail_n)
        in_value = live[:, None] & in_v[None, :]
        key = tl.load(tail_k + t[:, None] * D + dims[None, :], mask=live[:, None] & (dims < D)[None, :], other=0.0)
        seen = live[:, None] & (order[:, None] <= tail_n - T + own[None, :])
        logits = tl.where(seen, _product(key, like, tl.zeros([N, M], tl.float32)) * scale, float("-inf"))
        top = tl.maximum(m, tl.max(logits, 0))
        p, alpha = tl.exp2(logits - top[None, :]), tl.exp2(m - top)
        m, den, w = top, den * alpha + tl.sum(p, 0), p.to(like.dtype)
        low = _product(tl.trans(tl.load(tail_v + t[:, None] * D + v_low[None, :], mask=in_value, other=0.0)), w, low * alpha[None, :])
        if VALUE == 4:
            high = _product(tl.trans(tl.load(tail_v + t[:, None] * D + v_high[None, :], mask=in_value, other=0.0)), w, high * alpha[None, :])

    m = tl.where(den > 0, m, float("-inf"))
    there = in_v[:, None] & in_r[None, :]
    if SPLIT:
        at_row = (seg * parts + c).to(tl.int64) * R + row
        tl.store(part_ml + at_row * 2, m, mask=in_r)
        tl.store(part_ml + at_row * 2 + 1, den, mask=in_r)
        to = part + at_row[None, :] * D
    else:
        at_row = (seg.to(tl.int64) * n + j) * T + own
        total = tl.where(den > 0, den, 1.0)
        tl.store(lse + at_row, (m + tl.log2(total)) * 0.6931471805599453, mask=in_r)
        low, high, to = low / total[None, :], high / total[None, :], out + at_row[None, :] * D
    tl.store(to + v_low[:, None], low.to(to.dtype.element_ty), mask=there)
    if VALUE == 4:
        tl.store(to + v_high[:, None], high.to(to.dtype.element_ty), mask=there)


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


INT_ROWS = 4  # rows of queries that _int_attention_kernel takes: what has been compared with float64 on a GPU
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
        whole = sums is None and packed.k == packed.n_groups
        fits = fits and reads_ints(ints.key_bits, ints.value_bits, D // packed.n_groups, whole, T * H // Hkv)
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
        N, M, width, blocks, warps = ints.block, INT_ROWS, D // S * ints.value_bits // 8, 1, 1 if narrow else 2
        KU, VU = (min(4, b & -b) for b in (D * ints.key_bits // 8, width))
        KP, VP = (max(4, 8 // u, triton.next_power_of_2(D * b // 8 // u)) for b, u in ((ints.key_bits, KU), (ints.value_bits, VU)))
        shape = dict(D=D, S=S, M=M, N=min(16, N), KEY=ints.key_bits, VALUE=ints.value_bits, KU=KU, VU=VU, KP=KP, VP=VP, DP=DP, BLOCK=N,
                     ASM=q.is_cuda and q.dtype == torch.bfloat16 and torch.version.hip is None)
        limit = dict(maxnreg=128) if q.is_cuda and narrow else {}
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
            q, p.keys, p.rows, ints.key_scale, ints.block_base, ints.value_scale, p.n, p.token_base, *tail_and_out[0], *tail_and_out[1], n, T,
            *q.stride()[:3], **shape, SPLIT=parts > 1, num_warps=warps, **limit)
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


def reads_ints(key_bits: int, value_bits: int, group_dim: int, whole: bool, rows: int) -> bool:
    """Whether _int_attention_kernel reads integers of these bits: 4 or 8, every group (of group_dim numbers) kept, few rows of queries."""
    return whole and rows <= INT_ROWS and {key_bits, value_bits} <= {4, 8} and group_dim % 2 == 0


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _resident(compiled, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that fit a multiprocessor at a time, by registers, shared memory and warps."""
    card = torch.cuda.get_device_properties(device)
    registers = -(-compiled.n_regs // 8) * 8 * 32 * warps
    return max(1, min(card.regs_per_multiprocessor // registers, card.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
                      card.max_threads_per_multi_processor // (32 * warps)))
