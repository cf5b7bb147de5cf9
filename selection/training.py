"""How predictors of relevance learn: from windows of text, in each of which the last tokens show
what was worth keeping.

A window is cut into a prompt and its last `readers` tokens. One uncached pass over all of it says
how much attention those readers pay to the prompt's context: that is the target. The predictors
see the prompt alone. Letters: selector.py."""

from __future__ import annotations

import torch
from torch import Tensor

from config import check
from model import Transformer
from selection.relevance import Prompt
from selector import Selector, selector_of


def training_example(model: Transformer, idx: Tensor) -> tuple[Prompt, Tensor]:
    """Return a prompt made of windows idx (B, T), and the attention (L, B, Hkv, C) that their last
    cfg.readers tokens pay to its context."""
    s = selector_of(model)
    n_prompt = idx.size(1) - s.cfg.readers
    n_context = n_prompt - s.kv.kv_tail
    check(
        n_context >= 1,
        f"{idx.size(1)} tokens with readers={s.cfg.readers}, kv_tail={s.kv.kv_tail}",
        "some context must be left",
        "give a larger --block_size or fewer --readers",
    )
    return s.look(model, idx, n_context, n_prompt)


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
    """Return the sum of the predictors' losses on windows idx (B, T)."""
    s = selector_of(model)
    prompt, alpha = training_example(model, idx)
    losses = []
    with torch.autocast(idx.device.type, enabled=False):
        target = targets(s, prompt, alpha)
        for name, predictor in s.predictors.items():
            how = s.cfg if name == "predictor_query" else s.cfg.predictor_loss
            losses.append(predictor.loss(prompt, target[name], how))
        return torch.stack(losses).sum()


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
