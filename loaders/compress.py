"""A loaded model made to store its keys and values as flags ask: a base is calibrated here, what
was trained to store in a way keeps it, and its budgets and bits may be changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

import kv_router
import selector
from config import SHARED, KVConfig, SelectConfig, check
from data import TokenFile, batch, prepare_splits
from loaders.runs import Run, attach_storage
from measure_config import EvalConfig
from settings.beside import check_storing
from settings.measuring import CALIBRATED_WITH
from settings.storing import (
    SELECT_FLAGS,
    check_fitted,
    check_not_shared,
    check_storage_flags,
    storage_flags,
)
from settings.train import DataConfig

# what may be changed of a run that was trained to store in some way, but by shared heads
CHANGED_LATER = {"kv_tail", "kv_tail_block", "key_bits", "value_bits", "key_block", "kv_sinks"}
# last tokens of a prompt that a selection leaves whole where --kv_tail does not say, as in eval.py
QUERY = EvalConfig.query
CALIBRATION_TOKENS = 512  # of a sequence, where the context has as many


def stored_as_asked(
    run: Run,
    given: set[str],
    kv: KVConfig,
    select: SelectConfig,
    *,
    corpus: str,
    sequences: int,
    seed: int,
    data: DataConfig,
) -> AbstractContextManager:
    """Return a context in which the run's model stores as the flags given ask: a base is calibrated
    on entering.

    corpus: what a base is calibrated on, sequences of it; data: where its tokens are kept. Raises
    ValueError, before anything is calibrated, for flags that do not fit each other or how the run
    was trained."""
    if not storage_flags(given):
        return contextlib.nullcontext()
    if run.kv.kv != "dense":
        return changed(run, given, kv, select)
    kv = storage_of_base(run, given, kv, select)
    if kv.kv == "dense":
        return contextlib.nullcontext()
    length = min(CALIBRATION_TOKENS, run.model.cfg.block_size)

    def windows() -> list[Tensor]:
        (text,) = prepare_splits(corpus, data, run.tokenizer, ["train"])
        return windows_of(text, run, seed, sequences, length, at_once=2)

    return calibrated(run, kv, select, windows, seed)


def storage_of_base(run: Run, given: set[str], kv: KVConfig, select: SelectConfig) -> KVConfig:
    """Return how a base is to store. ValueError for flags of those given that it cannot be asked,
    or that leave one another unread."""
    check_not_shared(kv.kv)
    check_storage_flags(given, kv.kv)
    if kv.kv == "select" and "kv_tail" not in given:
        kv = replace(kv, kv_tail=QUERY)
    check_fitted(kv)
    check_storing(storage_flags(given), kv, select)
    kv.check_model(run.model.cfg)
    if kv.kv == "select":
        selector.check_trained(select, ())
        check_foreseen(select)
    return kv


def check_foreseen(select: SelectConfig) -> None:
    """Raise ValueError for a signal that tells of tokens which are yet to be generated."""
    check(
        "oracle" not in (select.relevance, select.tokens_by),
        "relevance=oracle",
        "it needs a pass that has seen what follows",
        "measure it with eval.py, give another here",
    )


@contextlib.contextmanager
def calibrated(
    run: Run, kv: KVConfig, select: SelectConfig, windows: Callable[[], list[Tensor]], seed: int
) -> Iterator[None]:
    """Give a base, for good, storage that is calibrated on windows(): batches of ids."""
    attach_storage(run.model, kv, select, windows(), seed)
    kv_router.fold(run.model)
    yield


def changed(
    run: Run, given: set[str], kv: KVConfig, select: SelectConfig
) -> AbstractContextManager:
    """Return a context in which a run that was trained to store in some way does so with what may
    be changed of that; how it chooses is changed for good. ValueError for other flags of those
    given."""
    asked = storage_flags(given)
    own = run.kv.kv
    other = asked - {"kv"}
    if own not in SHARED:
        other -= CHANGED_LATER
    if own == "select":
        other -= SELECT_FLAGS
    if "kv" in given and kv.kv != own:
        other.add("kv")
    check(
        not other,
        f"{', '.join(f'--{name}' for name in sorted(other))} for a run trained with kv={own}",
        "it keeps how it was trained to store",
        "leave it out, or give the base with --init_from",
    )
    unread = sorted(CALIBRATED_WITH & {*given})
    check(
        not unread,
        f"{', '.join(unread)} for a run trained with kv={own}",
        "nothing is calibrated",
        "leave it out, or give the base with --init_from",
    )
    check_storage_flags(given, own, kinds=())
    chosen = {name: getattr(select, name) for name in asked & SELECT_FLAGS}
    changes = {name: getattr(kv, name) for name in asked & CHANGED_LATER}
    chooses = replace(run.select, **chosen)
    check_storing(asked, replace(run.kv, **changes), chooses)
    if own == "select":
        check_foreseen(chooses)
        run.model.selector.set(chooses)
    return kv_router.storing(run.model, **changes)


def windows_of(
    text: TokenFile, run: Run, seed: int, sequences: int, length: int, at_once: int
) -> list[Tensor]:
    """Return batches of at most `at_once` windows of `length` tokens, `sequences` in all, that a
    run's model is calibrated on: ids on its device."""
    windows = batch(text, "calibrate", seed, 0, sequences, length)[0]
    device = run.model.norm.weight.device
    return [w.to(device) for w in windows.split(at_once)]
