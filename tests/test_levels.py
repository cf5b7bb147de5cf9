"""Levels under one budget: the plain form against exact loops, the kernels against the plain form,
choice by choice."""

from fractions import Fraction

import pytest
import torch
from test_select_bits import greedy

from selection.budgets import level_gains
from storage import levels
from storage.integers.format import LEVEL_ERRORS
from storage.kernel_base import triton
from storage.levels import choose_levels, densities
from storage.packing import select_joint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEVELS = level_gains(LEVEL_ERRORS)
IMPLS = [
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(triton is None, reason="the kernels need triton")
    ),
]
CASES = {  # rows, tokens, groups, gains, costs, price of a key
    "levels": ((2, 3), 37, 8, LEVELS, (4, 4, 8), 83),
    "sixteen groups": ((3,), 21, 16, LEVELS, (2, 2, 4), 83),
    "thirty-two groups": ((1,), 9, 32, LEVELS, (1, 1, 2), 1),
    "one bit width": ((2,), 50, 4, (1.0,), (16,), 83),
    "one width, many groups": ((1,), 11, 32, (1.0,), (4,), 20),
    "dear keys": ((1,), 19, 2, LEVELS, (4096, 4096, 8192), 30_000),
    "a token": ((2,), 1, 1, LEVELS, (4, 4, 8), 1),
    "a group": ((1,), 127, 1, (1.0,), (1,), 7),
    "several blocks": ((2,), 129, 4, LEVELS, (4, 4, 8), 83),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 tokens, 64 energies at a time: a few dozen tokens span several."""
    monkeypatch.setattr(levels, "SPAN", 32)
    monkeypatch.setattr(levels, "CHUNK", 64)


def cost_of(chosen: torch.Tensor, cost: tuple[int, ...], key: int) -> torch.Tensor:
    """What levels (..., N, S) cost: (...)."""
    up_to = torch.tensor((0, *cost), device=chosen.device).cumsum(0)
    return up_to[chosen.long()].sum((-1, -2)) + key * (chosen > 0).any(-1).sum(-1)


def worth_of(chosen: torch.Tensor, energy: torch.Tensor, gain: tuple[float, ...]) -> torch.Tensor:
    """What levels (..., N, S) bring: (...) float64."""
    up_to = torch.tensor((0.0, *gain), dtype=torch.float64, device=chosen.device).cumsum(0)
    return (up_to[chosen.long()] * energy.double().clamp(min=0)).sum((-1, -2))


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize("equal", [False, True], ids=["drawn", "with equal ones"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_choose_what_the_plain_form_chooses(case, equal, small_blocks):
    """Every level is the same, at budgets from nothing to more than everything, also where energies
    are equal or 0, and where there are no tokens."""
    rows, N, S, gain, cost, key = CASES[case]
    g = torch.Generator().manual_seed(0)
    energy = torch.rand(*rows, N, S, generator=g) ** 6
    if equal:
        energy = (energy * 8).round() / 8
    energy[torch.rand(*rows, N, generator=g) < 0.2] = float("-inf")
    energy = energy.to(DEVICE)
    everything = N * (key + S * sum(cost))
    seen = set()
    for share in (0.0, 0.01, 0.3, 0.7, 1e9):
        m = torch.full(rows, int(share * everything), device=DEVICE)
        m.flatten()[0] += 7
        got = choose_levels(energy, m, gain, cost, key, impl="triton")
        want = choose_levels(energy, m, gain, cost, key, impl="torch")
        assert got.dtype == want.dtype == torch.uint8 and torch.equal(got, want), share
        seen |= set(want.flatten().tolist())
    assert N < 19 or seen == set(range(len(gain) + 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("S", "gain", "cost", "key"),
    [
        (2, (4.0, 2.0, 2.0), (1, 1, 2), 3),
        (4, (8.0, 2.0, 1.0), (4, 4, 8), 20),
        (4, (3.0,), (2,), 1),
        (1, (4.0, 2.0, 1.0), (1, 2, 3), 5),
    ],
    ids=str,
)
def test_levels_are_those_of_the_greedy_rule_at_every_budget(impl, S, gain, cost, key):
    """Small whole energies, so that ties are many and real, zeros among them, at every budget from
    nothing to past everything (of kernels in the interpreter, at some): the exact rule, in
    Fractions."""
    few = impl == "triton" and DEVICE.type == "cpu"
    for seed in range(1 if few else 3):
        g = torch.Generator().manual_seed(seed)
        energy = torch.randint(0, 5, (6, S), generator=g).float()
        energy[2] = float("-inf")
        energy[4] = energy[1]
        m = torch.arange(0, 5 * (key + S * sum(cost)) + 11, 11 if few else 1)
        each = energy.expand(len(m), -1, -1).to(DEVICE)
        got = choose_levels(each, m.to(DEVICE), gain, cost, key, impl).tolist()
        worth = (energy.unsqueeze(-1) * torch.tensor(gain)).flatten(1).tolist()
        for budget, chosen in zip(m.tolist(), got, strict=True):
            parts = greedy(worth, key, list(cost) * S, budget)
            steps = torch.tensor(parts).unflatten(1, (S, -1)).sum(-1)
            assert chosen == steps.tolist(), (energy, budget)


def slow_token(S: int, cost: int, key: int) -> list[float]:
    """Energies of a token, for one step of gain 1, of which each round of the iteration leaves out
    one: D of this and all larger values is hardly less than the next larger one."""
    d = cost / (key + cost)  # of the first value alone
    value = [1.0, d * (1 - 2.0**-20)]
    while len(value) < S:
        number = len(value)
        wanted = value[-1] * (1 - 2.0**-24) * (key + cost * (number + 1))
        value.append((wanted - cost * sum(value)) / cost)
        if value[-1] < 0:
            value[-1] = 0.0
            break
    value += [0.0] * (S - len(value))
    return [v * cost for v in value[:S]]


@pytest.mark.parametrize(("cost", "key"), [((4,), 83), ((16,), 1), ((4, 4, 8), 20), ((1, 2, 2), 1)])
def test_densities_are_the_largest_of_all_prefixes(cost, key, monkeypatch):
    """Of a token's steps, best first, the prefix that brings most a unit, in Fractions; also of
    tokens made to take many rounds."""
    S = 32
    gain = LEVELS if len(cost) == 3 else (1.0,)
    g = torch.Generator().manual_seed(0)
    energy = torch.rand(60, S, generator=g) ** 5
    energy[:3] = torch.tensor([[0.0], [1.0], [float("-inf")]])
    energy[3] = torch.tensor(slow_token(S, cost[0], key))
    sums = []
    plain = levels.sum_in_pairs
    monkeypatch.setattr(levels, "sum_in_pairs", lambda x: sums.append(0) or plain(x))
    got = densities(energy, gain, cost, key).tolist()
    assert len(sums) >= (8 if key == 1 else 5)
    for row, density in zip(energy.tolist(), got, strict=True):
        if row[0] < 0:
            assert density == float("-inf")
            continue
        steps = [
            (Fraction(e) * Fraction(a), c) for e in row for a, c in zip(gain, cost, strict=True)
        ]
        steps.sort(key=lambda step: -step[0] / step[1])
        worth = Fraction(0)
        spent = key
        best = Fraction(0)
        for gained, price in steps:
            worth += gained
            spent += price
            best = max(best, worth / spent)
        assert density == pytest.approx(float(best), rel=1e-6)


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize("S", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("n", [1, 127, 129])
def test_density_kernel_equals_the_plain_form(n, S):
    """Bit by bit, of numbers of tokens that fill no program, whose rounds are many and few."""
    g = torch.Generator().manual_seed(n)
    energy = torch.rand(n, S, generator=g) ** 6
    energy[n // 2 :] = torch.tensor(slow_token(S, 16, 1))
    energy[n // 3] = float("-inf")
    energy = energy.to(DEVICE)
    for gain, cost, key in ((LEVELS, (4, 4, 8), 83), ((1.0,), (16,), 1)):
        got = densities(energy, gain, cost, key, "triton")
        assert torch.equal(got, densities(energy, gain, cost, key, "torch"))


@pytest.mark.parametrize("impl", IMPLS)
def test_levels_keep_to_the_budget_and_leave_less_than_a_token(impl):
    """What is chosen costs no more than the budget, and what is left is less than one token with
    all its groups, while there is one that is not whole."""
    gain, cost, key = LEVELS, (4, 4, 8), 83
    energy = torch.rand(4, 40, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    m = torch.tensor([0, 500, 2000, 10**6], device=DEVICE)
    chosen = choose_levels(energy, m, gain, cost, key, impl)
    spent = cost_of(chosen, cost, key)
    assert (spent <= m).all()
    whole = (chosen == 3).all(-1).all(-1)
    assert (whole | (m - spent < key + 8 * sum(cost))).all() and whole.tolist() == [False] * 3 + [
        True
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_more_budget_takes_nothing_away_and_brings_what_select_joint_brings(impl):
    """Level by level never less with a larger budget, and never above it; the worth of it all is
    that of the rule with a sort of all steps, to 1e-6, since sums are taken in another order."""
    gain, cost, key = LEVELS, (4, 4, 8), 83
    S = 8
    energy = torch.rand(90, S, generator=torch.Generator().manual_seed(2)).pow(6).to(DEVICE)
    m = torch.arange(0, 90 * (key + S * sum(cost)), 509, device=DEVICE)
    rows = energy.expand(len(m), -1, -1)
    chosen = choose_levels(rows, m, gain, cost, key, impl)
    assert (chosen[1:] >= chosen[:-1]).all() and (cost_of(chosen, cost, key) <= m).all()
    worth = (rows.unsqueeze(-1) * rows.new_tensor(gain)).flatten(-2)
    each = torch.tensor(cost, device=DEVICE).repeat(S)
    taken = select_joint(worth, m, impl="torch", key=key, cost=each).unflatten(-1, (S, -1)).sum(-1)
    got, want = worth_of(chosen, rows, gain), worth_of(taken, rows, gain)
    assert torch.allclose(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_energies_and_half_empty_tokens_are_chosen_from_alike(impl, dtype):
    """By kernels and plainly, whatever the numbers' type; a token that lacks a group is a token, and
    one that lacks all is none."""
    energy = torch.rand(2, 60, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    energy[:, ::7, 0] = float("-inf")
    energy[:, 5] = float("-inf")
    energy = energy.to(DEVICE)
    m = torch.tensor([900, 10**6], device=DEVICE)
    chosen = choose_levels(energy, m, LEVELS, (4, 4, 8), 83, impl)
    plain = choose_levels(energy, m, LEVELS, (4, 4, 8), 83, "torch")
    assert torch.equal(chosen, plain)
    assert not chosen[:, 5].any() and not chosen[:, ::7, 0].any() and (chosen[1, 6, 1:] > 0).all()
