"""Adapt a frozen base, once as asked, or once per row and seed of the table of adapters.

Adaptation (arXiv 2604.21335, 3.1): L = L_LM + 0.01 * load balance + 0.1 * L_aux. In the table the
baselines, LoRA and MoE-LoRA over dense values, get at least as many trainable parameters as the
sub-token row (--preset=paper: the paper's ranks instead).

    python train.py
    python train.py --stage=adapt --init_from=out/RUN/pretrain --adapter=routed \\
        --kv=value_groups --reconstructor=mlp
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import torch
from torch import Tensor

import kv_router
import lora
from cli import note, say_fewer
from config import KVConfig, ModelConfig, check
from data import prepare_splits, same_text, sequential, whole_split
from loaders import checkpoint
from loaders.runs import Run, find_checkpoint, load_added_state
from loaders.tokenizer import get_tokenizer
from model import Transformer
from report.figures import SWEEP, report_figure
from report.rows import RowAbout, kept_groups, measure_row, sweep
from report.tables import result_table, share_of_dense
from selector import selector_of
from settings.adapters import AdapterConfig
from settings.fields import to_dict
from settings.train import TrainConfig
from storage.layout import cdiv
from tasks.text import Perplexity
from training.base import (
    adapt_window,
    base_record,
    calibration_batches,
    corpus_of,
    load_base,
    pretrain_stage,
    start_from,
    take_selection,
    text_record,
)
from training.loop import NonFinite, train
from training.stage import Stage
from training.world import World, share_parameters

# -- one adaptation


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What is trained over a frozen base, how, and the name of its folder."""

    name: str
    adapter: AdapterConfig
    kv: KVConfig
    seed: int
    objective: str
    steps: int
    lr: float
    kv_from: str | Path  # a run whose value groups are started from; empty: they are calibrated


def adaptation(args, **changes) -> Adaptation:
    """The adaptation that the flags ask for, some of it changed."""
    cfg: TrainConfig = args.train
    kind = args.kv.kv if args.adapter.adapter == "none" else args.adapter.adapter
    asked = Adaptation(
        name=f"{kind}-s{cfg.seed}",
        adapter=args.adapter,
        kv=args.kv,
        seed=cfg.seed,
        objective=cfg.objective,
        steps=cfg.adapt_steps,
        lr=cfg.adapt_lr,
        kv_from=cfg.kv_from,
    )
    return replace(asked, **changes)


def adapt_stage(args, run_dir: Path, w: World, base: Run, what: Adaptation) -> Stage:
    """Give a loaded base value groups and adapters, in place: return the stage that
    training/loop.py trains."""
    cfg: TrainConfig = args.train
    window = adapt_window(args, base)
    selects = what.kv.kv == "select"
    check(
        what.objective == "lm" or what.adapter.adapter == "none" or selects,
        f"objective={what.objective} with adapter={what.adapter.adapter}",
        "the base itself is the teacher",
        "give --adapter=none and --learn_basis",
    )
    if not selects:  # a selection is that of another run, over the same base
        what.kv.check_model(base.model.cfg)
    name = cfg.corpus("adapt")
    corpus = corpus_of(args, name, base.tokenizer, window)
    torch.manual_seed(what.seed)
    stored: dict = {}
    if selects:
        what, began, stored = attach_selection(args, base, what, window)
    else:
        began = attach_value_groups(base, what, corpus.train, window, w)
    lora.attach(base.model, what.adapter)
    share_parameters(base.model, w)
    params = parameters_to_train(base.model, what)
    folder = run_dir / what.name
    return Stage(
        kind="adapt",
        name=what.name,
        folder=folder,
        model=base.model,
        params=params,
        tokenizer=base.tokenizer,
        corpus=corpus,
        window=window,
        steps=what.steps,
        batch_size=cfg.adapt_batch_size,
        lr=what.lr,
        seed=what.seed,
        kv=what.kv,
        adapter=what.adapter,
        objective=what.objective,
        byte_budgets=cfg.byte_budgets if selects else [],
        n_context=stored.get("n_context", 0),
        about={
            "kv_from": began,
            **stored,
            **text_record(args, name, corpus),
            **base_record(args, base, folder),
        },
    )


