"""Relevance signals that are trained: their features, losses and symmetries by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scored_prompts import (
    CFG,
    HKV,
    PAD,
    TRAINED,
    D,
    E,
    L,
    S,
    attention,
    drawn_predictor,
    largest,
    past_columns,
    prompt_of,
    score,
)

from selection import relevance
from selection.predictors import HiddenPredictor, QueryPredictor
from selection.relevance import Prompt


def test_predictor_of_a_target_that_never_changed_stays_sane():
    """A target that was the same for every token that was measured, but for rounding, or always 0,
    makes no loss explode, neither then nor when another text changes it; what never was more than 0
    is predicted as 0, and the others are normalised as before."""
    p, _ = prompt_of()
    p = dataclasses.replace(p, x=[x.float() for x in p.x])
    torch.manual_seed(3)
    predictor = HiddenPredictor(L, E, HKV, HKV)
    target = torch.rand(L, 3, HKV, p.n_context, 1) * 1e-3
    target[0, :, 0] = 0.3
    target[1, :, 1] = 0
    predictor.fit([p, p], [target, target])
    std = predictor.std[:, 0]
    assert std[0, 0] == target[0, 0, 0, 0, 0] and std[1, 1] == 0
    both = torch.cat((target, target), 1)
    spread = both.transpose(1, 2).flatten(2).std(-1)
    torch.testing.assert_close(std[0, 1:], spread[0, 1:])
    for changed in (target, target + 1e-4):
        assert predictor.loss(p, changed, "mse") < 3
    scores = predictor(p, "mse")
    assert (scores[1, :, 1] == 0).all() and scores.isfinite().all()


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("name", ["predictor", "expected_attention"])
@pytest.mark.parametrize("mask_heads", [1, HKV], ids=["one_mask", "mask_per_head"])
def test_hidden_predictor_is_its_two_layers_token_by_token(name, mask_heads):
    """mse: the network's output times std plus mean, not below 0; kl: shares over a row's (token,
    group) pairs of each mask, times one number per layer. Token by token, in the order masks, then
    groups."""
    net = drawn_predictor(name, mask_heads)
    (p, _) = prompt_of(PAD)
    per = S if name == "predictor" else 1
    out = torch.zeros(L, 2, mask_heads, 80, per, dtype=torch.float64)
    for i in range(L):
        for b in range(2):
            for t in range(80):
                y = (
                    gelu(p.x[i][b, t] @ net.up[i] + net.up_bias[i, 0]) @ net.down[i]
                    + net.down_bias[i, 0]
                )
                for m in range(mask_heads):
                    for g in range(per):
                        out[i, b, m, t, g] = y[m * per + g].detach()
    std, mean = (t.view(L, 1, mask_heads, 1, per) for t in (net.std, net.mean))
    torch.testing.assert_close(net(p, "mse")[:, :2], (out * std + mean).clamp_min(0))
    got = net(p, "kl")
    for b, first in enumerate(PAD[:2]):
        e = out[:, b, :, first:].exp()
        torch.testing.assert_close(
            got[:, b, :, first:],
            e / e.sum((-1, -2), keepdim=True) * net.mean.mean((1, 2)).view(L, 1, 1, 1),
        )
        assert not got[:, b, :, :first].any()


@pytest.mark.parametrize("name", ["predictor", "expected_attention"])
def test_hidden_predictor_losses_are_those_of_the_formulas(name):
    """fit: mean and standard deviation of every output's targets, over all tokens of all prompts.
    mse: to the normalised target; kl: of the target's shares from the predicted ones, a mean over
    layers, rows and masks. Gradients reach every parameter, but a kl does not see one number added
    to every score of a mask."""
    net = drawn_predictor(name)
    per = S if name == "predictor" else 1
    prompts = [prompt_of(seed=s)[0] for s in (1, 2)]
    targets = [torch.rand(L, 3, HKV, 80, per, dtype=torch.float64) for _ in range(2)]
    net.fit(prompts, targets)
    every = torch.cat(targets, 1)  # (L, 6, Hkv, 80, per)
    for i in range(L):
        for m in range(HKV):
            for g in range(per):
                flat = every[i, :, m, :, g].flatten()
                average = sum(flat.tolist()) / len(flat)
                spread = math.sqrt(sum((t - average) ** 2 for t in flat.tolist()) / (len(flat) - 1))
                assert (
                    abs(float(net.mean[i, 0, m * per + g]) - average) < 1e-9
                    and abs(float(net.std[i, 0, m * per + g]) - spread) < 1e-9
                )
    p = prompts[0]
    target = targets[0]
    out = net.normalised(p).detach().view(L, 3, 80, HKV, per).transpose(2, 3)
    std, mean = (t.view(L, 1, HKV, 1, per) for t in (net.std, net.mean))
    by_hand = {"mse": ((out - (target - mean) / std) ** 2).mean()}
    terms = []
    for i in range(L):
        for b in range(3):
            for m in range(HKV):
                want = target[i, b, m] / target[i, b, m].sum()
                e = out[i, b, m].exp()
                terms.append((want * (want.log() - (e / e.sum()).log())).sum())
    by_hand["kl"] = sum(terms) / len(terms)
    for kind in ("mse", "kl"):
        net.zero_grad()
        loss = net.loss(p, target, kind)
        torch.testing.assert_close(loss, by_hand[kind])
        loss.backward()
        for n, w in net.named_parameters():
            assert w.grad.abs().max() > 1e-9 or (n, kind, name) == (
                "down_bias",
                "kl",
                "expected_attention",
            ), n
    constant = torch.ones_like(target)
    net.fit(prompts, [constant, constant])
    assert torch.isfinite(net.loss(p, constant, "mse"))


def test_query_predictor_features_are_those_of_the_loops():
    """Eleven of them, by name: logs of observed attention bare and max-pooled over 5 and 15, of past
    queries' attention bare and pooled over 5, of the largest attention of an asking query bare and
    pooled over 5, of the value's norm; the key's norm, the log distance to the context's end in
    units of 64, and whether a token is among the first 4."""
    p, _ = prompt_of((0, 21, 3))
    cfg = dataclasses.replace(CFG, past=10**6)
    got = drawn_predictor("predictor_query").features(p, cfg)
    assert got.shape == (L, HKV, 3, 80, 11)
    seen = attention(p, list(range(80, 91)))
    most = largest(p, list(range(80, 91)))
    columns = past_columns(80, 10**6)
    past = attention(p, columns, p.moved(torch.tensor(columns), cfg.ahead).double(), causal=False)
    for b, first in enumerate(p.pad.tolist()):
        for t in range(first, 80, 3):
            for i in range(L):
                for h in range(HKV):
                    five, fifteen = (slice(max(0, t - r), t + r + 1) for r in (2, 7))
                    mine = seen[i, b, h], past[i, b, h], most[i, b, h]
                    shares = (
                        mine[0][t],
                        mine[0][five].max(),
                        mine[0][fifteen].max(),
                        mine[1][t],
                        mine[1][five].max(),
                        mine[2][t],
                        mine[2][five].max(),
                        p.z[i][b, h, t].norm(),
                    )
                    want = [math.log(max(float(s), relevance.TINY)) for s in shares]
                    want += [
                        float(p.k[i][b, h, t].norm()),
                        math.log((80 - t) / 64 + 1),
                        float(t - first < 4),
                    ]
                    torch.testing.assert_close(
                        got[i, h, b, t].double(),
                        torch.tensor(want, dtype=torch.float64),
                        rtol=1e-4,
                        atol=1e-3,
                    )


def query_scores(
    net: QueryPredictor, p: Prompt, f: torch.Tensor, i: int, b: int, h: int, t: int
) -> torch.Tensor:
    """One token's log-score, from the features f (L, Hkv, B, C, 11)."""
    y = (f[i, h, b, t].double() - net.mean[i, h]) / net.std[i, h]
    s = (
        gelu(y @ net.up[i, h] + net.up_bias[i, h, 0]) @ net.down[i, h, :, 0]
        + y @ net.linear[i, h, :, 0]
    )
    s = s + gelu(p.x[i][b, t] @ net.token_up[i]) @ net.token_down[i, :, h]
    u = (
        gelu(p.x[i][b, p.T - (p.observers or p.T - p.n_context) :].mean(0) @ net.query_up[i])
        @ net.query_down[i, :, h * D : (h + 1) * D]
    )
    return s + p.k[i][b, h, t] @ u / math.sqrt(D)


