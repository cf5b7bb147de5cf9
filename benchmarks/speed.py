"""Tokens per second of training and of decoding against batch and context, beside others' code and
beside what the machine's memory and its products allow (benchmarks/limits.py), all of one run.

    python -m benchmarks.speed --vocab_size=49152 --n_layer=30 --n_embd=576 --n_head=9 \\
        --n_kv_head=3 --head_dim=64 --n_inner=1536 --block_size=512 --peers --results=out/speed

Decoding: models of random weights after prompts of random ids, dense, with half of every value and
in an eighth of the bytes; beside them transformers' generate. Attention alone: one layer's, times
the number of layers; beside it PyTorch's. Training: LoRA and routed LoRA over value groups, on
sequences of block_size tokens; beside them PEFT's LoRA. Times are those of bench.py generate and
decode, benchmarks/step.py and benchmarks/peers.py. Leaves results.json and speed.png in RESULTS.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cli import exit_on_bad_input, parse_args
from config import KVConfig, ModelConfig, SelectConfig
from settings.fields import DTYPES, check, check_fields, comma_list, one_line, opt


@dataclass(frozen=True)
class SpeedConfig:
    """What is measured."""

    results: str = opt("out/speed_plot", "folder of results.json and speed.png")
    batches: str = opt("1,8,64", "sequences that are decoded at once, a list")
    contexts: str = opt("2048,8120,32768", "tokens of their prompts, a list")
    attention_batch: int = opt(8, "sequences of attention alone", least=1)
    train_batches: str = opt("1,4,8,16", "sequences of a training step, a list")
    new_tokens: int = opt(40, "tokens decoded after each prompt", least=16)
    steps: int = opt(12, "steps of each training; the first quarter is not counted", least=4)
    prefill_tokens: int = opt(65536, "tokens of the prompts processed at a time", least=1)
    memory_gb: float = opt(
        80.0, "memory in GiB: prompts whose dense cache does not fit twice are left out", above=0
    )
    most_seconds: float = opt(300.0, "nothing begins later than this", above=0)
    peers: bool = opt(False, "others' code, too (pip install peft transformers)")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", DTYPES)

    def __post_init__(self):
        check_fields(self)
        for name in ("batches", "contexts", "train_batches"):
            numbers(name, getattr(self, name))


def numbers(name: str, text: str) -> list[int]:
    """Return the entries of a list. Raises ValueError unless they are whole numbers from 1 on."""
    entries = comma_list(text)
    ok = all(entry.isdecimal() and int(entry) > 0 for entry in entries)
    check(ok, f"{name}={text!r}", "whole numbers, 1 at least", "give for example 1,8")
    return [int(entry) for entry in entries]


CONFIGS = {"speed": SpeedConfig, "model": ModelConfig}
if __name__ == "__main__":
    ARGS = parse_args(CONFIGS, description=__doc__)

import torch

from benchmarks import step
from benchmarks.common import dtype_name, leave_rows, random_model, rows_of_peers
from benchmarks.decode import bench_decode
from benchmarks.generate import decoded, figures, store_by
from benchmarks.limits import (
    Machine,
    Work,
    attention_work,
    decode_work,
    limits,
    lora_work,
    machine_of,
)
from loaders.device import device_name, in_bfloat16, pick_device
from measure_config import BenchConfig
from model import Transformer
from report.figures import speed_figure

GROUPS = "16 bits, 8 of 16 value groups"
LEVELS = "levels, 12.5 % of the bytes"
STORAGES = {
    "dense": (KVConfig(kv="dense"), SelectConfig()),
    GROUPS: (KVConfig(n_groups=16, topk_groups=8, kv_tail=16), SelectConfig()),
    LEVELS: (KVConfig(kv="select", n_groups=8, kv_tail=16), SelectConfig(kv_bytes=0.125)),
}
CASES = "16:0.5,8:0.9:0.43:4:0"  # of attention alone: the same shares of bytes
TRAINED = ("LoRA", "routed LoRA over value groups")
PEER_TOKENS = 12  # that transformers decodes, at some 30 ms each
# a row's peer, the first of these that was measured at the same point
PEER_OF = {
    "decode": ("transformers generate", "dense"),
    "training": ("PEFT, eager", "LoRA"),
}
FASTEST = "PyTorch's fastest attention"
ROUNDS = 5  # of attention alone


@dataclass
class Sweep:
    """A sweep on its way: what is asked, where, and the rows so far."""

    cfg: SpeedConfig
    shape: ModelConfig
    device: torch.device
    dtype: torch.dtype
    machine: Machine
    began: float

    def in_time(self, what: str) -> bool:
        """Say whether something may begin, and on stderr where it may not."""
        ok = time.time() - self.began < self.cfg.most_seconds
        if not ok:
            print(f"left out, {self.cfg.most_seconds:g} s are over: {what}", file=sys.stderr)
        return ok

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's whole keys and values, all layers."""
        c = self.shape
        return 2 * c.n_layer * c.n_kv_head * c.head_dim * self.dtype.itemsize

    def points(self) -> list[tuple[int, int]]:
        """Return (sequences, tokens) of the prompts that fit into the memory."""
        most = self.cfg.memory_gb * 2**30 / (2 * self.token_bytes)
        batches = numbers("batches", self.cfg.batches)
        contexts = numbers("contexts", self.cfg.contexts)
        return [(b, n) for b in batches for n in contexts if b * n <= most]

    def row(self, task: str, point: tuple[int, int], row: dict, work: Work) -> dict:
        """Return a measured row with its point and its limits."""
        batch_size, n_tokens = point
        made = batch_size * n_tokens if task == "training" else batch_size
        bounds = limits(work, made, self.machine)
        return {
            "task": task,
            "impl": row["impl"],
            "shape": f"B{batch_size} T{n_tokens}",
            "batch_size": batch_size,
            "n_tokens": n_tokens,
            "device": device_name(self.device),
            "ms": row["ms"],
            "tokens_per_s": row["tokens_per_s"],
            "of_limit": round(row["tokens_per_s"] / min(bounds.values()), 4),
            **bounds,
            **{name: row[name] for name in ("bytes", "prefill_s") if name in row},
        }


