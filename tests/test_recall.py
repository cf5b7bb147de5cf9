"""Facts and passages that recall asks for: said once before what stays whole, asked with the same
tokens as generation reads, scored by a model that answers right, wrong or not at all."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answering import Reader, check_filler, corpus, read, tokenizer
from helpers import TINY, error_line, grouped_model
from test_eval import ContextOracle

import kv_router
from loaders.tokenizer import ByteTokenizer
from tasks.prompts import FILLER, NEEDLE_ROOM
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
