"""Measure a model: one row of results, and rows that differ in what is kept.

Perplexity is *decode-mode*: the token at t reads the routed values of every earlier token, which is
exactly what packed cached decoding, token by token, gives (tests/test_kv_router.py). No number
comes from uncompressed values, except in rows that say 100 %. Cache bytes are those of the tensors
a packed cache holds after one sequence, masks and offsets included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

import kv_router
import selector
from baselines import coded, kivi, quest, shared_heads
from config import KEY_BLOCK, KVConfig, SelectConfig
from loaders.device import autocast
from lora import count_trainable
from measure_config import CODED, RIVALS
from model import Transformer, evaluating
from settings.adapters import AdapterConfig
from settings.fields import to_dict
from storage.cache import KVCache
from storage.packed import PackedCache
from storage.ragged import RaggedCache
from tasks.common import Task


@dataclass(frozen=True, kw_only=True)
class RowAbout:
    """What a row says of the run that is measured, and how it is computed."""

    adapter: AdapterConfig
    kv: KVConfig
    seed: int
    batch_size: int = 16
    dtype: str = "float32"
    params: int | None = None  # trainable parameters; None: they are counted


# -- one row


def measure_row(
    model: Transformer, task: Task, about: RowAbout, dense_value: float | None = None
) -> dict:
    """One result: the task's value and what the cache holds. dense_value: the value with whole
    values; None: this row is the one that others are compared with."""
    start = time.time()
    kv = about.kv
    value = task.value(model, about.batch_size, about.dtype, dense_value is None)
    cache = filled_cache(model, task.stored, about.dtype)
    method = method_of(model, kv)
    shares = kept_shares(model, cache)
    exact = prefills_exactly(method, kv, task)
    grouped = cuts_values(method, kv)
    bits = stored_bits(model, method, kv)
    row = {
        "task": task.name,
        "method": method,
        "adapter": about.adapter.adapter,
        "basis": basis_of(method, kv),
        "n_groups": kv.n_groups if grouped else 1,
        "prefill": "exact" if exact else "routed",
        "relevance": relevance_of(model, method, kv),
        "setting": setting_of(model, method, kv, shares, exact, cache.length),
        **shares,
        "cache_bytes": cache.nbytes(),
        "dense_bytes": model.dense_bytes(task.stored.numel(), cache),
        "of_dense": model.share_of_dense(task.stored.numel(), cache),
        "metric": task.metric,
        "value": value,
        "dense_value": value if dense_value is None else dense_value,
        "n": task.n,
        "seed": about.seed,
        "seconds": round(time.time() - start, 3),
        "trainable_parameters": count_trainable(model) if about.params is None else about.params,
        "rank": about.adapter.r if about.adapter.adapter != "none" else 0,
        "key_bits": bits[0],
        "value_bits": bits[1],
    }
    row |= getattr(task, "also", {})
    if task.kl is not None:
        row["kl"] = task.kl
    if task.text is not None:
        row["text"] = task.text
    if method == "select":
        row["select"] = to_dict(selector.selector_of(model).cfg)
        row["allocation"] = row["select"]["allocation"]
    if method == "quest":
        row["allocation"] = "head"
        row["reads"] = quest.reads(model, cache.length)
    return row


def filled_cache(model: Transformer, x: Tensor, dtype: str = "float32") -> KVCache:
    """A cache of exactly that length that x (B, T) int64 was prefilled into."""
    x = x.to(model.norm.weight.device)
    with evaluating(model), autocast(x.device, dtype), selector.with_oracle(model, x, x.size(1)):
        cache = model.new_cache(*x.shape)
        model.prefill(x, cache)
    return cache


def kept_shares(model: Transformer, cache: KVCache) -> dict[str, float]:
    """What a filled cache keeps, by count. kv_kept_layers, kv_kept_model: of keys and values in
    compressed layers, in the whole model, the tokens that stay whole among them; value_keep: of the
    kept tokens' value groups; token_keep: of a selection's context."""
    if shared_heads.shares(model):
        kept = shared_heads.kept_shares(model, cache)
        return {"value_keep": 1.0, "token_keep": 1.0, "kv_kept_layers": kept, "kv_kept_model": kept}
    tokens = []
    values = []
    layers = []
    for block, stored in zip(model.layers, cache.layers, strict=True):
        path = block.self_attn.kv_path
        if isinstance(stored, RaggedCache):
            masks = stored.n_packed.numel()
            context = (cache.length - path.cfg.kv_tail) * masks
            kept = int(stored.n_packed.sum())
            rows = stored.groups_kept() / stored.S
            tokens.append(kept / context)
            values.append(rows / context)
            whole = path.cfg.kv_tail * masks
            layers.append(((kept + rows) / 2 + whole) / (context + whole))
        elif isinstance(stored, PackedCache):
            T = cache.length
            packed = int(stored.n_packed[0])
            tokens.append(1.0)
            values.append(stored.k / stored.S)
            layers.append((1 + (stored.k / stored.S * packed + T - packed) / T) / 2)
    if not layers:
        return dict.fromkeys(("value_keep", "token_keep", "kv_kept_layers", "kv_kept_model"), 1.0)
    n_dense = model.cfg.n_layer - len(layers)
    return {
        "value_keep": mean(values) / max(mean(tokens), 1e-30),
        "token_keep": mean(tokens),
        "kv_kept_layers": mean(layers),
        "kv_kept_model": (sum(layers) + n_dense) / model.cfg.n_layer,
    }


# -- what a row is called


def method_of(model: Transformer, kv: KVConfig) -> str:
    """How a model stores its keys and values: dense, value_groups, select, one of RIVALS, mixsga,
    gqa or cla."""
    if quest.paths(model):
        return "quest"
    if kivi.format_of(model):
        return "kivi"
    codec = coded.codec_of(model)
    if codec is not None:
        return codec.name
    chooser = selector.selector_of(model)
    if chooser is not None:
        keeps_all = chooser.cfg.whole and not chooser.stored.ints
        return "dense" if keeps_all else "select"
    if shared_heads.shares(model):
        return kv.kv
    return "value_groups" if kv_router.paths(model) else "dense"


def cuts_values(method: str, kv: KVConfig) -> bool:
    """Whether values are stored in groups, of a basis: quest may read of them, too."""
    return method in ("value_groups", "select") or (method, kv.kv) == ("quest", "value_groups")


def prefills_exactly(method: str, kv: KVConfig, task: Task) -> bool:
    """Whether the task's prompt is read whole while it is processed."""
    if method not in ("value_groups", "select", *RIVALS):
        return True
    return kv.prefill == "exact" and task.query is not None


