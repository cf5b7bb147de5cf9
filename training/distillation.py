"""What a model learns from itself: predictions of the one that reads everything whole are the
target of the one that reads what is stored.

Value groups are read as routed at every token. A selection is made once, of a prompt: so a window
is cut into a context, which is compressed as eval.py and sample.py do it, rounded and dropped, and
its continuation, whose tokens read that as generated ones do. What is stored is a constant:
adapters learn from the continuation's own queries, keys and values alone. They are on while the
prompt is read, too: a trained adapter is one like any other, and can be merged. Maps of a value
basis are trained where they read what is stored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kv_router
import lora
from config import KVConfig
from model import Transformer, evaluating
from selector import selector_of
from storage.layout import at_least_float32


def mean_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean KL in nats from the log-probabilities `target` to logits, (B, T, vocab)
    both: ()."""
    got = at_least_float32(logits).log_softmax(-1)
    return F.kl_div(got, target, reduction="none", log_target=True).sum(-1).mean()


def distillation_loss(model: Transformer, kv: KVConfig, forward: Callable, x: Tensor) -> Tensor:
    """Return the mean KL in nats from the model that reads whole values (no gradient) to itself
    with those that kv routes, over the tokens of x (B, T). forward: the model, perhaps compiled."""
    with torch.no_grad():
        kv_router.set_kept(model, kv.n_groups, whole=True)
        target = at_least_float32(forward(x)).log_softmax(-1)
        kv_router.set_kept(model, kv.topk_groups)
    return mean_divergence(forward(x), target)


def by_budget(x: Tensor, budgets: list[float]) -> dict[float, Tensor]:
    """Return windows x (B, T) by the one of the budgets that each draws by its own tokens."""
    drawn: dict[float, list[Tensor]] = {}
    for window in x:
        budget = random.Random(f"budget {window.tolist()}").choice(budgets)
        drawn.setdefault(budget, []).append(window)
    return {budget: torch.stack(windows) for budget, windows in drawn.items()}


def of_one_budget(
    parts: Iterable[tuple[Tensor, Tensor]], budgets: list[float]
) -> Iterator[tuple[Tensor, Tensor, float | None]]:
    """Yield micro-batches x, y (b, T), each cut into windows that draw the same one of the budgets,
    with that; without budgets as they are, with None. A router's balance is that of its last
    forward, so each of these has a loss and a backward pass of its own."""
    for x, y in parts:
        if not budgets:
            yield x, y, None
            continue
        for budget, windows in by_budget(x, budgets).items():
            yield windows, windows, budget  # a model's own predictions are the target


def continuation_loss(model: Transformer, x: Tensor, kv_bytes: float, n_context: int) -> Tensor:
    """Return the mean KL in nats from the model without its adapters, which reads everything whole
    (no gradient), to itself, with adapters, over the tokens of windows x (B, T) after the first
    n_context. Those are stored, without gradient, in kv_bytes, a share of their bytes."""
    selector = selector_of(model)
    selector.set(replace(selector.cfg, kv_bytes=kv_bytes))
    with evaluating(model):
        with lora.switched_off(model):
            whole = model(x)[:, n_context:]
        target = at_least_float32(whole).log_softmax(-1)
        cache = model.new_cache(*x.shape)
        model.prefill(x[:, :n_context], cache)
    logits = model.prefill(x[:, n_context:], cache, last_only=False)
    return mean_divergence(logits, target)
