"""The cache of query-aware selection: a context packed once, of which whole tokens are dropped,
too, and a window of everything after it.

Segments (sequence, head) have different lengths here, each exactly as long as what it keeps, and
every token may keep another number of groups. So rows are found by stored offsets
(storage/layout.py).

    cache = RaggedCache(batch, max_len, n_kv_head, head_dim, n_groups, mask_heads, like=x)
    cache.pack(k, z, keep, mask, valid)           # once, the context
    cache.append(NewTokens(k, v, n_pad=None))     # then the query region and what is generated

Letters: storage/layout.py; C columns of a context.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import check
from storage.cache import (
    CacheView,
    NewTokens,
    check_range,
    check_truncation,
    of_one_width,
)
from storage.dense import DenseCache, write_ring
from storage.kernel_base import ANYWHERE
from storage.layout import (
    ALIGNED,
    PackedView,
    WindowView,
    bits_to_mask,
    cat_each,
    cdiv,
    mask_dtype,
    mask_to_bits,
    segment_starts,
    starts,
    tile_size,
)
from storage.packed import FloatCodec, ValueBasis
from storage.packing import Context

SHARED = ("bits", "before", "tile_rows", "n_packed", "n_rows")  # by layers of one mask
BASES = ("token_base", "row_base", "mask_base", "tile_base")


class RaggedCache(DenseCache):
    """One layer's selected context and its window.

    keys        (tokens, D), of the tokens that survive
    rows        (rows, d), their kept groups, token by token
    bits        (n_masks,) of mask_dtype, one mask per survivor; a survivor may have no rows
    before      (n_masks,) uint8, the rows of its tile before each survivor
    tile_rows   (tiles,) int32, the rows of its segment before each tile
    n_packed    (B, Hm) int64, survivors of each segment
    n_rows      (B, Hm) int64, rows of each segment
    n_context   (B,) int64, tokens of the context that are not in the window, dropped ones included
    token_base  (B, Hkv) int64, where a segment's keys start
    row_base    (B, Hkv) int64, where its rows start
    mask_base   (B, Hm) int64, where its masks start
    tile_base   (B, Hm) int64, where its tiles start
    window_k    (B, Hkv, W, D), of which each sequence fills the first n_window slots
    window_v    (B, Hkv, W, D), whole values
    n_window    (B,) int64

    Where keys tell values (maps.from_keys) their positions are held, too:

    place       (bytes,) uint8, a bit for each of a segment's n_context tokens: whether it survived

    Keys and rows are those of FloatCodec here; IntCodec holds them as bytes, and scales beside
    them. Where tokens stood is not kept, so the context cannot be truncated."""

    ONE_PROMPT = True

    def __init__(
        self,
        batch: int,
        max_len: int,
        n_kv_head: int,
        head_dim: int,
        n_groups: int,
        mask_heads: int,
        like: Tensor,
        codec: Any = None,
        maps: ValueBasis = ValueBasis(),
    ):
        check(
            mask_heads in (1, n_kv_head),
            f"mask_heads={mask_heads}",
            f"1 or the {n_kv_head} KV heads",
            "give one of them",
        )
        super().__init__(batch, 0, n_kv_head, head_dim, like)
        self.Hkv = n_kv_head
        self.D = head_dim
        self.S = n_groups
        self.mask_heads = mask_heads
        self.max_len = max_len
        self.codec = codec or FloatCodec()
        self.tile = tile_size(n_groups, self.codec.levelled)  # tokens per entry of tile_rows
        self.maps = maps
        self.keep_all = False  # whether the context was stored as values, not in the basis
        self.owners |= {
            **self.codec.owners,
            **{"bits": "mask", "before": "mask", "tile_rows": "tile"},
            **dict.fromkeys(("n_packed", "n_rows", "n_context"), "sequence"),
            **dict.fromkeys(BASES, "base"),
        }
        with_blocks = "key_scale" in self.owners
        if with_blocks:
            self.owners["block_base"] = "base"
        # what segment_starts asks for
        self.sizes = (n_kv_head, self.tile, self.codec.block if with_blocks else 0)
        if maps.from_keys is not None:
            self.owners["place"] = "place"
            self.place = torch.zeros(0, dtype=torch.uint8, device=like.device)
        for name, t in self.codec.empty(0, 1, n_groups, head_dim, like[:0]).items():
            setattr(self, name, t)
        device = like.device
        bits = mask_dtype(2 * n_groups if self.codec.levelled else n_groups)
        self.bits = torch.zeros(0, dtype=bits, device=device)
        self.before = torch.zeros(0, dtype=torch.uint8, device=device)
        self.tile_rows = torch.zeros(0, dtype=torch.int32, device=device)
        self.n_packed = torch.zeros(batch, mask_heads, dtype=torch.int64, device=device)
        self.n_rows = torch.zeros_like(self.n_packed)
        self.n_context = torch.zeros(batch, dtype=torch.int64, device=device)
        self.set_bases()

    def another(self, codec: Any, maps: ValueBasis) -> RaggedCache:
        """Return a cache for another layer, as empty as this one. It shares this one's tensors,
        which nothing writes to: what is stored takes their place."""
        out = copy.copy(self)
        out.codec = codec
        out.maps = maps
        out.ints = codec.ints(out)
        return out

    # ---- what the base asks for

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, dropped ones included: (B,) int64."""
        return self.n_context + self.n_window

    @property
    def basis(self) -> ValueBasis:
        """The maps of what is stored of the context."""
        return ValueBasis() if self.keep_all else self.maps

    def settings(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            **self.codec.settings(),
            **super().settings(),
            "n_groups": self.S,
            "mask_heads": self.mask_heads,
            "keep_all": self.keep_all,
            "n_sinks": self.codec.n_sinks,
        }

    def constants(self) -> dict[str, Tensor]:
        return {**self.basis.constants(), **self.codec.constants()}

    def segments(self, owner: str) -> tuple[Tensor, Tensor]:
        tokens = self.n_packed.expand(-1, self.Hkv)
        if owner == "token":
            return self.token_base, tokens
        if owner == "row":
            return self.row_base, self.n_rows.expand(-1, self.Hkv)
        if owner == "mask":
            return self.mask_base, self.n_packed
        if owner == "place":
            count = cdiv(self.n_context, 8)[:, None].expand(-1, self.mask_heads)
            return starts(count), count
        if owner == "tile":
            return self.tile_base, cdiv(self.n_packed, self.tile)
        return self.block_base, cdiv(tokens, self.codec.block)

    def set_bases(self) -> None:
        """Let segments follow each other without gaps."""
        super().set_bases()
        if len(self.bits):
            bases = segment_starts(self.n_packed, self.n_rows, *self.sizes)
            self.longest = int(self.n_packed.max())
        else:  # nothing to ask the device
            heads = {"mask_base": self.mask_heads, "tile_base": self.mask_heads}
            names = [name for name, owner in self.owners.items() if owner == "base"]
            shape = {name: (self.batch, heads.get(name, self.Hkv)) for name in names}
            bases = {name: self.n_packed.new_zeros(shape[name]) for name in names}
            self.longest = 0
        for name, base in bases.items():
            setattr(self, name, base)
        self.ints = self.codec.ints(self)

    def take(self, tensors: dict[str, Tensor], longest: int) -> None:
        """Hold these tensors, by name; longest: no segment has more tokens."""
        for name, t in tensors.items():
            setattr(self, name, t)
        self.longest = longest
        if self.ints is not None:  # those of what was held before
            self.ints = self.codec.ints(self)

    def check_counts(self) -> None:
        check_range(self.n_packed, len(self.bits), "n_packed")
        check_range(self.n_rows, max(1, len(self.rows)), "n_rows")
        check_range(self.n_context, 2**31, "n_context")
        self.set_bases()
        super().check_counts()

    @classmethod
    def cat_layers(cls, layers: Sequence[Sequence[RaggedCache]]) -> list[RaggedCache]:
        """Join the caches of layers that store alike all at once: `cat`, which does it one by one,
        is the reference. The layers' tensors are views of common ones, or their own where kernels
        look at how they are aligned and views would be less so."""
        if not any(len(cache.bits) for caches in layers for cache in caches):
            return super().cat_layers(layers)
        for caches in layers:
            cls.check_alike(caches)
        one = layers[0][0]
        joined = {}
        for name in [name for name, owner in one.owners.items() if owner != "base"]:
            tensors = [[getattr(c, name) for c in caches] for caches in layers]
            if name in cls.GROWS:
                tensors = [of_one_width(windows) for windows in tensors]
            anywhere = f"{name}_ptr" in ANYWHERE
            joined[name] = cat_each(tensors, 1 if anywhere else ALIGNED)
        counts = [torch.cat(joined[name]) for name in ("n_packed", "n_rows")]
        n_packed, n_rows = torch.stack(counts).cpu()  # the host waits once
        bases = {}
        for name, t in segment_starts(n_packed, n_rows, *one.sizes).items():
            bases[name], _ = from_own_start(t, len(layers))
        for name, t in copied_at_once(bases, one.n_packed.device).items():
            joined[name] = t.unbind()
        longest = n_packed.view(len(layers), -1).amax(-1).tolist()
        out = []
        for i, caches in enumerate(layers):
            cache = copy.copy(caches[0])
            cache.take({name: of_layers[i] for name, of_layers in joined.items()}, longest[i])
            cache.batch = len(cache.n_window)
            cache.room = 0  # the next append looks
            cache.fresh = all(c.fresh for c in caches)
            out.append(cache)
        return out

    # ---- the context

    @torch.no_grad()
    def pack(
        self,
        k: Tensor,
        z: Tensor,
        keep: Tensor,
        mask: Tensor,
        valid: Tensor,
        bits_from: RaggedCache | None = None,
        query_moment: Tensor | None = None,
    ) -> None:
        """Store a context of C columns, once, before anything else.

        k      (B, Hkv, C, D), keys
        z      (B, Hkv, C, D), values in the coordinates that are cut into groups
        keep   (B, Hm, C) bool, the tokens that survive, each with its key
        mask   (B, Hm, C, S) bool, groups of theirs; or uint8, their levels
        valid  (B, C) bool, False for padding, which is on the left and never stored
        bits_from: a cache packed with the same keep, mask and valid, whose masks, offsets and
            counts serve this one too
        query_moment  (B, Hkv, D, D), second moment of the queries to come, for which integer keys
            are rounded; None: to the nearest"""
        assert self.fresh, "a context is packed once, before anything else"
        assert not (valid[:, :-1] & ~valid[:, 1:]).any(), "padding must be on the left"
        self.check_codec(self.codec.levelled == (mask.dtype == torch.uint8))
        keep = keep & after_first(valid, self.codec.n_sinks)[:, None]
        mask = mask * keep.unsqueeze(-1)
        k = k.to(self.dtype)
        z = z.to(self.dtype)
        predict = None
        if self.basis.from_keys is not None:
            number = torch.arange(valid.size(1), device=k.device) - (~valid).sum(-1, keepdim=True)
            b, head, column = keep.expand(-1, self.Hkv, -1).nonzero(as_tuple=True)
            predict = partial(
                self.basis.from_keys.predict_each, head=head, position=number[b, column]
            )
            self._place(keep, valid)
        context = Context(k, z, keep, mask, query_moment, predict)
        held, index = self.codec.pack_sequences([self.codec], context)
        for name, t in {**held, **dict(zip(SHARED, index, strict=True))}.items():
            setattr(self, name, t.to(k.device, non_blocking=True))
        self.n_context = valid.sum(-1)
        if bits_from is None:
            self.set_bases()
        else:
            self._share(bits_from)
        self.max_len -= valid.size(1)
        if not self.codec.n_sinks:  # else fill_windows says how many more
            self.reserve(self.max_len)
        self.fresh = False

    def _place(self, keep: Tensor, valid: Tensor) -> None:
        """Hold which tokens after the first ones keep (B, Hm, C) marks."""
        n_first = self.codec.n_sinks
        n = valid.sum(-1)  # (B,)
        C = valid.size(1)
        column = torch.arange(cdiv(C, 8) * 8, device=n.device) + (C - n + n_first)[:, None]
        there = keep.take_along_dim(column.clamp_max(C - 1)[:, None], -1) & (column < C)[:, None]
        held = mask_to_bits(there.unflatten(-1, (-1, 8)))  # (B, Hm, bytes)
        count = cdiv((n - n_first).clamp_min(0), 8)[:, None, None]
        self.place = held[(torch.arange(held.size(-1), device=n.device) < count).expand_as(held)]

    def packed_positions(self) -> Tensor:
        """Return the numbers in their sequence of the survivors, left-aligned: (B, Hm, N) int64, 0
        in slots without a token. Where keys tell values."""
        base, count = self.segments("place")
        width = int(count.max()) if count.numel() else 0
        slot = torch.arange(width, device=base.device)
        real = slot < count.unsqueeze(-1)
        held = torch.zeros(real.shape, dtype=torch.uint8, device=base.device)
        held[real] = self.place
        b, h, number = bits_to_mask(held, 8).flatten(-2).nonzero(as_tuple=True)
        out = torch.zeros(*self.n_packed.shape, self.longest, dtype=torch.int64, device=base.device)
        first = starts(self.n_packed)[b, h]
        rank = torch.arange(len(number), device=base.device) - first
        out[b, h, rank] = number + self.codec.n_sinks
        return out

    @staticmethod
    def check_codec(fits: bool) -> None:
        """Raise ValueError unless what was chosen can be stored by the codec."""
        if not fits:
            raise ValueError(
                "a context chosen for another way of storing than that of the cache: "
                "make the cache after the selector is set"
            )

    def _share(self, other: RaggedCache) -> None:
        """Hold the masks and offsets of another layer instead of equal ones of its own."""
        same = torch.equal(other.n_packed, self.n_packed) and torch.equal(other.n_rows, self.n_rows)
        assert same, "bits_from was packed with another keep or mask"
        names = [*SHARED, *BASES, *(["block_base"] if "block_base" in self.owners else [])]
        for name in names:
            setattr(self, name, getattr(other, name))
        self.longest = other.longest
        self.ints = self.codec.ints(self)

    def groups_kept(self) -> int:
        """Count the value groups kept of all tokens, at whatever level; shared masks once."""
        if not self.codec.levelled:
            return int(self.n_rows.sum())
        return int((self.view().packed[0].masks()[0] > 0).sum())

    # ---- the window

    def reserve(self, n_tokens: int) -> None:
        longest = int(self.n_window.max()) if self.batch else 0
        n_slots = self.window_k.size(2)
        if longest + n_tokens > n_slots:
            if not n_slots:  # counts of a window are written to
                self.n_window = self.n_window.clone()
            more = n_slots + n_slots // 4 if n_slots else self.max_len
            n_slots = max(longest + n_tokens, more)
            for name in self.GROWS:
                old = getattr(self, name)
                setattr(self, name, F.pad(old, (0, 0, 0, n_slots - old.size(2))))
        self.room = n_slots - longest

    def snapshot(self) -> RaggedCache:
        # without a window there is nothing yet that is written to
        return super().snapshot() if self.window_k.size(2) else copy.copy(self)

    def view(self) -> CacheView:
        packed = PackedView(
            keys=self.keys,
            rows=self.rows,
            bits=self.bits,
            before=self.before,
            tile_rows=self.tile_rows,
            n=self.n_packed,
            token_base=self.token_base,
            row_base=self.row_base,
            mask_base=self.mask_base,
            tile_base=self.tile_base,
            n_groups=self.S,
            k=0,
            longest=self.longest,
            held=len(self.keys),
            exact=True,
            ints=self.ints,
        )
        window = WindowView(self.window_k, self.window_v, None, self.n_window)
        return CacheView((packed,), window, None)

    def with_gradient(self, new: NewTokens) -> CacheView:
        """Return what `view` will be once `new` is appended, with a window of its own, through
        which their keys and values get a gradient: what is stored passes none."""
        T = new.k.size(2)
        k = F.pad(self.window_k, (0, 0, 0, T))
        v = F.pad(self.window_v, (0, 0, 0, T))
        write_ring(k, new.k, self.n_window, new.n_pad)
        write_ring(v, new.v, self.n_window, new.n_pad)
        count = self.n_window + (T if new.n_pad is None else T - new.n_pad)
        return self.view()._replace(window=WindowView(k, v, None, count))

    def read_through(self, dec: Tensor) -> RaggedCache:
        """Return this cache, the same tensors, whose values come out of the basis by dec
        (Hkv, D, D), which gets a gradient so."""
        out = copy.copy(self)
        out.maps = self.maps._replace(dec=dec)
        return out

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens. ValueError inside the context, which is kept as it
        is."""
        check_truncation(n_tokens)
        n = torch.as_tensor(n_tokens, device=self.n_window.device).expand_as(self.n_window)
        rest = n - self.n_context  # of the window, where first tokens of the context may lie, too
        fine = (rest >= self.codec.n_sinks) | (rest >= self.n_window) | (self.n_context == 0)
        check(
            bool(fine.all()) and bool((rest >= 0).all()),
            f"truncating to {n.tolist()} tokens",
            f"a selected context of {self.n_context.tolist()} tokens is kept as it is",
            "keep the whole context, or process a shorter prompt",
        )
        self.n_window = self.n_window.minimum(rest)
        self.room = 0


class EmptyCaches:
    """Makes empty caches for the layers of a model, whose paths share it. Layers that store alike
    get the tensors of one cache (RaggedCache.another), made once for a batch of a size."""

    def __init__(self):
        self.made: tuple[tuple, RaggedCache | None] = (), None

    def new(self, *shape: int, like: Tensor, codec: Any, maps: ValueBasis) -> RaggedCache:
        """Return an empty cache; the arguments are those of RaggedCache."""
        stored = (type(codec), codec.n_sinks, *codec.settings().values())
        alike = (shape, like.dtype, like.device, stored, maps.from_keys is None)
        known, first = self.made
        if alike != known:
            first = RaggedCache(*shape, like, codec, maps)
            self.made = alike, first
        return first.another(codec, maps)


def after_first(valid: Tensor, n_first: int) -> Tensor:
    """Mark what may be packed of columns of which `valid` (B, C) are no padding: the first n_first
    tokens of a sequence go to the window instead. (B, C) bool."""
    return valid & (valid.cumsum(-1) > n_first) if n_first else valid


def from_own_start(base: Tensor, L: int) -> tuple[Tensor, list[int]]:
    """Return where the segments of L layers start, base (L B, h), counted from the first layer's,
    as counted from their own layer's, (L, B, h); and where each layer starts. On the host."""
    of_layer = base.view(L, -1)
    begin = of_layer[:, :1]
    return (of_layer - begin).view(L, -1, base.size(1)), begin.flatten().tolist()


