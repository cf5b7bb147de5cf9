"""Small models, plain oracles, a tiny tokenizer and forged checkpoints that several test files
use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kv_router
from config import KVConfig, ModelConfig
from loaders import checkpoint
from model import Transformer

TINY = ModelConfig(
    vocab_size=53,
    block_size=160,
    n_layer=2,
    n_embd=40,
    n_head=6,
    n_kv_head=3,
    head_dim=16,
    n_inner=56,
    qkv_bias=True,
)
# unless a test says otherwise
PAPER_LIKE = dict(prefill="routed", value_router="linear", mask_scope="layer", kv_tail=0)

BY_NORM = dict(value_router="norm", mask_scope="head", prefill="exact")
INT4 = dict(key_bits=4, value_bits=4, key_block=16)
STORED_GROUPS = {  # ways to store value groups: KVConfig over PAPER_LIKE
    "norm": dict(**BY_NORM, value_basis="output", kv_tail=4),
    "no tail": dict(**BY_NORM, kv_tail=0),
    "blocks": dict(
        value_router="norm", prefill="exact", kv_tail=3, kv_tail_block=4, n_groups=8, topk_groups=3
    ),
    "linear": dict(prefill="exact", kv_tail=2),
    "static": dict(value_router="static", prefill="exact", kv_tail=1),
    "trained maps": dict(**BY_NORM, learn_basis=True, value_basis="output", kv_tail=2),
    "some layers": dict(**BY_NORM, kv_tail=4, kv_layers="1"),
    "whole": dict(topk_groups=4, prefill="exact", kv_tail=2),
    "int4": dict(**BY_NORM, **INT4, topk_groups=4, kv_tail=2),
    "int4, half": dict(**BY_NORM, **INT4, kv_tail=2),
    "int2": dict(
        value_router="norm",
        topk_groups=4,
        prefill="exact",
        kv_tail=2,
        key_bits=2,
        value_bits=2,
        key_block=16,
    ),
    "int8 and int4, whole": dict(
        value_router="norm",
        topk_groups=4,
        prefill="exact",
        kv_tail=1,
        key_bits=8,
        value_bits=4,
        key_block=16,
    ),
}


def randomise(module: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Every parameter drawn anew, norms and biases too: zeros hide errors."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std)
    return module


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float64, cfg: ModelConfig = TINY
) -> Transformer:
    """A random model in evaluation mode, large weights, float64."""
    torch.manual_seed(seed)
    return randomise(Transformer(cfg)).to(dtype).eval()


def tokens(*shape: int, seed: int = 0, vocab: int = TINY.vocab_size) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def grouped_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    cfg: ModelConfig = TINY,
    fold: bool = True,
    **kv,
) -> Transformer:
    """tiny_model with calibrated value groups on every layer, random reconstructor weights and,
    with learn_basis, maps that are no longer inverse of each other."""
    model = tiny_model(seed, dtype, cfg)
    kv_router.attach(model, KVConfig(**{**PAPER_LIKE, **kv}), [tokens(2, 70, seed=seed + 1)], seed)
    for path in kv_router.paths(model).values():
        if path.reconstructor is not None:
            randomise(path.reconstructor, 0.2)
        if path.cfg.learn_basis:
            perturb_basis(path)
    return kv_router.fold(model) if fold else model


def read_in_pieces(model, x, cache, sizes, pad=None, decode: bool = True) -> torch.Tensor:
    """Logits (B, T, vocab) of tokens x (B, T), of which the first pad (B,) are padding, put into a
    cache in pieces of these sizes. decode: pieces of one token of every sequence are decoded, not
    prefilled."""
    out = []
    at = 0
    with torch.no_grad():
        for n in sizes:
            piece = x[:, at : at + n]
            n_pad = None if pad is None else (pad - at).clamp(0, n)
            if n_pad is not None and not n_pad.any():
                n_pad = None
            if decode and n == 1 and n_pad is None:
                out.append(model.decode(piece, cache))
            else:
                out.append(model.prefill(piece, cache, n_pad, last_only=False))
            at += n
    assert at == x.size(1)
    return torch.cat(out, 1)


def perturb_basis(path: kv_router.ValueGroupPath, std: float = 0.2) -> None:
    """Move enc and dec of a path with learn_basis, each for itself: dec @ enc is far from 1
    then."""
    with torch.no_grad():
        for p in (path.enc, path.dec):
            p += std * p.std() * torch.randn(p.shape, dtype=p.dtype)
    assert (path.dec @ path.enc - torch.eye(path.D)).abs().max() > 0.1


def coordinates(path: kv_router.ValueGroupPath, v: torch.Tensor) -> torch.Tensor:
    """Values v (B, Hkv, T, D) as a path gets them, in the coordinates it cuts into groups: one
    product per head and token."""
    if path.k == path.S or (path.folded and not path.cfg.learn_basis):
        return v
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([v[b, h, t] @ path.enc[h] for t in range(v.size(2))])
                    for h in range(v.size(1))
                ]
            )
            for b in range(v.size(0))
        ]
    )


def routed_value(
    path: kv_router.ValueGroupPath, v: torch.Tensor, kept: list[list[int]]
) -> torch.Tensor:
    """One token's value v (Hkv, D) as it is read when head h kept the groups kept[h]: loops, the
    reconstructor spelled out."""
    Hkv, D = v.shape
    d = D // path.S
    S = path.S
    dims = [torch.arange(g * d, (g + 1) * d) for g in range(S)]
    seen = torch.zeros_like(v)
    for h in range(Hkv):
        for g in kept[h]:
            seen[h, dims[g]] = v[h, dims[g]]
    rec = path.reconstructor
    if rec is None:  # zeros stand for dropped groups
        return seen
    bits = torch.tensor(
        [[float(g in kept[h]) for g in range(S)] for h in range(path.mask_heads)], dtype=v.dtype
    )
    hidden = rec.up.weight @ torch.cat((seen.flatten(), bits.flatten())) + rec.up.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    rebuilt = (rec.down.weight @ hidden + rec.down.bias).view(Hkv, D)
    for h in range(Hkv):
        for g in range(S):
            if g not in kept[h]:
                seen[h, dims[g]] = rebuilt[h, dims[g]]
    return seen


def brute_force_path(
    path: kv_router.ValueGroupPath, x, q, k, v, pad=None, exact_until: int = 0
) -> torch.Tensor:
    """What ValueGroupPath must return for x (B, T, n), q (B, H, T, D), k, v (B, Hkv, T, D): token
    by token, head by head, no fused call.

    pad (B,): left padding. exact_until: the first so many columns are one exact prefill; later ones
    are decoded token by token."""
    B, H, T, D = q.shape
    Hkv = k.size(1)
    n = H // k.size(1)
    out = torch.full_like(q, float("nan"))
    tail = path.cfg.kv_tail
    block = path.cfg.kv_tail_block
    for b in range(B):
        first = 0 if pad is None else int(pad[b])
        read = []
        z = coordinates(path, v[b : b + 1])
        for t in range(first, T):
            # (1 or Hkv, S)
            scores = path.scores(x[b : b + 1, t : t + 1], z[:, :, t : t + 1])[0, :, 0].detach()
            kept = [
                sorted(range(path.S), key=lambda g, s=s: (-float(s[g]), g))[: path.k]
                for s in scores
            ]
            seen = routed_value(path, z[0, :, t], kept * (Hkv // len(kept)))
            read.append(
                seen
                if path.folded or path.k == path.S
                else torch.stack([seen[h] @ path.dec[h] for h in range(Hkv)])
            )
        for t in range(first, T):
            seen = t - first + 1
            compressed = max(0, (seen - tail) // block * block)
            for h in range(H):
                logits = (
                    torch.stack([q[b, h, t] @ k[b, h // n, j] for j in range(first, t + 1)])
                    / D**0.5
                )
                p = (logits - logits.max()).exp()
                p = p / p.sum()
                use = []
                for j in range(first, t + 1):
                    whole = t < exact_until or (j - first) >= compressed
                    use.append(v[b, h // n, j] if whole else read[j - first][h // n])
                out[b, h, t] = (p[:, None] * torch.stack(use)).sum(0)
    return out


def remake(path: Path, step: int = 1, **files: bytes) -> Path:
    """A checkpoint folder with a manifest that matches whatever it is given (as an attacker
    would)."""
    path.mkdir(parents=True)
    entries = {}
    for name, data in files.items():
        (path / name).write_bytes(data)
        entries[name] = checkpoint.entry(data)
    (path / "manifest.json").write_bytes(checkpoint.manifest_bytes(step, entries))
    return path


def error_line(call, *args, **kwargs):
    """The message of the ValueError of call(...), asserted to be one line."""
    with pytest.raises(ValueError) as e:
        call(*args, **kwargs)
    assert type(e.value) is ValueError and "\n" not in str(e.value)
    return str(e.value)


TINY_RANKS = {bytes([i]): i for i in range(256)} | {
    b"he": 256,
    b"ll": 257,
    b"hell": 258,
    b"hello": 259,
}


def tiny_encoding(pattern=r"\S+|\s+", **more):
    """A tiktoken.Encoding built offline: 256 bytes, four merges, one end token with a hole before
    it."""
    tiktoken = pytest.importorskip("tiktoken", reason="the wrapper needs the package tiktoken")
    return tiktoken.Encoding(
        **(
            dict(
                name="tiny",
                pat_str=pattern,
                mergeable_ranks=TINY_RANKS,
                special_tokens={"<|endoftext|>": 261},
            )
            | more
        )
    )


def random_path(cfg: dict, **changes) -> kv_router.ValueGroupPath:
    """A path with random weights, in evaluation mode."""
    path = kv_router.ValueGroupPath(TINY, KVConfig(**{**cfg, **changes}))
    return randomise(path.double(), 0.3).eval()


def qkv(path, B=2, T=9, seed=0, n_embd=TINY.n_embd, H=TINY.n_head):
    """Random x, q, k, v in float64, as a path gets them."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return (
        draw(B, T, n_embd),
        draw(B, H, T, path.D),
        draw(B, path.Hkv, T, path.D),
        draw(B, path.Hkv, T, path.D),
    )


class Numbers:
    """A stand-in tokenizer of any vocabulary size."""

    name = "numbers"
    eot = 0

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


class Questions(TorchDispatchMode):
    """Collects the names of operators that wait for the device, or copy Python numbers to it."""

    WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"}

    def __init__(self):
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in self.WAIT or str(function) == "aten.repeat_interleave.Tensor":
            self.asked.append(name)
        if name in ("index", "index_put", "index_put_"):
            by = [t.dtype for t in args[1] if t is not None]
            self.asked += [f"{name} by a mask" for t in by if t in (torch.bool, torch.uint8)]
        return function(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Collects the names of methods that hand the host a tensor's numbers."""

    READ = {"tolist", "cpu", "numpy", "item"}

    def __init__(self):
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.READ:
            self.asked.append(function.__name__)
        return function(*args, **(kwargs or {}))
