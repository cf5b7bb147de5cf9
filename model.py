"""A small transformer of the Llama family, its dense KV cache and `generate`: the trunk every
method of this project grows on.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; optional bias on q, k, v (Qwen2); tied
or untied head. Parameter names are Hugging Face Llama's, so a Llama, Qwen2 or Mistral state dict
fits once its "model." prefix is taken off.

The one seam: a block hands its attention's input and rotated q, k, v to `self_attn.kv_path` and
gets the attention output back. Dense storage is `DensePath` below; every other way of keeping keys
and values is one such module in another file. A path is

    forward(x, q, k, v, cache, pad) -> y       x (B, T, n_embd), q (B, H, T, D), k and v (B, Hkv, T,
    D), y (B, H, T, D) new_cache(B, max_len, like)     -> cache   this layer's empty store, dtype
    and device of `like` step(x, q, k, v, cache, tail)   -> y       forward of one token per
    sequence that asks the host nothing (see Steps); can_step() says
                                               whether it has that, reads_chunks whether a prompt
                                               may come in pieces

Letters: B batch, T new tokens, L tokens seen so far and now, H heads, Hkv KV heads, D head
dimension.

    python sample.py --out_dir=out/... --prompt="def "
"""

from __future__ import annotations

import copy
import json
import math
import os
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import ModelConfig
from kernels import packed_attention
from storage.append import append_tail
from storage.kernel_base import triton
from storage.layout import at_least_float32, storage_bytes
from storage.views import Tail


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in x's dtype (statistics in at least
    float32)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(cfg: ModelConfig, device="cpu") -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, both (block_size, D/2) float32, computed in float64.

    Frequency i is theta^(-2i/D). With rope_factor > 1 (Llama 3) one that turns fewer than
    rope_low_freq times in rope_original tokens is divided by the factor, one that turns more than
    rope_high_freq times stays, and in between the two are blended."""
    D = cfg.head_dim
    # (D/2,)
    freq = cfg.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64, device=device) / D)
    turns = cfg.rope_original * freq / (2 * math.pi)
    stay = ((turns - cfg.rope_low_freq) / (cfg.rope_high_freq - cfg.rope_low_freq)).clamp(0, 1)
    freq = freq * (stay + (1 - stay) / cfg.rope_factor)
    angle = torch.arange(cfg.block_size, dtype=torch.float64, device=device)[:, None] * freq
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, heads, T, D) by the angles of cos, sin (T, D/2) or (B,
    1, T, D/2); same dtype.

    The partner of every dimension is D/2 away in either direction: one roll, one fused multiply-add
    over whole rows."""
    wide = at_least_float32(x)
    cos = torch.cat((cos, cos), -1)
    sin = torch.cat((-sin, sin), -1)  # (..., T, D)
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, -1), sin).to(x.dtype)


def attention_mask(T: int, L: int, pad: Tensor | None, device) -> Tensor:
    """True where query i (position L - T + i) may read key j: j <= L - T + i and, per row, j >=
    pad. (B or 1, 1, T, L) bool."""
    j = torch.arange(L, device=device)
    # (1, 1, T, L)
    mask = (j[None, :] <= torch.arange(L - T, L, device=device)[:, None])[None, None]
    if pad is not None:
        # a padding query reads itself: no empty softmax
        own = j[None, :] == torch.arange(L - T, L, device=device)[:, None]
        mask = mask & (j >= pad[:, None, None, None]) | own  # (B, 1, T, L)
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None) -> Tensor:
    """Causal attention of the newest T tokens over all L. q (B, H, T, D); k, v (B, Hkv, L, D); pad
    (B,) left padding or None."""
    T = q.size(2)
    L = k.size(2)
    gqa = q.size(1) != k.size(1)
    if pad is None and (T == L or T == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=gqa)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask(T, L, pad, q.device), enable_gqa=gqa
    )


