"""The kernels as compiled for a GPU, on any machine: Triton's interpreter runs what no GPU would
take, and shows no layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from storage.integers import attention, words
from storage.integers.format import LEVEL_BITS, LEVEL_STEPS, zero_code
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
    ("byte: levels", 8, 0, 3, 0, 64, "bfloat16"),
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
        "_gate_kernel",
        "_gptq_kernel",
        "_heads_kernel",
        "_levels_kernel",
        "_merge_kernel",
        "_order_steps_kernel",
        "_pack_kernel",
        "_pack_keys_kernel",
        "_pack_levels_kernel",
        "_quantise_block_kernel",
        "_search_kernel",
        "_shares_kernel",
        "_sums_kernel",
        "_take_kernel",
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


def test_a_code_as_a_subnormal_times_a_constant_is_its_value():
    """Every code of every level: its bits as a bfloat16, times one constant, plus the other, is
    exactly what format.py says, a power of 2 smaller."""

    def number(bits: torch.Tensor) -> torch.Tensor:
        signed = torch.where(bits > 32767, bits - 65536, bits).to(torch.int16)
        return signed.view(torch.bfloat16).double()

    for level in (1, 2, 3):
        codes = torch.arange(2 ** LEVEL_BITS[level])
        times, plus = (
            number(torch.tensor([c.value])) for c in words.LEVEL_FMA[2 * level - 2 : 2 * level]
        )
        want = (codes.double() - zero_code(level)) * LEVEL_STEPS[level]
        assert torch.equal(number(codes) * times + plus, want * 2.0**-13)
