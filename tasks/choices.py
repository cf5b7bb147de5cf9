"""Multiple choice in MMLU's format (arXiv 2009.03300): worked examples, a question with four
choices, and the letter whose logit is the largest."""

from __future__ import annotations

import random

import torch

from loaders.tokenizer import encoded
from model import Transformer
from settings.fields import check
from tasks.common import Prompts, ThroughCache
from tasks.questions import LETTERS, Question, subjects


class MultipleChoice(Prompts):
    """Share of prompts whose right letter has the largest logit of the four (answer: 0..3 and the
    letters' ids); of equals the first counts."""

    name = "multiple_choice"
    metric = "accuracy"

    def scores(self, model: Transformer, prompts: list[list[int]], answers: list) -> list[float]:
        T = max(map(len, prompts))
        device = model.norm.weight.device
        pad = torch.tensor([T - len(p) for p in prompts], device=device)
        idx = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)  # (B, T)
        cache = model.new_cache(len(prompts), T)
        n_pad = pad if pad.any() else None
        logits = ThroughCache(model).prefill(idx, cache, n_pad)[:, -1]  # (B, vocab)
        scores = []
        for row, (right, letters) in zip(logits, answers, strict=True):
            of_letters = row[torch.tensor(letters, device=device)]
            scores.append(float(of_letters.argmax() == right))
        return scores


# ----------------------------------------------------------------------------- prompts


def multiple_choice(
    tokenizer,
    length: int,
    n: int,
    seed: int,
    query: int,
    questions: str,
    shots: int = 5,
    shots_from: str = "",
) -> MultipleChoice:
    """Draw at most n questions, from all of them by the seed, of at most `length` tokens with
    `shots` worked examples before them.

    Examples are the first rows of the subject's file in shots_from, or of its own file, and then
    they are not asked. As in MMLU's own code, the last examples are left out where a prompt would
    be too long; ValueError where the question alone is."""
    asked = []
    for subject, examples, left in subjects(questions, shots, shots_from):
        asked += [(subject, examples, question) for question in left]
    random.Random(f"multiple_choice {seed}").shuffle(asked)
    prompts = []
    answers = []
    for subject, examples, question in asked[:n]:
        ids, letters = choice_prompt(tokenizer, subject, examples, question, length)
        prompts.append(ids)
        answers.append((question.answer, letters))
    return MultipleChoice(prompts, answers, query, tokenizer)


def choice_prompt(
    tokenizer, subject: str, examples: list[Question], question: Question, length: int
) -> tuple[list[int], list[int]]:
    """Return (ids of the prompt, ids of the four letters), with as many of the first examples as
    `length` tokens have room for. ValueError where the question alone is too long."""
    head = (
        "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n"
    )
    for shown in range(len(examples), -1, -1):
        before = "".join(e.shown() for e in examples[:shown])
        ids, letters = letter_ids(tokenizer, head + before + question.asked())
        if len(ids) <= length:
            return ids, letters
    raise ValueError(
        f"{question.where}: a question of {len(ids)} tokens: a prompt has at most {length}; "
        "give a larger --block_size"
    )


def letter_ids(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Return (ids of the prompt, ids of the four letters) of a text that ends in 'Answer:': what
    'Answer: A' to 'Answer: D' have in common, and the last token of each. ValueError unless those
    are all that differs."""
    ids = [encoded(tokenizer, f"{text} {letter}") for letter in LETTERS]
    in_common = all(i[:-1] == ids[0][:-1] for i in ids)
    check(
        in_common and len({i[-1] for i in ids}) == len(LETTERS),
        f"multiple choice with tokenizer {tokenizer.name}",
        "the answers A, B, C and D must be distinct single tokens",
        "use the other tasks with it",
    )
    return ids[0][:-1], [i[-1] for i in ids]
