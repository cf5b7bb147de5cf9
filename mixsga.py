"""mixSGA (arXiv 2506.13541, section 3): tokens routed to experts that share KV heads; beside it
GQA, CLA and H2O.

An expert of group size g stores the average of every g neighbouring KV heads: Hkv / g keys and
values for a token. No token is dropped and no weight is added but a router per layer, E scores for
a token. Kept of keys and values for ratios a : b : c of sizes 1, 2, 4: (a + b/2 + c/4) / (a + b +
c).

* Training and prompts, expert choice (equation 2): expert 1 takes the ceil(rho_1 T) tokens that
  score highest, expert 2 as many of the rest, the last what remains: exact counts, one expert to a
  token. A token's expert then depends on the whole prompt.
* Decoding (equation 3): a token goes to the expert of its largest score, which needs no later
  token.
* The consistency loss (equations 4-5), a cross-entropy between scores and choice, makes the second
  agree with the first.

Two executions: *masked* without a cache (averages in full-size tensors, differentiable), *packed*
with one: a PackedCache per expert with as many heads as it keeps, attention over all of them merged
by log-sum-exp. An expert's cache may hold value groups, too.

Ours, for GQA and CLA as well (what each is worth: docs/log.md): the newest `kv_tail` tokens are
read whole and join their expert after that; heads are reordered and turned, exactly, until those
averaged are alike (`align`); routers start from what averaging a token would cost (`calibrate`);
their scores are taken relative to their running mean.

Open in the paper, our reading: the router's input is detached and the language-model loss does not
reach it (`lm_to_experts`: straight through the choice); the cross-entropy is taken over the scores'
logits, which have the same argmax and do not saturate. Averaging keys before or after RoPE is the
same, since all heads of a token turn alike. Experts of share 0 are never chosen.

    python train.py --stage=continue --kv=mixsga --expert_ratios=3:1:6 --init_from=out/RUN/pretrain
    python eval.py --tasks=mixsga
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import KVConfig, MixConfig, ModelConfig, check
from kernels import packed_attention
from kv_router import group_energy, spread
from model import DenseCache, KVCache, attend, attention_mask
from storage.integers.cache import IntPackedCache
from storage.layout import at_least_float32, top_k_mask
from storage.packed import Flat, PackedCache
from storage.views import Tail, merged

PADDING = 255  # in an index of experts
PRIOR = 32  # tokens of mean 0 that a running mean of scores begins with
ROUTER_RATE = 10.0  # a router learns that much faster than the rest


# ----------------------------------------------------------------------------- who takes a token


def expert_choice(scores: Tensor, ratios: tuple[Fraction, ...], valid: Tensor) -> Tensor:
    """Expert of every token by equation 2: scores (B, T, E), valid (B, T) bool (False: padding) ->
    (B, T) int64, any number at padding.

    Of n valid tokens expert e takes the ceil(ratios[e] n) best of what the experts before it left
    (fewer where fewer are left), the last takes the rest. Ties go to the earlier token."""
    index = torch.full(valid.shape, len(ratios) - 1, device=scores.device)
    rest = valid
    n = valid.sum(-1, keepdim=True)
    for e, r in enumerate(ratios[:-1]):
        order = (
            scores[..., e]
            .masked_fill(~rest, -math.inf)
            .argsort(dim=-1, descending=True, stable=True)
        )
        rank = torch.empty_like(order).scatter(
            -1, order, torch.arange(valid.size(1), device=order.device).expand_as(order)
        )
        # minus a floor is a ceiling
        taken = rest & (rank < -(-n * r.numerator).div(r.denominator, rounding_mode="floor"))
        index = index.masked_fill(taken, e)
        rest = rest & ~taken
    return index


def averaged(t: Tensor, size: int) -> Tensor:
    """Means of every `size` neighbouring heads: (B, h, T, D) -> (B, h / size, T, D)."""
    return t if size == 1 else t.unflatten(1, (-1, size)).mean(2)


# ----------------------------------------------------------------------------- reading


def near(T: int, w: int, device) -> Tensor:
    """True where key j is among the newest w tokens for query i, itself included: (T, T) bool."""
    at = torch.arange(T, device=device)
    return at[:, None] - at < w


def attend_near(
    q: Tensor, k: Tensor, v: Tensor, whole: tuple[Tensor, Tensor], w: int, pad: Tensor | None = None
) -> Tensor:
    """Causal attention over k, v (B, Hkv, T, D), but over `whole`, of the same shapes, for the
    newest w tokens of every query. One softmax over both, each masked where the other is read."""
    if not w:
        return attend(q, k, v, pad)
    T = q.size(2)
    visible = attention_mask(T, T, pad, q.device)
    close = near(T, w, q.device)
    mask = torch.cat((visible & ~close, visible & close), -1)
    return F.scaled_dot_product_attention(
        q,
        torch.cat((k, whole[0]), 2),
        torch.cat((v, whole[1]), 2),
        attn_mask=mask,
        enable_gqa=q.size(1) != k.size(1),
    )


def h2o_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: float,
    pad: Tensor | None = None,
    whole: tuple[Tensor, Tensor] | None = None,
    w: int = 0,
) -> Tensor:
    """attend_near while a heavy-hitter cache of n = ceil(keep T) tokens evicts as it decodes (arXiv
    2306.14048).

    q (B, H, T, D), k, v (B, Hkv, T, D). Token by token: the new one reads what is held and itself;
    each held token's weights are added up; when more than n are held the one with the least weight
    so far goes, the newest n // 2 excepted. One choice for all heads of a layer."""
    B, H, T, D = q.shape
    n = math.ceil(keep * T)
    close = near(T, w, q.device)

    def over(k: Tensor) -> Tensor:
        return at_least_float32(
            (q * D**-0.5).view(B, k.size(1), -1, T, D) @ k.unsqueeze(2).mT
        ).view(B, H, T, T)

    logits = torch.where(close, over(whole[0]), over(k)) if w else over(k)
    visible = attention_mask(T, T, pad, q.device).expand(B, 1, T, T)
    held = torch.ones(B, T, dtype=torch.bool, device=q.device)
    total = logits.new_zeros(B, T)
    p = torch.zeros_like(logits)
    at = torch.arange(T, device=q.device)
    for t in range(T):
        p[:, :, t] = (
            logits[:, :, t].masked_fill(~(visible[:, :, t] & held[:, None]), -math.inf).softmax(-1)
        )
        total += p[:, :, t].sum(1)
        here = held & visible[:, 0, t]
        old = here & (at <= t - n // 2)
        worst = total.masked_fill(~old, math.inf).argmin(-1, keepdim=True)
        full = (here.sum(-1, keepdim=True) > n) & old.any(-1, keepdim=True)
        held = held.scatter(-1, worst, ~full & held.gather(-1, worst))
    p = p.view(B, k.size(1), -1, T, T)
    y = (p * ~close) @ at_least_float32(v).unsqueeze(2)
    if w:
        y = y + (p * close) @ at_least_float32(whole[1]).unsqueeze(2)
    return y.view(B, H, T, D).to(q.dtype)


class SharingPath(nn.Module):
    """What GroupedHeads and CrossLayer have in common: reading, the newest `tail` tokens whole, or
    under eviction (`h2o`: share of the tokens held; 1: all)."""

    reads_chunks = False
    h2o = 1.0
    tail = 0

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, whole: tuple[Tensor, Tensor], pad: Tensor | None
    ) -> Tensor:
        if self.h2o == 1:
            return attend_near(q, k, v, whole, self.tail, pad)
        return h2o_attention(q, k, v, self.h2o, pad, whole, self.tail)

    def one_by_one(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache, pad: Tensor | None
    ) -> Tensor:
        """forward of T tokens after others, each of which has its own newest ones."""
        return torch.cat(
            [
                self(
                    x[:, t : t + 1],
                    q[:, :, t : t + 1],
                    k[:, :, t : t + 1],
                    v[:, :, t : t + 1],
                    cache,
                    pad,
                )
                for t in range(q.size(2))
            ],
            2,
        )


