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
    KEY_BYTES: tl.constexpr = D * KEY // 8
    VALUE_BYTES: tl.constexpr = D * VALUE // 8
    ROW_BYTES: tl.constexpr = D // S * VALUE // 8

    # Keys: a step and a middle per channel. Byte c holds codes of channels c, c + KEY_BYTES, ...
    c = tl.arange(0, KEY_BYTES)
    byte = tl.zeros([BLOCK, KEY_BYTES], tl.int32)
    for p in tl.static_range(8 // KEY):
        channel = p * KEY_BYTES + c
        x = tl.load(window_k_ptr + slot[:, None] * D + channel[None, :]).to(tl.float32)
        step, middle = _scale(tl.min(x, 0), tl.max(x, 0), KEY)
        scales = key_scale_ptr + token // BLOCK * 2 * D + channel
        tl.store(scales, step)
        tl.store(scales + D, middle)
        byte |= _codes(x, step[None, :], middle[None, :], KEY) << (KEY * p)
    tl.store(keys_ptr + (token + i)[:, None] * KEY_BYTES + c[None, :], byte.to(tl.uint8))

    mask_seg = b if SHARED else seg
    word = tl.load(window_bits_ptr + mask_seg * W + (n_packed + i) % W).to(tl.int64)
    if SHARED == 0 or h == 0:
        masks = bits_ptr + tl.load(mask_base_ptr + mask_seg) + n_packed + i
        tl.store(masks, word.to(bits_ptr.dtype.element_ty))

    # Values: a step and a middle per token, for what it keeps. Byte c is of group c // ROW_BYTES.
    c = tl.arange(0, VALUE_BYTES)
    word = word.to(tl.uint64, bitcast=True)[:, None]
    group = (c // ROW_BYTES)[None, :]
    bit = tl.full([1, 1], 1, tl.uint64) << group.to(tl.uint64)
    kept = (word & bit) != 0
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for p in tl.static_range(8 // VALUE):
        dim = group * (D // S) + p * ROW_BYTES + (c % ROW_BYTES)[None, :]
        x = tl.load(window_v_ptr + slot[:, None] * D + dim).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(kept, x, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(kept, x, float("-inf")), 1))
    step, middle = _scale(low, high, VALUE)
    tl.store(value_scale_ptr + (token + i) * 2, step)
    tl.store(value_scale_ptr + (token + i) * 2 + 1, middle)
    byte = tl.zeros([BLOCK, VALUE_BYTES], tl.int32)
    for p in tl.static_range(8 // VALUE):
        dim = group * (D // S) + p * ROW_BYTES + (c % ROW_BYTES)[None, :]
        x = tl.load(window_v_ptr + slot[:, None] * D + dim).to(tl.float32)
        byte |= _codes(x, step[:, None], middle[:, None], VALUE) << (VALUE * p)
    row = (tl.load(row_base_ptr + seg) + (n_packed + i) * K)[:, None] + popcount(word & (bit - 1))
    to = rows_ptr + row * ROW_BYTES + (c % ROW_BYTES)[None, :]
    tl.store(to, byte.to(tl.uint8), mask=kept)


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
