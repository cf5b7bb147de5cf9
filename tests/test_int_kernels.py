"""Attention over integers and the forming of blocks, by kernel, against the plain versions: in
words, byte by byte, and which of the two reads what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from views import finite, normal, packed_view, to_device, window_view

from kernels import append_packed, packed_attention
from storage.integers import attention, unpack, words
from storage.integers.format import IntFormat, Ints, quantise_keys, quantise_values
from storage.kernel_base import jit, tl, triton
from storage.layout import (
    PackedView,
    WindowView,
    cdiv,
    mask_dtype,
    packed_attention_ref,
    top_k_mask,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.float32]
pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")


class Context:
    """Random tokens in integers, ragged, and five whole ones after them. K: groups of every token,
    0 where they are counted."""

    def __init__(
        self,
        key_bits: int,
        value_bits: int,
        Hm: int,
        *,
        B: int = 2,
        Hkv: int = 3,
        N: int = 75,
        D: int = 32,
        S: int = 4,
        K: int = 0,
        block: int = 32,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        g = torch.Generator().manual_seed(seed)
        k, z = normal(2, B, Hkv, N, D, seed=seed).to(dtype)
        lengths = torch.randint(0, N + 1, (B, Hm), generator=g)
        if K:
            lengths = lengths.clamp_min(block) // block * block
            mask = top_k_mask(torch.rand(B, Hm, N, S, generator=g), K)
        elif value_bits:
            mask = torch.rand(B, Hm, N, S, generator=g) < 0.7
        else:
            mask = torch.randint(0, 4, (B, Hm, N, S), generator=g, dtype=torch.uint8)
        fmt = IntFormat(key_bits, value_bits, block, torch.rand(Hkv, D, generator=g) + 0.5)
        self.packed = to_device(packed_view(k, z, mask, lengths, K, fmt), DEVICE)
        window = normal(2, B, Hkv, 7, D, seed=seed + 2).to(dtype)
        self.window = to_device(window_view(*window, [3] * B, [5] * B), DEVICE)
        self.dtype = dtype
        self.Hkv = Hkv
        self.B = B
        self.D = D

    def queries(self, n: int, T: int, seed: int = 5) -> torch.Tensor:
        q = 2 * normal(self.B, self.Hkv * n, T, self.D, seed=seed)
        return q.to(DEVICE, self.dtype)


def check(got, plain, want, dtype) -> None:
    """The rule of every kernel: at most twice the plain version's error, plus one unit in the last
    place of the largest output, plus what float32 logits of 50 lose."""
    got = got.cpu().double()
    plain = plain.cpu().double()
    rounding = torch.finfo(dtype).eps + 100 * torch.finfo(torch.float32).eps
    error = (got - want).abs().max()
    allowed = 2 * (plain - want).abs().max() + rounding * want.abs().max()
    assert error <= allowed, (error, allowed)


def expected(q: torch.Tensor, packed, window) -> tuple:
    """What the reference gives in float64, and in the dtype of q."""
    window = window and finite(window)
    wide = window and window._replace(k=window.k.double(), v=window.v.double())
    return packed_attention_ref(q.double(), packed, wide), packed_attention_ref(q, packed, window)


def compare(case: Context, q: torch.Tensor, chunk: int, part: str = "both") -> None:
    """packed_attention by kernel over a context, or over one part of it, against the reference in
    float64. Keys are rounded to q's type, so that is what log-sum-exps are measured in, too."""
    packed = None if part == "window" else case.packed
    window = None if part == "packed" else case.window
    want, plain = expected(q, packed, window)
    got = packed_attention(q, packed, window, impl="triton", chunk=chunk)
    check(got[0], plain[0], want[0].cpu(), q.dtype)
    there = want[1] > float("-inf")
    assert torch.equal(got[1] > float("-inf"), there)
    if there.any():
        check(got[1][there], plain[1][there], want[1][there].cpu(), q.dtype)


