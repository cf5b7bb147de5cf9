"""mixSGA (arXiv 2506.13541, section 3): tokens routed to experts that share KV heads; beside it GQA, CLA and H2O.

An expert of group size g stores the average of every g neighbouring KV heads: Hkv / g keys and values for a token. No token is dropped
and no weight is added but a router per layer, E scores for a token. Kept of keys and values for ratios a : b : c of sizes 1, 2, 4:
(a + b/2 + c/4) / (a + b + c).

* Training and prompts, expert choice (equation 2): expert 1 takes the ceil(rho_1 T) tokens that score highest, expert 2 as many of the
  rest, the last what remains: exact counts, one expert to a token. A token's expert then depends on the whole prompt.
* Decoding (equation 3): a token goes to the expert of its largest score, which needs no other token.
* The consistency loss (equations 4-5), a cross-entropy between scores and choice, makes the second agree with the first.

Two executions: *masked* without a cache (averages in full-size tensors, differentiable), *packed* with one: a PackedCache per expert with
as many heads as it keeps, attention over all of them merged by log-sum-exp. An expert's cache may hold value groups, too.

Open in the paper, our reading: the choice passes the language-model loss to the scores straight through (`lm_to_experts`), the router's
input is detached, and the cross-entropy is taken over the scores' logits, which have the same argmax and do not saturate. Averaging keys
before or after RoPE is the same, since all heads of a token turn alike. Experts of share 0 are never chosen.

    python train.py --stage=continue --kv=mixsga --expert_ratios=3:1:6 --init_from=out/RUN/pretrain
    python eval.py --tasks=mixsga
"""
from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import KVConfig, MixConfig, ModelConfig, check
from kernels import Tail, merged, packed_attention
from kv_router import group_energy, spread
from layout import at_least_float32, top_k_mask
from model import DenseCache, attend, attention_mask
from packed_cache import PackedCache

PADDING = 255  # in an index of experts


# ----------------------------------------------------------------------------- who takes a token

def expert_choice(scores: Tensor, ratios: tuple[Fraction, ...], valid: Tensor) -> Tensor:
    """Expert of every token by equation 2: scores (B, T, E), valid (B, T) bool (False: padding) -> (B, T) int64, any number at padding.

    Of n valid tokens expert e takes the ceil(ratios[e] n) best of what the experts before it left (fewer where fewer are left), the
    last takes the rest. Ties go to the earlier token."""
    index, rest, n = torch.full(valid.shape, len(ratios) - 1, device=scores.device), valid, valid.sum(-1, keepdim=True)
    for e, r in enumerate(ratios[:-1]):
        order = scores[..., e].masked_fill(~rest, -math.inf).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter(-1, order, torch.arange(valid.size(1), device=order.device).expand_as(order))
        taken = rest & (rank < -(-n * r.numerator).div(r.denominator, rounding_mode="floor"))  # minus a floor is a ceiling
        index, rest = index.masked_fill(taken, e), rest & ~taken
    return index


def averaged(t: Tensor, size: int) -> Tensor:
    """Means of every `size` neighbouring heads: (B, h, T, D) -> (B, h / size, T, D)."""
    return t if size == 1 else t.unflatten(1, (-1, size)).mean(2)


# ----------------------------------------------------------------------------- reading under eviction

