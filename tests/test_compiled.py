"""The kernels as compiled for a GPU, on any machine: Triton's interpreter runs what no GPU would
take, and shows no layouts."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from storage.integers import attention, level_words, unpack
from storage.integers.format import LEVEL_BITS, LEVEL_STEPS, pack_bits, zero_code
from storage.kernel_base import TRITON, triton

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")
# name, S, K (0: counted), bits of keys, of values (0: levels), D, type
CASES = [
    ("word: all", 4, 4, 4, 4, 128, "bfloat16"),
    ("word: half", 4, 2, 4, 4, 128, "bfloat16"),
    ("word: counted", 4, 0, 8, 4, 64, "bfloat16"),
    ("word: levels", 8, 0, 4, 0, 128, "bfloat16"),
    ("word: levels, 64", 8, 0, 4, 0, 64, "bfloat16"),
    ("word: levels, float32", 4, 0, 8, 0, 32, "float32"),
    ("word: levels, keys of 3 bits", 8, 0, 3, 0, 64, "bfloat16"),
    ("word: half, 3 bits", 4, 2, 3, 3, 64, "bfloat16"),
    ("word: all, 3 bits", 4, 4, 3, 3, 64, "bfloat16"),
    ("word: counted, 2 bits", 4, 0, 2, 2, 128, "bfloat16"),
    ("byte: levels", 4, 0, 3, 0, 48, "bfloat16"),
    ("byte: half", 4, 2, 4, 3, 32, "bfloat16"),
    ("float: half", 4, 2, 16, 16, 128, "bfloat16"),
    ("float: counted", 16, 0, 16, 16, 128, "bfloat16"),
    ("float: all, float32", 2, 2, 16, 16, 80, "float32"),
]
KERNELS = {
    "float": "_attention_kernel",
    "word": "_word_attention_kernel" if attention.WORDS else "_byte_attention_kernel",
    "byte": "_byte_attention_kernel",
}


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """What compile_kernels.py prints of all kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/compile_kernels.py", json.dumps(CASES)]
    got = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert got.returncode == 0, got.stderr[-3000:]
    return json.loads(got.stdout)


def attentions(compiled: list[dict]) -> list[dict]:
    """The attention kernels, one for each case, in order."""
    made = [f for f in compiled if f["case"] != "others" and f["kernel"] != "_merge_kernel"]
    assert [f["case"] for f in made] == [case[0] for case in CASES]
    return made


def test_every_kernel_compiles_for_a_gpu(compiled):
    """Every way to store, each with its kernel, and everything that appends, packs and rounds."""
    assert all(f["bytes"] > 1000 for f in compiled)
    for f in attentions(compiled):
        assert f["kernel"] == KERNELS[f["case"].split(":")[0]], f
    assert {f["kernel"] for f in compiled} >= {
        "_add_kernel",
        "_append_packed_kernel",
        "_append_window_kernel",
        "_density_kernel",
        "_gate_kernel",
        "_gptq_kernel",
        "_heads_kernel",
        "_key_sums_kernel",
        "_merge_kernel",
        "_pack_kernel",
        "_pack_keys_kernel",
        "_pack_levels_kernel",
        "_quantise_block_kernel",
        "_search_kernel",
        "_search_levels_kernel",
        "_shares_kernel",
        "_sums_kernel",
        "_take_kernel",
        "_take_levels_kernel",
        "_weigh_backward_kernel",
        "_weigh_kernel",
    }


@pytest.mark.skipif(not attention.WORDS, reason="before Triton 3.5 nothing is read in words")
def test_codes_in_words_move_little_between_lanes(compiled):
    """They go from memory to tensor cores in the lanes that loaded them: what is exchanged are
    maxima, sums and weights, where a conversion of the keys alone adds 128 exchanges. Levels become
    numbers by one multiply-add of subnormals."""
    in_words = [f for f in attentions(compiled) if f["kernel"] == "_word_attention_kernel"]
    for f in in_words:
        by_asm = "float32" not in f["case"]
        assert (f["subnormal_fma"] > 0) == ("levels" in f["case"] and by_asm), f
        # before 3.6 the first product wants its rows otherwise
        assert TRITON < (3, 6) or not by_asm or f["between_lanes"] < 180, f


def test_a_thread_rounds_a_key_alone(compiled):
    """All dimensions of a key that is rounded for queries lie in one thread, whatever Triton makes of
    the loads: nothing is exchanged between lanes."""
    rounded, _ = (f for f in compiled if f["kernel"] == "_pack_keys_kernel")
    assert rounded["between_lanes"] == 0, rounded


