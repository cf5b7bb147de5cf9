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
import torch.nn.functional as F
from torch import Tensor

from baselines.coded import (
    CodedCache,
    CodedPath,
    Decoded,
    Kept,
    Middle,
    check_kept,
    coded_layers,
)
from baselines.kivi import dequantise, quantise
from config import check
from model import Transformer, attention_mask
from selection.relevance import pooled
from storage.layout import at_least_float32, cdiv, soft_cap

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
    costs = []
    for bits in BITS:
        has_step = 0 < bits < 16
        costs.append(bits * D + STEP_BITS * has_step)
    return torch.tensor(costs, device=device).double()


def channel_costs(n_kept: Tensor) -> Tensor:
    """Count the bits of a key channel of n_kept (...) tokens in every level: (..., 5) float64."""
    bits = torch.tensor(BITS, device=n_kept.device).double()
    # a channel without bits has its mean
    besides = (16, STEP_BITS, STEP_BITS, STEP_BITS, 0)
    besides = torch.tensor(besides, device=n_kept.device)
    n_numbers = n_kept.double().unsqueeze(-1)
    return n_numbers * bits + besides


def at_water_level(d: Distortion, theta: Tensor) -> tuple[Levels, Tensor]:
    """Return what everything takes at water levels theta (B,), and the bits of it all, (B,)."""
    D = d.channels.size(3)
    level = theta[:, None, None, None]
    costs = token_costs(D, theta.device)
    cheapest = (d.tokens + level * costs).argmin(-1)
    tokens = cheapest * d.there
    kept = tokens > 0
    counted = kept.to(d.channels.dtype)
    total = torch.einsum("bhmdl,bhm->bhdl", d.channels, counted)
    n_kept = kept.sum(-1)
    channel_cost = channel_costs(n_kept).unsqueeze(2)  # (B, Hkv, 1, 5)
    channels = (total + level * channel_cost).argmin(-1)
    every_cost = channel_cost.expand_as(total)
    of_channels = every_cost.gather(-1, channels.unsqueeze(-1))
    of_tokens = costs[tokens]
    bits = of_tokens.sum((1, 2)) + of_channels.sum((1, 2, 3))
    levels = Levels(tokens.to(torch.uint8), channels.to(torch.uint8))
    return levels, bits


def fill(d: Distortion, budget: Tensor) -> Levels:
    """Return the levels at the lowest water level that fits into budget (B,) bits. ValueError
    where none does."""
    largest = d.tokens.amax((1, 2, 3)).double()
    scale = largest.clamp_min(1e-30).log()
    low = scale - 40  # everything has all bits
    high = scale + 10  # nothing has any
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
    levels, _ = at_water_level(d, high.exp())
    return levels


# -------------------- what matters


def rounded(x: Tensor, level: int) -> Tensor:
    """Return x (..., n) as it is read after coding each n numbers with the bits of a level."""
    if BITS[level] == 0:
        mean = x.mean(-1, keepdim=True).half()
        return mean.to(x.dtype).expand_as(x)
    if BITS[level] == 16:
        return x.half().to(x.dtype)
    codes, step, low = quantise(x, BITS[level])
    return dequantise(codes, step, low, x.dtype)


def observed(q: Tensor, k: Tensor, n_pad: Tensor | None, cap: float) -> Tensor:
    """Return the attention (B, H, W, T) of the newest queries of q (B, H, T, D) to k (B, Hkv, T,
    D)."""
    T = q.size(2)
    W = min(OBSERVERS, T)
    n = q.size(1) // k.size(1)
    newest = q[:, :, -W:]
    by_head = newest.unflatten(1, (k.size(1), n))
    scaled = by_head * q.size(-1) ** -0.5
    logits = scaled @ k.unsqueeze(2).mT  # (B, Hkv, n, W, T)
    logits = at_least_float32(logits.flatten(1, 2))
    logits = soft_cap(logits, cap)
    visible = attention_mask(W, T, n_pad, q.device)
    logits = logits.masked_fill(~visible, float("-inf"))
    return logits.softmax(-1)


