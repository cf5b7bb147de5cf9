"""Tables of results as text: the one printer, the table of results that train.py and eval.py print,
and the rows that such a call left."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from measure_config import RIVALS
from settings.fields import check

# Numbers of rows that have a mean over texts.
MEANT = (
    "value",
    "dense_value",
    "kl",
    "kv_kept_layers",
    "kv_kept_model",
    "value_keep",
    "token_keep",
    "cache_bytes",
    "dense_bytes",
    "of_dense",
)


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


def rows_beside(name: str) -> list[dict]:
    """The rows that an earlier call of eval.py left in a folder. ValueError where there are
    none."""
    try:
        rows = json.loads((Path(name) / "results.json").read_text())
        fits = isinstance(rows, list) and all(
            {"task", "metric", "value", "dense_value", "cache_bytes", "dense_bytes"} <= set(r)
            for r in rows
        )
    except (OSError, ValueError, TypeError) as err:
        raise ValueError(
            f"beside={name}: {err}; a folder with eval.py's results.json is needed; give "
            "--results of another call"
        ) from None
    check(
        fits,
        f"beside={name}",
        "its results.json is not eval.py's",
        "give --results of another call",
    )
    return rows


def result_table(rows: list[dict]) -> str:
    """The rows as text, one table per task: one line per method, setting and text, the value as
    mean +- standard deviation over seeds, and what it is above the same model's with whole values,
    where that is known; then, of several texts, the mean and the worst."""
    by_task: dict[str, list[dict]] = {}
    for r in rows:
        by_task.setdefault(r["task"], []).append(r)
    tables = []
    for name, mine in by_task.items():
        title = f"{name}\n" if len(by_task) > 1 else ""
        tables.append(title + table_of_task(mine) + texts_table(mine))
    return "\n\n".join(tables)


def table_of_task(rows: list[dict]) -> str:
    """One task's rows as text. Columns that no row has a number for are left out."""
    lines: dict[tuple, list[dict]] = {}  # the same setting with several seeds is one line
    for r in rows:
        setting = (label_of(r), text_hash(r), r["value_keep"], r["token_keep"])
        lines.setdefault(setting, []).append(r)
    names = {text_hash(r): r["text"]["corpus"] for r in rows if "text" in r}
    has_kl = any("kl" in r for r in rows)
    has_cost = any("tokens_per_s" in r for r in rows)
    columns = [
        Column("row", max(34, *(len(label) for label, *_ in lines))),
        *text_columns(names),
        Column("trainable", 10),
        Column("KV kept", 8),
        Column("whole model", 11),
        Column("cache bytes", 14),
        Column("of dense", 9),
        Column(rows[0]["metric"], 19),
        Column(over_whole(rows[0]["metric"]), 16),
    ]
    if has_kl:
        columns.append(Column("KL", 8))
    columns.append(Column("seeds", 5))
    if has_cost:
        columns += [Column("tokens/s", 9), Column("peak memory", 11)]
    cells = []
    for (label, text, *_), same in lines.items():
        read = [names[text]] if len(names) > 1 else []
        cells.append([label, *read, *storage_cells(same[0]), *value_cells(same)])
        if has_kl:
            cells[-1].append(divergence(same))
        cells[-1].append(str(len(same)))
        if has_cost:
            cells[-1] += cost_cells(same[0])
    return "\n".join(lay_out(columns, cells))


def over_whole(metric: str) -> str:
    """The title of what a row's value is above that with whole values, with its unit."""
    units = {"perplexity": ", ppl", "loss": ", nats"}
    return "over whole" + units.get(metric, "")


def label_of(r: dict) -> str:
    """What a row is called: its name or method, the signal that chooses, the setting."""
    parts = [
        r.get("name", r["method"]),
        r["relevance"] if r["method"] == "select" else "",
        r.get("setting", ""),
    ]
    return " ".join(p for p in parts if p)


def text_hash(r: dict) -> str:
    """The sha256 of the text that a row is measured on; "" where it names none."""
    return r["text"]["sha256"] if "text" in r else ""


def text_columns(names: dict[str, str]) -> list[Column]:
    """The column of the texts' names, where there are several. names: by their sha256."""
    if len(names) < 2:
        return []
    return [Column("text", max(4, *(len(name) for name in names.values())))]


def by_setting(rows: list[dict]) -> list[list[dict]]:
    """The rows of each task and setting on all its texts. What stands there again on the same text,
    or on none, begins a list of its own."""
    lists: dict[tuple, list[dict]] = {}
    seen: Counter[tuple] = Counter()
    for r in rows:
        setting = (r["task"], label_of(r))
        before = seen[(*setting, text_hash(r))]
        seen[(*setting, text_hash(r))] += 1
        lists.setdefault((*setting, before), []).append(r)
    return list(lists.values())


def mean_over_texts(rows: list[dict]) -> list[dict]:
    """The rows, those of one setting on several texts as one row with the means of their
    numbers."""
    out = []
    for same in by_setting(rows):
        names = [name for name in MEANT if all(name in r for r in same)]
        means = {name: mean(r[name] for r in same) for name in names}
        out.append(same[0] | means if len(same) > 1 else same[0])
    return out


def lost_to_dense(r: dict) -> float:
    """What a row's loss is above that with whole values, in nats; of a score, where more is better,
    how far it is below."""
    if r["metric"] == "perplexity":
        return math.log(r["value"] / r["dense_value"])
    if r["metric"] == "loss":
        return r["value"] - r["dense_value"]
    return r["dense_value"] - r["value"]


def texts_table(rows: list[dict]) -> str:
    """One task's settings over several texts: the mean and the worst loss over dense and KL, with
    the worst text's name; empty where there are fewer than two texts."""
    several = [same for same in by_setting(rows) if len(same) > 1 and same[0]["method"] != "dense"]
    if not several:
        return ""
    cells = [[label_of(same[0]), f"{mean(map(share_of_dense, same)):.2%}"] for same in several]
    has_kl = any("kl" in r for same in several for r in same)
    for line, same in zip(cells, several, strict=True):
        worst = max(same, key=lost_to_dense)
        line.append(f"{mean(map(lost_to_dense, same)):+.4f}")
        line += [f"{lost_to_dense(worst):+.4f}", worst["text"]["corpus"]]
        if has_kl:
            line += kl_cells(same)
    is_loss = rows[0]["metric"] in ("loss", "perplexity")
    over = "over whole, nats" if is_loss else "below whole"
    columns = [Column("of dense", 9), Column(over, len(over)), Column("worst", 8)]
    text = Column("text", max(len(r["text"]["corpus"]) for same in several for r in same))
    columns.append(text)
    if has_kl:
        columns += [Column("KL", 8), Column("worst", 8), text]
    name = Column("row", max(34, *(len(line[0]) for line in cells)))
    title = f"\nOver {len(several[0])} texts, the mean and the worst:\n"
    return title + "\n".join(lay_out([name, *columns], cells))


def kl_cells(same: list[dict]) -> list[str]:
    """The mean KL of one setting over texts, the worst and its text's name, where all have one."""
    if not all("kl" in r for r in same):
        return ["", "", ""]
    worst = max(same, key=lambda r: r["kl"])
    return [divergence(same), f"{worst['kl']:.5f}", worst["text"]["corpus"]]


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
    if same[0]["n_groups"] == 1 and same[0]["method"] not in RIVALS:
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
