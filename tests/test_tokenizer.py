"""Claims of tokenizer.py, tokenizer_json.py and gguf_tokenizer.py: ids are those of the package
`tokenizers`, text stays text, and damaged files are one line. No network.

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
from foreign import byte_alphabet, needs_smol, smol
from helpers import error_line, tiny_encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import gguf_tokenizer as G
from loaders import tokenizer as T
from loaders.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, definition_from_gguf
from loaders.token_files import HEADER_BYTES, MAGIC, open_tokens
from loaders.tokenizer_json import from_definition

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
    """Invalid UTF-8 and lone surrogates become U+FFFD; arrays and tensors decode too; ids above are
    nothing, negative ones refused."""
    tok = T.get_tokenizer("byte")
    assert (
        tok.decode([104, 255, 105]) == "h\ufffdi"
        and tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    )
    assert (
        tok.decode(np.array([104, 256], np.uint16)) == tok.decode(torch.tensor([104, 256])) == "h"
        and tok.decode([]) == ""
    )
    assert tok.decode([104, 257, 99_999, 105]) == "hi"
    assert "token id -1" in error_line(tok.decode, [3, -1])
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


def test_tiktoken_wrapper_refuses_bad_ends_and_shows_unknown_ids_as_nothing():
    """Ids past the vocabulary or in a hole are nothing; negative ids, and an end token that is
    missing or not special, are one-line errors; special=True reads a special token."""
    tok = T.TiktokenTokenizer(tiny_encoding(), name="mine")
    assert tok.decode([104, 262, 260, 105]) == "hi"
    assert "-1" in error_line(tok.decode, [7, -1])
    assert tok.encode("hello<|endoftext|>", special=True) == [259, tok.eot]
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


# -- streaming


def test_text_stream_shows_what_the_whole_shows():
    """Random tokens in random portions after a random prompt: what is shown, joined, is what the
    whole text has after the prompt's; half a character is never shown."""
    rng = random.Random(3)
    tok = T.ByteTokenizer()
    letters = "aé字🙂 \n"
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randint(0, 9)))
        prompt = tok.encode("".join(rng.choices(letters, k=rng.randint(0, 3))))
        ids = [*tok.encode(text), *rng.choices([300, 256, 0xE5, 0xFF], k=rng.randint(0, 2))]
        stream = T.TextStream(tok, prompt)
        at = 0
        shown = []
        while at < len(ids):
            n = rng.randint(1, 3)
            shown.append(stream.add(ids[at : at + n]))
            at += n
        assert "\ufffd" not in "".join(shown)
        shown.append(stream.end())
        assert "".join(shown) == tok.decode(ids) == T.decode_after(tok, prompt, ids)


# -- tokenizer.json: made by the library

KINDS = ("gpt2", "smollm", "llama-bpe", "qwen2", "sentencepiece")
MORE = ("<tool_call>", "   ")  # added, not special
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
    return pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")


def in_bytes(library, kind: str):
    """An untrained byte-level tokenizer of the library, as the models of that kind have it."""
    pre = library.pre_tokenizers
    tok = library.Tokenizer(library.models.BPE(ignore_merges=kind == "llama-bpe"))
    level = pre.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm"))
    steps = {
        "gpt2": [],
        "smollm": [pre.Digits(individual_digits=True)],
        "llama-bpe": [pre.Split(library.Regex(G.LLAMA3), "isolated")],
        "qwen2": [pre.Split(library.Regex(G.QWEN2), "isolated")],
    }
    tok.pre_tokenizer = pre.Sequence([*steps[kind], level])
    tok.decoder = library.decoders.ByteLevel()
    if kind == "qwen2":
        tok.normalizer = library.normalizers.NFC()
    return tok


