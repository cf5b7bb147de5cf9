"""What a decode step does between two attentions, in four Triton kernels a layer.

A new token of each sequence is so little work that a step is the time of its launches: PyTorch
dispatches 43 operators a layer. So what surrounds a product is done by the program that computes
it, in its registers:

    project_heads   q, k, v = rope(norm(x) W)     and norm(x) itself, for paths that route by it
    add_product     x + y W                       twice: attention's output, then the MLP's
    gated_product   silu(norm(x) W_g) * norm(x) W_u

The norm needs no pass of its own: x / rms(x) * g times W is (x * g) W divided by rms(x), and both
sums run over the same numbers. Block.before and Block.after (model.py) are the reference, and what
runs where a block has parts that are not here.

Letters: B sequences, one token each; E numbers of x; H heads, Hkv KV heads, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from storage.kernel_base import jit, product, tl, triton
from storage.layout import cdiv


class Tile(NamedTuple):
    """How a product is cut: rows of x and columns of the result of a program, numbers of E that it
    takes at a time, and its warps and loads ahead."""

    rows: int
    columns: int
    deep: int
    warps: int
    stages: int


def tiles(batch: int) -> dict[str, Tile]:
    """Return the tile of each kernel. Columns of a head are of its first half, and as many of the
    other go with them."""
    if batch <= 16:
        tile = Tile(16, 16, 128, 4, 3)
        return {"heads": tile, "gate": tile, "add": tile}
    return {
        "heads": Tile(16, 16, 64, 4, 4),
        "gate": Tile(32, 32, 64, 4, 4),
        "add": Tile(16, 32, 64, 4, 4),
    }


# -------------------- on the device


@jit
def _products(
    x_ptr,
    norm_ptr,
    one_ptr,
    two_ptr,
    row,
    column,
    n_rows,
    n_columns,
    E,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply rows `row` of x (., E), normed where there is a norm_ptr, by the columns `column` of
    one or two matrices (., E), of which two_ptr may be None: two (ROWS, COLUMNS) in float32."""
    one = tl.zeros([ROWS, COLUMNS], tl.float32)
    two = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    in_row = (row < n_rows)[:, None]
    in_column = (column < n_columns)[None, :]
    for e0 in tl.range(0, E, DEEP, num_stages=STAGES):
        e = e0 + tl.arange(0, DEEP)
        in_e = e < E
        x = tl.load(x_ptr + row[:, None] * E + e[None, :], mask=in_row & in_e[None, :], other=0.0)
        at = column[None, :] * E + e[:, None]
        there = in_column & in_e[:, None]
        a = tl.load(one_ptr + at, mask=there, other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            gain = tl.load(norm_ptr + e, mask=in_e, other=0.0).to(tl.float32)
            x = (wide * gain[None, :]).to(x.dtype)
        one = product(x, a, one)
        if two_ptr is not None:
            b = tl.load(two_ptr + at, mask=there, other=0.0)
            two = product(x, b, two)
    if norm_ptr is not None:
        inverse = tl.rsqrt(squares / E + eps)[:, None]
        one *= inverse
        two *= inverse
    return one, two


@jit
def _heads_kernel(
    x_ptr,
    norm_ptr,
    q_weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    cos_ptr,
    sin_ptr,
    normed_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    B,
    H,
    Hkv,
    E,
    eps,
    query_gain,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute numbers of one head of q, k or v for ROWS sequences, turned by RoPE if it is q or k:
    COLUMNS of either half, two products. The programs after the last head store norm(x), one
    sequence each. WIDE: E rounded up to a power of 2."""
    after = tl.program_id(0) - (H + 2 * Hkv) * (HALF // COLUMNS)
    if after >= 0:
        b = tl.program_id(1) * ROWS + after
        e = tl.arange(0, WIDE)
        in_x = e < tl.where(b < B, E, 0)
        x = tl.load(x_ptr + b * E + e, mask=in_x, other=0.0).to(tl.float32)
        gain = tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        normed = x * tl.rsqrt(tl.sum(x * x, 0) / E + eps) * gain
        tl.store(normed_ptr + b * E + e, normed.to(normed_ptr.dtype.element_ty), mask=in_x)
        return
    head = tl.program_id(0) // (HALF // COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(0) % (HALF // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < B)[:, None] & (i < HALF)[None, :]
    is_q = head < H
    turns = head < H + Hkv
    heads = tl.where(is_q, H, Hkv)
    number = tl.where(is_q, head, tl.where(turns, head - H, head - H - Hkv))
    weight_ptr = q_weight_ptr
    out_ptr = q_ptr
    if head >= H:
        weight_ptr = k_weight_ptr
        out_ptr = k_ptr
    if head >= H + Hkv:
        weight_ptr = v_weight_ptr
        out_ptr = v_ptr
    weight_ptr += number * (2 * HALF) * E
    one, two = _products(
        x_ptr,
        norm_ptr,
        weight_ptr,
        weight_ptr + HALF * E,
        row,
        i,
        B,
        HALF,
        E,
        eps,
        ROWS,
        COLUMNS,
        DEEP,
        STAGES,
    )
    cos = tl.load(cos_ptr + row[:, None] * HALF + i[None, :], mask=there, other=0.0)
    sin = tl.load(sin_ptr + row[:, None] * HALF + i[None, :], mask=there, other=0.0)
    gain = tl.where(is_q, query_gain, 1.0)
    cos = tl.where(turns, cos, 1.0) * gain
    sin = tl.where(turns, sin, 0.0) * gain
    to_ptr = out_ptr + (row[:, None] * heads + number) * (2 * HALF) + i[None, :]
    tl.store(to_ptr, (one * cos - two * sin).to(to_ptr.dtype.element_ty), mask=there)
    tl.store(to_ptr + HALF, (two * cos + one * sin).to(to_ptr.dtype.element_ty), mask=there)


@jit
def _gate_kernel(
    x_ptr,
    norm_ptr,
    gate_ptr,
    up_ptr,
    out_ptr,
    B,
    inner,
    E,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute COLUMNS of a gated MLP's inner numbers for ROWS sequences."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate, up = _products(
        x_ptr,
        norm_ptr,
        gate_ptr,
        up_ptr,
        row,
        column,
        B,
        inner,
        E,
        eps,
        ROWS,
        COLUMNS,
        DEEP,
        STAGES,
    )
    out = gate * up / (1.0 + tl.exp(-gate))
    there = (row < B)[:, None] & (column < inner)[None, :]
    to_ptr = out_ptr + row[:, None] * inner + column[None, :]
    tl.store(to_ptr, out.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _add_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    out_ptr,
    B,
    n_columns,
    E,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add to COLUMNS of x, for ROWS sequences, the product of y (., E)."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < B)[:, None] & (column < n_columns)[None, :]
    at = row[:, None] * n_columns + column[None, :]
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    y, _ = _products(
        y_ptr,
        None,
        weight_ptr,
        None,
        row,
        column,
        B,
        n_columns,
        E,
        0.0,
        ROWS,
        COLUMNS,
        DEEP,
        STAGES,
    )
    tl.store(out_ptr + at, (x + y).to(out_ptr.dtype.element_ty), mask=there)


# -------------------- on the host


def project_heads(
    x: Tensor,
    norm: tuple[Tensor, float],
    weights: tuple[Tensor, Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    head_dim: int,
    query_gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm x (B, 1, E), project it and turn q and k.

    norm     gain (E,) and eps of the RMS norm
    weights  of q (H D, E), k and v (Hkv D, E); D = head_dim, a power of 2 from 32 on
    rope     cos and sin (B, 1, 1, D/2) float32
    Returns norm(x) (B, 1, E), q (B, H, 1, D), k and v (B, Hkv, 1, D)."""
    B, _, E = x.shape
    H, Hkv = (len(w) // head_dim for w in weights[:2])
    tile = tiles(B)["heads"]
    columns = min(tile.columns, head_dim // 2)
    programs = (H + 2 * Hkv) * (head_dim // 2 // columns) + tile.rows
    normed = torch.empty_like(x)
    q = x.new_empty(B, H, 1, head_dim)
    k = x.new_empty(B, Hkv, 1, head_dim)
    v = torch.empty_like(k)
    _heads_kernel[(programs, cdiv(B, tile.rows))](
        x,
        norm[0],
        *weights,
        *(t.contiguous() for t in rope),
        normed,
        q,
        k,
        v,
        B,
        H,
        Hkv,
        E,
        norm[1],
        query_gain,
        HALF=head_dim // 2,
        WIDE=triton.next_power_of_2(E),
        ROWS=tile.rows,
        COLUMNS=columns,
        DEEP=tile.deep,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return normed, q, k, v


def gated_product(x: Tensor, norm: tuple[Tensor, float], gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(norm(x) gate^T) * norm(x) up^T, (B, 1, inner), of x (B, 1, E); gate, up (inner,
    E)."""
    B, _, E = x.shape
    inner = len(gate)
    tile = tiles(B)["gate"]
    out = x.new_empty(B, 1, inner)
    _gate_kernel[(cdiv(inner, tile.columns), cdiv(B, tile.rows))](
        x,
        norm[0],
        gate,
        up,
        out,
        B,
        inner,
        E,
        norm[1],
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEEP=tile.deep,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out


def add_product(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return x + y weight^T, (B, 1, n), of x (B, 1, n), y of B E numbers and weight (n, E)."""
    B, _, n = x.shape
    tile = tiles(B)["add"]
    out = torch.empty_like(x)
    _add_kernel[(cdiv(n, tile.columns), cdiv(B, tile.rows))](
        x,
        y.contiguous(),
        weight,
        out,
        B,
        n,
        weight.size(1),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEEP=tile.deep,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out


# -------------------- of a block


def before(block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what Block.before does for x (B, 1, E), where generate.block_is_fused says so."""
    attention = block.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights = tuple(linear.weight for linear in linears)
    norm = (block.input_layernorm.weight, block.input_layernorm.eps)
    more = (attention.head_dim, attention.query_gain)
    return project_heads(x, norm, weights, (cos, sin), *more)


def after(block, x: Tensor, y: Tensor) -> Tensor:
    """Do what Block.after does for x (B, 1, E), y (B, H, 1, D), where block_is_fused says so."""
    mlp = block.mlp
    x = add_product(x, y, block.self_attn.o_proj.weight)
    norm = (block.post_attention_layernorm.weight, block.post_attention_layernorm.eps)
    inner = gated_product(x, norm, mlp.gate_proj.weight, mlp.up_proj.weight)
    return add_product(x, inner, mlp.down_proj.weight)
