"""How caches store integers: what PackedCache and RaggedCache ask of a codec, for uniform bits and
for levels. format.py says what the numbers mean; FloatCodec in storage/packed.py is the same for
whole numbers.

The first tokens of a sequence stay whole (n_sinks): attention rests on them, and their values are
unlike all others.

Letters: storage/layout.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from config import KVConfig, check
from kernels import can_append
from storage.integers.contexts import kernels_pack, pack_context
from storage.integers.format import (
    IntFormat,
    Ints,
    quantise_keys,
    quantise_values,
    row_bytes,
)
from storage.layout import bits_to_mask
from storage.packed import FloatCodec, kept_rows
from storage.packing import Context

# numbers of keys or values that are turned into integers at a time, without kernels
LARGE = {"cpu": 1 << 23, "cuda": 1 << 26}


def codec_of(cfg: KVConfig, gain: Tensor | None = None) -> FloatCodec | IntCodec:
    """Return the codec that cfg asks for. gain (Hkv, D) float32: calibrated root mean squares,
    which levels are relative to, and which nothing may write into from then on."""
    if not cfg.ints:
        return FloatCodec()
    return IntCodec(IntFormat(cfg.key_bits, cfg.value_bits, cfg.block, gain), cfg.first_whole)


class IntCodec:
    """Integers of fmt.key_bits for keys, and of fmt.value_bits or with levels for values.

    keys         (token slots, D key_bits / 8) uint8
    rows         (row slots, d value_bits / 8) uint8
    key_scale    (blocks, 2, D) float16, step and middle of each channel of fmt.block tokens
    value_scale  (token slots, 2) float16, step and middle of each token

    With levels a row is one bit plane, and a value has no middle:

    rows         (row slots, d / 4) uint8
    value_scale  (token slots, 1) float16"""

    owners = {"keys": "token", "rows": "row", "key_scale": "block", "value_scale": "token"}
    in_parts = True  # see FloatCodec

    def __init__(self, fmt: IntFormat, n_sinks: int):
        self.fmt = fmt
        self.n_sinks = n_sinks
        self.block = fmt.block

    @property
    def levelled(self) -> bool:
        """Whether every group has a level of its own."""
        return self.fmt.levelled

    def settings(self) -> dict[str, Any]:
        return {"bits": f"{self.fmt.key_bits}:{self.fmt.value_bits}", "key_block": self.block}

    def constants(self) -> dict[str, Tensor]:
        """See FloatCodec.constants."""
        return {"gain of levels": self.fmt.gain} if self.levelled else {}

    def empty(self, n_tokens: int, k: int, S: int, D: int, like: Tensor) -> dict[str, Tensor]:
        """See FloatCodec.empty."""
        bytes_ = partial(torch.zeros, dtype=torch.uint8, device=like.device)
        half = partial(torch.zeros, dtype=torch.float16, device=like.device)
        return {
            "keys": bytes_(n_tokens, row_bytes(D, self.fmt.key_bits)),
            "rows": bytes_(n_tokens * k, row_bytes(D // S, self.fmt.value_bits or 2)),
            "key_scale": half(n_tokens // self.block, 2, D),
            "value_scale": half(n_tokens, 1 if self.levelled else 2),
        }

    # ---- for PackedCache

    def pack(self, k: Tensor, z: Tensor, bits: Tensor, S: int, n_kept: int) -> dict[str, Tensor]:
        """See FloatCodec.pack; T is a number of whole blocks."""
        B, Hkv, T, D = k.shape
        block = torch.arange(B * Hkv * T, device=k.device) // self.block
        n_blocks = len(block) // self.block
        keys, key_scale = quantise_keys(k.reshape(-1, D), block, n_blocks, self.fmt.key_bits)
        mask = bits_to_mask(bits, S).expand(-1, Hkv, -1, -1)
        rows, value_scale = quantise_values(z, mask, self.fmt.value_bits)
        return {
            "keys": keys.view(B, Hkv, T, -1),
            "rows": kept_rows(rows, bits, n_kept),
            "key_scale": key_scale.view(B, Hkv, -1, 2, D),
            "value_scale": value_scale,
        }

    def ints(self, cache) -> Ints:
        """Return what turns a cache's integers back into numbers."""
        block_base = getattr(cache, "block_base", None)
        if block_base is None:  # segments of one capacity, a number of whole blocks
            block_base = cache.token_base.div(self.block, rounding_mode="floor")
        dtype = cache.window_k.dtype
        return Ints(self.fmt, cache.key_scale, block_base, cache.value_scale, dtype)

    def one_by_one(self, D: int, window: int) -> bool:
        """See FloatCodec.one_by_one: the newest token would be part of the block that is formed
        where there is no window."""
        return can_append(D) and window > 0

    def check_cut(self, n_packed: Tensor) -> None:
        """See FloatCodec.check_cut: the keys of a block share steps."""
        check(
            not bool((n_packed % self.block).any()),
            f"cutting after {n_packed.tolist()} quantised tokens",
            f"they are kept in blocks of {self.block}",
            "keep whole blocks after the first tokens",
        )

    # ---- for RaggedCache

    def layers_at_once(self, k: Tensor, S: int) -> int:
        """Return how many of the layers of keys k (L, B, Hkv, C, D), their values in S groups, are
        packed together: without kernels as many as have LARGE numbers at most."""
        if kernels_pack(self.fmt, k, S, "auto"):
            return len(k)
        return max(1, LARGE[k.device.type] // max(1, k[0].numel()))

    @staticmethod
    def pack_sequences(
        codecs: Sequence[IntCodec], context: Context
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """See FloatCodec.pack_sequences."""
        packed = pack_context([codec.fmt for codec in codecs], context)
        held = {name: getattr(packed, name) for name in IntCodec.owners}
        return held, packed[len(held) :]
