"""RDKV's rule (arXiv 2605.08317, rate-distortion bit allocation for the KV cache): every token of
the values and every channel of the keys gets 16, 8, 4, 2 or 0 bits a number, once, after a prompt.

Dropping and rounding are two ends of one scale then, and what decides is how much attention's
output errs. With p_ij the attention of the prompt's newest queries i to token j, o_i what they read
and e an error of what is stored, a square being convex and to first order,

    values that err          |sum_j p_ij e_j|^2            <= sum_j p_ij |e_j|^2
    values that are gone     |sum_j p_ij (v_j - o_i)|^2    <= sum_j p_ij |v_j - o_i|^2
                             (the others take their share)
    a key channel that errs  |sum_j p_ij q_ic e_jc (v_j - o_i)|^2 / D    <= sum_j a_ijc e_jc^2

                             with a_ijc = q_ic^2 p_ij |v_j - o_i|^2 / D

and a mean over i of each. p_ij is the largest of its POOL neighbours', as in SnapKV.

So each token and each channel has a distortion W(b) for each number of bits b, in one unit, and a
cost C(b) in bits. Reverse water-filling gives bits where they lower the distortion fastest: for a
water level theta each takes

    b = argmin W(b) + theta C(b),

and theta is the lowest at which everything fits. One level serves a layer's heads. W(b) is measured
with the quantiser itself: codes = round((x - low) / step), step and low of a token's values, or of
a channel's keys in all tokens that are kept, both float16. A token whose value has no bits is
dropped, its key too; a channel without bits reads as its mean.

Differs: only the rule as the paper's summary tells it was at hand, and the weights above are
derived from it here (pooled, and not squared as independent errors would have it, for both leave
less on validation text); W(b) is measured, where theory has 2^-2b; 16 bits are float16; the first 4
tokens and the query region stay whole; generated tokens stay whole. The numbers that attention
reads are decoded once (coded.py). Plain PyTorch: it shows bytes and what is lost.

Letters: storage/layout.py; M tokens that are coded, W newest queries, n query heads of a KV head,
levels 0 to 4 for BITS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from baselines.coded import (
    CodedCache,
    CodedPath,
    Decoded,
    Kept,
    Middle,
    Reader,
    check_kept,
    coded_layers,
    pack_codes,
    to_bytes,
)
from baselines.kivi import dequantise, quantise
from config import check
from model import Transformer, attention_mask
from selection.relevance import pooled
from storage.layout import at_least_float32, soft_cap

BITS = (0, 2, 4, 8, 16)
CODED = (1, 2, 3)  # levels that have codes and a step
POOL = 5  # tokens that share the attention of the one with most
OBSERVERS = 16  # newest queries whose attention says what matters
HALVINGS = 40  # of the interval that the water level is in
STEP_BITS = 32  # a step and a least number
LEVEL_BITS = 4  # what a level is stored in


# -------------------- the rule


class Distortion(NamedTuple):
    """What every level costs attention's output, of one layer."""

    tokens: Tensor  # (B, Hkv, M, 5), of each value
    channels: Tensor  # (B, Hkv, M, D, 5), of each number of the keys
    there: Tensor  # (B, 1, M) bool, columns that hold a token


class Levels(NamedTuple):
    """The bits of one layer, as levels."""

    tokens: Tensor  # (B, Hkv, M) uint8, of the values; 0: dropped
    channels: Tensor  # (B, Hkv, D) uint8, of the keys


def token_costs(D: int, device) -> Tensor:
    """Count the bits of a token's value in every level: (5,) float64."""
    return torch.tensor([b * D + STEP_BITS * (0 < b < 16) for b in BITS], device=device).double()


def channel_costs(n_kept: Tensor) -> Tensor:
    """Count the bits of a key channel of n_kept (...) tokens in every level: (..., 5) float64."""
    bits = torch.tensor(BITS, device=n_kept.device).double()
    # a channel without bits has its mean
    steps = torch.tensor([16, STEP_BITS, STEP_BITS, STEP_BITS, 0], device=n_kept.device)
    return n_kept.double().unsqueeze(-1) * bits + steps


def at_water_level(d: Distortion, theta: Tensor) -> tuple[Levels, Tensor]:
    """Return what everything takes at water levels theta (B,), and the bits of it all, (B,)."""
    D = d.channels.size(3)
    level = theta[:, None, None, None]
    costs = token_costs(D, theta.device)
    tokens = (d.tokens + level * costs).argmin(-1)
    tokens = tokens * d.there
    kept = tokens > 0
    total = torch.einsum("bhmdl,bhm->bhdl", d.channels, kept.to(d.channels.dtype))
    channel_cost = channel_costs(kept.sum(-1)).unsqueeze(2)  # (B, Hkv, 1, 5)
    channels = (total + level * channel_cost).argmin(-1)
    of_channels = channel_cost.expand_as(total).gather(-1, channels.unsqueeze(-1))
    bits = costs[tokens].sum((1, 2)) + of_channels.sum((1, 2, 3))
    return Levels(tokens.to(torch.uint8), channels.to(torch.uint8)), bits


