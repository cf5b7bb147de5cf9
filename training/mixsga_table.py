"""mixSGA beside GQA and CLA at equal keys and values (SGA tables 2-6): one dense base, trained on
with each for equal steps.

Every row begins with the same base, all of whose weights are trained on the same batches. Measured
are perplexity in decode mode (every token goes where its scores say, what decoding through the
cache gives), the same teacher-forced by expert choice, how often the two agree, the share of keys
and values held in decode mode and the bytes of a prompt's cache. --h2o: perplexity while a
heavy-hitter cache evicts. All methods read the newest --kv_tail tokens whole; rows of the first of
--mixes are there without that, too.

    python eval.py \\
        --tasks=mixsga  # in miniature: pretrains a base, about 2 minutes on two cores
    python eval.py --tasks=mixsga --out_dir=out/RUN/pretrain --steps=100 --seeds=2 \\
        --results=out/mixsga   # again: goes on where it stopped
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

import mixsga
from baselines import align
from config import AdapterConfig, KVConfig, MixConfig, ModelConfig, check, comma_list
from data import batch, prepare, sequential
from loaders import checkpoint
from loaders.device import autocast, pick_device
from loaders.runs import Run, load_run
from loaders.tokenizer import get_tokenizer
from measure_config import EvalConfig
from model import Transformer, evaluating
from settings.fields import to_dict
from settings.train import DataConfig, TrainConfig
from tasks.text import mean_loss
from training.loop import (
    Stage,
    World,
    gradients,
    learning_rate,
    make_optimizer,
    optimizer_settings,
    set_rate,
)

SIZES = {1: "1", 2: "1,2", 3: "1,2,4", 4: "1,2,4,8"}
CALIBRATION = (4, 8)  # batches and their sequences that heads are aligned and routers calibrated on
TAIL = 16  # newest tokens read whole, unless a flag says otherwise
MINI_STEPS = 500
MINI_WINDOW = 128  # of the base that the miniature pretrains, a default model


def continued(
    base: Run,
    kv: KVConfig,
    mix: MixConfig,
    corpus,
    cfg: TrainConfig,
    *,
    name: str,
    folder: Path,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    window: int,
    about: dict | None = None,
) -> Stage:
    """The stage that trains on all of a dense base, in place, with keys and values shared as kv and
    mix say. Where a file names a base, its weights' sha256 is kept."""
    torch.manual_seed(seed)
    model = base.model
    if kv.kv != "dense":
        device = model.norm.weight.device
        seen = [
            batch(corpus.train, "calibrate", seed, i, CALIBRATION[1], window)
            for i in range(CALIBRATION[0])
        ]
        align.fit(mixsga.attach(model, kv, mix), [(x.to(device), y.to(device)) for x, y in seen])
    model.requires_grad_(True)
    adapter = AdapterConfig(adapter="none")
    config = {
        "stage": "continue",
        "model": to_dict(model.cfg),
        "tokenizer": base.tokenizer.name,
        "adapter": to_dict(adapter),
        "kv": to_dict(kv),
        "mix": to_dict(mix),
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "block_size": window,
        "optimizer": optimizer_settings(cfg),
        "base_sha256": base.base_sha256,
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        **(about or {}),
    }
    return Stage(
        name,
        model,
        list(model.parameters()),
        corpus,
        base.tokenizer,
        folder,
        steps,
        batch_size,
        lr,
        seed,
        config,
        adapter,
        kv,
        True,
        window,
    )


def train_here(stage: Stage, cfg: TrainConfig, w: World) -> None:
    """All steps of a stage, nothing written."""
    opt = make_optimizer(stage.params, cfg)
    stage.model.train()
    for step in tqdm(
        range(stage.steps),
        desc=stage.name,
        unit="step",
        mininterval=20 if not sys.stderr.isatty() else 0.5,
    ):
        set_rate(opt, learning_rate(step, stage.steps, stage.lr, cfg.warmup))
        opt.zero_grad(set_to_none=True)
        loss, norm, _ = gradients(stage, stage.model, step, cfg, w, False)
        check(
            math.isfinite(loss) and math.isfinite(norm),
            f"{stage.name}: loss {loss} at step {step}",
            "training diverged",
            "give a lower --lr",
        )
        opt.step()
    stage.model.eval()


@dataclass(frozen=True)
class Row:
    """One line of the table: name, storage, and the shares that H2O is tried at."""

    name: str
    kv: KVConfig
    mix: MixConfig
    h2o: tuple[float, ...] = ()


def mix_of(entry: str) -> MixConfig:
    """The experts of an entry of --mixes: RATIOS, or SIZES@RATIOS with sizes between dashes; +K: K
    of the value groups kept, too."""
    text, _, groups = entry.partition("+")
    sizes, at, ratios = text.rpartition("@")
    check(
        not groups or groups.isdigit(),
        f"mixes={entry!r}",
        "+K is a number of value groups",
        "give for example 3:1:6+2",
    )
    n = len(ratios.split(":"))
    check(
        bool(at) or n in SIZES,
        f"mixes={entry!r}",
        "one to four experts have sizes 1, 2, 4, 8",
        "give SIZES@RATIOS, such as 1-4@1:2",
    )
    return MixConfig(
        group_sizes=sizes.replace("-", ",") if at else SIZES[n],
        expert_ratios=ratios,
        expert_groups=int(groups or 0),
    )


