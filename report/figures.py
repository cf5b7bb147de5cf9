"""Pictures of results: report.png, groups.png (ST figure 1), layers.png and speed.png. bytes.png is
drawn by report/against_bytes.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from torch import Tensor

from report.tables import text_hash
from selector import Selection
from storage.layout import cdiv

MARKERS = "osv^D<>Pp*X"
SWEEP = ", other K (sweep)"  # ends the name of rows that are one model with other Ks


def pyplot():
    """matplotlib.pyplot, drawing to files. It takes a second to import, so only who draws does."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def column(rows: list[dict], field: str) -> list:
    """One field of every row."""
    return [r[field] for r in rows]


def where(rows: list[dict], field: str, value) -> list[dict]:
    """The rows that have a value in a field."""
    return [r for r in rows if r[field] == value]


# -- report.png


def report_figure(
    folder: Path, rows: list[dict], curves: dict[str, list[dict]], masks: Tensor | None
) -> None:
    """Draw report.png: the loss curves that there are, the first task's metric against whole-model
    KV kept, and where tokens kept groups, which."""
    panels = []
    after = dict(curves)
    before = after.pop("pretrain", None)
    if before is not None:
        panels.append(partial(draw_curves, curves={"pretrain": before}))
    if after:
        panels.append(partial(draw_curves, curves=after))
    task = rows[0]["task"]
    of_task = where(rows, "task", task)
    panels.append(partial(draw_metric, rows=of_task))
    if masks is not None:
        panels.append(partial(draw_masks, masks=masks))
    width = min(2, len(panels))
    save_panels(folder / "report.png", panels, width, (7, 4.5), dpi=100)


def save_panels(
    path: Path, panels: list[Callable], width: int, size: tuple[float, float], dpi: int
) -> None:
    """Draw panels into a picture, `width` of them side by side, each of a size in inches. A panel
    is a function of its axes."""
    plt = pyplot()
    height = cdiv(len(panels), width)
    across, down = size
    fig, axes = plt.subplots(
        height,
        width,
        figsize=(across * width, down * height),
        layout="constrained",
        squeeze=False,
    )
    for ax, draw in itertools.zip_longest(axes.flat, panels):
        if draw is None:
            ax.remove()
        else:
            draw(ax)
    fig.savefig(path, dpi=dpi)
    plt.close(fig)


