"""How keys and value rows are stored as integers: plain functions, the specification of what the
kernels read.

The same number of bits for all numbers is KIVI (arXiv 2402.02750):

* Keys, by channel: `block` tokens of a segment share a step and a middle for each of the D
  dimensions.
* Values, by token: one token of one head has one step and one middle for all that is kept of it.

A number is then (code - 2^(b-1)) * step + middle, where the code has b bits.

Routed precision gives every group of a token a *level*: 0 (dropped), 1, 2 or 3, which is 0, 2, 4
or 8 bits a number. Values are first divided by `gain`, the calibrated root mean square of their
channel (transform coding), so that one step per token and head serves all its groups: a group's own
step is LEVEL_STEPS[level] times that, around zero.

How codes become bytes: of n codes of b bits in a row, byte j holds codes j, j + m, j + 2 m, ...,
with m = n b / 8 bytes, lowest bits first. So unpacking is a shift, and neighbours stay neighbours.
3 bits are stored as the lower 2 of all codes, then the third of all. Of a level, a row holds one
*bit plane*: 2 bits of each of the d codes of a group. Plane i has bits 2 i and 2 i + 1, so a plane
that the level does not have reads as zeros.

Steps and middles are float16 whatever type is computed in, and codes are taken with the rounded
ones. n is the number of tokens of all segments here; other letters as in storage/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from storage.layout import PackedView, bits_to_mask, sum_before

BITS = (16, 8, 4, 3, 2)  # 16: not integers, but the type computed in
SMALLEST = 2.0**-24  # the least float16 above 0

# By level, 0 to 3.
LEVEL_BITS = (0, 2, 4, 8)
LEVEL_PLANES = (0, 1, 2, 4)
# Steps for numbers of variance 1: of the best uniform quantiser of a Gaussian (Max, 1960), 0.9957
# and 0.3352, rounded to the 8 bits that a bfloat16 has. 8 bits get a larger step, to reach further.
LEVEL_STEPS = (0.0, 1.0, 0.3359375, 0.050048828125)
LEVEL_ERRORS = (1.0, 0.1188, 0.01154, 0.0002)  # the squared error they leave of a variance of 1
# Steps tried for every token, in units of its root mean square.
TRIED = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0)


class IntFormat(NamedTuple):
    """Say how a cache stores integers."""

    key_bits: int
    value_bits: int  # 0: every group has a level
    block: int  # tokens of a segment whose keys share steps
    # (Hkv, D) float32: what a value is multiplied by when it is read; None without levels
    gain: Tensor | None = None

    @property
    def levelled(self) -> bool:
        """Whether every group has a level of its own."""
        return self.value_bits == 0


class Ints(NamedTuple):
    """What turns the integers of a PackedView back into numbers."""

    fmt: IntFormat
    key_scale: Tensor  # (blocks, 2, D) float16: step and middle
    block_base: Tensor  # (B, Hkv) int64: first block of each segment
    value_scale: Tensor  # (token slots, 2) float16: step and middle; with levels (., 1): step
    dtype: torch.dtype  # what they were made of

    @property
    def levelled(self) -> bool:
        """Whether every group has a level of its own."""
        return self.fmt.levelled

    def levels(self, word: Tensor, n_groups: int) -> Tensor:
        """Read the levels in masks of 2 S bits, word (...): (..., S) uint8."""
        return join_levels(bits_to_mask(word, 2 * n_groups))

    def unpack(
        self, view: PackedView, mask: Tensor, valid: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of `view`, dense and left-aligned: see PackedView.unpack.

        mask   (B, Hm, N, S) bool, or levels, uint8
        valid  (B, Hm, N) bool, slots that hold a token
        dtype: of what is returned; None: of what the integers were made of
        Returns k, z (B, Hkv, N, D); zeros where a group was dropped or there is no token."""
        dtype = dtype or self.dtype
        B, Hkv = view.token_base.shape
        S = view.n_groups
        D = self.key_scale.size(-1)
        k = torch.zeros(B, Hkv, valid.size(-1), D, dtype=dtype, device=mask.device)
        z = torch.zeros_like(k)
        b, h, t = valid.expand(-1, Hkv, -1).nonzero(as_tuple=True)  # n tokens
        slot = view.token_base[b, h] + t
        block = self.block_base[b, h] + t // self.fmt.block
        bits = self.fmt.key_bits
        k[b, h, t] = dequantise_keys(view.keys[slot], self.key_scale, block, bits, dtype)
        kept = mask.expand(-1, Hkv, -1, -1)[b, h, t]  # (n, S)
        first = view.first_rows(valid)[b, h, t]  # (n,)
        scale = self.value_scale[slot]
        if self.levelled:
            gain = self.fmt.gain[h]
            z[b, h, t] = dequantise_levels(view.rows, kept, first, scale, gain, dtype)
            return k, z
        row = first.unsqueeze(-1) + sum_before(kept.long())  # (n, S)
        rows = view.rows[row[kept]]
        scale = scale.unsqueeze(1).expand(-1, S, -1)
        groups = torch.zeros(len(t), S, D // S, dtype=dtype, device=mask.device)
        groups[kept] = dequantise_values(rows, scale[kept], self.fmt.value_bits, dtype)
        z[b, h, t] = groups.flatten(-2)
        return k, z


# -------------------- codes and bytes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., n) uint8 below 2^bits into bytes (..., n bits / 8).

    n bits must be a multiple of 8; of 3 bits n itself."""
    if bits == 3:
        two = pack_bits(codes & 3, 2)
        one = pack_bits(codes >> 2, 1)
        return torch.cat((two, one), -1)
    parts = codes.unflatten(-1, (8 // bits, -1))  # (..., codes of a byte, bytes)
    out = parts[..., 0, :].clone()
    for i in range(1, 8 // bits):
        out |= parts[..., i, :] << (bits * i)
    return out


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Unpack bytes (..., m) uint8 into codes (..., 8 m / bits) uint8: the inverse of pack_bits."""
    if bits == 3:
        third = packed.size(-1) // 3
        two, one = packed.split((2 * third, third), -1)
        return unpack_bits(two, 2) | unpack_bits(one, 1) << 2
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed.device)
    codes = packed.unsqueeze(-2) >> shifts.unsqueeze(-1)
    codes = codes & 2**bits - 1
    return codes.flatten(-2)


