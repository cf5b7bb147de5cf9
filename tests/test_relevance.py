"""Every relevance signal without parameters against loops over tokens, heads and queries, and what
holds for all signals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import TINY
from scored_prompts import (
    CFG,
    CLOSE,
    HKV,
    KERNEL,
    PAD,
    TRAINED,
    D,
    H,
    L,
    attention,
    on_real,
    past_columns,
    prompt_of,
    score,
    turned,
    widest,
)

from model import apply_rope, rope_table
from selection import relevance
from selection.budgets import row_budgets
from selection.relevance import Prompt, beside
from selector import WITHOUT_TRAINING
from storage.layout import soft_cap

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEPTH_FREE = [*sorted(WITHOUT_TRAINING), *TRAINED]


def row_of(p: Prompt, b: int) -> Prompt | None:
    """Row b alone, without its padding; None where it has no context."""
    n = int(p.pad[b]) if p.pad is not None else 0
    if n >= p.n_context:
        return None
    return Prompt(
        [x[b : b + 1, n:] for x in p.x],
        [q[b : b + 1, :, n:] for q in p.q],
        [k[b : b + 1, :, n:] for k in p.k],
        [z[b : b + 1, :, n:] for z in p.z],
        p.n_context - n,
        None,
        p.rope,
        p.oracle[:, b : b + 1, :, n:],
        observers=p.observers,
    )


def layer_of(p: Prompt, i: int) -> Prompt:
    """Layer i alone, as a routed prefill sees it."""
    return Prompt(
        [p.x[i]],
        [p.q[i]],
        [p.k[i]],
        [p.z[i]],
        p.n_context,
        p.pad,
        p.rope,
        p.oracle[i : i + 1],
        first=i,
    )


# -------------------- signals without parameters


@pytest.mark.parametrize("observers", [0, 4, 30, 200])
@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_observed_is_the_mean_attention_of_the_asking_tokens(pad, observers):
    """Softmax by softmax over what each query may see, padding left out, of the query region or of
    fewer or more tokens; pooling is a maximum over real neighbours, none with pool=1."""
    p, _ = prompt_of(pad, observers=observers)
    asking = range(max(0, p.T - observers) if observers else p.n_context, p.T)
    want = attention(p, list(asking))
    torch.testing.assert_close(p.observed.double(), want, **CLOSE)
    for pool in (1, 5):
        got = on_real(relevance.observed(p, dataclasses.replace(CFG, pool=pool)), p)
        torch.testing.assert_close(got, widest(want, p, pool), **CLOSE)
    assert p.observed.dtype == torch.float32


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("impl", ["torch", KERNEL])
def test_attention_follows_visibility_and_weights(impl, cap, monkeypatch):
    """Any last column that a query reads and any weight per query and row enter the mean as stated,
    what has no weight is no part of the largest share, and layers taken in several steps give the
    same; kernels and plain form alike, logits bent or not."""
    p, _ = prompt_of(PAD, impl=impl, cap=cap)
    device = "cpu"
    if impl == "triton":  # no kernel takes float64
        device = "cuda" if torch.cuda.is_available() else "cpu"
        single = {name: [t.float().to(device) for t in getattr(p, name)] for name in ("q", "k")}
        p = dataclasses.replace(p, pad=p.pad.to(device), **single)
    readers = [33, 50, 84, 90]
    last = [61, 86, 87, 90]
    weight = torch.rand(3, len(readers), generator=torch.Generator().manual_seed(4))
    weight[1, 0] = 0  # padding in that row
    weight[2, :3] = 0
    want = torch.zeros(2, L, 3, HKV, p.n_context, dtype=torch.float64)
    for i in range(L):
        for b in range(2):  # the third has no context
            for w, r, end in zip(
                (weight[b] / weight[b].sum()).tolist(), readers, last, strict=True
            ):
                seen = range(int(p.pad[b]), end + 1)
                for h in range(H):
                    logits = torch.stack([p.q[i][b, h, r] @ p.k[i][b, h // 2, j] for j in seen])
                    share = soft_cap(logits.double() / math.sqrt(D), cap).softmax(0)
                    for s, j in zip(share.tolist(), seen, strict=True):
                        if j < p.n_context:
                            mean, most = want[:, i, b, h // 2]
                            mean[j] += w * s / (H // HKV)
                            most[j] = max(most[j], s * (w > 0))
    queries = p.queries(torch.tensor(readers, device=device))
    weight = weight.to(device)
    args = (queries, torch.tensor(last, device=device), weight)
    got = p.received(*args, with_largest=True)
    torch.testing.assert_close(torch.stack(got).double().cpu(), want, **CLOSE)
    monkeypatch.setattr(relevance, "CHUNK", 1)
    again = p.received(*args, with_largest=True)
    assert torch.equal(torch.stack(again), torch.stack(got))
    everything = torch.full((4,), p.T - 1, device=device)
    ours, all_read = (p.received(queries, end, weight)[0] for end in (None, everything))
    torch.testing.assert_close(ours[:, :2], all_read[:, :2])


@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_moved_queries_are_those_of_the_new_position(pad):
    """Turning a rotated query on equals rotating the raw one where it is moved to: `ahead` after
    the prompt's last position, by row. None is moved past the model's context."""
    p, raw = prompt_of(pad)
    columns = torch.tensor([79, 64, 40, 7])
    start = torch.tensor(pad)[:, None]
    real = (columns >= start)[:, None, :, None]  # (B, 1, Q, 1)
    for ahead in (0, 5, 60, 200):
        at = (p.T - start + ahead).clamp_max(TINY.block_size - 1).expand(-1, len(columns))
        want = torch.stack([turned(raw[i][:, :, columns], at) for i in range(L)])
        torch.testing.assert_close(
            p.moved(columns, ahead).double() * real, want * real, rtol=1e-5, atol=5e-5
        )


def in_float32(p: Prompt) -> Prompt:
    """A prompt as kernels take it: in 32 bits, where they run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen = {name: [t.float().to(device) for t in getattr(p, name)] for name in "xqkz"}
    pad = None if p.pad is None else p.pad.to(device)
    rope = tuple(t.to(device) for t in p.rope)
    return dataclasses.replace(p, impl="triton", pad=pad, rope=rope, **seen)