class Spy:
    """Stands for a kernel and remembers its launches."""

    def __init__(self, kernel, launches: list):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        self.launches.append((self.kernel.__name__, grid))
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch) -> list:
    """Names and grids of the integer kernels that have been launched, in order."""
    out = []
    for module, name in (
        (words, "_word_attention_kernel"),
        (attention, "_byte_attention_kernel"),
    ):
        monkeypatch.setattr(module, name, Spy(getattr(module, name), out))
    return out


def expect(launches: list, kernel: str, dtype: torch.dtype = torch.float32) -> None:
    """That kernel ran and no other: "word" where this Triton has it and the type allows it."""
    if not attention.WORDS or dtype == torch.float16:
        kernel = "byte"
    assert {name for name, _ in launches} == {f"_{kernel}_attention_kernel"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("key_bits", "value_bits", "Hm", "D", "S", "n", "T", "chunk", "kernel"),
    [
        (4, 4, 3, 32, 4, 2, 1, 0, "word"),
        (8, 4, 1, 64, 8, 3, 3, 64, "word"),
        (4, 8, 3, 128, 16, 4, 1, 32, "word"),
        (4, 4, 3, 80, 2, 1, 2, 32, "word"),
        (4, 4, 1, 32, 8, 2, 1, 0, "byte"),
        (3, 2, 3, 48, 2, 1, 2, 32, "byte"),
        (2, 3, 1, 32, 4, 8, 3, 0, "byte"),
        (8, 8, 3, 40, 2, 1, 1, 32, "word"),
        (4, 0, 1, 32, 4, 4, 1, 32, "word"),
        (3, 0, 3, 64, 8, 2, 2, 0, "word"),
        (2, 0, 1, 32, 2, 1, 1, 32, "word"),
        (3, 3, 3, 64, 4, 3, 1, 32, "word"),
        (2, 2, 1, 80, 2, 2, 2, 0, "word"),
        (3, 2, 3, 96, 4, 1, 1, 0, "word"),
        (2, 3, 1, 96, 2, 3, 1, 32, "word"),
        (3, 3, 3, 128, 4, 1, 1, 0, "word"),
        (3, 0, 3, 48, 4, 2, 1, 0, "byte"),
        (4, 0, 3, 64, 16, 1, 1, 64, "word"),
        (4, 0, 3, 48, 4, 2, 1, 32, "byte"),
        (8, 0, 1, 128, 8, 3, 2, 0, "word"),
        (4, 0, 3, 64, 2, 4, 1, 0, "word"),
    ],
)
def test_attention_reads_counted_rows_of_integers(
    key_bits, value_bits, Hm, D, S, n, T, chunk, kernel, dtype, launches
):
    """Counted rows, masks shared or not, any bits and levels, more rows of queries than a product
    takes, one piece and several: in words where rows fill words, else byte by byte."""
    case = Context(key_bits, value_bits, Hm, D=D, S=S, dtype=dtype)
    compare(case, case.queries(n, T), chunk)
    expect(launches, kernel, dtype)


@st.composite
def contexts(draw):
    """A Context of any bits, and what asks it: odd sizes, groups, heads, blocks, pieces, lengths
    from none to several blocks."""
    key_bits = draw(st.sampled_from([8, 4, 4, 3, 2]))
    value_bits = draw(st.sampled_from([8, 4, 4, 3, 2, 0]))
    D = draw(st.sampled_from([16, 24, 32, 40, 48, 64, 80, 128]))
    fill = {8: 1, 4: 2, 3: 8, 2: 4, 0: 4}[value_bits]  # numbers that fill bytes
    groups = [S for S in (1, 2, 4, 8, 16) if D % S == 0 and D // S % fill == 0]
    S = draw(st.sampled_from(groups))
    Hkv = draw(st.integers(1, 3))
    case = Context(
        key_bits,
        value_bits,
        draw(st.sampled_from([1, Hkv])),
        B=draw(st.integers(1, 2)),
        Hkv=Hkv,
        D=D,
        S=S,
        N=draw(st.sampled_from([1, 17, 64, 75, 150])),
        block=draw(st.sampled_from([16, 32, 64])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 10**6)),
    )
    n = draw(st.sampled_from([1, 2, 3, 4, 8]))
    T = draw(st.sampled_from([1, 1, 2, 5]))
    q = case.queries(n, T, seed=draw(st.integers(0, 99)))
    chunk = draw(st.sampled_from([0, 16, 64]))
    return case, q, chunk, draw(st.sampled_from(["both", "both", "packed", "window"]))


