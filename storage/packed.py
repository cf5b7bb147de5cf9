"""The one storage format for value groups: what a layer keeps of its tokens, and nothing else.

Per layer, flat and ragged by (sequence, KV head): whole keys, the kept value rows, a mask per
token, a row offset per tile of tokens, and a dense tail of the newest tokens. kernels.py has the
layout of rows and masks. `KVCache` in model.py holds one of these per layer:

* PackedCache: K groups of every token, packed as the tokens leave the tail; segments have the same
  capacity and grow;
* SelectedCache: a context packed once, whole tokens dropped too, segments of their own exact sizes;
  what follows stays in the tail.

Letters: B sequences, Hkv KV heads, Hm mask heads (1 or Hkv), D head dimension, S groups, d = D/S
numbers in a row, K kept per token, C columns of a context, T new tokens, N stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from config import KVConfig, check
from storage.append import append_packed
from storage.layout import bits_to_mask, mask_dtype, mask_to_bits, storage_bytes, tile_size
from storage.packing import pack_values
from storage.views import Packed, Tail


def compressed(seen: Tensor, tail: int, block: int) -> Tensor:
    """Tokens compressed once `seen` (int64, any shape) have been seen, with a tail of at least
    `tail`, compressed `block` at a time."""
    return ((seen - tail).div(block, rounding_mode="floor") * block).clamp_min(0)


class Flat:
    """What both caches share: named tensors, among them keys (., D), rows (., d) and bits, and
    where segments begin in them. Heads that share one mask (Hm = 1) share its bits and what counts
    rows. A subclass names the tensors it holds in NAMES."""

    NAMES: tuple[str, ...] = ()

    @property
    def B(self) -> int:
        """Sequences held."""
        return self.n_packed.size(0)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name: what save writes and nbytes counts."""
        return {n: getattr(self, n) for n in self.NAMES}

    def nbytes(self) -> int:
        """Bytes of every tensor held, counts, offsets and unused capacity included; of views
        (pack_layers) the whole they belong to."""
        return storage_bytes(self.tensors().values())


