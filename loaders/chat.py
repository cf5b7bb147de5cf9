"""A conversation whose history stays in the compressed cache: each turn processes its own tokens
only.

    chat = Conversation(model, tokenizer, max_new_tokens=200)
    turn = chat.say("What is a cache?", show=print)

What a selecting path (kv=select) looks at is the first message, template included: that is
compressed, and all that follows stays whole. Value groups and integers store every token alike,
once it leaves the window. Earlier turns stay as they were read, even where a template would write
them in another way later (without their thoughts, say).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from config import check
from generate import fit_room, generate
from loaders.templates import ChatTemplate
from loaders.tokenizer import TextStream
from model import Transformer
from storage.cache import KVCache

CONTEXT_SHOWN = 16  # tokens before an answer that its text is decoded with


class Turn(NamedTuple):
    """What an answer took. n_read: tokens processed before it; n_new: tokens generated; seconds:
    of both; ended: whether the model ended it, not --max_new_tokens."""

    n_read: int
    n_new: int
    seconds: float
    ended: bool


class Conversation:
    """Messages so far, and the cache that holds them.

    cache: None before the first turn; pending: ids that were generated but are not in it yet"""

    def __init__(self, model: Transformer, tokenizer, max_new_tokens: int, **options):
        """options: of generate (temperature, top_k, top_p, seed, prefill_tokens, compiled)."""
        self.model = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.max_new_tokens = max_new_tokens
        self.options = options
        self.messages: list[dict] = []
        self.cache: KVCache | None = None
        self.pending: list[int] = []
        self.last_answer = ""

    def prompt(self, text: str) -> list[int]:
        """Add a user's message and return the ids that the cache has to read before the answer."""
        self.messages.append({"role": "user", "content": text})
        pieces = self.template.after_answer(self.messages)
        return self.pending + self.template.encode(pieces, self.last_answer)

    def say(self, text: str, show: Callable[[str], None]) -> Turn:
        """Answer a user's message; show gets the answer's text, piece by piece as it comes. Raises
        ValueError where the context has no room for it."""
        start = time.perf_counter()
        ids = self.prompt(text)
        before = 0 if self.cache is None else self.cache.length
        room = self.model.cfg.block_size - before - len(ids)
        check(
            room > 0,
            f"{len(ids)} more tokens after {before}",
            f"the context is {self.model.cfg.block_size}",
            "begin a new conversation",
        )
        stream = TextStream(self.tokenizer, ids[-CONTEXT_SHOWN:])

        def shown(new: list[int]) -> None:
            if new[0] not in self.template.ends:
                show(stream.add(new))

        turn = len(self.messages) // 2
        options = {**self.options, "seed": self.options.get("seed", 0) + turn}
        (answer,), self.cache = generate(
            self.model,
            [ids],
            min(self.max_new_tokens, room),
            stop=self.template.ends,
            cache=self.cache,
            on_token=shown,
            **options,
        )
        show(stream.end())
        self.pending = answer[self.cache.length - before - len(ids) :]
        fit_room(self.cache, 0)
        self.last_answer = self.tokenizer.decode(answer)
        self.messages.append({"role": "assistant", "content": self.last_answer})
        return Turn(
            n_read=len(ids),
            n_new=len(answer),
            seconds=time.perf_counter() - start,
            ended=not self.pending,
        )
