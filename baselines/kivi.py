"""KIVI as it was published (arXiv 2402.02750): every token stays, in 4 or 2 bits.

Keys have channels that are large in every token, values have not. So `group` neighbouring tokens
share a step in each channel of the keys, and `group` neighbouring channels share one in each token
of the values:

    code = round((x - low) / step),    step = (high - low) / (2^bits - 1)

The newest tokens stay whole. Values: the newest `residual`, each new one pushes the oldest out.
Keys: what came since the last multiple of `residual`, all of which turn into codes together. A
prompt reads itself whole; a decoding step reads what was stored before it, and its own token whole.
So does a later piece of a prompt: itself whole, what came before as it is stored.

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

from baselines.paths import put_dense_back
from config import ModelConfig, check
from model import attend, attend_masked, attention_mask
from storage.cache import CacheView, LayerCacheBase, NewTokens, check_range, check_truncation
from storage.integers.format import SMALLEST, pack_bits, unpack_bits
from storage.layout import WindowView, at_least_float32, soft_cap

BITS = (4, 2)


class Format(NamedTuple):
    """What is stored of a number, and how long it stays whole."""

    bits: int
    group: int = 32  # tokens that share a key channel's step; channels that share a value's
    residual: int = 128  # newest tokens that stay whole


# -------------------- numbers


class Coded(NamedTuple):
    """The keys or the values of T tokens as they are stored.

    of keys, by channel: step and low (..., T / group, D)
    of values, by token: step and low (..., T, D / group)"""

    codes: Tensor  # (..., T, D bits / 8) uint8
    step: Tensor  # float16
    low: Tensor  # float16


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what groups of n numbers x (..., n) are stored as:

    codes  (..., n) uint8, 0 to 2^bits - 1, of the step and the least number as they are stored
    step   (...) float16, of each group
    low    (...) float16, its least number"""
    x = at_least_float32(x)
    largest_code = 2**bits - 1
    low = x.amin(-1).clamp(-65504, 65504)  # what float16 holds
    high = x.amax(-1)
    step = (high - low) / largest_code
    step = step.clamp(SMALLEST, 65504).half()
    low = low.half()
    above = x - low.to(x.dtype).unsqueeze(-1)
    place = above / step.to(x.dtype).unsqueeze(-1)
    codes = place.round().clamp(0, largest_code)
    codes = codes.to(torch.uint8)
    return codes, step, low


