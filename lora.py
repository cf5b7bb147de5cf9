"""Low-rank adapters on a frozen model: LoRA, MoE-LoRA, and routed subspace LoRA (arXiv 2604.21335,
3.1.1, equations 1-3).

All three add to a frozen projection W a sum of low-rank branches n = 1..N, each of rank R, with
gates r_n per token:

    y = W x + sum_n r_n(x) * (alpha / R) * B_n A_n x             (1)

    A  (N*R, d_in)
    B  (d_out, N*R), zero at the start

LoRA has one branch and no gate. Routed subspace LoRA has S branches inside *one* projection and a
linear router of its own per projection. MoE-LoRA has E branches and one router per attention and
one per MLP, shared by their projections. A router keeps its top-K scores, softmax-normalised over
the kept ones; the rest are exactly zero. Load balance is the Switch form (share of tokens routed x
mean probability, times N), taken per sequence and averaged, so that it does not depend on how a
batch is split. The paper leaves open whether it is summed over projections: here it is their mean.

Adapted layers are nn.Linear with more parameters, so base names in a state dict do not change.
`attach` swaps them in by type.

    python train.py --stage=adapt --adapter=routed --init_from=out/...
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from config import check
from model import evaluating
from settings.adapters import AdapterConfig
from storage import cpu_gates
from storage import gates as gate_kernels
from storage.dropout import dropout
from storage.kernel_base import use_triton
from storage.layout import at_least_float32, top_k_mask
from storage.state import copy_tensors


def as_trained(x: Tensor, weight: Tensor) -> Tensor:
    """Return x in the dtype of a weight that is trained, which a bfloat16 base is narrower than;
    autocast chooses for itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


class Gate(nn.Module):
    """Linear token-wise router: x (B, T, d_in) -> gates (B, T, n), top-k softmax-normalised, the
    others exactly 0 (eqs 1-2)."""

    def __init__(self, d_in: int, n: int, k: int):
        super().__init__()
        self.linear = nn.Linear(d_in, n)
        self.n = n
        self.k = k
        self.balance: Tensor | None = None  # load-balance loss of the last training forward
        self.counts: Tensor | None = None  # (n,) tokens routed while routing_stats records

    def forward(self, x: Tensor) -> Tensor:
        return self.route(self.linear(x))

    def route(self, logits: Tensor) -> Tensor:
        """Gates (B, T, n) of the scores (B, T, n), in their dtype; records the load-balance loss
        while training."""
        # branches outermost, so that softmax and sums run along tokens; n alone is too short a row
        kept = top_k_mask(logits.detach(), self.k).movedim(-1, 0)  # (n, B, T)
        probs = at_least_float32(logits).movedim(-1, 0).contiguous().softmax(0)
        if self.training and torch.is_grad_enabled():
            self.balance_of(kept.sum(-1), probs.sum(-1), logits.size(1))
        if self.counts is not None:
            self.counts += kept.flatten(1).sum(1)
        gates = probs * kept  # softmax over the kept ones, after the division
        return (gates / gates.sum(0)).movedim(0, -1).to(logits.dtype)

    def balance_of(self, routed: Tensor, probs: Tensor, T: int) -> None:
        """Record the load-balance loss, of tokens routed and probabilities summed over the T
        tokens of every sequence, per branch (n, B) or (B, n)."""
        B = routed.numel() // self.n
        # share routed x mean probability, times n, the mean over sequences
        self.balance = (routed * probs).sum() * (self.n / (self.k * T * T * B))


