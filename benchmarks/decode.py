"""Attention of one new token per sequence over a filled cache of one layer, as H query and Hkv KV
heads of the flags, block_size tokens, batch_size sequences.

Beside our kernel: its PyTorch reference, the masked path (full-size values times their mask),
PyTorch's fused attention over whole keys and values with each backend that runs, our own kernel
over whole ones. --from_keys adds the same bytes read as residuals of values predicted from keys, as
a decode step reads them (storage/from_keys.py). Every time is taken in turns with its peers', after
the results have been compared with float64; bytes are those of tensors that exist.

Letters: B sequences, H heads, Hkv KV heads, D head dimension, C context tokens, N = C + WINDOW."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import WINDOW, Case, parse_cases
from benchmarks.common import dtype_name, in_turns
from config import ModelConfig
from kernels import packed_attention
from loaders.device import device_name, in_bfloat16, pick_device
from measure_config import BenchConfig
from storage.from_keys import FromKeys, attend_predicted, attend_predicted_ref
from storage.layout import (
    PackedView,
    WindowView,
    cdiv,
    expand_mask,
    packed_attention_ref,
)
from storage.packed import PackedCache

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MOST_SETS = 8  # of data, in the memory of one comparison
COPY_ROUNDS = 11
SEGMENT_FIELDS = ("n", "token_base", "row_base", "mask_base", "tile_base")
QKV = tuple[Tensor, Tensor, Tensor]  # (B, H, 1, D), (B, Hkv, N, D), (B, Hkv, N, D)


@dataclass
class Entries:
    """What is timed: a list of calls on different data, and the bytes that one of them reads."""

    calls: dict[str, list[Callable]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, calls: list[Callable], held: int) -> None:
        self.calls[name] = calls
        self.held[name] = held

    @property
    def plain(self) -> tuple[str, ...]:
        """Entries that no CUDA graph can hold."""
        return tuple(n for n in self.calls if n.split()[0] in ("reference", "masked"))


def bench_decode(cfg: BenchConfig, c: ModelConfig) -> list[dict]:
    """Return the rows of `decode`: ours with their ratio to the fastest fused dense attention, then
    the peers."""
    device = pick_device(cfg.device)
    dtype = torch.bfloat16 if in_bfloat16(device, cfg.dtype) else torch.float32
    cases = parse_cases(cfg.cases, c.head_dim)
    shape = (cfg.batch_size, c.n_kv_head, c.block_size + WINDOW, c.head_dim)
    dense_bytes = 2 * torch.Size(shape).numel() * dtype.itemsize
    data = draw_sets(c.n_head, shape, dtype, device, n_sets(dense_bytes, device))
    copy = copy_gb_per_s(device)
    entries = Entries()
    q, k, v = data[0]
    check_kernel(q, None, whole_window(k, v), "dense")
    peers = [dense_peers(*d) for d in data]
    for name in peers[0]:
        entries.add(name, [p[name] for p in peers], dense_bytes)
    for case in cases:
        for fixed in case.forms():
            add_case(entries, case, fixed, data, dense_bytes)
            if cfg.from_keys and fixed and case.key_bits == 16:
                add_predicted(entries, case, data)
    ms = in_turns(entries.calls, cfg.steps, device, entries.plain)
    about = {
        "name": "decode",
        "shape": f"B{cfg.batch_size} T{c.block_size} H{c.n_head}/{c.n_kv_head} D{c.head_dim}",
        "dtype": dtype_name(dtype),
        "device": device_name(device),
    }
    return decode_rows(about, ms, entries.held, dense_bytes, copy)


# -------------------- data


def n_sets(dense_bytes: int, device: torch.device) -> int:
    """Return how many sets of data are read in turns: a set that was read long ago has left the L2
    cache, its packed part too."""
    to_fill_cache = 1
    if device.type == "cuda":
        wanted = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        to_fill_cache = max(1, cdiv(wanted, dense_bytes))
    return min(MOST_SETS, 4 * to_fill_cache)


def draw_sets(
    n_head: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, n: int
) -> list[QKV]:
    """Draw n sets of a query and of keys and values of `shape` (B, Hkv, N, D)."""
    B, _, _, D = shape
    torch.manual_seed(0)
    shapes = ((B, n_head, 1, D), shape, shape)
    return [tuple(torch.randn(s, device=device).to(dtype) for s in shapes) for _ in range(n)]


def copy_gb_per_s(device: torch.device) -> float:
    """Return the bandwidth of a large copy, bytes read and written."""
    n = 1 << 29 if device.type == "cuda" else 1 << 24
    x = torch.randn(n, device=device).to(torch.bfloat16)
    y = torch.empty_like(x)
    calls = {"copy": [lambda: torch.mul(x, 1, out=y)]}
    return 4 * n / in_turns(calls, COPY_ROUNDS, device)["copy"] / 1e6


def whole_window(k: Tensor, v: Tensor) -> WindowView:
    """View k, v (B, Hkv, N, D) as a window of N tokens, none of them packed."""
    B, _, N, _ = k.shape
    return WindowView(k, v, None, torch.full((B,), N, device=k.device))


# -------------------- what is timed


def dense_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable]:
    """Return attention over k, v (B, Hkv, N, D): our kernel over whole values, and PyTorch's fused
    one with each backend that takes them, the query heads of a group as they are, or as queries of
    one KV head."""
    B, Hkv, _, D = k.shape
    n = q.size(1) // Hkv
    window = whole_window(k, v)

    def as_heads() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=n > 1)

    def as_queries() -> Tensor:
        return F.scaled_dot_product_attention(q.view(B, Hkv, n, D), k, v).view(q.shape)

    peers = {"ours, dense": lambda: packed_attention(q, None, window)[0]}
    for name, backend in BACKENDS.items():
        for form, call in (("", as_heads), (" grouped", as_queries)):

            def run(call=call, backend=backend):
                with sdpa_kernel(backend):
                    return call()

            try:
                close = agree(run, peers["ours, dense"])
            except RuntimeError:
                continue  # the backend does not take this form
            assert close, f"SDPA {name}{form} and our dense kernel disagree"
            peers[f"SDPA {name}{form}"] = run
    return peers


def agree(run: Callable, ours: Callable) -> bool:
    """Say whether two attentions agree to bfloat16's precision. RuntimeError where `run` cannot
    run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each backend says why it will not
        return torch.allclose(run().float(), ours().float(), atol=2e-2, rtol=2e-2)


