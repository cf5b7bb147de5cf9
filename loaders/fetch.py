"""Files that appear whole or not at all, and downloads against a pinned sha256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path

from config import check
from settings.fields import one_line

OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def naming(path: str | os.PathLike):
    """Let a disk's OSError inside the `with` name the file: that of a full one does not. Others, of
    a network, say something else."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno in OF_DISKS:
            e.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def new_file(path: Path, suffix: str):
    """A binary file that becomes `path` when the block ends well (fsync, then rename) and vanishes
    otherwise. Its name is unique, so two processes that write the same path never share a file: the
    later one wins, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{suffix}")
    try:
        with naming(path), open(part, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def fetch(url: str, sha256: str, path: Path, timeout: float) -> None:
    """Write what lies at a URL to `path`. ValueError unless all of it came, with this sha256."""
    with urllib.request.urlopen(url, timeout=timeout) as answer, new_file(path, ".part") as f:
        length = answer.headers.get("Content-Length")
        seen = hashlib.sha256()
        got = 0
        while block := answer.read(1 << 16):
            f.write(block)
            seen.update(block)
            got += len(block)
        check(
            length is None or got == int(length),
            f"{got} of {length} bytes",
            "truncated",
            "try again",
        )
        check(
            seen.hexdigest() == sha256,
            f"its sha256 is {seen.hexdigest()}",
            "not the pinned one",
            "try again",
        )


def download(
    urls: str | Sequence[str], sha256: str, path: str | os.PathLike, timeout: float = 30.0
) -> Path:
    """Fetch one file to `path` unless it is there already, and return the path.

    urls: one, or mirrors tried in order; sha256: hex digest the file must have; timeout: seconds a
    connection may be silent. ValueError, one line with URLs, sha256 and path, if no URL gives these
    bytes; or if another file lies at `path`, which is left alone. No part of a failed download
    stays behind."""
    path = Path(path)
    urls = [urls] if isinstance(urls, str) else list(urls)
    if path.is_file():
        came = hashlib.sha256(path.read_bytes()).hexdigest()
        check(
            came == sha256,
            f"{path} has sha256 {came}",
            f"it should be {sha256}",
            f"delete it, or put there {' or '.join(urls)}",
        )
        return path
    failed = []
    for url in urls:
        try:
            fetch(url, sha256, path, timeout)
            return path
        # offline, 404 and stalls are OSError; truncation and hash ValueError
        except (OSError, http.client.HTTPException, ValueError) as e:
            failed.append(f"{url} ({one_line(e)})")
    raise ValueError(
        f"could not download {' or '.join(failed)}: the file with sha256 {sha256} is needed; "
        f"try again, or place it by hand at {path}"
    )
