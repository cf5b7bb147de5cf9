"""The tokenizer of a pretrained model, made from its tokenizer.json.

Byte-level BPE (GPT-2, Llama 3, Qwen2.5, SmolLM2) runs in tiktoken, from ranks built here, offline.
A tokenizer.json merges the pair that comes first in its list of merges; tiktoken merges the pair
that joined has the smallest id, and takes a piece that is a token whole. `same_merges` checks that
the two are the same; where they are not, or cannot be known to be, the optional package
`tokenizers` does it.

    print(from_definition(json.load(open("tokenizer.json")), "my").encode("Hello 123"))
"""

from __future__ import annotations

import hashlib
import json
import math
from itertools import pairwise
from typing import NamedTuple

from config import check
from loaders.tokenizer import BytePairTokenizer, LibraryTokenizer, damaged, one_line

# what ends a document, the first that is there
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")

# How text is cut before merging: the patterns as they stand in the models' own tokenizer.json. Each
# of PATTERNS cuts the same, with possessive quantifiers so that a run of a million blanks does not
# exhaust the matcher's backtracking.
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


def _alphabet() -> dict[str, int]:
    """Map GPT-2's characters to bytes: printable bytes stand for themselves, the others for U+0100
    onwards."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}


ALPHABET = _alphabet()


def from_definition(
    spec: dict, name: str, eot: int | None = None, bos: int | None = None
) -> BytePairTokenizer | LibraryTokenizer:
    """Make the tokenizer of a parsed tokenizer.json: BytePairTokenizer where it is byte-level BPE
    of a known form, else LibraryTokenizer.

    name: of the model, to which 8 hex digits of the definition's sha256 are added. eot: id of the
    added token that ends a document, by default that of the first of ENDS; bos: id that begins one,
    by default what the post-processor puts there, or None. ValueError, one line, for a damaged
    definition, no end token, or a kind that needs the package tokenizers where it is missing."""
    model, special = _parts(spec, name)
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":")).encode("ascii")
    name = f"{name}-{hashlib.sha256(canonical).hexdigest()[:8]}"
    eot = _end_token(special, name, eot)
    if bos is None:
        bos = _begin_token(spec, name)
    found = _byte_level(spec, model, special)
    if isinstance(found, str):
        made = LibraryTokenizer(spec, name, eot, bos, found)
    else:
        made = _byte_pair_tokenizer(spec, name, eot, bos, found, special)
    _need(
        name,
        bos is None or is_id(bos),
        f"its begin token is {bos!r}",
        "an id is an integer from 0",
    )
    if bos is not None:
        made.decode([bos])  # refuses an id that is not there
    return made


def _end_token(special: dict[str, int], name: str, eot: int | None) -> int:
    """Return the id that ends a document: eot, checked, or that of the first of ENDS."""
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
    return eot


def _begin_token(spec: dict, name: str) -> int | None:
    """Return the id that the post-processor puts before a text, or None."""
    try:
        return _first_token(spec.get("post_processor"))
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise damaged(
            name,
            f"its post_processor is damaged ({one_line(e)})",
            "a template of tokens with ids is needed",
        ) from None


def _first_token(post: object) -> int | None:
    """Return the id that a post-processor puts before a text, or None; a damaged one raises what it
    happens to raise."""
    if _type(post) == "Sequence":
        found = (_first_token(p) for p in post["processors"])
        return next((i for i in found if i is not None), None)
    if _type(post) != "TemplateProcessing" or "SpecialToken" not in post["single"][0]:
        return None
    token = post["single"][0]["SpecialToken"]["id"]
    return post["special_tokens"][token]["ids"][0]


# ----------------------------------------------------------------------------- a sound definition


def _need(name: str, ok: bool, came: str, allowed: str) -> None:
    """Raise the error for a tokenizer.json that cannot be one, unless ok."""
    if not ok:
        raise damaged(name, came, allowed)


def is_id(x: object) -> bool:
    """Say whether this can be a token's id."""
    return type(x) is int and 0 <= x < 2**31


def _type(part: object) -> str:
    """Return the `type` of a part of a tokenizer.json; 'none' for null."""
    if part is None:
        return "none"
    if isinstance(part, dict):
        return str(part.get("type"))
    return type(part).__name__


