"""Claims of tokenizer.py and tokenizer_json.py: ids are those of the package `tokenizers` on the
same definition, or the package does it. No network.

    PYTHONPATH=. python -m pytest tests/test_tokenizer.py
"""

import copy
import itertools
import json
import random
import re
import socket
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import needs_smol, smol
from helpers import error_line, tiny_encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import tokenizer as T
from loaders.gguf import CONTROL, NORMAL, definition_from_gguf
from loaders.tokenizer_json import ALPHABET, DIGITS, GPT2, LLAMA3, QWEN2, from_definition

# -- tokenizers


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=71))
def test_byte_tokenizer_round_trip(text):
    """decode(encode(text)) is text, ids are its UTF-8 bytes, and eot never comes from text."""
    tok = T.ByteTokenizer()
    ids = tok.encode(text)
    assert (
        ids == list(text.encode())
        and tok.eot not in ids
        and tok.decode(ids) == text
        and tok.decode([tok.eot, *ids, tok.eot]) == text
    )


def test_byte_tokenizer_odd_input():
    """Invalid UTF-8 and lone surrogates become U+FFFD; arrays and tensors decode too; ids outside
    are refused."""
    tok = T.get_tokenizer("byte")
    assert (
        tok.decode([104, 255, 105]) == "h\ufffdi"
        and tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    )
    assert (
        tok.decode(np.array([104, 256], np.uint16)) == tok.decode(torch.tensor([104, 256])) == "h"
        and tok.decode([]) == ""
    )
    for bad in (257, -1):
        assert f"token id {bad}" in error_line(tok.decode, [3, bad])
    assert "choose one" in error_line(T.get_tokenizer, "bytes")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["hello", " ", "<|endoftext|>", "é", "\n", "he", "字"]), max_size=13)
)
def test_tiktoken_wrapper_round_trip(words):
    """Merges are used, text comes back, and the spelling of the end token is ordinary text."""
    tok = T.TiktokenTokenizer(tiny_encoding())
    text = "".join(words)
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.eot not in ids and tok.decode([*ids, tok.eot]) == text
    assert (tok.name, tok.vocab_size, tok.eot) == ("tiny", 262, 261) and tok.encode("hello") == [
        259
    ]


def test_tiktoken_wrapper_refuses_bad_ids_and_ends():
    """Ids outside the vocabulary or in a hole, and an end token that is missing or not special, are
    one-line errors."""
    tok = T.TiktokenTokenizer(tiny_encoding(), name="mine")
    for bad in (262, -1, 260):
        assert str(bad) in error_line(tok.decode, [7, bad])
    assert tok.decode([255]) == "\ufffd" and tok.name == "mine"
    assert "end token" in error_line(
        T.TiktokenTokenizer, tiny_encoding(special_tokens={"<s>": 260})
    )
    assert T.TiktokenTokenizer(tiny_encoding(special_tokens={"<s>": 260}), eot=260).eot == 260
    assert "special" in error_line(T.TiktokenTokenizer, tiny_encoding(), eot=259)


