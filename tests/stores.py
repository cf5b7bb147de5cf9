"""Models of every way to store, by name, caches that they filled, and prompts of several
lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import BY_NORM, INT4, TINY, grouped_model, randomise, tiny_model, tokens

import kv_router
import mixsga
import selector
from baselines import kivi, quest, shared_heads
from config import KVConfig, SelectConfig
from model import Transformer
from selection import calibration
from settings.experts import MixConfig
from storage.cache import KVCache


def selecting(seed: int = 0, fold: bool = True, sel: dict | None = None, **kv) -> Transformer:
    """A model whose every layer keeps half of a context, or what `sel` says."""
    model = tiny_model(seed)
    cfg = KVConfig(**{**dict(kv="select", kv_tail=3, value_basis="output"), **kv})
    choice = SelectConfig(**{**dict(relevance="observed", kv_keep=0.5), **(sel or {})})
    selector.attach(model, cfg, choice, [tokens(2, 70, seed=seed + 1)], seed)
    return kv_router.fold(model) if fold else model


def levelled(seed: int = 0) -> Transformer:
    bits = dict(key_bits=4, value_bits=0, key_block=16)
    return selecting(seed, sel=dict(kv_keep=0.0, kv_bytes=0.7), **bits)


def mixed(
    seed: int = 0, kv: str = "mixsga", ints: bool = False, tail: int = 2, **mix
) -> Transformer:
    """A model whose heads or layers share what is stored."""
    model = tiny_model(seed)
    experts = dict(group_sizes="1,3", expert_ratios="1:1")
    cfg = KVConfig(kv=kv, kv_tail=tail)
    shared_heads.attach(model, cfg, MixConfig(**{**experts, **mix}))
    for path in mixsga.experts(model):
        randomise(path)
        if ints:
            bits = dict(key_bits=4, value_bits=4, key_block=16, kv_sinks=0)
            path.stored_as = replace(path.stored_as, **bits)
    return model.double().eval()


EXACT = dict(**BY_NORM, value_basis="output")
PATHS = {
    "dense": tiny_model,
    "value groups": lambda: grouped_model(**EXACT, kv_tail=4),
    "no tail": lambda: grouped_model(**EXACT, kv_tail=0),
    "no tail, blocks": lambda: grouped_model(**EXACT, kv_tail=0, kv_tail_block=3),
    "tail of blocks": lambda: grouped_model(**EXACT, kv_tail=3, kv_tail_block=4, n_groups=8),
    "not folded": lambda: grouped_model(**EXACT, kv_tail=2, fold=False),
    "routed prefill": lambda: grouped_model(kv_tail=2, kv_tail_block=2),
    "rebuilt": lambda: grouped_model(**EXACT, kv_tail=1, reconstructor="mlp"),
    "from keys": lambda: grouped_model(**EXACT, kv_tail=1, kv_sinks=2, reconstructor="keys"),
    "last layer": lambda: grouped_model(**EXACT, kv_tail=2, kv_layers="1"),
    "integers": lambda: grouped_model(**EXACT, **INT4, kv_tail=2),
    "integers, no tail": lambda: grouped_model(**EXACT, **INT4, kv_tail=0, topk_groups=4),
    "selection": selecting,
    "selection, not folded": lambda: selecting(fold=False),
    "selection, routed": lambda: selecting(prefill="routed", sel=dict(allocation="layer")),
    "selection, shared": lambda: selecting(mask_scope="shared", prefill="routed"),
    "selection, last layer": lambda: selecting(kv_layers="1"),
    "selection, everything": lambda: selecting(sel=dict(kv_keep=1.0)),
    "selection, integers": lambda: selecting(key_bits=4, value_bits=4, key_block=16),
    "levels": levelled,
    "mixsga": mixed,
    "mixsga, no tail": lambda: mixed(tail=0),
    "mixsga, integers": lambda: mixed(ints=True),
    "gqa": lambda: mixed(kv="gqa", kv_share=0.4),
    "cla": lambda: mixed(kv="cla"),
}
made: dict[str, Transformer] = {}


@pytest.fixture(params=PATHS)
def name(request) -> str:
    """A way to store."""
    return request.param


@pytest.fixture
def model(name) -> Transformer:
    """A model that stores so; tests leave it as it was."""
    if name not in made:
        made[name] = PATHS[name]()
    return made[name]


def takes_pieces(model: Transformer) -> bool:
    """Whether a prompt may come in pieces."""
    return all(block.self_attn.kv_path.reads_pieces for block in model.layers)


def padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch of prompts of these lengths, and its padding."""
    T = max(lengths)
    idx = torch.zeros(len(lengths), T, dtype=torch.int64)
    for b, n in enumerate(lengths):
        idx[b, T - n :] = tokens(n, seed=b)
    return idx, torch.tensor([T - n for n in lengths])


@torch.no_grad()
def decoded(model: Transformer, cache: KVCache, n: int, rows: list[int] | None = None):
    """Logits (B, n, V) of n steps; rows: which of the batch's continuations each sequence gets."""
    rows = list(range(len(cache.lengths))) if rows is None else rows
    follow = torch.cat([tokens(1, n, seed=80 + b) for b in rows])
    return torch.cat([model.decode(follow[:, i : i + 1], cache) for i in range(n)], 1)


@torch.no_grad()
def filled(model: Transformer, prompt: torch.Tensor, max_len: int = 120) -> KVCache:
    """The cache of one prompt (T,)."""
    cache = model.new_cache(1, max_len)
    model.prefill(prompt[None], cache)
    return cache


