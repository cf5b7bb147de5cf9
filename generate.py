"""Generation: prompts into a cache, then one token after the other.

    ids, cache = generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=20)
    cache.nbytes()

`prefill` reads a batch of prompts, a few rows at a time or long ones in pieces. `DecodeGraph`
captures the decode step in a CUDA graph where all paths allow it; what runs inside is
Transformer.decode_step, the same code that runs eagerly.

Letters: B sequences, T columns of a left-padded batch of prompts, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Block, RMSNorm, Transformer, evaluating
from settings.fields import check
from storage import fused
from storage.cache import KVCache
from storage.kernel_base import use_triton
from storage.layout import at_least_float32


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
def read_on(model: Transformer, idx: Tensor, cache: KVCache, at_once: int = 0) -> Tensor:
    """Read idx (B, T), which follows what a cache holds, into it: logits (B, V) after it. at_once:
    tokens processed at a time, 0 for all."""
    B, T = idx.shape
    for piece in idx.split(max(1, at_once // B) if at_once else T, 1):
        logits = model.prefill(piece, cache)[:, -1]
    return logits


@torch.no_grad()
def prefill(
    model: Transformer, idx: Tensor, max_len: int, pad: Tensor | None = None, at_once: int = 0
) -> tuple[Tensor, KVCache]:
    """Read prompts idx (B, T), the first pad (B,) columns of each row padding: logits (B, V) after
    them, and the cache that holds them, with room for max_len tokens.

    at_once: tokens processed at a time, 0 for all: fewer rows at a time, and a prompt that is
        longer in pieces

    A piece reads itself whole, and what came before as it is stored. Pieces are
    cut from the prompt's own first token on, so that padding changes nothing. A path that looks at
    a whole prompt (kv=select, mixSGA) gets whole rows."""
    B, T = idx.shape
    chunk = at_once or idx.numel()
    if not all(block.self_attn.kv_path.reads_pieces for block in model.layers):
        chunk = max(chunk, T)
    logits = []
    caches = []
    for rows in torch.arange(B).split(max(1, chunk // T)):
        part = idx[int(rows[0]) : int(rows[-1]) + 1]
        n_pad = None if pad is None else pad[int(rows[0]) : int(rows[-1]) + 1]
        if len(rows) == 1 and n_pad is not None:
            part = part[:, int(n_pad) :]
            n_pad = None
        cache = model.new_cache(len(rows), max_len)
        # several rows fit one piece, by the split above
        for piece in part.split(chunk, 1):
            last = model.prefill(piece, cache, n_pad)[:, -1]
        logits.append(last)
        caches.append(cache)
    return torch.cat(logits), KVCache.cat(caches)


def block_is_fused(block: Block) -> bool:
    """Say whether storage/fused.py does what this block does around attention: RMS norms before
    attention and MLP alone, rotated heads, an MLP gated by silu, weights without biases."""
    attention = block.self_attn
    mlp = block.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [block.input_layernorm, block.post_attention_layernorm]
    absent = (attention.q_norm, attention.k_norm, block.attn_out_norm, block.mlp_out_norm)
    D = attention.head_dim
    if not all(type(m) is nn.Linear and m.bias is None for m in linears):
        return False
    if not all(type(m) is RMSNorm for m in norms) or mlp.activation is not F.silu:
        return False
    if not all(isinstance(m, nn.Identity) for m in absent) or not attention.rotates:
        return False
    weight = mlp.down_proj.weight
    device = weight.device.type
    computed = weight.dtype
    if torch.is_autocast_enabled(device):
        computed = torch.get_autocast_dtype(device)
    dtypes = {m.weight.dtype for m in linears + norms}
    is_float = computed in (torch.float32, torch.bfloat16) and dtypes == {computed}
    by_kernel = use_triton("auto", weight.device, weight.dtype)
    return is_float and by_kernel and D >= 32 and D & (D - 1) == 0


class DecodeGraph:
    """Decode without the host: the whole step is one CUDA graph, replayed for every token.

    pick(logits (B, V), step (1,)) -> ids (B, 1) chooses the next tokens. The first two steps run as
    they are, to warm up. What lies between two attentions runs as four kernels a layer where
    block_is_fused says so; compiled: it goes through torch.compile instead. Room for n tokens is
    reserved."""

    WARM = 2
    # products with one row become reductions, fused with what is around
    TUNED = {"coordinate_descent_tuning": True, "combo_kernels": True}

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        idx: Tensor,
        pick: Callable[[Tensor, Tensor], Tensor],
        n: int,
        compiled: bool = False,
    ):
        self.model = model
        self.cache = cache
        self.idx = idx.clone()
        self.pick = pick
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.step = torch.ones(1, dtype=torch.int64, device=idx.device)
        self.before = Block.before
        self.after = Block.after
        if compiled:
            self.before = torch.compile(Block.before, dynamic=False, options=self.TUNED)
            self.after = torch.compile(Block.after, dynamic=False, options=self.TUNED)
        elif all(map(block_is_fused, model.layers)):
            self.before = fused.before
            self.after = fused.after
        cache.check_usable()
        cache.reserve(n)

    @staticmethod
    def possible(model: Transformer) -> bool:
        """Say whether every layer can be captured, on the device where the model is."""
        weight = model.norm.weight
        if not weight.is_cuda or weight.dtype == torch.float64:
            return False
        return all(block.self_attn.kv_path.graph_safe() for block in model.layers)

    def _once(self) -> None:
        logits = self.model.decode_step(self.idx, self.cache, self.before, self.after)
        self.idx.copy_(self.pick(logits[:, -1], self.step))
        self.step += 1

    @torch.no_grad()
    def next(self) -> Tensor:
        """Return the next token of every sequence, (B, 1), in a buffer that the following call
        overwrites. Raises ValueError where the model reads other coordinates by now."""
        self.cache.check_usable()
        if self.done < self.WARM:
            self._warm_up()
        elif self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._once()
            self.graph.replay()
        else:
            self.graph.replay()
            # a replay runs no Python: this is what append notes on the host
            for layer in self.cache.layers:
                layer.room -= 1
        self.done += 1
        self.cache.length += 1
        return self.idx

    def _warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._once()
        torch.cuda.current_stream().wait_stream(side)


def check_request(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    cache: KVCache | None,
    **flags,
) -> None:
    """Raise ValueError for an empty prompt, an id outside the vocabulary, a setting out of range,
    prompt + new tokens past the model's context, or prompts that cannot follow the cache."""
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: at least one token is needed; give some text")
    low = min(map(min, prompts))
    high = max(map(max, prompts))
    if low < 0 or high >= model.cfg.vocab_size:
        raise ValueError(
            f"token ids {low}..{high} in a prompt: "
            f"the vocabulary has 0..{model.cfg.vocab_size - 1}; use the model's own tokenizer"
        )
    check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens}", "at least 1", "correct it")
    for name in ("temperature", "top_k", "prefill_tokens"):
        check(flags[name] >= 0, f"{name}={flags[name]}", "at least 0", "correct it")
    check(0 < flags["top_p"] <= 1, f"top_p={flags['top_p']}", "within (0, 1]", "correct it")
    held = 0 if cache is None else cache.length
    T = max(map(len, prompts))
    if held + T + max_new_tokens > model.cfg.block_size:
        after = f" after {held}" if held else ""
        raise ValueError(
            f"a prompt of {T} tokens{after} and {max_new_tokens} new ones: the context is "
            f"{model.cfg.block_size}; shorten either"
        )
    if cache is None:
        return
    check(
        len(prompts) == len(cache.lengths),
        f"{len(prompts)} prompts after a cache of {len(cache.lengths)} sequences",
        "one for each",
        "give as many",
    )
    shortest = min(map(len, prompts))
    check(
        shortest == T,
        f"prompts of {shortest} to {T} tokens after a cache",
        "all of one length",
        "continue them one by one, or give no cache",
    )