class PackedCache(Flat):
    """One layer's cache: whole keys, kept value rows only, one mask per token, and a dense tail of
    the newest tokens.

    Flat by (sequence, KV head); padding is not stored. Packed part: keys (slots, D); rows (row
    slots, D/S), token-major, group-minor, K of every token; bits (mask slots,), one mask per token,
    shared by the KV heads when mask_heads = 1. Segments have the same capacity; where they start:
    token_base, row_base (B, Hkv), mask_base (B, Hm) int64. Tail: k, v, bits of the tokens not yet
    compressed, token number t of a sequence in slot t modulo the tail's width. A sequence that has
    seen n tokens has compressed max(0, (n - tail) // block * block) of them. Capacity grows by a
    quarter when it is passed; ask for enough to avoid the copy."""

    SLOTS = ("keys", "rows", "bits")  # tensors of `cap` tokens to a segment
    NAMES = (
        *SLOTS,
        "token_base",
        "row_base",
        "mask_base",
        "n_packed",
        "n_tail",
        "tail_k",
        "tail_v",
        "tail_bits",
    )

    def __init__(
        self,
        batch: int,
        max_len: int,
        n_kv_head: int,
        head_dim: int,
        cfg: KVConfig,
        k: int,
        like: Tensor,
    ):
        self.Hkv = n_kv_head
        self.D = head_dim
        self.S = cfg.n_groups
        self.k = k
        self.mask_heads = n_kv_head if cfg.mask_scope == "head" else 1
        self.tail = cfg.kv_tail
        self.block = cfg.tail_leaves
        # compressed tokens per sequence
        self.n_packed = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.n_tail = torch.zeros_like(self.n_packed)
        self.cap = 0
        self.columns = 0  # token slots per segment; columns seen, padding included
        width = self.tail + self.block - 1
        self.tail_k = like.new_zeros(batch, n_kv_head, width, head_dim)
        self.tail_v = torch.zeros_like(self.tail_k)
        self.tail_bits = torch.zeros(
            batch, self.mask_heads, width, dtype=mask_dtype(self.S), device=like.device
        )
        self._allocate(max(0, max_len - self.tail), like)

    def _allocate(self, cap: int, like: Tensor) -> None:
        B = self.B
        Hkv = self.Hkv
        Hm = self.mask_heads
        self.keys = like.new_zeros(B * Hkv * cap, self.D)
        self.rows = like.new_zeros(B * Hkv * cap * self.k, self.D // self.S)
        self.bits = torch.zeros(B * Hm * cap, dtype=mask_dtype(self.S), device=like.device)
        self.cap = cap
        self._set_bases()

    def _set_bases(self) -> None:
        """First slot of every segment, from capacity and number of sequences."""
        segments = torch.arange(self.B * self.Hkv, device=self.bits.device).view(self.B, self.Hkv)
        self.token_base = segments * self.cap
        self.row_base = segments * (self.cap * self.k)
        self.mask_base = (
            torch.arange(self.B * self.mask_heads, device=self.bits.device).view(
                self.B, self.mask_heads
            )
            * self.cap
        )

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens more per sequence."""
        self._grow(int((self.n_packed + self.n_tail).max()) + n_tokens - self.tail if self.B else 0)

    def _grow(self, need: int, exact: bool = False) -> None:
        """Have room for `need` packed tokens in every segment."""
        if need > self.cap:
            old = [getattr(self, name) for name in self.SLOTS]
            cap = self.cap
            self._allocate(need if exact else max(need, cap + cap // 4), self.tail_k)
            for name, t in zip(self.SLOTS, old, strict=True):
                if t.numel():
                    heads = self.mask_heads if name == "bits" else self.Hkv
                    new = getattr(self, name)
                    t = t.view(self.B * heads, -1, *t.shape[1:])
                    new.view(self.B * heads, -1, *new.shape[1:])[:, : t.size(1)] = t

    def packed(self) -> Packed:
        """The packed part, as kernels.packed_attention reads it."""
        n = self.n_packed.unsqueeze(1).expand(-1, self.mask_heads)
        return Packed(
            self.keys,
            self.rows,
            self.bits,
            None,
            None,
            n,
            self.token_base,
            self.row_base,
            self.mask_base,
            self.mask_base,
            self.S,
            self.k,
            self.cap,
            self.B * self.Hkv * min(self.cap, self.columns),
        )

    def whole(self) -> Tail:
        """The tail, likewise."""
        return Tail(self.tail_k, self.tail_v, self.n_packed, self.n_tail)

    def sinks(self) -> Tail | None:
        """First tokens that stay whole, where there are some."""
        return None

    def steps(self, pad: Tensor) -> None:
        """See model.DenseCache.steps: this cache counts for itself."""
        return None

    def stepped(self, n: int) -> None:
        """n calls of `step` have been made."""
        self.columns += n

    def _tail_slots(self) -> Tensor:
        """The tail's slots, oldest token first: (B, width) int64; the first n_tail hold tokens."""
        width = self.tail_k.size(2)
        return (self.n_packed[:, None] + torch.arange(width, device=self.bits.device)) % max(
            width, 1
        )

    def _left_align(self, new: Tensor, ring: Tensor, source: Tensor) -> Tensor:
        """The tokens source (B, width) of [tail | new], new (B, h, T, x): (B, h, width, x)."""
        slots = self._tail_slots()[:, None, :, None].expand(-1, ring.size(1), -1, ring.size(3))
        both = torch.cat((ring.gather(2, slots), new), 2)
        return both.gather(2, source[:, None, :, None].expand(-1, both.size(1), -1, both.size(3)))

    def beside(self, k: Tensor, v: Tensor, n_pad: Tensor) -> Tail:
        """The tail and T new tokens after it, not yet appended: k, v (B, Hkv, T, D), the first
        n_pad (B,) of each row padding."""
        source, count = self._joined(k.size(2), n_pad)
        return Tail(
            self._left_align(k, self.tail_k, source),
            self._left_align(v, self.tail_v, source),
            torch.zeros_like(count),
            count,
        )

    def _joined(self, T: int, n_pad: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of [tail | T new] lie when padding and unused slots are left out, (B,
        width), and their number (B,)."""
        count = self.n_tail + T - n_pad
        W = self.tail_k.size(2)
        slot = torch.arange(min(int(count.max()), W + T) if self.B else 0, device=count.device)
        source = torch.where(
            slot < self.n_tail[:, None], slot, W + n_pad[:, None] + slot - self.n_tail[:, None]
        )
        return source.clamp_max(W + T - 1), count

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed part and tail as dense tensors, left-aligned: k (B, Hkv, N, D), v with zeros where
        dropped, mask (B, 1 or Hkv, N, S).

        N is the longest sequence's token count; tail tokens have their whole v and the mask they
        will be packed with; slots past a sequence's own count hold zeros."""
        N = int((self.n_packed + self.n_tail).max()) if self.B else 0
        k, v, full, _ = self.packed().unpack()
        k, v, full = (F.pad(t, (0, 0, 0, N - t.size(2))) for t in (k, v, full))
        b, s = (torch.arange(self.tail_k.size(2), device=k.device) < self.n_tail[:, None]).nonzero(
            as_tuple=True
        )
        at = self.n_packed[b] + s
        slot = self._tail_slots()[b, s]
        k[b, :, at] = self.tail_k[b, :, slot]
        v[b, :, at] = self.tail_v[b, :, slot]
        full[b, :, at] = bits_to_mask(self.tail_bits[b, :, slot], self.S)
        return k, v, full

    def append(
        self,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        n_pad: Tensor,
        encode: Callable[[Tensor], Tensor] = lambda v: v,
    ) -> None:
        """Take T new tokens: k, v (B, Hkv, T, D), mask (B, 1 or Hkv, T, S) bool; the first n_pad
        (B,) of each row are padding. encode: what a value (B, Hkv, W, D) goes through when it is
        compressed, before its groups are taken."""
        source, count = self._joined(k.size(2), n_pad)  # tokens not yet compressed
        total = compressed(self.n_packed + count, self.tail, self.block).maximum(self.n_packed)
        slot = torch.arange(source.size(1), device=k.device)
        # (B, Hm, width)
        bits = self._left_align(
            mask_to_bits(mask).unsqueeze(-1), self.tail_bits.unsqueeze(-1), source
        ).squeeze(-1)
        k = self._left_align(k, self.tail_k, source)
        v = self._left_align(v, self.tail_v, source)
        goes = total - self.n_packed  # (B,) tokens that are compressed now
        # those that stay
        b, s = ((slot < count[:, None]) & (slot >= goes[:, None])).nonzero(as_tuple=True)
        to = (self.n_packed[b] + s) % max(self.tail_k.size(2), 1)
        self._pack(k, v, bits, goes, encode)
        self.n_tail = count - goes
        self.tail_k[b, :, to] = k[b, :, s]
        self.tail_v[b, :, to] = v[b, :, s]
        self.tail_bits[b, :, to] = bits[b, :, s]

    def _pack(
        self, k: Tensor, v: Tensor, bits: Tensor, goes: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> None:
        """Compress the first goes (B,) tokens of the left-aligned k, v (B, Hkv, W, D), bits (B, Hm,
        W)."""
        if not self.B:
            return
        after = self.n_packed + goes
        least, width, first, last, need = torch.stack(
            (goes.min(), goes.max(), self.n_packed.min(), self.n_packed.max(), after.max())
        ).tolist()
        if width == 0:
            return
        self._grow(need)
        mask = bits_to_mask(bits[:, :, :width], self.S)
        z = encode(v[:, :, :width])
        # (B, h, width / each, ...)
        for name, new in self._stored(k[:, :, :width], z, mask, bits[:, :, :width]).items():
            each = width // new.size(2)
            heads = new.size(1)  # tokens to an entry
            cells = getattr(self, name).view(self.B, heads, self.cap // each, *new.shape[3:])
            if least == width and first == last:  # every segment grows by the same tokens
                cells[:, :, first // each : (first + width) // each] = new
            else:
                b, h, i = (
                    (torch.arange(new.size(2), device=k.device) < goes[:, None, None] // each)
                    .expand(-1, heads, -1)
                    .nonzero(as_tuple=True)
                )
                cells[b, h, self.n_packed[b] // each + i] = new[b, h, i]
        self.n_packed = after

    def _stored(self, k: Tensor, z: Tensor, mask: Tensor, bits: Tensor) -> dict[str, Tensor]:
        """What is written for tokens k and encoded z (B, Hkv, width, D), mask (B, Hm, width, S) and
        its bits: SLOTS, (B, heads, width, ...)."""
        return {"keys": k, "rows": self._kept(z.unflatten(-1, (self.S, -1)), mask), "bits": bits}

    def _kept(self, rows: Tensor, mask: Tensor) -> Tensor:
        """The K groups that mask (B, Hm, T, S) keeps of rows (B, Hkv, T, S, x), ascending: (B, Hkv,
        T, K, x)."""
        # (B, Hm, T, K) groups
        kept = mask.byte().argsort(dim=-1, descending=True, stable=True)[..., : self.k]
        return rows.gather(
            3, kept.expand(-1, self.Hkv, -1, -1).unsqueeze(-1).expand(-1, -1, -1, -1, rows.size(-1))
        )

    def append_token(self, k: Tensor, v: Tensor, scores: Tensor | None, enc: Tensor | None) -> None:
        """append of one token per sequence, k, v (B, Hkv, 1, D), without padding, on the device
        alone; room must have been reserved. Its mask: the K largest of scores (B, Hm, S), or of the
        groups' norms; enc (Hkv, D, D): what encode multiplies by. `columns` stays."""
        append_packed(
            self.packed(),
            self.whole(),
            self.tail_bits,
            self.n_packed,
            self.n_tail,
            k,
            v,
            self.tail,
            self.block,
            scores,
            enc,
        )

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {"cap": self.cap, "columns": self.columns}

    def slice(self, rows: list[int]) -> PackedCache:
        """A copy that holds the sequences `rows` only, in that order."""
        out = copy.copy(self)
        pick = torch.tensor(rows, device=self.bits.device)
        for name, t in self.tensors().items():
            per_row = t.view(self.B, t.size(0) // self.B, *t.shape[1:])
            setattr(out, name, per_row[pick].flatten(0, 1))
        out._set_bases()
        return out

    @staticmethod
    def join(caches: Sequence[PackedCache]) -> PackedCache:
        """One cache of the sequences of all, in order; each must have the same capacity and
        columns."""
        out = copy.copy(caches[0])
        for name in out.NAMES:
            setattr(out, name, torch.cat([getattr(c, name) for c in caches]))
        out._set_bases()
        return out

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first n_tokens of every sequence (padding not counted). What was
        compressed stays compressed."""
        check(
            n_tokens >= 0,
            f"truncating to {n_tokens} tokens",
            "0 or more",
            "give the number of tokens to keep",
        )
        self._cut(torch.full_like(self.n_packed, n_tokens))

    def _cut(self, n: Tensor) -> None:
        """Keep the first n (B,) tokens of packed part and tail."""
        seen = (self.n_packed + self.n_tail).minimum(n)
        self.n_packed = self.n_packed.minimum(n)
        self.n_tail = seen - self.n_packed


def starts(count: Tensor) -> Tensor:
    """First slot of every segment when segments of count (B, h) int64 slots lie one after the
    other: (B, h) int64."""
    flat = count.flatten()  # (B * h,)
    return (flat.cumsum(0) - flat).view(count.shape)


def slots(base: Tensor, count: Tensor) -> Tensor:
    """The slots base to base + count - 1 of every segment, one segment after the other: (B, h)
    int64 twice -> (count.sum(),) int64."""
    total = int(count.sum())
    shift = (base - starts(count)).flatten().repeat_interleave(count.flatten(), output_size=total)
    return torch.arange(total, device=base.device) + shift


class SelectedCache(Flat):
    """One layer's cache for query-aware selection: a context packed once, tokens dropped too, then
    a dense tail that stays whole.

    Packed part, segments sequence-major, then head, each exactly as long as what it keeps: keys
    (n_tokens, D); rows (n_rows, d), token-major, group-minor; bits (n_masks,), one per surviving
    token; positions (n_masks,), their columns, int16 where max_len allows, empty if no token but
    padding was dropped: then survivor i of sequence b is column n_pad[b] + i; tile_rows (tiles,)
    int32, the segment's rows before each tile of its survivors, and before (n_masks,) uint8, those
    of its tile before each. A survivor may have no rows. Per segment, int64: n_packed and n_rows
    (B, Hm), its survivors and rows; its first slots token_base and row_base (B, Hkv), mask_base and
    tile_base (B, Hm). Tail: tail_k, tail_v (B, Hkv, cap, D), of which tail_len columns are filled,
    the first tail_pad (B,) of them padding."""

    LAYOUT = (
        "bits",
        "positions",
        "before",
        "tile_rows",
        "n_packed",
        "n_rows",
        "n_pad",
        "token_base",
        "row_base",
        "mask_base",
        "tile_base",
    )
    NAMES = ("keys", "rows", *LAYOUT, "tail_k", "tail_v", "tail_pad")
    # of all, one after the other
    JOINED = (
        "keys",
        "rows",
        "bits",
        "before",
        "tile_rows",
        "positions",
        "n_packed",
        "n_rows",
        "n_pad",
        "tail_pad",
    )
    # whether it remembers where survivors stood, and so can be truncated into its context
    KNOWS_COLUMNS = True

    def __init__(
        self,
        batch: int,
        max_len: int,
        n_kv_head: int,
        head_dim: int,
        n_groups: int,
        mask_heads: int,
        like: Tensor,
    ):
        check(
            mask_heads in (1, n_kv_head),
            f"mask_heads={mask_heads}",
            f"1 or the {n_kv_head} KV heads",
            "give one of them",
        )
        self.Hkv = n_kv_head
        self.D = head_dim
        self.S = n_groups
        self.mask_heads = mask_heads
        self.max_len = max_len
        self.tile = tile_size(n_groups)  # tokens per entry of tile_rows
        # columns packed, padding included; columns in the tail; most survivors of a segment
        self.n_context = self.tail_len = self.longest = 0

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        self.keys = like.new_zeros(0, head_dim)
        self.rows = like.new_zeros(0, head_dim // n_groups)
        self.bits = zeros(0, dtype=mask_dtype(n_groups))
        self.before = zeros(0, dtype=torch.uint8)
        self.tile_rows = zeros(0, dtype=torch.int32)
        self.positions = zeros(0, dtype=torch.int16 if max_len <= 32767 else torch.int32)
        self.n_packed = zeros(batch, mask_heads)
        self.n_rows = zeros(batch, mask_heads)
        self.n_pad = zeros(batch)
        self.tail_pad = zeros(batch)
        self._set_bases()
        self.tail_k, self.tail_v = like.new_zeros(2, batch, n_kv_head, 0, head_dim)

    @property
    def columns(self) -> int:
        """Columns seen so far, padding included."""
        return self.n_context + self.tail_len

    def _set_bases(self) -> None:
        """Segment starts for segments without gaps, from n_packed and n_rows."""
        self.token_base, self.row_base = (
            starts(n.expand(-1, self.Hkv)) for n in (self.n_packed, self.n_rows)
        )
        self.mask_base = starts(self.n_packed)
        self.tile_base = starts(-(-self.n_packed // self.tile))

    def pack(
        self,
        k: Tensor,
        z: Tensor,
        keep: Tensor,
        mask: Tensor,
        valid: Tensor,
        bits_from: SelectedCache | None = None,
        moment: Tensor | None = None,
    ) -> None:
        """Store a context of C columns: k and encoded values z (B, Hkv, C, D), of which the tokens
        keep (B, Hm, C) bool survive, each with its key and the groups of mask (B, Hm, C, S) bool.
        valid (B, C) bool: False for padding, which is on the left and never stored. bits_from: a
        cache packed with the same keep, mask and valid, whose masks, positions, offsets and counts
        serve this one too. moment (B, Hkv, D, D): of the queries to come (relevance.Prompt.moment),
        for which integers of keys are rounded; numbers of 16 bits are not."""
        B, C = valid.shape
        assert self.columns == 0, (
            f"pack on a cache of {self.columns} columns; a context is packed once, before "
            "anything else"
        )
        assert self.max_len >= C, f"a context of {C} columns in a cache of max_len={self.max_len}"
        assert not (valid[:, :-1] & ~valid[:, 1:]).any(), (
            "padding right of a token; it must be on the left"
        )
        keep = keep & valid[:, None]  # (B, Hm, C)
        mask = mask * keep.unsqueeze(-1)  # (B, Hm, C, S)
        if bits_from is not None:
            same = torch.equal(bits_from.n_packed, keep.sum(-1)) and torch.equal(
                bits_from.n_rows, mask.sum((-2, -1))
            )
            assert same and bits_from.token_base.shape == (B, self.Hkv), (
                "bits_from was packed with another keep or mask, or was truncated"
            )
        index = self._store(k, z, keep, mask, moment)
        if bits_from is None:
            self.bits, self.before, self.tile_rows, self.n_packed, self.n_rows = index
            if self.KNOWS_COLUMNS and (valid[:, None] & ~keep).any():
                # (n_masks,)
                self.positions = (
                    torch.arange(C, device=keep.device)
                    .expand_as(keep)[keep]
                    .to(self.positions.dtype)
                )
            self.n_pad = (~valid).sum(-1)
            self._set_bases()
        for name in self.LAYOUT if bits_from else ():
            setattr(self, name, getattr(bits_from, name))
        self.n_context = C
        self.longest = int(self.n_packed.max()) if B else 0

    def _store(
        self, k: Tensor, z: Tensor, keep: Tensor, mask: Tensor, moment: Tensor | None
    ) -> list[Tensor]:
        """Hold keys and rows of what is kept; return bits, before, tile_rows, n_packed and
        n_rows."""
        dtype = self.keys.dtype
        self.keys, self.rows, *index = pack_values(k.to(dtype), z.to(dtype), keep, mask)
        return index

    def groups_kept(self) -> int:
        """Value groups kept of all tokens, masks of several heads counted once."""
        return int(self.n_rows.sum())

    def packed(self) -> Packed:
        """The packed part, as kernels.packed_attention reads it."""
        return Packed(
            self.keys,
            self.rows,
            self.bits,
            self.before,
            self.tile_rows,
            self.n_packed,
            self.token_base,
            self.row_base,
            self.mask_base,
            self.tile_base,
            self.S,
            0,
            self.longest,
            len(self.keys),
            True,
        )

    def whole(self) -> Tail:
        """The filled part of the tail, likewise."""
        return Tail(self.tail_k, self.tail_v, self.tail_pad, self.tail_len - self.tail_pad)

    def steps(self, pad: Tensor) -> Tail:
        """See model.DenseCache.steps; the tail knows its padding."""
        return self.whole()

    def stepped(self, n: int) -> None:
        """n calls of `step` have been made."""
        self.tail_len += n

    def append(self, k: Tensor, v: Tensor, n_pad: Tensor) -> None:
        """Take T new columns, whole: k, v (B, Hkv, T, D); the first n_pad (B,) of each row are
        padding, and so are all before them."""
        end = self.tail_len + k.size(2)
        self.reserve(k.size(2))
        self.tail_k[:, :, self.tail_len : end] = k
        self.tail_v[:, :, self.tail_len : end] = v
        self.tail_pad = torch.where(n_pad > 0, self.tail_len + n_pad, self.tail_pad)
        self.tail_len = end

    def reserve(self, n_columns: int) -> None:
        """Make room for n_columns more."""
        end = self.tail_len + n_columns
        cap = self.tail_k.size(2)
        if end > cap:
            cap = max(end, cap + cap // 4 if cap else self.max_len - self.n_context)
            for name in ("tail_k", "tail_v"):
                new = self.tail_k.new_zeros(self.B, self.Hkv, cap, self.D)
                new[:, :, : self.tail_len] = getattr(self, name)[:, :, : self.tail_len]
                setattr(self, name, new)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The packed part, dense and left-aligned by segment: see Packed.unpack."""
        return self.packed().unpack()

    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the filled part of the tail: k, v (B, Hkv, n, D), and valid (B, n) bool, False
        for padding."""
        valid = torch.arange(self.tail_len, device=self.tail_pad.device) >= self.tail_pad[:, None]
        return self.tail_k[:, :, : self.tail_len], self.tail_v[:, :, : self.tail_len], valid

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {
            "max_len": self.max_len,
            "n_context": self.n_context,
            "tail_len": self.tail_len,
            "longest": self.longest,
        }

    def slice(self, rows: list[int]) -> SelectedCache:
        """A copy that holds the sequences `rows` only, in that order, its packed part exactly
        sized; it shares nothing."""
        out = copy.copy(self)
        pick = torch.tensor(rows, dtype=torch.int64, device=self.bits.device)
        for name in ("n_packed", "n_rows", "n_pad", "tail_k", "tail_v", "tail_pad"):
            setattr(out, name, getattr(self, name)[pick])
        masks = slots(self.mask_base[pick], out.n_packed)
        out.keys = self.keys[slots(self.token_base[pick], out.n_packed.expand(-1, self.Hkv))]
        out.rows = self.rows[slots(self.row_base[pick], out.n_rows.expand(-1, self.Hkv))]
        out.bits = self.bits[masks]
        out.before = self.before[masks]
        out.positions = self.positions[masks] if self.positions.numel() else self.positions.clone()
        out.tile_rows = self.tile_rows[slots(self.tile_base[pick], -(-out.n_packed // self.tile))]
        out._set_bases()
        return out

    def exact(self) -> SelectedCache:
        """This cache with a packed part exactly sized; where nothing was given up, its tensors are
        shared."""
        return (
            copy.copy(self)
            if len(self.bits) == int(self.n_packed.sum())
            else self.slice(list(range(self.B)))
        )

    @staticmethod
    def join(caches: Sequence[SelectedCache]) -> SelectedCache:
        """One cache of the sequences of all, in order; each must have the same columns. It shares
        nothing."""
        out = copy.copy(caches[0])
        parts = [c.exact() for c in caches]
        cap = max(c.tail_k.size(2) for c in parts)
        if any(c.positions.numel() for c in parts):
            for c in parts:
                c.positions = c.columns_held()
        for name in out.JOINED:
            setattr(out, name, torch.cat([getattr(c, name) for c in parts]))
        out.tail_k, out.tail_v = (
            torch.cat([F.pad(getattr(c, n), (0, 0, 0, cap - c.tail_k.size(2))) for c in parts])
            for n in ("tail_k", "tail_v")
        )
        out._set_bases()
        out.longest = max(c.longest for c in caches)
        return out

    def _columns(self, held: Tensor) -> Tensor:
        """Column of the survivor in each slot where held (B, Hm, N): like held; any number
        elsewhere."""
        slot = torch.arange(held.size(-1), device=held.device)
        if self.positions.numel():
            return self.positions[
                (self.mask_base.unsqueeze(-1) + slot).clamp_max(self.positions.numel() - 1)
            ]
        return (self.n_pad[:, None, None] + slot).expand_as(held)

    def columns_held(self) -> Tensor:
        """Column of every survivor, like bits: (n_masks,) in the type of positions."""
        held = self.packed().masks()[1]
        return self._columns(held)[held].to(self.positions.dtype)

    def truncate(self, n_columns: int) -> None:
        """Forget the columns from n_columns on (padding counted). Packed slots are given up, not
        freed; slice([...]) frees them."""
        check(
            n_columns >= 0,
            f"truncating to {n_columns} columns",
            "0 or more",
            "give the number of columns to keep",
        )
        self.tail_len = min(self.tail_len, max(0, n_columns - self.n_context))
        self.tail_pad = self.tail_pad.clamp_max(self.tail_len)
        if n_columns >= self.n_context:
            return
        mask, held = self.packed().masks()  # (B, Hm, N, S), (B, Hm, N)
        held = held & (self._columns(held) < n_columns)
        self.n_rows = (mask & held.unsqueeze(-1)).sum((-2, -1))
        self.n_packed = held.sum(-1)
        self.n_pad = self.n_pad.clamp_max(n_columns)
        self.n_context = n_columns


def pack_layers(
    caches: Sequence[SelectedCache], k: Tensor, z: Tensor, keep: Tensor, mask: Tensor, valid: Tensor
) -> None:
    """SelectedCache.pack of L layers at once: k, z (L, B, Hkv, C, D), keep (L, B, Hm, C), mask (L,
    B, Hm, C, S), valid (B, C).

    Their tensors are views of common ones, L times fewer kernels; KVCache.nbytes counts each
    storage once."""
    (L, B, *_) = k.shape
    one = caches[0]
    assert all(c.columns == 0 for c in caches), "a context is packed once, before anything else"
    big = SelectedCache(L * B, one.max_len, one.Hkv, one.D, one.S, one.mask_heads, one.keys)
    big.pack(
        k.flatten(0, 1), z.flatten(0, 1), keep.flatten(0, 1), mask.flatten(0, 1), valid.repeat(L, 1)
    )
    parts = {
        n: getattr(big, n).unflatten(0, (L, B))
        for n in ("n_packed", "n_rows", "n_pad", "token_base", "row_base", "mask_base", "tile_base")
    }
    for flat, base in (
        ("keys", "token_base"),
        ("rows", "row_base"),
        ("bits", "mask_base"),
        ("tile_rows", "tile_base"),
    ):
        first = parts[base][:, :1, :1]  # (L, 1, 1) where a layer begins
        bounds = [*first.flatten().tolist(), len(getattr(big, flat))]
        parts[base] = parts[base] - first
        parts[flat] = [getattr(big, flat)[a:b] for a, b in pairwise(bounds)]
        if flat == "bits":
            parts["positions"], parts["before"] = (
                [t[a:b] for a, b in pairwise(bounds)] for t in (big.positions, big.before)
            )
    for i, cache in enumerate(caches):
        for name, per_layer in parts.items():
            setattr(cache, name, per_layer[i])
        cache.n_context = big.n_context
        cache.longest = big.longest
