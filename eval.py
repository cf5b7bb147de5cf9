"""What a stored token costs and what it buys: perplexity with the compressed values in the loop, bytes the cache really holds.

Perplexity is *decode-mode*: the token at t reads the routed values of every earlier token, which is exactly what packed cached
decoding, token by token, gives (tests/test_kv_router.py). No number comes from uncompressed values, except in rows that say 100 %.
Cache bytes are those of the tensors a packed cache holds after one sequence, masks and offsets included.

Writes results.json and report.png into the folder and ends with one JSON line.

    python eval.py --out_dir=out/... --methods=dense,value_groups --budgets=0.25,0.5,0.75
"""
from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from config import AdapterConfig, DataConfig, EvalConfig, KVConfig, comma_list, count_kept, exit_on_bad_input, parse_args

if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args({"eval": EvalConfig, "kv": KVConfig, "data": DataConfig}, description=__doc__.splitlines()[0])

import torch
from torch import Tensor

import checkpoint
import kv_router
from data import batch, prepare, sequential
from lora import count_trainable
from model import Transformer, evaluating, lm_loss
from pretrained import Run, autocast, load_run, pick_device


def mean_loss(model: Transformer, x: Tensor, y: Tensor, batch_size: int, dtype: str = "float32") -> float:
    """Mean next-token loss in nats over x, y (n, T) int64, decode mode, batch_size rows at a time."""
    device, total = model.norm.weight.device, 0.0
    with evaluating(model):
        for i in range(0, len(x), batch_size):
            xb, yb = x[i:i + batch_size].to(device), y[i:i + batch_size].to(device)
            with autocast(device, dtype):
                total += lm_loss(model(xb), yb).item() * len(xb)
    return total / len(x)


def cache_bytes(model: Transformer, x: Tensor) -> tuple[int, int]:
    """(bytes held, bytes a dense cache holds) after prefilling x (B, T) int64 into caches of exactly that length, all layers."""
    device = model.norm.weight.device
    cache = model.new_cache(len(x), x.size(1))
    with evaluating(model):
        model(x.to(device), cache, last_only=True)
    item = model.embed_tokens.weight.element_size()
    return cache.nbytes(), 2 * item * x.numel() * model.cfg.n_kv_head * model.cfg.head_dim * model.cfg.n_layer


def kept_shares(model: Transformer, T: int) -> tuple[float, float]:
    """KV kept in compressed layers and in the whole model after T tokens, by count: keys whole, K of S value groups, the tail whole."""
    shares = []
    for p in kv_router.paths(model).values():
        packed = int(p.compressed(torch.tensor(T)))
        shares.append((1 + (p.k / p.S * packed + T - packed) / T) / 2)
    return (mean(shares) if shares else 1.0), (sum(shares) + model.cfg.n_layer - len(shares)) / model.cfg.n_layer


def row(model: Transformer, x: Tensor, y: Tensor, *, adapter: AdapterConfig, kv: KVConfig, seed: int, batch_size: int = 16,
        dtype: str = "float32", dense_value: float | None = None, params: int | None = None) -> dict:
    """One result: decode-mode perplexity over x, y (n, T) and what the cache holds. dense_value: perplexity with whole values."""
    start = time.time()
    value = math.exp(mean_loss(model, x, y, batch_size, dtype))
    held, dense = cache_bytes(model, x[:4])
    paths = list(kv_router.paths(model).values())
    in_layers, in_model = kept_shares(model, x.size(1))
    grouped = bool(paths)
    return {"task": "perplexity", "method": "value_groups" if grouped else "dense", "adapter": adapter.adapter,
            "basis": kv.value_basis if grouped else "native", "n_groups": kv.n_groups if grouped else 1, "prefill": "routed" if grouped else "exact",
            "relevance": f"fixed_k:{kv.value_router}" if grouped else "none", "value_keep": paths[0].k / paths[0].S if grouped else 1.0,
            "token_keep": 1.0, "kv_kept_layers": in_layers, "kv_kept_model": in_model, "cache_bytes": held, "dense_bytes": dense,
            "metric": "perplexity", "value": value, "dense_value": value if dense_value is None else dense_value, "n": x.numel(), "seed": seed,
            "seconds": round(time.time() - start, 3), "trainable_parameters": count_trainable(model) if params is None else params,
            "rank": adapter.r if adapter.adapter != "none" else 0}


def sweep(model: Transformer, x: Tensor, y: Tensor, ks: list[int], **about) -> list[dict]:
    """One row per K in ks, the same model with K groups kept, each with the perplexity of K = S as its dense value."""
    paths = list(kv_router.paths(model).values())
    before = paths[0].k
    kv_router.set_kept(model, paths[0].S)
    dense = math.exp(mean_loss(model, x, y, about.get("batch_size", 16), about.get("dtype", "float32")))
    rows = []
    for k in ks:
        kv_router.set_kept(model, k)
        rows.append(row(model, x, y, dense_value=dense, **about))
    kv_router.set_kept(model, before)
    return rows


