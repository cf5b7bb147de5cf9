"""Which flags say how keys and values are stored, which kind of storage they ask for, and what is
refused beside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace

from config import SHARED, KVConfig, SelectConfig
from settings import measuring
from settings.beside import STORED_WITH, With, refuse_alike, together
from settings.fields import check, to_dict

GROUP_OF = {f.name: "kv" for f in fields(KVConfig)} | {
    f.name: "select" for f in fields(SelectConfig)
}
SELECT_LISTS = {"kv_budgets", "kv_byte_budgets", "token_budgets", "relevances", "token_relevances"}
SELECT_FLAGS = {name for name, group in GROUP_OF.items() if group == "select"}
SELECTING = SELECT_LISTS | SELECT_FLAGS  # what a selection is asked for by
USUAL = to_dict(KVConfig(kv="select")) | to_dict(SelectConfig())


def storage_flags(given: Collection[str]) -> set[str]:
    """Return the flags given that say how keys and values are stored."""
    return {name for name in given if name in GROUP_OF}


def kind_asked(given: Collection[str], kv: str) -> str:
    """Return the kind of storage that a base is asked for: --kv, or where that is not given a
    selection if another flag given is one of its own. kv: --kv, or its default."""
    return "select" if "kv" not in given and SELECTING & {*given} else kv


def take_kind(args) -> None:
    """Let args.kv be of the kind that the flags ask of a base. args: a program's settings by group.
    ValueError where that kind does not go with the other settings."""
    args.kv = replace(args.kv, kv=kind_asked(args.given, args.kv.kv))


def wanted_beside(names: Collection[str], given: Collection[str]) -> list[str]:
    """Return what has to be given, too, where a storage that reads the flags named is advised, in
    words; of what the flags given say themselves nothing."""

    def is_said(condition: With) -> bool:
        said = condition.flag in given or bool(condition.list_given(given))
        return said or any(is_said(other) for other in condition.others)

    unmet = [
        condition
        for name in names
        for condition in STORED_WITH.get(name, ())
        if not condition.holds(USUAL) and not is_said(condition)
    ]
    return list(dict.fromkeys(condition.way([USUAL]) for condition in unmet))


def check_storage_flags(
    given: Collection[str], kv: str, kinds: Collection[str] = measuring.STORAGES
) -> None:
    """Raise ValueError for flags of those given that storing by `kv` does not read. kinds: of
    storage that may be advised."""
    reasons = {}
    for name in sorted(storage_flags(given)):
        if measuring.read_by_storage(kv, GROUP_OF[name], name):
            continue
        by = [kind for kind in kinds if measuring.read_by_storage(kind, GROUP_OF[name], name)]
        ways = [f"give --kv={' or '.join(by)}", *wanted_beside([name], given)]
        do = f", or {together(ways)}" if by else ""
        reasons[f"--{name}"] = f"with kv={kv}: it is not read; leave it out{do}"
    refuse_alike(reasons)


def check_not_shared(kv: str) -> None:
    """Raise ValueError for a kind of storage that a base cannot be given as it is."""
    check(
        kv not in SHARED,
        f"kv={kv}",
        "a whole model is trained on with it",
        "give --out_dir of a run of train.py --stage=continue",
    )


def check_fitted(kv: KVConfig) -> None:
    """Raise ValueError where value groups that are calibrated alone would need training."""
    check(
        kv.reconstructor != "mlp",
        "reconstructor=mlp",
        "measuring trains nothing",
        "give --reconstructor=keys, or train with train.py --reconstructor=mlp and give --out_dir",
    )
