"""Claims of gguf_tokenizer.py: a GGUF's fields give the tokenizer that they were made from, text is
cut as its family cuts it, and what is not known is refused by name. No network."""

import itertools
import json
import random
import re
import unicodedata

import pytest
from definitions import (  # noqa: F401 (fixtures)
    KINDS,
    MORE,
    gguf_fields,
    library,
    strings,
    trained,
)
from foreign import byte_alphabet
from helpers import error_line

from loaders import gguf_tokenizer as G
from loaders.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, definition_from_gguf
from loaders.tokenizer_json import from_definition


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
