"""mixSGA beside GQA and CLA at equal keys and values (SGA tables 2-6): one dense base, trained on
with each for equal steps.

Every row begins with the same base, all of whose weights are trained on the same batches. Measured
are perplexity in decode mode (every token goes where its scores say, what decoding through the
cache gives), the same teacher-forced by expert choice, how often the two agree, the share of keys
and values held in decode mode and the bytes of a prompt's cache. --h2o: perplexity while a
heavy-hitter cache evicts. All methods read the newest --kv_tail tokens whole; rows of the first of
--mixes are there without that, too. On instructions perplexity is that of answers, and with
--answered every row answers others, scored by ROUGE-L.

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import mixsga
from baselines import shared_heads
from cli import say_fewer
from config import KVConfig, ModelConfig, check, comma_list
from data import Corpus, prepare, same_text, sequential
from loaders import checkpoint
from loaders.device import pick_device
from loaders.instructions import instruct_corpus
from loaders.runs import Run, load_run
from loaders.tokenizer import get_tokenizer
from measure_config import EvalConfig
from model import Transformer
from report.rows import filled_cache
from report.tables import Column, lay_out, share_of_dense, with_spread
from settings.adapters import AdapterConfig
from settings.experts import MixConfig
from settings.fields import to_dict, to_file
from settings.train import DataConfig, TrainConfig
from tasks.instruct import Instruct, instruct
from tasks.text import mean_loss
from training import same_run
from training.loop import NonFinite, Trainer
from training.shared_heads import share_heads
from training.stage import Stage
from training.world import World

SIZES = {1: "1", 2: "1,2", 3: "1,2,4", 4: "1,2,4,8"}  # of that many experts
# Rows of --ablations that are trained on instructions.
ABLATED = ("nothing added", "random router", "no consistency loss")
LONGEST_FILE = 10**6  # instructions that are answered, at most
H2O_SEQUENCES = 32  # behind each perplexity under H2O's eviction
MINI_STEPS = 500
MINI_BATCH_SIZE = 8
MINI_WINDOW = 128  # of the base that the miniature pretrains, a default model


# -- what is trained


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
    a tail and what --ablations adds. Of instructions only the ABLATED and no rows without a
    tail."""
    instructed = cfg.dataset.startswith("instruct:")
    rows = [Row("dense", KVConfig(kv="dense"), MixConfig())]
    shares = []
    for i, entry in enumerate(comma_list(cfg.mixes)):
        mix = mix_of(entry)
        mix.check_model(m)
        ours = Row(f"mixSGA {entry}", replace(kv, kv="mixsga"), mix)
        beside = [ours]
        if not mix.expert_groups and share_of(mix) not in shares:
            shares.append(share_of(mix))
            beside += baselines_at(share_of(mix), kv)
        if i > 0:
            rows += beside
            continue
        h2o = tuple(float(Fraction(t)) for t in comma_list(cfg.h2o))
        rows += [replace(r, h2o=h2o) for r in beside]
        if kv.kv_tail and not instructed:
            rows += [Row(f"{r.name}, no tail", replace(r.kv, kv_tail=0), r.mix) for r in beside]
        if cfg.ablations:
            rows += [r for r in ablations_of(ours) if not instructed or r.name.endswith(ABLATED)]
    return rows


def baselines_at(share: Fraction, kv: KVConfig) -> list[Row]:
    """GQA and CLA that keep this share of keys and values."""
    mix = MixConfig(kv_share=float(share))
    return [
        Row(f"{kind.upper()} {float(share):.0%}", replace(kv, kv=kind), mix)
        for kind in ("gqa", "cla")
    ]


def ablations_of(ours: Row) -> list[Row]:
    """A row of experts without what this project adds, all of it or one thing at a time."""
    paper = dict(calibrate_experts=False, align_heads=False, lm_to_experts=True)
    changes = {
        "nothing added": paper,
        "random router": dict(expert_router="random"),
        "router not calibrated": dict(calibrate_experts=False),
        "heads not aligned": dict(align_heads=False),
        "no consistency loss": dict(consistency_weight=0.0),
        "LM gradient to the router": dict(lm_to_experts=True),
    }
    rows = []
    for name, change in changes.items():
        kv = replace(ours.kv, kv_tail=0) if name == "nothing added" else ours.kv
        rows.append(Row(f"{ours.name}, {name}", kv, replace(ours.mix, **change)))
    return rows