def attach_value_groups(base: Run, what: Adaptation, text, window: int, w: World) -> str:
    """Give a base the value groups of an adaptation, in place. Returns the sha256 of the file of
    the run that they are started from; "" where they are calibrated, or values are dense."""
    if what.kv.kv == "dense":
        return ""
    if what.kv_from:
        return start_from(base.model, what.kv, what.kv_from, base.base_sha256)
    note("calibrating value groups")
    batches = calibration_batches(
        text, what.seed, batches=2, batch_size=16, window=window, device=w.device
    )
    kv_router.attach(base.model, what.kv, batches, what.seed)
    return ""


def attach_selection(
    args, base: Run, what: Adaptation, window: int
) -> tuple[Adaptation, str, dict]:
    """Give a base the selection of --kv_from, in place. Returns the adaptation with its storage,
    the sha256 of its file, and what a checkpoint says of it besides. ValueError for a setting of
    storage that is not the run's, a run whose storage takes no budget of bytes, or a window without
    a context. The run's own budget is not read."""
    learn_basis = args.kv.learn_basis
    kv, select, began = take_selection(base.model, what.kv_from, base.base_sha256, learn_basis)
    for name, value in to_dict(kv).items():
        check(
            name not in args.given or getattr(args.kv, name) == value,
            f"{name}={getattr(args.kv, name)} with kv_from={what.kv_from}",
            f"it was trained with {value}",
            f"leave --{name} out",
        )
    check(
        kv.prefill == "exact" and kv.mask_scope != "shared",
        f"kv_from={what.kv_from} with prefill={kv.prefill}, mask_scope={kv.mask_scope}",
        "bytes are counted after an exact prefill, by layer or head",
        "give a run of --stage=select without --prefill and --mask_scope",
    )
    n_context = int(args.train.context * window)
    needed = kv.kv_tail + max(kv.first_whole, select.observers) + 1
    check(
        needed <= n_context < window,
        f"context={args.train.context:g} of {window} tokens",
        f"that is a context of {n_context}, and needed are {needed} to {window - 1}",
        "give another --context, or a larger --block_size",
    )
    budgets = args.train.byte_budgets
    select = replace(select.everything(), kv_bytes=budgets[0], kv_keep=0.0)
    selector_of(base.model).set(select)
    stored = {"select": to_dict(select), "kv_byte_budgets": budgets, "n_context": n_context}
    return replace(what, kv=kv), began, stored


def parameters_to_train(model: Transformer, what: Adaptation) -> list[torch.nn.Parameter]:
    """The parameters of adapters, and of value groups' routers and reconstructors. Raises
    ValueError where nothing would be trained."""
    adapter = what.adapter.adapter
    kv = what.kv
    params = [p for p in model.parameters() if p.requires_grad]
    if kv.kv != "select":
        params += kv_router.trainable(model)
    elif kv.learn_basis:  # what is stored is a constant: of the maps, the one that reads it
        maps = [path.dec for path in kv_router.paths(model).values()]
        params += [p.requires_grad_(True) for p in maps]
    groups = "--kv=value_groups with " if kv.kv == "dense" else ""
    check(
        bool(params),
        f"adapter={adapter} with kv={kv.kv}, value_router={kv.value_router}",
        "nothing is left to train",
        f"give {groups}--learn_basis, --value_router=linear or another adapter",
    )
    check(
        adapter != "none" or (not kv.kv_warmup and kv.topk_groups < kv.n_groups),
        f"adapter=none with kv_warmup={kv.kv_warmup}, topk_groups={kv.topk_groups} of "
        f"{kv.n_groups}",
        "whole values train nothing",
        "give --kv_warmup=0 and a smaller --topk_groups",
    )
    return list(dict.fromkeys(params))


# -- the rows of the table


class TableRow(NamedTuple):
    """One adapted row of the table."""

    name: str
    adapter: AdapterConfig
    kv: KVConfig