def h2o_attention(q: Tensor, k: Tensor, v: Tensor, keep: float, pad: Tensor | None = None) -> Tensor:
    """Causal attention while a heavy-hitter cache of n = ceil(keep T) tokens evicts as it decodes (arXiv 2306.14048).

    q (B, H, T, D), k, v (B, Hkv, T, D). Token by token: the new one reads what is held and itself; each held token's weights are added
    up; when more than n are held the one with the least weight so far goes, the newest n // 2 excepted. One choice for all heads of a layer."""
    B, H, T, D = q.shape
    n = math.ceil(keep * T)
    logits = at_least_float32((q * D ** -0.5).view(B, k.size(1), -1, T, D) @ k.unsqueeze(2).mT).view(B, H, T, T)
    visible = attention_mask(T, T, pad, q.device).expand(B, 1, T, T)
    held, total = torch.ones(B, T, dtype=torch.bool, device=q.device), logits.new_zeros(B, T)
    p, at = torch.zeros_like(logits), torch.arange(T, device=q.device)
    for t in range(T):
        p[:, :, t] = logits[:, :, t].masked_fill(~(visible[:, :, t] & held[:, None]), -math.inf).softmax(-1)
        total += p[:, :, t].sum(1)
        here = held & visible[:, 0, t]
        old = here & (at <= t - n // 2)
        worst = total.masked_fill(~old, math.inf).argmin(-1, keepdim=True)
        full = (here.sum(-1, keepdim=True) > n) & old.any(-1, keepdim=True)
        held = held.scatter(-1, worst, ~full & held.gather(-1, worst))
    return (p.view(B, k.size(1), -1, T, T) @ at_least_float32(v).unsqueeze(2)).view(B, H, T, D).to(q.dtype)


class SharingPath(nn.Module):
    """What GroupedHeads and CrossLayer have in common: reading, whole or under eviction (`h2o`: share of the tokens held; 1: all)."""

    reads_chunks = False
    h2o = 1.0

    def read(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
        return attend(q, k, v, pad) if self.h2o == 1 else h2o_attention(q, k, v, self.h2o, pad)


# ----------------------------------------------------------------------------- experts of grouped heads

class ExpertCache:
    """One layer's cache: a PackedCache per expert, with as many heads as it keeps, and every token's expert.

    index (B, L, 1) uint8: expert of each column, PADDING for padding. What each expert holds is in the order of the columns."""

    def __init__(self, parts: list[PackedCache], batch: int, like: Tensor):
        self.parts = parts
        self.index = torch.empty(batch, 0, 1, dtype=torch.uint8, device=like.device)

    @property
    def columns(self) -> int:
        """Columns seen, padding included."""
        return self.index.size(1)

    def append(self, stored: list[tuple[Tensor, Tensor, Tensor]], index: Tensor, valid: Tensor) -> None:
        """Take T tokens: per expert k, v (B, heads, T, D) and mask (B, heads, T, S) bool of all of them, of which it stores those with its
        number in index (B, T), where valid (B, T) bool."""
        for e, (part, (k, v, mask)) in enumerate(zip(self.parts, stored, strict=True)):
            mine = valid & (index == e)
            count = mine.sum(-1)
            width = int(count.max()) if count.numel() else 0
            if width:
                order = mine.byte().argsort(dim=-1, stable=True)[:, -width:][:, None, :, None]  # its own tokens last, in order
                k, v, mask = (t.gather(2, order.expand(-1, t.size(1), -1, t.size(3))) for t in (k, v, mask))
                part.append(k, v, mask, width - count)
                part.columns += width
        self.index = torch.cat((self.index, index.masked_fill(~valid, PADDING).byte().unsqueeze(-1)), 1)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, those of the parts by number and name."""
        return {"index": self.index, **{f"{e}.{n}": t for e, part in enumerate(self.parts) for n, t in part.tensors().items()}}

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {f"{e}.{n}": x for e, part in enumerate(self.parts) for n, x in part.extra().items()}

    def nbytes(self) -> int:
        """Bytes of all tensors held, index and unused capacity included."""
        return self.index.nbytes + sum(part.nbytes() for part in self.parts)

    def slice(self, rows: list[int]) -> ExpertCache:
        """A copy that holds the sequences `rows` only, in that order."""
        out = copy.copy(self)
        out.parts, out.index = [part.slice(rows) for part in self.parts], self.index[torch.tensor(rows, dtype=torch.int64, device=self.index.device)]
        return out

    @staticmethod
    def join(caches: list[ExpertCache]) -> ExpertCache:
        """One cache of the sequences of all, in order; each must have the same columns. Their parts grow to one capacity."""
        out = copy.copy(caches[0])
        out.index, out.parts = torch.cat([c.index for c in caches]), []
        for parts in zip(*(c.parts for c in caches), strict=True):
            cap = max(p.cap for p in parts)
            cap = max([cap, *(p.cap + p.cap // 4 for p in parts if p.cap < cap)])
            for p in parts:
                p._grow(cap)
            out.parts.append(PackedCache.join(parts))
            out.parts[-1].columns = max(p.columns for p in parts)
        return out

    def truncate(self, n_columns: int) -> None:
        """Forget the columns from n_columns on (padding counted)."""
        check(n_columns >= 0, f"truncating to {n_columns} columns", "0 or more", "give the number of columns to keep")
        self.index = self.index[:, :n_columns]
        for e, part in enumerate(self.parts):
            part.n_packed = (self.index[..., 0] == e).sum(-1)


class GroupedHeads(SharingPath):
    """Experts of grouped KV heads on one layer (equations 1-5). With one expert it is GQA made by averaging, and has no router.

    by: None (training and prompts: expert choice; else, evaluation without a cache included: the largest score), or "choice" or "score"
    for all. Without a cache evaluation is decode mode: what decoding token by token from the first one gives."""

    by: str | None = None

    def __init__(self, m: ModelConfig, kv: KVConfig, mix: MixConfig, layer: int = 0):
        super().__init__()
        mix.check_model(m)
        groups, S = mix.expert_groups, kv.n_groups
        check(not groups or (groups <= S and m.head_dim % S == 0), f"expert_groups={groups} with n_groups={S}, head_dim={m.head_dim}",
              "needs at most S groups, and S must divide D", "give smaller ones")
        self.Hkv, self.D, self.sizes, self.ratios, self.mix = m.n_kv_head, m.head_dim, mix.sizes, mix.ratios, mix
        self.k = groups or S  # value groups kept
        self.stored_as = replace(kv, kv="value_groups", topk_groups=self.k, kv_tail=0, kv_tail_block=1, reconstructor="zero", value_router="norm",
                                 mask_scope="head" if self.k < S else "layer")
        E = len(self.sizes)
        self.router = nn.Linear(m.n_embd, E) if E > 1 and mix.expert_router == "learned" else None
        if self.router is not None:  # He initialisation, zero bias
            nn.init.kaiming_normal_(self.router.weight)
            nn.init.zeros_(self.router.bias)
        elif E > 1:  # Gumbel noise on the logarithms of the shares: the largest falls on expert e with probability ratios[e]
            uniform = torch.rand(m.block_size, E, generator=torch.Generator().manual_seed(layer), device="cpu").clamp_min(1e-20)
            self.register_buffer("noise", torch.tensor([max(float(r), 1e-20) for r in self.ratios]).log() - (-uniform.log()).log(), persistent=False)
        self.consistency: Tensor | None = None  # of the last training forward
        self.agreement: Tensor | None = None  # share of tokens whose choice is their largest score, of the last forward that chose

    def logits(self, x: Tensor, start: int, pad: Tensor | None) -> Tensor:
        """What scores are the sigmoid of, (B, T, E) for x (B, T, n_embd), -inf for experts of share 0. start: columns before x."""
        (B, T, _), E = x.shape, len(self.sizes)
        if self.router is not None:
            out = at_least_float32(self.router(x.detach()))
        elif E > 1:
            at = torch.arange(start, start + T, device=x.device) - (0 if pad is None else pad[:, None])
            out = self.noise[at.clamp_min(0)].expand(B, T, E)
        else:
            out = x.new_zeros(B, T, 1)
        none = torch.tensor([not r for r in self.ratios], device=x.device)
        return out.masked_fill(none, -math.inf)

    def stored(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What each expert would store of tokens k, v (B, Hkv, T, D): k, v (B, Hkv / size, T, D), v with zeros where dropped, and the mask of
        its groups (B, Hkv / size or 1, T, S) bool."""
        out, S = [], self.stored_as.n_groups
        for size in self.sizes:
            ke, ve = averaged(k, size), averaged(v, size)
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
        """Every token as its expert stores it, back on all heads: of (B, Hkv / size, T, D) per expert, (B, Hkv, T, D)."""
        each = [t.repeat_interleave(size, 1) for t, size in zip(each, self.sizes, strict=True)]
        out = each[0]
        for e, t in enumerate(each[1:], 1):
            out = torch.where((index == e)[:, None, :, None], t, out)
        if self.training and torch.is_grad_enabled() and self.router is not None and self.mix.lm_to_experts:
            score = logits.sigmoid()
            through = (score - score.detach()).to(out.dtype)  # zero; its gradient is that of each expert's weight
            out = out + sum(through[:, None, :, e, None] * t.detach() for e, t in enumerate(each))
        return out

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: ExpertCache | None = None, pad: Tensor | None = None) -> Tensor:
        T, start = q.size(2), cache.columns if cache is not None else 0
        at = torch.arange(start, start + T, device=q.device)
        valid = (at >= (0 if pad is None else pad[:, None])).expand(q.size(0), T)
        logits, prompt = self.logits(x, start, pad), cache is not None and start == 0 and T > 1
        index = self.chosen(logits, self.by or ("choice" if self.training or prompt else "score"), valid)
        if self.training and torch.is_grad_enabled() and self.router is not None:
            self.consistency = F.cross_entropy(logits[valid], index[valid])
        stored = self.stored(k, v)
        k, v = (self.mixed([s[i] for s in stored], index, logits) for i in (0, 1))
        if cache is None or start == 0:
            y = self.read(q, k, v, pad)
        else:
            n_pad = (~valid).sum(-1)
            old = [packed_attention(q, part.packed(), None) for part in cache.parts if part.cap]
            y = merged(*old, packed_attention(q, None, Tail(k.contiguous(), v.contiguous(), n_pad, T - n_pad)))
        if cache is not None:
            cache.append(stored, index, valid)
        return y

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> ExpertCache:
        return ExpertCache([PackedCache(batch, 0, self.Hkv // size, self.D, self.stored_as, self.k, like) for size in self.sizes], batch, like)


# ----------------------------------------------------------------------------- layers that share

class NoCache:
    """What a layer holds that reads another layer's cache: nothing."""

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def extra(self) -> dict[str, int]:
        return {}

    @staticmethod
    def join(caches: list[NoCache]) -> NoCache:
        return caches[0]


class CrossLayer(SharingPath):
    """Cross-layer attention: a layer that stores keys and values whole, and those above it that read them with queries of their own."""

    def __init__(self, m: ModelConfig, source: CrossLayer | None):
        super().__init__()
        self.shape = (m.n_kv_head, m.head_dim)
        self.source = (source,) if source is not None else ()  # in a tuple: the module belongs to another layer
        self.seen: tuple[Tensor, Tensor] | None = None  # keys and values of the forward under way

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> DenseCache | NoCache:
        return NoCache() if self.source else DenseCache(batch, max_len, *self.shape, like)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: DenseCache | NoCache | None = None, pad: Tensor | None = None) -> Tensor:
        if self.source:
            k, v = self.source[0].seen
        else:
            if cache is not None:
                k, v = cache.append(k, v)
            self.seen = k, v
        return self.read(q, k, v, pad)


# ----------------------------------------------------------------------------- on a model

def gqa_sizes(share: Fraction, n_layer: int, n_kv_head: int) -> list[int]:
    """Group size of every layer for GQA at most `share` of the KV heads, as near as halvings allow: two neighbouring divisors of n_kv_head, the
    smaller groups in the first layers. Raises ValueError where one head a layer is more than that."""
    divisors = [g for g in range(1, n_kv_head + 1) if n_kv_head % g == 0]
    check(Fraction(1, n_kv_head) <= share, f"kv_share={float(share):g} with n_kv_head={n_kv_head}", "one head is kept at least",
          f"give {1 / n_kv_head:g} or more")
    wide = next(g for g in divisors if Fraction(1, g) <= share)
    fine = max([g for g in divisors if Fraction(1, g) > share], default=wide)
    if wide == fine:
        return [wide] * n_layer
    n_fine = int((share - Fraction(1, wide)) * n_layer / (Fraction(1, fine) - Fraction(1, wide)))
    return [fine] * n_fine + [wide] * (n_layer - n_fine)


def cla_sources(share: Fraction, n_layer: int) -> list[int]:
    """Layer whose keys and values every layer reads, ceil(share n_layer) of them their own: the shares of CLA are those of whole layers."""
    n = math.ceil(share * n_layer)
    return [-(-(i * n // n_layer) * n_layer // n) for i in range(n_layer)]


def attach(model: nn.Module, kv: KVConfig, mix: MixConfig) -> nn.Module:
    """Give a dense model the KV paths of kv.kv (mixsga, gqa or cla), in place; what is new is trainable. Returns the model."""
    m, share = model.cfg, Fraction(str(mix.kv_share))
    paths: list[nn.Module] = []
    if kv.kv == "mixsga":
        paths = [GroupedHeads(m, kv, mix, i) for i in range(m.n_layer)]
    elif kv.kv == "gqa":
        sizes = gqa_sizes(share, m.n_layer, m.n_kv_head)
        paths = [GroupedHeads(m, kv, replace(mix, group_sizes=str(g), expert_ratios="1"), i) for i, g in enumerate(sizes)]
    elif kv.kv == "cla":
        for i, source in enumerate(cla_sources(share, m.n_layer)):
            paths.append(CrossLayer(m, None if source == i else paths[source]))
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
    if not paths:
        return "layers share"
    p = paths[0]
    if len(p.sizes) == 1:
        return "heads by " + ",".join(str(q.sizes[0]) for q in paths)
    return f"{p.mix.expert_ratios} of {p.mix.group_sizes}" + f" {p.k} of {p.stored_as.n_groups} groups" * bool(p.mix.expert_groups)


def consistency_loss(model: nn.Module) -> Tensor | float:
    """Weighted mean of the consistency loss over the layers of the last training forward; 0.0 where there is none."""
    terms = [p.mix.consistency_weight * p.consistency for p in experts(model) if p.consistency is not None]
    return torch.stack(terms).mean() if terms else 0.0


def kept_shares(model: nn.Module, cache) -> float:
    """Share of the model's keys and values that a filled KVCache of it holds, by count: heads of tokens, value groups."""
    shares = []
    for block, layer in zip(model.layers, cache.layers, strict=True):
        path = block.self_attn.kv_path
        if isinstance(layer, ExpertCache):
            whole = int((layer.index != PADDING).sum()) * path.Hkv
            shares.append(sum(int(p.n_packed.sum()) * p.Hkv * (1 + p.k / p.S) / 2 for p in layer.parts) / max(whole, 1))
        else:
            shares.append(0.0 if isinstance(layer, NoCache) else 1.0)
    return sum(shares) / len(shares)


@contextmanager
def routing(model: nn.Module, by: str | None = None, h2o: float = 1.0):
    """Inside the `with` every path routes `by` ("choice", "score" or None) and reads under H2O's eviction at that share."""
    mine = [p for p in model.modules() if isinstance(p, SharingPath)]
    for p in mine:
        p.by, p.h2o = by, h2o
    try:
        yield
    finally:
        for p in mine:
            p.by, p.h2o = None, 1.0
