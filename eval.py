"""What a stored token costs and what it buys: perplexity with the compressed values in the loop,
bytes the cache really holds.

Perplexity is *decode-mode*: the token at t reads the routed values of every earlier token, which is
exactly what packed cached decoding, token by token, gives (tests/test_kv_router.py). No number
comes from uncompressed values, except in rows that say 100 %. Cache bytes are those of the tensors
a packed cache holds after one sequence, masks and offsets included.

Writes results.json and report.png into the folder and ends with one JSON line.

    python eval.py --out_dir=out/... --methods=dense,value_groups --budgets=0.25,0.5,0.75
    python eval.py --init_from=model.gguf --tasks=continuation --methods=dense,value_groups \\
        --bases=native,pca,output --groups=4,8,16
    python eval.py --out_dir=out/SELECT --tasks=needle --kv_budgets=0.5,0.25 \\
        --relevances=predictor_query,observed
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from cli import exit_on_bad_input, parse_args
from config import (
    SHARED,
    AdapterConfig,
    BaseConfig,
    KVConfig,
    SelectConfig,
    check,
    comma_list,
    count_kept,
)
from measure_config import EvalConfig
from settings.fields import to_dict
from settings.train import DataConfig

CONFIGS = {
    "eval": EvalConfig,
    "kv": KVConfig,
    "select": SelectConfig,
    "data": DataConfig,
    "base": BaseConfig,
}
DEFAULT_SELECT = SelectConfig()
# fields of KVConfig that a trained selection or routing does not depend on
STORED_AS = ("key_bits", "value_bits", "key_block", "kv_sinks")
if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__.splitlines()[0])

import torch
from torch import Tensor

import kv_router
import mixsga
import selector
from data import batch, prepare_splits, same_text, whole_split
from loaders import checkpoint
from loaders.device import autocast, check_weights, pick_device
from loaders.runs import Run, attach_storage, is_foreign, load_run
from lora import count_trainable
from model import KVCache, Transformer, evaluating
from report.figures import bytes_figure, groups_figure, report
from storage.packed import PackedCache, SelectedCache
from tasks.common import Task
from tasks.make import READING, make_tasks
from training import mixsga_table


def filled_cache(model: Transformer, x: Tensor, dtype: str = "float32") -> KVCache:
    """A cache of exactly that length that x (B, T) int64 was prefilled into."""
    x = x.to(model.norm.weight.device)
    with evaluating(model), autocast(x.device, dtype), selector.diagnosed(model, x, x.size(1)):
        cache = model.new_cache(*x.shape)
        model(x, cache, last_only=True)
    return cache


def kept_shares(model: Transformer, cache: KVCache) -> dict[str, float]:
    """What a filled cache keeps, by count. kv_kept_layers, kv_kept_model: of keys and values in
    compressed layers, in the whole model; value_keep: of the kept tokens' value groups; token_keep.
    A fixed K counts the whole tokens of its tail, selection the context only."""
    if mixsga.shares(model):
        kept = mixsga.kept_shares(model, cache)
        return {"value_keep": 1.0, "token_keep": 1.0, "kv_kept_layers": kept, "kv_kept_model": kept}
    tokens = []
    values = []
    layers = []
    for p, c in zip((b.self_attn.kv_path for b in model.layers), cache.layers, strict=True):
        if isinstance(c, SelectedCache):
            C = (cache.length - p.cfg.kv_tail) * c.n_packed.numel()
            kept = int(c.n_packed.sum())
            rows = c.groups_kept() / c.S
            tokens = [*tokens, kept / C]
            values = [*values, rows / C]
            layers = [*layers, (kept + rows) / C / 2]
        elif isinstance(c, PackedCache):
            T = cache.length
            packed = int(p.compressed(torch.tensor(T)))
            tokens = [*tokens, 1.0]
            values = [*values, p.k / p.S]
            layers = [*layers, (1 + (p.k / p.S * packed + T - packed) / T) / 2]
    whole = model.cfg.n_layer - len(layers)
    kept = mean(tokens) if layers else 1.0
    return {
        "value_keep": mean(values) / max(kept, 1e-30) if layers else 1.0,
        "token_keep": kept,
        "kv_kept_layers": mean(layers) if layers else 1.0,
        "kv_kept_model": (sum(layers) + whole) / model.cfg.n_layer,
    }


def row(
    model: Transformer,
    task: Task,
    *,
    adapter: AdapterConfig,
    kv: KVConfig,
    seed: int,
    batch_size: int = 16,
    dtype: str = "float32",
    dense_value: float | None = None,
    params: int | None = None,
) -> dict:
    """One result: the task's value and what the cache holds. dense_value: the value with whole
    values."""
    start = time.time()
    value = task.value(model, batch_size, dtype, dense_value is None)
    cache = filled_cache(model, task.stored, dtype)
    chooser = selector.selector_of(model)
    grouping = (
        kv.kv if mixsga.shares(model) else "value_groups" if kv_router.paths(model) else "dense"
    )
    stored = kv if chooser is None else chooser.stored
    method = (
        grouping
        if chooser is None
        else "dense"
        if chooser.cfg.whole and not stored.ints
        else "select"
    )
    dense = model.dense_bytes(task.stored.numel(), cache)
    grouped = method in ("value_groups", "select")
    exact = not grouped or (kv.prefill == "exact" and task.query is not None)
    shares = kept_shares(model, cache)
    basis = kv.value_basis + "+" * kv.learn_basis if grouped else "native"
    relevance = "none"
    setting = ""
    if method == "value_groups":
        relevance = f"fixed_k:{kv.value_router}"
        setting = f"{basis} S={kv.n_groups} K={round(shares['value_keep'] * kv.n_groups)}"
    elif mixsga.shares(model):
        setting = mixsga.described(model)
    elif method == "select":
        relevance = chooser.cfg.described()
        setting = f"{basis} S={kv.n_groups} {kv.mask_scope} {chooser.cfg.allocation}"
    bits_held = (
        (stored.key_bits, stored.value_bits) if grouped or mixsga.shares(model) else (16, 16)
    )
    block = f"/{stored.key_block}" * (stored.key_block != KVConfig.key_block)
    nearest = " nearest" * (method == "select" and chooser.cfg.key_rounding == "nearest")
    setting += f" K{stored.key_bits}{block} V{stored.value_bits or 'routed'}{nearest}" * (
        bits_held[0] < 16
    )
    setting += f" layers {kv.kv_layers}" * (grouped and kv.kv_layers != "all") + " routed" * (
        method == "select" and not exact
    )
    return {
        "task": task.name,
        "method": method,
        "adapter": adapter.adapter,
        "basis": basis,
        "n_groups": kv.n_groups if grouped else 1,
        "prefill": "exact" if exact else "routed",
        "relevance": relevance,
        "setting": setting,
        **shares,
        "cache_bytes": cache.nbytes(),
        "dense_bytes": dense,
        "metric": task.metric,
        "value": value,
        "dense_value": value if dense_value is None else dense_value,
        "n": task.n,
        "seed": seed,
        "seconds": round(time.time() - start, 3),
        "trainable_parameters": count_trainable(model) if params is None else params,
        "rank": adapter.r if adapter.adapter != "none" else 0,
        "key_bits": bits_held[0],
        "value_bits": bits_held[1],
        **({} if task.kl is None else {"kl": task.kl}),
        **({"select": to_dict(chooser.cfg)} if method == "select" else {}),
    }


def sweep(
    model: Transformer, task: Task, ks: list[int], dense_value: float | None = None, **about
) -> list[dict]:
    """One row per K in ks, the same model with K groups kept, each with the value of K = S as its
    dense value, measured unless given."""
    paths = list(kv_router.paths(model).values())
    before = paths[0].k
    S = paths[0].S
    rows = []
    whole = None
    if dense_value is None or S in ks:
        kv_router.set_kept(model, S)
        whole = row(model, task, dense_value=dense_value, **about)
        dense_value = whole["value"] if dense_value is None else dense_value
    for k in ks:
        kv_router.set_kept(model, k)
        rows.append(whole if k == S else row(model, task, dense_value=dense_value, **about))
    kv_router.set_kept(model, before)
    return rows


def kept_groups(model: Transformer, x: Tensor, dtype: str = "float32") -> Tensor:
    """Which groups each token of x (1, T) kept, per compressed layer: (layers, T, S) float in [0,
    1], the mean over heads."""
    paths = list(kv_router.paths(model).values())
    for p in paths:
        p.record = True
    with evaluating(model), autocast(model.norm.weight.device, dtype):
        model(x.to(model.norm.weight.device))
    masks = torch.stack([p.last_mask[0].float().mean(0) for p in paths]).cpu()  # (layers, T, S)
    for p in paths:
        p.record = False
        p.last_mask = None
    return masks


def table(rows: list[dict]) -> str:
    """The rows as text, one table per task: one line per method and setting, the value as mean +-
    standard deviation over seeds, and what it is above the same model's with whole values, where
    that is known."""
    names = list(dict.fromkeys(r["task"] for r in rows))
    if len(names) > 1:
        return "\n\n".join(
            f"{name}\n{table([r for r in rows if r['task'] == name])}" for name in names
        )
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        label = " ".join(
            filter(
                None,
                (
                    r.get("name", r["method"]),
                    r["relevance"] if r["method"] == "select" else "",
                    r.get("setting", ""),
                ),
            )
        )
        groups.setdefault((label, r["value_keep"], r["token_keep"]), []).append(r)
    speed = any("tokens_per_s" in r for r in rows)
    apart = any("kl" in r for r in rows)
    width = max(34, *(len(label) for label, *_ in groups))
    lines = [
        f"{'row':{width}s} {'trainable':>10s} {'KV kept':>8s} {'whole':>7s} {'cache bytes':>14s} "
        f"{'of dense':>9s} {rows[0]['metric']:>19s} "
        f"{'over whole':>10s}"
        + f" {'KL':>8s}" * apart
        + f" {'seeds':>5s}"
        + (f" {'tokens/s':>9s} {'peak memory':>11s}" if speed else "")
    ]
    for (label, *_), rs in groups.items():
        r, values = rs[0], [r["value"] for r in rs]
        spread = (
            f"{mean(values):.4f} +- {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"
        )
        over = (
            f"{mean(r['value'] - r['dense_value'] for r in rs):+.4f}" if r["n_groups"] > 1 else ""
        )
        kl = f"{mean(r['kl'] for r in rs):.5f}" if all("kl" in r for r in rs) else ""
        fast = r.get("tokens_per_s")
        peak = r.get("peak_memory_bytes")
        cost = (
            f" {f'{fast:,.0f}' if fast else '':>9s} "
            f"{f'{peak / 2**30:.2f} GiB' if peak else 'n/a' if fast else '':>11s}"
            if speed
            else ""
        )
        lines.append(
            f"{label:{width}s} {r['trainable_parameters']:>10,d} {r['kv_kept_layers']:>8.1%} "
            f"{r['kv_kept_model']:>7.1%} "
            f"{r['cache_bytes']:>14,d} {r['cache_bytes'] / r['dense_bytes']:>9.2%} {spread:>19s} "
            f"{over:>10s}" + f" {kl:>8s}" * apart + f" {len(values):>5d}" + cost
        )
    return "\n".join(lines)


def choices(
    model: Transformer,
    task: Task,
    variants: list[SelectConfig],
    dense_value: float | None = None,
    **about,
) -> list[dict]:
    """One row per way to choose, the same model; the dense value is measured unless given."""
    s = model.selector
    before = s.cfg
    rows = []
    if dense_value is None and not variants[0].whole:
        dense_value = whole_value(model, task, about["batch_size"], about["dtype"])
    for variant in variants:
        s.set(variant)
        rows.append(row(model, task, dense_value=dense_value, **about))
        dense_value = rows[0]["value"] if dense_value is None else dense_value
    s.cfg = before  # as it was, whatever bits values have here
    return rows


def ways_to_choose(cfg: EvalConfig, base: SelectConfig) -> list[SelectConfig]:
    """The grid of the list flags: every --kv_byte_budgets and --kv_budgets, and every
    --token_budgets with every --budgets, for each signal."""

    def listed(text: str, default):
        return [
            float(Fraction(t)) if isinstance(default, float) else t for t in comma_list(text)
        ] or [default]

    out = []
    for r in listed(cfg.relevances, base.relevance):
        # what the flag of one way says then
        alone = not (cfg.budgets or cfg.token_budgets or cfg.kv_budgets or cfg.kv_byte_budgets)
        joint = dict(relevance=r, token_relevance="", fixed_k=False)
        out += [
            replace(base, **joint, kv_bytes=b, kv_keep=0.0)
            for b in listed(cfg.kv_byte_budgets, base.kv_bytes * alone)
            if b
        ]
        out += [
            replace(base, **joint, kv_keep=b, kv_bytes=0.0)
            for b in listed(cfg.kv_budgets, base.kv_keep * alone)
            if b
        ]
        if cfg.budgets or cfg.token_budgets or (alone and not (base.kv_keep or base.kv_bytes)):
            out += [
                replace(
                    base,
                    relevance=r,
                    kv_keep=0.0,
                    kv_bytes=0.0,
                    token_relevance=by if tokens < 1 else "",
                    token_keep=tokens,
                    value_keep=rho,
                )
                for by in listed(cfg.token_relevances, base.token_relevance)
                for tokens in listed(cfg.token_budgets, base.token_keep)
                for rho in listed(cfg.budgets, base.value_keep)
            ]
    named = sorted({*comma_list(cfg.token_relevances)} - {way.token_relevance for way in out})
    check(
        not named,
        f"token_relevances={','.join(named)}",
        "no token is dropped by it",
        "give --token_budgets of less than 1",
    )
    return list(dict.fromkeys(out))


def chosen(model: Transformer, x: Tensor, dtype: str = "float32") -> selector.Choice:
    """What the selector keeps of a prompt x (1, T), all compressed layers."""
    s = model.selector
    s.record = True
    filled_cache(model, x, dtype)
    s.record = False
    return s.chosen


class Shown(NamedTuple):
    """What pictures are drawn from: masks (layers, T, S) of one sequence, share of heads; what
    selection kept of a prompt, and by which rule."""

    masks: Tensor | None = None
    choice: selector.Choice | None = None
    rule: str = ""


def plan_of(
    run: Run, cfg: EvalConfig, kv: KVConfig, select: SelectConfig, given: set[str]
) -> tuple[list[str], list[tuple[KVConfig, list]]]:
    """The methods, and every setting with what is tried in it: Ks of value groups, or ways to
    choose. What is wrong is said here."""
    trained = run.kv.kv != "dense"
    check(
        kv.kv not in SHARED or "kv" not in given,
        f"kv={kv.kv}",
        "a whole model is trained on with it",
        "give --out_dir of a run of train.py --stage=continue",
    )
    free = sorted(
        given
        & {
            "bases",
            "groups",
            "splits",
            "calibrate",
            "calibration",
            *(f.name for f in fields(KVConfig) if f.name not in STORED_AS),
        }
    )
    check(
        not (trained and free),
        f"{', '.join(free)} with {run.path}",
        "its value groups are trained with their own settings",
        "leave them out",
    )
    check(
        not kv.learn_basis,
        "learn_basis",
        "measuring trains nothing",
        "train with train.py --learn_basis, then give --out_dir",
    )
    lists = {"kv_budgets", "kv_byte_budgets", "token_budgets", "relevances", "token_relevances"}
    asked = sorted(given & {*lists, *(f.name for f in fields(SelectConfig))})
    methods = comma_list(cfg.methods)
    single = sorted(
        given & {"fixed_k", "token_relevance", "token_relevances", "token_keep", "value_keep"}
    )
    both = cfg.budgets or cfg.token_budgets
    check(
        not (single and (cfg.kv_budgets or "kv_keep" in given) and not both),
        f"{', '.join(single)} with kv_keep or kv_budgets",
        "tokens and groups are chosen together there",
        "leave them out, or add --token_budgets or --budgets",
    )
    check(
        not ("kv_keep" in given and both),
        "kv_keep with budgets or token_budgets",
        "one or the other",
        "give --kv_budgets beside them",
    )
    if not methods:
        selects = bool(asked) or (kv.kv == "select" and "kv" in given)
        groups = bool(not selects and (free or cfg.budgets or cfg.kv_bits or given & {*STORED_AS}))
        methods = (
            [run.kv.kv] if trained else ["dense"] + ["select"] * selects + ["value_groups"] * groups
        )
    check(
        not asked or "select" in methods,
        f"{', '.join(asked)}",
        "only kv=select chooses",
        "give --methods=select, or leave them out",
    )
    check(
        "select" in methods or kv.mask_scope != "shared",
        "mask_scope=shared",
        "a fixed K is routed in every layer",
        "give layer or head",
    )
    check(
        not trained or not {"value_groups", "select"} & {*methods} - {run.kv.kv},
        f"methods={cfg.methods} with {run.path}",
        f"it was trained for {run.kv.kv}",
        "name that, or give its base",
    )
    alone = [t for t in comma_list(cfg.tasks) if t == "perplexity"]
    check(
        "select" not in methods or not alone,
        "perplexity with select",
        "selection compresses prompts",
        "give --tasks=continuation or another",
    )
    grid = (
        [run.kv]
        if trained
        else [
            replace(
                kv,
                kv="value_groups",
                key_bits=16,
                value_bits=16,
                value_basis=b,
                n_groups=s,
                kv_layers=layers,
                topk_groups=max(1, s * kv.topk_groups // kv.n_groups),
                mask_scope=kv.mask_scope if kv.mask_scope != "shared" else "layer",
            )
            for b in comma_list(cfg.bases) or [kv.value_basis]
            for s in map(int, comma_list(cfg.groups) or [kv.n_groups])
            for layers in [f"from:{n}" for n in comma_list(cfg.splits)] or [kv.kv_layers]
        ]
    )
    plan = []
    for setting in grid:
        setting.check_model(run.model.cfg)
        if "value_groups" in methods or run.kv.kv == "value_groups":
            ks = [count_kept(b, setting.n_groups) for b in comma_list(cfg.budgets)] or [
                setting.topk_groups
            ]
            plan.append(
                (
                    setting,
                    [setting.n_groups] * (trained and "dense" in methods)
                    + ks * ("value_groups" in methods),
                )
            )
        if "select" in methods or run.kv.kv == "select":
            ways = ways_to_choose(cfg, select)
            for way in ways:
                selector.check_trained(way, run.model.selector.predictors if trained else ())
            if trained:
                run.model.selector.set(ways[0])
                ways = [ways[0].everything()] * ("dense" in methods) + ways * ("select" in methods)
            plan.append(
                (
                    setting if trained else replace(setting, kv="select", mask_scope=kv.mask_scope),
                    ways,
                )
            )
    # before anything is measured
    for (setting, ways), bits in itertools.product(plan, bits_of(cfg, kv, given)):
        stored = replace(setting, **bits)
        stored.check_model(run.model.cfg)
        check(
            stored.value_bits > 0 or any(way.kv_bytes for way in ways),
            "value_bits=0 without kv_bytes",
            "levels need a budget of bytes",
            "give --kv_byte_budgets=0.125",
        )
    return methods, plan


def bits_of(cfg: EvalConfig, kv: KVConfig, given: set[str]) -> list[dict]:
    """How numbers are stored, a change of KVConfig for every entry of --kv_bits, on top of the
    flags given."""
    base = {f: getattr(kv, f) for f in STORED_AS if f in given}
    out = []
    for entry in comma_list(cfg.kv_bits):
        key, _, value = entry.partition(":")
        out.append({**base, "key_bits": int(key), "value_bits": int(value or key)})
    return out or [base]


def whole_value(model: Transformer, task: Task, batch_size: int, dtype: str) -> float:
    """The task's value with whole values of as many bits as are computed in."""
    s = selector.selector_of(model)
    with kv_router.storing(model, key_bits=16, value_bits=16):
        if s is not None:
            before = s.cfg
            s.set(before.everything())
            value = task.value(model, batch_size, dtype, True)
            s.set(before)
            return value
        path = next(iter(kv_router.paths(model).values()))
        before = path.k
        kv_router.set_kept(model, path.S)
        value = task.value(model, batch_size, dtype, True)
        kv_router.set_kept(model, before)
        return value


