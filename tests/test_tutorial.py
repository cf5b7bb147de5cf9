"""The Python of docs/tutorial.md and docs/format.md runs, and prints what the pages show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import filled_in, run, snippets

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["tutorial.md", "format.md"]


@pytest.mark.parametrize("name", PAGES)
def test_page_shows_what_its_snippets_print(name, tmp_path):
    """Every snippet, run after those before it, prints the block below it and nothing else."""
    page = (DOCS / name).read_text(encoding="utf-8")
    shown = [snippet.shown for snippet in snippets(page)]
    assert run(page, tmp_path) == shown
    assert sum(map(bool, shown)) >= 5, "a page without numbers proves little"


@pytest.mark.parametrize("name", PAGES)
def test_page_has_no_code_that_is_not_run(name):
    """Each block is a snippet, its output, a picture without a language, or shell, which
    tests/test_docs.py checks; and every output belongs to a snippet."""
    page = (DOCS / name).read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(\w*)", page, re.MULTILINE)[::2]
    assert set(fences) <= {"python", "text", "sh", ""}
    found = snippets(page)
    assert fences.count("python") == len(found)
    assert fences.count("text") == sum(bool(snippet.shown) for snippet in found)


PAGE = "a\n```python\nx = 1\nprint(x)\n```\n\n```text\n1\n```\nb\n```python\nprint(x + 1)\n```\n"


def test_snippets_share_one_namespace_and_print_in_order(tmp_path):
    """A later snippet sees the names of an earlier one; what each prints is kept apart."""
    assert run(PAGE, tmp_path) == ["1\n", "2\n"]
    assert [snippet.shown for snippet in snippets(PAGE)] == ["1\n", ""]


def test_output_that_is_wrong_or_missing_is_seen(tmp_path):
    """A number that is not the one printed, and a print without a block below it, differ; filled
    in they do not."""
    printed = run(PAGE, tmp_path)
    assert printed != [snippet.shown for snippet in snippets(PAGE)]
    fixed = filled_in(PAGE, printed)
    assert printed == [snippet.shown for snippet in snippets(fixed)]
    wrong = fixed.replace("```text\n1\n", "```text\n7\n")
    assert printed != [snippet.shown for snippet in snippets(wrong)]
    assert filled_in(wrong, printed) == fixed


def test_snippet_that_fails_fails_the_page(tmp_path):
    """An exception in a snippet, an assertion too, is not swallowed."""
    with pytest.raises(AssertionError):
        run("```python\nassert 1 > 2\n```\n", tmp_path)
