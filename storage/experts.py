"""The cache of experts that share KV heads (mixsga.py), and the window of newest tokens below it.

An expert stores averages of neighbouring heads. A token goes into the window first, whole, with the
expert that it will join; when the window has more tokens than slots, the oldest leave for their
experts, each of which is a PackedCache with fewer heads. In what order tokens came is known of the
window alone: attention does not ask.

    cache = ExpertCache(parts, batch, window, n_kv_head, head_dim, n_scores, like=x)
    cache.append(NewTokens(k, v, n_pad=None, route=index))    # index (B, T): experts of the tokens
    out, lse = attend_view(q, cache.view())                   # kernels.py

Letters: storage/layout.py; E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from config import check
from storage.cache import (
    CacheView,
    NewTokens,
    check_truncation,
)
from storage.layout import PackedView, at_least_float32
from storage.packed import PackedCache, WindowCache


def averaged(t: Tensor, size: int) -> Tensor:
    """Average every `size` neighbouring heads: (B, h, T, D) -> (B, h / size, T, D)."""
    return t if size == 1 else t.unflatten(1, (-1, size)).mean(2)


class ExpertCache(WindowCache):
    """One layer's cache: the newest tokens whole, each with its expert to be, and a PackedCache per
    expert, with as many heads as it keeps.

    parts         the experts' caches; their tensors are saved as "0.keys", "1.keys" and so on
    window_index  (B, 1, W) uint8, the expert that each token of the window will join
    seen          (B, E) sums of the router's scores so far; E = 0 where none are learned"""

    RING = (*WindowCache.RING, "window_index")
    ONE_PROMPT = True

    def __init__(
        self,
        parts: list[PackedCache],
        batch: int,
        window: int,
        n_kv_head: int,
        head_dim: int,
        n_scores: int,
        like: Tensor,
    ):
        super().__init__(batch, window, n_kv_head, head_dim, like)
        self.parts = parts
        self.owners["seen"] = "sequence"
        self.owners["window_index"] = "sequence"
        self.window_index = self.window_k.new_zeros(batch, 1, window, dtype=torch.uint8)
        self.seen = at_least_float32(like).new_zeros(batch, n_scores)

    # ---- capacity

    @property
    def room(self) -> int:
        """Tokens that fit, whoever takes them, before reserve has to be called."""
        return min((part.room for part in self.parts), default=0)

    @room.setter
    def room(self, n: int) -> None:
        for part in self.parts:
            part.room = n

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens in every expert: nobody knows who will take them."""
        for part in self.parts:
            part.reserve(n_tokens)

    def fit(self, n_tokens: int) -> None:
        """Give every expert room for n_tokens more, no less and no more."""
        for part in self.parts:
            part.fit(n_tokens)

    # ---- writing

    @torch.no_grad()
    def append(self, new: NewTokens) -> None:
        """Take T tokens whose experts are new.route (B, T). What leaves the window joins them."""
        index = new.route[:, None].byte()
        tokens = {"window_k": new.k, "window_v": new.v, "window_index": index}
        if new.k.size(2) == 1 and all(part.by_kernel for part in self.parts):
            self._append_one(tokens, new.n_pad)
        else:
            self._append_many(tokens, new.n_pad)
        self.fresh = False

    def _append_one(self, tokens: dict[str, Tensor], n_pad: Tensor | None) -> None:
        """Take one token of each sequence, by ring (B, h, 1, ...), on the device alone. It goes to
        the slot of the oldest where the window is full, and is that itself where there is none."""
        W = self.window_k.size(2)
        comes = torch.ones_like(self.n_window) if n_pad is None else 1 - n_pad
        leaves = comes * (self.n_window == W)
        row = torch.arange(self.batch, device=comes.device)
        slot = (self.n_packed + self.n_window) % max(W, 1)
        gone = dict(tokens)
        for name in tokens if W else ():
            ring = getattr(self, name)
            old = ring[row, :, slot]  # (B, h, ...)
            new = tokens[name].squeeze(2).to(ring.dtype)
            here = comes.bool().view(-1, *[1] * (old.dim() - 1))
            ring[row, :, slot] = torch.where(here, new, old)
            gone[name] = old.unsqueeze(2)
        self.n_packed += leaves
        self.n_window += comes - leaves
        index = gone["window_index"][:, 0, 0]
        for e, part in enumerate(self.parts):
            self._store(part, gone["window_k"], gone["window_v"], 1 - leaves * (index == e))

    def _append_many(self, tokens: dict[str, Tensor], n_pad: Tensor | None) -> None:
        """Take T tokens, by ring (B, h, T, ...)."""
        gone, count = self.push(tokens, n_pad)
        index = gone["window_index"][:, 0]  # (B, n)
        here = torch.arange(index.size(1), device=index.device) < count[:, None]
        for e, part in enumerate(self.parts):
            self._join(part, gone["window_k"], gone["window_v"], here & (index == e))

    def _join(self, part: PackedCache, k: Tensor, v: Tensor, mine: Tensor) -> None:
        """Let an expert store those of the tokens k, v (B, Hkv, n, D) that mine (B, n) marks."""
        count = mine.sum(-1)
        width = int(count.max()) if self.batch else 0
        if not width:
            return
        order = mine.byte().argsort(dim=-1, stable=True)[:, -width:]  # its own last, in their order
        order = order[:, None, :, None]
        longest = int(part.lengths.max())
        part.reserve(int((part.lengths + count).max()) - longest)
        part.room = width  # what shorter sequences get fits below the longest
        k = k.take_along_dim(order, 2)
        v = v.take_along_dim(order, 2)
        self._store(part, k, v, width - count)
        part.room = part.capacity - int(part.lengths.max())

    @staticmethod
    def _store(part: PackedCache, k: Tensor, v: Tensor, n_pad: Tensor) -> None:
        """Let an expert store tokens k, v (B, Hkv, n, D), averaged over its heads."""
        size = k.size(1) // part.Hkv
        part.append(NewTokens(averaged(k, size), averaged(v, size), n_pad))

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens.

        ValueError where a part of what several experts took would be kept, or a part of summed
        scores: neither says which tokens it is made of."""
        check_truncation(n_tokens)
        n_packed = self.n_packed
        n = torch.as_tensor(n_tokens, device=n_packed.device).minimum(self.lengths)
        possible = (n == self.lengths) | (n == 0)
        if not self.seen.size(1):
            possible |= (n >= n_packed) | (len(self.parts) == 1)
        check(
            bool(possible.all()),
            f"truncating to {n_tokens} tokens",
            "experts average tokens in no order that is kept, and scores are summed up",
            "keep the whole cache, or process the prompt again",
        )
        for part in self.parts:
            keep = part.lengths if len(self.parts) > 1 else n
            part.truncate(keep.masked_fill(n == 0, 0))
        self.seen = self.seen.masked_fill((n == 0)[:, None], 0)
        super().truncate(n)

    # ---- reading

    def view(self) -> CacheView:
        """Return experts' packed tokens, those that wait for a block of integers, the window."""
        packed = []
        for part in self.parts:
            view = part.view()
            if part.capacity:
                packed.append(view.packed[0])
            waiting = part.window_k.size(2)
            if waiting:
                k, v = view.window.aligned(waiting)
                packed.append(PackedView.of_whole(k, v, view.window.count[:, None]))
        return super().view()._replace(packed=tuple(packed))

    # ---- what the base does, with the parts

    def settings(self) -> dict[str, Any]:
        numbers = {"experts": len(self.parts), "scores": self.seen.size(1)}
        out = {**super().settings(), **numbers}
        for e, part in enumerate(self.parts):
            out |= {f"expert {e}: {name}": value for name, value in part.settings().items()}
        return out

    def state_dict(self) -> dict[str, Tensor]:
        out = super().state_dict()
        for e, part in enumerate(self.parts):
            out |= {f"{e}.{name}": t for name, t in part.state_dict().items()}
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what state_dict gave. ValueError for what is not its own; then nothing is taken."""
        new = copy.copy(self)
        new.parts = []
        rest = dict(state)
        parts = []
        for e, part in enumerate(self.parts):
            names = [name for name in rest if name.startswith(f"{e}.")]
            part = copy.copy(part)
            part.load_state_dict({name.split(".", 1)[1]: rest.pop(name) for name in names})
            parts.append(part)
        super(ExpertCache, new).load_state_dict(rest)  # the window, without parts
        new.parts = parts
        new.check_counts()
        self.__dict__.update(new.__dict__)

    def check_counts(self) -> None:
        super().check_counts()
        sizes = {part.batch for part in self.parts} - {self.batch}
        check(not sizes, f"experts of {sizes} sequences", f"{self.batch}", "save it again")
        if self.parts:
            stored = torch.stack([part.lengths for part in self.parts]).sum(0)
            fits = bool((stored == self.n_packed).all())
            check(fits, "tokens of the experts", "as many as left the window", "save it again")

    def select_sequences(self, rows: Sequence[int]) -> ExpertCache:
        out = super().select_sequences(rows)
        out.parts = [part.select_sequences(rows) for part in self.parts]
        return out

    @classmethod
    def cat(cls, caches: Sequence[ExpertCache]) -> ExpertCache:
        out = super().cat(caches)
        out.parts = [PackedCache.cat(same) for same in zip(*(c.parts for c in caches), strict=True)]
        return out

    def snapshot(self) -> ExpertCache:
        out = super().snapshot()
        out.seen = self.seen.clone()  # summed up in place
        out.parts = [part.snapshot() for part in self.parts]
        return out
