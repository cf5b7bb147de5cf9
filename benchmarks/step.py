"""A step of train.py as one CUDA graph, and kernel by kernel: milliseconds, tokens per second, peak
memory, the time until the first loss, and whether their losses agree; of adapters and pretraining.
--peers: PEFT's LoRA beside them, eager and compiled (pip install peft transformers).

    python -m benchmarks.step --vocab_size=49152 --n_layer=30 --n_embd=576 --n_head=9 \\
        --n_kv_head=3 --head_dim=64 --n_inner=1536 --block_size=512 --results=out/steps

Text is random walks over the vocabulary, weights are random. Every measurement is a row, printed
as it is made, its ratio to the same case kernel by kernel; all are left in RESULTS/results.json.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import gc
import json
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

from cli import exit_on_bad_input, parse_args
from config import KVConfig, ModelConfig
from settings.adapters import AdapterConfig
from settings.fields import DTYPES, check, check_fields, comma_list, opt
from settings.train import TrainConfig


@dataclass(frozen=True)
class StepConfig:
    """What is measured."""

    results: str = opt("out/steps", "folder of results.json")
    cases: str = opt("", "the cases measured, a list (empty: all)")
    batch_size: int = opt(8, "sequences in a step", least=1)
    steps: int = opt(24, "steps of each measurement; the first quarter is not counted", least=4)
    accumulation: int = opt(1, "micro-steps of a step", least=1)
    compile: bool = opt(False, "torch.compile the model")
    peers: bool = opt(False, "PEFT's LoRA, too; needs the case LoRA")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", DTYPES)

    def __post_init__(self):
        check_fields(self)
        check(
            not self.peers or self.accumulation == 1,
            f"peers with accumulation={self.accumulation}",
            "peers take whole steps",
            "leave one of them out",
        )


CONFIGS = {"step": StepConfig, "model": ModelConfig}
if __name__ == "__main__":
    ARGS = parse_args(CONFIGS, description=__doc__)

import numpy as np
import torch

import kv_router
import lora
from benchmarks.common import (
    largest_difference,
    leave_rows,
    peak_memory,
    random_model,
    rows_of_peers,
)
from data import Corpus
from loaders.device import device_name, pick_device
from training.loop import Trainer
from training.stage import Stage
from training.world import World

ADAPTED = dict(r=8, alpha=16.0, lora_dropout=0.05)
SUBSPACES = dict(adapter="routed", r=2, alpha=4.0, subspaces=8, subspace_topk=4)
DENSE = KVConfig(kv="dense")
LEARNED = KVConfig(n_groups=16, topk_groups=8, kv_tail=16, learn_basis=True)


class Case(NamedTuple):
    """What is trained: an adapter (none: all weights), over which values, on weights of a dtype."""

    adapter: AdapterConfig
    kv: KVConfig = DENSE
    weights: str = "float32"


LORA = AdapterConfig(adapter="lora", **ADAPTED)
CASES = {
    "LoRA": Case(LORA),
    "LoRA on bfloat16 weights": Case(LORA, weights="bfloat16"),
    "routed LoRA": Case(AdapterConfig(**SUBSPACES)),
    "routed LoRA over value groups": Case(AdapterConfig(**SUBSPACES), LEARNED),
    "pretraining": Case(AdapterConfig(adapter="none")),
}


class LoggedTrainer(Trainer):
    """Keeps what a Trainer logs in `rows`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rows: list[dict] = []

    def log(self, **entry) -> None:
        self.rows.append(entry)


def stage_of(
    case: Case, shape: ModelConfig, *, batch_size: int, steps: int, device, name: str = "bench"
) -> Stage:
    """Return a stage that trains a case on random walks over the vocabulary, and writes nothing."""
    rng = np.random.default_rng(0)
    walk = (rng.integers(0, 8, 400_000).cumsum() % shape.vocab_size).astype(np.int64)
    model = random_model(shape, device, case.weights)
    if case.kv.kv != "dense":
        idx = torch.from_numpy(walk[: 8 * shape.block_size]).view(8, -1).to(device)
        kv_router.attach(model, case.kv, [idx])
    pretrains = case.adapter.adapter == "none"
    if not pretrains:
        lora.attach(model, case.adapter)
        kv_router.trainable(model)  # attach froze all that was there
    return Stage(
        kind="pretrain" if pretrains else "adapt",
        name=name,
        folder=None,
        model=model,
        params=[p for p in model.parameters() if p.requires_grad],
        tokenizer=None,
        corpus=Corpus(walk, walk),
        window=shape.block_size,
        steps=steps,
        batch_size=batch_size,
        lr=3e-4,
        seed=0,
        kv=case.kv,
        adapter=case.adapter,
    )


