"""A pretraining step of model.py against the plain loop below, the same layers written the short
way of a teaching script (one file, fused q/k/v projection, AdamW and clipping as such scripts have
them). Their losses are compared first, from equal weights."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import interleaved, random_batches, shape_name
from config import ModelConfig
from loaders.device import autocast, device_name, pick_device
from measure_config import BenchConfig
from model import Transformer
from training.loss import lm_loss


class PlainNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class PlainBlock(nn.Module):
    """The same block in the short way: one projection for q, k, v, rotary tables applied in place,
    fused attention."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.ln_1 = PlainNorm(c.n_embd, c.norm_eps)
        self.ln_2 = PlainNorm(c.n_embd, c.norm_eps)
        self.c_attn = nn.Linear(
            c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.qkv_bias
        )
        self.c_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.w_gate = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.w_up = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.w_down = nn.Linear(c.n_inner, c.n_embd, bias=False)

    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def forward(self, x, cos, sin):
        c = self.c
        (B, T, _) = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(
            [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim], dim=2
        )
        q = self.rotate(q.view(B, T, c.n_head, c.head_dim).transpose(1, 2), cos, sin)
        k = self.rotate(k.view(B, T, c.n_kv_head, c.head_dim).transpose(1, 2), cos, sin)
        v = v.view(B, T, c.n_kv_head, c.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=c.n_head != c.n_kv_head
        )
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1))
        h = self.ln_2(x)
        return x + self.w_down(F.silu(self.w_gate(h)) * self.w_up(h))


class PlainModel(nn.Module):
    """The peer: the same shape and layers as model.Transformer, written plainly."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.ln_f = PlainNorm(c.n_embd, c.norm_eps)
        self.h = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layer))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angle = torch.arange(c.block_size).float()[:, None] * freq
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, idx, targets):
        x = self.wte(idx)
        T = idx.size(1)
        for block in self.h:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


@torch.no_grad()
def same_weights(plain: PlainModel, ours: Transformer) -> None:
    """Copy our weights into the peer."""
    plain.wte.weight.copy_(ours.embed_tokens.weight)
    plain.lm_head.weight.copy_(ours.lm_head.weight)
    plain.ln_f.weight.copy_(ours.norm.weight)
    for p, o in zip(plain.h, ours.layers, strict=True):
        a = o.self_attn
        p.c_attn.weight.copy_(torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)))
        if a.q_proj.bias is not None:
            p.c_attn.bias.copy_(torch.cat((a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)))
        for mine, theirs in (
            (p.c_proj, a.o_proj),
            (p.w_gate, o.mlp.gate_proj),
            (p.w_up, o.mlp.up_proj),
            (p.w_down, o.mlp.down_proj),
            (p.ln_1, o.input_layernorm),
            (p.ln_2, o.post_attention_layernorm),
        ):
            mine.weight.copy_(theirs.weight)


def bench_train(cfg: BenchConfig, c: ModelConfig) -> list[dict]:
    """Return the rows of `train`; the first is ours, with its ratio to the plain loop."""
    device = pick_device(cfg.device)
    torch.manual_seed(0)
    batches = random_batches(c.vocab_size, cfg.batch_size, c.block_size, device)
    ours = Transformer(c).to(device)
    plain = PlainModel(c).to(device)
    same_weights(plain, ours)
    x, y = batches[0]
    with torch.no_grad():
        gap = abs(float(plain(x, y) - lm_loss(ours(x), y)))
    assert gap < 1e-4, f"the two models differ by {gap} in loss: the comparison would mean nothing"
    on_gpu = device.type == "cuda"
    steps = {
        "model.py": stepper(
            lambda x, y: lm_loss(ours(x), y), list(ours.parameters()), device, cfg.dtype, True
        ),
        "plain loop": stepper(plain, list(plain.parameters()), device, cfg.dtype, on_gpu),
    }
    return step_rows(cfg, c, steps, batches)


def stepper(
    loss_of: Callable,
    params: list[nn.Parameter],
    device: torch.device,
    dtype: str,
    fused: bool,
) -> Callable:
    """Return a function that does one optimizer step and returns its loss; the loop body of a
    training script."""
    opt = torch.optim.AdamW(params, lr=1e-3, fused=fused)

    def step(x: Tensor, y: Tensor) -> float:
        with autocast(device, dtype):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step


def step_rows(
    cfg: BenchConfig, c: ModelConfig, steps: dict[str, Callable], batches: list
) -> list[dict]:
    """Time two step functions in turns and return a row for each, with its ratio to the other."""
    times = interleaved(steps, batches, cfg.steps)
    ms = {name: median(t) for name, t in times.items()}
    ours, peer = ms
    about = {
        "name": f"{cfg.what} step",
        "shape": shape_name(cfg.batch_size, c.block_size, c),
        "dtype": cfg.dtype,
        "device": device_name(pick_device(cfg.device)),
    }
    rows = []
    for name, other in ((ours, peer), (peer, ours)):
        rows.append(
            {
                **about,
                "impl": name,
                "peer": other,
                "ms": round(ms[name], 3),
                "ratio": round(ms[name] / ms[other], 4),
                "tokens_per_s": round(1e3 * cfg.batch_size * c.block_size / ms[name]),
            }
        )
    return rows
