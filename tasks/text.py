"""Text that is read: how well a model predicts a corpus, every token of it (perplexity), or the
continuation of a compressed context."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from data import TokenFile
from loaders.device import autocast
from loaders.examples import LEFT_OUT
from model import Transformer, evaluating
from selector import with_oracle
from training.loss import lm_loss, token_losses

# Sequences of a continuation whose predictions are kept: 25 MB each with 49,152 tokens.
KL_SEQUENCES = 16


class Text(NamedTuple):
    """A text that is read: its tokens, and what rows say of it, its corpus (str), its split (str)
    and the sha256 of its content (str)."""

    tokens: TokenFile
    about: dict


def answers_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean over sequences of their mean loss in nats over targets y (B, T) that are not
    LEFT_OUT, logits (B, T, vocab): a batch may be cut anyhow. A sequence without targets has 0."""
    losses = token_losses(logits, y)
    n_targets = (y != LEFT_OUT).sum(1).clamp_min(1)
    return (losses.sum(1) / n_targets).mean()


def mean_loss(
    model: Transformer, x: Tensor, y: Tensor, batch_size: int, dtype: str = "float32"
) -> float:
    """Return the mean next-token loss in nats, decode mode, batch_size sequences at a time; of
    examples answers_loss.

    x, y: ids and the ids that follow them, (n, T) int64"""
    loss = answers_loss if (y == LEFT_OUT).any() else lm_loss
    device = model.norm.weight.device
    total = 0.0
    with evaluating(model):
        for i in range(0, len(x), batch_size):
            xb = x[i : i + batch_size].to(device)
            yb = y[i : i + batch_size].to(device)
            with autocast(device, dtype):
                total += loss(model(xb), yb).item() * len(xb)
    return total / len(x)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss over x, y (n, T) int64, decode mode; text: what rows say of
    the text they come from."""

    x: Tensor
    y: Tensor
    text: dict | None = None
    name = "perplexity"
    metric = "perplexity"
    query = None
    kl = None

    @property
    def n(self) -> int:
        return self.x.numel()

    @property
    def stored(self) -> Tensor:
        """Sequences whose cache is measured."""
        return self.x[:4]

    def value(
        self, model: Transformer, batch_size: int, dtype: str, reference: bool = False
    ) -> float:
        return math.exp(mean_loss(model, self.x, self.y, batch_size, dtype))


@dataclass(frozen=True)
class Continuation:
    """Mean loss in nats of the text that follows a compressed context, through the packed cache.

    A context of T - query - last tokens is processed exactly and then compressed, `query` tokens
    stay whole, and `last` tokens read both, one by one, each stored as a generated token is: it is
    their loss (the first of them is predicted by nobody). The paths' window must be `query`.

    A loss varies with the token that happened to come, a divergence from the reference's
    predictions does not: it tells settings apart whose losses differ by less than chance.

    x: ids (n, T) int64
    text: what rows say of the text they come from
    seen: log-probabilities of the reference for the first KL_SEQUENCES, and the last call's kl
    """

    x: Tensor
    query: int
    last: int
    text: dict | None = None
    seen: dict = field(default_factory=dict, compare=False, repr=False)
    name = "continuation"
    metric = "loss"

    @property
    def n(self) -> int:
        return len(self.x) * (self.last - 1)

    @property
    def stored(self) -> Tensor:
        return self.x[:4, : -self.last]

    @property
    def kl(self) -> float | None:
        """Mean KL divergence in nats of the last call's predictions from the reference's, where
        those came before."""
        return self.seen.get("kl")

    def value(
        self, model: Transformer, batch_size: int, dtype: str, reference: bool = False
    ) -> float:
        device = model.norm.weight.device
        known = [] if reference else self.seen.get("reference")
        divergences = []
        total = 0.0
        with evaluating(model), autocast(device, dtype):
            for start in range(0, len(self.x), batch_size):
                x = self.x[start : start + batch_size].to(device)
                logits = self.predict(model, x)
                total += lm_loss(logits, x[:, 1 - self.last :]).item() * len(x)
                kept = logits[: max(0, KL_SEQUENCES - start)]
                if reference:
                    known += [row.float().log_softmax(-1).cpu() for row in kept]
                elif known is not None:
                    pairs = zip(known[start : start + len(kept)], kept, strict=True)
                    divergences += [divergence(was, row) for was, row in pairs]
        self.seen["reference"] = known
        self.seen["kl"] = mean(divergences) if divergences else None
        return total / len(self.x)

    def predict(self, model: Transformer, x: Tensor) -> Tensor:
        """Return the logits (B, last - 1, vocab) of the last tokens but the first, x (B, T), read
        one by one as generation does."""
        T = x.size(1)
        cache = model.new_cache(*x.shape)
        with with_oracle(model, x, T - self.last):
            model.prefill(x[:, : -self.last], cache)
        steps = [model.decode(x[:, t : t + 1], cache) for t in range(T - self.last, T - 1)]
        return torch.cat(steps, 1)


def divergence(was: Tensor, logits: Tensor) -> float:
    """Return the mean KL divergence in nats of logits (T, vocab) from the log-probabilities `was`
    (T, vocab)."""
    log_p = logits.float().log_softmax(-1)
    was = was.to(log_p.device)
    return (was.exp() * (was - log_p)).sum(-1).mean().item()
