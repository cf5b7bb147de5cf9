"""What is kept of a prompt, refitted: values of kept tokens take over what dropped ones would have
said.

The problem: attention over the kept tokens of a context gives queries to come something else than
attention over all of it. The idea: the prompt's own last queries, turned to the places after the
prompt, stand for those to come; what they read of the whole context is known before it is packed.
With P their weights on the kept tokens that may move (first and last tokens stay as they are) and E
what attention over kept tokens leaves of that over all, values change by the X of ridge regression,

    minimise ||P X - E||^2 + ridge * mean_j (P^T P)_jj * ||X||^2                                 (1)

for each KV head by itself, before they are rounded. Nothing more is stored.

Few queries, or queries unlike those to come, would be learned by heart. So every fourth run of them
is held out, and a head moves by the share in [0, 1] of X that is best for those: where X makes them
worse not at all.

    z = refitted(prompt, tail, keep, read, n_first, ridge)

Letters: selection/relevance.py; m = n Q queries of a KV head; G segments (layer, sequence, KV head)
that are fitted together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model import apply_rope
from selection.relevance import CHUNK, NEVER, TINY, Prompt
from storage.layout import at_least_float32, cdiv, soft_cap

QUERIES = 512  # last tokens of a prompt whose queries stand for those to come
RUN = 16  # neighbouring tokens whose queries are all fitted, or all held out
EVERY = 4  # of so many runs one is held out
BUCKET = 64  # segments whose numbers of kept tokens differ by less are fitted together


class Segments(NamedTuple):
    """What is refitted: all segments, or G that are fitted together."""

    q: Tensor  # (G, m, D) queries, scaled
    k: Tensor  # (G, T, D) keys of the prompt
    z: Tensor  # (G, T, D) value coordinates
    read: Tensor  # (G, C, D) those of the context as they will be read, but for rounding
    stored: Tensor  # (G, C, D) bool, which of these are stored if their token is
    free: Tensor  # (G, C) bool, tokens that are kept and may move
    there: Tensor  # (G, T) bool, tokens that will be read
    real: Tensor  # (G, T) bool, no padding
    asks: Tensor  # (G, m) bool, queries of tokens that are no padding


def turned_queries(prompt: Prompt) -> Tensor:
    """Return the prompt's last QUERIES queries as if they came after it: (L, B, H, Q, D)."""
    q = torch.stack([q[:, :, -QUERIES:] for q in prompt.q])
    return apply_rope(q, *(t[..., -q.size(-2) :, :] for t in prompt.to_come))


def held_out(n: int, device: torch.device) -> Tensor:
    """Mark which of the last n tokens' queries are held out, counted from the end: (n,) bool."""
    from_end = torch.arange(n, device=device).flip(0)
    return from_end // RUN % EVERY == EVERY - 1


