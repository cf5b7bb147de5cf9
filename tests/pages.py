"""Pages whose Python runs: the snippets of a Markdown file, in order, as one program.

A snippet is a ```python block. Where a ```text block follows it, that is what it prints, to the
letter; a snippet that prints nothing has none.

    python tests/pages.py docs/tutorial.md      # writes what the snippets print into the page
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\n?^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
END = "\x1e"  # printed after every snippet


class Snippet(NamedTuple):
    """One block of code, and the output that the page shows for it."""

    code: str
    shown: str


def snippets(page: str) -> list[Snippet]:
    """List the snippets of a page, in order."""
    return [Snippet(code, shown or "") for code, shown in BLOCK.findall(page)]


def run(page: str, folder: Path) -> list[str]:
    """Run a page's snippets one after the other, in one namespace: what each prints.

    folder: where the program is written, and what it writes itself."""
    mark = f"print(end={END!r})\n"
    program = folder / "page.py"
    program.write_text("".join(code + mark for code, _ in snippets(page)), encoding="utf-8")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(folder):
        runpy.run_path(str(program))
    return out.getvalue().split(END)[:-1]


def filled_in(page: str, printed: list[str]) -> str:
    """Return the page with what its snippets print in place of what it shows."""
    rest = iter(printed)

    def block(match: re.Match) -> str:
        text = next(rest)
        return f"```python\n{match[1]}```\n" + (f"\n```text\n{text}```\n" if text else "")

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name in sys.argv[1:]:
        text = Path(name).read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as temporary:
            text = filled_in(text, run(text, Path(temporary)))
        Path(name).write_text(text, encoding="utf-8")
