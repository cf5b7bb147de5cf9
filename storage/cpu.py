"""Attention on a CPU: what layout.packed_attention_ref says, computed from what is stored.

The reference makes everything dense, which costs far more than attention itself. Here nothing is
unpacked that need not be:

* Whole keys, and whole tokens of the window, are read where they lie.
* Kept rows are brought into place, CHUNK numbers at a time. In storage they follow each other token
  by token and group by group, so the running count of the masks' bits is the number of each row. A
  dropped group takes row 0, which is put before them and holds zeros.
* Integers are not dequantised: storage/integers/cpu.py.

A call of PyTorch costs as much as a thousand numbers, so heads are taken together where they are
short: a *block of work* is G heads times the same `width` tokens of each, zeros where a head has
fewer.

Letters: storage/layout.py; M queries read one head: those of the n heads that share it, T of each.
x numbers or bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.layout import PackedView, WindowView, soft_cap

CHUNK = 1 << 19  # numbers that are unpacked at a time: 2 MiB of float32
# one number with as many bytes as a row has: it is moved much faster than several
AS_ONE = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def packed_attention_cpu(
    q: Tensor, packed: PackedView | None, window: WindowView | None, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute packed_attention_ref of tensors on a CPU, without a gradient.

    Slots that hold no token are not read, whatever lies in them."""
    B, H, T, D = q.shape
    of_heads = packed.token_base if packed else window.k
    Hkv = of_heads.size(1)
    M = H // Hkv * T
    out = q.new_empty(B, Hkv, M, D)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(B, Hkv, M, dtype=dtype)
    # a sixth faster where there is little to read; numbers are as wide as they were chosen
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        scaled = q * D**-0.5
        scaled = scaled.reshape(out.shape)
        older = packed_sequences(packed) if packed else B * [None]
        newest = whole_tokens(window) if window else B * [()]
        sequences = zip(scaled, older, newest, strict=True)
        for b, sequence in enumerate(sequences):
            own_out, own_lse = read_sequence(*sequence, T, cap)
            out[b] = own_out
            lse[b] = own_lse
    out = out.view(B, H, T, D)
    lse = lse.view(B, H, T)
    return out, lse


def whole_tokens(window: WindowView) -> list[list[tuple[Tensor, Tensor]]]:
    """Return, for every sequence, keys and values (Hkv, ., D) of the window where they lie, oldest
    first, by the slices of filled_slots."""
    found = []
    filled = filled_slots(window)
    for k, v, slots in zip(window.k, window.v, filled, strict=True):
        own = [(k[:, at], v[:, at]) for at in slots]
        found.append(own)
    return found


def filled_slots(window: WindowView) -> list[list[slice]]:
    """Return, for every sequence, the slots that hold tokens, oldest first: one slice, or two where
    they reach around the ring's end; none where it is empty."""
    W = window.k.size(2)
    counts = window.count.tolist()
    firsts = [0] * len(counts)
    if window.first is not None:
        firsts = window.first.tolist()
    slots = []
    for count, slot in zip(counts, firsts, strict=True):
        first = slot % max(W, 1)
        end = first + count
        around = max(0, end - W)
        before = slice(first, end - around)
        behind = slice(0, around)
        filled = [at for at in (before, behind) if at.stop > at.start]
        slots.append(filled)
    return slots


