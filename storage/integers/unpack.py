"""How codes in words become the factors of products, on the device: what words.py needs of it, but
for levels (level_words.py).

The bits of a code, alone in a bfloat16 whose other bits are zeros, are that multiple of the
smallest subnormal. PTX takes them out, two tokens or two numbers to a register, and an argument ASM
says so; where there is none (float32, Triton's interpreter) the same is written plainly. Codes come
in an order of their own, which key_order, value_order and paired tell.

A byte holds 8 / b codes of b bits, its *fields*. Of 3 bits there are two planes, the lower two bits
of all codes and then the third bits, and field f of a byte has its third bit at bit 2 f of a byte
of the second plane, or one higher. So words of both planes, the second shifted by that one, become
codes by a mask, too: see _words_of_fields.

storage/integers/format.py is the specification.
"""

from __future__ import annotations

from storage.kernel_base import jit, tl, triton


def fields_of_byte(bits: int) -> int:
    """Return how many codes begin in a byte; of 3 bits, in one of the lower bits."""
    return 4 if bits == 3 else 8 // bits


def _words_of_fields(bits: int, word: str, thirds: str) -> tuple[str, tuple[str, ...]]:
    """Write PTX that copies a word of codes, and name the registers that hold fields 0, 1, ... of
    its bytes in turn.

    Of 3 bits fields overlap where they are joined, so two registers hold every second one: the
    lower bits of `word`, bits 2 and 3 of every half byte from `thirds`. lop3 0xE4 takes the first
    where the third is 1, else the second."""
    if bits != 3:
        return f"mov.b32 x, {word};\n", ("x",)
    text = f"shl.b32 y, {thirds}, 2;\nlop3.b32 x, {word}, y, 0x33333333, 0xE4;\n"
    text += f"shr.u32 y, {word}, 2;\nlop3.b32 z, y, {thirds}, 0x33333333, 0xE4;\n"
    return text, ("x", "z")


def _unpack_asm(bits: int, pairs: bool) -> str:
    """Write PTX that turns words of codes into bfloat16, two to a register, by a mask.

    Codes that begin at bit i of a byte come out 2^i times too large. Of one word, numbers lie as
    key_codes says. Of two words, of two tokens (`pairs`), the same number of both shares a
    register; of 2 and 3 bits these are half words. Inputs: the words, of 3 bits those of the third
    bits behind them."""
    mask = (1 << bits) - 1
    n_fields = fields_of_byte(bits)
    n = (2 if pairs and bits < 4 else 4) * n_fields
    text = "{\n.reg .b32 p, q, t, x, y, z;\n"
    words = (f"${n}",)
    thirds = f"${n + 1}"
    if pairs:
        first = 2 * n
        text += f"prmt.b32 p, ${first}, ${first + 1}, 0x5410;\n"
        words = ("p",)
        thirds = "t"
        if bits == 3:
            text += f"prmt.b32 t, ${first + 2}, ${first + 3}, 0x5410;\n"
        if bits >= 4:
            text += f"prmt.b32 q, ${first}, ${first + 1}, 0x7632;\n"
            words = ("p", "q")
    out = 0
    for word in words:
        copy, registers = _words_of_fields(bits, word, thirds)
        text += copy
        apart = 8 * len(registers) // n_fields  # bits from one field of a register to the next
        for byte in (0, 1):
            for field in range(n_fields):
                register = registers[field % len(registers)]
                shift = field // len(registers) * apart
                to = f"{{${out}, ${out + n}}}" if pairs else f"{{${2 * out}, ${2 * out + 1}}}"
                both = (mask << shift) * 0x00010001
                text += f"and.b32 y, {register}, 0x{both:08X};\nmov.b32 {to}, y;\n"
                out += 1
            if byte == 0:
                text += "".join(f"shr.u32 {register}, {register}, 8;\n" for register in registers)
    return text + "}"


def ptx(text: str):
    """Make PTX known to kernels."""
    return tl.constexpr(text) if triton else ""


