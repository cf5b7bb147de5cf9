"""What a selector keeps and measures: its state in files, the attention that is the oracle, what a
unit of a value writes and what the loss feels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from choosing import (
    PAD,
    PREDICTORS,
    N,
    T,
    W,
    X,
    Y,
    config,
    dense,
    made,
    real,
    run,
    selecting,
    settings,
)
from helpers import TINY, error_line, tiny_model, tokens

import kv_router
import selector
from config import SCOPES, KVConfig, SelectConfig
from model import DensePath
from selection.calibration import layer_sensitivity
from selection.training import cut, fit_statistics, targets, training_example


@pytest.mark.parametrize("scope", SCOPES)
def test_state_goes_into_a_fresh_selector(scope):
    """A selector's tensors and its paths' bases, put into a model attached without calibration,
    choose the same; misfits are refused."""
    m = selecting(scope, fold=False)
    fresh = selector.attach(
        tiny_model(),
        KVConfig(kv="select", mask_scope=scope, kv_tail=W, value_basis="pca"),
        config(),
    )
    fresh.selector.double()
    saved = {k: t.clone() for k, t in selector.state(m).items()}
    assert {"selector.gain", "selector.feeling", "selector.predictors.predictor_query.mean"} < set(
        saved
    )
    kv_router.load_state(fresh, kv_router.state(m))
    selector.load_state(fresh, saved)
    for cfg in settings(scope, "exact"):
        if cfg.allocation == "global":
            (a, b, choice, _) = run(m, cfg)
            (a2, b2, choice2, _) = run(fresh, cfg)
            assert (
                torch.equal(choice.mask, choice2.mask)
                and torch.equal(real(a), real(a2))
                and torch.equal(b, b2)
            )
    assert "selector.gain" in error_line(
        selector.load_state, fresh, {k: t for k, t in saved.items() if k != "selector.gain"}
    )
    assert "selector.more" in error_line(
        selector.load_state, fresh, {**saved, "selector.more": torch.ones(1)}
    )
    assert "feeling" in error_line(
        selector.load_state, fresh, {**saved, "selector.feeling": torch.ones(3)}
    )


def test_detach_gives_the_dense_model_back():
    """Nothing of the selector stays, in its state neither."""
    m = selector.detach(selecting(fold=False))
    assert (
        selector.selector_of(m) is None
        and selector.state(m) == {}
        and set(m.state_dict()) == set(tiny_model().state_dict())
    )
    with torch.no_grad():
        torch.testing.assert_close(
            real(m(X, pad=torch.tensor(PAD))), real(dense()[0]), rtol=0, atol=1e-12
        )


def test_an_untrained_predictor_is_refused():
    """One line tells how to train it, at once when it is set."""
    s = selecting(cfg=SelectConfig(readers=20)).selector
    for name in PREDICTORS.split(","):
        cfg = dict(token_relevance=name) if name == "expected_attention" else dict(relevance=name)
        assert f"--predictors={name}" in error_line(s.set, SelectConfig(**cfg))
    s.set(SelectConfig(relevance="oracle", token_relevance="h2o"))


class Recorder(DensePath):
    """Whole values, and what attention was given."""

    def forward(self, x, q, k, v, pad=None):
        self.seen = x, q, k, v
        return super().forward(x, q, k, v, pad)


def recorded(idx: torch.Tensor, pad=None):
    """(x, q, k, v) of every layer of the dense model, and the model."""
    m = tiny_model()
    for block in m.layers:
        block.self_attn.kv_path = Recorder(3, 16)
    with torch.no_grad():
        m(idx, pad=pad)
    return [block.self_attn.kv_path.seen for block in m.layers], m


@pytest.mark.parametrize("after", [N, 0], ids=["what_follows", "own_region"])
def test_oracle_relevance_is_the_attention_of_what_follows(after, monkeypatch):
    """Softmax by softmax in the dense model: mean over the tokens after the prompt (over its query
    region where nothing follows) and over the query heads of a KV head. It is there inside the
    `with` only, and only where a signal asks for it."""
    m = made()
    idx = torch.cat((X, Y), 1)[:, : T + after]
    m.selector.set(config(relevance="oracle"))
    with selector.with_oracle(m, idx, T, torch.tensor(PAD)):
        got = m.selector.oracle.double()
    assert m.selector.oracle is None
    seen = recorded(idx, torch.tensor(PAD))[0]
    readers = range(T, T + after) if after else range(T - W, T)
    want = torch.zeros(2, 3, 3, T - W, dtype=torch.float64)
    for i, (_, q, k, _) in enumerate(seen):
        for b, h, r in itertools.product(range(2), range(6), readers):
            p = (k[b, h // 2, PAD[b] : r + 1] @ q[b, h, r] / 4).softmax(0)
            want[i, b, h // 2, PAD[b] :] += p[: T - W - PAD[b]] / 2 / len(readers)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    m.selector.set(config())
    with selector.with_oracle(m, idx, T, torch.tensor(PAD)):
        assert m.selector.oracle is None
    if after:
        routed = made("head", "routed")
        prompts = []
        monkeypatch.setattr(
            routed.selector,
            "choose",
            lambda p, choose=routed.selector.choose: prompts.append(p) or choose(p),
        )
        run(routed, config(relevance="oracle"))
        # each layer its own
        torch.testing.assert_close(
            torch.cat([p.oracle for p in prompts]).double(), want, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("cfg", [dict(), dict(value_keep=1.0)], ids=["half", "everything"])
@pytest.mark.parametrize("basis", ["native", "pca", "output"])
def test_gain_is_what_a_unit_of_value_writes(basis, cfg):
    """Root of: squared norms of what o_proj makes of each decoded value, summed over tokens and the
    query heads that read it, over the squared norms of its coordinates. Whatever the budget at the
    time: it may be set to another later."""
    batches = [tokens(2, 31, seed=1), tokens(1, 23, seed=2)]
    m = tiny_model()
    selector.attach(
        m,
        KVConfig(kv="select", mask_scope="head", kv_tail=W, value_basis=basis),
        config(**cfg),
        batches,
    )
    effect = torch.zeros(2, 3, dtype=torch.float64)
    energy = torch.zeros(2, 3, dtype=torch.float64)
    for idx in batches:
        seen, plain = recorded(idx)
        for i, (_, _, _, v) in enumerate(seen):
            enc, dec = m.layers[i].self_attn.kv_path.basis()
            w = plain.layers[i].self_attn.o_proj.weight
            for b, h, t in itertools.product(range(v.size(0)), range(3), range(v.size(2))):
                z = v[b, h, t] @ enc[h]
                energy[i, h] += (z**2).sum()
                for head in (2 * h, 2 * h + 1):
                    effect[i, h] += (
                        ((w[:, 16 * head : 16 * head + 16] @ (z @ dec[h])) ** 2).sum().detach()
                    )
    torch.testing.assert_close(
        m.selector.output_gain.double(), (effect / energy).sqrt(), rtol=1e-5, atol=1e-6
    )


def test_feeling_is_the_gradient_by_finite_differences():
    """Root mean square, over tokens and features, of the loss's slope when a layer's attention
    writes a little more, two-sided differences of the dense model one number at a time; over the
    root mean square of all layers. Weights may be frozen or not and stay so."""
    m = tiny_model()
    idx = tokens(2, 7, seed=3)
    eps = 1e-5
    m.layers[0].requires_grad_(False)
    wanted = [p.requires_grad for p in m.parameters()]
    got = layer_sensitivity(m, [block.self_attn for block in m.layers], [idx])
    assert [p.requires_grad for p in m.parameters()] == wanted and all(
        p.grad is None for p in m.parameters()
    )
    t = 6
    e = TINY.n_embd
    mean_square = []
    for block in m.layers:
        total = 0.0
        for row in idx:
            moved = torch.eye(t * e, dtype=torch.float64).view(-1, t, e) * eps
            losses = []
            for delta in (moved, -moved):
                hook = block.self_attn.o_proj.register_forward_hook(
                    lambda mod, args, out, d=delta: out + d
                )
                with torch.no_grad():
                    logits = m(row[:-1].expand(t * e, -1))
                losses.append(
                    F.cross_entropy(
                        logits.transpose(1, 2), row[1:].expand(t * e, -1), reduction="none"
                    ).sum(-1)
                    / (2 * t)
                )
                hook.remove()
            total += float(((losses[0] - losses[1]) / (2 * eps)).square().sum())
        mean_square.append(total / (2 * t))
    want = torch.tensor([math.sqrt(s / (sum(mean_square) / 2)) for s in mean_square])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, torch.ones(2), atol=0.01)


@pytest.mark.parametrize("scope", SCOPES)
def test_statistics_are_those_of_the_first_four_batches(scope):
    """Means and standard deviations of targets, for each output of each deciding layer, and of the
    query predictor's features, over all tokens of four batches, cut as in training; a fifth does
    not count, and nothing else changes. Without predictors there is nothing to do."""
    m = selecting(scope, cfg=config(shortest=33), fold=False)
    s = m.selector
    before = {name: t.clone() for name, t in s.state_dict().items()}
    batches = [tokens(2, 70, seed=5), tokens(1, 47, seed=6)]
    batches += [tokens(1, 70, seed=seed) for seed in (7, 8, 9)]
    windows = [window for idx in batches[:4] for window in idx]
    assert {cut(window, 33).size(1) for window in windows} == {70, 47, 35}
    fit_statistics(m, batches)
    wanted = {name: [] for name in s.predictors}
    for window in windows:
        prompt, alpha = training_example(m, cut(window, 33))
        for name, t in targets(s, prompt, alpha).items():
            if name != "predictor_query":  # (Lm, B, Hm, C, n) -> (Lm, tokens, Hm n)
                wanted[name].append(t.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2))
        features = s.predictors["predictor_query"].features(prompt, s.cfg)
        wanted["predictor_query"].append(features.flatten(2, 3))  # (L, Hkv, tokens, 9)
    for name, parts in wanted.items():
        all_of_them = torch.cat(parts, -2).double()
        more = 1e-3 if name == "predictor_query" else 0
        mean = all_of_them.mean(-2, keepdim=True)
        off = (all_of_them - mean).square().sum(-2, keepdim=True)
        std = (off / (all_of_them.size(-2) - 1)).sqrt() + more
        p = s.predictors[name]
        torch.testing.assert_close(p.mean.double().view_as(mean), mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(p.std.double().view_as(std), std, rtol=1e-4, atol=1e-6)
    changed = {n for n, t in s.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"predictors.{n}.{t}" for n in s.predictors for t in ("mean", "std")}
    plain = selecting(scope, cfg=config(predictors=""), fold=False)
    before = {name: t.clone() for name, t in plain.selector.state_dict().items()}
    fit_statistics(plain, batches)
    for name, t in plain.selector.state_dict().items():
        assert torch.equal(t, before[name])
