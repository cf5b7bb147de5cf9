"""How numbers become codes and bytes: every format by hand, number by number."""

from __future__ import annotations

import pytest
import torch
from views import normal, packed_view, uniform_by_hand

from storage.integers import format


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_lie_as_documented_and_come_back(bits):
    """Bit by bit: number i of n lies in byte i mod (n b / 8), lowest bits first; 3 bits are the
    lower two of all numbers, then the third of all."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (3, 5, 48), generator=g).to(torch.uint8)
    got = format.pack_bits(codes, bits)
    assert got.shape == (3, 5, 6 * bits)
    assert torch.equal(format.unpack_bits(got, bits), codes)
    parts = [(slice(None), 0, bits)]  # bytes, the first bit of a code that they hold, how many
    if bits == 3:
        parts = [(slice(0, 12), 0, 2), (slice(12, 18), 2, 1)]
    for part, first, width in parts:
        mine = got[1, 2, part].tolist()
        for i in range(48):
            byte = mine[i % len(mine)] >> (i // len(mine) * width)
            assert byte % 2**width == (codes[1, 2, i].item() >> first) % 2**width


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_keys_share_a_step_per_channel_and_block(bits):
    """Every channel of every block comes back as by hand, and a block does not depend on
    another."""
    k = normal(50, 16)
    block = torch.arange(50) // 16
    packed, scale = format.quantise_keys(k, block, 5, bits)  # block 4 is empty
    back = format.dequantise_keys(packed, scale, block, bits, torch.float64)
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
    other = format.quantise_keys(torch.where((block == 1)[:, None], 9 * k, k), block, 5, bits)[0]
    assert torch.equal(other[block != 1], packed[block != 1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_share_a_step_over_what_is_kept(bits):
    """A token's kept groups come back as by hand, whatever the dropped ones are; a token without
    groups has a finite step."""
    z = normal(9, 32, seed=1)
    mask = torch.rand(9, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0] = True
    mask[1] = False
    rows, scale = format.quantise_values(z, mask, bits)
    kept = mask.repeat_interleave(8, -1)
    back = format.dequantise_values(
        rows, scale[:, None].expand(-1, 4, -1), bits, torch.float64
    ).flatten(1)
    for t in range(9):
        if mask[t].any():
            torch.testing.assert_close(
                back[t, kept[t]], uniform_by_hand(z[t, kept[t]], bits), rtol=1e-6, atol=1e-6
            )
    again = format.quantise_values(torch.where(kept, z, 1e3 * z), mask, bits)
    assert torch.equal(again[0][mask], rows[mask])
    assert torch.equal(again[1], scale)
    assert scale.isfinite().all()


def test_levels_leave_the_error_of_the_best_quantiser_and_dropped_groups_are_zero():
    """Gaussian numbers at one level: the squared error left is what LEVEL_ERRORS says; in units of
    gain, so a channel's scale does not matter."""
    z = torch.randn(800, 64, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(0.1, 30, 64).expand(800, -1)
    for level in range(4):
        levels = torch.full((800, 8), level, dtype=torch.uint8)
        own = format.bit_planes(levels).sum(-1)
        args = own.cumsum(0) - own, int(own.sum()), gain
        rows, step = format.quantise_levels(z * gain, levels, *args)
        back = format.dequantise_levels(rows, levels, args[0], step, gain, torch.float64)
        error = (back / gain - z).square().mean().item()
        least = format.LEVEL_ERRORS[level]
        assert 0.3 * least < error < 1.1 * least
        assert rows.shape == (800 * 8 * format.LEVEL_PLANES[level], 2)
        assert level or not back.any()


def test_levels_by_hand_from_the_bytes():
    """One token with a group at each level: 1, 2 and 4 bit planes in the order of the groups, codes
    read from them by hand, and the step is the one of TRIED with the least weighted error."""
    z = normal(1, 32, seed=3)
    gain = torch.rand(1, 32) + 0.5
    levels = torch.tensor([[3, 0, 1, 2]], dtype=torch.uint8)
    rows, step = format.quantise_levels(z, levels, torch.tensor([2]), 9, gain)
    assert rows.shape == (9, 2)
    assert not rows[:2].any()
    assert format.bit_planes(levels).tolist() == [[4, 0, 1, 2]]
    e = (z / gain)[0].tolist()
    s = step.item()
    # two of each of 8 numbers, in every plane
    bits = [[b >> 2 * p & 3 for p in range(4) for b in plane] for plane in rows.tolist()]
    codes = {
        g: [sum(b << 2 * i for i, b in enumerate(of)) for of in zip(*bits[a:b], strict=True)]
        for g, a, b in ((0, 2, 6), (2, 6, 7), (3, 7, 9))
    }
    back = format.dequantise_levels(rows, levels, torch.tensor([2]), step, gain, torch.float64)[0]

    def value(code: int, level: int, s: float) -> float:
        return (
            (code - (1.5 if level == 1 else 2.0 ** (format.LEVEL_BITS[level] - 1)))
            * format.LEVEL_STEPS[level]
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
                    for c in range(2 ** format.LEVEL_BITS[level])
                )
                total += best * gain[0, 8 * g + i].item() ** 2
        return total

    rms = (sum(e[8 * g + i] ** 2 for g in (0, 2, 3) for i in range(8)) / 24) ** 0.5
    assert error(s) <= min(error(rms * f) for f in format.TRIED) * 1.001


@pytest.mark.parametrize("S", [4, 8, 16])
def test_planes_of_tokens_are_counted(S):
    """Of 8 groups in one number of 64 bits, else group by group: also where all levels are 3, and
    of levels that do not lie side by side."""
    generator = torch.Generator().manual_seed(S)
    levels = torch.randint(0, 4, (3, S, 50), dtype=torch.uint8, generator=generator).mT
    levels[0, 0] = 3
    levels[0, 1] = 0
    want = format.bit_planes(levels).sum(-1)
    assert want[0, :2].tolist() == [4 * S, 0]
    assert torch.equal(format.count_planes(levels), want.int())
    assert torch.equal(format.kept_tokens(levels), want > 0)


def test_the_step_is_the_one_with_the_least_weighted_error():
    """Sixty tokens whose coordinates count very differently, the largest of them dropped: no other
    of TRIED leaves less error, weighted as asked."""
    g = torch.Generator().manual_seed(0)
    e = normal(60, 32, seed=4)
    levels = torch.randint(0, 4, (60, 4), generator=g, dtype=torch.uint8)
    e.unflatten(-1, (4, 8))[levels == 0] *= 1e4
    weight = 10 ** (4 * torch.rand(60, 32, generator=g))
    got = format.level_steps(e, levels, weight)
    per = levels.repeat_interleave(8, -1)

    def error(t: int, s: float) -> float:
        total = 0.0
        for i in range(32):
            if level := int(per[t, i]):
                middle = 1.5 if level == 1 else 2.0 ** (format.LEVEL_BITS[level] - 1)
                unit = format.LEVEL_STEPS[level] * s
                code = min(
                    max(round(float(e[t, i]) / unit + middle), 0), 2 ** format.LEVEL_BITS[level] - 1
                )
                total += ((code - middle) * unit - float(e[t, i])) ** 2 * float(weight[t, i])
        return total

    for t in range(60):
        if levels[t].any():
            rms = e[t, per[t] > 0].square().mean().sqrt().item()
            assert error(t, got[t].item()) <= 1.001 * min(
                error(t, torch.tensor(rms * f).half().item()) for f in format.TRIED
            )


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "Hm", "K"),
    [(4, 4, 3, 0), (8, 4, 1, 0), (3, 2, 3, 2), (2, 8, 1, 4), (4, 0, 3, 0), (3, 0, 1, 0)],
)
def test_a_view_comes_back_as_by_hand(key_bits, value_bits, Hm, K):
    """PackedView.unpack of integers: keys of every full or partial block, values of every token,
    masks or levels, and zeros where there is nothing; in the type asked for."""
    g = torch.Generator().manual_seed(key_bits)
    B, Hkv, N, D, S, block = 2, 3, 75, 32, 4, 32
    lengths = torch.tensor([[75, 40, 0], [1, 33, 64]])[:, :Hm].contiguous()
    k, z = normal(2, B, Hkv, N, D, seed=1)
    levels = torch.randint(0, 4, (B, Hm, N, S), generator=g, dtype=torch.uint8)
    if K:
        levels = (levels.double() + torch.rand(levels.shape, generator=g)).argsort(-1) < K
    mask = levels if value_bits == 0 else levels > 0
    gain = torch.rand(Hkv, D, generator=g) + 0.5
    fmt = format.IntFormat(key_bits, value_bits, block, gain)
    view = packed_view(k, z, mask, lengths, K, fmt)
    assert view.levelled == (value_bits == 0)
    got_k, got_z, got_mask, valid = view.unpack(torch.float64)
    assert view.unpack()[0].dtype == torch.float32
    slot = 0
    for b in range(B):
        for h in range(Hkv):
            m = h % Hm
            n = int(lengths[b, m])
            assert valid[b, m].tolist() == [i < n for i in range(valid.size(-1))]
            assert not got_k[b, h, n:].any()
            assert not got_z[b, h, n:].any()
            assert torch.equal(got_mask[b, m, :n], mask[b, m, :n])
            for first in range(0, n, block):
                part = slice(first, min(first + block, n))
                for c in (0, 13, D - 1):
                    want = uniform_by_hand(k[b, h, part, c], key_bits)
                    torch.testing.assert_close(got_k[b, h, part, c], want, rtol=1e-6, atol=1e-6)
            for t in range(n):
                kept = (mask[b, m, t] > 0).repeat_interleave(D // S)
                assert not got_z[b, h, t, ~kept].any()
                if value_bits and kept.any():
                    want = uniform_by_hand(z[b, h, t, kept], value_bits)
                elif value_bits == 0:
                    step = view.ints.value_scale[slot].item()
                    level = mask[b, m, t].repeat_interleave(D // S)[kept].tolist()
                    numbers = zip(
                        z[b, h, t, kept].tolist(), gain[h, kept].tolist(), level, strict=True
                    )
                    want = [level_by_hand(x / a, i, step) * a for x, a, i in numbers]
                    want = torch.tensor(want, dtype=torch.float64)
                else:
                    want = torch.zeros(0, dtype=torch.float64)
                torch.testing.assert_close(got_z[b, h, t, kept], want, rtol=1e-4, atol=1e-6)
                slot += 1


def level_by_hand(x: float, level: int, step: float) -> float:
    """A number in units of gain as it comes back from a level with the token's step."""
    bits = format.LEVEL_BITS[level]
    own = format.LEVEL_STEPS[level] * step
    zero = 1.5 if bits == 2 else 2.0 ** (bits - 1)
    code = min(max(round(x / own + zero), 0), 2**bits - 1)
    return (code - zero) * own
