"""The prompts that tasks/ makes, read back as text; their scores, from models that answer right,
wrong or not at all; eval.py on each."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import needs_smol, smol
from helpers import TINY, error_line, grouped_model, tiny_encoding, tiny_model, tokens
from test_eval import ContextOracle

import eval as evaluation
import kv_router
from loaders.runs import load_run
from loaders.tokenizer import ByteTokenizer, TiktokenTokenizer
from measure_config import EvalConfig
from report.plan import Asked
from report.tables import result_table
from runs import call, pretrain, python
from tasks.choices import MultipleChoice, multiple_choice
from tasks.common import Generated, ThroughCache, decoded
from tasks.prompts import (
    FILLER,
    LEAST_FILLER,
    NEEDLE_ROOM,
    PLACES,
    Needle,
    VariableTracking,
    needle,
    variable_tracking,
)
from tasks.questions import read_questions
from tasks.recall import (
    COPIED,
    NAMES,
    ROLES,
    THINGS,
    compressed,
    copying,
    needles,
    question_for,
    read_on,
)
from tasks.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_filler_is_plain():
    """About forty different sentences, without digits, capitals inside, or words of the questions;
    places are as many as --distractors needs."""
    assert len(set(FILLER)) == len(FILLER) == 40 and len(set(PLACES)) == 32
    for s in FILLER:
        assert re.fullmatch(r"[A-Z][A-Za-z, ]+\.", s) and not re.search(
            r"number|magic|lucky|VAR|[A-Z]{2}", s
        )
    assert all(re.fullmatch("[A-Z][a-z]+", p) for p in PLACES)


# ----------------------------------------------------------------------------- needle


@pytest.mark.parametrize("length", [230, 331, 1200])
@pytest.mark.parametrize("kind", ["byte", "bpe", "pairs"])
def test_needle_is_said_once_and_asked_last(kind, length):
    """The needle stands once in whole filler sentences, the question ends the prompt, no other
    digit is in it, and the prompt has 90 to 100 % of the tokens that the answer leaves."""
    task = needle(tokenizer(kind), length, 30, 3, 16)
    question = "\n\nWhat is the magic number? The magic number is"
    assert (task.n, task.room, task.query, task.metric, task.name) == (
        30,
        10,
        16,
        "accuracy",
        "needle",
    )
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        said = f"The magic number is {answer}."
        assert (
            1 <= answer <= 9
            and text.count(said) == 1
            and text.endswith(question)
            and re.findall("[0-9]", text) == [str(answer)]
        )
        check_filler(text[: -len(question)].replace(said, ""))
        assert 0.9 * (length - 10) <= len(task.prompts[i]) <= length - 10
    assert len({tuple(p) for p in task.prompts}) == 30


class Dear(ByteTokenizer):
    """Sentences cost more together than alone: three tokens more at every boundary."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace(". ", ".    "))


def test_budget_holds_where_sentences_cost_more_together():
    """Sentences are taken out again until the prompt fits, whole ones, and hardly more than
    needed."""
    task = needle(Dear(), 1500, 20, 0, 16)
    for i, answer in enumerate(task.answers):
        assert 0.9 * 1490 <= len(task.prompts[i]) <= 1490
        context = read(task, i).split("\n\n")[0]
        check_filler(context.replace(f"The magic number is {answer}.", ""))


def test_needle_answers_and_places_are_uniform():
    """Over 900 examples every digit comes about as often, and the needle about as often in every
    quarter of the text; the digit says nothing about the place."""
    task = needle(ByteTokenizer(), 400, 900, 0, 16)
    place = [int(4 * read(task, i).index("The magic number is") / 330) for i in range(900)]
    assert set(Counter(task.answers)) == {*range(1, 10)} and all(
        70 <= c <= 130 for c in Counter(task.answers).values()
    )
    assert all(170 <= Counter(place)[q] <= 280 for q in range(4))
    assert all(
        Counter(p for p, a in zip(place, task.answers, strict=True) if a > 4)[q] > 80
        for q in range(4)
    )
    last = [re.findall(r"[A-Z][^.]*\.", read(task, i).split("\n\n")[0])[-1] for i in range(900)]
    # the short sentences that fill the budget up stand anywhere
    assert sum(len(s) < 20 for s in last) < 450


@pytest.mark.parametrize("distractors", [1, 3, 12, 31])
def test_distractors_are_other_numbers(distractors):
    """Every place is named once with its number, none of the others has the answer, the one asked
    for is anywhere among them, and the question names it."""
    task = needle(tokenizer("bpe"), 2600, 40, 1, 16, distractors)
    ranks = []
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        context, question = text.split("\n\n")
        facts = re.findall(r"The lucky number of (\w+) is (\d)\.", context)
        asked = re.fullmatch(
            r"What is the lucky number of (\w+)\? The lucky number of (\w+) is", question
        )
        assert (
            asked[1] == asked[2]
            and len(facts) == len(dict(facts)) == distractors + 1
            and "magic" not in text
        )
        assert (
            dict(facts)[asked[1]] == str(answer)
            and [d for _, d in facts].count(str(answer)) == 1
            and "0" not in dict(facts).values()
        )
        check_filler(re.sub(r"The lucky number of \w+ is \d\.", "", context))
        ranks.append([p for p, _ in facts].index(asked[1]))
    assert len(set(ranks)) > min(distractors, 5)


# ----------------------------------------------------------------------------- variable tracking


def interpret(text: str) -> dict[str, str]:
    """{variable: value} of a text, statement after statement; a variable must have a value before
    it is read, and gets one once."""
    values: dict[str, str] = {}
    for name, source, number in re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))\.", text):
        assert name not in values
        values[name] = number or values[source]
    return values


