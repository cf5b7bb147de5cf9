"""Prompts of random keys and values, attention over them in loops, and what scores them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import TINY, randomise

from config import SelectConfig
from model import rope_table
from selection import relevance
from selection.predictors import HiddenPredictor, QueryPredictor
from selection.relevance import Prompt
from selector import WITHOUT_TRAINING
from storage.kernel_base import triton

L = 2
H = TINY.n_head
HKV = TINY.n_kv_head
D = TINY.head_dim
E = TINY.n_embd
S = 4
PAD = (0, 21, 85)  # the last row is shorter than the query region
CLOSE = dict(rtol=2e-5, atol=2e-6)  # scores are float32
KERNEL = pytest.param(
    "triton", marks=pytest.mark.skipif(triton is None, reason="the kernels need triton")
)
CFG = SelectConfig(past=7, ahead=5, token_keep=0.3, pool=5)
TRAINED = (
    "predictor-mse",
    "predictor-kl",
    "expected_attention-mse",
    "expected_attention-kl",
    "predictor_query",
)


def turned(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """x (B, h, T, D) rotated pair by pair at position (B, T), in float64."""
    freq = TINY.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = position.double()[:, None, :, None] * freq  # (B, 1, T, D/2)
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def prompt_of(
    pad=(0, 0, 0), C: int = 80, W: int = 11, seed: int = 0, **kw
) -> tuple[Prompt, torch.Tensor]:
    """A random prompt and its queries before RoPE (L, B, H, T, D). Keys are large, so that
    attention is far from even."""
    g = torch.Generator().manual_seed(seed)
    B = len(pad)
    T = C + W
    x = torch.randn(L, B, T, E, generator=g, dtype=torch.float64)
    q, k = (torch.randn(L, B, h, T, D, generator=g, dtype=torch.float64) * 1.5 for h in (H, HKV))
    z = torch.randn(L, B, HKV, C, D, generator=g, dtype=torch.float64)
    alpha = torch.rand(L, B, HKV, C, generator=g)
    position = (torch.arange(T) - torch.tensor(pad)[:, None]).clamp_min(0)
    pads = torch.tensor(pad) if any(pad) else None
    rotated = [[turned(t, position) for t in s] for s in (q, k)]
    return Prompt(list(x), *rotated, list(z), C, pads, rope_table(TINY), alpha, **kw), q


def attention(
    p: Prompt, readers: list[int], q=None, causal: bool = True, total: bool = False
) -> torch.Tensor:
    """Attention that the columns `readers` give each context token: a mean over those that are no
    padding and over the query heads of a KV head (a sum over readers with `total`), softmax by
    softmax. q (L, B, H, len(readers), D): other queries in their place."""
    B = len(p.k[0])
    n = H // HKV
    out = torch.zeros(L, B, HKV, p.n_context, dtype=torch.float64)
    for i in range(L):
        for b in range(B):
            first = 0 if p.pad is None else int(p.pad[b])
            real = [r for r in readers if r >= first]
            for r in real if first < p.n_context else ():
                last = r + 1 if causal else p.T
                for h in range(H):
                    query = p.q[i][b, h, r] if q is None else q[i, b, h, readers.index(r)]
                    logits = torch.stack(
                        [query.double() @ p.k[i][b, h // n, j].double() for j in range(first, last)]
                    ) / math.sqrt(D)
                    share = (logits - logits.max()).exp()
                    share = (share / share.sum())[: max(0, p.n_context - first)]
                    out[i, b, h // n, first : first + len(share)] += (
                        share / n / (1 if total else len(real))
                    )
    return out


def largest(p: Prompt, readers: list[int]) -> torch.Tensor:
    """The largest attention that one of the columns `readers` and one query head gives each context
    token."""
    n = H // HKV
    of_each = []
    for r in readers:
        for head in range(n):  # one of a KV head's: its query in the place of all of them
            q = torch.stack([t[:, head::n, r : r + 1].repeat_interleave(n, 1) for t in p.q])
            of_each.append(attention(p, [r], q))
    return torch.stack(of_each).amax(0)


def widest(a: torch.Tensor, p: Prompt, width: int) -> torch.Tensor:
    """Maximum over the real neighbours within width // 2, loops; zero for padding."""
    out = torch.zeros_like(a)
    for b in range(a.size(1)):
        first = 0 if p.pad is None else int(p.pad[b])
        for t in range(first, p.n_context):
            out[:, b, :, t] = a[:, b, :, max(first, t - width // 2) : t + width // 2 + 1].amax(-1)
    return out


def on_real(a: torch.Tensor, p: Prompt) -> torch.Tensor:
    """Scores (L or 1, B, Hkv or 1, C) at (L, B, Hkv, C), zero at padding, float64."""
    return (a.double() * p.valid[None, :, None]).expand(L, -1, HKV, -1)


def past_columns(C: int, past: int) -> list[int]:
    """The columns of the past queries of a context without padding: evenly spread over its last
    1,024 tokens, from the last."""
    n = min(past, C)
    return [C - 1 - i * (min(relevance.SPAN, C) // n) for i in range(n)]


def drawn_predictor(
    name: str, mask_heads: int = HKV, layers: int = L, seed: int = 5
) -> torch.nn.Module:
    """A predictor in float64 with every parameter and buffer random."""
    torch.manual_seed(seed)
    n_out = mask_heads * (S if name == "predictor" else 1)
    p = (
        QueryPredictor(L, E, HKV, D)
        if name == "predictor_query"
        else HiddenPredictor(layers, E, mask_heads, n_out)
    )
    randomise(p, 0.2)
    p.mean.normal_(2, 1)
    p.std.uniform_(0.5, 2)
    return p.double()


def score(name: str, p: Prompt, cfg: SelectConfig = CFG) -> torch.Tensor:
    """Scores of a signal by its name in DEPTH_FREE: (L or 1, B, Hkv or 1, C) or (L, B, Hkv, C, S or
    1)."""
    if name in WITHOUT_TRAINING:
        return WITHOUT_TRAINING[name](p, cfg)
    name, _, kind = name.partition("-")
    return drawn_predictor(name)(p, kind or cfg).detach()
