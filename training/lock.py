"""One run owns a folder: a second one is refused while the first is alive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is refused
    fcntl = None


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own an existing folder inside the `with`. The lock is the operating system's, on the folder
    itself: it leaves no file, and ends with its process however that ends. Raises ValueError where
    somebody else owns it. A system or a network's folder without such locks refuses nobody."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder)
        yield
    finally:
        os.close(handle)


def lock(handle: int, folder: Path) -> None:
    """Lock an open folder, as `owned` says."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"out_dir={folder}: another run is at work in it; wait for its end, or name another "
            "folder"
        ) from None
    except OSError:  # no locks there
        return
