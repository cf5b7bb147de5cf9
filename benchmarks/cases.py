"""What a cache keeps in `decode` and `memory`: settings in a few numbers, and caches filled by
them.

Letters: B sequences, Hkv KV heads, D head dimension, S groups, K kept of every token, C context
tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from config import KVConfig, ModelConfig
from settings.fields import check, count_kept
from storage.cache import NewTokens
from storage.integers.codecs import codec_of
from storage.layout import group_energy, top_k_mask
from storage.packed import PackedCache
from storage.packing import select_top_m
from storage.ragged import RaggedCache

WINDOW = 16  # newest tokens, stored whole, after the context
BLOCK = 64  # tokens whose keys share steps
APPENDED = 4096  # tokens appended at a time, so that packing needs little besides the cache
LEVELS = 3  # precision levels of kept groups where value_bits is 0


class Case:
    """A setting S:value_keep:token_keep:key_bits:value_bits of --cases.

    Without dropped tokens and with a whole number of groups every token keeps K of them.
    value_bits 0: levels, a third of the kept groups at each, by their norms."""

    def __init__(self, text: str, head_dim: int):
        try:
            S, value_keep, token_keep, key_bits, value_bits = with_defaults(text.split(":"))
            self.S = int(S)
            self.value_keep = float(value_keep)
            self.token_keep = float(token_keep)
            self.key_bits = int(key_bits)
            self.value_bits = int(value_bits)
        except ValueError:
            raise ValueError(
                f"cases={text!r}: numbers between colons; give S:share of groups:share of "
                "tokens:bits of keys:of values, for example "
                "16:0.5:0.25, 4:1:1:4 or 8:0.9:0.4:4:0 (levels)"
            ) from None
        self.kv_config(1, kv="select").check_model(
            ModelConfig(n_head=1, n_kv_head=1, head_dim=head_dim)
        )
        check(
            0 < self.value_keep <= 1 and 0 < self.token_keep <= 1,
            f"cases={text!r}",
            "shares lie in (0, 1]",
            "give for example 16:0.5:0.25",
        )

    def kv_config(self, K: int, **more) -> KVConfig:
        """The settings of a cache whose tokens keep K groups."""
        return KVConfig(
            n_groups=self.S,
            topk_groups=K,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            **more,
        )

    @property
    def K(self) -> int:
        """Groups that every token keeps, where all keep the same number."""
        return round(self.value_keep * self.S)

    @property
    def has_levels(self) -> bool:
        return not self.value_bits

    def forms(self) -> list[bool]:
        """Of the two ways to store it, fixed K (True) and a counted number of groups per token,
        those that it allows."""
        n_groups = self.value_keep * self.S
        if self.token_keep < 1 or self.has_levels or not n_groups.is_integer():
            return [False]
        # All groups of a token need not be counted.
        if self.value_keep == 1 and self.key_bits < 16:
            return [True]
        return [True, False]

    def name(self, fixed: bool) -> str:
        words = [f"S={self.S}", f"K={self.K}" if fixed else f"rho={self.value_keep:g}"]
        if self.token_keep < 1:
            words.append(f"tokens={self.token_keep:g}")
        if self.key_bits < 16:
            words.append(f"keys:{self.key_bits} values:{self.value_bits or 'routed'}")
        return " ".join(words)

    def fill(self, k: Tensor, v: Tensor, fixed: bool) -> tuple[PackedCache | RaggedCache, Tensor]:
        """Return a cache of k, v (B, Hkv, C + WINDOW, D), the last WINDOW tokens whole, and the
        mask (B, Hkv, C, S) of what it kept of the others: bool, or the precision level."""
        C = k.size(2) - WINDOW
        energy = group_energy(v[:, :, :C], self.S, v.size(1))  # (B, Hkv, C, S)
        if fixed:
            mask = torch.cat([top_k_mask(e, self.K) for e in energy.split(1)])
            return self.fill_fixed(k, v, mask), mask
        keep, mask = self.choose(energy)
        return self.fill_counted(k, v, keep, mask), mask

    def fill_fixed(self, k: Tensor, v: Tensor, mask: Tensor) -> PackedCache:
        """A cache whose tokens keep the K groups of mask (B, Hkv, C, S) bool."""
        B, Hkv, N, D = k.shape
        cfg = self.kv_config(self.K, kv_tail=WINDOW, key_block=BLOCK, kv_sinks=0)
        cache = PackedCache(B, N, Hkv, D, cfg, self.K, k, codec=codec_of(cfg))
        groups = F.pad(mask, (0, 0, 0, WINDOW), value=True)
        for start in range(0, N, APPENDED):
            part = slice(start, min(start + APPENDED, N))
            cache.append(NewTokens(k[:, :, part], v[:, :, part], None, groups[:, :, part]))
        return cache

    def choose(self, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Choose by energy (B, Hkv, C, S), which is overwritten: (tokens kept (B, Hkv, C) bool,
        their groups (B, Hkv, C, S), bool or the precision level)."""
        B, Hkv, C, S = energy.shape
        n_tokens = count_kept(self.token_keep, C)
        n_pairs = count_kept(self.value_keep, S * n_tokens)
        if n_tokens < C:
            per_head = torch.full((B, Hkv), n_tokens, device=energy.device)
            keep = select_top_m(energy.sum(-1), per_head)
        else:
            keep = torch.ones_like(energy[..., 0], dtype=torch.bool)
        pairs = energy.masked_fill_(~keep.unsqueeze(-1), float("-inf")).flatten(-2)

        def best(n: int) -> Tensor:
            per_head = torch.full((B, Hkv), n, device=energy.device)
            return select_top_m(pairs, per_head).view(energy.shape)

        if not self.has_levels:
            return keep, best(n_pairs)
        # The best third is in all three masks, so that their sum is its level.
        levels = best(n_pairs).to(torch.uint8)
        for level in range(LEVELS - 1, 0, -1):
            levels = levels + best(n_pairs * level // LEVELS).to(torch.uint8)
        return keep, levels

    def fill_counted(self, k: Tensor, v: Tensor, keep: Tensor, mask: Tensor) -> RaggedCache:
        """A cache of the tokens in keep (B, Hkv, C) and of their groups in mask (B, Hkv, C, S)."""
        B, Hkv, N, D = k.shape
        C = N - WINDOW
        cfg = self.kv_config(self.S, kv="select", key_block=BLOCK, kv_sinks=0)
        codec = codec_of(cfg, k.new_ones(Hkv, D).float())
        cache = RaggedCache(B, N, Hkv, D, self.S, Hkv, k, codec)
        valid = torch.ones(B, C, dtype=torch.bool, device=k.device)
        cache.pack(k[:, :, :C], v[:, :, :C], keep, mask, valid)
        cache.append(NewTokens(k[:, :, C:], v[:, :, C:], None))
        return cache


def with_defaults(parts: list[str]) -> list[str]:
    """Complete S:share of groups by all tokens, 16 bits, and as many bits for values as for
    keys."""
    if len(parts) == 2:
        parts = [*parts, "1"]
    if len(parts) == 3:
        parts = [*parts, "16"]
    if len(parts) == 4:
        parts = [*parts, parts[3]]
    return parts


def parse_cases(text: str, head_dim: int) -> list[Case]:
    """Read the comma-separated flag --cases."""
    return [Case(part, head_dim) for part in text.split(",")]
