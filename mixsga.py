"""mixSGA (arXiv 2506.13541, section 3): every token is routed to an expert that shares KV heads.

The problem: tokens differ in what they are worth, and dropping the cheap ones loses them for good.
The idea: no token is dropped, cheap ones get fewer heads. An expert of size g stores the average of
every g neighbouring KV heads, Hkv / g keys and values of a token, and the only new weights are a
router per layer with E scores for a token:

    s_t = sigmoid(W x_t + b)                                                              (1)
    prompts, training: expert 1 takes the ceil(rho_1 T) tokens of largest s_1, expert 2
                       as many of the rest, and so on; the last takes what remains        (2)
    decoding:          expert of token t = argmax_e s_te, which needs no later token      (3)
    L = L_LM + consistency_weight * mean_t CE(s_t, choice of equation 2)                  (4, 5)

(2) gives exact counts, but a token's expert depends on the whole prompt; the consistency loss makes
(3) agree with it. Of keys and values a mix of ratios a : b : c and sizes 1, 2, 4 keeps
(a + b/2 + c/4) / (a + b + c).

    model = Transformer(ModelConfig())
    mix = MixConfig(group_sizes="1,2", expert_ratios="1:1")
    attach(model, KVConfig(kv="mixsga", kv_tail=4), mix)
    loss = lm_loss(model(idx), targets)                    # in training mode
    loss = loss + model.kv_losses()["consistency"]         # equations 4, 5
    cache = model.eval().new_cache(batch=1, max_len=64)
    model.prefill(idx, cache)                              # equation 2
    model.decode(next_ids, cache)                          # equation 3

Two executions: *masked* without a cache (averages in full-size tensors, differentiable; evaluation
is decode mode, what decoding token by token gives) and *packed* with one: a PackedCache per expert,
with as many heads as it keeps, attention over all of them merged by log-sum-exp. Experts may store
value groups or integers, too.

Ours (what each is worth: docs/log.md): the newest `kv_tail` tokens are read whole and join their
expert after that; heads are first reordered and turned, exactly, until those averaged are alike,
and routers start from what averaging a token would cost (baselines/align.py); scores are taken
relative to their running mean.

Open in the paper, our reading: the router's input is detached and the language-model loss does not
reach it (`lm_to_experts`: straight through the choice); the cross-entropy is over the scores'
logits, which have the same argmax and do not saturate. Averaging keys before or after RoPE is the
same, since all heads of a token turn alike. Experts of share 0 are never chosen.

GQA and CLA, which it is compared with: baselines/shared_heads.py. The cache: storage/experts.py.
Letters: storage/layout.py; E experts.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import KVConfig, ModelConfig, check
from kernels import attend_view
from model import attend, attend_masked, attention_mask
from settings.experts import MixConfig
from storage.cache import NewTokens, valid_columns
from storage.coordinates import change_coordinates
from storage.experts import ExpertCache, averaged
from storage.integers.codecs import codec_of
from storage.layout import cdiv, expand_mask, group_energy, top_k_mask
from storage.packed import PackedCache

PRIOR = 32  # tokens of mean 0 that a running mean of scores begins with
ROUTER_RATE = 10.0  # a router learns that much faster than the rest


# -------------------- who takes a token


def expert_choice(scores: Tensor, ratios: tuple[Fraction, ...], valid: Tensor) -> Tensor:
    """Return the expert of every token by equation 2: (B, T) int64, any number at padding.

    scores (B, T, E); valid (B, T) bool, False at padding. Of n valid tokens expert e takes the
    ceil(ratios[e] n) best of what the experts before it left (fewer where fewer are left), the last
    takes the rest. Of equal scores the earlier token's wins."""
    index = torch.full(valid.shape, len(ratios) - 1, device=scores.device)
    column = torch.arange(valid.size(1), device=scores.device).expand_as(index)
    rest = valid
    n = valid.sum(-1, keepdim=True)
    for e, ratio in enumerate(ratios[:-1]):
        left = scores[..., e].masked_fill(~rest, -math.inf)
        order = left.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter(-1, order, column)
        taken = rest & (rank < cdiv(n * ratio.numerator, ratio.denominator))
        index = index.masked_fill(taken, e)
        rest = rest & ~taken
    return index


# -------------------- reading without a cache


