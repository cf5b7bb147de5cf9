"""KIVI as it was published (arXiv 2402.02750): every token stays, in 4 or 2 bits.

Keys have channels that are large in every token, values have not. So `group` neighbouring tokens
share a step in each channel of the keys, and `group` neighbouring channels share one in each token
of the values:

    code = round((x - low) / step),    step = (high - low) / (2^bits - 1)

The newest tokens stay whole. Values: the newest `residual`, each new one pushes the oldest out.
Keys: what came since the last multiple of `residual`, all of which turn into codes together. A
prompt reads itself whole; a decoding step reads what was stored before it, and its own token whole.

It stands beside this project's integers (storage/integers/), which have blocks of 64 tokens, one
step for a whole value, first tokens that stay whole, and keys rounded for the queries to come.

Differs: each sequence counts its own tokens, where the paper's code counts columns of a padded
batch; steps are held in float16 whatever the rest is computed in; keys and values have the same
bits. Plain PyTorch: it shows bytes and what is lost, not how fast it is.

Letters: storage/layout.py; R residual, N tokens that there is room for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, check
from model import DensePath, attend, attention_mask
from storage.cache import CacheView, LayerCacheBase, NewTokens, check_range, check_truncation
from storage.integers.format import SMALLEST, pack_bits, unpack_bits
from storage.layout import WindowView, at_least_float32

BITS = (4, 2)


class Format(NamedTuple):
    """What is stored of a number, and how long it stays whole."""

    bits: int
    group: int = 32  # tokens that share a key channel's step; channels that share a value's
    residual: int = 128  # newest tokens that stay whole


# -------------------- numbers


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 like x (..., n), and the step and the least number of each group of n,
    both (...) float16."""
    x = at_least_float32(x)
    low = x.amin(-1).clamp(-65504, 65504)
    step = ((x.amax(-1) - low) / (2**bits - 1)).clamp(SMALLEST, 65504).half()
    low = low.half()
    wide = [t.to(x.dtype).unsqueeze(-1) for t in (low, step)]
    codes = ((x - wide[0]) / wide[1]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), step, low


