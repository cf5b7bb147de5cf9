"""The packed cache in bytes and in time: `bench.py decode | memory | generate`. Every time is taken
in turns with its peers', after the results have been compared with float64; bytes are those of
tensors that exist.

`decode`: attention of one new token per sequence over a filled cache of one layer, as H query and
Hkv KV heads of the flags, block_size tokens, batch_size sequences. Beside our kernel: its PyTorch
reference, the masked path (full-size values times their mask), PyTorch's fused attention over whole
keys and values with each backend that runs, our own kernel over whole ones. `memory`: what the
allocator gives for such caches, and how many sequences fit. `generate`: tokens per second of whole
models, packed and dense.

Letters: B sequences, H heads, Hkv KV heads, D head dimension, S groups, K kept of every token, C
context tokens."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kv_router
from config import BaseConfig, KVConfig, ModelConfig, SelectConfig, check, count_kept
from kernels import packed_attention
from loaders.device import device_name, in_bfloat16, pick_device, place
from loaders.runs import attach_storage, load_run
from measure_config import BenchConfig
from model import DenseCache, Steps, Transformer, evaluating, prefill
from reconstruct import spread
from storage.integers.cache import IntPackedCache, IntSelectedCache
from storage.integers.format import IntFormat
from storage.layout import top_k_mask
from storage.packed import PackedCache, SelectedCache
from storage.packing import select_top_m
from storage.views import Packed, Tail, packed_attention_ref

TAIL = 16  # whole tokens after the context
BLOCK = 64  # tokens whose keys share steps
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Case:
    """A setting S:value_keep:token_keep:key_bits:value_bits of --cases. Without dropped tokens and
    with a whole number of groups every token keeps K of them. value_bits 0: levels, a third of the
    kept groups at each, by their norms."""

    def __init__(self, text: str, head_dim: int):
        parts = text.split(":")
        parts += ["1", "16"][len(parts) - 2 :] if len(parts) in (2, 3) else []
        parts += parts[3:] if len(parts) == 4 else []
        try:
            S, value, token, key_bits, value_bits = parts
            self.S = int(S)
            self.value = float(value)
            self.token = float(token)
            self.key_bits = int(key_bits)
            self.value_bits = int(value_bits)
        except ValueError:
            raise ValueError(
                f"cases={text!r}: numbers between colons; give S:share of groups:share of "
                "tokens:bits of keys:of values, for example "
                "16:0.5:0.25, 4:1:1:4 or 8:0.9:0.4:4:0 (levels)"
            ) from None
        KVConfig(
            n_groups=self.S,
            topk_groups=1,
            kv="select",
            key_bits=self.key_bits,
            value_bits=self.value_bits,
        ).check_model(ModelConfig(n_head=1, n_kv_head=1, head_dim=head_dim))
        self.routed = not self.value_bits
        check(
            0 < self.value <= 1 and 0 < self.token <= 1,
            f"cases={text!r}",
            "shares lie in (0, 1]",
            "give for example 16:0.5:0.25",
        )

    def forms(self) -> list[bool]:
        """Of the two ways to store it, fixed K (True) and a counted number of groups per token,
        those that it allows."""
        if self.token < 1 or self.routed or not (self.value * self.S).is_integer():
            return [False]
        # all groups of a token need not be counted
        return [True, False] if self.value < 1 or self.key_bits == 16 else [True]

    def name(self, fixed: bool) -> str:
        groups = f"K={round(self.value * self.S)}" if fixed else f"rho={self.value:g}"
        bits = f" K{self.key_bits} V{self.value_bits or 'routed'}" if self.key_bits < 16 else ""
        return (
            f"S={self.S} {groups}" + ("" if self.token == 1 else f" tokens={self.token:g}") + bits
        )

    def fill(self, k: Tensor, v: Tensor, fixed: bool) -> tuple[PackedCache | SelectedCache, Tensor]:
        """A cache of k, v (B, Hkv, C + TAIL, D), the last TAIL tokens whole, and the mask (B, Hkv,
        C, S) of what it kept of the others."""
        (B, Hkv, N, D) = k.shape
        C = k.size(2) - TAIL
        norms = kv_router.group_energy(v[:, :, :C], self.S, Hkv)  # (B, Hkv, C, S)
        pad = torch.zeros(B, dtype=torch.int64, device=k.device)
        if fixed:
            K = round(self.value * self.S)
            mask = torch.cat([top_k_mask(n, K) for n in norms.split(1)])
            cfg = KVConfig(
                n_groups=self.S,
                topk_groups=K,
                kv_tail=TAIL,
                key_bits=self.key_bits,
                value_bits=self.value_bits,
                key_block=BLOCK,
                kv_sinks=0,
            )
            cache = (IntPackedCache if cfg.ints else PackedCache)(B, N, Hkv, D, cfg, K, k)
            groups = F.pad(mask, (0, 0, 0, TAIL), value=True)
            for a in range(0, N, 4096):
                part = slice(a, min(a + 4096, N))
                cache.columns += part.stop - a
                cache.append(k[:, :, part], v[:, :, part], groups[:, :, part], pad)
            return cache, mask
        kept = count_kept(self.token, C)
        per_head = torch.full((B, Hkv), kept, device=k.device)
        keep = (
            select_top_m(norms.sum(-1), per_head)
            if kept < C
            else torch.ones_like(norms[..., 0], dtype=torch.bool)
        )
        pairs = norms.masked_fill_(~keep.unsqueeze(-1), float("-inf")).flatten(-2)
        m = count_kept(self.value, self.S * kept)
        mask = (
            sum(
                select_top_m(pairs, per_head * 0 + m * i // 3).view(norms.shape).to(torch.uint8)
                for i in (3, 2, 1)
            )
            if self.routed
            else select_top_m(pairs, per_head * 0 + m).view(norms.shape)
        )
        cache = (
            SelectedCache(B, N, Hkv, D, self.S, Hkv, k)
            if self.key_bits == 16
            else IntSelectedCache(
                B,
                N,
                Hkv,
                D,
                self.S,
                Hkv,
                k,
                IntFormat(self.key_bits, self.value_bits, BLOCK, k.new_ones(Hkv, D).float()),
            )
        )
        cache.pack(
            k[:, :, :C],
            v[:, :, :C],
            keep,
            mask,
            torch.ones(B, C, dtype=torch.bool, device=k.device),
        )
        cache.append(k[:, :, C:], v[:, :, C:], pad)
        return cache, mask


def ideal_bytes(cache: PackedCache | SelectedCache) -> int:
    """Bytes of the keys and kept values alone, tail included."""
    return sum(
        t.numel() * t.element_size() for t in (cache.keys, cache.rows, cache.tail_k, cache.tail_v)
    )


def in_turns(
    calls: dict[str, list[Callable]], rounds: int, device: torch.device, plain: tuple[str, ...] = ()
) -> dict[str, float]:
    """Median milliseconds of one call of each entry, a list of calls on different data, taken in
    turns. On a GPU a list is one CUDA graph, so that launches cost what they cost in decoding;
    entries named in `plain` ask the host, run as they are, and only in three rounds."""
    runs = {}
    out = {name: [] for name in calls}
    for name, fs in calls.items():
        runs[name] = lambda fs=fs: [f() for f in fs] and None
        runs[name]()
        if device.type == "cuda" and name not in plain:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                runs[name]()
            runs[name] = graph.replay
            graph.replay()
    for i in range(rounds):
        for name, run in runs.items():
            # in a row, so that the graph's own launch does not count
            times = 1 if name in plain else -(-8 // len(calls[name]))
            if name in plain and i >= 3:
                continue
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                for _ in range(times):
                    run()
                end.record()
                torch.cuda.synchronize()
                ms = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                for _ in range(times):
                    run()
                ms = 1e3 * (time.perf_counter() - start)
            out[name].append(ms / len(calls[name]) / times)
    return {name: median(ms) for name, ms in out.items()}


def copy_gb_per_s(device: torch.device) -> float:
    """Bandwidth of a large copy, bytes read and written."""
    x = torch.randn((1 << 29) if device.type == "cuda" else (1 << 24), device=device).to(
        torch.bfloat16
    )
    y = torch.empty_like(x)
    return (
        4
        * x.numel()
        / in_turns({"copy": [lambda: torch.mul(x, 1, out=y)]}, 11, device)["copy"]
        / 1e6
    )


def check_kernel(q: Tensor, packed: Packed | None, tail: Tail, name: str) -> None:
    """Compare packed_attention with float64, sequence by sequence; AssertionError if its error is
    more than twice that of the plain version in the same dtype, plus one unit in the last place."""
    got = packed_attention(q, packed, tail)[0]
    wide = (
        packed
        if packed is None or packed.ints
        else packed._replace(keys=packed.keys.double(), rows=packed.rows.double())
    )

    def of(p: Packed | None, b: int) -> Packed | None:
        ints = p and p.ints and p.ints._replace(block_base=p.ints.block_base[b : b + 1])
        return p and p._replace(
            ints=ints,
            **{
                f: getattr(p, f)[b : b + 1]
                for f in ("n", "token_base", "row_base", "mask_base", "tile_base")
            },
        )

    for b in range(q.size(0)):
        near = Tail(*(t[b : b + 1] for t in tail))
        want = packed_attention_ref(
            q[b : b + 1].double(), of(wide, b), near._replace(k=near.k.double(), v=near.v.double())
        )[0]
        plain = packed_attention_ref(q[b : b + 1], of(packed, b), near)[0]
        error, allowed = ((x - want).abs().max().item() for x in (got[b : b + 1], plain))
        allowed = 2 * allowed + torch.finfo(q.dtype).eps * want.abs().max().item()
        assert error <= allowed, (
            f"{name}: error {error:.3g} against float64, allowed {allowed:.3g}: its time would "
            "mean nothing"
        )


def dense_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable]:
    """PyTorch's fused attention over k, v (B, Hkv, N, D), with each backend that takes them: the
    query heads of a group as they are, or as queries of one KV head; and our kernel over whole
    values."""
    (B, Hkv, N, D) = k.shape
    n = q.size(1) // k.size(1)
    whole = Tail(k, v, *torch.tensor([[0], [N]], device=k.device).expand(-1, B).contiguous())
    peers = {"ours, dense": lambda: packed_attention(q, None, whole)[0]}
    for name, backend in BACKENDS.items():
        for form, call in (
            ("", lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=n > 1)),
            (
                " grouped",
                lambda: F.scaled_dot_product_attention(q.view(B, Hkv, n, D), k, v).view(q.shape),
            ),
        ):

            def run(call=call, backend=backend):
                with sdpa_kernel(backend):
                    return call()

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # each backend says why it will not
                    close = torch.allclose(
                        run().float(), peers["ours, dense"]().float(), atol=2e-2, rtol=2e-2
                    )
            except RuntimeError:
                continue
            assert close, f"SDPA {name}{form} and our dense kernel disagree"
            peers[f"SDPA {name}{form}"] = run
    return peers


def bench_decode(cfg: BenchConfig, c: ModelConfig) -> list[dict]:
    """Rows of `decode`: ours with their ratio to the fastest fused dense attention, then the
    peers."""
    device = pick_device(cfg.device)
    dtype = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    cases = [Case(t, c.head_dim) for t in cfg.cases.split(",")]
    B = cfg.batch_size
    H = c.n_head
    Hkv = c.n_kv_head
    D = c.head_dim
    C = c.block_size
    dense_bytes = 2 * B * Hkv * (C + TAIL) * D * dtype.itemsize
    sets = (
        max(1, -(-4 * torch.cuda.get_device_properties(device).L2_cache_size // dense_bytes))
        if device.type == "cuda"
        else 1
    )
    # a set that was read long ago has left the L2 cache, its packed part too
    sets = min(8, 4 * sets)
    torch.manual_seed(0)
    data = [
        tuple(
            torch.randn(B, h, t, D, device=device).to(dtype)
            for h, t in ((H, 1), (Hkv, C + TAIL), (Hkv, C + TAIL))
        )
        for _ in range(sets)
    ]
    common = {
        "name": "decode",
        "shape": f"B{B} T{C} H{H}/{Hkv} D{D}",
        "dtype": str(dtype).split(".")[1],
        "device": device_name(device),
    }
    copy = copy_gb_per_s(device)
    rows = []
    check_kernel(
        data[0][0],
        None,
        Tail(
            *data[0][1:], *torch.tensor([[0], [C + TAIL]], device=device).expand(-1, B).contiguous()
        ),
        "dense",
    )
    lists = [dense_peers(*d) for d in data]
    calls = {name: [peers[name] for peers in lists] for name in lists[0]}
    held = dict.fromkeys(calls, dense_bytes)
    for case in cases:
        for fixed in case.forms():
            name = case.name(fixed)
            caches = []
            for i, (q, k, v) in enumerate(data):
                cache, mask = case.fill(k, v, fixed)
                if i == 0:
                    check_kernel(q, cache.packed(), cache.whole(), name)
                    if case.token == 1:
                        wide = spread(F.pad(mask > 0, (0, 0, 0, TAIL), value=True), D)
                        calls[f"masked {name}"] = [
                            lambda q=q, k=k, v=v, m=wide: F.scaled_dot_product_attention(
                                q, k, v * m, enable_gqa=Hkv < H
                            )
                        ]
                        held[f"masked {name}"] = dense_bytes
                    calls[f"reference {name}"] = [
                        lambda q=q, c=cache: packed_attention_ref(q, c.packed(), c.whole())
                    ]
                    held[f"reference {name}"] = cache.nbytes()
                caches.append(cache)
            calls[f"packed {name}"] = [
                lambda q=d[0], p=c.packed(), t=c.whole(): packed_attention(q, p, t)
                for d, c in zip(data, caches, strict=True)
            ]
            held[f"packed {name}"] = caches[0].nbytes()
    slow = tuple(n for n in calls if n.split()[0] in ("reference", "masked"))
    ms = in_turns(calls, cfg.steps, device, slow)
    peer = min((n for n in ms if n.startswith("SDPA")), key=ms.get)
    for name in sorted(ms, key=lambda n: (not n.startswith("packed"), n)):
        rate = held[name] / ms[name] / 1e6
        rows.append(
            {
                **common,
                "impl": name,
                "peer": peer,
                "ms": round(ms[name], 4),
                "bytes": held[name],
                "bytes_kept": round(held[name] / dense_bytes, 4),
                "of_copy": round(rate / copy, 3),
                "gb_per_s": round(rate, 3),
                "copy_gb_per_s": round(copy),
                "ratio": round(ms[name] / ms[peer], 4),
            }
        )
    return rows


def bench_memory(cfg: BenchConfig, c: ModelConfig) -> list[dict]:
    """Rows of `memory`: what the allocator holds for one layer's cache of batch_size sequences, and
    how many sequences fit into --memory_gb, allocated one by one until it is full."""
    device = pick_device(cfg.device)
    dtype = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    B = cfg.batch_size
    Hkv = c.n_kv_head
    D = c.head_dim
    N = c.block_size + TAIL
    k, v = (torch.randn(B, Hkv, N, D, device=device).to(dtype) for _ in range(2))

    def dense(k: Tensor, v: Tensor) -> DenseCache:
        cache = DenseCache(k.size(0), N, Hkv, D, k)
        cache.append(k, v)
        return cache

    def measured(make: Callable) -> tuple[int, int, int]:
        """Bytes the allocator gave for make(k, v), the bytes the cache says, and how many sequences
        fit."""

        def taken(*held) -> int:
            gc.collect()
            return (
                torch.cuda.memory_allocated(device)
                if device.type == "cuda"
                else sum(h.nbytes() for h in held)
            )

        make(k[:1], v[:1])  # what a first call leaves behind is not the cache's
        before = taken()
        cache = make(k, v)
        bytes_ = taken(cache) - before
        said = cache.nbytes()
        del cache
        kept = []
        before = taken()
        while taken(*kept) - before <= cfg.memory_gb * 2**30:
            kept.append(make(k[:1], v[:1]))
        return bytes_, said, len(kept) - 1

    dense_bytes, _, dense_fit = measured(dense)
    rows = []
    common = {
        "name": "memory",
        "shape": f"B{B} T{c.block_size} Hkv{Hkv} D{D}",
        "dtype": str(dtype).split(".")[1],
        "device": device_name(device),
    }
    for case in (Case(t, D) for t in cfg.cases.split(",")):
        for fixed in case.forms():
            bytes_, said, fit = measured(
                lambda k, v, case=case, fixed=fixed: case.fill(k, v, fixed)[0]
            )
            ideal = ideal_bytes(case.fill(k, v, fixed)[0])
            rows.append(
                {
                    **common,
                    "impl": f"packed {case.name(fixed)}",
                    "peer": "dense",
                    "bytes": bytes_,
                    "bytes_said": said,
                    "over_keys_and_values": round(bytes_ / ideal - 1, 4),
                    "ratio": round(bytes_ / dense_bytes, 4),
                    "sequences": fit,
                    "sequences_dense": dense_fit,
                    "times_more": round(fit / max(1, dense_fit), 3),
                    "memory_gb": cfg.memory_gb,
                }
            )
    return rows


def bench_generate(
    cfg: BenchConfig, c: ModelConfig, base: BaseConfig, kv: KVConfig, select: SelectConfig
) -> list[dict]:
    """Rows of `generate`: decoding after prompts of block_size - new_tokens tokens, packed by --kv
    and dense, as CUDA graphs in turns, and token by token without them."""
    device = pick_device(cfg.device)
    check(
        device.type == "cuda",
        f"generate on {device.type}",
        "CUDA graphs are measured",
        "run it on a GPU",
    )
    check(
        cfg.new_tokens > 2 * Steps.WARM + cfg.steps,
        f"new_tokens={cfg.new_tokens} with steps={cfg.steps}",
        "too few to time",
        "give more",
    )
    weights = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    options = {**base.options(cfg.out_dir), "weights": str(weights).split(".")[1]}
    made = {}
    for name in ("packed", "dense"):
        if cfg.out_dir or base.init_from != "scratch":
            model = load_run(base.place(cfg.out_dir), device, **options).model
        else:
            torch.manual_seed(0)
            model = place(Transformer(c), device, weights).eval()
        if name == "packed" and kv.kv != "dense" and not cfg.out_dir:
            seen = [
                torch.randint(
                    0, model.cfg.vocab_size, (2, min(256, model.cfg.block_size)), device=device
                )
            ]
            kv_router.fold(attach_storage(model, kv, select, seen))
        elif name == "dense" and cfg.out_dir:
            # any weights take the same time
            model = place(Transformer(model.cfg), device, weights).eval()
        made[name] = model
    m = made["packed"].cfg
    T = (
        min(c.block_size if c.block_size > cfg.new_tokens else m.block_size, m.block_size)
        - cfg.new_tokens
    )
    torch.manual_seed(0)
    idx = torch.randint(0, m.vocab_size, (cfg.batch_size, T), device=device)
    common = {
        "name": "generate",
        "peer": "dense",
        "dtype": str(weights).split(".")[1],
        "device": device_name(device),
        "shape": (
            f"B{cfg.batch_size} T{T} L{m.n_layer} d{m.n_embd} H{m.n_head}/{m.n_kv_head} "
            f"D{m.head_dim}"
        ),
    }
    steps = {}
    about = {}
    with evaluating(made["packed"]), evaluating(made["dense"]), torch.no_grad():
        for name, model in made.items():
            prefill(model, idx[:1], T + cfg.new_tokens, None, cfg.prefill_tokens)  # warm
            torch.cuda.synchronize()
            start = time.perf_counter()
            logits, cache = prefill(model, idx, T + cfg.new_tokens, None, cfg.prefill_tokens)
            torch.cuda.synchronize()
            read = time.perf_counter() - start
            check(
                Steps.possible(model),
                f"{name} storage",
                "it has no kernels to step with",
                "choose another reconstructor",
            )
            first = logits.argmax(-1, keepdim=True)
            s = Steps(
                model,
                cache,
                first,
                lambda logits, _: logits.argmax(-1, keepdim=True),
                cfg.new_tokens,
                cfg.compile,
            )
            bytes_ = cache.nbytes()
            start = time.perf_counter()
            for _ in range(Steps.WARM + 1):
                s.next()
            torch.cuda.synchronize()
            steps[name] = s
            about[name] = {
                "bytes": bytes_,
                "prefill_s": round(read, 3),
                "capture_s": round(time.perf_counter() - start, 3),
            }
        n = cfg.new_tokens - Steps.WARM - 1 - 8
        times = {name: [] for name in steps}
        for a in range(0, n, max(1, n // 8)):
            for name, s in steps.items():
                count = min(max(1, n // 8), n - a)
                start = time.perf_counter()
                for _ in range(count):
                    s.next()
                torch.cuda.synchronize()
                times[name].append((time.perf_counter() - start) / count)
        for name, s in steps.items():  # without graphs: launches and all
            token = s.idx
            for i in range(7):
                if i == 2:  # the first ones compile
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                token = made[name](token, s.cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
            torch.cuda.synchronize()
            about[name]["eager_tokens_per_s"] = round(
                5 * cfg.batch_size / (time.perf_counter() - start), 1
            )
    rows = []
    for name in steps:
        rows.append(
            {
                **common,
                "impl": name
                if name == "dense"
                else f"packed {kept_name(kv, select) if not cfg.out_dir else cfg.out_dir}",
                "ms": round(1e3 * median(times[name]), 4),
                "ratio": round(median(times[name]) / median(times["dense"]), 4),
                "tokens_per_s": round(cfg.batch_size / median(times[name]), 1),
                "bytes_of_dense": round(about[name]["bytes"] / about["dense"]["bytes"], 4),
                "compiled": cfg.compile,
                **about[name],
            }
        )
    return rows


def kept_name(kv: KVConfig, select: SelectConfig) -> str:
    """What a storage keeps, in words."""
    kept = (
        f"S={kv.n_groups} K={kv.topk_groups} tail={kv.kv_tail}"
        if kv.kv == "value_groups"
        else f"{kv.kv} S={kv.n_groups} {select.described()}"
    )
    return kept + f" K{kv.key_bits} V{kv.value_bits}" * kv.ints