class LoRALinear(nn.Linear):
    """nn.Linear with `n` low-rank branches of rank r; n = 1 and no gate is plain LoRA. attach
    freezes weight and bias."""

    off = False  # see switched_off

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool,
        r: int,
        alpha: float,
        dropout: float,
        n: int = 1,
        gate: nn.Module | None = None,
    ):
        super().__init__(d_in, d_out, bias)
        self.r = r
        self.n = n
        self.scaling = alpha / r
        self.p = dropout
        self.lora_A = nn.Parameter(torch.empty(n * r, d_in))
        self.lora_B = nn.Parameter(torch.zeros(d_out, n * r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if gate is not None:
            self.gate = gate

    def down(self, x: Tensor) -> Tensor:
        """The low-rank activations of x (B, T, d_in) after dropout, gated where there is a gate and
        scaled: (B, T, n*r)."""
        return F.linear(x, self.lora_A) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.off:
            return y
        u = self.down(dropout(as_trained(x, self.lora_A), self.p, self.training))
        return y + F.linear(u, self.lora_B).to(y.dtype)

    def weigh(self, u: Tensor, gates: Tensor) -> Tensor:
        """Branch activations u (B, T, n*r) times gates (B, T, n), scaled."""
        gates = (gates * self.scaling).unsqueeze(-1)
        return (u.unflatten(-1, (self.n, self.r)) * gates).flatten(-2)


class RoutedLoRALinear(LoRALinear):
    """Routed subspace LoRA: the projection's own router weighs its S subspaces per token (eq 3).
    Router and A read x in one product; on a GPU one kernel does what follows, on a CPU one step of
    autograd."""

    impl = "auto"  # of gates: see storage/kernel_base.py

    def down(self, x: Tensor) -> Tensor:
        gate = self.gate
        h = F.linear(x, torch.cat((self.lora_A, gate.linear.weight)))
        fused = self.fused_gates(h)
        if gate.counts is None and fused is not None:
            sizes = (self.r, gate.k, self.scaling)
            u, routed, probs = fused(h, gate.linear.bias, *sizes)
            if self.training and torch.is_grad_enabled():
                gate.balance_of(routed, probs, h.size(1))
            return u
        u, logits = h.split([self.n * self.r, self.n], dim=-1)
        return self.weigh(u, gate.route(logits + gate.linear.bias))

    def fused_gates(self, h: Tensor) -> Callable | None:
        """What chooses, weighs and counts at once for such activations, where there is anything."""
        if use_triton(self.impl, h.device, h.dtype):
            return gate_kernels.gate_and_weigh
        return cpu_gates.gate_and_weigh if cpu_gates.is_gated_here(h) else None


class MoELoRALinear(LoRALinear):
    """One projection of MoE-LoRA; the gates come from the router that it shares with the others of
    its attention or MLP, which has seen their input."""

    def __init__(self, *args, router: BlockRouter, **kwargs):
        super().__init__(*args, **kwargs)
        # in a tuple: the block owns the router, the projection only reads it
        self._router = (router,)

    def down(self, x: Tensor) -> Tensor:
        return self.weigh(F.linear(x, self.lora_A), self._router[0].current)


class BlockRouter(Gate):
    """A Gate run once on the input of the projections that share it, ahead of the first."""

    current: Tensor

    def before_block(self, block: nn.Module, args: tuple) -> None:
        self.current = self(as_trained(args[0], self.linear.weight))


# run before their siblings, on the block's input: the first of them that there is
_FIRST = {"self_attn": ("q_proj",), "mlp": ("gate_proj", "up_proj")}
_PARENT = {
    "q": "self_attn",
    "k": "self_attn",
    "v": "self_attn",
    "o": "self_attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}


def attach(model: nn.Module, cfg: AdapterConfig) -> nn.Module:
    """Freeze `model` and replace the targeted nn.Linear modules by adapted ones, in place. Returns
    the model.

    Weights are shared, not copied, so the adapted model equals the base bit for bit until B is
    trained. Raises ValueError when the model has adapters already."""
    check(
        not list(_adapted(model)),
        "a model with adapters",
        "one adapter at a time",
        "merge it or load the base again",
    )
    model.requires_grad_(False)
    if cfg.adapter == "none":
        return model
    for block in model.layers:
        routers: dict[str, BlockRouter] = {}
        for target in cfg.targets:
            parent_name = _PARENT[target]
            parent = getattr(block, parent_name)
            old = getattr(parent, f"{target}_proj")
            check(
                old is not None,
                f"lora_targets={cfg.lora_targets}",
                "the model's MLP has no gate",
                "leave gate out",
            )
            shape = (
                old.in_features,
                old.out_features,
                old.bias is not None,
                cfg.r,
                cfg.alpha,
                cfg.lora_dropout,
            )
            if cfg.adapter == "lora":
                new = LoRALinear(*shape)
            elif cfg.adapter == "routed":
                new = RoutedLoRALinear(
                    *shape,
                    n=cfg.subspaces,
                    gate=Gate(old.in_features, cfg.subspaces, cfg.subspace_topk),
                )
            else:
                if parent_name not in routers:
                    routers[parent_name] = BlockRouter(
                        model.cfg.n_embd, cfg.experts, cfg.expert_topk
                    )
                    parent.lora_router = routers[parent_name]
                new = MoELoRALinear(*shape, n=cfg.experts, router=routers[parent_name])
            # what is trained is never narrower: a bfloat16 weight would swallow small steps
            wide = at_least_float32(old.weight).dtype
            new.to(old.weight.device, wide)
            new.weight = old.weight
            new.bias = old.bias
            setattr(parent, f"{target}_proj", new)
        for parent_name, router in routers.items():
            router.to(old.weight.device, wide)
            first = (getattr(getattr(block, parent_name), name) for name in _FIRST[parent_name])
            next(m for m in first if m is not None).register_forward_pre_hook(router.before_block)
    return model


def _adapted(model: nn.Module):
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear | Gate))


@contextmanager
def switched_off(model: nn.Module):
    """Let the model compute as its base does, bit for bit, inside the `with`; after it, adapters
    are on or off as they were before."""
    before = {m: m.off for _, m in _adapted(model) if isinstance(m, LoRALinear)}
    for layer in before:
        layer.off = True
    try:
        yield
    finally:
        for layer, off in before.items():
            layer.off = off


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors (lora_A, lora_B, routers) under their names in the model."""
    out = {}
    for name, m in _adapted(model):
        for key, p in m.named_parameters():
            if key.split(".")[0] in ("lora_A", "lora_B", "gate", "linear"):
                out[f"{name}.{key}"] = p
    return out


def load_adapter_state(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy `saved` into the model's adapters. Raises ValueError that lists missing, unexpected,
    wrong-shaped or non-finite tensors."""
    copy_tensors(adapter_state(model), saved, "adapter")


def count_trainable(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def balance_loss(model: nn.Module) -> Tensor | float:
    """Mean load-balance loss over the routers of the last training forward; 1 is perfect balance,
    N/K the worst. 0.0 without routers."""
    terms = [m.balance for m in model.modules() if isinstance(m, Gate) and m.balance is not None]
    return torch.stack(terms).mean() if terms else 0.0


def routing_stats(model: nn.Module, batches) -> dict[str, dict]:
    """Run the token batches (B, T) and return per router: share of tokens per branch (sums to 1)
    and its entropy in nats."""
    gates = {name: m for name, m in model.named_modules() if isinstance(m, Gate)}
    for g in gates.values():
        g.counts = torch.zeros(g.n, device=g.linear.weight.device)
    with evaluating(model):
        for x in batches:
            model(x)
    out = {}
    for name, g in gates.items():
        share = (g.counts / g.counts.sum().clamp_min(1)).double()
        out[name] = {
            "share": share.tolist(),
            "entropy": float(-(share * share.clamp_min(1e-30).log()).sum()),
        }
        g.counts = None
    return out


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold plain LoRA into the weights, in place: W += (alpha/R) B A, and nn.Linear modules are
    back. Without adapters it does nothing.

    Raises ValueError for routed adapters: their update depends on the token."""
    for name, m in list(_adapted(model)):
        check(
            type(m) is LoRALinear,
            f"merging {type(m).__name__}",
            "only plain LoRA has one update for all tokens",
            "keep the adapter apart",
        )
        plain = nn.Linear(
            m.in_features,
            m.out_features,
            m.bias is not None,
            device=m.weight.device,
            dtype=m.weight.dtype,
        )
        plain.weight = nn.Parameter(
            (m.weight + m.scaling * (m.lora_B @ m.lora_A)).to(m.weight.dtype), requires_grad=False
        )
        plain.bias = m.bias
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def export_peft(model: nn.Module, folder: str | os.PathLike, base_model: str) -> None:
    """Write plain LoRA as a PEFT adapter (adapter_config.json, adapter_model.safetensors) for a
    Hugging Face Llama-family model.

    base_model: name or path written into the config. Raises ValueError for other adapters."""
    layers = list(_adapted(model))
    check(
        bool(layers) and all(type(m) is LoRALinear for _, m in layers),
        "a PEFT export",
        "PEFT's format holds plain LoRA",
        "use --adapter=lora",
    )
    check(
        model.cfg.positions == "rope",
        "a PEFT export of an OPT model",
        "its projections have other names there",
        "export the merged model",
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = layers[0][1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": first.scaling * first.r,
        "lora_dropout": first.p,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name, _ in layers}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {
        f"base_model.model.model.{name}.{key}.weight": getattr(m, key).detach().contiguous().clone()
        for name, m in layers
        for key in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