def distortion(middle: Middle, q: Tensor, p: Tensor, o: Tensor) -> Distortion:
    """Measure what every level of every token and channel costs.

    q  (B, Hkv, n, W, D), the newest queries
    p  (B, Hkv, n, W, M), their attention to the middle
    o  (B, Hkv, n, W, D), what they read"""
    k = at_least_float32(middle.k)
    v = at_least_float32(middle.v)
    # |v - o|^2 of every token and query
    of_values = v.square().sum(-1)
    of_values = of_values[:, :, None, None]
    of_read = o.square().sum(-1, keepdim=True)
    both = torch.einsum("bhnwd,bhmd->bhnwm", o, v)
    away = of_values - 2 * both + of_read
    gone = p * away.clamp_min(0)  # (B, Hkv, n, W, M)
    weight = p.mean((2, 3))  # (B, Hkv, M)
    tokens = [gone.mean((2, 3))]
    for level in range(1, len(BITS)):
        error = v - rounded(v, level)
        squared = error.square().sum(-1)
        tokens.append(weight * squared)
    n_observers = q.size(2) * q.size(3)
    total = torch.einsum("bhnwd,bhnwm->bhmd", q.square(), gone)
    per_number = total / (n_observers * q.size(-1))
    channels = []
    for level in range(len(BITS)):
        error = k - rounded_channels(k, middle.there, level)
        channels.append(per_number * error.square())
    of_tokens = torch.stack(tokens, -1)
    of_channels = torch.stack(channels, -1)
    there = middle.there.unsqueeze(1)
    return Distortion(of_tokens, of_channels, there)


def rounded_channels(k: Tensor, there: Tensor, level: int) -> Tensor:
    """Return keys (B, Hkv, M, D) as they are read after coding each channel; `there` (B, M)."""
    filled = k
    if not there.all():  # what is not there has the channel's mean
        real = there[:, None, :, None]
        n = real.sum(2, keepdim=True)
        total = (k * real).sum(2, keepdim=True)
        mean = total / n.clamp_min(1)
        filled = torch.where(real, k, mean)
    return rounded(filled.mT, level).mT


# -------------------- bytes

# A sequence's string is its levels, then a row for each key channel and one for each token's
# values. A row with codes has its step and its least number before them, 2 bytes each.


class Layout(NamedTuple):
    """Where the bytes of a batch of sequences lie, in rows as wide as the widest."""

    header: int  # bytes of the levels of the longest sequence
    channel_width: int
    token_width: int
    there: Tensor  # (B, bytes) bool, those that are stored