def dequantise(codes: Tensor, step: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes (..., n) stand for."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    step = step.to(wide).unsqueeze(-1)
    return (codes.to(wide) * step + low.to(wide).unsqueeze(-1)).to(dtype)


def by_channel(k: Tensor, group: int) -> Tensor:
    """Cut keys (..., T, D), T a multiple of group, into what shares a step: (..., G, D, group)."""
    return k.unflatten(-2, (-1, group)).mT


def by_token(v: Tensor, group: int) -> Tensor:
    """Cut values (..., T, D) into what shares a step: (..., T, D / group, group)."""
    return v.unflatten(-1, (-1, group))


# -------------------- the cache


class KiviCache(LayerCacheBase):
    """One layer's codes, and its newest tokens whole, each sequence from slot 0 on.

    key_codes              (B, Hkv, N, D bits / 8) uint8
    key_step, key_low      (B, Hkv, N / group, D) float16
    value_codes            (B, Hkv, N, D bits / 8) uint8
    value_step, value_low  (B, Hkv, N, D / group) float16
    window_k, window_v     (B, Hkv, R, D), oldest first
    n_keys, n_values       (B,) int64 tokens whose keys, values are codes
    n_window               (B,) int64 tokens whose values are whole"""

    KEYS = ("key_codes", "key_step", "key_low")
    VALUES = ("value_codes", "value_step", "value_low")
    GROWS = (*KEYS, *VALUES)
    RING = ("window_k", "window_v")

    def __init__(
        self, batch: int, max_len: int, n_kv_head: int, head_dim: int, fmt: Format, like: Tensor
    ):
        names = (*self.GROWS, *self.RING, "n_keys", "n_values", "n_window")
        self.owners = dict.fromkeys(names, "sequence")
        self.fmt = fmt
        self.dtype = like.dtype
        self.batch = batch
        shape = (batch, n_kv_head)
        row = head_dim * fmt.bits // 8
        for name, width in (
            ("key_codes", row),
            ("key_step", head_dim),
            ("key_low", head_dim),
            ("value_codes", row),
            ("value_step", head_dim // fmt.group),
            ("value_low", head_dim // fmt.group),
        ):
            dtype = torch.uint8 if name.endswith("codes") else torch.float16
            setattr(self, name, torch.zeros(*shape, 0, width, dtype=dtype, device=like.device))
        self.window_k = like.new_zeros(*shape, fmt.residual, head_dim)
        self.window_v = torch.zeros_like(self.window_k)
        self.n_keys = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.n_values = torch.zeros_like(self.n_keys)
        self.n_window = torch.zeros_like(self.n_keys)
        self.reserve(max_len)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, (B,) int64."""
        return self.n_values + self.n_window

    def settings(self) -> dict[str, Any]:
        shape = tuple(self.window_k.shape[1::2])
        about = {"shape": shape, "dtype": str(self.dtype), **self.fmt._asdict()}
        return {**super().settings(), **about}

    # ---- writing

    def _grow(self, n_keys: int = 0, n_values: int = 0) -> None:
        """Have room for the codes of so many tokens."""
        need = dict.fromkeys(self.VALUES, n_values)
        need |= {"key_codes": n_keys, **dict.fromkeys(self.KEYS[1:], n_keys // self.fmt.group)}
        for name, n in need.items():
            t = getattr(self, name)
            if t.size(2) < n:
                setattr(self, name, F.pad(t, (0, 0, 0, n - t.size(2))))

    def reserve(self, n_tokens: int) -> None:
        R = self.fmt.residual
        n = n_tokens + (int(self.lengths.max()) if self.batch else 0)
        self._grow(n // R * R, n - R)

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        n_pad = torch.zeros_like(self.n_window) if new.n_pad is None else new.n_pad
        counts = torch.stack((self.n_keys, self.n_values, self.n_window, n_pad), 1)
        kinds, kind = counts.unique(dim=0, return_inverse=True)
        for i, (n_keys, n_values, n_window, skip) in enumerate(kinds.tolist()):
            rows = (kind == i).nonzero()[:, 0]  # sequences with the same counts
            n_whole = n_values + n_window - n_keys
            k = new.k[rows, :, skip:].to(self.dtype)
            v = new.v[rows, :, skip:].to(self.dtype)
            self._store_keys(rows, n_keys, torch.cat((self.window_k[rows, :, :n_whole], k), 2))
            self._store_values(rows, n_values, torch.cat((self.window_v[rows, :, :n_window], v), 2))
        self.fresh = False

    def _store_keys(self, rows: Tensor, done: int, k: Tensor) -> None:
        """Store the whole keys k (b, Hkv, n, D) of some sequences that have `done` tokens in codes:
        every full residual turns into codes."""
        fmt = self.fmt
        leaves = k.size(2) // fmt.residual * fmt.residual
        self._grow(n_keys=done + leaves)
        if leaves:
            codes, step, low = quantise(by_channel(k[:, :, :leaves], fmt.group), fmt.bits)
            codes = pack_bits(codes.mT.flatten(2, 3), fmt.bits)
            self.key_codes[rows, :, done : done + leaves] = codes
            first = done // fmt.group
            last = first + leaves // fmt.group
            self.key_step[rows, :, first:last] = step
            self.key_low[rows, :, first:last] = low
        self.window_k[rows, :, : k.size(2) - leaves] = k[:, :, leaves:]
        self.n_keys[rows] = done + leaves

    def _store_values(self, rows: Tensor, done: int, v: Tensor) -> None:
        """Store the whole values v (b, Hkv, n, D) of some sequences that have `done` tokens in
        codes: all but the newest residual turn into codes."""
        fmt = self.fmt
        leaves = max(0, v.size(2) - fmt.residual)
        stays = v.size(2) - leaves
        self._grow(n_values=done + leaves)
        if leaves:
            codes, step, low = quantise(by_token(v[:, :, :leaves], fmt.group), fmt.bits)
            self.value_codes[rows, :, done : done + leaves] = pack_bits(codes.flatten(-2), fmt.bits)
            self.value_step[rows, :, done : done + leaves] = step
            self.value_low[rows, :, done : done + leaves] = low
        self.window_v[rows, :, :stays] = v[:, :, leaves:]
        self.n_values[rows] = done + leaves
        self.n_window[rows] = stays

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens. What became codes stays codes: ValueError inside a
        group of keys, which share steps."""
        check_truncation(n_tokens)
        n = torch.as_tensor(n_tokens, device=self.n_keys.device).minimum(self.lengths)
        inside = (n < self.n_keys) & (n % self.fmt.group > 0)
        check(
            not inside.any(),
            f"truncating to {n.tolist()} tokens",
            f"keys share steps by {self.fmt.group}",
            f"cut at a multiple of {self.fmt.group}, or after {self.n_keys.tolist()}",
        )
        self.n_keys = self.n_keys.minimum(n)
        self.n_values = self.n_values.minimum(n)
        self.n_window = n - self.n_values

    def check_counts(self) -> None:
        super().check_counts()
        check_range(self.n_window, self.fmt.residual, "n_window")
        check_range(self.n_values, self.value_codes.size(2), "n_values")
        check_range(self.n_keys, self.key_codes.size(2), "n_keys")
        check_range(self.lengths - self.n_keys, self.fmt.residual, "tokens with whole keys")

    # ---- reading

    def view(self) -> CacheView:
        """Return everything as it is read, codes turned back into numbers."""
        fmt = self.fmt
        codes = unpack_bits(self.key_codes, fmt.bits)
        k = dequantise(by_channel(codes, fmt.group), self.key_step, self.key_low, self.dtype)
        codes = by_token(unpack_bits(self.value_codes, fmt.bits), fmt.group)
        v = dequantise(codes, self.value_step, self.value_low, self.dtype)
        k = self._then_window(k.mT.flatten(2, 3), self.window_k, self.n_keys)
        v = self._then_window(v.flatten(-2), self.window_v, self.n_values)
        return CacheView((), WindowView(k, v, None, self.lengths), None)

    def _then_window(self, old: Tensor, window: Tensor, n_old: Tensor) -> Tensor:
        """Put the window's tokens after the first n_old (B,) of old (B, Hkv, N, D): (B, Hkv, n, D),
        n the tokens of the longest sequence."""
        n = int(self.lengths.max()) if self.batch else 0
        number = torch.arange(n, device=old.device)
        slot = (number - n_old[:, None]).clamp(0, self.fmt.residual - 1)
        newest = window.take_along_dim(slot[:, None, :, None], 2)
        old = F.pad(old, (0, 0, 0, max(0, n - old.size(2))))[:, :, :n]
        return torch.where((number < n_old[:, None])[:, None, :, None], old, newest)


# -------------------- the path


class KiviPath(nn.Module):
    """One layer that stores KIVI's codes."""

    reads_pieces = True  # a prompt may come in pieces

    def __init__(self, m: ModelConfig, fmt: Format):
        super().__init__()
        check(
            fmt.bits in BITS,
            f"kivi with {fmt.bits} bits",
            "4 or 2, of keys and values alike",
            "give --kv_bits=4,2",
        )
        check(
            m.head_dim % fmt.group == 0,
            f"kivi with head_dim={m.head_dim}",
            f"channels of a value share steps by {fmt.group}",
            f"use a model whose head_dim is a multiple of {fmt.group}",
        )
        check(
            fmt.residual % fmt.group == 0,
            f"kivi with a residual of {fmt.residual}",
            f"keys become codes by {fmt.group}",
            f"give a multiple of {fmt.group}",
        )
        self.Hkv = m.n_kv_head
        self.D = m.head_dim
        self.fmt = fmt
        self.losses: dict[str, Tensor] = {}

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> KiviCache:
        return KiviCache(batch, max_len, self.Hkv, self.D, self.fmt, like)

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Let every token read what it would read when it is decoded; rows with padding one by
        one."""
        if pad is not None:
            out = torch.zeros_like(q)
            for b, p in enumerate(pad.tolist()):
                row = (t[b : b + 1, :, p:] for t in (q, k, v))
                out[b, :, p:] = self.forward(x[b : b + 1, p:], *row)[0]
            return out
        R = self.fmt.residual
        number = torch.arange(q.size(2), device=q.device)
        key_coded = number < (number // R * R)[:, None]  # (query, token)
        value_coded = number < (number - R)[:, None]
        old_k, old_v = self._as_codes(k, v)
        q = q.unflatten(1, (self.Hkv, -1)) * self.D**-0.5  # (B, Hkv, n, T, D)
        whole = q @ k.unsqueeze(2).mT
        logits = torch.where(key_coded, q @ old_k.unsqueeze(2).mT, whole)
        hidden = number > number[:, None]
        p = at_least_float32(logits).masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
        y = (p * value_coded) @ old_v.unsqueeze(2) + (p * ~value_coded) @ v.unsqueeze(2)
        return y.flatten(1, 2)

    def _as_codes(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are read from codes, keys past the last full residual as
        they are."""
        bits, group, residual = self.fmt
        full = k.size(2) // residual * residual
        keys = dequantise(*quantise(by_channel(k[:, :, :full], group), bits), k.dtype)
        values = dequantise(*quantise(by_token(v, group), bits), v.dtype)
        return torch.cat((keys.mT.flatten(2, 3), k[:, :, full:]), 2), values.flatten(-2)

    def prefill(self, x, q, k, v, cache: KiviCache, n_pad: Tensor | None = None) -> Tensor:
        fresh = cache.fresh
        y = attend(q, k, v, n_pad) if fresh else self._read(q, k, v, cache, n_pad)
        cache.append(NewTokens(k, v, n_pad))
        return y

    def decode(self, x, q, k, v, cache: KiviCache, n_pad: Tensor | None = None) -> Tensor:
        y = self._read(q, k, v, cache, n_pad)
        cache.append(NewTokens(k, v, n_pad))
        return y

    def _read(self, q, k, v, cache: KiviCache, n_pad: Tensor | None) -> Tensor:
        """Let new tokens read themselves whole, and what came before as it is stored."""
        old = cache.view().window
        T = q.size(2)
        there = torch.arange(old.k.size(2), device=q.device) < old.count[:, None]
        there = there[:, None, None].expand(-1, -1, T, -1)
        own = attention_mask(T, T, n_pad, q.device).expand(len(q), -1, -1, -1)
        return F.scaled_dot_product_attention(
            q,
            torch.cat((old.k, k), 2),
            torch.cat((old.v, v), 2),
            attn_mask=torch.cat((there, own), -1),
            enable_gqa=self.Hkv != q.size(1),
        )

    def graph_safe(self) -> bool:
        return False


def attach(model: nn.Module, fmt: Format) -> nn.Module:
    """Let all layers store KIVI's codes, in place. Returns the model. ValueError where bits, groups
    and head dimension do not fit."""
    stored = [KiviPath(model.cfg, fmt) for _ in model.layers]
    for block, path in zip(model.layers, stored, strict=True):
        block.self_attn.kv_path = path
    return model


def detach(model: nn.Module) -> nn.Module:
    """Put dense paths back, in place. Returns the model."""
    for block in model.layers:
        if isinstance(block.self_attn.kv_path, KiviPath):
            block.self_attn.kv_path = DensePath(model.cfg.n_kv_head, model.cfg.head_dim)
    return model


def format_of(model: nn.Module) -> Format | None:
    """Return how the model stores codes; None where it does not."""
    path = model.layers[0].self_attn.kv_path
    return path.fmt if isinstance(path, KiviPath) else None
