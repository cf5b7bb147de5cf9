"""What a selector measures once on calibration text: how values are spread, and what the loss
feels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from model import Transformer, evaluating, lm_loss
from storage.layout import at_least_float32


def value_statistics(
    values: Iterable[tuple[Tensor, ...]], metrics: Tensor, n_sinks: int
) -> tuple[Tensor, Tensor]:
    """Measure what values write.

    values: of each pass the z (B, Hkv, T, D) of every layer
    metrics  (L, Hkv, D, D), z^T M z is the squared norm that o_proj writes for z

    Returns two tensors, of tokens after the first n_sinks:
    output_gain  (L, Hkv), the norm that o_proj writes for a unit of z
    rms          (L, Hkv, D), root mean square of every coordinate"""
    energy = 0.0
    written = 0.0
    squares = 0.0
    n = 0
    for z in values:
        wide = [at_least_float32(t) for t in z]
        cov = torch.stack([torch.einsum("bhtd,bhte->hde", t, t) for t in wide]).double()
        energy = energy + cov.diagonal(dim1=-2, dim2=-1).sum(-1)
        written = written + (cov * metrics).sum((-1, -2))
        later = [t[:, :, n_sinks:] for t in wide]  # first tokens are stored whole
        squares = squares + torch.stack([t.square().sum((0, 2)) for t in later])
        n += len(later[0]) * later[0].size(2)
    gain = (written / energy.clamp_min(1e-30)).sqrt()
    return gain, (squares / max(1, n)).sqrt().clamp_min(1e-6)


def layer_sensitivity(model: Transformer, layers: list[nn.Module], batches: list[Tensor]) -> Tensor:
    """Return the root mean square gradient of the loss at what each layer's attention adds to the
    residual stream, over its mean: (L,)."""
    written: list[Tensor] = []

    def hook(module, args, out):
        out = out if out.requires_grad else out.detach().requires_grad_()
        out.retain_grad()
        written.append(out)
        return out

    total = 0.0
    hooks = [attn.o_proj.register_forward_hook(hook) for attn in layers]
    wanted = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)  # gradients of activations are enough
    try:
        for idx in batches:
            written.clear()
            with evaluating(model), torch.enable_grad():
                lm_loss(model(idx[:, :-1]), idx[:, 1:]).backward()
            total = total + torch.stack([t.grad.float().square().sum(-1).mean() for t in written])
    finally:
        for h in hooks:
            h.remove()
        for p, w in wanted.items():
            p.requires_grad_(w)
    return (total / total.mean()).sqrt()
