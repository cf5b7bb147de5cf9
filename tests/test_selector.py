"""Query-aware selection: packed equals masked, the choice equals brute force, and what a prompt's
selection may depend on."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, error_line, randomise, tiny_model, tokens
from test_select_joint import oracle as joint

import kv_router
import selector
from baselines.tokens import AS_PUBLISHED
from config import ALLOCATIONS, SCOPES, SIGNALS, KVConfig, SelectConfig
from generate import generate
from model import DensePath
from selection.calibration import layer_sensitivity
from selection.relevance import Prompt
from selection.training import (
    PASSAGE,
    cut,
    fit_statistics,
    predictor_loss,
    question_window,
    recall_window,
    targets,
    training_example,
    training_windows,
    window_kind,
)
from storage.cache import KVCache
from storage.ragged import BASES, SHARED

PREDICTORS = "predictor,expected_attention,predictor_query"
TOKEN_LEVEL = ("quest", "h2o", "streaming", "snapkv", "expected_attention", "keydiff")
BUDGETS = {
    "two_shares": dict(token_keep=0.5, value_keep=0.5),
    "joint": dict(kv_keep=0.3),
    "fixed_k": dict(token_keep=0.4, value_keep=0.5, fixed_k=True),
}
W = 9
T = 61
N = 5  # query region, prompt, tokens after it
PAD = (0, 7, 55)  # the last row is shorter than the query region
X = tokens(3, T, seed=4)
Y = tokens(3, N, seed=5)


def config(**cfg) -> SelectConfig:
    """Settings of these tests, and `cfg`."""
    return SelectConfig(
        **{
            **dict(
                relevance="observed",
                predictors=PREDICTORS,
                readers=20,
                observers=0,
                recall=0.0,
                sinks=2,
                hedge=0.4,
                allocation="layer",
            ),
            **cfg,
        }
    )


def selecting(
    scope: str = "head",
    prefill: str = "exact",
    fold: bool = True,
    model=None,
    cfg: SelectConfig | None = None,
    **kv,
):
    """A calibrated model in float64 whose predictors are random; all choices of config() can be
    set."""
    m = model or tiny_model()
    kv = KVConfig(
        **{
            **dict(kv="select", mask_scope=scope, prefill=prefill, kv_tail=W, value_basis="pca"),
            **kv,
        }
    )
    batches = [tokens(2, 70, seed=1), tokens(1, 66, seed=2)]
    selector.attach(m, kv, cfg or config(), batches)
    fit_statistics(m, batches)
    torch.manual_seed(8)
    for p in m.selector.predictors.values():
        randomise(p, 0.3)
    m.selector.double()
    return kv_router.fold(m) if fold else m


@functools.cache
def made(scope: str = "head", prefill: str = "exact", fold: bool = True):
    """selecting(...), made once; only its settings change."""
    return selecting(scope, prefill, fold)


def prefilled(m, x=X, pad=PAD, more: int = N) -> KVCache:
    """A cache that read the prompt x, with room for `more` tokens."""
    cache = m.new_cache(len(x), x.size(1) + more)
    with torch.no_grad():
        m.prefill(x, cache, torch.tensor(pad) if pad and any(pad) else None)
    return cache


def run(m, cfg: SelectConfig, x=X, y=Y, pad=PAD):
    """Logits of the prompt x and of y after it, the choice (None where there was no context) and
    the cache."""
    m.selector.set(cfg)
    pad = torch.tensor(pad) if pad and any(pad) else None
    m.selector.record = True
    m.selector.chosen = None
    with torch.no_grad(), selector.with_oracle(m, torch.cat((x, y), 1), x.size(1), pad):
        cache = m.new_cache(len(x), x.size(1) + y.size(1) + 3)
        prompt = m.prefill(x, cache, pad, last_only=False)
        return prompt, m.prefill(y, cache, last_only=False), m.selector.chosen, cache


def real(logits: torch.Tensor, pad=PAD) -> torch.Tensor:
    """Prompt logits of the columns that are no padding, of all rows: (n, vocab)."""
    return torch.cat([logits[b, first:] for b, first in enumerate(pad)])


def settings(scope: str, prefill: str):
    """Every allocation with every way to spend a budget and every signal, and a token-level one
    beside each."""
    for allocation, (name, budget) in itertools.product(ALLOCATIONS, BUDGETS.items()):
        if allocation == "global" and prefill == "routed" and scope != "shared":
            continue
        for i, relevance in enumerate(SIGNALS):
            token = TOKEN_LEVEL[(i + len(allocation)) % 5] if i % 2 and name != "joint" else ""
            yield config(
                relevance=relevance, token_relevance=token, allocation=allocation, **budget
            )


ALL = pytest.mark.parametrize(
    ("scope", "prefill"), [(s, p) for s in SCOPES for p in ("exact", "routed")], ids=lambda s: s
)


# -------------------- packed, masked, whole


@ALL
def test_packed_equals_masked(scope, prefill):
    """Prompt and continuation through the cache give the logits of one uncached pass that reads the
    context as the choice kept it, left padding and a row without context included, for every
    allocation, budget and signal."""
    m = made(scope, prefill)
    for cfg in settings(scope, prefill):
        a, b, choice, _ = run(m, cfg)
        with torch.no_grad(), selector.masked_replay(m, choice, T - W):
            full = m(torch.cat((X, Y), 1), pad=torch.tensor(PAD))
        torch.testing.assert_close(real(a), real(full[:, :T]), rtol=0, atol=1e-9, msg=str(cfg))
        torch.testing.assert_close(b, full[:, T:], rtol=0, atol=1e-9, msg=str(cfg))
        valid = torch.arange(T - W) >= torch.tensor(PAD)[:, None]
        assert (
            not (choice.keep & ~valid[:, None]).any()
            and not (choice.mask & ~choice.keep[..., None]).any()
        )
        assert (choice.keep | ~(valid & (valid.cumsum(-1) <= 2))[:, None]).all()  # sinks
        assert 0.05 < choice.mask[:, :2].float().mean() < 0.6


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_a_routed_prefill_cannot_share_one_budget_between_layers(scope):
    """One line says so and what to do, when it is attached and when it is set."""
    assert "--allocation=layer" in error_line(
        selecting, scope, "routed", cfg=config(allocation="global")
    )
    assert "--allocation=layer" in error_line(
        made(scope, "routed").selector.set, config(allocation="global")
    )


@functools.cache
def dense():
    """Logits (prompt, continuation) of the same model with whole values, computed without a
    cache."""
    with torch.no_grad():
        full = tiny_model()(torch.cat((X, Y), 1), pad=torch.tensor(PAD))
    return full[:, :T], full[:, T:]


@ALL
@pytest.mark.parametrize(
    "keep",
    [
        dict(token_keep=1.0, value_keep=1.0),
        dict(kv_keep=1.0),
        dict(token_keep=1.0, value_keep=1.0, fixed_k=True),
    ],
    ids=["shares", "joint", "fixed_k"],
)
def test_keeping_everything_is_dense(scope, prefill, keep):
    """Every token and group of the context is kept, padding is not, and the logits are the dense
    model's."""
    for fold in (True, False):
        for allocation in ("head", "layer"):
            a, b, choice, _ = run(made(scope, prefill, fold), config(allocation=allocation, **keep))
            valid = (torch.arange(T - W) >= torch.tensor(PAD)[:, None])[None, :, None]
            assert torch.equal(choice.keep, valid.expand_as(choice.keep)) and torch.equal(
                choice.mask, choice.keep[..., None].expand_as(choice.mask)
            )
            for got, want in zip((real(a), b), (real(dense()[0]), dense()[1]), strict=True):
                # folding rounds the weights
                torch.testing.assert_close(got, want, rtol=0, atol=1e-9 if fold else 1e-12)


