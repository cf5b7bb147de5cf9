"""What a setting is: a field of a frozen dataclass that is also a command-line flag, declared with
its help and the values that it may have, checked in one line, and read from a file."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import field, fields
from fractions import Fraction

MAX_SEED = 2**32 - 1  # a larger one times steps and ranks would leave torch.manual_seed's range
DTYPES = ("auto", "float32", "bfloat16")
FORMAT = 2  # of settings in a file, of those classes that had another
# Flags whose value names files or folders, or corpora such as text:PATH.
PATHS = (
    "out_dir",
    "init_from",
    "kv_from",
    "data_dir",
    "to",
    "results",
    "beside",
    "prompt_file",
    "park",
    "unpark",
    "questions",
    "shots_from",
    "items",
    "answered",
    "dataset",
    "adapt_dataset",
    "test_dataset",
    "calibrate",
)


def opt(
    default,
    help: str,
    choices: tuple | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    each_of: tuple[str, ...] | None = None,
):
    """Declare a dataclass field that is also a command-line flag, and the values that it may have.

    choices: all of them; least, above, most, below: bounds of a number, `least` and `most`
    included; each_of: what the entries of a comma-separated list are chosen from"""
    metadata = {"help": help, "choices": choices, "each_of": each_of}
    bounds = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={**metadata, **bounds})


def check(ok: bool, came: str, allowed: str, do: str) -> None:
    """Raise the one-line ValueError every setting uses: what came, what is allowed, what to do."""
    if not ok:
        raise ValueError(f"{came}: {allowed}; {do}")


def one_line(e: object) -> str:
    """Return str(e) on one line, for messages that quote somebody else's error."""
    return " ".join(str(e).split()) or type(e).__name__


def check_fields(settings) -> None:
    """Raise ValueError for a field of a dataclass whose value is not among those that its `opt`
    allows."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        m = f.metadata
        if m["choices"]:
            check_choice(f.name, value, m["choices"])
        if m["each_of"]:
            check_list(f.name, value, m["each_of"])
        if not in_range(value, m):
            usual = f.default
            if usual == m["least"] and m["most"] == 1:  # off
                usual = 1 / 8
            example = f"give for example {usual:g}"
            if m["most"] is None and m["below"] is None and m["above"] is None:
                example = f"give --{f.name}={m['least']} or more"
            raise ValueError(f"{f.name}={value}: {range_text(m)}; {example}")


def check_choice(name: str, value, allowed: tuple) -> None:
    """Raise ValueError where a flag's value is none of those allowed."""
    known = ", ".join(str(a) for a in allowed if a != "")
    check(value in allowed, f"{name}={value!r}", f"one of {known}", "choose one")


def check_list(name: str, text: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError where an entry of a comma-separated flag is none of those allowed."""
    known = all(entry in allowed for entry in comma_list(text))
    check(known, f"{name}={text!r}", f"a list of {', '.join(allowed)}", "separate by commas")


def in_range(value, bounds) -> bool:
    """Say whether a value lies within the bounds of its `opt`; whatever has none does."""
    return (
        (bounds["least"] is None or value >= bounds["least"])
        and (bounds["above"] is None or value > bounds["above"])
        and (bounds["most"] is None or value <= bounds["most"])
        and (bounds["below"] is None or value < bounds["below"])
    )


def range_text(bounds) -> str:
    """Return the bounds of an `opt` in words: at least 1; more than 0; lies in (0, 1]."""
    least = bounds["least"]
    above = bounds["above"]
    if bounds["most"] is None and bounds["below"] is None:
        return f"more than {above}" if least is None else f"at least {least}"
    low = f"({above}" if least is None else f"[{least}"
    high = f"{bounds['below']})" if bounds["most"] is None else f"{bounds['most']}]"
    return f"lies in {low}, {high}"


def comma_list(text: str) -> list[str]:
    """Return the entries of a comma-separated flag, without blanks."""
    return [t.strip() for t in text.split(",") if t.strip()]


def in_a_shell(text: str) -> str:
    """Return the value of a flag of PATHS as a shell would give it that saw each path by itself: ~
    is the user's home at the beginning, after text: and after a comma."""
    entries = []
    for entry in text.split(","):
        kind = "text:" if entry.startswith("text:") else ""
        entries.append(kind + os.path.expanduser(entry.removeprefix(kind)))
    return ",".join(entries)


def count_kept(ratio: float | str | Fraction, n: int, least: int = 0) -> int:
    """Return floor(ratio * n) in exact arithmetic: 0.7 means 7/10, not its binary neighbour. The
    only place where a ratio becomes a count.

    ratio: share kept, 0 < ratio <= 1; n: how many there are, >= 1; least: what is kept anyway.
    Raises ValueError outside the range or if nothing is kept."""
    r = ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))
    check(
        0 < r <= 1, f"a budget of {ratio}", "the share kept lies in (0, 1]", "give for example 0.5"
    )
    kept = max(int(r * n), least)
    check(
        kept >= 1,
        f"a budget of {ratio} of {n}",
        "at least one must be kept",
        f"give {float(Fraction(1, n)):.4g} or more",
    )
    return kept


def to_dict(cfg) -> dict:
    """Return a dataclass as plain JSON types."""
    return dataclasses.asdict(cfg)


def to_file(cfg) -> dict:
    """Return a dataclass as from_dict reads it from a file: to_dict, and which format that is where
    there was another."""
    formatted = hasattr(cfg, "USUAL_IN_FORMAT_1")
    return to_dict(cfg) | ({"format": FORMAT} if formatted else {})


def from_dict(cls: type, d: dict):
    """Make the dataclass `cls` from a dict read from a file; what an older file lacks takes its
    default, or the value in cls.UNNAMED, where that is not what was done before the setting had a
    name; those in cls.GONE are no settings any more. In a file that names no format the values in
    cls.USUAL_IN_FORMAT_1 stand for today's defaults: they were written, and taken, as if nobody
    had given them. ValueError names unknown or mistyped entries."""
    kinds = {f.name: str(f.type) for f in fields(cls)}
    usual = getattr(cls, "USUAL_IN_FORMAT_1", {})
    d = {name: value for name, value in d.items() if name not in getattr(cls, "GONE", ())}
    if usual and d.get("format") == FORMAT:
        del d["format"]
    else:
        d = {name: value for name, value in d.items() if (name, value) not in usual.items()}
    unknown = sorted(set(d) - set(kinds))
    check(
        not unknown,
        f"{cls.__name__} in a file",
        f"unknown entries {unknown}",
        "was it written by another version?",
    )
    for name, value in d.items():
        kind = kinds[name]
        fits = isinstance(
            value, {"int": int, "float": (int, float), "str": str, "bool": bool}[kind]
        )
        if isinstance(value, bool):  # to Python an int, too
            fits = kind == "bool"
        check(
            fits,
            f"{cls.__name__}.{name}={value!r} in a file",
            f"should be {kind}",
            "was the file edited?",
        )
    unnamed = getattr(cls, "UNNAMED", {}) if d else {}  # an empty dict is of no file
    return cls(**unnamed | d)
