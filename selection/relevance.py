"""How much will each token of a prompt be read by what follows? The signals behind selector.py,
from none to trained ones.

`observed` is the attention of the query region, the prompt's last tokens. `oracle` is that of the
tokens that follow, from a pass that has seen them: an upper bound, not a method. `future` lets the
queries of earlier tokens stand for those to come, moved to the positions after the prompt
(training-free; compare Expected Attention, arXiv 2510.00636). Token-level: h2o (2306.14048),
streaming (2309.17453), snapkv (2404.14469), quest (2406.10774: pages of 16, bounded by the least
and largest of each key dimension).

Trained (train.py --stage=select): `predictor` (arXiv 2604.21335, 3.2) reads a token's hidden state
alone: it **never sees the query**, so what it keeps is the same for every question.
`expected_attention` is the same with one output. `predictor_query` is ours: per layer and KV head a
small network over what the prompt already shows (observed and future attention, norms, distance),
plus the token's hidden state, plus a product of its key with a summary of the query region.

Letters: L compressed layers, B batch, C context tokens, W query region, T = C + W, H, Hkv heads, D
head dimension, S groups, E width. All scores are float32, for context columns only; those of
padding columns mean nothing, and selector.py never keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import SelectConfig, check, count_kept
from model import apply_rope

SPAN = 1024  # last tokens whose queries are drawn: of the context by `future`, of all by `moment`
READ = 128  # tokens after the prompt whose queries `moment` stands for
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many there are
PAGE = 16  # tokens in a page (quest)
WINDOW = 64  # queries that snapkv observes
CHUNK = 1 << 28  # attention weights formed at a time
# a logit that gets no weight; finite, so that a padding query, which may read nothing, gives no NaN
NEVER = -1e30
NOBODY_ASKS = (
    "a query region of 0 tokens: relevance needs somebody who asks; "
    "give --query or --kv_tail of 1 or more"
)
TINY = 1e-9  # below this a share of attention counts as none


@dataclass(frozen=True)
class Prompt:
    """What the compressed layers saw of a prompt: lists with a tensor per layer.

    The last W = T - n_context columns are the query region."""

    x: Sequence[Tensor]  # (B, T, E)
    q: Sequence[Tensor]  # (B, H, T, D)
    k: Sequence[Tensor]  # (B, Hkv, T, D)
    z: Sequence[Tensor]  # (B, Hkv, C, D)
    n_context: int
    pad: Tensor | None  # (B,) left padding
    rope: tuple[Tensor, Tensor]  # the model's tables
    oracle: Tensor | None = None  # (L, B, Hkv, C), attention from a diagnostic pass
    first: int = 0  # which compressed layer the lists begin with
    n_groups: int = 1  # groups that a value is cut into

    @cached_property
    def L(self) -> int:
        return len(self.k)

    @cached_property
    def T(self) -> int:
        return self.k[0].size(2)

    @cached_property
    def column(self) -> Tensor:
        return torch.arange(self.T, device=self.k[0].device)

    @cached_property
    def real(self) -> Tensor:
        """False for padding: (B, T) bool."""
        if self.pad is None:
            return torch.ones(self.k[0].size(0), self.T, dtype=torch.bool, device=self.k[0].device)
        return self.column >= self.pad[:, None]

    @cached_property
    def valid(self) -> Tensor:
        """Context columns that are no padding: (B, C) bool."""
        return self.real[:, : self.n_context]

    @cached_property
    def layers(self) -> slice:
        """Which of all compressed layers these are."""
        return slice(self.first, self.first + self.L)

    @cached_property
    def start(self) -> Tensor:
        """Column of each row's first token: (B or 1, 1) int64."""
        return self.column[:1, None] if self.pad is None else self.pad[:, None]

    @cached_property
    def keys(self) -> Tensor:
        """(L, B, Hkv, T, D)."""
        return torch.stack(self.k)

    @cached_property
    def values(self) -> Tensor:
        """(L, B, Hkv, C, D), encoded."""
        return torch.stack(tuple(self.z))

    @cached_property
    def norms(self) -> Tensor:
        """Norms of the values' groups: (L, B, Hkv, C, S)."""
        return norms(self.values.unflatten(-1, (self.n_groups, -1)))

    @cached_property
    def observed(self) -> Tensor:
        """Mean attention of the query region on the context: (L, B, Hkv, C)."""
        if self.n_context == self.T:
            raise ValueError(NOBODY_ASKS)
        return self.causal(self.column[self.n_context :])

    def causal(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Attention of neighbouring columns `rows` on the context, each reading what came before
        it: see attention."""
        return self.attention(self.queries(rows), self.column[rows[0] :] <= rows[:, None], weight)

    def queries(self, columns: Tensor) -> Tensor:
        """Queries of some columns (Q,), or of each row's own (B, Q): (L, B, H, Q, D)."""
        if columns.ndim == 1:
            return torch.stack([q.index_select(2, columns) for q in self.q])
        return torch.stack([q.take_along_dim(columns[:, None, :, None], 2) for q in self.q])

    def attention(
        self, q: Tensor, visible: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Return the mean attention on each context token, (L, B, Hkv, C): over the query heads of
        a KV head and over queries.

        q        (L, B, H, Q, D)
        visible  (Q, V) bool, what a query may read of the prompt's last V columns; earlier columns
                 always; None: all
        weight   (B, Q), of each query in the mean"""
        L, B, H, Q, D = q.shape
        n = H // self.keys.size(2)
        out = []
        weight = (
            torch.full((B, Q), 1 / Q, device=q.device)
            if weight is None
            else weight / weight.sum(-1, keepdim=True).clamp_min(TINY)
        )
        weight = weight.repeat(1, n)[:, None, None] / n  # (B, 1, 1, n Q)
        step = max(1, CHUNK // (B * H * Q * self.T))
        for i in range(0, L, step):
            scaled = (q[i : i + step] * D**-0.5).unflatten(2, (-1, n)).flatten(3, 4)
            p = (scaled @ self.keys[i : i + step].mT).float()  # (l, B, Hkv, n Q, T)
            if visible is not None:
                p[..., self.T - visible.size(1) :].masked_fill_(~visible.repeat(n, 1), NEVER)
            if self.pad is not None:
                p.masked_fill_(~self.real[:, None, None], NEVER)
            with torch.autocast(p.device.type, enabled=False):  # the sum in float32
                out.append((weight @ p.softmax(-1)[..., : self.n_context]).squeeze(-2))
        return torch.cat(out) * self.valid[:, None]

    def moved(self, columns: Tensor, ahead: int) -> Tensor:
        """queries(columns) as if their tokens came `ahead` after the prompt: RoPE turns them
        further. (L, B, H, Q, D)."""
        return apply_rope(self.queries(columns), *self.turn(columns, ahead))

    def turn(self, columns: Tensor, ahead: int | Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, 1, Q, D/2) that move queries of columns (Q,) or (B, Q) to `ahead`
        after the prompt, no further than the model's context: a row's tokens count from its
        first."""
        place = (self.T - self.start + ahead).clamp_max(len(self.rope[0]) - 1) - (
            columns - self.start
        ).clamp_min(0)
        return tuple(t[place].unsqueeze(-3) for t in self.rope)

    @cached_property
    def _to_come(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """How `moment` turns the prompt's last queries, and their weights in the mean (B, 1, Q, 1),
        of padding 0."""
        columns = self.column[-SPAN:]
        room = (len(self.rope[0]) - self.T + self.start).clamp(1, READ)  # (B or 1, 1)
        # counted from the end: rows are as if alone
        ahead = ((self.T - 1 - columns).double() * GOLDEN % 1 * room).long()
        real = self.real[:, columns].double()  # (B, Q)
        return self.turn(columns, ahead), (real / real.sum(-1, keepdim=True).clamp_min(1))[
            :, None, :, None
        ]

    def moment(self, layer: int) -> Tensor:
        """Return the second moment of a layer's queries to come, (B, Hkv, D, D) float64.

        It is the mean of q q^T over the query heads of a KV head and over the prompt's last SPAN
        queries, as if they came among the READ tokens after it, or as many as fit the model's
        context (RoPE turns them further)."""
        turn, weight = self._to_come
        q = apply_rope(self.q[layer][:, :, -SPAN:].float(), *turn).double()  # (B, H, Q, D)
        return ((q * weight).mT @ q).unflatten(1, (self.k[layer].size(1), -1)).mean(2)

    def past(self, cfg: SelectConfig) -> Tensor:
        """Attention on the context of cfg.past queries of its last tokens, moved ahead: (L, B, Hkv,
        C)."""
        length = self.valid.sum(-1, keepdim=True)  # (B, 1): each row spreads over its own tokens
        every = length.clamp_max(SPAN).div(cfg.past, rounding_mode="floor").clamp_min(1)
        # (B, Q)
        columns = (
            self.n_context - 1 - self.column[: min(cfg.past, self.n_context)] * every
        ).clamp_min(0)
        return self.attention(
            self.moved(columns, cfg.ahead), weight=self.real.gather(1, columns).float()
        )


def norms(t: Tensor) -> Tensor:
    """Norms over the last dimension, summed in at least float32, as float32."""
    return torch.linalg.vector_norm(
        t, dim=-1, dtype=torch.promote_types(t.dtype, torch.float32)
    ).float()


def pooled(a: Tensor, width: int) -> Tensor:
    """Maximum over `width` neighbours (odd), same shape (..., C)."""
    return F.max_pool1d(a.flatten(0, -3), width, 1, width // 2).view_as(a) if width > 1 else a


# -------------------- signals without parameters: alpha (L or 1, B, Hkv or 1, C)


def uniform(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Every token alike."""
    return prompt.valid.float()[None, :, None]


def random(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Drawn once for every layer, head and distance from the prompt's end: rows do not depend on
    each other."""
    drawn = [
        torch.rand(
            prompt.n_context,
            prompt.keys.size(2),
            generator=torch.Generator().manual_seed(prompt.first + i),
        )
        for i in range(prompt.L)
    ]
    return (
        torch.stack(drawn).flip(1).mT.unsqueeze(1).to(prompt.column.device) * prompt.valid[:, None]
    )


def oracle(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Attention of what follows (of the query region where nothing does), from a diagnostic pass:
    eq 12."""
    check(
        prompt.oracle is not None,
        "relevance=oracle",
        "it needs a pass that has seen what follows",
        "measure it with eval.py, use another here",
    )
    return prompt.oracle


def observed(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Attention of the query region, max-pooled over cfg.pool tokens."""
    return pooled(prompt.observed, cfg.pool)


def future(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Half observed attention, half that of past queries moved ahead."""
    return (prompt.observed + prompt.past(cfg)) / 2


def snapkv(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Attention of the prompt's last WINDOW queries, max-pooled over 7 tokens."""
    rows = prompt.column[max(0, prompt.T - WINDOW) :]
    return pooled(prompt.causal(rows, prompt.real[:, rows].float()), 7)


def streaming(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """The newest tokens (with cfg.sinks: attention sinks and a window)."""
    return (prompt.column[: prompt.n_context] + 1.0) * prompt.valid[None, :, None]


def h2o(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Accumulated attention of the whole prompt; half of the budget goes to the newest tokens
    (their score is 1 and more above any)."""
    total = 0.0
    for rows in prompt.column.split(512):
        part = prompt.causal(rows, prompt.real[:, rows].float())
        total = total + part * prompt.real[:, rows].sum(-1)[:, None, None]
    n_tokens = prompt.valid.sum(-1).tolist()
    recent = [count_kept(cfg.token_keep, n, 1) // 2 if n else 0 for n in n_tokens]
    recent = torch.tensor(recent, device=prompt.column.device)  # (B,)
    new = (prompt.n_context - prompt.column[: prompt.n_context]) <= recent[:, None]  # (B, C)
    return total + new[:, None] * (prompt.T + streaming(prompt, cfg)[0])


def quest(prompt: Prompt, cfg: SelectConfig) -> Tensor:
    """Pages of PAGE tokens by an upper bound on what the query region's logits can be in them, as
    shares; a page's tokens score alike."""
    C = prompt.n_context
    k = prompt.keys[..., : prompt.n_context, :].float()
    token = (prompt.column[:C] - prompt.start).clamp_min(0)  # a page starts with a row's first one
    page = (token // PAGE).expand(k.size(1), -1)  # (B, C)
    at = page[None, :, None, :, None].expand_as(k)
    hole = ~prompt.valid[:, None, :, None]
    shape = (*k.shape[:3], -(-C // PAGE), k.size(-1))
    low = k.new_full(shape, float("inf")).scatter_reduce(
        3, at, k.masked_fill(hole, float("inf")), "amin"
    )
    high = k.new_full(shape, float("-inf")).scatter_reduce(
        3, at, k.masked_fill(hole, float("-inf")), "amax"
    )
    empty = low.isinf().any(-1)  # (L, B, Hkv, pages)
    q = prompt.queries(prompt.column[C:]).float().unflatten(2, (k.size(2), -1))
    q = q.flatten(3, 4) * k.size(-1) ** -0.5  # (L, B, Hkv, n W, D)
    bound = (
        q.clamp_min(0) @ high.masked_fill(empty[..., None], 0).mT
        + q.clamp_max(0) @ low.masked_fill(empty[..., None], 0).mT
    )
    share = bound.masked_fill(empty.unsqueeze(-2), -1e30).softmax(-1).mean(-2)  # (L, B, Hkv, pages)
    return share.gather(-1, page[None, :, None].expand(*k.shape[:4])) * prompt.valid[:, None]


PLAIN: dict[str, Callable[[Prompt, SelectConfig], Tensor]] = {
    f.__name__: f
    for f in (oracle, observed, future, uniform, random, quest, h2o, streaming, snapkv)
}
# tokens are ranked by the signal alone, not by value norms too
AS_PUBLISHED = ("quest", "h2o", "streaming", "snapkv", "expected_attention")


# ----------------------------------------------------------------------------- trained signals


class HiddenPredictor(nn.Module):
    """The paper's: two-layer GELU MLP E -> 256 -> n_out on the hidden state of a token, one per
    layer that chooses for itself.

    `predictor`           n_out = Hm * S scores s_jg (13), Hm mask heads
    `expected_attention`  n_out = Hm shares of attention

    Trained by MSE to targets normalised per output to zero mean and unit variance (over the
    calibration text), and mapped back when used."""

    def __init__(self, n_layer: int, n_embd: int, mask_heads: int, n_out: int, hidden: int = 256):
        super().__init__()
        self.heads = mask_heads
        self.up = nn.Parameter(torch.randn(n_layer, n_embd, hidden) * n_embd**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(n_layer, 1, hidden))
        self.down = nn.Parameter(torch.randn(n_layer, hidden, n_out) * hidden**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(n_layer, 1, n_out))
        self.register_buffer("mean", torch.zeros(n_layer, 1, n_out))
        self.register_buffer("std", torch.ones(n_layer, 1, n_out))
        for p in self.parameters():
            p.rate = 0.1  # of the stage's learning rate: 1e-3 where that is 1e-2

    def normalised(self, prompt: Prompt) -> Tensor:
        """The network's outputs: (L, B * C, n_out)."""
        at = prompt.layers
        up, up_bias, down, down_bias = (
            p[at] for p in (self.up, self.up_bias, self.down, self.down_bias)
        )
        x = torch.stack([x[:, : prompt.n_context] for x in prompt.x[: up.size(0)]])
        x = x.flatten(1, 2).to(up.dtype)  # (L, B C, E)
        return F.gelu(x @ up + up_bias) @ down + down_bias

    def flat(self, target: Tensor) -> Tensor:
        """Targets (L, B, Hm, C, S or 1) in the order of the outputs: (L, B * C, n_out)."""
        return target.transpose(2, 3).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def fit(self, prompts: list[Prompt], targets: list[Tensor]) -> None:
        """Set mean and standard deviation of the targets (L, B, Hm, C, S or 1)."""
        t = torch.cat([self.flat(t) for t in targets], 1)
        self.mean.copy_(t.mean(1, keepdim=True))
        self.std.copy_(t.std(1, keepdim=True).clamp_min(TINY))

    def forward(self, prompt: Prompt, kind: str) -> Tensor:
        """Scores >= 0, (L, B, Hm, C, S or 1)."""
        out = self.normalised(prompt)
        (B, C) = prompt.valid.shape
        at = prompt.layers
        shape = (-1, B, C, self.heads, out.size(-1) // self.heads)
        if kind == "mse":
            return (out * self.std[at] + self.mean[at]).clamp_min(0).view(shape).transpose(2, 3)
        out = (
            out.view(shape)
            .transpose(2, 3)
            .masked_fill(~prompt.valid[:, None, :, None], float("-inf"))
        )
        return (
            out.flatten(-2).softmax(-1).view_as(out)
            * self.mean[at].mean((-1, -2))[:, None, None, None, None]
        )

    def loss(self, prompt: Prompt, target: Tensor, kind: str) -> Tensor:
        """mse: to the normalised target; kl: from the target's shares over a prompt's (token,
        group) pairs. No padding here."""
        out = self.normalised(prompt)
        want = self.flat(target)
        if kind == "mse":
            return F.mse_loss(out, (want - self.mean) / self.std)
        B, C = prompt.valid.shape
        out = out.view(-1, B, C, self.heads, out.size(-1) // self.heads).transpose(2, 3).flatten(-2)
        return (
            F.kl_div(out.log_softmax(-1), shares(target.flatten(-2)), reduction="none")
            .sum(-1)
            .mean()
        )


class QueryPredictor(nn.Module):
    """Ours: log-scores of context tokens per layer and KV head,

        alpha = softmax(log-scores) * (attention the query region gave the context).

    A two-layer GELU network over the features below, beside a linear map of them that starts at
    observed attention; plus a network on the token's hidden state; plus key . u, u a map of the
    mean hidden state of the query region. Trained by the KL divergence from the shares of attention
    that the tokens which follow give."""

    FEATURES = 9

    def __init__(
        self,
        n_layer: int,
        n_embd: int,
        n_kv_head: int,
        head_dim: int,
        hidden: int = 16,
        rank: int = 64,
    ):
        super().__init__()
        n = (n_layer, n_kv_head)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * shape[-2] ** -0.5)

        self.up = drawn(*n, self.FEATURES, hidden)
        self.up_bias = nn.Parameter(torch.zeros(*n, 1, hidden))
        self.down = nn.Parameter(torch.zeros(*n, hidden, 1))
        self.linear = nn.Parameter(torch.zeros(*n, self.FEATURES, 1))
        self.linear.data[:, :, 1] = 1
        self.token_up = drawn(n_layer, n_embd, rank)
        self.token_down = nn.Parameter(torch.zeros(n_layer, rank, n_kv_head))
        self.query_up = drawn(n_layer, n_embd, rank)
        self.query_down = nn.Parameter(torch.zeros(n_layer, rank, n_kv_head * head_dim))
        self.register_buffer("mean", torch.zeros(*n, self.FEATURES))
        self.register_buffer("std", torch.ones(*n, self.FEATURES))

    def features(self, prompt: Prompt, cfg: SelectConfig) -> Tensor:
        """Return the features of context tokens, (L, Hkv, B, C, FEATURES):

        0, 1, 2  log of observed attention, as it is and max-pooled over 5 and 15
        3, 4     log of past queries' attention, as it is and max-pooled over 5
        5        log of the value's norm
        6        the key's norm
        7        log of the distance to the context's end
        8        whether it is one of the first 4 tokens"""
        C = prompt.n_context
        seen = prompt.observed
        past = prompt.past(cfg)
        norm = norms(prompt.values)
        shares = torch.stack(
            (seen, pooled(seen, 5), pooled(seen, 15), past, pooled(past, 5), norm), -1
        )
        column = prompt.column[:C]
        rest = (
            norms(prompt.keys[..., :C, :]),
            ((C - column) / 64 + 1).log().expand_as(seen),
            ((column - prompt.start) < 4).float()[:, None].expand_as(seen),
        )
        return torch.cat((shares.clamp_min(TINY).log(), torch.stack(rest, -1)), -1).transpose(1, 2)

    @torch.no_grad()
    def fit(self, prompts: list[Prompt], cfg: SelectConfig) -> None:
        """Set mean and standard deviation of the features."""
        f = torch.cat([self.features(p, cfg).flatten(2, 3) for p in prompts], 2)
        self.mean.copy_(f.mean(2))
        self.std.copy_(f.std(2) + 1e-3)

    def log_scores(self, prompt: Prompt, cfg: SelectConfig) -> Tensor:
        """(L, B, Hkv, C), -inf for padding."""
        (B, C) = prompt.valid.shape
        dtype = self.up.dtype
        at = prompt.layers
        f = self.features(prompt, cfg).flatten(2, 3).to(dtype)  # (L, Hkv, B C, F)
        f = (f - self.mean[at].unsqueeze(2)) / self.std[at].unsqueeze(2)
        s = F.gelu(f @ self.up[at] + self.up_bias[at]) @ self.down[at] + f @ self.linear[at]
        s = s.unflatten(2, (B, C)).squeeze(-1).transpose(1, 2)  # (L, B, Hkv, C)
        s = s + torch.stack(
            [
                F.gelu(x[:, :C].to(dtype) @ up) @ down
                for x, up, down in zip(
                    prompt.x, self.token_up[at], self.token_down[at], strict=True
                )
            ]
        ).transpose(2, 3)
        region = torch.stack([x[:, C:].mean(1) for x in prompt.x]).to(dtype)  # (L, B, E)
        u = F.gelu(region @ self.query_up[at]) @ self.query_down[at]
        u = u.unflatten(-1, (prompt.keys.size(2), -1))  # (L, B, Hkv, D)
        k = prompt.keys[..., :C, :].to(dtype)
        return (s + (k @ u.unsqueeze(-1)).squeeze(-1) * k.size(-1) ** -0.5).masked_fill(
            ~prompt.valid[:, None], float("-inf")
        )

    def forward(self, prompt: Prompt, cfg: SelectConfig) -> Tensor:
        """alpha (L, B, Hkv, C): a row without context gets zeros."""
        share = (
            self.log_scores(prompt, cfg).float().softmax(-1).nan_to_num()
            if prompt.n_context
            else prompt.observed
        )
        return share * prompt.observed.sum(-1, keepdim=True)

    def loss(self, prompt: Prompt, target: Tensor, cfg: SelectConfig) -> Tensor:
        """KL divergence in nats from the shares of attention that follow, target (L, B, Hkv, C), a
        mean over layers, rows and heads."""
        return (
            F.kl_div(self.log_scores(prompt, cfg).log_softmax(-1), shares(target), reduction="none")
            .sum(-1)
            .mean()
        )


def shares(target: Tensor) -> Tensor:
    """target (..., n) over its sum."""
    return target / target.sum(-1, keepdim=True).clamp_min(TINY)
