"""Train: pretrain a small transformer, adapt it with LoRA, MoE-LoRA or routed subspace LoRA over
routed values, print the table.

Without flags, on any machine: `pretrain` on pydocs (the reference text inside CPython), then
`adapt` on pycode (the standard library's source) once per row and seed, then decode-mode perplexity
and measured cache bytes, results.json and report.png.

Adaptation (arXiv 2604.21335, 3.1): the base is frozen; L = L_LM + 0.01 * load balance + 0.1 *
L_aux. Baselines get at least as many trainable parameters as the sub-token row (--preset=paper: the
paper's ranks instead).

    python train.py
    python train.py --stage=adapt --init_from=out/RUN/pretrain --adapter=routed \\
        --kv=value_groups --reconstructor=pairwise
    python train.py --stage=select --init_from=out/RUN/pretrain \\
        --predictors=predictor,predictor_query
    python train.py --stage=adapt --init_from=model.gguf --adapter=none --learn_basis \\
        --objective=distill --dataset=text:some.txt
    torchrun --nproc_per_node=2 train.py --stage=pretrain
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from cli import exit_on_bad_input, parse_args
from config import (
    SHARED,
    AdapterConfig,
    BaseConfig,
    KVConfig,
    MixConfig,
    ModelConfig,
    SelectConfig,
    check,
    comma_list,
)
from settings.fields import to_dict
from settings.train import DataConfig, TrainConfig

CONFIGS = {
    "train": TrainConfig,
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "kv": KVConfig,
    "select": SelectConfig,
    "data": DataConfig,
    "base": BaseConfig,
    "mix": MixConfig,
}
if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__.splitlines()[0])

import torch
import torch.distributed as dist
from torch import Tensor

import eval as evaluation
import kv_router
import lora
from data import batch, check_length, prepare, prepare_splits, same_text, sequential, whole_split
from loaders import checkpoint
from loaders.device import check_weights
from loaders.runs import (
    Run,
    attach_storage,
    base_reference,
    find_checkpoint,
    is_foreign,
    load_added_state,
    load_run,
    split_added,
)
from loaders.tokenizer import get_tokenizer
from model import Transformer
from tasks.text import Perplexity
from training import mixsga_table
from training.loop import (
    NonFinite,
    Stage,
    World,
    optimizer_settings,
    out_of_memory_explained,
    share_parameters,
    train,
    world,
)


def corpus_of(args, stage: str, tokenizer, block_size: int):
    """The corpus of `stage`, both splits long enough for the context. Everything about it is
    checked here, before step 0."""
    corpus = prepare(args.train.corpus(stage), args.data, tokenizer)
    for tokens in (corpus.train, corpus.val):
        check_length(tokens, block_size)
    return corpus


def of_text(args, corpus) -> dict:
    """What a checkpoint says of its text: how it was prepared, and the sha256 of the tokens of both
    splits."""
    prepared = {k: v for k, v in to_dict(args.data).items() if k != "data_dir"}
    return {"data": prepared, "tokens": [t.header["sha256"] for t in (corpus.train, corpus.val)]}


def pretrain_stage(args, tokenizer, run_dir: Path, w: World) -> Stage:
    cfg: TrainConfig = args.train
    model_cfg = replace(args.model, vocab_size=tokenizer.vocab_size)
    corpus = corpus_of(args, "pretrain", tokenizer, model_cfg.block_size)
    torch.manual_seed(cfg.seed)
    model = Transformer(model_cfg).to(w.device)
    share_parameters(model, w)
    adapter = AdapterConfig(adapter="none")
    kv = KVConfig(kv="dense")
    config = {
        "stage": "pretrain",
        "model": to_dict(model_cfg),
        "tokenizer": tokenizer.name,
        "adapter": to_dict(adapter),
        "kv": to_dict(kv),
        "seed": cfg.seed,
        "steps": cfg.pretrain_steps,
        "batch_size": cfg.pretrain_batch_size,
        "lr": cfg.pretrain_lr,
        "corpus": cfg.corpus("pretrain"),
        "block_size": model_cfg.block_size,
        "optimizer": optimizer_settings(cfg),
        **of_text(args, corpus),
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
    }
    return Stage(
        "pretrain",
        model,
        list(model.parameters()),
        corpus,
        tokenizer,
        run_dir / "pretrain",
        cfg.pretrain_steps,
        cfg.pretrain_batch_size,
        cfg.pretrain_lr,
        cfg.seed,
        config,
        adapter,
        kv,
        True,
        model_cfg.block_size,
    )


def load_base(args, where: str | Path, device: torch.device) -> Run:
    """The frozen base that is adapted. ValueError for an adapter, or where a flag contradicts what
    the base is."""
    loaded = load_run(where, device, **args.base.options(""))
    check(
        loaded.adapter.adapter == "none" and loaded.kv.kv == "dense",
        f"init_from={where}",
        "a base model is adapted, not an adapter",
        "give a pretrain stage's folder or a pretrained model",
    )
    has = loaded.model.cfg
    for f in (f for f in to_dict(has) if f in args.given and f != "block_size"):
        check(
            getattr(args.model, f) == getattr(has, f),
            f"{f}={getattr(args.model, f)}",
            f"the base has {getattr(has, f)}",
            f"leave --{f} out",
        )
    check(
        "tokenizer" not in args.given or args.data.tokenizer == loaded.tokenizer.name,
        f"tokenizer={args.data.tokenizer!r}",
        f"the base was trained with {loaded.tokenizer.name!r}",
        "leave --tokenizer out",
    )
    return loaded


def adapt_window(args, base: Run) -> int:
    """Tokens in a training sequence: --block_size (or the preset's), else what the base was trained
    with; 512 for a pretrained model."""
    longest = base.model.cfg.block_size
    asked = (
        args.model.block_size if "block_size" in args.given or args.train.preset == "paper" else 0
    )
    check(
        asked <= longest,
        f"block_size={asked}",
        f"the base knows {longest} tokens",
        f"give --block_size={longest} or less",
    )
    return asked or (min(512, longest) if is_foreign(base.path) else longest)


def adapt_stage(
    args,
    run_dir: Path,
    w: World,
    loaded: Run,
    adapter: AdapterConfig,
    kv: KVConfig,
    seed: int,
    name: str,
    *,
    objective: str = "",
    steps: int = 0,
    lr: float = 0.0,
    kv_from: str | Path = "",
) -> Stage:
    """Give a loaded base value groups, calibrated or from another run, and adapters, in place. What
    is left out follows the flags."""
    cfg: TrainConfig = args.train
    objective = objective or cfg.objective
    steps = steps or cfg.adapt_steps
    lr = lr or cfg.adapt_lr
    kv_from = kv_from or cfg.kv_from
    model = loaded.model
    tokenizer = loaded.tokenizer
    window = adapt_window(args, loaded)
    check(
        objective == "lm" or adapter.adapter == "none",
        f"objective={objective} with adapter={adapter.adapter}",
        "the base itself is the teacher",
        "give --adapter=none",
    )
    corpus = corpus_of(args, "adapt", tokenizer, window)
    torch.manual_seed(seed)
    began = (
        start_from(model, kv, kv_from, loaded.base_sha256) if kv_from and kv.kv != "dense" else ""
    )
    if not began:
        kv_router.attach(
            model,
            kv,
            [
                batch(corpus.train, "calibrate", seed, i, 16, window)[0].to(w.device)
                for i in range(2)
            ],
            seed,
        )
    lora.attach(model, adapter)
    share_parameters(model, w)
    params = [p for p in model.parameters() if p.requires_grad] + kv_router.trainable(model)
    params = list(dict.fromkeys(params))
    check(
        bool(params),
        f"adapter={adapter.adapter} with kv={kv.kv}, value_router={kv.value_router}",
        "nothing is left to train",
        "choose another adapter",
    )
    check(
        adapter.adapter != "none" or (not kv.kv_warmup and kv.topk_groups < kv.n_groups),
        f"adapter=none with kv_warmup={kv.kv_warmup}, topk_groups={kv.topk_groups} of "
        f"{kv.n_groups}",
        "whole values train nothing",
        "give --kv_warmup=0 and a smaller --topk_groups",
    )
    folder = run_dir / name
    config = {
        "stage": "adapt",
        "model": to_dict(model.cfg),
        "tokenizer": tokenizer.name,
        "adapter": to_dict(adapter),
        "kv": to_dict(kv),
        "seed": seed,
        "steps": steps,
        "batch_size": cfg.adapt_batch_size,
        "lr": lr,
        "corpus": cfg.corpus("adapt"),
        "block_size": window,
        "objective": objective,
        "kv_from": began,
        "optimizer": optimizer_settings(cfg),
        **of_text(args, corpus),
        "weights": args.base.weights,
        "trainable_parameters": lora.count_trainable(model),
        "base": base_reference(loaded, folder),
        "base_sha256": loaded.base_sha256,
    }
    return Stage(
        name,
        model,
        params,
        corpus,
        tokenizer,
        folder,
        steps,
        cfg.adapt_batch_size,
        lr,
        seed,
        config,
        adapter,
        kv,
        False,
        window,
        objective,
    )


def select_stage(args, run_dir: Path, w: World, loaded: Run) -> Stage:
    """Give a loaded base selecting paths, calibrated (or with the bases of --kv_from), and train
    their predictors of relevance."""
    cfg: TrainConfig = args.train
    paper = cfg.preset == "paper"
    names = (
        comma_list(args.select.predictors)
        or args.select.trained
        or ["predictor" if paper else "predictor_query"]
    )
    relevance = (
        args.select.relevance
        if "relevance" in args.given
        else next((n for n in ("predictor_query", "predictor") if n in names), "future")
    )
    by = args.select.token_relevance or (
        "expected_attention" if names == ["expected_attention"] else ""
    )
    rule = {f: v for f, v in dict(sinks=0, hedge=1.0).items() if paper and f not in args.given}
    select = replace(
        args.select, predictors=",".join(names), relevance=relevance, token_relevance=by, **rule
    )
    check(
        "oracle" not in (select.relevance, select.tokens_by),
        "relevance=oracle",
        "it is measured, not used: it has seen what follows",
        "leave it out, and give eval.py --relevances=oracle",
    )
    other = dict(kv_tail=16, reconstructor="zero", value_router="norm") | (
        dict(mask_scope="shared") if paper else {}
    )
    kv = replace(args.kv, kv="select", **{f: v for f, v in other.items() if f not in args.given})
    model = loaded.model
    tokenizer = loaded.tokenizer
    window = adapt_window(args, loaded)
    corpus = corpus_of(args, "adapt", tokenizer, window)
    torch.manual_seed(cfg.seed)
    batches = [
        batch(corpus.train, "calibrate", cfg.seed, i, 4, window)[0].to(w.device) for i in range(6)
    ]
    model.requires_grad_(False)
    attach_storage(model, kv, select, batches, cfg.seed, fit=True)
    began = start_from(model, kv, cfg.kv_from, loaded.base_sha256) if cfg.kv_from else ""
    if began:  # other bases: what was measured in the old ones is measured anew
        model.selector.calibrate(model, batches, fit=True)
    share_parameters(model, w)
    params = list(model.selector.predictors.parameters())
    folder = run_dir / f"select-s{cfg.seed}"
    config = {
        "stage": "select",
        "model": to_dict(model.cfg),
        "tokenizer": tokenizer.name,
        "adapter": to_dict(loaded.adapter),
        "kv": to_dict(kv),
        "select": to_dict(select),
        "seed": cfg.seed,
        "steps": cfg.select_steps,
        "batch_size": cfg.select_batch_size,
        "lr": cfg.select_lr,
        "corpus": cfg.corpus("adapt"),
        "block_size": window,
        "objective": "select",
        "kv_from": began,
        "optimizer": optimizer_settings(cfg),
        **of_text(args, corpus),
        "weights": args.base.weights,
        "trainable_parameters": sum(p.numel() for p in params),
        "base": base_reference(loaded, folder),
        "base_sha256": loaded.base_sha256,
    }
    return Stage(
        folder.name,
        model,
        params,
        corpus,
        tokenizer,
        folder,
        cfg.select_steps,
        cfg.select_batch_size,
        cfg.select_lr,
        cfg.seed,
        config,
        loaded.adapter,
        kv,
        False,
        window,
        "select",
    )


def continue_stage(args, run_dir: Path, w: World, loaded: Run) -> Stage:
    """Train on all weights of a loaded base, its keys and values shared as --kv says."""
    cfg: TrainConfig = args.train
    other = dict(kv="mixsga", kv_tail=mixsga_table.TAIL)
    kv = replace(args.kv, **{f: v for f, v in other.items() if f not in args.given})
    check(
        kv.kv in (*SHARED, "dense"),
        f"kv={kv.kv} with stage=continue",
        f"one of {', '.join(SHARED)}, dense",
        "give --stage=adapt for value groups",
    )
    if kv.kv == "mixsga":
        args.mix.check_model(loaded.model.cfg)
    window = adapt_window(args, loaded)
    corpus = corpus_of(args, "adapt", loaded.tokenizer, window)
    name = f"{kv.kv}-s{cfg.seed}"
    stage = mixsga_table.continued(
        loaded,
        kv,
        args.mix,
        corpus,
        cfg,
        name=name,
        folder=run_dir / name,
        steps=cfg.adapt_steps,
        lr=cfg.adapt_lr,
        batch_size=cfg.adapt_batch_size,
        seed=cfg.seed,
        window=window,
        about={"corpus": cfg.corpus("adapt"), **of_text(args, corpus)},
    )
    share_parameters(stage.model, w)
    return stage


def start_from(model: Transformer, kv: KVConfig, where: str | Path, base_sha256: str) -> str:
    """Attach value groups as the run at `where` left them; returns the sha256 of their file.
    ValueError where base or settings differ."""
    path = find_checkpoint(where)
    ckpt = checkpoint.load(path)
    check(
        "adapter" in ckpt.tensors,
        f"kv_from={where}",
        "it trained no value groups",
        "give an adapt stage's folder",
    )
    check(
        ckpt.config.get("base_sha256") == base_sha256,
        f"kv_from={where}",
        "it was trained on another base",
        "give a run on this one",
    )
    of_a_basis = (
        ("n_groups", "value_basis", "learn_basis", "kv_layers")
        if kv.kv == "select"
        else to_dict(kv)
    )
    check(
        all(ckpt.config["kv"].get(f) == getattr(kv, f) for f in of_a_basis),
        f"kv_from={where}",
        "it has other --kv settings",
        "give the flags it was trained with",
    )
    if kv.kv != "select":
        kv_router.attach(model, kv)
    kv_router.load_state(model, split_added(ckpt.tensors["adapter"])[0])
    return checkpoint.tensor_hash(path, "adapter.safetensors")


def matched_rank(model_cfg: ModelConfig, cfg: AdapterConfig, target: int) -> AdapterConfig:
    """cfg with the smallest rank whose trainable parameters are at least `target`, alpha / r kept.
    Counted on meta tensors."""

    def count(r: int) -> int:
        with torch.device("meta"):
            return lora.count_trainable(lora.attach(Transformer(model_cfg), replace(cfg, r=r)))

    one = count(1)
    two = count(2)
    r = max(1, -(-(target - (2 * one - two)) // (two - one)))
    return replace(cfg, r=r, alpha=cfg.alpha / cfg.r * r)


def rows_of_table(args, model_cfg: ModelConfig) -> list[tuple[str, AdapterConfig, KVConfig]]:
    """Name, adapter and storage of each adapted row: LoRA, MoE-LoRA, sub-token."""
    a = replace(args.adapter, adapter="routed")
    kv = args.kv
    dense = KVConfig(kv="dense")
    # its ranks; it does not give LoRA's, which here is one MoE branch's
    if args.train.preset == "paper":
        baselines = {
            kind: replace(a, adapter=kind, r=8, alpha=16.0) for kind in ("lora", "moe_lora")
        }
    else:  # as many parameters, and the same scale of the whole update, as config.py sets it
        shape = replace(model_cfg, block_size=1)  # counting needs no table of positions
        with torch.device("meta"):
            meta = lora.attach(Transformer(shape), a)
            added = (
                [kv_router.ValueGroupPath(shape, kv) for _ in kv.layers(shape.n_layer)]
                if kv.kv == "value_groups"
                else []
            )
        target = lora.count_trainable(meta) + sum(
            p.numel() for path in added for p in path.parameters()
        )
        baselines = {
            kind: matched_rank(shape, replace(a, adapter=kind, r=0, alpha=0.0), target)
            for kind in ("lora", "moe_lora")
        }
    return [
        ("LoRA", baselines["lora"], dense),
        ("MoE-LoRA", baselines["moe_lora"], dense),
        ("sub-token", a, kv),
    ]


def finding(results: list[dict]) -> str:
    """The paper's question about its table 1, answered from the rows: is the sub-token row at or
    below LoRA?"""
    value = {
        name: mean(r["value"] for r in results if r["name"] == name)
        for name in ("LoRA", "MoE-LoRA", "sub-token")
    }
    kept = next(r["cache_bytes"] / r["dense_bytes"] for r in results if r["name"] == "sub-token")
    against = " and ".join(
        f"{value['sub-token'] / value[n] - 1:+.2%} against {n}" for n in ("LoRA", "MoE-LoRA")
    )
    return (
        f"Storing {kept:.1%} of the bytes, sub-token's perplexity is {against}, which store "
        "everything."
    )


def pretrained_base(args, run_dir: Path, w: World) -> tuple[str | Path, dict[str, Path]]:
    """Where the base of stage=all is, and its curve: --init_from, or what is pretrained now."""
    if args.base.init_from != "scratch":
        return args.base.init_from, {}
    tokenizer = get_tokenizer(args.data.tokenizer)
    # before pretraining: what is wrong with these texts is said now
    corpus_of(args, "adapt", tokenizer, args.model.block_size)
    test_text(args, tokenizer, args.model.block_size)
    stage = pretrain_stage(args, tokenizer, run_dir, w)
    train(stage, args, w)
    return find_checkpoint(stage.folder), {"pretrain": stage.folder}


def test_text(args, tokenizer, window: int) -> Perplexity:
    """The text behind the table's numbers: --test_dataset (WikiText's test split, all of another),
    or the validation split of the adaptation corpus."""
    cfg: TrainConfig = args.train
    name, split = (
        (cfg.test_dataset, whole_split(cfg.test_dataset, "test"))
        if cfg.test_dataset
        else (cfg.corpus("adapt"), "val")
    )
    check(
        split == "test"
        or not cfg.test_dataset
        or not same_text(cfg.test_dataset, cfg.corpus("adapt")),
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
    stage = adapt_stage(
        args,
        run_dir,
        w,
        load_base(args, where, w.device),
        AdapterConfig(adapter="none"),
        args.kv,
        cfg.seed,
        "distill",
        objective="distill",
        steps=cfg.distill_steps,
        lr=cfg.distill_lr,
    )
    train(stage, args, w)
    return stage.folder


def table_row(
    args,
    run_dir: Path,
    w: World,
    where: str | Path,
    adapter: AdapterConfig,
    kv: KVConfig,
    seed: int,
    kv_from: str | Path,
    task: Perplexity,
) -> tuple[list[dict], list[dict], Tensor | None]:
    """Train one row of the table (or find it trained) and measure it: its result; for the first
    seed other K and a sequence's masks."""
    base = load_base(args, where, w.device)
    stage = adapt_stage(
        args,
        run_dir,
        w,
        base,
        adapter,
        kv,
        seed,
        f"{adapter.adapter}-s{seed}",
        objective="lm",
        kv_from=kv_from,
    )
    train(stage, args, w)
    load_added_state(stage.model, checkpoint.load(find_checkpoint(stage.folder)).tensors["adapter"])
    # what a user would load: the best checkpoint, bases folded
    best = kv_router.fold(stage.model).eval()
    log = checkpoint.read_jsonl(stage.folder / "metrics.jsonl")
    cost = {
        "tokens_per_s": median(r["tokens_per_s"] for r in log if "loss" in r),
        "peak_memory_bytes": log[-1].get("peak_memory_bytes"),
    }
    how = dict(
        adapter=adapter,
        kv=kv,
        seed=seed,
        params=stage.config["trainable_parameters"],
        dtype=args.train.dtype,
    )
    if not kv_router.paths(best):
        return [evaluation.row(best, task, **how) | cost], [], None
    S = kv.n_groups
    K = kv.topk_groups
    ks = (
        sorted({max(1, S // 4), S // 2, max(1, 3 * S // 4), S} - {K})
        if seed == args.train.seed and kv.reconstructor != "linear"
        else []
    )
    rows = evaluation.sweep(best, task, [K, *ks], **how)
    masks = (
        evaluation.kept_groups(best, task.x[:1], args.train.dtype)
        if seed == args.train.seed
        else None
    )
    return [rows[0] | cost], rows[1:], masks


def run_all(args, run_dir: Path, w: World) -> None:
    """Pretrain or load the base, adapt every row with every seed that time allows, evaluate, write
    results.json and report.png, print the table."""
    begin = time.time()
    cfg = args.train
    where, curves = pretrained_base(args, run_dir, w)
    base = load_base(args, where, w.device)
    task = test_text(args, base.tokenizer, adapt_window(args, base))
    shape = base.model.cfg
    args.kv.check_model(shape)
    corpus_of(args, "adapt", base.tokenizer, adapt_window(args, base))
    results = [
        {"name": "base"}
        | evaluation.row(
            base.model,
            task,
            adapter=base.adapter,
            kv=base.kv,
            seed=cfg.seed,
            params=0,
            dtype=cfg.dtype,
        )
    ]
    del base  # each row loads its own: peak memory is that of one
    kv_from = distilled(args, run_dir, w, where)
    sweeps = []
    masks = None
    seconds = 0.0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        late = torch.tensor(
            [float(seed > cfg.seed and time.time() - begin + seconds > 60 * cfg.max_minutes)],
            device=w.device,
        )
        if w.sum(late).item():
            print(
                f"{seed - cfg.seed} of {cfg.seeds} seeds: another would pass "
                f"--max_minutes={cfg.max_minutes}",
                file=sys.stderr,
            )
            break
        start = time.time()
        for name, adapter, kv in rows_of_table(args, shape):
            got, more, seen = table_row(args, run_dir, w, where, adapter, kv, seed, kv_from, task)
            results += [{"name": name} | r for r in got]
            if seed == cfg.seed:
                curves[name] = run_dir / f"{adapter.adapter}-s{seed}"
                sweeps += [{"name": f"{name}, other K (sweep)"} | r for r in more]
                masks = masks if seen is None else seen
        seconds = time.time() - start
    if w.main:
        checkpoint.write_json(run_dir / "results.json", results + sweeps)
        evaluation.report(
            run_dir,
            results + sweeps,
            {n: checkpoint.read_jsonl(f / "metrics.jsonl") for n, f in curves.items()},
            masks,
        )
        text = cfg.test_dataset or f"{cfg.corpus('adapt')} validation"
        print(
            f"\n{evaluation.table(results)}\n\n{finding(results)}\n{text}, {task.n:,} tokens; "
            "decode mode; cache of "
            f"4 sequences of {task.x.size(1)} tokens; {run_dir}/results.json, "
            f"{run_dir}/report.png; {time.time() - begin:.0f} s"
        )


def open_run_dir(cfg: TrainConfig, w: World) -> tuple[Path, list[Path]]:
    """The run's folder, a fresh one under out/ or the named one, which must be empty unless
    --resume; and the folders made for it, innermost first."""

    def make(path: Path, exist_ok: bool) -> list[Path]:
        made = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=exist_ok)
        return made

    if not cfg.out_dir:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        n = 0
        made = []
        names = [None]
        while w.main and names == [None]:
            path = Path("out") / (stamp + (f"-{n}" if n else ""))
            try:
                made = make(path, exist_ok=False)
                names = [str(path)]
            except FileExistsError:
                n += 1
        if w.size > 1:
            dist.broadcast_object_list(names, 0)
        return Path(names[0]), made
    path = Path(cfg.out_dir)
    check(not path.exists() or path.is_dir(), f"out_dir={path}", "is a file", "name a folder")
    full = path.is_dir() and any(path.iterdir())
    if cfg.resume:
        begun = path.is_dir() and (
            (path / "config.json").is_file()
            or any(path.glob("*/step-*"))
            or any(path.glob("*/.*-step-*"))
        )
        check(
            begun,
            f"resume from {path}",
            "there is no checkpoint in it",
            "leave --resume out to start anew",
        )
        return path, []
    check(
        not full,
        f"out_dir={path}",
        "is not empty",
        "give --resume to continue it, or another folder",
    )
    if w.size > 1:
        dist.barrier()  # every rank has looked before rank 0 writes
    return path, make(path, exist_ok=True) if w.main else []


def take_back(run_dir: Path, made: list[Path]) -> None:
    """After bad input: remove what this start created, unless a stage has written something by
    then."""
    if not any(run_dir.glob("*/*")):
        (run_dir / "config.json").unlink(missing_ok=True)
        for folder in [*(p for p in run_dir.iterdir() if p.is_dir()), *made]:
            with suppress(OSError):
                folder.rmdir()


def run(args) -> None:
    cfg: TrainConfig = args.train
    where = args.base.init_from
    check(
        cfg.stage not in ("adapt", "select", "continue") or where != "scratch",
        f"stage={cfg.stage} with init_from=scratch",
        "a pretrained base is needed",
        "give --init_from=out/RUN/pretrain",
    )
    check(
        cfg.stage != "pretrain" or where == "scratch",
        f"init_from={where!r} with stage=pretrain",
        "pretrained weights are adapted",
        "give --stage=adapt or all",
    )
    unused = [f for f in ("adapter", "topk_groups", "compile") if f in args.given]
    unused += ["kv"] * ("kv" in args.given and args.kv.kv != "select") + ["learn_basis"] * (
        args.kv.learn_basis and not cfg.kv_from
    )
    check(
        cfg.stage != "select" or not unused,
        f"{', '.join(unused)} with stage=select",
        "it trains predictors alone",
        "leave them out",
    )
    check(
        args.kv.kv != "select" or cfg.stage == "select",
        f"kv=select with stage={cfg.stage}",
        "it compresses prompts: nothing is adapted over it",
        "give --stage=select",
    )
    check(
        cfg.stage == "continue" or args.kv.kv not in SHARED,
        f"kv={args.kv.kv} with stage={cfg.stage}",
        "a whole model is trained on with it",
        "give --stage=continue",
    )
    mixed = sorted(f for f in args.given if f in to_dict(args.mix))
    check(
        cfg.stage == "continue" or not mixed,
        f"{', '.join(mixed)} with stage={cfg.stage}",
        "only kv=mixsga, gqa and cla read it",
        "give --stage=continue",
    )
    check(
        cfg.stage == "adapt" or cfg.objective == "lm",
        f"objective={cfg.objective} with stage={cfg.stage}",
        "one adaptation is trained by it",
        "give --stage=adapt, or --distill_steps=N for the table",
    )
    pretraining = sorted(f for f in args.given if f == "dataset" or f.startswith("pretrain_"))
    check(
        cfg.stage != "all" or where == "scratch" or not pretraining,
        f"{', '.join(pretraining)} with init_from={where!r}",
        "nothing is pretrained",
        "leave it out; --adapt_dataset names the corpus of the adaptation",
    )
    check(
        not (cfg.kv_from and args.kv.kv == "dense"),
        f"kv_from={cfg.kv_from!r} with kv=dense",
        "there are no value groups",
        "leave one out",
    )
    check(
        not cfg.distill_steps or args.kv.learn_basis,
        f"distill_steps={cfg.distill_steps}",
        "there is no basis to train",
        "give --learn_basis",
    )
    with world(cfg.device) as w:
        check_weights(args.base.weights, w.device, cfg.dtype)
        if args.kv.kv == "value_groups" and cfg.stage == "all" and where == "scratch":
            args.kv.check_model(args.model)
        run_dir, made = open_run_dir(cfg, w)
        if w.main and not cfg.resume:
            checkpoint.write_json(
                run_dir / "config.json", {n: to_dict(getattr(args, n)) for n in CONFIGS}
            )
        try:
            sizes = f"{cfg.pretrain_batch_size} (pretrain) / {cfg.adapt_batch_size} (adapt)"
            with out_of_memory_explained(sizes, args.model.block_size, cfg.accumulation):
                if cfg.stage == "all":
                    run_all(args, run_dir, w)
                elif cfg.stage == "select":
                    train(select_stage(args, run_dir, w, load_base(args, where, w.device)), args, w)
                elif cfg.stage == "continue":
                    train(
                        continue_stage(args, run_dir, w, load_base(args, where, w.device)), args, w
                    )
                elif cfg.stage == "pretrain":
                    train(
                        pretrain_stage(args, get_tokenizer(args.data.tokenizer), run_dir, w),
                        args,
                        w,
                    )
                else:
                    kind = args.adapter.adapter if args.adapter.adapter != "none" else args.kv.kv
                    name = f"{kind}-s{cfg.seed}"
                    stage = adapt_stage(
                        args,
                        run_dir,
                        w,
                        load_base(args, where, w.device),
                        args.adapter,
                        args.kv,
                        cfg.seed,
                        name,
                    )
                    train(stage, args, w)
        except NonFinite as e:
            print(f"train.py: {e}", file=sys.stderr)
            raise SystemExit(3) from None
        except ValueError:
            if w.main and not cfg.resume:
                take_back(run_dir, made)
            raise


if __name__ == "__main__":
    exit_on_bad_input(lambda: run(ARGS))
