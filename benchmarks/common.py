"""What the comparisons share: times taken in turns, and what a row says of its shape."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from config import ModelConfig
from loaders import checkpoint
from loaders.device import place
from model import Transformer
from report.made import write_record
from settings.fields import check
from storage.layout import cdiv

PLAIN_ROUNDS = 3  # rounds of entries that wait for the host
PEERS = Path(__file__).with_name("peers.py")
LEAST_CALLS = 8  # calls that are timed together, so that a graph's own launch does not count


def leave_rows(folder: Path, rows: list[dict], device: str, began: float, args=None) -> None:
    """Leave results.json, and made.json beside it, in a folder that is made if need be. args: the
    program's settings by group, whose texts are recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "results.json", rows)
    write_record(folder, device, began, args)


def random_model(shape: ModelConfig, device: torch.device, weights: str) -> Transformer:
    """Return a model of random weights, made on the device, the same in every process."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(shape)
    return place(model, device, getattr(torch, weights))


def rows_of_peers(
    shape: ModelConfig, device: torch.device, dtype: str, **cases: list[list]
) -> list[dict]:
    """Return rows of other projects' code, measured by a process of its own. ValueError where it
    fails. cases: `lora` and `generate` of benchmarks/peers.py."""
    computed = "bfloat16" if dtype == "auto" else dtype
    asked = asdict(shape) | dict(device=str(device), dtype=computed) | cases
    command = [sys.executable, "-P", str(PEERS), json.dumps(asked)]
    job = subprocess.run(command, capture_output=True, text=True)
    said = job.stderr.strip().splitlines()
    check(
        job.returncode == 0,
        "peers",
        said[-1] if said else f"exit code {job.returncode}",
        "leave the peers out",
    )
    return [json.loads(line) for line in job.stdout.splitlines() if line.startswith("{")]


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that were given out on a GPU; a CPU tells none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the largest relative difference of losses from others, step by step."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def in_turns(
    calls: dict[str, list[Callable]], rounds: int, device: torch.device, plain: tuple[str, ...] = ()
) -> dict[str, float]:
    """Return the median milliseconds of one call of each entry, taken in turns.

    An entry is a list of calls on different data. On a GPU a list is one CUDA graph, so that
    launches cost what they cost in decoding; entries named in `plain` wait for the host, so they
    run as they are, and only in PLAIN_ROUNDS rounds."""
    runs = {}
    for name, fs in calls.items():
        runs[name] = warmed(fs, captured=device.type == "cuda" and name not in plain)
    times = {name: [] for name in calls}
    for i in range(rounds):
        for name, run in runs.items():
            if name in plain and i >= PLAIN_ROUNDS:
                continue
            n = len(calls[name])
            repeats = 1 if name in plain else cdiv(LEAST_CALLS, n)
            ms = milliseconds(run, repeats, device)
            times[name].append(ms / n / repeats)
    return {name: median(ms) for name, ms in times.items()}


def warmed(calls: list[Callable], captured: bool) -> Callable:
    """Return a function that makes all the calls and has run before; captured: as a CUDA graph."""

    def run() -> None:
        # All results live until the last call is done, so that each one writes its own memory.
        results = [call() for call in calls]
        del results

    run()
    if not captured:
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def milliseconds(run: Callable, repeats: int, device: torch.device) -> float:
    """Return the time of `repeats` runs in a row, by the device's own clock on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - start)
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def interleaved(
    steps: dict, batches: list[tuple[Tensor, Tensor]], n: int
) -> dict[str, list[float]]:
    """Return the milliseconds of n calls of every step function, taken in turns; two unmeasured
    rounds come first."""
    times = {name: [] for name in steps}
    for i in range(n + 2):
        x, y = batches[i % len(batches)]
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def random_batches(
    vocab_size: int, batch_size: int, T: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Draw four batches of ids and targets, each (batch_size, T) int64."""
    shape = (2, batch_size, T)
    return [tuple(torch.randint(0, vocab_size, shape, device=device)) for _ in range(4)]


def shape_name(batch_size: int, T: int, c: ModelConfig) -> str:
    """Return the shape of a model and its batch in a few letters."""
    return f"B{batch_size} T{T} L{c.n_layer} d{c.n_embd} H{c.n_head}/{c.n_kv_head} D{c.head_dim}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module."""
    return str(dtype).split(".")[1]
