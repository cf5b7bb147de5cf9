"""What mixSGA is compared with, trained and stored on the same footing: GQA, CLA, H2O's eviction.

* GQA: every layer has one expert (mixsga.GroupedHeads without a router), whose group size follows
  from the share of KV heads that are to be kept.
* CLA (cross-layer attention, arXiv 2405.12981): some layers store keys and values whole, the layers
  above them read those with queries of their own.
* H2O (arXiv 2306.14048): tokens of little weight are evicted while decoding. It is laid over any of
  these, without a cache (`routing(model, h2o=0.5)`): masked, so no bytes are claimed.

The newest `kv_tail` tokens are read whole everywhere, as under mixSGA: a layer that reads another's
keys and values keeps its own of the newest tokens.

    attach(model, KVConfig(kv="cla", kv_tail=4), MixConfig(kv_share=0.5))
    with routing(model, h2o=0.5):
        model(idx)

Letters: storage/layout.py.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from threading import get_ident

import torch
import torch.nn as nn
from torch import Tensor

import mixsga
from config import KVConfig, ModelConfig, check
from kernels import attend_view
from mixsga import GroupedHeads, SharingPath, experts, newest_mask
from model import attention_mask
from settings.experts import MixConfig
from storage.cache import KVCache, NewTokens
from storage.dense import DenseCache
from storage.experts import ExpertCache
from storage.layout import WindowView, at_least_float32, cdiv, soft_cap
from storage.packed import WindowCache

# -------------------- shares of heads and of layers


def gqa_sizes(share: Fraction, n_layer: int, n_kv_head: int) -> list[int]:
    """Return the group size of every layer for GQA at most `share` of the KV heads, as near as
    halvings allow: two neighbouring divisors of n_kv_head, the smaller groups in the first layers.

    ValueError where one head a layer is more than that."""
    divisors = [g for g in range(1, n_kv_head + 1) if n_kv_head % g == 0]
    check(
        Fraction(1, n_kv_head) <= share,
        f"kv_share={float(share):g} with n_kv_head={n_kv_head}",
        "one head is kept at least",
        f"give {1 / n_kv_head:g} or more",
    )
    wide = next(g for g in divisors if Fraction(1, g) <= share)
    fine = max([g for g in divisors if Fraction(1, g) > share], default=wide)
    if wide == fine:
        return [wide] * n_layer
    n_fine = int((share - Fraction(1, wide)) * n_layer / (Fraction(1, fine) - Fraction(1, wide)))
    return [fine] * n_fine + [wide] * (n_layer - n_fine)


def cla_sources(share: Fraction, n_layer: int) -> list[int]:
    """Return the layer whose keys and values every layer reads, ceil(share n_layer) of them their
    own: the shares of CLA are those of whole layers."""
    n = math.ceil(share * n_layer)
    return [cdiv((i * n // n_layer) * n_layer, n) for i in range(n_layer)]


# -------------------- layers that share


class SourceLayer(SharingPath):
    """A layer of CLA that keeps keys and values whole, for itself and for those above that read
    them."""

    def __init__(self, m: ModelConfig):
        super().__init__(0, m.attention_cap)
        self.shape = (m.n_kv_head, m.head_dim)
        self.n_readers = 0
        # keys and values of the uncached forward that each thread has under way
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> DenseCache:
        return DenseCache(batch, max_len, *self.shape, like)

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Read k, v (B, Hkv, T, D) whole, and leave them for the layers above: (B, H, T, D)."""
        if self.n_readers:
            self.seen[get_ident()] = (k, v)
        return self.read(q, k, v, (k, v), self.window, pad, self.cap)

    def prefill(self, x, q, k, v, cache: DenseCache, n_pad: Tensor | None = None) -> Tensor:
        """Store and read a prompt k, v (B, Hkv, T, D) whole: (B, H, T, D) in q's dtype."""
        if not cache.fresh:
            return self.decode(x, q, k, v, cache, n_pad)
        cache.append(NewTokens(k, v, n_pad))
        return self.read(q, k, v, (k, v), self.window, n_pad, self.cap)

    def decode(self, x, q, k, v, cache: DenseCache, n_pad: Tensor | None = None) -> Tensor:
        """Store k, v (B, Hkv, T, D), and read all that is held: (B, H, T, D) in q's dtype."""
        cache.append(NewTokens(k, v, n_pad))
        return attend_view(q, cache.view(), self.cap)[0]


