"""Trained signals of relevance (train.py --stage=select), beside those of selection/relevance.py.

`predictor` (arXiv 2604.21335, 3.2) reads a token's hidden state alone: it **never sees the query**,
so what it keeps is the same for every question. `expected_attention` is the same with one output
(not the closed form of arXiv 2510.00636: that is `expected_attention_closed` in
baselines/tokens.py). `predictor_query` is ours: per layer and KV head a small network over what the
prompt already shows (observed and future attention, norms, distance), plus the token's hidden
state, plus a product of its key with a summary of the asking tokens (Prompt.asking).

Letters: selection/relevance.py."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import SelectConfig
from selection.relevance import TINY, Prompt, norms, pooled


def drawn(*shape: int) -> nn.Parameter:
    """Draw weights (..., n_in, n_out) with variance 1 / n_in."""
    n_in = shape[-2]
    return nn.Parameter(torch.randn(*shape) * n_in**-0.5)


class HiddenPredictor(nn.Module):
    """The paper's: two-layer GELU MLP E -> 256 -> n_out on the hidden state of a token, one per
    layer that chooses for itself.

    `predictor`           n_out = Hm * S scores s_jg (13), Hm mask heads
    `expected_attention`  n_out = Hm shares of attention

    Trained by MSE to targets normalised per output to zero mean and unit variance (over the
    calibration text), and mapped back when used."""

    def __init__(
        self,
        n_layer: int,
        n_embd: int,
        mask_heads: int,
        n_out: int,
        hidden: int = 256,
    ):
        super().__init__()
        self.heads = mask_heads
        self.up = drawn(n_layer, n_embd, hidden)
        self.up_bias = nn.Parameter(torch.zeros(n_layer, 1, hidden))
        self.down = drawn(n_layer, hidden, n_out)
        self.down_bias = nn.Parameter(torch.zeros(n_layer, 1, n_out))
        self.register_buffer("mean", torch.zeros(n_layer, 1, n_out))
        self.register_buffer("std", torch.ones(n_layer, 1, n_out))
        for p in self.parameters():
            p.rate = 0.1  # of the stage's learning rate: 1e-3 where that is 1e-2

    def normalised(self, prompt: Prompt) -> Tensor:
        """The network's outputs: (L, B * C, n_out)."""
        at = prompt.layers
        up = self.up[at]
        down = self.down[at]
        # a shared mask has one layer that decides
        deciding = prompt.x[: len(up)]
        context = [x[:, : prompt.n_context] for x in deciding]
        x = torch.stack(context).flatten(1, 2)
        x = x.to(up.dtype)  # (L, B C, E)
        hidden = F.gelu(x @ up + self.up_bias[at])
        return hidden @ down + self.down_bias[at]

    def flat(self, target: Tensor) -> Tensor:
        """Targets (L, B, Hm, C, S or 1) in the order of the outputs: (L, B * C, n_out)."""
        return target.transpose(2, 3).flatten(3).flatten(1, 2)

    def unflat(self, out: Tensor, prompt: Prompt) -> Tensor:
        """Outputs (L, B * C, n_out) in the order of the targets: (L, B, Hm, C, S or 1)."""
        B, C = prompt.valid.shape
        per_head = out.size(-1) // self.heads
        return out.view(-1, B, C, self.heads, per_head).transpose(2, 3)

    @torch.no_grad()
    def fit(self, prompts: list[Prompt], targets: list[Tensor]) -> None:
        """Set mean and standard deviation of the targets (L, B, Hm, C, S or 1). One that never
        changed, but for rounding, is measured by its own size."""
        of_prompts = [self.flat(target) for target in targets]
        flat = torch.cat(of_prompts, 1)
        mean = flat.mean(1, keepdim=True)
        std = flat.std(1, keepdim=True)
        size = flat.abs().amax(1, keepdim=True)
        rounding = 8 * torch.finfo(flat.dtype).eps * size
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > rounding, std, size))

    def forward(self, prompt: Prompt, kind: str) -> Tensor:
        """Scores >= 0, (L, B, Hm, C, S or 1), by the loss of this kind: `mse` has trained scores
        themselves, `kl` shares, which get the mean target of their layer as their scale."""
        out = self.normalised(prompt)
        at = prompt.layers
        if kind == "mse":
            scores = out * self.std[at] + self.mean[at]
            return self.unflat(scores.clamp_min(0), prompt)
        padding = ~prompt.valid[:, None, :, None]  # (B, 1, C, 1)
        logits = self.unflat(out, prompt)
        logits = logits.masked_fill(padding, float("-inf"))
        share = logits.flatten(-2).softmax(-1)
        share = share.view_as(logits)
        scale = self.mean[at].mean((-1, -2))
        return share * scale[:, None, None, None, None]

    def loss(self, prompt: Prompt, target: Tensor, kind: str) -> Tensor:
        """mse: to the normalised target, 0 for one that was 0 whenever it was measured; kl: from
        the target's shares over a prompt's (token, group) pairs. No padding here."""
        out = self.normalised(prompt)
        if kind == "mse":
            want = (self.flat(target) - self.mean) / self.std
            want = want.masked_fill(self.std == 0, 0)
            return F.mse_loss(out, want)
        logits = self.unflat(out, prompt).flatten(-2)
        return divergence(logits, target.flatten(-2))