def evaluate(
    run: Run,
    cfg: EvalConfig,
    kv: KVConfig,
    data: DataConfig,
    given: set[str] = frozenset(),
    select: SelectConfig = DEFAULT_SELECT,
) -> tuple[list[dict], Shown]:
    """The rows eval.py prints, and what its pictures show. given: the flags named on the command
    line."""
    model = run.model
    device = run.model.norm.weight.device
    T = (
        cfg.block_size
        or run.config.get("block_size")
        or (min(2048, model.cfg.block_size) if is_foreign(run.path) else model.cfg.block_size)
    )
    check(
        model.cfg.block_size >= T,
        f"block_size={T}",
        f"the model's context is {model.cfg.block_size}",
        "give a smaller --block_size",
    )
    corpus = cfg.dataset or run.config.get("corpus", "pycode")
    reads = bool({*comma_list(cfg.tasks)} & {*READING})  # the other tasks make their own text
    trained = run.kv.kv != "dense"
    (methods, plan) = plan_of(run, cfg, kv, select, given)
    (text,) = prepare_splits(corpus, data, run.tokenizer, [cfg.split]) if reads else [None]
    todo = make_tasks(cfg, run.tokenizer, T, text)
    short = [
        task.stored.size(1)
        for task in todo
        if "select" in methods and task.stored.size(1) <= (task.query or 0)
    ]
    check(
        not short,
        f"query={cfg.query}",
        f"prompts of {min(short, default=0)} tokens have no context then",
        "give a smaller --query",
    )
    about = dict(
        adapter=run.adapter,
        seed=run.config.get("seed", cfg.seed),
        batch_size=cfg.batch_size,
        dtype=cfg.dtype,
        params=run.config.get("trainable_parameters", 0),
    )
    calibration = None
    if plan and not trained:  # training-free: every basis with every number of groups
        check(
            not reads or bool(cfg.calibrate) or cfg.split in ("val", "test"),
            f"split={cfg.split}",
            "bases would be calibrated on the text that is measured",
            "give --calibrate=CORPUS",
        )
        check(
            not (reads and cfg.calibrate and same_text(cfg.calibrate, corpus)),
            f"calibrate={cfg.calibrate!r}",
            "that is the text that is measured",
            "give another, or leave it out to calibrate on the training split",
        )
        (other,) = prepare_splits(
            cfg.calibrate or corpus,
            data,
            run.tokenizer,
            [whole_split(cfg.calibrate, "train") if cfg.calibrate else "train"],
        )
        windows = batch(other, "calibrate", cfg.seed, 0, cfg.calibration, T)[0]
        calibration = [w.to(device) for w in windows.split(cfg.batch_size)]
    rows = []
    shown = Shown()
    listed = bits_of(cfg, kv, given)
    if run.kv.kv in SHARED:
        for bits in listed:
            bits = {name: n for name, n in bits.items() if name != "kv_sinks"}
            # what rows of integers after it are compared with
            whole = {r["task"]: r["value"] for r in rows if r["key_bits"] == 16}
            with mixsga.stored_in(model, **bits):
                rows += [
                    row(
                        model,
                        task,
                        kv=replace(run.kv, **bits),
                        dense_value=whole.get(task.name),
                        **about,
                    )
                    for task in todo
                ]
    elif "dense" in methods and not trained:
        rows += [row(model, task, kv=run.kv, **about) for task in todo]
    known = {r["task"]: r["value"] for r in rows}  # the dense value of every setting
    for setting, tried in plan:
        selects = setting.kv == "select"
        if not trained:
            attach_storage(
                selector.detach(model),
                setting,
                tried[0] if selects else select,
                calibration,
                cfg.seed,
            )
        measure = choices if selects else sweep
        for task, bits in itertools.product(todo, listed):
            stored = replace(
                setting,
                **bits,
                **(dict(kv_tail=task.query, kv_tail_block=1) if task.query is not None else {}),
            )
            # a trained run's whole row comes first, and has no integers
            dense = int(selects and trained and "dense" in methods and stored.ints)
            # levels need a budget of bytes
            ways = [w for w in tried[dense:] if not selects or stored.value_bits or w.kv_bytes]
            with kv_router.storing(
                model, **{f: getattr(stored, f) for f in ("kv_tail", "kv_tail_block", *STORED_AS)}
            ):
                if task.name not in known and stored.ints:
                    known[task.name] = whole_value(model, task, cfg.batch_size, cfg.dtype)
                rows += (
                    measure(model, task, ways, known.get(task.name), kv=stored, **about)
                    if ways
                    else []
                )
                if selects and ways and task is todo[0]:  # the first prompt of the first task
                    model.selector.set(ways[-1])
                    choice = chosen(model, task.stored[:1], cfg.dtype)
                    shown = Shown(
                        (choice.mask > 0)[:, 0].float().mean(1).cpu(), choice, ways[-1].described()
                    )
        if tried and not selects:
            some = (
                batch(text, "masks", cfg.seed, 0, 1, min(T, 512))[0]
                if reads
                else todo[0].stored[:1, :512]
            )
            shown = Shown(kept_groups(model, some, cfg.dtype))
    check(
        bool(rows),
        f"methods={cfg.methods} with fewer than 16 bits",
        "whole values have 16",
        "give another of --methods, or --kv_bits=16",
    )
    return rows, shown