def add_case(entries: Entries, case: Case, fixed: bool, data: list[QKV], dense_bytes: int) -> None:
    """Fill a cache with each set, compare the kernel with float64, and add what reads them: the
    kernel on all sets, its reference and, without dropped tokens, the masked path on the first."""
    name = case.name(fixed)
    packed = []
    for i, (q, k, v) in enumerate(data):
        cache, mask = case.fill(k, v, fixed)
        view = cache.view()
        read = (q, view.packed[0], view.window)
        if i == 0:
            held = cache.nbytes()
            check_kernel(*read, name)
            if case.token_keep == 1:
                entries.add(f"masked {name}", [masked_attention(q, k, v, mask)], dense_bytes)
            entries.add(f"reference {name}", [partial(packed_attention_ref, *read)], held)
        packed.append(partial(packed_attention, *read))
    entries.add(f"packed {name}", packed, held)


def add_predicted(entries: Entries, case: Case, data: list[QKV]) -> None:
    """Add what reads the same caches as residuals of values predicted from keys: own heads by
    kernel on all sets, after a comparison with float64; on the first, own heads and all heads
    plainly."""
    name = case.name(True)
    _, Hkv, N, D = data[0][1].shape
    device = data[0][1].device
    own = drawn_maps((Hkv, D, D), D, N, device)
    joint = drawn_maps((Hkv * D, Hkv * D), D, N, device)
    by_kernel = []
    for i, (q, k, v) in enumerate(data):
        cache, _ = case.fill(k, v, True)
        if i == 0:
            held = cache.nbytes()
            check_predicted(q, cache, own, name)
            for which, of in (("own", own), ("all", joint)):
                plain = partial(read_predicted, q, cache, of, "torch")
                entries.add(f"reference {name} from {which} keys", [plain], held)
        by_kernel.append(partial(read_predicted, q, cache, own, "auto"))
    entries.add(f"packed {name} from own keys", by_kernel, held)


def read_predicted(q: Tensor, cache: PackedCache, maps: FromKeys, impl: str) -> Tensor:
    """Read a cache as a decode step does whose values are predicted from keys: (B, H, 1, D)."""
    view = cache.view()
    position = cache.packed_positions()
    return attend_predicted(q, view.packed[0], maps, position, impl=impl, window=view.window)[0]


