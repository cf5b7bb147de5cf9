"""lm-evaluation-harness (pip install lm_eval) through what a run or a model stores of its tokens.

    from lm_eval import simple_evaluate
    from tasks.harness import CachedModel

    run = load_run("path/to/model")
    fold(attach_storage(run.model, kv, select, [ids]))      # or nothing: whole keys and values
    print(simple_evaluate(CachedModel(run.model, run.tokenizer), tasks=["hellaswag"])["results"])

A context but for its last token goes into the cache once, as a prompt does, and is compressed
there; that token, which predicts the first of an answer, and the answers are read after it token by
token, each stored as a generated token is. Rolling log-likelihoods have no context: windows of a
text are read at once, every position as decoding would read it, with values whole where the storage
chooses from a prompt (kv=select).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from generate import generate, prefill
from loaders.device import autocast
from loaders.tokenizer import decode_after, encoded, end_tokens
from model import Transformer, evaluating
from settings.fields import check
from storage.layout import at_least_float32
from tasks.common import ThroughCache, score_given

MAX_NEW_TOKENS = 256  # of an answer, where the task does not say
PIECE = 256  # tokens of a window whose logits are float32 at a time


class CachedModel(TemplateLM):
    """A model and its tokenizer, as the harness asks for them.

    dtype: as --dtype; rows: answers of one context, and prompts, that are read at a time"""

    def __init__(self, model: Transformer, tokenizer, dtype: str = "auto", rows: int = 16):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.rows = rows
        self._device = model.norm.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eot

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the token that begins a text, or else the one that ends it."""
        return self.eot_token_id if self.tokenizer.bos is None else self.tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
        if add_special_tokens is False:
            return list(self.tokenizer.encode(string))
        return encoded(self.tokenizer, string)

    # -- how likely a text is

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs
    ) -> list[tuple[float, bool]]:
        """Return of each (_, context, continuation) the log-probability of the continuation, and
        whether every token of it is the likeliest. Contexts that do not fit lose their
        beginning."""
        longest = self.model.cfg.block_size
        groups: dict[tuple, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            room = longest - len(continuation) + 1  # the last token is predicted only
            check(
                room > 0,
                f"an answer of {len(continuation)} tokens",
                f"the model reads {longest} tokens, one of them of the context",
                "leave the task out",
            )
            read = tuple(context[-room:]) or (self.prefix_token_id,)  # blanks may have no token
            groups.setdefault(read, []).append(i)
        out: list = [None for _ in requests]
        for context, members in tqdm(groups.items(), disable=kwargs.get("disable_tqdm", False)):
            for at in range(0, len(members), self.rows):
                part = members[at : at + self.rows]
                scores = self.scores(list(context), [requests[i][2] for i in part])
                for i, score in zip(part, scores, strict=True):
                    out[i] = score
        return out

    def scores(self, context: list[int], answers: list[list[int]]) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy) of each answer after one context, all but the
        last token of which is read once."""
        n = len(answers)
        T = max(map(len, answers))
        lengths = torch.tensor([len(a) for a in answers], device=self._device)
        padded = torch.tensor([a + [0] * (T - len(a)) for a in answers], device=self._device)
        first = torch.zeros_like(lengths)
        with evaluating(self.model), autocast(self._device, self.dtype):
            idx = torch.tensor([context], device=self._device)
            logits, cache = prefill(ThroughCache(self.model), idx, len(context) + T - 1)
            cache = cache.select_sequences([0 for _ in answers])
            about = (padded, first, lengths, logits.expand(n, -1))
            total, greedy = score_given(self.model, cache, *about)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in windows as long as the context."""
        out = []
        for request in tqdm(requests, disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(
                ids, self.prefix_token_id, self.model.cfg.block_size, 1
            )
            out.append(sum(self.window_score(*make_disjoint_window(w)) for w in windows))
        return out

    def window_score(self, context: list[int], text: list[int]) -> float:
        """Return the log-probability of a text after a context, all positions read at once."""
        idx = torch.tensor([context + text[:-1]], device=self._device)
        with evaluating(self.model), autocast(self._device, self.dtype):
            logits = self.model(idx)[0, len(context) - 1 :]  # (tokens of the text, vocab)
        targets = torch.tensor(text, device=self._device)
        pieces = zip(logits.split(PIECE), targets.split(PIECE), strict=True)
        losses = [F.cross_entropy(at_least_float32(p), y, reduction="sum") for p, y in pieces]
        return -sum(map(float, losses))

    # -- answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its stop strings."""
        return [self.answer(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    def answer(self, context: str, settings: dict) -> str:
        """Continue one context, greedily unless do_sample, by the harness's settings."""
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        n = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        longest = self.model.cfg.block_size
        check(
            0 < n < longest,
            f"max_gen_toks={n}",
            f"the model reads {longest} tokens, one of them of the context",
            "give a smaller max_gen_toks, at least 1",
        )
        ids = self.tok_encode(context)[n - longest :] or [self.prefix_token_id]
        temperature = float(settings.get("temperature", 0.0))
        new: list[int] = []

        def see(step: list[int]) -> None:
            new.append(step[0])
            if any(s in decode_after(self.tokenizer, ids, new) for s in stops):
                raise Stopped

        try:
            with autocast(self._device, self.dtype):
                rows, _ = generate(
                    ThroughCache(self.model),
                    [ids],
                    n,
                    temperature=temperature if settings.get("do_sample") else 0.0,
                    stop=end_tokens(self.tokenizer),
                    on_token=see if stops else None,
                )
            new = rows[0]
        except Stopped:
            pass
        text = decode_after(self.tokenizer, ids, new)
        return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


class Stopped(Exception):
    """A stop string has come."""
