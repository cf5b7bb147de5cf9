"""Train: pretrain a small transformer, adapt it with LoRA, MoE-LoRA or routed subspace LoRA over
routed values, print the table.

Without flags, on any machine: `pretrain` on pydocs (the reference text inside CPython), then
`adapt` on pycode (the standard library's source) once per row and seed, then decode-mode perplexity
and measured cache bytes, results.json, made.json (how its rows were made) and report.png.

Every --stage is built in one place: pretrain in training/base.py, adapt and the table of all
(--stage=all) in training/adapters.py, select in training/predictors.py, continue in
training/shared_heads.py. training/loop.py trains what they build.

    python train.py
    python train.py --stage=adapt --init_from=out/RUN/pretrain --adapter=routed \\
        --kv=value_groups --reconstructor=mlp
    python train.py --stage=select --init_from=out/RUN/pretrain \\
        --predictors=predictor,predictor_query
    python train.py --stage=adapt --init_from=model.gguf --adapter=none --learn_basis \\
        --objective=distill --dataset=text:some.txt
    torchrun --nproc_per_node=2 train.py --stage=pretrain
"""

from __future__ import annotations

import itertools
import sys
import time
from contextlib import suppress
from pathlib import Path

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

from torch import distributed as dist

from data import content_hash, label_of
from loaders import checkpoint
from loaders.device import check_weights, device_name
from loaders.tokenizer import get_tokenizer
from report.made import write_record
from training.adapters import adapt_stage, adaptation, run_table
from training.base import load_base, pretrain_stage
from training.loop import NonFinite, Stage, out_of_memory_explained, train
from training.predictors import select_stage
from training.shared_heads import continue_stage
from training.world import World, world


def run(args) -> None:
    """Do what the flags ask, and leave everything in one folder."""
    cfg: TrainConfig = args.train
    check_flags(args)
    with world(cfg.device) as w:
        check_weights(args.base.weights, w.device, cfg.dtype)
        run_dir, made = open_run_dir(cfg, w)
        if w.main and not cfg.resume:
            settings = {name: to_dict(getattr(args, name)) for name in CONFIGS}
            checkpoint.write_json(run_dir / "config.json", settings)
        sizes = f"{cfg.pretrain_batch_size} (pretrain) / {cfg.adapt_batch_size} (adapt)"
        try:
            with out_of_memory_explained(sizes, args.model.block_size, cfg.accumulation):
                run_stages(args, run_dir, w)
        except NonFinite as e:
            print(f"train.py: {e}", file=sys.stderr)
            raise SystemExit(3) from None
        except ValueError:
            if w.main and not cfg.resume:
                take_back(run_dir, made)
            raise


def run_stages(args, run_dir: Path, w: World) -> None:
    """Run one stage, or with --stage=all those of the table, which is printed."""
    if args.train.stage == "all":
        began = time.time()
        text = run_table(args, run_dir, w)
        if w.main:
            write_record(run_dir, device_name(w.device), began, texts_of(args))
            print(f"\n{text}")
    else:
        train(stage_of(args, run_dir, w), args.train, w)


def texts_of(args) -> list[dict]:
    """The corpora that the table is trained and measured on, each with the sha256 of its
    content."""
    names = [args.train.corpus("adapt"), args.train.test_dataset]
    if args.base.init_from == "scratch":
        names.append(args.train.corpus("pretrain"))
    read = [name for name in dict.fromkeys(names) if name]
    return [{"corpus": label_of(n), "sha256": content_hash(n, args.data)} for n in read]


def stage_of(args, run_dir: Path, w: World) -> Stage:
    """The one stage that the flags ask for."""
    kind = args.train.stage
    if kind == "pretrain":
        return pretrain_stage(args, get_tokenizer(args.data.tokenizer), run_dir, w)
    base = load_base(args, args.base.init_from, w.device)
    if kind == "select":
        return select_stage(args, run_dir, w, base)
    if kind == "continue":
        return continue_stage(args, run_dir, w, base)
    return adapt_stage(args, run_dir, w, base, adaptation(args))


# -- flags that do not go together


def check_flags(args) -> None:
    """Raise ValueError for flags that contradict each other, and for those that the stage does not
    read."""
    check_base_flags(args)
    check_storage_flags(args)
    check_objective_flags(args)
    fresh = args.train.stage == "all" and args.base.init_from == "scratch"
    if fresh and args.kv.kv == "value_groups":
        args.kv.check_model(args.model)  # of another base the shape is not known yet


