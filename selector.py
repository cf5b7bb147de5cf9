"""Query-aware selection (arXiv 2604.21335, 3.2): which tokens of a prompt, and which groups of
their values, are worth storing.

The problem: after a long prompt most of its cache is hardly read. The idea: a prompt is a *context*
and a *query region*, its last `kv_tail` tokens, which stay whole, as everything generated does.
From what that region (or the last `observers` tokens) and earlier queries look at one guesses how
much each context token will be read, its relevance alpha (selection/). A (token j, group g) pair
of the context then scores

    s_jg = alpha_j^hedge * || v_j^(g) ||          (12, 13; the paper has hedge = 1)

and the best pairs under a budget stay, exactly floor(share * how many there are), one at least. Of
equal scores the lower layer and head wins, then the earlier token, then the lower group.

    attach(model, KVConfig(kv="select"), SelectConfig(kv_keep=0.25), batches=[idx])
    kv_router.fold(model)
    cache = model.new_cache(batch=1, max_len=2048)
    model.prefill(prompt_ids, cache)              # chooses, and packs what it chose
    model.decode(next_ids, cache)                 # reads it

Ways to spend a budget: tokens first (--token_keep, by any token-level method), then groups of the
survivors (--value_keep); or both at once (--kv_keep), where a token pays for its key and for its
groups; or in bytes (--kv_bytes), where every group gets a number of bits, too. A budget belongs to
every head, to a layer, or to all layers and heads together (one threshold). Across layers scores
are multiplied by what a value writes to the residual stream (output_gain) and by how much the loss
feels it there (layer_sensitivity^hedge), both measured once on calibration text; a joint budget
takes their squares, for errors of many tokens add up so. A budget of bytes also multiplies by what
dropped tokens of a head were measured to cost there (drop_weight).

What is chosen may be refitted before it is packed (--refit, selection/refit.py).

What the layers saw of a prompt is a `Prompt` (selection/relevance.py): lists over layers of inputs
x, queries q, keys k and context values z, and what follows from them: which columns are no padding
(valid), the values' group norms, attention of any queries on the context. A signal such as `future`
in `PLAIN`, or a rival's in baselines/tokens.py, maps it to alpha (L, B, Hkv, C); predictors do so
with trained weights.

Open in the paper, our reading: the designated layer of a shared mask is the first compressed one in
a routed prefill, the mean over all compressed ones in an exact one; `observed` uses each layer's
own queries and keys, which exist before any routed value is read.

Letters: storage/layout.py; L compressed layers, C context columns, Lm mask layers (1 if shared,
else L).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

import kv_router
from baselines.tokens import AS_PUBLISHED, ONE_FOR_A_LAYER, TOKEN_LEVEL
from config import KVConfig, SelectConfig, check
from kernels import attend_view, can_append
from kv_router import ValueGroupPath
from model import Transformer, attend
from selection.budgets import Selection, planned, spend_bytes, spend_in_turn, spend_jointly
from selection.calibration import calibrate, look
from selection.masked import attend_to_kept
from selection.predictors import HiddenPredictor, QueryPredictor
from selection.refit import refitted
from selection.relevance import PLAIN, Prompt, SeenLayer, stacked
from selection.rules import check_together
from storage.cache import NewTokens, PromptState, valid_columns
from storage.from_keys import numbers
from storage.integers.codecs import codec_of
from storage.layout import expand_mask
from storage.ragged import EmptyCaches, RaggedCache, fill_windows, pack_layers
from storage.state import copy_tensors

WITHOUT_TRAINING = {**PLAIN, **TOKEN_LEVEL}
# names in files, which are users', and the names in the code
FILE_NAMES = {"gain": "output_gain", "feeling": "layer_sensitivity"}


class Selector(nn.Module):
    """What the paths of a model share: settings, predictors and the layers' weights. Nothing of a
    prompt is kept here: that lies in the cache which the prompt goes into (PromptState)."""

    def __init__(self, model: Transformer, kv: KVConfig, cfg: SelectConfig):
        super().__init__()
        m = model.cfg
        self.kv = replace(kv, topk_groups=kv.n_groups)
        self.L = len(kv.layers_of(m))
        self.Hm = m.n_kv_head if kv.mask_scope == "head" else 1
        self.S = kv.n_groups
        self.cap = m.attention_cap
        self.model_cfg = m
        self._model = (model,)  # in a tuple, so that it does not become a part of this module
        # how much a unit of z writes to the residual stream
        self.register_buffer("output_gain", torch.ones(self.L, m.n_kv_head))
        # how much the loss feels what a layer's attention writes there
        self.register_buffer("layer_sensitivity", torch.ones(self.L))
        # what dropped tokens of a head cost beside what their scores say
        self.register_buffer("drop_weight", torch.ones(self.L, m.n_kv_head))
        # root mean square of every coordinate of z, which levels are relative to
        self.register_buffer("rms", torch.ones(self.L, m.n_kv_head, m.head_dim))
        made = {name: self._predictor(name) for name in cfg.trained}
        self.predictors = nn.ModuleDict(made)
        self.empty = EmptyCaches()
        self.set(cfg)
        self.oracle: Tensor | None = None  # see with_oracle
        self.replayed: tuple[Selection, int] | None = None  # see masked_replay
        self.keeps_choice = False
        self.chosen: Selection | None = None  # the last prompt's, while keeps_choice

    def _predictor(self, name: str) -> nn.Module:
        m = self.model_cfg
        if name == "predictor_query":
            return QueryPredictor(self.L, m.n_embd, m.n_kv_head, m.head_dim)
        deciding = 1 if self.kv.mask_scope == "shared" else self.L
        n_out = self.Hm * (self.S if name == "predictor" else 1)
        return HiddenPredictor(deciding, m.n_embd, self.Hm, n_out)

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """The model's tables of positions."""
        return self._model[0].rope_cos, self._model[0].rope_sin

    @property
    def stored(self) -> KVConfig:
        """How a context is stored."""
        return planned(self.kv, self.cfg.kv_bytes)

    def set(self, cfg: SelectConfig) -> None:
        """Choose by these settings from now on; caches that exist stay as they are. Raises
        ValueError for a predictor it does not have, or what a routed prefill cannot do."""
        check_trained(cfg, self.predictors)
        check_together(self.kv, cfg)
        self.cfg = cfg
        self.stored.check_model(self.model_cfg)

    # -------------------- scores

    def per_mask(self, t: Tensor) -> Tensor:
        """Average (L, B, Hkv, ...) over the heads and layers that share a mask: (Lm, B, Hm,
        ...)."""
        if self.kv.mask_scope != "head":
            t = t.mean(2, keepdim=True)
        return t.mean(0, keepdim=True) if self.kv.mask_scope == "shared" else t

    def layer_weights(self, prompt: Prompt, hedge: float) -> Tensor:
        """Return layer_sensitivity^hedge * output_gain of a prompt's layers, under a budget of
        bytes times drop_weight: (L, 1, Hkv, 1, 1)."""
        at = prompt.layers
        weight = self.layer_sensitivity[at, None] ** hedge * self.output_gain[at]
        if self.cfg.kv_bytes:
            weight = weight * self.drop_weight[at]
        return weight[:, None, :, None, None]

    def norms(self, prompt: Prompt, hedge: float | None = None) -> Tensor:
        """Return norms of the context's value groups, with `hedge` times their layers' weights:
        (Lm, B, Hm, C, S)."""
        if hedge is None:
            norm = prompt.norms  # (L, B, Hkv, C, S)
        else:
            norm = self.layer_weights(prompt, hedge) * prompt.norms
        if self.kv.mask_scope == "head":
            return norm
        return self.per_mask(norm.square()).sqrt()

    def relevance(self, prompt: Prompt, name: str) -> Tensor:
        """Return a signal's alpha, (Lm or 1, B, Hm or 1, C); of `predictor` the weighed scores of
        pairs themselves, (Lm, B, Hm, C, S)."""
        if name in WITHOUT_TRAINING:
            return self.per_mask(WITHOUT_TRAINING[name](prompt, self.cfg))
        predictor = self.predictors[name]
        if name == "predictor_query":
            return self.per_mask(predictor(prompt, self.cfg))
        out = predictor(prompt, self.cfg.predictor_loss)
        if name == "predictor":
            return out * self.per_mask(self.layer_weights(prompt, 1.0))
        return out.squeeze(-1)

    def pair_scores(self, prompt: Prompt, alpha: Tensor) -> Tensor:
        """Score (token, group) pairs (13): (Lm, B, Hm, C, S)."""
        if alpha.ndim == 5:  # a predictor of pairs
            return alpha
        hedge = self.cfg.hedge
        if self.kv.mask_scope == "head":  # the weights of few first, then those of every group
            weight = alpha.unsqueeze(-1) ** hedge * self.layer_weights(prompt, hedge)
            return weight * prompt.norms
        return alpha.unsqueeze(-1) ** hedge * self.norms(prompt, hedge)

    def token_scores(self, prompt: Prompt, alpha: Tensor) -> Tensor:
        """Score tokens, by --token_relevance: (Lm, B, Hm, C)."""
        cfg = self.cfg
        if cfg.tokens_by != cfg.relevance and cfg.token_keep < 1:
            alpha = self.relevance(prompt, cfg.tokens_by)
        if alpha.ndim == 5:
            return alpha.square().sum(-1).sqrt()
        norm = self.norms(prompt, 1.0)
        if cfg.tokens_by in AS_PUBLISHED:
            return alpha.expand(norm.shape[:-1])
        return alpha * norm.square().sum(-1).sqrt()

    # -------------------- choosing

    @torch.no_grad()
    def choose(self, prompt: Prompt) -> Selection:
        """Choose what is kept of a prompt's context, by cfg."""
        with torch.autocast(prompt.k[0].device.type, enabled=False):
            selection = self._choose(prompt)
        if self.keeps_choice:  # a routed prefill chooses layer by layer
            before = self.chosen if prompt.first else None
            if before is None:
                self.chosen = selection
            else:
                both = zip(before, selection, strict=True)
                self.chosen = Selection(*(torch.cat(parts) for parts in both))
        return selection

    def _choose(self, prompt: Prompt) -> Selection:
        cfg = self.cfg
        if cfg.whole:
            return self._everything(prompt)
        alpha = self.relevance(prompt, cfg.relevance)
        if cfg.kv_bytes:
            pair = self.pair_scores(prompt.stored, alpha)
            key_worth = self._key_worth(prompt, alpha, pair)
            return spend_bytes(prompt, cfg, self.stored, pair, key_worth, self.keeps_choice)
        valid = prompt.valid[None, :, None]  # (1, B, 1, C)
        sink = valid & (valid.cumsum(-1) <= cfg.sinks)
        token = self.token_scores(prompt, alpha)
        token = token.masked_fill(sink, float("inf")).masked_fill(~valid, float("-inf"))
        pair = self.pair_scores(prompt.stored, alpha)
        if cfg.kv_keep:
            key_worth = self._key_worth(prompt, alpha, pair)
            pair = pair.square()  # errors of many tokens add up so
        pair = pair.masked_fill(sink.unsqueeze(-1), float("inf"))
        pair = pair.masked_fill(~valid.unsqueeze(-1), float("-inf"))
        if cfg.kv_keep:
            return spend_jointly(prompt, cfg, token, pair, key_worth)
        return spend_in_turn(prompt, cfg, token, pair, cfg.tokens_by in ONE_FOR_A_LAYER)

    def _everything(self, prompt: Prompt) -> Selection:
        layers = 1 if self.kv.mask_scope == "shared" else prompt.L
        keep = prompt.valid[None, :, None].expand(layers, -1, self.Hm, -1)
        return Selection(keep, keep.unsqueeze(-1).expand(*keep.shape, self.S), keep.float())

    def _key_worth(self, prompt: Prompt, alpha: Tensor, pair: Tensor) -> Tensor | None:
        """Return what each key is worth for what it tells of its value, (Lm, B, Hm, C, 1); None
        where keys are not asked. pair: scores of what is stored."""
        if prompt.untold is None:
            return None
        whole = self.pair_scores(prompt, alpha).square().sum(-1, keepdim=True)
        return whole - pair.square().sum(-1, keepdim=True)

    # -------------------- prompts

    def finish(self, state: PromptState, n_pad: Tensor | None) -> None:
        """Choose and pack, now that an exact prefill has passed all layers."""
        seen: list[SeenLayer] = state.seen
        state.seen = []
        rounded = self.stored.ints and self.cfg.key_rounding == "queries"
        C = seen[0].z.size(2)
        paths, x, q, k, v, z, caches = zip(*seen, strict=True)
        as_seen = all(cache.keep_all or cache.maps.enc is None for cache in caches)
        untold = None
        if paths[0].key_map is not None and not self.cfg.whole:
            parts = zip(paths, k, z, strict=True)
            untold = [path.untold(k, z, n_pad) for path, k, z in parts]
        about = (self.rope, self.oracle, 0, self.S, self.cfg.observers, self.cap, untold)
        prompt = Prompt(x, q, k, z, C, n_pad, *about, v=v if as_seen else None)
        selection = self.choose(prompt)
        values = prompt.values
        if self.cfg.refit and not self.cfg.whole:
            values = self.refit(prompt, selection, paths, v, caches[0].codec.n_sinks)
            seen = [layer._replace(z=own) for layer, own in zip(seen, values, strict=True)]
        moments = prompt.moments() if rounded else None
        if self.kv.mask_scope == "shared" or untold is not None:
            self._store_one_by_one(seen, selection, n_pad, moments)
            return
        keys = prompt.keys
        chosen = (selection.keep, selection.mask, prompt.valid)
        pack_layers(caches, keys[..., :C, :], values, *chosen, moments)
        whole = prompt.whole if as_seen else stacked(v)
        fill_windows(caches, keys, whole, C, n_pad)

    def _store_one_by_one(
        self,
        seen: list[SeenLayer],
        selection: Selection,
        n_pad: Tensor | None,
        moments: Tensor | None,
    ) -> None:
        """Pack layers that share their masks, or whose keys tell values."""
        first = None
        for i, layer in enumerate(seen):
            moment = None if moments is None else moments[i]
            layer.path.store(layer, selection, n_pad, first, moment)
            if self.kv.mask_scope == "shared":  # masks are those of the first layer
                first = first or layer.cache

    def refit(
        self, prompt: Prompt, selection: Selection, paths: Sequence[SelectPath], v, n_first: int
    ) -> Tensor:
        """Return the context's coordinates (L, B, Hkv, C, D) with those of kept tokens refitted. v:
        whole values (B, Hkv, T, D) of each layer; n_first: tokens that stay whole before them."""
        after = (t[:, :, prompt.n_context :] for t in v)
        tail = [path.own_maps().encode(t) for path, t in zip(paths, after, strict=True)]
        stored = expand_mask(selection.mask > 0, prompt.values.size(-1))
        with torch.autocast(prompt.k[0].device.type, enabled=False):
            args = (torch.stack(tail), selection.keep, stored, n_first, self.cfg.refit_ridge)
            return refitted(prompt, *args)


