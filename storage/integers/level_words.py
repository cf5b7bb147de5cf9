"""How bit planes of levels become numbers, on the device: what words.py and attention.py need of
it. Four planes in words become codes, a byte each, and one multiply-add of two numbers gives what
they stand for, where there is PTX (ASM, see unpack.py) and planes fill its registers (FMA, see
words.py). Tokens come in the order of by_fours.

storage/integers/format.py is the specification.
"""

from __future__ import annotations

import torch

from storage.integers.format import LEVEL_STEPS, zero_code
from storage.integers.unpack import eight, four, ptx
from storage.kernel_base import as_word, jit, popcount, tl, triton

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
        # bytes 0 and 2, then 1 and 3, each below a byte of zeros
        for i, code_bytes in ((4 * half, "0x4240"), (4 * half + 2, "0x4341")):
            text += f"prmt.b32 x, p, 0, {code_bytes};\n"
            text += f"fma.rn.bf16x2 x, x, {times}, {plus};\n"
            text += f"mov.b32 {{${i}, ${i + 1}}}, x;\n"
    return text + "}"


def _bits(x: float) -> int:
    """Return the bits of x in bfloat16."""
    bits = torch.tensor(x, dtype=torch.float64).bfloat16()
    assert bits.double().item() == x, f"{x} is rounded"
    return bits.view(torch.int16).item() & 0xFFFF


LEVEL_ASM_2 = ptx(_level_asm(2))
LEVEL_ASM_4 = ptx(_level_asm(4))
# What a subnormal code is multiplied by, and what is added then, for a value times 2^-13: by level,
# two to a word.
LEVEL_FMA = [
    (_bits(LEVEL_STEPS[i] * 2.0**120), _bits(-zero_code(i) * LEVEL_STEPS[i] * 2.0**-13 if i else 0))
    for i in range(4)
]


def _factor_asm() -> str:
    """Write PTX that looks up the factors of two tokens, whose levels choose bytes of a table."""
    text = "{\n.reg .b32 p, q, bytes;\n"
    text += "mad.lo.s32 bytes, $3, 0x2200, 0x1010;\nmad.lo.s32 bytes, $2, 0x22, bytes;\n"
    for out in (0, 1):
        low, high = (LEVEL_FMA[i][out] | LEVEL_FMA[i + 1][out] << 16 for i in (0, 2))
        text += f"mov.b32 p, {low};\nmov.b32 q, {high};\nprmt.b32 ${out}, p, q, bytes;\n"
    return text + "}"


FACTOR_ASM = ptx(_factor_asm())


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


