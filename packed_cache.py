"""The one storage format for value groups: what a layer keeps of its tokens, and nothing else.

Per layer, flat and ragged by (sequence, KV head): whole keys, the kept value rows, a mask per token, a row offset per tile of tokens,
and a dense tail of the newest tokens. kernels.py has the layout of rows and masks. `KVCache` in model.py holds one of these per layer.

Letters: B sequences, Hkv KV heads, Hm mask heads (1 or Hkv), D head dimension, S groups, K kept per token, T new tokens, N stored.
"""
from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from config import KVConfig, check
from kernels import TILE, bits_to_mask, mask_dtype, mask_to_bits, row_numbers
from model import storage_bytes


def compressed(seen: Tensor, tail: int, block: int) -> Tensor:
    """Tokens compressed once `seen` (int64, any shape) have been seen, with a tail of at least `tail`, compressed `block` at a time."""
    return ((seen - tail).div(block, rounding_mode="floor") * block).clamp_min(0)


class PackedCache:
    """One layer's cache: whole keys, kept value rows only, one mask per token, and a dense tail of the newest tokens.

    Flat and ragged by (sequence, KV head); padding is not stored. Packed part: keys (slots, D); rows (row slots, D/S), token-major,
    group-minor; bits (mask slots,), one mask per token, shared by the KV heads when mask_heads = 1; tile_rows (tiles,) int32, the
    rows before each tile of TILE tokens, shared likewise. Segment starts follow from the capacities: every segment has the same.
    Tail: k, v, bits of the tokens not yet compressed. A sequence that has seen n tokens has compressed
    max(0, (n - tail) // block * block) of them. Capacity grows by a quarter when it is passed; ask for enough to avoid the copy."""

    def __init__(self, batch: int, max_len: int, n_kv_head: int, head_dim: int, cfg: KVConfig, k: int, like: Tensor):
        self.Hkv, self.D, self.S, self.k = n_kv_head, head_dim, cfg.n_groups, k
        self.mask_heads = n_kv_head if cfg.mask_scope == "head" else 1
        self.tail, self.block = cfg.kv_tail, cfg.kv_tail_block
        self.n_packed = torch.zeros(batch, dtype=torch.int64, device=like.device)  # compressed tokens per sequence
        self.n_tail = torch.zeros_like(self.n_packed)
        self.cap, self.columns = 0, 0  # token slots per segment; columns seen, padding included
        width = self.tail + self.block - 1
        self.tail_k = like.new_zeros(batch, n_kv_head, width, head_dim)
        self.tail_v = torch.zeros_like(self.tail_k)
        self.tail_bits = torch.zeros(batch, self.mask_heads, width, dtype=mask_dtype(self.S), device=like.device)
        self._allocate(max(0, max_len - self.tail), like)

    @property
    def B(self) -> int:
        """Sequences held."""
        return self.n_packed.numel()

    def _allocate(self, cap: int, like: Tensor) -> None:
        B, Hkv, Hm = self.B, self.Hkv, self.mask_heads
        self.keys = like.new_zeros(B * Hkv * cap, self.D)
        self.rows = like.new_zeros(B * Hkv * cap * self.k, self.D // self.S)
        self.bits = torch.zeros(B * Hm * cap, dtype=mask_dtype(self.S), device=like.device)
        self.tile_rows = torch.zeros(B * Hm * -(-cap // TILE), dtype=torch.int32, device=like.device)
        self.cap = cap

    def _grow(self, need: int) -> None:
        old, cap = (self.keys, self.rows, self.bits, self.tile_rows), self.cap
        self._allocate(max(need, cap + cap // 4), self.keys)
        for new, t, segments in zip((self.keys, self.rows, self.bits, self.tile_rows), old,
                                    (self.B * self.Hkv, self.B * self.Hkv, self.B * self.mask_heads, self.B * self.mask_heads), strict=True):
            if t.numel():
                t = t.view(segments, -1, *t.shape[1:])
                new.view(segments, -1, *new.shape[1:])[:, :t.size(1)] = t

    def nbytes(self) -> int:
        """Bytes of every tensor held, counts, offsets and unused capacity included."""
        return storage_bytes(self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name: what save writes and nbytes counts."""
        return {n: getattr(self, n) for n in ("keys", "rows", "bits", "tile_rows", "n_packed", "n_tail", "tail_k", "tail_v", "tail_bits")}

    def _segment(self, heads: int, cap: int) -> Tensor:
        """First slot of each (sequence, head) segment, (B, heads, 1) int64."""
        return (torch.arange(self.B * heads, device=self.bits.device) * cap).view(self.B, heads, 1)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed part and tail as dense tensors, left-aligned: k (B, Hkv, N, D), v with zeros where dropped, mask (B, 1 or Hkv, N, S).

        N is the longest sequence's token count; tail tokens have their whole v and the mask they will be packed with; slots past
        a sequence's own count hold zeros."""
        N = int((self.n_packed + self.n_tail).max()) if self.B else 0
        t = torch.arange(N, device=self.bits.device)
        packed = (t < self.n_packed[:, None])[:, None]  # (B, 1, N)
        mask = bits_to_mask(self.bits[(self._segment(self.mask_heads, self.cap) + t)[packed.expand(-1, self.mask_heads, -1)]], self.S)
        full = torch.zeros(self.B, self.mask_heads, N, self.S, dtype=torch.bool, device=t.device)
        full[packed.expand(-1, self.mask_heads, -1)] = mask
        k = self.keys.new_zeros(self.B, self.Hkv, N, self.D)
        here = packed.expand(-1, self.Hkv, -1)
        k[here] = self.keys[(self._segment(self.Hkv, self.cap) + t)[here]]
        v = self.keys.new_zeros(self.B, self.Hkv, N, self.S, self.D // self.S)
        kept = full.expand(-1, self.Hkv, -1, -1)
        v[kept] = self.rows[self._row_index(full, t)[kept]]
        v = v.flatten(-2)
        tail = torch.arange(self.tail_k.size(2), device=t.device) < self.n_tail[:, None]  # (B, width)
        b, s = tail.nonzero(as_tuple=True)
        at = self.n_packed[b] + s
        k[b, :, at], v[b, :, at], full[b, :, at] = self.tail_k[b, :, s], self.tail_v[b, :, s], bits_to_mask(self.tail_bits[b, :, s], self.S)
        return k, v, full

    def _row_index(self, mask: Tensor, t: Tensor) -> Tensor:
        """Row slot of every (token, group), (B, Hkv, N, S) int64: segment + the tile's offset + pairs before it inside the tile."""
        Hm, N = self.mask_heads, t.numel()
        number = row_numbers(mask)  # (B, Hm, N, S), counted from the sequence's first token
        first = number[:, :, ::TILE, :1].repeat_interleave(TILE, 2)[:, :, :N]  # the same count at the tile's first token
        tiles = -(-self.cap // TILE)
        offset = self.tile_rows[self._segment(Hm, tiles) + (t // TILE).clamp_max(max(tiles - 1, 0))] if tiles else first[..., 0]
        inside = number - first  # (B, Hm, N, S)
        return self._segment(self.Hkv, self.cap * self.k)[..., None] + (offset.unsqueeze(-1) + inside)

    def append(self, k: Tensor, v: Tensor, mask: Tensor, n_pad: Tensor, encode: Callable[[Tensor], Tensor] = lambda v: v) -> None:
        """Take T new tokens: k, v (B, Hkv, T, D), mask (B, 1 or Hkv, T, S) bool; the first n_pad (B,) of each row are padding.
        encode: what a value (B, Hkv, W, D) goes through when it is compressed, before its groups are taken."""
        n_new = k.size(2) - n_pad
        count = self.n_tail + n_new  # tokens not yet compressed
        seen = self.n_packed + count
        total = compressed(seen, self.tail, self.block).maximum(self.n_packed)
        width = int(count.max())
        slot = torch.arange(width, device=k.device)
        valid = slot < count[:, None]  # (B, width): tail first, then the new tokens, left-aligned
        source = torch.where(slot < self.n_tail[:, None], slot, self.tail_k.size(2) + n_pad[:, None] + slot - self.n_tail[:, None])
        source = source.clamp_max(self.tail_k.size(2) + k.size(2) - 1)  # (B, width) into [tail | new]

        def left_align(a: Tensor, b: Tensor) -> Tensor:  # (B, h, ., x) twice -> (B, h, width, x)
            both = torch.cat((a, b), 2)
            return both.gather(2, source[:, None, :, None].expand(-1, both.size(1), -1, both.size(3)))

        bits = left_align(self.tail_bits.unsqueeze(-1), mask_to_bits(mask).unsqueeze(-1)).squeeze(-1)  # (B, Hm, width)
        k, v = left_align(self.tail_k, k), left_align(self.tail_v, v)
        goes = total - self.n_packed  # (B,) tokens that are compressed now
        self._pack(k, v, bits, goes, encode)
        self.n_tail = count - goes
        stays = valid & (slot >= goes[:, None])
        b, s = stays.nonzero(as_tuple=True)
        to = s - goes[b]
        self.tail_k[b, :, to], self.tail_v[b, :, to], self.tail_bits[b, :, to] = k[b, :, s], v[b, :, s], bits[b, :, s]

    def _pack(self, k: Tensor, v: Tensor, bits: Tensor, goes: Tensor, encode: Callable[[Tensor], Tensor]) -> None:
        """Compress the first goes (B,) tokens of the left-aligned k, v (B, Hkv, W, D), bits (B, Hm, W)."""
        width = int(goes.max()) if self.B else 0
        if width == 0:
            return
        if int((self.n_packed + goes).max()) > self.cap:
            self._grow(int((self.n_packed + goes).max()))
        t = torch.arange(width, device=k.device)
        packed = (t < goes[:, None])[:, None]  # (B, 1, width)
        at = self.n_packed[:, None, None] + t  # (B, 1, width) token number in its sequence
        rows_before = (self.n_packed * self.k)[:, None, None]  # every packed token keeps K rows
        mask = bits_to_mask(bits[:, :, :width], self.S) & packed.unsqueeze(-1)
        here, mine = packed.expand(-1, self.Hkv, -1), packed.expand(-1, self.mask_heads, -1)
        self.keys[(self._segment(self.Hkv, self.cap) + at)[here]] = k[:, :, :width][here]
        self.bits[(self._segment(self.mask_heads, self.cap) + at)[mine]] = bits[:, :, :width][mine]
        number = rows_before.unsqueeze(-1) + row_numbers(mask)  # (B, Hm, width, S)
        kept = mask.expand(-1, self.Hkv, -1, -1)
        index = (self._segment(self.Hkv, self.cap * self.k)[..., None] + number)[kept]
        self.rows[index] = encode(v[:, :, :width]).unflatten(-1, (self.S, -1))[kept]
        starts = mine & (at % TILE == 0)
        self.tile_rows[(self._segment(self.mask_heads, -(-self.cap // TILE)) + at // TILE)[starts]] = number[..., 0][starts].int()
        self.n_packed = self.n_packed + goes

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {"cap": self.cap, "columns": self.columns}

    def slice(self, rows: list[int]) -> PackedCache:
        """A copy that holds the sequences `rows` only, in that order."""
        out = copy.copy(self)
        pick = torch.tensor(rows, device=self.bits.device)
        for name, t in self.tensors().items():
            per_row = t.view(self.B, t.size(0) // self.B, *t.shape[1:])
            setattr(out, name, per_row[pick].reshape(-1, *t.shape[1:]))
        return out

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first n_tokens of every sequence (padding not counted). What was compressed stays compressed."""
        check(n_tokens >= 0, f"truncating to {n_tokens} tokens", "0 or more", "give the number of tokens to keep")
        seen = (self.n_packed + self.n_tail).clamp_max(n_tokens)
        self.n_packed = self.n_packed.clamp_max(n_tokens)
        self.n_tail = seen - self.n_packed
