"""Selection's refit of kept values (--refit): against ridge regression in loops in float64, what it
changes of a cache, and what it never does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from choosing import PAD, Y, config, prefilled, run, selecting
from helpers import TINY, error_line, tokens

from config import SelectConfig
from model import rope_table
from selection.refit import EVERY, QUERIES, RUN, refitted, ridge_rows, turned_queries
from selection.relevance import GOLDEN, READ, Prompt

L, B, HKV, N_HEADS, D, W = 2, 3, 2, 2, 16, 5
PADS = (0, 9, 40)  # the last row has too few queries to hold any out


def a_prompt(T: int = 73, seed: int = 0, untold: bool = False) -> tuple[Prompt, torch.Tensor]:
    """A random prompt in float64 with padding, and coordinates of its query region."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(L)]

    q = [2 * t for t in drawn(B, HKV * N_HEADS, T, D)]
    k = drawn(B, HKV, T, D)
    z = drawn(B, HKV, T, D)
    context = [t[:, :, : T - W] for t in z]
    rest = [t / 2 for t in context] if untold else None
    rope = tuple(t.double() for t in rope_table(TINY))
    pad = torch.tensor(PADS)
    prompt = Prompt(drawn(B, T, 1), q, k, context, T - W, pad, rope, untold=rest)
    return prompt, torch.stack([t[:, :, T - W :] for t in z])


