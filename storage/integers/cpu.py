"""Attention over integers on a CPU: storage/cpu.py for bytes. format.py is the specification.

Codes are only turned into floats, around zero, so that sums stay as exact as those of numbers.
Their steps and middles go into the queries and the weights: with c' = code - 2^(b-1),

    q . key_t     = sum_c (q_c step_c) c'_tc + sum_c q_c middle_c                                (1)
    sum_t p_t z_t = sum_t (p_t step_t) c'_t + sum_t p_t middle_t kept_t                          (2)

and of a group g, whose step is the token's times `unit`, its level's, and where c' = code - zero,

    sum_t p_t z_tg = gain_g sum_t (p_t step_t) unit_tg c'_tg                                     (3)

Bytes hold c' in their highest bits, as a number with a sign: 2^(8-b) c'. A zero between two codes
of 2 bits is a bit below them.

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
            widths = [max(0, min(n, tokens.stop) - tokens.start) for n in self.counts[heads]]
            to = out[heads, :, tokens]
            if min(widths) == max(widths):  # in one copy
                to[..., : widths[0]] = logits[..., : widths[0]]
                continue
            for own, own_logits, width in zip(to, logits, widths, strict=True):
                own[:, :width] = own_logits[:, :width]

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
        return half_bytes(self.fmt.value_bits, self.view.rows.size(-1)).unsqueeze(0)


@cache
def spread_table() -> Tensor:
    """Return, for every byte, its four codes of 2 bits as the bytes of one number: (256,) int32."""
    codes = unpack_bits(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 2)
    return codes.contiguous().view(torch.int32).flatten()


@cache
def level_units(dtype: torch.dtype) -> Tensor:
    """Return the units of levels 0 to 3 for codes in a byte's highest bits: (4,)."""
    return torch.tensor(LEVEL_STEPS, dtype=dtype) * 2.0 ** (torch.tensor(LEVEL_BITS) - 8)


@cache
def level_bytes(d: int) -> tuple[Tensor, Tensor]:
    """Return, for levels 0 to 3, which bits of a byte hold the code, and what turns these bits into
    a number with a sign around the code that means 0: (4, d) uint8 each."""
    own = [0]
    turn = [0]
    for level in (1, 2, 3):
        bits = LEVEL_BITS[level]
        own.append(256 - 2 ** (8 - bits))
        rest = 2 ** (bits - 1) - zero_code(level)
        turn.append(128 + int(rest * 2 ** (8 - bits)))
    both = torch.tensor([own, turn], dtype=torch.uint8).unsqueeze(-1)
    return tuple(both.expand(-1, -1, d).contiguous())


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
        scale = self.gather(self.ints.value_scale, self.token_base[heads], heads, tokens)
        p = p * scale.mT.to(p.dtype)  # (G, M, width)
        # groups before tokens, so that a group's weights meet its numbers: (G, S, width)
        level = level.mT.contiguous()
        number = number.mT.contiguous()  # of a group's last plane
        joined = take_rows(join_planes(rows), number).view(torch.uint8)  # (G, S, width, d)
        own, turn = level_bytes(joined.size(-1))
        code = joined & take_rows(own, level) ^ take_rows(turn, level)
        code = code.view(torch.int8).to(p.dtype)
        w = p.unsqueeze(1) * take(level_units(p.dtype), level).unsqueeze(2)  # (G, S, M, width)
        total = w @ code  # (G, S, M, d), codes of a byte side by side
        total = total.unflatten(-1, (-1, 4)).mT.flatten(-2)  # as format.pack_bits has them
        gain = self.fmt.gain[heads].unsqueeze(1).to(p.dtype)
        return total.transpose(1, 2).flatten(2) * gain

    @property
    def none(self) -> Tensor:
        """The bytes of no plane, as many as join_planes takes together."""
        return torch.zeros(max(LEVEL_PLANES), self.view.rows.size(-1), dtype=torch.uint8)


def join_planes(rows: Tensor) -> Tensor:
    """Join every row of planes (n, x) uint8 with the three after it, whose bits are higher.

    Returns (n - 3, x) int32: a code of 8 bits in every byte."""
    one = take(spread_table(), rows.int())
    two = torch.add(one[:-1], one[1:], alpha=1 << 2)
    return torch.add(two[:-2], two[2:], alpha=1 << 4)


def take(table: Tensor, number: Tensor) -> Tensor:
    """Return table[number], number int32 of any shape: much faster than indexing."""
    return table.index_select(0, number.flatten()).view(number.shape)
