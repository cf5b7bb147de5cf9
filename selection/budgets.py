"""Budgets of a selection: what a share of bytes is in prices, and who shares one budget.

Prices are in half bytes, so that 4-bit rows of one number are whole. Letters: storage/layout.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from config import KVConfig
from storage.integers.format import LEVEL_BITS, LEVEL_ERRORS, row_bytes
from storage.layout import mask_dtype, tile_size


class Plan(NamedTuple):
    """What --kv_bytes stores by itself, from a budget on (docs/log.md: chosen on validation
    text)."""

    from_bytes: float
    key_bits: int
    value_bits: int  # 0: levels
    key_block: int


PLANS = (
    Plan(0.2, 8, 0, 128),
    Plan(0.14, 4, 0, 32),
    Plan(0.06, 4, 0, 64),
    Plan(0.0, 3, 0, 64),
)


@cache
def planned(kv: KVConfig, kv_bytes: float) -> KVConfig:
    """Return storage as kv says, or where it leaves that to --kv_bytes as is best, as far as
    known."""
    if not kv_bytes or kv.ints:
        return kv
    plan = next(p for p in PLANS if kv_bytes >= p.from_bytes)
    own_block = kv.key_block != KVConfig.key_block
    block = kv.key_block if own_block else plan.key_block
    bits = dict(key_bits=plan.key_bits, value_bits=plan.value_bits)
    return replace(kv, kv="select", key_block=block, **bits)


class Prices(NamedTuple):
    """What a kept token and its groups cost, in half bytes."""

    key: int  # a token that is kept
    step: tuple[int, ...]  # from each level of a group to the next
    gain: tuple[float, ...]  # of it: squared error that it takes off a group of variance 1


def prices(kv: KVConfig, head_dim: int, heads: int) -> Prices:
    """Return the prices of a mask that `heads` KV heads share."""
    S = kv.n_groups
    if kv.value_bits:
        bits = (0, kv.value_bits)
        error = (1.0, 0.0)
        mask_groups = S
        most_rows = S
        scale = 4  # bytes of step and middle
    else:
        bits = LEVEL_BITS
        error = LEVEL_ERRORS
        mask_groups = 2 * S
        most_rows = 4 * S
        scale = 2
    per_mask = mask_dtype(mask_groups).itemsize + 1 + 4 / tile_size(most_rows)
    per_head = row_bytes(head_dim, kv.key_bits) + 4 * head_dim / kv.key_block + scale
    key = math.ceil(2 * (heads * per_head + per_mask))
    row = [2 * heads * row_bytes(head_dim // S, b) for b in bits]
    step = (b - a for a, b in pairwise(row))
    return Prices(key, tuple(step), level_gains(error))


def level_gains(error: tuple[float, ...]) -> tuple[float, ...]:
    """Return the squared error that each step up takes away of a group of variance 1, if its
    numbers are Gaussian, given what is left at each level; differences of float32."""
    return tuple((-torch.tensor(error).diff()).tolist())


def half_bytes_for(
    kv_bytes: float,
    n: int,
    region: int,
    n_sinks: int,
    head_dim: int,
    heads: int,
    placed: bool = False,
) -> int:
    """Return the half bytes that a mask of `heads` KV heads may spend on n context tokens, when a
    prompt of n + region tokens may hold kv_bytes of 16 bits a number. What stays whole, blocks that
    are not full, counts and starts are paid for, too; placed: and a bit a token that says where it
    stood.

    So the bytes held are never above the budget, unless what stays whole is. Below it they are by
    the price of a token at most, and in each layer and head by 4 head_dim + 80 bytes (a block's
    scales, counts) and half a byte a token; or by all that everything kept does not need."""
    whole = min(n, n_sinks) + region
    numbers = 4 * head_dim * (kv_bytes * (n + region) - whole) - 4 * head_dim - 80
    places = 2 * math.ceil(n / 8) if placed else 0
    return max(0, math.floor(2 * heads * numbers) - places)


def within_budget(
    score: Tensor, budget: Tensor, allocation: str, rule: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply rule(scores (..., N or N, S), budgets (...)) over what shares a budget.

    score (Lm, B, Hm, C or C, S); budget (B,) per row; allocation: head, layer or global."""
    Lm, _, Hm, C = score.shape[:4]
    if allocation == "head":
        return rule(score, budget[:, None].expand(Lm, -1, Hm))
    if allocation == "layer":
        return rule(score.flatten(2, 3), budget.expand(Lm, -1)).unflatten(2, (Hm, C))
    flat = score.transpose(0, 1).flatten(1, 3)
    return rule(flat, budget).unflatten(1, (Lm, Hm, C)).transpose(0, 1)