def in_characters(library):
    """An untrained tokenizer of the library as Llama 2 has it, SentencePiece with bytes."""
    replace = library.decoders.Replace
    tok = library.Tokenizer(
        library.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tok.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    tok.decoder = library.decoders.Sequence(
        [
            replace("▁", " "),
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
            library.decoders.Strip(" ", 1, 0),
        ]
    )
    return tok


def definition(library, kind: str) -> dict:
    """A tokenizer.json that the library trained on the pieces, with an end and a begin token that
    are special and MORE, which are not."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    alphabet = ["a", "b", "▁"]
    if kind == "sentencepiece":
        tok = in_characters(library)
    else:
        tok = in_bytes(library, kind)
        special = ["<|endoftext|>", "<|begin|>"]
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=800, show_progress=False, initial_alphabet=alphabet, special_tokens=special
    )
    source = [line[:60] for line in Path(T.__file__).read_text().splitlines()]
    tok.train_from_iterator([*source, *strings(400, 1)], trainer)
    tok.add_tokens([library.AddedToken(t, normalized=False) for t in MORE])
    spec = json.loads(tok.to_str())
    # the bytes are tokens, not added ones
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    at = len(spec["model"]["vocab"])
    for i, t in enumerate(spec["added_tokens"][-len(MORE) :]):
        t["id"] = at + i
    return spec


@pytest.fixture(scope="module")
def trained(library) -> dict[str, dict]:
    return {kind: definition(library, kind) for kind in KINDS}


def by_hand(library, spec: dict):
    """Encoders (plain, special) made another way: the text is cut here where it spells an added
    token, and a tokenizer without added tokens encodes what lies between."""
    bare = library.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))

    def encoder(added):
        spelled = sorted((t["content"] for t in added), key=len, reverse=True)
        cut = re.compile("(" + ("|".join(map(re.escape, spelled)) or "(?!)") + ")")
        of = {t["content"]: [t["id"]] for t in added}
        return lambda text: [
            i
            for part in cut.split(text)
            for i in of.get(part) or bare.encode(part, add_special_tokens=False).ids
        ]

    added = spec["added_tokens"]
    return encoder([t for t in added if not t["special"]]), encoder(added)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_library(library, trained, kind):
    """1,000 strings, and what hypothesis finds: added tokens are matched, special ones only when
    asked; nothing special comes out of plain text, which comes back whole."""
    spec = trained[kind]
    made = from_definition(spec, kind)
    plain, special = by_hand(library, spec)
    whole = library.Tokenizer.from_str(json.dumps(spec))
    spelled = [t["content"] for t in spec["added_tokens"]]
    ends = {t["id"] for t in spec["added_tokens"] if t["special"]}
    rng = random.Random(2)

    def same(text):
        ids = made.encode(text)
        assert ids == plain(text), repr(text)
        assert not ends & set(ids)
        both = made.encode(text, special=True)
        assert both == special(text) == whole.encode(text, add_special_tokens=False).ids, repr(text)
        if kind != "sentencepiece":  # which reads two tokens' blanks as one
            want = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
            assert made.decode(ids) == want

    for text in strings(1000):
        same(text)
        same(text + rng.choice(spelled) + rng.choice(PIECES))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.sampled_from([*PIECES, *spelled]) | TEXT, max_size=9).map("".join))
    def more(text):
        same(text)

    more()
    assert made.definition is spec and (made.encode(""), made.decode([])) == ([], "")
    assert made.encode("a\ud800") == made.encode("a\ufffd")


# Cn: versions of Unicode differ in what is assigned
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)


def test_long_runs_are_encoded(trained):
    """A million blanks are no more than their tokens."""
    made = from_definition(trained["smollm"], "x")
    text = "\n" * 300_000 + " " * 1_100_000 + "x"
    assert made.decode(made.encode(text)) == text


@needs_smol
def test_smollm2_ids_equal_library(library):
    """The real vocabulary, from the GGUF file: 1,000 strings, also with characters that it has no
    bytes for."""
    made = smol().tokenizer
    plain, special = by_hand(library, made.definition)
    assert (made.vocab_size, made.eot, made.bos) == (49152, 0, None)
    assert made.name.endswith("-8e4cb16d")  # token files and runs hold the name
    pieces = [made.decode([i]) for i in made.encode("in 1984,  7")]
    assert pieces == ["in", " ", "1", "9", "8", "4", ",", "  ", "7"]
    for text in strings(1000):
        assert made.encode(text) == plain(text) and made.encode(text, special=True) == special(text)
    for text in strings(300, 2):
        if not set(text) & {"\x04", "\x1d"}:
            assert made.decode(made.encode(text)) == text
    # merged across what is left out
    assert made.encode("!\x04?") == made.encode("!?") and made.encode("\x04") == []
    turn = "<|im_start|>user\nhi<|im_end|>"
    assert made.encode(turn, special=True)[:1] == [1] and made.encode(turn)[:1] != [1]
    assert made.decode(made.encode(turn)) == turn


def test_end_token_is_text_whatever_the_file_calls_it(library, trained):
    """An end token that is not marked special, or that the model's own vocabulary makes of text,
    never comes out of a text."""
    spec = copy.deepcopy(trained["gpt2"])
    made = from_definition(spec, "x")
    for t in spec["added_tokens"]:
        t["special"] = False
    unmarked = from_definition(spec, "x")
    text = "a<|endoftext|>b"
    assert unmarked.encode(text) == made.encode(text) and made.decode(made.encode(text)) == text
    assert made.eot in unmarked.encode(text, special=True)
    assert made.decode([made.eot + 1, *made.encode("a"), made.eot]) == "<|begin|>a"


def test_ids_without_a_token_are_shown_as_nothing(library, trained):
    """Ids past the vocabulary and in its holes give nothing; a negative one is a line."""
    spec = copy.deepcopy(trained["gpt2"])
    spec["model"]["vocab"]["zz"] = 5000
    spec["added_tokens"] = spec["added_tokens"][:2]
    made = from_definition(spec, "x")
    ids = made.encode("hello")
    assert made.vocab_size == 5001
    assert made.decode([4000, *ids, 5001, 2**40, made.eot]) == "hello"
    assert "token id -1" in error_line(made.decode, [-1])


def test_sentencepiece_pieces_join_as_the_whole(library, trained):
    """A continuation keeps its blank, and a character made of bytes comes whole, when each token is
    shown as it comes."""
    made = from_definition(trained["sentencepiece"], "x")
    for text in ("the naïve hello a", "hello 字🙂 the", " the  the", "\U0001f9ff the"):
        ids = made.encode(text)
        whole = made.decode(ids)
        for n in range(len(ids) + 1):
            stream = T.TextStream(made, ids[:n])
            before = made.decode(ids[:n])
            assert before + T.decode_after(made, ids[:n], ids[n:]) == whole or "\ufffd" in before
            shown = [stream.add([i]) for i in ids[n:]]
            assert "".join(shown) + stream.end() == whole[len(before) :]
    assert made.decode(made.encode("a the")[1:]) != " the"  # decoded apart, the blank is lost


def test_encode_after_joins_as_the_whole(library, trained):
    """The ids of two texts, the second encoded after the first, are those of the whole; encoded
    apart SentencePiece adds a blank. Where a token goes across, the second alone is encoded."""
    made = from_definition(trained["sentencepiece"], "x")
    for before, text in (("the naïve", " 5. The"), ("", "a"), ("hello", ""), ("字", "🙂 a")):
        ids = made.encode(before) + T.encode_after(made, before, text)
        assert ids == made.encode(before + text) and made.decode(ids) == before + text
    assert made.decode(made.encode("the") + made.encode(" 5")) == "the  5"
    bpe = T.TiktokenTokenizer(tiny_encoding())
    assert T.encode_after(bpe, "hel", "lo") == bpe.encode("lo")


def test_sentencepiece_definition_of_llama2(library):
    """Llama 2's kind: bos and eot are read, text is whole in spite of a truncation, the spelling of
    </s> is text."""
    made = from_definition(sentencepiece(), "llama2")
    assert (made.eot, made.bos, made.vocab_size) == (2, 1, 264) and made.name[:7] == "llama2-"
    assert made.encode("hi hi") == [263, 263] and made.encode("hi  hi") == [263, 259, 263]
    for text in ("hi hi hi hi hi hi hi", "字 hi 🙂", "a</s>b<s>", "x\n\ty"):
        ids = made.encode(text)
        assert made.decode([*ids, made.eot]) == text and not set(ids) & {0, 1, 2}
    assert made.decode(made.encode("a\ud800b")) == "a\ufffdb" and made.encode("") == []


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


def small(*added: str, post: dict | None = None) -> dict:
    """A definition of 256 bytes and these added tokens, ids from 256."""
    spec = definition_from_gguf(gguf_fields([*byte_alphabet(), *added]))
    for i in range(len(added)):
        del spec["model"]["vocab"][added[i]]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec["added_tokens"] = [{"id": 256 + i, "content": t, **flags} for i, t in enumerate(added)]
    return {**spec, "post_processor": post}


def test_eot_and_bos_are_found(library):
    """eot is the first of the known ends, or the one given; bos what the post-processor puts first,
    also inside a sequence."""
    tokens = ("<|im_end|>", "</s>", "<s>")
    ends = small(*tokens)
    assert from_definition(ends, "x").eot == 257 and from_definition(ends, "x", eot=256).eot == 256
    assert from_definition(ends, "x").bos is None and from_definition(ends, "x", bos=258).bos == 258
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}},
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    sequence = {"type": "Sequence", "processors": [level, template]}
    after = {**template, "single": [text, first]}
    bert = {"type": "BertProcessing", "cls": ["<s>", 258], "sep": ["</s>", 257]}
    for post, bos in ((template, 258), (sequence, 258), (bert, 258), (level, None), (after, None)):
        assert from_definition(small(*tokens, post=post), "x").bos == bos
    assert "eot=" in error_line(from_definition, small("<s>"), "x")
    assert "added token" in error_line(from_definition, ends, "x", eot=5)
    assert "begin token is 259" in error_line(from_definition, ends, "x", bos=259)
    assert from_definition(small("<｜end▁of▁sentence｜>"), "deepseek").eot == 256


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
    assert made.encode("hi") == [4] and made.eot == 0 and 0 not in made.encode("hi</s>")


def test_missing_library_is_one_line(monkeypatch):
    """Without the package the tokenizer and the remedy are named."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = error_line(from_definition, sentencepiece(), "llama2")
    assert "llama2" in line and "pip install tokenizers" in line


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
        ("model/merges/0", "abc"),
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
        ("added_tokens/0/content", ""),
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
        ("post_processor/special_tokens/<|begin|>/ids", ["x"]),
        ("post_processor", {"type": "Sequence"}),
        ("model/type", "Nothing"),
        ("model/continuing_subword_prefix", "x"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("pre_tokenizer/type", "Nothing"),
        ("pre_tokenizer/pretokenizers", 7),
        ("pre_tokenizer/pretokenizers/0", 7),
        ("pre_tokenizer/pretokenizers/0/pattern", 7),
        ("pre_tokenizer/pretokenizers/1", 7),
        ("pre_tokenizer/pretokenizers/0/pattern/Regex", [7]),
    ],
)
def test_damaged_definition_is_one_line(library, path, value):
    """Missing keys and wrong types anywhere are one line that names the tokenizer; no other
    exception."""
    fields = gguf_fields([*byte_alphabet(), "ab", "<|endoftext|>", "<|begin|>"], ["a b"])
    fields |= {"pre": "qwen2", "bos_token_id": 258, "add_bos_token": True}
    spec = definition_from_gguf(fields)
    assert from_definition(spec, "mine").bos == 258
    assert "mine" in error_line(from_definition, changed(spec, path, value), "mine")


