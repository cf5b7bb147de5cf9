"""RULER's other tasks (arXiv 2404.06654), beside the needle and variable tracking of
tasks/prompts.py: needles of which several are asked for, and words to be counted.

multi_key     KEYS numbers of as many places, one of them is asked for
multi_value   one place has VALUES numbers, all are asked for
multi_query   KEYS numbers of as many places, all are asked for at once
common_words  a numbered list in which COMMON words stand more often than all others
frequent_words  made-up words whose frequencies fall with a power of their rank; the first is noise

The score is the share of the expected strings that occur in what is generated, in any case of
letters. Texts are of any length and tokenizer, made of the seed and their own index alone.

    python eval.py --init_from=model.gguf --tasks=multi_key,common_words --block_size=2048 \\
        --sequences=100 --methods=dense,value_groups
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from loaders.tokenizer import encoded
from settings.fields import check
from tasks.common import Generated
from tasks.prompts import FILLER, PLACES, haystack

KEYS = 4
VALUES = 4
NUMBER_ROOM = 12  # tokens for a number of seven digits and what stands around it
COMMON = 10  # words that are asked for
# How often a common word stands, and any other: in short lists and in those of more than LONG.
SHORT_COUNTS = (10, 3)
LONG_COUNTS = (30, 3)
LONG = 4096  # tokens
FREQUENT = 3  # made-up words that are asked for
POWER = 2.0  # of the rank, by which frequencies of made-up words fall
CODED = 6  # letters of a made-up word
VOCABULARY = 200  # of them
WORD_ROOM = 12  # tokens for a word and what stands around it
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
SAID = {w for s in FILLER for w in re.findall("[a-z]{4,}", s)}
PLAIN_WORDS = sorted(w for w in SAID if not any(w in other for other in SAID - {w}))


@dataclass(frozen=True)
class Found(Generated):
    """Mean share of the strings (answer) that occur in the generated text, whatever the case."""

    name: str
    metric = "recall"

    @staticmethod
    def score(text: str, answer: list[str]) -> float:
        return sum(a.lower() in text.lower() for a in answer) / len(answer)


Maker = Callable[[object, random.Random, int], tuple[list[int], list[str]]]


def ruler(name: str, tokenizer, length: int, n: int, seed: int, query: int) -> Found:
    """Make n texts of a task in MAKERS, of at most `length` tokens, the room for the answer
    included. ValueError where none fits."""
    make, room = MAKERS[name]
    prompts = []
    answers = []
    for i in range(n):
        ids, answer = make(tokenizer, random.Random(f"{name} {seed} {i}"), length - room)
        prompts.append(ids)
        answers.append(answer)
    return Found(prompts, answers, query, tokenizer, room, name)


# ----------------------------------------------------------------------------- needles


def numbers_of(rng: random.Random, n: int) -> list[str]:
    """Draw different numbers of seven digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), n)]


def in_haystack(
    tokenizer, rng: random.Random, said: list[tuple[str, str]], question: str, budget: int
) -> list[int]:
    """Hide (place, number) pairs in filler, in any order, before a question."""
    facts = [f"A secret number of {place} is {number}." for place, number in said]
    rng.shuffle(facts)
    depths = sorted(rng.random() for _ in facts)
    return haystack(tokenizer, rng, "", facts, depths, question, budget)


def multi_key(tokenizer, rng: random.Random, budget: int) -> tuple[list[int], list[str]]:
    """One number of several places is asked for."""
    said = list(zip(rng.sample(PLACES, KEYS), numbers_of(rng, KEYS), strict=True))
    place, number = said[0]
    question = f"\n\nWhat is the secret number of {place}? The secret number of {place} is"
    return in_haystack(tokenizer, rng, said, question, budget), [number]


def multi_value(tokenizer, rng: random.Random, budget: int) -> tuple[list[int], list[str]]:
    """All numbers of one place are asked for."""
    place = rng.choice(PLACES)
    numbers = numbers_of(rng, VALUES)
    question = (
        f"\n\nWhat are all the secret numbers of {place}? "
        f"The {VALUES} secret numbers of {place} are"
    )
    said = [(place, number) for number in numbers]
    return in_haystack(tokenizer, rng, said, question, budget), numbers


