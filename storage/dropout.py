"""Dropout on a CPU, where drawing a float for every number takes longer than a small product with
it: four numbers are decided by one draw of 64 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = 16  # of a draw for each number: shares are multiples of 2^-16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return x with a share p of its numbers, in [0, 1), drawn and set to 0 and the others divided
    by 1 - p; x itself where not training. On a CPU p is rounded to BITS bits."""
    cut = round(p * 2**BITS)
    if x.is_cuda or not training or not 0 < cut < 2**BITS:
        return F.dropout(x, p, training)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None)
    each = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = each >= cut - 2 ** (BITS - 1)
    return x * kept.to(x.dtype).div_(1 - cut / 2**BITS)