class DenseCache:
    """One layer's keys and values, whole: two (B, Hkv, max_len, D) buffers filled from the left."""

    def __init__(self, batch: int, max_len: int, n_kv_head: int, head_dim: int, like: Tensor):
        self.k = like.new_zeros(batch, n_kv_head, max_len, head_dim)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, Hkv, T, D); return all so far, (B, Hkv, L, D). Raises ValueError when the
        buffer is full."""
        self.reserve(k.size(2))
        end = self.length + k.size(2)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def reserve(self, n_columns: int) -> None:
        """See that n_columns more fit. Raises ValueError where they do not."""
        if self.length + n_columns > self.k.size(2):
            raise ValueError(
                f"KV cache of {self.k.size(2)} tokens cannot take {self.length + n_columns}: ask "
                "new_cache for a larger max_len"
            )

    def steps(self, pad: Tensor) -> Tail:
        """What `step` goes on from, the first pad (B,) columns being padding; its count is the
        caller's to raise before each."""
        return Tail(self.k, self.v, pad, self.length - pad)

    def stepped(self, n: int) -> None:
        """n calls of `step` have been made."""
        self.length += n

    @staticmethod
    def join(caches: list[DenseCache]) -> DenseCache:
        """One cache of the sequences of all, in order; each must have the same length."""
        out = copy.copy(caches[0])
        out.k = torch.cat([c.k for c in caches])
        out.v = torch.cat([c.v for c in caches])
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name."""
        return {"k": self.k, "v": self.v}

    def extra(self) -> dict[str, int]:
        """The numbers that, with tensors(), make up the whole cache."""
        return {"length": self.length}

    def nbytes(self) -> int:
        """Bytes of the tensors held, unused capacity included."""
        return storage_bytes(self.tensors().values())


class DensePath(nn.Module):
    """Keys and values kept whole: the baseline, and what every other path equals when it keeps
    everything."""

    reads_chunks = True

    def __init__(self, n_kv_head: int, head_dim: int):
        super().__init__()
        self.n_kv_head = n_kv_head
        self.head_dim = head_dim

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> DenseCache:
        return DenseCache(batch, max_len, self.n_kv_head, self.head_dim, like)

    def forward(
        self, x, q, k, v, cache: DenseCache | None = None, pad: Tensor | None = None
    ) -> Tensor:
        if cache is not None:
            k, v = cache.append(k, v)
        return attend(q, k, v, pad)

    def can_step(self) -> bool:
        return triton is not None

    def step(self, x, q, k, v, cache: DenseCache, tail: Tail) -> Tensor:
        append_tail(tail, k, v)
        return packed_attention(q, None, tail)[0]


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)
        self.kv_path: nn.Module = DensePath(cfg.n_kv_head, cfg.head_dim)  # the seam

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D), k, v (B, Hkv, T, D) of x (B, T, n_embd), rotated."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        # (B, Hkv, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        # (B, Hkv, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def output(self, y: Tensor) -> Tensor:
        """y (B, H, T, D) -> (B, T, n_embd)."""
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=False)
        self.down_proj = nn.Linear(cfg.n_inner, cfg.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache=None, pad: Tensor | None = None
    ) -> Tensor:
        return self.after(x, self.self_attn.kv_path(*self.before(x, cos, sin), cache, pad))

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """forward up to its kv_path: what that gets."""
        h = self.input_layernorm(x)
        return h, *self.self_attn.project(h, cos, sin)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """forward from its kv_path's y on."""
        x = x + self.self_attn.output(y)
        return x + self.mlp(self.post_attention_layernorm(x))


# of saved caches; 1 had other codes for integers, 2 did not say their bits and blocks
CACHE_FORMAT = "3"