def test_nested_definition_is_one_line(library):
    """Nesting that is read but cannot be written again, or that the package refuses."""
    nested = []
    for _ in range(5000):
        nested = [nested]
    for part in (json.loads("[" * 300 + "]" * 300), nested):
        spec = {**small("</s>"), "normalizer": part}
        assert "mine" in error_line(from_definition, spec, "mine")


@pytest.mark.parametrize("spec", [None, [], "x", 7], ids=repr)
def test_definition_that_is_no_object_is_one_line(spec):
    """Whatever JSON can hold other than an object is refused."""
    assert "object" in error_line(from_definition, spec, "mine")


# -- GGUF


def gguf_fields(tokens: list[str], merges=(), **changes) -> dict:
    """The tokenizer.ggml.* fields of a GPT-2; what is spelled <...> is a control token."""
    kinds = [CONTROL if t[0] == "<" and t[-1] == ">" else NORMAL for t in tokens]
    fields = {"model": "gpt2", "pre": "gpt2", "tokens": tokens, "token_type": kinds}
    return {**fields, "merges": list(merges), **changes}


@pytest.mark.parametrize("kind", KINDS[:4])
def test_gguf_is_the_tokenizer_it_was_made_from(library, trained, kind):
    """The library's tokenizer, put into a GGUF's fields and read again, gives its ids and texts."""
    spec = trained[kind]
    original = from_definition(spec, "x")
    oracle = library.Tokenizer.from_str(json.dumps(spec))
    vocab = oracle.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    fields = gguf_fields(tokens, map(" ".join, spec["model"]["merges"]), pre=kind)
    for t in MORE:
        fields["token_type"][vocab[t]] = USER_DEFINED
    fields |= {"bos_token_id": vocab["<|begin|>"], "add_bos_token": True}
    made = from_definition(definition_from_gguf(fields), "x")
    assert (made.eot, made.bos) == (original.eot, vocab["<|begin|>"])
    for text in [*strings(400), "a<tool_call>b<|begin|>", "1<|endoftext|>    2"]:
        for special in (False, True):
            assert made.encode(text, special) == original.encode(text, special), repr(text)
        assert made.decode(made.encode(text)) == original.decode(original.encode(text))


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        (
            "deepseek-llm",
            "Hello World, it's 12!\n",
            ["Hello", " World", ",", " it", "'", "s", " ", "1", "2", "!", "\n"],
        ),
        ("deepseek-llm", "x = 字体 é", ["x", " =", " ", "字体", " é"]),
        (
            "deepseek-coder",
            "a_b c  42\r\n字",
            ["a", "_", "b", " c", "  ", "4", "2", "\r", "\n", "字"],
        ),
        (
            "tekken",
            "HelloWorld don't 42 a/\n",
            ["Hello", "World", " don", "'t", " ", "4", "2", " a", "/\n"],
        ),
        ("deepseek-r1-qwen", "it's 42\n\n", ["it", "'s", " ", "4", "2", "\n\n"]),
        ("llama3", "IT'S 12345", ["IT", "'S", " ", "123", "45"]),
        ("gpt-2", "IT'S 12345", ["IT", "'", "S", " 12345"]),
        ("starcoder", "a 12", ["a", " ", "1", "2"]),
    ],
)
def test_gguf_families_cut_text_as_their_models_do(library, pre, text, pieces):
    """Texts cut by hand after each family's rules: blanks, digits, case, signs, other scripts."""
    spec = definition_from_gguf(gguf_fields([*byte_alphabet(), "<s>"], pre=pre))
    cutter = library.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer
    assert [text[a:b] for _, (a, b) in cutter.pre_tokenize_str(text)] == pieces