def share_of(mix: MixConfig) -> Fraction:
    """Keys and values kept by these experts' heads, before value groups."""
    return sum(r / g for r, g in zip(mix.ratios, mix.sizes, strict=True))


def rows_of(cfg: EvalConfig, kv: KVConfig, m: ModelConfig) -> list[Row]:
    """Every entry of --mixes; GQA and CLA at the same shares; for the first entry H2O, rows without
    a tail and what --ablations adds."""
    h2o = tuple(float(Fraction(t)) for t in comma_list(cfg.h2o))
    rows = [Row("dense", KVConfig(kv="dense"), MixConfig())]
    shares = []
    for i, entry in enumerate(comma_list(cfg.mixes)):
        mix = mix_of(entry)
        ours = replace(kv, kv="mixsga")
        mix.check_model(m)
        name = f"mixSGA {entry}"
        share = share_of(mix)
        three = [Row(name, ours, mix)]
        if not mix.expert_groups and share not in shares:
            shares.append(share)
            three += [
                Row(
                    f"{kind.upper()} {float(share):.0%}",
                    replace(kv, kv=kind),
                    MixConfig(kv_share=float(share)),
                )
                for kind in ("gqa", "cla")
            ]
        rows += [replace(r, h2o=h2o) for r in three] if i == 0 else three
        if i == 0 and kv.kv_tail:
            rows += [Row(f"{r.name}, no tail", replace(r.kv, kv_tail=0), r.mix) for r in three]
        if i == 0 and cfg.ablations:
            plain = replace(mix, calibrate_experts=False, align_heads=False)
            rows += [
                Row(
                    f"{name}, nothing added",
                    replace(ours, kv_tail=0),
                    replace(plain, lm_to_experts=True),
                ),
                Row(f"{name}, random router", ours, replace(mix, expert_router="random")),
                Row(f"{name}, router not calibrated", ours, replace(mix, calibrate_experts=False)),
                Row(f"{name}, heads not aligned", ours, replace(mix, align_heads=False)),
                Row(f"{name}, no consistency loss", ours, replace(mix, consistency_weight=0.0)),
                Row(f"{name}, LM gradient to the router", ours, replace(mix, lm_to_experts=True)),
            ]
    return rows


def measured(stage: Stage, row: Row, x, y, batch_size: int, dtype: str) -> dict:
    """Perplexities, agreement, share kept and bytes of a trained row. x, y (n, T) int64."""
    model = stage.model
    device = stage.model.norm.weight.device
    out = {}
    some = x[:batch_size].to(device)
    for by, key in (("score", "value"), ("choice", "teacher_forced")):
        with mixsga.routing(model, by):
            out[key] = math.exp(mean_loss(model, x, y, batch_size, dtype))
            with evaluating(model), autocast(device, dtype):
                cache = model.new_cache(*some.shape)
                model(some, cache, last_only=True)
        if by == "score":
            out["kv_kept_model"] = mixsga.kept_shares(model, cache) if mixsga.shares(model) else 1.0
    same = [p.agreement.item() for p in mixsga.experts(model) if p.agreement is not None]
    h2o = {}
    for keep in (*row.h2o, 1.0) if row.h2o else ():
        with mixsga.routing(model, "score", keep):
            h2o[f"{keep:g}"] = math.exp(mean_loss(model, x[:32], y[:32], batch_size, dtype))
    return {
        **out,
        "agreement": mean(same) if same else 1.0,
        "cache_bytes": cache.nbytes(),
        "dense_bytes": model.dense_bytes(some.numel(), cache),
        "h2o": h2o,
    }


def mini_base(
    cfg: EvalConfig, train: TrainConfig, data: DataConfig, w: World
) -> tuple[Run, object]:
    """A default model pretrained here for MINI_STEPS, and its text."""
    tokenizer = get_tokenizer(data.tokenizer)
    m = ModelConfig(vocab_size=tokenizer.vocab_size, block_size=MINI_WINDOW)
    corpus = prepare(cfg.dataset or "pycode", data, tokenizer)
    torch.manual_seed(cfg.seed)
    run = Run(
        Transformer(m).to(w.device),
        tokenizer,
        Path("."),
        {},
        AdapterConfig(adapter="none"),
        KVConfig(kv="dense"),
        "",
        "",
    )
    stage = continued(
        run,
        run.kv,
        MixConfig(),
        corpus,
        train,
        name="base",
        folder=Path("."),
        steps=MINI_STEPS,
        lr=train.pretrain_lr,
        batch_size=8,
        seed=cfg.seed,
        window=m.block_size,
    )
    train_here(stage, train, w)
    return run, corpus


