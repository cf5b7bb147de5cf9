"""A piece of a prompt that is read as decoding token by token would read it: what has left the
window by the time of a query is routed for that query, the rest is whole. Attention weights are
formed in full.

Columns, in order: first tokens that stay whole | what the cache holds, packed and in its window |
the new tokens. Letters: storage/layout.py; N tokens that the cache holds in between, C columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model import attention_mask
from routing.in_window import group_logits, group_weights
from storage.as_dense import as_dense
from storage.cache import NewTokens
from storage.layout import expand_mask, group_energy, top_k_mask
from storage.packed import PackedCache, packed_count


def attend_as_decoded(
    q: Tensor,
    new: NewTokens,
    cache: PackedCache,
    rebuild: Callable[[Tensor, Tensor], Tensor],
    cap: float = 0.0,
) -> Tensor:
    """Return attention (B, H, T, D) of new tokens, before they are appended, to the cache and to
    themselves.

    q (B, H, T, D); cap: see soft_cap
    rebuild  (kept (B, Hkv, ., D), mask (B, Hm, ., S)) to what stands for dropped groups"""
    sink_k, sink_v, sinks = first_tokens(cache)
    old_k, old_v, old_mask = as_dense(cache)
    k = torch.cat((sink_k, old_k, new.k), 2)
    v = torch.cat((sink_v, old_v, new.v), 2)
    N = old_k.size(2)
    position = cache.positions(new)  # (B, T)
    logits = group_logits(q, k, cap)
    visible = visible_columns(cache, sinks, N, new)
    p = group_weights(logits, visible).to(new.v.dtype)
    heads = q.size(1) // k.size(1)  # query heads of a KV head
    whole = whole_columns(cache, N, position).repeat(1, 1, heads, 1)
    routed = routed_values(cache, old_k, old_v, old_mask, new, position, rebuild)
    routed = torch.cat((torch.zeros_like(sink_v), routed), 2)
    of_routed = cache.basis.decode((p * ~whole) @ routed)
    y = of_routed + (p * whole) @ v
    return y.view(q.shape)


def first_tokens(cache: PackedCache) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first tokens that stay whole, k and v (B, Hkv, n, D), and which of the n slots
    hold one, (B, n) bool; n may be 0."""
    sinks = cache.view().sinks
    if sinks is None:
        none = cache.window_k[:, :, :0]
        nowhere = none.new_zeros(cache.batch, 0, dtype=torch.bool)
        return none, none, nowhere
    slot = torch.arange(sinks.k.size(2), device=sinks.k.device)
    there = slot < sinks.count.unsqueeze(1)
    return sinks.k, sinks.v, there


def visible_columns(cache: PackedCache, sinks: Tensor, N: int, new: NewTokens) -> Tensor:
    """Mark the columns that each new token may read: (B, 1, T, C) bool. sinks: see
    first_tokens."""
    B, _, T, _ = new.k.shape
    device = new.k.device
    n_pad = torch.zeros_like(cache.lengths) if new.n_pad is None else new.n_pad
    held = cache.n_packed + cache.n_window
    old = torch.arange(N, device=device) < held[:, None]
    before = torch.cat((sinks, old), -1)[:, None, None]
    before = before.expand(-1, -1, T, -1)
    own = attention_mask(T, T, n_pad, device)
    own = own.expand(B, -1, -1, -1)
    return torch.cat((before, own), -1)


def whole_columns(cache: PackedCache, N: int, position: Tensor) -> Tensor:
    """Mark the columns that are whole when the new token at `position` (B, T) reads them: first
    tokens, and what is in the window then. (B, 1, T, C) bool."""
    first = cache.codec.n_sinks
    seen = position + 1 - first
    n_packed = packed_count(seen, cache.window, cache.block)
    n_packed = n_packed.maximum(cache.n_packed[:, None])  # what is packed does not come back
    old = torch.arange(first + N, device=position.device)
    old = old.expand(len(position), -1)
    column = torch.cat((old, position), 1)[:, None]  # (B, 1, C)
    in_window = column >= first + n_packed.unsqueeze(-1)
    whole = in_window | (column < first)
    return whole[:, None]


def routed_values(
    cache: PackedCache,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    new: NewTokens,
    position: Tensor,
    rebuild: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the coordinates that routed values are read as, of all columns but the first tokens:
    (B, Hkv, N + T, D).

    k, v (B, Hkv, N, D), mask (B, Hm, N, S): see as_dense
    position (B, T), of the new tokens"""
    basis = cache.basis
    number = torch.arange(k.size(2), device=k.device)
    old_position = cache.codec.n_sinks + number[None]
    # packed rows are stored already, the window's values are not
    packed = number < cache.n_packed[:, None]
    old_z = basis.to_store(k, v, old_position)
    old_z = torch.where(packed[:, None, :, None], v, old_z)
    new_z = basis.to_store(new.k, new.v, position)
    route = new.route
    if route is None:
        energy = group_energy(new_z, cache.S, cache.mask_heads)
        route = top_k_mask(energy, cache.k)
    z = torch.cat((old_z, new_z), 2)
    mask = torch.cat((mask, route), 2)
    kept = expand_mask(mask, z.size(-1))
    rebuilt = rebuild(z * kept, mask)
    routed = torch.where(kept, z, rebuilt)
    if basis.from_keys is None:
        return routed
    old_told = basis.from_keys.predict(k, old_position)
    new_told = basis.from_keys.predict(new.k, position)
    return routed + torch.cat((old_told, new_told), 2)