def drawn_maps(shape: tuple[int, ...], D: int, n_positions: int, device: torch.device) -> FromKeys:
    """Draw maps of such a shape, as FromKeys.weight has it, and RoPE's tables."""
    weight = torch.randn(shape, device=device) / shape[-1] ** 0.5
    half = D // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angle = torch.arange(n_positions, device=device)[:, None] * frequency
    return FromKeys(weight, angle.cos(), angle.sin())


def check_predicted(q: Tensor, cache: PackedCache, maps: FromKeys, name: str) -> None:
    """Compare what attend_predicted gives of the packed part with values written out in float64, as
    check_kernel does, sequence by sequence."""
    packed = cache.view().packed[0]
    position = cache.packed_positions()
    got = attend_predicted(q, packed, maps, position)[0]
    plain = attend_predicted(q, packed, maps, position, impl="torch")[0]
    exact = packed._replace(keys=packed.keys.double(), rows=packed.rows.double())
    exact_maps = FromKeys(*(t.double() for t in maps))
    for b in range(q.size(0)):
        one = slice(b, b + 1)
        here = sequence_of(exact, b)
        want = attend_predicted_ref(q[one].double(), here, exact_maps, position)[0]
        check_error(got[one], plain[one], want, torch.finfo(q.dtype).eps, f"{name} from own keys")


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Callable:
    """Return attention over full-size values times their mask (B, Hkv, C, S)."""
    wide = expand_mask(F.pad(mask > 0, (0, 0, 0, WINDOW), value=True), v.size(-1))
    gqa = k.size(1) < q.size(1)
    return lambda: F.scaled_dot_product_attention(q, k, v * wide, enable_gqa=gqa)


# -------------------- the comparison with float64


def check_kernel(q: Tensor, packed: PackedView | None, window: WindowView, name: str) -> None:
    """Compare packed_attention with float64, sequence by sequence; AssertionError if its error is
    more than twice that of the plain version in the same dtype, plus one unit in the last place; of
    integers plus 100 of float32's, which long sums of codes and of middles, apart, may lose."""
    got = packed_attention(q, packed, window)[0]
    exact = packed
    if packed is not None and not packed.ints:
        exact = packed._replace(keys=packed.keys.double(), rows=packed.rows.double())
    units = torch.finfo(q.dtype).eps
    if packed is not None and packed.ints:
        units += 100 * torch.finfo(torch.float32).eps
    for b in range(q.size(0)):
        one = slice(b, b + 1)
        near = WindowView(*(None if t is None else t[one] for t in window))
        near_exact = near._replace(k=near.k.double(), v=near.v.double())
        want = packed_attention_ref(q[one].double(), sequence_of(exact, b), near_exact)[0]
        plain = packed_attention_ref(q[one], sequence_of(packed, b), near)[0]
        check_error(got[one], plain, want, units, name)


def check_error(got: Tensor, plain: Tensor, want: Tensor, units: float, name: str) -> None:
    """Raise AssertionError where `got` is further from `want` (float64) than twice `plain`, plus
    `units` of its largest number."""
    error = (got - want).abs().max().item()
    plain_error = (plain - want).abs().max().item()
    allowed = 2 * plain_error + units * want.abs().max().item()
    assert error <= allowed, (
        f"{name}: error {error:.3g} against float64, allowed {allowed:.3g}: its time would "
        "mean nothing"
    )


def sequence_of(packed: PackedView | None, b: int) -> PackedView | None:
    """View the b-th sequence of a packed part."""
    if packed is None:
        return None
    one = slice(b, b + 1)
    ints = packed.ints
    if ints:
        ints = ints._replace(block_base=ints.block_base[one])
    bases = {name: getattr(packed, name)[one] for name in SEGMENT_FIELDS}
    return packed._replace(ints=ints, **bases)


# -------------------- rows


def decode_rows(
    about: dict, ms: dict[str, float], held: dict[str, int], dense_bytes: int, copy: float
) -> list[dict]:
    """Return a row for each entry, ours first; copy: bandwidth of a copy in GB/s."""
    peer = min((name for name in ms if name.startswith("SDPA")), key=ms.get)
    rows = []
    for name in sorted(ms, key=lambda n: (not n.startswith("packed"), n)):
        rate = held[name] / ms[name] / 1e6
        rows.append(
            {
                **about,
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
