"""Instructions followed: a prompt is compressed, its last token reads the cache, the answer is
generated greedily through it and compared with the right one by ROUGE-L.

    python eval.py --init_from=model.gguf --tasks=instruct --dataset=instruct:test.jsonl \\
        --block_size=1024 --methods=dense,select --kv_byte_budgets=0.25,0.125 \\
        --calibrate=wikitext2
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import mean

from generate import generate
from loaders.instructions import Example, Template, read_examples, split_examples
from model import Transformer
from settings.fields import check
from tasks.common import Prompts, ThroughCache, decoded
from tasks.rouge import rouge_l


@dataclass(frozen=True)
class Instruct(Prompts):
    """Mean ROUGE-L (F-measure, words not stemmed) of answers of at most `room` tokens (answers:
    Examples).

    ends: ids that end an answer
    left_out: examples that were too long
    split: val: of the part that the run's training held out; all: of the whole file
    found: scores of the last call by the examples' tasks"""

    room: int
    ends: list[int]
    left_out: int
    split: str = "all"
    found: dict[str, list[float]] = field(default_factory=dict, compare=False, repr=False)
    name = "instruct"
    metric = "ROUGE-L"

    @property
    def also(self) -> dict:
        """by_task: means of the last call; left_out; split."""
        means = {task: mean(scores) for task, scores in sorted(self.found.items())}
        return {"by_task": means, "left_out": self.left_out, "split": self.split}

    def value(
        self, model: Transformer, batch_size: int, dtype: str, reference: bool = False
    ) -> float:
        self.found.clear()
        return super().value(model, batch_size, dtype, reference)

    def scores(
        self, model: Transformer, prompts: list[list[int]], answers: list[Example]
    ) -> list[float]:
        rows, _ = generate(ThroughCache(model), prompts, self.room, stop=self.ends)
        scores = []
        for ids, right in zip(rows, answers, strict=True):
            scores.append(rouge_l(self.text_of(ids), right.output))
            self.found.setdefault(right.task, []).append(scores[-1])
        return scores

    def text_of(self, ids: list[int]) -> str:
        """Return what was answered, without what ends it."""
        ended = (n for n, i in enumerate(ids) if i in self.ends)
        return decoded(self.tokenizer, ids[: next(ended, len(ids))])


def instruct(
    tokenizer,
    length: int,
    n: int,
    seed: int,
    query: int,
    corpus: str,
    template: str,
    room: int,
    held_out: float = 0.0,
) -> Instruct:
    """Draw at most n examples of instruct:PATH by the seed, of those whose prompts leave `room` of
    `length` tokens. ValueError where there is none.

    held_out: share of the file that training held out, and all that is drawn from; 0: all of it"""
    asking = Template(tokenizer, template)
    examples = read_examples(corpus)
    if held_out:
        _, examples = split_examples(examples, held_out)
    every = [(asking.prompt(example), example) for example in examples]
    short = [(ids, example) for ids, example in every if len(ids) + room <= length]
    check(
        bool(short),
        f"{corpus}: prompts of {min(len(ids) for ids, _ in every)} tokens or more",
        f"a prompt and {room} tokens of answer have at most {length}",
        "give a larger --block_size, or a smaller --answer_tokens",
    )
    random.Random(f"instruct {seed}").shuffle(short)
    drawn = sorted(short[:n], key=lambda pair: len(pair[0]))  # those of a batch are about as long
    return Instruct(
        prompts=[ids for ids, _ in drawn],
        answers=[example for _, example in drawn],
        query=query,
        tokenizer=tokenizer,
        room=room,
        ends=asking.ends,
        left_out=len(every) - len(short),
        split="val" if held_out else "all",
    )
