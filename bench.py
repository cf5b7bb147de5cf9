"""Speed as a ratio: this project's code and a peer, interleaved in one run, same shape, batch and
dtype, medians.

`train`: a pretraining step of model.py against the plain loop below, the same layers written the
short way of a teaching script (one file, fused q/k/v projection, AdamW and clipping as such scripts
have them). Their losses are compared first, from equal weights. `adapter`: an adaptation step of
routed subspace LoRA against plain LoRA of the same total rank. `select`: a prompt's prefill with
selection, and choosing alone, against the dense prefill. `decode`, `memory`, `generate`: see
bench_cache.py.

Ends with one JSON line, a list of rows: name, impl, peer, shape, dtype, ms, ratio (ours / peer),
device, and tokens_per_s or bytes and gb_per_s.

    python bench.py train
    python bench.py adapter
    python bench.py select --out_dir=out/SELECT --block_size=2048
    python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=32768
    python bench.py memory --n_kv_head=8 --head_dim=128 --block_size=8192
    python bench.py generate --init_from=model.gguf --block_size=2560 --batch_size=1 \\
        --kv=value_groups --n_groups=16 --topk_groups=8 --compile
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

from cli import exit_on_bad_input, parse_args
from config import AdapterConfig, BaseConfig, KVConfig, ModelConfig, SelectConfig, check
from measure_config import BenchConfig

if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    argv = (
        [f"--what={sys.argv[1]}", *sys.argv[2:]]
        if len(sys.argv) > 1 and not sys.argv[1].startswith("-")
        else sys.argv[1:]
    )
    ARGS = parse_args(
        {
            "bench": BenchConfig,
            "model": ModelConfig,
            "base": BaseConfig,
            "kv": KVConfig,
            "select": SelectConfig,
        },
        argv,
        description=__doc__.splitlines()[0],
    )

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import lora
import selector
from loaders.device import autocast, check_weights, device_name, pick_device, place
from loaders.runs import load_run
from model import Transformer, evaluating, lm_loss
from selection.relevance import Prompt


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


def stepper(loss_of, params: list[nn.Parameter], device: torch.device, dtype: str, fused: bool):
    """A function that does one optimizer step and returns its loss; the loop body of a training
    script."""
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


def interleaved(
    steps: dict, batches: list[tuple[Tensor, Tensor]], n: int
) -> dict[str, list[float]]:
    """Milliseconds of n calls of every step function, taken in turns; two unmeasured rounds
    first."""
    times = {name: [] for name in steps}
    for i in range(n + 2):
        x, y = batches[i % len(batches)]
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def bench(cfg: BenchConfig, c: ModelConfig) -> list[dict]:
    """Rows of the chosen comparison; the first is ours, with its ratio to the peer."""
    device = pick_device(cfg.device)
    torch.manual_seed(0)
    batches = [
        tuple(torch.randint(0, c.vocab_size, (2, cfg.batch_size, c.block_size), device=device))
        for _ in range(4)
    ]
    ours = Transformer(c).to(device)
    if cfg.what == "train":
        plain = PlainModel(c).to(device)
        same_weights(plain, ours)
        x, y = batches[0]
        with torch.no_grad():
            gap = abs(float(plain(x, y) - lm_loss(ours(x), y)))
        assert gap < 1e-4, (
            f"the two models differ by {gap} in loss: the comparison would mean nothing"
        )
        on_gpu = device.type == "cuda"
        steps = {
            "model.py": stepper(
                lambda x, y: lm_loss(ours(x), y), list(ours.parameters()), device, cfg.dtype, True
            ),
            "plain loop": stepper(plain, list(plain.parameters()), device, cfg.dtype, on_gpu),
        }
    else:

        def adapted(adapter: AdapterConfig):
            m = lora.attach(Transformer(c).to(device), adapter).train()
            return stepper(
                lambda x, y: lm_loss(m(x), y) + adapter.balance_weight * lora.balance_loss(m),
                [p for p in m.parameters() if p.requires_grad],
                device,
                cfg.dtype,
                True,
            )

        routed = AdapterConfig(adapter="routed")
        steps = {
            "routed subspace LoRA": adapted(routed),
            "LoRA": adapted(
                AdapterConfig(
                    adapter="lora",
                    r=routed.r * routed.subspaces,
                    alpha=routed.alpha * routed.subspaces,
                )
            ),
        }
    times = interleaved(steps, batches, cfg.steps)
    (name, mine), (peer, theirs) = times.items()
    shape = (
        f"B{cfg.batch_size} T{c.block_size} L{c.n_layer} d{c.n_embd} H{c.n_head}/{c.n_kv_head} "
        f"D{c.head_dim}"
    )
    common = {
        "name": f"{cfg.what} step",
        "shape": shape,
        "dtype": cfg.dtype,
        "device": device_name(device),
    }
    return [
        {
            **common,
            "impl": n,
            "peer": p,
            "ms": round(median(t), 3),
            "ratio": round(median(t) / median(o), 4),
            "tokens_per_s": round(1e3 * cfg.batch_size * c.block_size / median(t)),
        }
        for n, p, t, o in ((name, peer, mine, theirs), (peer, name, theirs, mine))
    ]


def bench_select(cfg: BenchConfig, c: ModelConfig, base: BaseConfig) -> list[dict]:
    """A dense prefill, one with selection, and choosing alone, of the same prompts; ratios to the
    dense prefill."""
    device = pick_device(cfg.device)
    torch.manual_seed(0)
    named = bool(cfg.out_dir or base.init_from != "scratch")
    check_weights(base.weights, device, cfg.dtype)
    run = load_run(base.place(cfg.out_dir), device, **base.options(cfg.out_dir)) if named else None
    check(
        run is None or (run.kv.kv in ("dense", "select") and run.adapter.adapter == "none"),
        f"{cfg.out_dir or base.init_from}",
        "a base or a run of --stage=select is measured",
        "give one of those",
    )
    model = run.model if named else Transformer(c).to(device)
    T = min(c.block_size, model.cfg.block_size)
    dense = Transformer(model.cfg)  # a prefill costs the same with any weights
    place(dense, device, model.norm.weight.dtype)
    if selector.selector_of(model) is None:
        selector.attach(
            model, KVConfig(kv="select", n_groups=4, kv_tail=16), SelectConfig(kv_keep=0.25)
        )
    batches = [
        tuple(torch.randint(0, model.cfg.vocab_size, (2, cfg.batch_size, T), device=device))
        for _ in range(4)
    ]
    s = model.selector
    n_context = T - model.selector.kv.kv_tail
    check(
        n_context >= 1,
        f"block_size={T}",
        f"the query region has {s.kv.kv_tail}",
        "give a larger --block_size",
    )

    def prefill(m: Transformer):
        def step(x, y):
            m(x, m.new_cache(*x.shape), last_only=True).sum().item()  # waits for the device

        return step

    def choose(x, y):
        hidden, q, k, z = s.watch(model, x)
        prompt = Prompt(
            hidden, q, k, tuple(t[:, :, :n_context] for t in z), n_context, None, s.rope
        )
        z[-1].sum().item()  # waits for the device
        start = time.perf_counter()
        s.choose(prompt).keep.sum().item()
        chosen.append(1e3 * (time.perf_counter() - start))

    chosen: list[float] = []
    with evaluating(model), evaluating(dense), autocast(device, cfg.dtype):
        times = interleaved(
            {"dense": prefill(dense), "select": prefill(model), "choose": choose},
            batches,
            cfg.steps,
        )
    times["choose"] = chosen[2:]  # the choice alone, without the pass that showed it the prompt
    base_ms = median(times["dense"])
    shape = (
        f"B{cfg.batch_size} T{T} L{model.cfg.n_layer} d{model.cfg.n_embd} "
        f"H{model.cfg.n_head}/{model.cfg.n_kv_head} D{model.cfg.head_dim}"
    )
    return [
        {
            "name": "prefill",
            "impl": name if name == "dense" else f"{name}: {s.cfg.described()}",
            "peer": "dense",
            "shape": shape,
            "dtype": cfg.dtype,
            "ms": round(median(t), 3),
            "ratio": round(median(t) / base_ms, 4),
            "tokens_per_s": round(1e3 * cfg.batch_size * T / median(t)),
            "device": device_name(device),
        }
        for name, t in times.items()
    ]


def main() -> None:
    cfg: BenchConfig = ARGS.bench
    if cfg.what in ("decode", "memory", "generate"):
        from benchmarks import cache as bench_cache

        rows = {
            "decode": lambda: bench_cache.bench_decode(cfg, ARGS.model),
            "memory": lambda: bench_cache.bench_memory(cfg, ARGS.model),
            "generate": lambda: bench_cache.bench_generate(
                cfg, ARGS.model, ARGS.base, ARGS.kv, ARGS.select
            ),
        }[cfg.what]()
    else:
        rows = (
            bench_select(cfg, ARGS.model, ARGS.base)
            if cfg.what == "select"
            else bench(cfg, ARGS.model)
        )
    for r in rows:
        speed = (
            f"{r['tokens_per_s']:>9,} tokens/s"
            if "tokens_per_s" in r
            else f"{r['bytes']:>15,} bytes"
        )
        ms = (
            f"{r['ms']:9.3f} ms"
            if "ms" in r
            else f"{r['sequences']:5d} fit, {r['times_more']:.2f} times dense"
        )
        print(
            f"{r['name']:14s} {r['impl']:30s} {ms}  {speed}  {r['ratio']:.3f} of {r['peer']}",
            file=sys.stderr,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    exit_on_bad_input(main)