@pytest.mark.parametrize("prefill", ["exact", "routed"])
def test_fold_leaves_the_logits(prefill):
    """Folded and not, the same prompt is kept the same way and gives the same logits; only an exact
    prefill's prompt is the dense one."""
    for cfg in (config(), config(relevance="predictor", kv_keep=0.4)):
        (a, b, choice, _), (a2, b2, choice2, _) = (
            run(made("head", prefill, fold), cfg) for fold in (False, True)
        )
        assert torch.equal(choice.mask, choice2.mask)
        torch.testing.assert_close(real(a), real(a2), rtol=0, atol=1e-9)
        torch.testing.assert_close(b, b2, rtol=0, atol=1e-9)
        same = (real(a) - real(dense()[0])).abs().max()
        assert (same < 1e-12) == (prefill == "exact") and (b - dense()[1]).abs().max() > 1e-3


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


# ----------------------------------------------------------------------------- decoding and storing


@ALL
def test_token_by_token_equals_one_call(scope, prefill):
    """After the prompt, tokens one at a time, decoded or as pieces, two at a time or at once: the
    same logits."""
    m = made(scope, prefill)
    for cfg in (
        config(token_keep=0.5, allocation="layer"),
        config(relevance="predictor_query", kv_keep=0.3, allocation="head"),
    ):
        whole = run(m, cfg)[1]
        for step, verb in ((1, "decode"), (1, "prefill"), (2, "prefill")):
            cache = prefilled(m)
            more = {} if verb == "decode" else {"last_only": False}
            with torch.no_grad():
                parts = [getattr(m, verb)(part, cache, **more) for part in Y.split(step, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
            assert cache.length == T + N
            assert cache.lengths.tolist() == [T + N - pad for pad in PAD]


@pytest.mark.parametrize("prefill", ["exact", "routed"])
@pytest.mark.parametrize(
    ("first", "pad"), [(7, (0, 3, 6)), (3, (0, 2, 5))], ids=["short", "padding_of_two_calls"]
)
def test_a_prompt_within_the_query_region_stays_whole(first, pad, prefill):
    """Nothing is chosen of a first call that is no longer than the region, and nothing later: the
    logits are the dense model's, also where a row's padding reaches into the second call."""
    m = made("head", prefill)
    x = X[:, :20]
    pad = torch.tensor(pad)
    m.selector.set(config(kv_keep=0.3))
    m.selector.record = True
    m.selector.chosen = None
    parts = []
    with torch.no_grad():
        cache = m.new_cache(3, 20)
        for start, end in ((0, first), (first, 15), (15, 20)):
            rest = (pad - start).clamp(0, end - start)
            parts.append(m.prefill(x[:, start:end], cache, rest, last_only=False))
        want = tiny_model()(x, pad=pad)
    got = torch.cat(parts, 1)
    pad = pad.tolist()
    torch.testing.assert_close(real(got, pad), real(want, pad), rtol=0, atol=1e-9)
    assert m.selector.chosen is None


def test_a_cache_chooses_for_its_own_prompt():
    """Two prompts whose layers take turns, and one after a pass that failed half-way, are kept as
    each alone: no state of a prompt lies where two caches meet."""
    cfg = config(relevance="future", kv_keep=0.3)
    for prefill in ("exact", "routed"):
        m = made("shared", prefill)
        want = [run(m, cfg, x, Y[:1], None)[1] for x in (X[:1], X[1:2])]
        caches = [m.new_cache(1, T + N) for _ in want]
        with torch.no_grad():
            x = [m.embed_tokens(ids) for ids in (X[:1], X[1:2])]
            for i, block in enumerate(m.layers):
                for c, cache in enumerate(caches):
                    tables = m.rope_cos[:T], m.rope_sin[:T]
                    x[c] = block(x[c], *tables, "prefill", cache.layers[i])
            for cache in caches:
                cache.length = T
            for cache, logits in zip(caches, want, strict=True):
                got = m.prefill(Y[:1], cache, last_only=False)
                torch.testing.assert_close(got, logits, rtol=0, atol=1e-9)

            cache = m.new_cache(1, T + N)
            hook = m.layers[1].register_forward_pre_hook(stop)
            with pytest.raises(InterruptedError):
                m.prefill(X[1:2], cache)
            hook.remove()
            m.prefill(X[:1], cache)
            assert torch.equal(
                m.prefill(Y[:1], cache, last_only=False), run(m, cfg, X[:1], Y[:1], None)[1]
            )


def stop(module, args):
    """A hook that ends a pass."""
    raise InterruptedError


def test_generate_continues_prompts_of_any_length():
    """Greedy tokens of a ragged batch, two prompts within the query region, one of them a single
    token, are those of each prompt alone fed by hand."""
    m = made()
    prompts = [X[0].tolist(), X[1, :37].tolist(), X[2, :4].tolist(), X[2, :1].tolist()]
    m.selector.set(config(relevance="future", kv_keep=0.3))
    rows, _ = generate(m, prompts, 6)
    for prompt, row in zip(prompts, rows, strict=True):
        cache = m.new_cache(1, len(prompt) + 6)
        with torch.no_grad():
            idx = m.prefill(torch.tensor([prompt]), cache).argmax(-1)
            for token in row:
                assert int(idx) == token
                idx = m.decode(idx, cache).argmax(-1)


@pytest.mark.parametrize("scope", SCOPES)
def test_saved_joined_and_picked_caches_give_equal_logits(scope, tmp_path):
    """A cache written to a file and read again, rows taken out of one in any order, and caches of
    prompts that were read apart, joined, continue as the original does."""
    m = made(scope)
    cfg = config(token_keep=0.5, value_keep=0.4)
    b = run(m, cfg)[1]
    for rows in ([2, 0], [1], [0, 1, 2]):
        part = prefilled(m).select_sequences(rows)
        with torch.no_grad():
            got = m.prefill(Y[rows], part, last_only=False)
        torch.testing.assert_close(got, b[rows], rtol=0, atol=1e-9)
    apart = [prefilled(m, X[i : i + 1, pad:], None, more=i) for i, pad in enumerate(PAD)]
    with torch.no_grad():
        got = m.prefill(Y, KVCache.cat(apart), last_only=False)
    torch.testing.assert_close(got, b, rtol=0, atol=1e-9)
    cache = prefilled(m)
    cache.save(tmp_path / "cache.safetensors")
    again = KVCache.load(tmp_path / "cache.safetensors", m)
    with torch.no_grad():
        assert torch.equal(m.prefill(Y, again), m.prefill(Y, cache))


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "not folded"])
def test_settings_that_change_later_leave_a_cache_alone(fold):
    """A prompt that was packed goes on as it was packed, whatever the selector would do by now."""
    m = made("head", "exact", fold)
    settings = [config(kv_keep=0.5), config(kv_keep=1.0), config(kv_bytes=0.5)]
    for before, after in itertools.permutations(settings, 2):
        want = run(m, before)[1]
        cache = prefilled(m)
        m.selector.set(after)
        with torch.no_grad():
            assert torch.equal(m.prefill(Y, cache, last_only=False), want)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "not folded"])
