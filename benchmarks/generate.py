"""Tokens per second of whole models, packed and dense: decoding after prompts, as CUDA graphs in
turns, and token by token without them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

import kv_router
from benchmarks.common import dtype_name, random_model, shape_name, wait_for
from benchmarks.parts import prefill_parts
from config import KVConfig, ModelConfig, SelectConfig
from generate import DecodeGraph, prefill
from loaders.device import device_name, in_bfloat16, pick_device
from loaders.runs import attach_storage, load_run
from measure_config import BenchConfig
from model import Transformer, evaluating
from settings.base import BaseConfig
from settings.fields import check
from storage.cache import KVCache

CALIBRATION_SHAPE = (2, 256)  # random ids that a model without a run is calibrated on, at most
TURNS = 8  # parts that the timed tokens are cut into
EAGER_WARM = 2  # tokens without a graph before those that are timed: the first ones compile
EAGER_TIMED = 5
SPARE = 1 + EAGER_WARM + EAGER_TIMED  # tokens of new_tokens left for those without a graph


def bench_generate(
    cfg: BenchConfig, c: ModelConfig, base: BaseConfig, kv: KVConfig, select: SelectConfig
) -> list[dict]:
    """Return the rows of `generate`: decoding after prompts of block_size - new_tokens tokens,
    packed by --kv and dense."""
    device = pick_device(cfg.device)
    check(
        device.type == "cuda",
        f"generate on {device.type}",
        "CUDA graphs are measured",
        "run it on a GPU",
    )
    check(
        cfg.new_tokens > 2 * DecodeGraph.WARM + cfg.steps,
        f"new_tokens={cfg.new_tokens} with steps={cfg.steps}",
        "too few to time",
        "give more",
    )
    weights = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    packed, dense = both_models(cfg, c, base, kv, select)
    m = packed.cfg
    longest = min(c.block_size, m.block_size) if c.block_size > cfg.new_tokens else m.block_size
    T = longest - cfg.new_tokens
    torch.manual_seed(0)
    idx = torch.randint(0, m.vocab_size, (cfg.batch_size, T), device=device)
    runs = decoded(cfg, {"packed": packed, "dense": dense}, idx)
    for run in runs.values():
        time_eager(run, cfg.batch_size)
    about = {
        "name": "generate",
        "peer": "dense",
        "dtype": dtype_name(weights),
        "device": device_name(device),
        "shape": shape_name(cfg.batch_size, T, m),
    }
    parts = []
    if cfg.parts:
        sizes = (idx.size(1) + cfg.new_tokens, cfg.prefill_tokens)
        parts = prefill_parts({"dense": dense, "packed": packed}, idx, *sizes)
    impl = {"packed": f"packed {cfg.out_dir or kept_name(kv, select)}", "dense": "dense"}
    rows = [{**about, "impl": impl[name], **figures(cfg, runs, name)} for name in runs]
    return rows + [about | row | {"name": "prefill"} for row in parts]


# -------------------- models


def both_models(
    cfg: BenchConfig, c: ModelConfig, base: BaseConfig, kv: KVConfig, select: SelectConfig
) -> tuple[Transformer, Transformer]:
    """Return (the model that stores by --kv or as its run does, a dense one of its shape)."""
    device = pick_device(cfg.device)
    weights = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    options = {**base.options(cfg.out_dir), "weights": dtype_name(weights)}

    def fresh() -> Transformer:
        if cfg.out_dir or base.init_from != "scratch":
            return load_run(base.place(cfg.out_dir), device, **options).model
        return random_model(c, device, dtype_name(weights)).eval()

    packed = fresh()
    if kv.kv != "dense" and not cfg.out_dir:
        store_by(packed, kv, select)
    if cfg.out_dir:
        # Any weights take the same time.
        return packed, random_model(packed.cfg, device, dtype_name(weights)).eval()
    return packed, fresh()


def store_by(model: Transformer, kv: KVConfig, select: SelectConfig) -> Transformer:
    """Let a model store by settings that are calibrated on random ids, in place: for times, any
    calibration will do. Returns the model."""
    m = model.cfg
    shape = (CALIBRATION_SHAPE[0], min(CALIBRATION_SHAPE[1], m.block_size))
    seen = [torch.randint(0, m.vocab_size, shape, device=model.norm.weight.device)]
    return kv_router.fold(attach_storage(model, kv, select, seen))


def kept_name(kv: KVConfig, select: SelectConfig) -> str:
    """Return what a storage keeps, in words."""
    if kv.kv == "value_groups":
        kept = f"S={kv.n_groups} K={kv.topk_groups} tail={kv.kv_tail}"
    else:
        kept = f"{kv.kv} S={kv.n_groups} {select.described()}"
    if kv.ints:
        kept += f" keys:{kv.key_bits} values:{kv.value_bits}"
    return kept


# -------------------- times


class EagerSteps:
    """Decoding without a graph, as DecodeGraph decodes with one."""

    def __init__(self, model: Transformer, cache: KVCache, idx: Tensor):
        self.model = model
        self.cache = cache
        self.idx = idx

    @torch.no_grad()
    def next(self) -> Tensor:
        """Return the next token of every sequence, (B, 1)."""
        logits = self.model.decode(self.idx, self.cache)
        self.idx = likeliest(logits[:, -1])
        return self.idx


@dataclass
class Decoding:
    """A model after its prompt, ready to decode, and what has been measured of it."""

    model: Transformer
    graph: DecodeGraph | EagerSteps
    measured: dict  # as rows have it: bytes, prefill_s, capture_s, later eager_tokens_per_s
    seconds: list[float] = field(default_factory=list)  # of a token, in each turn


def decoded(cfg: BenchConfig, models: dict[str, Transformer], idx: Tensor) -> dict[str, Decoding]:
    """Process the prompts idx (B, T) with every model, and decode after them in turns."""
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        runs = {name: started(cfg, model, idx, name) for name, model in models.items()}
        time_graphs(runs, cfg.new_tokens - DecodeGraph.WARM - 1 - SPARE)
    return runs


def started(cfg: BenchConfig, model: Transformer, idx: Tensor, name: str) -> Decoding:
    """Process the prompts idx (B, T) and capture the decode step, both timed; on a CPU, which has
    no graphs, the step stays as it is."""
    n_tokens = idx.size(1) + cfg.new_tokens
    device = idx.device
    prefill(model, idx[:1], n_tokens, at_once=cfg.prefill_tokens)  # warm
    wait_for(device)
    start = time.perf_counter()
    logits, cache = prefill(model, idx, n_tokens, at_once=cfg.prefill_tokens)
    wait_for(device)
    prefill_s = time.perf_counter() - start
    first = likeliest(logits)
    if device.type == "cuda":
        check(
            DecodeGraph.possible(model),
            f"{name} storage",
            "it has no kernels to step with",
            "choose another reconstructor",
        )
        graph = DecodeGraph(model, cache, first, likeliest, cfg.new_tokens, cfg.compile)
    else:
        graph = EagerSteps(model, cache, first)
    held = cache.nbytes()
    start = time.perf_counter()
    for _ in range(DecodeGraph.WARM + 1):
        graph.next()
    wait_for(device)
    capture_s = time.perf_counter() - start
    measured = {
        "bytes": held,
        "prefill_s": round(prefill_s, 3),
        "capture_s": round(capture_s, 3),
    }
    return Decoding(model, graph, measured)


def likeliest(logits: Tensor, step: Tensor | None = None) -> Tensor:
    """Pick the next tokens (B, 1) from logits (B, V), the same way at every step."""
    return logits.argmax(-1, keepdim=True)


def time_graphs(runs: dict[str, Decoding], n: int) -> None:
    """Decode n tokens with each, part by part in turns."""
    part = max(1, n // TURNS)
    for done in range(0, n, part):
        count = min(part, n - done)
        for run in runs.values():
            start = time.perf_counter()
            for _ in range(count):
                run.graph.next()
            wait_for(run.graph.idx.device)
            run.seconds.append((time.perf_counter() - start) / count)


def time_eager(run: Decoding, batch_size: int) -> None:
    """Decode a few tokens without graphs: launches and all."""
    steps = EagerSteps(run.model, run.graph.cache, run.graph.idx)
    with evaluating(run.model):
        for _ in range(EAGER_WARM):
            steps.next()
        wait_for(steps.idx.device)
        start = time.perf_counter()
        for _ in range(EAGER_TIMED):
            steps.next()
        wait_for(steps.idx.device)
    rate = EAGER_TIMED * batch_size / (time.perf_counter() - start)
    run.measured["eager_tokens_per_s"] = round(rate, 1)


def figures(cfg: BenchConfig, runs: dict[str, Decoding], name: str) -> dict:
    """Return the numbers of a row."""
    run = runs[name]
    dense = runs["dense"]
    seconds = median(run.seconds)
    return {
        "ms": round(1e3 * seconds, 4),
        "ratio": round(seconds / median(dense.seconds), 4),
        "tokens_per_s": round(cfg.batch_size / seconds, 1),
        "bytes_of_dense": round(run.measured["bytes"] / dense.measured["bytes"], 4),
        "compiled": cfg.compile,
        **run.measured,
    }