def bfloat16_of(bits: int) -> float:
    """The number that 16 bits are."""
    signed = bits - 65536 if bits > 32767 else bits
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).double().item()


def bits_of(number: float) -> int:
    """The bits of a number, rounded to bfloat16."""
    rounded = torch.tensor(number, dtype=torch.float64).bfloat16()
    return rounded.view(torch.int16).item() & 0xFFFF


def run_ptx(text: str, *inputs: int, memory: bytes = b"") -> list[int]:
    """What PTX of moves, masks, shifts, look-ups of bytes and of bits, multiply-adds and loads of
    `memory` leaves in its outputs $0, $1, ..., for 32-bit inputs, which come after them."""
    lines = [line for line in text[1:-1].replace("\n", "").split(";") if line]
    names = re.findall(r"\$(\d+)", text)
    first = max(map(int, names)) + 1 - len(inputs)
    held = {f"${first + i}": x for i, x in enumerate(inputs)}

    def value(name: str) -> int:
        return held[name] if name in held else int(name, 0) & 0xFFFFFFFF

    for line in lines:
        name, *operands = line.replace(",", " ").split()
        if name == ".reg":
            continue
        if name.startswith("@"):  # a load where the predicate is 1
            (kind, to, at), there = operands, held[name[1:]]
            size = int(kind.removeprefix("ld.global.u")) // 8
            at = held[at.strip("[]")]
            if there:
                held[to] = int.from_bytes(memory[at : at + size], "little")
            continue
        if operands[0].startswith("{"):  # a pair of half registers
            low, high, x = (operand.strip("{}") for operand in operands)
            held |= {low: value(x) & 0xFFFF, high: value(x) >> 16}
            continue
        to, *rest = operands
        x, *more = map(value, rest)
        if name == "mov.b32":
            held[to] = x
        elif name == "and.b32":
            held[to] = x & more[0]
        elif name == "shl.b32":
            held[to] = x << more[0] & 0xFFFFFFFF
        elif name == "shr.u32":
            held[to] = x >> more[0]
        elif name == "setp.gt.s32":
            held[to] = int(x > more[0])
        elif name == "fma.rn.bf16x2":
            halves = [(word & 0xFFFF, word >> 16) for word in (x, *more)]
            a, b = (
                bits_of(bfloat16_of(f) * bfloat16_of(g) + bfloat16_of(h))
                for f, g, h in zip(*halves, strict=True)
            )
            held[to] = a | b << 16
        elif name in ("mad.lo.s32", "mad.lo.u32"):
            held[to] = x * more[0] + more[1] & 0xFFFFFFFF
        elif name == "prmt.b32":
            both = x | more[0] << 32
            choice = (more[1] >> 4 * i & 7 for i in range(4))
            held[to] = sum((both >> 8 * c & 255) << 8 * i for i, c in enumerate(choice))
        else:
            assert name == "lop3.b32", line
            held[to] = 0
            for i in range(32):  # three bits are a place in the table
                a, b, c = (word >> i & 1 for word in (x, *more[:2]))
                held[to] |= (more[2] >> 4 * a + 2 * b + c & 1) << i
    return [held[f"${i}"] for i in range(first)]


