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
    python train.py --stage=adapt --init_from=model.gguf --kv=select --kv_from=out/SELECT \\
        --adapter=none --learn_basis --objective=distill --dataset=text:some.txt
    torchrun --nproc_per_node=2 -- train.py --stage=pretrain
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import itertools
import os
import shlex
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from cli import exit_after, exit_on_bad_input, note, parse_args
from config import KVConfig, ModelConfig, SelectConfig
from settings.adapters import AdapterConfig
from settings.base import BaseConfig
from settings.experts import MixConfig
from settings.fields import to_file
from settings.places import check_begun, check_inputs
from settings.stages import check_flags
from settings.train import DataConfig, TrainConfig
from training.lock import check_run_dir, owned

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


def check_asked(args) -> None:
    """Raise ValueError where there is no run to resume, whose settings the flags would lack, and
    for flags that contradict each other or are not read."""
    if args.train.resume:
        check_begun(Path(args.train.out_dir))
    check_flags(args)


def check_places(args) -> None:
    """Raise ValueError for a base, value groups or text that is not there, and for a folder that
    this run may not have. Under torchrun rank 0 alone looks at that one: it writes there."""
    check_inputs(args, "init_from", "kv_from")
    if args.train.out_dir and os.environ.get("RANK", "0") == "0":
        check_run_dir(Path(args.train.out_dir), args.train.resume)


if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__)
    exit_on_bad_input(lambda: check_asked(ARGS))
    exit_on_bad_input(lambda: check_places(ARGS))

from torch import distributed as dist

from data import content_hash, label_of
from loaders import checkpoint
from loaders.device import check_weights, device_name
from loaders.tokenizer import get_tokenizer
from report.made import write_record
from training.adapters import adapt_stage, adaptation, run_table
from training.base import load_base, pretrain_stage
from training.loop import NonFinite, out_of_memory_explained, train
from training.predictors import select_stage
from training.shared_heads import continue_stage
from training.stage import Stage
from training.world import World, world


def run(args) -> None:
    """Do what the flags ask, and leave everything in one folder."""
    cfg: TrainConfig = args.train
    check_asked(args)
    with world(cfg.device) as w:
        check_weights(args.base.weights, w.device, cfg.dtype)
        run_dir, made = open_run_dir(cfg, w)
        with owned(run_dir) if w.main else nullcontext():
            run_in(args, run_dir, made, w)


def run_in(args, run_dir: Path, made: list[Path], w: World) -> None:
    """Do what the flags ask in the run's folder. made: the folders made for it."""
    cfg: TrainConfig = args.train
    settings = run_dir / "config.json"
    sizes = f"{cfg.pretrain_batch_size} (pretrain) / {cfg.adapt_batch_size} (adapt)"
    try:
        if w.main and (settings.is_file() or not cfg.resume):
            checkpoint.write_json(settings, settings_of(args))
        with out_of_memory_explained(sizes, args.model.block_size, cfg.accumulation):
            run_stages(args, run_dir, w)
    except NonFinite as e:
        print(f"train.py: {e}", file=sys.stderr)
        raise SystemExit(3) from None
    except (ValueError, OSError, KeyboardInterrupt):
        if w.main and not cfg.resume:
            take_back(run_dir, made)
        raise


def settings_of(args) -> dict:
    """What a run's config.json keeps, and a resumed run begins with: all settings, and the names of
    those that flags gave."""
    settings = {name: to_file(getattr(args, name)) for name in CONFIGS}
    settings["train"]["resume"] = False
    return settings | {"given": sorted(args.given - {"resume"})}


def run_stages(args, run_dir: Path, w: World) -> None:
    """Run one stage, or with --stage=all those of the table, which is printed."""
    if args.train.stage == "all":
        began = time.time()
        base = args.base.init_from
        fresh = base == "scratch"
        note(f"reading {args.train.corpus('pretrain')}" if fresh else f"loading {base}")
        text, stage = run_table(args, run_dir, w)
        if w.main:
            write_record(run_dir, device_name(w.device), began, args, texts_of(args))
            print(f"\n{text}")
            print(f"next: python sample.py --out_dir={shlex.quote(str(stage))}", file=sys.stderr)
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
    corpus = args.train.corpus("pretrain" if kind == "pretrain" else "adapt")
    if kind == "pretrain":
        note(f"reading {corpus}")
        return pretrain_stage(args, get_tokenizer(args.data.tokenizer), run_dir, w)
    note(f"loading {args.base.init_from}")
    base = load_base(args, args.base.init_from, w.device)
    note(f"reading {corpus}")
    if kind == "select":
        return select_stage(args, run_dir, w, base)
    if kind == "continue":
        return continue_stage(args, run_dir, w, base)
    return adapt_stage(args, run_dir, w, base, adaptation(args))


# -- the run's folder


def open_run_dir(cfg: TrainConfig, w: World) -> tuple[Path, list[Path]]:
    """The run's folder, a fresh one under out/ or the named one, which must be empty unless
    --resume; and the folders made for it, innermost first."""
    if not cfg.out_dir:
        return fresh_run_dir(w)
    path = Path(cfg.out_dir)
    check_run_dir(path, cfg.resume, main=w.main)
    if cfg.resume:
        return path, []
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


def take_back(run_dir: Path, made: list[Path]) -> None:
    """After bad input or Ctrl-C: remove what this start created, unless a stage has written
    something by then."""
    if not any(run_dir.glob("*/*")):
        (run_dir / "config.json").unlink(missing_ok=True)
        for folder in [*(p for p in run_dir.iterdir() if p.is_dir()), *made]:
            with suppress(OSError):
                folder.rmdir()


if __name__ == "__main__":
    exit_after(lambda: run(ARGS))
