"""What more than one GPU gives: tokens per second of training with one, with DDP and with --shard,
whether their losses agree, how soon a job ends that loses a rank, and a model that is split.

    python -m benchmarks.ranks --name=one --results=out/x
    python -m benchmarks.ranks --name=two --ranks=2 --shard --same_as=one --results=out/x
    python -m benchmarks.ranks --what=lost --name=lost --ranks=2 --results=out/x
    python -m benchmarks.ranks --what=generate --name=split --devices=cuda:0,cuda:1 --results=out/x

Text is random walks over the vocabulary, weights are random. Every measurement is a row, printed
and left in RESULTS/NAME/results.json.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from cli import exit_after, parse_args
from config import ModelConfig
from settings.adapters import ADAPTERS, AdapterConfig
from settings.fields import DTYPES, check, check_fields, opt
from settings.train import TrainConfig


@dataclass(frozen=True)
class RanksConfig:
    """What is measured."""

    what: str = opt(
        "train",
        "train: steps of training; lost: such a job, a rank of which is killed; generate: tokens",
        ("train", "lost", "generate"),
    )
    name: str = opt("row", "name of the row")
    results: str = opt("out/ranks", "folder of the rows")
    same_as: str = opt("", "earlier row: how far its losses, or tokens and logits, are is said")
    ranks: int = opt(1, "train, lost: processes", least=1)
    shard: bool = opt(False, "train, lost: as in train.py")
    capture: bool = opt(False, "train, lost: a step is a CUDA graph; of several processes, too")
    adapter: str = opt("none", "train: what is trained; none: all weights", ADAPTERS)
    weights: str = opt("float32", "dtype of the weights", ("float32", "bfloat16"))
    batch_size: int = opt(32, "sequences in a step of all ranks, or prompts", least=1)
    steps: int = opt(40, "train: steps", least=1)
    new_tokens: int = opt(64, "generate: tokens after prompts of half of block_size", least=2)
    devices: str = opt(
        "cuda:0",
        "generate: one device, or several that layers are split over; cuda:0,cuda:0 runs on one "
        "the steps of a split model, whose tokens those of cuda:0,cuda:1 must be",
    )
    device: str = opt("auto", "auto, cpu or cuda")
    dtype: str = opt("auto", "compute type", DTYPES)

    def __post_init__(self):
        check_fields(self)
        check(
            not (self.shard and self.capture),
            "shard with capture",
            "steps of sharded weights are not captured",
            "leave one out",
        )


CONFIGS = {"ranks": RanksConfig, "model": ModelConfig}
if __name__ == "__main__":
    ARGS = parse_args(CONFIGS, description=__doc__)

import torch
from torch import Tensor

from benchmarks.common import largest_difference, leave_rows, random_model, shape_name
from benchmarks.step import Case, LoggedTrainer, stage_of
from generate import DecodeGraph, generate, prefill
from loaders.device import autocast, device_name, pick_device
from loaders.split import devices_of, layers_by_device, split
from model import Transformer
from training.world import share_parameters, world

N_LOGITS = 64  # of a row, that are kept


def main() -> None:
    """Measure what the flags ask, in as many processes, the first of which leaves the row."""
    began = time.time()
    cfg: RanksConfig = ARGS.ranks
    if cfg.what == "train" and cfg.ranks > 1 and "RANK" not in os.environ:
        raise SystemExit(subprocess.call(torchrun(cfg, sys.argv[1:])))
    measure = {"train": train_row, "lost": lost_row, "generate": generate_row}[cfg.what]
    row = measure(cfg, ARGS.model)
    if row is not None:
        write(cfg, ARGS.model, row, began)


def torchrun(cfg: RanksConfig, flags: list[str]) -> list[str]:
    """Return the command that runs this program with these flags in cfg.ranks processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.ranks}"]
    return [sys.executable, *launch, "-m", "benchmarks.ranks", *flags]


def write(cfg: RanksConfig, shape: ModelConfig, row: dict, began: float) -> None:
    """Compare a row with an earlier one, print it without its lists, and keep it."""
    about = {
        "name": cfg.name,
        "task": cfg.what,
        "impl": how_it_ran(cfg, row.pop("captured", False)),
        "shape": shape_name(cfg.batch_size, shape.block_size, shape),
    }
    row = about | row
    if cfg.same_as:
        (peer,) = json.loads(Path(cfg.results, cfg.same_as, "results.json").read_bytes())
        row |= {"peer": cfg.same_as} | compared(row, peer)
    leave_rows(Path(cfg.results, cfg.name), [row], row["device"], began)
    print(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)


def how_it_ran(cfg: RanksConfig, captured: bool) -> str:
    """Return what a row is called beside others."""
    if cfg.what == "generate":
        return cfg.devices
    how = "CUDA graph" if captured else "kernel by kernel"
    if cfg.ranks > 1:
        return f"{cfg.ranks} processes, {'sharded' if cfg.shard else 'DDP'}, {how}"
    return how


def said_first(cfg: RanksConfig, captured: bool) -> str:
    """Return what training says before its first step."""
    return f"{cfg.name}: {how_it_ran(cfg, captured)}"


def compared(row: dict, peer: dict) -> dict:
    """Return a row's time for a token over its peer's, and the greatest relative difference of
    their losses, or the share of their tokens that are the same and the greatest difference of
    their logits, in standard deviations of the peer's."""
    found = {"ratio": round(peer["tokens_per_s"] / row["tokens_per_s"], 4)}
    if "losses" in row:
        return found | {"largest_difference": largest_difference(row["losses"], peer["losses"])}
    pairs = zip(row["tokens"], peer["tokens"], strict=True)
    found["agreement"] = mean(float(a == b) for a, b in pairs)
    pairs = zip(row["logits"], peer["logits"], strict=True)
    found["logits_difference"] = max(abs(a - b) for a, b in pairs) / stdev(peer["logits"])
    return found