def basis_of(method: str, kv: KVConfig) -> str:
    """The basis of the stored values, with a + where it was trained."""
    if not cuts_values(method, kv):
        return "native"
    return f"{kv.value_basis}+" if kv.learn_basis else kv.value_basis


def relevance_of(model: Transformer, method: str, kv: KVConfig) -> str:
    """What chooses, in a few words."""
    if method == "value_groups":
        return f"fixed_k:{kv.value_router}"
    return model.selector.cfg.described() if method == "select" else "none"


def stored_bits(model: Transformer, method: str, kv: KVConfig) -> tuple[int, int]:
    """Bits of a stored number of keys and of values."""
    stored = model.selector.stored if method == "select" else kv
    if method in ("value_groups", "select", "kivi") or shared_heads.shares(model):
        return stored.key_bits, stored.value_bits
    return 16, 16


def setting_of(
    model: Transformer,
    method: str,
    kv: KVConfig,
    shares: dict[str, float],
    exact: bool,
    n_tokens: int,
) -> str:
    """A row's setting in a few words: basis and groups, bits, layers and prefill where they are not
    the usual ones; what shares a budget; of n_tokens held the share that is read."""
    grouped = cuts_values(method, kv)
    words = []
    if method == "quest":
        words.append(f"head reads {quest.reads(model, n_tokens):.1%}")
    elif method == "kivi":
        words.append("groups of {0.group}, {0.residual} whole".format(kivi.format_of(model)))
    elif method in CODED:
        words.append(coded.codec_of(model).described())
    if method != "select" and grouped:
        kept = round(shares["value_keep"] * kv.n_groups)
        words += [basis_of(method, kv), f"S={kv.n_groups}", f"K={kept}"]
        if kv.told_by_keys:
            words.append("from own keys" if kv.reconstructor == "own_keys" else "from keys")
    elif method == "select":
        how = model.selector.cfg.allocation
        words += [basis_of(method, kv), f"S={kv.n_groups}"]
        words += ["from keys"] * kv.told_by_keys
        words += [f"mask:{kv.mask_scope}", f"budget:{how}"]
    elif shared_heads.shares(model):
        words.append(shared_heads.described(model))
    key_bits, value_bits = stored_bits(model, method, kv)
    if key_bits < 16:
        block = (model.selector.stored if method == "select" else kv).block
        apart = "" if block == KEY_BLOCK else f"/{block}"
        words += [f"keys:{key_bits}{apart}", f"values:{value_bits or 'routed'}"]
        if method == "select" and model.selector.cfg.key_rounding == "nearest":
            words.append("nearest")
    if grouped and kv.kv_layers != "all":
        words.append(f"layers {kv.kv_layers}")
    if method == "select" and not exact:
        words.append("routed")
    return " ".join(words)