def agree(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Logits are the same but for the order of sums."""
    assert torch.isfinite(got).all()
    error = (got - want).abs().max() / want.abs().max()
    assert error < tolerance, f"differ by {error:.2g}"


def calibrate_anew(model: Transformer) -> None:
    calibration.calibrate(model.selector, model, [tokens(3, 50, seed=77)])


VALUE_GROUPS = lambda **kv: lambda: grouped_model(**EXACT, kv_tail=2, **kv)


def named(way) -> str:
    """The name of a way to store, or of the function that makes it."""
    return getattr(way, "__name__", way)


def quest_pages() -> Transformer:
    return quest.attach(tiny_model(), KVConfig(topk_groups=4), read_tokens=16, whole_layers=0)


def kivi_codes() -> Transformer:
    return kivi.attach(tiny_model(), kivi.Format(4, group=8, residual=16))


def saved(model: Transformer, path, n: int = 40) -> torch.Tensor:
    """Save the cache of a prompt; return logits of the steps after it."""
    cache = model.new_cache(2, 90)
    with torch.no_grad():
        model.prefill(tokens(2, n, seed=1), cache)
    cache.save(path)
    return decoded(model, cache, 8)


def other(cfg: dict) -> Transformer:
    return tiny_model(cfg=replace(TINY, **cfg))


INTS = dict(**EXACT, **INT4, kv_tail=2)
FOREIGN = {  # who saved, who loads, what the line must name
    "weights": (tiny_model, lambda: tiny_model(1), "weights"),
    "one number": (tiny_model, lambda: one_number(tiny_model()), "weights"),
    "heads": (tiny_model, lambda: other(dict(n_kv_head=2)), "shape"),
    "head size": (tiny_model, lambda: other(dict(head_dim=8)), "shape"),
    "layers": (tiny_model, lambda: other(dict(n_layer=3)), "layers"),
    "dtype": (tiny_model, lambda: tiny_model(dtype=torch.float32), "dtype"),
    "positions": (tiny_model, lambda: other(dict(rope_theta=500.0)), "rope_theta"),
    "scaled positions": (tiny_model, lambda: other(dict(rope_factor=4.0)), "rope_factor"),
    "epsilon": (tiny_model, lambda: other(dict(norm_eps=1e-2)), "norm_eps"),
    "kind": (tiny_model, VALUE_GROUPS(), "kind"),
    "kind of a layer": (
        lambda: grouped_model(**EXACT, kv_tail=2, kv_layers="0"),
        lambda: grouped_model(**EXACT, kv_tail=2, kv_layers="1"),
        "layer 0: kind",
    ),
    "selection into value groups": (selecting, VALUE_GROUPS(), "kind"),
    "experts into CLA": (mixed, lambda: mixed(kv="cla"), "kind"),
    "groups' weights": (VALUE_GROUPS(), VALUE_GROUPS(seed=3), "weights"),
    "basis": (
        lambda: grouped_model(**EXACT, kv_tail=2, fold=False),
        lambda: grouped_model(**{**EXACT, "value_basis": "native"}, kv_tail=2, fold=False),
        "maps",
    ),
    "fold": (VALUE_GROUPS(fold=False), VALUE_GROUPS(), "maps"),
    "K": (VALUE_GROUPS(), VALUE_GROUPS(topk_groups=3), "topk_groups"),
    "S": (VALUE_GROUPS(), VALUE_GROUPS(n_groups=8), "n_groups"),
    "scope": (VALUE_GROUPS(), lambda: grouped_model(kv_tail=2, prefill="exact"), "mask_heads"),
    "tail": (VALUE_GROUPS(), lambda: grouped_model(**EXACT, kv_tail=8), "kv_tail"),
    "smaller tail": (lambda: grouped_model(**EXACT, kv_tail=8), VALUE_GROUPS(), "kv_tail"),
    "block": (VALUE_GROUPS(kv_tail_block=4), VALUE_GROUPS(), "block"),
    "router": (VALUE_GROUPS(), VALUE_GROUPS(reconstructor="mlp"), "weights"),
    "keys": (VALUE_GROUPS(), VALUE_GROUPS(reconstructor="keys", kv_sinks=0), "maps from keys"),
    "bits": (lambda: grouped_model(**INTS), VALUE_GROUPS(), "bits"),
    "more bits": (
        lambda: grouped_model(**INTS),
        lambda: grouped_model(**{**INTS, "value_bits": 8}),
        "bits",
    ),
    "key block": (
        lambda: grouped_model(**INTS),
        lambda: grouped_model(**{**INTS, "key_block": 32}),
        "block",
    ),
    "first tokens": (
        lambda: grouped_model(**INTS),
        lambda: grouped_model(**INTS, kv_sinks=2),
        "n_sinks",
    ),
    "levels": (levelled, lambda: levelled(3), "gain"),
    "levels' calibration": (levelled, lambda: calibrated(levelled()), "gain"),
    "experts": (mixed, lambda: mixed(group_sizes="1", expert_ratios="1"), "experts"),
    "experts' scores": (mixed, lambda: mixed(expert_router="random"), "scores"),
    "experts' bits": (mixed, lambda: mixed(ints=True), "bits"),
    "experts' window": (mixed, lambda: mixed(tail=3), "kv_tail"),
}


def one_number(model: Transformer) -> Transformer:
    with torch.no_grad():
        model.embed_tokens.weight[7, 3] += 1e-3
    return model


def calibrated(model: Transformer) -> Transformer:
    calibrate_anew(model)
    return model
