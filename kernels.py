"""Triton kernels, each beside its plain PyTorch reference, which is its specification.

* `packed_attention`: queries over what a packed cache stores and a dense tail. A program reads a
  piece of one head's tokens, each kept byte once, and leaves a softmax of its own; `_merge_kernel`
  joins the pieces by their log-sum-exp. Group g of token t lies in row offset(t) + popcount(mask_t
  & ((1 << g) - 1)) (layout.py), so the address of a value is computed per group, and loads stay 16
  bytes wide. Integers are read as they are stored, too (storage/integers/).

Letters: B sequences, H heads, Hkv KV heads, Hm mask heads (1 or Hkv), n = H/Hkv, D head dimension,
S groups, d = D/S, T queries, W tail slots, P sums, R = P T n rows of queries that share a KV head.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from storage.integers.attention import int_attention_kernel, int_keys, int_values, level_values
from storage.integers.format import IntFormat
from storage.kernel_base import (
    TRITON,
    as_word,
    jit,
    own_piece,
    pieces,
    popcount,
    product,
    tl,
    triton,
    use_triton,
    where_rows,
)
from storage.views import Packed, Sums, Tail, packed_attention_ref

# -------------------- attention over packed values


@jit
def _softmax_step(s, v, m, den, acc, take, P: tl.constexpr):
    """Online softmax: maximum m, sum den (M,) and weighted values acc (M, DP) after a block of
    logits s (M, N), in units of log 2, and values v (N, DP). take, broadcastable to s: what goes
    into acc, where there are P > 1 sums."""
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    den = den * alpha + tl.sum(p, 1)
    if P > 1:
        p = tl.where(take, p, 0.0)
    return top, den, product(p.to(v.dtype), v, acc * alpha[:, None])


@jit
def _attention_kernel(
    q,
    keys,
    rows,
    bits,
    before,
    tile_rows,
    key_scale,
    block_base,
    value_scale,
    n_packed,
    token_base,
    row_base,
    mask_base,
    tile_base,
    tail_k,
    tail_v,
    tail_first,
    tail_n,
    out,
    lse,
    part,
    part_ml,
    scale,
    segments,
    Hkv,
    n_b,
    n_h,
    W,
    chunk,
    parts,
    Hm,
    n,
    T,
    q_b,
    q_h,
    q_t,
    gain,
    select,
    want,
    SEGS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    ALIGN: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One piece of one segment: M of its R query rows over packed tokens and tail slots, N at a
    time. Row (sum, query, head of the group). KEY, VALUE: bits; 16 whole, VALUE 0 levels."""
    seg, c = own_piece(n_packed, tail_first, tail_n, segments, Hkv, n_b, n_h, W, chunk, N, SEGS)
    if SEGS > 0:  # noqa: SIM102 (known when compiling)
        if seg >= segments:
            return
    b = seg // Hkv
    h = seg % Hkv
    R = P * T * n
    row = tl.program_id(2) * M + tl.arange(0, M)
    mseg = b * Hm + (h if Hm > 1 else 0)
    token_at = tl.load(token_base + seg)
    keys += token_at * (D if KEY == 16 else D * KEY // 8)
    rows += tl.load(row_base + seg) * (
        D // S if KEY == 16 else D // S * (VALUE if VALUE > 0 else 2) // 8
    )
    if KEY < 16:
        key_scale += tl.load(block_base + seg) * 2 * D
        value_scale += token_at * (2 if VALUE > 0 else 1)
    if VALUE == 0:
        gain += h * D
    mask_at = tl.load(mask_base + mseg)
    bits += mask_at
    if K == 0:
        before += mask_at
        tile_rows += tl.load(tile_base + mseg)
    count, slots, first, tail_n, size, active = pieces(
        n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N
    )
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if c >= active:
            return
    own = row // n % T
    j = row % n
    which = row // (T * n)  # query, head of the group, sum
    dims = tl.arange(0, DP)
    at = tl.arange(0, N)
    d = D // S
    in_d = dims < D
    in_r = row < R
    asked = in_r[:, None] & in_d[None, :]
    x = tl.load(
        q + b * q_b + (h * n + j)[:, None] * q_h + own[:, None] * q_t + dims[None, :],
        mask=asked,
        other=0.0,
    )
    m = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    none = tl.zeros([M, N], tl.float32)
    if P > 1:
        select = tl.load(select + which, mask=in_r, other=0).to(tl.uint32)
        want = tl.load(want + which, mask=in_r, other=0).to(tl.uint32)
    group = dims // d

    lo = c * size
    hi = tl.minimum((c + 1) * size, count)
    mask, offset = where_rows(bits, before, tile_rows, lo + at, hi, K, TILE)
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        live = t < hi
        if K > 0:
            offset = t * K
        word = as_word(mask, S if VALUE > 0 else 2 * S)
        there = live[:, None] & in_d[None, :]
        if KEY == 16:
            key = tl.load(
                keys + t[:, None] * D + dims[None, :],
                mask=there,
                other=0.0,
                eviction_policy="evict_first",
            )
        else:
            key = int_keys(keys, key_scale, t, dims, there, x, D, KEY, BLOCK)
        logits = tl.where(live[None, :], product(x, tl.trans(key), none) * scale, float("-inf"))
        if KEY == 16:
            one = tl.full([1, 1], 1, word.dtype)
            g = group[None, :].to(word.dtype)
            has = ((word[:, None] >> g) & one) != 0
            place = (offset[:, None] + popcount(word[:, None] & ((one << g) - one))) * d + (
                dims % d
            )[None, :]
            # neighbouring dimensions of a group lie side by side: loads as wide as that allows
            if ALIGN > 1:
                place = tl.max_contiguous(tl.multiple_of(place, [1, ALIGN]), [1, ALIGN])
                has = tl.max_constancy(has, [1, ALIGN])
            value = tl.load(
                rows + place,
                mask=has if DP == D else has & in_d[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
        elif VALUE > 0:
            value = int_values(rows, value_scale, t, word, offset, dims, live, x, D, S, VALUE)
        else:
            value = level_values(rows, value_scale, gain, t, word, offset, dims, live, x, D, S)
        # of the next block, while this one's values come
        mask, offset = where_rows(bits, before, tile_rows, t + N, hi, K, TILE)
        take = live[None, :]
        if P > 1:
            take = (word[None, :] & select[:, None]) == want[:, None]
        m, den, acc = _softmax_step(logits, value, m, den, acc, take, P)

    lo = tl.maximum(c * size - count, 0)
    hi = tl.minimum((c + 1) * size - count, slots)
    tail_k += seg.to(tl.int64) * W * D
    tail_v += seg.to(tl.int64) * W * D
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        order = (t - first + W) % W
        live = (t < hi) & (order < tail_n)
        key = tl.load(
            tail_k + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0
        )
        value = tl.load(
            tail_v + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0
        )
        seen = live[None, :] & (order[None, :] <= tail_n - T + own[:, None])
        logits = tl.where(seen, product(x, tl.trans(key), none) * scale, float("-inf"))
        m, den, acc = _softmax_step(logits, value, m, den, acc, (which == 0)[:, None], P)

    if SPLIT:
        at_row = (tl.program_id(0) if SEGS > 0 else seg * parts + c).to(tl.int64) * R + row
        tl.store(part + at_row[:, None] * D + dims[None, :], acc, mask=asked)
        tl.store(part_ml + at_row * 2, m, mask=in_r)
        tl.store(part_ml + at_row * 2 + 1, den, mask=in_r)
    else:
        at_row = (seg.to(tl.int64) * n + j) * T + own
        total = tl.where(den > 0, den, 1.0)
        tl.store(
            out + (at_row * P + which)[:, None] * D + dims[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty),
            mask=asked,
        )
        tl.store(lse + at_row, (m + tl.log2(total)) * 0.6931471805599453, mask=in_r & (which == 0))


@jit
def _merge_kernel(
    part,
    part_ml,
    n_packed,
    tail_first,
    tail_n,
    out,
    lse,
    segments,
    Hkv,
    n_b,
    n_h,
    W,
    chunk,
    parts,
    n,
    T,
    SEGS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    DS: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """DS dimensions of one query row of one segment: its pieces' softmaxes joined, C at a time."""
    r = tl.program_id(0)
    seg = tl.program_id(1)
    _, _, _, _, _, active = pieces(
        n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N
    )
    start = seg * parts
    if SEGS > 0:
        s = tl.arange(0, SEGS)
        _, _, _, _, _, number = pieces(
            n_packed, tail_first, tail_n, s, segments, Hkv, n_b, n_h, W, chunk, N
        )
        start = tl.sum(tl.where(s < seg, number, 0), 0)
    dims = tl.program_id(2) * DS + tl.arange(0, DS)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([DS], tl.float32)
    for c0 in range(0, parts, C):
        c = c0 + tl.arange(0, C)
        at = (start + c).to(tl.int64) * (P * T * n) + r
        # what no piece wrote is read, too, so that loads need not wait for counts
        there = c < (active if SEGS > 0 else parts)
        m = tl.load(part_ml + at * 2, mask=there, other=0.0)
        den = tl.load(part_ml + at * 2 + 1, mask=there, other=0.0)
        o = tl.load(
            part + at[:, None] * D + dims[None, :],
            mask=there[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        m = tl.where(c < active, m, float("-inf"))
        den = tl.where(c < active, den, 0.0)
        o = tl.where((c < active)[:, None], o, 0.0)
        new = tl.maximum(top, tl.max(m, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        w = tl.exp2(m - base)
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(den * w, 0)
        mixed = mixed * alpha + tl.sum(o * w[:, None], 0)
        top = new
    total = tl.where(total > 0, total, 1.0)
    at = (seg.to(tl.int64) * n + r % n) * T + r // n % T
    tl.store(
        out + (at * P + r // (T * n)) * D + dims,
        (mixed / total).to(out.dtype.element_ty),
        mask=dims < D,
    )
    if r < T * n and tl.program_id(2) == 0:
        tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453)


# Triton's products have 16 columns at least before 3.5; integers are read byte by byte there
WORDS = TRITON >= (3, 5)
# programs of a compiled variant that a multiprocessor holds at a time
_per_sm: dict[tuple, int] = {}


def packed_attention(
    q: Tensor,
    packed: Packed | None,
    tail: Tail | None,
    sums: Sums | None = None,
    impl: str = "auto",
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest T tokens, q (B, H, T, D), over packed tokens, all older than they,
    and a tail that ends with those T: (out, lse). One of packed and tail may be None.

    out (B, H, T, D) like q; with `sums` (B, H, T, P, D), softmax weights times values summed over
    what each sum takes, dropped groups zero; lse (B, H, T) float32 (float64 of float64): log of the
    sum of exp(q . k / sqrt(D)), -inf (and out 0) where there is nothing to read. chunk: tokens to a
    program, 0: such that all programs run at a time. The kernels take D up to 256 and, with sums, S
    up to 32; what is larger, and float64, goes to the reference."""
    B, H, T, D = q.shape
    ints = packed.ints if packed else None
    kb, vb, block, gain = ints.fmt if ints else IntFormat(16, 16, 1)
    Hkv = (packed.token_base if packed else tail.k).size(1)
    fits = D <= 256 and not (sums and packed and packed.n_groups > 32)
    if not use_triton(impl, q) or not fits:
        return packed_attention_ref(q, packed, tail, sums)
    none = None if packed and tail else torch.zeros(B, Hkv, dtype=torch.int64, device=q.device)
    p = packed or Packed(q, q, none, None, None, none, none, none, none, none, 1, 1, 0, 0)
    tail = tail or Tail(q[:, :, :0], q, none, none)
    assert not tail.k.numel() or (tail.k.is_contiguous() and tail.v.is_contiguous()), (
        "a tail is read by address: k, v must be contiguous"
    )
    Hm = p.mask_base.size(1)
    n = H // Hkv
    S = p.n_groups
    W = tail.k.size(2)
    P = len(sums.select) if sums else 1
    R = P * T * n
    narrow = q.dtype != torch.float32
    segments = B * Hkv
    given = chunk
    M = min(64 if narrow else 16, max(16, triton.next_power_of_2(R)))
    DP = max(16, triton.next_power_of_2(D))
    # what an H100 likes: docs/log.md
    N, warps, stages = (
        ((32, 1, 1) if M == 16 and DP <= 128 else (64, 4, 2)) if narrow else (16, 4, 1)
    )
    # float16 has too few bits for small weights and large middles; many rows are better off with
    # what is unpacked once for 64 of them
    words = (
        WORDS
        and ints
        and not sums
        and q.dtype != torch.float16
        and R <= 32
        and in_words(ints.fmt, D, 1 if p.k == S else S)
    )
    shape = dict(D=D, S=S, K=p.k, TILE=p.tile)
    # as many registers as there are, without spilling, and what keeps eight programs of a warp on a
    # multiprocessor busy
    if words:
        N = min(64 if vb else 32, block)
        M = 4 if R <= 4 else 8
        warps = 1 if narrow else 4
        stages = 1 if not vb else 3 if p.k and kb + vb == 8 else 2
        KP, VP = (max(w, triton.next_power_of_2(D * b // 32)) for w, b in ((4, kb), (8, vb)))
        shape.update(KP=KP, VP=VP, ASM=q.is_cuda and narrow and torch.version.hip is None)
    else:
        if ints:
            N = 32 if narrow else 16
            warps = 4
            stages = 1
        shape.update(P=P, ALIGN=D // S & -(D // S))
    shape.update(KEY=kb, VALUE=vb, BLOCK=block, M=M, N=N, DP=DP, STAGES=stages)
    blocks = -(-R // M)
    N = block if words else N  # a piece is a number of these
    variant = (q.dtype, p.bits.dtype, *shape.values())
    if not chunk:  # one piece per program, and all programs run at a time
        programs = _multiprocessors(q.device) * _per_sm.get(variant, 8) // blocks
        chunk = -(-(p.held + segments * W) // max(1, programs - segments))
    size = max(N, -(-chunk // N) * N)
    parts = max(1, -(-(p.longest + W) // size))
    # pieces of all segments, if `held` is exact
    bound = -(-p.held // size) + segments * (1 + -(-W // size))
    # then many would have nothing to do
    ragged = parts > 1 and p.exact and 4 * bound < 3 * segments * parts and segments <= 1024
    grid, SEGS = (
        ((bound, 1), triton.next_power_of_2(segments)) if ragged else ((segments, parts), 0)
    )
    out = q.new_empty(B, H, T, P, D) if sums else q.new_empty(B, H, T, D)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    part, part_ml = (
        torch.empty(
            grid[0] * grid[1] * R * w if parts > 1 else 1, dtype=torch.float32, device=q.device
        )
        for w in (D, 2)
    )
    q = q if q.stride(-1) == 1 else q.contiguous()
    where = (segments, Hkv, p.n.stride(0), p.n.stride(1) if Hm > 1 else 0, max(W, 1), size, parts)
    how = (ints.key_scale, ints.block_base, ints.value_scale) if ints else (None, None, None)
    args = (
        q,
        p.keys,
        p.rows,
        p.bits,
        p.before,
        p.tile_rows,
        *how,
        p.n,
        p.token_base,
        p.row_base,
        p.mask_base,
        p.tile_base,
        tail.k,
        tail.v,
        tail.first,
        tail.count,
        out,
        lse,
        part,
        part_ml,
        D**-0.5 * math.log2(math.e),
        *where,
        Hm,
        n,
        T,
        *q.stride()[:3],
        gain,
    )
    if not words:
        args += tuple(sums or (None, None))
    kernel = int_attention_kernel if words else _attention_kernel
    compiled = kernel[(*grid, blocks)](*args, SEGS=SEGS, **shape, SPLIT=parts > 1, num_warps=warps)
    if q.is_cuda and not given and variant not in _per_sm:
        _per_sm[variant] = _resident(compiled, warps, q.device)
        # once more, in pieces of the right size
        return packed_attention(q, packed, tail, sums, impl)
    if parts > 1:
        C = min(256, max(16, triton.next_power_of_2(parts)))
        DS = min(DP, 8192 // C)
        _merge_kernel[(R, segments, DP // DS)](
            part,
            part_ml,
            p.n,
            tail.first,
            tail.count,
            out,
            lse,
            *where,
            n,
            T,
            SEGS=SEGS,
            D=D,
            P=P,
            DS=DS,
            N=N,
            C=C,
            num_warps=4,
        )
    return out, lse


def in_words(fmt: IntFormat, head_dim: int, n_groups: int) -> bool:
    """Whether int_attention_kernel reads these integers, n_groups rows a token (1: every group is
    kept): 4 or 8 bits, rows that fill words; or levels under keys of 4 or 8 bits, units of 1, 2, 4,
    ... bytes."""
    d = head_dim // n_groups
    rows = d * fmt.value_bits % 32 == 0 if fmt.value_bits else d & (d - 1) == 0 and head_dim >= 16
    return (
        {fmt.key_bits, fmt.value_bits or 4} <= {4, 8}
        and n_groups <= 16
        and head_dim * fmt.key_bits % 32 == 0
        and rows
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


def _resident(compiled, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that fit a multiprocessor at a time, by registers, shared
    memory and warps."""
    card = torch.cuda.get_device_properties(device)
    registers = -(-compiled.n_regs // 8) * 8 * 32 * warps
    n = min(
        card.regs_per_multiprocessor // registers,
        card.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
        card.max_threads_per_multi_processor // (32 * warps),
    )
    # as many on each of four schedulers: nine take as long as twelve
    return n - n % 4 if warps == 1 and n > 4 else max(1, n)
