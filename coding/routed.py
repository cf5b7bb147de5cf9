"""Routed transform coding: a prompt's keys and values in a share of their bytes, with precision
that goes where it is read, inside a token and between tokens.

In the coordinates of basis.py an error costs the same wherever it is. So of independent coordinates
of variance lambda_i in tokens that are read with weight w_t, those bits leave least that reverse
water-filling gives,

    bits_ti = max(0, 1/2 log2(w_t lambda_i / theta)),

one level theta for all layers, heads, keys and values: rounding to steps Delta / sqrt(w_t) and an
entropy code (storage/entropy.py) do just that, to a fraction of a bit. A token that nobody reads is
left with nothing, and stands for the mean.

w_t, of a token in a block of layers, is what the prompt's last 64 queries give it: the root mean
square of their attention, a mean over heads and layers, as a whole power of two in four bits. Delta
is the least with which a sequence's bytes, all of them, fit its share. Bytes of a sequence:

    Delta in 16 bits | weights, 4 bits each, block by block | codes of all blocks, token by token

The first tokens and the newest stay whole (baselines/coded.py). Coordinates and probabilities are
the model's, as its weights are, and are not counted; described() says how many bytes they are.
Plain PyTorch and NumPy; all layers are decoded when the first is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from baselines.coded import (
    CodedCache,
    Decoded,
    Kept,
    Middle,
    Reader,
    TogetherPath,
    attach_together,
    check_kept,
    coded_layers,
    pack_codes,
    to_bytes,
    unturned,
)
from coding.basis import (
    FIRST,
    MIDDLE,
    OCTAVE,
    ROWS,
    ZERO,
    Basis,
    block_vectors,
    codes_of,
    low_bits,
    row_of,
    size_of,
    symbols_of,
)
from config import check
from model import Transformer, attention_mask
from storage import entropy
from storage.layout import cdiv, soft_cap

TAIL = 4  # newest tokens that stay whole
ASKING = 64  # last queries that weights are of
LEAST_WEIGHT = 2.0**-8
MIDDLE_CLASS = 8  # the class of a weight of 1; there are 16
# Classes above the middle that a basis is cut for, here four times the mean weight. For twice the
# mean it has a sixth fewer bytes and 1.07 and 1.5 times the KL at 4 %, for eight times it had more
# bytes for no gain (docs/log.md).
SPARE = 2
CLASS = OCTAVE // 2  # between the steps of neighbouring classes: Delta / sqrt(w)
STEPS = 24 * OCTAVE  # steps are 2^-24 to 2^24
# Bits of a lane whatever it holds: its last state takes 32, of which symbols fill 0 to 16, each as
# often. The mean is 24; with 28 few strings are too long and have to be written again.
LANE_BITS = 28
SAMPLED = 8  # of so many tokens one tells where to look for a step
# How far from there. It decides no step, only how many are tried on all tokens: 5, where a search
# of all steps tries 12, and one more for each time that the few were further off.
NEAR = OCTAVE // 4
COUNTS = 4 * 8  # bytes of a layer's four counts of a sequence
HEAD = 2  # bytes of a string's step


class Seen(NamedTuple):
    """What a layer hands to the last one, which codes the prompt."""

    middle: Middle
    weight: Tensor  # (B, M) float32, the layer's; 0 where there is no token


def read_by_last(q: Tensor, k: Tensor, n_pad: Tensor | None, cap: float = 0.0) -> Tensor:
    """Return the root mean square of the attention of a prompt's last queries, those of padding
    apart, on all columns: (B, Hkv, T) float32.

    q (B, H, T, D), k (B, Hkv, T, D)"""
    B, _, T, D = q.shape
    W = min(ASKING, T)
    Hkv = k.size(1)
    last = q[:, :, T - W :].float()
    scaled = last * D**-0.5
    by_head = scaled.unflatten(1, (Hkv, -1))
    keys = k.float().unsqueeze(2)
    logits = soft_cap(by_head @ keys.mT, cap)
    mask = attention_mask(W, T, n_pad, q.device).unsqueeze(1)
    logits = logits.masked_fill(~mask, float("-inf"))
    share = logits.softmax(-1)  # (B, Hkv, n, W, T)
    real = torch.ones(B, W, device=q.device)
    if n_pad is not None:
        column = torch.arange(T - W, T, device=q.device)
        real = (column >= n_pad.unsqueeze(1)).float()
    n_real = real.sum(1, keepdim=True)
    part = real / n_real.clamp_min(1)
    square = share.square() * part[:, None, None, :, None]
    return square.sum(3).mean(2).sqrt()


def classes_of(weight: Tensor) -> Tensor:
    """Return the classes (n,) int64 of weights (n,), of which the mean is made 1."""
    mean = weight.mean().clamp_min(1e-30)
    relative = weight / mean
    octave = relative.clamp_min(LEAST_WEIGHT).log2()
    number = octave.round().long() + MIDDLE_CLASS
    return number.clamp(0, 15)


def with_low(rows: Tensor) -> Tensor:
    """Return the rows of symbols, and after them those of the lowest bits of long codes."""
    low = low_bits(rows)
    of_low = ROWS - 1 + low[low > 0]
    return torch.cat((rows, of_low.to(torch.uint8)))


def split(codes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (n,) of rows (n,) as symbols and then their lowest bits, and with_low(rows)."""
    low = low_bits(rows)
    rest = codes - ((codes >> low) << low)
    lowest = rest[low > 0].to(torch.uint8)
    symbols = torch.cat((symbols_of(codes, rows), lowest))
    return symbols, with_low(rows)


