"""Attention over packed values by kernel, against oracles built from what was packed, in float64.

On a GPU where there is one, else in Triton's interpreter. Outputs hold NaN before they are written,
and so does every slot that holds no token."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from views import finite, packed_view, to_device, window_view

import kernels
from kernels import attend_view, packed_attention
from storage.kernel_base import triton
from storage.layout import (
    PackedView,
    WindowView,
    bits_to_mask,
    expand_mask,
    merge_softmax,
    packed_attention_ref,
    top_k_mask,
)
from storage.packing import pack_values

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# the interpreter truncates where a GPU rounds
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.float32]
pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")
# on a GPU most time is compiling
slow = settings(
    deadline=None,
    derandomize=True,
    max_examples=10 if CUDA else 25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Setting:
    """Packed tokens and a window, drawn, as views and the same dense: k, z (B, Hkv, N, D), mask (B,
    Hkv, N, S), here (B, Hkv, N) bool; W window slots, first None: slot 0."""

    def __init__(self, B, Hkv, n, D, S, K, shared, lengths, W, first, count, T, dtype, seed):
        g = torch.Generator().manual_seed(seed)
        N = max(*lengths, 1)
        Hm = 1 if shared else Hkv
        self.B = B
        self.Hkv = Hkv
        self.H = Hkv * n
        self.T = T
        self.D = D
        self.W = W
        lengths = torch.tensor(lengths).view(B, Hm)
        here = torch.arange(N) < lengths.unsqueeze(-1)  # (B, Hm, N)
        if K:
            mask = top_k_mask(torch.rand(B, Hm, N, S, generator=g), K)
        else:
            mask = torch.rand(B, Hm, N, S, generator=g) < torch.rand((), generator=g)
        mask &= here.unsqueeze(-1)
        self.k, z = torch.randn(2, B, Hkv, N, D, generator=g).to(dtype)
        self.q = (2 * torch.randn(B, self.H, T, D, generator=g)).to(dtype)
        self.packed = to_device(packed_view(self.k, z, mask, lengths, K), DEVICE)
        self.mask = mask.expand(-1, Hkv, -1, -1)
        self.here = here.expand(-1, Hkv, -1)
        self.z = z * expand_mask(self.mask, D)
        self.first = first or [0] * B
        self.count = count
        self.window_k, self.window_v = torch.randn(2, B, Hkv, W, D, generator=g).to(dtype)
        self.window = window_view(self.window_k, self.window_v, first, count)
        self.window = to_device(self.window, DEVICE)
        self.logit = 0.0  # the largest logit the oracle saw

    def tokens(self, b: int, h: int, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the window of KV head h that query t of T may read, oldest first."""
        number = range(max(0, self.count[b] - self.T + t + 1))
        slots = [(self.first[b] + i) % self.W for i in number]
        return self.window_k[b, h][slots], self.window_v[b, h][slots]

    def oracle(self, packed: bool = True, window: bool = True):
        """out (B, H, T, D), lse (B, H, T) in float64: a softmax for every query, over a list of the
        tokens it may read."""
        out = torch.zeros(self.B, self.H, self.T, self.D, dtype=torch.float64)
        lse = torch.full((self.B, self.H, self.T), float("-inf"), dtype=torch.float64)
        for b in range(self.B):
            for h in range(self.H):
                kv = h // (self.H // self.Hkv)
                inside = self.here[b, kv]
                for t in range(self.T):
                    read = []
                    if packed:
                        read.append((self.k[b, kv][inside], self.z[b, kv][inside]))
                    if window:
                        read.append(self.tokens(b, kv, t))
                    q = self.q[b, h, t].double()
                    out[b, h, t], lse[b, h, t], logit = softmax_by_hand(q, read)
                    self.logit = max(self.logit, logit)
        return out, lse