def test_gpt2_offline_is_one_line(tmp_path, monkeypatch):
    """Without network and cache the gpt2 tokenizer says so in one line and names the way out."""
    registry = pytest.importorskip("tiktoken.registry", reason="needs the package tiktoken")

    def refuse(self, address):
        raise OSError("network blocked by the test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert "--tokenizer=byte" in error_line(T.get_tokenizer, "gpt2")


@pytest.mark.parametrize(
    "ids, bad",
    [
        ([0, 9], 9),
        ([-1, 3], -1),
        (np.array([[2], [11]], np.uint64), 11),
        (torch.tensor([4, 10]), 10),
    ],
    ids=["list", "negative", "array", "tensor"],
)
def test_check_ids_out_of_range_is_named(ids, bad):
    """Lists, arrays and tensors: the id outside 0..8 is named; ids inside, and none at all,
    pass."""
    assert f"token id {bad}" in error_line(T.check_ids, ids, 9)
    T.check_ids([], 9)
    T.check_ids(torch.tensor([[0, 8]]), 9)
    assert "integers" in error_line(T.check_ids, [0.5], 9)


# -- tokenizer.json: definitions

PRES = {"gpt2": GPT2, "llama-bpe": LLAMA3, "qwen2": QWEN2, "smollm": DIGITS}
# pieces that the patterns treat differently: contractions, numerals, marks, blanks of every kind,
# controls, letters of many scripts
PIECES = [
    "def f(x):",
    "return x**2",
    "it's",
    "IT'S",
    "we'LL",
    "'Ve",
    "'ſ",
    "n't",
    "'",
    "''",
    "he'd",
    "0",
    "7",
    "42",
    "1234567",
    "3.14",
    "٣٤",
    "४२",
    "Ⅷ",
    "½",
    "x²",
    "①",
    "e\u0301",
    "A\u030a",
    "n\u0303",
    "\u1100\u1161\u11a8",
    "q\u0307\u0323",
    "\u212b",
    "ﬁ",
    "🙂",
    "👩‍👩‍👧",
    "🇩🇪",
    "字",
    "日本語",
    "مرحبا",
    "שלום",
    "ไทย",
    "नमस्ते",
    "naïve",
    "ß",
    "İ",
    "Ǆ",
    " ",
    "  ",
    "     ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\x0b",
    "\x85",
    "\u2028",
    "\u200b",
    "\ufeff",
    "_",
    "-",
    "...",
    "!?",
    "{}",
    "<|",
    "|>",
    "$",
    "€",
    "\ue000",
    "\x04",
    "\x1d",
    "a",
    "B",
    "The",
    "the",
    "hello",
]


def strings(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    made = ["", *PIECES] + [
        a + b for a, b in itertools.product(PIECES[-20:], ["5", " 5", "  x", "'s"])
    ]
    return made + ["".join(rng.choices(PIECES, k=rng.randint(2, 13))) for _ in range(n - len(made))]


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("tokenizers", reason="the oracle is the package tokenizers")


def definition(library, pre: str, size: int = 700) -> dict:
    """A tokenizer trained on the pieces, as the definition of a GGUF of that pre-tokenizer: 256
    bytes, merges, an end and a begin token."""
    frame = definition_from_gguf(["<|endoftext|>"], [], [CONTROL], pre, None, False)
    tok = library.Tokenizer.from_str(json.dumps(frame))
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator([Path(T.__file__).read_text(), *strings(400, 1)], trainer)
    model = json.loads(tok.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|endoftext|>", "<|begin|>"]
    tokens = [t for i, t in enumerate(tokens) if t not in tokens[:i]]
    types = [CONTROL if t.startswith("<|") and t.endswith("|>") else NORMAL for t in tokens]
    return definition_from_gguf(
        tokens, [" ".join(m) for m in model["merges"]], types, pre, tokens.index("<|begin|>"), True
    )


@pytest.fixture(scope="module")
def trained(library) -> dict[str, dict]:
    return {pre: definition(library, pre) for pre in PRES}


def same(spec: dict, oracle, made, texts) -> None:
    """Ids equal to the oracle's; decoding gives the text as the definition normalizes it."""
    for text in texts:
        ids = made.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False).ids, repr(text)
        if not made.absent:
            assert made.decode(ids) == (
                unicodedata.normalize("NFC", text) if spec["normalizer"] else text
            ), repr(text)


# Cn: versions of Unicode differ in what is assigned
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)
# special tokens, which hypothesis finds in the sources: encode has them as plain text
TEXT = TEXT.filter(lambda t: not re.search(r"<\|?\w+\|?>", t))


@pytest.mark.parametrize("pre", PRES)
def test_bpe_ids_equal_library(library, trained, pre):
    """1,000 strings, and whatever hypothesis finds: ids equal, text comes back, nothing special
    comes out."""
    spec = trained[pre]
    made = from_definition(spec, pre)
    oracle = library.Tokenizer.from_str(json.dumps(spec))
    assert type(made) is T.BytePairTokenizer and made.definition is spec and made.absent == b""
    same(spec, oracle, made, strings(1000))

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(TEXT, st.lists(st.sampled_from(PIECES), max_size=15).map("".join)))
    def more(text):
        same(spec, oracle, made, [text])

    more()


