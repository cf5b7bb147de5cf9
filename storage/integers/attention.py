"""Triton kernels for integers in the packed cache (format.py has the formats,
stored.packed_attention_ref is the specification).

* `int_attention_kernel`: attention over 4 and 8 bits as they are stored, word by word: a code
  becomes a float by masking bits.
* `int_keys`, `int_values`, `level_values`: what kernels._attention_kernel reads in place of whole
  numbers, of any bits or levels, byte by byte.

Letters: B sequences, H heads, Hkv KV heads, Hm mask heads (1 or Hkv), n = H/Hkv, D head dimension,
S groups, d = D/S, T queries, W tail slots, R = T n rows of queries that share a KV head, C columns
of a product with them."""

from __future__ import annotations

import torch

from storage.integers.format import STEPS, centre
from storage.kernel_base import (
    TRITON,
    as_word,
    jit,
    own_piece,
    pieces,
    popcount,
    product,
    tl,
    triton,
    where_rows,
)

# ----------------------------------------------------------------------------- byte by byte


@jit
def _codes(p, i, there, n: tl.constexpr, BITS: tl.constexpr):
    """Codes i of the n in bytes p (pointers and indices, broadcast), int32, 0 where not there: see
    quant.pack_bits."""
    if BITS == 3:
        low = tl.load(p + i % (n // 4), mask=there, other=0).to(tl.int32) >> (i // (n // 4) * 2) & 3
        return (
            low
            | (
                tl.load(p + n // 4 + i % (n // 8), mask=there, other=0).to(tl.int32)
                >> (i // (n // 8))
                & 1
            )
            << 2
        )
    else:
        width: tl.constexpr = n * BITS // 8
        return tl.load(p + i % width, mask=there, other=0).to(tl.int32) >> (i // width * BITS) & (
            (1 << BITS) - 1
        )


@jit
def int_keys(
    keys, key_scale, t, dims, there, like, D: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr
):
    """Keys (tokens, dims) of KEY bits of a segment's tokens t, as quant.dequantise_keys."""
    code = _codes(keys + t[:, None] * (D * KEY // 8), dims[None, :], there, D, KEY)
    scale = key_scale + (t // BLOCK * (2 * D))[:, None] + dims[None, :]
    step = tl.load(scale, mask=there, other=0.0).to(tl.float32)
    middle = tl.load(scale + D, mask=there, other=0.0).to(tl.float32)
    return ((code - (1 << (KEY - 1))).to(tl.float32) * step + middle).to(like.dtype)


@jit
def int_values(
    rows,
    value_scale,
    t,
    word,
    offset,
    dims,
    live,
    like,
    D: tl.constexpr,
    S: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Values (tokens, dims) of VALUE bits of tokens t with masks `word`, rows before them `offset`,
    as quant.dequantise_values; 0 where dropped."""
    d: tl.constexpr = D // S
    one = tl.full([1, 1], 1, word.dtype)
    g = (dims // d)[None, :].to(word.dtype)
    has = ((word[:, None] >> g & one) != 0) & (dims < D)[None, :]
    row = offset[:, None] + popcount(word[:, None] & ((one << g) - one))
    code = _codes(rows + row * (d * VALUE // 8), (dims % d)[None, :], has, d, VALUE)
    step = tl.load(value_scale + t * 2, mask=live, other=0.0)
    middle = tl.load(value_scale + t * 2 + 1, mask=live, other=0.0)
    value = (code - (1 << (VALUE - 1))).to(tl.float32) * step.to(tl.float32)[:, None] + middle.to(
        tl.float32
    )[:, None]
    return tl.where(has, value, 0.0).to(like.dtype)


STEP_1, STEP_2, STEP_3 = (tl.constexpr(s) if triton else s for s in STEPS[1:])
CENTRE_1, CENTRE_2, CENTRE_3 = (tl.constexpr(centre(i)) if triton else 0.0 for i in (1, 2, 3))


@jit
def _of_level(level, a, b, c):
    """a, b or c where the level is 1, 2 or 3."""
    return tl.where(level == 1, a, tl.where(level == 2, b, c))


@jit
def _levels(word, g, S: tl.constexpr):
    """Levels of groups g of tokens with 2 S bits `word` (broadcast), int32, and 2-bit units of the
    groups before them."""
    one = tl.full([1, 1], 1, word.dtype)
    high = word >> S
    below = (one << g) - one
    level = (word >> g & one).to(tl.int32) + 2 * (high >> g & one).to(tl.int32)
    return level, popcount(word & below) + 2 * popcount(high & below) + popcount(
        word & high & below
    )


@jit
def level_values(
    rows, value_scale, gain, t, word, offset, dims, live, like, D: tl.constexpr, S: tl.constexpr
):
    """int_values where every group has its level, as quant.dequantise_levels: `word` holds 2 S
    bits, `offset` counts units."""
    d: tl.constexpr = D // S
    level, unit = _levels(word[:, None], (dims // d)[None, :].to(word.dtype), S)
    has = (level > 0) & (dims < D)[None, :]
    i = (dims % d)[None, :]
    byte = (offset[:, None] + unit) * (d // 4) + i % (d // 4)
    shift = i // (d // 4) * 2
    code = tl.zeros(has.shape, tl.int32)
    for u in tl.static_range(4):
        there = has & (u < level + (level == 3))
        code |= (
            tl.load(rows + byte + u * (d // 4), mask=there, other=0).to(tl.int32) >> shift & 3
        ) << (2 * u)
    step = tl.load(value_scale + t, mask=live, other=0.0).to(tl.float32)[:, None] * _of_level(
        level, STEP_1, STEP_2, STEP_3
    )
    value = (
        (code.to(tl.float32) - _of_level(level, CENTRE_1, CENTRE_2, CENTRE_3))
        * step
        * tl.load(gain + dims, mask=dims < D, other=0.0)[None, :]
    )
    return tl.where(has, value, 0.0).to(like.dtype)


# ----------------------------------------------------------------------------- word by word


def _unpack_asm(bits: int, pairs: bool) -> str:
    """PTX that turns words of codes into bfloat16, two to a register, by a mask and little else: as
    the bits of a float whose other bits are zeros, a code is that multiple of the smallest
    subnormal, exactly, and tensor cores take subnormals. Codes that begin at bit 4 come out 16
    times too large. One word: numbers lie as _keys says. Two words, of two tokens (`pairs`): the
    same number of both shares a register."""
    mask = {4: 0x000F000F, 8: 0x00FF00FF}[bits]
    n = 32 // bits
    text = "{\n.reg .b32 p, q, x, y;\n"
    if pairs:
        text += (
            f"prmt.b32 p, ${2 * n}, ${2 * n + 1}, 0x5410;\nprmt.b32 q, ${2 * n}, ${2 * n + 1}, "
            "0x7632;\n"
        )
    out = 0
    for word in ("p", "q") if pairs else (f"${n}",):
        for move in (f"mov.b32 x, {word};\n", "shr.u32 x, x, 8;\n"):
            text += move
            for shift in range(0, 8, bits):
                to = f"{{${out}, ${out + n}}}" if pairs else f"{{${2 * out}, ${2 * out + 1}}}"
                text += f"and.b32 y, x, 0x{mask << shift:08X};\nmov.b32 {to}, y;\n"
                out += 1
    return text + "}"


PTX = {
    (bits, pairs): tl.constexpr(_unpack_asm(bits, pairs)) if triton else ""
    for bits in (4, 8)
    for pairs in (False, True)
}
key_asm_4 = PTX[4, False]
key_asm_8 = PTX[8, False]
value_asm_4 = PTX[4, True]
value_asm_8 = PTX[8, True]
pair_asm = tl.constexpr("mov.b32 {$0, $1}, $2;") if triton else ""


@jit
def _units(ASM: tl.constexpr):
    """The power of 2 that factors of codes are multiplied by, so that their products with
    subnormals are none, and what undoes it all."""
    if ASM:
        return 1.2379400392853803e27, 8796093022208.0  # 2^90; a code of 1 is 2^-133
    else:
        return 1.0, 1.0


@jit
def _keys(words, like, BITS: tl.constexpr, ASM: tl.constexpr):
    """Words (N, W) of keys -> codes (N, 32 W / BITS) in units of the smallest subnormal, those of
    high half bytes times 16. Order: _key_order; there the product finds what lies in the registers
    of words that are loaded 4 at a time."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if BITS == 4:
        if ASM:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                key_asm_4,
                "=h,=h,=h,=h,=h,=h,=h,=h,r",
                [words],
                dtype=(like.dtype,) * 8,
                is_pure=True,
                pack=1,
            )
            # (N, W, odd, half, pair)
            x = tl.join(
                tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
            )
        else:
            o = tl.arange(0, 8)
            x = (
                words[:, :, None] >> (o // 4 * 8 + o // 2 % 2 * 4 + o % 2 * 16).to(tl.uint32) & 15
            ).to(tl.float32)
            x = (x * tl.where(o // 2 % 2 == 0, 1.0, 16.0)).to(like.dtype)
        x = tl.permute(tl.reshape(x, [N, 4, W // 4, 2, 2, 2]), [0, 2, 3, 1, 4, 5])
    else:
        if ASM:
            a, b, c, d = tl.inline_asm_elementwise(
                key_asm_8, "=h,=h,=h,=h,r", [words], dtype=(like.dtype,) * 4, is_pure=True, pack=1
            )
            x = tl.join(tl.join(a, c), tl.join(b, d))
        else:
            o = tl.arange(0, 4)
            x = (
                (words[:, :, None] >> (o // 2 * 8 + o % 2 * 16).to(tl.uint32) & 255)
                .to(tl.float32)
                .to(like.dtype)
            )
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
    """Words (N, W) of values -> (32 W / BITS, N), as _keys; order: _value_order, and of tokens
    _paired."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    E: tl.constexpr = 32 // BITS
    # tokens that are 4 apart
    one, two = tl.split(tl.permute(tl.reshape(words, [N // 8, 2, 4, 8, W // 8]), [0, 2, 3, 4, 1]))
    if ASM:
        if BITS == 4:
            a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2 = tl.inline_asm_elementwise(
                value_asm_4,
                "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r",
                [one, two],
                dtype=(like.dtype,) * 16,
                is_pure=True,
                pack=1,
            )
            one = tl.join(
                tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
            )
            two = tl.join(
                tl.join(tl.join(a2, e2), tl.join(c2, g2)), tl.join(tl.join(b2, f2), tl.join(d2, h2))
            )
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                value_asm_8,
                "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
                [one, two],
                dtype=(like.dtype,) * 8,
                is_pure=True,
                pack=1,
            )
            one = tl.join(tl.join(a, c), tl.join(b, d))
            two = tl.join(tl.join(e, g), tl.join(f, h))
        x = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, E, 2])
    else:
        o = tl.arange(0, E)
        x = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, 1, 2])
        o = tl.reshape(o, [1, 1, 1, 1, 1, E, 1])
        x = ((x >> (o * BITS).to(tl.uint32)) & ((1 << BITS) - 1)).to(tl.float32)
        if BITS == 4:
            x *= tl.where(o % 2 == 0, 1.0, 16.0)
        x = x.to(like.dtype)
    x = tl.permute(
        tl.reshape(x, [N // 16, 2, 4, 8, W // 8, E // 2, 2, 2]), [5, 4, 6, 3, 0, 2, 1, 7]
    )
    return tl.reshape(x, [W * E, N])


@jit
def _value_order(o, VP: tl.constexpr, BITS: tl.constexpr):
    """(byte, half) of place o of a value of VP words, as _values has it."""
    number = o // 8 % 2 + o // (2 * VP) * 2
    word = o % 8 * (VP // 8) + o // 16 % (VP // 8)
    return word * 4 + number * BITS // 8, number * BITS % 8 // 4


@jit
def _paired(w):
    """Weights (N, M) of tokens in the order that _values gives them."""
    N: tl.constexpr = w.shape[0]
    return tl.reshape(
        tl.permute(tl.reshape(w, [N // 16, 2, 2, 4, w.shape[1]]), [0, 3, 1, 2, 4]), w.shape
    )


def _level_asm(n_bytes: int) -> str:
    """PTX that turns one word of codes (bytes) of each of two tokens into floats: codes are
    subnormals, as in _unpack_asm, and one multiply-add of two bfloat16 takes the centre off and
    multiplies by the level's step. Steps have few bits, so it rounds once."""
    text = "{\n.reg .b32 p, x;\n"
    for half, order in enumerate(("0x5410", "0x7632")[: n_bytes // 2]):
        text += f"prmt.b32 p, ${2 * n_bytes}, ${2 * n_bytes + 1}, {order};\n"
        for i in (4 * half, 4 * half + 2):
            text += (
                f"and.b32 x, p, 0x00FF00FF;\nfma.rn.bf16x2 x, x, ${2 * n_bytes + 2}, "
                f"${2 * n_bytes + 3};\n"
            )
            text += f"mov.b32 {{${i}, ${i + 1}}}, x;\nshr.u32 p, p, 8;\n"
    return text + "}"


def _bits(x: float) -> int:
    """The bits of x in bfloat16."""
    bits = torch.tensor(x, dtype=torch.float64).bfloat16()
    assert bits.double().item() == x, f"{x} is rounded"
    return bits.view(torch.int16).item() & 0xFFFF


level_asm_2, level_asm_4 = (tl.constexpr(_level_asm(n)) if triton else "" for n in (2, 4))
# what a subnormal code is multiplied by, and what is added then, for a value times 2^-13
LEVEL_FMA = [
    tl.constexpr(_bits(x)) if triton else 0
    for i in (1, 2, 3)
    for x in (STEPS[i] * 2.0**120, -centre(i) * STEPS[i] * 2.0**-13)
]
TIMES_1, PLUS_1, TIMES_2, PLUS_2, TIMES_3, PLUS_3 = LEVEL_FMA


@jit
def _quarter(a, b, c, d, i: tl.constexpr):
    """Codes of the i-th quarter of a group's numbers, a byte each, from the units that hold their
    bits."""
    m: tl.constexpr = 0x03030303
    return (a >> 2 * i & m) | (b >> 2 * i & m) << 2 | (c >> 2 * i & m) << 4 | (d >> 2 * i & m) << 6


@jit
def _unit_words(rows, word, offset, S: tl.constexpr, U: tl.constexpr):
    """Of tokens (4, n) with masks `word` and units `offset` before them: their levels (4, S, n),
    and of every group the codes of its four quarters, a byte each, in words of 4 bytes, or of the U
    bytes that a unit has (4, S, n, words)."""
    E: tl.constexpr = U if U < 4 else 4
    if E == 4:
        rows = rows.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif E == 2:
        rows = rows.to(tl.pointer_type(tl.uint16), bitcast=True)
    level, unit = _levels(word[:, None, :], tl.arange(0, S)[None, :, None].to(word.dtype), S)
    at = (
        rows
        + ((offset[:, None, :] + unit) * (U // E))[:, :, :, None]
        + tl.arange(0, U // E)[None, None, None, :]
    )
    n = (level + (level == 3))[:, :, :, None]  # units
    a = tl.load(at, mask=n > 0, other=0).to(tl.uint32)
    b = tl.load(at + U // E, mask=n > 1, other=0).to(tl.uint32)
    c = tl.load(at + 2 * (U // E), mask=n > 2, other=0).to(tl.uint32)
    d = tl.load(at + 3 * (U // E), mask=n > 3, other=0).to(tl.uint32)
    return (
        level,
        _quarter(a, b, c, d, 0),
        _quarter(a, b, c, d, 1),
        _quarter(a, b, c, d, 2),
        _quarter(a, b, c, d, 3),
    )


@jit
def _four(a, b, c, d):
    """(..., 2, 2) of four, in order."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@jit
def _level_numbers(level, x, like, E: tl.constexpr):
    """What codes x (4, S, n, words) stand for, in units of step and gain: (4, S, n, words, E)."""
    x = (x[:, :, :, :, None] >> (8 * tl.arange(0, E)).to(tl.uint32) & 255).to(tl.float32)
    step = tl.where(level > 0, _of_level(level, STEP_1, STEP_2, STEP_3), 0.0)[:, :, :, None, None]
    return ((x - _of_level(level, CENTRE_1, CENTRE_2, CENTRE_3)[:, :, :, None, None]) * step).to(
        like.dtype
    )


@jit
def _level_factors(one, two):
    """What _level_fma takes for two tokens of these levels."""
    step = (
        _of_level(one, TIMES_1, TIMES_2, TIMES_3) | _of_level(two, TIMES_1, TIMES_2, TIMES_3) << 16
    )
    a = _of_level(one, PLUS_1, PLUS_2, PLUS_3)
    b = _of_level(two, PLUS_1, PLUS_2, PLUS_3)
    return step[:, :, :, None], (tl.where(one > 0, a, 0) | tl.where(two > 0, b, 0) << 16)[
        :, :, :, None
    ]


@jit
def _level_fma(x, y, step, base, like, E: tl.constexpr):
    """Codes x, y (4, S, n, 1) of two tokens -> (4, S, n, 1, E, 2), as _level_numbers, a power of 2
    too small."""
    if E == 4:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            level_asm_4,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
            [x, y, step, base],
            dtype=(like.dtype,) * 8,
            is_pure=True,
            pack=1,
        )
        x = tl.join(_four(a, c, e, g), _four(b, d, f, h))
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            level_asm_2,
            "=h,=h,=h,=h,r,r,r,r",
            [x, y, step, base],
            dtype=(like.dtype,) * 4,
            is_pure=True,
            pack=1,
        )
        x = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(x, [4, y.shape[1], y.shape[2], 1, E, 2])


@jit
def _levels_in_words(
    rows, word1, offset1, word2, offset2, like, D: tl.constexpr, S: tl.constexpr, FMA: tl.constexpr
):
    """Values (D, N) of levels in units of their token's step and gain (with FMA 2^-13 of that):
    number i of group g in row i S + g, tokens as _by_fours has them. Masks and offsets (4, N / 8)
    are those of tokens 4 (2 i + {0, 1}) + j in place (j, i)."""
    U: tl.constexpr = D // S // 4  # bytes of a unit
    E: tl.constexpr = U if U < 4 else 4
    n: tl.constexpr = word1.shape[1]
    one, w1, w2, w3, w4 = _unit_words(rows, word1, offset1, S, U)
    two, v1, v2, v3, v4 = _unit_words(rows, word2, offset2, S, U)
    if FMA:
        step, base = _level_factors(one, two)
        a = _level_fma(w1, v1, step, base, like, E)
        b = _level_fma(w2, v2, step, base, like, E)
        c = _level_fma(w3, v3, step, base, like, E)
        d = _level_fma(w4, v4, step, base, like, E)
    else:
        a = tl.join(_level_numbers(one, w1, like, E), _level_numbers(two, v1, like, E))
        b = tl.join(_level_numbers(one, w2, like, E), _level_numbers(two, v2, like, E))
        c = tl.join(_level_numbers(one, w3, like, E), _level_numbers(two, v3, like, E))
        d = tl.join(_level_numbers(one, w4, like, E), _level_numbers(two, v4, like, E))
    x = tl.reshape(_four(a, b, c, d), [4, S, n // 2, 2, U // E, E, 2, 4])
    return tl.reshape(tl.permute(x, [7, 4, 5, 1, 2, 0, 3, 6]), [D, 8 * n])


@jit
def _by_fours(w):
    """Weights (N, M) of tokens in the order that _levels_in_words gives them."""
    N: tl.constexpr = w.shape[0]
    return tl.reshape(tl.permute(tl.reshape(w, [N // 16, 4, 4, w.shape[1]]), [0, 2, 1, 3]), w.shape)


@jit
def _rows_of_pairs(pairs, like, ASM: tl.constexpr):
    """Words (16, N / 8, 4), of whose halves each stands for one of two tokens 4 apart -> (16, N),
    units and tokens as _values."""
    N: tl.constexpr = pairs.shape[1] * 8
    if ASM:
        a, b = tl.inline_asm_elementwise(
            pair_asm, "=h,=h,r", [pairs], dtype=(like.dtype,) * 2, is_pure=True, pack=1
        )
    else:
        a = (pairs & 0xFFFF).to(tl.float32).to(like.dtype)
        b = (pairs >> 16).to(tl.float32).to(like.dtype)
    return tl.reshape(
        tl.permute(tl.reshape(tl.join(a, b), [16, N // 16, 2, 4, 2]), [0, 1, 3, 2, 4]), [16, N]
    )


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
    """tl.load with the masks a and b, each where it is needed: else its test would cost as much as
    the load."""
    if USE_A and USE_B:
        return tl.load(p, mask=a & b, other=0)
    elif USE_A:
        return tl.load(p, mask=a, other=0)
    elif USE_B:
        return tl.load(p, mask=b, other=0)
    else:
        return tl.load(p)


DEAL = tl.constexpr(TRITON >= (3, 7)) if triton else False


@jit
def _nothing(q, i):
    """Zeros, float32 like i. That they come from 8 bits in memory makes Triton, from 3.7 on, deal
    the rows of the product that they go into by fours to a lane (kWidth = 4), the order that _keys
    and _levels_in_words have; else all of them would change lanes. 3.6 needs it not, and with it
    takes 1.25 times as long where some of the groups are kept."""
    return tl.load(q.to(tl.pointer_type(tl.uint8), bitcast=True) + i * 0).to(tl.float32) * 0.0


@jit
def int_attention_kernel(
    q,
    keys,
    rows,
    bits,
    before,
    tile_rows,
    key_scale,
    block_base,
    value_scale,
    n_packed,
    token_base,
    row_base,
    mask_base,
    tile_base,
    tail_k,
    tail_v,
    tail_first,
    tail_n,
    out,
    lse,
    part,
    part_ml,
    scale,
    segments,
    Hkv,
    n_b,
    n_h,
    W,
    chunk,
    parts,
    Hm,
    n,
    T,
    q_b,
    q_h,
    q_t,
    gain,
    SEGS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """kernels._attention_kernel over integers of KEY and VALUE bits (4 or 8; VALUE 0: levels), N
    tokens at a time, in words.

    Tokens and value dimensions are the long side of the products, M query rows the short one. Steps
    go into the queries and into the weights, so codes are multiplied as they come out of a word.
    What is 2^(bits - 1) too much in each is summed by a product of its own, exactly, and taken off.
    Groups that are dropped are words of zeros; what to take off and the middles to add are summed
    by a product with the masks."""
    seg, c = own_piece(n_packed, tail_first, tail_n, segments, Hkv, n_b, n_h, W, chunk, BLOCK, SEGS)
    if SEGS > 0:  # noqa: SIM102 (known when compiling)
        if seg >= segments:
            return
    b = seg // Hkv
    h = seg % Hkv
    R = T * n
    row = tl.program_id(2) * M + tl.arange(0, M)
    KW: tl.constexpr = D * KEY // 32  # words of a token's key, of its value, of a row
    VW: tl.constexpr = D * VALUE // 32
    WB: tl.constexpr = D // S * (VALUE if VALUE > 0 else 2) // 8  # bytes of a row
    RW: tl.constexpr = WB // 4
    FMA: tl.constexpr = ASM and (D // S == 8 or D // S == 16)  # levels: units of 2 or 4 bytes
    token_at = tl.load(token_base + seg)
    keys = (keys + token_at * (D * KEY // 8)).to(tl.pointer_type(tl.uint32), bitcast=True)
    rows += tl.load(row_base + seg) * WB
    if VALUE > 0:
        rows = rows.to(tl.pointer_type(tl.uint32), bitcast=True)
        value_scale = (value_scale + token_at * 2).to(tl.pointer_type(tl.uint32), bitcast=True)
    else:
        value_scale += token_at
    key_scale += tl.load(block_base + seg) * 2 * D
    if K < S:
        mseg = b * Hm + (h if Hm > 1 else 0)
        mask_at = tl.load(mask_base + mseg)
        bits += mask_at
        if K == 0:
            before += mask_at
            tile_rows += tl.load(tile_base + mseg)
    count, slots, first, tail_n, size, active = pieces(
        n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, BLOCK
    )
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if c >= active:
            return
    own = row // n
    j = row % n  # query, head of the group
    in_r = row < R
    at_q = q
    q += b * q_b + (h * n + j)[None, :] * q_h + own[None, :] * q_t

    H2: tl.constexpr = 8 // KEY  # numbers of a byte
    byte, half = _key_order(tl.arange(0, KP * 4 * H2), KP, KEY)
    in_k = byte < KW * 4
    like = tl.load(
        q + (byte + half * (D // 2))[:, None], mask=in_k[:, None] & in_r[None, :], other=0.0
    )
    x = like.to(tl.float32) * scale
    if DEAL:
        x += _nothing(at_q, byte)[:, None]
    up, down = _units(ASM)
    unit = tl.where(half == 0, up, up / 16)
    half_codes = tl.full([16, KP], 0x88888888 if KEY == 4 else 0x80808080, tl.uint32)

    m = tl.full([M], -1e38, tl.float32)
    den = tl.zeros([8, M], tl.float32)
    # columns: weights times steps; and times middles, where they do not go to all groups
    C: tl.constexpr = M if K == S or VALUE == 0 else 2 * M
    DV: tl.constexpr = VP * 32 // VALUE if VALUE > 0 else D
    acc = tl.zeros([DV, C], tl.float32)
    sums = tl.zeros([16, C], tl.float32)
    middles = tl.zeros([8, M], tl.float32)
    lo = c * size
    hi = tl.minimum((c + 1) * size, count)
    at = tl.arange(0, N)
    kw = tl.arange(0, KP)
    vw = tl.arange(0, VP)
    channel = tl.arange(0, KP * 4)
    scales = (
        tl.arange(0, 2)[:, None, None] * D
        + tl.arange(0, H2)[None, :, None] * (D // 2)
        + channel[None, None, :]
    )
    if VALUE == 0:
        pairs = lo + tl.arange(0, 4)[:, None] + tl.arange(0, N // 8)[None, :] * 8
        one_mask, one_offset = where_rows(bits, before, tile_rows, pairs, hi, K, TILE)
        two_mask, two_offset = where_rows(bits, before, tile_rows, pairs + 4, hi, K, TILE)
        own_step = tl.load(value_scale + lo + at, mask=lo + at < hi, other=0.0)
        nothing = _nothing(at_q, at) if DEAL else 0.0
    elif K < S:
        mask, offset = where_rows(bits, before, tile_rows, lo + at, hi, K, TILE)
        pairs = lo + tl.arange(0, N // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
        one_mask = tl.load(bits + pairs, mask=pairs < hi, other=0)
        two_mask = tl.load(bits + pairs + 4, mask=pairs + 4 < hi, other=0)
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        live = t < hi
        words = _load(
            keys + t[:, None] * KW + kw[None, :], live[:, None], (kw < KW)[None, :], K == 0, KP > KW
        )
        steps = _load(
            key_scale + t0 // BLOCK * (2 * D) + scales,
            True,
            (channel < KW * 4)[None, None, :],
            False,
            KP > KW,
        )
        if VALUE == 0:
            value = _levels_in_words(
                rows,
                as_word(one_mask, 2 * S),
                one_offset,
                as_word(two_mask, 2 * S),
                two_offset,
                like,
                D,
                S,
                FMA,
            )
            w = own_step.to(tl.float32) + nothing if DEAL else own_step.to(tl.float32)
            pairs = pairs + N
            # of the next step
            one_mask, one_offset = where_rows(bits, before, tile_rows, pairs, hi, K, TILE)
            two_mask, two_offset = where_rows(bits, before, tile_rows, pairs + 4, hi, K, TILE)
            own_step = tl.load(value_scale + t + N, mask=t + N < hi, other=0.0)
        elif K == S:
            codes = _load(
                rows + t[:, None] * VW + vw[None, :], True, (vw < VW)[None, :], False, VP > VW
            )
        else:
            if K > 0:
                offset = t * K
            one = tl.full([1, 1], 1, tl.uint32)
            g = (vw // RW)[None, :].to(tl.uint32)
            word = as_word(mask, S)[:, None]
            has = (word >> g & one) != 0
            place = (offset[:, None] + popcount(word & ((one << g) - one))) * RW + (vw % RW)[
                None, :
            ]
            V: tl.constexpr = 4 if RW % 4 == 0 else RW & -RW
            if V > 1:
                place = tl.max_contiguous(tl.multiple_of(place, [1, V]), [1, V])
                has = tl.max_constancy(has, [1, V])
            codes = _load(rows + place, has, (vw < VW)[None, :], True, VP > VW)
            # of the next step
            mask, offset = where_rows(bits, before, tile_rows, t + N, hi, K, TILE)
        if VALUE > 0:
            pair = _load(value_scale + t, live, True, K == 0, False)

        # (middle, half, word / (KP / 4), word % (KP / 4), byte / 2, byte % 2)
        steps = tl.reshape(steps, [2, H2, 4, KP // 4, 2, 2])
        steps = (
            tl.permute(steps, [3, 5, 2, 1, 4, 0])
            if KEY == 4
            else tl.permute(steps, [3, 1, 2, 5, 4, 0])
        )
        step, middle = tl.split(tl.reshape(steps, [KP * 4 * H2, 2]))
        y = (x * (step.to(tl.float32) * unit)[:, None]).to(like.dtype)
        base = tl.sum(x * middle.to(tl.float32)[:, None], 0)
        base -= (
            tl.max(product(_keys(half_codes, like, KEY, ASM), y, tl.zeros([16, M], tl.float32)), 0)
            * down
        )
        logits = (
            product(_keys(words, like, KEY, ASM), y, tl.zeros([N, M], tl.float32)) * down
            + base[None, :]
        )
        if K == 0:
            logits = tl.where(live[:, None], logits, -2e38)
        top = tl.maximum(m, tl.max(logits, 0))
        p = tl.exp2(logits - top[None, :])
        alpha = tl.exp2(m - top)
        den = den * alpha[None, :] + tl.sum(tl.reshape(p, [N // 8, 8, M]), 0)
        m = top

        if VALUE == 0:
            acc = product(value, _by_fours((p * w[:, None]).to(like.dtype)), acc * alpha[None, :])
        else:
            step = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            middle = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            w = p * (step * up)[:, None]
            if K == S:
                tile = tl.full([16, N // 8, 4], 0x00010001, tl.uint32)
                middles = middles * alpha[None, :] + tl.sum(
                    tl.reshape(p * middle[:, None], [N // 8, 8, M]), 0
                )
            else:
                tile = (one_mask.to(tl.uint32) & 0xFFFF | two_mask.to(tl.uint32) << 16)[None, :, :]
                tile = tile >> tl.arange(0, 16).to(tl.uint32)[:, None, None] & 0x00010001
                w = tl.reshape(tl.join(w, p * (middle * up)[:, None]), [N, C])
                alpha = tl.reshape(tl.join(alpha, alpha), [C])
                pairs += N
                one_mask = tl.load(bits + pairs, mask=pairs < hi, other=0)
                two_mask = tl.load(bits + pairs + 4, mask=pairs + 4 < hi, other=0)
            w = _paired(w.to(like.dtype))
            sums = product(_rows_of_pairs(tile, like, ASM), w, sums * alpha[None, :])
            acc = product(_values(codes, like, VALUE, ASM), w, acc * alpha[None, :])

    den = tl.sum(den, 0)
    if VALUE == 0:
        dims = tl.arange(0, D) % S * (D // S) + tl.arange(0, D) // S
        in_v = dims < D
        acc *= (tl.load(gain + h * D + dims) * (8192.0 if FMA else 1.0))[:, None]
    else:
        byte, half = _value_order(tl.arange(0, DV), VP, VALUE)
        g = byte // WB
        in_v = byte < VW * 4
        dims = g * (D // S) + half * WB + byte % WB
        HALF: tl.constexpr = 1 << (VALUE - 1)
        if K == S:
            add = (tl.sum(middles, 0) - tl.max(sums, 0) * (HALF * down))[None, :]
        else:
            acc, _ = tl.split(tl.reshape(acc, [DV, M, 2]))
            w, add = tl.split(tl.reshape(sums, [16, M, 2]))
            add = _each_group((add - w * HALF) * down, g, S)
        acc = acc * tl.where(half == 0, down, down / 16)[:, None] + add

    lo = tl.maximum(c * size - count, 0)
    hi = tl.minimum((c + 1) * size - count, slots)
    tail_k += seg.to(tl.int64) * W * D
    tail_v += seg.to(tl.int64) * W * D
    whole = tl.arange(0, DP)
    at = tl.arange(0, 16)
    like = tl.load(q + whole[:, None], mask=(whole < D)[:, None] & in_r[None, :], other=0.0)
    for t0 in tl.range(lo, hi, 16, num_stages=1):
        t = t0 + at
        order = (t - first + W) % W
        live = (t < hi) & (order < tail_n)
        key = tl.load(
            tail_k + t[:, None] * D + whole[None, :],
            mask=live[:, None] & (whole < D)[None, :],
            other=0.0,
        )
        seen = live[:, None] & (order[:, None] <= tail_n - T + own[None, :])
        logits = tl.where(
            seen, product(key, like, tl.zeros([16, M], tl.float32)) * scale, float("-inf")
        )
        top = tl.maximum(m, tl.max(logits, 0))
        p = tl.exp2(logits - top[None, :])
        alpha = tl.exp2(m - top)
        m = top
        den = den * alpha + tl.sum(p, 0)
        value = tl.load(
            tail_v + t[:, None] * D + dims[None, :], mask=live[:, None] & in_v[None, :], other=0.0
        )
        acc = product(tl.trans(value), p.to(like.dtype), acc * alpha[None, :])

    m = tl.where(den > 0, m, float("-inf"))
    if SPLIT:
        at_row = (tl.program_id(0) if SEGS > 0 else seg * parts + c).to(tl.int64) * R + row
        tl.store(part_ml + at_row * 2, m, mask=in_r)
        tl.store(part_ml + at_row * 2 + 1, den, mask=in_r)
        to = part + at_row[None, :] * D
    else:
        at_row = (seg.to(tl.int64) * n + j) * T + own
        total = tl.where(den > 0, den, 1.0)
        tl.store(lse + at_row, (m + tl.log2(total)) * 0.6931471805599453, mask=in_r)
        acc = acc / total[None, :]
        to = out + at_row[None, :] * D
    tl.store(to + dims[:, None], acc.to(to.dtype.element_ty), mask=in_v[:, None] & in_r[None, :])