def pack_in_order(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., n) as bytes: the first n' of them are in the first cdiv(n' bits, 8)."""
    each = 8 // bits
    missing = -codes.size(-1) % each
    codes = F.pad(codes, (0, missing)).long()
    codes = codes.unflatten(-1, (-1, each))
    place = torch.arange(each, device=codes.device)
    data = codes << bits * place
    return data.sum(-1).to(torch.uint8)


def unpack_in_order(data: Tensor, bits: int, n: int) -> Tensor:
    """Return the first n codes (..., n) uint8 of bytes that pack_in_order has packed."""
    each = 8 // bits
    place = torch.arange(each, dtype=torch.uint8, device=data.device)
    shifted = data.unsqueeze(-1) >> bits * place
    codes = shifted & 2**bits - 1
    return codes.flatten(-2)[..., :n]


def row_bytes(levels: Tensor, n: Tensor, of_mean: int) -> Tensor:
    """Count the bytes of rows of n (...) numbers with these levels (...), none of rows without
    numbers. of_mean: bytes of a row without bits."""
    level = levels.long()
    bits = torch.tensor(BITS, device=level.device)
    extra = torch.tensor([of_mean, 4, 4, 4, 0], device=level.device)
    of_codes = cdiv(n * bits[level], 8)
    size = of_codes + extra[level]
    return size * (n > 0)


def layout_of(levels: Levels, n_coded: Tensor) -> Layout:
    """Return where the bytes of sequences of n_coded (B,) tokens lie."""
    _, Hkv, M = levels.tokens.shape
    D = levels.channels.size(2)
    n_kept = (levels.tokens > 0).sum(-1, keepdim=True)
    of_header = cdiv(Hkv * (D + n_coded), 2)
    n_kept = n_kept.expand(-1, -1, D)
    of_channels = row_bytes(levels.channels, n_kept, 2)
    n_numbers = torch.full_like(levels.tokens, D, dtype=torch.int64)
    of_tokens = row_bytes(levels.tokens, n_numbers, 0)
    header = cdiv(Hkv * (D + M), 2)
    widths = (4 + 2 * M, 4 + 2 * D)
    place = torch.arange(header, device=n_coded.device)
    masks = [place < of_header.unsqueeze(1)]
    for sizes, width in zip((of_channels, of_tokens), widths, strict=True):
        place = torch.arange(width, device=n_coded.device)
        stored = place < sizes.unsqueeze(-1)
        masks.append(stored.flatten(1))
    there = torch.cat(masks, 1)
    return Layout(header, *widths, there)


def as_rows(x: Tensor, levels: Tensor, width: int, mean: Tensor | None = None) -> Tensor:
    """Return rows of numbers x (..., n) as bytes (..., width) uint8, with the bits of their levels
    (...); mean (...): of those without bits."""
    out = torch.zeros(*levels.shape, width, dtype=torch.uint8, device=x.device)
    if mean is not None:
        of_mean = mean.half().unsqueeze(-1)
        out[..., :2] = of_mean.view(torch.uint8)
    for level in (*CODED, 4):
        if level == 4:
            row = in_a_row(x.half()).view(torch.uint8)
        else:
            codes, step, low = quantise(x, BITS[level])
            scale = torch.stack((step, low), -1).view(torch.uint8)
            coded = pack_in_order(codes, BITS[level])
            row = torch.cat((scale, coded), -1)
        missing = width - row.size(-1)
        row = F.pad(row, (0, missing))
        here = (levels == level).unsqueeze(-1)
        out = torch.where(here, row, out)
    return out


def in_a_row(x: Tensor) -> Tensor:
    """Return x with its numbers one after the other in memory, as a view of another size wants."""
    return x.clone(memory_format=torch.contiguous_format)


def halves(data: Tensor) -> Tensor:
    """Return the float16 numbers (..., n) in bytes (..., 2 n) as float32."""
    return in_a_row(data).view(torch.float16).float()


def from_rows(data: Tensor, levels: Tensor, n: int, means: bool) -> Tensor:
    """Return the numbers (..., n) float32 that as_rows has written; 0 without bits, or with `means`
    the mean."""
    out = torch.zeros(*levels.shape, n, device=data.device)
    if means:
        out = halves(data[..., :2]).expand_as(out)
    for level in (*CODED, 4):
        if level == 4:
            row = halves(data[..., : 2 * n])
        else:
            bits = BITS[level]
            scale = in_a_row(data[..., :4])
            step, low = scale.view(torch.float16).unbind(-1)
            end = 4 + cdiv(n * bits, 8)
            codes = unpack_in_order(data[..., 4:end], bits, n)
            row = dequantise(codes, step, low, torch.float32)
        here = (levels == level).unsqueeze(-1)
        out = torch.where(here, row, out)
    return out


def kept_first(tokens: Tensor) -> Tensor:
    """Return the order (B, Hkv, M) in which kept tokens come first, else as they were."""
    dropped = (tokens == 0).to(torch.uint8)
    _, order = dropped.sort(dim=-1, stable=True)
    return order


def write(k: Tensor, v: Tensor, levels: Levels, n_coded: Tensor) -> list[Tensor]:
    """Return the strings (bytes,) uint8 of sequences of n_coded (B,) tokens, k, v (B, Hkv, M,
    D)."""
    layout = layout_of(levels, n_coded)
    of_channels = levels.channels.flatten(1)
    of_tokens = levels.tokens.mT.flatten(1)
    every = torch.cat((of_channels, of_tokens), 1)
    order = kept_first(levels.tokens).unsqueeze(-1)
    k = at_least_float32(k)
    v = at_least_float32(v)
    kept = k.take_along_dim(order, 2).mT  # (B, Hkv, D, M)
    n_kept = (levels.tokens > 0).sum(-1, keepdim=True)
    column = torch.arange(kept.size(-1), device=k.device)
    there = column < n_kept.unsqueeze(-1)
    total = (kept * there).sum(-1)
    mean = total / n_kept.clamp_min(1)
    kept = torch.where(there, kept, kept[..., :1])  # they widen no step
    header = pack_in_order(every, LEVEL_BITS)
    of_keys = as_rows(kept, levels.channels, layout.channel_width, mean)
    of_values = as_rows(v, levels.tokens, layout.token_width)
    padded = torch.cat((header, of_keys.flatten(1), of_values.flatten(1)), 1)
    data = padded[layout.there]
    lengths = layout.there.sum(1).tolist()
    return list(data.split(lengths))


def read(strings: list[Tensor], n_coded: Tensor, Hkv: int, D: int) -> Decoded:
    """Return what strings of sequences of n_coded (B,) tokens stand for, 0 where a token was
    dropped."""
    B = len(strings)
    M = int(n_coded.max())
    header = cdiv(Hkv * (D + M), 2)
    first = []
    for s in strings:
        missing = max(0, header - len(s))
        padded = F.pad(s[:header], (0, missing))
        first.append(padded)
    headers = torch.stack(first)
    every = unpack_in_order(headers, LEVEL_BITS, Hkv * (D + M))
    channels, tokens = every.split((Hkv * D, Hkv * M), 1)
    channels = channels.view(B, Hkv, D)
    tokens = tokens.view(B, M, Hkv).mT
    column = torch.arange(M, device=n_coded.device)
    there = column < n_coded.unsqueeze(1)
    tokens = tokens * there.unsqueeze(1)
    levels = Levels(tokens, channels)
    layout = layout_of(levels, n_coded)
    data = torch.zeros(layout.there.shape, dtype=torch.uint8, device=n_coded.device)
    data[layout.there] = torch.cat(strings)
    of_keys = Hkv * D * layout.channel_width
    of_values = Hkv * M * layout.token_width
    _, of_channels, of_tokens = data.split((header, of_keys, of_values), 1)
    rows = of_channels.view(B, Hkv, D, layout.channel_width)
    sorted_k = from_rows(rows, channels, M, means=True).mT  # (B, Hkv, M, D)
    order = kept_first(tokens).unsqueeze(-1)
    order = order.expand_as(sorted_k)
    kept = tokens > 0
    k = torch.zeros_like(sorted_k)
    k = k.scatter(2, order, sorted_k)
    k = k * kept.unsqueeze(-1)
    rows = of_tokens.view(B, Hkv, M, layout.token_width)
    v = from_rows(rows, tokens, D, means=False)
    return Decoded(k, v, kept)


class RdkvCodec:
    """What turns one layer's prompt into strings and back."""

    name = "rdkv"

    def __init__(self, kept: Kept):
        self.kept = kept

    def constants(self) -> dict[str, Tensor]:
        """Return the model's tensors that are needed to read strings: none."""
        return {}

    def described(self) -> str:
        """Return how it codes, in a few words."""
        return f"tokens and channels in {self.kept.share:.1%}"

    def budget(self, cache: CodedCache) -> Tensor:
        """Return the bits (B,) for the codes of each sequence of a layer."""
        _, Hkv, _, D = cache.window_k.shape
        whole = 2 * 16 * Hkv * D  # bits of a token
        n = cache.lengths.double()
        in_window = cache.n_window * whole
        levels = LEVEL_BITS * Hkv * (cache.n_coded + D)
        filled_up = 8 * Hkv * D  # a channel's last byte
        counts = 64 * 4
        held = in_window + levels + filled_up + counts
        return self.kept.share * n * whole - held

    def read(self, cache: CodedCache) -> None:
        """Decode the strings of a layer's cache."""
        _, Hkv, _, D = cache.window_k.shape
        strings = cache.strings()
        k, v, kept = read(strings, cache.n_coded, Hkv, D)
        k = k.to(cache.dtype)
        v = v.to(cache.dtype)
        cache.middle = Decoded(k, v, kept)


