"""Keys rounded for queries: the rule against solved systems in float64, the kernel against the
reference, and what it is worth. What selection does with it: test_key_rounding.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from storage.integers import format
from storage.integers.rounding import DAMPING, QueryMoments, error_feedback, gptq_round
from storage.kernel_base import triton
from storage.layout import cdiv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL = pytest.param(
    "triton", marks=pytest.mark.skipif(triton is None, reason="the kernel needs triton")
)


def quantise_keys_for(
    r: QueryMoments, x: torch.Tensor, block: torch.Tensor, n_blocks: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantise_keys with these queries in mind."""
    return format.quantise_keys(x, block, n_blocks, bits, partial(gptq_round, r))


def queries(lengths: list[int], D: int, seed: int = 0) -> tuple[QueryMoments, torch.Tensor]:
    """Segments whose queries point in few directions, and keys (n, D) for them, with a channel that
    is far out."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), 40, D, generator=g).double() * torch.logspace(
        0, -1.5, D
    ) + 2 * torch.randn(len(lengths), 1, D, generator=g)
    x = torch.randn(sum(lengths), D, generator=g) * (1 + 5 * (torch.rand(D, generator=g) < 0.1))
    return QueryMoments((q.mT @ q / 40).to(DEVICE), torch.tensor(lengths, device=DEVICE)), x.to(
        DEVICE
    )


def blocks(r: QueryMoments, size: int) -> tuple[torch.Tensor, int]:
    """Blocks of `size` keys in every segment: block (n,) and how many."""
    first = cdiv(r.n, size)
    number = torch.arange(len(r.segment), device=DEVICE) - (r.n.cumsum(0) - r.n)[r.segment]
    return (first.cumsum(0) - first)[r.segment] + number // size, int(first.sum())


def cost(r: QueryMoments, e: torch.Tensor) -> torch.Tensor:
    """Mean squared error in logits of errors e (n, D), (n,)."""
    return torch.einsum("nd,nde,ne->n", e.double(), r.moment[r.segment], e.double())


@pytest.mark.parametrize("impl", ["torch", KERNEL])
@pytest.mark.parametrize(("D", "bits"), [(16, 2), (16, 3), (24, 4), (16, 8)])
def test_every_coordinate_makes_up_for_those_before_it(D, bits, impl):
    """Key by key: given the errors of the coordinates that are rounded already, the heaviest first,
    the rest would best move by the solution of a linear system; the next one is rounded to the code
    nearest to where it would go."""
    r, x = queries([5, 1, 0, 9], D)
    block, n = blocks(r, 4)
    scale = format.key_scale(x, block, n, bits)
    step = scale[block, 0]
    middle = scale[block, 1]
    got = gptq_round(r, x, step, middle, bits, impl).cpu()
    half = 2 ** (bits - 1)
    differ = 0
    x = x.double().cpu()
    step = step.double().cpu()
    middle = middle.double().cpu()
    moment = r.moment.cpu()
    for t, s in enumerate(r.segment.tolist()):
        H = moment[s] + DAMPING * moment[s].diagonal().mean() * torch.eye(D)
        left = moment[s].diagonal().argsort(stable=True).tolist()
        e = torch.zeros(D, dtype=torch.float64)
        done = []
        while left:
            shift = (
                -torch.linalg.solve(H[left][:, left], H[left][:, done] @ e[done])
                if done
                else torch.zeros(len(left), dtype=torch.float64)
            )
            j = left.pop()
            want = (x[t, j] - middle[t, j] + shift[-1]) / step[t, j] + half
            code = min(max(int((want + 0.5).floor()), 0), 2**bits - 1)
            if code != got[t, j]:
                assert abs((want + 0.5) - (want + 0.5).round()) < 1e-3, (t, j, want, got[t, j])
                differ += 1
                code = int(got[t, j])
            e[j] = (code - half) * step[t, j] + middle[t, j] - x[t, j]
            done.append(j)
    assert differ <= 2


@pytest.mark.skipif(triton is None, reason="the kernel needs triton")
@pytest.mark.parametrize(
    ("lengths", "D", "bits"), [([33, 0, 1, 70], 64, 4), ([40], 128, 3), ([3, 64], 20, 2)]
)
def test_kernel_equals_the_reference(lengths, D, bits):
    """Codes differ in few keys, and what they cost is the same; of no keys, none."""
    r, x = queries(lengths, D)
    block, n = blocks(r, 16)
    scale = format.key_scale(x, block, n, bits)
    args = x, scale[block, 0], scale[block, 1]
    one, two = (gptq_round(r, *args, bits, impl) for impl in ("triton", "torch"))
    assert (one != two).any(-1).float().mean() < 0.03
    a, b = (
        cost(r, format.from_codes(c, *args[1:], bits, torch.float64) - x).mean() for c in (one, two)
    )
    torch.testing.assert_close(a, b, rtol=0.02, atol=0)
    none = QueryMoments(r.moment, 0 * r.n)
    assert (
        gptq_round(none, *(t[:0] for t in args), bits, "triton").shape
        == gptq_round(none, *(t[:0] for t in args), bits, "torch").shape
        == (0, D)
    )


def test_queries_see_less_of_it():
    """Squared error in logits, the same steps: far less than the nearest codes leave; for queries
    that are alike in all directions, for none and for those that are no numbers, codes are the
    nearest."""
    r, x = queries([200, 300], 32)
    block, n = blocks(r, 64)
    for bits in (2, 3, 4):
        near = format.quantise_keys(x, block, n, bits)
        for_queries = quantise_keys_for(r, x, block, n, bits)
        assert torch.equal(near[1], for_queries[1]) and near[0].shape == for_queries[0].shape
        off = [
            cost(r, format.dequantise_keys(*t, block, bits, torch.float64) - x).mean()
            for t in (near, for_queries)
        ]
        assert off[1] < 0.3 * off[0], (bits, off)
        for moment in (
            torch.eye(32).expand(2, -1, -1),
            torch.zeros(2, 32, 32),
            torch.full((2, 32, 32), float("nan")),
        ):
            same = quantise_keys_for(
                r._replace(moment=moment.double().to(DEVICE)), x, block, n, bits
            )
            assert torch.equal(same[0], near[0])


def test_a_key_depends_on_its_segment_alone():
    """Another segment's keys and queries change nothing; error_feedback is the identity for queries
    that share no direction."""
    r, x = queries([20, 30], 16)
    block, n = blocks(r, 16)
    packed, scale = quantise_keys_for(r, x, block, n, 3)
    other = queries([20, 30], 16, seed=1)[0].moment
    there = r.segment == 1
    moment = torch.stack((other[0], r.moment[1]))
    y = torch.where(there[:, None], x, 3 * x)
    again, scales = quantise_keys_for(QueryMoments(moment, r.n), y, block, n, 3)
    assert (
        torch.equal(again[there], packed[there])
        and not torch.equal(again, packed)
        and torch.equal(scales[2:], scale[2:])
    )
    order, share = error_feedback(torch.diag_embed(torch.tensor([[3.0, 1.0, 2.0]]).double()))
    assert order.tolist() == [[1, 2, 0]] and torch.equal(share, torch.eye(3)[None])
