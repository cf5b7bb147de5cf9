"""Turn the oldest block of a full window into integers, on the device alone: the part of
storage/append.py that integers need. storage/integers/format.py is the specification, bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from storage.kernel_base import jit, popcount, tl
from storage.layout import PackedView, WindowView


@jit
def _scale(low, high, BITS: tl.constexpr):
    """Return step and middle, float16: format.scale_for."""
    codes = tl.full(low.shape, (1 << BITS) - 1.0, tl.float32)
    step = tl.div_rn(high - low, codes)
    step = tl.minimum(tl.maximum(step, 5.9604644775390625e-08), 65504.0)
    middle = low + step * (1 << (BITS - 1))
    middle = tl.minimum(tl.maximum(middle, -65504.0), 65504.0)
    return step.to(tl.float16), middle.to(tl.float16)


@jit
def _codes(x, step, middle, BITS: tl.constexpr):
    """Return the nearest codes, int32: format.to_codes. step, middle: float16."""
    place = tl.div_rn(x - middle.to(tl.float32), step.to(tl.float32)) + ((1 << (BITS - 1)) + 0.5)
    return tl.minimum(tl.maximum(tl.floor(place), 0.0), (1 << BITS) - 1.0).to(tl.int32)


@jit
def _bytes(codes, BITS: tl.constexpr, ROWS: tl.constexpr, n: tl.constexpr):
    """Pack codes (ROWS, n) of BITS bits, of which 8 is a multiple: format.pack_bits."""
    PARTS: tl.constexpr = 8 // BITS
    parts = tl.reshape(codes, (ROWS, PARTS, n // PARTS))
    shift = tl.arange(0, PARTS)[None, :, None] * BITS
    return tl.sum(parts << shift, 1).to(tl.uint8)


@jit
def _store_codes(ptr, codes, there, BITS: tl.constexpr, ROWS: tl.constexpr, n: tl.constexpr):
    """Store codes (ROWS, n) of BITS bits as bytes from ptr (ROWS,) on, in rows that are there
    (ROWS,): format.pack_bits."""
    ptr = ptr[:, None]
    there = there[:, None]
    if BITS == 3:  # the lower 2 of all codes, then the third of all
        lower = _bytes(codes & 3, 2, ROWS, n)
        third = _bytes(codes >> 2, 1, ROWS, n)
        tl.store(ptr + tl.arange(0, n // 4)[None, :], lower, mask=there)
        tl.store(ptr + n // 4 + tl.arange(0, n // 8)[None, :], third, mask=there)
    else:
        byte = _bytes(codes, BITS, ROWS, n)
        tl.store(ptr + tl.arange(0, n * BITS // 8)[None, :], byte, mask=there)


@jit
def _quantise_block_kernel(
    keys_ptr,
    rows_ptr,
    bits_ptr,
    key_scale_ptr,
    value_scale_ptr,
    token_base_ptr,
    row_base_ptr,
    mask_base_ptr,
    window_k_ptr,
    window_v_ptr,
    window_bits_ptr,
    n_packed_ptr,
    n_window_ptr,
    skip_ptr,
    Hkv,
    W,
    keep,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Turn the oldest BLOCK tokens of one segment's window into integers of KEY and VALUE bits,
    behind those packed before, if one token more fills the window."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    if skip_ptr is not None:  # noqa: SIM102 (known when compiling)
        if tl.load(skip_ptr + b) > 0:
            return
    seg = b * Hkv + h
    n_packed = tl.load(n_packed_ptr + b)
    if tl.load(n_window_ptr + b) + 1 < keep + BLOCK:
        return
    i = tl.arange(0, BLOCK)
    slot = seg * W + (n_packed + i) % W
    token = tl.load(token_base_ptr + seg) + n_packed
    dim = tl.arange(0, D)[None, :]

    # Keys: a step and a middle per channel.
    x = tl.load(window_k_ptr + slot[:, None] * D + dim).to(tl.float32)
    step, middle = _scale(tl.min(x, 0)[None, :], tl.max(x, 0)[None, :], KEY)
    scales = key_scale_ptr + token // BLOCK * 2 * D + dim
    tl.store(scales, step)
    tl.store(scales + D, middle)
    to = keys_ptr + (token + i) * (D * KEY // 8)
    _store_codes(to, _codes(x, step, middle, KEY), i >= 0, KEY, BLOCK, D)

    mask_seg = b if SHARED else seg
    word = tl.load(window_bits_ptr + mask_seg * W + (n_packed + i) % W).to(tl.int64)
    if SHARED == 0 or h == 0:
        masks = bits_ptr + tl.load(mask_base_ptr + mask_seg) + n_packed + i
        tl.store(masks, word.to(bits_ptr.dtype.element_ty))

    # Values: a step and a middle per token, for what it keeps.
    word = word.to(tl.uint64, bitcast=True)[:, None]
    one = tl.full([1, 1], 1, tl.uint64)
    kept = (word >> (dim // (D // S)).to(tl.uint64) & one) != 0
    x = tl.load(window_v_ptr + slot[:, None] * D + dim).to(tl.float32)
    low = tl.min(tl.where(kept, x, float("inf")), 1)
    high = tl.max(tl.where(kept, x, float("-inf")), 1)
    step, middle = _scale(low, high, VALUE)
    tl.store(value_scale_ptr + (token + i) * 2, step)
    tl.store(value_scale_ptr + (token + i) * 2 + 1, middle)
    codes = _codes(x, step[:, None], middle[:, None], VALUE)
    bit = one << tl.arange(0, S)[None, :].to(tl.uint64)
    row = (tl.load(row_base_ptr + seg) + (n_packed + i) * K)[:, None] + popcount(word & (bit - one))
    row = tl.reshape(row, [BLOCK * S])
    kept = tl.reshape((word & bit) != 0, [BLOCK * S])
    codes = tl.reshape(codes, [BLOCK * S, D // S])
    to = rows_ptr + row * (D // S * VALUE // 8)
    _store_codes(to, codes, kept, VALUE, BLOCK * S, D // S)


def quantise_block(
    packed: PackedView,
    window: WindowView,
    window_bits: Tensor,
    n_packed: Tensor,
    n_window: Tensor,
    window_size: int,
    block: int,
    skip: Tensor | None,
) -> None:
    """Pack the oldest `block` tokens of every window that one token more fills; counts stay.

    Arguments as of append.append_packed."""
    B, Hkv = packed.token_base.shape
    fmt = packed.ints.fmt
    _quantise_block_kernel[(B, Hkv)](
        packed.keys,
        packed.rows,
        packed.bits,
        packed.ints.key_scale,
        packed.ints.value_scale,
        packed.token_base,
        packed.row_base,
        packed.mask_base,
        window.k,
        window.v,
        window_bits,
        n_packed,
        n_window,
        skip,
        Hkv,
        window.k.size(2),
        window_size,
        D=window.k.size(3),
        S=packed.n_groups,
        K=packed.k,
        KEY=fmt.key_bits,
        VALUE=fmt.value_bits,
        BLOCK=block,
        SHARED=packed.mask_base.size(1) == 1,
        num_warps=4,
    )
