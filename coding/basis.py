"""Coordinates in which what a prompt's tokens hold is coded, and how likely codes are.

`span` neighbouring layers are a *block*: of a token the keys of all their heads, before RoPE, and
then their values are one vector x of p = 2 span Hkv D numbers. What an error e of it costs is told
by gradients g of the model's loss with respect to x, on calibration text, with next tokens drawn
from the model's own distribution: the Kullback-Leibler divergence that e causes is, to second
order,

    1/2 E[(g e)^2] = 1/2 e^T M e,    M = E[g g^T]  (Fisher's information)

which knows queries, W_o, and how much the layers above make of it. In coordinates

    y = U^T M^1/2 (x - mean),    U the principal axes of M^1/2 (x - mean)

an error of one coordinate costs as much as of any other, of any block, and coordinates are
uncorrelated: so all of them are rounded to one step, and those that vary less than it cost nothing.
Tokens that are read more have smaller steps (routed.py).

Codes are y / step to the nearest whole number, and stand for themselves: a wider zero, or numbers
nearer to it, would have less error for their bits, but shrink keys, which costs more. How likely a
code is depends on a coordinate's spread in steps alone: there is a row of probabilities for each
quarter octave of it, counted on calibration text. The lowest bits of long codes are stored as they
are. Spreads and steps are whole 64ths of an octave, so that writer and reader agree on rows.

Letters: storage/layout.py; p numbers of a token in a block, r coordinates that are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.coded import as_vectors, coded_layers, unturned
from config import check
from model import Transformer, evaluating
from routing.calibration import record_layers
from storage.entropy import Table, table_of
from storage.layout import cdiv

SPAN = 3  # layers of a block
OCTAVE = 64  # whole numbers of a spread or a step
ROWS = 77  # the last is of a spread of 2^11 steps
MIDDLE = 32  # row of a spread of one step; a row is a quarter of an octave
LONG = 44  # last row whose codes are symbols as they are
FIRST = 24  # first row that has codes: below it everything is rounded to zero
ZERO = 128  # symbol of a code of 0
REACH = 16  # codes reach so many spreads
RIDGE = 1e-2  # of M, in units of the mean of its diagonal; .1 loses more (docs/log.md)
SAMPLED = 1024  # tokens that codes are counted on


class Block(NamedTuple):
    """The coordinates of a block of layers, largest first."""

    mean: Tensor  # (p,) float16
    to: Tensor  # (p, r) float16
    back: Tensor  # (r, p) float16
    spread: Tensor  # (r,) int64, log2 of the root mean square of each coordinate, in 64ths

    def encode(self, x: Tensor) -> Tensor:
        """Return the coordinates (..., r) of vectors x (..., p), float32 under autocast, too."""
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - self.mean.float()
            return centred @ self.to.float()

    def decode(self, y: Tensor) -> Tensor:
        """Return the vectors (..., p) float32 of coordinates y (..., r)."""
        with torch.autocast(y.device.type, enabled=False):
            return y @ self.back.float() + self.mean.float()

    def first(self, r: int) -> Block:
        """Return the block with its first r coordinates only."""
        to = self.to[:, :r].contiguous()
        back = self.back[:r].contiguous()
        return Block(self.mean, to, back, self.spread[:r])

    def on(self, device: torch.device) -> Block:
        """Return the block there."""
        return Block(*(t.to(device) for t in self))

    def nbytes(self) -> int:
        """Count the bytes as they would be saved, spreads in 16 bits."""
        parts = (self.mean, self.to, self.back)
        of_parts = sum(t.numel() * t.element_size() for t in parts)
        return of_parts + 2 * len(self.spread)


class Basis(NamedTuple):
    """What calibration finds for a model."""

    blocks: list[Block]
    span: int
    table: Table  # how likely codes are


# -------------------- codes


def row_of(spread: Tensor, step: Tensor) -> Tensor:
    """Return the row of coordinates of a spread that are rounded to a step, both in 64ths of an
    octave, as uint8."""
    half = OCTAVE // 8
    quarter = (spread - step + half).div(OCTAVE // 4, rounding_mode="floor")
    row = (quarter + MIDDLE).clamp(0, ROWS - 1)
    return row.to(torch.uint8)


def low_bits(row: Tensor) -> Tensor:
    """Count the lowest bits of a code that are stored as they are, by its row: int64."""
    return (row.long() - LONG + 3).clamp_min(0) // 4


def reach(device=None) -> Tensor:
    """Return the largest code of each row, (ROWS,) int64."""
    row = torch.arange(ROWS, device=device)
    spread = ((row - MIDDLE).double() / 4).exp2()
    longest = (ZERO - 1) << low_bits(row)
    far = (REACH * spread).ceil().long()
    return (far + 1).minimum(longest)


def size_of(step: Tensor) -> Tensor:
    """Return steps given in 64ths of an octave as numbers, float32."""
    return (step.double() / OCTAVE).exp2().float()


def codes_of(y: Tensor, step: Tensor, row: Tensor) -> Tensor:
    """Return the codes (n, r) int64 of coordinates y (n, r) float32 with steps (n, 1) in 64ths of
    an octave and rows (n, r)."""
    most = reach(y.device).float()[row.long()]
    codes = (y / size_of(step)).round()
    return codes.maximum(-most).minimum(most).long()


def symbols_of(codes: Tensor, row: Tensor) -> Tensor:
    """Return the symbols uint8 of codes: all but their lowest bits."""
    high = codes >> low_bits(row)
    return (high + ZERO).to(torch.uint8)


def counted_as(row: Tensor) -> Tensor:
    """Return the first row (n,) int64 whose symbols are as likely as those of rows (n,) int64: a
    long code that varies twice as much has one more bit that is no symbol's."""
    first = LONG + 1
    alike = first + (row - first) % 4
    return torch.where(row > LONG, alike, row)


