"""How kept values are laid out in memory, and plain attention over them: what routing, packing and
kernels agree on.

A head's value, D numbers, is cut into S groups of d = D/S neighbours. Of each token only some
groups are kept. Which ones is the token's *mask*; in storage it is one integer whose bit g says
that group g is kept (uint8 up to S = 8, then int16, int32, int64). A kept group is a *row* of d
numbers. Rows lie one after the other without gaps, token by token and group by group, so that

    row of (token t, group g) = row_base + offset(t) + popcount(mask_t & ((1 << g) - 1))

offset(t), the rows of the tokens before t, is K t where every token keeps K groups. Elsewhere it is
stored in two parts: once per tile of tokens (int32), and within its tile per token (uint8; a tile
has 64 tokens, or so few that this suffices). docs/format.md draws this.

    bits = torch.tensor([0b1010, 0b0011])   # token 0 keeps groups 1 and 3, token 1 groups 0 and 1
    bits_to_mask(bits, 4)                   # [[F, T, F, T], [T, T, F, F]]
    # K = 2: group 1 of token 1 lies in row 2 * 1 + popcount(0b0011 & 0b0001) = 3

Letters, unless a file says otherwise: B sequences, T new tokens, H heads, Hkv KV heads, n = H/Hkv
query heads of one KV head, Hm mask heads (1 or Hkv: heads may share a mask), D head dimension, S
groups, K kept per token, d = D/S, W slots of a window, N tokens of the longest segment. A segment
is what one sequence holds for one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNED = 16  # bytes: the widest loads of kernels begin at multiples of them
FEW = 4  # scores that a CPU compares column by column faster than it sorts rows


def cdiv(a, b):
    """Divide and round up: integers, or tensors of them."""
    return (a + (b - 1)) // b


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its type is narrower, else as it is: the type for softmax, scores, losses."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Bend logits s to cap * tanh(s / cap); 0: as they are."""
    return cap * (logits / cap).tanh() if cap else logits


# -------------------- masks


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mark the k largest of the last dimension: bool like scores (..., n), exactly k of them.

    Of equal scores the lower index wins."""
    if is_read_here(scores) and 0 < k <= scores.size(-1):
        mask = scores >= kth_largest(scores, k)
        rows = scores.numel() // scores.size(-1)
        if int(mask.sum()) == k * rows:  # no ties, all are numbers
            return mask
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    none = torch.zeros_like(scores, dtype=torch.bool)
    return none.scatter_(-1, order[..., :k], True)


def is_read_here(x: Tensor) -> bool:
    """Say whether Python may look at numbers of x without waiting: on a CPU, outside a compiler."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th largest of the last dimension (..., 1), few by comparing whole columns."""
    if scores.size(-1) > FEW:
        return scores.sort(dim=-1, descending=True).values[..., k - 1 : k]
    columns = list(scores.unbind(-1))
    for i in range(k):  # the largest of what is left rises to place i
        for j in range(len(columns) - 1, i, -1):
            pair = columns[j - 1 : j + 1]
            columns[j - 1] = torch.maximum(*pair)
            columns[j] = torch.minimum(*pair)
    return columns[k - 1].unsqueeze(-1)


