"""Train predictors of relevance over a frozen base: train.py --stage=select.

    python train.py --stage=select --init_from=out/RUN/pretrain \\
        --predictors=predictor,predictor_query
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cli import note
from config import KVConfig, SelectConfig, check, comma_list
from loaders.runs import Run, attach_storage
from selection.calibration import calibrate
from selection.training import PASSAGE, fit_statistics, parts_at_most
from settings.fields import to_dict
from settings.train import TrainConfig
from training.base import (
    adapt_window,
    base_record,
    calibration_batches,
    corpus_of,
    start_from,
    text_record,
)
from training.stage import Stage
from training.world import World, share_parameters

# A selection's own defaults, where no flag says otherwise.
STORAGE = dict(kv_tail=4, reconstructor="zero", value_router="norm")
PAPER_STORAGE = dict(mask_scope="shared")
PAPER_RULE = dict(sinks=0, hedge=1.0, recall=0.0, shortest=0)


def select_stage(args, run_dir: Path, w: World, base: Run) -> Stage:
    """Give a loaded base selecting paths, calibrated (or with the bases of --kv_from), and train
    their predictors of relevance."""
    cfg: TrainConfig = args.train
    select = selection_of(args)
    kv = storage_of(args)
    model = base.model
    kv.check_model(model.cfg)
    window = adapt_window(args, base)
    check_window(kv, select, window, model.cfg.block_size)
    check_shortest(kv, select, window)
    name = cfg.corpus("adapt")
    corpus = corpus_of(args, name, base.tokenizer, window)
    torch.manual_seed(cfg.seed)
    batches = calibration_batches(
        corpus.train, cfg.seed, batches=6, batch_size=4, window=window, device=w.device
    )
    note("calibrating value groups and signals")
    model.requires_grad_(False)
    attach_storage(model, kv, select, batches, cfg.seed)
    began = ""
    if cfg.kv_from:
        began = start_from(model, kv, cfg.kv_from, base.base_sha256)
        # What was measured in the calibrated bases is measured anew in these.
        calibrate(model.selector, model, batches)
    fit_statistics(model, batches)
    share_parameters(model, w)
    folder = run_dir / f"select-s{cfg.seed}"
    return Stage(
        kind="select",
        name=folder.name,
        folder=folder,
        model=model,
        params=list(model.selector.predictors.parameters()),
        tokenizer=base.tokenizer,
        corpus=corpus,
        window=window,
        steps=cfg.select_steps,
        batch_size=cfg.select_batch_size,
        lr=cfg.select_lr,
        seed=cfg.seed,
        kv=kv,
        adapter=base.adapter,
        objective="select",
        about={
            "select": to_dict(select),
            "kv_from": began,
            **text_record(args, name, corpus),
            **base_record(args, base, folder),
        },
    )


def least_windows(kv: KVConfig, select: SelectConfig) -> tuple[int, int]:
    """Return how many tokens a window needs for its readers, the query region and some context
    before them, and how many so that it can be asked for one of its passages, 0 where none is."""
    region = max(kv.kv_tail, select.observers)
    of_question = 2 * (region + PASSAGE) if select.recall else 0
    return kv.kv_tail + select.readers + 1, of_question


def check_window(kv: KVConfig, select: SelectConfig, window: int, longest: int) -> None:
    """Raise ValueError where a window is too short for its readers or a question. longest: tokens
    that the model can read."""
    of_readers, of_question = least_windows(kv, select)
    larger = "" if window == longest else ", or a larger --block_size"
    check(
        window >= of_readers,
        f"{window} tokens with readers={select.readers}, kv_tail={kv.kv_tail}",
        f"some context must be left, so {of_readers} are needed",
        f"give fewer --readers{larger}",
    )
    check(
        window >= of_question,
        f"{window} tokens with recall={select.recall:g}, kv_tail={kv.kv_tail}, "
        f"observers={select.observers}",
        f"a question needs {of_question}",
        f"give --recall=0{larger}",
    )


def check_shortest(kv: KVConfig, select: SelectConfig, window: int) -> None:
    """Raise ValueError where a part of a window would be too short for its readers, a passage that
    is repeated, or a question."""
    parts = parts_at_most(window, select.shortest)
    needed = max(least_windows(kv, select))
    check(
        parts == 1 or window // parts >= needed,
        f"shortest={select.shortest} with windows of {window}, kv_tail={kv.kv_tail}, "
        f"observers={select.observers}, readers={select.readers}, recall={select.recall:g}",
        f"every part needs {needed} tokens",
        f"give --shortest={needed} or more",
    )


def selection_of(args) -> SelectConfig:
    """How the trained run chooses, and which predictors are trained: those named, else those that
    are used as a signal, else one."""
    paper = args.train.preset == "paper"
    names = comma_list(args.select.predictors) or args.select.trained
    if not names:
        names = ["predictor" if paper else "predictor_query"]
    relevance = args.select.relevance
    if "relevance" not in args.given:
        trained = [name for name in ("predictor_query", "predictor") if name in names]
        relevance = (trained or ["future"])[0]
    by = args.select.token_relevance
    if not by and names == ["expected_attention"]:
        by = "expected_attention"
    rule = not_given(args, PAPER_RULE) if paper else {}
    select = replace(
        args.select, predictors=",".join(names), relevance=relevance, token_relevance=by, **rule
    )
    check(
        "oracle" not in (select.relevance, select.tokens_by),
        "relevance=oracle",
        "it is measured, not used: it has seen what follows",
        "leave it out, and give eval.py --relevances=oracle",
    )
    return select


def storage_of(args) -> KVConfig:
    """How what is selected is stored."""
    changes = not_given(args, STORAGE)
    if args.train.preset == "paper":
        changes |= not_given(args, PAPER_STORAGE)
    return replace(args.kv, kv="select", **changes)


def not_given(args, settings: dict) -> dict:
    """Those settings that no flag names."""
    return {name: value for name, value in settings.items() if name not in args.given}