def counted(ys: list[Tensor], spreads: list[Tensor]) -> Table:
    """Return the probabilities of codes, the rows of their lowest bits last: (ROWS + 8, 256).

    ys       of each block a sample of coordinates (n, p) float32, rounded to steps that are evenly
             spread from 8 octaves below its largest spread to 8 above
    spreads  (p,) int64 of each, in 64ths of an octave"""
    counts = torch.zeros(ROWS, 256, dtype=torch.float64, device=ys[0].device)
    reached = reach(ys[0].device)
    for y, spread in zip(ys, spreads, strict=True):
        token = torch.arange(len(y), device=y.device)
        above = token[:, None] * 619 % (16 * OCTAVE)
        step = spread[0] - 8 * OCTAVE + above
        row = row_of(spread, step)
        symbols = symbols_of(codes_of(y, step, row), row).long()
        at = counted_as(row.long()) * 256 + symbols
        found = at.flatten().bincount(minlength=counts.numel())
        counts += found.view_as(counts)
    row = torch.arange(ROWS, device=counts.device)
    counts = counts[counted_as(row)]
    most = (reached >> low_bits(row))[:, None] + 1
    code = torch.arange(256, device=counts.device) - ZERO
    allowed = (code >= -most) & (code <= most)
    n = int(low_bits(row[-1]))  # rows of the lowest bits, all alike
    many = 2 << torch.arange(n)
    alike = torch.arange(256) < many[:, None]
    counts = torch.cat((counts.cpu(), alike.double()))
    return table_of(counts, torch.cat((allowed.cpu(), alike)))


# -------------------- calibration


def principal(mean: Tensor, covariance: Tensor, fisher: Tensor) -> Block:
    """Return all coordinates of vectors of this mean (p,) and covariance (p, p), in the metric of
    fisher (p, p); all float64."""
    p = len(mean)
    ridge = RIDGE * fisher.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(p, dtype=fisher.dtype, device=fisher.device)
    metric = (fisher + ridge * eye).float()
    found, axes = torch.linalg.eigh(metric)
    found = found.clamp_min(float(ridge) / 2)
    root = (axes * found.sqrt()) @ axes.T
    inverse = (axes * found.rsqrt()) @ axes.T
    in_metric = root @ covariance.float() @ root
    variance, axes = torch.linalg.eigh(in_metric)
    variance = variance.flip(0).clamp_min(1e-12)
    axes = axes.flip(1)
    to = root @ axes
    back = axes.T @ inverse
    spread = (variance.log2() * OCTAVE / 2).round().long()
    return Block(mean.half(), to.half(), back.half(), spread)