# -- rows that differ in what is kept


def sweep(
    model: Transformer,
    task: Task,
    ks: list[int],
    about: RowAbout,
    dense_value: float | None = None,
    tell: Callable[[str], AbstractContextManager] = nullcontext,
) -> list[dict]:
    """One row per K in ks, the same model with K groups kept, each with the value of K = S as its
    dense value, measured unless given, each within tell(what it is)."""
    path = next(iter(kv_router.paths(model).values()))
    before = path.k
    whole = None
    if dense_value is None or path.S in ks:
        kv_router.set_kept(model, path.S)
        whole = measure_row(model, task, about, dense_value)
        dense_value = whole["dense_value"]
    rows = []
    for k in ks:
        kv_router.set_kept(model, k)
        with tell(f"{k} of {path.S} value groups"):
            rows.append(whole if k == path.S else measure_row(model, task, about, dense_value))
    kv_router.set_kept(model, before)
    return rows


def sweep_choices(
    model: Transformer,
    task: Task,
    ways: list[SelectConfig],
    about: RowAbout,
    dense_value: float | None = None,
    tell: Callable[[str], AbstractContextManager] = nullcontext,
) -> list[dict]:
    """One row per way to choose, the same model, each within tell(what it is); the dense value is
    measured unless given."""
    before = model.selector.cfg
    if dense_value is None and not ways[0].whole:
        dense_value = whole_value(model, task, about.batch_size, about.dtype)
    rows = []
    for way in ways:
        model.selector.set(way)
        with tell(f"selection, {way.described()}"):
            rows.append(measure_row(model, task, about, dense_value))
        dense_value = rows[0]["dense_value"]
    model.selector.cfg = before  # as it was, whatever bits values have here
    return rows


def whole_value(model: Transformer, task: Task, batch_size: int, dtype: str) -> float:
    """The task's value with whole values of as many bits as are computed in."""
    with kv_router.storing(model, key_bits=16, value_bits=16):
        chooser = selector.selector_of(model)
        if chooser is not None:
            before = chooser.cfg
            chooser.set(before.everything())
            value = task.value(model, batch_size, dtype, True)
            chooser.set(before)
            return value
        path = next(iter(kv_router.paths(model).values()))
        before = path.k
        kv_router.set_kept(model, path.S)
        value = task.value(model, batch_size, dtype, True)
        kv_router.set_kept(model, before)
        return value


# -- what pictures show


def kept_groups(model: Transformer, x: Tensor, dtype: str = "float32") -> Tensor:
    """Which groups each token of x (1, T) kept, per compressed layer: (layers, T, S) float in [0,
    1], the mean over heads."""
    paths = list(kv_router.paths(model).values())
    for p in paths:
        p.keeps_mask = True
    with evaluating(model), autocast(model.norm.weight.device, dtype):
        model(x.to(model.norm.weight.device))
    masks = torch.stack([p.last_mask[0].float().mean(0) for p in paths]).cpu()  # (layers, T, S)
    for p in paths:
        p.keeps_mask = False
        p.last_mask = None
    return masks


def chosen(model: Transformer, x: Tensor, dtype: str = "float32") -> selector.Selection:
    """What the selector keeps of a prompt x (1, T), all compressed layers."""
    model.selector.keeps_choice = True
    filled_cache(model, x, dtype)
    model.selector.keeps_choice = False
    return model.selector.chosen