def softmax_by_hand(q: torch.Tensor, read: list[tuple[torch.Tensor, torch.Tensor]]):
    """What a query q (D,) float64 gets of lists of keys and values (n, D): out (D,), lse, and the
    largest logit."""
    k = torch.cat([k for k, _ in read]).double()
    v = torch.cat([v for _, v in read]).double()
    if not len(k):
        return torch.zeros_like(q), float("-inf"), 0.0
    logits = k @ q / len(q) ** 0.5
    lse = logits.logsumexp(0)
    return (logits - lse).exp() @ v, lse, logits.abs().max().item()


@st.composite
def drawn(draw):
    """A Setting: odd sizes, ragged lengths with 0 and 1, a window in any position."""
    B = draw(st.integers(1, 2))
    Hkv = draw(st.integers(1, 3))
    n = draw(st.sampled_from([1, 2, 3, 4, 8]))
    S = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    D = draw(st.sampled_from([D for D in (16, 24, 32, 48, 64, 80, 128) if D % S == 0]))
    shared = draw(st.booleans())
    K = draw(st.sampled_from([0, max(1, S // 2), draw(st.integers(1, S))]))
    segments = B * (1 if shared else Hkv)
    length = st.sampled_from([0, 1, 5, 31, 32, 33, 64, 65, 90, 140])
    lengths = draw(st.lists(length, min_size=segments, max_size=segments))
    W = draw(st.sampled_from([1, 3, 8, 40]))
    T = draw(st.sampled_from([1, 1, 2, 5]))
    first = draw(st.none() | st.lists(st.integers(0, 2 * W), min_size=B, max_size=B))
    count = draw(st.lists(st.integers(0, W), min_size=B, max_size=B))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 10**6))
    return Setting(B, Hkv, n, D, S, K, shared, lengths, W, first, count, T, dtype, seed)


def check_error(got, plain, want, dtype, logit: float = 0.0):
    """At most twice the plain version's error, plus one unit in the last place of the largest
    output, plus what rounding the largest logit in float32 does to its weight (the plain version's
    error is sometimes small by luck)."""
    got = got.cpu().double()
    plain = plain.cpu().double()
    rounding = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * logit
    allowed = 2 * (plain - want).abs().max() + rounding * want.abs().max() + 1e-30
    assert got.isfinite().all()
    assert (got - want).abs().max() <= allowed, ((got - want).abs().max(), allowed)


@slow
@given(
    case=drawn(),
    chunk=st.sampled_from([0, 16, 32, 64]),
    parts=st.sampled_from(["both", "packed", "window"]),
)
def test_attention_equals_the_oracle(case, chunk, parts):
    """Any shape, masks, lengths, ring, queries, number of pieces: within the error of the plain
    version; nothing to read gives 0 and -inf."""
    packed = None if parts == "window" else case.packed
    window = None if parts == "packed" else case.window
    q = case.q.to(DEVICE)
    out, lse = packed_attention(q, packed, window, impl="triton", chunk=chunk)
    plain, plain_lse = packed_attention_ref(q, packed, window and finite(window))
    want, want_lse = case.oracle(packed is not None, window is not None)
    check_error(out, plain, want, case.q.dtype, case.logit)
    empty = want_lse == float("-inf")
    assert torch.equal(lse.cpu() == float("-inf"), empty)
    assert not out.cpu()[empty].any()
    lse, plain_lse, want_lse = (t.cpu().masked_fill(empty, 0) for t in (lse, plain_lse, want_lse))
    check_error(lse, plain_lse, want_lse, torch.float32, case.logit)


@slow
@given(case=drawn())
def test_reference_equals_the_oracle(case):
    """packed_attention_ref in float64, to 1e-12."""
    packed = case.packed._replace(keys=case.packed.keys.double(), rows=case.packed.rows.double())
    window = finite(case.window)
    window = window._replace(k=window.k.double(), v=window.v.double())
    out, lse = packed_attention_ref(case.q.double().to(DEVICE), packed, window)
    want, want_lse = case.oracle()
    assert (out.cpu() - want).abs().max() < 1e-12 * max(1, want.abs().max())
    assert torch.allclose(lse.cpu(), want_lse, rtol=1e-12, atol=1e-12)


def simple(lengths=(70, 33), W=8, T=1, K=0, **kw) -> Setting:
    plain = dict(
        B=1,
        Hkv=2,
        n=3,
        D=32,
        S=4,
        K=K,
        shared=False,
        lengths=list(lengths),
        W=W,
        first=[5],
        count=[6],
        T=T,
        dtype=torch.float32,
        seed=3,
    )
    return Setting(**{**plain, **kw})


def compare(case: Setting, **how) -> None:
    """The kernel's result is the oracle's."""
    q = case.q.to(DEVICE)
    out, lse = packed_attention(q, case.packed, case.window, impl="triton", **how)
    plain = packed_attention_ref(q, case.packed, finite(case.window))[0]
    want, want_lse = case.oracle()
    check_error(out, plain, want, torch.float32, case.logit)
    assert (lse.cpu() - want_lse).abs().max() < 1e-5


@pytest.mark.parametrize("change", ["nothing", "mask", "row", "key", "count", "first", "order"])
def test_the_oracle_notices(change):
    """One bit, one row offset, one key, one window slot, one causal step off: the comparison
    fails."""
    case = simple(T=3)
    p = case.packed
    w = case.window
    if change == "mask":
        case.packed = p._replace(bits=p.bits ^ 1)
    elif change == "row":
        one = torch.arange(len(p.before), device=DEVICE) == 9
        case.packed = p._replace(before=p.before + one.to(torch.uint8))
    elif change == "key":
        off = torch.tensor([[0, -1]], device=DEVICE)
        case.packed = p._replace(token_base=p.token_base + off, keys=p.keys.nan_to_num())
    elif change == "count":
        case.window = finite(w)._replace(count=w.count + 1)
    elif change == "first":
        case.window = finite(w)._replace(first=w.first + 1)
    q = case.q.to(DEVICE)
    if change == "order":
        q = q.roll(1, 2)
    packed = case.packed._replace(rows=p.rows.nan_to_num())
    out, _ = packed_attention(q, packed, case.window, impl="triton", chunk=32)
    right = packed_attention_ref(case.q.to(DEVICE), p, finite(w))[0]
    if change == "nothing":
        check_error(out, right, case.oracle()[0], torch.float32, case.logit)
        return
    with pytest.raises(AssertionError):
        check_error(out, right, case.oracle()[0], torch.float32, case.logit)


class Spy:
    """Stands for a kernel and remembers the grids it is launched with."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def test_ragged_segments_are_cut_end_to_end(monkeypatch):
    """Very different lengths take the path that lays all pieces in a row (counted here), equal ones
    the other; both give the oracle's result."""
    for lengths in ((350, 5, 40, 3), (130, 130, 130, 130)):
        case = simple(lengths, 4, Hkv=4, first=[1], count=[3], n=1)
        with monkeypatch.context() as patch:
            spy = Spy(kernels._attention_kernel)
            patch.setattr(kernels, "_attention_kernel", spy)
            compare(case, chunk=64)
        first, second, _ = spy.grids[0]
        if lengths[0] == 350:
            assert second == 1
            assert first < 4 * 6
        else:
            assert (first, second) == (4, 3)


def test_keeping_everything_is_dense_attention_in_any_order_and_number_of_pieces():
    """All groups of all tokens: PyTorch's dense attention; batch rows in another order give the
    same rows; so does every chunk."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 2, 50, 32, generator=g)
    q = torch.randn(3, 6, 1, 32, generator=g).to(DEVICE)
    keep = torch.ones(3, 2, 50, 4, dtype=torch.bool)
    lengths = torch.full((3, 2), 50)
    view = to_device(packed_view(k, v, keep, lengths), DEVICE)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double().to(DEVICE), v.double().to(DEVICE), enable_gqa=True
    )
    outs = [packed_attention(q, view, None, "triton", chunk)[0] for chunk in (0, 16, 48, 1000)]
    assert all((out - want).abs().max() < 2e-6 for out in outs)
    turn = [2, 0, 1]
    turned = to_device(packed_view(k[turn], v[turn], keep, lengths), DEVICE)
    again = packed_attention(q[turn], turned, None, impl="triton", chunk=48)[0]
    assert (again - outs[2][turn]).abs().max() < 1e-6


def test_what_pack_values_packs_is_read_where_it_lies():
    """Segments without gaps, in tensors that end where the last one ends."""
    g = torch.Generator().manual_seed(1)
    k, z = torch.randn(2, 2, 2, 90, 32, generator=g).to(DEVICE)
    keep = (torch.rand(2, 2, 90, generator=g) < 0.6).to(DEVICE)
    mask = (torch.rand(2, 2, 90, 4, generator=g) < 0.5).to(DEVICE) & keep.unsqueeze(-1)
    parts = pack_values(k, z, keep, mask, "torch")
    n_packed = parts.n_packed.to(DEVICE)
    n_rows = parts.n_rows.to(DEVICE)
    token_base, row_base = (
        (n.flatten().cumsum(0) - n.flatten()).view(2, 2) for n in (n_packed, n_rows)
    )
    tiles = (n_packed.flatten() + 63) // 64
    tile_base = (tiles.cumsum(0) - tiles).view(2, 2)
    bases = (token_base, row_base, token_base, tile_base)
    held = int(n_packed.sum())
    view = PackedView(*parts[:5], n_packed, *bases, 4, 0, 90, held, True)
    q = torch.randn(2, 4, 1, 32, generator=g).to(DEVICE)
    out = packed_attention(q, view, None, impl="triton", chunk=32)[0].cpu()
    z = z * expand_mask(mask, 32)
    for b in range(2):
        for h in range(4):
            inside = keep[b, h // 2]
            read = [(k[b, h // 2][inside].cpu(), z[b, h // 2][inside].cpu())]
            want = softmax_by_hand(q[b, h, 0].double().cpu(), read)[0]
            assert (out[b, h, 0] - want).abs().max() < 1e-6


@pytest.mark.parametrize("S", [1, 2, 4, 8])
def test_rows_of_every_mask_are_found(S):
    """Each mask of up to 8 bits, one token of its own sequence: what is read are its groups, and
    zeros."""
    g = torch.Generator().manual_seed(0)
    B = 2**S
    k, z = torch.randn(2, B, 1, 1, 16, generator=g)
    mask = bits_to_mask(torch.arange(B), S).view(B, 1, 1, S)
    view = to_device(packed_view(k, z, mask, torch.ones(B, 1, dtype=torch.int64)), DEVICE)
    out = packed_attention(k.to(DEVICE), view, None, impl="triton")[0].cpu()
    assert torch.equal(out, z * expand_mask(mask, 16))


@pytest.mark.parametrize("growing", [True, False])
def test_more_pieces_than_one_round_of_merging_takes(growing):
    """A long segment in pieces of 16 is joined in several rounds; what a round found is scaled when
    a later one has the larger logits."""
    case = simple((610,), Hkv=1, n=2, D=256, K=2, T=2)
    # queries of ones: logits rise or fall with the token's number
    order = case.k.mean(-1).argsort(dim=-1, descending=not growing)[0, 0]
    assert 610 > 16 * (8192 // 256)
    case.q = torch.full_like(case.q, 2.0)
    case.k = case.k[:, :, order]
    at = int(case.packed.token_base)
    case.packed.keys[at : at + 610] = case.k[0, 0].to(DEVICE)
    compare(case, chunk=16)


@pytest.mark.parametrize("chunk", [0, 32])
def test_rows_of_a_batch_do_not_influence_each_other(chunk):
    """Other queries, keys, values and window in row 1, infinite ones too: row 0 stays the same, bit
    for bit."""
    case = simple((70, 33, 41, 90), B=2, first=[5, 2], count=[6, 7])
    q = case.q.to(DEVICE)
    p = case.packed
    w = case.window
    before = packed_attention(q, p, w, impl="triton", chunk=chunk)
    q = q.clone()
    keys = p.keys.clone()
    window_v = w.v.clone()
    q[1] = 3 - q[1]
    window_v[1] = float("inf")
    keys[int(p.token_base[1, 0]) :] *= -2
    p = p._replace(keys=keys)
    w = w._replace(v=window_v)
    after = packed_attention(q, p, w, impl="triton", chunk=chunk)
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was[0], now[0])
    assert not torch.equal(before[1][1], after[1][1])


@pytest.mark.parametrize("T", [1, 4])
def test_merge_softmax_is_one_softmax(T):
    """Packed tokens and window read apart and merged equal both read at once; a side that is empty
    changes nothing, two empty ones give 0."""
    case = simple(T=T)
    q = case.q.to(DEVICE)
    a = packed_attention(q, case.packed, None, impl="triton")
    b = packed_attention(q, None, case.window, impl="triton")
    both = packed_attention(q, case.packed, case.window, impl="triton")[0]
    assert (merge_softmax(a, b) - both).abs().max() < 1e-6
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], float("-inf"))
    assert torch.equal(merge_softmax(a, nothing), a[0])
    assert torch.equal(merge_softmax(nothing, b), b[0])
    assert not merge_softmax(nothing, nothing).any()


def test_the_example_of_the_chapter_holds():
    """The example in the docstring of kernels.py runs and says the truth."""
    text = kernels.__doc__
    begin = text.index("    q = torch")
    example = textwrap.dedent(text[begin : text.index("\n\n", begin)])
    code = [
        "import torch",
        "from kernels import append_window, packed_attention",
        "from storage.layout import PackedView, WindowView",
        example,
        "assert (out - want).abs().max() < 1e-6",
        "assert window.count.tolist() == [3]",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, check=True, timeout=120)


# -------------------- all that a cache shows


class View(NamedTuple):
    """As storage.cache.CacheView."""

    packed: tuple[PackedView, ...]
    window: WindowView | None
    sinks: WindowView | None


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "shown",
    ["packed", "window", "sinks", "packed window", "packed packed window sinks", "packed packed"],
)
def test_attend_view_reads_all_that_is_shown(shown, T, impl, monkeypatch):
    """Several packed parts, window and sinks: one softmax over all their tokens, in loops; sinks
    are seen by every query, the window up to its own token."""
    if impl == "triton":
        forced = packed_attention
        monkeypatch.setattr(
            kernels,
            "packed_attention",
            lambda q, p, w, **how: forced(q, p, w, impl="triton", **how),
        )
    cases = [
        simple((70, 33, 9, 40), B=2, T=T, first=[5, 2], count=[6, 7]),
        simple((20, 31, 0, 5), B=2, T=T, first=[0, 0], count=[3, 4], W=4, seed=4, shared=False),
    ]
    q = cases[0].q
    packed = [case for case, word in zip(cases, shown.split(), strict=False) if word == "packed"]
    window = cases[0] if "window" in shown else None
    sinks = cases[1] if "sinks" in shown else None
    view = View(
        tuple(case.packed for case in packed),
        window and finite(window.window),
        sinks and finite(sinks.window),
    )
    out, lse = attend_view(q.to(DEVICE), view)
    for b in range(2):
        for h in range(6):
            for t in range(T):
                kv = h // 3
                read = [(c.k[b, kv][c.here[b, kv]], c.z[b, kv][c.here[b, kv]]) for c in packed]
                if window:
                    read.append(window.tokens(b, kv, t))
                if sinks:
                    slots = slice(0, sinks.count[b])
                    read.append((sinks.window_k[b, kv, slots], sinks.window_v[b, kv, slots]))
                want, want_lse, _ = softmax_by_hand(q[b, h, t].double(), read)
                assert (out[b, h, t].cpu() - want).abs().max() < 2e-6
                assert abs(lse[b, h, t].cpu() - want_lse) < 1e-5


def test_attend_view_leaves_out_parts_without_capacity(monkeypatch):
    """A packed part that holds no slot costs no call; where there is nothing else, out is 0; one
    part alone is not merged."""
    case = simple()
    q = case.q.to(DEVICE)
    empty = PackedView.of_whole(*torch.zeros(2, 1, 2, 0, 32, device=DEVICE), case.packed.n * 0)
    calls = []
    right = kernels.packed_attention
    monkeypatch.setattr(
        kernels, "packed_attention", lambda *a, **how: calls.append(a) or right(*a, **how)
    )
    monkeypatch.setattr(kernels, "merge_softmax", None)
    window = finite(case.window)
    got = attend_view(q, View((empty, empty), window, None))
    assert len(calls) == 1
    assert calls[0][1] is None
    assert torch.equal(got[0], right(q, None, window)[0])
    got = attend_view(q, View((empty, case.packed), window, None))
    assert len(calls) == 2
    assert torch.equal(got[0], right(q, case.packed, window)[0])
    for view in (View((empty,), None, None), View((), None, None)):
        out, lse = attend_view(q, view)
        assert out.shape == q.shape
        assert not out.any()
        assert (lse == float("-inf")).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("heads", [(2, 1), (1, 2), (1, 4), (4, 1)])
def test_attend_view_reads_parts_of_other_head_counts(heads, impl, monkeypatch):
    """Experts' parts may have fewer heads than the window, the first of them too: every query head
    reads the head of each part that stands for it, in one softmax, in loops."""
    right = packed_attention
    monkeypatch.setattr(
        kernels, "packed_attention", lambda q, p, w, **how: right(q, p, w, impl=impl, **how)
    )
    window = simple((0,) * 4, Hkv=4, n=2, T=3)
    parts = []
    for seed, h in enumerate(heads):
        lengths = (40, 9, 21, 33)[:h]
        parts.append(simple(lengths, Hkv=h, n=8 // h, T=3, seed=seed))
    view = View(tuple(part.packed for part in parts), finite(window.window), None)
    out, lse = attend_view(window.q.to(DEVICE), view)
    for h in range(8):
        for t in range(3):
            read = [window.tokens(0, h // 2, t)]
            for part in parts:
                kv = h // (8 // part.Hkv)
                inside = part.here[0, kv]
                read.append((part.k[0, kv][inside], part.z[0, kv][inside]))
            want, want_lse, _ = softmax_by_hand(window.q[0, h, t].double(), read)
            assert (out[0, h, t].cpu() - want).abs().max() < 2e-6
            assert abs(lse[0, h, t].cpu() - want_lse) < 1e-5


@pytest.mark.parametrize("wanted", ["q", "keys", "rows", "k", "v"])
def test_attention_gives_gradients_where_they_are_wanted(wanted):
    """The kernel has no gradient: asked for one of any input, the reference runs, whatever impl
    says, and gives it. Without gradients the kernel runs, on the same tensors."""
    case = simple(T=3)
    packed = case.packed._replace(keys=case.packed.keys.nan_to_num())
    packed = packed._replace(rows=packed.rows.nan_to_num())
    window = finite(case.window)
    tensors = {
        "q": case.q.to(DEVICE),
        "keys": packed.keys,
        "rows": packed.rows,
        "k": window.k,
        "v": window.v,
    }
    x = tensors[wanted].requires_grad_(True)

    def attention(impl: str) -> torch.Tensor:
        return packed_attention(tensors["q"], packed, window, impl=impl)[0]

    (got,) = torch.autograd.grad(attention("triton").square().sum(), x)
    (want,) = torch.autograd.grad(attention("torch").square().sum(), x)
    assert want.any()
    assert torch.equal(got, want)
    with torch.no_grad():
        assert not torch.equal(attention("triton"), attention("torch"))
        assert (attention("triton") - attention("torch")).abs().max() < 1e-5


def test_few_zeros_are_kept_however_many_shapes_ask():
    """What stands in for no packed tokens is of the size asked, zero, and of one tensor for all
    sizes up to a power of 2."""
    kernels._zeros.cache_clear()
    for B in range(1, 40):
        for Hkv in (1, 3, 7):
            none = kernels._no_tokens(torch.ones(B, Hkv, 1, 4), Hkv)
            assert none.n.shape == (B, Hkv) and not none.n.any() and none.n.is_contiguous()
    assert kernels._zeros.cache_info().currsize == 10  # 1, 2, 4 ... 512
