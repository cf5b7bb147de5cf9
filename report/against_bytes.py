"""bytes.png: loss and divergence against the bytes that are held, every method, and the envelope of
what no other beats. eval.py draws its own rows, report/page.py those of docs/results.md."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from report.figures import MARKERS, pyplot
from report.tables import label_of, share_of_dense

# What codes a prompt, by the first word of a row. ("Routed bits" are levels of --kv=select.)
CODED = {"routed": "routed transform coding", "kvtc": "KVTC's rule", "rdkv": "RDKV's rule"}
# Tables of docs/results.md that are drawn, and the fields that their rows must have: all are
# measured on WikiText-2's test split, prompts of 1,920 tokens and 128 that follow.
PICTURED = {
    "mixture": {"text": ("text:wikitext2.test.txt",)},
    "coding": {"text": ("text:wikitext2.test.txt",)},
    "bits_uniform": {},
    "bits_kept": {},
    "published": {"run": ("rivals", "coded", "rdkv")},
    "ablation": {
        "text": ("text:wikitext2.test.txt",),
        "what is stored": ("tokens and groups, routed bits, predictor_query, refit",),
    },
}
TICKS = (2, 3, 4, 6.25, 9, 12.5, 16, 22, 28, 40, 50, 75, 100)  # of the axis of bytes, %
SMALLEST = 0.002  # nats: where the axis of losses becomes logarithmic; runs differ by so much


class Point(NamedTuple):
    """A row of results."""

    series: str  # what it is drawn with
    held: float  # bytes, % of dense
    loss: float  # over dense, nats
    kl: float | None  # nats


def series_of(label: str) -> str:
    """Return what a row's point is drawn with, by report.tables.label_of: method and bits; for
    selection how it chooses, and what else it does."""
    words = label.split()
    method = words[0]
    if method in CODED:
        return CODED[method]
    bits = bits_of(label)
    more = ""
    if "K=0" in words:
        more += ", keys alone"
    if "from keys" in label:
        more += ", values from keys"
    elif "from own keys" in label:
        more += ", values from own keys"
    if "refit=" in label:
        more += ", refit"
    if method != "select":
        return f"{method}, {bits}{more}"
    keeps_all = "kv=1" in words or {"tokens=1", "groups=1"} <= {*words}
    if bits != "16 bits" and keeps_all:
        kind = "KIVI" if "nearest" in words else "keys rounded for queries"
        return f"uniform bits ({kind}){more}"
    how = "tokens" if "groups=1" in words else "tokens and groups"
    return f"{how}, {bits}, {words[1]}{more}"


def bits_of(label: str) -> str:
    """Return the bits of a row's numbers. Where they are not named they have 16."""
    found = re.search(r"keys:(\d+)\S* values:(\w+)", label)
    if found is None:
        return "16 bits"
    return "routed bits" if found[2] == "routed" else f"K{found[1]} V{found[2]}"


def points_of(rows: list[dict]) -> list[Point]:
    """Return the points of all rows of the first task whose metric is a loss."""
    losses = [r for r in rows if r["metric"] == "loss"]
    rows = [r for r in losses if r["task"] == losses[0]["task"]]
    sources: dict[str, list[Point]] = {}
    for r in rows:
        held = 100 * share_of_dense(r)
        over = r["value"] - r["dense_value"]
        series = series_of(label_of(r))
        source = f"{r['n']:,} tokens" if "n" in r else ""
        of_source = sources.setdefault(source, [])
        of_source.append(Point(series, held, over, r.get("kl")))
    return told_apart(sources)


def points_on(tables: dict[str, str]) -> list[Point]:
    """Return the points of the page's tables of PICTURED, those that save bytes. tables: Markdown
    by name."""
    sources: dict[str, list[Point]] = {}
    for name, only in PICTURED.items():
        points = []
        for cells in cells_of(tables.get(name, "")):
            if all(cells.get(title) in allowed for title, allowed in only.items()):
                points += points_across(cells) or points_of_row(cells)
        sources[f"table {name}"] = [p for p in points if p.held < 100]
    return told_apart(sources)


def points_of_row(cells: dict[str, str]) -> list[Point]:
    """Return the point of a table's row; none where it has no loss beside dense."""
    if not cells.get("over whole"):
        return []
    held = float(cells["of dense"].rstrip("%"))
    over = float(cells["over whole"])
    kl = float(cells["KL"]) if cells.get("KL") else None
    return [Point(series_of(cells["row"]), held, over, kl)]


