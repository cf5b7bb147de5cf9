"""RULER's tasks read back as text and solved by plain programs; their score."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from answering import read, tokenizer

from tasks.ruler import COMMON, FREQUENT, KEYS, MAKERS, VALUES, Found, largest, ruler


def solved(name: str, text: str) -> list[str]:
    """The answer to a text, found by reading it."""
    if name.startswith("multi"):
        said = re.findall(r"A secret number of ([A-Z]\w+) is (\d{7})\.", text)
        assert len(said) == KEYS == VALUES
        asked = text[text.rindex("\n\nWhat") :]
        return [number for place, number in said if place in asked]
    if name == "common_words":
        last = text[text.rindex("Below") : text.rindex("\nQuestion")]
        words = re.findall(r"\d+\. (\S+)", last)
        assert re.findall(r"(\d+)\. ", last) == [str(i + 1) for i in range(len(words))]
        return [w for w, _ in Counter(words).most_common(COMMON)]
    lines = text.splitlines()
    counts = Counter(lines[1].split())
    return [w for w, _ in counts.most_common(FREQUENT + 1) if w != "..."]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("name", MAKERS)
def test_ruler_is_solved_by_reading(name, kind):
    """Prompts of two lengths are solved by a program, have at most the tokens that the answer
    leaves and most of them, and follow from seed and index alone."""
    tok = tokenizer(kind)
    for length in (2300, 3000):
        task = ruler(name, tok, length, 3, 5, 16)
        for i, answer in enumerate(task.answers):
            assert sorted(solved(name, read(task, i))) == sorted(answer)
            assert 0.8 * (length - task.room) < len(task.prompts[i]) <= length - task.room
    again = ruler(name, tok, 3000, 2, 5, 16)
    assert again.prompts == task.prompts[:2] and again.answers == task.answers[:2]
    assert ruler(name, tok, 3000, 2, 6, 16).prompts != again.prompts


def test_no_two_of_the_first_words_are_equally_frequent():
    """Of coded texts of any length the words asked for are more frequent than all others."""
    for length in range(700, 2500, 131):
        text = read(ruler("frequent_words", tokenizer("byte"), length, 1, 0, 0), 0)
        counts = [n for _, n in Counter(text.splitlines()[1].split()).most_common(6)]
        assert len(set(counts[: FREQUENT + 1])) == FREQUENT + 1 and counts[3] > counts[4]


@pytest.mark.parametrize("name", MAKERS)
def test_too_short_is_refused_with_what_to_do(name):
    """A length in which nothing fits is refused."""
    with pytest.raises(ValueError, match="give a larger --block_size"):
        ruler(name, tokenizer("byte"), 300, 1, 0, 0)


def test_score_is_the_share_of_strings_found():
    """Whatever stands around them, and in any case of letters."""
    assert Found.score("It is Apple, 17 and ", ["apple", "17", "pear", "18"]) == 0.5
    assert Found.score("", ["a"]) == 0


def test_largest_finds_the_last_that_fits():
    """Against trying every size."""
    for budget in range(5, 60):
        ids = largest(lambda n: list(range(2 * n + 3)), budget, 1, "x")
        assert len(ids) == max(2 * n + 3 for n in range(1, 60) if 2 * n + 3 <= budget)
