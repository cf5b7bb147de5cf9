"""What a stage begins with: the text, and the base, which is pretrained here or loaded from where
an earlier run or another project left it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import kv_router
from config import KVConfig, SelectConfig, check
from data import Corpus, TokenFile, batch, check_length, prepare
from loaders import checkpoint
from loaders.instructions import instruct_corpus
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
from model import Transformer
from settings.fields import from_dict, to_dict
from settings.train import TrainConfig
from training.stage import Stage
from training.world import World, share_parameters

LONGEST = 512  # tokens in a training sequence of a pretrained model, unless a flag says otherwise
# Settings of value groups that a basis belongs to. A selection may differ in all others.
BASIS_SETTINGS = ("n_groups", "value_basis", "learn_basis", "kv_layers")


def corpus_of(args, name: str, tokenizer, block_size: int) -> Corpus:
    """A corpus, both splits long enough for the context. Everything about it is checked here,
    before step 0."""
    if name.startswith("instruct:"):
        return instruct_corpus(name, args.data, tokenizer, block_size)
    corpus = prepare(name, args.data, tokenizer)
    for tokens in (corpus.train, corpus.val):
        check_length(tokens, block_size)
    return corpus


def text_record(args, name: str, corpus: Corpus) -> dict:
    """What a checkpoint says of its text: its name, how it was prepared, and the sha256 of the
    tokens of both splits."""
    prepared = {k: v for k, v in to_dict(args.data).items() if k != "data_dir"}
    tokens = [split.header["sha256"] for split in (corpus.train, corpus.val)]
    return {"corpus": name, "data": prepared, "tokens": tokens}


def base_record(args, base: Run, folder: Path) -> dict:
    """What a checkpoint in `folder` says of the base that it adds to."""
    return {
        "weights": args.base.weights,
        "base": base_reference(base, folder),
        "base_sha256": base.base_sha256,
    }


def calibration_batches(
    text: TokenFile, seed: int, *, batches: int, batch_size: int, window: int, device: torch.device
) -> list[torch.Tensor]:
    """Sequences that bases and routers are calibrated on: `batches` of (batch_size, window)."""
    return [
        batch(text, "calibrate", seed, i, batch_size, window)[0].to(device) for i in range(batches)
    ]


def pretrain_stage(args, tokenizer, run_dir: Path, w: World) -> Stage:
    """A fresh model, all of which is trained."""
    cfg: TrainConfig = args.train
    model_cfg = replace(args.model, vocab_size=tokenizer.vocab_size)
    name = cfg.corpus("pretrain")
    corpus = corpus_of(args, name, tokenizer, model_cfg.block_size)
    torch.manual_seed(cfg.seed)
    model = Transformer(model_cfg).to(w.device)
    share_parameters(model, w)
    return Stage(
        kind="pretrain",
        name="pretrain",
        folder=run_dir / "pretrain",
        model=model,
        params=list(model.parameters()),
        tokenizer=tokenizer,
        corpus=corpus,
        window=model_cfg.block_size,
        steps=cfg.pretrain_steps,
        batch_size=cfg.pretrain_batch_size,
        lr=cfg.pretrain_lr,
        seed=cfg.seed,
        kv=KVConfig(kv="dense"),
        about=text_record(args, name, corpus),
    )


def load_base(args, where: str | Path, device: torch.device) -> Run:
    """The frozen base that is adapted. ValueError for an adapter, or where a flag contradicts what
    the base is."""
    base = load_run(where, device, **args.base.options(""))
    check(
        base.adapter.adapter == "none" and base.kv.kv == "dense",
        f"init_from={where}",
        "a base model is adapted, not an adapter",
        "give a pretrain stage's folder or a pretrained model",
    )
    has = to_dict(base.model.cfg)
    for name in has:
        if name in args.given and name != "block_size":
            check(
                getattr(args.model, name) == has[name],
                f"{name}={getattr(args.model, name)}",
                f"the base has {has[name]}",
                f"leave --{name} out",
            )
    check(
        "tokenizer" not in args.given or args.data.tokenizer == base.tokenizer.name,
        f"tokenizer={args.data.tokenizer!r}",
        f"the base was trained with {base.tokenizer.name!r}",
        "leave --tokenizer out",
    )
    return base


def adapt_window(args, base: Run) -> int:
    """Tokens in a training sequence: --block_size (or the preset's), else those of the base's own
    training; LONGEST for a pretrained model."""
    longest = base.model.cfg.block_size
    if "block_size" in args.given or args.train.preset == "paper":
        asked = args.model.block_size
        check(
            asked <= longest,
            f"block_size={asked}",
            f"the base knows {longest} tokens",
            f"give --block_size={longest} or less",
        )
        return asked
    usual = min(LONGEST, longest) if is_foreign(base.path) else longest
    return base.config.get("block_size", usual)


def take_selection(
    model: Transformer, where: str | Path, base_sha256: str, learn_basis: bool
) -> tuple[KVConfig, SelectConfig, str]:
    """Give a model the selection that the run at `where` trained, with its storage and settings:
    returns both, and the sha256 of its file. ValueError where the base differs.

    learn_basis: whether its maps are to be trained on"""
    path = find_checkpoint(where)
    saved = checkpoint.load(path)
    check(
        "selector" in saved.tensors,
        f"kv_from={where}",
        "it trained no selection",
        "give a select stage's folder",
    )
    check_base(saved, where, base_sha256)
    kv = from_dict(KVConfig, saved.config["kv"])
    kv = replace(kv, learn_basis=kv.learn_basis or learn_basis)
    select = from_dict(SelectConfig, saved.config["select"])
    attach_storage(model, kv, select)
    load_added_state(model, saved.tensors["selector"])
    return kv, select, checkpoint.tensor_hash(path, "selector.safetensors")


def check_base(saved: checkpoint.Checkpoint, where: str | Path, base_sha256: str) -> None:
    """Raise ValueError where the checkpoint at `where` belongs to another base."""
    check(
        saved.config.get("base_sha256") == base_sha256,
        f"kv_from={where}",
        "it was trained on another base",
        "give a run on this one",
    )


def start_from(model: Transformer, kv: KVConfig, where: str | Path, base_sha256: str) -> str:
    """Attach value groups as the run at `where` left them; returns the sha256 of their file.
    ValueError where base or settings differ."""
    path = find_checkpoint(where)
    saved = checkpoint.load(path)
    check(
        "adapter" in saved.tensors,
        f"kv_from={where}",
        "it trained no value groups",
        "give an adapt stage's folder",
    )
    check_base(saved, where, base_sha256)
    names = BASIS_SETTINGS if kv.kv == "select" else to_dict(kv)
    had = from_dict(KVConfig, saved.config["kv"])
    check(
        all(getattr(had, name) == getattr(kv, name) for name in names),
        f"kv_from={where}",
        "it has other --kv settings",
        "give the flags it was trained with",
    )
    if kv.kv != "select":
        kv_router.attach(model, kv)
    kv_router.load_state(model, split_added(saved.tensors["adapter"])[0])
    return checkpoint.tensor_hash(path, "adapter.safetensors")
