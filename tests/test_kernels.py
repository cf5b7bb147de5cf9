"""Attention over packed values and appending by kernel, against oracles built from what was packed,
in float64.

On a GPU where there is one, else in Triton's interpreter. Outputs hold NaN before they are written,
and so does every slot that holds no token."""

from __future__ import annotations

import pytest
import torch
from helpers import coordinates, grouped_model, perturb_basis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
import kv_router
from config import KVConfig
from kernels import packed_attention
from storage import packed as packed_cache
from storage.append import append_tail
from storage.kernel_base import triton
from storage.layout import mask_to_bits, tile_size, top_k_mask
from storage.packed import PackedCache, SelectedCache
from storage.views import Packed, Sums, Tail, merged, packed_attention_ref

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
NAN = float("nan")


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Setting:
    """Packed tokens and a tail, drawn, and the same dense: k, z (B, Hkv, N, D), mask (B, Hkv, N,
    S), n (B, Hkv); W tail slots."""

    def __init__(self, B, Hkv, n, D, S, K, shared, lengths, W, first, count, T, dtype, seed):
        g = torch.Generator().manual_seed(seed)
        N = max(*lengths, 1)
        Hm = 1 if shared else Hkv
        d = D // S
        self.B = B
        self.Hkv = Hkv
        self.H = Hkv * n
        self.T = T
        self.D = D
        self.S = S
        self.W = W
        here = torch.arange(N) < torch.tensor(lengths).view(B, Hm, 1)  # (B, Hm, N)
        mask = (
            top_k_mask(torch.rand(B, Hm, N, S, generator=g), K)
            if K
            else torch.rand(B, Hm, N, S, generator=g) < torch.rand((), generator=g)
        )
        mask &= here.unsqueeze(-1)
        self.k, z = torch.randn(2, B, Hkv, N, D, generator=g).to(dtype)
        self.q = (2 * torch.randn(B, self.H, T, D, generator=g)).to(dtype)
        keys = []
        rows = []
        bits = []
        before = []
        tile_rows = []
        bases = torch.zeros(2, B, Hkv, dtype=torch.int64), torch.zeros(2, B, Hm, dtype=torch.int64)
        # nothing between segments may be read
        gap = [torch.full((3, D), NAN), torch.full((2, d), NAN)]
        for b in range(B):
            for h in range(Hkv):
                m = h % Hm
                length = lengths[b * Hm + h % Hm]
                keys += [gap[0], self.k[b, h, :length].float()]
                rows += [gap[1]]
                bases[0][0, b, h] = sum(len(x) for x in keys[:-1])
                bases[0][1, b, h] = sum(len(x) for x in rows)
                rows += [
                    z[b, h, t, s * d : (s + 1) * d][None].float()
                    for t in range(length)
                    for s in range(S)
                    if mask[b, m, t, s]
                ]
                if h < Hm:
                    bases[1][0, b, m] = sum(len(x) for x in bits)
                    bases[1][1, b, m] = len(tile_rows)
                    bits.append(mask_to_bits(mask[b, m, :length]))
                    total = 0
                    for t in range(length):
                        if t % tile_size(S) == 0:
                            tile_rows.append(total)
                        before.append(total - tile_rows[-1])
                        total += int(mask[b, m, t].sum())
        index = (
            (None, None)
            if K
            else (
                torch.tensor(before, dtype=torch.uint8),
                torch.tensor(tile_rows, dtype=torch.int32),
            )
        )
        n_packed = torch.tensor(lengths).view(B, Hm)
        held = int(n_packed.expand(-1, Hkv).sum())
        packed = Packed(
            torch.cat([*keys, gap[0]]).to(dtype),
            torch.cat([*rows, gap[1]]).to(dtype),
            torch.cat(bits),
            *index,
            n_packed,
            *bases[0],
            *bases[1],
            S,
            K,
            max(lengths),
            held,
            True,
        )
        self.packed = Packed(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in packed))
        self.mask = mask.expand(-1, Hkv, -1, -1)
        self.here = here.expand(-1, Hkv, -1)
        self.z = z * self.mask.repeat_interleave(d, -1)
        self.first = first
        self.count = count
        self.logit = 0.0  # the largest logit the oracle saw
        self.tail_k, self.tail_v = torch.randn(2, B, Hkv, W, D, generator=g).to(dtype)
        stored = [t.clone() for t in (self.tail_k, self.tail_v)]
        for b in range(B):
            for w in range(W):
                if (w - first[b]) % W >= count[b]:
                    stored[0][b, :, w] = NAN
                    stored[1][b, :, w] = NAN
        self.tail = Tail(
            *(t.to(DEVICE) for t in (*stored, torch.tensor(first), torch.tensor(count)))
        )

    def oracle(self, packed: bool = True, tail: bool = True, takes=None):
        """out (B, H, T, P, D), lse (B, H, T) in float64: a softmax for every query, over a list of
        the tokens it may read."""
        out = torch.zeros(self.B, self.H, self.T, len(takes or [None]), self.D, dtype=torch.float64)
        lse = torch.full((self.B, self.H, self.T), float("-inf"), dtype=torch.float64)
        for b in range(self.B):
            old = [(self.first[b] + i) % self.W for i in range(self.count[b])] if self.W else []
            for h in range(self.H):
                kv = h // (self.H // self.Hkv)
                for t in range(self.T):
                    seen = old[: max(0, self.count[b] - self.T + t + 1)] if tail else []
                    inside = self.here[b, kv] if packed else torch.zeros_like(self.here[b, kv])
                    k = torch.cat((self.k[b, kv][inside], self.tail_k[b, kv][seen])).double()
                    v = torch.cat((self.z[b, kv][inside], self.tail_v[b, kv][seen])).double()
                    if not len(k):
                        continue
                    s = k @ self.q[b, h, t].double() / self.D**0.5
                    self.logit = max(self.logit, s.abs().max().item())
                    lse[b, h, t] = s.logsumexp(0)
                    p = (s - lse[b, h, t]).exp()
                    for i, take in enumerate(takes or [None]):
                        used = torch.ones(len(k), dtype=torch.bool)
                        if take is not None:
                            used = torch.cat(
                                (take(self.mask[b, kv][inside]), torch.full((len(seen),), i == 0))
                            )
                        out[b, h, t, i] = (p * used) @ v
        return (out if takes else out[..., 0, :]), lse


