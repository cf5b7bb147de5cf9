"""Tables of results as text: the one printer, and the table of results that train.py and eval.py
print."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple


class Column(NamedTuple):
    """A column's title, and its width in characters."""

    title: str
    width: int


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text: the titles, then the rows; the first column stands to the left, all others to
    the right."""
    lines = []
    for cells in ([c.title for c in columns], *rows):
        first, *others = (
            text.rjust(column.width) if i else text.ljust(column.width)
            for i, (text, column) in enumerate(zip(cells, columns, strict=True))
        )
        lines.append(" ".join([first, *others]))
    return lines


def with_spread(values: list[float]) -> str:
    """The mean, and of several values the standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} +- {stdev(values):.4f}"


def result_table(rows: list[dict]) -> str:
    """The rows as text, one table per task: one line per method and setting, the value as mean +-
    standard deviation over seeds, and what it is above the same model's with whole values, where
    that is known."""
    names = list(dict.fromkeys(r["task"] for r in rows))
    if len(names) == 1:
        return table_of_task(rows)
    return "\n\n".join(
        f"{name}\n{table_of_task([r for r in rows if r['task'] == name])}" for name in names
    )


def table_of_task(rows: list[dict]) -> str:
    """One task's rows as text. Columns that no row has a number for are left out."""
    lines: dict[tuple, list[dict]] = {}  # the same setting with several seeds is one line
    for r in rows:
        lines.setdefault((label_of(r), r["value_keep"], r["token_keep"]), []).append(r)
    has_kl = any("kl" in r for r in rows)
    has_cost = any("tokens_per_s" in r for r in rows)
    columns = [
        Column("row", max(34, *(len(label) for label, *_ in lines))),
        Column("trainable", 10),
        Column("KV kept", 8),
        Column("whole", 7),
        Column("cache bytes", 14),
        Column("of dense", 9),
        Column(rows[0]["metric"], 19),
        Column("over whole", 10),
    ]
    if has_kl:
        columns.append(Column("KL", 8))
    columns.append(Column("seeds", 5))
    if has_cost:
        columns += [Column("tokens/s", 9), Column("peak memory", 11)]
    cells = []
    for (label, *_), same in lines.items():
        cells.append([label, *storage_cells(same[0]), *value_cells(same)])
        if has_kl:
            cells[-1].append(divergence(same))
        cells[-1].append(str(len(same)))
        if has_cost:
            cells[-1] += cost_cells(same[0])
    return "\n".join(lay_out(columns, cells))


def label_of(r: dict) -> str:
    """What a row is called: its name or method, the signal that chooses, the setting."""
    parts = [
        r.get("name", r["method"]),
        r["relevance"] if r["method"] == "select" else "",
        r.get("setting", ""),
    ]
    return " ".join(p for p in parts if p)


def share_of_dense(r: dict) -> float:
    """A row's bytes over dense ones, in 16 bits; rows of before know those in their own dtype."""
    return r.get("of_dense", r["cache_bytes"] / r["dense_bytes"])


def storage_cells(r: dict) -> list[str]:
    """Parameters, shares kept and bytes of a row."""
    return [
        f"{r['trainable_parameters']:,d}",
        f"{r['kv_kept_layers']:.1%}",
        f"{r['kv_kept_model']:.1%}",
        f"{r['cache_bytes']:,d}",
        f"{share_of_dense(r):.2%}",
    ]


def value_cells(same: list[dict]) -> list[str]:
    """The value of a row over its seeds, and what it is above that with whole values."""
    value = with_spread([r["value"] for r in same])
    if same[0]["n_groups"] == 1:
        return [value, ""]
    return [value, f"{mean(r['value'] - r['dense_value'] for r in same):+.4f}"]


def divergence(same: list[dict]) -> str:
    """The mean KL divergence of a row over its seeds, where all have one."""
    if not all("kl" in r for r in same):
        return ""
    return f"{mean(r['kl'] for r in same):.5f}"


def cost_cells(r: dict) -> list[str]:
    """Speed and peak memory of a trained row; a CPU tells no peak."""
    speed = r.get("tokens_per_s")
    if not speed:
        return ["", ""]
    peak = r.get("peak_memory_bytes")
    return [f"{speed:,.0f}", f"{peak / 2**30:.2f} GiB" if peak else "n/a"]


def reuse_note(rows: list[dict]) -> str:
    """What a second question gets from a cache compressed for a first one, beside what that one
    got; empty without both tasks."""
    first, second = (
        {
            (r["relevance"], r["setting"]): r["value"]
            for r in rows
            if r["task"] == task and r["method"] == "select"
        }
        for task in ("needle", "needle_reuse")
    )
    lines = [
        f"{how[0]}: first question {first[how]:.3f}, second {second[how]:.3f}"
        for how in first
        if how in second
    ]
    if not lines:
        return ""
    return "\nReuse of a cache compressed for the first question:\n" + "\n".join(lines)
