"""Levels under one budget: how many steps up every value group of every token is worth.

A group of energy e goes up step by step, and step j takes gain[j] e off its squared error for a
price of cost[j]; the first step of a token pays for its key, too. select_joint (packing.py) is the
rule, for which all steps of all groups are parts. Here two kernels do what is around its search:
one reads a token's few energies and writes its steps in the order in which they are bought, one
reads how many of them were, so that nothing is sorted in memory.

    levels = choose_levels(energy, m, gain=(0.88, 0.11, 0.01), cost=(4, 4, 8), key=83)

Letters: storage/layout.py; N tokens of a row, J steps, P = S J steps of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.kernel_base import jit, tl, triton, use_triton
from storage.layout import cdiv
from storage.packing import select_joint, take_within

TOKENS = 128  # that a program takes: one per lane


def choose_levels_ref(
    energy: Tensor, m: Tensor, gain: tuple[float, ...], cost: tuple[int, ...], key: int
) -> Tensor:
    """Compute choose_levels by select_joint."""
    S = energy.size(-1)
    worth = (energy.unsqueeze(-1) * energy.new_tensor(gain)).flatten(-2)
    each = torch.tensor(cost, device=energy.device).repeat(S)
    taken = select_joint(worth, m, impl="torch", key=key, cost=each)
    return taken.unflatten(-1, (S, -1)).sum(-1).to(torch.uint8)


@jit
def _by_step(step, first, second, third):
    """Pick what belongs to each step."""
    return tl.where(step == 0, first, tl.where(step == 1, second, third))


@jit
def _order_steps_kernel(
    energy_ptr,
    score_ptr,
    price_ptr,
    part_ptr,
    n,
    key,
    gain_0,
    gain_1,
    gain_2,
    cost_0,
    cost_1,
    cost_2,
    S: tl.constexpr,
    J: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write what select_joint sorts for n tokens with energies (n, S): score (n, P) float32, price
    (n, P) and part (n, P) uint8, best first. PARTS: P up to a power of 2.

    A group's steps fall in value, so the best step that is left is the next one of some group: of S
    candidates, not of P."""
    P: tl.constexpr = S * J
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    p = tl.arange(0, PARTS)
    g = tl.arange(0, S)
    real = (g >= 0)[:, None] & (token < n)[None, :]
    at = token[None, :] * S + g[:, None]
    energy = tl.load(energy_ptr + at, mask=real, other=float("-inf"))  # (S, TOKENS)
    zero = tl.zeros_like(energy)
    value_0 = tl.div_rn(energy * gain_0, zero + cost_0)
    value_1 = tl.div_rn(energy * gain_1, zero + cost_1)
    value_2 = tl.div_rn(energy * gain_2, zero + cost_2)

    # one after the other: the best that is left, of equal ones the first
    step = tl.zeros([S, TOKENS], tl.int32)  # of each group, the next
    value = value_0
    order = tl.zeros([PARTS, TOKENS], tl.int32)
    best = tl.zeros([PARTS, TOKENS], tl.float32)
    worth = tl.zeros([TOKENS], tl.float32)
    spent = tl.zeros([TOKENS], tl.int32) + key
    density = tl.full([TOKENS], float("-inf"), tl.float32)
    last = tl.zeros([TOKENS], tl.int32)
    paid = tl.zeros([TOKENS], tl.int32) + key + cost_0
    for r in tl.range(0, P):
        left = step < J
        top = tl.max(tl.where(left, value, float("-inf")), 0)
        among = left & (value == top[None, :])
        chosen = tl.min(tl.where(among, g[:, None] * J + step, PARTS), 0)
        cost = _by_step(chosen % J, cost_0, cost_1, cost_2)
        spent += cost
        worth += top * cost.to(tl.float32)
        now = tl.div_rn(worth, spent.to(tl.float32))
        better = (now > density) | (r == 0)
        density = tl.where(better, now, density)
        last = tl.where(better, r, last)
        paid = tl.where(better, spent, paid)
        step += (g[:, None] == (chosen // J)[None, :]).to(tl.int32)
        value = _by_step(step, value_0, value_1, value_2)
        here = (p == r)[:, None]
        order = tl.where(here, chosen[None, :], order)
        best = tl.where(here, top[None, :], best)

    with_key = p[:, None] <= last[None, :]
    # rounding must not put a part before the token that it is of
    score = tl.where(with_key, density[None, :], tl.minimum(best, density[None, :]))
    first = tl.where((p == 0)[:, None], paid[None, :], 0)
    price = tl.where(with_key, first, _by_step(order % J, cost_0, cost_1, cost_2))
    to = token[None, :] * P + p[:, None]
    real = (p < P)[:, None] & (token < n)[None, :]
    tl.store(score_ptr + to, score, mask=real)
    tl.store(price_ptr + to, price.to(price_ptr.dtype.element_ty), mask=real)
    tl.store(part_ptr + to, order.to(tl.uint8), mask=real)


@jit
def _levels_kernel(
    part_ptr,
    taken_ptr,
    level_ptr,
    n,
    S: tl.constexpr,
    J: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Count the steps taken of every group: part, taken (n, P) to level (n, S) uint8. A token's
    levels, 3 at most, lie in a word of 2 bits each, which one sum fills."""
    P: tl.constexpr = S * J
    WORD: tl.constexpr = tl.int32 if S <= 16 else tl.int64
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    p = tl.arange(0, PARTS)
    at = token[:, None] * P + p[None, :]
    real = (token < n)[:, None] & (p < P)[None, :]
    taken = tl.load(taken_ptr + at, mask=real, other=0).to(WORD)
    group = tl.load(part_ptr + at, mask=real, other=0).to(WORD) // J
    word = tl.sum(taken << (2 * group), 1)
    g = tl.arange(0, S)
    level = (word[:, None] >> (2 * g)[None, :].to(WORD)) & 3
    there = (token < n)[:, None] & (g >= 0)[None, :]
    tl.store(level_ptr + token[:, None] * S + g[None, :], level.to(tl.uint8), mask=there)


def price_dtype(most: int) -> torch.dtype:
    """Return the narrowest integers that hold a price of `most`: the search reads it ten times."""
    if most < 2**8:
        return torch.uint8
    return torch.int16 if most < 2**15 else torch.int32


def choose_levels(
    energy: Tensor,
    m: Tensor,
    gain: tuple[float, ...],
    cost: tuple[int, ...],
    key: int,
    impl: str = "auto",
) -> Tensor:
    """Choose the levels of value groups under one budget: uint8 like energy, 0 (dropped) to J.

    energy  (..., N, S) float >= 0; -inf: of no token; S a power of 2
    m       (...) int64, the budget
    gain    what each step is worth of an energy of 1, falling per cost: J = 1 or 3 numbers
    cost    what each step costs, 1 at least
    key     what a token costs that has a group, 1 at least

    Of equal steps the earlier token wins, then the lower group. Kernels and reference choose the
    same: both sum in the order in which steps are bought."""
    S = energy.size(-1)
    J = len(gain)  # 1 or 3: what kernels are told of
    P = S * J
    if S > 32 or P > 256 or not energy.numel() or not use_triton(impl, energy.device, energy.dtype):
        return choose_levels_ref(energy, m, gain, cost, key)
    energy = energy.contiguous()
    n = energy.numel() // S
    most = key + S * sum(cost)
    plane = (*energy.shape[:-1], P)
    score = torch.empty(plane, device=energy.device)
    price = torch.empty(plane, dtype=price_dtype(most), device=energy.device)
    part = torch.empty(plane, dtype=torch.uint8, device=energy.device)
    parts = triton.next_power_of_2(P)
    steps = (*gain, *gain[:1] * (3 - J), *cost, *cost[:1] * (3 - J))
    # sums are those of the reference: no product is added without being rounded
    _order_steps_kernel[(cdiv(n, TOKENS),)](
        energy, score, price, part, n, key, *steps, S, J, parts, TOKENS, enable_fp_fusion=False
    )
    taken = take_within(score.flatten(-2), m, price.flatten(-2), impl)
    levels = torch.empty_like(energy, dtype=torch.uint8)
    few = max(1, 4 * TOKENS // parts)
    _levels_kernel[(cdiv(n, few),)](part, taken, levels, n, S, J, parts, few)
    return levels