def check_trained(cfg: SelectConfig, has: Container[str]) -> None:
    """Raise ValueError where a setting names a predictor that is not among those it has."""
    for name in sorted({cfg.relevance, cfg.tokens_by}):
        check(
            name in WITHOUT_TRAINING or name in has,
            f"relevance={name}",
            "it has not been trained",
            f"train.py --stage=select --predictors={name}, and give that run",
        )


# -------------------- the KV path


class SelectPath(ValueGroupPath):
    """One layer that stores what the selector keeps of a prompt, and everything after it whole.

    The first prefill into a cache is the prompt. Without a cache values are whole, or as
    masked_replay prescribes."""

    reads_pieces = False  # a prompt is chosen from as a whole

    def __init__(self, model_cfg, selector: Selector, index: int):
        self._shared = (selector,)  # in a tuple: it is the model's module, not this one's
        self.index = index
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
    def keep_all(self) -> bool:
        return self.selector.cfg.whole

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> RaggedCache:
        s = self.selector
        codec = codec_of(s.stored, s.rms[self.index])
        shape = (batch, max_len, self.Hkv, self.D, self.S, self.mask_heads)
        maps = self.for_cache(self.own_maps())
        cache = s.empty.new(*shape, like=like, codec=codec, maps=maps)
        cache.keep_all = self.keep_all
        return cache

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Attend to whole k, v (B, Hkv, T, D), or to what a selection that is replayed leaves of
        them: (B, H, T, D) in q's dtype."""
        if self.selector.replayed is None:
            return attend(q, k, v, pad, self.cap)
        selection, C = self.selector.replayed
        maps = self.maps()
        keep, mask = selection.layer(self.index)
        z = maps.encode(v[:, :, :C])
        untold = z if maps.from_keys is None else self.untold(k, z, pad)
        routed = maps.decode(z - untold + untold * expand_mask(mask, self.D))
        # the first column that reads routed values
        first = min(C + self.cfg.kv_tail, q.size(2)) if self.cfg.prefill == "exact" else 0
        return attend_to_kept(q, k, v, routed, keep, first, pad, self.cap)

    def untold(self, k: Tensor, z: Tensor, pad: Tensor | None = None) -> Tensor:
        """Return what keys (B, Hkv, T, D) do not tell of the coordinates z (B, Hkv, C, D) of the
        first C tokens: z itself where they are not asked."""
        k = k[:, :, : z.size(2)]
        return self.own_maps().untold(k, z, numbers(k, pad))

    def prefill(self, x, q, k, v, cache: RaggedCache, n_pad: Tensor | None = None) -> Tensor:
        """Store a first prompt k, v (B, Hkv, T, D): its newest kv_tail tokens whole, of the rest
        what is chosen. Returns (B, H, T, D) in q's dtype."""
        C = q.size(2) - self.cfg.kv_tail
        if not cache.fresh:  # what follows a prompt stays whole, and reads the prompt as stored
            return self.decode(x, q, k, v, cache, n_pad)
        if C <= 0:  # there is no context
            cache.append(NewTokens(k, v, n_pad))
            return attend(q, k, v, n_pad, self.cap)
        z = v[:, :, :C]
        if not cache.keep_all:
            z = cache.maps.encode(z)
        seen = SeenLayer(self, x, q, k, v, z, cache)
        if self.cfg.prefill == "exact":
            state = cache.prompt
            if self.index == 0:
                state.seen = []
            state.seen.append(seen)
            if len(state.seen) == self.selector.L:
                self.selector.finish(state, n_pad)
            return attend(q, k, v, n_pad, self.cap)
        return self._prefill_routed(seen, n_pad)

    def _prefill_routed(self, seen: SeenLayer, n_pad: Tensor | None) -> Tensor:
        """Choose as soon as a layer (the first, where masks are shared) has seen the prompt, and
        read what was chosen."""
        s = self.selector
        state = seen.cache.prompt
        shared = self.cfg.mask_scope == "shared"
        C = seen.z.size(2)
        if self.index == 0:
            state.reset()
        if state.selection is None or not shared:
            alpha = None if s.oracle is None else s.oracle[self.index : self.index + 1]
            lists = ([seen.x], [seen.q], [seen.k], [seen.z])
            about = (s.rope, alpha, self.index, s.S, s.cfg.observers, s.cap)
            prompt = Prompt(*lists, C, n_pad, *about)
            state.selection = s.choose(prompt)
        self.store(seen, state.selection, n_pad, state.first if shared else None)
        state.first = state.first or seen.cache
        keep, mask = state.selection.layer(0)
        routed = seen.cache.basis.decode(seen.z * expand_mask(mask, self.D))
        y = attend_to_kept(seen.q, seen.k, seen.v, routed, keep, 0, n_pad, self.cap)
        if self.index == s.L - 1:
            state.reset()  # the prompt is done
        return y

    def store(
        self,
        seen: SeenLayer,
        selection: Selection,
        n_pad: Tensor | None,
        first: RaggedCache | None = None,
        query_moment: Tensor | None = None,
    ) -> None:
        """Pack the chosen part of the context, and hold first tokens and the query region whole.

        first: the cache whose masks this one shares; query_moment: see RaggedCache.pack."""
        cache = seen.cache
        C = seen.z.size(2)
        none = torch.zeros(len(seen.k), dtype=torch.int64, device=seen.k.device)
        valid = valid_columns(C, none if n_pad is None else n_pad)
        keep, mask = selection.layer(self.index)
        context = seen.k[:, :, :C]
        cache.pack(context, seen.z, keep, mask, valid, first, query_moment)
        fill_windows([cache], seen.k[None], seen.v[None], C, n_pad)
        if first is not None:
            cache.n_context = first.n_context  # an equal one, held once

    def decode(self, x, q, k, v, cache: RaggedCache, n_pad: Tensor | None = None) -> Tensor:
        """Store k, v (B, Hkv, T, D) whole, and read them, and the prompt as stored: (B, H, T, D) in
        q's dtype."""
        new = NewTokens(k, v, n_pad)
        view = cache.with_gradient(new) if k.requires_grad or v.requires_grad else None
        cache.append(new)
        view = view or cache.view()
        as_it_is = cache.basis.dec is None and cache.basis.from_keys is None
        if as_it_is or not len(cache.keys):  # rows are read as they are, or none
            return attend_view(q, view, self.cap)[0]
        if torch.is_grad_enabled() and self.cfg.learn_basis and not self.folded:
            cache = cache.read_through(self.dec)
        return self._read(q, view, cache)

    def graph_safe(self) -> bool:
        reads_rows = self.keep_all or (self.folded and self.key_map is None)
        return can_append(self.D) and reads_rows


