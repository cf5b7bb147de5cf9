"""What a layer keeps of its tokens: the protocols that every cache and every KV path obeys, and the
cache of a whole model.

Attention needs the keys and values of all earlier tokens. A cache is the place where they lie; a
*path* (an nn.Module, `Attention.kv_path`) is the code that decides what goes in and how it is read.
A path has three verbs, and who calls says which one runs:

    forward   no cache: training, and evaluation of every position as decoding would read it
              (a selecting path, which needs a prompt to choose from, reads values whole)
    prefill   a prompt or a piece of it, of any length, goes into a cache
    decode    one new token of every sequence; the same code eager and captured in a CUDA graph

A cache counts for itself and stores no padding: `append` takes T new tokens per sequence, of which
the first n_pad are padding, and what lies in it depends on each sequence alone. It knows how it was
packed; settings that change later change new caches only.

    cache = model.new_cache(batch=2, max_len=100)     # a KVCache: one layer cache per layer
    model.prefill(idx, cache)
    model.decode(next_ids, cache)
    cache.nbytes(), cache.lengths, cache.select_sequences([1]), KVCache.cat([cache, cache])

Every tensor of a cache is declared with its *owner*: what one slot of it belongs to. Picking
sequences, joining, saving and counting bytes are then written once, in `LayerCacheBase`.

Letters: storage/layout.py.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from config import check
from storage.coordinates import coordinates_of
from storage.layout import PackedView, WindowView, slots
from storage.state import refuse_constants, refuse_difference

# -------------------- protocols


class NewTokens(NamedTuple):
    """What a path hands to a cache: T new tokens of every sequence."""

    k: Tensor  # (B, Hkv, T, D) after RoPE
    v: Tensor  # (B, Hkv, T, D)
    n_pad: Tensor | None  # (B,) leading columns of these T that are padding; None: none
    route: Tensor | None = None  # group mask (B, Hm, T, S) bool, or expert index (B, T)


class CacheView(NamedTuple):
    """All that attention may read of one layer."""

    packed: tuple[PackedView, ...]  # several for experts
    window: WindowView | None  # newest tokens, whole
    sinks: WindowView | None  # first tokens, whole


class KVPath(Protocol):
    """How one layer stores and reads keys and values: an nn.Module, held as Attention.kv_path.

    x     (B, T, n_embd), the attention's input
    q     (B, H, T, D), after RoPE
    k, v  (B, Hkv, T, D), k after RoPE
    pad, n_pad  (B,) int64, leading columns that are padding; None: none
    Each verb returns the attention output (B, H, T, D), in q's floating dtype."""

    losses: dict[str, Tensor]  # of the last training forward, by name
    reads_pieces: bool  # whether a prompt may come in pieces

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> LayerCacheBase:
        """Return an empty cache, of the dtype and on the device of `like`."""

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None
    ) -> Tensor:
        """Without a cache: training and decode-mode evaluation. pad (B,): left padding."""

    def prefill(self, x, q, k, v, cache: LayerCacheBase, n_pad: Tensor | None = None) -> Tensor:
        """Read and store a prompt or a piece of it, of any length, one token included."""

    def decode(self, x, q, k, v, cache: LayerCacheBase, n_pad: Tensor | None = None) -> Tensor:
        """Store and read one token of each sequence."""

    def graph_safe(self) -> bool:
        """Say whether decode can be captured: it neither allocates nor waits for the device."""


# -------------------- what all caches do alike


