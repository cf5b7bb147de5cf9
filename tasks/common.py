"""What a task is, and what the tasks made of prompts have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import mean
from typing import Protocol

import torch
from torch import Tensor

from generate import generate
from loaders.device import autocast
from model import Transformer, evaluating
from selector import with_oracle
from storage.cache import KVCache
from storage.layout import at_least_float32


class Task(Protocol):
    """What eval.py asks a model, and what it needs to know about the answer.

    name, metric: as they are printed
    n: how many measurements the value is the mean of
    stored: ids (at most 4, T) int64 whose cache is measured
    query: tokens at the end of a prompt that are never compressed; None: the path's own window
    kl: mean divergence in nats of the last call's predictions from the reference's, or None
    text: what rows say of a text that is read: its corpus, split and sha256; None: there is none
    also (may be missing): a dict of what else rows say of the last call
    """

    name: str
    metric: str
    n: int
    stored: Tensor
    query: int | None
    kl: float | None
    text: dict | None

    def value(
        self, model: Transformer, batch_size: int, dtype: str, reference: bool = False
    ) -> float:
        """Measure the model; reference: later calls are compared with what this one predicts."""
        ...


class ThroughCache:
    """A model for `generate` that processes all of a prompt but its last tokens, and lets those
    read what is kept of the others.

    With an exact prefill the first token generated would otherwise come from whole values, and with
    it, in many tokenizers, the whole answer. A prompt of `last` tokens or fewer has no others: it
    reads whole values."""

    def __init__(self, model: Transformer, last: int = 1):
        self.model = model
        self.last = last

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def prefill(self, idx: Tensor, cache: KVCache, n_pad: Tensor | None = None) -> Tensor:
        """Return logits (B, 1, vocab) of the newest token; idx (B, T) int64, of which the first
        n_pad (B,) columns are padding."""
        C = idx.size(1) - self.last
        if C > 0:
            context = idx[:, :C]
            in_context = None if n_pad is None else n_pad.clamp_max(C)
            with with_oracle(self.model, context, C, in_context):
                self.model.prefill(context, cache, in_context)
            idx = idx[:, C:]
            n_pad = None if n_pad is None else n_pad - in_context
        if self.last == 1 and C > 0:
            return self.model.decode(idx, cache)
        return self.model.prefill(idx, cache, n_pad)


def score_given(
    model: Transformer,
    cache: KVCache,
    ids: Tensor,
    first: Tensor,
    last: Tensor,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read given tokens after a prompt, one of every sequence at a time, each stored as a generated
    token is. Return the log-probability (B,) float64 in nats of those from `first` to before
    `last`, and whether each of them is the likeliest, (B,) bool.

    ids: (B, T) int64; first, last: (B,) int64; logits: (B, vocab) of the first token; without them
    it is not scored, wherever `first` is"""
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    greedy = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for t in range(ids.size(1)):
        if t > 0:
            logits = model.decode(ids[:, t - 1 : t], cache)[:, -1]
        if logits is None:
            continue
        logits = at_least_float32(logits)
        counts = (first <= t) & (t < last)
        found = logits.log_softmax(-1).gather(1, ids[:, t : t + 1])[:, 0]
        total += torch.where(counts, found, 0.0)
        greedy &= ~counts | (logits.argmax(-1) == ids[:, t])
    return total, greedy


@dataclass(frozen=True)
class Prompts(ABC):
    """Prompts of token ids, of any lengths, with an answer each; the value is the mean score.

    The paths' window must be `query`. A task is a subclass with `scores`."""

    prompts: list[list[int]]
    answers: list
    query: int
    tokenizer: object
    kl = None
    text = None

    @property
    def n(self) -> int:
        return len(self.prompts)

    @property
    def stored(self) -> Tensor:
        """The first four prompts, cut at the front to the shortest of them."""
        return shortest_ends(self.prompts[:4])

    @abstractmethod
    def scores(self, model: Transformer, prompts: list[list[int]], answers: list) -> list[float]:
        """Score the prompts of a batch, each in [0, 1]."""

    def value(
        self, model: Transformer, batch_size: int, dtype: str, reference: bool = False
    ) -> float:
        device = model.norm.weight.device
        scores = []
        with evaluating(model), autocast(device, dtype):
            for i in range(0, len(self.prompts), batch_size):
                batch = slice(i, i + batch_size)
                scores += self.scores(model, self.prompts[batch], self.answers[batch])
        return mean(scores)


def shortest_ends(prompts: list[list[int]]) -> Tensor:
    """Return the last tokens of every prompt, as many as the shortest has, one at least:
    (prompts, T) int64."""
    T = min(map(len, prompts))
    return torch.tensor([p[-T:] for p in prompts])


@dataclass(frozen=True)
class Generated(Prompts):
    """Prompts continued greedily by `room` tokens through the packed cache. A task is a subclass
    with `score`."""

    room: int

    @abstractmethod
    def score(self, text: str, answer) -> float:
        """Score a continuation up to the end token, in [0, 1]."""

    def scores(
        self, model: Transformer, prompts: list[list[int]], answers: list, last: int = 1
    ) -> list[float]:
        """Score every prompt's continuation; last: tokens of the prompt that read the cache."""
        rows, _ = generate(ThroughCache(model, last), prompts, self.room, stop=self.tokenizer.eot)
        texts = [decoded(self.tokenizer, ids) for ids in rows]
        return [self.score(text, answer) for text, answer in zip(texts, answers, strict=True)]


def decoded(tokenizer, ids: list[int]) -> str:
    """Return the text of generated ids up to the first that the tokenizer does not have: a model's
    table may be longer than its vocabulary."""
    lacking = (n for n, i in enumerate(ids) if i >= tokenizer.vocab_size)
    return tokenizer.decode(ids[: next(lacking, len(ids))])
