"""First tokens of a sequence that stay whole for good, where a codec or a map from keys wants some.

Letters: storage/layout.py; n slots for first tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.cache import NewTokens
from storage.layout import WindowView


def fill_sinks(sinks: WindowView, new: NewTokens) -> Tensor:
    """Store new tokens of sequences that have fewer than n first tokens, in place; return n_pad
    (B,) with those counted as padding to the rest.

    sinks: k, v (B, Hkv, n, D) and count (B,) of the slots that hold one"""
    T = new.k.size(2)
    n = sinks.k.size(2)
    had = sinks.count
    n_pad = torch.zeros_like(had) if new.n_pad is None else new.n_pad
    take = (T - n_pad).minimum(n - had)  # (B,)
    slot = torch.arange(n, device=had.device)
    later = slot - had[:, None]  # (B, n) behind those that are there
    goes = (later >= 0) & (later < take[:, None])
    goes = goes[:, None, :, None]
    column = (n_pad[:, None] + later).clamp(0, T - 1)
    column = column[:, None, :, None]
    for held, came in ((sinks.k, new.k), (sinks.v, new.v)):
        taken = came.take_along_dim(column, 2)
        held.copy_(torch.where(goes, taken, held))
    had.add_(take)
    return n_pad + take
