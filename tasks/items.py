"""Files of zero-shot items: JSONL as the data sets ship it, each line a question with its answers.

A line is known by its fields: HellaSwag, PIQA, WinoGrande, ARC, OpenBookQA, BoolQ, COPA, LAMBADA,
or the plain form, question, choices (texts) and answer (from 0; a question with one `_` is filled
in, as WinoGrande's). What is asked and how is as in EleutherAI's evaluation harness, so that
figures can be compared.

    {"question": "Predators eat", "choices": ["lions", "bunnies"], "answer": 1}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from measure_config import EvalConfig
from settings.fields import check, comma_list
from settings.files import fields_of, json_objects

ASKED = "Question: {}\nAnswer:"
# Of the plain form, by how a file's name begins: what stands around its question.
AROUND = {"arc": ASKED, "piqa": ASKED, "boolq": "{}\nAnswer:"}
LAST_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)|\n(?=\S)")
BECAUSE = {"cause": "because", "effect": "therefore"}
ITEMS_FILE = "give JSONL of HellaSwag, PIQA, WinoGrande, ARC, OpenBookQA, BoolQ, COPA or LAMBADA"


class Option(NamedTuple):
    """An answer and what stands before it: a context, then the question, which may be empty."""

    context: str
    question: str
    answer: str


class Item(NamedTuple):
    """The options of one question, and which is right. One option: its words must be the likeliest
    ones."""

    options: list[Option]
    right: int


def item_files(cfg: EvalConfig) -> list[str]:
    """Return the files of cfg.items. ValueError where two tasks would have one name."""
    files = comma_list(cfg.items)
    named = {name: f"the task {name}" for name in comma_list(cfg.tasks) if name != "zero_shot"}
    for path in files:
        stem = Path(path).stem
        check(
            stem not in named,
            f"items={cfg.items}",
            f"{named.get(stem)} and {path} would both be the task {stem!r}",
            "rename one of them, or measure it apart",
        )
        named[stem] = path
    return files


def read_items(path: Path) -> list[Item]:
    """Read a file's items. ValueError names the line that is none."""
    check(path.is_file(), f"{path}", "no such file", ITEMS_FILE)
    items = []
    for number, row in json_objects(path):
        where = f"{path}, line {number}"
        fields = f"{where}, has {fields_of(row)}"
        make = next((f for needed, f in FORMATS.items() if {*needed} <= {*row}), None)
        check(make is not None, fields, "no known data set has these", ITEMS_FILE)
        if make is plain_item:
            check_plain(row, where)
        try:
            item = make(row, path.stem)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError):
            check(False, where, "a field is not as the data set has it", ITEMS_FILE)
        fine = 0 <= item.right < len(item.options) and all(o.answer for o in item.options)
        check(fine, where, "an empty answer, or none that is right", ITEMS_FILE)
        items.append(item)
    check(bool(items), f"{path}", "there is no item in it", ITEMS_FILE)
    return items


def check_plain(row: dict, where: str) -> None:
    """Raise ValueError unless the plain form's answers are texts and the right one is a number."""
    choices = row["choices"]
    right = row["answer"]
    check(
        isinstance(choices, list) and all(isinstance(text, str) for text in choices),
        f"{where}, choices={json.dumps(choices)}",
        "a list of texts is needed",
        'give for example ["lions", "bunnies"]',
    )
    check(
        type(right) is int,  # True is none
        f"{where}, answer={json.dumps(right)}",
        "a whole number is needed, the place of the right one of choices",
        "count from 0",
    )


def same_before(context: str, question: str, answers: list[str], right: int) -> Item:
    """Make an item whose answers follow the same text."""
    return Item([Option(context, question, str(answer)) for answer in answers], right)


def parted(text: str) -> tuple[str, str]:
    """Part a text before its last sentence or line: (what comes before, the last)."""
    starts = [found.end() for found in LAST_SENTENCE.finditer(text)]
    at = starts[-1] if starts else 0
    before = text[:at].rstrip()
    return before, text[len(before) :]


