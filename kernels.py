"""Triton kernels, each beside its plain PyTorch reference, which is its specification.

* `packed_attention`: queries over what a packed cache stores and a dense tail. A program reads a piece of one head's tokens, each kept
  byte once, and leaves a softmax of its own; `_merge_kernel` joins the pieces by their log-sum-exp. Group g of token t lies in row
  offset(t) + popcount(mask_t & ((1 << g) - 1)) (layout.py), so the address of a value is computed per group, and loads stay 16 bytes wide.
* `append_packed`, `append_tail`: one more token per sequence, all on the device, so that decoding can be captured in a CUDA graph.

`impl`: "auto" runs the kernel on CUDA tensors and the reference elsewhere, "triton" and "torch" force one; the kernels run on CPU tensors
in Triton's interpreter (TRITON_INTERPRET=1). None has a gradient.

Letters: B sequences, H heads, Hkv KV heads, Hm mask heads (1 or Hkv), n = H/Hkv, D head dimension, S groups, d = D/S, T queries, W tail
slots, P sums, R = P T n rows of queries that share a KV head.
"""
from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layout import at_least_float32, bits_to_mask, mask_to_bits, tile_size

try:
    import triton
    import triton.language as tl
except ImportError:  # the references need none
    triton = tl = None
jit = triton.jit if triton else lambda f: f


def use_triton(impl: str, x: Tensor) -> bool:
    """Whether a function runs its kernel: impl "triton" always (CPU tensors need TRITON_INTERPRET=1), "torch" never, "auto" on a GPU."""
    assert impl in ("auto", "triton", "torch") and (triton or impl != "triton"), f"impl={impl} with triton {'there' if triton else 'missing'}"
    return triton is not None and x.dtype != torch.float64 and (impl == "triton" or (impl == "auto" and x.is_cuda))


# ----------------------------------------------------------------------------- attention over packed values

