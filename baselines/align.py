"""Before heads are averaged: make them alike, and start the routers from what averaging a token
would cost. Neither changes the model, and neither is in the paper (arXiv 2506.13541).

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

    mixsga.attach(model, KVConfig(kv="mixsga"), MixConfig())
    fit(model, [(idx, targets)])        # before training

Letters: storage/layout.py; P = D/2 planes, E experts.
"""

from __future__ import annotations

from contextlib import contextmanager
from fractions import Fraction

import torch
import torch.nn as nn
from torch import Tensor

from config import check
from mixsga import GroupedHeads, attend_window
from model import Attention, DensePath, evaluating
from reconstruct import ridge_solve
from routing.calibration import record_layers
from storage.coordinates import change_coordinates
from storage.experts import averaged
from training.loss import lm_loss

SWEEPS = 10  # of Procrustes over the heads of a group
GAIN = 2.0  # scores per standard deviation of a token's predicted cost
RIDGE = 1e-3


def fit(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Align the heads that the model's experts average, then calibrate the learned routers, in
    place, where its MixConfig says so. Returns the model.

    batches: token ids and targets (B, T) on the model's device."""
    attns = [block.self_attn for block in model.layers]
    attns = [attn for attn in attns if isinstance(attn.kv_path, GroupedHeads)]
    paths = [attn.kv_path for attn in attns]
    if any(path.mix.align_heads and max(path.sizes) > 1 for path in paths):
        moments = observe_moments(model, attns, batches)
        for attn, path, seen in zip(attns, paths, moments, strict=True):
            align_heads(attn, seen.vv, seen.kk, path.sizes)
    if any(path.mix.calibrate_experts and path.router is not None for path in paths):
        costs = observe_costs(model, attns, batches)
        for path, seen in zip(paths, costs, strict=True):
            calibrate(path, torch.cat(seen.x), torch.cat(seen.cost))
    return model


@contextmanager
def in_place_of_paths(attns: list[Attention], paths: list[nn.Module]):
    """Let these layers read by other paths inside the `with`."""
    before = [attn.kv_path for attn in attns]
    for attn, path in zip(attns, paths, strict=True):
        attn.kv_path = path
    try:
        yield
    finally:
        for attn, path in zip(attns, before, strict=True):
            attn.kv_path = path


# -------------------- heads


class Moments:
    """Second moments between the heads of a layer: vv (Hkv, Hkv, D, D) of values, kk (Hkv, Hkv, P)
    complex of keys, plane by plane."""

    def __init__(self):
        self.vv = 0.0
        self.kk = 0.0

    def add(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take what a path gets: of it keys and values, (B, Hkv, T, D) each."""
        v = v.double().transpose(1, 2).flatten(0, 1)
        z = _planes(k.double()).transpose(1, 2).flatten(0, 1)
        self.vv = self.vv + torch.einsum("nhd,nge->hgde", v, v)
        self.kk = self.kk + torch.einsum("nhp,ngp->hgp", z.conj(), z)


def observe_moments(model: nn.Module, attns: list[Attention], batches: list) -> list[Moments]:
    """Return the moments of every layer when everything is kept whole."""
    moments = [Moments() for _ in attns]
    dense = [DensePath(a.n_kv_head, a.head_dim, a.kv_path.cap) for a in attns]
    recording = record_layers(attns, lambda i, *seen: moments[i].add(*seen))
    with evaluating(model), in_place_of_paths(attns, dense), recording:
        for idx, _ in batches:
            model(idx, last_only=True)
    return moments


def _planes(k: Tensor) -> Tensor:
    """View the planes that RoPE turns, (i, i + D/2), as complex numbers: (..., D) -> (..., D/2)."""
    return torch.complex(*k.chunk(2, -1))


def alikeness(vv: Tensor, kk: Tensor) -> Tensor:
    """Say how alike two heads can be turned, 0 to 2: largest correlation of values plus that of
    keys, (Hkv, Hkv) float64."""
    alike = 0.0
    for t in (torch.linalg.svdvals(vv).sum(-1), kk.abs().sum(-1)):
        own = t.diagonal()
        alike = alike + t / (own[:, None] * own).sqrt().clamp_min(1e-30)
    return alike


def ordered(alike: Tensor, sizes: tuple[int, ...]) -> list[int]:
    """Return the heads in an order whose groups of each size (those that divide the next) are
    alike: clusters grow by the best partner, greedily."""
    clusters = [[h] for h in range(alike.size(0))]
    size_now = 1
    for size in sorted(set(sizes)):
        if size % size_now:
            continue
        rest = clusters
        clusters = []
        while rest:
            new = rest.pop(0)
            for _ in range(size // size_now - 1):
                best = max(range(len(rest)), key=lambda i: float(alike[new][:, rest[i]].mean()))
                new = new + rest.pop(best)
            clusters.append(new)
        size_now = size
    return [h for cluster in clusters for h in cluster]


def turns(vv: Tensor, kk: Tensor, groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return, for every head, an orthogonal matrix (Hkv, D, D) and unit complex numbers (Hkv, P)
    that bring the heads of each group together."""
    H = vv.size(0)
    D = vv.size(-1)
    turn = torch.eye(D, dtype=vv.dtype).repeat(H, 1, 1)
    angle = torch.ones(H, D // 2, dtype=kk.dtype)

    def toward(h: int, others: list[int]) -> None:
        """Turn head h to where the others are."""
        left, _, right = torch.linalg.svd(sum(vv[h, g] @ turn[g] for g in others))
        turn[h] = left @ right
        unit = sum(kk[h, g] * angle[g] for g in others).sgn()
        angle[h] = torch.where(unit == 0, 1, unit)

    for group in groups:
        if len(group) == 1:
            continue
        for h in group[1:]:  # first all to the first, then each to all others
            toward(h, group[:1])
        for _ in range(SWEEPS - 1):
            for h in group:
                toward(h, [g for g in group if g != h])
    return turn, angle


@torch.no_grad()
def align_heads(attn: Attention, vv: Tensor, kk: Tensor, sizes: tuple[int, ...]) -> None:
    """Reorder and turn the heads of an attention, in place, so that those averaged by experts of
    `sizes` are alike; its output stays."""
    H = attn.n_kv_head
    n = attn.n_head // H
    D = attn.head_dim
    largest = max(sizes)
    threads = torch.get_num_threads()
    # many small decompositions, one after the other: threads only get in each other's way
    torch.set_num_threads(1)
    try:
        order = ordered(alikeness(vv.cpu(), kk.cpu()), sizes)
        groups = [order[i : i + largest] for i in range(0, H, largest)]
        turn, angle = turns(vv.cpu(), kk.cpu(), groups)
    finally:
        torch.set_num_threads(threads)
    turn = turn.to(vv.device)
    angle = angle.to(vv.device)

    if not isinstance(attn.k_norm, nn.Identity):
        angle = torch.ones_like(angle)  # a norm of every dimension's own scale does not turn

    def turn_planes(w: Tensor) -> Tensor:  # (Hkv, n or 1, D, columns)
        z = _planes(w.transpose(-1, -2)) * angle[:, None, None]
        return torch.cat((z.real, z.imag), -1).transpose(-1, -2)

    def turn_values(w: Tensor) -> Tensor:  # (Hkv, 1, D, columns)
        return turn.mT.unsqueeze(1) @ w

    for proj, change in (
        (attn.q_proj, turn_planes),
        (attn.k_proj, turn_planes),
        (attn.v_proj, turn_values),
    ):
        for t in (proj.weight, proj.bias):
            if t is not None:
                heads = t.double().view(H, len(t) // (H * D), D, -1)
                t.copy_(change(heads)[order].reshape(t.shape))
    out = attn.o_proj.weight.double().view(-1, H, n, D).permute(1, 2, 0, 3)  # (Hkv, n, n_embd, D)
    out = out @ turn.unsqueeze(1)
    attn.o_proj.weight.copy_(out[order].permute(2, 0, 1, 3).flatten(1))
    change_coordinates(attn.kv_path, "align_heads")


# -------------------- routers


class FarReads(nn.Module):
    """A path that keeps everything whole, and tells reads of the newest tokens from all others.

    far: keys and values, (B, Hkv, T, D) each, whose gradients are those of all other reads

    Of every batch so far and every token in turn:
    x     (N, n_embd), the layer's input
    cost  (N,), the logarithm of the squared first-order cost of averaging the token, less the mean
          of its sequence"""

    def __init__(self, path: GroupedHeads):
        super().__init__()
        self.size = max(g for g, ratio in zip(path.sizes, path.ratios, strict=True) if ratio)
        self.window = path.window
        self.cap = path.cap
        self.x: list[Tensor] = []
        self.cost: list[Tensor] = []

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Read k, v (B, Hkv, T, D) whole, and keep their gradients by `far`: (B, H, T, D)."""
        self.input = x.detach()
        self.far = (k * 1, v * 1)  # tensors of their own
        for t in self.far:
            t.retain_grad()
        return attend_window(q, *self.far, (k, v), self.window, pad, self.cap)

    def collect(self) -> None:
        """Take a batch's gradients. The last eighth of a sequence is left out: too few tokens read
        it."""
        T = self.input.size(1)
        n = T - T // 8 - self.window
        check(
            n >= 8,
            f"kv_tail={self.window} with sequences of {T} tokens",
            "routers are calibrated on tokens before the tail",
            "give a smaller --kv_tail",
        )
        cost = 0.0  # (B, T)
        for t in self.far:
            change = averaged(t, self.size).repeat_interleave(self.size, 1) - t
            cost = cost + (change.detach() * t.grad).double().sum((1, 3))
        cost = cost[:, :n].square()
        cost = (cost / cost.mean().clamp_min(1e-300) + 1e-6).log()
        self.x.append(self.input[:, :n].flatten(0, 1))
        self.cost.append((cost - cost.mean(1, keepdim=True)).flatten())
        del self.input, self.far


def observe_costs(model: nn.Module, attns: list[Attention], batches: list) -> list[FarReads]:
    """Return what averaging the tokens of the batches would cost in every layer. Nothing is
    trained: modes, gradients and what is trainable are as before."""
    readers = [FarReads(attn.kv_path) for attn in attns]
    wants = [p.requires_grad for p in model.parameters()]
    parameters = list(model.parameters())
    try:
        model.requires_grad_(True)
        with evaluating(model), torch.enable_grad(), in_place_of_paths(attns, readers):
            for idx, targets in batches:
                lm_loss(model(idx), targets).backward()
                for reader in readers:
                    reader.collect()
    finally:
        for p, want in zip(parameters, wants, strict=True):
            p.grad = None
            p.requires_grad_(want)
    return readers


@torch.no_grad()
def calibrate(path: GroupedHeads, x: Tensor, cost: Tensor) -> None:
    """Set a router so that scores rise with the cost that x (N, n_embd) predicts, and the largest
    falls on each expert for its share of N. cost (N,) float64."""
    ones = torch.cat((x.double(), x.new_ones(len(x), 1, dtype=torch.float64)), 1)
    xx = ones.T @ ones
    w = ridge_solve(xx, ones.T @ cost, RIDGE)
    predicted = ones @ w
    mean = predicted.mean()
    std = predicted.std().clamp_min(1e-30)
    w = w / std
    w[-1] -= mean / std
    predicted = ((predicted - mean) / std).sort(descending=True).values
    N = len(predicted)
    share = Fraction(0)
    borders = []  # what is predicted where the next expert begins
    for ratio in path.ratios[:-1]:
        share += ratio
        borders.append(predicted[min(int(share * N), N - 1)])
    E = len(path.sizes)
    # of two neighbours the first is larger where the prediction is above the border between them
    for e in range(E):
        slope = GAIN * (E - 1 - e)
        path.router.weight[e] = slope * w[:-1]
        path.router.bias[e] = slope * w[-1]
        path.offset[e] = -GAIN * sum(borders[e:])
    change_coordinates(path, "calibrate")  # caches hold sums of the old router's scores