def test_deepseek_letters_are_cased_letters():
    """The class that DeepSeek's own file lists: its 87 ranges ascend, hold no other characters than
    cased letters, and are not changed by a tool that composes characters."""
    ranges = re.findall("(.)(?:-(.))?", G.CASED)
    ends = [ord(c) for a, b in ranges for c in (a, b or a)]
    assert len(ranges) == 87 and ends == sorted(ends)
    for a, b in zip(ends[::2], ends[1::2], strict=True):
        assert {unicodedata.category(chr(c)) for c in range(a, b + 1)} <= {"Lu", "Ll", "Lt"}
    for c in (0x1F7D, 0x1FBE, 0x1FDB, 0x2126, 0x212A):
        assert chr(c) in G.CASED
    assert [ord(c) for c in G.CJK if ord(c) > 127] == [
        0x4E00,
        0x9FA5,
        0x800,
        0x4E00,
        0xAC00,
        0xD7FF,
    ]


def joined_by_score(text: str, vocab: dict[str, int], score: dict[str, float]) -> list[int]:
    """SentencePiece's BPE in loops: of all neighbours that join to a token the one of the highest
    score is joined, the leftmost among equals; then what is no token becomes bytes."""
    parts = list(text)
    while True:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        found = [(-score[p], i) for i, p in enumerate(pairs) if p in score]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [pairs[i]]
    ids = []
    for part in parts:
        in_bytes = [vocab[f"<0x{b:02X}>"] for b in part.encode()]
        ids += [vocab[part]] if part in vocab else in_bytes
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentencepiece_joins_by_score(library, trained, prefix):
    """Ids equal those of loops over the scores, with and without a blank before the text; text
    comes back, bos begins it, and added tokens are matched."""
    vocab = trained["sentencepiece"]["model"]["vocab"]
    for t in ("/", "</", "s>"):  # which join to what is not normal
        vocab = {**vocab, t: len(vocab)} if t not in vocab else vocab
    tokens = [*vocab, "<｜tool｜>", "[PAD]"]
    rng = random.Random(4)
    kinds = [6 if t.startswith("<0x") else NORMAL for t in vocab]
    kinds[:3] = [2, CONTROL, CONTROL]
    joined = [t for t, kind in zip(vocab, kinds, strict=True) if kind == NORMAL and len(t) > 1]
    score = {t: -rng.random() for t in joined}
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [score.get(t, 0.0) for t in tokens],
        "token_type": [*kinds, USER_DEFINED, UNUSED],
        "bos_token_id": 1,
        "add_space_prefix": prefix,
    }
    made = from_definition(definition_from_gguf(fields), "x")
    assert (made.eot, made.bos, made.vocab_size) == (2, 1, len(tokens) - 1)
    for text in [*strings(600), "</s> a</s>", "丁 🧿a"]:
        marked = ("▁" if prefix and text else "") + text.replace(" ", "▁")
        ids = made.encode(text)
        assert ids == joined_by_score(marked, vocab, score), repr(text)
        assert made.decode(ids) == text
    assert made.encode("<｜tool｜>") == [len(vocab)]
    assert definition_from_gguf({**fields, "add_bos_token": False})["post_processor"] is None


