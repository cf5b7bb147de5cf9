"""RDKV's rule (baselines/rdkv.py): what each level costs attention, against loops; bits against
every way to give them; strings and what is read of them. Its cache: test_transform_coding.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import error_line

from baselines import rdkv
from baselines.coded import Middle
from baselines.rdkv import BITS, Distortion


def rounded(numbers: list[float], bits: int) -> list[float]:
    """Numbers that share a step, as they are read."""
    if bits == 0:
        return [float(torch.tensor(sum(numbers) / len(numbers)).half())] * len(numbers)
    if bits == 16:
        return [float(torch.tensor(x).half()) for x in numbers]
    low = min(numbers)
    step = max(float(torch.tensor((max(numbers) - low) / (2**bits - 1)).half()), 2.0**-24)
    low = float(torch.tensor(low).half())
    return [min(max(round((x - low) / step), 0), 2**bits - 1) * step + low for x in numbers]


def test_levels_cost_what_attention_errs():
    """Of each token's value a level costs the mean over queries of their attention times the square
    that rounding leaves, none of them the square of its distance from what was read; of each key
    number the same distance times query and rounding error squared, over the head dimension."""
    torch.manual_seed(0)
    B, Hkv, n, W, M, D = 2, 2, 2, 3, 5, 4
    q = torch.randn(B, Hkv, n, W, D).double()
    p = torch.rand(B, Hkv, n, W, M).double()
    o = torch.randn(B, Hkv, n, W, D).double()
    k = torch.randn(B, Hkv, M, D).double()
    v = torch.randn(B, Hkv, M, D).double()
    there = torch.ones(B, M, dtype=torch.bool)
    got = rdkv.distortion(Middle(k, v, torch.zeros(B, M), there), q, p, o)
    cells = itertools.product(range(B), range(Hkv), range(len(BITS)))
    for b, h, level in cells:
        columns = [rounded(k[b, h, :, d].tolist(), BITS[level]) for d in range(D)]
        for j in range(M):
            value = v[b, h, j].tolist()
            left = [x - y for x, y in zip(value, rounded(value, BITS[level]), strict=True)]
            of_value = 0.0
            of_key = [0.0] * D
            for i, w in itertools.product(range(n), range(W)):
                weight = float(p[b, h, i, w, j])
                away = float((v[b, h, j] - o[b, h, i, w]).square().sum())
                error = away if level == 0 else sum(e * e for e in left)
                of_value += weight * error / (n * W)
                for d in range(D):
                    off = float(k[b, h, j, d]) - columns[d][j]
                    query = float(q[b, h, i, w, d])
                    of_key[d] += weight * away * query**2 * off**2 / D / (n * W)
            assert float(got.tokens[b, h, j, level]) == pytest.approx(of_value, rel=1e-6, abs=1e-9)
            for d in range(D):
                have = float(got.channels[b, h, j, d, level])
                assert have == pytest.approx(of_key[d], rel=1e-6, abs=1e-9)


def falling(*shape: int) -> torch.Tensor:
    """Distortions (*shape, 5) that fall with the bits, by other amounts in each place."""
    drops = torch.rand(*shape, 5).double() + 0.01
    return drops.cumprod(-1) * torch.rand(*shape, 1).double() * 9


@pytest.mark.parametrize("seed", range(3))
def test_water_level_is_the_best_of_every_way_to_give_bits(seed):
    """Where no token is worth dropping, no other choice of levels that needs at most as many bits
    leaves less; and what is chosen fits."""
    torch.manual_seed(seed)
    M, D = 3, 2
    d = Distortion(falling(1, 1, M), falling(1, 1, M, D), torch.ones(1, 1, M, dtype=torch.bool))
    d.tokens[..., 0] = 1e9
    costs_v = [b * D + 32 * (0 < b < 16) for b in BITS]
    costs_k = [M * b + extra for b, extra in zip(BITS, (16, 32, 32, 32, 0), strict=True)]
    of_channels = d.channels[0, 0].sum(0)
    ways = []
    for levels in itertools.product(range(5), repeat=M + D):
        bits = sum(costs_v[i] for i in levels[:M]) + sum(costs_k[i] for i in levels[M:])
        error = sum(float(d.tokens[0, 0, j, i]) for j, i in enumerate(levels[:M]))
        error += sum(float(of_channels[c, i]) for c, i in enumerate(levels[M:]))
        ways.append((bits, error))
    for budget in (150.0, 200.0, 230.0, 1e6):
        got = rdkv.fill(d, torch.tensor([budget]).double())
        chosen = [*got.tokens.flatten().tolist(), *got.channels.flatten().tolist()]
        bits = sum(costs_v[i] for i in chosen[:M]) + sum(costs_k[i] for i in chosen[M:])
        error = sum(float(d.tokens[0, 0, j, i]) for j, i in enumerate(chosen[:M]))
        error += sum(float(of_channels[c, i]) for c, i in enumerate(chosen[M:]))
        assert bits <= budget
        assert error <= min(e for needed, e in ways if needed <= bits) + 1e-9
    assert "bits for a layer" in error_line(rdkv.fill, d, torch.tensor([-1.0]).double())


def test_everything_takes_what_is_cheapest_at_the_water_level():
    """At a water level a token takes the level of least distortion plus the level times its bits,
    and a channel, too, of the tokens that are kept; what is filled is the most that fits."""
    torch.manual_seed(1)
    there = torch.ones(2, 2, 6, dtype=torch.bool)
    there[1, :, 4:] = False
    d = Distortion(falling(2, 2, 6), falling(2, 2, 6, 4), there[:, :1])
    needed = []
    for theta in torch.linspace(-9, 3, 60).double().exp().tolist():
        got, bits = rdkv.at_water_level(d, torch.tensor([theta] * 2).double())
        needed.append(bits)
        for b in range(2):
            total = 0
            for h in range(2):
                kept = []
                for j in range(6):
                    costs = [n * 4 + 32 * (0 < n < 16) for n in BITS]
                    taken = [float(d.tokens[b, h, j, i]) + theta * costs[i] for i in range(5)]
                    best = taken.index(min(taken)) if there[b, h, j] else 0
                    assert int(got.tokens[b, h, j]) == best
                    total += costs[best]
                    if best:
                        kept.append(j)
                for c in range(4):
                    costs = [16, *(32 + len(kept) * n for n in BITS[1:4]), len(kept) * 16]
                    errors = [sum(float(d.channels[b, h, j, c, i]) for j in kept) for i in range(5)]
                    taken = [e + theta * n for e, n in zip(errors, costs, strict=True)]
                    best = taken.index(min(taken))
                    assert int(got.channels[b, h, c]) == best
                    total += costs[best]
            assert int(bits[b]) == total
    for budget in (500.0, 900.0, 1200.0):
        limit = torch.tensor([budget] * 2).double()
        filled = rdkv.fill(d, limit)
        for b in range(2):
            fit = max(float(bits[b]) for bits in needed if float(bits[b]) <= budget)
            assert fit <= bits_of(filled, b) <= budget


def bits_of(levels: rdkv.Levels, b: int) -> int:
    """The bits that a sequence's levels need, of 4 channels."""
    bits = 0
    for h in range(levels.tokens.size(1)):
        own = [BITS[i] for i in levels.tokens[b, h].tolist()]
        kept = sum(n > 0 for n in own)
        bits += sum(n * 4 + 32 * (0 < n < 16) for n in own)
        for n in (BITS[i] for i in levels.channels[b, h].tolist()):
            bits += 16 if n == 0 else kept * n + 32 * (n < 16)
    return bits