def draw_curves(ax, curves: dict[str, list[dict]]) -> None:
    """Training losses of pretraining, or of what came after it: at each step, the first of them 1,
    the mean of the last 5."""
    for name, points in curves.items():
        steps = [p for p in points if "loss" in p]
        numbers = [p["step"] + 1 for p in steps]
        losses = [p["loss"] for p in steps]
        smooth = []
        for end in range(1, len(losses) + 1):
            newest = losses[max(0, end - 5) : end]
            smooth.append(mean(newest))
        ax.plot(numbers, smooth, label=name, lw=1)
    title = "Adaptation"
    unit = ", nats per token"
    if "pretrain" in curves:
        title = "Pretraining"
    elif any(name.startswith("select") for name in curves):
        title = "Predictors of relevance"
        unit = ""
    loss = f"training loss{unit}, mean of 5 steps"
    ax.set(xlabel="step", ylabel=loss, title=f"{title} (one seed)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8)
    widen(ax)


def draw_metric(ax, rows: list[dict]) -> None:
    """One task's metric against the KV kept in the whole model: of rows of several seeds the mean,
    with a bar of one standard deviation; of several texts each by itself; a sweep over K joined
    with the row that it belongs to. A base far above the others is named, not drawn."""
    by_name: dict[str, list[dict]] = {}
    for r in rows:
        name = r.get("name", setting_of(r))
        by_name.setdefault(name, []).append(r)
    metric = rows[0]["metric"]
    task = rows[0]["task"]
    beside = ""
    if len(by_name) > 1 and "base" in by_name:
        base = by_name.pop("base")
        beside = f" (base without adapter: {base[0]['value']:.2f})"
    of_texts = [r for r in rows if "text" in r]
    texts = {}
    for r in of_texts:
        texts[text_hash(r)] = r["text"]["corpus"]
    for name, mine in by_name.items():
        if SWEEP in name:
            trained = by_name[name.removesuffix(SWEEP)]
            draw_sweep(ax, name, mine + trained)
        elif "name" in mine[0] and len(texts) < 2:
            draw_seeds(ax, name, mine)
        else:
            draw_texts(ax, name, mine, [*texts])
    if len(texts) > 1:
        for marker, text in zip(itertools.cycle(MARKERS), texts.values(), strict=False):
            ax.plot([], [], marker, color="grey", label=text)
    ax.legend(fontsize=8)
    widen(ax)
    ax.set(
        xlabel="KV kept in the whole model, %",
        ylabel=metric if metric == task else f"{metric} ({task})",
        title=f"{metric.capitalize()} against KV kept{beside}{seeds_of(rows)}",
    )


def kept_and_values(rows: list[dict]) -> tuple[list[float], list[float]]:
    """The KV kept in the whole model in % and the metric's value of every row, the least first."""
    rows = sorted(rows, key=lambda r: r["kv_kept_model"])
    kept = [100 * r["kv_kept_model"] for r in rows]
    values = column(rows, "value")
    return kept, values


def draw_texts(ax, name: str, rows: list[dict], texts: list[str]) -> None:
    """The rows of one setting in one colour, those of each text with its own marker. texts: their
    sha256; empty where the task has none."""
    colour = None
    for marker, text in zip(itertools.cycle(MARKERS), texts or [""], strict=False):
        mine = [r for r in rows if text_hash(r) == text]
        kept, values = kept_and_values(mine)
        label = name if colour is None else None
        (line,) = ax.plot(kept, values, marker, ms=5, color=colour, label=label)
        colour = line.get_color()


def widen(ax) -> None:
    """Let the axis of a metric span 1 % of its value at least, so that noise does not look like an
    effect."""
    low, high = ax.get_ylim()
    middle = (low + high) / 2
    least = 0.01 * abs(middle)
    half = max(high - low, least) / 2
    ax.set_ylim(middle - half, middle + half)


def draw_seeds(ax, name: str, rows: list[dict]) -> None:
    """The mean of a row of the table over its seeds; a bar of one standard deviation where they
    are several."""
    kept = 100 * mean(r["kv_kept_model"] for r in rows)
    values = column(rows, "value")
    middle = mean(values)
    bar = stdev(values) if len(values) > 1 else None
    ax.errorbar([kept], [middle], yerr=bar, fmt="o", ms=5, capsize=4, label=name)


def draw_sweep(ax, name: str, rows: list[dict]) -> None:
    """The values of one seed's model with every number of groups kept, the trained one among
    them."""
    seed = rows[0]["seed"]
    mine = where(rows, "seed", seed)
    kept, values = kept_and_values(mine)
    ax.plot(kept, values, ".-", lw=1, label=f"{name}, one seed")


def seeds_of(rows: list[dict]) -> str:
    """How many seeds trained the rows, as the end of a title; empty where nothing was trained."""
    seeds = {r["seed"] for r in rows if r["trainable_parameters"]}
    if len(seeds) > 1:
        return f"\nmean of {len(seeds)} seeds, bars: standard deviation"
    return "\none seed" if seeds else ""


def setting_of(r: dict) -> str:
    """What a row without a name is called in report.png."""
    if r["method"] == "dense":
        return "dense"
    if r["method"] == "value_groups":
        return f"{r['basis']}, S = {r['n_groups']}"
    if r["method"] == "select":
        signal = r["relevance"].split(" ")[0]
        return f"{signal}, {r.get('setting')}"
    return r["setting"]


def draw_masks(ax, masks: Tensor) -> None:
    """Which groups each token kept. masks: (layers, T, S), shares of heads."""
    L, T, S = masks.shape
    image = ax.imshow(
        masks.transpose(1, 2).reshape(L * S, T).numpy(),
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    named = range(0, L, cdiv(L, 12))  # more would not be legible
    ax.set(
        xlabel="token",
        ylabel="compressed layer (its value groups top to bottom)",
        title="Groups kept by each token",
        yticks=[S * i + (S - 1) / 2 for i in named],
        yticklabels=[str(i) for i in named],
    )
    ax.figure.colorbar(image, ax=ax, label="share of heads that kept it")
    for i in range(1, L):
        ax.axhline(S * i - 0.5, color="k", lw=0.5)


# -- groups.png


def groups_figure(folder: Path, choice: Selection, title: str) -> None:
    """Draw groups.png, the paper's figure 1: how many groups tokens keep, and how many against
    their rank by relevance."""
    plt = pyplot()
    S = choice.mask.size(-1)
    C = choice.mask.size(-2)
    n_kept = (choice.mask > 0).sum(-1)
    kept = n_kept.flatten(0, -2).cpu()  # (masks, C)
    score = choice.score.flatten(0, -2).cpu()
    order = score.argsort(-1, descending=True)
    by_rank = kept.gather(-1, order).float().mean(0)
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    tokens = kept.flatten().bincount(minlength=S + 1)
    shares = tokens / kept.numel()
    left.bar(range(S + 1), shares.tolist(), color="tab:blue")
    left.set(xlabel=f"groups kept of {S}", ylabel="share of tokens", title="Groups kept per token")
    width = max(1, C // 64)
    n_bins = C // width
    full = by_rank[: n_bins * width]
    bins = full.view(-1, width).mean(-1)
    ranks = [100 * i / n_bins for i in range(n_bins)]
    right.step(ranks, bins.tolist(), where="post", color="tab:blue")
    right.set(
        xlabel="rank by relevance, % of the context (0: most relevant)",
        ylabel="groups kept, mean",
        ylim=(0, S * 1.02),
        title="Groups kept against relevance",
    )
    fig.suptitle(title)
    fig.savefig(folder / "groups.png", dpi=100)
    plt.close(fig)


# -- layers.png

OF_MAPS = {"all": "all heads of the layer", "own": "each head's own"}
OF_KEYS = {"integers": "integers", "coordinates": "calibrated coordinates"}


def layers_figure(folder: Path, rows: list[dict]) -> None:
    """Draw layers.png of the rows of benchmarks/layers.py: what keys tell of values, after how many
    tokens the maps have saved their own bits, and what few bits of keys do to logits."""
    layers = [r for r in rows if r["impl"] != "all layers"]
    numbers = [int(r["impl"].removeprefix("layer ")) for r in layers]
    plt = pyplot()
    fig, (told, pays, error) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for marker, (name, label) in zip(MARKERS, OF_MAPS.items(), strict=False):
        share = [100 * r[f"told_{name}"] for r in layers]
        tokens = [r[f"pays_after_{name}"] for r in layers]
        line = f"{marker}-"
        told.plot(numbers, share, line, ms=4, lw=1, label=label)
        pays.plot(numbers, tokens, line, ms=4, lw=1, label=label)
    told.set_ylim(0, 100)
    told.set(ylabel="energy told, %", title="Values that keys tell, as W_o writes them")
    pays.set_yscale("log")
    pays.set(ylabel="tokens", title="Tokens after which W has saved its own bits")
    ways = tuple(OF_KEYS)
    fields = [f for f in layers[0] if f.startswith(ways)]
    for marker, field in zip(MARKERS, fields, strict=False):
        way, _, bits = field.partition("_")
        bits = int(bits) + 0.5
        label = f"{OF_KEYS[way]}, {bits:g} bits a number"
        errors = column(layers, field)
        error.plot(numbers, errors, f"{marker}-", ms=4, lw=1, label=label)
    error.set_yscale("log")
    error.set(ylabel="error / variance", title="Squared error of logits, keys of few bits")
    for ax in (told, pays, error):
        ax.set(xlabel="layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(folder / "layers.png", dpi=100)
    plt.close(fig)


# -- speed.png


def speed_figure(folder: Path, rows: list[dict]) -> None:
    """Draw speed.png: tokens per second of benchmarks/speed.py's rows and the limits of this
    machine, a panel for each number of sequences that are decoded, one for training against the
    number of sequences, one for attention alone."""
    decoded = where(rows, "task", "decode")
    panels = []
    for batch_size in sorted({r["batch_size"] for r in decoded}):
        mine = where(decoded, "batch_size", batch_size)
        title = f"Decoding, batch {batch_size}"
        panels.append(partial(draw_speed, title=title, rows=mine, along="n_tokens"))
    trained = where(rows, "task", "training")
    if trained:
        title = f"Training, sequences of {trained[0]['n_tokens']:,} tokens"
        panels.append(partial(draw_speed, title=title, rows=trained, along="batch_size"))
    alone = where(rows, "task", "attention")
    if alone:
        title = f"Attention alone, all layers, batch {alone[0]['batch_size']}"
        panels.append(partial(draw_speed, title=title, rows=alone, along="n_tokens"))
    save_panels(folder / "speed.png", panels, 3, (6, 5.5), dpi=80)


def draw_speed(ax, title: str, rows: list[dict], along: str) -> None:
    """Tokens per second against rows' field `along`: measured with a line, the limit by bytes of
    the same rows dashed in the same colour, and the highest of their limits by FLOPs dotted."""
    series: dict[str, list[dict]] = {}
    for r in rows:
        series.setdefault(r["impl"], []).append(r)
    for marker, (name, mine) in zip(itertools.cycle(MARKERS), series.items(), strict=False):
        mine = sorted(mine, key=lambda r: r[along])
        at = column(mine, along)
        speed = column(mine, "tokens_per_s")
        (line,) = ax.plot(at, speed, marker=marker, label=name)
        bound = column(mine, "limit_by_bytes")
        ax.plot(at, bound, "--", color=line.get_color(), lw=0.8)
    places = sorted({r[along] for r in rows})
    flops = []
    for at in places:
        here = where(rows, along, at)
        limits = column(here, "limit_by_flops")
        flops.append(max(limits))
    ax.plot([], [], "--", color="grey", lw=0.8, label="limit by bytes, in its colour")
    ax.plot(places, flops, ":", color="k", label="limit by FLOPs")
    ax.set_xscale("log")
    ax.set_yscale("log")
    named = [f"{at:,}" for at in places]
    ax.set_xticks(places, named, minor=False)
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
    of = "tokens of context" if along == "n_tokens" else "sequences in a step"
    ax.set(xlabel=of, ylabel="tokens per second", title=title)
    ax.legend(fontsize=7)