def dequantise(codes: Tensor, step: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes (..., n) stand for."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    step = step.to(wide).unsqueeze(-1)
    low = low.to(wide).unsqueeze(-1)
    numbers = codes.to(wide) * step + low
    return numbers.to(dtype)


def by_channel(k: Tensor, group: int) -> Tensor:
    """Cut keys (..., T, D), T a multiple of group, into what shares a step: (..., G, D, group)."""
    return k.unflatten(-2, (-1, group)).mT


def by_token(v: Tensor, group: int) -> Tensor:
    """Cut values (..., T, D) into what shares a step: (..., T, D / group, group)."""
    return v.unflatten(-1, (-1, group))


def encode_keys(k: Tensor, fmt: Format) -> Coded:
    """Turn keys (..., T, D), T a multiple of fmt.group, into codes."""
    groups = by_channel(k, fmt.group)
    codes, step, low = quantise(groups, fmt.bits)
    codes = codes.mT.flatten(-3, -2)  # (..., T, D)
    return Coded(pack_bits(codes, fmt.bits), step, low)


def decode_keys(coded: Coded, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Return the keys (..., T, D) that codes stand for."""
    codes = unpack_bits(coded.codes, fmt.bits)
    codes = by_channel(codes, fmt.group)
    k = dequantise(codes, coded.step, coded.low, dtype)
    return k.mT.flatten(-3, -2)


def encode_values(v: Tensor, fmt: Format) -> Coded:
    """Turn values (..., T, D) into codes."""
    groups = by_token(v, fmt.group)
    codes, step, low = quantise(groups, fmt.bits)
    codes = codes.flatten(-2)  # (..., T, D)
    return Coded(pack_bits(codes, fmt.bits), step, low)


def decode_values(coded: Coded, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Return the values (..., T, D) that codes stand for."""
    codes = unpack_bits(coded.codes, fmt.bits)
    codes = by_token(codes, fmt.group)
    v = dequantise(codes, coded.step, coded.low, dtype)
    return v.flatten(-2)


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
        # the last dimension of each
        code_bytes = head_dim * fmt.bits // 8
        n_groups = head_dim // fmt.group
        key_widths = (code_bytes, head_dim, head_dim)
        value_widths = (code_bytes, n_groups, n_groups)
        for name, width in zip(self.GROWS, key_widths + value_widths, strict=True):
            dtype = torch.uint8 if name.endswith("codes") else torch.float16
            empty = torch.zeros(batch, n_kv_head, 0, width, dtype=dtype, device=like.device)
            setattr(self, name, empty)
        self.window_k = like.new_zeros(batch, n_kv_head, fmt.residual, head_dim)
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
        _, n_kv_head, _, head_dim = self.window_k.shape
        # what makes codes the same numbers
        return {
            **super().settings(),
            "shape": (n_kv_head, head_dim),
            "dtype": str(self.dtype),
            **self.fmt._asdict(),
        }

    # ---- writing

    def _grow(self, names: tuple[str, ...], n: int) -> None:
        """Have room for n slots in some tensors."""
        for name in names:
            t = getattr(self, name)
            missing = n - t.size(2)
            if missing > 0:
                setattr(self, name, F.pad(t, (0, 0, 0, missing)))

    def _grow_keys(self, n_tokens: int) -> None:
        """Have room for the codes of so many tokens' keys."""
        self._grow(("key_codes",), n_tokens)
        n_groups = n_tokens // self.fmt.group
        self._grow(("key_step", "key_low"), n_groups)

    def reserve(self, n_tokens: int) -> None:
        held = int(self.lengths.max()) if self.batch else 0
        n = held + n_tokens
        residual = self.fmt.residual
        key_codes = n // residual * residual
        value_codes = n - residual
        self._grow_keys(key_codes)
        self._grow(self.VALUES, value_codes)

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        n_pad = new.n_pad
        if n_pad is None:
            n_pad = torch.zeros_like(self.n_window)
        counts = torch.stack((self.n_keys, self.n_values, self.n_window, n_pad), 1)
        # sequences with the same counts are stored together
        kinds, kind = counts.unique(dim=0, return_inverse=True)
        for i, (n_keys, n_values, n_window, skip) in enumerate(kinds.tolist()):
            rows = (kind == i).nonzero()[:, 0]
            k = new.k[rows, :, skip:]
            v = new.v[rows, :, skip:]
            n_whole_keys = n_values + n_window - n_keys
            self._store_keys(rows, n_keys, n_whole_keys, k.to(self.dtype))
            self._store_values(rows, n_values, n_window, v.to(self.dtype))
        self.fresh = False

    def _store_keys(self, rows: Tensor, done: int, n_whole: int, k: Tensor) -> None:
        """Store new keys of some sequences: every full residual turns into codes.

        rows     (b,) int64, the sequences
        done     tokens of each in codes
        n_whole  tokens of each in its window
        k        (b, Hkv, n, D)"""
        k = torch.cat((self.window_k[rows, :, :n_whole], k), 2)
        group = self.fmt.group
        residual = self.fmt.residual
        leaves = k.size(2) // residual * residual
        after = done + leaves
        self._grow_keys(after)
        if leaves:
            coded = encode_keys(k[:, :, :leaves], self.fmt)
            groups = slice(done // group, after // group)
            self.key_codes[rows, :, done:after] = coded.codes
            self.key_step[rows, :, groups] = coded.step
            self.key_low[rows, :, groups] = coded.low
        stays = k[:, :, leaves:]
        self.window_k[rows, :, : stays.size(2)] = stays
        self.n_keys[rows] = after

    def _store_values(self, rows: Tensor, done: int, n_whole: int, v: Tensor) -> None:
        """Store new values of some sequences: all but the newest residual turn into codes.
        Arguments: _store_keys."""
        v = torch.cat((self.window_v[rows, :, :n_whole], v), 2)
        too_many = v.size(2) - self.fmt.residual
        leaves = max(0, too_many)
        after = done + leaves
        self._grow(self.VALUES, after)
        if leaves:
            coded = encode_values(v[:, :, :leaves], self.fmt)
            self.value_codes[rows, :, done:after] = coded.codes
            self.value_step[rows, :, done:after] = coded.step
            self.value_low[rows, :, done:after] = coded.low
        stays = v[:, :, leaves:]
        self.window_v[rows, :, : stays.size(2)] = stays
        self.n_values[rows] = after
        self.n_window[rows] = stays.size(2)

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens. What became codes stays codes: ValueError inside a
        group of keys, which share steps."""
        check_truncation(n_tokens)
        group = self.fmt.group
        n = torch.as_tensor(n_tokens, device=self.n_keys.device)
        n = n.minimum(self.lengths)
        in_codes = n < self.n_keys
        between_groups = n % group == 0
        check(
            not (in_codes & ~between_groups).any(),
            f"truncating to {n.tolist()} tokens",
            f"keys share steps by {group}",
            f"cut at a multiple of {group}, or after {self.n_keys.tolist()}",
        )
        self.n_keys = self.n_keys.minimum(n)
        self.n_values = self.n_values.minimum(n)
        self.n_window = n - self.n_values

    def check_counts(self) -> None:
        super().check_counts()
        residual = self.fmt.residual
        n_whole_keys = self.lengths - self.n_keys
        check_range(self.n_keys, self.key_codes.size(2), "n_keys")
        check_range(n_whole_keys, residual, "tokens with whole keys")
        check_range(self.n_values, self.value_codes.size(2), "n_values")
        check_range(self.n_window, residual, "n_window")

    # ---- reading

    def view(self) -> CacheView:
        """Return everything as it is read, codes dequantised: one window, each
        sequence from slot 0 on."""
        keys = Coded(self.key_codes, self.key_step, self.key_low)
        values = Coded(self.value_codes, self.value_step, self.value_low)
        old_k = decode_keys(keys, self.fmt, self.dtype)
        old_v = decode_values(values, self.fmt, self.dtype)
        k = self._then_window(old_k, self.window_k, self.n_keys)
        v = self._then_window(old_v, self.window_v, self.n_values)
        return CacheView((), WindowView(k, v, None, self.lengths), None)

    def _then_window(self, old: Tensor, window: Tensor, n_old: Tensor) -> Tensor:
        """Put the window's tokens after the first n_old (B,) of old (B, Hkv, N, D): (B, Hkv, n, D),
        n the tokens of the longest sequence."""
        n = int(self.lengths.max()) if self.batch else 0
        number = torch.arange(n, device=old.device)
        place = number - n_old[:, None]  # (B, n), in the window
        place = place[:, None, :, None]
        slot = place.clamp(0, self.fmt.residual - 1)
        newest = window.take_along_dim(slot, 2)
        missing = max(0, n - old.size(2))
        old = F.pad(old, (0, 0, 0, missing))
        return torch.where(place < 0, old[:, :, :n], newest)


# -------------------- the path


class KiviPath(nn.Module):
    """One layer that stores KIVI's codes. ValueError where bits, groups, residual and head
    dimension do not fit."""

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
        self.cap = m.attention_cap
        self.fmt = fmt
        self.losses: dict[str, Tensor] = {}

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> KiviCache:
        return KiviCache(batch, max_len, self.Hkv, self.D, self.fmt, like)

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Let every token read what it would read when it is decoded: (B, H, T, D) in q's dtype."""
        if pad is not None:
            return self._row_by_row(x, q, k, v, pad)
        residual = self.fmt.residual
        number = torch.arange(q.size(2), device=q.device)
        query = number[:, None]
        key_coded = number < query // residual * residual  # (query, token)
        value_coded = number < query - residual
        old_k, old_v = self._as_codes(k, v)
        # heads of queries beside those of keys and values
        k, v, old_k, old_v = (t.unsqueeze(2) for t in (k, v, old_k, old_v))
        q = q.unflatten(1, (self.Hkv, -1))  # (B, Hkv, n, T, D)
        q = q * self.D**-0.5
        of_codes = q @ old_k.mT
        of_window = q @ k.mT
        logits = torch.where(key_coded, of_codes, of_window)
        logits = soft_cap(at_least_float32(logits), self.cap)
        hidden = number > query
        p = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        p = p.to(v.dtype)
        from_codes = (p * value_coded) @ old_v
        from_window = (p * ~value_coded) @ v
        return (from_codes + from_window).flatten(1, 2)

    def _row_by_row(self, x, q, k, v, pad: Tensor) -> Tensor:
        """Run forward on each row without its padding: (B, H, T, D), padding 0."""
        out = torch.zeros_like(q)
        for b, n_pad in enumerate(pad.tolist()):
            row = slice(b, b + 1)
            real = (t[row, :, n_pad:] for t in (q, k, v))
            y = self.forward(x[row, n_pad:], *real)
            out[row, :, n_pad:] = y
        return out

    def _as_codes(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, Hkv, T, D) as they are read from codes, keys past the last
        full residual as they are."""
        residual = self.fmt.residual
        full = k.size(2) // residual * residual
        keys = encode_keys(k[:, :, :full], self.fmt)
        values = encode_values(v, self.fmt)
        old_k = decode_keys(keys, self.fmt, k.dtype)
        old_k = torch.cat((old_k, k[:, :, full:]), 2)
        old_v = decode_values(values, self.fmt, v.dtype)
        return old_k, old_v

    def prefill(self, x, q, k, v, cache: KiviCache, n_pad: Tensor | None = None) -> Tensor:
        """Let a first piece read itself whole, a later one what came before as it is stored too:
        (B, H, T, D) in q's dtype. Of k, v (B, Hkv, T, D) all but the newest become codes."""
        if cache.fresh:
            y = attend(q, k, v, n_pad, self.cap)
        else:
            y = self._read(q, k, v, cache, n_pad)
        cache.append(NewTokens(k, v, n_pad))
        return y

    def decode(self, x, q, k, v, cache: KiviCache, n_pad: Tensor | None = None) -> Tensor:
        """Read k, v (B, Hkv, 1, D) whole, and what came before as it is stored, then store them:
        (B, H, 1, D) in q's dtype."""
        y = self._read(q, k, v, cache, n_pad)
        cache.append(NewTokens(k, v, n_pad))
        return y

    def _read(self, q, k, v, cache: KiviCache, n_pad: Tensor | None) -> Tensor:
        """Let new tokens read themselves whole, and what came before as it is stored."""
        B, _, T, _ = q.shape
        old = cache.view().window
        slot = torch.arange(old.k.size(2), device=q.device)
        there = slot < old.count[:, None]  # (B, N)
        there = there[:, None, None].expand(-1, -1, T, -1)
        own = attention_mask(T, T, n_pad, q.device)
        own = own.expand(B, -1, -1, -1)
        visible = torch.cat((there, own), -1)  # (B, 1, T, N + T)
        k = torch.cat((old.k, k), 2)
        v = torch.cat((old.v, v), 2)
        return attend_masked(q, k, v, visible, self.cap)

    def graph_safe(self) -> bool:
        return False


def attach(model: nn.Module, fmt: Format) -> nn.Module:
    """Let all layers but those that slide store KIVI's codes, in place. Returns the model.
    ValueError where bits, groups and head dimension do not fit."""
    blocks = [block for block in model.layers if not block.slides]
    stored = [KiviPath(model.cfg, fmt) for _ in blocks]
    for block, path in zip(blocks, stored, strict=True):
        block.self_attn.kv_path = path
    return model


def detach(model: nn.Module) -> nn.Module:
    """Put dense paths back, in place. Returns the model."""
    return put_dense_back(model, KiviPath)


def format_of(model: nn.Module) -> Format | None:
    """Return how the model stores codes; None where it does not."""
    paths = [block.self_attn.kv_path for block in model.layers]
    return next((path.fmt for path in paths if isinstance(path, KiviPath)), None)