def newest_mask(T: int, W: int, device) -> Tensor:
    """Mark the newest W keys of every query, its own included: (T, T) bool."""
    number = torch.arange(T, device=device)
    return number[:, None] - number < W


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: tuple[Tensor, Tensor],
    W: int,
    pad: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Attend causally to k, v (B, Hkv, T, D), but where a key is among the newest W of a query to
    `whole`, two of the same shape. One softmax over both, each masked where the other is read."""
    if not W:
        return attend(q, k, v, pad, cap)
    T = q.size(2)
    visible = attention_mask(T, T, pad, q.device)
    close = newest_mask(T, W, q.device)
    mask = torch.cat((visible & ~close, visible & close), -1)
    k = torch.cat((k, whole[0]), 2)
    v = torch.cat((v, whole[1]), 2)
    return attend_masked(q, k, v, mask, cap)


# -------------------- the KV path


class SharingPath(nn.Module):
    """What paths that share keys and values between heads or layers have in common.

    by    None, or "choice" or "score": how experts are found, whatever runs
    read  attend_window, or another attention that takes the same; routing in
          baselines/shared_heads.py sets both"""

    reads_pieces = False  # a choice looks at a whole prompt
    by: str | None = None
    read = staticmethod(attend_window)

    def __init__(self, window: int, cap: float = 0.0):
        super().__init__()
        self.window = window  # newest tokens that are read whole
        self.cap = cap  # of attention logits
        self.losses: dict[str, Tensor] = {}

    def graph_safe(self) -> bool:
        return False

    def one_by_one(self, x, q, k, v, cache, n_pad: Tensor | None) -> Tensor:
        """Decode T tokens one after the other: each has its own newest ones."""
        out = []
        for t in range(q.size(2)):
            at = slice(t, t + 1)
            skip = None if n_pad is None else (n_pad - t).clamp(0, 1)
            new = (q[:, :, at], k[:, :, at], v[:, :, at])
            out.append(self.decode(x[:, at], *new, cache, skip))
        return torch.cat(out, 2)


class GroupedHeads(SharingPath):
    """Experts of grouped KV heads on one layer (equations 1-5). With one expert it is GQA made by
    averaging, and has no router.

    agreement: share of tokens whose choice is their largest score, of the last time it chose."""

    def __init__(self, m: ModelConfig, kv: KVConfig, mix: MixConfig, layer: int = 0):
        super().__init__(kv.kv_tail, m.attention_cap)
        mix.check_model(m)
        self.Hkv = m.n_kv_head
        self.D = m.head_dim
        self.sizes = mix.sizes
        self.ratios = mix.ratios
        self.mix = mix
        self.stored_as = self.storage_of(m, kv, mix)
        self.k = self.stored_as.topk_groups
        E = len(self.sizes)
        never = torch.tensor([not ratio for ratio in self.ratios], device="cpu")
        self.register_buffer("never", never, persistent=False)  # experts of share 0
        self.router = None
        if E > 1 and mix.expert_router == "learned":
            self.router = nn.Linear(m.n_embd, E)
            nn.init.kaiming_normal_(self.router.weight)
            nn.init.zeros_(self.router.bias)
            self.offset = nn.Parameter(torch.zeros(E))  # of scores relative to their running mean
            for p in (self.router.weight, self.router.bias, self.offset):
                p.rate = ROUTER_RATE
        elif E > 1:
            # Gumbel noise on the logarithms of the shares: the largest falls on expert e with
            # probability ratios[e]
            stream = torch.Generator().manual_seed(layer)
            uniform = torch.rand(m.block_size, E, generator=stream, device="cpu")
            uniform = uniform.clamp_min(1e-20)
            shares = torch.tensor([max(float(ratio), 1e-20) for ratio in self.ratios])
            noise = shares.log() - (-uniform.log()).log()
            self.register_buffer("noise", noise, persistent=False)
        self.agreement: Tensor | None = None

    @staticmethod
    def storage_of(m: ModelConfig, kv: KVConfig, mix: MixConfig) -> KVConfig:
        """Return how an expert stores its heads: in all of two value groups, or some of more.
        ValueError where these do not fit a model's heads."""
        S = kv.n_groups if mix.expert_groups else 2  # any D is even
        k = mix.expert_groups or S
        check(
            k <= S and m.head_dim % S == 0,
            f"expert_groups={mix.expert_groups} with n_groups={S}, head_dim={m.head_dim}",
            "needs at most S groups, and S must divide D",
            "give smaller ones",
        )
        return replace(
            kv,
            kv="value_groups",
            n_groups=S,
            topk_groups=k,
            kv_tail=0,
            kv_tail_block=1,
            reconstructor="zero",
            value_router="norm",
            mask_scope="head" if k < S else "layer",
        )

    # ---- who takes a token

    def logits(self, x: Tensor, n_pad: Tensor | None, cache: ExpertCache | None = None) -> Tensor:
        """Return what scores are the sigmoid of, (B, T, E) for x (B, T, n_embd), -inf for experts
        of share 0. The sums of a cache go on with these tokens."""
        B, T, _ = x.shape
        number = torch.arange(T, device=x.device).expand(B, T)  # of a token in its sequence
        if n_pad is not None:
            number = number - n_pad[:, None]
        valid = (number >= 0).unsqueeze(-1)
        if cache is not None:
            number = number + cache.lengths[:, None]
        if self.router is not None:
            with torch.autocast(x.device.type, enabled=False):
                raw = self.router(x.detach().to(self.router.weight.dtype)) * valid
            total = raw.cumsum(1)
            if cache is not None:
                total = total + cache.seen.unsqueeze(1)
                cache.seen.copy_(total[:, -1].detach())
            out = raw - total / (number.clamp_min(0) + 1 + PRIOR).unsqueeze(-1) + self.offset
        elif len(self.sizes) > 1:
            out = self.noise[number.clamp_min(0)]
        else:
            out = x.new_zeros(B, T, 1)
        return out.masked_fill(self.never, -math.inf)

    def chosen(self, logits: Tensor, by: str, valid: Tensor) -> Tensor:
        """Return the expert of every token, (B, T) int64, by "choice" (2) or "score" (3)."""
        if by == "score":
            return logits.argmax(-1)
        index = expert_choice(logits.detach(), self.ratios, valid)
        agrees = (index == logits.argmax(-1)) & valid
        self.agreement = agrees.sum() / valid.sum()
        return index

    # ---- without a cache: masked execution

    def stored(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what each expert would store of tokens k, v (B, Hkv, T, D): keys and values, a
        list of (B, Hkv / size, T, D) each, values with zeros where dropped."""
        keys = [averaged(k, size) for size in self.sizes]
        values = [averaged(v, size) for size in self.sizes]
        S = self.stored_as.n_groups
        if self.k == S:
            return keys, values
        for e, value in enumerate(values):
            mask = top_k_mask(group_energy(value.detach(), S, value.size(1)), self.k)
            values[e] = value * expand_mask(mask, self.D)
        return keys, values

    def mixed(self, each: list[Tensor], index: Tensor, logits: Tensor) -> Tensor:
        """Give every token what its expert stores, on all heads: of (B, Hkv / size, T, D) per
        expert, (B, Hkv, T, D)."""
        each = [t.repeat_interleave(size, 1) for t, size in zip(each, self.sizes, strict=True)]
        out = each[0]
        for e, t in enumerate(each[1:], 1):
            out = torch.where((index == e)[:, None, :, None], t, out)
        trains = self.training and torch.is_grad_enabled() and self.router is not None
        if trains and self.mix.lm_to_experts:
            score = logits.sigmoid()
            through = (score - score.detach()).to(out.dtype)  # zero, with the choice's gradient
            out = out + sum(through[:, None, :, e, None] * t.detach() for e, t in enumerate(each))
        return out

    def read_masked(self, q, k, v, index: Tensor, logits: Tensor, pad: Tensor | None) -> Tensor:
        """Attend to tokens as their experts index (B, T) store them, to the newest whole."""
        keys, values = self.stored(k, v)
        keys = self.mixed(keys, index, logits)
        values = self.mixed(values, index, logits)
        return self.read(q, keys, values, (k, v), self.window, pad, self.cap)

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Read k, v (B, Hkv, T, D) as experts would store them, chosen by equation 2 in training,
        else by 3: (B, H, T, D) in q's dtype."""
        check(
            self.training or not self.stored_as.ints,
            "integers without a cache",
            "experts' blocks are formed in one",
            "measure with --tasks=continuation or prompts",
        )
        self.losses = {}
        valid = self._valid(q, pad)
        logits = self.logits(x, pad)
        by = self.by or ("choice" if self.training else "score")
        index = self.chosen(logits, by, valid)
        if self.training and torch.is_grad_enabled() and self.router is not None:
            chosen = index.masked_fill(~valid, -100)  # cross_entropy leaves that out
            loss = F.cross_entropy(logits.flatten(0, 1), chosen.flatten())
            self.losses["consistency"] = self.mix.consistency_weight * loss
        return self.read_masked(q, k, v, index, logits, pad)

    @staticmethod
    def _valid(q: Tensor, n_pad: Tensor | None) -> Tensor:
        """Mark the columns of q (B, H, T, D) that are no padding: (B, T) bool."""
        if n_pad is None:
            n_pad = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        return valid_columns(q.size(2), n_pad)

    # ---- with a cache: packed execution

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> ExpertCache:
        """Return an empty cache. What each expert will take nobody knows: parts grow."""
        parts = []
        for size in self.sizes:
            codec = codec_of(self.stored_as)
            shape = (batch, 0, self.Hkv // size, self.D)
            parts.append(PackedCache(*shape, self.stored_as, self.k, like, codec=codec))
        n_scores = 0 if self.router is None else len(self.sizes)
        return ExpertCache(parts, batch, self.window, self.Hkv, self.D, n_scores, like)

    def prefill(self, x, q, k, v, cache: ExpertCache, n_pad: Tensor | None = None) -> Tensor:
        """Choose experts over a whole prompt k, v (B, Hkv, T, D), store it in them, and read it as
        they do: (B, H, T, D) in q's dtype. What follows others is decoded token by token."""
        if not cache.fresh:
            return self.one_by_one(x, q, k, v, cache, n_pad)
        logits = self.logits(x, n_pad, cache)
        index = self.chosen(logits, self.by or "choice", self._valid(q, n_pad))
        cache.append(NewTokens(k, v, n_pad, index))
        return self.read_masked(q, k, v, index, logits, n_pad)

    def graph_safe(self) -> bool:
        """Say whether experts take single tokens by kernels: those of integers form blocks."""
        codec = codec_of(self.stored_as)
        return codec.one_by_one(self.D, self.stored_as.kv_tail)

    def decode(self, x, q, k, v, cache: ExpertCache, n_pad: Tensor | None = None) -> Tensor:
        """Store k, v (B, Hkv, 1, D) with the expert of largest score (equation 3), and read what
        all experts hold: (B, H, 1, D) in q's dtype."""
        index = self.logits(x, n_pad, cache).argmax(-1)
        cache.append(NewTokens(k, v, n_pad, index))
        return attend_view(q, cache.view(), self.cap)[0]


# -------------------- on a model


def attach(
    model: nn.Module, kv: KVConfig, mix: MixConfig, paths: list[SharingPath] | None = None
) -> nn.Module:
    """Give a dense model experts of grouped heads, in place; what is new is trainable. Returns the
    model. Layers that slide stay as they are. paths: one for each other layer, in their place
    (baselines/shared_heads.py)."""
    check(
        not kv.ints,
        f"key_bits={kv.key_bits} with kv={kv.kv}",
        "it is trained on with whole numbers",
        "give --key_bits to eval.py",
    )
    check(
        kv.kv_tail_block == 1,
        f"kv_tail_block={kv.kv_tail_block} with kv={kv.kv}",
        "tokens leave the tail one by one",
        "leave it out",
    )
    if paths is None:
        paths = [GroupedHeads(model.cfg, kv, mix, i) for i in model.cfg.global_layers]
    blocks = [block for block in model.layers if not block.slides]
    for block, path in zip(blocks, paths, strict=True):
        change_coordinates(block.self_attn.kv_path, "attach")
        block.self_attn.kv_path = path.to(block.self_attn.o_proj.weight)
        path.train(block.training)
    return model


def experts(model: nn.Module) -> list[GroupedHeads]:
    """Return the model's paths of grouped heads, layer by layer."""
    return [path for path in model.modules() if isinstance(path, GroupedHeads)]


@contextmanager
def stored_in(model: nn.Module, key_bits: int = 16, value_bits: int = 16, key_block: int = 64):
    """Let caches of experts made inside the `with` hold integers: tokens of an expert are quantised
    a block at a time, those that wait for their block to fill are whole."""
    before = {path: path.stored_as for path in experts(model)}
    bits = dict(key_bits=key_bits, value_bits=value_bits, key_block=key_block, kv_sinks=0)
    for path, kv in before.items():
        path.stored_as = replace(kv, **bits)
    try:
        yield
    finally:
        for path, kv in before.items():
            path.stored_as = kv
