"""Files of multiple-choice questions in MMLU's format (arXiv 2009.03300), CSV: a question, its four
choices and the right letter a row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from settings.fields import check
from settings.files import read_text

LETTERS = "ABCD"
MMLU_FILE = "give MMLU's CSV: question, A, B, C, D, answer, without a header"


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


def read_questions(path: Path) -> list[Question]:
    """Read the rows of an MMLU file: question, A, B, C, D, answer; no header. ValueError names file
    and line of a bad row."""
    questions = []
    line = 1
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in rows:
            where = f"{path}, line {line}"
            line = rows.line_num + 1
            if row:
                questions.append(question_of(row, where))
    except csv.Error as e:
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