class QueryPredictor(nn.Module):
    """Ours: log-scores of context tokens per layer and KV head,

        alpha = softmax(log-scores) * (attention the asking tokens gave the context).

    They are a sum: a two-layer GELU network over the features below, a linear map of them, a
    network on the token's hidden state, and key . u / sqrt(D), u a map of the mean hidden state of
    the asking tokens. All start at 0 but the linear map, which starts at feature 1: observed
    attention. Trained by the KL divergence from the shares of attention that the tokens which
    follow give."""

    FEATURES = 11

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
        5, 6     log of the largest attention of an asking token, as it is and max-pooled over 5
        7        log of the value's norm
        8        the key's norm
        9        log of the distance to the context's end
        10       whether it is one of the first 4 tokens"""
        C = prompt.n_context
        seen = prompt.observed
        past = prompt.past(cfg)
        logs = [
            seen,
            pooled(seen, 5),
            pooled(seen, 15),
            past,
            pooled(past, 5),
            prompt.strongest,
            pooled(prompt.strongest, 5),
            norms(prompt.values),
        ]
        column = prompt.column[:C]
        distance = ((C - column) / 64 + 1).log()
        early = (column - prompt.start) < 4  # (B or 1, C)
        rest = [
            norms(prompt.keys[..., :C, :]),
            distance.expand_as(seen),
            early.float()[:, None].expand_as(seen),
        ]
        logs = torch.stack(logs, -1).clamp_min(TINY).log()
        rest = torch.stack(rest, -1)
        features = torch.cat((logs, rest), -1)
        return features.transpose(1, 2)

    @torch.no_grad()
    def fit(self, prompts: list[Prompt], cfg: SelectConfig) -> None:
        """Set mean and standard deviation of the features."""
        of_prompts = [self.features(prompt, cfg) for prompt in prompts]
        flat = [f.flatten(2, 3) for f in of_prompts]  # (L, Hkv, B C, FEATURES)
        f = torch.cat(flat, 2)
        std = f.std(2)
        self.mean.copy_(f.mean(2))
        self.std.copy_(std + 1e-3)

    def log_scores(self, prompt: Prompt, cfg: SelectConfig) -> Tensor:
        """(L, B, Hkv, C), -inf for padding."""
        scores = self.of_features(prompt, cfg)
        scores = scores + self.of_tokens(prompt)
        scores = scores + self.of_query(prompt)
        padding = ~prompt.valid[:, None]
        return scores.masked_fill(padding, float("-inf"))

    def of_features(self, prompt: Prompt, cfg: SelectConfig) -> Tensor:
        """What the features say: (L, B, Hkv, C)."""
        B, C = prompt.valid.shape
        at = prompt.layers
        mean = self.mean[at].unsqueeze(2)
        std = self.std[at].unsqueeze(2)
        f = self.features(prompt, cfg).flatten(2, 3)  # (L, Hkv, B C, FEATURES)
        f = (f.to(self.up.dtype) - mean) / std
        hidden = F.gelu(f @ self.up[at] + self.up_bias[at])
        scores = hidden @ self.down[at]
        scores = scores + f @ self.linear[at]
        scores = scores.view(-1, f.size(1), B, C)
        return scores.transpose(1, 2)

    def of_tokens(self, prompt: Prompt) -> Tensor:
        """What each token's hidden state says: (L, B, Hkv, C)."""
        up = self.token_up[prompt.layers]
        down = self.token_down[prompt.layers]
        scores = []
        for i, x in enumerate(prompt.x):
            context = x[:, : prompt.n_context].to(up.dtype)  # (B, C, E)
            hidden = F.gelu(context @ up[i])
            scores.append(hidden @ down[i])
        return torch.stack(scores).transpose(2, 3)

    def of_query(self, prompt: Prompt) -> Tensor:
        """Products of keys with a summary of the asking tokens: (L, B, Hkv, C)."""
        C = prompt.n_context
        dtype = self.up.dtype
        up = self.query_up[prompt.layers]
        down = self.query_down[prompt.layers]
        weight = prompt.real[:, prompt.asking].float()
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)  # (B, W)
        means = [weight.unsqueeze(1).to(x) @ x[:, prompt.asking] for x in prompt.x]  # (B, 1, E)
        asking = torch.stack(means).squeeze(2).to(dtype)  # (L, B, E)
        u = F.gelu(asking @ up) @ down
        k = prompt.keys[..., :C, :].to(dtype)
        u = u.unflatten(-1, (k.size(2), -1))
        u = u.unsqueeze(-1)  # (L, B, Hkv, D, 1)
        product = (k @ u).squeeze(-1)
        return product * k.size(-1) ** -0.5

    def forward(self, prompt: Prompt, cfg: SelectConfig) -> Tensor:
        """alpha (L, B, Hkv, C): a row without context gets zeros."""
        if not prompt.n_context:
            return prompt.observed
        log_scores = self.log_scores(prompt, cfg).float()
        share = log_scores.softmax(-1).nan_to_num()
        return share * prompt.observed.sum(-1, keepdim=True)

    def loss(self, prompt: Prompt, target: Tensor, cfg: SelectConfig) -> Tensor:
        """KL divergence in nats from the shares of attention that follow, target (L, B, Hkv, C), a
        mean over layers, rows and heads."""
        return divergence(self.log_scores(prompt, cfg), target)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL divergence in nats of softmax(logits) (..., n) from the shares of target (..., n) >= 0, a
    mean over all but the last dimension."""
    total = target.sum(-1, keepdim=True).clamp_min(TINY)
    of_each = F.kl_div(logits.log_softmax(-1), target / total, reduction="none")
    return of_each.sum(-1).mean()
