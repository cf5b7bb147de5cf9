"""The cache for query-aware selection: what it stores of a context, where, in how many bytes, and
what follows it in the tail."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DenseCache, KVCache
from storage.layout import storage_bytes, tile_size
from storage.packed import SelectedCache

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


def packed(k, z, keep, mask, valid, max_len: int | None = None, **kw) -> SelectedCache:
    """A cache that packed that context."""
    B, Hkv, C, D = k.shape
    cache = SelectedCache(
        B, C if max_len is None else max_len, Hkv, D, mask.size(-1), mask.size(1), k
    )
    cache.pack(k, z, keep, mask, valid, **kw)
    return cache


def filled(*args, max_len: int = 64, **kw) -> SelectedCache:
    """A cache with a random context and seven whole columns after it."""
    k, *rest = context(*args, **kw)
    cache = packed(k, *rest, max_len=max_len)
    cache.append(
        *torch.randn(2, *k.shape[:2], 7, k.size(3), generator=torch.Generator().manual_seed(9)).to(
            k.dtype
        ),
        torch.zeros(k.size(0)).long(),
    )
    return cache


def check_layout(cache: SelectedCache, k, z, keep, mask, valid) -> None:
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
    some_dropped = any(
        valid[b, t] and not keep[b, m, t] for b in range(B) for m in range(Hm) for t in range(C)
    )
    tokens = rows = masks = tiles = 0
    for b in range(B):
        assert int(cache.n_pad[b]) == sum(not x for x in valid[b])
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
                column = (
                    int(cache.positions[masks + i]) if some_dropped else int(cache.n_pad[b]) + i
                )
                assert column == t
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
    assert cache.positions.shape == ((masks,) if some_dropped else (0,))


def check_unpack(cache: SelectedCache, k, z, keep, mask, valid) -> None:
    """Assert that unpack gives the survivors of every segment in order, zeros where dropped and
    past them."""
    got_k, got_z, got_mask, got_valid = cache.unpack()
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


def same_state(a: SelectedCache, b: SelectedCache) -> bool:
    """Whether two caches give the same packed part, tail and counts."""
    parts = [
        *zip(a.unpack(), b.unpack(), strict=True),
        *zip(a.tail(), b.tail(), strict=True),
        (a.n_rows, b.n_rows),
        (a.n_pad, b.n_pad),
    ]
    return a.columns == b.columns and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in parts
    )


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_context_lies_where_the_layout_says(scope, dtype, device):
    """Keys, rows, masks, positions and offsets looked up one by one, over three tiles of survivors,
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
def test_pack_and_tail_hold_what_was_given(B, Hkv, half, S, data):
    """Any odd context length, S, scope, padding, share of tokens and pairs, then any chunks of
    tail: the layout, unpack and the tail hold exactly what was given, and the tail's capacity is
    what was asked for."""
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
    chunks = data.draw(st.lists(st.integers(1, 9), max_size=4))
    room = data.draw(st.integers(0, 12))
    cache = packed(*given_, max_len=C + room)
    k, v = torch.randn(2, B, Hkv, sum(chunks), D, generator=torch.Generator().manual_seed(1))
    at = cap = 0
    for n in chunks:
        cache.append(k[:, :, at : at + n], v[:, :, at : at + n], torch.zeros(B, dtype=torch.int64))
        at += n
        cap = cap if at <= cap else max(at, cap + cap // 4) if cap else max(n, room)
    check_layout(cache, *given_)
    check_unpack(cache, *given_)
    got_k, got_v, got_valid = cache.tail()
    assert (
        torch.equal(got_k, k)
        and torch.equal(got_v, v)
        and got_valid.shape == (B, at)
        and bool(got_valid.all())
    )
    assert cache.columns == C + at and cache.tail_k.shape == cache.tail_v.shape == (B, Hkv, cap, D)


def test_unpack_reads_rows_through_the_stored_offsets():
    """The offset stored for a tile decides which rows its tokens get: one row more, and that tile
    alone reads one row further on."""
    k, z, keep, mask, valid = context(201, 4, B=1, Hkv=1, pad=(0,), keep=0.8)
    cache = packed(k, z, keep, mask, valid)
    before = cache.unpack()[1]
    cache.tile_rows[1] += 1
    at = cache.unpack()[1].unflatten(-1, (4, 4))[0, 0], before.unflatten(-1, (4, 4))[0, 0]
    kept = cache.unpack()[2][0, 0]
    tile = torch.arange(before.size(2)) // TILE
    first = int(cache.tile_rows[1])
    n = int(kept[tile == 1].sum())
    assert torch.equal(at[0][tile == 1][kept[tile == 1]], cache.rows[first : first + n])
    assert torch.equal(at[0][tile != 1], at[1][tile != 1]) and not torch.equal(*at)


@pytest.mark.parametrize("pad", [(0, 0), (0, 5)], ids=["no padding", "padding"])
def test_no_positions_are_stored_when_only_padding_is_left_out(pad):
    """Positions are empty when every token but padding survives, in their place n_pad; one dropped
    token brings them, for all segments."""
    k, z, keep, mask, valid = context(37, 4, pad=pad, keep=1.0)
    cache = packed(k, z, keep, mask, valid)
    assert cache.positions.numel() == 0 and cache.n_pad.tolist() == list(pad)
    check_layout(cache, k, z, keep, mask, valid)
    keep[1, 2, 36] = False
    cache = packed(k, z, keep, mask, valid)
    assert cache.positions.numel() == cache.bits.numel() == int(cache.n_packed.sum())
    check_layout(cache, k, z, keep, mask, valid)


@pytest.mark.parametrize("max_len, dtype", [(32767, torch.int16), (32768, torch.int32)])
def test_positions_are_as_narrow_as_max_len_allows(max_len, dtype):
    """int16 up to max_len = 32767, else int32, and the last column of the longest context comes
    back unharmed."""
    k = torch.zeros(1, 1, max_len, 2)
    keep = torch.zeros(1, 1, max_len, dtype=torch.bool)
    keep[..., -1] = True
    cache = packed(
        k, k, keep, keep[..., None].expand(-1, -1, -1, 2), torch.ones(1, max_len, dtype=torch.bool)
    )
    assert (
        cache.positions.dtype == dtype
        and cache.positions.tolist() == [max_len - 1]
        and cache.nbytes() < 200
    )


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
    assert (
        cache.keys.numel()
        == cache.rows.numel()
        == cache.bits.numel()
        == cache.positions.numel()
        == cache.tile_rows.numel()
        == 0
    )
    assert cache.unpack()[0].shape == (3, 3, 0, 16) and cache.columns == 69
    empty = SelectedCache(2, 9, 3, 16, 4, 3 if scope == "head" else 1, k)
    assert (
        empty.unpack()[3].shape[2] == 0
        and empty.tail()[0].shape == (2, 3, 0, 16)
        and empty.columns == 0
    )


def test_padding_is_never_stored():
    """Keys and values of padding may be NaN: no number stored or unpacked is, although keep and
    mask are True there."""
    k, z, keep, mask, valid = context(41, 4, pad=(0, 17), keep=1.0, pairs=1.0)
    k[1, :, :17] = float("nan")
    z[1, :, :17] = float("nan")
    cache = packed(k, z, keep, mask, valid)
    assert all(t.isfinite().all() for t in (cache.keys, cache.rows, *cache.unpack()[:2]))
    assert cache.keys.size(0) == 3 * (41 + 24) and cache.positions.numel() == 0


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_nbytes_is_the_sum_of_the_sizes_by_hand(scope):
    """nbytes counts keys, rows, masks, positions, offsets, counts, bases and the tail, and nothing
    is allocated beyond them."""
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
    # bits, before uint8, positions int16, tile_rows int32
    index = (1 + 1 + 2) * sum(survivors) + 4 * sum(-(-n // TILE) for n in survivors)
    # n_packed, n_rows; token and row bases; mask and tile bases; the pads
    counts = 8 * (2 * B * Hm + 2 * B * Hkv + 2 * B * Hm + 2 * B)
    assert cache.nbytes() == flat + index + counts
    cache.append(k[:, :, :T], z[:, :, :T], torch.zeros(B, dtype=torch.int64))
    assert cache.nbytes() == flat + index + counts + 2 * 4 * B * Hkv * (max_len - C) * D
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in vars(cache).values()
        if isinstance(t, torch.Tensor)
    }
    assert cache.nbytes() == sum(found.values()) == KVCache([cache]).nbytes()


def test_masks_shared_between_layers_are_counted_once():
    """Layers packed with bits_from hold the very same mask, position, offset and count tensors;
    KVCache counts those once, each layer's own nbytes counts them whole; layers of other kinds and
    empty tensors add what they hold."""
    k, z, keep, mask, valid = context(131, 4, pad=(0, 3))
    first = packed(k, z, keep, mask, valid)
    second = packed(2 * k, z - 1, keep, mask, valid, bits_from=first)
    check_layout(second, 2 * k, z - 1, keep, mask, valid)
    check_unpack(second, 2 * k, z - 1, keep, mask, valid)
    shared = [n for n, t in first.tensors().items() if t is second.tensors()[n]]
    assert set(shared) == set(SelectedCache.LAYOUT)
    common = sum(first.tensors()[n].nbytes for n in shared)
    own = sum(t.nbytes for n, t in second.tensors().items() if n not in shared)
    assert first.nbytes() == second.nbytes() == common + own
    empty = SelectedCache(2, 9, 3, 16, 4, 3, k)
    dense = DenseCache(2, 11, 3, 16, k)
    assert KVCache([first, second]).nbytes() == common + 2 * own
    assert (
        KVCache([empty, first, dense, second]).nbytes()
        == common + 2 * own + empty.nbytes() + dense.nbytes()
    )
    assert storage_bytes([torch.zeros(0), torch.zeros(3, 0), torch.zeros(5)]) == 20
    second.truncate(50)
    check_unpack(first, k, z, keep, mask, valid)
    for other in ((keep & (torch.arange(131) < 99), mask), (keep, mask & (torch.arange(4) > 0))):
        with pytest.raises(AssertionError, match="another keep or mask"):
            packed(k, z, *other, valid, bits_from=first)


def test_pack_refuses_what_it_cannot_store():
    """A second context, one after other columns, one longer than max_len, padding on the right and
    a wrong number of mask heads."""
    ctx = context(21, 4)
    cache = packed(*ctx)
    late = SelectedCache(2, 30, 3, 16, 4, 3, ctx[0])
    late.append(ctx[0], ctx[1], torch.zeros(2, dtype=torch.int64))
    for c in (cache, late):
        with pytest.raises(AssertionError, match="packed once"):
            c.pack(*ctx)
    with pytest.raises(AssertionError, match="max_len"):
        packed(*ctx, max_len=20)
    with pytest.raises(AssertionError, match="left"):
        packed(*ctx[:4], ctx[4].flip(-1) & (torch.arange(21) < 20))
    with pytest.raises(ValueError, match="mask_heads"):
        SelectedCache(2, 30, 3, 16, 4, 2, ctx[0])


def test_tail_without_a_context_marks_padding():
    """Without pack the tail holds everything: first allocation max_len, leading padding over
    several chunks is not valid."""
    cache = SelectedCache(3, 20, 2, 16, 4, 1, torch.zeros(0))
    pad = torch.tensor([0, 3, 9])
    k, v = torch.randn(2, 3, 2, 26, 16, generator=torch.Generator().manual_seed(0))
    at = 0
    for n, cap in ((1, 20), (6, 20), (7, 20), (7, 25), (5, 31)):
        cache.append(k[:, :, at : at + n], v[:, :, at : at + n], (pad - at).clamp(0, n))
        at += n
        got_k, got_v, valid = cache.tail()
        assert (
            torch.equal(got_k, k[:, :, :at])
            and torch.equal(got_v, v[:, :, :at])
            and cache.tail_k.size(2) == cap
        )
        assert valid.tolist() == [[t >= p for t in range(at)] for p in pad.tolist()]
    assert cache.columns == 26


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("keep", [0.6, 1.0], ids=["dropped", "all kept"])
def test_slice_holds_the_sequences_asked_for(scope, keep):
    """slice gives those sequences, in that order and as often as asked, exactly sized and sharing
    nothing with the original."""
    B = 4
    pick = [3, 0, 3]
    k, z, *_ = ctx = context(83, 4, B=B, scope=scope, pad=(0, 5, 83, 11), keep=keep)
    cache = packed(*ctx, max_len=90)
    cache.append(k[:, :, :6], z[:, :, :6], torch.tensor([0, 0, 2, 0]))
    part = cache.slice(pick)
    for walk in (check_layout, check_unpack):
        walk(part, *(t[pick] for t in ctx))
    assert (
        all(torch.equal(a, b[pick]) for a, b in zip(part.tail(), cache.tail(), strict=True))
        and part.columns == cache.columns
    )
    assert torch.equal(cache.slice([2]).tail()[2], cache.tail()[2][[2]])
    for name, t in part.tensors().items():
        if t.numel():
            assert (
                t.untyped_storage().data_ptr() != getattr(cache, name).untyped_storage().data_ptr()
                and t.untyped_storage().nbytes() == t.nbytes
            )
    assert same_state(cache.slice(list(range(B))), cache) and cache.slice([]).unpack()[0].shape == (
        0,
        3,
        0,
        16,
    )


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("keep", [0.9, 1.0], ids=["dropped", "all kept"])
def test_truncate_forgets_the_columns_past_n(scope, keep):
    """After truncate(n) the cache is what packing the first n columns gives, tail included; slice
    and join then give up the slots; other columns can follow."""
    C = 91
    T = 5
    ctx = context(C, 4, scope=scope, pad=(0, 7), keep=keep)
    k, v = torch.randn(2, 2, 3, T, 16, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(2, dtype=torch.int64)
    for n in (0, 1, 6, 8, 63, 64, 65, 75, C - 1, C, C + 2, C + T, C + T + 9):
        cache = packed(*ctx, max_len=C + T)
        want = SelectedCache(2, C + T, 3, 16, 4, 3 if scope == "head" else 1, k)
        cache.append(k, v, zero)
        cache.truncate(n)
        at = (slice(None), slice(None), slice(n))
        want.pack(*(t[at] for t in ctx[:4]), ctx[4][:, :n])
        want.append(k[:, :, : max(0, n - C)], v[:, :, : max(0, n - C)], zero)
        assert cache.columns == want.columns == min(n, C + T) and same_state(cache, want)
        freed = cache.slice([0, 1])
        assert (
            freed.keys.size(0) == want.keys.size(0)
            and freed.rows.size(0) == want.rows.size(0)
            and same_state(freed, want)
        )
        joined = SelectedCache.join([cache, want])
        assert joined.keys.size(0) == 2 * want.keys.size(0) and all(
            same_state(joined.slice(two), want) for two in ([0, 1], [2, 3])
        )
        for c in (cache, want):
            c.append(-k, -v, zero)
        # it shares nothing
        assert same_state(cache, want) and same_state(joined.slice([2, 3]), freed)
    with pytest.raises(ValueError, match="truncating"):
        cache.truncate(-1)


def test_joining_leaves_the_parts_as_they_were():
    """A cache that remembers no columns, since it kept all, gets them in the joined one and not in
    itself."""
    whole, some = (context(83, 4, keep=keep) for keep in (1.0, 0.6))
    parts = [packed(*ctx) for ctx in (whole, some)]
    joined = SelectedCache.join(parts)
    assert (
        not parts[0].positions.numel()
        and parts[1].positions.numel()
        and same_state(joined.slice([0, 1]), parts[0])
    )
    check_unpack(joined, *(torch.cat(pair) for pair in zip(whole, some, strict=True)))


def test_truncate_shortens_the_padding_of_the_tail():
    """Padding in the tail that was truncated away does not hide the columns that follow."""
    cache = SelectedCache(2, 9, 3, 16, 4, 1, torch.zeros(0))
    k = torch.zeros(2, 3, 8, 16)
    cache.append(k, k, torch.tensor([0, 6]))
    cache.truncate(4)
    cache.append(k[:, :, :2], k[:, :, :2], torch.zeros(2, dtype=torch.int64))
    assert cache.tail()[2].tolist() == [[True] * 6, [False] * 4 + [True] * 2]


def fake_model(n_layers: int, D: int = 16, dtype=torch.float32, Hm: int = 3):
    """What KVCache.load asks of a model: norm.weight's device and an empty cache."""

    def new_cache(batch, max_len, pad=None):
        return KVCache(
            [
                SelectedCache(batch, max_len, 3, D, 4, Hm, torch.zeros(0, dtype=dtype))
                for _ in range(n_layers)
            ],
            pad,
        )

    return types.SimpleNamespace(
        norm=types.SimpleNamespace(weight=torch.zeros(1)), new_cache=new_cache
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_file_round_trip_holds_the_same(dtype, tmp_path):
    """Saved and loaded caches are equal, tensor by tensor, and go on alike: with and without
    dropped tokens, an empty one, one without a tail, shared masks after slice, padding. A model of
    another head size or number of mask heads refuses the file."""
    pad = torch.tensor([0, 4])
    kinds = [
        filled(33, 4, pad=(0, 4), dtype=dtype),
        filled(33, 4, pad=(0, 4), keep=1.0, dtype=dtype),
        packed(*context(33, 4, dtype=dtype)),
        packed(*context(33, 4, keep=0.0, dtype=dtype)),
        SelectedCache(2, 50, 3, 16, 4, 3, torch.zeros(0, dtype=dtype)),
    ]
    ctx = context(33, 4, dtype=dtype)
    kinds += [c.slice([0, 1]) for c in (kinds[2], packed(*ctx, bits_from=kinds[2]))]
    cache = KVCache(kinds, pad)
    cache.length = 40
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVCache.load(tmp_path / "cache.safetensors", fake_model(len(kinds), dtype=dtype))
    assert (
        loaded.nbytes()
        == cache.nbytes()
        == sum(c.nbytes() for c in kinds)
        == sum(c.nbytes() for c in loaded.layers)
    )
    assert torch.equal(loaded.pad, pad) and loaded.length == 40
    k, v = torch.randn(2, 2, 3, 9, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    for a, b in zip(loaded.layers, kinds, strict=True):
        assert a.extra() == b.extra()
        for name, t in b.tensors().items():
            assert (
                torch.equal(getattr(a, name), t)
                and getattr(a, name).dtype == t.dtype
                and getattr(a, name).shape == t.shape
            )
        for c in (a, b):
            c.append(k, v, torch.zeros(2, dtype=torch.int64))
        assert (
            same_state(a, b)
            and a.tail_k.shape == b.tail_k.shape
            and same_state(a.slice([1]), b.slice([1]))
        )
        for c in (a, b):
            c.truncate(20)
        assert same_state(a, b)
    for other in (
        fake_model(len(kinds), D=32, dtype=dtype),
        fake_model(len(kinds), dtype=dtype, Hm=1),
        fake_model(2, dtype=dtype),
    ):
        with pytest.raises(ValueError, match="not a cache of this model"):
            KVCache.load(tmp_path / "cache.safetensors", other)


@pytest.mark.parametrize("keep", [0.0, 0.6, 1.0])
def test_nbytes_after_loading_is_what_it_was(keep, tmp_path):
    """An empty tensor that was read from a file has another tensor's address and 0 bytes; it must
    not hide that other one's."""
    cache = KVCache([packed(*context(33, 4, keep=keep))])
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVCache.load(tmp_path / "cache.safetensors", fake_model(1))
    assert (
        loaded.nbytes()
        == loaded.layers[0].nbytes()
        == cache.nbytes()
        == sum(t.nbytes for t in cache.layers[0].tensors().values())
    )