def run_table(
    cfg: EvalConfig, kv: KVConfig, data: DataConfig, place: str, options: dict, folder: Path
) -> list[dict]:
    """Train and measure every row of every seed, the base from `place` ("": the miniature's own).
    Rows that `folder`/results.json holds from the same settings are not trained again; it is
    written after every row."""
    device = pick_device(cfg.device)
    w = World(0, 1, device)
    begin = time.time()
    train = TrainConfig(dtype=cfg.dtype, warmup=0.1, adapt_lr=cfg.lr)
    if place:
        base = load_run(place, device, **options)
        check(
            base.kv.kv == "dense" and base.adapter.adapter == "none",
            f"{place}",
            "a dense base is trained on",
            "give a pretrain stage's folder",
        )
        rows_of(cfg, kv, base.model.cfg)
        corpus = prepare(cfg.dataset or base.config.get("corpus", "pycode"), data, base.tokenizer)
    else:
        rows_of(cfg, kv, ModelConfig())
        base, corpus = mini_base(cfg, train, data, w)
    m = base.model.cfg
    window = min(cfg.block_size or m.block_size, m.block_size)
    x, y = sequential(corpus.val, cfg.sequences, window)
    weights = copy.deepcopy(base.model.state_dict())
    settings = {
        "base": base.base_sha256 or f"miniature, seed {cfg.seed}",
        "steps": cfg.steps,
        "lr": cfg.lr,
        "batch_size": cfg.batch_size,
        "window": window,
        "sequences": len(x),
        "dataset": cfg.dataset,
        "n_groups": kv.n_groups,
        "dtype": cfg.dtype,
    }
    path = folder / "results.json"
    done = []
    if path.is_file():
        done = [
            r
            for r in json.loads(path.read_text())
            if isinstance(r, dict) and r.get("settings") == settings
        ]
    out: list[dict] = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for row in rows_of(cfg, kv, m):
            key = {
                "name": row.name,
                "seed": seed,
                "kv": to_dict(row.kv),
                "mix": to_dict(row.mix),
                "h2o_asked": list(row.h2o),
            }
            known = next((r for r in done if all(r.get(k) == v for k, v in key.items())), None)
            if known is None:
                start = time.time()
                model = Transformer(m).to(device)
                model.load_state_dict(weights)
                run = replace(base, model=model)
                stage = continued(
                    run,
                    row.kv,
                    row.mix,
                    corpus,
                    train,
                    name=f"{row.name}, seed {seed}",
                    folder=folder,
                    steps=cfg.steps,
                    lr=cfg.lr,
                    batch_size=cfg.batch_size,
                    seed=seed,
                    window=window,
                )
                train_here(stage, train, w)
                got = measured(stage, row, x, y, cfg.batch_size, cfg.dtype)
                known = {
                    "task": "mixsga",
                    "method": row.kv.kv,
                    **key,
                    "metric": "perplexity",
                    **got,
                    "n": x.numel(),
                    "trainable_parameters": stage.config["trainable_parameters"],
                    "seconds": round(time.time() - start, 2),
                    "settings": settings,
                }
            out.append(known)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(path, out + [r for r in done if r not in out])
    print(f"{table(out)}\n{folder}/results.json, {time.time() - begin:.0f} s", file=sys.stderr)
    return out


def table(rows: list[dict]) -> str:
    """The rows as text, a line per name: means over seeds, and the standard deviation of the first
    perplexity."""
    width = max(len(r["name"]) for r in rows)
    lines = [
        f"{'trained on with':{width}s} {'KV kept':>8s} {'cache bytes':>13s} {'of dense':>8s} "
        f"{'decode mode':>20s} {'teacher-forced':>14s} "
        f"{'agreement':>9s} {'seeds':>5s}"
    ]
    evicted = []
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name]
        values = [r["value"] for r in mine]
        spread = f"{mean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else "")
        kept, size = (mean(r[k] for r in mine) for k in ("kv_kept_model", "cache_bytes"))
        lines.append(
            f"{name:{width}s} {kept:>8.1%} {size:>13,.0f} {size / mine[0]['dense_bytes']:>8.1%} "
            f"{spread:>20s} "
            f"{mean(r['teacher_forced'] for r in mine):>14.4f} "
            f"{mean(r['agreement'] for r in mine):>9.1%} {len(mine):>5d}"
        )
        if mine[0]["h2o"]:
            shares = sorted(mine[0]["h2o"], key=float, reverse=True)
            evicted.append(
                f"{name:{width}s} "
                + "  ".join(
                    f"{float(k):.0%}: {mean(r['h2o'][k] for r in mine):.4f}" for k in shares
                )
            )
    if evicted:
        lines += [
            "perplexity in decode mode while H2O evicts, by tokens held (masked: no bytes are "
            "claimed):",
            *evicted,
        ]
    return "\n".join(lines)