class Packed(NamedTuple):
    """One layer's packed tokens. Segment (sequence, head) holds n tokens: keys and rows from token_base and row_base on, masks (and what
    counts rows, where every token may keep another number: k = 0) from mask_base and tile_base on."""
    keys: Tensor  # (slots, D)
    rows: Tensor  # (row slots, d)
    bits: Tensor  # (mask slots,) layout.mask_dtype
    before: Tensor | None  # (mask slots,) uint8, rows of its tile before each token
    tile_rows: Tensor | None  # (tiles,) int32, the segment's rows before each tile
    n: Tensor  # (B, Hm) int64 tokens
    token_base: Tensor  # (B, Hkv) int64, like row_base
    row_base: Tensor
    mask_base: Tensor  # (B, Hm) int64, like tile_base
    tile_base: Tensor
    n_groups: int
    k: int  # groups every token keeps; 0: see before and tile_rows
    longest: int  # no segment holds more tokens
    held: int  # tokens of all segments: what work is divided by
    exact: bool = False  # whether `held` is no less than that

    def masks(self) -> tuple[Tensor, Tensor]:
        """Left-aligned: mask (B, Hm, N, S) bool, and valid (B, Hm, N) bool, slots that hold a token; N: the largest count."""
        N = int(self.n.max()) if self.n.numel() else 0
        valid = torch.arange(N, device=self.n.device) < self.n.unsqueeze(-1)  # (B, Hm, N)
        b, h, t = valid.nonzero(as_tuple=True)
        mask = torch.zeros(*valid.shape, self.n_groups, dtype=torch.bool, device=self.n.device)
        mask[b, h, t] = bits_to_mask(self.bits[self.mask_base[b, h] + t], self.n_groups)
        return mask, valid

    def unpack(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Dense and left-aligned: k (B, Hkv, N, D), z (B, Hkv, N, D) with zeros where dropped, mask and valid as in masks; slots without a
        token are zeros."""
        (B, Hkv), S, tile, (mask, valid) = self.token_base.shape, self.n_groups, tile_size(self.n_groups), self.masks()
        N = valid.size(-1)
        b, h, t = valid.nonzero(as_tuple=True)
        at = self.mask_base[b, h] + t
        offset = torch.zeros(valid.shape, dtype=torch.int64, device=self.n.device)
        offset[b, h, t] = t * self.k if self.k else self.tile_rows[self.tile_base[b, h] + t // tile].long() + self.before[at].long()
        row = self.row_base[..., None, None] + offset.unsqueeze(-1) + mask.long().cumsum(-1) - mask.long()  # (B, Hkv, N, S)
        b, h, t = valid.expand(-1, Hkv, -1).nonzero(as_tuple=True)
        k = self.keys.new_zeros(B, Hkv, N, self.keys.size(-1))
        k[b, h, t] = self.keys[self.token_base[b, h] + t]
        z = self.rows.new_zeros(B, Hkv, N, S, self.rows.size(-1))
        kept = mask.expand(-1, Hkv, -1, -1)
        z[kept] = self.rows[row[kept]]
        return k, z.flatten(-2), mask, valid

    @staticmethod
    def of_whole(k: Tensor, v: Tensor, n: Tensor) -> Packed:
        """Whole values, k, v (B, Hkv, N, D) of which the first n (B, Hm) tokens of a segment count: one group, always kept."""
        B, Hkv, N, D = k.shape
        base = torch.arange(B * Hkv, device=k.device).view(B, Hkv) * N
        mask_base = torch.arange(n.numel(), device=k.device).view(n.shape) * N
        bits = torch.ones(n.numel() * N, dtype=torch.uint8, device=k.device)
        return Packed(k.reshape(-1, D), v.reshape(-1, D), bits, None, None, n, base, base, mask_base, mask_base, 1, 1, N, B * Hkv * N)


class Tail(NamedTuple):
    """Tokens with whole values: k, v (B, Hkv, W, D); sequence b holds the count[b] ones in slots first[b], first[b] + 1, ... modulo W, oldest
    first. first, count (B,) int64."""
    k: Tensor
    v: Tensor
    first: Tensor
    count: Tensor

    def order(self) -> Tensor:
        """Number of the token in each slot, oldest 0, count or more where there is none: (B, W) int64."""
        W = max(self.k.size(2), 1)
        return (torch.arange(self.k.size(2), device=self.k.device) - self.first[:, None]) % W


class Sums(NamedTuple):
    """Which packed tokens each of P attention sums takes: those with mask & select == want. select, want (P,) int64; the first takes all
    (0, 0), and only it the tail."""
    select: Tensor
    want: Tensor


def packed_attention_ref(q: Tensor, packed: Packed | None, tail: Tail | None, sums: Sums | None = None) -> tuple[Tensor, Tensor]:
    """packed_attention by unpacking everything: the specification."""
    B, H, T, D = q.shape
    keys, values, seen, takes = [], [], [], []
    Hkv = (packed.token_base if packed else tail.k).size(1)
    if packed:
        k, z, mask, valid = packed.unpack()
        keys, values, seen = [k], [z], [valid[:, :, None].expand(-1, Hkv, T, -1)]
        if sums:
            bits = mask_to_bits(mask).long().expand(-1, Hkv, -1)[:, :, None]  # (B, Hkv, 1, N)
            takes = [((bits & s) == w) for s, w in zip(sums.select, sums.want, strict=True)]
    if tail:
        order = tail.order()[:, None]  # (B, 1, W)
        last = tail.count[:, None, None] - T + torch.arange(T, device=q.device)[:, None]  # (B, T, 1) what each query may read
        keys, values = [*keys, tail.k], [*values, tail.v]
        seen.append(((order <= last) & (order < tail.count[:, None, None]))[:, None].expand(-1, Hkv, -1, -1))
        takes = [F.pad(t, (0, order.size(-1)), value=i == 0) for i, t in enumerate(takes)]
    k, v, seen = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(seen, -1).unsqueeze(2)  # (B, Hkv, 1, T, L)
    s = at_least_float32((q * D ** -0.5).view(B, Hkv, -1, T, D) @ k.unsqueeze(2).mT).masked_fill(~seen, float("-inf"))  # (B, Hkv, n, T, L)
    lse = s.logsumexp(-1)
    p = (s - lse.clamp_min(torch.finfo(s.dtype).min).unsqueeze(-1)).exp().to(v.dtype)
    out = [(p * t.unsqueeze(2) if takes else p) @ v.unsqueeze(2) for t in takes or [None]]
    return (torch.stack(out, -2).view(B, H, T, -1, D) if sums else out[0].view(B, H, T, D)), lse.view(B, H, T)


def merged(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over what several calls of packed_attention read apart, (out, lse) each: (B, H, T, D). Where none read a thing: 0."""
    lse = torch.stack([p[1] for p in parts])
    weight = (lse - lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)).exp()
    weight = weight / weight.sum(0).clamp_min(torch.finfo(lse.dtype).tiny)
    return sum(out * w.unsqueeze(-1) for (out, _), w in zip(parts, weight, strict=True)).to(parts[0][0].dtype)