def fill(d: Distortion, budget: Tensor) -> Levels:
    """Return the levels at the lowest water level that fits into budget (B,) bits. ValueError
    where none does."""
    scale = d.tokens.amax((1, 2, 3)).double().clamp_min(1e-30)
    low = scale.log() - 40  # everything has all bits
    high = scale.log() + 10  # nothing has any
    _, least = at_water_level(d, high.exp())
    check(
        not (least > budget).any(),
        f"rdkv with {int(budget.min())} bits for a layer of a prompt",
        "its whole tokens take more than the share",
        "give a larger --kv_byte_budgets or longer contexts",
    )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        _, bits = at_water_level(d, middle.exp())
        fits = bits <= budget
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle)
    return at_water_level(d, high.exp())[0]


# -------------------- what matters


def rounded(x: Tensor, level: int) -> Tensor:
    """Return x (..., n) as it is read after coding each n numbers with the bits of a level."""
    if BITS[level] == 0:
        return x.mean(-1, keepdim=True).half().to(x.dtype).expand_as(x)
    if BITS[level] == 16:
        return x.half().to(x.dtype)
    return dequantise(*quantise(x, BITS[level]), x.dtype)


def observed(q: Tensor, k: Tensor, n_pad: Tensor | None, cap: float) -> Tensor:
    """Return the attention (B, H, W, T) of the newest queries of q (B, H, T, D) to k (B, Hkv, T,
    D)."""
    T = q.size(2)
    W = min(OBSERVERS, T)
    n = q.size(1) // k.size(1)
    q = q[:, :, -W:].unflatten(1, (k.size(1), n))
    logits = (q * q.size(-1) ** -0.5) @ k.unsqueeze(2).mT  # (B, Hkv, n, W, T)
    logits = soft_cap(at_least_float32(logits.flatten(1, 2)), cap)
    visible = attention_mask(W, T, n_pad, q.device)
    return logits.masked_fill(~visible, float("-inf")).softmax(-1)


def distortion(middle: Middle, q: Tensor, p: Tensor, o: Tensor) -> Distortion:
    """Measure what every level of every token and channel costs.

    q  (B, Hkv, n, W, D), the newest queries
    p  (B, Hkv, n, W, M), their attention to the middle
    o  (B, Hkv, n, W, D), what they read"""
    k = at_least_float32(middle.k)
    v = at_least_float32(middle.v)
    away = torch.einsum("bhnwd,bhmd->bhnwm", o, v)
    away = v.square().sum(-1)[:, :, None, None] - 2 * away + o.square().sum(-1, keepdim=True)
    gone = p * away.clamp_min(0)  # (B, Hkv, n, W, M)
    weight = p.mean((2, 3))  # (B, Hkv, M)
    tokens = [gone.mean((2, 3))]
    for level in range(1, len(BITS)):
        tokens.append(weight * (v - rounded(v, level)).square().sum(-1))
    n_observers = q.size(2) * q.size(3)
    per_number = torch.einsum("bhnwd,bhnwm->bhmd", q.square(), gone) / (n_observers * q.size(-1))
    channels = []
    for level in range(len(BITS)):
        left = k - rounded_channels(k, middle.there, level)
        channels.append(per_number * left.square())
    there = middle.there[:, None]
    return Distortion(torch.stack(tokens, -1), torch.stack(channels, -1), there)


def rounded_channels(k: Tensor, there: Tensor, level: int) -> Tensor:
    """Return keys (B, Hkv, M, D) as they are read after coding each channel; `there` (B, M)."""
    filled = k
    if not there.all():  # what is not there has the channel's mean
        real = there[:, None, :, None]
        n = real.sum(2, keepdim=True).clamp_min(1)
        mean = (k * real).sum(2, keepdim=True) / n
        filled = torch.where(real, k, mean)
    return rounded(filled.mT, level).mT


# -------------------- bytes


def write(k: Tensor, v: Tensor, tokens: Tensor, channels: Tensor) -> Tensor:
    """Return the bytes (n,) uint8 of one sequence.

    k, v      (Hkv, M, D)
    tokens    (Hkv, M) uint8 levels
    channels  (Hkv, D) uint8 levels"""
    parts = [pack_codes(channels, LEVEL_BITS), pack_codes(tokens, LEVEL_BITS)]
    for head in range(len(k)):
        kept = k[head][tokens[head] > 0].T  # (D, kept)
        if not kept.size(1):
            continue
        own = channels[head]
        parts.append(to_bytes(kept[own == 0].mean(-1).half()))
        for level in CODED:
            parts += coded_rows(kept[own == level], BITS[level])
        parts.append(to_bytes(kept[own == 4].half()))
    for level in CODED:
        parts += coded_rows(v[tokens == level], BITS[level])
    parts.append(to_bytes(v[tokens == 4].half()))
    return torch.cat(parts)


def coded_rows(x: Tensor, bits: int) -> list[Tensor]:
    """Return rows x (rows, n) as bytes: steps, least numbers, codes."""
    if not x.numel():
        return []
    codes, step, low = quantise(x, bits)
    return [to_bytes(step), to_bytes(low), pack_codes(codes, bits)]