def chosen_at_random(prompt: Prompt, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are kept, and which of four groups of theirs."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(L, B, HKV, prompt.n_context, generator=g)
    keep = keep < torch.rand(L, 1, HKV, 1, generator=g)
    groups = torch.rand(*keep.shape, 4, generator=g) < 0.7
    return keep, groups.repeat_interleave(D // 4, -1)


def turned(q: torch.Tensor, angle: int, rope) -> torch.Tensor:
    """Rotate a query (D,) by so many positions."""
    c, s = (t[angle] for t in rope)
    a, b = q.chunk(2)
    return torch.cat((a * c - b * s, b * c + a * s))


def by_loops(prompt, tail, keep, stored, n_first, ridge, i, b, h):
    """One segment's coordinates (C, D) by equation (1), and its error on the queries held out,
    before and after."""
    T = prompt.T
    C = prompt.n_context
    pad = PADS[b]
    k = prompt.k[i][b, h]
    z = torch.cat((prompt.z[i][b, h], tail[i, b, h]))
    told = torch.zeros_like(z)
    if prompt.untold is not None:
        told[:C] = prompt.z[i][b, h] - prompt.untold[i][b, h]
    free = [t for t in range(pad + n_first, C) if keep[i, b, h, t]]
    always = [t for t in range(pad, T) if t < pad + n_first or t >= C]
    there = sorted(free + always)
    rows = {False: [], True: []}  # weights on the free, what is missing, what is missing as read
    read = z.clone()
    for t in free:
        read[t] = torch.where(stored[i, b, h, t], z[t], told[t])
    room = min(max(len(prompt.rope[0]) - T + pad, 1), READ)
    for head in range(N_HEADS):
        for t in range(max(pad, T - QUERIES), T):
            ahead = int((T - 1 - t) * GOLDEN % 1 * room)
            place = min(T - pad + ahead, len(prompt.rope[0]) - 1)
            query = turned(prompt.q[i][b, h * N_HEADS + head, t], place - (t - pad), prompt.rope)
            weight = (k @ query / D**0.5).exp()
            whole = weight[pad:] @ z[pad:] / weight[pad:].sum()
            p = weight / weight[there].sum()
            missing = whole - p[there] @ z[there]
            as_read = whole - p[there] @ read[there]
            held = (T - 1 - t) // RUN % EVERY == EVERY - 1
            rows[held].append((p[free], missing, as_read))
    out = prompt.z[i][b, h].clone()
    if not free or not rows[True]:
        return out, 0.0, 0.0
    P, E, _ = (torch.stack(t) for t in zip(*rows[False], strict=True))
    gram = P.T @ P
    strength = ridge * sum(float(gram[j, j]) for j in range(len(free))) / len(free)
    x = torch.linalg.solve(gram + strength * torch.eye(len(free)), P.T @ E)
    told_by = 0.0
    size = 0.0
    for p, _, as_read in rows[True]:
        moved = p @ (x * stored[i, b, h, free])
        told_by += float(moved @ as_read)
        size += float(moved @ moved)
    share = min(max(told_by / size, 0.0), 1.0) if size else 0.0
    out[free] += share * x
    before = sum(float(e.square().sum()) for _, _, e in rows[True])
    after = 0.0
    for p, _, e in rows[True]:
        after += float((e - p @ ((out - prompt.z[i][b, h]) * stored[i, b, h])[free]).square().sum())
    return out, before, after


@pytest.mark.parametrize("untold", [False, True])
def test_refit_equals_ridge_regression_in_loops(untold):
    """Every segment, with padding, first tokens that stay whole, groups that are not stored and
    values told by keys. On queries that are held out the error never grows; where none are, values
    stay as they were, bit for bit, and so do those of tokens that are not kept."""
    prompt, tail = a_prompt(untold=untold)
    keep, stored = chosen_at_random(prompt)
    torch.set_default_dtype(torch.float64)
    try:
        got = refitted(prompt, tail, keep, stored, 2, 0.3)
        shut = 0
        for i in range(L):
            for b in range(B):
                for h in range(HKV):
                    about = (prompt, tail, keep, stored, 2, 0.3, i, b, h)
                    want, before, after = by_loops(*about)
                    torch.testing.assert_close(got[i, b, h], want, rtol=1e-9, atol=1e-9)
                    assert after <= before
                    if after == before:
                        shut += 1
                        assert torch.equal(got[i, b, h], prompt.z[i][b, h])
    finally:
        torch.set_default_dtype(torch.float32)
    assert L * HKV <= shut < L * B * HKV - 1  # the last row has nothing that is held out
    assert torch.equal(got[~keep], prompt.values[~keep])
    assert not torch.equal(got[keep], prompt.values[keep])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_head_stays_where_queries_held_out_would_lose(sign):
    """Dropped tokens say one thing to queries that are fitted and, with sign -1, the opposite to
    those that are held out: kept values then stay as they were, bit for bit."""
    T = 70
    C = T - W
    u = torch.zeros(D, dtype=torch.float64)
    u[0] = 8
    from_end = torch.arange(T).flip(0)
    ask = torch.where(from_end // RUN % EVERY == EVERY - 1, sign, 1)
    q = (ask[:, None] * u).expand(1, N_HEADS, T, D)
    side = torch.zeros(T, dtype=torch.float64)
    side[0:C:4] = 1
    side[1:C:4] = -1  # the dropped ones
    k = (side[:, None] * u).expand(1, 1, T, D)
    z = torch.randn(T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 9
    z = torch.where(side[:, None] == 0, z, side[:, None]).expand(1, 1, T, D)
    still = torch.ones(160, D // 2), torch.zeros(160, D // 2)  # positions turn nothing
    prompt = Prompt([q], [q], [k], [z[:, :, :C]], C, None, still)
    keep = (side[:C] == 0).expand(1, 1, 1, C)
    stored = keep.new_ones(1, 1, 1, C, D)
    got = refitted(prompt, z[None, :, :, C:], keep, stored, 0, 0.1)
    assert torch.equal(got, prompt.values) == (sign < 0)


@pytest.mark.parametrize(("m", "n"), [(7, 4), (4, 7)])
def test_more_tokens_than_queries_have_the_same_solution(m, n):
    """The normal equations of queries and those of tokens; columns that do not count have 0."""
    g = torch.Generator().manual_seed(m)
    p = torch.rand(2, m, n + 2, generator=g, dtype=torch.float64)
    p[:, :, n:] = 0
    e = torch.randn(2, m, 3, generator=g, dtype=torch.float64)
    got = ridge_rows(p, e, torch.tensor([n, n]), 0.2)
    for i in range(2):
        of = p[i, :, :n]
        strength = 0.2 * (of.T @ of).trace() / n
        eye = torch.eye(n, dtype=torch.float64)
        want = torch.linalg.solve(of.T @ of + strength * eye, of.T @ e[i])
        torch.testing.assert_close(got[i, :n], want)
        assert not got[i, n:].any()


STORAGE = {
    "16 bits, groups": (dict(), dict(kv_keep=0.4)),
    "tokens first": (dict(mask_scope="layer"), dict(token_keep=0.5, value_keep=0.5)),
    "one mask": (dict(mask_scope="shared"), dict(kv_keep=0.4)),
    "levels": (dict(), dict(kv_bytes=0.4)),
    "integers": (dict(key_bits=4, value_bits=4), dict(kv_keep=0.4)),
    "levels, keys tell": (dict(reconstructor="keys"), dict(kv_bytes=0.25)),
}


@pytest.mark.parametrize("how", STORAGE)
def test_only_values_change_and_rows_are_as_alone(how):
    """A cache with --refit holds the same keys, masks and bytes, other rows; a padded row of a
    batch reads as it does alone."""
    kv, budget = STORAGE[how]
    m = selecting(fold=how != "levels", **kv)
    X = tokens(3, 91, seed=4)
    caches = []
    for refit in (False, True):
        m.selector.set(config(**budget, refit=refit))
        caches.append(prefilled(m, X))
    assert caches[0].nbytes() == caches[1].nbytes()
    changed = set()
    for was, now in zip(caches[0].layers, caches[1].layers, strict=True):
        now = now.state_dict()
        changed |= {name for name, t in was.state_dict().items() if not torch.equal(t, now[name])}
    assert "rows" in changed and changed <= {"rows", "value_scale"}
    logits = run(m, config(**budget, refit=True), X, Y)[1]
    alone = run(m, config(**budget, refit=True), X[1:2, PAD[1] :], Y[1:2], None)[1]
    torch.testing.assert_close(logits[1], alone[0])


def test_queries_are_those_that_rounding_is_for():
    """The last queries turned as Prompt.moments turns them."""
    prompt, _ = a_prompt()
    q = turned_queries(prompt)  # (L, B, H, Q, D)
    real = prompt.real[:, None, :, None]
    q = torch.where(real, q, 0).unflatten(2, (HKV, -1))
    moment = torch.einsum("lbhnqd,lbhnqe->lbhde", q, q) / N_HEADS
    moment = moment / prompt.real.sum(-1)[:, None, None, None]
    torch.testing.assert_close(moment.float(), prompt.moments().float())


def test_what_cannot_be_refitted_is_refused():
    """In a line."""
    assert "refit_ridge=0" in error_line(SelectConfig, refit_ridge=0.0)
    m = selecting(prefill="routed")
    cfg = replace(m.selector.cfg, allocation="layer", refit=True)
    assert "refit with prefill=routed" in error_line(m.selector.set, cfg)
