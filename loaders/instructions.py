"""Instructions with answers (instruct:PATH): JSONL whose lines have instruction, input (may be
missing or empty) and output, as Alpaca's and Super-NaturalInstructions' files do.

A prompt is written by the model's own chat template, as a user's message, or plainly:

    INSTRUCTION

    INPUT

    Answer: OUTPUT<end>

In training whole examples follow one another in a window, in one order; only the tokens of outputs,
and the one that ends each, are learned, but objective=distill and stage=select learn from every
token. An example that is longer than a window is left out.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import check
from data import Corpus, check_length, label_of, split_documents
from loaders.examples import Examples
from loaders.templates import ChatTemplate
from loaders.tokenizer import encode_after, encoded, end_tokens
from settings.files import fields_of, json_objects
from settings.places import check_text
from settings.train import DataConfig

FIELDS = "texts in 'instruction' and 'output' are needed, and one in 'input' may be there"


class Example(NamedTuple):
    """An instruction, what it is about (may be empty), the right answer, and the task it belongs
    to, where the file names one."""

    instruction: str
    input: str
    output: str
    task: str = ""

    @property
    def asked(self) -> str:
        return "\n\n".join(text for text in (self.instruction, self.input) if text)


def read_examples(corpus: str) -> list[Example]:
    """Read the lines of instruct:PATH. ValueError names the line that is none."""
    path = Path(corpus.removeprefix("instruct:")).expanduser()
    check_text(corpus)
    examples = []
    for number, entry in json_objects(path):
        example = Example(
            instruction=entry.get("instruction"),
            input=entry.get("input") or "",
            output=entry.get("output"),
            task=str(entry.get("task") or ""),
        )
        texts = all(isinstance(text, str) for text in example)
        check(
            texts and bool(example.asked and example.output),
            f"{path}, line {number}, has {fields_of(entry)}",
            FIELDS,
            "correct it",
        )
        examples.append(example)
    check(bool(examples), corpus, "there is no line in it", "give another file")
    return examples


def split_examples(
    examples: list[Example], val_fraction: float
) -> tuple[list[Example], list[Example]]:
    """Part examples into those that are trained on and those held out, as data.split_documents
    does."""
    lines = [json.dumps(example) for example in examples]
    train, val = split_documents(lines, val_fraction)
    return [Example(*json.loads(s)) for s in train], [Example(*json.loads(s)) for s in val]


class Template:
    """How a tokenizer's model is asked.

    ends: ids that end an answer, the first the one that it is taught to end with
    kind: auto (the model's own chat template where it has one), chat or plain"""

    def __init__(self, tokenizer, kind: str):
        self.tokenizer = tokenizer
        self.chat = None
        self.ends = end_tokens(tokenizer)
        files = getattr(tokenizer, "chat", None)
        if kind == "chat" or (kind == "auto" and files is not None and files.template):
            self.chat = ChatTemplate(tokenizer)
            self.ends = list(dict.fromkeys([*self.after_answer(), *self.chat.ends]))

    def after_answer(self) -> list[int]:
        """Return the special token that the chat template writes after an answer, if any."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        after = self.chat.encode(self.chat.after_answer(turns))
        return [i for i in after[:1] if i in self.chat.special_ids]

    def prompt(self, example: Example) -> list[int]:
        """Return the ids up to where the answer begins."""
        if self.chat is None:
            return encoded(self.tokenizer, plain(example))
        pieces = self.chat.render([{"role": "user", "content": example.asked}])
        return self.chat.encode(pieces)

    def answer(self, example: Example) -> list[int]:
        """Return the ids of the right answer and its end."""
        if self.chat is None:
            ids = encode_after(self.tokenizer, plain(example), f" {example.output}")
        else:
            ids = self.tokenizer.encode(example.output)
        return [*ids, self.ends[0]]


def plain(example: Example) -> str:
    """Write a prompt without a chat template."""
    return f"{example.asked}\n\nAnswer:"


def instruct_corpus(corpus: str, cfg: DataConfig, tokenizer, block_size: int) -> Corpus:
    """Return the training and validation examples of instruct:PATH for windows of block_size
    tokens. ValueError where too few are as short."""
    template = Template(tokenizer, cfg.template)
    parts = split_examples(read_examples(corpus), cfg.val_fraction)
    splits = {}
    for split, examples in zip(("train", "val"), parts, strict=True):
        random.Random("instructions").shuffle(examples)
        header = {"corpus": label_of(corpus), "split": split}
        splits[split] = joined(examples, template, block_size, header)
        check_length(splits[split], block_size)
    return Corpus(**splits)


def joined(examples: list[Example], template: Template, block_size: int, header: dict) -> Examples:
    """Join the examples of at most block_size tokens."""
    ids: list[int] = []
    answers: list[bool] = []
    starts = []
    for example in examples:
        prompt = template.prompt(example)
        answer = template.answer(example)
        if len(prompt) + len(answer) > block_size:
            continue
        starts.append(len(ids))
        ids += [*prompt, *answer]
        answers += [False for _ in prompt] + [True for _ in answer]
    check(
        bool(starts),
        f"{header['corpus']}, {header['split']}: {len(examples)} examples",
        f"none has at most block_size={block_size} tokens",
        "give a larger --block_size",
    )
    stored = np.array(ids, dtype=np.int64)
    content = hashlib.sha256(stored.tobytes() + np.array(answers).tobytes()).hexdigest()
    return Examples(
        stored, np.array(answers), np.array(starts, dtype=np.int64), {**header, "sha256": content}
    )
