"""The packed cache: what it stores, in which order, in how many bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import KVConfig
from storage import layout
from storage.as_dense import as_dense
from storage.cache import NewTokens
from storage.packed import FloatCodec, PackedCache, ValueBasis


def filled(
    T: int,
    S: int,
    K: int,
    *,
    B=2,
    Hkv=3,
    D=16,
    scope="head",
    tail=0,
    block=1,
    cap=None,
    chunks=None,
    pad=None,
    seed=0,
    basis=ValueBasis(),
):
    """A cache that took T random tokens in chunks, pad (B,) of them padding, and what it took: k, v
    (B, Hkv, T, D), mask."""
    cfg = KVConfig(n_groups=S, topk_groups=K, mask_scope=scope, kv_tail=tail, kv_tail_block=block)
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, Hkv, T, D, generator=g)
    mask = layout.top_k_mask(torch.randn(B, Hkv if scope == "head" else 1, T, S, generator=g), K)
    cache = PackedCache(B, T if cap is None else cap, Hkv, D, cfg, K, k, basis)
    at = 0
    for n in chunks or [T]:
        n_pad = None if pad is None else (torch.tensor(pad) - at).clamp(0, n)
        new = slice(at, at + n)
        cache.append(NewTokens(k[:, :, new], v[:, :, new], n_pad, mask[:, :, new]))
        at += n
    return cache, k, v, mask


@pytest.mark.parametrize("S", [2, 4, 8, 16, 32, 64])
def test_bits_round_trip_and_have_the_stated_type(S):
    """mask_to_bits puts group g in bit g, in uint8 up to S = 8, then the integer of S bits (the
    highest is its sign), and comes back."""
    mask = torch.randint(0, 2, (300, S), generator=torch.Generator().manual_seed(S)).bool()
    mask[0] = True
    mask[1] = False
    bits = layout.mask_to_bits(mask)
    assert bits.dtype == {16: torch.int16, 32: torch.int32, 64: torch.int64}.get(S, torch.uint8)
    assert torch.equal(layout.bits_to_mask(bits, S), mask)
    for i in range(50):
        assert int(bits[i]) % (1 << max(S, 8)) == sum(1 << g for g in range(S) if mask[i, g])


def test_rows_lie_token_major_group_minor_at_the_stated_number():
    """Row of (t, g) = segment base + K t + kept groups of t before g; looked up one by one, per
    head."""
    T = 150
    S = 4
    K = 2
    cache, k, v, mask = filled(T, S, K)
    rows = cache.rows.view(2, 3, -1, 4)
    keys = cache.keys.view(2, 3, -1, 16)
    assert torch.equal(keys, k) and rows.size(2) == T * K
    for b in range(2):
        for h in range(3):
            count = 0
            for t in range(T):
                bits = int(cache.bits.view(2, 3, -1)[b, h, t])
                for g in range(S):
                    if mask[b, h, t, g]:
                        at = count + bin(bits & ((1 << g) - 1)).count("1")
                        assert torch.equal(rows[b, h, at], v[b, h, t, 4 * g : 4 * g + 4])
                count += K


@given(T=st.integers(1, 140), S=st.sampled_from([2, 4, 8, 16]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_unpack_returns_what_was_appended(T, S, data):
    """Keys, kept values (zeros elsewhere) and masks come back for any length, chunks, padding,
    window, scope and starting capacity. A value is encoded once, when it is packed, and not while
    it is in the window."""
    K = data.draw(st.integers(1, S))
    scope = data.draw(st.sampled_from(["head", "layer"]))
    cuts = sorted(data.draw(st.sets(st.integers(1, T), max_size=4)) | {0, T})
    chunks = [b - a for a, b in itertools.pairwise(cuts)]
    pad = [data.draw(st.integers(0, T - 1)), 0]
    tail = data.draw(st.integers(0, 9))
    block = data.draw(st.integers(1, 7))
    cap = data.draw(st.sampled_from([0, 1, T // 2, T]))
    enc = data.draw(st.sampled_from([None, 3 * torch.eye(16).flip(-1).expand(3, -1, -1)]))
    cache, k, v, mask = filled(
        T,
        S,
        K,
        scope=scope,
        tail=tail,
        block=block,
        cap=cap,
        chunks=chunks,
        pad=pad,
        basis=ValueBasis(enc),
    )
    got_k, got_v, got_mask = as_dense(cache)
    z = v if enc is None else 3 * v.flip(-1)
    kept = z * layout.expand_mask(mask, 16)
    for b in range(2):
        n = T - pad[b]
        n_packed = max(0, (n - tail) // block * block)
        assert int(cache.n_packed[b]) == n_packed
        assert int(cache.n_window[b]) == n - n_packed
        assert int(cache.lengths[b]) == n
        whole = pad[b] + n_packed
        want_v = torch.cat((kept[b, :, pad[b] : whole], v[b, :, whole:]), 1)
        assert torch.equal(got_k[b, :, :n], k[b, :, pad[b] :])
        assert torch.equal(got_v[b, :, :n], want_v)
        assert torch.equal(got_mask[b, :, :n], mask[b, :, pad[b] :])


def test_nbytes_is_the_storage_and_close_to_the_kept_share():
    """nbytes counts every tensor's storage; at T = 256, float32, keys + kept rows + masks + segment
    starts and counts, within 2 % of 75 %."""
    T = 256
    D = 16
    Hkv = 8
    B = 4
    for scope in ("layer", "head"):
        cache, *_ = filled(T, 4, 2, B=B, Hkv=Hkv, D=D, scope=scope)
        Hm = Hkv if scope == "head" else 1
        by_hand = 4 * B * Hkv * T * (D + D // 2) + B * Hm * T + 2 * 8 * B + 8 * B * (2 * Hkv + Hm)
        found = sum(
            t.untyped_storage().nbytes()
            for t in vars(cache).values()
            if isinstance(t, torch.Tensor)
        )
        assert cache.nbytes() == by_hand == found
        assert abs(cache.nbytes() / (4 * 2 * B * Hkv * T * D) / 0.75 - 1) < 0.02


def test_nan_in_unwritten_slots_never_reaches_a_result():
    """Slots past the tokens seen are not read: poisoned with NaN, unpacked values stay finite."""
    cfg = KVConfig(kv_tail=4, mask_scope="layer")
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 3, 20, 16, generator=g)
    mask = layout.top_k_mask(torch.randn(2, 1, 20, 4, generator=g), 2)
    cache = PackedCache(2, 64, 3, 16, cfg, 2, k)
    for t in (cache.keys, cache.rows, cache.window_k, cache.window_v):
        t.fill_(float("nan"))
    cache.append(NewTokens(k, v, torch.tensor([0, 7]), mask))
    assert all(t.isfinite().all() for t in as_dense(cache)[:2])


def test_truncate_forgets_the_newest_tokens():
    """After truncate(n) other tokens can follow, and the cache holds the first n and then those,
    tile offsets included."""
    for n in (0, 1, 63, 64, 65, 99):
        (cache, *first) = filled(100, 4, 2)
        (_, *second) = filled(100, 4, 2, seed=1)
        cache.truncate(n)
        assert as_dense(cache)[0].size(2) == n
        k, v, mask = (t[:, :, n:] for t in second)
        cache.append(NewTokens(k, v, None, mask))
        k, v, mask = (
            torch.cat((a[:, :, :n], b[:, :, n:]), 2) for a, b in zip(first, second, strict=True)
        )
        for got, want in zip(
            as_dense(cache), (k, v * mask.repeat_interleave(4, -1), mask), strict=True
        ):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="truncating"):
        cache.truncate(-1)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_hosts_bound_holds_whatever_is_done(data):
    """`longest` is at least what any sequence has packed, and no more than there is room for, after
    appending with padding, cutting, joining, picking, putting back, loading and reserving. Once it
    has been reserved for and padding comes no more, it is what the longest sequence has packed, or
    would have where whole blocks did not wait."""
    tail = data.draw(st.integers(0, 5))
    block = data.draw(st.integers(1, 3))
    cfg = KVConfig(n_groups=4, topk_groups=2, kv_tail=tail, kv_tail_block=block)
    codec = FloatCodec(data.draw(st.sampled_from([0, 2])))

    def new(batch: int) -> PackedCache:
        like = torch.zeros(0)
        return PackedCache(batch, data.draw(st.integers(0, 30)), 1, 8, cfg, 2, like, codec=codec)

    def append(cache: PackedCache, n: int, pad: bool) -> None:
        k, v = torch.randn(2, cache.batch, 1, n, 8)
        n_pad = torch.tensor([data.draw(st.integers(0, n)) for _ in range(cache.batch)])
        cache.append(NewTokens(k, v, n_pad if pad else None))

    cache = new(2)
    done = st.sampled_from(["append", "cut", "join", "pick", "put back", "load", "fit", "reserve"])
    for what in data.draw(st.lists(done, max_size=8)):
        n = data.draw(st.integers(1, 12))
        if what == "append":
            append(cache, n, pad=True)
        if what == "cut":
            cache.truncate(n)
        if what == "join":
            other = new(1)
            append(other, n, pad=False)
            cache = PackedCache.cat([cache, other])
        if what == "pick":
            cache = cache.select_sequences(range(data.draw(st.integers(1, cache.batch))))
        if what == "put back":
            before = cache.snapshot()
            append(cache, n, pad=False)
            cache.restore(before)
        if what == "load":
            state = cache.state_dict()
            cache = new(cache.batch)
            if data.draw(st.booleans()):  # into one that has held more
                append(cache, 40, pad=False)
                cache.reserve(1)
            cache.load_state_dict(state)
        if what == "fit":
            cache.fit(n)
        if what == "reserve":
            cache.reserve(n)
        assert int(cache.n_packed.max()) <= cache.longest <= cache.capacity
    append(cache, 3, pad=False)  # no first tokens are missing now
    cache.reserve(20)
    packed = int(cache.n_packed.max())
    for _ in range(9):
        append(cache, 1, pad=False)
        seen = int((cache.n_packed + cache.n_window).max())
        assert cache.longest == max(packed, seen - tail)
        assert int(cache.n_packed.max()) <= cache.longest
