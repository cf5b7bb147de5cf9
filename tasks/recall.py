"""Recall of what stood in a context that was compressed before anything was asked of it: named
facts (needles) and passages to be copied.

A context, its last `query` tokens whole, is processed and compressed once. Then every question in
its own turn is read token by token from what is kept, as generated tokens are, and each turn starts
from the same cache. With question=seen the question is a part of what is compressed, as for the
needle of tasks/prompts.py, and only its last token reads the cache; the contexts are the same.

A context is made of the seed and its own index alone, of whole sentences (of a corpus, for copying:
sentences or lines); what is asked for never lies in its last `query` tokens.

    python eval.py --init_from=model.gguf --tasks=needle,copy --question=unseen --needles=4 \\
        --answer=number --block_size=600 --methods=dense,value_groups
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from data import TokenFile, batch
from loaders.tokenizer import encoded
from model import Transformer
from selector import with_oracle
from settings.fields import check
from storage.cache import KVCache
from tasks.common import Prompts, decoded
from tasks.prompts import FILLER, NEEDLE_ROOM, PLACES, haystack, number_question
from tasks.text import Text

NAME_LIST = (
    "Abigail Adrian Agnes Albert Alice Amelia Arthur Barbara Bernard Brian Caroline Clara Daniel "
    "Dorothy Edward Eleanor Emily Felix George Hannah Harold Helen Henry Isaac Julia Kenneth Laura "
    "Leonard Margaret Martha Oliver Oscar Patrick Philip Rachel Rebecca Robert Samuel Simon Sophie "
    "Stephen Susan Thomas Ursula Victor Walter William Yvonne"
)
NAMES = tuple(NAME_LIST.split())
ROLE_LIST = (
    "astronomer banker barber beekeeper blacksmith butcher captain chemist colonel cook dentist "
    "detective drummer gardener geologist jockey judge lawyer librarian mayor nurse organist "
    "painter pilot plumber poet sculptor sheriff surgeon trumpeter violinist waiter"
)
ROLES = tuple(ROLE_LIST.split())  # whose names are asked for
THING_LIST = (
    "account cabin coach elevator engine flight garage hangar hotel invoice kiosk license locker "
    "membership meter parcel passport patent phone platform radio safe shelf studio taxi tower "
    "ticket track tram vault warehouse workshop"
)
THINGS = tuple(THING_LIST.split())  # whose numbers are asked for
# What an answer looks like in the text that is generated: the first match counts.
SHAPE = {"digit": "[0-9]", "number": "[0-9]+", "name": "[A-Za-z]+"}

COPIED = 16  # tokens of a passage that are to be copied
CUE = re.compile(r"\S+(?:\s+\S+){9}")  # what is given of it: ten words
COPY_ROOM = 80  # tokens for both
TRIES = 50  # windows drawn for one context until there is such a passage
SENTENCE_START = re.compile(r"(?<=[.!?])[ \t]+(?=\S)|\n\s*(?=\S)")  # lines are sentences, too


# ----------------------------------------------------------------------------- asking


def read_on(
    model: Transformer, cache: KVCache, given: list[list[int]], n_tokens: int
) -> list[list[int]]:
    """Read n_tokens tokens of every sequence one by one, those given and then, greedily, those
    predicted, each stored as a generated token is. Return the likeliest token after each: n_tokens
    of every row. Ties: the lower id.

    given: ids of B questions, each of 1 to n_tokens tokens"""
    device = model.norm.weight.device
    lengths = torch.tensor([len(row) for row in given], device=device)  # (B,)
    padded = [row + [0] * (n_tokens - len(row)) for row in given]
    known = torch.tensor(padded, device=device)  # (B, n_tokens)
    tokens = known[:, 0]
    predicted = []
    for step in range(1, n_tokens + 1):
        logits = model.decode(tokens[:, None], cache)[:, -1]
        predicted.append(logits.argmax(-1))
        if step < n_tokens:
            tokens = torch.where(step < lengths, known[:, step], predicted[-1])
    return torch.stack(predicted, 1).tolist()


class Turn(NamedTuple):
    """A question's ids, and what is right after it."""

    question: list[int]
    answer: object


@dataclass(frozen=True)
class Recall(Prompts):
    """Prompts, here what is compressed, each with as many questions (answers: Turns); the value is
    the mean score of the questions.

    name: as it is printed
    room: tokens after a question that are scored

    A subclass scores those tokens: score(ids, answer). It may give the right tokens while it reads
    on: given(turn)."""

    name: str
    room: int
    metric = "accuracy"

    @property
    def n(self) -> int:
        return sum(map(len, self.answers))

    def scores(
        self, model: Transformer, prompts: list[list[int]], answers: list[list[Turn]]
    ) -> list[float]:
        """Return the mean score of every prompt's questions."""
        longest = max(len(turn.question) for turns in answers for turn in turns)
        _, cache = compressed(model, prompts, longest + self.room)
        before = cache.snapshot()
        scores = []
        for turns in zip(*answers, strict=True):
            cache.restore(before)
            scores.append(self.turn_scores(model, cache, turns))
        return [mean(of_prompt) for of_prompt in zip(*scores, strict=True)]

    def turn_scores(
        self, model: Transformer, cache: KVCache, turns: tuple[Turn, ...]
    ) -> list[float]:
        """Ask every sequence of the cache its question."""
        longest = max(len(turn.question) for turn in turns)
        given = [self.given(turn) for turn in turns]
        read = read_on(model, cache, given, longest + self.room - 1)
        scores = []
        for ids, turn in zip(read, turns, strict=True):
            start = len(turn.question) - 1
            scores.append(self.score(ids[start : start + self.room], turn.answer))
        return scores

    def given(self, turn: Turn) -> list[int]:
        return turn.question


