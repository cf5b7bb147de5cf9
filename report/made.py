"""How results were made: the record that lies as made.json beside results.json, and the version of
the code that it names.

    python -m report.made      prints a line for each script of runs/: its name, and a key that
                               changes with the script and with the code
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from settings.files import visible_files
from settings.places import texts_named

ROOT = Path(__file__).resolve().parents[1]


def write_record(
    folder: Path, device: str, began: float, args=None, texts: list[dict] | None = None
) -> None:
    """Leave made.json beside the results.json that this call wrote: the command (absolute paths cut
    to their last part), code, commit, versions, device, seeds, texts with their sha256 (those that
    the rows name, unless given), files and folders of texts that flags name, each with its own,
    seconds since `began` (time.time()), and the sha256 of the results, so that a record of other
    rows is known. args: the program's settings by group."""
    results = (folder / "results.json").read_bytes()
    rows = json.loads(results)
    read = [r["text"] for r in rows if "text" in r] if texts is None else texts
    about = {
        "argv": [without_folders(word) for word in sys.argv],
        "code": code_version(),
        **commit(),
        "device": device,
        "python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton"),
        "seeds": sorted({r["seed"] for r in rows if "seed" in r}),
        "texts": [text for i, text in enumerate(read) if text not in read[:i]],
        "files": [
            {"flag": flag, "name": path.name, "sha256": sha256_of(path)}
            for flag, path in ([] if args is None else texts_named(args))
        ],
        "seconds": round(time.time() - began, 1),
        "results": hashlib.sha256(results).hexdigest(),
    }
    replace_file(folder / "made.json", json.dumps(about, indent=2) + "\n")


def read_record(results: Path) -> dict:
    """What made.json says of the rows in a results file beside it; {} where there is none, or it
    lies beside other rows."""
    try:
        about = json.loads((results.parent / "made.json").read_bytes())
        same = about["results"] == hashlib.sha256(results.read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return about if same else {}


def replace_file(path: Path, text: str) -> None:
    """Put a text in the place of a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def without_folders(word: str) -> str:
    """A word of a command line, the absolute paths in it (alone, in a list, behind a = or a :) cut
    to their last part."""
    return re.sub(r"(^|[=:,])~?/(?:[^=:,]*/)?([^=:,/]+)/?(?=[=:,]|$)", r"\1\2", word)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, or over the names and sha256 of a folder's files, hidden ones left
    out."""
    if path.is_dir():
        whole = hashlib.sha256()
        for file in visible_files(path):
            whole.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
        return whole.hexdigest()
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def version(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_version() -> str:
    """The sha256 over every Python file of the project but its tests, names included: the same in
    every folder and checkout, and without git."""
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    whole = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(ROOT).as_posix()
        whole.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def commit() -> dict:
    """The project's own git commit, and whether tracked files differ from it; None for both where
    the project is no git repository or there is no git."""
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top) != ROOT:
        return {"commit": None, "changed": None}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(changes)}


def git(*words: str) -> str | None:
    """What git answers of the project's folder; None where it cannot."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    """Print the key of every script of runs/."""
    code = code_version()
    for script in sorted((ROOT / "runs").glob("*.sh")):
        key = hashlib.sha256(code.encode() + script.read_bytes()).hexdigest()
        print(script.name, key)


if __name__ == "__main__":
    main()
