"""Attention on a CPU against the plain version in float64: ragged segments, windows, blocks of work
of any size, integers; and that packed_attention chooses it."""

from __future__ import annotations

import pytest
import torch
from views import finite, normal, packed_view, window_view

import kernels
from storage import cpu
from storage.cpu import gather, packed_attention_cpu, take_rows, work
from storage.integers.cpu import fields, half_bytes, level_bytes, level_units
from storage.integers.format import (
    LEVEL_BITS,
    LEVEL_STEPS,
    IntFormat,
    unpack_bits,
    zero_code,
)
from storage.layout import packed_attention_ref, top_k_mask

B = 2
Hkv = 3
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5}


def context(S: int, K: int, Hm: int, D: int, N: int = 41, fmt=None, dtype=torch.float64):
    """Packed tokens, up to N of each segment, one segment empty. K: groups of every token, 0: any
    number of them, and levels where fmt has some."""
    g = torch.Generator().manual_seed(S + D)
    k, z = normal(2, B, Hkv, N, D, seed=3).to(dtype)
    lengths = torch.randint(1, N + 1, (B, Hm), generator=g)
    lengths[0, 0] = N
    lengths[1, -1] = 0
    if K:
        mask = top_k_mask(torch.rand(B, Hm, N, S, generator=g), K)
    elif fmt is not None and fmt.value_bits == 0:
        mask = torch.randint(0, 4, (B, Hm, N, S), generator=g, dtype=torch.uint8)
    else:
        mask = torch.rand(B, Hm, N, S, generator=g) < 0.6
    return packed_view(k, z, mask, lengths, K, fmt)


def ring(D: int, dtype=torch.float64):
    """Windows of 7 slots that reach around the end, and of which the rest is NaN."""
    return window_view(*normal(2, B, Hkv, 7, D, seed=9).to(dtype), [3, 5], [6, 3])


def expect_equal(q: torch.Tensor, packed, window, close: float) -> None:
    """Compare out and lse with packed_attention_ref in float64."""
    wide = window and finite(window)._replace(
        k=finite(window).k.double(), v=finite(window).v.double()
    )
    exact = packed
    if packed is not None and packed.ints is None:
        exact = packed._replace(keys=packed.keys.double(), rows=packed.rows.double())
    want, want_lse = packed_attention_ref(q.double(), exact, wide)
    out, lse = packed_attention_cpu(q, packed, window)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert torch.allclose(out.double(), want, rtol=0, atol=close * (1 + want.abs().max().item()))
    assert torch.equal(lse == float("-inf"), want_lse == float("-inf"))
    there = want_lse > float("-inf")
    assert torch.allclose(lse[there].double(), want_lse[there], rtol=close, atol=close)


@pytest.mark.parametrize("chunk", [130, 1 << 19])
@pytest.mark.parametrize("Hm", [1, Hkv])
@pytest.mark.parametrize(
    "S, K, D", [(1, 1, 16), (2, 0, 6), (4, 2, 24), (4, 4, 32), (8, 0, 32), (16, 5, 48), (32, 0, 64)]
)
def test_rows_are_read_as_the_plain_version_reads_them(S, K, D, Hm, chunk, monkeypatch):
    """Any number of groups, fixed or counted, a mask for each head or for all, a segment without
    tokens, one token and three, with a ring and without: equal to 1e-12 in float64, and to float32
    in float32, in blocks of a few tokens and of all. Rows of 4 to 128 bytes."""
    monkeypatch.setattr(cpu, "CHUNK", chunk)
    for dtype, close in CLOSE.items():
        packed = context(S, K, Hm, D, dtype=dtype)
        window = ring(D, dtype)
        for T in (1, 3):
            q = normal(B, 2 * Hkv, T, D, seed=T).to(dtype)
            expect_equal(q, packed, window, close)
            expect_equal(q, packed, None, close)
            expect_equal(q, None, window, close)


