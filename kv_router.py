"""Value-group KV routing (arXiv 2604.21335, 3.1.2, equations 4-7 and 14-15) and the packed cache
that stores only what it keeps.

A head's value is cut into S groups of D/S neighbouring dimensions. A router picks K groups per
token; only those are cached, and the dropped ones are rebuilt from them when read (or stay zero).
Keys are whole. Kept: (1 + K/S) / 2 of a layer's KV.

Beyond the paper:
* value basis: any invertible change of basis of V folds exactly into W_v, its bias and W_o (values
  carry no RoPE), so groups may be cut in a basis that sorts energy: native | random | pca | output
  (pca of what W_o reads, weighted by how much it reads).
* router `norm`: keep the groups of largest norm, no parameters (`static`, the first K for every
  token, is the ablation); mask per layer (the paper) or per KV head. The learned router starts from
  a ridge regression of group energies on the layer's input, not from noise.
* learn_basis: the maps into and out of the basis are trained, each for itself, so that what is read
  is the best linear guess of the value from the groups kept. They still fold: a token is encoded
  once, when it is packed, and decoding stays free.
* the packed cache: dropped groups are not stored at all. `ValueGroupPath` with a cache runs
  *packed*, without one *masked*; the logits agree (tested). Without a cache every earlier token is
  read as routed: decode mode, what token-by-token decoding gives.

Open in the paper, our reading: top-K is passed by a straight-through softmax; L_aux = MSE(rebuilt
V, V) with V detached, and its router input too; the language-model loss sees router and
reconstructor as constants unless lm_to_router.

Letters: B batch, T new tokens, L all tokens, H, Hkv heads, D head dimension, S groups, K kept, d =
D/S, n = H/Hkv.

    python train.py --stage=adapt --kv=value_groups --value_basis=output --init_from=out/...
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
from kernels import packed_attention
from model import DensePath, attend, attention_mask, evaluating
from reconstruct import MLP, Zero, fill, spread
from storage.append import can_append
from storage.integers.cache import IntPackedCache
from storage.layout import at_least_float32, top_k_mask
from storage.packed import PackedCache, compressed
from storage.state import copy_tensors
from storage.views import Packed, Tail, merged

# queries at a time where attention weights are formed in full
QUERY_BLOCK = {"cpu": 64, "cuda": 512}


# ----------------------------------------------------------------------------- value bases


@torch.no_grad()
def value_basis(kind: str, cov: Tensor, w_o: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Forward and backward maps (Hkv, D, D) float64 with z = v @ fwd and v = z @ bwd, fwd @ bwd =
    1.

    kind: native | random | pca | output; cov (Hkv, D, D): second moment of V per KV head, not
    centred (attention sinks lie far from the mean, and most of the weight is on them); w_o (n_embd,
    H*D): the output projection. `output` diagonalises G^1/2 cov G^1/2, G the sum of W_o^T W_o over
    the query heads that read the KV head, its eigenvalues floored at 1e-6 of the largest, so that
    squared error in z is squared error in what W_o writes; one scale per layer keeps z as large as
    v."""
    Hkv, D = cov.shape[:2]
    cov, eye = cov.double(), torch.eye(D, dtype=torch.float64, device=cov.device)
    if kind == "native":
        return eye.repeat(Hkv, 1, 1), eye.repeat(Hkv, 1, 1)
    if kind == "random":
        gen = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(Hkv, D, D, generator=gen, dtype=torch.float64))[0].to(
            cov.device
        )
        return q, q.mT.contiguous()
    if kind == "pca":
        u = torch.linalg.eigh(cov)[1].flip(-1)  # columns: largest energy first
        return u, u.mT.contiguous()
    n = w_o.size(1) // (Hkv * D)
    w = w_o.double().view(-1, Hkv, n, D)
    e, u = torch.linalg.eigh(torch.einsum("ehnd,ehnf->hdf", w, w))  # G per KV head
    e = e.clamp_min(1e-6 * e.amax(-1, keepdim=True)).sqrt().unsqueeze(-2)  # (Hkv, 1, D)
    root = (u * e) @ u.mT
    inverse = (u / e) @ u.mT
    u = torch.linalg.eigh(root @ cov @ root)[1].flip(-1)
    fwd = root @ u
    bwd = u.mT @ inverse
    scale = (D * Hkv / fwd.square().sum()).sqrt()
    return fwd * scale, bwd / scale


