"""What the flags of a program name is there, or free: said before torch is loaded and before
anything is read at length or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

from settings.fields import check, comma_list, to_dict
from settings.files import (
    LINE_END,
    json_objects,
    read_text,
    refuse_pointers,
    texts_of,
    visible_files,
)

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # ORG/NAME
CORPORA = ("dataset", "adapt_dataset", "test_dataset", "calibrate")
TEXT_FILES = ("questions", "shots_from", "items", "answered")
WRITTEN = ("results", "data_dir", "to")  # folders that are made where they are missing
TEXT = "give text:PATH of a UTF-8 text file or a folder of them"
INSTRUCTIONS = "give instruct:PATH of JSONL"


def check_inputs(args, *models: str) -> None:
    """Raise ValueError for a model, or a text of one's own, that is not there, for a text whose
    beginning is not what it should be, and for a folder that cannot be written to. args: a
    program's settings by group; models: the flags that name models."""
    named = settings_by_name(args)
    for flag in models:
        where = named[flag]
        if where not in ("", "scratch") and not where.startswith("hf:"):
            check_model(where)
    for flag in WRITTEN:
        if named.get(flag):
            check_folder(flag, named[flag])
    for flag in CORPORA:
        for corpus in comma_list(named.get(flag, "")):
            check_text(corpus)
            check_beginning(corpus, named.get("text_field", "text"))
    if named.get("answered"):
        corpus = f"instruct:{named['answered']}"
        check_text(corpus)
        check_beginning(corpus, "")


def settings_by_name(args) -> dict:
    """Return all settings of a program by their flags' names. args: its settings by group."""
    named: dict = {}
    for settings in vars(args).values():
        named |= to_dict(settings) if is_dataclass(settings) else {}
    return named


def texts_named(args) -> Iterator[tuple[str, Path]]:
    """Yield flag and path of every text that a file or folder holds and that flags name."""
    named = settings_by_name(args)
    for flag in (*CORPORA, *TEXT_FILES):
        for entry in comma_list(named.get(flag, "")):
            name = entry if flag in TEXT_FILES else entry.partition(":")[2]
            path = Path(name).expanduser()
            if name and path.exists():
                yield flag, path


def check_model(where: str | os.PathLike) -> None:
    """Raise ValueError where nothing lies at the place of a model."""
    do = "give a folder that train.py wrote, a model's folder or a .gguf file"
    if HUB_NAME.fullmatch(str(where)) and not Path(where).parent.exists():
        do += f", or hf:{where} for a model of the hub"
    what = "no such folder"
    if str(where).lower().endswith(".gguf"):
        what = "no such file"
    check(Path(where).exists(), f"{where}", what, do)
    refuse_pointers([Path(where)])


def check_text(corpus: str) -> None:
    """Raise ValueError where a corpus is text:PATH or instruct:PATH and that is not there, or may
    not be read."""
    kind, _, name = corpus.partition(":")
    if not name:
        return
    path = Path(name).expanduser()
    do = TEXT
    there = path.exists()
    what = "there is no such file or folder"
    if kind == "instruct":
        do = INSTRUCTIONS
        there = path.is_file()
        what = "there is no such file"
    check(there, corpus, what, do)
    check(os.access(path, os.R_OK), corpus, "you have no permission to read it", do)


def check_beginning(corpus: str, text_field: str) -> None:
    """Raise ValueError where text:PATH or instruct:PATH, which is there, holds nothing, a Git LFS
    pointer, or a first line that is not JSONL's. Of a folder's files the contents are read later.

    text_field: the field of a line of JSONL that holds its text"""
    kind, _, name = corpus.partition(":")
    path = Path(name).expanduser()
    if kind == "instruct":
        first = next(json_objects(path), None)
        check(first is not None, corpus, "there is no line in it", INSTRUCTIONS)
    elif kind == "text" and path.is_dir():
        files = visible_files(path)
        refuse_pointers(files)
        check(any(file.stat().st_size for file in files), corpus, "it holds no text", TEXT)
    elif kind == "text":
        check(any(texts_of(path, text_field)), corpus, "it holds no text", TEXT)


def read_prompt(name: str) -> str:
    """Return the text of --prompt_file, its line ends as one. ValueError where it is none, or
    blank."""
    path = Path(name).expanduser()
    try:
        text = "\n".join(LINE_END.split(read_text(path)))
    except ValueError as e:
        raise ValueError(f"prompt_file={e}") from None
    check(
        bool(text.strip()),
        f"prompt_file={path}",
        "it holds no text",
        "a file of UTF-8 text is needed",
    )
    return text


def check_folder(flag: str, name: str | os.PathLike) -> None:
    """Raise ValueError where the folder that a flag names is a file, or cannot be written to, or
    be made where it is missing."""
    path = Path(name).expanduser()
    place = f"{flag}={name}"
    check(path.is_dir() or not path.exists(), place, "is a file", f"give --{flag}=DIR")
    check_above(path, place, f"give --{flag}=DIR of another folder")


def check_above(path: Path, place: str, do: str) -> None:
    """Raise ValueError where nothing can be written to a path, or be made where it is missing."""
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    check(
        above.is_dir() and os.access(above, os.W_OK | os.X_OK),
        place,
        f"nothing can be written in {above}",
        do,
    )


def check_parked(park: str, unpark: str) -> None:
    """Raise ValueError where --park=FILE cannot be written, or --unpark=FILE is not there."""
    if park:
        path = Path(park)
        check(not path.is_dir(), f"park={park}", "is a folder", "give --park=FILE")
        check_above(path.absolute().parent, f"park={park}", "give --park=FILE in another folder")
    if unpark:
        there = Path(unpark).is_file()
        check(there, f"unpark={unpark}", "there is no such file", "give what --park=FILE wrote")


def check_fresh(folder: str | os.PathLike) -> None:
    """Raise ValueError unless a folder to write is missing or empty."""
    path = Path(folder)
    check(
        not path.exists() or (path.is_dir() and not any(path.iterdir())),
        f"{path}",
        "is not an empty folder",
        "name a fresh one",
    )


def check_begun(run_dir: Path) -> None:
    """Raise ValueError unless a run has left anything in a folder that can be continued."""
    begun = (run_dir / "config.json").is_file()
    begun = begun or any(run_dir.glob("*/step-*")) or any(run_dir.glob("*/.*-step-*"))
    check(
        begun,
        f"resume from {run_dir}",
        "there is no checkpoint in it",
        "name the folder of a run, or leave --resume out and name one that is empty",
    )
