"""A small transformer of the Llama family: the trunk on which every method of this project grows.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; tied or untied head. Where another
family differs, ModelConfig has a setting for it (docs/models.md lists them). Parameter names are
Hugging Face Llama's, so a Llama, Qwen2 or Mistral state dict fits once its "model." prefix is taken
off.

The one seam is `Attention.kv_path`. Attention projects its input to q, k and v, rotates q and k,
and hands them, with the input itself, to the path, which stores keys and values in its own way and
returns the attention output. `DensePath` below keeps everything; every method that saves memory is
another path. What a path must do is written down in storage/cache.py (KVPath), and so is what a
cache must do.

    model = Transformer(ModelConfig())
    logits = model(idx)                          # no cache: training, or all positions at once
    cache = model.new_cache(batch=1, max_len=64)
    logits = model.prefill(idx, cache)           # a prompt goes into the cache
    logits = model.decode(next_ids, cache)       # one more token of every sequence

Letters: B sequences, T new tokens, L tokens read, H heads, Hkv KV heads, D head dimension.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from kernels import attend_view
from storage.cache import KVCache, NewTokens
from storage.copies import share_copies
from storage.dense import DenseCache
from storage.kernel_base import triton
from storage.layout import at_least_float32, soft_cap
from storage.rope_scaling import scale_frequencies
from storage.sliding import SlidingCache

QUERY_BLOCK = 256  # queries at a time where capped attention weights are formed in full


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in x's dtype (statistics in at least
    float32)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_norm(cfg: ModelConfig, dim: int) -> nn.Module:
    """Return a norm over the last dimension, of cfg's kind."""
    kind = RMSNorm if cfg.norm == "rms" else nn.LayerNorm
    return kind(dim, cfg.norm_eps)


