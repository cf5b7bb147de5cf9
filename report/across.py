"""A table of docs/results.md with a column for each share of the bytes: what each way to store
costs there, text by text."""

from __future__ import annotations

import math
from statistics import mean

from report.against_bytes import series_of
from report.tables import label_of, share_of_dense, text_hash

SHARES = (0.5, 0.22, 0.125, 0.0625, 0.04, 0.02)
NEAR = 0.03  # bytes that differ by more of a column's share stand in the cell


def across_shares(rows: list[dict]) -> list[dict[str, str]]:
    """Return the cells of the table's lines by their titles: of each way to store and text KL and
    loss over dense in nats, in the column whose share is nearest to the bytes that are held; the
    means of rows that meet there. Rows that lose no bytes are left out."""
    lines: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for r in rows:
        held = share_of_dense(r)
        if held < 0.99 and "kl" in r:
            line = lines.setdefault((series_of(label_of(r)), text_hash(r)), {})
            line.setdefault(column_of(held), []).append(r)
    out = []
    for (series, _), found in lines.items():
        some = next(iter(found.values()))[0]
        cells = {"what is stored": series, "text": some["text"]["corpus"]}
        for share in SHARES:
            title = title_of(share)
            cells[title] = cell_of(found.get(title, []), share)
        out.append(cells)
    return out


def title_of(share: float) -> str:
    """Return a share of the bytes as a column is called."""
    return f"{100 * share:g} %"


def column_of(held: float) -> str:
    """Return the title of the column of bytes held, a share of dense ones."""
    nearest = min(SHARES, key=lambda share: abs(math.log(held / share)))
    return title_of(nearest)


def cell_of(same: list[dict], share: float) -> str:
    """Return KL and loss over dense of rows in the column of a share, and the bytes held where they
    are others; empty without rows."""
    if not same:
        return ""
    kl = mean(r["kl"] for r in same)
    over = mean(r["value"] - r["dense_value"] for r in same)
    held = mean(map(share_of_dense, same))
    others = f" ({held:.1%})" if abs(held / share - 1) > NEAR else ""
    return f"{kl:.4f} / {over:+.4f}{others}"