@settings(deadline=None, derandomize=True, max_examples=60 if CUDA else 25)
@given(case=contexts())
def test_attention_over_integers_of_any_shape(case):
    """Any shape: within the error of the plain version."""
    compare(*case)


@pytest.mark.parametrize(
    "change", ["nothing", "code", "step", "middle", "mask", "key block", "value row"]
)
@pytest.mark.parametrize(("value_bits", "S"), [(4, 4), (3, 4), (3, 8), (0, 4)])
def test_the_comparison_notices(change, value_bits, S):
    """One code of a key, one step or middle of a value, one bit of a mask, one base off by one: the
    comparison fails, in words and in bytes."""
    if change == "middle" and value_bits == 0:
        pytest.skip("levels have no middle")
    case = Context(4, value_bits, 3, D=64, S=S, seed=1)
    q = case.queries(2, 1)
    p = case.packed
    n = int(p.n[0, 0])
    assert n > 40
    want, plain = expected(q, p, case.window)
    k = p.unpack(torch.float64)[0][0, 0, :n]
    # the token that the first query attends to most
    token = int(p.token_base[0, 0] + (k @ q[0, 0, 0].double()).argmax())
    if change == "code":
        p.keys[token] ^= 0x77
    elif change == "step":
        p.ints.value_scale[token, 0] *= 1.5
    elif change == "middle":
        p.ints.value_scale[token, 1] += 0.5
    elif change == "mask":
        p.bits[token] ^= 1
    elif change == "key block":
        p.ints.block_base[0, 0] += 1
    elif change == "value row":
        p.row_base[0, 0] += 1
    got = packed_attention(q, p, case.window, impl="triton", chunk=32)[0]
    if change == "nothing":
        check(got, plain[0], want[0].cpu(), torch.float32)
        return
    with pytest.raises(AssertionError):
        check(got, plain[0], want[0].cpu(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("K", "bits", "D", "n", "T"),
    [
        (4, (4, 4), 32, 2, 2),
        (4, (4, 4), 128, 4, 1),
        (2, (4, 4), 64, 2, 2),
        (4, (8, 8), 24, 1, 3),
        (1, (8, 8), 32, 2, 2),
        (4, (8, 4), 64, 3, 1),
        (4, (4, 8), 48, 2, 1),
        (4, (4, 4), 32, 5, 2),
        (3, (2, 2), 32, 3, 1),
        (4, (3, 3), 64, 2, 1),
        (4, (2, 2), 16, 1, 2),
        (2, (3, 2), 96, 1, 1),
        (1, (4, 3), 64, 2, 3),
        (4, (3, 3), 32, 2, 1),
    ],
)
def test_attention_reads_blocks_of_integers(K, bits, D, n, T, dtype, launches):
    """Whole blocks, K groups of every token, one piece and several, window included, against the
    reference in float64."""
    case = Context(*bits, 3, D=D, K=K, block=16, dtype=dtype)
    assert len(case.packed.n.unique()) > 1  # rows of different lengths
    for chunk in (0, 32):
        compare(case, case.queries(n, T), chunk)
    # with 3 bits a row of 8 numbers has a byte of third bits
    expect(launches, "byte" if bits[1] == 3 and D < 64 else "word", dtype)


@pytest.mark.parametrize(("K", "kernel"), [(32, "word"), (5, "byte")])
def test_more_than_16_groups_are_read_in_words_where_all_are_kept(K, kernel, launches):
    """Rows that lie side by side fill words however many groups they are; those of tokens that drop
    some are read byte by byte, for words hold a row of sums for each of 16 groups."""
    case = Context(4, 4, 3, D=128, S=32, K=K)
    compare(case, case.queries(2, 1), 32)
    expect(launches, kernel)


@pytest.mark.parametrize("value_bits", [4, 0])
def test_ragged_contexts_of_integers_are_cut_end_to_end(value_bits, launches):
    """One head with all tokens, others with few: the grid has no programs for pieces that are not
    there, and the result is the reference's."""
    case = Context(4, value_bits, 4, B=1, Hkv=4, block=16)
    k, z = normal(2, 1, 4, 380, 32)
    mask = torch.full((1, 4, 380, 4), 2, dtype=torch.uint8)
    if value_bits:
        mask = mask > 0
    fmt = IntFormat(4, value_bits, 16, torch.ones(4, 32))
    lengths = torch.tensor([[380, 5, 40, 3]])
    case.packed = to_device(packed_view(k, z, mask, lengths, 0, fmt), DEVICE)
    compare(case, case.queries(2, 1), 64)
    expect(launches, "word")
    first, second, _ = launches[0][1]
    assert second == 1
    assert first < 4 * 7


@pytest.mark.parametrize(("value_bits", "K"), [(4, 0), (4, 2), (0, 0)])
def test_short_contexts_are_read_in_smaller_tiles(value_bits, K, launches, monkeypatch):
    """A GPU that has a warp for every FEW_TOKENS gets pieces half as long, which end inside of
    blocks whose keys share steps; both give the reference's result."""
    case = Context(4, value_bits, 3, D=64, N=150, K=K, block=64)
    parts = []
    for multiprocessors in (1000, 0):
        monkeypatch.setattr(attention, "multiprocessors", lambda _, n=multiprocessors: n)
        compare(case, case.queries(3, 1), 32)
        parts.append(launches[-1][1][1])
    expect(launches, "word")
    unit = attention.MANY_TOKENS
    longest = cdiv(case.packed.longest, unit) * unit  # from here on the window
    assert parts[1] == longest // unit + 1
    assert parts[0] > parts[1]


@jit
def _order_kernel(out_ptr, factor_ptr, BITS: tl.constexpr):
    """Store what sixteen joins, and field_factor of the fields of a byte."""
    n = tl.zeros([1], tl.float32)
    low = (n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7)
    high = (n + 8, n + 9, n + 10, n + 11, n + 12, n + 13, n + 14, n + 15)
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, tl.reshape(unpack.sixteen(*low, *high), [16]))
    field = tl.arange(0, 4)
    tl.store(factor_ptr + field, unpack.field_factor(field, BITS))


