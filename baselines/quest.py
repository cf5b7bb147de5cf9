"""Quest as it was published (arXiv 2406.10774): everything is kept, and every query picks anew what
it reads.

Pages of PAGE tokens have bounds: the least and the largest of every key coordinate in them. No key
of a page can have a larger logit than

    sum over coordinates of max(q * least, q * largest)  =  q+ . largest + q- . least,

so a decoding step reads the pages of largest bound, as many as a budget of tokens holds, and always
the page that is being filled. The first layers read everything, as in the paper. The first prompt
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
from config import KVConfig, ModelConfig, check
from kv_router import ValueGroupPath, window_mask
from model import attend, attention_mask
from selection.relevance import NEVER
from storage.cache import DenseCache, LayerCacheBase, NewTokens
from storage.layout import at_least_float32, cdiv, expand_mask, top_k_mask
from storage.packed import PackedCache

PAGE = 16  # tokens in a page


# -------------------- bounds


class PageBounds:
    """What a cache of either kind gets to be searched by pages.

    page_low, page_high  (B, Hkv, P, D): least and largest of every key coordinate, infinite while a
                         page is empty

    They are never written into, so that a snapshot may hold them."""

    def start_bounds(self, max_len: int, like: Tensor) -> None:
        """Begin with empty pages for max_len tokens."""
        _, Hkv, _, D = self.window_k.shape
        self.page_low = like.new_full((self.batch, Hkv, cdiv(max_len, PAGE), D), float("inf"))
        self.page_high = -self.page_low
        self.owners |= dict.fromkeys(("page_low", "page_high"), "sequence")

    def keys_in_order(self) -> Tensor:
        """Return the stored keys, (B, Hkv, N, D), each sequence from slot 0 on."""
        raise NotImplementedError

    def widen(self, k: Tensor, number: Tensor, there: Tensor) -> None:
        """Let the bounds hold keys k (B, Hkv, T, D), which are the tokens number (B, T) of their
        sequences where `there` (B, T)."""
        missing = cdiv(int(number.max()) + 1, PAGE) - self.page_low.size(2)
        if missing > 0:
            self.page_low = F.pad(self.page_low, (0, 0, 0, missing), value=float("inf"))
            self.page_high = F.pad(self.page_high, (0, 0, 0, missing), value=float("-inf"))
        at = (number.clamp_min(0) // PAGE)[:, None, :, None].expand_as(k)
        hole = ~there[:, None, :, None]
        low = k.to(self.dtype).masked_fill(hole, float("inf"))
        high = k.to(self.dtype).masked_fill(hole, float("-inf"))
        self.page_low = self.page_low.scatter_reduce(2, at, low, "amin")
        self.page_high = self.page_high.scatter_reduce(2, at, high, "amax")

    def find_bounds(self) -> None:
        """Work the bounds out anew from the stored keys."""
        self.page_low = torch.full_like(self.page_low, float("inf"))
        self.page_high = torch.full_like(self.page_high, float("-inf"))
        k = self.keys_in_order()
        number = torch.arange(k.size(2), device=k.device).expand(self.batch, -1)
        if number.numel():
            self.widen(k, number, number < self.lengths[:, None])

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        before = self.lengths.clone()
        super().append(new)
        n_pad = torch.zeros_like(before) if new.n_pad is None else new.n_pad
        column = torch.arange(new.k.size(2), device=new.k.device)
        number = before[:, None] + column - n_pad[:, None]
        self.widen(new.k, number, column >= n_pad[:, None])

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
        return self.unpack()[0]


# -------------------- what is read


def page_worth(q: Tensor, low: Tensor, high: Tensor, last: Tensor) -> Tensor:
    """Return what pages are worth to a KV head, (B, Hkv, T, P): of softmax over the bounds of the
    pages before a query's own each page's share, a mean over the head's query heads. Infinite for
    the page that is being filled, minus infinity for those after it.

    q          (B, H, T, D)
    low, high  (B, Hkv, P, D)
    last       (B, T) int64, the page that each query's own token is in"""
    empty = low.isinf()
    low = low.masked_fill(empty, 0).unsqueeze(2)
    high = high.masked_fill(empty, 0).unsqueeze(2)
    q = q.unflatten(1, (low.size(1), -1)) * q.size(-1) ** -0.5  # (B, Hkv, n, T, D)
    bound = at_least_float32(q.clamp_min(0) @ high.mT + q.clamp_max(0) @ low.mT)
    page = torch.arange(bound.size(-1), device=q.device)
    last = last[:, None, :, None]
    hidden = (page >= last).unsqueeze(2)
    worth = bound.masked_fill(hidden, NEVER).softmax(-1).mean(2)
    worth = worth.masked_fill(page == last, float("inf"))
    return worth.masked_fill(page > last, float("-inf"))


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
        return QuestGroupCache(*shape, self.cfg, self.k, like, self.maps())

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Let every token read what it would read when it is decoded."""
        self.losses = {}
        B, H, T, _ = q.shape
        n_pad = torch.zeros(B, dtype=torch.int64, device=q.device) if pad is None else pad
        number = torch.arange(T, device=q.device) - n_pad[:, None]  # (B, T)
        page = number.clamp_min(0) // PAGE
        bounds = QuestCache(B, T, self.Hkv, self.D, k)
        bounds.widen(k, number, number >= 0)
        worth = page_worth(q, bounds.page_low, bounds.page_high, page)
        picked = top_k_mask(worth, self.pages)  # (B, Hkv, T, P)
        picked = picked.take_along_dim(page[:, None, None, :], 3)  # of each key: (B, Hkv, T, T)
        visible = picked & attention_mask(T, T, pad, q.device)
        if self.keep_all:
            mask = visible.repeat_interleave(H // self.Hkv, 1)
            gqa = self.Hkv != H
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        maps = self.own_maps()
        z = maps.encode(v)
        routed = maps.decode(z * expand_mask(top_k_mask(self.scores(x, z), self.k), self.D))
        window = (self.cfg.kv_tail, self.cfg.tail_leaves)
        whole = window_mask(number + 1, *window)
        whole = whole.repeat(1, 1, H // self.Hkv, 1)
        p = self._weights(q, k, visible)
        return ((p * ~whole) @ routed + (p * whole) @ v).view(q.shape)

    def prefill(self, x, q, k, v, cache, n_pad: Tensor | None = None) -> Tensor:
        """A prompt reads itself whole; what comes after it is read token by token, as if it were
        generated."""
        if cache.fresh:
            cache.append(NewTokens(k, v, n_pad, self._new_route(x, v, cache)))
            return attend(q, k, v, n_pad)
        out = []
        for t in range(q.size(2)):
            new = (u[:, :, t : t + 1] for u in (q, k, v))
            pad = None if n_pad is None else (n_pad - t).clamp(0, 1)
            out.append(self.decode(x[:, t : t + 1], *new, cache, pad))
        return torch.cat(out, 2)

    def decode(self, x, q, k, v, cache, n_pad: Tensor | None = None) -> Tensor:
        cache.append(NewTokens(k, v, n_pad, self._new_route(x, v, cache)))
        n = cache.lengths.clamp_min(1)  # padding before a first token reads something
        worth = page_worth(q, cache.page_low, cache.page_high, (n - 1)[:, None] // PAGE)
        order = torch.sort(worth[:, :, 0], dim=-1, descending=True, stable=True).indices
        pages = order[..., : self.pages]  # (B, Hkv, m)
        slot = pages.unsqueeze(-1) * PAGE + torch.arange(PAGE, device=q.device)
        slot = slot.flatten(-2)
        there = slot < n[:, None, None]
        k, v = self.stored(cache)
        at = slot.clamp_max(k.size(2) - 1).unsqueeze(-1)
        mask = there.repeat_interleave(q.size(1) // self.Hkv, 1).unsqueeze(2)
        return F.scaled_dot_product_attention(
            q,
            k.take_along_dim(at, 2),
            v.take_along_dim(at, 2),
            attn_mask=mask,
            enable_gqa=self.Hkv != q.size(1),
        )

    def _new_route(self, x: Tensor, v: Tensor, cache) -> Tensor | None:
        """Return the groups of new tokens, (B, Hm, T, S), where the cache does not find them."""
        return None if self.keep_all else self._route(x, v, cache)

    def stored(self, cache: QuestCache | QuestGroupCache) -> tuple[Tensor, Tensor]:
        """Return what is stored as it is read, k and v (B, Hkv, N, D), each sequence from slot 0
        on."""
        if isinstance(cache, QuestCache):
            return cache.window_k, cache.window_v
        k, z, _ = cache.unpack()
        number = torch.arange(k.size(2), device=k.device)
        packed = (number < cache.n_packed[:, None])[:, None, :, None]
        return k, torch.where(packed, cache.basis.decode(z), z)

    def reads(self, n_tokens: int) -> int:
        """Count the tokens that a step reads when n_tokens are stored, its own among them."""
        filled = cdiv(n_tokens, PAGE)
        newest = n_tokens - (filled - 1) * PAGE
        return newest + (min(self.pages, filled) - 1) * PAGE

    def graph_safe(self) -> bool:
        return False


# -------------------- attaching


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
    n_layer = model.cfg.n_layer
    check(
        whole_layers < n_layer,
        f"{whole_layers} layers that read everything",
        f"the model has {n_layer}",
        f"give --quest_whole of at most {n_layer - 1}",
    )
    if kv.topk_groups == kv.n_groups:
        kv = replace(kv, kv_layers=f"from:{whole_layers}")
        batches = None
    layers = iter(kv.layers(n_layer))

    def make(m: ModelConfig, cfg: KVConfig) -> ValueGroupPath:
        if next(layers) < whole_layers:
            return ValueGroupPath(m, cfg)
        return QuestPath(m, cfg, read_tokens)

    return kv_router.attach(model, kv, batches, seed, make)


def paths(model: nn.Module) -> list[QuestPath]:
    """List the layers that read by pages."""
    return [p for p in kv_router.paths(model).values() if isinstance(p, QuestPath)]


def reads(model: nn.Module, n_tokens: int) -> float:
    """Return the share of n_tokens stored that a step reads, a mean over all layers."""
    n_layer = model.cfg.n_layer
    picking = paths(model)
    everything = (n_layer - len(picking)) * n_tokens
    read = everything + sum(path.reads(n_tokens) for path in picking)
    return read / (n_layer * n_tokens)
