"""What stands for a value group that was dropped (arXiv 2604.21335, 3.1.2, equation 7): zeros, maps
linear in the kept groups, or an MLP.

A map that is linear runs once per decode step instead of once per cached token: with masks m and
matrices R_m, sum_j p_j R_m(j) v_j = sum_m R_m (sum over the tokens j of mask m of p_j v_j), so
attention accumulates one vector per mask pattern (`linear`) or per dropped group (`pairwise`), and
the matrices come after. The MLP is the paper's; no published system has the linear ones.

Letters: B batch, T tokens, L tokens read, Hkv KV heads, n query heads of one, D head dimension, S
groups, K kept, d = D/S, P sums."""

from __future__ import annotations

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from storage.layout import mask_to_bits
from storage.views import Sums


class Zero(nn.Module):
    """Dropped groups are zero. Also the interface: `rebuild` gives whole values, `read` the
    attention output over packed ones. One that is linear in the kept groups works on sums that
    attention accumulates: which ones, `sums`, and what it adds for them, `added`."""

    def sums(self) -> Sums | None:
        """The attention sums it needs beside that over all tokens, which comes first; None: no
        others."""
        return None

    def added(self, acc: Tensor) -> Tensor:
        """What it adds to the sum over all tokens, given the others, acc (B, Hkv, ., P - 1, D): (B,
        Hkv, ., D)."""
        return torch.zeros_like(acc[..., 0, :])

    def rebuild(self, kept: Tensor, mask: Tensor) -> Tensor:
        """What stands for dropped groups. kept (B, Hkv, T, D) with zeros where dropped, mask (B, 1
        or Hkv, T, S) bool -> (B, Hkv, T, D)."""
        return torch.zeros_like(kept)

    def forward(self, kept: Tensor, mask: Tensor) -> Tensor:
        return self.rebuild(kept, mask)

    def read(self, p: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        """Attention output of weights p (B, Hkv, n*T, L) over packed values kept (B, Hkv, L, D):
        (B, Hkv, n*T, D)."""
        return p @ kept


class LinearPerPattern(Zero):
    """One (D - K d, K d) matrix per KV head and mask pattern; after attention, so one product per
    pattern and decode step."""

    def __init__(self, n_kv_head: int, head_dim: int, n_groups: int, k: int):
        super().__init__()
        self.n_groups = n_groups
        self.k = k
        d = head_dim // n_groups
        combos = list(itertools.combinations(range(n_groups), k))
        dims = torch.arange(head_dim).view(n_groups, d)
        kept = torch.stack([dims[list(c)].flatten() for c in combos])  # (P, K d)
        # (P, D - K d)
        lost = torch.stack(
            [dims[[g for g in range(n_groups) if g not in c]].flatten() for c in combos]
        )
        index = torch.full((1 << n_groups,), -1)
        for i, c in enumerate(combos):
            index[sum(1 << g for g in c)] = i
        bits = torch.tensor([0] + [sum(1 << g for g in c) for c in combos])
        for name, t in (
            ("kept_dims", kept),
            ("lost_dims", lost),
            ("pattern_index", index),
            ("pattern_bits", bits),
        ):
            self.register_buffer(name, t, persistent=False)
        self.weight = nn.Parameter(torch.zeros(n_kv_head, len(combos), head_dim - k * d, k * d))

    @torch.no_grad()
    def fit(self, cov: Tensor) -> None:
        """Least squares from the second moment cov (Hkv, D, D): R = C_lost,kept C_kept,kept^-1 per
        pattern."""
        for p in range(self.weight.size(1)):
            a = self.lost_dims[p]
            b = self.kept_dims[p]
            self.weight[:, p] = _solve(cov[:, a][:, :, b], cov[:, b][:, :, b]).to(self.weight)

    def _patterns(self, mask: Tensor) -> Tensor:
        index = self.pattern_index[mask_to_bits(mask).int() & 0xFFFF]  # (B, 1 or Hkv, T)
        return index

    def rebuild(self, kept: Tensor, mask: Tensor) -> Tensor:
        index = self._patterns(mask)
        out = torch.zeros_like(kept)
        for p in range(self.weight.size(1)):
            rebuilt = kept[..., self.kept_dims[p]] @ self.weight[:, p].mT  # (B, Hkv, T, D - K d)
            out[..., self.lost_dims[p]] += rebuilt * (index == p).unsqueeze(-1)
        return out

    def sums(self) -> Sums:
        """One per mask pattern."""
        bits = self.pattern_bits
        return Sums(
            torch.cat(
                (bits.new_zeros(1), bits.new_full((len(bits) - 1,), (1 << self.n_groups) - 1))
            ),
            bits,
        )

    def added(self, acc: Tensor) -> Tensor:
        out = torch.zeros_like(acc[..., 0, :])
        for i in range(self.weight.size(1)):
            out[..., self.lost_dims[i]] += acc[..., i, self.kept_dims[i]] @ self.weight[:, i].mT.to(
                acc.dtype
            )
        return out

    def read(self, p: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        index = self._patterns(mask)
        return p @ kept + self.added(
            torch.stack(
                [(p * (index == i).unsqueeze(-2)) @ kept for i in range(self.weight.size(1))], -2
            )
        )


class Pairwise(Zero):
    """Dropped group h gets sum over kept g of R_hg v_g: S(S-1) matrices (d, d) per KV head, any
    mask, S accumulated vectors."""

    def __init__(self, n_kv_head: int, head_dim: int, n_groups: int, k: int):
        super().__init__()
        self.n_groups = n_groups
        self.k = k
        d = head_dim // n_groups
        self.weight = nn.Parameter(torch.zeros(n_kv_head, n_groups * (n_groups - 1), d, d))
        self.register_buffer(
            "off_diagonal",
            (~torch.eye(n_groups, dtype=torch.bool)).flatten().nonzero().squeeze(-1),
            persistent=False,
        )

    def matrix(self) -> Tensor:
        """All R_hg in place, zeros for h = g: (Hkv, D, D), rows the group rebuilt, columns the
        group it is rebuilt from."""
        Hkv, _, d, _ = self.weight.shape
        full = self.weight.new_zeros(Hkv, self.n_groups**2, d, d)
        full[:, self.off_diagonal] = self.weight
        return (
            full.unflatten(1, (self.n_groups, -1))
            .transpose(2, 3)
            .reshape(Hkv, self.n_groups * d, self.n_groups * d)
        )

    @torch.no_grad()
    def fit(self, cov: Tensor) -> None:
        """Least squares from cov (Hkv, D, D) when the K kept groups are a uniformly random subset
        of the others."""
        S = self.n_groups
        d = self.weight.size(-1)
        # two given groups are both kept
        both = self.k / (S - 1) * ((self.k - 1) / (S - 2) if S > 2 else 0.0)
        one = self.k / (S - 1)
        rows = []
        for h in range(S):
            others = [i for i in range(S * d) if i // d != h]
            c = cov[:, others][:, :, others]
            same = torch.block_diag(
                *[torch.ones(d, d, dtype=cov.dtype, device=cov.device)] * (S - 1)
            )
            normal = c * (both + (one - both) * same)
            r = _solve(one * cov[:, h * d : (h + 1) * d][:, :, others], normal)  # (Hkv, d, (S-1) d)
            rows.append(r.unflatten(-1, (S - 1, d)).transpose(1, 2))  # (Hkv, S-1, d, d)
        self.weight.copy_(torch.cat(rows, 1))

    def rebuild(self, kept: Tensor, mask: Tensor) -> Tensor:
        return kept @ self.matrix().mT

    def sums(self) -> Sums:
        """One per group, over the tokens that dropped it."""
        dropped = torch.cat(
            (
                self.off_diagonal.new_zeros(1),
                1 << torch.arange(self.n_groups, device=self.weight.device),
            )
        )
        return Sums(dropped, torch.zeros_like(dropped))

    def added(self, acc: Tensor) -> Tensor:
        R = self.matrix().to(acc.dtype).unflatten(1, (self.n_groups, -1))  # (Hkv, S, d, D)
        return torch.einsum("bhtsd,hsed->bhtse", acc, R).flatten(-2)

    def read(self, p: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        return p @ kept + self.added(
            torch.stack(
                [(p * (~mask[..., h]).unsqueeze(-2)) @ kept for h in range(self.n_groups)], -2
            )
        )


class MLP(Zero):
    """The paper's: two-layer GELU MLP from a layer's kept groups (zeros elsewhere) and mask bits to
    its whole value, per cached token."""

    def __init__(self, n_kv_head: int, head_dim: int, n_groups: int, mask_heads: int, hidden: int):
        super().__init__()
        width = n_kv_head * head_dim
        self.up = nn.Linear(width + mask_heads * n_groups, hidden or width)
        self.down = nn.Linear(hidden or width, width)
        nn.init.zeros_(self.down.weight)  # starts as zero fill
        nn.init.zeros_(self.down.bias)

    def rebuild(self, kept: Tensor, mask: Tensor) -> Tensor:
        B, Hkv, T, D = kept.shape
        flat = torch.cat(
            (kept.transpose(1, 2).flatten(2), mask.transpose(1, 2).flatten(2).to(kept.dtype)), -1
        )
        return self.down(F.gelu(self.up(flat))).view(B, T, Hkv, D).transpose(1, 2)

    def read(self, p: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        return p @ fill(kept, self.rebuild(kept, mask), mask)


def _solve(b: Tensor, a: Tensor) -> Tensor:
    """x with x @ a = b for symmetric a (Hkv, m, m), ridge 1e-6 of the mean diagonal, float64."""
    a = a.double()
    b = b.double()
    ridge = (
        1e-6
        * a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        * torch.eye(a.size(-1), dtype=a.dtype, device=a.device)
    )
    return torch.linalg.solve(a + ridge, b.mT).mT


def spread(mask: Tensor, head_dim: int) -> Tensor:
    """Mask per group (..., S) -> per dimension (..., D)."""
    return mask.repeat_interleave(head_dim // mask.size(-1), dim=-1)


def fill(kept: Tensor, rebuilt: Tensor, mask: Tensor) -> Tensor:
    """Kept groups as they are, rebuilt ones elsewhere."""
    return torch.where(spread(mask, kept.size(-1)), kept, rebuilt)
