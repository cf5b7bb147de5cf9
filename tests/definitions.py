"""Tokenizers of others, made by the package `tokenizers` or field by field: for the tests of
tokenizer.json, of GGUF and of chats."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from foreign import byte_alphabet

from loaders import gguf_tokenizer as G
from loaders import tokenizer as T
from loaders.gguf_tokenizer import CONTROL, NORMAL, definition_from_gguf

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


def small(*added: str, post: dict | None = None) -> dict:
    """A definition of 256 bytes and these added tokens, ids from 256."""
    spec = definition_from_gguf(gguf_fields([*byte_alphabet(), *added]))
    for i in range(len(added)):
        del spec["model"]["vocab"][added[i]]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec["added_tokens"] = [{"id": 256 + i, "content": t, **flags} for i, t in enumerate(added)]
    return {**spec, "post_processor": post}


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


def gguf_fields(tokens: list[str], merges=(), **changes) -> dict:
    """The tokenizer.ggml.* fields of a GPT-2; what is spelled <...> is a control token."""
    kinds = [CONTROL if t[0] == "<" and t[-1] == ">" else NORMAL for t in tokens]
    fields = {"model": "gpt2", "pre": "gpt2", "tokens": tokens, "token_type": kinds}
    return {**fields, "merges": list(merges), **changes}