@pytest.mark.parametrize("pre", PRES)
def test_bpe_cuts_every_character_like_library(library, trained, pre):
    """Each character of the basic plane between a blank and a letter, after an apostrophe, and
    before a digit, is cut alike."""
    spec = trained[pre]
    made = from_definition(spec, pre)
    oracle = library.Tokenizer.from_str(json.dumps(spec))
    for first in range(0, 0x10000, 256):
        chars = [
            chr(c)
            for c in range(first, first + 256)
            if unicodedata.category(chr(c)) not in ("Cs", "Cn")
        ]
        same(spec, oracle, made, [" ".join(f"{c}a '{c} {c}7{c}\n" for c in chars)])


@pytest.mark.parametrize("pre", PRES)
def test_pieces_equal_library(library, trained, pre):
    """The pattern cuts every text where the library's pre-tokenizer cuts it, also where no token
    would show the difference."""
    regex = pytest.importorskip("regex", reason="tiktoken does not show its pieces")
    made = from_definition(trained[pre], pre)
    cutter = library.Tokenizer.from_str(json.dumps(trained[pre])).pre_tokenizer
    rng = random.Random(7)
    blanks = [" ", "\n", "\r", "\t", "\u00a0", "7", "4", "a", "!", "'s"]
    for text in strings(1000) + [
        "".join(rng.choices(blanks, k=rng.randint(1, 9))) for _ in range(1000)
    ]:
        assert regex.findall(made.pattern, text) == [
            text[a:b] for _, (a, b) in cutter.pre_tokenize_str(text)
        ], repr(text)


@pytest.mark.parametrize("pre", PRES)
def test_bpe_long_runs_equal_library(library, trained, pre):
    """Runs of one kind of character, longer than the matcher can step back over, give the library's
    ids."""
    spec = trained[pre]
    made = from_definition(spec, pre)
    oracle = library.Tokenizer.from_str(json.dumps(spec))
    same(
        spec,
        oracle,
        made,
        [
            c * 3001 + end
            for c in (" ", "\n", " \n", "a", "!", "7", "\t ")
            for end in ("", "x", "7", "!", "\n")
        ],
    )
    assert made.decode(made.encode(" " * 1_100_000 + "x")) == " " * 1_100_000 + "x"


@needs_smol
def test_smollm2_ids_equal_library(library):
    """The real vocabulary, from the GGUF file: 1,000 strings and hypothesis' own, also with
    characters that it has no bytes for."""
    made = smol().tokenizer
    spec = made.definition
    oracle = library.Tokenizer.from_str(json.dumps(made.definition))
    assert type(made) is T.BytePairTokenizer and (made.vocab_size, made.eot, made.bos) == (
        49152,
        0,
        None,
    )
    assert set(b"\x04\x06\x13\x14\x16\x1d") < set(made.absent) and len(made.absent) == 21
    assert [made.decode([i]) for i in made.encode("in 1984,  7")] == [
        "in",
        " ",
        "1",
        "9",
        "8",
        "4",
        ",",
        "  ",
        "7",
    ]
    same(spec, oracle, made, strings(1000))
    for text in strings(300, 2):
        if not set(text) & {"\x04", "\x1d"}:
            assert made.decode(made.encode(text)) == text
    # merged across what is left out
    assert made.encode("!\x04?") == oracle.encode("!\x04?").ids == made.encode("!?")
    assert (
        made.encode("\x04") == [] and made.encode("\U00040000") == oracle.encode("\U00040000").ids
    )

    @settings(max_examples=200, deadline=None)
    @given(TEXT)
    def more(text):
        same(spec, oracle, made, [text])

    more()


def test_special_tokens_are_text_and_never_come_out(library, trained):
    """The spelling of an added token is encoded as text; its id decodes to its spelling, eot to
    nothing; lone surrogates are U+FFFD."""
    made = from_definition(trained["qwen2"], "q")
    text = "a<|endoftext|>b<|begin|>"
    ids = made.encode(text)
    assert made.decode(ids) == text and max(ids) < made.eot < made.bos
    assert made.decode([made.bos, *ids, made.eot]) == "<|begin|>" + text and made.encode(
        "a\ud800"
    ) == made.encode("a\ufffd")


# -- tokenizer.json: which merges tiktoken does alike