def rope_table(cfg: ModelConfig, device="cpu") -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, both (block_size, D/2) float32, computed in float64.

    Frequency i is theta^(-2i/D), unless it is scaled (storage/rope_scaling.py). Where positions are
    learned nothing turns: all angles are 0."""
    pair = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64, device=device)
    freq = cfg.rope_theta ** (-pair / cfg.head_dim)  # (D/2,)
    if cfg.rope_factor > 1:
        freq = scale_frequencies(cfg, freq)
    if cfg.positions == "learned":
        freq = torch.zeros_like(freq)
    position = torch.arange(cfg.block_size, dtype=torch.float64, device=device)
    angle = position[:, None] * freq
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x, same dtype.

    x         (B, heads, T, D)
    cos, sin  (T, D/2) or (B, 1, T, D/2), of the angles

    The partner of every dimension is D/2 away in either direction: one roll, one fused multiply-add
    over whole rows."""
    wide = at_least_float32(x)
    cos = torch.cat((cos, cos), -1)
    sin = torch.cat((-sin, sin), -1)  # (..., T, D)
    scaled = wide * cos
    partner = wide.roll(x.size(-1) // 2, -1)
    return torch.addcmul(scaled, partner, sin).to(x.dtype)


def attention_mask(T: int, L: int, pad: Tensor | None, device, window: int = 0) -> Tensor:
    """Return (B or 1, 1, T, L) bool: True where query i, at position L - T + i, may read key j.

    That is pad <= j <= L - T + i, and a padding query reads itself; pad (B,): left padding of each
    row or None. window: it reads the newest so many keys only, its own included; 0: all."""
    j = torch.arange(L, device=device)
    i = torch.arange(L - T, L, device=device)[:, None]
    mask = (j <= i)[None, None]  # (1, 1, T, L)
    if window:
        mask = mask & (i - j < window)
    if pad is not None:
        own = j == i  # a padding query reads itself: no empty softmax
        is_token = j >= pad[:, None, None, None]  # (B, 1, 1, L)
        mask = mask & is_token | own  # (B, 1, T, L)
    return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None, cap: float = 0.0, window: int = 0
) -> Tensor:
    """Return causal attention of the newest T tokens over all L, (B, H, T, D).

    q     (B, H, T, D)
    k, v  (B, Hkv, L, D)
    pad   (B,), left padding, or None
    cap   a logit s becomes cap tanh(s / cap); 0: as it is
    window  newest tokens that a query reads; 0: all"""
    T = q.size(2)
    L = k.size(2)
    reads_all = window == 0 or window >= L
    fused_has_mask = T == L or T == 1  # its own causal one, or none
    if fused_has_mask and reads_all and not cap:
        if pad is None:
            return attend_fused(q, k, v, is_causal=T > 1)
        if T == L:
            return attend_padded(q, k, v, pad)
    mask = attention_mask(T, L, pad, q.device, window)
    return attend_masked(q, k, v, mask, cap)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Compute attend where T = L, cap = 0 and no window cuts, without a (T, T) mask in memory:
    sequences move to the left, so that padding comes last, which a causal mask hides, and their
    outputs move back. A padding query gets its own value.

    q     (B, H, T, D)
    k, v  (B, Hkv, T, D)
    pad   (B,), left padding
    Returns (B, H, T, D)."""
    T = q.size(2)
    column = torch.arange(T, device=q.device)
    padding = column < pad[:, None]  # (B, T)
    left = (column + pad[:, None]) % T
    right = (column - pad[:, None]) % T

    def moved(t: Tensor, source: Tensor) -> Tensor:
        return t.take_along_dim(source[:, None, :, None], 2)

    y = attend_fused(moved(q, left), moved(k, left), moved(v, left), is_causal=True)
    own = v.repeat_interleave(q.size(1) // v.size(1), 1)  # what a padding query reads
    return torch.where(padding[:, None, :, None], own, moved(y, right))


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float = 0.0) -> Tensor:
    """Return attention of T queries over L keys where mask (..., T, L) bool allows it, (B, H, T,
    D). Shapes and cap: see attend; mask is broadcast to (B, H, T, L)."""
    if not cap:
        return attend_fused(q, k, v, attn_mask=mask)
    n = q.size(1) // k.size(1)
    k = k.repeat_interleave(n, 1)
    v = v.repeat_interleave(n, 1)
    scale = q.size(-1) ** -0.5
    out = []
    for a in range(0, q.size(2), QUERY_BLOCK):
        rows = slice(a, a + QUERY_BLOCK)
        scaled = q[:, :, rows] * scale
        logits = soft_cap(at_least_float32(scaled @ k.mT), cap)
        unread = ~mask[..., rows, :]
        logits = logits.masked_fill(unread, -math.inf)
        weights = logits.softmax(-1).to(v.dtype)
        out.append(weights @ v)
    return torch.cat(out, 2)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, **which) -> Tensor:
    """Return PyTorch's attention, (B, H, T, D); which: its attn_mask, or is_causal. A GPU's kernels
    that form no (T, L) weights share KV heads between query heads in 16 bits and without a mask
    only; so with a mask, or wider numbers there, every query head gets keys and values its own."""
    n = q.size(1) // k.size(1)
    is_wide = q.is_cuda and q.element_size() > 2
    if n > 1 and ("attn_mask" in which or is_wide):
        k = k.repeat_interleave(n, 1)
        v = v.repeat_interleave(n, 1)
    shared = q.size(1) > k.size(1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared, **which)


class DensePath(nn.Module):
    """Keep keys and values whole: the baseline, which every path equals when it keeps
    everything.

    cap, window: see attend; with a window it keeps the tokens that are still read, no others."""

    reads_pieces = True  # a prompt may come in pieces

    def __init__(self, n_kv_head: int, head_dim: int, cap: float = 0.0, window: int = 0):
        super().__init__()
        self.n_kv_head = n_kv_head
        self.head_dim = head_dim
        self.cap = cap
        self.window = window
        self.losses: dict[str, Tensor] = {}

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> DenseCache:
        shape = (self.n_kv_head, self.head_dim)
        if self.window:
            return SlidingCache(batch, max_len, *shape, like, self.window)
        return DenseCache(batch, max_len, *shape, like)

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Attend causally to whole k, v (B, Hkv, T, D): (B, H, T, D) in q's dtype."""
        return attend(q, k, v, pad, self.cap, self.window)

    def prefill(self, x, q, k, v, cache: DenseCache, n_pad: Tensor | None = None) -> Tensor:
        """Store k, v (B, Hkv, T, D), and attend to them and to what was held: (B, H, T, D) in q's
        dtype."""
        fresh = cache.fresh
        # of a window, new tokens overwrite what the first of them still read
        before = cache.beside(k, v, n_pad) if self.window and not fresh else None
        cache.append(NewTokens(k, v, n_pad))
        if fresh:
            return attend(q, k, v, n_pad, self.cap, self.window)
        if before is not None:
            return attend_masked(q, *before, self.cap)
        return attend_view(q, cache.view(), self.cap)[0]

    def decode(self, x, q, k, v, cache: DenseCache, n_pad: Tensor | None = None) -> Tensor:
        """Store k, v (B, Hkv, 1, D), and attend to all that is held: (B, H, 1, D) in q's dtype."""
        cache.append(NewTokens(k, v, n_pad))
        return attend_view(q, cache.view(), self.cap)[0]

    def graph_safe(self) -> bool:
        return triton is not None


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, window: int = 0):
        super().__init__()
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.head_dim = cfg.head_dim
        q_width = cfg.n_head * cfg.head_dim
        kv_width = cfg.n_kv_head * cfg.head_dim
        self.q_proj = nn.Linear(cfg.n_embd, q_width, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.n_embd, kv_width, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.n_embd, kv_width, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(q_width, cfg.n_embd, bias=cfg.out_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.rotates = cfg.positions == "rope"
        self.query_gain = cfg.rope_attention**2  # YaRN's, for query and key at once
        if cfg.query_scale:  # every path multiplies by 1 / sqrt(D)
            self.query_gain *= cfg.query_scale * cfg.head_dim**0.5
        # the seam
        self.kv_path: nn.Module = DensePath(cfg.n_kv_head, cfg.head_dim, cfg.attention_cap, window)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D), k, v (B, Hkv, T, D) of x (B, T, n_embd), normed and rotated."""
        B, T, _ = x.shape
        D = self.head_dim
        q = self.q_proj(x).view(B, T, self.n_head, D)
        q = self.q_norm(q).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, D)
        k = self.k_norm(k).transpose(1, 2)  # (B, Hkv, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, D)
        v = v.transpose(1, 2)
        if self.query_gain != 1:
            q = q * self.query_gain
        if not self.rotates:
            return q, k, v
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def output(self, y: Tensor) -> Tensor:
        """y (B, H, T, D) -> (B, T, n_embd)."""
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, verb: str, cache=None, pad: Tensor | None = None
    ) -> Tensor:
        """Project x (B, T, n_embd), let the path read by its verb (forward, prefill or decode), and
        project back: (B, T, n_embd). pad (B,): leading columns of these T that are padding."""
        q, k, v = self.project(x, cos, sin)
        y = self.read(x, q, k, v, verb, cache, pad)
        return self.output(y)

    def read(self, x, q, k, v, verb: str, cache=None, pad: Tensor | None = None) -> Tensor:
        """Call the path's verb: (B, H, T, D)."""
        if verb == "forward":
            return self.kv_path(x, q, k, v, pad)
        if verb == "prefill":
            return self.kv_path.prefill(x, q, k, v, cache, pad)
        return self.kv_path.decode(x, q, k, v, cache, pad)


ACTIVATION = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = None
        if cfg.gated_mlp:
            self.gate_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=cfg.out_bias)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=cfg.out_bias)
        self.down_proj = nn.Linear(cfg.n_inner, cfg.n_embd, bias=cfg.out_bias)
        self.activation = ACTIVATION[cfg.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    """slides: whether its attention reads the newest cfg.sliding_window tokens only."""

    def __init__(self, cfg: ModelConfig, slides: bool = False):
        super().__init__()
        self.slides = slides
        self.input_layernorm = make_norm(cfg, cfg.n_embd)
        self.self_attn = Attention(cfg, cfg.sliding_window if slides else 0)
        self.post_attention_layernorm = make_norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg)
        # of what is written to the residual stream
        self.attn_out_norm = make_norm(cfg, cfg.n_embd) if cfg.post_norms else nn.Identity()
        self.mlp_out_norm = make_norm(cfg, cfg.n_embd) if cfg.post_norms else nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, verb: str, cache=None, pad: Tensor | None = None
    ) -> Tensor:
        h = self.input_layernorm(x)
        y = self.self_attn(h, cos, sin, verb, cache, pad)
        return self.feed(x + self.attn_out_norm(y))

    def feed(self, x: Tensor) -> Tensor:
        """Add what the MLP makes of x."""
        return x + self.mlp_out_norm(self.mlp(self.post_attention_layernorm(x)))

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do what forward does before the path reads: return what the path gets, (x, q, k, v)."""
        h = self.input_layernorm(x)
        return h, *self.self_attn.project(h, cos, sin)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Do what forward does with the path's y."""
        y = self.self_attn.output(y)
        return self.feed(x + self.attn_out_norm(y))


class Transformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.positions == "learned":
            self.embed_positions = nn.Embedding(cfg.block_size, cfg.n_embd)
        blocks = [Block(cfg, cfg.slides(i)) for i in range(cfg.n_layer)]
        self.layers = nn.ModuleList(blocks)
        self.norm = make_norm(cfg, cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # real on the CPU even while the parameters are built on the meta device
        cos, sin = rope_table(cfg)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        if cfg.rope_local_theta:  # the sliding layers' own
            local = replace(cfg, rope_theta=cfg.rope_local_theta, rope_factor=1.0)
            cos, sin = rope_table(local)
            self.register_buffer("rope_local_cos", cos, persistent=False)
            self.register_buffer("rope_local_sin", sin, persistent=False)
        self.apply(self._init)
        small = 0.02 / math.sqrt(2 * cfg.n_layer)
        for block in self.layers:  # residual branches start small, as in GPT-2
            nn.init.normal_(block.self_attn.o_proj.weight, std=small)
            nn.init.normal_(block.mlp.down_proj.weight, std=small)

    @staticmethod
    def _init(m: nn.Module) -> None:
        if isinstance(m, nn.Linear | nn.Embedding):
            nn.init.normal_(m.weight, std=0.02)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)

    def rope_tables(self) -> dict[str, Tensor]:
        """Return the tables of rotations by name."""
        return {name: t for name, t in self.named_buffers() if name.startswith("rope_")}

    def new_cache(self, batch: int, max_len: int, dtype: torch.dtype | None = None) -> KVCache:
        """Return an empty cache for `batch` sequences of at most max_len tokens.

        dtype: that of the weights, or under autocast the one computed in."""
        device = self.norm.weight.device.type
        if dtype is None:
            dtype = self.embed_tokens.weight.dtype
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
        like = self.norm.weight.new_empty(0, dtype=dtype)
        paths = [block.self_attn.kv_path for block in self.layers]
        caches = [path.new_cache(batch, max_len, like) for path in paths]
        share_copies(paths, caches)
        return KVCache(caches, self)

    def dense_bytes(self, n_tokens: int, cache: KVCache) -> int:
        """Count the bytes of all keys and values of n_tokens, kept whole in the dtype of `cache`:
        in a sliding layer, of those that its window holds."""
        n_sliding = sum(block.slides for block in self.layers)
        kept = n_tokens * (self.cfg.n_layer - n_sliding)
        if n_sliding:
            in_window = int(cache.lengths.clamp_max(self.cfg.sliding_window).sum())
            kept += min(n_tokens, in_window) * n_sliding
        width = self.cfg.n_kv_head * self.cfg.head_dim
        numbers = 2 * kept * width
        return numbers * cache.layers[0].dtype.itemsize

    def share_of_dense(self, n_tokens: int, cache: KVCache) -> float:
        """Return the bytes of `cache` over those of n_tokens kept whole, both with 16 bits for
        whole numbers."""
        numbers = self.dense_bytes(n_tokens, cache) // cache.layers[0].dtype.itemsize
        return cache.nbytes_in_16_bits() / (2 * numbers)

    def kv_losses(self) -> dict[str, Tensor]:
        """Return the paths' losses of the last training forward, the mean over layers by name."""
        found: dict[str, list[Tensor]] = {}
        for block in self.layers:
            for name, loss in block.self_attn.kv_path.losses.items():
                found.setdefault(name, []).append(loss)
        return {name: torch.stack(losses).mean() for name, losses in found.items()}

    def _check_context(self, n_tokens: int) -> None:
        if n_tokens > self.cfg.block_size:
            raise ValueError(
                f"{n_tokens} tokens: the model's context is {self.cfg.block_size}; "
                "shorten the text or raise --block_size"
            )

    def _check_room(self, cache: KVCache, T: int, n_pad: Tensor | None = None) -> int:
        """Return what to add to cache.length for T columns more. ValueError where they do not fit.
        Without padding the device is asked only where the host's bound is not enough to say."""
        new = T if n_pad is None else T - int(n_pad.min())
        if cache.length + new <= self.cfg.block_size:
            return new
        lengths = cache.lengths + T
        if n_pad is not None:
            lengths = lengths - n_pad
        longest = int(lengths.max())
        self._check_context(longest)
        return longest - cache.length

    def _embed(self, idx: Tensor, position: Tensor) -> Tensor:
        """Return embeddings (B, T, n_embd) of ids (B, T) at positions (B or 1, T)."""
        x = self.embed_tokens(idx)
        if self.cfg.embedding_scale != 1:  # rounded as x is, as in Gemma
            scale = torch.tensor(self.cfg.embedding_scale, dtype=x.dtype)
            x = x * scale
        if self.cfg.positions == "learned":
            x = x + self.embed_positions(position)
        return x

    def _rope(self, position: Tensor | slice) -> tuple[tuple, tuple]:
        """Return cos and sin, (B, 1, T, D/2) of positions (B, T) or (T, D/2) of a slice: a pair for
        layers that read everything, and one for those that slide."""

        def at(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            if isinstance(position, slice):
                return cos[position], sin[position]
            return cos[position].unsqueeze(1), sin[position].unsqueeze(1)

        far = at(self.rope_cos, self.rope_sin)
        if not self.cfg.rope_local_theta:
            return far, far
        return far, at(self.rope_local_cos, self.rope_local_sin)

    def _head(self, x: Tensor, last_only: bool) -> Tensor:
        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.norm(x))
        return soft_cap(logits, self.cfg.logit_cap)

    def forward(self, idx: Tensor, pad: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Return logits (B, T, vocab), or (B, 1, vocab) of the last column, without a cache.

        idx (B, T) int64 in [0, vocab); pad (B,): left padding of each row. ValueError past
        block_size. Ids are not range-checked here: loaders.tokenizer.check_ids does that."""
        T = idx.size(1)
        self._check_context(T)
        position = torch.arange(T, device=idx.device)[None]
        if pad is not None:
            position = (position - pad[:, None]).clamp_min(0)
        rope = self._rope(slice(T) if pad is None else position)
        x = self._embed(idx, position)
        for block in self.layers:
            x = block(x, *rope[block.slides], "forward", None, pad)
        return self._head(x, last_only)

    def prefill(
        self, idx: Tensor, cache: KVCache, n_pad: Tensor | None = None, last_only: bool = True
    ) -> Tensor:
        """Read a prompt, or a piece of one, into the cache: logits (B, 1, vocab) of its last
        column, or (B, T, vocab) of all.

        idx (B, T) int64, T >= 1; n_pad (B,): leading columns of these T that are padding. Where it
        fails half-way the cache is as it was before, so that it may be tried again."""
        cache.check_usable()
        T = idx.size(1)
        new = self._check_room(cache, T, n_pad)
        column = torch.arange(T, device=idx.device)
        if n_pad is not None:
            column = column - n_pad[:, None]
        position = (cache.lengths[:, None] + column).clamp_min(0)
        rope = self._rope(position)
        before = cache.snapshot()
        try:
            x = self._embed(idx, position)
            for block, layer in zip(self.layers, cache.layers, strict=True):
                x = block(x, *rope[block.slides], "prefill", layer, n_pad)
            cache.length += new
            return self._head(x, last_only)
        except BaseException:
            cache.restore(before)
            raise

    def decode(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Read one new token of every sequence, idx (B, 1), into the cache: logits (B, 1,
        vocab)."""
        cache.check_usable()
        new = self._check_room(cache, 1)
        try:
            logits = self.decode_step(idx, cache)
        except BaseException:
            cache.broken = True  # some layers have the token, others do not
            raise
        cache.length += new
        return logits

    def decode_step(
        self, idx: Tensor, cache: KVCache, before=Block.before, after=Block.after
    ) -> Tensor:
        """Do what decode does on the device, and nothing else: no host sync once room is reserved,
        so it can be captured in a CUDA graph. before, after: Block's own, or compiled."""
        position = cache.lengths[:, None]
        rope = self._rope(position)
        x = self._embed(idx, position)
        for block, layer in zip(self.layers, cache.layers, strict=True):
            h, q, k, v = before(block, x, *rope[block.slides])
            y = block.self_attn.read(h, q, k, v, "decode", layer)
            x = after(block, x, y)
        return self._head(x, last_only=True)


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
