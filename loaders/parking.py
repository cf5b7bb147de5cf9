"""A run's cache in a file of few bytes (storage/parked.py), with what was read and said, from which
another run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from config import check
from loaders.fetch import new_file
from model import Transformer
from storage.cache import KVCache
from storage.parked import park, unpark


class Held(NamedTuple):
    """One sequence, read and continued."""

    cache: KVCache
    ids: list[int]  # all its tokens; the last ones may not be in the cache yet
    messages: list[dict]  # of a conversation, see loaders/chat.py; empty: a text

    @property
    def pending(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        return self.ids[self.cache.length :]


def put_away(path: str, held: Held, model: Transformer) -> str:
    """Write what is held to a file, whole or not at all, and say in a line what that took."""
    held.cache.fit(0)
    n_held = held.cache.nbytes()
    data = park(held.cache, model, {"ids": held.ids, "messages": held.messages})
    with new_file(Path(path), ".part") as f:
        f.write(data)
    share = len(data) / n_held
    return f"parked in {path}: {len(data):,} bytes, {share:.1%} of the {n_held:,} that were held"


def take_up(path: str, model: Transformer, chat: bool) -> Held:
    """Read what put_away wrote for this model. ValueError where it is damaged, of another model, or
    a text and not a conversation (chat), or the other way round."""
    try:
        cache, beside = unpark(Path(path).read_bytes(), model)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    held = Held(cache, beside.get("ids", []), beside.get("messages", []))
    check(
        len(cache.lengths) == 1 and len(held.ids) >= cache.length,
        f"{path}: no text beside the cache",
        "the tokens that it has read are needed",
        "give a file of --park",
    )
    check(
        chat == bool(held.messages),
        f"{path} holds a {'conversation' if held.messages else 'text'}",
        f"--chat is {'' if chat else 'not '}given",
        "leave it out" if chat else "give --chat",
    )
    return held