def abc(rng: random.Random) -> dict:
    """A random BPE over the letters a, b, c: merges in any order and shape, ids mostly in order of
    the merges."""
    frame = definition_from_gguf(
        ["a", "b", "c", "<|endoftext|>"], [], [1, 1, 1, 3], "gpt2", None, False
    )
    vocab = frame["model"]["vocab"]
    merges = frame["model"]["merges"]
    for _ in range(rng.randint(1, 7)):
        pair = [rng.choice([t for t in vocab if t[0] != "<"]) for _ in "xy"]
        if pair in merges or len("".join(pair)) > 6:
            continue
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))
    if rng.random() < 0.3:
        # a token that no merge makes
        vocab.setdefault("".join(rng.choices("abc", k=3)), len(vocab))
    if rng.random() < 0.5:  # as converted from ranks: every cut of every token is a merge
        merges[:] = [
            [t[:i], t[i:]]
            for t in vocab
            if t[0] != "<"
            for i in range(1, len(t))
            if t[:i] in vocab and t[i:] in vocab
        ]
    frame["model"]["ignore_merges"] = rng.random() < 0.5
    return frame


def test_random_merges_equal_library(library):
    """Random merge lists: those that tiktoken is trusted with give the library's ids on every text
    of up to 7 letters; both ways occur."""
    texts = ["".join(t) for n in (1, 2, 3, 5, 7) for t in itertools.product("abc", repeat=n)]
    rng = random.Random(5)
    kinds = []
    for _ in range(90):
        spec = abc(rng)
        made = from_definition(spec, "abc")
        oracle = library.Tokenizer.from_str(json.dumps(spec))
        kinds.append((type(made), spec["model"]["ignore_merges"], len(spec["model"]["merges"]) > 2))
        if type(made) is T.BytePairTokenizer:
            assert [made.encode(t) for t in texts] == [
                e.ids for e in oracle.encode_batch(texts, add_special_tokens=False)
            ], spec["model"]
    assert len(set(kinds)) == 8


def test_merges_out_of_order_go_to_the_library(library, trained):
    """Two ids exchanged, a merge left out, or a token that no merge makes: the library's ids,
    through the library."""
    swapped, short, alone = (copy.deepcopy(trained["gpt2"]) for _ in range(3))
    vocab = swapped["model"]["vocab"]
    first, last = (
        a + b
        for a, b in (
            m.split(" ") for m in (swapped["model"]["merges"][0], swapped["model"]["merges"][-1])
        )
    )
    vocab[first], vocab[last] = vocab[last], vocab[first]
    del short["model"]["merges"][3]
    alone["model"]["vocab"]["Ġthinkable"] = 5000
    for spec in (swapped, short, alone):
        made = from_definition(spec, "x")
        oracle = library.Tokenizer.from_str(json.dumps(spec))
        assert type(made) is T.LibraryTokenizer
        assert all(
            made.encode(t) == oracle.encode(t, add_special_tokens=False).ids for t in strings(200)
        )
    alone["model"]["ignore_merges"] = True  # Llama 3 takes such pieces whole, as tiktoken does
    made = from_definition(alone, "x")
    oracle = library.Tokenizer.from_str(json.dumps(alone))
    assert type(made) is T.BytePairTokenizer and made.encode(" thinkable") == oracle.encode(
        " thinkable", add_special_tokens=False
    ).ids == [5000]
    assert made.vocab_size == 5001 and "4000" in error_line(made.decode, [4000])


# -- tokenizer.json: ends, beginnings, names


def test_name_follows_the_definition(trained):
    """The name ends in 8 hex digits of the definition: equal for an equal one in another order of
    keys, another for a changed one."""
    spec = trained["gpt2"]
    made = from_definition(spec, "org/m")
    again = from_definition(dict(reversed(spec.items())), "org/m")
    other = from_definition({**spec, "normalizer": {"type": "NFC"}}, "org/m")
    assert (
        made.name == again.name != other.name
        and made.name.startswith("org/m-")
        and len(made.name) == 14
        and int(made.name[-8:], 16) >= 0
    )


def added(*contents: str) -> list[dict]:
    return [{"id": 900 + i, "content": c, "special": True} for i, c in enumerate(contents)]