@jit
def _popcount(x):
    """Bits set in each uint32 or uint64, int32; the compiler knows the idiom."""
    if x.dtype == tl.uint64:
        x = x - ((x >> 1) & 0x5555555555555555)
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
        return ((x * 0x0101010101010101) >> 56).to(tl.int32)
    else:
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.int32)


@jit
def _product(a, b, c):
    """a @ b + c in float32; float32 factors are not rounded."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@jit
def _softmax_step(s, v, m, den, acc, take, P: tl.constexpr):
    """Online softmax: maximum m, sum den (M,) and weighted values acc (M, DP) after a block of logits s (M, N), in units of log 2, and
    values v (N, DP). take, broadcastable to s: what goes into acc, where there are P > 1 sums."""
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet
    p, alpha = tl.exp2(s - base[:, None]), tl.exp2(m - base)
    den = den * alpha + tl.sum(p, 1)
    if P > 1:
        p = tl.where(take, p, 0.0)
    return top, den, _product(p.to(v.dtype), v, acc * alpha[:, None])


@jit
def _where_rows(bits, before, tile_rows, t, hi, K: tl.constexpr, TILE: tl.constexpr):
    """Masks of tokens t, 0 from hi on, and the number of rows before each, int32."""
    mask = tl.load(bits + t, mask=t < hi, other=0)
    if K > 0:
        return mask, t * K
    else:
        return mask, tl.load(tile_rows + t // TILE, mask=t < hi, other=0) + tl.load(before + t, mask=t < hi, other=0).to(tl.int32)


@jit
def _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N: tl.constexpr):
    """Of a segment, or of several: packed tokens, tail slots, the tail's first and count; the size of its pieces, equal and at most chunk
    (rounded up to N), and their number, 0 for what is no segment."""
    b, h, there = seg // Hkv, seg % Hkv, seg < segments
    count = tl.load(n_packed + b * n_b + h * n_h, mask=there, other=0).to(tl.int32)
    first = tl.load(tail_first + b, mask=there, other=0).to(tl.int32) % W
    tail_n = tl.load(tail_n + b, mask=there, other=0).to(tl.int32)
    slots = tl.where(tail_n > 0, tl.minimum(first + tail_n, W), 0)
    total = tl.maximum(count + slots, 1)
    size = tl.cdiv(tl.cdiv(total, tl.cdiv(total, chunk)), N) * N
    return count, slots, first, tail_n, size, tl.where(there, tl.cdiv(total, size), 0)


@jit
def _attention_kernel(q, keys, rows, bits, before, tile_rows, n_packed, token_base, row_base, mask_base, tile_base, tail_k, tail_v, tail_first,
                      tail_n, select, want, out, lse, part, part_ml, scale, segments, Hkv, n_b, n_h, W, chunk, parts, Hm, n, T, q_b,
                      q_h, q_t, SEGS: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
                      P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
                      STAGES: tl.constexpr):
    """One piece of one segment: M of its R query rows over packed tokens and tail slots, N at a time. Row (sum, query, head of the group)."""
    seg, c, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M + tl.arange(0, M)  # pieces past a segment's end come last
    if SEGS > 0:  # pieces of all segments in a row
        s = tl.arange(0, SEGS)
        _, _, _, _, _, number = _pieces(n_packed, tail_first, tail_n, s, segments, Hkv, n_b, n_h, W, chunk, N)
        pid = seg
        seg = tl.sum((tl.cumsum(number, 0) <= pid).to(tl.int32), 0)
        c = pid - tl.sum(tl.where(s < seg, number, 0), 0)
        if seg >= segments:
            return
    b, h, R = seg // Hkv, seg % Hkv, P * T * n
    mseg = b * Hm + (h if Hm > 1 else 0)
    keys += tl.load(token_base + seg) * D
    rows += tl.load(row_base + seg) * (D // S)
    mask_at = tl.load(mask_base + mseg)
    bits += mask_at
    if K == 0:
        before += mask_at
        tile_rows += tl.load(tile_base + mseg)
    count, slots, first, tail_n, size, active = _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N)
    if SPLIT:  # noqa: SIM102 (one of them is known when compiling)
        if c >= active:
            return
    own, j, which = row // n % T, row % n, row // (T * n)  # query, head of the group, sum
    dims, at, d = tl.arange(0, DP), tl.arange(0, N), D // S
    in_d, in_r = dims < D, row < R
    there = in_r[:, None] & in_d[None, :]
    x = tl.load(q + b * q_b + (h * n + j)[:, None] * q_h + own[:, None] * q_t + dims[None, :], mask=there, other=0.0)
    m, den = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc, none = tl.zeros([M, DP], tl.float32), tl.zeros([M, N], tl.float32)
    if P > 1:
        select = tl.load(select + which, mask=in_r, other=0).to(tl.uint32)
        want = tl.load(want + which, mask=in_r, other=0).to(tl.uint32)
    group = dims // d

    lo, hi = c * size, tl.minimum((c + 1) * size, count)
    mask, offset = _where_rows(bits, before, tile_rows, lo + at, hi, K, TILE)
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        live = t < hi
        if K > 0:
            offset = t * K
        if S == 64:
            word = mask.to(tl.uint64, bitcast=True)
        elif S == 16:
            word = mask.to(tl.uint16, bitcast=True).to(tl.uint32)
        else:
            word = mask.to(tl.uint32)
        key = tl.load(keys + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0, eviction_policy="evict_first")
        logits = tl.where(live[None, :], _product(x, tl.trans(key), none) * scale, float("-inf"))
        one, g = tl.full([1, 1], 1, word.dtype), group[None, :].to(word.dtype)
        has = ((word[:, None] >> g) & one) != 0
        place = (offset[:, None] + _popcount(word[:, None] & ((one << g) - one))) * d + (dims % d)[None, :]
        if ALIGN > 1:  # neighbouring dimensions of a group lie side by side: loads as wide as that allows
            place = tl.max_contiguous(tl.multiple_of(place, [1, ALIGN]), [1, ALIGN])
            has = tl.max_constancy(has, [1, ALIGN])
        value = tl.load(rows + place, mask=has if DP == D else has & in_d[None, :], other=0.0, eviction_policy="evict_first")
        mask, offset = _where_rows(bits, before, tile_rows, t + N, hi, K, TILE)  # of the next block, while this one's values come
        take = live[None, :]
        if P > 1:
            take = (word[None, :] & select[:, None]) == want[:, None]
        m, den, acc = _softmax_step(logits, value, m, den, acc, take, P)

    lo, hi = tl.maximum(c * size - count, 0), tl.minimum((c + 1) * size - count, slots)
    tail_k += seg.to(tl.int64) * W * D
    tail_v += seg.to(tl.int64) * W * D
    for t0 in tl.range(lo, hi, N, num_stages=STAGES):
        t = t0 + at
        order = (t - first + W) % W
        live = (t < hi) & (order < tail_n)
        key = tl.load(tail_k + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
        value = tl.load(tail_v + t[:, None] * D + dims[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
        seen = live[None, :] & (order[None, :] <= tail_n - T + own[:, None])
        logits = tl.where(seen, _product(x, tl.trans(key), none) * scale, float("-inf"))
        m, den, acc = _softmax_step(logits, value, m, den, acc, (which == 0)[:, None], P)

    if SPLIT:
        at_row = (tl.program_id(0) if SEGS > 0 else seg * parts + c).to(tl.int64) * R + row
        tl.store(part + at_row[:, None] * D + dims[None, :], acc, mask=there)
        tl.store(part_ml + at_row * 2, m, mask=in_r)
        tl.store(part_ml + at_row * 2 + 1, den, mask=in_r)
    else:
        at_row = (seg.to(tl.int64) * n + j) * T + own
        total = tl.where(den > 0, den, 1.0)
        tl.store(out + (at_row * P + which)[:, None] * D + dims[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=there)
        tl.store(lse + at_row, (m + tl.log2(total)) * 0.6931471805599453, mask=in_r & (which == 0))


@jit
def _merge_kernel(part, part_ml, n_packed, tail_first, tail_n, out, lse, segments, Hkv, n_b, n_h, W, chunk, parts, n, T, SEGS: tl.constexpr,
                  D: tl.constexpr, P: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """One query row of one segment: its pieces' softmaxes joined, C at a time."""
    r, seg = tl.program_id(0), tl.program_id(1)
    _, _, _, _, _, active = _pieces(n_packed, tail_first, tail_n, seg, segments, Hkv, n_b, n_h, W, chunk, N)
    start = seg * parts
    if SEGS > 0:
        s = tl.arange(0, SEGS)
        _, _, _, _, _, number = _pieces(n_packed, tail_first, tail_n, s, segments, Hkv, n_b, n_h, W, chunk, N)
        start = tl.sum(tl.where(s < seg, number, 0), 0)
    dims = tl.arange(0, DP)
    top, total, mixed = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([DP], tl.float32)
    for c0 in range(0, active, C):
        c = c0 + tl.arange(0, C)
        at = (start + c).to(tl.int64) * (P * T * n) + r
        m = tl.load(part_ml + at * 2, mask=c < active, other=float("-inf"))
        den = tl.load(part_ml + at * 2 + 1, mask=c < active, other=0.0)
        o = tl.load(part + at[:, None] * D + dims[None, :], mask=(c < active)[:, None] & (dims < D)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        w, alpha = tl.exp2(m - base), tl.exp2(top - base)
        total = total * alpha + tl.sum(den * w, 0)
        mixed = mixed * alpha + tl.sum(o * w[:, None], 0)
        top = new
    total = tl.where(total > 0, total, 1.0)
    at = (seg.to(tl.int64) * n + r % n) * T + r // n % T
    tl.store(out + (at * P + r // (T * n)) * D + dims, (mixed / total).to(out.dtype.element_ty), mask=dims < D)
    if r < T * n:
        tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453)


_per_sm: dict[tuple, int] = {}  # programs of a compiled variant that a multiprocessor holds at a time


def packed_attention(q: Tensor, packed: Packed | None, tail: Tail | None, sums: Sums | None = None, impl: str = "auto",
                     chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of the newest T tokens, q (B, H, T, D), over packed tokens, all older than they, and a tail that ends with those T:
    (out, lse). One of packed and tail may be None.

    out (B, H, T, D) like q; with `sums` (B, H, T, P, D), softmax weights times values summed over what each sum takes, dropped groups
    zero; lse (B, H, T) float32 (float64 of float64): log of the sum of exp(q . k / sqrt(D)), -inf (and out 0) where there is nothing to
    read. chunk: tokens to a program, 0: such that all programs run at a time. The kernel takes D up to 256 and, with sums, S up to 32; float64
    and what is larger go to the reference."""
    B, H, T, D = q.shape
    if not use_triton(impl, q) or D > 256 or (sums and packed and packed.n_groups > 32):
        return packed_attention_ref(q, packed, tail, sums)
    Hkv = (packed.token_base if packed else tail.k).size(1)
    none = None if packed and tail else torch.zeros(B, Hkv, dtype=torch.int64, device=q.device)
    p, tail = packed or Packed(q, q, none, None, None, none, none, none, none, none, 1, 1, 0, 0), tail or Tail(q[:, :, :0], q, none, none)
    assert not tail.k.numel() or (tail.k.is_contiguous() and tail.v.is_contiguous()), "a tail is read by address: k, v must be contiguous"
    Hm, n, S, W = p.mask_base.size(1), H // Hkv, p.n_groups, tail.k.size(2)
    P = len(sums.select) if sums else 1
    R, narrow, segments, given = P * T * n, q.dtype != torch.float32, B * Hkv, chunk
    M = min(64 if narrow else 16, max(16, triton.next_power_of_2(R)))
    DP, blocks = max(16, triton.next_power_of_2(D)), -(-R // M)
    N, warps, stages = ((32, 1, 1) if M == 16 and DP <= 128 else (64, 4, 2)) if narrow else (16, 4, 1)  # what an H100 likes: docs/log.md
    shape = dict(D=D, S=S, K=p.k, TILE=tile_size(S), P=P, M=M, N=N, DP=DP, ALIGN=D // S & -(D // S), STAGES=stages)
    variant = (q.dtype, p.bits.dtype, *shape.values())
    if not chunk:  # one piece per program, and all programs run at a time
        programs = _multiprocessors(q.device) * _per_sm.get(variant, 8) // blocks
        chunk = -(-(p.held + segments * W) // max(1, programs - segments))
    size = max(N, -(-chunk // N) * N)
    parts = max(1, -(-(p.longest + W) // size))
    bound = -(-p.held // size) + segments * (1 + -(-W // size))  # pieces of all segments, if `held` is exact
    ragged = parts > 1 and p.exact and 4 * bound < 3 * segments * parts and segments <= 1024  # then many would have nothing to do
    grid, SEGS = ((bound, 1), triton.next_power_of_2(segments)) if ragged else ((segments, parts), 0)
    out = q.new_empty(B, H, T, P, D) if sums else q.new_empty(B, H, T, D)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    part, part_ml = (torch.empty(grid[0] * grid[1] * R * w if parts > 1 else 1, dtype=torch.float32, device=q.device) for w in (D, 2))
    select, want = sums or (tail.count, tail.count)
    q = q if q.stride(-1) == 1 else q.contiguous()
    where = (segments, Hkv, p.n.stride(0), p.n.stride(1) if Hm > 1 else 0, max(W, 1), size, parts)
    compiled = _attention_kernel[(*grid, blocks)](
        q, p.keys, p.rows, p.bits, p.before, p.tile_rows, p.n, p.token_base, p.row_base, p.mask_base, p.tile_base, tail.k, tail.v, tail.first,
        tail.count, select, want, out, lse, part, part_ml, D ** -0.5 * math.log2(math.e), *where, Hm, n, T, *q.stride()[:3], SEGS=SEGS, **shape,
        SPLIT=parts > 1, num_warps=warps)
    if q.is_cuda and not given and variant not in _per_sm:
        _per_sm[variant] = _resident(compiled, warps, q.device)
        return packed_attention(q, packed, tail, sums, impl)  # once more, in pieces of the right size
    if parts > 1:
        _merge_kernel[(R, segments)](part, part_ml, p.n, tail.first, tail.count, out, lse, *where, n, T, SEGS=SEGS, D=D, P=P, DP=DP,
                                     N=N, C=8192 // DP, num_warps=4)
    return out, lse


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _resident(compiled, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that fit a multiprocessor at a time, by registers, shared memory and warps."""
    card = torch.cuda.get_device_properties(device)
    registers = -(-compiled.n_regs // 8) * 8 * 32 * warps
    return max(1, min(card.regs_per_multiprocessor // registers, card.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
                      card.max_threads_per_multi_processor // (32 * warps)))


# ----------------------------------------------------------------------------- one more token

@jit
def _append_tail_kernel(k, v, tail_k, tail_v, first, count, Hkv, W, k_b, k_h, v_b, v_h, D: tl.constexpr, DP: tl.constexpr):
    b, h = tl.program_id(0) // Hkv, tl.program_id(0) % Hkv
    dims = tl.arange(0, DP)
    slot = (tl.load(first + b) + tl.load(count + b) - 1) % W
    to = (tl.program_id(0) * W + slot) * D + dims
    tl.store(tail_k + to, tl.load(k + b * k_b + h * k_h + dims, mask=dims < D), mask=dims < D)
    tl.store(tail_v + to, tl.load(v + b * v_b + h * v_h + dims, mask=dims < D), mask=dims < D)


def append_tail(tail: Tail, k: Tensor, v: Tensor, impl: str = "auto") -> None:
    """Store one token per sequence, k, v (B, Hkv, 1, D), as the newest of tail, whose count includes it already."""
    if not use_triton(impl, k):
        b, slot = torch.arange(k.size(0), device=k.device), (tail.first + tail.count - 1) % tail.k.size(2)
        tail.k[b, :, slot], tail.v[b, :, slot] = k[:, :, 0], v[:, :, 0]
        return
    (B, Hkv, _, D), (k, v) = k.shape, (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _append_tail_kernel[(B * Hkv,)](k, v, tail.k, tail.v, tail.first, tail.count, Hkv, tail.k.size(2), *k.stride()[:2], *v.stride()[:2], D,
                                    triton.next_power_of_2(D), num_warps=1)


@jit
def _encoded(v, enc, h, in_h, D: tl.constexpr, ENCODE: tl.constexpr):
    """Values at v (HP,) pointers, one per head, times enc (Hkv, D, D): (HP, D) in their own dtype."""
    dims = tl.arange(0, D)
    if ENCODE:
        z = tl.zeros([h.shape[0], D], tl.float32)
        for i in range(D):
            x = tl.load(v + i, mask=in_h, other=0.0).to(tl.float32)
            z += x[:, None] * tl.load(enc + (h * D + i)[:, None] * D + dims[None, :], mask=in_h[:, None], other=0.0).to(tl.float32)
        return z.to(v.dtype.element_ty)
    else:
        return tl.load(v[:, None] + dims[None, :], mask=in_h[:, None], other=0.0)


@jit
def _append_packed_kernel(k, v, scores, enc, keys, rows, bits, token_base, row_base, mask_base, tail_k, tail_v, tail_bits, n_packed, n_tail, Hkv,
                          W, keep, block, k_b, k_h, v_b, v_h, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, HP: tl.constexpr,
                          SHARED: tl.constexpr, SCORES: tl.constexpr, ENCODE: tl.constexpr):
    """One sequence: mask of the new token; if the tail is full its oldest `block` tokens are packed; the new one goes to the tail."""
    b, h, dims, d = tl.program_id(0).to(tl.int64), tl.arange(0, HP), tl.arange(0, D), D // S
    in_h, Hm = h < Hkv, 1 if SHARED else Hkv
    seg, mh = b * Hkv + h, h * 0 if SHARED else h
    packed, held = tl.load(n_packed + b), tl.load(n_tail + b)
    k += b * k_b + h * k_h  # (HP,) pointers
    v += b * v_b + h * v_h
    g = tl.arange(0, S)
    if SCORES:
        e = tl.load(scores + ((b * Hm + mh) * S)[:, None] + g[None, :], mask=in_h[:, None], other=0.0).to(tl.float32)
    else:
        z = _encoded(v, enc, h, in_h, D, ENCODE).to(tl.float32)
        e = tl.sum(tl.reshape(z * z, (HP, S, D // S)), 2)
        if SHARED:
            e = tl.sum(e, 0)[None, :] + tl.zeros([HP, S], tl.float32)
    other, mine = e[:, None, :], e[:, :, None]  # (HP, S, S)
    better = (other > mine) | ((other == mine) & (g[None, None, :] < g[None, :, None]))  # of equal ones the lower group
    best = tl.sum(better.to(tl.int32), 2) < K  # (HP, S)
    word = tl.sum(best.to(tl.int64) << g[None, :], 1)
    full = held + 1 == keep + block
    if full:
        token_at, row_at = tl.load(token_base + seg, mask=in_h, other=0), tl.load(row_base + seg, mask=in_h, other=0)
        mask_at = tl.load(mask_base + b * Hm + mh, mask=in_h, other=0)
        for i in range(block):
            t = packed + i
            if i == held:  # there is no tail: the new token itself
                from_k, from_v, kept = k, v, word
            else:
                ring = seg * W + t % W
                from_k, from_v = tail_k + ring * D, tail_v + ring * D
                kept = tl.load(tail_bits + (b * Hm + mh) * W + t % W, mask=in_h, other=0).to(tl.int64)
            tl.store(keys + (token_at + t)[:, None] * D + dims[None, :], tl.load(from_k[:, None] + dims[None, :], mask=in_h[:, None]),
                     mask=in_h[:, None])
            tl.store(bits + mask_at + t, kept.to(bits.dtype.element_ty), mask=h < Hm)
            bit = tl.full([1, 1], 1, tl.uint64) << (dims // d)[None, :].to(tl.uint64)
            kept = kept.to(tl.uint64, bitcast=True)[:, None]
            row = (row_at + t * K)[:, None] + _popcount(kept & (bit - 1))
            tl.store(rows + row * d + (dims % d)[None, :], _encoded(from_v, enc, h, in_h, D, ENCODE), mask=in_h[:, None] & ((kept & bit) != 0))
    tl.debug_barrier()  # what was packed has been read
    if held < keep + block - 1 or keep > 0:  # it has not been packed at once
        at = (packed + held) % W
        to, there = ((seg * W + at) * D)[:, None] + dims[None, :], in_h[:, None]
        tl.store(tail_k + to, tl.load(k[:, None] + dims[None, :], mask=there), mask=there)
        tl.store(tail_v + to, tl.load(v[:, None] + dims[None, :], mask=there), mask=there)
        tl.store(tail_bits + (b * Hm + mh) * W + at, word.to(tail_bits.dtype.element_ty), mask=h < Hm)
    tl.store(n_packed + b, packed + tl.where(full, block, 0))
    tl.store(n_tail + b, held + 1 - tl.where(full, block, 0))


def can_append(head_dim: int) -> bool:
    """Whether append_packed has a kernel for heads of this size."""
    return triton is not None and head_dim & (head_dim - 1) == 0 and 16 <= head_dim <= 256


def append_packed(packed: Packed, tail: Tail, tail_bits: Tensor, n_packed: Tensor, n_tail: Tensor, k: Tensor, v: Tensor, keep: int, block: int,
                  scores: Tensor | None = None, enc: Tensor | None = None) -> None:
    """One token per sequence, k, v (B, Hkv, 1, D), into a cache of fixed K, all on the device: PackedCache.append is the specification.

    n_packed, n_tail (B,) int64, updated; the tail keeps `keep` tokens and gives away its oldest `block` when it holds as many more. scores
    (B, Hm, S): the new token keeps the K largest; None: by its groups' norms. enc (Hkv, D, D): what values go through when packed."""
    (B, Hkv, _, D), W, Hm = k.shape, tail.k.size(2), packed.mask_base.size(1)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _append_packed_kernel[(B,)](
        k, v, scores, enc, packed.keys, packed.rows, packed.bits, packed.token_base, packed.row_base, packed.mask_base, tail.k, tail.v, tail_bits,
        n_packed, n_tail, Hkv, max(W, 1), keep, block, *k.stride()[:2], *v.stride()[:2], D=D, S=packed.n_groups, K=packed.k,
        HP=triton.next_power_of_2(Hkv), SHARED=Hm == 1, SCORES=scores is not None, ENCODE=enc is not None, num_warps=1 if Hkv * D <= 1024 else 4)
