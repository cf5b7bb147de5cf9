"""Small models with adapters, and the adapters' equations in loops over tokens and branches."""

import itertools

import torch
from helpers import tiny_model

import lora
from config import ModelConfig
from settings.adapters import AdapterConfig

SHAPE = ModelConfig(
    vocab_size=23,
    block_size=31,
    n_layer=2,
    n_embd=12,
    n_head=4,
    n_kv_head=2,
    head_dim=6,
    n_inner=17,
    qkv_bias=True,
    tie_embeddings=False,
)
ALL = "q,k,v,o,gate,up,down"
KINDS = ["lora", "moe_lora", "routed"]
R = 3
ALPHA = 5.0
S = 5
K = 2
E = 4
KE = 3
NAMES = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def config(kind: str, **kw) -> AdapterConfig:
    return AdapterConfig(
        **{
            "adapter": kind,
            "r": R,
            "alpha": ALPHA,
            "lora_dropout": 0.0,
            "lora_targets": ALL,
            "subspaces": S,
            "subspace_topk": K,
            "experts": E,
            "expert_topk": KE,
            **kw,
        }
    )


def adapted(
    kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, random: bool = True, **kw
):
    """A random tiny model with adapters; `random` draws lora_A, lora_B and routers too: a zero B
    hides every error."""
    model = lora.attach(tiny_model(seed, dtype, SHAPE), config(kind, **kw))
    if random:
        torch.manual_seed(seed + 100)
        for name, p in lora.adapter_state(model).items():
            torch.nn.init.normal_(p, std=0.3 if "lora_" in name else 1.0)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base_tensors(model) -> dict[str, torch.Tensor]:
    own = lora.adapter_state(model)
    return {k: t.clone() for k, t in model.state_dict().items() if k not in own}


def assert_close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def gates_by_hand(x, weight, bias, k: int):
    """Gates of one token x (d,): softmax over the k largest logits (equal ones: the lower index),
    exactly 0 elsewhere."""
    logits = weight @ x + bias
    kept = sorted(range(len(logits)), key=lambda s: (-logits[s].item(), s))[:k]
    top = torch.stack([logits[s] for s in kept])
    e = (top - top.max()).exp()
    zero = torch.zeros((), dtype=x.dtype)
    return torch.stack(
        [e[kept.index(s)] / e.sum() if s in kept else zero for s in range(len(logits))]
    )


def adapter_by_hand(x, seen, weight, bias, A, B, n: int, router=None, k: int = 0):
    """y = W x + b + sum_n r_n (alpha / R) B_n (A_n x), token by token and branch by branch; the
    router reads `seen`."""
    out = torch.zeros(*x.shape[:2], len(weight), dtype=x.dtype)
    for b, t in itertools.product(range(x.size(0)), range(x.size(1))):
        y = weight @ x[b, t] + (0 if bias is None else bias)
        r = [1.0] if router is None else gates_by_hand(seen[b, t], *router, k)
        for s in range(n):
            rows = slice(s * R, (s + 1) * R)
            y = y + r[s] * (ALPHA / R) * (B[:, rows] @ (A[rows] @ x[b, t]))
        out[b, t] = y
    return out


def recorded(model, x) -> dict[str, tuple]:
    """Name of every module -> (first input, output) of one forward."""
    seen = {}
    hooks = []
    for name, m in model.named_modules():
        hooks.append(
            m.register_forward_hook(lambda _, a, y, name=name: seen.__setitem__(name, (a[0], y)))
        )
    model(x)
    for h in hooks:
        h.remove()
    return seen


def router_logits(model, x) -> dict[str, torch.Tensor]:
    """Name of every router -> its scores (B, T, n) in one forward, from the input of the projection
    or block that owns it."""
    seen = recorded(model, x)
    # attention's input
    seen |= {
        name.removesuffix(".q_proj"): io
        for name, io in seen.items()
        if name.endswith("attn.q_proj")
    }
    return {
        name: m.linear(seen[name.rsplit(".", 1)[0]][0])
        for name, m in model.named_modules()
        if isinstance(m, lora.Gate)
    }
