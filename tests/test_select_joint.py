"""Tokens and groups under one budget: a kept token pays S for its key and 1 per group; greedy by
worth per cost, against exact fractions."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch

from storage import packing

INF = math.inf
DTYPES = [torch.float32, torch.float64]


@functools.cache
def items(value: tuple[tuple[float, ...], ...]) -> list[tuple[tuple, int, list[tuple[int, int]]]]:
    """What can be taken, best first: (order, cost, pairs) for every token with its first groups,
    and every group after those.

    A token's groups stand by worth, the lower one first among equals; with its key come as many as
    make worth per cost largest, the fewer among equals. Worth per cost is compared as a Fraction,
    infinities for themselves."""
    out = []
    for t, worth in enumerate(value):
        if worth[0] == -INF:
            continue
        S = len(worth)
        groups = sorted(range(S), key=lambda g, w=worth: (-w[g], g))
        totals = [sum(worth[g] for g in groups[: n + 1]) for n in range(S)]
        rates = [INF if w == INF else Fraction(w) / (S + 1 + n) for n, w in enumerate(totals)]
        n = max(range(S), key=lambda i, r=rates: (r[i], -i))
        out.append(((-rates[n], t, 0), S + 1 + n, [(t, g) for g in groups[: n + 1]]))
        for rank, g in enumerate(groups[n + 1 :], 1):
            out.append(
                ((-worth[g] if worth[g] == INF else -Fraction(worth[g]), t, rank), 1, [(t, g)])
            )
    return sorted(out, key=lambda i: i[0])


def oracle(value, m: int) -> list[list[bool]]:
    """The rule in words: take the items in their order until one costs more than is left."""
    value = tuple(map(tuple, value))
    kept = set()
    left = m
    for _, cost, pairs in items(value):
        if cost > left:
            break
        left -= cost
        kept.update(pairs)
    return [[(t, g) in kept for g in range(len(row))] for t, row in enumerate(value)]


def cost_of(mask: list[list[bool]]) -> int:
    """S for every token with a group, 1 for every group."""
    return sum(len(row) * any(row) + sum(row) for row in mask)


def worth_of(value, mask) -> tuple[int, Fraction]:
    """Infinite pairs kept, and the sum of the others."""
    kept = [
        v
        for row, bits in zip(value, mask, strict=True)
        for v, b in zip(row, bits, strict=True)
        if b
    ]
    return sum(v == INF for v in kept), sum((Fraction(v) for v in kept if v != INF), Fraction(0))


def compare(value: torch.Tensor, m: torch.Tensor) -> None:
    """Assert that packing.select_joint picks what the oracle picks, row by row; value (..., N, S),
    m (...)."""
    got = packing.select_joint(value, m)
    assert got.dtype == torch.bool and got.shape == value.shape
    rows = zip(
        value.flatten(0, -3).tolist(),
        m.flatten().tolist(),
        got.flatten(0, -3).tolist(),
        strict=True,
    )
    for row, budget, picked in rows:
        assert picked == oracle(row, budget), (row, budget, picked)


def drawn(
    rows: int, N: int, S: int, top: int = 7, seed: int = 0, ends: bool = True, dtype=torch.float64
) -> torch.Tensor:
    """Small whole worths (rows, N, S), so that ties of rates are many and real; with `ends` some
    tokens are inf or -inf throughout."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randint(0, top, (rows, N, S), generator=g).to(dtype)
    kind = torch.randint(0, 6, (rows, N), generator=g) if ends else torch.ones(rows, N)
    return value.masked_fill((kind == 0).unsqueeze(-1), INF).masked_fill(
        (kind == 5).unsqueeze(-1), -INF
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "S"), [(1, 2), (2, 4), (7, 2), (5, 4), (11, 3), (3, 8), (3, 16)], ids=lambda n: str(n)
)
def test_select_joint_equals_the_greedy_oracle_at_every_budget(N, S, dtype):
    """Every m from 0 to past the cost of everything, one of them per row of a call, on rows full of
    ties, with sinks and padding."""
    m = torch.arange(2 * S * N + 3)
    for seed in range(4):
        for top in (3, 30):
            compare(drawn(1, N, S, top, seed, dtype=dtype).expand(len(m), N, S), m)
            compare(drawn(len(m), N, S, top, seed + 9, dtype=dtype), m)


