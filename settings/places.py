"""What the flags of a program name is there, or free: said before torch is loaded and before
anything is read at length or written."""

from __future__ import annotations

import os
import re
from dataclasses import is_dataclass
from pathlib import Path

from settings.fields import check, comma_list, to_dict

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # ORG/NAME
CORPORA = ("dataset", "adapt_dataset", "test_dataset", "calibrate")


def check_inputs(args, *models: str) -> None:
    """Raise ValueError for a model, or a text of one's own, that is not there. args: a program's
    settings by group; models: the flags that name models."""
    named: dict = {}
    for settings in vars(args).values():
        named |= to_dict(settings) if is_dataclass(settings) else {}
    for flag in models:
        where = named[flag]
        if where not in ("", "scratch") and not where.startswith("hf:"):
            check_model(where)
    for flag in CORPORA:
        for corpus in comma_list(named.get(flag, "")):
            check_text(corpus)
            kind, _, name = corpus.partition(":")
            path = Path(name).expanduser()
            if kind == "text" and path.is_file():  # the files of a folder are read later
                check(bool(read_text(path)), corpus, "it holds no text", "give another file")


def check_model(where: str | os.PathLike) -> None:
    """Raise ValueError where nothing lies at the place of a model."""
    do = "give a folder that train.py wrote"
    if HUB_NAME.fullmatch(str(where)) and not Path(where).parent.exists():
        do += f", or hf:{where} for a model of the hub"
    what = "no such folder"
    if str(where).lower().endswith(".gguf"):
        what = "no such file"
        do = "give a .gguf file, a model's folder or one that train.py wrote"
    check(Path(where).exists(), f"{where}", what, do)


def check_text(corpus: str) -> None:
    """Raise ValueError where a corpus is text:PATH or instruct:PATH and that is not there, or may
    not be read."""
    kind, _, name = corpus.partition(":")
    if not name:
        return
    path = Path(name).expanduser()
    do = "give text:PATH of a UTF-8 text file or a folder of them"
    there = path.exists()
    what = "there is no such file or folder"
    if kind == "instruct":
        do = "give instruct:PATH of JSONL"
        there = path.is_file()
        what = "there is no such file"
    check(there, corpus, what, do)
    check(os.access(path, os.R_OK), corpus, "you have no permission to read it", do)


def read_text(path: Path) -> str:
    """Return a file's text, its line ends as they are, without a byte order mark. ValueError where
    it is no UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as e:
        raise ValueError(
            f"{path} cannot be read as UTF-8 text ({e}): text:PATH needs that; convert it or move "
            "it"
        ) from None


def read_prompt(name: str) -> str:
    """Return the text of --prompt_file. ValueError where it is none, or blank."""
    path = Path(name).expanduser()
    do = "a file of UTF-8 text is needed"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"prompt_file={path}: {e}; {do}") from None
    check(bool(text.strip()), f"prompt_file={path}", "it holds no text", do)
    return text


def check_fresh(folder: str | os.PathLike) -> None:
    """Raise ValueError unless a folder to write is missing or empty."""
    path = Path(folder)
    check(
        not path.exists() or (path.is_dir() and not any(path.iterdir())),
        f"{path}",
        "is not an empty folder",
        "name a fresh one",
    )
