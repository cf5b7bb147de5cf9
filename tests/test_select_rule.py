"""The selection rule: the m largest scores of a row, the lower index first among equals, against
plain Python sorting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import packing

INF = math.inf
DTYPES = [torch.float32, torch.float64]


def oracle(row: list[float], m: int) -> list[bool]:
    """The rule in words: sort the indices by (-score, index), leave out -inf, take the first m."""
    order = sorted((i for i, x in enumerate(row) if x != -INF), key=lambda i: (-row[i], i))
    return [i in order[:m] for i in range(len(row))]


def compare(scores: torch.Tensor, m: torch.Tensor) -> None:
    """Assert that packing.select_top_m picks what the oracle picks, row by row."""
    got = packing.select_top_m(scores, m)
    assert got.dtype == torch.bool and got.shape == scores.shape
    counts = m.expand(scores.shape[:-1]).reshape(-1).tolist()
    for row, k, picked in zip(
        scores.reshape(-1, scores.size(-1)).tolist(),
        counts,
        got.reshape(-1, scores.size(-1)).tolist(),
        strict=True,
    ):
        assert picked == oracle(row, k), (row, k, picked)


def tied(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    """Scores of few values, so that almost every choice is among equals; both zeros occur."""
    values = torch.tensor([-INF, -1.5, -0.0, 0.0, 2.0, INF], dtype=dtype)
    return values[torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 2, 7, 33])
def test_select_top_m_equals_sorting_at_every_m(N, dtype):
    """Every m from 0 to past N, one of them per row of one call, on rows full of ties with +inf and
    -inf among them."""
    for seed in range(5):
        compare(tied(1, N, dtype=dtype, seed=seed).expand(N + 4, N), torch.arange(N + 4))
        compare(tied(N + 4, N, dtype=dtype, seed=seed), torch.arange(N + 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_go_to_the_earlier_token_then_the_lower_group(dtype):
    """In a plane (C, S) of equal scores, flattened, the pairs are taken token by token and in a
    token from group 0 on, also when the row is long enough that a sort that is not stable would mix
    them."""
    for C, S in ((5, 4), (701, 8)):
        for m in (0, 1, S - 1, S + 1, 3 * S + 2, C * S):
            plane = packing.select_top_m(torch.zeros(C * S, dtype=dtype), torch.tensor(m)).view(
                C, S
            )
            assert [(t, g) for t, g in plane.nonzero().tolist()] == [
                (i // S, i % S) for i in range(m)
            ]


def test_infinities_come_first_or_never():
    """+inf is taken before any number, -inf not even when m asks for more than there is, so a row
    may get fewer than m, or none."""
    scores = torch.tensor([[-INF, 3, INF, -INF, 9, INF], [-INF] * 6, [INF] * 6])
    for m, counts in (
        (1, (1, 0, 1)),
        (2, (2, 0, 2)),
        (3, (3, 0, 3)),
        (6, (4, 0, 6)),
        (99, (4, 0, 6)),
    ):
        compare(scores, torch.tensor(m))
        assert packing.select_top_m(scores, torch.tensor(m)).sum(-1).tolist() == list(counts)
    assert packing.select_top_m(scores, torch.tensor(2))[0].tolist() == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]


def test_rows_are_independent_and_may_have_different_m():
    """A row's mask is the one it gets alone, permuting rows with their m permutes the masks, and m
    broadcasts over leading dimensions."""
    scores = tied(3, 4, 17)
    m = torch.randint(0, 20, (3, 4), generator=torch.Generator().manual_seed(1))
    whole = packing.select_top_m(scores, m)
    for b in range(3):
        for h in range(4):
            assert torch.equal(whole[b, h], packing.select_top_m(scores[b, h], m[b, h]))
    turn = torch.tensor([2, 0, 1])
    assert torch.equal(packing.select_top_m(scores[turn], m[turn]), whole[turn])
    for part in (m[:, :1], m[:1], m[0], m[0, 0]):
        assert torch.equal(
            packing.select_top_m(scores, part),
            packing.select_top_m(scores, part.expand(3, 4).contiguous()),
        )
        compare(scores, part)
    assert packing.select_top_m(scores[..., :0], m).shape == (3, 4, 0)


@given(
    rows=st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.lists(
                st.sampled_from([-INF, -2.0, -0.0, 0.0, 0.5, INF]) | st.floats(allow_nan=False),
                min_size=n,
                max_size=n,
            ),
            min_size=1,
            max_size=4,
        )
    ),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_select_top_m_equals_sorting_on_drawn_rows(rows, data):
    """Any floats, tiny, huge and equal ones, any m per row: what the oracle picks."""
    m = data.draw(
        st.lists(st.integers(0, len(rows[0]) + 2), min_size=len(rows), max_size=len(rows))
    )
    compare(torch.tensor(rows, dtype=torch.float64), torch.tensor(m))


def higher_index_wins(scores, m):
    """A wrong rule: of equal scores the last one is taken."""
    return torch.flip(SELECT(scores.flip(-1), m), (-1,))


def threshold(scores, m):
    """A wrong rule: everything at or above the m-th largest score, more than m where there are
    ties."""
    best = scores.sort(-1, descending=True).values
    last = best.gather(
        -1, (m - 1).clamp(0, scores.size(-1) - 1).expand(scores.shape[:-1]).unsqueeze(-1)
    )
    return (scores >= last) & (m.unsqueeze(-1) > 0) & (scores > -INF)


def takes_minus_inf(scores, m):
    """A wrong rule: min(m, N) entries, whatever they are."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    first = (torch.arange(scores.size(-1)) < m.unsqueeze(-1)).expand(scores.shape)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, first)


SELECT = packing.select_top_m


@pytest.mark.parametrize(
    "wrong", [higher_index_wins, threshold, takes_minus_inf], ids=lambda f: f.__name__
)
def test_a_planted_wrong_rule_is_caught(wrong, monkeypatch):
    """The comparison is not blind: with a wrong rule in the place of the right one it fails, on the
    scores that the right one passes."""
    scores = tied(12, 9)
    m = torch.arange(12)
    compare(scores, m)
    monkeypatch.setattr(packing, "select_top_m", wrong)
    with pytest.raises(AssertionError):
        compare(scores, m)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("N", [7, 257, 5003, 70001])
def test_select_top_m_is_the_same_on_both_devices(N):
    """Ties, infinities and both zeros included, at row lengths that take different sorts on the
    GPU."""
    scores = tied(5, N, dtype=torch.float32)
    m = torch.tensor([0, 1, N // 3, N - 1, N + 5])
    assert torch.equal(
        packing.select_top_m(scores.cuda(), m.cuda()).cpu(), packing.select_top_m(scores, m)
    )
