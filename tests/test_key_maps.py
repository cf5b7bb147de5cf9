"""Maps from keys to values (--reconstructor=keys, own_keys): what calibration fits, against loops in
float64. What is done with them: test_from_keys.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import BY_NORM, TINY, tiny_model, tokens

import kv_router
from config import KVConfig
from reconstruct import Moments, as_held
from routing import in_window
from routing.calibration import record_layers

KEYS = dict(reconstructor="keys", value_basis="output")


@pytest.mark.parametrize("how", [{}, {"reconstructor": "own_keys"}])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_map_is_the_ridge_regression_and_its_residual(how, cap, monkeypatch):
    """What calibration fits solves the normal equations over all tokens but the first ones, each
    weighted by the attention that it gets of the heads that the map tells, and the second moment it
    says is left is that of the residuals. Maps of own heads: over their own keys."""
    path = kv_router.ValueGroupPath(TINY, KVConfig(**KEYS | how, kv_sinks=2)).double()
    monkeypatch.setattr(in_window, "QUERY_BLOCK", {"cpu": 7})
    moments = Moments(path)
    keys, values, weights = [], [], []
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        k, v = torch.randn(2, 2, 3, 31, 16, generator=g, dtype=torch.float64)
        q = torch.randn(2, 6, 31, 16, generator=g, dtype=torch.float64)
        x = torch.randn(2, 31, 40, generator=g, dtype=torch.float64)
        moments.add(x, k, v, in_window.attention_received(q, k, cap))
        raw = path.own_maps().from_keys.heads_before_rope(k, torch.arange(31)[None])
        keys.append(raw[:, 2:].flatten(0, 1))
        values.append(v[:, :, 2:].transpose(0, 1).flatten(1, 2))
        received = torch.zeros(3, 2, 31, dtype=torch.float64)
        for b, head, t in itertools.product(range(2), range(6), range(31)):
            logits = q[b, head, t] @ k[b, head // 2, : t + 1].T / 4
            if cap:
                logits = cap * (logits / cap).tanh()
            received[head // 2, b, : t + 1] += logits.softmax(-1)
        weights.append(received[:, :, 2:].flatten(1))
    x = torch.cat(keys)
    v = torch.cat(values, 1)
    w = torch.cat(weights, 1)
    own_keys = bool(how)
    weight, left = moments.from_keys()
    for h in range(3):
        own = slice(h * 16, (h + 1) * 16)
        read = own if own_keys else slice(0, 48)
        by = w[h] if own_keys else w.mean(0)
        column = weight[:, own]
        seen = x[:, read]
        ridge = 1e-4 * (by @ seen.square()).mean()
        rest = v[h] - x @ column
        assert (seen.T @ (by[:, None] * rest) - ridge * column[read]).abs().max() < 1e-9
        assert (left[h] - rest.T @ (by[:, None] * rest)).abs().max() < 1e-9
        if own_keys:
            assert column.abs().sum() == column[own].abs().sum()


@pytest.mark.parametrize("kind", ["keys", "own_keys"])
def test_calibration_weights_tokens_by_the_attention_they_get(kind):
    """A path's map is that of the moments with the attention of its layer's own queries, capped as
    the model caps it, and not that of tokens that count alike."""
    cfg = KVConfig(**BY_NORM | dict(n_groups=8, topk_groups=4, kv_tail=0, reconstructor=kind))
    x = tokens(2, 40)
    model = tiny_model(cfg=replace(TINY, attention_cap=3.0))
    layers = [layer.self_attn for layer in model.layers]
    got = {}
    with record_layers(layers, lambda i, *seen: got.setdefault(i, seen)):
        model(x)
    kv_router.attach(model, cfg, batches=[x])
    far = {True: [], False: []}
    for i, attn in enumerate(layers):
        path = attn.kv_path
        seen, q, k, v = got[i]
        received = in_window.attention_received(q, k, 3.0)
        for weighted in (True, False):
            moments = Moments(kv_router.ValueGroupPath(model.cfg, cfg))
            moments.add(seen, k, v, received if weighted else torch.ones_like(received))
            fitted = moments.from_keys()[0] @ torch.block_diag(*path.enc.double())
            off = as_held(path, fitted) - path.key_map.double()
            far[weighted].append(off.abs().max().item())
    assert max(far[True]) < 1e-4
    assert min(far[False]) > 1e-2


def test_attach_fits_maps_that_tell_values():
    """Values that are linear in the keys before RoPE are told by them but for the ridge, in the
    basis that is chosen, folded or not: with one group of 16 kept the logits are nearly dense."""
    model = tiny_model()
    for layer in model.layers:
        attn = layer.self_attn
        attn.v_proj.weight.data = attn.k_proj.weight.flip(0).contiguous()
        attn.v_proj.bias.data = attn.k_proj.bias.flip(0).contiguous()
    x = tokens(2, 40)
    want = model(x)
    kv = dict(BY_NORM, n_groups=16, topk_groups=1, kv_tail=0)
    lost = {}
    for kind in ("zero", "keys"):
        fitted = tiny_model()
        fitted.load_state_dict(model.state_dict())
        cfg = KVConfig(**kv, reconstructor=kind, value_basis="pca")
        kv_router.attach(fitted, cfg, [tokens(4, 150, seed=3)])
        lost[kind] = float((fitted(x) - want).abs().max().detach())
        assert (kv_router.fold(fitted)(x) - want).abs().max() < lost[kind] + 1e-9
    assert lost["keys"] < 0.02 * lost["zero"]