def test_every_tie_of_tiny_rows_goes_the_stated_way():
    """All rows of two tokens with two groups worth 0 to 4, at every budget: 625 rows, 9 budgets,
    each by the oracle."""
    value = torch.tensor(list(itertools.product(range(5), repeat=4)), dtype=torch.float64).view(
        -1, 2, 2
    )
    for m in range(9):
        compare(value, torch.full((len(value),), m))


def test_equal_tokens_are_kept_from_the_first_and_equal_groups_from_group_0():
    """Of tokens that are worth the same the earlier wins; a token's own further groups go before a
    later, equally good token; also when the row is long enough that a sort that is not stable would
    mix them."""
    S = 4
    for N in (3, 701):
        even = torch.ones(N, S, dtype=torch.float64)
        for whole in (0, 1, 2):
            for more in (0, 2 * S - 1):
                mask = packing.select_joint(even, torch.tensor(2 * S * whole + more))
                assert (
                    mask.all(-1).tolist() == [t < whole for t in range(N)]
                    and int(mask.sum()) == S * whole
                )
    # rate 6 / 6: two groups come with each key
    one = torch.tensor([[0.0, 3, 3, 0], [0, 3, 3, 0]], dtype=torch.float64)
    assert packing.select_joint(one, torch.tensor(6)).nonzero().tolist() == [[0, 1], [0, 2]]
    assert packing.select_joint(one, torch.tensor(13)).nonzero().tolist() == [
        [0, 0],
        [0, 1],
        [0, 2],
        [1, 1],
        [1, 2],
    ]
    late = torch.tensor([[5.0, 0], [3, 3], [5, 1]], dtype=torch.float64)  # rates 5/3, 6/4, 5/3
    assert packing.select_joint(late, torch.tensor(6)).nonzero().tolist() == [[0, 0], [2, 0]]


