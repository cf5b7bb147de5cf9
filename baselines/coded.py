"""What methods that code a prompt share (kvtc.py, rdkv.py, coding/routed.py): a cache that holds a
prompt as bytes but for its first tokens and its newest, and paths that store a prompt once, each
layer by itself or all together.

A prompt reads itself whole. Then its *middle*, all tokens but the first `sinks` and the newest
`tail`, becomes one string of bytes for each sequence, and everything that comes later stays whole.
The numbers that attention reads are made from those bytes alone, once, and put beside them: such a
cache is decompressed before use, as KVTC is, and what is made is not counted among its bytes.

Letters: storage/layout.py; M columns of a middle, each sequence from column 0 on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from baselines.paths import put_dense_back
from config import ModelConfig, check
from model import (
    Transformer,
    apply_rope,
    attend,
    attend_masked,
    attention_mask,
)
from storage.cache import NewTokens, check_range, check_truncation
from storage.dense import DenseCache
from storage.integers.format import pack_bits, unpack_bits
from storage.layout import cdiv, starts


class Kept(NamedTuple):
    """How much of a prompt is held."""

    share: float  # of its bytes in 16 bits a number, whole tokens among them
    sinks: int = 4  # first tokens that stay whole
    tail: int = 16  # newest tokens of a prompt that stay whole

    @property
    def whole(self) -> int:
        """Tokens of a prompt that stay whole."""
        return self.sinks + self.tail


class Middle(NamedTuple):
    """The tokens of a prompt that are coded."""

    k: Tensor  # (B, Hkv, M, D)
    v: Tensor  # (B, Hkv, M, D)
    number: Tensor  # (B, M) int64, each token's own in its sequence
    there: Tensor  # (B, M) bool, columns that hold a token


class Decoded(NamedTuple):
    """What the bytes of a middle stand for."""

    k: Tensor  # (B, Hkv, M, D)
    v: Tensor  # (B, Hkv, M, D)
    there: Tensor  # (B, 1 or Hkv, M) bool, tokens that are read


# -------------------- bytes


def to_bytes(numbers: Tensor) -> Tensor:
    """Return the bytes of numbers of any dtype, (n,) uint8."""
    return numbers.contiguous().flatten().view(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes below 2^bits, of any shape, as bytes (n,), the last one filled up with zeros."""
    flat = codes.flatten()
    missing = -flat.numel() * bits % 8 // bits
    return pack_bits(F.pad(flat, (0, missing)), bits)


class Reader:
    """Reads what was laid one after the other into bytes (n,) uint8."""

    def __init__(self, data: Tensor):
        self.data = data
        self.at = 0

    def take(self, n_bytes: int) -> Tensor:
        """Return the next n_bytes."""
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def halves(self, n: int) -> Tensor:
        """Return the next n float16 numbers, (n,)."""
        out = torch.empty(n, dtype=torch.float16, device=self.data.device)
        out.view(torch.uint8).copy_(self.take(2 * n))  # from any address
        return out

    def codes(self, n: int, bits: int) -> Tensor:
        """Return the next n codes, (n,) uint8, that pack_codes has packed."""
        return unpack_bits(self.take(cdiv(n * bits, 8)), bits)[:n]


# -------------------- the cache