@pytest.mark.parametrize("chunk", [600, 1 << 19])
@pytest.mark.parametrize("Hm", [1, Hkv])
@pytest.mark.parametrize(
    "key_bits, value_bits, S, K",
    [
        (8, 8, 4, 0),
        (4, 4, 4, 2),
        (4, 4, 4, 4),
        (3, 3, 2, 0),
        (2, 4, 8, 0),
        (4, 0, 4, 0),
        (3, 0, 8, 0),
    ],
)
def test_integers_are_read_as_the_plain_version_reads_them(
    key_bits, value_bits, S, K, Hm, chunk, monkeypatch
):
    """All bits and levels, with blocks of keys that are not full: equal to 1e-11 in float64."""
    monkeypatch.setattr(cpu, "CHUNK", chunk)
    D = 32 if S < 8 or value_bits else 64
    fmt = IntFormat(key_bits, value_bits, 16, torch.rand(Hkv, D) + 0.5)
    packed = context(S, K, Hm, D, fmt=fmt, dtype=torch.float32)
    for T in (1, 3):
        q = normal(B, 2 * Hkv, T, D, seed=T)
        expect_equal(q.double(), packed, ring(D), 1e-11)
        expect_equal(q, packed, ring(D, torch.float32), 1e-4)


@pytest.mark.parametrize("key_bits, value_bits", [(8, 8), (3, 0), (16, 16)])
def test_autocast_changes_nothing(key_bits, value_bits):
    """Inside autocast, where a model computes in bfloat16, a cache is read bit for bit as outside:
    integers, levels and whole numbers."""
    fmt = None
    if key_bits < 16:
        fmt = IntFormat(key_bits, value_bits, 16, torch.rand(Hkv, 64) + 0.5)
    packed = context(8, 0 if fmt else 2, Hkv, 64, fmt=fmt, dtype=torch.float32)
    window = ring(64, torch.float32)
    q = normal(B, 2 * Hkv, 2, 64).float()
    want = packed_attention_cpu(q, packed, window)
    with torch.autocast("cpu", torch.bfloat16):
        got = packed_attention_cpu(q, packed, window)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_lose_no_more_than_in_the_plain_version(dtype):
    """In 16 bits the error against float64 is at most twice the plain version's."""
    packed = context(4, 2, Hkv, 32, dtype=dtype)
    window = ring(32, dtype)
    q = normal(B, 2 * Hkv, 1, 32).to(dtype)
    whole = finite(window)
    exact = packed._replace(keys=packed.keys.double(), rows=packed.rows.double())
    wide = whole._replace(k=whole.k.double(), v=whole.v.double())
    want = packed_attention_ref(q.double(), exact, wide)[0]
    plain = (packed_attention_ref(q, packed, whole)[0] - want).abs().max()
    error = (packed_attention_cpu(q, packed, window)[0] - want).abs().max()
    assert 0 < error <= 2 * plain


def test_nothing_to_read_gives_zeros():
    """Without a token out is 0 and lse -inf: an empty window, empty segments, a window shorter than
    the new tokens (padding)."""
    packed = context(4, 2, Hkv, 16)
    packed = packed._replace(n=torch.zeros_like(packed.n))
    empty = window_view(*torch.zeros(2, B, Hkv, 4, 16).double(), None, [0, 0])
    none = window_view(*torch.zeros(2, B, Hkv, 0, 16).double(), None, [0, 0])
    for T in (1, 3):
        q = normal(B, 2 * Hkv, T, 16).double()
        for read in ((packed, None), (packed, empty), (None, empty), (packed, none)):
            out, lse = packed_attention_cpu(q, *read)
            assert not out.any() and (lse == float("-inf")).all()
    padded = window_view(*normal(2, B, Hkv, 4, 16).double(), None, [1, 2])
    expect_equal(q, None, padded, 1e-12)


