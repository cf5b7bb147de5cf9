"""The pictures that eval.py draws: report.png, groups.png (ST figure 1) and bytes.png."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from torch import Tensor

from selector import Choice


def report(
    folder: Path, rows: list[dict], curves: dict[str, list[dict]], masks: Tensor | None
) -> None:
    """Draw report.png: loss curves (mean of 5 steps), perplexity against whole-model KV kept, and
    which groups each token kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ((first, second), (third, fourth)) = plt.subplots(
        2, 2, figsize=(14, 9), layout="constrained"
    )
    for name, points in curves.items():
        points = [p for p in points if "loss" in p]
        smooth = [
            mean(q["loss"] for q in points[max(0, i - 4) : i + 1]) for i in range(len(points))
        ]
        (first if name == "pretrain" else second).plot(
            [p["step"] for p in points], smooth, label=name, lw=1
        )
    predicts = any(name.startswith("select") for name in curves)
    for ax, title in (
        (first, "Pretraining"),
        (second, "Predictors of relevance" if predicts else "Adaptation"),
    ):
        ax.set(
            xlabel="step",
            ylabel="training loss, nats per token"
            if ax is first or not predicts
            else "training loss",
            title=title,
        )
    by_name: dict[str, list[dict]] = {}
    for r in rows:
        if r["task"] == rows[0]["task"]:  # one task to a picture
            series = {
                "dense": "dense",
                "value_groups": f"{r['basis']}, S = {r['n_groups']}",
                "select": f"{r['relevance'].split(' ')[0]}, {r.get('setting')}",
            }
            by_name.setdefault(r.get("name", series.get(r["method"], r["setting"])), []).append(r)
    # far above the others: named, not drawn
    base = by_name.pop("base", []) if len(by_name) > 1 else []
    for name, mine in by_name.items():
        mine = sorted(mine, key=lambda r: r["kv_kept_model"])
        third.plot(
            [100 * r["kv_kept_model"] for r in mine],
            [r["value"] for r in mine],
            "o",
            ls="-" if "sweep" in name else "",
            ms=5,
            label=name,
        )
    metric = rows[0]["metric"]
    beside = f" (base without adapter: {base[0]['value']:.2f})" if base else ""
    third.set(
        xlabel="KV kept in the whole model, %",
        ylabel=f"{metric} ({rows[0]['task']})",
        title=f"{metric.capitalize()} against KV kept{beside}",
    )
    for ax in (first, second, third):
        if ax.lines:
            ax.legend(fontsize=8)
    if masks is None:
        fourth.text(0.5, 0.5, "dense: every token keeps everything", ha="center")
        fourth.set_axis_off()
    else:
        L, T, S = masks.shape
        fourth.imshow(
            masks.transpose(1, 2).reshape(L * S, T).numpy(),
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        fourth.set(
            xlabel="token",
            ylabel="layer (its value groups top to bottom)",
            title="Groups kept by each token (share of heads)",
            yticks=[S * i + (S - 1) / 2 for i in range(L)],
            yticklabels=[str(i) for i in range(L)],
        )
        for i in range(1, L):
            fourth.axhline(S * i - 0.5, color="k", lw=0.5)
    fig.savefig(folder / "report.png", dpi=100)
    plt.close(fig)


def groups_figure(folder: Path, choice: Choice, title: str) -> None:
    """Draw groups.png, the paper's figure 1: how many groups tokens keep, and how many against
    their rank by relevance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    S = choice.mask.size(-1)
    C = choice.mask.size(-2)
    kept = (choice.mask > 0).sum(-1).float().flatten(0, -2).cpu()  # (masks, C)
    by_rank = kept.gather(-1, choice.score.flatten(0, -2).cpu().argsort(-1, descending=True)).mean(
        0
    )
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.bar(
        range(S + 1),
        (kept.long().flatten().bincount(minlength=S + 1) / kept.numel()).tolist(),
        color="tab:blue",
    )
    left.set(xlabel=f"groups kept of {S}", ylabel="share of tokens", title="Groups kept per token")
    width = max(1, C // 64)
    bins = by_rank[: C // width * width].view(-1, width).mean(-1)
    right.step(
        [100 * i / len(bins) for i in range(len(bins))],
        bins.tolist(),
        where="post",
        color="tab:blue",
    )
    right.set(
        xlabel="rank by relevance, % of the context (0: most relevant)",
        ylabel="groups kept, mean",
        ylim=(0, S * 1.02),
        title="Groups kept against relevance",
    )
    fig.suptitle(title)
    fig.savefig(folder / "groups.png", dpi=100)
    plt.close(fig)


def envelope(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bytes, loss) that no other has both fewer or equal bytes and less or equal loss
    than, by bytes."""
    out: list[tuple[float, float]] = []
    for size, loss in sorted(set(points)):
        if not out or loss < out[-1][1]:
            out.append((size, loss))
    return out


def series_of(r: dict) -> str:
    """What a row's point is drawn with: method, basis and bits; for selection how it chooses."""
    bits = (
        "16 bits"
        if r.get("key_bits", 16) == 16
        else f"K{r['key_bits']} V{r['value_bits']}"
        if r["value_bits"]
        else "routed bits"
    )
    if r["method"] != "select":
        return f"{r['method']}, {bits}"
    select = r["select"]
    if (
        bits != "16 bits"
        and not select["kv_bytes"]
        and (select["kv_keep"] or select["token_keep"] * select["value_keep"]) == 1
    ):
        return "uniform bits" + (
            " (KIVI)"
            if select.get("key_rounding", "nearest") == "nearest"
            else ", keys rounded for queries"
        )
    how = (
        "tokens"
        if select["value_keep"] == 1 and not (select["kv_keep"] or select["kv_bytes"])
        else "tokens and groups"
    )
    return f"{how}, {bits}, {r['relevance'].split(' ')[0]}"


def bytes_figure(folder: Path, rows: list[dict]) -> None:
    """Draw bytes.png: loss over dense against bytes held, of all rows of the first task whose
    metric is a loss, and their lower envelope."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        r
        for r in rows
        if r["metric"] == "loss"
        and r["task"] == next(r["task"] for r in rows if r["metric"] == "loss")
    ]
    places = [
        (100 * r["cache_bytes"] / r["dense_bytes"], r["value"] - r["dense_value"]) for r in rows
    ]
    fig, ax = plt.subplots(figsize=(11, 7), layout="constrained")
    for i, name in enumerate(dict.fromkeys(map(series_of, rows))):
        mine = sorted(p for p, r in zip(places, rows, strict=True) if series_of(r) == name)
        ax.plot(
            *zip(*mine, strict=True), marker="osv^D<>Pp*X"[i % 11], ls="-", lw=0.6, ms=6, label=name
        )
    ax.plot(
        *zip(*envelope(places), strict=True), color="k", lw=3, alpha=0.25, label="lower envelope"
    )
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.002)
    ax.set_ylim(bottom=min(-0.0005, 1.2 * min(p[1] for p in places)))
    ticks = [
        t
        for t in (3, 4, 6.25, 9, 12.5, 16, 19, 22, 28, 40, 50, 75, 100)
        if 0.8 * min(p[0] for p in places) <= t <= 101
    ]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
    ax.set(
        xlabel="bytes held, % of dense (scales, masks, offsets and whole tokens included)",
        ylabel="loss over dense, nats",
        title="Loss against bytes",
    )
    ax.legend(fontsize=8)
    fig.savefig(folder / "bytes.png", dpi=100)
    plt.close(fig)
