"""What dropped tokens of a head cost, measured on calibration text, and what a budget of bytes makes
of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import selector
from config import KVConfig, SelectConfig
from selection import calibration
from selection.calibration import calibrate, drop_ratios, drop_weight, output_errors
from tests.helpers import tiny_model, tokens


def test_output_errors_equal_loops():
    """Per KV head the mean over queries of the squared norm of what its output misses, against loops
    over queries and keys, with grouped heads, a causal mask and none or many dropped tokens."""
    g = torch.Generator().manual_seed(0)
    draw = dict(dtype=torch.float64, generator=g)
    B, H, Hkv, R, T, D = 2, 6, 3, 3, 11, 5
    q = torch.randn(B, H, R, D, **draw)
    k, z = torch.randn(2, B, Hkv, T, D, **draw)
    root = torch.randn(Hkv, D, D, **draw)
    metric = root @ root.mT
    keep = torch.rand(B, Hkv, T, generator=g) < 0.5
    keep[:, 0] = True
    keep[..., T - R :] = True
    want = torch.zeros(Hkv, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            head = h // (H // Hkv)
            for r in range(R):
                outputs = []
                for there in (keep[b, head], torch.ones(T, dtype=torch.bool)):
                    seen = [t for t in range(T - R + r + 1) if there[t]]
                    weight = [float(q[b, h, r] @ k[b, head, t]) / D**0.5 for t in seen]
                    p = torch.tensor(weight, dtype=torch.float64).softmax(0)
                    outputs.append(sum(p[i] * z[b, head, t] for i, t in enumerate(seen)))
                off = outputs[0] - outputs[1]
                want[head] += off @ metric[head] @ off
    got = output_errors(q, k, z, keep, metric)
    torch.testing.assert_close(got, want / (B * H // Hkv * R))
    assert got[0] == 0 and (got[1:] > 0).all()


def attached(observers: int = 16, **kv):
    """A model that selects under a budget of bytes, calibrated, and its calibration text."""
    model = tiny_model()
    text = tokens(3, 60, seed=1)
    kv = KVConfig(kv="select", n_groups=4, kv_tail=2, kv_sinks=2, key_block=16, **kv)
    cfg = SelectConfig(kv_bytes=0.5, observers=observers)
    return selector.attach(model, kv, cfg, [text]), text


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_head_whose_drops_cost_more_gets_more_weight(scope):
    """The weight is the fourth root of the ratios' geometric mean over windows, its own geometric
    mean is 1, and where windows are too short to tell it is 1 for all."""
    model, text = attached(mask_scope=scope)
    s = model.selector
    metrics = torch.stack([torch.eye(16, dtype=torch.float64).expand(3, -1, -1)] * s.L)
    s.drop_weight.fill_(1)
    ratios = torch.stack([drop_ratios(s, model, row[None], metrics) for row in text]).mean(0)
    got = drop_weight(s, model, [text], metrics)
    torch.testing.assert_close(got.double(), (ratios - ratios.mean()).div(4).exp().double())
    assert got.log().mean().abs() < 1e-6 and got.std() > 0
    assert (drop_weight(s, model, [text[:, :3]], metrics) == 1).all()


def test_no_observers_are_those_that_stay_whole():
    """observers=0 is the tokens of the query region here, too, as where a prompt is chosen from."""
    weights = []
    for observers in (0, 2, 1):
        model, _ = attached(observers=observers)
        weights.append(model.selector.drop_weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_only_a_budget_of_bytes_asks_for_it():
    """Scores of pairs are multiplied by the weight under --kv_bytes, and are as they were else."""
    model, text = attached()
    s = model.selector
    prompt, alpha = selector.look(s, model, text, 50, 52)
    weighed = s.pair_scores(prompt, alpha)
    weight = s.drop_weight.clone()
    assert weight.std() > 0
    s.drop_weight.fill_(1)
    plain = s.pair_scores(prompt, alpha)
    torch.testing.assert_close(weighed, plain * weight[:, None, :, None, None].to(plain))
    s.drop_weight.copy_(weight)
    s.cfg = replace(s.cfg, kv_bytes=0.0, kv_keep=0.5)
    assert torch.equal(s.pair_scores(prompt, alpha), plain)


def test_it_is_measured_where_a_budget_of_bytes_may_follow(monkeypatch):
    """A calibration under a budget of groups measures it, for --kv_bytes may be asked of the same
    run later; a mask that layers share, which --kv_bytes refuses, costs no pass over windows."""
    measured = []

    def seen(selector, model, batches, metrics):
        measured.append(selector.kv.mask_scope)
        return drop_weight(selector, model, batches, metrics)

    monkeypatch.setattr(calibration, "drop_weight", seen)
    text = tokens(3, 60, seed=1)
    for scope in ("head", "layer", "shared"):
        kv = KVConfig(kv="select", n_groups=4, kv_tail=2, kv_sinks=2, mask_scope=scope)
        model = selector.attach(tiny_model(), kv, SelectConfig(kv_keep=0.5), [text])
        assert (model.selector.drop_weight == 1).all() == (scope == "shared")
    assert measured == ["head", "layer"]
    with pytest.raises(ValueError, match="mask_scope=shared"):
        model.selector.set(SelectConfig(kv_bytes=0.5))


def test_a_run_without_it_loads_with_ones():
    """State that was saved before it was measured loads, every head alike; what else is missing is
    still refused. Calibrating again measures it."""
    model, text = attached()
    old = {name: t for name, t in selector.state(model).items() if "drop_weight" not in name}
    selector.load_state(model, old)
    assert (model.selector.drop_weight == 1).all()
    calibrate(model.selector, model, [text])
    assert (model.selector.drop_weight != 1).any()
    with pytest.raises(ValueError, match="gain"):
        selector.load_state(model, {k: t for k, t in old.items() if k != "selector.gain"})