def measured(cfg: StepConfig, shape: ModelConfig, name: str, capture: bool) -> dict:
    """Train a case for cfg.steps steps; return its row, losses included."""
    device = pick_device(cfg.device)
    gc.collect()  # the model of the row before
    torch.cuda.empty_cache()
    stage = stage_of(
        CASES[name], shape, batch_size=cfg.batch_size, steps=cfg.steps, device=device, name=name
    )
    asked = TrainConfig(
        stage=stage.kind,
        dtype=cfg.dtype,
        capture=capture,
        compile=cfg.compile,
        accumulation=cfg.accumulation,
    )
    trainer = LoggedTrainer(stage, asked, World(0, 1, device))
    start = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - start
    tokens = cfg.batch_size * shape.block_size
    speeds = [row["tokens_per_s"] for row in trainer.rows]
    speed = median(speeds[cfg.steps // 4 :])
    return {
        "name": name,
        "impl": "CUDA graph" if capture else "kernel by kernel",
        "device": device_name(device),
        "ms": round(1e3 * tokens / speed, 2),
        "tokens_per_s": round(speed),
        "peak_memory_bytes": peak_memory(device),
        "first_step_s": round(tokens / speeds[0], 2),
        "all_steps_s": round(seconds, 2),
        "losses": [row["loss"] for row in trainer.rows],
    }


def peer_rows(cfg: StepConfig, shape: ModelConfig) -> list[dict]:
    """Return rows of PEFT's LoRA, eager and compiled. ValueError where it fails."""
    steps = [[cfg.batch_size, shape.block_size, cfg.steps, compiled] for compiled in (False, True)]
    return rows_of_peers(shape, pick_device(cfg.device), cfg.dtype, lora=steps)


def check_peers(cfg: StepConfig, names: list[str]) -> None:
    """Raise ValueError where peers are asked for and cannot be measured."""
    if not cfg.peers:
        return
    check("LoRA" in names, f"cases={cfg.cases}", "peers train LoRA", "add LoRA")
    check_packages()


def check_packages() -> None:
    """Raise ValueError where a package that peers need is absent."""
    absent = [package for package in ("peft", "transformers") if find_spec(package) is None]
    needed = f"needs {' and '.join(absent)}"
    check(not absent, "peers", needed, "pip install peft transformers")


def main() -> None:
    """Measure every case both ways, print the rows without their losses, and keep all of them."""
    began = time.time()
    cfg: StepConfig = ARGS.step
    device = pick_device(cfg.device)
    check(
        device.type == "cuda", f"device={cfg.device}", "CUDA graphs are measured", "run it on a GPU"
    )
    names = comma_list(cfg.cases) or list(CASES)
    for name in names:
        check(name in CASES, f"cases={name}", f"one of {', '.join(CASES)}", "choose one")
    check_peers(cfg, names)
    rows = []
    plain = {}  # the case kernel by kernel, by its name

    def keep(row: dict) -> None:
        peer = plain[row["name"]]
        row |= {
            "task": row["name"],
            "peer": peer["impl"],
            "ratio": round(row["ms"] / peer["ms"], 4),
        }
        print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
        rows.append(row)

    for name in names:
        graph = measured(cfg, ARGS.model, name, capture=True)
        plain[name] = measured(cfg, ARGS.model, name, capture=False)
        both = (graph["losses"], plain[name]["losses"])
        graph["largest_difference"] = largest_difference(*both)
        keep(graph)
        keep(plain[name])
    if cfg.peers:
        for row in peer_rows(cfg, ARGS.model):
            keep(row)
    leave_rows(Path(cfg.results), rows, device_name(device), began)


if __name__ == "__main__":
    exit_on_bad_input(main)