# -- training a row, and measuring it


@dataclass(frozen=True)
class Experiment:
    """What all rows share: the base and a copy of its weights, the text, windows x, y (n, T) int64
    to measure on, and how training goes."""

    base: Run
    weights: dict[str, Tensor]
    corpus: Corpus
    x: Tensor
    y: Tensor
    cfg: EvalConfig
    train: TrainConfig
    world: World
    answered: Instruct | None = None  # what every row answers, too

    @property
    def window(self) -> int:
        return self.x.size(1)

    def fresh(self) -> Run:
        """The base with weights of its own, to be trained."""
        model = Transformer(self.base.model.cfg).to(self.world.device)
        model.load_state_dict(self.weights)
        return replace(self.base, model=model)


def stage_of(
    base: Run,
    corpus: Corpus,
    *,
    name: str,
    kv: KVConfig,
    window: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Stage:
    """The stage that trains all of a base and leaves nothing on disk."""
    return Stage(
        kind="continue",
        name=name,
        folder=None,
        model=base.model,
        params=list(base.model.parameters()),
        tokenizer=base.tokenizer,
        corpus=corpus,
        window=window,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        kv=kv,
    )


def train_here(stage: Stage, cfg: TrainConfig, w: World) -> None:
    """All steps of a stage. ValueError where they diverge."""
    try:
        Trainer(stage, cfg, w).run()
    except NonFinite as e:
        raise ValueError(f"{e.what}: training diverged; give a lower --lr") from None
    stage.model.eval()


def trained(shared: Experiment, row: Row, seed: int) -> Stage:
    """The base, trained on with a row's storage."""
    cfg = shared.cfg
    base = shared.fresh()
    share_heads(base, row.kv, row.mix, text=shared.corpus.train, seed=seed, window=shared.window)
    stage = stage_of(
        base,
        shared.corpus,
        name=f"{row.name}, seed {seed}",
        kv=row.kv,
        window=shared.window,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        lr=cfg.lr,
        seed=seed,
    )
    train_here(stage, shared.train, shared.world)
    return stage


def answers_of(model: Transformer, shared: Experiment) -> dict:
    """ROUGE-L of answers to --answered, where it is given, and by the examples' tasks."""
    task = shared.answered
    if task is None:
        return {}
    score = task.value(model, shared.cfg.batch_size, shared.cfg.dtype)
    return {"rouge_l": score, "answers": task.n, **task.also}


def measured(model: Transformer, row: Row, shared: Experiment) -> dict:
    """Perplexities, agreement, share kept and bytes of a trained row."""
    cfg = shared.cfg
    some = shared.x[: cfg.batch_size].to(shared.world.device)

    def perplexity(n: int | None = None) -> float:
        loss = mean_loss(model, shared.x[:n], shared.y[:n], cfg.batch_size, cfg.dtype)
        return math.exp(loss)

    with shared_heads.routing(model, "score"):
        value = perplexity()
        cache = filled_cache(model, some, cfg.dtype)
        kept = shared_heads.kept_shares(model, cache) if shared_heads.shares(model) else 1.0
        answers = answers_of(model, shared)
    with shared_heads.routing(model, "choice"):
        teacher_forced = perplexity()
        cache = filled_cache(model, some, cfg.dtype)
    same = [p.agreement.item() for p in mixsga.experts(model) if p.agreement is not None]
    h2o = {}
    for share in (*row.h2o, 1.0) if row.h2o else ():
        with shared_heads.routing(model, "score", share):
            h2o[f"{share:g}"] = perplexity(H2O_SEQUENCES)
    return {
        "value": value,
        **answers,
        "kv_kept_model": kept,
        "teacher_forced": teacher_forced,
        "agreement": mean(same) if same else 1.0,
        "cache_bytes": cache.nbytes(),
        "dense_bytes": model.dense_bytes(some.numel(), cache),
        "of_dense": model.share_of_dense(some.numel(), cache),
        "h2o": h2o,
    }


# -- the table


def mini_base(
    cfg: EvalConfig, train: TrainConfig, data: DataConfig, w: World
) -> tuple[Run, Corpus]:
    """A default model pretrained here for MINI_STEPS, and its text."""
    tokenizer = get_tokenizer(data.tokenizer)
    m = ModelConfig(vocab_size=tokenizer.vocab_size, block_size=MINI_WINDOW)
    corpus = prepare(cfg.dataset or "pycode", data, tokenizer)
    torch.manual_seed(cfg.seed)
    base = Run(
        model=Transformer(m).to(w.device),
        tokenizer=tokenizer,
        path=Path("."),
        config={},
        adapter=AdapterConfig(adapter="none"),
        kv=KVConfig(kv="dense"),
        base="",
        base_sha256="",
    )
    stage = stage_of(
        base,
        corpus,
        name="base",
        kv=base.kv,
        window=m.block_size,
        steps=MINI_STEPS,
        batch_size=MINI_BATCH_SIZE,
        lr=train.pretrain_lr,
        seed=cfg.seed,
    )
    train_here(stage, train, w)
    return base, corpus


def dense_base(place: str, options: dict, device: torch.device) -> Run:
    """The base at `place`. ValueError where it is not dense."""
    base = load_run(place, device, **options)
    check(
        base.kv.kv == "dense" and base.adapter.adapter == "none",
        f"{place}",
        "a dense base is trained on",
        "give a pretrain stage's folder",
    )
    return base


def experiment_of(
    cfg: EvalConfig, kv: KVConfig, data: DataConfig, place: str, options: dict
) -> Experiment:
    """What all rows share. Rows that cannot be are refused before anything is trained."""
    w = World(0, 1, pick_device(cfg.device))
    train = TrainConfig(dtype=cfg.dtype, warmup=0.1, adapt_lr=cfg.lr)
    if place:
        base = dense_base(place, options, w.device)
        trained_on = f"{cfg.dataset},{base.config.get('corpus', '')}"
        check(
            not cfg.answered or not same_text(f"instruct:{cfg.answered}", trained_on),
            f"answered={cfg.answered}",
            "its answers are trained on",
            "give a file of others",
        )
        rows_of(cfg, kv, base.model.cfg)
        longest = base.model.cfg.block_size
        name = cfg.dataset or base.config.get("corpus", "pycode")
        if name.startswith("instruct:"):
            window = min(cfg.block_size or longest, longest)
            corpus = instruct_corpus(name, data, base.tokenizer, window)
        else:
            corpus = prepare(name, data, base.tokenizer)
    else:
        rows_of(cfg, kv, ModelConfig())
        base, corpus = mini_base(cfg, train, data, w)
    longest = base.model.cfg.block_size
    x, y = sequential(corpus.val, cfg.sequences, min(cfg.block_size or longest, longest))
    say_fewer("the table's text", len(x), cfg.sequences)
    weights = copy.deepcopy(base.model.state_dict())
    answered = None
    if cfg.answered:
        name = f"instruct:{cfg.answered}"
        about = (base.tokenizer, longest, LONGEST_FILE, cfg.seed, 0, name, data.template)
        answered = instruct(*about, cfg.answer_tokens)
    return Experiment(base, weights, corpus, x, y, cfg, train, w, answered)


def settings_of(shared: Experiment, kv: KVConfig) -> dict:
    """What two calls must share for their rows to stand in one table."""
    cfg = shared.cfg
    return {
        "base": shared.base.base_sha256 or f"miniature, seed {cfg.seed}",
        "steps": cfg.steps,
        "lr": cfg.lr,
        "batch_size": cfg.batch_size,
        "window": shared.window,
        "sequences": len(shared.x),
        "dataset": cfg.dataset,
        "n_groups": kv.n_groups,
        "answered": cfg.answered,
        "dtype": cfg.dtype,
    }


def earlier_rows(path: Path) -> list[dict]:
    """The rows that an earlier call left in its results.json. ValueError where it is damaged."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    check(
        isinstance(found, list), str(path), "it is damaged", "move it away, or give --results=DIR"
    )
    return [r for r in found if isinstance(r, dict)]


def new_row(shared: Experiment, row: Row, key: dict, settings: dict) -> dict:
    """Train and measure a row. key: what tells it from others of the table."""
    start = time.time()
    stage = trained(shared, row, key["seed"])
    return {
        "task": "mixsga",
        "method": row.kv.kv,
        **key,
        "metric": "perplexity",
        **measured(stage.model, row, shared),
        "n": shared.x.numel(),
        "trainable_parameters": sum(p.numel() for p in stage.params),
        "seconds": round(time.time() - start, 2),
        "settings": settings,
    }


def run_table(
    cfg: EvalConfig, kv: KVConfig, data: DataConfig, *, place: str, options: dict, folder: Path
) -> list[dict]:
    """Train and measure every row of every seed, the base from `place` ("": the miniature's own).
    Rows that `folder`/results.json holds from the same settings are not trained again; it is
    written after every row."""
    begin = time.time()
    path = folder / "results.json"
    done = earlier_rows(path)
    shared = experiment_of(cfg, kv, data, place, options)
    settings = settings_of(shared, kv)
    done = [r for r in done if r.get("settings") == settings]
    out: list[dict] = []
    for row, key in keys_of(cfg, kv, shared.base.model.cfg):
        known = next((r for r in done if is_of(r, key)), None)
        out.append(known or new_row(shared, row, key, settings))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, out + [r for r in done if r not in out])
    print(f"{table(out)}\n{path}, {time.time() - begin:.0f} s", file=sys.stderr)
    return out


def is_of(row: dict, key: dict) -> bool:
    """Whether an earlier row, of whichever version, is the one that key tells from the others."""
    return all(same_run.entry(row, name) == same_run.entry(key, name) for name in key)


def keys_of(cfg: EvalConfig, kv: KVConfig, m: ModelConfig) -> Iterator[tuple[Row, dict]]:
    """Every row with every seed, and what tells it from the others."""
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for row in rows_of(cfg, kv, m):
            yield (
                row,
                {
                    "name": row.name,
                    "seed": seed,
                    "kv": to_file(row.kv),
                    "mix": to_dict(row.mix),
                    "h2o_asked": list(row.h2o),
                },
            )


def table(rows: list[dict]) -> str:
    """The rows as text, a line per name: means over seeds, and the standard deviation of the first
    perplexity."""
    by_name: dict[str, list[dict]] = {}
    for r in rows:
        by_name.setdefault(r["name"], []).append(r)
    width = max(map(len, by_name))
    columns = [
        Column("trained on with", width),
        Column("KV kept", 8),
        Column("cache bytes", 13),
        Column("of dense", 8),
        Column("decode mode", 20),
        Column("teacher-forced", 14),
        Column("agreement", 9),
        Column("ROUGE-L", 20),
        Column("seeds", 5),
    ]
    if "rouge_l" not in rows[0]:
        columns.pop(-2)
    lines = lay_out(columns, [cells_of(name, rs) for name, rs in by_name.items()])
    evicted = [f"{name:{width}s} {h2o_line(rs)}" for name, rs in by_name.items() if rs[0]["h2o"]]
    if evicted:
        lines += [
            "perplexity in decode mode while H2O evicts, by tokens held (masked: no bytes are "
            "claimed):",
            *evicted,
        ]
    return "\n".join(lines)


def cells_of(name: str, rows: list[dict]) -> list[str]:
    """A line of the table, of the same row with several seeds."""

    def average(key: str) -> float:
        return mean(r[key] for r in rows)

    answers = [with_spread([r["rouge_l"] for r in rows])] if "rouge_l" in rows[0] else []
    return [
        name,
        f"{average('kv_kept_model'):.1%}",
        f"{average('cache_bytes'):,.0f}",
        f"{mean(map(share_of_dense, rows)):.1%}",
        with_spread([r["value"] for r in rows]),
        f"{average('teacher_forced'):.4f}",
        f"{average('agreement'):.1%}",
        *answers,
        str(len(rows)),
    ]


def h2o_line(rows: list[dict]) -> str:
    """Perplexities under eviction, the most tokens held first."""
    shares = sorted(rows[0]["h2o"], key=float, reverse=True)
    return "  ".join(f"{float(k):.0%}: {mean(r['h2o'][k] for r in rows):.4f}" for k in shares)