def gradients(
    model: Transformer, ids: Tensor, draw: torch.Generator
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return keys before RoPE and values of one sequence ids (1, T), lists over layers that code,
    and the gradients of the loss of tokens drawn from the model's distribution with respect to
    them."""
    blocks = coded_layers(model)
    seen: list[list[Tensor]] = [[], []]

    def see(i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        seen[0].append(k)
        seen[1].append(v)

    hook = model.embed_tokens.register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        with torch.enable_grad(), record_layers([b.self_attn for b in blocks], see):
            logits = model(ids)[0].float()
            share = logits.detach().softmax(-1)
            drawn = torch.multinomial(share.cpu(), 1, generator=draw)
            targets = drawn[:, 0].to(ids.device)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            found = torch.autograd.grad(loss, seen[0] + seen[1])
    finally:
        hook.remove()
    number = torch.arange(ids.size(1), device=ids.device)[None]
    n = len(blocks)
    keys = [unturned(k.detach(), model, number) for k in seen[0]]
    values = [v.detach() for v in seen[1]]
    of_keys = [unturned(g, model, number) for g in found[:n]]
    of_values = list(found[n:])
    return [keys, values], [of_keys, of_values]


def block_vectors(keys: list[Tensor], values: list[Tensor], span: int) -> list[Tensor]:
    """Return the vectors (B, T, p) of each block of layers' keys and values (B, Hkv, T, D)."""
    vectors = []
    for first in range(0, len(keys), span):
        end = first + span
        layers = [*keys[first:end], *values[first:end]]
        vectors.append(as_vectors(layers))
    return vectors


class Moments:
    """Sums over a block's tokens, float64, and some of its vectors."""

    def __init__(self):
        self.total: Tensor | float = 0.0  # (p,) of x
        self.squares: Tensor | float = 0.0  # (p, p) of x x^T
        self.costs: Tensor | float = 0.0  # (p, p) of g g^T
        self.some: list[Tensor] = []  # (n, p) each, float32

    def add(self, x: Tensor, g: Tensor, every: int) -> None:
        """Take tokens' vectors x (T, p) and gradients g (T, p), and every so many of x as they
        are."""
        x = x.float()
        g = g.float()
        gram = x.T @ x
        fisher = g.T @ g
        self.total = self.total + x.double().sum(0)
        self.squares = self.squares + gram.double()
        self.costs = self.costs + fisher.double()
        self.some.append(x[::every].clone())


def calibrate(
    model: Transformer,
    batches: Sequence[Tensor],
    span: int = SPAN,
    sinks: int = 4,
    seed: int = 0,
) -> Basis:
    """Return the coordinates of all blocks and the probabilities of their codes, on ids (B, T) of a
    text, first tokens left out. ValueError for fewer than two tokens.

    seed: of the tokens that are drawn"""
    n = sum(ids.size(0) * max(0, ids.size(1) - sinks) for ids in batches)
    check(
        n > 1,
        f"{n} tokens to calibrate on",
        "coordinates are those of several",
        "give a larger --calibration or --block_size",
    )
    every = max(1, n // SAMPLED)
    draw = torch.Generator().manual_seed(seed)
    n_blocks = cdiv(len(coded_layers(model)), span)
    moments = [Moments() for _ in range(n_blocks)]
    with evaluating(model):
        for ids in (row for batch in batches for row in batch.split(1)):
            here, costs = gradients(model, ids, draw)
            xs = block_vectors(*here, span)
            gs = block_vectors(*costs, span)
            for of_block, x, g in zip(moments, xs, gs, strict=True):
                of_block.add(x[0, sinks:], g[0, sinks:], every)
    sizes = torch.stack([m.costs.diagonal().mean() for m in moments])
    unit = unit_of(sizes.mean() / n)
    blocks = []
    ys = []
    for m in moments:
        mean = m.total / n
        covariance = m.squares / n - mean.outer(mean)
        block = principal(mean, covariance, m.costs / n / unit)
        blocks.append(block)
        ys.append(block.encode(torch.cat(m.some)))
    spreads = [block.spread for block in blocks]
    return Basis(blocks, span, counted(ys, spreads))


def unit_of(size: Tensor) -> float:
    """Return a unit in which M, of this mean diagonal, is near 1, so that float16 holds its root: a
    power of 4, so that nothing is rounded."""
    log2 = size.clamp_min(1e-30).log2()
    half = (log2 / 2).round()
    return 4.0 ** float(half)
