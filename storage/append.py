"""Store one token per sequence in a packed cache, on the device alone, so that decoding can be
captured in a CUDA graph. PackedCache.append is the specification.

The new token goes into the window, whole; when the window has `block` tokens more than it keeps,
its oldest `block` are packed: keys as they are, of values the rows of the K groups that each keeps.
Integers are formed in storage/integers/append.py. Letters as in storage/layout.py.
"""

from __future__ import annotations

from torch import Tensor

from storage.kernel_base import dense_rows, jit, popcount, tl, triton
from storage.layout import PackedView, WindowView


@jit
def _encode(v_ptr, enc_ptr, head, in_head, D: tl.constexpr, ENCODE: tl.constexpr):
    """Load one value per head from addresses v_ptr (HEADS,) and multiply it by the head's map, enc
    (Hkv, D, D): (HEADS, D) in the type of the value."""
    dim = tl.arange(0, D)[None, :]
    if ENCODE:
        z = tl.zeros([head.shape[0], D], tl.float32)
        for i in range(D):
            x = tl.load(v_ptr + i, mask=in_head, other=0.0).to(tl.float32)
            enc = tl.load(
                enc_ptr + (head * D + i)[:, None] * D + dim,
                mask=in_head[:, None],
                other=0.0,
            )
            z += x[:, None] * enc.to(tl.float32)
        return z.to(v_ptr.dtype.element_ty)
    else:
        return tl.load(v_ptr[:, None] + dim, mask=in_head[:, None], other=0.0)


