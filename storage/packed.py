"""The packed cache of value groups: whole keys, K rows of every token, and a window of the newest
tokens.

Rows lie as storage/layout.py says. A token goes into the window first, whole; when the window has
more than it keeps, its oldest tokens are packed, `block` at a time: their values are mapped into
the basis in which they are cut, and only the groups of their mask are written.

    cache = PackedCache(batch, max_len, n_kv_head, head_dim, KVConfig(n_groups=4), k=2, like=x)
    cache.append(NewTokens(k, v, n_pad=None, route=mask))
    out, lse = attend_view(q, cache.view())       # kernels.py

Letters: storage/layout.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import KVConfig
from kernels import append_packed, can_append
from storage.cache import CacheView, LayerCacheBase, NewTokens, check_range, check_truncation
from storage.from_keys import FromKeys
from storage.kernel_base import use_triton
from storage.layout import (
    PackedView,
    WindowView,
    cdiv,
    copy_segments,
    group_energy,
    mask_dtype,
    mask_to_bits,
    top_k_mask,
)
from storage.packing import Context, pack_values
from storage.sinks import fill_sinks


class ValueBasis(NamedTuple):
    """The maps of a value into the coordinates that are cut into groups, and back.

    None: nothing to do, since W_v or W_o hold the map, or since every group is kept."""

    enc: Tensor | None = None  # (Hkv, D, D), z = v @ enc
    dec: Tensor | None = None  # (Hkv, D, D), v = z @ dec
    from_keys: FromKeys | None = None  # what is stored is what keys do not tell

    def constants(self) -> dict[str, Tensor]:
        """Return the maps that there are, by name."""
        maps = {"maps into the basis": self.enc, "maps out of the basis": self.dec}
        if self.from_keys is not None:
            maps["maps from keys to values"] = self.from_keys.weight
        return {name: t for name, t in maps.items() if t is not None}

    def copied(self) -> ValueBasis:
        """Return the same maps, apart from what trains them."""
        maps = (None if t is None else t.detach().clone() for t in (self.enc, self.dec))
        return ValueBasis(*maps, self.from_keys and self.from_keys.copied())

    def encode(self, v: Tensor) -> Tensor:
        """Map values (B, Hkv, T, D) to coordinates."""
        return v if self.enc is None else v @ self.enc.to(v.dtype)

    def untold(self, k: Tensor, z: Tensor, position: Tensor) -> Tensor:
        """Return what keys k (B, Hkv, T, D) at positions (B or 1, T) do not tell of the coordinates
        z (B, Hkv, T, D): z itself where they are not asked."""
        return z if self.from_keys is None else z - self.from_keys.predict(k, position)

    def to_store(self, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """Map values (B, Hkv, T, D) of tokens with keys k (B, Hkv, T, D) at positions (B or 1, T)
        to what is cut into groups: coordinates, less what keys tell of them."""
        return self.untold(k, self.encode(v), position)

    def decode(self, z: Tensor) -> Tensor:
        """Map what is read of coordinates (B, Hkv, ., D) back to values."""
        return z if self.dec is None else z @ self.dec.to(z.dtype)


class FloatCodec:
    """How numbers are stored: as they are. integers/codecs.py has the same for 8 bits and fewer.

    A codec says which tensors hold keys and rows (with their owners), what is written for a token,
    and what dequantises it (`ints`, None here)."""

    owners = {"keys": "token", "rows": "row"}
    block = 1  # tokens that are written together
    levelled = False  # whether every group has a number of bits of its own
    in_parts = False  # whether a codec's layers_at_once bounds how many are packed together

    def __init__(self, n_sinks: int = 0):
        self.n_sinks = n_sinks  # first tokens of a sequence that stay whole

    def settings(self) -> dict[str, Any]:
        return {"bits": "16"}

    def constants(self) -> dict[str, Tensor]:
        """Return tensors of the model that are needed to read what is stored, by name."""
        return {}

    def empty(self, n_tokens: int, k: int, S: int, D: int, like: Tensor) -> dict[str, Tensor]:
        """Return zeros for n_tokens slots of tokens, with k rows each."""
        return {"keys": like.new_zeros(n_tokens, D), "rows": like.new_zeros(n_tokens * k, D // S)}

    def pack(self, k: Tensor, z: Tensor, bits: Tensor, S: int, n_kept: int) -> dict[str, Tensor]:
        """Return what is written for tokens k, z (B, Hkv, T, D) with n_kept of S groups each, by
        masks bits (B, Hm, T): by name (B, Hkv, entries, ...)."""
        return {"keys": k, "rows": kept_rows(z.unflatten(-1, (S, -1)), bits, n_kept)}

    def ints(self, cache: PackedCache) -> None:
        """Return what dequantises integers: nothing here."""

    def one_by_one(self, D: int, window: int) -> bool:
        """Say whether a kernel can append single tokens."""
        return can_append(D)

    def check_cut(self, n_packed: Tensor) -> None:
        """Raise ValueError where packed tokens cannot be cut after the first n_packed (B,)."""

    @staticmethod
    def pack_sequences(
        codecs: Sequence[FloatCodec], context: Context
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Return what RaggedCache holds of a context, a codec per layer: the tensors named in
        owners, and bits, before, tile_rows; and n_packed and n_rows, on the host."""
        z = context.z
        if context.predict is not None:
            here = context.here
            untold = z[here] - context.predict(context.k[here])
            z = z.masked_scatter(here.unsqueeze(-1), untold)
        keys, rows, *index = pack_values(context.k, z, context.keep, context.mask)
        return {"keys": keys, "rows": rows}, tuple(index)


