"""A conversation whose history stays in the compressed cache: each turn processes its own tokens
only.

    chat = Conversation(model, tokenizer, max_new_tokens=200)
    turn = chat.say("What is a cache?", show=print)

Value groups and integers store every token alike, once it leaves the window. A selecting path
(kv=select) chooses from a prompt as a whole: from the first message, template included, and all
that follows stays whole at first. As soon as more of the conversation is whole than was chosen
from, and more than LEAST_WHOLE tokens, the next message is read with all that was said before it,
anew, as one prompt. Earlier turns stay as they were read, even where a template would write them in
another way later (without their thoughts, say).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from config import check
from generate import generate
from loaders.parking import Held
from loaders.templates import ChatTemplate
from loaders.tokenizer import TextStream
from model import Transformer
from selector import selector_of
from storage.cache import KVCache
from storage.ragged import RaggedCache

CONTEXT_SHOWN = 16  # tokens before an answer that its text is decoded with
LEAST_WHOLE = 256  # fewer are left whole: dropping some of them loses the thread and saves little


class Turn(NamedTuple):
    """What an answer took. n_read: tokens processed before it; n_new: tokens generated; seconds:
    of both; ended: whether the model ended it, not --max_new_tokens or the user; anew: whether the
    whole conversation was processed, to choose from it."""

    n_read: int
    n_new: int
    seconds: float
    ended: bool
    anew: bool


class Reading(NamedTuple):
    """What an answer begins from. ids: tokens to be read; cache: what they follow, None for the
    beginning of a conversation, or all of it anew; n_held: tokens in it; n_new: of the answer, at
    most."""

    ids: list[int]
    cache: KVCache | None
    n_held: int
    n_new: int


class Conversation:
    """Messages so far, and the cache that holds them.

    cache: None before the first turn; ids: those that it holds, or has dropped; pending: ids that
    were generated but are not in it yet"""

    def __init__(self, model: Transformer, tokenizer, max_new_tokens: int, **options):
        """options: of generate (temperature, top_k, top_p, seed, prefill_tokens, compiled)."""
        self.model = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.max_new_tokens = max_new_tokens
        self.options = options
        self.messages: list[dict] = []
        self.cache: KVCache | None = None
        self.ids: list[int] = []
        self.pending: list[int] = []
        self.last_answer = ""

    def go_on(self, held: Held) -> None:
        """Go on with a conversation that was put away."""
        self.cache = held.cache
        self.ids = held.ids[: held.cache.length]
        self.pending = held.pending
        self.messages = held.messages
        self.last_answer = held.messages[-1]["content"]

    def held(self) -> Held:
        """Return what is put away of it; after the first turn."""
        return Held(self.cache, [*self.ids, *self.pending], self.messages)

    def prompt(self, text: str) -> list[int]:
        """Add a user's message and return the ids that the cache has to read before the answer."""
        self.messages.append({"role": "user", "content": text})
        pieces = self.template.after_answer(self.messages)
        return self.pending + self.template.encode(pieces, self.last_answer)

    def selected(self) -> list[RaggedCache]:
        """Return the layers of the cache from which tokens and groups are dropped."""
        s = selector_of(self.model)
        if s is None or s.cfg.whole or self.cache is None:
            return []
        return [layer for layer in self.cache.layers if isinstance(layer, RaggedCache)]

    def n_whole(self) -> int | None:
        """Count the tokens that stand whole in such layers; None where there are none."""
        counts = [int(layer.n_window) for layer in self.selected()]
        return max(counts, default=None)

    def outgrown(self) -> bool:
        """Say whether so much is whole that a selecting path chooses anew."""
        return any(int(c.n_window) > max(int(c.n_context), LEAST_WHOLE) for c in self.selected())

    def say(
        self,
        text: str,
        show: Callable[[str], None],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Answer a user's message; show gets the answer's text, piece by piece as it comes, and
        after each token is_stopped() says whether it was the last. Raises ValueError where the
        context has no room for it. Where it fails, at a Ctrl-C too, the conversation is as it was
        before."""
        start = time.perf_counter()
        n_before = len(self.messages)
        before = (self.cache, self.ids, self.pending, self.last_answer)
        saved = None
        try:
            reading = self._reading(text)
            if reading.cache is not None:
                # first: what is saved shares its memory then
                reading.cache.fit(len(reading.ids) + reading.n_new - 1)
                saved = reading.cache.snapshot()
            answer = self._answer(reading, show, is_stopped)
            self._take(reading, answer)
        except BaseException:
            del self.messages[n_before:]
            self.cache, self.ids, self.pending, self.last_answer = before
            if saved is not None:
                self.cache.restore(saved)
                self.cache.broken = False
            raise
        return Turn(
            n_read=len(reading.ids),
            n_new=len(answer),
            seconds=time.perf_counter() - start,
            ended=not self.pending,
            anew=reading.cache is None and before[0] is not None,
        )

    def _reading(self, text: str) -> Reading:
        """Add a user's message and return what has to be read before its answer: all of the
        conversation where a selecting path chooses anew."""
        ids = self.prompt(text)
        cache = self.cache
        if self.outgrown():
            ids = self.ids + ids
            cache = None
        n_held = 0 if cache is None else cache.length
        room = self.model.cfg.block_size - n_held - len(ids)
        check(
            room > 0,
            f"{len(ids)} more tokens after {n_held}",
            f"the context is {self.model.cfg.block_size}",
            "begin a new conversation",
        )
        return Reading(ids, cache, n_held, min(self.max_new_tokens, room))

    def _answer(
        self, reading: Reading, show: Callable[[str], None], is_stopped: Callable[[], bool]
    ) -> list[int]:
        """Read, fill the cache, and return the answer's tokens, shown as they come."""
        stream = TextStream(self.tokenizer, reading.ids[-CONTEXT_SHOWN:])

        def shown(new: list[int]) -> bool:
            if new[0] not in self.template.ends:
                show(stream.add(new))
            return is_stopped()

        turn = len(self.messages) // 2
        options = {**self.options, "seed": self.options.get("seed", 0) + turn}
        (answer,), self.cache = generate(
            self.model,
            [reading.ids],
            reading.n_new,
            stop=self.template.ends,
            cache=reading.cache,
            on_token=shown,
            **options,
        )
        show(stream.end())
        return answer

    def _take(self, reading: Reading, answer: list[int]) -> None:
        """Add an answer to what was said, and make the cache as small as what it holds."""
        n_held = reading.n_held
        self.pending = answer[self.cache.length - n_held - len(reading.ids) :]
        self.ids = [*self.ids[:n_held], *reading.ids, *answer][: self.cache.length]
        self.cache.fit(0)
        self.last_answer = self.tokenizer.decode(answer)
        self.messages.append({"role": "assistant", "content": self.last_answer})
