"""Bases in which values are cut into groups: which coordinates lose least when some are dropped,
and how a basis is folded into the projections around it.

    fwd, bwd = value_basis("output", cov, attn.o_proj.weight)
    fold_basis(attn, fwd, bwd)                       # the same logits

Letters: storage/layout.py.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor


@torch.no_grad()
def value_basis(kind: str, cov: Tensor, w_o: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the maps fwd, bwd (Hkv, D, D) float64 of a basis: z = v @ fwd, v = z @ bwd.

    kind: native | random | pca | output
    cov  (Hkv, D, D), second moment of V per KV head, not centred: attention sinks lie far from the
         mean, and most of the weight is on them
    w_o  (n_embd, H*D), the output projection

    `pca` diagonalises cov. `output` diagonalises

        G^1/2 cov G^1/2,    G = sum of W_o^T W_o over the query heads that read the KV head,

    so that squared error in z is squared error in what W_o writes. Eigenvalues of G are floored at
    1e-6 of the largest; one scale per layer keeps z as large as v."""
    Hkv, D = cov.shape[:2]
    cov = cov.double()
    eye = torch.eye(D, dtype=torch.float64, device=cov.device)
    if kind == "native":
        return eye.repeat(Hkv, 1, 1), eye.repeat(Hkv, 1, 1)
    if kind == "random":
        gen = torch.Generator().manual_seed(seed)
        drawn = torch.randn(Hkv, D, D, generator=gen, dtype=torch.float64)
        q = torch.linalg.qr(drawn)[0].to(cov.device)
        return q, q.mT.contiguous()
    if kind == "pca":
        u = torch.linalg.eigh(cov)[1].flip(-1)  # columns: largest energy first
        return u, u.mT.contiguous()
    e, u = torch.linalg.eigh(output_metric(w_o, Hkv, D))
    e = e.clamp_min(1e-6 * e.amax(-1, keepdim=True)).sqrt().unsqueeze(-2)  # (Hkv, 1, D)
    root = (u * e) @ u.mT
    inverse = (u / e) @ u.mT
    u = torch.linalg.eigh(root @ cov @ root)[1].flip(-1)
    fwd = root @ u
    bwd = u.mT @ inverse
    scale = (D * Hkv / fwd.square().sum()).sqrt()
    return fwd * scale, bwd / scale


def output_metric(w_o: Tensor, n_kv_head: int, head_dim: int) -> Tensor:
    """Return G (Hkv, D, D) float64 with v^T G v the squared norm that w_o (n_embd, H*D) writes for
    a value v of a KV head, summed over the query heads that read it."""
    w = w_o.double().unflatten(1, (n_kv_head, -1, head_dim))
    return torch.einsum("ehnd,ehnf->hdf", w, w)


def read_metric(attn: nn.Module) -> Tensor:
    """Return M (Hkv, D, D) float64 with z^T M z the squared norm that o_proj writes for coordinates
    z, summed over the query heads of a KV head."""
    path = attn.kv_path
    metric = output_metric(attn.o_proj.weight, path.Hkv, path.D)
    if path.folded:
        return metric
    dec = path.basis()[1].to(metric.device)
    return dec @ metric @ dec.mT


@torch.no_grad()
def fold_basis(attn: nn.Module, fwd: Tensor, bwd: Tensor) -> None:
    """Fold z = v @ fwd into what writes it (v_proj's weight, bias, lora_B) and what reads it
    (o_proj's weight, lora_A, its own router) of an Attention, in place, in float64.

    fwd, bwd (Hkv, D, D), inverse of each other: the logits do not change."""
    Hkv, D = fwd.shape[:2]
    n = attn.n_head // Hkv

    def output_side(t: Tensor) -> Tensor:
        """Write the rows of t (Hkv*D, ...) in the new basis."""
        return (
            torch.einsum("hde,hd...->he...", fwd.double(), t.double().view(Hkv, D, *t.shape[1:]))
            .reshape(t.shape)
            .to(t.dtype)
        )

    def input_side(t: Tensor) -> Tensor:
        """Let the columns of t (..., H*D) read the new basis."""
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
        for name, p in module.named_parameters():
            if name in names:
                p.data = change(p.data)
