"""A prompt's prefill with selection, and choosing alone, against the dense prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

import selector
from benchmarks.common import interleaved, random_batches, shape_name
from config import KVConfig, ModelConfig, SelectConfig
from loaders.device import autocast, check_weights, device_name, pick_device, place
from loaders.runs import load_run
from measure_config import BenchConfig
from model import Transformer, evaluating
from selection.calibration import see_layers
from selection.relevance import Prompt
from settings.base import BaseConfig
from settings.fields import check


def bench_select(cfg: BenchConfig, c: ModelConfig, base: BaseConfig) -> list[dict]:
    """Return the rows of `select`: a dense prefill, one with selection, and choosing alone, of the
    same prompts, with their ratios to the dense prefill."""
    device = pick_device(cfg.device)
    torch.manual_seed(0)
    check_weights(base.weights, device, cfg.dtype)
    model = selecting_model(cfg, c, base, device)
    T = min(c.block_size, model.cfg.block_size)
    dense = Transformer(model.cfg)  # a prefill costs the same with any weights
    place(dense, device, model.norm.weight.dtype)
    if selector.selector_of(model) is None:
        kv = KVConfig(kv="select", n_groups=4, kv_tail=16)
        selector.attach(model, kv, SelectConfig(kv_keep=0.25))
    batches = random_batches(model.cfg.vocab_size, cfg.batch_size, T, device)
    choose, chosen = timed_choice(model, T)
    with evaluating(model), evaluating(dense), autocast(device, cfg.dtype):
        steps = {"dense": prefill_step(dense), "select": prefill_step(model), "choose": choose}
        times = interleaved(steps, batches, cfg.steps)
    # The choice alone, without the pass that showed it the prompt, nor the unmeasured rounds.
    times["choose"] = chosen[2:]
    shape = shape_name(cfg.batch_size, T, model.cfg)
    ms = {name: median(t) for name, t in times.items()}
    rule = model.selector.cfg.described()
    return [
        {
            "name": "prefill",
            "impl": name if name == "dense" else f"{name}: {rule}",
            "peer": "dense",
            "shape": shape,
            "dtype": cfg.dtype,
            "ms": round(ms[name], 3),
            "ratio": round(ms[name] / ms["dense"], 4),
            "tokens_per_s": round(1e3 * cfg.batch_size * T / ms[name]),
            "device": device_name(device),
        }
        for name in ms
    ]


def selecting_model(
    cfg: BenchConfig, c: ModelConfig, base: BaseConfig, device: torch.device
) -> Transformer:
    """Load the run or base that is named, else make a model of random weights."""
    if not cfg.out_dir and base.init_from == "scratch":
        return Transformer(c).to(device)
    run = load_run(base.place(cfg.out_dir), device, **base.options(cfg.out_dir))
    check(
        run.kv.kv in ("dense", "select") and run.adapter.adapter == "none",
        f"{cfg.out_dir or base.init_from}",
        "a base or a run of --stage=select is measured",
        "give one of those",
    )
    return run.model


def prefill_step(model: Transformer) -> Callable:
    """Return a function that processes a prompt and waits for the device."""

    def step(x, y):
        model.prefill(x, model.new_cache(*x.shape)).sum().item()

    return step


def timed_choice(model: Transformer, T: int) -> tuple[Callable, list[float]]:
    """Return (a function that chooses from a prompt of T tokens, the list of the milliseconds that
    its choices alone will have taken)."""
    s = model.selector
    n_context = T - s.kv.kv_tail
    check(
        n_context >= 1,
        f"block_size={T}",
        f"the query region has {s.kv.kv_tail}",
        "give a larger --block_size",
    )
    chosen: list[float] = []

    def choose(x, y):
        hidden, q, k, z = see_layers(s, model, x)
        context = tuple(t[:, :, :n_context] for t in z)
        prompt = Prompt(hidden, q, k, context, n_context, None, s.rope, n_groups=s.S)
        z[-1].sum().item()  # waits for the device
        start = time.perf_counter()
        s.choose(prompt).keep.sum().item()
        chosen.append(1e3 * (time.perf_counter() - start))

    return choose, chosen
