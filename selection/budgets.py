"""Budgets of a selection: what a share of bytes is in prices, who shares one budget, and what is
chosen for it, given the scores.

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

from config import PLANNED_SINKS, KVConfig, SelectConfig, count_kept
from selection.relevance import Prompt
from storage.integers.format import LEVEL_BITS, LEVEL_ERRORS, kept_tokens, row_bytes
from storage.layout import mask_dtype, tile_size, top_k_mask
from storage.levels import choose_levels
from storage.packing import select_joint, select_top_m
from storage.ragged import after_first


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
    Plan(0.03, 4, 0, 64),
    Plan(0.0, 3, 0, 64),
)


@cache
def planned(kv: KVConfig, kv_bytes: float) -> KVConfig:
    """Return storage as kv says, or where it leaves that to --kv_bytes as is best, as far as
    known."""
    if not kv_bytes or kv.ints:
        return kv
    plan = next(p for p in PLANS if kv_bytes >= p.from_bytes)
    block = kv.key_block or plan.key_block
    sinks = PLANNED_SINKS if kv.kv_sinks < 0 else kv.kv_sinks
    bits = dict(key_bits=plan.key_bits, value_bits=plan.value_bits)
    return replace(kv, kv="select", key_block=block, kv_sinks=sinks, **bits)


FEW = 4  # newest tokens that are advised to stay whole


def small_budget(kv: KVConfig, kv_bytes: float, length: int) -> str:
    """Say in a line where the tokens that stay whole of a prompt of `length` take more than half of
    kv_bytes, a share of its bytes; "" where they do not, and where kv_bytes is 0, no budget."""
    n = kv.kv_tail + planned(kv, kv_bytes).first_whole
    if not kv_bytes or 2 * n <= kv_bytes * length:
        return ""
    share = f"{n / length:.1%}" if n < length else "all"
    return (
        f"{n} tokens stay whole, {kv.kv_tail} newest and {n - kv.kv_tail} first ones; that is "
        f"{share} of a context of {length} tokens, where {100 * kv_bytes:g}% of the bytes are "
        "asked for"
    )


def fewer_whole(kv: KVConfig, kv_bytes: float, newest: str) -> str:
    """Return what to give so that fewer tokens stay whole under a budget: of the newest or of the
    first ones, whichever are more, or a larger budget where both are few. newest: the flag of the
    newest."""
    first = planned(kv, kv_bytes).first_whole
    if first > max(kv.kv_tail, PLANNED_SINKS):
        return f"--kv_sinks={PLANNED_SINKS}"
    return f"--{newest}={FEW}" if kv.kv_tail > FEW else "a larger share"


# What bits beyond a group's first count in a choice, of the squared error that they take off. A
# guess that a token is not read is wrong more often than a bit is too few (docs/log.md).
REFINED = 0.25


class Prices(NamedTuple):
    """What a kept token and its groups cost, in half bytes."""

    key: int  # a token that is kept
    step: tuple[int, ...]  # from each level of a group to the next
    gain: tuple[float, ...]  # of it: squared error off a group of variance 1, as it counts


@cache
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
    per_head = row_bytes(head_dim, kv.key_bits) + 4 * head_dim / kv.block + scale
    key = math.ceil(2 * (heads * per_head + per_mask))
    row = [2 * heads * row_bytes(head_dim // S, b) for b in bits]
    step = (b - a for a, b in pairwise(row))
    first, *later = level_gains(error)
    return Prices(key, tuple(step), (first, *(REFINED * gain for gain in later)))


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


# -------------------- spending


class Selection(NamedTuple):
    """What is kept of a context."""

    keep: Tensor  # (Lm, B, Hm, C) bool: tokens
    mask: Tensor  # (Lm, B, Hm, C, S) bool: groups; or their levels, uint8
    # (Lm, B, Hm, C) of each token; None: not asked for
    score: Tensor | None

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Return keep (B, Hm, C) and mask (B, Hm, C, S) of compressed layer i."""
        i = min(i, len(self.keep) - 1)  # shared: the only one
        return self.keep[i], self.mask[i]


def row_budgets(prompt: Prompt, f: Callable[[int], int]) -> Tensor:
    """Return f(number of context tokens) of every row, 0 for a row without context: (B,) int64."""
    device = prompt.k[0].device
    if prompt.pad is None:  # known without asking the device
        n = prompt.n_context
        return torch.full((len(prompt.k[0]),), f(n) if n else 0, device=device)
    n_tokens = prompt.valid.sum(1).tolist()
    return torch.tensor([f(n) if n else 0 for n in n_tokens], device=device)


def masks_sharing(score: Tensor, allocation: str) -> int:
    """Count the masks that share one budget of scores (Lm, B, Hm, ...)."""
    layers, _, heads = score.shape[:3]
    return {"head": 1, "layer": heads, "global": layers * heads}[allocation]