# -------------------- decoding


def decoding_rows(sweep: Sweep) -> Iterator[dict]:
    """Yield a row for each storage and point."""
    cfg = sweep.cfg
    longest = max(numbers("contexts", cfg.contexts)) + cfg.new_tokens
    models = {name: storing_model(sweep, longest, name) for name in STORAGES}
    vocab_size = sweep.shape.vocab_size
    for point in sweep.points():
        if not sweep.in_time(f"decoding, B{point[0]} T{point[1]}"):
            return
        asked = BenchConfig(
            what="generate",
            batch_size=point[0],
            new_tokens=cfg.new_tokens,
            prefill_tokens=cfg.prefill_tokens,
        )
        idx = torch.randint(0, vocab_size, point, device=sweep.device)
        runs = decoded(asked, models, idx)
        for name in models:
            row = {"impl": name} | figures(asked, runs, name)
            # the room for new tokens is not read
            read = row["bytes"] - point[0] * cfg.new_tokens * sweep.token_bytes
            work = decode_work(sweep.shape, point[0], read, sweep.dtype.itemsize)
            yield sweep.row("decode", point, row, work)
        del runs  # or its caches lie beside those of the next point


def storing_model(sweep: Sweep, longest: int, name: str) -> Transformer:
    """Return a model of random weights that stores as STORAGES says, of contexts up to longest."""
    shape = replace(sweep.shape, block_size=longest)
    model = random_model(shape, sweep.device, dtype_name(sweep.dtype))
    kv, select = STORAGES[name]
    return model if kv.kv == "dense" else store_by(model, kv, select)


def attention_rows(sweep: Sweep) -> Iterator[dict]:
    """Yield rows of attention alone, ours and the fastest of PyTorch's, times the model's
    layers."""
    cfg = sweep.cfg
    shape = sweep.shape
    for n_tokens in numbers("contexts", cfg.contexts):
        point = (cfg.attention_batch, n_tokens)
        if not sweep.in_time(f"attention alone, B{point[0]} T{n_tokens}"):
            return
        asked = BenchConfig(
            what="decode",
            cases=CASES,
            steps=ROUNDS,
            batch_size=point[0],
            device=cfg.device,
            dtype=cfg.dtype,
        )
        for row in bench_decode(asked, replace(shape, block_size=n_tokens)):
            ours = row["impl"].startswith(("packed", "ours"))
            if not ours and row["impl"] != row["peer"]:
                continue
            ms = round(row["ms"] * shape.n_layer, 4)
            row |= {"ms": ms, "tokens_per_s": round(1e3 * point[0] / ms, 1)}
            if not ours:
                row["impl"] = FASTEST
            work = attention_work(shape, row["bytes"] * shape.n_layer, sweep.dtype.itemsize)
            peer = {"peer": row["peer"], "ratio": row["ratio"]}
            yield sweep.row("attention", point, row, work) | peer


