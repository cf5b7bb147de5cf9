"""Text to token ids and back: bytes, GPT-2, and the tokenizers of pretrained models, from their
tokenizer.json or GGUF metadata.

A tokenizer has name, vocab_size (largest id + 1), eot (the id that ends a document), bos (the id
that begins one, or None), definition (the tokenizer.json it was made from, parsed, or None),
encode(str) -> list[int] and decode(ids) -> str. Text that spells a special token is ordinary text,
so eot never comes out of encode.

Byte-level BPE (GPT-2, Llama 3, Qwen2.5, SmolLM2) runs in tiktoken, from ranks built here, offline.
A tokenizer.json merges the pair that comes first in its list of merges; tiktoken merges the pair
that joined has the smallest id, and takes a piece that is a token whole. `_same_merges` checks that
the two are the same; where they are not, or cannot be known to be, the optional package
`tokenizers` does it.

    print(from_definition(json.load(open("tokenizer.json")), "my").encode("Hello 123"))
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from itertools import pairwise

import numpy as np
import torch

from config import check

# what ends a document, the first that is there
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")

# How text is cut before merging: the patterns as they stand in the models' own tokenizer.json. Each
# of PATTERNS cuts the same, with
# possessive quantifiers so that a run of a million blanks does not exhaust the matcher's
# backtracking.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|(?:[^\S\r\n]*+[\r\n]++)++"
    r"|\s++(?!\S)|\s+(?!\S)|\s"
)
PATTERNS = {
    GPT2: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++(?!\S)|\s+(?!\S)|\s",
    LLAMA3: _LLAMA3,
    QWEN2: _LLAMA3.replace(r"\p{N}{1,3}+", r"\p{N}"),
}
# GPT-2's pattern on the pieces between single digits (SmolLM2): a run of blanks before a digit ends
# its piece, so it stays whole
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?![^\s\p{N}])|\s+(?!\S)|\s"

LONG_RUN = 500_000  # blanks in a row; at a million the matcher of tiktoken panics


def one_line(e: object) -> str:
    """str(e) on one line, for messages that quote somebody else's error."""
    return " ".join(str(e).split()) or type(e).__name__


def check_ids(ids, vocab_size: int) -> None:
    """Raise ValueError unless every id (tensor, array or list of integers, any shape) lies in
    0..vocab_size - 1."""
    a = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if a.size:
        check(
            a.dtype.kind in "iu",
            f"token ids of type {a.dtype}",
            "ids are integers",
            "encode the text with the tokenizer first",
        )
        bad = int(a.min()) if a.min() < 0 else int(a.max())
        check(
            0 <= bad < vocab_size,
            f"token id {bad}",
            f"the vocabulary has ids 0..{vocab_size - 1}",
            "use the tokenizer of these ids",
        )


def _valid(text: str) -> str:
    """The text, with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# -- tokenizers


def encoded(tokenizer, text: str) -> list[int]:
    """Ids of a text from its start: the token that begins one first, where the tokenizer has such a
    token."""
    return ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 ends a document."""

    name = "byte"
    vocab_size = 257
    eot = 256
    bos = None
    definition = None

    def encode(self, text: str) -> list[int]:
        """Bytes of the text; never eot. A lone surrogate becomes U+FFFD."""
        return list(_valid(text).encode("utf-8"))

    def decode(self, ids) -> str:
        """Text of the ids; eot gives nothing, invalid UTF-8 gives U+FFFD. ValueError for an id
        outside 0..256."""
        ids = [int(i) for i in ids]
        check_ids(ids, self.vocab_size)
        return bytes(i for i in ids if i != self.eot).decode("utf-8", "replace")