def expand_mask(mask: Tensor, head_dim: int) -> Tensor:
    """Turn a mask per group (..., S) into one per dimension (..., D)."""
    return mask.repeat_interleave(head_dim // mask.size(-1), dim=-1)


def group_energy(z: Tensor, n_groups: int, mask_heads: int) -> Tensor:
    """Square and sum every group of z (B, Hkv, T, D): (B, 1 or Hkv, T, S).

    With mask_heads = 1 heads share a mask, so their energies are added."""
    groups = at_least_float32(z).unflatten(-1, (n_groups, -1))
    energy = groups.square().sum(-1)
    return energy if mask_heads > 1 else energy.sum(1, keepdim=True)


def mask_dtype(n_groups: int) -> torch.dtype:
    """Return the integer type of one token's mask of S bits: uint8 for S <= 8, int16, int32 and
    int64 for 16, 32 and 64."""
    if n_groups <= 8:
        return torch.uint8
    return {16: torch.int16, 32: torch.int32, 64: torch.int64}[n_groups]


def mask_to_bits(mask: Tensor) -> Tensor:
    """Pack bool (..., S) into one integer per token (...), bit g = group g kept.

    The highest bit of int16 to int64 is their sign."""
    S = mask.size(-1)
    weight = torch.ones((), dtype=torch.int64, device=mask.device)
    weight = weight << torch.arange(S, device=mask.device)
    bits = (mask * weight).sum(-1)
    if S in (16, 32):
        bits = bits - (bits >> (S - 1) << S)  # what does not fit is negative
    return bits.to(mask_dtype(S))


def bits_to_mask(bits: Tensor, n_groups: int) -> Tensor:
    """Unpack integers (...) into bool (..., S): the inverse of mask_to_bits."""
    group = torch.arange(n_groups, device=bits.device)
    mask = bits.long().unsqueeze(-1) >> group & 1
    return mask.bool()


def tile_size(n_groups: int, levelled: bool = False) -> int:
    """Return the tokens per stored row offset: at most 64, and so few that the rows before a token
    of its tile are fewer than 256. levelled: a group of the highest level has four rows."""
    rows = 4 * n_groups if levelled else n_groups  # of a token, at most
    return min(64, 256 // rows)


def tiles_of(n_packed: Tensor, tile: int, device: torch.device) -> Tensor:
    """Return the first token of each tile, and how many it has: (2, tiles) int64 on the device.
    n_packed: (B, Hm) tokens of each segment, on the host; tile: tokens of a full tile.

    Nothing waits for the device: what follows from segments, which are few, is worked out on the
    host, and what follows from tiles on the device."""
    n = n_packed.flatten()
    tiles = cdiv(n, tile)
    total = int(tiles.sum())
    of_segments = torch.stack((sum_before(n), n, sum_before(tiles), tiles))
    of_segments = of_segments.to(device, non_blocking=True)
    of_tiles = of_segments[:3].repeat_interleave(of_segments[3], 1, output_size=total)
    begin, count, tiles_before = of_tiles
    earlier = (torch.arange(total, device=device) - tiles_before) * tile  # tokens of its segment
    return torch.stack((begin + earlier, (count - earlier).clamp_max(tile)))


def tile_index(rows_before: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Split the rows before each token in two: before and tile_rows of PackedView.

    rows_before  (n_masks,) rows of the segment before each token
    tiles        see tiles_of

    Nothing waits for the device."""
    first, size = tiles
    tile_rows = rows_before[first]
    before = rows_before - tile_rows.repeat_interleave(size, output_size=len(rows_before))
    return before.to(torch.uint8), tile_rows.int()


# -------------------- segments in a flat tensor


def sum_before(count: Tensor) -> Tensor:
    """Sum up what comes before each number of the last dimension: 0 for the first."""
    return count.cumsum(-1) - count


def starts(count: Tensor) -> Tensor:
    """Return the first slot of every segment when segments of count (B, h) slots lie one after the
    other: (B, h) int64."""
    return sum_before(count.flatten()).view(count.shape)


def segment_starts(
    n_tokens: Tensor, n_rows: Tensor, n_kv_head: int, tile: int, block: int
) -> dict[str, Tensor]:
    """Return where segments of so many tokens and rows, (B, Hm) each, start when they follow each
    other without gaps: by the names that PackedView has for it, and block_base. tile: tokens per
    stored offset; block: tokens whose keys share steps, 0 where there are none."""
    of_head = n_tokens.expand(-1, n_kv_head)
    of_blocks = {"block_base": starts(cdiv(of_head, block))} if block else {}
    return of_blocks | {
        "token_base": starts(of_head),
        "row_base": starts(n_rows.expand(-1, n_kv_head)),
        "mask_base": starts(n_tokens),
        "tile_base": starts(cdiv(n_tokens, tile)),
    }


def slots(base: Tensor, count: Tensor) -> Tensor:
    """List the slots base, ..., base + count - 1 of every segment, one segment after the other.

    base, count: (B, h) int64. Returns (count.sum(),) int64."""
    total = int(count.sum())
    shift = (base - starts(count)).flatten()
    shift = shift.repeat_interleave(count.flatten(), output_size=total)
    return torch.arange(total, device=base.device) + shift


def copy_segments(old: Tensor, new: Tensor, n_segments: int) -> None:
    """Copy the first slots of every segment from one flat tensor (slots, ...) into another, as many
    as both have."""
    if not old.numel() or not new.numel():
        return
    before = old.view(n_segments, -1, *old.shape[1:])
    after = new.view(n_segments, -1, *new.shape[1:])
    n = min(before.size(1), after.size(1))
    after[:, :n] = before[:, :n]


def cat_each(groups: Sequence[Sequence[Tensor]], aligned: int = ALIGNED) -> list[Tensor]:
    """Concatenate the tensors of every group; all are alike but for their first dimension. The
    results are views of one tensor where each begins at a multiple of `aligned` bytes there."""
    like = groups[0][0]
    row = like.shape[1:].numel() * like.element_size()  # bytes
    sizes = [sum(len(t) for t in group) for group in groups]
    if any(n * row % aligned for n in sizes[:-1]):
        return [torch.cat(group) for group in groups]
    return list(torch.cat([t for group in groups for t in group]).split(sizes))


# -------------------- what attention may read


class PackedView(NamedTuple):
    """The packed tokens of one layer.

    Segment (sequence, head) holds n tokens: keys and rows from token_base and row_base on; masks,
    and what counts rows where tokens keep different numbers (k = 0), from mask_base and tile_base
    on."""

    keys: Tensor  # (slots, D)
    rows: Tensor  # (row slots, d)
    bits: Tensor  # (mask slots,) of mask_dtype
    before: Tensor | None  # (mask slots,) uint8, rows of its tile before each token
    tile_rows: Tensor | None  # (tiles,) int32, the segment's rows before each tile
    n: Tensor  # (B, Hm) int64 tokens
    token_base: Tensor  # (B, Hkv) int64
    row_base: Tensor  # (B, Hkv) int64
    mask_base: Tensor  # (B, Hm) int64
    tile_base: Tensor  # (B, Hm) int64
    n_groups: int
    k: int  # groups every token keeps; 0: before and tile_rows tell, or keys are alone
    longest: int  # no segment holds more tokens
    held: int  # tokens of all segments: what work is divided by
    exact: bool = False  # whether `held` counts tokens, and not the slots there are for them
    ints: Any = None  # integers.format.Ints where keys and rows are bytes

    @property
    def levelled(self) -> bool:
        """Whether every group has a number of bits of its own (then bits are those of 2 S
        groups)."""
        return self.ints is not None and self.ints.levelled

    @property
    def keys_alone(self) -> bool:
        """Whether no token has rows, or a mask."""
        return self.k == 0 and self.before is None

    def at_most(self, longest: int) -> PackedView:
        """View the same tokens, knowing that no segment holds more than `longest`."""
        return self._replace(longest=longest, held=self.token_base.numel() * longest)

    @property
    def tile(self) -> int:
        """Tokens per entry of tile_rows."""
        return tile_size(self.n_groups, self.levelled)

    def masks(self) -> tuple[Tensor, Tensor]:
        """Return the masks left-aligned: mask (B, Hm, N, S) bool (levels: uint8), and valid
        (B, Hm, N) bool, the slots that hold a token."""
        N = int(self.n.max()) if self.n.numel() else 0
        valid = torch.arange(N, device=self.n.device) < self.n.unsqueeze(-1)
        if self.keys_alone:
            return valid.new_zeros(*valid.shape, self.n_groups), valid
        b, h, t = valid.nonzero(as_tuple=True)
        word = self.bits[self.mask_base[b, h] + t]
        if self.levelled:
            held = self.ints.levels(word, self.n_groups)
        else:
            held = bits_to_mask(word, self.n_groups)
        mask = torch.zeros(*valid.shape, self.n_groups, dtype=held.dtype, device=held.device)
        mask[b, h, t] = held
        return mask, valid

    def first_rows(self, valid: Tensor) -> Tensor:
        """Return the row where each token's rows begin: (B, Hkv, N) int64, for valid as in
        masks."""
        offset = torch.zeros(valid.shape, dtype=torch.int64, device=valid.device)
        b, h, t = valid.nonzero(as_tuple=True)
        if self.k or self.keys_alone:
            offset[b, h, t] = t * self.k
        else:
            tile = self.tile_base[b, h] + t // self.tile
            token = self.mask_base[b, h] + t
            offset[b, h, t] = self.tile_rows[tile].long() + self.before[token].long()
        return self.row_base[..., None] + offset

    def unpack(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return everything dense and left-aligned; slots without a token are zeros.

        k     (B, Hkv, N, D)
        z     (B, Hkv, N, D), zeros where a group was dropped
        mask, valid as in masks
        dtype: of what integers become; None: of what they were made of."""
        mask, valid = self.masks()
        if self.ints is not None:
            return *self.ints.unpack(self, mask, valid, dtype), mask, valid
        B, Hkv = self.token_base.shape
        N = valid.size(-1)
        k = self.keys.new_zeros(B, Hkv, N, self.keys.size(-1))
        z = self.rows.new_zeros(B, Hkv, N, self.n_groups, self.rows.size(-1))
        rank = sum_before(mask.long())  # kept groups of the token before this one
        row = self.first_rows(valid).unsqueeze(-1) + rank  # (B, Hkv, N, S)
        kept = mask.expand(-1, Hkv, -1, -1)
        z[kept] = self.rows[row[kept]]
        b, h, t = valid.expand(-1, Hkv, -1).nonzero(as_tuple=True)
        slot = self.token_base[b, h] + t
        k[b, h, t] = self.keys[slot]
        return k, z.flatten(-2), mask, valid

    @staticmethod
    def of_whole(k: Tensor, v: Tensor, n: Tensor) -> PackedView:
        """View whole values as packed ones: one group, always kept.

        k, v (B, Hkv, N, D), of which the first n (B, Hm) tokens of a segment count."""
        B, Hkv, N, D = k.shape
        base = torch.arange(B * Hkv, device=k.device).view(B, Hkv) * N
        mask_base = torch.arange(n.numel(), device=k.device).view(n.shape) * N
        return PackedView(
            keys=k.reshape(-1, D),
            rows=v.reshape(-1, D),
            bits=torch.ones(n.numel() * N, dtype=torch.uint8, device=k.device),
            before=None,
            tile_rows=None,
            n=n,
            token_base=base,
            row_base=base,
            mask_base=mask_base,
            tile_base=mask_base,
            n_groups=1,
            k=1,
            longest=N,
            held=B * Hkv * N,
        )


class WindowView(NamedTuple):
    """Tokens with whole values, in a ring: sequence b holds count[b] of them in slots first[b],
    first[b] + 1, ... modulo W, oldest first."""

    k: Tensor  # (B, Hkv, W, D)
    v: Tensor  # (B, Hkv, W, D)
    first: Tensor | None  # (B,) int64; None: slot 0 for all
    count: Tensor  # (B,) int64

    def slots(self, width: int) -> Tensor:
        """Return the slots of the oldest `width` tokens, oldest first: (B, width) int64."""
        number = torch.arange(width, device=self.k.device)
        number = number.expand(len(self.k), -1)
        if self.first is None:
            return number
        return (self.first[:, None] + number) % max(self.k.size(2), 1)

    def aligned(self, width: int) -> tuple[Tensor, Tensor]:
        """Return k, v (B, Hkv, width, D) with the oldest token first; slots past count are any."""
        if self.first is None:
            return self.k[:, :, :width], self.v[:, :, :width]
        slot = self.slots(width)[:, None, :, None]
        return self.k.take_along_dim(slot, 2), self.v.take_along_dim(slot, 2)

    def readable(self, T: int) -> Tensor:
        """Mark which tokens, oldest first, each of the newest T may read, up to itself: (B, T,
        width) bool, width the tokens of the longest sequence."""
        device = self.count.device
        width = int(self.count.max()) if self.count.numel() else 0
        number = torch.arange(width, device=device)
        count = self.count[:, None, None]
        last = count - T + torch.arange(T, device=device)[:, None]  # (B, T, 1)
        return (number <= last) & (number < count)


# -------------------- plain attention: the specification of kernels.packed_attention


def packed_attention_ref(
    q: Tensor, packed: PackedView | None, window: WindowView | None, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute packed_attention (kernels.py) by unpacking everything: the newest T tokens' queries
    read all packed tokens, and the window up to their own token. One of both may be None."""
    B, H, T, D = q.shape
    keys = []
    values = []
    seen = []  # (B, Hkv, T, tokens) what each query may read
    if packed:
        k, z, _, valid = packed.unpack(q.dtype)
        keys.append(k)
        values.append(z)
        seen.append(valid[:, :, None].expand(-1, k.size(1), T, -1))
    if window:
        own = window.readable(T)
        k, v = window.aligned(own.size(-1))
        keys.append(k)
        values.append(v)
        seen.append(own[:, None].expand(-1, k.size(1), -1, -1))
    k = torch.cat(keys, 2)  # (B, Hkv, L, D)
    v = torch.cat(values, 2)
    seen = torch.cat(seen, -1).unsqueeze(2)  # (B, Hkv, 1, T, L)
    q = (q * D**-0.5).view(B, k.size(1), -1, T, D)
    logits = at_least_float32(q @ k.unsqueeze(2).mT)
    logits = soft_cap(logits, cap)
    logits = logits.masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)  # (B, Hkv, n, T)
    finite = lse.clamp_min(torch.finfo(lse.dtype).min)  # -inf where there is nothing to read
    p = (logits - finite.unsqueeze(-1)).exp().to(v.dtype)
    out = p @ v.unsqueeze(2)
    return out.view(B, H, T, D), lse.view(B, H, T)


def merge_softmax(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Join what several attentions read apart into one softmax.

    parts: (out (B, H, T, D), lse (B, H, T)) each. Returns (B, H, T, D); 0 where none read a
    thing."""
    if len(parts) == 1:
        return parts[0][0]
    outs, lses = zip(*parts, strict=True)
    lse = torch.stack(lses)
    range_of = torch.finfo(lse.dtype)
    most = lse.amax(0).clamp_min(range_of.min)  # -inf where none read a thing
    weight = (lse - most).exp()
    weight = weight / weight.sum(0).clamp_min(range_of.tiny)
    mixed = sum(out * w.unsqueeze(-1) for out, w in zip(outs, weight, strict=True))
    return mixed.to(outs[0].dtype)
