"""What a stored token costs and what it buys: perplexity with the compressed values in the loop, bytes the cache really holds.

Perplexity is *decode-mode*: the token at t reads the routed values of every earlier token, which is exactly what packed cached
decoding, token by token, gives (tests/test_kv_router.py). No number comes from uncompressed values, except in rows that say 100 %.
Cache bytes are those of the tensors a packed cache holds after one sequence, masks and offsets included.

Writes results.json and report.png into the folder and ends with one JSON line.

    python eval.py --out_dir=out/... --methods=dense,value_groups --budgets=0.25,0.5,0.75
    python eval.py --init_from=model.gguf --tasks=continuation --methods=dense,value_groups --bases=native,pca,output --groups=4,8,16
"""
from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, stdev

from config import AdapterConfig, BaseConfig, DataConfig, EvalConfig, KVConfig, check, comma_list, count_kept, exit_on_bad_input, parse_args

CONFIGS = {"eval": EvalConfig, "kv": KVConfig, "data": DataConfig, "base": BaseConfig}
if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__.splitlines()[0])

import torch
from torch import Tensor

import checkpoint
import kv_router
from data import batch, prepare_splits, same_text, whole_split
from lora import count_trainable
from model import Transformer, evaluating
from pretrained import Run, autocast, check_weights, is_foreign, load_run, pick_device
from tasks import READING, Task, make_tasks


def cache_bytes(model: Transformer, x: Tensor, dtype: str = "float32") -> tuple[int, int]:
    """(bytes held, bytes a dense cache holds) after prefilling x (B, T) int64 into caches of exactly that length, all layers."""
    device = model.norm.weight.device
    with evaluating(model), autocast(device, dtype):
        cache = model.new_cache(len(x), x.size(1))
        model(x.to(device), cache, last_only=True)
    return cache.nbytes(), model.dense_bytes(x.numel(), cache)


def kept_shares(model: Transformer, T: int) -> tuple[float, float]:
    """KV kept in compressed layers and in the whole model after T tokens, by count: keys whole, K of S value groups, the tail whole."""
    shares = []
    for p in kv_router.paths(model).values():
        packed = int(p.compressed(torch.tensor(T)))
        shares.append((1 + (p.k / p.S * packed + T - packed) / T) / 2)
    return (mean(shares) if shares else 1.0), (sum(shares) + model.cfg.n_layer - len(shares)) / model.cfg.n_layer


def row(model: Transformer, task: Task, *, adapter: AdapterConfig, kv: KVConfig, seed: int, batch_size: int = 16,
        dtype: str = "float32", dense_value: float | None = None, params: int | None = None) -> dict:
    """One result: the task's value and what the cache holds. dense_value: the value with whole values."""
    start = time.time()
    value = task.value(model, batch_size, dtype)
    held, dense = cache_bytes(model, task.stored, dtype)
    paths = list(kv_router.paths(model).values())
    in_layers, in_model = kept_shares(model, task.stored.size(1))
    grouped = bool(paths)
    exact = not grouped or (kv.prefill == "exact" and task.query is not None)
    return {"task": task.name, "method": "value_groups" if grouped else "dense", "adapter": adapter.adapter,
            "basis": kv.value_basis + "+" * kv.learn_basis if grouped else "native", "n_groups": kv.n_groups if grouped else 1,
            "prefill": "exact" if exact else "routed", "relevance": f"fixed_k:{kv.value_router}" if grouped else "none",
            "value_keep": paths[0].k / paths[0].S if grouped else 1.0, "token_keep": 1.0, "kv_kept_layers": in_layers, "kv_kept_model": in_model,
            "cache_bytes": held, "dense_bytes": dense, "metric": task.metric, "value": value,
            "dense_value": value if dense_value is None else dense_value, "n": task.n, "seed": seed, "seconds": round(time.time() - start, 3),
            "trainable_parameters": count_trainable(model) if params is None else params, "rank": adapter.r if adapter.adapter != "none" else 0}


