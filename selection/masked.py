"""The masked execution of a selection: full-size tensors, differentiable, what the packed one is
compared with. Letters: storage/layout.py; C context columns."""

from __future__ import annotations

import torch
from torch import Tensor

from model import attend, attend_masked, attention_mask


def attend_to_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    keep: Tensor,
    first: int = 0,
    pad: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Let queries from column `first` on read what is kept of a context, and all before them whole
    values: (B, H, T, D) in q's dtype.

    q (B, H, T, D); k, v (B, Hkv, T, D); pad (B,) int64 leading columns of padding
    routed  (B, Hkv, C, D), the context's values as they are read
    keep    (B, Hm, C) bool, its tokens that are there; a query's own token always is"""
    B, H, T, _ = q.shape
    Hkv = k.size(1)
    C = routed.size(2)
    read = torch.cat((routed, v[:, :, C:]), 2)
    after = keep.new_ones(B, keep.size(1), T - C)
    there = torch.cat((keep, after), -1).expand(-1, Hkv, -1)
    there = there.repeat_interleave(H // Hkv, 1).unsqueeze(-2)  # (B, H, 1, T)
    own = torch.eye(T, dtype=torch.bool, device=q.device)[first:]
    visible = attention_mask(T, T, pad, q.device)[:, :, first:] & there | own
    y = attend_masked(q[:, :, first:], k, read, visible, cap)
    if not first:
        return y
    exact = attend(q[:, :, :first], k[:, :, :first], v[:, :, :first], pad, cap)
    return torch.cat((exact, y), 2)