@pytest.mark.parametrize("observers", [0, 20])
def test_query_predictor_is_its_formula_and_its_loss_a_kl_divergence(observers):
    """alpha is the softmax of the token-by-token log-scores times the observed attention of the
    context; the loss is the KL divergence from the shares of the target, a mean over layers, rows
    and heads; its gradients reach every parameter, at the start every last one of a network."""
    net = drawn_predictor("predictor_query")
    (p, _) = prompt_of(C=37, observers=observers)
    net.fit([p], CFG)
    f = net.features(p, CFG)
    torch.testing.assert_close(net.mean, f.double().mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        net.std, f.double().flatten(2, 3).std(2) + 1e-3, rtol=1e-4, atol=1e-5
    )
    target = torch.rand(L, 3, HKV, 37, dtype=torch.float64)
    terms = []
    alpha = net(p, CFG).detach().double()
    observed = attention(p, list(range(48 - (observers or 11), 48)))
    for i in range(L):
        for b in range(3):
            for h in range(HKV):
                s = torch.stack([query_scores(net, p, f, i, b, h, t) for t in range(37)]).detach()
                torch.testing.assert_close(
                    alpha[i, b, h], s.softmax(0) * observed[i, b, h].sum(), rtol=1e-4, atol=1e-7
                )
                want = target[i, b, h] / target[i, b, h].sum()
                terms.append((want * (want.log() - s.log_softmax(0))).sum())
    loss = net.loss(p, target, CFG)
    torch.testing.assert_close(loss, sum(terms) / len(terms))
    loss.backward()
    assert all(w.grad.abs().max() > 1e-9 for w in net.parameters())
    fresh = QueryPredictor(L, E, HKV, D).double()
    fresh.fit([p], CFG)
    fresh.loss(p, target, CFG).backward()
    assert all(
        getattr(fresh, n).grad.abs().max() > 1e-9
        for n in ("down", "linear", "token_down", "query_down")
    )


