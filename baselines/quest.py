"""Quest as it was published (arXiv 2406.10774): everything is kept, and every query picks anew what
it reads.

Pages of PAGE tokens have bounds on what a query's logits can be in them (baselines/pages.py). A
decoding step reads the pages of largest bound, as many as a budget of tokens holds, and always the
page that is being filled. The first two layers read everything, as in the paper. The first prompt
in a cache reads itself whole. What it saves is reads, not bytes: the cache holds all keys and
values, and bounds.

    attach(model, KVConfig(topk_groups=4), read_tokens=256)             # 4 of 4 groups: Quest alone
    attach(model, KVConfig(n_groups=16, topk_groups=8), 256, batches=[idx])

The second is the protocol of the sub-token paper's third version (arXiv 2604.21335): Quest picks
the tokens, value groups are read of them. Here the groups are what is stored, in a PackedCache, in
all layers, so the bytes are those of the groups.

Differs: query heads that share a KV head share its pages, by the mean of their softmax over bounds
(the paper's models have a KV head for every query head, where that is the order of bounds); a row's
first token begins a page. Plain PyTorch: it shows what is lost, not how fast it is.

Letters: storage/layout.py; P pages, m pages that are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kv_router
from baselines.pages import PAGE, logit_bounds, page_bounds
from config import KVConfig, ModelConfig, check
from kv_router import ValueGroupPath
from model import attend, attend_masked, attention_mask
from routing.in_window import group_logits, group_weights, window_mask
from selection.relevance import NEVER
from storage.as_dense import as_dense
from storage.cache import LayerCacheBase, NewTokens
from storage.dense import DenseCache
from storage.layout import at_least_float32, cdiv, expand_mask, soft_cap, top_k_mask
from storage.packed import PackedCache

# -------------------- bounds


class PageBounds:
    """What a cache of either kind gets to be searched by pages.

    page_low, page_high  (B, Hkv, P, D): least and largest of every key coordinate, infinite while a
                         page is empty

    Such a cache gives its stored keys by keys_in_order(): (B, Hkv, N, D), each sequence from slot 0
    on.

    They are never written into, so that a snapshot may hold them."""

    def start_bounds(self, max_len: int, like: Tensor) -> None:
        """Begin with empty pages for max_len tokens."""
        _, Hkv, _, D = self.window_k.shape
        shape = (self.batch, Hkv, cdiv(max_len, PAGE), D)
        self.page_low = like.new_full(shape, float("inf"))
        self.page_high = like.new_full(shape, float("-inf"))
        self.owners |= dict.fromkeys(("page_low", "page_high"), "sequence")

    def widen(self, k: Tensor, number: Tensor, there: Tensor) -> None:
        """Let the bounds hold keys k (B, Hkv, T, D), which are the tokens number (B, T) of their
        sequences where `there` (B, T)."""
        needed = cdiv(int(number.max()) + 1, PAGE)
        missing = max(0, needed - self.page_low.size(2))
        if missing:
            more = (0, 0, 0, missing)
            self.page_low = F.pad(self.page_low, more, value=float("inf"))
            self.page_high = F.pad(self.page_high, more, value=float("-inf"))
        n_pages = self.page_low.size(2)
        low, high = page_bounds(k.to(self.dtype), number, there, n_pages)
        self.page_low = self.page_low.minimum(low)
        self.page_high = self.page_high.maximum(high)

    def find_bounds(self) -> None:
        """Work the bounds out anew from the stored keys."""
        self.page_low = torch.full_like(self.page_low, float("inf"))
        self.page_high = torch.full_like(self.page_high, float("-inf"))
        k = self.keys_in_order()
        number = torch.arange(k.size(2), device=k.device)
        number = number.expand(self.batch, -1)
        there = number < self.lengths[:, None]
        if number.numel():
            self.widen(k, number, there)

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        before = self.lengths.clone()
        super().append(new)
        n_pad = torch.zeros_like(before) if new.n_pad is None else new.n_pad
        column = torch.arange(new.k.size(2), device=new.k.device)
        own = column - n_pad[:, None]  # (B, T), of each token among the new ones
        number = before[:, None] + own
        self.widen(new.k, number, own >= 0)

    def truncate(self, n_tokens: int | Tensor) -> None:
        super().truncate(n_tokens)
        self.find_bounds()

    @classmethod
    def cat(cls, caches: Sequence[LayerCacheBase]) -> LayerCacheBase:
        out = super().cat(caches)
        out.find_bounds()  # pages that one of them did not have are empty, not zero
        return out


class QuestCache(PageBounds, DenseCache):
    """Everything whole, and the bounds of its pages."""

    GROWS = (*DenseCache.GROWS, "page_low", "page_high")

    def __init__(self, batch: int, max_len: int, n_kv_head: int, head_dim: int, like: Tensor):
        super().__init__(batch, max_len, n_kv_head, head_dim, like)
        self.start_bounds(max_len, like)

    def keys_in_order(self) -> Tensor:
        return self.window_k


class QuestGroupCache(PageBounds, PackedCache):
    """Whole keys, value groups, and the bounds of the keys' pages."""

    GROWS = ("page_low", "page_high")

    def __init__(self, batch: int, max_len: int, n_kv_head: int, head_dim: int, *how):
        super().__init__(batch, max_len, n_kv_head, head_dim, *how)
        self.start_bounds(max_len, self.window_k)

    def keys_in_order(self) -> Tensor:
        k, _, _ = as_dense(self)
        return k


