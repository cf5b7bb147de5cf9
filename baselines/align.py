"""Before heads are averaged: make them alike, and start the routers from what averaging a token
would cost. Neither changes the model.

**Aligning.** A head's values may be turned by any orthogonal matrix (v_proj gets its transpose,
o_proj itself), its keys and queries by one angle for each pair of dimensions that RoPE turns
(rotations of a plane commute), and heads may change places: the same logits. Of these,
`align_heads` takes an order in which heads that end up averaged are alike, and the turns that bring
them together (generalised Procrustes, from second moments).

**Calibrating.** To first order, averaging a token's keys and values as the last expert with a share
does changes the loss by the sum of gradient times change. A ridge regression of the logarithm of
its square on the layer's input gives every router its start; thresholds at its quantiles make the
largest score take each expert's share. Reads of the newest tokens do not count, since those are
whole.

Letters: Hkv KV heads, D head dimension, P = D/2 planes, T tokens, E experts. Neither is in the
paper (arXiv 2506.13541)."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn as nn
from torch import Tensor

from config import check
from mixsga import GroupedHeads, attend_near, averaged, experts
from model import Attention, attend, lm_loss

SWEEPS = 10  # of Procrustes over the heads of a group
GAIN = 2.0  # scores per standard deviation of a token's predicted cost
RIDGE = 1e-3


def fit(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Align the heads that the model's experts average, then calibrate the learned routers, in
    place, where its MixConfig says so. batches: token ids and targets (B, T) on the model's device.
    Returns the model."""
    grouped = [
        (b.self_attn, b.self_attn.kv_path)
        for b in model.layers
        if isinstance(b.self_attn.kv_path, GroupedHeads)
    ]
    if any(p.mix.align_heads and max(p.sizes) > 1 for _, p in grouped):
        moments = _observe(model, grouped, [_Moments() for _ in grouped], batches, gradients=False)
        for (attn, path), seen in zip(grouped, moments, strict=True):
            align_heads(attn, seen.vv, seen.kk, path.sizes)
    if any(p.mix.calibrate_experts and p.router is not None for p in experts(model)):
        costs = _observe(model, grouped, [_Cost(p) for _, p in grouped], batches, gradients=True)
        for (_, path), seen in zip(grouped, costs, strict=True):
            calibrate(path, torch.cat(seen.x), torch.cat(seen.cost))
    return model


