"""Round keys for the queries that will read them: each number of a key up or down, so that logits
change least, for no byte more.

The error e of a stored key is seen only as q . e, so over queries to come it costs

    e^T H e,    H = mean of q q^T, the queries' second moment                                    (1)

which a prompt's own queries tell well. Queries of a head point in few directions: H is far from a
multiple of the identity, and the error of one coordinate can be made up for in others. That is the
rule by which GPTQ (arXiv 2210.17323) rounds weights, with queries in the place of a layer's inputs.
On SmolLM2's keys it leaves 0.43 of the squared error in logits that the nearest codes leave, at 2,
3 and 4 bits alike.

    moments = QueryMoments(q.mT @ q / q.size(1), n)            # q (G, queries, D) float64
    codes = gptq_round(moments, keys, step, middle, bits=4)    # in place of format.to_codes

G is the number of segments (sequence, KV head), n that of their keys, D the head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from storage.kernel_base import jit, tl, triton, use_triton
from storage.layout import cdiv, sum_before

DAMPING = 0.01  # of queries' mean square, added to it in every coordinate: what few queries hide
TOKENS = 32  # keys that a program of the kernel rounds


class QueryMoments(NamedTuple):
    """What is known of the queries that will read keys."""

    moment: Tensor  # (G, D, D) float64, the mean of q q^T over queries to come
    n: Tensor  # (G,) int64, keys of each segment, one segment after the other

    @property
    def segment(self) -> Tensor:
        """Number each key's segment: (n,) int64."""
        return torch.arange(len(self.n), device=self.n.device).repeat_interleave(self.n)


def error_feedback(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Say how the error of one rounded coordinate is made up for in those still to come.

    moment  (G, D, D) float64; where it is no number, as if there were no queries
    Returns order (G, D) int64, what queries weigh most last, and share (G, D, D) float32, in that
    order: when rounding takes r off coordinate j, share[j, i] r is best taken off every i < j.

    With H = L diag(d) L^T, L unit lower triangular, (1) is sum_j d_j (L^T e)_j^2. Where coordinates
    are rounded from the last to the first, and the others moved by the rows of L^-1, (L^T e)_j is
    what is left of r_j, whatever came before."""
    moment = moment.nan_to_num(0, 0, 0)
    order = moment.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, stable=True)
    H = reordered(moment, order)
    squares = H.diagonal(dim1=-2, dim2=-1)  # a view: H itself is damped
    squares += squares.mean(-1, keepdim=True).clamp_min(1e-12) * DAMPING
    # without a check, for which the host would wait: what is damped is positive definite
    L = torch.linalg.cholesky_ex(H).L
    L = L / L.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    one = torch.eye(L.size(-1), dtype=L.dtype, device=L.device).expand_as(L)
    return order, torch.linalg.solve_triangular(L, one, upper=False).float()


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """Return matrices x (G, D, D), a copy, with rows and columns in orders (G, D)."""
    g = torch.arange(len(x), device=x.device)[:, None, None]
    return x[g, order.unsqueeze(-1), order.unsqueeze(-2)]


def gptq_round_ref(
    moments: QueryMoments, x: Tensor, step: Tensor, middle: Tensor, bits: int
) -> Tensor:
    """Compute gptq_round for all keys at once, coordinate by coordinate."""
    order, share = error_feedback(moments.moment)
    G, D = order.shape
    half = 2.0 ** (bits - 1)
    n = moments.n
    segment = moments.segment
    number = torch.arange(len(x), device=x.device) - sum_before(n)[segment]
    longest = int(n.max()) if G else 0
    place = order[segment]  # (n, D)

    def in_order(t: Tensor) -> Tensor:  # (n, D) -> (D, G, longest), coordinates in order
        out = t.new_ones(D, G, longest)
        out[:, segment, number] = t.take_along_dim(place, -1).T
        return out

    off = in_order(x - middle.float())
    step = in_order(step.float())
    share = share.permute(1, 2, 0).unsqueeze(-1)  # (D, D, G, 1)
    for j in reversed(range(D)):
        code = (off[j] / step[j] + (half + 0.5)).floor_().clamp_(0, 2 * half - 1)
        error = torch.addcmul(off[j], code - half, step[j], value=-1)
        off[:j].addcmul_(share[j, :j], error, value=-1)
        off[j] = code
    codes = off[:, segment, number].T.to(torch.uint8)
    return torch.empty_like(place, dtype=torch.uint8).scatter_(-1, place, codes)


@jit
def _gptq_kernel(
    x_ptr,
    step_ptr,
    middle_ptr,
    order_ptr,
    share_ptr,
    first_ptr,
    codes_ptr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Round TOKENS keys of a segment. first (G + 1,): where segments begin; DIMS: D rounded up to a
    power of 2. Coordinates are held in order; a rounded one is replaced by its code."""
    g = tl.program_id(0).to(tl.int64)
    half = 1 << (BITS - 1)
    t = tl.load(first_ptr + g) + tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, DIMS)
    order = tl.load(order_ptr + g * D + i, mask=i < D, other=0)
    at = t[:, None] * D + order[None, :]
    there = (t < tl.load(first_ptr + g + 1))[:, None] & (i < D)[None, :]
    steps = tl.load(step_ptr + at, mask=there, other=1).to(tl.float32)
    middle = tl.load(middle_ptr + at, mask=there, other=0).to(tl.float32)
    off = tl.load(x_ptr + at, mask=there, other=0) - middle
    share_ptr += g * D * D + i
    for back in tl.range(0, D):
        j = D - 1 - back
        mine = (i == j)[None, :]
        own = tl.sum(tl.where(mine, off, 0.0), 1)
        step = tl.sum(tl.where(mine, steps, 0.0), 1)
        code = tl.floor(tl.div_rn(own, step) + (half + 0.5))
        code = tl.minimum(tl.maximum(code, 0.0), 2.0 * half - 1)
        error = own - (code - half) * step  # the product is exact
        share = tl.load(share_ptr + j * D, mask=i < j, other=0)
        off = tl.where(mine, code[:, None], off - error[:, None] * share[None, :])
    tl.store(codes_ptr + at, off.to(tl.uint8), mask=there)


def gptq_round(
    moments: QueryMoments,
    x: Tensor,
    step: Tensor,
    middle: Tensor,
    bits: int,
    impl: str = "auto",
) -> Tensor:
    """Find codes of keys that leave queries little squared error in logits: one coordinate after
    the other is rounded to the nearest code, and those still to come make up for its error.

    x             (n, D) float32
    step, middle  (n, D) float16
    Returns (n, D) uint8. A key's codes depend on its segment's moment and on nothing else. Kernel
    and reference round sums differently: where a number lies within 1e-5 of the border between two
    codes they may differ, and what follows in that key with them."""
    if not use_triton(impl, x.device, x.dtype):
        return gptq_round_ref(moments, x, step, middle, bits)
    order, share = error_feedback(moments.moment)
    G, D = order.shape
    n = moments.n
    codes = torch.empty_like(x, dtype=torch.uint8)
    first = torch.cat((n.new_zeros(1), n.cumsum(0)))
    if len(x):
        _gptq_kernel[(G, cdiv(int(n.max()), TOKENS))](
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