class ReaderLayer(SharingPath):
    """A layer of CLA that reads the keys and values of another, but its own of the newest tokens.

    With a cache it finds them in the cache of layer `below`; without one, on the source itself,
    which its last reader clears."""

    def __init__(self, m: ModelConfig, source: SourceLayer, below: int, window: int):
        super().__init__(window, m.attention_cap)
        self.shape = (m.n_kv_head, m.head_dim)
        self.source = (source,)  # in a tuple: the module belongs to another layer
        self.below = below
        source.n_readers += 1
        self.number = source.n_readers

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> WindowCache:
        return WindowCache(batch, self.window, *self.shape, like)

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Read k, v (B, Hkv, T, D) of the newest tokens and the source's of all others: (B, H, T,
        D)."""
        source = self.source[0]
        far = source.seen[get_ident()]
        if self.number == source.n_readers:
            del source.seen[get_ident()]
        return self.read(q, *far, (k, v), self.window, pad, self.cap)

    def prefill(self, x, q, k, v, cache: WindowCache, n_pad: Tensor | None = None) -> Tensor:
        """Store the newest tokens of a prompt k, v (B, Hkv, T, D), and read what forward reads: (B,
        H, T, D). What follows others is decoded token by token."""
        if not cache.fresh:
            return self.one_by_one(x, q, k, v, cache, n_pad)
        cache.append(NewTokens(k, v, n_pad))
        source = cache.prompt.layers[self.below]
        T = q.size(2)
        far = [source.window_k[:, :, :T], source.window_v[:, :, :T]]
        if n_pad is not None:  # the cache has no padding, the columns of q have
            slot = (torch.arange(T, device=q.device) - n_pad[:, None]).clamp_min(0)
            far = [t.take_along_dim(slot[:, None, :, None], 2) for t in far]
        return self.read(q, *far, (k, v), self.window, n_pad, self.cap)

    def decode(self, x, q, k, v, cache: WindowCache, n_pad: Tensor | None = None) -> Tensor:
        """Store k, v (B, Hkv, 1, D), and read the window and the source's older tokens: (B, H, 1,
        D) in q's dtype."""
        cache.append(NewTokens(k, v, n_pad))
        source = cache.prompt.layers[self.below]
        # what has left the own window
        far = WindowView(source.window_k, source.window_v, None, cache.n_packed)
        return attend_view(q, cache.view()._replace(sinks=far), self.cap)[0]


# -------------------- eviction


