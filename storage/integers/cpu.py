"""Attention over integers on a CPU: storage/cpu.py for bytes. format.py is the specification.

Codes are only turned into floats, around zero, so that sums stay as exact as those of numbers.
Their steps and middles go into the queries and the weights: with c' = code - 2^(b-1),

    q . key_t     = sum_c (q_c step_c) c'_tc + sum_c q_c middle_c                                (1)
    sum_t p_t z_t = sum_t (p_t step_t) c'_t + sum_t p_t middle_t kept_t                          (2)

and of a group g, whose step is the token's times `unit`, its level's, and whose code of 0 may lie
between two codes, `rest` from 2^(b-1) in such units,

    sum_t p_t z_tg = gain_g sum_t (p_t step_t) (unit_tg c'_tg + rest_tg)                         (3)

Bytes hold c' in their highest bits, as a number with a sign: 2^(8-b) c'.

Letters: storage/cpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from storage.cpu import PackedSequence, expand_bits, gather, take_rows, work
from storage.integers.format import (
    LEVEL_BITS,
    LEVEL_PLANES,
    LEVEL_STEPS,
    pack_bits,
    unpack_bits,
    zero_code,
)
from storage.layout import PackedView, cdiv


def int_sequence(view: PackedView, b: int) -> IntSequence:
    """Return what sequence b has packed in integers."""
    return LevelSequence(view, b) if view.levelled else IntSequence(view, b)


@cache
def half_bytes(bits: int, size: int) -> Tensor:
    """Return `size` bytes of codes 2^(bits-1): (size,) uint8."""
    codes = torch.full((size * 8 // bits,), 1 << bits - 1, dtype=torch.uint8)
    return pack_bits(codes, bits)


def fields(packed: Tensor, bits: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """Take bytes (..., m) of n codes each apart.

    Yields 2^(8-bits) (code - 2^(bits-1)) (..., numbers), which the next one overwrites, and which
    of the n these are."""
    if bits == 3:
        codes = unpack_bits(packed, 3)
        yield ((codes << 5) ^ 128).view(torch.int8).to(dtype), slice(0, codes.size(-1))
        return
    m = packed.size(-1)
    floats = torch.empty(packed.shape, dtype=dtype)
    packed = packed ^ int(half_bytes(bits, 1))
    for i in range(8 // bits):
        above = 8 - bits * (i + 1)
        part = packed << above if above else packed
        if i:
            part = part & 256 - (1 << 8 - bits)  # others lie below it
        yield floats.copy_(part.view(torch.int8)), slice(i * m, (i + 1) * m)


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
        logits = q @ scale[:, :, 1].unsqueeze(-1)  # (G, blocks, M, 1)
        q = q / 2 ** (8 - bits) * scale[:, :, :1]  # (G, blocks, M, D)
        for part, at in fields(keys, bits, q.dtype):
            logits = logits + q[..., at] @ part.mT
        return logits.transpose(1, 2).flatten(2)

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """See PackedSequence.block_values; by (2)."""
        bits = self.fmt.value_bits
        placed, kept = self.place(heads, tokens, row)  # (G, width, S, bytes)
        scale = self.gather(self.ints.value_scale, self.token_base[heads], heads, tokens)
        step, middle = scale.mT.to(p.dtype).unsqueeze(2).unbind(1)  # (G, 1, width)
        if kept is None:
            middles = (p * middle).sum(-1, keepdim=True)
        else:
            middles = (p * middle) @ kept.to(p.dtype)  # (G, M, S)
        p = p * step
        read = [p @ part.flatten(2) for part, _ in fields(placed, bits, p.dtype)]
        total = torch.cat([x.unflatten(-1, (self.S, -1)) for x in read], -1)  # (G, M, S, d)
        return (total / 2 ** (8 - bits) + middles.unsqueeze(-1)).flatten(2)

    @property
    def none(self) -> Tensor:
        """The bytes of a row of zeros."""
        return half_bytes(self.fmt.value_bits, self.view.rows.size(-1))


@cache
def spread_table() -> Tensor:
    """Return, for every byte, its four codes of 2 bits as the bytes of one number: (256,) int32."""
    codes = unpack_bits(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 2)
    return codes.contiguous().view(torch.int32).flatten()


@cache
def level_values(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return unit and rest of levels 0 to 3, unit for codes in a byte's highest bits: (4,) each."""
    half = torch.tensor([0, *(2 ** (bits - 1) for bits in LEVEL_BITS[1:])])
    unit = torch.tensor(LEVEL_STEPS, dtype=dtype)
    zero = torch.tensor([0, *map(zero_code, (1, 2, 3))])
    return unit * 2.0 ** (torch.tensor(LEVEL_BITS) - 8), unit * (half - zero)


class LevelSequence(IntSequence):
    """What one sequence has packed in integers, every group at its level."""

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """See PackedSequence.block_values; by (3)."""
        S = self.S
        bits = self.gather(self.view.bits, self.mask_base[heads], heads, tokens)
        low, high = expand_bits(bits, 2 * S).split(S, -1)
        level = torch.add(low, high, alpha=2)  # (G, width, S)
        planes = level.addcmul(low, high)
        number = planes.flatten().cumsum(0, dtype=torch.int32).view_as(planes)
        rows = self.next_rows(number[:, -1, -1].tolist(), heads, row)
        spread = take(spread_table(), rows.int())  # a code in every byte of (planes, x) int32
        unit, rest = level_values(p.dtype)
        scale = self.gather(self.ints.value_scale, self.token_base[heads], heads, tokens)
        p = p * scale.mT.to(p.dtype)  # (G, M, width)
        rests = p @ take(rest, level)  # (G, M, S)
        # groups before tokens, so that a group's weights meet its numbers: (G, S, width)
        level = level.mT.contiguous()
        number = number.mT.contiguous()  # of a group's last plane
        planes = planes.mT.contiguous()
        code = 0x80808080 - (1 << 32)  # what turns codes into numbers with a sign
        for i in range(max(LEVEL_PLANES)):
            plane = take_rows(spread, (number - i) * (planes > i))  # (G, S, width, x)
            code = plane << 6 - 2 * i ^ code
        code = code.view(torch.int8).view(*planes.shape, -1).to(p.dtype)  # (G, S, width, d)
        w = p.unsqueeze(1) * take(unit, level).unsqueeze(2)  # (G, S, M, width)
        total = w @ code + rests.mT.unsqueeze(-1)  # (G, S, M, d), codes of a byte side by side
        total = total.unflatten(-1, (-1, 4)).mT.flatten(-2)  # as format.pack_bits has them
        gain = self.fmt.gain[heads].unsqueeze(1).to(p.dtype)
        return total.transpose(1, 2).flatten(2) * gain

    @property
    def none(self) -> Tensor:
        """The bytes of no plane."""
        return torch.zeros(self.view.rows.size(-1), dtype=torch.uint8)


def take(table: Tensor, number: Tensor) -> Tensor:
    """Return table[number], number int32 of any shape: much faster than indexing."""
    return table.index_select(0, number.flatten()).view(number.shape)
