"""Rivals that drop whole tokens, as they were published: what each of them scores a prompt's tokens
by. selector.py keeps the tokens of the largest scores.

They stand beside the project's own signals (selection/relevance.py) and are chosen by the same
flag, --token_relevance. Each ranks tokens by its score alone. Unless flags say otherwise eval.py
gives each the allocation and the first tokens of its paper (`PUBLISHED` in config.py).

What all of them share here, and differ in from their papers: they choose once, after an exact
prefill of the prompt. The query region and everything generated stay whole, and are counted beside
the budget. Scores belong to KV heads: those of query heads that share a KV head are averaged (as in
Expected Attention), where H2O's and SnapKV's papers choose for every query head.

Quest, which keeps every token and chooses what to read, is in baselines/quest.py; `quest` below is
what its pages are worth to a method that drops tokens.

Letters: selection/relevance.py. All scores are float32, at least 0, for context columns only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.pages import PAGE, logit_bounds, page_bounds
from config import SelectConfig, count_kept
from model import apply_rope
from selection.relevance import NEVER, Prompt, norms, pooled
from storage.layout import at_least_float32, cdiv

WINDOW = 32  # queries that snapkv observes
POOL = 7  # tokens over which snapkv pools
FUTURE = 512  # positions after the prompt over which expected_attention_closed averages RoPE


def token_number(prompt: Prompt) -> Tensor:
    """Count each row's own tokens from 0: (B or 1, C) int64, 0 for padding."""
    return (prompt.column[: prompt.n_context] - prompt.start).clamp_min(0)


def newest_first(prompt: Prompt, score: Tensor, n: Tensor | int) -> Tensor:
    """Put the last n context tokens of every row above all others, the newest first, whatever their
    scores (L, B, Hkv, C) are; no score is above T. n: one number, or (B, 1)."""
    C = prompt.n_context
    to_the_end = C - prompt.column[:C]
    new = prompt.valid & (to_the_end <= n)  # (B, C)
    n_tokens = prompt.T - prompt.start
    above = n_tokens + token_number(prompt) + 1.0  # (B or 1, C)
    return torch.where(new[:, None], above[:, None], score)