def _parts(spec: object, name: str) -> tuple[dict, dict[str, int]]:
    """Return (model, {content: id} of the added tokens) of a tokenizer.json; a BPE model comes with
    its merges as pairs. ValueError, one line."""
    _need(name, isinstance(spec, dict), f"a {type(spec).__name__}", "a tokenizer.json is an object")
    model = spec.get("model")
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
    special = _added_tokens(spec, name)
    kind = model.get("type") or None
    if kind is None and "merges" in model:
        kind = "BPE"  # older files leave it out
    _need(
        name,
        isinstance(kind, str),
        f"its model.type is {kind!r}",
        "a string such as BPE is needed",
    )
    model = {**model, "type": kind}
    if kind == "BPE":
        _check_vocabulary(model, special, name)
        model["merges"] = _merge_pairs(model, name)
    return model, special


def _added_tokens(spec: dict, name: str) -> dict[str, int]:
    """Map each added token's content to its id."""
    added = spec.get("added_tokens") or []
    ok = isinstance(added, list) and all(
        isinstance(t, dict) and is_id(t.get("id")) and isinstance(t.get("content"), str)
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
    return special


def _check_vocabulary(model: dict, special: dict[str, int], name: str) -> None:
    """Raise ValueError unless every token of a BPE model, added ones too, has one id of its own."""
    vocab = model.get("vocab")
    _need(
        name,
        isinstance(vocab, dict) and bool(vocab) and all(is_id(i) for i in vocab.values()),
        "its model.vocab is missing or damaged",
        "tokens with integer ids from 0 are needed",
    )
    wrong = [t for t, i in special.items() if vocab.get(t, i) != i]
    ids = {**vocab, **special}
    came = f"its token {wrong[0]!r} has two ids" if wrong else "two tokens share an id"
    _need(
        name,
        not wrong and len(set(ids.values())) == len(ids),
        came,
        "every token has one id of its own",
    )


def _merge_pairs(model: dict, name: str) -> list[tuple[str, str]]:
    """Return a BPE model's merges as pairs, whichever way they are written."""
    merges = model.get("merges")
    _need(
        name, isinstance(merges, list), "its model.merges are missing", "a list of pairs is needed"
    )
    pairs = [_pair(m) for m in merges]
    if _is_odd(model):
        return pairs
    vocab = model["vocab"]
    for i, pair in enumerate(pairs):
        sound = (
            len(pair) == 2
            and all(isinstance(t, str) and t in vocab for t in pair)
            and pair[0] + pair[1] in vocab
        )
        if not sound:
            raise damaged(
                name,
                f"its merge {i} {merges[i : i + 1]}",
                "two tokens of the vocabulary that make a third, as 'a b' or ['a', 'b']",
            )
    return pairs


def _pair(merge: object) -> tuple:
    """Return a merge, 'a b' or ['a', 'b'], as a tuple; anything else as an empty one."""
    if isinstance(merge, str):
        return tuple(merge.split(" "))
    if isinstance(merge, list):
        return tuple(merge)
    return ()


def _is_odd(model: dict) -> bool:
    """Say whether BPE is not plain byte-level, whatever its vocabulary: SentencePiece, BPE of
    characters, BPE-dropout."""
    keys = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    return any(model.get(k) for k in keys)


# ----------------------------------------------------------------------------- byte-level BPE


class _ByteLevel(NamedTuple):
    """What tiktoken needs: how text is cut, and the id of each token's bytes."""

    pattern: str
    ranks: dict[bytes, int]


def _byte_pair_tokenizer(
    spec: dict,
    name: str,
    eot: int,
    bos: int | None,
    found: _ByteLevel,
    special: dict[str, int],
) -> BytePairTokenizer:
    """Make the tokenizer that runs in tiktoken."""
    try:
        import tiktoken
    except ImportError:
        raise ValueError(
            f"tokenizer {name} is byte-level BPE: it runs in the package tiktoken; pip install "
            "tiktoken"
        ) from None
    encoding = tiktoken.Encoding(
        name, pat_str=found.pattern, mergeable_ranks=found.ranks, special_tokens=special
    )
    return BytePairTokenizer(
        encoding,
        spec,
        eot,
        bos,
        nfc=_type(spec.get("normalizer")) == "NFC",
        pattern=found.pattern,
        absent=bytes(b for b in range(256) if bytes([b]) not in found.ranks),
    )


def _byte_level(spec: dict, model: dict, special: dict[str, int]) -> _ByteLevel | str:
    """Return what tiktoken needs, or say what the tokenizer is instead, in words."""
    if model["type"] != "BPE" or _is_odd(model):
        fallback = " with byte_fallback (SentencePiece)" if model.get("byte_fallback") else ""
        return f"a {model['type']} model{fallback}"
    pre = spec.get("pre_tokenizer")
    pattern = _pattern(pre)
    if not pattern:
        return f"a BPE model with the pre-tokenizer {_described(pre)} that is not known here"
    normalizer = _type(spec.get("normalizer"))
    decoder = _type(spec.get("decoder"))
    if normalizer not in ("none", "NFC") or decoder != "ByteLevel":
        return f"a BPE model with normalizer {normalizer} and decoder {decoder}"
    try:
        ranks = {_bytes(t): i for t, i in model["vocab"].items() if t not in special}
        merges = [(_bytes(a), _bytes(b)) for a, b in model["merges"]]
    except KeyError:
        return "a BPE model of characters, not bytes"
    if model.get("unk_token") and any(bytes([b]) not in ranks for b in range(256)):
        return "a BPE model with an unknown token"
    known = all(a + b in ranks for a, b in merges)
    if not known or not same_merges(ranks, merges, bool(model.get("ignore_merges"))):
        return "a BPE model whose merges do not follow its ids"
    return _ByteLevel(pattern, ranks)


def _bytes(token: str) -> bytes:
    """Return a token's bytes. KeyError for a character that stands for none."""
    return bytes(ALPHABET[c] for c in token)


def _described(pre: dict | None) -> str:
    """Name a pre-tokenizer, and what a sequence is made of."""
    if _type(pre) != "Sequence" or not isinstance(pre.get("pretokenizers"), list):
        return _type(pre)
    return f"Sequence{[_type(s) for s in pre['pretokenizers']]}"


def _pattern(pre: dict | None) -> str | None:
    """Return tiktoken's pattern for a pre-tokenizer, or None if it is none of the known ones."""
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
    if kinds == ["Split", "ByteLevel"] and not by_regex:
        return _split_pattern(first)
    return None


def _split_pattern(split: dict) -> str | None:
    """Return tiktoken's pattern for a Split that keeps each match as a piece, or None."""
    cut = split.get("pattern")
    if split.get("behavior") != "Isolated" or split.get("invert") or not isinstance(cut, dict):
        return None
    regex = cut.get("Regex")
    return PATTERNS.get(regex) if isinstance(regex, str) else None


def same_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], whole: bool) -> bool:
    """Say whether merging by the list gives what tiktoken gives from the ids. whole
    (ignore_merges): pieces that are tokens are taken whole.

    It does if tokens are made in the order of their ids and every token, alone, merges to itself:
    two neighbours that join to a token t have, between boundaries not merged across, gone the way t
    goes alone, so their pair is in the list. A token that only exists whole does no harm if every
    pair that joins to it is in the list."""
    made = [ranks[a + b] for a, b in merges]
    if any(a > b for a, b in pairwise(made)):
        return False
    order = {pair: i for i, pair in enumerate(merges)}

    def all_pairs_listed(t: bytes) -> bool:
        cuts = ((t[:i], t[i:]) for i in range(1, len(t)))
        return all((a, b) in order for a, b in cuts if a in ranks and b in ranks)

    for t in ranks:
        if len(t) <= 1 or (whole and all_pairs_listed(t)):
            continue
        if _merged([bytes([b]) for b in t], order) != [t]:
            return False
    return True


def _merged(parts: list[bytes], order: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Return the parts after all merges, the one first in the list each time, leftmost among
    equals."""
    while len(parts) > 1:
        ranks = [order.get(p, math.inf) for p in pairwise(parts)]
        i = ranks.index(min(ranks))
        if ranks[i] == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
