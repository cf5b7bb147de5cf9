"""Train on all of a dense base while KV heads, or layers, share what is stored: train.py
--stage=continue, and every row of training/mixsga_table.py.

    python train.py --stage=continue --init_from=out/RUN/pretrain --kv=mixsga
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from baselines import align, shared_heads
from cli import note
from config import SHARED, KVConfig, check
from data import TokenFile, batch
from loaders.runs import Run
from loaders.templates import chat_entry
from settings.experts import MixConfig
from settings.fields import to_dict
from settings.train import TrainConfig
from training.base import adapt_window, corpus_of, text_record
from training.stage import Stage
from training.world import World, share_parameters

BATCHES = 4  # that heads are aligned and routers calibrated on
BATCH_SIZE = 8  # sequences in each
TAIL = 16  # newest tokens read whole, unless a flag says otherwise


def continue_stage(args, run_dir: Path, w: World, base: Run) -> Stage:
    """Train on all weights of a loaded base, its keys and values shared as --kv says."""
    cfg: TrainConfig = args.train
    defaults = dict(kv="mixsga", kv_tail=TAIL)
    kv = replace(args.kv, **{k: v for k, v in defaults.items() if k not in args.given})
    check(
        kv.kv in (*SHARED, "dense"),
        f"kv={kv.kv} with stage=continue",
        f"one of {', '.join(SHARED)}, dense",
        "give --stage=adapt for value groups",
    )
    shared_heads.check_model(kv, args.mix, base.model.cfg)
    window = adapt_window(args, base)
    text = cfg.corpus("adapt")
    corpus = corpus_of(args, text, base.tokenizer, window)
    share_heads(base, kv, args.mix, text=corpus.train, seed=cfg.seed, window=window)
    share_parameters(base.model, w)
    name = f"{kv.kv}-s{cfg.seed}"
    return Stage(
        kind="continue",
        name=name,
        folder=run_dir / name,
        model=base.model,
        params=list(base.model.parameters()),
        tokenizer=base.tokenizer,
        corpus=corpus,
        window=window,
        steps=cfg.adapt_steps,
        batch_size=cfg.adapt_batch_size,
        lr=cfg.adapt_lr,
        seed=cfg.seed,
        kv=kv,
        about={
            "mix": to_dict(args.mix),
            "base_sha256": base.base_sha256,
            **chat_entry(base.tokenizer),
            **text_record(args, text, corpus),
        },
    )


def share_heads(
    base: Run, kv: KVConfig, mix: MixConfig, *, text: TokenFile, seed: int, window: int
) -> None:
    """Let a dense base share keys and values as kv and mix say, in place, heads aligned and routers
    calibrated on text; all of it is trainable then."""
    model = base.model
    torch.manual_seed(seed)
    if kv.kv != "dense":
        note(f"calibrating {kv.kv}")
        device = model.norm.weight.device
        seen = []
        for i in range(BATCHES):
            x, y = batch(text, "calibrate", seed, i, BATCH_SIZE, window)
            seen.append((x.to(device), y.to(device)))
        align.fit(shared_heads.attach(model, kv, mix), seen)
    model.requires_grad_(True)
