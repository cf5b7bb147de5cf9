"""What all Triton kernels share: where they run, and small functions on the device.

A kernel stands beside a plain PyTorch function, its reference: the specification, and what runs
where there is no GPU. Functions with an argument `impl` choose between the two: "auto" runs the
kernel on CUDA tensors and the reference elsewhere, "triton" and "torch" force one. On CPU tensors
kernels run in Triton's interpreter (TRITON_INTERPRET=1). Only those of gates.py have a
gradient.

Names in kernels: `_ptr` ends what is an address, `_stride_b` and the like what is added to an
address for the next sequence, head or token; capitals are known when compiling.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the references need none
    triton = None
    tl = None
# Tensors that are read at an offset which is itself loaded, or of which one number is read: whether
# they begin at a multiple of 16 bytes changes no instruction, and layers that are packed at once
# begin anywhere. Were it looked at, a kernel would be compiled anew for every mixture of them.
ANYWHERE = (
    "bits_ptr",
    "before_ptr",
    "tile_rows_ptr",
    "value_scale_ptr",
    "n_packed_ptr",
    "token_base_ptr",
    "row_base_ptr",
    "mask_base_ptr",
    "tile_base_ptr",
    "block_base_ptr",
    "first_ptr",
    "count_ptr",
)


def jit(function):
    """Make a kernel, or a function of kernels, that is compiled when it is first launched."""
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize_on_alignment=ANYWHERE)


TRITON = tuple(map(int, triton.__version__.split(".")[:2])) if triton else (0, 0)


@cache  # asked at every launch
def use_triton(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a function that works on such tensors runs its kernel; float64 never does."""
    assert impl in ("auto", "triton", "torch"), f"impl={impl}: auto, triton or torch"
    assert triton or impl != "triton", f"impl={impl}, and triton is not installed"
    if triton is None or dtype == torch.float64:
        return False
    return impl == "triton" or (impl == "auto" and device.type == "cuda")


def dense_rows(x: Tensor) -> Tensor:
    """Return x such that the numbers of its last dimension lie side by side, as kernels expect."""
    return x if x.stride(-1) == 1 else x.contiguous()


@jit
def popcount(x):
    """Count the bits set in each uint32 or uint64, int32."""
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
def as_word(bits, BITS: tl.constexpr):
    """Turn a token's mask of BITS bits, as it is stored, into uint32; one of 64 into uint64."""
    if BITS == 64:
        return bits.to(tl.uint64, bitcast=True)
    elif BITS == 16:
        return bits.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        return bits.to(tl.uint32)


@jit
def kept_before(word, group, BITS: tl.constexpr):
    """Count the kept groups of masks `word`, of BITS bits and as as_word returns them, that come
    before `group`, int32."""
    one = tl.full([1, 1], 1, word.dtype)
    earlier = (one << group) - one
    if BITS > 8:
        return popcount(word & earlier)
    else:
        # At most 7 bits come before: of four copies of them end to end every fourth bit is another
        # one, and a product adds them up. Half as long as popcount, and the constants of a
        # group are the same for all masks.
        copies = (word & 0x7F) * 0x00204081
        wanted = earlier * 0x00204081 & 0x11111111
        return ((copies & wanted) * 0x11111111 >> 28).to(tl.int32)


@jit
def product(a, b, c):
    """Compute a @ b + c in float32; float32 factors are not rounded."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@jit
def capped(logits, CAP: tl.constexpr):
    """Bend logits s, in units of log 2, to CAP tanh(s / CAP); CAP 0: as they are."""
    if CAP > 0:
        # tanh(y) = 1 - 2 / (e^2y + 1), and the power is 2^(2 / CAP * logit)
        bent = 1.0 - 2.0 / (tl.exp2(logits * (2.0 / CAP)) + 1.0)
        return bent * (CAP * 1.4426950408889634)
    else:
        return logits


@jit
def load_masks(
    bits_ptr,
    before_ptr,
    tile_rows_ptr,
    t,
    end,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Load the masks of tokens t, 0 from `end` on, and the number of rows before each, int32."""
    bits = tl.load(bits_ptr + t, mask=t < end, other=0)
    if K > 0:
        return bits, t * K
    else:
        tile = tl.load(tile_rows_ptr + t // TILE, mask=t < end, other=0)
        return bits, tile + tl.load(before_ptr + t, mask=t < end, other=0).to(tl.int32)


@jit
def load_rows(
    rows_ptr,
    bits,
    offset,
    D: tl.constexpr,
    S: tl.constexpr,
    DP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Load the values (N, DP) of tokens with masks `bits` (N,), which have `offset` (N,) rows
    before them; zeros where a group was dropped, and past D."""
    dim = tl.arange(0, DP)[None, :]
    # Equation (2) of kernels.py for every number of every token; masks past the last are 0.
    word = as_word(bits, S)[:, None]
    one = tl.full([1, 1], 1, word.dtype)
    group = (dim // (D // S)).to(word.dtype)
    kept = ((word >> group) & one) != 0
    row_of = offset[:, None] + kept_before(word, group, S)
    place = row_of * (D // S) + dim % (D // S)
    if ALIGN > 1:
        # Numbers of a group lie side by side: loads may be as wide as that allows.
        place = tl.max_contiguous(tl.multiple_of(place, [1, ALIGN]), [1, ALIGN])
        kept = tl.max_constancy(kept, [1, ALIGN])
    return tl.load(
        rows_ptr + place,
        mask=kept if DP == D else kept & (dim < D),
        other=0.0,
        eviction_policy="evict_first",
    )
