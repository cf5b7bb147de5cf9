"""Operations on caches in any order, compared with an oracle that knows nothing but the equations
(oracle.py): prompts in pieces and padded batches, decoding, selecting, joining, truncating, saving
and loading, prompts that fail half-way. After each, logits, lengths and bytes are what they must
be, for every sequence, whatever its neighbours were.

A failure prints the seed, the settings and every operation up to it."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import perturb_basis, randomise, tokens
from oracle import Oracle, Row

import kv_router
from config import KVConfig, ModelConfig
from model import Transformer
from storage.cache import KVCache

VOCAB = 23
CONTEXT = 220
TOLERANCE = 1e-8  # of the largest logit; float64, but tables of positions are float32
STEPS = 30  # operations of one session


def random_model(rng: random.Random, seed: int, D: int, heads: tuple[int, ...]) -> Transformer:
    """A small model with large random weights, in float64."""
    n_kv_head = rng.choice(heads)
    cfg = ModelConfig(
        vocab_size=VOCAB,
        block_size=CONTEXT,
        n_layer=rng.choice([1, 2, 3]),
        n_embd=rng.choice([12, 24]),
        n_head=n_kv_head * rng.choice([1, 2, 3]),
        n_kv_head=n_kv_head,
        head_dim=D,
        n_inner=20,
        qkv_bias=rng.random() < 0.5,
        tie_embeddings=rng.random() < 0.5,
    )
    torch.manual_seed(seed)
    return randomise(Transformer(cfg), 0.35).double().eval()


def some_layers(rng: random.Random, n_layer: int) -> str:
    """All layers, or some of them."""
    if n_layer == 1 or rng.random() < 0.6:
        return "all"
    return ",".join(str(i) for i in sorted(rng.sample(range(n_layer), rng.randint(1, n_layer - 1))))


def dense(rng: random.Random, seed: int) -> tuple[Transformer, Oracle]:
    model = random_model(rng, seed, rng.choice([2, 8, 16]), (1, 2, 3))
    return model, Oracle(model)


def grouped(rng: random.Random, seed: int, cfg: dict, D: int) -> tuple[Transformer, Oracle]:
    """A model with value groups, calibrated, everything that is trained random, its basis folded
    or not."""
    model = random_model(rng, seed, D, (1, 2, 3))
    cfg = KVConfig(**cfg, kv_layers=some_layers(rng, model.cfg.n_layer))
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


KINDS = {"dense": (dense, 4), "value groups": (value_groups, 24)}


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
        self.rng = random.Random(f"{kind} {seed}")
        self.model, self.oracle = KINDS[kind][0](self.rng, seed)
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

    def prompt(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Columns for these rows, and their padding: some row may get nothing."""
        B = len(rows)
        T = self.rng.choice([1, 1, 2, 3, 4, 6, 9, 13])
        n_pad = None
        if B > 1 and self.rng.random() < 0.7:
            n_pad = [self.rng.randint(0, T) for _ in range(B)]
            n_pad[self.rng.randrange(B)] = 0
        elif self.rng.random() < 0.3:
            n_pad = [self.rng.randint(0, T - 1)] * B
        return self.ids(B, T), None if n_pad is None else torch.tensor(n_pad)

    def read(self, cache: KVCache, rows: list[Row]) -> None:
        """Prefill, and compare the logits of every column."""
        idx, n_pad = self.prompt(rows)
        pads = [0] * len(rows) if n_pad is None else n_pad.tolist()
        self.note(f"prefill(T={idx.size(1)}, n_pad={pads if n_pad is not None else None})")
        last_only = self.rng.random() < 0.3
        with torch.no_grad():
            got = self.model.prefill(idx, cache, n_pad, last_only=last_only)
        for b, row in enumerate(rows):
            if pads[b] == idx.size(1):
                continue
            want = row.prefill(idx[b, pads[b] :].tolist())
            self.check_logits(
                got[b, -1 if last_only else pads[b] :], want[-1:] if last_only else want
            )

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
        for _ in range(self.rng.choice([0, 1, 1, 2])):
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
            n = self.rng.randint(max(0, longest - 12), longest)
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
        """A prefill that fails in some layer leaves everything as it was."""
        i = self.rng.randrange(len(self.model.layers))
        idx, n_pad = self.prompt(self.rows)
        self.note(f"prefill that fails in layer {i}")

        def fail(module, args):
            raise Failed

        hook = self.model.layers[i].mlp.register_forward_pre_hook(fail)
        try:
            with pytest.raises(Failed), torch.no_grad():
                self.model.prefill(idx, self.cache, n_pad)
        finally:
            hook.remove()

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


def bytes_held(cache: KVCache) -> int:
    """Bytes of all tensors that a cache's layers hold, wherever they are held; not what they share
    with the model: the maps of a basis, what a codec divides by."""
    storages = {}
    seen = set()

    def look(thing) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if torch.is_tensor(thing):
            if thing.numel():
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, list | tuple):
            for part in thing:
                look(part)
        elif isinstance(thing, dict):
            for name, part in thing.items():
                if name not in ("basis", "codec", "ints", "prompt"):
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
    for seed in range(KINDS[kind][1]):
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