class TiktokenTokenizer:
    """Any tiktoken.Encoding. eot: id of its end-of-document token, a special one; by default that
    of <|endoftext|>."""

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
        """Ids of the text; the spelling of a special token is ordinary text, so eot never comes
        out."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Text of the ids; eot gives nothing, invalid UTF-8 gives U+FFFD. ValueError for an id that
        is not in the vocabulary."""
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
    """Byte-level BPE of a tokenizer.json. encoding: a tiktoken.Encoding; nfc: text is brought to
    Unicode's NFC first."""

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
        """Ids of the text, those of its tokenizer.json; never a special one. Bytes without a token
        are left out, as they are there."""
        text = unicodedata.normalize("NFC", _valid(text)) if self.nfc else _valid(text)
        raw = text.encode("utf-8")
        overflows = len(text) > LONG_RUN and re.search(rf"\s{{{LONG_RUN}}}", text)
        if not overflows and len(raw) == len(raw.translate(None, self.absent)):
            return self.encoding.encode_ordinary(text)
        import regex  # a dependency of tiktoken; its Unicode may be newer, hence only here

        pieces = (
            p.encode("utf-8").translate(None, self.absent)
            for p in regex.findall(self.pattern, text)
        )
        return [i for p in pieces if p for i in self.encoding._encode_single_piece(p)]


