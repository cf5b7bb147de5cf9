"""Claims of tokenizer.py: text of bytes and of tiktoken stays text, a stream shows what the whole
shows, ids out of range are named. No network."""

import random
import socket

import numpy as np
import pytest
import torch
from helpers import error_line, tiny_encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import tokenizer as T
from loaders.token_files import HEADER_BYTES, MAGIC, open_tokens

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


def test_nested_header_of_a_token_file_is_one_line(tmp_path):
    """A header that is nothing but brackets is damaged."""
    path = tmp_path / "x.bin"
    path.write_bytes((MAGIC + b"[" * 4000).ljust(HEADER_BYTES) + b"\0")
    assert "header is damaged" in error_line(open_tokens, path, T.ByteTokenizer())