# -- training


def train_row(cfg: RanksConfig, shape: ModelConfig) -> dict | None:
    """Train for cfg.steps steps. Return tokens per second (median), memory of rank 0 and every
    loss; None in other ranks."""
    case = Case(AdapterConfig(adapter=cfg.adapter), weights=cfg.weights)
    with world(cfg.device) as w:
        sizes = dict(batch_size=cfg.batch_size, steps=cfg.steps, device=w.device)
        stage = stage_of(case, shape, **sizes, name=cfg.name)
        share_parameters(stage.model, w)
        asked = TrainConfig(
            stage=stage.kind,
            shard=cfg.shard,
            capture=cfg.capture,
            dtype=cfg.dtype,
            eval_sequences=2 * w.size,
        )
        trainer = LoggedTrainer(stage, asked, w)
        trainer.say([said_first(cfg, not trainer.why_not_captured)])
        trainer.run()
        on_gpu = w.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
    if not w.main:
        return None
    speed = median(row["tokens_per_s"] for row in trainer.rows)
    return {
        "device": f"{w.size} x {device_name(w.device)}",
        "captured": not trainer.why_not_captured,
        "tokens_per_s": round(speed),
        "ms": round(1e3 * cfg.batch_size * shape.block_size / speed, 2),
        "peak_memory_bytes": peak,
        "losses": [row["loss"] for row in trainer.rows],
    }


# -- a rank that is lost


def lost_row(cfg: RanksConfig, shape: ModelConfig) -> dict:
    """Kill the last rank of a job that trains, and has steps behind it. Return whether these were
    replayed graphs, seconds until the job has ended, and what the others said."""
    flags = [flag for flag in sys.argv[1:] if not flag.startswith(("--what", "--steps"))]
    command = torchrun(cfg, [*flags, "--what=train", "--steps=1000000"])
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []
    captured = False
    for line in job.stderr:
        said.append(line)
        captured |= line.rstrip() == said_first(cfg, True)
        if line.startswith(f"{cfg.name}: ") and "gone" in line and ": 0 of" not in line:
            break
    os.kill(rank_of(job.pid, cfg.ranks - 1), signal.SIGKILL)
    start = time.perf_counter()
    said = job.communicate(timeout=120)[1].splitlines()
    seconds = time.perf_counter() - start
    lines = [line for line in said if "another process of this job is gone" in line]
    check(job.returncode != 0 and bool(lines), "\n".join(said), "one line of why", "see above")
    return {
        "device": f"{cfg.ranks} x {device_name(pick_device(cfg.device))}",
        "captured": captured,
        "ended_after_s": round(seconds, 2),
        "exit": job.returncode,
        "said": " / ".join(lines),
    }


def rank_of(parent: int, rank: int) -> int:
    """Return the process id of a rank of torchrun's process `parent`."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            environment = (stat.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # has ended meanwhile
        if f"RANK={rank}".encode() in environment:
            return int(stat.parent.name)
    raise ValueError(f"no rank {rank} under process {parent}")


# -- layers on several devices


def generate_row(cfg: RanksConfig, shape: ModelConfig) -> dict:
    """Generate greedily from random prompts. Return tokens per second of the second run, bytes on
    the devices, the tokens, and logits of the first step after the prompts.

    Where steps run by other kernels (a whole model's on a GPU do), bfloat16 rounds elsewhere, and
    random weights have no clear first choice: there tokens part soon, and logits tell how far two
    paths are apart. On the same path all tokens are the same."""
    places = devices_of(cfg.devices)
    model = random_model(shape, places[0], cfg.weights)
    if len(places) > 1:
        split(model, cfg.devices)
    draw = torch.Generator().manual_seed(0)
    size = (cfg.batch_size, shape.block_size // 2)
    prompts = torch.randint(0, shape.vocab_size, size, generator=draw).tolist()
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with autocast(places[0], cfg.dtype):
            rows, cache = generate(model, prompts, cfg.new_tokens)
        seconds = time.perf_counter() - start
    with autocast(places[0], cfg.dtype):
        logits = first_logits(model, torch.tensor(prompts, device=places[0]))
    gpus = [place for place in dict.fromkeys(places) if place.type == "cuda"]
    return {
        "device": f"{len(set(places))} x {device_name(places[0])}",
        "tokens_per_s": round(cfg.batch_size * cfg.new_tokens / seconds, 1),
        "peak_memory_bytes": max(map(torch.cuda.max_memory_allocated, gpus), default=None),
        "cache_gb": round(cache.nbytes() / 1e9, 3),
        "layers": layers_by_device(model) if len(places) > 1 else {str(places[0]): shape.n_layer},
        "held_gb": {str(g): round(torch.cuda.memory_allocated(g) / 1e9, 2) for g in gpus},
        "tokens": [token for row in rows for token in row],
        "logits": logits[:, :N_LOGITS].flatten().tolist(),
    }


@torch.no_grad()
def first_logits(model: Transformer, idx: Tensor) -> Tensor:
    """Return logits (B, V) of the step that reads each prompt's first new token, done as generate
    does its first steps. idx: prompts (B, T)."""
    logits, cache = prefill(model, idx, idx.size(1) + 1)
    ids = logits.argmax(-1, keepdim=True)
    if not DecodeGraph.possible(model):
        return model.decode(ids, cache)[:, -1]
    seen = []

    def pick(logits: Tensor, step: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1, keepdim=True)

    DecodeGraph(model, cache, ids, pick, 1).next()
    torch.cuda.synchronize()
    return seen[0]


if __name__ == "__main__":
    exit_after(main)
