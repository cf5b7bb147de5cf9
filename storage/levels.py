"""Levels under one budget: how many steps up every value group of every token is worth.

A group of energy e goes up step by step, and step j takes gain[j] e off its squared error for a
price of cost[j]; the first step of a token pays for its key, too. The rule is that of select_joint
(packing.py), for which all steps of all groups are parts, but nothing has to be sorted for it. What
a step brings a unit,

    value_j = rate_j e,  rate_j = gain_j / cost_j,                                         (1)

falls from step to step. Of a token, the steps with value > t bring

    D(t) = sum of gain e / (key + sum of cost)                                             (2)

a unit, its key paid for. The token's density d is the largest D(t); it is found at t = d, since
every step above d raises the average and every other lowers it. So if a unit has to bring t, a
token with d < t buys nothing, and any other pays its key and takes all its steps with value >= t:
what is spent at t follows from energies and densities. take_by_search (packing.py) looks for the t
at which the budget is spent.

    levels = choose_levels(energy, m, gain=(0.88, 0.11, 0.01), cost=(4, 4, 8), key=83)

Letters: storage/layout.py; N tokens of a row, J steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.kernel_base import jit, tl, use_triton
from storage.layout import cdiv
from storage.packing import begin_round, end_round, narrow, take_by_search, take_within_ref

SPAN = 2048  # tokens of a row that a program of the search sees
CHUNK = 512  # and how many energies at a time
BOUNDS = 4  # codes that a round of it asks about

# -------------------- plain


def densities_ref(
    energy: Tensor, gain: tuple[float, ...], cost: tuple[int, ...], key: int
) -> Tensor:
    """Compute densities by Dinkelbach's iteration: from t = 0 on, the next t is D(t). It rises
    towards d as steps that are no longer above it drop out, and ends where none does: S J + 2
    rounds at most, mostly 5."""
    e = energy.clamp(min=0)
    value = [e * (of_step / price) for of_step, price in zip(gain, cost, strict=True)]
    t = e.new_zeros(e.shape[:-1])
    while True:
        gained = torch.zeros_like(e)
        spent = torch.zeros_like(e)
        for j in range(len(gain)):
            above = (value[j] > t.unsqueeze(-1)).to(e.dtype)
            gained.add_(above, alpha=gain[j])
            spent.add_(above, alpha=cost[j])
        density = sum_in_pairs(e * gained) / (key + spent.sum(-1))
        if not (density > t).any():
            return t.masked_fill(energy.amax(-1) < 0, float("-inf"))
        t = t.maximum(density)


def sum_in_pairs(x: Tensor) -> Tensor:
    """Sum x (..., S) over its last dimension, neighbours first: one order wherever it is done."""
    while x.size(-1) > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def choose_levels_ref(
    energy: Tensor, m: Tensor, gain: tuple[float, ...], cost: tuple[int, ...], key: int
) -> Tensor:
    """Compute choose_levels by a sort: of tokens, each with the steps above its density, and of all
    further steps."""
    S = energy.size(-1)
    density = densities_ref(energy, gain, cost, key).unsqueeze(-1)  # (..., N, 1)
    rate = energy.new_tensor([g / c for g, c in zip(gain, cost, strict=True)])
    value = (energy.unsqueeze(-1) * rate).flatten(-2)  # (..., N, S J)
    each = torch.tensor(cost, dtype=torch.int32, device=energy.device).repeat(S)
    with_token = value > density
    first = key + torch.where(with_token, each, 0).sum(-1, keepdim=True, dtype=torch.int32)
    score = torch.cat((density, value.masked_fill(with_token, float("-inf"))), -1)
    price = torch.cat((first, each.expand_as(value)), -1)
    taken = take_within_ref(score.flatten(-2), m, price.flatten(-2)).view(score.shape)
    token_taken = taken[..., :1]
    step_taken = taken[..., 1:]
    taken = token_taken.where(with_token, step_taken)
    return taken.unflatten(-1, (S, len(gain))).sum(-1).to(torch.uint8)


# -------------------- kernels


@jit
def _of_step(j: tl.constexpr, first, second, third):
    """Pick what belongs to step j."""
    if j == 0:
        return first
    elif j == 1:
        return second
    else:
        return third


@jit
def _sum_in_pairs(x, TOKENS: tl.constexpr, S: tl.constexpr):
    """Sum x (TOKENS, S) along S as sum_in_pairs does: a + b is b + a, however lanes share them."""
    if S >= 32:
        x = tl.sum(tl.reshape(x, (TOKENS, 16, 2)), 2)
    if S >= 16:
        x = tl.sum(tl.reshape(x, (TOKENS, 8, 2)), 2)
    if S >= 8:
        x = tl.sum(tl.reshape(x, (TOKENS, 4, 2)), 2)
    if S >= 4:
        x = tl.sum(tl.reshape(x, (TOKENS, 2, 2)), 2)
    return tl.sum(x, 1)


@jit
def _density_kernel(
    energy_ptr,
    density_ptr,
    n,
    key,
    gain_0,
    gain_1,
    gain_2,
    rate_0,
    rate_1,
    rate_2,
    cost_0,
    cost_1,
    cost_2,
    TOKENS: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
):
    """Write the densities (n,) float32 of n tokens with energies (n, S) as
    densities_ref does."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = token[:, None] * S + tl.arange(0, S)[None, :]
    energy = tl.load(energy_ptr + at, mask=token[:, None] < n, other=float("-inf"))
    e = tl.maximum(energy, 0.0)
    t = tl.zeros((TOKENS,), tl.float32)
    more = 1
    while more > 0:
        gained = tl.zeros((TOKENS, S), tl.float32)
        spent = tl.zeros((TOKENS, S), tl.int32)
        for j in tl.static_range(J):
            above = e * _of_step(j, rate_0, rate_1, rate_2) > t[:, None]
            gained += tl.where(above, _of_step(j, gain_0, gain_1, gain_2), 0.0)
            spent += tl.where(above, _of_step(j, cost_0, cost_1, cost_2), 0)
        total = (key + tl.sum(spent, 1)).to(tl.float32)
        density = tl.div_rn(_sum_in_pairs(e * gained, TOKENS, S), total)
        more = tl.max((density > t).to(tl.int32), 0)
        t = tl.maximum(t, density)
    t = tl.where(tl.max(energy, 1) >= 0, t, float("-inf"))
    tl.store(density_ptr + token, t, mask=token < n)


