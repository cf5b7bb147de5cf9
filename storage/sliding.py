"""The cache of a layer that reads only the newest tokens: what no later query reads is not held.

Letters: storage/layout.py; W slots of the ring.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from config import check
from storage.cache import CacheView, NewTokens, check_range, check_truncation
from storage.dense import DenseCache, write_ring
from storage.layout import WindowView

UNBOUNDED = 2**62  # tokens that a ring has room for


class SlidingCache(DenseCache):
    """One layer's newest keys and values, whole: token i of a sequence lies in slot i modulo W.

    window_k, window_v  (B, Hkv, W, D), W the smaller one of the window and max_len
    n_window            (B,) int64 tokens that each sequence has had, of which the newest W are here
    """

    RING = ("window_k", "window_v")

    def __init__(self, batch, max_len: int, n_kv_head: int, head_dim: int, like, window: int):
        super().__init__(batch, min(max_len, window), n_kv_head, head_dim, like)
        self.window = window
        self.room = 0  # the first append looks

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "window": self.window}

    @property
    def rolls(self) -> bool:
        """Whether new tokens take the place of the oldest; else the window is not full yet, and
        there are no more slots than max_len."""
        return self.window_k.size(2) == self.window

    def reserve(self, n_tokens: int) -> None:
        if self.rolls:
            self.room = UNBOUNDED
        else:
            super().reserve(n_tokens)

    def fit(self, n_tokens: int) -> None:
        longest = int(self.n_window.max())
        if longest < self.window:  # nothing has been overwritten
            self._resize(min(longest + n_tokens, self.window))
        self.room = 0

    def _write(self, new: NewTokens) -> None:
        T = new.k.size(2)
        n_pad = torch.zeros_like(self.n_window) if new.n_pad is None else new.n_pad
        cut = max(0, T - self.window_k.size(2))  # columns that are overwritten at once
        at = self.n_window + (cut - n_pad).clamp_min(0)
        pad = None if new.n_pad is None else (n_pad - cut).clamp_min(0)
        k = new.k[:, :, cut:]
        v = new.v[:, :, cut:]
        write_ring(self.window_k, k, at, pad)
        write_ring(self.window_v, v, at, pad)
        self.n_window += T - n_pad

    def view(self) -> CacheView:
        W = self.window_k.size(2)
        count = self.n_window.clamp_max(W)
        first = (self.n_window - count) % max(W, 1)
        window = WindowView(self.window_k, self.window_v, first, count)
        return CacheView((), window, None)

    def beside(self, k: Tensor, v: Tensor, n_pad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values (B, Hkv, W + T, D) of what is held and of T new tokens behind it,
        and which of them each new one reads: (B, 1, T, W + T) bool."""
        W = self.window_k.size(2)
        T = k.size(2)
        held = self.view().window
        old_k, old_v = held.aligned(W)
        number = torch.arange(W, device=k.device)
        old = number - held.count[:, None]  # (B, W), places before the first new token
        new = torch.arange(T, device=k.device)
        new = new.expand(len(k), -1)
        if n_pad is not None:
            new = new - n_pad.unsqueeze(1)
        place = torch.cat((old, new), 1)
        there = torch.cat((old < 0, new >= 0), 1)
        ahead = new.unsqueeze(2) - place.unsqueeze(1)  # (B, T, W + T)
        visible = (ahead >= 0) & (ahead < self.window)
        mask = there.unsqueeze(1) & visible
        own = torch.eye(T, dtype=torch.bool, device=k.device)
        mask[..., W:] |= own  # padding reads itself: no empty softmax
        k = k.to(old_k.dtype)
        v = v.to(old_v.dtype)
        keys = torch.cat((old_k, k), 2)
        values = torch.cat((old_v, v), 2)
        return keys, values, mask.unsqueeze(1)

    def truncate(self, n_tokens: int | Tensor) -> None:
        check_truncation(n_tokens)
        asked = torch.as_tensor(n_tokens, device=self.n_window.device)
        n = self.n_window.minimum(asked)
        overwrites = self.n_window > self.window_k.size(2)
        lost = (n < self.n_window) & overwrites
        check(
            not bool(lost.any()),
            f"truncating sequences that are longer than a window of {self.window}",
            "what came before it is no longer held",
            "process the prompt again",
        )
        self.n_window = n
        self.room = 0

    def check_counts(self) -> None:
        most = UNBOUNDED if self.rolls else self.window_k.size(2)
        super(DenseCache, self).check_counts()
        check_range(self.n_window, most, "n_window")