def points_across(cells: dict[str, str]) -> list[Point]:
    """Return the points of a row of report/across.py, "KL / loss (bytes)" under each share of the
    bytes; none of another row."""
    points = []
    for title, cell in cells.items():
        found = re.fullmatch(r"([\d.]+) / ([-+][\d.]+)(?: \(([\d.]+)%\))?", cell)
        if found and title.endswith(" %"):
            held = float(found[3] or title.removesuffix(" %"))
            points.append(Point(cells["what is stored"], held, float(found[2]), float(found[1])))
    return points


def told_apart(sources: dict[str, list[Point]]) -> list[Point]:
    """Return all points. A series that several sources have is one in each: they were measured in
    different ways."""
    seen: Counter[str] = Counter()
    for points in sources.values():
        seen.update({p.series for p in points})
    out = []
    for source, points in sources.items():
        for p in points:
            name = p.series
            if seen[name] > 1:
                name = f"{name}, {source}"
            out.append(p._replace(series=name))
    return out


def cells_of(table: str) -> list[dict[str, str]]:
    """Return the cells of a Markdown table's lines by their titles."""
    lines = []
    for line in table.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            lines.append([cell.strip() for cell in cells[1:-1]])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def envelope(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (bytes, loss) that no other has both fewer or equal bytes and less or equal
    loss than, by bytes."""
    out: list[tuple[float, float]] = []
    for size, loss in sorted(set(points)):
        if not out or loss < out[-1][1]:
            out.append((size, loss))
    return out


def bytes_figure(path: Path, points: list[Point]) -> None:
    """Draw loss over dense, and beside it KL where points have one, against bytes held, with the
    lower envelope of three points or more."""
    diverging = [p for p in points if p.kl is not None and p.kl > 0]
    plt = pyplot()
    n = 2 if diverging else 1
    n_series = len({p.series for p in points})
    size = (8 * n, 6 + 0.15 * n_series)
    fig, axes = plt.subplots(1, n, figsize=size, layout="constrained", squeeze=False)
    left = axes[0][0]
    styles = styles_of(points)
    draw_series(left, [(p.series, p.held, p.loss) for p in points], styles)
    losses = [p.loss for p in points]
    bottom = min(-0.0005, 1.5 * min(losses))
    top = max(0.001, 1.5 * max(losses))
    left.set_yscale("symlog", linthresh=SMALLEST)
    left.set_ylim(bottom, top)
    left.set(ylabel="loss over dense, nats (of several texts the mean)", title="Loss against bytes")
    if diverging:
        right = axes[0][1]
        draw_series(right, [(p.series, p.held, p.kl) for p in diverging], styles)
        right.set_yscale("log")
        right.set(ylabel="KL from dense, nats", title="Divergence against bytes")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def styles_of(points: list[Point]) -> dict[str, dict]:
    """Return colour and marker of each series, in the order in which they come."""
    styles = {}
    for i, name in enumerate(dict.fromkeys(p.series for p in points)):
        marker = MARKERS[i % len(MARKERS)]
        styles[name] = {"color": f"C{i % 10}", "marker": marker}
    return styles


def draw_series(ax, points: list[tuple[str, float, float]], styles: dict[str, dict]) -> None:
    """Draw points (series, bytes, value), a line for each series in its style, and their
    envelope."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for name, held, value in points:
        by_name.setdefault(name, []).append((held, value))
    for name, mine in by_name.items():
        held, values = zip(*sorted(mine), strict=True)
        ax.plot(held, values, ls="-", lw=0.6, ms=6, label=name, **styles[name])
    everything = [point for mine in by_name.values() for point in mine]
    best = envelope(everything)
    if len(best) > 2:
        held, values = zip(*best, strict=True)
        ax.plot(held, values, color="k", lw=3, alpha=0.25, label="lower envelope")
    least, _ = min(everything)
    mark_bytes(ax, least)


def mark_bytes(ax, least: float) -> None:
    """Let the axis across show bytes, logarithmically, from about `least` percent on."""
    ax.set_xscale("log")
    ax.margins(x=0.05)
    ticks = [t for t in TICKS if t >= 0.8 * least]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.set(xlabel="bytes held, % of dense (scales, masks, offsets, whole tokens included)")
    ax.grid(alpha=0.3)
