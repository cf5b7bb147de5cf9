"""Values predicted from keys: what stands for a dropped group is what the token's keys say of it.

The problem: a dropped group is read as zero, though most of it could be told from what is stored
beside it. The idea: a value is z = k W + r, where k are the keys of all KV heads of a layer before
RoPE, W is fitted by least squares, weighted by the attention that tokens get, and groups of the
residual r are routed and stored. Decoding needs no predicted value,

    sum_j p_j z_j = (sum_j p_j k_j) W + sum_j p_j m_j r_j                                        (1)

m_j the mask of token j: beside what it has, attention adds up keys, and multiplies once a step.
Keys are those that are stored, turned back by their positions; a token's position is its number in
the sequence. Where heads keep different tokens (selection) each head's values are told by its own
keys: W has a block for each.

    from_keys = FromKeys(weight, cos, sin)
    r = z - from_keys.predict(k, position)           # what is cut into groups and stored
    out, lse = attend_predicted(q, cache.view().packed[0], from_keys, cache.packed_positions())

Letters: storage/layout.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import packed_attention, wants_gradient
from storage.kernel_base import use_triton
from storage.key_sums import attend_with_key_sums, can_sum_keys
from storage.layout import PackedView, WindowView, at_least_float32, merge_softmax, soft_cap


def numbers(k: Tensor, pad: Tensor | None) -> Tensor:
    """Return the numbers in their sequence of tokens k (B, Hkv, T, D), the first pad (B,) of which
    are padding: (B or 1, T) int64; negative in padding."""
    number = torch.arange(k.size(2), device=k.device)[None]
    return number if pad is None else number - pad[:, None]


def slot_positions(position: int | Tensor, n: int, device: torch.device) -> Tensor:
    """Return the positions of the first n slots of every segment, (B or 1, 1 or Hkv, n) int64, for
    a position as attend_predicted has it."""
    if isinstance(position, int):
        return torch.arange(position, position + n, device=device)[None, None]
    by_head = position if position.ndim == 3 else position[:, None]
    return by_head[..., :n]


class FromKeys(NamedTuple):
    """The linear map of one layer from keys before RoPE to value coordinates."""

    # (Hkv*D, Hkv*D): keys of all heads to coordinates of all heads; (Hkv, D, D): of each head's own
    weight: Tensor
    cos: Tensor  # (positions, D/2) of RoPE's angles
    sin: Tensor

    def copied(self) -> FromKeys:
        """Return the same map, apart from what trains it."""
        return self._replace(weight=self.weight.detach().clone())

    @property
    def own_head(self) -> bool:
        """Whether a head's values are told by its own keys alone."""
        return self.weight.ndim == 3

    def before_rope(self, k: Tensor, position: Tensor) -> Tensor:
        """Undo RoPE: the keys k (..., D) at positions of that shape or broadcast to it, as they
        were projected, float32 at least. Positions past the table are those of slots without a
        token."""
        position = position.clamp(0, len(self.cos) - 1)
        cos = self.cos[position]
        sin = self.sin[position]
        a, b = at_least_float32(k).chunk(2, -1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)

    def heads_before_rope(self, k: Tensor, position: Tensor) -> Tensor:
        """Undo RoPE: the keys k (B, Hkv, T, D) at positions (B or 1, T), of all heads beside one
        another: (B, T, Hkv*D)."""
        return self.before_rope(k, position[:, None]).transpose(1, 2).flatten(2)

    def predict(self, k: Tensor, position: Tensor) -> Tensor:
        """Return the coordinates (B, Hkv, T, D) that keys k (B, Hkv, T, D) at positions (B or 1, T)
        tell, in their dtype."""
        if self.own_head:
            raw = self.before_rope(k, position[:, None])
            return told_by_keys(raw, self.weight).to(k.dtype)
        raw = self.heads_before_rope(k, position)
        z = told_by_keys(raw, self.weight).unflatten(-1, (k.size(1), -1))
        return z.transpose(1, 2).to(k.dtype)

    def predict_each(self, k: Tensor, head: Tensor, position: Tensor) -> Tensor:
        """Return the coordinates (n, D) that keys k (n, D) of heads head (n,) at positions (n,)
        tell, each those of its own head, in their dtype."""
        raw = self.before_rope(k, position)
        out = torch.empty_like(raw)
        for h, weight in enumerate(self.weight):
            out[head == h] = told_by_keys(raw[head == h], weight)
        return out.to(k.dtype)


def told_by_keys(raw: Tensor, weight: Tensor) -> Tensor:
    """Return raw @ weight in raw's dtype, under autocast, too: what is stored is the rest of it,
    and what reads it adds it in float32."""
    with torch.autocast(raw.device.type, enabled=False):
        return raw @ weight.to(raw.dtype)


