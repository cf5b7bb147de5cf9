"""Zero-shot choice: the answer to which a model gives the largest log-likelihood (tasks/items.py
has the files).

A prompt is compressed first; then its last token, or with question=unseen its question, and the
answer are read token by token from what is kept, as generated tokens are, and the log-likelihoods
of the answer's tokens are added up. The evaluation harness calls the share of right answers by
that sum acc, by the sum over the answer's characters acc_norm; rows have both, and by bytes.

    python eval.py --init_from=model.gguf --tasks=zero_shot --items=piqa.jsonl,arc_easy.jsonl \\
        --query=4 --methods=dense,select --kv_byte_budgets=0.25,0.125 --calibrate=wikitext2
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from loaders.device import autocast
from loaders.tokenizer import encoded
from model import Transformer, evaluating
from settings.fields import check
from tasks.common import score_given, shortest_ends
from tasks.items import Item, Option, read_items
from tasks.recall import compressed


class Request(NamedTuple):
    """Ids of a prompt, which is compressed, of what is read after it, one at least, and of the
    answer, whose log-likelihood is asked for."""

    prompt: list[int]
    given: list[int]
    answer: list[int]


class Scored(NamedTuple):
    """The log-likelihood of an answer in nats, and whether each of its tokens is the likeliest."""

    loglik: float
    greedy: bool


@dataclass(frozen=True)
class ZeroShot:
    """Share of items whose right answer has the largest log-likelihood per character; of equals the
    first counts. An item with one answer is right where greedy decoding gives it.

    requests: those of every item's options
    seen: what else the last call measured: `also`"""

    name: str
    items: list[Item]
    requests: list[list[Request]]
    query: int
    seen: dict = field(default_factory=dict, compare=False, repr=False)
    metric = "accuracy"
    kl = None
    text = None

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def prompts(self) -> list[list[int]]:
        """What is compressed of every item's first option."""
        return [options[0].prompt for options in self.requests]

    @property
    def stored(self) -> Tensor:
        """Four prompts of middle length among those longer than the query, cut at the front to the
        shortest of them."""
        prompts = sorted(self.prompts, key=len)
        prompts = [p for p in prompts if len(p) > self.query] or prompts
        start = max(0, len(prompts) // 2 - 2)
        return shortest_ends(prompts[start : start + 4])

    @property
    def also(self) -> dict:
        """accuracies by total, characters and bytes; right_nats: mean of the right answers'
        negative log-likelihoods, in nats; with_context: items of whose first option more than the
        query is compressed."""
        with_context = sum(len(prompt) > self.query for prompt in self.prompts)
        return {**self.seen, "with_context": with_context}

    def value(
        self, model: Transformer, batch_size: int, dtype: str, reference: bool = False
    ) -> float:
        flat = [request for requests in self.requests for request in requests]
        # those of a batch have about as many steps, and then about as long prompts
        order = sorted(range(len(flat)), key=lambda i: (steps_of(flat[i]), len(flat[i].prompt)))
        scored: dict[int, Scored] = {}
        with evaluating(model), autocast(model.norm.weight.device, dtype):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                found = score_requests(model, [flat[i] for i in rows])
                scored.update(zip(rows, found, strict=True))
        every = iter(scored[i] for i in range(len(flat)))
        by_item = [[next(every) for _ in requests] for requests in self.requests]
        self.seen.clear()
        self.seen.update(accuracies(self.items, by_item))
        return self.seen["accuracies"]["characters"]


def steps_of(request: Request) -> int:
    """Count the tokens that are read one by one."""
    return len(request.given) + len(request.answer) - 1


def accuracies(items: list[Item], scored: list[list[Scored]]) -> dict:
    """Return {"accuracies": by total, characters and bytes, "right_nats": mean over items}."""
    right = {"total": [], "characters": [], "bytes": []}
    nats = []
    for item, options in zip(items, scored, strict=True):
        nats.append(-options[item.right].loglik)
        for norm, found in right.items():
            if len(options) == 1:
                found.append(options[0].greedy)
                continue
            texts = [option.answer for option in item.options]
            by_norm = [s.loglik / size_of(t, norm) for s, t in zip(options, texts, strict=True)]
            found.append(by_norm.index(max(by_norm)) == item.right)
    return {
        "accuracies": {norm: mean(map(float, found)) for norm, found in right.items()},
        "right_nats": mean(nats),
    }


def size_of(answer: str, norm: str) -> int:
    """Return what a log-likelihood is divided by."""
    if norm == "total":
        return 1
    return len(answer if norm == "characters" else answer.encode("utf-8"))


def score_requests(model: Transformer, requests: list[Request]) -> list[Scored]:
    """Compress the prompts and read on, one token of every sequence at a time, each stored as a
    generated token is."""
    rows = [r.given + r.answer for r in requests]
    T = max(map(len, rows))
    logits, cache = compressed(model, [r.prompt for r in requests], T)
    device = model.norm.weight.device
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # (B, T)
    first = torch.tensor([len(r.given) for r in requests], device=device)  # of the answer's tokens
    last = torch.tensor([len(row) for row in rows], device=device)
    total, greedy = score_given(model, cache, ids, first, last, logits[:, -1])
    return [Scored(s, g) for s, g in zip(total.tolist(), greedy.tolist(), strict=True)]


# ----------------------------------------------------------------------------- requests


def zero_shot(
    tokenizer, length: int, n: int, seed: int, query: int, path: str, question: str = "seen"
) -> ZeroShot:
    """Draw at most n of a file's items by the seed. ValueError for one that is longer than `length`
    tokens.

    question: seen: it is compressed with its context, all but the last token; unseen: it is read
        after the context alone was compressed"""
    items = read_items(Path(path))
    random.Random(f"zero_shot {seed}").shuffle(items)
    items = items[:n]
    requests = [[request(tokenizer, o, question) for o in item.options] for item in items]
    longest = max(sum(map(len, r)) for of_item in requests for r in of_item)
    check(
        longest <= length,
        f"{path}: an item of {longest} tokens",
        f"a prompt and its answer have at most {length}",
        "give a larger --block_size",
    )
    check(
        question == "seen" or any(len(r.prompt) > query for of_item in requests for r in of_item),
        f"{path} with question=unseen and query={query}",
        "no item has so many tokens before its last sentence",
        "give --question=seen, or a smaller --query",
    )
    return ZeroShot(Path(path).stem, items, requests, query)


def request(tokenizer, option: Option, question: str) -> Request:
    """Encode an option as the harness does: prompt and answer as one, parted where the prompt alone
    ends; blanks at the prompt's end are the answer's."""
    prompt = option.context + option.question
    bare = prompt.rstrip()
    before = encoded(tokenizer, bare)
    whole = encoded(tokenizer, f"{bare}{prompt[len(bare) :] or ' '}{option.answer}")
    n_context = len(encoded(tokenizer, option.context)) if option.context else 0
    # a token at least is compressed, one reads it if there are two, one at least is scored
    n_before = min(len(before), len(whole) - 1)
    n_compressed = min(n_context, n_before - 1) if question == "unseen" else n_before - 1
    n_compressed = max(1, n_compressed)
    check(n_before > 0, f"{prompt!r}", "a token before an answer is needed", "ask more")
    return Request(whole[:n_compressed], whole[n_compressed:n_before], whole[n_before:])
