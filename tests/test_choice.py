"""Which tokens and groups of a prompt are chosen: those of brute force, ties and floors included;
and what the choice may depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from choosing import (
    ALL,
    BUDGETS,
    PAD,
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
from helpers import TINY, error_line, tiny_model
from test_select_joint import oracle as joint

import selector
from baselines.tokens import AS_PUBLISHED
from config import ALLOCATIONS, SCOPES, SIGNALS
from selection.relevance import Prompt

# ----------------------------------------------------------------------------- the choice


def floor_of(share: float, n: int) -> int:
    """floor(share * n), exactly."""
    return int(Fraction(str(share)) * n)


def brute_force(p: Prompt, s: selector.Selector) -> tuple[torch.Tensor, torch.Tensor]:
    """keep (Lm, B, Hm, C) and mask (Lm, B, Hm, C, S) of a prompt: scores pair by pair in plain
    numbers, and sorted()."""
    cfg = s.cfg
    C = p.n_context
    n_kv = p.k[0].size(1)
    S = s.S
    layers = [list(range(p.L))] if s.kv.mask_scope == "shared" else [[i] for i in range(p.L)]
    heads = [[h] for h in range(n_kv)] if s.kv.mask_scope == "head" else [list(range(n_kv))]
    d = p.z[0].size(-1) // S
    energy = [
        [
            [
                [
                    [float((p.z[i][b, h, t, g * d : (g + 1) * d] ** 2).sum()) for g in range(S)]
                    for t in range(C)
                ]
                for h in range(n_kv)
            ]
            for b in range(len(p.x[0]))
        ]
        for i in range(p.L)
    ]
    feel = s.layer_sensitivity.tolist()
    gain = s.output_gain.tolist()

    # numbers (Lm or L, B, Hm or Hkv, C or C, S), and whether they are per mask already
    def signal(name):
        if name in selector.WITHOUT_TRAINING:
            return selector.WITHOUT_TRAINING[name](p, cfg).expand(p.L, -1, n_kv, -1).tolist(), False
        with torch.no_grad():
            if name == "predictor_query":
                return s.predictors[name](p, cfg).tolist(), False
            out = s.predictors[name](p, cfg.predictor_loss)
            return (out if name == "predictor" else out[..., 0]).tolist(), True

    def average(f, ls, hs):  # over heads, then over layers
        return sum(sum(f(i, h) for h in hs) / len(hs) for i in ls) / len(ls)

    def relevance(values, per_mask, a, b, c, t):
        return (
            values[a][b][c][t]
            if per_mask
            else average(lambda i, h: values[i][b][h][t], layers[a], heads[c])
        )

    def norm(a, b, c, t, g, x):
        return math.sqrt(
            average(
                lambda i, h: (
                    energy[i][b][h][t][g] * (feel[p.first + i] ** x * gain[p.first + i][h]) ** 2
                ),
                layers[a],
                heads[c],
            )
        )

    alpha = signal(cfg.relevance)
    by = signal(cfg.tokens_by)
    units = [(a, c) for a in range(len(layers)) for c in range(len(heads))]
    share_one = {
        "head": [[u] for u in units],
        "layer": [[u for u in units if u[0] == a] for a in range(len(layers))],
        "global": [units],
    }
    keep = torch.zeros(len(layers), len(p.x[0]), len(heads), C, dtype=torch.bool)
    mask = torch.zeros(*keep.shape, S, dtype=torch.bool)
    for b, first in enumerate([0] * keep.size(1) if p.pad is None else p.pad.tolist()):
        there = range(first, C)
        n = C - first
        for group in share_one[cfg.allocation] if n > 0 else ():
            token = {}
            pair = {}
            for a, c in group:
                weight = average(
                    lambda i, h: feel[p.first + i] * gain[p.first + i][h], layers[a], heads[c]
                )
                for t in there:
                    r = relevance(*by, a, b, c, t)
                    if cfg.tokens_by == "predictor":
                        token[a, c, t] = math.sqrt(sum((w * weight) ** 2 for w in r))
                    else:
                        size = math.sqrt(sum(norm(a, b, c, t, g, 1.0) ** 2 for g in range(S)))
                        token[a, c, t] = r if cfg.tokens_by in AS_PUBLISHED else r * size
                    r = relevance(*alpha, a, b, c, t)
                    for g in range(S):
                        worth = (
                            r[g] * weight
                            if cfg.relevance == "predictor"
                            else r**cfg.hedge * norm(a, b, c, t, g, cfg.hedge)
                        )
                        pair[a, c, t, g] = worth**2 if cfg.kv_keep else worth
                        if t - first < cfg.sinks:
                            token[a, c, t] = pair[a, c, t, g] = math.inf
            if cfg.kv_keep:
                order = sorted(token)
                rows = joint(
                    [[pair[(*k, g)] for g in range(S)] for k in order],
                    floor_of(cfg.kv_keep, 2 * S * n * len(group)),
                )
                for (a, c, t), bits in zip(order, rows, strict=True):
                    keep[a, b, c, t] = any(bits)
                    mask[a, b, c, t] = torch.tensor(bits)
                continue
            budget = floor_of(cfg.token_keep, n * len(group))
            kept = [k for _, k in sorted((-v, k) for k, v in token.items())][:budget]
            for a, c, t in kept:
                keep[a, b, c, t] = True
            each = [[(-pair[(*k, g)], (*k, g)) for g in range(S)] for k in kept]  # of every token
            top = (
                [x for t in each for x in sorted(t)[: floor_of(cfg.value_keep, S)]]
                if cfg.fixed_k
                else sorted(x for t in each for x in t)[: floor_of(cfg.value_keep, S * budget)]
            )
            for _, (a, c, t, g) in top:
                mask[a, b, c, t, g] = True
    return keep, mask


@ALL
def test_the_choice_equals_brute_force(scope, prefill, monkeypatch):
    """For every allocation and budget, signals taken in turn: scores recomputed pair by pair,
    budgets as fractions, and sorted() choose the same tokens and pairs, also layer by layer in a
    routed prefill."""
    m = made(scope, prefill)
    prompts = []
    choose = m.selector.choose
    monkeypatch.setattr(m.selector, "choose", lambda p: prompts.append(p) or choose(p))
    for i, cfg in enumerate(settings(scope, prefill)):
        if i % 3 == SCOPES.index(scope):
            prompts.clear()
            choice = run(m, cfg, X[:, : T - (i % 2)])[2]
            want = [
                torch.cat(t)
                for t in zip(*(brute_force(p, m.selector) for p in prompts), strict=True)
            ]
            assert len(prompts) == (1 if scope == "shared" or prefill == "exact" else 2)
            assert torch.equal(choice.keep, want[0]) and torch.equal(choice.mask, want[1]), (
                cfg,
                (choice.mask ^ want[1]).sum(),
            )


def tied_prompt(scope: str, C: int = 23, seed: int = 0) -> Prompt:
    """A prompt whose group norms are 0, 1 or 2, for a uniform signal: ties everywhere. Heads and
    layers that share a mask are alike."""
    size = (2, 3, TINY.n_kv_head, C, 4)
    z = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(seed)).double()
    z = (
        z
        if scope == "head"
        else z[:, :, :1].expand(size)
        if scope == "layer"
        else z[:1, :, :1].expand(size)
    )
    z = F.pad(z.unsqueeze(-1), (0, 3)).flatten(-2)  # one number of four in each group
    blank = torch.zeros(2, 3, 3, C + W, TINY.head_dim)
    return Prompt(
        list(blank[:, :, 0]),
        list(blank),
        list(blank),
        list(z),
        C,
        torch.tensor([0, 4, 29]),
        (torch.ones(1), torch.zeros(1)),
        n_groups=4,
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_equal_scores_go_by_layer_head_token_and_group(scope, allocation):
    """With norms of three values almost every decision is a tie: tokens and pairs go to the lower
    layer and head, then the earlier token, then the lower group, whatever the budget."""
    s = selecting(scope, fold=False).selector
    for weight in (s.output_gain, s.layer_sensitivity):
        weight.fill_(1)
    for seed, budget in enumerate(
        [
            *BUDGETS.values(),
            dict(token_keep=0.9, value_keep=0.21),
            dict(kv_keep=0.77),
            dict(token_keep=0.1, value_keep=1.0),
        ]
    ):
        s.set(config(relevance="uniform", allocation=allocation, **budget))
        p = tied_prompt(scope, seed=seed)
        choice = s.choose(p)
        want = brute_force(p, s)
        assert torch.equal(choice.keep, want[0]) and torch.equal(choice.mask, want[1])


@pytest.mark.parametrize(
    ("allocation", "tokens_kept", "pairs_kept"),
    [("head", 6 * 36, 6 * 41), ("layer", 2 * 109, 2 * 126), ("global", 218, 252)],
)
def test_counts_are_exact_floors(allocation, tokens_kept, pairs_kept):
    """52 context tokens, 4 groups, 3 heads, 2 layers; 0.7 of the tokens, 0.29 of their pairs:
    floor(0.7 n) and floor(0.29 * 4 floor(0.7 n)) with n = 52, 156 or 312, each budget on its own.
    (In floating point 0.29 * 100 is 28.999...: a share is the decimal it is written as.)"""
    choice = run(
        made(), config(token_keep=0.7, value_keep=0.29, allocation=allocation), X[:1], Y[:1], None
    )[2]
    assert int(choice.keep.sum()) == tokens_kept and int(choice.mask.sum()) == pairs_kept
    assert (
        (choice.keep.sum(-1) == 36).all()
        if allocation == "head"
        else allocation == "global" or (choice.keep.sum((-1, -2)) == 109).all()
    )
    exact = run(
        made(), config(token_keep=1.0, value_keep=0.29, allocation="head"), X[:1, :34], Y[:1], None
    )[2]
    assert (exact.mask.sum((-1, -2)) == 29).all()  # of 25 tokens' 100 pairs


def test_a_tiny_budget_keeps_one():
    """A share of less than one keeps one token, or one pair; under one budget a token that does not
    fit is not kept. A fixed K of none is refused in one line."""

    def kept(**budget):
        return run(made(), config(allocation="head", **budget), X[:1], Y[:1], None)[2]

    assert (kept(token_keep=0.01).keep.sum(-1) == 1).all() and (
        kept(value_keep=0.001).mask.sum((-1, -2)) == 1
    ).all()
    assert not kept(kv_keep=0.001).keep.any()
    assert "at least one must be kept" in error_line(kept, value_keep=0.2, fixed_k=True)


@pytest.mark.parametrize("relevance", ["observed", "future", "predictor_query"])
def test_a_region_of_no_tokens_is_refused(relevance):
    """With kv_tail=0 there is nobody whose attention could be asked: one line, not a division by
    zero."""
    cfg = config(relevance=relevance)
    assert "kv_tail" in error_line(
        lambda: run(selecting(cfg=cfg, kv_tail=0), cfg, X[:1], Y[:1], None)
    )


# -------------------- what it may depend on


@pytest.mark.parametrize("past", [64, 7], ids=["past_64", "past_7"])
@pytest.mark.parametrize(
    ("scope", "prefill"), [("head", "exact"), ("shared", "routed")], ids=lambda s: s
)
def test_rows_are_independent(scope, prefill, past):
    """Each row alone, without padding, keeps the same tokens and groups and gives the same logits,
    for every signal."""
    m = made(scope, prefill)
    for cfg in settings(scope, prefill):
        if cfg.allocation != "layer" or (
            past == 7 and cfg.relevance not in ("future", "predictor_query")
        ):
            continue
        cfg = replace(cfg, past=past)
        a, b, choice, _ = run(m, cfg)
        for i, first in enumerate(PAD):
            a1, b1, alone, _ = run(m, cfg, X[i : i + 1, first:], Y[i : i + 1], None)
            if alone is not None:
                for whole, own in ((choice.mask, alone.mask), (choice.keep, alone.keep)):
                    assert torch.equal(whole[:, i, :, first:], own[:, 0]), cfg
            torch.testing.assert_close(a[i : i + 1, first:], a1, rtol=0, atol=1e-9)
            torch.testing.assert_close(b[i : i + 1], b1, rtol=0, atol=1e-9)


def test_kv_heads_permute_with_their_masks():
    """The weights of KV heads and of their query heads permuted: the same logits, and each head's
    mask where the head went. (Not where heads tie, as by `streaming`.)"""
    m = tiny_model()
    turn = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for block in m.layers:
            attn = block.self_attn
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj):
                for t in (proj.weight, proj.bias):
                    t.copy_(t.unflatten(0, (3, -1))[turn].flatten(0, 1))
            attn.o_proj.weight.copy_(
                attn.o_proj.weight.unflatten(1, (3, -1))[:, turn].flatten(1, 2)
            )
    other = selecting(model=m)
    torch.testing.assert_close(other.selector.output_gain, made().selector.output_gain[:, turn])
    for cfg in settings("head", "exact"):
        if cfg.relevance in ("oracle", "observed", "future", "uniform") and cfg.tokens_by not in (
            "expected_attention",
            "streaming",
        ):
            (a, b, choice, _) = run(made(), cfg)
            (a2, b2, choice2, _) = run(other, cfg)
            assert torch.equal(choice.mask[:, :, turn], choice2.mask) and torch.equal(
                choice.keep[:, :, turn], choice2.keep
            )
            torch.testing.assert_close((real(a), b), (real(a2), b2), rtol=0, atol=1e-9)


@ALL
def test_no_output_depends_on_a_later_token(scope, prefill):
    """After the prompt a token's logits are the same whatever follows it, for every signal that
    exists at inference; and with an exact prefill the prompt's own are the dense model's."""
    m = made(scope, prefill)
    later = Y.clone()
    later[:, 3:] = (later[:, 3:] + 1) % TINY.vocab_size
    for relevance in SIGNALS[1:]:
        cfg = config(relevance=relevance, allocation="layer", token_keep=0.5)
        a, b, _, _ = run(m, cfg)
        a2, b2, _, _ = run(m, cfg, y=later)
        assert (
            torch.equal(a, a2)
            and torch.equal(b[:, :3], b2[:, :3])
            and not torch.allclose(b[:, 3:], b2[:, 3:])
        )
        if prefill == "exact":
            torch.testing.assert_close(real(a), real(dense()[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("prefill", ["exact", "routed"])
@pytest.mark.parametrize(
    ("relevance", "sees"),
    [
        ("observed", True),
        ("future", True),
        ("predictor_query", True),
        ("predictor", False),
        ("uniform", False),
        ("random", False),
    ],
)
def test_only_query_aware_signals_see_the_query_region(relevance, sees, prefill):
    """With another question after the same context the masks change for signals that look at it;
    the paper's predictor, the norms alone and chance keep what they kept."""
    m = made("head", prefill)
    other = X.clone()
    other[:, -W:] = (other[:, -W:] + 5) % TINY.vocab_size
    cfg = config(relevance=relevance, allocation="layer", token_keep=0.5)
    assert torch.equal(run(m, cfg)[2].mask, run(m, cfg, other)[2].mask) != sees