def _observe(
    model: nn.Module,
    grouped: list[tuple[Attention, GroupedHeads]],
    seen: list,
    batches: list,
    gradients: bool,
) -> list:
    """Run the batches with `seen` in place of the paths, whole keys and values read, and put the
    paths back. Nothing is trained."""
    was = model.training
    wants = [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(gradients)
    for (attn, _), s in zip(grouped, seen, strict=True):
        attn.kv_path = s
    with torch.set_grad_enabled(gradients):
        for x, y in batches:
            logits = model(x)
            if gradients:
                lm_loss(logits, y).backward()
            for s in seen:
                s.collect()
    for attn, path in grouped:
        attn.kv_path = path
    for p, w in zip(model.parameters(), wants, strict=True):
        p.grad = None
        p.requires_grad_(w)
    model.train(was)
    return seen


# ----------------------------------------------------------------------------- heads


class _Moments(nn.Module):
    """Adds up second moments between heads: vv (Hkv, Hkv, D, D) of values, kk (Hkv, Hkv, P) complex
    of keys, plane by plane."""

    def __init__(self):
        super().__init__()
        self.vv = 0.0
        self.kk = 0.0

    def forward(self, x, q, k, v, cache=None, pad=None):
        v64 = v.double().transpose(1, 2).flatten(0, 1)
        z = _planes(k.double()).transpose(1, 2).flatten(0, 1)
        self.vv = self.vv + torch.einsum("nhd,nge->hgde", v64, v64)
        self.kk = self.kk + torch.einsum("nhp,ngp->hgp", z.conj(), z)
        return attend(q, k, v, pad)

    def collect(self) -> None:
        """Nothing is left to do after a batch."""


def _planes(k: Tensor) -> Tensor:
    """The planes that RoPE turns, (i, i + D/2), as complex numbers: (..., D) -> (..., D/2)."""
    return torch.complex(*k.chunk(2, -1))


def alikeness(vv: Tensor, kk: Tensor) -> Tensor:
    """How alike two heads can be turned, 0 to 2: largest correlation of values plus that of keys,
    (Hkv, Hkv) float64."""
    values = torch.linalg.svdvals(vv).sum(-1)
    keys = kk.abs().sum(-1)
    return sum(
        t / (t.diagonal()[:, None] * t.diagonal()).sqrt().clamp_min(1e-30) for t in (values, keys)
    )


def ordered(alike: Tensor, sizes: tuple[int, ...]) -> list[int]:
    """Heads in an order whose groups of each size (those that divide the next) are alike: clusters
    grow by the best partner, greedily."""
    clusters = [[h] for h in range(alike.size(0))]
    now = 1
    for size in sorted(set(sizes)):
        if size % now:
            continue
        rest = clusters
        clusters = []
        while rest:
            new = rest.pop(0)
            for _ in range(size // now - 1):
                best = max(range(len(rest)), key=lambda i: float(alike[new][:, rest[i]].mean()))
                new = new + rest.pop(best)
            clusters.append(new)
        now = size
    return [h for c in clusters for h in c]


def turns(vv: Tensor, kk: Tensor, groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    """For every head an orthogonal matrix (Hkv, D, D) and unit complex numbers (Hkv, P) that bring
    the heads of each group together."""
    H = vv.size(0)
    D = vv.size(-1)
    turn = torch.eye(D, dtype=vv.dtype, device=vv.device).repeat(H, 1, 1)
    u = torch.ones(H, D // 2, dtype=kk.dtype, device=kk.device)
    for group in groups:
        for sweep in range(SWEEPS if len(group) > 1 else 0):
            for h in group if sweep else group[1:]:
                others = [g for g in group if g != h] if sweep else group[:1]
                U, _, Vt = torch.linalg.svd(sum(vv[h, g] @ turn[g] for g in others))
                turn[h] = U @ Vt
                toward = sum(kk[h, g] * u[g] for g in others)
                u[h] = torch.where(toward.abs() > 0, toward / toward.abs().clamp_min(1e-30), 1)
    return turn, u


@torch.no_grad()
def align_heads(attn: Attention, vv: Tensor, kk: Tensor, sizes: tuple[int, ...]) -> None:
    """Reorder and turn the heads of an attention, in place, so that those averaged by experts of
    `sizes` are alike; its output stays."""
    H = attn.n_kv_head
    n = attn.n_head // attn.n_kv_head
    D = attn.head_dim
    device = vv.device
    largest = max(sizes)
    threads = torch.get_num_threads()
    # many small decompositions, one after the other: threads only get in each other's way
    torch.set_num_threads(1)
    try:
        vv = vv.cpu()
        kk = kk.cpu()
        order = ordered(alikeness(vv, kk), sizes)
        turn, u = (
            t.to(device)
            for t in turns(vv, kk, [order[i : i + largest] for i in range(0, H, largest)])
        )
    finally:
        torch.set_num_threads(threads)

    def turned(w: Tensor) -> Tensor:  # (Hkv, n or 1, D, columns): its planes by u
        z = _planes(w.transpose(-1, -2)) * u[:, None, None]
        return torch.cat((z.real, z.imag), -1).transpose(-1, -2)

    for proj, per, change in (
        (attn.q_proj, n, turned),
        (attn.k_proj, 1, turned),
        (attn.v_proj, 1, lambda w: turn.mT.unsqueeze(1) @ w),
    ):
        for t in (proj.weight, proj.bias):
            if t is not None:
                t.copy_(change(t.double().view(H, per, D, -1))[order].reshape(t.shape))
    # (Hkv, n, n_embd, D)
    out = attn.o_proj.weight.double().view(-1, H, n, D).permute(1, 2, 0, 3) @ turn.unsqueeze(1)
    attn.o_proj.weight.copy_(out[order].permute(2, 0, 1, 3).flatten(1))


# ----------------------------------------------------------------------------- routers


class _Cost(nn.Module):
    """Collects, per token, the layer's input and the logarithm of the squared first-order cost of
    averaging it, less its sequence's mean."""

    def __init__(self, path: GroupedHeads):
        super().__init__()
        self.size = max(g for g, r in zip(path.sizes, path.ratios, strict=True) if r)
        self.tail = path.tail
        self.x: list[Tensor] = []
        self.cost: list[Tensor] = []

    def forward(self, x, q, k, v, cache=None, pad=None):
        self.input = x.detach()
        self.far = (k * 1, v * 1)  # the far reads are the ones whose gradient counts
        for t in self.far:
            t.retain_grad()
        return attend_near(q, *self.far, (k, v), self.tail, pad)

    def collect(self) -> None:
        """Take a batch's gradients. The last eighth of a sequence is left out: too few tokens read
        it."""
        T = self.input.size(1)
        n = T - T // 8 - self.tail
        check(
            n >= 8,
            f"kv_tail={self.tail} with sequences of {T} tokens",
            "routers are calibrated on tokens before the tail",
            "give a smaller --kv_tail",
        )
        change = [
            (averaged(t, self.size).repeat_interleave(self.size, 1) - t).detach() * t.grad
            for t in self.far
        ]
        cost = sum(c.double().sum((1, 3)) for c in change)[:, :n].square()
        cost = (cost / cost.mean().clamp_min(1e-300) + 1e-6).log()
        self.x.append(self.input[:, :n].flatten(0, 1))
        self.cost.append((cost - cost.mean(1, keepdim=True)).flatten())
        del self.input, self.far


@torch.no_grad()
def calibrate(path: GroupedHeads, x: Tensor, cost: Tensor) -> None:
    """Set a router so that scores rise with the cost that x (N, n_embd) predicts, and the largest
    falls on each expert for its share of N."""
    ones = torch.cat((x.double(), x.new_ones(len(x), 1, dtype=torch.float64)), 1)
    xx = ones.T @ ones
    w = torch.linalg.solve(
        xx + RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device),
        ones.T @ cost,
    )
    predicted = ones @ w
    mean = predicted.mean()
    std = predicted.std().clamp_min(1e-30)
    w = w / std
    predicted = ((predicted - mean) / std).sort(descending=True).values
    w[-1] -= mean / std
    at = Fraction(0)
    above = []  # where the next expert begins
    for r in path.ratios[:-1]:
        at += r
        above.append(predicted[min(int(at * len(predicted)), len(predicted) - 1)])
    E = len(path.sizes)
    # of two neighbours the first is larger where the prediction is above the border between them
    for e in range(E):
        path.router.weight[e] = GAIN * (E - 1 - e) * w[:-1]
        path.router.bias[e] = GAIN * (E - 1 - e) * w[-1]
        path.offset[e] = -GAIN * sum(above[e:])
