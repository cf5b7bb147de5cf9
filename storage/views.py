"""What a packed cache hands to attention, and attention over it in plain PyTorch: the specification
of kernels.py.

Group g of token t lies in row offset(t) + popcount(mask_t & ((1 << g) - 1)) (layout.py). Keys and
rows may be integers (storage/integers/format.py).

Letters: B sequences, H heads, Hkv KV heads, Hm mask heads (1 or Hkv), n = H/Hkv, D head dimension,
S groups, d = D/S, T queries, W tail slots, P sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.integers.format import (
    Ints,
    dequantise_keys,
    dequantise_levels,
    dequantise_values,
    join_levels,
)
from storage.layout import at_least_float32, bits_to_mask, mask_to_bits, tile_size


class Packed(NamedTuple):
    """One layer's packed tokens. Segment (sequence, head) holds n tokens: keys and rows from
    token_base and row_base on, masks (and what counts rows, where every token may keep another
    number: k = 0) from mask_base and tile_base on."""

    keys: Tensor  # (slots, D)
    rows: Tensor  # (row slots, d)
    bits: Tensor  # (mask slots,) layout.mask_dtype
    before: Tensor | None  # (mask slots,) uint8, rows of its tile before each token
    tile_rows: Tensor | None  # (tiles,) int32, the segment's rows before each tile
    n: Tensor  # (B, Hm) int64 tokens
    token_base: Tensor  # (B, Hkv) int64, like row_base
    row_base: Tensor
    mask_base: Tensor  # (B, Hm) int64, like tile_base
    tile_base: Tensor
    n_groups: int
    k: int  # groups every token keeps; 0: see before and tile_rows
    longest: int  # no segment holds more tokens
    held: int  # tokens of all segments: what work is divided by
    exact: bool = False  # whether `held` is no less than that
    # how keys and rows are bytes; with levels the bits are those of 2 S groups, and a row is a unit
    ints: Ints | None = None

    @property
    def levelled(self) -> bool:
        """Whether every group has a level of its own."""
        return self.ints is not None and not self.ints.fmt.value_bits

    @property
    def tile(self) -> int:
        """Tokens per entry of tile_rows."""
        return tile_size(self.n_groups * (4 if self.levelled else 1))

    def masks(self) -> tuple[Tensor, Tensor]:
        """Left-aligned: mask (B, Hm, N, S) bool, or levels, uint8, and valid (B, Hm, N) bool, slots
        that hold a token; N: the largest count."""
        N = int(self.n.max()) if self.n.numel() else 0
        valid = torch.arange(N, device=self.n.device) < self.n.unsqueeze(-1)  # (B, Hm, N)
        b, h, t = valid.nonzero(as_tuple=True)
        mask = torch.zeros(
            *valid.shape,
            self.n_groups,
            dtype=torch.uint8 if self.levelled else torch.bool,
            device=self.n.device,
        )
        word = self.bits[self.mask_base[b, h] + t]
        mask[b, h, t] = (
            join_levels(bits_to_mask(word, 2 * self.n_groups))
            if self.levelled
            else bits_to_mask(word, self.n_groups)
        )
        return mask, valid

    def unpack(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Dense and left-aligned: k (B, Hkv, N, D), z (B, Hkv, N, D) with zeros where dropped, mask
        and valid as in masks; slots without a token are zeros. dtype: of what integers become
        (None: what they were made of)."""
        (B, Hkv) = self.token_base.shape
        S = self.n_groups
        tile = self.tile
        (mask, valid) = self.masks()
        ints = self.ints
        N = valid.size(-1)
        b, h, t = valid.nonzero(as_tuple=True)
        at = self.mask_base[b, h] + t
        offset = torch.zeros(valid.shape, dtype=torch.int64, device=self.n.device)
        offset[b, h, t] = (
            t * self.k
            if self.k
            else self.tile_rows[self.tile_base[b, h] + t // tile].long() + self.before[at].long()
        )
        first = self.row_base[..., None] + offset  # (B, Hkv, N)
        row = first.unsqueeze(-1) + mask.long().cumsum(-1) - mask.long()  # (B, Hkv, N, S)
        b, h, t = valid.expand(-1, Hkv, -1).nonzero(as_tuple=True)
        slot = self.token_base[b, h] + t
        kept = mask.expand(-1, Hkv, -1, -1)
        if ints is None:
            k = self.keys.new_zeros(B, Hkv, N, self.keys.size(-1))
            z = self.rows.new_zeros(B, Hkv, N, S, self.rows.size(-1))
            k[b, h, t] = self.keys[slot]
            z[kept] = self.rows[row[kept]]
            return k, z.flatten(-2), mask, valid
        dtype = dtype or ints.dtype
        D = ints.key_scale.size(-1)
        k, z = torch.zeros(2, B, Hkv, N, D, dtype=dtype, device=self.n.device)
        k[b, h, t] = dequantise_keys(
            self.keys[slot],
            ints.key_scale,
            ints.block_base[b, h] + t // ints.fmt.block,
            ints.fmt.key_bits,
            dtype,
        )
        if self.levelled:
            z[b, h, t] = dequantise_levels(
                self.rows,
                kept[b, h, t],
                first[b, h, t],
                ints.value_scale[slot],
                ints.fmt.gain[h],
                dtype,
            )
        else:
            scale = torch.zeros(B, Hkv, N, S, 2, dtype=torch.float16, device=z.device)
            scale[b, h, t] = ints.value_scale[slot].unsqueeze(1)
            z.view(B, Hkv, N, S, D // S)[kept] = dequantise_values(
                self.rows[row[kept]], scale[kept], ints.fmt.value_bits, dtype
            )
        return k, z, mask, valid

    @staticmethod
    def of_whole(k: Tensor, v: Tensor, n: Tensor) -> Packed:
        """Whole values, k, v (B, Hkv, N, D) of which the first n (B, Hm) tokens of a segment count:
        one group, always kept."""
        B, Hkv, N, D = k.shape
        base = torch.arange(B * Hkv, device=k.device).view(B, Hkv) * N
        mask_base = torch.arange(n.numel(), device=k.device).view(n.shape) * N
        bits = torch.ones(n.numel() * N, dtype=torch.uint8, device=k.device)
        return Packed(
            k.reshape(-1, D),
            v.reshape(-1, D),
            bits,
            None,
            None,
            n,
            base,
            base,
            mask_base,
            mask_base,
            1,
            1,
            N,
            B * Hkv * N,
        )


class Tail(NamedTuple):
    """Tokens with whole values: k, v (B, Hkv, W, D); sequence b holds the count[b] ones in slots
    first[b], first[b] + 1, ... modulo W, oldest first. first, count (B,) int64."""

    k: Tensor
    v: Tensor
    first: Tensor
    count: Tensor

    def order(self) -> Tensor:
        """Number of the token in each slot, oldest 0, count or more where there is none: (B, W)
        int64."""
        W = max(self.k.size(2), 1)
        return (torch.arange(self.k.size(2), device=self.k.device) - self.first[:, None]) % W


class Sums(NamedTuple):
    """Which packed tokens each of P attention sums takes: those with mask & select == want. select,
    want (P,) int64; the first takes all (0, 0), and only it the tail."""

    select: Tensor
    want: Tensor


def packed_attention_ref(
    q: Tensor, packed: Packed | None, tail: Tail | None, sums: Sums | None = None
) -> tuple[Tensor, Tensor]:
    """packed_attention by unpacking everything: the specification."""
    B, H, T, D = q.shape
    keys = []
    values = []
    seen = []
    takes = []
    Hkv = (packed.token_base if packed else tail.k).size(1)
    if packed:
        k, z, mask, valid = packed.unpack(q.dtype)
        keys = [k]
        values = [z]
        seen = [valid[:, :, None].expand(-1, Hkv, T, -1)]
        if sums:
            bits = mask_to_bits(mask).long().expand(-1, Hkv, -1)[:, :, None]  # (B, Hkv, 1, N)
            takes = [((bits & s) == w) for s, w in zip(sums.select, sums.want, strict=True)]
    if tail:
        order = tail.order()[:, None]  # (B, 1, W)
        # (B, T, 1) what each query may read
        last = tail.count[:, None, None] - T + torch.arange(T, device=q.device)[:, None]
        keys = [*keys, tail.k]
        values = [*values, tail.v]
        seen.append(
            ((order <= last) & (order < tail.count[:, None, None]))[:, None].expand(-1, Hkv, -1, -1)
        )
        takes = [F.pad(t, (0, order.size(-1)), value=i == 0) for i, t in enumerate(takes)]
    k = torch.cat(keys, 2)
    v = torch.cat(values, 2)
    seen = torch.cat(seen, -1).unsqueeze(2)  # (B, Hkv, 1, T, L)
    # (B, Hkv, n, T, L)
    s = at_least_float32((q * D**-0.5).view(B, Hkv, -1, T, D) @ k.unsqueeze(2).mT).masked_fill(
        ~seen, float("-inf")
    )
    lse = s.logsumexp(-1)
    p = (s - lse.clamp_min(torch.finfo(s.dtype).min).unsqueeze(-1)).exp().to(v.dtype)
    out = [(p * t.unsqueeze(2) if takes else p) @ v.unsqueeze(2) for t in takes or [None]]
    return (
        torch.stack(out, -2).view(B, H, T, -1, D) if sums else out[0].view(B, H, T, D)
    ), lse.view(B, H, T)


def merged(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over what several calls of packed_attention read apart, (out, lse) each: (B, H,
    T, D). Where none read a thing: 0."""
    lse = torch.stack([p[1] for p in parts])
    weight = (lse - lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)).exp()
    weight = weight / weight.sum(0).clamp_min(torch.finfo(lse.dtype).tiny)
    return sum(out * w.unsqueeze(-1) for (out, _), w in zip(parts, weight, strict=True)).to(
        parts[0][0].dtype
    )
