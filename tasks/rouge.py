"""ROUGE-L (Lin 2004): how much of two texts is a common subsequence of words.

Ours and not the package rouge-score: it is a dozen lines, and the package brings nltk for stems
that we do not take. Texts are cut into words as it does, lower case, letters a to z and digits; a
test holds the two equal.

    rouge_l("the cat sat", "the cat has sat down")  # 0.75
"""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """Return a text's words, in lower case and not stemmed: runs of a to z and 0 to 9."""
    return re.findall("[a-z0-9]+", text.lower())


def common_length(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0 for _ in range(len(b) + 1)]
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            longer = before[j] + 1 if word == other else max(before[j + 1], row[j])
            row.append(longer)
    return row[-1]


def rouge_l(candidate: str, reference: str) -> float:
    """Return the F-measure, in [0, 1], of precision and recall weighed alike; 0 where nothing is
    shared."""
    ours = words(candidate)
    theirs = words(reference)
    common = common_length(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0