KEY_ASM_2, KEY_ASM_3, KEY_ASM_4, KEY_ASM_8 = (ptx(_unpack_asm(b, False)) for b in (2, 3, 4, 8))
VALUE_ASM_2, VALUE_ASM_3, VALUE_ASM_4, VALUE_ASM_8 = (
    ptx(_unpack_asm(b, True)) for b in (2, 3, 4, 8)
)
PAIR_ASM = ptx("mov.b32 {$0, $1}, $2;")


@jit
def subnormal_scale(ASM: tl.constexpr):
    """Return the power of 2 that factors of codes are multiplied by, so that their products with
    subnormals are none, and what undoes it all."""
    if ASM:
        return 1.2379400392853803e27, 8796093022208.0  # 2^90; a code of 1 is 2^-133
    else:
        return 1.0, 1.0


@jit
def four(a, b, c, d):
    """Join four to (..., 2, 2), in order."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@jit
def eight(a, b, c, d, e, f, g, h):
    """Join eight to (..., 2, 2, 2), in order."""
    return tl.join(four(a, c, e, g), four(b, d, f, h))


@jit
def sixteen(a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2):
    """Join sixteen to (..., 2, 2, 2, 2), in order."""
    return tl.join(eight(a, c, e, g, a2, c2, e2, g2), eight(b, d, f, h, b2, d2, f2, h2))


@jit
def field_factor(field, BITS: tl.constexpr):
    """Return how much too large the codes of a field of a byte come out, float32."""
    if BITS == 2:
        return tl.where(field % 2 == 0, 1.0, 4.0) * tl.where(field < 2, 1.0, 16.0)
    elif BITS == 3:
        return tl.where(field < 2, 1.0, 16.0)
    else:
        return tl.where(field == 0, 1.0, 16.0)


@jit
def _codes_at(words, thirds, shift, BITS: tl.constexpr):
    """Return the codes that begin at bit `shift` of words (broadcast), float32."""
    shift = shift.to(tl.uint32)
    if BITS == 3:
        return (words >> shift & 3 | (thirds >> shift & 1) << 2).to(tl.float32)
    else:
        return (words >> shift & ((1 << BITS) - 1)).to(tl.float32)


@jit
def key_codes(words, thirds, like, BITS: tl.constexpr, ASM: tl.constexpr):
    """Turn words (N, W) of keys into codes (N, places), in units of the smallest subnormal and
    times field_factor. thirds (N, W): of 3 bits, the third bits of those words, else anything.

    They come in key_order: there the product finds what lies in the registers of words that are
    loaded 4 at a time."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    F: tl.constexpr = 4 if BITS < 4 else 8 // BITS
    if not ASM:
        i = tl.arange(0, 4 * F)[None, None, :]
        field = i // 2 % F
        shift = i // (2 * F) * 8 + field * (8 // F) + i % 2 * 16
        x = _codes_at(words[:, :, None], thirds[:, :, None], shift, BITS)
        x = (x * field_factor(field, BITS)).to(like.dtype)
    elif BITS == 2:
        a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2 = tl.inline_asm_elementwise(
            KEY_ASM_2,
            "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(like.dtype,) * 16,
            is_pure=True,
            pack=1,
        )
        x = sixteen(a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2)
    elif BITS == 3:
        a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2 = tl.inline_asm_elementwise(
            KEY_ASM_3,
            "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [words, thirds],
            dtype=(like.dtype,) * 16,
            is_pure=True,
            pack=1,
        )
        x = sixteen(a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2)
    elif BITS == 4:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            KEY_ASM_4,
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(like.dtype,) * 8,
            is_pure=True,
            pack=1,
        )
        x = eight(a, b, c, d, e, f, g, h)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            KEY_ASM_8,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(like.dtype,) * 4,
            is_pure=True,
            pack=1,
        )
        x = four(a, b, c, d)
    x = tl.reshape(x, [N, 4, W // 4, F, 4])  # the last three: byte % 2, field, byte / 2
    return tl.reshape(tl.permute(x, [0, 2, 3, 1, 4]), [N, W * 4 * F])


@jit
def key_order(i, KP: tl.constexpr, BITS: tl.constexpr):
    """Return (byte, field) of place i of a key of KP words, as key_codes has it."""
    F: tl.constexpr = 4 if BITS < 4 else 8 // BITS
    word = i // 4 % 4 * (KP // 4) + i // (16 * F)
    number = i // 16 % F * 4 + i % 4  # of a code in its word
    return 4 * word + number // (2 * F) + number % 2 * 2, number // 2 % F


@jit
def value_codes(words, thirds, like, BITS: tl.constexpr, ASM: tl.constexpr):
    """Turn words (N, W) of values, of 2 and 3 bits half words, into codes (places, N), as
    key_codes; in value_order, and tokens in the order of paired."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    E: tl.constexpr = 4 if BITS == 8 else 8  # codes of a word
    one, two = _four_apart(words)
    if not ASM:
        F: tl.constexpr = 4 if BITS < 4 else 8 // BITS
        i = tl.reshape(tl.arange(0, E), [1, 1, 1, 1, 1, E, 1])
        both = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, 1, 2])
        one, two = _four_apart(thirds)
        both_thirds = tl.reshape(tl.join(one, two), [N // 16, 2, 4, 8, W // 8, 1, 2])
        x = _codes_at(both, both_thirds, i * (8 // F), BITS)
        x = (x * field_factor(i % F, BITS)).to(like.dtype)
    elif BITS == 8:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            VALUE_ASM_8,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [one, two],
            dtype=(like.dtype,) * 8,
            is_pure=True,
            pack=1,
        )
        x = tl.join(four(a, b, c, d), four(e, f, g, h))
    else:
        if BITS == 3:
            one_third, two_third = _four_apart(thirds)
            a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2 = tl.inline_asm_elementwise(
                VALUE_ASM_3,
                "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
                [one, two, one_third, two_third],
                dtype=(like.dtype,) * 16,
                is_pure=True,
                pack=1,
            )
        else:
            a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2 = tl.inline_asm_elementwise(
                VALUE_ASM_2 if BITS == 2 else VALUE_ASM_4,
                "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r",
                [one, two],
                dtype=(like.dtype,) * 16,
                is_pure=True,
                pack=1,
            )
        x = tl.join(eight(a, b, c, d, e, f, g, h), eight(a2, b2, c2, d2, e2, f2, g2, h2))
    x = tl.reshape(x, [N // 16, 2, 4, 8, W // 8, E // 2, 2, 2])
    return tl.reshape(tl.permute(x, [5, 4, 6, 3, 0, 2, 1, 7]), [W * E, N])


@jit
def _four_apart(words):
    """Split words (N, W) into those of tokens that are 4 apart: (N / 8, 4, 8, W / 8) each."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    return tl.split(tl.permute(tl.reshape(words, [N // 8, 2, 4, 8, W // 8]), [0, 2, 3, 4, 1]))


@jit
def value_order(i, VP: tl.constexpr, BITS: tl.constexpr):
    """Return (byte, field) of place i of a value of VP words, as value_codes has it."""
    F: tl.constexpr = 4 if BITS < 4 else 8 // BITS
    number = i // 8 % 2 + i // (2 * VP) * 2  # of a code in its word
    word = i % 8 * (VP // 8) + i // 16 % (VP // 8)
    return word * (2 if BITS < 4 else 4) + number // F, number % F


@jit
def paired(w):
    """Bring weights (N, M) of tokens into the order that value_codes gives them."""
    N: tl.constexpr = w.shape[0]
    fours = tl.reshape(w, [N // 16, 2, 2, 4, w.shape[1]])
    return tl.reshape(tl.permute(fours, [0, 3, 1, 2, 4]), w.shape)


@jit
def rows_of_pairs(pairs, like, ASM: tl.constexpr):
    """Turn words (16, N / 8, 4), of whose halves each stands for one of two tokens 4 apart, into
    numbers (16, N), in units and with tokens as value_codes."""
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
def each_group(x, group, S: tl.constexpr):
    """Gather rows `group` (n,) of x (16, M)."""
    out = tl.zeros([group.shape[0], x.shape[1]], tl.float32)
    for i in tl.static_range(S):
        row = tl.sum(tl.where(tl.arange(0, 16)[:, None] == i, x, 0.0), 0)
        out += tl.where(group[:, None] == i, row[None, :], 0.0)
    return out
