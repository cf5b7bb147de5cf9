"""What a selector sees in uncached passes: the attention that is paid to a prompt, and once, on
calibration text, how values are spread, what the loss feels and what dropped tokens cost."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn as nn
from torch import Tensor

from model import Transformer, evaluating
from routing.bases import read_metric
from routing.calibration import record_layers
from selection.relevance import NEVER, NOBODY_ASKS, Prompt, future
from storage.layout import at_least_float32, soft_cap
from training.loss import lm_loss

# Of windows on which the cost of dropped tokens is measured:
WINDOWS = 8
LONGEST = 2048  # tokens of one, at most
READERS = 128  # its last tokens, at most, whose attention is measured
KEPT = 0.2  # share of the tokens before them that is kept


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
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
        energy = energy + trace
        in_metric = cov * metrics
        written = written + in_metric.sum((-1, -2))
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
            felt = [t.grad.float() for t in written]
            squares = [g.square().sum(-1).mean() for g in felt]
            total = total + torch.stack(squares)
    finally:
        for h in hooks:
            h.remove()
        for p, w in wanted.items():
            p.requires_grad_(w)
    return (total / total.mean()).sqrt()


def compressed_layers(selector: nn.Module, model: Transformer) -> list[nn.Module]:
    """Return the attentions of the layers that a selector chooses for."""
    numbers = selector.kv.layers_of(model.cfg)
    return [model.layers[i].self_attn for i in numbers]


def see_layers(
    selector: nn.Module, model: Transformer, idx: Tensor, pad: Tensor | None = None
) -> tuple:
    """Return (x, q, k, z), each a tuple over compressed layers, of an uncached pass over idx
    (B, T) that reads whole values."""
    layers = compressed_layers(selector, model)
    seen = []

    def see(i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        maps = layers[i].kv_path.own_maps()
        z = maps.encode(v)
        seen.append((x, q, k, z))

    with evaluating(model), record_layers(layers, see):
        model(idx, pad=pad, last_only=True)
    return tuple(zip(*seen, strict=True))


def prompt_of(
    selector: nn.Module,
    seen: tuple,
    n_context: int,
    n_prompt: int,
    observers: int,
    pad: Tensor | None = None,
) -> Prompt:
    """Return the first n_prompt columns of what see_layers gives as a prompt, n_context of them its
    context."""
    x, q, k, z = seen
    return Prompt(
        [t[:, :n_prompt] for t in x],
        [t[:, :, :n_prompt] for t in q],
        [t[:, :, :n_prompt] for t in k],
        [t[:, :, :n_context] for t in z],
        n_context,
        pad=pad,
        rope=selector.rope,
        n_groups=selector.S,
        observers=observers,
        cap=selector.cap,
    )


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
    seen = see_layers(selector, model, idx, pad)
    observers = selector.cfg.observers
    all_of_it = prompt_of(selector, seen, n_context, idx.size(1), observers, pad)
    asking = n_prompt if n_prompt < all_of_it.T else n_context
    alpha = all_of_it.causal(all_of_it.column[asking:])
    return prompt_of(selector, seen, n_context, n_prompt, observers, pad), alpha


def output_errors(
    q: Tensor, k: Tensor, z: Tensor, keep: Tensor, metric: Tensor, cap: float = 0.0
) -> Tensor:
    """Return what a layer writes otherwise where dropped tokens are not read: of each KV head the
    mean squared norm over sequences and queries, (Hkv,).

    q       (B, H, R, D), queries of the last R of T tokens
    k, z    (B, Hkv, T, D)
    keep    (B, Hkv, T) bool; each sequence's last token at least
    metric  (Hkv, D, D), z^T M z is the squared norm that o_proj writes for z
    cap     of attention logits"""
    B, H, R, D = q.shape
    Hkv = k.size(1)
    T = k.size(2)
    scaled = q * D**-0.5
    asking = scaled.unflatten(1, (Hkv, -1)).flatten(2, 3)  # (B, Hkv, n R, D)
    logits = soft_cap(at_least_float32(asking @ k.mT), cap)
    place = torch.arange(T, device=q.device)
    causal = place <= place[T - R :, None]
    visible = causal.repeat(H // Hkv, 1)
    logits.masked_fill_(~visible, NEVER)
    whole = logits.softmax(-1)
    dropped = ~keep.unsqueeze(2)
    left = logits.masked_fill(dropped, NEVER).softmax(-1)
    missed = (left - whole) @ at_least_float32(z)  # (B, Hkv, n R, D)
    metric = metric.to(missed)
    squares = torch.einsum("bhqd,hde,bhqe->h", missed, metric, missed)
    return squares / (B * missed.size(2))


def drop_ratios(
    selector: nn.Module, model: Transformer, idx: Tensor, metrics: Tensor
) -> Tensor | None:
    """Return the logarithm of what dropped tokens of a window idx (1, T) cost over what their
    scores say, (L, Hkv); None where it is too short.

    KEPT of the context is kept, by the untrained signal `future`; the window's last tokens read
    it."""
    T = idx.size(1)
    n_readers = min(READERS, T // 4)
    n_prompt = T - n_readers
    n_context = n_prompt - selector.kv.kv_tail
    n_first = selector.kv.first_whole
    if n_readers < 1 or n_context - n_first < 1:
        return None
    seen = see_layers(selector, model, idx)
    observers = selector.cfg.observers or selector.kv.kv_tail or 1
    prompt = prompt_of(selector, seen, n_context, n_prompt, observers)
    energy = token_energy(selector, prompt)
    energy[..., :n_first] = 0
    n_kept = max(1, int(KEPT * energy.numel()))
    least = energy.flatten().topk(n_kept).values[-1]
    keep = energy >= least
    keep[..., :n_first] = True
    said = (energy * ~keep).sum((1, 3))
    rest = keep.new_ones(*keep.shape[:-1], T - n_context)
    there = torch.cat((keep, rest), -1)
    errors = []
    for _, q, k, z, kept, metric in zip(*seen, there, metrics, strict=True):
        readers = q[:, :, n_prompt:]
        errors.append(output_errors(readers, k, z, kept, metric, selector.cap))
    felt = selector.layer_sensitivity.square()
    cost = torch.stack(errors) * felt[:, None]
    return log_above_zero(cost) - log_above_zero(said)


def token_energy(selector: nn.Module, prompt: Prompt) -> Tensor:
    """Return the squared scores of a prompt's context tokens by the untrained signal `future`,
    (L, 1, Hkv, C)."""
    cfg = selector.cfg
    norm = selector.layer_weights(prompt, cfg.hedge) * prompt.norms
    relevance = future(prompt, cfg) ** (2 * cfg.hedge)
    return relevance * norm.square().sum(-1)


def log_above_zero(t: Tensor) -> Tensor:
    """Return the logarithm of t >= 0 plus a thousandth of its mean: heads of which nothing is
    dropped then have the ratio of all together."""
    few = t.mean().clamp_min(1e-30) * 1e-3
    return (t + few).log()


def drop_weight(
    selector: nn.Module, model: Transformer, batches: Iterable[Tensor], metrics: Tensor
) -> Tensor:
    """Return the factor by which scores of a layer's KV head are multiplied under a budget of bytes
    so that they tell what is lost where its tokens are dropped, (L, Hkv): the fourth root of cost
    over scores, which are squared; that is half of the way. Its geometric mean is 1."""
    windows = (row[:, :LONGEST] for idx in batches for row in idx.split(1))
    ratios = []
    for window in islice(windows, WINDOWS):
        ratio = drop_ratios(selector, model, window, metrics)
        if ratio is not None:
            ratios.append(ratio)
    if not ratios:
        return torch.ones_like(selector.drop_weight)
    ratio = torch.stack(ratios).mean(0)
    fourth_root = (ratio - ratio.mean()) / 4
    return fourth_root.exp()


@torch.no_grad()
def calibrate(selector: nn.Module, model: Transformer, batches: list[Tensor]) -> None:
    """Measure a selector's output_gain, rms, layer_sensitivity, drop_weight on batches of windows
    (B, T).

    The tensors are replaced, not written into: caches keep the ones they were packed with."""
    layers = compressed_layers(selector, model)
    metrics = torch.stack([read_metric(attn) for attn in layers])
    # a pass holds what every layer saw: two windows at a time
    few = (part for idx in batches for part in idx.split(2))

    def values_of(part: Tensor) -> list[Tensor]:
        _, _, keys, values = see_layers(selector, model, part)
        seen = zip(layers, keys, values, strict=True)
        return [attn.kv_path.untold(k, z) for attn, k, z in seen]

    values = (values_of(part) for part in few)
    gain, rms = value_statistics(values, metrics, selector.kv.first_whole)
    selector.output_gain = gain.to(selector.output_gain)
    selector.rms = rms.to(selector.rms)
    short = [idx[:2, :512] for idx in batches[:2]]
    sensitivity = layer_sensitivity(model, layers, short)
    selector.layer_sensitivity = sensitivity.to(selector.layer_sensitivity)
    selector.drop_weight = torch.ones_like(selector.drop_weight)
    if selector.kv.mask_scope != "shared":  # a shared mask has no budget of bytes
        weight = drop_weight(selector, model, batches, metrics)
        selector.drop_weight = weight.to(selector.drop_weight)