def test_packed_attention_chooses_it_on_a_cpu(monkeypatch):
    """`auto` calls it; `torch`, and what wants a gradient, call the plain version."""
    called = []
    monkeypatch.setattr(kernels, "packed_attention_cpu", lambda *a: called.append("cpu"))
    monkeypatch.setattr(kernels, "packed_attention_ref", lambda *a: called.append("plain"))
    packed = context(4, 2, 1, 16)
    q = normal(B, Hkv, 1, 16).double()
    kernels.packed_attention(q, packed, None)
    kernels.packed_attention(q, packed, None, impl="torch")
    kernels.packed_attention(q.requires_grad_(), packed, None)
    with torch.no_grad():
        kernels.packed_attention(q, packed, None)
    assert called == ["cpu", "plain", "plain", "cpu"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_are_codes_around_zero(bits):
    """The parts of bytes, put where they say, are unpack_bits less half the codes, number by
    number, in a byte's highest bits; bytes that mean 0 are 0."""
    packed = torch.randint(0, 256, (5, 2, 6), dtype=torch.uint8)
    codes = unpack_bits(packed, bits).int()
    around_zero = torch.zeros_like(codes)
    for part, at in fields(packed, bits, torch.float32):
        around_zero[..., at] = part.int()
    assert torch.equal(around_zero, (codes - 2 ** (bits - 1)) * 2 ** (8 - bits))
    assert not any(part.any() for part, _ in fields(half_bytes(bits, 6), bits, torch.float32))


def test_work_covers_every_token_of_every_head_once(monkeypatch):
    """Blocks of work are as large as CHUNK allows, or one token's."""
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(cpu, "CHUNK", chunk)
        for n_heads, n_tokens, numbers in ((1, 1, 8), (3, 10, 4), (5, 7, 2)):
            seen = torch.zeros(n_heads, n_tokens, dtype=torch.int64)
            for heads, tokens in work(n_heads, n_tokens, numbers):
                seen[heads, tokens] += 1
                assert seen[heads, tokens].numel() * numbers <= max(chunk, numbers)
            assert (seen == 1).all()


def test_gather_fills_up_with_zeros():
    """Entries of segments anywhere in a flat tensor, evenly apart or not, shorter than asked for."""
    flat = torch.arange(1, 61).view(30, 2)
    cases = [([0, 10, 20], [8, 9, 7]), ([0, 11, 20], [8, 9, 7]), ([5, 5], [6, 6]), ([9], [2])]
    for base, counts in [*cases, ([20, 0], [9, 9])]:
        for at in (slice(0, 3), slice(2, 7), slice(5, 9)):
            got = gather(flat, base, counts, at)
            for own, first, n in zip(got, base, counts, strict=True):
                for i, entry in enumerate(own, at.start):
                    want = flat[first + i] if i < n else torch.zeros(2)
                    assert torch.equal(entry, want.long())


def test_rows_are_taken_whatever_their_bytes():
    """Rows of 1, 2, 4, 8, 16 bytes are moved as one number, bit for bit, and others as they are."""
    number = torch.tensor([[3, 0], [1, 3]], dtype=torch.int32)
    for x in (1, 2, 3, 4, 8, 16):
        rows = torch.randint(0, 256, (4, x), dtype=torch.uint8)
        assert torch.equal(take_rows(rows, number), rows[number.long()])
    rows = torch.randn(9, 4)[2:6]
    rows[1] = float("nan")
    assert torch.equal(take_rows(rows, number).isnan(), rows[number.long()].isnan())


def test_levels_mean_what_the_format_says():
    """The byte of every level and code, whatever the bits below the code, times the level's unit is
    (code - zero) step, in float64 exactly."""
    units = level_units(torch.float64)
    own, turn = level_bytes(1)
    for level in (1, 2, 3):
        below = 8 - LEVEL_BITS[level]
        for byte in torch.arange(256, dtype=torch.uint8):
            code = int(byte) >> below
            turned = (byte & own[level] ^ turn[level]).view(torch.int8)
            want = (code - zero_code(level)) * LEVEL_STEPS[level]
            assert abs(units[level] * turned - want) < 1e-15
    assert units[0] == 0