def within_budget(
    prompt: Prompt,
    score: Tensor,
    budget: Callable[[int], int],
    allocation: str,
    rule: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Apply rule(scores (..., N or N, S), budgets (...)) over what shares a budget.

    score (Lm, B, Hm, C or C, S); budget(n): of a row with n context tokens; allocation: head, layer
    or global."""
    Lm, _, Hm, C = score.shape[:4]
    of_row = row_budgets(prompt, budget)
    if allocation == "head":
        return rule(score, of_row[:, None].expand(Lm, -1, Hm))
    if allocation == "layer":
        return rule(score.flatten(2, 3), of_row.expand(Lm, -1)).unflatten(2, (Hm, C))
    flat = score.transpose(0, 1).flatten(1, 3)
    return rule(flat, of_row).unflatten(1, (Lm, Hm, C)).transpose(0, 1)


def spend_jointly(
    prompt: Prompt, cfg: SelectConfig, token: Tensor, pair: Tensor, key_worth: Tensor | None
) -> Selection:
    """Spend one budget on tokens and groups: a token pays for its key as for S groups.

    token (Lm, B, Hm, C), pair (Lm, B, Hm, C, S): scores; key_worth (Lm, B, Hm, C, 1): what each key
    is worth for what it tells of its value, None where keys are not asked"""
    S = pair.size(-1)
    masks = masks_sharing(pair, cfg.allocation)

    def budget(n: int) -> int:
        return count_kept(cfg.kv_keep, 2 * S * n * masks, 1)

    if key_worth is None:
        mask = within_budget(prompt, pair, budget, cfg.allocation, select_joint)
        return Selection(mask.any(-1), mask, token)
    cost = torch.ones(S, dtype=torch.int64, device=pair.device)
    taken = spend_with_keys(prompt, cfg.allocation, key_worth, pair, budget, cost, S)
    return Selection(taken.any(-1), taken[..., :-1], token)


def spend_with_keys(
    prompt: Prompt,
    allocation: str,
    key_worth: Tensor,
    worth: Tensor,
    budget: Callable[[int], int],
    cost: Tensor,
    key: int,
) -> Tensor:
    """Choose parts by select_joint where a key is worth what it tells of its value: a last part of
    each token that costs 1 of the key's price, and comes before all others.

    worth (Lm, B, Hm, C, parts), cost (parts,), key: see select_joint. Returns what is taken,
    (Lm, B, Hm, C, parts + 1) bool."""
    first = (worth / cost).amax(-1, keepdim=True)
    key_worth = key_worth.maximum(first * (1 + 1e-6)).where(first.isfinite(), first)
    worth = torch.cat((worth, key_worth), -1)
    cost = torch.cat((cost, cost.new_ones(1)))

    def best(score: Tensor, m: Tensor) -> Tensor:
        return select_joint(score, m, key=key - 1, cost=cost)

    return within_budget(prompt, worth, budget, allocation, best)


def spend_in_turn(
    prompt: Prompt, cfg: SelectConfig, token: Tensor, pair: Tensor, one_for_a_layer: bool
) -> Selection:
    """Spend token_keep on tokens, then value_keep on the survivors' groups.

    token (Lm, B, Hm, C), pair (Lm, B, Hm, C, S): scores; one_for_a_layer: whether token scores are
    the same for all heads of a layer"""
    S = pair.size(-1)
    masks = masks_sharing(pair, cfg.allocation)
    one_set = cfg.allocation == "layer" and one_for_a_layer
    alike = masks if one_set else 1  # masks that keep the same tokens

    def n_tokens(n: int) -> int:
        return count_kept(cfg.token_keep, n * masks // alike, 1)

    def n_pairs(n: int) -> int:
        return count_kept(cfg.value_keep, S * alike * n_tokens(n), 1)

    def best_pairs(score: Tensor, m: Tensor) -> Tensor:
        return select_top_m(score.flatten(-2), m).view(score.shape)

    for_tokens = "head" if one_set else cfg.allocation
    keep = within_budget(prompt, token, n_tokens, for_tokens, select_top_m)
    if cfg.fixed_k:
        mask = top_k_mask(pair, count_kept(cfg.value_keep, S)) & keep.unsqueeze(-1)
        return Selection(keep, mask, token)
    pair = pair.masked_fill(~keep.unsqueeze(-1), float("-inf"))
    mask = within_budget(prompt, pair, n_pairs, cfg.allocation, best_pairs)
    return Selection(keep, mask, token)


def spend_bytes(
    prompt: Prompt,
    cfg: SelectConfig,
    kv: KVConfig,
    pair: Tensor,
    key_worth: Tensor | None,
    scored: bool,
) -> Selection:
    """Spend one budget of bytes on tokens, groups and, where values have no bits of their own,
    levels 0 to 3. First tokens stay whole and are no part of it.

    kv: how the context is stored; pair, key_worth: see spend_jointly; scored: whether tokens'
    scores are asked for"""
    S = pair.size(-1)
    D = prompt.values.size(-1)
    heads = prompt.values.size(2) // pair.size(2)  # KV heads of a mask
    price = prices(kv, D, heads)
    there = after_first(prompt.valid, kv.first_whole)[None, :, None, :, None]
    energy = pair.square().masked_fill_(~there, float("-inf"))
    region = prompt.T - prompt.n_context
    masks = masks_sharing(pair, cfg.allocation)
    about = (region, kv.first_whole, D, heads, prompt.untold is not None)

    def budget(n: int) -> int:
        return half_bytes_for(cfg.kv_bytes, n, *about) * masks

    if key_worth is None:

        def best(energy: Tensor, m: Tensor) -> Tensor:
            return choose_levels(energy, m, price.gain, price.step, price.key)

        levels = within_budget(prompt, energy, budget, cfg.allocation, best)
        keep = kept_tokens(levels)
    else:
        worth = (energy.unsqueeze(-1) * energy.new_tensor(price.gain)).flatten(-2)
        cost = torch.tensor(price.step, device=energy.device).repeat(S)
        taken = spend_with_keys(prompt, cfg.allocation, key_worth, worth, budget, cost, price.key)
        keep = taken.any(-1)
        levels = taken[..., :-1].unflatten(-1, (S, -1)).sum(-1).to(torch.uint8)
    mask = levels > 0 if kv.value_bits else levels
    return Selection(keep, mask, torch.linalg.vector_norm(pair, dim=-1) if scored else None)