def rows_of_table(args, model_cfg: ModelConfig) -> list[TableRow]:
    """LoRA, MoE-LoRA and sub-token."""
    routed = replace(args.adapter, adapter="routed")
    dense = KVConfig(kv="dense")
    if args.train.preset == "paper":
        # The paper does not give LoRA's rank, which here is one MoE branch's.
        plain, experts = (
            replace(routed, adapter=kind, r=8, alpha=16.0) for kind in ("lora", "moe_lora")
        )
    else:
        # As many parameters, and the same scale of the whole update, as config.py sets it.
        shape = replace(model_cfg, block_size=1)  # counting needs no table of positions
        target = count_added(shape, routed, args.kv)
        plain, experts = (
            matched_rank(shape, replace(routed, adapter=kind, r=0, alpha=0.0), target)
            for kind in ("lora", "moe_lora")
        )
    return [
        TableRow("LoRA", plain, dense),
        TableRow("MoE-LoRA", experts, dense),
        TableRow("sub-token", routed, args.kv),
    ]


def count_added(shape: ModelConfig, adapter: AdapterConfig, kv: KVConfig) -> int:
    """Trainable parameters of an adapter and of value groups, counted on meta tensors."""
    with torch.device("meta"):
        count = lora.count_trainable(lora.attach(Transformer(shape), adapter))
        if kv.kv == "value_groups":
            for _ in kv.layers_of(shape):
                path = kv_router.ValueGroupPath(shape, kv)
                count += sum(p.numel() for p in path.parameters())
    return count


def matched_rank(model_cfg: ModelConfig, cfg: AdapterConfig, target: int) -> AdapterConfig:
    """cfg with the smallest rank whose trainable parameters are at least `target`, alpha / r kept.
    Counted on meta tensors."""

    def count(r: int) -> int:
        with torch.device("meta"):
            return lora.count_trainable(lora.attach(Transformer(model_cfg), replace(cfg, r=r)))

    one = count(1)
    per_rank = count(2) - one
    fixed = one - per_rank
    r = max(1, cdiv(target - fixed, per_rank))
    return replace(cfg, r=r, alpha=cfg.alpha / cfg.r * r)


# -- the table


@dataclass
class Table:
    """What is shown in the end: rows of every seed, further Ks of the first one's sub-token row,
    where loss curves lie by name, and the groups that tokens of one sequence kept."""

    rows: list[dict]
    curves: dict[str, Path]
    sweeps: list[dict] = field(default_factory=list)
    masks: Tensor | None = None


def run_table(args, run_dir: Path, w: World) -> tuple[str, Path]:
    """Pretrain or load the base, adapt every row with every seed that time allows, measure, write
    results.json and report.png; returns the table as text, and the sub-token row's first folder."""
    begin = time.time()
    cfg: TrainConfig = args.train
    where, curves = base_of_table(args, run_dir, w)
    base = load_base(args, where, w.device)
    shape = base.model.cfg
    args.kv.check_model(shape)
    window = adapt_window(args, base)
    task = measured_text(args, base.tokenizer, window)
    say_fewer("the table's text", len(task.x), cfg.test_sequences)
    corpus_of(args, cfg.corpus("adapt"), base.tokenizer, window)
    about = RowAbout(adapter=base.adapter, kv=base.kv, seed=cfg.seed, params=0, dtype=cfg.dtype)
    table = Table([{"name": "base"} | measure_row(base.model, task, about)], curves)
    del base  # each row loads its own: peak memory is that of one
    kv_from = distilled(args, run_dir, w, where)
    rows = {}
    start = time.time()
    for row in rows_of_table(args, shape):
        about = dict(adapter=row.adapter, kv=row.kv, objective="lm", kv_from=kv_from)
        what = adaptation(args, **about)
        rows[row.name] = at_best_rate(args, run_dir, w, where, what)
    seconds = (time.time() - start) / max(1, len(cfg.rates))  # of the first seed at one rate
    for seed in seeds_in_time(cfg, w, begin, seconds):
        for name, row in rows.items():
            what = named(replace(row, seed=seed), cfg)
            add_row(table, name, adapted(args, run_dir, w, where, what), task, cfg)
    if w.main:
        write_table(table, run_dir)
    text = cfg.test_dataset or f"{cfg.corpus('adapt')} validation"
    found = finding(table.rows, cfg.seeds)
    shown = (
        f"{result_table(table.rows)}\n\n{found}\n{text}, {task.n:,} tokens; "
        f"decode mode; cache of 4 sequences of {task.x.size(1)} tokens; {run_dir}/results.json, "
        f"{run_dir}/report.png; {time.time() - begin:.0f} s"
    )
    return shown, run_dir / named(rows["sub-token"], cfg).name


