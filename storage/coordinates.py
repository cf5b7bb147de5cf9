"""What stored numbers mean: after a fold, for example, something else, and caches from before are
refused."""

from __future__ import annotations


class Coordinates:
    """What the numbers that one KV path stores mean: shared by the path and all KVCaches made with
    it.

    changed: what gave them another meaning since then; "": nothing"""

    changed = ""


def coordinates_of(path) -> Coordinates:
    """Return what numbers that `path` stores now mean."""
    return path.__dict__.setdefault("coordinates", Coordinates())


def change_coordinates(path, how: str) -> None:
    """Let KVCaches made with `path` so far be refused: after `how` (fold, for example, which turns
    W_v and W_o) their numbers would be read as something else."""
    coordinates_of(path).changed = how
    path.coordinates = Coordinates()