def streaming(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): the newest tokens; the first four, its attention sinks, are
    kept by cfg.sinks. The same for every head: (1, B, 1, C).

    Differs: kept tokens keep their positions in the text, where the paper counts them anew within
    the cache."""
    score = (token_number(prompt) + 1.0) * prompt.valid  # (B, C)
    return score[None, :, None]


def snapkv(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """SnapKV (arXiv 2404.14469): attention of the prompt's last WINDOW queries, max-pooled over
    POOL tokens (both as in the authors' runs on LongBench). The window itself stays, as part of the
    budget, and is no part of what is pooled.

    Differs: a budget smaller than the window, which the paper does not allow, keeps the newest."""
    C = prompt.n_context
    first = max(0, prompt.T - WINDOW)
    observing = prompt.column[first:]
    asks = prompt.real[:, first:].float()
    attention = prompt.causal(observing, asks)
    before = prompt.column[:C] < first
    score = pooled(attention * before, POOL) * before
    n_window = max(0, C - first)
    return newest_first(prompt, score, n_window)


def h2o(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """H2O (arXiv 2306.14048): attention accumulated over all queries of the prompt; half of the
    budget goes to the newest tokens.

    Differs: nothing is dropped while the prompt is read, so that a query's attention is over all
    earlier tokens; the paper's cache drops a token at every step, during generation, too."""
    total = 0.0
    for columns in prompt.column.split(512):
        asks = prompt.real[:, columns]
        mean = prompt.causal(columns, asks.float())
        n_queries = asks.sum(-1)
        total = total + mean * n_queries[:, None, None]
    recent = []
    for n_tokens in prompt.valid.sum(-1).tolist():
        budget = count_kept(cfg.token_keep, n_tokens, 1) if n_tokens else 0
        recent.append(budget // 2)
    recent = torch.tensor(recent, device=prompt.column.device)
    return newest_first(prompt, total, recent[:, None])


def tova(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """TOVA (arXiv 2401.06104): attention of the prompt's last query, its mean over the heads of a
    layer: all heads of a layer keep the same tokens. (L, B, 1, C).

    Differs: the paper drops the token of least attention at every step, so that what the last query
    would have read may be gone before; here it reads the whole prompt."""
    return prompt.causal(prompt.column[-1:]).mean(2, keepdim=True)


def keydiff(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """KeyDiff (arXiv 2504.15364): keys that are least like the others: 1 less the cosine of a key
    and the mean of the prompt's keys, each scaled to norm 1. Nobody's query is asked.

    Differs: the mean is over the whole prompt, query region included, where the paper reads a
    prompt in blocks and drops tokens after each of them."""
    scores = []
    real = prompt.real[:, None, :, None]
    for k in prompt.k:
        unit = F.normalize(at_least_float32(k), dim=-1)  # (B, Hkv, T, D)
        total = (unit * real).sum(2, keepdim=True)
        anchor = F.normalize(total, dim=-1)  # a sum points where the mean does
        cosine = (unit * anchor).sum(-1)
        score = 1 - cosine[..., : prompt.n_context]
        scores.append(score.clamp_min(0).float())
    return torch.stack(scores) * prompt.valid[:, None]


def expected_attention_closed(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Expected Attention (arXiv 2510.00636), the closed form: queries to come are Gaussian, so that

        E[exp(q . k / sqrt(D))] = exp(mu . k / sqrt(D) + k^T Sigma k / (2 D)),

    with mean mu and covariance Sigma of the prompt's queries before RoPE, turned by the mean of the
    rotations at the FUTURE positions after the prompt. Scores are shares of that among the context,
    a mean over the query heads of a KV head, times the value's norm. The first cfg.sinks tokens are
    left out of all of it: they are kept anyway.

    Differs: the value's norm is taken in the coordinates that are cut into groups: in the output
    basis that is the norm of what W_o writes, in the native one the value's own. Positions past the
    model's context are left out of the mean rotation.

    Budgets are those of the authors' library by its defaults (kvpress, ExpectedAttentionPress):
    every KV head of a layer keeps as many tokens as the others, the first four among them
    (n_sink), and nothing is added to a share before the norm (epsilon = 0). Their leaderboard's
    entry adds 0.01 and lets the heads of a layer share one budget (AdaKVPress, which leaves every
    head a part of its own): --allocation=layer is the nearest here. (`expected_attention`, without
    `_closed`, is this project's trained network.)"""
    number = (prompt.column - prompt.start).clamp_min(0)  # (B or 1, T)
    counted = prompt.real & (number >= cfg.sinks)
    only_first = ~counted.any(-1, keepdim=True)  # rows that have no other tokens
    counted = torch.where(only_first, prompt.real, counted)
    n_counted = counted.sum(-1, keepdim=True).clamp_min(1)
    weight = counted / n_counted  # (B, T)
    cos, sin = (t[number].unsqueeze(1) for t in prompt.rope)  # (B or 1, 1, T, D/2)
    ahead = mean_rotation(prompt)
    scored = prompt.valid & (number[:, : prompt.n_context] >= cfg.sinks)
    out = []
    for q, k, value in zip(prompt.q, prompt.k, prompt.values, strict=True):
        q = apply_rope(at_least_float32(q), cos, -sin)  # before RoPE
        w = weight[:, None, :, None].to(q.dtype)
        mean = (q * w).sum(2, keepdim=True)  # (B, H, 1, D)
        off = q - mean
        spread = (off * w).mT @ off  # (B, H, D, D)
        mean = apply_rope(mean, *ahead)
        half = apply_rope(spread, *ahead)  # turns rows, then columns
        spread = apply_rope(half.mT, *ahead)
        context = k[:, :, : prompt.n_context].to(q.dtype)
        share = gaussian_share(context, mean, spread, scored)
        out.append(share.float() * norms(value))
    return torch.stack(out)


def mean_rotation(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Average cos and sin over the FUTURE positions after each row's prompt that the model's
    context has, or take its last one: (B or 1, 1, 1, D/2) twice."""
    last = len(prompt.rope[0]) - 1
    ahead = torch.arange(FUTURE, device=prompt.column.device)
    place = prompt.T - prompt.start + ahead
    fits = place <= last
    fits[:, 0] = True
    weight = fits / fits.sum(-1, keepdim=True)  # (B or 1, FUTURE)
    place = place.clamp_max(last)
    means = []
    for table in prompt.rope:
        turned = table[place] * weight.unsqueeze(-1)  # (B or 1, FUTURE, D/2)
        means.append(turned.sum(1)[:, None, None])
    return tuple(means)


def gaussian_share(k: Tensor, mean: Tensor, spread: Tensor, scored: Tensor) -> Tensor:
    """Return each key's share of exp(mean . k / sqrt(D) + k^T spread k / (2 D)), a mean over the
    query heads of a KV head: (B, Hkv, C), 0 where not scored.

    k (B, Hkv, C, D); mean (B, H, 1, D); spread (B, H, D, D); scored (B, C) bool"""
    Hkv = k.size(1)
    D = k.size(-1)
    k = k.unsqueeze(2)  # (B, Hkv, 1, C, D)
    mean = mean.unflatten(1, (Hkv, -1))  # (B, Hkv, n, 1, D)
    spread = spread.unflatten(1, (Hkv, -1))
    linear = (k * mean).sum(-1)  # (B, Hkv, n, C)
    quadratic = ((k @ spread) * k).sum(-1)
    logit = linear * D**-0.5 + quadratic / (2 * D)
    hidden = ~scored[:, None, None]
    share = logit.masked_fill(hidden, NEVER).softmax(-1)
    share = share.masked_fill(hidden, 0)
    return share.mean(2)


def quest(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Quest's pages (arXiv 2406.10774) as a reason to drop tokens: pages of PAGE tokens by an upper
    bound on what the query region's logits can be in them, as shares; a page's tokens score alike.

    Differs: the paper drops nothing, and picks pages anew for every query. That is
    baselines/quest.py."""
    C = prompt.n_context
    k = prompt.keys[..., :C, :].float()
    number = token_number(prompt)
    low, high = page_bounds(k, number, prompt.valid, cdiv(C, PAGE))  # (L, B, Hkv, P, D)
    q = prompt.queries(prompt.column[C:]).float()  # (L, B, H, W, D)
    q = q.unflatten(2, (k.size(2), -1)).flatten(3, 4)  # (L, B, Hkv, n W, D)
    empty = low.isinf().any(-1).unsqueeze(-2)
    bound = logit_bounds(q, low, high).masked_fill(empty, NEVER)
    share = bound.softmax(-1).mean(-2)  # (L, B, Hkv, P)
    page = (number // PAGE)[:, None].expand(k.shape[:-1])
    return share.gather(-1, page) * prompt.valid[:, None]


TOKEN_LEVEL: dict[str, Callable[[Prompt, SelectConfig], Tensor]] = {
    f.__name__: f for f in (quest, h2o, streaming, snapkv, tova, keydiff, expected_attention_closed)
}
# tokens are ranked by the signal alone, not by value norms too
AS_PUBLISHED = (*TOKEN_LEVEL, "expected_attention")
# one set of tokens serves all heads of a layer, where a layer shares its budget
ONE_FOR_A_LAYER = ("tova",)