def copied_at_once(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy tensors of one type from the host, by name, all in one piece. Nothing waits for the
    device."""
    flat = torch.cat([t.flatten() for t in tensors.values()]).to(device, non_blocking=True)
    parts = flat.split([t.numel() for t in tensors.values()])
    return {name: t.view(tensors[name].shape) for name, t in zip(tensors, parts, strict=True)}


@torch.no_grad()
def pack_layers(
    caches: Sequence[RaggedCache],
    k: Tensor,
    z: Tensor,
    keep: Tensor,
    mask: Tensor,
    valid: Tensor,
    query_moment: Tensor | None = None,
) -> None:
    """Pack L layers at once, which RaggedCache.pack does one by one. fill_windows follows, and
    counts their contexts.

    k, z   (L, B, Hkv, C, D)
    keep   (L, B, Hm, C) bool
    mask   (L, B, Hm, C, S) bool, or levels, uint8
    valid  (B, C) bool
    query_moment  (L, B, Hkv, D, D), or None

    Their tensors are views of common ones, L times fewer kernels; KVCache.nbytes counts each
    once. Where kernels pack, the host waits once for counts, and with levels once for which tokens
    they are, however many layers there are; where none does, more often, and again for each part.
    It then works out alone where things lie."""
    codec = caches[0].codec
    levelled = mask.dtype == torch.uint8
    for cache in caches:
        cache.check_codec(type(cache.codec) is type(codec) and cache.codec.levelled == levelled)
        assert cache.fresh, "a context is packed once, before anything else"
    keep = keep & after_first(valid, codec.n_sinks)[:, None]
    mask = mask * keep.unsqueeze(-1)
    k = k.to(caches[0].dtype)
    z = z.to(caches[0].dtype)
    at_once = codec.layers_at_once(k, mask.size(-1)) if codec.in_parts else len(caches)
    for a in range(0, len(caches), at_once):
        some = slice(a, a + at_once)
        moment = None if query_moment is None else query_moment[some]
        _pack_some(caches[some], k[some], z[some], keep[some], mask[some], moment)
    for cache in caches:
        cache.max_len -= valid.size(1)
        cache.fresh = False


def _pack_some(
    caches: Sequence[RaggedCache],
    k: Tensor,
    z: Tensor,
    keep: Tensor,
    mask: Tensor,
    query_moment: Tensor | None,
) -> None:
    """Pack layers as if their sequences were those of one."""
    L, B = keep.shape[:2]
    one = caches[0]
    codecs = [cache.codec for cache in caches]
    moment = None if query_moment is None else query_moment.flatten(0, 1)
    flat = (t.flatten(0, 1) for t in (k, z, keep, mask))
    held, index = one.codec.pack_sequences(codecs, Context(*flat, moment))
    held |= dict(zip(SHARED, index, strict=True))
    counts = {name: held.pop(name) for name in ("n_packed", "n_rows")}
    own_counts = {name: t.unflatten(0, (L, B)) for name, t in counts.items()}
    bases = {}
    first = {}
    for name, t in segment_starts(*counts.values(), *one.sizes).items():
        bases[name], first[name] = from_own_start(t, L)
    # Apart: a cache that takes a state works out bases anew (set_bases), and counts that were views
    # of one tensor with them would keep the old ones in memory.
    of_segments = copied_at_once(own_counts, k.device) | copied_at_once(bases, k.device)
    parts = {name: t.unbind() for name, t in of_segments.items()}
    for name, t in held.items():
        ends = [*first[one.owners[name] + "_base"], len(t)]
        parts[name] = t.split([b - a for a, b in pairwise(ends)])
    longest = int(counts["n_packed"].max())
    for i, cache in enumerate(caches):
        cache.take({name: of_layers[i] for name, of_layers in parts.items()}, longest)


@torch.no_grad()
def fill_windows(
    caches: Sequence[RaggedCache], k: Tensor, v: Tensor, C: int, n_pad: Tensor | None
) -> None:
    """Let L layers that have packed a context of C columns hold the rest of its prompt whole: its
    first tokens, as many as the codec says and without which it was packed, and what follows it.
    Nothing waits for the device.

    k, v   (L, B, Hkv, T, D)
    n_pad  (B,) of the columns padding; None: none"""
    L, B, Hkv, T, D = k.shape
    n_first = min(caches[0].codec.n_sinks, C)
    pad = k.new_zeros(B, dtype=torch.int64) if n_pad is None else n_pad
    n_sinks = (C - pad).clamp(0, n_first)  # (B,) fewer in a shorter context
    skipped = pad.clamp_min(C) - n_sinks  # columns before the region that are in no slot
    longest = n_first + T - C
    W = max(caches[0].max_len + n_first, longest)
    slot = torch.arange(W, device=k.device)
    is_first = slot < n_sinks[:, None]
    column = slot + torch.where(is_first, pad[:, None], skipped[:, None])  # (B, W)
    empty = (column >= T)[:, None, :, None]
    column = column.clamp_max(T - 1)[:, None, :, None].expand(L, B, Hkv, W, D)

    def window(whole: Tensor) -> tuple[Tensor, ...]:
        held = whole.gather(3, column).to(caches[0].dtype)
        return held.masked_fill_(empty, 0).unbind()

    window_k = window(k)
    window_v = window(v)
    n_window = (T - skipped).repeat(L, 1).unbind()  # kernels count in it
    n_context = (skipped - pad).repeat(L, 1).unbind()
    for i, cache in enumerate(caches):
        cache.window_k = window_k[i]
        cache.window_v = window_v[i]
        cache.n_window = n_window[i]
        cache.n_context = n_context[i]
        cache.max_len += n_first
        cache.room = W - longest