class CodedCache(DenseCache):
    """One layer's prompt as bytes, and its whole tokens: the first ones, then the newest.

    payload             (bytes,) uint8, of all sequences
    n_bytes             (B,) int64, of each
    n_coded             (B,) int64, tokens in them
    byte_base           (B, 1) int64, where each begins
    window_k, window_v  (B, Hkv, W, D), of which each sequence fills the first n_window slots
    n_window            (B,) int64

    codec: what reads the bytes; codec.read(cache) sets `middle`, the numbers that they stand for"""

    ONE_PROMPT = True

    def __init__(self, batch: int, n_kv_head: int, head_dim: int, like: Tensor, codec: Any):
        super().__init__(batch, 0, n_kv_head, head_dim, like)
        self.owners |= {"payload": "row", "n_bytes": "sequence", "n_coded": "sequence"}
        self.owners |= {"byte_base": "base"}
        self.codec = codec
        self.payload = torch.zeros(0, dtype=torch.uint8, device=like.device)
        self.n_bytes = torch.zeros_like(self.n_window)
        self.n_coded = torch.zeros_like(self.n_window)
        self.set_bases()

    @property
    def lengths(self) -> Tensor:
        return self.n_coded + self.n_window

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.codec.kept._asdict()}

    def constants(self) -> dict[str, Tensor]:
        return self.codec.constants()

    def segments(self, owner: str) -> tuple[Tensor, Tensor]:
        return self.byte_base, self.n_bytes[:, None]

    def set_bases(self) -> None:
        super().set_bases()
        self.byte_base = starts(self.n_bytes[:, None])
        self.middle: Decoded | None = None  # made of the bytes when it is read

    def check_counts(self) -> None:
        check_range(self.n_bytes, len(self.payload), "n_bytes")
        check_range(self.n_coded, 2**31, "n_coded")
        super().check_counts()

    def reserve(self, n_tokens: int) -> None:
        """Make room: unlike a dense cache it grows."""
        longest = int(self.n_window.max()) if self.batch else 0
        if longest + n_tokens > self.window_k.size(2):
            self._resize(longest + n_tokens)
        self.room = self.window_k.size(2) - longest

    # ---- a prompt

    @torch.no_grad()
    def take_prompt(self, k: Tensor, v: Tensor, n_pad: Tensor | None) -> Middle:
        """Store the first tokens and the newest of a prompt k, v (B, Hkv, T, D), and return the
        others, which `set_payload` is to store; n_pad (B,): columns of padding."""
        kept = self.codec.kept
        T = k.size(2)
        if n_pad is None:
            n_pad = torch.zeros_like(self.n_window)
        n_tokens = T - n_pad
        n_whole = n_tokens.clamp_max(kept.whole)
        self.n_coded = n_tokens - n_whole

        def columns(number: Tensor) -> tuple[Tensor, Tensor]:
            """Pick the keys and values of tokens number (B, m)."""
            at = (n_pad[:, None] + number).clamp(0, T - 1)[:, None, :, None]
            return k.take_along_dim(at, 2), v.take_along_dim(at, 2)

        slot = torch.arange(int(n_whole.max()), device=k.device)
        newest = (n_tokens - n_whole)[:, None] + slot
        whole_k, whole_v = columns(torch.where(slot < kept.sinks, slot, newest))
        self.window_k = whole_k.to(self.dtype)
        self.window_v = whole_v.to(self.dtype)
        self.n_window = n_whole
        self.room = 0
        self.fresh = False
        number, there = self.middle_columns()
        middle_k, middle_v = columns(number)
        return Middle(middle_k, middle_v, number, there)

    def middle_columns(self) -> tuple[Tensor, Tensor]:
        """Return the numbers in their sequence of the tokens that are coded, (B, M) int64, and
        which columns hold one, (B, M) bool."""
        longest = int(self.n_coded.max()) if self.batch else 0
        slot = torch.arange(longest, device=self.n_coded.device)
        there = slot < self.n_coded[:, None]
        return (self.codec.kept.sinks + slot).expand_as(there), there

    def set_payload(self, strings: list[Tensor]) -> None:
        """Hold these bytes (n,) uint8 of every sequence."""
        self.payload = torch.cat(strings)
        sizes = [len(s) for s in strings]
        self.n_bytes = torch.tensor(sizes, device=self.n_bytes.device)
        self.set_bases()

    def strings(self) -> list[Tensor]:
        """Return the bytes of every sequence."""
        return list(self.payload.split(self.n_bytes.tolist()))

    def read(self) -> Decoded:
        """Return all that is held as it is read: the middle, decoded once, then whole tokens."""
        if self.middle is None and self.n_coded.any():
            self.codec.read(self)
        elif self.middle is None:
            none = self.window_k[:, :, :0]
            self.middle = Decoded(none, none, none[..., 0].bool())
        k = torch.cat((self.middle.k, self.window_k), 2)
        v = torch.cat((self.middle.v, self.window_v), 2)
        slot = torch.arange(self.window_k.size(2), device=k.device)
        whole = (slot < self.n_window[:, None])[:, None]
        whole = whole.expand(-1, self.middle.there.size(1), -1)
        return Decoded(k, v, torch.cat((self.middle.there, whole), -1))

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget the newest tokens. ValueError where less than a prompt's middle is left."""
        check_truncation(n_tokens)
        n = torch.as_tensor(n_tokens, device=self.n_window.device).minimum(self.lengths)
        least = self.n_coded + self.n_window.clamp_max(self.codec.kept.sinks)
        check(
            not ((n < least) & (self.n_coded > 0)).any(),
            f"truncating to {n.tolist()} tokens",
            "a prompt is coded as a whole",
            f"keep at least {least.tolist()}",
        )
        self.n_window = n - self.n_coded
        self.room = 0


# -------------------- the path


