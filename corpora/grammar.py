"""Text from templates: what stands in braces is replaced by one of its alternatives, or by a number
of a range, again and again.

    rules = {"hello": ["Hello {name}.", "{name}, it is {1-12} o'clock."], "name": ["Ada", "Ben"]}
    fill(Draw("seed"), rules, "{hello}")

Draws come from random.random() alone, whose sequence Python promises to keep: a seed gives the same
text on every machine and in every version.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

PLACE = re.compile(r"\{(\w+)\}|\{(\d+)-(\d+)\}")
CORPUS_BYTES = 1_000_000


class Draw:
    """Pseudo-random choices that depend on a seed alone."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """Draw from low..high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, share: float) -> bool:
        """Be true in that share of the draws."""
        return self.random() < share

    def pick(self, options: Sequence):
        """Draw one."""
        return options[self.number(0, len(options) - 1)]

    def several(self, options: Sequence, n: int) -> list:
        """Draw n different ones, in the order drawn."""
        left = list(options)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(n)]


def fill(draw: Draw, rules: Mapping[str, str | Sequence[str]], text: str) -> str:
    """Return the text with {name} replaced by an alternative of rules[name] (by all of it where it
    is a string), filled in turn, and {low-high} by a number of that range."""

    def replacement(place: re.Match) -> str:
        name, low, high = place.groups()
        if name is None:
            return str(draw.number(int(low), int(high)))
        options = rules[name]
        return fill(draw, rules, options if isinstance(options, str) else draw.pick(options))

    return PLACE.sub(replacement, text)


def words(text: str) -> list[str]:
    """Return the entries of a list with commas between, line ends as blanks."""
    return [" ".join(entry.split()) for entry in text.split(",")]


def sentence(text: str) -> str:
    """Return the text with its first letter large."""
    return text[:1].upper() + text[1:]


def documents_of(kind: str, write: Callable[[Draw], str]) -> list[str]:
    """Return documents until they have CORPUS_BYTES bytes of UTF-8, each drawn from a seed of its
    own: its kind and its number."""
    docs: list[str] = []
    size = 0
    while size < CORPUS_BYTES:
        docs.append(write(Draw(f"{kind} {len(docs)}")))
        size += len(docs[-1].encode("utf-8"))
    return docs
