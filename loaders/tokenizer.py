"""Text to token ids and back: bytes and GPT-2 (tokenizer_json.py has those of pretrained models).

A tokenizer has name, vocab_size (largest id + 1), eot (the id that ends a document), bos (the id
that begins one, or None), ends (ids that its model's files say end an answer), definition (the
tokenizer.json it was made from, parsed, or None), encode(str) -> list[int] and decode(ids) -> str.
Text that spells a special token is ordinary text, so eot never comes out of encode, unless
encode(text, special=True) asks for special tokens. A model may have more ids than its tokenizer:
decode shows those as nothing.

    print(get_tokenizer("byte").encode("Hello"))
"""

from __future__ import annotations

import numpy as np
import torch

from config import check
from settings.fields import one_line


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


def encode_after(tokenizer, before: str, text: str, special: bool = False) -> list[int]:
    """Return the ids that text adds to those of before. A text encoded apart would begin, with
    SentencePiece, with a blank that is not there. special: whether special tokens are matched.

    Where a token goes across from one to the other, the ids of text alone."""
    head = tokenizer.encode(before, special)
    whole = tokenizer.encode(before + text, special)
    return whole[len(head) :] if whole[: len(head)] == head else tokenizer.encode(text, special)


def end_tokens(tokenizer) -> list[int]:
    """List the ids that end generation: those that the model's files name, and the one that ends a
    document."""
    return list(dict.fromkeys([*tokenizer.ends, tokenizer.eot]))


def known_ids(ids, vocab_size: int, eot: int) -> list[int]:
    """Return the ids, any iterable of integers, that have a text: below vocab_size and not eot.
    ValueError for a negative one."""
    ids = [int(i) for i in ids]
    lowest = min(ids, default=0)
    check(
        lowest >= 0,
        f"token id {lowest}",
        "ids are integers from 0",
        "decode what a tokenizer or a model gave",
    )
    return [i for i in ids if i < vocab_size and i != eot]


def valid_text(text: str) -> str:
    """Put U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteTokenizer:
    """Takes the bytes of UTF-8 as ids 0..255; 256 ends a document."""

    name = "byte"
    vocab_size = 257
    eot = 256
    bos = None
    definition = None
    ends = ()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the text's bytes; never eot, which has no spelling. A lone surrogate becomes
        U+FFFD."""
        return list(valid_text(text).encode("utf-8"))

    def decode(self, ids) -> str:
        """Return the ids' text; eot and ids above give nothing, invalid UTF-8 gives U+FFFD.
        ValueError for a negative id."""
        return bytes(known_ids(ids, self.vocab_size, self.eot)).decode("utf-8", "replace")


class TiktokenTokenizer:
    """Wraps any tiktoken.Encoding. eot: id of its end-of-document token, a special one; by default
    that of <|endoftext|>."""

    definition = None
    ends = ()

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

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the text's ids; the spelling of a special token is ordinary text, so eot never
        comes out, unless special is True."""
        if special:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Return the ids' text; eot and ids without a token give nothing, invalid UTF-8 gives
        U+FFFD. ValueError for a negative id."""
        ids = known_ids(ids, self.vocab_size, self.eot)
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def _bytes(self, i: int) -> bytes:
        """Return a token's bytes, none in a hole of the numbering."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return b""


class TextStream:
    """Shows text as its tokens come. Tokens are never decoded apart: one may hold half a character,
    or lose its blank as the first. The whole is decoded each time, and what is new is shown.

    ids: (n,) tokens that are not shown, a prompt's, which what comes continues."""

    def __init__(self, tokenizer, ids=()):
        self.tokenizer = tokenizer
        self.ids = list(ids)
        self.shown = len(tokenizer.decode(self.ids))

    def add(self, ids) -> str:
        """Return what these ids add to the text, but not yet a character that is not whole."""
        self.ids.extend(ids)
        return self._new(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def end(self) -> str:
        """Return the rest of the text: U+FFFD for what did not become whole."""
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        start = self.shown
        self.shown = max(start, len(text))
        return text[start:]


def decode_after(tokenizer, before, ids) -> str:
    """Return the text that ids add to the text of the tokens before them."""
    stream = TextStream(tokenizer, before)
    return stream.add(ids) + stream.end()


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
