"""Gates of routed adapters on a CPU: choose, weigh and balance in one step of autograd.

Recorded operator by operator a gate is some thirty calls on small tensors, and their backward as
many. With probabilities p, kept ones m and gates g = p m / sum(p m), the gradient of a score is

    ds = g (dg - sum(g dg)) + p (dp - sum(p dp)),    dp that of the load balance

Letters: M = B T tokens, n branches of rank r, k of them kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.layout import top_k_mask


def is_gated_here(h: Tensor) -> bool:
    """Say whether gate_and_weigh is for such activations: on a CPU, in the type that is given."""
    wide = h.dtype in (torch.float32, torch.float64)
    return h.device.type == "cpu" and wide and not torch.is_autocast_enabled("cpu")


def through_softmax(p: Tensor, dp: Tensor) -> Tensor:
    """Return the gradient of scores whose softmax p (n, M) has the gradient dp."""
    return p * (dp - (p * dp).sum(0))


class GateAndWeigh(torch.autograd.Function):
    """gate_and_weigh, with its gradient."""

    @staticmethod
    def forward(ctx, h, bias, r: int, k: int):
        B, T, _ = h.shape
        n = len(bias)
        u, scores = h.flatten(0, 1).split([n * r, n], dim=-1)
        scores = scores + bias
        # branches outermost, so that softmax and sums run along tokens; n alone is too short a row
        kept = top_k_mask(scores, k).t().contiguous().to(h.dtype)
        p = scores.t().contiguous().softmax(0)
        gates = p * kept
        gates = gates / gates.sum(0)
        branches = torch.eye(n, dtype=h.dtype).repeat_interleave(r, 1)  # (n, n*r)
        wide = gates.t() @ branches
        # share of tokens routed x mean probability, times n, the mean over sequences
        share = kept.view(n, B, T).sum(-1) * (n / (k * T * T * B))
        balance = (share * p.view(n, B, T).sum(-1)).sum()
        ctx.save_for_backward(u, p, gates, wide, share, branches)
        return (u * wide).view(B, T, -1), balance

    @staticmethod
    def backward(ctx, dy, dbalance):
        u, p, gates, wide, share, branches = ctx.saved_tensors
        B = share.size(1)
        dy = dy.flatten(0, 1)
        of_gates = branches @ (dy * u).t()
        of_p = (dbalance * share).repeat_interleave(len(u) // B, 1)
        ds = through_softmax(gates, of_gates) + through_softmax(p, of_p)
        dh = torch.cat((dy * wide, ds.t()), 1)
        return dh.unflatten(0, (B, -1)), ds.sum(1), None, None


def gate_and_weigh(h: Tensor, bias: Tensor, r: int, k: int) -> tuple[Tensor, Tensor]:
    """Return branch activations times their gates (B, T, n*r), and the load-balance loss, (), where
    is_gated_here(h). lora.Gate.route and LoRALinear.weigh are the reference.

    h (B, T, n*r + n), activations and scores; bias (n,) of the scores"""
    return GateAndWeigh.apply(h, bias, r, k)