def kept_groups(model: Transformer, x: Tensor) -> Tensor:
    """Which groups each token of x (1, T) kept, per compressed layer: (layers, T, S) float in [0, 1], the mean over heads."""
    paths = list(kv_router.paths(model).values())
    for p in paths:
        p.record = True
    with evaluating(model):
        model(x.to(model.norm.weight.device))
    masks = torch.stack([p.last_mask[0].float().mean(0) for p in paths]).cpu()  # (layers, T, S)
    for p in paths:
        p.record, p.last_mask = False, None
    return masks


def table(rows: list[dict]) -> str:
    """The rows as text, one line per method and setting, perplexity as mean +- standard deviation over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r.get("name", r["method"]), r["n_groups"], r["value_keep"]), []).append(r)
    lines = [f"{'row':34s} {'trainable':>10s} {'KV kept':>8s} {'whole':>7s} {'cache bytes':>12s} {'of dense':>9s} {'perplexity':>17s} {'seeds':>5s}"]
    for (name, s, keep), rs in groups.items():
        r, values = rs[0], [r["value"] for r in rs]
        label = name if s == 1 else f"{name} S={s} K={round(keep * s)}"
        spread = f"{mean(values):.4f} +- {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"
        lines.append(f"{label:34s} {r['trainable_parameters']:>10,d} {r['kv_kept_layers']:>8.1%} {r['kv_kept_model']:>7.1%} {r['cache_bytes']:>12,d} "
                     f"{r['cache_bytes'] / r['dense_bytes']:>9.2%} {spread:>17s} {len(values):>5d}")
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
        by_name.setdefault(r.get("name", r["method"]), []).append(r)
    base = by_name.pop("base", []) if len(by_name) > 1 else []  # far above the others: named, not drawn
    for name, mine in by_name.items():
        mine = sorted(mine, key=lambda r: r["kv_kept_model"])
        third.plot([100 * r["kv_kept_model"] for r in mine], [r["value"] for r in mine], "o", ls="-" if "sweep" in name else "", ms=5, label=name)
    third.set(xlabel="KV kept in the whole model, %", ylabel="validation perplexity (decode mode)",
              title="Perplexity against KV kept" + (f" (base without adapter: {base[0]['value']:.2f})" if base else ""))
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


def evaluate(run: Run, cfg: EvalConfig, kv: KVConfig, data: DataConfig) -> tuple[list[dict], Tensor | None]:
    """The rows eval.py prints, and the masks of one sequence."""
    model, device = run.model, run.model.norm.weight.device
    corpus = prepare(cfg.dataset or run.config["corpus"], data, run.tokenizer)
    T = cfg.block_size or model.cfg.block_size
    x, y = sequential(corpus.val, cfg.sequences, T)
    about = dict(adapter=run.adapter, seed=run.config.get("seed", 0), batch_size=cfg.batch_size, dtype=cfg.dtype,
                 params=run.config.get("trainable_parameters", 0))
    methods = comma_list(cfg.methods) or [run.kv.kv if kv_router.paths(model) else "dense"]
    rows, masks = [], None
    trained = bool(kv_router.paths(model))
    if "dense" in methods and not trained:
        rows.append(row(model, x, y, kv=run.kv, **about))
    if "value_groups" in methods or trained:
        if not trained:  # training-free: calibrate on the training split
            calibration = [batch(corpus.train, "calibrate", cfg.seed, i, cfg.batch_size, T)[0].to(device) for i in range(2)]
            kv_router.fold(kv_router.attach(model, kv, calibration, cfg.seed))
        kv = run.kv if trained else kv
        ks = [count_kept(b, kv.n_groups) for b in comma_list(cfg.budgets)] or [kv.topk_groups]
        rows += sweep(model, x, y, ([kv.n_groups] if "dense" in methods and trained else []) + ks, kv=kv, **about)
        masks = kept_groups(model, x[:1])
    return rows, masks


def main() -> None:
    cfg: EvalConfig = ARGS.eval
    device = pick_device(cfg.device)
    run = load_run(cfg.out_dir, device)
    rows, masks = evaluate(run, cfg, ARGS.kv, ARGS.data)
    folder = Path(cfg.out_dir)
    metrics = folder / "metrics.jsonl"
    curves = {run.path.parent.name: checkpoint.read_jsonl(metrics if metrics.is_file() else run.path.parent / "metrics.jsonl")}
    report(folder, rows, curves, masks)
    checkpoint.write_json(folder / "results.json", rows)
    print(table(rows), file=sys.stderr)
    print(json.dumps(rows))


if __name__ == "__main__":
    exit_on_bad_input(main)