def sweep(model: Transformer, task: Task, ks: list[int], dense_value: float | None = None, **about) -> list[dict]:
    """One row per K in ks, the same model with K groups kept, each with the value of K = S as its dense value, measured unless given."""
    paths = list(kv_router.paths(model).values())
    before, S = paths[0].k, paths[0].S
    rows, whole = [], None
    if dense_value is None or S in ks:
        kv_router.set_kept(model, S)
        whole = row(model, task, **about)
        dense_value = whole["value"] if dense_value is None else dense_value
    for k in ks:
        kv_router.set_kept(model, k)
        rows.append(whole if k == S else row(model, task, dense_value=dense_value, **about))
    kv_router.set_kept(model, before)
    return rows


def kept_groups(model: Transformer, x: Tensor, dtype: str = "float32") -> Tensor:
    """Which groups each token of x (1, T) kept, per compressed layer: (layers, T, S) float in [0, 1], the mean over heads."""
    paths = list(kv_router.paths(model).values())
    for p in paths:
        p.record = True
    with evaluating(model), autocast(model.norm.weight.device, dtype):
        model(x.to(model.norm.weight.device))
    masks = torch.stack([p.last_mask[0].float().mean(0) for p in paths]).cpu()  # (layers, T, S)
    for p in paths:
        p.record, p.last_mask = False, None
    return masks


def table(rows: list[dict]) -> str:
    """The rows as text, one table per task: one line per method and setting, the value as mean +- standard deviation over seeds, and what
    it is above the same model's with whole values, where that is known."""
    names = list(dict.fromkeys(r["task"] for r in rows))
    if len(names) > 1:
        return "\n\n".join(f"{name}\n{table([r for r in rows if r['task'] == name])}" for name in names)
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r.get("name", r["method"]), r["basis"], r["n_groups"], r["value_keep"]), []).append(r)
    speed = any("tokens_per_s" in r for r in rows)
    lines = [f"{'row':34s} {'trainable':>10s} {'KV kept':>8s} {'whole':>7s} {'cache bytes':>14s} {'of dense':>9s} {rows[0]['metric']:>19s} "
             f"{'over whole':>10s} {'seeds':>5s}" + (f" {'tokens/s':>9s} {'peak memory':>11s}" if speed else "")]
    for (name, basis, s, keep), rs in groups.items():
        r, values = rs[0], [r["value"] for r in rs]
        label = name if s == 1 else f"{name} {basis} S={s} K={round(keep * s)}"
        spread = f"{mean(values):.4f} +- {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"
        over = f"{mean(r['value'] - r['dense_value'] for r in rs):+.4f}" if s > 1 else ""
        fast, peak = r.get("tokens_per_s"), r.get("peak_memory_bytes")
        cost = f" {f'{fast:,.0f}' if fast else '':>9s} {f'{peak / 2 ** 30:.2f} GiB' if peak else 'n/a' if fast else '':>11s}" if speed else ""
        lines.append(f"{label:34s} {r['trainable_parameters']:>10,d} {r['kv_kept_layers']:>8.1%} {r['kv_kept_model']:>7.1%} "
                     f"{r['cache_bytes']:>14,d} {r['cache_bytes'] / r['dense_bytes']:>9.2%} {spread:>19s} {over:>10s} {len(values):>5d}" + cost)
    return "\n".join(lines)


