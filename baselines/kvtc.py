"""KVTC as it was published (arXiv 2511.01815, KV Cache Transform Coding): a cache is coded as a
picture is, by a transform, few bits for each coefficient, and an entropy code.

1. *Transform.* Of a token the keys of all layers and heads, before RoPE, are one vector x of
   p = L Hkv D numbers, and so are its values. Principal components of a calibration text, once for
   keys and once for values:

       y = V^T (x - mean),    V the eigenvectors of the covariance, largest first

2. *Bits.* Neighbouring components form groups of 16, 64, 256 or 1,024 that share a 16-bit scale in
   each token and have 2, 4 or 8 bits a number, or 0. Which groups and which bits follows from
   dynamic programming: with E(g, b) the squared error that coding a group g with b bits leaves on
   the calibration text, the least sum of errors of the components from i on within B bits is

       least(i, B) = min over groups g from i on, and b, of
                     E(g, b) + least(i + |g|, B - b |g| - 16)

3. *Entropy code.* A sequence's codes are one string, component by component, and DEFLATE makes it
   shorter. The bits are so many that the calibration text then has the share that is asked for.

The first tokens and the newest stay whole (coded.py). What attention reads is decoded from the
strings; the components V are the model's, like a basis of this project's, and are not counted among
a cache's bytes (Transform.nbytes says how many they are).

Differs: a number alone is float16, without a scale; 8 bits are integers, where the paper has FP8;
a scale is the root mean square of what it scales, and steps are those of the best uniform
quantiser of a Gaussian; covariances are added up exactly, where the paper samples tokens and finds
components by a randomised method; as many newest tokens stay whole as the query region has, where
the paper has 128; generated tokens stay whole, where the paper codes them when a turn ends. Plain
PyTorch and zlib: it shows bytes and what is lost, not how fast it is.

Letters: storage/layout.py; L layers, p numbers of a token, r components that have bits."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
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
    as_vectors,
    attach_together,
    check_kept,
    coded_layers,
    pack_codes,
    to_bytes,
    unturned,
)
from config import check
from model import Transformer, evaluating
from routing.calibration import record_layers
from storage.integers.format import LEVEL_BITS, LEVEL_STEPS
from storage.layout import at_least_float32

SIZES = (16, 64, 256, 1024)
STEP = dict(zip(LEVEL_BITS[1:], LEVEL_STEPS[1:], strict=True))  # in root mean squares, by bits
SCALE_BITS = 16
ALONE = 16  # bits of a number that is no group's
SAMPLED = 1024  # tokens that errors are measured on


# -------------------- bits


class Group(NamedTuple):
    """Components that share a scale in each token, or one alone."""

    first: int
    size: int
    bits: int

    @property
    def cost(self) -> int:
        """Bits of a token."""
        return cost_of(self.size, self.bits)


def cost_of(size: int, bits: int) -> int:
    """Count the bits of a group in a token, its scale included."""
    if size == 1:
        return bits
    return size * bits + SCALE_BITS


def best_groups(
    errors: Mapping[tuple[int, int], Tensor], dropped: Tensor, budget: int
) -> list[Group]:
    """Return the groups of least error of at most `budget` bits, in order, by dynamic programming.

    errors   of (size, bits) the error of a group that begins at each component, (n,); infinite
             where none may begin
    dropped  (n,), the error of each component that has no bits"""
    kinds = list(errors)
    unit = math.gcd(*(cost_of(*kind) for kind in kinds))
    costs = [cost_of(*kind) // unit for kind in kinds]
    n = len(dropped)
    N = budget // unit
    allowed = {kind: e.tolist() for kind, e in errors.items()}
    least = {n: torch.zeros(N + 1, dtype=dropped.dtype)}
    chosen = torch.zeros(n, N + 1, dtype=torch.int8)  # 0: no bits, else a kind's number + 1
    reach = max(size for size, _ in kinds)
    for i in reversed(range(n)):
        best = least[i + 1] + dropped[i]
        for c, (kind, cost) in enumerate(zip(kinds, costs, strict=True)):
            error = allowed[kind][i]
            after = i + kind[0]
            if after > n or cost > N or error == math.inf:
                continue
            total = least[after][: N + 1 - cost] + error
            better = total < best[cost:]
            best[cost:] = torch.where(better, total, best[cost:])
            chosen[i, cost:].masked_fill_(better, c + 1)
        least[i] = best
        least.pop(i + 1 + reach, None)
    groups = []
    i = 0
    while i < n:
        c = int(chosen[i, N])
        if c == 0:
            i += 1
            continue
        size, bits = kinds[c - 1]
        groups.append(Group(i, size, bits))
        i += size
        N -= costs[c - 1]
    return groups


def quantise(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes (..., n) uint8 of groups y (..., n), and their scales (...) float16."""
    size = y.square().mean(-1).sqrt()
    scale = size.clamp(2.0**-24, 65504).half()
    step = scale.to(y.dtype).unsqueeze(-1) * STEP[bits]
    half = 2 ** (bits - 1)
    codes = (y / step).floor().clamp(-half, half - 1) + half
    return codes.to(torch.uint8), scale