@torch.no_grad()
def fold_basis(attn: nn.Module, fwd: Tensor, bwd: Tensor) -> None:
    """Fold z = v @ fwd into what writes it (v_proj's weight, bias, lora_B) and what reads it
    (o_proj's weight, lora_A, its own router) of an Attention, in place, in float64.

    fwd, bwd (Hkv, D, D), inverse of each other: the logits do not change."""
    Hkv, D = fwd.shape[:2]
    n = attn.n_head // Hkv

    def output_side(t: Tensor) -> Tensor:  # (Hkv*D, ...) -> the same, rows in the new basis
        return (
            torch.einsum("hde,hd...->he...", fwd.double(), t.double().view(Hkv, D, *t.shape[1:]))
            .reshape(t.shape)
            .to(t.dtype)
        )

    def input_side(t: Tensor) -> Tensor:  # (..., H*D) -> the same, columns reading the new basis
        return (
            torch.einsum("hde,xhne->xhnd", bwd.double(), t.double().view(-1, Hkv, n, D))
            .reshape(t.shape)
            .to(t.dtype)
        )

    sides = (
        (attn.v_proj, ("weight", "bias", "lora_B"), output_side),
        (attn.o_proj, ("weight", "lora_A", "gate.linear.weight"), input_side),
    )
    for module, names, change in sides:
        for name, p in list(module.named_parameters()):
            if name in names:
                *path, leaf = name.split(".")
                setattr(
                    module.get_submodule(".".join(path)),
                    leaf,
                    nn.Parameter(change(p.data), requires_grad=p.requires_grad),
                )


# ----------------------------------------------------------------------------- the KV path