def base_of_table(args, run_dir: Path, w: World) -> tuple[str | Path, dict[str, Path]]:
    """Where the base is, and its curve: --init_from, or what is pretrained now."""
    if args.base.init_from != "scratch":
        return args.base.init_from, {}
    tokenizer = get_tokenizer(args.data.tokenizer)
    # Before pretraining, so that what is wrong with these texts is said now.
    corpus_of(args, args.train.corpus("adapt"), tokenizer, args.model.block_size)
    measured_text(args, tokenizer, args.model.block_size)
    stage = pretrain_stage(args, tokenizer, run_dir, w)
    train(stage, args.train, w)
    return find_checkpoint(stage.folder), {"pretrain": stage.folder}


def measured_text(args, tokenizer, window: int) -> Perplexity:
    """The text behind the table's numbers: --test_dataset (WikiText's test split, all of another),
    or the validation split of the adaptation corpus."""
    cfg: TrainConfig = args.train
    name = cfg.test_dataset or cfg.corpus("adapt")
    split = whole_split(name, "test") if cfg.test_dataset else "val"
    check(
        split in ("test", "val") or not same_text(name, cfg.corpus("adapt")),
        f"test_dataset={cfg.test_dataset!r}",
        "that is the text adapted on",
        "give another, or leave it out to use its validation split",
    )
    (text,) = prepare_splits(name, args.data, tokenizer, [split])
    return Perplexity(*sequential(text, cfg.test_sequences, window))


def distilled(args, run_dir: Path, w: World, where: str | Path) -> Path | str:
    """Folder of value groups trained to change the base's predictions little, without adapters; ""
    where --distill_steps is 0."""
    cfg: TrainConfig = args.train
    if not cfg.distill_steps:
        return ""
    what = adaptation(
        args,
        name="distill",
        adapter=AdapterConfig(adapter="none"),
        objective="distill",
        steps=cfg.distill_steps,
        lr=cfg.distill_lr,
    )
    return adapted(args, run_dir, w, where, what).folder


def at_best_rate(args, run_dir: Path, w: World, where: str | Path, what: Adaptation) -> Adaptation:
    """A row at the one of --adapt_rates that gives it the lowest validation loss with the first
    seed; as it is where none are given. A rate at which a loss is not finite is out, unless all
    are."""
    losses = {}
    for rate in args.train.rates:
        tried = named(replace(what, lr=rate), args.train)
        try:
            stage = adapted(args, run_dir, w, where, tried)
        except NonFinite:
            if rate == args.train.rates[-1] and not losses:
                raise
            continue
        log = checkpoint.read_jsonl(stage.folder / "metrics.jsonl")
        losses[rate] = min(r["val_loss"] for r in log if "val_loss" in r)
    return replace(what, lr=min(losses, key=losses.get)) if losses else what


def named(what: Adaptation, cfg: TrainConfig) -> Adaptation:
    """A row's adaptation, its folder named by adapter and seed, and by its rate where rates are
    compared: so the first seed is trained once at each."""
    rate = f"-rate{what.lr:g}" if cfg.rates else ""
    return replace(what, name=f"{what.adapter.adapter}-s{what.seed}{rate}")


def adapted(args, run_dir: Path, w: World, where: str | Path, what: Adaptation) -> Stage:
    """The stage of an adaptation of the base at `where`, trained now or found trained."""
    stage = adapt_stage(args, run_dir, w, load_base(args, where, w.device), what)
    cfg = args.train
    if cfg.rates:  # the first seed at its best rate lies there from the comparison of rates
        cfg = replace(cfg, resume=True, out_dir=str(run_dir))
    train(stage, cfg, w)
    return stage


