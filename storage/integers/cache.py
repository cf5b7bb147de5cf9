"""The packed caches of storage/packed.py with keys and values as integers (format.py): what is
added to them, and nothing else.

* IntSelectedCache: a context quantised once, at uniform bits or with a level for every group; what
  follows stays whole in the tail.
* IntPackedCache: K groups of every token; the oldest tokens of the tail are quantised a whole block
  at a time as decoding goes on.

Both keep the first `sinks` tokens of a sequence whole: attention rests on them, and their values
are unlike all others.

Letters: B sequences, Hkv KV heads, Hm mask heads (1 or Hkv), D head dimension, S groups, d = D/S, C
columns of a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from config import KVConfig, check
from storage.integers.format import (
    IntFormat,
    Ints,
    quantise_keys,
    quantise_levels,
    quantise_values,
    row_bytes,
    split_levels,
    to_codes,
    units,
)
from storage.integers.rounding import Readers, codes_for
from storage.layout import mask_dtype, mask_to_bits, tile_size
from storage.packed import PackedCache, SelectedCache, slots, starts
from storage.packing import tile_index
from storage.views import Packed, Tail


class IntSelectedCache(SelectedCache):
    """SelectedCache in integers. keys, rows: bytes; key_scale, value_scale as in quant.Ints; with
    levels bits holds 2 S of them and rows are units of 2 bits and d numbers, counted by n_rows.
    Positions are not kept, so its context cannot be truncated."""

    LAYOUT = (*SelectedCache.LAYOUT, "block_base")
    JOINED = (*SelectedCache.JOINED, "key_scale", "value_scale")
    NAMES = (*SelectedCache.NAMES, "key_scale", "block_base", "value_scale")
    KNOWS_COLUMNS = False

    def __init__(
        self,
        batch: int,
        max_len: int,
        n_kv_head: int,
        head_dim: int,
        n_groups: int,
        mask_heads: int,
        like: Tensor,
        fmt: IntFormat,
    ):
        self.n_first = 0  # columns of the context that lie in the tail
        self.fmt = fmt
        self.key_scale = torch.zeros(0, 2, head_dim, dtype=torch.float16, device=like.device)
        super().__init__(batch, max_len, n_kv_head, head_dim, n_groups, mask_heads, like)
        self.value_scale = self.key_scale.new_zeros(0, 2 if fmt.value_bits else 1)
        width = row_bytes(head_dim // n_groups, fmt.value_bits or 2)
        self.keys, self.rows = (
            self.bits.new_zeros(0, w, dtype=torch.uint8)
            for w in (row_bytes(head_dim, fmt.key_bits), width)
        )
        if not fmt.value_bits:
            self.bits = self.bits.to(mask_dtype(2 * n_groups))
            self.tile = tile_size(4 * n_groups)

    def _blocks(self) -> Tensor:
        """Key blocks of every segment: (B, Hkv) int64."""
        return -(-self.n_packed.expand(-1, self.Hkv) // self.fmt.block)

    def _set_bases(self) -> None:
        super()._set_bases()
        self.block_base = starts(self._blocks())

    def _store(
        self, k: Tensor, z: Tensor, keep: Tensor, mask: Tensor, moment: Tensor | None
    ) -> list[Tensor]:
        """mask (B, Hm, C, S): groups kept, or their levels 0 to 3, uint8. moment: see pack; None:
        keys are rounded to the nearest codes."""
        fmt = self.fmt
        here = keep.expand(-1, self.Hkv, -1)  # (B, Hkv, C)
        n = here.sum(-1)
        blocks = -(-n // fmt.block)
        # of a token in its segment
        number = torch.arange(int(n.sum()), device=n.device) - starts(
            n
        ).flatten().repeat_interleave(n.flatten())
        at = starts(blocks).flatten().repeat_interleave(n.flatten()) + number // fmt.block
        codes = (
            to_codes
            if moment is None
            else partial(codes_for, Readers(moment.flatten(0, 1), n.flatten()))
        )
        self.keys, self.key_scale = quantise_keys(
            k[here], at, int(blocks.sum()), fmt.key_bits, codes
        )
        mine = mask.expand(-1, self.Hkv, -1, -1)[here]
        flat = z[here]  # (n, S), (n, D)
        if fmt.value_bits:
            rows, self.value_scale = quantise_values(flat, mine, fmt.value_bits)
            self.rows = rows[mine]
            count = mask.sum(-1)
            word = mask
        else:
            own = units(mine).sum(-1)
            count = units(mask).sum(-1)
            word = split_levels(mask)
            gain = fmt.gain[:, None].expand(-1, z.size(2), -1).expand(len(z), -1, -1, -1)[here]
            self.rows, self.value_scale = quantise_levels(
                flat, mine, own.cumsum(0) - own, int(own.sum()), gain
            )
        n_packed = keep.sum(-1)
        before = (count.cumsum(-1) - count)[keep]
        return [
            mask_to_bits(word[keep]),
            *tile_index(before, n_packed, self.tile),
            n_packed,
            count.sum(-1),
        ]

    def packed(self) -> Packed:
        """The packed part, as kernels.packed_attention reads it."""
        return (
            super()
            .packed()
            ._replace(
                ints=Ints(
                    self.fmt, self.key_scale, self.block_base, self.value_scale, self.tail_k.dtype
                )
            )
        )

    def groups_kept(self) -> int:
        """Value groups kept of all tokens, at whatever level."""
        return (
            super().groups_kept()
            if self.fmt.value_bits
            else int((self.packed().masks()[0] > 0).sum())
        )

    def append_sinks(self, k: Tensor, v: Tensor, n_pad: Tensor) -> None:
        """Put the first tokens of a context, k, v (B, Hkv, n, D), n columns of it moved to the
        tail, before all else; n_pad (B,) of them padding."""
        self.append(k, v, n_pad)
        self.n_first = k.size(2)
        self.n_context -= self.n_first

    def extra(self) -> dict:
        """The numbers that, with tensors(), make up the whole cache, and how its integers are
        stored: bits of keys, of values, block."""
        return {**super().extra(), "n_first": self.n_first, "ints": [*self.fmt[:3]]}

    def truncate(self, n_columns: int) -> None:
        """Forget the columns from n_columns on. Raises ValueError inside the context, whose tokens'
        columns are not kept."""
        check(
            n_columns >= self.n_context + self.n_first,
            f"truncating to {n_columns} columns",
            "a quantised context is kept as it is",
            "keep the whole context, or slice",
        )
        super().truncate(n_columns)

    def slice(self, rows: list[int]) -> IntSelectedCache:
        """A copy that holds the sequences `rows` only, in that order."""
        pick = torch.tensor(rows, dtype=torch.int64, device=self.bits.device)
        blocks = slots(self.block_base[pick], self._blocks()[pick])
        tokens = slots(self.token_base[pick], self.n_packed[pick].expand(-1, self.Hkv))
        out = super().slice(rows)
        out.key_scale = self.key_scale[blocks]
        out.value_scale = self.value_scale[tokens]
        return out


class IntPackedCache(PackedCache):
    """PackedCache in integers of cfg.key_bits and cfg.value_bits. Tokens leave the tail in whole
    blocks, of cfg.key_block, whose keys share steps: key_scale (blocks, 2, D), value_scale (token
    slots, 2). sink_k, sink_v (B, Hkv, cfg.kv_sinks, D): the first n_sink (B,) tokens of a sequence,
    whole for good; neither masks nor n_packed and n_tail know of them."""

    SLOTS = (*PackedCache.SLOTS, "key_scale", "value_scale")
    NAMES = (*PackedCache.NAMES, "key_scale", "value_scale", "sink_k", "sink_v", "n_sink")

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
        self.fmt = IntFormat(cfg.key_bits, cfg.value_bits, cfg.key_block)
        self.sink_k = like.new_zeros(batch, n_kv_head, cfg.kv_sinks, head_dim)
        self.sink_v = torch.zeros_like(self.sink_k)
        self.n_sink = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.open = cfg.kv_sinks  # columns before which a sequence may still have sinks to fill
        super().__init__(batch, max_len, n_kv_head, head_dim, cfg, k, like)

    def extra(self) -> dict:
        """The numbers that, with tensors(), make up the whole cache, and how its integers are
        stored: bits of keys, of values, block."""
        return {**super().extra(), "open": self.open, "ints": [*self.fmt[:3]]}

    def _allocate(self, cap: int, like: Tensor) -> None:
        super()._allocate(-(-cap // self.block) * self.block, like[:0])
        n = self.B * self.Hkv * self.cap
        dev = like.device
        self.keys = torch.zeros(
            n, row_bytes(self.D, self.fmt.key_bits), dtype=torch.uint8, device=dev
        )
        self.rows = torch.zeros(
            n * self.k,
            row_bytes(self.D // self.S, self.fmt.value_bits),
            dtype=torch.uint8,
            device=dev,
        )
        self.key_scale = torch.zeros(n // self.block, 2, self.D, dtype=torch.float16, device=dev)
        self.value_scale = torch.zeros(n, 2, dtype=torch.float16, device=dev)

    def _stored(self, k: Tensor, z: Tensor, mask: Tensor, bits: Tensor) -> dict[str, Tensor]:
        B, Hkv, width, D = k.shape
        block = torch.arange(B * Hkv * width, device=k.device) // self.block
        keys, key_scale = quantise_keys(
            k.reshape(-1, D), block, len(block) // self.block, self.fmt.key_bits
        )
        rows, value_scale = quantise_values(z, mask.expand(-1, Hkv, -1, -1), self.fmt.value_bits)
        return {
            "keys": keys.view(B, Hkv, width, -1),
            "rows": self._kept(rows, mask),
            "bits": bits,
            "value_scale": value_scale,
            "key_scale": key_scale.view(B, Hkv, -1, 2, D),
        }

    def reserve(self, n_tokens: int) -> None:
        """See PackedCache.reserve. A sequence that has fewer sinks than it could goes on without
        more."""
        self.open = 0
        super().reserve(n_tokens)

    @staticmethod
    def join(caches: Sequence[IntPackedCache]) -> IntPackedCache:
        """See PackedCache.join. Sequences that may still fill their first tokens go on doing so."""
        out = PackedCache.join(caches)
        out.open = max(c.open for c in caches)
        return out

    def packed(self) -> Packed:
        """The packed part, as kernels.packed_attention reads it."""
        block_base = self.token_base.div(self.block, rounding_mode="floor")
        return (
            super()
            .packed()
            ._replace(
                ints=Ints(self.fmt, self.key_scale, block_base, self.value_scale, self.tail_k.dtype)
            )
        )

    def sinks(self) -> Tail | None:
        """First tokens that stay whole, where there are some."""
        return (
            Tail(self.sink_k, self.sink_v, torch.zeros_like(self.n_sink), self.n_sink)
            if self.sink_k.size(2)
            else None
        )

    def append(
        self,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        n_pad: Tensor,
        encode: Callable[[Tensor], Tensor] = lambda v: v,
    ) -> None:
        """See PackedCache.append. Sinks fill first; what goes there is padding to the rest."""
        n = self.sink_k.size(2)
        T = k.size(2)
        if self.columns - T < self.open:  # `columns` includes these T already
            take = (T - n_pad).minimum(n - self.n_sink)
            b, i = (torch.arange(n, device=k.device) < take[:, None]).nonzero(as_tuple=True)
            to = self.n_sink[b] + i
            at = n_pad[b] + i
            self.sink_k[b, :, to] = k[b, :, at]
            self.sink_v[b, :, to] = v[b, :, at]
            self.n_sink = self.n_sink + take
            n_pad = n_pad + take
            self.open = self.columns + n if bool((self.n_sink < n).any()) else 0
        super().append(k, v, mask, n_pad, encode)

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first n_tokens of every sequence. Raises ValueError inside a block,
        whose keys share steps."""
        rest = (n_tokens - self.n_sink).clamp_min(0)
        check(
            n_tokens >= 0 and not (rest.minimum(self.n_packed) % self.block).any(),
            f"truncating to {n_tokens} tokens",
            f"quantised tokens are kept in blocks of {self.block}",
            "keep whole blocks after the first tokens",
        )
        self._cut(rest)
        self.n_sink = self.n_sink.clamp_max(n_tokens)
