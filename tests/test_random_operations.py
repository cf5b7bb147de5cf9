"""Operations on caches in any order, compared with an oracle that knows nothing but the equations
(oracle.py): prompts in pieces and padded batches, decoding, selecting, joining, truncating, saving
and loading, prompts that fail half-way. After each, logits, lengths and bytes are what they must
be, for every sequence, whatever its neighbours were.

A failure prints the seed, the settings and every operation up to it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import perturb_basis, randomise, tokens
from oracle import Oracle, Row

import kv_router
import mixsga
import selector
from baselines import shared_heads
from config import KVConfig, ModelConfig, SelectConfig
from model import Transformer
from settings.experts import MixConfig
from storage.cache import KVCache, PromptState
from storage.integers.codecs import IntCodec
from storage.integers.format import Ints
from storage.packed import FloatCodec, ValueBasis

VOCAB = 23
CONTEXT = 220
TOLERANCE = 1e-8  # of the largest logit; float64, but tables of positions are float32
STEPS = 30  # operations of one session


def random_model(
    rng: random.Random,
    seed: int,
    D: int,
    heads: tuple[int, ...],
    least_layers: int = 1,
    slides: bool = False,
) -> Transformer:
    """A small model with large random weights, in float64. No narrower than a head: else some
    coordinates of values would be nothing but rounding, and which group of them is kept, too.
    slides: whether every other layer of some of these models slides."""
    n_kv_head = rng.choice(heads)
    apart = random.Random(seed)
    cfg = ModelConfig(
        vocab_size=VOCAB,
        block_size=CONTEXT,
        n_layer=rng.choice([n for n in (1, 2, 3) if n >= least_layers]),
        n_embd=24 if D > 8 else rng.choice([12, 24]),
        n_head=n_kv_head * rng.choice([1, 2, 3]),
        n_kv_head=n_kv_head,
        head_dim=D,
        n_inner=20,
        qkv_bias=rng.random() < 0.5,
        tie_embeddings=rng.random() < 0.5,
    )
    if slides and cfg.n_layer > 1 and apart.random() < 0.5:
        cfg = replace(cfg, sliding_window=apart.choice([1, 2, 5, 9, 30]))
    torch.manual_seed(seed)
    return randomise(Transformer(cfg), 0.35).double().eval()


def some_layers(rng: random.Random, cfg: ModelConfig) -> str:
    """All layers, or some of them, one at least that does not slide."""
    n_layer = cfg.n_layer
    if n_layer == 1 or rng.random() < 0.6:
        return "all"
    picked = rng.sample(range(n_layer), rng.randint(1, n_layer - 1))
    if all(cfg.slides(i) for i in picked):
        return "all"
    return ",".join(str(i) for i in sorted(picked))


def dense(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    model = random_model(rng, seed, rng.choice([2, 8, 16]), (1, 2, 3), slides=True)
    return model, Oracle(model)


def grouped(rng: random.Random, seed: int, cfg: dict, D: int) -> tuple[Transformer, Oracle]:
    """A model with value groups, calibrated, everything that is trained random, its basis folded
    or not."""
    model = random_model(rng, seed, D, (1, 2, 3), slides=True)
    cfg = KVConfig(**cfg, kv_layers=some_layers(rng, model.cfg))
    calibration = [tokens(2, 40, seed=seed, vocab=VOCAB)]
    kv_router.attach(model, cfg, calibration, seed)
    for path in kv_router.paths(model).values():
        if path.reconstructor is not None:
            randomise(path.reconstructor, 0.2)
        if cfg.learn_basis:
            perturb_basis(path, 0.3)
    fold = rng.random() < 0.5
    oracle = Oracle(model, fold)
    return kv_router.fold(model) if fold else model, oracle


def value_groups(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    S = rng.choice([2, 4, 8, 16])
    cfg = dict(
        n_groups=S,
        topk_groups=rng.randint(1, S),
        value_basis=rng.choice(["native", "random", "pca", "output"]),
        learn_basis=rng.random() < 0.3,
        value_router=rng.choice(["norm", "norm", "static", "linear"]),
        mask_scope=rng.choice(["head", "layer"]),
        reconstructor=rng.choice(["zero", "zero", "mlp"]),
        prefill=rng.choice(["exact", "routed"]),
        kv_tail=rng.choice([0, 0, 1, 2, 5]),
        kv_tail_block=rng.choice([1, 1, 2, 3, 5]),
    )
    return grouped(rng, seed, cfg, rng.choice([D for D in (8, 16) if D % S == 0]))


def integers(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    D = rng.choice([16, 32])
    S = rng.choice([2, 4])
    value_bits = rng.choice([bits for bits in (2, 3, 4, 8) if fills_bytes(D // S, bits)])
    cfg = dict(
        n_groups=S,
        topk_groups=rng.randint(1, S),
        value_basis="native" if D > VOCAB else rng.choice(["native", "output"]),
        learn_basis=rng.random() < 0.2,
        value_router=rng.choice(["norm", "norm", "static", "linear"]),
        mask_scope=rng.choice(["head", "layer"]),
        kv_tail=rng.choice([0, 1, 4]),
        key_bits=rng.choice([2, 3, 4, 8]),
        value_bits=value_bits,
        key_block=rng.choice([16, 16, 32]),
        kv_sinks=rng.choice([0, 1, 4]),
    )
    return grouped(rng, seed, cfg, D)


def fills_bytes(n: int, bits: int) -> bool:
    """Whether a row of n numbers can be stored."""
    return n * bits % 8 == 0 and (bits != 3 or n % 8 == 0)


def selection(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    """Every way to spend a budget; keys are rounded to the nearest."""
    model = random_model(rng, seed, 16, (1, 2, 3), slides=True)
    S = rng.choice([2, 4])
    kv = dict(
        n_groups=S,
        value_basis=rng.choice(["native", "output"]),
        mask_scope=rng.choice(["shared", "layer", "head"]),
        prefill=rng.choice(["exact", "routed"]),
        kv_tail=rng.choice([1, 3, 5]),
    )
    share = rng.choice([0.2, 0.5, 0.9])
    budget = rng.choice(
        [
            dict(kv_keep=share),
            dict(token_keep=share, value_keep=rng.choice([0.4, 0.7, 1.0])),
            dict(token_keep=share, value_keep=0.5, fixed_k=True),
            dict(kv_bytes=share),
            dict(kv_bytes=share),
            dict(kv_keep=1.0),
        ]
    )
    allocation = rng.choice(["head", "layer", "global"])
    if rng.random() < 0.5 or "kv_bytes" in budget:
        kv |= dict(prefill="exact", kv_sinks=rng.choice([0, 2, 4]))
        if kv["mask_scope"] == "shared" and "kv_bytes" in budget:
            kv["mask_scope"] = "head"
        if rng.random() < 0.7:  # else --kv_bytes picks the bits
            bits = [4, 8, 0] if "kv_bytes" in budget else [4, 8]
            kv |= dict(key_bits=rng.choice([3, 4, 8]), value_bits=rng.choice(bits), key_block=16)
    if kv["prefill"] == "routed" and kv["mask_scope"] != "shared" and allocation == "global":
        allocation = "layer"
    cfg = SelectConfig(
        **budget,
        relevance=rng.choice(["observed", "future", "uniform"]),
        allocation=allocation,
        sinks=rng.choice([0, 2]),
        key_rounding="nearest",
    )
    kv = KVConfig(kv="select", **kv, kv_layers=some_layers(rng, model.cfg))
    selector.attach(model, kv, cfg, [tokens(2, 40, seed=seed, vocab=VOCAB)], seed)
    model.selector.keeps_choice = True
    fold = rng.random() < 0.5
    oracle = Oracle(model, fold)
    return kv_router.fold(model) if fold else model, oracle


def experts(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    model = random_model(rng, seed, 16, (2, 4))
    every = [1, 2] if model.cfg.n_kv_head == 2 else [1, 2, 4]
    sizes = sorted(rng.sample(every, rng.randint(2, len(every))))
    ratios = [str(rng.randint(0, 3)) for _ in sizes[1:]] + [str(rng.randint(1, 3))]
    S = rng.choice([2, 4])
    mix = MixConfig(
        group_sizes=",".join(map(str, sizes)),
        expert_ratios=":".join(ratios),
        expert_router=rng.choice(["learned", "learned", "random"]),
        expert_groups=rng.choice([0, 0, rng.randint(1, S)]),
    )
    kv = KVConfig(kv="mixsga", kv_tail=rng.choice([0, 1, 4]), n_groups=S)
    shared_heads.attach(model, kv, mix)
    for path in mixsga.experts(model):
        if path.router is not None:
            randomise(path.router, 0.5)
            randomise(path, 0.5)
    return shared(rng, model, ints=True)


def gqa(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    model = random_model(rng, seed, 16, (2, 4))
    share = rng.choice([0.5, 0.75, 1.0])
    kv = KVConfig(kv="gqa", kv_tail=rng.choice([0, 1, 4]))
    shared_heads.attach(model, kv, MixConfig(kv_share=share))
    return shared(rng, model, ints=True)


def cla(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    model = random_model(rng, seed, rng.choice([8, 16]), (1, 2, 3), least_layers=2)
    kv = KVConfig(kv="cla", kv_tail=rng.choice([0, 1, 4]))
    shared_heads.attach(model, kv, MixConfig(kv_share=rng.choice([0.3, 0.4, 0.5])))
    return shared(rng, model, ints=False)


def shared(rng: random.Random, model: Transformer, ints: bool) -> tuple[Transformer, Oracle]:
    """A model whose paths share, as it will store: some in integers."""
    model.double().eval()
    if ints and rng.random() < 0.4:
        bits = dict(key_bits=rng.choice([2, 4, 8]), value_bits=rng.choice([2, 4, 8]))
        model.stored_in = ExitStack()  # for as long as the model lives
        model.stored_in.enter_context(mixsga.stored_in(model, **bits, key_block=16))
    return model, Oracle(model)


class Kind(NamedTuple):
    """A way to store."""

    make: Callable  # (rng, seed) -> model, oracle
    sessions: int
    first: tuple[int, ...] = (1, 1, 2, 3, 4, 6, 9, 13)  # lengths of a first prompt
    pieces: tuple[int, ...] = (1, 1, 2, 3, 4, 6, 9, 13)  # lengths of what follows
    whole_prompts: bool = False  # whether a prompt is one prefill


LONG = (1, 5, 12, 19, 26)
KINDS = {
    "dense": Kind(dense, 4),
    "value groups": Kind(value_groups, 24),
    "integers": Kind(integers, 14, LONG, LONG),
    "selection": Kind(selection, 26, (1, 3, 12, 22, 31, 40), (1, 2, 4), whole_prompts=True),
    "mixsga": Kind(experts, 12, (1, 2, 9, 23, 34), (1, 2, 5), whole_prompts=True),
    "gqa": Kind(gqa, 6, (1, 2, 9, 23, 34), (1, 2, 5), whole_prompts=True),
    "cla": Kind(cla, 6, (1, 2, 9, 23), (1, 2, 5), whole_prompts=True),
}


class Failed(Exception):
    """What is thrown into a prompt."""


class Session:
    """A model, a cache of it, and the oracle's rows, over random operations."""

    OPERATIONS = {
        "prefill": 8,
        "decode": 10,
        "select": 4,
        "cat": 4,
        "truncate": 3,
        "save": 2,
        "fail": 2,
        "reserve": 2,
    }
    MOST_ROWS = 5

    def __init__(self, kind: str, seed: int, folder):
        self.kind = KINDS[kind]
        self.rng = random.Random(f"{kind} {seed}")
        self.model, self.oracle = self.kind.make(self.rng, seed)
        self.path = folder / "cache.safetensors"
        self.done: list[str] = []
        self.counted = Counter()
        self.cache, self.rows = self.new(self.rng.choice([1, 2, 3]))

    # ---- making

    def new(self, batch: int) -> tuple[KVCache, list[Row]]:
        capacity = self.rng.choice([150, CONTEXT])
        self.note(f"new_cache({batch}, {capacity})")
        return self.model.new_cache(batch, capacity), [Row(self.oracle) for _ in range(batch)]

    def note(self, text: str) -> None:
        self.done.append(text)

    def ids(self, *shape: int) -> torch.Tensor:
        count = int(np.prod(shape))
        return torch.tensor([self.rng.randrange(VOCAB) for _ in range(count)]).view(shape)

    # ---- what must be so

    def check_logits(self, got: torch.Tensor, want: np.ndarray) -> None:
        error = np.abs(got.double().numpy() - want).max()
        assert error <= TOLERANCE * max(1.0, np.abs(want).max()), f"logits differ by {error:.2g}"

    def check(self) -> None:
        """Lengths are those of the rows, and all bytes are counted."""
        want = [row.n for row in self.rows]
        assert self.cache.lengths.tolist() == want, f"lengths {self.cache.lengths.tolist()}"
        for layer in self.cache.layers:
            assert layer.lengths.tolist() == want, f"a layer's {layer.lengths.tolist()}"
        assert self.cache.length >= max(want)
        assert self.cache.nbytes() == bytes_held(self.cache)

    # ---- operations

    def prompt(self, rows: list[Row], first: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Columns for these rows, and their padding: some row may get nothing, but for a prompt
        that is one prefill."""
        B = len(rows)
        T = self.rng.choice(self.kind.first if first else self.kind.pieces)
        most = T - 1 if first and self.kind.whole_prompts else T
        n_pad = None
        if B > 1 and self.rng.random() < 0.7:
            n_pad = [self.rng.randint(0, most) for _ in range(B)]
            n_pad[self.rng.randrange(B)] = 0
        elif self.rng.random() < 0.3:
            n_pad = [self.rng.randint(0, T - 1)] * B
        return self.ids(B, T), None if n_pad is None else torch.tensor(n_pad)

    def read(self, cache: KVCache, rows: list[Row]) -> None:
        """Prefill, now and then after one that failed, and compare the logits of every column."""
        first = cache.layers[0].fresh
        idx, n_pad = self.prompt(rows, first)
        T = idx.size(1)
        pads = [0] * len(rows) if n_pad is None else n_pad.tolist()
        if self.rng.random() < 0.15:
            self.read_and_fail(cache, idx, n_pad)
        self.note(f"prefill(T={T}, n_pad={pads if n_pad is not None else None})")
        last_only = self.rng.random() < 0.3
        with torch.no_grad():
            got = self.model.prefill(idx, cache, n_pad, last_only=last_only)
        for b, row in enumerate(rows):
            if pads[b] == T:
                continue
            kept = self.kept(b, pads[b], T) if first else None
            want = row.prefill(idx[b, pads[b] :].tolist(), first, kept)
            if last_only:
                self.check_logits(got[b, -1:], want[-1:])
            else:
                self.check_logits(got[b, pads[b] :], want)

    def kept(self, b: int, pad: int, T: int) -> list | None:
        """What the selector has just chosen of row b, for every layer."""
        s = selector.selector_of(self.model)
        if s is None or s.kv.kv_tail >= T:
            return None
        out: list = [None] * self.model.cfg.n_layer
        for i, layer in enumerate(s.kv.layers_of(self.model.cfg)):
            keep, mask = (
                t[b].expand(self.model.cfg.n_kv_head, *t.shape[2:]) for t in s.chosen.layer(i)
            )
            mask = mask * keep.unsqueeze(-1)
            out[layer] = (keep[:, pad:].numpy(), mask[:, pad:].numpy())
        return out

    def read_and_fail(self, cache: KVCache, idx: torch.Tensor, n_pad: torch.Tensor | None) -> None:
        """A prefill that fails in some layer, and leaves everything as it was."""
        i = self.rng.randrange(len(self.model.layers))
        self.note(f"prefill(T={idx.size(1)}) that fails in layer {i}")

        def fail(module, args):
            raise Failed

        hook = self.model.layers[i].mlp.register_forward_pre_hook(fail)
        try:
            with pytest.raises(Failed), torch.no_grad():
                self.model.prefill(idx, cache, n_pad)
        finally:
            hook.remove()

    def prefill(self) -> None:
        self.read(self.cache, self.rows)

    def decode(self) -> None:
        idx = self.ids(len(self.rows), 1)
        self.note("decode")
        with torch.no_grad():
            got = self.model.decode(idx, self.cache)[:, -1]
        want = np.stack([row.decode(int(i)) for row, i in zip(self.rows, idx, strict=True)])
        self.check_logits(got, want)

    def select(self) -> None:
        B = len(self.rows)
        picked = [self.rng.randrange(B) for _ in range(self.rng.randint(1, min(B + 1, 4)))]
        self.note(f"select_sequences({picked})")
        self.cache = self.cache.select_sequences(picked)
        self.rows = [self.rows[b].copy() for b in picked]

    def cat(self) -> None:
        """Join with a cache that is empty or has read something else, before or after this one."""
        if len(self.rows) >= self.MOST_ROWS:
            return self.select()
        other, rows = self.new(self.rng.choice([1, 1, 2]))
        for _ in range(self.rng.choice([1, 1, 2] if self.kind.whole_prompts else [0, 1, 1, 2])):
            self.read(other, rows)
        first = self.rng.random() < 0.5
        self.note(f"cat, the other {'first' if first else 'last'}")
        both = (
            [(other, rows), (self.cache, self.rows)]
            if first
            else [(self.cache, self.rows), (other, rows)]
        )
        self.cache = KVCache.cat([cache for cache, _ in both])
        self.rows = [row for _, part in both for row in part]

    def truncate(self) -> None:
        """Cut all rows to one number or each to its own; a cut that a store cannot do is refused
        and changes nothing."""
        longest = max(row.n for row in self.rows)
        if self.rng.random() < 0.5:
            most = self.rng.choice([12, 12, longest])
            n = self.rng.randint(max(0, longest - most), longest)
            cut = [n] * len(self.rows)
        else:
            cut = [self.rng.randint(max(0, row.n - 9), row.n + 1) for row in self.rows]
            n = torch.tensor(cut)
        self.note(f"truncate({cut if torch.is_tensor(n) else n})")
        fine = all(row.can_truncate(c) for row, c in zip(self.rows, cut, strict=True))
        if not fine:
            with pytest.raises(ValueError):
                self.cache.truncate(n)
            self.counted["refused"] += 1
            return
        self.cache.truncate(n)
        for row, c in zip(self.rows, cut, strict=True):
            row.truncate(c)

    def save(self) -> None:
        self.note("save, load")
        self.cache.save(self.path)
        self.cache = KVCache.load(self.path, self.model)

    def fail(self) -> None:
        self.read_and_fail(self.cache, *self.prompt(self.rows, self.cache.layers[0].fresh))

    def reserve(self) -> None:
        n = self.rng.randint(1, 20)
        self.note(f"reserve({n})")
        self.cache.reserve(n)

    # ---- all of it

    def run(self) -> Counter:
        names = list(self.OPERATIONS)
        weights = list(self.OPERATIONS.values())
        self.prefill()
        for _ in range(STEPS):
            name = self.rng.choices(names, weights)[0]
            if max(row.n for row in self.rows) > 100:
                name = "start again"
                self.start_again()
            else:
                getattr(self, name)()
            self.check()
            self.counted[name] += 1
        return self.counted

    def start_again(self) -> None:
        """Go on with a new cache where rows become long."""
        self.cache, self.rows = self.new(self.rng.choice([1, 2, 3]))
        self.read(self.cache, self.rows)


NOT_HELD = (ValueBasis, FloatCodec, IntCodec, Ints, PromptState)  # what is the model's, or views


def bytes_held(cache: KVCache) -> int:
    """Bytes of all tensors that a cache's layers hold, wherever they are held; not what they share
    with the model: the maps of a basis, what a codec divides by."""
    storages = {}
    seen = set()

    def look(thing) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, NOT_HELD):
            return
        if torch.is_tensor(thing):
            if thing.numel():
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, list | tuple):
            for part in thing:
                look(part)
        elif isinstance(thing, dict):
            for part in thing.values():
                look(part)
        elif hasattr(thing, "__dict__"):
            look(vars(thing))

    for layer in cache.layers:
        look(layer)
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_any_operations_agree_with_the_oracle(kind, tmp_path):
    """Random sessions of every way to store: after each operation every row's logits are those of
    the equations, token by token."""
    counted = Counter()
    for seed in range(KINDS[kind].sessions):
        session = None
        try:
            session = Session(kind, seed, tmp_path)
            counted += session.run()
        except Exception as e:
            raise AssertionError(described(kind, seed, session)) from e
    assert all(counted[name] for name in Session.OPERATIONS), counted


def described(kind: str, seed: int, session: Session | None) -> str:
    """What is needed to see a failure again."""
    lines = [f"kind {kind!r}, seed {seed}"]
    if session is not None:
        lines.append(str(session.model.cfg))
        paths = [block.self_attn.kv_path for block in session.model.layers]
        lines += [f"layer {i}: {getattr(p, 'cfg', 'whole')}" for i, p in enumerate(paths)]
        lines += session.done
    return "\n".join(lines)
