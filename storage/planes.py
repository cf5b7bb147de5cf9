"""Bytes made shorter without loss: each is coded by how likely it is beside what is known already.

    coded = write(symbols, {"layer": layer}, width=64)       # (n,) uint8, and what goes with each
    symbols = read(coded, n, {"layer": layer}, width=64)

Bytes are not equally likely, so an entropy code (storage/entropy.py) takes fewer bits for most. How
likely a byte is, is counted in one of these *contexts*, whichever makes the plane shortest:

    alone  all bytes alike
    left   by the byte before it
    row    by the byte above it, `width` earlier
    NAME   by a byte that is known before, such as "layer"

A plane that no context makes shorter by a 32nd is stored as it is, and a small one deflated.

The code reads many lanes at a time, so the bytes that tell a byte must have been read before: each
lane has a run of neighbours, and what is before a byte was read some steps earlier in its lane.

Letters: n symbols, L lanes, R rows of a table (1 or 256).
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import check
from storage import entropy
from storage.layout import cdiv

STORED = "stored"  # no context: bytes as they are
DEFLATED = "deflated"  # the same, of fewer than SMALL symbols
SMALL = 4096
SAVING = 32  # a context saves at least one part of so many
SYMBOLS_A_LANE = 1024  # fewer than in entropy.py: there are many short planes, and time is steps
MOST_LANES = 4096
SAMPLED = 1 << 20  # symbols that contexts are compared on
BIAS = 0.72  # bits that a count of a sample makes a plane look shorter than it is (Miller, 1955)


class Coded(NamedTuple):
    """A plane as bytes."""

    context: str
    table: bytes  # parts (R, 256) uint16, deflated
    data: bytes  # the string of its symbols


def lanes_of(n: int) -> int:
    """Count the lanes of n symbols."""
    return max(1, min(MOST_LANES, n // SYMBOLS_A_LANE))


def in_lanes(x: Tensor, every: int = 1) -> Tensor:
    """Lay x (n,) into lanes, (steps, L), a run of neighbours in each; zeros fill up the last.
    every: of so many lanes only one."""
    lanes = lanes_of(len(x))
    steps = cdiv(len(x), lanes)
    x = F.pad(x, (0, steps * lanes - len(x))).view(lanes, steps)
    return x[::every].T.contiguous()


def in_order(x: Tensor, n: int) -> Tensor:
    """Undo in_lanes: (n,)."""
    return x.T.flatten()[:n]


def lags(width: int) -> dict[str, int]:
    """Return, by context, how many steps before a symbol the one lies that tells it."""
    return {"left": 1, "row": width} if width > 1 else {"left": 1}


def table_rows(symbols: Tensor, context: str, known: dict[str, Tensor], width: int) -> Tensor:
    """Return the row of a table for each of symbols (steps, L): (steps, L) uint8. known (steps, L):
    what goes with them."""
    if context in known:
        return known[context]
    lag = lags(width).get(context, len(symbols))
    return F.pad(symbols, (0, 0, lag, 0))[: len(symbols)]


def count(symbols: Tensor, rows: Tensor, context: str) -> Tensor:
    """Count symbols by their rows: (R, 256) int64."""
    n_rows = 1 if context == "alone" else 256
    both = (rows.int() * 256 + symbols).flatten()
    return torch.bincount(both, minlength=n_rows * 256).view(n_rows, 256)


def bytes_each(counts: Tensor, n: int) -> float:
    """Return the bytes that each of n symbols will take, by the counts (R, 256) of some of them:
    its own, and its part of those of the table, which has about one for each count."""
    counts = counts.double()
    total = counts.sum(1, keepdim=True).clamp_min(1)
    seen = int((counts > 0).sum())
    bits = -(counts * (counts / total).clamp_min(1e-30).log2()).sum()
    return float((bits + BIAS * seen) / (8 * counts.sum())) + seen / n


def best_context(symbols: Tensor, known: dict[str, Tensor], width: int) -> str:
    """Return the context that makes symbols (n,) shortest; STORED where none pays."""
    n = len(symbols)
    every = cdiv(n, SAMPLED)
    some = in_lanes(symbols, every)
    beside = {name: in_lanes(x, every) for name, x in known.items()}
    shares = {}
    for context in ("alone", *lags(width), *known):
        rows = table_rows(some, context, beside, width)
        shares[context] = bytes_each(count(some, rows, context), n)
    best = min(shares, key=shares.get)
    lanes = 4 * lanes_of(n) / n
    return best if shares[best] + lanes < 1 - 1 / SAVING else STORED


def write(symbols: Tensor, known: dict[str, Tensor], width: int) -> Coded:
    """Return symbols (n,) uint8 as bytes.

    known  by name (n,) uint8, what goes with each symbol and is known where they are read
    width  symbols between one and that above it"""
    n = len(symbols)
    if n < SMALL:
        return Coded(DEFLATED, b"", zlib.compress(symbols.numpy().tobytes()))
    context = best_context(symbols, known, width)
    if context == STORED:
        return Coded(STORED, b"", symbols.numpy().tobytes())
    beside = {name: in_lanes(x) for name, x in known.items() if name == context}
    laid = in_lanes(symbols)
    rows = table_rows(laid, context, beside, width)
    counts = count(laid, rows, context)
    allowed = counts > 0
    allowed[:, 0] |= ~allowed.any(1)  # rows that never come
    table = entropy.table_of(counts, allowed)
    data = entropy.write(laid.flatten(), rows.flatten(), table, laid.size(1))
    parts = zlib.compress(table.part.astype("<u2").tobytes())
    return Coded(context, parts, data.numpy().tobytes())


def read(coded: Coded, n: int, known: dict[str, Tensor], width: int) -> Tensor:
    """Return the n symbols that were written with the same `known` and `width`. ValueError,
    IndexError or zlib.error where these are not such bytes."""
    context = coded.context
    if context in (STORED, DEFLATED):
        data = zlib.decompress(coded.data) if context == DEFLATED else coded.data
        check(len(data) == n, f"a plane of {len(data)} bytes", f"{n}", "park it again")
        return tensor_of(data)
    lag = lags(width).get(context, 0)
    check(
        context == "alone" or lag or context in known,
        f"a plane coded by {context!r}",
        "a context that there is",
        "park it again",
    )
    n_rows = 1 if context == "alone" else 256
    part = np.frombuffer(zlib.decompress(coded.table), "<u2").astype(np.int64)
    part = part.reshape(n_rows, 256)
    check(bool((part.sum(1) == entropy.PARTS).all()), "a table", "one of shares", "park it again")
    table = entropy.table_of_parts(part)
    lanes = lanes_of(n)
    blank = torch.zeros(cdiv(n, lanes), lanes, dtype=torch.uint8)
    rows = in_lanes(known[context]) if context in known else blank
    laid = entropy.read(tensor_of(coded.data), rows.flatten(), table, lanes, lag)
    return in_order(laid.view(blank.shape), n)


def tensor_of(data: bytes) -> Tensor:
    """Return bytes as a tensor (n,) uint8."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
