"""Gates of routed adapters in one pass over the tokens, forward and backward.

gate_and_weigh reads what the down-projection wrote and writes what the up-projection reads. In
between lie top-k, softmax, product and load-balance sums, which are some thirty launches in plain
PyTorch. lora.RoutedLoRALinear's plain form (Gate.route, weigh) is the reference. The backward pass
computes the gates anew. Letters as in lora.py: N branches of rank R, K of them kept."""

from __future__ import annotations

import torch
from torch import Tensor

from storage.kernel_base import jit, tl, triton
from storage.layout import cdiv


@jit
def _score_places(token, N: tl.constexpr, R: tl.constexpr, BRANCHES: tl.constexpr):
    """Return where in h the scores of tokens (TOKENS,) lie, behind their activations: (TOKENS,
    BRANCHES)."""
    branch = tl.arange(0, BRANCHES)
    row = token[:, None] * (N * R + N)
    return row + N * R + branch[None, :]


@jit
def _activations(
    valid, N: tl.constexpr, R: tl.constexpr, BRANCHES: tl.constexpr, RANK: tl.constexpr
):
    """Return the column of each activation in its token's row, (1, BRANCHES, RANK), and which of
    them the tokens valid (TOKENS,) have, (TOKENS, BRANCHES, RANK) bool."""
    branch = tl.arange(0, BRANCHES)[:, None]
    r = tl.arange(0, RANK)[None, :]
    column = branch * R + r
    exists = (branch < N) & (r < R)
    return column[None], valid[:, None, None] & exists[None]


@jit
def _gates(
    h_ptr,
    bias_ptr,
    token,
    valid,
    N: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BRANCHES: tl.constexpr,
):
    """Load the scores of tokens (TOKENS,): probabilities, what is kept of them, and gates, each
    (TOKENS, BRANCHES) float32."""
    branch = tl.arange(0, BRANCHES)
    exists = branch < N
    place = _score_places(token, N, R, BRANCHES)
    real = valid[:, None] & exists[None, :]
    score = tl.load(h_ptr + place, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + branch, mask=exists, other=0.0).to(tl.float32)
    score += bias[None, :]
    score = tl.where(exists[None, :], score, float("-inf"))

    # a branch is kept when fewer than K are better; of equal ones the lower is
    mine = score[:, :, None]  # (TOKENS, branches, branches)
    other = score[:, None, :]
    lower = branch[None, None, :] < branch[None, :, None]
    better = (other > mine) | ((other == mine) & lower)
    n_better = tl.sum(better.to(tl.int32), 2)
    kept = (n_better < K) & exists[None, :]

    best = tl.max(score, 1)
    e = tl.exp(score - best[:, None])
    probs = e / tl.sum(e, 1)[:, None]
    chosen = tl.where(kept, e, 0.0)
    gates = chosen / tl.sum(chosen, 1)[:, None]
    return probs, kept, gates


@jit
def _weigh_kernel(
    h_ptr,
    bias_ptr,
    out_ptr,
    sums_ptr,
    T,
    scale,
    N: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BRANCHES: tl.constexpr,
    RANK: tl.constexpr,
):
    """Weigh a tile of one sequence's tokens; store how many tokens it gives each branch, and the
    sum of their probabilities."""
    b = tl.program_id(0)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    valid = t < T
    token = b.to(tl.int64) * T + t
    probs, kept, gates = _gates(h_ptr, bias_ptr, token, valid, N, R, K, BRANCHES)

    column, real = _activations(valid, N, R, BRANCHES, RANK)
    row = token[:, None, None]
    u = tl.load(h_ptr + row * (N * R + N) + column, mask=real, other=0.0)
    weight = gates * scale
    out = u.to(tl.float32) * weight[:, :, None]
    tl.store(out_ptr + row * (N * R) + column, out, mask=real)

    branch = tl.arange(0, BRANCHES)
    exists = branch < N
    tile = b * tl.num_programs(1) + tl.program_id(1)
    count_ptr = sums_ptr + tile * (2 * N) + branch
    count = tl.sum(tl.where(valid[:, None], kept.to(tl.float32), 0.0), 0)
    tl.store(count_ptr, count, mask=exists)
    total = tl.sum(tl.where(valid[:, None], probs, 0.0), 0)
    tl.store(count_ptr + N, total, mask=exists)


