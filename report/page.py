"""Put new results into docs/results.md.

    python -m report.page

A table of the page stands between two marks. The first names the table, the script that makes it,
the folders whose results it shows with all that lies in them, and fields that a row must have:

    <!-- table NAME: runs/SCRIPT.sh out/FOLDER key_bits=16 -->
    <!-- end -->

With `across=bytes` among them the table has a column for each share of the bytes, and a line for
each way to store and text: report/across.py.

What stands between them is replaced by a table of those results and a line that says how they were
made. Where a folder has no results, what stands there stays. Either way a table that was not made
by the code as it is now says so in its last line; one that ends in "(not measured yet)" need not.
Where the page changes, its picture of loss against bytes, docs/bytes.png, is drawn anew from it.
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
from report.across import across_shares
from report.against_bytes import bytes_figure, points_on
from report.made import code_version, read_record, replace_file
from report.tables import label_of, share_of_dense, text_hash, with_spread

PAGE = Path("docs/results.md")
OLD = "(not run again on this code)"
ABSENT = "(not measured yet)"
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
    ("parked_bytes", "parked, bytes", "{:,.0f}"),
    ("bytes_kept", "bytes, of dense", "{:.1%}"),
    ("sequences", "sequences that fit", "{:,.0f}"),
    ("ms", "ms", "{:.4f}"),
    ("ratio", "of the peer", "{:.3f}"),
    ("deflated", "deflated, of the peer", "{:.3f}"),
    ("park_ms", "ms to park", "{:,.0f}"),
    ("unpark_ms", "ms to unpark", "{:,.0f}"),
    ("prefill_ms", "ms to read the prompt", "{:,.0f}"),
    ("largest_difference", "losses differ by at most", "{:.1e}"),
    ("logits_difference", "logits differ by, std", "{:.1e}"),
    ("gb_per_s", "GB/s", "{:,.0f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("limit_by_bytes", "limit by bytes, tokens/s", "{:,.0f}"),
    ("limit_by_flops", "limit by FLOPs, tokens/s", "{:,.0f}"),
    ("of_limit", "of the lower limit", "{:.1%}"),
    ("peak_memory_bytes", "peak memory, bytes", "{:,.0f}"),
    ("first_step_s", "first step, s", "{:.1f}"),
    ("ended_after_s", "ended after, s", "{:.1f}"),
    ("told_own", "own head tells", "{:.1%}"),
    ("told_all", "all heads tell", "{:.1%}"),
    ("map_bytes_own", "bytes of W, own", "{:,.0f}"),
    ("map_bytes_all", "bytes of W, all", "{:,.0f}"),
    ("pays_after_own", "own pays after, tokens", "{:,.0f}"),
    ("pays_after_all", "all pay after, tokens", "{:,.0f}"),
    ("integers_2", "integers, 2.5 bits", "{:.4f}"),
    ("coordinates_2", "coordinates, 2.5 bits", "{:.4f}"),
    ("integers_4", "integers, 4.5 bits", "{:.4f}"),
    ("coordinates_4", "coordinates, 4.5 bits", "{:.4f}"),
)


class Mark(NamedTuple):
    """The first mark of a table: its name, script and folders, fields that rows must have, and
    whether shares of the bytes are its columns."""

    name: str
    script: str
    folders: list[Path]
    only: dict[str, str]
    across: bool = False


# -- rows


def read_rows(path: Path, only: dict[str, str]) -> list[dict]:
    """The rows of a results file that have these fields. ValueError where it holds no rows."""
    try:
        rows = json.loads(path.read_bytes())
        for r in rows:
            cells_of([r])
        fits = isinstance(rows, list)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        fits = False
    check(fits, f"{path}", "not rows of eval.py, train.py or bench.py", "make it again")

    def is_asked(r: dict) -> bool:
        return all(str(r.get(name)) == value for name, value in only.items())

    return [r for r in rows if is_asked(r)]


def check_fields_asked(paths: list[Path], only: dict[str, str]) -> None:
    """Raise ValueError where rows must have a field that none of these files' rows has."""
    known = {name for path in paths for row in read_rows(path, {}) for name in row}
    unknown = sorted(only.keys() - known)
    check(
        not paths or not unknown,
        f"{', '.join(unknown)} in its first mark",
        f"fields of its rows are {', '.join(sorted(known))}",
        "mend the mark",
    )


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
    if not state.is_file():
        return False
    return state.read_text().strip() == "begun"