def joined(symbols: Tensor, rows: Tensor) -> Tensor:
    """Return the codes (n,) int64 that split has made symbols of."""
    n = len(rows)
    low = low_bits(rows)
    codes = (symbols[:n].long() - ZERO) << low
    codes[low > 0] += symbols[n:].long()
    return codes


def smallest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the least step above low, and at most high, that fits: all above one that fits do."""
    while high - low > 1:
        step = (low + high) // 2
        if fits(step):
            high = step
        else:
            low = step
    return high


class RoutedCodec(nn.Module):
    """What turns a prompt of all layers into strings and back.

    n_tokens: of the prompts that the share is meant for: how many coordinates are held"""

    name = "routed"

    def __init__(self, model: Transformer, basis: Basis, kept: Kept, n_tokens: int):
        super().__init__()
        self.kept = kept
        self._model = (model,)  # in a tuple, so that it does not become a part of this module
        self.span = basis.span
        self.table = basis.table
        of_symbols = self.table.cost()[:ROWS]
        low = low_bits(torch.arange(ROWS))
        cost = of_symbols + low.unsqueeze(1)
        self.cost = cost.to(basis.blocks[0].mean.device)
        used = self._used(basis, n_tokens)
        both = zip(basis.blocks, used, strict=True)
        self.blocks = [block.first(r) for block, r in both]

    def _apply(self, fn: Callable, recurse: bool = True) -> RoutedCodec:
        """Take the coordinates where the model goes. They keep their types, unlike its weights:
        strings are read by these very bits."""
        super()._apply(fn, recurse)
        device = fn(self.cost).device
        self.cost = self.cost.to(device)
        self.blocks = [block.on(device) for block in self.blocks]
        return self

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in 16 bits a number."""
        p = sum(len(block.mean) for block in self.blocks)
        return 2 * p

    def _used(self, basis: Basis, n_tokens: int) -> list[int]:
        """Count the coordinates of each block that tokens of up to 2^SPARE times the mean weight
        code within the share."""
        p = sum(len(block.mean) for block in basis.blocks)
        n_middle = max(1, n_tokens - self.kept.whole)
        tokens = self.kept.share * n_tokens - self.kept.whole  # that would fit uncoded
        bits = 16 * p * tokens / n_middle
        part = torch.from_numpy(self.table.part[:ROWS])
        part = part.to(self.cost.device) / entropy.PARTS
        never = 1e3  # bits of what has no part: not infinitely many, for 0 times that is no number
        bits_each = self.cost.clamp_max(never)
        of_row = (part * bits_each).sum(1)
        of_row[:FIRST] = 0
        spread = torch.cat([block.spread for block in basis.blocks])

        def bits_of(step: int) -> float:
            row = row_of(spread, torch.tensor(step))
            return float(of_row[row.long()].sum())

        usual = smallest(lambda step: bits_of(step) <= bits, -STEPS, STEPS)
        least = torch.tensor(usual - SPARE * CLASS)
        used = []
        for block in basis.blocks:
            coded = row_of(block.spread, least) >= FIRST
            n_coded = int(coded.sum())
            used.append(max(1, n_coded))
        return used

    def constants(self) -> dict[str, Tensor]:
        """Return what is needed to read strings, by name: probabilities and coordinates."""
        held = {"parts": torch.from_numpy(self.table.part)}
        for i, block in enumerate(self.blocks):
            for name, t in block._asdict().items():
                held[f"{name}{i}"] = t
        return held

    def basis_bytes(self) -> int:
        """Count the bytes of coordinates, and of probabilities in 16 bits each."""
        of_table = 2 * self.table.part.size
        return of_table + sum(block.nbytes() for block in self.blocks)

    def described(self) -> str:
        """Return how it codes, in a few words."""
        r = sum(len(block.spread) for block in self.blocks)
        megabytes = self.basis_bytes() / 1e6
        components = f"{r} components of {self.span} layers each"
        return f"in {self.kept.share:.1%}, {components}, {megabytes:.1f} MB of them apart"

    # ---- strings

    def rounding(self, step: int, classes: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield of each block the steps (n, 1) of tokens of its classes (n,), 64ths of an octave,
        and the rows (n, r) of their coordinates. No step is so small that the largest coordinate
        needs a row beyond the last."""
        reach = (ROWS - 1 - MIDDLE) * OCTAVE // 4
        for block, c in zip(self.blocks, classes, strict=True):
            least = int(block.spread[0]) - reach
            steps = step - (c - MIDDLE_CLASS) * CLASS
            steps = steps.clamp_min(least).unsqueeze(1)
            yield steps, row_of(block.spread, steps)

    def beside(self) -> int:
        """Count the bytes that a sequence holds beside its string: whole tokens and counts."""
        L = len(coded_layers(self._model[0]))
        whole = self.kept.whole * self.token_bytes
        return whole + COUNTS * L

    def room(self, n_tokens: int) -> int:
        """Count the bytes that a sequence's string may have."""
        held = int(self.kept.share * n_tokens * self.token_bytes)
        return held - self.beside()

    def bits(self, ys: list[Tensor], classes: list[Tensor], step: int) -> float:
        """Count the bits of the codes of one sequence's coordinates ys (n, r), as probabilities
        have it, and those of the lanes."""
        total = 0.0
        n = 0
        for y, (steps, row) in zip(ys, self.rounding(step, classes), strict=True):
            symbols = symbols_of(codes_of(y, steps, row), row)
            cost = self.cost[row.long(), symbols.long()]
            coded = row >= FIRST
            total += float((cost * coded).sum())
            n += int(coded.sum())
        return total + LANE_BITS * entropy.lanes_of(n)

    def string(self, ys: list[Tensor], classes: list[Tensor], step: int) -> Tensor:
        """Return the bytes of one sequence's coordinates ys (n, r)."""
        codes = []
        rows = []
        for y, (steps, row) in zip(ys, self.rounding(step, classes), strict=True):
            coded = row >= FIRST
            every = codes_of(y, steps, row)
            codes.append(every[coded])
            rows.append(row[coded])
        number = torch.tensor([step], dtype=torch.int16, device=ys[0].device)
        head = to_bytes(number)
        of_tokens = torch.cat(classes).to(torch.uint8)
        of_tokens = pack_codes(of_tokens, 4)
        symbols, of_rows = split(torch.cat(codes), torch.cat(rows))
        of_codes = entropy.write(symbols, of_rows, self.table)
        return torch.cat((head, of_tokens, of_codes))

    def fitting(self, ys: list[Tensor], classes: list[Tensor], n_tokens: int) -> Tensor:
        """Return the string of the smallest step that fits a sequence's share. ValueError where
        none does."""
        room = self.room(n_tokens)
        of_classes = cdiv(sum(map(len, classes)), 2)
        of_codes = 8 * (room - HEAD - of_classes)  # bits for them
        some = slice(None, None, SAMPLED)  # a first guess, of few tokens
        part = len(ys[0]) / len(ys[0][some])
        few = [y[some] for y in ys]
        few_classes = [c[some] for c in classes]

        def seems_to_fit(step: int) -> bool:
            return part * self.bits(few, few_classes, step) <= of_codes

        def fits(step: int) -> bool:
            return self.bits(ys, classes, step) <= of_codes

        guess = smallest(seems_to_fit, -STEPS, STEPS)
        low = max(-STEPS, guess - NEAR)
        while low > -STEPS and fits(low):  # the few promised too little
            low = max(-STEPS, low - NEAR)
        most = min(guess + NEAR, STEPS)
        high = smallest(fits, low, most)
        string = self.string(ys, classes, high)
        while len(string) > room and high < STEPS:  # by a few bytes of lanes
            high = min(STEPS, high + OCTAVE // 16)
            string = self.string(ys, classes, high)
        self.check_fits(len(string), n_tokens)
        return string

    def check_fits(self, n_bytes: int, n_tokens: int) -> None:
        """Raise ValueError where a sequence's shortest string has more bytes than its share."""
        whole = n_tokens * self.token_bytes
        least = (self.beside() + n_bytes) / whole
        least = math.ceil(1000 * least) / 1000
        enough = f"--kv_byte_budgets={least:g} or more, or " if least < 1 else ""
        check(
            n_bytes <= self.room(n_tokens),
            f"a share of {self.kept.share:g} of {n_tokens} tokens",
            f"{self.kept.whole} stay whole, and with the others in as few bytes as can be that is "
            f"{least:.1%} of the bytes",
            f"give {enough}longer contexts",
        )

    def encode(self, seen: list[Seen]) -> list[Tensor]:
        """Return the strings (bytes,) uint8 of all sequences; seen: of each layer."""
        middle = seen[0].middle
        model = self._model[0]
        keys = [unturned(s.middle.k, model, middle.number) for s in seen]
        values = [s.middle.v for s in seen]
        vectors = block_vectors(keys, values, self.span)
        of_blocks = zip(self.blocks, vectors, strict=True)
        ys = [block.encode(x) for block, x in of_blocks]
        weights = torch.stack([s.weight for s in seen])  # (L, B, M)
        counts = middle.there.sum(1).tolist()
        strings = []
        for b, n in enumerate(counts):
            if not n:
                empty = torch.zeros(0, dtype=torch.uint8, device=weights.device)
                strings.append(empty)
                continue
            own = weights[:, b, :n]
            mean = own.mean(1, keepdim=True)
            own = own / mean.clamp_min(1e-30)
            by_block = own.split(self.span)
            classes = [classes_of(w.mean(0)) for w in by_block]
            coordinates = [y[b, :n] for y in ys]
            string = self.fitting(coordinates, classes, n + self.kept.whole)
            strings.append(string)
        return strings

    def numbers(self, string: Tensor, n: int) -> list[Tensor]:
        """Return the coordinates (n, r) of each block that a string of n tokens stands for."""
        if not n:
            empty = [b.mean.new_zeros(0, len(b.spread)) for b in self.blocks]
            return [y.float() for y in empty]
        reader = Reader(string)
        head = torch.empty(1, dtype=torch.int16, device=string.device)
        head.view(torch.uint8).copy_(reader.take(HEAD))
        every = reader.codes(n * len(self.blocks), 4)
        classes = every.long().split(n)
        rounding = list(self.rounding(int(head), classes))
        of_codes = [row[row >= FIRST] for _, row in rounding]
        rows = torch.cat(of_codes)
        rest = string[reader.at :]
        symbols = entropy.read(rest, with_low(rows), self.table)
        codes = joined(symbols, rows)
        lengths = [len(row) for row in of_codes]
        parts = codes.split(lengths)
        out = []
        for (steps, row), part in zip(rounding, parts, strict=True):
            coded = row >= FIRST
            own_steps = steps.expand_as(row)
            size = size_of(own_steps[coded])
            y = torch.zeros(row.shape, device=string.device)
            y[coded] = part.float() * size
            out.append(y)
        return out

    def read(self, cache: CodedCache) -> None:
        """Decode the strings, which the last layer's cache holds, for the caches of all layers."""
        model = self._model[0]
        caches = [c for c in cache.prompt.layers if isinstance(c, CodedCache)]
        counts = cache.n_coded.tolist()
        number, there = cache.middle_columns()
        there = there.unsqueeze(1)
        of_sequences = zip(caches[-1].strings(), counts, strict=True)
        decoded = [self.numbers(string, n) for string, n in of_sequences]
        Hkv = cache.window_k.size(1)
        for i, block in enumerate(self.blocks):
            own = [of_sequence[i] for of_sequence in decoded]
            padded = pad_sequence(own, batch_first=True)
            x = block.decode(padded).to(cache.dtype)
            first = i * self.span
            some = caches[first : first + self.span]
            by_layer = x.unflatten(-1, (2, len(some), Hkv, -1))
            keys, values = by_layer.permute(2, 3, 0, 4, 1, 5)  # (layers, B, Hkv, T, D)
            for layer, k, v in zip(some, keys, values, strict=True):
                k = unturned(k.contiguous(), model, number, back=True)
                v = v.contiguous()
                layer.middle = Decoded(k, v, there)


class RoutedPath(TogetherPath):
    """One layer that tells how much its tokens are read, too."""

    def see(self, middle: Middle, q: Tensor, k: Tensor, n_pad: Tensor | None) -> Seen:
        """Return the middle of a prompt, and how much its last queries read of each token.

        q (B, H, T, D), k (B, Hkv, T, D), n_pad (B,): left padding of each row, or None"""
        read = read_by_last(q, k, n_pad, self.cap)
        read = read.mean(1)  # (B, T)
        column = middle.number
        if n_pad is not None:
            column = column + n_pad.unsqueeze(1)
        column = column.clamp_max(read.size(1) - 1)
        weight = read.gather(1, column)
        return Seen(middle, weight * middle.there)


def attach(model: Transformer, basis: Basis, kept: Kept, n_tokens: int) -> Transformer:
    """Let all layers but those that slide code prompts together, in place; baselines.coded.detach
    undoes it. Returns the model. n_tokens: of prompts that the share is meant for."""
    check_kept(kept)
    codec = RoutedCodec(model, basis, kept, n_tokens)
    return attach_together(model, codec, RoutedPath)
