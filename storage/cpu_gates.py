"""gates.py's gates on a CPU: choose, weigh and count in one step of autograd.

Recorded operator by operator a gate is some thirty calls on small tensors, and their backward as
many. With probabilities p, kept ones m and gates g = p m / sum(p m), the gradient of a score is

    ds = g (dg - sum(g dg)) + p (dp - sum(p dp)),    dp that of the sums of probabilities

Letters as in lora.py, M = B T tokens, N branches of rank R, K of them kept.
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
    """Return the gradient of scores whose softmax p (N, M) has the gradient dp."""
    return p * (dp - (p * dp).sum(0))


class GateAndWeigh(torch.autograd.Function):
    """gate_and_weigh, with its gradient."""

    @staticmethod
    def forward(ctx, h, bias, r: int, k: int, scale: float):
        B, T, _ = h.shape
        n = len(bias)
        u, scores = h.flatten(0, 1).split([n * r, n], dim=-1)
        scores = scores + bias
        # branches outermost, so that softmax and sums run along tokens; n alone is too short a row
        kept = top_k_mask(scores, k).t().contiguous().to(h.dtype)
        p = scores.t().contiguous().softmax(0)
        gates = p * kept
        gates = gates / gates.sum(0)
        branches = torch.eye(n, dtype=h.dtype).repeat_interleave(r, 1) * scale  # (N, N*R)
        wide = gates.t() @ branches
        routed = kept.view(n, B, T).sum(-1).t()
        probs = p.view(n, B, T).sum(-1).t()
        ctx.save_for_backward(u, p, gates, wide, branches)
        ctx.mark_non_differentiable(routed)
        return (u * wide).view(B, T, -1), routed, probs

    @staticmethod
    def backward(ctx, dy, _, dprobs):
        u, p, gates, wide, branches = ctx.saved_tensors
        B, T, _ = dy.shape
        dy = dy.flatten(0, 1)
        of_gates = branches @ (dy * u).t()
        of_p = dprobs.t().repeat_interleave(T, 1)
        ds = through_softmax(gates, of_gates) + through_softmax(p, of_p)
        dh = torch.cat((dy * wide, ds.t()), 1)
        return dh.unflatten(0, (B, -1)), ds.sum(1), None, None, None


def gate_and_weigh(
    h: Tensor, bias: Tensor, r: int, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what gates.gate_and_weigh returns, of the same arguments, where is_gated_here(h).
    lora.Gate.route and LoRALinear.weigh are the reference."""
    return GateAndWeigh.apply(h, bias, r, k, scale)
