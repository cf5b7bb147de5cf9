"""The picture of loss and divergence against bytes (report/against_bytes.py): what a row is drawn
with, the rows of the page's tables, and what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_eval import drawn, some_row

from report import against_bytes, page
from report.against_bytes import Point, points_of, points_on, series_of
from report.tables import label_of

ROOT = Path(__file__).resolve().parents[1]
SELECT = "select predictor_query bytes=0.125 hedge=0.75"
BASIS = "output S=8 mask:head budget:global"
ROUTED = "tokens and groups, routed bits, predictor_query"
TABLE = """
| run | row | text | KL | of dense | loss | over whole |
| --- | --- | --- | --- | --- | --- | --- |
| x | dense | text:wikitext2.test.txt |  | 100.00% | 2.8 |  |
| x | routed in 4.0%, a\\|b | text:wikitext2.test.txt | 0.00741 | 3.98% | 2.83 | +0.0072 |
| x | routed in 4.0%, a\\|b | records | 0.00450 | 3.98% | 1.09 | +0.0001 |
| x | kvtc in 4.0% | text:wikitext2.test.txt |  | 3.99% | 2.86 | -0.0427 |

(Made by hand.)
"""


@pytest.mark.parametrize(
    "label, series",
    [
        ("dense", "dense, 16 bits"),
        ("value_groups output S=16 K=8 keys:4 values:4", "value_groups, K4 V4"),
        (
            "value_groups native S=16 K=0 from keys",
            "value_groups, 16 bits, keys alone, values from keys",
        ),
        ("routed in 4.0%, 9 components of 3 layers each", "routed transform coding"),
        ("kvtc in 4.0%", "KVTC's rule"),
        ("rdkv tokens and channels in 4.0%", "RDKV's rule"),
        (
            f"{SELECT} {BASIS} keys:8/128 values:routed",
            "tokens and groups, routed bits, predictor_query",
        ),
        (
            f"{SELECT} refit=0.3 output S=8 from keys mask:head keys:4 values:routed",
            "tokens and groups, routed bits, predictor_query, values from keys, refit",
        ),
        (f"select future kv=1 {BASIS} keys:4 values:2 nearest", "uniform bits (KIVI)"),
        (
            f"select future tokens=1 groups=1 {BASIS} keys:4 values:4",
            "uniform bits (keys rounded for queries)",
        ),
        (f"select h2o/observed tokens=0.5 groups=1 {BASIS}", "tokens, 16 bits, h2o/observed"),
        (f"select observed tokens=0.5 groups=0.5 {BASIS}", "tokens and groups, 16 bits, observed"),
        (f"select observed kv=0.125 {BASIS}", "tokens and groups, 16 bits, observed"),
    ],
)
def test_a_row_is_drawn_with_rows_of_its_kind(label, series):
    """Budgets, bases and sizes make no series of their own; methods, bits, signals and what else is
    done do."""
    assert series_of(label) == series


def test_points_are_those_of_losses_of_one_task():
    """Of rows of the first task whose metric is a loss; a row without KL has none."""
    rows = [
        some_row("a", 0.9, metric="accuracy"),
        some_row("a", 2.5, of_dense=0.25),
        some_row("a", 2.25, task="other"),
        {k: v for k, v in some_row("a", 2.125).items() if k != "kl"},
    ]
    series = series_of(label_of(rows[1]))
    assert points_of(rows) == [
        Point(series, 25.0, 0.5, 0.025),
        Point(series, 50.0, 0.125, None),
    ]
    assert points_of(rows[:1]) == []
    apart = [some_row("a", 2.5, n=n) for n in (2048, 2048, 6144)]
    assert [p.series for p in points_of(apart)] == [
        f"{series}, 2,048 tokens",
        f"{series}, 2,048 tokens",
        f"{series}, 6,144 tokens",
    ]
    assert {p.series for p in points_of(apart[:2])} == {series}


def test_points_of_a_page_are_the_rows_of_its_tables():
    """Of the tables that are named those rows that have the fields asked for and save bytes, with
    their own numbers; other tables are none."""
    assert points_on({"coding": TABLE, "memory": TABLE}) == [
        Point("routed transform coding", 3.98, 0.0072, 0.00741),
        Point("KVTC's rule", 3.99, -0.0427, None),
    ]
    both = points_on({"coding": TABLE, "mixture": TABLE})
    assert [p.series for p in both] == [
        "routed transform coding, table mixture",
        "KVTC's rule, table mixture",
        "routed transform coding, table coding",
        "KVTC's rule, table coding",
    ]
    assert points_on({"published": TABLE}) == []  # no run of these names
    assert points_on({"coding": "\n(not measured yet)\n"}) == []


def test_points_of_a_table_across_shares_are_its_cells():
    """Each cell of the row that is pictured is a point, at its own bytes where it names them; an
    empty one, another row and another text are none."""
    table = (
        "| what is stored | text | 22 % | 6.25 % | 2 % |\n| --- | --- | --- | --- | --- |\n"
        f"| {ROUTED}, refit | text:wikitext2.test.txt |  | 0.0068 / +0.0072 | 0.0462 / -0.0524 (2.2%) |\n"
        f"| {ROUTED}, refit | records | 0.0001 / +0.0001 | 0.0001 / +0.0001 |  |\n"
        f"| {ROUTED} | text:wikitext2.test.txt | 0.0002 / +0.0002 | 0.0002 / +0.0002 |  |\n"
    )
    assert points_on({"ablation": table}) == [
        Point(f"{ROUTED}, refit", 6.25, 0.0072, 0.0068),
        Point(f"{ROUTED}, refit", 2.2, -0.0524, 0.0462),
    ]


def test_points_of_the_page_of_this_project():
    """docs/results.md has rows of routed bits, routed coding and KVTC's rule: a KL of each stands in
    its own table, letter by letter."""
    text = (ROOT / page.PAGE).read_text()
    tables = {m["name"]: m["body"] for m in page.TABLE.finditer(text)}
    assert set(against_bytes.PICTURED) <= set(tables)
    points = points_on(tables)
    there = {p.series.partition(", table")[0] for p in points}
    assert {"routed transform coding", "KVTC's rule", "uniform bits (KIVI)"} <= there
    assert ROUTED in there
    assert f"{ROUTED}, refit" in there
    for p in points:
        if p.series == f"{ROUTED}, refit":
            assert f" {p.kl:.4f} / {p.loss:+.4f} " in text
            continue
        assert f" {p.kl:.5f} |" in text and f" {p.held:.2f}% |" in text
        assert f" {p.loss:+.4f} |" in text


def test_each_series_is_a_line_with_one_colour_in_both_panels(tmp_path, monkeypatch, pictures):
    """Losses to the left, divergences to the right, on logarithmic axes of bytes; a series without
    KL is on the left alone; the envelope is of all points."""
    points = [
        Point("a", 50.0, 0.001, None),
        Point("b", 12.5, 0.01, 0.01),
        Point("b", 4.0, 0.02, 0.04),
        Point("c", 6.25, 0.015, 0.02),
    ]
    left, right = drawn(monkeypatch, against_bytes.bytes_figure, tmp_path / "bytes.png", points)
    assert [line.get_label() for line in left.lines] == ["a", "b", "c", "lower envelope"]
    assert [line.get_label() for line in right.lines] == ["b", "c", "lower envelope"]
    assert [*left.lines[1].get_xdata()] == [4.0, 12.5] == [*right.lines[0].get_xdata()]
    assert [*right.lines[0].get_ydata()] == [0.04, 0.01]
    assert left.lines[1].get_color() == right.lines[0].get_color() != right.lines[1].get_color()
    assert [*left.lines[3].get_xdata()] == [4.0, 6.25, 12.5, 50.0]
    assert left.get_xscale() == right.get_xscale() == right.get_yscale() == "log"
    assert (tmp_path / "bytes.png").stat().st_size > 1000