def reuse_note(rows: list[dict]) -> str:
    """What a second question gets from a cache compressed for a first one, beside what that one
    got; empty without both tasks."""
    first, second = (
        {
            (r["relevance"], r["setting"]): r["value"]
            for r in rows
            if r["task"] == t and r["method"] == "select"
        }
        for t in ("needle", "needle_reuse")
    )
    lines = [
        f"{how[0]}: first question {first[how]:.3f}, second {second[how]:.3f}"
        for how in first
        if how in second
    ]
    return (
        "\nReuse of a cache compressed for the first question:\n" + "\n".join(lines)
        if lines
        else ""
    )


def results_folder(cfg: EvalConfig, run: Run) -> Path:
    """--results, else the folder of the stage that is evaluated, else a fresh one under out/; it
    exists then."""
    fresh = f"out/eval-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(cfg.results) if cfg.results else run.path.parent if cfg.out_dir else Path(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def results_of(name: str) -> list[dict]:
    """The rows that an earlier call wrote, of its folder. Raises ValueError where there are
    none."""
    try:
        rows = json.loads((Path(name) / "results.json").read_text())
        fits = isinstance(rows, list) and all(
            {"task", "metric", "value", "dense_value", "cache_bytes", "dense_bytes"} <= set(r)
            for r in rows
        )
    except (OSError, ValueError, TypeError) as err:
        raise ValueError(
            f"beside={name}: {err}; a folder with eval.py's results.json is needed; give "
            "--results of another call"
        ) from None
    check(
        fits,
        f"beside={name}",
        "its results.json is not eval.py's",
        "give --results of another call",
    )
    return rows