def read_sequence(
    q: Tensor,
    older: PackedSequence | None,
    whole: list[tuple[Tensor, Tensor]],
    T: int,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Let the queries q (Hkv, M, D) read all packed tokens of a sequence, and whole keys and values
    (Hkv, ., D), oldest first, up to their own token.

    Returns out (Hkv, M, D) in at least float32 and lse (Hkv, M)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    parts = [torch.bmm(q, k.mT) for k, _ in whole]
    if older and older.longest:
        parts.append(older.logits(q))
    if not parts:
        nothing = torch.zeros_like(q, dtype=dtype)
        return nothing, nothing.new_full(q.shape[:2], float("-inf"))
    widths = [part.size(-1) for part in parts]
    logits = torch.cat(parts, -1).to(dtype)
    n_whole = sum(widths[: len(whole)])
    if cap:
        none = logits.isneginf()  # what holds no token
        logits = soft_cap(logits, cap).masked_fill_(none, float("-inf"))
    if T > 1:
        hide_later(logits, T, n_whole)
    p = logits.softmax(-1)
    top = logits.amax(-1)
    lse = top - p.amax(-1).log()  # of the largest, p is 1 / sum of exp(logit - top)
    if n_whole < T:  # else every query reads its own token at least
        nothing = top.isneginf()
        p.masked_fill_(nothing.unsqueeze(-1), 0)
        lse.masked_fill_(nothing, float("-inf"))
    weights = p.split(widths, -1)
    read = []
    for (_, v), weight in zip(whole, weights, strict=False):
        read.append(torch.bmm(weight.to(v.dtype), v))
    if older and older.longest:
        read.append(older.values(weights[-1]))
    return sum(read[1:], read[0]), lse


def hide_later(logits: Tensor, T: int, n_whole: int) -> None:
    """Put -inf where a query would read a later token: logits (Hkv, M, tokens), M the newest T
    tokens' of some heads; the first n_whole tokens end with these T."""
    column = torch.arange(n_whole)
    own = n_whole - T + torch.arange(T)
    later = column > own.unsqueeze(-1)
    by_token = logits.unflatten(1, (-1, T))
    of_whole = by_token[..., :n_whole]
    of_whole.masked_fill_(later, float("-inf"))


# -------------------- packed tokens


def packed_sequences(view: PackedView) -> list[PackedSequence]:
    """Return what each sequence has packed."""
    kind = PackedSequence
    segments = [view.n, view.token_base, view.row_base, view.mask_base]
    if view.ints:
        from storage.integers.cpu import kind_of  # loaded where there are integers only

        kind = kind_of(view)
        segments.append(view.ints.block_base)
    numbers = [of.expand_as(view.token_base).tolist() for of in segments]
    of_sequences = zip(*numbers, strict=True)
    return [kind(view, *own) for own in of_sequences]


class PackedSequence:
    """What one sequence has packed, in all heads."""

    def __init__(
        self,
        view: PackedView,
        counts: list[int],
        token_base: list[int],
        row_base: list[int],
        mask_base: list[int],
    ):
        """counts: tokens of each head; the others are the view's fields, of each head."""
        self.view = view
        self.counts = counts
        self.token_base = token_base
        self.row_base = row_base
        self.mask_base = mask_base
        self.longest = max(counts, default=0)
        self.S = view.n_groups
        self.all_kept = view.k == view.n_groups

    def logits(self, q: Tensor) -> Tensor:
        """Return q . key for q (Hkv, M, D): (Hkv, M, longest), -inf past a head's tokens."""
        keys = self.view.keys
        tokens = slice(0, self.longest)
        if is_even(self.token_base, self.counts, tokens):
            keys = gather(keys, self.token_base, self.counts, tokens)
            return torch.bmm(q, keys.mT)
        size = (*q.shape[:2], self.longest)
        out = q.new_full(size, float("-inf"))
        of_heads = zip(out, q, self.token_base, self.counts, strict=True)
        for own, own_q, first, n in of_heads:
            own_keys = keys[first : first + n]
            own[:, :n] = own_q @ own_keys.T
        return out

    def values(self, p: Tensor) -> Tensor:
        """Return the sum of values by weights p (Hkv, M, longest): (Hkv, M, D)."""
        ints = self.view.ints
        of_channels = ints.key_scale if ints else self.view.keys
        D = of_channels.size(-1)
        row = list(self.row_base)  # the next one of each head
        blocks = list(work(len(row), self.longest, D))
        if len(blocks) == 1:
            return self.block_values(p, *blocks[0], row)
        out = p.new_zeros(*p.shape[:2], D)
        for heads, tokens in blocks:
            weights = p[heads, :, tokens]
            values = self.block_values(weights, heads, tokens, row)
            out[heads].add_(values)
        return out

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """Return the sum of one block's values by weights p (G, M, width): (G, M, D). Its rows
        begin at `row`, which moves past them."""
        placed, _ = self.place(heads, tokens, row)
        weights = p.to(placed.dtype)
        return weights @ placed.flatten(2)

    def place(self, heads: slice, tokens: slice, row: list[int]) -> tuple[Tensor, Tensor | None]:
        """Bring the rows of one block into place.

        Returns (G, width, S, x), zeros where a group was dropped, and (G, width, S) uint8, ones
        where it was kept; None where all are."""
        if self.all_kept:
            counts = [n * self.S for n in self.counts[heads]]
            at = slice(tokens.start * self.S, tokens.stop * self.S)
            rows = gather(self.view.rows, self.row_base[heads], counts, at)
            rows = rows.unflatten(1, (-1, self.S))
            return rows, None
        masks = self.masks(heads, tokens)
        kept = expand_bits(masks, self.S)
        number = count_up(kept)
        rows = self.next_rows(number, heads, row)
        placed = take_rows(rows, number * kept)
        return placed, kept

    def next_rows(self, number: Tensor, heads: slice, row: list[int]) -> Tensor:
        """Return `none` and the next rows of the heads, one head's after the other's: as many as
        number (G, width, S) counts. `row` moves past them."""
        parts = [self.none]
        before = 0
        lasts = number[:, -1, -1].tolist()
        for h, last in enumerate(lasts, heads.start):
            start = row[h]
            stop = start + last - before
            parts.append(self.view.rows[start:stop])
            row[h] = stop
            before = last
        return torch.cat(parts)

    @property
    def none(self) -> Tensor:
        """A row of zeros: (1, x)."""
        rows = self.view.rows
        return rows.new_zeros(1, rows.size(-1))

    def of_tokens(self, flat: Tensor, heads: slice, tokens: slice) -> Tensor:
        """Return what a flat tensor (tokens, ...) has of one block: (G, width, ...), zeros past a
        head's tokens."""
        base = self.token_base[heads]
        return gather(flat, base, self.counts[heads], tokens)

    def masks(self, heads: slice, tokens: slice) -> Tensor:
        """Return the masks of one block, (G, width), 0 past a head's tokens."""
        base = self.mask_base[heads]
        return gather(self.view.bits, base, self.counts[heads], tokens)


def gather(flat: Tensor, base: list[int], counts: list[int], at: slice) -> Tensor:
    """Gather the entries `at` of segments that begin at base (G,) of a flat tensor (slots, ...) and
    have counts (G,) of them: (G, width, ...), zeros past a segment's end."""
    width = at.stop - at.start
    size = (len(base), width, *flat.shape[1:])
    if is_even(base, counts, at):  # a view
        slot = flat.stride(0)
        stride = (distance(base) * slot, *flat.stride())
        first = (base[0] + at.start) * slot
        first += flat.storage_offset()
        return flat.as_strided(size, stride, first)
    out = flat.new_zeros(size)
    for own, first, n in zip(out, base, counts, strict=True):
        n_there = min(n, at.stop) - at.start
        if n_there > 0:
            begin = first + at.start
            end = begin + n_there
            own[:n_there] = flat[begin:end]
    return out


def is_even(base: list[int], counts: list[int], at: slice) -> bool:
    """Say whether segments lie evenly apart, the later ones behind, and all have entries up to
    at.stop."""
    apart = distance(base)
    if apart < 0 or min(counts) < at.stop:
        return False
    return all(base[h] == base[0] + h * apart for h in range(len(base)))


def distance(base: list[int]) -> int:
    """Return how far the second segment begins behind the first; 0 where there is one alone."""
    if len(base) < 2:
        return 0
    return base[1] - base[0]


def work(n_heads: int, n_tokens: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Cut n_heads times n_tokens, of so many numbers each, into blocks of about CHUNK numbers.

    Yields heads, tokens."""
    width = max(1, CHUNK // numbers)
    width = min(n_tokens, width)
    G = CHUNK // (numbers * width)
    G = max(1, G)
    for h in range(0, n_heads, G):
        end = min(h + G, n_heads)
        heads = slice(h, end)
        for a in range(0, n_tokens, width):
            end = min(a + width, n_tokens)
            tokens = slice(a, end)
            yield heads, tokens


def count_up(x: Tensor) -> Tensor:
    """Sum x (G, width, S) up, from its first number to its last: int32."""
    flat = x.flatten()
    return flat.cumsum(0, dtype=torch.int32).view(x.shape)


@cache
def bit_table(width: int) -> Tensor:
    """Return the lowest `width` bits of every byte: (256, width) uint8."""
    byte = torch.arange(256, dtype=torch.uint8)
    bit = torch.arange(width, dtype=torch.uint8)
    return byte.unsqueeze(-1) >> bit & 1


def expand_bits(bits: Tensor, n_bits: int) -> Tensor:
    """Turn masks (...) into ones and zeros (..., n_bits) uint8, byte by byte, lowest byte first."""
    byte = bits.contiguous().view(torch.uint8).int()
    table = bit_table(min(n_bits, 8))
    expanded = take_rows(table, byte)
    return expanded.view(*bits.shape, n_bits)


def take_rows(rows: Tensor, number: Tensor) -> Tensor:
    """Return rows[number]: rows (n, x), number (...) int32, result (..., x).

    A row is moved as one number of as many bytes; one of 3, 5, 6, 7, ... bytes gets zeros behind
    it until there is such a number."""
    x = rows.size(-1)
    size = x * rows.element_size()
    longer = [n for n in AS_ONE if n > size]
    if longer and size not in AS_ONE:
        size = longer[0]
        missing = size // rows.element_size() - x
        rows = F.pad(rows, (0, missing))
    whole = rows
    if size in AS_ONE:
        whole = rows.view(AS_ONE[size]).flatten()
    taken = whole.index_select(0, number.flatten())
    taken = taken.view(rows.dtype)
    taken = taken.view(*number.shape, -1)
    return taken[..., :x]
