"""Views of caches made from dense tensors, token by token: what kernels and references read.

What may not be read is NaN: between the segments of whole numbers, and in a window's empty slots."""

from __future__ import annotations

import torch

from storage.integers.format import (
    IntFormat,
    Ints,
    bit_planes,
    quantise_keys,
    quantise_levels,
    quantise_values,
    split_levels,
)
from storage.layout import PackedView, WindowView, cdiv, mask_to_bits, tile_size

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers, some of them far out."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * (1 + 5 * (torch.rand(shape, generator=g) < 0.03))


def uniform_by_hand(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers x (n,) as they come back from `bits` bits that share one step and middle, number by
    number, steps rounded to float16."""
    low = x.float().min()
    high = x.float().max()
    half = 1 << bits - 1
    # in float32: one in thousands is rounded the other way from float64
    step = ((high - low) / (2**bits - 1)).clamp_min(2.0**-24)
    middle = (low + half * step).half().item()
    step = step.half().item()
    codes = [min(max(round((float(v) - middle) / step + half), 0), 2**bits - 1) for v in x]
    return torch.tensor([(c - half) * step + middle for c in codes], dtype=torch.float64)


class Bases:
    """Where segments begin in tensors that grow segment by segment, with a gap before each."""

    def __init__(self, B: int, heads: int):
        self.at = torch.zeros(B, heads, dtype=torch.int64)
        self.parts = []

    def begin(self, b: int, h: int, gap: torch.Tensor | None = None) -> None:
        """A segment begins, behind a gap."""
        if gap is not None:
            self.parts.append(gap)
        self.at[b, h] = sum(len(part) for part in self.parts)


def offsets(count: list[int], tile: int) -> tuple[list[int], list[int]]:
    """before and tile_rows of a segment whose tokens have so many rows."""
    before = []
    tile_rows = []
    total = 0
    for t, rows in enumerate(count):
        if t % tile == 0:
            tile_rows.append(total)
        before.append(total - tile_rows[-1])
        total += rows
    return before, tile_rows


def packed_view(
    k: torch.Tensor,
    z: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    K: int = 0,
    fmt: IntFormat | None = None,
) -> PackedView:
    """The first `lengths` (B, Hm) tokens of k, z (B, Hkv, N, D), of values the groups in mask
    (B, Hm, N, S): bool, or levels. K: groups of every token, 0 where they are counted. fmt: store
    integers."""
    B, Hkv, _, D = k.shape
    Hm = mask.size(1)
    S = mask.size(-1)
    levelled = fmt is not None and fmt.value_bits == 0
    keys, rows, scales, value_scales = (Bases(B, Hkv) for _ in range(4))
    bits, tiles = (Bases(B, Hm) for _ in range(2))
    before = []
    for b in range(B):
        for h in range(Hkv):
            m = h % Hm
            n = int(lengths[b, m])
            own = mask[b, m, :n]
            count = (bit_planes(own) if levelled else own.long()).sum(-1)
            if fmt is None:
                keys.begin(b, h, k.new_full((3, D), NAN))
                rows.begin(b, h, k.new_full((2, D // S), NAN))
                keys.parts.append(k[b, h, :n])
                rows.parts.append(z[b, h, :n].reshape(n, S, D // S)[own])
            else:
                stored = int_segment(k[b, h, :n], z[b, h, :n], own, count, fmt, h)
                for base, part in zip((keys, scales, rows, value_scales), stored, strict=True):
                    base.begin(b, h)
                    base.parts.append(part)
            if h < Hm:
                bits.begin(b, m)
                tiles.begin(b, m)
                bits.parts.append(mask_to_bits(split_levels(own) if levelled else own))
                ahead, tile_rows = offsets(count.tolist(), tile_size(S * (4 if levelled else 1)))
                before += ahead
                tiles.parts.append(torch.tensor(tile_rows, dtype=torch.int32))
    ints = None
    if fmt is not None:
        ints = Ints(fmt, torch.cat(scales.parts), scales.at, torch.cat(value_scales.parts), k.dtype)
    return PackedView(
        torch.cat(keys.parts),
        torch.cat(rows.parts),
        torch.cat(bits.parts),
        None if K else torch.tensor(before, dtype=torch.uint8),
        None if K else torch.cat(tiles.parts),
        lengths,
        keys.at,
        rows.at,
        bits.at,
        tiles.at,
        S,
        K,
        longest=int(lengths.max()) if lengths.numel() else 0,
        held=int(lengths.expand(-1, Hkv).sum()),
        exact=True,
        ints=ints,
    )


def int_segment(k, z, mask, count, fmt: IntFormat, h: int) -> tuple[torch.Tensor, ...]:
    """Keys, their scales, rows and values' scales of one segment: k, z (n, D), mask (n, S)."""
    n = len(k)
    block = torch.arange(n) // fmt.block
    keys, key_scale = quantise_keys(k, block, cdiv(n, fmt.block), fmt.key_bits)
    if fmt.value_bits:
        rows, scale = quantise_values(z, mask, fmt.value_bits)
        return keys, key_scale, rows[mask], scale
    gain = fmt.gain[h].cpu().expand(n, -1)
    first = count.cumsum(0) - count
    return keys, key_scale, *quantise_levels(z, mask, first, int(count.sum()), gain)


def window_view(
    k: torch.Tensor, v: torch.Tensor, first: list[int] | None, count: list[int]
) -> WindowView:
    """Slots k, v (B, Hkv, W, D), of which count hold a token, from slot `first` on; None: slot 0.
    The others are NaN."""
    k = k.clone()
    v = v.clone()
    W = k.size(2)
    for b in range(len(k)):
        for slot in range(W):
            if (slot - (first[b] if first else 0)) % W >= count[b]:
                k[b, :, slot] = NAN
                v[b, :, slot] = NAN
    first = None if first is None else torch.tensor(first)
    return WindowView(k, v, first, torch.tensor(count))


def to_device(view, device: torch.device):
    """Move a view with everything in it."""
    moved = []
    for x in view:
        if isinstance(x, torch.Tensor):
            x = x.to(device)
        elif isinstance(x, (Ints, IntFormat)):
            x = to_device(x, device)
        moved.append(x)
    return type(view)(*moved)


def finite(window: WindowView) -> WindowView:
    """The window with zeros for NaN: plain code multiplies what it does not read by 0."""
    return window._replace(k=window.k.nan_to_num(), v=window.v.nan_to_num())