def test_bits_go_where_they_are_felt_and_unread_tokens_are_dropped():
    """A token that nobody reads is dropped, and its key's errors count no more; one that is not
    there never has a level; more bytes never leave more."""
    torch.manual_seed(1)
    there = torch.ones(2, 1, 6, dtype=torch.bool)
    there[1, :, 4:] = False
    d = Distortion(falling(2, 1, 6), falling(2, 1, 6, 4), there)
    d.tokens[:, :, 2] = 0
    d.channels[:, :, 2] *= 1e6
    left = []
    for budget in (300.0, 500.0, 900.0):
        got = rdkv.fill(d, torch.tensor([budget] * 2).double())
        assert not got.tokens[:, :, 2].any() and not got.tokens[1, :, 4:].any()
        of_tokens = d.tokens.gather(-1, got.tokens.long().unsqueeze(-1))[..., 0] * there
        kept = (got.tokens > 0).double()
        of_channels = torch.einsum("bhmdl,bhm->bhdl", d.channels, kept)
        of_channels = of_channels.gather(-1, got.channels.long().unsqueeze(-1))
        left.append(float(of_tokens.sum() + of_channels.sum()))
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("M", [1, 5, 12])
def test_strings_hold_levels_steps_and_codes(M):
    """What is read of a string are each kept token's values and each channel's keys, rounded with
    their bits, a channel without bits its mean; the string is as long as levels, steps and codes
    are, each row filled up to bytes; sequences of other lengths are coded beside it."""
    torch.manual_seed(M)
    B, Hkv, D = 3, 2, 8
    n_coded = torch.tensor([M, max(1, M - 4), 0])
    k = torch.randn(B, Hkv, M, D)
    v = torch.randn(B, Hkv, M, D)
    tokens = torch.randint(0, 5, (B, Hkv, M)).to(torch.uint8)
    tokens[0, 0, 0] = 1
    tokens = tokens * (torch.arange(M) < n_coded[:, None])[:, None]
    channels = torch.arange(B * Hkv * D).view(B, Hkv, D).remainder(5).to(torch.uint8)
    strings = rdkv.write(k, v, rdkv.Levels(tokens, channels), n_coded)
    got = rdkv.read(strings, n_coded, Hkv, D)
    assert torch.equal(got.there, tokens > 0)
    for b in range(B):
        size = math.ceil(Hkv * (D + int(n_coded[b])) / 2)
        for h in range(Hkv):
            own = [j for j in range(M) if tokens[b, h, j]]
            for d in range(D):
                bits = BITS[channels[b, h, d]]
                want = rounded(k[b, h, own, d].tolist(), bits) if own else []
                near = dict(rtol=0, atol=1e-3)
                torch.testing.assert_close(got.k[b, h, own, d], torch.tensor(want), **near)
                size += (bytes_of(len(own), bits) + 2 * (bits == 0)) if own else 0
            for j in range(M):
                bits = BITS[tokens[b, h, j]]
                want = rounded(v[b, h, j].tolist(), bits) if bits else [0.0] * D
                torch.testing.assert_close(got.v[b, h, j], torch.tensor(want), rtol=0, atol=1e-3)
                assert bits or not got.k[b, h, j].any()
                size += bytes_of(D, bits)
        assert len(strings[b]) == size


def bytes_of(n: int, bits: int) -> int:
    """The bytes of a row of n numbers, its step and least number included."""
    return math.ceil(n * bits / 8) + 4 * (0 < bits < 16)
