"""Attention over values predicted from keys by kernel, against values that are written out, in
float64.

On a GPU where there is one, else in Triton's interpreter. Outputs hold NaN before they are written,
and so does what lies between segments."""

from __future__ import annotations

import pytest
import torch
from views import finite, packed_view, to_device, window_view

from storage import from_keys, key_sums
from storage.from_keys import FromKeys, attend_predicted, attend_predicted_ref
from storage.kernel_base import triton
from storage.layout import PackedView, merge_softmax, packed_attention_ref, top_k_mask

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# the interpreter truncates where a GPU rounds
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.float32]
pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")
# D, S, K (0: counted, -1: keys alone), KV heads, query heads of each, T, one mask for all heads
SHAPES = {
    "SmolLM2": (64, 8, 2, 3, 3, 1, False),
    "128, one mask": (128, 4, 3, 2, 1, 1, True),
    "80, counted": (80, 5, 0, 1, 3, 3, False),
    "48, many queries": (48, 4, 1, 2, 3, 7, True),
    "16, every group": (16, 2, 2, 1, 1, 2, False),
    "keys alone": (64, 8, -1, 3, 1, 2, True),
    "96, keys alone": (96, 4, -1, 1, 3, 1, True),
}


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def as_double(packed: PackedView) -> PackedView:
    """The same tokens in float64."""
    return packed._replace(keys=packed.keys.double(), rows=packed.rows.double())


def drawn(shape, lengths: list[int], dtype: torch.dtype, seed: int = 0):
    """Queries, packed tokens of such lengths (a sequence each) and maps from keys of the shape."""
    D, S, K, Hkv, n, T, shared = shape
    g = torch.Generator().manual_seed(seed)
    B = len(lengths)
    N = max(*lengths, 1)
    Hm = 1 if shared else Hkv
    k, z = torch.randn(2, B, Hkv, N, D, generator=g).to(dtype)
    score = torch.rand(B, Hm, N, S, generator=g)
    mask = top_k_mask(score, K) if K > 0 else score < 0.4
    if K < 0:
        mask = torch.zeros_like(mask)
    length = torch.tensor(lengths)[:, None].expand(-1, Hm)
    packed = packed_view(k, z, mask, length, max(K, 0))
    if K < 0:
        packed = packed._replace(before=None, tile_rows=None)
    q = (2 * torch.randn(B, Hkv * n, T, D, generator=g)).to(dtype).to(DEVICE)
    rate = torch.rand(D // 2, generator=g, dtype=torch.float64)
    angle = torch.arange(2 * N + 25)[:, None] * rate
    weight = torch.randn(Hkv, D, D, generator=g) / D**0.5
    maps = FromKeys(*(t.float().to(DEVICE) for t in (weight, angle.cos(), angle.sin())))
    return q, to_device(packed, DEVICE), maps


def compare(q, packed, maps, position, cap: float = 0.0, chunk: int = 0) -> torch.Tensor:
    """Hold the kernel against float64: no further from it than twice the plain form in the same
    dtype, and a unit in the last place; returns what the kernel gave."""
    wide = as_double(packed)
    exact = FromKeys(*(t.double() for t in maps))
    want, want_lse = attend_predicted_ref(q.double(), wide, exact, position, cap)
    plain = attend_predicted(q, packed, maps, position, cap, impl="torch")[0]
    got, lse = attend_predicted(q, packed, maps, position, cap, impl="triton", chunk=chunk)
    assert got.shape == q.shape and got.dtype == q.dtype
    allowed = 2 * (plain - want).abs().max() + 4 * torch.finfo(q.dtype).eps * want.abs().max()
    assert (got - want).abs().max() <= allowed
    there = want_lse > float("-inf")
    assert torch.equal(there, lse > float("-inf"))
    assert (lse - want_lse)[there].abs().max() < 1e-5 * (1 + want_lse[there].abs().max())
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_key_sums_equal_written_out_values(shape, in_order, cap, dtype):
    """In one piece and in several, lengths no multiple of a tile, an empty segment, positions that
    begin behind whole tokens, the first of them given and each of them."""
    q, packed, maps = drawn(shape, [37, 0, 70], dtype)
    position = 4 if in_order else torch.arange(4, 4 + 75, device=DEVICE)[None]
    whole = compare(q, packed, maps, position, cap)
    split = compare(q, packed, maps, position, cap, chunk=32)
    assert not whole[1].any() and not split[1].any()
    assert whole[0].abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 16])
