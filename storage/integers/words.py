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
brought into that order instead (_key_order, _value_order, _paired, _by_fours).

Tokens and dimensions of values are the long side of the products, M rows of queries the short one.
storage/integers/format.py is the specification.
"""

from __future__ import annotations

import torch

from storage.integers.format import LEVEL_STEPS, zero_code
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

# -------------------- levels, for bytes and words

STEP_1, STEP_2, STEP_3 = (tl.constexpr(s) if triton else s for s in LEVEL_STEPS[1:])
ZERO_1, ZERO_2, ZERO_3 = (tl.constexpr(zero_code(i)) if triton else 0.0 for i in (1, 2, 3))


@jit
def of_level(level, a, b, c):
    """Return a, b or c where the level is 1, 2 or 3."""
    return tl.where(level == 1, a, tl.where(level == 2, b, c))


@jit
def group_levels(word, group, S: tl.constexpr):
    """Return the levels of groups `group` of tokens with 2 S bits `word` (broadcast), int32, and
    the bit planes of the groups before them."""
    one = tl.full([1, 1], 1, word.dtype)
    mine = word >> group
    level = (mine & 1 | mine >> (S - 1) & 2).to(tl.int32)
    below = (one << group) - one
    # A level's planes are its bits, its high one once more, its low one once more if it has both.
    seen = word & (below | below << S)
    twice = seen & (word >> S | ((1 << S) - 1) << S)
    return level, popcount(seen) + popcount(twice)


# -------------------- codes from words


def _unpack_asm(bits: int, pairs: bool) -> str:
    """Write PTX that turns words of codes into bfloat16, two to a register, by a mask.

    Codes that begin at bit 4 come out 16 times too large. Of one word, numbers lie as _key_codes
    says. Of two words, of two tokens (`pairs`), the same number of both shares a register."""
    mask = {4: 0x000F000F, 8: 0x00FF00FF}[bits]
    n = 32 // bits
    text = "{\n.reg .b32 p, q, x, y;\n"
    words = (f"${n}",)
    if pairs:
        text += f"prmt.b32 p, ${2 * n}, ${2 * n + 1}, 0x5410;\n"
        text += f"prmt.b32 q, ${2 * n}, ${2 * n + 1}, 0x7632;\n"
        words = ("p", "q")
    out = 0
    for word in words:
        for move in (f"mov.b32 x, {word};\n", "shr.u32 x, x, 8;\n"):
            text += move
            for shift in range(0, 8, bits):
                to = f"{{${out}, ${out + n}}}" if pairs else f"{{${2 * out}, ${2 * out + 1}}}"
                text += f"and.b32 y, x, 0x{mask << shift:08X};\nmov.b32 {to}, y;\n"
                out += 1
    return text + "}"


def _asm(text: str):
    """Make PTX known to kernels."""
    return tl.constexpr(text) if triton else ""


KEY_ASM_4 = _asm(_unpack_asm(4, pairs=False))
KEY_ASM_8 = _asm(_unpack_asm(8, pairs=False))
VALUE_ASM_4 = _asm(_unpack_asm(4, pairs=True))
VALUE_ASM_8 = _asm(_unpack_asm(8, pairs=True))
PAIR_ASM = _asm("mov.b32 {$0, $1}, $2;")


@jit
def _subnormal_scale(ASM: tl.constexpr):
    """Return the power of 2 that factors of codes are multiplied by, so that their products with
    subnormals are none, and what undoes it all."""
    if ASM:
        return 1.2379400392853803e27, 8796093022208.0  # 2^90; a code of 1 is 2^-133
    else:
        return 1.0, 1.0


@jit
def _four(a, b, c, d):
    """Join four to (..., 2, 2), in order."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@jit
def _eight(a, b, c, d, e, f, g, h):
    """Join eight to (..., 2, 2, 2), in order."""
    return tl.join(_four(a, c, e, g), _four(b, d, f, h))