def report(folder: Path, rows: list[dict], curves: dict[str, list[dict]], masks: Tensor | None) -> None:
    """Draw report.png: loss curves (mean of 5 steps), perplexity against whole-model KV kept, and which groups each token kept."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ((first, second), (third, fourth)) = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    for name, points in curves.items():
        points = [p for p in points if "loss" in p]
        smooth = [mean(q["loss"] for q in points[max(0, i - 4):i + 1]) for i in range(len(points))]
        (first if name == "pretrain" else second).plot([p["step"] for p in points], smooth, label=name, lw=1)
    for ax, title in ((first, "Pretraining"), (second, "Adaptation")):
        ax.set(xlabel="step", ylabel="training loss, nats per token", title=title)
    by_name: dict[str, list[dict]] = {}
    for r in rows:
        if r["task"] == rows[0]["task"]:  # one task to a picture
            by_name.setdefault(r.get("name", r["method"] if r["n_groups"] == 1 else f"{r['basis']}, S = {r['n_groups']}"), []).append(r)
    base = by_name.pop("base", []) if len(by_name) > 1 else []  # far above the others: named, not drawn
    for name, mine in by_name.items():
        mine = sorted(mine, key=lambda r: r["kv_kept_model"])
        third.plot([100 * r["kv_kept_model"] for r in mine], [r["value"] for r in mine], "o", ls="-" if "sweep" in name else "", ms=5, label=name)
    metric = rows[0]["metric"]
    beside = f" (base without adapter: {base[0]['value']:.2f})" if base else ""
    third.set(xlabel="KV kept in the whole model, %", ylabel=f"{metric} ({rows[0]['task']})", title=f"{metric.capitalize()} against KV kept{beside}")
    for ax in (first, second, third):
        if ax.lines:
            ax.legend(fontsize=8)
    if masks is None:
        fourth.text(0.5, 0.5, "dense: every token keeps everything", ha="center")
        fourth.set_axis_off()
    else:
        L, T, S = masks.shape
        fourth.imshow(masks.transpose(1, 2).reshape(L * S, T).numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        fourth.set(xlabel="token", ylabel="layer (its value groups top to bottom)", title="Groups kept by each token (share of heads)",
                   yticks=[S * i + (S - 1) / 2 for i in range(L)], yticklabels=[str(i) for i in range(L)])
        for i in range(1, L):
            fourth.axhline(S * i - 0.5, color="k", lw=0.5)
    fig.savefig(folder / "report.png", dpi=100)
    plt.close(fig)


def evaluate(run: Run, cfg: EvalConfig, kv: KVConfig, data: DataConfig, given: set[str] = frozenset()) -> tuple[list[dict], Tensor | None]:
    """The rows eval.py prints, and the masks of one sequence. given: the flags named on the command line."""
    model, device = run.model, run.model.norm.weight.device
    T = cfg.block_size or run.config.get("block_size") or (min(2048, model.cfg.block_size) if is_foreign(run.path) else model.cfg.block_size)
    check(model.cfg.block_size >= T, f"block_size={T}", f"the model's context is {model.cfg.block_size}", "give a smaller --block_size")
    corpus = cfg.dataset or run.config.get("corpus", "pycode")
    reads = bool({*comma_list(cfg.tasks)} & {*READING})  # the other tasks make their own text
    text, = prepare_splits(corpus, data, run.tokenizer, [cfg.split]) if reads else [None]
    todo = make_tasks(cfg, run.tokenizer, T, text)
    about = dict(adapter=run.adapter, seed=run.config.get("seed", cfg.seed), batch_size=cfg.batch_size, dtype=cfg.dtype,
                 params=run.config.get("trainable_parameters", 0))
    trained = bool(kv_router.paths(model))
    free = sorted(given & {"bases", "groups", "calibrate", "calibration", *(f.name for f in fields(KVConfig))})
    check(not (trained and free), f"{', '.join(free)} with {run.path}", "its value groups are trained with their own settings", "leave them out")
    check(not kv.learn_basis, "learn_basis", "measuring trains nothing", "train with train.py --learn_basis, then give --out_dir")
    methods = comma_list(cfg.methods) or (["value_groups"] if trained else ["dense"] + ["value_groups"] * bool(free or cfg.budgets))
    settings = [run.kv] if trained else [
        replace(kv, value_basis=b, n_groups=s, topk_groups=max(1, s * kv.topk_groups // kv.n_groups))
        for b in comma_list(cfg.bases) or [kv.value_basis] for s in map(int, comma_list(cfg.groups) or [kv.n_groups])]
    plan = []  # (setting, its Ks): what is wrong with a budget is said before anything is measured
    for setting in settings if trained or "value_groups" in methods else []:
        setting.check_model(model.cfg)
        ks = [count_kept(b, setting.n_groups) for b in comma_list(cfg.budgets)] or [setting.topk_groups]
        plan.append((setting, [setting.n_groups] * (trained and "dense" in methods) + ks * ("value_groups" in methods)))
    calibration = None
    if plan and not trained:  # training-free: every basis with every number of groups
        check(not reads or bool(cfg.calibrate) or cfg.split in ("val", "test"), f"split={cfg.split}",
              "bases would be calibrated on the text that is measured", "give --calibrate=CORPUS")
        check(not (reads and cfg.calibrate and same_text(cfg.calibrate, corpus)), f"calibrate={cfg.calibrate!r}", "that is the text that is measured",
              "give another, or leave it out to calibrate on the training split")
        other, = prepare_splits(cfg.calibrate or corpus, data, run.tokenizer, [whole_split(cfg.calibrate, "train") if cfg.calibrate else "train"])
        windows = batch(other, "calibrate", cfg.seed, 0, cfg.calibration, T)[0]
        calibration = [w.to(device) for w in windows.split(cfg.batch_size)]
    rows, masks = [], None
    if "dense" in methods and not trained:
        rows += [row(model, task, kv=run.kv, **about) for task in todo]
    known = {r["task"]: r["value"] for r in rows}  # the dense value of every setting
    for setting, ks in plan:
        if not trained:
            kv_router.attach(kv_router.detach(model), setting, calibration, cfg.seed)
        for task in todo:
            tail = dict(kv_tail=task.query, kv_tail_block=1) if task.query is not None else {}
            with kv_router.storing(model, **tail):
                rows += sweep(model, task, ks, known.get(task.name), kv=replace(setting, **tail), **about)
        masks = kept_groups(model, batch(text, "masks", cfg.seed, 0, 1, min(T, 512))[0] if reads else todo[0].stored[:1, :512], cfg.dtype)
    return rows, masks


def results_folder(cfg: EvalConfig, run: Run) -> Path:
    """--results, else the folder of the stage that is evaluated, else a fresh one under out/; it exists then."""
    fresh = f"out/eval-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(cfg.results) if cfg.results else run.path.parent if cfg.out_dir else Path(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    cfg: EvalConfig = ARGS.eval
    device = pick_device(cfg.device)
    check_weights(ARGS.base.weights, device, cfg.dtype)
    results = Path(cfg.results or ".")
    check(results.is_dir() or not results.exists(), f"results={results}", "is a file", "name a folder")
    check(not (cfg.out_dir and is_foreign(cfg.out_dir)), f"out_dir={cfg.out_dir}", "is no run of train.py", "give it as --init_from")
    run = load_run(ARGS.base.place(cfg.out_dir), device, **ARGS.base.options(cfg.out_dir))
    prepared = {k: v for k, v in run.config.get("data", {}).items() if k not in ARGS.given}  # as the run's text was, unless flags say else
    rows, masks = evaluate(run, cfg, ARGS.kv, replace(ARGS.data, **prepared), ARGS.given)
    folder, metrics = results_folder(cfg, run), run.path.parent / "metrics.jsonl"
    curves = {run.path.parent.name: checkpoint.read_jsonl(metrics)} if cfg.out_dir and metrics.is_file() else {}
    report(folder, rows, curves, masks)
    checkpoint.write_json(folder / "results.json", rows)
    print(table(rows), f"\n{folder}/results.json, {folder}/report.png", file=sys.stderr)
    print(json.dumps(rows))


if __name__ == "__main__":
    exit_on_bad_input(main)