def row_bytes(n: int, bits: int) -> int:
    """Return the bytes of n packed numbers."""
    return n * bits // 8


def scale_for(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return step and middle for numbers between low and high (...): (..., 2) float16."""
    # Division by a tensor: a GPU would multiply by the inverse of a Python number.
    n_steps = torch.full_like(low, 2**bits - 1)
    step = ((high - low) / n_steps).clamp(SMALLEST, 65504)
    # A product with a power of 2 is exact, so fused and separate additions agree.
    middle = low + 2 ** (bits - 1) * step
    return torch.stack((step, middle.clamp(-65504, 65504)), -1).half()


def to_codes(x: Tensor, step: Tensor, middle: Tensor, bits: int) -> Tensor:
    """Round x to the nearest codes, uint8 like x; step and middle broadcast to it."""
    half = 2 ** (bits - 1)  # the code of the middle
    steps = (x.float() - middle.float()) / step.float()
    code = (steps + (half + 0.5)).floor()
    return code.clamp(0, 2**bits - 1).to(torch.uint8)


def from_codes(
    codes: Tensor, step: Tensor, middle: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Return the numbers that codes stand for, computed in at least float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = codes.to(wide) - 2 ** (bits - 1)
    x = steps * step.to(wide) + middle.to(wide)
    return x.to(dtype)


# -------------------- keys


def key_scale(x: Tensor, block: Tensor, n_blocks: int, bits: int) -> Tensor:
    """Return step and middle of each channel in each block: (n_blocks, 2, D) float16.

    x      (n, D) float32; a block's codes reach from its least to its greatest number
    block  (n,) int64, the block of each key"""
    at = block.unsqueeze(-1).expand_as(x)
    none = torch.zeros(n_blocks, x.size(-1), device=x.device)
    low = none.scatter_reduce(0, at, x, "amin", include_self=False)
    high = none.scatter_reduce(0, at, x, "amax", include_self=False)
    return scale_for(low, high, bits).transpose(-1, -2).contiguous()


def quantise_keys(
    k: Tensor, block: Tensor, n_blocks: int, bits: int, round_to: Callable[..., Tensor] = to_codes
) -> tuple[Tensor, Tensor]:
    """Turn keys into integers.

    k      (n, D)
    block  (n,) int64, the block of each key
    round_to: to_codes (the nearest code) or what is called like it: rounding.gptq_round
    Returns bytes (n, D bits / 8) uint8 and scales (n_blocks, 2, D) float16."""
    x = k.float()
    scale = key_scale(x, block, n_blocks, bits)
    step = scale[block, 0]
    middle = scale[block, 1]
    codes = round_to(x, step, middle, bits)
    return pack_bits(codes, bits), scale


def dequantise_keys(
    packed: Tensor, scale: Tensor, block: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Turn bytes (n, D bits / 8) of blocks block (n,) into keys (n, D)."""
    step = scale[block, 0]
    middle = scale[block, 1]
    return from_codes(unpack_bits(packed, bits), step, middle, bits, dtype)


# -------------------- values, all of the same number of bits


def quantise_values(z: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Turn values into integers.

    z     (..., D); d = D/S numbers must fill bytes
    mask  (..., S) bool, the groups kept: step and middle are for them alone
    Returns bytes (..., S, d bits / 8) uint8, which mean nothing where a group is dropped, and
    scales (..., 2) float16."""
    x = z.float().unflatten(-1, (mask.size(-1), -1))  # (..., S, d)
    kept = mask.unsqueeze(-1)
    low = x.masked_fill(~kept, float("inf")).amin((-1, -2))
    high = x.masked_fill(~kept, float("-inf")).amax((-1, -2))
    some = mask.any(-1)
    scale = scale_for(low.where(some, 0.0), high.where(some, 0.0), bits)
    step, middle = scale[..., None, None, :].unbind(-1)
    codes = to_codes(x, step, middle, bits)
    return pack_bits(codes, bits), scale


def dequantise_values(rows: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Turn bytes (..., d bits / 8) and scales (..., 2), one per row, into numbers (..., d)."""
    step, middle = scale.unsqueeze(-2).unbind(-1)
    return from_codes(unpack_bits(rows, bits), step, middle, bits, dtype)


# -------------------- training reads what is stored


def keys_as_read(k: Tensor, bits: int, block: int) -> Tensor:
    """Return keys (B, Hkv, T, D) as they are read once they are stored, with the gradient of the
    keys themselves (straight through). Those behind the last full block stay as they are."""
    n = k.size(2) // block * block
    now = k.detach()
    whole = now[:, :, :n]
    stored = whole.reshape(-1, k.size(-1))
    at = torch.arange(len(stored), device=k.device) // block
    packed, scale = quantise_keys(stored, at, len(stored) // block, bits)
    read = dequantise_keys(packed, scale, at, bits, k.dtype).view(whole.shape)
    read = torch.cat((read, now[:, :, n:]), 2)
    return read + (k - now)


def values_as_read(z: Tensor, mask: Tensor, bits: int) -> Tensor:
    """Return values z (..., D) as they are read once groups mask (..., S) of them are stored, zeros
    where a group is dropped, with the gradient of z itself (straight through)."""
    kept = mask.repeat_interleave(z.size(-1) // mask.size(-1), -1)
    rows, scale = quantise_values(z.detach(), mask, bits)
    scale = scale.unsqueeze(-2).expand(*rows.shape[:-1], 2)
    read = dequantise_values(rows, scale, bits, z.dtype).flatten(-2)
    return read * kept + (z - z.detach())


# -------------------- values, every group at its level


def zero_code(level: int) -> float:
    """Return the code that means 0: between two codes of 2 bits, else a code."""
    return 1.5 if LEVEL_BITS[level] == 2 else 2.0 ** (LEVEL_BITS[level] - 1)


def level_table(levels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Look up step, zero code and largest code of levels (..., S): each (..., S, 1).

    The code of a dropped group is 0 and means 0."""
    step = [1.0, *LEVEL_STEPS[1:]]
    zero = [0.0, *map(zero_code, (1, 2, 3))]
    largest = [2**bits - 1 for bits in LEVEL_BITS]
    table = torch.tensor([step, zero, largest], dtype=dtype, device=levels.device)
    return tuple(table[:, levels.long()].unsqueeze(-1))


def level_steps(e: Tensor, levels: Tensor, weight: Tensor) -> Tensor:
    """Find the step of TRIED that leaves each token the least error: (..., 1) float16.

    e       (..., D) values in units of gain
    levels  (..., S) 0 to 3
    weight  (..., D) or broadcast: of squared errors"""
    S = levels.size(-1)
    x = e.float().unflatten(-1, (S, -1))  # (..., S, d)
    unit, zero, largest = level_table(levels, torch.float32)  # (..., S, 1)
    kept = (levels > 0).unsqueeze(-1)
    total = (x.square() * kept).sum((-1, -2), keepdim=True)
    count = (kept.sum((-1, -2), keepdim=True) * x.size(-1)).clamp_min(1)
    rms = (total / count).sqrt()  # (..., 1, 1)
    weight = weight.float().unflatten(-1, (S, -1)) * (kept * unit.square())
    x = x / unit
    least = torch.zeros_like(largest)
    least_error = torch.full_like(rms, float("inf"))
    best = rms.clamp(SMALLEST, 65504).half()
    for factor in TRIED:
        step = (rms * factor).clamp(SMALLEST, 65504).half()
        place = torch.addcdiv(zero, x, step.float())
        off = place.round().clamp_(least, largest).sub_(place).square_().mul_(weight)
        error = off.sum((-1, -2), keepdim=True) * step.float().square()
        best = torch.where(error < least_error, step, best)
        least_error = error.minimum(least_error)
    return best.squeeze(-1)


def bit_planes(levels: Tensor) -> Tensor:
    """Count the bit planes of levels 0 to 3: 0, 1, 2 or 4, int64."""
    levels = levels.long()
    return levels + (levels == 3)


def kept_tokens(levels: Tensor) -> Tensor:
    """Say which tokens have a group of a level above 0: levels (..., S) uint8."""
    if levels.size(-1) == 8:
        return _as_number(levels) != 0
    return levels.amax(-1) > 0


def count_planes(levels: Tensor) -> Tensor:
    """Sum bit_planes over a token's groups: levels (..., S) uint8, to (...) int32."""
    if levels.size(-1) != 8:
        return bit_planes(levels).sum(-1, dtype=torch.int32)
    number = _as_number(levels)
    # of each byte its level, and 1 more where that is 3
    planes = number + (number & number >> 1)
    return (planes * 0x0101010101010101 >> 56).int()  # the highest byte of it is the sum of all


def _as_number(levels: Tensor) -> Tensor:
    """Read the 8 bytes of a token's levels as one number, which a GPU does far faster than it sums
    over a short dimension: (..., 8) to (...) int64."""
    assert levels.dtype == torch.uint8
    return levels.contiguous().view(torch.int64).squeeze(-1)


def split_levels(levels: Tensor) -> Tensor:
    """Split levels (..., S) into bool (..., 2 S), their low bits, then their high ones: what is
    stored as a mask of 2 S groups."""
    return torch.cat((levels & 1, levels >> 1), -1).bool()


def join_levels(mask: Tensor) -> Tensor:
    """Join bool (..., 2 S) into levels (..., S) uint8: the inverse of split_levels."""
    low, high = mask.to(torch.uint8).chunk(2, -1)
    return low | high << 1


def quantise_levels(
    z: Tensor, levels: Tensor, offset: Tensor, n_planes: int, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn values into integers, every group at its level.

    z       (n, D)
    levels  (n, S) 0 to 3
    offset  (n,) int64, the bit planes before each token
    gain    (n, D) float32
    Returns bit planes (n_planes, d / 4) uint8 and steps (n, 1) float16."""
    S = levels.size(-1)
    e = z.float() / gain
    step = level_steps(e, levels, gain.square())
    unit, zero, largest = level_table(levels, torch.float32)
    own_step = step.float().unsqueeze(-1) * unit
    place = e.unflatten(-1, (S, -1)) / own_step + zero
    codes = place.round().clamp_min(0).minimum(largest).to(torch.uint8)  # (n, S, d)
    own = bit_planes(levels)
    first = offset.unsqueeze(-1) + sum_before(own)  # (n, S) first plane of each group
    width = row_bytes(codes.size(-1), 2)
    rows = torch.zeros(n_planes, width, dtype=torch.uint8, device=z.device)
    for i in range(max(LEVEL_PLANES)):
        has = own > i
        rows[first[has] + i] = pack_bits(codes[has] >> 2 * i & 3, 2)
    return rows, step


def dequantise_levels(
    rows: Tensor, levels: Tensor, offset: Tensor, step: Tensor, gain: Tensor, dtype: torch.dtype
) -> Tensor:
    """Turn bit planes into values (n, D), zeros where dropped: the inverse of quantise_levels."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    own = bit_planes(levels)
    first = offset.unsqueeze(-1) + sum_before(own)
    codes = rows.new_zeros(*levels.shape, gain.size(-1) // levels.size(-1))
    for i in range(max(LEVEL_PLANES)):
        has = own > i
        plane = rows[first[has] + i]
        codes[has] |= unpack_bits(plane, 2) << 2 * i
    unit, zero, _ = level_table(levels, wide)
    own_step = step.to(wide).unsqueeze(-1) * unit
    e = (codes.to(wide) - zero) * own_step
    z = e.flatten(-2) * gain.to(wide)
    return z.to(dtype)
