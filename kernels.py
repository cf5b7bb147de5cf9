"""Triton kernels for decoding: store one token, and attend to what a cache holds.

Decoding reads the whole cache for every token, so its speed is that of memory: bytes that are not
stored need not be read. A value is cut into S groups of d = D/S numbers, of each token only some
groups are kept, and kept groups ("rows") lie without gaps (storage/layout.py). Attention over them
is attention in which a dropped group counts as zeros,

    out = sum_t p_t z_t,    p = softmax(q . k_t / sqrt(D))                                       (1)

and group g of token t is read from where it lies,

    row(t, g) = row_base + offset(t) + popcount(mask_t & ((1 << g) - 1))                         (2)

so no program ever sees a gap: it loads a mask, counts bits, and loads as many bytes as are kept.
One new token has few queries, and the tokens of one head would keep one program busy while the rest
of the GPU waits. So tokens are cut into pieces, one to a program, each of which leaves the largest
logit m it saw, den = sum_t 2^(s_t - m) and acc = sum_t 2^(s_t - m) z_t (logits s in units of log 2,
since exp2 is what a GPU has). Pieces i are joined by their largest logit m:

    out = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) den_i                                      (3)

    q = torch.randn(1, 1, 1, 16)
    k, v = torch.randn(2, 1, 1, 3, 16)                     # one sequence, one head, three tokens
    window = WindowView(k.clone(), v.clone(), None, torch.tensor([2]))
    append_window(window, k[:, :, 2:], v[:, :, 2:])        # now it holds three
    packed = PackedView.of_whole(k, v, torch.tensor([[3]]))
    out, lse = packed_attention(q, packed, window)         # each token twice: the same mean
    want = (q @ k.mT / 16**0.5).softmax(-1) @ v

Integers are read in storage/integers/attention.py, how tokens are cut into pieces is written in
storage/pieces.py, `impl` is explained in storage/kernel_base.py, letters in storage/layout.py.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from storage.append import append_packed, can_append
from storage.cpu import packed_attention_cpu
from storage.kernel_base import (
    capped,
    dense_rows,
    jit,
    load_masks,
    load_rows,
    product,
    tl,
    triton,
    use_triton,
)
from storage.layout import (
    PackedView,
    WindowView,
    at_least_float32,
    merge_softmax,
    packed_attention_ref,
)
from storage.pieces import Variant, attend_in_pieces, find_piece, segment_pieces, store_rows

__all__ = ["append_packed", "append_window", "attend_view", "can_append", "packed_attention"]

# -------------------- the smallest kernel: store one token


@jit
def _append_window_kernel(
    k_ptr,
    v_ptr,
    window_k_ptr,
    window_v_ptr,
    first_ptr,
    count_ptr,
    Hkv,
    W,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Store the new token of one sequence; HEADS, DIMS: powers of 2 that hold its heads and D."""
    b = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    there = (head < Hkv) & (dim < D)
    count = tl.load(count_ptr + b)
    first = 0 if first_ptr is None else tl.load(first_ptr + b)
    slot = (first + count) % W
    to = ((b * Hkv + head) * W + slot) * D + dim
    k = tl.load(k_ptr + b * k_stride_b + head * k_stride_h + dim, mask=there)
    v = tl.load(v_ptr + b * v_stride_b + head * v_stride_h + dim, mask=there)
    tl.store(window_k_ptr + to, k, mask=there)
    tl.store(window_v_ptr + to, v, mask=there)
    tl.debug_barrier()  # every warp has read the count before one of them raises it
    tl.store(count_ptr + b, count + 1)


def append_window(window: WindowView, k: Tensor, v: Tensor, impl: str = "auto") -> None:
    """Store one token per sequence, k, v (B, Hkv, 1, D), behind the newest one of `window`, in slot
    (first + count) % W, and raise count by one in place, all on the device."""
    B, Hkv, _, D = k.shape
    W = window.k.size(2)
    if not use_triton(impl, k.device, k.dtype):
        slot = window.count if window.first is None else window.first + window.count
        b = torch.arange(B, device=k.device)
        window.k[b, :, slot % W] = k[:, :, 0]
        window.v[b, :, slot % W] = v[:, :, 0]
        window.count.add_(1)
        return
    k = dense_rows(k)
    v = dense_rows(v)
    _append_window_kernel[(B,)](
        k,
        v,
        window.k,
        window.v,
        window.first,
        window.count,
        Hkv,
        W,
        *k.stride()[:2],
        *v.stride()[:2],
        D=D,
        HEADS=triton.next_power_of_2(Hkv),
        DIMS=triton.next_power_of_2(D),
        num_warps=1 if Hkv * D <= 1024 else 4,
    )