def first_not_finite(model: Transformer, ids: list[int]) -> str:
    """Return the name of the first module whose output is not finite where the model reads these
    tokens anew, without a cache; "" where all outputs are."""
    parts = {"embed_tokens": model.embed_tokens, "norm": model.norm, "lm_head": model.lm_head}
    parts |= {f"layers.{n}": block for n, block in enumerate(model.layers)}
    found = []
    hooks = []
    for name, module in parts.items():

        def look(_module, _inputs, y: Tensor, name: str = name) -> None:
            if not y.isfinite().all():
                found.append(name)

        hooks.append(module.register_forward_hook(look))
    try:
        model(torch.tensor([ids], device=model.embed_tokens.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def not_finite(model: Transformer, prompts: list[list[int]]) -> ValueError:
    """Return the error that says where logits stop being numbers."""
    found = [name for name in (first_not_finite(model, p) for p in prompts) if name]
    where = "no layer's without a cache, so what is stored is damaged"
    if found:
        where = f"{found[0]} is the first whose output is not"
    return ValueError(
        f"the logits of a new token are not finite: {where}; check the weights, or compute in "
        "--dtype=float32"
    )


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | Collection[int] | None = None,
    prefill_tokens: int = 0,
    compiled: bool = False,
    cache: KVCache | None = None,
    on_token: Callable[[list[int]], object] | None = None,
) -> tuple[list[list[int]], KVCache]:
    """Continue every prompt: the new tokens of each row (without a stop token), and the cache used,
    which has read all of them but one that ended a row or came last.

    prompts: B non-empty lists of ids, of any lengths; they are padded on the left
    temperature: 0 is greedy
    seed: row b draws from its own stream seeded by (seed, b), so neither the batch around it nor
        its padding changes it
    stop: ids that end a row
    prefill_tokens: how many tokens of the prompts are processed at a time, 0 for all (see prefill)
    compiled: torch.compile around attention
    cache: what the prompts, all of one length, follow; it is filled further
    on_token: gets the new ids of all rows after each step, stop tokens included; where what it
        returns is true, no step follows

    On a GPU the steps are CUDA graphs where the storage has kernels (see DecodeGraph). ValueError:
    see check_request; and where logits stop being finite, with the first layer that does."""
    check_request(
        model,
        prompts,
        max_new_tokens,
        cache,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        prefill_tokens=prefill_tokens,
    )
    device = model.embed_tokens.weight.device
    B = len(prompts)
    T = max(map(len, prompts))
    pad = torch.tensor([T - len(p) for p in prompts], device=device)
    idx = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    draws = []
    for b in range(B):
        stream = torch.Generator().manual_seed(seed * 1_000_003 + b)
        draws.append(torch.rand(max_new_tokens, generator=stream))
    draws = torch.stack(draws).to(device)
    broken = torch.zeros((), dtype=torch.bool, device=device)

    def pick(logits: Tensor, step: Tensor) -> Tensor:  # (B, V), (1,) -> (B, 1)
        broken.logical_or_(~logits.isfinite().all())
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        cdf = sampling_probs(logits, temperature, top_k, top_p).double().cumsum(-1)  # (B, V)
        draw = draws.index_select(1, step).double() * cdf[:, -1:]
        return torch.searchsorted(cdf, draw, right=True).clamp_max(cdf.size(-1) - 1)

    stops = (stop,) if isinstance(stop, int) else tuple(stop or ())
    ends = torch.tensor(stops, dtype=torch.int64, device=device)
    with evaluating(model):
        if cache is None:
            padded = pad if pad.any() else None
            logits, cache = prefill(model, idx, T + max_new_tokens - 1, padded, prefill_tokens)
        else:
            cache.fit(T + max_new_tokens - 1)
            logits = read_on(model, idx, cache, prefill_tokens)
        next_ids = pick(logits, torch.zeros(1, dtype=torch.int64, device=device))
        if broken:
            raise not_finite(model, prompts)
        out = [next_ids]
        told_to_stop = on_token is not None and on_token(next_ids[:, 0].tolist())
        done = torch.isin(next_ids[:, 0], ends) if stops else None
        graph = None
        if DecodeGraph.possible(model) and max_new_tokens - 1 > DecodeGraph.WARM:
            graph = DecodeGraph(model, cache, next_ids, pick, max_new_tokens - 1, compiled)
        for step in range(1, max_new_tokens):
            if told_to_stop or (done is not None and done.all()):
                break
            if graph is not None:
                next_ids = graph.next().clone()
            else:
                logits = model.decode(next_ids, cache)[:, -1]
                next_ids = pick(logits, torch.tensor([step], device=device))
            if (graph is None or on_token is not None) and broken:
                raise not_finite(model, prompts)
            out.append(next_ids)
            told_to_stop = on_token is not None and on_token(next_ids[:, 0].tolist())
            if done is not None:
                done |= torch.isin(next_ids[:, 0], ends)
        if broken:
            raise not_finite(model, prompts)
    rows = torch.cat(out, 1).tolist()
    return [list(itertools.takewhile(lambda i: i not in stops, row)) for row in rows], cache