def check_base_flags(args) -> None:
    """Whether there is a base, and the stage trains on one."""
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
    pretraining = sorted(f for f in args.given if f == "dataset" or f.startswith("pretrain_"))
    check(
        cfg.stage != "all" or where == "scratch" or not pretraining,
        f"{', '.join(pretraining)} with init_from={where!r}",
        "nothing is pretrained",
        "leave it out; --adapt_dataset names the corpus of the adaptation",
    )


def check_storage_flags(args) -> None:
    """Whether the stage trains with this kind of storage."""
    cfg: TrainConfig = args.train
    kv = args.kv
    if cfg.stage == "select":
        unused = [f for f in ("adapter", "topk_groups", "compile") if f in args.given]
        if "kv" in args.given and kv.kv != "select":
            unused.append("kv")
        if kv.learn_basis and not cfg.kv_from:
            unused.append("learn_basis")
        check(
            not unused,
            f"{', '.join(unused)} with stage=select",
            "it trains predictors alone",
            "leave them out",
        )
    check(
        kv.kv != "select" or cfg.stage == "select",
        f"kv=select with stage={cfg.stage}",
        "it compresses prompts: nothing is adapted over it",
        "give --stage=select",
    )
    check(
        kv.kv not in SHARED or cfg.stage == "continue",
        f"kv={kv.kv} with stage={cfg.stage}",
        "a whole model is trained on with it",
        "give --stage=continue",
    )
    mixed = sorted(f for f in args.given if f in to_dict(args.mix))
    check(
        not mixed or cfg.stage == "continue",
        f"{', '.join(mixed)} with stage={cfg.stage}",
        "only kv=mixsga, gqa and cla read it",
        "give --stage=continue",
    )
    check(
        not (cfg.kv_from and kv.kv == "dense"),
        f"kv_from={cfg.kv_from!r} with kv=dense",
        "there are no value groups",
        "leave one out",
    )


def check_objective_flags(args) -> None:
    """Whether there is something to distil."""
    cfg: TrainConfig = args.train
    check(
        cfg.stage == "adapt" or cfg.objective == "lm",
        f"objective={cfg.objective} with stage={cfg.stage}",
        "one adaptation is trained by it",
        "give --stage=adapt, or --distill_steps=N for the table",
    )
    check(
        not cfg.distill_steps or args.kv.learn_basis,
        f"distill_steps={cfg.distill_steps}",
        "there is no basis to train",
        "give --learn_basis",
    )


# -- the run's folder


def open_run_dir(cfg: TrainConfig, w: World) -> tuple[Path, list[Path]]:
    """The run's folder, a fresh one under out/ or the named one, which must be empty unless
    --resume; and the folders made for it, innermost first."""
    if not cfg.out_dir:
        return fresh_run_dir(w)
    path = Path(cfg.out_dir)
    check(not path.exists() or path.is_dir(), f"out_dir={path}", "is a file", "name a folder")
    if cfg.resume:
        check(
            is_begun(path),
            f"resume from {path}",
            "there is no checkpoint in it",
            "leave --resume out to start anew",
        )
        return path, []
    check(
        not (path.is_dir() and any(path.iterdir())),
        f"out_dir={path}",
        "is not empty",
        "give --resume to continue it, or another folder",
    )
    if w.size > 1:
        dist.barrier()  # every rank has looked before rank 0 writes
    return path, make_folders(path) if w.main else []


def fresh_run_dir(w: World) -> tuple[Path, list[Path]]:
    """A folder under out/ that no other run has, named by the time, the same on every rank; and the
    folders made for it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [""]
    made = []
    for n in itertools.count() if w.main else ():
        names = [f"out/{stamp}-{n}" if n else f"out/{stamp}"]
        try:
            made = make_folders(Path(names[0]), exist_ok=False)
            break
        except FileExistsError:  # another run has it
            continue
    if w.size > 1:
        dist.broadcast_object_list(names, 0)
    return Path(names[0]), made


def make_folders(path: Path, exist_ok: bool = True) -> list[Path]:
    """Make a folder and those above it that are missing; returns what was made, innermost first."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=exist_ok)
    return made


def is_begun(run_dir: Path) -> bool:
    """Whether a run has left anything in a folder that can be continued."""
    if not run_dir.is_dir():
        return False
    if (run_dir / "config.json").is_file():
        return True
    return any(run_dir.glob("*/step-*")) or any(run_dir.glob("*/.*-step-*"))


def take_back(run_dir: Path, made: list[Path]) -> None:
    """After bad input: remove what this start created, unless a stage has written something by
    then."""
    if not any(run_dir.glob("*/*")):
        (run_dir / "config.json").unlink(missing_ok=True)
        for folder in [*(p for p in run_dir.iterdir() if p.is_dir()), *made]:
            with suppress(OSError):
                folder.rmdir()


if __name__ == "__main__":
    exit_on_bad_input(lambda: run(ARGS))