# -------------------- attention: pieces of the kernel


@jit
def load_queries(q_ptr, b, h, row, n, T, q_stride_b, q_stride_h, q_stride_t, D, DP: tl.constexpr):
    """Load rows `row` (M,) of the queries of KV head h: (M, DP), zeros past the last and past D.

    Row r of T n is query r // n of head r % n of those that share the KV head (% T, so that the
    compiler sees zeros where T = 1)."""
    dim = tl.arange(0, DP)[None, :]
    there = (row < T * n)[:, None] & (dim < D)
    q_ptr += b * q_stride_b
    at = (h * n + row % n)[:, None] * q_stride_h + (row // n % T)[:, None] * q_stride_t + dim
    return tl.load(q_ptr + at, mask=there, other=0.0)


@jit
def softmax_weights(logits, m, den):
    """Weigh a block of N tokens beside those before it.

    logits (M, N) in units of log 2, -inf for what is not read; m, den (M,) as in softmax_step
    Returns m and den with the block in them, its weights (M, N), and what those of all earlier
    tokens are to be multiplied by, (M,)."""
    top = tl.maximum(m, tl.max(logits, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing has been read yet
    p = tl.exp2(logits - base[:, None])
    alpha = tl.exp2(m - base)
    return top, den * alpha + tl.sum(p, 1), p, alpha


@jit
def softmax_step(logits, values, m, den, acc):
    """Add a block of N tokens to a running softmax.

    logits (M, N) in units of log 2, -inf for what is not read; values (N, DP)
    m, den (M,), acc (M, DP): largest logit so far, sum of weights, weighted values
    Returns m, den, acc with the block in them."""
    m, den, p, alpha = softmax_weights(logits, m, den)
    return m, den, product(p.to(values.dtype), values, acc * alpha[:, None])


@jit
def read_window(
    x,
    m,
    den,
    acc,
    k_ptr,
    v_ptr,
    row,
    start,
    end,
    first,
    count,
    W,
    n,
    T,
    scale,
    D: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    STAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let queries x (M, DP) read the slots start to end of one head's window: softmax_step for each
    N of them. Query i of T sees the tokens up to its own, the T newest being theirs."""
    dim = tl.arange(0, DP)[None, :]
    for t0 in tl.range(start, end, N, num_stages=STAGES):
        t = t0 + tl.arange(0, N)
        number = (t - first + W) % W  # of the token in the slot, oldest 0
        live = (t < end) & (number < count)
        there = live[:, None] & (dim < D)
        key = tl.load(k_ptr + t[:, None] * D + dim, mask=there, other=0.0)
        value = tl.load(v_ptr + t[:, None] * D + dim, mask=there, other=0.0)
        seen = live[None, :] & (number[None, :] <= count - T + (row // n % T)[:, None])
        none = tl.zeros([x.shape[0], N], tl.float32)
        logits = capped(product(x, tl.trans(key), none) * scale, CAP)
        logits = tl.where(seen, logits, float("-inf"))
        m, den, acc = softmax_step(logits, value, m, den, acc)
    return m, den, acc


# -------------------- attention: the kernel


@jit
def _attention_kernel(
    q_ptr,
    keys_ptr,
    rows_ptr,
    bits_ptr,
    before_ptr,
    tile_rows_ptr,
    n_packed_ptr,
    token_base_ptr,
    row_base_ptr,
    mask_base_ptr,
    tile_base_ptr,
    window_k_ptr,
    window_v_ptr,
    first_ptr,
    count_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_ml_ptr,
    scale,
    segments,
    Hkv,
    Hm,
    n,
    T,
    W,
    chunk,
    parts,
    n_stride_b,
    n_stride_h,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    SEGS: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let M rows of queries read one piece of one segment: packed tokens, then slots of the window,
    N at a time. DP: D rounded up to a power of 2. ALIGN: the power of 2 that divides d."""
    seg, piece = find_piece(
        n_packed_ptr,
        first_ptr,
        count_ptr,
        segments,
        Hkv,
        n_stride_b,
        n_stride_h,
        W,
        chunk,
        N,
        SEGS,
    )
    if SEGS > 0:  # noqa: SIM102 (known when compiling)
        if seg >= segments:
            return
    b = seg // Hkv
    h = seg % Hkv
    mask_seg = b * Hm + (h if Hm > 1 else 0)
    keys_ptr += tl.load(token_base_ptr + seg) * D
    rows_ptr += tl.load(row_base_ptr + seg) * (D // S)
    mask_base = tl.load(mask_base_ptr + mask_seg)
    bits_ptr += mask_base
    if K == 0:
        before_ptr += mask_base
        tile_rows_ptr += tl.load(tile_base_ptr + mask_seg)
    n_packed, n_slots, first, count, behind, size, active = segment_pieces(
        n_packed_ptr,
        first_ptr,
        count_ptr,
        seg,
        segments,
        Hkv,
        n_stride_b,
        n_stride_h,
        W,
        chunk,
        N,
    )
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if piece >= active:
            return
    row = tl.program_id(2) * M + tl.arange(0, M)
    x = load_queries(q_ptr, b, h, row, n, T, q_stride_b, q_stride_h, q_stride_t, D, DP)
    m = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    none = tl.zeros([M, N], tl.float32)

    dim = tl.arange(0, DP)[None, :]
    in_dim = dim < D
    start = piece * size
    end = tl.minimum((piece + 1) * size, n_packed)
    bits, offset = load_masks(
        bits_ptr, before_ptr, tile_rows_ptr, start + tl.arange(0, N), end, K, TILE
    )
    for t0 in tl.range(start, end, N, num_stages=STAGES):
        t = t0 + tl.arange(0, N)
        live = t < end
        if K > 0:
            offset = t * K
        key = tl.load(
            keys_ptr + t[:, None] * D + dim,
            mask=live[:, None] & in_dim,
            other=0.0,
            eviction_policy="evict_first",
        )
        logits = capped(product(x, tl.trans(key), none) * scale, CAP)
        logits = tl.where(live[None, :], logits, float("-inf"))
        value = load_rows(rows_ptr, bits, offset, D, S, DP, ALIGN)
        # Masks of the next block, while this one's values are on their way.
        bits, offset = load_masks(bits_ptr, before_ptr, tile_rows_ptr, t + N, end, K, TILE)
        m, den, acc = softmax_step(logits, value, m, den, acc)

    m, den, acc = read_window(
        x,
        m,
        den,
        acc,
        window_k_ptr + seg.to(tl.int64) * W * D,
        window_v_ptr + seg.to(tl.int64) * W * D,
        row,
        tl.maximum(piece * size - behind, 0),
        tl.minimum((piece + 1) * size - behind, n_slots),
        first,
        count,
        W,
        n,
        T,
        scale,
        D,
        N,
        DP,
        STAGES,
        CAP,
    )
    place = tl.program_id(0) if SEGS > 0 else seg * parts + piece
    store_rows(
        out_ptr,
        lse_ptr,
        part_ptr,
        part_ml_ptr,
        m,
        den,
        acc,
        seg,
        place,
        row,
        n,
        T,
        D,
        DP,
        SPLIT,
        D,
    )


# -------------------- attention: how it is launched


def query_rows(q: Tensor, rows: int) -> int:
    """Choose how many of the rows of queries a program takes: a product has 16 at least."""
    return min(16 if q.dtype == torch.float32 else 64, max(16, triton.next_power_of_2(rows)))


def _float_variant(q: Tensor, packed: PackedView, rows: int) -> Variant:
    """Choose blocks, warps and stages by what an H100 likes (docs/log.md)."""
    D = q.size(-1)
    d = D // packed.n_groups
    M = query_rows(q, rows)
    DP = max(16, triton.next_power_of_2(D))
    if q.dtype == torch.float32:
        N, warps, stages = 16, 4, 1
    elif M == 16 and DP <= 128:
        N, warps, stages = 32, 1, 1
    else:
        N, warps, stages = 64, 4, 2
    constants = dict(
        D=D,
        S=packed.n_groups,
        K=packed.k,
        TILE=packed.tile,
        M=M,
        N=N,
        DP=DP,
        ALIGN=d & -d,
        STAGES=stages,
    )
    return Variant(_attention_kernel, M, N, warps, constants, {})


def packed_attention(
    q: Tensor,
    packed: PackedView | None,
    window: WindowView | None,
    impl: str = "auto",
    chunk: int = 0,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Let the newest T tokens' queries read packed tokens, all older than they, and a window that
    ends with those T. One of packed and window may be None.

    q      (B, H, T, D); float64, D > 256 and what wants a gradient go to the reference
    chunk: tokens of a piece, 0: as many as let all programs run at a time
    cap:   a logit s = q . k / sqrt(D) becomes cap * tanh(s / cap); 0: as it is
    Returns out (B, H, T, D) like q, and lse (B, H, T) float32 (float64 of float64): the log of the
    sum of exp(s). Where there is nothing to read out is 0 and lse -inf."""
    if (
        not use_triton(impl, q.device, q.dtype)
        or q.size(-1) > 256
        or wants_gradient(q, packed, window)
    ):
        if impl == "auto" and q.device.type == "cpu" and not wants_gradient(q, packed, window):
            return packed_attention_cpu(q, packed, window, cap)
        return packed_attention_ref(q, packed, window, cap)
    Hkv = (packed.token_base if packed else window.k).size(1)
    packed = packed or _no_tokens(q, Hkv)
    window = window or WindowView(q[:, :, :0], q[:, :, :0], None, packed.n.new_zeros(len(q)))
    if window.k.numel():
        assert window.k.is_contiguous() and window.v.is_contiguous(), "a window is read by address"
    rows = q.size(1) // Hkv * q.size(2)
    if packed.ints is None:
        variant = _float_variant(q, packed, rows)
    else:
        from storage.integers.attention import int_variant  # loaded where there are integers only

        variant = int_variant(q, packed, rows)
    variant.constants["CAP"] = cap
    return attend_in_pieces(dense_rows(q), packed, window, variant, chunk)


def wants_gradient(q: Tensor, packed: PackedView | None, window: WindowView | None) -> bool:
    """Say whether a gradient will be asked of attention's result: the kernel has none."""
    inputs = [q]
    if packed is not None:
        inputs += [packed.keys, packed.rows]
    if window is not None:
        inputs += [window.k, window.v]
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


@cache  # else every layer of every step would fill its own
def _zeros(n: int, device: torch.device) -> Tensor:
    """Return zeros (n,) int64, which nothing writes to. n: a power of 2, so that few are kept; none
    is ever dropped, for graphs that were captured read it by its address."""
    return torch.zeros(n, dtype=torch.int64, device=device)


def _no_tokens(q: Tensor, Hkv: int) -> PackedView:
    """Make a PackedView without tokens; nothing is read of the tensors that stand in."""
    n = q.size(0) * Hkv
    none = _zeros(1 << (n - 1).bit_length(), q.device)[:n].view(-1, Hkv)
    return PackedView(q, q, none, None, None, none, none, none, none, none, 1, 1, 0, 0)


# -------------------- attention over all that a cache shows


def attend_view(q: Tensor, view: Any, cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Let the newest T tokens' queries q (B, H, T, D) read all that a cache shows of a layer.

    view  storage.cache.CacheView: packed parts, window and sinks, of which each may be missing
    cap   see packed_attention
    Returns out (B, H, T, D) and lse (B, H, T), as packed_attention."""
    B, H, T, D = q.shape
    reads = [(part, None) for part in view.packed if part.keys.size(0)]
    if view.window is not None:
        # one call reads the window and a packed part, where that has as many heads
        Hkv = view.window.k.size(1)
        together = bool(reads) and reads[0][0].token_base.size(1) == Hkv
        first = reads.pop(0)[0] if together else None
        reads.insert(0, (first, view.window))
    parts = [packed_attention(q, packed, window, cap=cap) for packed, window in reads]
    if view.sinks is not None:
        # All queries see all sinks, so they are so many more heads of one query.
        out, lse = packed_attention(q.reshape(B, H * T, 1, D), None, view.sinks, cap=cap)
        parts.append((out.view(B, H, T, D), lse.view(B, H, T)))
    if not parts:
        nothing = torch.full_like(at_least_float32(q[..., 0]), float("-inf"))
        return torch.zeros_like(q), nothing
    if len(parts) == 1:
        return parts[0]
    return merge_softmax(*parts), reduce(torch.logaddexp, [lse for _, lse in parts])
