"""The cache for query-aware selection: what it stores of a context, where, in how many bytes, and
what follows it in the window."""

from __future__ import annotations

import pytest
import torch
from helpers import error_line
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ModelConfig
from storage.cache import KVCache, NewTokens, storage_bytes
from storage.dense import DenseCache
from storage.integers import codecs
from storage.integers.format import IntFormat
from storage.layout import cdiv, tile_size
from storage.packed import ValueBasis
from storage.ragged import BASES, SHARED, RaggedCache, fill_windows, pack_layers

TILE = tile_size(4)  # where a test says no other S
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)


def context(
    C: int,
    S: int,
    *,
    B=2,
    Hkv=3,
    D=16,
    scope="head",
    pad=(0, 0),
    keep=0.6,
    pairs=0.5,
    seed=0,
    dtype=torch.float32,
    device="cpu",
):
    """A random context: k, z (B, Hkv, C, D), keep (B, Hm, C), mask (B, Hm, C, S) and valid (B, C),
    keep and mask drawn for padding too."""
    g = torch.Generator().manual_seed(seed)
    Hm = Hkv if scope == "head" else 1
    k, z = torch.randn(2, B, Hkv, C, D, generator=g, dtype=torch.float64).to(dtype)
    keep = torch.rand(B, Hm, C, generator=g) < keep
    mask = torch.rand(B, Hm, C, S, generator=g) < pairs
    valid = torch.arange(C) >= torch.tensor(pad)[:, None]
    return tuple(t.to(device) for t in (k, z, keep, mask, valid))


def packed(k, z, keep, mask, valid, max_len: int | None = None, **kw) -> RaggedCache:
    """A cache that packed that context."""
    B, Hkv, C, D = k.shape
    room = C if max_len is None else max_len
    cache = RaggedCache(B, room, Hkv, D, mask.size(-1), mask.size(1), k)
    cache.pack(k, z, keep, mask, valid, **kw)
    return cache


def append(cache: RaggedCache, k: torch.Tensor, v: torch.Tensor, n_pad=None) -> None:
    """Append tokens after it, of which the first n_pad (B numbers) are padding."""
    cache.append(NewTokens(k, v, None if n_pad is None else torch.tensor(n_pad)))


def filled(*args, max_len: int = 64, **kw) -> RaggedCache:
    """A cache with a random context and seven whole tokens after it."""
    k, *rest = context(*args, **kw)
    cache = packed(k, *rest, max_len=max_len)
    append(cache, *following(k, 7))
    return cache


def following(k: torch.Tensor, T: int, seed: int = 9) -> torch.Tensor:
    """k and v (2, B, Hkv, T, D) of T random tokens after a context k."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, *k.shape[:2], T, k.size(3), generator=g).to(k)


def unpacked(cache: RaggedCache) -> tuple[torch.Tensor, ...]:
    """k, z, mask and valid of the packed part, left-aligned."""
    return cache.view().packed[0].unpack()


def windows(cache: RaggedCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """k and v (Hkv, n, D) of every sequence's window."""
    view = cache.view().window
    assert view.first is None
    rows = zip(view.k, view.v, view.count.tolist(), strict=True)
    return [(k[:, :n], v[:, :n]) for k, v, n in rows]


