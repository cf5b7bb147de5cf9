"""Flags that are read only beside some values of others, and those that a list overrules: by tables
of them they are refused. Which table answers what:

    stages.READS        which settings does a stage of train.py read
    stages.READ_WITH    beside which values of others alone does it read one
    measuring.OF_*      which tasks, methods and comparisons of eval.py and bench.py read a setting
    STORED_WITH         beside which values of others do eval.py, sample.py and bench.py read one of
                        storage and selection
    LISTED              which lists of eval.py overrule one"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from settings.fields import to_dict


class With(NamedTuple):
    """A condition on another flag. It holds where that flag has one of `values`, lies above or
    below a bound, or where one of `others` holds.

    along: flags that are given the same value with it; needs: what has to hold where it is advised;
    do: advice in place of the one made from these."""

    flag: str
    values: tuple = ()
    above: float | None = None
    below: float | None = None
    others: tuple[With, ...] = ()
    along: tuple[str, ...] = ()
    needs: tuple[With, ...] = ()
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

    def way(
        self,
        tried: Sequence[Mapping[str, object]],
        given: Collection[str] = (),
        allowed: Collection | None = None,
    ) -> str:
        """What to give so that it holds with the settings tried; "" where nothing can be. given:
        flags, of which a list takes the place of its setting; allowed: those of the values that can
        be, where not all can."""
        fitting = [value for value in self.values if allowed is None or value in allowed]
        can_be = all(other.holds(settings) for other in self.needs for settings in tried)
        if not can_be or not (fitting or self.beyond):
            return ""
        listed = self.list_given(given)
        if listed:
            entry = f"a number {self.beyond}" if self.beyond else fitting[0]
            return f"add {entry} to --{listed}"
        if self.beyond:
            return f"give a --{self.flag} {self.beyond}"
        flags = " ".join(f"--{flag}={fitting[0]}" for flag in (self.flag, *self.along))
        return f"give {flags}"

    @property
    def beyond(self) -> str:
        """The bound in words; "" for none."""
        if self.above is not None:
            return f"of more than {self.above}"
        return "" if self.below is None else f"of less than {self.below}"

    def list_given(self, given: Collection[str]) -> str:
        """The list among the flags given that takes the place of this flag; "" for none."""
        own = LISTED.get(self.flag, ("",))[0]
        return own if own in given else ""


def together(ways: Sequence[str]) -> str:
    """Several ways to meet conditions, all of which are needed, in words."""
    return " and ".join(ways).replace(" and give ", " and ")


def why_unread(
    unmet: Sequence[With],
    tried: Sequence[Mapping[str, object]],
    given: Collection[str] = (),
    allowed: Collection | None = None,
) -> str:
    """Why a flag is not read with the settings tried, by the first of the conditions that the last
    of them does not meet, and what to do so that all of these hold. given: see With.way; allowed:
    kinds of storage that can be, where not all can."""
    first = unmet[0]
    flag = first.list_given(given) or first.flag
    came = f"with {flag}={tried[-1][first.flag]}: it is not read then"
    own = [condition.do for condition in unmet if condition.do]
    if own:
        return f"{came}; {own[0]}"
    ways = []
    for condition in unmet:
        values = allowed if condition.flag == "kv" else None
        ways.append(condition.way(tried, given, values))
    do = f", or {together(ways)}" if all(ways) else ""
    return f"{came}; leave it out{do}"


def refuse_alike(reasons: Mapping[str, str]) -> None:
    """Raise ValueError for the first flag that there is a reason against, and at once for all
    others that the same one is against. reasons: by flags, what came with them, what is allowed
    and what to do."""
    if reasons:
        first = next(iter(reasons.values()))
        alike = [name for name, reason in reasons.items() if reason == first]
        raise ValueError(f"{', '.join(alike)} {first}")


# Where keys and values can be stored in fewer than 16 bits.
INTEGERS_NEED = (
    With("reconstructor", ("zero",), others=(With("kv", ("select",)),)),
    With("prefill", ("exact",)),
    With("kv_tail_block", (1,)),
)
INTEGERS = With("key_bits", (8, 4, 3, 2), along=("value_bits",), needs=INTEGERS_NEED)
BY_KEYS = With("reconstructor", ("keys", "own_keys"))


def integers(*others: With) -> With:
    """Return what bits are where those of integers are read, or what others are."""
    return INTEGERS._replace(others=others)


BYTES = With("kv_bytes", above=0)  # picks bits where none are given
LEAVE_EITHER_OUT = "leave it or the budget out"
NO_BYTES = With("kv_bytes", (0,), do=LEAVE_EITHER_OUT)
NO_JOINT = With("kv_keep", (0,), do=LEAVE_EITHER_OUT)
# Where bits are as given: 16 of them are not, where a budget of bytes picks fewer.
OWN_BITS = With(
    "kv_bytes",
    (0,),
    others=(INTEGERS, With("kv", ("dense", "value_groups", "mixsga", "gqa", "cla"))),
    do="leave it out",
)


def signal(*names: str, others: tuple[With, ...] = ()) -> With:
    """Return that groups, or tokens, are kept by one of some signals, or what others are."""
    by_tokens = With("token_relevance", names)
    return With("relevance", names, others=(by_tokens, *others))


# Where something is dropped at all, and somebody has to choose what.
SOME_DROPPED = (
    With("kv_keep", below=1),
    With(
        "token_keep", below=1, others=(With("value_keep", below=1), With("kv_keep", above=0), BYTES)
    ),
)
# Where pairs are scored by the norm and a signal's power; `predictor` scores them itself.
BY_SIGNAL = ("future", "observed", "predictor_query", "oracle", "uniform", "random")
# What eval.py, sample.py and bench.py read of a storage and a selection, and beside what alone.
STORED_WITH = {
    **dict.fromkeys(("key_bits", "value_bits", "kv_bits"), (OWN_BITS,)),
    **dict.fromkeys(("relevance", "relevances", "refit"), SOME_DROPPED),
    "refit_ridge": (With("refit", (True,)), *SOME_DROPPED),
    "key_rounding": (integers(BYTES),),
    "key_block": (integers(BYTES),),
    "kv_sinks": (integers(BYTES, BY_KEYS),),
    **dict.fromkeys(("token_keep", "value_keep", "fixed_k"), (NO_BYTES, NO_JOINT)),
    "token_relevance": (NO_BYTES, NO_JOINT, With("token_keep", below=1)),
    "sinks": (NO_BYTES, *SOME_DROPPED),
    "allocation": SOME_DROPPED,
    "pool": (signal("observed"), *SOME_DROPPED),
    # A base is calibrated by these for budgets of bytes, whatever the signal.
    "hedge": (With("relevance", BY_SIGNAL, others=(BYTES,)), *SOME_DROPPED),
    "observers": (signal("observed", "future", "predictor_query", others=(BYTES,)), *SOME_DROPPED),
    **dict.fromkeys(
        ("past", "ahead"), (signal("future", "predictor_query", others=(BYTES,)), *SOME_DROPPED)
    ),
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
    what the table says, and for those that are unread alike.

    tried: settings, by their flags' names; those that lack a flag do not count where it is read"""
    reasons = {}
    for name in sorted({*given} & {*table}):
        ways = [values for values in tried if name in values]
        if not ways or any(all(w.holds(values) for w in table[name]) for values in ways):
            continue
        unmet = [w for w in table[name] if not w.holds(ways[-1])]
        reasons[name] = why_unread(unmet, ways, given)
    refuse_alike(reasons)


def check_storing(given: Collection[str], kv, select) -> None:
    """Raise ValueError for a flag of those given that storing by kv, config.KVConfig, and where
    that selects choosing by select, config.SelectConfig, leave unread."""
    if select.token_keep == 1:  # no token is dropped by it
        select = replace(select, token_relevance="")
    chooses = to_dict(select) if kv.kv == "select" else {}
    check_beside(given, STORED_WITH, [to_dict(kv) | chooses])


def check_listed(given: Collection[str], settings: Mapping[str, object]) -> None:
    """Raise ValueError for the first flag given that a list overrules, and for those that it
    overrules alike. settings: by their flags' names, those of lists among them.

    --n_groups beside --groups is read with --topk_groups: it says of how many groups those are."""
    read = {"n_groups"} if "topk_groups" in given else set()
    reasons = {}
    for name in sorted({*given} & {*LISTED} - read):
        other = next((other for other in LISTED[name] if settings.get(other)), "")
        if other:
            own = LISTED[name][0]
            do = "" if other == own else f", or give --{own}"
            came = f"with {other}={settings[other]}"
            reasons[name] = f"{came}: the list is measured; leave it or the list out{do}"
    refuse_alike(reasons)
