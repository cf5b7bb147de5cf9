"""Values predicted from keys: what stands for a dropped group is what the token's keys say of it.

The problem: a dropped group is read as zero, though most of it could be told from what is stored
beside it. The idea: a value is z = k W + r, where k are the keys of all KV heads of a layer before
RoPE, W is fitted by least squares, and groups of the residual r are routed and stored. Decoding
needs no predicted value,

    sum_j p_j z_j = (sum_j p_j k_j) W + sum_j p_j m_j r_j                                        (1)

m_j the mask of token j: beside what it has, attention adds up keys, and multiplies once a step.
Keys are those that are stored, turned back by their positions; a token's position is its number in
the sequence.

    from_keys = FromKeys(weight, cos, sin)
    r = z - from_keys.predict(k, position)           # what is cut into groups and stored
    out, lse = attend_predicted(q, cache.view().packed[0], from_keys, first=4)

Letters: storage/layout.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import packed_attention
from storage.layout import PackedView, at_least_float32, soft_cap


def numbers(k: Tensor, pad: Tensor | None) -> Tensor:
    """Return the numbers in their sequence of tokens k (B, Hkv, T, D), the first pad (B,) of which
    are padding: (B or 1, T) int64; negative in padding."""
    number = torch.arange(k.size(2), device=k.device)[None]
    return number if pad is None else number - pad[:, None]


class FromKeys(NamedTuple):
    """The linear map of one layer from keys before RoPE to value coordinates."""

    weight: Tensor  # (Hkv*D, Hkv*D): keys of all heads to coordinates of all heads
    cos: Tensor  # (positions, D/2) of RoPE's angles
    sin: Tensor

    def copied(self) -> FromKeys:
        """Return the same map, apart from what trains it."""
        return self._replace(weight=self.weight.detach().clone())

    def turn_back(self, k: Tensor, position: Tensor) -> Tensor:
        """Undo RoPE: the keys k (B, Hkv, T, D) at positions (B or 1, T), as they were projected,
        of all heads beside one another: (B, T, Hkv*D), float32 at least. Positions past the table
        are those of slots without a token."""
        position = position.clamp(0, len(self.cos) - 1)
        cos = self.cos[position][:, None]  # (B, 1, T, D/2)
        sin = self.sin[position][:, None]
        a, b = at_least_float32(k).chunk(2, -1)
        raw = torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
        return raw.transpose(1, 2).flatten(2)

    def predict(self, k: Tensor, position: Tensor) -> Tensor:
        """Return the coordinates (B, Hkv, T, D) that keys k (B, Hkv, T, D) at positions (B or 1, T)
        tell, in their dtype."""
        raw = self.turn_back(k, position)
        z = (raw @ self.weight.to(raw.dtype)).unflatten(-1, (k.size(1), -1))
        return z.transpose(1, 2).to(k.dtype)


def attend_predicted_ref(
    q: Tensor, packed: PackedView, from_keys: FromKeys, first: int, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute attend_predicted by writing every predicted value out."""
    k, r, _, _ = packed.unpack()
    z = r + from_keys.predict(k, first + torch.arange(k.size(2), device=k.device)[None])
    return packed_attention(q, PackedView.of_whole(k, z, packed.n), None, cap=cap)


def attend_predicted(
    q: Tensor, packed: PackedView, from_keys: FromKeys, first: int, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Let queries q (B, H, T, D) read all packed tokens, whose rows are residuals, by equation (1):
    one attention over rows, one sum of keys.

    packed: of whole keys, with the same room for every segment, as PackedCache has it
    first: the position of a segment's first packed token
    Returns out (B, H, T, D), value coordinates, and lse (B, H, T), as packed_attention."""
    B, H, T, D = q.shape
    Hkv = packed.token_base.size(1)
    N = int(packed.n.max()) if packed.n.numel() else 0
    k = packed.keys.view(B, Hkv, -1, D)[:, :, :N]
    number = torch.arange(N, device=q.device)
    n = packed.n if packed.n.size(1) == Hkv else packed.n.expand(-1, Hkv)
    seen = number < n[..., None, None]  # (B, Hkv, 1, N)
    queries = (q * D**-0.5).reshape(B, Hkv, H // Hkv * T, D)
    logits = soft_cap(at_least_float32(queries @ k.mT), cap).masked_fill(~seen, float("-inf"))
    if packed.keys_alone:
        rows = 0
        lse = logits.logsumexp(-1).view(B, H, T)
    else:
        rows, lse = packed_attention(q, packed, None, cap=cap)
    finite = lse.clamp_min(torch.finfo(lse.dtype).min).view(B, Hkv, -1, 1)
    p = (logits - finite).exp()  # (B, Hkv, n*T, N)
    raw = from_keys.turn_back(k * seen.mT, first + number[None])  # (B, N, Hkv*D)
    told = p.flatten(1, 2).to(raw.dtype) @ raw  # (B, H*T, Hkv*D)
    weight = from_keys.weight.to(raw.dtype).unflatten(-1, (Hkv, D)).transpose(0, 1)
    told = told.view(B, Hkv, -1, Hkv * D) @ weight
    return rows + told.view(q.shape).to(q.dtype), lse
