"""The one storage format for value groups: what a layer keeps of its tokens, and nothing else.

Per layer, flat and ragged by (sequence, KV head): whole keys, the kept value rows, a mask per token, a row offset per tile of tokens,
and a dense tail of the newest tokens. kernels.py has the layout of rows and masks. `KVCache` in model.py holds one of these per layer:

* PackedCache: K groups of every token, packed as the tokens leave the tail; segments have the same capacity and grow;
* SelectedCache: a context packed once, whole tokens dropped too, segments of their own exact sizes; what follows stays in the tail.

Letters: B sequences, Hkv KV heads, Hm mask heads (1 or Hkv), D head dimension, S groups, d = D/S numbers in a row, K kept per token,
C columns of a context, T new tokens, N stored.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from config import KVConfig, check
from kernels import TILE, bits_to_mask, mask_dtype, mask_to_bits, row_numbers
from model import storage_bytes


def compressed(seen: Tensor, tail: int, block: int) -> Tensor:
    """Tokens compressed once `seen` (int64, any shape) have been seen, with a tail of at least `tail`, compressed `block` at a time."""
    return ((seen - tail).div(block, rounding_mode="floor") * block).clamp_min(0)


class Flat:
    """What both caches share: the flat tensors keys (., D), rows (., d), bits, tile_rows, and how they are read. Heads that share one
    mask (Hm = 1) share its bits and tile_rows. A subclass names the tensors it holds in NAMES."""

    NAMES: tuple[str, ...] = ()

    @property
    def B(self) -> int:
        """Sequences held."""
        return self.n_packed.size(0)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name: what save writes and nbytes counts."""
        return {n: getattr(self, n) for n in self.NAMES}

    def nbytes(self) -> int:
        """Bytes of every tensor held, counts, offsets and unused capacity included; of views (pack_layers) the whole they belong to."""
        return storage_bytes(self.tensors().values())

    def _read_mask(self, count: Tensor, mask_base: Tensor, N: int) -> Tensor:
        """Masks of the first count (B, Hm) tokens of segments that start at mask_base (B, Hm): bool (B, Hm, N, S), False past them."""
        b, h, t = (torch.arange(N, device=count.device) < count.unsqueeze(-1)).nonzero(as_tuple=True)
        mask = torch.zeros(*count.shape, N, self.S, dtype=torch.bool, device=count.device)  # (B, Hm, N, S)
        mask[b, h, t] = bits_to_mask(self.bits[mask_base[b, h] + t], self.S)
        return mask

    def _read(self, count: Tensor, bases: list[Tensor], N: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first count (B, Hm) packed tokens of every segment, dense and left-aligned: k (B, Hkv, N, D), z (B, Hkv, N, D) with zeros
        where dropped, mask (B, Hm, N, S). bases: first slots in keys and rows (B, Hkv), in bits and tile_rows (B, Hm), int64."""
        token_base, row_base, mask_base, tile_base = bases
        Hkv, mask = token_base.size(1), self._read_mask(count, mask_base, N)
        here = torch.arange(N, device=count.device) < count.unsqueeze(-1)  # (B, Hm, N)
        b, h, t = here.nonzero(as_tuple=True)
        offset = torch.zeros(here.shape, dtype=torch.int64, device=count.device)
        offset[b, h, t] = self.tile_rows[tile_base[b, h] + t // TILE].long()
        number = row_numbers(mask)  # (B, Hm, N, S), counted from the segment's first token
        first = number[:, :, ::TILE, :1].repeat_interleave(TILE, 2)[:, :, :N]  # the same count at the tile's first token
        row = row_base[..., None, None] + (offset.unsqueeze(-1) + number - first)  # (B, Hkv, N, S) segment, tile, inside the tile
        b, h, t = here.expand(-1, Hkv, -1).nonzero(as_tuple=True)
        k = self.keys.new_zeros(self.B, Hkv, N, self.D)
        k[b, h, t] = self.keys[token_base[b, h] + t]
        z = self.keys.new_zeros(self.B, Hkv, N, self.S, self.D // self.S)
        kept = mask.expand(-1, Hkv, -1, -1)
        z[kept] = self.rows[row[kept]]
        return k, z.flatten(-2), mask


class PackedCache(Flat):
    """One layer's cache: whole keys, kept value rows only, one mask per token, and a dense tail of the newest tokens.

    Flat and ragged by (sequence, KV head); padding is not stored. Packed part: keys (slots, D); rows (row slots, D/S), token-major,
    group-minor; bits (mask slots,), one mask per token, shared by the KV heads when mask_heads = 1; tile_rows (tiles,) int32, the
    rows before each tile of TILE tokens, shared likewise. Segment starts follow from the capacities: every segment has the same.
    Tail: k, v, bits of the tokens not yet compressed. A sequence that has seen n tokens has compressed
    max(0, (n - tail) // block * block) of them. Capacity grows by a quarter when it is passed; ask for enough to avoid the copy."""

    NAMES = ("keys", "rows", "bits", "tile_rows", "n_packed", "n_tail", "tail_k", "tail_v", "tail_bits")

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

    def _segment(self, heads: int, cap: int) -> Tensor:
        """First slot of each (sequence, head) segment, (B, heads, 1) int64."""
        return (torch.arange(self.B * heads, device=self.bits.device) * cap).view(self.B, heads, 1)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed part and tail as dense tensors, left-aligned: k (B, Hkv, N, D), v with zeros where dropped, mask (B, 1 or Hkv, N, S).

        N is the longest sequence's token count; tail tokens have their whole v and the mask they will be packed with; slots past
        a sequence's own count hold zeros."""
        N = int((self.n_packed + self.n_tail).max()) if self.B else 0
        bases = [self._segment(h, cap)[..., 0] for h, cap in ((self.Hkv, self.cap), (self.Hkv, self.cap * self.k), (self.mask_heads, self.cap),
                                                              (self.mask_heads, -(-self.cap // TILE)))]
        k, v, full = self._read(self.n_packed[:, None].expand(-1, self.mask_heads), bases, N)
        tail = torch.arange(self.tail_k.size(2), device=k.device) < self.n_tail[:, None]  # (B, width)
        b, s = tail.nonzero(as_tuple=True)
        at = self.n_packed[b] + s
        k[b, :, at], v[b, :, at], full[b, :, at] = self.tail_k[b, :, s], self.tail_v[b, :, s], bits_to_mask(self.tail_bits[b, :, s], self.S)
        return k, v, full

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


def starts(count: Tensor) -> Tensor:
    """First slot of every segment when segments of count (B, h) int64 slots lie one after the other: (B, h) int64."""
    flat = count.flatten()  # (B * h,)
    return (flat.cumsum(0) - flat).view(count.shape)


def slots(base: Tensor, count: Tensor) -> Tensor:
    """The slots base to base + count - 1 of every segment, one segment after the other: (B, h) int64 twice -> (count.sum(),) int64."""
    total = int(count.sum())
    shift = (base - starts(count)).flatten().repeat_interleave(count.flatten(), output_size=total)
    return torch.arange(total, device=base.device) + shift


class SelectedCache(Flat):
    """One layer's cache for query-aware selection: a context packed once, tokens dropped too, then a dense tail that stays whole.

    Packed part, segments sequence-major, then head, each exactly as long as what it keeps: keys (n_tokens, D); rows (n_rows, d),
    token-major, group-minor; bits (n_masks,), one per surviving token; positions (n_masks,), their columns, int16 where max_len allows,
    empty if no token but padding was dropped: then survivor i of sequence b is column n_pad[b] + i; tile_rows (tiles,) int32, the
    segment's rows before each TILE of its survivors. A survivor may have no rows. Per segment, int64: n_packed and n_rows (B, Hm), its
    survivors and rows; its first slots token_base and row_base (B, Hkv), mask_base and tile_base (B, Hm).
    Tail: tail_k, tail_v (B, Hkv, cap, D), of which tail_len columns are filled, the first tail_pad (B,) of them padding."""

    LAYOUT = ("bits", "positions", "tile_rows", "n_packed", "n_rows", "n_pad", "token_base", "row_base", "mask_base", "tile_base")
    NAMES = ("keys", "rows", *LAYOUT, "tail_k", "tail_v", "tail_pad")

    def __init__(self, batch: int, max_len: int, n_kv_head: int, head_dim: int, n_groups: int, mask_heads: int, like: Tensor):
        check(mask_heads in (1, n_kv_head), f"mask_heads={mask_heads}", f"1 or the {n_kv_head} KV heads", "give one of them")
        self.Hkv, self.D, self.S, self.mask_heads, self.max_len = n_kv_head, head_dim, n_groups, mask_heads, max_len
        self.n_context = self.tail_len = 0  # columns packed, padding included; columns in the tail

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        self.keys, self.rows = like.new_zeros(0, head_dim), like.new_zeros(0, head_dim // n_groups)
        self.bits, self.tile_rows = zeros(0, dtype=mask_dtype(n_groups)), zeros(0, dtype=torch.int32)
        self.positions = zeros(0, dtype=torch.int16 if max_len <= 32767 else torch.int32)
        self.n_packed, self.n_rows, self.n_pad, self.tail_pad = zeros(batch, mask_heads), zeros(batch, mask_heads), zeros(batch), zeros(batch)
        self._set_bases()
        self.tail_k, self.tail_v = like.new_zeros(2, batch, n_kv_head, 0, head_dim)

    @property
    def columns(self) -> int:
        """Columns seen so far, padding included."""
        return self.n_context + self.tail_len

    def _set_bases(self) -> None:
        """Segment starts for segments without gaps, from n_packed and n_rows."""
        self.token_base, self.row_base = (starts(n.expand(-1, self.Hkv)) for n in (self.n_packed, self.n_rows))
        self.mask_base, self.tile_base = starts(self.n_packed), starts(-(-self.n_packed // TILE))

    def pack(self, k: Tensor, z: Tensor, keep: Tensor, mask: Tensor, valid: Tensor, bits_from: SelectedCache | None = None) -> None:
        """Store a context of C columns: k and encoded values z (B, Hkv, C, D), of which the tokens keep (B, Hm, C) bool survive, each with
        its key and the groups of mask (B, Hm, C, S) bool. valid (B, C) bool: False for padding, which is on the left and never stored.
        bits_from: a cache packed with the same keep, mask and valid, whose masks, positions, offsets and counts serve this one too."""
        B, C = valid.shape
        assert self.columns == 0, f"pack on a cache of {self.columns} columns; a context is packed once, before anything else"
        assert self.max_len >= C, f"a context of {C} columns in a cache of max_len={self.max_len}"
        assert not (valid[:, :-1] & ~valid[:, 1:]).any(), "padding right of a token; it must be on the left"
        keep = keep & valid[:, None]  # (B, Hm, C)
        mask = mask & keep.unsqueeze(-1)  # (B, Hm, C, S)
        if bits_from is None:
            self._lay_out(keep, mask, valid)
        else:
            same = torch.equal(bits_from.n_packed, keep.sum(-1)) and torch.equal(bits_from.n_rows, mask.sum((-2, -1)))
            assert same and bits_from.token_base.shape == (B, self.Hkv), "bits_from was packed with another keep or mask, or was truncated"
            for name in self.LAYOUT:
                setattr(self, name, getattr(bits_from, name))
        self.keys = k[keep.expand(-1, self.Hkv, -1)].to(self.keys.dtype)  # (n_tokens, D)
        kept = mask.expand(-1, self.Hkv, -1, -1).reshape(-1)  # (B * Hkv * C * S,) flat: one index per row, not four
        self.rows = z.reshape(-1, self.D // self.S)[kept].to(self.rows.dtype)  # (n_rows, d)
        self.n_context = C

    def _lay_out(self, keep: Tensor, mask: Tensor, valid: Tensor) -> None:
        """Build the tensors of LAYOUT from keep (B, Hm, C), mask (B, Hm, C, S), both False where not valid (B, C)."""
        self.bits = mask_to_bits(mask[keep])  # (n_masks,)
        if (valid[:, None] & ~keep).any():
            self.positions = torch.arange(keep.size(-1), device=keep.device).expand_as(keep)[keep].to(self.positions.dtype)  # (n_masks,)
        rows = mask.sum(-1)  # (B, Hm, C) of each token
        tile_first = keep & ((keep.cumsum(-1) - 1) % TILE == 0)
        self.tile_rows = (rows.cumsum(-1) - rows)[tile_first].int()  # (tiles,)
        self.n_packed, self.n_rows, self.n_pad = keep.sum(-1), rows.sum(-1), (~valid).sum(-1)
        self._set_bases()

    def append(self, k: Tensor, v: Tensor, n_pad: Tensor) -> None:
        """Take T new columns, whole: k, v (B, Hkv, T, D); the first n_pad (B,) of each row are padding, and so are all before them."""
        end = self.tail_len + k.size(2)
        cap = self.tail_k.size(2)
        if end > cap:
            cap = max(end, cap + cap // 4 if cap else self.max_len - self.n_context)
            for name in ("tail_k", "tail_v"):
                new = self.keys.new_zeros(self.B, self.Hkv, cap, self.D)
                new[:, :, :self.tail_len] = getattr(self, name)[:, :, :self.tail_len]
                setattr(self, name, new)
        self.tail_k[:, :, self.tail_len:end], self.tail_v[:, :, self.tail_len:end] = k, v
        self.tail_pad = torch.where(n_pad > 0, self.tail_len + n_pad, self.tail_pad)
        self.tail_len = end

    def _survivors(self) -> Tensor:
        """Which of the N slots of each segment hold a survivor, N the largest count: (B, Hm, N) bool."""
        N = int(self.n_packed.max()) if self.n_packed.numel() else 0
        return torch.arange(N, device=self.bits.device) < self.n_packed.unsqueeze(-1)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The packed part, dense and left-aligned by segment: k (B, Hkv, N, D), z (B, Hkv, N, D) with zeros where dropped,
        mask (B, Hm, N, S) bool, valid (B, Hm, N) bool: slots that hold a survivor; the rest are zeros. N: the largest count."""
        valid = self._survivors()
        k, z, mask = self._read(self.n_packed, [self.token_base, self.row_base, self.mask_base, self.tile_base], valid.size(-1))
        return k, z, mask, valid

    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the filled part of the tail: k, v (B, Hkv, n, D), and valid (B, n) bool, False for padding."""
        valid = torch.arange(self.tail_len, device=self.tail_pad.device) >= self.tail_pad[:, None]
        return self.tail_k[:, :, :self.tail_len], self.tail_v[:, :, :self.tail_len], valid

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {"max_len": self.max_len, "n_context": self.n_context, "tail_len": self.tail_len}

    def slice(self, rows: list[int]) -> SelectedCache:
        """A copy that holds the sequences `rows` only, in that order, its packed part exactly sized; it shares nothing."""
        out, pick = copy.copy(self), torch.tensor(rows, dtype=torch.int64, device=self.bits.device)
        for name in ("n_packed", "n_rows", "n_pad", "tail_k", "tail_v", "tail_pad"):
            setattr(out, name, getattr(self, name)[pick])
        masks = slots(self.mask_base[pick], out.n_packed)
        out.keys = self.keys[slots(self.token_base[pick], out.n_packed.expand(-1, self.Hkv))]
        out.rows = self.rows[slots(self.row_base[pick], out.n_rows.expand(-1, self.Hkv))]
        out.bits, out.positions = self.bits[masks], self.positions[masks] if self.positions.numel() else self.positions.clone()
        out.tile_rows = self.tile_rows[slots(self.tile_base[pick], -(-out.n_packed // TILE))]
        out._set_bases()
        return out

    def truncate(self, n_columns: int) -> None:
        """Forget the columns from n_columns on (padding counted). Packed slots are given up, not freed; slice([...]) frees them."""
        check(n_columns >= 0, f"truncating to {n_columns} columns", "0 or more", "give the number of columns to keep")
        self.tail_len = min(self.tail_len, max(0, n_columns - self.n_context))
        self.tail_pad = self.tail_pad.clamp_max(self.tail_len)
        if n_columns >= self.n_context:
            return
        held = self._survivors()  # (B, Hm, N)
        slot = torch.arange(held.size(-1), device=held.device)
        column = (self.n_pad[:, None, None] + slot).expand_as(held)
        if self.positions.numel():
            column = self.positions[(self.mask_base.unsqueeze(-1) + slot).clamp_max(self.positions.numel() - 1)]  # (B, Hm, N)
        held = held & (column < n_columns)
        self.n_rows = (self._read_mask(self.n_packed, self.mask_base, slot.numel()) & held.unsqueeze(-1)).sum((-2, -1))
        self.n_packed, self.n_pad, self.n_context = held.sum(-1), self.n_pad.clamp_max(n_columns), n_columns


def pack_layers(caches: Sequence[SelectedCache], k: Tensor, z: Tensor, keep: Tensor, mask: Tensor, valid: Tensor) -> None:
    """SelectedCache.pack of L layers at once: k, z (L, B, Hkv, C, D), keep (L, B, Hm, C), mask (L, B, Hm, C, S), valid (B, C).

    Their tensors are views of common ones, L times fewer kernels; KVCache.nbytes counts each storage once."""
    (L, B, *_), one = k.shape, caches[0]
    assert all(c.columns == 0 for c in caches), "a context is packed once, before anything else"
    big = SelectedCache(L * B, one.max_len, one.Hkv, one.D, one.S, one.mask_heads, one.keys)
    big.pack(k.flatten(0, 1), z.flatten(0, 1), keep.flatten(0, 1), mask.flatten(0, 1), valid.repeat(L, 1))
    parts = {n: getattr(big, n).unflatten(0, (L, B)) for n in ("n_packed", "n_rows", "n_pad", "token_base", "row_base", "mask_base", "tile_base")}
    for flat, base in (("keys", "token_base"), ("rows", "row_base"), ("bits", "mask_base"), ("tile_rows", "tile_base")):
        first = parts[base][:, :1, :1]  # (L, 1, 1) where a layer begins
        bounds = [*first.flatten().tolist(), len(getattr(big, flat))]
        parts[base] = parts[base] - first
        parts[flat] = [getattr(big, flat)[a:b] for a, b in pairwise(bounds)]
        if flat == "bits":
            parts["positions"] = [big.positions[a:b] for a, b in pairwise(bounds)]
    for i, cache in enumerate(caches):
        for name, per_layer in parts.items():
            setattr(cache, name, per_layer[i])
        cache.n_context = big.n_context
