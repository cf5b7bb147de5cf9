"""Text to token ids and back: bytes, GPT-2, and what runs the tokenizers of pretrained models
(tokenizer_json.py makes those).

A tokenizer has name, vocab_size (largest id + 1), eot (the id that ends a document), bos (the id
that begins one, or None), definition (the tokenizer.json it was made from, parsed, or None),
encode(str) -> list[int] and decode(ids) -> str. Text that spells a special token is ordinary text,
so eot never comes out of encode.

    print(get_tokenizer("byte").encode("Hello"))
"""

from __future__ import annotations

import json
import re
import unicodedata

import numpy as np
import torch

from config import check

LONG_RUN = 500_000  # blanks in a row; at a million the matcher of tiktoken panics


def one_line(e: object) -> str:
    """Write str(e) on one line, for messages that quote somebody else's error."""
    return " ".join(str(e).split()) or type(e).__name__


def damaged(name: str, came: str, allowed: str) -> ValueError:
    """Make the error for a tokenizer.json that cannot be one."""
    return ValueError(
        f"tokenizer {name}: {came}: {allowed}; give the tokenizer.json of a Hugging Face model "
        "folder, unchanged"
    )


def check_ids(ids, vocab_size: int) -> None:
    """Raise ValueError unless every id (tensor, array or list of integers, any shape) lies in
    0..vocab_size - 1."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    a = np.asarray(ids)
    if a.size == 0:
        return
    check(
        a.dtype.kind in "iu",
        f"token ids of type {a.dtype}",
        "ids are integers",
        "encode the text with the tokenizer first",
    )
    lowest = int(a.min())
    bad = lowest if lowest < 0 else int(a.max())
    check(
        0 <= bad < vocab_size,
        f"token id {bad}",
        f"the vocabulary has ids 0..{vocab_size - 1}",
        "use the tokenizer of these ids",
    )


def encoded(tokenizer, text: str) -> list[int]:
    """Encode a text from its start: the token that begins one first, where the tokenizer has such a
    token."""
    ids = tokenizer.encode(text)
    return ids if tokenizer.bos is None else [tokenizer.bos, *ids]


def _valid(text: str) -> str:
    """Put U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteTokenizer:
    """Takes the bytes of UTF-8 as ids 0..255; 256 ends a document."""

    name = "byte"
    vocab_size = 257
    eot = 256
    bos = None
    definition = None

    def encode(self, text: str) -> list[int]:
        """Return the text's bytes; never eot. A lone surrogate becomes U+FFFD."""
        return list(_valid(text).encode("utf-8"))

    def decode(self, ids) -> str:
        """Return the ids' text; eot gives nothing, invalid UTF-8 gives U+FFFD. ValueError for an id
        outside 0..256."""
        ids = [int(i) for i in ids]
        check_ids(ids, self.vocab_size)
        return bytes(i for i in ids if i != self.eot).decode("utf-8", "replace")


class TiktokenTokenizer:
    """Wraps any tiktoken.Encoding. eot: id of its end-of-document token, a special one; by default
    that of <|endoftext|>."""

    definition = None

    def __init__(
        self, encoding, name: str | None = None, eot: int | None = None, bos: int | None = None
    ):
        self.encoding = encoding
        self.name = name or encoding.name
        self.vocab_size = encoding.n_vocab
        self.bos = bos
        try:
            self.eot = encoding.encode_single_token("<|endoftext|>") if eot is None else int(eot)
        except KeyError:
            raise ValueError(
                f"tokenizer {self.name} has no <|endoftext|>: documents need an end token; name "
                "its id with eot="
            ) from None
        check(
            encoding.is_special_token(self.eot),
            f"tokenizer {self.name} with eot={self.eot}",
            "text could encode to it",
            "give the id of a special token",
        )

    def encode(self, text: str) -> list[int]:
        """Return the text's ids; the spelling of a special token is ordinary text, so eot never
        comes out."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Return the ids' text; eot gives nothing, invalid UTF-8 gives U+FFFD. ValueError for an id
        that is not in the vocabulary."""
        ids = [int(i) for i in ids]
        check_ids(ids, self.vocab_size)
        try:
            return self.encoding.decode([i for i in ids if i != self.eot], errors="replace")
        except KeyError as e:  # a hole in the numbering
            raise ValueError(
                f"token id {one_line(e)}: {self.name} has no such token; use the tokenizer of "
                "these ids"
            ) from None


