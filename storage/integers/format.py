"""Fewer bits per number: how keys and value rows are stored as integers. Plain functions, the
specification of what kernels.py reads.

* Keys, per channel: `block` tokens of a segment share a step and a middle for each of the D
  dimensions.
* Values, per token and head: one step and one middle over all that is kept of it. Uniform bits for
  both is KIVI (arXiv 2402.02750).
* Values, routed: every group of a token has a level of 0 (dropped), 2, 4 or 8 bits. Coordinates are
  first divided by `gain`, their calibrated root mean square (transform coding), so one step per
  token and head serves all its groups: STEPS[level] times it, around zero.

A uniform number is (code - 2^(b-1)) * step + middle, code of b bits. Codes lie in planes: of n
numbers in a row, byte j holds numbers j, j + n b/8, j + 2 n b/8, ..., lowest bits first, so that
unpacking is a shift and neighbours stay neighbours; 3 bits are a plane of 2 and a plane of 1. Of a
level, unit i (2 bits of d numbers) holds bits 2 i and 2 i + 1 of every code, so that what a level
does not have reads as zeros. Steps and middles are float16 whatever is computed in, and codes are
taken with the rounded ones.

Letters: B sequences, Hkv KV heads, D head dimension, S groups, d = D/S, n tokens of all segments, U
units of 2 bits and d numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (16, 8, 4, 3, 2)  # 16: whole, in the type computed in
LEVELS = (0, 2, 4, 8)  # bits of a level
UNITS = (0, 1, 2, 4)  # 2-bit units of a level
# of numbers of unit variance: the best uniform quantiser of a Gaussian (Max, 1960), in the 8 bits
# that
STEPS = (0.0, 1.0, 0.3359375, 0.050048828125)
# a bfloat16 has (0.9957, 0.3352); 8 bits reach further
REMAINS = (1.0, 0.1188, 0.01154, 0.0002)  # squared error that it leaves
# steps tried for every token, times its root mean square
TRIED = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0)
SMALLEST = 2.0**-24  # the least float16 above 0


class IntFormat(NamedTuple):
    """How a cache stores integers."""

    key_bits: int
    value_bits: int  # 0: every group has its level
    block: int  # tokens of a segment whose keys share steps
    # (Hkv, D) float32: what a value is multiplied by when it is read; levels only
    gain: Tensor | None = None


class Ints(NamedTuple):
    """What turns the integers of a packed part (stored.Packed) back into numbers."""

    fmt: IntFormat
    key_scale: Tensor  # (blocks, 2, D) float16: step and middle
    block_base: Tensor  # (B, Hkv) int64 first block of each segment
    # (token slots, 2) float16: step and middle; (token slots, 1) of levels: step
    value_scale: Tensor
    dtype: torch.dtype  # what they stand for


# ----------------------------------------------------------------------------- bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., n) below 2^bits -> bytes (..., n bits / 8), in planes. n bits must be a
    multiple of 8, of 3 bits n itself."""
    if bits == 3:
        return torch.cat((pack_bits(codes & 3, 2), pack_bits(codes >> 2, 1)), -1)
    planes = codes.unflatten(-1, (8 // bits, -1))  # (..., planes, bytes)
    out = planes[..., 0, :].clone()
    for i in range(1, 8 // bits):
        out |= planes[..., i, :] << (bits * i)
    return out


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Inverse of pack_bits: bytes (..., m) uint8 -> codes (..., 8 m / bits) uint8."""
    if bits == 3:
        two, one = packed.split((packed.size(-1) // 3 * 2, packed.size(-1) // 3), -1)
        return unpack_bits(two, 2) | unpack_bits(one, 1) << 2
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts & (1 << bits) - 1).flatten(-2)


def row_bytes(n: int, bits: int) -> int:
    """Bytes of n packed numbers."""
    return n * bits // 8


def scale_for(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """(step, middle) float16 for numbers between low and high (...): (..., 2)."""
    # by a tensor: a GPU multiplies by a number's inverse
    step = ((high - low) / torch.full_like(low, 2**bits - 1)).clamp(SMALLEST, 65504)
    # a product with a power of 2 is exact, so that fused and separate adds agree
    middle = low + 2 ** (bits - 1) * step
    return torch.stack((step, middle.clamp(-65504, 65504)), -1).half()


def to_codes(x: Tensor, step: Tensor, middle: Tensor, bits: int) -> Tensor:
    """Nearest codes, uint8 like x; step and middle broadcast to it."""
    return (
        ((x.float() - middle.float()) / step.float() + (2 ** (bits - 1) + 0.5))
        .floor()
        .clamp(0, 2**bits - 1)
        .to(torch.uint8)
    )


def from_codes(
    codes: Tensor, step: Tensor, middle: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Inverse of to_codes, computed in at least float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ((codes.to(wide) - 2 ** (bits - 1)) * step.to(wide) + middle.to(wide)).to(dtype)


# ----------------------------------------------------------------------------- keys


def key_scale(x: Tensor, block: Tensor, n_blocks: int, bits: int) -> Tensor:
    """(n_blocks, 2, D) float16: step and middle of each channel of x (n, D) float32 in each block,
    whose codes reach from its least to its greatest number."""
    at = block.unsqueeze(-1).expand_as(x)
    low, high = (
        torch.zeros(n_blocks, x.size(-1), device=x.device).scatter_reduce(
            0, at, x, how, include_self=False
        )
        for how in ("amin", "amax")
    )
    return scale_for(low, high, bits).transpose(-1, -2).contiguous()


def quantise_keys(
    k: Tensor, block: Tensor, n_blocks: int, bits: int, codes: Callable[..., Tensor] = to_codes
) -> tuple[Tensor, Tensor]:
    """Keys k (n, D) of blocks block (n,) int64 -> bytes (n, D bits / 8), scales (n_blocks, 2, D)
    float16. codes: what rounds, to the nearest code (KIVI) or, called alike, as rounding.codes_for
    does."""
    x = k.float()
    scale = key_scale(x, block, n_blocks, bits)
    return pack_bits(codes(x, scale[block, 0], scale[block, 1], bits), bits), scale


def dequantise_keys(
    packed: Tensor, scale: Tensor, block: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Bytes (n, D bits / 8) of blocks block (n,) -> keys (n, D)."""
    return from_codes(unpack_bits(packed, bits), scale[block, 0], scale[block, 1], bits, dtype)


# ----------------------------------------------------------------------------- values, uniform


def quantise_values(z: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values z (..., D) with the groups of mask (..., S) bool kept -> bytes (..., S, d bits / 8)
    and scales (..., 2) float16, over what is kept; bytes of dropped groups mean nothing. d must
    fill bytes."""
    x = z.float().unflatten(-1, (mask.size(-1), -1))  # (..., S, d)
    kept = mask.unsqueeze(-1)
    low = x.masked_fill(~kept, float("inf")).amin((-1, -2))
    high = x.masked_fill(~kept, float("-inf")).amax((-1, -2))
    some = mask.any(-1)
    scale = scale_for(low.where(some, 0.0), high.where(some, 0.0), bits)  # (..., 2)
    return pack_bits(to_codes(x, *scale[..., None, None, :].unbind(-1), bits), bits), scale


def dequantise_values(rows: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Bytes (..., d bits / 8) and scales (..., 2), one per row -> (..., d)."""
    return from_codes(unpack_bits(rows, bits), *scale.unsqueeze(-2).unbind(-1), bits, dtype)


# ----------------------------------------------------------------------------- values, routed


def centre(level: int) -> float:
    """The code, as a fraction, that means 0: between two codes of 2 bits, else a code."""
    return 1.5 if LEVELS[level] == 2 else 2.0 ** (LEVELS[level] - 1)


def of_levels(levels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(step, centre, largest code) of levels (..., S), each (..., S, 1); a dropped group's code is
    0 and means 0."""
    table = torch.tensor(
        [[1.0, *STEPS[1:]], [0.0, *map(centre, (1, 2, 3))], [2**b - 1 for b in LEVELS]],
        dtype=dtype,
        device=levels.device,
    )
    return tuple(table[:, levels.long()].unsqueeze(-1))


def level_steps(e: Tensor, levels: Tensor, weight: Tensor) -> Tensor:
    """The best of TRIED steps for each token: e (..., D) in units of gain, levels (..., S) 0 to 3,
    weight (..., D) or broadcast, of squared errors -> (..., 1) float16."""
    x = e.float().unflatten(-1, (levels.size(-1), -1))
    (unit, middle, top) = of_levels(levels, torch.float32)  # (..., S, d), (..., S, 1)
    kept = (levels > 0).unsqueeze(-1)
    rms = (
        (x.square() * kept).sum((-1, -2), keepdim=True)
        / (kept.sum((-1, -2), keepdim=True) * x.size(-1)).clamp_min(1)
    ).sqrt()
    w = weight.float().unflatten(-1, (levels.size(-1), -1)) * (kept * unit.square())
    x = x / unit
    least = torch.zeros_like(top)
    best = torch.full_like(rms, float("inf"))
    out = rms.clamp(SMALLEST, 65504).half()
    for factor in TRIED:
        step = (rms * factor).clamp(SMALLEST, 65504).half()
        code = torch.addcdiv(middle, x, step.float())
        off = code.round().clamp_(least, top).sub_(code).square_().mul_(w)
        err = off.sum((-1, -2), keepdim=True) * step.float().square()
        out = torch.where(err < best, step, out)
        best = err.minimum(best)
    return out.squeeze(-1)


def units(levels: Tensor) -> Tensor:
    """2-bit units of levels 0 to 3, int64."""
    levels = levels.long()
    return levels + (levels == 3)


def split_levels(levels: Tensor) -> Tensor:
    """Levels (..., S) -> bool (..., 2 S), the low bits, then the high ones: what is stored as a
    mask of 2 S groups."""
    return torch.cat((levels & 1, levels >> 1), -1).bool()


def join_levels(mask: Tensor) -> Tensor:
    """Inverse of split_levels: (..., 2 S) -> (..., S) uint8."""
    low, high = mask.to(torch.uint8).chunk(2, -1)
    return low | high << 1


def quantise_levels(
    z: Tensor, levels: Tensor, offset: Tensor, n_units: int, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens z (n, D) at levels (n, S) 0 to 3 whose units begin at offset (n,) -> bytes (n_units, d
    / 4) and steps (n, 1) float16. gain (n, D)."""
    S = levels.size(-1)
    e = z.float() / gain
    step = level_steps(e, levels, gain.square())
    own = units(levels)
    (unit, middle, top) = of_levels(levels, torch.float32)
    # (n, S, d)
    codes = (
        (e.unflatten(-1, (S, -1)) / (step.float().unsqueeze(-1) * unit) + middle)
        .round()
        .clamp_min(0)
        .minimum(top)
        .to(torch.uint8)
    )
    rows = torch.zeros(n_units, row_bytes(codes.size(-1), 2), dtype=torch.uint8, device=z.device)
    at = offset.unsqueeze(-1) + own.cumsum(-1) - own  # (n, S) first unit of each group
    for u in range(max(UNITS)):
        has = own > u
        rows[at[has] + u] = pack_bits(codes[has] >> 2 * u & 3, 2)
    return rows, step


def dequantise_levels(
    rows: Tensor, levels: Tensor, offset: Tensor, step: Tensor, gain: Tensor, dtype: torch.dtype
) -> Tensor:
    """Inverse of quantise_levels: (n, D), zeros where dropped."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    own = units(levels)
    (unit, middle, _) = of_levels(levels, wide)
    at = offset.unsqueeze(-1) + own.cumsum(-1) - own
    codes = rows.new_zeros(*levels.shape, gain.size(-1) // levels.size(-1))
    for u in range(max(UNITS)):
        has = own > u
        codes[has] |= unpack_bits(rows[at[has] + u], 2) << 2 * u
    return (
        ((codes.to(wide) - middle) * (step.to(wide).unsqueeze(-1) * unit)).flatten(-2)
        * gain.to(wide)
    ).to(dtype)
