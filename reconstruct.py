"""What stands for a value group that was dropped (arXiv 2604.21335, 3.1.2, equation 7): zeros, or
the paper's MLP. Maps linear in the kept groups were tried and went: they never paid (docs/log.md).

Letters: B batch, T tokens, L tokens read, Hkv KV heads, n query heads of one, D head dimension, S
groups, K kept."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Zero(nn.Module):
    """Dropped groups are zero. Also the interface: `rebuild` gives whole values, `read` the
    attention output over packed ones."""

    def rebuild(self, kept: Tensor, mask: Tensor) -> Tensor:
        """What stands for dropped groups. kept (B, Hkv, T, D) with zeros where dropped, mask (B, 1
        or Hkv, T, S) bool -> (B, Hkv, T, D)."""
        return torch.zeros_like(kept)

    def forward(self, kept: Tensor, mask: Tensor) -> Tensor:
        return self.rebuild(kept, mask)

    def read(self, p: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        """Attention output of weights p (B, Hkv, n*T, L) over packed values kept (B, Hkv, L, D):
        (B, Hkv, n*T, D)."""
        return p @ kept


class MLP(Zero):
    """The paper's: two-layer GELU MLP from a layer's kept groups (zeros elsewhere) and mask bits to
    its whole value, per cached token."""

    def __init__(self, n_kv_head: int, head_dim: int, n_groups: int, mask_heads: int, hidden: int):
        super().__init__()
        width = n_kv_head * head_dim
        self.up = nn.Linear(width + mask_heads * n_groups, hidden or width)
        self.down = nn.Linear(hidden or width, width)
        nn.init.zeros_(self.down.weight)  # starts as zero fill
        nn.init.zeros_(self.down.bias)

    def rebuild(self, kept: Tensor, mask: Tensor) -> Tensor:
        B, Hkv, T, D = kept.shape
        flat = torch.cat(
            (kept.transpose(1, 2).flatten(2), mask.transpose(1, 2).flatten(2).to(kept.dtype)), -1
        )
        return self.down(F.gelu(self.up(flat))).view(B, T, Hkv, D).transpose(1, 2)

    def read(self, p: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        return p @ fill(kept, self.rebuild(kept, mask), mask)


def spread(mask: Tensor, head_dim: int) -> Tensor:
    """Mask per group (..., S) -> per dimension (..., D)."""
    return mask.repeat_interleave(head_dim // mask.size(-1), dim=-1)


def fill(kept: Tensor, rebuilt: Tensor, mask: Tensor) -> Tensor:
    """Kept groups as they are, rebuilt ones elsewhere."""
    return torch.where(spread(mask, kept.size(-1)), kept, rebuilt)