# -------------------- training


def training_rows(sweep: Sweep) -> Iterator[dict]:
    """Yield a row for each case and batch, on a GPU as one CUDA graph."""
    cfg = sweep.cfg
    for batch_size in numbers("train_batches", cfg.train_batches):
        point = (batch_size, sweep.shape.block_size)
        work = lora_work(sweep.shape, *point, sweep.dtype.itemsize)
        for name in TRAINED:
            if not sweep.in_time(f"training, {name}, B{batch_size}"):
                return
            asked = step.StepConfig(
                batch_size=batch_size, steps=cfg.steps, device=cfg.device, dtype=cfg.dtype
            )
            capture = sweep.device.type == "cuda"
            row = step.measured(asked, sweep.shape, name, capture) | {"impl": name}
            yield sweep.row("training", point, row, work)


# -------------------- others' code


def other_rows(sweep: Sweep) -> Iterator[dict]:
    """Yield rows of PEFT's LoRA and of transformers' generate."""
    cfg = sweep.cfg
    if not cfg.peers or not sweep.in_time("peers"):
        return
    n_tokens = sweep.shape.block_size
    batches = numbers("train_batches", cfg.train_batches)
    longest = max(numbers("contexts", cfg.contexts)) + cfg.new_tokens
    rows = rows_of_peers(
        replace(sweep.shape, block_size=longest),
        sweep.device,
        dtype_name(sweep.dtype),
        lora=[[b, n_tokens, cfg.steps, False] for b in batches],
        generate=[[*point, PEER_TOKENS] for point in sweep.points()],
    )
    itemsize = sweep.dtype.itemsize
    for row in rows:
        point = (row["batch_size"], row["n_tokens"])
        if row["name"] == "LoRA":
            yield sweep.row("training", point, row, lora_work(sweep.shape, *point, itemsize))
            continue
        dense = point[0] * point[1] * sweep.token_bytes
        work = decode_work(sweep.shape, point[0], dense, itemsize)
        yield sweep.row("decode", point, row, work)


def with_ratios(rows: list[dict]) -> list[dict]:
    """Return the rows with their times over those of a peer at the same point."""
    by_point = {(r["task"], r["shape"], r["impl"]): r for r in rows}
    out = []
    for r in rows:
        for name in PEER_OF.get(r["task"], ()):
            peer = by_point.get((r["task"], r["shape"], name))
            if peer is not None:
                r = r | {"peer": name, "ratio": round(r["ms"] / peer["ms"], 4)}
                break
        out.append(r)
    return out


def sweep_of(cfg: SpeedConfig, shape: ModelConfig, began: float) -> Sweep:
    """Measure the machine, for a sweep that begins."""
    device = pick_device(cfg.device)
    dtype = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    return Sweep(cfg, shape, device, dtype, machine_of(device, dtype), began)


def measured(sweep: Sweep) -> list[dict]:
    """Measure all, print every row as it is made, and return them. What fails is left out, with a
    line that says so: a sweep is not lost for one peer."""
    rows = []
    for part in (decoding_rows, training_rows, attention_rows, other_rows):
        try:
            for row in part(sweep):
                print(json.dumps(row), flush=True)
                rows.append(row)
        except (AssertionError, RuntimeError, ValueError) as error:
            print(f"left out, {part.__name__}: {one_line(error)}", file=sys.stderr)
        gc.collect()
        if sweep.device.type == "cuda":
            torch.cuda.empty_cache()
    return with_ratios(rows)


def main() -> None:
    """Measure, leave the rows and draw them."""
    began = time.time()
    cfg: SpeedConfig = ARGS.speed
    if cfg.peers:
        step.check_packages()
    sweep = sweep_of(cfg, ARGS.model, began)
    rows = measured(sweep)
    late = f"nothing was measured in {cfg.most_seconds:g} s"
    check(bool(rows), "no rows", late, "give a longer --most_seconds, or mend what was left out")
    folder = Path(cfg.results)
    leave_rows(folder, rows, device_name(sweep.device), began)
    speed_figure(folder, rows)


if __name__ == "__main__":
    exit_on_bad_input(main)
