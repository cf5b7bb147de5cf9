"""Keys rounded for the queries that will read them: each number of a key up or down, so that logits
change least, for no byte more.

The error e of a stored key is seen only as q . e, so over queries to come it costs e^T H e, H the
mean of q q^T, which a prompt's own queries tell well (relevance.Prompt.moment). Queries of a head
point in few directions: H is far from a multiple of the identity, and an error in one coordinate
can be taken back in others. That is the rule by which GPTQ (arXiv 2210.17323) rounds weights, with
queries in the place of a layer's inputs. On SmolLM2's keys it leaves 0.43 of the squared error in
logits that the nearest codes leave, at 2, 3 and 4 bits alike.

A Triton kernel beside its plain reference; `impl` as in kernels.py. Letters: n keys of all segments
(sequence, KV head), D head dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from storage.kernel_base import jit, tl, triton, use_triton

# of queries' mean square, added to it in every coordinate: what few queries do not show
DAMPING = 0.01
TOKENS = 32  # that a program of the kernel rounds


class Readers(NamedTuple):
    """Who will read keys."""

    moment: Tensor  # (segments, D, D) float64: mean of q q^T over queries to come
    n: Tensor  # (segments,) int64: keys of each, one segment after the other

    @property
    def segment(self) -> Tensor:
        """Of each key: (n,) int64."""
        return torch.arange(len(self.n), device=self.n.device).repeat_interleave(self.n)


def taken_back(moment: Tensor) -> tuple[Tensor, Tensor]:
    """How rounding one coordinate of a key after the other is made up for in those still to come:
    order (segments, D) int64, what queries weigh most last; share (segments, D, D) float32 in that
    order: taking coordinate j off by r, share[j, i] r is best taken from every i < j.

    With moment H (segments, D, D) = L diag(d) L^T, L unit lower triangular, an error e costs e^T H
    e = sum_j d_j (L^T e)_j^2. Taken from the last j to the first, (L^T e)_j is what is left of r_j,
    whatever came before, if the others moved by the rows of L^-1."""
    moment = moment.nan_to_num(0, 0, 0)  # where queries are no numbers, as if there were none
    order = moment.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, stable=True)
    H = moment.take_along_dim(order.unsqueeze(-1), -2).take_along_dim(order.unsqueeze(-2), -1)
    least = H.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-12) * DAMPING
    L = torch.linalg.cholesky(H + torch.diag_embed(least.expand_as(order)))
    L = L / L.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    return order, torch.linalg.solve_triangular(
        L, torch.eye(L.size(-1), dtype=L.dtype, device=L.device).expand_as(L), upper=False
    ).float()


def codes_for_ref(readers: Readers, x: Tensor, step: Tensor, middle: Tensor, bits: int) -> Tensor:
    """codes_for, all keys at once and coordinate by coordinate: the specification."""
    (order, share) = taken_back(readers.moment)
    (G, D) = readers.moment.shape[:2]
    half = 2.0 ** (bits - 1)
    n = readers.n
    segment = readers.segment
    number = torch.arange(len(x), device=x.device) - (n.cumsum(0) - n)[segment]
    M = int(n.max()) if G else 0
    place = order[segment]  # keys of the longest segment; (n, D)

    def laid(t: Tensor) -> Tensor:  # (n, D) -> (D, G, M), coordinates in order
        out = t.new_ones(D, G, M)
        out[:, segment, number] = t.take_along_dim(place, -1).T
        return out

    off = laid(x - middle.float())
    step = laid(step.float())
    share = share.permute(1, 2, 0).unsqueeze(-1)  # share: (D, D, G, 1)
    for j in reversed(range(D)):
        code = (off[j] / step[j] + (half + 0.5)).floor_().clamp_(0, 2 * half - 1)
        off[:j].addcmul_(
            share[j, :j], torch.addcmul(off[j], code - half, step[j], value=-1), value=-1
        )
        off[j] = code
    return torch.empty_like(place, dtype=torch.uint8).scatter_(
        -1, place, off[:, segment, number].T.to(torch.uint8)
    )


@jit
def _codes_kernel(
    x,
    step,
    middle,
    order,
    share,
    first,
    codes,
    D: tl.constexpr,
    D2: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Codes of TOKENS keys of a segment. first (segments + 1,): where segments begin."""
    g = tl.program_id(0).to(tl.int64)
    half = 1 << (BITS - 1)
    t = tl.load(first + g) + tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, D2)
    at = t[:, None] * D + tl.load(order + g * D + i, mask=i < D, other=0)[None, :]
    there = (t < tl.load(first + g + 1))[:, None] & (i < D)[None, :]
    steps = tl.load(step + at, mask=there, other=1).to(tl.float32)
    off = tl.load(x + at, mask=there, other=0) - tl.load(middle + at, mask=there, other=0).to(
        tl.float32
    )
    share += g * D * D + i
    for back in tl.range(0, D):
        j = D - 1 - back
        mine = (i == j)[None, :]
        o = tl.sum(tl.where(mine, off, 0.0), 1)
        s = tl.sum(tl.where(mine, steps, 0.0), 1)
        code = tl.minimum(tl.maximum(tl.floor(tl.div_rn(o, s) + (half + 0.5)), 0.0), 2.0 * half - 1)
        left = o - (code - half) * s  # the product is exact
        off = tl.where(
            mine,
            code[:, None],
            off - left[:, None] * tl.load(share + j * D, mask=i < j, other=0)[None, :],
        )
    tl.store(codes + at, off.to(tl.uint8), mask=there)


def codes_for(
    readers: Readers, x: Tensor, step: Tensor, middle: Tensor, bits: int, impl: str = "auto"
) -> Tensor:
    """Codes (n, D) uint8 of keys x (n, D) float32 that leave queries little squared error in
    logits: one coordinate after the other is rounded to the nearest code, and those still to come
    take its error back. step, middle (n, D) float16.

    A key's codes depend on its segment's moment and on nothing else. Kernel and reference round
    sums differently: where a number lies within 1e-5 of the border between two codes they may
    differ, and what follows in that key with them."""
    if not use_triton(impl, x):
        return codes_for_ref(readers, x, step, middle, bits)
    (order, share) = taken_back(readers.moment)
    (G, D) = readers.moment.shape[:2]
    n = readers.n
    codes = torch.empty_like(x, dtype=torch.uint8)
    first = torch.cat((n.new_zeros(1), n.cumsum(0)))
    if len(x):
        _codes_kernel[(G, -(-int(n.max()) // TOKENS))](
            x.contiguous(),
            step.contiguous(),
            middle.contiguous(),
            order.contiguous(),
            share.contiguous(),
            first,
            codes,
            D,
            triton.next_power_of_2(D),
            bits,
            TOKENS,
        )
    return codes
