"""Aligning heads changes no logit and makes those averaged alike; calibrated routers give each
expert its share and the costly tokens heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TINY, tiny_model, tokens

import mixsga
from baselines import align, shared_heads
from config import KVConfig
from model import DensePath
from routing.calibration import record_layers
from settings.experts import MixConfig
from storage.experts import averaged
from training.loss import lm_loss

EIGHT = replace(TINY, n_head=16, n_kv_head=8)


def batches(n: int = 2, T: int = 64):
    """Token ids and targets."""
    both = [tokens(3, T + 1, seed=s) for s in range(n)]
    return [(t[:, :-1], t[:, 1:]) for t in both]


def attached(kv: str = "mixsga", tail: int = 3, **mix):
    return shared_heads.attach(
        tiny_model(cfg=EIGHT), KVConfig(kv=kv, kv_tail=tail), MixConfig(**mix)
    )


@pytest.mark.parametrize("sizes", ["1,2,4", "2", "1,8"])
def test_aligning_changes_no_logit(sizes):
    """The dense model's logits, biases on q, k and v and several query heads to a KV head included,
    are those of before; weights are not."""
    model = tiny_model(cfg=EIGHT)
    x = tokens(2, 21)
    want = model(x)
    before = model.layers[0].self_attn.v_proj.weight.clone()
    ratios = ":".join("1" * (sizes.count(",") + 1))
    align.fit(
        shared_heads.attach(
            model,
            KVConfig(kv="mixsga"),
            MixConfig(group_sizes=sizes, expert_ratios=ratios, calibrate_experts=False),
        ),
        batches(),
    )
    assert (model.layers[0].self_attn.v_proj.weight - before).abs().max() > 0.1
    dense = tiny_model(cfg=EIGHT)
    dense.load_state_dict({k: t for k, t in model.state_dict().items() if "kv_path" not in k})
    assert (dense(x) - want).abs().max() < 1e-9


def error_of_averaging(attn, model, size: int) -> float:
    """Mean squared difference of keys and of values to their groups' means, each by its own
    square."""
    seen = []
    dense = DensePath(attn.n_kv_head, attn.head_dim)

    def see(i, x, q, k, v):
        seen.extend((k, v))

    with (
        torch.no_grad(),
        align.in_place_of_paths([attn], [dense]),
        record_layers([attn], see),
    ):
        model(tokens(4, 60, seed=5))
    return sum(
        (
            (t - averaged(t, size).repeat_interleave(size, 1)).square().mean() / t.square().mean()
        ).item()
        for t in seen
    )


def test_heads_that_are_turned_copies_are_found_and_brought_together():
    """Heads made of four others by a turn and a change of places, which averaging in pairs would
    wreck, are averaged without loss after."""
    model = tiny_model(cfg=EIGHT)
    attn = model.layers[0].self_attn
    D = EIGHT.head_dim
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            proj = getattr(attn, name)
            for t in (proj.weight, proj.bias):
                heads = t.view(8, D, -1)
                for new, old in ((4, 1), (5, 3), (6, 0), (7, 2)):
                    if name == "v_proj":
                        g.manual_seed(new)
                        turn = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=t.dtype))[0]
                        heads[new] = turn @ heads[old]
                    else:
                        g.manual_seed(new)
                        angle = torch.rand(D // 2, 1, generator=g, dtype=t.dtype) * 6
                        a, b = heads[old].chunk(2)
                        heads[new] = torch.cat(
                            (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
                        )
    before = error_of_averaging(attn, model, 2)
    align.fit(
        shared_heads.attach(model, KVConfig(kv="gqa"), MixConfig(kv_share=0.5)), batches(T=100)
    )
    assert before > 0.5 and error_of_averaging(attn, model, 2) < 1e-9


def test_the_order_of_heads_nests_groups():
    """Pairs of the most alike, then pairs of pairs; sizes that do not divide the next are passed
    over."""
    alike = torch.eye(8)
    for pair, value in (
        ((0, 5), 0.9),
        ((1, 4), 0.8),
        ((2, 7), 0.7),
        ((3, 6), 0.6),
        ((0, 2), 0.5),
        ((5, 7), 0.5),
        ((1, 3), 0.4),
    ):
        alike[pair] = value
        alike[pair[::-1]] = value
    assert align.ordered(alike, (1, 2, 4)) == [0, 5, 2, 7, 1, 4, 3, 6]
    assert align.ordered(alike, (1,)) == list(range(8))


@pytest.mark.parametrize("ratios", ["3:1:6", "1:0:1", "0:0:1", "1:1:0"])
def test_calibrated_scores_give_each_expert_its_share(ratios):
    """On the tokens it was calibrated on, the largest of router(x) + offset falls on each expert as
    often as the ratios say, within a token."""
    path = mixsga.experts(attached(expert_ratios=ratios))[0]
    x = torch.randn(1000, EIGHT.n_embd, dtype=torch.float64)
    cost = torch.randn(1000, dtype=torch.float64)
    align.calibrate(path, x, cost)
    scores = path.router(x) + path.offset
    scores = scores.masked_fill(torch.tensor([not r for r in path.ratios]), -float("inf"))
    got = scores.argmax(-1).bincount(minlength=3).tolist()
    assert all(abs(n - float(r) * 1000) <= 1 for n, r in zip(got, path.ratios, strict=True))


def test_a_predictable_cost_is_ranked():
    """Where the cost is linear in x, expert 1 gets the costliest tokens, but for the ridge: at most
    3 of 150 are others."""
    path = mixsga.experts(attached())[0]
    x = torch.randn(500, EIGHT.n_embd, dtype=torch.float64)
    cost = x @ torch.randn(EIGHT.n_embd, dtype=torch.float64) + 4
    align.calibrate(path, x, cost)
    first = (path.router(x) + path.offset).argmax(-1).eq(0).nonzero().flatten().tolist()
    assert len(set(first) & set(cost.topk(150).indices.tolist())) >= 147


def test_the_cost_is_gradient_times_change():
    """What is collected of a token is the square of the loss's first-order change when far reads of
    it are averaged: central differences of the summed loss along that change, token by token."""
    model = attached(tail=2)
    attn = model.layers[0].self_attn
    model.layers[1].self_attn.kv_path = DensePath(EIGHT.n_kv_head, EIGHT.head_dim)
    ((x, y),) = batches(1, 24)
    n = 24 - 3 - 2
    (seen,) = align.observe_costs(model, [attn], [(x, y)])
    got = seen.cost[0].view(3, n)

    def loss(b: int, at: int, step: float):
        class Moved(torch.nn.Module):
            def forward(self, h, q, k, v, pad=None):
                far = []
                for t in (k, v):
                    far.append(t.clone())
                    far[-1][b, :, at] += (
                        step * (averaged(t, 4).repeat_interleave(4, 1) - t)[b, :, at]
                    )
                return mixsga.attend_window(q, *far, (k, v), 2)

        attn.kv_path = Moved()
        with torch.no_grad():
            return lm_loss(model(x), y)

    square = torch.tensor(
        [
            [((loss(b, t, 1e-5) - loss(b, t, -1e-5)) / 2e-5) ** 2 for t in range(n)]
            for b in range(3)
        ],
        dtype=torch.float64,
    )
    want = (square / square.mean() + 1e-6).log()
    assert (got - (want - want.mean(1, keepdim=True))).abs().max() < 1e-3


def test_fit_trains_nothing_and_puts_paths_back():
    """Modes, gradients and paths are those of before; a tail that leaves no token to calibrate on
    is refused in one line."""
    model = attached().train()
    model.layers[0].mlp.requires_grad_(False)
    paths = [b.self_attn.kv_path for b in model.layers]
    wants = [p.requires_grad for p in model.parameters()]
    align.fit(model, batches())
    assert model.training and [b.self_attn.kv_path for b in model.layers] == paths
    assert [p.requires_grad for p in model.parameters()] == wants and all(
        p.grad is None for p in model.parameters()
    )
    with pytest.raises(ValueError, match="kv_tail=60"):
        align.fit(attached(tail=60), batches())
