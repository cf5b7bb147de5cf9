"""lm-evaluation-harness (pip install lm_eval) through what a run or a model stores of its tokens.

    from lm_eval import simple_evaluate
    from tasks.harness import CachedModel

    run = load_run("path/to/model")
    fold(attach_storage(run.model, kv, select, [ids]))      # or nothing: whole keys and values
    print(simple_evaluate(CachedModel(run.model, run.tokenizer), tasks=["hellaswag"])["results"])

A context goes into the cache once, as a prompt does, and is compressed there; its answers are read
after it token by token, each stored as a generated token is. Rolling log-likelihoods have no
context: windows of a text are read at once, every position as decoding would read it, with values
whole where the storage chooses from a prompt (kv=select).
"""

from __future__ import annotations

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from generate import generate, prefill
from loaders.device import autocast
from loaders.runs import load_run
from loaders.tokenizer import decode_after, encoded, end_tokens
from model import Transformer, evaluating
from storage.layout import at_least_float32

MAX_NEW_TOKENS = 256  # of an answer, where the task does not say


@register_model("subtoken")
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

    @classmethod
    def create_from_arg_dict(cls, arg_dict: dict, additional_config: dict | None = None):
        """Load the model at `path` on `device`, as a run stores it: the harness's --model_args."""
        settings = {k: v for k, v in arg_dict.items() if k in ("dtype", "rows")}
        run = load_run(arg_dict["path"], arg_dict.get("device", "cpu"))
        return cls(run.model, run.tokenizer, **settings)

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
            groups.setdefault(tuple(context[-room:]), []).append(i)
        out: list = [None for _ in requests]
        for context, members in tqdm(groups.items(), disable=kwargs.get("disable_tqdm", False)):
            for at in range(0, len(members), self.rows):
                part = members[at : at + self.rows]
                scores = self.scores(list(context), [requests[i][2] for i in part])
                for i, score in zip(part, scores, strict=True):
                    out[i] = score
        return out

    def scores(self, context: list[int], answers: list[list[int]]) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy) of each answer after one context, which is read
        once."""
        T = max(map(len, answers))
        padded = torch.tensor([a + [0] * (T - len(a)) for a in answers], device=self._device)
        with evaluating(self.model), autocast(self._device, self.dtype):
            idx = torch.tensor([context], device=self._device)
            logits, cache = prefill(self.model, idx, len(context) + T - 1)
            cache = cache.select_sequences([0 for _ in answers])
            steps = [logits.expand(len(answers), -1)]
            for t in range(T - 1):
                steps.append(self.model.decode(padded[:, t : t + 1], cache)[:, -1])
        return score_rows(torch.stack(steps, 1), padded, answers)

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
            logits = self.model(idx)[:, len(context) - 1 :]
        target = torch.tensor([text], device=self._device)
        return score_rows(logits, target, [text])[0][0]

    # -- answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its stop strings."""
        return [self.answer(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    def answer(self, context: str, settings: dict) -> str:
        """Continue one context, greedily unless do_sample, by the harness's settings."""
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        n = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        ids = self.tok_encode(context)[-(self.model.cfg.block_size - n) :] or [self.prefix_token_id]
        temperature = float(settings.get("temperature", 0.0))
        new: list[int] = []

        def see(step: list[int]) -> None:
            new.append(step[0])
            if any(s in decode_after(self.tokenizer, ids, new) for s in stops):
                raise Stopped

        try:
            with autocast(self._device, self.dtype):
                rows, _ = generate(
                    self.model,
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


def score_rows(
    logits: Tensor, targets: Tensor, answers: list[list[int]]
) -> list[tuple[float, bool]]:
    """Return the summed log-probability of each answer and whether all of it is the likeliest.

    logits   (n, T, vocab), of every token of the answers, padded on the right
    targets  (n, T) int64, the answers, padded on the right"""
    log_p = at_least_float32(logits).log_softmax(-1)
    taken = log_p.gather(-1, targets[..., None])[..., 0]  # (n, T)
    greedy = log_p.argmax(-1) == targets
    lengths = [len(a) for a in answers]
    return [
        (float(taken[i, :n].double().sum()), bool(greedy[i, :n].all()))
        for i, n in enumerate(lengths)
    ]
