"""How attention kernels share out their work: tokens are cut into pieces, one to a program.

The tokens of one head would keep one program busy while the rest of a GPU waits. So a segment (the
tokens that one sequence holds for one KV head: packed ones, then slots of its window) is cut into
pieces, each program leaves what it has summed of one, and _merge_kernel joins them: equation (3) of
kernels.py, where the attention kernel and its letters are.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from storage.kernel_base import capped, jit, product, tl, triton
from storage.layout import PackedView, WindowView, cdiv

# -------------------- on the device


@jit
def segment_pieces(
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
    UNIT: tl.constexpr,
):
    """Say how a segment, or each of several, is cut into pieces.

    Its packed tokens and then its window's slots are cut into pieces of equal size, at most `chunk`
    (a multiple of UNIT). The window begins with a UNIT of its own, so that where pieces are short
    no program waits for tokens of both kinds. Returns packed tokens, slots, the window's first slot
    and its count, the place of slot 0, the size of a piece and the number of pieces, 0 for what is
    no segment."""
    b = seg // Hkv
    h = seg % Hkv
    there = seg < segments
    n_packed = tl.load(n_packed_ptr + b * n_stride_b + h * n_stride_h, mask=there, other=0)
    n_packed = n_packed.to(tl.int32)
    if first_ptr is not None:
        first = tl.load(first_ptr + b, mask=there, other=0).to(tl.int32) % W
        count = tl.load(count_ptr + b, mask=there, other=0).to(tl.int32)
    else:
        count = tl.load(count_ptr + b, mask=there, other=0).to(tl.int32)
        first = count * 0
    n_slots = tl.where(count > 0, tl.minimum(first + count, W), 0)
    behind = tl.cdiv(n_packed, UNIT) * UNIT
    total = tl.maximum(behind + n_slots, 1)
    size = tl.cdiv(tl.cdiv(total, tl.cdiv(total, chunk)), UNIT) * UNIT
    pieces = tl.where(there, tl.cdiv(total, size), 0)
    return n_packed, n_slots, first, count, behind, size, pieces


@jit
def find_piece(
    n_packed_ptr,
    first_ptr,
    count_ptr,
    segments,
    Hkv,
    n_stride_b,
    n_stride_h,
    W,
    chunk,
    UNIT: tl.constexpr,
    SEGS: tl.constexpr,
):
    """Return segment and piece of this program.

    SEGS = 0: the grid is (segments, pieces), and the last programs of a short segment have none.
    SEGS > 0, `segments` rounded up to a power of 2: the grid is the pieces of all segments in a
    row, and programs past the last one get a segment that is none."""
    seg = tl.program_id(0)
    piece = tl.program_id(1)
    if SEGS > 0:
        each = tl.arange(0, SEGS)
        _, _, _, _, _, _, number = segment_pieces(
            n_packed_ptr,
            first_ptr,
            count_ptr,
            each,
            segments,
            Hkv,
            n_stride_b,
            n_stride_h,
            W,
            chunk,
            UNIT,
        )
        pid = seg
        seg = tl.sum((tl.cumsum(number, 0) <= pid).to(tl.int32), 0)
        piece = pid - tl.sum(tl.where(each < seg, number, 0), 0)
    return seg, piece


@jit
def weigh_columns(logits, m, den):
    """Do what kernels.softmax_weights does for logits (N, M), a column for each query. m is finite,
    -1e38 where nothing has been read yet."""
    top = tl.maximum(m, tl.max(logits, 0))
    p = tl.exp2(logits - top[None, :])
    alpha = tl.exp2(m - top)
    return top, den * alpha + tl.sum(p, 0), p, alpha


@jit
def read_window_columns(
    q_ptr,
    m,
    den,
    acc,
    k_ptr,
    v_ptr,
    dims,
    in_dims,
    query,
    in_row,
    start,
    end,
    first,
    count,
    W,
    T,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    DP: tl.constexpr,
    CAP: tl.constexpr,
):
    """Let queries read slots of one head's window, as kernels.read_window, with tokens and dims on
    the long side: q_ptr (1, M) addresses, acc (dims, M) in the order of `dims`, den (M,)."""
    N: tl.constexpr = 32 if DP <= 64 else 16  # slots at a time: as many as registers hold
    whole = tl.arange(0, DP)
    x = tl.load(q_ptr + whole[:, None], mask=(whole < D)[:, None] & in_row[None, :], other=0.0)
    for t0 in tl.range(start, end, N, num_stages=1):
        t = t0 + tl.arange(0, N)
        number = (t - first + W) % W  # of the token in the slot, oldest 0
        live = (t < end) & (number < count)
        key = tl.load(
            k_ptr + t[:, None] * D + whole[None, :],
            mask=live[:, None] & (whole < D)[None, :],
            other=0.0,
        )
        value = tl.load(
            v_ptr + t[:, None] * D + dims[None, :],
            mask=live[:, None] & in_dims[None, :],
            other=0.0,
        )
        seen = live[:, None] & (number[:, None] <= count - T + query[None, :])
        logits = capped(product(key, x, tl.zeros([N, M], tl.float32)) * scale, CAP)
        logits = tl.where(seen, logits, float("-inf"))
        m, den, p, alpha = weigh_columns(logits, m, den)
        acc = product(tl.trans(value), p.to(x.dtype), acc * alpha[None, :])
    return m, den, acc


@jit
def store_rows(
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
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store what M rows of queries of a segment have read: the result, or, where the segment is
    SPLIT into pieces, m, den and acc of the piece in `place` for _merge_kernel. D: numbers that are
    stored; WIDE: those from a row to the next."""
    dim = tl.arange(0, DP)[None, :]
    in_row = row < T * n
    there = in_row[:, None] & (dim < D)
    if SPLIT:
        at = place.to(tl.int64) * (T * n) + row
        tl.store(part_ptr + at[:, None] * WIDE + dim, acc, mask=there)
        tl.store(part_ml_ptr + at * 2, m, mask=in_row)
        tl.store(part_ml_ptr + at * 2 + 1, den, mask=in_row)
    else:
        at = (seg.to(tl.int64) * n + row % n) * T + row // n % T
        total = tl.where(den > 0, den, 1.0)
        result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] * WIDE + dim, result, mask=there)
        tl.store(lse_ptr + at, (m + tl.log2(total)) * 0.6931471805599453, mask=in_row)