@jit
def _search_levels_kernel(
    energy_ptr,
    density_ptr,
    key,
    rate_0,
    rate_1,
    rate_2,
    cost_0,
    cost_1,
    cost_2,
    m_ptr,
    found_ptr,
    N,
    n_blocks,
    r,
    ROUNDS: tl.constexpr,
    BOUNDS: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
):
    """Narrow each row's threshold in round r, as _search_kernel (packing.py) does: the price of a
    step counts from the lower of its value and its token's density down, that of the token's key
    from its density down. A score of 0 or more has its bits for a code.

    Blocks and SPAN are of tokens. Prices are summed as float32, which a GPU adds faster: exactly,
    since what a lane sees costs less than 2^24."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    found_ptr += (row * (ROUNDS + 1) + r) * (BOUNDS + 2)
    lo, above, bound = begin_round(found_ptr, tl.load(m_ptr + row), r, ROUNDS, BOUNDS)
    bound = tl.maximum(bound, 0).to(tl.float32, bitcast=True)[:, None]
    energy_ptr += row * N * S
    density_ptr += row * N
    spent = tl.zeros((BOUNDS, CHUNK), tl.float32)
    end = tl.minimum(block * SPAN + SPAN, N)
    for at in tl.range(block * SPAN * S, end * S, CHUNK):
        i = at + tl.arange(0, CHUNK)[None, :]
        energy = tl.load(energy_ptr + i, mask=i < end * S, other=0.0)
        density = tl.load(density_ptr + i // S, mask=i < end * S, other=float("-inf"))
        for j in tl.static_range(J):
            score = tl.minimum(energy * _of_step(j, rate_0, rate_1, rate_2), density)
            spent += (score >= bound).to(tl.float32) * _of_step(j, cost_0, cost_1, cost_2)
    for at in tl.range(block * SPAN, end, CHUNK):
        i = at + tl.arange(0, CHUNK)[None, :]
        density = tl.load(density_ptr + i, mask=i < end, other=float("-inf"))
        spent += (density >= bound).to(tl.float32) * key
    total = tl.sum(spent.to(tl.int32), 1)
    end_round(found_ptr + BOUNDS + 2, lo, above, total, block == 0, BOUNDS)


@jit
def _take_levels_kernel(
    energy_ptr,
    density_ptr,
    key,
    rate_0,
    rate_1,
    rate_2,
    cost_0,
    cost_1,
    cost_2,
    m_ptr,
    found_ptr,
    ties_before_ptr,
    level_ptr,
    N,
    n_blocks,
    WRITE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BOUNDS: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
):
    """Take the steps above the threshold, and the first at it, as _take_kernel (packing.py) does:
    level (rows, N, S) uint8 becomes how many of each group.

    A token with its density at the threshold comes with its steps above it, or not at all; steps at
    it come one by one, group by group."""
    TOKENS: tl.constexpr = CHUNK // S
    pid = tl.program_id(0)
    row = (pid // n_blocks).to(tl.int64)
    block = pid % n_blocks
    budget = tl.load(m_ptr + row)
    found_ptr += (row * (ROUNDS + 1) + ROUNDS) * (BOUNDS + 2)
    lo, above = narrow(found_ptr, budget, 1, BOUNDS)
    t = (lo - 2147483648).to(tl.int32).to(tl.float32, bitcast=True)
    t = tl.where(lo > 0, t, -1.0)  # lo = 0: all fits; else t is 0 or more
    energy_ptr += row * N * S
    density_ptr += row * N
    level_ptr += row * N * S
    spent = above + tl.load(ties_before_ptr + pid) if WRITE else above
    end = tl.minimum(block * SPAN + SPAN, N)
    for start in tl.range(block * SPAN, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        at = token[:, None] * S + tl.arange(0, S)[None, :]
        energy = tl.load(energy_ptr + at, mask=token[:, None] < end, other=float("-inf"))
        density = tl.load(density_ptr + token, mask=token < end, other=float("-inf"))
        higher = tl.zeros((TOKENS, S), tl.int32)  # prices of steps above the threshold
        ties = tl.zeros((TOKENS, S), tl.int32)  # and at it
        for j in tl.static_range(J):
            value = energy * _of_step(j, rate_0, rate_1, rate_2)
            cost = _of_step(j, cost_0, cost_1, cost_2)
            higher += tl.where(value > t, cost, 0)
            ties += tl.where((value == t) & (density >= t)[:, None], cost, 0)
        # Where all energies are 0, this is a key without a step: of no price if none follows.
        first = tl.where(density == t, key + tl.sum(higher, 1), 0)  # (TOKENS,)
        total = first + tl.sum(ties, 1)
        if WRITE:
            paid = spent + tl.cumsum(total, 0) - total + first
            comes = (density > t) | (density == t) & (paid <= budget)
            paid = paid[:, None] + tl.cumsum(ties, 1) - ties
            level = tl.zeros((TOKENS, S), tl.int32)
            for j in tl.static_range(J):
                value = energy * _of_step(j, rate_0, rate_1, rate_2)
                paid += tl.where(value == t, _of_step(j, cost_0, cost_1, cost_2), 0)
                taken = (value > t) | (value == t) & (paid <= budget)
                level += (taken & comes[:, None]).to(tl.int32)
            tl.store(level_ptr + at, level.to(tl.uint8), mask=token[:, None] < end)
        spent += tl.sum(total)
    if not WRITE:
        tl.store(ties_before_ptr + pid, spent - above)


def _use_kernels(energy: Tensor, impl: str) -> bool:
    """Say whether kernels choose among such energies."""
    if energy.size(-1) > 32 or not energy.numel() or energy.dtype != torch.float32:
        return False
    return use_triton(impl, energy.device, energy.dtype)


def _of_steps(x: tuple) -> tuple:
    """Pad to three steps; a kernel reads the first J."""
    return (*x, *x[:1] * (3 - len(x)))


def _rates(gain: tuple[float, ...], cost: tuple[int, ...]) -> tuple:
    """Return the rates of equation (1), for kernels."""
    return _of_steps(tuple(g / c for g, c in zip(gain, cost, strict=True)))


def densities(
    energy: Tensor,
    gain: tuple[float, ...],
    cost: tuple[int, ...],
    key: int,
    impl: str = "auto",
) -> Tensor:
    """Return every token's density, equation (2): (...) like energy (..., S); -inf of no token.

    Arguments and their ranges: choose_levels. Kernel and reference return the same bits."""
    if not _use_kernels(energy, impl):
        return densities_ref(energy, gain, cost, key)
    S = energy.size(-1)
    n = energy.numel() // S
    tokens = CHUNK // S
    steps = (*_of_steps(gain), *_rates(gain, cost), *_of_steps(cost))
    density = torch.empty(energy.shape[:-1], device=energy.device)
    # sums are those of the reference: no product is added without being rounded
    _density_kernel[(cdiv(n, tokens),)](
        energy.contiguous(), density, n, key, *steps, tokens, S, len(gain), enable_fp_fusion=False
    )
    return density


def choose_levels(
    energy: Tensor,
    m: Tensor,
    gain: tuple[float, ...],
    cost: tuple[int, ...],
    key: int,
    impl: str = "auto",
) -> Tensor:
    """Choose the levels of value groups under one budget: uint8 like energy, 0 (dropped) to J.

    energy  (..., N, S) finite float >= 0; -inf in all groups: of no token; S a power of 2, N S
            less than 2^31. Kernels choose where it is float32
    m       (...) int64, the budget, 0 or more
    gain    what each step is worth of an energy of 1, falling per cost: J = 1 or 3 numbers
    cost    what each step costs, 1 at least; those of a token less than 2^18
    key     what a token costs that has a group, 1 at least, less than 2^18

    Of equal steps the earlier token wins, then the lower group; a token comes with all its steps
    above its density or not at all. The first that does not fit ends it, so less than one token
    with all its steps stays unused. Kernels and reference choose the same: they sum in the same
    order. Kernels read energies 17 times and ask the host nothing."""
    if not _use_kernels(energy, impl):
        return choose_levels_ref(energy, m, gain, cost, key)
    N, S = energy.shape[-2:]
    energy = energy.contiguous()
    m = m.expand(energy.shape[:-2]).contiguous()
    density = densities(energy, gain, cost, key, impl)
    levels = torch.empty_like(energy, dtype=torch.uint8)
    inputs = (energy, density, key, *_rates(gain, cost), *_of_steps(cost))
    kernels = (_search_levels_kernel, _take_levels_kernel)
    take_by_search(*kernels, inputs, m, levels, N, SPAN, BOUNDS, (CHUNK, S, len(gain)))
    return levels