def check_layout(cache: RaggedCache, k, z, keep, mask, valid) -> None:
    """Walk over (b, h, t, g) and assert that every number stored is where the layout says, and that
    nothing else is stored."""
    B, Hkv, C, D = k.shape
    Hm = mask.shape[1]
    S = mask.shape[3]
    d = D // S
    survivors = {
        (b, m): [t for t in range(C) if keep[b, m, t] and valid[b, t]]
        for b in range(B)
        for m in range(Hm)
    }
    tokens = rows = masks = tiles = 0
    for b in range(B):
        assert int(cache.n_context[b]) == sum(map(bool, valid[b]))
        for m in range(Hm):
            mine = survivors[b, m]
            assert (
                int(cache.mask_base[b, m]) == masks
                and int(cache.tile_base[b, m]) == tiles
                and int(cache.n_packed[b, m]) == len(mine)
            )
            count = 0
            for i, t in enumerate(mine):
                if i % tile_size(S) == 0:
                    assert int(cache.tile_rows[tiles]) == count
                    tiles += 1
                assert int(cache.tile_rows[tiles - 1]) + int(cache.before[masks + i]) == count
                groups = [g for g in range(S) if mask[b, m, t, g]]
                assert int(cache.bits[masks + i]) % (1 << max(S, 8)) == sum(1 << g for g in groups)
                count += len(groups)
            assert int(cache.n_rows[b, m]) == count
            masks += len(mine)
        for h in range(Hkv):
            m = h if Hm > 1 else 0
            assert int(cache.token_base[b, h]) == tokens and int(cache.row_base[b, h]) == rows
            for t in survivors[b, m]:
                assert torch.equal(cache.keys[tokens], k[b, h, t])
                tokens += 1
                for g in range(S):
                    if mask[b, m, t, g]:
                        assert torch.equal(cache.rows[rows], z[b, h, t, g * d : (g + 1) * d])
                        rows += 1
    assert cache.keys.shape == (tokens, D) and cache.rows.shape == (rows, d)
    assert cache.bits.shape == (masks,) and cache.tile_rows.shape == (tiles,)
    assert cache.before.shape == (masks,)


def check_unpack(cache: RaggedCache, k, z, keep, mask, valid) -> None:
    """Assert that unpack gives the survivors of every segment in order, zeros where dropped and
    past them."""
    got_k, got_z, got_mask, got_valid = unpacked(cache)
    B, Hkv, C, D = k.shape
    Hm = mask.shape[1]
    S = mask.shape[3]
    N = got_valid.size(2)
    most = 0
    for b in range(B):
        for h in range(Hkv):
            m = h if Hm > 1 else 0
            mine = [t for t in range(C) if keep[b, m, t] and valid[b, t]]
            most = max(most, len(mine))
            assert got_valid[b, m].tolist() == [i < len(mine) for i in range(N)]
            want_k = torch.zeros(N, D).to(k)
            want_z = torch.zeros(N, D).to(k)
            want_mask = torch.zeros(N, S).to(mask)
            for i, t in enumerate(mine):
                want_k[i] = k[b, h, t]
                want_mask[i] = mask[b, m, t]
                want_z[i] = torch.stack(
                    [
                        z[b, h, t, x] if mask[b, m, t, x * S // D] else z.new_zeros(())
                        for x in range(D)
                    ]
                )
            assert (
                torch.equal(got_k[b, h], want_k)
                and torch.equal(got_z[b, h], want_z)
                and torch.equal(got_mask[b, m], want_mask)
            )
    assert (
        most == N
        and got_mask.shape == (B, Hm, N, S)
        and got_k.shape == got_z.shape == (B, Hkv, N, D)
    )


def same_state(a: RaggedCache, b: RaggedCache) -> bool:
    """Whether two caches give the same packed part, window and counts."""
    parts = [
        *zip(unpacked(a), unpacked(b), strict=True),
        *[
            pair
            for ours, theirs in zip(windows(a), windows(b), strict=True)
            for pair in zip(ours, theirs, strict=True)
        ],
        (a.n_rows, b.n_rows),
        (a.n_context, b.n_context),
        (a.lengths, b.lengths),
    ]
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in parts)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_context_lies_where_the_layout_says(scope, dtype, device):
    """Keys, rows, masks and offsets looked up one by one, over three tiles of survivors,
    with padding and dropped tokens; keys and values given as views whose heads are not
    contiguous."""
    k, z, *rest = context(201, 4, scope=scope, pad=(0, 13), keep=0.8, dtype=dtype, device=device)
    k, z = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, z))
    cache = packed(k, z, *rest)
    assert cache.keys.dtype == cache.rows.dtype == dtype and int(cache.n_packed.max()) > 2 * TILE
    check_layout(cache, k, z, *rest)
    check_unpack(cache, k, z, *rest)


