"""Selection under a budget and packing: each reference against Python loops, each kernel against
its reference, bit for bit.

On a GPU where there is one, else in Triton's interpreter. New tensors hold NaN, True or the largest
integer before they are written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import packing
from storage.kernel_base import triton, use_triton
from storage.layout import PackedView, cdiv, expand_mask, mask_dtype, starts, tile_size
from storage.packing import (
    PackedValues,
    pack_values,
    pack_values_ref,
    select_joint,
    select_top_m,
    take_within,
    take_within_ref,
)

pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

few, many = (settings(deadline=None, max_examples=n) for n in (25, 100))


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Fill what torch.empty returns, so that an entry never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def small_blocks():
    """Blocks of 32 entries in chunks of 16: a few dozen entries span several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SPAN", 32)
        patch.setattr(packing, "CHUNK", 16)
        yield


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    float("inf"),
    float("-inf"),
    2.0**-149,
    -(2.0**-149),
    1.0 + 2.0**-23,
    -3.4028234663852886e38,
]


@st.composite
def budgets(draw, max_n: int = 80):
    """score (R, N), m (R,), cost (R, N) or None: few distinct values or any float32; budgets from
    nothing to more than everything."""
    R = draw(st.integers(1, 2))
    N = draw(st.integers(0, max_n))
    some = st.sampled_from(draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=8)))
    value = draw(st.sampled_from([some, some | st.floats(width=32, allow_nan=False)]))
    score = torch.tensor(draw(st.lists(value, min_size=R * N, max_size=R * N))).view(R, N)
    cost = draw(st.sampled_from([None, torch.uint8, torch.int32, torch.int64]))
    if cost is not None:
        cost = (
            torch.tensor(
                draw(st.lists(st.sampled_from([0, 1, 2, 9, 255]), min_size=R * N, max_size=R * N))
            )
            .view(R, N)
            .to(cost)
        )
    total = N if cost is None else int(cost.sum())
    m = torch.tensor(
        draw(st.lists(st.integers(0, total + 2) | st.just(2**62), min_size=R, max_size=R))
    )
    return score, m, cost


def to_device(*tensors):
    return tuple(t if t is None else t.to(DEVICE) for t in tensors)


@many
@given(budgets())
def test_take_within_reference_equals_a_loop(case):
    """Best first, then by index, until one does not fit; -inf never."""
    score, m, cost = case
    want = torch.zeros(score.shape, dtype=torch.bool)
    for r, row in enumerate(score.tolist()):
        left = int(m[r])
        for i in sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)):
            left -= 1 if cost is None else int(cost[r, i])
            if left < 0 or row[i] == float("-inf"):
                break
            want[r, i] = True
    assert torch.equal(take_within_ref(score, m, cost), want)


@few
@given(case=budgets())
def test_take_within_kernel_equals_reference(small_blocks, case):
    """Ties across blocks, infinities, zeros of both signs, denormals, costs and budgets of any
    size."""
    case = to_device(*case)
    assert torch.equal(take_within(*case, impl="triton"), take_within_ref(*case))


