"""How predictors of relevance learn: from windows of text, in each of which the last tokens show
what was worth keeping.

A window is cut into a prompt and its readers. One uncached pass over all of it says how much
attention the readers pay to the prompt's context: that is the target. The predictors see the
prompt alone. There are two kinds of windows:

    continuation   the text goes on: its last cfg.readers tokens read what came before
    recall         the first half is the prompt, and the readers repeat its context, cut into
                   passages of PASSAGE tokens, in an order that nobody could guess

What goes on from a text looks at little of it; what is asked of it later may be anything. Who
learns from repetition (KVzip, arXiv 2505.23416, repeats the whole context in order) keeps what
cannot be guessed: names, numbers. cfg.recall is the share of recall windows; which they are, and
the order of their passages, depends on a window's own tokens alone. Letters: selector.py."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from config import check
from model import Transformer
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
    n_prompt = idx.size(1) - (readers or s.cfg.readers)
    n_context = n_prompt - s.kv.kv_tail
    check(
        n_context >= 1,
        f"{idx.size(1)} tokens with readers={s.cfg.readers}, kv_tail={s.kv.kv_tail}",
        "some context must be left",
        "give a larger --block_size or fewer --readers",
    )
    return s.look(model, idx, n_context, n_prompt)


def is_recall(window: Tensor, share: float) -> bool:
    """Say whether a window (T,) is one of the `share` in [0, 1] whose readers repeat it."""
    return random.Random(f"recall {window.tolist()}").random() < share


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
    """Return the sum of the predictors' losses on windows idx (B, T), a mean over windows, of which
    about cfg.recall are made recall windows."""
    s = selector_of(model)
    going_on = []
    repeating = []
    for window in idx:
        if is_recall(window, s.cfg.recall):
            repeating.append(recall_window(window, s.kv.kv_tail))
        else:
            going_on.append(window)
    total = 0.0
    if going_on:
        total = total + _loss_sum(model, torch.stack(going_on), s.cfg.readers)
    if repeating:
        total = total + _loss_sum(model, torch.stack(repeating), cdiv(idx.size(1), 2))
    return total / len(idx)


def _loss_sum(model: Transformer, idx: Tensor, readers: int) -> Tensor:
    """Return the predictors' losses on windows idx (B, T) of one kind, summed over windows."""
    s = selector_of(model)
    prompt, alpha = training_example(model, idx, readers)
    losses = []
    with torch.autocast(idx.device.type, enabled=False):
        target = targets(s, prompt, alpha)
        for name, predictor in s.predictors.items():
            how = s.cfg if name == "predictor_query" else s.cfg.predictor_loss
            losses.append(predictor.loss(prompt, target[name], how))
        return torch.stack(losses).sum() * len(idx)


@torch.no_grad()
def fit_statistics(model: Transformer, batches: list[Tensor]) -> None:
    """Set the means and standard deviations by which predictors normalise their inputs or targets,
    measured on the first two batches of windows (B, T).

    Targets depend on the selector's bases: fit after attach, and anew when bases are replaced."""
    s = selector_of(model)
    if not s.predictors:
        return
    prompts = []
    wanted = []
    for idx in batches[:2]:
        prompt, alpha = training_example(model, idx)
        prompts.append(prompt)
        wanted.append(targets(s, prompt, alpha))
    for name, predictor in s.predictors.items():
        if name == "predictor_query":
            predictor.fit(prompts, s.cfg)
        else:
            predictor.fit(prompts, [target[name] for target in wanted])