@st.composite
def drawn(draw, sums: bool = False):
    """A Setting: odd sizes, ragged lengths with 0 and 1, a ring tail in any position; with sums,
    each of which has its rows of queries, fewer queries and segments."""
    B = draw(st.integers(1, 2))
    Hkv = draw(st.integers(1, 2 if sums else 3))
    n = draw(st.sampled_from([1, 2, 3] if sums else [1, 2, 3, 4, 8]))
    S = draw(st.sampled_from([2, 4, 8] if sums else [1, 2, 4, 8, 16, 32, 64]))
    D = draw(st.sampled_from([D for D in (16, 24, 32, 48, 64, 80, 128) if D % S == 0]))
    shared = draw(st.booleans())
    K = draw(st.sampled_from([0, max(1, S // 2), draw(st.integers(1, S))]))
    length = st.sampled_from([0, 1, 5, 31, 32, 33, 64, 65, 90, 140])
    lengths = draw(
        st.lists(length, min_size=B * (1 if shared else Hkv), max_size=B * (1 if shared else Hkv))
    )
    W = draw(st.sampled_from([1, 3, 8, 40]))
    T = draw(st.sampled_from([1, 1, 3] if sums else [1, 1, 2, 5]))
    first = draw(st.lists(st.integers(0, 2 * W), min_size=B, max_size=B))
    count = draw(st.lists(st.integers(0, W), min_size=B, max_size=B))
    return Setting(
        B,
        Hkv,
        n,
        D,
        S,
        K,
        shared,
        lengths,
        W,
        first,
        count,
        T,
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 10**6)),
    )


def check_error(got, plain, want, dtype, logit: float = 0.0):
    """At most twice the plain version's error, plus one unit in the last place of the largest
    output, plus what rounding the largest logit in float32 does to its weight (the plain version's
    error is sometimes small by luck)."""
    got = got.cpu().double()
    plain = plain.cpu().double()
    allowed = (
        2 * (plain - want).abs().max()
        + (torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * logit) * want.abs().max()
        + 1e-30
    )
    assert got.isfinite().all() and (got - want).abs().max() <= allowed, (
        (got - want).abs().max(),
        allowed,
    )


@slow
@given(
    case=drawn(),
    chunk=st.sampled_from([0, 16, 32, 64]),
    parts=st.sampled_from(["both", "packed", "tail"]),
)
def test_attention_equals_the_oracle(case, chunk, parts):
    """Any shape, masks, lengths, ring, queries, number of pieces: within the error of the plain
    version; nothing to read gives 0 and -inf."""
    packed = None if parts == "tail" else case.packed
    tail = None if parts == "packed" else case.tail
    out, lse = packed_attention(case.q.to(DEVICE), packed, tail, impl="triton", chunk=chunk)
    plain, plain_lse = packed_attention_ref(case.q.to(DEVICE), packed, tail and finite(tail))
    want, want_lse = case.oracle(packed is not None, tail is not None)
    check_error(out, plain, want, case.q.dtype, case.logit)
    empty = want_lse == float("-inf")
    assert torch.equal(lse.cpu() == float("-inf"), empty) and not out.cpu()[empty].any()
    check_error(
        lse.cpu().masked_fill(empty, 0),
        plain_lse.cpu().masked_fill(empty, 0),
        want_lse.masked_fill(empty, 0),
        torch.float32,
        case.logit,
    )


def finite(tail: Tail) -> Tail:
    """The tail with zeros for NaN: the plain version multiplies what it does not read by 0."""
    return tail._replace(k=tail.k.nan_to_num(), v=tail.v.nan_to_num())


@slow
@given(case=drawn(), data=st.data())
def test_reference_equals_the_oracle(case, data):
    """packed_attention_ref in float64, to 1e-12, with sums too."""
    p = case.packed
    t = finite(case.tail)
    p = p._replace(keys=p.keys.double(), rows=p.rows.double())
    t = t._replace(k=t.k.double(), v=t.v.double())
    q = case.q.double().to(DEVICE)
    for takes in (
        None,
        [lambda m: m[:, 0] | True, lambda m: ~m[:, 0], lambda m: m[:, min(1, m.size(1) - 1)]],
    ):
        second = 1 << min(1, case.S - 1)
        sums = takes and Sums(
            torch.tensor([0, 1, second], device=DEVICE), torch.tensor([0, 0, second], device=DEVICE)
        )
        (out, lse) = packed_attention_ref(q, p, t, sums)
        (want, want_lse) = case.oracle(takes=takes)
        assert (out.cpu() - want).abs().max() < 1e-12 * max(1, want.abs().max()) and torch.allclose(
            lse.cpu(), want_lse, rtol=1e-12, atol=1e-12
        )


@settings(slow, max_examples=slow.max_examples // 2)
@given(case=drawn(sums=True), chunk=st.sampled_from([0, 32]))
def test_sums_take_what_they_say(case, chunk):
    """One sum over all tokens, one per dropped group, and one per mask pattern seen: each takes its
    tokens, and only the first the tail."""
    S = case.S
    patterns = sorted({int(x) for x in mask_to_bits(case.mask).flatten().tolist()})[:3]
    takes = [
        lambda m: torch.ones(len(m), dtype=torch.bool),
        *(lambda m, g=g: ~m[:, g] for g in range(S)),
        *(lambda m, w=w: mask_to_bits(m) == w for w in patterns),
    ]
    select = torch.tensor(
        [0, *(1 << g for g in range(S)), *[(1 << S) - 1] * len(patterns)], device=DEVICE
    )
    sums = Sums(select, torch.tensor([0] * (S + 1) + patterns, device=DEVICE))
    out, _ = packed_attention(
        case.q.to(DEVICE), case.packed, case.tail, sums, impl="triton", chunk=chunk
    )
    plain, _ = packed_attention_ref(case.q.to(DEVICE), case.packed, finite(case.tail), sums)
    check_error(out, plain, case.oracle(takes=takes)[0], case.q.dtype, case.logit)


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


@pytest.mark.parametrize("change", ["mask", "row", "key", "count", "order"])
def test_the_oracle_notices(change):
    """One bit, one row offset, one key, one tail slot, one causal step off: the comparison
    fails."""
    case = simple(T=3)
    p = case.packed
    t = case.tail
    q = case.q.to(DEVICE)
    if change == "mask":
        p = p._replace(bits=p.bits ^ 1)
    elif change == "row":
        p = p._replace(
            before=p.before + (torch.arange(len(p.before), device=DEVICE) == 9).to(torch.uint8)
        )
    elif change == "key":
        p = p._replace(
            token_base=p.token_base + torch.tensor([[0, -1]], device=DEVICE),
            keys=p.keys.nan_to_num(),
        )
    elif change == "count":
        t = finite(t)._replace(count=t.count + 1)
    else:
        q = q.roll(1, 2)
    out, _ = packed_attention(q, p._replace(rows=p.rows.nan_to_num()), t, impl="triton", chunk=32)
    with pytest.raises(AssertionError):
        check_error(
            out,
            packed_attention_ref(case.q.to(DEVICE), case.packed, finite(case.tail))[0],
            case.oracle()[0],
            torch.float32,
            case.logit,
        )


def test_ragged_segments_are_cut_end_to_end():
    """Very different lengths take the path that lays all pieces in a row (counted here), equal ones
    the other; both give the oracle's result."""
    for lengths, W in (((350, 5, 40, 3), 4), ((130, 130, 130, 130), 4)):
        case = simple(lengths, W, Hkv=4, first=[1], count=[3], n=1)
        seen = []
        launch = kernels._attention_kernel

        class Spy:
            def __getitem__(self, grid, launch=launch, seen=seen):
                seen.append(grid)
                return launch[grid]

        kernels._attention_kernel = Spy()
        try:
            out, _ = packed_attention(
                case.q.to(DEVICE), case.packed, case.tail, impl="triton", chunk=64
            )
        finally:
            kernels._attention_kernel = launch
        assert (seen[0][1] == 1) == (lengths[0] == 350) and (
            lengths[0] != 350 or seen[0][0] < 4 * 6
        )
        check_error(
            out,
            packed_attention_ref(case.q.to(DEVICE), case.packed, finite(case.tail))[0],
            case.oracle()[0],
            torch.float32,
            case.logit,
        )


def test_keeping_everything_is_dense_attention_in_any_order_and_number_of_pieces():
    """All groups of all tokens: PyTorch's dense attention; batch rows in another order give the
    same rows; so does every chunk."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 2, 50, 32, generator=g).to(DEVICE)
    q = torch.randn(3, 6, 1, 32, generator=g).to(DEVICE)
    cache = SelectedCache(3, 100, 2, 32, 4, 2, k)
    everything = torch.ones(3, 2, 50, 4, dtype=torch.bool, device=DEVICE)
    cache.pack(k, v, everything[..., 0], everything, everything[:, 0, :, 0])
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=True
    )
    outs = [
        packed_attention(q, cache.packed(), None, impl="triton", chunk=c)[0]
        for c in (0, 16, 48, 1000)
    ]
    assert all((o - want).abs().max() < 2e-6 for o in outs)
    turned = cache.slice([2, 0, 1])
    assert (
        packed_attention(q[[2, 0, 1]], turned.packed(), None, impl="triton", chunk=48)[0]
        - outs[2][[2, 0, 1]]
    ).abs().max() < 1e-6


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
    out, lse = packed_attention(case.q.to(DEVICE), case.packed, case.tail, impl="triton", chunk=16)
    plain = packed_attention_ref(case.q.to(DEVICE), case.packed, finite(case.tail))[0]
    (want, want_lse) = case.oracle()
    check_error(out, plain, want, torch.float32)
    assert (lse.cpu() - want_lse).abs().max() < 1e-5


@pytest.mark.parametrize("chunk", [0, 32])
def test_rows_of_a_batch_do_not_influence_each_other(chunk):
    """Other queries, keys, values and tail in row 1, infinite ones too: row 0 stays the same, bit
    for bit."""
    case = simple((70, 33, 41, 90), B=2, first=[5, 2], count=[6, 7])
    q = case.q.to(DEVICE)
    p = case.packed
    t = case.tail
    before = packed_attention(q, p, t, impl="triton", chunk=chunk)
    q = q.clone()
    keys = p.keys.clone()
    tail_v = t.v.clone()
    q[1] = 3 - q[1]
    tail_v[1] = float("inf")
    keys[int(p.token_base[1, 0]) :] *= -2
    after = packed_attention(
        q, p._replace(keys=keys), t._replace(v=tail_v), impl="triton", chunk=chunk
    )
    assert (
        torch.equal(before[0][0], after[0][0])
        and torch.equal(before[1][0], after[1][0])
        and not torch.equal(before[1][1], after[1][1])
    )


@pytest.mark.parametrize("T", [1, 4])
def test_merged_is_one_softmax(T):
    """Packed and tail read apart and merged equal both read at once; a side that is empty changes
    nothing, two empty ones give 0."""
    case = simple(T=T)
    q = case.q.to(DEVICE)
    a = packed_attention(q, case.packed, None, impl="triton")
    b = packed_attention(q, None, case.tail, impl="triton")
    assert (
        merged(a, b) - packed_attention(q, case.packed, case.tail, impl="triton")[0]
    ).abs().max() < 1e-6
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], float("-inf"))
    assert (
        torch.equal(merged(a, nothing), a[0])
        and torch.equal(merged(nothing, b), b[0])
        and not merged(nothing, nothing).any()
    )


# ----------------------------------------------------------------------------- appending


@pytest.mark.parametrize(
    "S, K, tail, block, scope, given_scores",
    [
        (4, 2, 0, 1, "head", False),
        (4, 1, 0, 3, "layer", False),
        (8, 3, 4, 1, "head", True),
        (16, 8, 2, 4, "layer", True),
        (32, 5, 1, 2, "head", False),
        (2, 1, 5, 1, "head", False),
        (64, 64, 3, 2, "head", False),
    ],
)
@pytest.mark.parametrize("encoded", [False, True])
def test_append_token_leaves_what_append_leaves(S, K, tail, block, scope, given_scores, encoded):
    """Token by token from ragged lengths: the same counts, masks, keys, rows and tail (rows of
    encoded values to rounding)."""
    if encoded and S not in (4, 16):
        pytest.skip("two sizes are enough for the maps")
    g = torch.Generator().manual_seed(S)
    B = 2
    Hkv = 3
    D = 32 if encoded else 64
    T = 21
    more = 8
    cfg = KVConfig(n_groups=S, topk_groups=K, mask_scope=scope, kv_tail=tail, kv_tail_block=block)
    k, v = torch.randn(2, B, Hkv, T + more, D, generator=g).to(DEVICE)
    enc = torch.randn(Hkv, D, D, generator=g).to(DEVICE) / 8 if encoded else None
    Hm = Hkv if scope == "head" else 1
    scores = torch.randn(B, Hm, T + more, S, generator=g).to(DEVICE) if given_scores else None

    def encode(x: torch.Tensor) -> torch.Tensor:
        return x @ enc if encoded else x

    def masks(a: int, b: int) -> torch.Tensor:
        if scores is not None:
            return top_k_mask(scores[:, :, a:b], K)
        return top_k_mask(kv_router.group_energy(encode(v[:, :, a:b]), S, Hm), K)

    caches = [PackedCache(B, T + more, Hkv, D, cfg, K, k) for _ in range(2)]
    for c in caches:
        c.append(k[:, :, :T], v[:, :, :T], masks(0, T), torch.tensor([0, 5], device=DEVICE), encode)
    by_append, by_token = caches
    for t in range(T, T + more):
        by_append.append(
            k[:, :, t : t + 1],
            v[:, :, t : t + 1],
            masks(t, t + 1),
            torch.zeros(B, dtype=torch.int64, device=DEVICE),
            encode,
        )
        by_token.append_token(
            k[:, :, t : t + 1],
            v[:, :, t : t + 1],
            None if scores is None else scores[:, :, t].contiguous(),
            enc,
        )
        assert torch.equal(by_append.n_packed, by_token.n_packed) and torch.equal(
            by_append.n_tail, by_token.n_tail
        )
    assert int(by_token.n_packed.max()) > T - tail
    for name, a in by_append.tensors().items():
        b = getattr(by_token, name)
        assert (
            torch.allclose(a, b, atol=1e-4) if name == "rows" and encoded else torch.equal(a, b)
        ), name


def test_append_token_prefers_the_lower_of_equal_groups():
    """All norms equal: the first K groups."""
    cache = PackedCache(
        1,
        8,
        1,
        16,
        KVConfig(n_groups=4, topk_groups=2, kv_tail=0),
        2,
        torch.zeros((), device=DEVICE),
    )
    cache.append_token(
        torch.ones(1, 1, 1, 16, device=DEVICE), torch.ones(1, 1, 1, 16, device=DEVICE), None, None
    )
    assert cache.bits[0] == 0b0011


@pytest.mark.parametrize("split", [True, False])
def test_append_tail_equals_its_reference(split):
    """Any slot, wrapped around, keys and values of strides of their own, the last of the values not
    always 1."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(3, 1, 2, 24, generator=g).to(DEVICE).transpose(1, 2)  # (3, 2, 1, 24) views
    wide = torch.randn(3, 2, 1, 48, generator=g).to(DEVICE)
    v = wide[..., 1::2] if split else wide[..., 24:]
    assert k.stride()[:2] != v.stride()[:2] and (v.stride(-1) == 1) != split
    first = torch.tensor([0, 9, 3], device=DEVICE)
    count = torch.tensor([1, 4, 5], device=DEVICE)
    tails = [
        Tail(
            torch.zeros(3, 2, 5, 24, device=DEVICE),
            torch.zeros(3, 2, 5, 24, device=DEVICE),
            first,
            count,
        )
        for _ in range(2)
    ]
    for tail, impl in zip(tails, ("triton", "torch"), strict=True):
        append_tail(tail, k, v, impl)
    assert torch.equal(tails[0].k, tails[1].k) and torch.equal(tails[0].v, tails[1].v)
    assert torch.equal(tails[0].k[1, :, 2], k[1, :, 0]) and torch.equal(
        tails[0].v[2, :, 2], v[2, :, 0]
    )
    assert int((tails[0].k != 0).sum()) == 3 * 2 * 24


# -------------------- reconstructors over sums


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    "setting",
    [
        dict(reconstructor="mlp"),
        dict(),
        dict(learn_basis=True),
        dict(topk_groups=4),
    ],
    ids=["mlp", "zero", "maps", "whole"],
)
def test_attend_packed_reads_rebuilt_values(setting, fold):
    """Attention over packed values with sums equals dense attention over values rebuilt one by one,
    float64, with a whole tail."""
    model = grouped_model(fold=fold, mask_scope="head", prefill="exact", kv_tail=3, **setting)
    path = next(iter(kv_router.paths(model).values()))
    if path.cfg.learn_basis and not fold:
        perturb_basis(path)
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 3, 29, 16, generator=g, dtype=torch.float64)
    q = torch.randn(2, 6, 1, 16, generator=g, dtype=torch.float64)
    cache = path.new_cache(2, 40, k)
    z = path.encode(v)
    assert torch.allclose(z, coordinates(path, v))
    mask = top_k_mask(torch.randn(2, 3, 29, 4, generator=g), path.k)
    with torch.no_grad():
        cache.append(k, v, mask, torch.tensor([0, 4]), path.encode)
        got = path.attend_packed(q, cache.packed(), cache.whole())
        kept = z * mask.repeat_interleave(4, -1)
        read = (
            kept
            if path.k == 4
            else path.decode(
                torch.where(
                    mask.repeat_interleave(4, -1), kept, path.reconstructor.rebuild(kept, mask)
                )
            )
        )
        for b, pad in enumerate((0, 4)):
            values = torch.cat((read[b, :, pad:26], v[b, :, 26:]), 1)
            want = torch.nn.functional.scaled_dot_product_attention(
                q[b : b + 1], k[b : b + 1, :, pad:], values[None], enable_gqa=True
            )
            assert (got[b] - want[0]).abs().max() < 1e-10
    assert packed_cache.compressed(torch.tensor(29), 3, 1) == 26
