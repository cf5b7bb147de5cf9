"""The cache that keeps everything: each token's key and value, whole.

    cache = DenseCache(batch=2, max_len=100, n_kv_head=3, head_dim=64, like=x)
    cache.append(NewTokens(k, v, n_pad=None))
    attend_view(q, cache.view())                  # kernels.py

Letters: storage/layout.py; W slots of the window.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import append_window
from storage.cache import (
    CacheView,
    LayerCacheBase,
    NewTokens,
    check_range,
    check_truncation,
    valid_columns,
)
from storage.kernel_base import use_triton
from storage.layout import WindowView


class DenseCache(LayerCacheBase):
    """One layer's keys and values, whole, each sequence from slot 0 on: a window that gives nothing
    up.

    window_k, window_v  (B, Hkv, W, D), W = max_len
    n_window            (B,) int64 tokens of each sequence"""

    GROWS = ("window_k", "window_v")

    def __init__(self, batch: int, max_len: int, n_kv_head: int, head_dim: int, like: Tensor):
        self.owners = dict.fromkeys(("window_k", "window_v", "n_window"), "sequence")
        self.dtype = like.dtype
        self.window_k = like.new_zeros(batch, n_kv_head, max_len, head_dim)
        self.window_v = torch.zeros_like(self.window_k)
        self.n_window = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.batch = batch
        self.room = max_len
        # whether single tokens are appended by a kernel, on the device alone
        self.by_kernel = use_triton("auto", like.device, like.dtype)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, (B,) int64."""
        return self.n_window

    def settings(self) -> dict[str, Any]:
        shape = tuple(self.window_k.shape[1::2])
        return {**super().settings(), "shape": shape, "dtype": str(self.dtype)}

    def reserve(self, n_tokens: int) -> None:
        """Raise ValueError where n_tokens more do not fit: a dense cache does not grow."""
        longest = int(self.n_window.max()) if self.batch else 0
        W = self.window_k.size(2)
        if longest + n_tokens > W:
            raise ValueError(
                f"KV cache of {W} tokens cannot take {longest + n_tokens}: "
                "ask new_cache for a larger max_len"
            )
        self.room = W - longest

    def fit(self, n_tokens: int) -> None:
        """Give the window room for n_tokens more, no less and no more."""
        self._resize(int(self.n_window.max()) + n_tokens)
        self.room = n_tokens

    def _resize(self, W: int) -> None:
        """Give the window W slots."""
        for name in self.GROWS:
            window = getattr(self, name)
            if window.size(2) != W:
                setattr(self, name, F.pad(window, (0, 0, 0, W - window.size(2))).contiguous())

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        T = new.k.size(2)
        more = T  # by which the longest sequence may grow
        if self.room < T and new.n_pad is not None:
            more = int((self.n_window + T - new.n_pad).max() - self.n_window.max())
        if self.room < more:
            self.reserve(more)
        self.room -= more
        if T == 1 and new.n_pad is None and self.by_kernel:
            window = WindowView(self.window_k, self.window_v, None, self.n_window)
            append_window(window, new.k.to(self.dtype), new.v.to(self.dtype))
        else:
            self._write(new)
        self.fresh = False

    def _write(self, new: NewTokens) -> None:
        """Put T tokens after those that each sequence has."""
        T = new.k.size(2)
        if self.fresh and new.n_pad is None:  # one slice, where all begin at slot 0
            self.window_k[:, :, :T] = new.k
            self.window_v[:, :, :T] = new.v
        else:
            write_ring(self.window_k, new.k, self.n_window, new.n_pad)
            write_ring(self.window_v, new.v, self.n_window, new.n_pad)
        self.n_window += T if new.n_pad is None else T - new.n_pad

    def view(self) -> CacheView:
        window = WindowView(self.window_k, self.window_v, None, self.n_window)
        return CacheView((), window, None)

    def truncate(self, n_tokens: int | Tensor) -> None:
        check_truncation(n_tokens)
        n = torch.as_tensor(n_tokens, device=self.n_window.device)
        self.n_window = self.n_window.minimum(n)
        self.room = 0

    def check_counts(self) -> None:
        super().check_counts()
        check_range(self.n_window, self.window_k.size(2), "n_window")


def write_ring(ring: Tensor, new: Tensor, at: Tensor, n_pad: Tensor | None) -> None:
    """Write new tokens (B, h, T, x) into ring (B, h, W, x), the first that is no padding into slot
    at (B,), the others after it, modulo W."""
    B, _, T, _ = new.shape
    column = torch.arange(T, device=new.device)
    if n_pad is None:
        slot = (at[:, None] + column) % max(ring.size(2), 1)
        rows = torch.arange(B, device=new.device)[:, None]
        ring[rows, :, slot] = new.transpose(1, 2).to(ring.dtype)
        return
    b, i = valid_columns(T, n_pad).nonzero(as_tuple=True)
    slot = (at[b] + i - n_pad[b]) % max(ring.size(2), 1)
    ring[b, :, slot] = new[b, :, i].to(ring.dtype)
