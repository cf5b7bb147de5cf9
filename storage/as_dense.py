"""A packed cache as dense tensors: for what reads it with a mask of its own, and for tests.

Letters: storage/layout.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.layout import bits_to_mask
from storage.packed import PackedCache


def as_dense(cache: PackedCache) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed part and window as dense tensors, left-aligned; sinks are left out.

    k     (B, Hkv, N, D), N the tokens of the longest sequence
    z     (B, Hkv, N, D): coordinates with zeros where dropped; of the window whole values
    mask  (B, Hm, N, S) bool: of the window the mask a token will be packed with
    Slots past a sequence's own count hold zeros."""
    lengths = cache.n_packed + cache.n_window
    N = int(lengths.max()) if cache.batch else 0
    view = cache.view()
    packed = view.packed[0].unpack()[:3]
    k, z, mask = (F.pad(t, (0, 0, 0, N - t.size(2))) for t in packed)
    W = cache.window_k.size(2)
    number = torch.arange(W, device=k.device)
    held = number < cache.n_window.unsqueeze(1)
    b, i = held.nonzero(as_tuple=True)
    to = cache.n_packed[b] + i
    slots = view.window.slots(W)
    slot = slots[b, i]
    k[b, :, to] = cache.window_k[b, :, slot]
    z[b, :, to] = cache.window_v[b, :, slot]
    bits = cache.window_bits[b, :, slot]
    mask[b, :, to] = bits_to_mask(bits, cache.S)
    return k, z, mask