SWAP_ASM_2 = ptx(_swap_asm(2, 0x33333333))
SWAP_ASM_4 = ptx(_swap_asm(4, 0x0F0F0F0F))


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
def level_masks(
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
    """Load the masks of tokens t0 + 4 (2 i + {0, 1}) + j in place (i, j), 0 from `end` on, and the
    bit planes before each: load_masks, twice, with addresses that differ by constants."""
    lane = tl.arange(0, 4)[None, :]
    by_eight = tl.arange(0, N // 8)[:, None] * 8
    left = end - t0
    bits_ptr = bits_ptr + t0 + lane
    before_ptr = before_ptr + t0 + lane
    tile_rows_ptr += t0 // TILE
    one = tl.load(bits_ptr + by_eight, mask=by_eight < left - lane, other=0)
    two = tl.load(bits_ptr + (by_eight + 4), mask=by_eight < left - 4 - lane, other=0)
    one_before = tl.load(before_ptr + by_eight, mask=by_eight < left - lane, other=0)
    two_before = tl.load(before_ptr + (by_eight + 4), mask=by_eight < left - 4 - lane, other=0)
    one_tile = tl.load(tile_rows_ptr + by_eight // TILE, mask=by_eight < left, other=0)
    two_tile = one_tile
    if TILE < 8:
        at_two = (by_eight + 4) // TILE
        two_tile = tl.load(tile_rows_ptr + at_two, mask=by_eight < left - 4, other=0)
    return (
        _as_is(as_word(one, 2 * S), ASM),
        one_tile + one_before.to(tl.int32),
        _as_is(as_word(two, 2 * S), ASM),
        two_tile + two_before.to(tl.int32),
    )


def _load_asm(n_bytes: int) -> str:
    """Write PTX that loads n_bytes from $1 where $2 is above $3, else zeros, into a word. (tl.load
    of 1 or 2 bytes takes half a register, which is then cleared and widened, each time.)"""
    there = "{\n.reg .pred p;\nsetp.gt.s32 p, $2, $3;\nmov.b32 $0, 0;\n"
    return there + f"@p ld.global.u{8 * n_bytes} $0, [$1];\n}}"


LOAD_ASM_1, LOAD_ASM_2, LOAD_ASM_4 = (ptx(_load_asm(n)) for n in (1, 2, 4))
HALVES_ASM = ptx("{\nmad.lo.u32 $0, $2, 65536, $1;\n}")


@jit
def _load_word(at, level, above, E: tl.constexpr, ASM: tl.constexpr):
    """Load words of E bytes where the level is above `above`, else zeros: uint32. With ASM lanes
    load what they hold the address of; tl.load would deal addresses out anew."""
    if ASM:
        return tl.inline_asm_elementwise(
            LOAD_ASM_1 if E == 1 else LOAD_ASM_2 if E == 2 else LOAD_ASM_4,
            "=r,l,r,r",
            [at.to(tl.int64), level, above],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.load(at, mask=level > above, other=0).to(tl.uint32)


@jit
def _join_halves(low, high):
    """Join half words by a multiplication: a GPU has other units for it than for masks and shifts,
    which have most to do here."""
    return tl.inline_asm_elementwise(
        HALVES_ASM, "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1
    )


@jit
def _plane_words(rows_ptr, word, offset, S: tl.constexpr, U: tl.constexpr, ASM: tl.constexpr):
    """Load tokens (n, 4) with masks `word` and `offset` bit planes before them.

    Returns levels (n, S, 4), and the four planes, in words of 4 bytes, or of the U bytes that a
    plane has: (n, words, S, 4) four times, zeros where the level has none."""
    E: tl.constexpr = U if U < 4 else 4
    if E == 4:
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif E == 2:
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    W: tl.constexpr = U // E
    group = tl.arange(0, S)[None, :, None].to(word.dtype)
    level, before = group_levels(word[:, None, :], group, S)
    first = ((offset[:, None, :] + before) * W)[:, None, :, :]
    at = rows_ptr + first + tl.arange(0, W)[None, :, None, None]
    of_words = tl.broadcast_to(level[:, None, :, :], at.shape)
    a = _load_word(at, of_words, 0, E, ASM)
    b = _load_word(at + W, of_words, 1, E, ASM)
    c = _load_word(at + 2 * W, of_words, 2, E, ASM)
    d = _load_word(at + 3 * W, of_words, 2, E, ASM)
    return level, a, b, c, d


@jit
def _codes_of_planes(a, b, c, d, FMA: tl.constexpr):
    """Turn words of four bit planes into codes, a byte each: those of each quarter of a group's
    numbers. It transposes the 4 x 4 fields of 2 bits that the bytes of a place have."""
    a, b = _swap(a, b, 2, FMA)
    c, d = _swap(c, d, 2, FMA)
    first, third = _swap(a, c, 4, FMA)
    second, fourth = _swap(b, d, 4, FMA)
    return first, second, third, fourth


@jit
def _level_numbers(level, x, like, E: tl.constexpr):
    """Turn codes x (n, words, S, 4) into numbers in units of step and gain: (n, words, S, 4, E)."""
    x = (x[:, :, :, :, None] >> (8 * tl.arange(0, E)).to(tl.uint32) & 255).to(tl.float32)
    step = tl.where(level > 0, of_level(level, STEP_1, STEP_2, STEP_3), 0.0)
    zero = of_level(level, ZERO_1, ZERO_2, ZERO_3)
    return ((x - zero[:, None, :, :, None]) * step[:, None, :, :, None]).to(like.dtype)


@jit
def _level_factors(one, two):
    """Return what _level_fma takes for two tokens of these levels."""
    times, plus = tl.inline_asm_elementwise(
        FACTOR_ASM, "=r,=r,r,r", [one, two], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )
    return times[:, None, :, :], plus[:, None, :, :]


@jit
def _level_fma(x, y, times, plus, like, E: tl.constexpr):
    """Turn codes x, y (n, 1, S, 4) of two tokens into numbers (n, 1, S, 4, E, 2), as
    _level_numbers, a power of 2 too small. Where E is 2 both tokens are in x, and y is not read."""
    if E == 4:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            LEVEL_ASM_4,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
            [x, y, times, plus],
            dtype=(like.dtype,) * 8,
            is_pure=True,
            pack=1,
        )
        x = eight(a, b, c, d, e, f, g, h)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            LEVEL_ASM_2,
            "=h,=h,=h,=h,r,r,r,r",
            [x, y, times, plus],
            dtype=(like.dtype,) * 4,
            is_pure=True,
            pack=1,
        )
        x = four(a, b, c, d)
    return tl.reshape(x, [y.shape[0], 1, y.shape[2], 4, E, 2])


@jit
def level_values(
    rows_ptr,
    one_word,
    one_offset,
    two_word,
    two_offset,
    like,
    D: tl.constexpr,
    S: tl.constexpr,
    FMA: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return values (D, N) in units of their token's step and gain (with FMA 2^-13 of that): number
    i of group g in row i S + g, tokens as by_fours has them.

    Masks and offsets (N / 8, 4) are those of tokens 4 (2 i + {0, 1}) + j in place (i, j)."""
    U: tl.constexpr = D // S // 4  # bytes of a bit plane
    E: tl.constexpr = U if U < 4 else 4
    n: tl.constexpr = one_word.shape[0]
    one, w1, w2, w3, w4 = _plane_words(rows_ptr, one_word, one_offset, S, U, ASM)
    two, v1, v2, v3, v4 = _plane_words(rows_ptr, two_word, two_offset, S, U, ASM)
    if FMA and E == 2:
        w1 = _join_halves(w1, v1)
        w2 = _join_halves(w2, v2)
        w3 = _join_halves(w3, v3)
        w4 = _join_halves(w4, v4)
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
    x = tl.reshape(four(a, b, c, d), [n // 2, 2, U // E, S, 4, E, 2, 4])
    return tl.reshape(tl.permute(x, [7, 2, 5, 3, 0, 4, 1, 6]), [D, 8 * n])


@jit
def by_fours(w):
    """Bring weights (N, M) of tokens into the order that level_values gives them."""
    N: tl.constexpr = w.shape[0]
    fours = tl.reshape(w, [N // 16, 4, 4, w.shape[1]])
    return tl.reshape(tl.permute(fours, [0, 2, 1, 3]), w.shape)
