"""One more token per sequence, stored on the device alone, so that decoding can be captured in a
CUDA graph. Triton kernels.

* `append_tail`: into a dense tail; beside it its plain PyTorch reference. `impl` as in kernels.py.
* `append_packed`: into a PackedCache of fixed K, whose `append` is the specification.

Letters: B sequences, Hkv KV heads, Hm mask heads (1 or Hkv), D head dimension, S groups, d = D/S, W
tail slots."""

from __future__ import annotations

import torch
from torch import Tensor

from storage.kernel_base import jit, popcount, tl, triton, use_triton
from storage.views import Packed, Tail


@jit
def _append_tail_kernel(
    k,
    v,
    tail_k,
    tail_v,
    first,
    count,
    Hkv,
    W,
    k_b,
    k_h,
    v_b,
    v_h,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    b = tl.program_id(0) // Hkv
    h = tl.program_id(0) % Hkv
    dims = tl.arange(0, DP)
    slot = (tl.load(first + b) + tl.load(count + b) - 1) % W
    to = (tl.program_id(0) * W + slot) * D + dims
    tl.store(tail_k + to, tl.load(k + b * k_b + h * k_h + dims, mask=dims < D), mask=dims < D)
    tl.store(tail_v + to, tl.load(v + b * v_b + h * v_h + dims, mask=dims < D), mask=dims < D)


def append_tail(tail: Tail, k: Tensor, v: Tensor, impl: str = "auto") -> None:
    """Store one token per sequence, k, v (B, Hkv, 1, D), as the newest of tail, whose count
    includes it already."""
    if not use_triton(impl, k):
        b = torch.arange(k.size(0), device=k.device)
        slot = (tail.first + tail.count - 1) % tail.k.size(2)
        tail.k[b, :, slot] = k[:, :, 0]
        tail.v[b, :, slot] = v[:, :, 0]
        return
    (B, Hkv, _, D) = k.shape
    (k, v) = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _append_tail_kernel[(B * Hkv,)](
        k,
        v,
        tail.k,
        tail.v,
        tail.first,
        tail.count,
        Hkv,
        tail.k.size(2),
        *k.stride()[:2],
        *v.stride()[:2],
        D,
        triton.next_power_of_2(D),
        num_warps=1,
    )


@jit
def _encoded(v, enc, h, in_h, D: tl.constexpr, ENCODE: tl.constexpr):
    """Values at v (HP,) pointers, one per head, times enc (Hkv, D, D): (HP, D) in their own
    dtype."""
    dims = tl.arange(0, D)
    if ENCODE:
        z = tl.zeros([h.shape[0], D], tl.float32)
        for i in range(D):
            x = tl.load(v + i, mask=in_h, other=0.0).to(tl.float32)
            z += x[:, None] * tl.load(
                enc + (h * D + i)[:, None] * D + dims[None, :], mask=in_h[:, None], other=0.0
            ).to(tl.float32)
        return z.to(v.dtype.element_ty)
    else:
        return tl.load(v[:, None] + dims[None, :], mask=in_h[:, None], other=0.0)


@jit
def _append_packed_kernel(
    k,
    v,
    scores,
    enc,
    keys,
    rows,
    bits,
    token_base,
    row_base,
    mask_base,
    tail_k,
    tail_v,
    tail_bits,
    n_packed,
    n_tail,
    Hkv,
    W,
    keep,
    block,
    k_b,
    k_h,
    v_b,
    v_h,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,
    SHARED: tl.constexpr,
    SCORES: tl.constexpr,
    ENCODE: tl.constexpr,
    PACK: tl.constexpr,
):
    """One sequence: mask of the new token; if the tail is full its oldest `block` tokens are packed
    (PACK; else that has been done); the new one goes to the tail."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP)
    dims = tl.arange(0, D)
    d = D // S
    in_h = h < Hkv
    Hm = 1 if SHARED else Hkv
    seg = b * Hkv + h
    mh = h * 0 if SHARED else h
    packed = tl.load(n_packed + b)
    held = tl.load(n_tail + b)
    k += b * k_b + h * k_h  # (HP,) pointers
    v += b * v_b + h * v_h
    g = tl.arange(0, S)
    if SCORES:
        e = tl.load(
            scores + ((b * Hm + mh) * S)[:, None] + g[None, :], mask=in_h[:, None], other=0.0
        ).to(tl.float32)
    else:
        z = _encoded(v, enc, h, in_h, D, ENCODE).to(tl.float32)
        e = tl.sum(tl.reshape(z * z, (HP, S, D // S)), 2)
        if SHARED:
            e = tl.sum(e, 0)[None, :] + tl.zeros([HP, S], tl.float32)
    other = e[:, None, :]
    mine = e[:, :, None]  # (HP, S, S)
    # of equal ones the lower group
    better = (other > mine) | ((other == mine) & (g[None, None, :] < g[None, :, None]))
    best = tl.sum(better.to(tl.int32), 2) < K  # (HP, S)
    word = tl.sum(best.to(tl.int64) << g[None, :], 1)
    full = held + 1 == keep + block
    if full and PACK:
        token_at = tl.load(token_base + seg, mask=in_h, other=0)
        row_at = tl.load(row_base + seg, mask=in_h, other=0)
        mask_at = tl.load(mask_base + b * Hm + mh, mask=in_h, other=0)
        for i in range(block):
            t = packed + i
            if i == held:  # there is no tail: the new token itself
                from_k = k
                from_v = v
                kept = word
            else:
                ring = seg * W + t % W
                from_k = tail_k + ring * D
                from_v = tail_v + ring * D
                kept = tl.load(tail_bits + (b * Hm + mh) * W + t % W, mask=in_h, other=0).to(
                    tl.int64
                )
            tl.store(
                keys + (token_at + t)[:, None] * D + dims[None, :],
                tl.load(from_k[:, None] + dims[None, :], mask=in_h[:, None]),
                mask=in_h[:, None],
            )
            tl.store(bits + mask_at + t, kept.to(bits.dtype.element_ty), mask=h < Hm)
            bit = tl.full([1, 1], 1, tl.uint64) << (dims // d)[None, :].to(tl.uint64)
            kept = kept.to(tl.uint64, bitcast=True)[:, None]
            row = (row_at + t * K)[:, None] + popcount(kept & (bit - 1))
            tl.store(
                rows + row * d + (dims % d)[None, :],
                _encoded(from_v, enc, h, in_h, D, ENCODE),
                mask=in_h[:, None] & ((kept & bit) != 0),
            )
    tl.debug_barrier()  # what was packed has been read
    if held < keep + block - 1 or keep > 0:  # it has not been packed at once
        at = (packed + held) % W
        to = ((seg * W + at) * D)[:, None] + dims[None, :]
        there = in_h[:, None]
        tl.store(tail_k + to, tl.load(k[:, None] + dims[None, :], mask=there), mask=there)
        tl.store(tail_v + to, tl.load(v[:, None] + dims[None, :], mask=there), mask=there)
        tl.store(
            tail_bits + (b * Hm + mh) * W + at, word.to(tail_bits.dtype.element_ty), mask=h < Hm
        )
    tl.store(n_packed + b, packed + tl.where(full, block, 0))
    tl.store(n_tail + b, held + 1 - tl.where(full, block, 0))


@jit
def _codes(x, step, middle, BITS: tl.constexpr):
    """quant.to_codes, as int32."""
    code = tl.floor(tl.div_rn(x - middle, step) + ((1 << (BITS - 1)) + 0.5))
    return tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@jit
def _scale(low, high, BITS: tl.constexpr):
    """quant.scale_for: (step, middle) float16."""
    step = tl.minimum(
        tl.maximum(
            tl.div_rn(high - low, tl.full(low.shape, (1 << BITS) - 1.0, tl.float32)),
            5.9604644775390625e-08,
        ),
        65504.0,
    )
    middle = low + step * (1 << (BITS - 1))
    return step.to(tl.float16), tl.minimum(tl.maximum(middle, -65504.0), 65504.0).to(tl.float16)


@jit
def _quantise_block_kernel(
    keys,
    rows,
    bits,
    key_scale,
    value_scale,
    token_base,
    row_base,
    mask_base,
    tail_k,
    tail_v,
    tail_bits,
    n_packed,
    n_tail,
    Hkv,
    W,
    keep,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    """One segment: if its tail is full, the oldest BLOCK tokens of it become integers, after those
    packed before."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    seg = b * Hkv + h
    packed = tl.load(n_packed + b)
    if tl.load(n_tail + b) + 1 < keep + BLOCK:
        return
    i = tl.arange(0, BLOCK)
    ring = seg * W + (packed + i) % W
    token_at = tl.load(token_base + seg) + packed
    kb: tl.constexpr = D * KEY // 8
    vb: tl.constexpr = D * VALUE // 8
    width: tl.constexpr = D // S * VALUE // 8
    c = tl.arange(0, kb)
    byte = tl.zeros([BLOCK, kb], tl.int32)
    for p in tl.static_range(8 // KEY):
        x = tl.load(tail_k + ring[:, None] * D + (p * kb + c)[None, :]).to(tl.float32)
        step, middle = _scale(tl.min(x, 0), tl.max(x, 0), KEY)
        to = key_scale + token_at // BLOCK * 2 * D + p * kb + c
        tl.store(to, step)
        tl.store(to + D, middle)
        byte |= _codes(x, step.to(tl.float32)[None, :], middle.to(tl.float32)[None, :], KEY) << (
            KEY * p
        )
    tl.store(keys + (token_at + i)[:, None] * kb + c[None, :], byte.to(tl.uint8))

    m = b if SHARED else seg
    c = tl.arange(0, vb)
    word = tl.load(tail_bits + m * W + (packed + i) % W).to(tl.int64)
    if SHARED == 0 or h == 0:
        tl.store(bits + tl.load(mask_base + m) + packed + i, word.to(bits.dtype.element_ty))
    word = word.to(tl.uint64, bitcast=True)[:, None]
    g = (c // width)[None, :]
    bit = tl.full([1, 1], 1, tl.uint64) << g.to(tl.uint64)
    has = (word & bit) != 0
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for p in tl.static_range(8 // VALUE):
        x = tl.load(
            tail_v + ring[:, None] * D + (g * (D // S) + p * width + (c % width)[None, :])
        ).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(has, x, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(has, x, float("-inf")), 1))
    step, middle = _scale(low, high, VALUE)
    tl.store(value_scale + (token_at + i) * 2, step)
    tl.store(value_scale + (token_at + i) * 2 + 1, middle)
    byte = tl.zeros([BLOCK, vb], tl.int32)
    for p in tl.static_range(8 // VALUE):
        x = tl.load(
            tail_v + ring[:, None] * D + (g * (D // S) + p * width + (c % width)[None, :])
        ).to(tl.float32)
        byte |= _codes(x, step.to(tl.float32)[:, None], middle.to(tl.float32)[:, None], VALUE) << (
            VALUE * p
        )
    row = (tl.load(row_base + seg) + (packed + i) * K)[:, None] + popcount(word & (bit - 1))
    tl.store(rows + row * width + (c % width)[None, :], byte.to(tl.uint8), mask=has)


def can_append(head_dim: int) -> bool:
    """Whether append_packed has a kernel for heads of this size."""
    return triton is not None and head_dim & (head_dim - 1) == 0 and 16 <= head_dim <= 256


def append_packed(
    packed: Packed,
    tail: Tail,
    tail_bits: Tensor,
    n_packed: Tensor,
    n_tail: Tensor,
    k: Tensor,
    v: Tensor,
    keep: int,
    block: int,
    scores: Tensor | None = None,
    enc: Tensor | None = None,
) -> None:
    """One token per sequence, k, v (B, Hkv, 1, D), into a cache of fixed K, all on the device:
    PackedCache.append is the specification.

    n_packed, n_tail (B,) int64, updated; the tail keeps `keep` tokens and gives away its oldest
    `block` when it holds as many more. scores (B, Hm, S): the new token keeps the K largest; None:
    by its groups' norms. enc (Hkv, D, D): what values go through when packed."""
    (B, Hkv, _, D) = k.shape
    W = tail.k.size(2)
    Hm = packed.mask_base.size(1)
    ints = packed.ints
    if ints:
        _quantise_block_kernel[(B, Hkv)](
            packed.keys,
            packed.rows,
            packed.bits,
            ints.key_scale,
            ints.value_scale,
            packed.token_base,
            packed.row_base,
            packed.mask_base,
            tail.k,
            tail.v,
            tail_bits,
            n_packed,
            n_tail,
            Hkv,
            W,
            keep,
            D=D,
            S=packed.n_groups,
            K=packed.k,
            KEY=ints.fmt.key_bits,
            VALUE=ints.fmt.value_bits,
            BLOCK=block,
            SHARED=Hm == 1,
            num_warps=4,
        )
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _append_packed_kernel[(B,)](
        k,
        v,
        scores,
        enc,
        packed.keys,
        packed.rows,
        packed.bits,
        packed.token_base,
        packed.row_base,
        packed.mask_base,
        tail.k,
        tail.v,
        tail_bits,
        n_packed,
        n_tail,
        Hkv,
        max(W, 1),
        keep,
        block,
        *k.stride()[:2],
        *v.stride()[:2],
        D=D,
        S=packed.n_groups,
        K=packed.k,
        HP=triton.next_power_of_2(Hkv),
        SHARED=Hm == 1,
        SCORES=scores is not None,
        ENCODE=enc is not None,
        PACK=ints is None,
        num_warps=1 if Hkv * D <= 1024 else 4,
    )