# -------------------- attaching, looking, saving


def attach(
    model: Transformer,
    kv: KVConfig,
    cfg: SelectConfig,
    batches: list[Tensor] | None = None,
    seed: int = 0,
) -> Transformer:
    """Give the chosen layers selecting paths and the model its `selector`, in place. Returns the
    model.

    batches: token ids (B, T) that calibrate bases and weights; None leaves that to load_state."""
    kv.check_model(model.cfg)
    selector = Selector(model, kv, cfg)
    index = iter(range(selector.L))
    kv_router.attach(model, kv, batches, seed, lambda m, c: SelectPath(m, selector, next(index)))
    model.selector = selector.to(model.norm.weight.device)
    if batches is not None:
        calibrate(selector, model, batches)
    return model


def selector_of(model: Transformer) -> Selector | None:
    """Return the model's selector; None where nothing selects."""
    return getattr(model, "selector", None)


def detach(model: Transformer) -> Transformer:
    """Put dense paths back, in place, and forget the selector. Not for a folded model."""
    if selector_of(model) is not None:
        del model.selector
    return kv_router.detach(model)


def state(model: Transformer) -> dict[str, Tensor]:
    """Return the selector's tensors under their names in files; empty where there is none."""
    s = selector_of(model)
    if s is None:
        return {}
    in_file = {code: file for file, code in FILE_NAMES.items()}
    return {f"selector.{in_file.get(name, name)}": t for name, t in s.state_dict().items()}


