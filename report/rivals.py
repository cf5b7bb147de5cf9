"""Methods with a path of their own, Quest, KIVI, KVTC and RDKV (baselines/), routed coding:
which of them the flags ask for, and how each is put into a model while it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

import selector
from baselines import coded, kivi, kvtc, quest, rdkv
from coding import basis, routed
from config import KVConfig, check, comma_list, count_kept
from loaders.runs import Run
from measure_config import CODED, RIVALS
from model import Transformer
from report.plan import Asked, grid_of, is_trained, numbers
from tasks.common import Task


class Components:
    """What a method finds on calibration text, once for all shares."""

    def __init__(self, find: Callable):
        self.find = find
        self.found = None

    def of(self, model: Transformer, batches: list[Tensor]):
        """Return them; model: with dense paths."""
        if self.found is None:
            self.found = self.find(model, batches)
        return self.found


class Rival(NamedTuple):
    """A way to store and read."""

    method: str  # of RIVALS
    kv: KVConfig  # quest: value groups, all kept: values stay whole; kivi: bits
    read_keep: float = 1.0  # quest: share of a prompt's tokens that a step reads
    share: float = 1.0  # routed, kvtc, rdkv: of a prompt's bytes
    components: Components | None = None  # routed, kvtc

    @property
    def calibrated(self) -> bool:
        """Whether it has a basis that is calibrated."""
        return self.cuts_values or self.components is not None

    @property
    def cuts_values(self) -> bool:
        """Whether it stores value groups, of a basis that is calibrated."""
        return self.kv.kv == "value_groups"


def rivals_of(run: Run, asked: Asked, methods: list[str]) -> list[Rival]:
    """The rivals that --methods names, each with every setting of its flags. What is wrong is said
    here."""
    named = [name for name in methods if name in RIVALS]
    check(
        not (named and is_trained(run)),
        f"methods={','.join(named)} with {run.path}",
        f"it was trained for {run.kv.kv}",
        "give its base",
    )
    out = []
    if "quest" in named:
        out += ways_to_read(run, asked)
    if "kivi" in named:
        out += ways_to_code(run, asked)
    out += shares_to_code(asked, [name for name in named if name in CODED])
    return out


def ways_to_read(run: Run, asked: Asked) -> list[Rival]:
    """Quest with every share of --token_budgets, alone or with every share of --budgets of the
    value groups."""
    shares = numbers(asked.eval.token_budgets)
    check(
        bool(shares),
        "methods=quest without token_budgets",
        "shares of the prompt's tokens that a step reads",
        "give --token_budgets=0.25",
    )
    quest.check_whole_layers(asked.eval.quest_whole, run.model.cfg.n_layer)
    budgets = comma_list(asked.eval.budgets) or ["1"]
    stored = []
    for kv in grid_of(run, asked):
        for rho in budgets:
            k = count_kept(rho, kv.n_groups)
            if k == kv.n_groups:
                stored.append(KVConfig(kv="dense"))  # whole: whichever groups there would be
            else:
                stored.append(replace(kv, topk_groups=k))
    once = dict.fromkeys(stored)
    for kv in once:
        kv.check_model(run.model.cfg)
    return [Rival("quest", kv, share) for share in shares for kv in once]


def ways_to_code(run: Run, asked: Asked) -> list[Rival]:
    """KIVI with the bits of --kv_bits, or with all that it has."""
    bits = comma_list(asked.eval.kv_bits) or [str(b) for b in kivi.BITS]
    wrong = [b for b in bits if b not in map(str, kivi.BITS)]
    check(
        not wrong,
        f"kv_bits={','.join(wrong)} with methods=kivi",
        f"it has {', '.join(map(str, kivi.BITS))}",
        "give --kv_bits=4,2, or leave it out",
    )
    kivi.KiviPath(run.model.cfg, kivi.Format(int(bits[0])))  # whether its groups fit the model
    return [Rival("kivi", KVConfig(kv="dense", key_bits=int(b), value_bits=int(b))) for b in bits]


def shares_to_code(asked: Asked, named: list[str]) -> list[Rival]:
    """Routed coding, KVTC and RDKV, those named, with every share of --kv_byte_budgets."""
    shares = numbers(asked.eval.kv_byte_budgets)
    check(
        bool(shares) or not named,
        f"methods={','.join(named)} without kv_byte_budgets",
        "shares of a prompt's bytes that its codes may take",
        "give --kv_byte_budgets=0.125",
    )
    check(
        not named or "perplexity" not in comma_list(asked.eval.tasks),
        f"perplexity with {','.join(named)}",
        "they code prompts",
        "give --tasks=continuation or another",
    )
    for share in shares if named else ():
        coded.check_kept(coded.Kept(share))
    whole = KVConfig(kv="dense")
    found = {"routed": Components(basis.calibrate), "kvtc": Components(kvtc.calibrate)}
    return [
        Rival(name, whole, share=share, components=found.get(name))
        for name in named
        for share in shares
    ]


@contextmanager
def in_place(
    model: Transformer,
    rival: Rival,
    task: Task,
    whole_layers: int,
    batches: list[Tensor] | None,
    seed: int,
) -> Iterator[KVConfig]:
    """Let the model store and read as the rival does inside the `with`, which gets the setting that
    its rows are about.

    whole_layers: quest: first layers that read everything
    batches: token ids that calibrate a basis, where there is one"""
    selector.detach(model)
    if rival.method == "kivi":
        kivi.attach(model, kivi.Format(rival.kv.key_bits))
        try:
            yield rival.kv
        finally:
            kivi.detach(model)
        return
    if rival.method in CODED:
        code_prompts(model, rival, task, batches)
        try:
            yield rival.kv
        finally:
            coded.detach(model)
        return
    kv = rival.kv
    if rival.cuts_values and task.query is not None:
        kv = replace(kv, kv_tail=task.query, kv_tail_block=1)
    stored = kv if rival.cuts_values else replace(kv, kv="value_groups", topk_groups=kv.n_groups)
    read_tokens = count_kept(rival.read_keep, task.stored.size(1))
    quest.attach(model, stored, read_tokens, whole_layers, batches, seed)
    try:
        yield kv
    finally:
        selector.detach(model)


def code_prompts(
    model: Transformer, rival: Rival, task: Task, batches: list[Tensor] | None
) -> None:
    """Let the model code prompts as the method does, the task's query whole; of routed coding a few
    newest tokens, whatever the query."""
    kept = coded.Kept(rival.share, tail=task.query)
    if rival.method == "rdkv":
        rdkv.attach(model, kept)
        return
    attach = kvtc.attach
    if rival.method == "routed":
        attach = routed.attach
        kept = kept._replace(tail=min(routed.TAIL, task.query))
    attach(model, rival.components.of(model, batches), kept, task.stored.size(1))