def around(form: str, text: str) -> tuple[str, str]:
    """Part a text before its last sentence, and put a form around it."""
    before, after = form.split("{}")
    context, question = parted(text)
    return (before + context, question + after) if context else ("", before + question + after)


# ----------------------------------------------------------------------------- the data sets


def plain_item(row: dict, name: str) -> Item:
    """question, choices and answer, a number from 0."""
    text = row["question"]
    if text.count("_") == 1:
        return filled_in(text, row["choices"], row["answer"])
    form = next((form for start, form in AROUND.items() if name.startswith(start)), "{}")
    return same_before(*around(form, text), row["choices"], row["answer"])


def filled_in(text: str, fillers: list[str], right: int) -> Item:
    """Of a text with a blank: what follows the blank is scored after each filler."""
    before, after = text.split("_")
    context, question = parted(before)
    return Item([Option(context, question + f, after.strip()) for f in fillers], right)


def hellaswag_item(row: dict, name: str) -> Item:
    """activity_label, ctx_a, ctx_b, endings, label; [title] and the like are taken out."""
    context = f"{row['activity_label']}: {row['ctx_a']}"
    question = f" {row['ctx_b'].capitalize()}"
    endings = [clean(ending) for ending in row["endings"]]
    whole = clean(context + question)
    context = clean(context)
    if not whole.startswith(context):
        context = ""
    return same_before(context, whole[len(context) :], endings, int(row["label"]))


def clean(text: str) -> str:
    """WikiHow's text in HellaSwag without its marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def piqa_item(row: dict, name: str) -> Item:
    """goal, sol1, sol2, label."""
    answers = [row["sol1"], row["sol2"]]
    return same_before(*around(ASKED, row["goal"]), answers, int(row["label"]))


def winogrande_item(row: dict, name: str) -> Item:
    """sentence with a blank, option1, option2, answer 1 or 2."""
    fillers = [row["option1"], row["option2"]]
    return filled_in(row["sentence"], fillers, int(row["answer"]) - 1)


def arc_item(row: dict, name: str) -> Item:
    """question with a stem and labelled choices, or these as columns; OpenBookQA's, too, whose
    stems are sentences to be ended and have nothing around them."""
    question = row.get("question_stem", row.get("question"))
    choices = row.get("choices")
    if isinstance(question, dict):
        choices = question["choices"]
        question = question["stem"]
    if isinstance(choices, list):
        choices = {key: [c[key] for c in choices] for key in ("text", "label")}
    bare = "question_stem" in row or name.startswith("openbook")
    right = choices["label"].index(row["answerKey"])
    return same_before(*around("{}" if bare else ASKED, question), choices["text"], right)


def boolq_item(row: dict, name: str) -> Item:
    """passage, question, answer: true or false."""
    question = f"\nQuestion: {row['question']}?\nAnswer:"
    return same_before(row["passage"], question, ["no", "yes"], int(row["answer"]))


def copa_item(row: dict, name: str) -> Item:
    """premise, choice1, choice2, question: cause or effect, label."""
    question = f"{row['premise'].strip()[:-1]} {BECAUSE[row['question']]}"
    answers = [row[key][0].lower() + row[key][1:] for key in ("choice1", "choice2")]
    return same_before("", question, answers, int(row["label"]))


def lambada_item(row: dict, name: str) -> Item:
    """text, whose last word is the answer."""
    before, _, word = row["text"].rstrip().rpartition(" ")
    context, question = parted(before)
    return Item([Option(context, question, word)], 0)


# The fields by which a line is known, the most telling first.
FORMATS: dict[tuple[str, ...], Callable[[dict, str], Item]] = {
    ("activity_label", "ctx_a", "ctx_b", "endings", "label"): hellaswag_item,
    ("goal", "sol1", "sol2", "label"): piqa_item,
    ("sentence", "option1", "option2", "answer"): winogrande_item,
    ("premise", "choice1", "choice2", "question", "label"): copa_item,
    ("passage", "question", "answer"): boolq_item,
    ("answerKey",): arc_item,
    ("question", "choices", "answer"): plain_item,
    ("text",): lambada_item,
}