def test_a_loaded_cache_is_read_as_it_was_packed(fold, tmp_path):
    """Whether values lie in the basis or as they are is told by the file, not by what the selector
    would do by now; a loaded cache joins the one that was saved."""
    m = made("head", "exact", fold)
    for before, after in ((1.0, 0.5), (0.5, 1.0)):
        want = run(m, config(kv_keep=before))[1]
        cache = prefilled(m)
        cache.save(tmp_path / "cache")
        m.selector.set(config(kv_keep=after))
        again = KVCache.load(tmp_path / "cache", m)
        with torch.no_grad():
            got = m.prefill(Y.repeat(2, 1), KVCache.cat([again, cache]), last_only=False)
        torch.testing.assert_close(got, want.repeat(2, 1, 1), rtol=0, atol=1e-12)


def test_fewer_bytes_are_held_and_shared_masks_once():
    """Less than dense; each layer's keys and rows are as many as the choice kept; masks shared by
    layers are one set of tensors: the cache is smaller than with masks per layer by exactly those
    of every other layer."""
    cfg = config(relevance="uniform", token_keep=0.5, value_keep=0.5, allocation="layer")
    *_, shared, one = run(made("shared"), cfg, X[:1], Y[:1], None)
    *_, each = run(made("layer"), cfg, X[:1], Y[:1], None)
    held = one.layers[1].state_dict()
    masks = sum(held[name].nbytes for name in (*SHARED, *BASES, "n_context"))
    assert each.nbytes() - one.nbytes() == masks > 0
    assert one.layers[0].bits.data_ptr() == one.layers[1].bits.data_ptr()
    assert each.layers[0].bits.data_ptr() != each.layers[1].bits.data_ptr()
    for cache in one.layers:
        assert len(cache.keys) == int(shared.keep.sum()) * 3 == 26 * 3
        assert len(cache.rows) == int(shared.mask.sum()) * 3 == 52 * 3
    assert one.nbytes() < each.nbytes() < made().dense_bytes(T + N, one)


