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
    Q = q.size(-2)
    cos, sin = prompt.to_come
    return apply_rope(q, cos[..., -Q:, :], sin[..., -Q:, :])


def held_out(n: int, device: torch.device) -> Tensor:
    """Mark which of the last n tokens' queries are held out, counted from the end: (n,) bool."""
    from_end = torch.arange(n, device=device).flip(0)
    return from_end // RUN % EVERY == EVERY - 1


def segments(prompt: Prompt, tail: Tensor, keep: Tensor, stored: Tensor, n_first: int) -> Segments:
    """Return all segments of a prompt, layer by layer, then row by row: see refitted."""
    L, B, Hkv, C, _ = prompt.values.shape
    q = turned_queries(prompt)
    Q = q.size(-2)
    n_heads = q.size(2) // Hkv  # query heads of a KV head
    number = prompt.valid.cumsum(-1)
    first = prompt.valid & (number <= n_first)
    may_move = prompt.valid & ~first
    free = keep & may_move[:, None]
    always = torch.cat((first, prompt.real[:, C:]), -1)
    after = free.new_zeros(*free.shape[:-1], prompt.T - C)
    there = torch.cat((free, after), -1) | always[:, None]
    asks = prompt.real[:, -Q:].repeat(1, n_heads)
    z = torch.cat((prompt.values, tail), -2)
    whole = stored | ~free.unsqueeze(-1)
    told = prompt.values - prompt.stored.values  # what is read of a group that is not stored
    read = torch.where(whole, prompt.values, told)

    def flat(t: Tensor, own: int) -> Tensor:
        """By segment: t (..., and `own` dimensions of a segment)."""
        shape = t.shape[-own:]
        each = t.expand(L, B, Hkv, *shape)
        return each.flatten(0, 2)

    return Segments(
        q=flat(prompt.scaled(q), 2),
        k=flat(prompt.keys, 2),
        z=flat(z, 2),
        read=flat(read, 2),
        stored=flat(stored, 2),
        free=flat(free, 1),
        there=flat(there, 1),
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
    m = every.q.size(1)
    n_heads = prompt.q[0].size(1) // prompt.k[0].size(1)
    of_head = held_out(m // n_heads, every.q.device)
    held = of_head.repeat(n_heads)
    out = prompt.values.flatten(0, 2).clone()
    for at in alike(every.free.sum(-1), m * prompt.T):
        some = Segments(*(t[at] for t in every))
        moved = change(some, held, ridge, prompt.cap)
        out[at] += moved.to(out.dtype)
    return out.view_as(prompt.values)


def alike(n: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the indices of segments with n (G,) tokens, 1 or more, that are fitted together: nearly
    as many tokens each, and few enough segments that attention of `size` weights each fits."""
    bucket = cdiv(n, BUCKET)
    most = max(1, (CHUNK >> 2) // size)
    for number in bucket.unique().tolist():
        if number:
            here = bucket == number
            same = here.nonzero().squeeze(1)
            yield from same.split(most)


def change(s: Segments, held: Tensor, ridge: float, cap: float = 0.0) -> Tensor:
    """Return what is added to the context's coordinates: (G, C, D), float32 at least, 0 where a
    token may not move. held: (m,) bool, queries that are not fitted but decide how far."""
    C = s.free.size(1)
    q = at_least_float32(s.q)
    k = at_least_float32(s.k)
    z = at_least_float32(s.z)
    logits = soft_cap(q @ k.mT, cap)  # (G, m, T)
    dropped = ~s.there[:, None]
    padding = ~s.real[:, None]
    p = logits.masked_fill(dropped, NEVER).softmax(-1)
    whole = logits.masked_fill_(padding, NEVER).softmax(-1)
    wanted = whole @ z

    n = s.free.sum(-1)
    N = int(n.max())
    first_free = s.free.byte().argsort(dim=-1, descending=True, stable=True)
    column = first_free[:, :N]
    moves = s.free.take_along_dim(column, -1)[:, None]  # (G, 1, N)
    counts = s.asks.unsqueeze(-1) & moves
    weight = p.take_along_dim(column[:, None], -1) * counts  # (G, m, N)
    fit = ~held
    left = wanted - p @ z
    x = ridge_rows(weight[:, fit], left[:, fit], n, ridge)  # (G, N, D)

    column = column.unsqueeze(-1)
    # X is fitted on exact values, and judged by what will be read.
    stored = s.stored.take_along_dim(column, 1)
    moved = weight[:, held] @ (x * stored)
    read = torch.cat((at_least_float32(s.read), z[:, C:]), 1)
    missed = wanted[:, held] - p[:, held] @ read
    squares = moved.square().sum((1, 2))
    along = (moved * missed).sum((1, 2))
    share = along / squares.clamp_min(TINY**2)
    share = share.clamp(0, 1)
    x = x * share[:, None, None]
    unmoved = torch.zeros_like(z[:, :C])
    return unmoved.scatter(1, column.expand_as(x), x)


def ridge_rows(p: Tensor, e: Tensor, n: Tensor, ridge: float) -> Tensor:
    """Solve equation (1): x (G, N, D).

    p  (G, m, N) weights, 0 in columns that do not count
    e  (G, m, D)
    n  (G,) columns that count, 1 or more"""
    trace = p.square().sum((1, 2))
    strength = ridge * trace / n
    strength = torch.where(strength > 0, strength, 1).double()
    m, N = p.shape[1:]
    if m >= N:
        gram = p.mT @ p
        right = p.mT @ e
        return solved(gram, strength, right).to(e.dtype)
    gram = p @ p.mT  # smaller, and has the same solution
    return p.mT @ solved(gram, strength, e).to(e.dtype)


def solved(gram: Tensor, strength: Tensor, right: Tensor) -> Tensor:
    """Solve (gram + strength I) x = right in float64: gram (G, n, n), strength (G,), x and right
    (G, n, D)."""
    gram = gram.double()
    gram.diagonal(dim1=1, dim2=2).add_(strength[:, None])
    lower = torch.linalg.cholesky_ex(gram)[0]
    return torch.cholesky_solve(right.double(), lower)