def compressed(model: Transformer, prompts: list[list[int]], more: int) -> tuple[Tensor, KVCache]:
    """Process prompts of any lengths, padded on the left: logits (B, 1, vocab) after them, and
    the cache that holds them, with room for `more` tokens."""
    T = max(map(len, prompts))
    device = model.norm.weight.device
    idx = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)  # (B, T)
    pad = torch.tensor([T - len(p) for p in prompts], device=device)
    n_pad = pad if pad.any() else None
    cache = model.new_cache(len(prompts), T + more)
    with with_oracle(model, idx, T, n_pad):
        logits = model.prefill(idx, cache, n_pad)
    return logits, cache


def arranged(
    contexts: list[list[int]], turns: list[list[Turn]], question: str
) -> tuple[list[list[int]], list[list[Turn]]]:
    """Return what is compressed, and the Turns that follow each. unseen: every context once, then
    all of its questions. seen: a context anew for every question, which stands behind it but for
    its last token."""
    if question == "unseen":
        return contexts, turns
    prompts = []
    follow = []
    for context, of_context in zip(contexts, turns, strict=True):
        for turn in of_context:
            prompts.append(context + turn.question[:-1])
            follow.append([Turn(turn.question[-1:], turn.answer)])
    return prompts, follow


# ----------------------------------------------------------------------------- needles


@dataclass(frozen=True)
class Facts(Recall):
    """Share of questions whose answer (a string) is the first digit, number or word (kind) that is
    generated."""

    kind: str

    def score(self, ids: list[int], answer: str) -> float:
        """Score greedily generated ids, what follows the end token left out."""
        if self.tokenizer.eot in ids:
            ids = ids[: ids.index(self.tokenizer.eot)]
        found = re.search(SHAPE[self.kind], decoded(self.tokenizer, ids))
        return float(found is not None and found[0] == answer)


def needles(
    tokenizer,
    length: int,
    n: int,
    seed: int,
    query: int,
    distractors: int = 0,
    question: str = "unseen",
    asked: int = 1,
    kind: str = "digit",
) -> Facts:
    """Make n contexts of at most `length` tokens, the longest question and its answer included,
    with asked + distractors facts in them, of which `asked` are asked for.

    question: seen or unseen
    kind: what the values are: digit (1 to 9), number (of five digits) or name

    No two facts of a context share a value. ValueError where there are not as many."""
    facts = asked + distractors
    contexts = []
    turns = []
    room = NEEDLE_ROOM + longest_question(tokenizer, kind, facts)
    for i in range(n):
        rng = random.Random(f"needles {seed} {i} {kind} {asked} {distractors}")
        values = draw_values(rng, kind, facts)
        keys = draw_keys(rng, kind, facts)
        named = list(zip(keys, values, strict=True))
        said = [f"The {key} is {value}." for key, value in named]
        rng.shuffle(said)
        depths = sorted(rng.random() for _ in said)
        after = closing(tokenizer, rng, query)
        contexts.append(haystack(tokenizer, rng, "", said, depths, after, length - room))
        ends = [Turn(tokenizer.encode(question_for(key)), value) for key, value in named]
        turns.append(ends[:asked])
    prompts, follow = arranged(contexts, turns, question)
    name = task_name("needle", question, kind, asked)
    return Facts(prompts, follow, query, tokenizer, name, NEEDLE_ROOM, kind)


def task_name(task: str, question: str, kind: str = "digit", asked: int = 1) -> str:
    """Return what a row is called: the task, and what is not as usual."""
    words = [task]
    if question == "unseen":
        words.append("unseen")
    if kind != "digit":
        words.append(kind)
    if asked > 1:
        words.append(f"x{asked}")
    return "_".join(words)


def draw_values(rng: random.Random, kind: str, n: int) -> list[str]:
    """Draw n different values."""
    choices = {"digit": range(1, 10), "number": range(10_000, 100_000), "name": NAMES}[kind]
    check(
        n <= len(choices),
        f"{n} facts with answer={kind}",
        f"there are {len(choices)} different ones",
        "give fewer --needles or --distractors, or --answer=number",
    )
    return [str(value) for value in rng.sample(choices, n)]


def draw_keys(rng: random.Random, kind: str, n: int) -> list[str]:
    """Draw what the values are called, in the order in which they are asked for; one alone is not
    told from others."""
    if n == 1:
        return ["magic name" if kind == "name" else "magic number"]
    if kind == "name":
        return rng.sample(ROLES, n)
    if kind == "number":
        return [f"{thing} number" for thing in rng.sample(THINGS, n)]
    return [f"lucky number of {place}" for place in rng.sample(PLACES, n)]


