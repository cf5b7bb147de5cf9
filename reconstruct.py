"""What stands for a dropped group when it is read, and how that and routers are fitted.

* `zero`: nothing, and no code.
* `mlp`, the paper's equation 7: a network from the groups kept.
* `keys`: a linear map from the keys of all KV heads of the layer before RoPE, `own_keys`: from
  those of the value's own head. Groups of what it leaves, the residual, are routed and stored
  (storage/from_keys.py says how they are read).

    seen = Moments(path)
    seen.add(x, k, v, received)                      # what the path got
    weight, rest = seen.from_keys()                  # rest: second moment of what weight leaves

Letters: storage/layout.py.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from storage.layout import group_energy

RIDGE = 1e-4  # of maps from keys and of routers: see ridge_solve


class MLPReconstructor(nn.Module):
    """The paper's R (equation 7): a two-layer GELU MLP from a layer's kept groups, zeros elsewhere,
    and its mask bits to its whole value, run for every cached token at every read."""

    def __init__(self, n_kv_head: int, head_dim: int, n_groups: int, mask_heads: int, hidden: int):
        super().__init__()
        width = n_kv_head * head_dim
        hidden = hidden or width
        self.up = nn.Linear(width + mask_heads * n_groups, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)  # starts as zero fill
        nn.init.zeros_(self.down.bias)

    def forward(self, kept: Tensor, mask: Tensor, constant: bool = False) -> Tensor:
        """Rebuild values from kept (B, Hkv, T, D), zeros where dropped, and mask (B, Hm, T, S).

        constant: whether no gradient reaches the weights (that of `kept` passes)."""
        B, Hkv, T, D = kept.shape
        values = kept.transpose(1, 2).flatten(2)
        bits = mask.transpose(1, 2).flatten(2).to(kept.dtype)
        seen = torch.cat((values, bits), -1)  # (B, T, Hkv*D + Hm*S)
        weights = (self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        if constant:
            weights = [w.detach() for w in weights]
        up, up_bias, down, down_bias = weights
        hidden = F.gelu(F.linear(seen, up, up_bias))
        rebuilt = F.linear(hidden, down, down_bias)
        return rebuilt.view(B, T, Hkv, D).transpose(1, 2)


def straight_through(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the hard mask with the gradient of the softmax of logits: float like logits."""
    soft = logits.softmax(-1)
    return mask + (soft - soft.detach())


