"""An entropy code: symbols as a string of bytes that is nearly as short as their probabilities say.

Range asymmetric numeral systems (Duda, arXiv 1311.2540). A state x is everything that was written
so far, as one number. A symbol that has f of 2^14 parts, with c parts before it, makes it

    x -> floor(x / f) 2^14 + c + x mod f,

which takes log2(2^14 / f) bits; reading takes the last symbol off again. States stay between 2^16
and 2^32: what does not fit is given to the string, 16 bits at a time. Several states, the lanes,
take turns, so that a step is a few operations on vectors: symbol i belongs to lane i mod lanes.

Each symbol names the row of a table that has its probability; that may be the symbol which its lane
had some steps before. A string is the lanes' last states of 32 bits, then words of 16 in the order
in which they are read. All of it is whole numbers: what was written on one machine is read on
another. NumPy, on the host: vectors are short."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import check

PRECISION = 14  # bits of a probability
PARTS = 1 << PRECISION
WORD = 16  # bits that a state gives away at a time
LEAST = 1 << WORD  # of a state
MOST_LANES = 512
SYMBOLS_A_LANE = 4096  # with fewer a lane's state would be dear


class Table(NamedTuple):
    """Probabilities of symbols, a row for each kind of symbol."""

    part: np.ndarray  # (rows, symbols) int64, of PARTS
    before: np.ndarray  # (rows, symbols) int64, parts of the symbols before it
    symbol: np.ndarray  # (rows, PARTS) uint8, the symbol that a part belongs to

    def cost(self) -> Tensor:
        """Return the bits that each symbol takes, (rows, symbols) float32; infinite where it has no
        part."""
        return PRECISION - torch.from_numpy(self.part).float().log2()


def table_of(counts: Tensor, allowed: Tensor) -> Table:
    """Return the table of how often symbols were seen, counts (rows, symbols), at most 256. Of
    those that are allowed (rows, symbols) bool, each has a part at least, however rare; what
    rounding leaves goes to the most frequent. Others have none and cannot be written."""
    there = allowed.numpy().astype(np.int64)
    seen = counts.double().numpy() * there + 1e-9 * there
    share = seen / seen.sum(1, keepdims=True)
    spare = PARTS - there.sum(1, keepdims=True)
    part = there + np.floor(share * spare).astype(np.int64)
    row = np.arange(len(part))
    part[row, seen.argmax(1)] += PARTS - part.sum(1)
    return table_of_parts(part)


def table_of_parts(part: np.ndarray) -> Table:
    """Return the table of parts (rows, symbols) int64, PARTS in each row."""
    before = part.cumsum(1) - part
    every = np.arange(part.shape[1], dtype=np.uint8)
    symbol = np.stack([every.repeat(parts) for parts in part])
    return Table(part, before, symbol)


def lanes_of(n: int) -> int:
    """Count the states that n symbols are spread over."""
    return max(1, min(MOST_LANES, n // SYMBOLS_A_LANE))


def write(symbols: Tensor, rows: Tensor, table: Table, lanes: int = 0) -> Tensor:
    """Return the string (bytes,) uint8 of symbols (n,) uint8, each with the probabilities of its
    row (n,) uint8. lanes: 0 for as many as lanes_of says."""
    n = len(symbols)
    lanes = lanes or lanes_of(n)
    symbol = symbols.cpu().numpy()
    row = rows.cpu().numpy()
    state = np.full(lanes, LEAST, np.int64)
    words = []
    for first in reversed(range(0, n, lanes)):
        at = (row[first : first + lanes], symbol[first : first + lanes])
        f = table.part[at]
        x = state[: len(f)]
        full = x >= f << (2 * WORD - PRECISION)
        words.append(x[full] & (LEAST - 1))
        x = np.where(full, x >> WORD, x)
        times, rest = np.divmod(x, f)
        state[: len(f)] = (times << PRECISION) + table.before[at] + rest
    halves = np.stack((state & (LEAST - 1), state >> WORD), 1).ravel()
    string = np.concatenate((halves, *reversed(words))).astype("<u2")
    return torch.from_numpy(string.view(np.uint8).copy()).to(symbols.device)


def read(data: Tensor, rows: Tensor, table: Table, lanes: int = 0, lag: int = 0) -> Tensor:
    """Return the symbols (n,) uint8 with rows (n,) uint8 that were written as data (bytes,).

    lanes: as it was written; 0 for as many as lanes_of says
    lag: where a lane has had that many symbols, the row of its next is the oldest of them, and
        `rows` counts for its first ones alone; 0: never

    ValueError where it is not such a string."""
    n = len(rows)
    lanes = lanes or lanes_of(n)
    words = data.cpu().numpy().tobytes()
    words = np.frombuffer(words, "<u2").astype(np.int64)
    state = words[: 2 * lanes : 2] + (words[1 : 2 * lanes : 2] << WORD)
    at = 2 * lanes
    row = rows.cpu().numpy()
    out = np.empty(n, np.uint8)
    back = lag * lanes
    for first in range(0, n, lanes):
        some = row[first : first + lanes]
        if lag and first >= back:
            some = out[first - back : first - back + len(some)]
        x = state[: len(some)]
        low = x & (PARTS - 1)
        s = table.symbol[some, low]
        out[first : first + len(some)] = s
        x = table.part[some, s] * (x >> PRECISION) + low - table.before[some, s]
        empty = x < LEAST
        taken = np.count_nonzero(empty)
        x[empty] = (x[empty] << WORD) + words[at : at + taken]
        at += taken
        state[: len(some)] = x
    check(
        at == len(words) and bool((state == LEAST).all()),
        f"a string of {data.numel()} bytes for {n} symbols",
        "one that they were written as",
        "give it with their rows and table",
    )
    return torch.from_numpy(out).to(rows.device)