# -------------------- state, calibration, training


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


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("scope", ["shared", "head"])
def test_training_lowers_the_loss_and_leaves_the_base(scope, kind):
    """A few AdamW steps on one batch lower each predictor's own loss, the sum is that of the parts,
    and the base gets no gradient."""
    for name in PREDICTORS.split(","):
        m = selecting(scope, cfg=config(predictors=name, predictor_loss=kind), fold=False)
        idx = tokens(3, 70, seed=9)
        (p,) = m.selector.predictors.values()
        optimizer = torch.optim.AdamW(p.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            losses.append(predictor_loss(m, idx))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.95 * losses[0] and all(
            a > b for a, b in itertools.pairwise(losses)
        ), losses
        assert all(w.grad is None for n, w in m.named_parameters() if not n.startswith("selector."))
    m = selecting(scope, cfg=config(predictor_loss=kind), fold=False)
    prompt, alpha = training_example(m, idx)
    want = targets(m.selector, prompt, alpha)
    parts = (
        p.loss(prompt, want[n], m.selector.cfg if n == "predictor_query" else kind)
        for n, p in m.selector.predictors.items()
    )
    torch.testing.assert_close(predictor_loss(m, idx), sum(parts))
    energy = torch.stack(prompt.z).unflatten(-1, (4, 4)).square().sum(-1)
    alike, over = (
        (alpha, energy)
        if scope == "head"
        else (alpha.mean((0, 2))[None, :, None], energy.mean((0, 2))[None, :, None])
    )
    torch.testing.assert_close(want["predictor"], alike.unsqueeze(-1) * over.sqrt().float())
    assert torch.equal(want["predictor_query"], alpha) and torch.allclose(
        want["expected_attention"], alike.unsqueeze(-1)
    )
    assert prompt.n_context == 70 - 20 - W and prompt.T == 50 and alpha.shape == (2, 3, 3, 41)
    assert "some context must be left" in error_line(predictor_loss, m, idx[:, :29])


@pytest.mark.parametrize("n_tokens, region", [(200, 16), (203, 5), (70, 9), (41, 0), (40, 19)])
def test_recall_windows_repeat_every_passage_of_the_context(n_tokens, region):
    """The first half stays; after it come all passages of its context, none of the query region's
    tokens, in one order of all possible, again from the first where there is room, and the same on
    every call."""
    window = torch.randperm(n_tokens)
    made = recall_window(window, region).tolist()
    half = n_tokens // 2
    assert made[:half] == window[:half].tolist()
    context = made[: half - region]
    passages = [context[i : i + PASSAGE] for i in range(0, len(context), PASSAGE)]
    orders = ([t for p in order for t in p] * 40 for order in itertools.permutations(passages))
    assert made[half:] in [order[: n_tokens - half] for order in orders]
    assert made == recall_window(window, region).tolist()


def test_recall_windows_refuse_a_half_that_is_all_query_region():
    assert "give a larger --block_size, or --recall=0" in error_line(
        recall_window, torch.arange(40), 20
    )


@pytest.mark.parametrize("n_tokens, region", [(200, 16), (203, 5), (82, 9), (64, 0)])
def test_question_windows_end_with_a_part_of_what_stands_before(n_tokens, region):
    """The last region + PASSAGE tokens are neighbours that all lie in what comes before them, which
    stays as it was; the same ones on every call. A window too short for that is refused."""
    window = torch.randperm(n_tokens)
    made = question_window(window, region).tolist()
    n_asked = region + PASSAGE
    before = window[:-n_asked].tolist()
    assert made[:-n_asked] == before
    places = range(len(before) - n_asked + 1)
    assert made[-n_asked:] in [before[i : i + n_asked] for i in places]
    assert made == question_window(window, region).tolist()
    short = window[: 2 * n_asked - 1]
    assert "give a larger --block_size, or --recall=0" in error_line(question_window, short, region)


@pytest.mark.parametrize("prefill", ["exact", "routed"])
def test_the_tokens_observed_are_those_asked_for(prefill, monkeypatch):
    """cfg.observers reaches every prompt that is chosen from, trained on or looked at, and with as
    many as stay whole nothing changes."""
    m = selecting(prefill=prefill, cfg=config(observers=30), fold=False)
    idx = tokens(2, 70, seed=4)
    seen = []
    choose = m.selector.choose
    monkeypatch.setattr(m.selector, "choose", lambda p: (seen.append(p), choose(p))[1])
    with torch.no_grad():
        m.prefill(idx, m.new_cache(2, 80))
        assert seen and {len(p.asking) for p in seen} == {30}
        assert len(training_example(m, idx)[0].asking) == 30
        caches = [m.new_cache(2, 80) for _ in range(2)]
        for cache, cfg in zip(caches, (config(observers=W), config()), strict=True):
            m.selector.set(cfg)
            m.prefill(idx, cache)
        after = [m.decode(idx[:, :1], cache) for cache in caches]
    assert torch.equal(*after)


def test_windows_are_cut_into_equal_parts_down_to_the_shortest():
    """A window is read in order, in parts of one length: the whole, or a half, a quarter, ... of it
    that has at least `shortest` tokens; every one of these turns up, the same for the same window;
    with 0 only the whole."""
    lengths = set()
    for window in tokens(60, 50):
        made = cut(window, 12)
        lengths.add(made.size(1))
        assert made.numel() <= 50 < made.numel() + len(made)
        assert made.flatten().tolist() == window[: made.numel()].tolist()
        assert torch.equal(made, cut(window, 12))
        assert torch.equal(cut(window, 0)[0], window) and torch.equal(cut(window, 26)[0], window)
    assert lengths == {50, 25, 12}


def test_window_kinds_are_shares_by_their_own_tokens():
    """Of many windows about cfg.recall are no continuation, a third of these are questions, and
    always the same ones; none at 0, no continuation at 1."""
    windows = tokens(600, 12, seed=3)
    kinds = [window_kind(w, 0.6) for w in windows]
    assert 190 < kinds.count("continuation") < 290
    assert 80 < kinds.count("question") < 160
    assert kinds == [window_kind(w, 0.6) for w in windows]
    assert {window_kind(w, 0.0) for w in windows} == {"continuation"}
    assert {window_kind(w, 1.0) for w in windows} == {"question", "recall"}


def test_predictor_loss_is_the_mean_over_windows_of_all_kinds():
    """Each window counts alike, whichever kinds it is cut into and however a batch is split: the loss
    of a batch is the mean of those of its windows, each the mean of its parts, made one by one, in
    which the right tokens read."""
    model = tiny_model(cfg=replace(TINY, block_size=200))
    m = selecting("head", model=model, cfg=config(recall=0.75, shortest=90), fold=False)
    idx = tokens(7, 182, seed=5)
    seen = Counter()
    want = 0.0
    for whole in idx:
        windows = cut(whole, 90)
        for window in windows:
            kind = window_kind(window, 0.75)
            seen[kind, len(windows)] += 1
            if kind == "recall":
                window = recall_window(window, W)
            elif kind == "question":
                window = question_window(window, W)
            readers = {"recall": len(window) // 2, "question": PASSAGE, "continuation": 20}[kind]
            readers += kind == "recall" and len(window) % 2
            prompt, alpha = training_example(m, window[None], readers)
            assert len(window) - readers == prompt.T == prompt.n_context + W
            wanted = targets(m.selector, prompt, alpha)
            for name, p in m.selector.predictors.items():
                how = m.selector.cfg if name == "predictor_query" else "mse"
                want = want + p.loss(prompt, wanted[name], how) / len(windows) / 7
    assert len(seen) > 4, seen
    torch.testing.assert_close(predictor_loss(m, idx), want)
    halves = predictor_loss(m, idx[:2]) * 2 + predictor_loss(m, idx[2:]) * 5
    torch.testing.assert_close(predictor_loss(m, idx), halves / 7)
    made = training_windows(idx, m.selector.cfg, W)
    assert sum(part.share for part in made) == pytest.approx(1)
    assert sum(len(part.windows) for part in made) == sum(seen.values())