def run_name(path: Path, mark: Mark, rows: list[dict]) -> str:
    """What a results file is called beside others: its folder within the table's, without the seed
    where all of its rows have the same."""
    folder = path.parent
    above = next(f for f in mark.folders if folder.is_relative_to(f))
    if len(mark.folders) > 1:
        above = above.parent  # their own names tell them apart
    parts = folder.relative_to(above).parts
    seeds = {r.get("seed") for r in rows}
    if len(seeds) == 1:
        (seed,) = seeds
        ending = rf"-s?{seed}$"
        parts = [re.sub(ending, "", part) for part in parts]
    return "/".join(parts)


def lines_of(paths: list[Path], mark: Mark) -> list[dict[str, str]]:
    """The cells of a table by their titles, a line each: the rows of one setting that differ in
    their seeds are one."""
    if mark.across:
        return across_shares([r for path in paths for r in read_rows(path, mark.only)])
    lines: dict[tuple, list[dict]] = {}
    seen: Counter[tuple] = Counter()
    for path in paths:
        rows = read_rows(path, mark.only)
        run = run_name(path, mark, rows)
        for r in rows:
            setting = (run, *setting_of(r))
            seed = r.get("seed")
            again = seen[(setting, seed)]  # the same with the same seed is a line of its own
            seen[(setting, seed)] += 1
            lines.setdefault((*setting, again), []).append(r)
    out = []
    for (run, *_), same in lines.items():
        out.append({"run": run} | cells_of(same))
    return out


def setting_of(r: dict) -> tuple:
    """What rows of one setting have in common, whatever their seeds. What a budget of bytes bought
    is no setting: it differs from seed to seed."""
    asked = [r.get("select"), r.get("shape"), None if "select" in r else r.get("value_keep")]
    return r.get("task"), title_of(r), text_hash(r), json.dumps(asked)


def title_of(r: dict) -> str:
    """What a row is called, of a measurement or of a comparison of speed."""
    return r["impl"] if "impl" in r else label_of(r)


def cells_of(same: list[dict]) -> dict[str, str]:
    """A line's cells by their titles: means over the seeds of one setting."""
    r = same[0]
    cells = {"task": r.get("task", ""), "row": title_of(r), "shape": r.get("shape", "")}
    cells["text"] = r["text"]["corpus"] if "text" in r else ""
    for field, title, form in NUMBERS:
        numbers = [row.get(field) for row in same]
        cells[title] = "" if None in numbers else form.format(mean(numbers))
    cells["peer"] = r.get("peer", "")
    if "metric" in r:
        values = [row["value"] for row in same]
        of_dense = mean(map(share_of_dense, same))
        cells["of dense"] = f"{of_dense:.2%}"
        cells[r["metric"]] = with_spread(values)
        cells["seeds"] = str(len(same))
    if "rouge_l" in r:  # of answers that a row of mixSGA's table gave beside its perplexity
        cells["ROUGE-L"] = with_spread([row["rouge_l"] for row in same])
    if "dense_value" in r and r["method"] != "dense":
        over = mean(row["value"] - row["dense_value"] for row in same)
        cells["over whole"] = f"{over:+.4f}"
    shares = sorted(r.get("h2o", {}), key=float, reverse=True)
    for share in shares:
        value = mean(row["h2o"][share] for row in same)
        title = f"H2O {float(share):.0%}"
        cells[title] = f"{value:.4f}"
    return cells


# -- the page


