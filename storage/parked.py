"""A cache put away: one string of bytes, shorter than the cache, from which comes an equal one.

    data = park(cache)                    # bytes: for a file, a host's memory, another machine
    cache, beside = unpark(data, model)   # every tensor equal, on the model's device

A cache that nobody reads need not lie as attention wants it. The tensors of one name, "keys" say,
of all layers are one *pool* of numbers. It is cut into *planes*, byte i of every number, the
highest first, and storage/planes.py makes each as short as the bytes around tell. A byte is told,
besides by its neighbours, by

    layer  the layer that it is of
    high   the next higher byte of its number
    level  the level of its group, and which bit plane of it a row holds, where bits are routed

A byte with two 4-bit codes of a key, whose channels have nothing to do with each other, is cut in
two first. Sign and exponent of a key tell those of the next token, and mantissas tell next to
nothing. What the layer below holds at the same place was tried: it tells less than the row above
(docs/log.md). A string is

    MAGIC | sha256 of what follows | length of the manifest | manifest | tables and planes

where the manifest (JSON, deflated) says shapes, how the cache stores and of which weights it is.

Letters: storage/layout.py; n numbers of a pool.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from config import check
from settings.fields import one_line
from storage import planes
from storage.cache import KVCache
from storage.integers.format import LEVEL_PLANES, bit_planes, join_levels
from storage.layout import bits_to_mask, sum_before
from storage.saved import about, rebuilt, tensors_of

MAGIC = b"parked 1"
HEAD = struct.Struct("<8s32sI")  # MAGIC, sha256 of all that follows, bytes of the manifest
TYPES = ("bfloat16", "float16", "float32", "float64", "uint8", "int16", "int32", "int64")


class Parked(NamedTuple):
    """What comes back."""

    cache: KVCache
    beside: dict  # what was put away beside it


class Kind(NamedTuple):
    """Type and shape of a tensor."""

    dtype: str
    shape: list[int]

    @property
    def width(self) -> int:
        """Numbers of a row: between a number and the one above it."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def pools_of(kinds: dict[str, Kind]) -> list[list[str]]:
    """Sort tensors by names into pools: of one name in their layer, one type and one width. Masks
    come first, since they tell the levels of rows."""
    pools: dict[tuple, list[str]] = {}
    for name, kind in kinds.items():
        own = name.partition(".")[2]
        pools.setdefault((own, kind.dtype, kind.width), []).append(name)
    return [pools[key] for key in sorted(pools, key=lambda key: key[0] != "bits")]


def row_levels(bits: Tensor, n_groups: int) -> Tensor:
    """Return for each row of bit planes, by the masks bits (tokens,) of its tokens, 4 times the
    level of its group, and which of its planes it is: (rows,) uint8."""
    levels = join_levels(bits_to_mask(bits, 2 * n_groups)).flatten()
    n = bit_planes(levels)
    first = sum_before(n).repeat_interleave(n)
    plane = torch.arange(len(first)) - first
    return (max(LEVEL_PLANES) * levels.repeat_interleave(n) + plane).to(torch.uint8)


def known_of(
    pool: list[str], kinds: dict[str, Kind], tensors: dict[str, Tensor], layers: list[dict]
) -> dict[str, Tensor]:
    """Return what tells the numbers of a pool, by name (n,) uint8. tensors: those that are there
    already, of which masks are used; layers: how each one stores."""
    sizes = torch.tensor([kinds[name].numel for name in pool])
    known = {"layer": torch.arange(len(pool)).to(torch.uint8).repeat_interleave(sizes)}
    levels = []
    for name in pool:
        number, _, own = name.partition(".")
        stores = layers[int(number)]
        if own == "rows" and stores.get("bits", "").endswith(":0"):
            bits = tensors[f"{number}.bits"].cpu()
            found = row_levels(bits, int(stores["n_groups"]))
            levels.append(found.repeat_interleave(kinds[name].width))
    # heads that share masks have more rows than these tell
    if levels and sum(map(len, levels)) == int(sizes.sum()):
        known["level"] = torch.cat(levels)
    return known


def of_two_codes(pool: list[str], layers: list[dict]) -> bool:
    """Say whether a pool's bytes hold two codes of channels that are apart."""
    parts = [name.partition(".") for name in pool]
    return all(
        own == "keys" and layers[int(number)].get("bits", "").startswith("4:")
        for number, _, own in parts
    )


def bytes_of(t: Tensor) -> Tensor:
    """Return the bytes of t's numbers, on the host: (numbers, bytes of one) uint8."""
    flat = t.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).view(-1, t.element_size())


def write_pool(
    numbers: Tensor, known: dict[str, Tensor], width: int, halved: bool
) -> list[planes.Coded]:
    """Return the planes of numbers (n, bytes of one), the highest first; halved: of 4 bits each."""
    if halved:
        numbers = torch.cat((numbers & 15, numbers >> 4), 1)
    coded = []
    for i in reversed(range(numbers.size(1))):
        plane = numbers[:, i].contiguous()
        coded.append(planes.write(plane, known, width))
        known = known | {"high": plane}
    return coded


