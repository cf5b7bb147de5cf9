"""Compiles the kernels for an H100 (sm_90), which needs no GPU, and prints one JSON line: what each
takes. Run by test_compiled.py, since in Triton's interpreter nothing is compiled.

    python tests/compile_kernels.py CASES.json [FOLDER]    # FOLDER: PTX, a file per kernel

A case is [name, S, K, key_bits, value_bits, D, dtype]: K 0 where rows are counted, bits 16 for whole
numbers."""

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
from views import packed_view, window_view

import kernels
from selection import group_norms, moments, received
from storage import append, fused, gates, key_sums, levels, packing, pieces
from storage.integers import append as int_append
from storage.integers import attention, contexts, rounding, words
from storage.integers.format import IntFormat
from storage.layout import mask_dtype, top_k_mask

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
N = 256  # packed tokens of every segment
BLOCK = 64  # tokens whose keys share steps
WINDOW = 16
found = []
case = ""


def type_of(value) -> str:
    """Name the type of an argument as Triton's signatures do."""
    if torch.is_tensor(value):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


class Compiled:
    """Stands for a kernel: a launch compiles it as a launch on a GPU would."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps: int = 4, **named):
        values = dict(zip(self.fn.arg_names, args, strict=False)) | named
        if "ASM" in values:
            values["ASM"] = values["q_ptr"].dtype != torch.float32
        signature = {}
        known = {}
        aligned = {}
        for i, p in enumerate(self.fn.params):
            value = values[p.name]
            if p.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[p.name] = "constexpr"
                known[(i,)] = value
                continue
            signature[p.name] = type_of(value)
            is_aligned = torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0)
            if is_aligned and not p.do_not_specialize_on_alignment:
                aligned[(i,)] = [["tt.divisibility", 16]]
        done = triton.compile(
            ASTSource(self.fn, signature, known, aligned),
            GPUTarget("cuda", 90, 32),
            dict(num_warps=num_warps),
        )
        ptx = done.asm["ptx"]
        name = self.fn.__name__
        if len(sys.argv) > 2:
            Path(sys.argv[2], f"{case} {name}.ptx".replace(":", "_")).write_text(ptx)
        found.append(
            {
                "case": case,
                "kernel": name,
                "bytes": len(done.asm["cubin"]),
                "lines": ptx.count(";\n"),
                "between_lanes": ptx.count("shfl.sync"),
                "subnormal_fma": ptx.count("fma.rn.bf16x2 x"),
            }
        )


def views(S, K, key_bits, value_bits, D, dtype: torch.dtype, lengths=((N, N), (N, N))):
    """Two sequences of two KV heads, `lengths` packed tokens and a full window each."""
    k, z = torch.randn(2, 2, 2, N, D).to(dtype)
    mask = top_k_mask(torch.rand(2, 2, N, S), K or S // 2)
    fmt = None
    if key_bits < 16:
        fmt = IntFormat(key_bits, value_bits, BLOCK, torch.ones(2, D))
    if value_bits == 0:
        mask = torch.randint(0, 4, (2, 2, N, S), dtype=torch.uint8)
    packed = packed_view(k, z, mask, torch.tensor(lengths), K, fmt)
    W = WINDOW + BLOCK - 1 if K and fmt else WINDOW
    window = window_view(*torch.randn(2, 2, 2, W, D).to(dtype), [0, 0], [WINDOW, WINDOW])
    return packed, window


def attend(
    S, K, key_bits, value_bits, D, dtype: torch.dtype, T: int = 1, cap: float = 0.0, **more
) -> None:
    """Compile attention over such views."""
    packed, window = views(S, K, key_bits, value_bits, D, dtype, **more)
    q = torch.randn(2, 6, T, D).to(dtype)
    kernels.packed_attention(q, packed, window, impl="triton", chunk=64, cap=cap)


def sum_keys(D: int, alone: bool) -> None:
    """Compile attention over values predicted from keys."""
    packed, window = views(4, 2, 16, 16, D, torch.bfloat16)
    if alone:
        packed = packed._replace(k=0)
    q = torch.randn(2, 6, 1, D).bfloat16()
    angles = torch.randn(2, N, D // 2)
    for position in (4, torch.arange(N)[None]):
        for read in (None, window):
            key_sums.attend_with_key_sums(q, packed, read, *angles, position, chunk=64)


def append_tokens(bits: int, shared: bool = False, **how: torch.Tensor) -> None:
    """Compile the append to a packed cache of these bits, whose heads may share a mask."""
    packed, window = views(4, 2, bits, bits, 64, torch.bfloat16)
    k, v = torch.randn(2, 2, 2, 1, 64).bfloat16()
    Hm = 1 if shared else 2
    packed = packed._replace(mask_base=packed.mask_base[:, :Hm])
    window_bits = torch.zeros(2, Hm, window.k.size(2), dtype=mask_dtype(4))
    block = BLOCK if bits < 16 else 1
    counts = (window.first, window.count)
    append.append_packed(packed, window, window_bits, *counts, k, v, WINDOW, block, **how)


def others() -> None:
    """Compile everything but attention, and capped attention over several queries and ragged
    segments."""
    attention.MANY_TOKENS = attention.FEW_TOKENS  # as a short context is read
    attend(8, 0, 4, 0, 64, torch.bfloat16)
    append_tokens(3)
    for bits in (4, 16):
        append_tokens(bits)
        append_tokens(bits, shared=True)
        append_tokens(bits, skip=torch.zeros(2, dtype=torch.int64))
    for D, alone in ((64, False), (128, False), (80, True)):
        sum_keys(D, alone)
    route = torch.ones(2, 2, 4, dtype=torch.bool)
    append_tokens(16, route=route, enc=torch.randn(2, 64, 64).bfloat16())
    for S, bits in ((8, 3), (4, 4), (4, 16)):  # by bytes, by words, whole numbers
        attend(S, 0, bits, bits, 64, torch.bfloat16, T=3, cap=50.0, lengths=((N, 5), (3, 4)))
    k, v = torch.randn(2, 2, 2, 272, 64).bfloat16()
    window = window_view(k, v, None, [5, 5])
    kernels.append_window(window, k[:, :, :1], v[:, :, :1], impl="triton")
    cost = torch.ones(2, 300, dtype=torch.int64)
    packing.take_within(torch.randn(2, 300), torch.tensor([5, 6]), cost, impl="triton")
    keep = torch.ones(2, 2, 272, 4, dtype=torch.bool)
    packing.pack_values(k, v, keep[..., 0], keep, impl="triton")
    known = rounding.QueryMoments(torch.eye(64, dtype=torch.float64)[None], torch.tensor([40]))
    step = torch.ones(40, 64).half()
    rounding.gptq_round(known, torch.randn(40, 64), step, 0 * step, 4, impl="triton")
    energy = torch.rand(2, 272, 8)
    for gain, price in (((0.9, 0.08, 0.02), (4, 4, 8)), ((1.0,), (8,))):
        levels.choose_levels(energy, torch.tensor([99, 0]), gain, price, 83, impl="triton")
    turn = torch.randn(2, 2, 1, 48, 32)
    for real in (None, torch.ones(2, 48, dtype=torch.bool)):
        moments.turned_moments(torch.randn(1, 2, 6, 48, 64).bfloat16(), *turn, real, 2)
    group_norms.group_norms(v[None], 8)
    q = torch.randn(1, 2, 2, 48, 64).bfloat16()
    weight = torch.ones(2, 1, 1, 48) / 48
    for last, pad in ((torch.arange(256, 272), None), (None, torch.tensor([0, 9]))):
        received.received(q, k[None], weight, last, pad, 256)
    chosen = torch.ones(2, 2, 272, 8, dtype=torch.uint8)
    moment = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)
    for bits, seen in ((4, moment), (3, None)):
        fmt = IntFormat(bits, 0, 64, torch.ones(2, 64))
        context = packing.Context(k, v, chosen[..., 0] > 0, chosen, seen)
        contexts.pack_context([fmt], context, impl="triton")
    for n, dtype in ((8, torch.bfloat16), (5, torch.float32)):
        h = torch.randn(2, 67, n * 3, dtype=dtype, requires_grad=True)
        bias = torch.randn(n, requires_grad=True)
        weighed, _, probs = gates.gate_and_weigh(h, bias, 2, 2, 1.0)
        (weighed.sum() + probs.sum()).backward()
    for B in (1, 64):
        x = torch.randn(B, 1, 576).bfloat16()
        weight = torch.randn(1536, 576).bfloat16()
        rope = torch.randn(2, B, 1, 1, 32)
        norm = (weight[0], 1e-5)
        fused.project_heads(x, norm, (weight[:576], weight[:192], weight[:192]), rope, 64)
        fused.gated_product(x, norm, weight, weight)
        fused.add_product(x, torch.randn(B, 1536).bfloat16(), weight.T.contiguous())


WITH_KERNELS = (
    kernels,
    append,
    fused,
    gates,
    group_norms,
    key_sums,
    levels,
    moments,
    packing,
    pieces,
    received,
)
FOR_INTEGERS = (int_append, attention, contexts, rounding, words)
for module in WITH_KERNELS + FOR_INTEGERS:
    for name, fn in [*vars(module).items()]:
        if name.endswith("_kernel"):
            setattr(module, name, Compiled(fn))
torch.manual_seed(0)
for name, *how, dtype in json.loads(sys.argv[1]):
    case = name
    attend(*how, getattr(torch, dtype))
case = "others"
others()
print(json.dumps(found))
