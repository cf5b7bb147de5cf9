"""Multiple choice: questions read from csv files, prompts of examples and a question, the largest
of four logits."""

from __future__ import annotations

import re

import pytest
from answering import ROWS, Reader, questions, read, rows_of
from helpers import error_line

from loaders.tokenizer import ByteTokenizer
from tasks.choices import MultipleChoice, multiple_choice
from tasks.questions import read_questions

pytestmark = pytest.mark.usefixtures("own_cache")


def test_csv_is_read_as_csv(tmp_path):
    """Quotes, commas and line breaks inside of fields, blank lines, a byte order mark, Windows line
    ends."""
    for i, text in enumerate((ROWS, "\ufeff" + ROWS, ROWS.replace("\n", "\r\n"))):
        path = tmp_path / f"{i}.csv"
        path.write_bytes(text.encode())
        read = read_questions(path)
        assert [q.answer for q in read] == [1, 0, 3, 2] and read[
            1
        ].text == 'Which, of these, is "round"?'
        assert (
            read[0].choices == ("3", "4", "5", "6")
            and read[1].choices[1] == "a box, flat"
            and read[3].choices == ("w", "x", "y", "z")
        )
        assert read[2].text.splitlines() == ["Two", "lines?"] and [
            q.where.split("line ")[1] for q in read
        ] == ["1", "2", "3", "7"]
    assert (
        read[0].asked() == "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
        and read[0].shown() == read[0].asked() + " B\n\n"
    )


@pytest.mark.parametrize(
    "bad, why",
    [
        ("a,b,c,d,A\n", "5 fields"),
        ("q,a,b,c,d,A,extra\n", "7 fields"),
        ("q,a,b,c,d,E\n", "answer 'E'"),
        ("q,a,b,c,d,a\n", "answer 'a'"),
        ("q,a,b,c,d,AB\n", "answer 'AB'"),
        ("question,A,B,C,D,answer\n", "answer 'answer'"),
        ("q,a,,c,d,A\n", "an empty field"),
        (",a,b,c,d,A\n", "empty"),
        ("q,a,b,c,d,\n", "empty"),
        ('"q,a,b,c,d,A\n', "unexpected end"),
        ('"q"x,a,b,c,d,A\n', "expected after"),
        ("q\xff,a,b,c,d,A\n", "utf-8"),
    ],
)
def test_bad_row_is_named_by_its_line(bad, why, tmp_path):
    """What is no row of MMLU's format is refused with file and line, that where the row begins."""
    path = tmp_path / "x_test.csv"
    path.write_bytes(ROWS.encode() + bad.encode("latin-1"))
    line = error_line(read_questions, path)
    assert (
        why in line
        and str(path) in line
        and (why == "utf-8" or ("line 8" in line and "give MMLU's CSV" in line))
    ), line


def ask(tmp_path, *, n=99, length=3000, seed=0, tok=None, **options) -> MultipleChoice:
    return multiple_choice(tok or ByteTokenizer(), length, n, seed, 16, **options)


def test_examples_come_first_and_are_not_asked(tmp_path):
    """The first rows of the file are shown, in order, before every other one, which is asked; the
    prompt ends where the letter follows."""
    task = ask(
        tmp_path, questions=questions(tmp_path / "q", high_tea_test=rows_of("tea", 11)), shots=5
    )
    head = "The following are multiple choice questions (with answers) about high tea.\n\n"
    shown = "".join(
        f"tea {i}?\nA. teaa{i}\nB. teab\nC. teac\nD. tead\nAnswer: {'ABCD'[i % 4]}\n\n"
        for i in range(5)
    )
    texts = {read(task, i): a for i, a in enumerate(task.answers)}
    assert texts == {
        f"{head}{shown}tea {i}?\nA. teaa{i}\nB. teab\nC. teac\nD. tead\nAnswer: ": (
            i % 4,
            [65, 66, 67, 68],
        )
        for i in range(5, 11)
    }
    assert (task.n, task.metric, task.name, task.query) == (6, "accuracy", "multiple_choice", 16)