class Moments:
    """Second moments, in float64, that calibration adds up for one layer's ValueGroupPath.

    In those of a map from keys, tokens count for as much as they are read: what the map leaves of a
    token reaches the output times the attention that the token gets. Heads that a map tells
    together, all or each by itself, share one weight: that is one set of moments for each of G
    maps. Those of the router count all tokens alike."""

    def __init__(self, path: nn.Module):
        self.path = path
        self.G = path.Hkv if path.key_map is not None and path.key_map.ndim == 3 else 1
        self.cov = 0.0  # (Hkv, D, D) of v @ enc
        self.xx = 0.0  # (n_embd + 1, n_embd + 1) of the layer's input and a one
        self.xe = 0.0  # (n_embd + 1, Hm*S) of that and the group energies
        self.kk = 0.0  # (G, Hkv*D/G, Hkv*D/G) of keys before RoPE, heads beside one another
        self.kz = 0.0  # (G, Hkv*D/G, Hkv*D/G) of those and v @ enc

    def add(self, x: Tensor, k: Tensor, v: Tensor, received: Tensor | None = None) -> None:
        """Take what a path got: x (B, T, n_embd), k and v (B, Hkv, T, D); for a map from keys the
        attention that tokens get, (B, Hkv, T). Without it the map is there, and the router is to be
        fitted."""
        enc = self.path.enc.to(v.dtype)
        z = (v @ enc).double()
        if self.path.key_map is None:
            self.cov = self.cov + torch.einsum("bhtd,bhte->hde", z, z)
        else:
            first = self.path.cfg.first_whole  # those stay whole
            x = x[:, first:]
            k = k[:, :, first:]
            z = z[:, :, first:]
            number = torch.arange(k.size(2), device=k.device)
            position = first + number[None]
            from_keys = self.path.own_maps().from_keys
            if received is not None:
                before = from_keys.heads_before_rope(k, position)
                self._add_keys(before.double(), z, received[:, :, first:].double())
            z = z - from_keys.predict(k, position).double()
        self._add_router(x, z)

    def _add_keys(self, k: Tensor, z: Tensor, received: Tensor) -> None:
        """Take keys before RoPE (B, T, Hkv*D), coordinates (B, Hkv, T, D) and the attention that
        tokens get (B, Hkv, T)."""
        of_maps = received.unflatten(1, (self.G, -1)).mean(2)
        weight = of_maps.unsqueeze(-1)  # (B, G, T, 1)
        of_heads = weight.repeat_interleave(self.path.Hkv // self.G, 1)
        self.cov = self.cov + torch.einsum("bhtd,bhte->hde", of_heads * z, z)
        k = k.unflatten(-1, (self.G, -1)).transpose(1, 2)  # (B, G, T, Hkv*D/G)
        z = z.unflatten(1, (self.G, -1)).transpose(2, 3).flatten(3)  # the same
        weighted = weight * k
        self.kk = self.kk + torch.einsum("bgtp,bgtq->gpq", weighted, k)
        self.kz = self.kz + torch.einsum("bgtp,bgtq->gpq", weighted, z)

    def _add_router(self, x: Tensor, z: Tensor) -> None:
        """Take the layer's inputs (B, T, n_embd) and what is cut into groups (B, Hkv, T, D)."""
        one = torch.ones_like(x[..., :1])
        x = torch.cat((x, one), -1).double()
        x = x.flatten(0, 1)
        energy = group_energy(z, self.path.S, self.path.mask_heads)
        energy = energy.transpose(1, 2)
        energy = energy.reshape(len(x), -1)  # (B*T, Hm*S)
        self.xx = self.xx + x.T @ x
        self.xe = self.xe + x.T @ energy

    def from_keys(self) -> tuple[Tensor, Tensor]:
        """Return the map (Hkv*D, Hkv*D) from keys by weighted least squares with a little ridge,
        of own heads in blocks on its diagonal, and the second moment (Hkv, D, D) per head of what
        it leaves. The metric in which values are measured makes no difference to a map that has
        all coefficients."""
        path = self.path
        maps = [ridge_solve(kk, kz, RIDGE) for kk, kz in zip(self.kk, self.kz, strict=True)]
        changes = map(change_by, maps, self.kk, self.kz)
        change = torch.block_diag(*changes)
        return torch.block_diag(*maps), self.cov + own_heads(change, path.Hkv, path.D)


def change_by(weight: Tensor, xx: Tensor, xy: Tensor) -> Tensor:
    """Return what is added to the second moment of y where x @ weight is taken off it, from X^T X
    and X^T Y; all (p, p)."""
    cross = xy.T @ weight
    return weight.T @ xx @ weight - cross - cross.T


def as_held(path: nn.Module, weight: Tensor) -> Tensor:
    """Return of a map (Hkv*D, Hkv*D) what a path holds: all of it, or own heads (Hkv, D, D)."""
    if path.key_map.ndim == 2:
        return weight
    return own_heads(weight, path.Hkv, path.D)


def own_heads(x: Tensor, Hkv: int, D: int) -> Tensor:
    """Return the blocks (Hkv, D, D) on the diagonal of x (Hkv*D, Hkv*D)."""
    by_head = x.view(Hkv, D, Hkv, D)
    return torch.einsum("hdhe->hde", by_head)


def ridge_solve(xx: Tensor, xy: Tensor, strength: float) -> Tensor:
    """Return the weights of a ridge regression from its moments, X^T X (n, n) and X^T Y (n, ...).
    The ridge is `strength` times the mean of the diagonal."""
    eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    ridge = strength * xx.diagonal().mean() * eye
    return torch.linalg.solve(xx + ridge, xy)


def fit_router(router: nn.Linear, xx: Tensor, xe: Tensor) -> None:
    """Fit a router by ridge regression of group energies, in units of their mean, on the layer's
    input: it starts near the norm rule."""
    w = ridge_solve(xx, xe, RIDGE)  # (n_embd + 1, Hm*S)
    sums = xe[-1]  # the ones' row
    n = xx[-1, -1]
    mean_energy = (sums / n).mean()
    w = w / mean_energy.clamp_min(1e-30)
    router.weight.copy_(w[:-1].T)
    router.bias.copy_(w[-1])
