"""GQA, CLA and H2O beside mixSGA: what they keep, against loops."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers import tokens
from shared_head_models import SETTINGS, made

import mixsga
from baselines import shared_heads


@pytest.mark.parametrize(
    "share, n_layer, want",
    [
        ("0.5", 4, [2] * 4),
        ("0.25", 3, [4] * 3),
        ("0.35", 10, [2] * 4 + [4] * 6),
        ("0.75", 4, [1, 1, 2, 2]),
        ("1", 2, [1, 1]),
        ("0.13", 5, [8] * 5),
    ],
)
def test_gqa_keeps_at_most_its_share(share, n_layer, want):
    """Two neighbouring group sizes, at most the share and as near as whole layers allow."""
    assert shared_heads.gqa_sizes(Fraction(share), n_layer, 8) == want
    assert sum(Fraction(1, g) for g in want) / n_layer <= Fraction(share)


@pytest.mark.parametrize(
    "share, n_layer, want",
    [
        ("0.5", 4, [0, 0, 2, 2]),
        ("0.5", 5, [0, 0, 2, 2, 4]),
        ("1", 3, [0, 1, 2]),
        ("0.25", 10, [0, 0, 0, 0, 4, 4, 4, 7, 7, 7]),
    ],
)
def test_cla_keeps_whole_layers(share, n_layer, want):
    """ceil(share n_layer) layers have keys and values of their own, spread evenly; each reads the
    nearest below it."""
    got = shared_heads.cla_sources(Fraction(share), n_layer)
    assert got == want and len(set(got)) == math.ceil(Fraction(share) * n_layer)


def h2o_by_hand(q, k, v, keep: float, whole, w: int):
    """One sequence, one layer, token by token with Python lists."""
    H, T, D = q.shape
    n = math.ceil(keep * T)
    held = []
    total = {}
    out = torch.zeros_like(q)
    for t in range(T):
        held.append(t)
        total[t] = 0.0
        for h in range(H):
            g = h // (H // k.size(0))
            ks, vs = (
                torch.stack([(new if t - j < w else old)[g, j] for j in held])
                for new, old in zip(whole, (k, v), strict=True)
            )
            p = (ks @ q[h, t] / D**0.5).softmax(0)
            out[h, t] = p @ vs
            for j, a in zip(held, p.tolist(), strict=True):
                total[j] += a
        old = [j for j in held if j <= t - n // 2]
        if len(held) > n and old:
            held.remove(min(old, key=lambda j: total[j]))
    return out


@pytest.mark.parametrize("w", [0, 3])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 1.0])
def test_h2o_equals_a_loop(keep, w):
    """Heavy hitters and the newest half, one eviction a token; 1 is attention, the newest w read
    whole."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 23, 8, generator=g).double()
    (k, v, *whole) = torch.randn(4, 2, 3, 23, 8, generator=g).double()
    got = shared_heads.h2o_attention(q, k, v, whole, w, keep=keep)
    for b in range(2):
        assert (
            got[b] - h2o_by_hand(q[b], k[b], v[b], keep, [t[b] for t in whole], w)
        ).abs().max() < 1e-12
    if keep == 1:
        assert (got - mixsga.attend_window(q, k, v, whole, w)).abs().max() < 1e-12


def test_h2o_reaches_every_path():
    """Under routing(h2o=...) all paths read what is held; at 1 they read as before; after the
    `with` too."""
    for name in ("3:1:6", "gqa", "cla", "tail", "cla tail"):
        model = made(**SETTINGS[name])
        x = tokens(1, 20)
        want = model(x)
        with shared_heads.routing(model, h2o=0.3):
            assert (model(x) - want).abs().max() > 1e-3
        assert torch.equal(model(x), want)