@pytest.mark.parametrize("chains, hops", [(1, 1), (1, 4), (3, 2), (4, 5)])
@pytest.mark.parametrize("kind", ["byte", "bpe", "pairs"])
def test_variable_tracking_is_solved_by_an_interpreter(kind, chains, hops):
    """Run in order, the text gives the answer and nothing else that value; as many chains of that
    length as were asked for; the example's answer is right, and its names and value are its own;
    room for the answer; 90 to 100 % of the tokens."""
    length = 2000
    task = variable_tracking(tokenizer(kind), length, 12, 5, 16, chains, hops)
    assert (task.metric, task.name) == ("recall", "variable_tracking")
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        example, shown, body = re.fullmatch(
            r"(Follow .*?)\nQuestion: .*?\nAnswer: .*? are: ([A-Z, ]+)\n\n(Follow .*)", text, re.S
        ).groups()
        context, value = re.fullmatch(
            r"(.*)\nQuestion: Find all variables that are assigned the value (\d{5}) in the text above.\n"
            rf"Answer: The {hops + 1} variables that are assigned the value \2 are:",
            body,
            re.S,
        ).groups()
        values = interpret(context)
        assert [n for n, v in values.items() if v == value] == answer and len(answer) == hops + 1
        assert sorted(Counter(values.values()).values()) == [hops + 1] * chains
        assert [*interpret(example)] == shown.split(", ") and len(
            set(interpret(example).values())
        ) == 1
        assert not {*interpret(example)} & {*values} and not {*interpret(example).values()} & {
            *values.values()
        }
        check_filler(
            re.sub(
                r"VAR [^.]*\.",
                "",
                context.removeprefix("Follow the variables through the text.\n\n"),
            )
        )
        assert task.room >= len(task.tokenizer.encode(" " + ", ".join(answer)))
        assert 0.9 * (length - task.room) <= len(task.prompts[i]) <= length - task.room


def test_chains_are_scattered_and_any_is_asked_for():
    """The chain that is asked for is now the first, now another, and chains run through each other,
    with filler between assignments."""
    task = variable_tracking(ByteTokenizer(), 2500, 40, 0, 16, 3, 3)
    first = []
    mixed = 0
    apart = 0
    for i, answer in enumerate(task.answers):
        context = read(task, i).split("Follow the variables")[2]
        values = interpret(context)
        first.append(next(iter(values)) == answer[0])
        order = list(values.values())
        mixed += any(
            order[j] != order[j + 1] and order[j] in order[j + 2 :] for j in range(len(order) - 2)
        )
        apart += (
            len(re.findall(r"\. VAR", context)) > 5 and len(re.findall(r"[a-z]\. VAR", context)) > 3
        )
    assert 5 <= sum(first) <= 25 and mixed > 35 and apart > 35


# -------------------- what all prompts have in common

