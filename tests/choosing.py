"""Models that select, in float64, a prompt for them with rows of every length, and what they make
of it under settings of every kind."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import randomise, tiny_model, tokens

import kv_router
import selector
from config import ALLOCATIONS, SCOPES, SIGNALS, KVConfig, SelectConfig
from selection.training import fit_statistics
from storage.cache import KVCache

PREDICTORS = "predictor,expected_attention,predictor_query"
TOKEN_LEVEL = ("quest", "h2o", "streaming", "snapkv", "expected_attention", "keydiff")
BUDGETS = {
    "two_shares": dict(token_keep=0.5, value_keep=0.5),
    "joint": dict(kv_keep=0.3),
    "fixed_k": dict(token_keep=0.4, value_keep=0.5, fixed_k=True),
}
W = 9
T = 61
N = 5  # query region, prompt, tokens after it
PAD = (0, 7, 55)  # the last row is shorter than the query region
X = tokens(3, T, seed=4)
Y = tokens(3, N, seed=5)


def config(**cfg) -> SelectConfig:
    """Settings of these tests, and `cfg`."""
    return SelectConfig(
        **{
            **dict(
                relevance="observed",
                predictors=PREDICTORS,
                readers=20,
                observers=0,
                recall=0.0,
                sinks=2,
                hedge=0.4,
                allocation="layer",
            ),
            **cfg,
        }
    )


def selecting(
    scope: str = "head",
    prefill: str = "exact",
    fold: bool = True,
    model=None,
    cfg: SelectConfig | None = None,
    **kv,
):
    """A calibrated model in float64 whose predictors are random; all choices of config() can be
    set."""
    m = model or tiny_model()
    kv = KVConfig(
        **{
            **dict(kv="select", mask_scope=scope, prefill=prefill, kv_tail=W, value_basis="pca"),
            **kv,
        }
    )
    batches = [tokens(2, 70, seed=1), tokens(1, 66, seed=2)]
    selector.attach(m, kv, cfg or config(), batches)
    fit_statistics(m, batches)
    torch.manual_seed(8)
    for p in m.selector.predictors.values():
        randomise(p, 0.3)
    m.selector.double()
    return kv_router.fold(m) if fold else m


@functools.cache
def made(scope: str = "head", prefill: str = "exact", fold: bool = True):
    """selecting(...), made once; only its settings change."""
    return selecting(scope, prefill, fold)


def prefilled(m, x=X, pad=PAD, more: int = N) -> KVCache:
    """A cache that read the prompt x, with room for `more` tokens."""
    cache = m.new_cache(len(x), x.size(1) + more)
    with torch.no_grad():
        m.prefill(x, cache, torch.tensor(pad) if pad and any(pad) else None)
    return cache


def run(m, cfg: SelectConfig, x=X, y=Y, pad=PAD):
    """Logits of the prompt x and of y after it, the choice (None where there was no context) and
    the cache."""
    m.selector.set(cfg)
    pad = torch.tensor(pad) if pad and any(pad) else None
    m.selector.keeps_choice = True
    m.selector.chosen = None
    with torch.no_grad(), selector.with_oracle(m, torch.cat((x, y), 1), x.size(1), pad):
        cache = m.new_cache(len(x), x.size(1) + y.size(1) + 3)
        prompt = m.prefill(x, cache, pad, last_only=False)
        return prompt, m.prefill(y, cache, last_only=False), m.selector.chosen, cache


def real(logits: torch.Tensor, pad=PAD) -> torch.Tensor:
    """Prompt logits of the columns that are no padding, of all rows: (n, vocab)."""
    return torch.cat([logits[b, first:] for b, first in enumerate(pad)])


def settings(scope: str, prefill: str):
    """Every allocation with every way to spend a budget and every signal, and a token-level one
    beside each."""
    for allocation, (name, budget) in itertools.product(ALLOCATIONS, BUDGETS.items()):
        if allocation == "global" and prefill == "routed" and scope != "shared":
            continue
        for i, relevance in enumerate(SIGNALS):
            token = TOKEN_LEVEL[(i + len(allocation)) % 5] if i % 2 and name != "joint" else ""
            yield config(
                relevance=relevance, token_relevance=token, allocation=allocation, **budget
            )


ALL = pytest.mark.parametrize(
    ("scope", "prefill"), [(s, p) for s in SCOPES for p in ("exact", "routed")], ids=lambda s: s
)


@functools.cache
def dense():
    """Logits (prompt, continuation) of the same model with whole values, computed without a
    cache."""
    with torch.no_grad():
        full = tiny_model()(torch.cat((X, Y), 1), pad=torch.tensor(PAD))
    return full[:, :T], full[:, T:]