# -------------------- what is read


def page_worth(q: Tensor, low: Tensor, high: Tensor, last: Tensor, cap: float = 0.0) -> Tensor:
    """Return what pages are worth to a KV head, (B, Hkv, T, P): of softmax over the bounds of the
    pages before a query's own each page's share, a mean over the head's query heads. Infinite for
    the page that is being filled, minus infinity for those after it.

    q          (B, H, T, D)
    low, high  (B, Hkv, P, D)
    last       (B, T) int64, the page that each query's own token is in"""
    Hkv = low.size(1)
    q = q.unflatten(1, (Hkv, -1))  # (B, Hkv, n, T, D)
    bound = logit_bounds(q, low.unsqueeze(2), high.unsqueeze(2))
    bound = soft_cap(at_least_float32(bound), cap)  # (B, Hkv, n, T, P)
    page = torch.arange(bound.size(-1), device=q.device)
    last = last[:, None, :, None]
    hidden = (page >= last).unsqueeze(2)
    share = bound.masked_fill(hidden, NEVER).softmax(-1)
    worth = share.mean(2)
    worth = worth.masked_fill(page == last, float("inf"))
    return worth.masked_fill(page > last, float("-inf"))


def token_number(q: Tensor, pad: Tensor | None) -> Tensor:
    """Count each row's own tokens from 0: (B, T) int64, below 0 for padding. q (B, H, T, D)."""
    column = torch.arange(q.size(2), device=q.device)
    if pad is None:
        return column.expand(len(q), -1)
    return column - pad[:, None]