class RdkvPath(CodedPath):
    """One layer that gives its prompt's tokens and channels their bits."""

    def code(self, cache: CodedCache, middle: Middle, q, k, v, y, n_pad) -> None:
        """Code the middle of a prompt into the cache's strings.

        q      (B, H, T, D), the prompt's queries
        k, v   (B, Hkv, T, D), its keys and values
        y      (B, H, T, D), what its queries read
        n_pad  (B,), left padding of each row, or None"""
        M = middle.k.size(2)
        if not M:
            cache.set_payload([cache.payload] * len(q))
            return
        p = observed(q, k, n_pad, self.cap)
        W = p.size(2)
        column = middle.number
        if n_pad is not None:
            column = column + n_pad.unsqueeze(1)
        column = column.clamp_max(k.size(2) - 1)
        p = p.take_along_dim(column[:, None, None], 3)
        p = pooled(p, POOL) * middle.there[:, None, None]
        newest = (q[:, :, -W:], p, y[:, :, -W:])
        by_head = [t.unflatten(1, (self.Hkv, -1)) for t in newest]
        measured = distortion(middle, *map(at_least_float32, by_head))
        budget = self.codec.budget(cache)
        levels = fill(measured, budget)
        strings = write(middle.k, middle.v, levels, cache.n_coded)
        cache.set_payload(strings)


def attach(model: Transformer, kept: Kept) -> Transformer:
    """Let all layers but those that slide give their prompts bits, in place; coded.detach undoes
    it. Returns the model. ValueError for a share that is none."""
    check_kept(kept)
    for block in coded_layers(model):
        block.self_attn.kv_path = RdkvPath(model.cfg, RdkvCodec(kept))
    return model