def read_rows(reader: Reader, rows: int, n: int, bits: int) -> Tensor:
    """Return the rows (rows, n) float32 that coded_rows has written."""
    step = reader.halves(rows)
    low = reader.halves(rows)
    codes = reader.codes(rows * n, bits).view(rows, n)
    return dequantise(codes, step, low, torch.float32)


def read(data: Tensor, Hkv: int, M: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what bytes (n,) of one sequence of M tokens stand for: k, v (Hkv, M, D) float32, 0
    where a token was dropped, and which were kept, (Hkv, M) bool."""
    reader = Reader(data)
    channels = reader.codes(Hkv * D, LEVEL_BITS).view(Hkv, D)
    tokens = reader.codes(Hkv * M, LEVEL_BITS).view(Hkv, M)
    kept = tokens > 0
    k = torch.zeros(Hkv, M, D, device=data.device)
    v = torch.zeros_like(k)
    count = kept.sum(-1).tolist()
    sizes = level_counts(channels).tolist()
    for head, n in enumerate(count):
        if not n:
            continue
        of_head = torch.zeros(D, n, device=data.device)
        own = channels[head]
        of_head[own == 0] = reader.halves(sizes[head][0]).float().unsqueeze(-1)
        for level in CODED:
            of_head[own == level] = read_rows(reader, sizes[head][level], n, BITS[level])
        of_head[own == 4] = reader.halves(sizes[head][4] * n).float().view(-1, n)
        k[head, kept[head]] = of_head.T
    rows = level_counts(tokens).sum(0).tolist()
    for level in CODED:
        v[tokens == level] = read_rows(reader, rows[level], D, BITS[level])
    v[tokens == 4] = reader.halves(rows[4] * D).float().view(-1, D)
    return k, v, kept


def level_counts(levels: Tensor) -> Tensor:
    """Count how often each level is among levels (..., n): (..., 5) int64."""
    return torch.stack([(levels == i).sum(-1) for i in range(len(BITS))], -1)


class RdkvCodec:
    """What turns one layer's prompt into strings and back."""

    name = "rdkv"

    def __init__(self, kept: Kept):
        self.kept = kept

    def constants(self) -> dict[str, Tensor]:
        return {}

    def described(self) -> str:
        """Return how it codes, in a few words."""
        return f"tokens and channels in {self.kept.share:.1%}"

    def budget(self, cache: CodedCache) -> Tensor:
        """Return the bits (B,) for the codes of each sequence of a layer."""
        _, Hkv, _, D = cache.window_k.shape
        whole = 2 * 16 * Hkv * D  # bits of a token
        n = cache.lengths.double()
        levels = LEVEL_BITS * Hkv * (cache.n_coded + D + 1)
        return self.kept.share * n * whole - cache.n_window * whole - levels - 8 * 64

    def read(self, cache: CodedCache) -> None:
        """Decode the strings of a layer's cache: kept tokens from slot 0 on, of each head."""
        B, Hkv, _, D = cache.window_k.shape
        counts = cache.n_coded.tolist()
        device = cache.n_coded.device
        k = torch.zeros(B, Hkv, max(counts, default=0), D, device=device)
        v = torch.zeros_like(k)
        kept = torch.zeros_like(k[..., 0], dtype=torch.bool)
        for b, (data, n) in enumerate(zip(cache.strings(), counts, strict=True)):
            if n:
                k[b, :, :n], v[b, :, :n], kept[b, :, :n] = read(data, Hkv, n, D)
        cache.middle = Decoded(k.to(cache.dtype), v.to(cache.dtype), kept)


class RdkvPath(CodedPath):
    """One layer that gives its prompt's tokens and channels their bits."""

    def code(self, cache: CodedCache, middle: Middle, q, k, v, y, n_pad) -> None:
        M = middle.k.size(2)
        if not M:
            cache.set_payload([cache.payload] * len(q))
            return
        p = observed(q, k, n_pad, self.cap)
        W = p.size(2)
        pad = torch.zeros_like(cache.n_window) if n_pad is None else n_pad
        column = (pad[:, None] + middle.number).clamp_max(k.size(2) - 1)
        p = p.take_along_dim(column[:, None, None], 3)
        p = pooled(p, POOL) * middle.there[:, None, None]
        by_head = [t.unflatten(1, (self.Hkv, -1)) for t in (q[:, :, -W:], p, y[:, :, -W:])]
        measured = distortion(middle, *map(at_least_float32, by_head))
        levels = fill(measured, self.codec.budget(cache))
        strings = []
        for b, n in enumerate(cache.n_coded.tolist()):
            numbers = (middle.k[b, :, :n], middle.v[b, :, :n])
            strings.append(write(*numbers, levels.tokens[b, :, :n], levels.channels[b]))
        cache.set_payload(strings)


def attach(model: Transformer, kept: Kept) -> Transformer:
    """Let all layers but those that slide give their prompts bits, in place; coded.detach undoes
    it. Returns the model. ValueError for a share that is none."""
    check_kept(kept)
    for block in coded_layers(model):
        block.self_attn.kv_path = RdkvPath(model.cfg, RdkvCodec(kept))
    return model
