"""Attention on a CPU: what layout.packed_attention_ref says, computed from what is stored.

The reference makes everything dense, which costs far more than attention itself. Here nothing is
unpacked that need not be:

* Whole keys, and whole tokens of the window, are read where they lie.
* Kept rows are brought into place, CHUNK numbers at a time. In storage they follow each other token
  by token and group by group, so the running count of the masks' bits is the number of each row. A
  dropped group takes row 0, which is put before them and holds zeros.
* Integers are not turned back into what they stand for: storage/integers/cpu.py.

A call of PyTorch costs as much as a thousand numbers, so heads are taken together where they are
short: a *block of work* is G heads times the same `width` tokens of each, zeros where a head has
fewer.

Letters: storage/layout.py; M queries read one head: those of the n heads that share it, T of each.
x numbers or bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from storage.layout import PackedView, WindowView, soft_cap

CHUNK = 1 << 19  # numbers that are unpacked at a time: 2 MiB of float32
# one number with as many bytes as a row has: it is moved much faster than several
AS_ONE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def packed_attention_cpu(
    q: Tensor, packed: PackedView | None, window: WindowView | None, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute packed_attention_ref of tensors on a CPU, without a gradient.

    Slots that hold no token are not read, whatever lies in them."""
    B, H, T, D = q.shape
    Hkv = (packed.token_base if packed else window.k).size(1)
    scaled = (q * D**-0.5).reshape(B, Hkv, -1, D)
    out = torch.zeros_like(scaled)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.zeros_like(scaled[..., 0], dtype=wide)
    for b in range(B):
        newest = filled_slots(window, b) if window else []
        whole = [(window.k[b, :, at], window.v[b, :, at]) for at in newest]
        older = packed_sequence(packed, b) if packed else None
        out[b], lse[b] = read_sequence(scaled[b], older, whole, T, cap)
    return out.view(B, H, T, D), lse.view(B, H, T)


def filled_slots(window: WindowView, b: int) -> list[slice]:
    """Return the slots that hold tokens of sequence b, oldest first: one slice, or two where they
    reach around the ring's end; none where it is empty."""
    W = window.k.size(2)
    count = int(window.count[b])
    first = 0 if window.first is None else int(window.first[b]) % max(W, 1)
    around = max(0, first + count - W)
    both = (slice(first, first + count - around), slice(0, around))
    return [at for at in both if at.stop > at.start]


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
    edges = [0, *accumulate(k.size(1) for k, _ in whole)]
    n_whole = edges[-1]  # these come first: they are as many in every head
    longest = older.longest if older else 0
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = torch.full((*q.shape[:2], n_whole + longest), float("-inf"), dtype=dtype)
    for (k, _), (a, b) in zip(whole, pairwise(edges), strict=True):
        logits[..., a:b] = q @ k.mT
    if longest:
        older.put_logits(q, logits[..., n_whole:])
    if cap:
        none = logits.isneginf()  # what holds no token
        logits = soft_cap(logits, cap).masked_fill_(none, float("-inf"))
    if T > 1:
        later = torch.arange(n_whole) > n_whole - T + torch.arange(T).unsqueeze(-1)
        by_token = logits.unflatten(1, (-1, T))[..., :n_whole]
        by_token.masked_fill_(later, float("-inf"))
    if not logits.size(-1):
        return torch.zeros_like(q, dtype=dtype), logits.sum(-1) + float("-inf")
    top = logits.amax(-1, keepdim=True)
    top.clamp_min_(torch.finfo(dtype).min)  # -inf where there is nothing to read
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = torch.zeros_like(q, dtype=dtype)
    for (_, v), (a, b) in zip(whole, pairwise(edges), strict=True):
        out += p[..., a:b].to(v.dtype) @ v
    if longest:
        older.add_values(p[..., n_whole:], out)
    out /= total.clamp_min(torch.finfo(dtype).tiny)
    return out, (top + total.log()).squeeze(-1)


# -------------------- packed tokens


def packed_sequence(view: PackedView, b: int) -> PackedSequence:
    """Return what sequence b has packed."""
    if view.ints is None:
        return PackedSequence(view, b)
    from storage.integers.cpu import int_sequence  # loaded where there are integers only

    return int_sequence(view, b)


