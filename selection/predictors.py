"""Trained signals of relevance (train.py --stage=select), beside those of selection/relevance.py.

`predictor` (arXiv 2604.21335, 3.2) reads a token's hidden state alone: it **never sees the query**,
so what it keeps is the same for every question. `expected_attention` is the same with one output
(not the closed form of arXiv 2510.00636: that is `expected_attention_closed` in
baselines/tokens.py). `predictor_query` is ours: per layer and KV head a small network over what the
prompt already shows (observed and future attention, norms, distance), plus the token's hidden
state, plus a product of its key with a summary of the query region.

Letters: selection/relevance.py."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import SelectConfig
from selection.relevance import TINY, Prompt, norms, pooled


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