@pytest.mark.parametrize("impl", ["torch", KERNEL])
@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_moments_are_of_queries_to_come(pad, impl, monkeypatch):
    """Query by query from their raw form, the last SPAN of a row, each rotated where one of the
    READ tokens to come stands, none past the context; every row as if alone."""
    p, raw = prompt_of(pad)
    monkeypatch.setattr(relevance, "SPAN", 30)
    if impl == "triton":  # which knows 32 bits alone
        p = in_float32(p)
    got = p.moments().cpu()
    assert got.dtype == torch.float64
    D = TINY.head_dim
    n = TINY.n_head // TINY.n_kv_head
    for i in range(L):
        for b in range(len(pad)):
            for h in range(TINY.n_kv_head):
                want = torch.zeros(D, D, dtype=torch.float64)
                seen = 0
                for back in range(min(30, p.T - pad[b])):
                    length = p.T - pad[b]
                    at = length + int(
                        back * relevance.GOLDEN % 1 * min(relevance.READ, TINY.block_size - length)
                    )
                    for head in range(h * n, h * n + n):
                        q = turned(
                            raw[i][b : b + 1, head : head + 1, p.T - 1 - back : p.T - back],
                            torch.tensor([[at]]),
                        )[0, 0, 0]
                        want = want + torch.outer(q, q)
                        seen = seen + 1
                torch.testing.assert_close(got[i][b, h], want / seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("past", "C"), [(7, 80), (80, 80), (200, 33), (1, 17)], ids=lambda n: str(n)
)
def test_past_and_future_are_attention_of_queries_moved_ahead(past, C):
    """Past queries, evenly spread and the last among them, rotated at the new position from their
    raw form, attend to the whole prompt; `future` is half that and half what the query region
    gives."""
    p, raw = prompt_of(C=C, W=5)
    cfg = dataclasses.replace(CFG, past=past)
    columns = past_columns(C, past)
    assert len(columns) == min(past, C) and columns[0] == C - 1 and min(columns) >= 0
    q = torch.stack(
        [
            turned(raw[i][:, :, columns], torch.full((3, len(columns)), p.T + CFG.ahead))
            for i in range(L)
        ]
    )
    want = attention(p, columns, q, causal=False)
    torch.testing.assert_close(p.past(cfg).double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        relevance.future(p, cfg).double(),
        (want + attention(p, list(range(C, p.T)))) / 2,
        rtol=1e-4,
        atol=1e-5,
    )


def test_past_queries_come_from_the_last_span_only(monkeypatch):
    """No query comes from before the last SPAN context tokens: changing those before leaves the
    score of `past` alone."""
    monkeypatch.setattr(relevance, "SPAN", 30)
    p, _ = prompt_of()
    q = [t.clone() for t in p.q]
    for t in q:
        t[:, :, :50] += 1
    assert torch.equal(dataclasses.replace(p, q=q).past(CFG), p.past(CFG))
    q[0][:, :, 79 - 6 * 4] += 1  # 30 // 7 = 4 apart
    assert not torch.equal(dataclasses.replace(p, q=q).past(CFG), p.past(CFG))


