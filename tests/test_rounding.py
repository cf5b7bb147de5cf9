"""Keys rounded for queries: the rule against solved systems in float64, the kernel against the
reference, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import error_line, tokens
from test_selector import config, run, selecting

from config import SelectConfig
from storage.integers import format as quant
from storage.integers.rounding import DAMPING, Readers, codes_for, taken_back
from storage.kernel_base import triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL = pytest.param(
    "triton", marks=pytest.mark.skipif(triton is None, reason="the kernel needs triton")
)


def quantise_keys_for(
    r: Readers, x: torch.Tensor, block: torch.Tensor, n_blocks: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantise_keys with these readers in mind."""
    return quant.quantise_keys(x, block, n_blocks, bits, partial(codes_for, r))


def readers(lengths: list[int], D: int, seed: int = 0) -> tuple[Readers, torch.Tensor]:
    """Segments whose queries point in few directions, and keys (n, D) for them, with a channel that
    is far out."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), 40, D, generator=g).double() * torch.logspace(
        0, -1.5, D
    ) + 2 * torch.randn(len(lengths), 1, D, generator=g)
    x = torch.randn(sum(lengths), D, generator=g) * (1 + 5 * (torch.rand(D, generator=g) < 0.1))
    return Readers((q.mT @ q / 40).to(DEVICE), torch.tensor(lengths, device=DEVICE)), x.to(DEVICE)


def blocks(r: Readers, size: int) -> tuple[torch.Tensor, int]:
    """Blocks of `size` keys in every segment: block (n,) and how many."""
    first = -(-r.n // size)
    number = torch.arange(len(r.segment), device=DEVICE) - (r.n.cumsum(0) - r.n)[r.segment]
    return (first.cumsum(0) - first)[r.segment] + number // size, int(first.sum())


def cost(r: Readers, e: torch.Tensor) -> torch.Tensor:
    """Mean squared error in logits of errors e (n, D), (n,)."""
    return torch.einsum("nd,nde,ne->n", e.double(), r.moment[r.segment], e.double())


@pytest.mark.parametrize("impl", ["torch", KERNEL])
@pytest.mark.parametrize(("D", "bits"), [(16, 2), (16, 3), (24, 4), (16, 8)])
def test_every_coordinate_makes_up_for_those_before_it(D, bits, impl):
    """Key by key: given the errors of the coordinates that are rounded already, the heaviest first,
    the rest would best move by the solution of a linear system; the next one is rounded to the code
    nearest to where it would go."""
    r, x = readers([5, 1, 0, 9], D)
    block, n = blocks(r, 4)
    scale = quant.key_scale(x, block, n, bits)
    step = scale[block, 0]
    middle = scale[block, 1]
    got = codes_for(r, x, step, middle, bits, impl).cpu()
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
    r, x = readers(lengths, D)
    block, n = blocks(r, 16)
    scale = quant.key_scale(x, block, n, bits)
    args = x, scale[block, 0], scale[block, 1]
    one, two = (codes_for(r, *args, bits, impl) for impl in ("triton", "torch"))
    assert (one != two).any(-1).float().mean() < 0.03
    a, b = (
        cost(r, quant.from_codes(c, *args[1:], bits, torch.float64) - x).mean() for c in (one, two)
    )
    torch.testing.assert_close(a, b, rtol=0.02, atol=0)
    none = Readers(r.moment, 0 * r.n)
    assert (
        codes_for(none, *(t[:0] for t in args), bits, "triton").shape
        == codes_for(none, *(t[:0] for t in args), bits, "torch").shape
        == (0, D)
    )


def test_queries_see_less_of_it():
    """Squared error in logits, the same steps: far less than the nearest codes leave; for queries
    that are alike in all directions, for none and for those that are no numbers, codes are the
    nearest."""
    r, x = readers([200, 300], 32)
    block, n = blocks(r, 64)
    for bits in (2, 3, 4):
        near = quant.quantise_keys(x, block, n, bits)
        for_queries = quantise_keys_for(r, x, block, n, bits)
        assert torch.equal(near[1], for_queries[1]) and near[0].shape == for_queries[0].shape
        off = [
            cost(r, quant.dequantise_keys(*t, block, bits, torch.float64) - x).mean()
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
    """Another segment's keys and queries change nothing; taken_back is the identity for queries
    that share no direction."""
    r, x = readers([20, 30], 16)
    block, n = blocks(r, 16)
    packed, scale = quantise_keys_for(r, x, block, n, 3)
    other = readers([20, 30], 16, seed=1)[0].moment
    there = r.segment == 1
    moment = torch.stack((other[0], r.moment[1]))
    y = torch.where(there[:, None], x, 3 * x)
    again, scales = quantise_keys_for(Readers(moment, r.n), y, block, n, 3)
    assert (
        torch.equal(again[there], packed[there])
        and not torch.equal(again, packed)
        and torch.equal(scales[2:], scale[2:])
    )
    order, share = taken_back(torch.diag_embed(torch.tensor([[3.0, 1.0, 2.0]]).double()))
    assert order.tolist() == [[1, 2, 0]] and torch.equal(share, torch.eye(3)[None])


def test_a_context_is_rounded_for_its_own_queries():
    """--key_rounding changes the codes of keys and nothing else, in every row as alone; logits
    after the prompt come nearer to dense."""
    X = tokens(6, 131, seed=4)
    Y = tokens(6, 29, seed=5)
    errors = []
    m = selecting()
    dense = run(m, config(kv_keep=1.0), X, Y, None)[1]
    caches = []
    m.selector.kv = replace(m.selector.kv, key_bits=2, value_bits=8)
    prompts = []
    choose = m.selector.choose
    m.selector.choose = lambda p: prompts.append(p) or choose(p)
    for how in ("queries", "nearest"):
        _, got, _, cache = run(m, config(kv_keep=1.0, key_rounding=how), X, Y, None)
        caches.append(cache.layers[0].tensors())
        if how == "queries":  # each layer for its own queries; the first four tokens are whole
            n = prompts[0].n_context - 4
            segment = torch.arange(18).repeat_interleave(n)  # 6 rows, 3 KV heads
            at = segment * -(-n // 64) + torch.arange(n).repeat(18) // 64
            for i, c in enumerate(cache.layers):
                args = prompts[0].keys[i, :, :, 4 : 4 + n].flatten(0, 2), at, 18 * -(-n // 64), 2
                assert torch.equal(
                    c.keys,
                    quantise_keys_for(
                        Readers(prompts[0].moment(i).flatten(0, 1), torch.full((18,), n)), *args
                    )[0],
                )
        errors.append((got - dense).square().mean().item())
    assert {name for name, t in caches[0].items() if not torch.equal(t, caches[1][name])} == {
        "keys"
    }
    assert errors[0] < 0.8 * errors[1], errors  # another seed: 0.64 to 0.77
    for kv in (dict(kv_bytes=0.3), dict(kv_keep=0.5)):
        both = run(m, config(**kv), X[:2], Y[:2], (0, 40))
        torch.testing.assert_close(
            both[1][1], run(m, config(**kv), X[1:2, 40:], Y[1:2], None)[1][0]
        )


def test_other_roundings_are_refused():
    """In a line."""
    assert "key_rounding='down'" in error_line(SelectConfig, key_rounding="down")
