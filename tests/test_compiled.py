"""The kernels as compiled for a GPU, on any machine: Triton's interpreter runs what no GPU would
take, and shows no layouts."""

import json
import os
import subprocess
import sys

import pytest
import torch

import kernels
from runs import ROOT
from storage.integers import attention as int_attention
from storage.integers.format import LEVELS, STEPS, centre
from storage.kernel_base import TRITON, triton

CASES = [
    ("4:1:1:4", True, 128, "bfloat16"),
    ("4:0.5:1:4", True, 128, "bfloat16"),
    ("4:0.5:0.5:8:4", False, 64, "bfloat16"),
    ("8:0.9:0.5:4:0", False, 128, "bfloat16"),
    ("8:0.9:0.5:4:0", False, 64, "bfloat16"),
    ("4:0.5:1:8:0", False, 32, "float32"),
    ("8:0.9:0.5:3:0", False, 64, "bfloat16"),
    ("4:0.5:1:3", True, 32, "bfloat16"),
    ("4:0.5:1", True, 128, "bfloat16"),
]


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
def test_kernels_compile_for_a_gpu_and_move_little_between_lanes():
    """Every way to store: in words, byte by byte, whole. Codes in words go from memory to tensor
    cores in the lanes that loaded them: what is exchanged are maxima, sums and weights, where a
    conversion of the keys alone adds 128 exchanges."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/compile_kernels.py", json.dumps(CASES)]
    got = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert got.returncode == 0, got.stderr[-3000:]
    found = json.loads(got.stdout)
    made = [f for f in found if f["case"] != "others" and f["kernel"] != "_merge_kernel"]
    assert [f["case"] for f in made] == [c[0] for c in CASES] and all(
        f["bytes"] > 1000 for f in found
    )
    assert {
        "_merge_kernel",
        "_quantise_block_kernel",
        "_append_packed_kernel",
        "_append_tail_kernel",
        "_search_kernel",
        "_take_kernel",
        "_pack_kernel",
        "_codes_kernel",
    } < {f["kernel"] for f in found}
    words = 6 if kernels.WORDS else 0
    assert [f["kernel"] for f in made] == ["int_attention_kernel"] * words + [
        "_attention_kernel"
    ] * (9 - words)
    assert [f["subnormal_fma"] > 0 for f in made] == [False] * 3 + [bool(words)] * 2 + [False] * 4
    # before 3.6 the first product wants its rows otherwise
    assert TRITON < (3, 6) or all(f["between_lanes"] < 180 for f in made[:5]), made


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
def test_a_code_as_a_subnormal_times_a_constant_is_its_value():
    """Every code of every level: its bits as a bfloat16, times one constant, plus the other, is
    exactly what quant.py says, a power of 2 smaller."""

    def number(bits: torch.Tensor) -> torch.Tensor:
        return (
            torch.where(bits > 32767, bits - 65536, bits)
            .to(torch.int16)
            .view(torch.bfloat16)
            .double()
        )

    for level in (1, 2, 3):
        codes = torch.arange(2 ** LEVELS[level])
        step, base = (
            number(torch.tensor([c.value]))
            for c in int_attention.LEVEL_FMA[2 * level - 2 : 2 * level]
        )
        assert torch.equal(
            number(codes) * step + base, (codes.double() - centre(level)) * STEPS[level] * 2.0**-13
        )