def markdown(lines: list[dict[str, str]]) -> str:
    """A Markdown table. Columns without a cell are left out, and some that say the same in every
    line."""
    titles = dict.fromkeys(title for line in lines for title in line)
    shown = []
    for title in titles:
        said = {line.get(title, "") for line in lines}
        if said == {""}:
            continue
        if len(said) > 1 or title not in MAY_BE_SAME:
            shown.append(title)
    table = [shown, ["---"] * len(shown)]
    for line in lines:
        cells = [line.get(title, "") for title in shown]
        table.append([cell.replace("|", "\\|") for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def how_made(paths: list[Path], mark: Mark) -> str:
    """The line that says how a table was made, from the records beside its results."""
    records = [read_record(path) for path in paths]

    def every(name: str, digits: int | None = None) -> str:
        """All that the records say under a name, or the first digits of it."""
        found = {str(r.get(name) or "unknown")[:digits] for r in records}
        return ", ".join(sorted(found))

    changed = any(r.get("changed") for r in records)
    seeds = set()
    texts = set()
    for r in records:
        seeds.update(r.get("seeds", []))
        for text in r.get("texts", []):
            texts.add(f"{text['corpus']} {text['sha256'][:12]}")
    seconds = sum(r.get("seconds", 0) for r in records)
    parts = [
        f"Made by {mark.script}: {every('device')}",
        f"Python {every('python')}, torch {every('torch')}, triton {every('triton')}",
        f"code {every('code', 12)}",
        f"commit {every('commit', 10)}{' with changes' if changed else ''}",
        f"seeds {', '.join(map(str, sorted(seeds))) or 'none'}",
        f"texts {', '.join(sorted(texts)) or 'not named'}",
        f"{seconds:,.0f} s",
    ]
    return f"({'; '.join(parts)})"


def with_note(body: str, code: str) -> str:
    """What stands between two marks, with OLD as its last line unless the line before says that it
    was made by this code, or that there is nothing to be made again."""
    lines = [line for line in body.splitlines() if line != OLD]
    text = "\n".join(lines).strip()
    last = text.rsplit("\n", 1)[-1]
    named = re.search(r"; code ([^;]*);", last)
    current = named[1] == code[:12] if named else last == ABSENT
    if not current:
        text = f"{text}\n\n{OLD}"
    return f"\n{text}\n\n"


def rebuilt(page: str, code: str) -> tuple[str, list[str]]:
    """The page with the tables of all results that there are, and what is wrong with others, which
    stay as they are. ValueError where marks are not in pairs, or one says what none may."""
    begun = page.count("<!-- table ")
    ended = page.count("<!-- end -->")
    pairs = len(TABLE.findall(page))
    check(
        begun == ended == pairs,
        f"{PAGE}",
        f"{pairs} of {begun} first and {ended} last marks are pairs",
        "mend it",
    )
    faults = []

    def table(match: re.Match) -> str:
        mark = mark_of(match)
        body = match["body"]
        try:
            paths = results_of(mark)
            check_fields_asked(paths, mark.only)
            lines = lines_of(paths, mark)
            if lines:
                body = f"{markdown(lines)}\n\n{how_made(paths, mark)}"
        except ValueError as error:
            faults.append(f"table {mark.name}: {error}")
        first = match[0].split("\n", 1)[0]
        return f"{first}\n{with_note(body, code)}<!-- end -->"

    return TABLE.sub(table, page), faults


def mark_of(match: re.Match) -> Mark:
    """What the first mark of a table, found by TABLE, says. ValueError for columns that there are
    none of."""
    folders = []
    only: dict[str, str] = {}
    for word in match["words"].split():
        name, equals, value = word.partition("=")
        if equals:
            only[name] = value
        else:
            folders.append(Path(word))
    across = only.pop("across", None)
    check(
        across in (None, "bytes"),
        f"table {match['name']}: across={across}",
        "columns are shares of the bytes or fields of rows",
        "give across=bytes, or leave it out",
    )
    return Mark(match["name"], match["script"], folders, only, across is not None)


def main() -> None:
    """Rebuild the page. ValueError, when that is done, naming the results that are damaged."""
    check(not sys.argv[1:], " ".join(sys.argv[1:]), "report.page reads no flags", "leave them out")
    before = PAGE.read_text(encoding="utf-8")
    after, faults = rebuilt(before, code_version())
    if after != before:
        replace_file(PAGE, after)
        points = points_on({m["name"]: m["body"] for m in TABLE.finditer(after)})
        if points:
            bytes_figure(PAGE.with_name("bytes.png"), points)
    if faults:
        raise ValueError("; ".join(faults))


if __name__ == "__main__":
    exit_on_bad_input(main)
