"""What a parked cache takes: bytes beside those in memory, and the time to put it away and to get
it back, beside that of reading the prompt anew.

    python -m benchmarks.park --init_from=model.gguf --dataset=text:PATH --results=out/x

Prompts are windows of a text. Every way to store is a row of medians over them, printed and left in
RESULTS/results.json. What comes back is compared bit by bit with what was put away.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from cli import exit_on_bad_input, parse_args, print_rows
from config import KVConfig, SelectConfig, check
from settings.base import BaseConfig
from settings.fields import check_fields, opt
from settings.places import check_inputs


@dataclass(frozen=True)
class ParkConfig:
    """What is measured."""

    dataset: str = opt("pydocs", "text of which the prompts are windows")
    calibrate: str = opt("pydocs,dialogue", "corpora that a way to store is calibrated on")
    calibration: int = opt(4, "sequences of at most 512 tokens for that", least=1)
    block_size: int = opt(2048, "tokens of a prompt", least=32)
    sequences: int = opt(5, "prompts", least=1)
    results: str = opt("out/park", "folder that results.json is left in")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    data_dir: str = opt("", "where token files are kept; empty: the user's cache folder")

    def __post_init__(self):
        check_fields(self)


CONFIGS = {"park": ParkConfig, "base": BaseConfig}
if __name__ == "__main__":
    ARGS = parse_args(CONFIGS, description=__doc__)
    exit_on_bad_input(lambda: check_inputs(ARGS, "init_from"))

import zlib

import torch

import kv_router
from benchmarks.common import dtype_name, leave_rows, shape_name
from data import TokenFile, content_hash, label_of, prepare_splits
from generate import prefill
from loaders.compress import CALIBRATION_TOKENS, windows_of
from loaders.device import device_name, pick_device
from loaders.runs import Run, attach_storage, load_run
from model import evaluating
from settings.train import DataConfig
from storage.cache import KVCache
from storage.parked import bytes_of, park, unpark
from storage.saved import fingerprint, tensors_of

WEIGHTS = "bfloat16"


class Way(NamedTuple):
    """A way to store."""

    name: str
    kv: KVConfig
    select: SelectConfig = SelectConfig()


def routed(share: float) -> Way:
    """Routed bits, chosen by what a prompt's last tokens attend to: nothing is trained."""
    kv = KVConfig(kv="select", kv_tail=16)
    select = SelectConfig(relevance="observed", kv_bytes=share)
    return Way(f"routed bits, {100 * share:g} % of the bytes", kv, select)


WAYS = (
    Way("dense, 16 bits", KVConfig(kv="dense")),
    Way("8 of 16 value groups", KVConfig(n_groups=16, topk_groups=8)),
    Way("integers of 4 bits", KVConfig(topk_groups=4, key_bits=4, value_bits=4)),
    routed(0.125),
    routed(0.0625),
)


class Figures(NamedTuple):
    """What one prompt's cache took."""

    bytes: int  # in memory
    parked_bytes: int
    deflated_bytes: int  # the same tensors by DEFLATE, level 6
    park_ms: float
    unpark_ms: float
    deflate_ms: float
    prefill_ms: float


def main() -> None:
    """Measure every way to store, print the rows and leave them."""
    began = time.time()
    cfg: ParkConfig = ARGS.park
    rows = [row_of(cfg, ARGS.base, way) for way in WAYS]
    device = device_name(pick_device(cfg.device))
    leave_rows(Path(cfg.results), rows, device, began)
    print_rows(rows, True)


def row_of(cfg: ParkConfig, base: BaseConfig, way: Way) -> dict:
    """Return the row of one way to store: medians over the prompts."""
    device = pick_device(cfg.device)
    options = {**base.options(""), "weights": WEIGHTS}
    run = load_run(base.place(""), device, **options)
    if way.kv.kv != "dense":
        text = tokens_of(cfg, run, cfg.calibrate)
        seen = windows_of(text, run, 0, cfg.calibration, CALIBRATION_TOKENS, at_once=2)
        kv_router.fold(attach_storage(run.model, way.kv, way.select, seen))
    text = tokens_of(cfg, run, cfg.dataset)
    sha256 = content_hash(cfg.dataset, DataConfig())
    prompts = windows_of(text, run, 0, cfg.sequences, cfg.block_size, at_once=1)
    with evaluating(run.model):
        measured(run, prompts[0])  # what a first call takes longer is not the cache's
        figures = [measured(run, prompt) for prompt in prompts]
    middle = Figures(*(median(column) for column in zip(*figures, strict=True)))
    start = time.perf_counter()
    fingerprint(run.model)
    return {
        "name": "park",
        "impl": way.name,
        "peer": "the cache in memory",
        "shape": shape_name(1, cfg.block_size, run.model.cfg),
        "dtype": dtype_name(run.model.norm.weight.dtype),
        "text": {"corpus": label_of(cfg.dataset), "sha256": sha256},
        "prompts": len(prompts),
        **middle._asdict(),
        "ratio": middle.parked_bytes / middle.bytes,
        "deflated": middle.deflated_bytes / middle.bytes,
        "fingerprint_ms": 1e3 * (time.perf_counter() - start),
        "device": device_name(device),
    }


def tokens_of(cfg: ParkConfig, run: Run, corpus: str) -> TokenFile:
    """Return the tokens of a corpus, less its part for validation."""
    data = DataConfig(data_dir=cfg.data_dir)
    (text,) = prepare_splits(corpus, data, run.tokenizer, ["train"])
    return text


def measured(run: Run, prompt: torch.Tensor) -> Figures:
    """Read a prompt (1, T), put its cache away and get it back. ValueError where that is another
    one."""
    start = time.perf_counter()
    _, cache = prefill(run.model, prompt, prompt.size(1))
    cache.fit(0)
    held = cache.nbytes()
    filled = time.perf_counter()
    data = park(cache)
    parked = time.perf_counter()
    back = unpark(data, run.model).cache
    done = time.perf_counter()
    raw = all_bytes(cache)
    check(all_bytes(back) == raw, "another cache", "equal bits", "mend storage/parked.py")
    begun = time.perf_counter()
    deflated = len(zlib.compress(raw))
    return Figures(
        bytes=held,
        parked_bytes=len(data),
        deflated_bytes=deflated,
        park_ms=1e3 * (parked - filled),
        unpark_ms=1e3 * (done - parked),
        deflate_ms=1e3 * (time.perf_counter() - begun),
        prefill_ms=1e3 * (filled - start),
    )


def all_bytes(cache: KVCache) -> bytes:
    """Return the bytes of all tensors, one after the other."""
    return b"".join(bytes_of(t).numpy().tobytes() for t in tensors_of(cache).values())


if __name__ == "__main__":
    exit_on_bad_input(main)
