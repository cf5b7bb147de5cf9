"""How predictors of relevance learn: from windows of text, in each of which the last tokens show
what was worth keeping.

A window is cut into a prompt and its readers. One uncached pass over all of it says how much
attention the readers pay to the prompt's context: that is the target. The predictors see the
prompt alone. There are three kinds of windows:

    continuation   the text goes on: its last cfg.readers tokens read what came before
    recall         the first half is the prompt, and the readers repeat its context, cut into
                   passages of PASSAGE tokens, in an order that nobody could guess
    question       the asking tokens are the beginning of some passage of the context, and the
                   readers are the PASSAGE tokens that follow it there

What goes on from a text looks at little of it; what is asked of it later may be anything. Who
learns from repetition (KVzip, arXiv 2505.23416, repeats the whole context in order) keeps what
cannot be guessed: names, numbers. Who learns from questions looks where these point.
cfg.recall is the share of the last two kinds, two of recall for one of question; a window's kind
and its passages depend on its own tokens alone. How much of a context a token gets depends on how
long that is, so a window is first cut into shorter ones, of a length between its own and
cfg.shortest tokens. Letters: selector.py."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from torch import Tensor

from config import SelectConfig, check
from model import Transformer
from selection.calibration import look
from selection.relevance import Prompt
from selector import Selector, selector_of
from storage.layout import cdiv

PASSAGE = 32  # tokens that are repeated in a row


def training_example(
    model: Transformer, idx: Tensor, readers: int | None = None
) -> tuple[Prompt, Tensor]:
    """Return a prompt made of windows idx (B, T), and the attention (L, B, Hkv, C) that their last
    `readers` tokens (cfg.readers) pay to its context."""
    s = selector_of(model)
    readers = readers or s.cfg.readers
    n_prompt = idx.size(1) - readers
    n_context = n_prompt - s.kv.kv_tail
    check(
        n_context >= 1,
        f"{idx.size(1)} tokens with readers={readers}, kv_tail={s.kv.kv_tail}",
        "some context must be left",
        "give a larger --block_size or fewer --readers",
    )
    return look(s, model, idx, n_context, n_prompt)


def parts_at_most(length: int, shortest: int) -> int:
    """Return into how many windows of at least `shortest` tokens one of `length` is cut at most, a
    power of 2; 0: not at all."""
    return 2 ** max(0, (length // shortest).bit_length() - 1) if shortest else 1


def cut(window: Tensor, shortest: int) -> Tensor:
    """Return a window (T,) whole or cut into 2, 4, 8, ... of one length, at least `shortest` tokens
    (0: whole), drawn by its tokens: (n, T // n)."""
    halvings = parts_at_most(len(window), shortest).bit_length()
    parts = 2 ** random.Random(f"cut {window.tolist()}").randrange(halvings)
    length = len(window) // parts
    return window[: parts * length].view(parts, length)


def window_kind(window: Tensor, recall: float) -> str:
    """Return the kind of a window (T,): `recall` in [0, 1] of them are no continuation."""
    drawn = random.Random(f"kind {window.tolist()}").random()
    if drawn >= recall:
        return "continuation"
    return "question" if drawn < recall / 3 else "recall"


def recall_window(window: Tensor, region: int) -> Tensor:
    """Return the first half of a window (T,), and in place of the other the passages of that half
    but its last `region` tokens, shuffled and from the first again until T tokens are full."""
    prompt = window[: len(window) // 2]
    check(
        len(prompt) > region,
        f"{len(window)} tokens with kv_tail={region}",
        "half of a window that is repeated must be longer than that",
        "give a larger --block_size, or --recall=0",
    )
    passages = list(prompt[: len(prompt) - region].split(PASSAGE))
    random.Random(f"passages {window.tolist()}").shuffle(passages)
    repeated = torch.cat(passages)
    n_readers = len(window) - len(prompt)
    times = cdiv(n_readers, len(repeated))
    return torch.cat((prompt, repeated.repeat(times)[:n_readers]))


def question_window(window: Tensor, region: int) -> Tensor:
    """Return a window (T,) whose last region + PASSAGE tokens are replaced by as many that lie
    somewhere before them."""
    n_asked = region + PASSAGE
    last = len(window) - 2 * n_asked
    check(
        last >= 0,
        f"{len(window)} tokens with kv_tail={region}",
        f"a question needs {2 * n_asked}",
        "give a larger --block_size, or --recall=0",
    )
    start = random.Random(f"question {window.tolist()}").randint(0, last)
    return torch.cat((window[:-n_asked], window[start : start + n_asked]))


class Made(NamedTuple):
    """Training windows of one kind and length."""

    windows: Tensor  # (b, t)
    readers: int
    share: float  # of all that a loss is a mean over


def training_windows(idx: Tensor, cfg: SelectConfig, region: int) -> list[Made]:
    """Return the windows that are made of idx (B, T). Each of the B counts alike, however it is
    cut: no window's part in the mean depends on the others."""
    made: dict[tuple[str, int], list[Tensor]] = {}
    for whole in idx.cpu():  # their own tokens are asked for on the host
        pieces = cut(whole, cfg.shortest)
        for window in pieces:
            kind = window_kind(window, cfg.recall)
            if kind == "recall":
                window = recall_window(window, region)
            elif kind == "question":
                window = question_window(window, region)
            made.setdefault((kind, len(pieces)), []).append(window)
    out = []
    for (kind, parts), windows in made.items():
        half = cdiv(len(windows[0]), 2)
        readers = {"continuation": cfg.readers, "recall": half, "question": PASSAGE}[kind]
        share = len(windows) / parts / len(idx)
        out.append(Made(torch.stack(windows).to(idx.device), readers, share))
    return out


def targets(selector: Selector, prompt: Prompt, alpha: Tensor) -> dict[str, Tensor]:
    """Return what each predictor is trained towards: (Lm, B, Hm, C, S or 1), but for
    predictor_query alpha (L, B, Hkv, C) itself."""
    per_mask = selector.per_mask(alpha).unsqueeze(-1)
    return {
        "predictor": per_mask * selector.norms(prompt),
        "expected_attention": per_mask,
        "predictor_query": alpha,
    }


def predictor_loss(model: Transformer, idx: Tensor) -> Tensor:
    """Return the sum of the predictors' losses on windows idx (B, T), a mean over them, each a mean
    over what it is cut into, of which about cfg.recall are made to repeat themselves."""
    s = selector_of(model)
    total = 0.0
    region = max(s.kv.kv_tail, s.cfg.observers)
    for windows, readers, share in training_windows(idx, s.cfg, region):
        prompt, alpha = training_example(model, windows, readers)
        with torch.autocast(idx.device.type, enabled=False):
            target = targets(s, prompt, alpha)
            for name, predictor in s.predictors.items():
                how = s.cfg if name == "predictor_query" else s.cfg.predictor_loss
                total = total + predictor.loss(prompt, target[name], how) * share
    return total


@torch.no_grad()
def fit_statistics(model: Transformer, batches: list[Tensor]) -> None:
    """Set the means and standard deviations by which predictors normalise their inputs or targets,
    measured on the first four batches of windows (B, T), cut as in training but all of them read
    as continuations.

    Targets depend on the selector's bases: fit after attach, and anew when bases are replaced."""
    s = selector_of(model)
    if not s.predictors:
        return
    prompts = []
    wanted = []
    for window in itertools.chain(*batches[:4]):
        prompt, alpha = training_example(model, cut(window, s.cfg.shortest))
        prompts.append(prompt)
        wanted.append(targets(s, prompt, alpha))
    for name, predictor in s.predictors.items():
        if name == "predictor_query":
            predictor.fit(prompts, s.cfg)
        else:
            predictor.fit(prompts, [target[name] for target in wanted])
