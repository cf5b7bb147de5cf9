"""Soft caps on attention logits, in every kernel, its reference and what reads without a cache,
against a softmax number by number; and windows of layers that slide."""

from __future__ import annotations

import math

import pytest
import test_kernels
import torch
from test_int_kernels import DEVICE, Context, check
from test_kernels import check_error, finite, simple

import model
from kernels import attend_view, packed_attention
from model import attend, attend_masked, attention_mask
from selection.relevance import Prompt
from storage.cache import CacheView
from storage.cpu import packed_attention_cpu
from storage.kernel_base import triton
from storage.layout import packed_attention_ref, soft_cap

CAP = 1.7
needs_triton = pytest.mark.skipif(triton is None, reason="the kernels need triton")


def capped_by_hand(q: torch.Tensor, read: list, cap: float = CAP):
    """test_kernels.softmax_by_hand with capped logits, one by one."""
    k = torch.cat([k for k, _ in read]).double()
    v = torch.cat([v for _, v in read]).double()
    if not len(k):
        return torch.zeros_like(q), float("-inf"), 0.0
    logits = [float(key @ q) / math.sqrt(len(q)) for key in k]
    weights = [math.exp(cap * math.tanh(s / cap)) for s in logits]
    total = sum(weights)
    out = sum(w / total * row for w, row in zip(weights, v, strict=True))
    return out, math.log(total), max(map(abs, logits))


@pytest.fixture
def case(request, monkeypatch):
    """Packed tokens and a window whose oracle has capped logits."""
    monkeypatch.setattr(test_kernels, "softmax_by_hand", capped_by_hand)
    return simple(**request.param)


CASES = [dict(), dict(T=3), dict(K=2, T=2), dict(W=40, first=[30], count=[40])]
each_case = pytest.mark.parametrize("case", CASES, ids=str, indirect=True)


@each_case
@pytest.mark.parametrize("compute", [packed_attention_ref, packed_attention_cpu])
def test_plain_attention_caps_its_logits(case, compute):
    """The reference and what runs on a CPU, in float64, to 1e-12; far from what is not capped."""
    p = case.packed.__class__(*(t.cpu() if torch.is_tensor(t) else t for t in case.packed))
    p = p._replace(keys=p.keys.double(), rows=p.rows.double())
    w = finite(case.window.__class__(*(t.cpu() for t in case.window)))
    w = w._replace(k=w.k.double(), v=w.v.double())
    q = case.q.double()
    want, want_lse = case.oracle()
    out, lse = compute(q, p, w, CAP)
    assert (out - want).abs().max() < 1e-12 and (lse - want_lse).abs().max() < 1e-12
    assert (compute(q, p, w)[0] - want).abs().max() > 0.05


@needs_triton
@pytest.mark.parametrize(
    ("case", "chunk"), [*zip(CASES, (32, 0, 32, 0), strict=True)], ids=str, indirect=["case"]
)
def test_kernel_caps_its_logits(case, chunk):
    """The kernel over whole numbers, its pieces joined: the oracle's result."""
    q = case.q.to(DEVICE)
    out, lse = packed_attention(q, case.packed, case.window, "triton", chunk, CAP)
    plain = packed_attention_ref(q, case.packed, finite(case.window), CAP)[0]
    want, want_lse = case.oracle()
    check_error(out, plain, want, torch.float32, case.logit)
    assert (lse.cpu() - want_lse).abs().max() < 1e-5


@needs_triton
@pytest.mark.parametrize(
    ("key_bits", "value_bits", "K", "n", "T"),
    [(4, 4, 4, 2, 1), (8, 4, 2, 1, 2), (4, 4, 0, 3, 1), (3, 2, 0, 2, 3), (4, 0, 0, 2, 1)],
)
def test_integer_kernels_cap_their_logits(key_bits, value_bits, K, n, T):
    """In words, byte by byte and with levels: the reference in float64, which is the one above over
    what integers stand for; on a CPU to 1e-10."""
    case = Context(key_bits, value_bits, 1, K=K)
    q = case.queries(n, T)
    w = finite(case.window)
    wide = w._replace(k=w.k.double(), v=w.v.double())
    want, want_lse = packed_attention_ref(q.double(), case.packed, wide, CAP)
    plain = packed_attention_ref(q, case.packed, w, CAP)
    got = packed_attention(q, case.packed, case.window, "triton", 0, CAP)
    check(got[0], plain[0], want.cpu(), q.dtype)
    check(got[1], plain[1], want_lse.cpu(), q.dtype)
    if DEVICE.type == "cpu":
        out, lse = packed_attention_cpu(q.double(), case.packed, wide, CAP)
        assert (out - want).abs().max() < 1e-10 and (lse - want_lse).abs().max() < 1e-10
    assert (packed_attention_ref(q.double(), case.packed, wide)[0] - want).abs().max() > 0.01


