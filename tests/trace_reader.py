"""What a reader opens who follows one token through a layer: the changes of file between the calls
that run while a path reads and stores, one layer, a prompt of 20 tokens and 2 new ones.

    python tests/trace_reader.py            # the numbers
    python tests/trace_reader.py --files    # and which functions of which files, in turn

Counted are calls of the project's own functions from the path's verb on, generated code left out.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import kv_router
import selector
from config import KVConfig, ModelConfig, SelectConfig
from model import Transformer, evaluating

SMALL = ModelConfig(
    vocab_size=50,
    block_size=64,
    n_layer=1,
    n_embd=32,
    n_head=4,
    n_kv_head=2,
    head_dim=16,
    n_inner=32,
)


class Call(NamedTuple):
    """A call of one of the project's functions."""

    file: str
    function: str


def value_groups() -> Transformer:
    """A model of one layer that stores value groups as train.py does."""
    model = Transformer(SMALL)
    kv_router.attach(model, KVConfig(kv="value_groups"), [torch.randint(0, 50, (2, 40))])
    return kv_router.fold(model)


def selection() -> Transformer:
    """A model of one layer that selects from a prompt, the last 16 tokens of which ask."""
    model = Transformer(SMALL)
    kv = KVConfig(kv="select", kv_tail=16)
    batches = [torch.randint(0, 50, (2, 40))]
    selector.attach(model, kv, SelectConfig(kv_keep=0.5), batches)
    return kv_router.fold(model)


def calls_of_path(model: Transformer) -> list[Call]:
    """Run a prompt of 20 tokens and two steps; list what the path calls, itself included."""
    idx = torch.randint(0, SMALL.vocab_size, (1, 22))
    path_file = sys.modules[type(model.layers[0].self_attn.kv_path).__module__].__file__
    calls: list[Call] = []
    depth = 0  # of calls since the path's verb; 0: outside

    def profile(frame, event: str, arg) -> None:
        nonlocal depth
        if event not in ("call", "return"):
            return
        code = frame.f_code
        begins = code.co_filename == path_file and code.co_name in ("prefill", "decode")
        if event == "return":
            depth -= depth > 0
        elif depth or begins:
            depth += 1
            file = Path(code.co_filename)
            if file.is_relative_to(ROOT) and not code.co_name.startswith("<"):
                calls.append(Call(str(file.relative_to(ROOT)), code.co_name))

    cache = model.new_cache(batch=1, max_len=24)
    with evaluating(model):
        sys.setprofile(profile)
        try:
            model.prefill(idx[:, :20], cache)
            model.decode(idx[:, 20:21], cache)
            model.decode(idx[:, 21:22], cache)
        finally:
            sys.setprofile(None)
    return calls


def by_file(calls: list[Call]) -> list[tuple[str, list[str]]]:
    """Join neighbouring calls in one file."""
    runs = groupby(calls, key=lambda call: call.file)
    return [(file, [call.function for call in run]) for file, run in runs]


def main() -> None:
    torch.manual_seed(0)
    for name, make in (("value groups", value_groups), ("selection", selection)):
        runs = by_file(calls_of_path(make()))
        print(f"{name}: {len(runs) - 1} changes of file")
        if "--files" in sys.argv:
            for file, functions in runs:
                print(f"  {file}: {' '.join(functions)}")


if __name__ == "__main__":
    main()