def kept_rows(rows: Tensor, bits: Tensor, n_kept: int) -> Tensor:
    """Gather the n_kept groups that masks bits (B, Hm, T) keep of rows (B, Hkv, T, S, x), in
    ascending order: (B, Hkv, T, n_kept, x)."""
    group = torch.arange(rows.size(3), device=bits.device)
    mask = bits.unsqueeze(-1) >> group & 1
    order = mask.argsort(dim=-1, descending=True, stable=True)
    kept = order[..., :n_kept, None]
    kept = kept.expand(-1, rows.size(1), -1, -1, rows.size(-1))
    return rows.gather(3, kept)


def packed_count(seen: Tensor, window: int, block: int) -> Tensor:
    """Return how many of `seen` tokens (int64, any shape) have left a window that keeps at least
    the newest `window` and gives up `block` at a time."""
    n_packed = (seen - window).div(block, rounding_mode="floor") * block
    return n_packed.clamp_min(0)


class WindowCache(LayerCacheBase):
    """The newest tokens of every sequence, whole, in a ring of W slots: token t lies in slot t
    modulo W. With W = window + block - 1 it keeps the newest `window` at least, and gives up
    `block` at a time.

    window_k, window_v  (B, Hkv, W, D)
    n_packed            (B,) int64 tokens that have left the window
    n_window            (B,) int64 tokens in it"""

    RING = ("window_k", "window_v")

    def __init__(
        self, batch: int, window: int, n_kv_head: int, head_dim: int, like: Tensor, block: int = 1
    ):
        self.window = window
        self.block = block
        self.dtype = like.dtype
        self.batch = batch
        self.owners = dict.fromkeys((*WindowCache.RING, "n_packed", "n_window"), "sequence")
        self.window_k = like.new_zeros(batch, n_kv_head, window + block - 1, head_dim)
        self.window_v = torch.zeros_like(self.window_k)
        self.n_packed = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.n_window = torch.zeros_like(self.n_packed)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, (B,) int64."""
        return self.n_packed + self.n_window

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "shape": tuple(self.window_k.shape[1::2]),
            "dtype": str(self.dtype),
            "kv_tail": self.window,
            "block": self.block,
        }

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        self.push({"window_k": new.k, "window_v": new.v}, new.n_pad)
        self.fresh = False

    def push(
        self, tokens: dict[str, Tensor], n_pad: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Put T new tokens, by ring (B, h, T, ...), into the window.

        Returns those that leave for them, oldest first, by ring (B, h, n, ...), and how many of the
        n each sequence has, (B,)."""
        T = next(iter(tokens.values())).size(2)
        W = self.window_k.size(2)
        source, count = self._in_order(T, n_pad)
        n_left = packed_count(self.n_packed + count, self.window, self.block)
        leaves = n_left.maximum(self.n_packed) - self.n_packed
        slot = torch.arange(W, device=source.device)
        number = (slot - (self.n_packed + leaves)[:, None]) % max(W, 1)
        stays = number < (count - leaves)[:, None]  # (B, W)
        held = source.gather(1, (leaves[:, None] + number).clamp_max(max(W + T - 1, 0)))
        width = 1  # one at most leaves for one, which need not be asked
        if T > 1 or self.block > 1:
            width = int(leaves.max()) if self.batch else 0
        gone = {}
        for name, new in tokens.items():
            ring = getattr(self, name)
            gone[name] = self._take(ring, new, source[:, :width])
            here = stays.view(self.batch, 1, W, *[1] * (ring.ndim - 3))
            ring.copy_(torch.where(here, self._take(ring, new, held), ring))
        self.n_packed.copy_(self.n_packed + leaves)
        self.n_window.copy_(count - leaves)
        return gone, leaves

    def _in_order(self, T: int, n_pad: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return where the tokens of [ring | T new] lie, oldest first and padding left out,
        (B, W + T), and how many each sequence has, (B,)."""
        W = self.window_k.size(2)
        n_pad = torch.zeros_like(self.n_window) if n_pad is None else n_pad
        count = self.n_window + T - n_pad
        number = torch.arange(W + T, device=count.device)
        old = (self.n_packed[:, None] + number) % max(W, 1)
        new = W + n_pad[:, None] + number - self.n_window[:, None]
        source = torch.where(number < self.n_window[:, None], old, new)
        return source.clamp_max(W + T - 1), count

    def _take(self, ring: Tensor, new: Tensor, source: Tensor) -> Tensor:
        """Take tokens source (B, width) of [ring | new], new (B, h, T, ...): (B, h, width, ...)."""
        both = torch.cat((ring, new.to(ring.dtype)), 2)
        row = torch.arange(self.batch, device=ring.device)[:, None]
        return both[row, :, source].transpose(1, 2)

    def view(self) -> CacheView:
        if not self.window_k.size(2):
            return CacheView((), None, None)
        window = WindowView(self.window_k, self.window_v, self.n_packed, self.n_window)
        return CacheView((), window, None)

    def beside(self, k: Tensor, v: Tensor, n_pad: Tensor | None) -> WindowView:
        """View the window and T new tokens after it that are not appended yet."""
        source, count = self._in_order(k.size(2), n_pad)
        k = self._take(self.window_k, k, source)
        v = self._take(self.window_v, v, source)
        return WindowView(k.contiguous(), v.contiguous(), None, count)

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens. What has left the window does not come back to it."""
        check_truncation(n_tokens)
        n = torch.as_tensor(n_tokens, device=self.n_packed.device).minimum(self.lengths)
        self.n_packed = self.n_packed.minimum(n)
        self.n_window = n - self.n_packed

    def check_counts(self) -> None:
        super().check_counts()
        check_range(self.n_window, self.window_k.size(2), "n_window")
        check_range(self.n_packed, torch.iinfo(torch.int64).max, "n_packed")


class PackedCache(WindowCache):
    """One layer's cache of K value groups per token: whole keys, the kept rows, one mask per token,
    and a window of the newest tokens with whole values.

    A sequence that has seen n tokens has packed max(0, (n - window) // block * block) of them,
    oldest first. Packed tensors are flat by (sequence, head), with the same capacity for each:

    keys        (token slots, D)
    rows        (row slots, D/S), K of every token
    bits        (mask slots,) of mask_dtype(S), one mask per token; none where K = 0
    token_base  (B, Hkv) int64, where a segment's keys start
    row_base    (B, Hkv) int64, where its rows start
    mask_base   (B, Hm) int64, where its masks start
    n_packed    (B,) int64, packed tokens

    The window is a ring of W slots; window_k, window_v and n_window are those of WindowCache:

    window_bits  (B, Hm, W), the masks that its tokens will be packed with

    Where the codec wants some, first tokens stay whole for good, outside n_packed and n_window:

    sink_k, sink_v  (B, Hkv, n_sinks, D)
    n_sink          (B,) int64

    Keys and rows are those of FloatCodec here; IntCodec holds them as bytes, and scales beside
    them. Capacity grows by a quarter when it is passed."""

    RING = (*WindowCache.RING, "window_bits", "sink_k", "sink_v")

    def __init__(
        self,
        batch: int,
        max_len: int,
        n_kv_head: int,
        head_dim: int,
        cfg: KVConfig,
        k: int,
        like: Tensor,
        maps: ValueBasis = ValueBasis(),
        codec: Any = None,
    ):
        super().__init__(batch, cfg.kv_tail, n_kv_head, head_dim, like, cfg.tail_leaves)
        self.Hkv = n_kv_head
        self.D = head_dim
        self.S = cfg.n_groups
        self.k = k
        self.mask_heads = n_kv_head if cfg.mask_scope == "head" else 1
        self.maps = maps
        self.codec = codec or FloatCodec()
        self.owners |= {**self.codec.owners, "bits": "mask"}
        self.owners |= dict.fromkeys(("token_base", "row_base", "mask_base"), "base")
        self.owners["window_bits"] = "sequence"
        slots = (batch, self.mask_heads, self.window_k.size(2))
        self.window_bits = like.new_zeros(slots, dtype=mask_dtype(self.S))
        self.sinks_open = self.codec.n_sinks > 0  # whether some sequence may still fill its sinks
        if self.sinks_open:
            self.owners |= dict.fromkeys(("sink_k", "sink_v", "n_sink"), "sequence")
            self.sink_k = like.new_zeros(batch, n_kv_head, self.codec.n_sinks, head_dim)
            self.sink_v = torch.zeros_like(self.sink_k)
            self.n_sink = torch.zeros_like(self.n_packed)
        self._allocate(max(0, max_len - self.window))
        self.room = self.capacity + self.window
        self.had_packed = 0  # the most of a sequence when reserve or fit looked last
        # whether single tokens are appended by a kernel, on the device alone
        by_kernel = self.codec.one_by_one(head_dim, self.window) and maps.from_keys is None
        self.by_kernel = by_kernel and use_triton("auto", like.device, like.dtype)

    # ---- what the base asks for

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, (B,) int64."""
        seen = self.n_packed + self.n_window
        return seen + self.n_sink if self.codec.n_sinks else seen

    @property
    def basis(self) -> ValueBasis:
        """The maps of what is stored: those it was given."""
        return self.maps

    def settings(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            **self.codec.settings(),
            **super().settings(),
            "n_groups": self.S,
            "topk_groups": self.k,
            "mask_heads": self.mask_heads,
            "n_sinks": self.codec.n_sinks,
        }

    def constants(self) -> dict[str, Tensor]:
        return {**self.basis.constants(), **self.codec.constants()}

    def segments(self, owner: str) -> tuple[Tensor, Tensor]:
        sizes = {"row": self.capacity * self.k, "block": self.capacity // self.block}
        size = sizes.get(owner, self.capacity)  # of a segment's tokens or masks: capacity
        heads = self.mask_heads if owner == "mask" else self.Hkv
        number = torch.arange(self.batch * heads, device=self.n_packed.device)
        number = number.view(self.batch, heads)
        return number * size, torch.full_like(number, size)

    def set_bases(self) -> None:
        super().set_bases()
        slots = self.bits
        heads = self.mask_heads
        if not self.k:  # there are no masks
            slots = self.keys
            heads = self.Hkv
        self.capacity = len(slots) // max(1, self.batch * heads)  # tokens of a segment
        self.token_base, _ = self.segments("token")
        self.row_base, _ = self.segments("row")
        self.mask_base, _ = self.segments("mask")
        self.ints = self.codec.ints(self)

    @classmethod
    def alike(cls, caches: Sequence[PackedCache]) -> list[PackedCache]:
        parts = super().alike(caches)
        most = max(c.capacity for c in parts)
        for part in parts:
            part._grow(most, exact=True)
        parts[0].sinks_open = any(c.sinks_open for c in parts)
        return parts

    def check_counts(self) -> None:
        self.set_bases()
        super().check_counts()
        check_range(self.n_packed, self.capacity, "n_packed")
        if self.codec.n_sinks:
            check_range(self.n_sink, self.codec.n_sinks, "n_sink")
            self.sinks_open = True  # reserve looks

    # ---- capacity

    def _allocate(self, capacity: int) -> None:
        capacity = cdiv(capacity, self.codec.block) * self.codec.block
        n_tokens = self.batch * self.Hkv * capacity
        parts = self.codec.empty(n_tokens, self.k, self.S, self.D, self.window_k[:0])
        for name, t in parts.items():
            setattr(self, name, t)
        n_masks = self.batch * self.mask_heads * capacity if self.k else 0
        self.bits = torch.zeros(n_masks, dtype=mask_dtype(self.S), device=self.n_packed.device)
        self.set_bases()

    def _grow(self, need: int, exact: bool = False) -> None:
        """Have room for `need` packed tokens in every segment."""
        if need > self.capacity:
            self._resize(need if exact else max(need, self.capacity + self.capacity // 4))

    def _resize(self, capacity: int) -> None:
        """Have room for `capacity` packed tokens in every segment, of whole blocks."""
        if cdiv(capacity, self.codec.block) == self.capacity // self.codec.block:
            return
        old = {name: getattr(self, name) for name in (*self.codec.owners, "bits")}
        self._allocate(capacity)
        for name, t in old.items():
            heads = self.mask_heads if name == "bits" else self.Hkv
            copy_segments(t, getattr(self, name), self.batch * heads)

    def reserve(self, n_tokens: int) -> None:
        seen = self._look()
        self._grow(seen + n_tokens - self.window)
        self.room = self.capacity + self.window - seen
        if self.sinks_open:
            self.sinks_open = bool((self.n_sink < self.codec.n_sinks).any())

    def fit(self, n_tokens: int) -> None:
        seen = self._look()
        self._resize(max(self.had_packed, seen + n_tokens - self.window))
        self.room = self.capacity + self.window - seen

    def _look(self) -> int:
        """Return the most tokens of a sequence, first ones that stay whole left out, and note in
        `had_packed` the most that one has packed. Asks the device once."""
        if not self.batch:
            return 0
        counts = torch.stack((self.n_packed, self.n_packed + self.n_window))
        self.had_packed, seen = counts.amax(1).tolist()
        return seen

    @property
    def longest(self) -> int:
        """No segment has more packed tokens: a bound that the host knows without asking the device.
        It grows with `append`, and is all there is room for until the next `reserve` where
        sequences were joined, loaded or truncated."""
        return min(self.capacity, max(self.had_packed, self.capacity - self.room))

    # ---- reading

    def view(self) -> CacheView:
        n = self.n_packed.unsqueeze(1).expand(-1, self.mask_heads)
        packed = PackedView(
            keys=self.keys,
            rows=self.rows,
            bits=self.bits,
            before=None,
            tile_rows=None,
            n=n,
            token_base=self.token_base,
            row_base=self.row_base,
            mask_base=self.mask_base,
            tile_base=self.mask_base,
            n_groups=self.S,
            k=self.k,
            longest=self.capacity,
            held=self.batch * self.Hkv * self.capacity,
            ints=self.ints,
        )
        window = WindowView(self.window_k, self.window_v, self.n_packed, self.n_window)
        return CacheView((packed,), window, self._sinks)

    @property
    def _sinks(self) -> WindowView | None:
        """First tokens that stay whole; None where the codec wants none."""
        if not self.codec.n_sinks:
            return None
        return WindowView(self.sink_k, self.sink_v, None, self.n_sink)

    # ---- writing

    def packed_positions(self) -> int:
        """Return the number in its sequence of the first packed token of every segment; the others
        follow it."""
        return self.codec.n_sinks

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        T = new.k.size(2)
        if self.room < T:
            self.reserve(T)
        first = self.codec.n_sinks if self.fresh else 0  # which take no room here
        self.room -= max(0, T - first)
        new = new._replace(k=new.k.to(self.dtype), v=new.v.to(self.dtype))
        if self.sinks_open:
            new = new._replace(n_pad=fill_sinks(self._sinks, new))
        if T == 1 and self.by_kernel:
            self._append_one(new)
        else:
            self._append_many(new)
        self.fresh = False

    def positions(self, new: NewTokens) -> Tensor:
        """Return the numbers in their sequence of tokens that are to be appended, (B, T) int64."""
        column = torch.arange(new.k.size(2), device=new.k.device)
        first = self.lengths if new.n_pad is None else self.lengths - new.n_pad
        return first[:, None] + column

    def _append_one(self, new: NewTokens) -> None:
        """Append one token of each sequence on the device alone (a Triton kernel)."""
        view = self.view()
        append_packed(
            view.packed[0],
            view.window,
            self.window_bits,
            self.n_packed,
            self.n_window,
            new.k,
            new.v,
            self.window,
            self.block,
            route=None if new.route is None else new.route[:, :, 0],
            enc=self.basis.enc,
            skip=new.n_pad,
        )

    def _append_many(self, new: NewTokens) -> None:
        """Append T tokens: those that leave the window are packed, the others stay in it."""
        mask = new.route
        if mask is None:
            z = self.basis.to_store(new.k, new.v, self.positions(new))
            mask = top_k_mask(group_energy(z, self.S, self.mask_heads), self.k)
        tokens = {"window_k": new.k, "window_v": new.v, "window_bits": mask_to_bits(mask)}
        gone, leaves = self.push(tokens, new.n_pad)
        if gone["window_k"].size(2) and self.capacity:
            self._pack(gone["window_k"], gone["window_v"], gone["window_bits"], leaves)

    def _pack(self, k: Tensor, v: Tensor, bits: Tensor, leaves: Tensor) -> None:
        """Write the tokens that have just left the window: the first leaves (B,) of k, v (B, Hkv,
        N, D) and bits (B, Hm, N)."""
        begin = self.n_packed - leaves
        width = k.size(2)
        alone = width == self.codec.block == 1
        if not alone:
            facts = torch.stack((leaves.min(), begin.min(), begin.max()))
            least, first, last = facts.tolist()
        number = torch.arange(width, device=k.device)
        position = begin[:, None] + number + self.codec.n_sinks
        z = self.basis.to_store(k, v, position)
        packed = self.codec.pack(k, z, bits, self.S, self.k)
        if self.k:
            packed["bits"] = bits
        for name, new in packed.items():  # (B, heads, width / each, ...)
            heads = new.size(1)
            each = width // new.size(2)  # tokens to an entry
            cells = getattr(self, name).view(
                self.batch, heads, self.capacity // each, *new.shape[3:]
            )
            if alone:  # nothing is asked: where no token leaves, what is there stays
                row = torch.arange(self.batch, device=k.device)
                at = begin.clamp_max(self.capacity - 1)
                here = leaves.view(self.batch, 1, *[1] * (new.ndim - 3)) > 0
                cells[row, :, at] = torch.where(here, new[:, :, 0], cells[row, :, at])
                continue
            if least == width and first == last:  # every segment grows by the same tokens
                cells[:, :, first // each : (first + width) // each] = new
                continue
            entry = torch.arange(new.size(2), device=k.device)
            n_new = leaves[:, None, None] // each
            written = (entry < n_new).expand(-1, heads, -1)
            b, h, i = written.nonzero(as_tuple=True)
            to = begin[b] // each + i
            cells[b, h, to] = new[b, h, i]

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens. What was packed stays packed; integers are kept in
        whole blocks, whose keys share steps: ValueError inside one."""
        check_truncation(n_tokens)
        n = torch.as_tensor(n_tokens, device=self.n_packed.device).expand_as(self.n_packed)
        rest = (n - self.n_sink).clamp_min(0) if self.codec.n_sinks else n
        self.codec.check_cut(rest.minimum(self.n_packed))
        if self.codec.n_sinks:
            self.n_sink = self.n_sink.minimum(n)
            self.sinks_open = True  # reserve looks
        seen = (self.n_packed + self.n_window).minimum(rest)
        self.n_packed = self.n_packed.minimum(rest)
        self.n_window = seen - self.n_packed
        self.room = 0