@given(
    B=st.integers(1, 3),
    Hkv=st.integers(1, 3),
    half=st.integers(0, 45),
    S=st.sampled_from([2, 4, 8, 16, 32, 64]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_context_and_window_hold_what_was_given(B, Hkv, half, S, data):
    """Any odd context length, S, scope, padding, share of tokens and pairs, then any pieces of any
    padding after it: the layout, unpack and the window hold exactly what was given, lengths count
    it, and the window's capacity is what was asked for."""
    C = 2 * half + 1
    D = max(S, 8)
    scope = data.draw(st.sampled_from(["head", "layer"]))
    pad = data.draw(st.lists(st.integers(0, C), min_size=B, max_size=B))
    shares = [data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])) for _ in range(2)]
    given_ = context(
        C,
        S,
        B=B,
        Hkv=Hkv,
        D=D,
        scope=scope,
        pad=pad,
        keep=shares[0],
        pairs=shares[1],
        seed=data.draw(st.integers(0, 99)),
    )
    pieces = data.draw(st.lists(st.integers(1, 9), max_size=4))
    room = data.draw(st.integers(0, 12))
    cache = packed(*given_, max_len=C + room)
    k, v = torch.randn(2, B, Hkv, sum(pieces), D, generator=torch.Generator().manual_seed(1))
    mine = [[] for _ in range(B)]
    at = 0
    free = cap = room  # the window is made with the context
    for n in pieces:
        n_pad = data.draw(st.none() | st.lists(st.integers(0, n), min_size=B, max_size=B))
        append(cache, k[:, :, at : at + n], v[:, :, at : at + n], n_pad)
        longest = max(map(len, mine))
        more = n
        if n > free and n_pad:  # it looks how much is needed
            more = max(len(mine[b]) + n - n_pad[b] for b in range(B)) - longest
        if more > free:
            if longest + more > cap:
                cap = max(longest + more, cap + cap // 4 if cap else room)
            free = cap - longest
        free -= more
        for b in range(B):
            mine[b] += range(at + (n_pad[b] if n_pad else 0), at + n)
        at += n
    check_layout(cache, *given_)
    check_unpack(cache, *given_)
    for b, (got_k, got_v) in enumerate(windows(cache)):
        assert torch.equal(got_k, k[b][:, mine[b]]) and torch.equal(got_v, v[b][:, mine[b]])
        assert int(cache.lengths[b]) == C - pad[b] + len(mine[b])
    assert cache.window_k.shape == cache.window_v.shape == (B, Hkv, cap, D)


def test_unpack_reads_rows_through_the_stored_offsets():
    """The offset stored for a tile decides which rows its tokens get: one row more, and that tile
    alone reads one row further on."""
    k, z, keep, mask, valid = context(201, 4, B=1, Hkv=1, pad=(0,), keep=0.8)
    cache = packed(k, z, keep, mask, valid)
    before = unpacked(cache)[1]
    cache.tile_rows[1] += 1
    at = unpacked(cache)[1].unflatten(-1, (4, 4))[0, 0], before.unflatten(-1, (4, 4))[0, 0]
    kept = unpacked(cache)[2][0, 0]
    tile = torch.arange(before.size(2)) // TILE
    first = int(cache.tile_rows[1])
    n = int(kept[tile == 1].sum())
    assert torch.equal(at[0][tile == 1][kept[tile == 1]], cache.rows[first : first + n])
    assert torch.equal(at[0][tile != 1], at[1][tile != 1]) and not torch.equal(*at)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_empty_and_single_survivors_are_stored_as_such(scope):
    """A segment may keep no token at all, one token, or tokens without any group, whose keys still
    count; all of them beside full ones; a batch may keep nothing; a row may be padding only."""
    k, z, keep, mask, valid = context(69, 4, B=3, scope=scope, pad=(0, 2, 69))
    keep[0, 0] = False
    keep[1, -1] = torch.arange(69) == 68
    mask[0, -1, ::3] = False
    mask[1, 0] = False
    for keep_all in (keep, torch.ones_like(keep), torch.zeros_like(keep)):
        cache = packed(k, z, keep_all, mask, valid)
        check_layout(cache, k, z, keep_all, mask, valid)
        check_unpack(cache, k, z, keep_all, mask, valid)
    flat = (cache.keys, cache.rows, cache.bits, cache.before, cache.tile_rows)
    assert not any(t.numel() for t in flat)
    assert unpacked(cache)[0].shape == (3, 3, 0, 16) and cache.lengths.tolist() == [69, 67, 0]
    empty = RaggedCache(2, 9, 3, 16, 4, 3 if scope == "head" else 1, k)
    assert unpacked(empty)[3].shape[2] == 0 and empty.lengths.tolist() == [0, 0]
    assert all(k.shape == v.shape == (3, 0, 16) for k, v in windows(empty))


def test_padding_is_never_stored():
    """Keys and values of padding may be NaN: no number stored or unpacked is, although keep and
    mask are True there."""
    k, z, keep, mask, valid = context(41, 4, pad=(0, 17), keep=1.0, pairs=1.0)
    k[1, :, :17] = float("nan")
    z[1, :, :17] = float("nan")
    cache = packed(k, z, keep, mask, valid)
    append(cache, k[:, :, 10:], z[:, :, 10:], (0, 7))
    stored = (cache.keys, cache.rows, *unpacked(cache)[:2], cache.window_k, cache.window_v)
    assert all(t.isfinite().all() for t in stored)
    assert cache.keys.size(0) == 3 * (41 + 24) and cache.lengths.tolist() == [41 + 31, 24 + 24]


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_nbytes_is_the_sum_of_the_sizes_by_hand(scope):
    """nbytes counts keys, rows, masks, offsets, counts, bases and the window, and nothing is
    allocated beyond them."""
    B = 2
    Hkv = 3
    C = 131
    D = 16
    S = 4
    T = 5
    max_len = 150
    k, z, keep, mask, valid = context(C, S, scope=scope, pad=(0, 4))
    cache = packed(k, z, keep, mask, valid, max_len=max_len)
    kept = [
        [[bool(keep[b, m, t]) and bool(valid[b, t]) for t in range(C)] for m in range(keep.size(1))]
        for b in range(B)
    ]
    Hm = keep.size(1)
    survivors = [sum(kept[b][m]) for b in range(B) for m in range(Hm)]
    pairs = sum(
        int(mask[b, m, t].sum())
        for b in range(B)
        for m in range(Hm)
        for t in range(C)
        if kept[b][m][t]
    )
    copies = Hkv // Hm
    flat = 4 * D * sum(survivors) * copies + 4 * (D // S) * pairs * copies  # keys and rows, float32
    # bits and before uint8, tile_rows int32
    index = (1 + 1) * sum(survivors) + 4 * sum(cdiv(n, TILE) for n in survivors)
    # n_packed, n_rows; token and row bases; mask and tile bases; n_context and n_window
    counts = 8 * (2 * B * Hm + 2 * B * Hkv + 2 * B * Hm + 2 * B)
    window = 2 * 4 * B * Hkv * (max_len - C) * D
    assert cache.nbytes() == flat + index + counts + window
    append(cache, k[:, :, :T], z[:, :, :T])
    assert cache.nbytes() == flat + index + counts + window
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in vars(cache).values()
        if isinstance(t, torch.Tensor)
    }
    assert cache.nbytes() == sum(found.values()) == KVCache([cache]).nbytes()


def test_masks_shared_between_layers_are_counted_once():
    """Layers packed with bits_from hold the very same mask, offset and count tensors; KVCache counts those once, each layer's own nbytes counts them whole; layers of other kinds and
    empty tensors add what they hold."""
    k, z, keep, mask, valid = context(131, 4, pad=(0, 3))
    first = packed(k, z, keep, mask, valid)
    second = packed(2 * k, z - 1, keep, mask, valid, bits_from=first)
    check_layout(second, 2 * k, z - 1, keep, mask, valid)
    check_unpack(second, 2 * k, z - 1, keep, mask, valid)
    ours = first.state_dict()
    theirs = second.state_dict()
    shared = {n for n, t in ours.items() if t is theirs[n]}
    assert shared == {*SHARED, *BASES}
    common = sum(ours[n].nbytes for n in shared)
    own = sum(t.nbytes for n, t in theirs.items() if n not in shared)
    assert first.nbytes() == second.nbytes() == common + own
    empty = RaggedCache(2, 9, 3, 16, 4, 3, k)
    dense = DenseCache(2, 11, 3, 16, k)
    assert KVCache([first, second]).nbytes() == common + 2 * own
    assert (
        KVCache([empty, first, dense, second]).nbytes()
        == common + 2 * own + empty.nbytes() + dense.nbytes()
    )
    assert storage_bytes([torch.zeros(0), torch.zeros(3, 0), torch.zeros(5)]) == 20
    append(second, *following(k, 5))
    second.truncate(torch.tensor([132, 129]))
    assert first.lengths.tolist() == [131, 128] and second.lengths.tolist() == [132, 129]
    check_unpack(first, k, z, keep, mask, valid)
    for other in ((keep & (torch.arange(131) < 99), mask), (keep, mask & (torch.arange(4) > 0))):
        with pytest.raises(AssertionError, match="another keep or mask"):
            packed(k, z, *other, valid, bits_from=first)


CODECS = {  # bits of keys and values, tokens of a block, first tokens that stay whole
    "whole numbers": None,
    "integers": (4, 8, 16, 3),
    "levels": (3, 0, 16, 4),
}


@pytest.mark.parametrize("large", [1 << 26, 25_000], ids=["at once", "two at a time"])
@pytest.mark.parametrize("pad", [(0, 0, 0), (0, 17, 75), (0, 82, 86)], ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_layers_packed_at_once_are_those_packed_one_by_one(name, pad, large, monkeypatch):
    """pack_layers and fill_windows give every layer, of other tokens and pairs each, the very
    tensors that pack and append give it, first tokens before all else, in views of common ones: all layers' bytes
    are those of the layers apart. Padding leaves whole contexts, fewer tokens than stay whole, or
    none."""
    monkeypatch.setitem(codecs.LARGE, "cpu", large)
    C, T, S, L = 83, 90, 4, 3
    bits = CODECS[name]
    n_first = bits[3] if bits else 0
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, L, len(pad), 3, T, 16, generator=g)
    drawn = [context(C, S, B=len(pad), pad=pad, keep=p, seed=p) for p in (6, 0, 9)]
    keep = torch.stack(
        [
            torch.rand(d[2].shape, generator=g) < p
            for d, p in zip(drawn, (0.6, 0.0, 0.9), strict=True)
        ]
    )
    valid = drawn[0][4]
    mask = torch.stack([d[3] for d in drawn])
    if name == "levels":
        mask = torch.randint(0, 4, mask.shape, generator=g, dtype=torch.uint8)
    moment = None
    if bits:
        keep &= (valid.cumsum(-1) > n_first)[:, None]
        q = torch.randn(L, len(pad), 3, 30, 16, generator=g, dtype=torch.float64)
        moment = q.mT @ q

    def new(i: int) -> RaggedCache:
        codec = None
        if bits:
            gain = 0.5 + torch.rand(3, 16, generator=torch.Generator().manual_seed(i))
            codec = codecs.IntCodec(IntFormat(*bits[:3], None if bits[1] else gain), n_first)
        return RaggedCache(len(pad), 95, 3, 16, S, 3, k[0], codec)

    n_pad = torch.tensor(pad) if any(pad) else None
    apart = [new(i) for i in range(L)]
    start = torch.tensor(pad)
    few = (start + n_first - C).clamp(0, n_first)
    at = ((start - few)[:, None] + torch.arange(n_first)).clamp(0, C - 1)[:, None, :, None]
    for i, cache in enumerate(apart):
        args = (k[i, :, :, :C], v[i, :, :, :C], keep[i], mask[i], valid)
        cache.pack(*args, query_moment=None if moment is None else moment[i])
        if n_first:
            cache.max_len += n_first
            append(cache, k[i].take_along_dim(at, 2), v[i].take_along_dim(at, 2), few.tolist())
            cache.n_context = cache.n_context - (n_first - few)
        region_pad = None if n_pad is None else (n_pad - C).clamp_min(0)
        cache.append(NewTokens(k[i, :, :, C:], v[i, :, :, C:], region_pad))
    at_once = [new(i) for i in range(L)]
    pack_layers(at_once, k[..., :C, :], v[..., :C, :], keep, mask, valid, moment)
    fill_windows(at_once, k, v, C, n_pad)
    for one, all_of_them in zip(apart, at_once, strict=True):
        assert all_of_them.longest >= one.longest and not all_of_them.fresh
        assert all_of_them.max_len == one.max_len and all_of_them.room <= one.room
        for what, t in one.state_dict().items():
            assert torch.equal(getattr(all_of_them, what), t), what
    if large > 25_000:
        assert KVCache(at_once).nbytes() == KVCache(apart).nbytes()
    more = torch.randn(2, len(pad), 3, 9, 16, generator=g)
    for one, all_of_them in zip(apart, at_once, strict=True):
        for cache in (one, all_of_them):
            append(cache, *more)
        assert same_state(one, all_of_them)


def test_pack_refuses_what_it_cannot_store():
    """A second context, one after other tokens, padding on the right and a wrong number of mask
    heads."""
    ctx = context(21, 4)
    cache = packed(*ctx)
    late = RaggedCache(2, 30, 3, 16, 4, 3, ctx[0])
    append(late, *ctx[:2])
    for c in (cache, late):
        with pytest.raises(AssertionError, match="packed once"):
            c.pack(*ctx)
    with pytest.raises(AssertionError, match="packed once"):
        pack_layers([late], *(t[None] for t in ctx[:4]), ctx[4])
    with pytest.raises(AssertionError, match="left"):
        packed(*ctx[:4], ctx[4].flip(-1) & (torch.arange(21) < 20))
    with pytest.raises(ValueError, match="mask_heads"):
        RaggedCache(2, 30, 3, 16, 4, 2, ctx[0])


def test_a_window_without_a_context_holds_everything_but_padding():
    """Without pack the window holds every token: first allocation max_len, padding of several
    pieces is not there and takes no room, and of the longest sequence alone capacity is needed."""
    cache = RaggedCache(3, 20, 2, 16, 4, 1, torch.zeros(0))
    pad = torch.tensor([2, 3, 9])
    k, v = torch.randn(2, 3, 2, 28, 16, generator=torch.Generator().manual_seed(0))
    at = 0
    for n, cap in ((1, 0), (6, 20), (7, 20), (8, 20), (6, 26)):
        append(cache, k[:, :, at : at + n], v[:, :, at : at + n], (pad - at).clamp(0, n).tolist())
        at += n
        for b, (got_k, got_v) in enumerate(windows(cache)):
            assert torch.equal(got_k, k[b, :, pad[b] : at])
            assert torch.equal(got_v, v[b, :, pad[b] : at])
        assert cache.window_k.size(2) == cap
    assert cache.lengths.tolist() == [26, 25, 19] and not len(cache.keys)


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("keep", [0.6, 1.0], ids=["dropped", "all kept"])
def test_select_sequences_holds_those_asked_for(scope, keep):
    """Those sequences, in that order and as often as asked, exactly sized and sharing nothing with
    the original."""
    pick = [3, 0, 3]
    k, z, *_ = ctx = context(83, 4, B=4, scope=scope, pad=(0, 5, 83, 11), keep=keep)
    cache = packed(*ctx, max_len=90)
    append(cache, k[:, :, :6], z[:, :, :6], (0, 0, 2, 0))
    part = cache.select_sequences(pick)
    for walk in (check_layout, check_unpack):
        walk(part, *(t[pick] for t in ctx))
    for got, b in zip(windows(part), pick, strict=True):
        for ours, theirs in zip(got, windows(cache)[b], strict=True):
            assert torch.equal(ours, theirs)
    assert part.batch == 3 and part.lengths.tolist() == cache.lengths[pick].tolist()
    for name, t in part.state_dict().items():
        if t.numel():
            original = getattr(cache, name)
            assert t.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()
            assert t.untyped_storage().nbytes() == t.nbytes
    assert same_state(cache.select_sequences(range(4)), cache)
    assert unpacked(cache.select_sequences([]))[0].shape == (0, 3, 0, 16)
    before = cache.select_sequences(range(4))
    append(part, k[pick, :, :3], z[pick, :, :3])
    part.keys.zero_()
    assert same_state(before, cache)


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("keep", [0.9, 1.0], ids=["dropped", "all kept"])
def test_truncate_forgets_the_tokens_past_n(scope, keep):
    """After truncate(n), n one number or one for each sequence, the cache is what the first n
    tokens give; other tokens can follow; picking and joining give what the cache has. Inside the
    context, which is kept as it is, every n is refused by name and nothing changes."""
    C = 91
    T = 6
    pad = torch.tensor([0, 7])
    ctx = context(C, 4, scope=scope, pad=pad.tolist(), keep=keep)
    k, v = following(ctx[0], T)
    after = (pad.new_tensor([0, 2]), torch.tensor([T, T - 2]))  # padding of it, and tokens
    for left in ((0, 0), (0, 3), (4, 1), (1, 4), (T, T), (T + 9, 2)):
        cache = packed(*ctx, max_len=C + T)
        append(cache, k, v, after[0].tolist())
        n = C - pad + torch.tensor(left)
        cache.truncate(n)
        want = packed(*ctx, max_len=C + T)
        for b, count in enumerate(torch.tensor(left).minimum(after[1]).tolist()):
            alone = packed(*(t[b : b + 1] for t in ctx), max_len=C + T)
            if count:
                at = int(after[0][b])
                append(alone, k[b : b + 1, :, at : at + count], v[b : b + 1, :, at : at + count])
            assert same_state(cache.select_sequences([b]), alone)
            want = alone if not b else RaggedCache.cat([want, alone])
        assert same_state(cache, want)
        for c in (cache, want):
            append(c, -k, -v)
        assert same_state(cache, want)
    cache = packed(*ctx, max_len=C + T)
    append(cache, k, v)
    whole = cache.select_sequences([0, 1])
    for n in (0, 63, C - 8, C - 1, torch.tensor([C, C - 8]), torch.tensor([C - 1, C + T])):
        assert "selected context" in error_line(cache.truncate, n)
        assert same_state(cache, whole)
    assert "truncating" in error_line(cache.truncate, -1)
    cache.truncate(C)  # the other sequence has no more than that
    assert cache.lengths.tolist() == [C, C - 7 + T]


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_caches_of_any_sizes_are_joined(scope):
    """Contexts of other lengths, one that is none, windows of other capacities, one that is empty:
    each sequence of the joined cache is what it was, the parts stay as they were, and all go on."""
    parts = [
        filled(83, 4, scope=scope, pad=(0, 5), keep=1.0, max_len=200),
        packed(*context(1, 4, scope=scope, pad=(0, 1))),
        RaggedCache(2, 50, 3, 16, 4, 3 if scope == "head" else 1, torch.zeros(0)),
        filled(31, 4, scope=scope, B=3, pad=(2, 31, 0), keep=0.4),
    ]
    parts[2].fresh = False  # as after a prompt of which nothing is left
    before = [c.select_sequences(range(c.batch)) for c in parts]
    joined = RaggedCache.cat(parts)
    assert joined.batch == 9 and joined.lengths.tolist() == [
        n for c in parts for n in c.lengths.tolist()
    ]
    k, v = following(torch.zeros(9, 3, 0, 16), 4)
    for _ in range(2):
        first = 0
        for part, old in zip(parts, before, strict=True):
            rows = range(first, first + part.batch)
            assert same_state(joined.select_sequences(rows), part)
            assert same_state(part, old)
            append(part, k[rows], v[rows])
            append(old, k[rows], v[rows])
            first += part.batch
        append(joined, k, v)
    for other in (
        RaggedCache(2, 9, 3, 32, 4, parts[2].mask_heads, torch.zeros(0)),
        RaggedCache(2, 9, 3, 16, 8, parts[2].mask_heads, torch.zeros(0)),
        RaggedCache(2, 9, 3, 16, 4, 4 - parts[2].mask_heads, torch.zeros(0)),
        RaggedCache(2, 9, 3, 16, 4, parts[2].mask_heads, torch.zeros(0, dtype=torch.float64)),
    ):
        assert "caches to be joined" in error_line(RaggedCache.cat, [parts[0], other])
    kept = packed(*context(9, 4, scope=scope))
    kept.keep_all = True  # its context lies in no basis
    assert "keep_all" in error_line(RaggedCache.cat, [parts[0], kept])


def test_maps_are_read_where_they_were_applied():
    """A cache whose context was stored as values has no maps, any other those it was made with."""
    maps = ValueBasis(torch.eye(16), torch.eye(16))
    cache = RaggedCache(2, 9, 3, 16, 4, 3, torch.zeros(0), maps=maps)
    assert cache.basis is maps
    cache.keep_all = True
    assert cache.basis == ValueBasis()


class FakeModel(torch.nn.Module):
    """What KVCache.save and load ask of a model: weights, and an empty cache."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.cfg = ModelConfig()
        self.norm = torch.nn.LayerNorm(5)
        self.layers = []
        self.like = torch.zeros(0, dtype=dtype)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        return KVCache([RaggedCache(batch, max_len, 3, 16, 4, 3, self.like)], self)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [0.0, 0.6, 1.0])
def test_what_is_loaded_is_what_was_saved(keep, dtype, tmp_path):
    """The same tensors and bytes. An empty tensor that was read from a file has another tensor's
    address and 0 bytes; it must not hide that other one's."""
    model = FakeModel(dtype)
    cache = KVCache([packed(*context(33, 4, keep=keep, dtype=dtype))], model)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVCache.load(tmp_path / "cache.safetensors", model)
    held = sum(t.nbytes for t in cache.layers[0].state_dict().values())
    assert loaded.nbytes() == loaded.layers[0].nbytes() == cache.nbytes() == held
    for name, t in cache.layers[0].state_dict().items():
        got = getattr(loaded.layers[0], name)
        assert torch.equal(got, t) and got.dtype == t.dtype and got.shape == t.shape


def test_counts_out_of_range_are_refused():
    """A state with a count below 0 or past what is stored is refused by name."""
    state = filled(33, 4, pad=(0, 4)).state_dict()
    for name, more in dict(n_packed=99, n_rows=-999, n_context=-40, n_window=64).items():
        fresh = RaggedCache(2, 9, 3, 16, 4, 3, torch.zeros(0))
        assert name in error_line(fresh.load_state_dict, {**state, name: state[name] + more})