def test_all_parts_of_a_view_are_capped():
    """Packed parts, window and sinks, read apart and joined: as one softmax over all of them."""
    case = simple(T=2)
    w = finite(case.window)._replace(first=None, count=torch.tensor([8], device=DEVICE))
    q = case.q.to(DEVICE)
    view = CacheView((case.packed, case.packed), w, w)
    got = attend_view(q, view, CAP)[0]
    k, z, _, valid = case.packed.unpack()
    there = valid[:, :, None].expand(-1, 2, 2, -1)
    later = torch.arange(8, device=DEVICE) <= 6 + torch.arange(2, device=DEVICE)[:, None]
    later = later.expand(1, 2, 2, 8)
    seen = torch.cat((there, there, later, torch.ones_like(later)), -1)
    keys = torch.cat((k, k, w.k, w.k), 2)
    values = torch.cat((z, z, w.v, w.v), 2)
    want = attend_masked(q, keys, values, seen.repeat_interleave(3, 1), CAP)
    assert (got - want).abs().max() < 1e-5


# -------------------- without a cache


@pytest.mark.parametrize("pad", [None, torch.tensor([0, 4])])
@pytest.mark.parametrize(
    ("T", "cap", "window"), [(9, CAP, 0), (9, 0.0, 4), (9, CAP, 4), (3, CAP, 4)]
)
def test_attend_equals_loops(T, cap, window, pad, monkeypatch):
    """The newest T of 9 tokens, in blocks of 2 queries: each reads what is not padding, not later
    and not further back than the window, with capped logits."""
    monkeypatch.setattr(model, "QUERY_BLOCK", 2)
    g = torch.Generator().manual_seed(1)
    k, v = 2 * torch.randn(2, 2, 2, 9, 6, generator=g, dtype=torch.float64)
    q = torch.randn(2, 4, T, 6, generator=g, dtype=torch.float64)
    got = attend(q, k, v, pad, cap, window)
    for b in range(2):
        first = 0 if pad is None else int(pad[b])
        for h in range(4):
            for i in range(T):
                at = 9 - T + i
                if at < first:
                    continue
                read = range(max(first, at + 1 - window if window else 0), at + 1)
                own = [(k[b, h // 2, [*read]], v[b, h // 2, [*read]])]
                want = capped_by_hand(q[b, h, i], own, cap or 1e6)[0]  # as good as none
                assert (got[b, h, i] - want).abs().max() < (1e-12 if cap else 1e-9)


def test_capped_attention_has_the_gradient_of_central_differences():
    """Of queries, keys and values, under a mask."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(1, h, 4, 2, generator=g, dtype=torch.float64, requires_grad=True)
        for h in (2, 1, 1)
    )
    mask = attention_mask(4, 4, None, "cpu", 3)
    assert torch.autograd.gradcheck(lambda *x: attend_masked(*x, mask, CAP), (q, k, v))


def test_relevance_sees_capped_attention():
    """The attention of a query region of 2 on a context of 5, as `observed` takes it: a mean of
    capped softmaxes, number by number."""
    g = torch.Generator().manual_seed(3)
    q = 3 * torch.randn(1, 4, 7, 8, generator=g)
    k = torch.randn(1, 2, 7, 8, generator=g)
    tables = (torch.ones(9, 4), torch.zeros(9, 4))
    prompt = Prompt([q[:, 0]], [q], [k], [k[:, :, :5]], 5, None, tables, cap=CAP)
    for h in range(2):
        want = torch.zeros(5, dtype=torch.float64)
        for head in (2 * h, 2 * h + 1):
            for t in (5, 6):
                logits = [float(k[0, h, j] @ q[0, head, t]) / 8**0.5 for j in range(t + 1)]
                weights = [math.exp(CAP * math.tanh(s / CAP)) for s in logits]
                want += torch.tensor(weights[:5]).double() / sum(weights) / 4
        assert (prompt.observed[0, 0, h] - want).abs().max() < 1e-6


def test_a_cap_is_odd_and_bounded():
    """cap tanh(s / cap): s near 0, never past the cap; 0 leaves logits as they are."""
    s = torch.tensor([-1e9, -3.0, -1e-6, 0.0, 1e-6, 3.0, 1e9], dtype=torch.float64)
    got = soft_cap(s, CAP)
    assert torch.equal(got, -got.flip(0)) and got.abs().max() == CAP
    want = torch.tensor([CAP * math.tanh(x / CAP) for x in s.tolist()], dtype=torch.float64)
    assert (got - want).abs().max() < 1e-15
    assert (got[2:5] - s[2:5]).abs().max() < 1e-15 and torch.equal(soft_cap(s, 0.0), s)