class PackedSequence:
    """What one sequence has packed, in all heads."""

    def __init__(self, view: PackedView, b: int):
        Hkv = view.token_base.size(1)
        self.view = view
        self.counts = view.n[b].expand(Hkv).tolist()  # tokens of each head
        self.token_base = view.token_base[b].tolist()
        self.row_base = view.row_base[b].tolist()
        self.mask_base = view.mask_base[b].expand(Hkv).tolist()
        self.longest = max(self.counts, default=0)
        self.S = view.n_groups
        self.all_kept = view.k == view.n_groups

    def put_logits(self, q: Tensor, out: Tensor) -> None:
        """Write q . key for q (Hkv, M, D) into out (Hkv, M, longest), which holds -inf."""
        for h, n in enumerate(self.counts):
            first = self.token_base[h]
            out[h, :, :n] = q[h] @ self.view.keys[first : first + n].T

    def add_values(self, p: Tensor, out: Tensor) -> None:
        """Add the sum of values by weights p (Hkv, M, longest) to out (Hkv, M, D)."""
        row = list(self.row_base)  # the next one of each head
        for heads, tokens in work(len(row), self.longest, out.size(-1)):
            out[heads] += self.block_values(p[heads, :, tokens], heads, tokens, row)

    def block_values(self, p: Tensor, heads: slice, tokens: slice, row: list[int]) -> Tensor:
        """Return the sum of one block's values by weights p (G, M, width): (G, M, D). Its rows
        begin at `row`, which moves past them."""
        placed, _ = self.place(heads, tokens, row)
        return p.to(placed.dtype) @ placed.flatten(2)

    def place(self, heads: slice, tokens: slice, row: list[int]) -> tuple[Tensor, Tensor | None]:
        """Bring the rows of one block into place.

        Returns (G, width, S, x), zeros where a group was dropped, and (G, width, S) int32, ones
        where it was kept; None where all are."""
        if self.all_kept:
            counts = [n * self.S for n in self.counts[heads]]
            at = slice(tokens.start * self.S, tokens.stop * self.S)
            rows = gather(self.view.rows, self.row_base[heads], counts, at)
            return rows.unflatten(1, (-1, self.S)), None
        bits = self.gather(self.view.bits, self.mask_base[heads], heads, tokens)
        kept = expand_bits(bits, self.S)
        number = kept.flatten().cumsum(0, dtype=torch.int32).view_as(kept)
        rows = self.next_rows(number[:, -1, -1].tolist(), heads, row)
        return take_rows(rows, number * kept), kept

    def next_rows(self, ends: list[int], heads: slice, row: list[int]) -> Tensor:
        """Return `none` and the next rows of the heads, one head's after the other's: as many as
        ends (G,) count up to. `row` moves past them."""
        rows = self.view.rows
        parts = [self.none]
        for h, (a, b) in enumerate(pairwise([0, *ends]), heads.start):
            parts.append(rows[row[h] : row[h] + b - a])
            row[h] += b - a
        return torch.cat(parts)

    @property
    def none(self) -> Tensor:
        """A row of zeros: (1, x)."""
        return self.view.rows.new_zeros(1, self.view.rows.size(-1))

    def gather(self, flat: Tensor, base: list[int], heads: slice, tokens: slice) -> Tensor:
        """Return what a flat tensor (slots, ...) has of one block: (G, width, ...), zeros past a
        head's tokens. base: where the tokens of each of its heads begin."""
        return gather(flat, base, self.counts[heads], tokens)


def gather(flat: Tensor, base: list[int], counts: list[int], at: slice) -> Tensor:
    """Gather the entries `at` of segments that begin at base (G,) of a flat tensor (slots, ...) and
    have counts (G,) of them: (G, width, ...), zeros past a segment's end."""
    width = at.stop - at.start
    stops = [min(n, at.stop) for n in counts]
    apart = base[1] - base[0] if len(base) > 1 else 0
    even = all(b - a == apart for a, b in pairwise(base))
    if even and apart >= 0 and min(stops) == at.stop:  # a view
        size = (len(base), width, *flat.shape[1:])
        stride = (apart * flat.stride(0), *flat.stride())
        first = flat[base[0] + at.start :]
        return first.as_strided(size, stride)
    out = flat.new_zeros(len(base), width, *flat.shape[1:])
    for own, first, stop in zip(out, base, stops, strict=True):
        if stop > at.start:
            own[: stop - at.start] = flat[first + at.start : first + stop]
    return out


def work(n_heads: int, n_tokens: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Cut n_heads times n_tokens, of so many numbers each, into blocks of about CHUNK numbers.

    Yields heads, tokens."""
    width = min(n_tokens, max(1, CHUNK // numbers))
    G = max(1, CHUNK // (numbers * width))
    for h in range(0, n_heads, G):
        for a in range(0, n_tokens, width):
            yield slice(h, min(h + G, n_heads)), slice(a, min(a + width, n_tokens))


@cache
def bit_table(width: int) -> Tensor:
    """Return the lowest `width` bits of every byte: (256, width) int32."""
    byte = torch.arange(256, dtype=torch.int32).unsqueeze(-1)
    return byte >> torch.arange(width, dtype=torch.int32) & 1


def expand_bits(bits: Tensor, n_bits: int) -> Tensor:
    """Turn masks (...) into ones and zeros (..., n_bits) int32, byte by byte, lowest byte first."""
    number = bits.contiguous().view(torch.uint8).flatten().int()
    return take_rows(bit_table(min(n_bits, 8)), number).view(*bits.shape, n_bits)


def take_rows(rows: Tensor, number: Tensor) -> Tensor:
    """Return rows[number]: rows (n, x), number (...) int32, result (..., x)."""
    size = rows.size(-1) * rows.element_size()
    whole = rows.view(AS_ONE[size]).flatten() if size in AS_ONE else rows
    taken = whole.index_select(0, number.flatten())
    return taken.view(rows.dtype).view(*number.shape, -1)
