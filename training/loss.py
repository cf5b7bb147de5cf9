"""The loss of language modelling: cross-entropy of the next token, with little memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.layout import at_least_float32

LOSS_CHUNK = 512  # tokens whose logits are float32 at a time


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropies (n,) of logits (n, vocab) and targets (n,), 0 where left out (-100).

    Logits of a large vocabulary are most of a step's memory, and autograd keeps them twice more in
    float32. Here a chunk of tokens at a time is: the backward pass computes it anew."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        chunks = zip(logits.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        return torch.cat(
            [F.cross_entropy(at_least_float32(x), y, reduction="none") for x, y in chunks]
        )

    @staticmethod
    def backward(ctx, dlosses: Tensor):
        logits, targets = ctx.saved_tensors
        counted = targets != -100
        hit = targets.clamp_min(0).unsqueeze(-1)
        weight = (dlosses * counted).unsqueeze(-1)
        dlogits = torch.empty_like(logits)
        for a in range(0, len(logits), LOSS_CHUNK):
            rows = slice(a, a + LOSS_CHUNK)
            p = at_least_float32(logits[rows]).softmax(-1).mul_(weight[rows])
            p.scatter_add_(1, hit[rows], -weight[rows])
            dlogits[rows] = p
        return dlogits, None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (B, T) in nats of logits (B, T, vocab) and targets (B, T) int64; 0 where
    those are -100."""
    losses = ChunkedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return losses.view_as(targets)


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over targets (B, T) int64; -100 marks targets left out
    (all left out gives NaN)."""
    return token_losses(logits, targets).sum() / (targets != -100).sum()