def test_a_group_that_only_keeps_the_rate_up_is_left_for_later():
    """Rates 6/3 and (6 + 2)/4 are equal: the token comes with one group, so a budget of 3 buys it,
    and the next unit buys the other."""
    value = torch.tensor([[6.0, 2.0]], dtype=torch.float64)
    assert [int(packing.select_joint(value, torch.tensor(m)).sum()) for m in range(6)] == [
        0,
        0,
        0,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(("N", "S"), [(1, 3), (2, 2), (3, 2), (2, 3), (3, 3)], ids=lambda n: str(n))
def test_no_choice_of_that_cost_is_worth_more(N, S):
    """Against all 2^(N S) choices: none that costs at most what was spent is worth more, counting
    infinite pairs first. At every m."""
    choices = [
        [list(bits[t * S : (t + 1) * S]) for t in range(N)]
        for bits in itertools.product((False, True), repeat=N * S)
    ]
    for seed in range(4):
        value = drawn(1, N, S, 9, seed)[0]
        able = [
            c
            for c in choices
            if all(
                v != -INF or not b
                for row, bits in zip(value.tolist(), c, strict=True)
                for v, b in zip(row, bits, strict=True)
            )
        ]
        priced = [(cost_of(c), worth_of(value.tolist(), c)) for c in able]
        for m in range(2 * S * N + 2):
            mask = packing.select_joint(value, torch.tensor(m)).tolist()
            spent = cost_of(mask)
            worth = worth_of(value.tolist(), mask)
            assert spent <= m and worth == max(w for c, w in priced if c <= spent), (value, m, mask)


def test_the_unused_budget_is_less_than_a_token():
    """At most 2 S - 1 stay unused, whenever something was left out, and that bound is reached; with
    enough for everything, everything is kept, but for padding. Never is more spent than given."""
    worst = dict.fromkeys((2, 4, 8), 0)
    for S in worst:
        for seed in range(6):
            value = drawn(2 * S * 7 + 2, 7, S, 3 if seed < 3 else 50, seed)
            for m, (row, mask) in enumerate(
                zip(
                    value.tolist(),
                    packing.select_joint(value, torch.arange(len(value))).tolist(),
                    strict=True,
                )
            ):
                spent = cost_of(mask)
                there = [r[0] != -INF for r in row]
                assert spent <= m
                if m - spent > 2 * S - 1 or m >= 2 * S * sum(there):
                    assert mask == [[t] * S for t in there]
                else:
                    worst[S] = max(worst[S], m - spent)
    assert worst == {S: 2 * S - 1 for S in worst}


def test_infinite_worth_comes_first_and_padding_never():
    """Sinks are taken whole before anything else and in their order; a row of padding stays empty
    whatever the budget."""
    value = torch.tensor(
        [[[-INF] * 2, [INF] * 2, [INF] * 2, [90, 80]], [[-INF] * 2] * 4], dtype=torch.float32
    )
    for m, counts in (
        (2, [0, 0, 0, 0]),
        (3, [0, 1, 0, 0]),
        (4, [0, 2, 0, 0]),
        (7, [0, 2, 1, 0]),
        (8, [0, 2, 2, 0]),
        (12, [0, 2, 2, 2]),
        (99, [0, 2, 2, 2]),
    ):
        mask = packing.select_joint(value, torch.tensor([m, m]))
        assert mask[0].sum(-1).tolist() == counts and not mask[1].any()
        compare(value, torch.tensor([m, m]))


def test_rows_are_independent_and_permute_with_their_budgets():
    """Every row's mask is the one it gets alone, m may differ by row and broadcasts, and leading
    dimensions are only carried along."""
    value = drawn(12, 9, 4, seed=3).view(3, 4, 9, 4)
    m = torch.randint(0, 80, (3, 4), generator=torch.Generator().manual_seed(1))
    whole = packing.select_joint(value, m)
    compare(value, m)
    for a, b in itertools.product(range(3), range(4)):
        assert torch.equal(whole[a, b], packing.select_joint(value[a, b], m[a, b]))
    turn = torch.tensor([2, 0, 1])
    assert torch.equal(packing.select_joint(value[turn], m[turn]), whole[turn])
    assert torch.equal(
        packing.select_joint(value, m[:1]),
        packing.select_joint(value, m[:1].expand(3, 4).contiguous()),
    )
    assert packing.select_joint(value[..., :0, :], m).shape == (3, 4, 0, 4)


def test_swapping_unequal_tokens_or_groups_swaps_the_mask():
    """Where no two rates are equal, the rule knows no positions: a permutation of tokens and groups
    goes through."""
    value = torch.rand(3, 11, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    tokens = torch.randperm(11, generator=torch.Generator().manual_seed(6))
    groups = torch.tensor([2, 0, 3, 1])
    for m in range(0, 90, 7):
        budget = torch.full((3,), m)
        moved = packing.select_joint(value[:, tokens][..., groups], budget)
        assert torch.equal(moved, packing.select_joint(value, budget)[:, tokens][..., groups])


SELECT = packing.select_joint


def later_token_wins(value, m):
    """A wrong rule: of equal tokens the later one is taken."""
    return SELECT(value.flip(-2), m).flip(-2)


def higher_group_wins(value, m):
    """A wrong rule: of equal groups the higher one is taken."""
    return SELECT(value.flip(-1), m).flip(-1)


def keys_are_free(value, m):
    """A wrong rule: the m best pairs, whatever their tokens cost."""
    return packing.select_top_m(value.flatten(-2), m).view(value.shape)


def skips_what_does_not_fit(value, m):
    """A wrong rule: the budget left is filled with pairs of kept tokens."""
    mask = SELECT(value, m)
    left = m - mask.sum((-2, -1)) - value.size(-1) * mask.any(-1).sum(-1)
    more = value.masked_fill(mask | ~mask.any(-1, keepdim=True), -INF)
    return mask | packing.select_top_m(more.flatten(-2), left).view(value.shape)


def one_more(value, m):
    """A wrong rule: it spends a unit too much."""
    return SELECT(value, m + 1)


@pytest.mark.parametrize(
    "wrong",
    [later_token_wins, higher_group_wins, keys_are_free, skips_what_does_not_fit, one_more],
    ids=lambda f: f.__name__,
)
def test_a_planted_wrong_rule_is_caught(wrong, monkeypatch):
    """The comparison is not blind: with a wrong rule in the place of the right one it fails, on the
    worths that the right one passes."""
    value = drawn(60, 7, 4, 4)
    m = torch.arange(60)
    compare(value, m)
    monkeypatch.setattr(packing, "select_joint", wrong)
    with pytest.raises(AssertionError):
        compare(value, m)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("N", [7, 257, 5003])
def test_select_joint_is_the_same_on_both_devices(N):
    """Ties and infinities included, at row lengths that take different sorts on the GPU. Worths
    whole, so that rates are equal on both."""
    value = drawn(5, N, 4, dtype=torch.float32)
    m = torch.tensor([0, 11, 3 * N, 7 * N, 8 * N + 5])
    assert torch.equal(
        packing.select_joint(value.cuda(), m.cuda()).cpu(), packing.select_joint(value, m)
    )
