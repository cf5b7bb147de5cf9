"""Attention whose newest tokens are read whole and whose earlier ones as routed, with its weights
formed in full: for any padding, cap and keys, on any device. storage/banded.py and
storage/windowed.py say the same faster where they can.

Letters: storage/layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model import attention_mask
from storage.layout import at_least_float32, soft_cap
from storage.packed import packed_count
from storage.windowed import Window

# queries at a time where attention weights are formed in full
QUERY_BLOCK = {"cpu": 64, "cuda": 512}


def plain_windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored: Tensor,
    routed: Tensor,
    window: Window,
    pad: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Return causal attention (B, H, T, D) to stored keys and routed values, but to k and v of the
    tokens that are in the window when they are read. cap: see soft_cap.

    In blocks of queries: a block needs no later key, and window tokens only among its nearest."""
    B, H, T, D = q.shape
    Hkv = k.size(1)
    visible = attention_mask(T, T, pad, q.device)
    number = torch.arange(1, T + 1, device=q.device)
    seen = number[None] - window.n_sinks  # those are whole in any case
    if pad is not None:
        seen = seen - pad[:, None]  # (B, T)
    in_window = window_mask(seen, window.size, window.block)
    lost = v - routed
    out = []
    step = QUERY_BLOCK[q.device.type]
    for a in range(0, T, step):
        b = min(a + step, T)
        near = max(0, a - window.reach)  # keys before it are routed for every query of the block
        whole = in_window[..., a:b, near:b].repeat(1, 1, H // Hkv, 1)
        logits = group_logits(q[:, :, a:b], stored[:, :, :b], cap)
        if stored is not k:
            exact = group_logits(q[:, :, a:b], k[:, :, near:b], cap)
            exact = torch.where(whole, exact, logits[..., near:])
            logits = torch.cat((logits[..., :near], exact), -1)
        p = group_weights(logits, visible[..., a:b, :b]).to(v.dtype)
        of_routed = p @ routed[:, :, :b]
        y = of_routed + (p[..., near:] * whole) @ lost[:, :, near:b]
        out.append(y.view(B, H, b - a, D))
    return torch.cat(out, 2)


def attention_received(q: Tensor, k: Tensor, cap: float = 0.0) -> Tensor:
    """Return how much attention every token of windows without padding gets, (B, Hkv, T), float32
    at least: summed over its own and later queries and over the query heads of a KV head.

    q (B, H, T, D), k (B, Hkv, T, D); cap: see soft_cap"""
    T = q.size(2)
    dtype = torch.promote_types(q.dtype, torch.float32)
    received = torch.zeros(k.shape[:3], dtype=dtype, device=k.device)
    step = QUERY_BLOCK[q.device.type]
    for a in range(0, T, step):
        b = min(a + step, T)
        logits = group_logits(q[:, :, a:b], k[:, :, :b], cap)
        p = group_weights(logits, attention_mask(b - a, b, None, q.device))
        received[..., :b] += p.sum(-2)
    return received


def group_logits(q: Tensor, k: Tensor, cap: float) -> Tensor:
    """Return attention logits (B, Hkv, n*T, L), the query heads of a KV head in turn.

    q (B, H, T, D), k (B, Hkv, L, D); cap: see soft_cap."""
    B, H, T, D = q.shape
    Hkv = k.size(1)
    q = (q * D**-0.5).reshape(B, Hkv, H // Hkv * T, D)
    return soft_cap(at_least_float32(q @ k.mT), cap)


def group_weights(logits: Tensor, visible: Tensor) -> Tensor:
    """Return attention weights of logits (B, Hkv, n*T, L), visible (B or 1, 1, T, L) bool."""
    n = logits.size(2) // visible.size(2)
    # added rather than filled: the backward of a sum is free
    bias = torch.zeros_like(visible, dtype=logits.dtype)
    bias = bias.masked_fill(~visible, float("-inf"))
    logits = logits + bias.repeat(1, 1, n, 1)
    return logits.softmax(-1)


def window_mask(seen: Tensor, window: int, block: int) -> Tensor:
    """Mark where query i of T new tokens reads new token j whole, because it is in the window then:
    (B, 1, T, T) bool. seen (B, T): tokens up to each new one; window, block: see packed_count."""
    packed = packed_count(seen, window, block)
    return (seen[:, None, :] > packed[:, :, None])[:, None]


def pieces_until_packed(T: int, window: Window) -> Iterator[slice]:
    """Cut T tokens into pieces, each as long as it may be: one token more, and a block would leave
    the window before the piece's first token has read it."""
    start = 0
    while start < T:
        seen = torch.tensor(start + 1 - window.n_sinks)
        packed = int(packed_count(seen, window.size, window.block))
        stop = min(T, window.n_sinks + packed + window.reach)
        yield slice(start, stop)
        start = stop
