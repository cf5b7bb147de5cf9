"""Attention over integers on a CPU: storage/cpu.py for bytes. format.py is the specification.

Codes are only turned into floats. Their steps and middles go into the queries and the weights: with
half = 2^(b-1),

    q . key_t     = sum_c (q_c step_c) code_tc + sum_c q_c (middle_c - half step_c)              (1)
    sum_t p_t z_t = sum_t (p_t step_t) code_t + sum_t p_t (middle_t - half step_t) kept_t        (2)

and of group g, whose codes mean (code - zero) times the steps of its level and of the token,

    sum_t p_t z_tg = gain_g sum_t (p_t step_t) unit_tg (code_tg - zero_tg)                       (3)

Letters: storage/cpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from storage.cpu import PackedSequence, expand_bits, gather, take_rows, work
from storage.integers.format import (
    LEVEL_PLANES,
    level_table,
    unpack_bits,
)
from storage.layout import PackedView, cdiv


def int_sequence(view: PackedView, b: int) -> IntSequence:
    """Return what sequence b has packed in integers."""
    return LevelSequence(view, b) if view.levelled else IntSequence(view, b)


def fields(packed: Tensor, bits: int) -> Iterator[tuple[Tensor, slice, int]]:
    """Take bytes (..., m) of n codes each apart: code[at] is the sum of `weight` times part.

    Yields part (..., numbers) uint8, at, weight."""
    if bits == 3:
        third = packed.size(-1) // 3
        yield from fields(packed[..., : 2 * third], 2)
        for part, at, weight in fields(packed[..., 2 * third :], 1):
            yield part, at, 4 * weight
        return
    m = packed.size(-1)
    for i in range(8 // bits):
        part = packed >> bits * i if i else packed
        if i < 8 // bits - 1:  # the last has no others above it
            part = part & (1 << bits) - 1
        yield part, slice(i * m, (i + 1) * m), 1


def code_offset(scale: Tensor, bits: int) -> Tensor:
    """Return middle - half step of scale (..., 2): (...)."""
    step, middle = scale.unbind(-1)
    return middle - 2 ** (bits - 1) * step


class IntSequence(PackedSequence):
    """What one sequence has packed in integers, all values of the same number of bits."""

    def __init__(self, view: PackedView, b: int):
        super().__init__(view, b)
        self.ints = view.ints
        self.fmt = view.ints.fmt
        # first blocks and blocks of each head
        self.block_base = view.ints.block_base[b].tolist()
        self.n_blocks = [cdiv(n, self.fmt.block) for n in self.counts]

    def put_logits(self, q: Tensor, out: Tensor) -> None:
        """See PackedSequence.put_logits; by (1)."""
        q = q.to(out.dtype)
        block = self.fmt.block
        for heads, blocks in work(len(q), max(self.n_blocks), q.size(-1) * block):
            tokens = slice(blocks.start * block, blocks.stop * block)
            logits = self.block_logits(q[heads], heads, blocks, tokens)
            for h, own in enumerate(logits, heads.start):
                at = slice(tokens.start, min(self.counts[h], tokens.stop))
                if at.stop > at.start:
                    out[h, :, at] = own[:, : at.stop - at.start]

    def block_logits(self, q: Tensor, heads: slice, blocks: slice, tokens: slice) -> Tensor:
        """Return q . key for q (G, M, D) and the tokens of some blocks: (G, M, width)."""
        bits = self.fmt.key_bits
        keys = self.gather(self.view.keys, self.token_base[heads], heads, tokens)
        keys = keys.unflatten(1, (-1, self.fmt.block))  # (G, blocks, block, bytes)
        base = self.block_base[heads]
        scale = gather(self.ints.key_scale, base, self.n_blocks[heads], blocks)
        scale = scale.to(q.dtype)  # (G, blocks, 2, D)
        q = q.unsqueeze(1)
        logits = q @ code_offset(scale.mT, bits).unsqueeze(-1)  # (G, blocks, M, 1)
        q = q * scale[:, :, :1]  # (G, blocks, M, D)
        for part, at, weight in fields(keys, bits):
            logits = logits + weight * (q[..., at] @ part.to(q.dtype).mT)
        return logits.transpose(1, 2).flatten(2)

    @property
    def numbers(self) -> int:
        """Numbers of a row."""
        return self.view.rows.size(-1) * 8 // self.fmt.value_bits

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """See PackedSequence.block_values; by (2)."""
        bits = self.fmt.value_bits
        placed, kept = self.place(heads, tokens, row)  # (G, width, S, bytes)
        scale = self.gather(self.ints.value_scale, self.token_base[heads], heads, tokens)
        scale = scale.to(p.dtype)
        offset = p * code_offset(scale, bits).unsqueeze(1)
        if kept is None:
            base = offset.sum(-1, keepdim=True).expand(-1, -1, self.S)
        else:
            base = offset @ kept.to(p.dtype)  # (G, M, S)
        total = base.unsqueeze(-1).repeat(1, 1, 1, self.numbers)  # (G, M, S, d)
        p = p * scale[..., 0].unsqueeze(1)
        for part, at, weight in fields(placed, bits):
            read = p @ part.flatten(2).to(p.dtype)
            total[..., at] += weight * read.unflatten(-1, (self.S, -1))
        return total.flatten(2)


@cache
def spread_table() -> Tensor:
    """Return, for every byte, its four codes of 2 bits as the bytes of one number: (256,) int32."""
    codes = unpack_bits(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 2)
    return codes.contiguous().view(torch.int32).flatten()


@cache
def level_values(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the steps of levels 0 to 3, and what their codes of 0 mean in them: (4,) twice."""
    unit, zero, _ = level_table(torch.arange(4), dtype)
    return unit.flatten(), (unit * zero).flatten()


