"""A loaded model made to store its keys and values as flags ask: a base is calibrated here, what
was trained to store in a way keeps it, and its budgets and bits may be changed."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from torch import Tensor

import kv_router
import selector
from config import SHARED, KVConfig, SelectConfig, check
from data import TokenFile, batch, prepare_splits
from loaders.runs import Run, attach_storage
from measure_config import (
    SELECT_FLAGS,
    EvalConfig,
    check_fitted,
    check_storage_flags,
    storage_flags,
)
from settings.beside import check_storing
from settings.measuring import CALIBRATED_WITH
from settings.train import DataConfig

# what may be changed of a run that was trained to store in some way, but by shared heads
CHANGED_LATER = {"kv_tail", "kv_tail_block", "key_bits", "value_bits", "key_block", "kv_sinks"}
# last tokens of a prompt that a selection leaves whole where --kv_tail does not say, as in eval.py
QUERY = EvalConfig.query
CALIBRATION_TOKENS = 512  # of a sequence, where the context has as many


@contextlib.contextmanager
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
):
    """Let the run's model store as the flags given ask, inside the `with`.

    corpus: what a base is calibrated on, sequences of it; data: where its tokens are kept. Raises
    ValueError for flags that do not fit how the run was trained."""
    asked = storage_flags(given)
    if not asked:
        yield
        return
    own = run.kv.kv
    check_storage_flags(given, kv.kv if "kv" in given or own == "dense" else own)
    if own == "dense":
        if kv.kv == "select" and "kv_tail" not in given:
            kv = replace(kv, kv_tail=QUERY)
        check_fitted(kv)
        check_storing(asked, kv, select)
        # before calibration, which takes a while
        kv.check_model(run.model.cfg)
        if kv.kv == "select":
            selector.check_trained(select, ())
        if kv.kv != "dense":
            (text,) = prepare_splits(corpus, data, run.tokenizer, ["train"])
            length = min(CALIBRATION_TOKENS, run.model.cfg.block_size)
            windows = windows_of(text, run, seed, sequences, length, at_once=2)
            attach_storage(run.model, kv, select, windows, seed)
            kv_router.fold(run.model)
        yield
        return
    other = asked - {"kv"}
    if own not in SHARED:
        other -= CHANGED_LATER
    if own == "select":
        other -= SELECT_FLAGS
    if "kv" in given and kv.kv != own:
        other.add("kv")
    check(
        not other,
        f"--{min(other, default='')} for a run trained with kv={own}",
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
    chosen = {name: getattr(select, name) for name in asked & SELECT_FLAGS}
    changes = {name: getattr(kv, name) for name in asked & CHANGED_LATER}
    chooses = replace(run.select, **chosen)
    check_storing(asked, replace(run.kv, **changes), chooses)
    if own == "select":
        run.model.selector.set(chooses)
    with kv_router.storing(run.model, **changes):
        yield


def windows_of(
    text: TokenFile, run: Run, seed: int, sequences: int, length: int, at_once: int
) -> list[Tensor]:
    """Return batches of at most `at_once` windows of `length` tokens, `sequences` in all, that a
    run's model is calibrated on: ids on its device."""
    windows = batch(text, "calibrate", seed, 0, sequences, length)[0]
    device = run.model.norm.weight.device
    return [w.to(device) for w in windows.split(at_once)]
