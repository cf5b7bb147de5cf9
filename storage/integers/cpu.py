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

from storage.cpu import PackedSequence, count_up, expand_bits, gather, take_rows, work
from storage.integers.format import (
    LEVEL_BITS,
    LEVEL_PLANES,
    LEVEL_STEPS,
    pack_bits,
    zero_code,
)
from storage.layout import PackedView, cdiv


def kind_of(view: PackedView) -> type[IntSequence]:
    """Return the class of what a sequence has packed in integers."""
    return LevelSequence if view.levelled else IntSequence


@cache
def half_bytes(bits: int, size: int) -> Tensor:
    """Return `size` bytes of codes 2^(bits-1): (1, size) uint8."""
    n_codes = size * 8 // bits
    middle = 2 ** (bits - 1)
    codes = torch.full((1, n_codes), middle, dtype=torch.uint8)
    return pack_bits(codes, bits)


def fields(packed: Tensor, bits: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """Take bytes (..., m) of n codes each apart.

    Yields 2^(8-bits) (code - 2^(bits-1)) (..., numbers), which the next one overwrites, and which
    of the n these are."""
    if bits == 3:
        yield from fields_of_planes(packed, dtype)
        return
    m = packed.size(-1)
    floats = torch.empty(packed.shape, dtype=dtype)
    lowest = 255 // (2**bits - 1)  # the lowest bit of each code
    highest = lowest << bits - 1
    packed = packed ^ highest  # what is below the middle gets a sign
    own = 256 - 2 ** (8 - bits)
    for i in range(8 // bits):
        above = 8 - bits * (i + 1)
        part = packed << above if above else packed
        if i:
            part.bitwise_and_(own)  # others lie below it
        at = slice(i * m, (i + 1) * m)
        yield floats.copy_(part.view(torch.int8)), at


def fields_of_planes(packed: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """Do what `fields` does for codes of 3 bits, whose bytes (..., 3 m) are 2 m of their lower two
    bits and m of the third."""
    m = packed.size(-1) // 3
    lower, third = packed.split((2 * m, m), -1)
    third = ~torch.cat((third, third >> 1), -1)  # field f: bit 2 f; what has none is below 0
    # a code in each half byte: fields 0 and 2, fields 1 and 3
    even = (third << 2).bitwise_and_(0x44)
    even.bitwise_or_(lower & 0x33)
    odd = (lower >> 2).bitwise_and_(0x33)
    odd.bitwise_or_(third.bitwise_and_(0x44))
    floats = torch.empty(lower.shape, dtype=dtype)
    start = 0
    for pair, above in ((even, 5), (odd, 5), (even, 1), (odd, 1)):
        part = pair << above
        if above == 1:
            part.bitwise_and_(0xE0)
        at = slice(start, start + 2 * m)
        start = at.stop
        yield floats.copy_(part.view(torch.int8)), at


class IntSequence(PackedSequence):
    """What one sequence has packed in integers, all values of the same number of bits."""

    def __init__(self, view: PackedView, *segments: list[int]):
        """segments: PackedSequence's, and the first block of each head's keys."""
        super().__init__(view, *segments[:-1])
        self.block_base = segments[-1]
        self.ints = view.ints
        self.fmt = view.ints.fmt
        self.n_blocks = [cdiv(n, self.fmt.block) for n in self.counts]

    def logits(self, q: Tensor) -> Tensor:
        """See PackedSequence.logits; by (1)."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        q = q.to(dtype)
        groups = {}  # by their first head: what its blocks of work give, oldest first
        numbers = q.size(-1) * self.fmt.block
        for heads, blocks in work(len(q), max(self.n_blocks), numbers):
            part = self.block_logits(q[heads], heads, blocks)
            groups.setdefault(heads.start, []).append(part)
        of_heads = [torch.cat(parts, -1) for parts in groups.values()]
        out = torch.cat(of_heads)
        out = out[..., : self.longest]
        for h, n in enumerate(self.counts):
            if n < self.longest:
                out[h, :, n:] = float("-inf")
        return out

    def block_logits(self, q: Tensor, heads: slice, blocks: slice) -> Tensor:
        """Return q . key for q (G, M, D) and the tokens of some blocks: (G, M, width)."""
        bits = self.fmt.key_bits
        keys, scale = self.key_blocks(heads, blocks)
        step, middle = scale.to(q.dtype).unbind(2)  # (G, blocks, D)
        middles = torch.bmm(middle, q.mT)  # (G, blocks, M)
        middles = middles.view(len(keys), -1, 1)
        logits = middles.expand(-1, -1, keys.size(1)).contiguous()  # (., M, block)
        scaled = q.unsqueeze(1) * step.unsqueeze(2)
        scaled = scaled.flatten(0, 1)  # (., M, D)
        unit = 2.0 ** (bits - 8)
        for part, at in fields(keys, bits, q.dtype):
            logits.baddbmm_(scaled[..., at], part.mT, alpha=unit)
        by_head = logits.unflatten(0, (len(q), -1))
        return by_head.transpose(1, 2).flatten(2)

    def key_blocks(self, heads: slice, blocks: slice) -> tuple[Tensor, Tensor]:
        """Return the bytes of some blocks of keys, those of one head after another's,
        (G * blocks, block, bytes), and their steps and middles (G, blocks, 2, D)."""
        block = self.fmt.block
        tokens = slice(blocks.start * block, blocks.stop * block)
        keys = self.of_tokens(self.view.keys, heads, tokens)
        first = self.block_base[heads]
        scale = gather(self.ints.key_scale, first, self.n_blocks[heads], blocks)
        return keys.reshape(-1, block, keys.size(-1)), scale

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """See PackedSequence.block_values; by (2)."""
        bits = self.fmt.value_bits
        placed, kept = self.place(heads, tokens, row)  # (G, width, S, bytes)
        scale = self.of_tokens(self.ints.value_scale, heads, tokens)
        scale = scale.mT.contiguous().to(p.dtype)  # (G, 2, width)
        weights = p.unsqueeze(1) * scale.unsqueeze(2)
        stepped, middles = weights.unbind(1)  # (G, M, width)
        if kept is None:
            middles = middles.sum(-1, keepdim=True)
        else:
            middles = torch.bmm(middles, kept.to(p.dtype))  # (G, M, S)
        codes = fields(placed, bits, p.dtype)
        parts = [torch.bmm(stepped, part.flatten(2)) for part, _ in codes]
        total = torch.stack(parts, -2)  # (G, M, fields, S bytes)
        total = total.unflatten(-1, (self.S, -1))
        total = total.transpose(-2, -3)
        middles = middles.view(*middles.shape, 1, 1)
        unit = 2.0 ** (bits - 8)
        return torch.add(middles, total, alpha=unit).flatten(2)

    @property
    def none(self) -> Tensor:
        """The bytes of a row of zeros."""
        return half_bytes(self.fmt.value_bits, self.view.rows.size(-1))


@cache
def level_units(dtype: torch.dtype) -> Tensor:
    """Return the units of levels 0 to 3 for codes in a byte's highest bits: (4, 1)."""
    steps = torch.tensor(LEVEL_STEPS, dtype=dtype)
    bits = torch.tensor(LEVEL_BITS)
    units = steps * 2.0 ** (bits - 8)
    return units.unsqueeze(-1)


@cache
def level_bytes(d: int) -> tuple[Tensor, Tensor]:
    """Return, for levels 0 to 3, which bits of a byte hold the code, and what turns these bits into
    a number with a sign around the code that means 0: (4, d) uint8 each."""
    own = [0]
    turn = [0]
    for level in (1, 2, 3):
        bits = LEVEL_BITS[level]
        lowest = 2 ** (8 - bits)  # of the bits that hold the code
        middle = 2 ** (bits - 1)
        rest = middle - zero_code(level)
        own.append(256 - lowest)
        turn.append(128 + int(rest * lowest))
    both = torch.tensor([own, turn], dtype=torch.uint8)
    both = both.unsqueeze(-1).expand(-1, -1, d)
    return tuple(both.contiguous())


class LevelSequence(IntSequence):
    """What one sequence has packed in integers, every group at its level."""

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """See PackedSequence.block_values; by (3)."""
        level, number = self.levels(heads, tokens)
        planes = self.next_rows(number, heads, row)
        unit = take_rows(level_units(p.dtype), level)  # (G, width, S, 1)
        numbers = signed_codes(planes, number, level) * unit
        scale = self.of_tokens(self.ints.value_scale, heads, tokens)
        p = p * scale.mT  # (G, M, width)
        total = torch.bmm(p, numbers.flatten(2))  # codes of a byte side by side
        total = total.view(*p.shape[:2], self.S, -1, 4)
        total = total.mT.flatten(2)  # as format.pack_bits has them
        gain = self.fmt.gain[heads].unsqueeze(1)
        return total * gain.to(p.dtype)

    def levels(self, heads: slice, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return of one block each group's level, and the number of its last plane, counted from
        the block's first: (G, width, S) int32 each."""
        halves = expand_bits(self.masks(heads, tokens), 2 * self.S)
        halves = halves.unflatten(-1, (2, -1))
        low, high = halves.permute(2, 0, 1, 3).contiguous()
        level = torch.add(low, high, alpha=2)
        n_planes = level.addcmul(low, high)  # level 3 has four
        return level.int(), count_up(n_planes)

    @property
    def none(self) -> Tensor:
        """The bytes of no plane, as many as join_planes takes together."""
        n_planes = max(LEVEL_PLANES)
        return self.view.rows.new_zeros(n_planes, self.view.rows.size(-1))


def signed_codes(planes: Tensor, number: Tensor, level: Tensor) -> Tensor:
    """Return codes in the highest bits of bytes, around the one that means 0: int8 (..., d).

    planes  (n, x) uint8, first of all LevelSequence.none
    number  (...) int32, of a group's last plane
    level   (...) int32"""
    joined = join_planes(planes)
    code = take_rows(joined, number).view(torch.uint8)
    own, turn = level_bytes(code.size(-1))
    code.bitwise_and_(take_rows(own, level))  # in place: memory at hand is written faster
    code.bitwise_xor_(take_rows(turn, level))
    return code.view(torch.int8)


def join_planes(rows: Tensor) -> Tensor:
    """Join every row of planes (n, x) uint8 with the three after it, whose bits are higher.

    Returns (n - 3, x) int32: a code of 8 bits in every byte."""
    one = spread_codes(rows)
    two = torch.add(one[:-1], one[1:], alpha=4)
    return torch.add(two[:-2], two[2:], alpha=16)


def spread_codes(rows: Tensor) -> Tensor:
    """Give each of the four codes of 2 bits in bytes (n, x) uint8 a byte of its own: (n, x) int32,
    the lowest code in the lowest byte."""
    word = rows.int()
    word = torch.add(word, word, alpha=1 << 12)
    word.bitwise_and_(0x000F000F)  # two codes, two codes
    word = torch.add(word, word, alpha=1 << 6)
    return word.bitwise_and_(0x03030303)