class LevelSequence(IntSequence):
    """What one sequence has packed in integers, every group at its level."""

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """See PackedSequence.block_values; by (3)."""
        S = self.S
        bits = self.gather(self.view.bits, self.mask_base[heads], heads, tokens)
        low, high = expand_bits(bits, 2 * S).split(S, -1)
        level = torch.add(low, high, alpha=2)  # (G, width, S)
        planes = level + (level == 3)
        number = planes.flatten().cumsum(0, dtype=torch.int32).view_as(planes)
        rows = self.next_rows(number[:, -1, -1].tolist(), heads, row)
        unit, zero = level_values(p.dtype)
        scale = self.gather(self.ints.value_scale, self.token_base[heads], heads, tokens)
        p = p * scale.mT.to(p.dtype)  # (G, M, width)
        shift = p @ take(zero, level)  # (G, M, S)
        # groups before tokens, so that a group's weights meet its numbers
        before = (number - planes).mT.contiguous()  # (G, S, width)
        level = level.mT.contiguous()
        planes = planes.mT.contiguous()
        code = 0
        for i in range(max(LEVEL_PLANES)):
            plane = take_rows(rows, (before + i + 1) * (planes > i))  # (G, S, width, bytes)
            code = code | take(spread_table(), plane.flatten().int()) << 2 * i
        code = code.view(torch.uint8).view(*planes.shape, -1).to(p.dtype)  # (G, S, width, d)
        w = p.unsqueeze(1) * take(unit, level).unsqueeze(2)  # (G, S, M, width)
        total = w @ code - shift.mT.unsqueeze(-1)  # (G, S, M, d), codes of a byte side by side
        total = total.unflatten(-1, (-1, 4)).mT.flatten(-2)  # as format.pack_bits has them
        gain = self.fmt.gain[heads].unsqueeze(1).to(p.dtype)
        return total.transpose(1, 2).flatten(2) * gain


def take(table: Tensor, number: Tensor) -> Tensor:
    """Return table[number], number int32 of any shape: much faster than indexing."""
    return table.index_select(0, number.flatten()).view(number.shape)
