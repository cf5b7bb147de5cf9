"""Which folder a run may have: an empty one, or its own. One run owns a folder: a second one is
refused while the first is alive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from settings.fields import check
from settings.places import check_begun, check_folder

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


def check_run_dir(folder: Path, resume: bool, main: bool = True) -> None:
    """Raise ValueError unless a new run may have a folder, which can be written to, and is missing
    or empty then, or with resume there is something to continue. main: whether to look for an
    owner, too."""
    place = f"out_dir={folder}"
    check_folder("out_dir", folder)
    if resume:
        check_begun(folder)
        return
    if main and folder.is_dir():
        with owned(folder):  # the folder of a run that is alive is not one to resume
            pass
    check(
        not (folder.is_dir() and any(folder.iterdir())),
        place,
        "is not empty",
        "give --resume to continue it, or another folder",
    )
