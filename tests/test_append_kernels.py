"""Appending by kernel, to a window and to packed values, against references: on a GPU where there is
one, else in Triton's interpreter. Outputs hold NaN before they are written."""

from __future__ import annotations

import pytest
import torch
from test_kernels import DEVICE, poisoned  # noqa: F401 (fixture)
from views import NAN

from kernels import append_packed, append_window, packed_attention
from storage.kernel_base import triton
from storage.layout import (
    PackedView,
    WindowView,
    bits_to_mask,
    expand_mask,
    mask_dtype,
    mask_to_bits,
    top_k_mask,
)

pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")


@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("first", [[0, 9, 3], None])
def test_append_window_equals_its_reference(strided, first):
    """Any slot, wrapped around, three heads, D no power of 2, keys and values of strides of their
    own, the last of the values not always 1; count is raised in place, nothing else is written."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(3, 1, 3, 24, generator=g).to(DEVICE).transpose(1, 2)  # (3, 3, 1, 24) views
    wide = torch.randn(3, 3, 1, 48, generator=g).to(DEVICE)
    v = wide[..., 1::2] if strided else wide[..., 24:]
    assert k.stride()[:2] != v.stride()[:2]
    assert (v.stride(-1) == 1) != strided
    count = [0, 3, 4] if first else [0, 3, 5]
    windows = []
    for impl in ("triton", "torch"):
        empty = torch.zeros(2, 3, 3, 6, 24, device=DEVICE)
        start = None if first is None else torch.tensor(first, device=DEVICE)
        window = WindowView(empty[0], empty[1], start, torch.tensor(count, device=DEVICE))
        append_window(window, k, v, impl)
        assert window.count.tolist() == [c + 1 for c in count]
        assert start is None or start.tolist() == first
        windows.append(window)
    a, b = windows
    assert torch.equal(a.k, b.k)
    assert torch.equal(a.v, b.v)
    for row in range(3):
        slot = ((first[row] if first else 0) + count[row]) % 6
        assert torch.equal(a.k[row, :, slot], k[row, :, 0])
        assert torch.equal(a.v[row, :, slot], v[row, :, 0])
    assert int((a.k != 0).sum()) == 3 * 3 * 24


def test_append_window_fills_a_window_that_attention_reads():
    """Token by token, attention over the window is dense attention over the tokens so far."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 2, 9, 24, generator=g).to(DEVICE)
    q = torch.randn(2, 4, 1, 24, generator=g).to(DEVICE)
    empty = torch.full((2, 2, 2, 9, 24), NAN, device=DEVICE)
    window = WindowView(empty[0], empty[1], None, torch.zeros(2, dtype=torch.int64, device=DEVICE))
    for t in range(9):
        append_window(window, k[:, :, t : t + 1], v[:, :, t : t + 1], "triton")
        out = packed_attention(q, None, window, impl="triton")[0]
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k[:, :, : t + 1], v[:, :, : t + 1], enable_gqa=True
        )
        assert (out - want).abs().max() < 1e-6


