"""What eval.py measures: methods, settings of value groups, and in each the numbers of groups kept
or the ways to choose that are tried. What is wrong with the flags is said while this is made."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import NamedTuple

import selector
from config import PUBLISHED, SHARED, KVConfig, SelectConfig, check, comma_list, count_kept
from loaders.runs import Run
from measure_config import (
    CODED,
    METHODS,
    EvalConfig,
    check_eval_flags,
    methods_named,
)
from settings.beside import STORED_WITH, check_beside
from settings.fields import to_dict
from settings.storing import SELECTING, check_fitted, check_not_shared, kind_asked
from settings.train import DataConfig

# Fields of KVConfig that a trained selection or routing does not depend on.
STORED_AS = ("key_bits", "value_bits", "key_block", "kv_sinks", "prefill")
# Flags that only a base, which is calibrated here, can be asked.
UNTRAINED = {"bases", "groups", "splits", "calibrate", "calibration"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a run: settings, and the names of the flags on the command line."""

    eval: EvalConfig
    kv: KVConfig = field(default_factory=KVConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    data: DataConfig = field(default_factory=DataConfig)
    given: frozenset[str] = frozenset()


class Setting(NamedTuple):
    """A way to store, and what is tried in it: numbers of groups kept, or ways to choose."""

    kv: KVConfig
    tried: list

    @property
    def selects(self) -> bool:
        return self.kv.kv == "select"


def is_trained(run: Run) -> bool:
    """Whether the run is more than a base: its storage is then what it was trained with."""
    return run.kv.kv != "dense"


def plan_of(run: Run, asked: Asked) -> tuple[list[str], list[Setting]]:
    """The methods, and every setting with what is tried in it. What is wrong is said here."""
    check_flags(run, asked)
    methods = methods_of(run, asked)
    check_methods(run, asked, methods)
    own = [run.kv.kv] if is_trained(run) and run.kv.kv not in methods else []
    check_eval_flags(asked.given, asked.eval, asked.kv.kv, [*methods, *own], is_trained(run))
    plan = []
    for kv in grid_of(run, asked):
        kv.check_model(run.model.cfg)
        if "value_groups" in methods or run.kv.kv == "value_groups":
            plan.append(Setting(kv, ks_of(run, asked, methods, kv)))
        if "select" in methods or run.kv.kv == "select":
            stored = kv
            if not is_trained(run):
                stored = replace(kv, kv="select", mask_scope=asked.kv.mask_scope)
            plan.append(Setting(stored, ways_of(run, asked, methods)))
    for setting, bits in itertools.product(plan, bits_of(asked)):
        stored = replace(setting.kv, **bits)
        stored.check_model(run.model.cfg)
        check(
            stored.value_bits > 0 or any(way.kv_bytes for way in setting.tried),
            "value_bits=0 without kv_bytes",
            "levels need a budget of bytes",
            "give --kv_byte_budgets=0.125",
        )
    check_beside(asked.given, STORED_WITH, tried_of(run, asked, plan))
    return methods, plan


def tried_of(run: Run, asked: Asked, plan: list[Setting]) -> list[dict]:
    """Every setting that is tried, in all bits, by its flags' names, and by those of the lists that
    it is of and that can be unread; for a run of shared heads, that of the run. Settings of a
    selection are in those that select."""
    stored = [(setting.kv, setting.tried if setting.selects else []) for setting in plan]
    if run.kv.kv in SHARED:
        stored.append((run.kv, []))
    tried = []
    for (kv, ways), bits in itertools.product(stored, bits_of(asked)):
        settings = to_dict(replace(kv, **bits))
        settings["kv_bits"] = settings["key_bits"]
        selects = [settings | to_dict(way) | {"relevances": way.relevance} for way in ways]
        tried += selects or [settings]
    return tried


def untrained_flags(asked: Asked) -> list[str]:
    """The flags given that a trained run cannot be asked."""
    stored = {f.name for f in fields(KVConfig)} - {*STORED_AS}
    return sorted(asked.given & (UNTRAINED | stored))


def select_flags(asked: Asked) -> list[str]:
    """The flags given that say how to choose."""
    return sorted(asked.given & SELECTING)


def check_flags(run: Run, asked: Asked) -> None:
    """Raise ValueError for flags that this run cannot be asked, or that contradict each other."""
    if "kv" in asked.given:
        check_not_shared(asked.kv.kv)
    check(
        not (is_trained(run) and untrained_flags(asked)),
        f"{', '.join(untrained_flags(asked))} with {run.path}",
        "its value groups are trained with their own settings",
        "leave them out",
    )


def methods_of(run: Run, asked: Asked) -> list[str]:
    """--methods, else as the run was trained; of a base dense, and --kv or what other flags ask
    for."""
    methods = methods_named(asked.given, asked.eval, asked.kv.kv)
    if methods:
        return methods
    if is_trained(run):
        return [run.kv.kv]
    if kind_asked(asked.given, asked.kv.kv) == "select":
        return ["dense", "select"]
    stored = asked.given & {*STORED_AS}
    if untrained_flags(asked) or asked.eval.budgets or asked.eval.kv_bits or stored:
        return ["dense", "value_groups"]
    return ["dense"]


def check_methods(run: Run, asked: Asked, methods: list[str]) -> None:
    """Raise ValueError where the methods do not fit the run, the tasks or the other flags."""
    selecting = select_flags(asked)
    selects = run.kv.kv in ("dense", "select")  # whether it can
    if "quest" in methods and selecting == ["token_budgets"]:
        selecting = []  # shares that it reads
    if {*CODED} & {*methods} and selecting == ["kv_byte_budgets"]:
        selecting = []  # shares that its codes may take
    check(
        not selecting or "select" in methods,
        f"{', '.join(selecting)}",
        "only kv=select chooses",
        "give --methods=select, or leave them out" if selects else "leave them out",
    )
    check(
        "select" in methods or asked.kv.mask_scope != "shared",
        "mask_scope=shared",
        "a fixed K is routed in every layer",
        "give layer or head",
    )
    check(
        not is_trained(run) or not {"value_groups", "select"} & {*methods} - {run.kv.kv},
        f"methods={asked.eval.methods} with {run.path}",
        f"it was trained for {run.kv.kv}",
        f"{'name that' if run.kv.kv in METHODS else 'leave it out'}, or give its base",
    )
    check(
        "select" not in methods or "perplexity" not in comma_list(asked.eval.tasks),
        "perplexity with select",
        "selection compresses prompts",
        "give --tasks=continuation or another",
    )


def grid_of(run: Run, asked: Asked) -> list[KVConfig]:
    """The settings of value groups: as trained, or every basis, number of groups and split."""
    if is_trained(run):
        return [run.kv]
    cfg = asked.eval
    kv = asked.kv
    check_fitted(kv)
    bases = comma_list(cfg.bases) or [kv.value_basis]
    groups = [int(n) for n in comma_list(cfg.groups)] or [kv.n_groups]
    layers = [f"from:{n}" for n in comma_list(cfg.splits)] or [kv.kv_layers]
    return [
        replace(
            kv,
            kv="value_groups",
            key_bits=16,
            value_bits=16,
            value_basis=basis,
            n_groups=S,
            kv_layers=which,
            topk_groups=max(min(1, kv.topk_groups), S * kv.topk_groups // kv.n_groups),
            mask_scope="layer" if kv.mask_scope == "shared" else kv.mask_scope,
        )
        for basis, S, which in itertools.product(bases, groups, layers)
    ]


def ks_of(run: Run, asked: Asked, methods: list[str], kv: KVConfig) -> list[int]:
    """The numbers of groups kept: all of them for a trained run's dense row, then --budgets."""
    ks = []
    if is_trained(run) and "dense" in methods:
        ks.append(kv.n_groups)
    if "value_groups" in methods:
        budgets = comma_list(asked.eval.budgets)
        ks += [count_kept(b, kv.n_groups) for b in budgets] or [kv.topk_groups]
    return ks


def ways_of(run: Run, asked: Asked, methods: list[str]) -> list[SelectConfig]:
    """The ways to choose: everything for a trained run's dense row, then those of the flags."""
    ways = [as_published(way, asked.given) for way in ways_to_choose(asked.eval, asked.select)]
    for way in ways:
        selector.check_trained(way, run.model.selector.predictors if is_trained(run) else ())
    if not is_trained(run):
        return ways
    run.model.selector.set(ways[0])
    tried = [ways[0].everything()] if "dense" in methods else []
    return tried + ways if "select" in methods else tried


def ways_to_choose(cfg: EvalConfig, base: SelectConfig) -> list[SelectConfig]:
    """The grid of the list flags: every --kv_byte_budgets and --kv_budgets, and every
    --token_budgets with every --budgets, for each signal. Without any of these lists the one way
    that the single flags name."""
    ways = []
    listed = cfg.budgets or cfg.token_budgets or cfg.kv_budgets or cfg.kv_byte_budgets
    for signal in comma_list(cfg.relevances) or [base.relevance]:
        joint = replace(base, relevance=signal, token_relevance="", fixed_k=False)
        kv_bytes = numbers(cfg.kv_byte_budgets) or ([] if listed else [base.kv_bytes])
        ways += [replace(joint, kv_bytes=b, kv_keep=0.0) for b in kv_bytes if b]
        kv_keep = numbers(cfg.kv_budgets) or ([] if listed else [base.kv_keep])
        ways += [replace(joint, kv_keep=b, kv_bytes=0.0) for b in kv_keep if b]
        single = not listed and not base.kv_keep and not base.kv_bytes
        if cfg.budgets or cfg.token_budgets or single:
            ways += ways_apart(cfg, replace(base, relevance=signal, kv_keep=0.0, kv_bytes=0.0))
    used = {way.token_relevance for way in ways}
    unused = sorted({*comma_list(cfg.token_relevances)} - used)
    check(
        not unused,
        f"token_relevances={','.join(unused)}",
        "no token is dropped by it",
        "give --token_budgets of less than 1",
    )
    return list(dict.fromkeys(ways))


def ways_apart(cfg: EvalConfig, base: SelectConfig) -> list[SelectConfig]:
    """Every signal for tokens, share of tokens, and share of the kept tokens' groups."""
    signals = comma_list(cfg.token_relevances) or [base.token_relevance]
    token_budgets = numbers(cfg.token_budgets) or [base.token_keep]
    budgets = numbers(cfg.budgets) or [base.value_keep]
    return [
        replace(base, token_relevance=by if keep < 1 else "", token_keep=keep, value_keep=rho)
        for by, keep, rho in itertools.product(signals, token_budgets, budgets)
    ]


def as_published(way: SelectConfig, given: frozenset[str]) -> SelectConfig:
    """The way with what the method that drops its tokens was published with, but for flags given:
    what shares a budget, and how many first tokens are kept."""
    own = PUBLISHED.get(way.token_relevance)
    if own is None:
        return way
    return replace(way, **{k: v for k, v in own._asdict().items() if k not in given})


def numbers(text: str) -> list[float]:
    """The entries of a list of shares, such as 0.5 or 1/3."""
    return [float(Fraction(t)) for t in comma_list(text)]


def bits_of(asked: Asked) -> list[dict]:
    """How numbers are stored, a change of KVConfig for every entry of --kv_bits, on top of the
    flags given."""
    base = {f: getattr(asked.kv, f) for f in STORED_AS if f in asked.given}
    changes = []
    for entry in comma_list(asked.eval.kv_bits):
        key, _, value = entry.partition(":")
        changes.append({**base, "key_bits": int(key), "value_bits": int(value or key)})
    return changes or [base]
