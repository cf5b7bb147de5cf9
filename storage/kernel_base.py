"""What the Triton kernels share: where they run, and small functions that several of them call.

`impl`: "auto" runs a kernel on CUDA tensors and its reference elsewhere, "triton" and "torch" force
one; kernels run on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1). None has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the references need none
    triton = tl = None
jit = triton.jit if triton else lambda f: f
TRITON = tuple(map(int, triton.__version__.split(".")[:2])) if triton else (0, 0)


def use_triton(impl: str, x: Tensor) -> bool:
    """Whether a function runs its kernel: impl "triton" always (CPU tensors need
    TRITON_INTERPRET=1), "torch" never, "auto" on a GPU."""
    assert impl in ("auto", "triton", "torch") and (triton or impl != "triton"), (
        f"impl={impl} with triton {'there' if triton else 'missing'}"
    )
    return (
        triton is not None
        and x.dtype != torch.float64
        and (impl == "triton" or (impl == "auto" and x.is_cuda))
    )


@jit
def popcount(x):
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
def product(a, b, c):
    """a @ b + c in float32; float32 factors are not rounded."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@jit
def where_rows(bits, before, tile_rows, t, hi, K: tl.constexpr, TILE: tl.constexpr):
    """Masks of tokens t, 0 from hi on, and the number of rows before each, int32."""
    mask = tl.load(bits + t, mask=t < hi, other=0)
    if K > 0:
        return mask, t * K
    else:
        return mask, tl.load(tile_rows + t // TILE, mask=t < hi, other=0) + tl.load(
            before + t, mask=t < hi, other=0
        ).to(tl.int32)


@jit
def pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N: tl.constexpr):
    """Of a segment, or of several: packed tokens, tail slots, the tail's first and count; the size
    of its pieces, equal and at most chunk (rounded up to N), and their number, 0 for what is no
    segment."""
    b = seg // Hkv
    h = seg % Hkv
    there = seg < segments
    count = tl.load(n_packed + b * n_b + h * n_h, mask=there, other=0).to(tl.int32)
    first = tl.load(tail_first + b, mask=there, other=0).to(tl.int32) % W
    tail_n = tl.load(tail_n + b, mask=there, other=0).to(tl.int32)
    slots = tl.where(tail_n > 0, tl.minimum(first + tail_n, W), 0)
    total = tl.maximum(count + slots, 1)
    size = tl.cdiv(tl.cdiv(total, tl.cdiv(total, chunk)), N) * N
    return count, slots, first, tail_n, size, tl.where(there, tl.cdiv(total, size), 0)


@jit
def own_piece(
    n_packed,
    tail_first,
    tail_n,
    segments,
    Hkv,
    n_b,
    n_h,
    W,
    chunk,
    N: tl.constexpr,
    SEGS: tl.constexpr,
):
    """Segment and piece of this program. The grid is (segments, pieces), those past a segment's end
    last; or with SEGS > 0 (pieces of all segments in a row,): segments and more where there is
    none."""
    seg = tl.program_id(0)
    c = tl.program_id(1)
    if SEGS > 0:
        s = tl.arange(0, SEGS)
        _, _, _, _, _, number = pieces(
            n_packed, tail_first, tail_n, s, segments, Hkv, n_b, n_h, W, chunk, N
        )
        pid = seg
        seg = tl.sum((tl.cumsum(number, 0) <= pid).to(tl.int32), 0)
        c = pid - tl.sum(tl.where(s < seg, number, 0), 0)
    return seg, c


@jit
def as_word(mask, BITS: tl.constexpr):
    """A token's mask of BITS bits as uint32, of 64 as uint64."""
    if BITS == 64:
        return mask.to(tl.uint64, bitcast=True)
    elif BITS == 16:
        return mask.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        return mask.to(tl.uint32)