def read_pool(
    coded: list[planes.Coded], n: int, known: dict[str, Tensor], width: int, halved: bool
) -> Tensor:
    """Return the n numbers, (n, bytes of one), that write_pool wrote."""
    numbers = torch.empty(n, len(coded), dtype=torch.uint8)
    for i, one in zip(reversed(range(len(coded))), coded, strict=True):
        plane = planes.read(one, n, known, width)
        numbers[:, i] = plane
        known = known | {"high": plane}
    return numbers[:, :1] | numbers[:, 1:] << 4 if halved else numbers


def park(cache: KVCache, model=None, beside: dict | None = None) -> bytes:
    """Return a cache as a string of bytes, from which unpark makes an equal one.

    model: the one that filled it; needed where the cache does not know it any more
    beside: what goes along, as JSON takes it

    What layers share is put away once. Room that is not used is put away, too: `cache.fit(0)` gives
    it up. On one core of the host. ValueError for a cache that cannot be used."""
    made_of = about(cache, cache.filled_by(model))
    tensors = tensors_of(cache)
    owner: dict[tuple, str] = {}
    shared = {}
    kinds = {}
    for name, t in tensors.items():
        place = (t.data_ptr(), t.dtype, tuple(t.shape), t.stride())
        first = owner.setdefault(place, name) if t.numel() else name
        if first == name:
            kinds[name] = Kind(str(t.dtype).removeprefix("torch."), list(t.shape))
        else:
            shared[name] = first
    how = []
    parts = []
    for pool in pools_of(kinds):
        known = known_of(pool, kinds, tensors, made_of["layers"])
        numbers = torch.cat([bytes_of(tensors[name]) for name in pool])
        halved = of_two_codes(pool, made_of["layers"])
        coded = write_pool(numbers, known, kinds[pool[0]].width, halved)
        how.append([[c.context, len(c.table), len(c.data)] for c in coded])
        parts += [part for c in coded for part in (c.table, c.data)]
    manifest = {
        "about": made_of,
        "kinds": kinds,
        "shared": shared,
        "planes": how,
        "beside": beside or {},
    }
    manifest = zlib.compress(json.dumps(manifest).encode())
    body = b"".join((manifest, *parts))
    return HEAD.pack(MAGIC, hashlib.sha256(body).digest(), len(manifest)) + body


def unpark(data: bytes, model) -> Parked:
    """Make the cache of `model` that park put away, on its device, and return what went along.

    ValueError, one line, for bytes that are cut or damaged, and for a cache of another model, or of
    one that stores in another way."""
    try:
        manifest, take = opened(data)
        kinds = {name: Kind(*kind) for name, kind in manifest["kinds"].items()}
        sharing: dict[str, list[str]] = {}
        for name, first in manifest["shared"].items():
            sharing.setdefault(first, []).append(name)
        tensors: dict[str, Tensor] = {}
        layers = manifest["about"]["layers"]
        for pool, how in zip(pools_of(kinds), manifest["planes"], strict=True):
            known = known_of(pool, kinds, tensors, layers)
            coded = [planes.Coded(context, take(n), take(m)) for context, n, m in how]
            sizes = [kinds[name].numel for name in pool]
            halved = of_two_codes(pool, layers)
            numbers = read_pool(coded, sum(sizes), known, kinds[pool[0]].width, halved)
            for name, own in zip(pool, numbers.split(sizes), strict=True):
                t = as_tensor(own, kinds[name]).to(model.norm.weight.device)
                tensors |= dict.fromkeys([name, *sharing.get(name, [])], t)
        cache = rebuilt(manifest["about"], tensors, model)
        return Parked(cache, manifest["beside"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, zlib.error) as e:
        raise ValueError(
            f"this is no parked cache of this model ({one_line(e)}); give what was parked with it"
        ) from None


def as_tensor(numbers: Tensor, kind: Kind) -> Tensor:
    """Return numbers (n, bytes of one) as the tensor that they are."""
    check(kind.dtype in TYPES, f"numbers of {kind.dtype}", ", ".join(TYPES), "park it again")
    return numbers.clone().flatten().view(getattr(torch, kind.dtype)).view(kind.shape)


def opened(data: bytes) -> tuple[dict, Callable[[int], bytes]]:
    """Return the manifest of a string, and what gives the next n bytes after it. ValueError where
    it is cut, damaged, or something else."""
    check(len(data) >= HEAD.size, f"{len(data)} bytes", f"{HEAD.size} or more", "copy it again")
    magic, digest, size = HEAD.unpack_from(data)
    check(magic == MAGIC, f"it begins with {magic!r}", f"{MAGIC!r}", "park it again")
    body = memoryview(data)[HEAD.size :]
    whole = hashlib.sha256(body).digest() == digest
    check(whole, f"{len(data)} bytes, cut or damaged", "those that were parked", "copy it again")
    at = size

    def take(n: int) -> bytes:
        nonlocal at
        at += n
        check(at <= len(body), f"{len(body)} bytes", f"{at} or more", "park it again")
        return bytes(body[at - n : at])

    return json.loads(zlib.decompress(body[:size])), take
