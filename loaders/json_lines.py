"""JSONL: a file of objects, one a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from loaders.tokenizer import one_line

LINE_END = re.compile(r"\r\n?|\n")


def json_objects(path: Path, text: str | None = None, do: str = "") -> Iterator[tuple[int, dict]]:
    """Yield the number and the object of every line that is not blank; of what is no object, an
    empty one. ValueError for a file that is not UTF-8, and for a line that is not JSON, by its
    number. text: the file's, where it is known; do: what else can be done about that."""
    if text is None:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (UnicodeDecodeError, OSError) as e:
            raise ValueError(
                f"{path} cannot be read as UTF-8 text ({one_line(e)}); give another file"
            ) from None
    for number, line in enumerate(LINE_END.split(text), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(
                f"{path}, line {number}: {one_line(e)}; every line of JSONL is an object; correct "
                f"it{do}"
            ) from None
        yield number, entry if isinstance(entry, dict) else {}


def fields_of(entry: dict) -> str:
    """The names of an object's first fields, in words."""
    return ", ".join(map(repr, list(entry)[:9])) or "no fields"