@jit
def _merge_kernel(
    part_ptr,
    part_ml_ptr,
    n_packed_ptr,
    first_ptr,
    count_ptr,
    out_ptr,
    lse_ptr,
    segments,
    Hkv,
    n,
    T,
    W,
    chunk,
    parts,
    n_stride_b,
    n_stride_h,
    SEGS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    DS: tl.constexpr,
    C: tl.constexpr,
):
    """Join the pieces of one query row of one segment, C at a time, for DS of its D dimensions."""
    row = tl.program_id(0)
    seg = tl.program_id(1)
    _, _, _, _, _, _, active = segment_pieces(
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
        UNIT,
    )
    start = seg * parts
    if SEGS > 0:
        each = tl.arange(0, SEGS)
        _, _, _, _, _, _, number = segment_pieces(
            n_packed_ptr,
            first_ptr,
            count_ptr,
            each,
            segments,
            Hkv,
            n_stride_b,
            n_stride_h,
            W,
            chunk,
            UNIT,
        )
        start = tl.sum(tl.where(each < seg, number, 0), 0)
    dim = tl.program_id(2) * DS + tl.arange(0, DS)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([DS], tl.float32)
    for c0 in range(0, parts, C):
        c = c0 + tl.arange(0, C)
        at = (start + c).to(tl.int64) * (T * n) + row
        # What no piece wrote is read, too, so that loads need not wait for counts.
        there = c < (active if SEGS > 0 else parts)
        m = tl.load(part_ml_ptr + at * 2, mask=there, other=0.0)
        den = tl.load(part_ml_ptr + at * 2 + 1, mask=there, other=0.0)
        acc = tl.load(
            part_ptr + at[:, None] * D + dim[None, :],
            mask=there[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        m = tl.where(c < active, m, float("-inf"))
        den = tl.where(c < active, den, 0.0)
        acc = tl.where((c < active)[:, None], acc, 0.0)
        new = tl.maximum(top, tl.max(m, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(m - base)
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(den * weight, 0)
        mixed = mixed * alpha + tl.sum(acc * weight[:, None], 0)
        top = new
    total = tl.where(total > 0, total, 1.0)
    at = (seg.to(tl.int64) * n + row % n) * T + row // n % T
    tl.store(out_ptr + at * D + dim, (mixed / total).to(out_ptr.dtype.element_ty), mask=dim < D)
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + at, (top + tl.log2(total)) * 0.6931471805599453)


# -------------------- on the host


class Variant(NamedTuple):
    """An attention kernel and how it is compiled."""

    kernel: Any
    M: int  # query rows of a program
    unit: int  # a piece is a multiple of so many tokens
    warps: int
    constants: dict[str, Any]  # what is known when compiling
    pointers: dict[str, Any]  # what it reads beside what every variant reads
    sums: int = 1  # of D numbers each, that a query gets beside one another
    dtype: torch.dtype | None = None  # of the result; None: that of queries


class Pieces(NamedTuple):
    """How the tokens of all segments are cut, one piece to a program."""

    chunk: int  # tokens of a piece at most
    parts: int  # pieces of the longest segment
    grid: tuple[int, int]
    SEGS: int  # see find_piece


def _cut(packed: PackedView, segments: int, W: int, chunk: int, unit: int) -> Pieces:
    """Cut packed tokens and W window slots of every segment into pieces of about `chunk` tokens.

    Where segments differ so much that a quarter of a grid (segments, parts) would have nothing to
    do, their pieces are laid in a row."""
    chunk = max(unit, cdiv(chunk, unit) * unit)
    parts = max(1, cdiv(cdiv(packed.longest, unit) * unit + W, chunk))
    # pieces, if held is exact
    bound = cdiv(packed.held, chunk) + segments * (1 + cdiv(unit + W, chunk))
    if parts > 1 and packed.exact and segments <= 1024 and 4 * bound < 3 * segments * parts:
        return Pieces(chunk, parts, (bound, 1), triton.next_power_of_2(segments))
    return Pieces(chunk, parts, (segments, parts), 0)


# Programs of a compiled variant that a multiprocessor holds at a time.
_per_sm: dict[tuple, int] = {}


def attend_in_pieces(
    q: Tensor, packed: PackedView, window: WindowView, variant: Variant, chunk: int
) -> tuple[Tensor, Tensor]:
    """Run an attention kernel on all pieces and join them: kernels.packed_attention.

    chunk: tokens of a piece; 0: as many as let all programs run at a time, which is known once the
    kernel has been compiled. So a variant's first launch on a GPU is done twice."""
    B, H, T, _ = q.shape
    Hkv = packed.token_base.size(1)
    segments = B * Hkv
    W = window.k.size(2)
    blocks = cdiv(H // Hkv * T, variant.M)
    key = (q.dtype, packed.bits.dtype, *variant.constants.items())
    programs = multiprocessors(q.device) * _per_sm.get(key, 8) // blocks
    fill = cdiv(packed.held + segments * W, max(1, programs - segments))
    pieces = _cut(packed, segments, W, chunk or fill, variant.unit)
    compiled, out, lse = _launch(q, packed, window, variant, pieces, blocks)
    if q.is_cuda and not chunk and key not in _per_sm:
        _per_sm[key] = _resident(compiled, variant.warps, q.device)
        return attend_in_pieces(q, packed, window, variant, chunk)
    return out, lse


def _launch(
    q: Tensor,
    packed: PackedView,
    window: WindowView,
    variant: Variant,
    pieces: Pieces,
    blocks: int,
) -> tuple[Any, Tensor, Tensor]:
    """Run the attention kernel and, for more than one piece, _merge_kernel.

    Returns the compiled kernel, out (B, H, T, variant.sums * D) and lse as in packed_attention."""
    B, H, T, D = q.shape
    width = variant.sums * D
    Hkv = packed.token_base.size(1)
    Hm = packed.mask_base.size(1)
    n = H // Hkv
    split = pieces.parts > 1
    places = math.prod(pieces.grid) * n * T if split else 0
    out = torch.empty(B, H, T, width, dtype=variant.dtype or q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    part = torch.empty(places * width, dtype=torch.float32, device=q.device)
    part_ml = torch.empty(places * 2, dtype=torch.float32, device=q.device)
    both = dict(
        n_packed_ptr=packed.n,
        first_ptr=window.first,
        count_ptr=window.count,
        out_ptr=out,
        lse_ptr=lse,
        part_ptr=part,
        part_ml_ptr=part_ml,
        segments=B * Hkv,
        Hkv=Hkv,
        n=n,
        T=T,
        W=max(window.k.size(2), 1),
        chunk=pieces.chunk,
        parts=pieces.parts,
        n_stride_b=packed.n.stride(0),
        n_stride_h=packed.n.stride(1) if Hm > 1 else 0,
        SEGS=pieces.SEGS,
    )
    compiled = variant.kernel[(*pieces.grid, blocks)](
        q_ptr=q,
        keys_ptr=packed.keys,
        rows_ptr=packed.rows,
        bits_ptr=packed.bits,
        before_ptr=packed.before,
        tile_rows_ptr=packed.tile_rows,
        token_base_ptr=packed.token_base,
        row_base_ptr=packed.row_base,
        mask_base_ptr=packed.mask_base,
        tile_base_ptr=packed.tile_base,
        window_k_ptr=window.k,
        window_v_ptr=window.v,
        scale=D**-0.5 * math.log2(math.e),
        Hm=Hm,
        q_stride_b=q.stride(0),
        q_stride_h=q.stride(1),
        q_stride_t=q.stride(2),
        SPLIT=split,
        **both,
        **variant.pointers,
        **variant.constants,
        num_warps=variant.warps,
    )
    if split:
        C = min(256, max(16, triton.next_power_of_2(pieces.parts)))
        DP = max(16, triton.next_power_of_2(width))
        DS = min(DP, 8192 // C)
        _merge_kernel[(n * T, B * Hkv, DP // DS)](
            **both, D=width, UNIT=variant.unit, DS=DS, C=C, num_warps=4
        )
    return compiled, out, lse


@cache
def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a GPU; a CPU has one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _resident(compiled: Any, warps: int, device: torch.device) -> int:
    """Count the programs of a compiled kernel that a multiprocessor holds at a time: by registers,
    shared memory and warps."""
    card = torch.cuda.get_device_properties(device)
    registers = cdiv(compiled.n_regs, 8) * 8 * 32 * warps
    n = min(
        card.regs_per_multiprocessor // registers,
        card.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
        card.max_threads_per_multi_processor // (32 * warps),
    )
    if warps == 1 and n > 4:
        return n - n % 4  # as many on each of four schedulers: nine take as long as twelve
    return max(1, n)
