"""How much will each token of a prompt be read by what follows? The signals behind selector.py,
from none to trained ones.

`observed` is the attention of the asking tokens: the prompt's last, the query region or as many as
--observers says. `oracle` is that of the tokens that follow, from a pass that has seen them: no
method (and where nothing follows, of the query region, no upper bound). `future` lets the
queries of earlier tokens stand for those to come, moved to the positions after the prompt
(training-free; compare Expected Attention, arXiv 2510.00636). Rivals that drop whole tokens stand
in baselines/tokens.py.

The signals that are trained stand in selection/predictors.py.

Letters: L compressed layers, B batch, C context tokens, W query region, T = C + W, H, Hkv heads, D
head dimension, S groups, E width. All scores are float32, for context columns only; those of
padding columns mean nothing, and selector.py never keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import SelectConfig, check
from model import apply_rope
from selection.group_norms import group_norms
from selection.moments import turned_moments
from selection.received import received
from storage.kernel_base import use_triton
from storage.layout import soft_cap
from storage.ragged import RaggedCache

SPAN = 1024  # last tokens whose queries are drawn: of the context by `future`, of all by `moments`
READ = 128  # tokens after the prompt whose queries `moments` stands for
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many there are
CHUNK = 1 << 28  # attention weights formed at a time
# a logit that gets no weight; finite, so that a padding query, which may read nothing, gives no NaN
NEVER = -1e30
NOBODY_ASKS = (
    "a query region of 0 tokens: relevance needs somebody who asks; "
    "give --query or --kv_tail of 1 or more"
)
TINY = 1e-9  # below this a share of attention counts as none


class SeenLayer(NamedTuple):
    """What one layer saw of a prompt that is still on its way through the layers above."""

    path: nn.Module  # the layer's SelectPath
    x: Tensor  # (B, T, E)
    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, Hkv, T, D)
    v: Tensor  # (B, Hkv, T, D)
    z: Tensor  # (B, Hkv, C, D) context values in the coordinates that are cut
    cache: RaggedCache  # that it goes into


@dataclass(frozen=True)
class Prompt:
    """What the compressed layers saw of a prompt: lists with a tensor per layer.

    The last W = T - n_context columns are the query region. The asking tokens, whose attention is
    observed, are these or the last `observers`."""

    x: Sequence[Tensor]  # (B, T, E)
    q: Sequence[Tensor]  # (B, H, T, D)
    k: Sequence[Tensor]  # (B, Hkv, T, D)
    z: Sequence[Tensor]  # (B, Hkv, C, D)
    n_context: int
    pad: Tensor | None  # (B,) left padding
    rope: tuple[Tensor, Tensor]  # the model's tables
    oracle: Tensor | None = None  # (L, B, Hkv, C), attention from a diagnostic pass
    first: int = 0  # which compressed layer the lists begin with
    n_groups: int = 1  # groups that a value is cut into
    observers: int = 0  # tokens whose queries are observed; 0: the query region
    cap: float = 0.0  # of attention logits: see storage.layout.soft_cap
    untold: Sequence[Tensor] | None = None  # (B, Hkv, C, D), what keys do not tell of z
    impl: str = "auto"  # of received: see storage/kernel_base.py
    v: Sequence[Tensor] | None = None  # (B, Hkv, T, D), where z are the first columns of these

    @property
    def stored(self) -> Prompt:
        """The same prompt with values that are what is stored of them: what keys do not tell."""
        return self if self.untold is None else self._stored

    @cached_property
    def _stored(self) -> Prompt:  # never the prompt itself: held by itself it would not be freed
        return replace(self, z=self.untold, untold=None, v=None)

    @cached_property
    def L(self) -> int:
        return len(self.k)

    @cached_property
    def T(self) -> int:
        return self.k[0].size(2)

    @cached_property
    def column(self) -> Tensor:
        return torch.arange(self.T, device=self.k[0].device)

    @cached_property
    def real(self) -> Tensor:
        """False for padding: (B, T) bool."""
        if self.pad is None:
            return torch.ones(self.k[0].size(0), self.T, dtype=torch.bool, device=self.k[0].device)
        return self.column >= self.pad[:, None]

    @cached_property
    def valid(self) -> Tensor:
        """Context columns that are no padding: (B, C) bool."""
        return self.real[:, : self.n_context]

    @cached_property
    def layers(self) -> slice:
        """Which of all compressed layers these are."""
        return slice(self.first, self.first + self.L)

    @cached_property
    def start(self) -> Tensor:
        """Column of each row's first token: (B or 1, 1) int64."""
        return self.column[:1, None] if self.pad is None else self.pad[:, None]

    @cached_property
    def length(self) -> Tensor:
        """Tokens of each row: (B or 1, 1) int64."""
        return self.T - self.start

    @cached_property
    def keys(self) -> Tensor:
        """(L, B, Hkv, T, D)."""
        return stacked(self.k, self.impl)

    @cached_property
    def values(self) -> Tensor:
        """(L, B, Hkv, C, D), encoded."""
        if self.v is None:
            return stacked(self.z, self.impl)
        return self.whole[..., : self.n_context, :]  # one copy serves both

    @cached_property
    def whole(self) -> Tensor:
        """v of all layers, (L, B, Hkv, T, D)."""
        return stacked(self.v, self.impl)

    @cached_property
    def norms(self) -> Tensor:
        """Norms of the values' groups: (L, B, Hkv, C, S)."""
        z = self.values
        S = self.n_groups
        fits = is_power_of_2(z.size(-1)) and is_power_of_2(S) and not z.requires_grad
        if fits and use_triton(self.impl, z.device, z.dtype):
            return group_norms(z, S)
        return norms(z.unflatten(-1, (S, -1)))

    @cached_property
    def observed(self) -> Tensor:
        """Mean attention of the asking tokens on the context: (L, B, Hkv, C)."""
        return self._asked[0]

    @cached_property
    def strongest(self) -> Tensor:
        """Largest attention of an asking token and query head on the context: (L, B, Hkv, C)."""
        return self._asked[1]

    @cached_property
    def _asked(self) -> tuple[Tensor, Tensor]:
        """Attention of the asking tokens, the mean and the largest, from one pass over the keys."""
        if not len(self.asking):
            raise ValueError(NOBODY_ASKS)
        there = None if self.pad is None else self.real[:, self.asking].float()  # (B, Q)
        asking = self.queries(self.asking, len(self.asking))
        return self.received(asking, self.asking, there, with_largest=True)

    @cached_property
    def asking(self) -> Tensor:
        """Columns of the tokens whose queries are observed, the prompt's last: (W,) int64."""
        n = min(self.observers, self.T) or self.T - self.n_context
        return self.column[self.T - n :]

    def causal(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Attention of neighbouring columns `rows` on the context, each reading what came before
        it: see received."""
        return self.received(self.queries(rows), rows, weight)[0]

    @cached_property
    def recent(self) -> Tensor:
        """Queries of the last SPAN tokens of the context and of all after it, or of as many as
        there are: (L, B, H, R, D)."""
        n = self.T - self.n_context + SPAN
        return stacked([q[:, :, -n:] for q in self.q], self.impl)

    def queries(self, columns: Tensor, reach: int | None = None) -> Tensor:
        """Queries of some columns (Q,), or of each row's own (B, Q): (L, B, H, Q, D).

        reach: they are among the prompt's last so many columns; None: anywhere"""
        near = reach is not None and reach <= self.T - self.n_context + SPAN
        layers = [self.recent] if near else [q[None] for q in self.q]
        L, _, H, R, D = layers[0].shape
        columns = columns - (self.T - R)
        if columns.ndim == 1:
            picked = [q.index_select(3, columns) for q in layers]
        else:
            index = columns[:, None, :, None].expand(L, -1, H, -1, D)
            picked = [q.gather(3, index) for q in layers]
        return picked[0] if near else torch.cat(picked)

    def received(
        self,
        q: Tensor,
        last: Tensor | None = None,
        weight: Tensor | None = None,
        with_largest: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the attention on each context token, (L, B, Hkv, C): its mean over the query heads
        of a KV head and over queries, and if asked for (else anything) the largest of those that
        count in the mean.

        q       (L, B, H, Q, D)
        last    (Q,) rising, the last column that each query reads; None: all
        weight  (B, Q), of each query in the mean"""
        weight = self.weights(q, weight)
        if use_triton(self.impl, q.device, q.dtype) and not q.requires_grad:
            seen = (last, self.pad, self.n_context, self.cap)
            return received(self.scaled(q), self.keys, weight, *seen)
        visible = None if last is None else self.column[last[0] :] <= last[:, None]
        mean = []
        largest = []
        for shares in self.shares(q, visible):
            mean.append(weighed(weight, shares))
            if with_largest:
                largest.append((shares * (weight.mT > 0)).amax(-2))
        valid = self.valid[:, None]
        mean = torch.cat(mean) * valid
        return mean, torch.cat(largest) * valid if with_largest else mean

    def scaled(self, q: Tensor) -> Tensor:
        """Return queries (L, B, H, Q, D) by KV head, ready for products: (L, B, Hkv, n Q, D)."""
        by_head = (q * q.size(-1) ** -0.5).unflatten(2, (self.keys.size(2), -1))
        return by_head.flatten(3, 4)

    def weights(self, q: Tensor, weight: Tensor | None) -> Tensor:
        """Return the part of each query head and query in a mean: (B, 1, 1, n Q); see received."""
        _, B, H, Q, _ = q.shape
        n = H // self.keys.size(2)
        if weight is None:
            weight = torch.full((B, Q), 1 / Q, device=q.device)
        else:
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(TINY)
        return weight.repeat(1, n)[:, None, None] / n

    def shares(self, q: Tensor, visible: Tensor | None) -> Iterator[Tensor]:
        """Yield attention on the context of some layers at a time, (l, B, Hkv, n Q, C) float32, the
        query heads of a KV head in turn. visible: (Q, V) bool, what a query reads of the prompt's
        last V columns; earlier columns always; None: all."""
        L, B, H, Q, _ = q.shape
        n = H // self.keys.size(2)
        step = max(1, CHUNK // (B * H * Q * self.T))
        for i in range(0, L, step):
            scaled = self.scaled(q[i : i + step])
            p = (scaled @ self.keys[i : i + step].mT).float()  # (l, B, Hkv, n Q, T)
            if self.cap:
                p = soft_cap(p, self.cap)
            if visible is not None:
                p[..., self.T - visible.size(1) :].masked_fill_(~visible.repeat(n, 1), NEVER)
            if self.pad is not None:
                p.masked_fill_(~self.real[:, None, None], NEVER)
            yield p.softmax(-1)[..., : self.n_context]

    def moved(self, columns: Tensor, ahead: int, reach: int | None = None) -> Tensor:
        """queries(columns, reach) as if their tokens came `ahead` after the prompt: RoPE turns them
        further. (L, B, H, Q, D)."""
        return apply_rope(self.queries(columns, reach), *self.turn(columns, ahead))

    def turn(self, columns: Tensor, ahead: int | Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, 1, Q, D/2) that move queries of columns (Q,) or (B, Q) to `ahead`
        after the prompt, no further than the model's context: a row's tokens count from its
        first."""
        last = len(self.rope[0]) - 1
        place = (self.length + ahead).clamp_max(last) - (columns - self.start).clamp_min(0)
        return tuple(t[place].unsqueeze(-3) for t in self.rope)

    @cached_property
    def to_come(self) -> tuple[Tensor, Tensor]:
        """How `moments` turns the prompt's last queries: see turn."""
        columns = self.column[-SPAN:]
        room = (len(self.rope[0]) - self.length).clamp(1, READ)  # (B or 1, 1)
        # counted from the end: rows are as if alone
        n = len(columns)
        from_end = torch.arange(n - 1, -1, -1, dtype=torch.float64, device=columns.device)
        ahead = (from_end * GOLDEN % 1 * room).long()
        return self.turn(columns, ahead)

    def moments(self) -> Tensor:
        """Return the second moments of the layers' queries to come, (L, B, Hkv, D, D) float64.

        Each is the mean of q q^T over the query heads of a KV head and over the prompt's last SPAN
        queries, as if they came among the READ tokens after it, or as many as fit the model's
        context (RoPE turns them further). A kernel sums in float32."""
        last = self.recent[..., -SPAN:, :]  # (L, B, H, Q, D)
        real = self.real[:, -SPAN:]  # (B, Q)
        n = real.sum(1).clamp_min(1)[:, None, None, None]
        D = last.size(-1)
        fits = D >= 16 and is_power_of_2(D)
        if fits and use_triton(self.impl, last.device, last.dtype):
            Hkv = self.k[0].size(1)
            there = None if self.pad is None else real
            total = turned_moments(last, *self.to_come, there, Hkv)
            return total.double() / (n * (last.size(2) // Hkv))
        step = max(1, (CHUNK >> 2) // max(1, last[0].numel()))
        out = []
        for i in range(0, self.L, step):
            q = apply_rope(last[i : i + step].float(), *self.to_come).double()
            read = q if self.pad is None else q * real[:, None, :, None]
            of_heads = (read.mT @ q).unflatten(2, (self.k[0].size(1), -1))
            out.append(of_heads.mean(3) / n)
        return torch.cat(out)

    def past(self, cfg: SelectConfig) -> Tensor:
        """Attention on the context of cfg.past queries of its last tokens, moved ahead: (L, B, Hkv,
        C)."""
        length = self.valid.sum(-1, keepdim=True)  # (B, 1): each row spreads over its own tokens
        every = length.clamp_max(SPAN).div(cfg.past, rounding_mode="floor").clamp_min(1)
        # (B, Q)
        columns = (
            self.n_context - 1 - self.column[: min(cfg.past, self.n_context)] * every
        ).clamp_min(0)
        there = None if self.pad is None else self.real.gather(1, columns).float()
        reach = self.T - self.n_context + max(SPAN, cfg.past)
        return self.received(self.moved(columns, cfg.ahead, reach), weight=there)[0]


def stacked(tensors: Sequence[Tensor], impl: str = "auto") -> Tensor:
    """Stack the layers' tensors: for kernels, which take any strides, as they lie in memory; else
    in order, which products take without a copy."""
    if use_triton(impl, tensors[0].device, tensors[0].dtype):
        return beside(tensors)
    return torch.stack(tuple(tensors))


def beside(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape as they lie in memory: projections lie token by token, and copies
    in that order are plain ones."""
    order = sorted(range(tensors[0].ndim), key=lambda i: -tensors[0].stride(i))
    back = sorted(range(len(order)), key=order.__getitem__)
    stacked = torch.stack([t.permute(order) for t in tensors])
    return stacked.permute(0, *(i + 1 for i in back))


def weighed(weight: Tensor, shares: Tensor) -> Tensor:
    """Sum shares (l, B, Hkv, n Q, C) by weight (B, 1, 1, n Q), in float32: (l, B, Hkv, C)."""
    with torch.autocast(shares.device.type, enabled=False):
        return (weight @ shares).squeeze(-2)


def is_power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


def norms(t: Tensor) -> Tensor:
    """Norms over the last dimension, summed in at least float32, as float32."""
    return torch.linalg.vector_norm(
        t, dim=-1, dtype=torch.promote_types(t.dtype, torch.float32)
    ).float()


def pooled(a: Tensor, width: int) -> Tensor:
    """Maximum over `width` neighbours (odd), same shape (..., C)."""
    return F.max_pool1d(a.flatten(0, -3), width, 1, width // 2).view_as(a) if width > 1 else a


# -------------------- signals without parameters: alpha (L or 1, B, Hkv or 1, C)


def uniform(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Every token alike."""
    return prompt.valid.float()[None, :, None]


def random(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Drawn once for every layer, head and distance from the prompt's end: rows do not depend on
    each other."""
    drawn = [
        torch.rand(
            prompt.n_context,
            prompt.keys.size(2),
            generator=torch.Generator().manual_seed(prompt.first + i),
        )
        for i in range(prompt.L)
    ]
    return (
        torch.stack(drawn).flip(1).mT.unsqueeze(1).to(prompt.column.device) * prompt.valid[:, None]
    )


def oracle(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Attention of what follows (of the query region where nothing does), from a diagnostic pass:
    eq 12."""
    check(
        prompt.oracle is not None,
        "relevance=oracle",
        "it needs a pass that has seen what follows",
        "measure it with eval.py, use another here",
    )
    return prompt.oracle


def observed(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Attention of the asking tokens, max-pooled over cfg.pool tokens."""
    return pooled(prompt.observed, cfg.pool)


def future(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Half observed attention, half that of past queries moved ahead."""
    return (prompt.observed + prompt.past(cfg)) / 2


PLAIN: dict[str, Callable[[Prompt, SelectConfig], Tensor]] = {
    f.__name__: f for f in (oracle, observed, future, uniform, random)
}
