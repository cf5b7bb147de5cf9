"""Flags that are read only beside some values of others, and those that a list overrules: by tables
of them they are refused. A table of train.py's own is in settings/stages.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from settings.fields import check, to_dict


class With(NamedTuple):
    """What another flag is where one is read: one of some values, more or less than a number; or
    what others are that do as well. do: what else can be done than to leave the one out, where the
    values do not say it."""

    flag: str
    values: tuple = ()
    above: float | None = None
    below: float | None = None
    others: tuple[With, ...] = ()
    do: str = ""

    def holds(self, settings: Mapping[str, object]) -> bool:
        """Whether settings, by their flags' names, are such; what they lack is not."""
        if any(other.holds(settings) for other in self.others):
            return True
        if self.flag not in settings:
            return False
        value = settings[self.flag]
        return (
            value in self.values
            or (self.above is not None and value > self.above)
            or (self.below is not None and value < self.below)
        )

    def advice(self, allowed: Collection | None = None) -> str:
        """What to do about a flag that is not read. allowed: those of the values that can be, where
        not all can."""
        if self.do:
            return self.do
        if self.above is not None:
            return f"leave it out, or give a --{self.flag} of more than {self.above}"
        if self.below is not None:
            return f"leave it out, or give a --{self.flag} of less than {self.below}"
        fitting = [value for value in self.values if allowed is None or value in allowed]
        return "leave it out" + "".join(f", or give --{self.flag}={v}" for v in fitting[:1])

    def refuse(
        self,
        name: str,
        settings: Mapping[str, object],
        given: Collection[str] = (),
        allowed: Collection | None = None,
    ) -> None:
        """Raise ValueError for a flag that is not read with these settings. given: flags, of which
        a list is named in place of its setting; allowed: see advice."""
        has = settings[self.flag]
        own = LISTED.get(self.flag, ("",))[0]
        flag = own if own in given else self.flag
        check(False, f"{name} with {flag}={has}", "it is not read then", self.advice(allowed))


INTEGERS = With("key_bits", (8, 4, 3, 2), do="leave it out, or give --key_bits=8 --value_bits=8")
BY_KEYS = With("reconstructor", ("keys", "own_keys"))


def integers(*others: With) -> With:
    """Return what bits are where those of integers are read, or what others are."""
    return INTEGERS._replace(others=others)


BYTES = With("kv_bytes", above=0)  # picks bits where none are given
ALONE = "leave one of them out"
NO_BYTES = With("kv_bytes", (0,), do=ALONE)
NO_JOINT = With("kv_keep", (0,), do=ALONE)


def signal(*names: str, others: tuple[With, ...] = ()) -> With:
    """Return that groups, or tokens, are kept by one of some signals, or what others are."""
    by_tokens = With("token_relevance", names)
    return With("relevance", names, others=(by_tokens, *others))


# What eval.py, sample.py and bench.py read of a storage and a selection, and beside what alone.
STORED_WITH = {
    "refit_ridge": (With("refit", (True,)),),
    "key_rounding": (integers(BYTES),),
    "key_block": (integers(BYTES),),
    "kv_sinks": (integers(BYTES, BY_KEYS),),
    **dict.fromkeys(("token_keep", "value_keep", "fixed_k"), (NO_BYTES, NO_JOINT)),
    "token_relevance": (NO_BYTES, NO_JOINT, With("token_keep", below=1)),
    "sinks": (NO_BYTES,),
    "pool": (signal("observed"),),
    # A base is calibrated by them for budgets of bytes, whatever the signal.
    **dict.fromkeys(("past", "ahead"), (signal("future", "predictor_query", others=(BYTES,)),)),
}
# What eval.py does not read beside lists, the first of them its own.
LISTED = {
    "value_basis": ("bases",),
    "n_groups": ("groups",),
    "kv_layers": ("splits",),
    "topk_groups": ("budgets",),
    "value_keep": ("budgets",),
    "token_keep": ("token_budgets",),
    "kv_keep": ("kv_budgets", "kv_byte_budgets", "budgets", "token_budgets"),
    "kv_bytes": ("kv_byte_budgets", "kv_budgets", "budgets", "token_budgets"),
    "key_bits": ("kv_bits",),
    "value_bits": ("kv_bits",),
    "relevance": ("relevances",),
    "token_relevance": ("token_relevances",),
}


def check_beside(
    given: Collection[str],
    table: Mapping[str, tuple[With, ...]],
    tried: Sequence[Mapping[str, object]],
) -> None:
    """Raise ValueError for the first flag given that no setting tried reads, for another is not
    what the table says.

    tried: settings, by their flags' names; those that lack a flag do not count where it is read"""
    for name in sorted({*given} & {*table}):
        ways = [values for values in tried if name in values]
        if not ways or any(all(w.holds(values) for w in table[name]) for values in ways):
            continue
        unmet = next(w for w in table[name] if not w.holds(ways[-1]))
        unmet.refuse(name, ways[-1], given)


def check_storing(given: Collection[str], kv, select) -> None:
    """Raise ValueError for a flag of those given that storing by kv, config.KVConfig, and where
    that selects choosing by select, config.SelectConfig, leave unread."""
    chooses = to_dict(select) if kv.kv == "select" else {}
    check_beside(given, STORED_WITH, [to_dict(kv) | chooses])


def check_listed(given: Collection[str], settings: Mapping[str, object]) -> None:
    """Raise ValueError for the first flag given that a list overrules. settings: by their flags'
    names, those of lists among them.

    --n_groups beside --groups is read with --topk_groups: it says of how many groups those are."""
    read = {"n_groups"} if "topk_groups" in given else set()
    for name in sorted({*given} & {*LISTED} - read):
        own = LISTED[name][0]
        for other in LISTED[name]:
            has = settings.get(other, "")
            check(
                not has,
                f"{name} with {other}={has}",
                "the list is measured",
                "leave one of them out" + ("" if settings.get(own) else f", or give --{own}"),
            )