def test_tiles_of_tokens_in_order_begin_anywhere(first, dtype):
    """One token, as many as a tile has, one more: from positions 0, 1 and 16, with tables of no more
    rows than there are positions, fewer than a tile has among them."""
    for lengths in ([1], [0, 16, 17], [64, 65, 5]):
        q, packed, maps = drawn(SHAPES["80, counted"], lengths, dtype)
        used = first + max(lengths)
        compare(q, packed, maps._replace(cos=maps.cos[:used], sin=maps.sin[:used]), first)


@pytest.mark.parametrize("N", [32, 64])
def test_a_tile_may_have_more_tokens(N, monkeypatch):
    """Tiles of the sizes that 16-bit numbers have, in float32, tables shorter than a tile too."""
    monkeypatch.setattr(key_sums, "launch_settings", lambda *_: (N, 4, 1))
    for lengths in ([9], [N + 1, 0, 2 * N]):
        q, packed, maps = drawn(SHAPES["48, many queries"], lengths, torch.float32)
        maps = maps._replace(cos=maps.cos[: 3 + max(lengths)], sin=maps.sin[: 3 + max(lengths)])
        compare(q, packed, maps, 3)
        compare(q, packed, maps, torch.arange(3, 3 + max(lengths), device=DEVICE)[None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_are_no_further_from_float64_than_few(dtype):
    """Tiles are turned from where they begin, not from one another: in one piece of 3,000 tokens
    nothing adds up, beside the same keys read with each position."""
    q, packed, maps = drawn((16, 2, 1, 1, 2, 1, False), [3000], dtype)
    got = compare(q, packed, maps, 2, chunk=3008)
    each = compare(q, packed, maps, torch.arange(2, 3002, device=DEVICE)[None], chunk=3008)
    assert (got - each).abs().max() <= 8 * torch.finfo(dtype).eps * each.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_head_may_hold_tokens_of_other_positions(dtype):
    """Positions in no order, of each sequence, and of each head."""
    q, packed, maps = drawn(SHAPES["80, counted"], [37, 21, 5], dtype)
    many = drawn(SHAPES["SmolLM2"], [37, 21, 5], dtype)
    for case in ((q, packed, maps), many):
        Hkv = case[1].token_base.size(1)
        g = torch.Generator().manual_seed(1)
        for heads in (1, Hkv):
            position = torch.randint(0, 80, (3, heads, 37), generator=g).to(DEVICE)
            compare(*case, position, chunk=16)


@pytest.mark.parametrize("impl", ["triton", "torch", "written out"])
def test_positions_of_a_sequence_are_those_of_all_its_heads(impl):
    """As many sequences as KV heads: (B, N) means (B, 1, N), in every form."""
    q, packed, maps = drawn(SHAPES["SmolLM2"], [37, 21, 5], torch.float32)
    position = torch.arange(37, device=DEVICE) + torch.tensor([[0], [4], [9]], device=DEVICE)
    results = []
    for each in (position, position[:, None], position[:, None].expand(-1, 3, -1)):
        if impl == "written out":
            results.append(attend_predicted_ref(q, packed, maps, each)[0])
        else:
            results.append(attend_predicted(q, packed, maps, each, impl=impl)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_segments_of_very_different_lengths_share_one_row_of_programs():
    """One long segment beside short ones: pieces are laid in a row (storage/pieces.py)."""
    lengths = [300, 0, 3, 1, 17, 2]
    q, packed, maps = drawn(SHAPES["48, many queries"], lengths, torch.float32)
    compare(q, packed, maps, 0, chunk=32)
    compare(q, packed, maps, torch.arange(300, device=DEVICE)[None], chunk=32)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_sequence_has_no_result(impl):
    """A batch of 0, with maps of own heads and of all heads."""
    q, packed, maps = drawn(SHAPES["SmolLM2"], [5], torch.float32)
    bases = ("n", "token_base", "row_base", "mask_base", "tile_base", "keys", "rows", "bits")
    nothing = {name: getattr(packed, name)[:0] for name in bases}
    packed = packed._replace(**nothing, longest=0, held=0)
    position = torch.arange(5, device=DEVICE)[None]
    joint = maps._replace(weight=torch.zeros(3 * 64, 3 * 64, device=DEVICE))
    for which in (maps, joint):
        out, lse = attend_predicted(q[:0], packed, which, position, impl=impl)
        assert out.shape == (0, 9, 1, 64) and lse.shape == (0, 9, 1)


@pytest.mark.parametrize("shape", ["SmolLM2", "keys alone"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_autocast_changes_nothing(shape, impl):
    """Inside autocast, where a model computes in bfloat16, predicted values are read bit for bit as
    outside."""
    q, packed, maps = drawn(SHAPES[shape], [37, 5], torch.float32)
    position = torch.arange(37, device=DEVICE)[None]
    want = attend_predicted(q, packed, maps, position, impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = attend_predicted(q, packed, maps, position, impl=impl)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_the_kernel_is_asked_for_own_whole_keys_alone(monkeypatch):
    """Float64 and what wants a gradient are computed plainly."""
    q, packed, maps = drawn(SHAPES["SmolLM2"], [9, 4], torch.float32)
    position = torch.arange(9, device=DEVICE)[None]
    asked = []
    right = from_keys.attend_with_key_sums
    monkeypatch.setattr(from_keys, "attend_with_key_sums", lambda *a: asked.append(1) or right(*a))
    attend_predicted(q, packed, maps, position, impl="triton")
    assert asked == [1]
    attend_predicted(q, packed, maps, position, impl="torch")
    exact = FromKeys(*(t.double() for t in maps))
    attend_predicted(q.double(), as_double(packed), exact, position, impl="triton")
    attend_predicted(q.clone().requires_grad_(), packed, maps, position, impl="triton")
    assert asked == [1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [0, 32])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_window_is_read_beside_packed_tokens(shape, in_order, chunk, dtype):
    """Whole values of newer tokens, in a ring, with and without tokens before them: as two
    attentions that are joined."""
    q, packed, maps = drawn(shape, [37, 0, 70], dtype)
    position = 3 if in_order else torch.arange(3, 78, device=DEVICE)[None]
    g = torch.Generator().manual_seed(2)
    whole = torch.randn(2, 3, packed.token_base.size(1), 21, q.size(-1), generator=g).to(dtype)
    window = to_device(window_view(*whole, [15, 3, 0], [17, 9, 21]), DEVICE)
    near = finite(window)
    near = near._replace(k=near.k.double(), v=near.v.double())
    exact = FromKeys(*(t.double() for t in maps))
    told = attend_predicted_ref(q.double(), as_double(packed), exact, position, 5.0)
    beside = packed_attention_ref(q.double(), None, near, 5.0)
    want = merge_softmax(told, beside)
    want_lse = torch.logaddexp(told[1], beside[1])
    results = {}
    for impl in ("torch", "triton"):
        seen = window if impl == "triton" else finite(window)
        how = dict(impl=impl, chunk=chunk, window=seen)
        results[impl], lse = attend_predicted(q, packed, maps, position, 5.0, **how)
    assert (lse - want_lse).abs().max() < 1e-5 * (1 + want_lse.abs().max())  # the kernel's
    error = (results["triton"] - want).abs().max()
    plain = (results["torch"] - want).abs().max()
    assert error <= 2 * plain + 4 * torch.finfo(dtype).eps * want.abs().max()
    assert want[1].abs().max() > 0.1