@pytest.mark.parametrize("kind", ["ties", "normal", "negative", "bfloat16"])
@pytest.mark.parametrize("priced", [False, True])
def test_take_within_kernel_equals_reference_on_a_long_row(kind, priced):
    """Blocks of their real size, a row that is no multiple of them, a budget that ends among the
    entries of the second block."""
    g = torch.Generator().manual_seed(0)
    N = packing.SPAN + 3 * packing.CHUNK + 77
    score = (
        torch.randint(0, 2, (1, N), generator=g).float()
        if kind == "ties"
        else torch.randn(1, N, generator=g)
    )
    score = (
        -score.abs() if kind == "negative" else score.bfloat16() if kind == "bfloat16" else score
    )
    cost = torch.randint(1, 256, (1, N), generator=g).to(torch.uint8) if priced else None
    total = N if cost is None else int(cost.sum())
    score, m, cost = to_device(
        score, torch.tensor([total * 49 // 100 if kind == "ties" else total // 3]), cost
    )
    got = take_within(score, m, cost, "triton")
    assert torch.equal(got, take_within_ref(score, m, cost))
    assert (
        (got & (score == 1)).sum() == got.sum() > 0
        if kind == "ties"
        else got[:, packing.SPAN :].any()
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_take_within_shapes_and_edges(impl, small_blocks):
    """No entries, no rows, one dimension, one budget for all rows, views that are not contiguous,
    nothing or everything taken."""
    inf = float("inf")
    for shape in ((3, 0), (0, 5), (2, 0, 4)):
        assert (
            take_within(
                torch.zeros(shape, device=DEVICE),
                torch.ones(shape[:-1], dtype=torch.int64, device=DEVICE),
                None,
                impl,
            ).shape
            == shape
        )

    def one(scores: list[float], m: int) -> list[int]:
        return (
            take_within(*to_device(torch.tensor(scores).float(), torch.tensor(m)), None, impl)
            .int()
            .tolist()
        )

    assert (
        one([1, 3, 3, 2], 2) == [0, 1, 1, 0]
        and one([1, 3, 3, 2], 0) == [0] * 4
        and one([1, 3, -inf, 2], 99) == [1, 1, 0, 1]
    )
    assert (
        one([-0.0, 0.0, -0.0], 2) == [1, 1, 0]
        and one([-inf] * 3, 3) == [0] * 3
        and one([inf] * 3, 2) == [1, 1, 0]
    )
    wide = torch.arange(2 * 3 * 40).view(2, 40, 3).mul(7919).remainder(13).float().to(DEVICE)
    view = wide.transpose(1, 2)[:, :, 1::2]
    cost = (wide.int() + 1).transpose(1, 2)[:, :, 1::2]  # (2, 3, 20)
    m = torch.tensor([[30], [55]], device=DEVICE)
    got = take_within(view, m, cost, impl)
    assert got.shape == view.shape and torch.equal(
        got, take_within_ref(view.contiguous(), m.expand(2, 3), cost.contiguous())
    )


def test_selection_rules_are_the_same_by_kernel():
    """select_top_m and select_joint (whose costs include 0) choose with the kernel what they choose
    without it."""
    g = torch.Generator().manual_seed(1)
    score = torch.randint(-2, 9, (2, 3, 70), generator=g).float()
    score[score < 0] = float("-inf")
    m = torch.tensor([[0, 5, 20], [50, 70, 999]])
    assert torch.equal(
        select_top_m(*to_device(score, m), "triton").cpu(), select_top_m(score, m, "torch")
    )
    value = score[..., :68].reshape(6, 17, 4).square()
    m = torch.tensor([0, 5, 6, 31, 200, 1000])
    value[value == float("inf")] = 0.0
    value[:, 3] = float("inf")
    value[:, -1] = float("-inf")
    taken = select_joint(*to_device(value, m), "triton").cpu()
    assert torch.equal(taken, select_joint(value, m, "torch")) and 0 < taken.sum() < taken.numel()


@st.composite
def contexts(draw):
    """k, z (B, Hkv, C, D), keep (B, Hm, C), mask (B, Hm, C, S), of any strides."""
    S = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    B = draw(st.integers(1, 2))
    Hkv = draw(st.integers(1, 3))
    D = S * draw(st.sampled_from([d for d in (1, 2, 3, 5, 8, 13, 16) if 8 <= S * d <= 256]))
    Hm = draw(st.sampled_from([1, Hkv]))
    C = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 129, 200]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    order = draw(st.permutations([0, 1, 2]))

    def tensor() -> torch.Tensor:
        shape = (B, Hkv, C + 1, D)
        t = torch.randn(*(shape[i] for i in order), D, generator=g).to(dtype)
        # a view that begins inside
        return t.permute(*(list(order).index(i) for i in range(3)), 3)[:, :, 1:]

    p = draw(
        st.sampled_from([(0.0, 0.5), (1.0, 1.0), (0.5, 0.5), (0.8, 0.1), (0.1, 0.0), (0.97, 0.9)])
    )
    keep = torch.rand(B, Hm, C, generator=g) < p[0]
    return (
        tensor(),
        tensor(),
        keep,
        (torch.rand(B, Hm, C, S, generator=g) < p[1]) & keep.unsqueeze(-1),
    )


def assert_same(got, want):
    for name, a, b in zip(PackedValues._fields, got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()), name


def pack_by_loops(k, z, keep, mask):
    """The layout, token by token."""
    (B, Hkv, C, D) = k.shape
    Hm = mask.size(1)
    S = mask.size(-1)
    keys = []
    rows = []
    bits = []
    before = []
    tile_rows = []
    counts = torch.zeros(2, B, Hm, dtype=torch.int64)
    for b in range(B):
        for h in range(Hkv):
            kept = mask[b, h % Hm]
            seen = [0, 0]
            first = h < Hm
            for t in range(C):
                if not keep[b, h % Hm, t]:
                    continue
                if first and seen[0] % tile_size(S) == 0:
                    tile_rows.append(seen[1])
                if first:
                    before.append(seen[1] - tile_rows[-1])
                groups = [g for g in range(S) if kept[t, g]]
                keys.append(k[b, h, t])
                rows.extend(z[b, h, t, g * (D // S) : (g + 1) * (D // S)] for g in groups)
                word = sum(1 << g for g in groups)
                if first:
                    bits.append(word - (1 << S) if S >= 16 and word >> (S - 1) else word)
                seen = [seen[0] + 1, seen[1] + len(groups)]
            if first:
                counts[:, b, h] = torch.tensor(seen)
    return (
        torch.stack(keys) if keys else k.new_zeros(0, D),
        torch.stack(rows) if rows else z.new_zeros(0, D // S),
        torch.tensor(bits, dtype=mask_dtype(S)),
        torch.tensor(before, dtype=torch.uint8),
        torch.tensor(tile_rows, dtype=torch.int32),
        *counts,
    )


@few
@given(contexts())
def test_pack_values_reference_equals_loops(case):
    """Order, bits, signs of the masks, tiles and counts."""
    assert_same(pack_values_ref(*case), pack_by_loops(*case))


@settings(deadline=None, max_examples=30)
@given(contexts())
def test_pack_values_kernel_equals_reference(case):
    """Every S, D no power of two, any strides, no token to all tokens kept, one mask for all heads
    or one each."""
    case = to_device(*case)
    assert_same(pack_values(*case, impl="triton"), pack_values_ref(*case))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("Hm", [1, 2])
def test_a_view_of_what_pack_values_packs_unpacks_to_what_was_kept(impl, Hm):
    """Also from views whose last dimension has a stride: keys and values of the tokens that survive,
    zeros where a group was dropped."""
    g = torch.Generator().manual_seed(2)
    k, z = torch.randn(2, 3, 2, 150, 24, 2, generator=g)[..., 1].to(DEVICE)
    keep = (torch.rand(3, Hm, 150, generator=g) < 0.6).to(DEVICE)
    mask = (torch.rand(3, Hm, 150, 8, generator=g) < 0.5).to(DEVICE) & keep.unsqueeze(-1)
    parts = pack_values(k, z, keep, mask, impl=impl)
    n, n_rows = torch.stack((parts.n_packed, parts.n_rows)).to(DEVICE)
    bases = (
        starts(n.expand(-1, 2)),
        starts(n_rows.expand(-1, 2)),
        starts(n),
        starts(cdiv(n, tile_size(8))),
    )
    view = PackedView(*parts[:5], n, *bases, 8, 0, 150, int(n.sum()))
    got_k, got_z, got_mask, valid = view.unpack()
    z = z * expand_mask(mask, 24)
    for b in range(3):
        for h in range(2):
            m = h % Hm
            inside = keep[b, m]
            assert int(valid[b, m].sum()) == int(inside.sum()) == int(n[b, m])
            assert torch.equal(got_k[b, h][valid[b, m]], k[b, h][inside])
            assert torch.equal(got_z[b, h][valid[b, m]], z[b, h][inside])
            assert torch.equal(got_mask[b, m][valid[b, m]], mask[b, m][inside])


@pytest.mark.parametrize("S, D", [(8, 24), (1, 72), (32, 96)])
def test_pack_values_kernel_writes_nothing_past_the_end(S, D, monkeypatch):
    """Widths that are no power of two: what lies behind keys and rows stays as it was."""
    guards = []
    plain = torch.Tensor.new_empty

    def new_empty(self, *size, **options):
        if len(size) != 2:
            return plain(self, *size, **options)  # the interpreter's
        n, width = size
        whole = torch.full((n * width + 256,), -7.0, dtype=self.dtype, device=self.device)
        guards.append(whole[n * width :])
        return whole[: n * width].view(n, width)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    k, z = torch.randn(2, 1, 2, 70, D, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    keep = torch.ones(1, 2, 70, dtype=torch.bool, device=DEVICE)
    mask = torch.ones(1, 2, 70, S, dtype=torch.bool, device=DEVICE)
    assert_same(pack_values(k, z, keep, mask, "triton"), pack_values_ref(k, z, keep, mask))
    assert len(guards) == 2 and all((t == -7).all() for t in guards)


def test_impl_chooses_the_reference_on_the_cpu_and_for_float64():
    """auto takes the kernel on a GPU only, float64 never; an unknown impl is refused."""
    x = torch.zeros(2)
    assert (
        not use_triton("auto", x.device, x.dtype)
        and not use_triton("triton", x.device, torch.float64)
        and use_triton("triton", x.device, x.dtype)
    )
    with pytest.raises(AssertionError, match="impl=cuda"):
        use_triton("cuda", x.device, x.dtype)