@jit
def _weigh_backward_kernel(
    h_ptr,
    bias_ptr,
    dout_ptr,
    dprobs_ptr,
    dh_ptr,
    dbias_ptr,
    T,
    scale,
    N: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BRANCHES: tl.constexpr,
    RANK: tl.constexpr,
):
    """Store the gradient of a tile's activations and scores, and its part of the bias's."""
    b = tl.program_id(0)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    valid = t < T
    token = b.to(tl.int64) * T + t
    probs, _, gates = _gates(h_ptr, bias_ptr, token, valid, N, R, K, BRANCHES)

    # activations
    column, real = _activations(valid, N, R, BRANCHES, RANK)
    row = token[:, None, None]
    place = row * (N * R + N) + column
    u = tl.load(h_ptr + place, mask=real, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * (N * R) + column, mask=real, other=0.0).to(tl.float32)
    weight = gates * scale
    tl.store(dh_ptr + place, dout * weight[:, :, None], mask=real)

    # scores: what reaches them through the gates, and through the probabilities
    branch = tl.arange(0, BRANCHES)
    exists = branch < N
    dgates = tl.sum(dout * u, 2) * scale
    mean = tl.sum(gates * dgates, 1)
    dscore = gates * (dgates - mean[:, None])
    dprobs = tl.load(dprobs_ptr + b * N + branch, mask=exists, other=0.0)[None, :]
    mean = tl.sum(probs * dprobs, 1)
    dscore += probs * (dprobs - mean[:, None])
    real = valid[:, None] & exists[None, :]
    dscore = tl.where(real, dscore, 0.0)
    place = _score_places(token, N, R, BRANCHES)
    tl.store(dh_ptr + place, dscore, mask=real)
    tile = b * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias_ptr + tile * N + branch, tl.sum(dscore, 0), mask=exists)


def kernel_sizes(n: int, r: int, k: int) -> tuple[int, ...]:
    """Return N, R, K, the tokens of a program, so many that its largest tensor has 4,096 numbers
    and at most 64, and N and R to a power of two."""
    branches = triton.next_power_of_2(n)
    rank = triton.next_power_of_2(r)
    tokens = min(64, max(1, 4096 // (branches * max(branches, rank))))
    return n, r, k, tokens, branches, rank


class GateAndWeigh(torch.autograd.Function):
    """gate_and_weigh, with its gradient."""

    @staticmethod
    def forward(ctx, h: Tensor, bias: Tensor, r: int, k: int, scale: float):
        h = h.contiguous()
        B, T, _ = h.shape
        n = len(bias)
        ctx.sizes = kernel_sizes(n, r, k)
        ctx.scale = scale
        tokens = ctx.sizes[3]
        grid = (B, cdiv(T, tokens))
        out = h.new_empty(B, T, n * r)
        sums = h.new_empty(*grid, 2, n, dtype=torch.float32)
        _weigh_kernel[grid](h, bias, out, sums, T, scale, *ctx.sizes)
        ctx.save_for_backward(h, bias)
        routed, probs = sums.sum(1).unbind(1)
        ctx.mark_non_differentiable(routed)
        return out, routed, probs

    @staticmethod
    def backward(ctx, dout: Tensor, _, dprobs: Tensor):
        h, bias = ctx.saved_tensors
        B, T, _ = h.shape
        tokens = ctx.sizes[3]
        grid = (B, cdiv(T, tokens))
        dh = torch.empty_like(h)
        dbias = h.new_empty(*grid, len(bias), dtype=torch.float32)
        given = (h, bias, dout.contiguous(), dprobs.contiguous())
        _weigh_backward_kernel[grid](*given, dh, dbias, T, ctx.scale, *ctx.sizes)
        return dh, dbias.sum((0, 1)).to(bias.dtype), None, None, None


def gate_and_weigh(
    h: Tensor, bias: Tensor, r: int, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the up-projection reads (B, T, N*R) in h's dtype: activations times gates times
    scale; and per sequence and branch the tokens that were routed there, and the sum of its
    probabilities, (B, N) float32 each.

    h (B, T, N*R + N): activations, then scores before their bias (N,). Of equal scores the lower
    index wins."""
    return GateAndWeigh.apply(h, bias, r, k, scale)