def seeds_in_time(cfg: TrainConfig, w: World, begin: float, seconds: float) -> Iterator[int]:
    """The table's seeds, until another would end after --max_minutes: it may take as long as the
    longest before it, and as `seconds`. All ranks agree on it."""
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        late = seed > cfg.seed and time.time() - begin + seconds > 60 * cfg.max_minutes
        if w.any(late):
            print(
                f"{seed - cfg.seed} of {cfg.seeds} seeds: another would pass "
                f"--max_minutes={cfg.max_minutes}",
                file=sys.stderr,
            )
            return
        start = time.time()
        yield seed
        seconds = max(seconds, time.time() - start)


def add_row(table: Table, name: str, stage: Stage, task: Perplexity, cfg: TrainConfig) -> None:
    """Measure a trained row as a user would load it: the best checkpoint, bases folded. Of the
    first seed other Ks are measured, too, and a sequence's masks taken."""
    best = checkpoint.load(find_checkpoint(stage.folder))
    load_added_state(stage.model, best.tensors["adapter"])
    model = kv_router.fold(stage.model).eval()
    about = RowAbout(
        adapter=stage.adapter,
        kv=stage.kv,
        seed=stage.seed,
        params=stage.config["trainable_parameters"],
        dtype=cfg.dtype,
    )
    cost = training_cost(stage)
    first = stage.seed == cfg.seed
    if first:
        table.curves[name] = stage.folder
    if not kv_router.paths(model):
        table.rows.append({"name": name} | measure_row(model, task, about) | cost)
        return
    row, *others = sweep(model, task, [stage.kv.topk_groups, *other_ks(stage.kv, first)], about)
    table.rows.append({"name": name} | row | cost)
    if first:
        table.sweeps += [{"name": f"{name}{SWEEP}"} | r for r in others]
        table.masks = kept_groups(model, task.x[:1], cfg.dtype)


def other_ks(kv: KVConfig, first: bool) -> list[int]:
    """Further numbers of groups kept that a trained row is measured with."""
    if not first:
        return []
    S = kv.n_groups
    return sorted({max(1, S // 4), S // 2, max(1, 3 * S // 4), S} - {kv.topk_groups})


def training_cost(stage: Stage) -> dict:
    """Rate, speed and peak memory of a trained stage, from its log."""
    log = checkpoint.read_jsonl(stage.folder / "metrics.jsonl")
    return {
        "lr": stage.lr,
        "tokens_per_s": median(r["tokens_per_s"] for r in log if "loss" in r),
        "peak_memory_bytes": log[-1].get("peak_memory_bytes"),
    }


def write_table(table: Table, run_dir: Path) -> None:
    """Leave results.json and report.png in the run's folder."""
    rows = table.rows + table.sweeps
    checkpoint.write_json(run_dir / "results.json", rows)
    curves = {
        name: checkpoint.read_jsonl(folder / "metrics.jsonl")
        for name, folder in table.curves.items()
    }
    report_figure(run_dir, rows, curves, table.masks)


def finding(results: list[dict], seeds: int) -> str:
    """The paper's question about its table 1, answered from the rows: is the sub-token row at or
    below LoRA? The mean over seeds of what it is above each, with its standard error; one seed
    decides nothing. seeds: how many were asked for, of which time may have allowed fewer."""

    def values(name: str) -> dict[int, float]:
        return {r["seed"]: r["value"] for r in results if r["name"] == name}

    ours = values("sub-token")
    if len(ours) < 2:
        do = "give --seeds=3 or more" + (", and a larger --max_minutes" if seeds > 1 else "")
        return f"One seed says nothing of which row is better; {do}."
    parts = []
    for name in ("LoRA", "MoE-LoRA"):
        theirs = values(name)
        above = [ours[seed] / theirs[seed] - 1 for seed in sorted(ours.keys() & theirs.keys())]
        error = stdev(above) / len(above) ** 0.5
        parts.append(f"{mean(above):+.2%} +- {error:.2%} against {name}")
    kept = next(share_of_dense(r) for r in results if r["name"] == "sub-token")
    return (
        f"Storing {kept:.1%} of the bytes, sub-token's perplexity is {' and '.join(parts)}, which "
        f"store everything (mean and standard error over {len(ours)} seeds)."
    )