def load_state(model: Transformer, saved: dict[str, Tensor]) -> None:
    """Put `saved` into a selector fresh from attach. ValueError lists what does not fit."""
    s = selector_of(model)
    if s is not None:
        s.rms = s.rms.clone()  # caches hold the one before
    own = state(model)
    # runs that were made before it was measured have no drop_weight
    ones = {name: torch.ones_like(t) for name, t in own.items() if name.endswith(".drop_weight")}
    copy_tensors(own, ones | saved, "selector state")


@contextmanager
def with_oracle(model: Transformer, idx: Tensor, n_prompt: int, pad: Tensor | None = None):
    """Let `oracle` relevance of the prompt idx[:, :n_prompt], inside the `with`, be the attention
    that the rest of idx (B, T) pays it, or its own query region where there is no rest (12).

    Nothing happens where no signal asks for it."""
    s = selector_of(getattr(model, "model", model))
    asked = s is not None and "oracle" in (s.cfg.relevance, s.cfg.tokens_by)
    n_context = n_prompt - s.kv.kv_tail if asked else 0
    if n_context <= 0:
        yield
        return
    s.oracle = look(s, model, idx, n_context, n_prompt, pad)[1]
    try:
        yield
    finally:
        s.oracle = None


@contextmanager
def masked_replay(model: Transformer, selection: Selection, n_context: int):
    """Let uncached forwards inside the `with` read the context's first n_context columns as
    `selection` keeps them: the masked execution."""
    s = selector_of(model)
    s.replayed = selection, n_context
    try:
        yield
    finally:
        s.replayed = None