def main_mixsga(cfg: EvalConfig) -> None:
    """--tasks=mixsga: rows that are trained here."""
    place = ARGS.base.place(cfg.out_dir) if cfg.out_dir or ARGS.base.init_from != "scratch" else ""
    if not place:  # the miniature: what was not asked for is small
        cfg = replace(
            cfg,
            **{
                k: v
                for k, v in dict(batch_size=8, sequences=48, steps=20, lr=5e-4).items()
                if k not in ARGS.given
            },
        )
    folder = Path(cfg.results or f"out/mixsga-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    kv = ARGS.kv if "kv_tail" in ARGS.given else replace(ARGS.kv, kv_tail=mixsga_table.TAIL)
    print(
        json.dumps(
            mixsga_table.run_table(
                cfg, kv, ARGS.data, place, ARGS.base.options(cfg.out_dir), folder
            )
        )
    )


def main() -> None:
    cfg: EvalConfig = ARGS.eval
    if comma_list(cfg.tasks) == ["mixsga"]:
        return main_mixsga(cfg)
    device = pick_device(cfg.device)
    check_weights(ARGS.base.weights, device, cfg.dtype)
    results = Path(cfg.results or ".")
    check(
        results.is_dir() or not results.exists(), f"results={results}", "is a file", "name a folder"
    )
    check(
        not (cfg.out_dir and is_foreign(cfg.out_dir)),
        f"out_dir={cfg.out_dir}",
        "is no run of train.py",
        "give it as --init_from",
    )
    run = load_run(ARGS.base.place(cfg.out_dir), device, **ARGS.base.options(cfg.out_dir))
    # as the run's text was, unless flags say else
    prepared = {k: v for k, v in run.config.get("data", {}).items() if k not in ARGS.given}
    select = replace(
        run.select,
        **{
            f.name: getattr(ARGS.select, f.name)
            for f in fields(SelectConfig)
            if f.name in ARGS.given
        },
    )
    if run.kv.kv == "select" and "tasks" not in ARGS.given:
        cfg = replace(cfg, tasks="continuation")
    beside = [r for name in comma_list(cfg.beside) for r in results_of(name)]
    rows, shown = evaluate(run, cfg, ARGS.kv, replace(ARGS.data, **prepared), ARGS.given, select)
    folder = results_folder(cfg, run)
    metrics = run.path.parent / "metrics.jsonl"
    curves = (
        {run.path.parent.name: checkpoint.read_jsonl(metrics)}
        if cfg.out_dir and metrics.is_file()
        else {}
    )
    report(folder, rows, curves, shown.masks)
    if shown.choice is not None:
        groups_figure(folder, shown.choice, shown.rule)
    checkpoint.write_json(folder / "results.json", rows)
    drawn = rows + beside
    if any(r["metric"] == "loss" for r in drawn):
        bytes_figure(folder, drawn)
    pictures = ", ".join(
        f"{folder}/{name}"
        for name in (
            "results.json",
            "report.png",
            *(["groups.png"] if shown.choice else []),
            *(["bytes.png"] if any(r["metric"] == "loss" for r in drawn) else []),
        )
    )
    print(f"{table(rows)}{reuse_note(rows)}\n{pictures}", file=sys.stderr)
    print(json.dumps(rows))


if __name__ == "__main__":
    exit_on_bad_input(main)