def dequantise(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the numbers (..., n) float32 that codes stand for."""
    step = scale.float().unsqueeze(-1) * STEP[bits]
    middle = 0.5 - 2 ** (bits - 1)
    return (codes.float() + middle) * step


def group_errors(y: Tensor, sizes: Sequence[int] = SIZES) -> dict[tuple[int, int], Tensor]:
    """Measure what coding each group of components y (tokens, p) leaves, a mean over tokens: see
    best_groups. Groups begin at multiples of the least size."""
    p = y.size(1)
    alone = (y - y.half().to(y.dtype)).square().mean(0)
    errors = {(1, ALONE): alone.double().cpu()}
    for size in sizes:
        for bits in STEP:
            of_kind = torch.full((p,), math.inf, dtype=torch.float64)
            for first in range(0, p - size + 1, min(sizes)):
                part = y[:, first : first + size]
                error = part - dequantise(*quantise(part, bits), bits)
                of_kind[first] = error.square().sum(1).mean().item()
            errors[size, bits] = of_kind
    return errors


# -------------------- the transform


class Stream(NamedTuple):
    """The principal components of keys or of values, and what is left of them."""

    mean: Tensor  # (p,)
    basis: Tensor  # (p, p), a component each column, largest first
    errors: dict[tuple[int, int], Tensor]  # see best_groups
    dropped: Tensor  # (p,)
    sample: Tensor  # (tokens, p), a calibration sequence, in components

    def encode(self, x: Tensor, r: int) -> Tensor:
        """Return the first r components of x (..., p)."""
        return (x - self.mean) @ self.basis[:, :r]

    def decode(self, y: Tensor) -> Tensor:
        """Return the vectors (..., p) whose first components are y (..., r)."""
        components = self.basis[:, : y.size(-1)]
        return y @ components.T + self.mean

    def on(self, device: torch.device) -> Stream:
        """Return the same on a device, as far as prompts are coded by it."""
        return self._replace(mean=self.mean.to(device), basis=self.basis.to(device))


def principal(xs: list[Tensor], total: Tensor, moment: Tensor, n: int) -> Stream:
    """Return the components of n tokens whose sum is total (p,) and whose sum of squares is moment
    (p, p), both float64. xs: the vectors (tokens, p) of a first sequence."""
    mean = total / n
    covariance = moment / n - mean.outer(mean)
    found = torch.linalg.eigh(covariance.float()).eigenvectors
    basis = found.flip(-1).contiguous()
    mean = mean.float()
    sample = (torch.cat(xs).float() - mean) @ basis
    every = max(1, len(sample) // SAMPLED)
    some = sample[::every]
    dropped = some.square().mean(0).double().cpu()
    return Stream(mean, basis, group_errors(some), dropped, sample)


def calibrate(model: Transformer, batches: Sequence[Tensor], sinks: int = 4) -> list[Stream]:
    """Return the components of keys and of values on ids (B, T) of a text, first tokens left
    out."""
    blocks = coded_layers(model)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def see(i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        number = torch.arange(k.size(2), device=k.device).expand(len(k), -1)
        keys.append(at_least_float32(unturned(k, model, number)))
        values.append(at_least_float32(v))

    total = [0.0, 0.0]
    moment = [0.0, 0.0]
    first: list[list[Tensor]] = [[], []]
    n = 0
    for ids in batches:
        keys.clear()
        values.clear()
        attentions = [block.self_attn for block in blocks]
        with evaluating(model), record_layers(attentions, see):
            model(ids, last_only=True)
        for s, layers in enumerate((keys, values)):
            x = as_vectors(layers)[:, sinks:]
            if not first[s]:
                first[s].append(x[0])
            x = x.flatten(0, 1)
            total[s] = total[s] + x.double().sum(0)
            moment[s] = moment[s] + (x.T @ x).double()
        n += ids.size(0) * (ids.size(1) - sinks)
    check(
        n > 1,
        f"{n} tokens to calibrate on",
        "components are those of several",
        "give a larger --calibration or --block_size",
    )
    return [principal(first[s], total[s], moment[s], n) for s in range(2)]


# -------------------- strings


def write(y: list[Tensor], plan: list[list[Group]]) -> bytes:
    """Return the components of one sequence's keys and values, y[s] (M, r), as bytes."""
    parts = []
    for numbers, groups in zip(y, plan, strict=True):
        for first, size, bits in groups:
            part = numbers[:, first : first + size]
            if size == 1:
                parts.append(to_bytes(part.half()))
                continue
            codes, scale = quantise(part, bits)
            parts.append(to_bytes(scale))
            parts.append(pack_codes(codes.T, bits))
    if not parts:
        return b""
    return torch.cat(parts).cpu().numpy().tobytes()


def read(data: Tensor, n: int, plan: list[list[Group]]) -> list[Tensor]:
    """Return the components [(n, r), (n, r)] float32 that bytes (bytes,) of n tokens stand for."""
    reader = Reader(data)
    out = []
    for groups in plan:
        y = torch.zeros(n, reach_of(groups), device=data.device)
        for first, size, bits in groups:
            if size == 1:
                y[:, first] = reader.halves(n).float()
                continue
            scale = reader.halves(n)
            codes = reader.codes(n * size, bits).view(size, n).T
            y[:, first : first + size] = dequantise(codes, scale, bits)
        out.append(y)
    return out


def reach_of(groups: list[Group]) -> int:
    """Count the components up to the last that has bits."""
    return max((g.first + g.size for g in groups), default=0)


def planned(streams: list[Stream], bits: float) -> list[list[Group]]:
    """Return the groups of keys and of values with which a calibration token has so many bits, half
    of them its keys', after DEFLATE."""
    best: list[list[Group]] = [[], []]
    asked = bits
    for _ in range(4):
        budget = int(asked / 2)
        plan = [best_groups(s.errors, s.dropped, budget) for s in streams]
        deflated = zlib.compress(write([s.sample for s in streams], plan))
        got = 8 * len(deflated) / len(streams[0].sample)
        if got <= bits:
            best = plan
        asked *= bits / got * 0.999
    return best


class KvtcCodec(nn.Module):
    """What turns a prompt of all layers into strings and back. ValueError where the share holds
    fewer bytes than the tokens that stay whole.

    n_tokens: of the prompts that the share is meant for"""

    name = "kvtc"

    def __init__(self, model: Transformer, streams: list[Stream], kept: Kept, n_tokens: int):
        super().__init__()
        self.kept = kept
        self.streams = streams
        self._model = (model,)  # in a tuple, so that it does not become a part of this module
        p = len(streams[0].mean)
        n_middle = max(0, n_tokens - kept.whole)
        room = kept.share * n_tokens - min(n_tokens, kept.whole)
        check(
            room > 0 or not n_middle,
            f"a share of {kept.share:g} of {n_tokens} tokens",
            f"{kept.whole} of them stay whole",
            "give a larger share, a smaller --query or longer contexts",
        )
        self.plan: list[list[Group]] = [[], []]
        if n_middle:
            bits = room * 2 * p * 16
            self.plan = planned(streams, bits / n_middle)

    def _apply(self, fn: Callable, recurse: bool = True) -> KvtcCodec:
        """Take the components where the model goes. They keep their type, unlike its weights."""
        super()._apply(fn, recurse)
        device = fn(self.streams[0].mean).device
        self.streams = [stream.on(device) for stream in self.streams]
        return self

    def constants(self) -> dict[str, Tensor]:
        names = ("keys", "values")
        named = zip(names, self.streams, strict=True)
        return {f"{name}_basis": stream.basis for name, stream in named}

    def basis_bytes(self) -> int:
        """Count the bytes in 16 bits of the means and of the components that have bits."""
        p = len(self.streams[0].mean)
        return sum(2 * p * (1 + reach_of(groups)) for groups in self.plan)

    def described(self) -> str:
        """Return how it codes, in a few words."""
        of_keys, of_values = (reach_of(groups) for groups in self.plan)
        megabytes = self.basis_bytes() / 1e6
        components = f"{of_keys}+{of_values} components, {megabytes:.1f} MB of them apart"
        return f"in {self.kept.share:.1%}, {components}"

    def encode(self, middles: list[Middle]) -> list[Tensor]:
        """Return the strings (bytes,) uint8 of all sequences; middles: of each layer."""
        number = middles[0].number
        counts = middles[0].there.sum(1).tolist()
        keys = [unturned(m.k, self._model[0], number) for m in middles]
        values = [m.v for m in middles]
        y = []
        streams = zip(self.streams, (keys, values), self.plan, strict=True)
        for stream, layers, groups in streams:
            x = at_least_float32(as_vectors(layers)).float()
            y.append(stream.encode(x, reach_of(groups)))
        written = []
        for b, n in enumerate(counts):
            own = [t[b, :n] for t in y]
            written.append(write(own, self.plan))
        with ThreadPoolExecutor() as pool:
            deflated = list(pool.map(zlib.compress, written))
        return [as_tensor(s, number.device) for s in deflated]

    def read(self, cache: CodedCache) -> None:
        """Decode the strings, which the last layer's cache holds, for the caches of all layers."""
        caches = [c for c in cache.prompt.layers if isinstance(c, CodedCache)]
        strings = [s.cpu().numpy().tobytes() for s in caches[-1].strings()]
        with ThreadPoolExecutor() as pool:
            inflated = list(pool.map(zlib.decompress, strings))
        counts = cache.n_coded.tolist()
        device = cache.n_coded.device
        number, there = cache.middle_columns()
        coded = []
        for data, n in zip(inflated, counts, strict=True):
            coded.append(read(as_tensor(data, device), n, self.plan))
        Hkv = cache.window_k.size(1)
        whole = []
        for s, stream in enumerate(self.streams):
            y = pad_sequence([of_sequence[s] for of_sequence in coded], batch_first=True)
            x = stream.decode(y).to(cache.dtype)
            by_layer = x.unflatten(-1, (len(caches), Hkv, -1))
            whole.append(by_layer.permute(2, 0, 3, 1, 4))  # (L, B, Hkv, T, D)
        for layer, k, v in zip(caches, *whole, strict=True):
            k = unturned(k, self._model[0], number, back=True)
            layer.middle = Decoded(k, v.contiguous(), there[:, None])


def as_tensor(data: bytes, device) -> Tensor:
    """Return bytes as (n,) uint8."""
    numbers = np.frombuffer(data, np.uint8).copy()
    return torch.from_numpy(numbers).to(device)


def attach(model: Transformer, streams: list[Stream], kept: Kept, n_tokens: int) -> Transformer:
    """Let all layers but those that slide code prompts of n_tokens together, in place;
    coded.detach undoes it. Returns the model. ValueError where the share is too small."""
    check_kept(kept)
    return attach_together(model, KvtcCodec(model, streams, kept, n_tokens))
