"""What a selector sees in uncached passes: the attention that is paid to a prompt, and once, on
calibration text, how values are spread and what the loss feels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from model import Transformer, evaluating, lm_loss, record_layers
from routing.bases import read_metric
from selection.relevance import NOBODY_ASKS, Prompt
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
        moments = [torch.einsum("bhtd,bhte->hde", t, t) for t in wide]
        cov = torch.stack(moments).double()
        energy = energy + cov.diagonal(dim1=-2, dim2=-1).sum(-1)
        written = written + (cov * metrics).sum((-1, -2))
        later = [t[:, :, n_sinks:] for t in wide]  # first tokens are stored whole
        of_layers = [t.square().sum((0, 2)) for t in later]
        squares = squares + torch.stack(of_layers)
        B, _, T, _ = later[0].shape
        n += B * T
    gain = (written / energy.clamp_min(1e-30)).sqrt()
    rms = (squares / max(1, n)).sqrt()
    return gain, rms.clamp_min(1e-6)


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
                logits = model(idx[:, :-1])
                lm_loss(logits, idx[:, 1:]).backward()
            squares = [t.grad.float().square().sum(-1).mean() for t in written]
            total = total + torch.stack(squares)
    finally:
        for h in hooks:
            h.remove()
        for p, w in wanted.items():
            p.requires_grad_(w)
    return (total / total.mean()).sqrt()


def see_layers(
    selector: nn.Module, model: Transformer, idx: Tensor, pad: Tensor | None = None
) -> tuple:
    """Return (x, q, k, z), each a tuple over compressed layers, of an uncached pass over idx
    (B, T) that reads whole values."""
    layers = [model.layers[i].self_attn for i in selector.kv.layers_of(model.cfg)]
    seen = []

    def see(i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        seen.append((x, q, k, layers[i].kv_path.own_maps().encode(v)))

    with evaluating(model), record_layers(layers, see):
        model(idx, pad=pad, last_only=True)
    return tuple(zip(*seen, strict=True))


def look(
    selector: nn.Module,
    model: Transformer,
    idx: Tensor,
    n_context: int,
    n_prompt: int,
    pad: Tensor | None = None,
) -> tuple[Prompt, Tensor]:
    """Return the prompt idx[:, :n_prompt], and the attention on its context of the tokens after
    it (of its query region where there are none), (L, B, Hkv, C)."""
    if n_context >= n_prompt:
        raise ValueError(NOBODY_ASKS)
    x, q, k, z = see_layers(selector, model, idx, pad)
    context = tuple(t[:, :, :n_context] for t in z)
    about = dict(pad=pad, rope=selector.rope, n_groups=selector.S)
    about |= dict(observers=selector.cfg.observers, cap=selector.cap)
    all_of_it = Prompt(x, q, k, context, n_context, **about)
    asking = n_prompt if n_prompt < all_of_it.T else n_context
    alpha = all_of_it.causal(all_of_it.column[asking:])
    x = tuple(t[:, :n_prompt] for t in x)
    q = tuple(t[:, :, :n_prompt] for t in q)
    k = tuple(t[:, :, :n_prompt] for t in k)
    return Prompt(x, q, k, context, n_context, **about), alpha


@torch.no_grad()
def calibrate(selector: nn.Module, model: Transformer, batches: list[Tensor]) -> None:
    """Measure a selector's output_gain, rms and layer_sensitivity on batches of windows (B, T).

    The tensors are replaced, not written into: caches keep the ones they were packed with."""
    layers = [model.layers[i].self_attn for i in selector.kv.layers_of(model.cfg)]
    metrics = torch.stack([read_metric(attn) for attn in layers])
    # a pass holds what every layer saw: two windows at a time
    few = (part for idx in batches for part in idx.split(2))

    def values_of(part: Tensor) -> list[Tensor]:
        _, _, keys, values = see_layers(selector, model, part)
        seen = zip(layers, keys, values, strict=True)
        return [attn.kv_path.untold(k, z) for attn, k, z in seen]

    values = (values_of(part) for part in few)
    gain, rms = value_statistics(values, metrics, selector.kv.kv_sinks)
    selector.output_gain = gain.to(selector.output_gain)
    selector.rms = rms.to(selector.rms)
    short = [idx[:2, :512] for idx in batches[:2]]
    sensitivity = layer_sensitivity(model, layers, short)
    selector.layer_sensitivity = sensitivity.to(selector.layer_sensitivity)