def test_a_fresh_query_predictor_ranks_by_observed_attention():
    """Before training only the feature of observed attention, pooled over 5, counts: the order of
    tokens is that of `observed`."""
    p, _ = prompt_of(PAD)
    fresh = QueryPredictor(L, E, HKV, D).double()
    fresh.fit([prompt_of(seed=3)[0]], CFG)
    alpha = fresh(p, CFG)
    seen = relevance.observed(p, CFG)
    for b, first in enumerate(PAD[:2]):
        a = alpha[:, b, :, first:]
        s = seen[:, b, :, first:]
        steps = a.detach().gather(-1, s.argsort(-1)).diff(dim=-1)
        assert (steps >= -1e-6).all()


def test_query_predictor_permutes_with_its_heads():
    """KV heads of the inputs and of every parameter and buffer permuted together: alpha's heads are
    permuted, nothing else changes."""
    net = drawn_predictor("predictor_query")
    (p, _) = prompt_of(PAD)
    turn = [2, 0, 1]
    swapped = dataclasses.replace(
        p,
        q=[q.unflatten(1, (HKV, -1))[:, turn].flatten(1, 2) for q in p.q],
        k=[k[:, turn] for k in p.k],
        z=[z[:, turn] for z in p.z],
    )
    other = drawn_predictor("predictor_query")
    with torch.no_grad():
        for name in ("up", "up_bias", "down", "linear", "mean", "std"):
            getattr(other, name).copy_(getattr(net, name)[:, turn])
        other.token_down.copy_(net.token_down[..., turn])
        other.query_down.copy_(net.query_down.unflatten(-1, (HKV, D))[..., turn, :].flatten(-2))
    torch.testing.assert_close(
        other(swapped, CFG)[:, :2], net(p, CFG)[:, :2, turn], rtol=1e-5, atol=1e-8
    )


def test_only_the_query_predictor_sees_the_query_region():
    """With another query region, hidden states, queries and keys, the paper's predictor says the
    same number for number, in both of its forms; predictor_query does not. And the paper's reads
    hidden states alone."""
    p, _ = prompt_of(PAD)
    x, q, k = ([t.clone() for t in ts] for ts in (p.x, p.q, p.k))
    for i in range(L):
        x[i][:, 80:] += 1
        q[i][:, :, 80:] *= -1
        k[i][:, :, 80:] += 1
    other = dataclasses.replace(p, x=x, q=q, k=k)
    blind = dataclasses.replace(
        other, q=[t * 2 for t in q], k=[t * 3 for t in k], z=[t * 5 for t in p.z]
    )
    for name in TRAINED[:4]:
        assert torch.equal(score(name, other)[:, :2], score(name, p)[:, :2]) and torch.equal(
            score(name, blind)[:, :2], score(name, p)[:, :2]
        )
    assert not torch.allclose(
        score("predictor_query", other)[:, :2], score("predictor_query", p)[:, :2], atol=1e-4
    )


@pytest.mark.parametrize("change", ["x", "q", "k"])
def test_query_predictor_uses_every_part_of_the_region(change):
    """Hidden states, queries and keys of the query region each move alpha on their own."""
    p, _ = prompt_of()
    part = [t.clone() for t in getattr(p, change)]
    for t in part:
        t.narrow(1 if change == "x" else 2, 80, 11).add_(1)
    assert not torch.allclose(
        score("predictor_query", dataclasses.replace(p, **{change: part})),
        score("predictor_query", p),
        atol=1e-5,
    )