def test_examples_of_the_same_subject_from_elsewhere(tmp_path):
    """With --shots_from every row is asked, each after the examples of its own subject, from folder
    to folder or from file to file; the questions are drawn by the seed."""
    test = questions(tmp_path / "test", tea_test=rows_of("tea", 7), ink_test=rows_of("ink", 5))
    dev = questions(
        tmp_path / "dev",
        tea_dev=rows_of("oldtea", 3),
        ink_dev=rows_of("oldink", 3),
        other_dev="rubbish",
    )
    task = ask(tmp_path, questions=test, shots_from=dev, shots=2)
    assert task.n == 12
    for i in range(12):
        *shown, asked = re.findall(r"(\w+ \d+)\?", read(task, i))
        topic = asked.split()[0]
        assert shown == [f"old{topic} 0", f"old{topic} 1"] and f"about {topic}." in read(task, i)
    same, other, few = (
        ask(tmp_path, questions=test, shots_from=dev, shots=2, **k)
        for k in ({}, {"seed": 1}, {"n": 4})
    )
    assert (
        same.prompts == task.prompts != other.prompts
        and sorted(other.prompts) == sorted(task.prompts)
        and few.prompts == task.prompts[:4]
    )
    one = ask(tmp_path, questions=f"{test}/tea_test.csv", shots_from=f"{dev}/ink_dev.csv", shots=1)
    assert one.n == 7 and all("oldink 0" in read(one, i) for i in range(7))
    assert (
        ask(tmp_path, questions=f"{test}/tea_test.csv", shots_from=dev, shots=1).n == 7
        and ask(tmp_path, questions=test, shots=0).n == 12
    )


def test_long_prompts_lose_their_last_examples(tmp_path):
    """Where five examples do not fit, as many of the first as do are shown; a question that does
    not fit alone is named."""
    file = f"{questions(tmp_path, x=rows_of('tea', 12))}/x.csv"
    for length in (200, 150, 300):
        task = ask(tmp_path, questions=file, length=length)
        for i in range(task.n):
            *shown, _ = re.findall(r"tea (\d+)\?", read(task, i))
            assert (
                shown == [str(j) for j in range(len(shown))]
                and len(task.prompts[i]) <= length < len(task.prompts[i]) + 50
            )
    line = error_line(ask, tmp_path, questions=file, length=70)
    assert "line " in line and "larger --block_size" in line


class Swap(ByteTokenizer):
    """The letters A to D are spelled in another way."""

    def __init__(self, how):
        self.how = how

    def encode(self, text: str) -> list[int]:
        return super().encode(re.sub("[A-D]", lambda m: self.how(m[0]), text))


def test_multiple_choice_refusals(tmp_path):
    """Files, folders and subjects that are not there, too few rows, letters that are no single
    tokens: one line each."""
    a = questions(tmp_path / "a", tea_test=rows_of("tea", 3))
    b = questions(tmp_path / "b", ink_dev=rows_of("ink", 3))
    (tmp_path / "none").mkdir()
    for options, why in (
        (dict(questions=f"{a}/no.csv"), "no such file"),
        (dict(questions=str(tmp_path / "none")), "no .csv file"),
        (dict(questions=a, shots_from=b), "it has no file of tea"),
        (dict(questions=a, shots=4), "has 3 rows"),
        (dict(questions=a, shots=3), "no question is left"),
        (dict(questions=questions(tmp_path / "e", e="\n")), "no question in it"),
        (dict(questions=a, shots_from="gone"), "no such file"),
        *(
            (dict(questions=a, shots=1, tok=Swap(how)), "distinct single tokens")
            for how in (lambda c: "?", lambda c: c + "-", lambda c: c + c)
        ),
    ):
        assert why in error_line(ask, tmp_path, **options)


def test_choice_is_the_largest_of_four_logits(tmp_path):
    """Right, wrong, another letter's logit that is larger but none of the four, and equal logits,
    where A is taken; any batch."""
    answers = "ABBDAC"
    task = ask(tmp_path, questions=questions(tmp_path, x=rows_of("tea", 13, answers)), shots=1)
    right = {f"tea {i}": answers[i % 6] for i in range(13)}

    def solved(text):
        return right[re.findall(r"(tea \d+)\?", text)[-1]]

    share = sum(v == "A" for v in list(right.values())[1:]) / 12
    for answer, value in (
        (solved, 1),
        (lambda t: chr(65 + (ord(solved(t)) - 64) % 4), 0),
        (lambda t: "Z", share),
        (lambda t: "", share),
    ):
        assert [task.value(Reader(answer), n, "float32") for n in (1, 5, 12)] == [
            pytest.approx(value)
        ] * 3
