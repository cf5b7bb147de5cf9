"""Contexts turned into integers by kernels, all layers at once, against the plain passes."""

import pytest
import torch

from storage.integers import contexts
from storage.integers.format import IntFormat
from storage.kernel_base import triton
from storage.packing import Context

pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # sequences, layers, KV heads, heads of masks, columns, D, S, bits, block, rounded
    "heads apart": (2, 3, 3, 3, 61, 16, 4, 4, 16, True),
    "shared masks": (1, 2, 2, 1, 45, 32, 4, 8, 32, True),
    "three bits": (3, 1, 2, 2, 33, 16, 2, 3, 16, True),
    "two bits, nearest": (2, 1, 1, 1, 50, 64, 16, 2, 64, False),
    "one column": (1, 1, 1, 1, 1, 16, 4, 4, 16, True),
    "as generation packs": (2, 1, 3, 1, 131, 64, 8, 4, 64, True),
    "one group": (1, 2, 1, 1, 70, 128, 1, 2, 32, True),
    "wide heads": (1, 1, 2, 2, 40, 256, 16, 8, 16, True),
    "a block that is never full": (3, 1, 1, 1, 90, 32, 8, 3, 128, True),
}


def inputs(case: str, dtype: torch.dtype = torch.float32):
    """What pack_context takes: one segment has no tokens, keys and values lie in larger ones."""
    per_layer, L, Hkv, Hm, C, D, S, bits, block, rounded = CASES[case]
    g = torch.Generator().manual_seed(0)
    B = per_layer * L
    k, z = torch.randn(2, B, Hkv, C + 3, D, generator=g).to(dtype)[..., :C, :]
    keep = torch.rand(B, Hm, C, generator=g) < 0.6
    keep[0, 0] = C == 1
    levels = torch.randint(0, 4, (B, Hm, C, S), generator=g, dtype=torch.uint8)
    levels = levels * keep.unsqueeze(-1)
    moment = None
    if rounded:
        q = torch.randn(B, Hkv, 30, D, generator=g, dtype=torch.float64)
        q = q * torch.logspace(0, -1.5, D, dtype=torch.float64)
        moment = (q.mT @ q / 30).to(DEVICE)
    gain = 0.5 + torch.rand(L, Hkv, D, generator=g)
    fmts = [IntFormat(bits, 0, block, one.to(DEVICE)) for one in gain]
    return fmts, Context(*(t.to(DEVICE) for t in (k, z, keep, levels)), moment)


def share_equal(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of equal rows."""
    return 1.0 if not len(a) else (a == b).flatten(1).all(1).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_pack_what_the_plain_passes_pack(case, dtype):
    """Places, masks and counts agree exactly, so do key scales; steps of values, planes and rounded
    keys in all but few tokens, where two are as good."""
    args = inputs(case, dtype)
    got = contexts.pack_context(*args, impl="triton")
    want = contexts.pack_context(*args, impl="torch")
    for name in ("bits", "before", "tile_rows", "n_packed", "n_rows", "key_scale"):
        ours = getattr(got, name)
        plain = getattr(want, name)
        assert ours.dtype == plain.dtype and torch.equal(ours, plain), name
    for name, least in (("keys", 0.98), ("value_scale", 0.99), ("rows", 0.98)):
        ours = getattr(got, name)
        plain = getattr(want, name)
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        assert share_equal(ours, plain) >= least, name


def test_layers_lie_one_after_the_other():
    """The kernels give every layer of several the bytes that it gets alone, at its own gain."""
    fmts, context = inputs("heads apart")
    together = contexts.pack_context(fmts, context, impl="triton")
    alone = []
    for i, fmt in enumerate(fmts):
        part = slice(2 * i, 2 * i + 2)
        mine = Context(*(t[part] for t in context[:5]))
        alone.append(contexts.pack_context([fmt], mine, impl="triton"))
    for name in contexts.PackedInts._fields:
        parts = torch.cat([getattr(one, name) for one in alone])
        assert torch.equal(getattr(together, name), parts), name


def test_what_kernels_do_not_pack_is_packed_by_passes():
    """Heads of 8, sizes that are no power of 2, 2^31 tokens, which kernels cannot count, and values
    without levels."""
    fmt = IntFormat(4, 0, 16, torch.ones(1, 16))
    one = torch.zeros(1)
    assert contexts.kernels_pack(fmt, one.expand(3, 5, 16), 4, "triton")
    assert not contexts.kernels_pack(fmt, one.expand(3, 5, 8), 2, "triton")
    assert not contexts.kernels_pack(fmt, one.expand(3, 5, 48), 4, "triton")
    assert not contexts.kernels_pack(fmt, one.expand(3, 5, 16), 3, "triton")
    assert not contexts.kernels_pack(fmt, one.expand(2**16, 2**15, 16), 4, "triton")
    uniform = fmt._replace(value_bits=4)
    assert not contexts.kernels_pack(uniform, one.expand(3, 5, 16), 4, "triton")