def h2o_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: tuple[Tensor, Tensor],
    W: int,
    pad: Tensor | None = None,
    cap: float = 0.0,
    *,
    keep: float,
) -> Tensor:
    """Do what mixsga.attend_window does while a heavy-hitter cache of n = ceil(keep T) tokens
    evicts as it decodes.

    q (B, H, T, D), k, v (B, Hkv, T, D). Token by token: the new one reads what is held and itself;
    each held token's weights are added up; when more than n are held the one with the least weight
    so far goes, the newest n // 2 excepted. One choice for all heads of a layer."""
    B, H, T, D = q.shape
    Hkv = k.size(1)
    n = math.ceil(keep * T)
    close = newest_mask(T, W, q.device)
    grouped = (q * D**-0.5).view(B, Hkv, -1, T, D)
    logits = at_least_float32(grouped @ k.unsqueeze(2).mT).view(B, H, T, T)
    if W:
        own = at_least_float32(grouped @ whole[0].unsqueeze(2).mT).view(B, H, T, T)
        logits = torch.where(close, own, logits)
    logits = soft_cap(logits, cap)
    visible = attention_mask(T, T, pad, q.device).expand(B, 1, T, T)
    held = torch.ones(B, T, dtype=torch.bool, device=q.device)
    total = logits.new_zeros(B, T)
    p = torch.zeros_like(logits)
    number = torch.arange(T, device=q.device)
    for t in range(T):
        reads = visible[:, :, t] & held[:, None]
        p[:, :, t] = logits[:, :, t].masked_fill(~reads, -math.inf).softmax(-1)
        total += p[:, :, t].sum(1)
        here = held & visible[:, 0, t]
        old = here & (number <= t - n // 2)
        worst = total.masked_fill(~old, math.inf).argmin(-1, keepdim=True)
        full = (here.sum(-1, keepdim=True) > n) & old.any(-1, keepdim=True)
        held = held.scatter(-1, worst, ~full & held.gather(-1, worst))
    p = p.view(B, Hkv, -1, T, T)
    y = (p * ~close) @ at_least_float32(v).unsqueeze(2)
    if W:
        y = y + (p * close) @ at_least_float32(whole[1]).unsqueeze(2)
    return y.view(B, H, T, D).to(q.dtype)


# -------------------- on a model


def check_model(kv: KVConfig, mix: MixConfig, m: ModelConfig) -> None:
    """Raise ValueError where kv.kv (mixsga, gqa, cla or dense) does not fit a model's heads and
    layers."""
    if kv.kv == "mixsga":
        mix.check_model(m)
        GroupedHeads.storage_of(m, kv, mix)
    elif kv.kv == "gqa":
        gqa_sizes(Fraction(str(mix.kv_share)), len(m.global_layers), m.n_kv_head)
    elif kv.kv == "cla":
        check(
            not m.sliding_window,
            f"kv=cla with sliding_window={m.sliding_window}",
            "a layer that slides has nothing to lend to one that reads everything",
            "give --kv=gqa or mixsga",
        )


def attach(model: nn.Module, kv: KVConfig, mix: MixConfig) -> nn.Module:
    """Give a dense model the KV paths of kv.kv (mixsga, gqa or cla), in place. Returns the
    model."""
    m = model.cfg
    check_model(kv, mix, m)
    share = Fraction(str(mix.kv_share))
    paths: list[SharingPath] | None = None
    if kv.kv == "gqa":
        paths = []
        sizes = gqa_sizes(share, len(m.global_layers), m.n_kv_head)
        for i, size in zip(m.global_layers, sizes, strict=True):
            one = replace(mix, group_sizes=str(size), expert_ratios="1")
            paths.append(GroupedHeads(m, kv, one, i))
    elif kv.kv == "cla":
        paths = []
        for i, below in enumerate(cla_sources(share, m.n_layer)):
            if below == i:
                paths.append(SourceLayer(m))
            else:
                paths.append(ReaderLayer(m, paths[below], below, kv.kv_tail))
    return mixsga.attach(model, kv, mix, paths)


def sharing(model: nn.Module) -> list[SharingPath]:
    """Return the paths of a model that share keys and values, layer by layer."""
    return [path for path in model.modules() if isinstance(path, SharingPath)]


def shares(model: nn.Module) -> bool:
    """Say whether heads or layers of the model share what is stored."""
    return bool(sharing(model))


@contextmanager
def routing(model: nn.Module, by: str | None = None, h2o: float = 1.0):
    """Let every path route `by` ("choice", "score" or None) inside the `with`, and read under H2O's
    eviction at that share of the tokens (1: without)."""
    paths = sharing(model)
    before = [(path.by, path.read) for path in paths]
    for path in paths:
        path.by = by
        path.read = mixsga.attend_window if h2o == 1 else partial(h2o_attention, keep=h2o)
    try:
        yield
    finally:
        for path, (old_by, old_read) in zip(paths, before, strict=True):
            path.by = old_by
            path.read = old_read


def described(model: nn.Module) -> str:
    """Say in a few words how the model stores."""
    paths = experts(model)
    window = max(path.window for path in sharing(model))
    if not paths:
        text = "layers share"
    elif len(paths[0].sizes) == 1:
        text = "heads by " + ",".join(str(path.sizes[0]) for path in paths)
    else:
        first = paths[0]
        text = f"{first.mix.expert_ratios} of {first.mix.group_sizes}"
        if first.mix.expert_groups:
            text += f" {first.k} of {first.stored_as.n_groups} groups"
    return f"{text} tail {window}" if window else text


def kept_shares(model: nn.Module, cache: KVCache) -> float:
    """Return the share of the model's keys and values that a filled cache of it holds, by count:
    heads of tokens, value groups, the newest tokens."""
    held = 0.0  # of whole tokens
    for layer in cache.layers:
        if isinstance(layer, DenseCache):
            held += int(layer.lengths.sum())
            continue
        held += int(layer.n_window.sum())
        if isinstance(layer, ExpertCache):
            for part in layer.parts:
                packed = int(part.n_packed.sum()) * (1 + part.k / part.S) / 2
                waiting = int(part.n_window.sum())
                held += (packed + waiting) * part.Hkv / model.cfg.n_kv_head
    return held / (int(cache.lengths.sum()) * len(cache.layers))