def test_uniform_oracle_and_random_are_what_they_say():
    """uniform: 1 for every token; oracle: what the diagnostic pass gave, and refused without one;
    random: in [0, 1), not the same for two layers or heads, the same for every row, counted from
    the prompt's end, whatever the length."""
    p, _ = prompt_of(PAD)
    assert torch.equal(relevance.uniform(p, CFG)[0, :, 0], p.valid.float())
    assert torch.equal(relevance.oracle(p, CFG), p.oracle)
    with pytest.raises(ValueError, match="seen what follows"):
        relevance.oracle(dataclasses.replace(p, oracle=None), CFG)
    a, b = (relevance.random(prompt_of(C=C)[0], CFG) for C in (80, 37))
    assert (
        torch.equal(a[..., -37:], b)
        and torch.equal(a[:, 0], a[:, 1])
        and a.min() >= 0
        and a.max() < 1
    )
    flat = a[:, 0].flatten(0, 1)
    assert len({tuple(r) for r in flat.tolist()}) == L * HKV and abs(flat.mean() - 0.5) < 0.1


@pytest.mark.parametrize(
    "name, observers",
    [*((name, 0) for name in DEPTH_FREE), ("observed", 75), ("predictor_query", 75)],
)
def test_a_padded_row_scores_as_it_does_alone(name, observers):
    """Neither a row's padding nor the batch around it changes what its tokens score, where more
    tokens are observed than the row has, too. A row without context makes no number infinite or
    undefined elsewhere."""
    p, _ = prompt_of(PAD, observers=observers)
    whole = score(name, p)
    for b, first in enumerate(PAD[:2]):
        mine = whole.expand(whole.size(0), 3, *whole.shape[2:])[:, b, :, first:]
        alone = score(name, row_of(p, b))[:, 0]
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DEPTH_FREE)
def test_a_layer_alone_scores_as_among_the_others(name):
    """A routed prefill asks layer by layer: what a layer's tokens score does not depend on which
    layers are asked together."""
    p, _ = prompt_of(PAD)
    whole = score(name, p)
    for i in range(L):
        got = score(name, layer_of(p, i))[:, :2]
        want = whole[min(i, len(whole) - 1) :][:1, :2]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(WITHOUT_TRAINING) - {"random"}))
def test_kv_heads_permute_with_their_scores(name):
    """Permuting KV heads, their query heads with them, permutes a signal's heads and changes
    nothing else."""
    p, _ = prompt_of(PAD)
    turn = [2, 0, 1]
    swapped = dataclasses.replace(
        p,
        q=[q.unflatten(1, (HKV, -1))[:, turn].flatten(1, 2) for q in p.q],
        k=[k[:, turn] for k in p.k],
        z=[z[:, turn] for z in p.z],
        oracle=p.oracle[:, :, turn],
    )
    got = score(name, swapped)
    want = score(name, p)
    torch.testing.assert_close(
        got, want[:, :, turn] if want.size(2) > 1 else want, rtol=1e-5, atol=1e-7
    )


def test_prompts_count_their_own_tokens():
    """valid leaves out padding, and row_budgets applies its function to every row's context, 0 for a row
    without any."""
    p, _ = prompt_of(PAD)
    assert p.valid.sum(1).tolist() == [80, 59, 0] and p.real.sum(1).tolist() == [91, 70, 6]
    assert (
        row_budgets(p, lambda n: n // 7).tolist() == [11, 8, 0]
        and row_budgets(prompt_of()[0], lambda n: n + 1).tolist() == [81] * 3
    )
    asked = []
    row_budgets(p, lambda n: asked.append(n) or n)
    assert 0 not in asked


def test_rope_of_the_tests_is_the_models():
    """The float64 rotation of these tests and model.apply_rope turn the same way."""
    x = torch.randn(1, 1, 9, D, dtype=torch.float64)
    at = torch.arange(9) * 7
    cos, sin = rope_table(TINY)
    torch.testing.assert_close(
        turned(x, at[None]), apply_rope(x, cos[at], sin[at]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("impl", ["torch", KERNEL])
@pytest.mark.parametrize("C, D, S", [(1, 8, 2), (70, 32, 8), (65, 16, 16)])
def test_norms_of_groups_are_those_of_loops(C, D, S, impl):
    """Of values that lie token by token, against sums in float64."""
    z = torch.randn(2, 3, C, 2, D, generator=torch.Generator().manual_seed(0)).transpose(2, 3)
    z = z.to(DEVICE)
    p = dataclasses.replace(prompt_of()[0], z=list(z), n_groups=S, impl=impl)
    assert p.norms.dtype == torch.float32 and p.norms.shape == (2, 3, 2, C, S)
    for g in range(S):
        group = z[..., g * (D // S) : (g + 1) * (D // S)].double()
        want = sum(group[..., i] ** 2 for i in range(D // S)).sqrt()
        assert (p.norms[..., g] - want).abs().max() < 1e-6


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 3, 2)])
def test_tensors_beside_one_another_are_a_stack(order):
    """Whatever their order in memory, which the stack keeps."""
    ts = [torch.randn(3, 4, 5, 6).permute(order) for _ in range(3)]
    got = beside(ts)
    assert torch.equal(got, torch.stack(ts))
    assert got.stride()[1:] == ts[0].stride()
