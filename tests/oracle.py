"""A transformer with compressed storage, written from the equations alone: token by token, in numpy
and float64, with plain lists of tokens. It shares no code with the project and no idea of how
anything lies in memory, so that caches can be compared with it after any sequence of operations.

    oracle = Oracle(model)               # of the weights as they are now
    row = Row(oracle)                    # one sequence
    row.prefill([3, 1, 4])               # (3, vocab)
    row.decode(1)                        # (vocab,)

A token of a layer is (k (Hkv, D), v (Hkv, D), x (n_embd,)); what attention reads of it is
(k, v, there): there (Hkv,) bool says which heads have it, None for all. Integers are taken in
float32 with steps of float16, as docs/format.md says; everything else is float64. Which pairs of a
prompt a selector keeps is not computed here: it is given.

Letters: storage/layout.py."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
from torch import nn

from baselines.shared_heads import ReaderLayer, SourceLayer
from kv_router import ValueGroupPath
from mixsga import GroupedHeads
from model import DensePath, Transformer
from selector import SelectPath

# -------------------- plain functions


def array(t) -> np.ndarray:
    """A float64 copy of a tensor."""
    return t.detach().double().numpy().copy()


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt((x * x).mean() + eps) * weight


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """RoPE of x (heads, D): the pair (i, i + D/2) turns by position * theta^(-2i/D). Tables hold
    float32."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-2 * np.arange(half) / (2 * half))
    cos = np.cos(angle).astype(np.float32)
    sin = np.sin(angle).astype(np.float32)
    a = x[:, :half]
    b = x[:, half:]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q: np.ndarray, read: list[tuple]) -> np.ndarray:
    """One query q (H, D) over what is read: (H, D)."""
    n_kv = read[0][0].shape[0]
    n = len(q) // n_kv
    out = np.zeros_like(q)
    k = np.stack([token[0] for token in read])
    v = np.stack([token[1] for token in read])
    gone = [i for i, token in enumerate(read) if token[2] is not None]
    for h in range(n_kv):
        logits = k[:, h] @ q[h * n : h * n + n].T / math.sqrt(q.shape[1])  # (tokens, n)
        for i in gone:
            if not read[i][2][h]:
                logits[i] = -np.inf
        p = np.exp(logits - logits.max(0))
        out[h * n : h * n + n] = (p / p.sum(0)).T @ v[:, h]
    return out


def best(scores: np.ndarray, k: int) -> list[int]:
    """The k largest, in ascending order; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:k])


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([t / 2 * (1 + math.erf(t / math.sqrt(2))) for t in x])


# -------------------- integers


def steps_of(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Step and middle of numbers between low and high, float32 that float16 can hold."""
    step = np.clip((high - low) / np.float32(2**bits - 1), np.float32(2.0**-24), np.float32(65504))
    middle = np.clip(low + np.float32(2 ** (bits - 1)) * step, -65504, 65504)
    return step.astype(np.float16), middle.astype(np.float16)


def rounded(x: np.ndarray, low, high, bits: int) -> np.ndarray:
    """Numbers x, float32, as b-bit integers between low and high stand for them: float64."""
    step, middle = (t.astype(np.float32) for t in steps_of(low, high, bits))
    place = (x - middle) / step + np.float32(2 ** (bits - 1) + 0.5)
    code = np.clip(np.floor(place), 0, 2**bits - 1).astype(np.float64)
    return (code - 2 ** (bits - 1)) * step.astype(np.float64) + middle.astype(np.float64)


def rounded_keys(keys: np.ndarray, bits: int) -> np.ndarray:
    """Keys (tokens, ...) of one block: every channel has its step."""
    x = keys.astype(np.float32)
    return rounded(x, x.min(0), x.max(0), bits)


def rounded_value(z: np.ndarray, groups: list[int], S: int, bits: int) -> np.ndarray:
    """One head's value z (D,), of which only the groups kept have a step; zeros elsewhere."""
    out = np.zeros(len(z))
    if groups:
        dims = np.arange(len(z)).reshape(S, -1)[groups].ravel()
        x = z[dims].astype(np.float32)
        out[dims] = rounded(x, x.min(), x.max(), bits)
    return out


LEVEL_BITS = (0, 2, 4, 8)
LEVEL_STEPS = (0.0, 1.0, 0.3359375, 0.050048828125)
TRIED = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0)