MAKERS = {
    "needle": lambda n, seed, tok=None, T=400: needle(tok or ByteTokenizer(), T, n, seed, 16),
    "distractors": lambda n, seed, tok=None, T=500: needle(
        tok or ByteTokenizer(), T, n, seed, 16, 3
    ),
    "variable_tracking": lambda n, seed, tok=None, T=1100: variable_tracking(
        tok or ByteTokenizer(), T, n, seed, 16, 2, 2
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_prompts_follow_from_seed_and_index(name):
    """The same seed gives the same prompts, however many are made; another seed or index gives
    others."""
    a = MAKERS[name](4, 1)
    b = MAKERS[name](9, 1)
    c = MAKERS[name](9, 2)
    assert a.prompts == b.prompts[:4] and a.answers == b.answers[:4]
    assert len({tuple(p) for p in b.prompts + c.prompts}) == 18 and b.answers != c.answers


@pytest.mark.parametrize(
    "name, short", [("needle", 200), ("distractors", 320), ("variable_tracking", 850)]
)
def test_too_short_is_refused(name, short):
    """A length that would leave no haystack is refused in one line, from that length down to
    nothing; above it every length works."""
    for T in (short, short // 2, 11, 1):
        line = error_line(MAKERS[name], 20, 0, T=T)
        assert "give a larger --block_size" in line and "tokens for a prompt" in line
    for T in range(short + 100, short + 140, 7):
        MAKERS[name](3, 0, T=T)


def test_stored_is_the_end_of_four_prompts():
    """What is measured is one rectangle: the last tokens of the first four prompts, as many as the
    shortest of them has."""
    task = MAKERS["needle"](6, 0)
    short = min(len(p) for p in task.prompts[:4])
    assert (
        task.stored.tolist() == [p[len(p) - short :] for p in task.prompts[:4]]
        and len({len(p) for p in task.prompts[:4]}) > 1
    )
    assert replace(task, prompts=task.prompts[:2]).stored.shape[0] == 2


@pytest.mark.parametrize(
    "text, answer, score",
    [
        (" 7.", 7, 1),
        ("7", 7, 1),
        (" 77", 7, 1),
        (" is not 3 but 7", 7, 0),
        (" seven", 7, 0),
        ("", 7, 0),
        (" 17", 7, 0),
        (" ٧ 7", 7, 1),
    ],
)
def test_needle_score_is_the_first_digit(text, answer, score):
    """The first digit counts, nothing after it, and no digit is wrong."""
    assert Needle.score(text, answer) == score


@pytest.mark.parametrize(
    "text, score",
    [
        (" AAAAA, BBBBB, CCCCC, DDDDD", 1),
        (" DDDDD BBBBB", 0.5),
        (" VAR AAAAA\n\nFollow", 0.25),
        (" aaaaa AAAA", 0),
        ("", 0),
        ("AAAAA AAAAA", 0.25),
    ],
)
def test_variable_tracking_score_is_the_share_named(text, score):
    """Each of the chain's variables counts once, in any order."""
    assert VariableTracking.score(text, ["AAAAA", "BBBBB", "CCCCC", "DDDDD"]) == score


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


def test_scores_of_a_model_that_answers():
    """A model that solves the text gets 1, one that is wrong or silent 0, half the answer half, and
    one that only looks at the wrong number 0; whatever the batch, padded or not. Nothing after the
    end token counts."""
    for name, make in MAKERS.items():
        task = make(7, 2)
        assert len({len(p) for p in task.prompts}) > 1  # so that batches are padded
        for answer, value in (
            (solve, 1),
            (lambda t: " none", 0),
            (lambda t: "", 0),
            (lambda t: "\0" + solve(t), 0),
        ):
            assert [task.value(Reader(answer), n, "float32") for n in (1, 3, 7, 16)] == [
                value
            ] * 4, name
    task = MAKERS["distractors"](7, 2)
    assert (
        task.value(
            Reader(
                lambda t: next(
                    d for _, d in re.findall(r"of (\w+) is (\d)", t) if d not in solve(t)
                )
            ),
            3,
            "float32",
        )
        == 0
    )
    task = MAKERS["variable_tracking"](7, 2)
    assert task.value(
        Reader(lambda t: ",".join(solve(t).split(",")[:2])), 3, "float32"
    ) == pytest.approx(2 / 3)
    right = iter([1, 0] * 4)
    assert MAKERS["needle"](7, 2).value(
        Reader(lambda t: solve(t) if next(right) else " x"), 1, "float32"
    ) == pytest.approx(4 / 7)


def test_last_token_of_a_prompt_reads_the_cache():
    """A prompt goes in without its last token, then that alone, then one at a time for as many as
    there is room for, one cache a batch."""
    task = MAKERS["needle"](5, 0)
    reader = Reader(lambda t: "x" * 99)
    task.value(reader, 2, "float32")
    assert reader.calls == [
        [max(map(len, task.prompts[i : i + 2])) - 1] + [1] * 10 for i in (0, 2, 4)
    ]


def test_generated_ids_that_the_tokenizer_lacks_end_the_text():
    """A model's table may be longer than the vocabulary: such an id gives no text and no crash."""
    tok = ByteTokenizer()
    assert (
        decoded(tok, [55, 300, 56]) == decoded(tok, [55, 256]) == "7"
        and decoded(tok, [300]) == decoded(tok, []) == ""
    )


class Letters(ByteTokenizer):
    """Ids for a model of TINY.vocab_size: a byte's remainder, all of it different for A, B, C and
    D."""

    def encode(self, text: str) -> list[int]:
        return [b % TINY.vocab_size for b in super().encode(text)]


@pytest.mark.parametrize("query", [0, 9])
def test_answers_are_read_from_the_compressed_cache(query, tmp_path):
    """The logits behind an answer are those of full matrices where the prompt's last token reads
    the routed values of all but the last `query` tokens, in batches with padding; they are not the
    dense model's."""
    (tmp_path / "q.csv").write_text(
        "".join(f"Is {'so ' * (i % 5)}{i} it?,a{i},b,c,d,{'ABCD'[i % 4]}\n" for i in range(24))
    )
    setting = dict(
        prefill="exact",
        value_basis="output",
        value_router="norm",
        mask_scope="head",
        n_groups=8,
        topk_groups=2,
    )
    task = multiple_choice(Letters(), 160, 23, 0, query, str(tmp_path / "q.csv"), shots=1)
    model = grouped_model(**setting)
    oracle = grouped_model(**setting)
    seen = {}
    for i, (p, (_, letters)) in enumerate(zip(task.prompts, task.answers, strict=True)):
        for name, path in kv_router.paths(grouped_model(**setting)).items():
            oracle.get_submodule(name.rsplit(".", 1)[0]).kv_path = ContextOracle(
                path, query, len(p) - 1
            )
        with torch.no_grad():
            seen[i] = (
                oracle(torch.tensor([p]))[0, -1, letters],
                tiny_model()(torch.tensor([p]))[0, -1, letters],
            )
    want = sum(float(seen[i][0].argmax() == task.answers[i][0]) for i in seen) / 23
    with kv_router.storing(model, kv_tail=query, kv_tail_block=1):
        assert [task.value(model, n, "float32") for n in (1, 4, 23)] == [pytest.approx(want)] * 3
        for i in (0, 7, 22):
            p = task.prompts[i]
            (_, letters) = task.answers[i]
            with torch.no_grad():
                cache = model.new_cache(1, len(p))
                got = ThroughCache(model).prefill(torch.tensor([p]), cache)[0, -1, letters]
            assert (
                torch.allclose(got, seen[i][0], atol=1e-8, rtol=0)
                and (got - seen[i][1]).abs().max() > 1e-3
            )


def test_ragged_prompts_whose_last_tokens_read_the_cache():
    """Prompts of several lengths, of which the last three tokens read what is kept of the others:
    the newest token's logits are those of each prompt alone. Only prompts of three tokens or fewer
    read whole values."""
    setting = dict(prefill="exact", value_router="norm", n_groups=8, topk_groups=2, kv_tail=2)
    model = grouped_model(**setting)
    lengths = (12, 9, 3, 2, 1)
    prompts = [tokens(n, seed=n) for n in lengths]
    T = max(lengths)
    idx = torch.stack([F.pad(prompt, (T - len(prompt), 0)) for prompt in prompts])
    n_pad = T - torch.tensor(lengths)
    through = ThroughCache(model, 3)
    with torch.no_grad():
        got = through.prefill(idx, model.new_cache(len(idx), T), n_pad)[:, -1]
        for logits, prompt in zip(got, prompts, strict=True):
            alone = through.prefill(prompt[None], model.new_cache(1, T))[0, -1]
            whole = model.prefill(prompt[None], model.new_cache(1, T))[0, -1]
            assert (logits - alone).abs().max() < 1e-12
            assert ((logits - whole).abs().max() < 1e-12) == (len(prompt) <= 3)


def test_generated_text_is_the_same_in_any_batch():
    """A random model's answers to prompts of several lengths, alone and together, through packed
    caches."""
    model = grouped_model(
        seed=5,
        prefill="exact",
        value_basis="output",
        value_router="norm",
        mask_scope="head",
        kv_tail=5,
    )
    tok = Letters()
    said = []
    prompts = [tok.encode("What is it? It is"[i:]) for i in range(7)]

    class Kept(Generated):
        @staticmethod
        def score(text, answer):
            said.append(text)
            return 1.0

    task = Kept(prompts, [0] * 7, 5, tok, 12)
    for n in (1, 3, 7):
        assert task.value(model, n, "float32") == 1
    assert said[:7] == said[7:14] == said[14:] and len(set(said)) > 3
    assert not model.training


# ----------------------------------------------------------------------------- recall

KINDS = {"digit": "[1-9]", "number": "[1-9][0-9]{4}", "name": "[A-Z][a-z]+"}


def shared_words(words: tuple[str, ...], texts: tuple[str, ...]) -> list[str]:
    """The words that occur in some text, or in another word."""
    return [w for w in words if any(w in t for t in (*texts, *(o for o in words if o != w)))]


def test_names_occur_nowhere_else():
    """No name, role or thing is a part of another or of a filler sentence; there are 32 of each at
    least."""
    texts = (*FILLER, question_for("magic name"), question_for("magic number"))
    words = (*NAMES, *ROLES, *THINGS)
    assert len(set(words)) == len(words) and shared_words(words, texts) == []
    assert len(ROLES) == len(THINGS) == 32 <= len(NAMES)
    assert max(map(len, NAMES)) + 2 <= NEEDLE_ROOM


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked, distractors", [(1, 0), (1, 2), (4, 0), (3, 2)])
@pytest.mark.parametrize("tok", ["byte", "bpe"])
def test_facts_are_said_once_before_what_stays_whole(tok, kind, asked, distractors, query=37):
    """As many facts as there are questions and distractors stand once in whole filler sentences,
    none of them in the last `query` tokens; no value and no key that is asked for occurs a second
    time; every answer is what the text says; context, question and answer fit the length."""
    length = 1300
    task = needles(tokenizer(tok), length, 6, 3, query, distractors, "unseen", asked, kind)
    keys = {"name": "[a-z]+", "number": "[a-z]+ number", "digit": "lucky number of [A-Z][a-z]+"}
    key = keys[kind]
    if asked + distractors == 1:
        key = "magic name" if kind == "name" else "magic number"
    fact = re.compile(rf"The ({key}) is ({KINDS[kind]})\.")
    assert (task.n, len(task.prompts), task.query) == (6 * asked, 6, query)
    for i, turns in enumerate(task.answers):
        text = read(task, i)
        facts = fact.findall(text)
        assert len(facts) == len(dict(facts)) == asked + distractors
        assert all(text.count(word) == 1 for said in facts for word in said)
        assert len({turn.answer for turn in turns}) == len(turns) == asked
        for turn in turns:
            question = task.tokenizer.decode(turn.question)
            asks = re.fullmatch(r"\n\n(?:What is the .*\? )?The (.*) is", question)
            assert dict(facts)[asks[1]] == turn.answer
            assert len(task.prompts[i]) + len(turn.question) + 10 <= length
        check_filler(fact.sub("", text))
        assert not re.search(
            r"The \w+ (number|name)", task.tokenizer.decode(task.prompts[i][-query:])
        )
        assert len(task.prompts[i]) >= 0.9 * (length - 10) - 90


@pytest.mark.parametrize("kind", KINDS)
def test_seen_and_unseen_differ_in_the_question_alone(kind):
    """Contexts, questions and answers are the same; seen, all but the question's last token stands
    behind a context that every question has to itself."""
    about = (ByteTokenizer(), 900, 4, 1, 16, 1)
    seen = needles(*about, "seen", 3, kind)
    unseen = needles(*about, "unseen", 3, kind)
    assert seen.n == unseen.n == len(seen.prompts) == 12 and len(unseen.prompts) == 4
    for i, turns in enumerate(unseen.answers):
        for j, turn in enumerate(turns):
            (alone,) = seen.answers[3 * i + j]
            whole = seen.prompts[3 * i + j] + alone.question
            assert whole == unseen.prompts[i] + turn.question and alone.answer == turn.answer
            assert len(alone.question) == 1
    words = [] if kind == "digit" else [kind]
    assert seen.name == "_".join(["needle", *words, "x3"])
    assert unseen.name == "_".join(["needle", "unseen", *words, "x3"])


def test_facts_fit_whatever_is_asked_beside_them():
    """A row of the longest place is read on with others in one batch: no row exceeds the length."""
    task = needles(ByteTokenizer(), 700, 30, 0, 16, 0, "unseen", 2, "number")
    longest = max(len(turn.question) for turns in task.answers for turn in turns)
    assert max(map(len, task.prompts)) + longest + task.room <= 700


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


@pytest.mark.parametrize("tok", ["byte", "bpe"])
def test_passage_stands_once_before_what_stays_whole(tok, length=700, query=150):
    """A context is whole sentences of the corpus, in order, without end tokens; the question is the
    first ten words of one of them, which occur once, and the answer the COPIED ids that follow them
    in the context, all before its last `query` tokens."""
    tok = tokenizer(tok)
    ids, documents = corpus(tok)
    task = copying(tok, length, 12, 4, query, Text(ids, {"sha256": "x"}))
    whole = " ".join(" ".join(documents).split())
    assert (task.n, task.name, task.text) == (12, "copy_unseen", {"sha256": "x"})
    places = []
    for i, (turn,) in enumerate(task.answers):
        text = read(task, i)
        flat = " ".join(text.split())
        assert flat in whole and re.match(r"[A-Z]", text) and text.endswith(".")
        assert whole[whole.index(flat) - 2] == "."
        assert tok.eot not in task.prompts[i][1:]
        cue = tok.decode(turn.question).removeprefix("\n\n")
        after = tok.decode(turn.answer)
        assert len(cue.split()) == 10 and len(turn.answer) == COPIED
        assert text.count(cue) == 1 and cue + after in text
        start = text.index(cue)
        assert start == 0 or re.search(r"[.\n]\s*$", text[:start])
        tail = tok.encode(text[start + len(cue) + len(after) :])
        assert len(tail) >= query
        assert len(task.prompts[i]) + len(turn.question) + COPIED <= length
        places.append(start / len(text))
    assert min(places) < 0.2 and max(places) > 0.4
    again = copying(tok, length, 5, 4, query, Text(ids, {}))
    other = copying(tok, length, 5, 5, query, Text(ids, {}))
    assert again.prompts == task.prompts[:5] and again.answers == task.answers[:5]
    assert other.prompts != again.prompts


def test_copying_refuses_what_has_no_passage():
    """Too few tokens, and a text that repeats itself, are refused in one line."""
    tok = ByteTokenizer()
    text = Text(corpus(tok)[0], {})
    assert "give a larger --block_size" in error_line(copying, tok, 100, 1, 0, 21, text)
    same = Text(np.array(tok.encode("One two three four five six seven. " * 300)), {})
    line = error_line(copying, tok, 700, 1, 0, 16, same)
    assert "occur once" in line and "another --dataset" in line


@pytest.mark.parametrize(
    "kind, text, answer, score",
    [
        ("digit", " 7.", "7", 1),
        ("digit", " 3 or 7", "7", 0),
        ("number", " 48213.\n", "48213", 1),
        ("number", " 4821", "48213", 0),
        ("number", " 482130", "48213", 0),
        ("number", " 1, 48213", "48213", 0),
        ("name", " Clara. The", "Clara", 1),
        ("name", " Claras", "Clara", 0),
        ("name", " is Clara", "Clara", 0),
        ("name", "", "Clara", 0),
        ("name", "\0 Clara", "Clara", 0),
    ],
)
def test_fact_score_is_the_first_match(kind, text, answer, score):
    """The first digit, whole number or word counts, and nothing after the end token (\\0 here)."""
    task = needles(ByteTokenizer(), 400, 1, 0, 16, 0, "unseen", 1, kind)
    assert task.score([c or 256 for c in text.encode()], answer) == score


class Teller(Reader):
    """A Reader that is asked after its prompt was taken, again and again: after every byte it says
    the next one of answer(prompt, text read so far)."""

    def new_cache(self, batch: int, max_len: int):
        cache = SimpleNamespace(texts=[""] * batch, contexts=[])
        cache.snapshot = lambda: [*cache.texts]
        cache.restore = lambda saved: setattr(cache, "texts", [*saved])
        return cache

    def prefill(self, idx, cache, n_pad=None):
        pad = [0] * len(idx) if n_pad is None else n_pad.tolist()
        rows = zip(idx.tolist(), pad, strict=True)
        cache.texts = [bytes(row[p:]).decode() for row, p in rows]
        assert not any("\0" in text for text in cache.texts)  # padding is said to be padding
        cache.contexts = [*cache.texts]

    def decode(self, idx, cache):
        logits = torch.zeros(len(idx), 1, 257)
        for b, (token,) in enumerate(idx.tolist()):
            cache.texts[b] += chr(token) if token < 256 else ""
            said = self.answer(cache.contexts[b], cache.texts[b])
            logits[b, 0, ord(said[0]) if said else 256] = 1.0
        return logits


def tell(context: str, text: str) -> str:
    """What is right after `text`, which ends with a question and a part of its answer, looked up in
    the text before the question."""
    for gap in re.finditer("\n\n", text):
        hay = text[: gap.start()]
        question = text[gap.end() :]
        asks = re.fullmatch(r"(?:What is the .*\? )?The ([\w ]+?) is(.*)", question, re.S)
        found = asks and re.search(rf"The {asks[1]} is (\w+)\.", hay)
        if found:
            return f" {found[1]}."[len(asks[2]) :]
        if len(question) > 20 and question in hay:
            return hay[hay.index(question) + len(question) :]
    return "?"


RECALLS = {
    "unseen": lambda: needles(ByteTokenizer(), 700, 7, 2, 16, 0, "unseen", 1, "digit"),
    "seen": lambda: needles(ByteTokenizer(), 700, 3, 2, 16, 1, "seen", 2, "number"),
    "several": lambda: needles(ByteTokenizer(), 700, 4, 2, 16, 1, "unseen", 4, "number"),
    "names": lambda: needles(ByteTokenizer(), 700, 4, 2, 16, 0, "unseen", 2, "name"),
    "copy": lambda: copying(ByteTokenizer(), 700, 7, 2, 16, Text(corpus(ByteTokenizer())[0], {})),
    "copy seen": lambda: copying(
        ByteTokenizer(), 700, 7, 2, 16, Text(corpus(ByteTokenizer())[0], {}), "seen"
    ),
}


@pytest.mark.parametrize("name", RECALLS)
def test_recall_scores_a_model_that_answers(name):
    """A model that looks the answer up gets 1, in any batch, one that says nothing or something
    else 0; unseen, no question stands in what is processed at first, seen it does."""
    task = RECALLS[name]()
    assert len({len(p) for p in task.prompts}) > 1  # so that batches are padded
    contexts = []

    def noted(context, text):
        contexts.append(context)
        return tell(context, text)

    assert [task.value(Teller(noted), n, "float32") for n in (1, 3, 16)] == [1] * 3
    for wrong in (lambda c, t: "", lambda c, t: "!"):
        assert task.value(Teller(wrong), 16, "float32") == 0
    asked = task.tokenizer.decode(task.answers[0][0].question)
    seen = "seen" in name.split()
    assert all(c.endswith(" i") == (seen and "copy" not in name) for c in contexts)
    assert len(asked) == 1 if seen else len(asked) > 14


def test_recall_is_a_mean_over_questions_and_tokens():
    """Three of four facts known gives 3 / 4; a model that copies, but never says e, gets the share
    of other letters in the passages, each judged after the right letters before it."""
    task = RECALLS["several"]()
    unknown = {turn.answer for turns in task.answers for turn in turns[3:]}

    def some(context, text):
        said = re.search(r"\d*$", text)[0] + tell(context, text)
        return "x" if said.strip(" .") in unknown else tell(context, text)

    assert task.value(Teller(some), 3, "float32") == 3 / 4
    task = RECALLS["copy"]()
    letters = [bytes(turn.answer).decode() for (turn,) in task.answers]
    share = 1 - sum(text.count("e") for text in letters) / (COPIED * len(letters))
    without = Teller(lambda c, t: tell(c, t).replace("e", "!"))
    assert task.value(without, 4, "float32") == pytest.approx(share) and 0.8 < share < 0.99


@pytest.mark.parametrize("query", [0, 9])
def test_questions_read_what_generation_reads(query):
    """After every token of a question, and after those generated then, the likeliest token is that
    of full matrices where all tokens behind the context read routed values of what is older than
    the last `query`; in padded batches, in the second turn too."""
    setting = dict(prefill="exact", value_basis="output", value_router="norm", mask_scope="head")
    setting |= dict(n_groups=8, topk_groups=2)
    rng = random.Random(3)
    prompts = [rng.choices(range(TINY.vocab_size), k=k) for k in (13, 7, 15)]
    turns = [
        [rng.choices(range(TINY.vocab_size), k=k) for k in ks] for ks in ((3, 6), (5, 1), (2, 4))
    ]
    model = grouped_model(**setting)
    wanted = {}
    for b, context in enumerate(prompts):
        for j, question in enumerate(turns[b]):
            oracle = grouped_model(**setting)
            for path_name, path in kv_router.paths(grouped_model(**setting)).items():
                layer = oracle.get_submodule(path_name.rsplit(".", 1)[0])
                layer.kv_path = ContextOracle(path, query, len(context))
            ids = context + question
            said = []
            with torch.no_grad():
                for _ in range(len(question) + 4):
                    end = len(context) + len(said) + 1
                    ids = ids + said[len(ids) - len(context) - 1 :][:1] if len(ids) < end else ids
                    said.append(int(oracle(torch.tensor([ids[:end]]))[0, -1].argmax()))
            wanted[b, j] = said
    with kv_router.storing(model, kv_tail=query, kv_tail_block=1), torch.no_grad():
        for rows in ([0, 1, 2], [1], [2, 0]):
            _, cache = compressed(model, [prompts[b] for b in rows], 12)
            before = cache.snapshot()
            for j in (0, 1, 0):
                cache.restore(before)
                got = read_on(model, cache, [turns[b][j] for b in rows], 9)
                for b, said in zip(rows, got, strict=True):
                    n = len(wanted[b, j])
                    assert said[:n] == wanted[b, j][:9]
    assert len({tuple(said) for said in wanted.values()}) == 6


# ----------------------------------------------------------------------------- multiple choice

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


def test_csv_is_read_as_csv(tmp_path):
    """Quotes, commas and line breaks inside of fields, blank lines, a byte order mark, Windows line
    ends."""
    for i, text in enumerate((ROWS, "\ufeff" + ROWS, ROWS.replace("\n", "\r\n"))):
        path = tmp_path / f"{i}.csv"
        path.write_bytes(text.encode())
        read = read_questions(path)
        assert [q.answer for q in read] == [1, 0, 3, 2] and read[
            1
        ].text == 'Which, of these, is "round"?'
        assert (
            read[0].choices == ("3", "4", "5", "6")
            and read[1].choices[1] == "a box, flat"
            and read[3].choices == ("w", "x", "y", "z")
        )
        assert read[2].text.splitlines() == ["Two", "lines?"] and [
            q.where.split("line ")[1] for q in read
        ] == ["1", "2", "3", "7"]
    assert (
        read[0].asked() == "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
        and read[0].shown() == read[0].asked() + " B\n\n"
    )


@pytest.mark.parametrize(
    "bad, why",
    [
        ("a,b,c,d,A\n", "5 fields"),
        ("q,a,b,c,d,A,extra\n", "7 fields"),
        ("q,a,b,c,d,E\n", "answer 'E'"),
        ("q,a,b,c,d,a\n", "answer 'a'"),
        ("q,a,b,c,d,AB\n", "answer 'AB'"),
        ("question,A,B,C,D,answer\n", "answer 'answer'"),
        ("q,a,,c,d,A\n", "an empty field"),
        (",a,b,c,d,A\n", "empty"),
        ("q,a,b,c,d,\n", "empty"),
        ('"q,a,b,c,d,A\n', "unexpected end"),
        ('"q"x,a,b,c,d,A\n', "expected after"),
        ("q\xff,a,b,c,d,A\n", "utf-8"),
    ],
)
def test_bad_row_is_named_by_its_line(bad, why, tmp_path):
    """What is no row of MMLU's format is refused with file and line, that where the row begins."""
    path = tmp_path / "x_test.csv"
    path.write_bytes(ROWS.encode() + bad.encode("latin-1"))
    line = error_line(read_questions, path)
    assert (
        why in line
        and str(path) in line
        and (why == "utf-8" or ("line 8" in line and "give MMLU's CSV" in line))
    ), line


def ask(tmp_path, *, n=99, length=3000, seed=0, tok=None, **options) -> MultipleChoice:
    return multiple_choice(tok or ByteTokenizer(), length, n, seed, 16, **options)


def test_examples_come_first_and_are_not_asked(tmp_path):
    """The first rows of the file are shown, in order, before every other one, which is asked; the
    prompt ends where the letter follows."""
    task = ask(
        tmp_path, questions=questions(tmp_path / "q", high_tea_test=rows_of("tea", 11)), shots=5
    )
    head = "The following are multiple choice questions (with answers) about high tea.\n\n"
    shown = "".join(
        f"tea {i}?\nA. teaa{i}\nB. teab\nC. teac\nD. tead\nAnswer: {'ABCD'[i % 4]}\n\n"
        for i in range(5)
    )
    texts = {read(task, i): a for i, a in enumerate(task.answers)}
    assert texts == {
        f"{head}{shown}tea {i}?\nA. teaa{i}\nB. teab\nC. teac\nD. tead\nAnswer: ": (
            i % 4,
            [65, 66, 67, 68],
        )
        for i in range(5, 11)
    }
    assert (task.n, task.metric, task.name, task.query) == (6, "accuracy", "multiple_choice", 16)


def test_examples_of_the_same_subject_from_elsewhere(tmp_path):
    """With --shots_from every row is asked, each after the examples of its own subject, from folder
    to folder or from file to file; the questions are drawn by the seed."""
    test = questions(tmp_path / "test", tea_test=rows_of("tea", 7), ink_test=rows_of("ink", 5))
    dev = questions(
        tmp_path / "dev",
        tea_dev=rows_of("oldtea", 3),
        ink_dev=rows_of("oldink", 3),
        other_dev="rubbish",
    )
    task = ask(tmp_path, questions=test, shots_from=dev, shots=2)
    assert task.n == 12
    for i in range(12):
        *shown, asked = re.findall(r"(\w+ \d+)\?", read(task, i))
        topic = asked.split()[0]
        assert shown == [f"old{topic} 0", f"old{topic} 1"] and f"about {topic}." in read(task, i)
    same, other, few = (
        ask(tmp_path, questions=test, shots_from=dev, shots=2, **k)
        for k in ({}, {"seed": 1}, {"n": 4})
    )
    assert (
        same.prompts == task.prompts != other.prompts
        and sorted(other.prompts) == sorted(task.prompts)
        and few.prompts == task.prompts[:4]
    )
    one = ask(tmp_path, questions=f"{test}/tea_test.csv", shots_from=f"{dev}/ink_dev.csv", shots=1)
    assert one.n == 7 and all("oldink 0" in read(one, i) for i in range(7))
    assert (
        ask(tmp_path, questions=f"{test}/tea_test.csv", shots_from=dev, shots=1).n == 7
        and ask(tmp_path, questions=test, shots=0).n == 12
    )


def test_long_prompts_lose_their_last_examples(tmp_path):
    """Where five examples do not fit, as many of the first as do are shown; a question that does
    not fit alone is named."""
    file = f"{questions(tmp_path, x=rows_of('tea', 12))}/x.csv"
    for length in (200, 150, 300):
        task = ask(tmp_path, questions=file, length=length)
        for i in range(task.n):
            *shown, _ = re.findall(r"tea (\d+)\?", read(task, i))
            assert (
                shown == [str(j) for j in range(len(shown))]
                and len(task.prompts[i]) <= length < len(task.prompts[i]) + 50
            )
    line = error_line(ask, tmp_path, questions=file, length=70)
    assert "line " in line and "larger --block_size" in line


class Swap(ByteTokenizer):
    """The letters A to D are spelled in another way."""

    def __init__(self, how):
        self.how = how

    def encode(self, text: str) -> list[int]:
        return super().encode(re.sub("[A-D]", lambda m: self.how(m[0]), text))


def test_multiple_choice_refusals(tmp_path):
    """Files, folders and subjects that are not there, too few rows, letters that are no single
    tokens: one line each."""
    a = questions(tmp_path / "a", tea_test=rows_of("tea", 3))
    b = questions(tmp_path / "b", ink_dev=rows_of("ink", 3))
    (tmp_path / "none").mkdir()
    for options, why in (
        (dict(questions=f"{a}/no.csv"), "no such file"),
        (dict(questions=str(tmp_path / "none")), "no .csv file"),
        (dict(questions=a, shots_from=b), "it has no file of tea"),
        (dict(questions=a, shots=4), "has 3 rows"),
        (dict(questions=a, shots=3), "no question is left"),
        (dict(questions=questions(tmp_path / "e", e="\n")), "no question in it"),
        (dict(questions=a, shots_from="gone"), "no such file"),
        *(
            (dict(questions=a, shots=1, tok=Swap(how)), "distinct single tokens")
            for how in (lambda c: "?", lambda c: c + "-", lambda c: c + c)
        ),
    ):
        assert why in error_line(ask, tmp_path, **options)


def test_choice_is_the_largest_of_four_logits(tmp_path):
    """Right, wrong, another letter's logit that is larger but none of the four, and equal logits,
    where A is taken; any batch."""
    answers = "ABBDAC"
    task = ask(tmp_path, questions=questions(tmp_path, x=rows_of("tea", 13, answers)), shots=1)
    right = {f"tea {i}": answers[i % 6] for i in range(13)}

    def solved(text):
        return right[re.findall(r"(tea \d+)\?", text)[-1]]

    share = sum(v == "A" for v in list(right.values())[1:]) / 12
    for answer, value in (
        (solved, 1),
        (lambda t: chr(65 + (ord(solved(t)) - 64) % 4), 0),
        (lambda t: "Z", share),
        (lambda t: "", share),
    ):
        assert [task.value(Reader(answer), n, "float32") for n in (1, 5, 12)] == [
            pytest.approx(value)
        ] * 3


# ----------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory, text) -> Path:
    """A pretrained stage with a context of 800 bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(
            folder / "run",
            text,
            "--block_size=800",
            "--pretrain_steps=2",
            "--pretrain_batch_size=2",
            "--eval_sequences=1",
        )


def test_eval_of_every_task(byte_model, text, tmp_path):
    """The program as a user runs it: all five tasks, dense and compressed; rows, and a table for
    each task under its own metric."""
    csv = questions(tmp_path / "q", x_test=rows_of("tea", 8))
    names = {
        "perplexity": "perplexity",
        "continuation": "loss",
        "needle": "accuracy",
        "variable_tracking": "recall",
        "multiple_choice": "accuracy",
    }
    p = python(
        "eval.py",
        f"--init_from={byte_model}",
        f"--dataset={text}",
        f"--tasks={','.join(names)}",
        "--methods=dense,value_groups",
        "--sequences=3",
        "--calibration=2",
        "--batch_size=2",
        "--hops=1",
        "--distractors=2",
        f"--questions={csv}",
        "--shots=2",
        f"--results={tmp_path / 'r'}",
        "--device=cpu",
        "--continuation=8",
    )
    assert p.returncode == 0, p.err
    rows = json.loads(p.out.splitlines()[-1])
    assert [(r["task"], r["metric"], r["method"]) for r in rows] == [
        (t, m, k) for k in ("dense", "value_groups") for t, m in names.items()
    ]
    for r in rows:
        assert (
            r["n"]
            == (3 if r["task"] in ("needle", "variable_tracking", "multiple_choice") else r["n"])
            and r["seconds"] >= 0
        )
        assert r["prefill"] == (
            "routed" if (r["task"], r["method"]) == ("perplexity", "value_groups") else "exact"
        )
        assert r["metric"] not in ("accuracy", "recall") or (
            0 <= r["value"] <= 1 and 0 <= r["dense_value"] <= 1
        )
    about = (ByteTokenizer(), 800, 3, 0, 16)
    for r, task in zip(
        rows[7:9], (needle(*about, 2), variable_tracking(*about, 1, 1)), strict=True
    ):
        T = task.stored.size(1)
        assert (
            r["kv_kept_layers"] == pytest.approx((1 + ((T - 16) / 2 + 16) / T) / 2)
            and r["cache_bytes"] < r["dense_bytes"]
        )
        assert r["dense_bytes"] == 3 * T * 2 * 4 * 2 * 16 * 2
    said, table = re.split(r"\n(?=\w+\nrow +trainable)", p.err, maxsplit=1)
    assert "val: 1 sequences, all there are, not 3\n" in said  # of perplexity
    blocks = table.split("\n\n")
    assert len(blocks) == 5
    for b, (t, m) in zip(blocks, names.items(), strict=True):
        assert b.startswith(f"{t}\nrow ") and m in b.splitlines()[1].split()
    assert all(len(b.splitlines()) - 2 - 2 * (b is blocks[-1]) in (1, 2) for b in blocks)


def test_tasks_that_make_their_text_read_no_corpus(byte_model, text, tmp_path, monkeypatch):
    """Dense or trained models need no corpus for them; untrained value groups are calibrated on the
    training split, or on --calibrate."""
    asked = []
    prepare = evaluation.prepare_splits

    def noted(corpus, data, tok, splits):
        asked.append((corpus, *splits))
        return prepare(corpus, data, tok, splits)

    monkeypatch.setattr(evaluation, "prepare_splits", noted)

    def rows(**cfg):
        asked.clear()
        cfg = (
            dict(
                tasks="needle",
                sequences=2,
                calibration=2,
                device="cpu",
                block_size=250,
                dataset="text:gone",
            )
            | cfg
        )
        return evaluation.evaluate(load_run(byte_model), Asked(eval=EvalConfig(**cfg)))

    assert rows()[0][0]["task"] == "needle" and asked == []
    got, shown = rows(methods="value_groups", dataset=text, split="all")
    assert asked == [(text, "train")] and shown.masks.shape[1] == needle(
        ByteTokenizer(), 250, 2, 0, 16
    ).stored.size(1)
    rows(methods="value_groups", dataset="", calibrate=text)
    assert asked == [(text, "all")]
    rows(tasks="needle,perplexity", dataset=text)
    assert asked == [(text, "val")]
    for key, value in (("seed", 1), ("query", 30), ("distractors", 1)):
        other = rows(methods="value_groups", dataset=text, **{"block_size": 350, key: value})[0][0]
        assert (
            other["kv_kept_layers"] > got[0]["kv_kept_layers"]
            if key == "query"
            else other["n"] == 2
        )


def test_eval_of_recall(byte_model, tmp_path):
    """eval.py's rows of facts and passages, dense and compressed: their names say what is asked,
    copying alone names its text, and n counts the questions."""
    (tmp_path / "days.txt").write_text("\n".join(corpus(ByteTokenizer())[1]))
    text = f"text:{tmp_path / 'days.txt'}"
    asked = dict(question="unseen", needles=2, answer="number", distractors=1)
    common = dict(sequences=2, calibration=2, device="cpu", block_size=450, dataset=text)
    cfg = EvalConfig(tasks="needle,copy", methods="dense,value_groups", **asked, **common)
    rows, _ = evaluation.evaluate(load_run(byte_model), Asked(eval=cfg))
    names = ["needle_unseen_number_x2", "copy_unseen"]
    assert [(r["task"], r["n"], r["method"]) for r in rows] == [
        (name, n, method)
        for method in ("dense", "value_groups")
        for name, n in zip(names, (4, 2), strict=True)
    ]
    assert [("text" in r, r["prefill"]) for r in rows] == [(False, "exact"), (True, "exact")] * 2
    assert all(0 <= r["value"] <= 1 and r["metric"] == "accuracy" for r in rows)
    made = needles(ByteTokenizer(), 450, 2, 0, 16, 1, "unseen", 2, "number")
    dense = 2 * made.stored.size(1) * 2 * 16 * 2
    assert rows[0]["dense_bytes"] % dense == 0 and rows[2]["cache_bytes"] < rows[2]["dense_bytes"]


@pytest.mark.parametrize(
    "flags, why",
    [
        (dict(tasks="perplexity", needles=2), "give --tasks=needle"),
        (dict(tasks="copy", answer="name"), "give --tasks=needle"),
        (dict(tasks="variable_tracking", question="unseen"), "asked by needle, copy and zero_shot"),
        (dict(tasks="needle", needles=7, distractors=3), "at most 9"),
        (dict(tasks="needle", needles=30, distractors=3, answer="name"), "at most 32"),
        (dict(tasks="needle", needles=33), "needles=33"),
        (dict(tasks="needle", question="later"), "question='later'"),
    ],
)
def test_recall_flags_are_refused(flags, why):
    """Flags of a task that is not asked for, and more facts than there are names or values."""
    assert why in error_line(EvalConfig, **flags)


def test_table_names_each_metric():
    """Rows of one task make one table, with its metric at the head of the column; rows of several
    one table each."""
    row = dict(
        method="dense",
        basis="native",
        n_groups=1,
        value_keep=1.0,
        token_keep=1.0,
        trainable_parameters=0,
        kv_kept_layers=1,
        kv_kept_model=1,
        cache_bytes=8,
        dense_bytes=8,
        value=0.5,
        dense_value=0.5,
    )
    a = row | dict(task="needle", metric="accuracy")
    b = row | dict(task="variable_tracking", metric="recall")
    both = result_table([a, b, a | dict(value=0.7)]).split("\n\n")
    assert both == [
        "needle\n" + result_table([a, a | dict(value=0.7)]),
        "variable_tracking\n" + result_table([b]),
    ]
    assert (
        "accuracy" in both[0]
        and "recall" not in both[0]
        and result_table([b]).startswith("row ")
        and "0.6000 +- 0.1414" in both[0]
    )


def test_wrong_questions_are_refused_before_anything_is_measured(byte_model, tmp_path, monkeypatch):
    """A bad file, and a context too short for a prompt, end eval.py with one line and no row."""
    monkeypatch.setattr(evaluation, "whole_rows", lambda *a, **k: pytest.fail("measured"))
    flags = [f"--init_from={byte_model}", "--sequences=2", f"--results={tmp_path / 'r'}"]
    (tmp_path / "bad.csv").write_text("a,b\n")
    for more, why in (
        (["--tasks=needle,multiple_choice", f"--questions={tmp_path / 'bad.csv'}"], "line 1"),
        (["--tasks=needle", "--block_size=60"], "larger --block_size"),
        (
            ["--tasks=variable_tracking", "--chains=30"],
            "fewer --needles, --distractors, --chains or --hops",
        ),
    ):
        assert why in error_line(call, evaluation, *flags, *more)
    assert not (tmp_path / "r").exists()


@needs_smol
def test_smollm2_finds_the_needle():
    """The real SmolLM2-135M with whole values, 140 tokens: the prompt is one that a base model
    answers; one digit in nine is chance."""
    run = smol()
    task = needle(run.tokenizer, 140, 5, 0, 16)
    assert task.value(run.model, 5, "float32") >= 0.8