class KVCache:
    """What a batch has stored so far: one cache per layer, the left padding of each row, and the
    length in columns."""

    def __init__(self, layers: list, pad: Tensor | None = None):
        self.layers = layers
        self.pad = pad
        self.length = 0

    def nbytes(self) -> int:
        """Bytes of all tensors held, indices and unused capacity included; what layers share is
        counted once."""
        return storage_bytes([t for layer in self.layers for t in layer.tensors().values()])

    @staticmethod
    def join(caches: list[KVCache]) -> KVCache:
        """One cache of the sequences of all, in order; each must have the same length."""
        if len(caches) == 1:
            return caches[0]
        layers = [type(ls[0]).join(ls) for ls in zip(*(c.layers for c in caches), strict=True)]
        out = KVCache(layers, None if caches[0].pad is None else torch.cat([c.pad for c in caches]))
        out.length = caches[0].length
        return out

    def save(self, path: str | os.PathLike) -> None:
        """Write everything held to one safetensors file, what layers share once for each of
        them."""
        # layers may share storage, which the format refuses
        tensors = {
            f"{i}.{name}": t.clone(memory_format=torch.contiguous_format)
            for i, layer in enumerate(self.layers)
            for name, t in layer.tensors().items()
        }
        numbers = [layer.extra() for layer in self.layers]
        if self.pad is not None:
            tensors["pad"] = self.pad
        save_file(
            tensors,
            path,
            metadata={
                "length": str(self.length),
                "layers": json.dumps(numbers),
                "format": CACHE_FORMAT,
            },
        )

    @staticmethod
    def load(path: str | os.PathLike, model: Transformer) -> KVCache:
        """Read a saved cache for `model`, to its device. Raises ValueError where the file is not
        one of this model's caches."""
        try:
            with safe_open(path, "pt", device=str(model.norm.weight.device)) as f:
                # copied: in a file tensors begin at any multiple of 8 bytes, and unaligned numbers
                # are summed in another order
                meta = f.metadata() or {}
                names = list(f.keys())
                tensors = {name: f.get_tensor(name).clone() for name in names}
            if meta.get("format") != CACHE_FORMAT and any(
                name.endswith("key_scale") for name in tensors
            ):
                raise ValueError("its integers were written by an earlier version")
            numbers = json.loads(meta["layers"])
            pad = tensors.pop("pad", None)
            cache = model.new_cache(1, 1, pad)
            for i, (layer, extra) in enumerate(zip(cache.layers, numbers, strict=True)):
                mine = {
                    k.split(".", 1)[1]: t
                    for k, t in tensors.items()
                    if k.split(".", 1)[0] == str(i)
                }
                own = layer.extra()
                fixed = {name: n for name, n in own.items() if name.split(".")[-1] == "ints"}
                same = set(mine) == set(layer.tensors()) and set(extra) == set(own)
                if not (
                    same
                    and all(
                        mine[k].shape[-1] == t.shape[-1] or t.ndim == 1
                        for k, t in layer.tensors().items()
                    )
                ):
                    raise ValueError(f"layer {i} holds another kind or size of cache")
                if any(extra.pop(name) != n for name, n in fixed.items()):
                    raise ValueError(
                        f"layer {i} holds integers of other bits or blocks than {[*fixed.values()]}"
                    )
                for name, value in {**mine, **extra}.items():  # "2.keys": of the layer's third part
                    *part, leaf = name.split(".")
                    setattr(layer.parts[int(part[0])] if part else layer, leaf, value)
            cache.length = int(meta["length"])
        except (SafetensorError, KeyError, ValueError, OSError) as e:
            raise ValueError(
                f"{path} is not a cache of this model ({e}); give a file that KVCache.save wrote "
                "for it"
            ) from None
        return cache


class Transformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # real on the CPU even while the parameters are built on the meta device
        cos, sin = rope_table(cfg)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.apply(self._init)
        for block in self.layers:  # residual branches start small, as in GPT-2
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * cfg.n_layer))

    @staticmethod
    def _init(m: nn.Module) -> None:
        if isinstance(m, nn.Linear | nn.Embedding):
            nn.init.normal_(m.weight, std=0.02)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)

    def new_cache(
        self, batch: int, max_len: int, pad: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for `batch` rows of at most max_len columns; pad (B,) int64 counts each
        row's left padding. dtype: that of the weights, or under autocast the one computed in."""
        device = self.norm.weight.device.type
        if dtype is None:
            dtype = (
                torch.get_autocast_dtype(device)
                if torch.is_autocast_enabled(device)
                else self.embed_tokens.weight.dtype
            )
        like = self.norm.weight.new_empty(0, dtype=dtype)
        return KVCache(
            [b.self_attn.kv_path.new_cache(batch, max_len, like) for b in self.layers], pad
        )

    def dense_bytes(self, n_tokens: int, cache: KVCache) -> int:
        """Bytes of all keys and values of n_tokens, kept whole in the dtype of `cache`."""
        item = next(
            t for t in cache.layers[0].tensors().values() if t.is_floating_point()
        ).element_size()
        return 2 * item * n_tokens * self.cfg.n_kv_head * self.cfg.head_dim * self.cfg.n_layer

    def _rope(self, start: int, T: int, pad: Tensor | None) -> tuple[Tensor, Tensor]:
        if start + T > self.cfg.block_size:
            raise ValueError(
                f"{start + T} tokens: the model's context is {self.cfg.block_size}; shorten the "
                "text or raise --block_size"
            )
        if pad is None:
            return self.rope_cos[start : start + T], self.rope_sin[start : start + T]  # (T, D/2)
        # (B, T)
        pos = (torch.arange(start, start + T, device=pad.device) - pad[:, None]).clamp_min(0)
        return self.rope_cos[pos][:, None], self.rope_sin[pos][:, None]  # (B, 1, T, D/2)

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        pad: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, vocab), or (B, 1, vocab) of the newest token with last_only.

        idx (B, T) int64 in [0, vocab); cache: what came before, extended in place; pad (B,) left
        padding of an uncached batch (a cache carries its own). Raises ValueError past block_size.
        Ids are not range-checked here: data.check_ids is."""
        start = cache.length if cache is not None else 0
        pad = cache.pad if cache is not None else pad
        cos, sin = self._rope(start, idx.size(1), pad)
        x = self.embed_tokens(idx)  # (B, T, n_embd)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, cache.layers[i] if cache is not None else None, pad)
        if cache is not None:
            cache.length += idx.size(1)
        return self.lm_head(self.norm(x[:, -1:] if last_only else x))


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode inside the `with`, in the mode it had after it; no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over targets (B, T) int64; -100 marks targets left out
    (all left out gives NaN)."""
    return F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=-100
    )


