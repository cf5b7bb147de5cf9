"""Put new results into docs/results.md.

    python -m report.page

A table of the page stands between two marks. The first names the table, the script that makes it,
the folders whose results it shows with all that lies in them, and fields that a row must have:

    <!-- table NAME: runs/SCRIPT.sh out/FOLDER key_bits=16 -->
    <!-- end -->

What stands between them is replaced by a table of those results and a line that says how they were
made. Where a folder has no results, what stands there stays. Either way a table that was not made
by the code as it is now says so in its last line.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from cli import exit_on_bad_input
from config import check
from report.made import code_version, read_record, replace_file
from report.tables import label_of, share_of_dense, text_hash, with_spread

PAGE = Path("docs/results.md")
OLD = "(not run again on this code)"
TABLE = re.compile(
    r"^<!-- table (?P<name>\w+): (?P<script>runs/\w+\.sh)(?P<words>( \S+)*) -->\n"
    r"(?P<body>.*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)
# Columns that are left out where all lines say the same.
MAY_BE_SAME = ("run", "task", "shape", "text", "trainable")
# Numbers of rows that have a column: field, title, form.
NUMBERS = (
    ("trainable_parameters", "trainable", "{:,.0f}"),
    ("kv_kept_model", "whole model KV kept", "{:.1%}"),
    ("kl", "KL", "{:.5f}"),
    ("reads", "reads", "{:.1%}"),
    ("teacher_forced", "teacher-forced", "{:.4f}"),
    ("agreement", "agreement", "{:.1%}"),
    ("bytes", "bytes", "{:,.0f}"),
    ("bytes_kept", "bytes, of dense", "{:.1%}"),
    ("sequences", "sequences that fit", "{:,.0f}"),
    ("ms", "ms", "{:.4f}"),
    ("ratio", "of the peer", "{:.3f}"),
    ("gb_per_s", "GB/s", "{:,.0f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("peak_memory_bytes", "peak memory, bytes", "{:,.0f}"),
)


class Mark(NamedTuple):
    """The first mark of a table: its name, script and folders, and fields that rows must have."""

    name: str
    script: str
    folders: list[Path]
    only: dict[str, str]


# -- rows


def read_rows(path: Path, only: dict[str, str]) -> list[dict]:
    """The rows of a results file that have these fields. ValueError where it is damaged."""
    try:
        rows = json.loads(path.read_bytes())
        fits = isinstance(rows, list) and all(cells_of([r]) for r in rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        fits = False
    check(fits, f"{path}", "it is damaged: rows of eval.py, train.py or bench.py", "make it again")
    return [r for r in rows if all(str(r.get(name)) == value for name, value in only.items())]


def results_of(mark: Mark) -> list[Path]:
    """The results files of a table, by name; none where a folder has none, or belongs to a script
    that runs/all.sh has begun and not ended."""
    found = []
    for folder in mark.folders:
        below = sorted(folder.rglob("results.json"))
        if not below or any(map(is_begun, (folder, *folder.parents))):
            return []
        found += below
    return found


def is_begun(folder: Path) -> bool:
    """Whether runs/all.sh has begun to fill a folder, and not ended."""
    state = Path(f"{folder}.state")
    return state.is_file() and state.read_text().strip() == "begun"


def run_name(path: Path, mark: Mark, rows: list[dict]) -> str:
    """What a results file is called beside others: its folder within the table's, without the seed
    where all of its rows have the same."""
    folder = path.parent
    above = next(f for f in mark.folders if folder.is_relative_to(f))
    parts = folder.relative_to(above if len(mark.folders) == 1 else above.parent).parts
    seeds = {r.get("seed") for r in rows}
    if len(seeds) == 1:
        parts = [re.sub(rf"-s?{min(seeds)}$", "", part) for part in parts]
    return "/".join(parts)


def lines_of(paths: list[Path], mark: Mark) -> list[dict[str, str]]:
    """The cells of a table by their titles, a line each: the rows of one setting that differ in
    their seeds are one."""
    lines: dict[tuple, list[dict]] = {}
    seen: Counter[tuple] = Counter()
    for path in paths:
        rows = read_rows(path, mark.only)
        run = run_name(path, mark, rows)
        for r in rows:
            asked = json.dumps([r.get("select"), r.get("shape"), r.get("value_keep")])
            key = (run, r.get("task"), title_of(r), text_hash(r), asked)
            again = seen[(key, r.get("seed"))]  # the same with the same seed is a line of its own
            seen[(key, r.get("seed"))] += 1
            lines.setdefault((*key, again), []).append(r)
    return [{"run": run} | cells_of(same) for (run, *_), same in lines.items()]


def title_of(r: dict) -> str:
    """What a row is called, of a measurement or of a comparison of speed."""
    return r["impl"] if "impl" in r else label_of(r)


def cells_of(same: list[dict]) -> dict[str, str]:
    """A line's cells by their titles: means over the seeds of one setting."""
    r = same[0]
    cells = {"task": r.get("task", ""), "row": title_of(r), "shape": r.get("shape", "")}
    cells["text"] = r["text"]["corpus"] if "text" in r else ""
    for field, title, form in NUMBERS:
        known = all(row.get(field) for row in same)
        cells[title] = form.format(mean(row[field] for row in same)) if known else ""
    cells["peer"] = r.get("peer", "")
    if "metric" in r:
        cells["of dense"] = f"{mean(map(share_of_dense, same)):.2%}"
        cells[r["metric"]] = with_spread([row["value"] for row in same])
        cells["seeds"] = str(len(same))
    if "dense_value" in r and r["method"] != "dense":
        cells["over whole"] = f"{mean(row['value'] - row['dense_value'] for row in same):+.4f}"
    for share in sorted(r.get("h2o", {}), key=float, reverse=True):
        cells[f"H2O {float(share):.0%}"] = f"{mean(row['h2o'][share] for row in same):.4f}"
    return cells


