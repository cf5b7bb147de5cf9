"""Claims of tokenizer_json.py: ids are those of the package `tokenizers`, pieces join as the whole,
and damaged definitions are one line. No network."""

import copy
import json
import random
import sys
import unicodedata

import pytest
from definitions import (  # noqa: F401 (fixtures)
    KINDS,
    PIECES,
    by_hand,
    gguf_fields,
    library,
    sentencepiece,
    small,
    strings,
    trained,
)
from foreign import byte_alphabet, needs_smol, smol
from helpers import error_line, tiny_encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import tokenizer as T
from loaders.gguf_tokenizer import definition_from_gguf
from loaders.tokenizer_json import from_definition


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