def storage_bytes(tensors) -> int:
    """Count the bytes of the storages behind the tensors, each storage once.

    Empty tensors are left out: read from a file they have the address of another one."""
    storages = [t.untyped_storage() for t in tensors if t.numel()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class LayerCacheBase(Protocol):
    """What one layer keeps of a batch of sequences: what a subclass must do, and what every cache
    does with the tensors that it declares in `owners`.

    An owner is one of

    "sequence"  the first dimension has one entry per sequence
    "token", "row", "mask", "tile", "block", "place"
                one entry per slot of these, flat over segments
    "base"      where segments start: it follows from the rest

    Tensors in GROWS are padded along dimension 2 when caches are joined, tensors in RING are
    overwritten in place when tokens leave them."""

    GROWS: tuple[str, ...] = ()
    RING: tuple[str, ...] = ()
    # whether its first prompt is looked at as a whole, so that what follows is read in another way
    ONE_PROMPT = False
    owners: dict[str, str]
    batch: int  # sequences held
    lengths: Tensor  # (B,) int64 tokens of each sequence, on the device
    dtype: torch.dtype  # of whole numbers
    fresh = True  # nothing has been appended yet
    room = 0  # tokens that fit before reserve has to be called
    prompt: PromptState | None = None  # what the layers of one KVCache share; KVCache sets it
    maps: Any = None  # a ValueBasis (storage/packed.py) through which values are stored and read

    # what a subclass does

    def reserve(self, n_tokens: int) -> None:
        """Make room: after it, n_tokens appends neither allocate nor wait for the device. A ring,
        which does not grow, does nothing."""

    def append(self, new: NewTokens) -> None:
        """Take T new tokens of every sequence."""

    def view(self) -> CacheView:
        """Return all that attention may read."""

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens (one number, or (B,)) of every sequence."""

    # a subclass says how the flat tensors are cut into segments, and what must agree to be joined

    def segments(self, owner: str) -> tuple[Tensor, Tensor]:
        """Return where the segments of a flat tensor start, and their slots: (B, h) int64 twice."""
        raise KeyError(owner)

    def fit(self, n_tokens: int) -> None:
        """Give up room beyond that for n_tokens more, and take what is missing of that; a subclass
        that takes no room ahead does nothing."""

    def set_bases(self) -> None:
        """Work out anew what follows from the other tensors: how many sequences there are, and, in
        a subclass, every tensor whose owner is "base"."""
        first = next(name for name, owner in self.owners.items() if owner == "sequence")
        self.batch = len(getattr(self, first))

    def settings(self) -> dict[str, Any]:
        """Return how it stores, by name: what two caches must share to be joined or loaded."""
        return {"kind": type(self).__name__}

    def constants(self) -> dict[str, Tensor]:
        """Return tensors of the model that are needed to read what is stored, by name: two caches
        that are joined, and a file and the model that loads it, have the same."""
        return {}

    # the rest follows

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor held; saving, loading and nbytes use this alone."""
        return {name: getattr(self, name) for name in self.owners}

    def nbytes(self) -> int:
        """Count the bytes of every tensor held, offsets and unused capacity included. What
        `constants` names is the model's, one for all of its caches, and is not counted."""
        return storage_bytes(self.state_dict().values())

    def select_sequences(self, rows: Sequence[int]) -> LayerCacheBase:
        """Return a cache of these sequences only, in this order; it shares nothing."""
        out = copy.copy(self)
        pick = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        for name, owner in self.owners.items():
            t = getattr(self, name)
            if owner == "sequence":
                setattr(out, name, t[pick])
            elif owner != "base":
                base, count = self.segments(owner)
                setattr(out, name, t[slots(base[pick], count[pick])] if t.numel() else t.clone())
        out.set_bases()
        return out

    @classmethod
    def cat(cls, caches: Sequence[LayerCacheBase]) -> LayerCacheBase:
        """Join caches of any capacities; ValueError where they were packed in different ways."""
        cls.check_alike(caches)
        parts = cls.alike(caches)
        out = copy.copy(parts[0])
        for name, owner in out.owners.items():
            if owner == "base":
                continue
            tensors = [getattr(c, name) for c in parts]
            if name in cls.GROWS:
                tensors = of_one_width(tensors)
            setattr(out, name, torch.cat(tensors))
        out.set_bases()
        out.room = 0  # the next append looks
        out.fresh = all(c.fresh for c in caches)
        return out

    @classmethod
    def cat_layers(cls, layers: Sequence[Sequence[LayerCacheBase]]) -> list[LayerCacheBase]:
        """Join the caches of several layers, each layer's as `cat` does."""
        return [cls.cat(caches) for caches in layers]

    @classmethod
    def check_alike(cls, caches: Sequence[LayerCacheBase]) -> None:
        """Raise ValueError unless the caches can be joined."""
        for cache in caches[1:]:
            refuse_difference(caches[0].settings(), cache.settings(), "caches to be joined")
            refuse_constants(caches[0].constants(), cache.constants())
        ready = len({c.fresh for c in caches}) == 1 or not cls.ONE_PROMPT
        check(
            ready,
            "an empty cache to be joined with a filled one",
            "a first prompt is looked at as a whole",
            "process the prompts first",
        )

    @classmethod
    def alike(cls, caches: Sequence[LayerCacheBase]) -> list[LayerCacheBase]:
        """Return copies whose flat tensors can be laid one after the other."""
        return [copy.copy(c) for c in caches]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what state_dict gave; ValueError for what is not its own."""
        own = self.state_dict()
        names = sorted(set(own) ^ set(state))
        named = ", ".join(names)
        check(not names, named, "another kind of cache", "load it where it was saved")
        for name, t in state.items():
            grows = self.owners[name] == "sequence" and name in self.GROWS
            fits = is_like(t, own[name], grows)
            check(
                fits,
                f"{name} {tuple(t.shape)} {t.dtype}",
                f"like {tuple(own[name].shape)} {own[name].dtype}",
                "load it into the model it was saved with",
            )
        for name, t in state.items():
            setattr(self, name, t)
        self.check_counts()
        self.set_bases()
        self.room = 0
        self.fresh = False

    def check_counts(self) -> None:
        """Raise ValueError where counts and sizes of what was loaded do not fit together."""
        sizes = {
            len(getattr(self, name)) for name, owner in self.owners.items() if owner == "sequence"
        }
        check(len(sizes) == 1, f"sequences: {sorted(sizes)}", "one number of them", "save it again")
        for name, owner in self.owners.items():
            if owner in ("sequence", "base"):
                continue
            count = self.segments(owner)[1]
            t = getattr(self, name)
            fits = len(t) == int(count.sum()) or not len(t)
            check(fits, f"{name} of {len(t)} slots", f"{int(count.sum())}", "save it again")

    def snapshot(self) -> LayerCacheBase:
        """Return what `restore` takes to put it back as it is now, whatever is appended then."""
        out = copy.copy(self)
        for name, owner in self.owners.items():
            if name in self.RING or (owner == "sequence" and getattr(self, name).ndim == 1):
                setattr(out, name, getattr(self, name).clone())
        return out

    def restore(self, saved: LayerCacheBase) -> None:
        """Put it back as it was when `saved` was taken."""
        again = saved.snapshot()  # `saved` may serve once more
        self.__dict__.clear()
        self.__dict__.update(again.__dict__)


def is_like(t: Tensor, own: Tensor, grows: bool) -> bool:
    """Say whether a tensor that was read may take the place of `own`: as many slots as it likes,
    and where it grows as much room (dimension 2), all else alike."""
    if t.dtype != own.dtype or t.ndim != own.ndim:
        return False
    free = (0, 2) if grows else (0,)
    return all(t.size(i) == own.size(i) for i in range(t.ndim) if i not in free)


def of_one_width(windows: Sequence[Tensor]) -> list[Tensor]:
    """Return windows (B, Hkv, W, D) with as many slots as the widest has."""
    most = max(t.size(2) for t in windows)
    return [t if t.size(2) == most else F.pad(t, (0, 0, 0, most - t.size(2))) for t in windows]


def valid_columns(T: int, n_pad: Tensor) -> Tensor:
    """Mark the columns that are no padding: (B, T) bool for n_pad (B,)."""
    return torch.arange(T, device=n_pad.device) >= n_pad[:, None]


def check_truncation(n_tokens: int | Tensor) -> None:
    """Raise ValueError for a negative number of tokens to keep."""
    n = torch.as_tensor(n_tokens)
    least = int(n.min()) if n.numel() else 0  # of no sequence
    check(least >= 0, f"truncating to {least} tokens", "0 or more", "give the number to keep")


def check_range(count: Tensor, most: int, name: str) -> None:
    """Raise ValueError where a count that was loaded is outside 0..most."""
    if count.numel():
        low = int(count.min())
        high = int(count.max())
        check(low >= 0 and high <= most, f"{name} {low}..{high}", f"0..{most}", "save it again")


# -------------------- of a whole model


class PromptState:
    """What the layers of one KVCache share while a prompt is read. It belongs to that cache, so
    prompts of two caches, on two threads or interleaved, never meet.

    layers     the layer caches, in order, as long as that cache lives
    seen       what each selecting layer saw of the prompt (selector.py)
    selection  what is kept of it, where one choice serves all layers
    first      the first layer's cache, whose masks others may share, while layers choose in turn"""

    def __init__(self, cache: KVCache):
        self._cache = weakref.ref(cache)  # layers lead here: a cycle would keep the cache
        self.reset()

    @property
    def layers(self) -> list:
        return self._cache().layers

    def reset(self) -> None:
        """Forget the prompt."""
        self.seen: list = []
        self.selection: Any = None
        self.first: LayerCacheBase | None = None


class KVCache:
    """What a batch has stored so far: one cache per layer.

    length   int, no sequence has more tokens: a bound that the host knows without asking the
             device
    lengths  (B,) int64, tokens of each sequence, on the device"""

    def __init__(self, layers: list, model=None):
        self.layers = layers
        self.length = 0
        self.broken = False
        self._model = weakref.ref(model) if model is not None else None
        blocks = [] if model is None else model.layers
        self._coordinates = [coordinates_of(block.self_attn.kv_path) for block in blocks]
        self._link()

    def _link(self) -> None:
        state = PromptState(self)
        for layer in self.layers:
            layer.prompt = state

    @property
    def lengths(self) -> Tensor:
        return self.layers[0].lengths

    def nbytes(self) -> int:
        """Count the bytes of all tensors held, offsets and unused capacity included; what layers
        share is counted once, and maps and other constants, which the model holds, are not."""
        return storage_bytes(self._tensors())

    def _tensors(self) -> list[Tensor]:
        """List the tensors of all layers."""
        return [t for layer in self.layers for t in layer.state_dict().values()]

    def nbytes_in_16_bits(self) -> int:
        """Count the same bytes as if whole numbers were computed in 16 bits, whatever dtype they
        have here."""
        dtype = self.layers[0].dtype
        tensors = self._tensors()
        whole = storage_bytes([t for t in tensors if t.dtype == dtype])
        rest = storage_bytes([t for t in tensors if t.dtype != dtype])
        return whole * 2 // dtype.itemsize + rest

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens more in every layer."""
        for layer in self.layers:
            layer.reserve(n_tokens)

    def fit(self, n_tokens: int) -> None:
        """Give every layer room for n_tokens more, no less and no more: the bytes it holds are
        those of its tokens then."""
        for layer in self.layers:
            if layer.batch:
                layer.fit(n_tokens)

    def check_usable(self) -> None:
        """Raise ValueError after a step that failed half-way (its layers no longer agree), and
        where the model reads numbers in other coordinates now."""
        check(
            not self.broken,
            "a cache in which a step failed half-way",
            "one that is whole is needed",
            "make a new cache and process the prompt again",
        )
        changed = next((held.changed for held in self._coordinates if held.changed), "")
        check(
            not changed,
            f"a cache from before {changed}",
            "its keys and values would be read as something else",
            "make a new cache and process the prompt again",
        )

    def snapshot(self) -> tuple[int, list]:
        """Return what puts this cache back as it is now."""
        return self.length, [layer.snapshot() for layer in self.layers]

    def restore(self, saved: tuple[int, list]) -> None:
        """Put it back as it was when `saved` was taken."""
        self.length = saved[0]
        for layer, before in zip(self.layers, saved[1], strict=True):
            layer.restore(before)
        self._link()

    def truncate(self, n_tokens: int | Tensor) -> None:
        """Forget all but the first n_tokens (one number, or (B,)) of every sequence. Where a layer
        refuses, nothing is forgotten. A cache left without a token is as good as new."""
        before = self.snapshot()
        try:
            for layer in self.layers:
                layer.truncate(n_tokens)
        except BaseException:
            self.restore(before)
            raise
        self.length = min(self.length, int(torch.as_tensor(n_tokens).max()))
        if not self.length:
            for layer in self.layers:
                layer.fresh = True

    def select_sequences(self, rows: Sequence[int]) -> KVCache:
        """Return a cache of these sequences only, in this order; it shares nothing."""
        return self._like([layer.select_sequences(rows) for layer in self.layers], self.length)

    @staticmethod
    def cat(caches: Sequence[KVCache]) -> KVCache:
        """Join the sequences of caches of one model, of any lengths and capacities, in order. One
        cache alone is returned as it is."""
        for cache in caches:
            cache.check_usable()
        if len(caches) == 1:
            return caches[0]
        layers = list(zip(*(c.layers for c in caches), strict=True))
        kinds = [type(same[0]) for same in layers]
        joined = {
            kind: iter(kind.cat_layers([same for same in layers if type(same[0]) is kind]))
            for kind in dict.fromkeys(kinds)
        }
        out = [next(joined[kind]) for kind in kinds]
        return caches[0]._like(out, max(c.length for c in caches))

    def _like(self, layers: list, length: int) -> KVCache:
        out = copy.copy(self)
        out.layers = layers
        out.length = length
        out._link()
        return out

    def filled_by(self, model=None):
        """Return `model`, or the one that made this cache; ValueError where that is gone, too."""
        model = model or (self._model() if self._model else None)
        check(
            model is not None,
            "a cache whose model is gone",
            "its fingerprint is saved, too",
            "give save or park the model",
        )
        return model

    def save(self, path, model=None) -> None:
        """Write everything held to one safetensors file, with a fingerprint of the model and of how
        it stores. ValueError where the model is gone: then give it."""
        from storage.saved import save_cache

        save_cache(self, path, self.filled_by(model))

    @staticmethod
    def load(path, model) -> KVCache:
        """Read a saved cache for `model`, to its device. ValueError where the file is damaged, or
        was saved with other weights or another way of storing."""
        from storage.saved import load_cache

        return load_cache(path, model)
