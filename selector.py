"""Query-aware selection (arXiv 2604.21335, 3.2, equations 8-13): which tokens of a prompt, and
which groups of their values, are kept.

A prompt is a context and a query region, its last `kv_tail` tokens, which stay whole, as everything
generated does. relevance.py says how much each context token will be read (alpha); a (token, group)
pair scores alpha^hedge * ||its value's group||, and the best pairs under a budget stay. Exact
integers: floor(share * how many there are); of equal scores the lower layer and head wins, then the
earlier token, then the lower group.

Two ways to spend a budget: tokens first (--token_keep, by any token-level method), then groups of
the survivors (--value_keep); or both at once (--kv_keep), where a token pays for its key and for
its groups. A budget belongs to every head, to a layer, or to all layers and heads together (one
threshold). Across layers scores are weighed by what a value does to the residual stream and by how
much the loss feels it there, both measured once on calibration text.

Open in the paper, our reading: the designated layer of a shared mask is the first compressed one in
a routed prefill, the mean over all compressed ones in an exact one; `observed` uses each layer's
own queries and keys, which exist before any routed value is read.

Letters: L compressed layers, B batch, T prompt, C context, Hm mask heads (1 or Hkv), Lm mask layers
(1 if shared, else L), S groups.

    python eval.py --init_from=model.gguf --tasks=continuation --methods=dense,select \\
        --kv_budgets=0.5,0.25,0.125 --relevances=observed,future
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kv_router
from config import KVConfig, SelectConfig, check, count_kept
from kv_router import ValueGroupPath, spread
from model import Transformer, attend, attention_mask, evaluating, lm_loss
from selection.relevance import AS_PUBLISHED, PLAIN, HiddenPredictor, Prompt, QueryPredictor
from storage.append import append_tail, can_append
from storage.integers.cache import IntSelectedCache
from storage.integers.format import LEVELS, REMAINS, IntFormat, row_bytes
from storage.layout import at_least_float32, mask_dtype, tile_size, top_k_mask
from storage.packed import SelectedCache, pack_layers
from storage.packing import select_joint, select_top_m
from storage.state import copy_tensors
from storage.views import Tail

# from which --kv_bytes on: bits of keys, of values (0: levels), tokens whose keys share steps
PLAN = ((0.2, 8, 0, 128), (0.14, 4, 0, 32), (0.09, 4, 0, 64), (0.0, 3, 0, 64))


@cache
def planned(kv: KVConfig, kv_bytes: float) -> KVConfig:
    """Storage as kv says, or where it leaves that to --kv_bytes as is best, as far as known
    (docs/log.md)."""
    if not kv_bytes or kv.ints:
        return kv
    key_bits, value_bits, block = next(best for least, *best in PLAN if kv_bytes >= least)
    block = block if kv.key_block == KVConfig.key_block else kv.key_block
    return replace(kv, kv="select", key_bits=key_bits, value_bits=value_bits, key_block=block)


class Choice(NamedTuple):
    """What is kept of a context: keep (Lm, B, Hm, C) tokens, mask (Lm, B, Hm, C, S) pairs, bool, or
    their levels, uint8; score (Lm, B, Hm, C) of each token."""

    keep: Tensor
    mask: Tensor
    score: Tensor

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """keep (B, Hm, C) and mask (B, Hm, C, S) of compressed layer i."""
        i = min(i, len(self.keep) - 1)  # shared: the only one
        return self.keep[i], self.mask[i]


@dataclass
class Pending:
    """One prompt on its way through the layers: what the paths have seen (exact prefill), or the
    choice they follow (routed)."""

    seen: list[tuple] = field(default_factory=list)
    choice: Choice | None = None
    first: SelectedCache | None = None  # the first layer's, whose masks the others share


class Selector(nn.Module):
    """What the paths of a model share: settings, predictors, the layers' weights, and what a caller
    wants to see or to prescribe."""

    def __init__(self, model: Transformer, kv: KVConfig, cfg: SelectConfig):
        super().__init__()
        m = model.cfg
        self.kv = replace(kv, topk_groups=kv.n_groups)
        self.L = len(kv.layers(m.n_layer))
        self.Hm = m.n_kv_head if kv.mask_scope == "head" else 1
        self.S = kv.n_groups
        self._model = (model,)  # in a tuple: it is no part of this module
        # of a unit of z, in the residual stream
        self.register_buffer("gain", torch.ones(self.L, m.n_kv_head))
        # of the loss for what a layer's attention writes there
        self.register_buffer("feeling", torch.ones(self.L))
        # of every coordinate of z, which routed bits are relative to
        self.register_buffer("rms", torch.ones(self.L, m.n_kv_head, m.head_dim))
        deciding = 1 if kv.mask_scope == "shared" else self.L
        self.predictors = nn.ModuleDict(
            {
                name: QueryPredictor(self.L, m.n_embd, m.n_kv_head, m.head_dim)
                if name == "predictor_query"
                else HiddenPredictor(
                    deciding, m.n_embd, self.Hm, self.Hm * (self.S if name == "predictor" else 1)
                )
                for name in cfg.trained
            }
        )
        self.set(cfg)
        # (x, q, k, z) of each path in the next uncached forward, where somebody asks for them
        self.views: list[tuple] | None = None
        self.oracle: Tensor | None = None  # see diagnosed
        self.replayed: tuple[Choice, int] | None = None  # see replaying
        self.pending: Pending | None = None  # of the cache made last
        self.record = False
        self.chosen = None  # the last prompt's choice, while `record` is on

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """The model's tables of positions."""
        return self._model[0].rope_cos, self._model[0].rope_sin

    def set(self, cfg: SelectConfig) -> None:
        """Choose by these settings from now on. Raises ValueError for a predictor it does not have,
        or what a routed prefill cannot do."""
        check_trained(cfg, self.predictors)
        check(
            self.kv.prefill == "exact"
            or self.kv.mask_scope == "shared"
            or cfg.allocation != "global",
            "allocation=global with prefill=routed",
            "a layer cannot wait for those after it",
            "give --allocation=layer, --mask_scope=shared or --prefill=exact",
        )
        check(
            not cfg.kv_bytes or self.kv.mask_scope != "shared",
            f"kv_bytes={cfg.kv_bytes:g} with mask_scope=shared",
            "bytes are counted by layer or head",
            "give --mask_scope=head",
        )
        check(
            self.kv.value_bits or cfg.kv_bytes,
            "value_bits=0 without kv_bytes",
            "levels need a budget of bytes",
            "give --kv_bytes=0.125",
        )
        self.cfg = cfg
        self.stored.check_model(self._model[0].cfg)

    # ------------------------------------------------------------------------- scores

    def per_mask(self, t: Tensor) -> Tensor:
        """Mean of (L, B, Hkv, ...) over the heads and layers that share a mask: (Lm, B, Hm,
        ...)."""
        t = t if self.kv.mask_scope == "head" else t.mean(2, keepdim=True)
        return t.mean(0, keepdim=True) if self.kv.mask_scope == "shared" else t

    def norms(self, prompt: Prompt, hedge: float | None = None) -> Tensor:
        """Norms of the context's value groups, with `hedge` times their layer's weight
        feeling^hedge * gain: (Lm, B, Hm, C, S)."""
        norm = prompt.norms(self.S)  # (L, B, Hkv, C, S)
        if hedge is not None:
            at = prompt.layers
            norm = norm * (self.feeling[at, None] ** hedge * self.gain[at])[:, None, :, None, None]
        return norm if self.kv.mask_scope == "head" else self.per_mask(norm.square()).sqrt()

    def relevance(self, prompt: Prompt, name: str) -> Tensor:
        """A signal's alpha, (Lm or 1, B, Hm or 1, C); of `predictor` the weighed scores of pairs
        themselves, (Lm, B, Hm, C, S)."""
        if name in PLAIN:
            return self.per_mask(PLAIN[name](prompt, self.cfg))
        if name == "predictor_query":
            return self.per_mask(self.predictors[name](prompt, self.cfg))
        out = self.predictors[name](prompt, self.cfg.predictor_loss)
        at = prompt.layers
        return (
            out * self.per_mask((self.feeling[at, None] * self.gain[at])[:, None, :, None, None])
            if name == "predictor"
            else out.squeeze(-1)
        )

    @torch.no_grad()
    def choose(self, prompt: Prompt) -> Choice:
        """What is kept of a prompt's context, by cfg."""
        with torch.autocast(prompt.column.device.type, enabled=False):
            choice = self._choose(prompt)
        if self.record:  # a routed prefill chooses layer by layer
            self.chosen = (
                choice
                if not prompt.first
                else Choice(*(torch.cat(t) for t in zip(self.chosen, choice, strict=True)))
            )
        return choice

    def _choose(self, prompt: Prompt) -> Choice:
        cfg = self.cfg
        valid = prompt.valid[None, :, None]  # (1, B, 1, C)
        if cfg.whole:
            keep = valid.expand(1 if self.kv.mask_scope == "shared" else prompt.L, -1, self.Hm, -1)
            return Choice(keep, keep.unsqueeze(-1).expand(*keep.shape, self.S), keep.float())
        sink = valid & (valid.cumsum(-1) <= cfg.sinks)
        norm = self.norms(prompt, 1.0)
        alpha = self.relevance(prompt, cfg.relevance)
        if cfg.kv_bytes:
            return self._route_bits(prompt, alpha, valid)
        by = (
            alpha
            if cfg.tokens_by == cfg.relevance or cfg.token_keep == 1
            else self.relevance(prompt, cfg.tokens_by)
        )
        if by.ndim == 5:
            token = by.square().sum(-1).sqrt()
        else:
            token = (
                by.expand(norm.shape[:-1])
                if cfg.tokens_by in AS_PUBLISHED
                else by * norm.square().sum(-1).sqrt()
            )
        pair = (
            alpha
            if alpha.ndim == 5
            else alpha.unsqueeze(-1) ** cfg.hedge * self.norms(prompt, cfg.hedge)
        )
        pair = pair.square() if cfg.kv_keep else pair  # errors of many tokens add up so
        token, pair = (
            t.masked_fill(s, float("inf")).masked_fill(~v, float("-inf"))
            for t, s, v in ((token, sink, valid), (pair, sink.unsqueeze(-1), valid.unsqueeze(-1)))
        )
        # that share one budget
        masks = {"head": 1, "layer": pair.size(2), "global": pair.size(0) * pair.size(2)}[
            cfg.allocation
        ]
        if cfg.kv_keep:
            units = prompt.counts(lambda n: count_kept(cfg.kv_keep, 2 * self.S * n * masks, 1))
            mask = self._within(pair, units, select_joint)
            return Choice(mask.any(-1), mask, token)

        def tokens(n: int) -> int:
            return count_kept(cfg.token_keep, n * masks, 1)

        keep = self._within(token, prompt.counts(tokens), select_top_m)
        if cfg.fixed_k:
            mask = top_k_mask(pair, count_kept(cfg.value_keep, self.S)) & keep.unsqueeze(-1)
        else:
            pairs = pair.masked_fill(~keep.unsqueeze(-1), float("-inf"))
            mask = self._within(
                pairs,
                prompt.counts(lambda n: count_kept(cfg.value_keep, self.S * tokens(n), 1)),
                lambda t, m: select_top_m(t.flatten(-2), m).view(t.shape),
            )
        return Choice(keep, mask, token)

    def _route_bits(self, prompt: Prompt, alpha: Tensor, valid: Tensor) -> Choice:
        """Tokens, groups and, where values have no bits of their own, levels under one budget of
        bytes; mask holds groups, or levels 0 to 3. What a level is worth is the squared error it
        takes away, if a group's numbers are Gaussian; first tokens stay whole and are no part of
        it."""
        kv = self.stored
        cfg = self.cfg
        pair = (
            alpha
            if alpha.ndim == 5
            else alpha.unsqueeze(-1) ** cfg.hedge * self.norms(prompt, cfg.hedge)
        )
        D = prompt.values.size(-1)
        G = self.rms.size(1) // self.Hm
        W = prompt.T - prompt.n_context  # heads to a mask, tokens of the query region
        bits, error, held, scale = (
            ((0, kv.value_bits), (1, 0), self.S, 4)
            if kv.value_bits
            else (LEVELS, REMAINS, 2 * self.S, 2)
        )
        per_mask = (
            mask_dtype(held).itemsize + 1 + 4 / tile_size(self.S if kv.value_bits else 4 * self.S)
        )
        # in half bytes
        key = math.ceil(
            2 * (G * (row_bytes(D, kv.key_bits) + 4 * D / kv.key_block + scale) + per_mask)
        )
        row = torch.tensor([2 * G * row_bytes(D // self.S, b) for b in bits], device=pair.device)
        # (Lm, B, Hm, C, S steps)
        worth = (pair.square().unsqueeze(-1) * -pair.new_tensor(error).diff()).flatten(-2)
        there = valid & (valid.cumsum(-1) > kv.kv_sinks)
        worth = worth.masked_fill(~there.unsqueeze(-1), float("-inf"))
        # that share one budget
        masks = {"head": 1, "layer": self.Hm, "global": prompt.L * self.Hm}[cfg.allocation]

        # of n context tokens; blocks that are not full, counts and starts are paid for, too
        def half_bytes(n: int) -> int:
            whole = min(n, kv.kv_sinks) + W
            return max(
                0,
                math.floor(
                    masks * (2 * G * (4 * D * (cfg.kv_bytes * (n + W) - whole) - 4 * D - 80))
                ),
            )

        taken = self._within(
            worth,
            prompt.counts(half_bytes),
            lambda t, m: select_joint(t, m, key=key, cost=row.diff().repeat(self.S)),
        )
        levels = taken.unflatten(-1, (self.S, -1)).sum(-1).to(torch.uint8)
        return Choice(
            (levels > 0).any(-1),
            levels > 0 if kv.value_bits else levels,
            pair.square().sum(-1).sqrt(),
        )

    @property
    def stored(self) -> KVConfig:
        """How a context is stored."""
        return planned(self.kv, self.cfg.kv_bytes)

    def _within(
        self, score: Tensor, counts: Tensor, rule: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """rule(scores (..., N or N, S), counts (...)) over what shares a budget; score (Lm, B, Hm,
        C or C, S), counts (B,) per row."""
        Lm, _, Hm, C = score.shape[:4]
        if self.cfg.allocation == "head":
            return rule(score, counts[:, None].expand(Lm, -1, Hm))
        if self.cfg.allocation == "layer":
            return rule(score.flatten(2, 3), counts.expand(Lm, -1)).unflatten(2, (Hm, C))
        return (
            rule(score.transpose(0, 1).flatten(1, 3), counts)
            .unflatten(1, (Lm, Hm, C))
            .transpose(0, 1)
        )

    # ------------------------------------------------------------------------- prompts

    def finish(self, pending: Pending, pad: Tensor | None) -> None:
        """An exact prefill has passed all layers: choose, and pack every layer."""
        paths, x, q, k, v, z, caches = zip(*pending.seen, strict=True)
        pending.seen.clear()
        C = z[0].size(2)
        prompt = Prompt(x, q, k, z, C, pad, self.rope, self.oracle)
        choice = self.choose(prompt)
        # all at once: thirty times fewer kernels
        if self.kv.mask_scope != "shared" and not self.stored.ints:
            pack_layers(
                caches,
                prompt.keys[..., :C, :],
                prompt.values,
                choice.keep,
                choice.mask,
                prompt.valid,
            )
        rounded = self.stored.ints and self.cfg.key_rounding == "queries"
        for i, path in enumerate(paths):
            path.store(
                k[i], v[i], z[i], choice, caches[i], pad, prompt.moment(i) if rounded else None
            )
        pending.first = None

    def watch(
        self, model: Transformer, idx: Tensor, pad: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], ...]:
        """(x, q, k, z), each a tuple over compressed layers, of an uncached pass over idx (B, T)
        that reads whole values."""
        self.views = []
        try:
            with evaluating(model):
                model(idx, pad=pad, last_only=True)
            return tuple(zip(*self.views, strict=True))
        finally:
            self.views = None

    def look(
        self,
        model: Transformer,
        idx: Tensor,
        n_context: int,
        n_prompt: int,
        pad: Tensor | None = None,
    ) -> tuple[Prompt, Tensor]:
        """The prompt idx[:, :n_prompt], and the attention on its context of the tokens after it (of
        its query region where there are none), (L, B, Hkv, C)."""
        check(
            n_context < n_prompt,
            "a query region of 0 tokens",
            "relevance needs somebody who asks",
            "give --query or --kv_tail of 1 or more",
        )
        x, q, k, z = self.watch(model, idx, pad)
        whole = Prompt(x, q, k, tuple(t[:, :, :n_context] for t in z), n_context, pad, self.rope)
        alpha = whole.causal(whole.column[n_prompt if n_prompt < whole.T else n_context :])
        q, k = (tuple(t[:, :, :n_prompt] for t in ts) for ts in (q, k))
        return Prompt(
            tuple(t[:, :n_prompt] for t in x), q, k, whole.z, n_context, pad, self.rope
        ), alpha

    # ------------------------------------------------------------------------- training

    def sample(self, model: Transformer, idx: Tensor) -> tuple[Prompt, Tensor]:
        """A training example of windows idx (B, T): a prompt, and the attention its last
        cfg.readers tokens give its context."""
        n_prompt = idx.size(1) - self.cfg.readers
        n_context = n_prompt - self.kv.kv_tail
        check(
            n_context >= 1,
            f"{idx.size(1)} tokens with readers={self.cfg.readers}, kv_tail={self.kv.kv_tail}",
            "some context must be left",
            "give a larger --block_size or fewer --readers",
        )
        return self.look(model, idx, n_context, n_prompt)

    def targets(self, prompt: Prompt, alpha: Tensor) -> dict[str, Tensor]:
        """What each predictor is trained towards: (Lm, B, Hm, C, S or 1), or alpha itself for
        predictor_query."""
        mine = self.per_mask(alpha).unsqueeze(-1)
        return {
            "predictor": mine * self.norms(prompt),
            "expected_attention": mine,
            "predictor_query": alpha,
        }

    def loss(self, model: Transformer, idx: Tensor) -> Tensor:
        """Sum of the predictors' losses on windows idx (B, T)."""
        prompt, alpha = self.sample(model, idx)
        with torch.autocast(idx.device.type, enabled=False):
            want = self.targets(prompt, alpha)
            return torch.stack(
                [
                    p.loss(
                        prompt,
                        want[name],
                        self.cfg if name == "predictor_query" else self.cfg.predictor_loss,
                    )
                    for name, p in self.predictors.items()
                ]
            ).sum()

    @torch.no_grad()
    def calibrate(self, model: Transformer, batches: list[Tensor], fit: bool = False) -> None:
        """Measure gain and feeling on batches of windows (B, T), with `fit` also what the
        predictors' inputs and targets look like."""
        layers = [model.layers[i].self_attn for i in self.kv.layers(model.cfg.n_layer)]
        energy = 0.0
        effect = 0.0
        each = 0.0
        n = 0
        # a pass holds what every layer saw
        for few in (part for idx in batches for part in idx.split(2)):
            z = self.watch(model, few)[3]
            # (L, Hkv, D, D)
            cov = torch.stack(
                [torch.einsum("bhtd,bhte->hde", w, w) for w in map(at_least_float32, z)]
            ).double()
            read = torch.stack([reading(attn) for attn in layers])
            energy = energy + cov.diagonal(dim1=-2, dim2=-1).sum(-1)
            effect = effect + (cov * read).sum((-1, -2))
            # first tokens are stored whole
            later = [at_least_float32(w[:, :, self.kv.kv_sinks :]) for w in z]
            each = each + torch.stack([w.square().sum((0, 2)) for w in later])
            n = n + len(few) * later[0].size(2)
        self.rms.copy_((each / max(1, n)).sqrt().clamp_min(1e-6))
        self.gain.copy_((effect / energy.clamp_min(1e-30)).sqrt())
        self.feeling.copy_(sensitivity(model, layers, [idx[:2, :512] for idx in batches[:2]]))
        if fit and self.predictors:
            prompts, alphas = zip(*(self.sample(model, idx) for idx in batches[:2]), strict=True)
            wants = [self.targets(p, a) for p, a in zip(prompts, alphas, strict=True)]
            for name, p in self.predictors.items():
                p.fit(
                    list(prompts),
                    self.cfg if name == "predictor_query" else [w[name] for w in wants],
                )


def check_trained(cfg: SelectConfig, has: Container[str]) -> None:
    """Raise ValueError where a setting names a predictor that is not among those it has."""
    for name in sorted({cfg.relevance, cfg.tokens_by}):
        check(
            name in PLAIN or name in has,
            f"relevance={name}",
            "it has not been trained",
            f"train.py --stage=select --predictors={name}, and give that run",
        )


def reading(attn: nn.Module) -> Tensor:
    """dec G dec^T per KV head, (Hkv, D, D) float64: the squared norm that o_proj writes for a z is
    z of it z^T, summed over query heads."""
    path = attn.kv_path
    w = attn.o_proj.weight.double().view(-1, path.Hkv, attn.n_head // path.Hkv, path.D)
    G = torch.einsum("ehnd,ehnf->hdf", w, w)
    dec = path.basis()[1].to(w.device)
    return G if path.folded else dec @ G @ dec.mT


def sensitivity(model: Transformer, layers: list[nn.Module], batches: list[Tensor]) -> Tensor:
    """Root mean square gradient of the loss at what each layer's attention adds to the residual
    stream, over its mean: (L,)."""
    written: list[Tensor] = []

    def hook(module, args, out):
        out = out if out.requires_grad else out.detach().requires_grad_()
        out.retain_grad()
        written.append(out)
        return out

    total = 0.0
    hooks = [attn.o_proj.register_forward_hook(hook) for attn in layers]
    wanted = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)  # gradients of activations are enough
    try:
        for idx in batches:
            written.clear()
            with evaluating(model), torch.enable_grad():
                lm_loss(model(idx[:, :-1]), idx[:, 1:]).backward()
            total = total + torch.stack([t.grad.float().square().sum(-1).mean() for t in written])
    finally:
        for h in hooks:
            h.remove()
        for p, w in wanted.items():
            p.requires_grad_(w)
    return (total / total.mean()).sqrt()


# ----------------------------------------------------------------------------- the KV path


class SelectPath(ValueGroupPath):
    """One layer that stores what the selector keeps of a prompt, and everything after it whole. The
    first call with a cache and more tokens than the query region is the prompt; without a cache
    values are whole, or as `replaying` prescribes."""

    reads_chunks = False  # a prompt is chosen from as a whole

    def __init__(self, model_cfg, cfg: KVConfig, selector: Selector, index: int):
        self._shared = (selector,)
        self.index = index  # in a tuple: it is the model's module, not this one's
        super().__init__(model_cfg, selector.kv)

    @property
    def selector(self) -> Selector:
        return self._shared[0]

    @property
    def cfg(self) -> KVConfig:
        return self.selector.kv  # one for all layers

    @cfg.setter
    def cfg(self, cfg: KVConfig) -> None:
        self.selector.kv = cfg

    @property
    def whole(self) -> bool:
        # who watches wants the coordinates that would be cut
        return self.selector.cfg.whole and self.selector.views is None

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> SelectedCache:
        s = self.selector
        shape = (batch, max_len, self.Hkv, self.D, self.S, self.mask_heads, like)
        kv = s.stored
        cache = (
            IntSelectedCache(
                *shape, IntFormat(kv.key_bits, kv.value_bits, kv.key_block, s.rms[self.index])
            )
            if kv.ints
            else SelectedCache(*shape)
        )
        if self.index == 0:
            s.pending = Pending()  # the layers' caches are made in their order
        cache.pending = s.pending
        return cache

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: SelectedCache | None = None,
        pad: Tensor | None = None,
    ) -> Tensor:
        s = self.selector
        C = q.size(2) - self.cfg.kv_tail
        if cache is None:
            if s.views is not None:
                s.views.append((x, q, k, self.encode(v)))
            if s.replayed is None:
                return attend(q, k, v, pad)
            choice, C = s.replayed
            return self._masked(q, k, v, self.encode(v[:, :, :C]), *choice.layer(self.index), pad)
        if cache.columns or C <= 0:
            return self._attend_stored(q, k, v, cache, pad)
        z = self.encode(v[:, :, :C])
        if self.cfg.prefill == "exact":
            if self.index == 0:
                cache.pending.seen.clear()  # of a pass that failed
            cache.pending.seen.append((self, x, q, k, v, z, cache))
            if len(cache.pending.seen) == s.L:
                s.finish(cache.pending, pad)
            return attend(q, k, v, pad)
        if cache.pending.choice is None or s.kv.mask_scope != "shared":
            alpha = None if s.oracle is None else s.oracle[self.index : self.index + 1]
            cache.pending.choice = s.choose(
                Prompt([x], [q], [k], [z], C, pad, s.rope, alpha, self.index)
            )
        self.store(k, v, z, cache.pending.choice, cache, pad)
        choice = cache.pending.choice
        if self.index == s.L - 1:
            cache.pending.choice = cache.pending.first = None  # the prompt is done
        return self._masked(q, k, v, z, *choice.layer(0), pad)

    def store(
        self,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        choice: Choice,
        cache: SelectedCache,
        pad: Tensor | None,
        moment: Tensor | None = None,
    ) -> None:
        """Pack the chosen part of the context, unless that is done (masks shared by layers once),
        and append the query region whole. moment: see SelectedCache.pack."""
        C = z.size(2)
        shared = self.cfg.mask_scope == "shared"
        n_pad = torch.zeros(len(k), dtype=torch.int64, device=k.device) if pad is None else pad
        if not cache.n_context:
            valid = torch.arange(C, device=k.device) >= n_pad[:, None]
            keep, mask = choice.layer(self.index)
            if isinstance(cache, IntSelectedCache):
                # first tokens go to the tail
                keep = keep & (valid.cumsum(-1) > self.cfg.kv_sinks)[:, None]
            cache.pack(
                k[:, :, :C], z, keep, mask, valid, cache.pending.first if shared else None, moment
            )
            cache.pending.first = cache.pending.first or cache
            if isinstance(cache, IntSelectedCache):
                n = min(self.cfg.kv_sinks, C)
                # rows with fewer tokens than that: theirs come last
                few = (n_pad + n - C).clamp(0, n)
                at = ((n_pad - few)[:, None] + torch.arange(n, device=k.device)).clamp(0, C - 1)[
                    :, None, :, None
                ]
                cache.append_sinks(k.take_along_dim(at, 2), v.take_along_dim(at, 2), few)
        cache.append(k[:, :, C:], v[:, :, C:], (n_pad - C).clamp_min(0))

    def _masked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        keep: Tensor,
        mask: Tensor,
        pad: Tensor | None,
    ) -> Tensor:
        """Full-size and differentiable: attention of T tokens over routed values of the context, z
        (B, Hkv, C, D) encoded, and whole ones after it; in an exact prefill context and query
        region read whole values. keep (B, Hm, C), mask (B, Hm, C, S)."""
        (B, H, T, _) = q.shape
        C = z.size(2)
        # the first column that reads routed values
        first = min(C + self.cfg.kv_tail, T) if self.cfg.prefill == "exact" else 0
        read = torch.cat((self.decode(z * spread(mask, self.D)), v[:, :, C:]), 2)
        there = (
            torch.cat((keep, keep.new_ones(B, keep.size(1), T - C)), -1)
            .expand(-1, self.Hkv, -1)
            .repeat_interleave(H // self.Hkv, 1)
        )
        own = torch.eye(T, dtype=torch.bool, device=q.device)[first:]
        visible = attention_mask(T, T, pad, q.device)[:, :, first:] & there.unsqueeze(-2) | own
        routed = F.scaled_dot_product_attention(
            q[:, :, first:], k, read, attn_mask=visible, enable_gqa=self.Hkv != H
        )
        return (
            torch.cat((attend(q[:, :, :first], k[:, :, :first], v[:, :, :first], pad), routed), 2)
            if first
            else routed
        )

    def _attend_stored(
        self, q: Tensor, k: Tensor, v: Tensor, cache: SelectedCache, pad: Tensor | None
    ) -> Tensor:
        """Attention of T new tokens, appended to the tail, over what is stored."""
        n_pad = (
            torch.zeros(len(q), dtype=torch.int64, device=q.device)
            if pad is None
            else (pad - cache.columns).clamp(0, q.size(2))
        )
        cache.append(k, v, n_pad)
        return self.attend_packed(q, cache.packed(), cache.whole())

    def can_step(self) -> bool:
        """Whether `step` has kernels for this storage."""
        return can_append(self.D) and (self.whole or self.folded)

    def step(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: SelectedCache, tail: Tail
    ) -> Tensor:
        """forward for one token per sequence, on the device alone: into the tail, whose count is
        one up already."""
        append_tail(tail, k, v)
        return self.attend_packed(q, cache.packed(), tail)


# -------------------- attaching, looking, saving


def attach(
    model: Transformer,
    kv: KVConfig,
    cfg: SelectConfig,
    batches: list[Tensor] | None = None,
    seed: int = 0,
    fit: bool = False,
) -> Transformer:
    """Give the chosen layers selecting paths and the model its `selector`, in place. Returns the
    model.

    batches: token ids (B, T) that calibrate bases and weights, with `fit` the predictors' scales
    too; None leaves that to load_state."""
    kv.check_model(model.cfg)
    selector = Selector(model, kv, cfg)
    made = iter(range(selector.L))
    kv_router.attach(model, kv, batches, seed, lambda m, c: SelectPath(m, c, selector, next(made)))
    model.selector = selector.to(model.norm.weight.device)
    if batches is not None:
        selector.calibrate(model, batches, fit)
    return model


def selector_of(model: Transformer) -> Selector | None:
    """The model's selector; None where nothing selects."""
    return getattr(model, "selector", None)


def detach(model: Transformer) -> Transformer:
    """Put whole values back, in place, and forget the selector. Not for a folded model."""
    if selector_of(model) is not None:
        del model.selector
    return kv_router.detach(model)


def state(model: Transformer) -> dict[str, Tensor]:
    """The selector's tensors under their names in the model; empty where there is none."""
    s = selector_of(model)
    return {} if s is None else {f"selector.{k}": t for k, t in s.state_dict().items()}


def load_state(model: Transformer, saved: dict[str, Tensor]) -> None:
    """Put `saved` into a selector fresh from attach. ValueError lists what does not fit."""
    copy_tensors(state(model), saved, "selector state")


@contextmanager
def diagnosed(model: Transformer, idx: Tensor, n_prompt: int, pad: Tensor | None = None):
    """Inside the `with`, `oracle` relevance of the prompt idx[:, :n_prompt] is the attention that
    the rest of idx (B, T) pays it, or its own query region where there is no rest (eq 12). Nothing
    happens where no signal asks for it."""
    s = selector_of(getattr(model, "model", model))
    n_context = n_prompt - (s.kv.kv_tail if s else 0)
    if s is None or "oracle" not in (s.cfg.relevance, s.cfg.tokens_by) or n_context <= 0:
        yield
        return
    s.oracle = s.look(model, idx, n_context, n_prompt, pad)[1]
    try:
        yield
    finally:
        s.oracle = None


@contextmanager
def replaying(model: Transformer, choice: Choice, n_context: int):
    """Inside the `with`, uncached forwards read the context's first n_context columns as `choice`
    keeps them: the masked execution."""
    s = selector_of(model)
    s.replayed = choice, n_context
    try:
        yield
    finally:
        s.replayed = None
