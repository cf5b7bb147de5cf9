"""The copies of trained maps that caches read: one for all caches of a path, where they are equal.

The problem: training writes into the maps through which values are stored and read, and a cache
that exists must be read as it was packed. So every new cache gets a copy. The idea: caches made
while nothing is written need no copy each. A path holds its newest cache's maps (`frozen`), and a
cache that was given equal ones reads those instead.

    caches = [path.new_cache(batch, max_len, like) for path in paths]
    share_copies(paths, caches)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from storage.cache import LayerCacheBase
from storage.packed import ValueBasis
from storage.state import which_equal


@torch.no_grad()
def share_copies(paths: Sequence[nn.Module], caches: Sequence[LayerCacheBase]) -> None:
    """Let new caches, one of each path, read the maps that the path's newest cache before them
    reads, where theirs are equal: one copy for all. The device is asked once for all layers, and
    only where maps are trained. Paths without `frozen` share nothing."""
    layers = zip(paths, caches, strict=True)
    with_maps = [
        (path, cache)
        for path, cache in layers
        if hasattr(path, "frozen") and cache.maps is not None
    ]
    pairs = [(all_read(path.frozen), all_read(cache.maps)) for path, cache in with_maps]
    for (path, cache), same in zip(with_maps, which_equal(pairs), strict=True):
        if same:
            cache.maps = path.frozen
        else:
            path.frozen = cache.maps


def all_read(maps: ValueBasis) -> dict[str, Tensor]:
    """Return the maps and the tables by which they turn keys back, by name: constants() leaves the
    tables out, for files and joined caches compare maps alone."""
    tables = {}
    if maps.from_keys is not None:
        tables = {"cos": maps.from_keys.cos, "sin": maps.from_keys.sin}
    return {**maps.constants(), **tables}
