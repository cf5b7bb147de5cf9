"""Texts that every Python brings along: the language reference, the standard library's source, and
the headers of its C interface. No network is needed.

    print(pydocs()[0])
"""

from __future__ import annotations

import contextlib
import os
import sysconfig
from pathlib import Path

from settings.fields import check, one_line

# What of Python's folder is not the library itself: installed packages, tests, demos, bundled
# wheels, and what is generated for one platform.
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
}
GENERATED = ("_sysconfigdata", "sitecustomize", "usercustomize")
HEADER_FOLDERS = ("", "cpython", "internal")


def pydocs() -> list[str]:
    """The language reference inside CPython."""
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise ValueError(
            f"dataset='pydocs': this Python lacks pydoc_data ({one_line(e)}); use "
            "--dataset=pycode or text:PATH"
        ) from None
    return [topics[k] for k in sorted(topics)]


def pycode() -> list[str]:
    """The standard library's source, by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    docs = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [
            f for f in folders if f not in NOT_LIBRARY and not f.startswith(("config-", "."))
        ]
        for name in names:
            path = Path(folder, name)
            if not name.endswith(".py") or name.startswith(GENERATED) or not path.is_file():
                continue
            with contextlib.suppress(UnicodeDecodeError):
                docs[path.relative_to(root).as_posix()] = path.read_bytes().decode("utf-8")
    check(
        bool(docs),
        "dataset='pycode'",
        f"no source of the standard library under {root}",
        "use --dataset=pydocs or text:PATH",
    )
    return [docs[k] for k in sorted(docs)]


def cheaders() -> list[str]:
    """The headers of CPython's C interface, by path, without those of packages and the one that is
    made for one platform."""
    root = Path(sysconfig.get_paths()["include"])
    found = [path for folder in HEADER_FOLDERS for path in (root / folder).glob("*.h")]
    named = {path.relative_to(root).as_posix(): path for path in found}
    named.pop("pyconfig.h", None)
    check(
        bool(named),
        "dataset='cheaders'",
        f"no headers of Python's C interface under {root}",
        "install them (python3-dev in Debian), or use another corpus",
    )
    return [named[k].read_bytes().decode("utf-8") for k in sorted(named)]