@pytest.mark.parametrize(
    ("bits", "factors"),
    [(2, [1, 4, 16, 64]), (3, [1, 1, 16, 16]), (4, [1, 16]), (8, [1])],
)
def test_outputs_of_ptx_are_joined_in_order_and_scaled_as_they_come(bits, factors):
    """What only the path of a GPU asks: sixteen outputs keep their order, and field_factor is how
    much too large PTX leaves a code (tests/test_compiled.py reads it)."""
    out = torch.zeros(16, device=DEVICE)
    factor = torch.zeros(4, device=DEVICE)
    _order_kernel[(1,)](out, factor, BITS=bits)
    assert out.tolist() == list(range(16))
    assert factor[: len(factors)].tolist() == factors


# -------------------- appending


class IntRing:
    """An empty packed cache of K groups per token in integers, for append_packed."""

    def __init__(self, B: int, Hkv: int, Hm: int, D: int, S: int, K: int, cap: int, W: int, fmt):
        def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=DEVICE)

        n = B * Hkv * cap
        segments = torch.arange(B * Hkv, device=DEVICE).view(B, Hkv)
        masks = torch.arange(B * Hm, device=DEVICE).view(B, Hm) * cap
        self.n_packed = zeros(B, dtype=torch.int64)
        self.n_window = zeros(B, dtype=torch.int64)
        self.window_bits = zeros(B, Hm, W, dtype=mask_dtype(S))
        ints = Ints(
            fmt,
            zeros(n // fmt.block, 2, D, dtype=torch.float16),
            segments * (cap // fmt.block),
            zeros(n, 2, dtype=torch.float16),
            torch.float32,
        )
        self.packed = PackedView(
            zeros(n, D * fmt.key_bits // 8),
            zeros(n * K, D // S * fmt.value_bits // 8),
            zeros(B * Hm * cap, dtype=mask_dtype(S)),
            None,
            None,
            self.n_packed[:, None].expand(-1, Hm),
            segments * cap,
            segments * cap * K,
            masks,
            masks,
            S,
            K,
            cap,
            n,
            ints=ints,
        )
        empty = zeros(2, B, Hkv, W, D, dtype=torch.float32)
        self.window = WindowView(empty[0], empty[1], self.n_packed, self.n_window)


@pytest.mark.parametrize(
    ("S", "K", "key_bits", "value_bits", "shared", "D"),
    [
        (4, 4, 4, 4, True, 32),
        (4, 2, 4, 4, False, 64),
        (8, 3, 8, 4, False, 32),
        (2, 1, 4, 8, True, 16),
        (4, 4, 2, 2, False, 32),
        (4, 3, 8, 2, True, 64),
        (4, 2, 3, 3, False, 64),
        (2, 2, 4, 3, True, 16),
        (8, 5, 3, 8, True, 32),
        (1, 1, 3, 3, False, 32),
        (16, 3, 2, 4, False, 64),
    ],
)
def test_append_packed_forms_the_blocks_of_the_format(S, K, key_bits, value_bits, shared, D):
    """Token by token past two blocks, one row skipping some: codes, steps, middles, masks and
    counts of each block are those of format.py, bit for bit; the rest is whole in the window."""
    B = 2
    Hkv = 3
    Hm = 1 if shared else Hkv
    block = 16
    keep = 2
    T = 41
    cap = 48
    fmt = IntFormat(key_bits, value_bits, block)
    k, v = normal(2, B, Hkv, T, D)
    energy = v.unflatten(-1, (S, -1)).square().sum(-1)
    mask = top_k_mask(energy.sum(1, keepdim=True) if shared else energy, K)
    skip = torch.zeros(T, B, dtype=torch.int64)
    skip[[0, 1, 20], 1] = 1
    ring = IntRing(B, Hkv, Hm, D, S, K, cap, keep + block - 1, fmt)
    for t in range(T):
        append_packed(
            ring.packed,
            ring.window,
            ring.window_bits,
            ring.n_packed,
            ring.n_window,
            k[:, :, t : t + 1].to(DEVICE),
            v[:, :, t : t + 1].to(DEVICE),
            keep,
            block,
            skip=skip[t].to(DEVICE),
        )
    assert ring.n_packed.tolist() == [32, 32]
    assert ring.n_window.tolist() == [9, 6]
    p = to_device(ring.packed, torch.device("cpu"))
    for b in range(B):
        seen = [t for t in range(T) if not skip[t, b]]
        for h in range(Hkv):
            tokens = seen[:32]
            own = mask[b, h % Hm, tokens]
            keys, key_scale = quantise_keys(k[b, h, tokens], torch.arange(32) // block, 2, key_bits)
            rows, value_scale = quantise_values(v[b, h, tokens], own, value_bits)
            at = int(p.token_base[b, h])
            first = at // block
            assert torch.equal(p.keys[at : at + 32], keys)
            assert torch.equal(p.ints.key_scale[first : first + 2], key_scale)
            assert torch.equal(p.ints.value_scale[at : at + 32], value_scale)
            assert torch.equal(p.rows[at * K : (at + 32) * K], rows[own])
            assert torch.equal(p.masks()[0][b, h % Hm], own)
            for i in range(32, len(seen)):
                slot = i % ring.window.k.size(2)
                assert torch.equal(ring.window.k[b, h, slot].cpu(), k[b, h, seen[i]])
                assert torch.equal(ring.window.v[b, h, slot].cpu(), v[b, h, seen[i]])
    assert not p.keys[32:cap].any()  # behind the blocks nothing has been written
