"""Token files: a 4096-byte header that says what the file is, then the ids. Every use checks all of
it, so that a changed tokenizer or a damaged file is never trained on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import check
from loaders.fetch import new_file
from loaders.tokenizer import check_ids
from settings.fields import one_line

MAGIC = b"subtoken tokens 1\n"
HEADER_BYTES = 4096
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
FIELDS = {
    "dtype": str,
    "tokenizer": str,
    "vocab_size": int,
    "eot": int,
    "count": int,
    "sha256": str,
    "corpus": str,
    "split": str,
}


@dataclass(frozen=True)
class TokenFile:
    """Tokens on disk. ids: (count,) read-only memory map of uint8, uint16 or uint32; header: the
    fields of FIELDS."""

    path: Path
    ids: np.ndarray
    header: dict

    def __len__(self) -> int:
        return len(self.ids)


def write_tokens(
    path: str | os.PathLike, ids, tokenizer, corpus: str = "", split: str = ""
) -> Path:
    """Write a token file, whole or not at all, and return its path.

    ids: (n,) integers, n >= 1, or an iterator of such arrays, written one after the other so that a
    corpus need not fit in memory. ValueError for no ids, an id outside the tokenizer's vocabulary,
    or a folder that cannot be written."""
    path = Path(path)
    chunks = ids if isinstance(ids, Iterator) else [ids]
    dtype = next(n for n, d in DTYPES.items() if tokenizer.vocab_size - 1 <= np.iinfo(d).max)
    seen = hashlib.sha256()
    count = 0
    try:
        with new_file(path, ".tmp") as f:
            f.write(b" " * HEADER_BYTES)
            for chunk in chunks:
                check_ids(chunk, tokenizer.vocab_size)
                a = np.asarray(chunk).astype(DTYPES[dtype])
                f.write(a.tobytes())
                seen.update(a.tobytes())
                count += len(a)
            check(
                count > 0,
                f"no tokens for {path}",
                "a token file holds at least one",
                "give a corpus with text",
            )
            header = {
                "dtype": dtype,
                "tokenizer": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "eot": tokenizer.eot,
                "count": count,
                "sha256": seen.hexdigest(),
                "corpus": corpus,
                "split": split,
            }
            head = MAGIC + json.dumps(header).encode("ascii")
            check(
                len(head) <= HEADER_BYTES,
                f"{path}: a header of {len(head)} bytes",
                f"at most {HEADER_BYTES}",
                "shorten the names",
            )
            f.seek(0)
            f.write(head.ljust(HEADER_BYTES))
    except OSError as e:
        raise ValueError(
            f"cannot write {path} ({one_line(e)}): token files need a folder with space; give "
            "--data_dir=DIR"
        ) from None
    return path


def read_header(path: Path, do: str) -> dict:
    """The checked header of a token file. do: what to do where it is damaged."""
    try:
        with open(path, "rb") as f:
            head = f.read(HEADER_BYTES)
    except OSError as e:
        raise ValueError(
            f"{path} cannot be read ({one_line(e)}): a token file is needed; prepare the corpus "
            "first"
        ) from None
    check(
        len(head) == HEADER_BYTES and head.startswith(MAGIC),
        str(path),
        "is not a token file, or its header is cut or damaged",
        do,
    )
    try:
        header = json.loads(head[len(MAGIC) :].decode("ascii"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: its header is damaged ({one_line(e)}); {do}") from None
    ok = (
        isinstance(header, dict)
        and set(header) == set(FIELDS)
        and all(type(header[k]) is t for k, t in FIELDS.items())
    )
    check(
        ok and header["dtype"] in DTYPES and header["count"] >= 1,
        str(path),
        "its header is damaged or of another version",
        do,
    )
    return header


def open_tokens(path: str | os.PathLike, tokenizer) -> TokenFile:
    """Memory-map a token file after checking all of it: header, length, sha256 of the payload,
    tokenizer, largest id. ValueError names the file, what is wrong with it and what to do."""
    path = Path(path)
    do = "delete it, it is built again"
    header = read_header(path, do)
    dtype = np.dtype(DTYPES[header["dtype"]])
    want = HEADER_BYTES + header["count"] * dtype.itemsize
    size = path.stat().st_size
    check(size == want, f"{path} has {size} bytes", f"its header says {want}", do)
    for key, have in (
        ("tokenizer", tokenizer.name),
        ("vocab_size", tokenizer.vocab_size),
        ("eot", tokenizer.eot),
    ):
        check(
            header[key] == have,
            f"{path} was made with {key}={header[key]!r}",
            f"the tokenizer now has {have!r}",
            "use that tokenizer, or " + do,
        )
    ids = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(header["count"],))
    check(
        hashlib.sha256(ids).hexdigest() == header["sha256"],
        str(path),
        "its tokens do not have the sha256 of its header",
        do,
    )
    top = int(ids.max())
    check(
        top < header["vocab_size"],
        f"{path} holds token id {top}",
        f"the vocabulary has ids 0..{header['vocab_size'] - 1}",
        do,
    )
    return TokenFile(path, ids, header)
