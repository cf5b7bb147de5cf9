"""Tokenizers of three kinds, prompts of tasks read back as text, and models that answer them."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from helpers import tiny_encoding

from loaders.tokenizer import ByteTokenizer, TiktokenTokenizer
from tasks.prompts import FILLER, LEAST_FILLER


class Pairs:
    """Two letters to a token, one more before every text: what a sentence costs depends on where it
    stands."""

    name = "pairs"
    eot = 1 << 16
    bos = 7

    def encode(self, text: str) -> list[int]:
        raw = b"_" + text.encode()
        return [int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2)]

    def decode(self, ids) -> str:
        assert ids[0] != self.bos
        return b"".join(i.to_bytes(2 if i > 255 else 1, "big") for i in ids).decode()[1:]


def tokenizer(kind: str):
    """byte; bpe: merges, and an id that begins a text; pairs."""
    return {
        "byte": ByteTokenizer,
        "pairs": Pairs,
        "bpe": lambda: TiktokenTokenizer(tiny_encoding(r" ?\w+|\W"), bos=261),
    }[kind]()


def read(task, i: int) -> str:
    """The i-th prompt as text, without the id that begins it."""
    ids = task.prompts[i]
    tok = task.tokenizer
    assert tok.bos is None or (ids[0] == tok.bos and tok.bos not in ids[1:])
    return tok.decode(ids[tok.bos is not None :])


def check_filler(rest: str) -> list[str]:
    """The sentences of a text in which nothing but filler is left, in order: none is cut."""
    lines = re.findall(r"[A-Z][^.]*\.", rest)
    assert (
        " ".join(lines) == " ".join(rest.split())
        and set(lines) <= set(FILLER)
        and len(lines) >= LEAST_FILLER
    )
    return lines


def interpret(text: str) -> dict[str, str]:
    """{variable: value} of a text, statement after statement; a variable must have a value before
    it is read, and gets one once."""
    values: dict[str, str] = {}
    for name, source, number in re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))\.", text):
        assert name not in values
        values[name] = number or values[source]
    return values


class Reader(torch.nn.Module):
    """What generate needs of a model over bytes: it reads the whole prompt as text and writes
    answer(text), \\0 as the end token, then end tokens."""

    def __init__(self, answer):
        super().__init__()
        self.cfg = SimpleNamespace(vocab_size=257, block_size=4096)
        self.answer = answer
        self.calls = []
        self.embed_tokens = torch.nn.Embedding(1, 1)
        self.norm = torch.nn.LayerNorm(1)
        self.layers = []

    def new_cache(self, batch: int, max_len: int):
        self.calls.append([])
        return SimpleNamespace(ids=[[] for _ in range(batch)], plan=None, check_usable=lambda: None)

    def prefill(self, idx, cache, n_pad=None):
        """Take a prompt but its last token: not what the answer may come from."""
        self.calls[-1].append(idx.size(1))
        pad = [0] * len(idx) if n_pad is None else n_pad.tolist()
        for ids, row, p in zip(cache.ids, idx, pad, strict=True):
            ids += row[p:].tolist()
        return torch.full((len(idx), 1, 257), torch.nan)

    def decode(self, idx, cache):
        self.calls[-1].append(idx.size(1))
        if cache.plan is None:
            texts = [
                ByteTokenizer().decode(ids + row.tolist())
                for ids, row in zip(cache.ids, idx, strict=True)
            ]
            assert not any("\0" in t for t in texts)  # padding is said to be padding
            cache.plan = [[c or 256 for c in self.answer(t).encode()] for t in texts]
        logits = torch.zeros(len(idx), 1, 257)
        for b, plan in enumerate(cache.plan):
            logits[b, 0, plan.pop(0) if plan else 256] = float(bool(self.answer))
        return logits


def solve(text: str) -> str:
    """The right answer to a prompt of any kind, from its text."""
    if "magic" in text:
        return " " + re.search(r"magic number is (\d)", text)[1]
    if "lucky" in text:
        place = re.search(r"of (\w+) is$", text)[1]
        return " " + re.search(rf"of {place} is (\d)", text)[1]
    value = re.findall(r"the value (\d+)", text)[-1]
    return " " + ", ".join(n for n, v in interpret(text).items() if v == value)


def corpus(tok, n: int = 40) -> tuple[np.ndarray, list[str]]:
    """Ids of documents of numbered sentences and lines that an end token divides, and their
    texts."""
    rng = random.Random(5)
    documents = []
    for d in range(n):
        lines = [f"{s[:-1]} on day {d} {j}." for j, s in enumerate(rng.sample(FILLER, 9))]
        document = "".join(line + rng.choice((" ", "\n", "\n\n")) for line in lines)
        documents.append(document.strip())
    ids = []
    for document in documents:
        ids += [*([] if tok.bos is None else [tok.bos]), *tok.encode(document), tok.eot]
    return np.array(ids), documents


ROWS = """What is 2 + 2?,3,4,5,6,B
"Which, of these, is ""round""?",A coin,"a box, flat",sand,rain,A
"Two
lines?",yes,no,maybe,"never
ever",D

Plain?,w,x,y,z, C
"""


def questions(folder: Path, **files: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return str(folder)


def rows_of(topic: str, n: int, answers: str = "ABCD") -> str:
    return "".join(
        f"{topic} {i}?,{topic}a{i},{topic}b,{topic}c,{topic}d,{answers[i % len(answers)]}\n"
        for i in range(n)
    )
