"""Prompts made here whose answer is known: a needle in a haystack (ST 4.3), one digit said once in
filler text and asked for at the end, and variable tracking (RULER, arXiv 2404.06654), chains of
assignments scattered in order through filler: which variables hold a value?

The last token of a prompt reads the cache that the others have left (`ThroughCache`). A prompt is
made of the seed and its own index alone; whole sentences are added until the budget of tokens is
reached, and nothing is ever cut.

    python eval.py --init_from=model.gguf --tasks=needle,variable_tracking --block_size=2048 \\
        --sequences=200 --methods=dense,value_groups
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from loaders.device import autocast
from loaders.tokenizer import encode_after, encoded
from model import Transformer, evaluating
from settings.fields import check
from tasks.common import Generated, shortest_ends

NEEDLE_ROOM = 10  # tokens generated for a needle (ST 4.3)
NAME_ROOM = 7  # tokens for each variable: five letters, comma and blank, one byte each at worst
LEAST_FILLER = 2  # sentences, the longest ones, that must fit
PLACE_NAMES = (
    "Athens Berlin Bergen Boston Cairo Delhi Dublin Florence Geneva Havana Istanbul Jakarta Kyoto "
    "Lagos Lima Lisbon London Madrid Manila Moscow Nairobi Oslo Paris Prague Quito Rome Seoul "
    "Sydney Tokyo Toronto Vienna Warsaw"
)
PLACES = tuple(PLACE_NAMES.split())
# Plain sentences without digits, of many lengths: short ones fill the last tokens of a budget.
FILLER = (
    "It rained.",
    "The dog slept.",
    "Nobody spoke.",
    "The soup was hot.",
    "A door stood open.",
    "The train was late again.",
    "Bread was baking in the oven.",
    "The old clock ticked in the hall.",
    "Two boats lay at the end of the pier.",
    "She watered the plants before breakfast.",
    "The road to the village follows the river.",
    "He forgot his umbrella at the library.",
    "A cat watched the birds from the window.",
    "The market closes when the sun goes down.",
    "Snow had covered the roofs during the night.",
    "They painted the fence green last summer.",
    "The baker gives his old bread to the ducks.",
    "My neighbour plays the cello in the evening.",
    "Wind from the sea makes the curtains move.",
    "The children built a castle out of wet sand.",
    "Someone had left a bicycle against the wall.",
    "The tea grew cold while they talked about the garden.",
    "A letter arrived from her cousin in the mountains.",
    "The shop on the corner sells paper and string.",
    "In autumn the yard is full of yellow leaves.",
    "The teacher wiped the board and opened a window.",
    "Our bus crosses the bridge and then turns left.",
    "The farmer mended the gate before the cows came home.",
    "Apples from that tree are small but very sweet.",
    "The museum keeps its oldest maps in a dark room.",
    "He folded the newspaper and looked out at the harbour.",
    "The lamp in the kitchen has needed repair since spring.",
    "Every Sunday the band plays in the park by the lake.",
    "The tailor measured the coat twice and cut it once.",
    "Her brother collects shells and keeps them in a wooden box.",
    "A long path leads through the wood to the mill.",
    "The ferry carries more bicycles than cars these days.",
    "They sat on the steps and waited for the rain to stop.",
    "The carpenter made a table from the planks of an old ship.",
    "When the lights went out, everyone in the house lit a candle.",
)


# ----------------------------------------------------------------------------- what is asked


class Needle(Generated):
    """Share of prompts whose digit (answer: int, 1..9) is the first digit generated."""

    name = "needle"
    metric = "accuracy"

    @staticmethod
    def score(text: str, answer: int) -> float:
        found = re.search("[0-9]", text)
        return float(found is not None and found[0] == str(answer))


@dataclass(frozen=True)
class NeedleReuse(Needle):
    """Needle of a second question: the cache is compressed for the first, which stands before it.

    seconds: tokens of the second question in each prompt"""

    seconds: list[int]
    name = "needle_reuse"

    @property
    def stored(self) -> Tensor:
        """What is compressed, up to the second question."""
        pairs = zip(self.prompts[:4], self.seconds, strict=False)
        return shortest_ends([prompt[:-second] for prompt, second in pairs])

    def value(
        self, model: Transformer, batch_size: int, dtype: str, reference: bool = False
    ) -> float:
        total = 0.0
        with evaluating(model), autocast(model.norm.weight.device, dtype):
            for second, rows in self.batches(batch_size):
                prompts = [self.prompts[i] for i in rows]
                answers = [self.answers[i] for i in rows]
                total += sum(self.scores(model, prompts, answers, second))
        return total / self.n

    def batches(self, batch_size: int) -> Iterator[tuple[int, list[int]]]:
        """Yield the length of the second question and the prompts of a batch: it has one length, so
        that all that is compressed ends in the same column."""
        for second in sorted(set(self.seconds)):
            rows = [i for i, length in enumerate(self.seconds) if length == second]
            for start in range(0, len(rows), batch_size):
                yield second, rows[start : start + batch_size]


class VariableTracking(Generated):
    """Mean share of the variables (answer: their names) that occur in the generated text."""

    name = "variable_tracking"
    metric = "recall"

    @staticmethod
    def score(text: str, answer: list[str]) -> float:
        return sum(name in text for name in answer) / len(answer)


# ----------------------------------------------------------------------------- the haystack


def weave(filler: list[str], facts: Sequence[str], depths: Sequence[float]) -> str:
    """Return one text: the facts in their order between the sentences, at depths in [0, 1),
    ascending (0: before the first sentence)."""
    lines = list(filler)
    # From the back, so that places stay what they were.
    for fact, depth in reversed(list(zip(facts, depths, strict=True))):
        lines.insert(int(depth * (len(filler) + 1)), fact)
    return " ".join(lines)


def haystack(
    tokenizer,
    rng: random.Random,
    before: str,
    facts: Sequence[str],
    depths: Sequence[float],
    after: str,
    budget: int,
) -> list[int]:
    """Return the ids of before + filler with the facts in it + after: at most budget tokens, and
    where sentences cost together what they cost alone less than the shortest of them below it.

    depths: ascending, one for each fact. ValueError where no haystack fits."""
    # A sentence's cost alone is what it adds to a text, to one token.
    cost = {s: len(tokenizer.encode(" " + s)) for s in FILLER}
    filler: list[str] = []
    may_grow = True
    while True:
        ids = encoded(tokenizer, before + weave(filler, facts, depths) + after)
        room = budget - len(ids)
        check(
            filler or room >= LEAST_FILLER * max(cost.values()),
            f"{budget} tokens for a prompt",
            f"{len(ids)} for facts and question, and {LEAST_FILLER} sentences of filler, must fit",
            "give a larger --block_size, or fewer --needles, --distractors, --chains or --hops",
        )
        if room < 0:
            # Sentences may cost more together than alone.
            filler.pop(rng.randrange(len(filler)))
            may_grow = False
            continue
        drawn = draw_filler(rng, cost, room) if may_grow else []
        if not drawn:
            return ids
        filler += drawn
        rng.shuffle(filler)  # the short ones of a round's end go anywhere


def draw_filler(rng: random.Random, cost: dict[str, int], room: int) -> list[str]:
    """Draw sentences until none fits what is left of `room` tokens; cost: tokens of each."""
    drawn = []
    while fits := [s for s in FILLER if cost[s] <= room]:
        sentence = rng.choice(FILLER)
        if sentence not in fits:
            sentence = rng.choice(fits)
        drawn.append(sentence)
        room -= cost[sentence]
    return drawn


# ----------------------------------------------------------------------------- needle


def needle(
    tokenizer, length: int, n: int, seed: int, query: int, distractors: int = 0, reuse: bool = False
) -> Needle:
    """Make n needles in contexts of `length` tokens, the room for the answer included.

    distractors: other named numbers, none of them the answer
    reuse: after the first question and its answer another number is asked for, the answer then"""
    prompts = []
    answers = []
    seconds = []
    for i in range(n):
        rng = random.Random(f"needle {seed} {i} {distractors}")
        numbers, facts, questions = draw_numbers(rng, distractors)
        second = []
        if reuse:
            second = encode_after(tokenizer, questions[0], f" {numbers[0]}.{questions[1]}")
        depths = sorted(rng.random() for _ in facts)
        budget = length - NEEDLE_ROOM - len(second)
        first = haystack(tokenizer, rng, "", facts, depths, questions[0], budget)
        prompts.append(first + second)
        answers.append(numbers[1 if reuse else 0])
        seconds.append(len(second))
    if reuse:
        return NeedleReuse(prompts, answers, query, tokenizer, NEEDLE_ROOM, seconds)
    return Needle(prompts, answers, query, tokenizer, NEEDLE_ROOM)


def draw_numbers(rng: random.Random, distractors: int) -> tuple[list[int], list[str], list[str]]:
    """Draw the numbers of one text: (the numbers, the one that is asked for first, the facts that
    say them in any order, the questions for the first two).

    Without distractors the one number has no place, and there is one question."""
    numbers = [rng.randint(1, 9)]
    if not distractors:
        return numbers, [f"The magic number is {numbers[0]}."], [number_question("magic number")]
    others = [d for d in range(1, 10) if d != numbers[0]]
    places = rng.sample(PLACES, distractors + 1)
    numbers += [rng.choice(others) for _ in places[1:]]
    named = zip(places, numbers, strict=True)
    facts = [f"The lucky number of {place} is {number}." for place, number in named]
    rng.shuffle(facts)
    return numbers, facts, [number_question(f"lucky number of {place}") for place in places[:2]]


def number_question(what: str) -> str:
    """Return the question for a number, with the beginning of its answer."""
    return f"\n\nWhat is the {what}? The {what} is"


# ----------------------------------------------------------------------------- variable tracking


def variable_tracking(
    tokenizer, length: int, n: int, seed: int, query: int, chains: int = 1, hops: int = 4
) -> VariableTracking:
    """Make n texts of `length` tokens, the room for the answer included, with `chains` chains of
    hops + 1 assignments; one chain is asked for.

    Before it, as RULER does, one short worked example: a chain as long, with names and a value of
    its own."""
    prompts = []
    answers = []
    room = NAME_ROOM * (hops + 1)
    for i in range(n):
        rng = random.Random(f"variable_tracking {seed} {i} {chains} {hops}")
        names = draw_names(rng, chains + 1, hops + 1)
        values = [str(v) for v in rng.sample(range(10000, 100000), chains + 1)]
        before = worked_example(rng, names[0], values[0])
        lines, depths = scatter(rng, names[1:], values[1:])
        question = variables_question(values[1], hops + 1)
        prompts.append(haystack(tokenizer, rng, before, lines, depths, question, length - room))
        # The first chain is as good as any: its place in the text is random.
        answers.append(names[1])
    return VariableTracking(prompts, answers, query, tokenizer, room)


def draw_names(rng: random.Random, chains: int, links: int) -> list[list[str]]:
    """Draw different names of five capitals, `links` for each of the chains."""
    drawn: dict[str, None] = {}  # a set in the order drawn
    while len(drawn) < chains * links:
        drawn["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    names = list(drawn)
    return [names[i : i + links] for i in range(0, len(names), links)]


def chain_text(names: list[str], value: str) -> list[str]:
    """Return the assignments of one chain, in order: the first gets the value, every other its
    predecessor."""
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=True)]


def variables_question(value: str, links: int) -> str:
    """Return the question for the variables of a value, with the beginning of its answer."""
    return (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.\n"
        f"Answer: The {links} variables that are assigned the value {value} are:"
    )


def worked_example(rng: random.Random, names: list[str], value: str) -> str:
    """Return what stands before a text: instruction, a chain between sentences, question and
    answer, and the instruction again."""
    intro = "Follow the variables through the text.\n\n"
    shown = []
    for line in chain_text(names, value):
        shown += [rng.choice(FILLER), line]
    question = variables_question(value, len(names))
    return f"{intro}{' '.join(shown)}{question} {', '.join(names)}\n\n{intro}"


def scatter(
    rng: random.Random, names: list[list[str]], values: list[str]
) -> tuple[list[str], list[float]]:
    """Place the chains' assignments at random, each chain in its order: (lines, their depths,
    ascending)."""
    placed = []
    for chain, value in zip(names, values, strict=True):
        depths = sorted(rng.random() for _ in chain)
        placed += zip(depths, chain_text(chain, value), strict=True)
    placed.sort()
    return [line for _, line in placed], [depth for depth, _ in placed]