def segments(prompt: Prompt, tail: Tensor, keep: Tensor, stored: Tensor, n_first: int) -> Segments:
    """Return all segments of a prompt, layer by layer, then row by row: see refitted."""
    L, B, Hkv, C, _ = prompt.values.shape
    q = turned_queries(prompt)
    first = prompt.valid & (prompt.valid.cumsum(-1) <= n_first)
    free = keep & (prompt.valid & ~first)[:, None]
    always = torch.cat((first, prompt.real[:, C:]), -1)
    kept = torch.cat((free, free.new_zeros(*free.shape[:-1], prompt.T - C)), -1)
    asks = prompt.real[:, -q.size(-2) :].repeat(1, q.size(2) // Hkv)
    told = prompt.values - prompt.stored.values  # what is read of a group that is not stored

    def flat(t: Tensor, own: int) -> Tensor:
        """By segment: t (..., and `own` dimensions of a segment)."""
        return t.expand(L, B, Hkv, *t.shape[-own:]).flatten(0, 2)

    return Segments(
        q=flat(prompt.scaled(q), 2),
        k=flat(prompt.keys, 2),
        z=flat(torch.cat((prompt.values, tail), -2), 2),
        read=flat(torch.where(stored | ~free.unsqueeze(-1), prompt.values, told), 2),
        stored=flat(stored, 2),
        free=flat(free, 1),
        there=flat(kept | always[:, None], 1),
        real=flat(prompt.real[:, None], 1),
        asks=flat(asks[:, None], 1),
    )


@torch.no_grad()
def refitted(
    prompt: Prompt, tail: Tensor, keep: Tensor, stored: Tensor, n_first: int, ridge: float
) -> Tensor:
    """Return the coordinates of a context's values, those of kept tokens refitted: as prompt.values
    (L, B, Hkv, C, D).

    tail     (L, B, Hkv, W, D), coordinates of the query region
    keep     (L or 1, B, Hkv or 1, C) bool, tokens that are kept
    stored   (L or 1, B, Hkv or 1, C, D) bool, their coordinates that are stored
    n_first  a sequence's first tokens that stay whole, kept or not

    The host waits for the numbers of tokens that are kept."""
    every = segments(prompt, tail, keep, stored, n_first)
    n_heads = prompt.q[0].size(1) // prompt.k[0].size(1)
    held = held_out(every.q.size(1) // n_heads, every.q.device).repeat(n_heads)
    out = prompt.values.flatten(0, 2).clone()
    for at in alike(every.free.sum(-1), every.q.size(1) * prompt.T):
        some = Segments(*(t[at] for t in every))
        out[at] += change(some, held, ridge, prompt.cap).to(out.dtype)
    return out.view_as(prompt.values)


def alike(n: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the indices of segments with n (G,) tokens, 1 or more, that are fitted together: nearly
    as many tokens each, and few enough segments that attention of `size` weights each fits."""
    bucket = cdiv(n, BUCKET)
    for number in bucket.unique().tolist():
        if number:
            same = (bucket == number).nonzero().squeeze(1)
            yield from same.split(max(1, (CHUNK >> 2) // size))


def change(s: Segments, held: Tensor, ridge: float, cap: float = 0.0) -> Tensor:
    """Return what is added to the context's coordinates: (G, C, D), float32 at least, 0 where a
    token may not move. held: (m,) bool, queries that are not fitted but decide how far."""
    C = s.free.size(1)
    logits = soft_cap(at_least_float32(s.q) @ at_least_float32(s.k).mT, cap)  # (G, m, T)
    z = at_least_float32(s.z)
    p = logits.masked_fill(~s.there[:, None], NEVER).softmax(-1)
    whole = logits.masked_fill_(~s.real[:, None], NEVER).softmax(-1)
    wanted = whole @ z

    n = s.free.sum(-1)
    column = s.free.byte().argsort(dim=-1, descending=True, stable=True)[:, : int(n.max())]
    counts = s.asks.unsqueeze(-1) & s.free.take_along_dim(column, -1)[:, None]
    moves = p.take_along_dim(column[:, None], -1) * counts  # (G, m, N)
    fit = ~held
    x = ridge_rows(moves[:, fit], (wanted - p @ z)[:, fit], n, ridge)  # (G, N, D)

    column = column.unsqueeze(-1)
    # X is fitted on exact values, and judged by what will be read.
    moved = moves[:, held] @ (x * s.stored.take_along_dim(column, 1))
    as_read = torch.cat((at_least_float32(s.read), z[:, C:]), 1)
    missed = wanted[:, held] - p[:, held] @ as_read
    size = moved.square().sum((1, 2)).clamp_min(TINY**2)
    share = (moved * missed).sum((1, 2)) / size
    x = x * share.clamp(0, 1)[:, None, None]
    return torch.zeros_like(z[:, :C]).scatter(1, column.expand_as(x), x)


def ridge_rows(p: Tensor, e: Tensor, n: Tensor, ridge: float) -> Tensor:
    """Solve equation (1): x (G, N, D).

    p  (G, m, N) weights, 0 in columns that do not count
    e  (G, m, D)
    n  (G,) columns that count, 1 or more"""
    strength = ridge * p.square().sum((1, 2)) / n
    strength = torch.where(strength > 0, strength, 1).double()[:, None]
    few = p.size(2) <= p.size(1)
    gram = (p.mT @ p if few else p @ p.mT).double()  # the latter has the same solution
    gram.diagonal(dim1=1, dim2=2).add_(strength)
    lower = torch.linalg.cholesky_ex(gram)[0]
    if few:
        return torch.cholesky_solve((p.mT @ e).double(), lower).to(e.dtype)
    return p.mT @ torch.cholesky_solve(e.double(), lower).to(e.dtype)