def word_of(packed: torch.Tensor) -> int:
    """Bytes as they lie in memory, as one word."""
    return sum(byte << 8 * i for i, byte in enumerate(packed.tolist()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_of_keys_become_codes(bits):
    """The PTX, read line by line, for every word of a key of 64 numbers: output by output the code
    of the channel that key_order names, times field_factor's power of 2."""
    n_fields = 4 if bits == 3 else 8 // bits
    codes = torch.randint(0, 1 << bits, (64,), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes.to(torch.uint8), bits)
    n_bytes = 64 // n_fields  # of the first plane
    for word in range(n_bytes // 4):
        inputs = [word_of(packed[4 * word :][:4])]
        if bits == 3:
            later, third = divmod(word, n_bytes // 8)
            inputs.append(word_of(packed[n_bytes + 4 * third :][:4]) >> later)
        got = run_ptx(getattr(unpack, f"KEY_ASM_{bits}").value, *inputs)
        assert len(got) == 4 * n_fields
        for i, code in enumerate(got):
            byte = 4 * word + i // (2 * n_fields) + i % 2 * 2
            field = i // 2 % n_fields
            want = codes[byte + field * n_bytes].item()
            assert code == want << factor_bits(field, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_of_two_values_become_codes(bits):
    """The same for rows of 32 numbers of two tokens, of 2 and 3 bits half a word at a time: first
    all codes of the one, then those of the other."""
    n_fields = 4 if bits == 3 else 8 // bits
    size = 2 if bits < 4 else 4  # bytes of a word
    shape = (2, 32)
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes.to(torch.uint8), bits)
    n_bytes = 32 // n_fields
    for word in range(n_bytes // size):
        inputs = [word_of(row[size * word :][:size]) for row in packed]
        if bits == 3:
            later, third = divmod(word, n_bytes // 4)
            inputs += [word_of(row[n_bytes + 2 * third :][:2]) >> later for row in packed]
        got = run_ptx(getattr(unpack, f"VALUE_ASM_{bits}").value, *inputs)
        assert len(got) == 2 * size * n_fields
        for i, code in enumerate(got):
            token, number = divmod(i, size * n_fields)
            byte, field = divmod(number, n_fields)
            want = codes[token, size * word + byte + field * n_bytes].item()
            assert code == want << factor_bits(field, bits)


def factor_bits(field: int, bits: int) -> int:
    """Where in a byte the PTX finds a code: of 3 bits in half bytes of two registers in turn."""
    return field // 2 * 4 if bits == 3 else field * bits


def test_planes_in_words_become_codes_and_levels_factors():
    """The PTX, read line by line: four planes of four numbers of four groups become the codes whose
    bits they are, and levels of two tokens choose their factors."""
    planes = torch.randint(0, 2**32, (20, 4), generator=torch.Generator().manual_seed(0)).tolist()
    for a, b, c, d in planes:
        left = (
            run_ptx(level_words.SWAP_ASM_2.value, a, b),
            run_ptx(level_words.SWAP_ASM_2.value, c, d),
        )
        got = [0] * 4
        for i in (0, 1):
            got[i], got[i + 2] = run_ptx(level_words.SWAP_ASM_4.value, left[0][i], left[1][i])
        for quarter, byte in itertools.product(range(4), range(4)):
            fields = [plane >> 8 * byte + 2 * quarter & 3 for plane in (a, b, c, d)]
            code = sum(field << 2 * i for i, field in enumerate(fields))
            assert got[quarter] >> 8 * byte & 255 == code
    for one, two in itertools.product(range(4), range(4)):
        got = run_ptx(level_words.FACTOR_ASM.value, one, two)
        table = zip(level_words.LEVEL_FMA[one], level_words.LEVEL_FMA[two], strict=True)
        assert got == [low | high << 16 for low, high in table]


def test_a_code_as_a_subnormal_times_a_constant_is_its_value():
    """Every code of every level: its bits as a bfloat16, times one constant, plus the other, is
    exactly what format.py says, a power of 2 smaller."""
    for level in range(4):
        codes = torch.arange(2 ** LEVEL_BITS[level])
        times, plus = map(bfloat16_of, level_words.LEVEL_FMA[level])
        want = (codes.double() - zero_code(level)) * LEVEL_STEPS[level]
        got = [bfloat16_of(code) * times + plus for code in codes.tolist()]
        assert got == (want * 2.0**-13).tolist()


@pytest.mark.parametrize("n_bytes", [2, 4])
def test_codes_of_two_tokens_become_their_numbers(n_bytes):
    """The PTX, read line by line: every byte of two tokens of any levels, in one word or in two, is
    the number that format.py says, a power of 2 smaller, rounded once."""
    generator = torch.Generator().manual_seed(n_bytes)
    for levels in itertools.product(range(4), range(4)):
        factors = run_ptx(level_words.FACTOR_ASM.value, *levels)
        largest = [2 ** LEVEL_BITS[level] for level in levels]
        codes = [torch.randint(0, n, (n_bytes,), generator=generator) for n in largest]
        words = [word_of(c) for c in codes]
        if n_bytes == 2:
            words = [run_ptx(level_words.HALVES_ASM.value, *words)[0], 0]
        got = run_ptx(getattr(level_words, f"LEVEL_ASM_{n_bytes}").value, *words, *factors)
        assert len(got) == 2 * n_bytes
        for i, bits in enumerate(got):
            level = levels[i % 2]
            want = (codes[i % 2][i // 2].item() - zero_code(level)) * LEVEL_STEPS[level]
            assert bits == bits_of(want * 2.0**-13 + 0.0)  # not -0


@pytest.mark.parametrize("n_bytes", [1, 2, 4])
def test_a_word_is_loaded_where_a_level_is_high_enough(n_bytes):
    """The PTX, read line by line: a word of n_bytes, zeros else."""
    memory = bytes(range(1, 20))
    asm = getattr(level_words, f"LOAD_ASM_{n_bytes}").value
    for level, above in itertools.product(range(4), range(3)):
        want = int.from_bytes(memory[5 : 5 + n_bytes], "little") if level > above else 0
        assert run_ptx(asm, 5, level, above, memory=memory) == [want]