def sampling_probs(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Probabilities (B, V) after temperature (> 0), then top-k (0: all), then the smallest set
    whose mass reaches top_p."""
    # a smaller temperature would overflow to NaN
    probs = (at_least_float32(logits) / max(temperature, 1e-30)).softmax(-1)
    order = probs.argsort(dim=-1, descending=True, stable=True)  # ties: the lower id first
    p = probs.gather(-1, order)
    keep = torch.ones_like(p, dtype=torch.bool)
    if top_k:
        keep[:, top_k:] = False
        p = p * keep
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        keep &= p.cumsum(-1) - p < top_p  # the token that crosses top_p is the last one kept
    p = p * keep
    return torch.zeros_like(probs).scatter(-1, order, p / p.sum(-1, keepdim=True))


@torch.no_grad()
def prefill(
    model: Transformer, idx: Tensor, max_len: int, pad: Tensor | None = None, at_once: int = 0
) -> tuple[Tensor, KVCache]:
    """Logits (B, V) after prompts idx (B, T), the first pad (B,) tokens of each row padding, and
    the cache that holds them.

    at_once: tokens processed at a time, 0 for all: fewer rows at a time, and a row that is longer
    in pieces, each of which reads itself whole and what came before as it is stored. A storage that
    looks at a whole prompt (kv=select) gets whole rows."""
    (B, T) = idx.shape
    chunk = at_once or idx.numel()
    if not all(getattr(b.self_attn.kv_path, "reads_chunks", False) for b in model.layers):
        chunk = max(chunk, T)
    logits = []
    caches = []
    for rows in torch.arange(B).split(max(1, chunk // T)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        cache = model.new_cache(len(rows), max_len, None if pad is None else pad[part])
        for piece in idx[part].split(chunk, 1):
            last = model(piece, cache, last_only=True)[:, -1]
        logits.append(last)
        caches.append(cache)
    return torch.cat(logits), KVCache.join(caches)


class Steps:
    """Decoding without the host: the whole step is one CUDA graph, replayed for every token.
    pick(logits (B, V), step (1,)) -> ids (B, 1).

    The first two steps run as they are, to warm up; `compiled`: what lies between two attentions
    goes through torch.compile first. A cache that is stepped grows as by forward, with room for n
    tokens reserved; it is the steps' alone until the last of them."""

    WARM = 2
    # products with one row become reductions, fused with what is around
    TUNED = {"coordinate_descent_tuning": True, "combo_kernels": True}

    def __init__(
        self, model: Transformer, cache: KVCache, idx: Tensor, pick, n: int, compiled: bool = False
    ):
        self.model = model
        self.cache = cache
        self.idx = idx.clone()
        self.pick = pick
        self.done = 0
        self.graph = None
        for layer in cache.layers:
            layer.reserve(n)
        self.pad = (
            torch.zeros(len(idx), dtype=torch.int64, device=idx.device)
            if cache.pad is None
            else cache.pad
        )
        tails = [layer.steps(self.pad) for layer in cache.layers]
        self.counts = torch.stack([t.count for t in tails if t] or [self.pad])  # raised together
        rows = iter(self.counts)
        self.tails = [t and t._replace(count=next(rows)) for t in tails]
        self.column, self.step = torch.tensor([[cache.length], [1]], device=idx.device)
        self.before, self.after = (
            torch.compile(f, dynamic=False, options=self.TUNED) if compiled else f
            for f in (Block.before, Block.after)
        )

    @staticmethod
    def possible(model: Transformer) -> bool:
        """Whether every layer of the model can step, on the device it is on."""
        return (
            model.norm.weight.is_cuda
            and model.norm.weight.dtype != torch.float64
            and all(
                hasattr(b.self_attn.kv_path, "step") and b.self_attn.kv_path.can_step()
                for b in model.layers
            )
        )

    def _once(self) -> None:
        m = self.model
        self.counts += 1
        at = self.column - self.pad if self.cache.pad is not None else self.column  # (B or 1,)
        cos, sin = (t[at][:, None, None] for t in (m.rope_cos, m.rope_sin))  # (B or 1, 1, 1, D/2)
        x = m.embed_tokens(self.idx)
        for block, layer, tail in zip(m.layers, self.cache.layers, self.tails, strict=True):
            h, q, k, v = self.before(block, x, cos, sin)
            x = self.after(block, x, block.self_attn.kv_path.step(h, q, k, v, layer, tail))
        self.idx.copy_(self.pick(m.lm_head(m.norm(x))[:, -1], self.step))
        self.column += 1
        self.step += 1

    def next(self) -> Tensor:
        """The next token of every sequence, (B, 1), in a buffer that the following call
        overwrites."""
        if self.done < self.WARM:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._once()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._once()
            self.graph.replay()
        self.done += 1
        self.cache.length += 1
        for layer in self.cache.layers:
            layer.stepped(1)
        return self.idx


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    prefill_tokens: int = 0,
    compiled: bool = False,
) -> tuple[list[list[int]], KVCache]:
    """Continue every prompt; returns the new tokens of each row (the stop token not included) and
    the cache that was used.

    prompts: B non-empty lists of ids, of any lengths (padded on the left); temperature 0 is greedy;
    row b draws from its own stream seeded by (seed, b), so neither the batch around it nor its
    padding changes it. prefill_tokens: how many tokens of the prompts are processed at a time, 0
    for all (see prefill). On a GPU the steps are CUDA graphs where the storage has kernels (see
    Steps), with `compiled` torch.compile around attention. Raises ValueError for an empty prompt,
    an id outside the vocabulary, a setting out of range, or prompt + new tokens past the model's
    context."""
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: at least one token is needed; give some text")
    low = min(map(min, prompts))
    high = max(map(max, prompts))
    if low < 0 or high >= model.cfg.vocab_size:
        raise ValueError(
            f"token ids {low}..{high} in a prompt: the vocabulary has "
            f"0..{model.cfg.vocab_size - 1}; use the model's own tokenizer"
        )
    if (
        max_new_tokens < 1
        or not temperature >= 0
        or top_k < 0
        or not 0 < top_p <= 1
        or prefill_tokens < 0
    ):
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, "
            f"top_p={top_p}, "
            f"prefill_tokens={prefill_tokens}: need at least 1, at least 0, at least 0, within "
            "(0, 1], and at least 0; correct the flag"
        )
    device = model.embed_tokens.weight.device
    B = len(prompts)
    T = max(map(len, prompts))
    if T + max_new_tokens > model.cfg.block_size:
        raise ValueError(
            f"a prompt of {T} tokens and {max_new_tokens} new ones: the context is "
            f"{model.cfg.block_size}; shorten either"
        )
    pad = torch.tensor([T - len(p) for p in prompts], device=device)
    idx = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    draws = torch.stack(
        [
            torch.rand(
                max_new_tokens, generator=torch.Generator().manual_seed(seed * 1_000_003 + b)
            )
            for b in range(B)
        ]
    ).to(device)

    def pick(logits: Tensor, step: Tensor) -> Tensor:  # (B, V), (1,) -> (B, 1)
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        cdf = sampling_probs(logits, temperature, top_k, top_p).double().cumsum(-1)  # (B, V)
        draw = draws.index_select(1, step).double() * cdf[:, -1:]
        return torch.searchsorted(cdf, draw, right=True).clamp_max(cdf.size(-1) - 1)

    with evaluating(model):
        logits, cache = prefill(
            model, idx, T + max_new_tokens - 1, pad if pad.any() else None, prefill_tokens
        )
        idx = pick(logits, torch.zeros(1, dtype=torch.int64, device=device))
        out = [idx]
        done = idx[:, 0] == stop if stop is not None else None
        steps = None
        if Steps.possible(model) and max_new_tokens - 1 > Steps.WARM:
            steps = Steps(model, cache, idx, pick, max_new_tokens - 1, compiled)
        for step in range(1, max_new_tokens):
            if done is not None and done.all():
                break
            if steps:
                out.append(steps.next().clone())
            else:
                out.append(
                    pick(
                        model(out[-1], cache, last_only=True)[:, -1],
                        torch.tensor([step], device=device),
                    )
                )
            if done is not None:
                done |= out[-1][:, 0] == stop
    rows = torch.cat(out, 1).tolist()
    return [r[: r.index(stop)] if stop is not None and stop in r else r for r in rows], cache