class LibraryTokenizer:
    """A tokenizer.json through the package `tokenizers`. kind: what it is, for the message where
    the package is missing."""

    def __init__(self, definition: dict, name: str, eot: int, bos: int | None, kind: str):
        try:
            from tokenizers import Tokenizer  # optional: nothing else here needs it
        except ImportError:
            raise ValueError(
                f"tokenizer {name} is {kind}: only byte-level BPE is read without the package "
                "tokenizers; "
                "pip install tokenizers"
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
            self._decoder, self._encoder = (
                Tokenizer.from_str(json.dumps(d)) for d in (definition, plain)
            )
        except Exception as e:  # the package raises no narrower class
            raise _damaged(
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
        """Ids of the text; never eot, and no bos."""
        return [
            i
            for i in self._encoder.encode(_valid(text), add_special_tokens=False).ids
            if i != self.eot
        ]

    def decode(self, ids) -> str:
        """Text of the ids; eot gives nothing. ValueError for an id that is not in the
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


def get_tokenizer(name: str):
    """The tokenizer `byte` or `gpt2`. ValueError for another name, or if tiktoken or its vocabulary
    cannot be had."""
    check(name in ("byte", "gpt2"), f"tokenizer={name!r}", "one of byte, gpt2", "choose one")
    if name == "byte":
        return ByteTokenizer()
    try:
        import tiktoken  # here, so that the default needs neither the package nor the network

        return TiktokenTokenizer(tiktoken.get_encoding("gpt2"), "gpt2")
    except (ImportError, OSError, ValueError) as e:
        raise ValueError(
            f"tokenizer='gpt2': tiktoken or its vocabulary cannot be loaded ({one_line(e)}); pip "
            "install tiktoken, go online "
            "once, or set TIKTOKEN_CACHE_DIR to a folder that has the vocabulary, or use "
            "--tokenizer=byte"
        ) from None


# -- tokenizer.json


def _alphabet() -> dict[str, int]:
    """{character: byte} of GPT-2: printable bytes stand for themselves, the others for U+0100
    onwards."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}


ALPHABET = _alphabet()


def _damaged(name: str, came: str, allowed: str) -> ValueError:
    return ValueError(
        f"tokenizer {name}: {came}: {allowed}; give the tokenizer.json of a Hugging Face model "
        "folder, unchanged"
    )


def _need(name: str, ok: bool, came: str, allowed: str) -> None:
    if not ok:
        raise _damaged(name, came, allowed)


def _is_id(x: object) -> bool:
    return type(x) is int and 0 <= x < 2**31


def _type(part: object) -> str:
    """The `type` of a part of a tokenizer.json; 'none' for null."""
    return (
        str(part.get("type"))
        if isinstance(part, dict)
        else "none"
        if part is None
        else type(part).__name__
    )


def _parts(spec: object, name: str) -> tuple[dict, dict[str, int]]:
    """(model, {content: id} of the added tokens) of a tokenizer.json; a BPE model comes with its
    merges as pairs. ValueError, one line."""
    _need(name, isinstance(spec, dict), f"a {type(spec).__name__}", "a tokenizer.json is an object")
    model = spec.get("model")
    added = spec.get("added_tokens") or []
    _need(
        name,
        isinstance(model, dict),
        f"its model is {_type(model)}",
        "an object with type and vocab is needed",
    )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _need(
            name,
            isinstance(spec.get(part), dict | None),
            f"its {part} is a {_type(spec.get(part))}",
            "an object or null is needed",
        )
    ok = isinstance(added, list) and all(
        isinstance(t, dict) and _is_id(t.get("id")) and isinstance(t.get("content"), str)
        for t in added
    )
    _need(
        name,
        ok,
        "its added_tokens are not all of the form {id, content}",
        "id is an integer from 0, content a string",
    )
    special = {t["content"]: t["id"] for t in added}
    _need(
        name,
        len(set(special.values())) == len(added),
        "two of its added_tokens are the same",
        "each has an id and a content of its own",
    )
    # older files leave it out
    model = {**model, "type": model.get("type") or ("BPE" if "merges" in model else None)}
    _need(
        name,
        isinstance(model["type"], str),
        f"its model.type is {model['type']!r}",
        "a string such as BPE is needed",
    )
    if model["type"] != "BPE":
        return model, special
    vocab = model.get("vocab")
    merges = model.get("merges")
    _need(
        name,
        isinstance(vocab, dict) and bool(vocab) and all(_is_id(i) for i in vocab.values()),
        "its model.vocab is missing or damaged",
        "tokens with integer ids from 0 are needed",
    )
    ids = {**vocab, **special}
    wrong = [t for t, i in special.items() if vocab.get(t, i) != i]
    _need(
        name,
        not wrong and len(set(ids.values())) == len(ids),
        f"its token {wrong[0]!r} has two ids" if wrong else "two tokens share an id",
        "every token has one id of its own",
    )
    _need(
        name, isinstance(merges, list), "its model.merges are missing", "a list of pairs is needed"
    )
    pairs = [
        tuple(m.split(" ") if isinstance(m, str) else m if isinstance(m, list) else ())
        for m in merges
    ]
    bad = next(
        (
            i
            for i, p in enumerate(pairs)
            if not (
                len(p) == 2
                and isinstance(p[0], str)
                and isinstance(p[1], str)
                and p[0] in vocab
                and p[1] in vocab
                and p[0] + p[1] in vocab
            )
        ),
        None,
    )
    _need(
        name,
        bad is None or _odd(model),
        f"its merge {bad} {merges[bad or 0 :][:1]}",
        "two tokens of the vocabulary that make a third, as 'a b' or ['a', 'b']",
    )
    return {**model, "merges": pairs}, special


def _odd(model: dict) -> bool:
    """BPE that is not plain byte-level, whatever its vocabulary: SentencePiece, BPE of characters,
    BPE-dropout."""
    keys = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    return any(model.get(k) for k in keys)


def _pattern(pre: dict | None) -> str | None:
    """tiktoken's pattern for a pre-tokenizer, or None if it is none of the known ones."""
    steps = pre.get("pretokenizers") if _type(pre) == "Sequence" else [pre]
    kinds = [_type(s) for s in steps] if isinstance(steps, list) else []
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    first = steps[0]
    by_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_regex:
        return PATTERNS[GPT2]
    if kinds == ["Digits", "ByteLevel"] and by_regex and first.get("individual_digits"):
        return DIGITS
    if (
        kinds == ["Split", "ByteLevel"]
        and not by_regex
        and first.get("behavior") == "Isolated"
        and not first.get("invert")
    ):
        cut = first.get("pattern")
        return (
            PATTERNS.get(cut.get("Regex"))
            if isinstance(cut, dict) and isinstance(cut.get("Regex"), str)
            else None
        )
    return None


def _merged(parts: list[bytes], order: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """The parts after all merges, the one first in the list each time, leftmost among equals."""
    while len(parts) > 1:
        ranks = [order.get(p, math.inf) for p in pairwise(parts)]
        i = ranks.index(min(ranks))
        if ranks[i] == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _same_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], whole: bool) -> bool:
    """Whether merging by the list gives what tiktoken gives from the ids. whole (ignore_merges):
    pieces that are tokens are taken whole.

    It does if tokens are made in the order of their ids and every token, alone, merges to itself:
    two neighbours that join to a token t have, between boundaries not merged across, gone the way t
    goes alone, so their pair is in the list. A token that only exists whole does no harm if every
    pair that joins to it is in the list."""
    made = [ranks[a + b] for a, b in merges]
    if any(a > b for a, b in pairwise(made)):
        return False
    order = {pair: i for i, pair in enumerate(merges)}

    def fine(t: bytes) -> bool:
        cuts = ((t[:i], t[i:]) for i in range(1, len(t)))
        return (
            whole and all(c in order for c in cuts if c[0] in ranks and c[1] in ranks)
        ) or _merged([bytes([b]) for b in t], order) == [t]

    return all(fine(t) for t in ranks if len(t) > 1)


def _byte_level(
    spec: dict, model: dict, special: dict[str, int]
) -> tuple[str, dict[bytes, int]] | str:
    """(pattern, ranks) for tiktoken, or what the tokenizer is instead, in words."""
    if model["type"] != "BPE" or _odd(model):
        return (
            f"a {model['type']} "
            f"model{' with byte_fallback (SentencePiece)' if model.get('byte_fallback') else ''}"
        )
    pattern = _pattern(spec.get("pre_tokenizer"))
    pre = spec.get("pre_tokenizer")
    if not pattern:
        steps = pre.get("pretokenizers") if _type(pre) == "Sequence" else None
        return (
            "a BPE model with the pre-tokenizer "
            f"{_type(pre)}{[_type(s) for s in steps] if isinstance(steps, list) else ''} that is "
            "not known here"
        )
    if (
        _type(spec.get("normalizer")) not in ("none", "NFC")
        or _type(spec.get("decoder")) != "ByteLevel"
    ):
        return (
            f"a BPE model with normalizer {_type(spec.get('normalizer'))} and decoder "
            f"{_type(spec.get('decoder'))}"
        )
    try:
        ranks = {
            bytes(ALPHABET[c] for c in t): i for t, i in model["vocab"].items() if t not in special
        }
        merges = [tuple(bytes(ALPHABET[c] for c in t) for t in pair) for pair in model["merges"]]
    except KeyError:
        return "a BPE model of characters, not bytes"
    if model.get("unk_token") and any(bytes([b]) not in ranks for b in range(256)):
        return "a BPE model with an unknown token"
    if any(a + b not in ranks for a, b in merges) or not _same_merges(
        ranks, merges, bool(model.get("ignore_merges"))
    ):
        return "a BPE model whose merges do not follow its ids"
    return pattern, ranks


def _first_token(post: object) -> int | None:
    """Id that a post-processor puts before a text, or None."""
    if _type(post) == "Sequence":
        return next((i for p in post["processors"] if (i := _first_token(p)) is not None), None)
    if _type(post) != "TemplateProcessing" or "SpecialToken" not in post["single"][0]:
        return None
    return post["special_tokens"][post["single"][0]["SpecialToken"]["id"]]["ids"][0]


def from_definition(spec: dict, name: str, eot: int | None = None, bos: int | None = None):
    """The tokenizer of a parsed tokenizer.json: BytePairTokenizer where it is byte-level BPE of a
    known form, else LibraryTokenizer.

    name: of the model, to which 8 hex digits of the definition's sha256 are added. eot: id of the
    added token that ends a document, by default that of the first of ENDS; bos: id that begins one,
    by default what the post-processor puts there, or None. ValueError, one line, for a damaged
    definition, no end token, or a kind that needs the package tokenizers where it is missing."""
    model, special = _parts(spec, name)
    name += (
        "-"
        + hashlib.sha256(
            json.dumps(spec, sort_keys=True, separators=(",", ":")).encode("ascii")
        ).hexdigest()[:8]
    )
    if eot is None:
        eot = next((special[t] for t in ENDS if t in special), None)
        check(
            eot is not None,
            f"tokenizer {name}",
            f"none of {', '.join(ENDS)} is among its added tokens",
            "name the id that ends a document, eot=",
        )
    check(
        eot in special.values(),
        f"tokenizer {name} with eot={eot}",
        "text could encode to it",
        "give the id of an added token",
    )
    try:
        bos = _first_token(spec.get("post_processor")) if bos is None else bos
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise _damaged(
            name,
            f"its post_processor is damaged ({one_line(e)})",
            "a template of tokens with ids is needed",
        ) from None
    found = _byte_level(spec, model, special)
    if isinstance(found, str):
        made = LibraryTokenizer(spec, name, eot, bos, found)
    else:
        try:
            import tiktoken
        except ImportError:
            raise ValueError(
                f"tokenizer {name} is byte-level BPE: it runs in the package tiktoken; pip "
                "install tiktoken"
            ) from None
        pattern, ranks = found
        absent = bytes(b for b in range(256) if bytes([b]) not in ranks)
        encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        made = BytePairTokenizer(
            encoding, spec, eot, bos, _type(spec.get("normalizer")) == "NFC", pattern, absent
        )
    _need(
        name,
        bos is None or _is_id(bos),
        f"its begin token is {bos!r}",
        "an id is an integer from 0",
    )
    if bos is not None:
        made.decode([bos])  # refuses an id that is not there
    return made


# -- GGUF

GGUF_PRE = {
    "smollm": DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "gpt-2": GPT2,
    "gpt2": GPT2,
}
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5


def definition_from_gguf(
    tokens: list[str],
    merges: list[str],
    token_types: list[int],
    pre: str,
    bos: int | None,
    add_bos: bool,
    model: str = "gpt2",
) -> dict:
    """The tokenizer.json, parsed, of a GGUF file's tokenizer.ggml.* metadata, as the model's own
    folder has it.

    tokens: (V,) in the order of their ids; merges: 'a b' each; token_types: (V,), 1 normal, 3
    control and 4 user-defined (added tokens), 5 unused (holes); pre: one of GGUF_PRE; bos, add_bos:
    the id and whether a text begins with it; model: tokenizer.ggml.model. ValueError, one line, for
    anything else."""
    folder = "load the model's Hugging Face folder instead"
    check(
        model == "gpt2",
        f"a GGUF tokenizer of model {model!r}{' (SentencePiece)' if model == 'llama' else ''}",
        "only gpt2, byte-level BPE, is read",
        folder,
    )
    check(pre in GGUF_PRE, f"a GGUF pre-tokenizer {pre!r}", f"one of {', '.join(GGUF_PRE)}", folder)
    check(
        len(tokens) == len(token_types),
        f"{len(tokens)} GGUF tokens with {len(token_types)} types",
        "one type for each",
        "get the file again",
    )
    odd = next(
        (i for i, t in enumerate(token_types) if t not in (NORMAL, CONTROL, USER_DEFINED, UNUSED)),
        None,
    )
    check(
        odd is None,
        f"GGUF token {odd} {tokens[odd or 0]!r} of type {token_types[odd or 0]}",
        "types 1, 3, 4 and 5 are read",
        folder,
    )
    vocab = {t: i for i, t in enumerate(tokens) if token_types[i] != UNUSED}
    check(
        len(vocab) == sum(t != UNUSED for t in token_types),
        "GGUF tokens that occur twice",
        "each has one id",
        "get the file again",
    )
    check(
        not add_bos or (_is_id(bos) and bos < len(tokens)),
        f"a GGUF tokenizer with bos={bos}",
        f"add_bos needs an id 0..{len(tokens) - 1}",
        "get the file again",
    )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    cut = GGUF_PRE[pre]
    if cut == DIGITS:
        pre_tokenizer = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        }
    elif cut == GPT2:
        pre_tokenizer = byte_level
    else:
        split = {
            "type": "Split",
            "pattern": {"Regex": cut},
            "behavior": "Isolated",
            "invert": False,
        }
        pre_tokenizer = {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        }
    post = None
    if add_bos:
        start = tokens[bos]
        text = [{"Sequence": {"id": x, "type_id": n}} for n, x in enumerate("AB")]
        first = [{"SpecialToken": {"id": start, "type_id": n}} for n in (0, 1)]
        post = {
            "type": "TemplateProcessing",
            "single": [first[0], text[0]],
            "pair": [first[0], text[0], first[1], text[1]],
            "special_tokens": {start: {"id": start, "ids": [bos], "tokens": [start]}},
        }
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_types[i] == CONTROL,
        }
        for t, i in vocab.items()
        if token_types[i] != NORMAL
    ]
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": cut == LLAMA3,
        "vocab": vocab,
        "merges": list(merges),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut == QWEN2 else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post,
        "decoder": byte_level,
        "model": bpe,
    }
