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

import numpy as np
from torch import nn

from kv_router import ValueGroupPath
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
        self.key_block = cfg.key_block if self.ints else 1
        self.block = cfg.key_block if self.ints else cfg.kv_tail_block
        self.sinks = cfg.kv_sinks if self.ints else 0
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
            raise NotImplementedError
        if isinstance(path, ValueGroupPath):
            return Groups(group_settings(path, folded))
        assert isinstance(path, DensePath)
        return Store()

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


def group_settings(path: ValueGroupPath, folded: bool) -> GroupSettings:
    """Read the parameters of a path that is not folded yet."""
    enc, dec = (array(t) for t in path.basis())
    if path.k == path.S:
        # values are taken as they come: in the basis only where W_v holds it
        enc = np.linalg.inv(dec) if folded else None
        dec = dec if folded else None
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