@jit
def _key_codes(words, like, BITS: tl.constexpr, ASM: tl.constexpr):
    """Turn words (N, W) of keys into codes (N, 32 W / BITS), in units of the smallest subnormal;
    those of high half bytes times 16.

    They come in _key_order: there the product finds what lies in the registers of words that are
    loaded 4 at a time."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if BITS == 4:
        if ASM:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                KEY_ASM_4,
                "=h,=h,=h,=h,=h,=h,=h,=h,r",
                [words],
                dtype=(like.dtype,) * 8,
                is_pure=True,
                pack=1,
            )
            x = _eight(a, b, c, d, e, f, g, h)  # (N, W, odd, half, pair)
        else:
            i = tl.arange(0, 8)
            shift = i // 4 * 8 + i // 2 % 2 * 4 + i % 2 * 16
            x = (words[:, :, None] >> shift.to(tl.uint32) & 15).to(tl.float32)
            x = (x * tl.where(i // 2 % 2 == 0, 1.0, 16.0)).to(like.dtype)
        x = tl.permute(tl.reshape(x, [N, 4, W // 4, 2, 2, 2]), [0, 2, 3, 1, 4, 5])
    else:
        if ASM:
            a, b, c, d = tl.inline_asm_elementwise(
                KEY_ASM_8,
                "=h,=h,=h,=h,r",
                [words],
                dtype=(like.dtype,) * 4,
                is_pure=True,
                pack=1,
            )
            x = _four(a, b, c, d)
        else:
            i = tl.arange(0, 4)
            shift = i // 2 * 8 + i % 2 * 16
            x = (words[:, :, None] >> shift.to(tl.uint32) & 255).to(tl.float32).to(like.dtype)
        x = tl.permute(tl.reshape(x, [N, 4, W // 4, 2, 2]), [0, 2, 1, 3, 4])
    return tl.reshape(x, [N, W * (32 // BITS)])


@jit
def _key_order(i, KP: tl.constexpr, BITS: tl.constexpr):
    """Return (byte, half) of place i of a key of KP words, as _key_codes has it."""
    if BITS == 4:
        return 4 * (i // 4 % 4 * (KP // 4) + i // 32) + i // 16 % 2 + i % 2 * 2, i // 2 % 2
    else:
        return 4 * (i // 4 % 4 * (KP // 4) + i // 16) + i // 2 % 2 + i % 2 * 2, i * 0


@jit
def _value_codes(words, like, BITS: tl.constexpr, ASM: tl.constexpr):
    """Turn words (N, W) of values into codes (32 W / BITS, N), as _key_codes; in _value_order, and
    tokens in the order of _paired."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    E: tl.constexpr = 32 // BITS
    # Words of tokens that are 4 apart.
    words = tl.permute(tl.reshape(words, [N // 8, 2, 4, 8, W // 8]), [0, 2, 3, 4, 1])
    one, two = tl.split(words)
    if ASM:
        if BITS == 4:
            a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2 = tl.inline_asm_elementwise(
                VALUE_ASM_4,
                "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r",
                [one, two],
                dtype=(like.dtype,) * 16,
                is_pure=True,
                pack=1,
            )
            one = _eight(a, b, c, d, e, f, g, h)
            two = _eight(a2, b2, c2, d2, e2, f2, g2, h2)
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                VALUE_ASM_8,
                "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
                [one, two],
                dtype=(like.dtype,) * 8,
                is_pure=True,
                pack=1,
            )
            one = _four(a, b, c, d)
            two = _four(e, f, g, h)
        x = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, E, 2])
    else:
        i = tl.arange(0, E)
        x = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, 1, 2])
        i = tl.reshape(i, [1, 1, 1, 1, 1, E, 1])
        x = ((x >> (i * BITS).to(tl.uint32)) & ((1 << BITS) - 1)).to(tl.float32)
        if BITS == 4:
            x *= tl.where(i % 2 == 0, 1.0, 16.0)
        x = x.to(like.dtype)
    x = tl.reshape(x, [N // 16, 2, 4, 8, W // 8, E // 2, 2, 2])
    return tl.reshape(tl.permute(x, [5, 4, 6, 3, 0, 2, 1, 7]), [W * E, N])


@jit
def _value_order(i, VP: tl.constexpr, BITS: tl.constexpr):
    """Return (byte, half) of place i of a value of VP words, as _value_codes has it."""
    number = i // 8 % 2 + i // (2 * VP) * 2
    word = i % 8 * (VP // 8) + i // 16 % (VP // 8)
    return word * 4 + number * BITS // 8, number * BITS % 8 // 4


@jit
def _paired(w):
    """Bring weights (N, M) of tokens into the order that _value_codes gives them."""
    N: tl.constexpr = w.shape[0]
    fours = tl.reshape(w, [N // 16, 2, 2, 4, w.shape[1]])
    return tl.reshape(tl.permute(fours, [0, 3, 1, 2, 4]), w.shape)


@jit
def _rows_of_pairs(pairs, like, ASM: tl.constexpr):
    """Turn words (16, N / 8, 4), of whose halves each stands for one of two tokens 4 apart, into
    numbers (16, N), in units and with tokens as _value_codes."""
    N: tl.constexpr = pairs.shape[1] * 8
    if ASM:
        a, b = tl.inline_asm_elementwise(
            PAIR_ASM, "=h,=h,r", [pairs], dtype=(like.dtype,) * 2, is_pure=True, pack=1
        )
    else:
        a = (pairs & 0xFFFF).to(tl.float32).to(like.dtype)
        b = (pairs >> 16).to(tl.float32).to(like.dtype)
    x = tl.reshape(tl.join(a, b), [16, N // 16, 2, 4, 2])
    return tl.reshape(tl.permute(x, [0, 1, 3, 2, 4]), [16, N])


@jit
def _each_group(x, group, S: tl.constexpr):
    """Gather rows `group` (n,) of x (16, M)."""
    out = tl.zeros([group.shape[0], x.shape[1]], tl.float32)
    for i in tl.static_range(S):
        row = tl.sum(tl.where(tl.arange(0, 16)[:, None] == i, x, 0.0), 0)
        out += tl.where(group[:, None] == i, row[None, :], 0.0)
    return out


# -------------------- levels from words


def _level_asm(n_bytes: int) -> str:
    """Write PTX that turns codes (bytes) of two tokens into numbers: a word of each, or two bytes
    of either that share a word.

    Codes are subnormals, as in _unpack_asm, and one multiply-add of two bfloat16 takes the zero
    code off and multiplies by the level's step. Steps have few bits, so it rounds once."""
    x, y, times, plus = (f"${2 * n_bytes + i}" for i in range(4))
    halves = [f"mov.b32 p, {x};\n"]
    if n_bytes == 4:
        halves = [f"prmt.b32 p, {x}, {y}, {order};\n" for order in ("0x5410", "0x7632")]
    text = "{\n.reg .b32 p, x;\n"
    for half, both in enumerate(halves):
        text += both
        for i in (4 * half, 4 * half + 2):
            text += "and.b32 x, p, 0x00FF00FF;\n"
            text += f"fma.rn.bf16x2 x, x, {times}, {plus};\n"
            text += f"mov.b32 {{${i}, ${i + 1}}}, x;\nshr.u32 p, p, 8;\n"
    return text + "}"


def _bits(x: float) -> int:
    """Return the bits of x in bfloat16."""
    bits = torch.tensor(x, dtype=torch.float64).bfloat16()
    assert bits.double().item() == x, f"{x} is rounded"
    return bits.view(torch.int16).item() & 0xFFFF


LEVEL_ASM_2 = _asm(_level_asm(2))
LEVEL_ASM_4 = _asm(_level_asm(4))
# What a subnormal code is multiplied by, and what is added then, for a value times 2^-13: by level,
# two to a word.
LEVEL_FMA = [
    (_bits(LEVEL_STEPS[i] * 2.0**120), _bits(-zero_code(i) * LEVEL_STEPS[i] * 2.0**-13 if i else 0))
    for i in range(4)
]


def _factor_asm() -> str:
    """Write PTX that looks up the factors of two tokens, whose levels choose bytes of a table."""
    text = "{\n.reg .b32 p, q;\n"
    for out in (0, 1):
        low, high = (LEVEL_FMA[i][out] | LEVEL_FMA[i + 1][out] << 16 for i in (0, 2))
        text += f"mov.b32 p, {low};\nmov.b32 q, {high};\nprmt.b32 ${out}, p, q, $2;\n"
    return text + "}"


FACTOR_ASM = _asm(_factor_asm())


@jit
def _as_is(word, ASM: tl.constexpr):
    """Return word (uint32), of which the compiler then knows nothing: what it knows makes it count
    and shift in 8 and 16 bits, which costs more."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return word


def _swap_asm(bits: int, low: int) -> str:
    """Write PTX for _swap: lop3 0xE4 takes the first where the third is 1, else the second."""
    return (
        "{\n.reg .b32 t;\n"
        f"shl.b32 t, $3, {bits};\nlop3.b32 $0, $2, t, {low}, 0xE4;\n"
        f"shr.u32 t, $2, {bits};\nlop3.b32 $1, t, $3, {low}, 0xE4;\n}}"
    )


SWAP_ASM_2 = _asm(_swap_asm(2, 0x33333333))
SWAP_ASM_4 = _asm(_swap_asm(4, 0x0F0F0F0F))


@jit
def _swap(x, y, BITS: tl.constexpr, ASM: tl.constexpr):
    """Exchange every second field of BITS bits: the upper ones of x (uint32) with the lower ones of
    y."""
    if ASM:
        return tl.inline_asm_elementwise(
            SWAP_ASM_2 if BITS == 2 else SWAP_ASM_4,
            "=r,=r,r,r",
            [x, y],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        low: tl.constexpr = 0x33333333 if BITS == 2 else 0x0F0F0F0F
        return (x & low) | (y & low) << BITS, (x >> BITS & low) | (y >> BITS & low) << BITS


@jit
def _level_masks(
    bits_ptr,
    before_ptr,
    tile_rows_ptr,
    t0,
    end,
    S: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Load the masks of tokens t0 + 4 (2 i + {0, 1}) + j in place (j, i), 0 from `end` on, and the
    bit planes before each: load_masks, twice, with addresses that differ by constants."""
    lane = tl.arange(0, 4)[:, None]
    eight = tl.arange(0, N // 8)[None, :] * 8
    left = end - t0
    bits_ptr = bits_ptr + t0 + lane
    before_ptr = before_ptr + t0 + lane
    tile_rows_ptr += t0 // TILE
    one = tl.load(bits_ptr + eight, mask=eight < left - lane, other=0)
    two = tl.load(bits_ptr + (eight + 4), mask=eight < left - 4 - lane, other=0)
    one_before = tl.load(before_ptr + eight, mask=eight < left - lane, other=0)
    two_before = tl.load(before_ptr + (eight + 4), mask=eight < left - 4 - lane, other=0)
    one_tile = tl.load(tile_rows_ptr + eight // TILE, mask=eight < left, other=0)
    two_tile = one_tile
    if TILE < 8:
        two_tile = tl.load(tile_rows_ptr + (eight + 4) // TILE, mask=eight < left - 4, other=0)
    return (
        _as_is(as_word(one, 2 * S), ASM),
        one_tile + one_before.to(tl.int32),
        _as_is(as_word(two, 2 * S), ASM),
        two_tile + two_before.to(tl.int32),
    )


@jit
def _plane_words(rows_ptr, word, offset, S: tl.constexpr, U: tl.constexpr):
    """Load tokens (4, n) with masks `word` and `offset` bit planes before them.

    Returns levels (4, S, n), and the four planes, in words of 4 bytes, or of the U bytes that a
    plane has: (4, S, n, words) four times, zeros where the level has none."""
    E: tl.constexpr = U if U < 4 else 4
    if E == 4:
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif E == 2:
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    group = tl.arange(0, S)[None, :, None].to(word.dtype)
    level, before = group_levels(word[:, None, :], group, S)
    first = ((offset[:, None, :] + before) * (U // E))[:, :, :, None]
    at = rows_ptr + first + tl.arange(0, U // E)[None, None, None, :]
    high = level[:, :, :, None]
    a = tl.load(at, mask=high > 0, other=0).to(tl.uint32)
    b = tl.load(at + U // E, mask=high > 1, other=0).to(tl.uint32)
    c = tl.load(at + 2 * (U // E), mask=high > 2, other=0).to(tl.uint32)
    d = tl.load(at + 3 * (U // E), mask=high > 2, other=0).to(tl.uint32)
    return level, a, b, c, d


@jit
def _codes_of_planes(a, b, c, d, ASM: tl.constexpr):
    """Turn words of four bit planes into codes, a byte each: those of each quarter of a group's
    numbers. It transposes the 4 x 4 fields of 2 bits that the bytes of a place have."""
    a, b = _swap(a, b, 2, ASM)
    c, d = _swap(c, d, 2, ASM)
    one, three = _swap(a, c, 4, ASM)
    two, four = _swap(b, d, 4, ASM)
    return one, two, three, four


@jit
def _level_numbers(level, x, like, E: tl.constexpr):
    """Turn codes x (4, S, n, words) into numbers in units of step and gain: (4, S, n, words, E)."""
    x = (x[:, :, :, :, None] >> (8 * tl.arange(0, E)).to(tl.uint32) & 255).to(tl.float32)
    step = tl.where(level > 0, of_level(level, STEP_1, STEP_2, STEP_3), 0.0)
    zero = of_level(level, ZERO_1, ZERO_2, ZERO_3)
    return ((x - zero[:, :, :, None, None]) * step[:, :, :, None, None]).to(like.dtype)


@jit
def _level_factors(one, two):
    """Return what _level_fma takes for two tokens of these levels."""
    choice = (one + two * 256) * 0x22 + 0x1010
    times, plus = tl.inline_asm_elementwise(
        FACTOR_ASM, "=r,=r,r", [choice], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )
    return times[:, :, :, None], plus[:, :, :, None]


@jit
def _level_fma(x, y, times, plus, like, E: tl.constexpr):
    """Turn codes x, y (4, S, n, 1) of two tokens into numbers (4, S, n, 1, E, 2), as
    _level_numbers, a power of 2 too small."""
    if E == 4:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            LEVEL_ASM_4,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
            [x, y, times, plus],
            dtype=(like.dtype,) * 8,
            is_pure=True,
            pack=1,
        )
        x = _eight(a, b, c, d, e, f, g, h)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            LEVEL_ASM_2,
            "=h,=h,=h,=h,r,r,r,r",
            [x, y, times, plus],
            dtype=(like.dtype,) * 4,
            is_pure=True,
            pack=1,
        )
        x = _four(a, b, c, d)
    return tl.reshape(x, [4, y.shape[1], y.shape[2], 1, E, 2])


@jit
def _level_values(
    rows_ptr,
    one_word,
    one_offset,
    two_word,
    two_offset,
    like,
    D: tl.constexpr,
    S: tl.constexpr,
    FMA: tl.constexpr,
):
    """Return values (D, N) in units of their token's step and gain (with FMA 2^-13 of that): number
    i of group g in row i S + g, tokens as _by_fours has them.

    Masks and offsets (4, N / 8) are those of tokens 4 (2 i + {0, 1}) + j in place (j, i)."""
    U: tl.constexpr = D // S // 4  # bytes of a bit plane
    E: tl.constexpr = U if U < 4 else 4
    n: tl.constexpr = one_word.shape[1]
    one, w1, w2, w3, w4 = _plane_words(rows_ptr, one_word, one_offset, S, U)
    two, v1, v2, v3, v4 = _plane_words(rows_ptr, two_word, two_offset, S, U)
    if FMA and E == 2:
        w1, w2, w3, w4 = w1 | v1 << 16, w2 | v2 << 16, w3 | v3 << 16, w4 | v4 << 16
    w1, w2, w3, w4 = _codes_of_planes(w1, w2, w3, w4, FMA)
    if FMA and E == 2:
        v1, v2, v3, v4 = w1, w2, w3, w4
    else:
        v1, v2, v3, v4 = _codes_of_planes(v1, v2, v3, v4, FMA)
    if FMA:
        times, plus = _level_factors(one, two)
        a = _level_fma(w1, v1, times, plus, like, E)
        b = _level_fma(w2, v2, times, plus, like, E)
        c = _level_fma(w3, v3, times, plus, like, E)
        d = _level_fma(w4, v4, times, plus, like, E)
    else:
        a = tl.join(_level_numbers(one, w1, like, E), _level_numbers(two, v1, like, E))
        b = tl.join(_level_numbers(one, w2, like, E), _level_numbers(two, v2, like, E))
        c = tl.join(_level_numbers(one, w3, like, E), _level_numbers(two, v3, like, E))
        d = tl.join(_level_numbers(one, w4, like, E), _level_numbers(two, v4, like, E))
    x = tl.reshape(_four(a, b, c, d), [4, S, n // 2, 2, U // E, E, 2, 4])
    return tl.reshape(tl.permute(x, [7, 4, 5, 1, 2, 0, 3, 6]), [D, 8 * n])


@jit
def _by_fours(w):
    """Bring weights (N, M) of tokens into the order that _level_values gives them."""
    N: tl.constexpr = w.shape[0]
    fours = tl.reshape(w, [N // 16, 4, 4, w.shape[1]])
    return tl.reshape(tl.permute(fours, [0, 2, 1, 3]), w.shape)


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
    that they go into by fours to a lane (kWidth = 4), the order that _key_codes and _level_values
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
    """Bring the steps and middles of a block, (2, 8 / KEY, 4 KP) float16, into _key_order: step and
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
    too_much = product(_key_codes(half_codes, like, KEY, ASM), y, tl.zeros([16, M], tl.float32))
    base -= tl.max(too_much, 0) * down
    codes = _key_codes(words, like, KEY, ASM)
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
    byte, half = _key_order(tl.arange(0, KP * 4 * (8 // KEY)), KP, KEY)
    like = tl.load(
        q_ptr + (byte + half * (D // 2))[:, None],
        mask=(byte < KW * 4)[:, None] & in_row[None, :],
        other=0.0,
    )
    x = like.to(tl.float32) * scale
    if DEAL:
        x += _nothing(any_ptr, byte)[:, None]
    up, down = _subnormal_scale(ASM)
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
        one_word, one_offset, two_word, two_offset = _level_masks(
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
            value = _level_values(
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
            one_word, one_offset, two_word, two_offset = _level_masks(
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
            acc = product(value, _by_fours((p * w[:, None]).to(like.dtype)), acc * alpha[None, :])
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
            w = _paired(w.to(like.dtype))
            sums = product(_rows_of_pairs(ones, like, ASM), w, sums * alpha[None, :])
            acc = product(_value_codes(codes, like, VALUE, ASM), w, acc * alpha[None, :])

    # From sums over codes to sums over numbers.
    den = tl.sum(den, 0)
    if VALUE == 0:
        dims = tl.arange(0, D) % S * (D // S) + tl.arange(0, D) // S
        in_dims = dims < D
        acc *= (tl.load(gain_ptr + h * D + dims) * (8192.0 if FMA else 1.0))[:, None]
    else:
        byte, half = _value_order(tl.arange(0, DV), VP, VALUE)
        group = byte // ROW_BYTES
        dims = group * (D // S) + half * ROW_BYTES + byte % ROW_BYTES
        in_dims = byte < VW * 4
        HALF: tl.constexpr = 1 << (VALUE - 1)
        if K == S:
            add = (tl.sum(middles, 0) - tl.max(sums, 0) * (HALF * down))[None, :]
        else:
            acc, _ = tl.split(tl.reshape(acc, [DV, M, 2]))
            by_step, by_middle = tl.split(tl.reshape(sums, [16, M, 2]))
            add = _each_group((by_middle - by_step * HALF) * down, group, S)
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