def test_eot_and_bos_are_found(trained):
    """eot is the first of the known ends, or the one given; bos what the post-processor puts first,
    also inside a sequence."""
    spec = {**trained["gpt2"], "post_processor": None}
    ends = {**spec, "added_tokens": added("<|im_end|>", "</s>", "<s>")}
    ends["model"] = {
        **spec["model"],
        "vocab": {
            t: i
            for t, i in spec["model"]["vocab"].items()
            if t not in ("<|endoftext|>", "<|begin|>")
        },
    }
    assert from_definition(ends, "x").eot == 901 and from_definition(ends, "x", eot=900).eot == 900
    assert from_definition(ends, "x").bos is None and from_definition(ends, "x", bos=902).bos == 902
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [902], "tokens": ["<s>"]}},
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    sequence = {"type": "Sequence", "processors": [level, template]}
    after = {**template, "single": template["single"][::-1]}
    for post, bos in ((template, 902), (sequence, 902), (level, None), (after, None)):
        assert from_definition({**ends, "post_processor": post}, "x").bos == bos
    assert "eot=" in error_line(from_definition, {**ends, "added_tokens": added("<s>")}, "x")
    assert "added token" in error_line(from_definition, ends, "x", eot=5)
    assert "token id 903" in error_line(from_definition, ends, "x", bos=903)
    byte = T.get_tokenizer("byte")
    assert (
        byte.bos is None
        and byte.definition is None
        and T.TiktokenTokenizer(tiny_encoding()).definition is None
    )


# -- tokenizer.json: through the library


def sentencepiece() -> dict:
    """A tokenizer.json as converted from Llama-2's SentencePiece model, with few tokens."""
    vocab = {
        t: i
        for i, t in enumerate(
            [
                "<unk>",
                "<s>",
                "</s>",
                *(f"<0x{b:02X}>" for b in range(256)),
                "▁",
                "h",
                "i",
                "hi",
                "▁hi",
            ]
        )
    }
    start = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": [
            {"id": i, "content": t, **flags} for i, t in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": start,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": ["h i", "▁ hi"],
        },
    }


def test_sentencepiece_runs_in_the_library(library):
    """Llama-2's kind: bos and eot are read, text is whole in spite of a truncation, the spelling of
    </s> is text, bad ids are refused."""
    made = from_definition(sentencepiece(), "llama2")
    assert (
        type(made) is T.LibraryTokenizer
        and (made.eot, made.bos, made.vocab_size) == (2, 1, 264)
        and made.name.startswith("llama2-")
    )
    assert made.encode("hi hi") == [263, 263] and made.encode("hi  hi") == [263, 259, 263]
    for text in ("hi hi hi hi hi hi hi", "字 hi 🙂", "a</s>b<s>", "x\n\ty"):
        ids = made.encode(text)
        assert made.decode([*ids, made.eot]) == text and not set(ids) & {0, 1, 2}
    assert (
        made.decode(made.encode("a\ud800b")) == "a\ufffdb"
        and made.encode("") == []
        and made.definition == sentencepiece()
    )
    assert "264" in error_line(made.decode, [264])


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel"])
def test_other_models_run_in_the_library(library, kind):
    """Models other than BPE go to the library; eot never comes out of text that spells it."""
    tokens = ["</s>", "<unk>", "h", "i", "hi", " "]
    vocab = (
        [[t, -float(i)] for i, t in enumerate(tokens)]
        if kind == "Unigram"
        else {t: i for i, t in enumerate(tokens)}
    )
    model = {"type": kind, "vocab": vocab} | {
        "Unigram": {"unk_id": 1},
        "WordLevel": {"unk_token": "<unk>"},
    }.get(
        kind,
        {"unk_token": "<unk>", "continuing_subword_prefix": "", "max_input_chars_per_word": 99},
    )
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "</s>", **flags}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    made = from_definition(spec, "x")
    assert (
        type(made) is T.LibraryTokenizer
        and made.encode("hi") == [4]
        and made.eot == 0
        and 0 not in made.encode("hi</s>")
    )


