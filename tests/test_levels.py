"""Levels under one budget: the kernels against the rule of select_joint, choice by choice."""

import pytest
import torch

from selection.budgets import level_gains
from storage.integers.format import LEVEL_ERRORS
from storage.kernel_base import triton
from storage.levels import choose_levels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEVELS = level_gains(LEVEL_ERRORS)
CASES = {  # rows, tokens, groups, gains, costs, price of a key
    "levels": ((2, 3), 37, 8, LEVELS, (4, 4, 8), 83),
    "sixteen groups": ((3,), 21, 16, LEVELS, (2, 2, 4), 83),
    "one bit width": ((2,), 50, 4, (1.0,), (16,), 83),
    "dear keys": ((1,), 19, 2, LEVELS, (4096, 4096, 8192), 30_000),
    "a token": ((2,), 1, 1, LEVELS, (4, 4, 8), 1),
}


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize("equal", [False, True], ids=["drawn", "with equal ones"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_choose_what_the_rule_chooses(case, equal):
    """Every level is the rule's, at budgets from nothing to everything, also where energies are
    equal or 0, and where there are no tokens."""
    rows, N, S, gain, cost, key = CASES[case]
    g = torch.Generator().manual_seed(0)
    energy = torch.rand(*rows, N, S, generator=g) ** 6
    if equal:
        energy = (energy * 8).round() / 8
    energy[torch.rand(*rows, N, generator=g) < 0.2] = float("-inf")
    energy = energy.to(DEVICE)
    everything = N * (key + S * sum(cost))
    seen = set()
    for share in (0.0, 0.01, 0.1, 0.3, 0.7, 1.0):
        m = torch.full(rows, int(share * everything), device=DEVICE)
        m.flatten()[0] += 7
        got = choose_levels(energy, m, gain, cost, key, impl="triton")
        want = choose_levels(energy, m, gain, cost, key, impl="torch")
        assert got.dtype == want.dtype == torch.uint8 and torch.equal(got, want), share
        seen |= set(want.flatten().tolist())
    assert N == 1 or seen == set(range(len(gain) + 1))


def test_levels_keep_to_the_budget_and_leave_less_than_a_token():
    """What is chosen costs no more than the budget, and what is left is less than one token with
    all its groups, while there is one that is not whole."""
    gain, cost, key = LEVELS, (4, 4, 8), 83
    energy = torch.rand(4, 40, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    m = torch.tensor([0, 500, 2000, 10**6], device=DEVICE)
    levels = choose_levels(energy, m, gain, cost, key)
    up_to = torch.tensor((0, *cost), device=DEVICE).cumsum(0)
    spent = up_to[levels.long()].sum((1, 2)) + key * (levels > 0).any(-1).sum(1)
    assert (spent <= m).all()
    whole = (levels == 3).all(-1).all(-1)
    assert (whole | (m - spent < key + 8 * sum(cost))).all() and whole.tolist() == [False] * 3 + [
        True
    ]