def attend_predicted_ref(
    q: Tensor, packed: PackedView, from_keys: FromKeys, position: int | Tensor, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute attend_predicted by writing every predicted value out."""
    k, r, _, _ = packed.unpack()
    position = slot_positions(position, k.size(2), q.device)
    if from_keys.own_head:
        raw = from_keys.before_rope(k, position)
        z = r + told_by_keys(raw, from_keys.weight)
    else:
        z = r + from_keys.predict(k, position[:, 0])
    return packed_attention(q, PackedView.of_whole(k, z, packed.n), None, cap=cap)


def attend_predicted(
    q: Tensor,
    packed: PackedView,
    from_keys: FromKeys,
    position: int | Tensor,
    cap: float = 0.0,
    impl: str = "auto",
    chunk: int = 0,
    window: WindowView | None = None,
) -> tuple[Tensor, Tensor]:
    """Let queries q (B, H, T, D) read all packed tokens, whose rows are residuals, by equation (1):
    one attention over rows, one sum of keys. By storage/key_sums.py's kernel where heads are told
    by their own whole keys and nothing wants a gradient.

    packed: of at most N tokens in a segment; maps of all heads want whole keys, with the same
        room for every segment, as PackedCache has it
    position: of the first slot of every segment where the others follow it; else of each slot of a
        segment, (B or 1, N), or (B or 1, 1 or Hkv, N) for maps of own heads, int64
    impl: see storage/kernel_base.py; cap, chunk: see kernels.packed_attention
    window: newer tokens with whole values, value coordinates, too; or None
    Returns out (B, H, T, D), value coordinates, and lse (B, H, T), as packed_attention."""
    by_kernel = from_keys.own_head and can_sum_keys(q, packed)
    if by_kernel and use_triton(impl, q.device, q.dtype) and not wants_gradient(q, packed, window):
        tables = (from_keys.cos, from_keys.sin)
        sums, lse = attend_with_key_sums(q, packed, window, *tables, position, cap, chunk)
        with torch.autocast(q.device.type, enabled=False):  # sums are float32, whatever a model is
            out = told_by_sums(sums, from_keys.weight)
        return out.to(q.dtype), lse
    part = _attend_plainly(q, packed, from_keys, position, cap)
    if window is None:
        return part
    whole = packed_attention(q, None, window, cap=cap)
    return merge_softmax(part, whole), torch.logaddexp(part[1], whole[1])


def told_by_sums(sums: Tensor, weight: Tensor) -> Tensor:
    """Multiply the sums of keys by the maps of their heads and add the sums of rows.

    sums: (B, H, T, 2 D) float32, rows, then keys; or (B, H, T, D), keys alone
    weight: (Hkv, D, D)
    Returns (B, H, T, D) float32."""
    B, H, T, _ = sums.shape
    Hkv, D, _ = weight.shape
    weight = weight.to(sums.dtype)
    rows = H // Hkv * T  # of queries that share a KV head
    by_head = sums.view(B, Hkv, rows, sums.size(-1)).transpose(0, 1).flatten(1, 2)
    keys = by_head[..., -D:]
    if keys.size(-1) == by_head.size(-1):
        out = torch.bmm(keys, weight)
    else:
        out = torch.baddbmm(by_head[..., :D], keys, weight)
    return out.view(Hkv, B, rows, D).transpose(0, 1).reshape(B, H, T, D)


def _attend_plainly(
    q: Tensor, packed: PackedView, from_keys: FromKeys, position: int | Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """Compute attend_predicted with the weights of all tokens in memory."""
    with torch.autocast(q.device.type, enabled=False):
        told, lse = _read_told(q, packed, from_keys, position, cap)
    if packed.keys_alone:
        return told.to(q.dtype), lse
    rows, lse = packed_attention(q, packed, None, cap=cap)
    return rows + told.to(q.dtype), lse


def _read_told(
    q: Tensor, packed: PackedView, from_keys: FromKeys, position: int | Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """Let queries read what keys tell of values, without the rows: out (B, H, T, D) and lse
    (B, H, T), float32 at least."""
    B, H, T, D = q.shape
    Hkv = packed.token_base.size(1)
    if from_keys.own_head:
        k = packed.unpack(q.dtype)[0]
    else:
        room = len(packed.keys) // max(1, B * Hkv)
        k = packed.keys.view(B, Hkv, room, D)[:, :, : packed.longest]
    N = k.size(2)
    position = slot_positions(position, N, q.device)
    number = torch.arange(N, device=q.device)
    n = packed.n if packed.n.size(1) == Hkv else packed.n.expand(-1, Hkv)
    seen = number < n[..., None, None]  # (B, Hkv, 1, N)
    k = k.masked_fill(~seen.mT, 0)  # old ones may be anything
    queries = (q * D**-0.5).reshape(B, Hkv, H // Hkv * T, D)
    logits = at_least_float32(queries) @ at_least_float32(k).mT
    logits = soft_cap(logits, cap).masked_fill(~seen, float("-inf"))
    own = logits.logsumexp(-1, keepdim=True)
    p = (logits - own.clamp_min(torch.finfo(own.dtype).min)).exp()  # (B, Hkv, n*T, N)
    weight = from_keys.weight
    if from_keys.own_head:
        raw = from_keys.before_rope(k, position)  # (B, Hkv, N, D)
        told = p.to(raw.dtype) @ raw
    else:
        raw = from_keys.heads_before_rope(k, position[:, 0])  # (B, N, Hkv*D)
        told = p.flatten(1, 2).to(raw.dtype) @ raw  # (B, H*T, Hkv*D)
        told = told.view(B, Hkv, H // Hkv * T, Hkv * D)
        weight = weight.unflatten(-1, (Hkv, D)).transpose(0, 1)
    told = told @ weight.to(told.dtype)
    return told.view(q.shape), own.view(B, H, T)