def test_missing_library_is_one_line(monkeypatch, trained):
    """Without the package the kind of tokenizer and the remedy are named; byte-level BPE does
    without it."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = error_line(from_definition, sentencepiece(), "llama2")
    assert "llama2" in line and "SentencePiece" in line and "pip install tokenizers" in line
    odd = {
        **trained["gpt2"],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]},
    }
    assert "Whitespace" in error_line(from_definition, odd, "x")
    assert from_definition(trained["gpt2"], "x").encode("hello")


@pytest.mark.parametrize(
    "change",
    [
        dict(pre_tokenizer=None),
        dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        dict(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": r"\s+|\S+"},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": False,
                    },
                ],
            }
        ),
        dict(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": QWEN2},
                        "behavior": "Removed",
                        "invert": False,
                    },
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": False,
                    },
                ],
            }
        ),
        dict(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                ],
            }
        ),
        dict(normalizer={"type": "NFKC"}),
        dict(normalizer={"type": "Lowercase"}),
        dict(decoder=None),
    ],
    ids=lambda c: json.dumps(c)[:60],
)
def test_unknown_forms_go_to_the_library(library, trained, change):
    """A pre-tokenizer, normalizer or decoder that is not known is left to the library, whose ids
    come out."""
    spec = {**trained["gpt2"], **change}
    made = from_definition(spec, "x")
    oracle = library.Tokenizer.from_str(json.dumps(spec))
    assert type(made) is T.LibraryTokenizer
    assert all(
        made.encode(t) == oracle.encode(t, add_special_tokens=False).ids for t in strings(200)
    )


def test_unknown_token_goes_to_the_library(library):
    """Bytes without a token become the unknown token where there is one, as the library does it."""
    spec = definition_from_gguf(
        ["a", "b", "ab", "<|endoftext|>"], ["a b"], [1, 1, 1, 3], "gpt2", None, False
    )
    assert from_definition(spec, "x").encode("abc") == [2]
    spec["model"]["unk_token"] = "b"
    assert (
        from_definition(spec, "x").encode("abc")
        == library.Tokenizer.from_str(json.dumps(spec)).encode("abc").ids
        == [2, 1]
    )


def test_older_and_newer_spellings_are_read(library, trained):
    """Merges as pairs, GPT-2's own file without model.type and use_regex: the same tokenizer."""
    spec = copy.deepcopy(trained["gpt2"])
    want = from_definition(spec, "x")
    spec["model"]["merges"] = [m.split(" ") for m in spec["model"]["merges"]]
    del spec["model"]["type"], spec["pre_tokenizer"]["use_regex"]
    made = from_definition(spec, "x")
    assert type(made) is T.BytePairTokenizer and all(
        made.encode(t) == want.encode(t) for t in strings(200)
    )


def changed(spec: dict, path: str, value=...) -> dict:
    """A copy with the entry at a/b/0 set, or removed."""
    spec = copy.deepcopy(spec)
    *above, last = [int(k) if k.isdigit() else k for k in path.split("/")]
    at = spec
    for k in above:
        at = at[k]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return spec


@pytest.mark.parametrize(
    "path, value",
    [
        ("model", ...),
        ("model", None),
        ("model", []),
        ("model/vocab", ...),
        ("model/vocab", []),
        ("model/vocab", {}),
        ("model/vocab/a", "7"),
        ("model/vocab/a", -1),
        ("model/vocab/a", 2**40),
        ("model/vocab/a", True),
        ("model/vocab/a", 1),
        ("model/vocab/a", ...),
        ("model/merges", ...),
        ("model/merges", {}),
        ("model/merges/0", "ab"),
        ("model/merges/0", "a b c"),
        ("model/merges/0", 7),
        ("model/merges/0", ["a"]),
        ("model/merges/0", None),
        ("model/merges/0", ["a", 7]),
        ("model/merges/0", ["a", "nowhere"]),
        ("model/type", 7),
        ("added_tokens", {}),
        ("added_tokens", [7]),
        ("added_tokens/0", {"id": "1", "content": "x"}),
        ("added_tokens/0", {"content": "x"}),
        ("added_tokens/0", {"id": 3}),
        ("added_tokens/0/id", 5),
        ("added_tokens/0/content", "a"),
        ("added_tokens", ...),
        ("normalizer", "NFC"),
        ("pre_tokenizer", []),
        ("decoder", 7),
        ("post_processor", 7),
        ("post_processor/single", ...),
        ("post_processor/single", []),
        ("post_processor/single", [7]),
        ("post_processor/single/0/SpecialToken", {}),
        ("post_processor/special_tokens", {}),
        ("post_processor/special_tokens/<|begin|>/ids", []),
        ("post_processor/special_tokens/<|begin|>/ids", ["x"]),
        ("post_processor", {"type": "Sequence"}),
        ("model/type", "Nothing"),
        ("pre_tokenizer/type", "Nothing"),
        ("pre_tokenizer/pretokenizers", 7),
        ("pre_tokenizer/pretokenizers", []),
        ("pre_tokenizer/pretokenizers/0", 7),
        ("pre_tokenizer/pretokenizers/0/pattern", 7),
        ("pre_tokenizer/pretokenizers/1", 7),
        ("pre_tokenizer/pretokenizers/0/pattern/Regex", [7]),
    ],
)
def test_damaged_definition_is_one_line(library, trained, path, value):
    """Missing keys and wrong types anywhere are one line that names the tokenizer; no other
    exception."""
    if path == "pre_tokenizer/pretokenizers" and value == []:
        pytest.importorskip("tokenizers")
        # allowed: nothing is cut
        assert from_definition(changed(trained["qwen2"], path, value), "mine").encode("a")
        return
    assert "mine" in error_line(from_definition, changed(trained["qwen2"], path, value), "mine")