class CodedPath(nn.Module):
    """One layer that codes a prompt. A subclass says how: code(cache, middle, q, k, v, y, n_pad),
    of a whole prompt's q, k, v and attention output y; and which codec its caches have."""

    reads_pieces = False  # a prompt is coded as a whole

    def __init__(self, m: ModelConfig, codec: Any):
        super().__init__()
        self.Hkv = m.n_kv_head
        self.D = m.head_dim
        self.cap = m.attention_cap
        self.codec = codec
        self.losses: dict[str, Tensor] = {}

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> CodedCache:
        return CodedCache(batch, self.Hkv, self.D, like, self.codec)

    def forward(self, x, q, k, v, pad: Tensor | None = None) -> Tensor:
        """Read k, v (B, Hkv, T, D) whole, for there is no prompt to code: (B, H, T, D) in q's
        dtype."""
        return attend(q, k, v, pad, self.cap)

    def prefill(self, x, q, k, v, cache: CodedCache, n_pad: Tensor | None = None) -> Tensor:
        """Let a first prompt k, v (B, Hkv, T, D) read itself whole, and code it; what comes later
        is stored whole. Returns (B, H, T, D) in q's dtype."""
        if not cache.fresh:
            return self.decode(x, q, k, v, cache, n_pad)
        y = attend(q, k, v, n_pad, self.cap)
        middle = cache.take_prompt(k, v, n_pad)
        self.code(cache, middle, q, k, v, y, n_pad)
        return y

    def decode(self, x, q, k, v, cache: CodedCache, n_pad: Tensor | None = None) -> Tensor:
        """Let new tokens k, v (B, Hkv, T, D) read themselves, and what came before as it is stored:
        (B, H, T, D)."""
        T = q.size(2)
        old = cache.read()
        n = q.size(1) // old.there.size(1)
        there = old.there.repeat_interleave(n, 1).unsqueeze(2).expand(len(q), -1, T, -1)
        own = attention_mask(T, T, n_pad, q.device).expand(len(q), there.size(1), -1, -1)
        cache.append(NewTokens(k, v, n_pad))
        k = torch.cat((old.k, k.to(old.k.dtype)), 2)
        v = torch.cat((old.v, v.to(old.v.dtype)), 2)
        return attend_masked(q, k, v, torch.cat((there, own), -1), self.cap)

    def graph_safe(self) -> bool:
        return False


class TogetherPath(CodedPath):
    """One layer that waits for the others of its prompt: the last of them codes it, by
    codec.encode(what all layers saw)."""

    def __init__(self, m: ModelConfig, codec: Any, n_layers: int):
        super().__init__(m, codec)
        self.n_layers = n_layers

    def see(self, middle: Middle, q: Tensor, k: Tensor, n_pad: Tensor | None) -> Any:
        """Return what the layer hands to the last one."""
        return middle

    def code(self, cache: CodedCache, middle: Middle, q, k, v, y, n_pad) -> None:
        seen = cache.prompt.seen
        seen.append(self.see(middle, q, k, n_pad))
        if len(seen) == self.n_layers:
            cache.set_payload(self.codec.encode(seen))
            seen.clear()


def attach_together(
    model: Transformer, codec: Any, path: type[TogetherPath] = TogetherPath
) -> Transformer:
    """Let all layers but those that slide code prompts together, in place. Returns the model."""
    blocks = coded_layers(model)
    for block in blocks:
        block.self_attn.kv_path = path(model.cfg, codec, len(blocks))
    return model


def unturned(k: Tensor, model: Transformer, number: Tensor, back: bool = False) -> Tensor:
    """Return keys k (B, Hkv, T, D) of tokens number (B, T) without their RoPE; back: with it."""
    cos = model.rope_cos[number][:, None]
    sin = model.rope_sin[number][:, None]
    return apply_rope(k, cos, sin if back else -sin)


def as_vectors(layers: list[Tensor]) -> Tensor:
    """Return each token's numbers of all layers (B, Hkv, T, D) as one vector: (B, T, p)."""
    by_token = [t.transpose(1, 2).flatten(2) for t in layers]
    return torch.cat(by_token, -1)


def coded_layers(model: nn.Module) -> list[nn.Module]:
    """List the blocks that code: all but those that slide."""
    return [block for block in model.layers if not block.slides]


def check_kept(kept: Kept) -> None:
    """Raise ValueError for a share that is no share."""
    check(
        0 < kept.share < 1,
        f"a share of {kept.share:g} of the bytes",
        "above 0 and below 1",
        "give --kv_byte_budgets=0.125",
    )


def detach(model: nn.Module) -> nn.Module:
    """Put dense paths back, in place. Returns the model."""
    return put_dense_back(model, CodedPath)


def codec_of(model: nn.Module) -> Any:
    """Return what codes the model's prompts; None where they are not coded."""
    paths = [block.self_attn.kv_path for block in model.layers]
    return next((path.codec for path in paths if isinstance(path, CodedPath)), None)