class QuestPath(ValueGroupPath):
    """One layer that reads the pages that are worth most. It stores values whole where every group
    is kept, and value groups else.

    read_tokens: how many tokens a decoding step may read, in whole pages, one page at least"""

    reads_pieces = False  # a prompt reads itself whole, what follows is read by pages

    def __init__(self, model_cfg: ModelConfig, cfg: KVConfig, read_tokens: int):
        super().__init__(model_cfg, cfg)
        plain = not cfg.ints and cfg.reconstructor == "zero" and cfg.prefill == "exact"
        check(
            plain,
            f"quest with key_bits={cfg.key_bits}, reconstructor={cfg.reconstructor}, "
            f"prefill={cfg.prefill}",
            "it reads pages of whole keys, after an exact prefill",
            "leave those out",
        )
        self.pages = max(1, read_tokens // PAGE)

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> QuestCache | QuestGroupCache:
        shape = (batch, max_len, self.Hkv, self.D)
        if self.keep_all:
            return QuestCache(*shape, like)
        return QuestGroupCache(*shape, self.cfg, self.k, like, self.for_cache(self.maps()))

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Let every token read what it would read when it is decoded: (B, H, T, D) in q's dtype."""
        self.losses = {}
        visible = self._picked(q, k, pad) & attention_mask(q.size(2), q.size(2), pad, q.device)
        n = q.size(1) // self.Hkv  # query heads of a KV head
        if self.keep_all:
            mask = visible.repeat_interleave(n, 1)
            return attend_masked(q, k, v, mask, self.cap)
        maps = self.own_maps()
        z = maps.encode(v)
        kept = top_k_mask(self.scores(x, z), self.k)
        routed = maps.decode(z * expand_mask(kept, self.D))
        stored = token_number(q, pad) + 1
        whole = window_mask(stored, self.cfg.kv_tail, self.cfg.tail_leaves)
        whole = whole.repeat(1, 1, n, 1)
        p = group_weights(group_logits(q, k, self.cap), visible).to(k.dtype)
        from_groups = (p * ~whole) @ routed
        from_window = (p * whole) @ v
        return (from_groups + from_window).view(q.shape)

    def _picked(self, q: Tensor, k: Tensor, pad: Tensor | None) -> Tensor:
        """Mark the keys in the pages that each query reads, later ones included: (B, Hkv, T, T)."""
        number = token_number(q, pad)
        page = number.clamp_min(0) // PAGE  # (B, T)
        low, high = page_bounds(k, number, number >= 0, cdiv(q.size(2), PAGE))
        worth = page_worth(q, low, high, page, self.cap)
        read = top_k_mask(worth, self.pages)  # (B, Hkv, T, P)
        return read.take_along_dim(page[:, None, None], 3)

    def prefill(self, x, q, k, v, cache, n_pad: Tensor | None = None) -> Tensor:
        """Let a prompt k, v (B, Hkv, T, D) read itself whole; what comes after it is read token by
        token, as if it were generated. Returns (B, H, T, D) in q's dtype."""
        if cache.fresh:
            self._store(x, k, v, cache, n_pad)
            return attend(q, k, v, n_pad, self.cap)
        out = []
        pad = None
        for t in range(q.size(2)):
            at = slice(t, t + 1)
            if n_pad is not None:
                pad = (n_pad - t).clamp(0, 1)
            y = self.decode(x[:, at], q[:, :, at], k[:, :, at], v[:, :, at], cache, pad)
            out.append(y)
        return torch.cat(out, 2)

    def decode(self, x, q, k, v, cache, n_pad: Tensor | None = None) -> Tensor:
        """Store k, v (B, Hkv, 1, D), and read the pages that are worth most: (B, H, 1, D) in q's
        dtype."""
        self._store(x, k, v, cache, n_pad)
        n_tokens = cache.lengths.clamp_min(1)  # padding before a first token reads something
        last = (n_tokens - 1) // PAGE
        worth = page_worth(q, cache.page_low, cache.page_high, last[:, None], self.cap)
        # of equal ones the earlier page, as in top_k_mask
        order = worth[:, :, 0].sort(dim=-1, descending=True, stable=True).indices
        pages = order[..., : self.pages]  # (B, Hkv, m)
        slot = pages.unsqueeze(-1) * PAGE + torch.arange(PAGE, device=q.device)
        slot = slot.flatten(-2)  # (B, Hkv, m PAGE)
        there = slot < n_tokens[:, None, None]
        k, v = self.stored(cache)
        at = slot.clamp_max(k.size(2) - 1).unsqueeze(-1)
        k = k.take_along_dim(at, 2)
        v = v.take_along_dim(at, 2)
        n = q.size(1) // self.Hkv  # query heads of a KV head
        mask = there.repeat_interleave(n, 1).unsqueeze(2)
        return attend_masked(q, k, v, mask, self.cap)

    def _store(self, x: Tensor, k: Tensor, v: Tensor, cache, n_pad: Tensor | None) -> None:
        """Append new tokens, with their groups where not all are kept."""
        route = None if self.keep_all else self._route(x, v, cache)
        cache.append(NewTokens(k, v, n_pad, route))

    def stored(self, cache: QuestCache | QuestGroupCache) -> tuple[Tensor, Tensor]:
        """Return what is stored as it is read, k and v (B, Hkv, N, D), each sequence from slot 0
        on."""
        if isinstance(cache, QuestCache):
            return cache.window_k, cache.window_v
        k, z, _ = as_dense(cache)
        number = torch.arange(k.size(2), device=k.device)
        packed = number < cache.n_packed[:, None]  # the rest is whole
        packed = packed[:, None, :, None]
        v = torch.where(packed, cache.basis.decode(z), z)
        return k, v

    def reads(self, n_tokens: int) -> int:
        """Count the tokens that a step reads when n_tokens are stored, its own among them. A page's
        bounds, two vectors, count as a token."""
        filled = cdiv(n_tokens, PAGE)
        newest = n_tokens - (filled - 1) * PAGE
        others = min(self.pages, filled) - 1
        return newest + others * PAGE + filled

    def graph_safe(self) -> bool:
        return False


# -------------------- attaching


def check_whole_layers(whole_layers: int, n_layer: int) -> None:
    """Raise ValueError where no layer is left that picks pages."""
    check(
        whole_layers < n_layer,
        f"{whole_layers} layers that read everything",
        f"the model has {n_layer}",
        f"give --quest_whole of at most {n_layer - 1}",
    )


def attach(
    model: nn.Module,
    kv: KVConfig,
    read_tokens: int,
    whole_layers: int = 2,
    batches: list[Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Let all layers but the first whole_layers read by pages, in place; kv_router.detach undoes
    it. Returns the model. ValueError where no layer is left.

    kv: how many value groups are kept, of which basis; all of them: values stay whole
    batches: token ids (B, T) that calibrate the basis"""
    check_whole_layers(whole_layers, model.cfg.n_layer)
    if kv.topk_groups == kv.n_groups:
        kv = replace(kv, kv_layers=f"from:{whole_layers}")
        batches = None
    layers = iter(kv.layers_of(model.cfg))

    def make(m: ModelConfig, cfg: KVConfig) -> ValueGroupPath:
        if next(layers) < whole_layers:
            return ValueGroupPath(m, cfg)
        return QuestPath(m, cfg, read_tokens)

    return kv_router.attach(model, kv, batches, seed, make)


def paths(model: nn.Module) -> list[QuestPath]:
    """List the layers that read by pages."""
    all_paths = kv_router.paths(model).values()
    return [path for path in all_paths if isinstance(path, QuestPath)]


def reads(model: nn.Module, n_tokens: int) -> float:
    """Return the share of n_tokens stored that a step reads, a mean over all layers; bounds are
    counted, as in the paper, so it is above 1 where a layer picks and yet reads everything."""
    n_layer = model.cfg.n_layer
    picking = paths(model)
    everything = (n_layer - len(picking)) * n_tokens
    read = everything + sum(path.reads(n_tokens) for path in picking)
    return read / (n_layer * n_tokens)
