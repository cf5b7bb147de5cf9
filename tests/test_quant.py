"""Integers: how numbers become codes and bytes, what the caches hold of them, and attention over
them by kernel, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, error_line, grouped_model, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
import kv_router
import mixsga
from config import KVConfig, MixConfig
from kernels import packed_attention
from model import KVCache, generate
from storage.integers import format as quant
from storage.integers.cache import IntPackedCache, IntSelectedCache
from storage.kernel_base import triton
from storage.views import Tail, packed_attention_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (
    [torch.float32, torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32]
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers, some of them far out."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * (1 + 5 * (torch.rand(shape, generator=g) < 0.03))


def uniform_by_hand(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers x (n,) as they come back from `bits` bits that share one step and middle, number by
    number, steps rounded to float16."""
    low = x.float().min()
    high = x.float().max()
    half = 1 << bits - 1
    # in float32: one in thousands is rounded the other way from float64
    step = ((high - low) / (2**bits - 1)).clamp_min(2.0**-24)
    step, middle = step.half().item(), (low + half * step).half().item()
    codes = [min(max(round((float(v) - middle) / step + half), 0), 2**bits - 1) for v in x]
    return torch.tensor([(c - half) * step + middle for c in codes], dtype=torch.float64)


# ----------------------------------------------------------------------------- codes and bytes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_lie_in_planes_and_come_back(bits):
    """Bit by bit: number i of n lies in byte i mod (n b / 8), lowest plane first; 3 bits are a
    plane of 2 and one of 1."""
    codes = torch.randint(0, 1 << bits, (3, 5, 48), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    got = quant.pack_bits(codes, bits)
    assert got.shape == (3, 5, 6 * bits) and torch.equal(quant.unpack_bits(got, bits), codes)
    for part, first, width in (
        [(slice(0, 12), 0, 2), (slice(12, 18), 2, 1)] if bits == 3 else [(slice(None), 0, bits)]
    ):
        mine = got[..., part]
        for i in range(48):
            byte = mine[1, 2, i % mine.size(-1)].item() >> (i // mine.size(-1) * width) & (
                (1 << width) - 1
            )
            assert byte == codes[1, 2, i].item() >> first & ((1 << width) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_keys_share_a_step_per_channel_and_block(bits):
    """Every channel of every block comes back as by hand, and a block does not depend on
    another."""
    k = normal(50, 16)
    block = torch.arange(50) // 16
    packed, scale = quant.quantise_keys(k, block, 5, bits)  # block 4 is empty
    back = quant.dequantise_keys(packed, scale, block, bits, torch.float64)
    for j in range(4):
        for c in range(16):
            mine = block == j
            torch.testing.assert_close(
                back[mine, c], uniform_by_hand(k[mine, c], bits), rtol=1e-6, atol=1e-6
            )
    assert (
        packed.shape == (50, 2 * bits)
        and scale.shape == (5, 2, 16)
        and scale.dtype == torch.float16
    )
    other = quant.quantise_keys(torch.where((block == 1)[:, None], 9 * k, k), block, 5, bits)[0]
    assert torch.equal(other[block != 1], packed[block != 1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_share_a_step_over_what_is_kept(bits):
    """A token's kept groups come back as by hand, whatever the dropped ones are; a token without
    groups has a finite step."""
    z = normal(9, 32, seed=1)
    mask = torch.rand(9, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0] = True
    mask[1] = False
    rows, scale = quant.quantise_values(z, mask, bits)
    kept = mask.repeat_interleave(8, -1)
    back = quant.dequantise_values(
        rows, scale[:, None].expand(-1, 4, -1), bits, torch.float64
    ).flatten(1)
    for t in range(9):
        if mask[t].any():
            torch.testing.assert_close(
                back[t, kept[t]], uniform_by_hand(z[t, kept[t]], bits), rtol=1e-6, atol=1e-6
            )
    again = quant.quantise_values(torch.where(kept, z, 1e3 * z), mask, bits)
    assert (
        torch.equal(again[0][mask], rows[mask])
        and torch.equal(again[1], scale)
        and scale.isfinite().all()
    )


def test_levels_leave_the_error_of_the_best_quantiser_and_dropped_groups_are_zero():
    """Gaussian numbers at one level: the squared error left is what REMAINS says; in units of gain,
    so a channel's scale does not matter."""
    z = torch.randn(800, 64, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(0.1, 30, 64).expand(800, -1)
    for level in range(4):
        levels = torch.full((800, 8), level, dtype=torch.uint8)
        own = quant.units(levels).sum(-1)
        args = own.cumsum(0) - own, int(own.sum()), gain
        rows, step = quant.quantise_levels(z * gain, levels, *args)
        back = quant.dequantise_levels(rows, levels, args[0], step, gain, torch.float64)
        error = (back / gain - z).square().mean().item()
        assert 0.3 * quant.REMAINS[level] < error < 1.1 * quant.REMAINS[level] and rows.shape == (
            800 * 8 * quant.UNITS[level],
            2,
        )
        assert level or not back.any()


def test_levels_by_hand_from_the_bytes():
    """One token with a group at each level: 1, 2 and 4 units in the order of the groups, codes read
    from them by hand, and the step is the one of TRIED with the least weighted error."""
    z = normal(1, 32, seed=3)
    gain = torch.rand(1, 32) + 0.5
    levels = torch.tensor([[3, 0, 1, 2]], dtype=torch.uint8)
    rows, step = quant.quantise_levels(z, levels, torch.tensor([2]), 9, gain)
    assert (
        rows.shape == (9, 2)
        and not rows[:2].any()
        and quant.units(levels).tolist() == [[4, 0, 1, 2]]
    )
    e = (z / gain)[0].tolist()
    s = step.item()
    # two of each of 8 numbers, in every unit
    bits = [[b >> 2 * p & 3 for p in range(4) for b in unit] for unit in rows.tolist()]
    codes = {
        g: [sum(b << 2 * i for i, b in enumerate(of)) for of in zip(*bits[a:b], strict=True)]
        for g, a, b in ((0, 2, 6), (2, 6, 7), (3, 7, 9))
    }
    back = quant.dequantise_levels(rows, levels, torch.tensor([2]), step, gain, torch.float64)[0]

    def value(code: int, level: int, s: float) -> float:
        return (
            (code - (1.5 if level == 1 else 2.0 ** (quant.LEVELS[level] - 1)))
            * quant.STEPS[level]
            * s
        )

    for g, level in ((0, 3), (2, 1), (3, 2)):
        for i in range(8):
            want = value(codes[g][i], level, s) * gain[0, 8 * g + i].item()
            assert back[8 * g + i].item() == pytest.approx(want, rel=1e-5)
    assert not back[8:16].any()

    def error(s: float) -> float:
        total = 0.0
        for g, level in ((0, 3), (2, 1), (3, 2)):
            for i in range(8):
                best = min(
                    (e[8 * g + i] - value(c, level, s)) ** 2
                    for c in range(2 ** quant.LEVELS[level])
                )
                total += best * gain[0, 8 * g + i].item() ** 2
        return total

    rms = (sum(e[8 * g + i] ** 2 for g in (0, 2, 3) for i in range(8)) / 24) ** 0.5
    assert error(s) <= min(error(rms * f) for f in quant.TRIED) * 1.001


def test_the_step_is_the_one_with_the_least_weighted_error():
    """Sixty tokens whose coordinates count very differently, the largest of them dropped: no other
    of TRIED leaves less error, weighted as asked."""
    g = torch.Generator().manual_seed(0)
    e = normal(60, 32, seed=4)
    levels = torch.randint(0, 4, (60, 4), generator=g, dtype=torch.uint8)
    e.unflatten(-1, (4, 8))[levels == 0] *= 1e4
    weight = 10 ** (4 * torch.rand(60, 32, generator=g))
    got = quant.level_steps(e, levels, weight)
    per = levels.repeat_interleave(8, -1)

    def error(t: int, s: float) -> float:
        total = 0.0
        for i in range(32):
            if level := int(per[t, i]):
                middle = 1.5 if level == 1 else 2.0 ** (quant.LEVELS[level] - 1)
                unit = quant.STEPS[level] * s
                code = min(
                    max(round(float(e[t, i]) / unit + middle), 0), 2 ** quant.LEVELS[level] - 1
                )
                total += ((code - middle) * unit - float(e[t, i])) ** 2 * float(weight[t, i])
        return total

    for t in range(60):
        if levels[t].any():
            rms = e[t, per[t] > 0].square().mean().sqrt().item()
            assert error(t, got[t].item()) <= 1.001 * min(
                error(t, torch.tensor(rms * f).half().item()) for f in quant.TRIED
            )


# ----------------------------------------------------------------------------- a context


def context(
    kb: int, vb: int, Hm: int, *, B=2, Hkv=3, C=75, D=32, S=4, block=32, dtype=torch.float32, seed=0
):
    """A random context in an IntSelectedCache with five whole columns after it, and what went
    in."""
    g = torch.Generator().manual_seed(seed)
    k = normal(B, Hkv, C, D, seed=seed)
    z = normal(B, Hkv, C, D, seed=seed + 1)
    keep = torch.rand(B, Hm, C, generator=g) < 0.7
    levels = torch.randint(0, 4, (B, Hm, C, S), generator=g, dtype=torch.uint8)
    valid = torch.arange(C) >= torch.tensor([0, 7, 3][:B])[:, None]
    fmt = quant.IntFormat(kb, vb, block, torch.rand(Hkv, D, generator=g).to(DEVICE) + 0.5)
    cache = IntSelectedCache(B, C + 5, Hkv, D, S, Hm, k[:0].to(DEVICE, dtype), fmt)
    cache.pack(*(t.to(DEVICE) for t in (k, z, keep, levels > 0 if vb else levels, valid)))
    cache.append(
        *normal(2, B, Hkv, 5, D, seed=seed + 2).to(DEVICE, dtype),
        torch.zeros(B, dtype=torch.int64, device=DEVICE),
    )
    return cache, k, z, keep & valid[:, None], levels


@pytest.mark.parametrize(
    ("kb", "vb", "Hm"), [(4, 4, 3), (8, 4, 1), (3, 2, 3), (2, 8, 1), (4, 0, 3), (3, 0, 1)]
)
def test_a_context_comes_back_as_by_hand(kb, vb, Hm):
    """Ragged survivors, padding, masks shared or not: keys of every full or partial block, values
    of every token, nothing else; and no more bytes than these take."""
    cache, k, z, keep, levels = context(kb, vb, Hm)
    got_k, got_z, got_mask, got_valid = (t.cpu() for t in cache.packed().unpack(torch.float64))
    B, Hkv, C, D = k.shape
    S = levels.size(-1)
    tokens_held = 0
    blocks = 0
    units = 0
    for b in range(B):
        for h in range(Hkv):
            m = h if Hm > 1 else 0
            mine = [t for t in range(C) if keep[b, m, t]]
            assert got_valid[b, m].tolist() == [i < len(mine) for i in range(got_valid.size(-1))]
            tokens_held = tokens_held + len(mine)
            blocks = blocks + -(-len(mine) // 32)
            for first in range(0, len(mine), 32):
                part = mine[first : first + 32]
                for c in (0, 13, D - 1):
                    want = uniform_by_hand(k[b, h, part, c], kb)
                    torch.testing.assert_close(
                        got_k[b, h, first : first + 32, c][: len(part)], want, rtol=1e-6, atol=1e-6
                    )
            for i, t in enumerate(mine):
                kept = (levels[b, m, t] > 0).repeat_interleave(D // S)
                assert not got_z[b, h, i, ~kept].any()
                if vb:
                    assert torch.equal(got_mask[b, m, i], levels[b, m, t] > 0)
                    units += int((levels[b, m, t] > 0).sum()) * vb // 2
                    if kept.any():
                        torch.testing.assert_close(
                            got_z[b, h, i, kept],
                            uniform_by_hand(z[b, h, t, kept], vb),
                            rtol=1e-6,
                            atol=1e-6,
                        )
                else:
                    assert torch.equal(got_mask[b, m, i], levels[b, m, t])
                    units += int(quant.units(levels[b, m, t]).sum())
                    s = cache.value_scale[tokens_held - len(mine) + i, 0].item()
                    gain = cache.fmt.gain[h].cpu()
                    for x, level in enumerate(levels[b, m, t].tolist()):
                        bits = quant.LEVELS[level]
                        unit = quant.STEPS[level] * s
                        middle = 1.5 if bits == 2 else 2.0 ** (bits - 1)
                        for c in range(x * D // S, (x + 1) * D // S if level else 0):
                            code = min(
                                max(round(float(z[b, h, t, c] / gain[c]) / unit + middle), 0),
                                2**bits - 1,
                            )
                            assert got_z[b, h, i, c].item() == pytest.approx(
                                (code - middle) * unit * gain[c].item(), rel=1e-4, abs=1e-6
                            )
    assert (
        cache.keys.numel() == tokens_held * D * kb // 8
        and cache.rows.numel() == units * D // S // 4
    )
    assert (
        cache.key_scale.numel() == blocks * 2 * D
        and cache.value_scale.numel() == tokens_held * (2 if vb else 1)
    )
    assert cache.nbytes() == sum(t.numel() * t.element_size() for t in cache.tensors().values())


def test_a_cache_of_integers_is_sliced_joined_saved_and_not_cut_inside(tmp_path):
    """Slices and joins give the same numbers, a file too; truncating keeps the context or says why
    not."""
    for vb in (4, 0):
        cache = context(4, vb, 3)[0]
        one = cache.slice([1])
        two = cache.slice([0, 1])
        back = IntSelectedCache.join([cache.slice([0]), one])
        for a, b in ((cache.unpack(), two.unpack()), (cache.unpack(), back.unpack())):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        n = int(one.n_packed.max())
        assert (
            torch.equal(one.unpack()[1][0], cache.unpack()[1][1, :, :n])
            and one.nbytes() < cache.nbytes()
        )
        assert "truncating to 74" in error_line(cache.truncate, 74)
        cache.truncate(77)
        assert cache.tail_len == 2 and cache.columns == 77
    model = grouped_model(
        dtype=torch.float32, prefill="exact", key_bits=4, value_bits=4, key_block=16, topk_groups=2
    )
    idx = tokens(2, 90)
    with torch.no_grad():
        cache = model.new_cache(2, 90)
        model(idx[:, :80], cache)
        cache.save(tmp_path / "c.safetensors")
        again = KVCache.load(tmp_path / "c.safetensors", model)
        assert torch.equal(model(idx[:, 80:], cache), model(idx[:, 80:], again))


# ----------------------------------------------------------------------------- attention


def check(got, plain, want, dtype) -> None:
    """The rule of every kernel: at most twice the plain version's error, plus one unit in the last
    place of the largest output, plus what float32 logits of 50 lose."""
    got, plain = (t.cpu().double() for t in (got, plain))
    slack = (torch.finfo(dtype).eps + 100 * torch.finfo(torch.float32).eps) * want.abs().max()
    error = (got - want).abs().max()
    allowed = 2 * (plain - want).abs().max() + slack
    assert error <= allowed, (error, allowed)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the attention kernels that have been launched, in order."""
    names: list[str] = []
    for name in ("int_attention_kernel", "_attention_kernel"):
        kernel = getattr(kernels, name)
        spy = type(
            "Spy",
            (),
            {
                "__getitem__": lambda self, grid, kernel=kernel, name=name: (
                    names.append(name) or kernel[grid]
                )
            },
        )()
        monkeypatch.setattr(kernels, name, spy)
    return names


def expected(q: torch.Tensor, packed, tail) -> tuple:
    """What the reference gives in float64, and in the dtype of q."""
    wide = tail and Tail(tail.k.double(), tail.v.double(), *tail[2:])
    return packed_attention_ref(q.double(), packed, wide), packed_attention_ref(q, packed, tail)


def compare(cache, q: torch.Tensor, chunk: int, part: str = "both") -> None:
    """packed_attention by kernel over a cache, or over one part of it, against the reference in
    float64. Keys are rounded to q's type, so that is what log-sum-exps are measured in, too."""
    packed = None if part == "tail" else cache.packed()
    tail = None if part == "packed" else cache.whole()
    (want, plain) = expected(q, packed, tail)
    got = packed_attention(q, packed, tail, impl="triton", chunk=chunk)
    for i in (0, 1):
        check(got[i], plain[i], want[i].cpu(), q.dtype)


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kb", "vb", "Hm", "D", "S", "n", "T", "chunk", "kernel"),
    [
        (4, 4, 3, 32, 4, 2, 1, 0, "words"),
        (8, 4, 1, 64, 8, 3, 3, 64, "words"),
        (4, 8, 3, 128, 16, 4, 1, 32, "words"),
        (4, 4, 3, 80, 2, 1, 2, 32, "words"),
        (4, 4, 1, 32, 8, 2, 1, 0, "bytes"),
        (3, 2, 3, 48, 2, 1, 2, 32, "bytes"),
        (2, 3, 1, 32, 4, 8, 3, 0, "bytes"),
        (8, 8, 3, 40, 2, 1, 1, 32, "words"),
        (4, 0, 1, 32, 4, 4, 1, 32, "words"),
        (3, 0, 3, 64, 8, 2, 2, 0, "bytes"),
        (4, 0, 3, 64, 16, 1, 1, 64, "words"),
        (4, 0, 3, 48, 4, 2, 1, 32, "bytes"),
        (8, 0, 1, 128, 8, 3, 2, 0, "words"),
        (4, 0, 3, 64, 2, 4, 1, 0, "words"),
    ],
)
def test_attention_reads_a_context_of_integers(kb, vb, Hm, D, S, n, T, chunk, kernel, dtype, ran):
    """Counted rows, masks shared or not, any bits and levels, more rows of queries than a product
    takes, one piece and several: in words where rows fill words, else byte by byte."""
    compare(
        context(kb, vb, Hm, D=D, S=S, dtype=dtype)[0],
        (2 * normal(2, 3 * n, T, D, seed=5)).to(DEVICE, dtype),
        chunk,
    )
    assert ran and set(ran) == {
        "int_attention_kernel"
        if kernel == "words" and kernels.WORDS and dtype != torch.float16
        else "_attention_kernel"
    }


@st.composite
def contexts(draw):
    """A context of integers of any bits, and what asks it: odd sizes, groups, heads, blocks,
    pieces, lengths from none to several blocks."""
    kb = draw(st.sampled_from([8, 4, 4, 3, 2]))
    vb = draw(st.sampled_from([8, 4, 4, 3, 2, 0]))
    D = draw(st.sampled_from([16, 24, 32, 40, 48, 64, 80, 128]))
    rows = {8: 1, 4: 2, 3: 8, 2: 4, 0: 4}[vb]  # numbers that fill bytes
    S = draw(st.sampled_from([s for s in (1, 2, 4, 8, 16) if D % s == 0 and D // s % rows == 0]))
    Hkv = draw(st.integers(1, 3))
    cache = context(
        kb,
        vb,
        draw(st.sampled_from([1, Hkv])),
        B=draw(st.integers(1, 2)),
        Hkv=Hkv,
        D=D,
        S=S,
        C=draw(st.sampled_from([1, 17, 64, 75, 150])),
        block=draw(st.sampled_from([16, 32, 64])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 10**6)),
    )[0]
    n = draw(st.sampled_from([1, 2, 3, 4, 8]))
    T = draw(st.sampled_from([1, 1, 2, 5]))
    q = (2 * normal(cache.B, Hkv * n, T, D, seed=draw(st.integers(0, 99)))).to(
        DEVICE, cache.tail_k.dtype
    )
    return (
        cache,
        q,
        draw(st.sampled_from([0, 16, 64])),
        draw(st.sampled_from(["both", "both", "packed", "tail"])),
    )


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@settings(deadline=None, derandomize=True, max_examples=60 if torch.cuda.is_available() else 25)
@given(case=contexts())
def test_attention_over_integers_of_any_shape(case):
    """Any shape: within the error of the plain version."""
    compare(*case)


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize("change", ["code", "step", "middle", "mask", "key block", "value row"])
@pytest.mark.parametrize("vb", [4, 2, 0])
def test_the_comparison_notices(change, vb):
    """One code of a key, one step or middle of a value, one bit of a mask, one base off by one: the
    comparison fails, in words and in bytes."""
    if change == "middle" and vb == 0:
        pytest.skip("levels have no middle")
    cache = context(4, vb, 3, D=64)[0]
    q = (2 * normal(2, 6, 1, 64, seed=5)).to(DEVICE)
    p = cache.packed()
    tail = cache.whole()
    (want, plain) = expected(q, p, tail)
    ints = p.ints
    k = p.unpack(torch.float64)[0][0, 0, : int(p.n[0, 0])]
    # that the first query attends to most
    token = int(p.token_base[0, 0] + (k @ q[0, 0, 0].double()).argmax())
    if change == "code":
        p.keys[token] ^= 0x77
    elif change == "step":
        ints.value_scale[token, 0] *= 1.5
    elif change == "middle":
        ints.value_scale[token, 1] += 0.5
    elif change == "mask":
        p.bits[token] ^= 1
    else:
        {"key block": ints.block_base, "value row": p.row_base}[change][0, 0] += 1
    got = packed_attention(q, p, tail, impl="triton", chunk=32)[0]
    with pytest.raises(AssertionError):
        check(got, plain[0], want[0].cpu(), torch.float32)


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("K", "bits", "D", "n", "T"),
    [
        (4, 4, 32, 2, 2),
        (4, 4, 128, 4, 1),
        (2, 4, 64, 2, 2),
        (4, 8, 24, 1, 3),
        (1, 8, 32, 2, 2),
        (4, (8, 4), 64, 3, 1),
        (4, (4, 8), 48, 2, 1),
        (4, 4, 32, 5, 2),
        (3, 2, 32, 3, 1),
    ],
)
def test_attention_reads_blocks_of_integers(K, bits, D, n, T, dtype, ran):
    """Whole blocks, K groups of every token, one piece and several, tail and padding included,
    against the reference in float64."""
    key_bits, value_bits = bits if isinstance(bits, tuple) else (bits, bits)
    cfg = KVConfig(
        n_groups=4,
        topk_groups=K,
        key_bits=key_bits,
        value_bits=value_bits,
        key_block=16,
        kv_tail=3,
        kv_sinks=0,
    )
    k, v = normal(2, 2, 3, 70, D).to(DEVICE, dtype)
    cache = IntPackedCache(2, 70, 3, D, cfg, K, k)
    cache.columns = 70
    mask = kv_router.top_k_mask(kv_router.group_energy(v, 4, 3), K)
    cache.append(k, v, mask, torch.tensor([0, 9], device=DEVICE))
    q = (2 * normal(2, 3 * n, T, D, seed=5)).to(DEVICE, dtype)
    assert cache.n_packed.tolist() == [64, 48] and cache.n_tail.tolist() == [6, 13]
    held = cache.packed().unpack(torch.float64)[0].cpu()
    # rows of different lengths, several blocks at once
    for b, first, n_blocks in ((0, 0, 4), (1, 9, 3)):
        for j in range(n_blocks):
            mine = k[b, 1, first + 16 * j : first + 16 * j + 16, 5].cpu()
            torch.testing.assert_close(
                held[b, 1, 16 * j : 16 * j + 16, 5],
                uniform_by_hand(mine, key_bits),
                rtol=1e-6,
                atol=1e-6,
            )
    for chunk in (0, 32):
        compare(cache, q, chunk)
    assert set(ran) == {
        "int_attention_kernel"
        if key_bits > 3 and kernels.WORDS and dtype != torch.float16
        else "_attention_kernel"
    }


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize("vb", [4, 0])
def test_ragged_contexts_of_integers_are_cut_end_to_end(vb, monkeypatch):
    """One head with all tokens, others with few: the grid has no programs for pieces that are not
    there, and the result is the reference's."""
    cache = IntSelectedCache(
        1,
        400,
        4,
        32,
        4,
        4,
        torch.zeros(0, device=DEVICE),
        quant.IntFormat(4, vb, 16, torch.ones(4, 32, device=DEVICE)),
    )
    g = []
    keep = torch.arange(380) < torch.tensor([380, 5, 40, 3]).view(1, 4, 1)
    mask = (
        torch.full((1, 4, 380, 4), 2, dtype=torch.uint8)
        if vb == 0
        else torch.ones(1, 4, 380, 4, dtype=torch.bool)
    )
    cache.pack(
        *(
            t.to(DEVICE)
            for t in (*normal(2, 1, 4, 380, 32), keep, mask, torch.ones(1, 380, dtype=torch.bool))
        )
    )
    cache.append(
        *normal(2, 1, 4, 4, 32, seed=3).to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    )
    name = "int_attention_kernel" if kernels.WORDS else "_attention_kernel"
    kernel = getattr(kernels, name)
    monkeypatch.setattr(
        kernels,
        name,
        type("Spy", (), {"__getitem__": lambda self, grid: g.append(grid) or kernel[grid]})(),
    )
    compare(cache, (2 * normal(1, 8, 1, 32, seed=5)).to(DEVICE), 64)
    assert g[0][1] == 1 and g[0][0] < 4 * 7


# ----------------------------------------------------------------------------- decoding


def path_by_hand(path, q, k, v) -> torch.Tensor:
    """ValueGroupPath over integers, token by token: before each query whole blocks have left the
    tail, keys with a step per channel of their block, values with a step per token and head; the
    first tokens are whole."""
    (B, H, T, D) = q.shape
    Hkv = k.size(1)
    cfg = path.cfg
    out = torch.zeros_like(q)
    d = D // cfg.n_groups
    G = cfg.key_block
    for b in range(B):
        for h in range(H):
            kv = h * Hkv // H
            for t in range(T):
                n = max(0, (t + 1 - cfg.kv_sinks - cfg.kv_tail) // G * G)
                ks = k[b, kv, : t + 1].double().clone()
                vs = v[b, kv, : t + 1].double().clone()
                for first in range(cfg.kv_sinks, cfg.kv_sinks + n, G):
                    for c in range(D):
                        ks[first : first + G, c] = uniform_by_hand(
                            k[b, kv, first : first + G, c], cfg.key_bits
                        )
                for j in range(cfg.kv_sinks, cfg.kv_sinks + n):
                    norm = [
                        float(v[b, kv, j, g * d : (g + 1) * d].square().sum())
                        for g in range(cfg.n_groups)
                    ]
                    best = sorted(range(cfg.n_groups), key=lambda g, s=norm: (-s[g], g))[: path.k]
                    kept = torch.zeros(D, dtype=torch.bool)
                    for g in best:
                        kept[g * d : (g + 1) * d] = True
                    vs[j] = 0
                    vs[j, kept] = uniform_by_hand(v[b, kv, j, kept], cfg.value_bits)
                s = ks @ q[b, h, t].double() / D**0.5
                out[b, h, t] = s.softmax(0) @ vs
    return out


@pytest.mark.parametrize(
    "kv",
    [
        dict(topk_groups=4, key_bits=4, value_bits=4),
        dict(topk_groups=2, key_bits=8, value_bits=2, kv_sinks=0),
        dict(topk_groups=3, key_bits=3, value_bits=4, kv_tail=5),
    ],
    ids=["whole", "half", "tail"],
)
def test_decode_mode_is_what_tokens_one_by_one_read(kv):
    """Without a cache, through a cache token by token, and by hand: the same outputs."""
    torch.manual_seed(0)
    cfg = KVConfig(
        **{
            **dict(n_groups=4, mask_scope="head", value_basis="native", key_block=16, kv_tail=2),
            **kv,
        }
    )
    model_cfg = TINY.__class__(**{**TINY.__dict__, "head_dim": 32})
    path = kv_router.ValueGroupPath(model_cfg, cfg).double().eval()
    x = torch.randn(1, 45, TINY.n_embd).double()
    q = normal(1, 6, 45, 32).double()
    (k, v) = normal(2, 1, 3, 45, 32, seed=1).double()
    with torch.no_grad():
        got = path(x, q, k, v)
        cache = path.new_cache(1, 45, k)
        steps = []
        for t in range(45):
            steps.append(
                path(
                    *(a[:, t : t + 1] if a.ndim == 3 else a[:, :, t : t + 1] for a in (x, q, k, v)),
                    cache,
                )
            )
    torch.testing.assert_close(got, torch.cat(steps, 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, path_by_hand(path, q, k, v), rtol=1e-5, atol=1e-5)
    assert (
        int(cache.n_packed) == (45 - cfg.kv_sinks - cfg.kv_tail) // 16 * 16
        and int(cache.n_sink) == cfg.kv_sinks
    )


def test_planes_of_three_bits_are_not_formed_by_steps():
    """Steps need a kernel for the block that forms, and 3 bits have none: generate takes the other
    way then."""
    how = dict(
        n_groups=2,
        topk_groups=1,
        prefill="exact",
        mask_scope="head",
        value_router="norm",
        kv_tail=2,
        key_block=16,
    )
    steps = [
        {
            p.can_step()
            for p in kv_router.paths(grouped_model(key_bits=kb, value_bits=vb, **how)).values()
        }
        for kb, vb in ((3, 3), (4, 3), (3, 4), (4, 2))
    ]
    assert steps == [{False}] * 3 + [{triton is not None}]


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize(
    ("S", "K", "kb", "vb", "scope", "D"),
    [
        (4, 4, 4, 4, "layer", 32),
        (4, 2, 4, 4, "head", 64),
        (8, 3, 8, 4, "head", 32),
        (2, 1, 4, 8, "layer", 16),
        (4, 4, 2, 2, "head", 32),
        (4, 3, 8, 2, "layer", 64),
    ],
)
def test_append_token_forms_the_blocks_that_append_forms(S, K, kb, vb, scope, D):
    """Token by token by kernel from ragged lengths, past two blocks: the same codes, steps, masks,
    counts and tail, bit for bit."""
    B = 2
    Hkv = 3
    T = 30
    more = 37
    cfg = KVConfig(
        n_groups=S,
        topk_groups=K,
        mask_scope=scope,
        kv_tail=2,
        key_bits=kb,
        value_bits=vb,
        key_block=16,
        kv_sinks=3,
    )
    k, v = normal(2, B, Hkv, T + more, D).to(DEVICE)
    caches = [IntPackedCache(B, T + more, Hkv, D, cfg, K, k) for _ in range(2)]

    def mask(a: int, b: int) -> torch.Tensor:
        return kv_router.top_k_mask(
            kv_router.group_energy(v[:, :, a:b], S, Hkv if scope == "head" else 1), K
        )

    for c in caches:
        c.columns += T
        c.append(k[:, :, :T], v[:, :, :T], mask(0, T), torch.tensor([0, 5], device=DEVICE))
    by_append, by_token = caches
    by_token.reserve(more)
    for t in range(T, T + more):
        by_append.columns += 1
        by_append.append(
            k[:, :, t : t + 1],
            v[:, :, t : t + 1],
            mask(t, t + 1),
            torch.zeros(B, dtype=torch.int64, device=DEVICE),
        )
        by_token.append_token(k[:, :, t : t + 1], v[:, :, t : t + 1], None, None)
        assert torch.equal(by_append.n_packed, by_token.n_packed) and torch.equal(
            by_append.n_tail, by_token.n_tail
        )
    assert by_token.n_packed.tolist() == [48, 48]
    for name, a in by_append.tensors().items():
        assert torch.equal(a, getattr(by_token, name)), name


def test_rows_of_a_batch_are_alone_and_prompts_may_come_in_pieces():
    """Prompts of several lengths together or alone, whole or in pieces of 7 tokens: the same tokens
    follow."""
    model = grouped_model(
        dtype=torch.float64,
        prefill="exact",
        mask_scope="head",
        value_router="norm",
        kv_tail=2,
        topk_groups=2,
        key_bits=4,
        value_bits=4,
        key_block=16,
    )
    prompts = [tokens(n, seed=n).tolist() for n in (3, 61, 40)]
    together = generate(model, prompts, 30)[0]
    for p, row in zip(prompts, together, strict=True):
        assert generate(model, [p], 30)[0][0] == row
    pieces = generate(model, prompts[1:], 30, prefill_tokens=200)[0]
    assert pieces == together[1:]


def test_integers_are_refused_where_they_cannot_be():
    """One line each: rows that do not fill bytes, one kind of integer only, reconstructors, padding
    without a cache, cuts inside a block."""
    four = dict(key_bits=4, value_bits=4)
    for bad, said in (
        (dict(key_bits=4), "value_bits=16"),
        ({**four, "key_bits": 5}, "key_bits=5"),
        ({**four, "value_bits": 0}, "kv_bytes"),
        ({**four, "reconstructor": "mlp"}, "mlp"),
        ({**four, "kv_sinks": -1}, "kv_sinks=-1"),
        ({**four, "prefill": "routed"}, "routed"),
        ({**four, "key_block": 48}, "key_block=48"),
    ):
        assert said in error_line(KVConfig, **bad)
    assert "must fill bytes" in error_line(
        KVConfig(n_groups=8, key_bits=4, value_bits=2).check_model, TINY
    )
    model = grouped_model(
        prefill="exact",
        key_bits=4,
        value_bits=4,
        key_block=16,
        mask_scope="head",
        value_router="norm",
    ).eval()
    with torch.no_grad():
        assert "padding" in error_line(model, tokens(2, 20), pad=torch.tensor([0, 3]))
        cache = model.new_cache(1, 80)
        model(tokens(1, 80), cache)
    assert "blocks of 16" in error_line(cache.layers[0].truncate, 30)
    cache.layers[0].truncate(4 + 32)
    assert cache.layers[0].n_packed.tolist() == [32] and cache.layers[0].n_tail.tolist() == [0]


def test_integers_are_close_to_dense_and_closer_with_more_bits():
    """8 bits of everything change logits little, 4 more, 2 most; training sees whole numbers."""
    dense = tiny_model(dtype=torch.float32)
    idx = tokens(1, 120)
    errors = []
    with torch.no_grad():
        want = dense(idx)
        for bits in (8, 4, 2):
            cfg = KVConfig(topk_groups=4, key_bits=bits, value_bits=bits, key_block=16)
            model = kv_router.attach(tiny_model(dtype=torch.float32), cfg, [idx]).eval()
            errors.append((model(idx) - want).abs().mean().item())
    assert 0 < 4 * errors[0] < errors[1] and 2 * errors[1] < errors[2]
    torch.testing.assert_close(model.train()(idx), want, rtol=1e-4, atol=1e-4)


def test_experts_hold_integers(tmp_path):
    """mixSGA's experts over integers: nearer with more bits, fewer bytes, the same after a slice, a
    join and a file; refused where it would not count."""
    cfg = TINY.__class__(**{**TINY.__dict__, "n_head": 4, "n_kv_head": 4})
    idx = tokens(2, 140)
    model = (
        mixsga.attach(
            tiny_model(cfg=cfg), KVConfig(kv="mixsga", kv_tail=5), MixConfig(expert_ratios="1:1:2")
        )
        .double()
        .eval()
    )

    def decoded() -> tuple[torch.Tensor, KVCache]:
        with torch.no_grad():
            cache = model.new_cache(2, 150)
            model(idx[:, :120], cache)
            return torch.cat([model(idx[:, t : t + 1], cache) for t in range(120, 140)], 1), cache

    want, whole = decoded()
    errors = []
    for bits in (8, 4, 2):
        with mixsga.stored_in(model, bits, bits, 16), torch.no_grad():
            got, cache = decoded()
            errors.append((got - want).abs().mean().item())
            assert cache.nbytes() < 0.55 * whole.nbytes()
            assert mixsga.kept_shares(model, cache) == pytest.approx(
                mixsga.kept_shares(model, whole), rel=0.01
            )
            for part in cache.layers[0].parts:
                assert not (part.n_packed % 16).any() and (part.n_tail < 16).all()
            cache.save(tmp_path / "c")
            again = KVCache.load(tmp_path / "c", model)
            one = KVCache.join(
                [KVCache([layer.slice([b]) for layer in cache.layers]) for b in range(2)]
            )
            one.length = cache.length
            following = [model(idx[:, :1], c) for c in (cache, again, one)]
            assert torch.equal(following[0], following[1])
            torch.testing.assert_close(following[0], following[2])
            assert "integers without a cache" in error_line(model, idx)
    assert 0 < 4 * errors[0] < errors[1] and 2 * errors[1] < errors[2]
    assert "levels take 2 S" in error_line(
        KVConfig, kv="select", n_groups=64, key_bits=4, value_bits=0
    )
    assert "whole numbers" in error_line(
        mixsga.attach,
        tiny_model(cfg=cfg),
        KVConfig(kv="mixsga", key_bits=4, value_bits=4),
        MixConfig(),
    )
