"""Compiles the kernels for an H100 (sm_90), which needs no GPU, and prints one JSON line: what each
takes. Run by test_compiled.py, since in Triton's interpreter nothing is compiled."""

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from benchmarks.cases import Case
from storage import append as appending
from storage import packing
from storage.integers import rounding

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
found = []
case = ""


class Compiled:
    """Stands for a kernel: a launch compiles it as a launch on a GPU would."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps: int = 4, **named):
        values = dict(zip(self.fn.arg_names, args, strict=False)) | named
        if "ASM" in values:
            values["ASM"] = values["q"].dtype != torch.float32
        signature = {}
        known = {}
        aligned = {}
        for i, p in enumerate(self.fn.params):
            v = values[p.name]
            if p.is_constexpr or v is None or (isinstance(v, int) and v == 1):
                signature[p.name] = "constexpr"
                known[(i,)] = v
                continue
            signature[p.name] = (
                f"*{TYPES[v.dtype]}"
                if torch.is_tensor(v)
                else "fp32"
                if isinstance(v, float)
                else "i32"
            )
            if torch.is_tensor(v) or (isinstance(v, int) and v % 16 == 0):
                aligned[(i,)] = [["tt.divisibility", 16]]
        done = triton.compile(
            ASTSource(self.fn, signature, known, aligned),
            GPUTarget("cuda", 90, 32),
            dict(num_warps=num_warps),
        )
        ptx = done.asm["ptx"]
        found.append(
            {
                "case": case,
                "kernel": self.fn.__name__,
                "bytes": len(done.asm["cubin"]),
                "between_lanes": ptx.count("shfl.sync"),
                "subnormal_fma": ptx.count("fma.rn.bf16x2 x"),
            }
        )


for module in (kernels, appending, packing, rounding):
    for name, fn in [*vars(module).items()]:
        if name.endswith("_kernel"):
            setattr(module, name, Compiled(fn))
torch.manual_seed(0)
for case, fixed, D, dtype in json.loads(sys.argv[1]):
    q, k, v = (
        torch.randn(2, h, t, D).to(getattr(torch, dtype)) for h, t in ((6, 1), (2, 272), (2, 272))
    )
    cache = Case(case, D).fill(k, v, fixed)[0]
    kernels.packed_attention(q, cache.packed(), cache.whole(), impl="triton", chunk=64)
case = "others"
for text in ("4:0.5:1:4", "4:0.5"):
    k, v = torch.randn(2, 2, 2, 272, 64).bfloat16()
    cache = Case(text, 64).fill(k, v, True)[0]
    appending.append_packed(
        cache.packed(),
        cache.whole(),
        cache.tail_bits,
        cache.n_packed,
        cache.n_tail,
        k[:, :, :1],
        v[:, :, :1],
        16,
        cache.packed().ints.fmt.block if cache.packed().ints else 1,
    )
appending.append_tail(cache.whole(), k[:, :, :1], v[:, :, :1], impl="triton")
packing.take_within(
    torch.randn(2, 300), torch.tensor([5, 6]), torch.ones(2, 300, dtype=torch.int64), impl="triton"
)
packing.pack_values(
    k,
    v,
    torch.ones(2, 2, 272, dtype=torch.bool),
    torch.ones(2, 2, 272, 4, dtype=torch.bool),
    impl="triton",
)
readers = rounding.Readers(torch.eye(64, dtype=torch.float64)[None], torch.tensor([40]))
rounding.codes_for(
    readers,
    torch.randn(40, 64),
    torch.ones(40, 64).half(),
    torch.zeros(40, 64).half(),
    4,
    impl="triton",
)
print(json.dumps(found))
