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
    real = valid[:, None] & (branch < N)[None, :]
    at = token[:, None] * (N * R + N) + N * R + branch[None, :]
    score = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
    score += tl.load(bias_ptr + branch, mask=branch < N, other=0.0).to(tl.float32)[None, :]
    score = tl.where((branch < N)[None, :], score, float("-inf"))
    other = score[:, None, :]  # (TOKENS, branches, branches)
    mine = score[:, :, None]
    lower = branch[None, None, :] < branch[None, :, None]
    better = (other > mine) | ((other == mine) & lower)
    kept = (tl.sum(better.to(tl.int32), 2) < K) & (branch < N)[None, :]
    e = tl.exp(score - tl.max(score, 1)[:, None])
    chosen = tl.where(kept, e, 0.0)
    return e / tl.sum(e, 1)[:, None], kept, chosen / tl.sum(chosen, 1)[:, None]


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
    branch = tl.arange(0, BRANCHES)
    r = tl.arange(0, RANK)
    column = branch[:, None] * R + r[None, :]
    real = valid[:, None, None] & ((branch < N)[:, None] & (r < R)[None, :])[None]
    u = tl.load(h_ptr + token[:, None, None] * (N * R + N) + column[None], mask=real, other=0.0)
    out = u.to(tl.float32) * (gates * scale)[:, :, None]
    tl.store(out_ptr + token[:, None, None] * (N * R) + column[None], out, mask=real)
    tile = b * tl.num_programs(1) + tl.program_id(1)
    at = sums_ptr + tile * (2 * N) + branch
    count = tl.sum(tl.where(valid[:, None], kept.to(tl.float32), 0.0), 0)
    tl.store(at, count, mask=branch < N)
    tl.store(at + N, tl.sum(tl.where(valid[:, None], probs, 0.0), 0), mask=branch < N)


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
    branch = tl.arange(0, BRANCHES)
    r = tl.arange(0, RANK)
    column = branch[:, None] * R + r[None, :]
    real = valid[:, None, None] & ((branch < N)[:, None] & (r < R)[None, :])[None]
    at = token[:, None, None] * (N * R + N) + column[None]
    u = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
    dout = tl.load(
        dout_ptr + token[:, None, None] * (N * R) + column[None], mask=real, other=0.0
    ).to(tl.float32)
    tl.store(dh_ptr + at, dout * (gates * scale)[:, :, None], mask=real)
    dgates = tl.sum(dout * u, 2) * scale
    dscore = gates * (dgates - tl.sum(gates * dgates, 1)[:, None])
    dprobs = tl.load(dprobs_ptr + b * N + branch, mask=branch < N, other=0.0)[None, :]
    dscore += probs * (dprobs - tl.sum(probs * dprobs, 1)[:, None])
    real = valid[:, None] & (branch < N)[None, :]
    dscore = tl.where(real, dscore, 0.0)
    at = token[:, None] * (N * R + N) + N * R + branch[None, :]
    tl.store(dh_ptr + at, dscore, mask=real)
    tile = b * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias_ptr + tile * N + branch, tl.sum(dscore, 0), mask=branch < N)


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
        grid = (B, cdiv(T, ctx.sizes[3]))
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
        grid = (B, cdiv(T, ctx.sizes[3]))
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