@jit
def _largest_groups(
    v_ptr,
    enc_ptr,
    head,
    in_head,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    ENCODE: tl.constexpr,
):
    """Mark the K groups of largest norm of one value per head, of equal ones the lower group:
    (HEADS, S). SHARED: heads share a mask, so their squared norms are added."""
    HEADS: tl.constexpr = head.shape[0]
    z = _encode(v_ptr, enc_ptr, head, in_head, D, ENCODE).to(tl.float32)
    energy = tl.sum(tl.reshape(z * z, (HEADS, S, D // S)), 2)
    if SHARED:
        energy = tl.sum(energy, 0)[None, :] + tl.zeros([HEADS, S], tl.float32)
    group = tl.arange(0, S)
    other = energy[:, None, :]  # (HEADS, S, S)
    mine = energy[:, :, None]
    lower = group[None, None, :] < group[None, :, None]
    better = (other > mine) | ((other == mine) & lower)
    return tl.sum(better.to(tl.int32), 2) < K


@jit
def _append_packed_kernel(
    k_ptr,
    v_ptr,
    route_ptr,
    enc_ptr,
    skip_ptr,
    keys_ptr,
    rows_ptr,
    bits_ptr,
    token_base_ptr,
    row_base_ptr,
    mask_base_ptr,
    window_k_ptr,
    window_v_ptr,
    window_bits_ptr,
    n_packed_ptr,
    n_window_ptr,
    Hkv,
    W,
    keep,
    block,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    ROUTE: tl.constexpr,
    ENCODE: tl.constexpr,
    PACK: tl.constexpr,
):
    """Take the new token of one sequence: find its mask; pack the oldest `block` tokens of a window
    that is full (PACK; else that has been done); store the new one in the window.

    HEADS: Hkv rounded up to a power of 2. The window keeps `keep` tokens."""
    b = tl.program_id(0).to(tl.int64)
    if skip_ptr is not None:  # noqa: SIM102 (known when compiling)
        if tl.load(skip_ptr + b) > 0:
            return
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, D)
    d = D // S
    in_head = head < Hkv
    Hm = 1 if SHARED else Hkv
    seg = b * Hkv + head
    mask_head = head * 0 if SHARED else head
    n_packed = tl.load(n_packed_ptr + b)
    n_window = tl.load(n_window_ptr + b)
    k_ptr += b * k_stride_b + head * k_stride_h  # (HEADS,) addresses
    v_ptr += b * v_stride_b + head * v_stride_h
    group = tl.arange(0, S)
    if ROUTE:
        kept = tl.load(
            route_ptr + ((b * Hm + mask_head) * S)[:, None] + group[None, :],
            mask=in_head[:, None],
            other=0,
        )
        kept = kept != 0
    else:
        kept = _largest_groups(v_ptr, enc_ptr, head, in_head, D, S, K, SHARED, ENCODE)
    new_word = tl.sum(kept.to(tl.int64) << group[None, :], 1)
    full = n_window + 1 == keep + block
    if full and PACK:
        token_base = tl.load(token_base_ptr + seg, mask=in_head, other=0)
        row_base = tl.load(row_base_ptr + seg, mask=in_head, other=0)
        mask_base = tl.load(mask_base_ptr + b * Hm + mask_head, mask=in_head, other=0)
        for i in range(block):
            t = n_packed + i
            if i == n_window:  # the window keeps nothing: the new token itself is packed
                from_k_ptr = k_ptr
                from_v_ptr = v_ptr
                word = new_word
            else:
                slot = seg * W + t % W
                from_k_ptr = window_k_ptr + slot * D
                from_v_ptr = window_v_ptr + slot * D
                mask_slot = (b * Hm + mask_head) * W + t % W
                word = tl.load(window_bits_ptr + mask_slot, mask=in_head, other=0).to(tl.int64)
            key = tl.load(from_k_ptr[:, None] + dim[None, :], mask=in_head[:, None])
            tl.store(
                keys_ptr + (token_base + t)[:, None] * D + dim[None, :],
                key,
                mask=in_head[:, None],
            )
            tl.store(bits_ptr + mask_base + t, word.to(bits_ptr.dtype.element_ty), mask=head < Hm)
            bit = tl.full([1, 1], 1, tl.uint64) << (dim // d)[None, :].to(tl.uint64)
            word = word.to(tl.uint64, bitcast=True)[:, None]
            row = (row_base + t * K)[:, None] + popcount(word & (bit - 1))
            tl.store(
                rows_ptr + row * d + (dim % d)[None, :],
                _encode(from_v_ptr, enc_ptr, head, in_head, D, ENCODE),
                mask=in_head[:, None] & ((word & bit) != 0),
            )
    # The slot that the new token takes may be one that has just been packed: it has been read now,
    # and every warp has read the counts.
    tl.debug_barrier()
    if n_window < keep + block - 1 or keep > 0:  # it has not been packed at once
        slot = (n_packed + n_window) % W
        to = ((seg * W + slot) * D)[:, None] + dim[None, :]
        there = in_head[:, None]
        tl.store(window_k_ptr + to, tl.load(k_ptr[:, None] + dim[None, :], mask=there), mask=there)
        tl.store(window_v_ptr + to, tl.load(v_ptr[:, None] + dim[None, :], mask=there), mask=there)
        tl.store(
            window_bits_ptr + (b * Hm + mask_head) * W + slot,
            new_word.to(window_bits_ptr.dtype.element_ty),
            mask=head < Hm,
        )
    left = tl.where(full, block, 0)
    tl.store(n_packed_ptr + b, n_packed + left)
    tl.store(n_window_ptr + b, n_window + 1 - left)


def can_append(head_dim: int) -> bool:
    """Say whether append_packed has a kernel for heads of this size."""
    return triton is not None and head_dim & (head_dim - 1) == 0 and 16 <= head_dim <= 256


def append_packed(
    packed: PackedView,
    window: WindowView,
    window_bits: Tensor,
    n_packed: Tensor,
    n_window: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    block: int,
    route: Tensor | None = None,
    enc: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Store one token per sequence in a cache of K groups per token, and raise its counts.

    window_bits         (B, Hm, W) masks that the window's tokens will be packed with
    n_packed, n_window  (B,) int64, changed in place
    k, v                (B, Hkv, 1, D), D as can_append says
    window_size: tokens that the window keeps; with `block` more, it gives up its oldest `block`
    route  (B, Hm, S) bool, the K groups that the new token keeps; None: those of largest norm
    enc    (Hkv, D, D), what values are multiplied by when they are packed; None: nothing
    skip   (B,), above 0 for a sequence without a new token; None: all have one"""
    B, Hkv, _, D = k.shape
    Hm = packed.mask_base.size(1)
    route = None if route is None else route.contiguous()
    skip = None if skip is None else skip.contiguous()
    enc = None if enc is None else enc.contiguous()  # read by address; eigenvectors lie in columns
    if packed.ints is not None:
        from storage.integers.append import quantise_block  # loaded where there are integers only

        quantise_block(packed, window, window_bits, n_packed, n_window, window_size, block, skip)
    k = dense_rows(k)
    v = dense_rows(v)
    _append_packed_kernel[(B,)](
        k,
        v,
        route,
        enc,
        skip,
        packed.keys,
        packed.rows,
        packed.bits,
        packed.token_base,
        packed.row_base,
        packed.mask_base,
        window.k,
        window.v,
        window_bits,
        n_packed,
        n_window,
        Hkv,
        max(window.k.size(2), 1),
        window_size,
        block,
        *k.stride()[:2],
        *v.stride()[:2],
        D=D,
        S=packed.n_groups,
        K=packed.k,
        HEADS=triton.next_power_of_2(Hkv),
        SHARED=Hm == 1,
        ROUTE=route is not None,
        ENCODE=enc is not None,
        PACK=packed.ints is None,
        num_warps=1 if Hkv * D <= 1024 else 4,
    )