@pytest.mark.parametrize("spec", [None, [], "x", 7], ids=repr)
def test_definition_that_is_no_object_is_one_line(spec):
    """Whatever JSON can hold other than an object is refused."""
    assert "object" in error_line(from_definition, spec, "mine")


# -- GGUF


def test_gguf_definition_is_read_by_the_library(library, trained):
    """Unused entries are holes, control and user-defined tokens are added ones, bos is put first
    where the file says so."""
    bytes_ = list(ALPHABET)
    tokens = [*bytes_, "ab", "[PAD257]", "<|im_end|>", "<tool>"]
    types = [1] * 257 + [5, 3, 4]
    spec = definition_from_gguf(tokens, ["a b"], types, "qwen2", 258, True)
    made = from_definition(spec, "x")
    oracle = library.Tokenizer.from_str(json.dumps(spec))
    assert (made.eot, made.bos, made.vocab_size) == (258, 258, 260) and "257" in error_line(
        made.decode, [257]
    )
    assert (
        oracle.encode("ab").ids == [258, 256]
        and oracle.encode("<tool>").ids == [258, 259]
        and made.encode("ab") == [256]
    )
    assert [t["special"] for t in spec["added_tokens"]] == [True, False] and made.decode(
        made.encode("<tool>")
    ) == "<tool>"
    assert (
        from_definition(definition_from_gguf(tokens, ["a b"], types, "qwen2", 258, False), "x").bos
        is None
    )
    # as in the models' own files: Qwen2.5 normalizes, Llama 3 takes pieces that are tokens whole
    for pre in PRES:
        own = definition_from_gguf(tokens, [], types, pre, None, False)
        assert (own["normalizer"] is not None) == (pre == "qwen2") and own["model"][
            "ignore_merges"
        ] == (pre == "llama-bpe")
    for name, pre in (("gpt-2", "gpt2"), ("llama3", "llama-bpe")):
        assert definition_from_gguf(tokens, [], types, name, None, False) == definition_from_gguf(
            tokens, [], types, pre, None, False
        )


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(model="llama"), "SentencePiece"),
        (dict(model="bert"), "'bert'"),
        (dict(pre="falcon"), "'falcon'"),
        (dict(pre=None), "None"),
        (dict(token_types=[1, 1]), "2 types"),
        (dict(token_types=[1, 6, 3]), "type 6"),
        (dict(token_types=[2, 1, 3]), "'a'"),
        (dict(tokens=["a", "a", "</s>"]), "twice"),
        (dict(bos=None), "bos=None"),
        (dict(bos=3), "bos=3"),
    ],
    ids=str,
)
def test_gguf_unknown_is_refused_by_name(change, says):
    """What cannot be turned into a tokenizer.json is named, with the way out."""
    given = dict(
        tokens=["a", "b", "</s>"], merges=[], token_types=[1, 1, 3], pre="gpt2", bos=2, add_bos=True
    )
    line = error_line(definition_from_gguf, **(given | change))
    assert says in line and ("Hugging Face folder" in line or "file again" in line)