class BytePairTokenizer(TiktokenTokenizer):
    """Runs the byte-level BPE of a tokenizer.json in tiktoken.

    encoding: a tiktoken.Encoding; nfc: text is brought to Unicode's NFC first; pattern: how text is
    cut; absent: the bytes that have no token."""

    def __init__(
        self,
        encoding,
        definition: dict,
        eot: int,
        bos: int | None,
        nfc: bool,
        pattern: str,
        absent: bytes,
    ):
        super().__init__(encoding, eot=eot, bos=bos)
        self.definition = definition
        self.nfc = nfc
        self.pattern = pattern
        self.absent = absent

    def encode(self, text: str) -> list[int]:
        """Return the text's ids, those of its tokenizer.json; never a special one. Bytes without a
        token are left out, as they are there."""
        text = _valid(text)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        raw = text.encode("utf-8")
        overflows = len(text) > LONG_RUN and re.search(rf"\s{{{LONG_RUN}}}", text)
        if not overflows and len(raw) == len(raw.translate(None, self.absent)):
            return self.encoding.encode_ordinary(text)
        return self._encode_piecewise(text)

    def _encode_piecewise(self, text: str) -> list[int]:
        """Cut the text here, drop the bytes without a token, and let tiktoken merge each piece."""
        import regex  # a dependency of tiktoken; its Unicode may be newer, hence only here

        ids = []
        for piece in regex.findall(self.pattern, text):
            raw = piece.encode("utf-8").translate(None, self.absent)
            if raw:
                ids += self.encoding._encode_single_piece(raw)
        return ids


class LibraryTokenizer:
    """Runs a tokenizer.json in the package `tokenizers`. kind: what it is, for the message where
    the package is missing."""

    def __init__(self, definition: dict, name: str, eot: int, bos: int | None, kind: str):
        try:
            from tokenizers import Tokenizer  # optional: nothing else here needs it
        except ImportError:
            raise ValueError(
                f"tokenizer {name} is {kind}: only byte-level BPE is read without the package "
                "tokenizers; pip install tokenizers"
            ) from None
        # without added tokens their spelling is text; without truncation nothing of a document is
        # lost
        plain = {
            **definition,
            "added_tokens": [],
            "truncation": None,
            "padding": None,
            "post_processor": None,
        }
        try:
            self._decoder = Tokenizer.from_str(json.dumps(definition))
            self._encoder = Tokenizer.from_str(json.dumps(plain))
        except Exception as e:  # the package raises no narrower class
            raise damaged(
                name,
                f"the package tokenizers refuses it ({one_line(e)})",
                "a whole tokenizer.json is needed",
            ) from None
        self.definition = definition
        self.name = name
        self.eot = eot
        self.bos = bos
        self.vocab_size = max(self._decoder.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the text's ids; never eot, and no bos."""
        ids = self._encoder.encode(_valid(text), add_special_tokens=False).ids
        return [i for i in ids if i != self.eot]

    def decode(self, ids) -> str:
        """Return the ids' text; eot gives nothing. ValueError for an id that is not in the
        vocabulary."""
        ids = [int(i) for i in ids]
        check_ids(ids, self.vocab_size)
        hole = next((i for i in ids if self._decoder.id_to_token(i) is None), None)
        check(
            hole is None,
            f"token id {hole}",
            f"{self.name} has no such token",
            "use the tokenizer of these ids",
        )
        return self._decoder.decode([i for i in ids if i != self.eot], skip_special_tokens=False)


def get_tokenizer(name: str) -> ByteTokenizer | TiktokenTokenizer:
    """Return the tokenizer `byte` or `gpt2`. ValueError for another name, or if tiktoken or its
    vocabulary cannot be had."""
    check(name in ("byte", "gpt2"), f"tokenizer={name!r}", "one of byte, gpt2", "choose one")
    if name == "byte":
        return ByteTokenizer()
    try:
        import tiktoken  # here, so that the default needs neither the package nor the network

        return TiktokenTokenizer(tiktoken.get_encoding("gpt2"), "gpt2")
    except (ImportError, OSError, ValueError) as e:
        raise ValueError(
            f"tokenizer='gpt2': tiktoken or its vocabulary cannot be loaded ({one_line(e)}); pip "
            "install tiktoken, go online once, or set TIKTOKEN_CACHE_DIR to a folder that has the "
            "vocabulary, or use --tokenizer=byte"
        ) from None