def question_for(key: str) -> str:
    """Return the question for a value, with the beginning of its fact. Names and numbers among
    others are found best by a small model where that beginning stands alone."""
    if key.startswith(("magic", "lucky")):
        return number_question(key)
    return f"\n\nThe {key} is"


def longest_question(tokenizer, kind: str, n: int) -> int:
    """Count the tokens of the longest question that draw_keys may lead to."""
    named = {"digit": PLACES, "number": THINGS, "name": ROLES}[kind]
    n_keys = 1 if n == 1 else len(named)  # all of them, in some order
    keys = draw_keys(random.Random(0), kind, n_keys)
    return max(len(tokenizer.encode(question_for(key))) for key in keys)


def closing(tokenizer, rng: random.Random, n_tokens: int) -> str:
    """Draw whole sentences, at least n_tokens together, that end a context: what is never
    compressed holds no fact."""
    text = ""
    while len(tokenizer.encode(text)) < n_tokens:
        text += " " + rng.choice(FILLER)
    return text


# ----------------------------------------------------------------------------- copying


@dataclass(frozen=True)
class Copied(Recall):
    """Mean share of the next COPIED tokens of a passage (answer: their ids) that are right: that
    are the likeliest ones after the passage's own tokens before them (teacher forcing).

    text: what rows say of the text it comes from"""

    text: dict | None = None

    def given(self, turn: Turn) -> list[int]:
        return turn.question + turn.answer[:-1]

    def score(self, ids: list[int], answer: list[int]) -> float:
        return mean(float(a == b) for a, b in zip(ids, answer, strict=True))


def copying(
    tokenizer,
    length: int,
    n: int,
    seed: int,
    query: int,
    text: Text,
    question: str = "unseen",
) -> Copied:
    """Draw n contexts of a text, of at most `length` tokens, what is asked included, and ask each
    for a passage of it: after an empty line stand the first ten words of a sentence or line, which
    occur once, and what follows them is to be copied.

    ValueError where a context that has such a passage before its last `query` tokens is not found
    among TRIES windows."""
    contexts = []
    turns = []
    for i in range(n):
        context, turn = drawn_passage(tokenizer, text.tokens, length - COPY_ROOM, seed, i, query)
        contexts.append(context)
        turns.append([turn])
    prompts, follow = arranged(contexts, turns, question)
    name = task_name("copy", question)
    return Copied(prompts, follow, query, tokenizer, name, COPIED, text.about)


def drawn_passage(
    tokenizer, text: TokenFile, budget: int, seed: int, i: int, query: int
) -> tuple[list[int], Turn]:
    """Draw the i-th context of at most `budget` tokens, and what is asked of it."""
    least = COPIED + query
    check(
        budget > least,
        f"{budget} tokens for a text to copy from",
        f"{COPIED} of a passage and query={query} after them must fit",
        "give a larger --block_size",
    )
    rng = random.Random(f"copy {seed} {i}")
    for attempt in range(TRIES):
        window, _ = batch(text, f"copy {i}", seed, attempt, 1, budget)
        context = whole_sentences(tokenizer, window[0].tolist())
        ids = encoded(tokenizer, context)
        if len(ids) > budget:
            continue  # a text that begins elsewhere may be cut into more tokens
        starts = [0, *(found.end() for found in SENTENCE_START.finditer(context))]
        for start in rng.sample(starts, len(starts)):
            turn = passage(tokenizer, context, start, least)
            if turn is not None:
                return ids, turn
    raise ValueError(
        f"copy from {budget} tokens of text: no passage of {COPIED} tokens after words that occur "
        f"once in {TRIES} windows; give a larger --block_size, or another --dataset"
    )


def whole_sentences(tokenizer, ids: list[int]) -> str:
    """Return the text of a window without what is cut at both ends, "" where that is all; between
    two documents stands an empty line."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.eot:
            documents.append([])
        elif token != tokenizer.bos:
            documents[-1].append(token)
    text = "\n\n".join(tokenizer.decode(document) for document in documents)
    starts = list(SENTENCE_START.finditer(text))
    if len(starts) < 2:
        return ""
    return text[starts[0].end() : starts[-1].start()].rstrip()


def passage(tokenizer, context: str, start: int, least: int) -> Turn | None:
    """Ask for what stands at context[start:], or return None: where the first words stand elsewhere
    too, are long, or are followed by fewer than `least` tokens."""
    cue = CUE.match(context, start)
    if cue is None or context.count(cue[0]) > 1:
        return None
    ids = tokenizer.encode("\n\n" + context[start:])
    # the cue's last token may be another one where the passage goes on
    question = []
    for token, of_cue in zip(ids, tokenizer.encode("\n\n" + cue[0]), strict=False):
        if token != of_cue:
            break
        question.append(token)
    answer = ids[len(question) : len(question) + COPIED]
    if len(question) + COPIED > COPY_ROOM or len(ids) - len(question) < least:
        return None
    return Turn(question, answer)
