"""Value-group KV routing (arXiv 2604.21335, 3.1.2): of every token only K of the S groups of its
value are stored.

The problem: a cache holds a key and a value for every token, D numbers each and head. The idea: cut
a value into S groups of D/S neighbours, let a router pick the K that matter, store those, and read
zeros (or what a reconstructor makes of the kept ones) in place of the others. Keys stay whole. With
router logits a(x), equations 4 to 7 are

    m = top-K mask of a(x)                                       (4, 5)
    v_read = m * v + (1 - m) * R(m * v)                          (6, 7)
    L = L_LM + aux_weight * L_aux                                (14)
    L_aux = MSE(v_read, v)                                       (15)

Of keys and values it keeps (1 + K/S) / 2.

Which K groups lose least depends on the coordinates that are cut. Any invertible map of V folds
exactly into W_v, its bias and W_o (values carry no RoPE), so groups may be cut in a basis that
sorts energy: native | random | pca | output (pca of what W_o reads, weighted by how much it reads;
routing/bases.py).

    model = Transformer(ModelConfig())
    cfg = KVConfig(n_groups=4, topk_groups=2)
    attach(model, cfg, batches=[idx])                # calibrates basis and router
    fold(model)                                      # the basis goes into W_v and W_o
    cache = model.new_cache(batch=1, max_len=64)
    model.prefill(idx, cache)                        # stores K groups of every token

Two executions: *masked* (full-size tensors, differentiable; `forward`) and *packed* (only what is
kept exists; `prefill`, `decode`). Without a cache every earlier token is read as routed: decode
mode, what token-by-token decoding gives. With prefill="routed" both give the same logits; by
default (exact) a prompt reads itself whole and is packed after that.

Beyond the paper:
* router `norm`: keep the groups of largest norm, no parameters (`static`, the first K for every
  token, is the ablation); a mask per layer (the paper) or per KV head. The learned router starts
  from a ridge regression of group energies on the layer's input, not from noise.
* learn_basis: the maps into and out of the basis are trained, each for itself, so that what is read
  is the best linear guess of the value from the groups kept. They still fold.
* reconstructor `keys`: dropped groups are what a linear map of the token's keys says, groups hold
  what it leaves (storage/from_keys.py); kv_sinks first tokens stay whole.

Open in the paper, our reading: top-K is passed by a straight-through softmax; v is detached in
L_aux, and so is the router's input; the language-model loss sees router and reconstructor as
constants unless lm_to_router.

Letters: storage/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import KVConfig, ModelConfig, check
from kernels import attend_view, packed_attention
from model import DensePath, attend, rope_table
from reconstruct import MLPReconstructor, straight_through
from routing.as_decoded import attend_as_decoded
from routing.bases import fold_basis
from routing.calibration import calibrate
from routing.in_window import pieces_until_packed, plain_windowed_attention
from storage.banded import banded_attention, is_banded
from storage.cache import CacheView, NewTokens
from storage.coordinates import change_coordinates
from storage.from_keys import FromKeys, attend_predicted, numbers
from storage.integers.codecs import codec_of
from storage.integers.format import keys_as_read, values_as_read
from storage.layout import (
    PackedView,
    at_least_float32,
    expand_mask,
    group_energy,
    merge_softmax,
    top_k_mask,
)
from storage.packed import FloatCodec, PackedCache, ValueBasis
from storage.state import check_fit
from storage.windowed import Window, is_fused, windowed_attention

# -------------------- the KV path


class ValueGroupPath(nn.Module):
    """Fixed top-K value groups on one layer (equations 4-7).

    A routed value is decode(mask * encode(v)); a whole one is v itself, so keeping every group is
    dense, exactly. Before `fold` encode is v @ enc and decode is z @ dec. After it W_o holds dec
    and W_v its inverse, and encode is @ (dec enc): nothing at all while that is one."""

    reads_pieces = True  # a prompt may come in pieces

    def __init__(self, model_cfg: ModelConfig, cfg: KVConfig):
        super().__init__()
        cfg.check_model(model_cfg)
        self.cfg = cfg
        self.Hkv = model_cfg.n_kv_head
        self.D = model_cfg.head_dim
        self.cap = model_cfg.attention_cap
        self.S = cfg.n_groups
        self.k = cfg.topk_groups
        self.mask_heads = self.Hkv if cfg.mask_scope == "head" else 1
        self.folded = False
        if cfg.learn_basis:
            self.enc = nn.Parameter(torch.empty(self.Hkv, self.D, self.D))
            self.dec = nn.Parameter(torch.empty(self.Hkv, self.D, self.D))
        # on the CPU also where parameters are counted on meta tensors
        eye = torch.eye(self.D, dtype=torch.float64, device="cpu").repeat(self.Hkv, 1, 1)
        self.set_basis(eye, eye)
        self.router = None
        if cfg.value_router == "linear":
            self.router = nn.Linear(model_cfg.n_embd, self.mask_heads * self.S)
        self.reconstructor = None  # zeros stand for a dropped group
        if cfg.reconstructor == "mlp":
            sizes = (self.Hkv, self.D, self.S, self.mask_heads)
            self.reconstructor = MLPReconstructor(*sizes, cfg.recon_hidden)
        self.key_map = None  # keys before RoPE to value coordinates: FromKeys.weight
        if cfg.told_by_keys:
            width = self.Hkv * self.D
            shape = (width, width)
            # under a selection heads keep different tokens: each is told by its own keys
            if cfg.kv == "select" or cfg.reconstructor == "own_keys":
                shape = (self.Hkv, self.D, self.D)
            self.key_map = nn.Parameter(torch.zeros(shape))
            self.share_rope(*rope_table(model_cfg))
        self.frozen = ValueBasis()  # what its newest cache reads: see storage/copies.py
        self.losses: dict[str, Tensor] = {}
        self.whole = False  # see set_kept
        self.keeps_mask = False
        self.last_mask: Tensor | None = None  # of the last uncached forward while keeps_mask

    def share_rope(self, cos: Tensor, sin: Tensor) -> None:
        """Take the tables (positions, D/2) by which keys are turned back."""
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    # ---- the value basis

    def set_basis(self, enc: Tensor, dec: Tensor) -> None:
        """Take the maps z = v @ enc and v = z @ dec, (Hkv, D, D), inverse of each other unless
        learn_basis has trained them. Caches that exist keep the maps they were packed with."""
        if self.cfg.learn_basis:
            with torch.no_grad():
                self.enc.copy_(enc)
                self.dec.copy_(dec)
            return
        # float64, beside the copies in the path's own dtype that training applies
        self._exact = (enc.double(), dec.double())
        like = self.enc if hasattr(self, "enc") else torch.empty(0)
        self.register_buffer("enc", enc.to(like).contiguous(), persistent=False)
        self.register_buffer("dec", dec.to(like).contiguous(), persistent=False)

    def basis(self) -> tuple[Tensor, Tensor]:
        """Return the maps (Hkv, D, D) float64 into and out of the value basis. ValueError where
        trained maps are folded: the projections hold them then."""
        if self.cfg.learn_basis:
            check(
                not self.folded,
                "the basis of a folded path",
                "trained maps lie in the projections then",
                "ask before fold, or load the base anew",
            )
            return self.enc.detach().double(), self.dec.detach().double()
        return self._exact

    def fold(self, attn: nn.Module) -> None:
        """Put the basis into the projections of `attn` around this path, in place."""
        enc, dec = (t.to(attn.o_proj.weight.device) for t in self.basis())
        fold_basis(attn, torch.linalg.inv(dec) if self.cfg.learn_basis else enc, dec)
        self.folded = True
        change_coordinates(self, "fold")
        if self.cfg.learn_basis:
            del self.enc, self.dec
            rest = (dec @ enc).to(attn.o_proj.weight.dtype)
            self.register_buffer("enc", rest, persistent=False)

    @property
    def keep_all(self) -> bool:
        """Whether every group is kept."""
        return self.k == self.S

    @property
    def n_sinks(self) -> int:
        """First tokens that stay whole: keys tell their values least, and attention rests on
        them."""
        predicts = self.key_map is not None and not self.keep_all
        return self.cfg.first_whole if self.cfg.ints or predicts else 0

    @property
    def window(self) -> Window:
        """Which tokens are read whole in decode mode."""
        return Window(self.cfg.kv_tail, self.cfg.tail_leaves, self.n_sinks)

    def maps(self) -> ValueBasis:
        """Return the maps that this path applies itself; none where every group is kept."""
        return ValueBasis() if self.keep_all else self.own_maps()

    def own_maps(self) -> ValueBasis:
        """Return the maps that are not folded into the projections."""
        from_keys = None
        if self.key_map is not None:
            from_keys = FromKeys(self.key_map, self.cos, self.sin)
        if not self.folded:
            return ValueBasis(self.enc, self.dec, from_keys)
        return ValueBasis(self.enc if self.cfg.learn_basis else None, None, from_keys)

    # ---- the router

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        """Return router logits (B, Hm, T, S) of inputs x (B, T, n_embd) and coordinates z
        (B, Hkv, T, D): linear on x, the groups' energies, or the same for all tokens."""
        if self.cfg.value_router == "static":
            order = -torch.arange(self.S, device=z.device, dtype=z.dtype)
            return order.expand(z.size(0), self.mask_heads, z.size(2), -1)
        if self.router is None:
            return group_energy(z.detach(), self.S, self.mask_heads)
        logits = self.router(x.detach()).unflatten(-1, (self.mask_heads, self.S))
        return logits.transpose(1, 2)

    # ---- without a cache: masked execution

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None
    ) -> Tensor:
        """Read values (B, Hkv, T, D) as decoding would: (B, H, T, D) in q's dtype."""
        self.losses = {}
        if self.cfg.ints and not (self.training or self.keeps_mask or self.whole):
            return self._through_cache(x, q, k, v, pad)
        whole = self.whole or (self.keep_all and not self.cfg.ints)
        if whole and not self.keeps_mask:
            return attend(q, k, v, pad, self.cap)
        coords = self.maps().encode(v)
        told = self._told(k, pad)
        z = coords if told is None else coords - told  # what is routed is the residual
        logits = self.scores(x, z)
        mask = top_k_mask(logits.detach(), self.k)
        if self.keeps_mask:
            self.last_mask = mask
        if self._learns:
            self.losses["aux"] = self._aux_loss(logits, mask, coords, k, pad)
        if whole:
            return attend(q, k, v, pad, self.cap)
        kept = self._routed(logits, mask, z)
        if self.cfg.ints:
            return self._read_rounded(q, k, v, kept, mask, pad)
        routed = self.maps().decode(kept if told is None else kept + told)
        if self.n_sinks:
            routed = torch.where(numbers(k, pad)[:, None, :, None] < self.n_sinks, v, routed)
        return self._read_behind_window(q, k, v, routed, pad)

    @property
    def _learns(self) -> bool:
        """Whether L_aux trains something of this path now."""
        parts = (self.router, self.reconstructor, self.key_map)
        return parts != (None, None, None) and self.training and torch.is_grad_enabled()

    def _read_behind_window(
        self, q: Tensor, k: Tensor, v: Tensor, routed: Tensor, pad: Tensor | None
    ) -> Tensor:
        """Read routed values, but v of what is in the window, by the fastest form there is."""
        window = self.window
        if window.reach == 0:  # a query reads its own token as routed, too
            return attend(q, k, routed, pad, self.cap)
        # padding and caps take the plain form, as integers do: their keys differ in the window
        if pad is None and not self.cap:
            if is_banded(q):
                return banded_attention(q, k, v, routed, window)
            if is_fused(q):
                return windowed_attention(q, k, v, routed, window)
        return plain_windowed_attention(q, k, v, k, routed, window, pad, self.cap)

    def _read_rounded(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, mask: Tensor, pad: Tensor | None
    ) -> Tensor:
        """Read integers, but k and v of what is in the window."""
        check(
            pad is None,
            "training over integers with padding",
            "keys are rounded by blocks that begin with a sequence",
            "give rows of one length",
        )
        read = self._rounded(k, v, kept, mask)
        return plain_windowed_attention(q, k, v, *read, self.window, pad, self.cap)

    def _rounded(self, k: Tensor, v: Tensor, kept: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are read once they have left the window: integers, but of
        the first tokens what came."""
        cfg = self.cfg
        first = slice(0, cfg.first_whole)
        rest = slice(cfg.first_whole, None)
        keys = keys_as_read(k[:, :, rest], cfg.key_bits, cfg.block)
        mask = mask.expand(-1, self.Hkv, -1, -1)
        values = values_as_read(kept[:, :, rest], mask[:, :, rest], cfg.value_bits)
        values = self.maps().decode(values)
        return torch.cat((k[:, :, first], keys), 2), torch.cat((v[:, :, first], values), 2)

    def _routed(self, logits: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """Return z as it is read: dropped groups rebuilt. Router and reconstructor are constants to
        the loss unless lm_to_router."""
        kept = expand_mask(mask, self.D)
        if self.cfg.lm_to_router and self.router is not None and self.training:
            m = expand_mask(straight_through(logits, mask), self.D)
            return m * z + (1 - m) * self._rebuild(z * kept, mask)
        if self.reconstructor is None:
            return z * kept.to(z.dtype)  # a CPU multiplies numbers by numbers faster
        if self.cfg.lm_to_router:
            return torch.where(kept, z, self._rebuild(z * kept, mask))
        return torch.where(kept, z, self.reconstructor(z * kept, mask, constant=True))

    def _told(self, k: Tensor, pad: Tensor | None, constant: bool | None = None) -> Tensor | None:
        """Return the coordinates (B, Hkv, T, D) that keys tell; None where they are not asked.

        constant: whether the map gets no gradient; None: unless L_LM trains it"""
        from_keys = self.maps().from_keys
        if from_keys is None:
            return None
        if constant is None:
            constant = not (self.cfg.lm_to_router or self.cfg.learn_basis)
        if constant:
            from_keys = from_keys._replace(weight=from_keys.weight.detach())
        return from_keys.predict(k, numbers(k, pad))

    def _rebuild(self, kept: Tensor, mask: Tensor) -> Tensor:
        """Return what stands for dropped groups."""
        if self.reconstructor is None:
            return torch.zeros_like(kept)
        return self.reconstructor(kept, mask)

    def _aux_loss(
        self, logits: Tensor, mask: Tensor, coords: Tensor, k: Tensor, pad: Tensor | None
    ) -> Tensor:
        """Return L_aux (15), from which v and k get no gradient: it reaches the router straight
        through top-K, and the reconstructor or the map from keys."""
        z = coords.detach()
        told = self._told(k.detach(), pad, constant=False)
        if told is not None:
            z = z - told
        rebuilt = self._rebuild(z * expand_mask(mask, self.D), mask)
        m = mask.to(z.dtype) if self.router is None else straight_through(logits, mask)
        m = expand_mask(m, self.D)
        return F.mse_loss(m * z + (1 - m) * rebuilt, z)

    def _through_cache(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None
    ) -> Tensor:
        """Read integers in decode mode: a cache is filled token by token, or as many as go by until
        a block leaves the window. Rows with padding one by one."""
        if pad is not None:
            out = torch.zeros_like(q)
            for b, n_pad in enumerate(pad.tolist()):
                row = slice(b, b + 1)
                heads = (t[row, :, n_pad:] for t in (q, k, v))
                out[row, :, n_pad:] = self._through_cache(x[row, n_pad:], *heads, None)
            return out
        T = q.size(2)
        cache = self.new_cache(len(q), T, k)
        out = []
        for some in pieces_until_packed(T, self.window):
            new = NewTokens(k[:, :, some], v[:, :, some], None)
            cache.append(new._replace(route=self._route(x[:, some], new.v, cache)))
            if some.start:
                y = self._read(q[:, :, some], cache.view(), cache)
            else:  # until the first block leaves everything is whole
                y = attend(q[:, :, some], new.k, new.v, cap=self.cap)
            out.append(y)
        return torch.cat(out, 2)

    # ---- with a cache: packed execution

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> PackedCache:
        codec = codec_of(self.cfg) if self.cfg.ints else FloatCodec(self.n_sinks)
        shape = (batch, max_len, self.Hkv, self.D)
        return PackedCache(*shape, self.cfg, self.k, like, self.for_cache(self.maps()), codec)

    def for_cache(self, maps: ValueBasis) -> ValueBasis:
        """Return maps of this path as a cache reads them: of what training writes into a copy."""
        trained = self.cfg.learn_basis or self.key_map is not None
        return maps.copied() if trained else maps

    def _route(self, x: Tensor, v: Tensor, cache: PackedCache) -> Tensor | None:
        """Return the mask (B, Hm, T, S) with which the cache will pack new tokens; None where those
        are the groups of largest norm, which it finds by itself."""
        if self.cfg.value_router == "norm":
            return None
        return top_k_mask(self.scores(x, v), cache.k)  # of v these scores take the shape alone

    def prefill(self, x, q, k, v, cache: PackedCache, n_pad: Tensor | None = None) -> Tensor:
        """Store T tokens, K groups of every value, and read them: (B, H, T, D) in q's dtype."""
        new = NewTokens(k, v, n_pad, self._route(x, v, cache))
        if self.cfg.prefill == "routed":
            y = attend_as_decoded(q, new, cache, self._rebuild, self.cap)
        elif cache.fresh:
            y = attend(q, k, v, n_pad, self.cap)
        else:
            y = self._read_piece(q, new, cache)
        cache.append(new)
        return y

    def decode(self, x, q, k, v, cache: PackedCache, n_pad: Tensor | None = None) -> Tensor:
        """Store and read one token of each sequence: (B, H, 1, D) in q's dtype."""
        cache.append(NewTokens(k, v, n_pad, self._route(x, v, cache)))
        basis = cache.basis
        view = cache.view()
        if basis.dec is None and basis.from_keys is None and self.reconstructor is None:
            return attend_view(q, view, self.cap)[0]  # rows are read as they are
        if basis.from_keys is not None:  # such a step is not captured: see graph_safe
            view = view._replace(packed=(view.packed[0].at_most(cache.longest),))
        return self._read(q, view, cache)

    def graph_safe(self) -> bool:
        by_kernel = codec_of(self.cfg).one_by_one(self.D, self.cfg.kv_tail)
        maps_fold = self.keep_all or self.folded
        rows_only = self.reconstructor is None and self.maps().from_keys is None
        return by_kernel and maps_fold and rows_only

    def _read(self, q: Tensor, view: CacheView, cache: PackedCache) -> Tensor:
        """Attend to what a cache shows: packed values as they are read, whole ones as they are."""
        packed = view.packed[0]
        if self.reconstructor is not None and cache.k < cache.S:  # rebuilt at every read
            k, z, mask, _ = packed.unpack()
            z = torch.where(expand_mask(mask, self.D), z, self.reconstructor(z, mask))
            packed = PackedView.of_whole(k, cache.basis.decode(z), packed.n)
            return attend_view(q, view._replace(packed=(packed,)), self.cap)[0]
        from_keys = cache.basis.from_keys
        if cache.basis.dec is None and from_keys is None:
            return attend_view(q, view, self.cap)[0]
        if from_keys is None:
            y, lse = packed_attention(q, packed, None, cap=self.cap)
        else:
            # one kernel reads both where whole values have the coordinates of packed ones
            window = view.window if cache.basis.dec is None and view.window.k.size(2) else None
            position = cache.packed_positions()
            y, lse = attend_predicted(q, packed, from_keys, position, self.cap, window=window)
            if window is not None:
                view = view._replace(window=None)
        y = cache.basis.decode(y.reshape(len(q), self.Hkv, -1, self.D)).view(q.shape)
        no_window = view.window is None or view.window.k.size(2) == 0
        if no_window and view.sinks is None:
            return y
        whole = attend_view(q, view._replace(packed=()), self.cap)
        return merge_softmax((y, lse), whole)

    def _read_piece(self, q: Tensor, new: NewTokens, cache: PackedCache) -> Tensor:
        """Let a piece of a prompt read itself whole, and what came before as it is stored."""
        view = cache.view()
        # fewer pieces than for all slots: each holds a part of the result
        packed = view.packed[0].at_most(int(cache.n_packed.max()))
        window = cache.beside(new.k, new.v, new.n_pad)
        return self._read(q, CacheView((packed,), window, view.sinks), cache)


# -------------------- attaching, saving, loading


@torch.no_grad()
def attach(
    model: nn.Module,
    cfg: KVConfig,
    batches: list[Tensor] | None = None,
    seed: int = 0,
    make: Callable | None = None,
) -> nn.Module:
    """Give the chosen layers value-group paths, in place. Returns the model.

    batches: token ids (B, T) on the model's device that calibrate bases and routers; None leaves
        the native basis and untrained parts, for load_state to overwrite
    make: make(model_cfg, cfg) returns another kind of path

    Until `fold` the paths apply their basis themselves, so that adapters on v and o learn in the
    native one (in the new one they learn worse: docs/log.md). Raises ValueError when S does not
    divide D."""
    if cfg.kv == "dense":
        return model
    cfg.check_model(model.cfg)
    chosen = [model.layers[i].self_attn for i in cfg.layers_of(model.cfg)]
    # what is trained is never narrower than float32
    dtype = at_least_float32(model.norm.weight).dtype
    device = model.norm.weight.device
    paths = [(make or ValueGroupPath)(model.cfg, cfg).to(device, dtype) for _ in chosen]
    for path in paths:
        if path.key_map is not None:
            path.share_rope(model.rope_cos, model.rope_sin)  # one table for all layers
    if batches is not None:
        calibrate(model, chosen, paths, batches, cfg.value_basis, seed)
    for attn, path in zip(chosen, paths, strict=True):
        change_coordinates(attn.kv_path, "attach")
        attn.kv_path = path.train(model.training)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Put dense paths back into a model whose bases are not folded, in place. Returns the model."""
    for name, path in paths(model).items():
        check(not path.folded, name, "its basis is folded into the weights", "load the base anew")
        attn = model.get_submodule(name.removesuffix(".kv_path"))
        change_coordinates(path, "detach")
        attn.kv_path = DensePath(path.Hkv, path.D, path.cap)
    return model


@contextmanager
def storing(model: nn.Module, **changes):
    """Let every value-group path store by a KVConfig changed so inside the `with`. Caches that
    exist keep what they were made with (window, block, bits, groups); prefill, which says how the
    next prompt or piece is read, acts on all."""
    before = {path: path.cfg for path in paths(model).values()}
    for path, cfg in before.items():
        path.cfg = replace(cfg, **changes)
    try:
        yield
    finally:
        for path, cfg in before.items():
            path.cfg = cfg


def paths(model: nn.Module) -> dict[str, ValueGroupPath]:
    """The model's value-group paths by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ValueGroupPath)}


def set_kept(model: nn.Module, k: int, whole: bool = False) -> None:
    """Let every value-group path keep k groups per token in caches made from now on, and in
    forward. Raises ValueError out of 1..S; 0 is allowed where keys tell values.

    whole: forward reads keys and values as they come, not even rounded"""
    for path in paths(model).values():
        least = 0 if path.key_map is not None else 1
        check(least <= k <= path.S, f"K={k}", f"{least}..{path.S}", "choose a K in that range")
        path.k = k
        path.whole = whole


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of value routers, reconstructors and learned bases, set trainable."""
    out = [p for path in paths(model).values() for p in path.parameters()]
    for p in out:
        p.requires_grad_(True)
    return out


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that attach added, basis included (float64), under its name in the model. Not for
    a folded model."""
    out = {}
    for name, path in paths(model).items():
        out[f"{name}.basis_fwd"], out[f"{name}.basis_bwd"] = path.basis()
        for leaf, p in path.named_parameters():
            if leaf not in ("enc", "dec"):
                out[f"{name}.{leaf}"] = p
    return out


@torch.no_grad()
def load_state(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put `saved` into paths fresh from attach(model, cfg, None), all or nothing. ValueError lists
    what does not fit."""
    check_fit(state(model), saved, "value-group state (with the kv_layers it was trained with)")
    for name, path in paths(model).items():
        path.set_basis(saved[f"{name}.basis_fwd"], saved[f"{name}.basis_bwd"])
        for leaf, p in path.named_parameters():
            if leaf not in ("enc", "dec"):
                p.copy_(saved[f"{name}.{leaf}"])
        change_coordinates(path, "load_state")


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Fold every path's basis into the projections around it, adapters included, in place: the same
    logits, no cost when decoding."""
    for name, path in paths(model).items():
        if not path.folded:
            path.fold(model.get_submodule(name.removesuffix(".kv_path")))
    return model