class Newest(Flat):
    """The newest tokens of a layer, whole: k, v (B, Hkv, n, D), n at most `size`; the same columns
    for all sequences. NAMES are tensors with a row for each sequence."""

    NAMES = ("tail_k", "tail_v")

    def __init__(self, batch: int, size: int, n_kv_head: int, head_dim: int, like: Tensor):
        self.size = size
        self.columns = 0  # columns seen, padding included
        self.tail_k = like.new_zeros(batch, n_kv_head, 0, head_dim)
        self.tail_v = torch.zeros_like(self.tail_k)

    @property
    def B(self) -> int:
        """Sequences held."""
        return self.tail_k.size(0)

    def push(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take T tokens; return the k, v (B, Hkv, n, D) of those that leave for them."""
        k = torch.cat((self.tail_k, k), 2)
        v = torch.cat((self.tail_v, v), 2)
        self.columns += k.size(2) - self.tail_k.size(2)
        leave = max(0, k.size(2) - self.size)
        self.tail_k = k[:, :, leave:].contiguous()
        self.tail_v = v[:, :, leave:].contiguous()
        return k[:, :, :leave], v[:, :, :leave]

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {"columns": self.columns}

    def slice(self, rows: list[int]):
        """A copy that holds the sequences `rows` only, in that order."""
        out = copy.copy(self)
        pick = torch.tensor(rows, dtype=torch.int64, device=self.tail_k.device)
        for name in self.NAMES:
            setattr(out, name, getattr(self, name)[pick])
        return out

    @classmethod
    def join(cls, caches: list):
        """One cache of the sequences of all, in order; each must have the same columns."""
        out = copy.copy(caches[0])
        for name in cls.NAMES:
            setattr(out, name, torch.cat([getattr(c, name) for c in caches]))
        return out


# -------------------- experts of grouped heads


class ExpertCache(Newest):
    """One layer's cache: the newest tokens whole, each with its expert to be, and a PackedCache per
    expert, with as many heads as it keeps.

    tail_index (B, n, 1) uint8: expert of each of the newest, PADDING for padding. seen (B, E): sums
    of the router's scores. What an expert holds is in the order of the columns. It cannot be
    truncated: what left the newest is averaged, and a sum is not taken back."""

    NAMES = (*Newest.NAMES, "tail_index", "seen")

    def __init__(
        self,
        parts: list[PackedCache],
        batch: int,
        size: int,
        n_kv_head: int,
        head_dim: int,
        like: Tensor,
    ):
        super().__init__(batch, size, n_kv_head, head_dim, like)
        self.parts = parts
        self.tail_index = torch.empty(batch, 0, 1, dtype=torch.uint8, device=like.device)
        self.seen = at_least_float32(like).new_zeros(batch, len(parts) if len(parts) > 1 else 0)

    def append(self, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, stored: Callable) -> None:
        """Take T tokens, k, v (B, Hkv, T, D), whose experts are index (B, T); valid (B, T) bool.
        What leaves the newest goes to its expert, as `stored` (GroupedHeads.stored) says."""
        index = torch.cat(
            (self.tail_index, index.masked_fill(~valid, PADDING).byte().unsqueeze(-1)), 1
        )
        k, v = self.push(k, v)
        leave = k.size(2)
        self.tail_index = index[:, leave:].contiguous()
        index = index[:, :leave, 0]
        for e, (part, each) in enumerate(
            zip(self.parts, stored(k, v), strict=True) if leave else ()
        ):
            count = (index == e).sum(-1)
            width = int(count.max()) if count.numel() else 0
            if width:
                # its own tokens last, in order
                order = (
                    (index == e).byte().argsort(dim=-1, stable=True)[:, -width:][:, None, :, None]
                )
                part.append(
                    *(t.gather(2, order.expand(-1, t.size(1), -1, t.size(3))) for t in each),
                    width - count,
                )
                part.columns += width

    def newest(self, n_pad: Tensor) -> Tail:
        """The newest tokens as kernels.packed_attention reads them; the first n_pad (B,) columns of
        all are padding."""
        n = self.tail_k.size(2)
        first = (n_pad - (self.columns - n)).clamp(0, n)
        return Tail(self.tail_k, self.tail_v, first, n - first)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, those of the parts by number and name."""
        parts = {
            f"{e}.{n}": t for e, part in enumerate(self.parts) for n, t in part.tensors().items()
        }
        return {**super().tensors(), **parts}

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {
            **super().extra(),
            **{f"{e}.{n}": x for e, part in enumerate(self.parts) for n, x in part.extra().items()},
        }

    def slice(self, rows: list[int]) -> ExpertCache:
        """A copy that holds the sequences `rows` only, in that order."""
        out = super().slice(rows)
        out.parts = [part.slice(rows) for part in self.parts]
        return out

    @classmethod
    def join(cls, caches: list[ExpertCache]) -> ExpertCache:
        """One cache of the sequences of all, in order; each must have the same columns. Their parts
        grow to one capacity."""
        out = super().join(caches)
        out.parts = []
        for parts in zip(*(c.parts for c in caches), strict=True):
            cap = max(p.cap for p in parts)
            for p in parts:
                p._grow(cap, exact=True)
            out.parts.append(type(parts[0]).join(parts))
            out.parts[-1].columns = max(p.columns for p in parts)
        return out


class GroupedHeads(SharingPath):
    """Experts of grouped KV heads on one layer (equations 1-5). With one expert it is GQA made by
    averaging, and has no router.

    by: None (training and prompts: expert choice; else, evaluation without a cache included: the
    largest score), or "choice" or "score" for all. Without a cache evaluation is decode mode: what
    decoding token by token from the first one gives."""

    by: str | None = None

    def __init__(self, m: ModelConfig, kv: KVConfig, mix: MixConfig, layer: int = 0):
        super().__init__()
        mix.check_model(m)
        groups = mix.expert_groups
        S = kv.n_groups if mix.expert_groups else 2  # two groups, both kept: any D is even
        check(
            groups <= S and m.head_dim % S == 0,
            f"expert_groups={groups} with n_groups={S}, head_dim={m.head_dim}",
            "needs at most S groups, and S must divide D",
            "give smaller ones",
        )
        self.Hkv = m.n_kv_head
        self.D = m.head_dim
        self.sizes = mix.sizes
        self.ratios = mix.ratios
        self.mix = mix
        self.tail = kv.kv_tail
        self.k = groups or S  # value groups kept
        self.stored_as = replace(
            kv,
            kv="value_groups",
            n_groups=S,
            topk_groups=self.k,
            kv_tail=0,
            kv_tail_block=1,
            reconstructor="zero",
            value_router="norm",
            mask_scope="head" if self.k < S else "layer",
        )
        E = len(self.sizes)
        # experts of share 0
        self.register_buffer(
            "never", torch.tensor([not r for r in self.ratios], device="cpu"), persistent=False
        )
        self.router = nn.Linear(m.n_embd, E) if E > 1 and mix.expert_router == "learned" else None
        if self.router is not None:  # He initialisation, zero bias
            nn.init.kaiming_normal_(self.router.weight)
            nn.init.zeros_(self.router.bias)
            # of the scores relative to their running mean
            self.offset = nn.Parameter(torch.zeros(E))
            self.router.weight.rate = self.router.bias.rate = self.offset.rate = ROUTER_RATE
        # Gumbel noise on the logarithms of the shares: the largest falls on expert e with
        # probability ratios[e]
        elif E > 1:
            uniform = torch.rand(
                m.block_size, E, generator=torch.Generator().manual_seed(layer), device="cpu"
            ).clamp_min(1e-20)
            self.register_buffer(
                "noise",
                torch.tensor([max(float(r), 1e-20) for r in self.ratios]).log()
                - (-uniform.log()).log(),
                persistent=False,
            )
        self.consistency: Tensor | None = None  # of the last training forward
        # share of tokens whose choice is their largest score, of the last forward that chose
        self.agreement: Tensor | None = None

    def logits(
        self, x: Tensor, start: int, pad: Tensor | None, cache: ExpertCache | None
    ) -> Tensor:
        """What scores are the sigmoid of, (B, T, E) for x (B, T, n_embd), -inf for experts of share
        0. start: columns before x, whose sums the cache has and which x's join."""
        (B, T, _) = x.shape
        E = len(self.sizes)
        # a token's number in its sequence
        at = torch.arange(start, start + T, device=x.device) - (0 if pad is None else pad[:, None])
        at = at.expand(B, T)
        if self.router is not None:
            with torch.autocast(x.device.type, enabled=False):
                raw = self.router(x.detach().to(self.router.weight.dtype)) * (at >= 0).unsqueeze(-1)
            total = raw.cumsum(1) + (0 if cache is None else cache.seen.unsqueeze(1))
            if cache is not None:
                cache.seen = total[:, -1].clone()
            out = raw - total / (at.clamp_min(0) + 1 + PRIOR).unsqueeze(-1) + self.offset
        elif E > 1:
            out = self.noise[at.clamp_min(0)]
        else:
            out = x.new_zeros(B, T, 1)
        return out.masked_fill(self.never, -math.inf)

    def stored(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What each expert would store of tokens k, v (B, Hkv, T, D): k, v (B, Hkv / size, T, D), v
        with zeros where dropped, and the mask of its groups (B, Hkv / size or 1, T, S) bool."""
        out = []
        S = self.stored_as.n_groups
        for size in self.sizes:
            ke = averaged(k, size)
            ve = averaged(v, size)
            if self.k < S:
                mask = top_k_mask(group_energy(ve.detach(), S, ve.size(1)), self.k)
                ve = ve * spread(mask, self.D)
            else:
                mask = torch.ones(k.size(0), 1, k.size(2), S, dtype=torch.bool, device=k.device)
            out.append((ke, ve, mask))
        return out

    def chosen(self, logits: Tensor, by: str, valid: Tensor) -> Tensor:
        """Expert of every token, (B, T) int64."""
        if by == "score":
            return logits.argmax(-1)
        index = expert_choice(logits.detach(), self.ratios, valid)
        self.agreement = (index == logits.argmax(-1))[valid].float().mean()
        return index

    def mixed(self, each: list[Tensor], index: Tensor, logits: Tensor) -> Tensor:
        """Every token as its expert stores it, back on all heads: of (B, Hkv / size, T, D) per
        expert, (B, Hkv, T, D)."""
        each = [t.repeat_interleave(size, 1) for t, size in zip(each, self.sizes, strict=True)]
        out = each[0]
        for e, t in enumerate(each[1:], 1):
            out = torch.where((index == e)[:, None, :, None], t, out)
        if (
            self.training
            and torch.is_grad_enabled()
            and self.router is not None
            and self.mix.lm_to_experts
        ):
            score = logits.sigmoid()
            # zero; its gradient is that of each expert's weight
            through = (score - score.detach()).to(out.dtype)
            out = out + sum(through[:, None, :, e, None] * t.detach() for e, t in enumerate(each))
        return out

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: ExpertCache | None = None,
        pad: Tensor | None = None,
    ) -> Tensor:
        T = q.size(2)
        start = cache.columns if cache is not None else 0
        if start and T > 1:
            return self.one_by_one(x, q, k, v, cache, pad)
        n_pad = torch.zeros(q.size(0), dtype=torch.int64, device=q.device) if pad is None else pad
        valid = torch.arange(start, start + T, device=q.device) >= n_pad[:, None]
        logits = self.logits(x, start, pad, cache)
        prompt = cache is not None and T > 1
        index = self.chosen(
            logits, self.by or ("choice" if self.training or prompt else "score"), valid
        )
        if self.training and torch.is_grad_enabled() and self.router is not None:
            self.consistency = F.cross_entropy(logits[valid], index[valid])
        check(
            cache is not None or self.training or not self.stored_as.ints,
            "integers without a cache",
            "experts' blocks are formed in one",
            "measure with --tasks=continuation or prompts",
        )
        if cache is None or prompt:
            stored = self.stored(k, v)
            y = self.read(
                q, *(self.mixed([s[i] for s in stored], index, logits) for i in (0, 1)), (k, v), pad
            )
        if cache is not None:
            cache.append(k, v, index, valid, self.stored)
            if not prompt:
                old = [
                    packed_attention(
                        q,
                        part.packed() if part.cap else None,
                        part.whole() if part.tail_k.numel() else None,
                    )
                    for part in cache.parts
                    if part.cap or part.tail_k.numel()
                ]
                y = (
                    merged(*old, packed_attention(q, None, cache.newest(n_pad)))
                    if self.tail or not old
                    else merged(*old)
                )
        return y

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> ExpertCache:
        made = IntPackedCache if self.stored_as.ints else PackedCache
        parts = [
            made(batch, 0, self.Hkv // size, self.D, self.stored_as, self.k, like)
            for size in self.sizes
        ]
        return ExpertCache(parts, batch, self.tail, self.Hkv, self.D, like)


# ----------------------------------------------------------------------------- layers that share


class CrossLayer(SharingPath):
    """Cross-layer attention: a layer that stores keys and values whole, and those above it that
    read them with queries of their own, but for the newest tokens, of which each reads its own."""

    def __init__(self, m: ModelConfig, source: CrossLayer | None, tail: int = 0):
        super().__init__()
        self.shape = (m.n_kv_head, m.head_dim)
        self.tail = tail
        # in a tuple: the module belongs to another layer
        self.source = (source,) if source is not None else ()
        self.seen: tuple[Tensor, Tensor] | None = None  # keys and values of the forward under way

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> DenseCache | Newest:
        return (
            Newest(batch, self.tail, *self.shape, like)
            if self.source
            else DenseCache(batch, max_len, *self.shape, like)
        )

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: DenseCache | Newest | None = None,
        pad: Tensor | None = None,
    ) -> Tensor:
        if not self.source:
            if cache is not None:
                k, v = cache.append(k, v)
            self.seen = k, v
            return (
                self.read(q, k, v, (k, v), pad)
                if cache is None or cache.length == q.size(2)
                else attend(q, k, v, pad)
            )
        start = cache.columns if cache is not None else 0
        if start and q.size(2) > 1:
            return self.one_by_one(x, q, k, v, cache, pad)
        far = [t[:, :, : start + q.size(2)] for t in self.source[0].seen]
        if cache is not None:
            cache.push(k, v)
        if not start:
            return self.read(q, *far, (k, v), pad)
        far = [
            torch.cat((t[:, :, : t.size(2) - own.size(2)], own), 2)
            for t, own in zip(far, (cache.tail_k, cache.tail_v), strict=True)
        ]
        return attend(q, *far, pad)


# ----------------------------------------------------------------------------- on a model


def gqa_sizes(share: Fraction, n_layer: int, n_kv_head: int) -> list[int]:
    """Group size of every layer for GQA at most `share` of the KV heads, as near as halvings allow:
    two neighbouring divisors of n_kv_head, the smaller groups in the first layers. Raises
    ValueError where one head a layer is more than that."""
    divisors = [g for g in range(1, n_kv_head + 1) if n_kv_head % g == 0]
    check(
        Fraction(1, n_kv_head) <= share,
        f"kv_share={float(share):g} with n_kv_head={n_kv_head}",
        "one head is kept at least",
        f"give {1 / n_kv_head:g} or more",
    )
    wide = next(g for g in divisors if Fraction(1, g) <= share)
    fine = max([g for g in divisors if Fraction(1, g) > share], default=wide)
    if wide == fine:
        return [wide] * n_layer
    n_fine = int((share - Fraction(1, wide)) * n_layer / (Fraction(1, fine) - Fraction(1, wide)))
    return [fine] * n_fine + [wide] * (n_layer - n_fine)


def cla_sources(share: Fraction, n_layer: int) -> list[int]:
    """Layer whose keys and values every layer reads, ceil(share n_layer) of them their own: the
    shares of CLA are those of whole layers."""
    n = math.ceil(share * n_layer)
    return [-(-(i * n // n_layer) * n_layer // n) for i in range(n_layer)]


def attach(model: nn.Module, kv: KVConfig, mix: MixConfig) -> nn.Module:
    """Give a dense model the KV paths of kv.kv (mixsga, gqa or cla), in place; what is new is
    trainable. Returns the model."""
    m = model.cfg
    share = Fraction(str(mix.kv_share))
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
    paths: list[nn.Module] = []
    if kv.kv == "mixsga":
        paths = [GroupedHeads(m, kv, mix, i) for i in range(m.n_layer)]
    elif kv.kv == "gqa":
        sizes = gqa_sizes(share, m.n_layer, m.n_kv_head)
        paths = [
            GroupedHeads(m, kv, replace(mix, group_sizes=str(g), expert_ratios="1"), i)
            for i, g in enumerate(sizes)
        ]
    elif kv.kv == "cla":
        for i, source in enumerate(cla_sources(share, m.n_layer)):
            paths.append(CrossLayer(m, None if source == i else paths[source], kv.kv_tail))
    for block, path in zip(model.layers, paths, strict=True):
        block.self_attn.kv_path = path.to(block.self_attn.o_proj.weight)
        path.train(block.training)
    return model


def experts(model: nn.Module) -> list[GroupedHeads]:
    """The model's paths of grouped heads, layer by layer."""
    return [p for p in model.modules() if isinstance(p, GroupedHeads)]


def shares(model: nn.Module) -> bool:
    """Whether heads or layers of the model share what is stored."""
    return any(isinstance(p, SharingPath) for p in model.modules())


def described(model: nn.Module) -> str:
    """The storage in a few words."""
    paths = experts(model)
    newest = next(p.tail for p in model.modules() if isinstance(p, SharingPath))
    if not paths:
        text = "layers share"
    elif len(paths[0].sizes) == 1:
        text = "heads by " + ",".join(str(p.sizes[0]) for p in paths)
    else:
        p = paths[0]
        text = f"{p.mix.expert_ratios} of {p.mix.group_sizes}"
        if p.mix.expert_groups:
            text += f" {p.k} of {p.stored_as.n_groups} groups"
    return f"{text} tail {newest}" if newest else text


def consistency_loss(model: nn.Module) -> Tensor | float:
    """Weighted mean of the consistency loss over the layers of the last training forward; 0.0 where
    there is none."""
    terms = [
        p.mix.consistency_weight * p.consistency
        for p in experts(model)
        if p.consistency is not None
    ]
    return torch.stack(terms).mean() if terms else 0.0


def kept_shares(model: nn.Module, cache: KVCache) -> float:
    """Share of the model's keys and values that a filled cache of it holds, by count: heads of
    tokens, value groups, the newest tokens."""
    held = 0.0
    B = next(iter(cache.layers[0].tensors().values())).size(0)  # held: of whole tokens
    tokens = B * cache.length - (0 if cache.pad is None else int(cache.pad.sum()))
    for block, layer in zip(model.layers, cache.layers, strict=True):
        path = block.self_attn.kv_path
        if isinstance(layer, DenseCache):
            held += tokens
        else:
            first = (
                0
                if cache.pad is None
                else (cache.pad - (cache.length - layer.tail_k.size(2))).clamp_min(0).sum().item()
            )
            held += B * layer.tail_k.size(2) - first
        if isinstance(layer, ExpertCache):
            held += (
                sum(
                    (int(p.n_packed.sum()) * (1 + p.k / p.S) / 2 + int(p.n_tail.sum())) * p.Hkv
                    for p in layer.parts
                )
                / path.Hkv
            )
    return held / (tokens * len(cache.layers))


@contextmanager
def stored_in(model: nn.Module, key_bits: int = 16, value_bits: int = 16, key_block: int = 64):
    """Inside the `with` caches of experts hold integers: tokens of an expert are quantised a block
    at a time, those that wait for their block to fill are whole."""
    before = {p: p.stored_as for p in experts(model)}
    for p, kv in before.items():
        p.stored_as = replace(
            kv, key_bits=key_bits, value_bits=value_bits, key_block=key_block, kv_sinks=0
        )
    try:
        yield
    finally:
        for p, kv in before.items():
            p.stored_as = kv


@contextmanager
def routing(model: nn.Module, by: str | None = None, h2o: float = 1.0):
    """Inside the `with` every path routes `by` ("choice", "score" or None) and reads under H2O's
    eviction at that share."""
    mine = [p for p in model.modules() if isinstance(p, SharingPath)]
    for p in mine:
        p.by = by
        p.h2o = h2o
    try:
        yield
    finally:
        for p in mine:
            p.by = None
            p.h2o = 1.0