def test_gguf_sentencepiece_pairs_of_one_token_begin_with_the_longest():
    """Pairs come in the order of their token's score; those of one token as in the models' own
    files, the longest left part first."""
    tokens = ["<unk>", "a", "aa", "aaa", "ab", "b"]
    scores = [0.0, 0.0, -2.0, -1.0, -3.0, 0.0]
    spec = definition_from_gguf(
        {"model": "llama", "tokens": tokens, "scores": scores, "token_type": [2, 1, 1, 1, 1, 1]}
    )
    assert spec["model"]["merges"] == [["aa", "a"], ["a", "aa"], ["a", "a"], ["a", "b"]]


def test_gguf_unused_entries_are_holes(library):
    """Unused entries have no token; Qwen2.5 normalizes, Llama 3 takes pieces that are tokens whole;
    another name of a family is the same."""
    tokens = [*byte_alphabet(), "ab", "[PAD257]", "<|im_end|>"]
    fields = gguf_fields(tokens, ["a b"], pre="qwen2", bos_token_id=258)
    fields["token_type"][257] = UNUSED
    spec = definition_from_gguf(fields)
    made = from_definition(spec, "x")
    assert (made.eot, made.bos, made.vocab_size) == (258, None, 259)
    assert made.encode("ab") == [256] and made.decode([257, 256]) == "ab"
    for pre in G.CUTS:
        own = definition_from_gguf({**fields, "pre": pre})
        assert (own["normalizer"] is not None) == (pre in ("qwen2", "deepseek-r1-qwen"))
        assert own["model"]["ignore_merges"] == pre.startswith(("llama", "tekken"))
        assert (own["post_processor"] is not None) == own["model"]["ignore_merges"]
    again = definition_from_gguf({**fields, "pre": "llama3"})
    assert again == definition_from_gguf({**fields, "pre": "llama-bpe"})


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(model="bert"), "'bert'"),
        (dict(pre="falcon"), "'falcon'"),
        (dict(pre=None), "None"),
        (dict(token_type=[1, 1]), "2 types"),
        (dict(token_type=[1, 7, 3]), "type 7"),
        (dict(token_type=[0, 1, 3]), "'a'"),
        (dict(tokens=["a", "a", "</s>"]), "twice"),
        (dict(bos_token_id=None), "bos=None"),
        (dict(bos_token_id=3), "bos=3"),
        (
            dict(model="llama", tokens=["a" * 2000, "b", "</s>"], scores=[0, 0, 0]),
            "2000 characters",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_gguf_unknown_is_refused_by_name(change, says):
    """What cannot be turned into a tokenizer.json is named, with the way out."""
    given = gguf_fields(["a", "b", "</s>"], bos_token_id=2, add_bos_token=True)
    line = error_line(definition_from_gguf, given | change)
    assert says in line and ("Hugging Face folder" in line or "file again" in line)


# -- token files


def test_nested_header_of_a_token_file_is_one_line(tmp_path):
    """A header that is nothing but brackets is damaged."""
    path = tmp_path / "x.bin"
    path.write_bytes((MAGIC + b"[" * 4000).ljust(HEADER_BYTES) + b"\0")
    assert "header is damaged" in error_line(open_tokens, path, T.ByteTokenizer())