def levelled_value(z: np.ndarray, levels: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """One head's value z (D,) with a level for each group, in units of gain (D,): one step, the
    best of those tried, times that of a group's level."""
    S = len(levels)
    d = len(z) // S
    kept = np.repeat(levels > 0, d)
    out = np.zeros(len(z))
    if not kept.any():
        return out
    e = z.astype(np.float32) / gain
    unit = np.repeat(np.array(LEVEL_STEPS, np.float32)[levels], d)[kept]
    zero = np.repeat(np.array([0, 1.5, 8, 128], np.float32)[levels], d)[kept]
    largest = np.repeat(np.array([0, 3, 15, 255], np.float32)[levels], d)[kept]
    weight = (gain * gain)[kept]
    x = e[kept]
    rms = np.sqrt((x * x).mean(dtype=np.float32))

    def codes(step):
        return np.clip(np.round(x / (step.astype(np.float32) * unit) + zero), 0, largest)

    def error(step):
        number = (codes(step) - zero) * step.astype(np.float32) * unit
        return (weight * (number - x) ** 2).sum()

    steps = [np.clip(rms * np.float32(f), 2.0**-24, 65504).astype(np.float16) for f in TRIED]
    step = min(steps, key=error)
    number = (codes(step) - zero).astype(np.float64) * (np.float64(step) * unit.astype(np.float64))
    out[kept] = number * gain[kept].astype(np.float64)
    return out


# -------------------- what a layer stores of one sequence


class Store:
    """Everything, whole; and how tokens of a prompt, or one more, are read and taken in."""

    def __init__(self):
        self.tokens: list[tuple] = []

    def copy(self) -> Store:
        out = copy.copy(self)
        out.tokens = list(self.tokens)
        return out

    def take(self, tokens: list[tuple]) -> None:
        self.tokens += tokens

    def read(self, row: Row) -> list[tuple]:
        return [(k, v, None) for k, v, _ in self.tokens]

    def step(self, row: Row, q: np.ndarray, token: tuple) -> np.ndarray:
        self.take([token])
        return attend(q, self.read(row))

    def prefill(self, row: Row, qs: list, tokens: list[tuple], first: bool, kept) -> list:
        return [self.step(row, q, token) for q, token in zip(qs, tokens, strict=True)]

    def can_truncate(self, n: int) -> bool:
        return True

    def truncate(self, n: int) -> None:
        del self.tokens[n:]


class Sliding(Store):
    """The newest `window` tokens, whole; what came before them is gone."""

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def read(self, row: Row) -> list[tuple]:
        return super().read(row)[-self.window :]

    def can_truncate(self, n: int) -> bool:
        return n >= len(self.tokens) or len(self.tokens) <= self.window


class Groups(Store):
    """Value groups: the newest tokens and the first ones are whole, of the others what is kept."""

    def __init__(self, groups: GroupSettings):
        super().__init__()
        self.g = groups
        self.packed: list[tuple] = []

    def copy(self) -> Groups:
        out = super().copy()
        out.packed = list(self.packed)
        return out

    def take(self, tokens: list[tuple]) -> None:
        g = self.g
        self.tokens += tokens
        n = len(self.tokens) - g.sinks
        left = max(0, (n - g.tail) // g.block * g.block)
        while len(self.packed) < left:
            a = g.sinks + len(self.packed)
            self.packed += g.stored(self.tokens[a : a + g.key_block])

    def read(self, row: Row) -> list[tuple]:
        sinks = self.g.sinks
        whole = [(k, v, None) for k, v, _ in self.tokens]
        return whole[:sinks] + self.packed + whole[sinks + len(self.packed) :]

    def prefill(self, row: Row, qs: list, tokens: list[tuple], first: bool, kept) -> list:
        if self.g.routed_prefill:
            return super().prefill(row, qs, tokens, first, kept)
        old = self.read(row)
        own = [(k, v, None) for k, v, _ in tokens]
        out = [attend(q, old + own[: i + 1]) for i, q in enumerate(qs)]
        self.take(tokens)
        return out

    def can_truncate(self, n: int) -> bool:
        return min(max(n - self.g.sinks, 0), len(self.packed)) % self.g.key_block == 0

    def truncate(self, n: int) -> None:
        super().truncate(n)
        del self.packed[max(0, n - self.g.sinks) :]


class GroupSettings:
    """How value groups are stored, and what is read of those that are."""

    def __init__(self, cfg, Hkv: int, D: int, k: int, enc=None, dec=None, router=None, mlp=None):
        self.S = cfg.n_groups
        self.k = k
        self.Hkv = Hkv
        self.D = D
        self.shared = cfg.mask_scope != "head"
        self.static = cfg.value_router == "static"
        self.enc = enc  # (Hkv, D, D), or None
        self.dec = dec
        self.router = router  # weight and bias
        self.mlp = mlp  # weight and bias, twice
        self.ints = (cfg.key_bits, cfg.value_bits) if cfg.key_bits < 16 else None
        self.key_block = cfg.block if self.ints else 1
        self.block = cfg.block if self.ints else cfg.kv_tail_block
        self.sinks = cfg.first_whole if self.ints else 0
        self.tail = cfg.kv_tail
        self.routed_prefill = cfg.prefill == "routed"

    def encode(self, v: np.ndarray) -> np.ndarray:
        return v if self.enc is None else np.einsum("hd,hde->he", v, self.enc)

    def decode(self, z: np.ndarray) -> np.ndarray:
        return z if self.dec is None else np.einsum("hd,hde->he", z, self.dec)

    def kept(self, z: np.ndarray, x: np.ndarray) -> list[list[int]]:
        """The groups that each head keeps of a token."""
        if self.static:
            return [list(range(self.k))] * self.Hkv
        if self.router is not None:
            scores = (self.router[0] @ x + self.router[1]).reshape(-1, self.S)
        else:
            scores = (z * z).reshape(self.Hkv, self.S, -1).sum(-1)
            if self.shared:
                scores = scores.sum(0, keepdims=True)
        groups = [best(row, self.k) for row in scores]
        return groups if len(groups) == self.Hkv else groups * self.Hkv

    def stored(self, tokens: list[tuple]) -> list[tuple]:
        """What is read of tokens that left the window together."""
        keys = np.stack([k for k, _, _ in tokens])
        if self.ints:
            keys = rounded_keys(keys, self.ints[0])
        return [(k, self.value(v, x), None) for k, (_, v, x) in zip(keys, tokens, strict=True)]

    def value(self, v: np.ndarray, x: np.ndarray) -> np.ndarray:
        """What is read of one token's value (Hkv, D)."""
        if self.k == self.S and not self.ints:
            return v
        z = self.encode(v)
        groups = self.kept(z, x)
        dims = np.arange(self.D).reshape(self.S, -1)
        out = np.zeros_like(z)
        for h in range(self.Hkv):
            if self.ints:
                out[h] = rounded_value(z[h], groups[h], self.S, self.ints[1])
            else:
                at = dims[groups[h]].ravel()
                out[h, at] = z[h, at]
        if self.mlp is not None and self.k < self.S:
            up, up_bias, down, down_bias = self.mlp
            masks = groups[:1] if self.shared else groups
            bits = [float(g in mask) for mask in masks for g in range(self.S)]
            hidden = gelu(up @ np.concatenate((out.ravel(), bits)) + up_bias)
            rebuilt = (down @ hidden + down_bias).reshape(self.Hkv, self.D)
            for h in range(self.Hkv):
                lost = dims[[g for g in range(self.S) if g not in groups[h]]].ravel()
                out[h, lost] = rebuilt[h, lost]
        return self.decode(out)


class Selected(Store):
    """A context of which some is kept, packed once, and everything after it whole. `kept` of a
    prompt: keep (Hkv, C) bool and mask (Hkv, C, S), bool or levels; None where it has no context.
    In integers the first tokens of the context are whole, too."""

    def __init__(self, s: SelectSettings):
        super().__init__()
        self.s = s
        self.context: list[tuple] = []
        self.n_context = 0  # tokens of it, dropped ones included, that are not whole

    def read(self, row: Row) -> list[tuple]:
        return self.context + super().read(row)

    def prefill(self, row: Row, qs: list, tokens: list[tuple], first: bool, kept) -> list:
        if not first or kept is None:
            return super().prefill(row, qs, tokens, first, kept)
        keep, mask = kept
        C = keep.shape[1]
        whole = [(k, v, None) for k, v, _ in tokens]
        out = []
        for i, q in enumerate(qs):
            read = whole[: i + 1]
            if self.s.routed_prefill:
                for t in range(min(i + 1, C)):
                    there = keep[:, t] if t < i else None  # a token reads itself
                    read[t] = (tokens[t][0], self.s.value(tokens[t][1], mask[:, t]), there)
            out.append(attend(q, read))
        sinks = min(self.s.sinks, C)
        self.context = self.s.stored(tokens[sinks:C], keep[:, sinks:], mask[:, sinks:])
        self.n_context = C - sinks
        self.tokens = tokens[:sinks] + tokens[C:]
        return out

    def can_truncate(self, n: int) -> bool:
        there = self.n_context + len(self.tokens)
        return n >= min(there, self.n_context + self.s.sinks) or not self.n_context

    def truncate(self, n: int) -> None:
        super().truncate(max(0, n - self.n_context))


class SelectSettings:
    """How a selected context is stored."""

    def __init__(self, cfg, enc, dec, gain: np.ndarray):
        self.enc = enc
        self.dec = dec
        self.gain = gain  # (Hkv, D) float32
        self.S = cfg.n_groups
        self.ints = (cfg.key_bits, cfg.value_bits) if cfg.key_bits < 16 else None
        self.key_block = cfg.block
        self.sinks = cfg.first_whole if self.ints else 0
        self.routed_prefill = cfg.prefill == "routed"

    def value(self, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """What is read of one token's value (Hkv, D), of which mask (Hkv, S) is kept."""
        z = v if self.enc is None else np.einsum("hd,hde->he", v, self.enc)
        out = np.zeros_like(z)
        for h in range(len(z)):
            groups = [g for g in range(self.S) if mask[h, g]]
            if not self.ints:
                dims = np.arange(len(z[h])).reshape(self.S, -1)[groups].ravel()
                out[h, dims] = z[h, dims]
            elif self.ints[1]:
                out[h] = rounded_value(z[h], groups, self.S, self.ints[1])
            else:
                out[h] = levelled_value(z[h], mask[h], self.gain[h])
        return out if self.dec is None else np.einsum("hd,hde->he", out, self.dec)

    def stored(self, tokens: list[tuple], keep: np.ndarray, mask: np.ndarray) -> list[tuple]:
        """What is read of a context: the keys that a head keeps share steps block by block."""
        keys = [k.copy() for k, _, _ in tokens]
        for h in range(len(keep)):
            mine = [t for t in range(len(tokens)) if keep[h, t]]
            while self.ints and mine:
                block = mine[: self.key_block]
                mine = mine[self.key_block :]
                all_of_it = np.stack([keys[t][h] for t in block])
                for t, key in zip(block, rounded_keys(all_of_it, self.ints[0]), strict=True):
                    keys[t][h] = key
        out = []
        for t, (_, v, _) in enumerate(tokens):
            out.append((keys[t], self.value(v, mask[:, t]), keep[:, t]))
        return out


class Experts(Store):
    """Heads that experts average: the newest tokens are whole, of the others what their expert
    stores. `tokens` are those of the window."""

    def __init__(self, m: MixSettings):
        super().__init__()
        self.m = m
        self.index: list[int] = []  # expert of each token of the window
        self.parts = [Groups(g) for g in m.groups]
        self.seen = np.zeros(len(m.sizes))
        self.n = 0

    def copy(self) -> Experts:
        out = super().copy()
        out.index = list(self.index)
        out.parts = [part.copy() for part in self.parts]
        return out

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Scores (E,) of the next token, relative to their mean so far, which begins with 32
        zeros."""
        m = self.m
        if m.router is not None:
            weight, bias, offset = m.router
            raw = weight @ x + bias
            self.seen = self.seen + raw
            out = raw - self.seen / (self.n + 33) + offset
        elif m.noise is not None:
            out = m.noise[self.n]
        else:
            out = np.zeros(1)
        self.n += 1
        return np.where([not ratio for ratio in m.ratios], -np.inf, out)

    def chosen(self, scores: list[np.ndarray]) -> list[int]:
        """Every token's expert: each expert takes its share of the rest, its best."""
        index = [len(self.m.sizes) - 1] * len(scores)
        rest = list(range(len(scores)))
        for e, ratio in enumerate(self.m.ratios[:-1]):
            rest.sort(key=lambda t: (-scores[t][e], t))
            share = math.ceil(ratio * len(scores))
            for t in rest[:share]:
                index[t] = e
            rest = sorted(rest[share:])
        return index

    def averaged(self, e: int, token: tuple) -> tuple:
        """A token with the heads that expert e stores."""
        size = self.m.sizes[e]
        k, v = (t.reshape(-1, size, t.shape[-1]).mean(1) for t in token[:2])
        return k, v, token[2]

    def spread(self, e: int, read: tuple) -> tuple:
        """What is read of an expert's token, on all heads."""
        size = self.m.sizes[e]
        return np.repeat(read[0], size, 0), np.repeat(read[1], size, 0), None

    def read(self, row: Row) -> list[tuple]:
        out = super().read(row)
        for e, part in enumerate(self.parts):
            out += [self.spread(e, token) for token in part.read(row)]
        return out

    def join(self, tokens: list[tuple], index: list[int]) -> None:
        """Put tokens into the window; what leaves it joins its expert."""
        self.tokens = self.tokens + tokens
        self.index = self.index + index
        while len(self.tokens) > self.m.window:
            e = self.index[0]
            self.parts[e].take([self.averaged(e, self.tokens[0])])
            self.tokens = self.tokens[1:]
            self.index = self.index[1:]

    def step(self, row: Row, q: np.ndarray, token: tuple) -> np.ndarray:
        self.join([token], [int(np.argmax(self.scores(token[2])))])
        return attend(q, self.read(row))

    def prefill(self, row: Row, qs: list, tokens: list[tuple], first: bool, kept) -> list:
        if not first:
            return super().prefill(row, qs, tokens, first, kept)
        index = self.chosen([self.scores(x) for _, _, x in tokens])
        whole = [(k, v, None) for k, v, _ in tokens]
        routed = []
        for e, token in zip(index, tokens, strict=True):
            k, v, x = self.averaged(e, token)
            g = self.m.as_numbers[e]
            routed.append(self.spread(e, (k, g.value(v, x))))
        out = []
        for i, q in enumerate(qs):
            a = max(0, i + 1 - self.m.window)
            out.append(attend(q, routed[:a] + whole[a : i + 1]))
        self.join(tokens, index)
        return out

    def can_truncate(self, n: int) -> bool:
        if n >= self.n or n == 0:
            return True
        left = self.n - len(self.tokens)
        if len(self.parts) > 1:
            return self.m.router is None and n >= left
        return self.parts[0].can_truncate(n)

    def truncate(self, n: int) -> None:
        left = self.n - len(self.tokens)
        if n < left:  # all of it, or there is one expert
            for part in self.parts:
                part.truncate(n)
        if n == 0:
            self.seen = np.zeros(len(self.m.sizes))
        self.tokens = self.tokens[: max(0, n - left)]
        self.index = self.index[: max(0, n - left)]
        self.n = min(self.n, n)


class MixSettings:
    """Experts of a layer: their sizes and shares, who takes a token, how each stores."""

    def __init__(self, path: GroupedHeads):
        self.sizes = path.sizes
        self.ratios = path.ratios
        self.window = path.window
        self.router = None
        self.noise = None
        if path.router is not None:
            tensors = (path.router.weight, path.router.bias, path.offset)
            self.router = tuple(array(t) for t in tensors)
        elif len(path.sizes) > 1:
            self.noise = array(path.noise)
        heads = [path.Hkv // size for size in path.sizes]
        stored_as = path.stored_as
        self.groups = [GroupSettings(stored_as, h, path.D, path.k) for h in heads]
        # a prompt reads what experts would store, without integers
        as_numbers = replace(stored_as, key_bits=16, value_bits=16)
        self.as_numbers = [GroupSettings(as_numbers, h, path.D, path.k) for h in heads]


class Reader(Store):
    """A layer that reads the keys and values of another, but its own of the newest tokens."""

    def __init__(self, below: int, window: int):
        super().__init__()
        self.below = below
        self.window = window
        self.left = 0  # tokens that have left the window

    def take(self, tokens: list[tuple]) -> None:
        super().take(tokens)
        self.left = max(self.left, len(self.tokens) - self.window)

    def read(self, row: Row) -> list[tuple]:
        far = [(k, v, None) for k, v, _ in row.layers[self.below].tokens[: self.left]]
        return far + super().read(row)[self.left :]

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.left = min(self.left, n)


class Oracle:
    """A model's weights in numpy, and for each of its layers an empty Store.

    folded: whether the basis will be folded into the weights before the model is compared; it says
    in which coordinates integers are taken where every group is kept."""

    def __init__(self, model: Transformer, folded: bool = False):
        self.cfg = model.cfg
        self.embed = array(model.embed_tokens.weight)
        self.head = array(model.lm_head.weight)
        self.norm = array(model.norm.weight)
        self.layers = [{name: array(p) for name, p in b.named_parameters()} for b in model.layers]
        self.empty = [self.store(b.self_attn.kv_path, folded) for b in model.layers]

    def store(self, path: nn.Module, folded: bool) -> Store:
        """An empty Store of the kind that this path keeps."""
        if isinstance(path, SelectPath):
            enc, dec = maps(path, folded)
            gain = path.selector.rms[path.index].float().numpy()
            return Selected(SelectSettings(path.selector.stored, enc, dec, gain))
        if isinstance(path, ValueGroupPath):
            return Groups(group_settings(path, folded))
        if isinstance(path, GroupedHeads):
            return Experts(MixSettings(path))
        if isinstance(path, ReaderLayer):
            return Reader(path.below, path.window)
        assert isinstance(path, DensePath | SourceLayer)
        return Sliding(path.window) if getattr(path, "window", 0) else Store()

    def block(self, i: int, x: np.ndarray, position: int) -> tuple:
        """The input of layer i's attention, its query, key and value of one token."""
        w = self.layers[i]
        c = self.cfg
        h = rms_norm(x, w["input_layernorm.weight"], c.norm_eps)

        def project(name: str) -> np.ndarray:
            y = w[f"self_attn.{name}.weight"] @ h
            if c.qkv_bias:
                y = y + w[f"self_attn.{name}.bias"]
            return y.reshape(-1, c.head_dim)

        q = rotate(project("q_proj"), position, c.rope_theta)
        k = rotate(project("k_proj"), position, c.rope_theta)
        return h, q, k, project("v_proj")

    def after(self, i: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """What follows layer i's attention."""
        w = self.layers[i]
        x = x + w["self_attn.o_proj.weight"] @ y.ravel()
        h = rms_norm(x, w["post_attention_layernorm.weight"], self.cfg.norm_eps)
        gate = w["mlp.gate_proj.weight"] @ h
        hidden = gate / (1 + np.exp(-gate)) * (w["mlp.up_proj.weight"] @ h)
        return x + w["mlp.down_proj.weight"] @ hidden

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.head @ rms_norm(x, self.norm, self.cfg.norm_eps)


def maps(path: ValueGroupPath, folded: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The maps of a value into the coordinates that are stored, and back."""
    enc, dec = (array(t) for t in path.basis())
    if not path.keep_all:
        return enc, dec
    # values are taken as they come: in the basis only where W_v holds it
    return (np.linalg.inv(dec), dec) if folded else (None, None)


def group_settings(path: ValueGroupPath, folded: bool) -> GroupSettings:
    """Read the parameters of a path that is not folded yet."""
    enc, dec = maps(path, folded)
    router = None
    if path.router is not None:
        router = (array(path.router.weight), array(path.router.bias))
    mlp = None
    if path.reconstructor is not None:
        r = path.reconstructor
        mlp = tuple(array(t) for t in (r.up.weight, r.up.bias, r.down.weight, r.down.bias))
    return GroupSettings(path.cfg, path.Hkv, path.D, path.k, enc, dec, router, mlp)


class Row:
    """One sequence of a model: its tokens, and what every layer has stored of them."""

    def __init__(self, oracle: Oracle):
        self.oracle = oracle
        self.layers = [store.copy() for store in oracle.empty]
        self.n = 0

    def copy(self) -> Row:
        out = copy.copy(self)
        out.layers = [store.copy() for store in self.layers]
        return out

    def decode(self, token: int) -> np.ndarray:
        """Logits (vocab,) after one more token."""
        o = self.oracle
        x = o.embed[token]
        for i, store in enumerate(self.layers):
            h, q, k, v = o.block(i, x, self.n)
            x = o.after(i, x, store.step(self, q, (k, v, h)))
        self.n += 1
        return o.logits(x)

    def prefill(self, tokens: list[int], first: bool = False, kept=None) -> np.ndarray:
        """Logits (T, vocab) of a prompt or a piece of it.

        first: whether nothing has come before, in any row; kept: see Selected, of every layer."""
        o = self.oracle
        xs = [o.embed[t] for t in tokens]
        for i, store in enumerate(self.layers):
            seen = [o.block(i, x, self.n + j) for j, x in enumerate(xs)]
            queries = [q for _, q, _, _ in seen]
            mine = [(k, v, h) for h, _, k, v in seen]
            ys = store.prefill(self, queries, mine, first, kept and kept[i])
            xs = [o.after(i, x, y) for x, y in zip(xs, ys, strict=True)]
        self.n += len(tokens)
        return np.stack([o.logits(x) for x in xs])

    def can_truncate(self, n: int) -> bool:
        return all(store.can_truncate(n) for store in self.layers)

    def truncate(self, n: int) -> None:
        for store in self.layers:
            store.truncate(n)
        self.n = min(self.n, n)