def multi_query(tokenizer, rng: random.Random, budget: int) -> tuple[list[int], list[str]]:
    """The numbers of all places are asked for at once."""
    places = rng.sample(PLACES, KEYS)
    numbers = numbers_of(rng, KEYS)
    named = f"{', '.join(places[:-1])} and {places[-1]}"
    question = (
        f"\n\nWhat are the secret numbers of {named}? The secret numbers of {named}, in order, are"
    )
    said = list(zip(places, numbers, strict=True))
    return in_haystack(tokenizer, rng, said, question, budget), numbers


# ----------------------------------------------------------------------------- words


def largest(build: Callable[[int], list[int]], budget: int, least: int, what: str) -> list[int]:
    """Return the ids of the largest build(n), n >= least, found by halving, that has at most
    `budget` tokens. ValueError where the least has more."""
    ids = build(least)
    check(
        len(ids) <= budget,
        f"{budget} tokens for {what}",
        f"{len(ids)} are needed",
        "give a larger --block_size",
    )
    low = least  # fits
    high = 2 * least
    while len(built := build(high)) <= budget:
        ids = built
        low = high
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        built = build(middle)
        if len(built) <= budget:
            ids = built
            low = middle
        else:
            high = middle
    return ids


def word_list(rng: random.Random, n: int) -> list[str]:
    """Draw n different words: those of the filler, and where they do not last, of syllables."""
    drawn = dict.fromkeys(rng.sample(PLAIN_WORDS, len(PLAIN_WORDS)))
    while len(drawn) < n:
        drawn["".join(rng.choices(SYLLABLES, k=3))] = None
    return list(drawn)[:n]


def numbered(rng: random.Random, common: list[str], others: list[str], counts) -> str:
    """List words, the common ones counts[0] times, the others counts[1] times, in any order."""
    listed = [w for w in common for _ in range(counts[0])]
    listed += [w for w in others for _ in range(counts[1])]
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


def common_question(words: list[str]) -> str:
    """Ask for the common words, with the beginning of the answer."""
    return (
        f"\nQuestion: Which {len(words)} words stand most often in this list?\n"
        f"Answer: The {len(words)} words that stand most often are:"
    )


def common_words(tokenizer, rng: random.Random, budget: int) -> tuple[list[int], list[str]]:
    """A worked example of a short list, then a list as long as fits."""
    intro = "Below is a numbered list of words. Some of them stand in it more often.\n"
    seed = rng.random()
    counts = SHORT_COUNTS if budget <= LONG else LONG_COUNTS
    words = word_list(rng, 2 * COMMON)
    shown = words[:COMMON]
    common = words[COMMON:]
    example = numbered(rng, shown, [], (2, 0))
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(shown, 1))
    before = f"{intro}{example}{common_question(shown)} {answer}\n\n{intro}"

    def build(n: int) -> list[int]:
        again = random.Random(f"{seed} {n}")
        others = [w for w in word_list(again, n + 2 * COMMON) if w not in words][:n]
        text = numbered(again, common, others, counts)
        return encoded(tokenizer, before + text + common_question(common))

    return largest(build, budget, 1, "a list of words"), common


def frequent_words(tokenizer, rng: random.Random, budget: int) -> tuple[list[int], list[str]]:
    """Made-up words, as many as fit; the word of the first rank is ... and is not asked for."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    drawn: dict[str, None] = {}
    while len(drawn) < VOCABULARY:
        drawn["".join(rng.choices(letters, k=CODED))] = None
    words = ["...", *drawn]
    weights = [rank**-POWER for rank in range(1, len(words) + 1)]
    seed = rng.random()
    question = (
        "\nQuestion: Which three coded words stand most often in this text? Dots are left out.\n"
        "Answer: The three coded words that stand most often are:"
    )

    def build(n: int) -> list[int]:
        counts = [round(n * weight / sum(weights)) for weight in weights]
        listed = [w for w, count in zip(words, counts, strict=True) for _ in range(count)]
        random.Random(f"{seed} {n}").shuffle(listed)
        before = "Below is a coded text. Count how often each coded word stands in it.\n"
        return encoded(tokenizer, before + " ".join(listed) + question)

    # from so many on no two of the first five are equally frequent
    return largest(build, budget, 80, "a coded text"), words[1 : 1 + FREQUENT]


MAKERS: dict[str, tuple[Maker, int]] = {
    "multi_key": (multi_key, NUMBER_ROOM),
    "multi_value": (multi_value, VALUES * NUMBER_ROOM),
    "multi_query": (multi_query, KEYS * NUMBER_ROOM),
    "common_words": (common_words, COMMON * WORD_ROOM),
    "frequent_words": (frequent_words, FREQUENT * WORD_ROOM),
}
