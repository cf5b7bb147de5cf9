"""Multiple choice in MMLU's format (arXiv 2009.03300): worked examples, a question with four
choices, and the letter whose logit is the largest."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loaders.tokenizer import encoded
from model import Transformer
from settings.fields import check
from tasks.common import Prompts, ThroughCache

LETTERS = "ABCD"


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


# ----------------------------------------------------------------------------- files of questions


@dataclass(frozen=True)
class Question:
    """A row of an MMLU file: question, four choices, the answer 0..3, and where it stands."""

    text: str
    choices: tuple[str, ...]
    answer: int
    where: str

    def asked(self) -> str:
        """The question up to where the letter follows."""
        choices = [f"{letter}. {c}" for letter, c in zip(LETTERS, self.choices, strict=True)]
        return "\n".join([self.text, *choices, "Answer:"])

    def shown(self) -> str:
        """The question as a worked example, with its letter."""
        return f"{self.asked()} {LETTERS[self.answer]}\n\n"


MMLU_FILE = "give MMLU's CSV: question, A, B, C, D, answer, without a header"


def read_questions(path: Path) -> list[Question]:
    """Read the rows of an MMLU file: question, A, B, C, D, answer; no header. ValueError names file
    and line of a bad row."""
    questions = []
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = csv.reader(f, strict=True)
            for row in rows:
                where = f"{path}, line {line}"
                line = rows.line_num + 1
                if row:
                    questions.append(question_of(row, where))
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path}, line {line}: {e}; {MMLU_FILE}") from None
    check(bool(questions), f"{path}", "there is no question in it", MMLU_FILE)
    return questions


def question_of(row: list[str], where: str) -> Question:
    """Make a question of a row that stands at `where`. ValueError where it is none."""
    check(len(row) == 6, where, f"{len(row)} fields where 6 are needed", MMLU_FILE)
    text, *choices, answer = (field.strip() for field in row)
    check(bool(text and answer and all(choices)), where, "an empty field", MMLU_FILE)
    known = answer in tuple(LETTERS)
    check(known, f"{where}: answer {row[5]!r}", "one of A, B, C, D", MMLU_FILE)
    return Question(text, tuple(choices), LETTERS.index(answer), where)


def subject_files(where: str) -> dict[str, Path]:
    """Return {subject: file} of a CSV file or a folder of them; the subject is the file's name
    without _test, _dev, _val and the like."""
    path = Path(where)
    do = "give MMLU's CSV file or a folder of them"
    check(path.exists(), where, "no such file or folder", do)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    check(bool(files), where, "there is no .csv file in it", do)
    return {re.sub(r"_(test|dev|val|validation|train)$", "", f.stem): f for f in files}


def example_files(files: dict[str, Path], questions: str, shots_from: str) -> dict[str, Path]:
    """Return {subject: file of its worked examples}, those of `shots_from` where it is given."""
    if not shots_from:
        return files
    sources = subject_files(shots_from)
    if Path(questions).is_file() and Path(shots_from).is_file():
        # Two files belong together, however they are called.
        return dict(zip(files, sources.values(), strict=True))
    return sources


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


def subjects(
    questions: str, shots: int, shots_from: str
) -> Iterator[tuple[str, list[Question], list[Question]]]:
    """Yield subject by subject its name, its worked examples and the questions to ask."""
    files = subject_files(questions)
    sources = example_files(files, questions, shots_from)
    for subject, file in files.items():
        check(
            subject in sources,
            f"shots_from={shots_from}",
            f"it has no file of {subject}",
            f"examples for {file} are needed",
        )
        rows = read_questions(file)
        examples = read_questions(sources[subject])[:shots]
        check(
            len(examples) == shots,
            f"shots={shots}",
            f"{sources[subject]} has {len(examples)} rows",
            "give a smaller --shots",
        )
        left = rows if shots_from else rows[shots:]
        check(
            bool(left),
            f"{file}",
            f"no question is left after {shots} examples",
            "give --shots_from, or a smaller --shots",
        )
        yield subject, examples, left


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
