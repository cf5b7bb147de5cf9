"""Files that a user names, read as text or refused by one line: UTF-8, JSONL, and Git LFS pointers,
which lie where a file was not fetched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from settings.fields import check, one_line

POINTER = b"version https://git-lfs.github.com/spec/"
JSON_LINES = (".jsonl", ".ndjson")
LINE_END = re.compile(r"\r\n?|\n")


def is_pointer(path: Path) -> bool:
    """Say whether a file is what Git LFS leaves in place of a large one that was not fetched."""
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        return f.read(len(POINTER)) == POINTER


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Raise ValueError for the first of some files that is a Git LFS pointer."""
    for path in paths:
        check(
            not is_pointer(path),
            f"{path}",
            "a Git LFS pointer, not the file itself",
            f"run git lfs pull in {path.parent}, or download the file again",
        )


def read_text(path: Path) -> str:
    """Return a file's text, its line ends as they are, without a byte order mark. ValueError where
    it is no UTF-8, or not there."""
    try:
        refuse_pointers([path])
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; give another") from None
    except (UnicodeDecodeError, OSError) as e:
        raise ValueError(
            f"{path} cannot be read as UTF-8 text ({one_line(e)}); convert it, or give another file"
        ) from None


def visible_files(root: Path) -> list[Path]:
    """Return the files below a folder, by path, without those whose name or folder begins with a
    dot; a file itself."""
    if not root.is_dir():
        return [root]
    files = sorted(Path(folder, n) for folder, _, names in os.walk(root) for n in names)
    return [
        f
        for f in files
        if f.is_file() and not any(p.startswith(".") for p in f.relative_to(root).parts)
    ]


def json_objects(path: Path, text: str | None = None, do: str = "") -> Iterator[tuple[int, dict]]:
    """Yield the number and the object of every line that is not blank; of what is no object, an
    empty one. ValueError as of read_text, and for a line that is not JSON, by its number. text: the
    file's, where it is known; do: what else can be done about that."""
    for number, line in enumerate(LINE_END.split(read_text(path) if text is None else text), 1):
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
    """Return the names of an object's first fields, in words."""
    return ", ".join(map(repr, list(entry)[:9])) or "no fields"


def texts_of(path: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of a file: its text, or of JSONL the text of each line's field.
    ValueError names the line that is no object with such a text."""
    text = read_text(path)
    if path.suffix.lower() not in JSON_LINES:
        yield text
        return
    for number, entry in json_objects(path, text, ", or name the file .txt"):
        check(
            isinstance(entry.get(text_field), str),
            f"{path}, line {number}, has {fields_of(entry)}",
            f"a text in {text_field!r} is needed",
            "name its field by --text_field",
        )
        yield entry[text_field]