class Ring:
    """An empty packed cache of K groups per token, for append_packed: `cap` tokens a segment."""

    def __init__(self, B: int, Hkv: int, Hm: int, D: int, S: int, K: int, cap: int, W: int):
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=DEVICE)

        self.n_packed = zeros(B, dtype=torch.int64)
        self.n_window = zeros(B, dtype=torch.int64)
        self.window_bits = zeros(B, Hm, W, dtype=mask_dtype(S))
        segments = torch.arange(B * Hkv, device=DEVICE).view(B, Hkv)
        masks = torch.arange(B * Hm, device=DEVICE).view(B, Hm) * cap
        self.packed = PackedView(
            zeros(B * Hkv * cap, D),
            zeros(B * Hkv * cap * K, D // S),
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
            B * Hkv * cap,
        )
        empty = zeros(2, B, Hkv, W, D)
        self.window = WindowView(empty[0], empty[1], self.n_packed, self.n_window)


@pytest.mark.parametrize("encoded", [False, True, "columns"])
@pytest.mark.parametrize(
    ("S", "K", "keep", "block", "shared", "routed"),
    [
        (4, 2, 0, 1, False, False),
        (4, 1, 0, 3, True, False),
        (8, 3, 4, 1, False, True),
        (16, 8, 2, 4, True, True),
        (32, 5, 1, 2, False, False),
        (2, 1, 5, 1, False, False),
        (64, 64, 3, 2, False, False),
    ],
)
def test_append_packed_packs_what_leaves_the_window(S, K, keep, block, shared, routed, encoded):
    """Token by token, one row skipping some: counts, and every token packed or in the window, with
    the groups of its route, or else its largest, as lists in Python say."""
    if encoded and S not in (4, 16):
        pytest.skip("two sizes are enough for the maps")
    g = torch.Generator().manual_seed(S)
    B = 2
    Hkv = 3
    Hm = 1 if shared else Hkv
    D = 32 if encoded else 64
    T = 14
    k, v = torch.randn(2, B, Hkv, T, D, generator=g)
    enc = torch.randn(Hkv, D, D, generator=g) / 8 if encoded else None
    if encoded == "columns":  # as eigenvectors come
        enc = enc.mT.contiguous().mT
    z = v @ enc if encoded else v
    energy = z.unflatten(-1, (S, -1)).square().sum(-1)  # (B, Hkv, T, S)
    if shared:
        energy = energy.sum(1, keepdim=True)
    if routed:
        energy = torch.randn(B, Hm, T, S, generator=g)
    mask = top_k_mask(energy, K)
    skip = torch.zeros(B, T, dtype=torch.int64)
    skip[1, [0, 1, 6]] = 1
    ring = Ring(B, Hkv, Hm, D, S, K, T, keep + block - 1)
    seen = [[], []]
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
            route=mask[:, :, t].to(DEVICE) if routed else None,
            enc=enc.to(DEVICE) if encoded else None,
            skip=skip[:, t].to(DEVICE) if skip[:, t].any() else None,
        )
        for b in range(B):
            if not skip[b, t]:
                seen[b].append(t)
        n_packed = [max(0, (len(s) - keep) // block * block) for s in seen]
        assert ring.n_packed.tolist() == n_packed
        assert ring.n_window.tolist() == [len(s) - n for s, n in zip(seen, n_packed, strict=True)]
    got_k, got_z, got_mask, _ = (x.cpu() for x in ring.packed.unpack())
    kept = z * expand_mask(mask, D)
    W = ring.window.k.size(2)
    for b in range(B):
        for i, t in enumerate(seen[b]):
            if i < n_packed[b]:
                assert torch.equal(got_k[b, :, i], k[b, :, t])
                assert torch.equal(got_mask[b, :, i], mask[b, :, t])
                assert torch.allclose(got_z[b, :, i], kept[b, :, t], atol=1e-4 if encoded else 0)
            else:
                slot = i % W
                assert torch.equal(ring.window.k[b, :, slot].cpu(), k[b, :, t])
                assert torch.equal(ring.window.v[b, :, slot].cpu(), v[b, :, t])
                bits = ring.window_bits[b, :, slot].cpu()
                assert torch.equal(bits_to_mask(bits, S), mask[b, :, t])
                assert torch.equal(bits, mask_to_bits(mask[b, :, t]))


def test_append_packed_prefers_the_lower_of_equal_groups():
    """All norms equal: the first K groups."""
    ring = Ring(1, 1, 1, 16, 4, 2, 8, 0)
    one = torch.ones(1, 1, 1, 16, device=DEVICE)
    append_packed(
        ring.packed, ring.window, ring.window_bits, ring.n_packed, ring.n_window, one, one, 0, 1
    )
    assert ring.packed.bits[0] == 0b0011
    assert ring.n_packed.tolist() == [1]
