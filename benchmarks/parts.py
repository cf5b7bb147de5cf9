"""What a prefill that selects spends its time on, part by part: milliseconds, on a GPU between two
events on its stream, so that waiting for the host counts where it happens.

A part that lies within another is taken off it. Parts are functions, timed by standing in for them
where they are called. That takes time itself, so the whole is timed in passes of its own, and its
parts need not add up to it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

import generate
import selector
from model import Transformer, evaluating
from selection import budgets
from selection.relevance import Prompt
from storage.cache import KVCache
from storage.integers import codecs, contexts

ROUNDS = 3
ALL = "all of it"
REST = "all else, the dense forward pass"
# what a part is called: where its function is looked up, and its name there
PARTS: dict[str, tuple[ModuleType | type, str]] = {
    "attention of the prompt": (selector, "attend"),
    "keys beside one another": (Prompt, "keys"),
    "values beside one another": (Prompt, "values"),
    "norms of groups": (Prompt, "norms"),
    "attention received": (Prompt, "received"),
    "queries moved": (Prompt, "moved"),
    "choosing, all else": (selector.Selector, "choose"),
    "levels": (budgets, "choose_levels"),
    "second moments of queries": (Prompt, "moments"),
    "packing, all else": (selector, "pack_layers"),
    "quantising": (codecs, "pack_context"),
    "rounding for queries": (contexts, "error_feedback"),
    "windows": (selector, "fill_windows"),
    "empty caches": (selector.SelectPath, "new_cache"),
    "joining caches": (KVCache, "cat"),
}


class Clock:
    """Times of parts that lie within one another."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, object]] = []  # the part that begins, and when

    def mark(self, name: str) -> None:
        """Note that a part begins or goes on from here."""
        if self.device.type != "cuda":
            self.marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

    def milliseconds(self) -> dict[str, float]:
        """Return what each part took, without those within it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if self.device.type == "cuda":
                took[name] += begin.elapsed_time(end)
            else:
                took[name] += 1e3 * (end - begin)
        return dict(took)


@contextmanager
def timed_parts(device: torch.device) -> Iterator[Clock]:
    """Time PARTS of what runs inside the `with`, and REST."""
    clock = Clock(device)
    within = [REST]

    def timed(name: str, call):
        def run(*args, **kwargs):
            within.append(name)
            clock.mark(name)
            try:
                return call(*args, **kwargs)
            finally:
                within.pop()
                clock.mark(within[-1])

        return run

    with ExitStack() as stack:
        for name, (place, attribute) in PARTS.items():
            own = vars(place)[attribute]
            stand_in = timed(name, getattr(place, attribute))
            if isinstance(own, staticmethod):
                stand_in = staticmethod(stand_in)
            elif hasattr(own, "attrname"):  # a cached property, computed once
                stand_in = type(own)(timed(name, own.func))
                stand_in.__set_name__(place, attribute)
            stack.enter_context(patch.object(place, attribute, stand_in))
        clock.mark(REST)
        yield clock
        clock.mark(REST)


@contextmanager
def timed_whole(device: torch.device) -> Iterator[Clock]:
    """Time all of what runs inside the `with`, alone."""
    clock = Clock(device)
    clock.mark(ALL)
    yield clock
    clock.mark(ALL)


def prefill_parts(
    models: dict[str, Transformer], idx: Tensor, n_tokens: int, at_once: int
) -> list[dict]:
    """Return a row for each part of each model's prefill of prompts idx (B, T) with room for
    n_tokens, and one for all of it, timed without its parts, with their times over the whole of
    `dense`: medians of ROUNDS in turns, after one that is not counted."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for i in range(ROUNDS + 1):
        for name, model in models.items():
            took = {}
            for timed in (timed_parts, timed_whole):
                with evaluating(model), timed(idx.device) as clock:
                    generate.prefill(model, idx, n_tokens, at_once=at_once)
                took |= clock.milliseconds()
            if i:
                rounds[name].append(took)
    dense = median(took[ALL] for took in rounds["dense"])
    rows = []
    for name, mine in rounds.items():
        for part in mine[0]:
            ms = median(took.get(part, 0.0) for took in mine)
            impl = f"{name}: {part}"
            ratio = round(ms / dense, 4)
            rows.append({"impl": impl, "ms": round(ms, 3), "ratio": ratio, "peer": f"dense: {ALL}"})
    return rows