class ValueGroupPath(nn.Module):
    """Fixed top-K value groups on one layer (eqs 4-7): routed values in training and evaluation,
    packed storage with a cache.

    A routed value is decode(mask * encode(v)), a whole one v itself, so keeping everything is
    dense, exactly. Before `fold` encode is v @ enc and decode @ dec; after it W_o holds dec and W_v
    its inverse, and encode is @ (dec enc), nothing at all while that is one."""

    reads_chunks = True

    def __init__(self, model_cfg: ModelConfig, cfg: KVConfig):
        super().__init__()
        cfg.check_model(model_cfg)
        self.cfg = cfg
        self.Hkv = model_cfg.n_kv_head
        self.D = model_cfg.head_dim
        self.S = cfg.n_groups
        self.k = cfg.topk_groups
        self.mask_heads = self.Hkv if cfg.mask_scope == "head" else 1
        self.rows = model_cfg.n_head // model_cfg.n_kv_head
        self.folded = False
        if cfg.learn_basis:
            self.enc, self.dec = (
                nn.Parameter(torch.empty(self.Hkv, self.D, self.D)) for _ in range(2)
            )
        # "cpu": paths are counted on meta tensors, too
        eye = torch.eye(self.D, dtype=torch.float64, device="cpu").repeat(self.Hkv, 1, 1)
        self.set_basis(eye, eye)
        self.router = (
            nn.Linear(model_cfg.n_embd, self.mask_heads * self.S)
            if cfg.value_router == "linear"
            else None
        )
        args = (self.Hkv, self.D, self.S)
        self.reconstructor = {
            "zero": lambda: Zero(),
            "mlp": lambda: MLP(*args, self.mask_heads, cfg.recon_hidden),
        }[cfg.reconstructor]()
        self.aux_loss: Tensor | None = None  # L_aux of the last training forward
        # mask of the last uncached forward while `record` is on
        self.last_mask: Tensor | None = None
        self.record = False

    def set_basis(self, enc: Tensor, dec: Tensor) -> None:
        """z = v @ enc, v = z @ dec, (Hkv, D, D): inverse of each other unless learn_basis has
        trained them."""
        if self.cfg.learn_basis:
            with torch.no_grad():
                self.enc.copy_(enc)
                self.dec.copy_(dec)
            return
        # beside the copies in the path's own dtype that training applies
        self._exact = (enc.double(), dec.double())
        like = self.enc if hasattr(self, "enc") else torch.empty(0)
        self.register_buffer("enc", enc.to(like), persistent=False)
        self.register_buffer("dec", dec.to(like), persistent=False)

    def basis(self) -> tuple[Tensor, Tensor]:
        """The maps (Hkv, D, D) float64 into and out of the value basis."""
        return (
            (self.enc.detach().double(), self.dec.detach().double())
            if self.cfg.learn_basis
            else self._exact
        )

    def fold(self, attn: nn.Module) -> None:
        """Put the basis into the projections of `attn` around this path, in place."""
        enc, dec = (t.to(attn.o_proj.weight.device) for t in self.basis())
        fold_basis(attn, torch.linalg.inv(dec) if self.cfg.learn_basis else enc, dec)
        self.folded = True
        if self.cfg.learn_basis:
            del self.enc, self.dec
            self.register_buffer("enc", (dec @ enc).to(attn.o_proj.weight.dtype), persistent=False)

    @property
    def whole(self) -> bool:
        """Whether every group is kept."""
        return self.k == self.S

    def encode(self, v: Tensor) -> Tensor:
        """Values (B, Hkv, T, D) as attention gets them -> the coordinates that are cut into groups;
        as they are if all are kept."""
        return (
            v
            if self.whole or (self.folded and not self.cfg.learn_basis)
            else v @ self.enc.to(v.dtype)
        )

    def decode(self, z: Tensor) -> Tensor:
        """What is read of the groups, (B, Hkv, ., D), -> the space of whole values."""
        return z if self.whole or self.folded else z @ self.dec.to(z.dtype)

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> PackedCache:
        return (IntPackedCache if self.cfg.ints else PackedCache)(
            batch, max_len, self.Hkv, self.D, self.cfg, self.k, like
        )

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        """Router logits (B, 1 or Hkv, T, S): linear on x (B, T, n_embd), the groups' energies in z
        (B, Hkv, T, D), or the same for all."""
        if self.cfg.value_router == "static":
            return -torch.arange(self.S, device=z.device, dtype=z.dtype).expand(
                z.size(0), self.mask_heads, z.size(2), -1
            )
        if self.router is None:
            return group_energy(z, self.S, self.mask_heads)
        return self.router(x.detach()).unflatten(-1, (self.mask_heads, self.S)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: PackedCache | None = None,
        pad: Tensor | None = None,
    ) -> Tensor:
        if self.cfg.ints and cache is None and not self.training and not self.record:
            return self._through_cache(x, q, k, v, pad)
        if self.k == self.S and cache is None and not self.record:
            self.aux_loss = None  # whole values: nothing to rebuild
            return attend(q, k, v, pad)
        z = self.encode(v)
        logits = self.scores(x, z)
        mask = top_k_mask(logits.detach(), self.k)  # (B, 1 or Hkv, T, S)
        if cache is not None:
            return self._packed(q, k, v, z, mask, cache, pad)
        if self.record:
            self.last_mask = mask
        if self.training and torch.is_grad_enabled():
            self.aux_loss = self._aux(logits, mask, z)
        if self.k == self.S:
            return attend(q, k, v, pad)
        routed = self.decode(self._routed(logits, mask, z))
        if self.cfg.kv_tail + self.cfg.tail_leaves > 1:  # the tail may hold tokens
            return self._tailed(q, k, v, routed, pad)
        return attend(q, k, routed, pad)

    def _through_cache(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None
    ) -> Tensor:
        """Decode mode of integers: a cache is filled token by token, or as many as go by until a
        block leaves the tail."""
        check(
            pad is None,
            "padding without a cache",
            "integers are read through one",
            "give a cache, or rows of one length",
        )
        T = q.size(2)
        out = []
        a = 0
        cache = self.new_cache(len(q), T, k)
        while a < T:
            packed = int(self.compressed(torch.tensor(a + 1 - self.cfg.kv_sinks)))
            # with one more, a block leaves
            b = min(T, self.cfg.kv_sinks + self.cfg.kv_tail + packed + self.cfg.tail_leaves - 1)
            part = [t[:, :, a:b] for t in (k, v)]
            cache.columns += b - a
            mask = top_k_mask(self.scores(x[:, a:b], self.encode(part[1])), self.k)
            cache.append(*part, mask, torch.zeros_like(cache.n_packed), self.encode)
            y = (
                self.attend_packed(q[:, :, a:b], cache.packed(), cache.whole(), cache.sinks())
                if a
                else attend(q[:, :, :b], *part)
            )
            out.append(y)  # until the first block leaves everything is whole
            a = b
        return torch.cat(out, 2)

    def _tailed(
        self, q: Tensor, k: Tensor, v: Tensor, routed: Tensor, pad: Tensor | None
    ) -> Tensor:
        """Causal attention over routed values, whole ones for the tokens that are in the tail when
        they are read. In blocks of queries: a block needs no later key, and tail tokens only among
        its nearest keys."""
        B, H, T, D = q.shape
        n_pad = torch.zeros(B, dtype=torch.int64, device=q.device) if pad is None else pad
        visible = attention_mask(T, T, pad, q.device)
        whole = self._whole(T, n_pad, torch.zeros_like(n_pad))
        reach = self.cfg.kv_tail + self.cfg.kv_tail_block - 1
        lost = v - routed
        parts = []
        step = QUERY_BLOCK[q.device.type]
        for a in range(0, T, step):
            b = min(a + step, T)
            # keys before `near` are compressed for every query of the block
            near = max(0, a - reach)
            p = self._weights(q[:, :, a:b], k[:, :, :b], visible[..., a:b, :b])
            far, close = p.split([near, b - near], -1)
            kept_whole = close * whole[..., a:b, near:b].repeat(1, 1, H // self.Hkv, 1)
            y = (
                far @ routed[:, :, :near]
                + close @ routed[:, :, near:b]
                + kept_whole @ lost[:, :, near:b]
            )
            parts.append(y.view(B, H, b - a, D))
        return torch.cat(parts, 2)

    def _routed(self, logits: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """z with dropped groups rebuilt. Router and reconstructor are constants to the loss, unless
        lm_to_router."""
        kept = z * spread(mask, self.D)
        if self.cfg.lm_to_router and self.router is not None and self.training:
            m = spread(_straight_through(logits, mask), self.D)
            return m * z + (1 - m) * self.reconstructor(kept, mask)
        if self.cfg.lm_to_router:
            return fill(kept, self.reconstructor(kept, mask), mask)
        constants = {n: p.detach() for n, p in self.reconstructor.named_parameters()}
        return fill(
            kept, torch.func.functional_call(self.reconstructor, constants, (kept, mask)), mask
        )

    def _aux(self, logits: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """L_aux = MSE(rebuilt V, V), V detached (eq 15), in the value basis; gradients reach the
        router straight through top-K, and the reconstructor."""
        z = z.detach()
        rebuilt = self.reconstructor(z * spread(mask, self.D), mask)
        m = spread(_straight_through(logits, mask) if self.router is not None else mask, self.D)
        return F.mse_loss(m * z + (~m if m.dtype == torch.bool else 1 - m) * rebuilt, z)

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        mask: Tensor,
        cache: PackedCache,
        pad: Tensor | None,
    ) -> Tensor:
        """Attention over the cache and the T new tokens (v whole, z encoded), which are appended to
        it."""
        T = q.size(2)
        n_old = cache.n_packed + cache.n_tail
        n_pad = torch.zeros_like(n_old) if pad is None else (pad - cache.columns).clamp(0, T)
        cache.columns += T
        if T == 1:  # reads what is left of it and of all before
            cache.append(k, v, mask, n_pad, self.encode)
            return self.attend_packed(q, cache.packed(), cache.whole(), cache.sinks())
        if self.cfg.prefill == "exact" and cache.columns == T:
            y = attend(q, k, v, pad)
        # a chunk reads itself whole, and of all before what is stored
        elif self.cfg.prefill == "exact":
            # few pieces: what they hold until merged is no small part
            stored = cache.packed()._replace(longest=min(cache.cap, cache.columns))
            y = self.attend_packed(q, stored, cache.beside(k, v, n_pad), cache.sinks())
        else:
            y = self._attend_stored(q, k, v, z, mask, cache, n_old, n_pad)
        cache.append(k, v, mask, n_pad, self.encode)
        return y

    def attend_packed(
        self, q: Tensor, packed: Packed, tail: Tail, sinks: Tail | None = None
    ) -> Tensor:
        """Attention of q (B, H, T, D) over packed values, as they are read, and the whole ones of a
        tail that ends with the T queries' tokens, and of first tokens."""
        if isinstance(self.reconstructor, MLP):  # rebuilt on every read
            k, z, mask, _ = packed.unpack()
            packed = Packed.of_whole(
                k, self.decode(fill(z, self.reconstructor(z, mask), mask)), packed.n
            )
            return packed_attention(q, packed, tail)[0]
        (B, *_, D) = q.shape
        more = []
        if self.whole or self.folded:
            y, lse = packed_attention(q, packed, tail)
        else:  # what is read of groups is mapped back before whole values are mixed in
            y, lse = packed_attention(q, packed, None)
            y = self.decode(y.reshape(B, self.Hkv, -1, D)).view(q.shape)
            more.append(packed_attention(q, None, tail))
        if sinks:  # all queries see them: so many more heads of one query
            more += [
                tuple(
                    t.view(*q.shape[:3], *t.shape[3:])
                    for t in packed_attention(q.reshape(B, -1, 1, D), None, sinks)
                )
            ]
        return merged((y, lse), *more) if more else y

    def can_step(self) -> bool:
        """Whether `step` has kernels for this storage."""
        c = self.cfg
        if c.ints and (not c.kv_tail or 3 in (c.key_bits, c.value_bits)):
            # the newest token would be part of the block that is formed; the planes of 3 bits are
            # formed by no kernel
            return False
        return (
            can_append(self.D) and (self.whole or self.folded) and self.cfg.reconstructor != "mlp"
        )

    def step(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: PackedCache, tail: None
    ) -> Tensor:
        """forward for one token per sequence without padding, on the device alone; counts kept on
        the host (columns) stay."""
        scores = (
            None
            if self.router is None and self.cfg.value_router == "norm"
            else self.scores(x, v)[:, :, 0].contiguous()
        )
        plain = self.whole or not self.cfg.learn_basis
        cache.append_token(k, v, scores, None if plain else self.enc.to(v.dtype))
        return self.attend_packed(q, cache.packed(), cache.whole(), cache.sinks())

    def _attend_stored(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        mask: Tensor,
        cache: PackedCache,
        n_old: Tensor,
        n_pad: Tensor,
    ) -> Tensor:
        """Attention output over what the cache holds, n_old (B,) tokens, and the new ones, the
        first n_pad (B,) of which are padding; each query reads as routed what has left the tail by
        then."""
        B = q.size(0)
        T = q.size(2)
        old_k, old_v, old_mask = cache.unpack()
        N = old_k.size(2)
        at = torch.arange(N, device=q.device)
        old = (at < n_old[:, None])[:, None, None].expand(-1, -1, T, -1)  # (B, 1, T, N)
        visible = torch.cat((old, attention_mask(T, T, n_pad, q.device).expand(B, -1, -1, -1)), -1)
        whole = None
        if self.cfg.kv_tail + self.cfg.tail_leaves > 1:  # the tail may hold tokens
            # (B, T)
            boundary = self.compressed(
                n_old[:, None] + torch.arange(1, T + 1, device=q.device) - n_pad[:, None]
            )
            boundary = boundary.maximum(cache.n_packed[:, None])
            whole = torch.cat((at >= boundary[:, None, :, None], self._whole(T, n_pad, n_old)), -1)
        # rows hold encoded values already, the tail whole ones
        packed = (at < cache.n_packed[:, None])[:, None, :, None]
        groups = torch.cat((torch.where(packed, old_v, self.encode(old_v)), z), 2)
        return self._read(
            q,
            torch.cat((old_k, k), 2),
            torch.cat((old_v, v), 2),
            groups,
            torch.cat((old_mask, mask), 2),
            visible,
            whole,
        )

    def compressed(self, seen: Tensor) -> Tensor:
        """Tokens compressed once `seen` have been seen."""
        return compressed(seen, self.cfg.kv_tail, self.cfg.tail_leaves)

    def _whole(self, T: int, n_pad: Tensor, n_old: Tensor) -> Tensor:
        """True where query i of T new tokens reads new token j whole, because it is in the tail
        then: (B, 1, T, T) bool."""
        # (B, T) token number
        own = n_old[:, None] + torch.arange(T, device=n_pad.device) - n_pad[:, None]
        return (own[:, None, :] >= self.compressed(own + 1)[:, :, None])[:, None]

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        mask: Tensor,
        visible: Tensor,
        whole: Tensor | None,
    ) -> Tensor:
        """Attention of q (B, H, T, D) over L tokens: routed values from the groups z, except whole
        ones, v, where `whole`. visible, whole (B, 1, T, L) bool."""
        p = self._weights(q, k, visible)
        kept = z * spread(mask, self.D)
        if whole is None:
            return self.decode(self.reconstructor.read(p, kept, mask)).view(q.shape)
        whole = whole.repeat(1, 1, q.size(1) // self.Hkv, 1)
        return (
            self.decode(self.reconstructor.read(p * ~whole, kept, mask)) + (p * whole) @ v
        ).view(q.shape)

    def _weights(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """Attention weights of q (B, H, T, D) over k (B, Hkv, L, D) where visible (B or 1, 1, T,
        L): (B, Hkv, n*T, L), query heads in turn."""
        B, H, T, D = q.shape
        q = (q * D**-0.5).reshape(B, self.Hkv, H // self.Hkv * T, D)
        logits = at_least_float32(q @ k.mT)
        # added: its backward is free
        bias = torch.zeros_like(visible, dtype=logits.dtype).masked_fill(~visible, float("-inf"))
        return (logits + bias.repeat(1, 1, H // self.Hkv, 1)).softmax(-1).to(k.dtype)


def _straight_through(logits: Tensor, mask: Tensor) -> Tensor:
    """The hard mask in the forward pass, the softmax's gradient in the backward pass: float like
    logits."""
    soft = logits.softmax(-1)
    return mask + soft - soft.detach()


def group_energy(v: Tensor, n_groups: int, mask_heads: int) -> Tensor:
    """Squared norm of every value group, v (B, Hkv, T, D) -> (B, 1 or Hkv, T, S); summed over heads
    when the mask is shared."""
    e = at_least_float32(v).unflatten(-1, (n_groups, -1)).square().sum(-1)
    return e if mask_heads > 1 else e.sum(1, keepdim=True)


# -------------------- attaching, saving, loading


class _Observe(nn.Module):
    """Wraps a path during calibration: adds up second moments of V and, for the router, of the
    input and the group energies."""

    def __init__(self, inner: nn.Module, path: ValueGroupPath):
        super().__init__()
        self.inner = inner
        self.S = path.S
        self.mask_heads = path.mask_heads
        self.enc = path.enc
        self.cov = 0.0
        self.xx = 0.0
        self.xe = 0.0

    def forward(self, x, q, k, v, cache=None, pad=None):
        w = (v @ self.enc.to(v.dtype)).double()
        self.cov = self.cov + torch.einsum("bhtd,bhte->hde", w, w)
        # (B*T, n_embd + 1)
        ones = torch.cat((x, torch.ones_like(x[..., :1])), -1).double().flatten(0, 1)
        # (B*T, Hm*S)
        e = group_energy(w, self.S, self.mask_heads).transpose(1, 2).reshape(ones.size(0), -1)
        self.xx = self.xx + ones.T @ ones
        self.xe = self.xe + ones.T @ e
        return self.inner(x, q, k, v, cache, pad)


@torch.no_grad()
def attach(
    model: nn.Module,
    cfg: KVConfig,
    batches: list[Tensor] | None = None,
    seed: int = 0,
    make: Callable | None = None,
) -> nn.Module:
    """Give the chosen layers value-group paths, in place; make(model_cfg, cfg) -> path: another
    kind of them. Returns the model.

    batches: token ids (B, T) on the model's device that calibrate bases, routers and linear
    reconstructors; None leaves the native basis and untrained parts, for load_state to overwrite.
    Until `fold` the paths apply their basis themselves, so that adapters on v and o learn in the
    native one (in the new one they learn worse: docs/log.md). Raises ValueError when S does not
    divide D."""
    if cfg.kv == "dense":
        return model
    cfg.check_model(model.cfg)
    chosen = [model.layers[i].self_attn for i in cfg.layers(model.cfg.n_layer)]
    dtype = at_least_float32(model.norm.weight).dtype  # what is trained is never narrower than that
    paths = [
        (make or ValueGroupPath)(model.cfg, cfg).to(model.norm.weight.device, dtype) for _ in chosen
    ]
    if batches is not None:
        for i, (attn, seen) in enumerate(
            zip(chosen, _observe(model, chosen, paths, batches), strict=True)
        ):
            paths[i].set_basis(
                *value_basis(cfg.value_basis, seen.cov, attn.o_proj.weight, seed * 1000 + i)
            )
        # again, in the new basis
        for path, seen in zip(paths, _observe(model, chosen, paths, batches), strict=True):
            if path.router is not None:
                _fit_router(path.router, seen.xx, seen.xe)
    for attn, path in zip(chosen, paths, strict=True):
        attn.kv_path = path.train(model.training)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Put whole values back into a model whose bases are not folded, in place. Returns the
    model."""
    for name, path in paths(model).items():
        check(
            not path.folded, f"{name}", "its basis is folded into the weights", "load the base anew"
        )
        model.get_submodule(name.rsplit(".", 1)[0]).kv_path = DensePath(path.Hkv, path.D)
    return model


@contextmanager
def storing(model: nn.Module, **changes):
    """Inside the `with` every value-group path stores by a KVConfig changed so (kv_tail,
    kv_tail_block, prefill)."""
    before = {p: p.cfg for p in paths(model).values()}
    for p, cfg in before.items():
        p.cfg = replace(cfg, **changes)
    try:
        yield
    finally:
        for p, cfg in before.items():
            p.cfg = cfg


def _observe(model: nn.Module, chosen: list, paths: list, batches: list[Tensor]) -> list[_Observe]:
    inner = [attn.kv_path for attn in chosen]
    seen = [_Observe(i, p) for i, p in zip(inner, paths, strict=True)]
    for attn, s in zip(chosen, seen, strict=True):
        attn.kv_path = s
    with evaluating(model):
        for idx in batches:
            model(idx, last_only=True)
    for attn, i in zip(chosen, inner, strict=True):
        attn.kv_path = i
    return seen


def _fit_router(router: nn.Linear, xx: Tensor, xe: Tensor) -> None:
    """Ridge regression of group energies (in units of their mean) on the layer's input: a router
    that starts near the norm rule."""
    ridge = 1e-4 * xx.diagonal().mean() * torch.eye(xx.size(0), dtype=xx.dtype, device=xx.device)
    w = torch.linalg.solve(xx + ridge, xe)  # (n_embd + 1, Hm*S)
    w = w / (xe[-1] / xx[-1, -1]).mean().clamp_min(1e-30)
    router.weight.copy_(w[:-1].T)
    router.bias.copy_(w[-1])


def paths(model: nn.Module) -> dict[str, ValueGroupPath]:
    """The model's value-group paths by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ValueGroupPath)}


def set_kept(model: nn.Module, k: int) -> None:
    """Let every value-group path keep k groups per token from now on. Raises ValueError out of
    1..S."""
    for path in paths(model).values():
        check(1 <= k <= path.S, f"K={k}", f"1..{path.S}", "choose a K in that range")
        path.k = k


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of value routers and reconstructors, set trainable."""
    out = [p for path in paths(model).values() for p in path.parameters()]
    for p in out:
        p.requires_grad_(True)
    return out


def aux_loss(model: nn.Module) -> Tensor | float:
    """Mean of L_aux over the compressed layers of the last training forward; 0.0 where there is
    none."""
    terms = [p.aux_loss for p in paths(model).values() if p.aux_loss is not None]
    return torch.stack(terms).mean() if terms else 0.0


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that attach added, basis included (float64), under its name in the model. Not for
    a folded model."""
    out = {}
    for name, path in paths(model).items():
        out[f"{name}.basis_fwd"], out[f"{name}.basis_bwd"] = path.basis()
        out.update(
            {f"{name}.{k}": p for k, p in path.named_parameters() if k not in ("enc", "dec")}
        )
    return out


@torch.no_grad()
def load_state(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put `saved` into paths fresh from attach(model, cfg, None). ValueError lists what does not
    fit."""
    trained, given = (
        {k: t for k, t in d.items() if ".basis_" not in k} for d in (state(model), saved)
    )
    copy_tensors(trained, given, "value-group state")
    extra = sorted(k for k in saved if ".basis_" in k and k.rsplit(".", 1)[0] not in paths(model))
    check(
        not extra,
        "value-group state",
        f"unexpected: {', '.join(extra)}",
        "load it with the kv_layers it was trained with",
    )
    for name, path in paths(model).items():
        fwd = saved.get(f"{name}.basis_fwd")
        bwd = saved.get(f"{name}.basis_bwd")
        fits = fwd is not None and bwd is not None and fwd.shape == bwd.shape == path.enc.shape
        check(
            fits,
            f"value-group state without a fitting basis for {name}",
            f"two tensors of shape {tuple(path.enc.shape)}",
            "load the file it was trained with",
        )
        path.set_basis(fwd, bwd)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Fold every path's basis into the projections around it, adapters included, in place: the same
    logits, no cost when decoding."""
    for name, path in paths(model).items():
        if not path.folded:
            path.fold(model.get_submodule(name.rsplit(".", 1)[0]))
    return model