# -- the page


def markdown(lines: list[dict[str, str]]) -> str:
    """A Markdown table. Columns without a cell are left out, and some that say the same in every
    line."""
    titles = list(dict.fromkeys(title for line in lines for title in line))
    shown = []
    for title in titles:
        said = {line.get(title, "") for line in lines}
        varies = len(said) > 1 or title not in MAY_BE_SAME
        if said != {""} and varies:
            shown.append(title)
    cells = [shown, ["---"] * len(shown)]
    cells += [[line.get(title, "").replace("|", "\\|") for title in shown] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def how_made(paths: list[Path], mark: Mark) -> str:
    """The line that says how a table was made, from the records beside its results."""
    records = [read_record(path) for path in paths]

    def values(name: str) -> str:
        found = [str(r[name]) if r.get(name) is not None else "unknown" for r in records]
        return ", ".join(sorted({*found}))

    codes = sorted({r.get("code", "unknown")[:12] for r in records})
    commits = {(r.get("commit") or "unknown")[:10] for r in records}
    changed = " with changes" if any(r.get("changed") for r in records) else ""
    seeds = sorted({seed for r in records for seed in r.get("seeds", [])})
    read = [text for r in records for text in r.get("texts", [])]
    texts = sorted({f"{text['corpus']} {text['sha256'][:12]}" for text in read})
    parts = [
        f"Made by {mark.script}: {values('device')}",
        f"Python {values('python')}, torch {values('torch')}, triton {values('triton')}",
        f"code {', '.join(codes)}",
        f"commit {', '.join(sorted(commits))}{changed}",
        f"seeds {', '.join(map(str, seeds)) or 'none'}",
        f"texts {', '.join(texts) or 'not named'}",
        f"{sum(r.get('seconds', 0) for r in records):,.0f} s",
    ]
    return f"({'; '.join(parts)})"


def with_note(body: str, code: str) -> str:
    """What stands between two marks, with OLD as its last line unless the line before says that it
    was made by this code, or, without naming one, how it was measured."""
    text = "\n".join(line for line in body.splitlines() if line != OLD).strip()
    last = text.rsplit("\n", 1)[-1]
    named = re.search(r"; code ([^;]*);", last)
    current = named[1] == code[:12] if named else last.startswith("(")
    return f"\n{text}\n\n" if current else f"\n{text}\n\n{OLD}\n\n"


def rebuilt(page: str, code: str) -> tuple[str, list[str]]:
    """The page with the tables of all results that there are, and what is wrong with others, which
    stay as they are. ValueError where marks are not in pairs."""
    marks = [page.count("<!-- table "), page.count("<!-- end -->")]
    found = len(TABLE.findall(page))
    check(marks == [found, found], f"{PAGE}", f"{found} of {marks} marks are pairs", "mend it")
    faults = []

    def table(match: re.Match) -> str:
        words = match["words"].split()
        folders = [Path(word) for word in words if "=" not in word]
        only = dict(word.split("=", 1) for word in words if "=" in word)
        mark = Mark(match["name"], match["script"], folders, only)
        body = match["body"]
        try:
            paths = results_of(mark)
            lines = lines_of(paths, mark)
            if lines:
                body = f"{markdown(lines)}\n\n{how_made(paths, mark)}"
        except ValueError as error:
            faults.append(f"table {mark.name}: {error}")
        first = match[0].split("\n", 1)[0]
        return f"{first}\n{with_note(body, code)}<!-- end -->"

    return TABLE.sub(table, page), faults


def main() -> None:
    """Rebuild the page. ValueError, when that is done, naming the results that are damaged."""
    check(not sys.argv[1:], " ".join(sys.argv[1:]), "report.page reads no flags", "leave them out")
    before = PAGE.read_text(encoding="utf-8")
    after, faults = rebuilt(before, code_version())
    if after != before:
        replace_file(PAGE, after)
    if faults:
        raise ValueError("; ".join(faults))


if __name__ == "__main__":
    exit_on_bad_input(main)
