"""Speed as a ratio: this project's code and a peer, interleaved in one run, same shape, batch and
dtype, medians.

`train`: a pretraining step of model.py against a plain loop. `adapter`: an adaptation step of
routed subspace LoRA against plain LoRA. `select`: a prompt's prefill with selection, and choosing
alone, against the dense prefill. `decode`: attention of one new token over one layer's cache.
`memory`: the bytes of such caches, and how many fit. `generate`: tokens per second of whole models.
benchmarks/ has a file for each.

With --json, and where stdout is no terminal, it ends with one line of JSON, a list of rows: name,
impl, peer, shape, dtype, ms, ratio (ours / peer), device, and tokens_per_s or bytes and gb_per_s.
--results=DIR leaves them there, too, as results.json, with made.json, which says how they were
made.

    python bench.py train
    python bench.py adapter
    python bench.py select --out_dir=out/SELECT --block_size=2048
    python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=32768
    python bench.py memory --n_kv_head=8 --head_dim=128 --block_size=8192
    python bench.py generate --init_from=model.gguf --block_size=2560 --batch_size=1 \\
        --kv=value_groups --n_groups=16 --topk_groups=8 --compile
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import argparse
import sys
import time
from pathlib import Path

from cli import exit_on_bad_input, parse_args, print_rows
from config import KVConfig, ModelConfig, SelectConfig
from measure_config import BenchConfig, check_bench_flags
from settings.base import BaseConfig
from settings.places import check_inputs
from settings.storing import take_kind

CONFIGS = {
    "bench": BenchConfig,
    "model": ModelConfig,
    "base": BaseConfig,
    "kv": KVConfig,
    "select": SelectConfig,
}


def flags(argv: list[str]) -> list[str]:
    """Return the arguments with the comparison, where it comes first and bare, as a flag."""
    if argv and not argv[0].startswith("-"):
        return [f"--what={argv[0]}", *argv[1:]]
    return argv


if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, flags(sys.argv[1:]), description=__doc__)
    exit_on_bad_input(lambda: take_kind(ARGS))
    exit_on_bad_input(lambda: check_bench_flags(ARGS))
    exit_on_bad_input(lambda: check_inputs(ARGS, "init_from", "out_dir"))

from benchmarks.adapter import bench_adapter
from benchmarks.common import leave_rows
from benchmarks.decode import bench_decode
from benchmarks.generate import bench_generate
from benchmarks.memory import bench_memory
from benchmarks.select import bench_select
from benchmarks.train import bench_train
from loaders.device import device_name, pick_device


def measure(args: argparse.Namespace) -> list[dict]:
    """Return the rows of the comparison that was asked for."""
    cfg: BenchConfig = args.bench
    if cfg.what == "train":
        return bench_train(cfg, args.model)
    if cfg.what == "adapter":
        return bench_adapter(cfg, args.model)
    if cfg.what == "select":
        return bench_select(cfg, args.model, args.base)
    if cfg.what == "decode":
        return bench_decode(cfg, args.model)
    if cfg.what == "memory":
        return bench_memory(cfg, args.model)
    return bench_generate(cfg, args.model, args.base, args.kv, args.select)


def line_of(row: dict) -> str:
    """Return a row as a line of the table."""
    took = f"{row['ms']:9.3f} ms" if "ms" in row else fitting(row)
    amount = f"{row['bytes']:>15,} bytes" if "bytes" in row else ""
    if "tokens_per_s" in row:
        amount = f"{row['tokens_per_s']:>9,} tokens/s"
    what = f"{row['name']:14s} {row['impl']:30s}"
    return f"{what} {took}  {amount}  {row['ratio']:.3f} of {row['peer']}"


def fitting(row: dict) -> str:
    """Return how many sequences fit, where that is what was measured."""
    return f"{row['sequences']:5d} fit, {row['times_more']:.2f} times dense"


def main() -> None:
    """Measure, print the rows, and leave them where --results says."""
    began = time.time()
    cfg: BenchConfig = ARGS.bench
    take_kind(ARGS)
    check_bench_flags(ARGS)
    check_inputs(ARGS, "init_from", "out_dir")
    rows = measure(ARGS)
    for row in rows:
        print(line_of(row), file=sys.stderr)
    if cfg.results:
        leave_rows(Path(cfg.results), rows, device_name(pick_device(cfg.device)), began)
    print_rows(rows, cfg.json)


if __name__ == "__main__":
    exit_on_bad_input(main)
