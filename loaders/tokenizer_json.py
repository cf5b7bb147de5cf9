"""The tokenizer of a pretrained model: its tokenizer.json, run by the package `tokenizers`, an
optional extra that nothing else here needs.

    print(from_definition(json.load(open("tokenizer.json")), "my").encode("Hello 123"))
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json

from config import check
from loaders.tokenizer import known_ids, valid_text
from settings.fields import one_line

# what ends a document, the first that is there
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "<|im_end|>",
)
_FILE = "give the tokenizer.json of a Hugging Face model folder, unchanged"


class LibraryTokenizer:
    """Runs a tokenizer.json. definition: the file, parsed; eot, bos: ids that end and begin a
    document, bos may be None; vocab_size: largest id + 1, added tokens included. ends, chat: what
    the model's files say of conversations (loaders/templates.py)."""

    ends = ()
    chat = None

    def __init__(self, definition: dict, name: str, eot: int | None, bos: int | None):
        self.definition = definition
        self.name = name
        self._plain = _load(definition, name)
        self._plain.encode_special_tokens = True  # spelled in a text, they are text
        vocab = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        added = _added_tokens(definition, vocab, name)
        self.eot = _end_token(added, name, eot)
        # as text too where the file does not call it special
        self._plain.add_special_tokens([self._plain.id_to_token(self.eot)])
        self.bos = _begin_token(self._plain, name) if bos is None else bos
        check(
            self.bos is None or self.bos in vocab.values(),
            f"tokenizer {name}: its begin token is {self.bos}",
            "it has no such token",
            f"give an id 0..{self.vocab_size - 1}",
        )

    @functools.cached_property
    def _whole(self):
        """The same with special tokens matched, for what a chat template wrote."""
        return _load(self.definition, self.name)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the text's ids, without bos; a lone surrogate becomes U+FFFD.

        Added tokens are matched wherever the text spells them, but special ones only if special is
        True: else they are ordinary text, and eot never comes out."""
        library = self._whole if special else self._plain
        with _in_one_line(self.name, "it cannot encode this text"):
            # without offsets, which a batch alone can be had without
            (found,) = library.encode_batch_fast([valid_text(text)], add_special_tokens=False)
        return found.ids if special else [i for i in found.ids if i != self.eot]

    def decode(self, ids) -> str:
        """Return the ids' text; eot and ids that it has no token for give nothing. ValueError for a
        negative id."""
        ids = known_ids(ids, self.vocab_size, self.eot)
        with _in_one_line(self.name, "it cannot decode these ids"):
            return self._plain.decode(ids, skip_special_tokens=False)


def from_definition(
    spec: dict, name: str, eot: int | None = None, bos: int | None = None
) -> LibraryTokenizer:
    """Make the tokenizer of a parsed tokenizer.json.

    name: of the model, to which 8 hex digits of the definition's sha256 are added. eot: id of the
    added token that ends a document, by default that of the first of ENDS; bos: id that begins one,
    by default what the post-processor puts there, or None. ValueError, one line, for a damaged
    definition, no end token, or where the package tokenizers is missing."""
    check(
        isinstance(spec, dict),
        f"tokenizer {name}: a {type(spec).__name__}",
        "a tokenizer.json is an object",
        _FILE,
    )
    with _in_one_line(name, "it is nested too deep"):
        canonical = json.dumps(spec, sort_keys=True, separators=(",", ":")).encode("ascii")
    return LibraryTokenizer(spec, f"{name}-{hashlib.sha256(canonical).hexdigest()[:8]}", eot, bos)


@contextlib.contextmanager
def _in_one_line(name: str, what: str):
    """Make a ValueError of whatever is raised: the package has no class of its own, and what stops
    its compiled part is no Exception."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizer {name}: {what} ({one_line(e)}); {_FILE}") from None


def _load(definition: dict, name: str):
    """Return the package's Tokenizer, which neither truncates nor pads."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            f"tokenizer {name}: the tokenizer of a pretrained model runs in the package "
            "tokenizers; pip install tokenizers"
        ) from None
    model = definition.get("model")
    check(
        not isinstance(model, dict)
        or model.get("type") == "WordPiece"
        or not model.get("continuing_subword_prefix"),
        f"tokenizer {name}: BPE with a continuing_subword_prefix",
        "the package tokenizers ends the process where such a file is damaged",
        "use another model",
    )
    with _in_one_line(name, "the package tokenizers refuses it"):
        return Tokenizer.from_str(json.dumps({**definition, "truncation": None, "padding": None}))


def _added_tokens(definition: dict, vocab: dict[str, int], name: str) -> dict[str, int]:
    """Map each added token's content to its id, which must be the file's and the package's."""
    check(
        len(set(vocab.values())) == len(vocab),
        f"tokenizer {name}",
        "two of its tokens share an id",
        _FILE,
    )
    added = {t["content"]: t["id"] for t in definition.get("added_tokens") or []}
    for content, i in added.items():
        if vocab.get(content) != i:
            raise ValueError(
                f"tokenizer {name}: its added token {content!r} has the ids {i} and "
                f"{vocab.get(content)}; {_FILE}"
            )
    return added


def _end_token(added: dict[str, int], name: str, eot: int | None) -> int:
    """Return the id that ends a document: eot, checked, or that of the first of ENDS."""
    if eot is None:
        eot = next((added[t] for t in ENDS if t in added), None)
        check(
            eot is not None,
            f"tokenizer {name}",
            f"none of {', '.join(ENDS)} is among its added tokens",
            "name the id that ends a document, eot=",
        )
    check(
        eot in added.values(),
        f"tokenizer {name} with eot={eot}",
        "text could encode to it",
        "give the id of an added token",
    )
    return eot


def _begin_token(library, name: str) -> int | None:
    """Return the id that the post-processor puts before a text, or None."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    one_token = Tokenizer(WordLevel({"a": 0}, unk_token="a")).encode("a")
    with _in_one_line(name, "its post_processor is damaged"):
        done = library.post_process(one_token)
        first = done.ids[0]
    return first if done.special_tokens_mask[0] else None
